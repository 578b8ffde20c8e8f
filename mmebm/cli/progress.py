"""The progress bar of training: one bar per stage, since an iteration costs tenfold from one stage to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmebm.training.config import Stage

SHOWN = (
    ("loss_elbo", "elbo"), ("loss_generator", "G"), ("loss_inference", "I"), ("loss_energy", "E"), ("gap", "gap"),
    ("prior_gap", "prior gap"), ("mse", "mse"), ("seconds_per_iteration", "s/it"),
)  # fmt: skip


class Progress:
    """A context manager; :meth:`show` takes the trainer's rows."""

    def __init__(self, stages: Sequence[Stage], iteration: int) -> None:
        try:
            from tqdm import tqdm
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("training shows a progress bar by tqdm: pip install 'mmebm[train]'") from error
        self.tqdm, self.stages = tqdm, stages
        self.bar: Any = None
        self.stage = -1
        self.iteration = iteration

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def show(self, row: dict[str, Any]) -> None:
        """One row: moves the bar and prints losses, the energy gap and seconds per iteration."""
        if "rolled_back" in row:
            self.tqdm.write(f"rolled back to iteration {row['iteration']}: {row['rolled_back']}")
            return
        if "alarm" in row:
            self.tqdm.write(f"warning at iteration {row['iteration']}: {row['alarm']}")
        # a row belongs to the stage of its last iteration
        left, index = row["iteration"] - 1, 0
        while left >= self.stages[index].iterations:
            left -= self.stages[index].iterations
            index += 1
        if index != self.stage:
            if self.bar is not None:
                self.bar.close()
            stage = self.stages[index]
            self.stage = index
            self.bar = self.tqdm(
                total=stage.iterations, desc=f"{stage.kind} {index + 1}/{len(self.stages)}", unit="it",
                initial=max(left + 1 - max(row["iteration"] - self.iteration, 0), 0),
            )  # fmt: skip
        self.iteration = row["iteration"]
        self.bar.set_postfix({label: f"{row[name]:.3g}" for name, label in SHOWN if name in row}, refresh=False)
        self.bar.update(left + 1 - self.bar.n)
