"""The posterior chain of a linear-Gaussian generator against its closed form.

x = A z + b + sigma eps with z ~ N(0, I): z given x is Gaussian with precision L = A'A / sigma^2 + I and mean
L^-1 A'(x - b) / sigma^2. The unadjusted chain z <- z - h dE/dz + sqrt(2h) xi keeps that mean and has the covariance
(L (I - h L / 2))^-1, since its stationary S solves S = (I - hL) S (I - hL) + 2h I.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmebm import Langevin
from mmebm.energies import Symbol, residual

LATENT, OUTPUTS, CHAINS = 3, 7, 20_000
SIGMA, H, STEPS = 0.7, 0.04, 400
SHIFT = 30.0  # ReLU is the identity on a Gaussian of size 1 moved by this: the generator is linear, and an MLP


class Posterior:
    """-log p(x | z) of an MLP that is linear where the chains are."""

    def __init__(self, matrix: Tensor, bias: Tensor, x: Tensor) -> None:
        first, last = nn.Linear(LATENT, LATENT), nn.Linear(LATENT, OUTPUTS)
        with torch.no_grad():
            first.weight.copy_(torch.eye(LATENT))
            first.bias.fill_(SHIFT)
            last.weight.copy_(matrix)
            last.bias.copy_(bias - SHIFT * matrix.sum(1))
        self.net, self.x = nn.Sequential(first, nn.ReLU(), last), x

    def __call__(self, z: Tensor) -> Tensor:
        return (self.net(z) - self.x).square().sum(1) / (2 * SIGMA**2)

    def mmebm_lowered(self, z: Symbol) -> Symbol:
        outputs: Any = self.net(z)
        return residual(outputs, self.x, scale=SIGMA, likelihood="gaussian")


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_mean_and_covariance(backend: str, need: Callable[[str], None], seed: int) -> None:
    need(backend)
    generator = torch.Generator().manual_seed(seed)
    # singular values from 0.5 to 1.5: precisions 1.5 to 5.6, so that h L / 2 is at most 0.11 and 400 steps forget
    basis = torch.linalg.qr(torch.randn(OUTPUTS, LATENT, generator=generator))[0]
    turn = torch.linalg.qr(torch.randn(LATENT, LATENT, generator=generator))[0]
    matrix = basis @ torch.diag(torch.linspace(0.5, 1.5, LATENT)) @ turn
    bias, x = torch.randn(OUTPUTS, generator=generator), torch.randn(OUTPUTS, generator=generator)
    posterior = Posterior(matrix, bias, x.expand(CHAINS, OUTPUTS).contiguous())
    out = Langevin(H, prior_std=1.0, backend=backend).sample(posterior, torch.zeros(CHAINS, LATENT), STEPS, seed=seed)
    assert out.info["op"] == ("langevin_mlp" if backend == "cpp" else "langevin_step"), out.info["reason"]
    precision = (matrix.T @ matrix).double() / SIGMA**2 + torch.eye(LATENT, dtype=torch.float64)
    mean = torch.linalg.solve(precision, (matrix.T @ (x - bias)).double() / SIGMA**2)
    covariance = torch.linalg.inv(precision @ (torch.eye(LATENT, dtype=torch.float64) - H / 2 * precision))
    z = out.state.double()
    # 5.7 standard deviations of a mean, and of a covariance of a Gaussian: var(s_ij) = (C_ii C_jj + C_ij^2) / n
    spread = covariance.diagonal().sqrt()
    assert ((z.mean(0) - mean).abs() < 5.7 * spread / math.sqrt(CHAINS)).all()
    centred = z - mean
    error = centred.T @ centred / CHAINS - covariance
    limit = 5.7 * ((spread[:, None] * spread).square() + covariance.square()).sqrt() / math.sqrt(CHAINS)
    assert (error.abs() < limit).all(), error / limit
    # and the step's bias is in it: along the stiffest direction, where L is 5.6, the variance is 1.126 times the
    # posterior's, which is 12 standard deviations (sqrt(2 / CHAINS) of it) away
    rates, directions = torch.linalg.eigh(precision)
    along = (centred @ directions[:, -1]).square().mean() * rates[-1]
    assert along - 1 > 5.7 * math.sqrt(2 / CHAINS)
