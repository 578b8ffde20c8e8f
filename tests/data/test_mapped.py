"""A torch data set of dicts: the same batches as its items say, read together, by threads, and trained on."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from mmebm.data import from_dataset, load
from mmebm.data.base import Modality


class Items(Dataset):
    """Image, vector, number, word and label of item i, all functions of i; counts what is read."""

    def __init__(self, n: int = 30, **changes: Any) -> None:
        self.n, self.changes, self.reads, self.threads = n, changes, [], set()

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict[str, Any]:
        self.reads.append(i)
        self.threads.add(threading.get_ident())
        return {
            "photo": torch.full((3, 4, 5), i, dtype=torch.uint8),
            "sound": np.array([i / 100, -i / 100]),
            "level": i / 100,
            "word": ("low", "high")[i % 2],
            "label": i % 2,
            **self.changes,
        }


WORDS = (
    Modality("photo", (3, 4, 5), "image"),
    Modality("sound", (2,), "vector", centre=(0.1, 0.2), spread=(2.0, 4.0)),
    Modality("level", (1,), "vector"),
    Modality("word", (2,), "text", ("low", "high")),
)


@pytest.mark.parametrize("workers", [0, 3])
def test_batches_are_the_items(workers: int) -> None:
    items = Items()
    data = from_dataset(items, WORDS, classes=("low", "high"), workers=workers)
    rows = torch.tensor([7, 2, 2, 29])
    items.reads.clear()
    x = data.batch(rows)
    assert sorted(items.reads) == [2, 2, 7, 29]  # once for all four modalities
    assert torch.equal(x["photo"][:, 0, 0, 0], rows * 2 / 255 - 1)
    assert torch.allclose(x["sound"], torch.stack([(rows / 100 - 0.1) / 2, (-rows / 100 - 0.2) / 4], 1), atol=1e-7)
    assert torch.allclose(x["level"][:, 0], rows / 100)
    assert x["word"].tolist() == [[-1, 1], [1, -1], [1, -1], [-1, 1]]
    assert data.labels[rows].tolist() == [1, 0, 0, 1] and len(data) == 30
    assert (len(items.threads) > 1) == bool(workers)


def test_modalities_follow_from_the_first_item() -> None:
    class NoWord(Items):
        def __getitem__(self, i: int) -> dict[str, Any]:
            return {key: value for key, value in super().__getitem__(i).items() if key not in ("word", "label")}

    data = from_dataset(NoWord())
    assert [(m.name, m.kind, m.shape) for m in data.modalities] == [
        ("photo", "image", (3, 4, 5)),
        ("sound", "vector", (2,)),
        ("level", "vector", (1,)),
    ]
    with pytest.raises(ValueError, match=r"'word' is a string: give modalities=, with Modality\('word'"):
        from_dataset(Items())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: from_dataset(Items(0)), "dataset has no items"),
        (lambda: from_dataset(iter([])), "must have __getitem__ and __len__"),
        (lambda: from_dataset([torch.zeros(3)]), "must have dicts as items, got Tensor"),
        (
            lambda: from_dataset([{"a": np.zeros((2, 2))}]),
            r"'a' of the first item must be an image \(C, H, W\) or numbers",
        ),
        (lambda: from_dataset(Items(), WORDS, workers=-1), "workers must be at least 0"),
        (lambda: from_dataset(Items(label=5), WORDS, classes=("low", "high")), r"labels must lie in \[0, 2\)"),
        (
            lambda: from_dataset([{"a": [1.0]}, {"b": [1.0]}]).batch(torch.tensor([1])),
            r"item 1 .* with 'a', got \['b'\]",
        ),
        (lambda: from_dataset([{"a": [1.0]}, {"a": [1.0, 2.0]}]).batch(torch.tensor([0, 1])), "items 0 to 1 .*'a': "),
        (lambda: from_dataset([{"a": [1.0]}, {"a": [np.nan]}]).batch(torch.tensor([1])), "'a' holds a value that"),
        (lambda: from_dataset(Items(word="mid"), WORDS).batch(torch.tensor([3])), r"'word': .*unknown words \['mid'\]"),
    ],
)
def test_what_is_wrong_is_named(make: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_a_trainer_takes_it() -> None:
    from mmebm.training import Trainer
    from mmebm.training.config import ChainConfig, Config, ModelConfig, Stage

    config = Config(
        preset="test",
        model=ModelConfig(latent=2, generator_width=8, inference_width=8, energy_width=8),
        batch=10,
        data_chain=ChainConfig(steps=2, step=0.1),
        latent_chain=ChainConfig(steps=2, step=0.1),
        stages=(Stage("warmup", 3), Stage("joint", 2)),
    )
    rows = [list(Trainer(config, from_dataset(Items(), WORDS, workers=workers)).run())[-1] for workers in (0, 2)]
    assert rows[0]["iteration"] == 5 and rows[0]["loss_generator"] == rows[1]["loss_generator"]


def shapes(split: str, sides: int = 4) -> object:
    """A builder as a user writes one: it takes what it needs, and returns a torch data set."""
    return [{"x": np.full((1, sides, sides), i / 10, np.float32)} for i in range(3 if split == "test" else 10)]


def test_a_builder_by_its_import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    module = types.ModuleType("mine")
    module.shapes = shapes  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "mine", module)
    train, test = (load("mine:shapes", split, sides=3) for split in ("train", "test"))
    assert (len(train), len(test)) == (10, 3) and train.split == "train" and train.name == "mine:shapes"
    assert train.modalities[0].shape == (1, 3, 3)
    with pytest.raises(TypeError, match=r"'mine:shapes' has no option 'side', only sides"):
        load("mine:shapes", "train", side=3)
    with pytest.raises(ValueError, match=r"'mine:shape': mine has no 'shape'"):
        load("mine:shape", "train")
    with pytest.raises(ValueError, match=r"unknown data set 'shapes'.*and import paths"):
        load("shapes", "train")
