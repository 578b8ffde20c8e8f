"""Data sets shared by the tests of this folder: built once, read only."""

from __future__ import annotations

import gzip
import importlib.util
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mmebm.data import MultimodalDataset, load

# Without the extra 'train' there is nothing to read; what a user then sees is tested in test_packages.py.
MISSING = [name for name in ("mlxtend", "sklearn", "skimage", "PIL") if importlib.util.find_spec(name) is None]


@pytest.fixture(scope="session")
def packages() -> None:
    if MISSING:
        pytest.skip(f"not installed: {', '.join(MISSING)} (pip install 'mmebm[digits]')")


@pytest.fixture(scope="session")
def digits_train(packages: None) -> MultimodalDataset:
    return load("digits", "train", seed=0, n=4001)


@pytest.fixture(scope="session")
def digits_test(packages: None) -> MultimodalDataset:
    return load("digits", "test", seed=0)


@pytest.fixture(scope="session")
def poly_train(packages: None) -> MultimodalDataset:
    return load("polymnist-5k", "train", seed=0, copies=2)


@pytest.fixture(scope="session")
def poly_test(packages: None) -> MultimodalDataset:
    return load("polymnist-5k", "test", seed=0, copies=2)


@pytest.fixture
def write_mnist(seed: int) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """A function that writes a split of random items in MNIST's files, and returns its images and labels."""

    def write(
        folder: Path, split: str, n: int, *, side: int = 28, suffix: str = "", separator: str = "-", classes: int = 10
    ) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng([seed, n])
        images = random.integers(0, 256, (n, side, side)).astype(np.uint8)
        labels = random.permutation(np.arange(n) % classes).astype(np.uint8)
        folder.mkdir(parents=True, exist_ok=True)
        stem = {"train": "train", "test": "t10k"}[split]
        pack = gzip.compress if suffix else bytes
        header = struct.pack(">BBBBIII", 0, 0, 8, 3, n, side, side)
        (folder / f"{stem}-images{separator}idx3-ubyte{suffix}").write_bytes(pack(header + images.tobytes()))
        header = struct.pack(">BBBBI", 0, 0, 8, 1, n)
        (folder / f"{stem}-labels{separator}idx1-ubyte{suffix}").write_bytes(pack(header + labels.tobytes()))
        return images, labels

    return write
