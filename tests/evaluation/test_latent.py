"""Classes read off codes that hold them or do not; paths between codes against their geometry."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmebm.data.base import MultimodalDataset
from mmebm.evaluation.latent import (
    encoders,
    interpolate,
    interpolate_prior,
    latent_classification,
    latent_path,
    latent_report,
    usable_rows,
)
from mmebm.evaluation.subsets import subsets

pytestmark = pytest.mark.usefixtures("one_thread")
MakeSet = Callable[..., MultimodalDataset]


def test_codes_with_and_without_the_class(make_set: MakeSet, seed: int) -> None:
    train, test = make_set(700), make_set(200, "test", seed=1)
    rng = torch.Generator().manual_seed(seed)
    calls: list[tuple[tuple[str, ...], int]] = []

    def encode(x: Mapping[str, Tensor], own: int) -> Tensor:
        # the vector tells the class; the images alone give noise
        n = len(next(iter(x.values())))
        calls.append((tuple(x), n))
        return x["vector"] if "vector" in x else torch.randn(n, 4, generator=rng)

    result = latent_classification(encode, train, test, train_rows=300, seed=seed)
    assert (result["train_rows"], result["test_rows"]) == (300, 200)
    assert list(result["by_subset"]) == [
        "grey",
        "colour",
        "vector",
        "grey+colour",
        "grey+vector",
        "colour+vector",
        "grey+colour+vector",
    ]
    assert calls[0] == (("grey",), 300) and calls[1] == (("grey",), 200)
    for name, value in result["by_subset"].items():
        if "vector" in name:
            assert value > 0.98  # 4 numbers of mean +-.6 and deviation .2 each: six deviations apart
        else:
            assert abs(value - 0.5) < 6 * 0.5 / math.sqrt(200)
    by_subset = result["by_subset"]
    assert result["by_given"]["2"] == pytest.approx(
        (by_subset["grey+colour"] + by_subset["grey+vector"] + by_subset["colour+vector"]) / 3
    )
    assert result["by_given"]["3"] == by_subset["grey+colour+vector"]


def test_accuracy_is_that_of_the_best_linear_rule(make_set: MakeSet, seed: int) -> None:
    """Two Gaussians of unit width at +-1 overlap: the best rule is right with probability Phi(1)."""
    train, test = make_set(6000), make_set(6000, "test", seed=1)
    rng = torch.Generator().manual_seed(seed)

    def encode(x: Mapping[str, Tensor], own: int) -> Tensor:
        sign = x["vector"].mean(1).sign()[:, None]
        return sign * torch.tensor([1.0, 0.0]) + torch.randn(len(sign), 2, generator=rng)

    result = latent_classification(encode, train, test, train_rows=None, sizes=(3,), seed=seed)
    best = 0.5 * (1 + math.erf(1 / math.sqrt(2)))
    # 6 standard errors of a share of 6,000; a rule learned from 6,000 rows loses about 1e-4 to the best
    assert result["by_given"]["3"] == pytest.approx(best, abs=6 * math.sqrt(best * (1 - best) / 6000))
    assert (result["train_rows"], result["test_rows"]) == (6000, 6000)


def test_batches_get_seeds_of_their_own_and_one_seed_gives_one_result(make_set: MakeSet) -> None:
    train, test = make_set(2500), make_set(100, "test", seed=1)
    seen: list[int] = []

    def encode(x: Mapping[str, Tensor], own: int) -> Tensor:
        seen.append(own)
        n = len(next(iter(x.values())))
        assert n <= 1000
        return torch.randn(n, 2, generator=torch.Generator().manual_seed(own))

    one = latent_classification(encode, train, test, train_rows=None, sizes=(1,), seed=5)
    assert len(seen) == 3 * (3 + 1) == len(set(seen))
    assert latent_classification(encode, train, test, train_rows=None, sizes=(1,), seed=5) == one
    latent_classification(encode, train, test, train_rows=None, sizes=(1,), seed=6)
    assert set(seen[:12]) == set(seen[12:24]) and not set(seen[:12]) & set(seen[24:])


def test_tuples_that_lack_something_are_left_out(make_set: MakeSet) -> None:
    data = make_set(100)
    present = torch.ones(100, 3, dtype=torch.bool)
    present[:10, 1] = False
    labels = data.labels.clone()
    labels[90:] = -1
    partial = replace(data, present=present, labels=labels)
    assert usable_rows(partial, labelled=False).tolist() == list(range(10, 100))
    assert usable_rows(partial, labelled=True).tolist() == list(range(10, 90))
    with pytest.raises(ValueError, match="'small' train has no tuple with all modalities and a class"):
        usable_rows(make_set(classes=()), labelled=True)


def test_encoders_of_a_system_and_the_report(system: Any, make_set: MakeSet, seed: int) -> None:
    train, test = make_set(60), make_set(40, "test", seed=1)
    x = test.batch(torch.arange(40))
    given = {name: x[name] for name in ("grey", "vector")}
    ways = encoders(system, steps=0)
    experts = [part.detach().numpy() for e in system.inference(given) for part in (e.mean, e.logvar)]
    np.testing.assert_allclose(ways.mean(given, 0).numpy(), (experts[0] + experts[2]) / 2, rtol=1e-6, atol=1e-6)
    draws = torch.stack([ways.sample(given, seed + i) for i in range(400)]).numpy()
    # of a mixture of two: variance is the mean of the variances and a quarter of the squared distance of the means
    variance = (np.exp(experts[1]) + np.exp(experts[3])) / 2 + (experts[0] - experts[2]) ** 2 / 4
    # 120 numbers, each a mean of 400: 7 standard errors; the variance of nearly normal ones has sqrt(2 / 400) = 7 %
    assert (np.abs(draws.mean(0) - (experts[0] + experts[2]) / 2) < 7 * np.sqrt(variance / 400)).all()
    assert (np.abs(draws.var(0) / variance - 1) < 0.6).all()
    assert torch.equal(ways.revised_sample(given, seed), ways.sample(given, seed))  # no steps, no change
    moved = encoders(system)
    before, after = moved.mean(given, seed), moved.revised_mean(given, seed)
    energy = system.generator.negative_log_likelihood
    assert not torch.equal(before, after)
    assert torch.equal(after, moved.revised_mean(given, seed))
    assert energy(given, after).mean() < energy(given, torch.randn_like(after) * 3).mean()
    report = latent_report(moved, train, test, seed=seed)
    assert list(report) == ["mean, 500 rows", "sample, all rows"]
    assert report["mean, 500 rows"]["q"]["train_rows"] == 60  # all there are
    assert list(report["sample, all rows"]["z_k"]["by_given"]) == ["1"]
    # untrained, but different: the classes are opposite corners of the data, and any smooth map keeps them apart
    assert report["mean, 500 rows"]["q"]["by_given"]["3"] > 0.8


def test_subsets_are_all_there_are_up_to_five_modalities() -> None:
    five = subsets("abcde", range(1, 5))
    assert {size: len(found) for size, found in five.items()} == {1: 5, 2: 10, 3: 10, 4: 5}
    seven, again, other = (subsets("abcdefg", range(1, 7), seed=s) for s in (0, 0, 1))
    assert {size: len(set(found)) for size, found in seven.items()} == {1: 7, 2: 10, 3: 10, 4: 10, 5: 10, 6: 7}
    assert seven == again != other
    assert all(len(given) == size and list(given) == sorted(set(given)) for size in seven for given in seven[size])
    assert len(subsets("abcdefg", [3], per_size=None)[3]) == math.comb(7, 3)


def test_paths_on_the_sphere(seed: int) -> None:
    a, b = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    path = latent_path(a, b, 7).numpy()
    np.testing.assert_allclose(path[:, 0], a, atol=1e-12)
    np.testing.assert_allclose(path[:, -1], b, atol=1e-12)
    length = np.linalg.norm(path, axis=2)
    np.testing.assert_allclose(
        np.diff(length, axis=1), np.repeat(((length[:, -1] - length[:, 0]) / 6)[:, None], 6, 1), atol=1e-12
    )
    unit = path / length[..., None]
    turned = np.arccos(np.clip((unit[:, 1:] * unit[:, :-1]).sum(2), -1, 1))
    whole = np.arccos((unit[:, 0] * unit[:, -1]).sum(1))
    # an arc cosine of float64 knows angles of a tenth to about 1e-14
    np.testing.assert_allclose(turned, np.repeat((whole / 6)[:, None], 6, 1), rtol=1e-9)
    middle = latent_path(torch.eye(2)[:1] * 2, torch.eye(2)[1:] * 4, 3)[0, 1]
    torch.testing.assert_close(middle, torch.tensor([1.0, 1.0]) / math.sqrt(2) * 3)
    # an independent pair of N(0, I) stays on its shell, where the line leaves it
    far_a, far_b = torch.randn(2, 50, 4096, generator=torch.Generator().manual_seed(seed))
    sphere, line = (latent_path(far_a, far_b, 3, how=how)[:, 1].norm(dim=1) / 64 for how in ("spherical", "linear"))  # type: ignore[arg-type]
    # |z|^2 / 4096 has standard deviation 1 / sqrt(2048) = .022: ten of them
    assert (sphere - 1).abs().max() < 0.11 and (line - math.sqrt(0.5)).abs().max() < 0.11


def test_paths_without_an_arc_are_lines(seed: int) -> None:
    a = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
    for b in (a, 2 * a, -a, torch.zeros_like(a)):
        expected = np.linspace(a.numpy(), b.numpy(), 5, axis=1)
        np.testing.assert_allclose(latent_path(a, b, 5).numpy(), expected, atol=1e-5)
    assert np.array_equal(latent_path(a, a.flip(0), 2, how="linear").numpy(), torch.stack([a, a.flip(0)], 1).numpy())


def test_interpolated_rows(system: Any, make_set: MakeSet, seed: int) -> None:
    x = make_set(6).batch(torch.arange(6))
    x_a, x_b = {"grey": x["grey"][:3]}, {name: value[3:] for name, value in x.items()}
    rows = interpolate(system, x_a, x_b, 5, seed=seed, latent_steps=0)
    assert {name: tuple(v.shape) for name, v in rows.items()} == {
        "grey": (3, 5, 1, 8, 8),
        "colour": (3, 5, 3, 8, 8),
        "vector": (3, 5, 4),
    }
    assert not any(v.requires_grad for v in rows.values())
    turned = interpolate(system, x_b, x_b, 4, seed=seed, latent_steps=0)
    assert not torch.equal(turned["vector"][:, 0], turned["vector"][:, -1])  # two draws of q, not one
    revised = interpolate(system, x_a, x_b, 5, seed=seed, latent_steps=0, data_steps=50)
    # 50 steps of .02 on |x + .3|^2: what is left of the start is .96^50 = 13 %, and noise of .05 / sqrt(.08) = .18
    assert (revised["colour"].mean() + 0.3).abs() < 0.2 * (rows["colour"].mean() + 0.3).abs() + 0.05
    prior = interpolate_prior(system, 3, 4, seed=seed)
    ends = system.generate(6, seed=seed)
    for name, value in prior.items():
        # decoded one by one or as ends of a path: float32 sums in another order
        torch.testing.assert_close(value[:, 0], ends[name][:3], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(value[:, -1], ends[name][3:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e, d: latent_classification(e, d, d, sizes=(4,)), r"sizes must lie in 1..3, got \[4\]"),
        (lambda e, d: latent_classification(e, d, d, train_rows=0), "train_rows must be at least 1, got 0"),
        (lambda e, d: latent_classification(e, d, d, train_rows=1), "at least two classes, got class"),
        (lambda e, d: latent_classification(lambda x, s: e(x, s)[:, 0], d, d), r"codes \(120, d\), got \(120,\)"),
        (lambda e, d: latent_classification(lambda x, s: e(x, s) / 0, d, d), "finite codes, got 120 of 120 rows"),
        (lambda e, d: latent_path(torch.zeros(2, 3), torch.zeros(2, 4), 3), r"one shape \(n, d\)"),
        (lambda e, d: latent_path(torch.zeros(2, 3), torch.zeros(2, 3), 1), "steps must be at least 2, got 1"),
        (lambda e, d: latent_path(torch.ones(2, 3), torch.ones(2, 3), 3, how="curved"), "how must be .* got 'curved'"),
    ],
)
def test_bad_input_is_refused(call, message: str, make_set: MakeSet) -> None:
    with pytest.raises(ValueError, match=message):
        call(lambda x, seed: next(iter(x.values())).flatten(1) + 1.5, make_set())


def test_scikit_learn_is_asked_for_by_name(make_set: MakeSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ModuleNotFoundError, match=r"scikit-learn: pip install 'mmebm\[digits\]'"):
        latent_classification(lambda x, s: x["vector"], make_set(), make_set())
