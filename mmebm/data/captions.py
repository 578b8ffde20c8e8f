"""Captions: the codec that makes them continuous, kept in a cache, and data sets of images with captions.

A caption enters the multimodal model as a code in (-1, 1)^D of a small text autoencoder (:mod:`mmebm.data.text_codec`),
which is fitted to the captions of the train split the first time a set is loaded, kept in a cache folder, and frozen
from then on: Langevin moves the code, and the decoder says what it reads.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmebm.data.base import Modality, MultimodalDataset, Pool, Split, TextCodec
from mmebm.data.images import read_image
from mmebm.data.packages import pillow
from mmebm.data.pairing import below, choose, random_words
from mmebm.data.pools import FilePool, held
from mmebm.data.text_codec import TextAutoencoder, TextSettings, fit_text_autoencoder
from mmebm.files import FolderLock, check_writable

__all__ = ["ImageCaptions", "cache_folder", "caption_codec", "check_option", "image_files"]

# The codec belongs to the data set as its split does: one seed for all runs.
CODEC_SEED: Final = 0
IMAGES: Final = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")

Ints = NDArray[np.int64]
Codec = str | os.PathLike[str] | TextCodec | None
Take = Literal["all", "one"]

logger: Final = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where fitted codecs are kept: ``$XDG_CACHE_HOME/mmebm``, or ``~/.cache/mmebm``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmebm"


def caption_codec(
    name: str, captions: Callable[[], Sequence[str]], codec: Codec, **settings: Any
) -> tuple[TextCodec, dict[str, Any]]:
    """The codec of a caption set: the given one, the one in the cache folder, or one that is fitted now and kept there.

    Args:
        name: of the data set, for the name of the file.
        captions: gives the captions of the train split; not called where ``codec`` is given.
        codec: a file of :meth:`~mmebm.data.text_codec.TextAutoencoder.save`, or a codec. None fits one to ``captions``;
            other captions or settings make another file.
        settings: of :class:`~mmebm.data.text_codec.TextSettings`.

    Returns:
        The codec, and what ``info`` of a data set says about it.

    Raises:
        FileNotFoundError, ValueError: for a file that is missing or is no text autoencoder, and an unknown setting.
        TypeError: for something else than a file or a codec.
    """
    if codec is not None and not isinstance(codec, str | os.PathLike):
        if not callable(getattr(codec, "encode", None)) or not callable(getattr(codec, "decode", None)):
            raise TypeError(f"codec must be a file, an object with encode and decode, or None, got {codec!r:.80}")
        return codec, {"codec": type(codec).__name__, **getattr(codec, "info", {})}
    if codec is not None:
        path = Path(codec)
        model = TextAutoencoder.load(path)
    else:
        known = [field.name for field in fields(TextSettings)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ValueError(f"a text autoencoder has no setting {unknown[0]!r}, only {', '.join(known)}")
        TextSettings(**settings)  # says what is wrong with a value, before anything takes long
        train = list(captions())
        key = json.dumps([CODEC_SEED, settings, train], sort_keys=True)
        path = cache_folder() / f"captions-{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
        model = _kept(path) or _fitted(name, train, path, settings)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return model, {"codec": "TextAutoencoder", "file": str(path), "sha256": digest, "dim": model.dim, **model.info}


def _kept(path: Path) -> TextAutoencoder | None:
    """The codec that was kept at ``path``; None where there is none."""
    if not path.exists():
        return None
    try:
        return TextAutoencoder.load(path)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{error}; delete it, and another is fitted") from error


def _fitted(name: str, train: Sequence[str], path: Path, settings: dict[str, Any]) -> TextAutoencoder:
    """A codec fitted now and kept at ``path``, by one process: those that want the same wait for it."""
    try:
        check_writable(path)
        lock = FolderLock(path.with_suffix(".fitting"), wait=True)
    except OSError as error:
        raise ValueError(
            f"a text autoencoder must be fitted to the captions of {name!r}, which takes a while, and could not be "
            f"kept: {error}. Set XDG_CACHE_HOME to a folder that can be written, or give codec="
        ) from error
    try:
        if (model := _kept(path)) is None:
            # A warning because it takes a while and there is nothing else to see
            logger.warning(
                "fitting a text autoencoder to the %d captions of %r, once; it is kept in %s", len(train), name, path
            )
            model = fit_text_autoencoder(train, seed=CODEC_SEED, log=logger.info, **settings)
            model.save(path)
        return model
    finally:
        lock.release(remove_empty=True)


def check_option(name: str, value: object, known: Sequence[str]) -> None:
    """ValueError if ``value`` is none of ``known``."""
    if value not in known:
        raise ValueError(f"{name} must be {' or '.join(map(repr, known))}, got {value!r}")


def image_files(folder: Path) -> list[str]:
    """Names of the images in ``folder``, sorted; hidden files are none (archives of macOS leave some)."""
    return sorted(
        entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(IMAGES) and entry.name[0] != "."
    )


def _resized(file: Path, size: int) -> NDArray[np.uint8]:
    image = pillow()
    picture = image.fromarray(np.ascontiguousarray(read_image(file).transpose(1, 2, 0)))
    # To a square whatever its shape was, bilinear: what the published loaders do
    return np.asarray(picture.resize((size, size), image.Resampling.BILINEAR)).transpose(2, 0, 1)


@dataclass(frozen=True)
class ImageCaptions:
    """What was read of a split before it becomes a data set: images, and the captions of each.

    Args:
        name: of the data set.
        split: ``"train"`` or ``"test"``.
        images: the files, or a float32 tensor ``(images, C, H, W)`` in [-1, 1].
        captions: for each image its captions, at least one.
        labels: int64 ``(images,)``, -1 for unlabelled.
        classes: the names of the classes.
        sources: plain values that say where it came from.
        names: of the images; by default those of the files.
    """

    name: str
    split: Split
    images: Sequence[Path] | Tensor
    captions: Sequence[Sequence[str]]
    labels: Ints
    classes: tuple[str, ...]
    sources: list[dict[str, Any]]
    names: Sequence[str] = ()

    def dataset(
        self,
        codec: tuple[TextCodec, dict[str, Any]],
        *,
        seed: int,
        size: int,
        take: Take,
        n: int | None,
        stream: bool,
        options: dict[str, Any],
    ) -> MultimodalDataset:
        """Modalities ``"image"`` and ``"caption"``; a tuple is an image with a caption of its own.

        Args:
            codec: what :func:`caption_codec` gave.
            seed: of the drawn captions and tuples.
            size: side of the images.
            take: every caption, or one drawn for each image.
            n: so many tuples at random, all by default.
            stream: read images by the batch, and not all of them now.
            options: for ``info``.

        Raises:
            ValueError: if ``n`` is more than there is.
        """
        counts = np.array([len(own) for own in self.captions], dtype=np.int64)
        first = np.cumsum(counts) - counts  # of each image, among all captions
        if take == "one":
            draws = below(random_words(seed, "caption", self.name, self.split), 2**31, len(counts))
            rows = first + draws % counts
        else:
            rows = np.arange(counts.sum(), dtype=np.int64)
        rows = rows[choose(n, len(rows), f"the {self.split} split", seed, self.name, self.split)]
        image_of = np.repeat(np.arange(len(counts), dtype=np.int64), counts)[rows]
        used, image_rows = np.unique(image_of, return_inverse=True)
        every = [caption for own in self.captions for caption in own]
        texts = [every[row] for row in rows]
        different = list(dict.fromkeys(texts))
        number = {text: k for k, text in enumerate(different)}
        codes = codec[0].encode(different).to(torch.float32)[[number[text] for text in texts]]

        images: Tensor | Pool
        if isinstance(self.images, Tensor):
            images = self.images[torch.from_numpy(used)]
            modality = Modality("image", tuple(images.shape[1:]), "image")
        else:
            modality = Modality("image", (3, size, size), "image")
            images = FilePool([self.images[k] for k in used], modality, partial(_resized, size=size))
            images = images if stream else held(images)
        names: list[str] = list(self.names) or [
            "/".join(image.parts[-2:]) for image in self.images if isinstance(image, Path)
        ]
        labels = torch.from_numpy(self.labels[image_of])
        index = torch.from_numpy(np.stack([image_rows, np.arange(len(rows))], axis=1).astype(np.int64))
        return MultimodalDataset(
            name=self.name,
            split=self.split,
            seed=seed,
            modalities=(modality, Modality("caption", tuple(codes.shape[1:]), "caption", codec=codec[0])),
            classes=self.classes,
            pools={"image": images, "caption": codes},
            pool_labels={"image": torch.from_numpy(self.labels[used]), "caption": labels},
            index=index,
            labels=labels,
            info={
                "options": options,
                "seed": seed,
                "instances": {"image": len(used), "caption": len(rows)},
                "tuples": len(rows),
                "sources": self.sources,
                "codec": codec[1],
            },
            names={"image": [names[k] for k in used]} if names else None,
        )
