"""``mmebm figure N RUN...``: the figures of the paper, drawn from runs of one's own."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmebm.cli.common import pick_device
from mmebm.cli.evaluate import classes_shared, split_features
from mmebm.evaluation import figures
from mmebm.evaluation.latent import encoders, interpolate_prior, latent_report
from mmebm.evaluation.matching import Features, match_report, match_table
from mmebm.files import check_writable
from mmebm.report import pictures
from mmebm.report.sections import columns_of
from mmebm.training.run import Run, read_log

COLUMNS, PATHS = 12, 3
SCORED = 256  # rows of the score of captions


def figure(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    number = arguments.figure
    out = Path(arguments.out or f"figure-{number}.png")
    if out.suffix != ".png":
        raise ValueError(f"--out must end in .png, got {arguments.out!r}")
    check_writable(out)
    folders = list(dict.fromkeys(Path(run) for run in arguments.run))
    if arguments.features and number not in ("7", "8"):
        raise ValueError(f"--features are for the score of captions, of figures 7 and 8, got figure {number}")
    arguments.result = {}
    if number in SEVERAL:
        written = [SEVERAL[number](folders, out)]
    else:
        if len(folders) > 1:
            raise ValueError(f"figure {number} is of one run, got {len(folders)}")
        run = Run(folders[0], pick_device(arguments.device), data_path=arguments.data_path)
        functions = split_features(arguments.features, run)[1]
        written = ONE[number](run, out, arguments.seed)
        if number in ("7", "8") and (score := caption_score(run, number, functions, arguments.seed)):
            arguments.result["matching"] = score
            print(match_table(score))
    arguments.result["out"] = [str(path) for path in written]
    print("\n".join(map(str, written)))
    return 0


# ---------------------------------------------------------------------------------------------- of several runs


def coherence_and_distance(folders: Sequence[Path], out: Path) -> Path:
    """Figure 1: a point per run, runs of one variant joined by beta: joint samples, and completions from one modality.

    Of each run its last point, and of the ways to complete the last one; read from ``metrics.json``. The distance is
    that of the joint samples in both panels.
    """
    joint, given = {}, {}
    for folder in folders:
        file = folder / "metrics.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: `mmebm evaluate {folder}` writes it")
        metrics = json.loads(file.read_text(encoding="utf-8"))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]
        last = list(metrics["points"].values())[-1]
        if "joint_coherence" not in last or "frechet" not in last:
            raise ValueError(f"{file} has no coherence or distance: the data has no classes to judge by")
        model, beta = config["preset"].partition("@")[0], float(config["loss"]["beta"])
        joint.setdefault(model, []).append((beta, last["frechet"], last["joint_coherence"]))
        ways = list(metrics["conditional"].values())
        if ways and "1" in ways[-1]["by_given"]:
            given.setdefault(model, []).append((beta, last["frechet"], ways[-1]["by_given"]["1"]))

    # one preset's variants by their own names
    presets = {model.partition("/")[0] for model in joint}
    short = {model: model.partition("/")[2] or model if len(presets) == 1 else model for model in joint}

    def noted(models: Mapping[str, Sequence[tuple[float, float, float]]]) -> dict[str, list[tuple[float, float, str]]]:
        return {
            short[model]: [(x, y, f"β={beta:g}" if len(points) > 1 else "") for beta, x, y in sorted(points)]
            for model, points in models.items()
        }

    panels = {"unconditional": noted(joint), "one modality given": noted(given)}
    return figures.scatter(panels, out, x="Frechet distance of joint samples", y="coherence")


def losses(names: Sequence[str]) -> Callable[[Sequence[Path], Path], Path]:
    """Figures 2 and 3: what the logs hold of these, a line per run, in the stages that have them."""

    def draw(folders: Sequence[Path], out: Path) -> Path:
        labels = [folder.name for folder in folders]
        labels = labels if len(set(labels)) == len(labels) else [str(folder) for folder in folders]
        logs = {}
        for label, folder in zip(labels, folders, strict=True):
            log = columns_of(read_log(folder))
            if not set(names) & set(log):
                raise ValueError(f"{folder} has no log of {' or '.join(names)}: did a joint stage begin?")
            logs[label] = {name: values for name, values in log.items() if name in ("iteration", *names)}
        return figures.overlay(logs, out, quantities=names, columns=2)

    return draw


# ---------------------------------------------------------------------------------------------- of one run


def chains(run: Run, out: Path, seed: int) -> list[Path]:
    """Figure 4: both chains every second step, a file each."""
    found = pictures.revisions(run, out.parent, seed=seed, chains=2)
    if not found:
        raise ValueError("this run has no chain that means anything: neither its energy nor its inference has learned")
    return [path.replace(out.with_stem(f"{out.stem}-{path.stem}")) for path, _ in found.values()]


def samples(run: Run, out: Path, seed: int) -> list[Path]:
    """Figures 5, 7 and 9: joint samples of the last point."""
    point = (run.points or ("vae",))[-1]
    drawn = pictures.natural(run, run.sample(COLUMNS, point, seed=seed))
    return [figures.sample_grid({"unconditional": drawn}, out, columns=COLUMNS)]


def paths(run: Run, out: Path, seed: int) -> list[Path]:
    """Figure 6: from one draw of the prior to another, each point revised by the data chain where there is one."""
    made = interpolate_prior(run.system, PATHS, 11, seed=seed, data_steps=None if run.revises else 0)
    strips = {f"path {i + 1}": pictures.natural(run, {k: v[i] for k, v in made.items()}) for i in range(PATHS)}
    return [figures.interpolation_grid(strips, out)]


def caption_score(run: Run, number: str, functions: Mapping[str, Features], seed: int) -> dict[str, Any]:
    """How well captions fit images: in joint samples of the last point (figure 7), or in completions (8)."""
    point = (run.points or ("vae",))[-1]
    points = {point: run.sample(SCORED, point, seed=seed)} if number == "7" else {}
    ways = {} if number == "7" else run.completions()
    return match_report(points, ways, run.dataset("test"), run.dataset("train"), functions, n=SCORED, seed=seed)


def completions(run: Run, out: Path, seed: int) -> list[Path]:
    """Figures 8 and 10: each modality given alone, and the others as every way completes them."""
    written = pictures.completions(run, out, seed=seed)
    if written is None:
        raise ValueError("this run completes nothing: it has one modality, or nothing of it has learned to")
    return [written]


def classes(run: Run, out: Path, seed: int) -> list[Path]:
    """Figure A.1: accuracy of classes read off z by the number of modalities, before and after the latent chain."""
    if not classes_shared(run):
        raise ValueError("there is no class to read off z: the set has none, or its test tuples are of other classes")
    found = latent_report(encoders(run.system), run.dataset("train"), run.dataset("test"), seed=seed)
    of = found["mean, 500 rows"]
    sizes = [int(size) for size in of["q"]["by_given"]]
    panel = {name: list(of[key]["by_given"].values()) for key, name in (("q", "q(z | x)"), ("z_k", "z_k"))}
    title = "accuracy of classes read off z"
    return [figures.lines({title: panel}, out, x=sizes, label="modalities given", columns=1, counts=True)]


SEVERAL: dict[str, Callable[[Sequence[Path], Path], Path]] = {
    "1": coherence_and_distance,
    "2": losses(("loss_energy", "gap")),
    "3": losses(("loss_generator", "mse")),
}
ONE: dict[str, Callable[[Run, Path, int], list[Path]]] = {
    "4": chains,
    "5": samples,
    "6": paths,
    "7": samples,
    "8": completions,
    "9": samples,
    "10": completions,
    "A.1": classes,
}
