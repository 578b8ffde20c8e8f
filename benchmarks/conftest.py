"""What the benchmark files share: the threads they run with, and a table of ratios at the end of the run.

A benchmark names its workload in ``benchmark.group`` and what ran it in ``benchmark.extra_info["implementation"]``; the
implementation every other one of the group is compared with is "eager".
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from typing import Any

import pytest
import torch

BASELINE = "eager"


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """``MMEBM_BENCH_THREADS`` threads, or torch's default."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("MMEBM_BENCH_THREADS", before)))
    yield
    torch.set_num_threads(before)


def _groups(benchmarks: list[Any]) -> dict[str, dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    for bench in benchmarks:
        if not bench.has_error and "implementation" in bench.extra_info:
            groups.setdefault(bench.group or "", {})[bench.extra_info["implementation"]] = bench
    return groups


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    groups = _groups(session.benchmarks) if session is not None else {}
    if not groups:
        return
    write = terminalreporter.write_line
    terminalreporter.section("times, and how many times faster than eager")
    write(f"torch {torch.__version__}, {platform.machine()}, load at the end {os.getloadavg()[0]:.1f}")
    write(f"{'':<42}{'median us':>12}{'fastest us':>12}{'ratio':>8}{'of fastest':>12}{'G elements/s':>14}")
    for group, rows in groups.items():
        write(group)
        base = rows.get(BASELINE)
        for name, bench in rows.items():
            median, fastest = bench.stats.median, bench.stats.min
            ratios = f"{'':>8}{'':>12}"
            if base is not None:
                ratios = f"{base.stats.median / median:>8.2f}{base.stats.min / fastest:>12.2f}"
            elements = bench.extra_info.get("elements")
            rate = f"{elements / median / 1e9:>14.2f}" if elements else ""
            write(f"    {name:<38}{median * 1e6:>12.1f}{fastest * 1e6:>12.1f}{ratios}{rate}")
