"""MNIST-SVHN and its text: fixtures in the real formats, pairs from files and drawn, words in characters."""

from __future__ import annotations

import collections
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mmebm.data import load
from mmebm.data.mnist_svhn import ALPHABET, CharacterCodec, read_svhn
from mmebm.data.packages import DIGIT_WORDS

Writer = Callable[..., tuple[np.ndarray, np.ndarray]]
CODEC = CharacterCodec()


@pytest.fixture
def write_svhn(seed: int) -> Writer:
    scipy_io = pytest.importorskip("scipy.io")

    def write(folder: Path, split: str, n: int) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng([seed, n, 1])
        x = random.integers(0, 256, (32, 32, 3, n)).astype(np.uint8)
        y = random.permutation(np.arange(n) % 10 + 1).astype(np.uint8)[:, None]
        folder.mkdir(parents=True, exist_ok=True)
        scipy_io.savemat(folder / f"{split}_32x32.mat", {"X": x, "y": y})
        return x, y

    return write


def write_pairs(folder: Path, digits: np.ndarray, houses: np.ndarray, layout: str = "ms") -> np.ndarray:
    """Pairs of equal class as the public scripts write them, in reverse order of rows, and returns them."""
    classes = houses.ravel() % 10
    pairs = np.array([(i, j) for i in range(len(digits))[::-1] for j in range(len(classes)) if digits[i] == classes[j]])
    names = {
        "ms": ("train-ms-mnist-idx.pt", "train-ms-svhn-idx.pt"),
        "mul": ("mnist_svhn_idx_data_mul_5/train/mnist_idx.pt", "mnist_svhn_idx_data_mul_5/train/svhn_idx.pt"),
    }
    for name, column in zip(names[layout], pairs.T):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.from_numpy(column.copy()), folder / name)
    return pairs


@pytest.mark.parametrize("below", ["", "SVHN"])
def test_svhn_images_and_the_digit_zero(tmp_path: Path, write_svhn: Writer, below: str) -> None:
    x, y = write_svhn(tmp_path / below, "test", 12)
    images, labels, source = read_svhn(tmp_path, "test")
    assert images.shape == (12, 3, 32, 32) and images.dtype == np.uint8 and source["file"].endswith("test_32x32.mat")
    assert labels.tolist() == [0 if value == 10 else value for value in y.ravel().tolist()] and 0 in labels
    for i, c, h, w in ((0, 0, 0, 0), (11, 2, 31, 5), (4, 1, 7, 30)):
        assert images[i, c, h, w] == x[h, w, c, i]


@pytest.mark.parametrize("layout", ["ms", "mul"])
@pytest.mark.parametrize("stream", [False, True])
def test_pairs_from_files(tmp_path: Path, write_mnist: Writer, write_svhn: Writer, layout: str, stream: bool) -> None:
    images, digits = write_mnist(tmp_path / "MNIST/raw", "train", 20, suffix=".gz")
    x, y = write_svhn(tmp_path, "train", 30)
    pairs = write_pairs(tmp_path, digits, y, layout)
    data = load("mnist-svhn", "train", path=tmp_path, stream=stream)
    assert data.index.tolist() == pairs.tolist() and data.labels.tolist() == digits[pairs[:, 0]].tolist()
    rows = torch.tensor([0, len(pairs) - 1, 3])
    batch = data.batch(rows)
    for modality, natural in zip(data.modalities, (images[:, None], x.transpose(3, 2, 0, 1))):
        column = 0 if modality.name == "mnist" else 1
        got = np.rint(modality.natural(batch[modality.name]) * 255)
        assert np.array_equal(got, natural[pairs[rows.numpy(), column]])
    assert len(data.info["pairs"]) == 2 and data.modalities[1].shape == (3, 32, 32)


def test_drawn_pairs(tmp_path: Path, write_mnist: Writer, write_svhn: Writer, seed: int) -> None:
    _, digits = write_mnist(tmp_path, "train", 43)
    _, y = write_svhn(tmp_path, "train", 25)
    data = load("mnist-svhn", "train", path=tmp_path, seed=seed, multiplicity=3, per_class=3)
    smaller = np.minimum(np.minimum(np.bincount(digits, minlength=10), np.bincount(y.ravel() % 10, minlength=10)), 3)
    assert torch.bincount(data.labels, minlength=10).tolist() == (3 * smaller).tolist()
    for column, name in enumerate(("mnist", "svhn")):
        uses = torch.bincount(data.index[:, column], minlength=len(data.pools[name]))
        for c in range(10):  # within a class two instances are used equally often, within one
            of_class = uses[data.pool_labels[name] == c]
            assert of_class.max() - of_class.min() <= 1
    again = load("mnist-svhn", "train", path=tmp_path, seed=seed, multiplicity=3, per_class=3)
    other = load("mnist-svhn", "train", path=tmp_path, seed=seed + 1, multiplicity=3, per_class=3)
    assert torch.equal(again.index, data.index) and not torch.equal(other.index, data.index)
    few = load("mnist-svhn", "train", path=tmp_path, seed=seed, multiplicity=3, per_class=3, n=7)
    assert len(few) == 7 and {tuple(row) for row in few.index.tolist()} <= {tuple(row) for row in data.index.tolist()}
    with pytest.raises(ValueError, match=f"n must be at most the {len(data)} tuples"):
        load("mnist-svhn", "train", path=tmp_path, multiplicity=3, per_class=3, n=len(data) + 1)


def test_text_in_characters(tmp_path: Path, write_mnist: Writer, write_svhn: Writer, seed: int) -> None:
    write_mnist(tmp_path, "test", 50)
    write_svhn(tmp_path, "test", 50)
    data = load("mnist-svhn-text", "test", path=tmp_path, seed=seed, multiplicity=20)
    text = data.modalities[2]
    assert (text.name, text.kind, text.shape) == ("text", "caption", (216,)) and len(data) == 1000
    x = data.batch(torch.arange(1000))["text"]
    assert text.natural(x).tolist() == [DIGIT_WORDS[label] for label in data.labels]
    # the code restated: one +1 in each of the 8 places, and the word at some place with spaces around
    places = x.reshape(1000, 8, 27)
    assert ((places == 1).sum(2) == 1).all() and ((places == -1).sum(2) == 26).all()
    lines = ["".join(" abcdefghijklmnopqrstuvwxyz"[k] for k in line) for line in places.argmax(2).tolist()]
    starts = collections.defaultdict(collections.Counter)
    for line, label in zip(lines, data.labels.tolist()):
        assert len(line) == 8 and line.strip() == DIGIT_WORDS[label]
        starts[DIGIT_WORDS[label]][line.index(line.strip())] += 1
    for word, counts in starts.items():
        # Uniform over 0 .. 7 - length: 100 draws each, a start that never comes has chance 5 * .8^100, 1e-9
        assert sorted(counts) == list(range(8 - len(word)))
    assert torch.equal(text.model(["six"]), CODEC.encode(["six"]))


def test_text_as_a_word(tmp_path: Path, write_mnist: Writer, write_svhn: Writer) -> None:
    write_mnist(tmp_path, "test", 20)
    write_svhn(tmp_path, "test", 20)
    data = load("mnist-svhn-text", "test", path=tmp_path, multiplicity=1, text="word")
    assert data.modalities[2].words == data.classes == DIGIT_WORDS
    natural = data.modalities[2].natural(data.batch(torch.arange(len(data)))["text"])
    assert natural.tolist() == [DIGIT_WORDS[label] for label in data.labels]


def test_character_codes_away_from_any_word() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = CODEC.encode(["seven", " two", "  one   "], [3, 2, 0])
    assert CODEC.decode(codes) == ["seven", "two", "one"]
    # +1 stays above -1 under noise that cannot reach 1 in size
    assert CODEC.decode(codes + (torch.rand(codes.shape, generator=generator) * 1.98 - 0.99)) == ["seven", "two", "one"]
    spelt = codes.reshape(3, 8, 27)[:1].clone()
    spelt[0, 5] = torch.nn.functional.one_hot(torch.tensor(ALPHABET.index("f")), 27).float()
    assert CODEC.decode(spelt.flatten(1)) == ["sefen"]
    for texts, starts, message in (
        (["Seven"], None, r"\['S'\]"),
        (["seven"], [4], "does not fit into 8 places"),
        (["nineteens"], None, "does not fit"),
        (["six"], [-1], "does not fit"),
    ):
        with pytest.raises(ValueError, match=message):
            CODEC.encode(texts, starts)
    with pytest.raises(ValueError, match="alphabet must be"):
        CharacterCodec(8, "abc")


def test_what_is_missing_is_named(tmp_path: Path, write_mnist: Writer, write_svhn: Writer) -> None:
    with pytest.raises(ValueError, match=r"give path= .*, or load 'digits'"):
        load("mnist-svhn", "train")
    with pytest.raises(FileNotFoundError, match="no MNIST train split"):
        load("mnist-svhn", "train", path=tmp_path)
    _, digits = write_mnist(tmp_path, "train", 20)
    with pytest.raises(FileNotFoundError, match=r"no SVHN train split: .*train_32x32\.mat.*load 'digits'"):
        load("mnist-svhn", "train", path=tmp_path)
    _, y = write_svhn(tmp_path, "train", 20)
    with pytest.raises(FileNotFoundError, match=r"train-ms-mnist-idx\.pt.*mul_K.*pairs='draw'"):
        load("mnist-svhn", "train", path=tmp_path, pairs="files")
    write_pairs(tmp_path, digits, y)
    (tmp_path / "train-ms-svhn-idx.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-ms-svhn-idx\.pt is missing beside train-ms-mnist-idx\.pt"):
        load("mnist-svhn", "train", path=tmp_path)
    assert load("mnist-svhn", "train", path=tmp_path, pairs="draw").info["pairs"] == "drawn"


def test_broken_pairs_are_named(tmp_path: Path, write_mnist: Writer, write_svhn: Writer) -> None:
    _, digits = write_mnist(tmp_path, "train", 20)
    _, y = write_svhn(tmp_path, "train", 30)
    write_pairs(tmp_path, digits, y)
    files = [tmp_path / "train-ms-mnist-idx.pt", tmp_path / "train-ms-svhn-idx.pt"]
    good = [torch.load(file) for file in files]
    other = int(np.flatnonzero(y.ravel() % 10 != digits[0])[0])
    for columns, message in (
        ([good[0][:-1], good[1]], "they must be of one making"),
        ([good[1], good[0]], r"names row \d+, of 20 instances|pair different digits"),
        ([good[0], good[1].roll(1)], r"pair different digits in \d+ of"),
        ([torch.tensor([0]), torch.tensor([other])], "different digits in 1 of 1"),
        ([good[0].float(), good[1]], "must hold integers"),
        ([good[0][:0], good[1][:0]], "at least one"),
    ):
        for file, column in zip(files, columns):
            torch.save(column.clone(), file)
        with pytest.raises(ValueError, match=message):
            load("mnist-svhn", "train", path=tmp_path)


def test_several_multiplicities_need_a_choice(tmp_path: Path, write_mnist: Writer, write_svhn: Writer) -> None:
    _, digits = write_mnist(tmp_path, "train", 20)
    _, y = write_svhn(tmp_path, "train", 20)
    pairs = write_pairs(tmp_path, digits, y, "mul")
    (tmp_path / "mnist_svhn_idx_data_mul_7/train").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"multiplicity \[5, 7\]: choose one"):
        load("mnist-svhn", "train", path=tmp_path)
    assert len(load("mnist-svhn", "train", path=tmp_path, multiplicity=5)) == len(pairs)


def test_broken_mat_files_are_named(tmp_path: Path, write_svhn: Writer) -> None:
    from scipy.io import savemat

    file = tmp_path / "train_32x32.mat"
    good = np.zeros((32, 32, 3, 2), np.uint8)
    for content, message in (
        ({"X": good}, "no .mat file with X and y"),
        ({"X": good.astype(float), "y": np.ones((2, 1))}, "must have X uint8"),
        ({"X": good, "y": np.ones((3, 1))}, "must have X uint8"),
        ({"X": good.transpose(3, 2, 0, 1), "y": np.ones((2, 1))}, "must have X uint8"),
        ({"X": good, "y": np.array([[1], [11]])}, "labels 1 to 10"),
    ):
        savemat(file, content)
        with pytest.raises(ValueError, match=rf"train_32x32\.mat .*{message}"):
            read_svhn(tmp_path, "train")
    for content in (b"", b"no matrix", struct.pack(">I", 7) * 100):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"train_32x32\.mat is no \.mat file"):
            read_svhn(tmp_path, "train")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pairs": "all"}, ValueError, "pairs must be"),
        ({"multiplicity": 0}, ValueError, "multiplicity must be at least"),
        ({"per_class": 1.5}, TypeError, "per_class must be an integer"),
        ({"text": "speech"}, ValueError, "text must be"),
    ],
)
def test_options_are_checked(tmp_path: Path, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load("mnist-svhn-text", "train", path=tmp_path, **options)
