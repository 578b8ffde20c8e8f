"""Metrics against closed forms, brute force and what must not change them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from mmebm.evaluation.metrics import (
    agreement_by_class,
    binomial_error,
    chance_agreement,
    class_accuracy,
    class_balance,
    conditional_coherence,
    frechet_distance,
    gaussian_kernel_distance,
    joint_coherence,
    kernel_distance,
    pair_agreement,
    precision_recall,
    spread,
)

# float64 sums of up to a few thousand terms: relative error below n eps = 5e-13; ten times that.
EXACT = 5e-12


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(x: torch.Tensor, mean: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """``x`` moved to exactly this sample mean and the sample covariance ``root' root``."""
    x = x - x.mean(0)
    whiten = torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    return x @ whiten @ root + mean


def test_coherence_of_predictions_made_by_hand():
    pred = torch.tensor([[3, 3, 3], [3, 3, 1], [0, 1, 2], [5, 4, 4]])
    assert joint_coherence(pred) == 1 / 4
    assert pair_agreement(pred) == pytest.approx((3 + 1 + 0 + 1) / 12, rel=EXACT)
    torch.testing.assert_close(
        conditional_coherence(pred, torch.tensor([3, 3, 0, 4])),
        torch.tensor([3, 3, 2], dtype=torch.float64) / 4,
        rtol=EXACT,
        atol=0,
    )


def test_macro_and_class_averages_of_predictions_made_by_hand():
    labels = torch.tensor([0, 0, 0, 2])
    pred = torch.tensor([[0, 1], [0, 0], [1, 0], [2, 1]])
    expected = {"micro": [3 / 4, 2 / 4], "macro": [(2 / 3 + 1) / 2, (2 / 3 + 0) / 2]}
    for average, values in expected.items():
        assert conditional_coherence(pred, labels, average).tolist() == pytest.approx(values, rel=EXACT)
    by_class = class_accuracy(pred, labels, 3)
    assert by_class[[0, 2]].flatten().tolist() == pytest.approx([2 / 3, 2 / 3, 1, 0], rel=EXACT)
    assert by_class[1].isnan().all()  # no tuple of that class


def test_macro_and_micro_agree_on_balanced_classes(seed: int):
    pred = torch.randint(3, (60, 2), generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(60) % 3
    micro, macro = (conditional_coherence(pred, labels, average) for average in ("micro", "macro"))
    torch.testing.assert_close(macro, micro, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(class_accuracy(pred, labels, 3).mean(0), micro, rtol=EXACT, atol=EXACT)


def test_agreement_by_class_is_the_joint_coherence_taken_apart(seed: int):
    pred = torch.randint(4, (500, 3), generator=torch.Generator().manual_seed(seed))
    shares = agreement_by_class(pred, 5)
    counted = [sum(row == [c] * 3 for row in pred.tolist()) / 500 for c in range(5)]
    assert shares.tolist() == pytest.approx(counted, rel=EXACT)
    assert shares.sum().item() == pytest.approx(joint_coherence(pred), rel=EXACT)


def test_collapse_is_coherent_by_chance_only():
    pred = torch.full((50, 4), 7)
    assert joint_coherence(pred) == pair_agreement(pred) == 1
    assert chance_agreement(pred, 10) == (1, 1)
    balance = class_balance(pred, 10)
    assert (balance.minimum.tolist(), balance.maximum.tolist()) == ([0] * 4, [1] * 4)
    assert str(balance.entropy.tolist()) == "[0.0, 0.0, 0.0, 0.0]"  # not -0.0


def test_independent_balanced_modalities_agree_by_chance_only():
    pred = torch.cartesian_prod(*[torch.arange(10)] * 3)
    assert joint_coherence(pred) == pytest.approx(0.01, rel=EXACT)
    assert chance_agreement(pred, 10) == pytest.approx((0.01, 0.1), rel=EXACT)
    balance = class_balance(pred, 10)
    assert balance.minimum.tolist() == balance.maximum.tolist() == [0.1] * 3
    assert balance.entropy.tolist() == pytest.approx([1] * 3, rel=EXACT)


def test_chance_agreement_is_the_mean_over_all_recombinations_of_rows():
    pred = torch.randint(4, (7, 3), generator=torch.Generator().manual_seed(0))
    recombined = torch.stack(
        [torch.stack([pred[i, 0], pred[j, 1], pred[k, 2]]) for i, j, k in itertools.product(range(7), repeat=3)]
    )
    expected = joint_coherence(recombined), pair_agreement(recombined)
    assert 0 < expected[0] < expected[1] < 1
    assert chance_agreement(pred, 4) == pytest.approx(expected, rel=EXACT)


def test_class_balance_shows_the_one_modality_that_collapsed():
    pred = torch.stack([torch.arange(100) % 4, torch.arange(100) % 2], dim=1)
    balance = class_balance(pred, 4)
    expected = torch.tensor([[0.25] * 4, [0.5, 0.5, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(balance.shares, expected, rtol=0, atol=0)
    assert (balance.minimum.tolist(), balance.maximum.tolist()) == ([0.25, 0], [0.25, 0.5])
    assert balance.entropy.tolist() == pytest.approx([1, 0.5], rel=EXACT)  # log 4 and log 2 over log 4


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form():
    mean_a, mean_b = torch.tensor([0.0, 1.0, -2.0]).double(), torch.tensor([1.0, 1.0, 0.0]).double()
    std_a, std_b = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 0.1, 0.5]).double()
    a = with_moments(draw(0, 200, 3), mean_a, std_a.diag())
    b = with_moments(draw(1, 300, 3), mean_b, std_b.diag())
    expected = ((mean_a - mean_b) ** 2).sum() + ((std_a - std_b) ** 2).sum()
    # The samples' moments are exact to the conditioning of the whitening, about 10 here: 1e-9 is generous, a wrong
    # formula is off by tenths.
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_agrees_with_the_matrix_square_root():
    linalg = pytest.importorskip("scipy.linalg")
    a, b = draw(0, 400, 12) @ draw(1, 12, 12), draw(2, 300, 12) @ draw(3, 12, 12) + 0.5
    cov_a, cov_b = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = linalg.sqrtm(cov_a @ cov_b)
    mean = float(((a.mean(0) - b.mean(0)) ** 2).sum())
    expected = mean + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(root).real
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)  # sqrtm loses half of the digits


@pytest.mark.parametrize("n", [2, 20, 500], ids=["two samples", "fewer than features", "many"])
def test_frechet_distance_of_equal_sets_is_zero(n: int):
    a = draw(0, n, 30) * 100
    # Relative to tr(A) = 30 * 100^2: what is left is rounding, not the 1e-8 of a square root of a covariance.
    assert 0 <= frechet_distance(a, a.flip(0)) <= EXACT * 3e5


def test_frechet_distance_is_symmetric_and_does_not_see_a_rotation():
    a, b = draw(0, 50, 20), 2 * draw(1, 15, 20) + 1
    rotation = torch.linalg.qr(draw(2, 20, 20)).Q
    distance = frechet_distance(a, b)
    assert distance > 10
    assert frechet_distance(b, a) == pytest.approx(distance, rel=EXACT)
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(distance, rel=EXACT)


def test_frechet_distance_with_singular_covariances():
    # Features 3 and 4 never vary, and differ by 2 and 0: they add 4 to the distance of the others.
    a, b = draw(0, 100, 3), draw(1, 80, 3) * 2
    constant_a, constant_b = torch.tensor([5.0, 0.0]).double(), torch.tensor([3.0, 0.0]).double()
    padded = frechet_distance(torch.cat([a, constant_a.expand(100, 2)], 1), torch.cat([b, constant_b.expand(80, 2)], 1))
    assert padded == pytest.approx(frechet_distance(a, b) + 4, rel=EXACT)


def test_kernel_distance_matches_a_loop_over_pairs():
    a, b = draw(0, 4, 3), draw(1, 6, 3)

    def k(x: torch.Tensor, y: torch.Tensor) -> float:
        return (float(x @ y) / 3 + 1) ** 3

    def loop(x: torch.Tensor, y: torch.Tensor) -> float:
        def off(u: torch.Tensor) -> float:
            return sum(k(u[i], u[j]) for i, j in itertools.permutations(range(len(u)), 2)) / (len(u) * (len(u) - 1))

        return off(x) + off(y) - 2 * sum(k(u, v) for u, v in itertools.product(x, y)) / (len(x) * len(y))

    generator = torch.Generator().manual_seed(3)
    order_a, order_b = torch.randperm(4, generator=generator), torch.randperm(6, generator=generator)
    first = loop(a[order_a[:2]], b[order_b[:3]])
    second = loop(a[order_a[2:]], b[order_b[3:]])
    result = kernel_distance(a, b, subsets=2, seed=3)
    assert result.value == pytest.approx((first + second) / 2, rel=EXACT)
    assert result.error == pytest.approx(abs(first - second) / 2, rel=EXACT)  # std / sqrt(2) of two numbers


def test_kernel_distance_is_unbiased_and_its_error_honest():
    z = []
    for trial in range(100):
        # Rows in order, as samples grouped by class would be: the subsets must be drawn at random all the same.
        a, b = draw(2 * trial, 200, 4), draw(2 * trial + 1, 260, 4)
        value, error = kernel_distance(a[a[:, 0].argsort()], b[b[:, 0].argsort(descending=True)])
        z.append(value / error)
    z = torch.tensor(z)
    # Ten subsets: value / error follows Student's t with 9 degrees of freedom, standard deviation 1.13; the mean of
    # 100 has .113, of which 4 are allowed. The biased estimate (diagonal kept) has mean z of about 10.
    assert z.mean().abs() < 0.45
    assert 0.8 < z.std() < 1.5  # 1.13 +- 4 times its own error of .08, more above for the heavy tails
    shifted = kernel_distance(draw(0, 200, 4), draw(1, 200, 4) + 1)
    assert shifted.value > 5 * shifted.error


def test_binomial_error():
    assert binomial_error(0.5, 100) == 0.05
    assert binomial_error(0.9, 2000) == pytest.approx(math.sqrt(0.09 / 2000), rel=EXACT)
    assert binomial_error(1, 10) == 0


PRED = torch.zeros(3, 2, dtype=torch.int64)
IMAGES = {"x": torch.zeros(40, 2)}
BROKEN = torch.tensor([[1.0], [float("nan")]])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: joint_coherence(PRED[:, :1]), ValueError, r"pred must have shape .* got \(3, 1\)"),
        (lambda: pair_agreement(PRED[:0]), ValueError, r"pred must have shape .* got \(0, 2\)"),
        (lambda: joint_coherence(PRED.float()), TypeError, r"pred must hold class indices .* got torch.float32"),
        (lambda: class_balance(PRED, 1), ValueError, "n_classes must be at least 2, got 1"),
        (lambda: chance_agreement(PRED + 4, 4), ValueError, r"pred must lie in \[0, 4\), got \[4, 4\]"),
        (lambda: class_balance(PRED - 1, 4), ValueError, r"pred must lie in \[0, 4\), got \[-1, -1\]"),
        (lambda: conditional_coherence(PRED, PRED[:2, 0]), ValueError, r"labels must have shape \(3,\).* got \(2,\)"),
        (lambda: conditional_coherence(PRED, PRED[:, 0], "mean"), ValueError, "average must be .* got 'mean'"),
        (lambda: class_accuracy(PRED, PRED[:, 0] - 1, 3), ValueError, r"labels must lie in \[0, 3\), got \[-1, -1\]"),
        (lambda: agreement_by_class(PRED, 1), ValueError, "n_classes must be at least 2, got 1"),
        (lambda: frechet_distance(draw(0, 1, 2), draw(0, 9, 2)), ValueError, "a must have at least 2 samples, got 1"),
        (lambda: frechet_distance(draw(0, 9, 2), draw(0, 9, 3)), ValueError, "same number of features, got 2 and 3"),
        (lambda: frechet_distance(draw(0, 9), draw(0, 9, 3)), ValueError, r"a must have shape \(n, d\), got \(9,\)"),
        (lambda: frechet_distance(PRED, draw(0, 9, 2)), TypeError, "a must hold features .* got torch.int64"),
        (lambda: frechet_distance(draw(0, 9, 1), BROKEN), ValueError, "b must be finite, got 1 entries"),
        (lambda: kernel_distance(draw(0, 99, 2), draw(0, 19, 2)), ValueError, "b must have at least 20 .* got 19"),
        (lambda: kernel_distance(draw(0, 9, 2), draw(0, 9, 2), subsets=1), ValueError, "subsets must be .* got 1"),
        (lambda: gaussian_kernel_distance(IMAGES, IMAGES, bandwidths={"y": 1.0}), ValueError, r"of \['x'\], .* of 'y'"),
        (lambda: gaussian_kernel_distance(IMAGES, IMAGES, bandwidths={"x": 0.0}), ValueError, "positive .* got 0.0"),
        (lambda: binomial_error(1.5, 10), ValueError, "p must be a share .* got 1.5"),
        (lambda: binomial_error(0.5, 0), ValueError, "n must be at least 1, got 0"),
    ],
)
def test_bad_input_is_refused_by_name_and_value(call, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        call()


# ------------------------------------------------------------------------------ precision, recall and spread


def reference_precision_recall(samples: np.ndarray, real: np.ndarray, k: int) -> tuple[float, float]:
    """The definition in loops."""

    def reach(points: np.ndarray) -> list[float]:
        return [sorted(np.linalg.norm(np.delete(points, i, 0) - p, axis=1))[k - 1] for i, p in enumerate(points)]

    def share(points: np.ndarray, by: np.ndarray) -> float:
        radii = reach(by)
        return float(np.mean([any(np.linalg.norm(p - q) <= r for q, r in zip(by, radii, strict=True)) for p in points]))

    return share(samples, real), share(real, samples)


def test_precision_and_recall_are_the_definition(seed: int) -> None:
    random = np.random.default_rng(seed)
    for n, m, d, k, shift in ((9, 14, 2, 1, 0.5), (20, 8, 5, 3, 1.0), (6, 6, 1, 5, 0.0)):
        samples, real = random.normal(size=(n, d)) * 0.7 + shift, random.normal(size=(m, d))
        found = precision_recall(torch.from_numpy(samples), torch.from_numpy(real), neighbours=k)
        assert found == pytest.approx(reference_precision_recall(samples, real, k))


def test_precision_and_recall_tell_prototypes_from_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(600, 4, generator=generator)
    few = torch.randn(600, 4, generator=generator) * 0.1  # good and all alike
    wide = torch.randn(600, 4, generator=generator) * 4  # all over the place
    same = torch.randn(600, 4, generator=generator)
    assert precision_recall(few, real).precision > 0.95 and precision_recall(few, real).recall < 0.1
    assert precision_recall(wide, real).precision < 0.3 and precision_recall(wide, real).recall > 0.9
    assert min(precision_recall(same, real)) > 0.8
    with pytest.raises(ValueError, match="neighbours must be at least 1, got 0"):
        precision_recall(same, real, neighbours=0)
    with pytest.raises(ValueError, match="at least 4 samples, got 3"):
        precision_recall(same[:3], real)


def test_spread_is_the_ratio_of_standard_deviations() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(4000, 3, 5, 5, generator=generator)
    other = torch.randn(4000, 3, 5, 5, generator=generator)
    assert spread(0.25 * other + 7, real) == pytest.approx(0.25, abs=0.01)
    assert spread(real[:1].expand(9, -1, -1, -1), real) == 0 and spread(real, torch.ones(5, 3, 5, 5)) is None
    # by hand: variances 2 + 8 of the samples, 1/2 + 2 of the real ones
    assert spread(torch.tensor([[0.0, 0], [2, 4]]), torch.tensor([[0.0, 0], [1, 2]])) == pytest.approx(2.0)
