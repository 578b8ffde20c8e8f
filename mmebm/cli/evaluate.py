"""``mmebm evaluate``, and the end of ``mmebm train``: numbers and pictures of a run."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mmebm.cli.common import pick_device
from mmebm.evaluation import FeatureExtractor, Inception, Lite0, data_chain, figures
from mmebm.evaluation.classifiers import Classifiers, fit_classifiers
from mmebm.evaluation.evaluate import evaluate as measure
from mmebm.evaluation.evaluate import table
from mmebm.evaluation.matching import Features, match_report, match_table, matched_pairs
from mmebm.files import check_writable, write_atomically
from mmebm.plugins import by_path, find
from mmebm.training.fitting import CHECKPOINTS
from mmebm.training.run import Run
from mmebm.training.system import System

TITLES = {
    "vae": "VAE only",
    "frozen": "frozen: Langevin on top of the VAE",
    "x0": "x0: generator",
    "xk": "xk: after Langevin",
}


def evaluate(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    if arguments.n < 100:
        raise ValueError(f"--n must be at least 100 for a Frechet distance, got {arguments.n}")
    run = Run(
        arguments.run, pick_device(arguments.device), prior_steps=arguments.prior_steps, data_path=arguments.data_path
    )
    n = min(arguments.n, len(run.dataset("test")))
    networks, functions = split_features(arguments.features, run)
    more: dict[str, Any] = {"features": networks}
    systems = _systems(run)
    judges = {name: find("judges", name) for name in arguments.judge}
    for name in ("pairs", "latent", "likelihood"):
        if getattr(arguments, name):
            if not run.infers and name != "likelihood":
                raise ValueError(f"--{name} needs an inference network, which this run does not train")
            if name == "latent" and not classes_shared(run):
                raise ValueError("--latent reads classes off z, and no test tuple has the class of a training tuple")
            more[name] = systems
    if arguments.sweep:
        chains = {"frozen": run.frozen, "xk": run.system}
        more["sweep"] = {
            name: data_chain(system, n, seed=arguments.seed, start=run.start(n, seed=arguments.seed, system=system))
            for name, system in chains.items()
            if system is not None and name in run.points
        }
    arguments.result = report(
        run, n=arguments.n, steps=arguments.steps, seed=arguments.seed, own=judges, functions=functions, **more
    )
    return 0


def _systems(run: Run) -> dict[str, System]:
    """The networks of a run by the point that their samples are."""
    trained = {"vae": run.vae if "vae" in run.points else None, "x0": run.system if run.joint_trained else None}
    return {name: system for name, system in trained.items() if system is not None}


def _network(name: str, run: Run) -> FeatureExtractor:
    """The network that ``--features`` names."""
    kind, _, file = name.partition(":")
    if kind == "lite0" and not file:
        return Lite0(device=run.device)
    if kind == "inception" and file:
        return Inception(file, device=run.device)
    raise ValueError(f"--features takes lite0, inception:FILE or MODALITY=package.module:function, got {name!r}")


def split_features(names: Sequence[str], run: Run) -> tuple[list[FeatureExtractor], dict[str, Features]]:
    """What ``--features`` names: networks for distances, and functions by modality for the score of captions.

    Images that have no function of their own are seen by the first network there.

    Raises:
        ValueError: for a name that is none, or a modality that the score does not look at.
    """
    networks = [_network(name, run) for name in names if "=" not in name]
    pairs = matched_pairs(run.modalities)
    known = {m.name: m for pair in pairs for m in pair}
    functions: dict[str, Features] = {}
    if networks:
        functions = {m.name: _of_network(networks[0]) for m in known.values() if m.kind == "image"}
    for name in names:
        modality, equals, path = name.partition("=")
        if equals and modality not in known:
            raise ValueError(
                f"--features {name}: the score of captions looks at {sorted(known) or 'nothing in this set'}"
            )
        if equals:
            functions[modality] = by_path(path)
    return networks, functions


def _of_network(network: FeatureExtractor) -> Features:
    """Its features of images in [0, 1]."""
    return lambda images: network.features(torch.from_numpy(images) * 2 - 1)


def classes_shared(run: Run) -> bool:
    """Whether the train and the test split have a class in common: of CUB's species as divided in its captions, none
    is in both."""
    classes = [set(run.dataset(split).labels.unique().tolist()) - {-1} for split in ("train", "test")]
    return bool(classes[0] & classes[1])


def _classifiers(run: Run) -> Classifiers | None:
    """The run's classifiers, fitted once and kept in its folder; None where there is nothing for them to learn."""
    if not classes_shared(run):
        if run.dataset("test").classes:
            print("no classifiers: the test tuples are of other classes than the training tuples")
        return None
    path = run.folder / "classifiers.pt"
    # a checkpoint that was kept is judged by those of its run
    for file in (path, run.folder.parent.parent / path.name):
        if file.is_file() and (file == path or run.folder.parent.name == CHECKPOINTS):
            return Classifiers.load(file, run.device)
    print("fitting the classifiers that judge the samples")
    judges = fit_classifiers(run.dataset("train"), run.dataset("test"), device=run.device)
    judges.save(path)
    return judges


def report(
    run: Run,
    *,
    n: int = 2000,
    steps: int | None = None,
    seed: int = 0,
    own: Mapping[str, Callable[..., Mapping[str, float]]] | None = None,
    functions: Mapping[str, Features] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Measures the run, prints the table, and writes ``metrics.json`` and the pictures into its folder. ``own`` are
    functions of the samples of a point and of real tuples, ``{modality: natural values}`` both, that return numbers by
    name; ``functions`` are features by modality for the score of captions (:mod:`mmebm.evaluation.matching`); ``more``
    are options of :func:`mmebm.evaluation.evaluate.evaluate`."""
    check_writable(run.folder / "metrics.json")
    judges = _classifiers(run)
    test = run.dataset("test")
    points, seconds = {}, {}
    n = min(n, len(test))
    for point in run.points:
        started = time.perf_counter()
        points[point] = run.sample(n, point, seed=seed, steps=steps)
        seconds[point] = time.perf_counter() - started
    started = time.perf_counter()
    result = measure(
        points,
        run.completions(steps),
        test,
        run.dataset("train"),
        judges,
        seed=seed,
        heldout=_systems(run) if run.infers else None,
        validation=run.validation(),
        **more,
    )
    if own:
        names = {m.name: m for m in test.modalities}
        real = {name: names[name].natural(x) for name, x in run.real(n, split="test", seed=seed).items()}
        natural = {p: {name: names[name].natural(x) for name, x in of.items()} for p, of in points.items()}
        result["judges"] = {
            name: {point: {key: float(value) for key, value in judge(x, real).items()} for point, x in natural.items()}
            for name, judge in own.items()
        }
    matching = match_report(points, run.completions(steps), test, run.dataset("train"), functions, seed=seed)
    if matching:
        result["matching"] = matching
    seconds["evaluation"] = time.perf_counter() - started
    if run.seconds_training is not None:
        seconds["training"] = run.seconds_training
    settings = {**run.settings(steps), "seed": seed, "n": n}
    result = {"settings": settings, "seconds": seconds, "peak_memory_mib": run.peak_memory, **result}
    text = json.dumps(result, indent=2)
    write_atomically(run.folder / "metrics.json", lambda file: file.write(text.encode()))
    print(table(result))
    if matching:
        print(f"\n{match_table(matching)}")
    for name, by_point in result.get("judges", {}).items():
        for point, values in by_point.items():
            print(f"{name}, {point}: {', '.join(f'{key} {value:.4g}' for key, value in values.items())}")

    names = {m.name: m for m in test.modalities}
    columns = 12
    blocks = {
        TITLES[point]: {name: m.natural(x[name][:columns]) for name, m in names.items()} for point, x in points.items()
    }
    figures.sample_grid(blocks, run.folder / "samples.png", columns=columns)
    if "xk" in run.points:
        states, marks = run.trajectory(4, seed=seed)
        frames = {name: _frames(m, states[name]) for name, m in names.items()}
        figures.trajectory_grid(frames, marks, run.folder / "trajectory.png")
    _curves(run)
    print(f"pictures and metrics.json are in {run.folder}")
    return result


def _frames(modality: Any, states: Any) -> Any:
    flat = modality.natural(states.flatten(0, 1))
    return flat.reshape(*states.shape[:2], *flat.shape[1:])


def _curves(run: Run) -> None:
    rows = [row for row in run.log() if "rolled_back" not in row]
    if not rows:
        return
    names = dict.fromkeys(name for row in rows for name, value in row.items() if isinstance(value, float))
    columns = {name: [row.get(name, math.nan) for row in rows] for name in ("iteration", *names)}
    begins, total = {}, 0
    for number, stage in enumerate(run.config.stages, start=1):
        begins[f"{number} {stage.kind}"] = float(total)
        total += stage.iterations
    figures.curves(columns, run.folder / "curves.png", stages=begins)
