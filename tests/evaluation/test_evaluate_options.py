"""What an evaluation measures only when asked, and its conventions, on models whose numbers are known."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmebm.data.base import Modality, MultimodalDataset
from mmebm.evaluation.evaluate import Reference, evaluate, evaluate_conditional, evaluate_pairs, evaluate_samples, table
from mmebm.evaluation.sweep import data_chain

pytestmark = pytest.mark.usefixtures("one_thread")
Batch = Mapping[str, Tensor]
MakeSet = Callable[..., MultimodalDataset]
NAMES = ("grey", "colour", "vector")


class Judges:
    """Knows the class for certain: light where the mean is positive. Columns in an order of its own."""

    classes = ("dark", "light")
    learned: tuple[str, ...] = ("vector",)

    def __init__(self, modalities: tuple[Modality, ...]) -> None:
        self.kind = "certain"
        self.modalities = tuple(reversed(modalities))
        self.accuracy = {m.name: 1.0 for m in modalities}

    def tested(self, data: MultimodalDataset) -> dict[str, float]:
        return self.accuracy

    def predict(self, batch: Batch) -> Tensor:
        return torch.stack([(batch[m.name].flatten(1).mean(1) > 0).long() for m in self.modalities], 1)

    def features(self, batch: Batch) -> dict[str, Tensor]:
        return {m.name: batch[m.name].flatten(1)[:, :4] for m in self.modalities}


class Mean:
    """Three features of an image: the means of its channels."""

    name = "Mean"

    def features(self, images: Tensor) -> Tensor:
        return images.expand(-1, 3, -1, -1).mean((2, 3))


def judges(data: MultimodalDataset) -> Any:
    return Judges(data.modalities)


def light(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1) > 0


def test_micro_macro_and_classes(make_set: MakeSet) -> None:
    """Three dark tuples to a light one, a model that draws dark always: right for the dark, wrong for the light."""
    test = make_set(200, "test")
    rows = torch.tensor([*range(0, 180, 2), *range(1, 61, 2)])  # 90 dark, 30 light

    def complete(given: Batch, seed: int) -> Batch:
        n = len(next(iter(given.values())))
        return {**{m.name: torch.full((n, *m.shape), -0.5) for m in test.modalities}, **given}

    result = evaluate_conditional(complete, test, judges(test), rows=rows, seed=0)
    assert result["n"] == 120
    assert result["by_given"] == {"1": 0.75, "2": 0.75}
    assert result["by_given_macro"] == {"1": 0.5, "2": 0.5}
    assert result["by_class"] == {size: {"dark": 1.0, "light": 0.0} for size in ("1", "2")}
    # what is given is among the completions, as it was, and must not be counted
    assert {given: set(targets) for given, targets in result["by_subset"].items()} == {
        "grey": {"colour", "vector"},
        "colour": {"grey", "vector"},
        "vector": {"grey", "colour"},
        "grey+colour": {"vector"},
        "grey+vector": {"colour"},
        "colour+vector": {"grey"},
    }
    dark = evaluate_conditional(complete, test, judges(test), rows=rows[:90], seed=0)
    assert dark["by_class"]["1"] == {"dark": 1.0, "light": None}
    assert json.loads(json.dumps(dark)) == dark


def test_the_right_column_is_judged(make_set: MakeSet) -> None:
    """Only the colour image comes out wrong: the columns of the judges are in another order than the set's."""
    test = make_set(40, "test")

    def complete(given: Batch, seed: int) -> Batch:
        sign = torch.where(light(next(iter(given.values()))), 0.5, -0.5)
        filled = {m.name: sign.reshape(-1, *[1] * len(m.shape)).expand(-1, *m.shape) for m in test.modalities}
        return {**filled, "colour": -filled["colour"], **given}

    by_subset = evaluate_conditional(complete, test, judges(test), rows=torch.arange(40), seed=0)["by_subset"]
    assert by_subset["grey"] == {"colour": 0.0, "vector": 1.0}
    assert by_subset["grey+vector"] == {"colour": 0.0}
    assert by_subset["vector"] == {"grey": 1.0, "colour": 0.0}


def test_six_modalities_have_their_subsets_drawn() -> None:
    n, names = 12, "abcdef"
    labels = torch.arange(n) % 2
    pools = {name: (labels * 2.0 - 1)[:, None].repeat(1, 4) for name in names}
    test = MultimodalDataset(
        name="six",
        split="test",
        seed=0,
        modalities=tuple(Modality(name, (4,), "vector") for name in names),
        classes=Judges.classes,
        pools=pools,
        pool_labels=dict.fromkeys(names, labels),
        index=torch.arange(n)[:, None].repeat(1, 6),
        labels=labels,
    )
    asked: list[tuple[str, ...]] = []

    def complete(given: Batch, seed: int) -> Batch:
        asked.append(tuple(given))
        return test.batch(torch.arange(n))

    result = evaluate_conditional(complete, test, judges(test), rows=torch.arange(n), seed=3)
    assert len(asked) == len(set(asked)) == 6 + 10 + 10 + 10 + 6
    assert result["subsets"] == {
        "1": {"used": 6, "of": 6},
        "2": {"used": 10, "of": 15},
        "3": {"used": 10, "of": 20},
        "4": {"used": 10, "of": 15},
        "5": {"used": 6, "of": 6},
    }
    assert result["by_given"] == dict.fromkeys("12345", 1.0)
    whole = evaluate_conditional(complete, test, judges(test), rows=torch.arange(n), seed=3, subsets_per_size=None)
    assert len(whole["by_subset"]) == 2**6 - 2


def test_memory_is_bounded_and_the_seeds_differ(make_set: MakeSet) -> None:
    test = make_set(2500, "test")
    calls: list[tuple[int, int]] = []

    def complete(given: Batch, seed: int) -> Batch:
        n = len(next(iter(given.values())))
        calls.append((n, seed))
        return {**{m.name: torch.ones(n, *m.shape) for m in test.modalities}, **given}

    result = evaluate_conditional(complete, test, judges(test), rows=torch.arange(2500), seed=7)
    assert [n for n, _ in calls[:3]] == [1000, 1000, 500] and calls[0][1] == 7
    assert len({seed for _, seed in calls[:3]}) == 3 and calls[:3] == calls[3:6]
    assert result["by_given"]["1"] == 0.5


class OneWrong:
    """A system that tells the class of any source, and decodes it right everywhere but in the vector; there it is right
    only if the vector itself was the source. The latent is (sign, which source)."""

    def __init__(self, modalities: tuple[Modality, ...]) -> None:
        self.modalities = modalities
        self.device = torch.device("cpu")
        self.inference, self.prior = self, None
        self.revised = 0

    def sample(self, given: Batch, rng: torch.Generator) -> Tensor:
        ((name, x),) = given.items()
        return torch.stack([light(x) * 2.0 - 1, torch.full((len(x),), float(NAMES.index(name)))], 1)

    def revise_latent(self, z: Tensor, x: Batch, *, seed: int, steps: int | None = None, **_: Any) -> Any:
        assert steps is None
        self.revised += 1
        return SimpleNamespace(state=z, info={})

    def generator(self, z: Tensor) -> dict[str, Tensor]:
        own = z[:, 1] == NAMES.index("vector")
        half = dict.fromkeys(NAMES, z[:, 0] / 2) | {"vector": torch.where(own, z[:, 0], -z[:, 0]) / 2}
        return {m.name: half[m.name].reshape(-1, *[1] * len(m.shape)).expand(-1, *m.shape) for m in self.modalities}


def test_pairs_without_and_with_the_source_itself(make_set: MakeSet) -> None:
    test = make_set(60, "test")
    system: Any = OneWrong(test.modalities)
    reference = Reference(test.batch(torch.arange(60)), test.modalities, judges(test), 2, [Mean()])
    result = evaluate_pairs(system, test, reference, rows=torch.arange(60), seed=0)
    assert result["coherence"] == {
        "grey": {"grey": 1.0, "colour": 1.0, "vector": 0.0},
        "colour": {"grey": 1.0, "colour": 1.0, "vector": 0.0},
        "vector": {"grey": 1.0, "colour": 1.0, "vector": 1.0},
    }
    assert result["coherence_mean"] == pytest.approx(4 / 6)
    assert result["coherence_mean_with_self"] == pytest.approx(7 / 9)
    distances = result["distances"]["Mean"]
    assert set(distances["frechet"]["vector"]) == {"grey", "colour"}  # images only
    # decoded images are the same for every source: means at +-.5 against the real ones
    values = [v for row in distances["frechet"].values() for v in row.values()]
    assert distances["frechet_mean_with_self"] == pytest.approx(sum(values) / 6)
    without = [v for source, row in distances["frechet"].items() for target, v in row.items() if source != target]
    assert len(without) == 4 and distances["frechet_mean"] == pytest.approx(sum(without) / 4)
    assert set(result["distances"]["classifiers"]["frechet"]["grey"]) == {"vector"}
    assert system.revised == 0
    evaluate_pairs(system, test, reference, rows=torch.arange(60), seed=0, latent_steps=None)
    assert system.revised == 3


def test_distances_on_other_networks(make_set: MakeSet, seed: int) -> None:
    test, train = make_set(100, "test"), make_set(100, seed=1)
    real = test.batch(torch.arange(100))
    same = {name: x.flip(0) for name, x in real.items()}
    result = evaluate_samples(same, real, judges(test), 2, [Mean()])
    assert set(result["features"]) == {"Mean"}
    found = result["features"]["Mean"]
    # the same tuples in another order: rounding of float64 sums of means of at most 1
    assert found["frechet"] == pytest.approx(0, abs=1e-12)
    assert set(found["frechet_by_modality"]) == set(found["kernel_by_modality"]) == {"grey", "colour"}
    moved = evaluate_samples({name: x + 0.25 for name, x in real.items()}, real, judges(test), 2, [Mean()])
    # equal covariances: what is left is the squared distance of the means, .25 in each of three features
    assert moved["features"]["Mean"]["frechet"] == pytest.approx(3 * 0.25**2, rel=1e-5)  # float32 images
    ten = {name: x[:10] for name, x in real.items()}
    few = evaluate_samples(ten, train.batch(torch.arange(10)), judges(test), 2, [Mean()])
    assert few["features"]["Mean"]["kernel"] is None and few["features"]["Mean"]["frechet"] > 0
    with pytest.raises(ValueError, match=r"features must have distinct names.*\['Mean', 'Mean'\]"):
        evaluate_samples(same, real, judges(test), 2, [Mean(), Mean()])


def test_everything_at_each_point_as_plain_data(system: Any, make_set: MakeSet, seed: int) -> None:
    test, train = make_set(80, "test"), make_set(100, seed=1)
    points = {name: system.generate(50, seed=seed + i) for i, name in enumerate(("vae", "x0", "xk", "frozen"))}
    complete = {"decode": lambda given, own: {**system.generator(system.inference.sample(given)), **given}}

    def measured(**options: Any) -> dict[str, Any]:
        with torch.no_grad():
            return evaluate(points, complete, test, train, judges(test), conditional_rows=40, seed=seed, **options)

    plain = measured()
    assert set(plain) == {"split", "classifiers", "floor", "training", "points", "conditional"}
    # the reference is 50 of 80, and the ceiling two halves of these
    assert plain["floor"]["n"] == 40 and plain["training"]["n"] == plain["points"]["x0"]["n"] == 50
    other = measured(second=judges(test))
    assert other["second_judge"]["accuracy"] == other["classifiers"] and set(other) - set(plain) == {"second_judge"}
    assert other["points"]["xk"]["second_judge"]["joint_coherence"] == other["points"]["xk"]["joint_coherence"]
    assert other["conditional"]["decode"]["by_given_second"] == other["conditional"]["decode"]["by_given"]
    assert "by the second judge" in table(other)
    systems = {"vae": system, "x0": system}
    elsewhere = data_chain(system, 50, seed=seed, start=points["x0"])
    full = measured(
        features=[Mean()],
        pairs=systems,
        sweep={"xk": system, "frozen": elsewhere},
        sweep_steps=(0, 2, 5),
        latent=systems,
        likelihood=systems,
        likelihood_rows=3,
        likelihood_options={"chains": 4, "steps": 5},
    )
    assert json.loads(json.dumps(full, allow_nan=False)) == full
    assert set(full) - set(plain) == {"pairs", "sweep", "latent", "likelihood"}
    for name, values in plain["points"].items():  # what is added changes nothing of what was there
        assert {key: full["points"][name][key] for key in values} == values
    assert set(full["points"]) == set(points) and all("Mean" in p["features"] for p in full["points"].values())
    assert full["pairs"]["vae"]["decoded"]["latent_steps"] == 0
    assert [row["steps"] for row in full["sweep"]["frozen"]] == [0, 2, 5]
    start = full["sweep"]["xk"][0]
    assert start["frechet"] == pytest.approx(plain["points"]["vae"]["frechet"], rel=1e-9)  # the same draw, no steps
    moved = full["sweep"]["frozen"][0]
    assert moved["frechet"] == pytest.approx(plain["points"]["x0"]["frechet"], rel=1e-9)
    assert full["latent"]["x0"]["sample, all rows"]["q"]["train_rows"] == 100
    assert full["likelihood"]["vae"] == full["likelihood"]["x0"] and full["likelihood"]["vae"]["n"] == 3
    by_class = full["points"]["x0"]["joint_coherence_by_class"]
    assert sum(by_class.values()) == pytest.approx(full["points"]["x0"]["joint_coherence"])
    text = table(full)
    for word in ("frozen", "FD-Mean", "KD-Mean", "log p(X)", "classes read off", "steps of the data chain", "itself"):
        assert word in text, word
    assert "FD-" not in table(plain)


def test_a_set_without_classes_says_what_is_left_out(system: Any, make_set: MakeSet, seed: int) -> None:
    test, train = make_set(60, "test", classes=()), make_set(60, classes=(), seed=1)
    result = evaluate(
        {"x0": system.generate(50, seed=seed)},
        {"decode": lambda given, own: given},
        test,
        train,
        None,
        seed=seed,
        features=[Mean()],
        pairs={"x0": system},
        sweep={"x0": system},
        sweep_steps=(0, 1),
        latent={"x0": system},
    )
    assert set(result["skipped"]) == {"coherence", "conditional", "latent"}
    assert all("no classes" in why for why in result["skipped"].values())
    assert result["conditional"] == {} and "latent" not in result
    point = result["points"]["x0"]
    assert "joint_coherence" not in point and "no classes" in point["skipped"]["coherence"]
    assert point["features"]["Mean"]["frechet"] > result["floor"]["features"]["Mean"]["frechet"]
    assert "coherence" not in result["pairs"]["x0"]["decoded"]
    text = table(result)
    assert "not measured: coherence" in text and "FD-Mean" in text
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_tuples_that_lack_a_modality_are_no_reference(make_set: MakeSet) -> None:
    test, train = make_set(80, "test"), make_set(80, seed=1)
    present = torch.ones(80, 3, dtype=torch.bool)
    present[40:, 0] = False
    asked: list[Tensor] = []

    def complete(given: Batch, seed: int) -> Batch:
        asked.extend(given.values())
        return {**test.batch(torch.arange(len(asked[-1]))), **given}

    points = {"real": test.batch(torch.arange(80))}
    result = evaluate(points, {"c": complete}, replace(test, present=present), train, judges(test))
    assert result["points"]["real"]["n"] == 40 and result["conditional"]["c"]["n"] == 40
    assert all((x.flatten(1) != 0).any(1).all() for x in asked)  # no row of zeros
    with pytest.raises(ValueError, match="no tuple with all modalities"):
        evaluate(points, {}, replace(test, present=present & torch.tensor([True, True, False])), train, judges(test))
