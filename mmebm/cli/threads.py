"""CPU threads that neither starve beside other work nor outnumber the cores that a container may use."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Final

# How often an idle OpenMP thread looks for work before it sleeps: some tens of microseconds. GNU's default is three
# hundred times as long: where another process has one of the cores, every loop of torch's waits for the thread that
# shares it, which does not get the core while the others spin. Not to spin at all is no better: a thread that sleeps
# takes longer to wake than many a loop of a small network takes. benchmarks/busy.py measures it both ways.
SPINS: Final = 1_000
CGROUP: Final = Path("/sys/fs/cgroup")


def settle() -> None:
    """Bounds the spinning, unless the environment says something else. Before torch is loaded, whose OpenMP reads it
    then."""
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


def cores() -> int:
    """The cores that this process may use: those it is bound to, or as many as its container's quota pays for."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    paid = quota()
    return bound if paid is None else max(1, min(bound, math.ceil(paid)))


def quota(root: Path = CGROUP) -> float | None:
    """The cores that the container's CPU quota pays for, of either version of cgroups; None without one."""
    try:
        most, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            most, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        except OSError:
            return None
    try:
        return float(most) / float(period) if most not in ("max", "-1") else None
    except (ValueError, ZeroDivisionError):
        return None
