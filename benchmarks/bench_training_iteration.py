"""One iteration of the `demo` preset's joint stage, whole: three data and latent chains, three networks, four Adams.

    python -m pytest benchmarks/bench_training_iteration.py

*eager* is the same trainer with every chain written by hand in PyTorch; nothing else differs. The gate: both run the
same chain where neither has noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from mmebm import data, noise
from mmebm.training import system
from mmebm.training.config import ChainConfig, Config
from mmebm.training.presets.demo import config
from mmebm.training.trainer import Trainer


@dataclass
class Done:
    state: Any
    info: dict[str, Any]


class HandWritten:
    """The loop people write, for a tensor or a dict of tensors, with the options that the demo uses."""

    def __init__(self, chain: ChainConfig, size: float | Mapping[str, float], prior_std: float | None) -> None:
        assert isinstance(size, (int, float))
        self.step_size, self.scale = size**2 / 2, size if chain.noise is None else chain.noise
        self.clamp, self.prior_std = chain.clamp, prior_std

    def sample(
        self, energy: Callable[..., Tensor], state: Any, steps: int, *, seed: int, observed: Any = None,
        chain_offset: int = 0,
    ) -> Done:  # fmt: skip
        names = list(state) if isinstance(state, dict) else [None]
        x = [t.detach().clone() for t in (state.values() if isinstance(state, dict) else [state])]
        for _ in range(steps):
            for t in x:
                t.requires_grad_()
            with torch.enable_grad():
                value = energy(dict(zip(names, x)) if isinstance(state, dict) else x[0])
                grads = torch.autograd.grad(value.sum(), x)
            with torch.no_grad():
                for t, g in zip(x, grads):
                    t.requires_grad_(False)
                    if self.prior_std is not None:
                        t.mul_(1 - self.step_size / self.prior_std**2)
                    t.add_(g, alpha=-self.step_size)
                    t.add_(torch.randn_like(t), alpha=self.scale)
                    if self.clamp:
                        t.clamp_(-1, 1)
        out = dict(zip(names, x)) if isinstance(state, dict) else x[0]
        return Done(out, {"nonfinite": torch.zeros(x[0].shape[0], dtype=torch.bool)})


def by_hand(
    chain: ChainConfig, size: Any, backend: str, *, prior_std: float | None = None, **options: Any
) -> HandWritten:
    return HandWritten(chain, size, prior_std)


def trainer(implementation: str, monkeypatch: pytest.MonkeyPatch, settings: Config) -> Trainer:
    if implementation == "eager":
        monkeypatch.setattr(system, "sampler_of", by_hand)
    return Trainer(settings, data.load("digits", "train", size=14, n=500))


def still(settings: Config) -> Config:
    """The same without noise."""
    assert settings.latent_prior is not None
    quiet = lambda chain: dataclasses.replace(chain, noise=0.0)
    return settings.replace(
        data_chain=quiet(settings.data_chain), latent_chain=quiet(settings.latent_chain),
        latent_prior=dataclasses.replace(settings.latent_prior, chain=quiet(settings.latent_prior.chain)),
    )  # fmt: skip


def gate(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for implementation in ("mmebm", "eager"):
        with monkeypatch.context() as patch:
            s = trainer(implementation, patch, still(config())).system
            x = s.generate(8, seed=1)
            z = noise.normal((8, s.config.model.latent), seed=2)
            ends.append([*s.revise_data(x, seed=3).state.values(), s.revise_latent(z, x, seed=4).state])
    for ours, theirs in zip(*ends, strict=True):
        # 30 and 20 steps of fp32 sums in another order
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "mmebm"])
def test_training_iteration(benchmark: Any, monkeypatch: pytest.MonkeyPatch, implementation: str) -> None:
    gate(monkeypatch)
    learner = trainer(implementation, monkeypatch, config())
    rng = torch.Generator().manual_seed(0)
    batches = []
    for learner.iteration in range(8):
        batches.append(learner.batch())
    learner.system.measure_latent_step(batches[0].x, rng)
    count = iter(range(1 << 30))
    benchmark.group = f"one training iteration of `demo`, {torch.get_num_threads()} threads"
    benchmark.extra_info.update(implementation=implementation, baseline=implementation == "eager")
    benchmark.pedantic(lambda: learner.joint_step(batches[next(count) % 8], rng), rounds=15, warmup_rounds=3)
