"""Schedules: functions of the global step ``k`` (so that a restarted chain goes on where it was).

Any callable of ``k`` that returns a number or a tensor is a schedule of a setting. These are the usual ones; they
compare, print and pickle, and they alone may also stand among the energy's ``args`` and ``kwargs``, where each step
passes the value of its ``k`` (annealed noise levels). Over ``steps`` steps a schedule starts with ``start``, reaches
``end`` at ``k = steps - 1`` and stays there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Schedule", "geometric", "linear", "polynomial", "table"]


class Schedule(ABC):
    """A function of the global step."""

    @abstractmethod
    def __call__(self, k: int) -> float | Tensor:
        """The value at step ``k``."""


@dataclass(frozen=True)
class _Ramp(Schedule):
    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps must be an int of at least 1, got {self.steps!r}")

    def _fraction(self, k: int) -> float:
        return min(max(k / max(self.steps - 1, 1), 0.0), 1.0)


# Lower case: they are called like the functions they stand for.
@dataclass(frozen=True)
class linear(_Ramp):
    """From ``start`` to ``end`` in equal differences."""

    def __call__(self, k: int) -> float:
        return self.start + (self.end - self.start) * self._fraction(k)


@dataclass(frozen=True)
class geometric(_Ramp):
    """From ``start`` to ``end`` in equal ratios; both positive."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.start > 0 and self.end > 0):
            raise ValueError(f"start and end must be positive, got {self.start} and {self.end}")

    def __call__(self, k: int) -> float:
        return self.start * (self.end / self.start) ** self._fraction(k)


@dataclass(frozen=True)
class polynomial(_Ramp):
    """``end + (start - end) (1 - k / (steps - 1))^power``, with a positive power."""

    power: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.power > 0:
            raise ValueError(f"power must be positive, got {self.power}")

    def __call__(self, k: int) -> float:
        return self.end + (self.start - self.end) * (1.0 - self._fraction(k)) ** self.power


@dataclass(frozen=True, eq=False)
class table(Schedule):
    """``values[k]``; the last one after its end. Rows of a tensor may hold one value per chain."""

    values: Sequence[float] | Tensor

    def __post_init__(self) -> None:
        if len(self.values) == 0:
            raise ValueError("values must hold at least one entry, got an empty table")

    def __call__(self, k: int) -> float | Tensor:
        return self.values[min(k, len(self.values) - 1)]
