"""Several runs on one page: their numbers with the best marked, curves laid over each other, samples, settings."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from mmebm import __version__
from mmebm.evaluation import figures
from mmebm.files import write_atomically
from mmebm.report import pictures
from mmebm.report.glossary import glossary
from mmebm.report.page import Best, Html, document, element, figure, join, number, table, with_error
from mmebm.report.sections import NAMES, SIDE, Opened, columns_of, heldout_of, kernel_of, opened
from mmebm.report.verdict import heldout_by
from mmebm.training.run import Run

__all__ = ["write_comparison"]

# Which way is better; other numbers are not marked.
HIGHER: Final = ("joint_coherence", "pair_agreement", "entropy", "class_share_min", "bound", "retrieval")
LOWER: Final = ("frechet", "kernel", "mse", "cross_mse")
CONDITIONAL: Final = "conditional, {} given"


def write_comparison(runs: Mapping[Path, Run | None], out: Path | str = "comparison.html", *, seed: int = 0) -> Path:
    """Writes the page that compares runs, whatever of each there is by now.

    Args:
        runs: the folder of each run, and its networks, for the samples; None for a run without a checkpoint.
        out: where to write.
        seed: of the samples.

    Returns:
        The path of the page.

    Raises:
        ValueError: for less than two runs, or where a file of one is not JSON.
        FileNotFoundError: where a folder holds nothing of a run.
        ImportError: without matplotlib.
    """
    if len(runs) < 2:
        raise ValueError(f"a comparison needs at least two different runs, got {[str(path) for path in runs]}")
    with tempfile.TemporaryDirectory() as drawings:
        names = _names(list(runs))
        of = {
            name: opened(path, run, Path(drawings), seed=seed)
            for name, (path, run) in zip(names, runs.items(), strict=True)
        }
        text = _page(of)
    path = Path(out)
    write_atomically(path, lambda file: file.write(text.encode()))
    return path


def _names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many parts before it as tell them apart."""
    parts, most = [path.resolve().parts for path in paths], 1
    while len({p[-most:] for p in parts}) < len(parts) and any(most < len(p) for p in parts):
        most += 1
    return ["/".join(p[-most:]) for p in parts]


def _page(of: Mapping[str, Opened]) -> str:
    sections = [
        ("verdicts", "Verdicts", _verdicts(of)),
        ("numbers", "Numbers", _numbers(of)),
        ("settings", "Settings that differ", _settings(of)),
        ("samples", "Samples", _samples(of)),
        ("training", "Training", _training(of)),
    ]
    written = [(name, heading, content) for name, heading, content in sections if content is not None]
    if (terms := glossary("".join(content for _, _, content in written))) is not None:
        written.append(("glossary", "Glossary", terms))
    missing = [f"{name}: {what}" for name, each in of.items() for what in _missing(each)]
    data = {str(each.info.get("config", {}).get("data", {}).get("name", "?")) for each in of.values()}
    if len(data) > 1:
        missing.append(
            f"a common data set: the runs are on {', '.join(sorted(data))}, and their numbers are not comparable"
        )
    lead = [element("p", f"{', '.join(of)}; this page by mmebm {__version__}", class_="lead")]
    if missing:
        lead.append(
            element("div", "Not on this page:", element("ul", *(element("li", m) for m in missing)), class_="note")
        )
    return document(f"{len(of)} runs compared", join(*lead), written)


def _missing(of: Opened) -> list[str]:
    found = list(of.missing)
    if of.run is None:
        found.append("samples: there is no checkpoint")
    if of.metrics is None:
        found.append(f"numbers: `mmebm evaluate {of.path}` writes them")
    if not of.log:
        found.append("curves: there is no log")
    return found


def _verdicts(of: Mapping[str, Opened]) -> Html:
    rows = []
    for name, each in of.items():
        verdict = each.verdict
        rows.append([name, element("strong", verdict.word), f"{each.iteration} of {each.total or '?'}", verdict.text])
    return table(("run", "verdict", "iterations", "why"), rows)


def _last(of: Opened) -> tuple[str, dict[str, Any]] | None:
    """The last point that was measured, and its numbers."""
    points = {name: row for name, row in (of.metrics or {}).get("points", {}).items() if isinstance(row, Mapping)}
    name = next((point for point in ("xk", "x0", "frozen", "vae") if point in points), None)
    if name is None:
        return None
    row = {key: value for key, value in points[name].items() if isinstance(value, (int, float))}
    row |= kernel_of(points[name]) | heldout_of(heldout_by(of.metrics or {})[1])
    ways = (of.metrics or {}).get("conditional", {})
    if isinstance(ways, Mapping) and ways:
        way = list(ways.values())[-1]
        for size, value in (way.get("by_given") or {}).items() if isinstance(way, Mapping) else ():
            row[CONDITIONAL.format(size)] = value
    seconds = (of.metrics or {}).get("seconds", {})
    if isinstance(seconds, Mapping) and isinstance(seconds.get("training"), (int, float)):
        row["training, minutes"] = seconds["training"] / 60
    return name, row


def _numbers(of: Mapping[str, Opened]) -> Html | None:
    last = {name: found for name, each in of.items() if (found := _last(each)) is not None}
    if not last:
        return None
    keys = dict.fromkeys(key for _, row in last.values() for key in row)
    keys = [key for key in keys if not key.endswith("_error") and not key.startswith("chance_")]
    best = {key: _best(key, {name: row for name, (_, row) in last.items()}) for key in keys}
    rows = []
    for name, (point, row) in last.items():
        cells = []
        for key in keys:
            error = row.get(f"{key}_error")
            text = with_error(row[key], error) if isinstance(error, float) and key in row else number(row.get(key))
            cells.append(Best(text) if name in best[key] else text)
        rows.append([name, point, *cells])
    marked = (
        "Bold: the best of a column, and what lies within two standard errors of it where errors are known. A "
        "difference between two runs is also one between two seeds."
    )
    return join(
        table(["run", "point", *(NAMES.get(key, key) for key in keys)], rows), element("p", marked, class_="lead")
    )


def _best(key: str, rows: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Of the runs (name -> numbers) those that are best in ``key``; none where all are, or none is better."""
    higher = key in HIGHER or key.startswith(CONDITIONAL.partition("{")[0])
    values = {name: row[key] for name, row in rows.items() if math.isfinite(row.get(key, math.nan))}
    if not (higher or key in LOWER) or len(values) < 2:
        return set()
    first = (max if higher else min)(values, key=lambda name: values[name])

    def tied(name: str) -> bool:
        errors = [rows[each].get(f"{key}_error") or 0.0 for each in (first, name)]
        return abs(values[name] - values[first]) <= 2 * math.hypot(*errors)

    found = {name for name in values if tied(name)}
    return found if len(found) < len(values) else set()


def _settings(of: Mapping[str, Opened]) -> Html | None:
    flat = {name: _flat(each.info.get("config", {})) for name, each in of.items()}
    flat = {name: {**fields, "commit": of[name].info.get("commit")} for name, fields in flat.items() if fields}
    keys = dict.fromkeys(key for fields in flat.values() for key in fields)
    absent = object()
    rows = []
    for key in keys:
        values = [fields.get(key, absent) for fields in flat.values()]
        if any(value != values[0] for value in values):
            rows.append(
                [key, *("–" if value is absent else "null" if value is None else str(value) for value in values)]
            )
    if len(flat) < 2:
        return None
    return table(["field", *flat], rows) if rows else element("p", "None.", class_="lead")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested tables and lists of tables as dotted names."""
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        value = {str(i): item for i, item in enumerate(value)}
    if not isinstance(value, Mapping) or not value:
        return {prefix[:-1]: value} if prefix else {}
    return {name: leaf for key, item in value.items() for name, leaf in _flat(item, f"{prefix}{key}.").items()}


def _samples(of: Mapping[str, Opened]) -> Html | None:
    blocks: dict[str, Any] = {}
    for name, each in of.items():
        if each.run is not None:
            point = (each.run.points or ("vae",))[-1]
            x = each.run.sample(pictures.COLUMNS, point, seed=each.seed)
            blocks[f"{name}, {point}"] = pictures.natural(each.run, x)
    if not blocks:
        return None
    parts = []
    # a modality's vectors may have another length in another run, and another scale
    shapes = {name: [tuple(v.shape[1:]) for v in rows.values()] for name, rows in blocks.items()}
    groups: dict[str, dict[str, Any]] = {}
    for name, rows in blocks.items():
        groups.setdefault(f"{list(rows)} {shapes[name]}", {})[name] = rows
    for index, group in enumerate(groups.values()):
        path = figures.sample_grid(
            group, next(iter(of.values())).drawings / f"samples-{index}.png", columns=pictures.COLUMNS
        )
        parts.append(figure(path, "samples of each run"))
    return join(*parts, element("p", "The last point of each run, all from one seed.", class_="lead"))


def _training(of: Mapping[str, Opened]) -> Html | None:
    logs = {name: columns for name, each in of.items() if (columns := columns_of(each.log))}
    wanted = [key for log in logs.values() for key in log if key != "iteration" and key not in SIDE]
    path = next(iter(of.values())).drawings / "curves.png"
    try:
        figures.overlay(logs, path, quantities=list(dict.fromkeys(wanted)))
    except ValueError:  # nothing was logged
        return None
    return figure(path, "training curves of each run", "Running means. The stages of the runs need not agree.")
