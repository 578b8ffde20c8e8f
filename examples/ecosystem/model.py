"""What the three scripts share: data in two dimensions, an energy, and the chains of a batch."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

# Before there is a process group: PyTorch imports it later otherwise, when the defaults of its functions would hold the
# group, and Gloo's threads, for ever. One that is still busy as Python ends aborts the process (pytorch issue 190489).
# For the same reason a script lets go of its wrapped network before it leaves the group; Lightning does so by itself.
import torch.distributed.nn
from torch import Tensor, nn

import mmebm

SAMPLER = mmebm.Langevin(step_size=0.05)
STEPS = 30


def options(about: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64, help="of all processes together")
    parser.add_argument("--processes", type=int, default=1, help="where the script starts them itself")
    parser.add_argument("--out", type=Path, help="where the first process writes what was learned")
    return parser.parse_args()


def data(n: int) -> Tensor:
    """Eight Gaussians on a circle: (n, 2)."""
    generator = torch.Generator().manual_seed(0)
    angle = torch.randint(8, (n,), generator=generator) * torch.pi / 4
    return torch.stack([angle.cos(), angle.sin()], 1) + 0.1 * torch.randn(n, 2, generator=generator)


def energy() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))


def revised(energy: nn.Module, n: int, iteration: int, offset: int) -> Tensor:
    """``n`` chains from noise, those of this process: chain i of it is chain ``offset`` + i of all."""
    place = {"seed": 1000 + iteration, "chain_offset": offset}
    x = mmebm.noise.normal((n, 2), step=0, stream=100, **place)
    return SAMPLER.sample(energy, x, STEPS, **place).state


def loss(real: Tensor, fake: Tensor) -> Tensor:
    """Contrastive divergence of energies (n, 1), with a little weight on their size."""
    return real.mean() - fake.mean() + 0.05 * (real.square().mean() + fake.square().mean())
