"""How far predictions are from their targets, for all modalities of a chain: value and gradient, in plain PyTorch.

Per modality, summed over the elements that count, with weight w, scale s and r = prediction - target:

    gaussian      w r^2 / (2 s^2)                       gradient  w r / s^2
    laplace       w |r| / s                             gradient  w sign(r) / s
    categorical   w (log sum_k exp(y_k) - y_target)     gradient  w (softmax(y) - [k = target])

-log likelihood without the constants. An element that does not count adds nothing, whatever it holds, and has gradient
0. A class outside [0, classes) makes its term and its gradients NaN.

The gradients are the hand-derived ones, so that they cost no autograd graph; autograd through them gives the second
derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Likelihood = Literal["gaussian", "laplace", "categorical"]


def arithmetic(prediction: Tensor) -> torch.dtype:
    """The dtype of a modality's arithmetic: float64 for float64 predictions, else float32."""
    return torch.float64 if prediction.dtype == torch.float64 else torch.float32


def _per_chain(value: Any, like: Tensor) -> Any:
    """A number as it is; a tensor of one value or one per chain with the dimensions of ``like``."""
    return value.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1)) if isinstance(value, Tensor) else value


def _categorical(y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The terms (chains, ...) and their gradients (chains, classes, ...)."""
    classes, target = y.shape[1], target.long()
    known = (target >= 0) & (target < classes)
    index = target.clamp(0, classes - 1).unsqueeze(1)
    log_p = torch.log_softmax(y, 1)
    term = -log_p.gather(1, index).squeeze(1)
    slope = torch.softmax(y, 1).scatter_add(1, index, torch.full_like(index, -1, dtype=y.dtype))
    return torch.where(known, term, torch.nan), torch.where(known.unsqueeze(1), slope, torch.nan)


def residual(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    *,
    likelihood: Sequence[Likelihood],
    scale: Sequence[float | Tensor],
    weight: Sequence[float | Tensor],
    observed: Sequence[Tensor | None],
    gradients: bool = True,
) -> tuple[Tensor, list[Tensor]]:
    """Value (chains,) and the gradients in the predictions, in their dtypes; without ``gradients`` an empty list.

    Args:
        predictions: (chains, ...) each, floating; (chains, classes, ...) where categorical.
        targets: of the same shapes; integers (chains, ...) where categorical.
        likelihood, scale, weight: one per modality; scale and weight a number, or a tensor of one value or one per
            chain. The scale of a categorical modality is not read.
        observed: per modality ``None`` or a boolean mask that broadcasts against its targets: what counts.
    """
    wide = [y.to(arithmetic(y)) for y in predictions]
    dtype = torch.float64 if any(y.dtype == torch.float64 for y in wide) else torch.float32
    value = torch.zeros(predictions[0].shape[0], dtype=dtype, device=predictions[0].device)
    grads: list[Tensor] = []
    for i, (y, target, kind) in enumerate(zip(wide, targets, likelihood, strict=True)):
        w, keep = _per_chain(weight[i], y), observed[i]
        if kind == "categorical":
            term, slope = _categorical(y, target)
            factor, sides = w, term.shape[:1] + (1,) + term.shape[1:]
        else:
            r, s = y - target.to(y.dtype), _per_chain(scale[i], y)
            sides = r.shape
            if kind == "gaussian":
                term, slope, factor = 0.5 * r.square(), r, w / (s * s)
            else:
                # a NaN is its own sign, so that it stays visible
                term, slope, factor = r.abs(), torch.where(r.isnan(), r, r.sign()), w / s
        slope = slope * factor
        if keep is not None:
            keep = keep.expand(term.shape)
            term, slope = torch.where(keep, term, 0.0), torch.where(keep.reshape(sides), slope, 0.0)
        total = term.reshape(term.shape[0], -1).sum(1) if term.numel() else term.new_zeros(term.shape[0])
        value = value + (total * (factor.flatten() if isinstance(factor, Tensor) else factor)).to(dtype)
        if gradients:
            grads.append(slope.to(predictions[i].dtype))
    return value, grads
