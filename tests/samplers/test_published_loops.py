"""Published Langevin loops, each restated by hand from its paper or code, against one call: float64, torch's noise.

A loop below is what a user has today. It takes its noise with ``torch.randn_like``, as the sampler does with
``rng="torch"``, so that both give the same numbers; then every option of the call is taken away in turn, and the result
must change: no option may be ignored. Loops with a preset have the constants of the published code written out, and are
compared with the preset.
"""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmebm import presets
from mmebm.samplers import Langevin, langevin
from mmebm.samplers.schedules import geometric, linear, polynomial, table

STEPS = 7
CHAINS = 8
# Worst seen 3.0e-14 over 1,000 seeds, torch 2.13, 2026-11-22: rounding of float64 in another order of operations.
EXACT = 1e-12
# The least change by an option taken away was 3.7e-5 over 150 seeds (the clip of hat_ebm, with its steps of 1e-8 / 2).
CHANGED = 1e-6


class World:
    """Networks, data and starting points in float64, from one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = torch.Generator().manual_seed(seed)
        self.image = self.normal(CHAINS, 1, 4, 4)
        self.unit = torch.rand(CHAINS, 1, 4, 4, generator=self.rng, dtype=torch.float64)
        self.z = self.normal(CHAINS, 6)
        self.data = self.normal(CHAINS, 16)
        self.mask = torch.rand(CHAINS, 1, 4, 4, generator=self.rng) < 0.4
        self.f_net, self.z_net, self.decoder = self.mlp(16, 1), self.mlp(6, 1), self.mlp(6, 16)
        self.normed = nn.Sequential(self.f_net[0], nn.BatchNorm1d(24).double(), *self.f_net[1:]).train()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.rng, dtype=torch.float64)

    def mlp(self, inputs: int, outputs: int, width: int = 24) -> nn.Sequential:
        net = nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs)).double()
        for p in net.parameters():
            p.data = self.normal(*p.shape) * 1.5 / p.shape[-1] ** 0.5
        return net

    def f(self, x: Tensor) -> Tensor:
        """An image network: (chains, 1)."""
        return 3 * self.f_net(x.flatten(1))

    def gentle(self, x: Tensor) -> Tensor:
        """Gradients on both sides of a clip at 0.01: where all are clipped, it does not matter when noise is added."""
        return 0.02 * self.f_net(x.flatten(1))

    def batch_normed(self, x: Tensor) -> Tensor:
        """An f = -E that keeps chains off the corners of their box."""
        return 3 * self.normed(x.flatten(1)) - 0.75 * x.flatten(1).square().sum(1, keepdim=True)

    def latent(self, z: Tensor) -> Tensor:
        return 3 * self.z_net(z).squeeze(1)

    def bowl(self, x: Tensor) -> Tensor:
        return self.f(x).squeeze(1) + 0.5 * x.flatten(1).square().sum(1)

    def pair(self, z: Tensor, r: Tensor) -> Tensor:
        """An energy of a latent and a residual image."""
        return 3 * self.f_net(self.decoder(z) + r.flatten(1)).squeeze(1)


def gradient(value: Tensor, *inputs: Tensor) -> Any:
    grads = torch.autograd.grad(value.sum(), inputs)
    return grads if len(grads) > 1 else grads[0]


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


@dataclass
class Case:
    loop: Callable[[World], Any]
    energy: Callable[[World], Callable[..., Any]]
    start: Callable[[World], Any]
    options: dict[str, Any]
    given: Callable[[World], dict[str, Any]]
    preset: str | None

    def call(self, world: World, options: dict[str, Any]) -> list[Tensor]:
        both = {**options, **self.given(world)}
        return tensors(langevin(self.energy(world), self.start(world), STEPS, rng="torch", **both))


def tensors(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    return list(state.values()) if isinstance(state, dict) else list(state)


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).detach().abs().max()) for x, y in zip(a, b, strict=True))


CASES: dict[str, Case] = {}


def non_default(sampler: Langevin) -> dict[str, Any]:
    """The options in which a sampler differs from ``Langevin(step_size)``."""
    fields = {f.name: (f.default, getattr(sampler, f.name)) for f in dataclasses.fields(sampler)}
    # of another type: a tensor does not compare with a number
    return {name: v for name, (default, v) in fields.items() if type(v) is not type(default) or v != default}


def published(
    energy: Callable[[World], Callable[..., Any]],
    start: Callable[[World], Any],
    given: Callable[[World], dict[str, Any]] = lambda w: {},
    preset: Langevin | None = None,
    **options: Any,
) -> Callable[[Callable[[World], Any]], Callable[[World], Any]]:
    """Registers a hand-written loop with the one call that replaces it. A preset's loop has the preset's name."""

    def register(loop: Callable[[World], Any]) -> Callable[[World], Any]:
        name = loop.__name__
        chosen = options if preset is None else non_default(preset)
        CASES[name] = Case(loop, energy, start, chosen, given, None if preset is None else name)
        return loop

    return register


@published(lambda w: w.f, lambda w: w.image, preset=presets.jem())
def jem(w: World) -> Tensor:
    """JEM (Grathwohl 2020): x_k.data += sgld_lr * f_prime + sgld_std * randn_like(x_k), f = -E."""
    x = leaf(w.image)
    for _ in range(STEPS):
        f_prime = gradient(w.f(x), x)
        x.data += 1.0 * f_prime + 0.01 * torch.randn_like(x)
    return x.detach()


@published(lambda w: w.gentle, lambda w: w.unit, preset=presets.igebm())
def igebm(w: World) -> Tensor:
    """igebm-pytorch: noise, gradient, its clamp, step 10, clamp to the unit interval."""
    x = w.unit
    for _ in range(STEPS):
        x = leaf(x + 0.005 * torch.randn_like(x))
        g = gradient(w.gentle(x), x).clamp(-0.01, 0.01)
        x = (x.detach() - 10 * g).clamp(0, 1)
    return x


@published(lambda w: w.f, lambda w: (1.6 * w.image).clamp(-1, 1), preset=presets.uva())
def uva(w: World) -> Tensor:
    """UvA deep learning tutorial 8: clamp after the noise and after the step; the energy is -model(x)."""
    x = (1.6 * w.image).clamp(-1, 1)
    for _ in range(STEPS):
        x = (x + 0.005 * torch.randn_like(x)).clamp(min=-1.0, max=1.0)
        x = leaf(x)
        g = gradient(-w.f(x), x).clamp(-0.03, 0.03)
        x = (x.detach() - 10 * g).clamp(min=-1.0, max=1.0)
    return x


@published(lambda w: w.batch_normed, lambda w: w.image.clamp(-1, 1), preset=presets.sada_jem())
def sada_jem(w: World) -> Tensor:
    """SADA-JEM: gradient of f clamped by value, no noise, clamp of the image; batch norm in train mode."""
    x = w.image.clamp(-1, 1)
    for _ in range(STEPS):
        x = leaf(x)
        g = gradient(w.batch_normed(x), x).clamp(-1, 1)
        x = (x + 1.0 * g).detach().clamp(-1, 1)
    return x


@published(
    lambda w: w.f,
    lambda w: w.image.clamp(-1, 1),
    log_prob=True,
    step_size=0.5,
    noise_scale=0.01,
    grad_clip=1.0,
    bounds=(-1, 1),
)
def jem_clipped(w: World) -> Tensor:
    """SADA-JEM with its noise on: gradient of f clamped by value, noise, clamp of the image last."""
    x = w.image.clamp(-1, 1)
    for _ in range(STEPS):
        x = leaf(x)
        g = gradient(w.f(x), x).clamp(-1, 1)
        x = (x + 0.5 * g + 0.01 * torch.randn_like(x)).detach().clamp(-1, 1)
    return x


@published(lambda w: w.f, lambda w: 2 * w.unit - 1, preset=presets.short_run())
def short_run(w: World) -> Tensor:
    """Short-run MCMC (Nijkamp 2019): from uniform noise, up f, with noise of 0.01."""
    x = 2 * w.unit - 1
    for _ in range(STEPS):
        x = leaf(x)
        x = x.detach() + (gradient(w.f(x), x) + 1e-2 * torch.randn_like(x))
    return x


@published(lambda w: lambda x: 1e-3 * w.f(x), lambda w: w.unit, preset=presets.improved_cd())
def improved_cd(w: World) -> Tensor:
    """Improved CD (Du 2021): noise first, step 100, clamp to the unit interval."""
    x = w.unit
    for _ in range(STEPS):
        x = leaf(x + 0.001 * torch.randn_like(x))
        g = gradient(1e-3 * w.f(x), x)
        x = (x.detach() - 100.0 * g).clamp(0, 1)
    return x


@published(
    lambda w: lambda x: 1e-3 * w.f(x),
    lambda w: w.unit,
    step_size=100.0,
    bounds=(0, 1),
    noise_at="before",
    noise_scale=presets.improved_cd(STEPS).noise_scale,
)
def improved_cd_annealed(w: World) -> Tensor:
    """The same with its noise annealed."""
    x = w.unit
    for i in range(STEPS):
        x = leaf(x + 0.001 * (STEPS - i - 1) / STEPS * torch.randn_like(x))
        x = (x.detach() - 100.0 * gradient(1e-3 * w.f(x), x)).clamp(0, 1)
    return x


@published(lambda w: w.f, lambda w: w.image, preset=presets.ebm_anatomy())
def ebm_anatomy(w: World) -> Tensor:
    """ebm-anatomy (Nijkamp 2020): x_s.data += -f_prime + epsilon * randn_like(x_s)."""
    x = leaf(w.image)
    for _ in range(STEPS):
        f_prime = gradient(w.f(x), x)
        x.data += -f_prime + 0.01 * torch.randn_like(x)
    return x.detach()


@published(lambda w: w.f, lambda w: w.image, preset=presets.dual_mcmc_data())
def dual_mcmc_data(w: World) -> Tensor:
    """Dual-MCMC teaching (Cui 2023), images: the step of 0.5 squared and halved, noise of its own."""
    x = w.image
    for _ in range(STEPS):
        x = leaf(x)
        g = gradient(w.f(x), x)
        x = x.detach() - 0.5 * 0.5 * 0.5 * g
        x = x + 0.001 * torch.randn_like(x)
    return x


@published(lambda w: w.latent, lambda w: w.z, preset=presets.latent_ebm_prior())
def latent_ebm_prior(w: World) -> Tensor:
    """Latent-space EBM prior (Pang 2020): z - s^2/2 (dE/dz + z / sigma_p^2) + s xi, sigma_p 1."""
    z = w.z
    for _ in range(STEPS):
        z = leaf(z)
        g = gradient(w.latent(z), z)
        z = z.detach() - 0.5 * 0.4**2 * (g + z.detach() / 1.0**2) + 0.4 * torch.randn_like(z)
    return z


def posterior(w: World) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda z, x: (w.decoder(z) - x).square().sum(1) / (2 * 0.3**2) + w.latent(z)


@published(posterior, lambda w: w.z, given=lambda w: {"args": (w.data,)}, preset=presets.latent_ebm_posterior())
def latent_ebm_posterior(w: World) -> Tensor:
    """The same paper's posterior: one backward through the generator, another through the energy."""
    z = w.z
    for _ in range(STEPS):
        z = leaf(z)
        likelihood = gradient(((w.decoder(z) - w.data) ** 2).sum(1) / (2 * 0.3**2), z)
        energy = gradient(w.latent(z), z)
        z = z.detach() - 0.5 * 0.1**2 * (likelihood + energy + z.detach()) + 0.1 * torch.randn_like(z)
    return z


@published(
    lambda w: lambda z, x: (w.decoder(z) - x).square().sum() / 0.3**2,
    lambda w: w.z,
    given=lambda w: {"args": (w.data,)},
    preset=presets.dual_mcmc_latent(),
)
def dual_mcmc_latent(w: World) -> Tensor:
    """Dual-MCMC teaching, latents: the squared error over sigma^2 without its half, and the prior."""
    z = w.z
    for _ in range(STEPS):
        z = leaf(z)
        g = gradient((w.decoder(z) - w.data).square().sum(), z)
        z = z.detach() - 0.5 * 0.1 * 0.1 * (g / 0.3 / 0.3 + z.detach()) + 0.1 * torch.randn_like(z)
    return z


def ladder(w: World) -> Callable[[list[Tensor]], Tensor]:
    def energy(z: list[Tensor]) -> Tensor:
        mean = w.decoder(z[0]) + z[1].flatten(1) * torch.sigmoid(w.decoder(z[2]))
        return (mean - w.data).square().sum(1) / (2 * 0.4**2)

    return energy


def ladder_start(w: World) -> list[Tensor]:
    return [w.z, w.image, w.z.flip(1)]


@published(
    ladder,
    ladder_start,
    step_size={0: 0.1**2 / 2, 1: 0.2**2 / 2, 2: 0.3**2 / 2},
    noise_scale={0: 0.1, 1: 0.2, 2: 0.3},
    prior_std=1.0,
)
def short_run_layers(w: World) -> list[Tensor]:
    """Short-run inference of a hierarchical generator (Nijkamp 2020): a list of latents, a step for each layer."""
    zs, sizes = ladder_start(w), (0.1, 0.2, 0.3)
    for _ in range(STEPS):
        zs = [leaf(z) for z in zs]
        grads = gradient(ladder(w)(zs), *zs)
        zs = [
            z.detach() - 0.5 * s**2 * (g + z.detach()) + s * torch.randn_like(z)
            for z, g, s in zip(zs, grads, sizes, strict=True)
        ]
    return zs


def vaebm_energy(w: World) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
    def energy(state: tuple[Tensor, Tensor]) -> Tensor:
        eps_x, eps_z = state
        x = w.decoder(eps_z) + 0.2 * eps_x.flatten(1)
        total = 3 * w.f_net(x).squeeze(1) + 0.5 * eps_x.flatten(1).square().sum(1) + 0.5 * eps_z.square().sum(1)
        return total.mean() * len(eps_z)

    return energy


@published(vaebm_energy, lambda w: (w.image, w.z), preset=presets.vaebm())
def vaebm(w: World) -> tuple[Tensor, Tensor]:
    """VAEBM (Xiao 2021): noise of the data and of the latent together, eta/2 and sqrt(eta), mean times batch size."""
    eps_x, eps_z = w.image, w.z
    for _ in range(STEPS):
        eps_x, eps_z = leaf(eps_x), leaf(eps_z)
        g_x, g_z = gradient(vaebm_energy(w)((eps_x, eps_z)), eps_x, eps_z)
        eps_x = eps_x.detach() - 0.5 * 8e-5 * g_x + 8e-5**0.5 * torch.randn_like(eps_x)
        eps_z = eps_z.detach() - 0.5 * 8e-5 * g_z + 8e-5**0.5 * torch.randn_like(eps_z)
    return eps_x, eps_z


@published(lambda w: w.f, lambda w: 0.02 * w.image, preset=presets.coopnets())
def coopnets(w: World) -> Tensor:
    """CoopNets (Xie 2018): x - delta^2/2 (x / sigma^2 - df/dx) + delta xi, Gaussian reference."""
    x = 0.02 * w.image
    for _ in range(STEPS):
        x = leaf(x)
        g = gradient(w.f(x), x)
        x = x.detach() - 0.5 * 0.002**2 * (x.detach() / 0.016**2 - g) + 0.002 * torch.randn_like(x)
    return x


DRL_STEP = torch.linspace(0.05, 0.4, CHAINS, dtype=torch.float64).reshape(-1, 1, 1, 1)
DRL_ALPHA = torch.linspace(0.7, 0.99, CHAINS, dtype=torch.float64)
DRL_LEVEL = torch.linspace(0.2, 0.9, CHAINS, dtype=torch.float64)


def recovery(w: World) -> Callable[..., Tensor]:
    return lambda y, noisy, sigma: w.f(y).squeeze(1) - (y - noisy).square().flatten(1).sum(1) / (2 * sigma**2)


@published(
    recovery,
    lambda w: w.image,
    given=lambda w: {"args": (w.unit,), "kwargs": {"sigma": DRL_LEVEL}},
    preset=presets.recovery_likelihood(DRL_STEP.flatten(), DRL_ALPHA),
)
def recovery_likelihood(w: World) -> Tensor:
    """Diffusion recovery likelihood (Gao 2021): a step for each sample, (B, 1, 1, 1), by its noise level; rescaled."""
    y = w.image
    for _ in range(STEPS):
        y = leaf(y)
        log_p = w.f(y).sum() - ((y - w.unit) ** 2 / (2 * DRL_LEVEL.reshape(-1, 1, 1, 1) ** 2)).sum()
        g = gradient(log_p, y)
        y = y.detach() + 0.5 * DRL_STEP**2 * g + DRL_STEP * torch.randn_like(y)
    return y / DRL_ALPHA.reshape(-1, 1, 1, 1)


LEVELS = (1.0, 0.6, 0.3)
PER_LEVEL = (3, 3, 1)  # STEPS steps together
SIGMAS = [sigma for sigma, n in zip(LEVELS, PER_LEVEL, strict=True) for _ in range(n)]


def score(w: World) -> Callable[[Tensor, float], Tensor]:
    return lambda x, sigma: (w.decoder(w.z).reshape(x.shape) * torch.sin(x) - x) / sigma**2


@published(
    score,
    lambda w: w.image,
    given=lambda w: {"args": (table(SIGMAS),), "score": True},
    step_size=table([0.02 * (sigma / LEVELS[-1]) ** 2 for sigma in SIGMAS]),
    temperature=0.7,
)
def ncsn_tempered(w: World) -> Tensor:
    """NCSN (Song 2019): x + a_i s(x, sigma_i) + sqrt(2 a_i) xi over annealed levels; tempered, to use that too."""
    x = w.image
    for sigma, n in zip(LEVELS, PER_LEVEL, strict=True):
        size = 0.02 * (sigma / LEVELS[-1]) ** 2
        for _ in range(n):
            x = x + size * score(w)(x, sigma) + (2 * size * 0.7) ** 0.5 * torch.randn_like(x)
    return x


@published(
    score,
    lambda w: w.image,
    given=lambda w: {"args": (presets.levels((1.0, 0.5), 4),)},
    preset=presets.ncsn((1.0, 0.5), steps_each=4, epsilon=0.02),
)
def ncsn(w: World) -> Tensor:
    """NCSN in its own form: levels, and steps at each; here the second level's last step is beyond the end."""
    x = w.image
    for sigma in (1.0, 0.5):
        size = 0.02 * (sigma / 0.5) ** 2
        for _ in range(4 if sigma == 1.0 else 3):
            x = x + size * score(w)(x, sigma) + torch.randn_like(x) * (size * 2) ** 0.5
    return x


LOW = torch.tensor([-1.0, -0.5, -0.7, -0.2, -0.9, -0.6], dtype=torch.float64)
HIGH = torch.tensor([0.4, 0.6, 1.0, 0.5, 0.3, 0.8], dtype=torch.float64)


@published(lambda w: w.latent, lambda w: w.z, preset=presets.ibc(LOW, HIGH, STEPS))
def ibc(w: World) -> Tensor:
    """Implicit BC (Florence 2021): the noise inside a clipped increment, a box for each action dimension, decay.

    There lr (g / 2 + N(0, 1)) is subtracted; the sign of the noise is immaterial and here the sampler's.
    """
    action = w.z
    for k in range(STEPS):
        lr = (0.1 - 1e-5) * (1 - k / (STEPS - 1)) ** 2 + 1e-5
        action = leaf(action)
        g = gradient(w.latent(action), action)
        delta = lr * (0.5 * g - torch.randn_like(action))
        limit = 0.1 * 0.5 * (HIGH - LOW)
        delta = torch.max(torch.min(delta, limit), -limit)
        action = torch.max(torch.min(action.detach() - delta, HIGH), LOW)
    return action


@published(
    lambda w: w.latent,
    lambda w: w.z,
    bounds=(LOW, HIGH),
    max_update=0.1 * (HIGH - LOW) / 2,
    grad_clip=0.2,
    step_size=polynomial(0.25, 0.01, STEPS, power=2.0),
    noise_scale=polynomial(0.05, 0.002, STEPS, power=2.0),
)
def ibc_clipped(w: World) -> Tensor:
    """The same with other constants and its gradient clipped."""
    action, s = w.z, 0.1
    for k in range(STEPS):
        lr = (0.5 - 0.02) * (1 - k / (STEPS - 1)) ** 2 + 0.02
        action = leaf(action)
        g = gradient(w.latent(action), action).clamp(-0.2, 0.2)
        delta = lr * (0.5 * g - s * torch.randn_like(action))
        limit = 0.1 * 0.5 * (HIGH - LOW)
        delta = torch.max(torch.min(delta, limit), -limit)
        action = torch.max(torch.min(action.detach() - delta, HIGH), LOW)
    return action


@published(
    lambda w: w.f,
    lambda w: w.unit,
    step_size=0.3,
    noise_scale=0.02,
    grad_norm_clip=0.3,
    bounds=(0.0, 1.0),
    outside="reject",
)
def nae_reject(w: World) -> Tensor:
    """Normalised autoencoder (Yoon 2021): gradient norm of each sample limited, samples that leave the box stay."""
    x = w.unit
    for _ in range(STEPS):
        x = leaf(x)
        g = gradient(w.f(x), x)
        norm = g.reshape(CHAINS, -1).norm(dim=1).reshape(-1, 1, 1, 1)
        g = torch.where(norm > 0.3, g * 0.3 / norm, g)
        new = x.detach() - 0.3 * g + 0.02 * torch.randn_like(x)
        accept = ((new >= 0) & (new <= 1)).reshape(CHAINS, -1).all(dim=1)
        x = torch.where(accept.reshape(-1, 1, 1, 1), new, x.detach())
    return x


def to_sphere(z: Tensor) -> Tensor:
    return z / z.norm(dim=1, keepdim=True)


@published(lambda w: w.latent, lambda w: to_sphere(w.z), preset=presets.nae())
def nae(w: World) -> Tensor:
    """The same paper's latent chain: projected to the unit sphere after every step."""
    z = w.z / w.z.pow(2).sum(1, keepdim=True).sqrt()
    for _ in range(STEPS):
        z = leaf(z)
        z = z.detach() - 0.2 * gradient(w.latent(z), z) + 0.05 * torch.randn_like(z)
        z = z / z.pow(2).sum(1, keepdim=True).sqrt()
    return z


@published(lambda w: w.f, lambda w: w.unit.flatten(1), preset=presets.nae_data())
def nae_data(w: World) -> Tensor:
    """The same paper's data chain, on vectors: gradient norm limited, annealed noise, clamp."""
    x, noise = w.unit.flatten(1), 0.05
    for i in range(STEPS):
        x = leaf(x)
        g = gradient(w.f(x), x)
        norm = g.norm(dim=-1, keepdim=True)
        g = torch.where(norm > 0.01, g * 0.01 / norm, g)
        x = (x.detach() - 10.0 * g + noise * torch.randn_like(x)).clamp(0, 1)
        noise = 0.05 / (1 + i)
    return x


@published(
    lambda w: w.f,
    lambda w: w.unit,
    step_size=2.0,
    noise_scale=0.005,
    noise_at="before",
    grad_norm_clip=0.5,
    norm_over="tensor",
    bounds=(0.0, 1.0),
)
def igebm_tensorflow(w: World) -> Tensor:
    """ebm_code_release (Du 2019): clip_by_norm of the whole batch's gradient, noise first."""
    x = w.unit
    for _ in range(STEPS):
        x = leaf(x + 0.005 * torch.randn_like(x))
        g = gradient(w.f(x), x)
        g = g * min(1.0, 0.5 / float(g.square().sum().sqrt()))
        x = (x.detach() - 2.0 * g).clamp(0, 1)
    return x


EPSILON = torch.linspace(0.0, 0.5, CHAINS, dtype=torch.float64)


@published(lambda w: w.bowl, lambda w: 1.5 * w.image.clamp(-1, 1), preset=presets.energy_matching(EPSILON))
def energy_matching(w: World) -> Tensor:
    """Energy matching (Balcerak 2025): a temperature for each sample, clamp only at the end."""
    x = 1.5 * w.image.clamp(-1, 1)
    for _ in range(STEPS):
        x = leaf(x)
        noise = (2 * 0.01 * EPSILON).sqrt().reshape(-1, 1, 1, 1) * torch.randn_like(x)
        x = x.detach() - 0.01 * gradient(w.bowl(x), x) + noise
    return x.clamp(-1, 1)


@published(
    lambda w: lambda state: w.pair(state["z"], state["r"]) / 1e-3,
    lambda w: {"z": w.z, "r": w.image},
    given=lambda w: {"blocks": ("z", "r")},
    preset=presets.hat_ebm(),
)
def hat_ebm(w: World) -> list[Tensor]:
    """HAT-EBM (Hill 2022): latent, then residual at the new latent; only the residual's gradient is clipped."""
    z, r = w.z, w.image
    for _ in range(STEPS):
        z = leaf(z)
        z = z.detach() - (5e-3**2 / 2) * gradient(w.pair(z, r) / 1e-3, z) + 5e-3 * torch.randn_like(z)
        r = leaf(r)
        g = gradient(w.pair(z, r) / 1e-3, r)
        norm = g.reshape(CHAINS, -1).norm(dim=1).reshape(-1, 1, 1, 1)
        g = torch.where(norm > 2.5, g * 2.5 / norm, g)
        r = r.detach() - (1e-4**2 / 2) * g + 1e-4 * torch.randn_like(r)
    return [z, r]


@published(
    lambda w: lambda state: w.pair(state["z"], state["r"]),
    lambda w: {"z": w.z, "r": w.image},
    step_size={"z": 0.4**2 / 2, "r": 0.6**2 / 2},
    noise_scale={"z": 0.4, "r": 0.6},
    blocks=(("z",), ("r",)),
    grad_norm_clip={"r": 0.5},
    prior_std={"z": 1.0},
)
def hat_blocks(w: World) -> list[Tensor]:
    """The same with large steps and a Gaussian prior of the latent."""
    z, r = w.z, w.image
    for _ in range(STEPS):
        z = leaf(z)
        z = z.detach() - 0.5 * 0.4**2 * (gradient(w.pair(z, r), z) + z.detach()) + 0.4 * torch.randn_like(z)
        r = leaf(r)
        g = gradient(w.pair(z, r), r)
        g = g / (g.reshape(CHAINS, -1).norm(dim=1).reshape(-1, 1, 1, 1) / 0.5).clamp(min=1.0)
        r = r.detach() - 0.5 * 0.6**2 * g + 0.6 * torch.randn_like(r)
    return [z, r]


IRED_STEP = torch.linspace(1.7, 2.4, CHAINS, dtype=torch.float64)


@published(lambda w: w.bowl, lambda w: w.image, preset=presets.ired(IRED_STEP, 1.5))
def ired(w: World) -> Tensor:
    """IRED (Du 2024): a gradient step clamped to the level's range, taken only where the energy falls."""
    x = w.image
    for _ in range(STEPS):
        x = leaf(x)
        energy = w.bowl(x)
        new = (x - IRED_STEP.reshape(-1, 1, 1, 1) * gradient(energy, x)).detach().clamp(-1.5, 1.5)
        worse = w.bowl(new) >= energy
        x = torch.where(worse.reshape(-1, 1, 1, 1), x.detach(), new)
    return x


@published(lambda w: w.f, lambda w: w.image, given=lambda w: {"observed": w.mask}, preset=presets.masked_multimodal())
def masked_multimodal(w: World) -> Tensor:
    """GNN-MRF: observed elements keep their value; gradient clipped by value, eta and sqrt(2 eta)."""
    x = w.image
    for _ in range(STEPS):
        x = leaf(x)
        g = gradient(w.f(x), x).clamp(-1, 1)
        new = x.detach() - 0.01 * g + (2 * 0.01) ** 0.5 * torch.randn_like(x)
        x = torch.where(w.mask, w.image, new)
    return x


@published(lambda w: w.f, lambda w: w.image, preset=presets.lsd(STEPS))
def lsd(w: World) -> Tensor:
    """LSD (Grathwohl 2020): up f, the step decayed in equal ratios to the noise's scale."""
    x = w.image
    for lr in torch.logspace(0, -2, STEPS, dtype=torch.float64).tolist():
        x = leaf(x)
        x = x.detach() + lr * gradient(w.f(x), x) + torch.randn_like(x) * 0.01
    return x


@published(
    lambda w: w.f,
    lambda w: w.image,
    log_prob=True,
    step_size=geometric(0.5, 0.05, STEPS),
    noise_scale=linear(0.1, 0.0, STEPS),
    prior_std=2.0,
)
def decayed(w: World) -> Tensor:
    """Step decayed in equal ratios, noise linearly to nothing, Gaussian base."""
    x = w.image
    for k in range(STEPS):
        x = leaf(x)
        lr = 0.5 * (0.05 / 0.5) ** (k / (STEPS - 1))
        g = gradient(w.f(x) - x.flatten(1).square().sum(1, keepdim=True) / (2 * 2.0**2), x)
        x = x.detach() + lr * g + 0.1 * (1 - k / (STEPS - 1)) * torch.randn_like(x)
    return x


@published(
    lambda w: lambda x: w.bowl(x) / 0.7,
    lambda w: w.image,
    step_size=0.3,
    grad_norm_clip=4.0,
    prior_std=1.5,
    accept="metropolis",
)
def mala(w: World) -> Tensor:
    """Metropolis-adjusted Langevin, two gradients for each step, as most write it."""

    def log_target(x: Tensor) -> Tensor:
        return -w.bowl(x) / 0.7 - x.flatten(1).square().sum(1) / (2 * 1.5**2)

    def mean(x: Tensor) -> Tensor:
        x = leaf(x)
        g = gradient(w.bowl(x) / 0.7, x)
        g = g * (4.0 / g.flatten(1).norm(dim=1)).clamp(max=1.0).reshape(-1, 1, 1, 1)
        return x.detach() - 0.3 * (g + x.detach() / 1.5**2)

    def log_q(to: Tensor, x: Tensor) -> Tensor:
        return -(to - mean(x)).flatten(1).square().sum(1) / (4 * 0.3)

    x = w.image
    for _ in range(STEPS):
        y = mean(x) + (2 * 0.3) ** 0.5 * torch.randn_like(x)
        ratio = (log_target(y) + log_q(x, y) - log_target(x) - log_q(y, x)).detach()
        accept = torch.rand(CHAINS, dtype=torch.float64) < ratio.exp()
        x = torch.where(accept.reshape(-1, 1, 1, 1), y, x)
    return x


@pytest.mark.parametrize("name", CASES)
def test_one_call_equals_the_loop(name: str, seed: int) -> None:
    case, world = CASES[name], World(seed)
    torch.manual_seed(seed)
    expected = tensors(case.loop(world))
    torch.manual_seed(seed)
    assert distance(case.call(world, case.options), expected) < EXACT


# Options that only have a meaning together with another go with it.
TOGETHER = {
    "bounds": ("clamp_noise", "bounds_at", "outside"),
    "noise_at": ("clamp_noise",),
    "grad_norm_clip": ("norm_over",),
}


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name, case in CASES.items() for option in case.options]
)
def test_every_option_matters(name: str, option: str, seed: int) -> None:
    case = CASES[name]
    gone = (option, *TOGETHER.get(option, ()))
    fewer = {key: value for key, value in case.options.items() if key not in gone}
    # a step size cannot go, and without a noise scale the tied conventions would stay as they are
    if option == "step_size":
        fewer["step_size"] = 0.37
    elif option == "noise_scale" and isinstance(scale := case.options[option], float) and scale == 0.0:
        pass
    elif option == "noise_scale":
        fewer["noise_scale"] = 0.0

    def change(number: int) -> float:
        world = World(number)
        torch.manual_seed(number)
        whole = case.call(world, case.options)
        torch.manual_seed(number)
        return distance(case.call(world, fewer), whole)

    # that it changes something is meant: in one world of fifty no gradient reaches a clip (seed 33000116)
    assert any(change(seed + i) > CHANGED for i in range(4))


def test_from_sgld_is_the_tied_convention_for_layers_and_schedules(seed: int) -> None:
    case, world = CASES["short_run_layers"], World(seed)
    for scale in ({0: 0.1, 1: 0.2, 2: 0.3}, {0: lambda k: 0.1, 1: torch.tensor(0.2, dtype=torch.float64), 2: 0.3}):
        torch.manual_seed(seed)
        sampler = Langevin.from_sgld(scale, prior_std=1.0, rng="torch")
        got = sampler.sample(ladder(world), ladder_start(world), STEPS).state
        torch.manual_seed(seed)
        assert distance(got, case.loop(world)) < EXACT


def test_differentiable_last_step_reaches_the_parameters(seed: int) -> None:
    """Improved contrastive divergence (Du 2021): the chain, then one more step with its graph."""
    world = World(seed)
    parameters = list(world.f_net.parameters())
    torch.manual_seed(seed)
    x = world.image
    for _ in range(STEPS - 1):
        x = leaf(x)
        x = x.detach() - 0.3 * gradient(world.f(x), x) + 0.05 * torch.randn_like(x)
    x = leaf(x)
    g = torch.autograd.grad(world.f(x).sum(), x, create_graph=True)[0]
    expected = x - 0.3 * g + 0.05 * torch.randn_like(x)
    expected_grads = torch.autograd.grad(expected.pow(2).sum(), parameters, allow_unused=True)

    torch.manual_seed(seed)
    got = langevin(world.f, world.image, STEPS, step_size=0.3, noise_scale=0.05, rng="torch", differentiable=1)
    assert distance([got], [expected]) < EXACT
    grads = torch.autograd.grad(got.pow(2).sum(), parameters, allow_unused=True)
    assert [g is None for g in grads] == [g is None for g in expected_grads]
    pairs = [(a, b) for a, b in zip(grads, expected_grads, strict=True) if a is not None and b is not None]
    assert len(pairs) >= 3
    # gradients of a sum over 128 elements, worst seen 6e-14 over 200 seeds
    assert all(float((a - b).abs().max()) < EXACT for a, b in pairs)


def test_all_steps_differentiable_reach_state_step_size_and_parameters(seed: int) -> None:
    """EBT (Gladstone 2025): optimisation steps under create_graph with a learnt step size."""
    world = World(seed)

    def unrolled(start: Tensor, size: Tensor) -> Tensor:
        x = start
        for _ in range(4):
            x = x - size * torch.autograd.grad(world.f(x).sum(), x, create_graph=True)[0]
        return x

    wanted = [leaf(world.image), torch.tensor(0.05, dtype=torch.float64, requires_grad=True)]
    inputs = [*wanted, world.f_net[0].weight]
    expected = torch.autograd.grad(unrolled(*wanted).square().sum(), inputs)
    with torch.no_grad():  # the sampler switches it on for itself
        got = langevin(world.f, wanted[0], 4, step_size=wanted[1], noise_scale=0.0, differentiable=True)
    grads = torch.autograd.grad(got.square().sum(), inputs)
    for a, b in zip(grads, expected, strict=True):
        assert float(b.abs().max()) > 1e-3  # least seen 0.6 over 200 seeds
        assert float((a - b).abs().max() / b.abs().max()) < EXACT


# ---------------------------------------------------------------------------------------------------------------------
# The presets
# ---------------------------------------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "replace-your-loop.md"
WITH_PRESET = [name for name, case in CASES.items() if case.preset]


def test_every_preset_has_its_loop() -> None:
    mine = {name: item for name, item in vars(presets).items() if inspect.isfunction(item) and name[0] != "_"}
    made = {name for name, item in mine.items() if item.__module__ == presets.__name__}
    assert set(WITH_PRESET) == set(presets.__all__) == made - {"levels"}


def row(name: str) -> list[str]:
    """The cells of a preset's row: what the callable gives, steps, temperature, arguments, lines."""
    found = re.search(rf"^\| `{name}\(.*?\)` \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    assert found is not None, f"{PAGE.name} has no row for {name}"
    return [cell.strip() for cell in found.group(1).split("|")]


def lines(loop: Callable[..., Any]) -> int:
    """The statements' lines of a loop below: without signature, docstring, first and last line."""
    body = inspect.getsource(loop).split('"""')[2]
    return len([line for line in body.splitlines() if line.strip()]) - 2


@pytest.mark.parametrize("name", WITH_PRESET)
def test_the_page_and_the_docstring_say_the_same(name: str) -> None:
    gives, steps, _, _, length = row(name)
    assert int(length) == lines(CASES[name].loop)
    document = getattr(presets, name).__doc__
    assert re.search(r"\bT (\d|epsilon|eta)", document) and "Start: " in document
    # NCSN's are so many a level, those of energy matching depend on the data
    if name not in ("ncsn", "energy_matching"):
        assert re.search(rf"Steps\s+{steps.split()[0]}\b", document)
    assert CASES[name].options.get("log_prob", False) == (gives in ("f = -E", "log p"))


TEMPERATURES = {
    "jem": 5e-5,
    "short_run": 5e-5,
    "sada_jem": 0.0,
    "igebm": 1.25e-6,
    "uva": 1.25e-6,
    "improved_cd": 5e-9,
    "ebm_anatomy": 5e-5,
    "dual_mcmc_data": 4e-6,
    "lsd": 5e-5,
    "coopnets": 1.0,
    "latent_ebm_prior": 1.0,
    "latent_ebm_posterior": 1.0,
    "dual_mcmc_latent": 1.0,
    "vaebm": 1.0,
    "masked_multimodal": 1.0,
    "nae": 6.25e-3,
    "nae_data": 1.25e-4,
    "energy_matching": 0.01,
    "ncsn": 1.0,
}


@pytest.mark.parametrize("name", TEMPERATURES)
def test_implied_temperatures_are_the_documented_ones(name: str) -> None:
    sampler = getattr(presets, name)()
    assert sampler.implied_temperature == pytest.approx(TEMPERATURES[name])
    stated = re.search(r"\bT (\d[\d.e-]*\d|\d)", getattr(presets, name).__doc__)
    if name != "energy_matching":
        assert float(row(name)[2].split()[0].rstrip(",")) == pytest.approx(TEMPERATURES[name])
        assert stated is not None and float(stated.group(1)) == pytest.approx(TEMPERATURES[name])
    assert pickle.loads(pickle.dumps(sampler)).implied_temperature == sampler.implied_temperature


@pytest.mark.parametrize("name", WITH_PRESET)
def test_keywords_change_a_preset(name: str) -> None:
    needed = {"recovery_likelihood": (0.1,), "ibc": (-1.0, 1.0), "ired": (0.1, 1.0)}.get(name, ())
    preset = getattr(presets, name)
    changes = {"max_update": 0.5, "backend": "torch"}
    changed = non_default(preset(*needed, **changes))
    assert changed.keys() == {*non_default(preset(*needed)), *changes}
    assert changes.items() <= {name: changed[name] for name in changes}.items()
    with pytest.raises(TypeError, match="unexpected keyword argument 'stepsize'"):
        preset(*needed, stepsize=0.1)
