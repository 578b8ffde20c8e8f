"""Student's intervals against SciPy, and what they cover."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mmebm.evaluation.intervals import mean_interval, paired_interval, student_cdf, student_quantile


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 30, 201])
def test_student_is_that_of_scipy(freedom: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    for t in (-40.0, -3.2, -0.4, 0.0, 1e-3, 0.7, 2.5, 12.7, 300.0):
        assert student_cdf(t, freedom) == pytest.approx(stats.t.cdf(t, freedom), rel=1e-9, abs=1e-12)
    for p in (0.01, 0.3, 0.5, 0.9, 0.975, 0.9995):
        assert student_quantile(p, freedom) == pytest.approx(stats.t.ppf(p, freedom), rel=1e-8, abs=1e-12)


def test_intervals_are_those_of_scipy(seed: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(seed)
    for n in (2, 3, 5, 11):
        a, b = random.normal(size=(2, n))
        found = mean_interval(a.tolist())
        low, high = stats.t.interval(0.95, n - 1, loc=a.mean(), scale=stats.sem(a))
        assert found.mean == pytest.approx(a.mean()) and found.n == n
        assert found.half == pytest.approx((high - low) / 2, rel=1e-8)
        pair, theirs = paired_interval(a.tolist(), b.tolist()), stats.ttest_rel(a, b)
        assert pair.half == pytest.approx(np.diff(theirs.confidence_interval(0.95))[0] / 2, rel=1e-8)
        assert pair.excludes_zero == (theirs.pvalue < 0.05)


def test_the_interval_covers_the_mean(seed: int) -> None:
    """Of 2,000 sets of three draws, 95 % within four standard errors (.0195)."""
    random = np.random.default_rng(seed)
    found = [mean_interval(values.tolist()) for values in random.normal(1.0, 2.0, (2000, 3))]
    covered = np.mean([abs(i.mean - 1) <= i.half for i in found])  # type: ignore[operator]
    assert abs(covered - 0.95) < 0.0195


def test_few_values_and_what_is_refused() -> None:
    assert mean_interval([]) == (None, None, 0) and mean_interval([2.0]) == (2.0, None, 1)
    assert not mean_interval([2.0]).excludes_zero and mean_interval([2.0, 2.0]).excludes_zero
    with pytest.raises(ValueError, match="as many values, got 2 and 1"):
        paired_interval([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="freedom must be at least 1, got 0"):
        student_quantile(0.9, 0)
    for level in (0.0, 1.0, 95, math.nan):
        with pytest.raises(ValueError, match="level must lie in"):
            mean_interval([1.0], level=level)
    for p in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="p must lie in"):
            student_quantile(p, 3)
