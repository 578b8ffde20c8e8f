"""CUB: photographs of birds, each with ten English sentences, from a folder that you have.

Images: Wah, Branson, Welinder, Perona, Belongie, "The Caltech-UCSD Birds-200-2011 Dataset" (for research, not for
commerce, as commonly stated); captions: Reed, Akata, Schiele, Lee, CVPR 2016. Nothing here downloads anything.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import numpy as np

from mmebm.data.base import MultimodalDataset, Split, check_count
from mmebm.data.captions import Codec, ImageCaptions, Take, caption_codec, check_option, image_files
from mmebm.data.texts import Skipped, read_lines

__all__ = ["cub"]

PER_IMAGE: Final = 10
TEXT: Final = {"train": "text_trainvalclasses.txt", "test": "text_testclasses.txt"}
TEXTS: Final = ("text_c10", "cvpr2016_cub/text_c10", "birds/text_c10", "text")
# Published loaders keep words seen more than three times, and 32 places
SETTINGS: Final[dict[str, Any]] = {"length": 32, "least": 4, "hidden": 256, "batch": 128, "learning_rate": 2e-3}


def cub(
    split: Split,
    *,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
    n: int | None = None,
    size: int = 64,
    captions: Take = "all",
    stream: bool = False,
    dim: int = 128,
    codec: Codec = None,
) -> MultimodalDataset:
    """Birds and sentences; modalities ``"image"`` ``(3, size, size)`` and ``"caption"`` ``(dim,)``. Class = species.

    ``path`` is the folder itself or the one that holds it. Two layouts are known:

    * ``cub``: ``{train,test}/{NNN.Class}/*.jpg``, ``text_trainvalclasses.txt`` and ``text_testclasses.txt``. Line ``i``
      of a text belongs to image ``i // 10`` in the order of sorted folders and sorted names; the splits have different
      species. A text is read by line and never by sentence: some lines hold two.
    * ``CUB_200_2011`` as published: ``images.txt``, ``train_test_split.txt``, ``images/``; and ``text_c10`` in it or
      beside it (also in ``cvpr2016_cub`` or ``birds``, or named ``text``), with ``{NNN.Class}/{image}.txt``, a caption
      a line. Both splits have all species. An image without a file or without captions is left out, with a warning.

    Args:
        split: ``"train"`` or ``"test"``.
        seed: of the drawn captions and of the choice of ``n``.
        path: the folder.
        n: take this many tuples at random, all by default.
        size: side of the images, which become square.
        captions: ``"all"``, ten tuples for each image, or ``"one"``, drawn for each image.
        stream: read the images of a batch when it is asked for, and not all at once (48 KiB each at 64 pixels).
        dim: size of the code, where the codec is fitted here.
        codec: a file, or a codec; by default one is fitted to the captions of the train split, once, which takes a
            while.

    Raises:
        FileNotFoundError: if there is no such folder, or a file of it is missing.
        ValueError: if ``path`` is None, or if images and captions do not pair up; the message names the file.
        TypeError: for an option of another type.
        ModuleNotFoundError: without Pillow.
    """
    if path is None:
        raise ValueError(
            "'cub' is read from a folder: give path= (--data-path), or load 'emoji-captions', which needs none"
        )
    size, dim = check_count("size", size, least=4), check_count("dim", dim)
    n = None if n is None else check_count("n", n)
    check_option("captions", captions, ("all", "one"))
    root, read = _find(Path(path))
    found = read(root, split)

    def train() -> list[str]:
        source = found if split == "train" else read(root, "train")
        return [caption for own in source.captions for caption in own]

    fitted = caption_codec("cub", train, codec, dim=dim, **SETTINGS)
    options = {"n": n, "size": size, "captions": captions, "stream": stream, "dim": dim}
    return found.dataset(fitted, seed=seed, size=size, take=captions, n=n, stream=stream, options=options)


def _find(path: Path) -> tuple[Path, Any]:
    for root in (path, path / "cub"):
        if any((root / text).is_file() for text in TEXT.values()):
            return root, _by_line
    for root in (path, path / "CUB_200_2011", path / "CUB_200_2011" / "CUB_200_2011"):
        if (root / "images.txt").is_file():
            return root, _published
    raise FileNotFoundError(
        f"no CUB in {path}: looked there and in its folder cub for {' and '.join(TEXT.values())} beside train/ and "
        "test/, and there and in its folder CUB_200_2011 (also twice) for images.txt. Unpack cub.zip "
        "(http://www.robots.ox.ac.uk/~yshi/mmdgm/datasets/cub.zip), or CUB_200_2011.tgz and text_c10; "
        "'emoji-captions' needs no download"
    )


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")


def _by_line(root: Path, split: Split) -> ImageCaptions:
    folder, text = root / split, root / TEXT[split]
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing: it holds a folder of images for each species")
    # One list for both splits, so that a number means the same species in each
    classes = sorted({name for part in TEXT if (root / part).is_dir() for name in _folders(root / part)})
    images, labels = [], []
    for name in _folders(folder):
        inside = [folder / name / file for file in image_files(folder / name)]
        if not inside:
            raise ValueError(f"{folder / name} holds no image, and every folder there is a species")
        images += inside
        labels += [classes.index(name)] * len(inside)
    skipped = Skipped()
    lines = read_lines(text, skipped)
    needed, empty = PER_IMAGE * len(images), [at for at, line in enumerate(lines, start=1) if not line]
    if len(lines) - len(empty) == needed:
        lines = [line for line in lines if line]  # empty lines between captions
    if len(lines) != needed:
        whole, over = divmod(len(lines), PER_IMAGE)
        guess = (
            f"the text is off, it is no multiple of {PER_IMAGE}"
            if over
            else f"the text is whole, so look for {abs(whole - len(images))} images too "
            f"{'few' if whole > len(images) else 'many'} in {folder}"
        )
        blank = f", of them {len(empty)} empty (the first is line {empty[0]})" if empty else ""
        raise ValueError(
            f"{text} has {len(lines)} captions{blank}, and the {len(images)} images in {folder} need {needed}: {guess}"
        )
    if empty:
        # in the place of a caption, or between two: either way every other keeps its image
        skipped.add("an empty line is no caption and left out", f"{text}, line {empty[0]}", len(empty))
    captions = [lines[at : at + PER_IMAGE] for at in range(0, len(lines), PER_IMAGE)]
    sources = [{"what": "CUB", "folder": str(root), "layout": "cub", "text": text.name}]
    return _captioned(split, images, captions, labels, tuple(classes), sources, skipped)


def _captioned(
    split: Split,
    images: list[Path],
    captions: list[list[str]],
    labels: list[int],
    classes: tuple[str, ...],
    sources: list[dict[str, Any]],
    skipped: Skipped,
) -> ImageCaptions:
    """The images with the captions that are not empty; those that have none are left out."""
    told = [[line for line in own if line] for own in captions]
    there = [at for at, own in enumerate(told) if own]
    for at in sorted(set(range(len(images))) - set(there)):
        skipped.add("an image without a caption is left out", str(images[at]))
    if not there:
        raise ValueError(f"no image of the {split} split has a caption, the first is {images[0]}")
    skipped.say()
    return ImageCaptions(
        "cub",
        split,
        [images[at] for at in there],
        [told[at] for at in there],
        np.array([labels[at] for at in there], dtype=np.int64),
        classes,
        sources,
    )


def _table(file: Path) -> dict[str, str]:
    """``{number: value}`` of the lines ``number value``."""
    table: dict[str, str] = {}
    for at, line in enumerate(read_lines(file, what="a number and its value in each line"), start=1):
        if not line:
            continue
        number, _, value = line.partition(" ")
        if not number.isdigit() or not value or number in table:
            raise ValueError(f"{file}, line {at}: not a new number and a value, got {line!r:.80}")
        table[number] = value
    return table


def _published(root: Path, split: Split) -> ImageCaptions:
    names, in_train = _table(root / "images.txt"), _table(root / "train_test_split.txt")
    other = sorted(names.keys() ^ in_train.keys(), key=int)
    if other or set(in_train.values()) - {"0", "1"}:
        what = f"image {other[0]} is in one and not in the other" if other else "it holds something else than 0 and 1"
        raise ValueError(f"{root / 'train_test_split.txt'} does not fit {root / 'images.txt'}: {what}")
    # beside CUB_200_2011 or in it, or as the archives of captions unpack there
    places = (root, root.parent, *((root.parent.parent,) if root.parent.name == root.name else ()))
    folders = [at / below for at in places for below in TEXTS]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(
            f"no captions: looked for {' and '.join(map(str, folders))}, with a file "
            "{NNN.Class}/{image}.txt for each image"
        )

    def text_of(name: str) -> Path:
        return folder / Path(name).with_suffix(".txt")

    classes = tuple(sorted({name.split("/")[0] for name in names.values()}))
    number_of = {name: k for k, name in enumerate(classes)}
    chosen = [names[number] for number in names if (in_train[number] == "1") == (split == "train")]
    if not chosen:
        raise ValueError(f"{root / 'train_test_split.txt'} has no image of the {split} split")
    # paired by name: what is missing moves nothing else
    skipped, captions = Skipped(), []
    for what, file_of in (("image", lambda name: root / "images" / name), ("file of captions", text_of)):
        there = [name for name in chosen if file_of(name).is_file()]
        if len(there) < len(chosen):
            first = file_of(min(set(chosen) - set(there)))
            if not there:
                raise FileNotFoundError(f"{first} is missing, and so is every {what} of the {split} split")
            lost = f"an image of images.txt whose {what} is missing is left out"
            skipped.add(lost, str(first), len(chosen) - len(there))
        chosen = there
    images = [root / "images" / name for name in chosen]
    for name in chosen:
        file = text_of(name)
        captions.append(read_lines(file, skipped, empty=True))
        if "" in captions[-1]:
            skipped.add(
                "an empty line is no caption and left out",
                f"{file}, line {captions[-1].index('') + 1}",
                captions[-1].count(""),
            )
    labels = [number_of[name.split("/")[0]] for name in chosen]
    sources = [{"what": "CUB", "folder": str(root), "layout": "CUB_200_2011", "text": str(folder)}]
    return _captioned(split, images, captions, labels, classes, sources, skipped)
