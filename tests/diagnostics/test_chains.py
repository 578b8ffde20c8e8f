"""R-hat, effective sample size and autocorrelation against processes whose values are known, and against ArviZ."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmebm.diagnostics import autocorrelation, autocorrelation_time, ess, rhat


def normals(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def autoregressive(steps: int, chains: int, elements: int, phi: float, seed: int) -> Tensor:
    """x_t = phi x_t-1 + sqrt(1 - phi^2) xi from its stationary law N(0, 1)."""
    x = normals(steps, chains, elements, seed=seed)
    for t in range(1, steps):
        x[t] = phi * x[t - 1] + math.sqrt(1 - phi**2) * x[t]
    return x


# The estimate of an autocorrelation time tau from N draws has a relative variance of about (4 M + 2) / N, M lags summed
# (Sokal 1997, section 3). Geyer's sum ends where rho_t is lost in noise of size sqrt(tau / N), here below M = 20 tau.
# 5.7 standard deviations; where the sum ends moves it by some per cent besides (measured with ten seeds: at most 0.045
# for phi = -0.4, where the bound is 0.11).
@pytest.mark.parametrize("phi", [0.5, 0.8, 0.0, -0.4])
def test_autocorrelation_time_of_an_autoregression(phi: float, seed: int) -> None:
    steps, chains = 2000, 300
    x = autoregressive(steps, chains, 2, phi, seed)
    tau = (1 + phi) / (1 - phi)
    bound = 0.01 + 5.7 * math.sqrt((4 * 20 * max(tau, 1 / tau) + 2) / (steps * chains))
    assert bound < 0.25
    torch.testing.assert_close(autocorrelation_time(x), torch.full((2,), tau, dtype=torch.float64), rtol=bound, atol=0)
    worth = torch.full((2,), steps * chains / tau, dtype=torch.float64)
    torch.testing.assert_close(ess(x, method="mean"), worth, rtol=bound, atol=0)


def test_ess_of_independent_draws_is_their_number(seed: int) -> None:
    x = normals(1000, 100, 3, seed=seed)
    # tau = 1 within 5.7 sqrt((4 M + 2) / N), M below 20
    for method in ("bulk", "tail", "mean"):
        torch.testing.assert_close(ess(x, method=method), torch.full((3,), 1e5, dtype=torch.float64), rtol=0.17, atol=0)


def test_ess_is_that_of_the_distinct_draws(seed: int) -> None:
    """Each draw repeated four times is worth what it was worth."""
    x = normals(1000, 100, 2, seed=seed)
    again = x.repeat_interleave(4, 0)
    for method in ("bulk", "tail", "mean"):
        torch.testing.assert_close(ess(again, method=method), ess(x, method=method), rtol=0.2, atol=0)


def test_autocorrelation_is_the_sum_of_its_definition(seed: int) -> None:
    x = normals(37, 3, 2, seed=seed)
    d = x - x.mean(0)
    slow = torch.stack([(d[t:] * d[: 37 - t]).sum(0) for t in range(37)])
    # float64 sums of 37 numbers of size 1, by another route
    torch.testing.assert_close(autocorrelation(x), slow / slow[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [13, 81, 256, 259])
def test_a_chain_that_never_moved_has_no_autocorrelation(steps: int, seed: int) -> None:
    """Whatever its value is: the mean of equal draws rounds, and what is left of them was perfectly correlated."""
    x = normals(steps, 50, seed=seed)
    x[:, 1:] = x[:1, 1:].clone()
    found = autocorrelation(x)
    assert bool(found[:, 1:].isnan().all()) and bool(found[:, 0].isfinite().all())


@pytest.mark.parametrize("method", ["rank", "bulk", "folded", "split"])
def test_rhat_of_chains_that_agree_is_one(method: Any, seed: int) -> None:
    # n (R^2 - 1 + 1 / n) is the chains' mean square, a chi-square over its 399: below 1 + 5.7 sqrt(2 / 399)
    values = rhat(normals(500, 200, 4, seed=seed), method=method)
    assert bool((values >= math.sqrt(1 - 1 / 250)).all()) and bool((values < math.sqrt(1 + 0.6 / 250)).all())


@pytest.mark.parametrize("shift", [0.1, 1.0, 5.0])
def test_rhat_of_shifted_chains(shift: float, seed: int) -> None:
    """Half of the chains at +shift and half at -shift: R^2 = 1 + their means' variance, for many steps."""
    n, chains = 20_000, 8
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(chains // 2)
    x = normals(n, chains, 3, seed=seed) + shift * sign[None, :, None]
    wanted = math.sqrt(1 + shift**2 * 2 * chains / (2 * chains - 1))
    # the variance of 16 half chains' means: 2 shift sqrt(1 / n') / sqrt(16) each, n' = 10^4, and 1 / n' of their own
    error = 5.7 * (2 * shift * 0.01 / 4 + 1e-4 + shift**2 * math.sqrt(2 / (n * chains))) / (2 * wanted) + 3e-4
    torch.testing.assert_close(
        rhat(x, method="split"), torch.full((3,), wanted, dtype=torch.float64), rtol=0, atol=error
    )
    if shift >= 1:
        assert bool((rhat(x) > 1.2).all()) and bool((rhat(x, method="bulk") > 1.2).all())


def test_folding_sees_a_spread_that_location_does_not(seed: int) -> None:
    x = normals(1000, 4, 3, seed=seed) * torch.tensor([1.0, 1.0, 1.0, 5.0], dtype=torch.float64)[None, :, None]
    assert bool((rhat(x, method="bulk") < 1.02).all())
    assert bool((rhat(x, method="folded") > 1.1).all())
    torch.testing.assert_close(rhat(x), rhat(x, method="folded"), rtol=0, atol=0)


def test_splitting_sees_a_trend_that_all_chains_share(seed: int) -> None:
    x = normals(400, 4, 1, seed=seed) + torch.linspace(-3, 3, 400, dtype=torch.float64)[:, None, None]
    # a half's mean is 1.5 away from the middle, its variance 1.75: about 1.5
    assert float(rhat(x)) > 1.3


def test_ranks_need_no_moments(seed: int) -> None:
    """A monotone function of the draws changes neither bulk number, not even one without a mean."""
    x = normals(300, 4, 3, seed=seed)
    wild = (5 * x).sinh() ** 3
    for measure in (rhat, ess):
        torch.testing.assert_close(measure(wild, method="bulk"), measure(x, method="bulk"), rtol=1e-12, atol=0)


def test_elements_and_structures_are_judged_one_by_one(seed: int) -> None:
    x = autoregressive(60, 3, 6, 0.5, seed)
    for measure in (rhat, ess, autocorrelation_time):
        each = torch.stack([measure(x[:, :, i]) for i in range(6)])
        torch.testing.assert_close(measure(x.reshape(60, 3, 2, 3)), each.reshape(2, 3), rtol=1e-12, atol=0)
        got = measure({"a": x, "b": [x[..., 0], (x,)]})
        assert torch.equal(got["a"], measure(x)) and torch.equal(got["b"][1][0], measure(x))
        assert got["b"][0].shape == ()
    assert autocorrelation(x.reshape(60, 3, 2, 3)).shape == (60, 3, 2, 3)


def test_what_cannot_be_judged_is_nan_and_harms_no_other(seed: int) -> None:
    x = normals(50, 4, 5, seed=seed)
    good = x.clone()
    x[:, :, 0] = 0.1
    x[7, 2, 1] = math.nan
    x[9, 1, 2] = math.inf
    for measure, methods in ((rhat, ("rank", "bulk", "folded", "split")), (ess, ("bulk", "tail", "mean"))):
        for method in methods:
            got: Tensor = measure(x, method=method)  # type: ignore[operator]
            assert got.isnan().tolist() == [True, True, True, False, False]
            assert torch.equal(got[3:], measure(good, method=method)[3:])  # type: ignore[operator]


def test_chains_stuck_at_different_points_are_the_worst_case() -> None:
    stuck = torch.arange(4.0)[None, :, None].expand(100, 4, 1)
    assert float(rhat(stuck)) > 1e3
    # four values are worth about four draws
    assert 1 < float(ess(stuck)) < 10


def test_float32_and_integers_are_taken() -> None:
    x = torch.arange(40).reshape(10, 4) % 7
    assert torch.equal(rhat(x), rhat(x.double())) and torch.equal(ess(x.float()), ess(x.double()))


@pytest.mark.parametrize(
    ("draws", "error", "message"),
    [
        (torch.zeros(10), ValueError, r"draws must have shape \(steps, chains, ...\).*got \(10,\)"),
        (torch.zeros(3, 2), ValueError, "at least 4 steps"),
        (torch.zeros(5, 0), ValueError, "a chain"),
        ({"a": torch.zeros(2, 2)}, ValueError, r"draws\['a'\]"),
        ([[1.0]], TypeError, r"draws\[0\]\[0\] must be a real tensor"),
        (torch.zeros(5, 2, dtype=torch.complex64), TypeError, "must be a real tensor"),
    ],
)
def test_errors(draws: Any, error: type[Exception], message: str) -> None:
    for measure in (rhat, ess, autocorrelation, autocorrelation_time):
        with pytest.raises(error, match=message):
            measure(draws)


def test_unknown_methods() -> None:
    for measure in (rhat, ess):
        with pytest.raises(ValueError, match=r"method must be one of .*, got 'mode'"):
            measure(torch.zeros(5, 2), method="mode")  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(200, 4), (201, 3), (57, 2), (1000, 1)])
@pytest.mark.parametrize("phi", [0.9, 0.0, -0.6])
def test_equal_to_arviz(shape: tuple[int, int], phi: float, seed: int) -> None:
    stats = pytest.importorskip("arviz_stats.base", reason="needs arviz-stats").array_stats
    x = autoregressive(*shape, 4, phi, seed)
    x[:, 0] += 0.3
    columns = [x[:, :, i].T.numpy() for i in range(4)]
    pairs = {"bulk": {}, "mean": {}, "tail": {"prob": (0.05, 0.95)}}
    for method, more in pairs.items():
        theirs = np.array([stats.ess(column, method=method, **more) for column in columns])
        # the same sums in another order; a pair of lags whose sum rounds to 0 could end the sequence elsewhere, which
        # takes a coincidence of 1e-13
        np.testing.assert_allclose(ess(x, method=method).numpy(), theirs, rtol=1e-9)
    if shape[1] == 1:
        return  # theirs has no R-hat of one chain
    for ours, theirs in (("rank", "rank"), ("bulk", "z_scale"), ("folded", "folded"), ("split", "split")):
        other = np.array([stats.rhat(column, method=theirs) for column in columns])
        np.testing.assert_allclose(rhat(x, method=ours).numpy(), other, rtol=1e-9)
