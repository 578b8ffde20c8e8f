"""Stages that end by measured seconds: as many as asked, rates by the time, and honest numbers of iterations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest

from mmebm.data.base import MultimodalDataset
from mmebm.training import Trainer, preset
from mmebm.training.config import Config, GuardConfig, Stage, extended
from mmebm.training.tuning import TUNING, grid, same, timed
from mmebm.training.variants import cost


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock on which every iteration takes as long as was said last."""
    now, each = [0.0], [1.0]

    def clock() -> Iterator[float]:
        while True:
            yield now[0]  # before an iteration
            now[0] += each[0]
            yield now[0]  # after it

    ticks = clock()
    monkeypatch.setattr(Trainer, "_clock", lambda self: next(ticks))

    def set_each(seconds: float) -> None:
        each[0] = seconds

    return set_each


def staged(config: Config, *seconds: float, iterations: int = 4) -> Config:
    kinds = ("warmup", "prior", "joint")
    stages = tuple(
        Stage(kind, iterations, lr=1.0, final_lr=0.0, seconds=s)  # type: ignore[arg-type]
        for kind, s in zip(kinds, seconds, strict=False)
    )
    return config.replace(stages=stages, guard=GuardConfig(every=2))


def test_a_stage_has_the_seconds_that_it_was_given(
    config: Config, data: MultimodalDataset, ticking: Callable[[float], None]
) -> None:
    ticking(0.25)
    trainer = Trainer(staged(config, 2.0, 1.1), data)
    rates = []
    for row in trainer.run():
        rates.append((row["iteration"], row["stage_seconds"], trainer.lr))
    # 8 iterations of a quarter second, and 5 that are the first to be over 1.1
    assert [stage.iterations for stage in trainer.config.stages] == [8, 5] and trainer.iteration == 13
    assert trainer.elapsed == {0: 2.0, 1: 1.25} and trainer.total == 13
    # the rate falls with the time: at the last iteration 1.75 of 2 seconds were over, and 1 of 1.1
    assert rates[3] == (8, 2.0, pytest.approx(0.125)) and rates[-1] == (13, 1.25, pytest.approx(1 - 1 / 1.1))
    # what is stored says how many there were
    again = Config.from_json(trainer.state_dict()["config"])
    assert [stage.iterations for stage in again.stages] == [8, 5]
    assert extended(again, 3).stages[-1].seconds is None


def test_fewer_iterations_than_guessed(
    config: Config, data: MultimodalDataset, ticking: Callable[[float], None]
) -> None:
    ticking(1.0)
    trainer = Trainer(staged(config, 1.5, 0.5, iterations=100), data)
    rows = list(trainer.run())
    assert [stage.iterations for stage in trainer.config.stages] == [2, 1]
    assert rows[-1]["iteration"] == 3 and "vae" in trainer.snapshots


def test_a_stopped_run_goes_on_with_the_seconds_that_are_left(
    config: Config, data: MultimodalDataset, ticking: Callable[[float], None]
) -> None:
    ticking(0.5)
    first = Trainer(staged(config, 2.0, 1.0), data)
    for row in first.run():
        if row["iteration"] == 2:
            break
    state = first.state_dict()
    second = Trainer(Config.from_json(state["config"]), data)
    second.load_state_dict(state)
    assert second.elapsed == {0: 1.0}
    list(second.run())
    assert second.elapsed == {0: 2.0, 1: 1.0} and second.iteration == 6


def test_real_seconds_on_both_clocks(config: Config, data: MultimodalDataset) -> None:
    for clock in ("wall", "cpu"):
        trainer = Trainer(staged(config, 0.3).replace(clock=clock), data)
        list(trainer.run())
        assert 0.3 <= trainer.elapsed[0] < 30 and trainer.config.stages[0].iterations >= 1
    with pytest.raises(ValueError, match="seconds"):
        Stage("warmup", 4, seconds=0.0)


def test_seconds_are_shared_by_what_iterations_cost() -> None:
    config = preset("demo")
    for name in ("full", "vae", "mmvae"):
        of = timed(preset(f"demo/{name}"), 100.0, "cpu")
        assert sum(stage.seconds or 0 for stage in of.stages) == pytest.approx(100) and of.clock == "cpu"
        costs = [stage.iterations * cost(of, stage) for stage in of.stages]
        for stage, each in zip(of.stages, costs, strict=True):
            assert (stage.seconds or 0) == pytest.approx(100 * each / sum(costs))
    with pytest.raises(ValueError, match="seconds must be positive, got 0"):
        timed(config, 0)
    empty = config.replace(stages=tuple(dataclasses.replace(s, iterations=0) for s in config.stages))
    with pytest.raises(ValueError, match="there is none"):
        timed(empty, 10)


def test_grids() -> None:
    found = grid(["published"])
    assert len(found) == 18 and {"loss.beta": "2.5", "model.sigma": "1.5", "model.likelihood": "laplace"} in found
    assert grid(["a.b=1,2", "c=x"]) == [{"a.b": "1", "c": "x"}, {"a.b": "2", "c": "x"}]
    from mmebm.training.config import override

    for changes in found:  # each is a configuration
        made = override(preset("demo/mmvae"), changes)
        assert same(dataclasses.asdict(made), changes)
    for words, message in (
        (["nothing"], r"--tune takes \['published'\], or FIELD"),
        (["published", "loss.beta=1"], "'loss.beta' twice"),
    ):
        with pytest.raises(ValueError, match=message):
            grid(words)
    assert set(TUNING) == {"published"}
