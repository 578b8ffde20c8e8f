"""A folder of own arrays as a user would have it, and a configuration that trains on it in a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmebm.training.config import (
    AdamConfig,
    ChainConfig,
    Config,
    DataConfig,
    GuardConfig,
    LossConfig,
    ModelConfig,
    Stage,
)

META: dict[str, Any] = {
    "classes": ["low", "high"],
    "modalities": {
        "photo": {"kind": "image", "layout": "HWC"},
        "sound": {"kind": "vector", "range": [-80, 0]},
        "word": {"kind": "text", "words": ["low", "high"]},
    },
}


def _write_folder(root: Path, n: int = 40, meta: dict[str, Any] | None = None) -> Path:
    """Colour photographs (HWC), a sound in decibels and a word; class c is a level of each."""
    rng = np.random.default_rng(0)
    for split, rows in (("train", n), ("test", n // 2)):
        (root / split).mkdir(parents=True, exist_ok=True)
        labels = np.arange(rows) % 2
        level = labels[:, None, None, None]
        np.save(root / split / "photo.npy", (level * 120 + rng.integers(0, 100, (rows, 8, 8, 3))).astype(np.uint8))
        np.save(root / split / "sound.npy", -70 + 50 * labels[:, None] + rng.normal(0, 3, (rows, 5)))
        np.save(root / split / "word.npy", np.array(["low", "high"])[labels])
        np.save(root / split / "labels.npy", labels)
    (root / "meta.json").write_text(json.dumps(META if meta is None else meta))
    return root


def _own_config(path: Path, **changes: Any) -> Config:
    config = Config(
        preset="test",
        data=DataConfig("folder", path=str(path)),
        model=ModelConfig(latent=3, generator_width=16, inference_width=16, energy_width=16),
        data_chain=ChainConfig(steps=3, travel=0.5, noise=0.005, clamp=True),
        latent_chain=ChainConfig(steps=2, step=0.1),
        loss=LossConfig(elbo=1.0, energy_l2=0.01),
        stages=(Stage("warmup", 6), Stage("joint", 4)),
        generator=AdamConfig(lr=1e-3),
        guard=GuardConfig(every=2),
        batch=16,
    )
    return config.replace(**changes)


@pytest.fixture(scope="session")
def write_folder() -> Callable[..., Path]:
    return _write_folder


@pytest.fixture(scope="session")
def own_config() -> Callable[..., Config]:
    return _own_config


@pytest.fixture
def meta_with() -> Callable[..., str]:
    """``meta.json`` with other settings of some modalities."""
    return lambda **settings: json.dumps({**META, "modalities": {**META["modalities"], **settings}})
