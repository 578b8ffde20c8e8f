"""What all figures share: colours, the canvas, and how a PNG is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mmebm.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK: Final = "#1f2933"
FAINT: Final = "#8593a3"
DPI: Final = 160


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of ``width x height`` inches."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing figures needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def write(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Writes ``figure`` as a PNG, atomically; returns ``path``."""
    # no software version in it, so that equal figures are equal files
    write_atomically(Path(path), lambda file: figure.savefig(file, format="png", metadata={"Software": None}))
    return Path(path)
