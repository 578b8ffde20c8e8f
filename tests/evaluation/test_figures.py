"""Figures: there, of the right size, and showing what they were given."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

import mmebm
from mmebm.evaluation.figures import (
    conditional_grid,
    curves,
    interpolation_grid,
    landscape,
    lines,
    overlay,
    revision_grid,
    sample_grid,
    scatter,
    sweep,
    trace,
    traces,
    trajectory_grid,
)
from mmebm.evaluation.figures.grids import BROKEN, CELL, GAP, READABLE, _fit_words, _height
from mmebm.evaluation.figures.plots import ACCENT, COLOURS, _pieces
from mmebm.evaluation.figures.style import DPI

PIXEL = 1 / 255


def read(path: Path) -> np.ndarray:
    """``(H, W, 3)`` in [0, 1]."""
    from matplotlib.image import imread

    return imread(path)[..., :3]


def share_of(picture: np.ndarray, colour: tuple[float, float, float]) -> float:
    """Share of the pixels that have this colour, to the two levels of eight bits that rounding may cost."""
    return float((np.abs(picture - np.array(colour)).max(-1) <= 2 * PIXEL).mean())


def samples(n: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "grey": rng.random((n, 1, 8, 8), dtype=np.float32),
        "colour": rng.random((n, 3, 10, 20), dtype=np.float32),
        "word": np.array(["zero", "a rather long caption of a sample that will not fit"] * n)[:n],
        "vector": rng.normal(size=(n, 5)).astype(np.float32),
    }


def test_importing_the_package_does_not_import_matplotlib():
    code = "import sys, mmebm.evaluation; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_sample_grid_has_a_column_per_sample(tmp_path: Path):
    path = tmp_path / "grid.png"
    assert sample_grid({"a": samples(12), "b": samples(12)}, path, columns=7) == path
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]
    seven = read(path)
    five = read(sample_grid({"a": samples(5), "b": samples(5)}, path, columns=7))
    assert seven.shape[1] - five.shape[1] == pytest.approx(2 * CELL * DPI, abs=1)
    assert seven.shape[0] == five.shape[0]
    one = read(sample_grid({"a": samples(5)}, path))
    # Two images, a half row and the lines of the caption a block, and its title of .34 inches.
    rows = 2.5 + _height(samples(5)["word"])
    assert five.shape[0] - one.shape[0] == pytest.approx((rows * CELL + 0.34) * DPI, abs=1)


def test_sample_grid_shows_each_value_where_it_belongs(tmp_path: Path):
    # Each image of one colour: its area, and the order of the areas from left to right and from top to bottom.
    colours = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]], dtype=np.float32)
    flat = np.broadcast_to(colours[:, :, None, None], (4, 3, 6, 6))
    picture = read(sample_grid({"t": {"m": flat[:2], "k": flat[2:]}}, tmp_path / "flat.png"))
    centres = []
    for colour in colours:
        hit = np.abs(picture - colour).max(-1) < 2 * PIXEL
        # A cell is CELL inches less a gap of 5 % on each side; a pixel may be lost along each edge.
        assert np.sqrt(hit.sum()) == pytest.approx(0.9 * CELL * DPI, abs=2)
        centres.append(np.argwhere(hit).mean(0))
    (red, green, blue, yellow) = centres
    step = CELL * DPI
    assert green - red == pytest.approx([0, step], abs=1)
    assert blue - red == pytest.approx([step, 0], abs=1)
    assert yellow - blue == pytest.approx([0, step], abs=1)


def test_values_that_are_no_numbers_are_shown_as_such(tmp_path: Path):
    values = samples(3)
    clean = read(sample_grid({"t": values}, tmp_path / "clean.png"))
    values["grey"][1] = np.nan
    broken = read(sample_grid({"t": values}, tmp_path / "broken.png"))
    cell = (0.9 * CELL * DPI) ** 2 / clean[..., 0].size
    assert share_of(clean, BROKEN) == 0
    assert share_of(broken, BROKEN) == pytest.approx(cell, rel=0.05)  # a pixel at each edge: 4 of 89


def test_equal_figures_are_equal_files(tmp_path: Path):
    one = sample_grid({"t": samples(2)}, tmp_path / "one.png").read_bytes()
    assert sample_grid({"t": samples(2)}, tmp_path / "two.png").read_bytes() == one
    other = {**samples(2), "word": np.array(["one", "two"])}
    assert sample_grid({"t": other}, tmp_path / "two.png").read_bytes() != one  # the words are drawn


def test_a_caption_has_the_lines_that_it_needs(tmp_path: Path) -> None:
    """A row grows with its longest text, and ends in dots only where that would be twice as high as an image."""
    caption = "this bird is white and grey in color, with it having few black wings."
    heights = []
    for text in ("seven", caption, caption * 20):
        blocks = {"t": {"caption": np.array([text, "short"])}}
        heights.append(read(sample_grid(blocks, tmp_path / "f.png")).shape[0])
    assert heights[0] < heights[1] < heights[2] < heights[0] + 2 * CELL * DPI
    room = (1 - 4 * GAP, _height(np.array([caption])) - 2 * GAP)
    words, size = _fit_words(caption, *room)
    assert size >= READABLE and words.split() == caption.split()


def test_few_whole_numbers_have_their_own_ticks(tmp_path: Path) -> None:
    panel = {"a": {"b": [0.2, 0.4, 0.3]}}
    pictures = [read(lines(panel, tmp_path / "f.png", x=[1, 2, 3], counts=counts)) for counts in (False, True)]
    assert pictures[0].shape == pictures[1].shape and (pictures[0] != pictures[1]).any()


def test_trajectory_grid_has_a_row_per_step(tmp_path: Path):
    def states(steps: int) -> dict[str, np.ndarray]:
        return {name: np.stack([values] * steps) for name, values in samples(3).items() if name != "word"} | {
            "word": np.array([["four", "nine", "six"]] * steps)
        }

    path = tmp_path / "chain.png"
    three = read(trajectory_grid(states(3), [0, 5, 10], path, chains=2))
    five = read(trajectory_grid(states(5), [0, 5, 10, 20, 30], path, chains=2))
    assert five.shape[0] - three.shape[0] == pytest.approx(2 * CELL * DPI, abs=1)
    assert five.shape[1] == three.shape[1]
    one = read(trajectory_grid(states(5), [0, 5, 10, 20, 30], path, chains=1))
    assert five.shape[1] - one.shape[1] == pytest.approx(4.35 * CELL * DPI, abs=1)  # four cells and the space between


def test_trajectory_grid_follows_the_chain(tmp_path: Path):
    grey = np.linspace(0.2, 0.8, 4, dtype=np.float32)
    states = {"m": np.broadcast_to(grey[:, None, None, None, None], (4, 1, 1, 5, 5))}
    picture = read(trajectory_grid(states, [0, 1, 2, 3], tmp_path / "chain.png"))
    rows = [np.argwhere(np.abs(picture - g).max(-1) < 2 * PIXEL).mean(0)[0] for g in grey]
    assert np.diff(rows) == pytest.approx([CELL * DPI] * 3, abs=1)


def flat(*greys: float) -> np.ndarray:
    """An image of one grey each."""
    return np.broadcast_to(np.array(greys, dtype=np.float32)[:, None, None, None], (len(greys), 1, 6, 6))


def centre(picture: np.ndarray, grey: float) -> np.ndarray:
    """Row and column of the middle of what has this grey."""
    hit = np.abs(picture - grey).max(-1) < 2 * PIXEL
    assert np.sqrt(hit.sum()) == pytest.approx(0.9 * CELL * DPI, abs=3), grey  # a cell less its gaps
    return np.argwhere(hit).mean(0)


def rgb(colour: str) -> tuple[float, float, float]:
    return int(colour[1:3], 16) / 255, int(colour[3:5], 16) / 255, int(colour[5:7], 16) / 255


def test_revision_grid_goes_from_left_to_right_and_ends_in_the_input(tmp_path: Path):
    chains = {"one": {"m": flat(0.2, 0.3, 0.4)}, "two": {"m": flat(0.5, 0.6, 0.7)}}
    picture = read(revision_grid(chains, [0, 2, 4], tmp_path / "r.png", observed={"two": {"m": flat(0.8)}}))
    step = CELL * DPI
    for strip in ((0.2, 0.3, 0.4), (0.5, 0.6, 0.7)):
        places = [centre(picture, grey) for grey in strip]
        assert np.diff(places, axis=0).ravel() == pytest.approx([0, step] * 2, abs=1.5)
    assert centre(picture, 0.5)[0] > centre(picture, 0.2)[0] + step
    # the input stands apart, by .35 of a cell
    assert centre(picture, 0.8) - centre(picture, 0.7) == pytest.approx([0, 1.35 * step], abs=1.5)


def test_conditional_grid_leaves_blank_what_a_group_has_not(tmp_path: Path):
    blocks = {"given a": {"given": {"a": flat(0.2)}, "A": {"b": flat(0.4)}, "B": {"b": flat(0.6)}}}
    picture = read(conditional_grid(blocks, tmp_path / "c.png"))
    given, a, b = (centre(picture, grey) for grey in (0.2, 0.4, 0.6))
    # "given" needs no more room than its column of one cell
    assert a - given == pytest.approx([CELL * DPI, 1.35 * CELL * DPI], abs=1.5)
    assert b - a == pytest.approx([0, 1.35 * CELL * DPI], abs=1.5)
    nine = {"t": {"g": {"a": flat(*[0.5] * 9)}}}
    wide, narrow = (read(conditional_grid(nine, tmp_path / "n.png", columns=k)).shape[1] for k in (9, 4))
    assert wide - narrow == pytest.approx(5 * CELL * DPI, abs=1)


def test_interpolation_grid_has_a_column_per_point(tmp_path: Path):
    rows = {"path": {"m": flat(0.1, 0.3, 0.5, 0.7), "word": np.array(["a", "b", "c", "d"])}}
    picture = read(interpolation_grid(rows, tmp_path / "i.png"))
    assert np.diff([centre(picture, g)[1] for g in (0.1, 0.3, 0.5, 0.7)]) == pytest.approx([CELL * DPI] * 3, abs=1)


def test_lines_have_a_colour_each_and_a_band(tmp_path: Path):
    x = list(range(0, 2000, 10))
    panels = {"energy": {"a": [1.0] * 200, "b": [None] * 100 + [2.0] * 100}, "other": {"a": [k / 9 for k in x]}}
    plain = read(lines(panels, tmp_path / "l.png", x=x, marks={"trained": 30}))
    for colour in COLOURS[:2]:
        assert share_of(plain, rgb(colour)) > 2e-4  # a line of half a panel, 1.2 points wide: about 1e-3
    errors = {"energy": {"a": [0.5] * 200}}
    banded = read(lines(panels, tmp_path / "l.png", x=x, errors=errors, logarithmic=True))
    tint = tuple(0.15 * c + 0.85 for c in rgb(COLOURS[0]))
    assert share_of(banded, tint) > 0.02 > share_of(plain, tint)


def test_traces_have_a_panel_per_initialiser(tmp_path: Path):
    chains = {name: [[1.0, 2.0, 3.0], [2.0, None, 1.0]] for name in ("a", "b", "c")}
    three = read(traces(chains, [0, 1, 2], tmp_path / "t.png"))
    assert three.shape[1] == pytest.approx((3.2 * 3 + 0.15) * DPI, abs=1)
    two = read(traces({k: chains[k] for k in "ab"}, [0, 1, 2], tmp_path / "t.png"))
    assert two.shape[1] == pytest.approx((3.2 * 2 + 0.15) * DPI, abs=1)


def test_sweep_draws_against_steps_and_against_seconds(tmp_path: Path):
    rows = [{"steps": k, "seconds": 0.1 * k, "frechet": 9.0 / (k + 1), "joint": 0.5, "text": "x"} for k in (0, 5, 100)]
    four = read(sweep({"xk": rows, "frozen": rows}, tmp_path / "s.png"))
    assert four.shape[:2] == pytest.approx((DPI * (1.95 * 2 + 0.25 + 0.3), DPI * (3.2 * 2 + 0.15)), abs=1)
    short = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    one = read(sweep({"xk": short}, tmp_path / "s.png", quantities=["frechet"]))
    assert one.shape[:2] == pytest.approx((DPI * (1.95 + 0.25), DPI * (3.2 + 0.15)), abs=1)


def test_each_dimension_of_a_vector_has_its_own_scale(tmp_path: Path):
    from matplotlib import colormaps

    values = np.array([[0.0, 100.0], [1.0, 101.0]], dtype=np.float32)
    low, high = np.asarray(colormaps["cividis"]([0.0, 1.0]))[:, :3]
    picture = read(sample_grid({"t": {"v": values[:1]}, "u": {"v": values[1:]}}, tmp_path / "v.png"))
    # the first block is lowest in both dimensions, the second highest: a scale for all would show 100 and 101 alike
    cell = 0.9 * CELL * 0.4 * CELL / CELL**2 * (CELL * DPI) ** 2  # a vector's cell, less its gaps
    for colour in (low, high):
        assert (np.abs(picture - colour).max(-1) < 2 * PIXEL).sum() == pytest.approx(cell, rel=0.1)


def test_no_line_crosses_a_gap():
    x = np.array([1, 2, 3, 4, 10, 11, 12, 12, 13, 14], dtype=float)
    # a stretch without values, and a step back; a row at 2 belongs to the stage that ends there
    assert [x[part].tolist() for part in _pieces(x)] == [[1, 2, 3, 4], [10, 11, 12], [12, 13, 14]]
    assert [x[part].tolist() for part in _pieces(x, [0, 2])][:2] == [[1, 2], [3, 4]]
    assert _pieces(x[:0]) == [] and _pieces(x[:1]) == [slice(0, 1)]


def test_overlay_has_a_line_per_run(tmp_path: Path):
    log = {"iteration": [1.0, 2.0, 3.0], "loss": [3.0, 2.0, 1.0]}
    path = tmp_path / "o.png"
    both = read(overlay({"a": log, "b": {**log, "loss": [1.0, 2.0, 3.0], "own": [1.0, 1.0, 1.0]}}, path))
    for colour in COLOURS[:2]:
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        assert share_of(both, rgb) > 0
    wide = read(overlay({"a": log, "b": {**log, "own": [1.0, 1.0, 1.0]}}, path, quantities=["loss", "own"]))
    assert wide.shape[1] - both.shape[1] == pytest.approx(3.2 * DPI, abs=1)  # a panel more
    with pytest.raises(ValueError, match="must have 'iteration', got"):
        overlay({"a": {"loss": [1.0]}}, path)


def test_curves_show_the_stages_that_a_quantity_has(tmp_path: Path):
    """A quantity of the last tenth alone is drawn over its own stage, as wide as one of the whole."""
    n = 100
    # at 90 the first stage has ended, and its last value is logged
    log = {"iteration": list(range(n)), "late": [float("nan")] * 91 + [float(k) for k in range(9)]}
    picture = read(curves(log, tmp_path / "c.png", stages={"first": 0, "last": 90}))
    blue = np.abs(picture - np.array(rgb(ACCENT))).max(-1) < 0.1
    columns = np.argwhere(blue.any(0)).ravel()
    assert np.ptp(columns) > 0.6 * picture.shape[1]


def test_curves_draw_a_panel_per_quantity(tmp_path: Path):
    n = 400
    log = {
        "iteration": list(range(0, 10 * n, 10)),
        "loss": list(np.exp(-np.arange(n) / 50)),
        "gap": [float("nan")] * 200 + [1.0] * 199 + [1e6],
        "never": [float("nan")] * n,
    }
    two = read(curves(log, tmp_path / "two.png", stages={"warm-up": 0, "joint": 2_000}, log_scale=["loss"]))
    assert two.shape[1] == pytest.approx((3.2 * 2 + 0.15) * DPI, abs=1)
    four = read(curves({**log, "a": [0.0] * n, "b": [1.0] * n}, tmp_path / "four.png", columns=2))
    assert four.shape[1] == two.shape[1]
    assert four.shape[0] > 1.5 * two.shape[0]
    # Each panel has a line of its own colour: the left and the right half of the two.
    blue = int(ACCENT[1:3], 16) / 255, int(ACCENT[3:5], 16) / 255, int(ACCENT[5:7], 16) / 255
    middle = two.shape[1] // 2
    assert share_of(two[:, :middle], blue) > 1e-3  # of a line 1.4 points wide and 3 inches long, about 4e-3
    assert share_of(two[:, middle:], blue) > 1e-3


def test_stages_are_marked(tmp_path: Path):
    log = {"loss": [1.0, 0.5, 0.25, 0.1]}
    plain = read(curves(log, tmp_path / "plain.png"))
    staged = read(curves(log, tmp_path / "staged.png", stages={"warm-up": 0, "joint": 2}))
    band = (0xEE / 255, 0xF1 / 255, 0xF5 / 255)
    assert share_of(plain, band) < 0.01
    assert 0.1 < share_of(staged, band) < 0.6  # the first stage shaded, the second white


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: sample_grid({}, p), "blocks must hold at least one block"),
        (lambda p: sample_grid({"t": samples(2)}, p, columns=0), "columns must be at least 1, got 0"),
        (lambda p: sample_grid({"t": {"m": np.zeros((2, 8, 8))}}, p), r"\['t'\]\['m'\] must be images .*\(2, 8, 8\)"),
        (lambda p: sample_grid({"t": {"a": np.zeros((2, 3)), "b": np.zeros((4, 3))}}, p), "as many samples .*'b': 4"),
        (lambda p: sample_grid({"t": {"a": np.zeros((0, 3))}}, p), r"at least one sample, got shape \(0, 3\)"),
        (lambda p: trajectory_grid({"a": np.zeros((3, 2, 5))}, [0, 1], p), r"shape \(2, n, ...\).* got \(3, 2, 5\)"),
        (lambda p: trajectory_grid({}, [0], p), "must not be empty"),
        (lambda p: curves({"a": [1.0], "b": [1.0, 2.0]}, p), "lists of one length"),
        (lambda p: revision_grid({"t": {"m": flat(0.5)}}, [0, 2], p), r"\['t'\]\['m'\] must have 2 columns"),
        (lambda p: revision_grid({"t": {"m": flat(0.5)}}, [0], p, observed={"u": {}}), r"observed .* got \['u'\]"),
        (lambda p: interpolation_grid({}, p), "rows must hold at least one strip"),
        (lambda p: conditional_grid({"t": {}}, p), "at least one block of groups"),
        (lambda p: conditional_grid({"t": {"g": {"a": flat(1), "b": flat(1, 1)}}}, p), "as many samples .*'b': 2"),
        (lambda p: lines({"q": {"a": [1.0]}}, p, x=[0, 1]), r"panels\['q'\]\['a'\] must have 2 values"),
        (lambda p: lines({"q": {"a": [None]}}, p, x=[0]), "at least one number, got"),
        (lambda p: lines({"q": {"a": [1]}}, p, x=[0], columns=0), "columns must be at least 1, got 0"),
        (lambda p: traces({"a": [[1.0], [1.0, 2.0]]}, [0], p), r"chains\['a'\] must have 1 values .*got \[1, 2\]"),
        (lambda p: sweep({"a": [{"seconds": 1}]}, p), "each with 'steps'"),
        (lambda p: sweep({"a": [{"steps": 1, "t": "x"}]}, p), "rows must hold numbers to draw"),
        (lambda p: sweep({"a": [{"steps": 1, "t": 1}]}, p, quantities=["u"]), r"got none of \['u'\]"),
        (lambda p: curves({"iteration": [1.0]}, p), "at least one quantity"),
        (lambda p: curves({"a": [1.0]}, p, log_scale=["b"]), r"must name quantities of log, got \['b'\]"),
    ],
)
def test_bad_input_is_refused_by_name_and_value(call, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "never.png")
    assert not list(tmp_path.iterdir())


def chain_of(steps: int = 200, chains: int = 6):
    sampler = mmebm.Langevin(0.1)
    return sampler.sample(
        lambda x: x["a"].square().sum(1) + x["b"].square().sum((1, 2)),
        {"a": torch.zeros(chains, 3), "b": torch.zeros(chains, 2, 2)},
        steps,
        record=("energy",),
        thin=2,
        seed=0,
    )


def titles(figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


def test_trace_has_a_row_per_quantity(tmp_path: Path):
    out = chain_of()
    figure = trace(out, chains=2)
    rows = [title.split("   ")[0] for title in titles(figure)[::3]]
    assert rows == ["energy", "a[0]", "a[2]", "b[0, 0]", "b[1, 1]"]
    left, ranks, correlation = figure.axes[3:6]
    steps, values = left.lines[0].get_data()
    # the first chain's first element, after steps 2, 4, ...
    assert np.array_equal(steps, np.arange(2, 201, 2)) and np.array_equal(values, out.trajectory["a"][:, 0, 0].numpy())
    assert len(left.lines) == 2
    # of all 6 chains together the ranks are 0 to 599, each once: 20 bins of 30, of which two chains have some
    counts = [patch.get_data().values for patch in ranks.patches]
    assert [len(c) for c in counts] == [20, 20] and [c.sum() for c in counts] == [100, 100]
    assert correlation.lines[0].get_ydata()[0] == pytest.approx(1)  # at lag 0, by definition
    whole = trace(out, chains=6, quantities=["a"])
    every = sum(patch.get_data().values for patch in whole.axes[1].patches)
    assert (every == 30).all() and len(whole.axes) == 6
    assert "ESS" in titles(whole)[0] and trace(out, tmp_path / "t.png") == tmp_path / "t.png"
    later = trace(out, quantities=["energy"], burn_in=150).axes[0].lines[0].get_xdata()
    assert later.tolist() == list(range(150, 200))


def test_ranks_of_chains_that_differ_are_apart():
    values = torch.cat([torch.zeros(100, 1), torch.ones(100, 1)], 1) + 0.1 * torch.rand(
        100, 2, generator=torch.Generator().manual_seed(0)
    )
    out = dataclasses.replace(chain_of(4), trace={"e": values}, trajectory=None)
    low, high = (patch.get_data().values for patch in trace(out).axes[1].patches)
    assert (low[10:] == 0).all() and (high[:10] == 0).all()


def test_landscape_shows_energy_and_samples(tmp_path: Path):
    def energy(x):
        return (x[:, 0] - 1).square() + x[:, 1].square()

    out = mmebm.Langevin(0.05).sample(energy, torch.zeros(5, 2), 40, thin=4, seed=0)
    axes = landscape(energy, out, bounds=(-1, 3, -2, 2), chains=2).axes[0]
    dots, *ways = axes.lines
    assert np.array_equal(np.stack(dots.get_data(), 1), out.trajectory.reshape(-1, 2).double().numpy())
    assert len(ways) == 4 and np.array_equal(ways[0].get_xdata(), out.trajectory[:, 0, 0].double().numpy())
    assert axes.get_xlim() == (-1, 3) and axes.get_ylim() == (-2, 2)
    assert landscape(energy, out.state, tmp_path / "l.png") == tmp_path / "l.png"
    assert len(landscape(energy).axes[0].lines[0].get_xdata()) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: trace(chain_of(), chains=0), "chains must be at least 1, got 0"),
        (lambda: trace(chain_of(), quantities=["c"]), r"out must hold \['c'\]"),
        (lambda: trace(chain_of(), burn_in=199), "of 4 steps at least after the burn-in"),
        (lambda: landscape(lambda x: x, torch.zeros(3, 3)), r"states \(chains, 2\), got \(3, 3\)"),
        (lambda: landscape(lambda x: x.sum(), torch.zeros(3, 2)), "one value for each of 40000 points"),
        (lambda: landscape(lambda x: x.sum(1), bounds=(1, 0, 0, 1)), "left < right"),
        (lambda: landscape(lambda x: x.sum(1) * math.nan), "finite somewhere"),
    ],
)
def test_chains_that_cannot_be_drawn_are_refused(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()


def test_scatter_has_a_colour_for_each_model(tmp_path: Path):
    one = {"left": {"vae": [(1.0, 0.2, "1"), (2.0, 0.4, "5")]}}
    two = {"left": {**one["left"], "full": [(3.0, 0.9, "")]}, "right": {"full": [(3.0, 0.8, "")], "none": []}}
    pictures = [read(scatter(panels, tmp_path / "s.png", x="distance", y="coherence")) for panels in (one, two)]
    colours = [tuple(int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)) for c in COLOURS[:2]]
    shares = [[share_of(picture, colour) for colour in colours] for picture in pictures]
    assert shares[0][0] > 0 and shares[0][1] == 0 and min(shares[1]) > 0
    with pytest.raises(ValueError, match="at least one point"):
        scatter({"left": {"vae": []}}, tmp_path / "s.png", x="", y="")
