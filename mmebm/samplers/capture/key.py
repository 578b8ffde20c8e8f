"""When do two calls of an energy compute the same? What a captured graph has baked in, as a key.

A graph repeats kernels at addresses. It is valid for a later call if Python would have launched the same ones: the same
code, the same numbers, strings and flags in whatever the code can see, tensors at the same addresses. An energy that is
made anew at each call (a lambda, a small object) is then still the same one: plain objects count by what they hold, not
by who they are. Modules count by both.

The search is that of :mod:`mmebm.samplers.user_modules`, and it notes values as well: fields, closures, defaults, the
globals that functions and the methods of a user's class name, items of short containers. It does not see what code
reads by other ways (files, the environment, long lists, the fields of optimizers and arrays beyond 64 numbers).
"""

from __future__ import annotations

import functools
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mmebm.samplers.user_modules import _MAX_DEPTH, _MAX_ITEMS, _library, _names

# Values that are their own key.
_PLAIN = (bool, int, complex, torch.dtype, torch.device, torch.Size, torch.layout)
# Libraries whose objects hold nothing that an energy computes with.
_OPAQUE = ("numpy", "logging", "threading", "_thread", "concurrent", "multiprocessing")
# Numbers of a tensor on another device (kernels take them by value) or of an array; above, writes are counted instead.
_SMALL = 64
_CONTAINERS = (list, tuple, dict, set, frozenset, OrderedDict)


def parts_of(energy: Callable[..., Any]) -> tuple[Callable[[Any], Callable[..., Any]], Any, Any]:
    """An energy as (rebuild, parts, fixed): ``rebuild(parts)`` is the energy on other tensors.

    The tensors in ``parts`` are inputs, copied at each call: the arguments of a ``functools.partial``, and what
    ``mmebm_parts`` names. That method returns (make, arguments) with ``make(*arguments)`` equal to the object, for an
    energy that is made anew for each batch. ``fixed`` is what stays: to be put into the key.
    """
    if isinstance(energy, functools.partial):
        rebuild, inner, fixed = parts_of(energy.func)

        def bind(parts: Any) -> Callable[..., Any]:
            return functools.partial(rebuild(parts[0]), *parts[1], **parts[2])

        return bind, (inner, tuple(energy.args), dict(energy.keywords)), ("partial", fixed)
    if hasattr(type(energy), "mmebm_parts"):
        make, arguments = energy.mmebm_parts()  # pyright: ignore[reportFunctionMemberAccess]
        return (lambda parts: make(*parts)), tuple(arguments), ("parts", make)
    return (lambda parts: energy), (), energy


@functools.lru_cache(maxsize=256)
def _names_of(code: types.CodeType) -> tuple[str, ...]:
    return tuple(_names(code))


_methods: weakref.WeakKeyDictionary[type, tuple[types.FunctionType, ...]] = weakref.WeakKeyDictionary()


def _methods_of(owner: type) -> tuple[types.FunctionType, ...]:
    """The plain functions in a user's class; none in a library's or in ours."""
    if _library(owner) or owner.__module__.partition(".")[0] in ("mmebm", "builtins", *_OPAQUE):
        return ()
    found = _methods.get(owner)
    if found is None:
        found = tuple(f for f in vars(owner).values() if isinstance(f, types.FunctionType))
        _methods[owner] = found
    return found


class Identity:
    """Collects the key of one call.

    Attributes:
        full: everything that a graph has baked in.
        kind: the same without addresses and numbers: what stays where a weight is replaced or a number changes.
        inputs: the tensors to be copied into static ones, each once.
        held: tensors that are read where they lie.
        buffers: (module, name) of every buffer found.
        generators: of random numbers, on the chain's device.
        watched: objects known by their id; a key is worth nothing once one of them is gone.
        refusal: why this cannot be captured, or None.
    """

    def __init__(self, device: torch.device, *, training: bool) -> None:
        self.device, self.training = device, training
        self.full: list[Any] = []
        self.kind: list[Any] = []
        self.inputs: list[Tensor] = []
        self.held: list[Tensor] = []
        self.buffers: list[tuple[nn.Module, str]] = []
        self.generators: list[torch.Generator] = []
        self.watched: list[Any] = []
        self.refusal: str | None = None
        self._seen: dict[int, tuple[int, Any]] = {}  # holds what it names, so that no id is used twice
        self._places: dict[int, int] = {}

    def both(self, *what: Any) -> None:
        """Part of both keys."""
        self.full.extend(what)
        self.kind.extend(what)

    def number(self, value: Any) -> None:
        """A value that is baked in, but says nothing of the structure."""
        self.kind.append(type(value))
        # 1, 1.0 and True are equal, and so are 0.0 and -0.0
        self.full.append((type(value), value.hex() if isinstance(value, float) else value))

    def refuse(self, reason: str) -> None:
        """Notes why this cannot be captured; the first reason stays."""
        self.refusal = self.refusal or reason

    # -- inputs

    def tensor_input(self, t: Tensor) -> None:
        """A tensor that is copied into a static one at each call."""
        if t.device != self.device:
            self._tensor(t)
            return
        self._layout(t)
        place = self._places.get(id(t))
        if place is None:
            place = self._places[id(t)] = len(self.inputs)
            self.inputs.append(t)
        self.both("input", place)

    def input(self, value: Any) -> None:
        """An argument of the energy: tensors in nested lists, tuples and dicts are inputs, the rest is as it is."""
        if isinstance(value, Tensor):
            self.tensor_input(value)
        elif type(value) in (list, tuple):
            self.both(type(value), len(value))
            for part in value:
                self.input(part)
        elif type(value) is dict:
            self.both(dict, len(value))
            for name, part in value.items():
                self.add(name)
                self.input(part)
        else:
            self.add(value)

    # -- everything else

    def _layout(self, t: Tensor) -> None:
        if type(t) not in (Tensor, nn.Parameter):
            self.refuse(f"a tensor is a {type(t).__name__}")
            self.both(type(t))
            return
        if t.layout is not torch.strided:
            self.refuse(f"a tensor is {t.layout}")
            self.both(t.layout)
            return
        self.both(tuple(t.shape), t.stride(), t.dtype, t.device)
        if not isinstance(t, nn.Parameter):  # no kernel of the state's gradient depends on a parameter's
            self.both(t.requires_grad)

    def _tensor(self, t: Tensor) -> None:
        """A tensor that is read where it lies."""
        self._layout(t)
        if self.refusal is not None:
            return
        if t.device == self.device:
            self.held.append(t)
            self.full.append(t.data_ptr())
        elif t.device.type == "cpu" and t.numel() <= _SMALL:
            # on its way to a kernel or a copy it is read by value
            self.full.append(repr(t.detach().tolist()))
        else:
            self.full.extend((t.data_ptr(), id(t) if t.is_inference() else t._version))

    def _by_id(self, item: Any) -> None:
        self.kind.append(type(item))
        self.full.append((type(item), id(item)))
        self.watched.append(item)

    def add(self, item: Any, depth: int = 0) -> None:
        """Whatever an energy may hold."""
        kind = type(item)
        if kind in (str, bytes) or item is None:
            self.both(item)
        elif kind is float or kind in _PLAIN:
            self.number(item)
        elif isinstance(item, type):
            self.both(item)
        elif isinstance(item, Tensor):
            self._tensor(item)
        elif id(item) in self._seen:
            self.both("again", self._seen[id(item)][0])
        else:
            self._seen[id(item)] = len(self._seen), item
            if isinstance(item, nn.Module):
                self._module(item, depth)
            elif depth > _MAX_DEPTH:
                self._by_id(item)
            else:
                self._object(item, depth)

    def _module(self, m: nn.Module, depth: int) -> None:
        self._by_id(m)
        if isinstance(m, torch.jit.ScriptModule):
            self.refuse(f"{type(m).__name__} hides its tensors")
            return
        for name, value in m.__dict__.items():
            if name == "_buffers":
                self.buffers.extend((m, key) for key in value)
            if name == "training":
                if self.training:
                    self.both(value)
            elif name in ("_parameters", "_buffers", "_modules"):
                for key, part in value.items():
                    self.both(key)
                    self.add(part, depth)
            elif not (type(value) in _CONTAINERS and not value):  # hooks, mostly, of which there are none
                self.both(name)
                self.add(value, depth + 1)
        self._class(type(m), depth)

    def _items(self, item: Any, depth: int) -> None:
        self.both(type(item), len(item))
        if len(item) > _MAX_ITEMS:
            self.full.append(id(item))
            return
        if isinstance(item, dict):
            for name, part in list(item.items()):
                self.add(name, depth + 1)
                self.add(part, depth + 1)
        else:
            for part in item:
                self.add(part, depth + 1)

    def _function(self, f: types.FunctionType, depth: int) -> None:
        self.both(f.__code__)
        self.add(f.__defaults__, depth + 1)
        self.add(f.__kwdefaults__, depth + 1)
        self._closure(f, depth)
        self._globals(f, depth)
        if f.__dict__:
            self.add(f.__dict__, depth + 1)

    def _closure(self, f: types.FunctionType, depth: int) -> None:
        for cell in f.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:  # a cell that is not filled yet
                continue
            self.add(content, depth + 1)

    def _globals(self, f: types.FunctionType, depth: int) -> None:
        if _library(f) or (f.__module__ or "").partition(".")[0] == "mmebm":
            return
        for name in _names_of(f.__code__):
            if name in f.__globals__:
                value = f.__globals__[name]
                if not isinstance(value, (types.ModuleType, type)):
                    self.add(value, depth + 1)

    def _class(self, owner: type, depth: int) -> None:
        """What the methods of a user's class close over and the globals they name; numbers and tensors in the class."""
        for base in owner.__mro__:
            if _library(base) or base.__module__.partition(".")[0] in ("mmebm", "builtins", *_OPAQUE):
                continue
            for name, value in vars(base).items():
                if isinstance(value, (bool, int, float, Tensor)) and not name.startswith("__"):
                    self.both(name)
                    self.add(value, depth)
            if depth > _MAX_DEPTH:
                continue
            for f in _methods_of(base):
                self._closure(f, depth)
                self._globals(f, depth)

    def _object(self, item: Any, depth: int) -> None:
        kind = type(item)
        if isinstance(item, torch.Generator):
            self._by_id(item)
            if item.device == self.device:
                self.generators.append(item)
        elif kind in _CONTAINERS:
            self._items(item, depth)
        elif isinstance(item, functools.partial):
            self.both(functools.partial)
            for part in (item.func, item.args, item.keywords):
                self.add(part, depth + 1)
        elif isinstance(item, types.MethodType):
            self.both(types.MethodType)
            self.add(item.__func__, depth + 1)
            self.add(item.__self__, depth + 1)
        elif isinstance(item, types.FunctionType):
            self._function(item, depth)
        elif kind.__module__.partition(".")[0] in _OPAQUE or isinstance(item, torch.optim.Optimizer):
            small = getattr(item, "size", _SMALL + 1)
            if isinstance(small, int) and small <= _SMALL and hasattr(item, "tobytes"):
                self.both(kind)
                self.full.append(item.tobytes())  # pyright: ignore[reportAttributeAccessIssue]
            else:
                self._by_id(item)
        else:
            found = False
            self.both(kind)
            for name, value in _fields(item):
                found = True
                self.both(name)
                self.add(value, depth + 1)
            self._class(kind, depth)
            if not found and (kind.__module__ == "builtins" or _library(kind)):
                self._by_id(item)


def _fields(item: Any) -> Iterator[tuple[str, Any]]:
    fields = getattr(item, "__dict__", None)
    if isinstance(fields, dict):
        yield from list(fields.items())
    for owner in type(item).__mro__:
        slots = owner.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(item, name):
                yield name, getattr(item, name)
