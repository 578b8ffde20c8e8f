"""Where the rows of training are kept: ``log.jsonl`` always, and others where they are installed.

A logger is called with the run's folder and its configuration, plain data, and has the methods of
:class:`mmebm.plugins.Logger`. ``mmebm train --logger`` takes a name of :data:`LOGGERS`, an entry point of
``mmebm.loggers`` or an import path.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, TextIO

import numpy as np

from mmebm.files import unwritable, write_atomically
from mmebm.plugins import Logger, find
from mmebm.training.run import LOG, read_log

__all__ = ["LOGGERS", "JsonLines", "MLflow", "Started", "TensorBoard", "WandB", "logger"]


class Started:
    """Base of the loggers here: where a run goes on, for those that keep what they had before."""

    def __init__(self, folder: Path, config: dict[str, Any], *, iteration: int = 0, rollbacks: int = 0) -> None:
        self.folder: Path = folder
        self.config: dict[str, Any] = config
        self.iteration: int = iteration
        self.rollbacks: int = rollbacks

    def write(self, row: dict[str, Any]) -> None:
        """See :class:`mmebm.plugins.Logger`."""

    def image(self, name: str, pixels: np.ndarray, iteration: int) -> None:
        """See :class:`mmebm.plugins.Logger`."""

    def close(self) -> None:
        """See :class:`mmebm.plugins.Logger`."""


class JsonLines(Started):
    """``log.jsonl``, a row a line. A run that goes on continues behind the rows that it had at its checkpoint."""

    def __init__(self, folder: Path, config: dict[str, Any], **start: int) -> None:
        super().__init__(folder, config, **start)
        self.path: Path = folder / LOG
        rows, back = [], 0
        for row in read_log(folder) if self.iteration else []:
            back += "rolled_back" in row
            if row["iteration"] > self.iteration or back > self.rollbacks:
                break
            rows.append(row)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(self.path, lambda file: file.write(text.encode()))
        self.file: TextIO = self.path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        except OSError as error:
            raise unwritable(self.path, error) from error

    def close(self) -> None:
        self.file.close()


class TensorBoard(Started):
    """Numbers, pictures and the configuration, in ``tensorboard`` in the run's folder."""

    def __init__(self, folder: Path, config: dict[str, Any], **start: int) -> None:
        super().__init__(folder, config, **start)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ModuleNotFoundError("the logger 'tensorboard' needs it: pip install tensorboard") from error
        self.board: SummaryWriter = SummaryWriter(str(folder / "tensorboard"), purge_step=self.iteration + 1)
        self.board.add_text("configuration", f"```\n{json.dumps(config, indent=2)}\n```", self.iteration)

    def write(self, row: dict[str, Any]) -> None:
        for name, value in _numbers(row).items():
            self.board.add_scalar(f"{row['stage']}/{name}", value, row["iteration"])

    def image(self, name: str, pixels: np.ndarray, iteration: int) -> None:
        self.board.add_image(name, pixels, iteration, dataformats="HWC")

    def close(self) -> None:
        self.board.close()


class WandB(Started):
    """A run of Weights & Biases, by the environment (``WANDB_PROJECT``, ``WANDB_MODE=offline``, ...). One that is
    resumed goes on in the same run."""

    def __init__(self, folder: Path, config: dict[str, Any], **start: int) -> None:
        super().__init__(folder, config, **start)
        self.wandb: Any = _installed("wandb")
        kept = folder / "wandb-id"
        known = kept.read_text(encoding="utf-8").strip() if self.iteration and kept.is_file() else None
        self.run: Any = self.wandb.init(dir=str(folder), name=folder.name, config=config, id=known, resume="allow")
        write_atomically(kept, lambda file: file.write(self.run.id.encode()))

    def write(self, row: dict[str, Any]) -> None:
        stage = row["stage"]
        self.run.log({f"{stage}/{name}": value for name, value in _numbers(row).items()}, step=row["iteration"])

    def image(self, name: str, pixels: np.ndarray, iteration: int) -> None:
        self.run.log({name: self.wandb.Image(pixels)}, step=iteration)

    def close(self) -> None:
        self.run.finish()


class MLflow(Started):
    """A run of MLflow, by the environment (``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``). One that is resumed
    goes on in the same run."""

    def __init__(self, folder: Path, config: dict[str, Any], **start: int) -> None:
        super().__init__(folder, config, **start)
        self.client: Any = _installed("mlflow").MlflowClient()
        kept = folder / "mlflow-id"
        if self.iteration and kept.is_file():
            self.id = kept.read_text(encoding="utf-8").strip()
            self.client.update_run(self.id, status="RUNNING")
        else:
            self.id: str = self.client.create_run(_experiment(self.client), run_name=folder.name).info.run_id
            write_atomically(kept, lambda file: file.write(self.id.encode()))
            self.client.log_dict(self.id, config, "config.json")
            for name, value in _flat(config).items():
                self.client.log_param(self.id, name, str(value)[:500])

    def write(self, row: dict[str, Any]) -> None:
        for name, value in _numbers(row).items():
            self.client.log_metric(self.id, f"{row['stage']}/{name}", value, step=row["iteration"])

    def image(self, name: str, pixels: np.ndarray, iteration: int) -> None:
        self.client.log_image(self.id, pixels, f"{name}-{iteration}.png")

    def close(self) -> None:
        self.client.set_terminated(self.id)


LOGGERS: Final[dict[str, Callable[..., Logger]]] = {
    "jsonl": JsonLines,
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}


def logger(name: str) -> Callable[..., Logger]:
    """What makes the logger of that name: one of :data:`LOGGERS`, an entry point of ``mmebm.loggers``, or an import
    path.

    Raises:
        ValueError: where there is none.
    """
    try:
        return LOGGERS.get(name) or find("loggers", name)
    except ValueError as error:
        raise ValueError(f"{error}; the ones that come with it are {', '.join(LOGGERS)}") from None


def begun(makers: Iterable[Callable[..., Logger]], folder: Path, config: dict[str, Any], **start: int) -> list[Logger]:
    """The loggers; those of this file are told where the run goes on.

    Raises:
        TypeError: for one without ``write`` and ``close``.
    """
    own = lambda make: isinstance(make, type) and issubclass(make, Started)
    made = [make(folder, config, **start) if own(make) else make(folder, config) for make in makers]
    for keeper in made:
        if not all(callable(getattr(keeper, name, None)) for name in ("write", "close")):
            raise TypeError(f"a logger must have write(row) and close(), {type(keeper).__name__} has not")
    return made


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """The values of a row but for its place: numbers, no flags."""
    return {
        name: float(value)
        for name, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "iteration"
    }


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {path: value}
    return {
        key: inner
        for name, part in value.items()
        for key, inner in _flat(part, f"{path}.{name}" if path else str(name)).items()
    }


def _installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ModuleNotFoundError(f"the logger {name!r} needs the package: pip install {name}") from error


def _experiment(client: Any) -> str:
    """The experiment that the environment names, made where it is not there; else the default one."""
    import os

    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default")
    found = client.get_experiment_by_name(name)
    return client.create_experiment(name) if found is None else found.experiment_id
