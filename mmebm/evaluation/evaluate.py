"""The whole evaluation of a model, given as functions that draw from it.

What is cheap is always measured, without labels too (:mod:`mmebm.evaluation.heldout`); the rest is asked for:
``features`` (distances on other networks than the project's classifiers), ``pairs`` (each modality from each single
one, MMVAE+'s protocol), ``sweep`` (metrics against test-time steps), ``latent`` (classes read off the latent) and
``likelihood`` (of the generator). The last four take systems by the name of their point, so that each number can be had
of the VAE, of the trained system, and of the EBM on the frozen VAE.

Conventions, of which published numbers use several: accuracies are of classifiers in eval mode, on tuples that lack no
modality; conditional coherence leaves the given modalities out. ``by_given`` is the micro average over tuples,
``by_given_macro`` over classes. ``pairs`` has averages without and with the source itself among its targets: MMVAE+'s
conditional coherence is without, its conditional FID with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from mmebm.data.base import MultimodalDataset, check_count
from mmebm.evaluation.classifiers import Classifiers
from mmebm.evaluation.features import FeatureExtractor, image_features
from mmebm.evaluation.heldout import comparable, held_out, kernel_distances, mean_of
from mmebm.evaluation.latent import CHUNK, System, encoders, latent_report, usable_rows
from mmebm.evaluation.likelihood import log_likelihood
from mmebm.evaluation.metrics import (
    agreement_by_class,
    binomial_error,
    chance_agreement,
    class_accuracy,
    class_balance,
    conditional_coherence,
    frechet_distance,
    joint_coherence,
    kernel_distance,
    pair_agreement,
    precision_recall,
    spread,
)
from mmebm.evaluation.neighbours import Neighbours
from mmebm.evaluation.subsets import SUBSETS_PER_SIZE, subsets
from mmebm.evaluation.sweep import STEPS, Chain, data_chain, run_sweep
from mmebm.state import Batch

__all__ = ["Complete", "Reference", "evaluate", "evaluate_conditional", "evaluate_pairs", "evaluate_samples", "table"]

Complete = Callable[[Batch, int], Batch]

OWN: Final = "classifiers"  # the name of the features of the project's own judges
LEAST_FOR_KERNEL: Final = 20  # rows: kernel_distance takes ten parts of two
KERNEL_ROWS: Final = 1000  # that a distance of whole tuples looks at, which bounds the memory


class Reference:
    """What samples are measured against: real tuples, the judges, and the real tuples' features, computed once.

    Args:
        real: modality name -> ``(n, *shape)``.
        modalities: of the data set.
        classifiers: the project's judges; None for sets without classes.
        n_classes: number of classes.
        features: further networks for distances on images.
        second: judges of another kind, for coherence and classes alone.
        train: training tuples, for the distance to the nearest one; None for none.
    """

    def __init__(
        self,
        real: Batch,
        modalities: Sequence[Any],
        classifiers: Classifiers | None,
        n_classes: int,
        features: Sequence[FeatureExtractor] = (),
        second: Classifiers | None = None,
        train: Neighbours | None = None,
    ) -> None:
        names = [extractor.name for extractor in features]
        if len(set(names)) < len(names) or OWN in names:
            raise ValueError(f"features must have distinct names, other than {OWN!r}, got {names}")
        self.modalities: tuple[Any, ...] = tuple(modalities)
        self.classifiers: Classifiers | None = classifiers
        self.n_classes: int = n_classes
        self.extractors: tuple[FeatureExtractor, ...] = tuple(features)
        self.second: Classifiers | None = second
        self.train: Neighbours | None = train
        self._real, self._tuples = self.features(real), real

    def features(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """By network and modality: (n, d). Of the classifiers only those that learned features."""
        out = {extractor.name: image_features(extractor, batch, self.modalities) for extractor in self.extractors}
        if self.classifiers is not None:
            own = self.classifiers.features(batch)
            out[OWN] = {name: value for name, value in own.items() if name in self.classifiers.learned}
        return out

    def distances(self, batch: Batch) -> dict[str, dict[str, dict[str, Any]]]:
        """By network and modality: ``frechet``; ``kernel`` with its error where there are 20 rows for it; and
        ``precision`` and ``recall``."""
        out: dict[str, dict[str, dict[str, Any]]] = {}
        for network, by_modality in self.features(batch).items():
            out[network] = {}
            for name, fake in by_modality.items():
                real = self._real[network][name]
                found: dict[str, Any] = {"frechet": frechet_distance(fake, real)}
                if min(len(fake), len(real)) >= LEAST_FOR_KERNEL:
                    found["kernel"] = kernel_distance(fake, real)._asdict()
                    found.update(precision_recall(fake, real)._asdict())
                out[network][name] = found
        return out

    def measure(self, samples: Batch) -> dict[str, Any]:
        """Joint samples: see :func:`evaluate_samples`."""
        out: dict[str, Any] = {"n": next(iter(samples.values())).shape[0]}
        if comparable(samples, len(next(iter(self._tuples.values())))):
            out["kernel"] = kernel_distances(_first(samples), _first(self._tuples))
            first = _first(samples)
            out["spread"] = {name: spread(first[name], real) for name, real in _first(self._tuples).items()}
            varied = [value for value in out["spread"].values() if value is not None]
            out["spread_min"] = min(varied) if varied else None
            if self.train is not None:
                found = self.train.compare(first, _first(self._tuples))
                out["nearest"], out["nearest_by_modality"] = found["nearest"], found["nearest_by_modality"]
        distances = self.distances(samples)
        if self.classifiers is None:
            out["skipped"] = {"coherence": NO_CLASSIFIERS}
        else:
            out.update(_coherence(self.classifiers.predict(samples), self.classifiers.classes))
            own = distances.pop(OWN)
            found = _network(own)
            names = {"kernel": "kernel_features", "kernel_error": "kernel_features_error"}
            out.update({names.get(name, name): value for name, value in found.items()})
            if self.second is not None:
                out["second_judge"] = _coherence(self.second.predict(samples), self.second.classes)
        if self.extractors:
            out["features"] = {network: _network(each) for network, each in distances.items() if each}
        return out


NO_CLASSIFIERS: Final = "no classifiers: the set has no classes, or none were given"


def _first(x: Batch) -> dict[str, Tensor]:
    return {name: value[:KERNEL_ROWS] for name, value in x.items()}


def _coherence(pred: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    n, k = pred.shape[0], len(classes)
    balance = class_balance(pred, k)
    out: dict[str, Any] = {}
    if pred.shape[1] > 1:
        joint, chance = joint_coherence(pred), chance_agreement(pred, k)
        out = {
            "joint_coherence": joint,
            "joint_coherence_error": binomial_error(joint, n),
            "pair_agreement": pair_agreement(pred),
            "chance_joint": chance.joint,
            "chance_pair": chance.pair,
            "joint_coherence_by_class": dict(zip(classes, agreement_by_class(pred, k).tolist(), strict=True)),
        }
    return out | {
        "class_share_min": balance.shares.min().item(),
        "class_share_max": balance.shares.max().item(),
        "entropy": balance.entropy.min().item(),
    }


def _network(by_modality: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One network's distances as reported: the mean over modalities, then each."""
    frechet = {name: d["frechet"] for name, d in by_modality.items()}
    kernel = {name: d["kernel"] for name, d in by_modality.items() if "kernel" in d}
    out: dict[str, Any] = {"frechet": _mean(frechet.values()), "frechet_by_modality": frechet}
    out["kernel"] = _mean(k["value"] for k in kernel.values()) if kernel else None
    # as of independent estimates; the modalities' are not, quite
    errors = [k["error"] for k in kernel.values()]
    out["kernel_error"] = math.hypot(*errors) / len(errors) if errors else None
    out["kernel_by_modality"] = kernel
    for name in ("precision", "recall") if kernel else ():
        out[f"{name}_by_modality"] = {m: d[name] for m, d in by_modality.items() if name in d}
        out[name] = _mean(out[f"{name}_by_modality"].values())
    return out


def _mean(values: Any) -> float:
    values = list(values)
    return math.fsum(values) / max(len(values), 1)


def evaluate_samples(
    samples: Batch, real: Batch, classifiers: Classifiers, n_classes: int, features: Sequence[FeatureExtractor] = ()
) -> dict[str, Any]:
    """One set of joint samples against as many real tuples.

    Returns:
        ``joint_coherence`` with its standard error and the part of each class, ``pair_agreement``, what the marginals
        alone would give of both (``chance_joint``, ``chance_pair``), the smallest and largest class share over the
        modalities and the lowest normalised entropy; ``spread`` by modality, relative to the real tuples, and the least
        of them ``spread_min``; on the judges' features, per modality that has some and as means over them, ``frechet``,
        the cubic kernel distance ``kernel_features`` with its standard error, ``precision`` and ``recall``; and
        ``kernel``, the Gaussian kernel distance of whole tuples. With ``features`` the same distances of each network
        under ``features``, for images.
    """
    return Reference(real, classifiers.modalities, classifiers, n_classes, features).measure(samples)


def evaluate_conditional(
    complete: Complete,
    test: MultimodalDataset,
    classifiers: Classifiers,
    *,
    rows: Tensor,
    seed: int,
    subsets_per_size: int | None = SUBSETS_PER_SIZE,
    second: Classifiers | None = None,
) -> dict[str, Any]:
    """Conditional coherence by the number of given modalities, over every subset and every target outside it.

    Args:
        complete: given modalities and a seed -> all modalities; called with at most 1,000 rows.
        test: labelled tuples.
        classifiers: the judges.
        rows: which tuples.
        seed: of the completions, and of the subsets where they are drawn.
        subsets_per_size: subsets of one size, drawn by seed where there are more (from six modalities on); None for
            all.
        second: judges of another kind, whose ``by_given`` is then ``by_given_second``.

    Returns:
        ``by_given``: {number given: mean accuracy of the targets against the true class}; ``by_given_macro``, the same
        with every class counting the same; ``by_class``: {number given: {class: accuracy, or None where no tuple has
        it}}; ``by_subset``: {"a+b": {target: accuracy}}; and ``subsets``, {number given: {"used", "of"}}.
    """
    names = [m.name for m in test.modalities]
    order = [m.name for m in classifiers.modalities]
    labels = test.labels[rows].cpu()
    chosen = subsets(names, range(1, len(names)), per_size=subsets_per_size, seed=seed)
    out: dict[str, Any] = {name: {} for name in ("by_given", "by_given_macro", "by_class", "by_subset", "subsets")}
    for size, several in chosen.items():
        micro, macro, classes, others = [], [], [], []
        for given in several:
            pred, *seconds = _predicted(complete, test, [classifiers, *([second] if second else [])], rows, given, seed)
            targets = [name for name in names if name not in given]
            columns = pred[:, [order.index(name) for name in targets]]
            scores = conditional_coherence(columns, labels)
            out["by_subset"]["+".join(given)] = dict(zip(targets, scores.tolist(), strict=True))
            micro += scores.tolist()
            for other in seconds:
                others += conditional_coherence(other[:, [order.index(name) for name in targets]], labels).tolist()
            macro += conditional_coherence(columns, labels, "macro").tolist()
            classes.append(class_accuracy(columns, labels, len(classifiers.classes)))
        each = torch.cat(classes, dim=1).mean(1).tolist()
        out["by_given"][str(size)], out["by_given_macro"][str(size)] = _mean(micro), _mean(macro)
        if others:
            out.setdefault("by_given_second", {})[str(size)] = _mean(others)
        out["by_class"][str(size)] = {
            name: None if math.isnan(value) else value for name, value in zip(classifiers.classes, each, strict=True)
        }
        out["subsets"][str(size)] = {"used": len(several), "of": math.comb(len(names), size)}
    return {"n": len(rows), **out}


def _seeds(seed: int, count: int) -> list[int]:
    """A seed for each chunk, the first as given, the others drawn: not counted up, as the next run's would be these."""
    drawn = torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [seed, *drawn[1:]]


def _predicted(
    complete: Complete,
    test: MultimodalDataset,
    judges: Sequence[Classifiers],
    rows: Tensor,
    given: Sequence[str],
    seed: int,
) -> list[Tensor]:
    """The classes that each of the judges sees in all modalities of completions from ``given``: (n, M) on the CPU."""
    parts: list[list[Tensor]] = [[] for _ in judges]
    chunks = rows.split(CHUNK)
    for chunk, own in zip(chunks, _seeds(seed, len(chunks)), strict=True):
        real = test.batch(chunk)
        x = complete({name: real[name] for name in given}, own)
        for part, judge in zip(parts, judges, strict=True):
            part.append(judge.predict(x).cpu())
    return [torch.cat(part) for part in parts]


def evaluate_pairs(
    system: System,
    test: MultimodalDataset,
    reference: Reference,
    *,
    rows: Tensor,
    seed: int,
    latent_steps: int | None = 0,
) -> dict[str, Any]:
    """Every modality decoded from every single one: MMVAE+'s protocol, with the source itself among the targets.

    From z ~ q(z | x_source), revised where ``latent_steps`` says so, all modalities are decoded, the source too: its
    own column is self-reconstruction, which raises coherence and lowers distances. So there are two averages.

    Args:
        system: the networks and the chains.
        test: tuples; labelled where the reference has classifiers.
        reference: judges and the real features.
        rows: which tuples.
        seed: of the draws.
        latent_steps: of the latent chain; None for as many as configured.

    Returns:
        ``coherence``: {source: {target: accuracy}}, ``coherence_mean`` without the source, ``coherence_mean_with_self``
        with it; and under ``distances`` for each network ("classifiers" for the project's own) ``frechet``, {source:
        {target: distance}}, ``frechet_mean`` and ``frechet_mean_with_self``. Without classifiers ``skipped`` has the
        reason in place of the coherence.
    """
    names = [m.name for m in test.modalities]
    labels = test.labels[rows].cpu()
    coherence: dict[str, dict[str, float]] = {}
    frechet: dict[str, dict[str, dict[str, float]]] = {}
    way = encoders(system, latent_steps)
    for source in names:
        parts, chunks = [], rows.split(CHUNK)
        for chunk, own in zip(chunks, _seeds(seed, len(chunks)), strict=True):
            given = {source: test.batch(chunk)[source]}
            z = way.sample(given, own) if latent_steps == 0 else way.revised_sample(given, own)
            with torch.no_grad():
                parts.append(system.generator(z))
        x = {name: torch.cat([part[name] for part in parts]) for name in names}
        if reference.classifiers is not None:
            order = [m.name for m in reference.classifiers.modalities]
            scores = conditional_coherence(reference.classifiers.predict(x).cpu(), labels).tolist()
            coherence[source] = {name: scores[order.index(name)] for name in names}
        for network, by_modality in reference.distances(x).items():
            frechet.setdefault(network, {})[source] = {name: d["frechet"] for name, d in by_modality.items()}
    out: dict[str, Any] = {"n": len(rows), "latent_steps": latent_steps}
    if reference.classifiers is None:
        out["skipped"] = {"coherence": NO_CLASSIFIERS}
    else:
        out.update(
            coherence=coherence,
            coherence_mean=_pair_mean(coherence, self_too=False),
            coherence_mean_with_self=_pair_mean(coherence, self_too=True),
        )
    out["distances"] = {
        network: {
            "frechet": values,
            "frechet_mean": _pair_mean(values, self_too=False),
            "frechet_mean_with_self": _pair_mean(values, self_too=True),
        }
        for network, values in frechet.items()
    }
    return out


def _pair_mean(values: Mapping[str, Mapping[str, float]], *, self_too: bool) -> float:
    return _mean(v for source, row in values.items() for target, v in row.items() if self_too or source != target)


def evaluate(
    points: Mapping[str, Batch],
    completions: Mapping[str, Complete],
    test: MultimodalDataset,
    train: MultimodalDataset,
    classifiers: Classifiers | None,
    *,
    conditional_rows: int = 1000,
    subsets_per_size: int | None = SUBSETS_PER_SIZE,
    features: Sequence[FeatureExtractor] = (),
    heldout: Mapping[str, System] | None = None,
    second: Classifiers | None = None,
    pairs: Mapping[str, System] | None = None,
    sweep: Mapping[str, System | Chain] | None = None,
    sweep_steps: Sequence[int] = STEPS,
    latent: Mapping[str, System] | None = None,
    likelihood: Mapping[str, System] | None = None,
    likelihood_rows: int = 100,
    likelihood_options: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Every number of the report.

    Args:
        points: name -> joint samples (e.g. "vae", "x0", "xk", "frozen"), equally many.
        completions: name -> a function from given modalities and a seed to all modalities.
        test: the tuples to measure on, of whichever split: training and judges saw no item of them.
        train: training tuples. Of both, those that lack a modality are left out.
        classifiers: the judges; None for sets without classes, which have no coherence and no latent classification:
            the result then says so, and ``features`` gives the distances.
        second: judges of another kind (:func:`mmebm.evaluation.fit_classifiers`), for coherence and classes once more.
        conditional_rows: tuples of ``test`` that the conditional numbers use.
        subsets_per_size: see :func:`evaluate_conditional`.
        features: further networks for distances on images, such as :class:`mmebm.evaluation.Lite0`.
        heldout: systems with an inference network that learned, for :func:`mmebm.evaluation.heldout.held_out` on
            ``conditional_rows`` tuples of ``test``.
        pairs: systems for :func:`evaluate_pairs`, each without and with its latent chain.
        sweep: systems whose data chain, from the generator, is measured at each of ``sweep_steps``; or chains of tuples
            (:func:`mmebm.evaluation.data_chain`), where they start elsewhere.
        latent: systems for :func:`mmebm.evaluation.latent_report`.
        likelihood: systems for :func:`mmebm.evaluation.log_likelihood`, on ``likelihood_rows`` test tuples with
            ``likelihood_options``.
        seed: of everything drawn here.

    Returns:
        Plain data, ready for JSON: ``split``; the judges' accuracy on it, ``classifiers`` and ``second_judge``;
        ``floor``, the numbers of real tuples of the split against others of it; ``training``, those of training tuples;
        ``points`` and ``conditional``; and ``heldout``, ``pairs``, ``sweep``, ``latent`` and ``likelihood`` by the
        names of their systems, where asked for. What could not be measured is named in ``skipped`` with the reason.
    """
    if not points:
        raise ValueError("points must name at least one set of samples, got none")
    check_count("conditional_rows", conditional_rows)
    device = next(iter(next(iter(points.values())).values())).device
    whole, others = usable_rows(test, labelled=False), usable_rows(train, labelled=False)
    n = min(min(next(iter(p.values())).shape[0] for p in points.values()), len(whole))
    generator = torch.Generator().manual_seed(seed)

    def drawn(rows: Tensor, count: int) -> Tensor:
        return rows[torch.randperm(len(rows), generator=generator)[:count]].to(device)

    order = drawn(whole, len(whole))
    real = test.batch(order[:n])
    judges, second = (classifiers, second) if test.classes else (None, None)
    neighbours = Neighbours(train, seed=seed)

    def reference_of(x: Batch) -> Reference:
        return Reference(x, test.modalities, judges, len(test.classes), features, second, neighbours)

    reference = reference_of(real)
    # the ceiling: real tuples against others of the same split, in two halves where there are no more
    half = n if 2 * n <= len(order) else len(order) // 2
    few = half < 2
    half = len(order) if few else half
    beside, other = test.batch(order[:half]), test.batch(order[:half] if few else order[half : 2 * half])
    result: dict[str, Any] = {
        "split": test.split,
        "classifiers": judges.tested(test) if judges else {},
        **({"second_judge": {"kind": second.kind, "accuracy": second.tested(test)}} if second else {}),
        "floor": (reference if half == n else reference_of(beside)).measure(other),
        "training": reference.measure(train.batch(drawn(others, n))),
        "points": {name: reference.measure({m: v[:n] for m, v in p.items()}) for name, p in points.items()},
        "conditional": {},
    }
    skipped: dict[str, str] = {}
    if few:
        skipped["floor"] = f"it needs two halves of two tuples, there are {len(order)}: these are against themselves"
    if "kernel" not in result["floor"]:
        skipped["kernel"] = f"it needs {LEAST_FOR_KERNEL} tuples at least, there are {n}"
    if features and not result["floor"]["features"]:
        skipped["features"] = "the set has no images of one or three channels"
    if judges is None:
        skipped["coherence"] = skipped["conditional"] = NO_CLASSIFIERS
        rows = drawn(whole, conditional_rows)
    else:
        rows = drawn(usable_rows(test, labelled=True), conditional_rows)
        result["conditional"] = {
            name: evaluate_conditional(
                c, test, judges, rows=rows, seed=seed, subsets_per_size=subsets_per_size, second=second
            )
            for name, c in completions.items()
        }
    if heldout is not None:
        x = test.batch(rows)
        result["heldout"] = {name: {test.split: held_out(system, x, seed=seed)} for name, system in heldout.items()}
    if pairs is not None:
        result["pairs"] = {
            name: {
                "decoded": evaluate_pairs(system, test, reference, rows=rows, seed=seed),
                "after the latent chain": evaluate_pairs(
                    system, test, reference, rows=rows, seed=seed, latent_steps=None
                ),
            }
            for name, system in pairs.items()
        }
    if sweep is not None:
        result["sweep"] = {
            name: run_sweep(
                chain if isinstance(chain, Chain) else data_chain(chain, n, seed=seed), reference.measure, sweep_steps
            )
            for name, chain in sweep.items()
        }
    if latent is not None:
        if test.classes:
            result["latent"] = {
                name: latent_report(encoders(system), train, test, seed=seed) for name, system in latent.items()
            }
        else:
            skipped["latent"] = "the set has no classes"
    if likelihood is not None:
        x = test.batch(drawn(whole, check_count("likelihood_rows", likelihood_rows)))
        options = {"seed": seed, **(likelihood_options or {})}
        result["likelihood"] = {
            name: log_likelihood(system.generator, system.prior, x, **options).summary()
            for name, system in likelihood.items()
        }
    if skipped:
        result["skipped"] = skipped
    return result


def table(result: Mapping[str, Any]) -> str:
    """The result as text: one line per point, then the conditional numbers, then what else was measured."""
    floor = ("real (floor)", result["floor"])
    every = [*result["points"].items(), floor, *([("training", result["training"])] if "training" in result else [])]
    lines = [f"measured on {result['split']}"] if "split" in result else []
    lines += [f"not measured: {what}: {why}" for what, why in result.get("skipped", {}).items()]
    if result["classifiers"]:
        accuracy = ", ".join(f"{name} {value:.3f}" for name, value in result["classifiers"].items())
        lines.append(f"classifiers, accuracy: {accuracy}")
        if second := result.get("second_judge"):
            accuracy = ", ".join(f"{name} {value:.3f}" for name, value in second["accuracy"].items())
            lines.append(f"second judge ({second['kind']}), accuracy: {accuracy}")
        lines += ["", f"{'samples':<22}{'joint':>14}{'chance':>8}{'classes':>14}{'Frechet':>9}"]
        for name, p in every:
            joint = (
                f"{p['joint_coherence']:>7.3f} ±{p['joint_coherence_error']:.3f}{p['chance_joint']:>8.3f}"
                if "joint_coherence" in p
                else " " * 22
            )
            balance = f"{p['class_share_min']:>7.3f}-{p['class_share_max']:.3f}"
            lines.append(f"{name:<22}{joint}{balance} {p['frechet']:>9.1f}")
        if result["floor"].get("second_judge") and "joint_coherence" in result["floor"]["second_judge"]:
            lines += ["", f"{'by the second judge':<22}{'joint':>14}{'chance':>8}{'classes':>14}"]
            for name, p in every:
                p = p["second_judge"]
                joint = f"{p['joint_coherence']:>7.3f} ±{p['joint_coherence_error']:.3f}{p['chance_joint']:>8.3f}"
                lines.append(f"{name:<22}{joint}{p['class_share_min']:>7.3f}-{p['class_share_max']:.3f}")
    if any("spread" in p for _, p in every):
        lines += ["", f"{'variety':<22}{'precision':>10}{'recall':>8}{'KD':>18}{'nearest':>10}  spread by modality"]
        for name, p in every:
            of = [p.get(key) for key in ("precision", "recall")]
            cells = [f"{value:>{width}.3f}" if value is not None else " " * width for value, width in zip(of, (10, 8))]
            kernel = (
                f"{p['kernel_features']:>9.4f} ±{p['kernel_features_error']:.4f}"
                if p.get("kernel_features")
                else " " * 17
            )
            near = f"{p['nearest']:>9.2f}" if p.get("nearest") is not None else " " * 9
            spreads = "  ".join(f"{m} {v:.2f}" for m, v in p.get("spread", {}).items() if v is not None)
            lines.append(f"{name:<22}{''.join(cells)} {kernel} {near}  {spreads}")
    networks = list(result["floor"].get("features", {}))
    if networks:
        heads = "".join(f"{f'FD-{name}':>18}{f'KD-{name}':>18}" for name in networks)
        lines += ["", f"{'samples':<22}{heads}"]
        for name, p in [*result["points"].items(), floor]:
            values = [p["features"][network] for network in networks]
            kernels = ["" if v["kernel"] is None else f"{v['kernel']:.4g}" for v in values]
            columns = [f"{v['frechet']:>18.2f}{kernel:>18}" for v, kernel in zip(values, kernels, strict=True)]
            lines.append(f"{name:<22}" + "".join(columns))
    if "kernel" in result["floor"]:
        lines += [
            "",
            f"{'kernel distance':<22}{'tuples':>16}"
            + "".join(f"{name[:15]:>16}" for name in result["floor"]["kernel"]["by_modality"]),
        ]
        for name, p in [*result["points"].items(), floor]:
            if "kernel" in p:
                each = [p["kernel"]["joint"], *p["kernel"]["by_modality"].values()]
                lines.append(f"{name:<22}" + "".join(f"{k['value']:>9.4f} ±{k['error']:.3f}" for k in each))
    if result.get("heldout"):
        lines += ["", f"{'held-out tuples':<22}{'bound, nats':>20}{'mse':>9}{'cross':>9}{'retrieval':>11}{'chance':>8}"]
        for name, sets in result["heldout"].items():
            for split, h in sets.items():
                cross = f"{mean_of(h['cross_mse']):>9.4f}" if "cross_mse" in h else f"{'':>9}"
                found = f"{h['retrieval']['top']:>11.3f}{h['retrieval']['chance']:>8.3f}" if "retrieval" in h else ""
                lines.append(
                    f"{f'{name}, {split}':<22}{h['bound']:>12.1f} ±{h['bound_error']:<6.1f}"
                    f"{mean_of(h['mse']):>9.4f}{cross}{found}"
                )
    if result["conditional"]:
        lines += ["", "conditional coherence by number of given modalities (/ by the second judge)"]
        for name, c in result["conditional"].items():
            others = c.get("by_given_second", {})
            given = "  ".join(
                f"{size}: {value:.3f}" + (f" / {others[size]:.3f}" if size in others else "")
                for size, value in c["by_given"].items()
            )
            lines.append(f"{name:<22}  {given}")
    if "pairs" in result:
        lines += ["", "each modality from each single one: coherence without / with the source itself"]
        for name, ways in result["pairs"].items():
            for way, p in ways.items():
                if "coherence" in p:
                    lines.append(
                        f"{f'{name}, {way}':<34}{p['coherence_mean']:>7.3f} / {p['coherence_mean_with_self']:.3f}"
                    )
    if "latent" in result:
        lines += ["", "classes read off the latent by number of given modalities: q -> after the latent chain"]
        for name, conventions in result["latent"].items():
            for convention, ways in conventions.items():
                before, after = ways["q"]["by_given"], ways["z_k"]["by_given"]
                given = "  ".join(f"{size}: {before[size]:.3f} -> {after[size]:.3f}" for size in before)
                lines.append(f"{f'{name}, {convention}':<28}  {given}")
    if "likelihood" in result:
        lines += ["", "log p(X) of the generator by annealed importance sampling, nats per tuple"]
        for name, r in result["likelihood"].items():
            lines.append(
                f"{name:<22}{r['log_p']:>12.2f} ±{r['error_chains']:.2f} (chains) ±{r['error_tuples']:.2f} "
                f"(tuples); fewest effective chains {r['effective_min']:.1f}"
            )
    for name, rows in result.get("sweep", {}).items():
        lines += [
            "",
            f"{name}: metrics against steps of the data chain",
            f"{'steps':>6}{'seconds':>9}{'joint':>8}{'Frechet':>9}",
        ]
        for row in rows:
            joint = f"{row['joint_coherence']:>8.3f}" if "joint_coherence" in row else f"{'':>8}"
            frechet = f"{row['frechet']:>9.1f}" if "frechet" in row else f"{'':>9}"
            lines.append(f"{row['steps']:>6}{row['seconds']:>9.2f}{joint}{frechet}")
    return "\n".join(lines)
