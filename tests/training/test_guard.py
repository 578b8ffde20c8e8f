"""When training is called astray."""

from __future__ import annotations

import math

import pytest

from mmebm.training.config import GuardConfig
from mmebm.training.guard import Guard, TrainingDiverged


def rows(gap: float, spread: float, n: int = 50) -> list[dict[str, float]]:
    return [{"iteration": float(i), "gap": gap, "energy_spread": spread} for i in range(n)]


def test_a_collapse_at_a_small_gap_is_found() -> None:
    """As `coop-vae` collapses on PolyMNIST-14: gap -52 and single energies within 20 of their means (2.6 of them)."""
    guard = Guard(GuardConfig())
    for _ in range(4):  # while the energy is new it may be far ahead
        assert guard.reason(rows(-52.0, 19.6)) is None
    reason = guard.reason(rows(-52.0, 19.6))
    assert reason is not None and "-52, 2.7 standard deviations of an energy (limit 2.5): the chain cannot" in reason
    # whichever way, and in whatever unit energies are counted
    for scale in (1e-3, -1e-3, 30.0):
        guard = Guard(GuardConfig(grace=0))
        assert "standard deviations" in str(guard.reason(rows(-52.0 * scale, 19.6 * abs(scale))))
    assert Guard(GuardConfig(grace=0, max_separation=0.0)).reason(rows(-52.0, 19.6)) is None


@pytest.mark.parametrize("gap, spread", [(-2.9, 2.0), (0.005, 0.1), (-40.0, 20.0), (0.0, 0.0)])
def test_a_gap_within_the_energies_own_spread_is_none(gap: float, spread: float) -> None:
    assert Guard(GuardConfig(grace=0)).reason(rows(gap, spread)) is None


def test_one_bad_iteration_in_a_window_is_none_and_what_is_no_number_is() -> None:
    guard = Guard(GuardConfig(grace=0))
    assert guard.reason([*rows(-1.0, 2.0, 49), *rows(-60.0, 2.0, 1)]) is None
    assert "gap is nan" in str(guard.reason(rows(math.nan, 1.0)))
    assert "limit 1e+04" in str(guard.reason(rows(2e4, 1e6)))
    with pytest.raises(TrainingDiverged, match=r"cannot follow.*; rolled back 3 times already"):
        for _ in range(4):
            reason = guard.reason(rows(-60.0, 2.0))
            assert reason is not None
            guard.roll_back(reason)
