"""Files as people have them, photographs, tables, texts and arrays, made into a folder that :func:`mmebm.data.folder`
reads: what ``mmebm init`` does."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import tempfile
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch import nn

from mmebm.data.captions import IMAGES, image_files
from mmebm.data.images import read_all, read_image
from mmebm.data.packages import pillow
from mmebm.data.pairing import choose
from mmebm.data.words import tokens
from mmebm.files import write_atomically

__all__ = ["Part", "collect", "describe", "describe_array", "has_splits", "in_the_way", "split_rows", "write"]

Array = NDArray[Any]
FEW_WORDS: Final = 100  # distinct strings, at most, that can be words of a text
REPEATS: Final = 5  # of each word, on average; strings that repeat less are captions
DEVIATIONS: Final = 3.0  # of a vector's values that become 1: the rest lies beyond the decoder's range
LARGEST: Final = 64  # side of an image that is kept as it is
SMALL: Final = 32  # side of the squares that larger images, or those of several sizes, become
NO_NUMBER: Final = ("", "na", "n/a", "nan", "null", "none", "-", "?")  # in a column of numbers: a missing one
TOO_LARGE: Final = 1e30  # float32 ends at 3e38, and what samples say of a vector may go beyond the data
KEYS: Final = ("file", "filename", "image", "id", "key")  # columns that say which tuple a row belongs to
CLASSES: Final = ("label", "class")
SPLITS: Final = ("train", "test", "validation")
NUMBERS: Final = 0.9  # share of a column's cells that are numbers, beyond which the others are mistakes and not words


@dataclass(frozen=True)
class Part:
    """One modality, or the ``labels``, as it was found: ``rows`` in order, or by key where files have names;
    ``present`` says which are there, all where it is None."""

    name: str
    rows: Array
    keys: tuple[str, ...] = ()
    source: str = ""
    present: NDArray[np.bool_] | None = None
    labels: bool = False
    key: str = ""  # the column of a table that holds the keys


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
    tables: list[Path] = []
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
        elif not entry.is_file():  # a pipe would be waited for
            skipped.append(entry.name)
        elif ending in (".csv", ".tsv"):
            tables.append(entry)
        elif ending == ".txt":
            lines = [line.strip() for line in _read(entry).rstrip("\n").split("\n")]
            parts.append(_strings(entry.stem, lines, (), str(entry)))
        elif ending == ".npy":
            parts.append(_array(entry))
        else:
            skipped.append(entry.name)
    of_files = {key for part in parts for key in part.keys}
    parts += _tables([_columns(file) for file in tables], of_files)
    if not parts:
        raise ValueError(
            f"{folder} holds no images, tables, texts or arrays: for each modality a subfolder of images (.jpg, .png, "
            f"...), a .csv, .txt or .npy{f'; it has {skipped[:5]}' if skipped else ''}"
        )
    for part in parts:
        _check_name(part)
    names = [part.name for part in parts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        sources = [part.source for part in parts if part.name == twice[0]]
        raise ValueError(f"two modalities would be called {twice[0]!r}: {', '.join(sources)}")
    return _paired(parts, files=bool(of_files)), skipped


def _check_name(part: Part) -> None:
    """That the name, a column's or a file's, can be that of a modality: of a file in ``train/`` and of a network."""
    name = part.name
    taken = name in ("labels", "present") and not part.labels
    if not name or taken or hasattr(nn.ModuleDict(), name) or any(c in "./\\" or c < " " for c in name):
        raise ValueError(
            f"{part.source}: a modality cannot be called {name!r}, rename it: names are not empty, without dots and "
            'slashes, and some are taken, such as "present", "items" and "type"; "labels" are a column label or class'
        )
    if len(name.encode()) > 200:
        raise ValueError(f"{part.source}: the name of a modality has at most 200 bytes, shorten {name:.40}...")


def _key(name: str) -> str:
    """The name of a file without the ending of an image or a text, in one spelling of its accents."""
    path = Path(name)
    return unicodedata.normalize("NFC", path.stem if path.suffix.lower() in (*IMAGES, ".txt") else path.name)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 (byte {error.start}): save it in that encoding") from error


def _texts(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() == ".txt" and file.name[0] != ".")


def _beside(folder: Path, images: Sequence[str]) -> list[Path]:
    """The texts that lie beside images of the same names."""
    stems = {_key(name) for name in images}
    return [file for file in _texts(folder) if _key(file.name) in stems]


def _strings(name: str, values: Sequence[str], keys: tuple[str, ...], source: str) -> Part:
    rows = np.array(values)
    return Part(name, rows, keys, source, None if all(values) else rows != "")


def _one_each(name: str, texts: Sequence[Path], source: str) -> Part:
    return _strings(name, [_read(text).strip() for text in texts], tuple(_key(text.name) for text in texts), source)


def _array(file: Path) -> Part:
    try:
        rows = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{file} cannot be read as numbers or fixed-width strings: {error}") from error
    if not rows.ndim or not rows.size:
        raise ValueError(f"{file} must hold a row for each tuple, got shape {rows.shape}")
    present = None
    if rows.dtype.kind == "f":
        _check_finite(str(file), np.where(np.isnan(rows), 0, rows))
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
    return Part(name, rows, tuple(map(_key, names)), str(folder))


@dataclass(frozen=True)
class _Table:
    """The columns of a table by name, and the line of the file on which each row begins."""

    file: Path
    columns: dict[str, list[str]]
    lines: list[int]
    decimal: str

    def fits(self, names: set[str]) -> list[str]:
        """The columns that say which of the files ``names`` a row is of, the best first."""

        def share(column: str) -> float:
            keys = set(map(_key, self.columns[column]))
            known = column.lower() in KEYS
            # numbers may be those of the files by chance, all of them in any order hardly
            if not known and keys != names:
                keys = {key for key in keys if not key.isdigit()}
            found = len(keys & names) / len(names)
            return found + known if found > 0 and (known or found >= 0.5) else 0.0

        return sorted((column for column in self.columns if share(column)), key=share, reverse=True)


def _columns(file: Path) -> _Table:
    """Reads a table.

    Raises:
        ValueError: naming the line, where it is none.
    """
    text = _read(file)
    first = next((line for line in text.splitlines() if line.strip()), "")
    bare = re.sub('"[^"]*"', "", first)
    delimiter = "\t" if file.suffix.lower() == ".tsv" else max(",;\t", key=bare.count)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    table, lines, begin = [], [], 1
    try:
        for row in reader:
            if row:
                table.append(row)
                lines.append(begin)
            begin = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{file}: the row that begins in line {begin} has a quote too few or too many ({error})"
        ) from error
    wrong = [line for row, line in zip(table, lines, strict=True) if len(row) != len(table[0])]
    if len(table) < 2 or wrong:
        raise ValueError(
            f"{file} must have a line of names and as many fields in every row, at least one row; see line "
            f"{wrong[0] if wrong else 1}"
        )
    if not all(name.strip() for name in table[0]):
        raise ValueError(f"{file} has a column without a name: give it one, or delete it")
    columns = {name.strip(): [row[i].strip() for row in table[1:]] for i, name in enumerate(table[0])}
    if len(columns) < len(table[0]):
        raise ValueError(f"{file} has two columns of one name: {', '.join(table[0])}")
    return _Table(file, columns, lines[1:], "," if delimiter == ";" else ".")


def _tables(tables: Sequence[_Table], names: set[str]) -> list[Part]:
    """The modalities of all tables, by the column that holds the ``names`` of the files; without files by a column of
    :data:`KEYS`, where one names each row once, which the others then go by.

    Raises:
        ValueError: where such a column names a row twice, or it cannot be told which column it is.
    """

    def named(table: _Table) -> list[str]:
        each = {name: values for name, values in table.columns.items() if name.lower() in KEYS}
        return [name for name, values in each.items() if len(set(map(_key, values))) == len(values)]

    parts = []
    for table in tables if names else sorted(tables, key=lambda table: not named(table)):
        fits = table.fits(names) if names else []
        key = (fits or named(table) or [None])[0]
        if key is not None:
            keys, seen = list(map(_key, table.columns[key])), {}
            for value, line in zip(keys, table.lines, strict=True):
                if value in seen:
                    raise ValueError(
                        f"{table.file}, column {key}: {value!r} is in line {seen[value]} and in line {line}: every "
                        "tuple has one row"
                    )
                seen[value] = line
            for other in fits:
                theirs, known = list(map(_key, table.columns[other])), (other.lower() in KEYS, key.lower() in KEYS)
                if theirs != keys and sorted(theirs) == sorted(keys) and known != (False, True):
                    raise ValueError(
                        f"{table.file}: the columns {key} and {other} both hold the names of the files, in another "
                        "order: call the one that says which tuple a row belongs to 'id', and the other anything but "
                        f"{', '.join(KEYS)}"
                    )
            names = names or set(keys)
        parts += _modalities(table, key)
    return parts


def _modalities(table: _Table, key: str | None) -> list[Part]:
    """The numbers of a table as one vector, each column of strings by itself, and a column ``label`` as the labels;
    ``key`` names the rows."""
    file, numbers = table.file, {}
    parts: list[Part] = []
    for name, values in table.columns.items():
        source, lower = f"{file}, column {name}", name.lower()
        if name == key:
            continue
        if lower in CLASSES:
            parts.append(Part("labels", np.array(values), (), source, labels=True))
        elif (found := _numbers(values, source, table.lines, table.decimal)) is not None:
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
    keys = () if key is None else tuple(map(_key, table.columns[key]))
    return [replace(part, keys=keys, key=key or "") for part in parts]


def _numbers(values: Sequence[str], source: str, lines: Sequence[int], decimal: str) -> NDArray[np.float64] | None:
    """A column of numbers, NaN where one is missing; None for one of words. ``lines`` are those of its file.

    Raises:
        ValueError: where nearly all are numbers and some are not, or not finite.
    """
    found, wrong = [], []
    for row, value in enumerate(values):
        try:
            number = float("nan") if value.lower() in NO_NUMBER else float(value.replace(decimal, "."))
            wrong += [row] if abs(number) >= TOO_LARGE else []
        except ValueError:
            number = float("nan")
            wrong.append(row)
        found.append(number)
    good, said = sum(map(np.isfinite, found)), sum(value.lower() not in NO_NUMBER for value in values)
    if not good or good < NUMBERS * said:
        return None
    if wrong:
        raise ValueError(
            f"{source} holds {good} numbers and, in line {lines[wrong[0]]} of the file, {values[wrong[0]]!r}: write a "
            f"number, or leave the cell empty where it is missing; numbers end at {TOO_LARGE:g}"
        )
    return np.array(found)


def _natural(name: str) -> list[Any]:
    """Orders names by the numbers in them, 2 before 10."""
    return [int(piece) if piece.isdecimal() else piece for piece in re.split(r"(\d+)", name)]


def _paired(parts: Sequence[Part], *, files: bool) -> list[Part]:
    """All parts in one order of rows: that of the names of ``files``, or of the first table that names its rows."""
    named, loose = ([part for part in parts if bool(part.keys) is with_keys] for with_keys in (True, False))
    order = list(named[0].keys) if named else []
    if named:
        order = sorted(order) if files else order
        others = [sorted(order, key=_natural)] if files else [list(part.keys) for part in named]
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
        for other in others if loose else ():
            if other != order:
                at = next(i for i, pair in enumerate(zip(order, other, strict=True)) if pair[0] != pair[1])
                raise ValueError(
                    f"{loose[0].source} goes by row, and which row is that of {order[at]!r} is not clear: in "
                    f"{named[0].source} row {at + 1} is {order[at]!r} or, in another order, {other[at]!r}. Name files "
                    "with as many digits each (01, 02, ...), or pair by name: a table with a column id"
                )
    total = len(order) or len(parts[0].rows)
    out = []
    for part in parts:
        if len(part.rows) != total:
            raise ValueError(
                f"{part.source} has {len(part.rows)} rows, and {(named or list(parts))[0].source} {total}: a row for "
                "each tuple"
            )
        at = {key: i for i, key in enumerate(part.keys)}
        rows = np.array([at[key] for key in order]) if part.keys else np.arange(total)
        present = None if part.present is None else part.present[rows]
        out.append(replace(part, rows=part.rows[rows], keys=tuple(order) if part.keys else (), present=present))
    modalities = [part for part in out if not part.labels]
    nothing = np.logical_and.reduce(
        [np.zeros(total, bool) if part.present is None else ~part.present for part in modalities]
    )
    if modalities and nothing.any():
        row = int(np.argmax(nothing))
        raise ValueError(f"{repr(order[row]) if order else f'row {row + 1}'} has no modality at all: delete it")
    return out


def split_rows(parts: Sequence[Part], folder: Path, *, test: float, seed: int) -> dict[str, dict[str, Array]]:
    """The arrays of the splits that :func:`write` puts into ``folder``.

    Raises:
        ValueError: for fewer than two rows.
    """
    total = len(parts[0].rows)
    if total < 2:
        raise ValueError(f"two tuples at least are needed, one to train and one to test, got {total}")
    held = min(max(round(test * total), 1), total - 1)
    rows = np.sort(choose(held, total, str(folder), seed, "init", "test"))
    which = {"test": rows, "train": np.setdiff1d(np.arange(total), rows)}
    number = {name: k for k, name in enumerate(labelled_classes(parts))}
    arrays: dict[str, dict[str, Array]] = {split: {} for split in which}
    for part in parts:
        values = part.rows
        if part.labels:
            values = np.array([number.get(str(value), -1) for value in values], dtype=np.int64)
        for split, at in which.items():
            arrays[split][part.name] = values[at]
            if part.present is not None:
                arrays[split][f"{part.name}.present"] = part.present[at]
    return arrays


def in_the_way(folder: Path, *, force: bool) -> Path | None:
    """What lies in ``folder`` where :func:`write` would write; with ``force`` what no ``meta.json`` there says that
    :func:`write` wrote."""
    meta = folder / "meta.json"
    there = [file for name in SPLITS for file in (folder / f"{name}.npz", *_arrays_in(folder / name)) if file.exists()]
    if not force:
        return next((file for file in (meta, *there) if file.exists()), None)
    ours = _written(folder)
    return next((file for file in there if file not in ours), None)


def _arrays_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*") if file.name[0] != ".")


def _written(folder: Path) -> set[Path]:
    """The arrays in ``folder`` that its ``meta.json`` speaks of."""
    from mmebm.data.folder import _meta

    names = [name for modality in _meta(folder)[1].get("modalities", {}) for name in (modality, f"{modality}.present")]
    files = {folder / split / f"{name}.npy" for split in SPLITS[:2] for name in (*names, "labels")}
    return files & {file for split in SPLITS for file in _arrays_in(folder / split)}


def write(folder: Path, arrays: Mapping[str, Mapping[str, Array]], meta: Mapping[str, Any]) -> None:
    """Writes the arrays of all splits and ``meta.json``, in place of those of an earlier time."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".init-", dir=folder) as fresh:
        for split, by_name in arrays.items():
            for name, values in by_name.items():
                np.save(Path(fresh, f"{split}-{name}.npy"), values)
        for file in _written(folder):
            file.unlink()
        for split, by_name in arrays.items():
            (folder / split).mkdir(exist_ok=True)
            for name in by_name:
                os.replace(Path(fresh, f"{split}-{name}.npy"), folder / split / f"{name}.npy")
    write_meta(folder, meta)


def write_meta(folder: Path, meta: Mapping[str, Any]) -> None:
    """Writes ``meta.json``."""
    text = json.dumps(meta, indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / "meta.json", lambda file: file.write(text.encode()))


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
    if train.ndim > 4:
        raise ValueError(f"{name} has shape {train.shape}: an array holds images (n, C, H, W) or vectors (n, D)")
    if train.ndim in (3, 4):
        settings: dict[str, Any] = {"kind": "image"}
        if train.ndim == 4 and train.shape[1] not in (1, 3) and train.shape[3] in (1, 2, 3, 4):
            settings["layout"] = "HWC"
        elif train.ndim == 4 and train.shape[1] > 4:
            raise ValueError(
                f"{name} has shape {train.shape}: which of its sizes is that of the channels, {train.shape[1]} or "
                f"{train.shape[3]}? Images are (n, C, H, W) or (n, H, W, C) with at most 4 channels; more are read "
                'where a meta.json says "kind": "image" and their "layout" (docs/data.md)'
            )
        low, high = float(train.min()), float(train.max())
        said = f"images {'x'.join(map(str, train.shape[1:]))}"
        if train.dtype == np.uint8 or (kind == "f" and low >= 0 and high <= 1):
            return settings, f"{said}, {'0 to 255' if train.dtype == np.uint8 else '0 to 1'}"
        if other is not None and other.size:
            low, high = min(low, float(other.min())), max(high, float(other.max()))
        settings["range"] = [low, high if high > low else low + max(1, abs(low))]
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


def describe(
    arrays: Mapping[str, Mapping[str, Array]], classes: Sequence[str], sources: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """What ``meta.json`` says of the arrays of both splits, and each modality's reading in words; ``sources`` are what
    errors call them.

    Raises:
        ValueError: for arrays that cannot be read.
    """
    modalities, said = {}, {}
    for name, train in arrays["train"].items():
        if name in ("labels", "present", "items") or name.endswith(".present"):
            continue
        source = sources.get(name, name)
        _check_name(Part(name, train, (), source))
        if not train.ndim or not train.size:
            raise ValueError(f"{source} must hold a row for each tuple, got shape {train.shape}")
        there, other = (_there(arrays.get(split, {}), name) for split in ("train", "test"))
        if there is None or not len(there):
            raise ValueError(f"no tuple to train on has {name!r}: leave it out")
        for split, of in arrays.items():
            if name in of and of[name].dtype.kind == "f":
                _check_finite(f"{source}, {split}", of[name], _mark(of, name))
        modalities[name], said[name] = describe_array(source, there, other)
        if lacking := len(train) - len(there):
            said[name] += f"; {lacking} of {len(train)} tuples lack{'s' if lacking == 1 else ''} it"
    return {**({"classes": list(classes)} if classes else {}), "modalities": modalities}, said


def _check_finite(source: str, rows: Array, there: Array | None = None) -> None:
    """That the numbers of the rows that are ``there`` are some, and such that float32 holds them."""
    with np.errstate(invalid="ignore"):
        wrong = ~(np.abs(rows.reshape(len(rows), -1)) < TOO_LARGE).all(1)
    if there is not None:
        wrong &= there
    if wrong.any():
        raise ValueError(
            f"{source}: row {np.argmax(wrong)} (from 0) holds a value that is not finite, or beyond {TOO_LARGE:g}; "
            "where it is missing write NaN, or say so in a .present.npy (docs/data.md)"
        )


def _there(arrays: Mapping[str, Array], name: str) -> Array | None:
    """The rows of a modality that are present; None where the split has none."""
    rows, mark = arrays.get(name), _mark(arrays, name)
    return rows if rows is None or mark is None else rows[mark]


def _mark(arrays: Mapping[str, Array], name: str) -> NDArray[np.bool_] | None:
    """Which rows of a modality are present; None where all are."""
    mark, table = arrays.get(f"{name}.present"), arrays.get("present")
    if mark is None and table is not None:  # a column for each modality, in the order of their names
        names = sorted(key for key in arrays if key not in ("labels", "present", "items"))
        mark = table[:, names.index(name)]
    return None if mark is None else np.asarray(mark, dtype=bool)


def labelled_classes(parts: Sequence[Part]) -> list[str]:
    """The names of the classes of what :func:`collect` found; none without labels."""
    return next((_classes(part.rows) for part in parts if part.labels), [])


def splits_of(folder: Path) -> dict[str, dict[str, Array]]:
    """The arrays by split of a folder that :func:`has_splits`.

    Raises:
        ValueError: where one cannot be read, there is no test split, or they do not fit together.
    """
    from mmebm.data.folder import _arrays, check_alike

    found = {split: _arrays(folder, split) for split in ("train", "test")}
    if found["test"] is None:
        raise ValueError(
            f"{folder} has a train split and no test split, which is what a model is judged on: put some "
            f"rows into {folder / 'test'}{os.sep}"
        )
    check_alike(found["train"] or {}, found["test"])
    return {split: {name: array.values for name, array in (of or {}).items()} for split, of in found.items()}


def named_classes(folder: Path) -> list[str]:
    """The classes that a ``meta.json`` in ``folder`` names; none where there is none."""
    from mmebm.data.folder import _meta

    return list(_meta(folder)[1].get("classes", []))
