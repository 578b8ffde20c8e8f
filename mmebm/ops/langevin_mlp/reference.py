"""A whole Langevin chain on a sum of MLP terms, in plain PyTorch: K times the gradient, then the one update rule.

    noise_at="before":  x <- x + s_k xi, clamped if clamp_noise;  g = dE/dx;  x <- step(x, g) without noise
    noise_at="after":   g = dE/dx;  x <- step(x, g)

``step`` is the rule of :mod:`mmebm.ops.langevin_step.reference`, the gradient that of
:mod:`mmebm.ops.mlp_energy.reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mmebm.ops.common.layout import per_chain, widen
from mmebm.ops.common.params import NoiseAt, StepParams
from mmebm.ops.mlp_energy.reference import mlp_energy
from mmebm.ops.terms import Term

if TYPE_CHECKING:
    from mmebm.ops.langevin_step import Stepper


class Chain(NamedTuple):
    """What a chain returns.

    ``x``: the final state. ``energy``, ``grad_norm``: (steps, chains), where the gradient was taken, before clips and
    prior; the norm over the moving tensors. ``frozen``: bool (chains,), all False unless ``freeze``.
    """

    x: list[Tensor]
    energy: Tensor
    grad_norm: Tensor
    frozen: Tensor


def langevin_mlp(
    x: Sequence[Tensor],
    terms: Sequence[Term] | Callable[[Tensor], tuple[Tensor, Tensor]],
    params: Sequence[Sequence[StepParams]],
    stepper: Stepper,
    *,
    steps: int,
    first_step: int | Tensor = 0,
    noise_at: NoiseAt = "after",
    moving: Sequence[bool] | None = None,
    freeze: bool = False,
) -> Chain:
    """``steps`` steps from ``x``. Out of place.

    Args:
        x: tensors (chains, ...); side by side, flattened, they are the terms' input.
        terms: of the energy, or a function that gives energy and gradient at the flat state.
        params: per step, or one entry for all steps, the constants of each tensor.
        stepper: the reference as a backend, made for the moving tensors; it brings the noise.
        moving: per tensor whether it is updated; the others are only input.
        freeze: a chain with an inf or NaN after a step stays where it was before that step, from then on.
    """
    x = list(x)
    chains = x[0].shape[0]
    group = [i for i in range(len(x)) if moving is None or moving[i]]
    alive = torch.ones(chains, dtype=torch.bool, device=x[0].device)
    energies: list[Tensor] = []
    norms: list[Tensor] = []
    for k in range(steps):
        row = params[min(k, len(params) - 1)]
        now, old = [row[i] for i in group], [x[i] for i in group]
        current = stepper.perturb(old, now, first_step + k) if noise_at == "before" else old
        for i, t in zip(group, current, strict=True):
            x[i] = t
        flat = torch.cat([widen(per_chain(t)) for t in x], dim=1)
        energy, grad = terms(flat) if callable(terms) else mlp_energy(flat, terms)
        parts = [g.reshape(t.shape) for g, t in zip(torch.split(grad, [per_chain(t).shape[1] for t in x], dim=1), x)]
        y, stats = stepper.step(
            current, [parts[i] for i in group], now, first_step + k, with_noise=noise_at == "after", stats=True
        )
        if freeze:
            for t in y:
                alive = alive & torch.isfinite(per_chain(t)).all(dim=1)
            y = [torch.where(alive.reshape(-1, *[1] * (t.dim() - 1)), t, o) for t, o in zip(y, old, strict=True)]
        for i, t in zip(group, y, strict=True):
            x[i] = t
        assert stats is not None
        energies.append(energy)
        norms.append(stats.grad_norm)
    empty = widen(x[0]).new_zeros(0, chains)
    return Chain(x, torch.stack(energies) if energies else empty, torch.stack(norms) if norms else empty, ~alive)
