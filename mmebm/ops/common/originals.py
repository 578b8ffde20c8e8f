"""Whether torch's functions are its own: a program may put others in their places (``torch.tanh = mine``).

What an energy then computes, and with which gradient, no rule of :mod:`mmebm.energies` knows; and a reference that is
computed by them says nothing about a kernel. Seen is what was replaced after this package was imported, but for the
factories of tensors without values.
"""

from __future__ import annotations

import operator
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from mmebm.ops.common.untyped import TORCH

__all__ = ["COMPUTING", "replaced", "replaced_among", "replaced_in"]

# Among the functions that torch lets nobody override, which load, save and seed, those that compute
COMPUTING: Final = frozenset((nn.functional.hardsigmoid, nn.functional.hardswish, nn.functional.logsigmoid))
_EMPTY = ("empty", "new_empty")


def _functions(place: Any) -> list[str]:
    kinds = (types.FunctionType, types.BuiltinFunctionType)
    return [name for name, value in place.__dict__.items() if isinstance(value, kinds) and not name.startswith(_EMPTY)]


class _Place:
    """The functions of a module or class as they were; of a class also which ones it inherits."""

    def __init__(self, label: str, place: Any, names: Sequence[str] = ()) -> None:
        self.label = label
        self.now: Mapping[str, Any] = place.__dict__
        self.names: Sequence[str] = names or [name for name in _functions(place) if not name.startswith("_")]
        self.get: Callable[[Any], Any] = operator.itemgetter(*self.names)
        self.own: tuple[Any, ...] = self.get(self.now)
        self.known: dict[str, Any] = dict(zip(self.names, self.own, strict=True))
        inherited = [name for name in dir(place) if not name.startswith(_EMPTY)] if isinstance(place, type) else []
        self.inherited: frozenset[str] = frozenset(inherited) - self.now.keys()

    def replaced(self) -> str | None:
        try:
            # at the speed of C; what a set is compared with is looked through, also for an empty one
            if self.get(self.now) == self.own and (not self.inherited or self.inherited.isdisjoint(self.now)):
                return None
        except KeyError as error:
            return f"{self.label}.{error.args[0]}"
        ignored: set[Any] = TORCH.overrides.get_ignored_functions() - COMPUTING
        for name, own in zip(self.names, self.own, strict=True):
            now = self.now[name]
            if now is not own and own not in ignored and now not in ignored:
                return f"{self.label}.{name}"
        return next((f"{self.label}.{name}" for name in self.inherited if name in self.now), None)


def _of_layers() -> list[str]:
    """The functions of ``torch`` that the code of its layers and of ``torch.nn.functional`` names."""
    methods = [
        f for kind in vars(nn).values() if isinstance(kind, type) for base in kind.__mro__ for f in vars(base).values()
    ]
    codes = [f.__code__ for f in (*vars(nn.functional).values(), *methods) if isinstance(f, types.FunctionType)]
    named = {name for code in codes for name in code.co_names}
    return [name for name in _functions(torch) if name in named]


_TORCH: Final = _Place("torch", torch)
_PLACES: Final = (
    _Place("torch", torch, _of_layers()),
    _Place("torch.nn.functional", nn.functional),
    _Place("torch.linalg", torch.linalg),
    _Place("torch.special", torch.special),
    _Place("torch.fft", torch.fft),
    _Place("torch.Tensor", Tensor, _functions(Tensor)),
    _Place("torch.nn.Module", nn.Module, ("__call__", "_call_impl", "_wrapped_call_impl", "__getattr__")),
)


def replaced(*, everywhere: bool = False) -> str | None:
    """The name of a function of torch that is another one now, or None. Of ``torch`` itself looked at are those that
    layers call, which a chain can afford, or ``everywhere`` all."""
    places = (_TORCH, *_PLACES) if everywhere else _PLACES
    return next((name for place in places if (name := place.replaced()) is not None), None)


def replaced_among(names: Iterable[str]) -> str | None:
    """The same of the functions of ``torch`` of these names."""
    changed = any(name in _TORCH.known and _TORCH.now.get(name) is not _TORCH.known[name] for name in names)
    return _TORCH.replaced() if changed else None


# What stood in a class when all of it was torch's; not of classes that are made at run time, which may come and go
_sound: dict[type, tuple[Any, ...]] = {}


def replaced_in(kind: type) -> str | None:
    """The name of a method that is not torch's own in a class of torch, but for ``nn.Module``, from which ``kind`` is
    made, or None."""
    for base in kind.__mro__:
        if base is nn.Module or not base.__module__.startswith("torch."):
            continue
        now = tuple(base.__dict__.values())
        if _sound.get(base) == now:
            continue
        for name, value in base.__dict__.items():
            if isinstance(value, types.FunctionType):
                own = value.__globals__.get("__name__", "").partition(".")[0] == "torch"
            else:
                own = name != "forward"
            if not own:
                return f"{base.__name__}.{name}"
        if getattr(sys.modules.get(base.__module__), base.__name__, None) is base:
            _sound[base] = now
    return None
