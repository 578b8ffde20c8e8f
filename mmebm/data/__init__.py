"""Multimodal data sets of real instances: built from installed packages, or read from a folder; never downloaded.

    digits           MNIST digit, 8x8 digit of another writer, the class as a word       built in memory
    polymnist-5k     one digit in five styles, 3x28x28 each                              built in memory
    views            six views of the same 2,000 digits: an image and five vectors       built in memory
    polymnist        the published PolyMNIST, or a set laid out like it                  read from ``path``
    polymnist-built  PolyMNIST's recipe over any idx files and photographs               read from ``path``
    polyfashion      the same recipe over Fashion-MNIST                                  from a Debian package
    mnist-svhn       MNIST and SVHN, paired by class                                     read from ``path``
    mnist-svhn-text  the same with the digit's word in characters                        read from ``path``
    emoji-captions   emoji and their English names                                       from Debian packages
    cub              photographs of birds with sentences                                 read from ``path``
    coco             photographs of scenes with sentences                                read from ``path``
    folder           your own NumPy arrays                                               read from ``path``

    train = load("digits", "train", seed=0)
    train.batch(torch.arange(100))["mnist"]           # (100, 1, 28, 28) in [-1, 1]; classes: train.labels[:100]

docs/data.md says what each expects in its folder. To add one, put a builder
``f(split, *, seed, path, **options) -> MultimodalDataset`` into :data:`DATASETS`, name it by its import path, or let a
package offer it by an entry point of the group ``mmebm.datasets``. It may also return a ``torch.utils.data.Dataset`` of
dicts.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

from mmebm import plugins
from mmebm.data.base import SPLITS, Modality, MultimodalDataset, Pool, Split, TextCodec, check_count
from mmebm.data.coco import coco
from mmebm.data.cub import cub
from mmebm.data.digits import digits
from mmebm.data.emoji import emoji_captions
from mmebm.data.folder import folder, has_split
from mmebm.data.mapped import as_set, from_dataset
from mmebm.data.mnist_svhn import mnist_svhn, mnist_svhn_text
from mmebm.data.polymnist import polyfashion, polymnist, polymnist_5k, polymnist_built
from mmebm.data.stream import Prefetch, WorkerBatches
from mmebm.data.views import views
from mmebm.state import flag

__all__ = [
    "DATASETS",
    "SPLITS",
    "WITH_VALIDATION",
    "Modality",
    "MultimodalDataset",
    "Pool",
    "Prefetch",
    "Split",
    "TextCodec",
    "WorkerBatches",
    "from_dataset",
    "has_validation",
    "load",
]

DATASETS: dict[str, Callable[..., MultimodalDataset]] = {
    "digits": digits,
    "polymnist-5k": polymnist_5k,
    "polymnist": polymnist,
    "polymnist-built": polymnist_built,
    "polyfashion": polyfashion,
    "mnist-svhn": mnist_svhn,
    "mnist-svhn-text": mnist_svhn_text,
    "views": views,
    "emoji-captions": emoji_captions,
    "cub": cub,
    "coco": coco,
    "folder": folder,
}

# Sets whose validation is made of items that no train tuple shows. A builder of your own says so by the attribute
# ``splits``, which then has "validation" in it.
WITH_VALIDATION = ("digits", "polymnist-5k", "polymnist-built", "polyfashion", "mnist-svhn", "mnist-svhn-text", "views")
FOLDER_WANTS = " (no validation/*.npy, no validation.npz)"


def _builder(name: str) -> Callable[..., Any]:
    build = DATASETS.get(name) or (plugins.by_path(name) if ":" in name else plugins.offered("datasets", name))
    if build is None:
        known = [*DATASETS, *plugins.names("datasets")]
        raise ValueError(
            f"unknown data set {name!r}, known are {', '.join(map(repr, known))}, and import paths "
            "'package.module:function'"
        )
    return build


def has_validation(name: str, path: str | os.PathLike[str] | None = None) -> bool:
    """Whether :func:`load` has a validation split of the set ``name``.

    Raises:
        ValueError: for an unknown name.
    """
    build = _builder(name)
    if build is folder:
        return path is not None and has_split(path, "validation")
    return name in WITH_VALIDATION or "validation" in getattr(build, "splits", ())


def load(
    name: str, split: Split, *, seed: int = 0, path: str | os.PathLike[str] | None = None, **options: Any
) -> MultimodalDataset:
    """Builds or reads a data set. The same arguments give the same tensors on every machine.

    Args:
        name: a key of :data:`DATASETS`, an entry point's name, or the import path of a builder, which returns a
            :class:`MultimodalDataset` or what :func:`from_dataset` takes.
        split: ``"train"``, ``"validation"`` or ``"test"``. No source item is in two of them. The sets that are built of
            items (:data:`WITH_VALIDATION`) have a validation of their own; of the others training keeps tuples back
            (``config.validation``, docs/study.md).
        seed: of everything that is drawn: pairing, crops, choice of tuples. Which digit is in which split is fixed and
            depends on no argument.
        path: the folder, for sets that are read from one.
        options: what the builder of the set takes: the functions in :data:`DATASETS` document it.

    Raises:
        ValueError: for an unknown name or split, a negative seed, or a bad option value.
        TypeError: for an unknown option, or one of another type.
        ModuleNotFoundError, FileNotFoundError: if a package or a file is missing; the message says which, where it was
            looked for, and how to get it.
    """
    build = _builder(name)
    if split not in SPLITS:
        raise ValueError(f"split must be one of {list(SPLITS)}, got {split!r}")
    if split == "validation" and not has_validation(name, path):
        raise ValueError(
            f"{name!r} has no validation split of its own{FOLDER_WANTS if name == 'folder' else ''}: training keeps a "
            "part of its train tuples back (validation.every), which Trainer.validation and a run's evaluation have"
        )
    seed = check_count("seed", seed, least=0)
    parameters = inspect.signature(build).parameters
    known = [key for key in parameters if key not in ("split", "seed", "path")]
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    unknown = [] if takes_any else [key for key in options if key not in known]
    if unknown:
        raise TypeError(f"data set {name!r} has no option {', '.join(map(repr, unknown))}, only {', '.join(known)}")
    for key, value in options.items():
        # the text "no" is true
        if name in DATASETS and key in parameters and isinstance(parameters[key].default, bool):
            flag(f"option {key} of data set {name!r}", value)
    # one of the user's own may leave out what it does not need
    given = {"seed": seed, "path": path}
    given = {key: value for key, value in given.items() if takes_any or key in parameters}
    return as_set(build(split, **given, **options), split=split, name=name)
