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
from mmebm.state import check_range, check_setting, check_type, dense, flatten, integer, square


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
        TypeError, ValueError: naming the argument, the value and what would do.
    """
    check_type("energy", energy, Callable, "callable")
    flatten(dense("x", x, 2), "x")
    iterations = integer("iterations", iterations, 1)
    if generator is not None:
        check_type("generator", generator, torch.Generator, "a torch.Generator")
    shape = [-1] + [1] * (x.dim() - 1)
    v = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    size = torch.zeros(x.shape[0], dtype=x.dtype, device=x.device)
    with torch.enable_grad(), sampling(modules_of(energy), "eval"):
        x = x.detach().requires_grad_()
        value = energy(x)
        if not isinstance(value, Tensor) or value.is_complex():
            raise TypeError(f"energy must return a tensor of real numbers, got {value!r:.80}")
        grad = None
        if value.requires_grad:
            (grad,) = torch.autograd.grad(value.sum(), x, create_graph=True, allow_unused=True)
        if grad is None:
            raise ValueError("energy must depend on x through differentiable operations; it does not")
        # of an energy whose gradient is the same everywhere, the curvature is 0
        for _ in range(iterations if grad.requires_grad else 0):
            v = v / v.flatten(1).norm(dim=1).clamp_min(1e-30).reshape(shape)
            (v,) = torch.autograd.grad(grad, x, v, retain_graph=True, allow_unused=True, materialize_grads=True)
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

    Raises:
        TypeError, ValueError: naming the argument, the value and what would do.
    """
    if prior_std is not None:
        prior_std = check_setting("prior_std", prior_std, strict=True, kinds="a number")
        assert prior_std is not None
        check_range("prior_std", prior_std, torch.float64, least=torch.finfo(torch.float64).max ** -0.5)
    c = curvature(energy, x, iterations=iterations, generator=generator)
    if isinstance(prior_std, Tensor) and tuple(prior_std.shape) not in ((), (1,), tuple(c.shape)):
        raise ValueError(f"prior_std must be a number or one per chain, got shape {tuple(prior_std.shape)}")
    if prior_std is not None:
        c = c + 1.0 / square("prior_std", prior_std)
    return 2.0 / c.sqrt()
