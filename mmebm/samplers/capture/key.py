"""When do two calls of an energy compute the same? What a captured graph has baked in, as a key.

A graph repeats kernels at addresses. It is valid for a later call if Python would have launched the same ones: the same
code, the same numbers, strings and flags in whatever the code can see, tensors at the same addresses. An energy that is
made anew at each call (a lambda, a small object) is then still the same one: plain objects count by what they hold, not
by who they are. Modules count by both.

Where to look is said by :mod:`mmebm.introspect`. What code reads by other ways is not seen, nor are the fields of
optimizers, arrays beyond 64 numbers, and long containers.
"""

from __future__ import annotations

import functools
import numbers
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mmebm.introspect import MAX_DEPTH, class_parts, function_in, in_library, is_foreign, package, parts
from mmebm.ops.common import originals
from mmebm.ops.common.untyped import DICT, TORCH

# Values that are their own key.
_PLAIN = (bool, int, complex, torch.dtype, torch.device, torch.Size, torch.layout)
# Numbers of a tensor on another device (kernels take them by value) or of an array; above, writes are counted instead.
_SMALL = 64
_WHOLE = frozenset((bool, int))
_CONTAINERS: tuple[type[Any], ...] = (list, tuple, dict, set, frozenset)
_WORDS: tuple[type[Any], ...] = (int, float, complex, str, bytes)


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


class Identity:
    """Collects the key of one call.

    Attributes:
        full: everything that a graph has baked in.
        kind: the same without addresses and numbers: what stays where a weight is replaced or a number changes.
        inputs: the tensors to be copied into static ones, each once.
        held: tensors that are read where they lie.
        buffers: of every buffer found the dict where its module keeps it, and its name there.
        generators: of random numbers, on the chain's device.
        watched: objects known by their id; a key is worth nothing once one of them is gone.
        refusal: why this cannot be captured, or None.
    """

    def __init__(self, device: torch.device, *, training: bool) -> None:
        self.device: torch.device = device
        self.training: bool = training
        self.full: list[Any] = []
        self.kind: list[Any] = []
        self.inputs: list[Tensor] = []
        self.held: list[Tensor] = []
        self.buffers: list[tuple[dict[str, Tensor | None], str]] = []
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
        elif type(value) is DICT:
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
            self.full.append(repr(TORCH.Tensor.tolist(t.detach())))
        else:
            self.full.extend((t.data_ptr(), id(t) if t.is_inference() else t._version))

    def _by_id(self, item: Any) -> None:
        self.kind.append(type(item))
        self.full.append((type(item), id(item)))
        self.watched.append(item)

    def add(self, item: object, depth: int = 0) -> None:
        """Whatever an energy may hold."""
        kind = type(item)
        if kind in (str, bytes) or item is None:
            self.both(item)
        elif kind is float or kind in _PLAIN:
            self.number(item)
        elif isinstance(item, (type, types.ModuleType)):
            self.both(item)
        elif isinstance(item, Tensor):
            self._tensor(item)
        elif kind is tuple and self._sizes(item):
            pass
        elif id(item) in self._seen:
            self.both("again", self._seen[id(item)][0])
        else:
            self._seen[id(item)] = len(self._seen), item
            if isinstance(item, nn.Module):
                self._module(item, depth)
            elif depth > MAX_DEPTH:
                self._by_id(item)
                if not in_library(kind):  # what is in it is not looked at
                    self.refuse(f"it reaches a {kind.__name__} in more than {MAX_DEPTH} steps")
            else:
                self._object(item, kind, depth)

    def _sizes(self, item: Any) -> bool:
        """Takes a tuple of a few whole numbers, of which layers have many; whether it is one."""
        kinds = tuple(map(type, item[:_SMALL]))
        if not 0 < len(item) <= _SMALL or not _WHOLE.issuperset(kinds):
            return False
        self.kind.append(kinds)
        self.full.append((kinds, item))
        return True

    def _module(self, m: nn.Module, depth: int) -> None:
        self._by_id(m)
        if isinstance(m, torch.jit.ScriptModule):
            self.refuse(f"{type(m).__name__} hides its tensors")
            return
        replaced = originals.replaced_in(type(m))
        if replaced is not None:
            self.refuse(f"{replaced} is not torch's own")
        for name, value in m.__dict__.items():
            if name == "_buffers":
                self.buffers.extend((value, key) for key in value)
            if name == "training":
                if self.training:
                    self.both(value)
            elif name in ("_parameters", "_buffers", "_modules"):
                for key, part in value.items():
                    self.both(key)
                    self.add(part, depth)
            elif not isinstance(value, _CONTAINERS) or value:  # hooks, mostly, of which there are none
                self.both(name)
                self.add(value, depth + 1)
        self._parts(class_parts(type(m)), depth)
        self._class(type(m), depth)

    def _class(self, kind: type[object], depth: int) -> None:
        """What a user's class says: code that is called by its name, words and functions that stand in it."""
        if id(kind) in self._seen:
            return
        self._seen[id(kind)] = len(self._seen), kind
        for base in kind.__mro__:
            if is_foreign(base):
                continue
            for name, value in vars(base).items():
                if name.startswith("__") and name.endswith("__") and name != "__call__":
                    continue
                function = function_in(value)  # what it is given and closes over is among the parts of the class
                if function is not None:
                    self.both(function.__code__)
                else:
                    self.add(getattr(value, "__func__", value), depth + 1)

    def _parts(self, named: Iterable[tuple[Any, Any]], depth: int) -> None:
        for name, value in named:
            self.add(name, depth + 1)
            self.add(value, depth + 1)

    def _object(self, item: Any, kind: type[object], depth: int) -> None:
        if isinstance(item, torch.Generator):
            self._by_id(item)
            if item.device == self.device:
                self.generators.append(item)
        elif in_library(kind) and (package(kind) != "torch" or isinstance(item, torch.optim.Optimizer)):
            self.both(kind)
            small = getattr(item, "size", _SMALL + 1)
            if isinstance(small, int) and small <= _SMALL and hasattr(item, "tobytes"):
                self.full.append(item.tobytes())  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
            else:
                self._by_id(item)
        else:
            self.both(kind, len(item) if isinstance(item, _CONTAINERS) else None)
            if isinstance(item, (numbers.Number, str, bytes)):  # of a class of its own, which need not have fields
                base: Any = next((base for base in _WORDS if isinstance(item, base)), kind)
                self.full.append(base.__repr__(item))
            if isinstance(item, types.FunctionType):
                self.both(item.__code__)
            inside = list(parts(item))
            self._parts(inside, depth)
            if not in_library(kind) and package(kind) != "builtins":
                self._class(kind, depth)
            if not inside and isinstance(item, _CONTAINERS):
                self.full.append(id(item) if item else 0)  # a long one
            elif not inside and (package(kind) == "builtins" or in_library(kind)):
                self._by_id(item)
