"""The whole evaluation of a model, given as functions that draw from it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mmebm.data.base import MultimodalDataset
from mmebm.evaluation.classifiers import Classifiers
from mmebm.evaluation.metrics import (
    binomial_error,
    chance_agreement,
    class_balance,
    frechet_distance,
    joint_coherence,
    kernel_distance,
    pair_agreement,
)

Batch = Mapping[str, Tensor]
Complete = Callable[[Batch, int], Batch]


def evaluate_samples(samples: Batch, real: Batch, classifiers: Classifiers, n_classes: int) -> dict[str, Any]:
    """One set of joint samples against as many real tuples.

    Returns:
        ``joint_coherence`` with its standard error, ``pair_agreement``, what the marginals alone would give of both
        (``chance_joint``, ``chance_pair``), the smallest and largest class share over the modalities and the lowest
        normalised entropy, and per modality with features the Frechet and the kernel distance; ``frechet`` is their
        mean.
    """
    pred = classifiers.predict(samples)
    n = pred.shape[0]
    joint = joint_coherence(pred)
    chance = chance_agreement(pred, n_classes)
    balance = class_balance(pred, n_classes)
    fake, true = classifiers.features(samples), classifiers.features(real)
    learned = [name for name in fake if name in classifiers.learned]
    frechet = {name: frechet_distance(fake[name], true[name]) for name in learned}
    kernel = {name: kernel_distance(fake[name], true[name])._asdict() for name in learned}
    return {
        "n": n, "joint_coherence": joint, "joint_coherence_error": binomial_error(joint, n),
        "pair_agreement": pair_agreement(pred), "chance_joint": chance.joint, "chance_pair": chance.pair,
        "class_share_min": balance.shares.min().item(), "class_share_max": balance.shares.max().item(),
        "entropy": balance.entropy.min().item(), "frechet": sum(frechet.values()) / max(len(frechet), 1),
        "frechet_by_modality": frechet, "kernel_by_modality": kernel,
    }  # fmt: skip


def evaluate_conditional(
    complete: Complete, test: MultimodalDataset, classifiers: Classifiers, *, rows: Tensor, seed: int
) -> dict[str, Any]:
    """Conditional coherence by the number of given modalities, over every subset and every target outside it.

    Returns:
        ``by_given``: {number given: mean accuracy of the targets against the true class}, and ``by_subset``:
        {"a+b": {target: accuracy}}.
    """
    names = [m.name for m in test.modalities]
    real = test.batch(rows)
    labels = test.labels[rows].cpu()
    by_subset: dict[str, dict[str, float]] = {}
    by_given: dict[str, float] = {}
    for size in range(1, len(names)):
        values = []
        for given in itertools.combinations(names, size):
            x = complete({name: real[name] for name in given}, seed)
            pred = classifiers.predict(x).cpu()
            scores = {
                name: (pred[:, j] == labels).double().mean().item() for j, name in enumerate(names) if name not in given
            }
            by_subset["+".join(given)] = scores
            values += scores.values()
        by_given[str(size)] = sum(values) / len(values)
    return {"n": len(rows), "by_given": by_given, "by_subset": by_subset}


def evaluate(
    points: Mapping[str, Batch],
    completions: Mapping[str, Complete],
    test: MultimodalDataset,
    train: MultimodalDataset,
    classifiers: Classifiers,
    *,
    conditional_rows: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Every number of the report.

    Args:
        points: name -> joint samples (e.g. "vae", "x0", "xk"), equally many.
        completions: name -> a function from given modalities and a seed to all modalities.
        test, train: real tuples; the floor is the Frechet distance of train tuples to test tuples.
        conditional_rows: test tuples that the conditional numbers use.

    Returns:
        Plain data: ``classifiers`` (test accuracy), ``floor``, ``points`` and ``conditional``.
    """
    n = min(min(next(iter(p.values())).shape[0] for p in points.values()), len(test))
    generator = torch.Generator().manual_seed(seed)
    device = next(iter(next(iter(points.values())).values())).device
    real = test.batch(torch.randperm(len(test), generator=generator)[:n].to(device))
    other = train.batch(torch.randperm(len(train), generator=generator)[:n].to(device))
    rows = torch.randperm(len(test), generator=generator)[:conditional_rows].to(device)
    k = len(test.classes)
    return {
        "classifiers": dict(classifiers.accuracy),
        "floor": evaluate_samples(other, real, classifiers, k),
        "points": {
            name: evaluate_samples({m: v[:n] for m, v in p.items()}, real, classifiers, k) for name, p in points.items()
        },
        "conditional": {
            name: evaluate_conditional(c, test, classifiers, rows=rows, seed=seed) for name, c in completions.items()
        },
    }


def table(result: Mapping[str, Any]) -> str:
    """The result as text: one line per point, then the conditional numbers."""
    accuracy = ", ".join(f"{name} {value:.3f}" for name, value in result["classifiers"].items())
    lines = [
        f"digit classifiers, test accuracy: {accuracy}",
        "",
        f"{'samples':<22}{'joint':>14}{'chance':>8}{'classes':>14}{'Frechet':>9}",
    ]
    for name, p in [*result["points"].items(), ("real (floor)", result["floor"])]:
        lines.append(
            f"{name:<22}{p['joint_coherence']:>7.3f} ±{p['joint_coherence_error']:.3f}{p['chance_joint']:>8.3f}"
            f"{p['class_share_min']:>7.3f}-{p['class_share_max']:.3f} {p['frechet']:>9.1f}"
        )
    lines += ["", "conditional coherence by number of given modalities"]
    for name, c in result["conditional"].items():
        given = "  ".join(f"{size}: {value:.3f}" for size, value in c["by_given"].items())
        lines.append(f"{name:<22}  {given}")
    return "\n".join(lines)
