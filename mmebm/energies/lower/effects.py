"""Which code may be called with a symbol: what has an effect besides its result must be called at every step.

An energy may count its calls, print, or draw random numbers. What it computes is compared with autograd before a fused
chain is trusted (:mod:`mmebm.samplers.verify`), but an effect shows in no result. So the bytecode is read first: it may
store nothing, and all that it names has to be modules, tensors, numbers, operations that symbols know, and functions of
which the same holds. While it runs, operations on ordinary tensors are watched: none may write to memory that was there
before, or draw random numbers; such an operation is refused before it happens.
"""

from __future__ import annotations

import argparse
import builtins
import dataclasses
import dis
import functools
import inspect
import math
import numbers
import operator
import types
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_globals
from torch.overrides import _get_current_function_mode_stack, get_overridable_functions
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from mmebm import introspect
from mmebm.energies.lower.attempt import attempt, refuse
from mmebm.energies.lower.symbol import Symbol, harmless_names
from mmebm.ops.common import originals

_STORES = frozenset(
    (
        "STORE_ATTR",
        "STORE_GLOBAL",
        "STORE_NAME",
        "STORE_SUBSCR",
        "STORE_SLICE",
        "DELETE_ATTR",
        "DELETE_GLOBAL",
        "DELETE_NAME",
        "DELETE_SUBSCR",
        "DELETE_DEREF",
        "IMPORT_NAME",
        "IMPORT_FROM",
        "SETUP_WITH",
        "BEFORE_WITH",
        "LOAD_BUILD_CLASS",
        "SEND",
        "GET_AWAITABLE",
    )
)
_BUILTINS = (
    int,
    float,
    len,
    range,
    enumerate,
    zip,
    sum,
    isinstance,
    tuple,
    list,
    dict,
    Tensor,
    AssertionError,
    ValueError,
    TypeError,
)
_MODULE_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
# Values in which no code hides
_INERT = (type(None), type(...), slice, range, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclasses.dataclass(frozen=True, order=True)
class _Record:
    """What a plain dataclass defines for syntax, which names no attribute."""

    value: float = 0.0


_OF_RECORDS = frozenset((*vars(_Record), "__post_init__"))
# What syntax calls: dataclasses makes them by exec of a string, and what is written by hand may do anything
_GENERATED = ("__eq__", "__lt__", "__le__", "__gt__", "__ge__", "__hash__", "__setattr__", "__delattr__")
# Methods of a module that nothing in its forward calls, or that only stores call, which are refused themselves
_NOT_BY_SYNTAX = (
    "__init__",
    "__new__",
    "__init_subclass__",
    "__repr__",
    "__str__",
    "__dir__",
    "__del__",
    "__setattr__",
)
_NOT_BY_SYNTAX += ("__delattr__", "__getstate__", "__setstate__", "__reduce__", "__reduce_ex__", "__copy__")
_NOT_BY_SYNTAX += ("__deepcopy__", "__sizeof__", "__class_getitem__", "__setitem__", "__delitem__", "__annotate__")
# Of tensors, parameters and arguments: read only. A symbol refuses them.
_READS = frozenset((*vars(math), "item", "detach", "t", "T"))
# Of dicts, lists and strings, such as shapes by modality
_LOOKUPS = frozenset(("items", "values", "keys", "get", "index", "count", "format", "join", "startswith", "endswith"))
_NAMESPACES = (torch, nn, nn.functional, math, operator)

# What torch.nn has that only computes, and that terms can say
_KNOWN = frozenset(
    (
        nn.Linear,
        nn.Sequential,
        nn.ModuleList,
        nn.ModuleDict,
        nn.Flatten,
        nn.Unflatten,
        nn.Identity,
        nn.Dropout,
        nn.ReLU,
        nn.LeakyReLU,
        nn.SiLU,
        nn.GELU,
        nn.Softplus,
        nn.Tanh,
        nn.ELU,
        nn.Module,
    )
)
_NORMED = "torch.nn.utils.parametriz"
_NORMS = ("torch.nn.utils.spectral_norm", "torch.nn.utils.weight_norm")


# -- what stands around the energy


def watchers(*, everywhere: bool = False) -> str | None:
    """Who watches all operations or modules from outside, and would see symbols, and few calls; or which of torch's
    functions is somebody else's, who may watch, or give it a gradient of its own."""
    modes = [m for m in _get_current_function_mode_stack() if not isinstance(m, DeviceContext)]
    modes += _get_current_dispatch_mode_stack()
    if modes:
        return f"a {type(modes[-1]).__name__} is active"
    for name in (
        "_global_forward_hooks",
        "_global_forward_pre_hooks",
        "_global_backward_hooks",
        "_global_backward_pre_hooks",
    ):
        if getattr(module_globals, name, None):
            return "there are global module hooks"
    saved = getattr(getattr(torch._C, "_autograd", None), "_top_saved_tensors_default_hooks", None)
    if saved is not None and saved(True) is not None:
        return "there are hooks on saved tensors"
    if torch.is_anomaly_enabled():
        return "autograd's anomaly detection is on"
    functorch = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)
    if functorch is not None and functorch() is not None:
        return "a transform of torch.func is under way"
    name = originals.replaced(everywhere=everywhere)
    return None if name is None else f"{name} is not torch's own"


def refuse_watchers() -> None:
    """Refuses while there are :func:`watchers`."""
    reason = watchers()
    if reason is not None:
        refuse(reason)


class Watch(TorchDispatchMode):
    """Refuses writes to memory that was there before, and random numbers, before they happen."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, Any] = {}  # storages made inside, held so that no address is used twice

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            refuse(f"it draws random numbers ({func})")
        given = {id_ for id_, _ in _storages((args, kwargs))}
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                self._check(func, argument, value)
            for argument in func._schema.arguments:
                if argument.name in kwargs:
                    self._check(func, argument, kwargs[argument.name])
        out = func(*args, **kwargs)
        self._made.update((id_, storage) for id_, storage in _storages(out) if id_ not in given)
        return out

    def _check(self, func: Any, argument: Any, value: Any) -> None:
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if writes and any(id_ not in self._made for id_, _ in _storages(value)):
            refuse(f"it changes a tensor in place ({func})")


def _storages(value: Any) -> Iterator[tuple[int, Any]]:
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        yield storage._cdata, storage
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _storages(part)
    elif isinstance(value, dict):
        yield from _storages(list(value.values()))


# -- what TorchScript may do

# By name; what writes to tensors or draws random numbers is watched, as everywhere
_SCRIPT_EFFECTS = frozenset(
    (
        *("prim::SetAttr", "prim::PythonOp", "prim::Print", "prim::fork", "prim::awaitable", "prim::CallMethod"),
        *("prim::CallFunction", "prim::Enter", "prim::Exit", "prim::rpc_async", "prim::rpc_sync", "prim::rpc_remote"),
        *("aten::_set_grad_enabled", "aten::set_grad_enabled", "aten::requires_grad_", "aten::retain_grad"),
        *("aten::backward", "aten::grad", "aten::set_data", "aten::manual_seed", "aten::seed"),
        *("aten::save", "aten::wait"),
    )
)
# What makes a list or dict that nobody else has
_SCRIPT_NEW = ("prim::ListConstruct", "prim::DictConstruct", "aten::list", "aten::dict")
_scripts: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[str, ...], str | None]] = weakref.WeakKeyDictionary()


def _effect_of_script(m: Any) -> str | None:
    """An operation in a method of a TorchScript module that may have an effect which no tensor shows."""
    names = tuple(sorted(m._c._method_names()))
    if m not in _scripts or _scripts[m][0] != names:
        graphs = [m._c._get_method(name).inlined_graph for name in names]
        found = (_effect_of(n) for graph in graphs for n in _nodes(graph))
        _scripts[m] = names, next((effect for effect in found if effect is not None), None)
    return _scripts[m][1]


def _nodes(block: Any) -> Iterator[Any]:
    for n in block.nodes():
        yield n
        for inner in n.blocks():
            yield from _nodes(inner)


def _effect_of(n: Any) -> str | None:
    kind = n.kind()
    if kind in _SCRIPT_EFFECTS or kind.partition("::")[0] not in ("prim", "aten"):
        return kind
    if kind.startswith("aten::"):
        try:
            arguments = torch._C.parse_schema(n.schema()).arguments
        except RuntimeError:  # it has none
            return kind
        for argument, given in zip(arguments, n.inputs(), strict=False):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes and not isinstance(argument.type, torch.TensorType) and given.node().kind() not in _SCRIPT_NEW:
                return kind
    return None


# -- what an operator in place may write to


def hold(value: Any) -> None:
    """Notes what lists and dicts hold, and lists of modules or parameters: ``+=`` may write to them by other names."""
    held = attempt().held
    if isinstance(value, (list, tuple, dict)):
        if not isinstance(value, tuple):
            held.append((value, value.copy()))
        if len(value) <= introspect.MAX_ITEMS:
            for part in value.values() if isinstance(value, dict) else value:
                hold(part)
    elif isinstance(value, _MODULE_LISTS):
        held.extend((place, dict(place)) for place in (value._modules, value._parameters))


@contextmanager
def writes_undone() -> Iterator[None]:
    """Around a call of the energy that nobody asked for: what it wrote to the lists and dicts that it names is taken
    back, and the energy is refused. Other writes are refused before they happen."""
    try:
        yield
    finally:
        wrote = False
        for place, before in attempt().held:
            if list(map(id, _contents(place))) != list(map(id, _contents(before))):
                wrote = True
                place.clear()
                place.update(before) if isinstance(place, dict) else place.extend(before)
    if wrote:
        refuse("it writes to a list or dict by an operator in place")


def _contents(place: list[Any] | dict[Any, Any]) -> list[Any]:
    return [*place, *place.values()] if isinstance(place, dict) else place


# -- what the code of a function may do


@functools.lru_cache(maxsize=1024)
def _stores(code: types.CodeType) -> str | None:
    """An instruction that may have an effect, in ``code`` or in what is in it."""
    for part in introspect.codes(code):
        for i in dis.get_instructions(part):
            # a variable of an enclosing function that is not examined with it
            outer = i.opname == "STORE_DEREF" and i.argval in code.co_freevars
            if i.opname in _STORES or outer:
                return i.opname
    return None


def _is_operation(value: Any) -> bool:
    """A function of torch that symbols have a rule for, however it was imported."""
    name = getattr(value, "__name__", None)
    where = getattr(value, "__module__", None) or ""
    return (
        isinstance(name, str)
        and name.removesuffix("_") in Symbol.rules
        and where.partition(".")[0] == "torch"
        and isinstance(value, (types.FunctionType, types.BuiltinFunctionType, types.BuiltinMethodType))
    )


# Make tensors; random ones are refused when they are drawn
_FACTORIES = (
    "arange",
    "zeros",
    "ones",
    "full",
    "empty",
    "eye",
    "linspace",
    "tensor",
    "as_tensor",
    "scalar_tensor",
    "rand",
    "randn",
    "randn_like",
    "rand_like",
)


@functools.cache
def _computations() -> tuple[frozenset[Any], frozenset[str]]:
    """(functions of torch that compute, also as methods; their names and those of what is read of tensors)."""
    functions = {f for group in get_overridable_functions().values() for f in group} - {Tensor.backward}
    functions |= {getattr(torch, name) for name in _FACTORIES}
    functions |= originals.COMPUTING
    names = {getattr(f, "__name__", "") for f in functions} | set(dir(Tensor))
    names |= {"special", "linalg", "fft", "logsigmoid"}  # the last calls itself log_sigmoid
    names |= {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
    effects = {"backward", "register_hook", "register_post_accumulate_grad_hook", "retain_grad", "requires_grad_"}
    # writes that no mode sees, also to memory that NumPy shares
    effects |= {"numpy", "apply_", "map_", "map2_", "share_memory_", "module_load", "rename_", "set_"}
    # what differs between a call that is watched and one that is differentiated, or between equal tensors
    effects |= {"requires_grad", "grad", "grad_fn", "is_leaf", "retains_grad", "output_nr", "_version"}
    effects |= {"is_contiguous", "stride", "storage_offset", "data_ptr", "storage", "untyped_storage"}
    # what operators and subscripts call by other names, of lists and dicts too
    effects |= {name for name in names if name.startswith("__") and name.endswith("__")} - {"__len__", "__getitem__"}
    return frozenset(functions), frozenset(names - effects)


def _is_computation(value: Any) -> bool:
    if (getattr(value, "__module__", None) or "").startswith("mmebm.ops."):
        return True
    try:
        return value in _computations()[0]
    except TypeError:  # not hashable
        return False


def _computation_names() -> frozenset[str]:
    return _computations()[1]


@functools.lru_cache(maxsize=1024)
def _class_names(kind: type) -> frozenset[str]:
    """What a user's classes define, of which an attribute's name may speak."""
    return frozenset(
        name
        for base in kind.__mro__
        if not (base.__module__ or "").startswith(("torch.", "builtins"))
        for name in vars(base)
        if not (name.startswith("__") and name.endswith("__"))
    )


def _attribute(owner: Any, name: str) -> Any:
    """``owner.name`` without running anybody's code for it."""
    if isinstance(owner, nn.Module):
        for place in (owner._modules, owner._parameters, owner._buffers):
            if name in place:
                return place[name]
    return inspect.getattr_static(owner, name, introspect.EMPTY)


def _is_record(value: Any) -> bool:
    """An object that only has fields, such as a dataclass of settings; its methods and properties are read as any."""
    kind = type(value)
    if kind in (types.SimpleNamespace, argparse.Namespace):
        return True
    if not dataclasses.is_dataclass(kind) or not hasattr(value, "__dict__"):
        return False
    for base in kind.__mro__[:-1]:
        own = {name: what for name, what in vars(base).items() if name.startswith("__")}
        by_syntax = [own[name] for name in _GENERATED if isinstance(own.get(name), types.FunctionType)]
        if not own.keys() <= _OF_RECORDS or any(what.__code__.co_filename != "<string>" for what in by_syntax):
            return False
    return True


def _names_of(m: nn.Module) -> Iterator[str]:
    for place in (m.__dict__, m._modules, m._parameters, m._buffers, _class_names(type(m))):
        yield from place


class Examination:
    """Everything that an energy may call, refused as soon as something in it may have an effect.

    ``traced``: it is called with tensors and not with symbols, so that any operation and layer of torch may be in it.
    """

    def __init__(self, *, traced: bool = False) -> None:
        self._traced = traced
        self._waiting: list[tuple[Any, Any]] = []  # (function or module, owner of its attributes)
        self._seen: set[int] = set()
        self._modules: list[nn.Module] = []
        self._records: list[Any] = []
        self._attributes: dict[str, str] = {}  # name -> who reads it

    def run(self, first: Any, owner: Any = None) -> None:
        self._waiting.append((first, owner))
        # names of attributes are looked up in every module that was found, which may bring further ones
        while self._waiting:
            while self._waiting:
                item, owner = self._waiting.pop()
                if id(item) in self._seen:
                    continue
                self._seen.add(id(item))
                if isinstance(item, nn.Module):
                    self._module(item)
                else:
                    self._function(item, owner)
            self._resolve_attributes()
        name = originals.replaced_among(self._attributes)
        if name is not None:
            refuse(f"{name} is not torch's own")

    def _module(self, m: nn.Module) -> None:
        if isinstance(m, torch.jit.ScriptModule):  # has no code of Python
            if not self._traced:
                refuse(f"it holds a {type(m).__name__}")
            effect = _effect_of_script(m)
            if effect is not None:
                refuse(f"its TorchScript may have an effect ({effect})")
            attempt().seen.append(m)
            return
        if isinstance(m, nn.parallel.DistributedDataParallel):
            # it may send tensors to other processes, whose threads would keep what watches the call alive
            refuse(f"it holds a {type(m).__name__}; its .module is what computes")
        self._modules.append(m)
        attempt().seen.append(m)
        self._waiting.extend((child, None) for child in m.children())
        examine_call(m)
        kind = type(m)
        label = kind.__name__
        name = originals.replaced_in(kind)
        if name is not None:
            refuse(f"{name} is not torch's own")
        if m.training and (m._forward_pre_hooks or torch.nn.utils.parametrize.is_parametrized(m)):
            refuse(f"{label} is parametrized and in train mode, where a call may change it")
        for base in kind.__mro__:
            if not (base.__module__ or "").startswith(("torch.", "builtins")):
                by_syntax = [
                    f for name, f in vars(base).items() if name.startswith("__") and name not in _NOT_BY_SYNTAX
                ]
                self._waiting.extend((f, m) for f in by_syntax if isinstance(f, types.FunctionType))
        owner = introspect.definer(kind, "forward")
        forward = owner.__dict__["forward"]
        if owner in _KNOWN or owner.__module__.startswith(_NORMED) or owner.__dict__.get("mmebm_pure", False):
            return
        if self._traced and "mmebm_lowered" in owner.__dict__:  # this package's, which calls others
            for energy in getattr(m, "energies", ()):
                if not isinstance(energy, (nn.Module, types.FunctionType)):
                    refuse(f"{label} holds a {type(energy).__name__}")
                self._waiting.append((energy, None))
            return
        if owner.__module__.startswith("torch."):
            if self._traced:  # what it changes besides its result are tensors, and these are watched
                return
            # batch norm, for one, counts its calls
            refuse(f"it holds a {label}")
        if not isinstance(forward, types.FunctionType):
            refuse(f"{label}.forward is a {type(forward).__name__}")
        self._waiting.append((forward, m))

    def _function(self, function: types.FunctionType, owner: Any) -> None:
        code, label = function.__code__, function.__qualname__
        attempt().seen.append(code)
        store, names = _stores(code), introspect.names_in(code)
        if store is not None:
            refuse(f"{label} may have an effect ({store})")
        named: dict[str, Any] = {f"default {i}": v for i, v in enumerate(function.__defaults__ or ())}
        named |= function.__kwdefaults__ or {}
        for name, value in introspect.closure(function):
            if value is introspect.EMPTY:
                refuse(f"{label} names {name}, which is empty")
            named[name] = value
        for name in names.globals:
            named[name] = function.__globals__.get(name, getattr(builtins, name, introspect.EMPTY))
        hold(list(named.values()))
        for name, value in named.items():
            if name != "__class__":  # of super()
                self._value(label, name, value, owner)
        for name in names.attributes:
            self._attributes.setdefault(name, label)

    def _value(self, label: str, name: str, value: Any, owner: Any) -> None:
        """Something that code names: harmless, to be examined, or refused."""
        if self._traced and _is_computation(value):
            return
        own = inspect.isfunction(value) and (value.__module__ or "").partition(".")[0] != "torch"
        if own or isinstance(value, nn.Module):
            if id(value) not in self._seen:
                self._waiting.append((value, owner))
            return
        if isinstance(value, (Tensor, numbers.Number, str, _INERT)):
            return
        items: Any = value
        if type(value) in (list, tuple, dict, torch.Size) and len(items) <= introspect.MAX_ITEMS:
            for part in list(items.values() if isinstance(value, dict) else items):
                self._value(label, name, part, owner)
            return
        if any(value is known for known in (*_NAMESPACES, *_BUILTINS)) or _is_operation(value) or value is super:
            return
        if self._traced and _is_record(value):
            if id(value) not in self._seen:
                self._seen.add(id(value))
                self._records.append(value)
            return
        refuse(f"{label} uses {name}, which is not known to be without effect")

    def _resolve_attributes(self) -> None:
        """What each name of an attribute may mean, in any of the modules."""
        harmless = harmless_names() | (_computation_names() | _LOOKUPS if self._traced else frozenset())
        found = -1
        while found != len(self._records):  # what has the name of an attribute may have attributes itself
            found = len(self._records)
            places: list[tuple[Any, frozenset[str]]] = [(m, frozenset(_names_of(m))) for m in self._modules]
            places += [(r, frozenset((*vars(r), *_class_names(type(r))))) for r in self._records]
            unknown: dict[str, str] = {}
            for name, label in self._attributes.items():
                owners = [owner for owner, names in places if name in names]
                if not owners and name not in harmless and name not in _READS:
                    unknown[name] = label
                for owner in owners:
                    self._resolve(label, name, owner)
        if unknown and not self._waiting:
            name, label = next(iter(unknown.items()))
            refuse(f"{label} uses {name}, which is not known to be without effect")

    def _resolve(self, label: str, name: str, owner: Any) -> None:
        """What the attribute ``name`` of ``owner`` is."""
        value = _attribute(owner, name)
        own = self._traced and isinstance(value, types.FunctionType) and name not in owner.__dict__
        if own and _is_pure(type(owner), name):
            return
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        elif isinstance(value, property):
            value = value.fget
        hold(value)
        self._value(label, name, value, owner)


def examine_call(m: nn.Module) -> None:
    """Refuses a module whose call is more than its ``forward``."""
    label = type(m).__name__
    call = introspect.definer(type(m), "__call__")
    # lists of parameters have one that raises
    known = call is nn.Module or call.__module__ == nn.ParameterList.__module__
    if "forward" in m.__dict__ or "__call__" in m.__dict__ or not known:
        refuse(f"{label}'s call was replaced")
    hooks = [*m._forward_hooks.values(), *m._backward_hooks.values(), *m._backward_pre_hooks.values()]
    hooks += [h for h in m._forward_pre_hooks.values() if type(h).__module__ not in _NORMS]
    if hooks:
        refuse(f"{label} has hooks")


def examine(energy: Any, *, traced: bool = False) -> None:
    """Refuses an energy that may have an effect besides its result, or that is no module, method or function."""
    examination, kind = Examination(traced=traced), type(energy)
    if isinstance(energy, (nn.Module, types.FunctionType)):
        examination.run(energy)
    elif isinstance(energy, types.MethodType) and isinstance(energy.__self__, nn.Module):
        function, owner = energy.__func__, energy.__self__
        examination.run(owner)
        known = not isinstance(function, types.FunctionType) or function.__module__.startswith("torch.")
        if known and not traced:
            refuse(f"it is a {kind.__name__}")
        if not known and not (traced and _is_pure(type(owner), function.__name__)):
            examination.run(function, owner)
    elif traced and callable(energy) and _is_pure(kind, "__call__"):
        attempt().seen.append(kind)
        for part in vars(energy).values():
            if isinstance(part, nn.Module):
                examination.run(part)
    else:
        refuse(f"it is a {kind.__name__}")


def _is_pure(kind: type, name: str) -> bool:
    """Whether the class from which ``kind`` has ``name`` says that its methods only compute."""
    return introspect.definer(kind, name).__dict__.get("mmebm_pure", False)
