"""``mmebm report``: a run on one HTML page, or several compared."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mmebm.cli.common import pick_device
from mmebm.files import check_writable, write_atomically
from mmebm.training.run import CHECKPOINT, Run

MIXING = "mixing.json"


def report(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from mmebm.report import write_report

    if len(arguments.run) > 1:
        return _compare(arguments)
    folder = Path(arguments.run[0])
    if arguments.out is not None or folder.is_dir():
        check_writable(arguments.out or folder / "report.html")
    device, path = pick_device(arguments.device), arguments.data_path
    run = Run(folder, device, data_path=path) if (folder / CHECKPOINT).is_file() else None
    mixing = None
    if arguments.mixing:
        # with the error of a missing checkpoint, where there is none
        run = run or Run(folder, device, data_path=path)
        mixing = examined(run, chains=arguments.chains, long=arguments.long, seed=arguments.seed)
    path = write_report(folder, run, mixing=mixing, seed=arguments.seed, out=arguments.out)
    arguments.result = {"out": str(path)}
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from mmebm.report import write_comparison

    if arguments.mixing or arguments.data_path is not None:
        raise ValueError("--mixing and --data-path are for a report of one run")
    out = arguments.out or "comparison.html"
    check_writable(out)
    device = pick_device(arguments.device)
    folders = list(dict.fromkeys(Path(run) for run in arguments.run))
    runs = {folder: Run(folder, device) if (folder / CHECKPOINT).is_file() else None for folder in folders}
    path = write_comparison(runs, out, seed=arguments.seed)
    arguments.result = {"out": str(path)}
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
    return 0


def examined(run: Run, *, chains: int, long: int, seed: int) -> dict[str, Any]:
    """The examination of this checkpoint with these settings, from the run's folder where it is there already."""
    from mmebm.evaluation.classifiers import Classifiers
    from mmebm.evaluation.mixing import mixing

    path, judges = run.folder / MIXING, run.folder / "classifiers.pt"
    judged = judges.is_file()
    wanted = {"iteration": run.content["iteration"], "seed": seed, "chains": chains, "long": long, "judged": judged}
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if {key: found.get("settings", {}).get(key) for key in wanted} == wanted:
            return found
    if not judged and run.content.get("data", {}).get("classes") != []:  # of a set without classes nothing is missing
        print(f"no classes and distances: {judges} is missing; `mmebm evaluate` fits the classifiers")
    classifiers = Classifiers.load(judges, run.device) if judged else None
    found = mixing(run, classifiers, chains=chains, long=long, seed=seed, progress=print)
    found["settings"]["judged"] = judged
    text = json.dumps(found, allow_nan=False)
    write_atomically(path, lambda file: file.write(text.encode()))
    return found
