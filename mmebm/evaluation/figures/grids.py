"""Grids of samples: modalities below each other, samples, steps or completions side by side."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from mmebm.evaluation.figures.style import FAINT, INK, new_figure, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER: Final = "#eef1f5"
BROKEN: Final = (0.86, 0.15, 0.47)  # where a value is inf or NaN: no grey or digit has this colour
CELL: Final = 0.62  # inches
TEXT_HEIGHT: Final = 0.5  # of a cell: a word needs less room than an image
GAP: Final = 0.05  # of a cell, on each side
READABLE: Final = 5.25  # points, at which a row is made high enough for its texts

Limit = tuple[np.ndarray, np.ndarray]  # the ends of the colour scale of each dimension of a vector


def sample_grid(
    blocks: Mapping[str, Mapping[str, np.ndarray]], path: str | os.PathLike[str], *, columns: int = 10
) -> Path:
    """Joint samples, a column per sample and a row per modality; blocks, such as stages of a model, below each other.

    Args:
        blocks: title -> modality -> natural values, as ``Modality.natural`` gives them: images ``(n, C, H, W)`` in
            [0, 1] (one channel grey, three colour, others averaged to grey), strings ``(n,)``, vectors ``(n, D)``
            (drawn as a strip of colours, each dimension on a scale of its own, from its lowest to its highest value in
            the whole figure). Column ``i`` is row ``i`` of every modality. Values that are inf or NaN are drawn in
            magenta.
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
    argument: str,
    strips: Mapping[str, Mapping[str, np.ndarray]],
    labels: Sequence[str],
    path: str | os.PathLike[str],
    corner: str,
    observed: Mapping[str, Mapping[str, np.ndarray]],
) -> Path:
    if not strips or not all(strips.values()) or not labels:
        raise ValueError(f"{argument} must hold at least one strip with a modality and a column, got {list(strips)}")
    unknown = sorted(set(observed) - set(strips))
    if unknown:
        raise ValueError(f"observed must name {argument} {list(strips)}, got {unknown}")
    for title, rows in strips.items():
        for name, values in rows.items():
            if values.ndim < 1 or len(values) != len(labels):
                raise ValueError(
                    f"{argument}[{title!r}][{name!r}] must have {len(labels)} columns, one per label, "
                    f"got {values.shape}"
                )
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
    shapes: dict[str, dict[str, float]] = {}
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
            shown = [group.rows[name][:span] for group, span in zip(groups, spans[title]) if name in group.rows]
            shapes[title][name] = max(map(_height, shown))

    limits = _limits(group.rows for groups in blocks.values() for group in groups)

    between, foot = 0.35, 0.1  # of a cell, between groups; inches
    margin = _label_width([corner, *(name for rows in shapes.values() for name in rows)])
    # A title of a group wider than its columns takes the room it needs.
    widths = {
        title: [max(span, (len(group.title) * 0.62 * 8.5 / 72) / CELL) for span, group in zip(spans[title], groups)]
        for title, groups in blocks.items()
    }
    across = max(sum(w) + between * (len(w) - 1) for w in widths.values())
    heights = {title: sum(rows.values()) * CELL for title, rows in shapes.items()}
    headed = {title: any(group.title or group.labels for group in groups) for title, groups in blocks.items()}
    header, second = 0.34, 0.2  # inches, of a block's title and of the line of labels below it
    width = margin + across * CELL + foot
    height = sum(heights.values()) + sum(header + second * headed[title] for title in blocks) + foot
    figure = new_figure(width, height)
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
        for name, cell in shapes[title].items():
            axes.text(-0.12, y + cell / 2, name, ha="right", va="center", fontsize=8.5, color=FAINT)
            x = 0.0
            for group, span, wide in zip(groups, spans[title], widths[title]):
                values = group.rows.get(name, ())
                for column in range(min(span, len(values))):
                    _draw(axes, values[column], x + column, y, cell, limits[name], tall=cell)
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
    return write(figure, path)


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
            raise ValueError(
                f"states[{name!r}] must have shape ({len(steps)}, n, ...), one entry per step, got {values.shape}"
            )
        counts[name] = _count(f"states[{name!r}]", values[0])
    if len(set(counts.values())) > 1:
        raise ValueError(f"states must have as many chains in every modality, got {counts}")
    shown = min(chains, next(iter(counts.values())))

    # A row holds images beside words, so every cell is a full one; words get the width they need.
    widths = {name: _word_width(values) if values.dtype.kind in "UO" else 1.0 for name, values in states.items()}
    limits = _limits([{name: values.reshape(-1, *values.shape[2:]) for name, values in states.items()}])
    between = 0.35  # of a cell, between chains
    labels = [f"step {step}" for step in steps]
    margin, header, foot = _label_width(labels), 0.52, 0.1
    span = shown * (sum(widths.values()) + between) - between
    width, height = margin + span * CELL + foot, len(steps) * CELL + header + foot
    figure = new_figure(width, height)
    axes = _cells(figure, (margin, foot, span * CELL, len(steps) * CELL), (width, height))
    for row, label in enumerate(labels):
        axes.text(-0.12, row + 0.5, label, ha="right", va="center", fontsize=8.5, color=FAINT)
    x = 0.0
    for chain in range(shown):
        middle = x + sum(widths.values()) / 2
        axes.text(
            middle, -0.5, f"chain {chain + 1}", ha="center", va="bottom", color=INK, fontsize=9.5, fontweight="bold"
        )
        for name, values in states.items():
            axes.text(
                x + widths[name] / 2,
                -0.1,
                name,
                ha="center",
                va="bottom",
                color=FAINT,
                fontsize=min(7.5, 72 * CELL * widths[name] / (0.58 * max(len(name), 1))),
            )
            for row in range(len(steps)):
                _draw(axes, values[row, chain], x, row, 1.0, limits[name], widths[name])
            x += widths[name]
        x += between
    return write(figure, path)


def _draw(
    axes: Axes,
    value: Any,
    x: float,
    y: float,
    height: float,
    limit: Limit | None,
    width: float = 1.0,
    tall: float = TEXT_HEIGHT,
) -> None:
    """One sample of one modality into the cell whose upper left corner is ``(x, y)``; text is ``tall`` in it."""
    if isinstance(value, str):
        from matplotlib.patches import FancyBboxPatch

        tall = min(height, tall) - 2 * GAP
        box = (x + GAP, y + (height - tall) / 2)
        axes.add_patch(
            FancyBboxPatch(
                box, width - 2 * GAP, tall, boxstyle="round,pad=0,rounding_size=.08", facecolor=PAPER, edgecolor="none"
            )
        )
        words, size = _fit_words(value, width - 4 * GAP, tall)
        # One line stands on one baseline with its neighbours, whether or not it has a descender.
        axes.text(
            x + width / 2,
            y + height / 2,
            words,
            ha="center",
            color=INK,
            fontsize=size,
            linespacing=1.05,
            va="center" if "\n" in words else "center_baseline",
        )
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


def _picture(value: np.ndarray, limit: Limit | None) -> np.ndarray:
    """``(H, W, 3)`` in [0, 1] from an image ``(C, H, W)`` or a vector ``(D,)``; BROKEN where inf or NaN."""
    if value.ndim == 1:
        from matplotlib import colormaps

        assert limit is not None
        low, high = limit
        picture = np.asarray(colormaps["cividis"]((np.nan_to_num(value) - low) / (high - low)))[None, :, :3].copy()
        finite = np.isfinite(value)[None]
    else:
        finite = np.isfinite(value).all(axis=0)
        value = value if len(value) == 3 else np.repeat(value.mean(axis=0, keepdims=True), 3, axis=0)
        picture = np.clip(np.moveaxis(value, 0, -1), 0, 1)
    picture[~finite] = BROKEN
    return picture


def _limits(rows: Iterable[Mapping[str, np.ndarray]]) -> dict[str, Limit | None]:
    """By modality the lowest and the highest value of each dimension of its vectors; None for images and words."""
    parts: dict[str, list[np.ndarray]] = {}
    for row in rows:
        for name, values in row.items():
            parts.setdefault(name, []).append(values)
    return {name: _limit(values) for name, values in parts.items()}


def _limit(parts: Sequence[np.ndarray]) -> Limit | None:
    if any(values.dtype.kind in "UO" or values.ndim != 2 for values in parts):
        return None
    values = np.concatenate([np.asarray(part, dtype=np.float64) for part in parts])
    finite = np.isfinite(values)
    low = np.where(finite, values, np.inf).min(0)
    high = np.where(finite, values, -np.inf).max(0)
    # of a dimension without a finite value, or of one value
    low = np.where(np.isfinite(low), low, 0.0)
    return low, np.where(high > low, high, low + 1.0)


def _count(name: str, values: np.ndarray) -> int:
    """``n`` of one modality's natural values; ValueError if they are no images, strings or vectors."""
    text = values.dtype.kind in "UO"
    if values.ndim != 1 if text else values.ndim not in (2, 4):
        raise ValueError(
            f"{name} must be images (n, C, H, W), strings (n,) or vectors (n, D), got {values.dtype} {values.shape}"
        )
    if not values.size:
        raise ValueError(f"{name} must hold at least one sample, got shape {values.shape}")
    return len(values)


def _height(values: np.ndarray) -> float:
    """Of a row, in cells: a text gets the lines that it needs at a readable size, up to a height of two."""
    if values.dtype.kind not in "UO":
        return 1.0 if values.ndim == 4 else TEXT_HEIGHT
    letters = int((1 - 4 * GAP) * 72 * CELL / (0.6 * READABLE))
    lines = max(len(textwrap.wrap(str(text), letters)) for text in values)
    return min(max(TEXT_HEIGHT, 2.5 * GAP + lines * 1.2 * READABLE / (72 * CELL)), 2.0)


def _word_width(values: np.ndarray) -> float:
    longest = max(len(str(word)) for word in values.flat)
    return max(1.0, 4 * GAP + longest * 0.6 * 7.5 / (72 * CELL))  # room for 7.5 points


def _label_width(labels: Collection[str]) -> float:
    """Inches for row labels of 8.5 points."""
    return 0.25 + max(len(label) for label in labels) * 0.6 * 8.5 / 72


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
