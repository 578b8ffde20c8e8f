"""Means over seeds with what they may be trusted to: Student's intervals, alone and of paired differences.

A seed is one run of everything that is drawn (weights, pairing, judges), so that the runs of different seeds are
independent, and two variants under one seed are a pair. With n runs the interval of a mean is ``mean -+ t s /
sqrt(n)``, ``t`` the .975 quantile of Student's law with n - 1 degrees of freedom: 12.7 for two runs, 2.78 for five.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Interval", "mean_interval", "paired_interval", "student_cdf", "student_quantile"]


class Interval(NamedTuple):
    """``mean -+ half``; ``half`` is None for one value, both are None for none; ``n`` values."""

    mean: float | None
    half: float | None
    n: int

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside."""
        return self.mean is not None and self.half is not None and abs(self.mean) > self.half


def student_cdf(t: float, freedom: int) -> float:
    """P(T <= t) for Student's law with a whole number of degrees of freedom, by the finite sums of Abramowitz and
    Stegun, 26.7.3 and 26.7.4.

    Raises:
        ValueError: for less than one degree of freedom.
    """
    if freedom < 1:
        raise ValueError(f"freedom must be at least 1, got {freedom}")
    theta = math.atan2(t, math.sqrt(freedom))
    cosine, sine = math.cos(theta), math.sin(theta)
    if freedom % 2:
        total, term = 0.0, cosine
        for j in range(3, freedom + 1, 2):
            total += term
            term *= cosine * cosine * (j - 1) / j
        inside = 2 / math.pi * (theta + sine * total)
    else:
        total, term = 0.0, 1.0
        for j in range(2, freedom + 1, 2):
            total += term
            term *= cosine * cosine * (j - 1) / j
        inside = sine * total
    return 0.5 + 0.5 * inside


def student_quantile(p: float, freedom: int) -> float:
    """The t with ``student_cdf(t, freedom) == p``, to the last digits of a float, by halving.

    Raises:
        ValueError: for p outside (0, 1), or less than one degree of freedom.
    """
    if not 0 < p < 1:
        raise ValueError(f"p must lie in (0, 1), got {p}")
    if p < 0.5:
        return -student_quantile(1 - p, freedom)
    low, high = 0.0, 1.0
    while student_cdf(high, freedom) < p:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if student_cdf(middle, freedom) < p else (low, middle)
    return (low + high) / 2


def mean_interval(values: Sequence[float], *, level: float = 0.95) -> Interval:
    """The mean of independent ``values`` and half the width of its interval at ``level``.

    Raises:
        ValueError: for a ``level`` outside (0, 1).

    Example:
        >>> mean_interval([1.0, 2.0, 3.0])
        Interval(mean=2.0, half=2.48..., n=3)
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), such as 0.95, got {level}")
    if not values:
        return Interval(None, None, 0)
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return Interval(mean, None, 1)
    t = student_quantile((1 + level) / 2, n - 1)
    return Interval(mean, t * statistics.stdev(values) / math.sqrt(n), n)


def paired_interval(a: Sequence[float], b: Sequence[float], *, level: float = 0.95) -> Interval:
    """:func:`mean_interval` of ``a - b``, where ``a[i]`` and ``b[i]`` are of one seed.

    Raises:
        ValueError: for unequal numbers of values, or a ``level`` outside (0, 1).
    """
    if len(a) != len(b):
        raise ValueError(f"a and b must have as many values, got {len(a)} and {len(b)}")
    return mean_interval([x - y for x, y in zip(a, b, strict=True)], level=level)
