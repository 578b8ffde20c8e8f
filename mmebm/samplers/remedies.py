"""What a gradient needs where autograd refuses: inference tensors, and weights that another thread writes meanwhile.

Both are found out by torch's error, once a run: neither can be seen from outside, as the tensors may be anywhere in an
energy (closures, fields, weights of modules, long lists).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Functions that write to arguments of theirs without a name that says so, and operators that write to their first.
_RUNNING = ("batch_norm", "instance_norm")
_WRITES = ("__setitem__", *(f"__i{name}__" for name in (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift", "matmul",
)))  # fmt: skip


class _InferenceCopies(TorchFunctionMode):
    """Operations are given copies of inference tensors, which autograd can save. What writes in place is left alone:
    torch has an error for it."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: dict[int, tuple[Tensor, Tensor]] = {}

    def _copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if not value.is_inference():
                return value
            if id(value) not in self.copies:
                self.copies[id(value)] = value, value.detach().clone()
            return self.copies[id(value)][1]
        if type(value) in (list, tuple):
            return type(value)(self._copy(part) for part in value)
        if type(value) is dict:
            return {name: self._copy(part) for name, part in value.items()}
        return value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("__set__", "__get__", "is_inference"):
            return func(*args, **kwargs)
        writes = name in _WRITES or (name.endswith("_") and not name.endswith("__"))
        first = args[:1] if writes else self._copy(args[:1])
        others = {key: part if key == "out" else self._copy(part) for key, part in kwargs.items()}
        result = func(*first, *self._copy(args[1:]), **others)
        if name in _RUNNING:
            with torch.inference_mode():
                for given, copy in self.copies.values():
                    if any(given is part for part in (*args, *kwargs.values())) and not torch.equal(given, copy):
                        given.copy_(copy)
        return result


def _saved_copies() -> AbstractContextManager[Any]:
    """Autograd saves copies, so that the gradient is that of the values the energy was computed with."""
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t)


# By what torch's error says.
_REMEDIES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "nference tensor": _InferenceCopies,
    "modified by an inplace operation": _saved_copies,
}


class Remedies:
    """Calls a function that takes gradients; where torch's error has a remedy, again with it, and so from then on."""

    def __init__(self) -> None:
        self.used: tuple[str, ...] = ()

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        while True:
            try:
                if not self.used:
                    return function(*args)
                with contextlib.ExitStack() as stack:
                    for name in self.used:
                        stack.enter_context(_REMEDIES[name]())
                    return function(*args)
            except RuntimeError as error:
                found = [name for name in _REMEDIES if name in str(error) and name not in self.used]
                if not found:
                    raise
                self.used = (*self.used, *found)
