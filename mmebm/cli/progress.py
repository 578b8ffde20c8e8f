"""The progress of training: a bar per stage on a terminal, since an iteration costs tenfold from one stage to the next;
elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from mmebm.training.config import Stage

SHOWN = (
    ("loss_elbo", "elbo"),
    ("loss_generator", "G"),
    ("loss_inference", "I"),
    ("loss_energy", "E"),
    ("gap", "gap"),
    ("prior_gap", "prior gap"),
    ("mse", "mse"),
    ("valid_bound", "held-out bound"),
    ("seconds_per_iteration", "s/it"),
)
SECONDS = 20.0  # between two lines where there is no terminal


class Progress:
    """A context manager; :meth:`show` takes the trainer's rows.

    Args:
        stages: of the run.
        iteration: where it goes on.
        quiet: only say what went wrong.
    """

    def __init__(self, stages: Sequence[Stage], iteration: int, *, quiet: bool = False) -> None:
        self.stages: Sequence[Stage] = stages
        self.quiet: bool = quiet
        self.tqdm: Any = None
        if not quiet and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ModuleNotFoundError as error:
                raise ModuleNotFoundError(
                    "training shows a progress bar by tqdm: pip install 'mmebm[train]'"
                ) from error
            self.tqdm = tqdm
        self.bar: Any = None
        self.stage: int = -1
        self.iteration: int = iteration
        self.said: float = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def show(self, row: dict[str, Any]) -> None:
        """One row: moves the bar and prints losses, the energy gap and seconds per iteration."""
        if "rolled_back" in row:
            self._say(f"rolled back to iteration {row['iteration']}: {row['rolled_back']}")
            return
        if "alarm" in row:
            self._say(f"warning at iteration {row['iteration']}: {row['alarm']}")
        if self.quiet:
            return
        # a row belongs to the stage of its last iteration
        left, index = row["iteration"] - 1, 0
        while left >= self.stages[index].iterations:
            left -= self.stages[index].iterations
            index += 1
        values = {label: f"{row[name]:.3g}" for name, label in SHOWN if name in row}
        stage, name = self.stages[index], f"{self.stages[index].kind} {index + 1}/{len(self.stages)}"
        if self.tqdm is None:
            ends = left + 1 == stage.iterations
            if ends or index != self.stage or time.monotonic() - self.said > SECONDS:
                numbers = ", ".join(f"{label} {value}" for label, value in values.items())
                self._say(f"{name}: {left + 1} of {stage.iterations}, {numbers}")
                self.said = time.monotonic()
            self.stage = index
            return
        if index != self.stage:
            if self.bar is not None:
                self.bar.close()
            self.stage = index
            self.bar = self.tqdm(
                total=stage.iterations,
                desc=name,
                unit="it",
                initial=max(left + 1 - max(row["iteration"] - self.iteration, 0), 0),
            )
        self.iteration = row["iteration"]
        self.bar.set_postfix(values, refresh=False)
        self.bar.update(left + 1 - self.bar.n)

    def _say(self, line: str) -> None:
        if self.tqdm is not None:
            self.tqdm.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)
