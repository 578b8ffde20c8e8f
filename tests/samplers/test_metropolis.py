"""``accept="metropolis"``: the chain's law is exp(-E / T), with every option that may go with it; the rest is refused.

Every chain starts from the law that it must keep, so that no burn-in is assumed: a wrong ratio moves it in a few steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import mmebm
from mmebm.samplers import Langevin, langevin
from mmebm.samplers.schedules import linear, table

CHAINS = 100_000
STEPS = 6
# Sums of 10^5 independent terms in standard deviations, about 10^2 of them in this file: 5.7 is exceeded by chance in
# one of 10^6 runs.
SIGMAS = 5.7


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def quadratic(x: Tensor) -> Tensor:
    return 0.5 * x.flatten(1).square().sum(1)


def coupled(s: dict[str, Tensor]) -> Tensor:
    """Precision 1 everywhere and 1/2 between a and b's first element."""
    return quadratic(s["a"]) + quadratic(s["b"]) + 0.5 * s["a"][:, 0] * s["b"][:, 0]


def assert_mean(values: Tensor, mean: float) -> None:
    """``values``: independent numbers of expectation ``mean``."""
    n = values.numel()
    assert n >= CHAINS // 2
    off = (float(values.mean()) - mean) / float(values.std() / math.sqrt(n))
    assert abs(off) < SIGMAS, f"{float(values.mean()):.4f} and not {mean:.4f}, off by {off:.1f} sigma"


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# The law
# ---------------------------------------------------------------------------------------------------------------------

HALF = torch.arange(CHAINS) % 2 == 0
PER_CHAIN = torch.where(HALF, 1.0, 3.0).double()

# options, energy, the target's variance (per chain where a tensor); steps so long that many proposals are refused
GAUSSIANS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Tensor], Any]] = {
    "plain": ({"step_size": 1.0}, quadratic, 1.0),
    "temperature": ({"step_size": 1.0, "temperature": 2.5}, quadratic, 2.5),
    "noise_scale": ({"step_size": 0.5, "noise_scale": 0.9}, quadratic, 0.81),
    "log_prob": ({"step_size": 1.0, "log_prob": True}, lambda x: -quadratic(x), 1.0),
    "schedule": ({"step_size": linear(1.5, 0.2, STEPS)}, quadratic, 1.0),
    "half prior": ({"step_size": 1.0, "prior_std": math.sqrt(2)}, lambda x: 0.5 * quadratic(x), 1.0),
    "prior at a temperature": (
        {"step_size": 0.6, "noise_scale": 0.9, "prior_std": 0.8},
        lambda x: 0 * quadratic(x),
        0.64 * 0.81 / 1.2,
    ),
    "grad_clip": ({"step_size": 1.0, "grad_clip": 0.3}, quadratic, 1.0),
    "grad_norm_clip": ({"step_size": 1.0, "grad_norm_clip": 0.5}, quadratic, 1.0),
    "clip and prior": (
        {"step_size": 1.0, "grad_clip": 0.3, "prior_std": math.sqrt(2)},
        lambda x: 0.5 * quadratic(x),
        1.0,
    ),
    "per chain": ({"step_size": 1 / PER_CHAIN, "temperature": PER_CHAIN}, quadratic, PER_CHAIN),
    "per element": ({"step_size": torch.tensor([[0.4, 1.5]])}, quadratic, 1.0),
}


@pytest.mark.parametrize("way", GAUSSIANS)
def test_a_gaussian_is_kept(way: str, seed: int) -> None:
    options, energy, variance = GAUSSIANS[way]
    scale = torch.as_tensor(variance, dtype=torch.float64).sqrt().reshape(-1, 1)
    sampler = Langevin(accept="metropolis", **options)
    out = sampler.sample(energy, scale * normal(seed, CHAINS, 2), STEPS, seed=seed, record=("accepted",))
    x = out.state / scale
    accepted = float(out.trace["accepted"].mean())
    assert 0.2 < accepted < 0.97, accepted
    for part in (HALF, ~HALF):
        for column in range(2):
            assert_mean(x[part, column], 0.0)
            assert_mean(x[part, column].square(), 1.0)
    assert_mean(x[:, 0] * x[:, 1], 0.0)
    # what the ratio is for: the unadjusted step does not keep it
    loose = sampler.replace(accept=None).sample(energy, scale * normal(seed, CHAINS, 2), STEPS, seed=seed).state / scale
    assert abs(float(loose[:, 1].square().mean()) - 1) > 0.05


SIZES: dict[str, dict[str, Any]] = {
    "one step size": {"step_size": 0.8},
    "sizes per modality": {"step_size": {"a": 0.8, "b": 0.3}},
    "sizes and noise per modality": {"step_size": {"a": 1.0, "b": 0.5}, "noise_scale": {"a": 2.0**0.5, "b": 1.0}},
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("blocks", [None, ("a", "b"), ("b", "a")])
def test_several_tensors_are_kept(size: str, blocks: Any, seed: int) -> None:
    # a given b is N(-b/2, 1); b's marginal has variance 1 / (1 - 1/4)
    b = normal(seed, CHAINS, 2) * torch.tensor([(4 / 3) ** 0.5, 1.0], dtype=torch.float64)
    a = normal(seed + 1, CHAINS, 1) - b[:, :1] / 2
    sampler = Langevin(accept="metropolis", **SIZES[size])
    out = sampler.sample(coupled, {"a": a, "b": b}, STEPS, seed=seed, blocks=blocks, record=("accepted",))
    a, b = out.state["a"][:, 0], out.state["b"]
    assert_mean(a.square(), 4 / 3)
    assert_mean(b[:, 0].square(), 4 / 3)
    assert_mean(a * b[:, 0], -2 / 3)
    assert_mean(b[:, 1].square(), 1.0)
    rates = out.trace["accepted"]
    assert 0.2 < float(rates.mean()) < 0.97
    assert set(rates.unique().tolist()) == ({0.0, 1.0} if blocks is None else {0.0, 0.5, 1.0})


@pytest.mark.parametrize("given", ["a tensor", "an element"])
def test_the_law_given_what_is_observed(given: str, seed: int) -> None:
    b = normal(seed, CHAINS, 2) * torch.tensor([0.7, 1.0], dtype=torch.float64)
    a = normal(seed + 1, CHAINS, 1) - b[:, :1] / 2
    observed: Any = {"b"} if given == "a tensor" else {"b": torch.tensor([True, False])}
    # the clip's limit holds for the whole gradient, the observed part included
    sampler = Langevin(1.0, accept="metropolis", grad_norm_clip=0.5, prior_std={"b": 1.0})
    energy = lambda s: quadratic(s["a"]) + 0.5 * s["a"][:, 0] * s["b"][:, 0]
    x = sampler.sample(energy, {"a": a, "b": b}, STEPS, seed=seed, observed=observed).state
    assert torch.equal(x["b"][:, 0], b[:, 0])
    residual = x["a"][:, 0] + b[:, 0] / 2
    assert_mean(residual, 0.0)
    assert_mean(residual.square(), 1.0)
    assert_mean(residual * b[:, 0], 0.0)
    if given == "an element":
        assert not torch.equal(x["b"][:, 1], b[:, 1])
        assert_mean(x["b"][:, 1].square(), 1.0)


def test_an_infinite_energy_is_never_entered(seed: int) -> None:
    """The exponential law on x > 0."""
    energy = lambda x: torch.where(x > 0, x, torch.inf).sum(1)
    g = torch.Generator().manual_seed(seed)
    x = -torch.rand(CHAINS, 1, generator=g, dtype=torch.float64).clamp_min(1e-12).log()
    out = langevin(energy, x, STEPS, step_size=0.5, accept="metropolis", seed=seed)
    assert bool((out > 0).all())
    assert_mean(out, 1.0)
    assert_mean(out.square(), 2.0)


def test_acceptance_equals_its_closed_form(seed: int) -> None:
    """In one dimension r = -(h / 4) (y^2 - x^2). A reversible chain accepts with probability 2 P(r > 0): of the jointly
    normal y - x and y + x the signs differ, with probability acos(correlation) / pi."""
    for h in (0.5, 1.0, 2.0):
        correlation = h**2 / math.sqrt((h**2 + 2 * h) * (h**2 - 2 * h + 4))
        out = Langevin(h, accept="metropolis").sample(
            quadratic, normal(seed, CHAINS, 1), 3, seed=seed, record=("accepted",)
        )
        for row in out.trace["accepted"].double():
            assert_mean(row, 2 * math.acos(correlation) / math.pi)


@pytest.mark.parametrize("options", [{}, {"grad_clip": 1.0}, {"prior_std": 1.5}, {"temperature": 2.0}], ids=str)
def test_detailed_balance_between_bins(options: dict[str, Any], seed: int) -> None:
    """As many chains go from bin i to bin j as from j to i, in a skewed double well."""
    energy = lambda x: (0.5 * (x.square() - 1).square() + 0.3 * x).sum(1)
    grid = torch.linspace(-6, 6, 48_001, dtype=torch.float64)
    t, std = options.get("temperature", 1.0), options.get("prior_std", math.inf)
    density = (-(energy(grid[:, None]) + grid**2 / (2 * std**2)) / t).exp()
    n = 400_000
    g = torch.Generator().manual_seed(seed)
    cell = torch.multinomial(density, n, replacement=True, generator=g)
    # uniform in each cell of 2.5e-4: the density changes by less than 1e-3 in it, and to second order in a bin
    x = (grid[cell] + (torch.rand(n, generator=g, dtype=torch.float64) - 0.5) * 2.5e-4)[:, None]
    edges = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)

    def worst(accept: Any) -> float:
        y = langevin(energy, x, 1, step_size=0.3, accept=accept, seed=seed, **options)
        pairs = torch.bucketize(x[:, 0], edges) * 4 + torch.bucketize(y[:, 0], edges)
        flux = torch.bincount(pairs, minlength=16).reshape(4, 4).double()
        seen = flux + flux.T > 100
        return float(((flux - flux.T).abs() / (flux + flux.T).sqrt())[seen].max())

    assert worst("metropolis") < SIGMAS
    assert worst(None) > 2 * SIGMAS


# ---------------------------------------------------------------------------------------------------------------------
# Calls and records
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Counting:
    calls: int = 0

    def __call__(self, s: dict[str, Tensor], weight: float = 1.0) -> Tensor:
        self.calls += 1
        return weight * coupled(s)


@pytest.mark.parametrize(
    ("call", "calls"),
    [
        ({}, 1 + 9),
        ({"blocks": ("a", "b")}, 1 + 2 * 9),
        ({"observed": {"a"}}, 1 + 9),
        # another energy at each step: nothing of the last one can be kept
        ({"args": (table([1.0] * 9),)}, 2 * 9),
    ],
    ids=str,
)
@pytest.mark.parametrize("accept", ["metropolis", "descent"])
def test_one_gradient_for_each_update(accept: Any, call: dict[str, Any], calls: int) -> None:
    energy = Counting()
    state = {"a": torch.ones(3, 1), "b": torch.ones(3, 2)}
    Langevin(0.1, accept=accept, mode="keep").sample(energy, state, 9, **call)
    assert energy.calls == calls


def test_accepted_is_who_moved(seed: int) -> None:
    out = Langevin(1.5, accept="metropolis").sample(
        quadratic, normal(seed, 50, 3), 20, seed=seed, record=("accepted", "displacement", "energy"), thin=1
    )
    assert torch.equal(out.trace["accepted"] == 1, out.trace["displacement"] > 0)
    assert {0.0, 1.0} == set(out.trace["accepted"].unique().tolist())
    torch.testing.assert_close(out.trace["energy"][1:], torch.stack([quadratic(x) for x in out.trajectory[:-1]]))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"noise_at": "before"}, 'needs an energy and noise_at="after"'),
    ({"score": True}, 'needs an energy and noise_at="after"'),
    ({"bounds": (0, 1)}, "goes without bounds at every step"),
    ({"bounds": (0, 1), "outside": "reject"}, "goes without bounds at every step"),
    ({"max_update": 0.1}, "goes without max_update"),
    ({"project": abs}, "goes without project"),
    ({"grad_norm_clip": 1.0, "norm_over": "tensor"}, 'goes without norm_over="tensor"'),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_steps_that_cannot_be_taken_back_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Langevin(0.1, accept="metropolis", **options)


TWO = {"a": torch.ones(3, 1), "b": torch.ones(3, 2)}
DIFFERENT: list[tuple[dict[str, Any], Any, str]] = [
    ({"step_size": 0.1, "noise_scale": 0.0}, TWO, r"positive step_size and noise_scale; state\['a'\] has 0.1 and 0.0"),
    ({"step_size": 0.0, "noise_scale": 0.1}, TWO, r"positive step_size and noise_scale; state\['a'\] has 0.0 and 0.1"),
    ({"step_size": torch.tensor([0.1, 0.0, 0.1]), "noise_scale": 1.0}, TWO, r"state\['a'\] has s\^2 / \(2a\) = tensor"),
    ({"step_size": {"a": 0.1, "b": 0.2}, "noise_scale": 0.3}, TWO, "one temperature .* for all tensors; .*'b'"),
    ({"step_size": torch.tensor([[0.1, 0.2]]), "noise_scale": 0.3}, torch.ones(3, 2), "differ between elements"),
    ({"step_size": 0.1}, torch.ones(3, 2, dtype=torch.bfloat16), "needs float32 or float64"),
]


@pytest.mark.parametrize(("options", "state", "message"), DIFFERENT)
def test_without_one_temperature_there_is_no_target(options: dict[str, Any], state: Any, message: str) -> None:
    def never(s: Any) -> Tensor:
        raise AssertionError("the energy was called")

    with pytest.raises(ValueError, match=message):
        langevin(never, state, 2, accept="metropolis", **options)


def test_accepted_needs_a_rule() -> None:
    with pytest.raises(ValueError, match='record="accepted" needs accept='):
        Langevin(0.1).sample(quadratic, torch.ones(3, 2), 2, record=("accepted",))


def test_mala_by_name() -> None:
    assert mmebm.MALA(0.1) == mmebm.Langevin(0.1, accept="metropolis")
    assert mmebm.MALA(0.1, 2.0, prior_std=1.0).temperature == 2.0
