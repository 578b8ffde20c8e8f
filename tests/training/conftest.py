"""A tiny data set of three modalities of unequal shapes, and a configuration that trains on it in a second."""

from __future__ import annotations

import pytest
import torch

from mmebm.data.base import Modality, MultimodalDataset
from mmebm.training.config import (
    AdamConfig,
    ChainConfig,
    Config,
    GuardConfig,
    LatentPriorConfig,
    LossConfig,
    ModelConfig,
    ShuffledTuplesConfig,
    Stage,
)


def toy(n: int = 64) -> MultimodalDataset:
    """Grey 28x28, colour 14x14 and a vector: class c is a level of grey, a channel, a sign pattern."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 2
    sign = (labels * 2.0 - 1)[:, None, None, None]
    noise = 0.1 * torch.randn(n, 1, 28, 28, generator=generator)
    colour = torch.full((n, 3, 14, 14), -1.0)
    colour[torch.arange(n), labels] = 1.0
    pools = {
        "grey": (0.8 * sign + noise).clamp(-1, 1),
        "colour": colour,
        "vector": torch.cat([sign[:, :, 0, 0], -sign[:, :, 0, 0]], 1).repeat(1, 3),
    }
    shapes = (
        Modality("grey", (1, 28, 28), "image"),
        Modality("colour", (3, 14, 14), "image"),
        Modality("vector", (6,), "vector"),
    )
    return MultimodalDataset(
        name="toy",
        split="train",
        seed=0,
        modalities=shapes,
        classes=("low", "high"),
        pools=pools,
        pool_labels=dict.fromkeys(pools, labels),
        index=torch.arange(n)[:, None].expand(n, 3).contiguous(),
        labels=labels,
        info={},
    )


@pytest.fixture
def data() -> MultimodalDataset:
    return toy()


@pytest.fixture
def config() -> Config:
    return Config(
        preset="test",
        model=ModelConfig(latent=3, generator_width=16, inference_width=16, energy_width=16),
        data_chain=ChainConfig(steps=3, travel=0.5, noise=0.005, clamp=True),
        latent_chain=ChainConfig(steps=2, step="auto", auto_every=4),
        loss=LossConfig(elbo=1.0, energy_l2=0.01),
        stages=(Stage("warmup", 6), Stage("prior", 4), Stage("joint", 6)),
        latent_prior=LatentPriorConfig(width=8, chain=ChainConfig(steps=3, step=0.2)),
        shuffled_tuples=ShuffledTuplesConfig(),
        generator=AdamConfig(lr=1e-3),
        guard=GuardConfig(every=4),
        batch=16,
    )
