"""An iteration of a preset's joint stage, whole: data and latent chains, networks, what the preset adds, and Adam.

    python -m pytest benchmarks/bench_training_iteration.py
    python benchmarks/bench_training_iteration.py polymnist-5k --implementation mmebm     (what takes the time in one)

*eager* is the same trainer with every chain written by hand in PyTorch; nothing else differs. The gate: both run the
same chain where neither has noise. `polymnist-5k` is here with convolutional networks throughout, batch 128 and random
tuples (time does not depend on them); benchmarks/gpu.py times it too.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from mmebm import data, noise
from mmebm.data.base import Modality, MultimodalDataset
from mmebm.training import system
from mmebm.training.config import ChainConfig, Config, ModelConfig
from mmebm.training.presets import preset
from mmebm.training.trainer import MEASURED_EVERY, Trainer


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
        self,
        energy: Callable[..., Tensor],
        state: Any,
        steps: int,
        *,
        seed: int,
        observed: Any = None,
        chain_offset: int = 0,
    ) -> Done:
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


def settings(name: str, batch: int | None = None) -> Config:
    """The preset, with its joint stage alone; ``batch``: instead of its own."""
    whole = preset(name)
    joint = next(stage for stage in whole.stages if stage.kind == "joint")
    if name == "polymnist-5k":
        # MLPs are timed with the demo
        conv = ModelConfig(
            latent=64, net="conv", generator_width=16, inference_width=16, energy_trunk_width=16, sigma=0.2
        )
        whole = whole.replace(model=conv, batch=128)
    return whole.replace(stages=(joint,), batch=batch or whole.batch)


def tuples(name: str) -> MultimodalDataset:
    """500 tuples of the preset's shapes; for `polymnist-5k` random ones, which need no package."""
    if name == "demo":
        return data.load("digits", "train", size=14, n=500)
    n, names = 500, [f"m{i}" for i in range(5)]
    rng = torch.Generator().manual_seed(0)
    labels = torch.zeros(n, dtype=torch.int64)
    return MultimodalDataset(
        name="random",
        split="train",
        seed=0,
        modalities=tuple(Modality(m, (3, 28, 28), "image") for m in names),
        classes=("one",),
        pools={m: 2 * torch.rand(n, 3, 28, 28, generator=rng) - 1 for m in names},
        pool_labels=dict.fromkeys(names, labels),
        index=torch.arange(n)[:, None].expand(n, 5).contiguous(),
        labels=labels,
    )


@contextmanager
def chains(implementation: str) -> Iterator[None]:
    """The trainer's chains by ours, or by hand (``"eager"``)."""
    ours = system.sampler_of
    system.sampler_of = by_hand if implementation == "eager" else ours  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        system.sampler_of = ours


def still(config: Config) -> Config:
    """The same without noise."""
    assert config.latent_prior is not None
    quiet = lambda chain: dataclasses.replace(chain, noise=0.0)
    return config.replace(
        data_chain=quiet(config.data_chain),
        latent_chain=quiet(config.latent_chain),
        latent_prior=dataclasses.replace(config.latent_prior, chain=quiet(config.latent_prior.chain)),
    )


def gate(name: str, device: torch.device) -> None:
    """Both implementations run the same chains where neither has noise."""
    ends = []
    for implementation in ("mmebm", "eager"):
        with chains(implementation):
            s = Trainer(still(settings(name)), tuples(name), device).system
            x = s.generate(8, seed=1)
            z = noise.normal((8, s.latent), seed=2, device=device)
            ends.append([*s.revise_data(x, seed=3).state.values(), s.revise_latent(z, x, seed=4).state])
    for ours, theirs in zip(*ends, strict=True):
        # up to 30 steps of fp32 sums in another order
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def iterations(name: str, device: torch.device, batch: int | None = None) -> Callable[[], None]:
    """A function that runs one iteration and waits for it; call it within :func:`chains`."""
    learner = Trainer(settings(name, batch), tuples(name), device)
    batches = []
    for learner.iteration in range(8):
        batches.append(learner.batch())
    rng = torch.Generator(device).manual_seed(0)
    learner.system.measure_latent_step(batches[0].x, rng)
    count = iter(range(1 << 30))

    def one() -> None:
        i = next(count)
        learner.measures = i % MEASURED_EVERY == 0  # as the trainer does
        row = learner.joint_step(batches[i % 8], rng)
        assert {"loss_energy", "loss_generator", "loss_inference"} <= set(row)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return one


@pytest.mark.parametrize("implementation", ["eager", "mmebm"])
@pytest.mark.parametrize("name", ["demo", "polymnist-5k"])
def test_training_iteration(benchmark: Any, name: str, implementation: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gate(name, device)
    with chains(implementation):
        one = iterations(name, device)
        where = f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name()
        benchmark.group = f"one training iteration of `{name}`, {where}"
        benchmark.extra_info.update(implementation=implementation, baseline=implementation == "eager")
        slow = name != "demo" and device.type == "cpu"  # many seconds each
        benchmark.pedantic(one, rounds=5 if slow else 15, warmup_rounds=1 if slow else 3)


def main() -> None:
    """The operators of one iteration by the time that they take themselves.

    A chain in one call is none of them: it is in what is left of the iteration's time.
    """
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("name", choices=("demo", "polymnist-5k"))
    parser.add_argument("--implementation", choices=("eager", "mmebm"), default="mmebm")
    parser.add_argument("--batch", type=int, help="instead of the preset's")
    parser.add_argument("--rows", type=int, default=25)
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with chains(given.implementation):
        one = iterations(given.name, device, given.batch)
        one()  # what is done once is not of an iteration
        with torch.profiler.profile() as profile:
            started = time.perf_counter()
            one()
            seconds = time.perf_counter() - started
    key = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    print(profile.key_averages().table(sort_by=key, row_limit=given.rows))
    print(f"{given.name}, {given.implementation}: {seconds:.3g} s, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
