"""Schedules: their values, written out, and what a chain does with them."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from mmebm.samplers import langevin
from mmebm.samplers.schedules import Schedule, geometric, linear, polynomial, table

VALUES = [
    (linear(1.0, 3.0, 5), [1.0, 1.5, 2.0, 2.5, 3.0, 3.0, 3.0]),
    (linear(1.0, 3.0, 2), [1.0, 3.0, 3.0]),
    (linear(1.0, 3.0, 1), [1.0, 3.0]),
    (geometric(16.0, 1.0, 5), [16.0, 8.0, 4.0, 2.0, 1.0, 1.0]),
    # ((1 - k / 4)^2 (start - end) + end, the decay of implicit behavioural cloning
    (polynomial(2.0, 1.0, 5), [2.0, 1 + 9 / 16, 1 + 4 / 16, 1 + 1 / 16, 1.0, 1.0]),
    (polynomial(2.0, 1.0, 3, power=1.0), [2.0, 1.5, 1.0]),
    (table([3.0, 1.0, 2.0]), [3.0, 1.0, 2.0, 2.0, 2.0]),
    (table(torch.tensor([3.0, 1.0])), [3.0, 1.0, 1.0]),
]


@pytest.mark.parametrize(("schedule", "values"), VALUES)
def test_values(schedule: Schedule, values: list[float]) -> None:
    assert [float(schedule(k)) for k in range(len(values))] == pytest.approx(values, rel=1e-12)
    assert float(schedule(10**6)) == pytest.approx(values[-1], rel=1e-12)


@pytest.mark.parametrize(("schedule", "values"), VALUES)
def test_schedules_pickle(schedule: Schedule, values: list[float]) -> None:
    copy = pickle.loads(pickle.dumps(schedule))
    assert [float(copy(k)) for k in range(len(values))] == [float(schedule(k)) for k in range(len(values))]


def test_schedules_compare_and_print() -> None:
    assert linear(1.0, 2.0, 3) == linear(1.0, 2.0, 3) != linear(1.0, 2.0, 4)
    assert linear(1.0, 2.0, 3) != geometric(1.0, 2.0, 3)
    assert repr(polynomial(1.0, 0.5, 3)) == "polynomial(start=1.0, end=0.5, steps=3, power=2.0)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: linear(1.0, 2.0, 0), "steps must be an int of at least 1, got 0"),
        (lambda: linear(1.0, 2.0, 2.5), "steps must be an int of at least 1, got 2.5"),  # pyright: ignore
        (lambda: geometric(0.0, 1.0, 3), "start and end must be positive, got 0.0 and 1.0"),
        (lambda: geometric(1.0, float("nan"), 3), "start and end must be positive"),
        (lambda: polynomial(1.0, 0.1, 3, power=0.0), "power must be positive, got 0.0"),
        (lambda: table([]), "values must hold at least one entry"),
    ],
)
def test_errors(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("per_chain", [False, True])
def test_a_chain_takes_the_value_of_each_step_once(per_chain: bool) -> None:
    """With gradient 1 and no noise the state sums the steps; each is asked for once, before the energy is called."""
    asked: list[int] = []
    values = torch.tensor([[1.0, 2.0], [3.0, 5.0], [7.0, 11.0], [0.5, 0.25]], dtype=torch.float64)

    def schedule(k: int) -> Any:
        asked.append(k)
        return values[k] if per_chain else float(values[k, 0])

    def energy(x: torch.Tensor) -> torch.Tensor:
        assert asked == [1, 2, 3]
        return x.sum(1)

    out = langevin(energy, torch.zeros(2, 3, dtype=torch.float64), 3, step_size=schedule, noise_scale=0.0, first_step=1)
    sums = values[1:].sum(0) if per_chain else values[1:, 0].sum().expand(2)
    torch.testing.assert_close(out, -sums[:, None].expand(2, 3))
    assert asked == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": lambda k: 0.1 - 0.05 * k}, r"step_size at step 3 must be finite and at least 0"),
        ({"step_size": lambda k: None}, r"step_size at step 0 must be a number or a tensor, got None"),
        ({"step_size": lambda k: "0.1"}, r"step_size at step 0 must be a number"),
        ({"step_size": 0.1, "prior_std": table([1.0, 0.0])}, r"prior_std at step 1 must be finite and above 0"),
        ({"step_size": 0.1, "temperature": lambda k: float("nan")}, r"temperature at step 0 must be finite"),
        ({"step_size": 0.1, "bounds": (linear(0.0, 2.0, 3), 1.0)}, r"bounds must have low <= high, got 2.0 and 1.0"),
        ({"step_size": 0.1, "grad_clip": lambda k: torch.ones(7)}, r"grad_clip at step 0 of shape \(7,\) does not"),
    ],
)
def test_bad_values_are_found_before_the_chain_starts(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        langevin(lambda x: 1 / 0, torch.zeros(2, 3), 5, **options)


@pytest.mark.parametrize(
    "options", [{"step_size": linear(0.1, 0.2, 3)}, {"step_size": 0.1, "args": (linear(0.1, 0.2, 3),)}]
)
def test_a_first_step_on_the_device_cannot_go_with_schedules(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="first_step must be an int where"):
        langevin(lambda x, *a: 1 / 0, torch.zeros(2, 3), 5, first_step=torch.tensor(3), **options)
