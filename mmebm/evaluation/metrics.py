"""What is measured on samples: agreement of the modalities, balance of the classes, distance to real data.

Predictions are class indices ``(n, M)``, one column per modality, as
:meth:`mmebm.evaluation.classifiers.Classifiers.predict` gives them. Agreement alone is no evidence: a model that
draws ones only has coherence 1. So print :func:`chance_agreement` and :func:`class_balance` beside every coherence.

Every function is pure, works in float64 on the tensors' device, and returns shares in [0, 1] unless it says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Agreement",
    "ClassBalance",
    "KernelDistance",
    "PrecisionRecall",
    "agreement_by_class",
    "binomial_error",
    "chance_agreement",
    "class_accuracy",
    "class_balance",
    "conditional_coherence",
    "frechet_distance",
    "gaussian_kernel_distance",
    "joint_coherence",
    "kernel_distance",
    "pair_agreement",
    "precision_recall",
    "spread",
]


MEDIAN_ROWS = 500  # that the median distance is taken of


class Agreement(NamedTuple):
    """``joint``: all modalities agree. ``pair``: two of them do, averaged over the pairs."""

    joint: float
    pair: float


class ClassBalance(NamedTuple):
    """How evenly the classes occur, per modality; all float64 on the CPU.

    ``shares`` ``(M, classes)``; their ``minimum`` and ``maximum`` over the classes ``(M,)``; ``entropy`` ``(M,)`` of
    the shares over log(classes): 1 for balanced classes, 0 where one class is all there is.
    """

    shares: Tensor
    minimum: Tensor
    maximum: Tensor
    entropy: Tensor


class PrecisionRecall(NamedTuple):
    """``precision``: share of the samples that look like real ones. ``recall``: share of real ones that the samples
    come near to."""

    precision: float
    recall: float


class KernelDistance(NamedTuple):
    """``value``: squared MMD, unbiased, so it may be negative. ``error``: its standard error. Units of the kernel."""

    value: float
    error: float


def joint_coherence(pred: Tensor) -> float:
    """Share of samples on which all classifiers agree: the literature's unconditional coherence.

    No ground truth: the class agreed on may be any. As in MoPoE and MMVAE+ (``pred == pred[0]`` over modalities).

    Args:
        pred: integer ``(n, M)``, M >= 2.

    Raises:
        TypeError, ValueError: if ``pred`` is something else or empty.
    """
    _check_predictions(pred)
    return (pred == pred[:, :1]).all(1).double().mean().item()


def agreement_by_class(pred: Tensor, n_classes: int) -> Tensor:
    """Share of samples on which all classifiers agree on class c; over the classes it sums to the joint coherence.

    Beside the shares of :func:`class_balance` it shows which classes the model never makes coherent.

    Args:
        pred: integer ``(n, M)`` in [0, n_classes), M >= 2.
        n_classes: the number of classes, at least 2.

    Returns:
        float64 ``(n_classes,)`` on the CPU.

    Raises:
        TypeError, ValueError: if ``pred`` is something else or empty, or ``n_classes`` below 2.
    """
    _check_predictions(pred)
    _check_classes(pred, n_classes)
    agreed = pred[(pred == pred[:, :1]).all(1), 0]
    return agreed.cpu().long().bincount(minlength=n_classes).double() / len(pred)


def pair_agreement(pred: Tensor) -> float:
    """Share of samples on which two modalities agree, averaged over the M (M - 1) / 2 pairs.

    Finer than :func:`joint_coherence` where that is near zero: with five modalities one of them may spoil every tuple.

    Args:
        pred: integer ``(n, M)``, M >= 2.

    Raises:
        TypeError, ValueError: if ``pred`` is something else or empty.
    """
    _check_predictions(pred)
    pairs = list(combinations(range(pred.shape[1]), 2))
    return math.fsum((pred[:, i] == pred[:, j]).double().mean().item() for i, j in pairs) / len(pairs)


def chance_agreement(pred: Tensor, n_classes: int) -> Agreement:
    """The agreement that the modalities' marginals alone would give, were they independent of each other.

    ``joint = sum_c prod_m p_m(c)`` and ``pair`` the mean over pairs of ``sum_c p_i(c) p_j(c)``, with ``p_m`` the shares
    of :func:`class_balance`: the exact expectation when every modality's column is drawn anew from its own rows. For
    ten balanced classes .1^(M-1) and .1; both 1 for a model collapsed to one class.

    Args:
        pred: integer ``(n, M)`` in [0, n_classes), M >= 2.
        n_classes: the number of classes.

    Raises:
        TypeError, ValueError: if ``pred`` is something else or empty.
    """
    _check_predictions(pred)
    shares = class_balance(pred, n_classes).shares
    pairs = list(combinations(shares, 2))
    pair = math.fsum((p * q).sum().item() for p, q in pairs) / len(pairs)
    return Agreement(joint=shares.prod(0).sum().item(), pair=pair)


def class_balance(pred: Tensor, n_classes: int) -> ClassBalance:
    """The share of each class in each modality: what shows a collapse that coherence hides.

    Args:
        pred: integer ``(n, M)`` in [0, n_classes), M >= 1.
        n_classes: the number of classes, at least 2.

    Raises:
        TypeError, ValueError: if ``pred`` is something else or empty, or ``n_classes`` below 2.
    """
    _check_predictions(pred, least=1)
    _check_classes(pred, n_classes)
    counts = torch.stack([column.bincount(minlength=n_classes) for column in pred.cpu().long().unbind(1)])
    shares = counts.double() / len(pred)
    entropy = -torch.special.xlogy(shares, shares).sum(1) / math.log(n_classes)
    # Adding zero turns the -0.0 of a collapsed modality into 0.0.
    return ClassBalance(shares, shares.amin(1), shares.amax(1), entropy + 0.0)


def conditional_coherence(pred_targets: Tensor, labels: Tensor, average: Literal["micro", "macro"] = "micro") -> Tensor:
    """Accuracy of each target modality's classifier against the class of the given modalities.

    The targets must not be among the given modalities: self-reconstruction is another quantity.

    Args:
        pred_targets: integer ``(n, T)``, predictions on the generated targets.
        labels: integer ``(n,)``, the class of the tuple each was generated from.
        average: "micro", every sample counts the same (MoPoE, MVTCAE, MMVAE+); "macro", every class that occurs counts
            the same (MultiVae). They differ where the classes are not balanced.

    Returns:
        float64 ``(T,)`` on the CPU, one share per target.

    Raises:
        TypeError, ValueError: if the shapes or types do not fit.
    """
    if average not in ("micro", "macro"):
        raise ValueError(f"average must be 'micro' or 'macro', got {average!r}")
    right = _right(pred_targets, labels)
    if average == "micro":
        return right.mean(0)
    classes = labels.cpu()
    return torch.stack([right[classes == c].mean(0) for c in classes.unique()]).mean(0)


def class_accuracy(pred_targets: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """The same for the tuples of each class: float64 ``(n_classes, T)`` on the CPU, NaN for classes that do not occur.

    Args:
        pred_targets, labels: as in :func:`conditional_coherence`; labels in [0, n_classes).
        n_classes: the number of classes, at least 2.

    Raises:
        TypeError, ValueError: if the shapes or types do not fit.
    """
    right, classes = _right(pred_targets, labels), labels.cpu()
    _check_classes(labels, n_classes, "labels")
    return torch.stack([right[classes == c].mean(0) for c in range(n_classes)])


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Frechet (2-Wasserstein) distance between Gaussians fitted to two sets of features.

    ``|mu_a - mu_b|^2 + tr(A) + tr(B) - 2 tr((A^1/2 B A^1/2)^1/2)`` with means ``mu`` and unbiased covariances ``A, B``
    (Dowson and Landau 1982; Heusel et al. 2017). On Inception features this is the FID; on any others, such as our
    classifiers', it is comparable only with itself: call it FD, and print it beside the distance of real to real data,
    which is above 0 for finite n and grows as n shrinks.

    The last trace is the nuclear norm of ``A^1/2 B^1/2``, which equals that of ``X Y' / sqrt((n_a - 1)(n_b - 1))`` for
    the centred features X, Y: computed from their QR factors, without ever forming a covariance or its square root, it
    is as exact for singular covariances (fewer samples than features, constant features) as for others, and symmetric.

    Args:
        a: ``(n_a, d)``, any floating dtype, n_a >= 2.
        b: ``(n_b, d)``, n_b >= 2.

    Returns:
        The distance, at least 0, in squared units of the features.

    Raises:
        TypeError, ValueError: for other shapes or types, too few samples, or values that are inf or NaN.
    """
    a, b = _check_features(a, b, least=2)
    mean_a, mean_b = a.mean(0), b.mean(0)
    a, b = (a - mean_a) / math.sqrt(len(a) - 1), (b - mean_b) / math.sqrt(len(b) - 1)
    factor_a, factor_b = (torch.linalg.qr(x, mode="r").R for x in (a, b))
    overlap = torch.linalg.svdvals(factor_a @ factor_b.T).sum()
    distance = (mean_a - mean_b).square().sum() + a.square().sum() + b.square().sum() - 2 * overlap
    return max(distance.item(), 0.0)


def kernel_distance(a: Tensor, b: Tensor, *, subsets: int = 10, seed: int = 0) -> KernelDistance:
    """Squared maximum mean discrepancy with the cubic polynomial kernel, as in the KID, with its standard error.

    ``k(x, y) = (x'y / d + 1)^3``; within each subset the unbiased estimate (no diagonal terms), so that its expectation
    is 0 for equal distributions at any sample size, where the Frechet distance is biased (Binkowski et al. 2018).

    Both sets are shuffled and cut into ``subsets`` disjoint parts; ``value`` is the mean over the parts and ``error``
    their standard deviation over sqrt(subsets). The usual KID draws 100 overlapping subsets and quotes their standard
    deviation, which is no standard error of the mean: the mean is comparable, the error is not.

    Args:
        a: ``(n_a, d)``, any floating dtype, n_a >= 2 subsets.
        b: ``(n_b, d)``, n_b >= 2 subsets.
        subsets: the number of parts, at least 2.
        seed: of the shuffle.

    Raises:
        TypeError, ValueError: for other shapes or types, too few samples, or values that are inf or NaN.
    """
    if subsets < 2:
        raise ValueError(f"subsets must be at least 2, for a standard error, got {subsets}")
    a, b = _check_features(a, b, least=2 * subsets)
    return _in_parts(lambda u, v: (u @ v.T / u.shape[1] + 1) ** 3, a, b, subsets=subsets, seed=seed)


def gaussian_kernel_distance(
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    *,
    bandwidths: Mapping[str, float] | None = None,
    subsets: int = 10,
    seed: int = 0,
) -> KernelDistance:
    """Squared maximum mean discrepancy of whole tuples, without networks or labels: the kernel of a tuple is the
    product of a Gaussian kernel of each modality, so that it sees modalities that do not belong together.

    ``k(x, y) = exp(-sum_m |x_m - y_m|^2 / (2 h_m^2))``, which tells any two laws apart (Gretton et al. 2012). Unbiased,
    in parts, as in :func:`kernel_distance`. With one modality it is that modality's own distance.

    Args:
        a: modality -> ``(n_a, ...)``, any floating dtype, n_a >= 2 subsets.
        b: modality -> ``(n_b, ...)``, the same modalities; n_b >= 2 subsets.
        bandwidths: modality -> h; None for the median distance between two rows of ``b`` (1 where that is 0).
        subsets: the number of parts, at least 2.
        seed: of the shuffle.

    Returns:
        The distance, at most 2, and its standard error.

    Raises:
        TypeError, ValueError: for other modalities, shapes or types, bandwidths that are not above 0, too few samples,
            or values that are inf or NaN.
    """
    if not a or set(a) != set(b):
        raise ValueError(f"a and b must have the same modalities, at least one, got {sorted(a)} and {sorted(b)}")
    if subsets < 2:
        raise ValueError(f"subsets must be at least 2, for a standard error, got {subsets}")
    widths = dict(bandwidths or {})
    for name, width in widths.items():
        if name not in a or not 0 < width < math.inf:
            raise ValueError(f"bandwidths must be positive and finite, of {sorted(a)}, got {width!r} of {name!r}")
    sides: list[list[Tensor]] = [[], []]
    for name in a:
        x, y = _check_features(a[name].flatten(1), b[name].flatten(1), least=2 * subsets)
        h = widths.get(name) or torch.pdist(y[:MEDIAN_ROWS]).median().item() or 1.0
        sides[0].append(x / h)
        sides[1].append(y / h)
    columns = [torch.cat(parts, dim=1) for parts in sides]
    return _in_parts(lambda u, v: (-0.5 * torch.cdist(u, v).square()).exp(), *columns, subsets=subsets, seed=seed)


def precision_recall(samples: Tensor, real: Tensor, *, neighbours: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al., NeurIPS 2019): what part of the samples lies within the real
    ones' reach, and what part of the real ones within that of the samples.

    The reach of a set is the union of balls about its rows, each as wide as the distance to the row's ``neighbours``-th
    nearest other row. Samples that are few and good have a high precision and a low recall. Two sets of one law have
    the same value below 1 in both, which depends on their sizes: print it beside the result.

    Args:
        samples: features ``(n, d)``, any floating dtype, n > neighbours.
        real: ``(m, d)``, m > neighbours.
        neighbours: which neighbour's distance is the radius, at least 1.

    Raises:
        TypeError, ValueError: for other shapes or types, too few rows, or values that are inf or NaN.
    """
    if neighbours < 1:
        raise ValueError(f"neighbours must be at least 1, got {neighbours}")
    samples, real = _check_features(samples, real, least=neighbours + 1)

    def covered(points: Tensor, by: Tensor) -> float:
        own = torch.cdist(by, by)
        own.fill_diagonal_(math.inf)
        radius = own.kthvalue(neighbours, dim=1).values
        return (torch.cdist(points, by) <= radius).any(1).double().mean().item()

    return PrecisionRecall(covered(samples, real), covered(real, samples))


def spread(samples: Tensor, real: Tensor) -> float | None:
    """How far samples lie apart, by how far real ones do: the root of the ratio of their variances, each summed over
    the elements. 1 for samples as various as real ones, towards 0 for prototypes.

    Args:
        samples: ``(n, ...)``, n >= 2, in model space or in features.
        real: ``(m, ...)``, m >= 2.

    Returns:
        The ratio, or None where the real ones are all alike.

    Raises:
        TypeError, ValueError: for other shapes or types, too few rows, or values that are inf or NaN.
    """
    a, b = _check_features(samples.flatten(1), real.flatten(1), least=2)
    of_real = b.var(0).sum()
    return (a.var(0).sum() / of_real).sqrt().item() if of_real > 0 else None


def binomial_error(p: float, n: int) -> float:
    """Standard error ``sqrt(p (1 - p) / n)`` of a share ``p`` measured on ``n`` independent samples.

    At p = 0 or 1 it is 0 although nothing is certain: the 95 % bound is then 3 / n from there (the rule of three).

    Raises:
        ValueError: if ``p`` lies outside [0, 1] or ``n`` is below 1.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p must be a share in [0, 1], got {p}")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return math.sqrt(p * (1 - p) / n)


Kernel = Callable[[Tensor, Tensor], Tensor]


def _in_parts(kernel: Kernel, a: Tensor, b: Tensor, *, subsets: int, seed: int) -> KernelDistance:
    """The mean of the unbiased estimates on disjoint parts of both sets, shuffled, and its standard error."""
    generator = torch.Generator().manual_seed(seed)
    parts_a, parts_b = (
        x[torch.randperm(len(x), generator=generator).to(x.device)].tensor_split(subsets) for x in (a, b)
    )
    values = torch.stack([_squared_mmd(kernel, x, y) for x, y in zip(parts_a, parts_b, strict=True)])
    return KernelDistance(values.mean().item(), (values.std() / math.sqrt(subsets)).item())


def _squared_mmd(kernel: Kernel, x: Tensor, y: Tensor) -> Tensor:
    """The unbiased estimate on one subset: ``x (n, d)``, ``y (m, d)``."""

    def within(u: Tensor) -> Tensor:
        k = kernel(u, u)
        return (k.sum() - k.diagonal().sum()) / (len(u) * (len(u) - 1))

    return within(x) + within(y) - 2 * kernel(x, y).mean()


def _check_predictions(pred: Tensor, name: str = "pred", least: int = 2) -> None:
    if pred.is_floating_point() or pred.is_complex() or pred.dtype == torch.bool:
        raise TypeError(f"{name} must hold class indices (an integer dtype), got {pred.dtype}")
    if pred.dim() != 2 or pred.shape[0] < 1 or pred.shape[1] < least:
        raise ValueError(f"{name} must have shape (n, M) with n >= 1 and M >= {least}, got {tuple(pred.shape)}")


def _check_classes(values: Tensor, n_classes: int, name: str = "pred") -> None:
    if n_classes < 2:
        raise ValueError(f"n_classes must be at least 2, got {n_classes}")
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= n_classes:
        raise ValueError(f"{name} must lie in [0, {n_classes}), got [{low}, {high}]")


def _right(pred_targets: Tensor, labels: Tensor) -> Tensor:
    """1 where the prediction is the label: float64 (n, T) on the CPU."""
    _check_predictions(pred_targets, "pred_targets", least=1)
    if labels.shape != pred_targets.shape[:1]:
        raise ValueError(
            f"labels must have shape ({len(pred_targets)},), as many as pred_targets, got {tuple(labels.shape)}"
        )
    return (pred_targets == labels.to(pred_targets.device)[:, None]).double().cpu()


def _check_features(a: Tensor, b: Tensor, least: int) -> tuple[Tensor, Tensor]:
    for name, x in (("a", a), ("b", b)):
        if not x.is_floating_point():
            raise TypeError(f"{name} must hold features (a floating dtype), got {x.dtype}")
        if x.dim() != 2 or x.shape[1] < 1:
            raise ValueError(f"{name} must have shape (n, d), got {tuple(x.shape)}")
        if len(x) < least:
            raise ValueError(f"{name} must have at least {least} samples, got {len(x)}")
        if not x.isfinite().all():
            raise ValueError(f"{name} must be finite, got {int((~x.isfinite()).sum())} entries that are inf or NaN")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b must have the same number of features, got {a.shape[1]} and {b.shape[1]}")
    return a.detach().double(), b.detach().to(device=a.device, dtype=torch.float64)
