"""Draws a table of ``mmebm ablate``: joint coherence against Frechet distance, an arrow from x0 to xk per variant.

python benchmarks/study/figure.py benchmarks/study/digits/table.json benchmarks/study/digits/table.png
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

# where a name would cover another's: points to the right of and above its own
OFFSETS = {"frozen": (6, -12), "mmvae+": (-4, -14), "paper": (-8, -16), "mmvae": (6, -4), "vae": (6, 6)}
BASELINES = {"vae", "mvae", "mmvae", "mopoe", "mvtcae", "mmvae+"}


def _pair(value: dict[str, float] | list[float]) -> tuple[float, float]:
    """(mean, half width of its interval); in the tables of version 0.1.0 a standard deviation."""
    return (value["mean"], value["interval"]) if isinstance(value, dict) else (value[0], value[1])


def main(source: str, target: str) -> None:
    points: dict[str, dict[str, Any]] = defaultdict(dict)
    table = json.loads(Path(source).read_text())
    for row in table["rows"] if isinstance(table, dict) else table:
        points[row["variant"]][row["point"]] = row.get("numbers", row)
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for name, at in points.items():
        last = at.get("xk", at.get("x0", at.get("vae")))
        x, y = _pair(last["frechet"]), _pair(last["joint_coherence"])
        colour = "#8593a3" if name in BASELINES else "#2b6cb0"
        axes.errorbar(x[0], y[0], xerr=x[1], yerr=y[1], fmt="o", ms=5, color=colour, capsize=2, lw=1)
        offset = OFFSETS.get(name, (6, 4))
        axes.annotate(name, (x[0], y[0]), xytext=offset, textcoords="offset points", fontsize=9, color="#1f2933")
        if "xk" in at and "x0" in at:
            start = (_pair(at["x0"]["frechet"])[0], _pair(at["x0"]["joint_coherence"])[0])
            axes.annotate("", (x[0], y[0]), start, arrowprops={"arrowstyle": "->", "color": colour, "lw": 0.8})
    axes.set(
        xscale="log",
        ylim=(0, 1),
        xlabel="Frechet distance of the samples (classifier features)",
        ylabel="joint coherence",
    )
    axes.set_title("Every variant's samples; an arrow is the data-space Langevin revision, x0 to xk", fontsize=10)
    axes.xaxis.set_major_locator(FixedLocator([2, 5, 10, 20, 50, 100]))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
