"""What a gradient needs where autograd refuses: inference tensors, weights that another thread writes meanwhile, and
gradients by weights that two calls of a network share.

They are found out by torch's error, once a run: none can be seen from outside, as the tensors may be anywhere in an
energy (closures, fields, weights of modules, long lists).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmebm.samplers.arithmetic import map_tensors

# Functions that write to arguments of theirs without a name that says so, and operators that write to their first.
_RUNNING = ("batch_norm", "instance_norm")
_WRITES = (
    "__setitem__",
    *(
        f"__i{name}__"
        for name in (
            "add",
            "sub",
            "mul",
            "truediv",
            "floordiv",
            "mod",
            "pow",
            "and",
            "or",
            "xor",
            "lshift",
            "rshift",
            "matmul",
        )
    ),
)


class _Copies(TorchFunctionMode):
    """Operations are given copies of some tensors, each copied once; what writes in place is given the original."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: dict[int, tuple[Tensor, Tensor]] = {}

    def _needed(self, value: Tensor) -> Tensor | None:
        """The copy that operations are to see, or None where they may see ``value``."""
        raise NotImplementedError

    def _copied(self, value: Tensor) -> Tensor:
        if id(value) in self.copies:
            return self.copies[id(value)][1]
        copy = self._needed(value)
        if copy is None:
            return value
        self.copies[id(value)] = value, copy
        return copy

    def _copy(self, value: Any) -> Any:
        return map_tensors(value, self._copied)

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


class _InferenceCopies(_Copies):
    """Copies of inference tensors, which autograd can save. For what writes to one torch has an error of its own."""

    def _needed(self, value: Tensor) -> Tensor | None:
        return value.detach().clone() if value.is_inference() else None


class _ParameterCopies(_Copies):
    """Copies of parameters, which no other thread writes to between forward and backward."""

    def _needed(self, value: Tensor) -> Tensor | None:
        return value.clone() if isinstance(value, nn.Parameter) else None


_WRITTEN = "modified by an inplace operation"
# By what torch's error says.
_REMEDIES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "nference tensor": _InferenceCopies,
    _WRITTEN: _ParameterCopies,
    # weights that a chain computes once (user_modules), until the first gradient by their originals: not any more now
    "backward through the graph a second time": contextlib.nullcontext,
}
# Evaluations that another thread may spoil before weights are copied, which takes longer and TorchScript does not see.
_SPOILT = 8


class Remedies:
    """Calls a function that takes gradients; where torch's error has a remedy, again with it, and so from then on."""

    def __init__(self) -> None:
        self.used: tuple[str, ...] = ()

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        errors: list[str] = []
        while True:
            try:
                if not self.used:
                    return function(*args)
                with contextlib.ExitStack() as stack:
                    for name in self.used:
                        stack.enter_context(_REMEDIES[name]())
                    return function(*args)
            except RuntimeError as error:
                text = str(error)
                # another thread's write, whose count of versions goes on; the energy's own always says the same
                if _WRITTEN in text and text not in errors and len(errors) < _SPOILT:
                    errors.append(text)
                    continue
                found = [name for name in _REMEDIES if name in text and name not in self.used]
                if not found:
                    raise
                self.used = (*self.used, *found)
