"""Killed and resumed training ends as the one left alone, bit for bit; ``kills.py --kills 50`` is the long version."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_killed_training_ends_as_the_one_left_alone(seed: int) -> None:
    # in a process of its own, which forks: this one may have threads
    ended = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kills.py")), "--kills", "5", "--seed", str(seed)],
        capture_output=True,
        text=True,
        timeout=1800,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "5 processes killed" in ended.stdout
