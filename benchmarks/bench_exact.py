"""MALA, HMC, underdamped dynamics and tempering, against the loops that people write for them with torch's noise.

    MMEBM_BENCH_THREADS=1 python -m pytest benchmarks/bench_exact.py

The energy is half a sum of squares, so that what is measured is the sampler. The loops keep the gradient and energy of
the state they are at, work in place where they can, and draw with ``torch.randn_like``. The gate: given this library's
noise instead, each loop and the sampler end in the same state, which lies far from where both began.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mmebm
from mmebm import noise
from mmebm.samplers import HMC, ParallelTempering, Underdamped

SHAPES = [(100, 64), (4, 8), (64, 3072)]
STEPS, SEED = 200, 11
STEP_SIZE, LEAPS, LADDER = 0.1, 5, (1.0, 1.2, 1.5, 2.0)
# Of an update some ten float32 operations on numbers below 10, and normals that are within 2e-6: 1e-5 a step.
TOLERANCE, GATE_STEPS = 1e-5, 4

# normal(k, shape, purpose) and uniform(k, shape, purpose): torch's, or this library's where both are compared
Draw = Callable[[int, tuple[int, ...], int], Tensor]
Loop = Callable[[Tensor, int, Draw, Draw], Tensor]


def energy(x: Tensor) -> Tensor:
    return 0.5 * x.flatten(1).square().sum(1)


def torch_normal(k: int, shape: tuple[int, ...], purpose: int) -> Tensor:
    return torch.randn(shape)


def torch_uniform(k: int, shape: tuple[int, ...], purpose: int) -> Tensor:
    return torch.rand(shape)


def our_normal(k: int, shape: tuple[int, ...], purpose: int) -> Tensor:
    return noise.normal(shape, seed=SEED, step=k, stream=noise.stream(0, purpose))


def our_uniform(k: int, shape: tuple[int, ...], purpose: int) -> Tensor:
    return noise.uniform(shape, seed=SEED, step=k, stream=noise.stream(0, purpose))


def slope(x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        e = energy(x)
        (g,) = torch.autograd.grad(e.sum(), x)
    return e.detach(), g


@torch.no_grad()
def mala(x: Tensor, steps: int, normal: Draw, uniform: Draw) -> Tensor:
    a = STEP_SIZE
    x = x.clone()
    e, g = slope(x)
    for k in range(steps):
        y = x - a * g
        y.add_(normal(k, tuple(x.shape), noise.DRIFT), alpha=math.sqrt(2 * a))
        e_new, g_new = slope(y)
        forward = (y - x + a * g).square_().sum(1)
        backward = (x - y + a * g_new).square_().sum(1)
        ratio = e - e_new + (forward - backward) / (4 * a)
        accept = uniform(k, (len(x), 1), noise.ACCEPT)[:, 0] < ratio.exp()
        x, g = torch.where(accept[:, None], y, x), torch.where(accept[:, None], g_new, g)
        e = torch.where(accept, e_new, e)
    return x


@torch.no_grad()
def hmc(x: Tensor, steps: int, normal: Draw, uniform: Draw) -> Tensor:
    h = STEP_SIZE
    x = x.clone()
    e, g = slope(x)
    for k in range(steps):
        v = normal(k, tuple(x.shape), noise.MOMENTUM)
        before = 0.5 * v.square().sum(1)
        v = v - 0.5 * h * g
        y, e_new, g_new = x, e, g
        for leap in range(LEAPS):
            y = y + h * v
            e_new, g_new = slope(y)
            v.add_(g_new, alpha=-h if leap < LEAPS - 1 else -0.5 * h)
        ratio = e + before - e_new - 0.5 * v.square().sum(1)
        accept = uniform(k, (len(x), 1), noise.ACCEPT)[:, 0] < ratio.exp()
        x, g = torch.where(accept[:, None], y, x), torch.where(accept[:, None], g_new, g)
        e = torch.where(accept, e_new, e)
    return x


@torch.no_grad()
def underdamped(x: Tensor, steps: int, normal: Draw, uniform: Draw) -> Tensor:
    h = STEP_SIZE
    decay = math.exp(-h)
    x, v = x.clone(), normal(0, tuple(x.shape), noise.MOMENTUM)
    _, g = slope(x)
    for k in range(steps):
        v.add_(g, alpha=-0.5 * h)
        x = x.add_(v, alpha=0.5 * h)
        v.mul_(decay).add_(normal(k, tuple(x.shape), noise.DRIFT), alpha=math.sqrt(1 - decay**2))
        x = x.add_(v, alpha=0.5 * h)
        _, g = slope(x)
        v.add_(g, alpha=-0.5 * h)
    return x


@torch.no_grad()
def tempering(x: Tensor, steps: int, normal: Draw, uniform: Draw) -> Tensor:
    a, n, rungs = STEP_SIZE, len(x), len(LADDER)
    temperature = torch.tensor(LADDER).repeat(n)
    inverse, scale = 1 / torch.tensor(LADDER), (2 * a * temperature).sqrt()[:, None]
    x = x.repeat_interleave(rungs, 0)
    e, g = slope(x)
    rows = torch.arange(n)[:, None] * rungs
    for k in range(steps):
        y = x - a * g
        y += scale * normal(k, (n, rungs * x.shape[1]), noise.DRIFT).view_as(x)
        e_new, g_new = slope(y)
        forward, backward = (y - x + a * g).square_().sum(1), (x - y + a * g_new).square_().sum(1)
        ratio = (e - e_new + (forward - backward) / (4 * a)) / temperature
        accept = uniform(k, (n, rungs), noise.ACCEPT).view(-1) < ratio.exp()
        x, g = torch.where(accept[:, None], y, x), torch.where(accept[:, None], g_new, g)
        e = torch.where(accept, e_new, e)
        side = k % 2
        low, high, now = slice(side, rungs - 1, 2), slice(side + 1, rungs, 2), e.view(n, rungs)
        swap = (
            uniform(k, (n, rungs - 1), noise.SWAP)[:, low]
            < ((inverse[low] - inverse[high]) * (now[:, low] - now[:, high])).exp()
        )
        order = torch.arange(rungs).repeat(n, 1)
        order[:, low] += swap
        order[:, high] -= swap.long()
        at = (order + rows).view(-1)
        x, g, e = x[at], g[at], e[at]
    return x.view(n, rungs, -1)[:, 0]


SAMPLERS: dict[str, tuple[Loop, Any]] = {
    "MALA": (mala, mmebm.MALA(STEP_SIZE)),
    "HMC": (hmc, HMC(STEP_SIZE, LEAPS)),
    "Underdamped": (underdamped, Underdamped(STEP_SIZE)),
    "ParallelTempering": (tempering, ParallelTempering(STEP_SIZE, LADDER)),
}


def start(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def gate(name: str, x: Tensor) -> None:
    """The sampler and the loop end in one state, and not where they began."""
    loop, sampler = SAMPLERS[name]
    got = sampler.sample(energy, x, GATE_STEPS, seed=SEED).state
    wanted = loop(x, GATE_STEPS, our_normal, our_uniform)
    off = (got - wanted).abs().amax(1)
    # a decision within rounding of its threshold may fall the other way, in one chain of a thousand steps
    assert int((off > GATE_STEPS * TOLERANCE).sum()) <= 1, f"{name}: off by {off.max():.2e}"
    moved = (wanted - x).abs().amax(1)
    assert float(moved.median()) > 1000 * GATE_STEPS * TOLERANCE, f"{name}: moved by {moved.median():.2e} only"


@pytest.mark.parametrize("implementation", ["loop, torch's noise", "mmebm"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("name", SAMPLERS)
def test_exact(
    benchmark: Any, measure: Callable[..., None], name: str, shape: tuple[int, int], implementation: str
) -> None:
    loop, sampler = SAMPLERS[name]
    x = start(shape)
    ours = implementation == "mmebm"
    if ours:
        gate(name, x)
    benchmark.group = f"{STEPS} steps of {name}, {shape[0]} x {shape[1]}, {torch.get_num_threads()} threads"
    benchmark.extra_info.update(implementation=implementation, baseline=not ours)
    if ours:
        measure(lambda: sampler.sample(energy, x, STEPS, seed=SEED))
    else:
        measure(lambda: loop(x, STEPS, torch_normal, torch_uniform))


@pytest.mark.parametrize("implementation", ["without a schedule", "with a schedule"])
def test_schedule(benchmark: Any, measure: Callable[..., None], implementation: str) -> None:
    """A chain in one call whose step size is a function of the step: what the constants' preparation adds."""
    scheduled = implementation == "with a schedule"
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1)).requires_grad_(False)
    steps, x = 20_000, start((4, 2))
    size = mmebm.schedules.linear(0.01, 0.001, steps) if scheduled else 0.01
    sampler = mmebm.Langevin(size)
    out = sampler.sample(net, x, steps, seed=SEED)
    assert out.info["op"] == "langevin_mlp", out.info["reason"]
    few = sampler.replace(backend="torch").sample(net, x, 20, seed=SEED).state
    torch.testing.assert_close(sampler.sample(net, x, 20, seed=SEED).state, few, rtol=0, atol=20 * TOLERANCE)
    assert float((few - x).abs().median()) > 100 * 20 * TOLERANCE
    benchmark.group = f"{steps} steps of a fused chain, 4 x 2"
    benchmark.extra_info.update(implementation=implementation, baseline=not scheduled)
    measure(lambda: sampler.sample(net, x, steps, seed=SEED))
