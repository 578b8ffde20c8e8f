"""PolyMNIST: built in memory, and read from both published layouts."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmebm.data import MultimodalDataset, load
from mmebm.data.packages import PHOTOGRAPHS, mnist, photograph
from mmebm.data.pairing import split_by_class
from mmebm.data.polymnist import CropPool, crop_corners, invert

NAMES = ("0.3.png", "1.3.png", "0.7.png", "10.3.png", "2.7.png")
ORDERED = [(3, 0), (3, 1), (3, 10), (7, 0), (7, 2)]  # (digit, i)


def natural_bytes(data: MultimodalDataset, name: str, rows: torch.Tensor) -> np.ndarray:
    modality = next(m for m in data.modalities if m.name == name)
    return np.rint(modality.natural(data.pools[name][rows]) * 255).astype(np.uint8)


def colour(modality: int, digit: int, i: int) -> tuple[int, int, int]:
    return (10 * modality, 20 * digit, 5 * i + 1)


def write_png(folder: Path, *, modalities: int = 3, seed: int = 0) -> None:
    """One flat colour for each file, created in another order in each modality."""
    image = pytest.importorskip("PIL.Image")
    for m in range(modalities):
        (folder / f"m{m}").mkdir(parents=True)
        names = list(NAMES)
        random.Random(seed + m).shuffle(names)
        for name in names:
            i, digit, _ = name.split(".")
            image.new("RGB", (6, 4), colour(m, int(digit), int(i))).save(folder / f"m{m}" / name)


def write_tensors(folder: Path, dtype: torch.dtype = torch.uint8, modalities: int = 2) -> list[torch.Tensor]:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    pixels = [torch.randint(0, 256, (5, 3, 4, 6), generator=generator, dtype=torch.uint8) for _ in range(modalities)]
    for m, images in enumerate(pixels):
        torch.save(images if dtype == torch.uint8 else (images / 255).to(dtype), folder / f"m{m}.pt")
    torch.save(torch.tensor([4, 0, 9, 4, 1]), folder / "labels.pt")
    return pixels


# ---------------------------------------------------------------------------------------------- built in memory


def test_inversion_of_a_known_crop() -> None:
    crop = np.array([[[[0, 10], [200, 255]]] * 3], dtype=np.uint8)
    digit = np.array([[[129, 128], [255, 0]]], dtype=np.uint8)
    assert invert(crop, digit).tolist() == [[[[255, 10], [55, 255]]] * 3]
    assert invert(crop, digit).dtype == np.uint8


@pytest.mark.parametrize("shape", [(300, 451), (28, 336), (168, 336), (512, 512), (872, 1000)])
def test_crops_of_the_splits_share_no_pixel(shape: tuple[int, int]) -> None:
    reached = {split: np.zeros(shape, dtype=bool) for split in ("train", "validation", "test")}
    for split, pixels in reached.items():
        if split == "validation" and shape[0] < 168:
            with pytest.raises(ValueError, match=r"no room for validation crops .*: 168x336 is the least"):
                crop_corners(shape, "validation")
            continue
        columns, rows = crop_corners(shape, split)  # type: ignore[arg-type]
        assert rows.shape[1:] == columns.shape and len(rows) >= 1
        for x, ys in zip(columns, rows.T, strict=True):
            assert len(set(ys.tolist())) == len(ys) and 0 <= x <= shape[1] - 28
            for y in ys:
                assert 0 <= y <= shape[0] - 28
                pixels[y : y + 28, x : x + 28] = True
    counts = sum(pixels.astype(int) for pixels in reached.values())
    assert counts.max() == 1
    shares = {split: pixels.mean() for split, pixels in reached.items()}
    assert 0.2 < shares["test"] < 0.3 and shares["train"] > 0.5
    if shape[0] >= 168:
        assert 0.08 < shares["validation"] < 0.15
        # in every one of the three parts of train's width, at another height
        kinds = {tuple(reached["validation"][:, x]) for x in range(shape[1]) if reached["validation"][:, x].any()}
        assert len(kinds) == 3


@pytest.mark.parametrize("shape", [(27, 500), (500, 300), (500, 20), (0, 0)])
def test_a_photograph_that_is_too_small_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="28x336 is the least"):
        crop_corners(shape, "test")


def test_shapes_and_ranges(poly_train: MultimodalDataset, poly_test: MultimodalDataset) -> None:
    for data, size in ((poly_train, 7200), (poly_test, 2000)):
        assert [m.name for m in data.modalities] == ["m0", "m1", "m2", "m3", "m4"] and len(data) == size
        for modality in data.modalities:
            pool = data.pools[modality.name]
            assert modality.shape == (3, 28, 28) and pool.shape == (size, 3, 28, 28) and pool.dtype == torch.float32
            assert -1 <= pool.min() < -0.9 and 0.9 < pool.max() <= 1


@pytest.mark.parametrize("split", ["train", "test"])
def test_each_instance_is_its_digit_over_its_photograph(
    poly_train: MultimodalDataset, poly_test: MultimodalDataset, split: str
) -> None:
    # Takes the digit out again and looks for what is left in the photograph.
    data = poly_train if split == "train" else poly_test
    images, labels, _ = mnist()
    digits = split_by_class(labels, "mnist")[split]
    for m, file_name in enumerate(PHOTOGRAPHS):
        background, _ = photograph(file_name)
        columns, rows_of = crop_corners(background.shape[:2], data.split)
        allowed = {(int(y), int(x)) for x, ys in zip(columns, rows_of.T, strict=True) for y in ys}
        rows = torch.tensor([0, 1, 777, 1234, 1999])
        shown = digits[rows.numpy() // 2]
        crops = invert(natural_bytes(data, f"m{m}", rows), images[shown])
        assert data.pool_labels[f"m{m}"][rows].tolist() == labels[shown].tolist()
        windows = np.lib.stride_tricks.sliding_window_view(background, (28, 28), axis=(0, 1))
        for crop in crops:
            corners = np.argwhere((windows[:, :, :, 0, :4] == crop[:, 0, :4]).all(axis=(2, 3)))
            assert allowed & {(int(y), int(x)) for y, x in corners if (windows[y, x] == crop).all()}


def test_half_size_is_the_mean_of_areas_and_fewer_modalities_are_the_first(poly_test: MultimodalDataset) -> None:
    small = load("polymnist-5k", "test", seed=0, copies=2, size=14, modalities=3)
    assert [m.name for m in small.modalities] == ["m0", "m1", "m2"] and small.modalities[0].shape == (3, 14, 14)
    for name in small.pools:
        whole = poly_test.pools[name].double()
        corners = [whole[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        # both are rounded to float32 once, values up to 1: half a unit in the last place each, 2 * 2^-24
        assert (small.pools[name].double() - sum(corners) / 4).abs().max() <= 2**-23


@pytest.mark.parametrize("option, value", [("size", 7), ("size", 56), ("modalities", 1), ("modalities", 6)])
def test_sizes_and_modalities_that_there_are_not_are_refused(option: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{option} must be .*, got {value}"):
        load("polymnist-5k", "test", **{option: value})


def test_crops_are_fresh_for_each_copy_and_modality(poly_train: MultimodalDataset) -> None:
    first, second = poly_train.pools["m1"][0::2], poly_train.pools["m1"][1::2]
    assert (first != second).flatten(1).any(1).float().mean() > 0.999


def test_each_modality_takes_its_own_digit(poly_train: MultimodalDataset) -> None:
    digit = poly_train.index // 2
    for a in range(5):
        for b in range(a):
            assert (digit[:, a] == digit[:, b]).float().mean() < 0.01  # 1 in 400 by chance


def test_pairs_share_the_class_and_use_every_instance_once(poly_train: MultimodalDataset) -> None:
    assert torch.bincount(poly_train.labels).tolist() == [720] * 10
    for column, name in enumerate(poly_train.pools):
        rows = poly_train.index[:, column]
        assert torch.equal(poly_train.pool_labels[name][rows], poly_train.labels)
        assert torch.equal(rows.sort().values, torch.arange(7200))


def test_train_and_test_digits_are_those_of_the_digit_set(
    digits_train: MultimodalDataset, poly_test: MultimodalDataset
) -> None:
    images, labels, _ = mnist()
    test = {image.tobytes() for image in images[split_by_class(labels, "mnist")["test"]]}
    train = np.rint(digits_train.modalities[0].natural(digits_train.pools["mnist"]) * 255).astype(np.uint8)
    assert not test & {image.tobytes() for image in train[:, 0]}
    assert poly_test.info["split_seed"] == digits_train.info["split_seed"]


def test_same_arguments_same_tensors_other_seed_others(poly_test: MultimodalDataset) -> None:
    again, other = (load("polymnist-5k", "test", seed=seed, copies=2) for seed in (0, 1))
    assert torch.equal(again.index, poly_test.index) and not torch.equal(other.index, poly_test.index)
    for name, pool in poly_test.pools.items():
        assert torch.equal(again.pools[name], pool) and not torch.equal(other.pools[name], pool)


def test_the_build_is_pinned(poly_test: MultimodalDataset) -> None:
    # m1 lies over a PNG file: what a JPEG file decodes to is the decoder's affair.
    assert hashlib.sha256(poly_test.index.numpy().astype("<i8").tobytes()).hexdigest()[:16] == "4afdea063314a1b7"
    assert hashlib.sha256(poly_test.pools["m1"].numpy().astype("<f4").tobytes()).hexdigest()[:16] == "5b6fe1e3a39973e3"


def test_options(packages: None) -> None:
    data = load("polymnist-5k", "test", n=4321, copies=1)
    assert len(data) == 4321 and len(data.pools["m0"]) == 1000
    uses = torch.bincount(data.index[:, 3], minlength=1000)
    assert uses.min() == 4 and uses.max() == 5
    with pytest.raises(ValueError, match="copies must be at least 1, got 0"):
        load("polymnist-5k", "test", copies=0)
    with pytest.raises(ValueError, match="n must be at least 1, got -1"):
        load("polymnist-5k", "test", n=-1)
    with pytest.raises(ValueError, match="reads no folder"):
        load("polymnist-5k", "test", path="x")


# ---------------------------------------------------------------------------------------------- PNG files


@pytest.mark.parametrize("below", ["", "PolyMNIST", "MMNIST"])
def test_png_files_are_paired_by_name(tmp_path: Path, below: str) -> None:
    write_png(tmp_path / below / "test")
    data = load("polymnist", "test", path=tmp_path)
    assert len(data) == 5 and [m.name for m in data.modalities] == ["m0", "m1", "m2"]
    assert data.labels.tolist() == [digit for digit, _ in ORDERED]
    batch = data.batch(torch.arange(5))
    for m, modality in enumerate(data.modalities):
        assert modality.shape == (3, 4, 6)
        natural = np.rint(modality.natural(batch[modality.name]) * 255)
        assert (natural == natural[:, :, :1, :1]).all()
        assert [tuple(c) for c in natural[:, :, 0, 0].astype(int)] == [colour(m, digit, i) for digit, i in ORDERED]


def test_png_modalities_are_ordered_by_number(tmp_path: Path) -> None:
    write_png(tmp_path / "train", modalities=11)
    (tmp_path / "train" / "masks").mkdir()
    (tmp_path / "train" / "m0" / "._0.3.png").write_bytes(b"left by an archiver")
    (tmp_path / "train" / "m1" / "Thumbs.db").write_bytes(b"left by a file manager")
    data = load("polymnist", "train", path=str(tmp_path))
    assert [m.name for m in data.modalities] == [f"m{m}" for m in range(11)]
    assert natural_bytes(data, "m10", torch.tensor([0]))[0, :, 0, 0].tolist() == list(colour(10, 3, 0))


def test_endings_in_capitals_are_endings_too(tmp_path: Path) -> None:
    write_png(tmp_path / "test")
    for file in (tmp_path / "test").rglob(NAMES[0]):
        file.rename(file.with_suffix(".PNG"))
    data = load("polymnist", "test", path=tmp_path)
    assert len(data) == 5 and data.names is not None
    assert sorted(data.names["m1"]) == sorted([*NAMES[1:], NAMES[0].replace("png", "PNG")])


def test_a_missing_png_file_is_named(tmp_path: Path) -> None:
    write_png(tmp_path / "train")
    (tmp_path / "train/m1/10.3.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"m1.10\.3\.png is missing.*1 such files in m1.*paired by file name"):
        load("polymnist", "train", path=tmp_path)
    (tmp_path / "train/m0/10.3.png").unlink()  # a file too many, then, in m2
    with pytest.raises(FileNotFoundError, match=r"m0.10\.3\.png is missing"):
        load("polymnist", "train", path=tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m1/cat.png", b"", r"cat\.png is not named"),
        ("m1/0.33.png", b"", r"0\.33\.png is not named"),
        ("m1/0.3.png", b"no picture", r"m1.0\.3\.png cannot be read as an image"),
        ("m1/0.7.png", None, r"m1.0\.7\.png has 9x9 pixels, .*4x6"),
        ("m1/1.3.png", "cut", r"m1.1\.3\.png cannot be read as an image"),
    ],
)
def test_a_broken_png_file_is_named(tmp_path: Path, name: str, content: bytes | str | None, message: str) -> None:
    write_png(tmp_path / "train")
    file = tmp_path / "train" / name
    if content is None:
        pytest.importorskip("PIL.Image").new("RGB", (9, 9)).save(file)
    else:
        file.write_bytes(content if isinstance(content, bytes) else file.read_bytes()[:45])
    with pytest.raises(ValueError, match=message):
        load("polymnist", "train", path=tmp_path)


def test_a_gap_in_the_modalities_is_named(tmp_path: Path) -> None:
    write_png(tmp_path / "train")
    (tmp_path / "train/m1").rename(tmp_path / "train/m3")
    with pytest.raises(ValueError, match="has m3 and no m1"):
        load("polymnist", "train", path=tmp_path)


def test_empty_modalities_are_named(tmp_path: Path) -> None:
    (tmp_path / "train/m0").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no file \{i\}\.\{digit\}\.png in .*m0"):
        load("polymnist", "train", path=tmp_path)


def test_a_missing_folder_says_what_was_looked_for_and_where(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "MMNIST/test").mkdir(parents=True)
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError) as caught:
            load("polymnist", "train", path=path)
        for part in (
            str(path / "train"),
            str(path / "MMNIST" / "train"),
            "m0.pt",
            "zenodo",
            "polymnist-5k",
            "pip install 'mmebm[digits]'",
        ):
            assert part in str(caught.value)
    with pytest.raises(ValueError, match="give path="):
        load("polymnist", "train")


def test_n_takes_tuples_at_random(tmp_path: Path) -> None:
    write_png(tmp_path / "train")
    every = load("polymnist", "train", path=tmp_path)
    chosen = [load("polymnist", "train", path=tmp_path, n=3, seed=seed) for seed in (0, 0, *range(1, 9))]
    assert torch.equal(chosen[0].pools["m0"], chosen[1].pools["m0"])
    assert len({data.pools["m0"].numpy().tobytes() for data in chosen}) > 2
    for data in chosen:
        assert len(data) == len(data.pools["m2"]) == 3
        for row in range(3):
            same = (every.pools["m2"] == data.pools["m2"][row]).flatten(1).all(1).nonzero().flatten()
            assert len(same) == 1 and torch.equal(every.pools["m0"][same[0]], data.pools["m0"][row])
            assert every.labels[same[0]] == data.labels[row]
    with pytest.raises(ValueError, match="at most the 5 tuples"):
        load("polymnist", "train", path=tmp_path, n=6)


# ---------------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("below", ["", "MMNIST"])
def test_tensors_are_paired_by_row(tmp_path: Path, dtype: torch.dtype, below: str) -> None:
    pixels = write_tensors(tmp_path / below / "test", dtype)
    data = load("polymnist", "test", path=tmp_path)
    assert data.labels.tolist() == [4, 0, 9, 4, 1] and data.info["sources"][0]["layout"] == "pt"
    for m, images in enumerate(pixels):
        assert np.array_equal(natural_bytes(data, f"m{m}", torch.arange(5)), images.numpy())
    part = load("polymnist", "test", path=tmp_path, n=2)
    assert len(part) == 2 and set(part.labels.tolist()) <= {4, 0, 9, 1}


def test_png_files_go_before_tensors(tmp_path: Path) -> None:
    write_tensors(tmp_path / "train")
    write_png(tmp_path / "train")
    assert load("polymnist", "train", path=tmp_path).info["sources"][0]["layout"] == "png"


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("labels.pt", None, FileNotFoundError, r"labels\.pt is missing"),
        ("labels.pt", torch.zeros(5), ValueError, r"labels\.pt must hold integers, got torch.float32"),
        ("labels.pt", torch.tensor([0, 1, 2, 3, 10]), ValueError, "digits 0 to 9"),
        ("labels.pt", torch.tensor([0, 1, 2, 3]), ValueError, r"m0\.pt must be \(4, C, H, W\).*\(5, 3, 4, 6\)"),
        ("m1.pt", torch.zeros(4, 3, 4, 6), ValueError, r"m1\.pt must be \(5, C, H, W\)"),
        ("m1.pt", torch.zeros(5, 4, 6, 3), ValueError, r"m1\.pt .* got \(5, 4, 6, 3\): its channels are last"),
        ("m1.pt", torch.zeros(5, 72), ValueError, r"m1\.pt must be \(5, C, H, W\)"),
        ("m1.pt", torch.full((5, 3, 4, 6), 255.0), ValueError, r"m1\.pt: .*\[0, 1\], got \[255, 255\]"),
        ("m1.pt", torch.full((5, 3, 4, 6), torch.nan), ValueError, r"m1\.pt: .*\[0, 1\]"),
        ("m1.pt", {"images": torch.zeros(5)}, ValueError, r"m1\.pt must hold one dense tensor, got dict"),
        ("m1.pt", b"no tensor", ValueError, r"m1\.pt cannot be read"),
        ("m1.pt", b"", ValueError, r"m1\.pt cannot be read"),
        ("m1.pt", Path("code"), ValueError, r"m1\.pt cannot be read.*weights_only"),
    ],
)
def test_a_broken_tensor_file_is_named(
    tmp_path: Path, name: str, content: object, error: type[Exception], message: str
) -> None:
    write_tensors(tmp_path / "train")
    file = tmp_path / "train" / name
    if content is None:
        file.unlink()
    elif isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(error, match=message):
        load("polymnist", "train", path=tmp_path)


# ---------------------------------------------------------------------------------------------- read by the batch


@pytest.mark.parametrize("layout", ["png", "pt"])
@pytest.mark.parametrize("n", [None, 3])
def test_a_streamed_set_gives_the_same_batches(tmp_path: Path, layout: str, n: int | None) -> None:
    if layout == "png":
        write_png(tmp_path / "test")
    else:
        write_tensors(tmp_path / "test")
    held, streamed = (load("polymnist", "test", path=tmp_path, n=n, stream=stream) for stream in (False, True))
    rows = torch.tensor([2, 0, 2])
    for name, x in held.batch(rows).items():
        assert torch.equal(streamed.batch(rows)[name], x)
    assert torch.equal(streamed.labels, held.labels) and "m0" in repr(streamed).split("read when asked")[0]


def test_a_streamed_file_that_breaks_later_is_named(tmp_path: Path) -> None:
    write_png(tmp_path / "test")
    data = load("polymnist", "test", path=tmp_path, stream=True)
    (tmp_path / "test/m1" / NAMES[0]).unlink()  # digit 3, i = 0: row 0
    data.batch(torch.tensor([1, 4]))
    with pytest.raises(ValueError, match=r"m1.0\.3\.png is gone"):
        data.batch(torch.tensor([0]))


# ---------------------------------------------------------------------------------------------- over any idx set


def write_backgrounds(folder: Path, seed: int, sizes: tuple[tuple[int, int], ...] = ((30, 40), (28, 28))) -> list:
    image = pytest.importorskip("PIL.Image")
    folder.mkdir(parents=True)
    random_pixels = np.random.default_rng(seed)
    pixels = [random_pixels.integers(0, 256, (*size, 3)).astype(np.uint8) for size in sizes]
    for name, picture in zip(("b.png", "a.png"), pixels):  # the second comes first
        image.fromarray(picture).save(folder / name)
    (folder / "._a.png").write_bytes(b"left by an archiver")
    return pixels[::-1]


@pytest.mark.parametrize("blend", ["invert", "difference"])
@pytest.mark.parametrize("stream", [False, True])
def test_items_over_crops(tmp_path: Path, write_mnist: Callable[..., Any], seed: int, blend: str, stream: bool) -> None:
    items, labels = write_mnist(tmp_path, "test", 23, classes=4)  # six classes have no item
    small, large = write_backgrounds(tmp_path / "backgrounds", seed)
    data = load("polymnist-built", "test", path=tmp_path, seed=seed, blend=blend, stream=stream)
    assert [m.shape for m in data.modalities] == [(3, 28, 28)] * 2 and len(data) == 23
    assert torch.bincount(data.labels).tolist() == np.bincount(labels).tolist() == [6, 6, 6, 5]
    for column in range(2):  # each instance once
        assert data.index[:, column].sort().values.tolist() == list(range(23))
    batch = data.batch(torch.arange(23))
    for m, background in ((0, small), (1, large)):
        got = np.rint(data.modalities[m].natural(batch[f"m{m}"]) * 255).astype(int)
        of_row = data.index[:, m].numpy()
        assert np.array_equal(labels[of_row], data.labels.numpy())
        shown, windows = items[of_row].astype(int), []
        for y in range(background.shape[0] - 27):
            windows += [background[y : y + 28, x : x + 28] for x in range(background.shape[1] - 27)]
        for picture, item in zip(got, shown):
            crops = np.stack(windows).transpose(0, 3, 1, 2).astype(int)
            expected = np.where(item > 128, 255 - crops, crops) if blend == "invert" else np.abs(crops - item)
            assert (expected == picture).all(axis=(1, 2, 3)).any()


def test_options_of_the_built_set(tmp_path: Path, write_mnist: Callable[..., Any], seed: int) -> None:
    write_mnist(tmp_path, "test", 20)
    write_backgrounds(tmp_path / "photos", seed)
    names = tuple("abcdefghij")
    photos = tmp_path / "photos"
    data = load("polymnist-built", "test", path=tmp_path, backgrounds=photos, copies=3, n=25, classes=names)
    assert data.classes == names and len(data) == 25 and len(data.pools["m1"]) == 60
    assert torch.bincount(data.labels, minlength=10).tolist() == [3] * 5 + [2] * 5
    assert json.loads(json.dumps(data.info)) == data.info
    for options, message in (
        ({"blend": "add"}, "blend must be"),
        ({"classes": names[:9]}, "ten distinct names"),
        ({"copies": 0}, "copies"),
        ({"disjoint": True}, "28x336 is the least"),
        ({"backgrounds": tmp_path / "none"}, None),
    ):
        kind = ValueError if message else FileNotFoundError
        with pytest.raises(kind, match=message or r"no background photograph .* in .*none"):
            load("polymnist-built", "test", path=tmp_path, **{"backgrounds": photos, **options})
    with pytest.raises(ValueError, match=r"give path= .*, or load 'polymnist-5k'"):
        load("polymnist-built", "test")
    write_mnist(tmp_path, "train", 20, side=14)
    with pytest.raises(ValueError, match="items of 14x14, 28x28 is needed"):
        load("polymnist-built", "train", path=tmp_path)


def test_without_photographs_those_of_scikit_image_are_used(
    tmp_path: Path, packages: None, write_mnist: Callable[..., Any]
) -> None:
    write_mnist(tmp_path, "test", 20)
    data = load("polymnist-built", "test", path=tmp_path, disjoint=True, stream=True)
    assert [source["file"] for source in data.info["sources"][1:]] == list(PHOTOGRAPHS)


def test_a_photograph_too_small_is_refused(tmp_path: Path, write_mnist: Callable[..., Any], seed: int) -> None:
    write_mnist(tmp_path, "test", 20)
    write_backgrounds(tmp_path / "backgrounds", seed, ((28, 28), (27, 90)))
    with pytest.raises(ValueError, match="27x90 is too small: 28x28"):
        load("polymnist-built", "test", path=tmp_path)


def test_polyfashion_keeps_items_apart(tmp_path: Path, write_mnist: Callable[..., Any], packages: None) -> None:
    """Train, validation and test: each item of the idx files in one of them, blended by the difference."""
    images, _ = write_mnist(tmp_path, "train", 240)
    others, _ = write_mnist(tmp_path, "test", 40)
    parts = {split: load("polyfashion", split, path=tmp_path) for split in ("train", "validation", "test")}
    assert {name: len(data) for name, data in parts.items()} == {"train": 220, "validation": 20, "test": 40}
    shown: dict[str, set[bytes]] = {}
    for name, data in parts.items():
        assert [m.shape for m in data.modalities] == [(3, 28, 28)] * 5
        pools = [data.pools[m.name] for m in data.modalities]
        assert all(isinstance(pool, CropPool) for pool in pools)
        shown[name] = {item.tobytes() for pool in pools for item in pool.items}  # type: ignore[union-attr]
    assert not shown["train"] & shown["validation"] and shown["test"] == {item.tobytes() for item in others}
    assert shown["train"] | shown["validation"] == {item.tobytes() for item in images}
    assert parts["validation"].labels.bincount().tolist() == [2] * 10  # a twelfth of 24 of each class
    pool = parts["test"].pools["m1"]
    assert isinstance(pool, CropPool)
    crop = pool.background[pool.ys[7] : pool.ys[7] + 28, pool.xs[7] : pool.xs[7] + 28].astype(int)
    pixels = np.rint(255 * parts["test"].modalities[1].natural(pool.gather(torch.tensor([7])))[0])
    assert (pixels == abs(crop.transpose(2, 0, 1) - pool.items[7].astype(int))).all()
    again = load("polyfashion", "train", path=tmp_path, seed=5)
    assert {item.tobytes() for item in again.pools["m0"].items} == shown["train"]  # type: ignore[union-attr]


def test_polyfashion_says_where_its_files_come_from(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="package dataset-fashion-mnist"):
        load("polyfashion", "train", path=tmp_path)
