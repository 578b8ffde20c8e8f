"""A folder of one's own arrays: kinds, ranges, what is absent, and every complaint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmebm.data import MultimodalDataset, load

N = 6
WORDS = np.array(["cat", "dog", "cat", "eel", "dog", "cat"])


def arrays(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "photo": random.integers(0, 256, (N, 3, 4, 5)).astype(np.uint8),
        "scan": random.random((N, 4, 5)).astype(np.float32),
        "sound": random.normal(-40, 10, (N, 7)),
        "word": WORDS,
        "labels": np.array([0, 1, 0, 2, 1, -1]),
    }


def write(root: Path, content: dict[str, np.ndarray], layout: str = "npy", split: str = "train", **meta: Any) -> None:
    root.mkdir(exist_ok=True)
    if layout == "npz":
        np.savez(root / f"{split}.npz", **content)
    else:
        (root / split).mkdir(exist_ok=True)
        for name, values in content.items():
            np.save(root / split / f"{name}.npy", values)
    if meta:
        (root / "meta.json").write_text(json.dumps(meta))


def natural(data: MultimodalDataset, name: str, rows: torch.Tensor) -> np.ndarray:
    return next(m for m in data.modalities if m.name == name).natural(data.batch(rows)[name])


@pytest.mark.parametrize("layout", ["npy", "npz"])
@pytest.mark.parametrize("stream", [False, True])
def test_rows_are_tuples_and_shapes_say_what_they_are(tmp_path: Path, seed: int, layout: str, stream: bool) -> None:
    content = arrays(seed)
    write(tmp_path, content, layout)
    data = load("folder", "train", path=tmp_path, stream=stream)
    assert [(m.name, m.kind, m.shape) for m in data.modalities] == [
        ("photo", "image", (3, 4, 5)),
        ("scan", "image", (1, 4, 5)),
        ("sound", "vector", (7,)),
        ("word", "text", (3,)),
    ]
    assert data.classes == ("0", "1", "2") and data.labels.tolist() == [0, 1, 0, 2, 1, -1]
    rows = torch.tensor([4, 0, 5])
    assert np.array_equal(np.rint(natural(data, "photo", rows) * 255), content["photo"][rows])
    np.testing.assert_allclose(natural(data, "scan", rows)[:, 0], content["scan"][rows], atol=2.0**-23)
    assert np.array_equal(natural(data, "sound", rows), content["sound"][rows].astype(np.float32))  # not scaled
    assert natural(data, "word", rows).tolist() == ["dog", "cat", "cat"]
    assert all(isinstance(pool, torch.Tensor) != stream for pool in data.pools.values())
    assert json.loads(json.dumps(data.info)) == data.info and data.presence(rows) is None


def test_arrays_stay_on_disk(tmp_path: Path, seed: int) -> None:
    content = arrays(seed)
    write(tmp_path, content)
    data = load("folder", "train", path=tmp_path)
    before = data.batch(torch.tensor([2]))["sound"]
    mapped = np.load(tmp_path / "train/sound.npy", mmap_mode="r+")
    mapped[2] += 1
    mapped.flush()
    assert torch.allclose(data.batch(torch.tensor([2]))["sound"], before + 1)


def test_meta_orders_names_and_scales(tmp_path: Path, seed: int) -> None:
    content = arrays(seed)
    random = np.random.default_rng(seed)
    content["photo"] = content["photo"].transpose(0, 2, 3, 1)  # (n, H, W, C)
    content["scan"] = random.integers(-100, 301, (N, 4, 5)).astype(">i2")
    content["word"] = np.array([2, 0, 0, 1, 1, 2], dtype=np.int8)
    low, high = (content["sound"].min(0) - 1).tolist(), (content["sound"].max(0) + 2).tolist()
    write(
        tmp_path,
        content,
        classes=["x", "y", "z", "never"],
        modalities={
            "word": {"kind": "text", "words": ["no", "perhaps", "yes"]},
            "sound": {"kind": "vector", "range": [low, high]},
            "photo": {"layout": "HWC"},
            "scan": {"kind": "image", "range": [-100, 300]},
        },
    )
    data = load("folder", "train", path=tmp_path)
    assert [m.name for m in data.modalities] == ["word", "sound", "photo", "scan"]
    assert data.classes == ("x", "y", "z", "never") and data.modalities[2].shape == (3, 4, 5)
    rows = torch.arange(N)
    batch = data.batch(rows)
    assert natural(data, "word", rows).tolist() == ["yes", "no", "no", "perhaps", "perhaps", "yes"]
    assert np.array_equal(np.rint(natural(data, "photo", rows) * 255), content["photo"].transpose(0, 3, 1, 2))
    # float32 results of numbers of the size 1: a few roundings of 2^-24
    expected = 2 * (content["sound"] - low) / (np.array(high) - low) - 1
    np.testing.assert_allclose(batch["sound"].numpy(), expected, atol=2.0**-22)
    np.testing.assert_allclose(natural(data, "sound", rows), content["sound"], rtol=2.0**-22, atol=2.0**-22 * 100)
    np.testing.assert_allclose(batch["scan"].numpy()[:, 0], content["scan"] / 200 - 0.5, atol=2.0**-22)


def test_one_column_and_small_types_are_vectors(tmp_path: Path) -> None:
    write(tmp_path, {"a": np.arange(3), "b": np.array([[1, 0], [0, 1], [1, 1]], bool), "c": np.ones((3, 2), ">f4")})
    data = load("folder", "train", path=tmp_path)
    batch = data.batch(torch.tensor([2]))
    assert {k: v.tolist() for k, v in batch.items()} == {"a": [[2]], "b": [[1, 1]], "c": [[1, 1]]}
    assert data.classes == () and data.labels.tolist() == [-1, -1, -1]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("form", ["single", "together"])
def test_absent_instances_may_hold_anything(tmp_path: Path, seed: int, stream: bool, form: str) -> None:
    content = arrays(seed)
    present = np.ones((N, 4), dtype=bool)
    present[[1, 3], 1] = False  # scan
    present[[1, 2], 3] = False  # word
    content["scan"][~present[:, 1]] = np.nan
    content["word"] = np.where(present[:, 3], WORDS, "")
    if form == "together":
        content["present"] = present
    else:
        content |= {"scan.present": present[:, 1], "word.present": present[:, 3]}
    write(tmp_path, content)
    data = load("folder", "train", path=tmp_path, stream=stream)
    rows = torch.tensor([3, 1, 2, 0])
    there = data.presence(rows)
    assert there is not None
    assert torch.equal(torch.stack(list(there.values()), 1), torch.from_numpy(present[rows]))
    batch = data.batch(rows)
    assert (batch["scan"][:2] == 0).all() and (batch["word"][1:3] == 0).all()
    np.testing.assert_allclose(batch["scan"][2:, 0].numpy(), 2 * content["scan"][[2, 0]] - 1, atol=2.0**-22)
    assert natural(data, "word", torch.tensor([3, 0])).tolist() == ["eel", "cat"]
    assert data.modalities[3].words == ("cat", "dog", "eel")
    # an absent instance has no class, so that no classifier learns from it
    assert data.pool_labels["scan"].tolist() == [0, -1, 0, -1, 1, -1]
    some = load("folder", "train", path=tmp_path, stream=stream, n=4, seed=seed)
    assert some.present is not None and some.present.shape == (4, 4)


def test_words_and_classes_are_those_of_both_splits(tmp_path: Path) -> None:
    write(tmp_path, {"word": np.array(["b", "a"]), "labels": np.array([0, 1])})
    write(tmp_path, {"word": np.array(["c", "c"]), "labels": np.array([3, 0])}, split="test")
    train, test = (load("folder", split, path=tmp_path) for split in ("train", "test"))
    assert train.modalities == test.modalities and train.modalities[0].words == ("a", "b", "c")
    assert train.classes == test.classes == ("0", "1", "2", "3")


class Length:
    """A codec whose code is the length of the text, in tenths."""

    def encode(self, texts: Any) -> torch.Tensor:
        return torch.tensor([[len(text) / 10] for text in texts])

    def decode(self, codes: torch.Tensor) -> list[str]:
        return ["x" * round(10 * float(code)) for code in codes]


@pytest.mark.parametrize("name", ["codecs", "codec_options"])
def test_options_of_codecs_are_mappings(tmp_path: Path, seed: int, name: str) -> None:
    write(tmp_path, arrays(seed))
    with pytest.raises(TypeError, match=rf"{name} must be a mapping from name, or None, got 3"):
        load("folder", "train", path=tmp_path, **{name: 3})


@pytest.mark.parametrize("split", ["train", "test"])
def test_splits_are_of_the_same_modalities_and_sizes(tmp_path: Path, seed: int, split: str) -> None:
    """Said before training: it showed when the run was judged on the test split."""
    content = arrays(seed)
    for i, (changes, message) in enumerate(
        (
            ({"sound": content["sound"][:, :6]}, r"sound.npy has shape \(6, [67]\), and .*sound.npy \(6, [67]\)"),
            ({"photo": content["photo"][:, :, :3]}, r"photo.npy has shape \(6, 3, [34], 5\)"),
            ({"extra": content["sound"]}, r"both splits need the same modalities, .*\['extra', 'photo'"),
        )
    ):
        folder = tmp_path / str(i)
        write(folder, content)
        write(folder, {**content, **changes}, split="test")
        with pytest.raises(ValueError, match=message):
            load("folder", split, path=folder)
    # a column is a vector of one, and a channel may be left out
    write(tmp_path / "alike", {**content, "one": np.zeros((N, 1))})
    write(tmp_path / "alike", {**content, "one": np.zeros(N), "scan": content["scan"][:, None]}, split="test")
    assert [m.shape for m in load("folder", split, path=tmp_path / "alike").modalities if m.name == "one"] == [(1,)]


def test_captions_come_with_a_codec_or_as_codes(tmp_path: Path) -> None:
    write(tmp_path, {"told": np.array(["xx", "xxxx", ""])}, modalities={"told": {"kind": "caption"}})
    data = load("folder", "train", path=tmp_path, codecs={"told": Length()})
    assert natural(data, "told", torch.tensor([1, 2])).tolist() == ["xxxx", ""]
    write(tmp_path, {"told": np.array([[0.3], [0.1], [0.0]])})
    assert natural(
        load("folder", "train", path=tmp_path, codecs={"told": Length()}), "told", torch.tensor([0])
    ).tolist() == ["xxx"]
    assert load("folder", "train", path=tmp_path).batch(torch.tensor([0]))["told"].tolist() == [[pytest.approx(0.3)]]


def test_captions_without_a_codec_have_one_fitted_to_the_train_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    told = {"train": ["a red bird", "a blue fish", "a red fish", ""], "test": ["a blue bird", "a green bird"]}
    for split, captions in told.items():
        write(tmp_path / "data", {"told": np.array(captions)}, split=split, modalities={"told": {"kind": "caption"}})
    options: dict[str, Any] = {"path": tmp_path / "data", "codec_options": {"dim": 4, "hidden": 8, "rounds": 1}}
    test = load("folder", "test", **options)
    assert test.modalities[0].shape == (4,) and len(list((tmp_path / "cache").rglob("captions-folder-told-*.pt"))) == 1
    # by the vocabulary of the train split alone, and the same codec for both splits
    codec = test.modalities[0].codec
    assert set(codec.vocabulary.words) == {"<eos>", "<unk>", "a", "red", "blue", "bird", "fish"}  # type: ignore
    train = load("folder", "train", **options)
    code = codec.encode(["a red bird"])  # type: ignore[union-attr]
    # encoded by itself and among others: sums of 64 float32 products in another order
    assert torch.allclose(train.batch(torch.tensor([0]))["told"], code, rtol=0, atol=64 * 2**-23)
    assert len(list((tmp_path / "cache").rglob("captions-folder-told-*.pt"))) == 1


def kind(**settings: Any) -> dict[str, Any]:
    return {"modalities": {"a": settings}}


@pytest.mark.parametrize(
    ("content", "meta", "message"),
    [
        ({"a": np.zeros((3, 2)), "b": np.zeros((4, 2))}, {}, r"b\.npy has shape \(4, 2\), and .*a\.npy 3 rows"),
        ({"a": np.zeros((0, 2))}, {}, "at least one"),
        ({"a": np.array(1.0)}, {}, r"a\.npy"),
        ({"labels": np.zeros(3, int)}, {}, "no modality beside"),
        ({"a": np.zeros((3, 2)), "labels": np.zeros(3)}, {}, r"labels\.npy must hold integers"),
        ({"a": np.zeros((3, 2)), "labels": np.array([0, 1, -2])}, {}, r"labels\.npy must hold integers"),
        ({"a": np.zeros((3, 2)), "labels": np.array([0, 1, 2])}, {"classes": ["x", "y"]}, "label 2.*has 2 classes"),
        ({"a": np.zeros((3, 2))}, {"classes": ["x", "x"]}, "'classes' must be distinct names"),
        ({"a": np.zeros((3, 2)), "present": np.ones((3, 1))}, {}, r"present\.npy must be bool \(3, 1\)"),
        ({"a": np.zeros((3, 2)), "b.present": np.ones(3, bool)}, {}, r"b\.present\.npy is of no modality"),
        ({"a": np.zeros((3, 2)), "a.present": np.array([True, False, False])}, {}, "row 1 and 1 others have no"),
        ({"a": np.zeros((3, 2)), "present": np.ones((3, 1), bool), "a.present": np.ones(3, bool)}, {}, "keep one"),
        ({"a": np.zeros((3, 2)), "b": np.zeros(3), "a.present": np.zeros(3, bool)}, {}, "no tuple has 'a'"),
        ({"a": np.zeros((3, 2))}, {"modalities": {"c": {}}}, r"names \['c'\], and the arrays are \['a'\]"),
        ({"a": np.zeros((3, 2))}, {"colours": 3}, "'classes' and 'modalities'"),
        ({"a": np.zeros((3, 2))}, {"modalities": ["a"]}, "'modalities' must be"),
        ({"a": np.zeros((3, 2))}, kind(kind="sound"), "kind of 'a' must be one of"),
        ({"a": np.zeros((3, 2))}, kind(kind="vector", layout="HWC"), r"'a' has \['layout'\]; kind 'vector' takes"),
        ({"a": np.zeros((3, 2))}, kind(range=[1, 1]), "low below high"),
        ({"a": np.zeros((3, 2))}, kind(range=[[0, 0, 0], 1]), "lists of 2"),
        ({"a": np.zeros((3, 2))}, kind(range=3), r"must be \[low, high\]"),
        ({"a": np.zeros((3, 2))}, kind(kind="image"), r"a\.npy must be images"),
        ({"a": np.zeros((3, 8, 9, 3))}, {}, r"looks like \(n, H, W, C\).*HWC"),
        ({"a": np.zeros((3, 1, 8, 9), int)}, {}, r"must be uint8 or floating in \[0, 1\], got int64"),
        ({"a": np.zeros((3, 1, 8, 9), np.uint8)}, kind(range=[0, 1]), "uint8, whose range is 0 to 255"),
        ({"a": np.zeros((3, 1, 8, 9))}, kind(layout="WHC"), "layout of 'a' must be"),
        ({"a": np.zeros((3, 1, 8, 9), complex)}, {}, "complex"),
        ({"a": np.zeros((3, 1, 2, 2, 2))}, {}, r"must hold numbers \(n, D\)"),
        ({"a": np.zeros((3, 2), complex)}, {}, r"must hold numbers \(n, D\)"),
        ({"a": np.arange(3)}, kind(kind="text"), "list the \"words\" of 'a'"),
        ({"a": np.arange(3)}, kind(words=["x", "x"]), "words of 'a' must be distinct"),
        ({"a": np.arange(3.0)}, kind(kind="text"), "strings or word numbers"),
        ({"a": np.array(["", ""])}, {}, "has no word"),
        ({"a": np.array([{}, {}], dtype=object)}, {}, r"a\.npy cannot be read .*objects are not loaded"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, content: dict[str, np.ndarray], meta: dict[str, Any], message: str
) -> None:
    write(tmp_path, content, **meta)
    with pytest.raises(ValueError, match=message):
        load("folder", "train", path=tmp_path)


@pytest.mark.parametrize(
    ("content", "meta", "message"),
    [
        ({"a": np.full((3, 1, 8, 9), 7.0)}, {}, r"a\.npy: .*\[0, 1\], got \[7, 7\]"),
        ({"a": np.full((3, 1, 8, 9), 7.0)}, kind(range=[0, 5]), r"a\.npy: .*got \[1\.4, 1\.4\]"),
        ({"a": np.array([[0.0], [np.nan], [1.0]])}, {}, r"a\.npy: row 1 has values that are not finite"),
        ({"a": np.array(["x", "y", "z"])}, kind(words=["x", "y"]), r"a\.npy: .*unknown words \['z'\]"),
        ({"a": np.array([0, 1, 2])}, kind(words=["x", "y"]), r"a\.npy: word numbers must lie in \[0, 2\)"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_value_out_of_range_is_named_when_it_is_read(
    tmp_path: Path, content: dict[str, np.ndarray], meta: dict[str, Any], message: str, stream: bool
) -> None:
    write(tmp_path, content, **meta)
    with pytest.raises(ValueError, match=message):
        load("folder", "train", path=tmp_path, stream=stream).batch(torch.arange(3))
        assert stream  # at once where nothing is streamed


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give path="):
        load("folder", "train")
    with pytest.raises(FileNotFoundError, match=r"no train split: .*train.\*\.npy and .*train\.npz"):
        load("folder", "train", path=tmp_path)
    write(tmp_path, {"a": np.zeros(2)})
    write(tmp_path, {"a": np.zeros(2)}, "npz")
    with pytest.raises(ValueError, match="both there: keep one"):
        load("folder", "train", path=tmp_path)
    (tmp_path / "train.npz").write_bytes(b"PK\x03\x04 broken")
    (tmp_path / "train/a.npy").unlink()
    with pytest.raises(ValueError, match=r"train\.npz cannot be read"):
        load("folder", "train", path=tmp_path)
    (tmp_path / "train.npz").unlink()
    (tmp_path / "train/a.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(ValueError, match=r"a\.npy cannot be read"):
        load("folder", "train", path=tmp_path)
    write(tmp_path, {"a": np.zeros(2)})
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(ValueError, match=r"meta\.json is not JSON"):
        load("folder", "train", path=tmp_path)
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises(ValueError, match=r"codecs has \['b'\]"):
        load("folder", "train", path=tmp_path, codecs={"b": Length()})
    with pytest.raises(ValueError, match="'a' is of kind 'vector' and takes no codec"):
        load("folder", "train", path=tmp_path, codecs={"a": Length()})
