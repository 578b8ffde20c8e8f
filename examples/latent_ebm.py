"""A latent space energy-based prior (Pang et al., NeurIPS 2020), on 14x14 MNIST.

z has the prior exp(-E(z)) N(z; 0, I), and x is a generator's image with Gaussian noise. Both are learned with two short
Langevin chains from N(0, I): the prior's, and the posterior's of z given x.
"""

from __future__ import annotations

import copy

import torch
from shared import compare, digits, options, picture
from torch import Tensor, nn

import mmebm
import mmebm.energies

LATENT, SIGMA = 16, 0.3
PRIOR_STEPS, PRIOR_SCALE = 60, 0.4
POSTERIOR_STEPS, POSTERIOR_SCALE = 20, 0.1


def prior_by_hand(energy: nn.Module, z: Tensor) -> Tensor:
    """The first of the two loops that one call each of ours replaces."""
    z = z.clone().detach().requires_grad_()
    for _ in range(PRIOR_STEPS):
        gradient = torch.autograd.grad(energy(z).sum(), z)[0]
        z.data += -0.5 * PRIOR_SCALE**2 * (gradient + z.data) + PRIOR_SCALE * torch.randn_like(z)
    return z.detach()


def posterior_by_hand(energy: nn.Module, generator: nn.Module, z: Tensor, x: Tensor) -> Tensor:
    """The second."""
    z = z.clone().detach().requires_grad_()
    for _ in range(POSTERIOR_STEPS):
        likelihood = (generator(z) - x).square().sum() / (2 * SIGMA**2)
        gradient = torch.autograd.grad(likelihood, z)[0] + torch.autograd.grad(energy(z).sum(), z)[0]
        z.data += -0.5 * POSTERIOR_SCALE**2 * (gradient + z.data) + POSTERIOR_SCALE * torch.randn_like(z)
    return z.detach()


class Posterior(nn.Module):
    """-log p(x | z) + E(z); the Gaussian factor of the prior is the sampler's ``prior_std=1``."""

    def __init__(self, energy: nn.Module, generator: nn.Module) -> None:
        super().__init__()
        self.energy, self.generator = energy, generator

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return (self.generator(z) - x).square().sum(1) / (2 * SIGMA**2) + self.energy(z)


def main() -> None:
    o = options("latent space EBM on 14x14 MNIST")
    images = digits("train")[0].flatten(1)
    generator = nn.Sequential(
        nn.Linear(LATENT, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 196), nn.Tanh()
    )
    energy = mmebm.energies.MLP(LATENT, (128, 128), "gelu")
    posterior = Posterior(energy, generator)
    prior_chain = mmebm.Langevin.from_sgld(PRIOR_SCALE, prior_std=1.0)
    posterior_chain = mmebm.Langevin.from_sgld(POSTERIOR_SCALE, prior_std=1.0)
    print(f"latent EBM: {PRIOR_STEPS} prior steps of {PRIOR_SCALE}, {POSTERIOR_STEPS} posterior of {POSTERIOR_SCALE}")

    iterations = 20 if o.quick else 2000
    both = [
        torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.999)),
        torch.optim.Adam(energy.parameters(), lr=2e-4, betas=(0.5, 0.999)),
    ]
    for k in range(iterations):
        x = images[torch.randint(len(images), (128,))]
        fake = prior_chain.sample(energy, torch.randn(128, LATENT), PRIOR_STEPS).state
        real = posterior_chain.sample(posterior, torch.randn(128, LATENT), POSTERIOR_STEPS, args=(x,)).state
        error = (generator(real) - x).square().sum(1).mean()
        gap = energy(real).mean() - energy(fake).mean()
        for optimiser in both:
            optimiser.zero_grad()
        (error / (2 * SIGMA**2) + gap).backward()
        for optimiser in both:
            optimiser.step()
        if k % 250 == 0:
            print(f"iteration {k}: squared error {error.item() / 196:.4f} per pixel, energy gap {gap.item():.3f}")

    z0 = torch.randn(40, LATENT)
    out = prior_chain.sample(energy, z0, PRIOR_STEPS)
    print(f"prior chain runs as {out.info['op']} on {out.info['backend']}")
    with torch.no_grad():
        # above: from the learned prior; below: from N(0, I), which the generator was not trained on
        picture(generator(torch.cat([out.state, z0])).reshape(-1, 1, 14, 14), o.out / "latent_ebm.png")

    e, g = copy.deepcopy(energy).double(), copy.deepcopy(generator).double()
    p, x, z = Posterior(e, g), images[:128], torch.randn(128, LATENT)
    print("prior chain")
    compare(
        lambda: prior_by_hand(energy, z),
        lambda: prior_chain.sample(energy, z, PRIOR_STEPS).state,
        lambda: prior_by_hand(e, z.double()),
        lambda: prior_chain.replace(rng="torch").sample(e, z.double(), PRIOR_STEPS).state,
    )
    print("posterior chain")
    compare(
        lambda: posterior_by_hand(energy, generator, z, x),
        lambda: posterior_chain.sample(posterior, z, POSTERIOR_STEPS, args=(x,)).state,
        lambda: posterior_by_hand(e, g, z.double(), x.double()),
        lambda: posterior_chain.replace(rng="torch").sample(p, z.double(), POSTERIOR_STEPS, args=(x.double(),)).state,
    )


if __name__ == "__main__":
    main()
