"""Captions: words, vocabulary, and the image-caption sets in each of their layouts."""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import random
import shutil
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmebm.data import captions as module
from mmebm.data import emoji as emoji_module
from mmebm.data.base import Modality, MultimodalDataset
from mmebm.data.captions import caption_codec
from mmebm.data.coco import coco
from mmebm.data.cub import cub
from mmebm.data.emoji import emoji_captions, in_test, unicode_set
from mmebm.data.text_codec import TextAutoencoder, fit_text_autoencoder
from mmebm.data.texts import read_lines
from mmebm.data.words import END, UNKNOWN, Vocabulary, join, tokens
from mmebm.files import FolderLock
from mmebm.training.reading import keep_codecs

# by name: mmebm.data gives the functions their names
cub_module, coco_module = (importlib.import_module(f"mmebm.data.{name}") for name in ("cub", "coco"))

ENGLISH = f"{emoji_module.CLDR}/annotations/en.xml"
TABLE = f"{emoji_module.CLDR}/properties/labels.txt"
REAL_EMOJI = all((Path("/") / file).is_file() for file in (emoji_module.FONT, ENGLISH))
QUICK = {"length": 8, "embedding": 8, "hidden": 16, "round": 2, "rounds": 1}


class Numbers:
    """A codec that cannot lose anything: the bits of the caption's place in a list."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        self.seen += [text for text in texts if text not in self.seen]
        places = torch.tensor([self.seen.index(text) for text in texts])
        return ((places[:, None] >> torch.arange(12) & 1) * 2 - 1).float()

    def decode(self, codes: torch.Tensor) -> list[str]:
        return [self.seen[int(((code > 0).long() << torch.arange(12)).sum())] for code in codes]


def write_image(file: Path, number: int) -> None:
    image = pytest.importorskip("PIL.Image")
    file.parent.mkdir(parents=True, exist_ok=True)
    image.new("RGB", (9 + number, 12), (10 * number + 5, 0, 250 - 10 * number)).save(file, quality=95)


def numbers_of(data: MultimodalDataset) -> list[tuple[int, str]]:
    """For each tuple the number that its image shows and its caption."""
    batch = data.batch(torch.arange(len(data)))
    image, caption = data.modalities
    natural = image.natural(batch["image"])
    # JPEG of one colour is off by a few levels of 255; numbers are ten apart
    numbers = np.rint((natural[:, 0].mean(axis=(1, 2)) * 255 - 5) / 10).astype(int)
    assert (
        np.abs(natural.mean(axis=(2, 3)) * 255 - np.stack([10 * numbers + 5, 0 * numbers, 250 - 10 * numbers], 1)).max()
        < 5
    )
    return list(zip(numbers.tolist(), caption.natural(batch["caption"]).tolist(), strict=True))


# ---------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("text", "words", "normal"),
    [
        ("A small, Yellow-bellied bird.", "a small , yellow - bellied bird .", "a small, yellow-bellied bird."),
        ("the bird's  (black) bill!", "the bird's ( black ) bill !", "the bird's (black) bill!"),
        ("flag: Côte d’Ivoire", "flag : côte d’ivoire", "flag: côte d’ivoire"),
        ("3 o'clock\t50%", "3 o'clock 50 %", "3 o'clock 50%"),
        ("Two sentences. In one line.", "two sentences . in one line .", "two sentences. in one line."),
        ("a <unk> bird", "a <unk> bird", "a <unk> bird"),
        ("  ", "", ""),
    ],
)
def test_words_of_a_caption(text: str, words: str, normal: str) -> None:
    assert tokens(text) == words.split() and join(tokens(text)) == normal


def test_joined_words_are_the_same_words(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(300):
        text = "".join(draw.choice("abÉß'’-–.,:;!?()[]{}%/_<>&\"1\u0301 \n") for _ in range(draw.randrange(20)))
        assert tokens(join(tokens(text))) == tokens(text), repr(text)


def test_vocabulary_counts_and_orders() -> None:
    vocabulary = Vocabulary.of(["a red bird.", "A bird", "a bird a"], least=2)
    assert vocabulary.words == (END, UNKNOWN, "a", "bird") and len(vocabulary) == 4
    assert Vocabulary.of(["b a <unk>"]).words == (END, UNKNOWN, "a", "b")
    numbers = vocabulary.numbers(["a red bird.", "bird", "", "a a a a a a"], 5)
    assert numbers.tolist() == [[2, 1, 3, 1, 0], [3, 0, 0, 0, 0], [0] * 5, [2, 2, 2, 2, 0]]
    assert vocabulary.captions(numbers) == ["a <unk> bird <unk>", "bird", "", "a a a a"]
    assert vocabulary.captions(torch.tensor([[2, 3, 2], [2, 0, 3]])) == ["a bird a", "a"]
    with pytest.raises(ValueError, match="distinct and begin with"):
        Vocabulary(("a", "b"))


def test_lines_are_captions(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes("One. Two.\r\nthree\u2028four\x0bfive\nsix \xe9\n\n\n".encode())
    assert read_lines(file) == ["One. Two.", "three\u2028four\x0bfive", "six é"]
    file.write_bytes(b"one\ncaf\xe9\n")
    with pytest.warns(UserWarning, match=r"text\.txt, line 2: bytes that are no UTF-8 .*\(1 in all\)"):
        assert read_lines(file) == ["one", "caf\ufffd"]
    file.write_text("a\n\nb\n")
    assert read_lines(file) == ["a", "", "b"]
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):  # with the mark of each
        file.write_bytes("größe\r\n二\r\n".encode(encoding))
        assert read_lines(file) == ["größe", "二"]
    file.write_bytes(b"old\rMac\r")
    assert read_lines(file) == ["old", "Mac"]
    file.write_bytes(b"\xff\xfea\0b")
    with pytest.raises(ValueError, match=r"text\.txt is not the UTF-16"):
        read_lines(file)
    file.write_text("\n")
    with pytest.raises(ValueError, match=r"text\.txt is empty"):
        read_lines(file)
    with pytest.raises(FileNotFoundError, match=r"absent\.txt is missing"):
        read_lines(tmp_path / "absent.txt")


# ---------------------------------------------------------------------------------------------- CUB

SPECIES = {"train": {"002.Auk": 2, "001.Wren": 3}, "test": {"010.Owl": 2}}


def write_cub(root: Path, per_image: int = 10) -> None:
    """Image k, counted in sorted order, has the captions "{split} {k} {0..9}."; files are written in another order."""
    for split, text in (("train", "text_trainvalclasses.txt"), ("test", "text_testclasses.txt")):
        files = [
            root / split / name / f"b{k}.jpg" for name in sorted(SPECIES[split]) for k in range(SPECIES[split][name])
        ]
        for number, file in reversed(list(enumerate(files))):
            write_image(file, number)
        lines = [f"{split} {k} {j}." for k in range(len(files)) for j in range(per_image)]
        (root / text).write_text("\n".join(lines) + "\n")


def write_published_cub(root: Path) -> None:
    """Images 1 to 6 of two species, odd ones train; the numbers in images.txt are in another order than the names."""
    folder = root / "CUB_200_2011"
    names = {k: f"00{k % 2 + 1}.{'Wren' if k % 2 else 'Auk'}/Bird_{7 - k}.jpg" for k in range(1, 7)}
    for k, name in names.items():
        write_image(folder / "images" / name, k)
        text = root / "text_c10" / Path(name).with_suffix(".txt")
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text("".join(f"bird {k} {j}\n" for j in range(10)))
    (folder / "images.txt").write_text("".join(f"{k} {name}\n" for k, name in names.items()))
    (folder / "train_test_split.txt").write_text("".join(f"{k} {int(k in (1, 2, 5))}\n" for k in names))


@pytest.mark.parametrize("below", ["", "cub"])
@pytest.mark.parametrize("stream", [False, True])
def test_ten_lines_belong_to_an_image(tmp_path: Path, below: str, stream: bool) -> None:
    write_cub(tmp_path / below)
    (tmp_path / below / "train/001.Wren/._b0.jpg").write_bytes(b"left by an archiver")
    train = cub("train", path=tmp_path, size=8, stream=stream, codec=Numbers())
    assert len(train) == 50 and train.modalities[0].shape == (3, 8, 8) and train.modalities[1].kind == "caption"
    assert isinstance(train.pools["image"], torch.Tensor) != stream
    assert sorted(numbers_of(train)) == sorted((k, f"train {k} {j}.") for k in range(5) for j in range(10))
    assert train.classes == ("001.Wren", "002.Auk", "010.Owl")
    assert train.labels.tolist() == [0] * 30 + [1] * 20
    test = cub("test", path=str(tmp_path), size=8, stream=stream, codec=Numbers())
    assert test.classes == train.classes and set(test.labels.tolist()) == {2}
    assert json.loads(json.dumps(test.info))["sources"][0]["layout"] == "cub"


def test_published_cub_is_paired_by_name(tmp_path: Path) -> None:
    write_published_cub(tmp_path)
    for split, members in (("train", (1, 2, 5)), ("test", (3, 4, 6))):
        data = cub(split, path=tmp_path, size=8, codec=Numbers())
        assert sorted(numbers_of(data)) == sorted((k, f"bird {k} {j}") for k in members for j in range(10))
        assert data.classes == ("001.Auk", "002.Wren")
        assert all(label == number % 2 for label, (number, _) in zip(data.labels.tolist(), numbers_of(data)))
    shutil.move(tmp_path / "text_c10", tmp_path / "CUB_200_2011" / "text_c10")
    assert len(cub("test", path=tmp_path / "CUB_200_2011", size=8, codec=Numbers())) == 30


def test_one_caption_is_drawn_for_each_image(tmp_path: Path) -> None:
    write_cub(tmp_path)
    drawn = [
        numbers_of(cub("train", path=tmp_path, size=8, captions="one", codec=Numbers(), seed=seed))
        for seed in (0, 0, *range(1, 9))
    ]
    assert drawn[0] == drawn[1] and len({tuple(one) for one in drawn}) > 5
    for one in drawn:
        assert [number for number, _ in one] == [0, 1, 2, 3, 4]
        assert all(caption.startswith(f"train {number} ") for number, caption in one)


def test_n_takes_tuples_at_random(tmp_path: Path) -> None:
    write_cub(tmp_path)
    data = cub("train", path=tmp_path, size=8, n=7, codec=Numbers())
    assert len(data) == 7 == len(set(numbers_of(data)))
    assert all(caption.startswith(f"train {number} ") for number, caption in numbers_of(data))
    with pytest.raises(ValueError, match="at most the 50 tuples"):
        cub("train", path=tmp_path, size=8, n=51, codec=Numbers())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("line more", ValueError, r"trainvalclasses\.txt has 51 captions, .*5 images .*need 50: the text is off"),
        ("line less", ValueError, r"trainvalclasses\.txt has 49 captions, .*the text is off"),
        ("two off", ValueError, r"has 51 captions, of them 2 empty \(the first is line 14\), .* need 50"),
        ("image less", ValueError, r"has 50 captions, and the 4 images in .*train need 40: .* 1 images too few"),
        ("image more", ValueError, r"the 6 images .*look for 1 images too many"),
        ("no image", ValueError, r"003\.Empty holds no image"),
        ("no text", FileNotFoundError, r"text_trainvalclasses\.txt is missing"),
        ("no folder", FileNotFoundError, r"train is missing"),
        ("broken image", ValueError, r"b0\.jpg cannot be read as an image"),
    ],
)
def test_what_does_not_pair_up_is_named(tmp_path: Path, change: str, error: type[Exception], message: str) -> None:
    write_cub(tmp_path)
    text = tmp_path / "text_trainvalclasses.txt"
    lines = text.read_text().split("\n")[:-1]
    if change == "line more":
        text.write_text("\n".join([*lines[:12], "In one line.", *lines[12:]]))
    elif change == "line less":
        text.write_text("\n".join(lines[:12] + lines[13:]))
    elif change == "two off":
        text.write_text("\n".join([*lines[:13], "", "", *lines[14:]]))
    elif change == "image less":
        (tmp_path / "train/002.Auk/b0.jpg").unlink()
    elif change == "image more":
        write_image(tmp_path / "train/002.Auk/b9.jpg", 1)
    elif change == "no image":
        (tmp_path / "train/003.Empty").mkdir()
    elif change == "no text":
        text.unlink()
    elif change == "no folder":
        shutil.rmtree(tmp_path / "train")
    else:
        (tmp_path / "train/002.Auk/b0.jpg").write_bytes(b"no picture")
    with pytest.raises(error, match=message):
        cub("train", path=tmp_path, size=8, codec=Numbers())


@pytest.mark.parametrize("change", ["between", "one", "all"])
def test_an_empty_line_moves_no_caption(tmp_path: Path, change: str) -> None:
    """Beside the captions, in the place of one, and in the place of all of an image."""
    write_cub(tmp_path)
    before = cub("train", path=tmp_path, size=8, codec=Numbers())
    text = tmp_path / "text_trainvalclasses.txt"
    lines = text.read_text().split("\n")[:-1]
    gone = {"between": range(0), "one": range(12, 13), "all": range(10, 20)}[change]
    held = [line for at, line in enumerate(lines) if at not in gone]
    lines = (
        [*lines[:12], "", *lines[12:]]
        if change == "between"
        else ["" if at in gone else line for at, line in enumerate(lines)]
    )
    text.write_text("\n".join(lines))
    with pytest.warns(UserWarning) as said:
        after = cub("train", path=tmp_path, size=8, codec=Numbers())
    messages = [str(one.message) for one in said]
    first, count = (13, 1) if change != "all" else (11, 10)
    assert f"{text}, line {first}: an empty line is no caption and left out ({count} in all)" in messages
    assert len(messages) == (2 if change == "all" else 1)
    kept = set(held)
    assert numbers_of(after) == [(number, caption) for number, caption in numbers_of(before) if caption in kept]
    assert len(after) == 50 - len(gone) and after.labels.tolist() == [
        label for (_, caption), label in zip(numbers_of(before), before.labels.tolist()) if caption in kept
    ]


@pytest.mark.parametrize(
    ("file", "content", "error", "message"),
    [
        ("CUB_200_2011/train_test_split.txt", "1 1\n2 0\n", ValueError, "image 3 is in one and not in the other"),
        ("CUB_200_2011/train_test_split.txt", "1 7\n2 0\n3 0\n4 0\n5 1\n6 1", ValueError, "else than 0 and 1"),
        ("CUB_200_2011/train_test_split.txt", "1 1\n1 0\n", ValueError, r"split\.txt, line 2: not a new number"),
        ("CUB_200_2011/train_test_split.txt", None, FileNotFoundError, r"split\.txt is missing: it holds a number"),
    ],
)
def test_published_cub_that_does_not_pair_up(
    tmp_path: Path, file: str, content: str | None, error: type[Exception], message: str
) -> None:
    write_published_cub(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(error, match=message):
        cub("train", path=tmp_path, size=8, codec=Numbers())


@pytest.mark.parametrize("content", ["", " \n\n"])
def test_an_image_whose_captions_are_empty_is_left_out(tmp_path: Path, content: str) -> None:
    write_published_cub(tmp_path)
    before = numbers_of(cub("train", path=tmp_path, size=8, codec=Numbers()))
    (tmp_path / "text_c10/002.Wren/Bird_2.txt").write_text(content)
    with pytest.warns(UserWarning, match=r"Bird_2\.jpg: an image without a caption is left out \(1 in all\)"):
        after = numbers_of(cub("train", path=tmp_path, size=8, codec=Numbers()))
    assert after == [pair for pair in before if pair[0] != 5]
    for file in (tmp_path / "text_c10").rglob("*.txt"):
        file.write_text(content)
    with pytest.raises(ValueError, match="no image of the train split has a caption"):
        cub("train", path=tmp_path, size=8, codec=Numbers())


@pytest.mark.parametrize("below", ["CUB_200_2011/text_c10", "text_c10"])
def test_an_archive_unpacked_into_a_folder_of_its_name(tmp_path: Path, below: str) -> None:
    write_published_cub(tmp_path)
    before = numbers_of(cub("train", path=tmp_path, size=8, codec=Numbers()))
    (tmp_path / "CUB_200_2011").rename(tmp_path / "inner")
    (tmp_path / "CUB_200_2011").mkdir()
    (tmp_path / "inner").rename(tmp_path / "CUB_200_2011/CUB_200_2011")
    (tmp_path / "text_c10").rename(tmp_path / below)
    assert numbers_of(cub("train", path=tmp_path, size=8, codec=Numbers())) == before


@pytest.mark.parametrize("stream", [True, False])
def test_images_keep_the_names_of_their_files(tmp_path: Path, stream: bool) -> None:
    write_published_cub(tmp_path)
    data = cub("train", path=tmp_path, size=8, stream=stream, codec=Numbers())
    assert data.names is not None and set(data.names["image"]) == {
        "002.Wren/Bird_6.jpg",
        "001.Auk/Bird_5.jpg",
        "002.Wren/Bird_2.jpg",
    }


@pytest.mark.parametrize("lost", ["text_c10/002.Wren/Bird_2.txt", "CUB_200_2011/images/002.Wren/Bird_2.jpg"])
def test_what_is_missing_from_published_cub_is_left_out(tmp_path: Path, lost: str) -> None:
    """Images are paired by name, so that no other loses its captions."""
    write_published_cub(tmp_path)
    before = numbers_of(cub("train", path=tmp_path, size=8, codec=Numbers()))
    (tmp_path / lost).unlink()
    with pytest.warns(UserWarning, match=r"Bird_2\.\w+: an image of images\.txt whose .* is missing .*\(1 in all\)"):
        after = numbers_of(cub("train", path=tmp_path, size=8, codec=Numbers()))
    numbers = {number for number, _ in after}
    assert len({number for number, _ in before} - numbers) == 1
    assert after == [pair for pair in before if pair[0] in numbers]
    for file in (tmp_path / lost).parent.parent.rglob("*" + Path(lost).suffix):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"is missing, and so is every .* of the train split"):
        cub("train", path=tmp_path, size=8, codec=Numbers())


@pytest.mark.parametrize("below", ["cvpr2016_cub/text_c10", "birds/text_c10", "text", "CUB_200_2011/text"])
def test_captions_where_their_archives_put_them(tmp_path: Path, below: str) -> None:
    write_published_cub(tmp_path)
    before = numbers_of(cub("train", path=tmp_path, size=8, codec=Numbers()))
    (tmp_path / below).parent.mkdir(exist_ok=True)
    (tmp_path / "text_c10").rename(tmp_path / below)
    assert numbers_of(cub("train", path=tmp_path, size=8, codec=Numbers())) == before


def test_images_missing_from_coco_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others keep their captions, and the codec is that of all captions, whichever split asks for it."""
    write_coco(tmp_path)
    before = numbers_of(coco("train", path=tmp_path, size=8, captions="all", codec=Numbers()))
    (tmp_path / "train2014/COCO_train2014_000000000004.jpg").unlink()
    with pytest.warns(UserWarning, match=r"0*4\.jpg: an image that captions_train2014\.json .* left out \(1 in all\)"):
        after = coco("train", path=tmp_path, size=8, captions="all", codec=Numbers())
    assert numbers_of(after) == [pair for pair in before if pair[0] != 4] and len(after) < len(before)
    assert after.info["sources"][0]["missing"] == 1
    asked: list[list[str]] = []
    monkeypatch.setattr(
        coco_module, "caption_codec", lambda name, train, *_, **__: (asked.append(train()), (Numbers(), {}))[1]
    )
    with pytest.warns(UserWarning, match="left out"):
        coco("train", path=tmp_path, size=8)
    coco("test", path=tmp_path, size=8)
    assert asked[0] == asked[1] and len(asked[0]) == len(before)


def test_one_process_fits_a_codec_and_others_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the processes of torchrun do, which all want it at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    captions = ["a red bird", "a blue bird"] * 4
    ready, _ = caption_codec("cub", lambda: captions, None, **QUICK)
    (file,) = (tmp_path / "mmebm").glob("*.pt")
    kept = file.read_bytes()
    file.unlink()
    monkeypatch.setattr(module, "fit_text_autoencoder", lambda *_, **__: pytest.fail("fitted by two"))
    lock, found = FolderLock(file.with_suffix(".fitting")), []

    def wants() -> None:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found.append(caption_codec("cub", lambda: captions, None, **QUICK)[0])
        found.append([str(one.message) for one in said])

    other = threading.Thread(target=wants)
    other.start()
    other.join(0.5)
    assert other.is_alive()  # it waits
    file.write_bytes(kept)
    lock.release(remove_empty=True)
    other.join(20)
    assert torch.equal(found[0].encode(captions), ready.encode(captions))
    assert len(found[1]) == 1 and "waiting:" in found[1][0]
    assert list((tmp_path / "mmebm").iterdir()) == [file]


def test_where_cub_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"text_trainvalclasses\.txt.*CUB_200_2011.*emoji-captions"):
        cub("train", path=tmp_path)
    with pytest.raises(ValueError, match="give path="):
        cub("train")
    with pytest.raises(ValueError, match="captions must be 'all' or 'one', got 'two'"):
        cub("train", path=tmp_path, captions="two")  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- COCO


def write_coco(root: Path, year: int = 2014, below: str = "") -> None:
    """Images 1 to 4 with 2 or 3 captions each, the captions of all shuffled."""
    for part in ("train", "val"):
        prefix = f"COCO_{part}{year}_" if year == 2014 else ""
        names = {k: f"{prefix}{k:012d}.jpg" for k in (3, 1, 4, 2)}
        for k, name in names.items():
            write_image(root / below / f"{part}{year}" / name, k)
        pairs = [
            {"image_id": k, "id": 10 * k + j, "caption": f"{part} {k} {j}.\n"} for k in names for j in range(2 + k % 2)
        ]
        random.Random(0).shuffle(pairs)
        (root / "annotations").mkdir(exist_ok=True)
        images = [{"id": k, "file_name": name} for k, name in names.items()]
        content = {"info": {}, "images": images, "annotations": pairs}
        (root / "annotations" / f"captions_{part}{year}.json").write_text(json.dumps(content))


@pytest.mark.parametrize(("year", "below"), [(2014, ""), (2017, ""), (2017, "images")])
def test_coco_is_paired_by_number(tmp_path: Path, year: int, below: str) -> None:
    write_coco(tmp_path, year, below)
    every = coco("test", path=tmp_path, size=8, captions="all", codec=Numbers())
    assert sorted(numbers_of(every)) == sorted((k, f"val {k} {j}.") for k in range(1, 5) for j in range(2 + k % 2))
    assert every.classes == () and set(every.labels.tolist()) == {-1}
    assert not isinstance(every.pools["image"], torch.Tensor)
    one = coco("train", path=tmp_path, size=8, codec=Numbers(), stream=False, seed=3)
    assert [number for number, _ in numbers_of(one)] == [3, 1, 4, 2]
    assert all(caption.startswith(f"train {number} ") for number, caption in numbers_of(one))
    assert one.info["options"]["year"] == year


def test_the_later_year_is_taken_unless_one_is_named(tmp_path: Path) -> None:
    write_coco(tmp_path, 2014)
    write_coco(tmp_path, 2017)
    assert coco("train", path=tmp_path, codec=Numbers()).info["options"]["year"] == 2017
    assert coco("train", path=tmp_path, codec=Numbers(), year=2014).info["options"]["year"] == 2014
    # one year for both splits, since the one's train images are among the other's test images
    shutil.rmtree(tmp_path / "train2017")
    for split in ("train", "test"):
        assert coco(split, path=tmp_path, codec=Numbers()).info["options"]["year"] == 2014
    shutil.rmtree(tmp_path / "train2014")
    (tmp_path / "annotations/captions_train2014.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no images: looked for .*train2017; year= takes another year"):
        coco("train", path=tmp_path, codec=Numbers())
    with pytest.raises(ValueError, match="year must be 2014 or 2017, got 2015"):
        coco("train", path=tmp_path, year=2015)


@pytest.mark.parametrize("wrong", [{"caption": None}, {"caption": 7}, {"caption": " "}, {"image_id": None}, {}, None])
def test_a_bad_annotation_of_coco_is_left_out(tmp_path: Path, wrong: Any) -> None:
    write_coco(tmp_path)
    whole = coco("train", path=tmp_path, size=8, captions="all", codec=Numbers())
    file = tmp_path / "annotations/captions_train2014.json"
    content: dict[str, Any] = json.loads(file.read_text())
    lost = content["annotations"][3]["caption"]
    if wrong:
        content["annotations"][3].update(wrong)
    else:
        content["annotations"][3] = wrong
    file.write_text("\ufeff" + json.dumps(content), encoding="utf-8")
    with pytest.warns(UserWarning, match=r"captions_train2014\.json, annotations\[3\].*\(1 in all\)") as said:
        data = coco("train", path=tmp_path, size=8, captions="all", codec=Numbers())
    assert len(said) == 1
    assert numbers_of(data) == [one for one in numbers_of(whole) if one[1] != " ".join(lost.split())]
    assert len(data) == len(whole) - 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("swapped", ValueError, r"captions_train2014\.json: image 1 has the file of another, COCO_train2014_0*2\.jpg"),
        ("stranger", ValueError, r"a caption is for image 99, which is not among"),
        ("twice", ValueError, r"image 3 is there twice"),
        ("mute", ValueError, r"image 4 has no caption \(1 such images\)"),
        ("key", ValueError, r"captions_train2014\.json is not a caption file of COCO: it has no list 'ann"),
        ("cut", ValueError, r"captions_train2014\.json is not JSON"),
        ("id", ValueError, r"captions_train2014\.json, images\[2\]: .* an integer 'id'"),
        ("name", ValueError, r"captions_train2014\.json, images\[2\]: .* a string 'file_name', got .*3"),
        ("list", ValueError, r"captions_train2014\.json is not a caption file"),
        ("images", FileNotFoundError, r"COCO_train2014_000000000001\.jpg is missing, and so are all 4 images"),
        ("folder", FileNotFoundError, r"no images: looked for .*train2014 and .*images.train2014"),
        ("file", FileNotFoundError, r"captions_train2014\.json is missing.*cocodataset"),
    ],
)
def test_coco_that_does_not_pair_up(tmp_path: Path, change: str, error: type[Exception], message: str) -> None:
    write_coco(tmp_path)
    file = tmp_path / "annotations/captions_train2014.json"
    content: dict[str, Any] = json.loads(file.read_text())
    images = {image["id"]: image for image in content["images"]}
    if change == "swapped":
        images[1]["file_name"], images[2]["file_name"] = images[2]["file_name"], images[1]["file_name"]
    elif change == "stranger":
        content["annotations"][0]["image_id"] = 99
    elif change == "twice":
        content["images"].append(images[3])
    elif change == "mute":
        content["annotations"] = [one for one in content["annotations"] if one["image_id"] != 4]
    elif change == "key":
        del content["annotations"]
    elif change == "id":
        content["images"][2]["id"] = str(content["images"][2]["id"])
    elif change == "name":
        content["images"][2]["file_name"] = 3
    elif change == "list":
        content = [content]  # type: ignore[assignment]
    elif change == "images":
        for image in images.values():
            (tmp_path / "train2014" / image["file_name"]).unlink()
    elif change == "folder":
        shutil.rmtree(tmp_path / "train2014")
    file.write_text(json.dumps(content)[: 80 if change == "cut" else None])
    if change == "file":
        file.unlink()
    with pytest.raises(error, match=message):
        coco("train", path=tmp_path, size=8, codec=Numbers())


# ---------------------------------------------------------------------------------------------- the codec


def test_the_codec_is_fitted_once_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cub_module, "SETTINGS", QUICK)
    write_cub(tmp_path)
    with caplog.at_level(logging.WARNING):
        test = cub("test", path=tmp_path, size=8, dim=6)
    assert "50 captions of 'cub', once" in caplog.text  # of the train split, whichever was asked for
    kept = list((tmp_path / "cache" / "mmebm").iterdir())
    assert [str(file) for file in kept] == [test.info["codec"]["file"]]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("fitted again")

    with monkeypatch.context() as patch:
        patch.setattr("mmebm.data.captions.fit_text_autoencoder", refuse)
        again, train = (cub(split, path=tmp_path, size=8, dim=6) for split in ("test", "train"))
        given = cub("test", path=tmp_path, size=8, codec=kept[0])
        with pytest.raises(AssertionError, match="fitted again"):
            cub("test", path=tmp_path, size=8, dim=7)
        (tmp_path / "text_trainvalclasses.txt").write_text("other\n" * 50)
        with pytest.raises(AssertionError, match="fitted again"):
            cub("test", path=tmp_path, size=8, dim=6)
    assert torch.equal(again.pools["caption"], test.pools["caption"])
    assert torch.equal(given.pools["caption"], test.pools["caption"])
    assert test.modalities == train.modalities and test.modalities[1].shape == (6,)
    assert test.info["codec"]["sha256"] == train.info["codec"]["sha256"]
    # one code for one caption, and the codec of the modality is the one that made it
    assert torch.allclose(test.pools["caption"][3:4], test.modalities[1].model(["test 0 3."]), atol=1e-5)


def test_a_bad_codec_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="codec must be a file, an object with encode and decode, or None, got 3"):
        caption_codec("x", list, 3)  # type: ignore[arg-type]
    (tmp_path / "codec.pt").write_text("nothing")
    with pytest.raises(ValueError, match=r"codec\.pt is not a text autoencoder"):
        caption_codec("x", list, tmp_path / "codec.pt")


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert module.cache_folder() == tmp_path / ".cache" / "mmebm"


# ---------------------------------------------------------------------------------------------- emoji

NAMES = """<?xml version="1.0" encoding="UTF-8" ?>
<!DOCTYPE ldml SYSTEM "../../common/dtd/ldml.dtd">
<ldml><identity><language type="en"/></identity><annotations>
<annotation cp="{">brace | bracket</annotation><annotation cp="{" type="tts">open curly bracket</annotation>
<annotation cp="🏻" type="tts">light skin tone</annotation>
<annotation cp="👋🏽" type="tts">waving hand: medium skin tone</annotation>
<annotation cp="😀">face | grin</annotation><annotation cp="😀" type="tts">grinning face</annotation>
ROWS</annotations></ldml>
"""
LABELS = "# labels.txt\n\n[😀-😆☺️] ;\tSmileys & People ; face-positive\n[🐀-🐏] ; Animals & Nature ; animal-mammal\n"


def write_emoji(root: Path) -> None:
    folder = root / emoji_module.CLDR
    animals = "".join(
        f'<annotation cp="{chr(code)}" type="tts">animal {code:x}</annotation>\n' for code in range(0x1F400, 0x1F420)
    )
    for file, rows in ((emoji_module.NAMES[0], animals), (emoji_module.NAMES[1], "")):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        text = NAMES.replace("ROWS", rows) if rows else "<ldml><annotations/></ldml>"
        (folder / file).write_text(text, encoding="utf-8")
    (folder / "properties").mkdir()
    (folder / emoji_module.LABELS).write_text(LABELS, encoding="utf-8")
    (root / emoji_module.FONT).parent.mkdir(parents=True)
    (root / emoji_module.FONT).write_bytes(b"no font")


def draw(font: Path, emoji: list[str], size: int) -> dict[str, np.ndarray]:
    """Stands in for the font: every emoji in a colour of its own."""
    return {one: np.full((3, size, size), ord(one[0]) % 256, dtype=np.uint8) for one in emoji}


def test_sets_of_characters() -> None:
    assert unicode_set(" [ab-d{xy\ufe0fz}☺\ufe0f] ") == ["a", "b", "c", "d", "xyz", "☺"]
    assert unicode_set("[-a]") == ["-", "a"] and unicode_set("[]") == []
    for wrong in ("abc", "[a", "[{ab]", ""):
        with pytest.raises(ValueError):
            unicode_set(wrong)


def test_emoji_keep_their_names_and_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_emoji(tmp_path)
    monkeypatch.setattr(emoji_module, "_draw", draw)
    seen: dict[str, str] = {}
    for split in ("train", "test"):
        data = emoji_captions(split, path=tmp_path, size=4, codec=Numbers())
        batch = data.batch(torch.arange(len(data)))
        shown = np.rint(data.modalities[0].natural(batch["image"])[:, 0, 0, 0] * 255).astype(int)
        names = data.modalities[1].natural(batch["caption"]).tolist()
        for colour, name, label in zip(shown.tolist(), names, data.labels.tolist()):
            code = 0x1F600 if name == "grinning face" else int(name.split()[1], 16)
            assert colour == code % 256 and in_test(chr(code)) == (split == "test") and name not in seen
            seen[name] = "" if label < 0 else data.classes[label]
        assert data.classes == ("Smileys & People", "Animals & Nature")
    assert len(seen) == 33  # no skin tone, no brace
    assert seen["grinning face"] == "Smileys & People" and seen["animal 1f40f"] == "Animals & Nature"
    assert seen["animal 1f410"] == ""  # not in the table
    data = emoji_captions("train", path=tmp_path, size=4, classes="subgroup", codec=Numbers(), n=5)
    assert len(data) == 5 and "animal-mammal" in data.classes


@pytest.mark.parametrize(
    ("file", "content", "error", "message"),
    [
        (emoji_module.FONT, None, FileNotFoundError, r"ColorEmoji\.ttf is missing: apt-get install fonts-noto-color"),
        (ENGLISH, None, FileNotFoundError, r"en\.xml is missing: .*unicode-cldr-core"),
        (TABLE, None, FileNotFoundError, r"labels\.txt is missing"),
        (ENGLISH, "<ldml>", ValueError, r"annotations.en\.xml cannot be read as XML"),
        (ENGLISH, "<ldml/>", ValueError, "no names in"),
        (TABLE, "[ab ; c ; d", ValueError, r"labels\.txt, line 1"),
        (TABLE, "[ab]", ValueError, r"labels\.txt, line 1"),
    ],
)
def test_a_missing_or_broken_file_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    content: str | None,
    error: type[Exception],
    message: str,
) -> None:
    write_emoji(tmp_path)
    if file != emoji_module.FONT:
        monkeypatch.setattr(emoji_module, "_draw", draw)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(error, match=message):
        emoji_captions("train", path=tmp_path, codec=Numbers())


def test_a_file_that_is_no_font_is_named(tmp_path: Path) -> None:
    pytest.importorskip("PIL.ImageFont")
    write_emoji(tmp_path)
    with pytest.raises((ValueError, ModuleNotFoundError), match=r"cannot be read as a font|libraqm"):
        emoji_captions("train", path=tmp_path, codec=Numbers())


@pytest.mark.skipif(not REAL_EMOJI, reason=f"not installed: {emoji_module.APT}")
def test_real_emoji_look_like_their_names() -> None:
    features = pytest.importorskip("PIL.features")
    if not features.check("raqm"):
        pytest.skip("Pillow cannot join code points here: libraqm or libfribidi is missing")
    names = emoji_module._names(Path("/"))
    emoji = {name: one for one, name in names.items()}
    wanted = {
        "red heart": (1, 0, 0),
        "green heart": (0, 1, 0),
        "blue heart": (0, 0, 1),
        "red circle": (1, 0, 0),
        "green square": (0, 1, 0),
        "blue square": (0, 0, 1),
    }
    joined = "woman astronaut"
    drawn = emoji_module._draw(Path("/") / emoji_module.FONT, [emoji[name] for name in (*wanted, joined)], 32)
    for name, channels in wanted.items():
        pixels = drawn[emoji[name]].astype(int)
        assert pixels.shape == (3, 32, 32) and (pixels[:, 0, 0] == 255).all()  # white around it
        assert pixels[:, 16, 16].argmax() == channels.index(1), name
    # one glyph of three code points, and not one of the two that are joined
    parts = emoji_module._draw(Path("/") / emoji_module.FONT, [emoji["woman"], emoji["rocket"]], 32)
    assert joined in names.values() and not any((drawn[emoji[joined]] == part).all() for part in parts.values())
    assert not emoji_module._draw(Path("/") / emoji_module.FONT, ["\U0010fffd"], 32)  # what the font lacks is left out
    labels = emoji_module._labels(Path("/"), "group")
    assert labels[emoji["red apple"]] == "Food & Drink" and labels[emoji["tiger"]] == "Animals & Nature"


def test_a_run_keeps_the_codec_that_it_was_trained_with(tmp_path: Path) -> None:
    captions = ["a red bird", "a blue bird", "the red hat"] * 4
    first, second = (fit_text_autoencoder(captions, dim=4, hidden=8, rounds=1, round=2, seed=s) for s in (0, 1))
    modality = Modality("caption", (4,), "caption", codec=first)
    keep_codecs([modality], tmp_path)
    before = (tmp_path / "codec.pt").stat().st_mtime_ns
    keep_codecs([modality], tmp_path)
    assert (tmp_path / "codec.pt").stat().st_mtime_ns == before  # the same one
    keep_codecs([dataclasses.replace(modality, codec=second)], tmp_path)
    kept = TextAutoencoder.load(tmp_path / "codec.pt")
    assert torch.equal(kept.encode(captions), second.encode(captions))
    assert not torch.equal(kept.encode(captions), first.encode(captions))
