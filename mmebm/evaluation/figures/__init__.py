"""Figures for a README and a report: samples, chains step by step, completions, curves.

Arrays in, one PNG out, written atomically, so that a figure that is being watched is never half a file. Matplotlib is
imported when a figure is drawn, without pyplot: no global state, no window, whatever backend the caller uses.
"""

from mmebm.evaluation.figures.chains import landscape, trace
from mmebm.evaluation.figures.grids import (
    conditional_grid,
    interpolation_grid,
    revision_grid,
    sample_grid,
    trajectory_grid,
)
from mmebm.evaluation.figures.plots import curves, lines, overlay, scatter, sweep, traces

__all__ = [
    "conditional_grid",
    "curves",
    "interpolation_grid",
    "landscape",
    "lines",
    "overlay",
    "revision_grid",
    "sample_grid",
    "scatter",
    "sweep",
    "trace",
    "traces",
    "trajectory_grid",
]
