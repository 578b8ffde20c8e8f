"""A tiny labelled set, and a system on it with real networks, real chains and no training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from mmebm import Langevin
from mmebm.data.base import Modality, MultimodalDataset, Split
from mmebm.models import GaussianPrior, JointInference, SharedGenerator

Batch = Mapping[str, Tensor]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Networks this small lose a factor of ten to a second thread where another process is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_set(
    n: int = 120, split: Split = "train", seed: int = 0, classes: tuple[str, ...] = ("dark", "light"), **options: Any
) -> MultimodalDataset:
    """A grey image, a colour image and a vector, all told apart by their sign; unlabelled without classes."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.arange(n) % 2
    labels = hidden if classes else torch.full((n,), -1)
    sign = (2.0 * hidden - 1)[:, None]
    modalities = (
        Modality("grey", (1, 8, 8), "image"),
        Modality("colour", (3, 8, 8), "image"),
        Modality("vector", (4,), "vector"),
    )
    pools = {
        m.name: (
            0.6 * sign.reshape(n, *[1] * len(m.shape)) + 0.2 * torch.randn(n, *m.shape, generator=generator)
        ).clamp(-1, 1)
        for m in modalities
    }
    return MultimodalDataset(
        name="small",
        split=split,
        seed=seed,
        modalities=modalities,
        classes=classes,
        pools=pools,
        pool_labels=dict.fromkeys(pools, labels),
        index=torch.arange(n)[:, None].expand(n, 3).contiguous(),
        labels=labels,
        **options,
    )


class SmallSystem:
    """What the evaluation needs of a system: untrained networks, and an energy that pulls to -0.3."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.generator = SharedGenerator(shapes, 3, width=8, sigma=0.5)
            self.inference = JointInference(shapes, 3, width=8)
        self.prior, self.device = GaussianPrior(3), torch.device("cpu")

    @torch.no_grad()
    def generate(self, n: int, *, seed: int) -> dict[str, Tensor]:
        return self.generator(self.prior.draw(n, seed=seed, device=self.device))

    def revise_latent(self, z: Tensor, x: Batch, *, seed: int, steps: int | None = None, **options: Any) -> Any:
        def energy(z: Tensor) -> Tensor:
            return self.generator.negative_log_likelihood(x, z)

        return Langevin(0.01, prior_std=1.0).sample(energy, z, 5 if steps is None else steps, seed=seed, **options)

    def revise_data(self, x: Batch, *, seed: int, steps: int | None = None, **options: Any) -> Any:
        def energy(x: Batch) -> Tensor:
            return torch.stack([(v + 0.3).flatten(1).square().sum(1) for v in x.values()]).sum(0)

        return Langevin(0.02, 0.05).sample(energy, dict(x), 5 if steps is None else steps, seed=seed, **options)


@pytest.fixture
def make_set() -> Callable[..., MultimodalDataset]:
    return small_set


@pytest.fixture
def system() -> SmallSystem:
    return SmallSystem({m.name: m.shape for m in small_set(2).modalities})
