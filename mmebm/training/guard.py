"""The guard: notices that training has gone astray and decides between going on, going back and stopping."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mmebm.training.config import GuardConfig


class TrainingDiverged(RuntimeError):
    """Training went astray more often than the guard allows. The last good checkpoint is on disk."""


class Guard:
    """Checks the logged values of the last iterations."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.rollbacks: int = 0

    def reason(self, rows: Sequence[Mapping[str, float]]) -> str | None:
        """Why the last iterations are not to be trusted, or None."""
        for row in rows:
            for name, value in row.items():
                if not math.isfinite(value):
                    return f"{name} is {value} at iteration {row.get('iteration', 0):.0f}"
            gap = abs(row.get("gap", 0.0))
            if gap > self.config.max_gap:
                return f"the energy gap is {gap:.3g} (limit {self.config.max_gap:.3g})"
            if row.get("frozen_chains", 0.0) > 0:
                return f"{row['frozen_chains']:.0f} chains turned non-finite"
        return None

    def alarm(self, row: Mapping[str, float]) -> str | None:
        """A warning that does not stop training: revised latents far outside the prior mean a step too long."""
        size = row.get("latent_size", 0.0)
        if size > self.config.latent_alarm:
            return f"median |z_k| is {size:.2f} sqrt(latent): the latent chain may be unstable, lower its step"
        return None

    def roll_back(self, reason: str) -> None:
        """Counts a rollback.

        Raises:
            TrainingDiverged: where there were too many.
        """
        self.rollbacks += 1
        if self.rollbacks > self.config.rollbacks:
            raise TrainingDiverged(
                f"{reason}; rolled back {self.config.rollbacks} times already. Lower the learning rate or the chain's "
                "step, or raise loss.energy_l2"
            )
