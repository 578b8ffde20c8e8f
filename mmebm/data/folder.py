"""Your own data: a folder of NumPy arrays, one for each modality, paired by row.

path/train/photo.npy      (n, C, H, W)      path/meta.json, optional: {"classes": ["cat", "dog"],
path/train/sound.npy      (n, D)                "modalities": {"photo": {"kind": "image", "layout": "HWC"},
path/train/labels.npy     (n,)                                 "sound": {"kind": "vector", "range": [-80, 0]}}}
path/test/...             or path/train.npz, path/test.npz with arrays of the same names
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmebm.data.base import Modality, MultimodalDataset, Pool, Split, TextCodec, check_count
from mmebm.data.captions import Codec, caption_codec
from mmebm.data.pairing import choose
from mmebm.data.pools import ArrayPool, held
from mmebm.data.texts import read_json

__all__ = ["folder", "has_split"]

LABELS: Final = "labels"
PRESENT: Final = "present"
LOOKED_AT: Final = 2**28  # bytes of an array that is checked whole when it is loaded
ITEMS: Final = "items"
KEYS: Final = {
    "image": {"kind", "range", "layout"},
    "vector": {"kind", "range"},
    "text": {"kind", "words"},
    "caption": {"kind"},
}


def folder(
    split: Split,
    *,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
    n: int | None = None,
    stream: bool = True,
    codecs: Mapping[str, Codec] | None = None,
    codec_options: Mapping[str, Any] | None = None,
) -> MultimodalDataset:
    """A data set of your own arrays: row ``i`` of every array is one tuple.

    ``path/{split}/{modality}.npy`` (left on disk and read by the batch), or ``path/{split}.npz``. What an array is
    follows from its shape, or ``meta.json`` says it under ``"modalities"``, whose order is then the modalities':

    * ``"image"``: ``(n, C, H, W)`` or ``(n, H, W)``, uint8, or floating in [0, 1]. ``"layout": "HWC"`` for
      ``(n, H, W, C)``. ``"range": [low, high]`` for other numbers: low becomes black, high white, and what lies outside
      is an error.
    * ``"vector"``: ``(n, D)`` or ``(n,)`` numbers, as they are. ``"range": [low, high]``, numbers or lists of ``D``,
      maps low to -1 and high to 1, what lies outside goes on linearly, and ``natural`` gives your units back. Nothing
      is scaled unasked; the samplers are at home in [-1, 1].
    * ``"text"``: ``(n,)`` strings, or integers that count in ``"words": [...]``. By default the words are the sorted
      distinct ones of both splits, without the empty string, which may stand where one is absent.
    * ``"caption"``: ``(n, D)`` codes, or ``(n,)`` strings that its codec turns into codes; only by ``meta.json``.

    Beside them, all optional: ``labels`` ``(n,)``, integers, -1 for unlabelled, whose names are ``"classes"`` in
    ``meta.json`` (by default the numbers); and which tuples have which modality, bool: ``{modality}.present`` ``(n,)``,
    or ``present`` ``(n, M)`` with a column for each modality in their order. What an array holds for an absent instance
    is never looked at.

    Which rows show one thing, such as five sentences of one photograph: ``items`` ``(n,)``, integers or strings, equal
    for these rows. Rows of one item, and rows whose image is the same pixel by pixel, are never divided between
    training and the part that is kept back to validate on.

    Args:
        split: ``"train"``, ``"test"``, or ``"validation"`` where the folder has it.
        seed: of the choice of ``n``; without ``n`` nothing is drawn.
        path: the folder.
        n: take this many tuples at random, all by default.
        stream: leave arrays on disk (an .npz: in memory as they are) and convert the rows of a batch; False makes
            float32 tensors of them at once, which can live on a GPU. What is wrong with a row of a streamed array shows
            when it is read.
        codecs: modality name -> the codec of a caption modality, or its file. None fits one to the captions of the
            train split and keeps it in the cache folder.
        codec_options: of that fit (:class:`mmebm.data.text_codec.TextSettings`), such as ``{"dim": 32}``.

    Raises:
        FileNotFoundError: if there is no such split; the message says where it was looked for.
        ValueError: if ``path`` is None, a file cannot be read, arrays do not fit together, or ``meta.json`` says
            something unknown. The message names the file.
        TypeError: for options of another type.
    """
    if path is None:
        raise ValueError("'folder' is read from a folder: give path= (--data-path)")
    n = None if n is None else check_count("n", n)
    root = Path(path)
    arrays = _arrays(root, split)
    if arrays is None:
        raise FileNotFoundError(
            f"no {split} split: looked for {root / split / '*.npy'} and {root / f'{split}.npz'}. "
            "Save each modality with numpy.save, one row for each tuple"
        )
    # what is said of one split holds for the others: words and classes are those of train and of test
    other = _arrays(root, "test" if split == "train" else "train") or {}
    meta_file, meta = _meta(root)
    names = _names(arrays, meta, meta_file)
    check_alike(arrays, other)
    codecs = {} if codecs is None else codecs
    for option, value in (("codecs", codecs), ("codec_options", codec_options or {})):
        if not isinstance(value, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"{option} must be a mapping from name, or None, got {value!r:.80}")
    unknown = sorted(set(codecs) - set(names))
    if unknown:
        raise ValueError(f"codecs has {unknown}; the modalities are {names}")

    total = len(np.atleast_1d(arrays[names[0]].values))
    for array in arrays.values():
        if array.values.ndim < 1 or len(array.values) != total or not total:
            raise ValueError(
                f"{array.source} has shape {array.values.shape}, and {arrays[names[0]].source} "
                f"{total} rows: every array needs one row for each tuple, at least one"
            )
    classes, labels = _labels(arrays, other, meta.get("classes"), meta_file)
    present = _present(arrays, names, total)
    for column, name in enumerate(names):  # before anything that takes long, such as the fit of a codec
        there = np.arange(total) if present is None else np.flatnonzero(present[:, column])
        _check_rows(name, arrays[name], meta.get("modalities", {}).get(name, {}), there)

    pools: dict[str, Tensor | Pool] = {}
    modalities, pool_labels = [], {}
    index = np.repeat(np.arange(total, dtype=np.int64)[:, None], len(names), axis=1)
    for column, name in enumerate(names):
        there = np.arange(total) if present is None else np.flatnonzero(present[:, column])
        if not len(there):
            raise ValueError(f"{arrays[name].source}: no tuple has {name!r}; leave the array out")
        settings = meta.get("modalities", {}).get(name, {})
        train = (arrays if split == "train" else other or arrays).get(name)
        codec = _codec(name, train, settings, codecs.get(name), codec_options or {})
        modality, pool = _pool(name, arrays[name], other.get(name), settings, meta_file, codec)
        modalities.append(modality)
        pools[name] = pool if stream else held(pool, there)
        pool_labels[name] = np.full(total, -1)
        pool_labels[name][there] = labels[there]
        if present is not None:  # so that no batch reads what is not there
            index[~present[:, column], column] = there[0]
    rows = choose(n, total, root, seed, "folder", split)
    return MultimodalDataset(
        name="folder",
        split=split,
        seed=seed,
        modalities=tuple(modalities),
        classes=classes,
        pools=pools,
        pool_labels={name: torch.from_numpy(of_instance) for name, of_instance in pool_labels.items()},
        index=torch.from_numpy(index[rows]),
        labels=torch.from_numpy(labels[rows]),
        present=None if present is None else torch.from_numpy(present[rows]),
        items=_items(arrays, names, total),
        info={
            "options": {"n": n, "stream": stream},
            "seed": seed,
            "instances": {name: total for name in names},
            "tuples": len(rows),
            "reading": {name: meta.get("modalities", {}).get(name, {}) for name in names},
            "sources": [{"what": name, "file": arrays[name].source} for name in names],
        },
    )


def has_split(path: str | os.PathLike[str], split: str) -> bool:
    """Whether a folder has arrays of ``split``."""
    return any((Path(path) / split).glob("*.npy")) or (Path(path) / f"{split}.npz").is_file()


def _items(arrays: Mapping[str, _Array], names: Sequence[str], total: int) -> dict[str, Tensor] | None:
    """Of each row the item that it shows, where the folder says so."""
    if ITEMS not in arrays:
        return None
    said = arrays[ITEMS]
    if said.values.dtype.kind not in "iuUS" or said.values.ndim != 1:
        raise ValueError(
            f"{said.source} must hold integers or strings ({total},), one for each row, got {said.values.dtype} "
            f"{said.values.shape}"
        )
    rows = torch.from_numpy(np.unique(said.values, return_inverse=True)[1].astype(np.int64))
    return dict.fromkeys(names, rows)


@dataclass(frozen=True)
class _Array:
    values: NDArray[Any]
    source: str


def _arrays(root: Path, split: str) -> dict[str, _Array] | None:
    """name -> array, in the order of names; None if there is no such split."""
    files = sorted(file for file in (root / split).glob("*.npy") if file.name[0] != ".")
    archive = root / f"{split}.npz"
    if files and archive.is_file():
        raise ValueError(f"{root / split} and {archive.name} are both there: keep one")
    if files:
        return {file.name.removesuffix(".npy"): _Array(_load(file, "r"), str(file)) for file in files}
    if not archive.is_file():
        return None
    found = _load(archive, None)
    if not isinstance(found, np.lib.npyio.NpzFile):
        raise ValueError(f"{archive} is one array, not the archive that numpy.savez writes")
    arrays = {}
    with found:
        for name in sorted(found.files):
            try:
                arrays[name] = _Array(np.asarray(found[name]), f"{archive}[{name}]")
            except Exception as error:  # of zip, zlib, the header's parser: no set of exceptions
                raise ValueError(_unreadable(f"{archive}[{name}]", error)) from error
    return arrays


def _load(file: Path, mapped: Any) -> Any:
    try:
        return np.load(file, mmap_mode=mapped, allow_pickle=False)
    except Exception as error:  # of zip, zlib, the header's parser: no set of exceptions
        raise ValueError(_unreadable(str(file), error)) from error


def _unreadable(file: str, error: Exception) -> str:
    return (
        f"{file} cannot be read as numbers or fixed-width strings ({error}): objects are not loaded, since that "
        "would run code; save strings as numpy.array(list_of_str)"
    )


def _meta(root: Path) -> tuple[Path, dict[str, Any]]:
    file = root / "meta.json"
    if not file.is_file():
        return file, {}
    meta = read_json(file)
    if not isinstance(meta, dict) or not meta.keys() <= {"classes", "modalities"}:
        raise ValueError(
            f"{file} must be an object with 'classes' and 'modalities', either or none, got "
            f"{list(meta) if isinstance(meta, dict) else meta!r}"
        )
    modalities = meta.get("modalities", {})
    if not isinstance(modalities, dict) or not all(isinstance(settings, dict) for settings in modalities.values()):
        raise ValueError(f"{file}: 'modalities' must be {{name: {{\"kind\": ...}}}}, got {modalities!r}")
    return file, meta


def _modalities(arrays: Mapping[str, _Array]) -> list[str]:
    return [name for name in arrays if name not in (LABELS, PRESENT, ITEMS) and not name.endswith(f".{PRESENT}")]


def check_alike(arrays: Mapping[str, _Array], other: Mapping[str, _Array]) -> None:
    """That two splits are of the same modalities and sizes: a run that was trained on one is judged on the other, which
    may be hours later. A split that is not there is none.

    Raises:
        ValueError: naming the files.
    """
    mine, theirs = _modalities(arrays), _modalities(other)
    if mine and theirs and set(mine) != set(theirs):
        first, second = (next(iter(of.values())).source for of in (arrays, other))
        raise ValueError(
            f"both splits need the same modalities, but beside {first} lie {sorted(mine)}, and beside {second} "
            f"{sorted(theirs)}: what tuples lack is said in a .present.npy"
        )
    for name in theirs:
        a, b = arrays[name], other[name]
        # captions may be strings in one and codes in the other
        if "U" not in (a.values.dtype.kind, b.values.dtype.kind) and (
            math.prod(a.values.shape[1:]) != math.prod(b.values.shape[1:])
        ):
            raise ValueError(
                f"rows of a modality have one size in both splits, but {a.source} has shape {a.values.shape}, and "
                f"{b.source} {b.values.shape}"
            )


def _names(arrays: Mapping[str, _Array], meta: Mapping[str, Any], meta_file: Path) -> list[str]:
    """The modalities: as meta.json has them, then the others by name."""
    mine = _modalities(arrays)
    named = list(meta.get("modalities", {}))
    missing = sorted(set(named) - set(mine))
    if missing or not mine:
        raise ValueError(
            f"{meta_file} names {missing}, and the arrays are {mine}"
            if missing
            else f"no modality beside {sorted(arrays)}"
        )
    return named + [name for name in mine if name not in named]


def _labels(
    arrays: Mapping[str, _Array], other: Mapping[str, _Array], named: object, meta_file: Path
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """The classes, and the label of each tuple."""
    if named is not None and not _distinct(named):
        raise ValueError(f"{meta_file}: 'classes' must be distinct names, got {named!r}")
    array = arrays.get(LABELS)
    total = len(next(iter(arrays.values())).values)
    if array is None:
        return tuple(named) if _distinct(named) else (), np.full(total, -1, dtype=np.int64)
    largest = -1
    for found in (array, other.get(LABELS)):
        if found is None:
            continue
        if found.values.ndim != 1 or found.values.dtype.kind not in "iu" or found.values.min(initial=0) < -1:
            raise ValueError(
                f"{found.source} must hold integers (n,) from 0, or -1 for unlabelled, got "
                f"{found.values.dtype} {found.values.shape}"
            )
        largest = max(largest, int(found.values.max(initial=-1)))
    classes = tuple(named) if _distinct(named) else tuple(map(str, range(largest + 1)))
    if largest >= len(classes):
        raise ValueError(
            f"{array.source}, or that of the other split, has label {largest}; {meta_file} has {len(classes)} classes"
        )
    return classes, array.values.astype(np.int64)


def _present(arrays: Mapping[str, _Array], names: list[str], total: int) -> NDArray[np.bool_] | None:
    single = {key: array for key, array in arrays.items() if key.endswith(f".{PRESENT}")}
    strange = sorted(set(single) - {f"{name}.{PRESENT}" for name in names})
    if strange:
        raise ValueError(f"{single[strange[0]].source} is of no modality; they are {names}")
    if PRESENT in arrays and single:
        raise ValueError(
            f"{arrays[PRESENT].source} and {next(iter(single.values())).source} both say what is present: keep one"
        )
    present = np.ones((total, len(names)), dtype=bool)
    for key, array in single.items() if single else ((PRESENT, arrays.get(PRESENT)),):
        if array is None:
            return None
        shape = (total, len(names)) if key == PRESENT else (total,)
        if array.values.dtype != bool or array.values.shape != shape:
            raise ValueError(f"{array.source} must be bool {shape}, got {array.values.dtype} {array.values.shape}")
        if key == PRESENT:
            present = np.array(array.values)
        else:
            present[:, names.index(key.removesuffix(f".{PRESENT}"))] = array.values
    empty = np.flatnonzero(~present.any(axis=1))
    if len(empty):
        raise ValueError(
            f"row {empty[0]} and {len(empty) - 1} others have no modality at all: leave them out of "
            f"{', '.join(arrays[name].source for name in names)}"
        )
    return present


def _check_rows(name: str, array: _Array, settings: Mapping[str, Any], there: NDArray[np.int64]) -> None:
    """That strings are known words and vectors finite, all of them: a batch that finds out may come hours later. Images
    and what is larger than :data:`LOOKED_AT` bytes are looked at when they are read."""
    values = array.values
    if values.nbytes > LOOKED_AT or values.ndim > 2:
        return
    if values.dtype.kind == "f":
        wrong = ~np.isfinite(values.reshape(len(values), -1)[there]).all(1)
        found = "values that are not finite"
    elif values.dtype.kind == "U" and values.ndim == 1 and settings.get("kind") != "caption" and (values != "").any():
        words = settings.get("words")
        wrong = ~np.isin(values[there], words) if _distinct(words) else values[there] == ""
        found = f"unknown words [{str(values[there][np.argmax(wrong)])!r}]" if len(wrong) else ""
    else:
        return
    if wrong.any():
        raise ValueError(
            f"{array.source}: row {there[np.argmax(wrong)]} has {found} ({wrong.sum()} such rows); where "
            f"{name!r} is missing, say so in {name}.{PRESENT}.npy: bool ({len(values)},)"
        )


def _distinct(values: object) -> TypeGuard[list[str]]:
    return (
        isinstance(values, list)
        and bool(values)
        and all(isinstance(value, str) for value in values)
        and len(set(values)) == len(values)
    )


def _codec(
    name: str, train: _Array | None, settings: Mapping[str, Any], codec: Codec, options: Mapping[str, Any]
) -> TextCodec | None:
    """The codec of a caption modality: as given, read from a file, or fitted to the strings of the train split."""
    strings = train is not None and train.values.dtype.kind == "U" and settings.get("kind") == "caption"
    if not strings and not isinstance(codec, str | os.PathLike):
        return codec
    captions = [text for text in map(str, train.values) if text] if train is not None and strings else []
    return caption_codec(f"folder-{name}", lambda: captions, codec, **options)[0]


def _pool(
    name: str,
    array: _Array,
    other: _Array | None,
    settings: Mapping[str, Any],
    meta_file: Path,
    codec: TextCodec | None,
) -> tuple[Modality, ArrayPool]:
    values, source = array.values, array.source
    strings = values.dtype.kind == "U"
    kind = settings.get("kind")
    if kind is None:
        kind = "text" if strings or "words" in settings else {3: "image", 4: "image"}.get(values.ndim, "vector")
    if kind not in KEYS:
        raise ValueError(f"{meta_file}: kind of {name!r} must be one of {list(KEYS)}, got {kind!r}")
    if not settings.keys() <= KEYS[kind]:
        raise ValueError(
            f"{meta_file}: {name!r} has {sorted(settings.keys() - KEYS[kind])}; kind {kind!r} takes "
            f"{sorted(KEYS[kind])}"
        )
    if codec is not None and kind != "caption":
        raise ValueError(f"{name!r} is of kind {kind!r} and takes no codec")
    if kind in ("image", "text"):
        image = kind == "image"
        pool = _image(name, array, settings, meta_file) if image else _text(name, array, other, settings, meta_file)
        return pool.modality, pool
    if kind == "caption" and strings and values.ndim == 1 and codec is not None:
        values = codec.encode([str(text) for text in values]).detach().cpu().numpy()
    if values.dtype.kind not in "fiub" or values.ndim > 2 or (kind == "caption" and values.ndim != 2):
        raise ValueError(f"{source} must hold numbers (n, D) for kind {kind!r}, got {values.dtype} {values.shape}")
    shape = values.shape[1:] or (1,)
    if kind == "caption":  # its codes are converted as a vector is, not as strings are
        codes = ArrayPool(values, Modality(name, shape, "vector"), source, _numbers)
        return Modality(name, shape, kind, codec=codec), codes
    centre: tuple[float, ...] = ()
    spread: tuple[float, ...] = ()
    if "range" in settings:
        low, high = _range(name, settings["range"], meta_file, shape[0])
        centre, spread = tuple(((low + high) / 2).tolist()), tuple(((high - low) / 2).tolist())
    modality = Modality(name, shape, "vector", centre=centre, spread=spread)
    return modality, ArrayPool(values, modality, source, _numbers)


def _numbers(x: NDArray[Any]) -> NDArray[Any]:
    """Rows as native floating ``(b, D)``."""
    return np.asarray(x, dtype=np.float32 if x.dtype.itemsize < 4 or x.dtype == np.float32 else np.float64).reshape(
        len(x), -1
    )


def _range(name: str, given: object, meta_file: Path, size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    try:
        low, high = (np.broadcast_to(np.asarray(end, dtype=np.float64), (size,)) for end in given)  # type: ignore
        if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
            raise ValueError("low must be below high")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{meta_file}: range of {name!r} must be [low, high], numbers or lists of {size}, low below "
            f"high, got {given!r}"
        ) from error
    return low, high


@dataclass(frozen=True)
class _Pixels:
    """Rows of an image array to natural space, ``(b, C, H, W)``."""

    channels_last: bool
    ends: tuple[float, float] | None

    def __call__(self, x: NDArray[Any]) -> NDArray[Any]:
        x = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2) if self.channels_last else x
        if self.ends is None:
            return x.astype(x.dtype.newbyteorder("="))
        low, high = self.ends
        return (x.astype(np.float64) - low) / (high - low)


def _image(name: str, array: _Array, settings: Mapping[str, Any], meta_file: Path) -> ArrayPool:
    values, source = array.values, array.source
    layout = settings.get("layout", "CHW")
    if layout not in ("CHW", "HWC"):
        raise ValueError(f"{meta_file}: layout of {name!r} must be 'CHW' or 'HWC', got {layout!r}")
    if values.ndim not in (3, 4):
        raise ValueError(f"{source} must be images (n, C, H, W) or (n, H, W), got shape {values.shape}")
    looks_last = values.ndim == 4 and values.shape[3] in (1, 2, 3, 4) and values.shape[1] not in (1, 2, 3, 4)
    if looks_last and "layout" not in settings:
        raise ValueError(
            f'{source} has shape {values.shape}, which looks like (n, H, W, C): say "layout": '
            f'"HWC" or "CHW" of {name!r} in {meta_file}'
        )
    ends = None
    if "range" in settings:
        if values.dtype == np.uint8:
            raise ValueError(f"{meta_file}: {source} is uint8, whose range is 0 to 255: leave 'range' out")
        low, high = _range(name, settings["range"], meta_file, 1)
        ends = (float(low[0]), float(high[0]))
    elif values.dtype != np.uint8 and values.dtype.kind != "f":
        raise ValueError(
            f'{source} must be uint8 or floating in [0, 1], got {values.dtype}: say its "range" in {meta_file}'
        )
    if values.dtype.kind not in "fiub":
        raise ValueError(f"{source} must hold numbers, got {values.dtype}")
    prepare = _Pixels(layout == "HWC" and values.ndim == 4, ends)
    shape = prepare(values[:1]).shape[1:]
    return ArrayPool(values, Modality(name, shape, "image"), source, prepare)


@dataclass(frozen=True)
class _Words:
    """Rows of word numbers to words."""

    words: tuple[str, ...]

    def __call__(self, x: NDArray[Any]) -> NDArray[Any]:
        if len(x) and not (x.min() >= 0 and x.max() < len(self.words)):
            raise ValueError(f"word numbers must lie in [0, {len(self.words)}), got [{x.min()}, {x.max()}]")
        return np.array(self.words)[x]


def _text(name: str, array: _Array, other: _Array | None, settings: Mapping[str, Any], meta_file: Path) -> ArrayPool:
    values, source = array.values, array.source
    words = settings.get("words")
    if "words" in settings and not _distinct(words):
        raise ValueError(f"{meta_file}: words of {name!r} must be distinct strings, got {words!r}")
    if values.ndim != 1 or values.dtype.kind not in "Uiu":
        raise ValueError(f"{source} must be strings or word numbers (n,), got {values.dtype} {values.shape}")
    if values.dtype.kind != "U":
        if words is None:
            raise ValueError(f'{source} holds numbers of words: list the "words" of {name!r} in {meta_file}')
        return ArrayPool(values, Modality(name, (len(words),), "text", tuple(words)), source, _Words(tuple(words)))
    if words is None:
        both = [part.values for part in (array, other) if part is not None and part.values.dtype.kind == "U"]
        words = [word for word in np.unique(np.concatenate(both)).tolist() if word]
        if not words:
            raise ValueError(f"{source} has no word")
    return ArrayPool(values, Modality(name, (len(words),), "text", tuple(words)), source)
