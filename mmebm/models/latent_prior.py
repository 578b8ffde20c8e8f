"""Priors of the latent: N(0, I), and an energy-based correction of it.

The energy-based one is p(z) = exp(-E(z)) N(z; 0, I) / Z, after Pang et al., "Learning latent space energy-based prior
model", NeurIPS 2020. It lets the generator start from the aggregated posterior, which N(0, I) is not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmebm import noise
from mmebm.models.nets import mlp
from mmebm.ops import noise as drawn
from mmebm.samplers import Langevin


def standard_normal(n: int, latent: int, *, seed: int, device: torch.device, chain_offset: int = 0) -> Tensor:
    """z ~ N(0, I), (n, latent), by this library's noise: row i depends on (seed, chain_offset + i) only."""
    return drawn.normal(
        (n, latent), seed=seed, stream=noise.stream(0, noise.INITIAL), chain_offset=chain_offset, device=device
    )


class GaussianPrior(nn.Module):
    """N(0, I): its energy correction is zero, and no chain is needed to draw from it."""

    mmebm_pure = True
    steps = 0

    def __init__(self, latent: int) -> None:
        super().__init__()
        self.latent = latent

    def forward(self, z: Tensor) -> Tensor:
        """(n, latent) -> zeros (n,)."""
        return z.new_zeros(z.shape[0])

    def draw(
        self, n: int, *, seed: int, device: torch.device, steps: int | None = None, chain_offset: int = 0
    ) -> Tensor:
        """``n`` samples (n, latent), of which the first has the global index ``chain_offset``. ``steps`` is for priors
        that need a chain."""
        return standard_normal(n, self.latent, seed=seed, device=device, chain_offset=chain_offset)


class LatentPrior(nn.Module):
    """The correction E(z) as an MLP latent -> width -> ... -> 1; the Gaussian factor is the sampler's ``prior_std=1``.

    Args:
        latent: size of z.
        sampler, steps: the short chain that draws from it, started at N(0, I).
    """

    mmebm_pure = True

    def __init__(
        self, latent: int, sampler: Langevin, steps: int, *, width: int = 128, depth: int = 2, act: str = "silu"
    ) -> None:
        super().__init__()
        self.latent: int = latent
        self.sampler: Langevin = sampler
        self.steps: int = steps
        self.net: nn.Sequential = mlp([latent, *[width] * depth, 1], act)

    def forward(self, z: Tensor) -> Tensor:
        """(n, latent) -> (n,)."""
        return self.net(z).squeeze(1)

    def draw(
        self, n: int, *, seed: int, device: torch.device, steps: int | None = None, chain_offset: int = 0
    ) -> Tensor:
        """``n`` samples (n, latent) after ``steps`` Langevin steps (None: as many as in training), of which the first
        has the global index ``chain_offset``."""
        start = standard_normal(n, self.latent, seed=seed, device=device, chain_offset=chain_offset)
        steps = self.steps if steps is None else steps
        return self.sampler.sample(self, start, steps, seed=seed, chain_offset=chain_offset).state


class OwnPrior(LatentPrior):
    """:class:`LatentPrior` with a network of the user's own: z (n, latent) -> (n,)."""

    def __init__(self, latent: int, sampler: Langevin, steps: int, net: nn.Module) -> None:
        nn.Module.__init__(self)
        self.latent: int = latent
        self.sampler: Langevin = sampler
        self.steps: int = steps
        self.net: nn.Module = net

    def forward(self, z: Tensor) -> Tensor:
        """(n, latent) -> (n,)."""
        return self.net(z)
