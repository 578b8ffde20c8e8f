"""From what a symbol came to mean to the terms of the fused ops (:mod:`mmebm.ops.terms`)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mmebm.energies.lower.attempt import refuse
from mmebm.energies.lower.symbol import Gauss, Input, Layout, Outputs
from mmebm.ops.terms import Quadratic, Residual, Scalar, Stack, Term


def _columns(weight: Tensor, order: tuple[int, ...], layout: Layout) -> Tensor:
    """The first layer's weight for the whole state, in the state's order; zero for a tensor that it does not read."""
    if order == tuple(range(len(layout.widths))):
        return weight
    if len(set(order)) != len(order):
        refuse("it reads a tensor of the state twice")
    parts = dict(zip(order, weight.split([layout.widths[i] for i in order], dim=1), strict=True))
    return torch.cat(
        [parts.get(i, weight.new_zeros(weight.shape[0], width)) for i, width in enumerate(layout.widths)], dim=1
    )


def _stack(means: Outputs, layout: Layout) -> Stack:
    activations: tuple[tuple[Any, float], ...] = means.activations[: len(means.layers) - 1]
    if len(set(activations)) > 1:
        refuse(f"its activations differ: {[name for name, _ in activations]}")
    name, slope = activations[0] if activations else ("relu", 0.0)
    first, *rest = (w.detach() for w, _ in means.layers)
    weights = [w.contiguous() for w in (_columns(first, means.order, layout), *rest)]
    biases = [None if b is None else b.detach().contiguous() for _, b in means.layers]
    for t in (*weights, *biases):
        if t is not None and (t.dtype != layout.dtype or t.device != layout.device):
            refuse(f"a layer is {t.dtype} on {t.device}, the state {layout.dtype} on {layout.device}")
    return Stack.mlp(weights, biases, name, slope)


def term_of(weight: float, part: Any, layout: Layout) -> Term:
    """``weight`` times a part of a :class:`~mmebm.energies.lower.symbol.Value`."""
    if isinstance(part, Outputs):
        if len(part.activations) >= len(part.layers):
            refuse("an activation follows its last layer")
        return Scalar(_stack(part, layout), weight)
    if isinstance(part, Input):
        zero = torch.zeros(sum(layout.widths[i] for i in part.order), dtype=layout.dtype, device=layout.device)
        part = Gauss(part.order, zero, zero + 2.0)
    if isinstance(part, Gauss):
        if part.mean.dtype != layout.dtype or part.mean.device != layout.device:
            refuse(f"a Gaussian is {part.mean.dtype} on {part.mean.device}")
        mean, precision = (_columns(t.unsqueeze(0), part.order, layout)[0] for t in (part.mean, part.precision))
        return Quadratic(mean.contiguous(), weight * precision)
    outputs: Outputs = part.outputs
    tanh = len(outputs.activations) == len(outputs.layers)
    if tanh and outputs.activations[-1][0] != "tanh":
        refuse(f"{outputs.activations[-1][0]} follows the last layer of a residual")
    if part.target.dtype != layout.dtype or part.target.device != layout.device:
        refuse(f"a target is {part.target.dtype} on {part.target.device}")
    target = part.target.detach().reshape(layout.chains, -1).contiguous()
    # square: weight r^2 = weight r^2 / (2 scale^2) with scale^2 = 1/2
    likelihood, scale = ("gaussian", math.sqrt(0.5)) if part.power == 2 else ("laplace", 1.0)
    return Residual(_stack(outputs, layout), target, scale, likelihood, tanh, weight)
