"""Emoji and their English names: real pairs of an image and a caption from two Debian packages, without a download.

    fonts-noto-color-emoji   /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf     images Apache-2.0, font OFL-1.1
    unicode-cldr-core        /usr/share/unicode/cldr/common/...                    Unicode-DFS-2016

About 1,850 drawings with names of one to nine words stand in for photographs with sentences (CUB, COCO) where those
cannot be had: they exercise the way of a caption through the system. Numbers on them compare with nothing published.
"""

from __future__ import annotations

import hashlib
import io
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from mmebm.data.base import Modality, MultimodalDataset, Split, check_count
from mmebm.data.captions import Codec, ImageCaptions, caption_codec, check_option
from mmebm.data.packages import pillow
from mmebm.data.texts import read_text

__all__ = ["emoji_captions", "in_test", "unicode_set"]

FONT: Final = "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
CLDR: Final = "usr/share/unicode/cldr/common"
NAMES: Final = ("annotations/en.xml", "annotationsDerived/en.xml")
LABELS: Final = "properties/labels.txt"
APT: Final = "apt-get install fonts-noto-color-emoji unicode-cldr-core"
FONT_SIZE: Final = 109  # the font holds bitmaps of this one size
SKIN_TONES: Final = range(0x1F3FB, 0x1F400)
# The codec: names are short, and every word counts where each occurs once or twice
SETTINGS: Final[dict[str, Any]] = {"length": 16}


def emoji_captions(
    split: Split,
    *,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
    n: int | None = None,
    size: int = 32,
    classes: Literal["group", "subgroup"] = "group",
    dim: int = 64,
    codec: Codec = None,
) -> MultimodalDataset:
    """Each emoji with its name; modalities ``"image"`` ``(3, size, size)`` on white and ``"caption"`` ``(dim,)``.

    Variants of skin tone are left out: one drawing in two tones could fall into both splits. Which split an emoji
    belongs to (a fifth is test) depends on its code points alone, and not on the versions of the packages. Classes are
    CLDR's groups ("Food & Drink") or subgroups ("food-fruit"); emoji newer than its table have the label -1.

    Args:
        split: ``"train"`` or ``"test"``.
        seed: of the choice of ``n``; without ``n`` nothing is drawn.
        path: the folder into which both packages were unpacked (``dpkg-deb -x``); by default the system's root.
        n: take this many emoji at random, all by default.
        size: side of the images; they are drawn in 136x136 pixels and made smaller.
        classes: what the labels say.
        dim: size of the code, where the codec is fitted here.
        codec: a file, or a codec; by default one is fitted to the names of the train split (some minutes, once).

    Raises:
        FileNotFoundError: if a file of the two packages is missing; the message says how to install them.
        ModuleNotFoundError: without Pillow, or if it cannot join code points to one emoji (libraqm, libfribidi).
        TypeError, ValueError: for options outside what is said above.
    """
    size, dim = check_count("size", size, least=4), check_count("dim", dim)
    n = None if n is None else check_count("n", n)
    check_option("classes", classes, ("group", "subgroup"))
    root = Path("/" if path is None else path)
    names = _names(root)
    drawn = _draw(_file(root, FONT), list(names), size)
    known = _labels(root, classes)
    label_of = {emoji: known.get(emoji, known.get(emoji[0])) for emoji in drawn}
    class_names = tuple(dict.fromkeys(label for label in known.values() if label in label_of.values()))

    chosen = [emoji for emoji in drawn if in_test(emoji) == (split == "test")]
    if not chosen:
        raise ValueError(f"no emoji of the {split} split among the {len(drawn)} that {root / FONT} can draw")
    modality = Modality("image", (3, size, size), "image")
    found = ImageCaptions(
        name="emoji-captions",
        split=split,
        images=modality.model(np.stack([drawn[emoji] for emoji in chosen])),
        captions=[[names[emoji]] for emoji in chosen],
        labels=np.array(
            [class_names.index(name) if (name := label_of[emoji]) else -1 for emoji in chosen], dtype=np.int64
        ),
        classes=class_names,
        sources=[
            _source(root, FONT, "Apache-2.0 (images), OFL-1.1 (font)"),
            *(_source(root, f"{CLDR}/{file}", "Unicode-DFS-2016") for file in (*NAMES, LABELS)),
        ],
        names=chosen,
    )
    fitted = caption_codec(
        "emoji", lambda: [names[emoji] for emoji in drawn if not in_test(emoji)], codec, dim=dim, **SETTINGS
    )
    options = {"n": n, "size": size, "classes": classes, "dim": dim}
    return found.dataset(fitted, seed=seed, size=size, take="all", n=n, stream=False, options=options)


def in_test(emoji: str) -> bool:
    """Whether an emoji is one of the test split: a fifth, by a hash of its code points."""
    return hashlib.sha256(emoji.encode()).digest()[0] % 5 == 0


def unicode_set(text: str) -> list[str]:
    """The members of a set as CLDR writes it: ``[ab-d{xyz}]`` is a, b, c, d, xyz. Presentation selectors are dropped.

    Raises:
        ValueError: for anything else.
    """
    text = text.strip().replace("\ufe0f", "")
    if text[:1] != "[" or text[-1:] != "]":
        raise ValueError(f"not a set of characters: {text!r}")
    out: list[str] = []
    at, end = 1, len(text) - 1
    while at < end:
        if text[at] == "{":
            close = text.find("}", at)
            if close < 0:
                raise ValueError(f"a brace is not closed in {text!r}")
            out.append(text[at + 1 : close])
            at = close + 1
        elif text[at] == "-" and out and len(out[-1]) == 1 and at + 1 < end:
            out += [chr(code) for code in range(ord(out[-1]) + 1, ord(text[at + 1]) + 1)]
            at += 2
        else:
            out.append(text[at])
            at += 1
    return out


def _file(root: Path, relative: str) -> Path:
    path = root / relative
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: {APT}; or, without the rights to, apt-get download and "
            "dpkg-deb -x into a folder of your own, and path= that folder"
        )
    return path


def _source(root: Path, relative: str, licence: str) -> dict[str, Any]:
    path = root / relative
    return {
        "what": "emoji",
        "file": str(path),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "licence": licence,
    }


def _names(root: Path) -> dict[str, str]:
    """Emoji -> its English short name, in the order of the files, without skin tones and plain ASCII."""
    names: dict[str, str] = {}
    for relative in NAMES:
        path = _file(root, f"{CLDR}/{relative}")
        try:
            annotations = list(ElementTree.parse(path).iter("annotation"))
        except (ElementTree.ParseError, ValueError, LookupError) as error:
            raise ValueError(
                f"{path} cannot be read as XML: {error}; apt-get install --reinstall unicode-cldr-core"
            ) from error
        for annotation in annotations:
            emoji, name = annotation.get("cp", ""), (annotation.text or "").strip()
            toned = any(ord(character) in SKIN_TONES for character in emoji)
            if annotation.get("type") == "tts" and emoji and name and not toned and not emoji.isascii():
                names[emoji] = name
    if not names:
        raise ValueError(f"no names in {' and '.join(str(root / CLDR / file) for file in NAMES)}")
    return names


def _labels(root: Path, level: str) -> dict[str, str]:
    path = _file(root, f"{CLDR}/{LABELS}")
    labels: dict[str, str] = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        parts = [part.strip() for part in line.split(";")]
        try:
            members = unicode_set(parts[0])
            label = parts[{"group": 1, "subgroup": 2}[level]]
        except (ValueError, IndexError) as error:
            raise ValueError(f"{path}, line {number}: not 'set ; group ; subgroup': {error}") from error
        labels.update(dict.fromkeys(members, label))
    return labels


def _draw(font_file: Path, emoji: list[str], size: int) -> dict[str, NDArray[np.uint8]]:
    """Those of ``emoji`` that the font has as one glyph: uint8 ``(3, size, size)`` on white."""
    image = pillow()
    from PIL import ImageDraw, ImageFont, features

    if not features.check("raqm"):
        raise ModuleNotFoundError(
            "Pillow needs libraqm and libfribidi to join code points to one emoji: pip install 'mmebm[train]' brings "
            "a Pillow with the first, apt-get install libfribidi0 the second",
            name="PIL",
        )
    try:
        # Its bytes: of a path that it cannot read, Pillow looks for the name elsewhere on the system
        font = ImageFont.truetype(io.BytesIO(font_file.read_bytes()), FONT_SIZE)
    except OSError as error:
        raise ValueError(
            f"{font_file} cannot be read as a font: {error}; apt-get install --reinstall fonts-noto-color-emoji"
        ) from error
    drawn: dict[str, NDArray[np.uint8]] = {}
    side = 0
    for one in emoji:
        left, top, right, bottom = font.getbbox(one)
        wide, high = round(right - left), round(bottom - top)
        side = side or wide
        if not high or wide > 1.5 * side:  # no glyph, or several that were not joined
            continue
        canvas = image.new("RGB", (side, side), "white")
        at = ((side - wide) / 2 - left, (side - high) / 2 - top)
        ImageDraw.Draw(canvas).text(at, one, font=font, embedded_color=True)
        small = canvas.resize((size, size), image.Resampling.LANCZOS)
        drawn[one] = np.asarray(small).transpose(2, 0, 1)
    return drawn
