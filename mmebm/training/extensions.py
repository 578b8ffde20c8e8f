"""Extensions of the paper's loop: each one an object that the trainer calls at one place."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from mmebm.models import GaussianPrior, LatentPrior
from mmebm.training.config import LatentPriorConfig, ShuffledTuplesConfig
from mmebm.training.optimise import Optimiser


class EnergyTerm(Protocol):
    """One more term in the joint energy's loss."""

    def __call__(self, energy: nn.Module, x: dict[str, Tensor], real: Tensor, rng: torch.Generator) -> Tensor: ...


class ShuffledTuples:
    """Real modalities of different rows: right marginals, no agreement. softplus(E(real) - E(shuffled)), averaged."""

    def __init__(self, config: ShuffledTuplesConfig) -> None:
        self.weight = config.weight

    def __call__(self, energy: nn.Module, x: dict[str, Tensor], real: Tensor, rng: torch.Generator) -> Tensor:
        n = real.shape[0]
        shuffled = {
            name: value[torch.randperm(n, generator=rng, device=value.device)] for name, value in x.items()
        }
        return self.weight * softplus(real - energy(shuffled)).mean()


class PriorTeacher(Protocol):
    """Learns the prior of the latent from samples of the posterior and its own."""

    def update(self, posterior: Tensor, own: Tensor, lr: float) -> dict[str, Tensor]: ...


class NoTeacher:
    """N(0, I) has nothing to learn."""

    def update(self, posterior: Tensor, own: Tensor, lr: float) -> dict[str, Tensor]:
        return {}


class LatentPriorTeacher:
    """Maximum likelihood of the latent energy: E falls at the posterior's samples and rises at the prior's own."""

    def __init__(self, prior: LatentPrior, config: LatentPriorConfig, optimiser: Optimiser) -> None:
        self.prior, self.l2, self.optimiser = prior, config.energy_l2, optimiser

    def update(self, posterior: Tensor, own: Tensor, lr: float) -> dict[str, Tensor]:
        """One step on z (n, latent) of both kinds; returns the energy gap for the log."""
        up, down = self.prior(posterior), self.prior(own)
        gap = up.mean() - down.mean()
        self.optimiser.step(gap + self.l2 * (up.square().mean() + down.square().mean()), lr)
        return {"prior_gap": gap.detach()}


def prior_teacher(
    prior: GaussianPrior | LatentPrior, config: LatentPriorConfig | None, optimiser: Optimiser | None
) -> PriorTeacher:
    """The teacher that fits the prior."""
    if isinstance(prior, LatentPrior) and config is not None and optimiser is not None:
        return LatentPriorTeacher(prior, config, optimiser)
    return NoTeacher()
