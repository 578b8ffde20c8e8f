"""Modality, MultimodalDataset and load: conversions, checks, error texts."""

from __future__ import annotations

import dataclasses
import inspect
import json
import pickle
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mmebm.data import DATASETS, Modality, MultimodalDataset, Prefetch, load

WORDS = ("zero", "one", "two")
IMAGE = Modality("picture", (3, 4, 5), "image")
TEXT = Modality("word", (3,), "text", WORDS)
VECTOR = Modality("point", (2,), "vector")


class Letters:
    """A codec of two-letter texts: each letter a number in [-1, 1]."""

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.tensor([[(ord(c) - 109) / 13 for c in text] for text in texts], dtype=torch.float64).reshape(-1, 2)

    def decode(self, codes: torch.Tensor) -> list[str]:
        return ["".join(chr(round(109 + 13 * float(v))) for v in row) for row in codes]


CAPTION = Modality("caption", (2,), "caption", codec=Letters())


def small(**changes: Any) -> MultimodalDataset:
    fields: dict[str, Any] = {
        "name": "small",
        "split": "train",
        "seed": 0,
        "modalities": (VECTOR, TEXT),
        "classes": WORDS,
        "pools": {"point": torch.arange(8.0).reshape(4, 2), "word": TEXT.model(WORDS)},
        "pool_labels": {"point": torch.tensor([0, 1, 2, 2]), "word": torch.arange(3)},
        "index": torch.tensor([[0, 0], [1, 1], [2, 2], [3, 2], [0, 0]]),
        "labels": torch.tensor([0, 1, 2, 2, 0]),
    }
    return MultimodalDataset(**{**fields, **changes})


def test_image_round_trip_from_floats() -> None:
    natural = np.random.default_rng(0).random((6, 3, 4, 5), dtype=np.float32)
    model = IMAGE.model(natural)
    assert model.dtype == torch.float32 and model.min() < -0.9 and model.max() > 0.9
    np.testing.assert_allclose(IMAGE.natural(model), natural, atol=1e-7)


def test_image_from_bytes_reaches_both_ends_exactly() -> None:
    grey = Modality("grey", (1, 16, 16), "image")
    model = grey.model(np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16))
    assert model.min() == -1 and model.max() == 1
    np.testing.assert_allclose(grey.natural(model).ravel() * 255, np.arange(256), atol=1e-4)


def test_image_natural_clips_samples() -> None:
    natural = IMAGE.natural(torch.tensor([-3.0, 3.0, 0.0]).reshape(3, 1, 1, 1).expand(3, 3, 4, 5))
    assert natural.dtype == np.float32
    assert [natural[i].min() for i in range(3)] == [natural[i].max() for i in range(3)] == [0.0, 1.0, 0.5]


def test_natural_takes_half_precision_and_leaves_its_argument_alone() -> None:
    x = torch.full((1, 3, 4, 5), 2.0, requires_grad=True)
    assert IMAGE.natural(x.bfloat16()).max() == 1.0
    IMAGE.natural(x)
    VECTOR.natural(y := torch.ones(1, 2))[:] = 7
    assert x.min() == 2.0 and y.max() == 1.0


def test_text_round_trip_and_argmax() -> None:
    codes = TEXT.model(["two", "zero", "two"])
    assert codes.tolist() == [[-1, -1, 1], [1, -1, -1], [-1, -1, 1]] and codes.dtype == torch.float32
    assert TEXT.natural(codes).tolist() == ["two", "zero", "two"]
    assert TEXT.natural(torch.tensor([[-0.2, -0.1, -0.9]])).tolist() == ["one"]
    assert TEXT.model(np.array(WORDS)).argmax(1).tolist() == [0, 1, 2]


def test_vector_is_unchanged() -> None:
    values = np.array([[-3.5, 100.0], [0.0, 1e-3]], dtype=np.float32)
    np.testing.assert_array_equal(VECTOR.natural(VECTOR.model(values)), values)
    assert VECTOR.model(values.astype(np.float64)).dtype == torch.float32


def test_a_vector_with_centre_and_spread_comes_back_in_its_own_units(seed: int) -> None:
    centre, spread = (1000.0, -0.5), (250.0, 1e-3)
    modality = Modality("point", (2,), "vector", centre=centre, spread=spread)
    values = np.random.default_rng(seed).normal(centre, spread, (50, 2))
    model = modality.model(values)
    assert model.dtype == torch.float32
    np.testing.assert_array_equal(model.numpy(), ((values - centre) / spread).astype(np.float32))
    # Two roundings to float32, of half an ulp each: the first is of a number of the size of the model value (times
    # spread), the second of the value.
    bound = 2.0**-24 * (np.abs(model.numpy()) * spread + np.abs(values)) * (1 + 1e-6)
    assert (np.abs(modality.natural(model) - values) <= bound).all()


def test_captions_go_through_their_codec() -> None:
    codes = CAPTION.model(["az", "mm"])
    assert codes.dtype == torch.float32 and torch.allclose(codes, torch.tensor([[-12 / 13, 1.0], [0, 0]]))
    assert CAPTION.natural(codes + 0.01).tolist() == ["az", "mm"]
    assert CAPTION.natural(codes[:0]).shape == (0,) and CAPTION.model([]).shape == (0, 2)
    assert Modality("caption", (2,), "caption") == CAPTION  # splits may have their own copies of a codec


def test_captions_without_a_codec_are_codes_only() -> None:
    modality = Modality("caption", (2,), "caption")
    for call in (lambda: modality.natural(torch.zeros(1, 2)), lambda: modality.model(["az"])):
        with pytest.raises(ValueError, match="'caption': captions need a codec"):
            call()
    wider = Modality("caption", (3,), "caption", codec=Letters())
    with pytest.raises(ValueError, match=r"its codec must give codes \(1, 3\), got \(1, 2\)"):
        wider.model(["az"])


@pytest.mark.parametrize(
    ("modality", "x", "message"),
    [
        (CAPTION, [["az"]], "n captions"),
        (CAPTION, np.zeros(2), "n captions"),
        (IMAGE, np.zeros((2, 3, 4, 4), np.float32), r"picture.*\(n, 3, 4, 5\).*\(2, 3, 4, 4\)"),
        (IMAGE, np.zeros((3, 4, 5), np.float32), r"\(n, 3, 4, 5\)"),
        (IMAGE, np.full((1, 3, 4, 5), 1.5, np.float32), r"\[0, 1\], got \[1.5, 1.5\]"),
        (IMAGE, np.full((1, 3, 4, 5), np.nan, np.float32), r"\[0, 1\]"),
        (IMAGE, np.zeros((1, 3, 4, 5), np.int64), "uint8"),
        (TEXT, ["one", "eleven"], r"unknown words \['eleven'\].*'zero'"),
        (TEXT, [["one"]], "n words"),
        (VECTOR, np.zeros((2, 3), np.float32), r"\(n, 2\)"),
    ],
)
def test_model_refuses(modality: Modality, x: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        modality.model(x)


@pytest.mark.parametrize("modality", [IMAGE, TEXT, VECTOR, CAPTION])
def test_natural_refuses_another_shape(modality: Modality) -> None:
    for shape in ((2, 7), (2, *modality.shape, 1), modality.shape):
        with pytest.raises(ValueError, match="must have shape"):
            modality.natural(torch.zeros(shape))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", (3,), "image"), "3 positive sizes"),
        (("a", (1, 0, 2), "image"), "3 positive sizes"),
        (("a", (2,), "sound"), "kind must be"),
        (("a", (2,), "text", ("x",)), "2 distinct words"),
        (("a", (2,), "text", ("x", "x")), "2 distinct words"),
        (("a", (2,), "vector", ("x", "y")), "kind 'text'"),
        (("a", (2,), "vector", (), Letters()), "kind 'caption'"),
        (("a", (1, 2, 2), "caption", (), Letters()), "1 positive sizes"),
        (("a", (2,), "caption", (), None, (0.0, 0.0), (1.0, 1.0)), "kind 'vector'"),
        (("a", (2,), "vector", (), None, (0.0,), (1.0, 1.0)), "2 numbers each in centre and spread, got 1 and 2"),
        (("a", (1,), "vector", (), None, (0.0,), (0.0,)), "spread positive"),
        (("a", (1,), "vector", (), None, (float("nan"),), (1.0,)), "finite"),
    ],
)
def test_modality_refuses(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Modality(*arguments)


def test_batch_gathers_each_modality_from_its_own_column() -> None:
    batch = small().batch(torch.tensor([3, 1, 1]))
    assert list(batch) == ["point", "word"]
    assert batch["point"].tolist() == [[6, 7], [2, 3], [2, 3]]
    assert TEXT.natural(batch["word"]).tolist() == ["two", "one", "one"]
    assert {k: tuple(v.shape) for k, v in small().batch(torch.arange(0)).items()} == {"point": (0, 2), "word": (0, 3)}


def test_instances_are_rows_of_a_pool() -> None:
    assert small().instances("point", torch.tensor([3, 0])).tolist() == [[6, 7], [0, 1]]
    with pytest.raises(ValueError, match=r"\['point', 'word'\], got 'sound'"):
        small().instances("sound", torch.tensor([0]))
    with pytest.raises(IndexError, match=r"\[0, 3\)"):
        small().instances("word", torch.tensor([3]))


def test_what_is_absent_is_zeros_in_a_batch_and_never_looked_at() -> None:
    present = torch.tensor([[True, True], [False, True], [True, False], [True, True], [True, True]])
    pools = {"point": torch.tensor([[0.0, 1], [torch.nan, 3], [4, 5], [6, 7]]), "word": TEXT.model(WORDS)}
    # tuple 1 lacks the point, whose index leads to a NaN; tuple 2 the word, whose index leads to another class
    index = torch.tensor([[0, 0], [1, 1], [2, 0], [3, 2], [0, 0]])
    data = small(pools=pools, index=index, present=present)
    rows = torch.tensor([2, 1, 3])
    batch = data.batch(rows)
    assert batch["point"].tolist() == [[4, 5], [0, 0], [6, 7]]
    assert batch["word"].tolist() == [[0, 0, 0], [-1, 1, -1], [-1, -1, 1]]
    there = data.presence(rows)
    assert there is not None and {k: v.tolist() for k, v in there.items()} == {
        "point": [True, False, True],
        "word": [False, True, True],
    }
    assert small().presence(rows) is None
    with pytest.raises(IndexError):
        small().presence(torch.tensor([5]))
    assert pickle.loads(pickle.dumps(data.to("cpu"))).present.tolist() == present.tolist()
    with pytest.raises(ValueError, match="1 tuples have an instance of another class in 'word'"):
        small(pools=pools, index=index, present=present | torch.tensor([False, True]))


def test_sets_without_classes_and_single_tuples_without_a_label() -> None:
    nobody = {"point": torch.full((4,), -1), "word": torch.full((3,), -1)}
    data = small(classes=(), pool_labels=nobody, labels=torch.full((5,), -1))
    assert data.classes == () and data.batch(torch.arange(5))["point"].shape == (5, 2)
    # -1 goes with any class, on either side
    small(labels=torch.tensor([0, -1, 2, 2, -1]))
    small(pool_labels={"point": torch.tensor([0, -1, 2, -1]), "word": torch.arange(3)})
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 0\), or be -1"):
        small(classes=(), pool_labels=nobody)


@dataclasses.dataclass
class Squares:
    """A pool that computes: instance ``i`` is ``(i, i * i)``."""

    n: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.n, 2)

    def __len__(self) -> int:
        return self.n

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.stack([rows.float(), rows.float() ** 2], 1)


def test_a_pool_need_not_be_a_tensor() -> None:
    data = small(pools={"point": Squares(4), "word": TEXT.model(WORDS)})
    batch = data.to("cpu").batch(torch.tensor([3, 1]))
    assert batch["point"].tolist() == [[3, 9], [1, 1]] and TEXT.natural(batch["word"]).tolist() == ["two", "one"]
    assert data.instances("point", torch.tensor([2])).tolist() == [[2, 4]]
    assert repr(data).endswith("0 MiB and point read when asked>")
    with pytest.raises(ValueError, match=r"pool 'point' must be float32 \(4, 2\), got torch.float32 \(3, 2\)"):
        small(pools={"point": Squares(3), "word": TEXT.model(WORDS)})


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([0, 1], TypeError),
        (torch.tensor([0.0]), TypeError),
        (torch.tensor([True] * 5), TypeError),
        (torch.tensor(0), ValueError),
        (torch.tensor([5]), IndexError),
        (torch.tensor([-1]), IndexError),
    ],
)
def test_batch_refuses(rows: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="rows must"):
        small().batch(rows)


def test_to_shares_what_is_there_already_and_pickling_keeps_everything() -> None:
    data = small(info={"a": 1})
    assert data.to("cpu").pools["point"].data_ptr() == data.pools["point"].data_ptr()
    again = pickle.loads(pickle.dumps(data.to(torch.device("cpu"))))
    rows = torch.arange(5)
    for name, values in data.batch(rows).items():
        assert torch.equal(again.batch(rows)[name], values)
    assert (len(again), again.modalities, again.info) == (5, data.modalities, {"a": 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.tensor([0, 1, 2, 2, 1])}, "1 tuples have an instance of another class in 'point'.*tuple 4"),
        ({"labels": torch.tensor([0, 1, 2, 2, 3])}, r"\[0, 3\)"),
        ({"labels": torch.zeros(5)}, "labels must be int64"),
        ({"index": torch.zeros(5, 3, dtype=torch.int64)}, r"index must be \(n, 2\)"),
        ({"index": torch.full((5, 2), 4)}, r"index of 'point' must lie in \[0, 4\)"),
        ({"pools": {"point": torch.zeros(4, 2)}}, "pools must have the modalities' names"),
        ({"pools": {"point": torch.zeros(4, 3), "word": torch.zeros(3, 3)}}, "pool 'point' must be float32"),
        ({"pools": {"point": torch.zeros(4, 2).double(), "word": torch.zeros(3, 3)}}, "float32"),
        ({"modalities": (VECTOR, VECTOR)}, "distinct names"),
        ({"modalities": ()}, "at least one"),
        ({"labels": torch.tensor([0, 1, 2, 2, -2])}, r"\[0, 3\), or be -1 for unlabelled, got \[-2, 2\]"),
        ({"pool_labels": {"point": torch.tensor([0, 1, 2, 3]), "word": torch.arange(3)}}, "labels of 'point'"),
        ({"present": torch.ones(5, 2)}, r"present must be bool \(5, 2\), got torch.float32"),
        ({"present": torch.ones(5, 3, dtype=torch.bool)}, r"present must be bool \(5, 2\)"),
        ({"present": torch.arange(10).reshape(5, 2) > 3}, "2 tuples have no modality at all, the first is tuple 0"),
    ],
)
def test_dataset_refuses_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_repr_says_what_it_is() -> None:
    assert repr(small()).startswith("<small train: 5 tuples of point (2,), word (3,); seed 0")


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'minst', known are 'digits', 'polymnist-5k', 'polymnist'"):
        load("minst", "train")


@pytest.mark.parametrize("name", list(DATASETS))
def test_unknown_option_lists_the_known_ones(name: str) -> None:
    with pytest.raises(TypeError, match=f"'{name}' has no option 'colour', only .*n"):
        load(name, "train", colour=True)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        (name, key)
        for name, build in DATASETS.items()
        for key, parameter in inspect.signature(build).parameters.items()
        if isinstance(parameter.default, bool)
    ],
)
def test_a_switch_is_no_text(name: str, key: str) -> None:
    """``--set data.options.stream=no`` is the text "no", which was true."""
    with pytest.raises(TypeError, match=rf"option {key} of data set '{name}' must be True or False, got 'no'"):
        load(name, "train", **{key: "no"})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"split": "valid"}, ValueError, r"must be one of \['train', 'validation', 'test'\], got 'valid'"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": 1.0}, TypeError, "seed must be an integer"),
        ({"seed": True}, TypeError, "seed must be an integer"),
        ({"n": 0}, ValueError, "n must be at least 1, got 0"),
        ({"n": 10.0}, TypeError, "n must be an integer"),
        ({"size": 7}, ValueError, "size must be 28 or 14, got 7"),
        ({"path": "somewhere"}, ValueError, "reads no folder, got path='somewhere'"),
    ],
)
def test_load_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load("digits", **{"split": "train", **arguments})


def test_a_registered_builder_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(split: Any, *, seed: int, path: Any, **options: Any) -> MultimodalDataset:
        return small(split=split, seed=seed, info=options)

    monkeypatch.setitem(DATASETS, "mine", build)
    built = load("mine", "test", seed=3, anything=1)
    assert (built.split, built.seed, built.info) == ("test", 3, {"anything": 1})


def test_info_is_plain(digits_test: MultimodalDataset, poly_test: MultimodalDataset) -> None:
    for data in (digits_test, poly_test):
        assert json.loads(json.dumps(data.info)) == data.info
        assert data.info["seed"] == 0 and data.info["tuples"] == len(data)
        assert {"package", "version", "file", "sha256", "licence"} <= data.info["sources"][0].keys()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_is_streamed_and_what_is_absent_on_a_gpu() -> None:
    present = torch.tensor([[True, True], [False, True], [True, False], [True, True], [True, True]])
    data = small(pools={"point": Squares(4), "word": TEXT.model(WORDS)}, present=present)
    moved = data.to("cuda")
    assert isinstance(moved.pools["point"], Squares)
    for rows in (torch.tensor([4, 2, 1]), torch.tensor([4, 2, 1], device="cuda")):
        for name, values in moved.batch(rows).items():
            assert values.is_cuda and torch.equal(values.cpu(), data.batch(rows.cpu())[name])
        there = moved.presence(rows)
        assert there is not None and there["point"].is_cuda and there["point"].tolist() == [True, True, False]
    with Prefetch(moved, [torch.tensor([4, 2])]) as batches:
        assert next(batches)[1]["point"].tolist() == [[0, 0], [4, 4]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_gpu_equal_those_on_the_cpu() -> None:
    data = small()
    moved = data.to("cuda")
    for rows in (torch.tensor([4, 2]), torch.tensor([4, 2], device="cuda")):
        for name, values in moved.batch(rows).items():
            assert values.is_cuda and torch.equal(values.cpu(), data.batch(rows.cpu())[name])
    with pytest.raises(IndexError):
        moved.batch(torch.tensor([5], device="cuda"))
    assert replace(moved, seed=1).labels.is_cuda
