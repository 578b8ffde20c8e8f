"""``mmebm ablate``: trains variants of a preset with several seeds, and writes one table of them all."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmebm.cli.common import pick_device
from mmebm.cli.evaluate import report
from mmebm.cli.train import configure, fit, prepare
from mmebm.files import FolderLock, check_writable, write_atomically
from mmebm.training.run import CHECKPOINT, Run
from mmebm.training.variants import GRIDS, VARIANTS, scaled

JUDGES = "classifiers.pt"


def ablate(arguments: argparse.Namespace) -> int:
    """Runs the command. What is finished in the folder is not trained again; what was cut off goes on."""
    names = variants_of(arguments.variants)
    folder = Path(arguments.out)
    check_writable(folder / "table.json")
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for seed in arguments.seeds:
        for name in names:
            results[name].append(_one(folder / f"{name}-{seed}", name, seed, folder / JUDGES, arguments))
            rows = rows_of({key: value for key, value in results.items() if value})
            text = table(rows, arguments.preset)
            write_atomically(folder / "table.md", lambda file, text=text: file.write(text.encode()))
            plain = json.dumps(rows, indent=2)
            write_atomically(folder / "table.json", lambda file, text=plain: file.write(text.encode()))
    print(text)
    print(f"the runs, table.md and table.json are in {folder}")
    return 0


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


def _one(folder: Path, name: str, seed: int, judges: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    metrics = folder / "metrics.json"
    if not metrics.is_file():
        print(f"== {name}, seed {seed}")
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
                changes=arguments.set,
            )
            config = scaled(config, arguments.scale)
        with FolderLock(folder):
            if not fit(prepare(folder, device, config, threads=arguments.threads), folder):
                raise KeyboardInterrupt
        # all variants see the same data, and are judged by the same classifiers
        if judges.is_file():
            shutil.copyfile(judges, folder / JUDGES)
        report(Run(folder, device), n=arguments.n)
        if not judges.is_file():
            shutil.copyfile(folder / JUDGES, judges)
    return json.loads(metrics.read_text())


def rows_of(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """One row per variant and point: every number as [mean, standard deviation] over the seeds (None for one seed)."""
    rows = []
    for name, runs in results.items():
        for point in runs[0]["points"]:
            of = [run["points"][point] for run in runs]
            row: dict[str, Any] = {"variant": name, "point": point, "seeds": len(runs)}
            for key in ("joint_coherence", "chance_joint", "pair_agreement", "frechet", "class_share_min", "entropy"):
                row[key] = spread([p[key] for p in of if key in p])
            for mode, by in runs[0]["conditional"].items():
                last = list(runs[0]["points"])[-1]
                if point == ("vae" if mode.startswith("vae") else last):
                    for size in by["by_given"]:
                        row[f"{mode}, {size} given"] = spread(
                            [run["conditional"][mode]["by_given"][size] for run in runs]
                        )
            row["seconds"] = spread([run["seconds"].get("training", math.nan) for run in runs])
            row["evaluations"] = spread([float(run["settings"]["evaluations"]) for run in runs])
            rows.append(row)
    return rows


def spread(values: Sequence[float]) -> list[float | None]:
    """[mean, standard deviation]; the deviation is None for fewer than two values, both for none."""
    if not values:
        return [None, None]
    return [statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None]


def table(rows: Sequence[Mapping[str, Any]], preset: str) -> str:
    """The rows as a Markdown table."""

    def cell(value: Sequence[float | None], digits: int, scale: float = 1.0) -> str:
        mean, deviation = value
        if mean is None or math.isnan(mean):
            return ""
        return f"{scale * mean:.{digits}f}" + ("" if deviation is None else f" ± {scale * deviation:.{digits}f}")

    def conditional(row: Mapping[str, Any], size: str) -> str:
        found = {key: value for key, value in row.items() if key.endswith(f", {size} given")}
        return " / ".join(cell(value, 3) for value in found.values())

    sizes = sorted({key.rsplit(", ", 1)[1].split()[0] for row in rows for key in row if key.endswith(" given")})
    header = [
        "variant",
        "point",
        "seeds",
        "joint coherence",
        "by chance",
        "least class share",
        "Frechet distance",
        *(f"conditional, {size} given (A / B / C)" for size in sizes),
        "seconds",
        "gradient evaluations, millions",
    ]
    lines = [
        f"Variants of `{preset}`: mean ± standard deviation over seeds.",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
    ]
    for row in rows:
        lines.append(
            "| "
            + " | ".join(
                [
                    row["variant"],
                    row["point"],
                    str(row["seeds"]),
                    cell(row["joint_coherence"], 3),
                    cell(row["chance_joint"], 3),
                    cell(row["class_share_min"], 3),
                    cell(row["frechet"], 1),
                    *(conditional(row, size) for size in sizes),
                    cell(row["seconds"], 0),
                    cell(row["evaluations"], 1, 1e-6),
                ]
            )
            + " |"
        )
    return "\n".join(lines) + "\n"
