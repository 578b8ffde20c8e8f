"""A run while it trains: what is kept back and measured, what is written beside it, who is told."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import mmebm
from mmebm.data.base import MultimodalDataset
from mmebm.training import Trainer, checkpoint, fitting
from mmebm.training.callbacks import Callback
from mmebm.training.config import CheckpointConfig, Config, GuardConfig, Stage, ValidationConfig
from mmebm.training.fitting import fit
from mmebm.training.loggers import JsonLines, logger
from mmebm.training.run import read_log

CHECKED = ValidationConfig(every=5, share=0.4)


@pytest.fixture
def checked(config: Config) -> Config:
    """A run that validates and keeps checkpoints."""
    return config.replace(
        validation=CHECKED,
        checkpoint=CheckpointConfig(seconds=0.0, every=4, keep=2, best="mse"),
        guard=GuardConfig(every=4),
    )


class StopAt(Callback):
    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def on_iteration(self, trainer: Trainer) -> None:
        trainer.stop = int(trainer.iteration == self.iteration)


def test_what_is_kept_back_is_fixed_and_not_trained_on(config: Config, data: MultimodalDataset) -> None:
    trainer = Trainer(config.replace(validation=CHECKED), data)
    assert trainer.validation is not None
    assert (len(trainer.data), len(trainer.validation)) == (38, 26) and len(data) == 64
    rows = {int(row) for row in trainer.held}
    trained = {int(row) for row in trainer.data.index[:, 0]}
    assert len(rows) == 26 and not rows & trained and rows | trained == set(range(64))
    assert torch.equal(trainer.validation.index[:, 0], trainer.held)
    # by the seed of the data, not by that of the run
    assert torch.equal(Trainer(config.replace(validation=CHECKED, seed=5), data).held, trainer.held)
    other = config.replace(validation=CHECKED, data=dataclasses.replace(config.data, seed=1))
    assert not torch.equal(Trainer(other, data).held, trainer.held)
    assert Trainer(config, data).validation is None and len(Trainer(config, data).data) == 64
    with pytest.raises(ValueError, match=r"nothing was kept back .*: set validation.every"):
        Trainer(config, data).validate()
    few = data.subset(torch.arange(2))
    with pytest.raises(ValueError, match="has 2 tuples, too few to keep some for a validation"):
        Trainer(config.replace(validation=CHECKED, batch=1), few)


def test_tuples_that_hang_together_are_kept_together(
    config: Config, data: MultimodalDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the ten captions of an image in a small set: one group of them, although a few tuples were asked for."""
    config = config.replace(validation=dataclasses.replace(CHECKED, share=0.05))
    monkeypatch.setattr(MultimodalDataset, "groups", lambda self: torch.arange(len(self)) // 10)
    held = Trainer(config, data).held
    assert held.tolist() == [60, 61, 62, 63]  # the last group has four
    monkeypatch.setattr(MultimodalDataset, "groups", lambda self: torch.arange(len(self)) % 4)
    held = Trainer(config, data).held
    assert len(held) == 16 and len((held % 4).unique()) == 1
    monkeypatch.setattr(MultimodalDataset, "groups", lambda self: torch.zeros(len(self), dtype=torch.int64))
    with pytest.raises(ValueError, match="in groups of at least 64, so that no 3 of 64 can be kept"):
        Trainer(config, data)


def test_a_stored_split_is_the_split(config: Config, data: MultimodalDataset) -> None:
    """Tuples that the data gained are trained on; the validation stays what it was."""
    first = Trainer(config.replace(validation=CHECKED), data.subset(torch.arange(50)))
    state = first.state_dict()
    grown = Trainer(config.replace(validation=CHECKED), data)
    assert not torch.equal(grown.held, first.held)
    with pytest.warns(UserWarning, match="it had 50 tuples and has 64; those that it keeps back .* all others are"):
        grown.load_state_dict(state)
    assert torch.equal(grown.held, first.held) and len(grown.data) == 64 - len(first.held)
    fewer = Trainer(config.replace(validation=CHECKED), data.subset(torch.arange(42)))
    with pytest.raises(ValueError, match=r"\d+ of the 20 that it keeps back to validate on are not among them"):
        fewer.load_state_dict(state)
    old = {key: value for key, value in state.items() if key not in ("held_keys", "tuples")}
    with pytest.raises(ValueError, match=r"it validates on tuple \d+, and the data has 42"):
        fewer.load_state_dict(old)
    grown.load_state_dict(old)
    assert torch.equal(grown.held, first.held)


@pytest.mark.parametrize("named", [True, False])
def test_tuples_that_stand_elsewhere_are_found_again(config: Config, data: MultimodalDataset, named: bool) -> None:
    """As where a file is added in the middle: their places alone would be those of tuples that were trained on."""
    if named:
        data = dataclasses.replace(data, names={data.modalities[0].name: [f"{i}.png" for i in range(64)]})
    first = Trainer(config.replace(validation=CHECKED), data.subset(torch.arange(10, 60)))
    state = first.state_dict()
    moved = data.subset(torch.cat([torch.arange(40, 64), torch.arange(40)]))
    again = Trainer(config.replace(validation=CHECKED), moved)
    with pytest.warns(UserWarning, match="it had 50 tuples and has 64"):
        again.load_state_dict(state)
    assert torch.equal(moved.index[again.held], data.subset(torch.arange(10, 60)).index[first.held])
    assert first.validation is not None and again.validation is not None
    assert torch.equal(again.validation.index, first.validation.index)
    assert again.state_dict()["held_keys"] == state["held_keys"]
    other = data.subset(torch.arange(12, 62))  # as many, of which some are others
    with pytest.raises(ValueError, match=r"had 50 tuples and has 50, and \d+ of the 20 .* or train anew"):
        Trainer(config.replace(validation=CHECKED), other).load_state_dict(state)


def test_tuples_without_names_must_be_as_many(config: Config, data: MultimodalDataset) -> None:
    class Made:
        def __init__(self, n: int) -> None:
            self.n = n

        def __len__(self) -> int:
            return self.n

        def __getitem__(self, i: int) -> dict[str, np.ndarray]:
            return {m.name: m.natural(data.pools[m.name][i : i + 1])[0] for m in data.modalities}  # type: ignore[index]

    state = Trainer(config.replace(validation=CHECKED), mmebm.data.from_dataset(Made(50), data.modalities)).state_dict()
    assert state["held_keys"] is None
    other = Trainer(config.replace(validation=CHECKED), mmebm.data.from_dataset(Made(60), data.modalities))
    with pytest.raises(ValueError, match="had 50 tuples and has 60, which have no names"):
        other.load_state_dict(state)


def test_measuring_changes_nothing(config: Config, data: MultimodalDataset) -> None:
    ends = []
    for every in (2, 50):
        trainer = Trainer(config.replace(validation=dataclasses.replace(CHECKED, every=every), ema=0.5), data)
        rows = []
        for row in trainer.run():
            rows.append(row)
            trainer.samples(3)
        ends.append(trainer.system.state_dict())
        assert any("valid_bound" in row for row in rows) == (every == 2)
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


def test_the_numbers_fall_where_they_should(config: Config, data: MultimodalDataset) -> None:
    long = config.replace(validation=CHECKED, stages=(Stage("warmup", 150), Stage("joint", 5)))
    rows = [row for row in Trainer(long, data).run() if "valid_bound" in row]
    assert [row["iteration"] for row in rows] == list(range(5, 156, 5))
    # two classes that every modality shows: what a model of 150 iterations has learned, whatever the seed
    assert rows[-2]["valid_mse"] < 0.5 * rows[0]["valid_mse"]
    assert rows[-2]["valid_bound"] > rows[0]["valid_bound"] + 100
    assert "valid_gap" not in rows[0] and "valid_gap" in rows[-1]


def test_kept_and_best_checkpoints(checked: Config, data: MultimodalDataset, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    trainer, folder = Trainer(checked, data), tmp_path / "r"
    assert fit(trainer, folder)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["12", "16", "best"]
    for name in ("12", "16", "best"):
        inside = sorted(path.name for path in (folder / "checkpoints" / name).iterdir())
        assert inside == ["checkpoint.pt", "samples.png"]
    rows = read_log(folder)
    valued = {row["iteration"]: row["valid_mse"] for row in rows if "valid_mse" in row}
    assert list(valued) == [5, 10, 15]
    best = min(valued, key=lambda at: valued[at])
    assert checkpoint.load(folder / "checkpoints" / "best" / "checkpoint.pt")["iteration"] == best
    assert trainer.best == {"value": valued[best], "iteration": best}
    # each is a model
    assert mmebm.load(folder / "checkpoints" / "best").sample(2)["grey"].shape == (2, 1, 28, 28)


def test_a_run_that_stopped_keeps_what_one_that_did_not_does(
    checked: Config, data: MultimodalDataset, tmp_path: Path
) -> None:
    assert fit(Trainer(checked, data), tmp_path / "whole")

    assert not fit(Trainer(checked, data, callbacks=[StopAt(7)]), tmp_path / "r")
    again = Trainer(checked, data)
    again.load_state_dict(checkpoint.load(tmp_path / "r" / "checkpoint.pt"))
    assert again.iteration == 7
    assert fit(again, tmp_path / "r")
    for name in ("12", "16", "best"):
        whole, mine = (
            checkpoint.load(tmp_path / run / "checkpoints" / name / "checkpoint.pt") for run in ("whole", "r")
        )
        assert whole["best"] == mine["best"] and whole["iteration"] == mine["iteration"]
        for key, value in whole["system"].items():
            assert torch.equal(value, mine["system"][key]), f"{name}: {key}"


class Told(Callback):
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def on_stage(self, trainer: Trainer, stage: Stage) -> None:
        self.calls.append((stage.kind, trainer.iteration))

    def on_iteration(self, trainer: Trainer) -> None:
        self.calls.append(trainer.iteration)

    def on_row(self, trainer: Trainer, row: dict[str, Any]) -> None:
        row["mine"] = 0.5

    def on_checkpoint(self, trainer: Trainer, folder: Path) -> None:
        assert checkpoint.load(folder / "checkpoint.pt")["format"]
        self.calls.append(folder.name)


def test_callbacks(checked: Config, data: MultimodalDataset, tmp_path: Path) -> None:
    told = Told()
    config = checked.replace(
        checkpoint=CheckpointConfig(seconds=1e6, every=10),
        stages=(Stage("warmup", 6), Stage("prior", 0), Stage("joint", 6)),
    )
    assert fit(Trainer(config, data, callbacks=[told]), tmp_path / "r")
    assert [call for call in told.calls if isinstance(call, int)] == list(range(1, 13))
    assert [call for call in told.calls if isinstance(call, tuple)] == [("warmup", 0), ("joint", 6)]
    assert [call for call in told.calls if isinstance(call, str)] == ["r", "10", "r"]
    assert {row["mine"] for row in read_log(tmp_path / "r")} == {0.5}


class Pictures:
    """A logger as a user writes it."""

    made: list[Pictures]

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.preset, self.rows, self.images, self.closed = config["preset"], [], [], 0
        type(self).made = [self]

    def write(self, row: dict[str, Any]) -> None:
        self.rows.append(row["iteration"])

    def image(self, name: str, pixels: np.ndarray, iteration: int) -> None:
        self.images.append((name, iteration))
        assert pixels.dtype == np.uint8 and pixels.shape[2] == 3 and pixels.std() > 10

    def close(self) -> None:
        self.closed += 1


class Bare:
    """One with what it must have, that fails at the end."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        pass

    def write(self, row: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        raise OSError("the server is gone")


def test_loggers_get_rows_and_pictures_and_are_closed(checked: Config, data: MultimodalDataset, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(OSError, match="the server is gone"):
        fit(Trainer(checked, data), tmp_path / "r", loggers=[Pictures, Bare])
    (mine,) = Pictures.made
    assert mine.preset == "test" and mine.closed == 1
    assert mine.rows == [row["iteration"] for row in read_log(tmp_path / "r")]
    assert ("samples", 8) in mine.images and any(name == "best" for name, _ in mine.images)
    assert checkpoint.load(tmp_path / "r" / "checkpoint.pt")["iteration"] == 16  # all the same


def test_a_logger_by_name(config: Config, data: MultimodalDataset, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"a logger must have write\(row\) and close\(\), dict has not"):
        fit(Trainer(config, data), tmp_path / "r", loggers=[lambda folder, config: {}])
    assert logger("jsonl") is JsonLines
    with pytest.raises(
        ValueError, match=r"'wand' is none of mmebm.loggers.*come with it are jsonl, tensorboard, wandb"
    ):
        logger("wand")


def test_what_the_writing_thread_cannot_write_is_an_error_here(tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError("disk full")

    done = []
    writer = checkpoint.Writer()
    writer.submit(fail)
    with pytest.raises(OSError, match="disk full"):
        writer.submit(lambda: done.append(1))
    writer.submit(lambda: done.append(2))
    writer.close()
    assert done == [2]


def test_rows_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    rows = [{"iteration": 5}, {"iteration": 3, "rolled_back": "x"}, {"iteration": 10}, {"iteration": 15}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"itera')
    log = JsonLines(tmp_path, {}, iteration=10, rollbacks=1)
    log.write({"iteration": 11})
    log.close()
    assert [row["iteration"] for row in read_log(tmp_path)] == [5, 3, 10, 11]


def test_tensorboard_has_numbers_pictures_and_settings(
    checked: Config, data: MultimodalDataset, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert fit(Trainer(checked, data), tmp_path / "r", loggers=[logger("tensorboard")])
    events = EventAccumulator(str(tmp_path / "r" / "tensorboard")).Reload()
    tags = events.Tags()
    assert "warmup/valid_bound" in tags["scalars"] and "joint/gap" in tags["scalars"]
    assert set(tags["images"]) == {"samples", "best"} and "configuration/text_summary" in tags["tensors"]
    assert [event.step for event in events.Scalars("warmup/valid_bound")] == [5]


def test_weights_and_biases(checked: Config, data: MultimodalDataset, tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert fit(Trainer(checked, data), tmp_path / "r", loggers=[logger("wandb")])
    kept = (tmp_path / "r" / "wandb-id").read_text()
    assert list((tmp_path / "r" / "wandb").glob(f"offline-run-*-{kept}"))


def test_mlflow(checked: Config, data: MultimodalDataset, tmp_path: Path, monkeypatch: Any) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)
    assert fit(Trainer(checked, data), tmp_path / "r", loggers=[logger("mlflow")])
    run = mlflow.MlflowClient().get_run((tmp_path / "r" / "mlflow-id").read_text())
    assert run.info.status == "FINISHED" and run.data.params["model.latent"] == "3"
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "warmup/valid_bound")
    assert [point.step for point in history] == [5]


class Items(torch.utils.data.Dataset):
    """The toy set as a data set of dicts, with an augmentation."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        bright = 0.2 + 0.6 * (i % 2) + 0.1 * np.random.random()
        return {"grey": np.full((1, 6, 6), bright, np.float32), "vector": np.full(3, i % 2 - 0.5, np.float32)}


def test_a_data_set_of_dicts_behind_workers_trains_alike_and_resumes(config: Config, tmp_path: Path) -> None:
    ends = []
    for workers in (1, 2):
        read = dataclasses.replace(config.data, workers=workers)
        trainer = Trainer(config.replace(data=read, validation=CHECKED), Items())
        if workers == 2:  # and stops on the way, and goes on
            trainer.callbacks.append(StopAt(9))
            assert not fit(trainer, tmp_path / "r")
            trainer = Trainer(config.replace(data=read, validation=CHECKED), Items())
            trainer.load_state_dict(checkpoint.load(tmp_path / "r" / "checkpoint.pt"))
        assert fit(trainer, tmp_path / f"r{workers}")
        ends.append(trainer.system.state_dict())
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


def test_a_signal_that_comes_twice_at_once_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C reaches a process from the terminal and from torchrun: it still ends the iteration in hand."""
    trainer: Any = SimpleNamespace(stop=0)
    before = signal.getsignal(signal.SIGINT)  # ignored in the background of a shell
    with fitting._signals(trainer):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert trainer.stop == signal.SIGINT
        monkeypatch.setattr(fitting, "ONE_SIGNAL", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
