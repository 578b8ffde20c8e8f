"""How well a text fits an image: canonical correlation and retrieval of their features.

Sets of images with captions have no class in which the two could agree. What multimodal VAEs report on CUB (Shi,
Siddharth, Paige, Torr, NeurIPS 2019) is a correlation: features of images and of sentences are projected by a canonical
correlation analysis of real training tuples, and the score is the cosine of the two projections of a tuple. Beside it
stand retrieval in that space, both ways, and what real tuples and tuples put together at random have.

The projection. Features are standardised over the training tuples; with C_aa, C_bb, C_ab their covariances and r a
ridge, U S V^T is the singular value decomposition of (C_aa + r)^(-1/2) C_ab (C_bb + r)^(-1/2), and features project to

    p_a = S^(1/2) U^T (C_aa + r)^(-1/2) a,    p_b likewise with V:

every component counts by its correlation, so that those of noise do not and their number need not be chosen (as in
Gong, Ke, Isard, Lazebnik, "A multi-view embedding space for modeling internet images, tags, and their semantics", IJCV
2014). r is chosen on a fifth of the training tuples that the others do not contain. No test tuple takes part.

The features are functions that the user gives, of images and of strings to (n, d); the score is as good as they are.
Where none are given there are plain ones, which know colours, places and words and nothing of birds:
:func:`plain_image_features`, :class:`Words`. Scores on other features, or of another number of rows, do not compare.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmebm.data.base import Modality, MultimodalDataset, check_count
from mmebm.data.words import tokens
from mmebm.evaluation.latent import CHUNK, usable_rows
from mmebm.state import Batch

__all__ = [
    "Matching",
    "Projection",
    "Words",
    "fit_matching",
    "fit_projection",
    "match_report",
    "match_table",
    "matched_pairs",
    "plain_image_features",
    "scores",
]

# Natural values of one modality, images in [0, 1] (n, C, H, W) or strings (n,), to features (n, d).
Features = Callable[[np.ndarray], Any]

RIDGES: Final = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # in units of a feature's variance, which is 1
FIT_ROWS: Final = 5_000  # training tuples, at most
ROWS: Final = 1_000  # tuples that are scored, at most: retrieval among more is harder
LEAST_ROWS: Final = 20  # of either
SIDE: Final = 8  # of the areas of an image whose means are features
LEVELS: Final = 4  # of each colour in the histogram
MOST_WORDS: Final = 500


def plain_image_features(images: np.ndarray) -> np.ndarray:
    """Means of 8 x 8 areas and a histogram of 4 levels of each colour: images ``(n, C, H, W)`` in [0, 1] to ``(n, d)``.

    Example:
        >>> plain_image_features(np.zeros((2, 3, 32, 32), np.float32)).shape
        (2, 256)
    """
    x = torch.as_tensor(images, dtype=torch.float32)
    areas = F.adaptive_avg_pool2d(x, (min(SIDE, x.shape[2]), min(SIDE, x.shape[3]))).flatten(1)
    x = x if x.shape[1] <= 3 else x.mean(1, keepdim=True)  # more channels than colours: their mean
    levels = (x * LEVELS).long().clamp(0, LEVELS - 1).flatten(2)  # (n, C, pixels)
    places = LEVELS ** torch.arange(x.shape[1])
    bins = F.one_hot((levels * places[:, None]).sum(1), LEVELS ** x.shape[1]).to(torch.float32).mean(1)
    return torch.cat([areas, bins], dim=1).numpy()


class Words:
    """Which words a text has, of the 500 most frequent that occur in two texts at least: strings to ``(n, d)``.

    Args:
        texts: those of the training tuples.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        counts = Counter(word for text in texts for word in set(tokens(text)))
        common = [word for word, count in counts.most_common(MOST_WORDS) if count > 1]
        self.number: dict[str, int] = {word: k for k, word in enumerate(common)}

    def __call__(self, texts: np.ndarray) -> np.ndarray:
        out = np.zeros((len(texts), max(len(self.number), 1)), dtype=np.float32)
        for row, text in enumerate(texts):
            out[row, [self.number[word] for word in set(tokens(str(text))) if word in self.number]] = 1.0
        return out


class Projection(NamedTuple):
    """Two projections into one space (the top of this file), of features ``(n, d)`` in float64."""

    centres: tuple[Tensor, Tensor]
    weights: tuple[Tensor, Tensor]
    correlations: Tensor  # canonical, of the training tuples, shrunk by the ridge
    ridge: float

    def __call__(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of length 1, whose product is the cosine; rows of zeros for features that say nothing."""
        left, right = (
            F.normalize((x.to(c) - c) @ w, dim=1) for x, c, w in zip((a, b), self.centres, self.weights, strict=True)
        )
        return left, right


def fit_projection(a: Tensor, b: Tensor, *, ridge: float | None = None, seed: int = 0) -> Projection:
    """The canonical correlation analysis of two features of the same tuples.

    Args:
        a, b: ``(n, d_a)`` and ``(n, d_b)``, row i of the same tuple.
        ridge: added to the variances, in units of a feature's variance; None chooses it on a fifth of the rows.
        seed: which fifth.

    Raises:
        ValueError: for fewer than 20 rows, another number of rows in ``b``, or values that are not finite.

    Example:
        >>> z = torch.randn(500, 2)
        >>> projection = fit_projection(torch.randn(500, 9), torch.randn(500, 7))
        >>> left, right = projection(torch.randn(3, 9), torch.randn(3, 7))
    """
    a, b = (x.detach().cpu().double() for x in (a, b))
    if a.dim() != 2 or b.dim() != 2 or len(a) != len(b) or len(a) < LEAST_ROWS:
        raise ValueError(
            f"a and b must be features (n, d) of the same n >= {LEAST_ROWS} tuples, got {tuple(a.shape)} and "
            f"{tuple(b.shape)}"
        )
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("features must be finite, got some with inf or NaN")
    if ridge is not None:
        return _fit(a, b, ridge)
    order = torch.randperm(len(a), generator=torch.Generator().manual_seed(seed))
    held, rest = order[: len(a) // 5], order[len(a) // 5 :]

    def good(value: float) -> float:
        cosines = _cosines(*_fit(a[rest], b[rest], value)(a[held], b[held]))
        return float(cosines.diagonal().mean() - _mismatched(cosines))

    return _fit(a, b, max(RIDGES, key=good))


def _fit(a: Tensor, b: Tensor, ridge: float) -> Projection:
    centres, roots, standard, spreads = [], [], [], []
    for x in (a, b):
        centre, spread = x.mean(0), x.std(0, unbiased=False)
        spread = torch.where(spread > 1e-8 * (1 + centre.abs()), spread, torch.inf)  # what never changes says nothing
        y = (x - centre) / spread
        values, vectors = torch.linalg.eigh(y.T @ y / len(y))
        centres.append(centre)
        spreads.append(spread)
        standard.append(y)
        roots.append((vectors / (values.clamp(min=0) + ridge).sqrt()) @ vectors.T)
    left, correlations, right = torch.linalg.svd(
        roots[0] @ (standard[0].T @ standard[1] / len(a)) @ roots[1], full_matrices=False
    )
    weights = [
        (root / spread[:, None]) @ vectors * correlations.sqrt()
        for root, spread, vectors in zip(roots, spreads, (left, right.T), strict=True)
    ]
    return Projection((centres[0], centres[1]), (weights[0], weights[1]), correlations, ridge)


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.T


def _mismatched(cosines: Tensor) -> float:
    n = len(cosines)
    return float((cosines.sum() - cosines.diagonal().sum()) / max(n * (n - 1), 1))


def scores(a: Tensor, b: Tensor) -> dict[str, Any]:
    """What projections ``(n, d)`` of ``n`` pairs, rows of length 1, say of how well these belong together.

    Returns:
        ``n``; ``correlation``, the mean cosine of a pair, with its standard error ``correlation_error``, and
        ``mismatched``, that of all pairs that do not belong together; and for each direction, ``a_to_b`` (b is looked
        for, given a) and ``b_to_a``, the share of pairs whose partner comes ``first`` and among the first ``five``, and
        the ``median_rank``. Equal cosines count as if in a random order, so that features that are all alike are at
        chance: 1 / n, 5 / n, (n + 1) / 2. (Where all candidates are one of two the median may leave chance, the shares
        do not.)

    Example:
        >>> scores(torch.eye(30), torch.eye(30))["a_to_b"]["first"]
        1.0
    """
    cosines = _cosines(a.double(), b.double())
    own, n = cosines.diagonal(), len(cosines)
    out: dict[str, Any] = {
        "n": n,
        "correlation": own.mean().item(),
        "correlation_error": own.std().item() / math.sqrt(n) if n > 1 else 0.0,
        "mismatched": _mismatched(cosines),
    }
    for name, table in (("a_to_b", cosines), ("b_to_a", cosines.T)):
        # up to rounding: products of equal rows differ in their last bits
        better = (table > own[:, None] + 1e-9).sum(1).double()
        equal = ((table - own[:, None]).abs() <= 1e-9).sum(1).double()  # itself among them
        found = {key: ((k - better) / equal).clamp(0, 1).mean().item() for key, k in (("first", 1), ("five", 5))}
        out[name] = {**found, "median_rank": (better + (equal + 1) / 2).median().item()}
    return out


@dataclass(frozen=True)
class Matching:
    """A judge of one pair of modalities: features of each, and the projection of both."""

    modalities: tuple[Modality, Modality]
    features: tuple[Features, Features]
    projection: Projection
    rows: int

    def score(self, a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
        """:func:`scores` of natural values of both modalities, row i of one tuple."""
        parts = [_features(m, f, x) for m, f, x in zip(self.modalities, self.features, (a, b), strict=True)]
        return scores(*self.projection(*parts))


def _features(modality: Modality, function: Features, values: np.ndarray) -> Tensor:
    """``function(values)`` as float64 ``(n, d)`` on the CPU, checked."""
    found = function(values)
    x = torch.as_tensor(np.asarray(found.detach().cpu() if isinstance(found, Tensor) else found), dtype=torch.float64)
    if x.dim() != 2 or len(x) != len(values) or not x.shape[1] or not x.isfinite().all():
        raise ValueError(
            f"the features of {modality.name!r} must be finite numbers ({len(values)}, d), got shape {tuple(x.shape)}"
        )
    return x


def matched_pairs(modalities: Sequence[Modality]) -> list[tuple[Modality, Modality]]:
    """Every image with every caption; one of a few words is a class, which coherence judges better."""
    images = [m for m in modalities if m.kind == "image"]
    return [(image, m) for image in images for m in modalities if m.kind == "caption"]


def _rows(data: MultimodalDataset, image: str, n: int, seed: int) -> Tensor:
    """At most ``n`` tuples that lack nothing, none of which has the image of another one."""
    rows = usable_rows(data, labelled=False)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    column = [m.name for m in data.modalities].index(image)
    _, first = np.unique(data.index[:, column].cpu().numpy()[rows.numpy()], return_index=True)
    return rows[torch.from_numpy(np.sort(first))[:n]]


def _natural(data: MultimodalDataset, rows: Tensor, pair: Sequence[Modality]) -> list[np.ndarray]:
    parts = [data.batch(chunk) for chunk in rows.split(CHUNK)]
    return [np.concatenate([m.natural(part[m.name]) for part in parts]) for m in pair]


def fit_matching(
    train: MultimodalDataset,
    pair: tuple[Modality, Modality],
    features: Mapping[str, Features] | None = None,
    *,
    n: int = FIT_ROWS,
    seed: int = 0,
) -> Matching:
    """The judge of an image and a text, fitted to training tuples.

    Args:
        train: tuples to fit to.
        pair: an image and a text of its modalities (:func:`matched_pairs`).
        features: by modality, functions of natural values (images ``(n, C, H, W)`` in [0, 1], strings ``(n,)``) to
            ``(n, d)``; the plain ones where there is none.
        n: tuples, at most, no two with the same image.
        seed: which tuples.

    Raises:
        ValueError: for fewer than 20 tuples, or features that are none.
    """
    rows = _rows(train, pair[0].name, check_count("n", n), seed)
    if len(rows) < LEAST_ROWS:
        raise ValueError(
            f"a canonical correlation needs {LEAST_ROWS} training tuples of different images, there are {len(rows)}"
        )
    values, given = _natural(train, rows, pair), features or {}
    own: tuple[Features, Features] = (plain_image_features, Words(values[1].tolist()))
    functions = tuple(given.get(m.name, function) for m, function in zip(pair, own, strict=True))
    parts = [_features(m, f, x) for m, f, x in zip(pair, functions, values, strict=True)]
    return Matching(pair, (functions[0], functions[1]), fit_projection(*parts, seed=seed), len(rows))


def match_report(
    points: Mapping[str, Batch],
    completions: Mapping[str, Callable[[Batch, int], Batch]],
    test: MultimodalDataset,
    train: MultimodalDataset,
    features: Mapping[str, Features] | None = None,
    *,
    n: int = ROWS,
    seed: int = 0,
) -> dict[str, Any]:
    """How well every image fits every text, in joint samples and where one is given and the other completed.

    Args:
        points: joint samples in model space by the name of their point.
        completions: ways to complete: given modalities and a seed -> all modalities.
        test, train: real tuples; those of ``train`` fit the projection.
        features: as in :func:`fit_matching`.
        n: rows, at most: real ones, completions of the same, and samples, as many of each.
        seed: of the choice of rows and of the completions.

    Returns:
        {"image ~ text": {"fitted_to": rows, "ridge": r, "real": :func:`scores`, "points": {point: ...}, "given image":
        {way: ...}, "given text": {way: ...}}}, where a is the image and b the text; a reason in their place where there
        are fewer than 20 tuples. Samples that are not finite, as of an energy gone astray, are left out. Empty for sets
        that have no image or no caption.
    """
    out: dict[str, Any] = {}
    for pair in matched_pairs(test.modalities):
        image, text = (m.name for m in pair)
        most = min([n, *(len(x[image]) for x in points.values())])
        rows = _rows(test, image, most, seed)
        try:
            judge = fit_matching(train, pair, features, seed=seed)
            if len(rows) < LEAST_ROWS:
                raise ValueError(f"{LEAST_ROWS} test tuples with images of their own are needed, there are {len(rows)}")
        except ValueError as error:
            out[f"{image} ~ {text}"] = {"skipped": str(error)}
            continue
        real = _natural(test, rows, pair)
        found: dict[str, Any] = {
            "fitted_to": judge.rows,
            "ridge": judge.projection.ridge,
            "features": {m.name: "given" if m.name in (features or {}) else "plain" for m in pair},
            "real": judge.score(*real),
            "points": {
                point: judge.score(*(m.natural(x[m.name][: len(rows)]) for m in pair))
                for point, x in points.items()
                if _finite(x)
            },
        }
        for given, wanted in ((image, text), (text, image)):
            m = pair[0] if wanted == image else pair[1]
            found[f"given {given}"] = {}
            for way, complete in completions.items():
                x = complete({given: test.batch(rows)[given]}, seed)[wanted]
                if _finite({wanted: x}):
                    made = m.natural(x)
                    found[f"given {given}"][way] = judge.score(
                        *((made, real[1]) if wanted == image else (real[0], made))
                    )
        out[f"{image} ~ {text}"] = found
    return out


def _finite(x: Batch) -> bool:
    return all(bool(value.isfinite().all()) for value in x.values())


def match_table(report: Mapping[str, Any]) -> str:
    """:func:`match_report` as text."""
    lines: list[str] = []
    for name, found in report.items():
        if "skipped" in found:
            lines += [f"not measured: {name}: {found['skipped']}"]
            continue
        image, _, text = name.partition(" ~ ")
        n = found["real"]["n"]
        kinds = ", ".join(f"{kind} features of {m}" for m, kind in found["features"].items())
        lines += [
            f"{name}: {kinds}; canonical correlation of {found['fitted_to']} training tuples; {n} rows",
            f"{'':<34}{'correlation':>18}{'mismatched':>12}{f'{image} -> {text}':>30}{f'{text} -> {image}':>30}",
            f"{'':<34}{'':>30}" + 2 * f"{'R@1':>10}{'R@5':>10}{'median':>10}",
        ]
        several = list(found["points"].items())
        for given in (image, text):
            several += [(f"{way}, given {given}", values) for way, values in found[f"given {given}"].items()]
        for row, values in [*several, ("real tuples", found["real"])]:
            ways = "".join(
                f"{values[way]['first']:>10.3f}{values[way]['five']:>10.3f}{values[way]['median_rank']:>10.1f}"
                for way in ("a_to_b", "b_to_a")
            )
            score = f"{values['correlation']:>11.3f} ±{values['correlation_error']:.3f}{values['mismatched']:>12.3f}"
            lines.append(f"{row[:33]:<34}{score}{ways}")
        chance = f"{1 / n:>10.3f}{5 / n:>10.3f}{(n + 1) / 2:>10.1f}"
        lines.append(f"{'chance':<34}{0.0:>11.3f}{'':>7}{0.0:>12.3f}{chance}{chance}")
    return "\n".join(lines)
