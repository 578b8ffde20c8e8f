"""The C++ implementation of ``residual``: :file:`csrc/residual/cpu_kernel.cpp`.

No result depends on the number of threads (``torch.get_num_threads()``) or on how a batch is split.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from mmebm import native
from mmebm.ops import dispatch
from mmebm.ops.common.address import MOST_CHAINS, Addresses

__all__ = ["residual", "supports"]

# Likelihood in csrc/residual/job.h
_LIKELIHOODS: Final = ("gaussian", "laplace", "categorical")
_STORAGE: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Below this many elements the call takes less time than waking a thread (csrc/langevin_step/bind.h).
_SMALL: Final = 1 << 14


def supports(predictions: Sequence[Tensor], targets: Sequence[Tensor], likelihood: Sequence[str]) -> str | None:
    """``None`` if :func:`residual` takes these tensors, else the reason why not."""
    for i, y in enumerate(predictions):
        if y.device.type != "cpu":
            return f"predictions[{i}] is on {y.device}"
        if y.dtype not in _STORAGE:
            return f"predictions[{i}] is {y.dtype}; taken are float32, bfloat16 and float16"
        if y.shape[0] > MOST_CHAINS:
            return f"predictions[{i}] of shape {tuple(y.shape)} is too large"
        if math.prod(y.shape[1:]) > 1 << 40 or (y.dim() > 1 and y.shape[1] >= 1 << 31):
            return f"predictions[{i}] of shape {tuple(y.shape)} is too large"
    available, reason = native.available("cpp")
    return None if available else reason


def residual(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    likelihood: Sequence[str],
    scale: Sequence[float | Tensor],
    weight: Sequence[float | Tensor],
    observed: Sequence[Tensor | None],
    gradients: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Value and gradients as :func:`mmebm.ops.residual.reference.residual`; the arguments are checked by the op."""
    chains, device = predictions[0].shape[0], predictions[0].device
    grads = [torch.empty(y.shape, dtype=y.dtype, device=device) for y in predictions] if gradients else []
    addresses = Addresses(device)

    def factor(name: str, i: int, value: float | Tensor) -> dict[str, Any]:
        if not isinstance(value, Tensor):
            return {name: value, f"{name}s": 0}
        each = value.to(torch.float32).expand(chains)
        return {name: math.nan, f"{name}s": addresses(f"{name}[{i}]", each, torch.float32)}

    modalities: list[dict[str, Any]] = []
    for i, (y, target, kind) in enumerate(zip(predictions, targets, likelihood, strict=True)):
        number = _LIKELIHOODS.index(kind)
        mask = observed[i]
        classes = y.shape[1] if kind == "categorical" else 1
        if kind == "categorical":
            target = target.to(torch.int64)
        elif target.dtype not in _STORAGE:
            target = target.to(torch.float32)
        rows = mask is not None and mask.dim() == target.dim() and mask.shape[0] != 1
        if mask is not None:
            mask = mask.expand(target.shape if rows else (1, *target.shape[1:]))
        modalities.append(
            {
                "likelihood": number,
                "positions": math.prod(target.shape[1:]),
                "classes": classes,
                "prediction": addresses(f"predictions[{i}]", y, y.dtype),
                "storage": _STORAGE[y.dtype],
                "target": addresses(f"targets[{i}]", target, target.dtype),
                "target_storage": _STORAGE.get(target.dtype, 0),
                "observed": addresses(f"observed[{i}]", mask, torch.bool),
                "observed_rows": rows,
                **factor("scale", i, scale[i]),
                **factor("weight", i, weight[i]),
                "grad": addresses.output("a gradient", grads[i]) if gradients else 0,
            }
        )
    value = torch.empty(chains, dtype=torch.float32, device=device)
    small = sum(y.numel() for y in predictions) < _SMALL
    native.cpu().residual(
        {
            "modalities": modalities,
            "chains": chains,
            "value": addresses.output("value", value),
            "threads": 1 if small else torch.get_num_threads(),
            "isa": dispatch.isa(),
        }
    )
    return value, grads
