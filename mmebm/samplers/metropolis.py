"""Metropolis-Hastings for the Langevin step (MALA): which settings allow it, and the ratio that decides.

The step proposes y from N(x - b(x), s^2) with the drift ``b(x) = a g'(x)``, where g' is the gradient after its clips
and with the prior. Whatever b is, as long as it is a function of the chain's own state, the chain

    accept y with probability min(1, exp(r)),    r = (U(x) - U(y)) / T + log q(x | y) - log q(y | x)

has the law exp(-U / T) with U the energy and the prior; T = s^2 / (2a), so that without the clips b follows that law.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmebm.ops.common.layout import per_chain
from mmebm.ops.common.params import NormOver, StepParams
from mmebm.ops.langevin_step.reference import pull

if TYPE_CHECKING:
    from mmebm.samplers.langevin import Langevin
    from mmebm.state import Key

# s^2 / (2a) takes four roundings of 6e-8 in float32.
SAME_TEMPERATURE = 1e-6


def refusal(sampler: Langevin) -> str | None:
    """The option that makes the step's proposal no Gaussian of the chain's own state, or None."""
    if sampler.noise_at != "after":
        return f"noise_at={sampler.noise_at!r}"
    if sampler.bounds is not None and sampler.bounds_at == "step":
        return "bounds at every step (let the energy be inf outside, or clamp at the end only)"
    if sampler.max_update is not None:
        return "max_update (grad_clip may stand instead)"
    if sampler.project is not None:
        return "project"
    if sampler.grad_norm_clip is not None and sampler.norm_over == "tensor":
        return 'norm_over="tensor", which makes a chain\'s drift depend on the others'
    return None


def temperature(params: Sequence[StepParams], keys: Sequence[Key]) -> float | Tensor:
    """T = s^2 / (2a) of these tensors together: a number, or one per chain (or a single one).

    Raises:
        ValueError: where it is not positive and finite, or differs between tensors or within a chain. Tensors that are
            not on the CPU are not read, as that would wait for their device.
    """
    found: list[tuple[float | Tensor, Key]] = []
    for p, key in zip(params, keys, strict=True):
        label = f'accept="metropolis" needs positive step_size and noise_scale; state[{key!r}] has'
        a, s = p.step_size, p.noise_scale
        if isinstance(a, Tensor) or isinstance(s, Tensor):
            ratio = s**2 / (2 * a)
            assert isinstance(ratio, Tensor)
            t = ratio.detach()
            # an element of its own per chain, or one for all
            t = t.reshape(1, 1) if t.dim() == 0 else per_chain(t)
            if t.numel() == 0:
                continue  # nothing to move
            if t.device.type == "cpu":
                if not bool((t.isfinite() & (t > 0)).all()):
                    raise ValueError(f"{label} s^2 / (2a) = {t!r:.80}")
                if not bool(((t - t[:, :1]).abs() <= SAME_TEMPERATURE * t[:, :1]).all()):
                    raise ValueError(
                        f'accept="metropolis" needs one temperature s^2 / (2a) per chain; those of state[{key!r}] '
                        "differ between elements"
                    )
            found.append((t[:, 0].double(), key))
        else:
            t = s**2 / (2 * a) if a else math.inf
            if not (0 < t < math.inf):
                raise ValueError(f"{label} {a!r} and {s!r}")
            found.append((t, key))
    if not found:
        return 1.0
    of_first, first_key = found[0]
    for t, key in found[1:]:
        if any(isinstance(v, Tensor) and v.device.type != "cpu" for v in (t, of_first)):
            continue
        first = torch.as_tensor(of_first, dtype=torch.float64, device="cpu")
        if not bool(((t - first).abs() <= SAME_TEMPERATURE * first).all()):
            raise ValueError(
                f'accept="metropolis" needs one temperature s^2 / (2a) for all tensors; state[{first_key!r}] has '
                f"{of_first!r:.60} and state[{key!r}] {t!r:.60}"
            )
    per = [t for t, _ in found if isinstance(t, Tensor) and t.numel() > 1]
    return per[0] if per else of_first


def log_ratio(
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    grad_x: Sequence[Tensor],
    grad_y: Sequence[Tensor],
    energy_x: Tensor,
    energy_y: Tensor,
    params: Sequence[StepParams],
    masks: Sequence[Tensor | None],
    temperature: float | Tensor,
    norm_over: NormOver,
) -> Tensor:
    """``r`` of the module's docstring: float64 (chains,), NaN where the proposal or its energy is.

    |x - y + b(y)|^2 - |y - x + b(x)|^2 is summed as -(b(x) + b(y)) (2 (y - x) - (b(y) - b(x))): the two squares nearly
    cancel, for many elements below their own rounding.

    Args:
        grad_x, grad_y: the energy's gradients, before clips and prior.
        masks: per tensor the observed elements, which do not count.
    """
    total = (energy_x.double() - energy_y.double()) / temperature
    for x0, y0, gx, gy, p, mask in zip(x, y, grad_x, grad_y, params, masks, strict=True):
        a, b = x0.detach().double(), y0.detach().double()
        bx, by = (p.step_size * pull(t, g.detach().double(), p, norm_over) for t, g in ((a, gx), (b, gy)))
        terms = (bx + by) * (b - a - (by - bx) / 2) / p.noise_scale**2
        if mask is not None:
            terms = terms.masked_fill(mask, 0.0)
        total = total + per_chain(terms).sum(1)
        if p.prior_std is not None:
            total = total - per_chain((b - a) * (b + a) / (2 * p.prior_std**2)).sum(1) / temperature
    return total
