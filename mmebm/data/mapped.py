"""A ``torch.utils.data.Dataset`` of dicts as a multimodal set."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmebm.data.base import Modality, MultimodalDataset, Split, check_count

__all__ = ["as_set", "from_dataset"]

LABEL = "label"


class _Items:
    """The items of the last few batches, so that the modalities of a batch are read together."""

    def __init__(self, dataset: Any, workers: int) -> None:
        self.dataset, self.workers = dataset, workers
        self._begin()

    def _begin(self) -> None:
        self.process, self.lock = os.getpid(), threading.Lock()
        self.read: dict[tuple[int, ...], list[Mapping[str, Any]]] = {}
        self.pool = ThreadPoolExecutor(self.workers) if self.workers else None

    def __getstate__(self) -> dict[str, Any]:
        return {"dataset": self.dataset, "workers": self.workers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def __call__(self, rows: Tensor) -> list[Mapping[str, Any]]:
        if self.process != os.getpid():
            # a worker process has neither the threads nor their lock, and needs none: it is one of several itself
            self.workers = 0
            self._begin()
        key = tuple(rows.tolist())
        with self.lock:
            if key in self.read:
                return self.read[key]
        items = list(self.pool.map(self.dataset.__getitem__, key) if self.pool else map(self.dataset.__getitem__, key))
        with self.lock:
            self.read[key] = items
            while len(self.read) > 4:
                self.read.pop(next(iter(self.read)))
        return items


@dataclass(frozen=True, eq=False)
class _ItemPool:
    """One modality of the items."""

    items: _Items
    modality: Modality
    count: int
    to_model: Callable[[Any], Tensor] = field(repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.count, *self.modality.shape)

    def __len__(self) -> int:
        return self.count

    def gather(self, rows: Tensor) -> Tensor:
        name = self.modality.name
        values = []
        for row, item in zip(rows.tolist(), self.items(rows), strict=True):
            if not isinstance(item, Mapping) or name not in item:
                has = sorted(item) if isinstance(item, Mapping) else type(item).__name__
                raise ValueError(f"item {row} of the data set must be a dict with {name!r}, got {has}")
            values.append(item[name])
        try:
            x = self.to_model(values)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"items {rows[0]} to {rows[-1]} of the data set, {name!r}: {error}") from error
        if not torch.isfinite(x).all():
            raise ValueError(
                f"items {rows[0]} to {rows[-1]} of the data set: {name!r} holds a value that is not finite"
            )
        return x


def from_dataset(
    dataset: Any,
    modalities: Sequence[Modality] | None = None,
    *,
    split: Split = "train",
    classes: Sequence[str] = (),
    workers: int = 0,
    name: str = "dataset",
) -> MultimodalDataset:
    """A multimodal set that reads the items of ``dataset`` when a batch asks for them.

    Args:
        dataset: ``len(dataset)`` items, ``dataset[i]`` a dict: modality name -> its value in natural space, as
            :meth:`Modality.model` takes one row of it (images uint8 or floating in [0, 1] ``(C, H, W)``, vectors
            ``(D,)``, strings). The same index gives the same item.
        modalities: what the items are; by default they follow from the first item, where arrays of three dimensions are
            images and numbers are vectors, as they are. Words and captions must be given, and vectors in other units.
        split: ``"train"`` or ``"test"``.
        classes: names of the classes; each item then has a ``"label"``, an integer that counts in them, read once now.
        workers: threads that read the items of a batch; 0 reads one after the other.
        name: of the set.

    Raises:
        TypeError: for something else than a map-style data set of dicts.
        ValueError: for one without items, strings without their modality, or labels out of range.

    Example:
        >>> train = from_dataset(my_dataset, workers=4)
        >>> Trainer(config, train)
    """
    if not callable(getattr(dataset, "__getitem__", None)) or not callable(getattr(dataset, "__len__", None)):
        raise TypeError(f"dataset must have __getitem__ and __len__, got {type(dataset).__name__}")
    workers, n = check_count("workers", workers, least=0), len(dataset)
    if not n:
        raise ValueError("dataset has no items")
    first = dataset[0]
    if not isinstance(first, Mapping):
        raise TypeError(f"dataset must have dicts as items, got {type(first).__name__}")
    if modalities is None:
        modalities = [_followed(key, value) for key, value in first.items() if key != LABEL]
    labels = torch.full((n,), -1)
    if classes:
        labels = torch.tensor([int(dataset[i][LABEL]) for i in range(n)])
    items = _Items(dataset, workers)
    return MultimodalDataset(
        name=name,
        split=split,
        seed=0,
        modalities=tuple(modalities),
        classes=tuple(classes),
        pools={m.name: _ItemPool(items, m, n, _rows_of(m)) for m in modalities},
        pool_labels={m.name: labels for m in modalities},
        index=torch.arange(n)[:, None].expand(n, len(modalities)).contiguous(),
        labels=labels,
        info={
            "options": {"workers": workers},
            "tuples": n,
            "sources": [{"what": name, "class": type(dataset).__name__}],
        },
    )


def as_set(data: Any, *, split: Split = "train", name: str = "dataset") -> MultimodalDataset:
    """``data``, or what :func:`from_dataset` makes of it where it is another kind of data set.

    Raises:
        TypeError, ValueError: as :func:`from_dataset`.
    """
    return data if isinstance(data, MultimodalDataset) else from_dataset(data, split=split, name=name)


def _rows_of(modality: Modality) -> Callable[[Any], Tensor]:
    def to_model(values: Sequence[Any]) -> Tensor:
        if modality.kind in ("text", "caption"):
            return modality.model([str(value) for value in values])
        rows = np.stack([np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value) for value in values])
        return modality.model(rows.reshape(len(rows), -1) if modality.kind == "vector" else rows)

    return to_model


def _followed(name: str, value: Any) -> Modality:
    if isinstance(value, str):
        raise ValueError(
            f"{name!r} is a string: give modalities=, with Modality({name!r}, (K,), 'text', words=...) "
            "for one of K words, or of kind 'caption' with a codec"
        )
    array = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
    if array.dtype.kind not in "fiub" or array.ndim not in (0, 1, 3):
        raise ValueError(
            f"{name!r} of the first item must be an image (C, H, W) or numbers (D,), got {array.dtype} {array.shape}"
        )
    if array.ndim == 3:
        return Modality(name, tuple(array.shape), "image")
    return Modality(name, (max(array.size, 1),), "vector")
