"""The Triton ``residual`` in Triton's interpreter against the reference in float64.

Run with ``TRITON_INTERPRET=1 python -m pytest -m interpret``; it replaces the compiler for the whole process.
"""

from __future__ import annotations

import math
import os
import random

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from mmebm.kernels import residual as room
from mmebm.ops.residual import reference

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
    # NumPy's, of the interpreter: inf - inf is meant, as on the GPU
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

# A gradient stored in 16 bits may round to the neighbour: the interpreter cuts bf16 off instead of rounding.
HALF = {torch.float32: 0.0, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
SHAPES = [(1,), (7,), (3, 4, 5), (1023,), (1024,), (2050,)]
LOGITS = [(1,), (2,), (33,), (1500,), (5, 7), (27, 8), (3, 2, 9), (1100, 3), (1, 4)]


def case(
    rng: random.Random, generator: torch.Generator, chains: int, kind: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Predictions, targets and a mask or none."""
    dtypes = (torch.float32, torch.float32, torch.bfloat16, torch.float16)
    shape = rng.choice(LOGITS if kind == "categorical" else SHAPES)
    y = (3 * torch.randn((chains, *shape), generator=generator)).to(rng.choice(dtypes))
    if kind == "categorical":
        t = torch.randint(0, shape[0], (chains, *shape[1:]), generator=generator)
    else:
        t = torch.randn((chains, *shape), generator=generator).to(rng.choice((y.dtype, torch.float32)))
    mask = rng.choice([None, t.shape, t.shape[1:], (chains, *[1] * (t.dim() - 1))])
    return y, t, None if mask is None else torch.rand(mask, generator=generator) < 0.6


def factor(rng: random.Random, generator: torch.Generator, chains: int) -> float | Tensor:
    if rng.random() < 0.5:
        return rng.uniform(0.2, 2.0)
    return 0.2 + torch.rand(rng.choice([1, chains]), generator=generator)


def check(ys, ts, kinds, scale, weight, masks) -> None:
    given = {"likelihood": kinds, "weight": weight, "observed": masks, "scale": scale}
    value, grads = room.residual(ys, ts, kinds, scale, weight, masks, True)
    exact, slopes = reference.residual([y.double() for y in ys], ts, **given)
    sizes, _ = reference.residual([y.double() for y in ys], ts, **{**given, "weight": [abs(w) for w in weight]})
    torch_value, torch_grads = reference.residual(ys, ts, **given)
    error, torchs = (value - exact).abs(), (torch_value - exact).abs()
    # a sum of fp32 terms, in another order
    assert (error <= 2 * torchs + 3e-6 * sizes + 1e-6).all(), (kinds, error, torchs, sizes)
    for y, g, torch_grad, slope in zip(ys, grads, torch_grads, slopes, strict=True):
        assert g.dtype == y.dtype and g.shape == y.shape
        largest = slope.abs().max().item() if slope.numel() else 0.0
        torchs = (torch_grad.double() - slope).abs()
        assert ((g.double() - slope).abs() <= 2 * torchs + HALF[y.dtype] * slope.abs() + 1e-6 * largest + 1e-7).all()
    alone, nothing = room.residual(ys, ts, kinds, scale, weight, masks, False)
    assert nothing == [] and torch.equal(alone, value)


@pytest.mark.parametrize("part", range(8))
def test_random_modalities(seed: int, part: int) -> None:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    chains, count = rng.choice([1, 2, 3]), rng.choice([1, 2, 5, 9])
    kinds = [rng.choice(["gaussian", "laplace", "categorical"]) for _ in range(count)]
    ys, ts, masks = map(list, zip(*[case(rng, generator, chains, kind) for kind in kinds], strict=True))
    scale, weight = ([factor(rng, generator, chains) for _ in kinds] for _ in range(2))
    check(ys, ts, kinds, scale, weight, masks)


@pytest.mark.parametrize("kind", ("gaussian", "laplace", "categorical"))
def test_what_is_not_observed_does_not_matter(kind: str) -> None:
    y = torch.tensor([[math.nan, 1.0, math.inf, -2.0]]) if kind != "categorical" else torch.zeros(1, 3, 4)
    t = torch.zeros(1, 4)
    if kind == "categorical":
        y[0, 1, 0], y[0, 2, 2] = math.nan, math.inf
        t = torch.tensor([[-1, 2, 99, 0]])
    mask = torch.tensor([False, True, False, True])
    value, (grad,) = room.residual([y], [t], [kind], [0.5], [2.0], [mask], True)
    rest, (slope,) = room.residual([y[..., 1::2].clone()], [t[..., 1::2].clone()], [kind], [0.5], [2.0], [None], True)
    assert torch.equal(value, rest) and torch.isfinite(value).all()
    assert torch.equal(grad[..., 1::2], slope) and not grad[..., 0::2].any()


def test_a_broken_chain_breaks_no_other() -> None:
    y = torch.zeros(3, 4, 2)
    y[1, 0, 0] = math.nan
    classes = torch.zeros(3, 2, dtype=torch.int64)
    classes[2, 1] = 4
    value, (first, second) = room.residual(
        [y, y], [torch.zeros_like(y), classes], ["laplace", "categorical"], [1.0] * 2, [1.0] * 2, [None] * 2, True
    )
    assert value.isnan().tolist() == [False, True, True]
    assert first[1].isnan().sum() == 1 and not first[[0, 2]].isnan().any()
    # the position of a NaN logit, and that of a class that does not exist
    assert second.isnan().all(1).tolist() == [[False, False], [True, False], [False, True]]


def test_layouts_and_empty(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(6, 4, generator=generator).t()
    check([y], [torch.ones(1, 1).expand(4, 6)], ["gaussian"], [0.5], [1.0], [torch.ones(4, 1, dtype=torch.bool)])
    for shape in ((0, 5), (3, 0)):
        value, (grad,) = room.residual(
            [torch.zeros(shape)], [torch.zeros(shape)], ["laplace"], [1.0], [1.0], [None], True
        )
        assert value.tolist() == [0.0] * shape[0] and grad.shape == shape


def test_supports_gives_reasons() -> None:
    t = [torch.zeros(2, 3)]
    assert room.supports(t, t, ["gaussian"]) is None
    assert "float64" in room.supports([t[0].double()], t, ["gaussian"])
    assert "meta" in room.supports([t[0].to("meta")], t, ["gaussian"])
