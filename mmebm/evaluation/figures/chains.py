"""Chains of any sampler: their traces, ranks and autocorrelation; and where they go on a two-dimensional energy."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from mmebm.diagnostics import autocorrelation, ess, rhat
from mmebm.evaluation.figures.plots import ACCENT, COLOURS, style_axes
from mmebm.evaluation.figures.style import FAINT, new_figure, write
from mmebm.state import flatten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mmebm.samplers import Samples

BINS: Final = 20  # of the ranks
POINTS: Final = 2000  # samples drawn on a landscape, at most
WAY: Final = 60  # states of a line on a landscape, the first: more would hide it
LEAST: Final = 4  # states: fewer leave halves of one draw


def trace(
    out: Samples,
    path: str | os.PathLike[str] | None = None,
    *,
    quantities: Sequence[str] | None = None,
    elements: int = 2,
    chains: int = 4,
    burn_in: int = 0,
) -> Figure | Path:
    """What a chain recorded, and elements of its trajectory: a row each, with three panels.

    Left the trace, a line per chain. In the middle the ranks of these chains' values among those of all chains, 20 bins
    each: flat (the dashed line) for chains that have mixed (Vehtari et al. 2021). Right the autocorrelation, averaged
    over all chains. R-hat and the bulk effective sample size of all chains stand in the title.

    Args:
        out: of any sampler's ``sample``, with ``record`` or ``thin``.
        path: where to write a PNG.
        quantities: what to show: names in ``out.trace``, and of the state's tensors, such as "x" for a bare tensor or a
            key of a dict; unless given, all there are.
        elements: how many elements of each tensor are shown, spread evenly over it.
        chains: how many chains are drawn, spread evenly over all.
        burn_in: steps that are left out at the start.

    Returns:
        ``path``; without it the figure, whose ``savefig`` writes it.

    Raises:
        ValueError: where there is nothing to show, or an argument is out of range.
        ImportError: without matplotlib.

    Example:
        >>> sampler = mmebm.HMC(0.5)
        >>> out = sampler.sample(lambda x: x.square().sum(1), torch.randn(8, 2), 100, thin=1, seed=0)
        >>> figure = mmebm.evaluation.figures.trace(out)
    """
    for name, value, least in (("elements", elements, 1), ("chains", chains, 1), ("burn_in", burn_in, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    rows = _series(out, quantities, elements, burn_in)
    figure = new_figure(9.75, 1.75 * len(rows) + 0.35)
    panels = figure.subplots(len(rows), 3, squeeze=False)
    for (name, (at, values)), (left, middle, right) in zip(rows.items(), panels):
        shown = np.unique(np.linspace(0, values.shape[1] - 1, min(chains, values.shape[1])).round().astype(int))
        draws = torch.as_tensor(values)
        numbers = f"R-hat {float(rhat(draws)):.2f}, ESS {float(ess(draws)):.0f} of {values.size}"
        style_axes(left, f"{name}   {numbers}")
        for colour, chain in zip(_colours(len(shown)), shown):
            left.plot(at, values[:, chain], color=colour, linewidth=0.7, alpha=0.8)
        _ranks(middle, values, shown)
        _correlation(right, values, at)
    for axes, label in zip(panels[-1], ("step", "rank, of all values", "lag, steps")):
        axes.set_xlabel(label, fontsize=8, color=FAINT)
    figure.tight_layout(pad=0.6, h_pad=1.0, w_pad=1.2)
    return figure if path is None else write(figure, path)


def _series(
    out: Samples, quantities: Sequence[str] | None, elements: int, burn_in: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """name -> (steps (T,), values (T, chains))."""
    steps, found = out.info["steps"], {}
    for name, values in out.trace.items():
        if values.dim() == 2 and (quantities is None or name in quantities):
            found[name] = _after(np.arange(len(values)), _numbers(values), burn_in)
    keys, tensors, _ = flatten(out.trajectory) if out.trajectory is not None else ((), [], None)
    for key, tensor in zip(keys, tensors):
        label = "x" if isinstance(out.trajectory, Tensor) else str(key)
        if (quantities is not None and label not in quantities) or not len(tensor):
            continue
        flat = tensor.flatten(2) if tensor.dim() > 2 else tensor.unsqueeze(2)
        # the states after steps t, 2t, ...
        at = (np.arange(len(tensor)) + 1) * (steps // len(tensor))
        for i in np.unique(np.linspace(0, flat.shape[2] - 1, min(elements, flat.shape[2])).round().astype(int)):
            index = np.unravel_index(i, tensor.shape[2:]) if tensor.dim() > 2 else ()
            name = label + (f"[{', '.join(map(str, index))}]" if index else "")
            found[name] = _after(at, _numbers(flat[:, :, int(i)]), burn_in)
    found = {name: (at, values) for name, (at, values) in found.items() if len(at) >= LEAST and values.shape[1]}
    unknown = sorted(name for name in quantities or () if not any(n == name or n.startswith(f"{name}[") for n in found))
    if unknown or not found:
        raise ValueError(
            f"out must hold {unknown or 'a trace or a trajectory'} of {LEAST} steps at least after the "
            f"burn-in, got {list(out.trace)} and {len(tensors)} tensors of trajectory: sample with thin= "
            "or record="
        )
    return found


def _numbers(values: Tensor) -> np.ndarray:
    return values.detach().double().cpu().numpy()


def _after(at: np.ndarray, values: np.ndarray, burn_in: int) -> tuple[np.ndarray, np.ndarray]:
    return at[at >= burn_in], values[at >= burn_in]


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _ranks(axes: Axes, values: np.ndarray, shown: np.ndarray) -> None:
    style_axes(axes, "ranks")
    rank = values.ravel().argsort(kind="stable").argsort().reshape(values.shape)
    bins = min(BINS, len(values))
    edges = np.linspace(0, values.size, bins + 1)
    for colour, chain in zip(_colours(len(shown)), shown):
        counts, _ = np.histogram(rank[:, chain], edges)
        axes.stairs(counts, edges, color=colour, linewidth=0.9, alpha=0.8)
    axes.axhline(len(values) / bins, color=FAINT, linewidth=0.9, linestyle=(0, (3, 2)))
    axes.set_xlim(0, values.size)
    axes.set_ylim(bottom=0)


def _correlation(axes: Axes, values: np.ndarray, at: np.ndarray) -> None:
    style_axes(axes, "autocorrelation")
    mean = np.nanmean(autocorrelation(torch.as_tensor(values)).numpy(), axis=1)
    # as far as it says something: beyond its first value below zero there is noise
    below = np.flatnonzero(~(mean > 0))
    lags = min(max(2 * int(below[0]) if len(below) else len(mean), 10), len(mean))
    axes.plot((at[1] - at[0]) * np.arange(lags), mean[:lags], color=ACCENT, linewidth=1.2)
    axes.axhline(0, color=FAINT, linewidth=0.7)
    axes.set_ylim(top=1.05)


def landscape(
    energy: Callable[[Tensor], Tensor],
    samples: Samples | Tensor | None = None,
    path: str | os.PathLike[str] | None = None,
    *,
    bounds: tuple[float, float, float, float] | None = None,
    chains: int = 3,
    levels: int = 16,
    resolution: int = 200,
) -> Figure | Path:
    """A two-dimensional energy as contours, with samples as dots and the way of a few chains as lines.

    Args:
        energy: (n, 2) to (n,).
        samples: of a sampler: its final states are dots, and with a trajectory all states of it are, with lines for
            the beginnings of ``chains`` of them; or a tensor (n, 2).
        path: where to write a PNG.
        bounds: (left, right, bottom, top); unless given, the box of the samples with a margin, or (-3, 3, -3, 3).
        chains: how many chains are drawn as lines.
        levels: contours between the lowest and the 70 % quantile of the energy: walls would take them all.
        resolution: points of the grid along each side.

    Returns:
        ``path``; without it the figure.

    Raises:
        ValueError: where samples or energy have another shape, or ``bounds`` is no box.
        ImportError: without matplotlib.

    Example:
        >>> def energy(x):
        ...     return (x[:, 0] ** 2 - 1) ** 2 + x[:, 1] ** 2
        >>> out = mmebm.Langevin(0.05).sample(energy, torch.zeros(50, 2), 200, thin=5, seed=0)
        >>> figure = mmebm.evaluation.figures.landscape(energy, out)
    """
    dots, ways = _dots(samples, chains)
    left, right, bottom, top = _box(dots) if bounds is None else bounds
    if not (left < right and bottom < top):
        raise ValueError(f"bounds must be (left, right, bottom, top) with left < right and bottom < top, got {bounds}")
    across, up = np.linspace(left, right, resolution), np.linspace(bottom, top, resolution)
    like = samples if isinstance(samples, Tensor) else getattr(samples, "state", None)
    kind: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    if isinstance(like, Tensor):
        kind = {"dtype": like.dtype, "device": like.device}
    grid = torch.as_tensor(np.stack([g.ravel() for g in np.meshgrid(across, up)], 1), **kind)
    with torch.no_grad():
        values = energy(grid)
    if not isinstance(values, Tensor) or values.numel() != len(grid):
        raise ValueError(
            f"energy must return one value for each of {len(grid)} points, got "
            f"{tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__}"
        )
    height = values.detach().double().cpu().numpy().reshape(resolution, resolution)
    finite = height[np.isfinite(height)]
    if not len(finite):
        raise ValueError("energy must be finite somewhere within bounds, got none")
    low, high = finite.min(), np.quantile(finite, 0.7)
    high = high if high > low else low + 1.0
    figure = new_figure(5.2, 5.2 * min(max((top - bottom) / (right - left), 0.4), 2.0))
    axes = figure.add_subplot()
    style_axes(axes, "")
    shades = axes.contourf(
        across, up, np.clip(height, low, high), levels=np.linspace(low, high, levels), cmap="Blues_r"
    )
    figure.colorbar(shades, ax=axes, shrink=0.8).ax.tick_params(labelsize=7, colors=FAINT)
    step = max(len(dots) // POINTS, 1)
    axes.plot(dots[::step, 0], dots[::step, 1], ".", color=COLOURS[1], markersize=2.5, alpha=0.6)
    for way in ways:
        axes.plot(way[:, 0], way[:, 1], color="#1f2933", linewidth=0.7, alpha=0.8)
        axes.plot(*way[0], "o", color="#1f2933", markersize=3)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    figure.tight_layout(pad=0.6)
    return figure if path is None else write(figure, path)


def _dots(samples: Samples | Tensor | None, chains: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """The points (n, 2), and the ways of some chains (steps, 2)."""
    if samples is None:
        return np.zeros((0, 2)), []
    state = samples if isinstance(samples, Tensor) else samples.state
    if not isinstance(state, Tensor) or state.dim() != 2 or state.shape[1] != 2:
        shape = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
        raise ValueError(f"a landscape is of states (chains, 2), got {shape}")
    trajectory = None if isinstance(samples, Tensor) else samples.trajectory
    if trajectory is None or not len(trajectory):
        return _numbers(state), []
    every = _numbers(trajectory)
    return every.reshape(-1, 2), [every[:WAY, i] for i in range(min(chains, every.shape[1]))]


def _box(dots: np.ndarray) -> tuple[float, float, float, float]:
    dots = dots[np.isfinite(dots).all(1)]
    if not len(dots):
        return -3.0, 3.0, -3.0, 3.0
    (a, c), (b, d) = np.percentile(dots, (0.5, 99.5), axis=0)  # a stray one would make the rest a dot
    pad = 0.1 * max(b - a, d - c) or 1.0
    return float(a - pad), float(b + pad), float(c - pad), float(d + pad)
