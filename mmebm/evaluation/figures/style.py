"""What all figures share: colours, the canvas, and how a PNG is written."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mmebm.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK: Final = "#1f2933"
FAINT: Final = "#8593a3"
DPI: Final = 160
# Fonts with more scripts than matplotlib's own, which come into play where they are installed
WIDE: Final = (
    "Noto Sans",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "PingFang SC",
    "Hiragino Sans",
    "Microsoft YaHei",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "Arial Unicode MS",
)

logger: logging.Logger = logging.getLogger(__name__)
_said: list[bool] = []  # once a process: every picture would say the same


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
    from matplotlib import font_manager, rc_context, rcParams

    families = rcParams["font.sans-serif"] + [name for name in WIDE if name in font_manager.get_font_names()]
    # no software version in it, so that equal figures are equal files
    with rc_context({"font.sans-serif": families}), warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        write_atomically(Path(path), lambda file: figure.savefig(file, format="png", metadata={"Software": None}))
    lacking = []
    for each in found:
        character, missing, _ = str(each.message).partition(" missing from font")
        if missing:
            lacking.append(character)
        else:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    if lacking and not _said:
        _said.append(True)
        logger.warning(
            "no font here draws %s: boxes stand for it in pictures; install one that does (Noto Sans CJK, say)",
            ", ".join(dict.fromkeys(lacking)),
        )
    return Path(path)
