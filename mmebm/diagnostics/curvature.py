"""The curvature of an energy along each chain, and the step it allows.

Langevin dynamics x <- x - (s^2/2) dE/dx + ... diverges along a direction of curvature c once s^2 c / 2 > 2. A posterior
chain of a generator moves that limit by itself as its Jacobian grows, and bounded outputs hide the failure: measure it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmebm.samplers.user_modules import modules_of, sampling


def curvature(
    energy: Callable[[Tensor], Any], x: Tensor, *, iterations: int = 15, generator: torch.Generator | None = None
) -> Tensor:
    """The largest absolute eigenvalue of the Hessian of ``energy`` at each chain, by power iteration.

    Args:
        energy: a callable of one tensor; each chain's value must depend on that chain only.
        x: (chains, ...), where to measure.
        iterations: Hessian-vector products; 15 are within some per cent where the spectrum has a gap, and always below
            the true value.
        generator: draws the start vectors.

    Returns:
        (chains,), at least 0.

    Raises:
        ValueError: for ``iterations`` below 1.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    shape = [-1] + [1] * (x.dim() - 1)
    v = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    size = torch.zeros(x.shape[0], dtype=x.dtype, device=x.device)
    with torch.enable_grad(), sampling(modules_of(energy), "eval"):
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(energy(x).sum(), x, create_graph=True)
        for _ in range(iterations):
            v = v / v.flatten(1).norm(dim=1).clamp_min(1e-30).reshape(shape)
            (v,) = torch.autograd.grad(grad, x, v, retain_graph=True)
            size = v.flatten(1).norm(dim=1)
    return size.detach()


def largest_stable_step(
    energy: Callable[[Tensor], Any],
    x: Tensor,
    *,
    prior_std: float | None = None,
    iterations: int = 15,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The ``s`` of x - (s^2/2) dE/dx at which each chain's stiffest direction stops being stable: 2 / sqrt(curvature).

    ``prior_std`` adds the curvature 1 / prior_std^2 of a Gaussian prior that the energy leaves to the sampler.
    Returns (chains,).
    """
    c = curvature(energy, x, iterations=iterations, generator=generator)
    if prior_std is not None:
        c = c + 1.0 / prior_std**2
    return 2.0 / c.sqrt()
