"""Schedules: functions of the global step ``k`` (so that a restarted chain goes on where it was).

Any callable of ``k`` that returns a number or a tensor is a schedule of a setting. These are the usual ones; they
compare, print and pickle, and they alone may also stand among the energy's ``args`` and ``kwargs``, where each step
passes the value of its ``k`` (annealed noise levels). Over ``steps`` steps a schedule starts with ``start``, reaches
``end`` at ``k = steps - 1`` and stays there.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmebm.ops.common.params import StepNumbers
from mmebm.state import check_setting, dense, integer, items, one_number

__all__ = ["Schedule", "geometric", "linear", "polynomial", "table"]


def values_of(function: Callable[[int], Any], first: int, steps: int) -> list[Any]:
    """``function`` of ``steps`` steps from ``first`` on. Tensors are copied, as a function may write each step's value
    to the same one (``size.mul_(0.99)``); one that stays as it is once."""
    values: list[Any] = []
    last: Any = None  # the function's own
    copy: Any = None
    written = -1
    for k in range(first, first + steps):
        value = function(k)
        if isinstance(value, Tensor):
            version = -1 if value.is_inference() else value._version
            same = value is last and version == written >= 0
            if not same or (value.is_cpu and not torch.equal(value, copy)):
                copy = value.clone()
            last, written, value = value, version, copy
        values.append(value)
    return values


class Schedule(ABC):
    """A function of the global step. Yours may be any callable; one that derives from this class may also stand among
    the energy's arguments.

    Example:
        >>> class Halved(mmebm.schedules.Schedule):
        ...     def __call__(self, k):
        ...         return 0.1 * 0.5**k
        >>> x = mmebm.langevin(lambda x: x.square().sum(1), torch.zeros(4, 2), 10, step_size=Halved())
    """

    @abstractmethod
    def __call__(self, k: int) -> float | Tensor:
        """The value at step ``k``."""

    def values_at(self, first: int, steps: int) -> Sequence[float | Tensor]:
        """The values at steps ``first``, ``first + 1``, ..., bit for bit; a schedule of formula has them at once."""
        return values_of(self, first, steps)


@dataclass(frozen=True)
class _Ramp(Schedule):
    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        integer("steps", self.steps, 1, 2**63)
        for name in ("start", "end"):
            object.__setattr__(self, name, check_setting(name, getattr(self, name), low=-math.inf, kinds="a number"))

    def _fraction(self, k: int) -> float:
        return min(max(k / max(self.steps - 1, 1), 0.0), 1.0)

    def _fractions(self, first: int, steps: int) -> Tensor | None:
        """:meth:`_fraction` of many steps, float64, or None where start and end are no plain floats. Sums, products and
        quotients of float64 are Python's; a power need not be, and is taken one by one."""
        if not all(type(end) is float for end in (self.start, self.end)):
            return None
        k = torch.arange(first, first + steps, dtype=torch.float64, device="cpu")
        return (k / max(self.steps - 1, 1)).clamp(0.0, 1.0)


# Lower case: they are called like the functions they stand for.
@dataclass(frozen=True)
class linear(_Ramp):
    """From ``start`` to ``end`` in equal differences.

    Example:
        >>> [mmebm.schedules.linear(1.0, 0.0, 5)(k) for k in range(6)]
        [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """

    def __call__(self, k: int) -> float:
        return self.start + (self.end - self.start) * self._fraction(k)

    def values_at(self, first: int, steps: int) -> Sequence[float | Tensor]:
        fractions = self._fractions(first, steps)
        if fractions is None:
            return super().values_at(first, steps)
        return StepNumbers(self.start + (self.end - self.start) * fractions)


@dataclass(frozen=True)
class geometric(_Ramp):
    """From ``start`` to ``end`` in equal ratios; both positive.

    Example:
        >>> [mmebm.schedules.geometric(1.0, 0.25, 3)(k) for k in range(3)]
        [1.0, 0.5, 0.25]
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("start", self.start), ("end", self.end)):
            one_number(name, value, strict=True)

    def __call__(self, k: int) -> float:
        return self.start * (self.end / self.start) ** self._fraction(k)

    def values_at(self, first: int, steps: int) -> Sequence[float | Tensor]:
        fractions = self._fractions(first, steps)
        if fractions is None:
            return super().values_at(first, steps)
        start, ratio = self.start, self.end / self.start
        return [start * ratio**f for f in StepNumbers(fractions)]


@dataclass(frozen=True)
class polynomial(_Ramp):
    """``end + (start - end) (1 - k / (steps - 1))^power``, with a positive power.

    Example:
        >>> [mmebm.schedules.polynomial(1.0, 0.0, 3)(k) for k in range(3)]
        [1.0, 0.25, 0.0]
    """

    power: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "power", one_number("power", self.power, strict=True))

    def __call__(self, k: int) -> float:
        return self.end + (self.start - self.end) * (1.0 - self._fraction(k)) ** self.power

    def values_at(self, first: int, steps: int) -> Sequence[float | Tensor]:
        fractions = self._fractions(first, steps)
        if fractions is None:
            return super().values_at(first, steps)
        end, difference, power = self.end, self.start - self.end, self.power
        return [end + difference * (1.0 - f) ** power for f in StepNumbers(fractions)]


@dataclass(frozen=True, eq=False)
class table(Schedule):
    """``values[k]``; the last one after its end. Rows of a tensor may hold one value per chain.

    Example:
        >>> [mmebm.schedules.table([0.1, 0.05])(k) for k in range(3)]
        [0.1, 0.05, 0.05]
    """

    values: Sequence[float] | Tensor

    def __post_init__(self) -> None:
        if isinstance(self.values, Tensor):
            dense("values", self.values, 1)
        if not items("values", self.values) or not hasattr(self.values, "__getitem__"):
            raise ValueError(f"values must hold at least one entry, got {self.values!r:.80}")

    def __call__(self, k: int) -> float | Tensor:
        return self.values[min(k, len(self.values) - 1)]

    def values_at(self, first: int, steps: int) -> Sequence[float | Tensor]:
        rows = list(self.values[first : first + steps])
        return rows + [self.values[len(self.values) - 1]] * (steps - len(rows))
