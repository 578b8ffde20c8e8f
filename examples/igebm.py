"""IGEBM: implicit generation with an energy-based model (Du and Mordatch, NeurIPS 2019), on 14x14 MNIST.

Its sampler adds the noise before the gradient, clips the gradient, takes a step of 10 and clamps to the unit interval;
its buffer is first in, first out, of bytes, and 5 % of the chains restart from uniform noise.
"""

from __future__ import annotations

import copy

import torch
from shared import compare, digits, options, picture
from torch import Tensor, nn

import mmebm
import mmebm.energies
from mmebm import initial

STEPS, STEP_SIZE, NOISE, CLIP = 40, 10.0, 0.005, 0.01


def by_hand(energy: nn.Module, x: Tensor) -> Tensor:
    """The loop that one call of ours replaces."""
    energy.eval()
    for p in energy.parameters():
        p.requires_grad_(False)
    x = x.detach().clone()
    for _ in range(STEPS):
        x = (x + NOISE * torch.randn_like(x)).requires_grad_()
        gradient = torch.autograd.grad(energy(x).sum(), x)[0].clamp(-CLIP, CLIP)
        x = (x.detach() - STEP_SIZE * gradient).clamp(0, 1)
    for p in energy.parameters():
        p.requires_grad_(True)
    energy.train()
    return x


def main() -> None:
    o = options("IGEBM on 14x14 MNIST")
    x = (digits("train")[0] + 1) / 2
    energy = mmebm.energies.MLP(196, (256, 256), "silu")
    sampler = mmebm.Langevin(STEP_SIZE, NOISE, noise_at="before", grad_clip=CLIP, bounds=(0, 1))
    print(f"IGEBM: {STEPS} steps of {STEP_SIZE} with noise {NOISE}, temperature {sampler.implied_temperature:.0e}")

    iterations = 20 if o.quick else 2000
    buffer = mmebm.ReplayBuffer(
        10_000,
        initial.uniform((1, 14, 14)),
        policy="fifo",
        reinit=0.05,
        dtype=torch.uint8,
        value_range=(0, 1),
        seed=o.seed,
    )
    optimiser = torch.optim.Adam(energy.parameters(), lr=1e-3, betas=(0.0, 0.999))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda k: 1 - k / iterations)
    for k in range(iterations):
        real = x[torch.randint(len(x), (128,))]
        start, handle = buffer.draw(128)
        out = sampler.sample(energy, start, STEPS, seed=o.seed, first_step=k * STEPS)
        buffer.write(handle, out.state)

        # noise of a grey level or so, so that the energy need not tell digits by their zeros
        e_real, e_fake = energy((real + 0.03 * torch.randn_like(real)).clamp(0, 1)), energy(out.state)
        loss = e_real.mean() - e_fake.mean() + 0.1 * (e_real.square().mean() + e_fake.square().mean())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if k % 500 == 0:
            print(f"iteration {k}: loss {loss.item():.5f}, energy gap {(e_real - e_fake).mean().item():.5f}")

    print(f"lineages: {buffer.lineages()} of {len(buffer)} chains")
    start, _ = buffer.draw(80)
    out = sampler.sample(energy, start, STEPS, seed=o.seed + 1)
    print(f"run as {out.info['op']} on {out.info['backend']}")
    picture(2 * out.state - 1, o.out / "igebm.png")

    double = copy.deepcopy(energy).double()
    ported = sampler.replace(rng="torch")
    compare(
        lambda: by_hand(energy, start),
        lambda: sampler.sample(energy, start, STEPS).state,
        lambda: by_hand(double, start.double()),
        lambda: ported.sample(double, start.double(), STEPS).state,
    )


if __name__ == "__main__":
    main()
