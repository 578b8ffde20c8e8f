"""Chains inside torch's transforms: ``torch.compile`` leaves them alone, ``torch.func`` is refused."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from mmebm.ops.common.untyped import TORCH

P = ParamSpec("P")
R = TypeVar("R")


def opaque(function: Callable[P, R]) -> Callable[P, R]:
    """A call that ``torch.compile`` does not look into: a break of its graph, and an error of its own with
    ``fullgraph=True``. Functions inside that are compiled themselves (an energy) stay so.

    Raises:
        TypeError: under ``torch.func`` (grad, vmap, jvp and their relatives), which sees neither noise nor loops.
    """
    stack: Callable[[], Any] = TORCH._C._functorch.peek_interpreter_stack
    eager: list[Callable[P, R]] = []

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if stack() is not None:
            raise TypeError(
                f"{function.__qualname__} cannot run inside torch.func (vmap, grad, jvp, ...): give all chains in one "
                "state; for gradients through the chain differentiable=True and torch.autograd"
            )
        # imported with the first torch.compile; before it there is nothing to switch off
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not eager:
            eager.append(TORCH.compiler.disable(function))
        return eager[0](*args, **kwargs)

    # what the compiler looks at when it meets the call
    vars(call).update(_torchdynamo_disable=True, _torchdynamo_disable_msg="a chain runs as it is")
    return call
