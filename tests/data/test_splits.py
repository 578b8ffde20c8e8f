"""Train, validation and test share no source item, in no modality, whatever the seed: by the numbers that the sets
give, and by looking at the pixels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmebm.data import SPLITS, Modality, MultimodalDataset, has_validation, load
from mmebm.data.packages import mnist

BUILT: dict[str, dict[str, Any]] = {"digits": {}, "polymnist-5k": {"size": 14, "copies": 1}, "views": {}}


def shown(data: MultimodalDataset) -> set[int]:
    return set(data.item_numbers().unique().tolist()) - {-1}


def apart(sets: dict[str, MultimodalDataset]) -> None:
    names = list(sets)
    for i, a in enumerate(names):
        assert len(sets[a]) and shown(sets[a])
        for b in names[:i]:
            assert not shown(sets[a]) & shown(sets[b]), (a, b)


@pytest.mark.parametrize("name", BUILT)
def test_the_splits_of_a_built_set_share_no_item(name: str, packages: None, seed: int) -> None:
    try:
        sets = {split: load(name, split, seed=seed, **BUILT[name]) for split in SPLITS}  # type: ignore[arg-type]
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    apart(sets)
    assert has_validation(name)
    # under another seed the pairs are others and the items the same
    other = load(name, "validation", seed=seed + 1, **BUILT[name])
    assert shown(other) == shown(sets["validation"])
    assert [data.split for data in sets.values()] == list(SPLITS)


def test_no_digit_is_seen_in_two_splits_by_its_pixels(packages: None) -> None:
    """Every modality of every PolyMNIST tuple, the digit taken out of the crop again."""
    images, labels, _ = mnist()
    of: dict[bytes, set[str]] = {}
    for split in SPLITS:
        digits = load("digits", split)  # type: ignore[arg-type]
        natural = np.rint(digits.modalities[0].natural(digits.pools["mnist"]) * 255).astype(np.uint8)[:, 0]
        poly = load("polymnist-5k", split, copies=1, size=14)  # type: ignore[arg-type]
        assert poly.items is not None
        for name in poly.pools:
            natural = np.concatenate([natural, images[poly.items[name].numpy()]])
            assert (poly.pool_labels[name].numpy() == labels[poly.items[name].numpy()]).all()
        for image in natural:
            of.setdefault(image.tobytes(), set()).add(split)
    assert all(len(splits) == 1 for splits in of.values()) and len(of) == 5000


def test_sets_over_idx_files_and_svhn(tmp_path: Path, packages: None, write_mnist: Callable[..., Any]) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    for split, n in (("train", 200), ("test", 60)):
        write_mnist(tmp_path, split, n)
        x = np.random.default_rng(n).integers(0, 256, (32, 32, 3, n)).astype(np.uint8)
        scipy_io.savemat(tmp_path / f"{split}_32x32.mat", {"X": x, "y": np.arange(n)[:, None] % 10 + 1})
    for name, options in (
        ("polymnist-built", {}),
        ("polymnist-built", {"disjoint": True}),
        ("polyfashion", {}),
        ("mnist-svhn", {"multiplicity": 2}),
        ("mnist-svhn-text", {"multiplicity": 2}),
    ):
        sets = {s: load(name, s, path=tmp_path, **options) for s in SPLITS}  # type: ignore[arg-type]
        apart(sets)
        assert sum(len(shown(data)) for data in sets.values()) == (260 if name.startswith("poly") else 520)
    # the pixels too: an SVHN image is in the pools of one split
    seen: dict[bytes, str] = {}
    for split in SPLITS:
        for image in load("mnist-svhn", split, path=tmp_path, multiplicity=2).pools["svhn"]:  # type: ignore[arg-type]
            assert seen.setdefault(image.numpy().tobytes(), split) == split


def test_pairs_of_a_file_that_mix_splits_are_in_none(tmp_path: Path, write_mnist: Callable[..., Any]) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    _, digits = write_mnist(tmp_path, "train", 100)
    x = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 100)).astype(np.uint8)
    y = np.arange(100) % 10
    scipy_io.savemat(tmp_path / "train_32x32.mat", {"X": x, "y": np.where(y == 0, 10, y)[:, None]})
    pairs = np.argwhere(digits[:, None] == y[None])
    for name, column in zip(("mnist", "svhn"), pairs.T, strict=True):
        torch.save(torch.from_numpy(column.copy()), tmp_path / f"train-ms-{name}-idx.pt")
    train, validation = (load("mnist-svhn", split, path=tmp_path) for split in ("train", "validation"))
    apart({"train": train, "validation": validation})
    assert len(train) == 10 * 9 * 9 and len(validation) == 10  # of each class 9 and 1 of both kinds


# ------------------------------------------------------------------------------ groups, of tuples that share an item


def tiny(index: list[list[int]], items: dict[str, list[int]] | None = None, **changes: Any) -> MultimodalDataset:
    rows = torch.tensor(index)
    sizes = rows.amax(0) + 1
    names = [f"v{column}" for column in range(rows.shape[1])]
    data = MultimodalDataset(
        name="tiny",
        split="train",
        seed=0,
        modalities=tuple(Modality(name, (1,), "vector") for name in names),
        classes=(),
        pools={name: torch.zeros(int(n), 1) for name, n in zip(names, sizes, strict=True)},
        pool_labels={name: torch.full((int(n),), -1) for name, n in zip(names, sizes, strict=True)},
        index=rows,
        labels=torch.full((len(rows),), -1),
        items=None if items is None else {name: torch.tensor(of) for name, of in items.items()},
    )
    return dataclasses.replace(data, **changes)


def by_hand(numbers: list[list[int]]) -> list[int]:
    """The least tuple that each one hangs together with, by search."""
    out = list(range(len(numbers)))
    for start in range(len(numbers)):
        reached, queue = {start}, [start]
        while queue:
            at = queue.pop()
            for other, theirs in enumerate(numbers):
                if other not in reached and ({*numbers[at]} & {*theirs}) - {-1}:
                    reached.add(other)
                    queue.append(other)
        out[start] = min(reached)
    return out


def test_groups_of_ten_captions_an_image() -> None:
    data = tiny([[0, 0], [0, 1], [1, 2], [2, 3], [1, 4]])
    assert data.groups().tolist() == [0, 0, 2, 3, 2]
    # the instances of two modalities are numbered apart, unless items says otherwise
    assert tiny([[0, 1], [1, 0]]).groups().tolist() == [0, 1]
    assert tiny([[0, 1], [1, 0]], {"v0": [0, 1], "v1": [0, 1]}).groups().tolist() == [0, 0]
    assert tiny([[0, 0], [1, 0]], {"v0": [0, 1], "v1": [-1]}).groups().tolist() == [0, 1]  # a word is no item


def test_groups_are_those_found_by_search(seed: int) -> None:
    random = np.random.default_rng(seed)
    for _ in range(40):
        n, m, k = random.integers(1, 25), random.integers(1, 4), random.integers(1, 30)
        index = random.integers(0, k, (n, m)).tolist()
        sizes = [max(row[c] for row in index) + 1 for c in range(m)]
        items = {f"v{c}": random.integers(-1, 40, sizes[c]).tolist() for c in range(m)}
        present = torch.from_numpy(random.random((n, m)) < 0.8)
        present[:, 0] |= ~present.any(1)
        data = tiny(index, items, present=present)
        assert data.groups().tolist() == by_hand(data.item_numbers().tolist())
        assert (data.item_numbers() == -1)[~present].all()
    chain = tiny([[i, i + 1] for i in range(60)], {"v0": list(range(60)), "v1": list(range(61))})
    assert chain.groups().tolist() == [0] * 60


def test_items_must_fit() -> None:
    with pytest.raises(ValueError, match=r"items of 'v0' must be int64 \(2,\).* got torch.int64 \(1,\)"):
        tiny([[0], [1]], {"v0": [0]})
    with pytest.raises(ValueError, match=r"items must have the modalities' names \['v0', 'v1'\].* got \['v0'\]"):
        tiny([[0, 0]], {"v0": [0]})


# ------------------------------------------------------------------------------ a folder of one's own


def test_rows_of_a_folder_hang_together_by_items_and_by_equal_images(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    photos = random.integers(0, 256, (8, 3, 4, 4)).astype(np.uint8)
    (tmp_path / "train").mkdir()
    np.save(tmp_path / "train" / "photo.npy", photos[[0, 0, 1, 2, 3, 3, 4]])
    np.save(tmp_path / "train" / "sound.npy", random.random((7, 5)).astype(np.float32))
    assert load("folder", "train", path=tmp_path).groups().tolist() == [0, 0, 2, 3, 4, 4, 6]
    np.save(tmp_path / "train" / "items.npy", np.array(["a", "b", "c", "c", "d", "e", "a"]))
    data = load("folder", "train", path=tmp_path)
    assert [m.name for m in data.modalities] == ["photo", "sound"]
    assert data.groups().tolist() == [0, 0, 2, 2, 4, 4, 0]
    # an emblem of the class is no photograph of one thing
    many = tmp_path / "many" / "train"
    many.mkdir(parents=True)
    np.save(many / "photo.npy", np.repeat(photos[:2], (30, 5), axis=0))
    assert load("folder", "train", path=many.parent).groups().tolist() == [*range(30), *[30] * 5]
    with pytest.raises(ValueError, match=r"has no validation split of its own \(no validation/\*.npy"):
        load("folder", "validation", path=tmp_path)
    (tmp_path / "validation").mkdir()
    np.save(tmp_path / "validation" / "photo.npy", photos[5:7])
    np.save(tmp_path / "validation" / "sound.npy", random.random((2, 5)).astype(np.float32))
    assert has_validation("folder", tmp_path) and len(load("folder", "validation", path=tmp_path)) == 2
    np.save(tmp_path / "train" / "items.npy", np.zeros(7))
    with pytest.raises(ValueError, match=r"items.npy.* must hold integers or strings \(7,\)"):
        load("folder", "train", path=tmp_path)


def test_a_builder_of_ones_own_is_not_asked_for_a_split_that_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch, packages: None
) -> None:
    from mmebm.data import DATASETS

    asked = []

    def mine(split: Any, *, seed: int = 0) -> MultimodalDataset:
        asked.append(split)
        return load("digits", split if split == "train" else "test", n=20)  # an "else" that would give test tuples

    monkeypatch.setitem(DATASETS, "mine", mine)
    with pytest.raises(ValueError, match="'mine' has no validation split of its own: training keeps"):
        load("mine", "validation")
    assert not asked
    mine.splits = ("train", "validation", "test")  # type: ignore[attr-defined]
    load("mine", "validation")
    assert asked == ["validation"]
