"""Draws, splits and pairing on small label lists."""

from __future__ import annotations

import numpy as np
import pytest

from mmebm.data.pairing import below, pair_by_class, permutation, random_words, split_by_class

CLASSES = ("a", "b", "c")
POOLS = {"x": np.repeat(np.arange(3), (7, 4, 5)), "y": np.array([2, 1, 0]), "z": np.tile(np.arange(3), 10)}


def test_the_draws_are_pinned() -> None:
    # Written down once: a change here changes every data set that anyone has trained on.
    assert random_words(0, "a").random_raw(2).tolist() == [6199776391363400110, 11323678089970929609]
    assert permutation(random_words(0, "a"), 8).tolist() == [4, 0, 3, 2, 6, 5, 1, 7]
    assert below(random_words(0, "a"), 1000, 4).tolist() == [336, 613, 398, 360]


def test_streams_depend_on_seed_and_on_every_name() -> None:
    streams = [(0, "a"), (1, "a"), (0, "b"), (0, "a", 0), (0, "a", 1), (0, "a", "b"), (0, "b", "a"), (2**40, "a")]
    first = {int(random_words(seed, *names).random_raw()) for seed, *names in streams}
    assert len(first) == len(streams)


def test_permutation_is_one_and_uniform_in_the_first_place() -> None:
    assert sorted(permutation(random_words(3), 1000)) == list(range(1000))
    assert len(permutation(random_words(3), 0)) == 0
    firsts = np.bincount([permutation(random_words(3, trial), 5)[0] for trial in range(2000)], minlength=5)
    assert ((firsts - 400) ** 2 / 400).sum() < 23.5  # chi squared, 4 degrees of freedom: p = 1e-4


def test_below_covers_its_range_evenly() -> None:
    counts = np.bincount(below(random_words(5), 10, 20_000), minlength=10)
    assert len(counts) == 10
    assert ((counts - 2000) ** 2 / 2000).sum() < 33.7  # 9 degrees of freedom: p = 1e-4


def test_split_is_stratified_disjoint_and_complete() -> None:
    labels = np.repeat(np.arange(3), (50, 21, 9))
    parts = split_by_class(labels, "any")
    assert sorted(np.concatenate(list(parts.values()))) == list(range(80))
    assert np.bincount(labels[parts["validation"]], minlength=3).tolist() == [4, 2, 1]  # a tenth of 40, 17 and 7
    assert np.bincount(labels[parts["test"]]).tolist() == [10, 4, 2]
    assert not np.array_equal(parts["test"], split_by_class(labels, "other")["test"])
    assert (np.diff(parts["train"]) > 0).all()


@pytest.mark.parametrize("n", [1, 2, 3, 30, 100, 301])
def test_pairs_share_the_class_and_use_instances_evenly(n: int) -> None:
    index, labels = pair_by_class(POOLS, CLASSES, n, 0)
    assert index.shape == (n, 3) and labels.shape == (n,) and index.dtype == labels.dtype == np.int64
    counts = np.bincount(labels, minlength=3)
    assert counts.max() - counts.min() <= 1
    for column, of_instance in enumerate(POOLS.values()):
        assert (of_instance[index[:, column]] == labels).all()
        used = np.bincount(index[:, column], minlength=len(of_instance))
        for label in range(3):
            uses = used[of_instance == label]
            assert uses.max() - uses.min() <= 1


def test_rounds_are_fresh_and_classes_mixed() -> None:
    index, _ = pair_by_class({"x": np.zeros(50, np.int64), "y": np.zeros(50, np.int64)}, ("a",), 100, 0)
    assert len({tuple(pair) for pair in index.tolist()}) > 90  # a repeated permutation would give 50 pairs
    _, labels = pair_by_class(POOLS, CLASSES, 300, 0)
    assert all(len(np.unique(labels[start : start + 30])) == 3 for start in range(0, 300, 30))


def test_pairing_follows_seed_and_names() -> None:
    index, _ = pair_by_class(POOLS, CLASSES, 90, 0, "s")
    again, _ = pair_by_class(POOLS, CLASSES, 90, 0, "s")
    assert np.array_equal(index, again)
    for seed, name in ((1, "s"), (0, "t")):
        assert not np.array_equal(index, pair_by_class(POOLS, CLASSES, 90, seed, name)[0])


def test_another_modality_leaves_the_others_as_they_were() -> None:
    index, _ = pair_by_class(POOLS, CLASSES, 90, 0)
    fewer, _ = pair_by_class({"x": POOLS["x"], "z": POOLS["z"]}, CLASSES, 90, 0)
    assert np.array_equal(index[:, [0, 2]], fewer)


def test_pairing_refuses() -> None:
    with pytest.raises(ValueError, match="'y' has no instance of class 'c'"):
        pair_by_class({"x": np.arange(3), "y": np.array([0, 1])}, CLASSES, 10, 0)
    with pytest.raises(ValueError, match="got 0"):
        pair_by_class(POOLS, CLASSES, 0, 0)
