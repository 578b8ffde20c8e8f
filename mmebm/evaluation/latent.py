"""What the latent holds: classes read off it before and after latent Langevin, and the way between two of it.

Latent classification asks how well a linear classifier finds the class of a tuple in z. Two conventions are in use, and
their numbers are not comparable: MoPoE's, the posterior's mean for every subset of modalities, learned from 500 rows,
and MMVAE+'s, a sample from each modality's expert, learned from the whole training set. :func:`latent_report` has both,
each before and after the latent chain, which the inference network is to catch up with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from mmebm.data.base import MultimodalDataset, check_count
from mmebm.evaluation.subsets import SUBSETS_PER_SIZE, subsets
from mmebm.state import Batch

__all__ = [
    "Encode",
    "Encoders",
    "System",
    "encoders",
    "interpolate",
    "interpolate_prior",
    "latent_classification",
    "latent_path",
    "latent_report",
    "usable_rows",
]

# Some modalities of n tuples, and a seed, to codes (n, d).
Encode = Callable[[Batch, int], Tensor]

CHUNK: Final = 1_000  # rows encoded or decoded at a time: bounds the memory


class System(Protocol):
    """What the evaluation uses of :class:`mmebm.training.system.System`: networks and the two chains."""

    @property
    def generator(self) -> Any: ...

    @property
    def inference(self) -> Any: ...

    @property
    def prior(self) -> Any: ...

    @property
    def device(self) -> torch.device: ...

    def generate(self, n: int, *, seed: int) -> dict[str, Tensor]:
        """``n`` tuples decoded from the prior."""
        ...

    def revise_latent(self, z: Tensor, x: Batch, *, seed: int, steps: int | None = None, **options: Any) -> Any:
        """The latent chain."""
        ...

    def revise_data(self, x: Batch, *, seed: int, steps: int | None = None, **options: Any) -> Any:
        """The data chain."""
        ...


class Encoders(NamedTuple):
    """Ways from modalities to z: the inference network's mean and sample, and where the latent chain takes each."""

    mean: Encode
    sample: Encode
    revised_mean: Encode
    revised_sample: Encode


def encoders(system: System, steps: int | None = None) -> Encoders:
    """The encoders of a system.

    The mean is that of q(z | x) as the system's inference joins its experts: of a mixture the mean over the experts, of
    a product the product's (MoPoE's own convention is the product over exactly the given subset).

    Args:
        system: the networks and the chains.
        steps: of the latent chain; None for as many as configured.
    """

    @torch.no_grad()
    def mean(x: Batch, seed: int) -> Tensor:
        return torch.stack([component.mean for component in system.inference(x)]).mean(0)

    @torch.no_grad()
    def sample(x: Batch, seed: int) -> Tensor:
        return system.inference.sample(x, torch.Generator(system.device).manual_seed(seed))

    def revised(start: Encode) -> Encode:
        return lambda x, seed: system.revise_latent(start(x, seed), x, seed=seed, steps=steps).state

    return Encoders(mean, sample, revised(mean), revised(sample))


def usable_rows(data: MultimodalDataset, *, labelled: bool) -> Tensor:
    """The tuples that lack no modality (and have a class): int64, on the CPU.

    Raises:
        ValueError: if there is none.
    """
    good = torch.ones(len(data), dtype=torch.bool)
    present = getattr(data, "present", None)
    if present is not None:
        good &= present.cpu().all(1)
    if labelled:
        good &= data.labels.cpu() >= 0
    rows = good.nonzero().flatten()
    if not len(rows):
        raise ValueError(
            f"{data.name!r} {data.split} has no tuple with all modalities"
            f"{' and a class' if labelled else ''}, and this evaluation needs some"
        )
    return rows


def latent_classification(
    encode: Encode,
    train: MultimodalDataset,
    test: MultimodalDataset,
    *,
    train_rows: int | None = 500,
    test_rows: int | None = None,
    sizes: Sequence[int] | None = None,
    subsets_per_size: int | None = SUBSETS_PER_SIZE,
    seed: int = 0,
) -> dict[str, Any]:
    """How well logistic regression finds the class in the codes of each subset of modalities.

    scikit-learn's, on the codes as they are: lbfgs, C = 1, at most 1,000 iterations.

    Args:
        encode: some modalities and a seed to codes ``(n, d)``; called with at most 1,000 rows at a time.
        train, test: labelled tuples; those that lack a modality are left out.
        train_rows: how many tuples it learns from, drawn by seed; None for all.
        test_rows: how many it is tested on, drawn by seed; None for all.
        sizes: numbers of given modalities; None for every one.
        subsets_per_size: see :func:`subsets`.
        seed: of rows, codes and subsets.

    Returns:
        Plain data: ``by_given`` (mean accuracy by the number of given modalities), ``by_subset`` ("a+b" -> accuracy),
        ``train_rows`` and ``test_rows``, the numbers used.

    Raises:
        ModuleNotFoundError: without scikit-learn.
        TypeError, ValueError: naming the argument, the value and what would do.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "latent classification needs scikit-learn: pip install 'mmebm[digits]'", name="sklearn"
        ) from error
    names = [m.name for m in test.modalities]
    sizes = range(1, len(names) + 1) if sizes is None else sizes
    if not sizes or not all(1 <= size <= len(names) for size in sizes):
        raise ValueError(f"sizes must lie in 1..{len(names)}, got {list(sizes)}")
    rng = torch.Generator().manual_seed(seed)

    def drawn(name: str, data: MultimodalDataset, count: int | None) -> Tensor:
        rows = usable_rows(data, labelled=True)
        if count is None:
            return rows
        return rows[torch.randperm(len(rows), generator=rng)[: check_count(name, count)]]

    learn, judge = drawn("train_rows", train, train_rows), drawn("test_rows", test, test_rows)
    seen = train.labels.cpu()[learn].unique()
    if len(seen) < 2:
        raise ValueError(f"train_rows must bring at least two classes, got class {seen.tolist()} in {len(learn)} rows")
    by_subset: dict[str, float] = {}
    by_given: dict[str, float] = {}
    for size, chosen in subsets(names, sizes, per_size=subsets_per_size, seed=seed).items():
        for given in chosen:
            model = LogisticRegression(C=1.0, solver="lbfgs", max_iter=1000, random_state=0)
            model.fit(*_codes(encode, train, learn, given, rng))
            by_subset["+".join(given)] = float(model.score(*_codes(encode, test, judge, given, rng)))
        by_given[str(size)] = math.fsum(by_subset["+".join(given)] for given in chosen) / len(chosen)
    return {"train_rows": len(learn), "test_rows": len(judge), "by_given": by_given, "by_subset": by_subset}


def _codes(
    encode: Encode, data: MultimodalDataset, rows: Tensor, given: Sequence[str], rng: torch.Generator
) -> tuple[Any, Any]:
    """Codes (n, d) and labels (n,) of the tuples ``rows`` as NumPy arrays."""
    parts = []
    for chunk in rows.split(CHUNK):
        batch = data.batch(chunk)
        # drawn, not counted up: seeds in sequence would share all batches but one with the next run's
        z = encode({name: batch[name] for name in given}, int(torch.randint(2**62, (), generator=rng)))
        if z.dim() != 2 or len(z) != len(chunk):
            raise ValueError(f"encode must give codes ({len(chunk)}, d), got {tuple(z.shape)}")
        if not z.isfinite().all():
            raise ValueError(
                f"encode must give finite codes, got {int((~z.isfinite()).any(1).sum())} of {len(z)} rows "
                "with inf or NaN"
            )
        parts.append(z.detach().cpu())
    return torch.cat(parts).double().numpy(), data.labels.cpu()[rows].numpy()


def latent_report(
    ways: Encoders, train: MultimodalDataset, test: MultimodalDataset, *, test_rows: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Latent classification by both conventions, before ("q") and after ("z_k") the latent chain.

    Returns:
        {"mean, 500 rows": {"q": ..., "z_k": ...}, "sample, all rows": {...}}, each as :func:`latent_classification`
        returns it; the second for single modalities only, as MMVAE+ does.
    """
    conventions: dict[str, tuple[Encode, Encode, dict[str, Any]]] = {
        "mean, 500 rows": (ways.mean, ways.revised_mean, {"train_rows": 500}),
        "sample, all rows": (ways.sample, ways.revised_sample, {"train_rows": None, "sizes": (1,)}),
    }
    return {
        name: {
            "q": latent_classification(before, train, test, test_rows=test_rows, seed=seed, **options),
            "z_k": latent_classification(after, train, test, test_rows=test_rows, seed=seed, **options),
        }
        for name, (before, after, options) in conventions.items()
    }


def latent_path(a: Tensor, b: Tensor, steps: int, *, how: Literal["spherical", "linear"] = "spherical") -> Tensor:
    """``steps`` codes from ``a`` to ``b``, both ends included.

    On a sphere, the default, the direction turns evenly and the length changes evenly: in many dimensions N(0, I) lives
    in a thin shell of radius sqrt(d), which the straight line between two independent draws leaves (its middle is at
    .71 of the radius, where a generator was not taught). Parallel and opposite codes, between which no arc is
    singled out, are joined by the straight line.

    Args:
        a, b: ``(n, d)``.
        steps: at least 2.
        how: "spherical" or "linear".

    Returns:
        ``(n, steps, d)``.

    Raises:
        TypeError, ValueError: naming the argument, the value and what would do.
    """
    check_count("steps", steps, least=2)
    if a.dim() != 2 or a.shape != b.shape:
        raise ValueError(f"a and b must have one shape (n, d), got {tuple(a.shape)} and {tuple(b.shape)}")
    if how not in ("spherical", "linear"):
        raise ValueError(f"how must be 'spherical' or 'linear', got {how!r}")
    t = torch.linspace(0, 1, steps, dtype=a.dtype, device=a.device)[None, :, None]
    a, b = a[:, None], b[:, None]
    line = (1 - t) * a + t * b
    if how == "linear":
        return line
    length_a, length_b = a.norm(dim=2, keepdim=True), b.norm(dim=2, keepdim=True)
    unit_a, unit_b = a / length_a, b / length_b
    # by both chords: the arc cosine loses half of the digits of a small angle
    angle = 2 * torch.atan2((unit_a - unit_b).norm(dim=2, keepdim=True), (unit_a + unit_b).norm(dim=2, keepdim=True))
    direction = (((1 - t) * angle).sin() * unit_a + (t * angle).sin() * unit_b) / angle.sin()
    arc = ((1 - t) * length_a + t * length_b) * direction
    # NaN, of a code 0, is no arc either
    return torch.where(angle.sin().abs() > 1e-4, arc, line)


@torch.no_grad()
def interpolate(
    system: System,
    x_a: Batch,
    x_b: Batch,
    steps: int = 8,
    *,
    how: Literal["spherical", "linear"] = "spherical",
    seed: int = 0,
    latent_steps: int | None = None,
    data_steps: int | None = 0,
) -> dict[str, Tensor]:
    """Decoded rows from tuples ``x_a`` to tuples ``x_b``, through their latents.

    Each end is inferred (a sample of q) and revised by the latent chain on the modalities given; the ends shown are
    therefore reconstructions, not ``x_a`` and ``x_b`` themselves.

    Args:
        system: the networks and the chains.
        x_a, x_b: some modalities of equally many tuples, ``(n, *shape)``; not necessarily the same ones.
        steps: columns of a row, ends included.
        how: see :func:`latent_path`.
        seed: of the whole draw.
        latent_steps: of the latent chain; 0 leaves z as inferred, None is as configured.
        data_steps: of the data chain on the decoded tuples; 0 leaves them, None is as configured.

    Returns:
        modality name -> ``(n, steps, *shape)``, all modalities.

    Raises:
        TypeError, ValueError: naming the argument, the value and what would do.
    """
    rng = torch.Generator().manual_seed(seed)
    ends = []
    for x in (x_a, x_b):
        way, own = encoders(system, latent_steps), int(torch.randint(2**62, (), generator=rng))
        ends.append(way.sample(x, own) if latent_steps == 0 else way.revised_sample(x, own))
    return _decoded(system, latent_path(ends[0], ends[1], steps, how=how), seed, data_steps)


@torch.no_grad()
def interpolate_prior(
    system: System,
    n: int,
    steps: int = 8,
    *,
    how: Literal["spherical", "linear"] = "spherical",
    seed: int = 0,
    data_steps: int | None = 0,
) -> dict[str, Tensor]:
    """``n`` decoded rows between pairs of draws from the prior; arguments and result as of :func:`interpolate`."""
    z = system.prior.draw(2 * check_count("n", n), seed=seed, device=system.device)
    return _decoded(system, latent_path(z[:n], z[n:], steps, how=how), seed, data_steps)


def _decoded(system: System, z: Tensor, seed: int, data_steps: int | None) -> dict[str, Tensor]:
    n, steps = z.shape[:2]
    parts = []
    for i, chunk in enumerate(z.flatten(0, 1).split(CHUNK)):
        x = system.generator(chunk)
        if data_steps != 0:
            x = system.revise_data(x, seed=seed, steps=data_steps, chain_offset=i * CHUNK).state
        parts.append(x)
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return {name: value.reshape(n, steps, *value.shape[1:]) for name, value in joined.items()}
