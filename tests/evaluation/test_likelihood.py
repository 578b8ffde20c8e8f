"""Annealed importance sampling against what can be integrated: linear Gaussian generators, and one latent."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmebm.evaluation.likelihood import likelihood_gap, log_constant, log_likelihood, temperatures
from mmebm.models import GaussianPrior, SharedGenerator

pytestmark = pytest.mark.usefixtures("one_thread")

# A mean over 256 chains is nearly normal, but its error is estimated too, and the logarithm is skewed: 78 seeds, 624
# tuples in all, gave |estimate - truth| of at most 4.7 errors, none of which was above .44 nats. A wrong constant,
# temperature or weight is off by whole nats.
ERRORS = 8
SIGMA, WEIGHT = 0.5, 4.0
LADDER: Any = {"chains": 256, "steps": 60, "leapfrog_steps": 3, "batch": 2048}


def linear(seed: int, latent: int = 3) -> tuple[SharedGenerator, Tensor, Tensor, Tensor]:
    """A generator with linear decoders, of 5 numbers and of 2 x 2 with weight 4; float64.

    Returns it with the matrix, the bias and the variances of X = A z + b + noise.
    """
    rng = torch.Generator().manual_seed(seed)
    generator = SharedGenerator({"a": (5,), "b": (2, 2)}, latent, sigma=SIGMA, weights={"b": WEIGHT}).double()
    matrix, bias = torch.randn(9, latent, generator=rng).double(), torch.randn(9, generator=rng).double()
    for name, rows in (("a", slice(0, 5)), ("b", slice(5, 9))):
        layer = nn.Linear(latent, rows.stop - rows.start, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(matrix[rows])
            layer.bias.copy_(bias[rows])
        generator.decoders[name] = layer if name == "a" else nn.Sequential(layer, nn.Unflatten(1, (2, 2)))
    variances = torch.tensor([SIGMA**2] * 5 + [SIGMA**2 / WEIGHT] * 4).double()
    return generator, matrix, bias, variances


def batch(x: Tensor) -> dict[str, Tensor]:
    return {"a": x[:, :5], "b": x[:, 5:].reshape(-1, 2, 2)}


def drawn(seed: int, n: int, matrix: Tensor, bias: Tensor, variances: Tensor) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(n, matrix.shape[1], generator=rng).double()
    return z @ matrix.T + bias + variances.sqrt() * torch.randn(n, 9, generator=rng).double()


def closed_form(x: Tensor, matrix: Tensor, bias: Tensor, variances: Tensor) -> Tensor:
    covariance = matrix @ matrix.T + variances.diag()
    return torch.distributions.MultivariateNormal(bias, covariance).log_prob(x)


def test_linear_gaussian_generator_and_its_modalities(seed: int) -> None:
    generator, matrix, bias, variances = linear(seed)
    x = drawn(seed + 1, 4, matrix, bias, variances)
    whole = batch(x)
    for names, rows in ((("a", "b"), slice(0, 9)), (("b",), slice(5, 9))):
        given = {name: whole[name] for name in names}
        result = log_likelihood(generator, GaussianPrior(3), given, seed=seed, **LADDER)
        truth = closed_form(x[:, rows], matrix[rows], bias[rows], variances[rows])
        assert result.log_p.shape == truth.shape
        assert ((result.log_p - truth).abs() < ERRORS * result.bootstrap).all(), (result, truth)
        assert (result.bootstrap < 1).all()  # so that the bound says something: a nat is what a wrong term costs
        assert (result.effective > 1).all() and (result.effective <= 256).all()
        assert 0.5 < result.acceptance < 1 and result.log_z == 0
        summary = result.summary()
        assert summary["log_p"] == pytest.approx(truth.mean().item(), abs=ERRORS * summary["error_chains"])
        assert summary["dimensions"] == rows.stop - rows.start and summary["n"] == 4


class Quadratic(nn.Module):
    """E(z) = c |z - m|^2 / 2: with N(0, I) a Gaussian of precision 1 + c around c m / (1 + c)."""

    def __init__(self, c: float, m: Tensor) -> None:
        super().__init__()
        self.c, self.m = c, m

    def forward(self, z: Tensor) -> Tensor:
        return 0.5 * self.c * (z - self.m).square().sum(1)


def test_an_energy_prior_is_normalised(seed: int) -> None:
    generator, matrix, bias, variances = linear(seed)
    c, m = 2.0, torch.tensor([1.0, -0.5, 0.3]).double()
    centre, width = c * m / (1 + c), 1 / math.sqrt(1 + c)
    moved, scaled = bias + matrix @ centre, matrix * width
    x = drawn(seed + 1, 3, scaled, moved, variances)
    result = log_likelihood(generator, Quadratic(c, m), batch(x), seed=seed, **LADDER)
    # log of the integral of exp(-c |z - m|^2 / 2) N(z; 0, I)
    log_z = -1.5 * math.log(1 + c) - 0.5 * c / (1 + c) * m.square().sum().item()
    assert result.log_z == pytest.approx(log_z, abs=ERRORS * result.log_z_error)
    assert result.log_z_error < 0.2
    truth = closed_form(x, scaled, moved, variances)
    error = (result.bootstrap.square() + result.log_z_error**2).sqrt()
    assert ((result.log_p - truth).abs() < ERRORS * error).all(), (result, truth)


def test_laplace_likelihood_of_a_network_by_quadrature(seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = SharedGenerator({"a": (4,)}, 1, width=8, sigma=0.4, likelihood="laplace", weights={"a": 2.0})
        generator = generator.double()
    x = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    result = log_likelihood(generator, GaussianPrior(1), {"a": x}, seed=seed, **LADDER)
    z = torch.linspace(-9, 9, 20_001, dtype=torch.float64)  # the trapezoid rule of kinks: errors of 1e-6 at this width
    with torch.no_grad():
        means = generator(z[:, None])["a"]
    scale = 0.4 / 2.0
    log_p = (-(x[:, None] - means).abs() / scale - math.log(2 * scale)).sum(2)
    prior = (-0.5 * z**2).exp() / math.sqrt(2 * math.pi)
    truth = torch.trapezoid(log_p.exp() * prior, z, dim=1).log()
    assert ((result.log_p - truth).abs() < ERRORS * result.bootstrap + 1e-5).all(), (result, truth)


def test_a_tuple_does_not_depend_on_its_batch(seed: int) -> None:
    generator, *law = linear(seed)
    x = batch(drawn(seed, 5, *law))
    together = log_likelihood(generator, GaussianPrior(3), x, chains=4, steps=5, seed=seed)
    apart = log_likelihood(generator, GaussianPrior(3), x, chains=4, steps=5, seed=seed, batch=8)
    # float64 sums in another order; a chain that went another way would show in the first digits
    torch.testing.assert_close(apart.log_p, together.log_p, rtol=1e-8, atol=1e-8)
    other = log_likelihood(generator, GaussianPrior(3), x, chains=4, steps=5, seed=seed + 1)
    assert (other.log_p - together.log_p).abs().min() > 1e-6


def test_annealing_from_both_sides_encloses_the_truth_and_closes_with_temperatures(seed: int) -> None:
    generator, *_ = linear(seed)
    few, many = (
        likelihood_gap(generator, GaussianPrior(3), 12, chains=64, steps=steps, leapfrog_steps=3, seed=seed).summary()
        for steps in (4, 60)
    )
    # In expectation the gap is positive and shrinks. 26 seeds gave 3 to 10 nats with four temperatures, and less than
    # one with sixty; 5 standard errors for the noise of twelve tuples.
    assert few["gap"] > many["gap"] + 1
    assert -5 * many["gap_error"] < many["gap"] < 1 + 5 * many["gap_error"]


def test_the_constant_of_each_likelihood() -> None:
    shapes = {"a": (3,), "b": (2, 2)}
    gaussian = SharedGenerator(shapes, 2, width=4, sigma=0.5, weights={"b": 4.0})
    laplace = SharedGenerator(shapes, 2, width=4, sigma=0.5, weights={"b": 4.0}, likelihood="laplace")
    normal = torch.distributions.Normal(0, torch.tensor([0.5, 0.25]).double()).log_prob(torch.zeros(2).double())
    double = torch.distributions.Laplace(0, torch.tensor([0.5, 0.125]).double()).log_prob(torch.zeros(2).double())
    for generator, peak in ((gaussian, normal), (laplace, double)):
        assert log_constant(generator, ["a"]) == pytest.approx(3 * peak[0].item())
        assert log_constant(generator, ["a", "b"]) == pytest.approx(3 * peak[0].item() + 4 * peak[1].item())


def test_the_ladder() -> None:
    assert temperatures(4, 2.0) == [0, 1 / 16, 1 / 4, 9 / 16, 1]
    assert temperatures(1) == [0, 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g, p, x: log_likelihood(g, p, {}), r"x must hold some of the modalities \['a', 'b'\], got \[\]"),
        (lambda g, p, x: log_likelihood(g, p, {**x, "c": x["a"]}), "got .*'c'"),
        (lambda g, p, x: log_likelihood(g, p, {**x, "a": x["a"][:1]}), r"equally many rows .*'a': 1"),
        (lambda g, p, x: log_likelihood(g, p, x, chains=1), "chains must be at least 2, got 1"),
        (lambda g, p, x: log_likelihood(g, p, x, steps=0), "steps must be at least 1, got 0"),
        (lambda g, p, x: log_likelihood(g, p, x, power=0.0), "power must be positive, got 0.0"),
        (lambda g, p, x: likelihood_gap(g, Quadratic(1.0, torch.zeros(3))), "prior must be a GaussianPrior, .* Quadr"),
    ],
)
def test_bad_input_is_refused(call, message: str) -> None:
    generator, *law = linear(0)
    with pytest.raises(ValueError, match=message):
        call(generator, GaussianPrior(3), batch(drawn(0, 2, *law)))


def test_a_modality_without_weight_has_no_density() -> None:
    generator = SharedGenerator({"a": (3,)}, 2, width=4, weights={"a": 0.0})
    with pytest.raises(ValueError, match=r"weight of modality 'a' must be positive .* got 0\.0"):
        log_likelihood(generator, GaussianPrior(2), {"a": torch.zeros(2, 3)})
