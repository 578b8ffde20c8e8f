"""MNIST-SVHN and MNIST-SVHN-Text: a handwritten digit, a house number's digit, and the digit's word.

Only the class is shared (Shi, Siddharth, Paige, Torr, "Variational mixture-of-experts autoencoders", NeurIPS 2019; the
word by Sutter, Daunhawer, Vogt, 2020). Both image sets are read from the reader's own files. The stand-in where there
are none is ``digits``: the same task, built from installed packages, with other images.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmebm.data.base import Modality, MultimodalDataset, Pool, Split, check_count, files_of
from mmebm.data.idx import read_mnist
from mmebm.data.packages import DIGIT_WORDS, INSTALL
from mmebm.data.pairing import FROM_TEST, below, choose, pair_by_class, random_words, split_of_training
from mmebm.data.pools import ArrayPool, held, load_tensor

__all__ = ["ALPHABET", "LENGTH", "CharacterCodec", "mnist_svhn", "mnist_svhn_text", "read_svhn"]

ALPHABET: Final = " abcdefghijklmnopqrstuvwxyz"
LENGTH: Final = 8
BELOW: Final = ("", "SVHN", "svhn")
MULTIPLICITY: Final = re.compile(r"mnist_svhn_idx_data_mul_(\d+)")

Ints = NDArray[np.int64]


class CharacterCodec:
    """Short texts as characters: ``length`` places of ``len(alphabet)`` numbers, +1 at the character and -1 elsewhere.

    A :class:`~mmebm.data.base.TextCodec`. Decoding takes the largest number of each place and leaves out the spaces
    around the text: the word comes back wherever it stands, and what is no word shows as it is ("sevfn").

    Args:
        length: places.
        alphabet: distinct characters, the first a space, which fills the places that a text leaves.
    """

    def __init__(self, length: int = LENGTH, alphabet: str = ALPHABET) -> None:
        self.length: int = check_count("length", length)
        if not alphabet.startswith(" ") or len(set(alphabet)) != len(alphabet):
            raise ValueError(f"alphabet must be distinct characters, the first a space, got {alphabet!r}")
        self.alphabet = alphabet

    @property
    def size(self) -> int:
        """``length * len(alphabet)``, the size of a code."""
        return self.length * len(self.alphabet)

    def encode(self, texts: Sequence[str], starts: Sequence[int] | None = None) -> Tensor:
        """Codes float32 ``(n, size)`` of ``n`` texts, each beginning at the first place or at its ``starts``.

        Raises:
            ValueError: for a character outside the alphabet, or a text that does not fit.
        """
        codes = torch.full((len(texts), self.length, len(self.alphabet)), -1.0)
        for row, text in enumerate(texts):
            start = 0 if starts is None else starts[row]
            strange = sorted(set(text) - set(self.alphabet))
            if strange:
                raise ValueError(f"text {text!r} has {strange}, which are not in the alphabet {self.alphabet!r}")
            if not 0 <= start <= self.length - len(text):
                raise ValueError(f"text {text!r} does not fit into {self.length} places from place {start}")
            line = " " * start + text + " " * (self.length - start - len(text))
            codes[row, torch.arange(self.length), torch.tensor([self.alphabet.index(c) for c in line])] = 1.0
        return codes.flatten(1)

    def decode(self, codes: Tensor) -> list[str]:
        """``n`` texts of codes ``(n, size)``."""
        places = codes.detach().cpu().reshape(-1, self.length, len(self.alphabet)).argmax(2)
        return ["".join(self.alphabet[k] for k in line).strip(" ") for line in places.tolist()]


def mnist_svhn(
    split: Split,
    *,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
    n: int | None = None,
    pairs: Literal["auto", "files", "draw"] = "auto",
    multiplicity: int = 20,
    per_class: int = 10_000,
    stream: bool = False,
) -> MultimodalDataset:
    """MNIST and SVHN paired by class, from a folder.

    Modalities ``"mnist"``, images ``(1, 28, 28)``, and ``"svhn"``, images ``(3, 32, 32)``. In ``path``:

    * MNIST as :func:`mmebm.data.idx.read_mnist` looks for it: idx files there or in ``MNIST/raw``.
    * SVHN: ``{split}_32x32.mat`` there or in ``SVHN``. Its class 10 is the digit 0.
    A tenth of the train images of each class, the same under every seed, are the validation's; pairs of a file that mix
    them with others are in neither split.

    * which belong together: ``{split}-ms-mnist-idx.pt`` and ``{split}-ms-svhn-idx.pt``, or
      ``mnist_svhn_idx_data_mul_{k}/{split}/{mnist,svhn}_idx.pt``, tensors ``(n,)`` of rows. Where they are not there
      the pairs are drawn: of each class ``multiplicity`` times the smaller of its two counts, at most ``per_class``, as
      many as published, with other draws.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``.
        seed: of the drawn pairs, and of the choice of ``n``.
        path: the folder.
        n: take this many tuples at random, all by default (about a million for train).
        pairs: ``"files"`` must be there, ``"draw"`` ignores them, ``"auto"`` takes what there is.
        multiplicity: how often an instance is paired; where several ``mnist_svhn_idx_data_mul_{k}`` lie side by side,
            the ``k`` to take.
        per_class: the most instances of a class to count, when drawing.
        stream: keep images as bytes and convert those of a batch (train takes 0.3 GiB in place of 1.1).

    Raises:
        FileNotFoundError: if a file is missing; the message says where it was looked for.
        ModuleNotFoundError: without SciPy, which reads .mat files.
        TypeError, ValueError: for files that are not what they should be, pairs of different classes, and options
            outside what is said above.
    """
    return _load("mnist-svhn", split, seed, path, n, pairs, multiplicity, per_class, stream, None)


def mnist_svhn_text(
    split: Split,
    *,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
    n: int | None = None,
    pairs: Literal["auto", "files", "draw"] = "auto",
    multiplicity: int = 20,
    per_class: int = 10_000,
    stream: bool = False,
    text: Literal["characters", "word"] = "characters",
) -> MultimodalDataset:
    """:func:`mnist_svhn` with the digit's word as a third modality, ``"text"``.

    ``text="characters"``, as published: the word at a random place of 8, spaces around it, each place one-hot. The
    alphabet is the space and a to z (27 and not 71 characters: the others never occur), so that the code is ``(216,)``
    of +1 and -1, and the way back is :class:`CharacterCodec`. The first place is drawn once for each tuple and not anew
    in each pass; it goes up to 7 minus the length of the word, as published. ``text="word"``: one of ten words,
    ``(10,)``, as in ``digits``; there is nothing to spell and coherence needs no classifier.

    Args and Raises: as :func:`mnist_svhn`.
    """
    if text not in ("characters", "word"):
        raise ValueError(f"text must be 'characters' or 'word', got {text!r}")
    return _load("mnist-svhn-text", split, seed, path, n, pairs, multiplicity, per_class, stream, text)


def read_svhn(
    folder: str | os.PathLike[str], split: Literal["train", "test"]
) -> tuple[NDArray[np.uint8], Ints, dict[str, Any]]:
    """SVHN's cropped digits from ``{split}_32x32.mat`` in ``folder``, or in ``SVHN`` or ``svhn`` below it.

    Returns:
        images uint8 ``(n, 3, 32, 32)``, labels int64 ``(n,)`` in 0..9, and where they came from.

    Raises:
        FileNotFoundError: if the file is not there.
        ModuleNotFoundError: without SciPy.
        ValueError: if it is not such a file.
    """
    files = [Path(folder) / below / f"{split}_32x32.mat" for below in BELOW]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"no SVHN {split} split: looked for {', '.join(map(str, files))}. Get it from "
            "http://ufldl.stanford.edu/housenumbers (format 2), or load 'digits', which needs no "
            "download"
        )
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"SciPy is needed to read {file}: {INSTALL}", name="scipy") from error
    try:
        content = loadmat(file, variable_names=["X", "y"])
        x, y = content["X"], content["y"]
    except Exception as error:  # scipy promises no set of exceptions for a broken file
        raise ValueError(f"{file} is no .mat file with X and y ({error!r}): fetch it again") from error
    if not isinstance(x, np.ndarray) or not isinstance(y, np.ndarray):
        raise ValueError(f"{file} must have dense arrays X and y, got {type(x).__name__} and {type(y).__name__}")
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[:3] != (32, 32, 3) or y.size != x.shape[3]:
        raise ValueError(f"{file} must have X uint8 (32, 32, 3, n) and y (n, 1), got {x.dtype} {x.shape} and {y.shape}")
    if y.dtype.kind not in "iuf":
        raise ValueError(f"{file} must have numbers in y, got {y.dtype}")
    whole = np.isfinite(y) & (y == np.floor(y)) if y.dtype.kind == "f" else np.ones(y.shape, dtype=bool)
    if not whole.all():
        bad = int(np.flatnonzero(~whole.ravel())[0])
        raise ValueError(f"{file}, row {bad}: label {y.ravel()[bad]} is no class")
    labels = y.astype(np.int64).ravel()
    if not len(labels) or labels.min() < 0 or labels.max() > 10:
        raise ValueError(f"{file} must have labels 1 to 10, 10 for the digit 0, at least one")
    images = np.ascontiguousarray(x.transpose(3, 2, 0, 1))
    return images, labels % 10, {"what": f"SVHN, {len(labels)} digits", "file": str(file)}


def _load(
    name: str,
    split: Split,
    seed: int,
    path: str | os.PathLike[str] | None,
    n: int | None,
    pairs: str,
    multiplicity: int,
    per_class: int,
    stream: bool,
    text: str | None,
) -> MultimodalDataset:
    if path is None:
        raise ValueError(
            f"{name!r} is read from a folder: give path= (--data-path), or load 'digits', which needs none"
        )
    if pairs not in ("auto", "files", "draw"):
        raise ValueError(f"pairs must be 'auto', 'files' or 'draw', got {pairs!r}")
    n = None if n is None else check_count("n", n)
    multiplicity, per_class = check_count("multiplicity", multiplicity), check_count("per_class", per_class)
    files = files_of(split)
    digits, of_digit, digit_source = read_mnist(path, files)
    houses, of_house, house_source = read_svhn(path, files)
    found = _pair_files(Path(path), files, multiplicity, pairs)
    sources = (("mnist", of_digit), ("svhn", of_house))
    parts = [split_of_training(of_instance, f"mnist-svhn/{key}", split) for key, of_instance in sources]
    if found is None:
        # the instances that are paired, and then their rows among all
        of_digit_here, of_house_here = of_digit[parts[0]], of_house[parts[1]]
        counts = [
            multiplicity * min(int((of_digit_here == c).sum()), int((of_house_here == c).sum()), per_class)
            for c in range(10)
        ]
        if not sum(counts):
            raise ValueError(f"{digit_source['file']} and {house_source['file']} have no class in common")
        here = {"mnist": of_digit_here, "svhn": of_house_here}
        index, labels = pair_by_class(here, DIGIT_WORDS, sum(counts), seed, "mnist-svhn", split, counts=counts)
        index = np.stack([part[index[:, column]] for column, part in enumerate(parts)], axis=1)
    else:
        columns = [_rows(file, len(of_instance)) for file, (_, of_instance) in zip(found, sources)]
        if len(columns[0]) != len(columns[1]):
            raise ValueError(
                f"{found[0]} has {len(columns[0])} rows and {found[1].name} {len(columns[1])}: they must "
                "be of one making"
            )
        index = np.stack(columns, axis=1)
        labels = of_digit[index[:, 0]]
        mixed = int((labels != of_house[index[:, 1]]).sum())
        if mixed:
            raise ValueError(
                f"{found[0]} and {found[1].name} pair different digits in {mixed} of {len(labels)} "
                "tuples: they were made for other files, or their names are swapped"
            )
        mine = np.isin(index[:, 0], parts[0]) & np.isin(index[:, 1], parts[1])
        index, labels = index[mine], labels[mine]
        if not len(labels):
            raise ValueError(
                f"{found[0]} and {found[1].name} pair no two images of the {split} split: pairs='draw' does"
            )
    rows = choose(n, len(labels), path, seed, name, split)
    index, labels = index[rows], labels[rows]
    # the pools hold the split's own instances and no others
    index = np.stack([np.searchsorted(part, index[:, column]) for column, part in enumerate(parts)], axis=1)
    digits, of_digit, houses, of_house = digits[parts[0]], of_digit[parts[0]], houses[parts[1]], of_house[parts[1]]
    pool_labels = {"mnist": of_digit, "svhn": of_house}
    start = FROM_TEST if split == "test" else 0
    items = {"mnist": start + 2 * parts[0], "svhn": start + 2 * parts[1] + 1}

    modalities = [Modality("mnist", (1, *digits.shape[1:]), "image"), Modality("svhn", (3, 32, 32), "image")]
    arrays = [
        ArrayPool(digits[:, None], modalities[0], digit_source["file"]),
        ArrayPool(houses, modalities[1], house_source["file"]),
    ]
    pools: dict[str, Tensor | Pool] = {m.name: a if stream else held(a) for m, a in zip(modalities, arrays)}
    if text is not None:
        modality, codes, of_text, column = _text(text, labels, seed, split)
        modalities.append(modality)
        pools["text"], pool_labels["text"] = codes, of_text
        items["text"] = np.full(len(of_text), -1)
        index = np.concatenate([index, column[:, None]], axis=1)
    options = {"n": n, "pairs": pairs, "multiplicity": multiplicity, "per_class": per_class, "stream": stream}
    return MultimodalDataset(
        name=name,
        split=split,
        seed=seed,
        modalities=tuple(modalities),
        classes=DIGIT_WORDS,
        pools=pools,
        pool_labels={key: torch.from_numpy(of_instance) for key, of_instance in pool_labels.items()},
        index=torch.from_numpy(index),
        labels=torch.from_numpy(labels),
        info={
            "options": options if text is None else {**options, "text": text},
            "seed": seed,
            "instances": {key: len(pool) for key, pool in pools.items()},
            "tuples": len(labels),
            "pairs": "drawn" if found is None else [str(file) for file in found],
            "sources": [digit_source, house_source],
        },
        items={key: torch.from_numpy(of_instance) for key, of_instance in items.items()},
    )


def _text(text: str, labels: Ints, seed: int, split: Split) -> tuple[Modality, Tensor, Ints, Ints]:
    """The modality, its pool, the class of each instance, and the column of the index."""
    if text == "word":
        modality = Modality("text", (10,), "text", DIGIT_WORDS)
        return modality, modality.model(DIGIT_WORDS), np.arange(10), labels
    codec = CharacterCodec()
    starts = np.array([LENGTH - len(word) for word in DIGIT_WORDS])  # how many: 0 .. LENGTH - 1 - its length
    of_text = np.repeat(np.arange(10), starts)
    first = np.cumsum(starts) - starts
    codes = codec.encode([DIGIT_WORDS[c] for c in of_text], (np.arange(len(of_text)) - first[of_text]).tolist())
    # Below a common multiple, so that the remainder is uniform for words of every length.
    drawn = below(random_words(seed, "text", "mnist-svhn-text", split), int(np.lcm.reduce(starts)), len(labels))
    column = first[labels] + drawn % starts[labels]
    return Modality("text", (codec.size,), "caption", codec=codec), codes, of_text, column


def _pair_files(path: Path, split: str, multiplicity: int, pairs: str) -> tuple[Path, Path] | None:
    if pairs == "draw":
        return None
    candidates = [(path / f"{split}-ms-mnist-idx.pt", path / f"{split}-ms-svhn-idx.pt")]
    known = {
        int(m[1]): entry
        for entry in (path.iterdir() if path.is_dir() else ())
        if (m := MULTIPLICITY.fullmatch(entry.name)) and (entry / split).is_dir()
    }
    if len(known) > 1 and multiplicity not in known:
        raise ValueError(f"{path} has pairs of multiplicity {sorted(known)}: choose one with multiplicity=")
    if known:
        folder = known.get(multiplicity, next(iter(known.values()))) / split
        candidates.append((folder / "mnist_idx.pt", folder / "svhn_idx.pt"))
    for files in candidates:
        there = [file for file in files if file.is_file()]
        if len(there) == 2:
            return files
        if there:
            missing = next(file for file in files if file not in there)
            raise FileNotFoundError(f"{missing} is missing beside {there[0].name}; pairs='draw' needs neither")
    if pairs == "files":
        raise FileNotFoundError(
            f"no pairs of the {split} split: looked for {candidates[0][0]} and for "
            f"{path / 'mnist_svhn_idx_data_mul_K' / split / 'mnist_idx.pt'}; pairs='draw' needs "
            "none"
        )
    return None


def _rows(file: Path, instances: int) -> Ints:
    rows = load_tensor(file, "both index files are needed")
    if rows.dim() != 1 or rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool or not len(rows):
        raise ValueError(f"{file} must hold integers (n,), at least one, got {rows.dtype} {tuple(rows.shape)}")
    if rows.min() < 0 or rows.max() >= instances:
        bad = int(((rows < 0) | (rows >= instances)).nonzero()[0])
        raise ValueError(
            f"{file} names row {int(rows[bad])}, of {instances} instances, in place {bad}: it was made "
            "for another set, or the names of the two files are swapped"
        )
    return rows.to(torch.int64).numpy()
