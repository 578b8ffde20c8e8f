"""The three networks with the two chains between them: what a checkpoint holds and what draws samples."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmebm.diagnostics import largest_stable_step
from mmebm.energies.lower import Symbol, call, residual
from mmebm.models import (
    FlowPrior,
    GaussianPrior,
    JointEnergy,
    JointInference,
    LatentPrior,
    MixturePrior,
    OwnPrior,
    Prior,
    SharedGenerator,
)
from mmebm.models.generator import latent_columns
from mmebm.samplers import Langevin, Samples
from mmebm.samplers.schedules import Schedule, geometric
from mmebm.state import Batch
from mmebm.training.config import ChainConfig, Config, fitted
from mmebm.training.networks import built, check_shapes


def sampler_of(
    chain: ChainConfig, size: float | Mapping[str, float], backend: str, *, steps: int | None = None, **options: Any
) -> Langevin:
    """The sampler of a chain whose step is ``s``: step_size = s^2 / 2, noise as configured or tied to the step.

    ``steps``: how many the chain has, where its noise is annealed; without it the noise is that of the last step.
    """
    noise = size if chain.noise is None else chain.noise

    def of_a_step(s: float) -> float:
        return s**2 / 2

    def annealed(last: float) -> float | Schedule:
        falls = chain.anneal != 1.0 and steps is not None and last > 0.0
        return geometric(chain.anneal * last, last, max(steps or 1, 1)) if falls else last

    def each(function: Callable[[float], Any], value: float | Mapping[str, float]) -> Any:
        return {name: function(v) for name, v in value.items()} if isinstance(value, Mapping) else function(value)

    return Langevin(
        each(of_a_step, size),
        each(annealed, noise),
        bounds=(-1.0, 1.0) if chain.clamp else None,
        accept="metropolis" if chain.metropolis else None,
        backend=backend,
        on_nonfinite="freeze",
        **options,
    )


class Posterior:
    """The energy of z given the modalities in ``x``: -log p(x | z) + E_prior(z); the chain adds the Gaussian drift."""

    mmebm_pure = True

    def __init__(self, generator: SharedGenerator, prior: nn.Module, x: Batch) -> None:
        self.generator: SharedGenerator = generator
        self.prior: nn.Module = prior
        self.x: dict[str, Tensor] = dict(x)

    def __call__(self, z: Tensor) -> Tensor:
        return self.generator.negative_log_likelihood(self.x, z) + self.prior(z)

    def mmebm_parts(self) -> tuple[Any, tuple[Any, ...]]:
        """For :mod:`mmebm.samplers.capture`: the posterior of another batch is the same graph on other tensors."""
        return Posterior, (self.generator, self.prior, self.x)

    def mmebm_lowered(self, z: Symbol) -> Symbol:
        """The same on a symbolic z, for :func:`mmebm.energies.lower`: one residual per modality, and the prior."""
        g = self.generator
        parts = [
            residual(call(g.decoders[name], z), value, scale=g.sigma, likelihood=g.likelihood, weight=g.weights[name])
            for name, value in self.x.items()
        ]
        return functools.reduce(operator.add, [*parts, call(self.prior, z)])


class PartialPosterior:
    """:class:`Posterior` where rows lack modalities: ``present`` says which they have, bool (n,) by modality."""

    mmebm_pure = True

    def __init__(self, generator: SharedGenerator, prior: nn.Module, x: Batch, present: Mapping[str, Tensor]) -> None:
        self.generator: SharedGenerator = generator
        self.prior: nn.Module = prior
        self.x: dict[str, Tensor] = dict(x)
        self.present: dict[str, Tensor] = dict(present)

    def __call__(self, z: Tensor) -> Tensor:
        return self.generator.negative_log_likelihood(self.x, z, present=self.present) + self.prior(z)

    def mmebm_parts(self) -> tuple[Any, tuple[Any, ...]]:
        """See :meth:`Posterior.mmebm_parts`."""
        return PartialPosterior, (self.generator, self.prior, self.x, self.present)


class System(nn.Module):
    """Joint energy, shared generator, joint inference and the prior of the latent.

    Args:
        config: the run's configuration.
        shapes: modality name -> shape without the batch dimension.
        networks: of the user's own, instead of the built-in ones and of those that the configuration names:
            :func:`mmebm.training.networks.flat_networks` has their names.

    Raises:
        ValueError, TypeError: where a network of the user's own does not fit; the message names it.
    """

    latent_step: Tensor

    def __init__(
        self, config: Config, shapes: Mapping[str, tuple[int, ...]], networks: Mapping[str, nn.Module] | None = None
    ) -> None:
        super().__init__()
        config = fitted(config, shapes)
        m, latent = config.model, config.model.latent_size
        self.config = config
        columns = latent_columns(list(shapes), latent, m.private)
        own = {**built(config, shapes, {name: len(of) for name, of in columns.items()}), **(networks or {})}
        parts = {
            kind: {name: own[f"{kind}.{name}"] for name in shapes if f"{kind}.{name}" in own}
            for kind in ("encoders", "decoders")
        }
        if "prior" in own and config.latent_prior is None:
            raise ValueError(
                "a prior of your own needs latent_prior, which says how it is sampled and learns: it is None"
            )
        self.energy: nn.Module | JointEnergy = (
            own["energy"]
            if "energy" in own
            else JointEnergy(
                shapes,
                net=m.net,
                width=m.energy_width,
                depth=m.depth,
                act=m.activation,
                trunk_width=m.energy_trunk_width,
                features=m.energy_features,
                spectral=m.spectral,
                scale=m.energy_scale,
            )
        )
        self.generator: SharedGenerator = SharedGenerator(
            shapes,
            latent,
            net=m.net,
            width=m.generator_width,
            depth=m.depth,
            act=m.activation,
            sigma=m.sigma,
            likelihood=m.likelihood,
            weights=None if m.weights == "auto" else m.weights,
            private=m.private,
            decoders=parts["decoders"],
        )
        self.inference: JointInference = JointInference(
            shapes,
            latent,
            net=m.net,
            width=m.inference_width,
            depth=m.depth,
            act=m.activation,
            joint=m.inference,
            private=m.private,
            encoders=parts["encoders"],
        )
        self.prior: Prior = GaussianPrior(latent)
        p = config.latent_prior
        if p is not None and p.kind == "mixture":
            self.prior = MixturePrior(latent, p.components)
        elif p is not None and p.kind == "flow":
            self.prior = FlowPrior(latent, p.chain.steps, width=p.width, depth=p.depth, act=m.activation)
        elif p is not None:
            chain = sampler_of(p.chain, p.chain.size(), config.backend, steps=p.chain.steps, prior_std=1.0)
            self.prior = (
                OwnPrior(latent, chain, p.chain.steps, own["prior"])
                if "prior" in own
                else LatentPrior(latent, chain, p.chain.steps, width=p.width, depth=p.depth, act=m.activation)
            )
        start = 0.1 if config.latent_chain.step == "auto" else config.latent_chain.size()
        if not isinstance(start, (int, float)):
            raise ValueError(f"the latent chain takes one step, got {start!r}")
        self.register_buffer("latent_step", torch.tensor(float(start)))
        self.data_sampler: Langevin = sampler_of(config.data_chain, config.data_chain.size(), config.backend)
        check_shapes(self, own)
        if config.channels_last:
            self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def autocast(self) -> torch.autocast:
        """What the configured precision puts around energies, chains and losses."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    @property
    def latent(self) -> int:
        """Size of z."""
        return self.config.model.latent_size

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.latent_step.device

    def revise_data(
        self,
        x: Batch,
        *,
        seed: int,
        steps: int | None = None,
        observed: Collection[str] | Mapping[str, Tensor] = (),
        **options: Any,
    ) -> Samples:
        """The data chain: all modalities at once on the joint energy, ``observed`` ones (or, by a boolean mask per
        modality, their elements) held."""
        chain, sampler = self.config.data_chain, self.data_sampler
        steps = chain.steps if steps is None else steps
        if chain.anneal != 1.0:
            sampler = sampler_of(chain, chain.size(), self.config.backend, steps=steps)
        held = (dict(observed) if isinstance(observed, Mapping) else set(observed)) or None
        with self.autocast():
            return sampler.sample(self.energy, dict(x), steps, seed=seed, observed=held, **options)

    def revise_latent(
        self,
        z: Tensor,
        x: Batch,
        *,
        seed: int,
        steps: int | None = None,
        present: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> Samples:
        """The latent chain: z given the modalities that ``x`` holds (and each row has, by ``present``)."""
        chain = self.config.latent_chain
        steps = chain.steps if steps is None else steps
        sampler = sampler_of(chain, float(self.latent_step), self.config.backend, steps=steps, prior_std=1.0)
        with self.autocast():
            return sampler.sample(self.posterior(x, present), z, steps, seed=seed, **options)

    def posterior(self, x: Batch, present: Mapping[str, Tensor] | None = None) -> Posterior | PartialPosterior:
        """The energy of z given ``x``."""
        if present is None:
            return Posterior(self.generator, self.prior, x)
        return PartialPosterior(self.generator, self.prior, x, present)

    @torch.no_grad()
    def fill(
        self, x: Batch, present: Mapping[str, Tensor], z: Tensor, *, seed: int, **options: Any
    ) -> dict[str, Tensor]:
        """Whole tuples from rows that lack modalities: decoded from ``z``, then revised with what is there held."""
        held = {name: present[name].reshape(-1, *[1] * (value.dim() - 1)).expand_as(value) for name, value in x.items()}
        decoded = self.generator(z)
        filled = {name: torch.where(held[name], value, decoded[name]) for name, value in x.items()}
        return dict(self.revise_data(filled, seed=seed, observed=held, **options).state)

    @torch.no_grad()
    def measure_latent_step(
        self,
        x: Batch,
        generator: torch.Generator | None = None,
        *,
        keep: float = 0.0,
        present: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Sets the latent step from the curvature of the posterior at inferred z (``step="auto"``).

        A low quantile of one batch is noisy: ``keep`` is the weight of the old step in the geometric mean of both.
        """
        chain, z = self.config.latent_chain, self.inference.sample(x, generator, present=present)
        posterior = self.posterior(x, present)
        limits = largest_stable_step(posterior, z, prior_std=1.0, generator=generator)
        measured = chain.auto_fraction * limits.quantile(chain.auto_quantile)
        self.latent_step.copy_(self.latent_step**keep * measured ** (1 - keep))

    @torch.no_grad()
    def decode(self, z: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The generator's means of all modalities at ``z`` (n, latent), or of each at a z of its own."""
        if isinstance(z, Mapping):
            return {name: self.generator(value)[name] for name, value in z.items()}
        return self.generator(z)

    def generate(self, n: int, *, seed: int, chain_offset: int = 0) -> dict[str, Tensor]:
        """x0: ``n`` tuples decoded from the prior, {modality: (n, *shape)}; the first has index ``chain_offset``."""
        return self.decode(self.prior.draw(n, seed=seed, device=self.device, chain_offset=chain_offset))

    @torch.no_grad()
    def complete(
        self, given: Batch, *, seed: int, latent_steps: int | None = None, data_steps: int | None = None
    ) -> dict[str, Tensor]:
        """All modalities given some: infer z, revise it on the given likelihoods, decode, revise the missing ones.

        Args:
            given: {modality: (n, *shape)}, at least one; returned as they are.
            seed: of the whole draw.
            latent_steps: 0 leaves z as inferred (mode A of the method); None the configured number of steps (mode B).
            data_steps: 0 leaves the decoded modalities; None the configured number of steps, the given held (mode C).
        """
        generator = torch.Generator(self.device).manual_seed(seed)
        joint = self.config.start.completion
        z = self.inference.sample(given, generator, joint=None if joint == "inference" else joint)
        z = self.revise_latent(z, given, seed=seed, steps=latent_steps).state
        x = {**self.generator(z), **given}
        if data_steps != 0 and len(given) < len(x):
            x = self.revise_data(x, seed=seed + 1, steps=data_steps, observed=set(given)).state
        return x
