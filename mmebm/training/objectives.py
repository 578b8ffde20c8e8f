"""The bounds that generator and inference learn from: the paper's warm-up and the published multimodal VAEs.

All take the same networks, the same batch and the same trainer, so that they differ in their formula only
(``docs/baselines.md`` has them side by side, with what differs from the published set-ups). Of a row that lacks
modalities each takes the likelihoods, experts and subsets of what the row has.

``log p(x | z)`` stands for the generator's weighted log-likelihood without its constant; every objective is therefore a
bound up to that constant: for sum_m D_m log(sigma sqrt(2 pi)) (Gaussian) or sum_m D_m log(2 sigma) (Laplace), D_m the
number of elements of x_m, subtract it. With ``beta`` = 1 and weights of 1 each is at most log p(X), save where it says
otherwise.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from typing import Any, Final, Literal, Protocol

import torch
from torch import Tensor, nn

from mmebm.choices import Joint
from mmebm.models.generator import SharedGenerator
from mmebm.models.inference import Expert, Experts, JointInference, pick
from mmebm.state import Batch, integer, one_number

__all__ = [
    "JOINT_OF",
    "OBJECTIVES",
    "Objective",
    "contrastive",
    "mmvae",
    "mmvae_plus",
    "mopoe",
    "mvae",
    "mvtcae",
    "objective",
    "single_expert",
]


class Objective(Protocol):
    """What the trainer maximises over generator and inference."""

    def __call__(
        self,
        generator: SharedGenerator,
        inference: JointInference,
        x: Batch,
        rng: torch.Generator,
        *,
        beta: float,
        present: Batch | None = None,
        experts: Experts | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The bound of a batch.

        Args:
            generator, inference: the networks; they hold the same modalities and the same latent.
            x: {modality: (n, *shape)}.
            rng: of the draw.
            beta: weight of the divergences.
            present: {modality: bool (n,)}, which rows have it; None where all have all. Every row has one at least.
            experts: ``inference.encode(x, present)``, where it is there already.

        Returns:
            The bound averaged over rows, a scalar, and the z of one sample per row (n, latent), detached.
        """
        ...


def single_expert(
    generator: SharedGenerator,
    inference: JointInference,
    x: Batch,
    rng: torch.Generator,
    *,
    beta: float,
    present: Batch | None = None,
    experts: Experts | None = None,
    self_reconstruction: Literal["full", "detached"] = "full",
) -> tuple[Tensor, Tensor]:
    """Each row encoded by one component c of the configured joint, picked uniformly; all its modalities decoded.

        E_{z ~ q_c} log p(X | z) - beta KL(q_c || N(0, I))

    The average over c bounds the mixture's bound from below (the divergence is convex).

    Args:
        generator, inference, x, rng, beta, present, experts: as every :class:`Objective`.
        self_reconstruction: "full", the formula; or "detached": the same value, but no gradient of log p(x_m | z)
            reaches expert m through the shared elements of z, so that what only x_m itself needs goes into its private
            ones (networks with ``private`` > 0) and z keeps what the others can read off it.
    """
    if self_reconstruction not in ("full", "detached"):
        raise ValueError(f"self_reconstruction must be 'full' or 'detached', got {self_reconstruction!r}")
    experts = experts or inference.encode(x, present)
    components, weights = inference.join(experts)
    chosen = pick(weights, rng, uniform=present is None)
    rows = torch.arange(chosen.shape[0], device=chosen.device)
    picked = Expert(components.mean[chosen, rows], components.logvar[chosen, rows])
    noise = torch.stack(
        [
            torch.randn(picked.mean.shape, generator=rng, device=rows.device, dtype=picked.mean.dtype)
            for _ in range(len(weights))
        ]
    )[chosen, rows]
    z = picked.mean + (0.5 * picked.logvar).exp() * noise
    kl = components.kl()[chosen, rows]
    if self_reconstruction == "full":
        nll = generator.negative_log_likelihood(x, z, present)
        return -(nll + beta * kl).mean(), z.detach()
    terms = []
    for m, (name, value) in enumerate(x.items()):
        joined, _ = inference.join(_held_back(experts, m, inference.shared))
        own = joined.mean[chosen, rows] + (0.5 * joined.logvar[chosen, rows]).exp() * noise
        terms.append(generator.negative_log_likelihood({name: value}, own, present))
    return -(torch.stack(terms).sum(0) + beta * kl).mean(), z.detach()


def _held_back(experts: Experts, m: int, shared: int) -> Experts:
    """The same experts, without the gradients of what expert ``m`` says of the first ``shared`` elements."""

    def held(value: Tensor) -> Tensor:
        own = torch.cat([value[m, :, :shared].detach(), value[m, :, shared:]], dim=1)
        return torch.cat([value[:m], own[None], value[m + 1 :]])

    return dataclasses.replace(experts, mean=held(experts.mean), logvar=held(experts.logvar))


def mvae(
    generator: SharedGenerator,
    inference: JointInference,
    x: Batch,
    rng: torch.Generator,
    *,
    beta: float,
    present: Batch | None = None,
    experts: Experts | None = None,
    subsets: int = 1,
) -> tuple[Tensor, Tensor]:
    """Product of experts with sub-sampled training (Wu and Goodman, NeurIPS 2018).

        q(z | X_S) ~ N(z; 0, I) prod_{m in S} q_m(z | x_m)
        L(S) = E_{q(z | X_S)} log p(X_S | z) - beta KL(q(z | X_S) || N(0, I))

    averaged over S = everything, each modality alone, and ``subsets`` random S: each modality enters with probability
    1/2, and where none does, all do. The paper adds them up. L(S) bounds log p(X_S) and not log p(X): the average is at
    most the average of log p(X_S) over the same S.

    Args:
        generator, inference, x, rng, beta, present, experts: as every :class:`Objective`.
        subsets: how many random ones.
    """
    subsets = integer("subsets", subsets, 0)
    experts = experts or inference.encode(x, present)
    has = experts.has.T
    n, count = has.shape
    alone = torch.eye(count, dtype=torch.bool, device=has.device)[:, None] & has
    some = (torch.rand(subsets, n, count, generator=rng, device=has.device) < 0.5) & has
    some = torch.where(some.any(-1, keepdim=True), some, has)
    members = torch.cat([has[None], alone, some])
    joined = experts.product(members)
    z = joined.sample(rng)
    nll = _negative_log_likelihood(generator, x, z, members)
    there = members.any(-1).to(nll.dtype)
    bound = -(there * (nll + beta * joined.kl())).sum(0) / there.sum(0)
    return bound.mean(), z[0].detach()


def mmvae(
    generator: SharedGenerator,
    inference: JointInference,
    x: Batch,
    rng: torch.Generator,
    *,
    beta: float,
    present: Batch | None = None,
    experts: Experts | None = None,
    samples: int = 1,
) -> tuple[Tensor, Tensor]:
    """Mixture of experts, a stratum per expert (Shi et al., NeurIPS 2019; its looser bound).

        1/M sum_m E_{z_1..z_K ~ q_m} log 1/K sum_k p(X | z_k) (N(z_k; 0, I) / q(z_k | X))^beta,   q = 1/M sum_m q_m

    For K = 1, KL(q || N(0, I)) is computed as the mean over m of KL(q_m || N(0, I)) + E_{q_m} log(q / q_m): the first
    in closed form, the second, in [-log M, 0] on average, from the sample. Gradients are those of the formula; the
    paper's doubly reparameterised estimator for K > 1 is not used.

    Args:
        generator, inference, x, rng, beta, present, experts: as every :class:`Objective`.
        samples: K per expert; above 1 with ``beta`` other than 1 this is no bound.
    """
    return _stratified(generator, inference, x, rng, beta, present, experts, samples, auxiliary=None)


def mmvae_plus(
    generator: SharedGenerator,
    inference: JointInference,
    x: Batch,
    rng: torch.Generator,
    *,
    beta: float,
    present: Batch | None = None,
    experts: Experts | None = None,
    samples: int = 1,
) -> tuple[Tensor, Tensor]:
    """:func:`mmvae` of u, with private latents (Palumbo, Daunhawer and Vogt, ICLR 2023).

        1/M sum_m E log p(x_m | u, w_m) prod_{n != m} p(x_n | u, w_n)
                        (N(u; 0, I) N(w_m; 0, I) / (q(u | X) q_m(w_m | x_m)))^beta
        u ~ q_m(u | x_m),  w_m ~ q_m(w_m | x_m),  w_n ~ r_n = N(0, s_n^2) for n != m,  q(u | X) = 1/M sum_m q_m(u | x_m)

    What a modality has for itself it cannot learn from another one, so that a target's own w_n is drawn from r_n, whose
    scale is learned (``inference.auxiliary``). The model that generates has w_n ~ N(0, I) instead: r_n belongs to
    training only. Stratum m therefore bounds the log-likelihood of the model with r_n as the prior of every w_n but
    w_m, and not that of the model that generates.

    Args:
        generator, inference, x, rng, beta, present, experts: as every :class:`Objective`; both networks with
            ``private`` > 0.
        samples: K per expert, as in :func:`mmvae`.

    Raises:
        ValueError: for networks without private latents.
    """
    if inference.auxiliary is None or not generator.private:
        raise ValueError(
            f"mmvae+ needs private latents, got private={generator.private} in the generator and "
            f"private={inference.private} in the inference network"
        )
    logvar = torch.cat([inference.auxiliary.new_zeros(inference.shared), inference.auxiliary.flatten()])
    return _stratified(generator, inference, x, rng, beta, present, experts, samples, auxiliary=logvar)


def mopoe(
    generator: SharedGenerator,
    inference: JointInference,
    x: Batch,
    rng: torch.Generator,
    *,
    beta: float,
    present: Batch | None = None,
    experts: Experts | None = None,
) -> tuple[Tensor, Tensor]:
    """Mixture of the products over all subsets (Sutter, Daunhawer and Vogt, ICLR 2021).

        q_S ~ N(z; 0, I) prod_{m in S} q_m(z | x_m);   mean over S of E_{q_S} log p(X | z) - beta KL(q_S || N(0, I))

    over the non-empty subsets S of what the row has. The likelihood is taken at a z of one S per row, picked uniformly;
    the divergences of all S are in closed form. By convexity their mean is at least that of the mixture.
    """
    experts = experts or inference.encode(x, present)
    components, weights = inference.join(experts, "mixture_of_products")
    chosen = pick(weights, rng, uniform=present is None)
    rows = torch.arange(chosen.shape[0], device=chosen.device)
    z = Expert(components.mean[chosen, rows], components.logvar[chosen, rows]).sample(rng)
    nll = generator.negative_log_likelihood(x, z, present)
    return -(nll + beta * (weights * components.kl()).sum(0)).mean(), z.detach()


def mvtcae(
    generator: SharedGenerator,
    inference: JointInference,
    x: Batch,
    rng: torch.Generator,
    *,
    beta: float,
    present: Batch | None = None,
    experts: Experts | None = None,
    alpha: float = 5 / 6,
) -> tuple[Tensor, Tensor]:
    """Total correlation: the joint posterior is also drawn to each expert (Hwang et al., NeurIPS 2021).

        E_q log p(X | z) - beta M / (M - alpha) ((1 - alpha) KL(q || N(0, I)) + alpha / M sum_m KL(q || q_m)),
        q(z | X) ~ prod_m q_m(z | x_m), without the prior

    The published objective is this times (M - alpha) / M, which has the same maximiser; so scaled it is the plain bound
    where M = 1. M counts what the row has. It is no bound of log p(X): the weight of KL(q || N(0, I)) is below 1.

    Args:
        generator, inference, x, rng, beta, present, experts: as every :class:`Objective`.
        alpha: share of the conditional divergences (the paper's code: tc_ratio), in [0, 1).
    """
    if not 0 <= one_number("alpha", alpha) < 1:
        raise ValueError(f"alpha must lie in [0, 1), got {alpha!r}")
    experts = experts or inference.encode(x, present)
    stacked, _ = inference.join(experts, "product_without_prior")
    joined = Expert(stacked.mean[0], stacked.logvar[0])
    z = joined.sample(rng)
    has = experts.has.to(z.dtype)
    count = has.sum(0)
    conditional = (has * joined.kl(experts.each)).sum(0)
    divergence = (count * (1 - alpha) * joined.kl() + alpha * conditional) / (count - alpha)
    nll = generator.negative_log_likelihood(x, z, present)
    return -(nll + beta * divergence).mean(), z.detach()


def _negative_log_likelihood(generator: SharedGenerator, x: Batch, z: Tensor, members: Tensor | None = None) -> Tensor:
    """-log p(x | z), (T, n), of T samples z (T, n, latent) for each row; over its ``members`` (T, n, M), or all."""
    times, n = z.shape[:2]
    present = None if members is None else dict(zip(x, members.flatten(0, 1).unbind(-1), strict=True))
    repeated = {name: value.repeat(times, *[1] * (value.dim() - 1)) for name, value in x.items()}
    return generator.negative_log_likelihood(repeated, z.flatten(0, 1), present).reshape(times, n)


def _stratified(
    generator: SharedGenerator,
    inference: JointInference,
    x: Batch,
    rng: torch.Generator,
    beta: float,
    present: Batch | None,
    experts: Experts | None,
    samples: int,
    auxiliary: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The mixture's bound over all of z, or, with the log-variances of r over z, over u (see :func:`mmvae_plus`)."""
    samples = integer("samples", samples, 1)
    experts = experts or inference.encode(x, present)
    count, n, latent = experts.mean.shape
    weights = experts.has.to(experts.mean.dtype) / experts.has.sum(0)
    # strata first, then samples, then the experts whose density is taken
    mean, logvar = experts.mean[:, None], experts.logvar[:, None]
    spread = logvar if auxiliary is None else torch.where(experts.says[:, None], logvar, auxiliary)
    noise = torch.randn((count, samples, n, latent), generator=rng, device=mean.device, dtype=mean.dtype)
    z = mean + (0.5 * spread).exp() * noise
    part = slice(None) if auxiliary is None else slice(inference.shared)
    densities = Expert(experts.mean[..., part], experts.logvar[..., part]).log_prob(z[:, :, None, :, part])
    mixture = (densities + weights.log()).logsumexp(2)
    own = densities.diagonal(dim1=0, dim2=2).movedim(-1, 0)
    if samples == 1:
        divergence = experts.each.kl()[:, None]
    else:
        # elements of which expert m says nothing are N(0, I) in both
        zero = torch.zeros_like(mean)
        divergence = Expert(mean, logvar).log_prob(z) - Expert(zero, zero).log_prob(z)
    members = None if present is None else experts.has.T.expand(count * samples, n, count)
    nll = _negative_log_likelihood(generator, x, z.flatten(0, 1), members).reshape(count, samples, n)
    value = -nll - beta * (divergence + mixture - own)
    bound = value.logsumexp(1) - math.log(samples)
    chosen = pick(weights, rng, uniform=present is None)
    kept = z[chosen, 0, torch.arange(n, device=z.device)]
    return (weights * bound).sum(0).mean(), kept.detach()


def contrastive(experts: Experts, *, shared: int | None = None, temperature: float = 0.1) -> Tensor:
    """Symmetric InfoNCE between the experts' means: which row of modality b belongs to this row of modality a.

        mean over a != b and rows i of  -log exp(u_ai . u_bi / t) / sum_j exp(u_ai . u_bj / t),   u = mean / |mean|

    with t the temperature, over the shared elements of the means. A row takes part in a pair of modalities where it has
    both; the sum over j goes over the rows that do. Rows are those of this process (van den Oord, Li and Vinyals,
    arXiv 1807.03748; between two modalities Radford et al., ICML 2021).

    Args:
        experts: of :meth:`mmebm.models.JointInference.encode`.
        shared: how many elements of z, from the first on, all modalities share; None for all.
        temperature: t, above 0.

    Returns:
        A scalar of nats: log n where nothing is told apart among n rows; 0 where no row has two modalities.

    Example:
        >>> eye = torch.eye(4)[None].expand(2, 4, 4)
        >>> every = torch.ones(2, 4, 4, dtype=torch.bool)
        >>> experts = Experts(("a", "b"), eye, torch.zeros_like(eye), every, every[..., 0])
        >>> bool(contrastive(experts) < 1e-3)
        True
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature!r}")
    # autocast would take the similarities in 16 bits
    with torch.autocast(experts.mean.device.type, enabled=False):
        u = nn.functional.normalize(experts.mean[..., :shared], dim=-1)
        similar = torch.einsum("aid,bjd->abij", u, u) / temperature
        both = experts.has[:, None] & experts.has
        lowest = torch.finfo(similar.dtype).min
        log_p = similar.masked_fill(~both[:, :, None], lowest).log_softmax(-1).diagonal(dim1=-2, dim2=-1)
        counted = both & ~torch.eye(len(u), dtype=torch.bool, device=u.device)[..., None]
        return -torch.where(counted, log_p, 0.0).sum() / counted.sum().clamp(min=1)


OBJECTIVES: Final[dict[str, Objective]] = {
    "single_expert": single_expert,
    "mvae": mvae,
    "mmvae": mmvae,
    "mopoe": mopoe,
    "mvtcae": mvtcae,
    "mmvae+": mmvae_plus,
}

# The joint posterior that an objective trains, so the one to infer and to evaluate with; None: any.
JOINT_OF: Final[dict[str, Joint | None]] = {
    "single_expert": None,
    "mvae": "product",
    "mmvae": "mixture",
    "mopoe": "mixture_of_products",
    "mvtcae": "product_without_prior",
    "mmvae+": "mixture",
}


def objective(name: str, **options: Any) -> Objective:
    """The objective of that name, with its options set: ``objective("mmvae", samples=10)``.

    Raises:
        ValueError: for an unknown name, listing the known ones.
        TypeError: for an option that it does not have.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(map(repr, OBJECTIVES))}, got {name!r}")
    every = set(inspect.signature(Objective.__call__).parameters)
    known = [option for option in inspect.signature(OBJECTIVES[name]).parameters if option not in every]
    for option in options:
        if option not in known:
            raise TypeError(f"objective {name!r} has no option {option!r}, only {', '.join(known) or 'none at all'}")
    return functools.partial(OBJECTIVES[name], **options) if options else OBJECTIVES[name]
