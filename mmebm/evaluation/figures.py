"""Figures for a README and a report: sample grids, chains step by step, training curves.

Arrays in, one PNG out, written atomically, so that a figure that is being watched is never half a file. Matplotlib is
imported when a figure is drawn, without pyplot: no global state, no window, whatever backend the caller uses.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from mmebm.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["curves", "sample_grid", "trajectory_grid"]

INK: Final = "#1f2933"
FAINT: Final = "#8593a3"
PAPER: Final = "#eef1f5"
ACCENT: Final = "#2b6cb0"
BANDS: Final = ("#eef1f5", "#ffffff")
BROKEN: Final = (0.86, 0.15, 0.47)  # where a value is inf or NaN: no grey or digit has this colour
CELL: Final = 0.62  # inches
TEXT_HEIGHT: Final = 0.5  # of a cell: a word needs less room than an image
GAP: Final = 0.05  # of a cell, on each side
DPI: Final = 160


def sample_grid(
    blocks: Mapping[str, Mapping[str, np.ndarray]], path: str | os.PathLike[str], *, columns: int = 10
) -> Path:
    """Joint samples, a column per sample and a row per modality; blocks, such as stages of a model, below each other.

    Args:
        blocks: title -> modality -> natural values, as ``Modality.natural`` gives them: images ``(n, C, H, W)`` in
            [0, 1] (one channel grey, three colour, others averaged to grey), strings ``(n,)``, vectors ``(n, D)``
            (drawn as a strip of colours, one scale per row). Column ``i`` is row ``i`` of every modality. Values that
            are inf or NaN are drawn in magenta.
        path: where to write the PNG.
        columns: the samples shown, at most; the first of each block.

    Returns:
        ``path``.

    Raises:
        ValueError: if there is nothing to draw, an array has another shape, or modalities of a block differ in ``n``.
        ImportError: without matplotlib.
    """
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    if not blocks or not all(blocks.values()):
        raise ValueError(f"blocks must hold at least one block of at least one modality, got {list(blocks)}")
    for title, rows in blocks.items():
        counts = {name: _count(f"blocks[{title!r}][{name!r}]", values) for name, values in rows.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"blocks[{title!r}] must have as many samples in every modality, got {counts}")
    shown = min(columns, max(len(next(iter(rows.values()))) for rows in blocks.values()))

    margin, header, foot = _label_width([name for rows in blocks.values() for name in rows]), 0.34, 0.1
    heights = [sum(_height(values) for values in rows.values()) * CELL for rows in blocks.values()]
    width, height = margin + shown * CELL + foot, sum(heights) + header * len(blocks) + foot
    figure = _figure(width, height)
    top = height
    for (title, rows), block_height in zip(blocks.items(), heights, strict=True):
        top -= header
        left = (margin + GAP * CELL) / width
        figure.text(left, (top + 0.09) / height, title, fontsize=10, fontweight="bold", color=INK)
        axes = _cells(figure, (margin, top - block_height, shown * CELL, block_height), (width, height))
        y = 0.0
        for name, values in rows.items():
            cell = _height(values)
            axes.text(-0.12, y + cell / 2, name, ha="right", va="center", fontsize=8.5, color=FAINT)
            limit = _limit(values)
            for column in range(min(shown, len(values))):
                _draw(axes, values[column], column, y, cell, limit)
            y += cell
        top -= block_height
    return _write(figure, path)


def trajectory_grid(
    states: Mapping[str, np.ndarray], steps: Sequence[int], path: str | os.PathLike[str], *, chains: int = 4
) -> Path:
    """Chains step by step: a row per recorded step, the modalities of each chain side by side.

    Args:
        states: modality -> natural values of every step and chain: images ``(T, n, C, H, W)``, strings ``(T, n)``,
            vectors ``(T, n, D)``; otherwise as in :func:`sample_grid`.
        steps: the ``T`` step numbers, for the row labels.
        path: where to write the PNG.
        chains: how many chains, at most; the first.

    Returns:
        ``path``.

    Raises:
        ValueError: if there is nothing to draw, an array has another shape, or ``T`` or ``n`` differ.
        ImportError: without matplotlib.
    """
    if chains < 1:
        raise ValueError(f"chains must be at least 1, got {chains}")
    if not states or not len(steps):
        raise ValueError(f"states and steps must not be empty, got {list(states)} and {list(steps)}")
    counts = {}
    for name, values in states.items():
        if values.ndim < 2 or len(values) != len(steps):
            raise ValueError(f"states[{name!r}] must have shape ({len(steps)}, n, ...), one entry per step, "
                             f"got {values.shape}")  # fmt: skip
        counts[name] = _count(f"states[{name!r}]", values[0])
    if len(set(counts.values())) > 1:
        raise ValueError(f"states must have as many chains in every modality, got {counts}")
    shown = min(chains, next(iter(counts.values())))

    # A row holds images beside words, so every cell is a full one; words get the width they need.
    widths = {name: _word_width(values) if values.dtype.kind in "UO" else 1.0 for name, values in states.items()}
    limits = {name: _limit(values.reshape(-1, *values.shape[2:])) for name, values in states.items()}
    between = 0.35  # of a cell, between chains
    labels = [f"step {step}" for step in steps]
    margin, header, foot = _label_width(labels), 0.52, 0.1
    span = shown * (sum(widths.values()) + between) - between
    width, height = margin + span * CELL + foot, len(steps) * CELL + header + foot
    figure = _figure(width, height)
    axes = _cells(figure, (margin, foot, span * CELL, len(steps) * CELL), (width, height))
    for row, label in enumerate(labels):
        axes.text(-0.12, row + 0.5, label, ha="right", va="center", fontsize=8.5, color=FAINT)
    x = 0.0
    for chain in range(shown):
        middle = x + sum(widths.values()) / 2
        axes.text(middle, -0.5, f"chain {chain + 1}", ha="center", va="bottom", color=INK, fontsize=9.5,
                  fontweight="bold")  # fmt: skip
        for name, values in states.items():
            axes.text(x + widths[name] / 2, -0.1, name, ha="center", va="bottom", color=FAINT,
                      fontsize=min(7.5, 72 * CELL * widths[name] / (0.58 * max(len(name), 1))))  # fmt: skip
            for row in range(len(steps)):
                _draw(axes, values[row, chain], x, row, 1.0, limits[name], widths[name])
            x += widths[name]
        x += between
    return _write(figure, path)


def curves(
    log: Mapping[str, Sequence[float]],
    path: str | os.PathLike[str],
    *,
    x: str = "iteration",
    stages: Mapping[str, float] | None = None,
    log_scale: Collection[str] = (),
    columns: int = 3,
) -> Path:
    """Training curves as small multiples, one panel per quantity, stages as bands behind them.

    The faint line is what was logged, the strong one a running mean over a fortieth of the points with the most extreme
    1 % of the values clipped. Where that 1 % would flatten the rest, a panel leaves it out and says how many values lie
    outside.

    Args:
        log: quantity -> values, all of one length; NaN where nothing was logged. Quantities with no number are left
            out, so that a log of a run that never reached a stage still draws.
        path: where to write the PNG.
        x: the key of ``log`` with the horizontal values, in increasing order; without it they are 0, 1, 2, ...
        stages: name of a stage -> where on the horizontal axis it begins, in increasing order.
        log_scale: quantities to draw on a logarithmic axis; their values must be positive to be seen.
        columns: panels side by side.

    Returns:
        ``path``.

    Raises:
        ValueError: if there is nothing to draw, lengths differ, or ``log_scale`` names an unknown quantity.
        ImportError: without matplotlib.
    """
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    series = {name: np.asarray(values, dtype=np.float64) for name, values in log.items()}
    lengths = {name: values.shape for name, values in series.items()}
    if len(set(lengths.values())) > 1 or any(values.ndim != 1 for values in series.values()):
        raise ValueError(f"log must hold lists of one length, got shapes {lengths}")
    unknown = set(log_scale) - set(series)
    if unknown:
        raise ValueError(f"log_scale must name quantities of log, got {sorted(unknown)}")
    at = series.pop(x, None)
    series = {name: values for name, values in series.items() if np.isfinite(values).any()}
    if not series:
        raise ValueError(f"log must hold at least one quantity with a number, got {list(log)}")
    if at is None:
        at = np.arange(len(next(iter(series.values()))), dtype=np.float64)

    across = min(columns, len(series))
    down = -(-len(series) // across)
    figure = _figure(3.2 * across + 0.15, 1.95 * down + (0.5 if stages else 0.3))
    panels = figure.subplots(down, across, squeeze=False)
    for index, axes in enumerate(panels.flat):
        if index >= len(series):
            axes.set_axis_off()
            continue
        name = list(series)[index]
        _panel(axes, at, series[name], name, logarithmic=name in log_scale)
        _bands(axes, stages or {}, label=index < across)
        # The lowest panel of each column carries the axis' name.
        if index + across >= len(series):
            axes.set_xlabel(x, fontsize=8, color=FAINT)
    figure.tight_layout(pad=0.6, h_pad=1.0, w_pad=1.2)
    return _write(figure, path)


def _panel(axes: Axes, at: np.ndarray, values: np.ndarray, name: str, *, logarithmic: bool) -> None:
    # A logarithm has no place for zero and below: such points are gaps.
    seen = np.isfinite(values) & np.isfinite(at) & ((values > 0) | (not logarithmic))
    x, y = at[seen], values[seen]
    axes.set_title(name, fontsize=9, fontweight="bold", color=INK, loc="left", pad=5)
    axes.tick_params(which="both", labelsize=7, colors=FAINT, length=2, width=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set(color="#c5cdd8", linewidth=0.7)
    axes.grid(axis="y", color="#dde3ea", linewidth=0.5)
    axes.set_axisbelow(True)
    if len(at) > 1 and at[0] < at[-1]:
        axes.set_xlim(at[0], at[-1])
    if not len(y):
        axes.text(0.5, 0.5, "no value above 0", transform=axes.transAxes, ha="center", fontsize=7, color=FAINT)
        return
    if logarithmic:
        axes.set_yscale("log")
    low, high = np.percentile(y, (0.5, 99.5))
    pad = 0.06 * (high - low)
    if not logarithmic and high > low and np.ptp(y) > 4 * (high - low):
        axes.set_ylim(low - pad, high + pad)
        outside = int(((y < low - pad) | (y > high + pad)).sum())
        axes.text(0.99, 0.97, f"{outside} of {len(y)} values outside", transform=axes.transAxes, ha="right", va="top",
                  fontsize=6.5, color=FAINT)  # fmt: skip
    window = max(len(y) // 40, 1)
    if window > 2:
        axes.plot(x, y, color=ACCENT, linewidth=0.6, alpha=0.3)
        # Clipped, or one spike would lift the mean of its whole window out of sight.
        axes.plot(x, _running_mean(np.clip(y, low - pad, high + pad), window), color=ACCENT, linewidth=1.4)
    else:
        axes.plot(x, y, color=ACCENT, linewidth=1.3, marker="o" if len(y) < 30 else "", markersize=2.5)


def _bands(axes: Axes, stages: Mapping[str, float], *, label: bool) -> None:
    left, right = axes.get_xlim()
    starts = [*stages.values(), max([right, *stages.values()])]
    for index, name in enumerate(stages):
        begin, end = max(starts[index], left), min(starts[index + 1], right)
        if begin >= end:
            continue
        axes.axvspan(begin, end, color=BANDS[index % 2], linewidth=0, zorder=-2)
        if starts[index] > left:
            axes.axvline(begin, color="#9aa7b6", linewidth=0.8, linestyle=(0, (3, 2)), zorder=-1)
        if label:
            axes.annotate(name, ((begin + end) / 2, 1), xycoords=axes.get_xaxis_transform(), xytext=(0, 16),
                          textcoords="offset points", ha="center", va="bottom", fontsize=7.5, color=FAINT)  # fmt: skip
    axes.set_xlim(left, right)


def _running_mean(y: np.ndarray, window: int) -> np.ndarray:
    """Centred; near the ends over what is there, so that it neither lags nor bends towards zero."""
    total = np.concatenate([[0.0], np.cumsum(y)])
    index = np.arange(len(y))
    begin, end = np.maximum(index - window // 2, 0), np.minimum(index + window // 2 + 1, len(y))
    return (total[end] - total[begin]) / (end - begin)


def _draw(
    axes: Axes, value: Any, x: float, y: float, height: float, limit: tuple[float, float], width: float = 1.0
) -> None:
    """One sample of one modality into the cell whose upper left corner is ``(x, y)``."""
    if isinstance(value, str):
        from matplotlib.patches import FancyBboxPatch

        tall = min(height, TEXT_HEIGHT) - 2 * GAP
        box = (x + GAP, y + (height - tall) / 2)
        axes.add_patch(FancyBboxPatch(box, width - 2 * GAP, tall, boxstyle="round,pad=0,rounding_size=.08",
                                      facecolor=PAPER, edgecolor="none"))  # fmt: skip
        words, size = _fit_words(value, width - 4 * GAP, tall)
        # One line stands on one baseline with its neighbours, whether or not it has a descender.
        axes.text(x + width / 2, y + height / 2, words, ha="center", color=INK, fontsize=size, linespacing=1.05,
                  va="center" if "\n" in words else "center_baseline")  # fmt: skip
        return
    picture = _picture(np.asarray(value, dtype=np.float64), limit)
    if value.ndim == 1:
        tall = min(height, TEXT_HEIGHT) - 2 * GAP
        extent = (x + GAP, x + width - GAP, y + (height + tall) / 2, y + (height - tall) / 2)
    else:
        # The longer side fills the cell: an image keeps its proportions.
        high, wide = picture.shape[:2]
        scale = min((width - 2 * GAP) / wide, (height - 2 * GAP) / high)
        half_w, half_h = wide * scale / 2, high * scale / 2
        cx, cy = x + width / 2, y + height / 2
        extent = (cx - half_w, cx + half_w, cy + half_h, cy - half_h)
    axes.imshow(picture, extent=extent, interpolation="nearest", aspect="auto")


def _fit_words(words: str, width: float, height: float) -> tuple[str, float]:
    """``words`` broken into lines, and the largest size in points at which they fit into ``width x height`` cells.

    At most 9 points, at least 4.5: what does not fit at that size ends in "...".
    """
    width, height = 72 * CELL * width, 72 * CELL * height
    for size in (9.0, 8.0, 7.0, 6.0, 5.25, 4.5):
        # A letter is about .6 of its size wide, a line 1.2 high.
        letters, lines = max(int(width / (0.6 * size)), 3), max(int(height / (1.2 * size)), 1)
        wrapped = textwrap.wrap(words, letters, break_long_words=False)
        if len(wrapped) <= lines and all(len(line) <= letters for line in wrapped):
            return "\n".join(wrapped), size
    return "\n".join(textwrap.wrap(words, letters, max_lines=lines, placeholder="...")), size


def _picture(value: np.ndarray, limit: tuple[float, float]) -> np.ndarray:
    """``(H, W, 3)`` in [0, 1] from an image ``(C, H, W)`` or a vector ``(D,)``; BROKEN where inf or NaN."""
    if value.ndim == 1:
        from matplotlib import colormaps

        low, high = limit
        picture = np.asarray(colormaps["cividis"]((np.nan_to_num(value) - low) / (high - low)))[None, :, :3].copy()
        finite = np.isfinite(value)[None]
    else:
        finite = np.isfinite(value).all(axis=0)
        value = value if len(value) == 3 else np.repeat(value.mean(axis=0, keepdims=True), 3, axis=0)
        picture = np.clip(np.moveaxis(value, 0, -1), 0, 1)
    picture[~finite] = BROKEN
    return picture


def _limit(values: np.ndarray) -> tuple[float, float]:
    """The colour scale of a row of vectors; images and words have none."""
    if values.dtype.kind in "UO" or values.ndim != 2 or not np.isfinite(values).any():
        return (0.0, 1.0)
    finite = values[np.isfinite(values)]
    low, high = float(finite.min()), float(finite.max())
    return (low, high) if high > low else (low, low + 1.0)


def _count(name: str, values: np.ndarray) -> int:
    """``n`` of one modality's natural values; ValueError if they are no images, strings or vectors."""
    text = values.dtype.kind in "UO"
    if values.ndim != 1 if text else values.ndim not in (2, 4):
        raise ValueError(f"{name} must be images (n, C, H, W), strings (n,) or vectors (n, D), "
                         f"got {values.dtype} {values.shape}")  # fmt: skip
    if not values.size:
        raise ValueError(f"{name} must hold at least one sample, got shape {values.shape}")
    return len(values)


def _height(values: np.ndarray) -> float:
    return 1.0 if values.ndim == 4 else TEXT_HEIGHT


def _word_width(values: np.ndarray) -> float:
    longest = max(len(str(word)) for word in values.flat)
    return max(1.0, 4 * GAP + longest * 0.6 * 7.5 / (72 * CELL))  # room for 7.5 points


def _label_width(labels: Collection[str]) -> float:
    """Inches for row labels of 8.5 points."""
    return 0.25 + max(len(label) for label in labels) * 0.6 * 8.5 / 72


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing figures needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _cells(figure: Figure, box: tuple[float, float, float, float], size: tuple[float, float]) -> Axes:
    """Axes over ``box`` (left, bottom, width, height in inches) in units of a cell, ``y`` downwards, nothing drawn."""
    left, bottom, width, height = box
    axes = figure.add_axes((left / size[0], bottom / size[1], width / size[0], height / size[1]))
    axes.set_axis_off()
    limits = (0, width / CELL, height / CELL, 0)
    axes.axis(limits)
    # imshow would fit the view to each image it draws.
    axes.set_autoscale_on(False)
    return axes


def _write(figure: Figure, path: str | os.PathLike[str]) -> Path:
    # no software version in it, so that equal figures are equal files
    write_atomically(Path(path), lambda file: figure.savefig(file, format="png", metadata={"Software": None}))
    return Path(path)
