"""The tests that draw from a seed, with many seeds and on every instruction set: what a fixed seed cannot show.

python tests/seeds.py --first 0 --last 49 --record benchmarks/results/seeds.txt      # hours; a line per seed
python tests/seeds.py --first 7 --last 7 --longest 60                                # one, with slow tests too

Seed i is 1000003 i + 17 and runs with MMEBM_CPU_ISA avx2, baseline or avx512 by i modulo 3. Tests without the fixture
``seed`` or ``session_seed`` are the same under every seed and are left out, and so is what took longer than
--longest seconds in the first of these runs. With --part 3 each seed runs a third of them, another third each time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("ops", "samplers", "energies", "diagnostics", "models", "evaluation", "test_noise.py", "test_state.py")
INSTRUCTION_SETS = ("avx2", "baseline", "avx512")
SLOW = ROOT / "build" / "slow-tests.json"


class Seeded:
    """The pytest plugin: keeps tests that draw from a seed and were not too slow; notes how long each took."""

    def __init__(self) -> None:
        self.slow: dict[str, float] = json.loads(SLOW.read_text()) if SLOW.exists() else {}
        self.took: dict[str, float] = {}
        self.longest, self.part = float(os.environ["MMEBM_SEEDS_LONGEST"]), int(os.environ["MMEBM_SEEDS_PART"])

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept, left = [], []
        for item in items:
            seeded = {"seed", "session_seed"} & set(getattr(item, "fixturenames", ()))
            quick = self.slow.get(item.nodeid, 0.0) <= self.longest
            chosen = zlib.crc32(f"{os.environ['MMEBM_TEST_SEED']}:{item.nodeid}".encode()) % self.part == 0
            (kept if seeded and quick and chosen else left).append(item)
        config.hook.pytest_deselected(items=left)
        items[:] = kept

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.took[report.nodeid] = self.took.get(report.nodeid, 0.0) + report.duration

    def pytest_sessionfinish(self) -> None:
        if not SLOW.exists():
            SLOW.parent.mkdir(exist_ok=True)
            SLOW.write_text(json.dumps({name: took for name, took in self.took.items() if took > 0.3}, indent=1))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Seeded())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--last", type=int, default=49)
    parser.add_argument("--longest", type=float, default=2.0, metavar="SECONDS")
    parser.add_argument("--part", type=int, default=1)
    parser.add_argument("--record", type=Path, help="append a line per seed to this file")
    given = parser.parse_args()
    failed = False
    for i in range(given.first, given.last + 1):
        isa, seed = INSTRUCTION_SETS[i % 3], 1000003 * i + 17
        environment = os.environ | {"MMEBM_CPU_ISA": isa, "MMEBM_TEST_SEED": str(seed)}
        environment |= {"MMEBM_SEEDS_LONGEST": str(given.longest), "MMEBM_SEEDS_PART": str(given.part)}
        environment |= {"PYTHONPATH": os.pathsep.join((str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")))}
        began = time.time()
        tests = [str(ROOT / "tests" / name) for name in FOLDERS]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "seeds", "--no-header", *tests]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        lines = done.stdout.strip().splitlines()
        line = f"{i:2d} {seed:9d} {isa:8s} {lines[-1] if lines else done.stderr.strip()}"
        print(line, f"[{time.time() - began:.0f} s, {platform.processor() or platform.machine()}]", flush=True)
        if done.returncode:
            failed = True
            print(*[text for text in lines if text.startswith(("FAILED", "ERROR"))], sep="\n", flush=True)
            Path(ROOT / "build" / f"seed-{i}.log").write_text(done.stdout + done.stderr)
        if given.record:
            with given.record.open("a") as file:
                file.write(line + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
