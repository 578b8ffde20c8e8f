"""Training beside other work: seconds per iteration of the demo, with torch's OpenMP threads told to wait in several
ways.

    python benchmarks/busy.py [--repeat 3] [--iterations 60]

torch's threads spin at the end of each parallel region until the others are there; where another process has one of
the cores, all wait for the one that shares it. Each line is a way to wait: nothing set, no spinning, a bounded spin
(`mmebm train` sets one, mmebm/cli/threads.py), fewer threads. It is measured with the machine quiet and with one
process that keeps a core busy, in the warm-up and in the joint stage; medians over --repeat processes, interleaved.
What is wanted is a line that loses in no column: the last number is its worst ratio to the best of a column. Nothing
else may run meanwhile; it says so where the load is high.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys

WAYS: dict[str, dict[str, str]] = {
    "as torch is": {},
    "passive, no spin": {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"},
    **{f"spin {n}": {"GOMP_SPINCOUNT": str(n)} for n in (1_000, 3_000, 10_000, 30_000)},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
CHILD = """
import json, sys, time, torch
from mmebm.data import load
from mmebm.training import Trainer, preset
from mmebm.training.config import override
n = int(sys.argv[1])
stages = [{"kind": "warmup", "iterations": 3 * n}, {"kind": "joint", "iterations": n}]
config = override(preset("demo"), {"stages": json.dumps(stages), "guard.every": str(n), "guard.max_gap": "1e30"})
trainer = Trainer(config, load("digits", "train", size=14, n=2000))
print(json.dumps({row["stage"]: row["seconds_per_iteration"] for row in trainer.run()}))
"""
BUSY = "while True: pass"


def measured(way: dict[str, str], iterations: int, *, busy: bool) -> dict[str, float]:
    """Seconds per iteration by stage, in a process of its own; the last rows, after the caches are warm."""
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
    plain = {name: value for name, value in os.environ.items() if name not in names}
    other = subprocess.Popen([sys.executable, "-c", BUSY]) if busy else None
    try:
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(iterations)],
            env={**plain, **way},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
    finally:
        if other is not None:
            other.kill()
            other.wait()
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--repeat", type=int, default=3, help="processes per cell (default: 3)")
    arguments.add_argument("--iterations", type=int, default=60, help="of the joint stage (default: 60)")
    given = arguments.parse_args()
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"the machine is not quiet: its load is {load:.1f}")
    cells: dict[str, dict[str, list[float]]] = {way: {} for way in WAYS}
    for _ in range(given.repeat):
        for way, settings in WAYS.items():
            for busy in (False, True):
                for stage, seconds in measured(settings, given.iterations, busy=busy).items():
                    cells[way].setdefault(f"{stage}, {'busy' if busy else 'quiet'}", []).append(1e3 * seconds)
    table = {way: {name: statistics.median(values) for name, values in of.items()} for way, of in cells.items()}
    columns = list(next(iter(table.values())))
    best = {name: min(of[name] for of in table.values()) for name in columns}
    print(f"milliseconds per iteration, medians of {given.repeat}, {os.cpu_count()} cores")
    print("| threads wait | " + " | ".join(columns) + " | worst ratio |")
    print("|---" * (len(columns) + 2) + "|")
    for way, of in table.items():
        worst = max(of[name] / best[name] for name in columns)
        print(f"| {way} | " + " | ".join(f"{of[name]:.1f}" for name in columns) + f" | {worst:.2f} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
