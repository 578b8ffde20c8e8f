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


def refuse_watchers() -> None:
    """Refuses while somebody watches all operations or modules from outside: they would see symbols, and few calls."""
    modes = [m for m in _get_current_function_mode_stack() if not isinstance(m, DeviceContext)]
    modes += _get_current_dispatch_mode_stack()
    if modes:
        refuse(f"a {type(modes[-1]).__name__} is active")
    for name in (
        "_global_forward_hooks",
        "_global_forward_pre_hooks",
        "_global_backward_hooks",
        "_global_backward_pre_hooks",
    ):
        if getattr(module_globals, name, None):
            refuse("there are global module hooks")
    saved = getattr(getattr(torch._C, "_autograd", None), "_top_saved_tensors_default_hooks", None)
    if saved is not None and saved(True) is not None:
        refuse("there are hooks on saved tensors")
    if torch.is_anomaly_enabled():
        refuse("autograd's anomaly detection is on")
    functorch = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)
    if functorch is not None and functorch() is not None:
        refuse("a transform of torch.func is under way")


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


# -- what an operator in place may write to

_Source = tuple[str, str]  # (what kind of, its name where it has one)
# What leaves a new object, or a number; binary operators in place give what they were given, which is named anyway
_NEW = (
    "LOAD_CONST",
    "LOAD_SMALL_INT",
    "BUILD_",
    "UNARY_",
    "COMPARE_",
    "IS_OP",
    "CONTAINS_OP",
    "LIST_",
    "SET_",
    "DICT_",
)
_NEW += ("FORMAT_", "CONVERT_", "MAKE_FUNCTION", "LOAD_BUILD_CLASS", "BINARY_", "INPLACE_")
_TAKES = ("STORE_", "POP_", "DELETE_", "RETURN_", "JUMP_")
# The operators in place among the arguments of BINARY_OP, from Python 3.11 on; after them the subscript, from 3.14 on
_INPLACE_OPS = range(13, 26)
_MODULE_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def _instructions(code: types.CodeType) -> Iterator[dis.Instruction]:
    """Those that matter, one for each of two locals that Python 3.13 reads and stores at once."""
    for i in dis.get_instructions(code):
        if isinstance(i.argval, tuple) and "_FAST" in i.opname:
            ends = i.opname.startswith("STORE"), i.opname.endswith("STORE_FAST")
            for stores, name in zip(ends, i.argval, strict=True):
                yield i._replace(opname="STORE_FAST" if stores else "LOAD_FAST", argval=name)
        elif i.opname not in ("CACHE", "EXTENDED_ARG", "NOP"):
            yield i


class _Code:
    """The instructions of a code, with the height of the stack after each (from one jump to the next)."""

    def __init__(self, code: types.CodeType) -> None:
        self.read = list(_instructions(code))
        self.height, height = [0] * (len(self.read) + 1), 0
        self.jumps: dict[int, list[int]] = {}  # from where code goes on at an offset
        for at, i in enumerate(self.read):
            height += self._effect(i, False)
            self.height[at] = height
            if i.opcode in dis.hasjrel or i.opcode in dis.hasjabs:
                self.jumps.setdefault(i.argval, []).append(at)

    @staticmethod
    def _effect(i: dis.Instruction, jump: bool) -> int:
        if i.opname in ("STORE_FAST", "LOAD_FAST"):
            return -1 if i.opname == "STORE_FAST" else 1
        return dis.stack_effect(i.opcode, i.arg if i.opcode >= dis.HAVE_ARGUMENT else None, jump=jump)

    def on_top(self, at: int) -> set[_Source]:
        """Where the value may be from that instruction ``at`` finds on top of the stack."""
        found = {self._source(at, self.height[at - 1])}
        for jump in self.jumps.get(self.read[at].offset, ()):
            i = self.read[jump]
            if jump > at:  # the next round of a loop
                return {("unknown", "")}
            found.add(self._source(jump, self.height[jump - 1] + self._effect(i, True)))
        return found

    def below(self, at: int, many: int) -> set[_Source]:
        """Where the ``many`` values on top of the stack are from."""
        top = self.height[at - 1]
        return {self._source(at, slot) for slot in range(top - many + 1, top + 1)}

    def _source(self, at: int, slot: int) -> _Source:
        """Where the value in a slot of the stack is from, before instruction ``at``."""
        for j in reversed(range(at)):
            i, top = self.read[j], self.height[j]
            name = i.opname
            if name.startswith("UNPACK_SEQUENCE") and self.height[j - 1] <= slot <= top:
                built = self.read[j - 1]
                if built.opname == "BUILD_TUPLE" and built.arg == i.arg and not self._joins(j):
                    return self._source(j - 1, self.height[j - 2] - (i.arg or 0) + 1 + top - slot)
                return "item", ""
            moved = {"SWAP": i.arg or 0, "ROT_TWO": 2, "ROT_THREE": 3, "ROT_FOUR": 4}.get(name, 0)
            last = top - moved + 1
            if moved and slot >= last:  # rotated by one, or only the two ends exchanged
                if self._joins(j):
                    break
                if slot == last:
                    slot = top
                elif name != "SWAP":
                    slot -= 1
                elif slot == top:
                    slot = last
                continue
            if top == slot and not name.startswith(_TAKES):
                if name in ("COPY", "DUP_TOP"):
                    return self._source(j, slot - 1) if i.arg in (None, 1) else ("unknown", "")
                return self._kind(i)
            if self._joins(j):
                break
        return "unknown", ""

    def _joins(self, at: int) -> bool:
        return self.read[at].is_jump_target

    @staticmethod
    def _kind(i: dis.Instruction) -> _Source:
        name, value = i.opname, i.argval
        if name.startswith(("LOAD_FAST", "LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF")):
            return "name", value
        if name.startswith(("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")):
            return "attribute", value
        if name.startswith("CALL"):
            return "call", ""
        if name in ("BINARY_SUBSCR", "FOR_ITER") or (name == "BINARY_OP" and (i.arg or 0) not in range(26)):
            return "item", ""
        return ("new", "") if name.startswith(_NEW) else ("unknown", "")


def _is_inplace(i: dis.Instruction) -> bool:
    return i.opname.startswith("INPLACE_") or (i.opname == "BINARY_OP" and i.arg in _INPLACE_OPS)


@functools.lru_cache(maxsize=1024)
def _written(code: types.CodeType) -> tuple[frozenset[_Source], frozenset[_Source], frozenset[_Source]]:
    """(what operators in place (``+=``) may write to, what may be returned, and what is put into a tuple or list) in
    ``code`` and in what is in it: local names are followed to all that they are ever names of."""
    sources: dict[str, set[_Source]] = {}
    targets: set[_Source] = set()
    extended: set[str] = set()
    returned: set[_Source] = set()
    packed: set[_Source] = set()
    for part in introspect.codes(code):
        arguments = part.co_argcount + part.co_kwonlyargcount
        several = bool(part.co_flags & inspect.CO_VARARGS) + bool(part.co_flags & inspect.CO_VARKEYWORDS)
        arguments += several
        packed |= {("argument", "")} if several else set()
        for name in part.co_varnames[:arguments]:
            sources.setdefault(name, set()).add(("argument", ""))
        c = _Code(part)
        for at, i in enumerate(c.read):
            if _is_inplace(i):
                stored = c.read[at + 1]
                known = stored.opname.startswith(("STORE_FAST", "STORE_DEREF"))
                targets.add(("name", stored.argval) if known else ("unknown", ""))
                if c.read[at - 1].opname.startswith(("BUILD_", "LIST_", "SET_", "DICT_")):
                    extended.add(str(stored.argval))
            elif i.opname.startswith(("STORE_FAST", "STORE_DEREF")):
                sources.setdefault(i.argval, set()).update(c.on_top(at))
            elif i.opname == "RETURN_VALUE":
                returned |= c.on_top(at)
            elif i.opname in ("LIST_APPEND", "SET_ADD", "MAP_ADD", "YIELD_VALUE"):
                packed |= c.on_top(at)
            elif i.opname in ("BUILD_TUPLE", "BUILD_LIST", "BUILD_MAP", "BUILD_CONST_KEY_MAP"):
                packed |= c.below(at, (i.arg or 0) * (1 + (i.opname == "BUILD_MAP")))

    def followed(found: set[_Source]) -> frozenset[_Source]:
        waiting, seen = list(found), set(found)
        while waiting:
            kind, name = waiting.pop()
            more = sources.get(name, set()) - seen if kind == "name" else set()
            seen |= more
            waiting += more
        return frozenset(seen - {("new", "")})

    if any(("argument", "") in followed({("name", name)}) for name in extended):
        targets.add(("list", ""))  # an argument to which a list is added is one
    return followed(targets), followed(returned), followed(packed)


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
    names = {getattr(f, "__name__", "") for f in functions} | set(dir(Tensor)) | {"special", "linalg", "fft"}
    names |= {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
    effects = {"backward", "register_hook", "register_post_accumulate_grad_hook", "retain_grad", "requires_grad_"}
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
        self._containers: set[_Source] = set()  # names of lists and their like
        self._plain = self._nested = False  # whether there are lists and dicts, and such inside of others
        self._written: list[tuple[str, frozenset[_Source]]] = []
        self._returned: set[_Source] = set()
        self._packed: set[_Source] = set()

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
        self._refuse_writing_in_place()

    def _note(self, kind: str, name: str, value: Any) -> None:
        """Something that ``name`` is a name of: whether an operator in place may change it."""
        if isinstance(value, (list, dict, *_MODULE_LISTS)):
            self._containers.add((kind, name))
            self._plain |= not isinstance(value, nn.Module)
        if isinstance(value, (list, tuple, dict)):
            for part in value.values() if isinstance(value, dict) else value:
                self._nested |= isinstance(part, (list, dict))
                if isinstance(part, tuple):
                    self._note("item", "", part)

    def _refuse_writing_in_place(self) -> None:
        """Refuses ``+=`` and its like to what may be a list, dict or list of modules that outlives the call. Other such
        objects are refused by their names, and tensors are watched."""
        returns = any(self._may_be_held(source, returns=False) for source in self._returned if source[0] != "argument")
        # by their names, and not as what may be anything
        packed = [source for source in self._packed if source[0] in ("name", "attribute", "argument")]
        self._nested |= any(self._may_be_held(source, returns) for source in packed)
        for label, targets in self._written:
            if any(self._may_be_held(source, returns) for source in targets):
                refuse(f"{label} may have an effect (an operator in place)")

    def _may_be_held(self, source: _Source, returns: bool) -> bool:
        kind, _ = source
        if kind in ("name", "attribute"):
            return source in self._containers or (kind == "attribute" and returns)  # of a property
        return {
            "call": returns or (self._nested and "get" in self._attributes),
            "item": self._nested,
            "argument": self._plain,
            "list": True,
            "unknown": bool(self._containers) or self._nested,
        }[kind]

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
        if m.training and (m._forward_pre_hooks or torch.nn.utils.parametrize.is_parametrized(m)):
            refuse(f"{label} is parametrized and in train mode, where a call may change it")
        for base in kind.__mro__:
            if not (base.__module__ or "").startswith(("torch.", "builtins")):
                by_syntax = [
                    f for name, f in vars(base).items() if name.startswith("__") and name not in _NOT_BY_SYNTAX
                ]
                self._waiting.extend((f, m) for f in by_syntax if isinstance(f, types.FunctionType))
        owner = introspect.definer(kind, "forward")
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
        function = owner.__dict__["forward"]
        if not isinstance(function, types.FunctionType):
            refuse(f"{label}.forward is a {type(function).__name__}")
        self._waiting.append((function, m))

    def _function(self, function: types.FunctionType, owner: Any) -> None:
        code, label = function.__code__, function.__qualname__
        attempt().seen.append(code)
        store, names = _stores(code), introspect.names_in(code)
        if store is not None:
            refuse(f"{label} may have an effect ({store})")
        written, returned, packed = _written(code)
        self._written.append((label, written))
        self._returned |= returned
        self._packed |= packed
        named: dict[str, Any] = {f"default {i}": v for i, v in enumerate(function.__defaults__ or ())}
        named |= function.__kwdefaults__ or {}
        for name, value in introspect.closure(function):
            if value is introspect.EMPTY:
                refuse(f"{label} names {name}, which is empty")
            named[name] = value
        for name in names.globals:
            named[name] = function.__globals__.get(name, getattr(builtins, name, introspect.EMPTY))
        for name, value in named.items():
            self._note("name", name, value)
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
        self._note("attribute", name, value)
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
