"""Mixing: targets whose answers are known. The chains of a run are examined in test_report.py, where there is one."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmebm.energies import Gaussian, GaussianMixture
from mmebm.evaluation.mixing import THRESHOLDS, Subject, examine
from mmebm.report.mixing import sentences
from mmebm.samplers import Langevin


def chain(energy: Any, sampler: Langevin, starts: dict[str, Tensor], steps: int, **options: Any) -> Subject:
    def summaries(x: Tensor) -> dict[str, Tensor]:
        return {"energy": energy(x), "first": x[:, 0]}

    return Subject("chain", energy, sampler, steps, starts, options.pop("summaries", summaries), **options)


def normal(n: int, d: int, seed: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return mean + std * torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_a_gaussian_mixes_from_far_starts(seed: int) -> None:
    # x' = .8 x + noise: after the 200 steps that are not judged a start at 10 has shrunk by 1e-19
    starts = {"left": normal(64, 2, seed, -10), "right": normal(64, 2, seed + 1, 10), "there": normal(64, 2, seed + 2)}
    result = examine(chain(Gaussian(), Langevin(0.2), starts, 400), long=800, seed=seed)
    trained = result["horizons"]["trained"]
    assert (trained["from_step"], trained["every"], trained["draws"], trained["chains"]) == (204, 4, 50, 192)
    for horizon in result["horizons"].values():
        for row in horizon["summaries"].values():
            assert row["rhat"] == row["rhat_worst"] < 1.05 and row["ess_bulk"] > 400 and row["unmoved"] == 0
            assert set(row["rhat_within"]) == set(starts)
    assert "forgotten" in sentences(result)[0] or "forgets" in sentences(result)[0]
    # both ends of the chain from the left: the start, and 0 within six standard errors
    means = result["curves"]["mean"]["left"]["first"]
    assert means[0] == pytest.approx(starts["left"][:, 0].mean().item(), rel=1e-5)
    assert abs(means[-1]) < 6 * math.sqrt(1 / (1 - 0.2 / 2) / 64)  # the law's variance is 1 / (1 - a / 2)


def test_two_far_wells_do_not_mix_and_rhat_is_that_of_two_half_normals(seed: int) -> None:
    energy = GaussianMixture(torch.tensor([[-20.0], [20.0]]), std=1.0)
    starts = {"left": normal(100, 1, seed, -20), "right": normal(100, 1, seed + 1, 20)}
    result = examine(
        chain(
            energy,
            Langevin(0.5),
            starts,
            200,
            nominal=("well",),
            summaries=lambda x: {"energy": energy(x), "first": x[:, 0], "well": (x[:, 0] > 0).double()},
        ),
        long=200,
        seed=seed,
    )
    row = result["horizons"]["trained"]["summaries"]["first"]
    # Normal scores of the lower half have mean -sqrt(2 / pi) and variance 1 - 2 / pi: R-hat^2 = 1 + (2/pi)/(1 - 2/pi).
    # A half chain of 25 draws with tau = 1.7 (every second step, rho = .25) moves 1.7 / 25 of the inner variance into
    # the spread of the means, 7 % of an inner part that is R-hat^2's denominator: 3.5 % in R-hat, and noise besides.
    assert row["rhat"] == pytest.approx(math.sqrt(1 / (1 - 2 / math.pi)), rel=0.06)
    # each well by itself mixes, and R-hat within it cannot know of the other
    assert max(row["rhat_within"].values()) < 1.05
    well = result["horizons"]["trained"]
    # no chain changes its well: infinite, which JSON has no number for
    assert well["summaries"]["well"]["unmoved"] == 1.0 and well["summaries"]["well"]["rhat"] is None
    assert well["kept"]["well"] == {start: {"kept": 1.0, "chance": 1.0} for start in starts}
    assert "does not forget its start within 200 steps; it is a revision, not a sampler" in sentences(result)[0]
    assert str(THRESHOLDS["rhat"]["at_most"]) in sentences(result)[0]


def test_autocorrelation_time_is_that_of_the_autoregression(seed: int) -> None:
    """x' = (1 - a) x + noise has rho = 1 - a; seen every s steps, tau = s (1 + rho^s) / (1 - rho^s) steps."""
    n, steps, every = 1000, 500, 2
    starts = {"there": normal(n, 1, seed)}
    setting = chain(Gaussian(), Langevin(0.4), starts, steps)
    result = examine(setting, long=steps, points=steps // every, seed=seed)
    tau = every * (1 + 0.6**every) / (1 - 0.6**every)
    # Relative variance (4 M + 2) / N of N draws (Sokal 1997), the sum ending below M = 20 tau; 5.7 standard deviations.
    # Centring costs about tau over the 125 steps of a half, 3.5 %.
    bound = 0.035 + 5.7 * math.sqrt((4 * 20 * tau / every + 2) / (n * steps / 2 / every))
    assert bound < 0.25
    assert result["horizons"]["trained"]["summaries"]["first"]["autocorrelation_time"] == pytest.approx(tau, rel=bound)


def test_step_drift_noise_temperature_and_acceptance(seed: int) -> None:
    n, d, a = 4000, 5, 1e-4
    starts = {"three": torch.full((n, d), 3.0)}
    tiny = examine(chain(Gaussian(), Langevin(a), starts, 1), long=1, seed=seed)["step"]
    start = tiny["start"]["state"]
    assert start["drift"] == pytest.approx(a * 3 * math.sqrt(d), rel=1e-3)  # float32: 3e-7 of 3e-4
    # the mean of n chi-squares of d has a relative deviation sqrt(2 / (n d)), its root half of it; 6 of them
    assert start["noise"] == pytest.approx(math.sqrt(2 * a * d), rel=3 * math.sqrt(2 / (n * d)))
    assert start["ratio"] == pytest.approx(start["noise"] / start["drift"], rel=1e-5)
    assert tiny["temperature"] == 1.0
    # the log ratio of a step from x to y is a (|x|^2 - |y|^2) / 4: of the order of 1e-4 * 6 * .03 / 4 = 5e-6
    assert tiny["acceptance"]["1"] > 0.9999
    long = examine(chain(Gaussian(), Langevin(1.0), {"there": normal(n, d, seed)}, 1), long=1, seed=seed)["step"]
    assert long["acceptance"]["1"] < 0.7
    cold = examine(chain(Gaussian(), Langevin(a, 1e-4), starts, 1), long=1, seed=seed)["step"]
    assert cold["temperature"] == pytest.approx(1e-8 / 2e-4, rel=1e-5)
    assert set(cold["acceptance"]) == {"1", "implied"}


def test_bounds_do_not_hide_the_step(seed: int) -> None:
    sampler = Langevin(0.1, 0.2, bounds=(-0.01, 0.01))
    step = examine(chain(Gaussian(), sampler, {"in": torch.zeros(500, 4)}, 1), long=1, seed=seed)["step"]
    assert step["start"]["state"]["noise"] == pytest.approx(0.2 * 2, rel=6 * math.sqrt(1 / (2 * 500 * 4)))
    assert step["start"]["state"]["drift"] == 0 and step["start"]["state"]["ratio"] is None


def test_chains_are_compared_within_their_law(seed: int) -> None:
    """Posteriors of different data differ: chains of one must not be taken for chains of another."""
    targets, replicas = 4, 32
    means = torch.arange(targets).repeat(replicas)[:, None] * 5.0

    def energy(x: Tensor) -> Tensor:
        return 0.5 * (x - means).square().sum(1)

    starts = {"low": means - 4, "high": means + 4 + normal(len(means), 1, seed)}
    apart = examine(chain(energy, Langevin(0.3), starts, 200, targets=targets), long=200, seed=seed)
    mixed = examine(chain(energy, Langevin(0.3), starts, 200), long=200, seed=seed)
    judged = [r["horizons"]["trained"]["summaries"]["first"]["rhat"] for r in (apart, mixed)]
    assert judged[0] < 1.05 and judged[1] > 1.5


def test_the_chain_is_the_one_that_a_single_call_runs(seed: int) -> None:
    starts = {"a": normal(6, 3, seed), "b": normal(6, 3, seed + 1)}
    setting = chain(Gaussian(), Langevin(0.1), starts, 7)
    curves = examine(setting, long=23, points=5, seed=seed)["curves"]
    assert curves["step"] == [0, 1, 3, 5, 7, 11, 15, 19, 23]  # back from 7 every 2, back from 23 every 4
    whole = setting.sampler.sample(setting.energy, starts["b"], 23, seed=seed, chain_offset=6, thin=1).trajectory
    expected = [float(whole[k - 1][:, 0].mean()) for k in curves["step"][1:]]
    # six digits are kept, and a fused chain may sum in another order
    assert curves["mean"]["b"]["first"][1:] == pytest.approx(expected, rel=2e-5, abs=1e-6)


def test_agreement_beside_the_energy(seed: int) -> None:
    """A chain that pulls two modalities together is told from one that only makes each of them small."""

    def summaries(energy: Any) -> Any:
        return lambda x: {"energy": energy(x), "agreement": ((x["a"] > 0) == (x["b"] > 0)).double().squeeze(1)}

    def together(x: dict[str, Tensor]) -> Tensor:
        return 50 * (x["a"] - x["b"]).square().sum(1)

    def small(x: dict[str, Tensor]) -> Tensor:
        return 2 * (x["a"].square() + x["b"].square()).sum(1)

    said = {}
    for name, energy in (("together", together), ("small", small)):
        starts = {"start": {"a": normal(400, 1, seed), "b": normal(400, 1, seed + 1)}}
        sampler = Langevin(0.005, 1e-6)
        setting = Subject(name, energy, sampler, 50, starts, summaries(energy))
        result = examine(setting, long=50, seed=seed)
        assert set(result["step"]["end"]) == {"a", "b"}
        said[name] = " ".join(sentences(result))
        # of independent signs half agree: 6 standard errors
        assert result["change"]["agreement"]["start"] == pytest.approx(0.5, abs=6 * 0.5 / 20)
    assert "it makes modalities agree" in said["together"]
    assert "does not make the modalities agree more" in said["small"]
    assert "minimises rather than samples" in said["small"]


def test_distances_are_taken_now_and_then_and_all_is_plain(seed: int) -> None:
    starts = {"a": normal(20, 2, seed), "b": normal(20, 2, seed + 1, 5)}
    said: list[str] = []
    result = examine(
        chain(Gaussian(), Langevin(0.1), starts, 30, distance=lambda x: float(x.mean().abs()), floor=0.1),
        long=500,
        seed=seed,
        progress=said.append,
    )
    for rows in result["curves"]["distance"].values():
        steps = [step for step, _ in rows]
        assert {0, 30, 500} <= set(steps) <= set(result["curves"]["step"]) and len(steps) <= 11
    assert result["floor"] == 0.1 and len(said) == 2 and "500 steps of 20 chains" in said[0]
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_broken_chains_are_counted(seed: int) -> None:
    starts = {"a": torch.tensor([[1.0], [1e30]]).repeat(5, 1)}  # a quartic energy blows the second one up
    setting = chain(lambda x: x.pow(4).sum(1), Langevin(0.01, on_nonfinite="freeze"), starts, 5)
    result = examine(setting, long=10, seed=seed)
    assert result["broken"] == {"a": 0.5}
    assert "Chains that became inf or NaN: 50.0% from a" in sentences(result)[-1]
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"steps": 0}, ValueError, "subject.steps must be at least 1, got 0"),
        ({"starts": {}}, ValueError, "at least one initialiser"),
        ({"starts": {"a": torch.zeros(3, 1), "b": torch.zeros(4, 1)}}, ValueError, "as many chains, got .*4"),
        ({"targets": 2}, ValueError, "multiple of targets=2 chains, got 3"),
        ({"summaries": lambda x: {"x": x[:, 0]}}, ValueError, r"must hold 'energy', got \['x'\]"),
        ({"long": 3}, ValueError, "long must be at least 5, got 3"),
        ({"points": 2}, ValueError, "points must be at least 4, got 2"),
        ({"long": 7.5}, TypeError, "long must be an integer"),
    ],
)
def test_bad_input_is_refused_by_name_and_value(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"starts": {"a": torch.zeros(3, 1)}, "steps": 5, **change}
    options = {name: given.pop(name) for name in ("long", "points") if name in given}
    with pytest.raises(error, match=message):
        examine(chain(Gaussian(), Langevin(0.1), **given), **options)
