"""Seeded draws, stratified splits and class-wise pairing.

Every draw is made from the raw 64-bit words of PCG64. NumPy promises the word stream of a bit generator for good, but
not that of ``Generator.permutation`` or ``Generator.integers`` (NEP 19), and a data set must not change with the NumPy
version that built it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "FROM_TEST",
    "SPLIT_SEED",
    "TEST_SHARE",
    "VALIDATION_SHARE",
    "below",
    "choose",
    "pair_by_class",
    "permutation",
    "random_words",
    "split_by_class",
    "split_of_training",
]

# Which instance belongs to train and which to test is a property of the benchmark, not of a run: no option changes it,
# so that a model trained under one pairing seed can be judged under another without having seen a test digit. The same
# holds for the validation: settings chosen on it under one seed were never trained on under another.
SPLIT_SEED: Final = 20260101
TEST_SHARE: Final = 0.2  # of the items of a source without a test part of its own
VALIDATION_SHARE: Final = 0.1  # of those that are left
FROM_TEST: Final = 2**40  # added to the number of an item of a test file, which is none of the train file's

Ints = NDArray[np.int64]


def random_words(seed: int, *names: str | int) -> np.random.PCG64:
    """The bit generator of one purpose.

    ``names`` say what is drawn (data set, split, modality, class); different names give independent streams under one
    ``seed``, so that adding a modality leaves the draws of the others as they were.
    """
    key = tuple(zlib.crc32(name.encode()) if isinstance(name, str) else name for name in names)
    return np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key))


def permutation(words: np.random.PCG64, n: int) -> Ints:
    """A random order of ``0 .. n - 1``, shape ``(n,)``: the order of ``n`` raw words."""
    return np.argsort(words.random_raw(n), kind="stable").astype(np.int64)


def below(words: np.random.PCG64, bound: int, n: int) -> Ints:
    """``n`` integers in ``[0, bound)``; the bias is below ``bound * 2**-32``."""
    high = np.asarray(words.random_raw(n), dtype=np.uint64) >> np.uint64(32)
    return ((high * np.uint64(bound)) >> np.uint64(32)).astype(np.int64)


def split_by_class(
    labels: Ints, name: str, *, test_share: float = TEST_SHARE, validation_share: float = VALIDATION_SHARE
) -> dict[str, Ints]:
    """The rows of each part, ascending: of every class ``round(test_share * count)`` are "test", of what is left
    ``round(validation_share * left)`` are "validation", and the others "train"."""
    parts: dict[str, list[Ints]] = {"train": [], "validation": [], "test": []}
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        order = rows[permutation(random_words(SPLIT_SEED, "split", name, int(label)), len(rows))]
        test = round(test_share * len(rows))
        validation = test + round(validation_share * (len(rows) - test))
        for part, of_class in zip(
            ("test", "validation", "train"), (order[:test], order[test:validation], order[validation:]), strict=True
        ):
            parts[part].append(of_class)
    empty = np.empty(0, dtype=np.int64)
    return {part: np.sort(np.concatenate([empty, *rows])).astype(np.int64) for part, rows in parts.items()}


def split_of_training(labels: Ints, name: str, split: str, *, validation_share: float = VALIDATION_SHARE) -> Ints:
    """The rows of ``split`` among items that come divided into train and test already: all of those of the test part,
    and of the train part those that :func:`split_by_class` gives to "train" or "validation".

    Raises:
        ValueError: where there are too few items of a class for a validation.
    """
    if split == "test":
        return np.arange(len(labels), dtype=np.int64)
    parts = split_by_class(labels, name, test_share=0.0, validation_share=validation_share)
    if split == "validation" and not len(parts[split]):
        raise ValueError(
            f"no validation: of every class a part of {validation_share:.2g} is kept from training, and "
            f"{len(labels)} items are too few for one"
        )
    return parts[split]


def pair_by_class(
    pool_labels: Mapping[str, Ints],
    classes: Sequence[str],
    n: int,
    seed: int,
    *names: str | int,
    counts: Sequence[int] | None = None,
) -> tuple[Ints, Ints]:
    """Tuples of instances that share nothing but the class.

    Returns ``index`` of shape ``(n, M)``, columns in the order of ``pool_labels``, and ``labels`` of shape ``(n,)``, in
    random order. Classes occur equally often (within one, if ``n`` is no multiple of their number), or as often as
    ``counts`` says, which must add up to ``n``. For each class and modality fresh permutations of the instances are
    laid end to end, so that within a class two instances of a modality are used equally often (within one).

    Raises ValueError for ``n < 1``, for a modality without an instance of some class, and for other ``counts``.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1 tuple, got {n}")
    if counts is not None and (len(counts) != len(classes) or min(counts) < 0 or sum(counts) != n):
        raise ValueError(f"counts must be {len(classes)} numbers from 0 that add up to {n}, got {list(counts)}")
    columns: dict[str, list[Ints]] = {name: [] for name in pool_labels}
    labels: list[Ints] = []
    for label, class_name in enumerate(classes):
        count = n // len(classes) + (label < n % len(classes)) if counts is None else counts[label]
        labels.append(np.full(count, label, dtype=np.int64))
        for modality, of_instance in pool_labels.items():
            rows = np.flatnonzero(of_instance == label).astype(np.int64)
            if counts is not None and not count:
                columns[modality].append(rows[:0])
                continue
            if not len(rows):
                raise ValueError(f"modality {modality!r} has no instance of class {class_name!r} to pair")
            words = random_words(seed, "pair", *names, modality, label)
            rounds = [rows[permutation(words, len(rows))] for _ in range(-(-count // len(rows)))]
            columns[modality].append(np.concatenate([*rounds, rows[:0]])[:count])
    order = permutation(random_words(seed, "order", *names), n)
    index = np.stack([np.concatenate(column) for column in columns.values()], axis=1)
    return index[order], np.concatenate(labels)[order]


def choose(n: int | None, total: int, what: object, seed: int, *names: str | int) -> Ints:
    """``n`` of ``total`` rows at random, ``(n,)``; all in their order for ``n`` None. ValueError if there are fewer."""
    if n is None:
        return np.arange(total, dtype=np.int64)
    if n > total:
        raise ValueError(f"n must be at most the {total} tuples in {what}, got {n}")
    return permutation(random_words(seed, "choose", *names), total)[:n]
