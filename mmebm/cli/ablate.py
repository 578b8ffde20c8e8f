"""``mmebm ablate``: trains variants of a preset with several seeds, and writes one table of them all."""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmebm.cli.common import pick_device
from mmebm.cli.evaluate import JUDGES, report, said_of_test
from mmebm.cli.train import configure, fit, prepare
from mmebm.data.base import Split
from mmebm.evaluation.intervals import Interval, mean_interval, paired_interval
from mmebm.files import FolderLock, check_writable, write_atomically
from mmebm.training.run import CHECKPOINT, Run
from mmebm.training.trainer import TrainingDiverged
from mmebm.training.tuning import grid, said, same, timed
from mmebm.training.variants import GRIDS, VARIANTS, scaled

DIVERGED = "diverged.txt"
CONDITIONAL = "{}, {} given"

# Columns of the table, by the names of numbers in a row: heading, digits.
COLUMNS = {
    "joint_coherence": ("joint coherence", 3),
    "second_joint_coherence": ("by the second judge", 3),
    "chance_joint": ("by chance", 3),
    "class_share_min": ("least class share", 3),
    "frechet": ("Frechet distance", 1),
    "kernel_features": ("kernel distance", 3),
    "precision": ("precision", 3),
    "recall": ("recall", 3),
    "spread_min": ("least spread", 2),
    "nearest": ("nearest", 2),
}
# Which end of a number is the good one, for choosing by it.
BETTER: dict[str, Callable[..., Any]] = {
    name: max for name in ("joint_coherence", "second_joint_coherence", "precision", "recall", "pair_agreement")
} | {name: min for name in ("frechet", "kernel_features")}


def ablate(arguments: argparse.Namespace) -> int:
    """Runs the command. What is finished in the folder is not trained again; what was cut off goes on."""
    names = variants_of(arguments.variants)
    pairs = [pair_of(text, names) for text in arguments.pairs]
    folder = Path(arguments.out)
    check_writable(folder / "table.json")
    chosen = tuned(names, folder, arguments) if arguments.tune else {}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    table_file = folder / ("table-test" if arguments.split == "test" else "table")
    content: dict[str, Any] = {}
    text = ""
    for seed in arguments.seeds:
        for name in names:
            results[name].append(
                _one(folder / f"{name}-{seed}", name, seed, folder, arguments, chosen.get(name, {}), arguments.split)
            )
            content = summary({key: value for key, value in results.items() if value}, arguments.seeds)
            content = {"preset": arguments.preset, "scale": arguments.scale, "seconds": arguments.seconds, **content}
            content["chosen"] = chosen
            complete = all(len(runs) == len(results[names[0]]) for runs in results.values())
            content["pairs"] = [differences(results, *pair) for pair in pairs] if complete else []
            text = table(content)
            _write(table_file.with_suffix(".md"), text)
            _write(table_file.with_suffix(".json"), json.dumps(content, indent=2))
    print(text)
    print(f"the runs, {table_file.name}.md and {table_file.name}.json are in {folder}")
    arguments.result = content
    return 0


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def variants_of(asked: Sequence[str]) -> list[str]:
    """The variants that names of variants and of grids stand for, each once, in the order asked for.

    Raises:
        ValueError: for a name that is neither.
    """
    out: list[str] = []
    for name in asked:
        if name not in GRIDS and name not in VARIANTS:
            raise ValueError(f"{name!r} is no grid {sorted(GRIDS)} and no variant {sorted(VARIANTS)}")
        out += GRIDS.get(name, (name,))
    return list(dict.fromkeys(out))


def pair_of(text: str, names: Sequence[str]) -> tuple[tuple[str, str | None], tuple[str, str | None]]:
    """The two sides of A:B, each a variant with or without a point after a slash.

    Raises:
        ValueError: for another form, or a variant that is not trained.
    """
    sides = []
    for side in text.split(":"):
        name, _, point = side.partition("/")
        if name not in names:
            raise ValueError(f"--pairs takes A:B, variants of this command {list(names)}, got {text!r}")
        sides.append((name, point or None))
    if len(sides) != 2:
        raise ValueError(f"--pairs takes A:B or A/POINT:B/POINT, got {text!r}")
    return sides[0], sides[1]


# ---------------------------------------------------------------------------------------------- runs


def _one(
    folder: Path,
    name: str,
    seed: int,
    home: Path,
    arguments: argparse.Namespace,
    changes: Mapping[str, str],
    split: Split | None,
    scale: float | None = None,
) -> dict[str, Any]:
    """The numbers of a run, trained and measured where it is not yet."""
    if (found := _measured(folder, split)) is not None:
        _check_settings(folder, changes)
        return found
    print(f"== {name}, seed {seed}" + (f": {said(dict(changes))}" if changes else ""))
    device = pick_device(arguments.device)
    config = None
    if not (folder / CHECKPOINT).is_file():
        config = configure(
            f"{arguments.preset}/{name}",
            data=arguments.data,
            data_path=arguments.data_path,
            seed=seed,
            threads=arguments.threads,
            imports=arguments.imports,
            # a seed is all that is drawn: weights and batches, crops and pairs, and the judges (by the run's seed)
            changes=[f"data.seed={seed}", *arguments.set, *(f"{key}={value}" for key, value in changes.items())],
        )
        config = scaled(config, arguments.scale * (scale or 1.0))
        if arguments.seconds is not None:
            config = timed(config, arguments.seconds * (scale or 1.0), arguments.clock)
    else:
        _check_settings(folder, changes)
    with FolderLock(folder):
        try:
            if not fit(prepare(folder, device, config, threads=arguments.threads), folder):
                raise KeyboardInterrupt
        except TrainingDiverged as error:  # is judged as it was when it last was well, and the table says so
            _write(folder / DIVERGED, str(error))
    # all variants of a seed see the same data, and are judged by the same classifiers
    for kept in JUDGES.values():
        shared = home / f"{Path(kept).stem}-{seed}.pt"
        if shared.is_file() and not (folder / kept).is_file():
            shutil.copyfile(shared, folder / kept)
    report(Run(folder, device), split=split, n=arguments.n)
    for kept in JUDGES.values():
        shared = home / f"{Path(kept).stem}-{seed}.pt"
        if not shared.is_file() and (folder / kept).is_file():
            shutil.copyfile(folder / kept, shared)
    found = _measured(folder, split)
    assert found is not None
    return found


def _measured(folder: Path, split: Split | None) -> dict[str, Any] | None:
    """The numbers that are there; for ``split`` None those of the split that the run is looked at on."""
    for file in (folder / f"metrics-{split}.json", folder / "metrics.json"):
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            if split is None or found.get("split", "test") == split:
                return {**found, "diverged": (folder / DIVERGED).is_file()}
    return None


def _check_settings(folder: Path, changes: Mapping[str, str]) -> None:
    plain = json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]
    if changes and not same(plain, dict(changes)):
        raise ValueError(
            f"{folder} holds a run with other settings than the chosen {said(dict(changes))}: give another --out, or "
            "remove it"
        )


def tuned(names: Sequence[str], folder: Path, arguments: argparse.Namespace) -> dict[str, dict[str, str]]:
    """The settings of the grid that are best on the validation, by variant, and ``tuning.json`` with every try."""
    settings, by = grid(arguments.tune), arguments.select
    if by not in BETTER:
        raise ValueError(f"--select must be one of {sorted(BETTER)}, got {by!r}")
    out: dict[str, dict[str, str]] = {}
    record: dict[str, Any] = {"by": by, "seeds": arguments.tune_seeds, "scale": arguments.tune_scale, "variants": {}}
    for name in names:
        tries = []
        for number, changes in enumerate(settings):
            values = []
            for seed in arguments.tune_seeds:
                run = folder / "tuning" / f"{name}-{number}-{seed}"
                of = _one(run, name, seed, folder, arguments, changes, "validation", arguments.tune_scale)
                values.append(numbers_of(of, list(of["points"])[-1]).get(by, math.nan))
            tries.append({"settings": changes, "values": values, "mean": mean_interval(values).mean})
        usable = [one for one in tries if one["mean"] is not None and math.isfinite(one["mean"])]
        if not usable:
            raise ValueError(f"no try of {name!r} has a {by}: choose by another with --select")
        out[name] = BETTER[by](usable, key=lambda one: one["mean"])["settings"]
        record["variants"][name] = {"chosen": out[name], "tries": tries}
        _write(folder / "tuning.json", json.dumps(record, indent=2))
        print(f"{name}: {said(out[name])} is best on the validation by {by}")
    return out


# ---------------------------------------------------------------------------------------------- rows


def numbers_of(metrics: Mapping[str, Any], point: str) -> dict[str, float]:
    """The numbers of one run at one of its points, by name; conditional ones where the point is completed from."""
    row = metrics["points"][point]
    numbers = {key: value for key, value in row.items() if isinstance(value, (int, float))}
    out = {key: float(value) for key, value in numbers.items()}
    second = row.get("second_judge", {})
    out |= {f"second_{key}": second[key] for key in ("joint_coherence", "class_share_min") if key in second}
    last = list(metrics["points"])[-1]
    for mode, by in metrics["conditional"].items():
        if point == ("vae" if mode.startswith("vae") else last):
            out |= {CONDITIONAL.format(mode, size): value for size, value in by["by_given"].items()}
            others = by.get("by_given_second", {})
            out |= {CONDITIONAL.format(f"second judge, {mode}", size): value for size, value in others.items()}
    out["seconds"] = metrics["seconds"].get("training", math.nan)
    out["evaluations"] = float(metrics["settings"]["evaluations"])
    return out


def summary(results: Mapping[str, Sequence[Mapping[str, Any]]], seeds: Sequence[int]) -> dict[str, Any]:
    """``rows``, one per variant and point: every number as {"mean", "interval" (half of the 95 % one), "values" by
    seed}; and ``real``, the same of real tuples against others."""
    rows = []
    for name, runs in results.items():
        for point in runs[0]["points"]:
            each = [numbers_of(run, point) for run in runs if point in run["points"]]
            row: dict[str, Any] = {"variant": name, "point": point, "seeds": list(seeds[: len(runs)])}
            row["numbers"] = {key: _spread([of[key] for of in each if key in of]) for key in each[0] if key != "n"}
            if any(run.get("diverged") for run in runs):
                row["diverged"] = sum(bool(run.get("diverged")) for run in runs)
            rows.append(row)
    first = next(iter(results.values()))
    bare = {"conditional": {}, "seconds": {}, "settings": {"evaluations": 0}}
    real = [numbers_of({"points": {"real": run["floor"]}, **bare}, "real") for run in first if "floor" in run]
    more: dict[str, Any] = {"split": first[0].get("split", "test"), "n": first[0]["settings"].get("n")}
    if real:
        skip = ("n", "seconds", "evaluations")
        more["real"] = {key: _spread([of[key] for of in real if key in of]) for key in real[0] if key not in skip}
    uses = [run["test"]["evaluated"] for runs in results.values() for run in runs if "test" in run]
    if uses:
        more["test evaluated"] = {"least": min(uses), "most": max(uses)}
    accuracy = [run.get("classifiers", {}) for run in first]
    more["judges"] = {
        "convolutional": {m: _spread([of[m] for of in accuracy if m in of]) for m in accuracy[0]},
        "gradients": {
            m: _spread([run["second_judge"]["accuracy"][m] for run in first if "second_judge" in run])
            for m in first[0].get("second_judge", {}).get("accuracy", {})
        },
    }
    return {**more, "rows": rows}


def _spread(values: Sequence[float]) -> dict[str, Any]:
    found = mean_interval([value for value in values if not math.isnan(value)])
    return {"mean": found.mean, "interval": found.half, "values": [None if math.isnan(v) else v for v in values]}


def differences(
    results: Mapping[str, Sequence[Mapping[str, Any]]], one: tuple[str, str | None], other: tuple[str, str | None]
) -> dict[str, Any]:
    """Of every number that both have, the differences between runs of one seed: mean, interval and values."""
    sides = []
    for name, point in (one, other):
        points = list(results[name][0]["points"])
        at = point or points[-1]
        if at not in points:
            raise ValueError(f"variant {name!r} has no point {at!r}, only {points}")
        sides.append((f"{name}/{at}", [numbers_of(run, at) for run in results[name]]))
    found: dict[str, Any] = {}
    for key in sides[0][1][0]:
        a, b = ([of.get(key, math.nan) for of in runs] for _, runs in sides)
        if key == "n" or not all(map(math.isfinite, (*a, *b))):
            continue
        interval = paired_interval(a, b)
        found[key] = {
            "mean": interval.mean,
            "interval": interval.half,
            "values": [x - y for x, y in zip(a, b, strict=True)],
        }
    return {"of": sides[0][0], "minus": sides[1][0], "differences": found}


# ---------------------------------------------------------------------------------------------- the table


def cell(number: Mapping[str, Any] | None, digits: int, scale: float = 1.0, *, signed: bool = False) -> str:
    """A number with its interval, empty for none."""
    if number is None or number.get("mean") is None:
        return ""
    sign = "+" if signed else ""
    text = f"{scale * number['mean']:{sign}.{digits}f}"
    return text if number.get("interval") is None else f"{text} ± {scale * number['interval']:.{digits}f}"


def table(content: Mapping[str, Any]) -> str:
    """The rows as a Markdown table, and the pairs as another."""
    rows = content["rows"]
    given = [key for row in rows for key in row["numbers"] if key.endswith(" given")]
    sizes = sorted({key.rsplit(", ", 1)[1].split()[0] for key in given})

    def conditional(row: Mapping[str, Any], size: str) -> str:
        found = {
            key: value
            for key, value in row["numbers"].items()
            if key.endswith(f", {size} given") and not key.startswith("second judge")
        }
        return " / ".join(cell(value, 3) for value in found.values())

    seconds = content.get("seconds")
    equal = f", each trained for {seconds:g} measured seconds" if seconds else ""
    split = content.get("split", "test")
    times = content.get("test evaluated", {}).get("most")
    head = ["variant", "point", "seeds", *(heading for heading, _ in COLUMNS.values())]
    head += [*(f"conditional, {size} given (A / B / C)" for size in sizes), "seconds", "gradient evaluations, millions"]
    lines = [
        f"Variants of `{content['preset']}` on {split}{equal}: mean ± half of the 95 % interval over seeds (Student).",
        *([said_of_test(times) + "."] if times else []),
        "",
        _line(head),
        "|" + "---|" * len(head),
    ]
    for row in rows:
        numbers = row["numbers"]
        name = row["variant"] + (f" ({row['diverged']} diverged)" if row.get("diverged") else "")
        cells = [cell(numbers.get(key), digits) for key, (_, digits) in COLUMNS.items()]
        cells += [conditional(row, size) for size in sizes]
        cells += [cell(numbers.get("seconds"), 0), cell(numbers.get("evaluations"), 1, 1e-6)]
        lines.append(_line([name, row["point"], str(len(row["seeds"])), *cells]))
    if "real" in content:
        cells = [cell(content["real"].get(key), digits) for key, (_, digits) in COLUMNS.items()]
        lines.append(_line(["real", "", str(len(rows[0]["seeds"])), *cells, *[""] * (len(sizes) + 2)]))
    for name, accuracy in content.get("judges", {}).items():
        if accuracy:
            told = ", ".join(f"{modality} {cell(number, 3)}" for modality, number in accuracy.items())
            lines += ["", f"Accuracy of the judges, {name}: {told}."]
    if any(content.get("chosen", {}).values()):
        lines += ["", "Settings chosen on the validation:", ""]
        lines += [f"* {name}: {said(changes)}" for name, changes in content["chosen"].items()]
    if content.get("pairs"):
        head = ["of", "minus", *(heading for heading, _ in COLUMNS.values())]
        lines += ["", "Paired differences, by seed; * where the interval excludes 0:", "", _line(head)]
        lines.append("|" + "---|" * len(head))
        for pair in content["pairs"]:
            cells = []
            for key, (_, digits) in COLUMNS.items():
                number = pair["differences"].get(key)
                text = cell(number, digits, signed=True)
                told = number and Interval(number["mean"], number["interval"], 0).excludes_zero
                cells.append(f"{text} *" if text and told else text)
            lines.append(_line([pair["of"], pair["minus"], *cells]))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
