"""idx files: what the format says, restated with struct, and everything that can be wrong with one."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mmebm.data.idx import read_idx, read_mnist

Writer = Callable[..., Path]


@pytest.mark.parametrize(
    ("code", "letter", "values"),
    [
        (0x08, "B", [0, 7, 255, 1, 2, 3]),
        (0x09, "b", [-128, 127, 0, 1, -1, 5]),
        (0x0B, "h", [-300, 300, 0, 1, 2, 3]),
        (0x0C, "i", [-70000, 70000, 0, 1, 2, 3]),
        (0x0D, "f", [0.5, -2.0, 1e9, 0, 1, 2]),
        (0x0E, "d", [1e300, *[0.0] * 5]),
    ],
)
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_every_type_of_the_format(
    tmp_path: Path, code: int, letter: str, values: list[float], pack: Callable[[bytes], bytes]
) -> None:
    content = struct.pack(f">BBBBII6{letter}", 0, 0, code, 2, 3, 2, *values)
    (tmp_path / "any-name").write_bytes(pack(content))
    array = read_idx(tmp_path / "any-name")
    assert array.shape == (3, 2) and array.ravel().tolist() == values and array.dtype.isnative


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "begins with nothing"),
        (b"\x00\x00\x08", "no idx file"),
        (b"PK\x03\x04" + bytes(20), "begins with 50 4b 03 04"),
        (struct.pack(">BBBBI", 0, 0, 0x07, 1, 0), "no idx file"),
        (struct.pack(">BBBBI", 0, 0, 0x08, 0, 0), "no idx file"),
        (struct.pack(">BBBBI", 0, 0, 0x08, 3, 2), "cut short"),
        (struct.pack(">BBBBI5B", 0, 0, 0x08, 1, 6, *range(5)), r"cut short: 13 bytes of 14 for \(6,\)"),
        (struct.pack(">BBBBI7B", 0, 0, 0x08, 1, 6, *range(7)), r"1 bytes after its \(6,\) values"),
        (gzip.compress(bytes(1000))[:-9], "broken gzip"),
        (gzip.compress(b"hello")[:10], "broken gzip"),
        (b"\x1f\x8b no gzip at all", "broken gzip"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "broken-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=f"broken-ubyte .*{message}"):
        read_idx(tmp_path / "broken-ubyte")


@pytest.mark.parametrize("below", ["", "raw", "MNIST/raw", "FashionMNIST/raw"])
@pytest.mark.parametrize(("suffix", "separator"), [("", "-"), (".gz", "-"), ("", ".")])
def test_layouts(tmp_path: Path, write_mnist: Writer, below: str, suffix: str, separator: str) -> None:
    images, labels = write_mnist(tmp_path / below, "test", 12, suffix=suffix, separator=separator)
    got, classes, source = read_mnist(tmp_path, "test")
    assert np.array_equal(got, images) and classes.tolist() == labels.tolist() and classes.dtype == np.int64
    assert str(tmp_path) in source["file"]
    with pytest.raises(FileNotFoundError, match=r"no MNIST train split: .*MNIST/raw.*dataset-fashion-mnist"):
        read_mnist(tmp_path, "train")


def test_tensors_of_old_torchvision(tmp_path: Path) -> None:
    folder = tmp_path / "MNIST/processed"
    folder.mkdir(parents=True)
    torch.save((torch.arange(32, dtype=torch.uint8).reshape(2, 4, 4), torch.tensor([3, 9])), folder / "training.pt")
    images, labels, _ = read_mnist(tmp_path, "train")
    assert images.ravel().tolist() == list(range(32)) and labels.tolist() == [3, 9]
    torch.save(torch.zeros(3), folder / "training.pt")
    with pytest.raises(ValueError, match=r"training\.pt must hold two tensors"):
        read_mnist(tmp_path, "train")


def test_images_and_labels_must_fit(tmp_path: Path, write_mnist: Writer) -> None:
    write_mnist(tmp_path, "train", 12)
    labels = tmp_path / "train-labels-idx1-ubyte"
    for content, message in (
        (struct.pack(">BBBBI11B", 0, 0, 8, 1, 11, *[0] * 11), "has 11 labels for the 12 images"),
        (struct.pack(">BBBBI12B", 0, 0, 8, 1, 12, *[10] * 12), "classes 0 to 9, got 10 to 10"),
        (struct.pack(">BBBBII12B", 0, 0, 8, 2, 12, 1, *[0] * 12), r"integers \(n,\)"),
    ):
        labels.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_mnist(tmp_path, "train")
    labels.unlink()
    with pytest.raises(FileNotFoundError, match="train-labels-idx1-ubyte"):
        read_mnist(tmp_path, "train")
