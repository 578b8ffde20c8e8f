"""Extensions of the paper's loop: each one an object that the trainer calls at one place."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import softplus

from mmebm.models import FlowPrior, LatentPrior
from mmebm.state import Batch
from mmebm.training.config import LatentPriorConfig, ShuffledTuplesConfig
from mmebm.training.optimise import Optimiser
from mmebm.training.parallel import Processes
from mmebm.training.system import System


class EnergyTerm(Protocol):
    """One more term in the joint energy's loss."""

    def __call__(self, system: System, x: Batch, real: Tensor, rng: torch.Generator) -> Tensor: ...


class ShuffledTuples:
    """Real modalities of different rows: right marginals, no agreement. softplus(E(real) - E(shuffled)), averaged.

    Args:
        config: their kind and weight.
        processes: that share the rows of an iteration; a row's others are taken from all of them.
        rows: of all of them together.
    """

    def __init__(self, config: ShuffledTuplesConfig, processes: Processes | None = None, rows: int = 0) -> None:
        self.config: ShuffledTuplesConfig = config
        self.processes: Processes = processes or Processes()
        self.rows: int = rows

    def __call__(self, system: System, x: Batch, real: Tensor, rng: torch.Generator) -> Tensor:
        shuffled = self.hard(system, x, rng) if self.config.kind == "hard" else self.uniform(x, rng)
        return self.config.weight * softplus(real - system.energy(shuffled)).mean()

    def uniform(self, x: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """Each modality from a row of its own."""
        n = len(next(iter(x.values())))
        every = self.processes.gather(x, self.rows)
        return {
            name: value[torch.randperm(len(value), generator=rng, device=value.device)[:n]]
            for name, value in every.items()
        }

    @torch.no_grad()
    def hard(self, system: System, x: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """Some modalities of each row, not all, from a row that is near in the latent and yet of another class."""
        z = torch.stack([component.mean for component in system.inference(x)]).mean(0)
        n, device = len(z), z.device
        every, all_z = self.processes.gather(x, self.rows), self.processes.gather({"z": z}, self.rows)["z"]
        order = torch.cdist(z, all_z).argsort(dim=1)  # the row itself comes first
        low = max(1, math.ceil(self.config.same * len(all_z)))
        high = max(low + 1, math.ceil((self.config.same + self.config.near) * len(all_z)))
        if high > len(all_z):
            return self.uniform(x, rng)
        other = order[torch.arange(n, device=device), torch.randint(low, high, (n,), generator=rng, device=device)]
        luck = torch.rand(n, len(x), generator=rng, device=device)
        # the luckiest modality changes, the unluckiest stays, the others as it falls
        change = (luck > 0.5).scatter(1, luck.argmax(1, keepdim=True), True)
        change = change.scatter(1, luck.argmin(1, keepdim=True), False)
        return {
            name: torch.where(change[:, j].reshape(-1, *[1] * (value.dim() - 1)), every[name][other], value)
            for j, (name, value) in enumerate(x.items())
        }


class PriorTeacher:
    """Learns the prior of the latent from samples of the posterior and, for an energy, its own."""

    def __init__(self, prior: LatentPrior | FlowPrior, config: LatentPriorConfig, optimiser: Optimiser) -> None:
        self.prior: LatentPrior | FlowPrior = prior
        self.l2: float = config.energy_l2
        self.optimiser: Optimiser = optimiser

    def update(
        self, posterior: Tensor, own: Callable[[], Tensor], rng: torch.Generator, lr: float
    ) -> dict[str, Tensor]:
        """One step on z (n, latent); returns what is logged.

        An energy falls at ``posterior`` and rises at what ``own`` draws from it; a flow is matched to ``posterior``.
        """
        if isinstance(self.prior, FlowPrior):
            loss = self.prior.loss(posterior, rng)
            self.optimiser.step(loss, lr)
            return {"prior_loss": loss.detach()}
        up, down = self.prior(posterior), self.prior(own())
        gap = up.mean() - down.mean()
        self.optimiser.step(gap + self.l2 * (up.square().mean() + down.square().mean()), lr)
        return {"prior_gap": gap.detach()}
