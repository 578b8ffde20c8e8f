"""Pools that are read when asked: arrays that stay bytes or on disk, and images that stay files.

A data set holds a modality's instances as one float32 tensor where that fits: nothing is faster, and it can live on a
GPU. Sixty thousand photographs do not fit. These two keep what the source has and convert the rows of a batch;
:func:`held` makes the tensor after all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmebm.data.base import Modality, Pool
from mmebm.data.images import read_all

__all__ = ["ArrayPool", "FilePool", "average_areas", "dense", "held", "load_tensor"]


@dataclass(frozen=True, eq=False)
class ArrayPool:
    """Instances in an array, often a memory-mapped one; rows are converted by :meth:`Modality.model` when asked.

    Args:
        values: ``(instances, ...)``, anything NumPy can index with rows.
        modality: what the instances are.
        source: what error messages call the array, best its file.
        prepare: applied to the rows of a batch before :meth:`Modality.model`, which wants ``(b, *shape)`` in natural
            space; by default they are taken as they are.
    """

    values: NDArray[Any]
    modality: Modality
    source: str
    prepare: Callable[[NDArray], NDArray] = np.asarray

    @property
    def shape(self) -> tuple[int, ...]:
        """``(instances, *shape)``."""
        return (len(self.values), *self.modality.shape)

    def __len__(self) -> int:
        return len(self.values)

    def gather(self, rows: Tensor) -> Tensor:
        """As :meth:`Pool.gather`; ValueError for values outside their range or not finite, naming the source."""
        chosen = rows.numpy()
        try:
            x = self._model(chosen)
        except ValueError as error:
            bad = next((row for row in chosen if not self._fits(row)), None)
            where = "" if bad is None else f", in row {bad}"
            raise ValueError(f"{self.source}: {error}{where}") from error
        finite = torch.isfinite(x).flatten(1).all(1)
        if not finite.all():
            row = int(chosen[int((~finite).nonzero()[0])])
            raise ValueError(
                f"{self.source}: row {row} has values that are not finite; say that it is absent, or leave it out"
            )
        return x

    def _model(self, rows: NDArray[np.int64]) -> Tensor:
        return self.modality.model(self.prepare(self.values[rows]))

    def _fits(self, row: np.int64) -> bool:
        try:
            self._model(np.array([row]))
        except ValueError:
            return False
        return True


@dataclass(frozen=True, eq=False)
class FilePool:
    """Instances in one file each, decoded when asked, by several threads.

    Args:
        files: one for each instance, in the order of the rows.
        modality: what they are.
        read: a file to its array ``shape``: images uint8 ``(C, H, W)`` or floating in [0, 1].
    """

    files: Sequence[Path]
    modality: Modality
    read: Callable[[Path], NDArray]

    @property
    def shape(self) -> tuple[int, ...]:
        """``(instances, *shape)``."""
        return (len(self.files), *self.modality.shape)

    def __len__(self) -> int:
        return len(self.files)

    def gather(self, rows: Tensor) -> Tensor:
        """As :meth:`Pool.gather`; ValueError naming the file that is not what it should be, or not there any more."""
        x = torch.zeros((len(rows), *self.modality.shape))
        files = [self.files[row] for row in rows.tolist()]
        for at, (file, pixels) in enumerate(zip(files, read_all(files, self._read), strict=True)):
            if pixels.shape != self.modality.shape:
                raise ValueError(
                    f"{file} has {_size(pixels.shape)}, others of {self.modality.name!r} have "
                    f"{_size(self.modality.shape)}: resize it"
                )
            try:
                x[at] = self.modality.model(pixels[None])[0]
            except ValueError as error:
                raise ValueError(f"{file}: {error}") from error
        return x

    def _read(self, file: Path) -> NDArray:
        try:
            return self.read(file)
        except FileNotFoundError as error:
            raise ValueError(f"{file} is gone: it was there when the set was loaded") from error


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[2]} pixels, {shape[0]} channels" if len(shape) == 3 else f"shape {shape}"


def average_areas(images: NDArray[Any], size: int) -> NDArray[np.float64]:
    """Images ``(..., H, H)`` made smaller: the means of their square areas, float64 ``(..., size, size)``.

    Means of bytes are exact, whatever the order of summation.

    Raises:
        ValueError: for a size that is neither the images' side nor half of it.
    """
    side = images.shape[-1]
    if not isinstance(size, int) or size not in (side, side // 2):
        raise ValueError(f"size must be {side} or {side // 2}, got {size!r}")
    block = side // size
    return images.reshape(*images.shape[:-2], size, block, size, block).mean(axis=(-3, -1), dtype=np.float64)


def held(pool: Pool, rows: NDArray[np.int64] | None = None) -> Tensor:
    """The instances of ``pool`` as one tensor, float32 ``(instances, *shape)``.

    With ``rows`` only those are read, and the others are zeros: for instances that are absent and may be anything.
    """
    if rows is None:
        return pool.gather(torch.arange(len(pool)))
    x = torch.zeros(tuple(pool.shape))
    x[torch.from_numpy(rows)] = pool.gather(torch.from_numpy(rows))
    return x


def load_tensor(file: Path, layout: str, *, mapped: bool = False) -> Tensor:
    """The one dense tensor in a .pt file, on the CPU and without a graph; nothing in the file is executed.

    Args:
        file: what torch.save wrote.
        layout: what else belongs beside the file, for the message when it is missing.
        mapped: leave the values on disk until they are used.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else, or cannot be read.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {layout}")
    try:
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        except RuntimeError:  # files of old versions cannot be mapped
            if not mapped:
                raise
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and the pickle in the file promise no set of exceptions
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file} cannot be read by torch.load(weights_only=True): {reason}") from error
    return dense(loaded, str(file))


def dense(value: object, source: str) -> Tensor:
    """``value`` as a tensor that NumPy takes: without a graph, float32 for the other small floats, int64 for unsigned
    integers of more than 8 bits.

    Raises:
        ValueError: naming ``source``, if it is no dense tensor with values.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{source} must hold one dense tensor, got {type(value).__name__}")
    kinds = {
        "sparse": value.layout != torch.strided,
        "nested": value.is_nested,
        "quantised": value.is_quantized,
        "without values (meta)": value.is_meta,
    }
    for kind, found in kinds.items():
        if found:
            raise ValueError(f"{source} must hold one dense tensor, got a tensor that is {kind}")
    value = value.detach().resolve_conj().resolve_neg()
    if value.is_floating_point() and value.dtype not in (torch.float16, torch.float32, torch.float64):
        return value.to(torch.float32)
    return value.to(torch.int64) if value.dtype in (torch.uint16, torch.uint32, torch.uint64) else value
