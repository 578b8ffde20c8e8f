"""Files as people have them, photographs, tables, texts and arrays, made into a folder that :func:`mmebm.data.folder`
reads: what ``mmebm init`` does."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mmebm.data.captions import image_files
from mmebm.data.images import read_all, read_image
from mmebm.data.packages import pillow
from mmebm.data.pairing import choose
from mmebm.data.words import tokens

__all__ = ["Part", "collect", "describe_array", "has_splits", "write_meta", "write_splits"]

Array = NDArray[Any]
IMAGES: Final = (".jpg", ".jpeg", ".png")
FEW_WORDS: Final = 100  # distinct strings, at most, that can be words of a text
REPEATS: Final = 5  # of each word, on average; strings that repeat less are captions
DEVIATIONS: Final = 3.0  # of a vector's values that become 1: the rest lies beyond the decoder's range
LARGEST: Final = 64  # side of an image that is kept as it is


@dataclass(frozen=True)
class Part:
    """One modality, or the labels, as it was found: ``rows`` in order, or by key where files have names."""

    name: str
    rows: Array
    keys: tuple[str, ...] = ()
    source: str = ""


def has_splits(folder: Path) -> bool:
    """Whether ``folder`` holds arrays by split already, as :func:`mmebm.data.folder` reads them."""
    return (folder / "train.npz").is_file() or any((folder / "train").glob("*.npy"))


def collect(folder: Path, size: int | None) -> list[Part]:
    """The modalities in ``folder``: its images and each subfolder of images, tables (.csv, .tsv; numbers become one
    vector, each column of strings a modality), texts (.txt, a line a tuple; or a subfolder of them) and arrays (.npy),
    paired by the names of files where they have any, else by row.

    Args:
        folder: where to look.
        size: side of the square images; None for their own where they all have one of at most 64, else 32.

    Raises:
        FileNotFoundError: where there is no such folder.
        ValueError: where nothing is found, a file cannot be read, or numbers of rows or names do not fit.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    parts: list[Part] = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            names, texts = image_files(entry), sorted(entry.glob("*.txt"))
            if names:
                parts.append(_images(entry.name, entry, names, size))
            elif texts:
                read = np.array([text.read_text(encoding="utf-8", errors="replace").strip() for text in texts])
                parts.append(Part(entry.name, read, tuple(text.stem for text in texts), str(entry)))
        elif entry.suffix in (".csv", ".tsv"):
            parts.extend(_table(entry))
        elif entry.suffix == ".txt":
            lines = entry.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
            parts.append(Part(entry.stem, np.array([line.strip() for line in lines]), (), str(entry)))
        elif entry.suffix == ".npy":
            try:
                parts.append(Part(entry.stem, np.load(entry, allow_pickle=False), (), str(entry)))
            except (ValueError, EOFError, OSError) as error:
                raise ValueError(f"{entry} cannot be read as numbers or fixed-width strings: {error}") from error
    own = image_files(folder)
    if own:
        parts.append(_images("image", folder, own, size))
    if not parts:
        raise ValueError(
            f"{folder} holds no images, tables, texts or arrays: for each modality a subfolder of .jpg or "
            ".png, a .csv, .txt or .npy"
        )
    names = [part.name for part in parts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        sources = [part.source for part in parts if part.name == twice[0]]
        raise ValueError(f"two modalities would be called {twice[0]!r}: {', '.join(sources)}")
    return _paired(parts)


def _images(name: str, folder: Path, names: Sequence[str], size: int | None) -> Part:
    images = list(read_all([folder / file for file in names], read_image))
    shapes = {image.shape[1:] for image in images}
    if size is None:
        alone = next(iter(shapes)) if len(shapes) == 1 else (LARGEST + 1,)
        size = None if max(alone) <= LARGEST else 32
    if size is not None:
        picture = pillow()
        images = [
            np.asarray(
                picture.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).resize(
                    (size, size), picture.Resampling.BILINEAR
                )
            ).transpose(2, 0, 1)
            for image in images
        ]
    rows = np.stack(images)
    if (rows == rows[:, :1]).all():
        rows = rows[:, :1]
    return Part(name, rows, tuple(Path(file).stem for file in names), str(folder))


def _table(file: Path) -> list[Part]:
    """The numbers of a table as one vector, each column of strings by itself, and a column ``label`` as the labels."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        table = list(csv.reader(lines, delimiter="\t" if file.suffix == ".tsv" else ","))
    table = [row for row in table if row]
    if len(table) < 2 or any(len(row) != len(table[0]) for row in table):
        wrong = next((i for i, row in enumerate(table) if len(row) != len(table[0])), 0)
        raise ValueError(
            f"{file} must have a line of names and as many fields in every row, at least one row; see row {wrong + 1}"
        )
    columns = {name.strip(): [row[i].strip() for row in table[1:]] for i, name in enumerate(table[0])}
    keys: tuple[str, ...] = ()
    numbers: dict[str, list[float]] = {}
    parts = []
    for name, values in columns.items():
        found = _numbers(values)
        lower = name.lower()
        if lower in ("file", "filename", "image", "id", "key") and len(set(values)) == len(values):
            keys = tuple(Path(value).stem for value in values)
        elif lower in ("label", "class"):
            parts.append(Part("labels", np.array(values), (), f"{file}, column {name}"))
        elif found is not None:
            numbers[name] = found
        else:
            parts.append(Part(name, np.array(values), (), f"{file}, column {name}"))
    if numbers:
        parts.insert(0, Part(file.stem, np.array(list(numbers.values())).T, (), f"{file}: {', '.join(numbers)}"))
    return [Part(part.name, part.rows, keys, part.source) for part in parts]


def _numbers(values: Sequence[str]) -> list[float] | None:
    try:
        found = [float(value) for value in values]
    except ValueError:
        return None
    return found if np.isfinite(found).all() else None


def _paired(parts: Sequence[Part]) -> list[Part]:
    """All parts in one order of rows."""
    named = [part for part in parts if part.keys]
    order = list(named[0].keys) if named else []
    if named:
        order = sorted(order)
        for part in named:
            if len(set(part.keys)) != len(part.keys):
                raise ValueError(f"{part.source} has a name twice, files are paired by their names without ending")
            lacking, more = sorted(set(order) - set(part.keys)), sorted(set(part.keys) - set(order))
            if lacking or more:
                which = f"lacks {lacking[:3]}" if lacking else f"has {more[:3]} beyond"
                raise ValueError(
                    f"{part.source} {which} what {named[0].source} has: every tuple needs all modalities, "
                    "paired by the names of their files"
                )
    total = len(order) or len(parts[0].rows)
    out = []
    for part in parts:
        if part.rows.ndim < 1 or len(part.rows) != total:
            raise ValueError(
                f"{part.source} has {len(part.rows) if part.rows.ndim else 0} rows, and "
                f"{(named or list(parts))[0].source} {total}: a row for each tuple"
            )
        at = {key: i for i, key in enumerate(part.keys)}
        rows = part.rows[[at[key] for key in order]] if part.keys else part.rows
        out.append(Part(part.name, rows, (), part.source))
    return out


def write_splits(parts: Sequence[Part], folder: Path, *, test: float, seed: int) -> dict[str, dict[str, Array]]:
    """Writes ``folder/train`` and ``folder/test``; returns what went where.

    Raises:
        ValueError: for fewer than two rows, or labels that are missing in some.
    """
    total = len(parts[0].rows)
    if total < 2:
        raise ValueError(f"two tuples at least are needed, one to train and one to test, got {total}")
    held = min(max(round(test * total), 1), total - 1)
    rows = np.sort(choose(held, total, str(folder), seed, "init", "test"))
    which = {"test": rows, "train": np.setdiff1d(np.arange(total), rows)}
    arrays = {split: {part.name: part.rows[at] for part in parts} for split, at in which.items()}
    labels = next((part.rows for part in parts if part.name == "labels"), None)
    for split, by_name in arrays.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        if labels is not None:
            classes = _classes(labels)
            number = {name: k for k, name in enumerate(classes)}
            by_name["labels"] = np.array([number[str(value)] for value in by_name["labels"]], dtype=np.int64)
        for name, values in by_name.items():
            np.save(folder / split / f"{name}.npy", values)
    return arrays


def _classes(labels: Array) -> list[str]:
    return sorted({str(value) for value in labels}, key=lambda value: (len(value), value))


def describe_array(name: str, train: Array, other: Array | None = None) -> tuple[dict[str, Any], str]:
    """How an array of a train split is read: its entry in ``meta.json``, and that in words.

    Raises:
        ValueError: for what is neither numbers nor strings, or not finite.
    """
    n, kind = len(train), train.dtype.kind
    if kind == "U":
        distinct = sorted(
            {text for text in train.tolist() if text} | set(() if other is None else other.tolist()) - {""}
        )
        if len(distinct) <= FEW_WORDS and len(distinct) * REPEATS <= n:
            return {"kind": "text", "words": distinct}, f"{len(distinct)} words: {', '.join(distinct[:8])}"
        known = len({word for text in train.tolist() for word in tokens(text)})
        return {"kind": "caption"}, (
            f"captions, {len(distinct)} distinct ones of {known} words; a codec is fitted to them when training starts"
        )
    if kind not in "fiub":
        raise ValueError(f"{name}: arrays hold numbers or strings, got {train.dtype}")
    if not np.isfinite(train).all():
        where = np.argwhere(~np.isfinite(train.reshape(n, -1)).all(1))[0, 0]
        raise ValueError(
            f"{name}: row {where} holds a value that is not finite; {name}.present.npy says what is "
            "missing (docs/data.md)"
        )
    if train.ndim in (3, 4):
        settings: dict[str, Any] = {"kind": "image"}
        if train.ndim == 4 and train.shape[1] not in (1, 3) and train.shape[3] in (1, 3, 4):
            settings["layout"] = "HWC"
        low, high = float(train.min()), float(train.max())
        said = f"images {'x'.join(map(str, train.shape[1:]))}"
        if train.dtype == np.uint8 or (kind == "f" and low >= 0 and high <= 1):
            return settings, f"{said}, {'0 to 255' if train.dtype == np.uint8 else '0 to 1'}"
        if other is not None and other.size:
            low, high = min(low, float(other.min())), max(high, float(other.max()))
        settings["range"] = [low, high if high > low else low + 1]
        return settings, f"{said}, {low:g} to {high:g}, which become black and white"
    flat = train.reshape(n, -1).astype(np.float64)
    mean, spread = flat.mean(0), flat.std(0)
    # of a distribution with far tails so much that all but a hundredth is inside
    reach = np.maximum(DEVIATIONS * spread, np.quantile(np.abs(flat - mean), 0.99, axis=0))
    reach = np.where(spread > 1e-12 * np.maximum(np.abs(mean), 1), reach, 1.0)  # a constant has none
    # seven digits say it as well, and are read by people
    low, high = (np.array([float(f"{v:.7g}") for v in end]) for end in (mean - reach, mean + reach))
    settings = {"kind": "vector", "range": [low.tolist(), high.tolist()]}
    return settings, (
        f"vectors of {flat.shape[1]} numbers, {flat.min():g} to {flat.max():g}: standardised, "
        f"{DEVIATIONS:g} standard deviations become 1"
    )


def write_meta(folder: Path, arrays: Mapping[str, Mapping[str, Array]], classes: Sequence[str] = ()) -> dict[str, str]:
    """Writes ``meta.json`` for the arrays of both splits; returns each modality's reading in words."""
    modalities, said = {}, {}
    for name, train in arrays["train"].items():
        if name == "labels" or name == "present" or name.endswith(".present"):
            continue
        modalities[name], said[name] = describe_array(name, train, arrays.get("test", {}).get(name))
    meta = {**({"classes": list(classes)} if classes else {}), "modalities": modalities}
    text = json.dumps(meta, indent=2, ensure_ascii=False)
    (folder / "meta.json").write_text(text + "\n", encoding="utf-8")
    return said


def labelled_classes(parts: Sequence[Part]) -> list[str]:
    """The names of the classes of what :func:`collect` found; none without labels."""
    return next((_classes(part.rows) for part in parts if part.name == "labels"), [])


def splits_of(folder: Path) -> dict[str, dict[str, Array]]:
    """The arrays by split of a folder that :func:`has_splits`.

    Raises:
        ValueError: where one cannot be read, or there is no test split.
    """
    from mmebm.data.folder import _arrays

    found = {split: _arrays(folder, split) for split in ("train", "test")}
    if found["test"] is None:
        raise ValueError(
            f"{folder} has a train split and no test split, which is what a model is judged on: put some "
            f"rows into {folder / 'test'}{os.sep}"
        )
    return {split: {name: array.values for name, array in (of or {}).items()} for split, of in found.items()}


def named_classes(folder: Path) -> list[str]:
    """The classes that a ``meta.json`` in ``folder`` names; none where there is none."""
    from mmebm.data.folder import _meta

    return list(_meta(folder)[1].get("classes", []))
