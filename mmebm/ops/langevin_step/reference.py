"""One Langevin step for all tensors of the state: the update rule, the only one, in plain PyTorch.

For every tensor, with the noise ``xi`` given (``None``: no noise in this step):

    g = clip(g)                  by value, then by the l2 norm of the chain (or of the whole tensor)
    g = -g                       where ``score``: the gradient is that of a log density
    g = g + x / prior_std^2
    d = -step_size g + noise_scale xi
    d = clamp(d, -max_update, max_update)
    y = x + d;  y = clamp(y, low, high)   or   y = x for chains with an element outside (observed ones do not count)
    y = x where observed

``perturb`` is the other place noise can stand: before the gradient is taken (``noise_at="before"``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmebm.ops.common.layout import WIDE, per_chain, widen
from mmebm.ops.common.params import NormOver, Outside, StepParams, StepStats
from mmebm.ops.common.untyped import TORCH

_MANTISSA = {torch.float16: 10, torch.bfloat16: 7}
_MIN_EXPONENT = {torch.float16: -14, torch.bfloat16: -126}


def stochastic_round(y: Tensor, dtype: torch.dtype, threshold: Tensor) -> Tensor:
    """float32 ``y`` to 16-bit ``dtype``: up with probability equal to the fraction left over, so unbiased.

    ``threshold`` in (0, 1) decides: up where the fraction exceeds it (:func:`mmebm.noise.rounding_fraction`).
    """
    _, exponent = torch.frexp(y)  # y = m 2^e with m in [1/2, 1)
    shift = (exponent - 1).clamp_min(_MIN_EXPONENT[dtype]) - _MANTISSA[dtype]
    # The spacing 2^shift, from its bits: scaling by it is exact, so the fraction is too. 2^133 is no float32.
    spacing = ((shift.long() + 1023) << 52).view(torch.float64)
    scaled = y.double() / spacing
    down = torch.floor(scaled)
    rounded = (down + (scaled - down > threshold)) * spacing
    return torch.where(torch.isfinite(y), rounded, y.double()).to(dtype)


def _store(y: Tensor, like: Tensor, threshold: Tensor | None) -> Tensor:
    if like.dtype not in WIDE:
        return y
    return y.to(like.dtype) if threshold is None else stochastic_round(y, like.dtype, threshold)


def clamp(y: Tensor, low: Any, high: Any) -> Tensor:
    """``y`` in [low, high], each a number, a tensor or None; NaN stays NaN."""
    if low is None and high is None:
        return y
    if low is None or high is None or isinstance(low, Tensor) == isinstance(high, Tensor):
        return torch.clamp(y, low, high)
    # torch.clamp takes two tensors or two numbers
    return torch.clamp(torch.clamp(y, min=low), max=high)


def norm_factor(g: Tensor, limit: Any, over: NormOver) -> Tensor:
    norm: Tensor = TORCH.linalg.vector_norm(per_chain(g), dim=1 if over == "chain" else None)
    if over == "chain":
        norm = norm.reshape(-1, *[1] * (g.dim() - 1))
    # 1 up to the limit, and differentiable at norm 0; a NaN norm stays NaN, so that a broken chain is seen. Tensor by
    # tensor: torch divides a number by a tensor as number * (1 / tensor), which is not always 1 for equal ones
    bound = limit if isinstance(limit, Tensor) else norm.new_full((), limit)
    # a limit of 0 leaves nothing of a gradient, and of none no NaN
    return bound / torch.clamp_min(norm, bound.clamp_min(torch.finfo(bound.dtype).tiny))


def perturb(
    x: Sequence[Tensor],
    noise: Sequence[Tensor | None],
    params: Sequence[StepParams],
    *,
    clamp_noise: bool = False,
    observed: Sequence[Tensor | None] | None = None,
    thresholds: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """``x + noise_scale xi``, clamped to the bounds if ``clamp_noise``, unchanged where observed."""
    out: list[Tensor] = []
    for i, (xi, ni, p) in enumerate(zip(x, noise, params, strict=True)):
        y = widen(xi) if ni is None else widen(xi) + p.noise_scale * ni
        if clamp_noise:
            y = clamp(y, p.low, p.high)
        y = _store(y, xi, thresholds[i] if thresholds else None)
        mask = observed[i] if observed else None
        out.append(y if mask is None else torch.where(mask, xi, y))
    return out


def pull(
    x: Tensor, g: Tensor, p: StepParams, norm_over: NormOver, *, score: bool = False, changed: Tensor | None = None
) -> Tensor:
    """What the step size multiplies: the gradient after its clips and its sign, and the prior's. The elements that a
    clip changes are added to the boolean ``changed``, in place."""
    if p.grad_clip is not None:
        if changed is not None:
            changed |= g.abs() > p.grad_clip
        g = clamp(g, -p.grad_clip, p.grad_clip)
    if p.grad_norm_clip is not None:
        factor = norm_factor(g, p.grad_norm_clip, norm_over)
        if changed is not None:
            changed |= factor < 1
        g = g * factor
    if score:
        g = -g
    if p.prior_std is not None:
        g = g + x / p.prior_std**2
    return g


def langevin_step(
    x: Sequence[Tensor],
    grad: Sequence[Tensor],
    noise: Sequence[Tensor | None],
    params: Sequence[StepParams],
    *,
    norm_over: NormOver = "chain",
    outside: Outside = "clamp",
    score: bool = False,
    observed: Sequence[Tensor | None] | None = None,
    thresholds: Sequence[Tensor | None] | None = None,
    stats: bool = False,
) -> tuple[list[Tensor], StepStats | None]:
    """One step for all tensors (see the module docstring). Out of place.

    Args:
        x, grad, noise: lists of tensors (chains, ...) of equal shapes; a noise of ``None`` leaves the term out.
        params: one :class:`StepParams` per tensor.
        norm_over: whether ``grad_norm_clip`` limits each chain's norm or the whole tensor's.
        outside: what happens at the bounds; "reject" keeps the whole chain, all its tensors, where it was.
        score: whether ``grad`` is d log p / dx, and not dE/dx.
        observed: per tensor ``None`` or a boolean mask that broadcasts: these elements keep their value.
        thresholds: per tensor ``None`` or the stochastic-rounding thresholds of a 16-bit tensor.
        stats: whether to return :class:`StepStats`.
    """
    proposals: list[Tensor] = []
    clipped: list[Any] = []  # None without stats
    inside: Tensor | None = None
    for i, (xi, gi, ni, p) in enumerate(zip(x, grad, noise, params, strict=True)):
        mask = observed[i] if observed else None
        wide, g = widen(xi), widen(gi)
        changed = torch.zeros_like(g, dtype=torch.bool) if stats else None
        d = -p.step_size * pull(wide, g, p, norm_over, score=score, changed=changed)
        if ni is not None:
            d = d + p.noise_scale * ni
        if p.max_update is not None:
            if changed is not None:
                changed |= d.abs() > p.max_update
            d = clamp(d, -p.max_update, p.max_update)
        y = wide + d
        if outside == "clamp":
            y = clamp(y, p.low, p.high)
        elif p.low is not None or p.high is not None:
            fits = clamp(y, p.low, p.high) == y
            ok = per_chain(fits if mask is None else fits | mask).all(dim=1)
            inside = ok if inside is None else inside & ok
        y = _store(y, xi, thresholds[i] if thresholds else None)
        proposals.append(y if mask is None else torch.where(mask, xi, y))
        clipped.append(changed)
    if inside is not None:
        stay = [~inside.reshape(-1, *[1] * (xi.dim() - 1)) for xi in x]
        proposals = [torch.where(kept, xi, y) for kept, xi, y in zip(stay, x, proposals, strict=True)]
    if not stats:
        return proposals, None
    zero = torch.zeros(x[0].shape[0], dtype=widen(x[0]).dtype, device=x[0].device)
    moved = [per_chain(widen(y) - widen(xi)).square().sum(1) for xi, y in zip(x, proposals, strict=True)]
    return proposals, StepStats(
        grad_norm=sum((per_chain(widen(g)).square().sum(1) for g in grad), zero).sqrt(),
        displacement=sum(moved, zero).sqrt(),
        clipped=sum((per_chain(c).sum(1) for c in clipped), zero.long()),
        nonfinite=sum((per_chain(~torch.isfinite(y)).sum(1) for y in proposals), zero.long()),
    )
