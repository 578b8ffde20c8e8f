"""Schedules: their values, written out, and what a chain does with them."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from mmebm.energies import MLP
from mmebm.ops.common.params import StepParams, StepRows
from mmebm.samplers import HMC, Langevin, Underdamped, langevin
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
        (lambda: linear(1.0, 2.0, 0), "steps must be an int of at least 1 .* got 0"),
        (lambda: linear(1.0, 2.0, 2.5), "steps must be an int of at least 1 .* got 2.5"),  # pyright: ignore
        (lambda: geometric(0.0, 1.0, 3), "start must be finite and above 0, got 0.0"),
        (lambda: geometric(1.0, float("nan"), 3), "end must be no NaN"),
        (lambda: polynomial(1.0, 0.1, 3, power=0.0), "power must be finite and above 0, got 0.0"),
        (lambda: table([]), "values must hold at least one entry"),
    ],
)
def test_errors(make: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
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


# --- All steps at once

EVERY = [schedule for schedule, _ in VALUES] + [
    linear(0.1, 0.7, 1000),
    linear(0.3, -0.1, 37),
    linear(1, 2, 7),
    geometric(0.013, 1e-5, 1000),
    geometric(3, 7, 5),
    polynomial(0.9, 0.017, 1000, power=2.7),
    polynomial(1, 0, 9),
    table([1, 2.5, 3]),
]


@pytest.mark.parametrize("schedule", EVERY, ids=repr)
@pytest.mark.parametrize(("first", "steps"), [(0, 1200), (3, 2), (0, 1), (2**31, 3)])
def test_values_at_once_are_those_of_each_step(schedule: Schedule, first: int, steps: int) -> None:
    """Bit for bit, and of the same type."""
    got, wanted = list(schedule.values_at(first, steps)), [schedule(k) for k in range(first, first + steps)]
    assert [type(v) for v in got] == [type(v) for v in wanted]
    assert [float(v) for v in got] == [float(v) for v in wanted]


@dataclass(frozen=True)
class Own(Schedule):
    """A schedule of somebody else's, which has no other way of giving its values."""

    start: float

    def __call__(self, k: int) -> float:
        return self.start / (1 + k)


SETTINGS: list[dict[str, Any]] = [
    {"step_size": linear(0.1, 0.02, 9)},
    {"step_size": geometric(0.1, 0.02, 9), "temperature": polynomial(1.0, 0.3, 9, power=1.7)},
    {"step_size": Own(0.1), "noise_scale": Own(0.3)},
    {"step_size": table(torch.linspace(0.1, 0.2, 9)), "prior_std": linear(1.0, 2.0, 9)},
    {"step_size": 0.1, "grad_clip": geometric(3.0, 1.0, 9), "max_update": table([0.3, 0.2])},
    {"step_size": linear(0.1, 0.02, 9), "bounds": (linear(-2.0, -1.0, 9), 1.0)},
]


def at(value: Any, k: int) -> Any:
    """A setting's value at step ``k``."""
    if isinstance(value, tuple):
        return tuple(at(part, k) for part in value)
    return value(k) if callable(value) else value


@pytest.mark.parametrize("options", SETTINGS, ids=lambda o: "-".join(o))
@pytest.mark.parametrize("fused", [True, False])
def test_a_chain_is_that_of_each_step_by_itself(options: dict[str, Any], fused: bool, seed: int) -> None:
    """Runs of one step each, which are given the numbers."""
    torch.manual_seed(seed)
    net = MLP(3, (8,)).requires_grad_(False)
    x, backend = torch.randn(5, 3), "auto" if fused else "torch"
    whole = Langevin(**options, backend=backend).sample(net, x, 9, seed=seed)
    assert whole.info["op"] == ("langevin_mlp" if fused else "langevin_step"), whole.info["reason"]
    y = x
    for k in range(9):
        step = {name: at(value, k) for name, value in options.items()}
        y = Langevin(**step, backend=backend).sample(net, y, 1, seed=seed, first_step=k).state
    assert torch.equal(whole.state, y) and not torch.equal(y, x)


@pytest.mark.parametrize("sampler", [HMC(linear(0.1, 0.3, 6), 2), Underdamped(geometric(0.3, 0.1, 6), Own(2.0))])
def test_kinetic_samplers_take_the_value_of_each_step(sampler: Any, seed: int) -> None:
    energy, x = lambda x: 0.5 * x.square().sum(1), torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
    each = sampler.replace(
        **{
            name: getattr(sampler, name).__call__
            for name in ("step_size", "friction")
            if isinstance(getattr(sampler, name, None), Schedule)
        }
    )
    got, wanted = sampler.sample(energy, x, 6, seed=seed), each.sample(energy, x, 6, seed=seed)
    assert torch.equal(got.state, wanted.state) and not torch.equal(got.state, x)


def test_a_long_chain_in_one_call_makes_no_row_for_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The columns are enough: rows made one by one are what took a hundred times as long as the chain."""
    made: list[int] = []
    take = StepRows.__getitem__
    monkeypatch.setattr(StepRows, "__getitem__", lambda self, k: made.append(1) or take(self, k))
    asked: list[int] = []
    call = linear.__call__
    monkeypatch.setattr(linear, "__call__", lambda self, k: asked.append(k) or call(self, k))
    net = MLP(3, (8,)).requires_grad_(False)
    out = Langevin(linear(0.1, 0.01, 5000), temperature=geometric(1.0, 0.1, 5000)).sample(net, torch.zeros(2, 3), 5000)
    assert out.info["op"] == "langevin_mlp" and len(made) < 50 and asked == []


def test_rows_are_made_of_columns() -> None:
    rows = StepRows([{"step_size": [1.0, 2.0, 3.0], "noise_scale": 0.5}], 3)
    assert len(rows) == 3 and rows[1] == [StepParams(2.0, 0.5)] == rows[-2] and rows[1:] == [rows[1], rows[2]]
    assert len(list(rows)) == 3 and len(rows.still([False])) == 1
    assert rows.map(lambda name, v: 2 * v)[2] == [StepParams(6.0, 1.0)]
    with pytest.raises(IndexError):
        rows[3]


@pytest.mark.parametrize("shape", [(), (5,), (1, 3)])
@pytest.mark.parametrize("write", ["in place", "by data", "not"])
def test_a_function_may_write_each_steps_value_to_one_tensor(shape: tuple[int, ...], write: str, seed: int) -> None:
    """As a loop that anneals by ``size.mul_(0.5)`` reads it."""
    sizes = [0.2 * 0.5 ** (k * (write != "not")) for k in range(4)]

    def anneal(size: torch.Tensor) -> Any:
        def at(k: int) -> torch.Tensor:
            if write != "not" and k:
                (size if write == "in place" else size.data).mul_(0.5)
            return size

        return at

    class Annealed(Schedule):
        def __init__(self) -> None:
            self.at = anneal(torch.full(shape, 0.2))

        def __call__(self, k: int) -> Any:
            return self.at(k)

    torch.manual_seed(seed)
    x, energy = torch.randn(5, 3), lambda x, t=1.0: (t * x.square()).sum(1) + x.prod(1)
    expected = Langevin(table(sizes)).sample(energy, x, 4, seed=seed).state
    for step_size in (anneal(torch.full(shape, 0.2)), Annealed()):
        torch.testing.assert_close(Langevin(step_size).sample(energy, x, 4, seed=seed).state, expected)
    if shape != (5,):
        expected = Langevin(0.1).sample(energy, x, 4, args=(table(sizes),), seed=seed).state
        torch.testing.assert_close(Langevin(0.1).sample(energy, x, 4, args=(Annealed(),), seed=seed).state, expected)
