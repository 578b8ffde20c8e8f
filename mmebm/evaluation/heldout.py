"""What real tuples that training never saw say of a model, with or without labels: how well they are likely, rebuilt,
found and imitated.

bound       a lower bound on log p(X) by importance weighting with q(z | X), in nats per tuple
mse         of each modality decoded from a z inferred from all modalities, itself among them
cross_mse   of each modality decoded from a z inferred from all others
retrieval   each modality found among those of all tuples, given each other one
kernel      distance of samples to the tuples, whole and by modality

The first four need an inference network that learned, the last only samples. All squared errors are per element, in
model space.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import torch
from torch import Tensor

from mmebm.choices import Metric
from mmebm.data.base import check_count
from mmebm.evaluation.latent import System
from mmebm.evaluation.likelihood import log_constant
from mmebm.evaluation.metrics import gaussian_kernel_distance
from mmebm.models.inference import Expert
from mmebm.state import Batch

__all__ = [
    "METRICS",
    "Metric",
    "comparable",
    "held_out",
    "importance_bound",
    "kernel_distances",
    "mean_of",
    "retrieval",
    "summary",
]

# which end of each number of :func:`summary` is the good one
METRICS: Final[dict[str, Literal["highest", "lowest"]]] = {
    "bound": "highest",
    "mse": "lowest",
    "cross_mse": "lowest",
    "retrieval": "highest",
    "kernel": "lowest",
}
LEAST_ROWS: Final = 20  # for a kernel distance: ten parts of two
TOP: Final = 5


@torch.no_grad()
def held_out(
    system: System, x: Batch, *, samples: Batch | None = None, infers: bool = True, importance: int = 16, seed: int = 0
) -> dict[str, Any]:
    """Every number of the top of this file that there is.

    Args:
        system: the networks.
        x: modality name -> real tuples ``(n, *shape)`` that lack nothing, on the system's device.
        samples: as many joint samples or others; None for no kernel distance.
        infers: whether the inference network has learned; without it only the samples are measured.
        importance: samples of z per tuple for the bound.
        seed: of all draws.

    Returns:
        Plain data: ``n``; ``bound`` and its standard error over the tuples ``bound_error``; ``mse`` and ``cross_mse``
        by modality; ``retrieval``, see :func:`retrieval`; ``kernel``, see :func:`kernel_distances`. Numbers of two
        modalities are missing where there is one, and ``kernel`` below 20 rows or for samples that are not finite.
    """
    names, n = list(x), len(next(iter(x.values())))
    out: dict[str, Any] = {"n": n}
    g = system.generator
    if infers:
        rng = torch.Generator(system.device).manual_seed(seed)
        bound = importance_bound(system, x, samples=importance, rng=rng)
        out["bound"] = bound.mean().item()
        out["bound_error"] = bound.std().item() / math.sqrt(n) if n > 1 else 0.0
        decoded = g(system.inference.sample(x, rng))
        out["mse"] = {name: (decoded[name] - x[name]).square().mean().item() for name in names}
        if len(names) > 1:
            out["cross_mse"] = {}
            for name in names:
                given = {other: value for other, value in x.items() if other != name}
                guess = g.decoders[name](system.inference.sample(given, rng))
                out["cross_mse"][name] = (guess - x[name]).square().mean().item()
            out["retrieval"] = retrieval(system, x)
    if samples is not None and comparable(samples, n):
        out["kernel"] = kernel_distances(samples, x, seed=seed)
    return out


def comparable(samples: Batch, n: int) -> bool:
    """Enough, and all finite, as those of an energy gone astray are not."""
    few = min(n, len(next(iter(samples.values())))) < LEAST_ROWS
    return not few and all(bool(value.isfinite().all()) for value in samples.values())


def summary(result: Mapping[str, Any]) -> dict[str, float]:
    """A number of each kind, for a log and to choose by: those of :data:`METRICS` that ``result`` has."""
    out = {"bound": result["bound"]} if "bound" in result else {}
    for name in ("mse", "cross_mse"):
        if name in result:
            out[name] = mean_of(result[name])
    if "retrieval" in result:
        out["retrieval"] = result["retrieval"]["top"]
    if "kernel" in result:
        out["kernel"] = result["kernel"]["joint"]["value"]
    return out


def mean_of(by_modality: Mapping[str, float]) -> float:
    """The mean over modalities."""
    return math.fsum(by_modality.values()) / len(by_modality)


@torch.no_grad()
def importance_bound(system: System, x: Batch, *, samples: int, rng: torch.Generator) -> Tensor:
    """A lower bound on log p(x) per tuple, ``(n,)`` in nats of a density in model space: log of the mean of ``samples``
    weights p(x, z) / q(z | x) (Burda, Grosse and Salakhutdinov, ICLR 2016), tighter with more of them.

    The prior of z is N(0, I). Where a latent energy is on top of it the bound is of the model without that energy.
    Modalities of weight 0 have no density and are left out.
    """
    check_count("samples", samples)
    g, inference = system.generator, system.inference
    likely = {name: value for name, value in x.items() if g.weights[name] > 0}
    logs = []
    for _ in range(samples):
        z = inference.sample(x, rng)
        prior = Expert(torch.zeros_like(z), torch.zeros_like(z)).log_prob(z)
        logs.append(prior - g.negative_log_likelihood(likely, z) - inference.log_prob(z, x))
    return torch.stack(logs).double().logsumexp(0) - math.log(samples) + log_constant(g, likely)


@torch.no_grad()
def retrieval(system: System, x: Batch) -> dict[str, Any]:
    """Each modality of every tuple looked for among those of all, given another modality of it.

    The candidates are ranked by their likelihood at the mean of q(z | given). One that equals the right one is right
    too, as words are; the others that are no worse by the decoder than it count half.

    Returns:
        ``top``: the share of tuples among whose first five the right one is, over all pairs of modalities, and its
        standard error over tuples ``error``; ``chance``, what it is where the distinct values of the target come in a
        random order; ``pairs``: {"given -> target": {"first", "top", "median_rank"}}.
    """
    names, n = list(x), len(next(iter(x.values())))
    g, p = system.generator, 1.0 if system.generator.likelihood == "laplace" else 2.0
    pairs: dict[str, dict[str, float]] = {}
    luck, hits = [], []
    for target in names:
        candidates = x[target].flatten(1)
        # cdist squares: what all candidates have in common, such as a white ground, would drown float32
        mean = candidates.mean(0)
        same = torch.cdist(candidates, candidates, p=1.0) == 0
        same.fill_diagonal_(True)
        luck.append(chance_of_top(same.sum(1).tolist()))
        for given in names:
            if given == target:
                continue
            experts, weights = system.inference.join(system.inference.encode({given: x[given]}))
            z = (weights[..., None] * experts.mean).sum(0)
            far = torch.cdist(g.decoders[target](z).flatten(1) - mean, candidates - mean, p=p)
            own = far.diagonal()[:, None]
            better = ((far < own) & ~same).sum(1) + 0.5 * ((far == own) & ~same).sum(1)
            ranks = 1 + better
            hits.append((ranks < TOP + 0.5).double())
            pairs[f"{given} -> {target}"] = {
                "first": (ranks < 1.5).double().mean().item(),
                "top": hits[-1].mean().item(),
                "median_rank": ranks.double().median().item(),
            }
    by_tuple = torch.stack(hits).mean(0)
    error = by_tuple.std().item() / math.sqrt(n) if n > 1 else 0.0
    return {"top": by_tuple.mean().item(), "error": error, "chance": math.fsum(luck) / len(luck), "pairs": pairs}


def chance_of_top(equal: Sequence[int]) -> float:
    """The share of tuples whose own value is among the first :data:`TOP`, where the distinct values come in a random
    order and the tuples of one value stand together, as any decoder ranks them.

    Args:
        equal: of each tuple, how many have its value, itself among them.
    """
    groups = {size: count // size for size, count in Counter(equal).items()}
    values = sum(groups.values())
    share = 0.0
    for own, count in groups.items():
        # sets of other values by how many they are and how many tuples they have, fewer than TOP of these
        sets = {(0, 0): 1}
        for size, many in groups.items():
            others = many - (size == own)
            sets = _sum(sets, [(j, j * size, math.comb(others, j)) for j in range(min(others, (TOP - 1) // size) + 1)])
        # that just these come before the own one: k! (values - 1 - k)! / values! of all orders
        found = math.fsum(ways / (values * math.comb(values - 1, k)) for (k, _), ways in sets.items())
        share += own * count * found / len(equal)
    return share


def _sum(sets: Mapping[tuple[int, int], int], more: Sequence[tuple[int, int, int]]) -> dict[tuple[int, int], int]:
    out: dict[tuple[int, int], int] = {}
    for (k, total), ways in sets.items():
        for j, size, choices in more:
            if total + size < TOP:
                out[k + j, total + size] = out.get((k + j, total + size), 0) + ways * choices
    return out


def kernel_distances(samples: Batch, x: Batch, *, seed: int = 0) -> dict[str, Any]:
    """:func:`mmebm.evaluation.metrics.gaussian_kernel_distance` of samples to real tuples: ``joint`` over all
    modalities and ``by_modality``, each with ``value`` and ``error``. Elements of vectors and captions are standardised
    by the real ones first."""
    scaled: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for name, real in x.items():
        flat = real.flatten(1).double()
        # an image's dark border would be as loud as its middle
        spread = flat.std(0, unbiased=False) if real.dim() == 2 else flat.std(unbiased=False)
        spread = torch.where(spread > 1e-6, spread, 1.0)
        scaled[0][name], scaled[1][name] = samples[name].flatten(1) / spread, flat / spread
    distance = lambda names: gaussian_kernel_distance(
        {name: scaled[0][name] for name in names}, {name: scaled[1][name] for name in names}, seed=seed
    )._asdict()
    return {"joint": distance(list(x)), "by_modality": {name: distance([name]) for name in x}}
