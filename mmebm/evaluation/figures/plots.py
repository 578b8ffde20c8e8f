"""Curves: training, quantities against the step, traces of chains, sweeps of test-time steps."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from mmebm.evaluation.figures.style import FAINT, INK, new_figure, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ACCENT: Final = "#2b6cb0"
# Okabe and Ito's, without yellow: told apart by the colour-blind, and in print.
COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b6573")
BANDS: Final = ("#eef1f5", "#ffffff")


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
    outside. No line crosses the begin of a stage, a stretch in which nothing was logged, or a step back.

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
    figure = new_figure(3.2 * across + 0.15, 1.95 * down + 0.3)
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
    return write(figure, path)


def _panel(
    axes: Axes, at: np.ndarray, values: np.ndarray, name: str, *, logarithmic: bool, stages: Mapping[str, float]
) -> None:
    # A logarithm has no place for zero and below: such points are gaps.
    seen = np.isfinite(values) & np.isfinite(at) & ((values > 0) | (not logarithmic))
    x, y = at[seen], values[seen]
    style_axes(axes, name)
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
        axes.text(
            0.99,
            0.97,
            f"{outside} of {len(y)} values outside",
            transform=axes.transAxes,
            ha="right",
            va="top",
            fontsize=6.5,
            color=FAINT,
        )
    window = max(len(y) // 40, 1)
    for part in _pieces(x, list(stages.values())):
        if window > 2:
            axes.plot(x[part], y[part], color=ACCENT, linewidth=0.6, alpha=0.3)
            # Clipped, or one spike would lift the mean of its whole window out of sight.
            mean = _running_mean(np.clip(y[part], low - pad, high + pad), window)
            axes.plot(x[part], mean, color=ACCENT, linewidth=1.4, marker="o" if len(mean) == 1 else "", markersize=2)
        else:
            dots = "o" if len(y) < 30 or len(y[part]) == 1 else ""
            axes.plot(x[part], y[part], color=ACCENT, linewidth=1.3, marker=dots, markersize=2.5)


def _pieces(x: np.ndarray, begins: Sequence[float] = ()) -> list[slice]:
    """Where a line through points at ``x`` is whole: within a stage, with no gap of more than three times the usual
    distance and no step back."""
    if not len(x):
        return []
    steps = np.diff(x)
    forward = steps[steps > 0]
    usual = np.median(forward) if len(forward) else math.inf
    # what is logged where the next stage begins belongs to the one that ends there
    stage = np.searchsorted(np.asarray(begins, dtype=np.float64), x, side="left")
    cuts = [int(i) + 1 for i in np.flatnonzero((np.diff(stage) != 0) | (steps > 3 * usual) | (steps <= 0))]
    return [slice(a, b) for a, b in zip([0, *cuts], [*cuts, len(x)])]


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
        axes.annotate(
            name,
            ((begin + end) / 2, 0.985),
            xycoords=axes.get_xaxis_transform(),
            ha="center",
            va="top",
            fontsize=6.5,
            color=FAINT,
        )
    axes.set_xlim(left, right)


def overlay(
    logs: Mapping[str, Mapping[str, Sequence[float]]],
    path: str | os.PathLike[str],
    *,
    x: str = "iteration",
    quantities: Sequence[str] | None = None,
    columns: int = 3,
) -> Path:
    """Training curves of several runs, a panel per quantity, a coloured line per run: running means over a fortieth of
    a run's points. No line crosses a stretch in which nothing was logged.

    Args:
        logs: run -> quantity -> values, all of a run of one length; NaN where nothing was logged.
        path: where to write the PNG.
        x: the key with the horizontal values, which every run has.
        quantities: what to draw; unless given, all that at least two runs have, or that any has where none is shared.
        columns: panels side by side.

    Returns:
        ``path``.

    Raises:
        ValueError: if there is nothing to draw, lengths of a run differ, or a run lacks ``x``.
        ImportError: without matplotlib.
    """
    found: dict[str, list[_Line]] = {}
    for run, log in logs.items():
        if x not in log:
            raise ValueError(f"logs[{run!r}] must have {x!r}, got {list(log)}")
        at = _floats(log[x])
        for name, values in log.items():
            y = _floats(values)
            if y.shape != at.shape:
                raise ValueError(f"logs[{run!r}][{name!r}] must have {len(at)} values, as {x!r} has, got {len(y)}")
            seen = np.isfinite(y)
            if name == x or not seen.any():
                continue
            xs, ys = [], []
            for part in _pieces(at[seen]):
                xs += [at[seen][part], [math.nan]]
                ys += [_running_mean(y[seen][part], max(int(seen.sum()) // 40, 1)), [math.nan]]
            found.setdefault(name, []).append(_Line(run, np.concatenate(xs), np.concatenate(ys)))
    shared = [name for name, several in found.items() if len(several) > 1] or list(found)
    wanted = shared if quantities is None else [name for name in quantities if name in found]
    if not wanted:
        raise ValueError(f"logs must hold a quantity to draw, got {list(found)} and quantities={quantities}")
    return _multiples("logs", [_Panel(name, x, found[name], False) for name in wanted], path, columns, {})


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
    counts: bool = False,
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
        counts: ``x`` are a few whole numbers: each has a dot and a tick, and nothing is between them.

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
                    raise ValueError(
                        f"{what}[{title!r}][{name!r}] must have {len(at)} values, one for each x, got {len(given)}"
                    )
            part.append(_Line(name, at, _floats(values), None if error is None else _floats(error), dots=counts))
        parts.append(_Panel(title, label, part, logarithmic, tuple(at.tolist()) if counts else ()))
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
            raise ValueError(
                f"chains[{title!r}] must have {len(at)} values a chain, one per step, got "
                f"{[len(values) for values in several]}"
            )
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


def scatter(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float, str]]]],
    path: str | os.PathLike[str],
    *,
    x: str,
    y: str,
) -> Path:
    """Models as points on a plane, those of one model joined in their order.

    Args:
        panels: title -> model -> its points (x, y, what stands beside it).
        path: where to write the PNG.
        x, y: what the axes are.

    Returns:
        ``path``.

    Raises:
        ValueError: if there is nothing to draw.
        ImportError: without matplotlib.
    """
    panels = {title: {name: of for name, of in models.items() if of} for title, models in panels.items()}
    panels = {title: models for title, models in panels.items() if models}
    if not panels:
        raise ValueError("panels must hold at least one point, got none")
    names = list(dict.fromkeys(name for models in panels.values() for name in models))
    legend = 0.7 + 0.075 * max(map(len, names))  # inches
    width = 4.0 * len(panels) + legend
    figure, handles = new_figure(width, 3.4), {}
    drawn = figure.subplots(1, len(panels), squeeze=False)[0]
    from matplotlib.patheffects import withStroke

    for axes, (title, models) in zip(drawn, panels.items(), strict=True):
        style_axes(axes, title)
        for name, points in models.items():
            k = names.index(name)
            across, up, notes = zip(*points, strict=True)
            style = {"color": COLOURS[k % len(COLOURS)], "marker": "osD^vP*"[k // len(COLOURS) % 7]}
            handles[name] = axes.plot(across, up, markersize=5, linewidth=0.8, **style)[0]
            for at, note in zip(zip(across, up, strict=True), notes, strict=True):
                text = axes.annotate(note, at, xytext=(0, 5), textcoords="offset points", ha="center", zorder=5)
                text.set(fontsize=6.5, color=INK, path_effects=[withStroke(linewidth=2, foreground="white")])
        axes.margins(0.12)
        axes.set_xlabel(x, fontsize=8, color=FAINT)
        axes.set_ylabel(y, fontsize=8, color=FAINT)
    figure.tight_layout(pad=0.6, w_pad=1.4, rect=(0, 0, 1 - legend / width, 1))
    figure.legend(
        [handles[name] for name in names],
        names,
        loc="center left",
        bbox_to_anchor=(1 - legend / width, 0.5),
        frameon=False,
        fontsize=8,
        labelcolor=INK,
    )
    return write(figure, path)


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
    ticks: tuple[float, ...] = ()  # where they are all there is


def _multiples(
    argument: str,
    parts: Sequence[_Panel],
    path: str | os.PathLike[str],
    columns: int,
    marks: Mapping[str, float],
    share: bool = False,
) -> Path:
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
    figure = new_figure(width, height)
    panels = figure.subplots(down, across, squeeze=False, sharey=share)
    for index, axes in enumerate(panels.flat):
        if index >= len(parts):
            axes.set_axis_off()
            continue
        part = parts[index]
        style_axes(axes, part.title)
        for line in part.series:
            colour = line.colour or colours.get(line.label, ACCENT)
            weight, alpha = (1.2, 1.0) if line.label else (0.8, 0.75)
            axes.plot(
                line.x,
                line.y,
                color=colour,
                linewidth=weight,
                alpha=alpha,
                marker="o" if line.dots else "",
                markersize=3,
            )
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
            # from nought, unless what is shown begins late, as a stage does
            near = 0 <= np.nanmin(every) <= 0.1 * np.nanmax(every)
            axes.set_xlim(left=0.0 if near else None)
        if part.ticks:
            axes.set_xticks(part.ticks, [f"{tick:g}" for tick in part.ticks])
            axes.set_xlim(min(part.ticks) - 0.25, max(part.ticks) + 0.25)
        for name, position in marks.items():
            axes.axvline(position, color="#9aa7b6", linewidth=0.8, linestyle=(0, (3, 2)), zorder=0)
            axes.annotate(
                f" {name}", (position, 0.99), xycoords=axes.get_xaxis_transform(), va="top", fontsize=6.5, color=FAINT
            )
        if index + across >= len(parts) or part.label != parts[index + across].label:
            axes.set_xlabel(part.label, fontsize=8, color=FAINT)
    if legend:
        from matplotlib.lines import Line2D

        handles = [Line2D([], [], color=colours[label], linewidth=1.6, label=label) for label in labels]
        figure.legend(
            handles=handles,
            loc="upper left",
            ncols=len(handles),
            frameon=False,
            fontsize=8,
            labelcolor=INK,
            bbox_to_anchor=(0.0, 1.0),
            handlelength=1.4,
            columnspacing=1.4,
        )
    figure.tight_layout(pad=0.6, h_pad=1.0, w_pad=1.2, rect=(0, 0, 1, 1 - legend / height))
    return write(figure, path)


def _ticks(last: float) -> Any:
    from matplotlib.ticker import FixedLocator

    return FixedLocator([0, 10, *(10.0**k for k in range(2, max(int(math.log10(max(last, 10))) + 1, 2)))])


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def style_axes(axes: Axes, title: str) -> None:
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
