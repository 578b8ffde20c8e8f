"""Threads of the command line: the container's quota, the environment before torch is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmebm.cli.threads import SPINS, cores, quota


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "rubbish"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_a_containers_quota(files: dict[str, str], expected: float | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert quota(tmp_path) == expected


def test_no_more_threads_than_the_quota_pays_for(monkeypatch: pytest.MonkeyPatch) -> None:
    free = cores()
    assert 1 <= free <= (os.cpu_count() or 1)
    for paid, expected in ((0.5, 1), (1.2, min(free, 2)), (1e6, free), (None, free)):
        monkeypatch.setattr("mmebm.cli.threads.quota", lambda paid=paid: paid)
        monkeypatch.setattr("mmebm.cli.threads.os.sched_getaffinity", lambda pid: range(free), raising=False)
        assert cores() == expected


@pytest.mark.parametrize(
    "given, expected", [({}, str(SPINS)), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "none")]
)
def test_spinning_is_bounded_before_torch_is_there(given: dict[str, str], expected: str) -> None:
    plain = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = (
        "import os, sys\nfrom mmebm.cli.main import main\nassert 'torch' not in sys.modules\n"
        "main(['sample', 'nowhere', '--quiet'])\nassert 'torch' in sys.modules\n"
        "print(os.environ.get('GOMP_SPINCOUNT', 'none'))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], env={**plain, **given}, capture_output=True, text=True, timeout=300, check=True
    )
    assert ended.stdout.split()[-1] == expected, ended.stderr
