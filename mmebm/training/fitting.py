"""Training that can be left alone: log, checkpoints, pictures of samples, signals. What ``mmebm train`` does."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mmebm.plugins import Logger
from mmebm.training import checkpoint
from mmebm.training.loggers import JsonLines, begun
from mmebm.training.reading import keep_codecs
from mmebm.training.run import CHECKPOINT
from mmebm.training.trainer import Row, Trainer

__all__ = ["CHECKPOINTS", "fit", "peak_memory"]

CHECKPOINTS = "checkpoints"  # the folder of those that are kept, each a run's folder itself
PICTURE = "samples.png"
COLUMNS = 12  # samples in a picture
ONE_SIGNAL = 1.0  # seconds in which a signal that comes again is the same one


def fit(
    trainer: Trainer,
    folder: Path | str,
    *,
    loggers: Sequence[Callable[..., Logger]] = (),
    show: Callable[[Row], Any] | None = None,
) -> bool:
    """Trains to the end, to Ctrl-C or to SIGTERM, saving before the first iteration, on the way as
    ``config.checkpoint`` says, at SIGUSR1 and at the end.

    Checkpoints are written by a thread while training goes on. ``folder`` and each of ``folder/checkpoints`` is what
    :func:`mmebm.load` takes.

    Args:
        trainer: of a new run, or with the state of the run that is in ``folder``.
        folder: of the run.
        loggers: beside ``log.jsonl`` (:mod:`mmebm.training.loggers`); each is called with the folder and the
            configuration.
        show: called with each row, after it was kept.

    Returns:
        Whether the end was reached; ``trainer.stop`` then is the signal that stopped it.

    Raises:
        OSError: where something cannot be written.
        mmebm.training.TrainingDiverged: as :meth:`Trainer.run`.

    Example:
        >>> trainer = Trainer(preset("demo"), load("digits", "train", size=14))
        >>> fit(trainer, "runs/mine")
    """
    if not trainer.processes.first:
        with _signals(trainer):
            for _ in trainer.run():
                pass
        return trainer.iteration >= trainer.total
    folder, settings = Path(folder), trainer.config.checkpoint
    folder.mkdir(parents=True, exist_ok=True)
    keep_codecs(trainer.data.modalities, folder)
    plain = json.loads(trainer.config.to_json())
    start = {"iteration": trainer.iteration, "rollbacks": trainer.guard.rollbacks}
    with contextlib.ExitStack() as stack:
        asked = stack.enter_context(_signals(trainer))
        keepers: list[Logger] = []
        for make in (JsonLines, *loggers):
            keepers += begun([make], folder, plain, **start)
            stack.callback(keepers[-1].close)
        writer = stack.enter_context(checkpoint.Writer())
        keeper = _Keeper(trainer, folder, writer, keepers)
        if trainer.iteration < trainer.total:
            keeper.save()
        writer.wait()  # worker processes that read data are forked next, best from a process that does nothing else
        saved = time.perf_counter()
        for row in trainer.run():
            memory = peak_memory(trainer.device)
            row.update({} if memory is None else {"peak_memory_mib": memory})
            for logger in keepers:
                logger.write(row)
            if show is not None:
                show(row)
            if "rolled_back" in row:
                continue
            if row.get("best"):
                keeper.keep("best")
            if settings.every and trainer.iteration % settings.every == 0:
                keeper.keep(str(trainer.iteration))
                keeper.prune(settings.keep)
            due = time.perf_counter() - saved > settings.seconds and not writer.busy
            if asked.is_set() or due:
                asked.clear()
                keeper.save()
                saved = time.perf_counter()
        keeper.save()
    return trainer.iteration >= trainer.total


class _Keeper:
    """What is written of a run that trains."""

    def __init__(self, trainer: Trainer, folder: Path, writer: checkpoint.Writer, loggers: Sequence[Logger]) -> None:
        self.trainer, self.folder, self.writer = trainer, folder, writer
        self.images = [logger for logger in loggers if callable(getattr(logger, "image", None))]

    def save(self) -> None:
        """The last state, to go on from."""
        self._write(self.folder, keep_previous=True)

    def keep(self, name: str) -> None:
        """A checkpoint that stays, in a folder of its own, with a picture of samples."""
        into = self.folder / CHECKPOINTS / name
        into.mkdir(parents=True, exist_ok=True)
        keep_codecs(self.trainer.data.modalities, into)
        self._write(into, keep_previous=False)
        self._draw(into / PICTURE, name if name == "best" else "samples")

    def _write(self, folder: Path, *, keep_previous: bool) -> None:
        trainer, content = self.trainer, self.trainer.state_dict()

        def write() -> None:
            checkpoint.save(folder / CHECKPOINT, content, keep_previous=keep_previous)
            for callback in trainer.callbacks:
                callback.on_checkpoint(trainer, folder)

        self.writer.submit(write)

    def _draw(self, path: Path, name: str) -> None:
        try:
            from mmebm.evaluation import figures

            trainer = self.trainer
            x = trainer.samples(COLUMNS, seed=trainer.config.seed)
            blocks = {m.name: m.natural(x[m.name]) for m in trainer.data.modalities}
            figures.sample_grid({f"iteration {trainer.iteration}": blocks}, path, columns=COLUMNS)
        except ImportError:  # no matplotlib: no picture
            return
        if self.images:
            from matplotlib.image import imread

            pixels = (imread(path)[..., :3] * 255).round().astype("uint8")
            for logger in self.images:
                logger.image(name, pixels, self.trainer.iteration)  # pyright: ignore[reportAttributeAccessIssue]

    def prune(self, keep: int) -> None:
        """Removes all numbered checkpoints but the ``keep`` newest (0: none), and what a run that went on from an
        earlier iteration left behind."""
        if not keep:
            return
        numbers = sorted(int(path.name) for path in (self.folder / CHECKPOINTS).iterdir() if path.name.isdigit())
        gone = [n for n in numbers if n > self.trainer.iteration]
        for number in {*gone, *[n for n in numbers if n not in gone][:-keep]}:
            shutil.rmtree(self.folder / CHECKPOINTS / str(number), ignore_errors=True)


@contextlib.contextmanager
def _signals(trainer: Trainer) -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM end the iteration in hand; SIGUSR1 sets the event that is given."""

    first: list[float] = []

    def stop(number: int, frame: Any) -> None:
        # the first signal ends the iteration in hand and saves; a second one ends at once, the last save stays
        first.append(time.monotonic())
        if first[-1] - first[0] < ONE_SIGNAL:  # torchrun passes on what the terminal has sent to all anyway
            trainer.stop = number
            return
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        signal.raise_signal(number)

    asked = threading.Event()
    handlers: dict[int, Callable[[int, Any], None]] = {signal.SIGINT: stop, signal.SIGTERM: stop}
    if hasattr(signal, "SIGUSR1"):  # as batch systems send it some time before they end a job
        handlers[signal.SIGUSR1] = lambda number, frame: asked.set()
    before: dict[int, Any] = {}
    try:
        with contextlib.suppress(ValueError):  # not in the main thread: signals are the caller's matter
            for number, handler in handlers.items():
                before[number] = signal.signal(number, handler)
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def peak_memory(device: torch.device) -> float | None:
    """The most memory held so far, MiB: tensors on a GPU; on the CPU the whole process and what came before, None where
    the system does not count it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB on Linux
