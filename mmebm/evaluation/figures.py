"""Figures for a README and a report: samples, chains step by step, completions, curves.

Arrays in, one PNG out, written atomically, so that a figure that is being watched is never half a file. Matplotlib is
imported when a figure is drawn, without pyplot: no global state, no window, whatever backend the caller uses.
"""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from mmebm.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "conditional_grid", "curves", "interpolation_grid", "lines", "revision_grid", "sample_grid", "sweep", "traces",
    "trajectory_grid",
]  # fmt: skip

INK: Final = "#1f2933"
FAINT: Final = "#8593a3"
PAPER: Final = "#eef1f5"
ACCENT: Final = "#2b6cb0"
# Okabe and Ito's, without yellow: told apart by the colour-blind, and in print.
COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b6573")
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
    if not blocks or not all(blocks.values()):
        raise ValueError(f"blocks must hold at least one block of at least one modality, got {list(blocks)}")
    return _grid("blocks", {title: [_Group(rows)] for title, rows in blocks.items()}, path, columns)


def conditional_grid(
    blocks: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]], path: str | os.PathLike[str], *, columns: int = 4
) -> Path:
    """Completions side by side: what is given, and what each way to complete it makes of that.

    Args:
        blocks: title, such as "given word" -> group, such as "given", "A: decode" -> modality -> natural values, as in
            :func:`sample_grid`. Column ``i`` of every group belongs to the same tuple. A modality that a group leaves
            out is left blank there.
        path: where to write the PNG.
        columns: the tuples shown, at most; the first.

    Returns:
        ``path``.

    Raises:
        ValueError: as :func:`sample_grid`.
        ImportError: without matplotlib.
    """
    if not blocks or not all(groups and all(groups.values()) for groups in blocks.values()):
        raise ValueError(f"blocks must hold at least one block of groups with modalities, got {list(blocks)}")
    parts = {title: [_Group(rows, name) for name, rows in groups.items()] for title, groups in blocks.items()}
    return _grid("blocks", parts, path, columns)


def revision_grid(
    chains: Mapping[str, Mapping[str, np.ndarray]],
    steps: Sequence[int],
    path: str | os.PathLike[str],
    *,
    observed: Mapping[str, Mapping[str, np.ndarray]] | None = None,
) -> Path:
    """Single chains from left to right: a column per recorded step, a row per modality, the chains below each other.

    Args:
        chains: title of a chain -> modality -> natural values at every step: images ``(T, C, H, W)``, strings ``(T,)``,
            vectors ``(T, D)``; otherwise as in :func:`sample_grid`.
        steps: the ``T`` step numbers, for the column labels.
        path: where to write the PNG.
        observed: title of a chain -> modality -> the one value ``(1, ...)`` that the chain is given, such as the input
            of a posterior's chain: drawn as the last column.

    Returns:
        ``path``.

    Raises:
        ValueError: if there is nothing to draw, an array has another shape or ``T``, or ``observed`` names no chain.
        ImportError: without matplotlib.
    """
    return _strips("chains", chains, [str(step) for step in steps], path, "step", observed or {})


def interpolation_grid(
    rows: Mapping[str, Mapping[str, np.ndarray]],
    path: str | os.PathLike[str],
    *,
    fractions: Sequence[float] | None = None,
) -> Path:
    """Paths through the latent, from left to right: a column per point, a row per modality.

    Args:
        rows: title of a path -> modality -> natural values at every point ``(T, ...)``, as in :func:`revision_grid`.
        path: where to write the PNG.
        fractions: where the ``T`` points lie between the ends; evenly spaced from 0 to 1 unless given.

    Returns:
        ``path``.

    Raises:
        ValueError: as :func:`revision_grid`.
        ImportError: without matplotlib.
    """
    if fractions is None:
        points = max((len(values) for parts in rows.values() for values in parts.values()), default=0)
        fractions = [i / max(points - 1, 1) for i in range(points)]
    return _strips("rows", rows, [f"{fraction:.2g}" for fraction in fractions], path, "", {})


def _strips(
    argument: str, strips: Mapping[str, Mapping[str, np.ndarray]], labels: Sequence[str], path: str | os.PathLike[str],
    corner: str, observed: Mapping[str, Mapping[str, np.ndarray]],
) -> Path:  # fmt: skip
    if not strips or not all(strips.values()) or not labels:
        raise ValueError(f"{argument} must hold at least one strip with a modality and a column, got {list(strips)}")
    unknown = sorted(set(observed) - set(strips))
    if unknown:
        raise ValueError(f"observed must name {argument} {list(strips)}, got {unknown}")
    for title, rows in strips.items():
        for name, values in rows.items():
            if values.ndim < 1 or len(values) != len(labels):
                raise ValueError(f"{argument}[{title!r}][{name!r}] must have {len(labels)} columns, one per label, "
                                 f"got {values.shape}")  # fmt: skip
    blocks = {}
    for title, rows in strips.items():
        blocks[title] = [_Group(rows, labels=labels)]
        if title in observed:
            blocks[title].append(_Group({k: v[:1] for k, v in observed[title].items()}, labels=("input",)))
    return _grid(argument, blocks, path, len(labels), corner)


@dataclass(frozen=True)
class _Group:
    """Columns that stand together: modality -> natural values, a title above them, or a label above each."""

    rows: Mapping[str, np.ndarray]
    title: str = ""
    labels: Sequence[str] = ()


def _grid(
    argument: str, blocks: Mapping[str, Sequence[_Group]], path: str | os.PathLike[str], columns: int, corner: str = ""
) -> Path:
    """Blocks below each other, in each the groups side by side; a row per modality, ``corner`` beside the labels."""
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    shapes: dict[str, dict[str, tuple[float, tuple[float, float]]]] = {}
    spans: dict[str, list[int]] = {}
    for title, groups in blocks.items():
        spans[title] = []
        for group in groups:
            where = f"{argument}[{title!r}]" + (f"[{group.title!r}]" if group.title else "")
            counts = {name: _count(f"{where}[{name!r}]", values) for name, values in group.rows.items()}
            if len(set(counts.values())) > 1:
                raise ValueError(f"{where} must have as many samples in every modality, got {counts}")
            spans[title].append(min(columns, *counts.values()))
        names = dict.fromkeys(name for group in groups for name in group.rows)
        shapes[title] = {}
        for name in names:
            parts = [group.rows[name] for group in groups if name in group.rows]
            limits = [_limit(values) for values in parts]
            shapes[title][name] = _height(parts[0]), (min(low for low, _ in limits), max(high for _, high in limits))

    between, foot = 0.35, 0.1  # of a cell, between groups; inches
    margin = _label_width([corner, *(name for rows in shapes.values() for name in rows)])
    # A title of a group wider than its columns takes the room it needs.
    widths = {
        title: [max(span, (len(group.title) * 0.62 * 8.5 / 72) / CELL) for span, group in zip(spans[title], groups)]
        for title, groups in blocks.items()
    }
    across = max(sum(w) + between * (len(w) - 1) for w in widths.values())
    heights = {title: sum(height for height, _ in rows.values()) * CELL for title, rows in shapes.items()}
    headed = {title: any(group.title or group.labels for group in groups) for title, groups in blocks.items()}
    header, second = 0.34, 0.2  # inches, of a block's title and of the line of labels below it
    width = margin + across * CELL + foot
    height = sum(heights.values()) + sum(header + second * headed[title] for title in blocks) + foot
    figure = _figure(width, height)
    top = height
    for title, groups in blocks.items():
        top -= header
        left = (margin + GAP * CELL) / width
        figure.text(left, (top + 0.09) / height, title, fontsize=10, fontweight="bold", color=INK)
        top -= second * headed[title]
        axes = _cells(figure, (margin, top - heights[title], across * CELL, heights[title]), (width, height))
        if corner and headed[title]:
            axes.text(-0.12, -0.08, corner, ha="right", va="bottom", fontsize=7.5, color=FAINT)
        y = 0.0
        for name, (cell, limit) in shapes[title].items():
            axes.text(-0.12, y + cell / 2, name, ha="right", va="center", fontsize=8.5, color=FAINT)
            x = 0.0
            for group, span, wide in zip(groups, spans[title], widths[title]):
                values = group.rows.get(name, ())
                for column in range(min(span, len(values))):
                    _draw(axes, values[column], x + column, y, cell, limit)
                x += wide + between
            y += cell
        x = 0.0
        for group, span, wide in zip(groups, spans[title], widths[title]):
            if group.title:
                axes.text(x + GAP, -0.08, group.title, ha="left", va="bottom", fontsize=8.5, color=INK)
            for column, label in enumerate(group.labels[:span]):
                axes.text(x + column + 0.5, -0.08, label, ha="center", va="bottom", fontsize=7.5, color=FAINT)
            x += wide + between
        top -= heights[title]
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
    figure = _figure(3.2 * across + 0.15, 1.95 * down + 0.3)
    panels = figure.subplots(down, across, squeeze=False)
    for index, axes in enumerate(panels.flat):
        if index >= len(series):
            axes.set_axis_off()
            continue
        name = list(series)[index]
        _panel(axes, at, series[name], name, logarithmic=name in log_scale, stages=stages or {})
        _bands(axes, stages or {})
        # The lowest panel of each column carries the axis' name.
        if index + across >= len(series):
            axes.set_xlabel(x, fontsize=8, color=FAINT)
    figure.tight_layout(pad=0.6, h_pad=1.0, w_pad=1.2)
    return _write(figure, path)


def _panel(
    axes: Axes, at: np.ndarray, values: np.ndarray, name: str, *, logarithmic: bool, stages: Mapping[str, float]
) -> None:
    # A logarithm has no place for zero and below: such points are gaps.
    seen = np.isfinite(values) & np.isfinite(at) & ((values > 0) | (not logarithmic))
    x, y = at[seen], values[seen]
    _style(axes, name)
    axes.locator_params(axis="x", nbins=5)
    if len(at) > 1 and at[0] < at[-1]:
        # Only the stages in which there is something to see: a short last one would be a spike at the edge.
        begins = [begin for begin in stages.values() if at[0] < begin < at[-1]]
        if len(x) and begins:
            # what is logged at the end of a stage belongs to it, though the next begins there
            left = max([at[0], *(begin for begin in begins if begin < x[0])])
            right = min([at[-1], *(begin for begin in begins if begin >= x[-1])])
            axes.set_xlim(left, right if right > left else at[-1])
        else:
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


def _bands(axes: Axes, stages: Mapping[str, float]) -> None:
    left, right = axes.get_xlim()
    starts = [*stages.values(), max([right, *stages.values()])]
    for index, name in enumerate(stages):
        begin, end = max(starts[index], left), min(starts[index + 1], right)
        if begin >= end:
            continue
        axes.axvspan(begin, end, color=BANDS[index % 2], linewidth=0, zorder=-2)
        if starts[index] > left:
            axes.axvline(begin, color="#9aa7b6", linewidth=0.8, linestyle=(0, (3, 2)), zorder=-1)
        # A name of 6.5 points takes about .055 inches a letter of some 2.8 inches.
        name = name if (end - begin) / (right - left) * 2.8 > 0.055 * len(name) else ""
        axes.annotate(name, ((begin + end) / 2, 0.985), xycoords=axes.get_xaxis_transform(), ha="center", va="top",
                      fontsize=6.5, color=FAINT)  # fmt: skip
    axes.set_xlim(left, right)


def lines(
    panels: Mapping[str, Mapping[str, Sequence[float | None]]],
    path: str | os.PathLike[str],
    *,
    x: Sequence[float],
    label: str = "step",
    errors: Mapping[str, Mapping[str, Sequence[float | None]]] | None = None,
    marks: Mapping[str, float] | None = None,
    logarithmic: bool = False,
    columns: int = 3,
) -> Path:
    """Quantities against the step (or another ``x``), one panel each, a coloured line per series.

    Args:
        panels: quantity -> series -> values, as many as ``x``; None and NaN are gaps.
        path: where to write the PNG.
        x: the horizontal values, increasing.
        label: what they are.
        errors: as ``panels``, some of it: standard errors, drawn as bands of two of them.
        marks: name -> position of a vertical line, such as the steps of training.
        logarithmic: ``x`` on a logarithmic axis, linear below 10.
        columns: panels side by side.

    Returns:
        ``path``.

    Raises:
        ValueError: if there is nothing to draw or lengths differ.
        ImportError: without matplotlib.
    """
    at = np.asarray(x, dtype=np.float64)
    parts = []
    for title, series in panels.items():
        part = []
        for name, values in series.items():
            error = ((errors or {}).get(title) or {}).get(name)
            for what, given in (("panels", values), ("errors", error)):
                if given is not None and len(given) != len(at):
                    raise ValueError(f"{what}[{title!r}][{name!r}] must have {len(at)} values, one for each x, "
                                     f"got {len(given)}")  # fmt: skip
            part.append(_Line(name, at, _floats(values), None if error is None else _floats(error)))
        parts.append(_Panel(title, label, part, logarithmic))
    return _multiples("panels", parts, path, columns, marks or {})


def traces(
    chains: Mapping[str, Sequence[Sequence[float | None]]],
    steps: Sequence[float],
    path: str | os.PathLike[str],
    *,
    marks: Mapping[str, float] | None = None,
    logarithmic: bool = False,
) -> Path:
    """One quantity along single chains: a panel per initialiser, a line per chain, all on one scale.

    Args:
        chains: initialiser -> values of each chain, as many as ``steps``.
        steps: the horizontal values, increasing.
        path: where to write the PNG.
        marks, logarithmic: as in :func:`lines`.

    Returns:
        ``path``.

    Raises:
        ValueError: if there is nothing to draw or lengths differ.
        ImportError: without matplotlib.
    """
    at = np.asarray(steps, dtype=np.float64)
    parts = []
    for index, (title, several) in enumerate(chains.items()):
        if any(len(values) != len(at) for values in several):
            raise ValueError(f"chains[{title!r}] must have {len(at)} values a chain, one per step, got "
                             f"{[len(values) for values in several]}")  # fmt: skip
        colour = COLOURS[index % len(COLOURS)]
        parts.append(_Panel(title, "step", [_Line("", at, _floats(v), colour=colour) for v in several], logarithmic))
    return _multiples("chains", parts, path, 2 if len(parts) == 4 else 3, marks or {}, share=True)


def sweep(
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    path: str | os.PathLike[str],
    *,
    quantities: Sequence[str] | None = None,
) -> Path:
    """What more steps buy and cost: every quantity against the steps and, where measured, against the seconds.

    Args:
        rows: series -> rows, each with "steps", perhaps "seconds", and numbers by name; others are left out.
        path: where to write the PNG.
        quantities: what to draw; unless given, every number that all rows hold.

    Returns:
        ``path``.

    Raises:
        ValueError: if there is nothing to draw, a row lacks "steps", or no row has one of ``quantities``.
        ImportError: without matplotlib.
    """
    every = [row for series in rows.values() for row in series]
    if not every or any("steps" not in row for row in every):
        raise ValueError(f"rows must hold at least one row, each with 'steps', got {[list(row) for row in every][:3]}")

    def number(row: Mapping[str, Any], name: str) -> bool:
        return isinstance(row.get(name), (int, float)) and not isinstance(row.get(name), bool)

    if quantities is None:
        quantities = [name for name in every[0] if all(number(row, name) for row in every)]
        quantities = [name for name in quantities if name not in ("steps", "seconds")]
    missing = [name for name in quantities if not any(number(row, name) for row in every)]
    if missing or not quantities:
        raise ValueError(f"rows must hold numbers to draw, got none of {missing or 'any name'}")
    sides = ["steps", *(["seconds"] if all(number(row, "seconds") for row in every) else [])]
    parts = []
    for name in quantities:
        for side in sides:
            part = []
            for label, series in rows.items():
                ordered = sorted((row for row in series if number(row, name)), key=lambda row: row[side])
                at = _floats([row[side] for row in ordered])
                part.append(_Line(label, at, _floats([row[name] for row in ordered]), dots=True))
            parts.append(_Panel(f"{name} by {side}", side, part, side == "steps"))
    return _multiples("rows", parts, path, 2 if len(sides) > 1 else 3, {})


@dataclass(frozen=True)
class _Line:
    label: str
    x: np.ndarray
    y: np.ndarray
    error: np.ndarray | None = None
    colour: str | None = None
    dots: bool = False


@dataclass(frozen=True)
class _Panel:
    title: str
    label: str
    series: Sequence[_Line]
    logarithmic: bool


def _multiples(
    argument: str, parts: Sequence[_Panel], path: str | os.PathLike[str], columns: int, marks: Mapping[str, float],
    share: bool = False,
) -> Path:  # fmt: skip
    """Small multiples with one legend above them."""
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    if not any(np.isfinite(line.y).any() for part in parts for line in part.series):
        raise ValueError(f"{argument} must hold at least one number, got {[part.title for part in parts]}")
    labels = dict.fromkeys(line.label for part in parts for line in part.series if line.label)
    colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}
    across = min(columns, len(parts))
    down = -(-len(parts) // across)
    legend = 0.3 if len(labels) > 1 else 0.0
    width, height = 3.2 * across + 0.15, 1.95 * down + 0.25 + legend
    figure = _figure(width, height)
    panels = figure.subplots(down, across, squeeze=False, sharey=share)
    for index, axes in enumerate(panels.flat):
        if index >= len(parts):
            axes.set_axis_off()
            continue
        part = parts[index]
        _style(axes, part.title)
        for line in part.series:
            colour = line.colour or colours.get(line.label, ACCENT)
            weight, alpha = (1.2, 1.0) if line.label else (0.8, 0.75)
            axes.plot(line.x, line.y, color=colour, linewidth=weight, alpha=alpha, marker="o" if line.dots else "",
                      markersize=3)  # fmt: skip
            if line.error is not None:
                low, high = line.y - 2 * line.error, line.y + 2 * line.error
                axes.fill_between(line.x, low, high, color=colour, alpha=0.15, linewidth=0)
        if part.logarithmic:
            axes.set_xscale("symlog", linthresh=10, linscale=0.6)
            axes.xaxis.set_major_locator(_ticks(max((line.x.max() for line in part.series if len(line.x)), default=10)))
            axes.xaxis.set_major_formatter(lambda value, position: f"{value:.0f}")
            axes.minorticks_off()
        if len(every := np.concatenate([line.x for line in part.series])):
            axes.margins(x=0.02)
            axes.set_xlim(left=min(every.min(), 0.0) if every.min() >= 0 else None)
        for name, position in marks.items():
            axes.axvline(position, color="#9aa7b6", linewidth=0.8, linestyle=(0, (3, 2)), zorder=0)
            axes.annotate(f" {name}", (position, 0.99), xycoords=axes.get_xaxis_transform(), va="top", fontsize=6.5,
                          color=FAINT)  # fmt: skip
        if index + across >= len(parts) or part.label != parts[index + across].label:
            axes.set_xlabel(part.label, fontsize=8, color=FAINT)
    if legend:
        from matplotlib.lines import Line2D

        handles = [Line2D([], [], color=colours[label], linewidth=1.6, label=label) for label in labels]
        figure.legend(handles=handles, loc="upper left", ncols=len(handles), frameon=False, fontsize=8, labelcolor=INK,
                      bbox_to_anchor=(0.0, 1.0), handlelength=1.4, columnspacing=1.4)  # fmt: skip
    figure.tight_layout(pad=0.6, h_pad=1.0, w_pad=1.2, rect=(0, 0, 1, 1 - legend / height))
    return _write(figure, path)


def _ticks(last: float) -> Any:
    from matplotlib.ticker import FixedLocator

    return FixedLocator([0, 10, *(10.0**k for k in range(2, max(int(math.log10(max(last, 10))) + 1, 2)))])


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=9, fontweight="bold", color=INK, loc="left", pad=5)
    axes.tick_params(which="both", labelsize=7, colors=FAINT, length=2, width=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set(color="#c5cdd8", linewidth=0.7)
    axes.grid(axis="y", color="#dde3ea", linewidth=0.5)
    axes.set_axisbelow(True)


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
