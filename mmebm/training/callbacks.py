"""Code of the user's own that a run calls on the way."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmebm.training.config import Stage
    from mmebm.training.trainer import Trainer

__all__ = ["Callback"]


class Callback:
    """What a run calls; a subclass has the methods that it needs.

    Setting ``trainer.stop`` to a number ends training after the iteration in hand. Of several processes each has
    callbacks of its own and calls them alike; checkpoints are the first one's.

    Example:
        >>> class Patience(Callback):
        ...     def on_row(self, trainer, row):
        ...         if trainer.best and trainer.iteration - trainer.best["iteration"] > 5000:
        ...             trainer.stop = 1
    """

    def on_stage(self, trainer: Trainer, stage: Stage) -> None:
        """Before the first iteration of a stage."""

    def on_iteration(self, trainer: Trainer) -> None:
        """After an iteration; ``trainer.iteration`` counts it."""

    def on_row(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """A row of the log, before it is kept; what is put into it is kept with it."""

    def on_checkpoint(self, trainer: Trainer, folder: Path) -> None:
        """``folder`` holds a new checkpoint.pt, whole. Called by the thread that writes, while training goes on: the
        trainer may be some iterations further."""
