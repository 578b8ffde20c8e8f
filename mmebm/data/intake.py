"""Files as people have them, photographs, tables, texts and arrays, made into a folder that :func:`mmebm.data.folder`
reads: what ``mmebm init`` does."""

from __future__ import annotations

import csv
import io
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
FEW_WORDS: Final = 100  # distinct strings, at most, that can be words of a text
REPEATS: Final = 5  # of each word, on average; strings that repeat less are captions
DEVIATIONS: Final = 3.0  # of a vector's values that become 1: the rest lies beyond the decoder's range
LARGEST: Final = 64  # side of an image that is kept as it is
SMALL: Final = 32  # side of the squares that larger images, or those of several sizes, become
NO_NUMBER: Final = ("", "na", "n/a", "nan", "null", "none", "-", "?")  # in a column of numbers: a missing one
NUMBERS: Final = 0.9  # share of a column's cells that are numbers, beyond which the others are mistakes and not words


@dataclass(frozen=True)
class Part:
    """One modality, or the labels, as it was found: ``rows`` in order, or by key where files have names; ``present``
    says which are there, all where it is None."""

    name: str
    rows: Array
    keys: tuple[str, ...] = ()
    source: str = ""
    present: NDArray[np.bool_] | None = None


def has_splits(folder: Path) -> bool:
    """Whether ``folder`` holds arrays by split already, as :func:`mmebm.data.folder` reads them."""
    return (folder / "train.npz").is_file() or any((folder / "train").glob("*.npy"))


def collect(folder: Path, size: int | None) -> tuple[list[Part], list[str]]:
    """The modalities in ``folder``: its images and each subfolder of images, tables (.csv, .tsv; numbers become one
    vector, each column of strings a modality), texts (.txt, a line a tuple; or a subfolder of them, or one beside each
    image) and arrays (.npy), paired by the names of files where they have any, else by row. An empty cell or line and
    NaN in an array mean that the tuple lacks the modality.

    Args:
        folder: where to look.
        size: side of the square images; None for their own where they all have one of at most 64, else 32.

    Returns:
        The modalities, in one order of rows; those with ``keys`` were paired by name. And what was not read.

    Raises:
        FileNotFoundError: where there is no such folder.
        ValueError: where nothing is found, a file cannot be read, or numbers of rows or names do not fit.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    parts: list[Part] = []
    skipped: list[str] = []
    own = image_files(folder)
    beside = _beside(folder, own)
    if own:
        parts += _pictures("image", "text", folder, own, size)
    for entry in sorted(folder.iterdir()):
        ending = entry.suffix.lower()
        if entry.name.startswith(".") or entry.name in own or entry in beside:
            continue
        if entry.is_dir():
            names, texts = image_files(entry), _texts(entry)
            if names:
                parts += _pictures(entry.name, f"{entry.name}-text", entry, names, size)
                read = {entry / name for name in names} | set(_beside(entry, names))
            elif texts:
                parts.append(_one_each(entry.name, texts, str(entry)))
                read = set(texts)
            else:
                skipped.append(f"{entry.name}{os.sep}")
                continue
            left = sum(file not in read for file in entry.iterdir() if file.name[0] != ".")
            skipped += [f"{left} of {entry.name}{os.sep}"] if left else []
        elif ending in (".csv", ".tsv"):
            parts.extend(_table(entry))
        elif ending == ".txt":
            lines = [line.strip() for line in _read(entry).rstrip("\n").split("\n")]
            parts.append(_strings(entry.stem, lines, (), str(entry)))
        elif ending == ".npy":
            parts.append(_array(entry))
        else:
            skipped.append(entry.name)
    if not parts:
        raise ValueError(
            f"{folder} holds no images, tables, texts or arrays: for each modality a subfolder of images (.jpg, .png, "
            f"...), a .csv, .txt or .npy{f'; it has {skipped[:5]}' if skipped else ''}"
        )
    names = [part.name for part in parts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        sources = [part.source for part in parts if part.name == twice[0]]
        raise ValueError(f"two modalities would be called {twice[0]!r}: {', '.join(sources)}")
    return _paired(parts), skipped


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 (byte {error.start}): save it in that encoding") from error


def _texts(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() == ".txt" and file.name[0] != ".")


def _beside(folder: Path, images: Sequence[str]) -> list[Path]:
    """The texts that lie beside images of the same names."""
    stems = {Path(name).stem for name in images}
    return [file for file in _texts(folder) if file.stem in stems]


def _strings(name: str, values: Sequence[str], keys: tuple[str, ...], source: str) -> Part:
    rows = np.array(values)
    return Part(name, rows, keys, source, None if all(values) else rows != "")


def _one_each(name: str, texts: Sequence[Path], source: str) -> Part:
    return _strings(name, [_read(text).strip() for text in texts], tuple(text.stem for text in texts), source)


def _array(file: Path) -> Part:
    try:
        rows = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{file} cannot be read as numbers or fixed-width strings: {error}") from error
    present = None
    if rows.dtype.kind == "f" and rows.ndim:
        lacking = np.isnan(rows.reshape(len(rows), -1)).any(1)
        present = ~lacking if lacking.any() else None
    elif rows.dtype.kind == "U" and rows.ndim == 1:
        present = rows != "" if (rows == "").any() else None
    return Part(file.stem, rows, (), str(file), present)


def _pictures(name: str, text: str, folder: Path, names: Sequence[str], size: int | None) -> list[Part]:
    """The images of a folder, and the texts beside them."""
    parts, beside = [_images(name, folder, names, size)], _beside(folder, names)
    return parts + ([_one_each(text, beside, str(folder))] if beside else [])


def _images(name: str, folder: Path, names: Sequence[str], size: int | None) -> Part:
    picture = pillow()

    def resized(image: Array, side: int) -> Array:
        upright = picture.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
        return np.asarray(upright.resize((side, side), picture.Resampling.BILINEAR)).transpose(2, 0, 1)

    def read(file: Path) -> tuple[Array, bool]:
        """The image, and whether it still has its own size. At once, so that only small ones are held."""
        image = read_image(file)
        if size is None and max(image.shape[1:]) <= LARGEST:
            return image, True
        return resized(image, size or SMALL), False

    found = list(read_all([folder / file for file in names], read))
    if not all(own for _, own in found) or len({image.shape for image, _ in found}) > 1:
        found = [(resized(image, SMALL) if own else image, False) for image, own in found]
    rows = np.stack([image for image, _ in found])
    if (rows == rows[:, :1]).all():
        rows = rows[:, :1]
    return Part(name, rows, tuple(Path(file).stem for file in names), str(folder))


def _table(file: Path) -> list[Part]:
    """The numbers of a table as one vector, each column of strings by itself, and a column ``label`` as the labels."""
    text = _read(file)
    first = text.partition("\n")[0]
    delimiter = "\t" if file.suffix.lower() == ".tsv" else max(",;\t", key=first.count)
    table = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row]
    if len(table) < 2 or any(len(row) != len(table[0]) for row in table):
        wrong = next((i for i, row in enumerate(table) if len(row) != len(table[0])), 0)
        raise ValueError(
            f"{file} must have a line of names and as many fields in every row, at least one row; see row {wrong + 1}"
        )
    columns = {name.strip(): [row[i].strip() for row in table[1:]] for i, name in enumerate(table[0])}
    if len(columns) < len(table[0]):
        raise ValueError(f"{file} has two columns of one name: {', '.join(table[0])}")
    keys: tuple[str, ...] = ()
    numbers: dict[str, NDArray[np.float64]] = {}
    parts = []
    for name, values in columns.items():
        source, lower = f"{file}, column {name}", name.lower()
        if lower in ("file", "filename", "image", "id", "key") and len(set(values)) == len(values):
            keys = tuple(Path(value).stem for value in values)
        elif lower in ("label", "class"):
            parts.append(Part("labels", np.array(values), (), source))
        elif (found := _numbers(values, source, decimal="," if delimiter == ";" else ".")) is not None:
            numbers[name] = found
        elif any(values):
            parts.append(_strings(name, values, (), source))
        else:
            raise ValueError(f"{source} is empty: delete it")
    if numbers:
        vectors = np.array(list(numbers.values())).T
        there = ~np.isnan(vectors).any(1)
        if not there.any():
            raise ValueError(f"{file}: every row lacks one of its numbers: delete the columns that are mostly empty")
        vectors = np.where(there[:, None], vectors, vectors[there].mean(0))
        source = f"{file}: {', '.join(numbers)}"
        parts.insert(0, Part(file.stem, vectors, (), source, None if there.all() else there))
    return [Part(part.name, part.rows, keys, part.source, part.present) for part in parts]


def _numbers(values: Sequence[str], source: str, *, decimal: str) -> NDArray[np.float64] | None:
    """A column of numbers, NaN where one is missing; None for one of words.

    Raises:
        ValueError: where nearly all are numbers and some are not, or not finite.
    """
    found, wrong = [], []
    for row, value in enumerate(values):
        try:
            number = float("nan") if value.lower() in NO_NUMBER else float(value.replace(decimal, "."))
            wrong += [row] if np.isinf(number) else []
        except ValueError:
            number = float("nan")
            wrong.append(row)
        found.append(number)
    good = sum(map(np.isfinite, found))
    if not good or (wrong and good < NUMBERS * (good + len(wrong))):
        return None
    if wrong:
        raise ValueError(
            f"{source} holds {good} numbers and, in row {wrong[0] + 2} of the file, {values[wrong[0]]!r}: write a "
            "number, or leave the cell empty where it is missing"
        )
    return np.array(found)


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
        rows = np.array([at[key] for key in order]) if part.keys else np.arange(total)
        present = None if part.present is None else part.present[rows]
        out.append(Part(part.name, part.rows[rows], tuple(order) if part.keys else (), part.source, present))
    modalities = [part for part in out if part.name != "labels"]
    nothing = np.logical_and.reduce(
        [np.zeros(total, bool) if part.present is None else ~part.present for part in modalities]
    )
    if modalities and nothing.any():
        raise ValueError(f"row {np.argmax(nothing) + 1} has no modality at all: delete it")
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
    arrays: dict[str, dict[str, Array]] = {split: {} for split in which}
    for part in parts:
        for split, at in which.items():
            arrays[split][part.name] = part.rows[at]
            if part.present is not None:
                arrays[split][f"{part.name}.present"] = part.present[at]
    labels = next((part.rows for part in parts if part.name == "labels"), None)
    for split, by_name in arrays.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        if labels is not None:
            classes = _classes(labels)
            number = {name: k for k, name in enumerate(classes)}
            by_name["labels"] = np.array([number.get(str(value), -1) for value in by_name["labels"]], dtype=np.int64)
        for name, values in by_name.items():
            np.save(folder / split / f"{name}.npy", values)
    return arrays


def _classes(labels: Array) -> list[str]:
    return sorted({str(value) for value in labels} - {""}, key=lambda value: (len(value), value))


def describe_array(name: str, train: Array, other: Array | None = None) -> tuple[dict[str, Any], str]:
    """How an array of a train split is read: its entry in ``meta.json``, and that in words.

    Raises:
        ValueError: for what is neither numbers nor strings, or not finite.
    """
    n, kind = len(train), train.dtype.kind
    if kind == "U":
        distinct = sorted(set(train.tolist()) | set(() if other is None else other.tolist()))
        if "" in distinct:
            raise ValueError(f"{name}: a row is empty; {name}.present.npy says what is missing (docs/data.md)")
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
        there, other = (_there(arrays.get(split, {}), name) for split in ("train", "test"))
        if there is None or not len(there):
            raise ValueError(f"no tuple to train on has {name!r}: leave it out")
        modalities[name], said[name] = describe_array(name, there, other)
        if lacking := len(train) - len(there):
            said[name] += f"; {lacking} of {len(train)} tuples lack{'s' if lacking == 1 else ''} it"
    meta = {**({"classes": list(classes)} if classes else {}), "modalities": modalities}
    text = json.dumps(meta, indent=2, ensure_ascii=False)
    (folder / "meta.json").write_text(text + "\n", encoding="utf-8")
    return said


def _there(arrays: Mapping[str, Array], name: str) -> Array | None:
    """The rows of a modality that are present; None where the split has none."""
    rows, mark = arrays.get(name), arrays.get(f"{name}.present")
    table = arrays.get("present")
    if rows is None or (mark is None and table is None):
        return rows
    if mark is None and table is not None:  # a column for each modality, in the order of their names
        names = sorted(key for key in arrays if key not in ("labels", "present"))
        mark = table[:, names.index(name)]
    return rows[np.asarray(mark, dtype=bool)]


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
