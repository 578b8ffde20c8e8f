"""What a multimodal data set is: modalities, pools of instances, and an index that pairs them.

Model space is what the networks and the samplers see: float32, images and codes in [-1, 1]. Natural space is what a
person or a metric reads: images in [0, 1], words as strings, vectors as they are.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

__all__ = ["Kind", "Modality", "MultimodalDataset", "Split"]

Kind = Literal["image", "text", "vector"]
Split = Literal["train", "test"]


@dataclass(frozen=True)
class Modality:
    """One modality: its name, its shape in model space, and the way between model space and natural space.

    Args:
        name: the key of the modality in batches and pools.
        shape: model space, without the batch dimension: ``(C, H, W)`` for images, ``(K,)`` for text, ``(D,)`` for
            vectors.
        kind: ``"image"``, ``"text"`` or ``"vector"``.
        words: for text, the ``K`` distinct words; entry ``k`` of a code stands for ``words[k]``. Empty otherwise.

    Raises:
        ValueError: if ``shape``, ``kind`` and ``words`` do not fit together.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("image", "text", "vector"):
            raise ValueError(f"modality {self.name!r}: kind must be 'image', 'text' or 'vector', got {self.kind!r}")
        axes = 3 if self.kind == "image" else 1
        if len(self.shape) != axes or min(self.shape) < 1:
            raise ValueError(f"modality {self.name!r}: kind {self.kind!r} needs {axes} positive sizes, "
                             f"got {self.shape}")  # fmt: skip
        if self.kind == "text" and (len(self.words) != self.shape[0] or len(set(self.words)) != len(self.words)):
            raise ValueError(f"modality {self.name!r}: shape {self.shape} needs {self.shape[0]} distinct words, "
                             f"got {self.words}")  # fmt: skip
        if self.kind != "text" and self.words:
            raise ValueError(f"modality {self.name!r}: words are for kind 'text', not {self.kind!r}")

    def natural(self, x: Tensor) -> np.ndarray:
        """From model space to natural space.

        Args:
            x: ``(n, *shape)``, any floating dtype and device; values may lie outside [-1, 1], as samples do.

        Returns:
            Images: float32 ``(n, C, H, W)`` clipped to [0, 1]. Text: strings ``(n,)``, the words of the largest entry
            of each code. Vectors: float32 ``(n, D)``, unchanged.

        Raises:
            ValueError: if the shape of ``x`` is another.
        """
        if x.shape[1:] != self.shape or x.dim() != len(self.shape) + 1:
            raise ValueError(f"modality {self.name!r}: x must have shape (n, {', '.join(map(str, self.shape))}), "
                             f"got {tuple(x.shape)}")  # fmt: skip
        values = x.detach().to(device="cpu", dtype=torch.float32)
        if self.kind == "image":
            return ((values + 1) / 2).clamp_(0, 1).numpy()
        if self.kind == "text":
            return np.array(self.words)[values.argmax(dim=1).numpy()]
        return values.clone().numpy()

    def model(self, x: np.ndarray | Tensor | Sequence[str]) -> Tensor:
        """From natural space to model space, the inverse of :meth:`natural`.

        Args:
            x: images ``(n, C, H, W)``, floating in [0, 1] or uint8 in 0..255; text: ``n`` strings out of ``words``;
                vectors ``(n, D)``.

        Returns:
            float32 ``(n, *shape)``: images in [-1, 1]; text as codes, +1 at the word and -1 elsewhere; vectors
            unchanged.

        Raises:
            ValueError: for another shape, an image value outside its range (or not a number), or an unknown word.
        """
        if self.kind == "text":
            return self._codes(np.asarray(x))
        values = x.detach().cpu() if isinstance(x, Tensor) else torch.from_numpy(np.ascontiguousarray(x))
        if values.shape[1:] != self.shape or values.dim() != len(self.shape) + 1:
            raise ValueError(f"modality {self.name!r}: x must have shape (n, {', '.join(map(str, self.shape))}), "
                             f"got {tuple(values.shape)}")  # fmt: skip
        if self.kind == "vector":
            return values.to(torch.float32, copy=True)
        if values.dtype == torch.uint8:
            # 2 v - 255 is exact, so that there is one rounding and 0 and 255 become -1 and 1.
            return values.to(torch.float32).mul_(2).sub_(255).div_(255)
        if not values.is_floating_point():
            raise ValueError(f"modality {self.name!r}: images must be floating or uint8, got {values.dtype}")
        # Written so that NaN fails too.
        if values.numel() and not (values.amin() >= 0 and values.amax() <= 1):
            raise ValueError(f"modality {self.name!r}: floating images must lie in [0, 1], "
                             f"got [{values.amin():g}, {values.amax():g}]")  # fmt: skip
        return values.to(torch.float32, copy=True).mul_(2).sub_(1)

    def _codes(self, x: np.ndarray) -> Tensor:
        if x.ndim != 1:
            raise ValueError(f"modality {self.name!r}: x must be n words, got an array of shape {x.shape}")
        position = {word: k for k, word in enumerate(self.words)}
        unknown = sorted({str(word) for word in x} - position.keys())
        if unknown:
            raise ValueError(f"modality {self.name!r}: unknown words {unknown[:5]}, known are {list(self.words)}")
        codes = torch.full((len(x), *self.shape), -1.0)
        codes[torch.arange(len(x)), torch.tensor([position[str(word)] for word in x], dtype=torch.int64)] = 1.0
        return codes


@dataclass(frozen=True, eq=False)
class MultimodalDataset:
    """Tuples of real instances that share a class.

    The pools hold each modality's instances once; ``index`` pairs them, so that twenty thousand tuples of four thousand
    digits cost four thousand digits of memory. The whole set may live on a GPU (:meth:`to`), where a batch is one
    gather for each modality.

    Args:
        name: the name it was loaded by.
        split: ``"train"`` or ``"test"``.
        seed: the seed of the pairing (and of the crops, where there are any).
        modalities: ``M`` modalities with distinct names.
        classes: class names; label ``c`` stands for ``classes[c]``.
        pools: modality name -> float32 ``(instances, *shape)``, images and codes in [-1, 1].
        pool_labels: modality name -> int64 ``(instances,)``.
        index: int64 ``(n, M)``, rows into the pools, columns in the order of ``modalities``.
        labels: int64 ``(n,)``; every instance of tuple ``i`` has class ``labels[i]``.
        info: where the data came from: sources, versions, seeds, sizes. Plain values only, ready for JSON.

    Raises:
        ValueError: if these do not fit together, for instance where a tuple mixes classes.
    """

    name: str
    split: Split
    seed: int
    modalities: tuple[Modality, ...]
    classes: tuple[str, ...]
    pools: dict[str, Tensor]
    pool_labels: dict[str, Tensor]
    index: Tensor
    labels: Tensor
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [modality.name for modality in self.modalities]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"modalities must have distinct names, at least one, got {names}")
        for what, mapping in (("pools", self.pools), ("pool_labels", self.pool_labels)):
            if list(mapping) != names:
                raise ValueError(f"{what} must have the modalities' names {names} in this order, got {list(mapping)}")
        n = len(self.labels)
        if self.index.shape != (n, len(names)) or self.labels.shape != (n,):
            raise ValueError(f"index must be (n, {len(names)}) and labels (n,), got {tuple(self.index.shape)} and "
                             f"{tuple(self.labels.shape)}")  # fmt: skip
        for what, tensor in (("index", self.index), ("labels", self.labels), *self.pool_labels.items()):
            if tensor.dtype != torch.int64:
                raise ValueError(f"{what} must be int64, got {tensor.dtype}")
        if n and not (self.labels.min() >= 0 and self.labels.max() < len(self.classes)):
            raise ValueError(f"labels must lie in [0, {len(self.classes)})")
        for column, modality in enumerate(self.modalities):
            pool, of_instance = self.pools[modality.name], self.pool_labels[modality.name]
            if pool.dtype != torch.float32 or pool.shape != (len(of_instance), *modality.shape):
                raise ValueError(f"pool {modality.name!r} must be float32 {(len(of_instance), *modality.shape)}, "
                                 f"got {pool.dtype} {tuple(pool.shape)}")  # fmt: skip
            rows = self.index[:, column]
            if n and not (rows.min() >= 0 and rows.max() < len(pool)):
                raise ValueError(f"index of {modality.name!r} must lie in [0, {len(pool)})")
            wrong = (of_instance[rows] != self.labels).nonzero()
            if len(wrong):
                raise ValueError(f"{len(wrong)} tuples have an instance of another class in {modality.name!r}, "
                                 f"the first is tuple {int(wrong[0])}")  # fmt: skip

    def __len__(self) -> int:
        """The number of tuples ``n``."""
        return len(self.labels)

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """Tuples ``rows``, int64 ``(b,)`` on any device: modality name -> float32 ``(b, *shape)`` on the set's device.

        The labels of the batch are ``labels[rows]``. With ``rows`` on the CPU nothing here waits for a GPU.

        Raises:
            TypeError: if ``rows`` is not an integer tensor.
            ValueError: if it has not one dimension.
            IndexError: if a row lies outside ``[0, n)``.
        """
        if not isinstance(rows, Tensor) or rows.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"rows must be an int64 tensor, got {getattr(rows, 'dtype', type(rows).__name__)}")
        if rows.dim() != 1:
            raise ValueError(f"rows must have one dimension, got shape {tuple(rows.shape)}")
        # Checked before the gather: on a GPU an index out of range kills the process's context.
        if rows.numel() and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(f"rows must lie in [0, {len(self)}), got [{int(rows.min())}, {int(rows.max())}]")
        paired = self.index[rows.to(self.index.device)]
        return {
            modality.name: self.pools[modality.name].index_select(0, paired[:, column])
            for column, modality in enumerate(self.modalities)
        }

    def to(self, device: torch.device | str) -> MultimodalDataset:
        """The same set with pools, index and labels on ``device``; tensors already there are shared, not copied."""
        return replace(
            self,
            pools={name: pool.to(device) for name, pool in self.pools.items()},
            pool_labels={name: labels.to(device) for name, labels in self.pool_labels.items()},
            index=self.index.to(device),
            labels=self.labels.to(device),
        )

    def __repr__(self) -> str:
        shapes = ", ".join(f"{m.name} {m.shape}" for m in self.modalities)
        sizes = math.fsum(pool.numel() * 4 / 2**20 for pool in self.pools.values())
        return f"<{self.name} {self.split}: {len(self)} tuples of {shapes}; seed {self.seed}, {sizes:.0f} MiB>"


def check_count(name: str, value: object, *, least: int = 1) -> int:
    """``value`` if it is an integer of at least ``least``; TypeError or ValueError otherwise."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer of at least {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def refuse_path(name: str, path: str | os.PathLike[str] | None) -> None:
    """ValueError where a data set built from installed packages is given a folder, which it would ignore."""
    if path is not None:
        raise ValueError(f"{name!r} is built from installed packages and reads no folder, got path={str(path)!r}")
