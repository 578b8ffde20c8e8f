"""Image files of every mode, depth and orientation as one kind of array: the only place that opens an image.

What a file shows in a viewer is what comes out: uint8, RGB, upright.

* Grey becomes three equal channels. 1-bit, palette, CMYK, YCbCr, LAB and HSV images are converted; a colour profile
  (ICC) is ignored: data sets are made of the numbers that their files hold.
* What is transparent shows white behind it, by its share: ``alpha * colour + (1 - alpha) * white``.
* 16-bit grey: 0..65535 becomes 0..255 by division by 257, rounded. So do 32-bit integers that lie in 0..65535, and
  floating images in [0, 1] by multiplication with 255. Other 32-bit and floating images have no range of their own: the
  smallest number of the image becomes black and the largest white. 16-bit colour comes from Pillow in 8 bits,
  and floating TIFF of 16 or 64 bits, or in colour, Pillow does not read.
* The orientation that a camera notes (EXIF, all eight) is applied, before the size is looked at.
* Of several frames or pages the first is taken.

A file that is cut short or damaged, or larger than ``PIL.Image.MAX_IMAGE_PIXELS``, is an error that names it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from mmebm.data.packages import pillow

__all__ = ["read_all", "read_image"]

T = TypeVar("T")

MOST_THREADS: Final = 8
ORIENTATION: Final = 0x0112
PHOTOMETRIC: Final = 262
WHITE_IS_ZERO: Final = 0
WITH_ALPHA: Final = {"RGBA": "RGBA", "RGBa": "RGBA", "LA": "LA", "La": "LA", "PA": "RGBA"}


def read_image(file: Path) -> NDArray[np.uint8]:
    """An image file as uint8 ``(3, H, W)``, as the top of this file says.

    Raises:
        ModuleNotFoundError: without Pillow.
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is no image, is damaged, or has too many pixels.
    """
    image = pillow()
    try:
        if file.exists() and not file.is_file():  # a pipe would be waited for
            raise ValueError("it is no file")
        with image.open(file) as picture:
            width, height = picture.size
            limit = image.MAX_IMAGE_PIXELS
            if limit is not None and width * height > limit:
                raise ValueError(
                    f"it has {width} x {height} pixels; PIL.Image.MAX_IMAGE_PIXELS is {limit}: set it if "
                    "the file can be trusted"
                )
            # First of all: Pillow turns some formats upright itself, and finds the EXIF of others behind the pixels
            picture.load()
            pixels = _upright(_colour(image, picture), _orientation(picture))
    except (FileNotFoundError, ModuleNotFoundError):
        raise
    except MemoryError as error:
        raise ValueError(f"{file} cannot be read as an image: it takes more memory than there is") from error
    except Exception as error:  # Pillow's decoders promise no set of exceptions
        raise ValueError(f"{file} cannot be read as an image: {error or type(error).__name__}") from error
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def read_all(files: Sequence[Path], read: Callable[[Path], T]) -> Iterator[T]:
    """``read(file)`` of each, in their order, by as many threads as there are cores: decoders let others run. In a
    worker process of a ``DataLoader``, which is one of several, one after the other.

    Raises:
        Exception: that of the first file, in their order, that cannot be read.
    """
    if len(files) < 4 or torch.utils.data.get_worker_info() is not None:
        yield from map(read, files)
        return
    with ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_THREADS, len(files))) as pool:
        try:
            yield from pool.map(read, files)
        finally:
            pool.shutdown(cancel_futures=True)


def _colour(image: Any, picture: Any) -> NDArray[np.uint8]:
    """uint8 ``(H, W, 3)``, as the pixels lie in the file."""
    mode = picture.mode
    if mode.startswith(("I", "F")):
        values = np.asarray(picture)
        grey = _eight_bits(values, mode)
        # what Pillow does for eight bits alone
        if picture.format == "TIFF" and picture.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO:
            grey = 255 - grey
        grey[values == picture.info.get("transparency", np.nan)] = 255
        return np.repeat(grey[:, :, None], 3, axis=2)
    if mode == "LAB":  # Pillow converts it by profiles only
        from PIL import ImageCms

        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(picture, lab, rgb, outputMode="RGB")
        return np.asarray(converted)
    if mode in WITH_ALPHA or ("transparency" in picture.info and mode in ("1", "L", "P", "RGB")):
        # by way of the mode with plain alpha: some have no way to RGBA of their own
        picture = picture.convert(WITH_ALPHA.get(mode, "RGBA")).convert("RGBA")
        white = image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture)
        picture = white
    return np.asarray(picture.convert("RGB"))


def _eight_bits(values: NDArray[Any], mode: str) -> NDArray[np.uint8]:
    """Deep grey values to 0..255, by the rule at the top."""
    x = values.astype(np.float64)
    if not np.isfinite(x).all():
        raise ValueError("it has values that are not finite")
    low, high = x.min(), x.max()
    if mode.startswith("I;16") or (mode.startswith("I") and low >= 0 and high <= 65535):
        x = x / 257
    elif mode == "F" and low >= 0 and high <= 1:
        x = x * 255
    else:
        x = (x - low) * (255 / (high - low) if high > low else 0.0)
    return np.rint(x).astype(np.uint8)


def _orientation(picture: Any) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none, or none that can be read: as viewers do."""
    try:
        noted = picture.getexif().get(ORIENTATION, 1)
    except Exception:  # a damaged block beside whole pixels
        return 1
    return noted if noted in range(1, 9) else 1


def _upright(x: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """``(H, W, 3)`` as it is to be looked at; 5 to 8 swap height and width."""
    if orientation >= 5:
        x = x.swapaxes(0, 1)
    across, down = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
    return x[:: -1 if down else 1, :: -1 if across else 1]
