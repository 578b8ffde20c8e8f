"""Reading idx files, the format of MNIST and of the sets made like it (Fashion-MNIST, KMNIST, EMNIST digits).

An idx file is two zero bytes, a byte for the type, a byte for the number of axes, the sizes as big-endian 32-bit
integers, and the values; it may be gzipped.
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from mmebm.data.pools import dense

__all__ = ["read_idx", "read_mnist"]

TYPES: Final = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
BELOW: Final = ("", "raw", "MNIST/raw", "FashionMNIST/raw", "KMNIST/raw")  # torchvision's folders
STEMS: Final = {"train": "train", "test": "t10k"}


def read_idx(file: str | os.PathLike[str]) -> NDArray[Any]:
    """The array of an idx file, gzipped or not (the content tells, not the name), in the machine's byte order.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no idx file, is cut short, or goes on after its values. The message names the file.
    """
    path = Path(file)
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is a broken gzip file ({error}): fetch it again") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in TYPES or not content[3]:
        raise ValueError(
            f"{path} is no idx file: it begins with {content[:4].hex(' ') or 'nothing'}, not with 00 00, "
            "a type and a number of axes"
        )
    dtype, axes = np.dtype(TYPES[content[2]]), content[3]
    begin = 4 + 4 * axes
    sizes = tuple(int(size) for size in np.frombuffer(content[4:begin][: (len(content) - 4) // 4 * 4], ">u4"))
    expected = begin + math.prod(sizes) * dtype.itemsize
    if len(sizes) < axes or len(content) < expected:
        raise ValueError(f"{path} is cut short: {len(content)} bytes of {expected} for {sizes}: fetch it again")
    if len(content) > expected:
        raise ValueError(f"{path} has {len(content) - expected} bytes after its {sizes} values: fetch it again")
    return np.frombuffer(content, dtype, offset=begin).reshape(sizes).astype(dtype.newbyteorder("="))


def read_mnist(
    folder: str | os.PathLike[str], split: Literal["train", "test"]
) -> tuple[NDArray[np.uint8], NDArray[np.int64], dict[str, Any]]:
    """Images and labels of MNIST or a set in its format, from a folder.

    Looked for in ``folder`` and, as torchvision lays them out, in ``raw``, ``MNIST/raw``, ``FashionMNIST/raw`` and
    ``KMNIST/raw`` below it: ``train-images-idx3-ubyte`` and ``train-labels-idx1-ubyte`` (``t10k-...`` for test), also
    spelt ``train-images.idx3-ubyte``, each with or without ``.gz``; then ``MNIST/processed/{training,test}.pt``, as
    old torchvision versions wrote it.

    Args:
        folder: where to look.
        split: ``"train"`` or ``"test"``.

    Returns:
        images uint8 ``(n, H, W)``, labels int64 ``(n,)`` in 0..9, and where they came from.

    Raises:
        FileNotFoundError: if the files are not there; the message says where they were looked for.
        ValueError: if a file cannot be read, or the two do not fit together.
    """
    root = Path(folder)
    for below in BELOW:
        images_file = _spelt(root / below, f"{STEMS[split]}-images", "idx3-ubyte")
        if images_file is None:
            continue
        labels_file = _spelt(root / below, f"{STEMS[split]}-labels", "idx1-ubyte")
        if labels_file is None:
            raise FileNotFoundError(
                f"{root / below / f'{STEMS[split]}-labels-idx1-ubyte'} (or .gz) is missing beside {images_file.name}"
            )
        images, labels = read_idx(images_file), read_idx(labels_file)
        return *_checked(images, labels, images_file, labels_file), _source(images_file, len(images))
    for below in ("MNIST/processed", "processed"):
        file = root / below / {"train": "training.pt", "test": "test.pt"}[split]
        if file.is_file():
            images, labels = _processed(file)
            return *_checked(images, labels, file, file), _source(file, len(images))
    raise FileNotFoundError(
        f"no MNIST {split} split: looked for {STEMS[split]}-images-idx3-ubyte (or .gz) in "
        f"{', '.join(str(root / below) for below in BELOW)}, and for MNIST/processed. Put the four idx files there; "
        "Debian's package dataset-fashion-mnist has such a set in /usr/share/datasets/fashion-mnist"
    )


def _spelt(folder: Path, stem: str, kind: str) -> Path | None:
    names = [f"{stem}{separator}{kind}{suffix}" for suffix in ("", ".gz") for separator in "-."]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _processed(file: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    try:
        images, labels = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and the pickle in the file promise no set of exceptions
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{file} must hold two tensors, images and labels, readable by torch.load(weights_only=True): {reason}"
        ) from error
    return dense(images, f"{file}, its first tensor,").numpy(), dense(labels, f"{file}, its second tensor,").numpy()


def _checked(
    images: NDArray[Any], labels: NDArray[Any], images_file: Path, labels_file: Path
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    if images.dtype != np.uint8 or images.ndim != 3:
        raise ValueError(f"{images_file} must hold uint8 (n, H, W), got {images.dtype} {images.shape}")
    if labels.ndim != 1 or labels.dtype.kind not in "ui":
        raise ValueError(f"{labels_file} must hold integers (n,), got {labels.dtype} {labels.shape}")
    if len(images) != len(labels) or not len(labels):
        raise ValueError(f"{labels_file} has {len(labels)} labels for the {len(images)} images of {images_file}")
    if labels.min() < 0 or labels.max() > 9:
        bad = int(np.flatnonzero((labels < 0) | (labels > 9))[0])
        raise ValueError(
            f"{labels_file} must hold classes 0 to 9, got {labels.min()} to {labels.max()}, first in row {bad}"
        )
    return images, labels.astype(np.int64)


def _source(file: Path, n: int) -> dict[str, Any]:
    return {"what": f"MNIST or alike, {n} instances", "file": str(file)}
