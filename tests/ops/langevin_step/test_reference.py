"""The update rule in plain PyTorch, against NumPy in float64 and against values worked out by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmebm import noise
from mmebm.ops.common.params import StepParams
from mmebm.ops.langevin_step import reference
from mmebm.ops.langevin_step.reference import langevin_step, perturb, stochastic_round

# 5.7 standard deviations: exceeded with probability 1.2e-8
SIGMAS = 5.7


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are small here: on a busy machine, waiting for a second thread takes 70 times the work (measured)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def step(x: Tensor, g: Tensor, xi: Tensor | None = None, **options: Any) -> Tensor:
    """One tensor's step; settings and options of the rule in one list."""
    given = {key: options.pop(key) for key in ("norm_over", "outside") if key in options}
    observed = options.pop("observed", None)
    params = StepParams(**{"step_size": 1.0, "noise_scale": 1.0, **options})
    return langevin_step([x], [g], [xi], [params], observed=[observed], **given)[0][0]


def numpy_step(x: Any, g: Any, xi: Any, p: dict[str, Any], norm_over: str) -> Any:
    """The rule of the module's docstring for one tensor, chain by chain, clamp or nothing at the bounds."""
    out = np.empty_like(x)
    whole = np.clip(g, -p["grad_clip"], p["grad_clip"]) if "grad_clip" in p else g
    for c in range(len(x)):
        d = whole[c].copy()
        if "grad_norm_clip" in p:
            norm = np.sqrt(np.sum((whole if norm_over == "tensor" else whole[c]) ** 2))
            d *= min(1.0, p["grad_norm_clip"] / norm)
        if "prior_std" in p:
            d += x[c] / p["prior_std"] ** 2
        d = -p["step_size"] * d + p["noise_scale"] * xi[c]
        if "max_update" in p:
            d = np.clip(d, -p["max_update"], p["max_update"])
        out[c] = np.clip(x[c] + d, p.get("low", -np.inf), p.get("high", np.inf))
    return out


EVERY = {"grad_clip": 0.8, "grad_norm_clip": 1.5, "prior_std": 0.7, "max_update": 0.5, "low": -0.6, "high": 0.9}


@pytest.mark.parametrize("left_out", [None, *EVERY])
@pytest.mark.parametrize("norm_over", ["chain", "tensor"])
def test_rule_equals_numpy(left_out: str | None, norm_over: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, g, xi = rng.normal(size=(3, 6, 2, 5))
    p = {"step_size": 0.3, "noise_scale": 0.4, **{key: value for key, value in EVERY.items() if key != left_out}}
    got = step(*(torch.from_numpy(a.copy()) for a in (x, g, xi)), norm_over=norm_over, **p)
    # float64 rounding of numbers near 1, worst seen 4e-16
    np.testing.assert_allclose(got.numpy(), numpy_step(x, g, xi, p, norm_over), rtol=0, atol=1e-13)


def test_numbers_and_tensors_of_one_value_agree(seed: int) -> None:
    torch.manual_seed(seed)
    x, g, xi = torch.randn(3, 4, 5)
    p = {"step_size": 0.3, "noise_scale": 0.4, **EVERY}
    for shape in ((), (4, 1), (1, 5), (4, 5)):
        tensors = {key: torch.full(shape, value) for key, value in p.items() if key != "grad_norm_clip"}
        tensors["grad_norm_clip"] = torch.full((4, 1), p["grad_norm_clip"])
        torch.testing.assert_close(step(x, g, xi, **tensors), step(x, g, xi, **p), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [-2.0, 3.0]),
        ({"step_size": 0.5}, [-0.5, 1.0]),
        ({"grad_clip": 2.0}, [-1.0, 1.0]),
        ({"grad_clip": 0.0}, [1.0, -1.0]),
        ({"grad_norm_clip": 2.5}, [-0.5, 1.0]),
        ({"grad_norm_clip": 5.0}, [-2.0, 3.0]),
        ({"prior_std": 0.5}, [-6.0, 7.0]),
        ({"max_update": 1.5}, [-0.5, 0.5]),
        ({"low": -1.0}, [-1.0, 3.0]),
        ({"high": 1.0}, [-2.0, 1.0]),
        ({"low": -1.0, "high": torch.tensor([0.0, 2.0])}, [-1.0, 2.0]),
        ({"low": -2.0, "high": 2.9, "outside": "reject"}, [1.0, -1.0]),
        ({"low": -2.0, "high": 3.0, "outside": "reject"}, [-2.0, 3.0]),
        ({"observed": torch.tensor([[True, False]])}, [1.0, 3.0]),
        # an observed element would have left the box, but does not move
        ({"high": 2.9, "outside": "reject", "observed": torch.tensor([[False, True]])}, [-2.0, -1.0]),
    ],
)
def test_by_hand(options: dict[str, Any], expected: list[float]) -> None:
    """x = (1, -1) with gradient (3, -4), of norm 5."""
    got = step(torch.tensor([[1.0, -1.0]]), torch.tensor([[3.0, -4.0]]), **options)
    torch.testing.assert_close(got, torch.tensor([expected]))


def test_a_broken_gradient_is_seen_and_stays_in_its_chain() -> None:
    x, g = torch.zeros(3, 2), torch.tensor([[1.0, 1.0], [torch.nan, 1.0], [torch.inf, 1.0]])
    for options in ({"grad_clip": 1.0}, {"grad_norm_clip": 1.0}, {"max_update": 1.0}, {"low": -1.0, "high": 1.0}):
        got = step(x, g, **options)
        assert got[1].isnan().any() and got[0].isfinite().all()
    kept = step(x, g, low=-2.0, high=2.0, outside="reject")
    assert torch.equal(kept, torch.tensor([[-1.0, -1.0], [0.0, 0.0], [0.0, 0.0]]))


def test_norm_clip_of_a_gradient_of_zero() -> None:
    g = torch.zeros(2, 3, requires_grad=True)
    out = step(torch.ones(2, 3), g, grad_norm_clip=1.0)
    assert torch.equal(out, torch.ones(2, 3))
    out.sum().backward()
    assert torch.equal(g.grad, torch.full((2, 3), -1.0))  # pyright: ignore


@pytest.mark.parametrize("limit", [0.0, torch.zeros(2, 1)])
def test_a_limit_of_zero_leaves_nothing_of_any_gradient(limit: Any) -> None:
    """Of one that is zero neither, and no NaN (seed 21000080); a broken one is seen."""
    x, g = torch.ones(2, 2), torch.tensor([[0.0, 0.0], [3.0, -4.0]])
    assert torch.equal(step(x, g, grad_norm_clip=limit), x)
    g[0, 0] = torch.nan
    assert step(x, g, grad_norm_clip=limit).isnan().any(1).tolist() == [True, False]


def test_rejection_takes_all_tensors_of_a_chain(seed: int) -> None:
    torch.manual_seed(seed)
    x = [torch.rand(4, 2), torch.rand(4, 3, 3)]
    g = [torch.zeros(4, 2), torch.zeros(4, 3, 3)]
    g[0][1, 0], g[1][2, 0, 1] = 5.0, 5.0
    params = [StepParams(1.0, 0.0, low=0.0, high=1.0), StepParams(1.0, 0.0, low=0.0)]
    shift = [torch.full_like(t, 0.0) for t in x]
    shift[0][3] = x[0][3] * 0.5
    got, _ = langevin_step(x, [a + b for a, b in zip(g, shift, strict=True)], [None, None], params, outside="reject")
    for a, b in zip(got, x, strict=True):
        assert torch.equal(a[:3], b[:3])
    torch.testing.assert_close(got[0][3], x[0][3] * 0.5)


def test_perturb_adds_noise_clamps_on_request_and_keeps_what_is_observed() -> None:
    x, xi = torch.tensor([[0.0, 0.9, 2.0]]), torch.tensor([[-3.0, 1.0, 1.0]])
    mask = torch.tensor([[False, False, True]])
    params = [StepParams(1.0, 0.5, low=-1.0, high=1.0)]
    assert torch.equal(perturb([x], [xi], params, observed=[mask])[0], torch.tensor([[-1.5, 1.4, 2.0]]))
    clamped = perturb([x], [xi], params, clamp_noise=True, observed=[mask])[0]
    assert torch.equal(clamped, torch.tensor([[-1.0, 1.0, 2.0]]))
    assert torch.equal(perturb([x], [None], params)[0], x)


def test_statistics_by_hand() -> None:
    x = [torch.zeros(2, 2), torch.zeros(2, 1)]
    g = [torch.tensor([[3.0, 0.0], [0.5, 0.0]]), torch.tensor([[4.0], [torch.nan]])]
    out, stats = langevin_step(x, g, [None, None], [StepParams(1.0, 0.0, grad_clip=1.0)] * 2, stats=True)
    assert stats is not None
    assert torch.equal(out[0], torch.tensor([[-1.0, 0.0], [-0.5, 0.0]]))
    assert stats.grad_norm[0] == 5.0 and stats.grad_norm[1].isnan()
    torch.testing.assert_close(stats.displacement[0], torch.tensor(2.0).sqrt())
    assert stats.clipped.tolist() == [2, 0] and stats.nonfinite.tolist() == [0, 1]
    params = [StepParams(1.0, 0.0, grad_norm_clip=1.0, max_update=0.1)] * 2
    counted = langevin_step(x, g, [None, None], params, stats=True)[1]
    assert counted is not None and counted.clipped.tolist()[0] == 3
    assert langevin_step(x, g, [None, None], [StepParams(1.0, 0.0)] * 2)[1] is None


def test_nothing_given_is_changed() -> None:
    x, g, xi = torch.randn(3, 4, 5)
    copies = [t.clone() for t in (x, g, xi)]
    step(x, g, xi, **EVERY)
    perturb([x], [xi], [StepParams(1.0, 1.0, low=0.0, high=0.1)], clamp_noise=True)
    assert all(torch.equal(a, b) for a, b in zip((x, g, xi), copies, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# 16-bit storage
# ---------------------------------------------------------------------------------------------------------------------

HALF = [torch.bfloat16, torch.float16]


def neighbours(value: float, dtype: torch.dtype) -> tuple[float, float]:
    """The numbers of ``dtype`` around ``value``, by stepping the bits of the one truncated toward zero."""
    toward_zero = torch.tensor(value).to(dtype)
    if abs(float(toward_zero)) > abs(value):
        toward_zero = (toward_zero.view(torch.int16) - 1).view(dtype)
    away = (toward_zero.view(torch.int16) + 1).view(dtype)
    return float(toward_zero), float(away)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("value", [1.001, -1.001, 0.3, -0.7, 3.14159, 1000.3, 1e-5, -3e-6, 6.1e-5, 2e-7])
def test_stochastic_rounding_is_unbiased(dtype: torch.dtype, value: float, seed: int) -> None:
    n = 1 << 16
    value = float(torch.tensor(value))  # as float32 has it
    threshold = noise.rounding_fraction((n, 1), seed=seed)
    got = stochastic_round(torch.full((n, 1), value), dtype, threshold).double()
    near, far = neighbours(value, dtype)
    assert set(got.unique().tolist()) <= {near, far}
    fraction = (value - near) / (far - near)
    # a Bernoulli mean; thresholds of 16 bits can be off by half their spacing
    deviation = (fraction * (1 - fraction) / n) ** 0.5 + 2.0**-17 / SIGMAS
    assert abs(float((got == far).double().mean()) - fraction) < SIGMAS * deviation


@pytest.mark.parametrize("dtype", HALF)
def test_stochastic_rounding_keeps_what_needs_none(dtype: torch.dtype, seed: int) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    every = every[~every.isnan()]  # all numbers of the format: normal, subnormal, zeros, infinities
    threshold = noise.rounding_fraction((every.numel(), 1), seed=seed).flatten()
    assert torch.equal(stochastic_round(every.float(), dtype, threshold), every)
    assert stochastic_round(torch.tensor([torch.nan]), dtype, torch.tensor([0.5])).isnan().all()


@pytest.mark.parametrize("dtype", HALF)
def test_thresholds_decide(dtype: torch.dtype) -> None:
    near, far = neighbours(1.001, dtype)
    fraction = (float(torch.tensor(1.001)) - near) / (far - near)
    y = torch.tensor([1.001, 1.001])
    got = stochastic_round(y, dtype, torch.tensor([fraction - 1e-3, fraction + 1e-3]))
    assert got.tolist() == [far, near]


@pytest.mark.parametrize("dtype", HALF)
def test_arithmetic_is_float32_and_rounding_to_nearest_without_thresholds(dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    x, g, xi = (t.to(dtype) for t in torch.randn(3, 50, 7))
    got = step(x, g, xi.float(), step_size=0.013, noise_scale=0.011, prior_std=0.7)
    wide = x.float() - 0.013 * (g.float() + x.float() / 0.49) + 0.011 * xi.float()
    # the same float32 operations but for the order of two; a tie may fall to the other side
    assert got.dtype == dtype
    one_up = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10
    torch.testing.assert_close(got.float(), wide.to(dtype).float(), rtol=one_up, atol=1e-6)
    assert (got == wide.to(dtype)).float().mean() > 0.98


@pytest.mark.parametrize("shape", [(0,), (0, 3), (0, 2, 3), (4,), (4, 0), (4, 2, 0), (1, 1)])
def test_shapes_without_elements(shape: tuple[int, ...]) -> None:
    x = torch.ones(shape)
    out, stats = langevin_step([x], [x], [x], [StepParams(1.0, 0.5, **EVERY)], outside="reject", stats=True)  # pyright: ignore
    assert out[0].shape == shape and stats is not None
    assert all(t.shape == shape[:1] for t in (stats.grad_norm, stats.displacement, stats.clipped, stats.nonfinite))
    assert reference.per_chain(x).shape[0] == shape[0] and reference.per_chain(x).dim() == 2


def test_a_score_counts_with_the_other_sign_and_the_prior_does_not() -> None:
    x, score = torch.tensor([[2.0, -1.0]]), torch.tensor([[0.5, 0.25]])
    (y,), _ = langevin_step([x], [score], [None], [StepParams(0.1, 0.0, prior_std=2.0)], score=True)
    # by hand: x + a (score - x / 4)
    torch.testing.assert_close(y, torch.tensor([[2.0, -0.95]]), rtol=0, atol=1e-7)
