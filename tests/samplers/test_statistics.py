"""Every sampler's law on targets that are known: mean and covariance of a Gaussian, the weights of two modes.

Independent chains from one start, looked at once, after so many steps that the start is forgotten (where that is not
so, the law after just as many steps is computed): an effective sample size of the number of chains, so that the bounds
are exact: ERRORS standard errors of a mean, of a covariance of a Gaussian, of a fraction. 60 numbers are compared
here, so that a correct sampler fails one seed in a million.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mmebm import HMC, MALA, Langevin, ParallelTempering, Underdamped

CHAINS = 20_000
TEMPERED_CHAINS = 4000  # each has several replicas
ERRORS = 6.0
H = 0.15  # of unadjusted Langevin


def chains_of(sampler: Any) -> int:
    return TEMPERED_CHAINS if isinstance(sampler, ParallelTempering) else CHAINS


# -- a Gaussian

MEAN = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.0, 0.6, 0.0], [0.6, 0.8, -0.2], [0.0, -0.2, 0.5]], dtype=torch.float64)
PRECISION = torch.linalg.inv(COVARIANCE)  # rates from 0.7 to 4.5: e^(-0.7 * 15 time units) is 3e-5


def gaussian(x: Tensor) -> Tensor:
    d = x - MEAN.to(x.dtype)
    return 0.5 * ((d @ PRECISION.to(x.dtype)) * d).sum(1)


def assert_gaussian(x: Tensor, covariance: Tensor, mean: Tensor = MEAN) -> None:
    x, n = x.double(), len(x)
    assert torch.isfinite(x).all()
    spread = covariance.diagonal().sqrt()
    error = (x.mean(0) - mean).abs() / (spread / math.sqrt(n))
    assert (error < ERRORS).all(), f"the mean is {error} standard errors off"
    centred = x - mean
    off = (centred.T @ centred / n - covariance).abs()
    error = off / (((spread[:, None] * spread).square() + covariance.square()).sqrt() / math.sqrt(n))
    assert (error < ERRORS).all(), f"the covariance is {error} standard errors off"


TEMPERED = ParallelTempering([0.12, 0.2, 0.3], [1.0, 1.7, 3.0])
# a sampler, its number of steps, and the covariance it has
GAUSSIAN: dict[str, tuple[Any, int, Callable[[Tensor], Tensor]]] = {
    # S = (I - hP) S (I - hP) + 2h I
    "Langevin": (Langevin(H), 120, lambda p: torch.linalg.inv(p @ (torch.eye(3, dtype=torch.float64) - H / 2 * p))),
    "Langevin, a small step": (
        Langevin(0.01),
        1500,
        lambda p: torch.linalg.inv(p @ (torch.eye(3, dtype=torch.float64) - 0.005 * p)),
    ),
    "Langevin at temperature 2": (
        Langevin(H, temperature=2.0),
        120,
        lambda p: 2 * torch.linalg.inv(p @ (torch.eye(3, dtype=torch.float64) - H / 2 * p)),
    ),
    "MALA": (MALA(0.2), 150, torch.linalg.inv),
    "MALA at temperature 2": (MALA(0.2, 2.0), 150, lambda p: 2 * torch.linalg.inv(p)),
    # 1.05 time units: after 1.4 the fastest direction is always just opposite
    "HMC": (HMC(0.35, leapfrog_steps=3), 60, torch.linalg.inv),
    "HMC with a mass": (HMC(0.7, leapfrog_steps=3, mass=4.0), 60, torch.linalg.inv),
    "HMC at temperature 2": (HMC(0.35, leapfrog_steps=3, temperature=2.0), 60, lambda p: 2 * torch.linalg.inv(p)),
    "HMC that adapts by chain": (HMC(0.05, leapfrog_steps=4, adapt=40), 110, torch.linalg.inv),
    "HMC that adapts over all": (HMC(0.05, leapfrog_steps=4, adapt=40, adapt_over="all"), 110, torch.linalg.inv),
    # the positions are exact on a quadratic energy
    "underdamped": (Underdamped(0.5, friction=2.0), 80, torch.linalg.inv),
    "underdamped with a mass, at temperature 2": (
        Underdamped(0.8, friction=1.0, mass=3.0, temperature=2.0),
        120,
        lambda p: 2 * torch.linalg.inv(p),
    ),
    "tempering": (TEMPERED, 150, torch.linalg.inv),
}


@pytest.mark.parametrize("name", GAUSSIAN)
def test_mean_and_covariance_of_a_gaussian(name: str, seed: int) -> None:
    sampler, steps, covariance = GAUSSIAN[name]
    out = sampler.sample(gaussian, torch.full((chains_of(sampler), 3), 3.0), steps, seed=seed)
    assert_gaussian(out.state, covariance(PRECISION))


@pytest.mark.parametrize(
    "sampler",
    [Langevin(H), MALA(0.2), HMC(0.35, leapfrog_steps=3), Underdamped(0.5, friction=2.0), TEMPERED],
    ids=["Langevin", "MALA", "HMC", "underdamped", "tempering"],
)
def test_what_is_not_observed_has_its_law_given_the_rest(sampler: Any, seed: int) -> None:
    """The last element held at 1.5."""
    x = torch.full((chains_of(sampler), 3), 1.5)
    mask = torch.tensor([[False, False, True]])
    out = sampler.sample(gaussian, x, 150, seed=seed, observed=mask)
    assert (out.state[:, 2] == 1.5).all()
    free = PRECISION[:2, :2]
    mean = MEAN[:2] - torch.linalg.solve(free, PRECISION[:2, 2] * (1.5 - MEAN[2]))
    bias = torch.eye(2, dtype=torch.float64)
    if isinstance(sampler, Langevin) and sampler.accept is None:
        bias = bias - H / 2 * free
    assert_gaussian(out.state[:, :2], torch.linalg.inv(free @ bias), mean)


# -- two modes

WEIGHT, CENTRE, WIDTH = 0.3, 1.1, 0.6
GRID = torch.linspace(-5, 5, 1501, dtype=torch.float64)


def bimodal(x: Tensor, centre: float = CENTRE) -> Tensor:
    logs = torch.stack(
        (
            math.log(WEIGHT) - (x - centre).square() / (2 * WIDTH**2),
            math.log(1 - WEIGHT) - (x + centre).square() / (2 * WIDTH**2),
        )
    )
    return -torch.logsumexp(logs, 0).squeeze(1)


def right_half(centre: float = CENTRE) -> float:
    """The target's probability of x > 0."""
    inside = 0.5 * (1 + math.erf(centre / (WIDTH * math.sqrt(2))))
    return WEIGHT * inside + (1 - WEIGHT) * (1 - inside)


def assert_fraction(x: Tensor, p: float) -> None:
    error = abs(float((x > 0).double().mean()) - p) / math.sqrt(p * (1 - p) / len(x))
    assert error < ERRORS, f"the weight of the right mode is {error} standard errors off {p}"


def law_after(h: float, steps: int, start: float, exact: bool) -> Tensor:
    """Probabilities on GRID of x after ``steps`` of x - h E' + sqrt(2 h) xi, accepted or not, from ``start``.

    The kernel is so much wider than the grid's spacing (0.007 for 0.2) that sums are its integrals.
    """
    g = GRID.clone().requires_grad_()
    energy = bimodal(g[:, None])
    (slope,) = torch.autograd.grad(energy.sum(), g)
    energy, to = energy.detach(), GRID - h * slope
    log_q = -(GRID[None] - to[:, None]).square() / (4 * h)
    q = log_q.exp()
    q = q / q.sum(1, keepdim=True)
    if exact:
        ratio = energy[:, None] - energy[None] + log_q.T - log_q
        q = q * ratio.clamp(max=0).exp()
        q = q + torch.diag(1 - q.sum(1))
    p = torch.zeros_like(GRID)
    p[(GRID - start).abs().argmin()] = 1.0
    for _ in range(steps):
        p = p @ q
    return p


@pytest.mark.parametrize("exact", [False, True], ids=["Langevin", "MALA"])
@pytest.mark.parametrize("steps", [40, 400])
def test_two_modes_after_so_many_steps(exact: bool, steps: int, seed: int) -> None:
    """The law after just these steps, of the discretised chain, from the smaller mode."""
    h, start = 0.02 if steps == 400 else 0.1, float(GRID[(GRID - CENTRE).abs().argmin()])
    sampler = MALA(h) if exact else Langevin(h)
    x = sampler.sample(bimodal, torch.full((CHAINS, 1), start), steps, seed=seed).state.double()
    p = law_after(h, steps, start, exact)
    assert_fraction(x, float(p[GRID > 0].sum() + 0.5 * p[GRID == 0].sum()))
    mean, square, fourth = (float((p * GRID**k).sum()) for k in (1, 2, 4))
    assert abs(float(x.mean()) - mean) < ERRORS * math.sqrt((square - mean**2) / CHAINS)
    assert abs(float(x.square().mean()) - square) < ERRORS * math.sqrt((fourth - square**2) / CHAINS)


@pytest.mark.parametrize("side", [-1.0, 1.0])
@pytest.mark.parametrize(
    ("sampler", "steps"),
    [
        (MALA(0.25), 300),
        (HMC(0.4, leapfrog_steps=4), 100),
        (HMC(0.05, leapfrog_steps=4, adapt=40), 140),
        (HMC(0.05, leapfrog_steps=4, adapt=40, adapt_over="all"), 140),
        (ParallelTempering([0.2, 0.3], [1.0, 2.0]), 200),
    ],
    ids=["MALA", "HMC", "HMC that adapts by chain", "HMC that adapts over all", "tempering"],
)
def test_the_weights_of_two_modes(sampler: Any, steps: int, side: float, seed: int) -> None:
    """From either mode: had the start not been forgotten, the two would differ."""
    x = sampler.sample(bimodal, torch.full((chains_of(sampler), 1), side * CENTRE), steps, seed=seed).state
    assert_fraction(x, right_half())


@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_the_weights_of_two_modes_with_velocities(side: float, seed: int) -> None:
    """BAOAB has an error of order h^2 where the energy is not quadratic; at half the step it is a quarter."""
    errors = []
    for h, steps in ((0.3, 150), (0.15, 300)):
        x = Underdamped(h, friction=1.5).sample(bimodal, torch.full((CHAINS, 1), side * CENTRE), steps, seed=seed).state
        errors.append(abs(float((x > 0).double().mean()) - right_half()))
    noise = math.sqrt(right_half() * (1 - right_half()) / CHAINS)
    assert errors[0] < ERRORS * noise + 0.02
    assert errors[1] < ERRORS * noise + 0.3 * errors[0]


def test_tempering_weighs_modes_that_are_far_apart(seed: int) -> None:
    """Centres 4.2 widths from the middle: e^-8.8 of the density lies between them, where no other sampler here goes."""
    centre, chains = 2.5, 2000
    sampler = ParallelTempering([0.15, 0.3, 0.6, 1.2, 2.4], [1.0, 2.0, 4.0, 8.0, 16.0])
    energy = lambda x: bimodal(x, centre)
    for side in (-1.0, 1.0):
        x = sampler.sample(energy, torch.full((chains, 1), side * centre), 500, seed=seed).state
        assert_fraction(x, right_half(centre))
    still = MALA(0.15).sample(energy, torch.full((chains, 1), centre), 500, seed=seed).state
    assert (still > 0).double().mean() > 0.9
