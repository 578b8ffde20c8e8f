"""What several implementations of an op are tested with: options of a step and of a chain, chains, activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmebm.ops.common.params import StepParams
from mmebm.ops.langevin_mlp import op
from mmebm.ops.terms import Term

# Two fp32 trajectories may take different sides of a kink that is nearer than this: they differ by 1e-5 at most here.
KINK = 1e-4
PLAIN = StepParams(0.02, 0.1)

STEP_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "value clip": {"grad_clip": 0.5},
    "norm clip": {"grad_norm_clip": 4.0},
    "both clips": {"grad_clip": 0.7, "grad_norm_clip": 2.0},
    "zero norm clip": {"grad_norm_clip": 0.0},
    "prior": {"prior_std": 0.8},
    "tiny prior": {"prior_std": 1e-15},
    "max_update": {"max_update": 0.08},
    "low": {"low": -0.3},
    "high": {"high": 0.3},
    "bounds": {"low": -0.4, "high": 0.2},
    "crossed bounds": {"low": 0.4, "high": -0.2},
    "everything": {
        "grad_clip": 0.9,
        "grad_norm_clip": 4.0,
        "prior_std": 1.3,
        "max_update": 0.2,
        "low": -1.0,
        "high": 0.9,
    },
}
CHAIN_OPTIONS: dict[str, dict[str, Any]] = {
    "value clip": {"grad_clip": 0.3},
    "norm clip": {"grad_norm_clip": 0.9},
    "both clips": {"grad_clip": 0.4, "grad_norm_clip": 0.8},
    "no norm left": {"grad_norm_clip": 0.0},
    "norm clip without effect": {"grad_norm_clip": 1e6},
    "prior": {"prior_std": 0.7},
    "max_update": {"max_update": 0.08},
    "low": {"low": -0.3},
    "high": {"high": 0.2},
    "crossed bounds": {"low": 0.4, "high": -0.2},
    "everything": {
        "grad_clip": 0.5,
        "grad_norm_clip": 0.9,
        "prior_std": 1.1,
        "max_update": 0.2,
        "low": -1.0,
        "high": 0.9,
    },
}


def rows_of(
    options: Mapping[str, float], chains: int, steps: int, generator: torch.Generator
) -> list[list[StepParams]]:
    """Constants of three tensors per chain, per tensor and per step, and every tensor without one of the options."""

    def around(value: float) -> Tensor:
        return value * (0.7 + 0.6 * torch.rand(chains, 1, generator=generator))

    rows = []
    for k in range(steps):
        row = []
        for i in range(3):
            given = {name: around(v) for j, (name, v) in enumerate(options.items()) if (i + j) % 3 > 0}
            row.append(StepParams(around(0.05) / (1 + k), 0.1 / (1 + i), **given))
        rows.append(row)
    return rows


def make_chain(
    terms: Sequence[Term],
    widths: Sequence[int],
    chains: int,
    seed: int,
    *,
    params: Sequence[Sequence[StepParams]] | StepParams = PLAIN,
    **changes: Any,
) -> op.MlpChain:
    n = len(widths)
    rows = [[params] * n] if isinstance(params, StepParams) else params
    table = op.constants_of(rows, chains, torch.float32, torch.device("cpu"))
    assert not isinstance(table, str), table
    chain = op.MlpChain(tuple(terms), tuple(widths), tuple(range(n)), (True,) * n, (True,) * n, *table, seed=seed)
    return replace(chain, **changes)


def away_from_kinks(chain: op.MlpChain, x: Tensor, steps: int, double: Callable, margin: Callable) -> Tensor:
    """The chains that no kink is near to, along the whole trajectory; noise_at="after" only."""
    exact, state = double(chain), x.double()
    nearest = margin(state, exact.terms)
    for k in range(steps - 1):
        state = op.run_reference(exact.rows(k, k + 1), state, 1, k).x
        nearest = torch.minimum(nearest, margin(state, exact.terms))
    return nearest > KINK


# -- activations

# The mark that kernels have for the derivative of relu where it is off (csrc/common/activation.h)
STOP = 2.0**-126


def exact_activation(name: str, x: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """float64, without the cancellations of the reference; at infinities and NaN torch's."""
    up = x > 0
    if name == "relu":
        return x.clamp_min(0), up.double()
    if name == "leaky_relu":
        return torch.where(up, x, slope * x), torch.where(up, 1.0, slope)
    if name == "silu":
        s, inside = torch.sigmoid(x), x.clamp(-1e4, 1e4)
        value = torch.where(x < -1e4, 0.0 * x, x * s)
        return value, s + inside * s * torch.sigmoid(-x) + 0 * x
    if name == "gelu":
        inside = x.clamp(-1e2, 1e2)
        phi = 0.5 * torch.special.erfc(-inside / math.sqrt(2))
        value = torch.where(x < -1e2, 0.0 * x, x * phi)
        return value, phi + inside * torch.exp(-0.5 * inside**2) / math.sqrt(2 * math.pi) + 0 * x
    if name == "softplus":
        return x.clamp_min(0) + torch.log1p(torch.exp(-x.abs())), torch.sigmoid(x)
    if name == "tanh":
        return torch.tanh(x), 1 / torch.cosh(x) ** 2
    e = torch.expm1(x.clamp_max(0))
    return torch.where(up, x, slope * e), torch.where(up, 1.0, slope * (e + 1))


def points(seed: int, near: int) -> Tensor:
    """Bit patterns of fp32 from everywhere, ``near`` numbers close to 0, and where limits are."""
    start = -(2**31) + seed % 8191
    bits = torch.arange(start, 2**31, 8191).to(torch.int32).view(torch.float32)
    normals = torch.randn(near, generator=torch.Generator().manual_seed(seed)) * 6
    ends = torch.tensor([0.0, -0.0, math.inf, -math.inf, 3.4e38, -3.4e38, 87.0, -87.0, 88.8, -88.8, -104.0, 1e-45])
    return torch.cat([bits[~bits.isnan()], normals, ends])


def check_activation(
    name: str, x: Tensor, slope: float, value: Tensor, derivative: Tensor, value_ulps: float, derivative_ulps: float
) -> None:
    """Both within so many units of 2^-23 (1 + |exact|), and exact where they are infinite or NaN."""
    ulps = (value_ulps, derivative_ulps)
    derivative = derivative.masked_fill(derivative == STOP, 0.0)
    for got, exact, most in zip((value, derivative), exact_activation(name, x.double(), slope), ulps, strict=True):
        finite = exact.isfinite()
        assert torch.equal(got[~finite].double().nan_to_num(1.5), exact[~finite].nan_to_num(1.5))
        error = ((got.double() - exact).abs() / (1 + exact.abs()) * 2**23)[finite]
        assert error.max() <= most, f"{error.max()} at {x[finite][error.argmax()].item()!r}"
