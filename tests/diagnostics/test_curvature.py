"""The curvature of an energy against eigenvalues that are known."""

import pytest
import torch

from mmebm.diagnostics import curvature, largest_stable_step


def quadratic(eigenvalues: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    basis, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return basis @ torch.diag(eigenvalues.double()) @ basis.T


def test_curvature_is_the_largest_eigenvalue(seed: int) -> None:
    h = quadratic(torch.tensor([40.0, 3.0, 1.0, 0.5, 0.1]), seed)
    x = torch.zeros(6, 5, dtype=torch.float64)
    c = curvature(lambda x: 0.5 * torch.einsum("ni,ij,nj->n", x, h, x), x, iterations=15)
    # the gap 40 : 3 leaves (3/40)^15, far below rounding of a start vector in general position
    torch.testing.assert_close(c, torch.full((6,), 40.0, dtype=torch.float64), rtol=1e-6, atol=0)


def test_curvature_is_per_chain() -> None:
    scale = torch.tensor([1.0, 10.0, 100.0])
    c = curvature(lambda x: 0.5 * scale * x.square().sum(1), torch.ones(3, 4))
    torch.testing.assert_close(c, scale, rtol=1e-5, atol=0)


@pytest.mark.parametrize("factor, stable", [(0.95, True), (1.05, False)])
def test_the_limit_separates_stable_from_unstable(factor: float, stable: bool, seed: int) -> None:
    """Gradient descent at s^2/2 contracts just below the limit and explodes just above it."""
    h = quadratic(torch.tensor([25.0, 2.0, 1.0]), seed)
    x = torch.ones(1, 3, dtype=torch.float64)
    s = factor * largest_stable_step(
        lambda x: 0.5 * torch.einsum("ni,ij,nj->n", x, h, x), x, prior_std=0.5, iterations=30
    )
    for _ in range(400):
        x = x - s**2 / 2 * (x @ h + x / 0.25)
    assert bool(x.abs().max() < 1) is stable


def test_rejects_no_iterations() -> None:
    with pytest.raises(ValueError, match="iterations must be an int of at least 1, got 0"):
        curvature(lambda x: x.square().sum(1), torch.ones(1, 1), iterations=0)
