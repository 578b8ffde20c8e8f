"""Pools that are read when asked: what they give equals the conversion of the whole, and what is broken is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mmebm.data import Modality
from mmebm.data.images import read_image
from mmebm.data.pools import ArrayPool, FilePool, held, load_tensor

GREY = Modality("grey", (1, 4, 5), "image")


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_rows_of_a_mapped_array_are_those_of_the_array(tmp_path: Path, seed: int, dtype: type) -> None:
    values = np.random.default_rng(seed).integers(0, 256, (9, 1, 4, 5)).astype(np.uint8)
    natural = values if dtype == np.uint8 else (values / 255).astype(dtype)
    np.save(tmp_path / "grey.npy", natural)
    pool = ArrayPool(np.load(tmp_path / "grey.npy", mmap_mode="r"), GREY, "grey.npy")
    assert pool.shape == (9, 1, 4, 5) and len(pool) == 9
    rows = torch.tensor([7, 0, 7])
    expected = values[[7, 0, 7]] / 127.5 - 1
    # natural and model values are rounded to float32 once each, and are at most 1
    np.testing.assert_allclose(pool.gather(rows).numpy(), expected, atol=2.0**-22)
    assert pool.gather(rows[:0]).shape == (0, 1, 4, 5)
    assert torch.equal(held(pool)[rows], pool.gather(rows))


def test_held_reads_only_the_rows_it_is_told() -> None:
    values = np.full((4, 1, 4, 5), np.nan, dtype=np.float32)
    values[2] = 0.25
    x = held(ArrayPool(values, GREY, "a.npy"), np.array([2]))
    assert (x[2] == -0.5).all() and (x[[0, 1, 3]] == 0).all()


def test_a_row_out_of_range_names_its_source() -> None:
    values = np.zeros((3, 1, 4, 5))
    values[1] = 1.5
    pool = ArrayPool(values, GREY, "/data/grey.npy")
    pool.gather(torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"/data/grey\.npy: .*\[0, 1\], got \[0, 1\.5\], in row 1"):
        pool.gather(torch.tensor([0, 1]))
    vectors = ArrayPool(np.array([[1.0], [2.0], [np.inf]]), Modality("v", (1,), "vector"), "v.npy")
    with pytest.raises(ValueError, match=r"v\.npy: row 2 has values that are not finite"):
        vectors.gather(torch.tensor([1, 2]))


def test_image_files(tmp_path: Path, seed: int) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 6, 5, 3)).astype(np.uint8)
    files = [tmp_path / f"{i}.png" for i in range(4)]
    for file, picture in zip(files, pixels):
        image.fromarray(picture).save(file)
    pool = FilePool(files, Modality("photo", (3, 6, 5), "image"), read_image)
    assert pool.shape == (4, 3, 6, 5) and len(pool) == 4
    x = pool.gather(torch.tensor([3, 1]))
    assert np.array_equal(np.rint((x.numpy() + 1) * 127.5), pixels[[3, 1]].transpose(0, 3, 1, 2))
    image.new("L", (6, 5)).save(files[0])
    files[1].write_bytes(files[1].read_bytes()[:60])
    files[2].unlink()
    for row, message in (
        (0, r"0\.png has 5x6 pixels.*others of 'photo' have 6x5"),
        (1, r"1\.png cannot be read"),
        (2, r"2\.png is gone"),
    ):
        with pytest.raises(ValueError, match=message):
            pool.gather(torch.tensor([3, row]))
    with pytest.raises(FileNotFoundError):
        read_image(files[2])


def test_a_mapped_tensor_file_is_the_same(tmp_path: Path, seed: int) -> None:
    values = torch.rand(5, 3, generator=torch.Generator().manual_seed(seed))
    torch.save(values, tmp_path / "v.pt")
    assert torch.equal(load_tensor(tmp_path / "v.pt", "", mapped=True), values)
    with pytest.raises(FileNotFoundError, match=r"w\.pt is missing: one file for each"):
        load_tensor(tmp_path / "w.pt", "one file for each")
