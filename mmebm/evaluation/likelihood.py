"""The likelihood of the generator, log p(X), by annealed importance sampling over the latent.

    p(X) = integral of p(z) prod_m p_m(x_m | z) dz

over whatever modalities are given, so that log p(x_T | x_S) is the difference of two results. A chain starts at a draw
of N(0, I) and goes through the laws proportional to N(z; 0, I) exp(-b f(z)), b from 0 to 1, by Hamiltonian Monte Carlo;
f is the negative log-likelihood (and the prior's energy). Its weight is an unbiased estimate of the integral (Neal,
"Annealed importance sampling", 2001); the logarithm of a mean of weights is then too low in expectation, a stochastic
lower bound, by about half its squared error. :func:`likelihood_gap` bounds it from both sides on data drawn from the
generator itself (Grosse et al., "Measuring the reliability of MCMC inference with bidirectional Monte Carlo", 2016).

What is a density here. Model space is [-1, 1], and log p is in nats, of a density in it: it may well be positive. The
weight w_m of a modality multiplies its log-likelihood in every loss and chain; as a density that is a smaller scale,
sigma / sqrt(w_m) for the Gaussian and sigma / w_m for the Laplace, and its normaliser is that of this scale. The means
are in (-1, 1) and the noise around them is not cut off there, as in training.

A latent energy prior p(z) = exp(-E(z)) N(z; 0, I) / Z has a constant of its own, which is estimated the same way and
subtracted. What is estimated is thus the likelihood under the normalised prior, not under the law of the short chain
that :meth:`~mmebm.models.LatentPrior.draw` stops after so many steps.

Nothing here says anything about the joint energy: exp(-E(X)) is not normalised, its Z is an integral over all pixels of
all modalities, and no estimate of it is attempted. x_k has no likelihood; compare its samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from mmebm import noise
from mmebm.data.base import check_count
from mmebm.models import FlowPrior, GaussianPrior, SharedGenerator
from mmebm.samplers import HMC
from mmebm.state import Batch

__all__ = ["Gap", "Likelihood", "likelihood_gap", "log_likelihood", "temperatures"]

Energy = Callable[[Tensor], Tensor]

BOOTSTRAP: Final = 200  # resamples; an error from so many is itself known to 1 / sqrt(2 * 200) = 5 %
PILOT_CHAINS: Final = 2
FIRST_STEP: Final = 0.5  # of a target N(0, I), where leapfrog is stable below 2
ACCEPT: Final = 0.8
RATE: Final = 0.3  # of the pilot's log step per step, times what acceptance misses


@dataclass(frozen=True)
class Likelihood:
    """log p(X) of ``n`` tuples.

    Attributes:
        log_p: float64 ``(n,)`` on the CPU, nats.
        error: its standard error over the tuple's independent chains, by the delta method: sd(w) / (sqrt(chains)
            mean(w)).
        bootstrap: the same by resampling the chains: larger where few of them carry the weight.
        effective: ``(sum w)^2 / sum w^2``, from 1 to ``chains``. Near 1 neither error can be believed: take more
            temperatures.
        acceptance: mean acceptance probability of the transitions.
        log_z: log Z of the latent energy prior, already subtracted from ``log_p``; 0 for the Gaussian prior.
        log_z_error: its standard error, shared by all tuples and not contained in theirs.
        dimensions: how many numbers a tuple has.
    """

    log_p: Tensor
    error: Tensor
    bootstrap: Tensor
    effective: Tensor
    acceptance: float
    log_z: float
    log_z_error: float
    dimensions: int

    def summary(self) -> dict[str, float]:
        """The mean over tuples as plain values.

        ``error_tuples`` is the standard error from having ``n`` tuples only (it contains the chains' part);
        ``error_chains`` that of the estimate for these very tuples, with log Z's.
        """
        n = len(self.log_p)
        chains = math.hypot(self.bootstrap.square().sum().sqrt().item() / n, self.log_z_error)
        tuples = self.log_p.std().item() / math.sqrt(n) if n > 1 else math.inf
        return {
            "n": n,
            "log_p": self.log_p.mean().item(),
            "error_chains": chains,
            "error_tuples": tuples if math.isfinite(tuples) else 0.0,
            "per_dimension": self.log_p.mean().item() / self.dimensions,
            "dimensions": self.dimensions,
            "effective_min": self.effective.min().item(),
            "acceptance": self.acceptance,
            "log_z": self.log_z,
            "log_z_error": self.log_z_error,
        }


@dataclass(frozen=True)
class Gap:
    """What annealing misses, on tuples drawn from the generator: float64 ``(n,)`` on the CPU, nats.

    In expectation ``lower`` <= log p(X) <= ``upper``, so that the mean of ``upper - lower`` bounds the error of
    :func:`log_likelihood` with the same settings on data like this.
    """

    lower: Tensor
    upper: Tensor

    def summary(self) -> dict[str, float]:
        """The mean gap over tuples and its standard error."""
        gap = self.upper - self.lower
        error = gap.std().item() / math.sqrt(len(gap)) if len(gap) > 1 else 0.0
        return {"n": len(gap), "gap": gap.mean().item(), "gap_error": error}


def temperatures(steps: int, power: float = 3.0) -> list[float]:
    """The ladder ``(t / steps)^power``, t = 0 .. steps: fine near 0, where a sharp likelihood sets in.

    Raises:
        TypeError, ValueError: for ``steps`` below 1 or ``power`` not above 0.
    """
    check_count("steps", steps)
    if not power > 0:
        raise ValueError(f"power must be positive, got {power!r}")
    return [(t / steps) ** power for t in range(steps + 1)]


@torch.no_grad()
def log_likelihood(
    generator: SharedGenerator,
    prior: nn.Module,
    x: Batch,
    *,
    chains: int = 16,
    steps: int = 500,
    leapfrog_steps: int = 5,
    power: float = 3.0,
    batch: int = 1600,
    seed: int = 0,
) -> Likelihood:
    """log p(x) of each tuple under the generator and its prior.

    A pilot run with two chains per tuple finds each tuple's step sizes along the ladder; the measured run keeps them,
    with fresh noise, so that its weights stay unbiased.

    Args:
        generator: the shared generator.
        prior: of the latent: energies ``(n, latent) -> (n,)`` beside N(0, I), such as
            :class:`~mmebm.models.GaussianPrior` and :class:`~mmebm.models.LatentPrior`.
        x: modality name -> ``(n, *shape)`` on the generator's device; any of its modalities, at least one.
        chains: independent chains per tuple, at least 2.
        steps: temperatures.
        leapfrog_steps: of the transition at each of them; the narrower the posterior in some directions, the more.
        power: of the ladder, see :func:`temperatures`.
        batch: chains at a time over all tuples; bounds the memory. The noise does not depend on it.
        seed: of all noise.

    Returns:
        :class:`Likelihood`.

    Raises:
        TypeError, ValueError: naming the argument, the value and what would do.
    """
    if isinstance(prior, FlowPrior):
        raise ValueError("prior must have a density, up to a constant, and that of a FlowPrior is not known")
    names = list(generator.shapes)
    if not x or set(x) - set(names):
        raise ValueError(f"x must hold some of the modalities {names}, got {sorted(x)}")
    counts = {name: len(value) for name, value in x.items()}
    n = next(iter(counts.values()))
    if len(set(counts.values())) > 1 or not n:
        raise ValueError(f"x must have equally many rows in every modality, at least one, got {counts}")
    check_count("chains", chains, least=2)
    check_count("batch", batch)
    settings = _Settings(tuple(temperatures(steps, power)), check_count("leapfrog_steps", leapfrog_steps), seed)
    constant = log_constant(generator, x)
    per = max(1, batch // chains)
    parts = []
    for start in range(0, n, per):
        rows = {name: value[start : start + per] for name, value in x.items()}
        energy = _Given(generator, prior, rows)
        parts.append(
            _forward(
                energy,
                len(next(iter(rows.values()))),
                chains,
                settings,
                like=_like(generator),
                latent=generator.latent,
                first=start,
            )
        )
    weights = torch.cat([w for w, _ in parts])
    acceptance = sum(a * len(w) for w, a in parts) / n
    log_z = log_z_error = 0.0
    if not isinstance(prior, GaussianPrior):
        # one integral, so it can have many chains
        many = max(256, chains)
        constants, _ = _forward(
            _Given(generator, prior, {}),
            1,
            many,
            settings.again(),
            like=_like(generator),
            latent=generator.latent,
            first=0,
        )
        log_z, log_z_error = _log_mean(constants).item(), _delta(constants).item()
    w = (weights - weights.amax(1, keepdim=True)).exp()
    return Likelihood(
        log_p=_log_mean(weights) + constant - log_z,
        error=_delta(weights),
        bootstrap=_bootstrap(weights, seed),
        effective=w.sum(1).square() / w.square().sum(1),
        acceptance=acceptance,
        log_z=log_z,
        log_z_error=log_z_error,
        dimensions=sum(math.prod(generator.shapes[name]) for name in x),
    )


@torch.no_grad()
def likelihood_gap(
    generator: SharedGenerator,
    prior: nn.Module,
    n: int = 50,
    *,
    names: Sequence[str] | None = None,
    chains: int = 16,
    steps: int = 500,
    leapfrog_steps: int = 5,
    power: float = 3.0,
    seed: int = 0,
) -> Gap:
    """How far annealing is off, by tuples drawn from the generator, whose z is an exact draw of their posterior.

    From that z the ladder is gone backwards, which bounds log p(X) from above as the forward run does from below.

    Args:
        generator, prior, chains, steps, leapfrog_steps, power, seed: as in :func:`log_likelihood`; the prior must be
            Gaussian, since of another no exact draw is to be had.
        n: number of tuples; all of them run at once.
        names: the modalities of a tuple; None for all.

    Raises:
        TypeError, ValueError: naming the argument, the value and what would do.
    """
    if not isinstance(prior, GaussianPrior):
        raise ValueError(f"prior must be a GaussianPrior, which can be drawn exactly, got {type(prior).__name__}")
    check_count("n", n)
    check_count("chains", chains, least=2)
    settings = _Settings(tuple(temperatures(steps, power)), check_count("leapfrog_steps", leapfrog_steps), seed)
    like, rng = _like(generator), torch.Generator(_like(generator).device).manual_seed(seed)
    z = torch.randn(n, generator.latent, generator=rng, dtype=like.dtype, device=like.device)
    means = generator(z)
    x = {name: _with_noise(generator, name, means[name], rng) for name in names or list(generator.shapes)}
    energy, constant = _Given(generator, prior, x), log_constant(generator, x)
    sizes = _pilot(energy, n, settings, like, generator.latent)
    forward, _ = _forward(energy, n, chains, settings, like=like, latent=generator.latent, first=0, sizes=sizes)
    backward = _backward(energy, z, chains, settings.again(), sizes)
    return Gap(lower=_log_mean(forward) + constant, upper=constant - _log_mean(backward))


def log_constant(generator: SharedGenerator, names: Sequence[str] | Batch) -> float:
    """What :meth:`~mmebm.models.SharedGenerator.negative_log_likelihood` leaves out: log p(x | z) is this minus that.

    Raises:
        ValueError: for a weight of 0, with which a modality has no density.
    """
    total = 0.0
    for name in names:
        scale, size = _scale(generator, name), math.prod(generator.shapes[name])
        total -= size * math.log(math.sqrt(2 * math.pi) * scale if generator.likelihood == "gaussian" else 2 * scale)
    return total


def _scale(generator: SharedGenerator, name: str) -> float:
    weight = generator.weights[name]
    if not weight > 0:
        raise ValueError(
            f"the weight of modality {name!r} must be positive to give a density, got {weight}: leave it out of x"
        )
    return generator.sigma / (math.sqrt(weight) if generator.likelihood == "gaussian" else weight)


def _with_noise(generator: SharedGenerator, name: str, mean: Tensor, rng: torch.Generator) -> Tensor:
    def uniform() -> Tensor:  # in (0, 1]
        return 1 - torch.rand(mean.shape, generator=rng, dtype=mean.dtype, device=mean.device)

    if generator.likelihood == "gaussian":
        unit = torch.randn(mean.shape, generator=rng, dtype=mean.dtype, device=mean.device)
    else:
        unit = uniform().log() - uniform().log()  # the difference of two exponentials is Laplace
    return mean + _scale(generator, name) * unit


class _Given:
    """f(z) = -log p(x | z) without its constant, plus the prior's energy; ``chains`` rows of z per row of x."""

    def __init__(self, generator: SharedGenerator, prior: nn.Module, x: Batch, chains: int = 1) -> None:
        self.generator, self.prior, self.chains = generator, prior, chains
        self.x = {name: value.detach().repeat_interleave(chains, 0) for name, value in x.items()}

    def per_row(self, chains: int) -> _Given:
        return _Given(self.generator, self.prior, self.x, chains)

    def __call__(self, z: Tensor) -> Tensor:
        return self.generator.negative_log_likelihood(self.x, z) + self.prior(z)


class _Tempered:
    """|z|^2 / 2 + b f(z): the energy of one law on the way."""

    def __init__(self, energy: _Given) -> None:
        self.energy = energy

    def __call__(self, z: Tensor, b: float) -> Tensor:
        return 0.5 * z.square().sum(1) + b * self.energy(z)


@dataclass(frozen=True)
class _Settings:
    betas: tuple[float, ...]
    leapfrog_steps: int
    seed: int
    runs: int = 0

    def again(self) -> _Settings:
        """The same with noise of its own."""
        return _Settings(self.betas, self.leapfrog_steps, self.seed, self.runs + 2)

    @property
    def seeds(self) -> tuple[int, int]:
        """Of the pilot and of the run it is for. From a generator: seeds that differ by one must share no noise."""
        drawn = torch.randint(2**62, (self.runs + 2,), generator=torch.Generator().manual_seed(self.seed))
        return int(drawn[self.runs]), int(drawn[self.runs + 1])


def _like(generator: nn.Module) -> Tensor:
    return next(generator.parameters()).detach()


def _start(count: int, latent: int, like: Tensor, seed: int, offset: int) -> Tensor:
    return noise.normal(
        (count, latent),
        seed=seed,
        stream=noise.stream(0, noise.INITIAL),
        chain_offset=offset,
        dtype=like.dtype,
        device=like.device,
    )


def _move(
    energy: _Tempered, z: Tensor, b: float, size: Tensor, t: int, settings: _Settings, seed: int, offset: int
) -> tuple[Tensor, Tensor]:
    """One transition that leaves the law of ``b`` as it is: z and the acceptance probabilities.

    Every chain draws its step between half and one and a half times ``size``: a trajectory of half a period returns to
    the mirror image of its start, where f is what it was, and a fixed length may hit just that.
    """
    stretch = (
        0.5
        + noise.uniform(
            (len(z), 1),
            seed=seed,
            step=t,
            stream=noise.stream(1, noise.INITIAL),
            chain_offset=offset,
            dtype=z.dtype,
            device=z.device,
        )[:, 0]
    )
    out = HMC(size * stretch, settings.leapfrog_steps).sample(
        energy, z, 1, args=(b,), seed=seed, chain_offset=offset, first_step=t, record=("accept_prob",)
    )
    return out.state, out.trace["accept_prob"][0]


def _pilot(given: _Given, n: int, settings: _Settings, like: Tensor, latent: int, first: int = 0) -> Tensor:
    """Step sizes for every transition: (steps, n). Each tuple's own, so that no tuple depends on its batch."""
    seed, offset = settings.seeds[0], first * PILOT_CHAINS
    energy = _Tempered(given.per_row(PILOT_CHAINS))
    z = _start(n * PILOT_CHAINS, latent, like, seed, offset)
    log_size = torch.full((n,), math.log(FIRST_STEP), dtype=like.dtype, device=like.device)
    sizes = []
    for t, b in enumerate(settings.betas[1:]):
        sizes.append(log_size.exp())
        z, accept = _move(energy, z, b, sizes[-1].repeat_interleave(PILOT_CHAINS), t, settings, seed, offset)
        missed = accept.reshape(n, PILOT_CHAINS).mean(1) - ACCEPT
        log_size = (log_size + RATE * missed).clamp_max(math.log(1.5))
    return torch.stack(sizes)


def _forward(
    given: _Given,
    n: int,
    chains: int,
    settings: _Settings,
    *,
    like: Tensor,
    latent: int,
    first: int,
    sizes: Tensor | None = None,
) -> tuple[Tensor, float]:
    """Log weights (n, chains) of the integral of N(z) exp(-f(z)), and the mean acceptance probability.

    ``first`` is the number of the first tuple: the noise of a chain depends on its tuple's number and its own.
    """
    if sizes is None:
        sizes = _pilot(given, n, settings, like, latent, first)
    seed, offset = settings.seeds[1], first * chains
    each, betas = given.per_row(chains), settings.betas
    energy = _Tempered(each)
    z = _start(n * chains, latent, like, seed, offset)
    weights = torch.zeros(n * chains, dtype=torch.float64, device=like.device)
    accepted = torch.zeros((), dtype=like.dtype, device=like.device)
    for t in range(1, len(betas)):
        weights -= (betas[t] - betas[t - 1]) * each(z).double()
        if t < len(betas) - 1:  # where the last move would go enters no weight
            z, accept = _move(energy, z, betas[t], sizes[t - 1].repeat_interleave(chains), t, settings, seed, offset)
            accepted += accept.mean()
    moves = len(betas) - 2
    return weights.reshape(n, chains).cpu(), accepted.item() / moves if moves else 1.0


def _backward(given: _Given, z: Tensor, chains: int, settings: _Settings, sizes: Tensor) -> Tensor:
    """Log weights (n, chains) of one over that integral, from exact posterior draws ``z`` (n, latent)."""
    seed, betas, n = settings.seeds[1], settings.betas, len(z)
    each = given.per_row(chains)
    energy = _Tempered(each)
    z = z.repeat_interleave(chains, 0)
    weights = torch.zeros(n * chains, dtype=torch.float64, device=z.device)
    for t in range(len(betas) - 1, 0, -1):
        weights += (betas[t] - betas[t - 1]) * each(z).double()
        if t > 1:
            z, _ = _move(energy, z, betas[t - 1], sizes[t - 2].repeat_interleave(chains), t, settings, seed, 0)
    return weights.reshape(n, chains).cpu()


def _log_mean(weights: Tensor) -> Tensor:
    return weights.logsumexp(1) - math.log(weights.shape[1])


def _delta(weights: Tensor) -> Tensor:
    w = (weights - weights.amax(1, keepdim=True)).exp()
    return w.std(1) / (w.mean(1) * math.sqrt(w.shape[1]))


def _bootstrap(weights: Tensor, seed: int) -> Tensor:
    """The standard deviation of the estimate over resamples of each tuple's chains: (n,)."""
    n, chains = weights.shape
    rng = torch.Generator().manual_seed(seed)
    values = torch.stack(
        [_log_mean(weights.gather(1, torch.randint(chains, (n, chains), generator=rng))) for _ in range(BOOTSTRAP)]
    )
    return values.std(0)
