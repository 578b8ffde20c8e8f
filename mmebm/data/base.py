"""What a multimodal data set is: modalities, pools of instances, and an index that pairs them.

Model space is what the networks and the samplers see: float32, images and codes in [-1, 1]. Natural space is what a
person or a metric reads: images in [0, 1], words and captions as strings, vectors in the units of their source.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

__all__ = ["SPLITS", "Kind", "Modality", "MultimodalDataset", "Pool", "Split", "TextCodec", "files_of"]

Kind = Literal["image", "text", "vector", "caption"]
# Settings are chosen on "validation"; "test" is for what is reported at the end (docs/study.md).
Split = Literal["train", "validation", "test"]

# In so many tuples one image may be and still be something that was photographed, not the emblem of a class.
OFTEN = 20
SPLITS: tuple[str, ...] = get_args(Split)


class TextCodec(Protocol):
    """The way between captions and the continuous codes that Langevin moves."""

    def encode(self, texts: Sequence[str], /) -> Tensor:
        """``n`` captions to floating codes ``(n, D)`` in model space."""
        ...

    def decode(self, codes: Tensor, /) -> list[str]:
        """Codes ``(n, D)``, which may lie beside those of any caption, to ``n`` captions."""
        ...


class Pool(Protocol):
    """The instances of one modality where they are not one tensor in memory: mapped files, images decoded when asked.

    :mod:`mmebm.data.pools` has two. A pool stays where it is when its set moves to a GPU; its batches follow.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """``(instances, *shape)`` with the modality's shape."""
        ...

    def __len__(self) -> int:
        """The number of instances."""
        ...

    def gather(self, rows: Tensor, /) -> Tensor:
        """Instances ``rows``, int64 ``(b,)`` on the CPU and in range: float32 ``(b, *shape)`` in model space, on the
        CPU. Called from several threads at a time, and equal for equal rows."""
        ...


@dataclass(frozen=True)
class Modality:
    """One modality: its name, its shape in model space, and the way between model space and natural space.

    Args:
        name: the key of the modality in batches and pools.
        shape: model space, without the batch dimension: ``(C, H, W)`` for images, ``(K,)`` for text, ``(D,)`` for
            vectors and captions.
        kind: ``"image"``; ``"text"``, one of a few words; ``"vector"``; or ``"caption"``, free text as a code.
        words: for text, the ``K`` distinct words; entry ``k`` of a code stands for ``words[k]``. Empty otherwise.
        codec: for captions, the way between strings and codes. It may be missing where only codes are needed. It takes
            no part in comparisons: the two splits of a set have equal modalities, each with its own copy of the codec.
        centre, spread: for vectors, ``D`` numbers each, or none: a value ``v`` of the source is ``(v - centre) /
            spread`` in model space, and :meth:`natural` undoes it.

    Raises:
        ValueError: if these do not fit together.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    words: tuple[str, ...] = ()
    codec: TextCodec | None = field(default=None, compare=False, repr=False)
    centre: tuple[float, ...] = field(default=(), repr=False)
    spread: tuple[float, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if self.kind not in ("image", "text", "vector", "caption"):
            raise ValueError(
                f"modality {self.name!r}: kind must be 'image', 'text', 'vector' or 'caption', got {self.kind!r}"
            )
        axes = 3 if self.kind == "image" else 1
        if len(self.shape) != axes or min(self.shape) < 1:
            raise ValueError(
                f"modality {self.name!r}: kind {self.kind!r} needs {axes} positive sizes, got {self.shape}"
            )
        if self.kind == "text" and (len(self.words) != self.shape[0] or len(set(self.words)) != len(self.words)):
            raise ValueError(
                f"modality {self.name!r}: shape {self.shape} needs {self.shape[0]} distinct words, got {self.words}"
            )
        if self.kind != "text" and self.words:
            raise ValueError(f"modality {self.name!r}: words are for kind 'text', not {self.kind!r}")
        if self.kind != "caption" and self.codec is not None:
            raise ValueError(f"modality {self.name!r}: a codec is for kind 'caption', not {self.kind!r}")
        if self.centre or self.spread:
            if self.kind != "vector":
                raise ValueError(f"modality {self.name!r}: centre and spread are for kind 'vector', not {self.kind!r}")
            if not len(self.centre) == len(self.spread) == self.shape[0]:
                raise ValueError(
                    f"modality {self.name!r}: shape {self.shape} needs {self.shape[0]} numbers each in "
                    f"centre and spread, got {len(self.centre)} and {len(self.spread)}"
                )
            if not all(map(math.isfinite, self.centre)) or not all(math.isfinite(s) and s > 0 for s in self.spread):
                raise ValueError(f"modality {self.name!r}: centre must be finite, and spread positive")

    def natural(self, x: Tensor) -> np.ndarray:
        """From model space to natural space.

        Args:
            x: ``(n, *shape)``, any floating dtype and device; values may lie outside [-1, 1], as samples do.

        Returns:
            Images: float32 ``(n, C, H, W)`` clipped to [0, 1]. Text: strings ``(n,)``, the words of the largest entry
            of each code. Vectors: float32 ``(n, D)``, in the units of their source. Captions: strings ``(n,)``.

        Raises:
            ValueError: if the shape of ``x`` is another, or for captions without a codec.
        """
        if x.shape[1:] != self.shape or x.dim() != len(self.shape) + 1:
            raise ValueError(
                f"modality {self.name!r}: x must have shape (n, {', '.join(map(str, self.shape))}), "
                f"got {tuple(x.shape)}"
            )
        values = x.detach().to(device="cpu", dtype=torch.float32)
        if self.kind == "image":
            return ((values + 1) / 2).clamp_(0, 1).numpy()
        if self.kind == "text":
            return np.array(self.words)[values.argmax(dim=1).numpy()]
        if self.kind == "caption":
            return np.array(self._needed_codec().decode(values), dtype=np.str_)
        if self.centre:  # in float64, so that there is one rounding
            return (values.double().numpy() * np.array(self.spread) + np.array(self.centre)).astype(np.float32)
        return values.clone().numpy()

    def model(self, x: np.ndarray | Tensor | Sequence[str]) -> Tensor:
        """From natural space to model space, the inverse of :meth:`natural`.

        Args:
            x: images ``(n, C, H, W)``, floating in [0, 1] or uint8 in 0..255; text: ``n`` strings out of ``words``;
                vectors ``(n, D)``; captions: ``n`` strings.

        Returns:
            float32 ``(n, *shape)``: images in [-1, 1]; text as codes, +1 at the word and -1 elsewhere; vectors by
            ``centre`` and ``spread``, unchanged without them; captions as their codec's codes.

        Raises:
            ValueError: for another shape, an image value outside its range (or not a number), an unknown word, or
                captions without a codec.
        """
        if self.kind == "text":
            return self._codes(self._strings(x))
        if self.kind == "caption":
            return self._encoded(self._strings(x))
        values = x.detach().cpu() if isinstance(x, Tensor) else torch.from_numpy(np.ascontiguousarray(x))
        if values.shape[1:] != self.shape or values.dim() != len(self.shape) + 1:
            raise ValueError(
                f"modality {self.name!r}: x must have shape (n, {', '.join(map(str, self.shape))}), "
                f"got {tuple(values.shape)}"
            )
        if self.kind == "vector" and self.centre:
            return (
                (values.double() - torch.tensor(self.centre, dtype=torch.float64))
                / torch.tensor(self.spread, dtype=torch.float64)
            ).to(torch.float32)
        if self.kind == "vector":
            return values.to(torch.float32, copy=True)
        if values.dtype == torch.uint8:
            # 2 v - 255 is exact, so that there is one rounding and 0 and 255 become -1 and 1.
            return values.to(torch.float32).mul_(2).sub_(255).div_(255)
        if not values.is_floating_point():
            raise ValueError(f"modality {self.name!r}: images must be floating or uint8, got {values.dtype}")
        # Written so that NaN fails too.
        if values.numel() and not (values.amin() >= 0 and values.amax() <= 1):
            raise ValueError(
                f"modality {self.name!r}: floating images must lie in [0, 1], "
                f"got [{values.amin():g}, {values.amax():g}]"
            )
        return values.to(torch.float32, copy=True).mul_(2).sub_(1)

    def _strings(self, x: np.ndarray | Tensor | Sequence[str]) -> np.ndarray:
        strings = np.asarray(x)
        if strings.ndim != 1 or (len(strings) and strings.dtype.kind not in "UOT"):
            what = "words" if self.kind == "text" else "captions"
            raise ValueError(
                f"modality {self.name!r}: x must be n {what}, got an array of shape {strings.shape} and "
                f"dtype {strings.dtype}"
            )
        return strings

    def _needed_codec(self) -> TextCodec:
        if self.codec is None:
            raise ValueError(
                f"modality {self.name!r}: captions need a codec between strings and codes, and this "
                "modality has none: build it with codec=, or load its set, which brings one"
            )
        return self.codec

    def _encoded(self, x: np.ndarray) -> Tensor:
        codes = self._needed_codec().encode([str(text) for text in x]).detach()
        if codes.shape != (len(x), *self.shape):
            raise ValueError(
                f"modality {self.name!r}: its codec must give codes {(len(x), *self.shape)}, got {tuple(codes.shape)}"
            )
        return codes.to(device="cpu", dtype=torch.float32, copy=True)

    def _codes(self, x: np.ndarray) -> Tensor:
        position = {word: k for k, word in enumerate(self.words)}
        unknown = sorted({str(word) for word in x} - position.keys())
        if unknown:
            raise ValueError(f"modality {self.name!r}: unknown words {unknown[:5]}, known are {list(self.words)}")
        codes = torch.full((len(x), *self.shape), -1.0)
        codes[torch.arange(len(x)), torch.tensor([position[str(word)] for word in x], dtype=torch.int64)] = 1.0
        return codes


@dataclass(frozen=True, eq=False)
class MultimodalDataset:
    """Tuples of real instances that share a class, or that belong together one by one.

    The pools hold each modality's instances once; ``index`` pairs them, so that twenty thousand tuples of four thousand
    digits cost four thousand digits of memory. The whole set may live on a GPU (:meth:`to`), where a batch is one
    gather for each modality. Instances too many for memory are a :class:`Pool` in place of a tensor.

    Args:
        name: the name it was loaded by.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        seed: the seed of the pairing (and of the crops, where there are any).
        modalities: ``M`` modalities with distinct names.
        classes: class names; label ``c`` stands for ``classes[c]``, and -1 for unlabelled. Empty for sets without
            classes, whose labels are all -1.
        pools: modality name -> float32 ``(instances, *shape)``, images and codes in [-1, 1], or a :class:`Pool`.
        pool_labels: modality name -> int64 ``(instances,)``.
        index: int64 ``(n, M)``, rows into the pools, columns in the order of ``modalities``.
        labels: int64 ``(n,)``; every instance of tuple ``i`` has class ``labels[i]``, where both are labelled.
        present: bool ``(n, M)``, False where a tuple lacks a modality, at least one True in each row; None if all are
            there. The index of what is absent must be in range and is not looked at otherwise.
        info: where the data came from: sources, versions, seeds, sizes. Plain values only, ready for JSON.
        items: modality name -> int64 (instances,), which source item each instance shows: a digit on three crops is one
            item three times, and equal numbers are one item in whichever modality (and in whichever split, of the sets
            in :data:`mmebm.data.WITH_VALIDATION`). -1 where an instance is of no item, as a word that all tuples of a
            class share. None: every instance is an item, but for words.
        names: modality name -> the name of each of its instances, by which a run finds the tuples again that it keeps
            back where the set has changed; for modalities whose instances are files. None: by what they hold.

    Raises:
        ValueError: if these do not fit together, for instance where a tuple mixes classes.
    """

    name: str
    split: Split
    seed: int
    modalities: tuple[Modality, ...]
    classes: tuple[str, ...]
    pools: Mapping[str, Tensor | Pool]
    pool_labels: dict[str, Tensor]
    index: Tensor
    labels: Tensor
    info: dict[str, Any] = field(default_factory=dict)
    present: Tensor | None = None
    items: Mapping[str, Tensor] | None = None
    names: Mapping[str, Sequence[str]] | None = None

    def __post_init__(self) -> None:
        names = [modality.name for modality in self.modalities]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"modalities must have distinct names, at least one, got {names}")
        for what, mapping in (("pools", self.pools), ("pool_labels", self.pool_labels)):
            if list(mapping) != names:
                raise ValueError(f"{what} must have the modalities' names {names} in this order, got {list(mapping)}")
        n = len(self.labels)
        if self.index.shape != (n, len(names)) or self.labels.shape != (n,):
            raise ValueError(
                f"index must be (n, {len(names)}) and labels (n,), got {tuple(self.index.shape)} and "
                f"{tuple(self.labels.shape)}"
            )
        for what, tensor in (("index", self.index), ("labels", self.labels), *self.pool_labels.items()):
            if tensor.dtype != torch.int64:
                raise ValueError(f"{what} must be int64, got {tensor.dtype}")
        for what, labels in (("labels", self.labels), *self.pool_labels.items()):
            if len(labels) and not (labels.min() >= -1 and labels.max() < len(self.classes)):
                of = "labels" if what == "labels" else f"labels of {what!r}"
                raise ValueError(
                    f"{of} must lie in [0, {len(self.classes)}), or be -1 for unlabelled, "
                    f"got [{int(labels.min())}, {int(labels.max())}]"
                )
        for name, of_instance in (self.items or {}).items():
            count = len(self.pools[name]) if name in names else 0
            if of_instance.dtype != torch.int64 or of_instance.shape != (count,):
                raise ValueError(
                    f"items of {name!r} must be int64 ({count},), one number for each instance, got "
                    f"{of_instance.dtype} {tuple(of_instance.shape)}"
                )
        for name, own in (self.names or {}).items():
            if name not in names or len(own) != len(self.pools[name]):
                raise ValueError(f"names has {len(own)} of {name!r}: one for each instance of the modalities {names}")
        if self.items is not None and list(self.items) != names:
            raise ValueError(f"items must have the modalities' names {names}, or be None, got {list(self.items)}")
        if self.present is not None:
            if self.present.dtype != torch.bool or self.present.shape != self.index.shape:
                raise ValueError(
                    f"present must be bool {tuple(self.index.shape)}, got {self.present.dtype} "
                    f"{tuple(self.present.shape)}"
                )
            empty = (~self.present.any(1)).nonzero()
            if len(empty):
                raise ValueError(
                    f"{len(empty)} tuples have no modality at all, the first is tuple {int(empty[0])}: leave them out"
                )
        for column, modality in enumerate(self.modalities):
            pool, of_instance = self.pools[modality.name], self.pool_labels[modality.name]
            dtype = pool.dtype if isinstance(pool, Tensor) else torch.float32  # which a Pool promises
            if dtype != torch.float32 or tuple(pool.shape) != (len(of_instance), *modality.shape):
                raise ValueError(
                    f"pool {modality.name!r} must be float32 {(len(of_instance), *modality.shape)}, "
                    f"got {dtype} {tuple(pool.shape)}"
                )
            rows = self.index[:, column]
            if n and not (rows.min() >= 0 and rows.max() < len(pool)):
                raise ValueError(f"index of {modality.name!r} must lie in [0, {len(pool)})")
            theirs = of_instance[rows]
            other = (theirs != self.labels) & (theirs >= 0) & (self.labels >= 0)
            wrong = (other if self.present is None else other & self.present[:, column]).nonzero()
            if len(wrong):
                raise ValueError(
                    f"{len(wrong)} tuples have an instance of another class in {modality.name!r}, "
                    f"the first is tuple {int(wrong[0])}"
                )

    def __len__(self) -> int:
        """The number of tuples ``n``."""
        return len(self.labels)

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """Tuples ``rows``, int64 ``(b,)`` on any device: modality name -> float32 ``(b, *shape)`` on the set's device.

        The labels of the batch are ``labels[rows]``, and :meth:`presence` says which modalities its tuples have: where
        one is absent its values are zeros. With ``rows`` on the CPU and all pools tensors nothing here waits for a GPU.

        Raises:
            TypeError: if ``rows`` is not an integer tensor.
            ValueError: if it has not one dimension, or if a file of a pool cannot be read as what it should be.
            IndexError: if a row lies outside ``[0, n)``.
        """
        rows = self._checked(rows, len(self))
        paired = self.index[rows]
        batch: dict[str, Tensor] = {}
        for column, modality in enumerate(self.modalities):
            x = self._gather(modality.name, paired[:, column])
            if self.present is not None:
                # Not a product: what a file holds in place of an absent instance may be NaN.
                absent = ~self.present[rows, column]
                x = x.masked_fill(absent.reshape(-1, *[1] * len(modality.shape)), 0)
            batch[modality.name] = x
        return batch

    def instances(self, name: str, rows: Tensor) -> Tensor:
        """Rows of the pool of modality ``name``, int64 ``(b,)`` on any device: float32 ``(b, *shape)`` on the set's.

        Raises:
            ValueError: for an unknown name, or as :meth:`batch`.
            TypeError, IndexError: as :meth:`batch`.
        """
        if name not in self.pools:
            raise ValueError(f"name must be one of the modalities {list(self.pools)}, got {name!r}")
        return self._gather(name, self._checked(rows, len(self.pools[name])))

    def _gather(self, name: str, rows: Tensor) -> Tensor:
        pool = self.pools[name]
        return pool.index_select(0, rows) if isinstance(pool, Tensor) else pool.gather(rows.cpu()).to(rows.device)

    def presence(self, rows: Tensor) -> dict[str, Tensor] | None:
        """Which modalities tuples ``rows`` have: modality name -> bool ``(b,)`` on the set's device; None if all.

        Raises:
            TypeError, ValueError, IndexError: as :meth:`batch`.
        """
        rows = self._checked(rows, len(self))
        if self.present is None:
            return None
        return {modality.name: self.present[rows, column] for column, modality in enumerate(self.modalities)}

    def _checked(self, rows: Tensor, n: int) -> Tensor:
        """``rows``, which must lie in ``[0, n)``, on the set's device."""
        if not isinstance(rows, Tensor) or rows.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"rows must be an int64 tensor, got {getattr(rows, 'dtype', type(rows).__name__)}")
        if rows.dim() != 1:
            raise ValueError(f"rows must have one dimension, got shape {tuple(rows.shape)}")
        # Checked before the gather: on a GPU an index out of range kills the process's context.
        if rows.numel() and not (rows.min() >= 0 and rows.max() < n):
            raise IndexError(f"rows must lie in [0, {n}), got [{int(rows.min())}, {int(rows.max())}]")
        return rows.to(self.index.device)

    def item_numbers(self) -> Tensor:
        """Which items each tuple shows, int64 ``(n, M)`` on the CPU; -1 for none. Without ``items`` the instances of
        every modality but words are numbered apart."""
        index, start, columns = self.index.cpu(), 0, []
        for column, modality in enumerate(self.modalities):
            if self.items is None:
                word = modality.kind == "text"
                columns.append(torch.full((len(self),), -1) if word else start + index[:, column])
                start += len(self.pools[modality.name])
            else:
                columns.append(self.items[modality.name].cpu()[index[:, column]])
        found = torch.stack(columns, dim=1)
        return found if self.present is None else found.masked_fill(~self.present.cpu(), -1)

    def groups(self) -> Tensor:
        """Which tuples hang together, int64 ``(n,)`` on the CPU: two tuples have one number if they share an item, or
        are joined by others that do. A part of the tuples that shares no item with the rest is made of whole groups.

        Images that are the same number by number are one item too, as a photograph is that stands in several rows. One
        in more than 20 tuples and a hundredth of them is none (an emblem of its class, a blank), and files are not
        compared."""
        numbers = np.concatenate([self.item_numbers().numpy(), *self._equal_images()], axis=1)
        tuples, columns = np.nonzero(numbers >= 0)
        different, of = np.unique(numbers[tuples, columns], return_inverse=True)
        group = np.arange(len(self))
        while True:  # the least number of a group spreads by its items until nothing moves
            least = np.full(len(different), len(self))
            np.minimum.at(least, of, group[tuples])
            new = group.copy()
            np.minimum.at(new, tuples, least[of])
            new = new[new]
            if np.array_equal(new, group):
                return torch.from_numpy(group)
            group = new

    def _equal_images(self) -> list[np.ndarray]:
        """``(n, 1)`` for each image modality whose instances can be compared: numbers of their own for the different
        images, -1 where there is none."""
        columns, start = [], 2**50
        for column, modality in enumerate(self.modalities):
            pool = self.pools[modality.name]
            compare = getattr(pool, "same", None)
            if modality.kind != "image":
                continue
            if isinstance(pool, Tensor):
                same = first_equal(row.tobytes() for row in pool.cpu().numpy())
            elif compare is not None:
                same = compare()
            else:
                continue
            numbers = same[self.index[:, column].cpu().numpy()]
            here = np.ones(len(self), dtype=bool) if self.present is None else self.present[:, column].cpu().numpy()
            common = np.bincount(numbers[here], minlength=len(pool))[numbers] > max(OFTEN, len(self) // 100)
            columns.append(np.where(here & ~common, start + numbers, -1)[:, None])
            start += len(pool)
        return columns

    def subset(self, rows: Tensor) -> MultimodalDataset:
        """The tuples ``rows``, int64 ``(b,)``, in this order, as a set of their own; the pools are shared.

        Raises:
            TypeError, ValueError, IndexError: as :meth:`batch`.
        """
        rows = self._checked(rows, len(self))
        return replace(
            self,
            index=self.index[rows],
            labels=self.labels[rows],
            present=None if self.present is None else self.present[rows],
        )

    def labelled_only(self) -> MultimodalDataset:
        """The same set, its pools' labels only of the instances that its tuples show, and -1 for all others."""
        labels = {}
        for column, modality in enumerate(self.modalities):
            of = self.pool_labels[modality.name]
            rows = self.index[:, column]
            seen = torch.zeros(len(of), dtype=torch.bool, device=of.device)
            seen[rows if self.present is None else rows[self.present[:, column]]] = True
            labels[modality.name] = torch.where(seen, of, -1)
        return replace(self, pool_labels=labels)

    def to(self, device: torch.device | str) -> MultimodalDataset:
        """The same set with its tensors on ``device``; those already there are shared, not copied.

        A :class:`Pool` that is no tensor stays where it is, and only its batches come to ``device``.
        """
        return replace(
            self,
            pools={name: pool.to(device) if isinstance(pool, Tensor) else pool for name, pool in self.pools.items()},
            pool_labels={name: labels.to(device) for name, labels in self.pool_labels.items()},
            index=self.index.to(device),
            labels=self.labels.to(device),
            present=None if self.present is None else self.present.to(device),
        )

    def __repr__(self) -> str:
        shapes = ", ".join(f"{m.name} {m.shape}" for m in self.modalities)
        sizes = math.fsum(pool.numel() * 4 / 2**20 for pool in self.pools.values() if isinstance(pool, Tensor))
        read = [name for name, pool in self.pools.items() if not isinstance(pool, Tensor)]
        streamed = f" and {', '.join(read)} read when asked" if read else ""
        held = f"seed {self.seed}, {sizes:.0f} MiB{streamed}"
        return f"<{self.name} {self.split}: {len(self)} tuples of {shapes}; {held}>"


def check_count(name: str, value: object, *, least: int = 1) -> int:
    """``value`` if it is an integer of at least ``least``; TypeError or ValueError otherwise."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer of at least {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def files_of(split: Split) -> Literal["train", "test"]:
    """The split whose files hold ``split``: validation items are part of the published train files."""
    return "test" if split == "test" else "train"


def first_equal(rows: Iterable[bytes]) -> np.ndarray:
    """Of each the number of the first that is equal, int64."""
    first: dict[bytes, int] = {}
    return np.array(
        [first.setdefault(hashlib.blake2b(row, digest_size=16).digest(), at) for at, row in enumerate(rows)],
        dtype=np.int64,
    )


def refuse_path(name: str, path: str | os.PathLike[str] | None) -> None:
    """ValueError where a data set built from installed packages is given a folder, which it would ignore."""
    if path is not None:
        raise ValueError(f"{name!r} is built from installed packages and reads no folder, got path={str(path)!r}")
