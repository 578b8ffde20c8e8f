"""COCO: photographs of everyday scenes, each with about five English captions, from a folder that you have.

Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014. Captions CC BY 4.0, images under the terms of Flickr
(as commonly stated). Nothing here downloads anything.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Final

import numpy as np

from mmebm.data.base import MultimodalDataset, Split, check_count
from mmebm.data.captions import Codec, ImageCaptions, Take, caption_codec, check_option
from mmebm.data.texts import Skipped, read_json

__all__ = ["coco"]

YEARS: Final = (2017, 2014)
PART: Final = {"train": "train", "test": "val"}
NUMBERED: Final = re.compile(r"(?:^|_)(\d{12})\.\w+$")
SETTINGS: Final[dict[str, Any]] = {"length": 32, "least": 5, "hidden": 256, "batch": 128, "learning_rate": 2e-3}


def coco(
    split: Split,
    *,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
    n: int | None = None,
    size: int = 64,
    captions: Take = "one",
    year: int | None = None,
    stream: bool = True,
    dim: int = 128,
    codec: Codec = None,
) -> MultimodalDataset:
    """Scenes and captions; modalities ``"image"`` ``(3, size, size)`` and ``"caption"`` ``(dim,)``; no classes.

    ``path`` is the folder that holds ``annotations/captions_{train,val}{2014,2017}.json`` and the images in
    ``{train,val}{2014,2017}/`` or ``images/{train,val}{2014,2017}/``, under the names that the annotations give. The
    test split here is COCO's "val": its own test split has no public captions. Images that are listed and not there are
    left out, with a warning that says how many: a part of the set is a set.

    Args:
        split: ``"train"`` or ``"test"``.
        seed: of the drawn captions and of the choice of ``n``.
        path: the folder.
        n: take this many tuples at random, all by default.
        size: side of the images, which become square.
        captions: ``"one"``, drawn for each image, or ``"all"``, a tuple for each caption.
        year: 2014 or 2017, one for both splits, since each has train images of the other in its test;
            by default that of which more is there, the later one of equals.
        stream: read the images of a batch when it is asked for, and not all at once (5.4 GiB for the train split).
        dim: size of the code, where the codec is fitted here.
        codec: a file, or a codec; by default one is fitted to the captions of the train split, once, which takes a
            while.

    Raises:
        FileNotFoundError: if there is no such folder, or a file of it is missing.
        ValueError: if ``path`` is None, or annotations and images do not pair up; the message names the file.
        TypeError: for an option of another type.
        ModuleNotFoundError: without Pillow.
    """
    if path is None:
        raise ValueError(
            "'coco' is read from a folder: give path= (--data-path), or load 'emoji-captions', which needs none"
        )
    size, dim = check_count("size", size, least=4), check_count("dim", dim)
    n = None if n is None else check_count("n", n)
    check_option("captions", captions, ("all", "one"))
    if year not in (None, *YEARS):
        raise ValueError(f"year must be 2014 or 2017, got {year!r}")
    root = Path(path)
    year = year or max(YEARS, key=lambda year: _parts(root, year))
    names, captions_of = _captions(_annotations(root, split, year))
    found = _images(root, split, year, names, captions_of)

    def train() -> list[str]:
        every = captions_of if split == "train" else _captions(_annotations(root, "train", year))[1]
        return [caption for own in every.values() for caption in own]

    fitted = caption_codec("coco", train, codec, dim=dim, **SETTINGS)
    options = {"n": n, "size": size, "captions": captions, "year": year, "stream": stream, "dim": dim}
    return found.dataset(fitted, seed=seed, size=size, take=captions, n=n, stream=stream, options=options)


def _parts(root: Path, year: int) -> int:
    """How many of the annotations and image folders of both splits are there."""
    splits: tuple[Split, ...] = ("train", "test")
    return sum(_annotations(root, s, year).is_file() + (_folder(root, s, year) is not None) for s in splits)


def _folder(root: Path, split: Split, year: int) -> Path | None:
    """Where the images are."""
    part = f"{PART[split]}{year}"
    return next((folder for folder in (root / part, root / "images" / part) if folder.is_dir()), None)


def _annotations(root: Path, split: Split, year: int) -> Path:
    return root / "annotations" / f"captions_{PART[split]}{year}.json"


def _captions(file: Path) -> tuple[dict[int, str], dict[int, list[str]]]:
    """Image number -> file name, and -> its captions, both in the order of the file's images."""
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing: unpack annotations_trainval2017.zip (or 2014) of "
            "https://cocodataset.org there; year= takes another year, for both splits; "
            "'emoji-captions' needs no download"
        )
    content = read_json(file)
    for part in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(part), list):
            raise ValueError(f"{file} is not a caption file of COCO: it has no list {part!r}")
    names = []
    for at, image in enumerate(content["images"]):
        number, name = (image.get("id"), image.get("file_name")) if isinstance(image, dict) else (None, None)
        if not isinstance(number, int) or isinstance(number, bool) or not isinstance(name, str) or not name:
            raise ValueError(
                f"{file}, images[{at}]: an image must have an integer 'id' and a string 'file_name', got {image!r:.120}"
            )
        names.append((number, name))
    skipped = Skipped()
    pairs, silent = [], set()
    for at, one in enumerate(content["annotations"]):
        number, caption = (one.get("image_id"), one.get("caption")) if isinstance(one, dict) else (None, None)
        if not isinstance(number, int) or isinstance(number, bool):
            skipped.add("an annotation without an integer 'image_id' is left out", f"{file}, annotations[{at}]")
        elif not isinstance(caption, str) or not caption.strip():
            silent.add(number)
            skipped.add(
                "an annotation without a caption (a string, not empty) is left out",
                f"{file}, annotations[{at}], of image {number}",
            )
        else:
            pairs.append((number, caption))
    of: dict[int, str] = {}
    for number, name in names:
        if number in of:
            raise ValueError(f"{file}: image {number} is there twice")
        # Names hold the number: a name under another one would pair every caption of it wrongly
        if (found := NUMBERED.search(name)) and int(found[1]) != number:
            raise ValueError(f"{file}: image {number} has the file of another, {name}")
        of[number] = name
    if not of:
        raise ValueError(f"{file} holds no image")
    captions: dict[int, list[str]] = {number: [] for number in of}
    for number, caption in pairs:
        if number not in captions:
            raise ValueError(f"{file}: a caption is for image {number}, which is not among its images: {caption!r:.80}")
        captions[number].append(" ".join(caption.split()))  # some end with a newline
    mute = [number for number, own in captions.items() if not own]
    other = [number for number in mute if number not in silent]
    if other or len(mute) == len(of):
        raise ValueError(f"{file}: image {(other or mute)[0]} has no caption ({len(mute)} such images)")
    for number in mute:
        skipped.add("an image without a caption is left out", f"{file}, image {number}")
        del of[number], captions[number]
    skipped.say()
    return of, captions


def _images(
    root: Path, split: Split, year: int, names: dict[int, str], captions: dict[int, list[str]]
) -> ImageCaptions:
    """The images that are there; a part of COCO is COCO, too."""
    file, folder = _annotations(root, split, year), _folder(root, split, year)
    if folder is None:
        folders = f"{root / f'{PART[split]}{year}'} and {root / 'images' / f'{PART[split]}{year}'}"
        raise FileNotFoundError(f"no images: looked for {folders}; year= takes another year, for both splits")
    listed = {entry.name for entry in os.scandir(folder)}
    there = [number for number, name in names.items() if name in listed]
    if absent := sorted(set(names.values()) - listed):
        first = folder / absent[0]
        if not there:
            raise FileNotFoundError(f"{first} is missing, and so are all {len(absent)} images that {file} lists")
        skipped = Skipped()
        skipped.add(f"an image that {file.name} lists is missing and left out", str(first), len(absent))
        skipped.say()
    labels = np.full(len(there), -1, dtype=np.int64)
    sources = [{"what": "COCO", "folder": str(folder), "annotations": str(file), "missing": len(absent)}]
    images = [folder / names[number] for number in there]
    return ImageCaptions("coco", split, images, [captions[number] for number in there], labels, (), sources)
