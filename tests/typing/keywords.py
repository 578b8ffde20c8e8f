# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
"""Read by pyright, not run: each line below is an error to it, or the comment that expects one is.

A wrong keyword, and a value of a wrong kind, of everything that takes a sampler's options.
"""

from __future__ import annotations

import torch
from torch import Tensor

import mmebm


def energy(x: Tensor) -> Tensor:
    return x.square().sum(1)


def joint(state: dict[str, Tensor]) -> Tensor:
    return state["a"].sum(1)


x = torch.zeros(3, 2)

mmebm.langevin(energy, x, 3, step_size=0.1, temprature=2.0)  # pyright: ignore[reportCallIssue]
mmebm.langevin(energy, x, 3, step_size="0.1")  # pyright: ignore[reportArgumentType]
mmebm.Langevin(0.1, noise=1.0)  # pyright: ignore[reportCallIssue]
mmebm.Langevin(0.1, noise_at="never")  # pyright: ignore[reportArgumentType]
mmebm.Langevin.from_sgld(0.1, grad_clipping=1.0)  # pyright: ignore[reportCallIssue]
mmebm.MALA(0.1, grad_clipping=1.0)  # pyright: ignore[reportCallIssue]
mmebm.HMC(0.1, steps=3)  # pyright: ignore[reportCallIssue]
mmebm.Underdamped(0.1, gamma=1.0)  # pyright: ignore[reportCallIssue]
mmebm.ParallelTempering(0.1, [1.0, 2.0], swap=2)  # pyright: ignore[reportCallIssue]
mmebm.presets.jem(noise=0.02)  # pyright: ignore[reportCallIssue]
mmebm.presets.uva(log_prob="no")  # pyright: ignore[reportArgumentType]

sampler = mmebm.Langevin(0.1)
sampler.replace(stepsize=0.2)  # pyright: ignore[reportCallIssue]
sampler.sample(energy, x, 3, sead=0)  # pyright: ignore[reportCallIssue]
mmebm.HMC(0.1).replace(warmup=3)  # pyright: ignore[reportCallIssue]
sampler.init(x, sead=0)  # pyright: ignore[reportCallIssue]
sampler.step(energy, x, sampler.init(x), thin=2)  # pyright: ignore[reportCallIssue]

# and these are none; the state keeps its type
chains: dict[str, Tensor] = mmebm.langevin(joint, {"a": x}, 3, step_size={"a": 0.1}, seed=0)
carry = sampler.init(x, seed=0)
after, carry, info = sampler.replace(temperature=lambda k: 1.0 / (k + 1), grad_clip=x).step(energy, x, carry)
shape: torch.Size = after.shape
mmebm.presets.igebm(bounds=(None, 1.0), capture=False)
