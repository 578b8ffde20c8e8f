"""What the benchmark files share: threads, how long is measured, and the one table at the end of the run.

A benchmark names its workload in ``benchmark.group`` and describes its row in ``benchmark.extra_info``:

    implementation   the row's name; without it the benchmark is not in the table
    baseline         True: the row that the others of its group are compared with
    elements, bytes, flops   what one call handles, moves to and from memory, and computes: rates, where given
    roof             True: a plain copy, whose bytes/s the other rows' are compared with

pytest-benchmark's own table is left out, unless ``--benchmark-verbose`` or ``--benchmark-compare`` asks for it.
"""

from __future__ import annotations

import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    if session is not None and not session.verbose and not config.getoption("benchmark_compare"):
        session.quiet = True


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """``MMEBM_BENCH_THREADS`` threads, or torch's default."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("MMEBM_BENCH_THREADS", before)))
    yield
    torch.set_num_threads(before)


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """``measure(run, bunch=1)`` times ``run``, which does what is measured ``bunch`` times, after three warm-up calls.

    Rounds for about ``--benchmark-max-time`` seconds (one), at least five of them.
    """
    seconds = float(request.config.option.benchmark_max_time)

    def timed(run: Callable[[], object], bunch: int = 1) -> None:
        took = 0.0
        for _ in range(3):
            begin = time.perf_counter()
            run()
            took = time.perf_counter() - begin
        benchmark.pedantic(run, rounds=max(5, min(2000, int(seconds / took))))
        data = benchmark.stats.stats.data
        data[:] = [value / bunch for value in data]

    return timed


def _groups(benchmarks: list[Any]) -> dict[str, dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    for bench in benchmarks:
        if not bench.has_error and "implementation" in bench.extra_info:
            groups.setdefault(bench.group or "", {})[bench.extra_info["implementation"]] = bench
    return groups


def _marked(rows: dict[str, Any], key: str) -> Any:
    return next((bench for bench in rows.values() if bench.extra_info.get(key)), None)


def _row(name: str, bench: Any, base: Any, roof: Any) -> str:
    median, fastest, info = bench.stats.median, bench.stats.min, bench.extra_info

    def column(width: int, digits: int, value: float | None) -> str:
        return f"{'' if value is None else f'{value:.{digits}f}':>{width}}"

    def rate(key: str, of: Any = bench) -> float | None:
        return of.extra_info[key] / of.stats.median / 1e9 if of.extra_info.get(key) else None

    moved, limit = rate("bytes"), None if roof is None else rate("bytes", roof)
    columns = [
        column(12, 1, median * 1e6),
        column(12, 1, fastest * 1e6),
        column(8, 2, None if base is None else base.stats.median / median),
        column(12, 2, None if base is None else base.stats.min / fastest),
        column(9, 2, rate("elements")),
        column(8, 1, moved),
        column(9, 2, None if moved is None or limit is None else moved / limit),
        column(9, 1, rate("flops")),
    ]
    return f"    {name + (' *' if info.get('baseline') else ''):<30}" + "".join(columns)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    groups = _groups(session.benchmarks) if session is not None else {}
    if not groups:
        return
    write = terminalreporter.write_line
    terminalreporter.section("times, and how many times faster than the row with *")
    write(f"torch {torch.__version__}, {platform.machine()}, load at the end {os.getloadavg()[0]:.1f}")
    names = f"{'median us':>12}{'fastest us':>12}{'ratio':>8}{'of fastest':>12}{'G elem/s':>9}{'GB/s':>8}"
    write(f"{'':<34}{names}{'of copy':>9}{'GFLOP/s':>9}".rstrip())
    for group, rows in groups.items():
        write(group)
        base, roof = _marked(rows, "baseline"), _marked(rows, "roof")
        for name, bench in rows.items():
            write(_row(name, bench, base, roof).rstrip())
    skipped = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", ()))
    for reason, count in skipped.items():
        write(f"not measured, {count} times: {reason.removeprefix('Skipped: ')}")
