"""A sweep is one chain: each row is what a run of so many steps would have given."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmebm.data.base import MultimodalDataset
from mmebm.evaluation.sweep import STEPS, Chain, data_chain, latent_chain, run_sweep

pytestmark = pytest.mark.usefixtures("one_thread")


def test_each_row_is_the_run_of_so_many_steps(system: Any, seed: int) -> None:
    states: list[dict[str, torch.Tensor]] = []

    def measure(x: dict[str, torch.Tensor]) -> dict[str, float]:
        states.append({name: value.clone() for name, value in x.items()})
        return {"mean": float(x["vector"].mean())}

    rows = run_sweep(data_chain(system, 7, seed=seed), measure, (12, 0, 3, 3, 4))
    assert [row["steps"] for row in rows] == [0, 3, 4, 12]
    seconds = [row["seconds"] for row in rows]
    assert seconds[0] == 0 < seconds[1] < seconds[2] < seconds[3]
    for row, state in zip(rows, states, strict=True):
        alone = system.revise_data(system.generate(7, seed=seed), seed=seed + 1, steps=row["steps"]).state
        assert all(torch.equal(alone[name], state[name]) for name in alone)
        assert row["mean"] == float(alone["vector"].mean()) and row["nonfinite"] == 0


def test_the_latent_chain_too(system: Any, make_set: Callable[..., MultimodalDataset], seed: int) -> None:
    given = {"grey": make_set(5).batch(torch.arange(5))["grey"]}
    found: list[torch.Tensor] = []
    run_sweep(latent_chain(system, given, seed=seed), lambda z: found.append(z.clone()) or {}, (0, 2, 9))
    start = system.inference.sample(given, torch.Generator().manual_seed(seed))
    for steps, z in zip((0, 2, 9), found, strict=True):
        assert torch.equal(z, system.revise_latent(start, given, seed=seed, steps=steps).state)


def test_the_mean_of_a_known_chain_falls_as_it_must(system: Any) -> None:
    """x <- x - .02 * 2 (x + .3) + noise: the mean's distance from -.3 is (1 - .04)^k of what it was."""
    rows = run_sweep(data_chain(system, 2000, seed=1), lambda x: {"m": float(x["colour"].mean())}, (0, 10, 20))
    start = rows[0]["m"] + 0.3
    for row in rows:
        # the mean of 2,000 x 192 numbers with noise of at most .18 each: 6 standard errors
        assert row["m"] + 0.3 == pytest.approx(start * 0.96 ** row["steps"], abs=6 * 0.18 / math.sqrt(2000 * 192))


def test_chains_that_leave_the_numbers_are_counted_once() -> None:
    def advance(x: torch.Tensor, steps: int, first: int) -> SimpleNamespace:
        # chain i is lost at step 2 i + 1, and no longer reported by later segments
        lost = torch.tensor([first < 2 * i + 1 <= first + steps for i in range(4)])
        return SimpleNamespace(state=x + steps, info={"nonfinite": lost})

    rows = run_sweep(Chain(torch.zeros(4), advance), lambda x: {"x": x[0].item()}, (0, 2, 4, 100))
    assert [(row["x"], row["nonfinite"]) for row in rows] == [(0, 0), (2, 1), (4, 2), (100, 4)]


def test_what_steps_may_be() -> None:
    chain = Chain(torch.zeros(1), lambda x, steps, first: SimpleNamespace(state=x, info={}))
    assert [row["steps"] for row in run_sweep(chain, lambda x: {})] == list(STEPS) == [0, 1, 5, 10, 20, 30, 60, 100]
    with pytest.raises(ValueError, match="at least one number of steps, got none"):
        run_sweep(chain, lambda x: {}, ())
    with pytest.raises(ValueError, match="steps must be at least 0, got -1"):
        run_sweep(chain, lambda x: {}, (5, -1))
    with pytest.raises(TypeError, match=r"steps must be an integer of at least 0, got 2\.5"):
        run_sweep(chain, lambda x: {}, (2.5,))  # type: ignore[list-item]
