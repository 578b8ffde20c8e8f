"""The Triton ``langevin_step`` in Triton's interpreter: noise against its definition, steps against the reference.

Run with ``TRITON_INTERPRET=1 python -m pytest -m interpret``; it replaces the compiler for the whole process.
"""

from __future__ import annotations

import dataclasses
import os
import random

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from mmebm import noise  # noqa: E402
from mmebm.kernels import philox  # noqa: E402
from mmebm.kernels.langevin_step import TritonStepper, supports  # noqa: E402
from mmebm.ops.common.params import StepParams, StepStats  # noqa: E402
from mmebm.ops.langevin_step import StepOptions, TorchStepper, reference  # noqa: E402

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
    # NumPy's, of the interpreter: 0 / 0 and inf - inf are meant, as on the GPU
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

# fp32 against fp32 in another order of operations: values are below 10, a few units in the last place
CLOSE = {"rtol": 2e-6, "atol": 4e-6}
HALF = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


# -- noise


@triton.jit
def words_kernel(out, blocks, chain, step, stream, seed, B: tl.constexpr):
    k0, k1 = philox.key_words(tl.load(seed))
    i = tl.arange(0, B)
    zero = tl.zeros([B], tl.uint32)
    c0, c1 = tl.load(blocks + i).to(tl.uint32), tl.load(chain).to(tl.uint32) + zero
    w0, w1, w2, w3 = philox.philox(c0, c1, tl.load(step).to(tl.uint32), tl.load(stream).to(tl.uint32), k0, k1)
    tl.store(out + 4 * i, w0.to(tl.int64))
    tl.store(out + 4 * i + 1, w1.to(tl.int64))
    tl.store(out + 4 * i + 2, w2.to(tl.int64))
    tl.store(out + 4 * i + 3, w3.to(tl.int64))


@triton.jit
def normals_kernel(out, w, B: tl.constexpr):
    i = tl.arange(0, B)
    w0, w1 = tl.load(w + 4 * i).to(tl.uint32), tl.load(w + 4 * i + 1).to(tl.uint32)
    w2, w3 = tl.load(w + 4 * i + 2).to(tl.uint32), tl.load(w + 4 * i + 3).to(tl.uint32)
    n0, n1, n2, n3 = philox.box_muller(w0, w1, w2, w3)
    tl.store(out + 4 * i[:, None] + tl.arange(0, 4)[None, :], philox.join4(n0, n1, n2, n3))


@triton.jit
def rounding_kernel(out, y, half, DTYPE: tl.constexpr, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(out + i, philox.stochastic_round(tl.load(y + i), tl.load(half + i).to(tl.uint32), DTYPE))


@triton.jit
def join_kernel(out, B: tl.constexpr):
    i = tl.arange(0, B) * 8
    v = philox.join8(i, i + 1, i + 2, i + 3, i + 4, i + 5, i + 6, i + 7)
    tl.store(out + tl.arange(0, B)[:, None] * 8 + tl.arange(0, 8)[None, :], v)
    v0, v1, v2, v3, v4, v5, v6, v7 = philox.split8(v)
    tl.store(out + 8 * B + i, v0)
    tl.store(out + 8 * B + i + 1, v1)
    tl.store(out + 8 * B + i + 2, v2)
    tl.store(out + 8 * B + i + 3, v3)
    tl.store(out + 8 * B + i + 4, v4)
    tl.store(out + 8 * B + i + 5, v5)
    tl.store(out + 8 * B + i + 6, v6)
    tl.store(out + 8 * B + i + 7, v7)


def scalar(value: int) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int64)


@pytest.mark.parametrize("key", [0, 1, 2**63 - 1, 2**64 - 1, 0x9E3779B97F4A7C15])
def test_words_are_bit_equal(key: int, seed: int) -> None:
    draw = random.Random(seed)
    step, stream, chain = draw.randrange(2**32), draw.randrange(2**32), draw.randrange(2**32 - 1)
    out = torch.empty(64, 4, dtype=torch.int64)
    words_kernel[(1,)](
        out, torch.arange(64), scalar(chain), scalar(step), scalar(stream), scalar((key + 2**63) % 2**64 - 2**63), B=64
    )
    expected = noise.words(1, 64, seed=key, step=step, stream=stream, chain_offset=chain)[0]
    assert torch.equal(out, expected)


def test_known_answer() -> None:
    """Random123: counter 0, key 0."""
    out = torch.empty(16, 4, dtype=torch.int64)
    words_kernel[(1,)](out, torch.zeros(16, dtype=torch.int64), scalar(0), scalar(0), scalar(0), scalar(0), B=16)
    assert [hex(v) for v in out[0].tolist()] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]


def test_normals_are_within_2e6_of_float64(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randint(0, 2**32, (1 << 15, 4), generator=generator)
    # both ends of the radius, and every octant's edge of the angle
    edges = [0, 1, 127, 128, 2**31 - 1, 2**31, 2**32 - 1, 2**32 - 128, 2**32 - 129, 2**32 - 256, 2**32 - 2**13]
    w[: len(edges), 0] = torch.tensor(edges)
    w[: len(edges), 2] = torch.tensor(edges)
    turns = torch.arange(64) * 2**26
    w[:64, 1] = turns
    w[64:128, 1] = (turns - 1) % 2**32
    w[128:192, 3] = turns + 1
    out = torch.empty(w.shape)
    normals_kernel[(1,)](out, w, B=1 << 15)
    expected = noise.box_muller(w)
    assert torch.isfinite(out).all()
    assert (out.double() - expected).abs().max().item() < 2e-6


def test_join_and_split_keep_the_order() -> None:
    out = torch.empty(2, 16, 8, dtype=torch.int32)
    join_kernel[(1,)](out, B=16)
    assert torch.equal(out[0].flatten(), torch.arange(128, dtype=torch.int32))
    assert torch.equal(out[1].flatten(), torch.arange(128, dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_exact(dtype: torch.dtype, seed: int) -> None:
    """Every class of number, against exact arithmetic: the two neighbours, and the fraction of the way between them."""
    generator = torch.Generator().manual_seed(seed)
    count = 4096
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32)
    y = bits.view(torch.float32).clone()
    y[: count // 2] = torch.randn(count // 2, generator=generator) * 10.0 ** torch.randint(-9, 6, (count // 2,))
    special = [0.0, -0.0, 65504.0, 65519.9, 65520.0, -65535.0, 3.4e38, -3.4e38, 1e-45, -1e-45, 6e-8, -3e-8, 1.0, -1.0]
    y[: len(special)] = torch.tensor(special)
    y[len(special) : len(special) + 3] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    half = torch.randint(0, 2**16, (count,), generator=generator)
    out = torch.empty(count, dtype=dtype)
    rounding_kernel[(1,)](out, y, half, DTYPE={torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype], B=count)

    exact = y.double()
    finite = torch.isfinite(y)
    _, exponent = torch.frexp(exact)
    least, mantissa = {torch.float16: (-14, 10), torch.bfloat16: (-126, 7)}[dtype]
    unit = torch.ldexp(torch.ones(count, dtype=torch.float64), (exponent - 1).clamp_min(least) - mantissa)
    down = torch.floor(exact / unit)
    up = (exact / unit - down) > (half.double() + 0.5) * 2.0**-16
    expected = torch.where(finite, (down + up) * unit, exact).to(torch.float32).to(dtype)
    same = (out == expected) | (out.isnan() & expected.isnan())
    assert same.all(), (y[~same], out[~same], expected[~same])


# -- steps


def options(count: int, **change) -> StepOptions:
    given = {"seed": 0x1234_5678_9ABC, "streams": tuple(range(count)), "noisy": (True,) * count} | change
    return StepOptions(**given)


def state(shapes, generator: torch.Generator, dtype=torch.float32) -> list[torch.Tensor]:
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def compare(x: torch.Tensor, expected: torch.Tensor, context: object = "") -> None:
    """fp32: a few units in the last place. 16 bits: the same, or for a rare few the other neighbour."""
    assert x.dtype == expected.dtype and x.shape == expected.shape
    if x.dtype == torch.float32:
        torch.testing.assert_close(x, expected, **CLOSE, equal_nan=True, msg=lambda m: f"{m}\n{context}")
        return
    a, b = x.float(), expected.float()
    different = (a != b) & ~(a.isnan() & b.isnan())
    assert different.sum().item() <= max(2, 0.01 * a.numel()), context
    # half a unit of the fp32 result crossed the threshold
    assert ((a - b).abs() <= b.abs() * HALF[x.dtype] + 1e-6)[different].all(), context


def compare_stats(out: StepStats | None, expected: StepStats | None, dtype: torch.dtype, context: object = "") -> None:
    assert out is not None and expected is not None
    tolerance = CLOSE if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-3}
    torch.testing.assert_close(out.grad_norm, expected.grad_norm, rtol=2e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(out.displacement, expected.displacement, **tolerance, equal_nan=True)
    assert torch.equal(out.clipped, expected.clipped), context
    assert torch.equal(out.nonfinite, expected.nonfinite), context


def check(
    x,
    grad,
    params,
    opt: StepOptions,
    *,
    step: int | torch.Tensor = 3,
    with_noise: bool = True,
    stats: bool = True,
    tile: int = 1024,
    splits: int | None = None,
) -> list[torch.Tensor]:
    """One step by both; returns the Triton result."""
    assert supports(x, opt, params) is None
    wanted, wanted_stats = TorchStepper(opt).step(list(x), grad, params, step, with_noise=with_noise, stats=stats)
    given = [xi.clone() for xi in x]
    kept = [gi.clone() for gi in grad]
    out, out_stats = TritonStepper(opt, tile=tile, splits=splits).step(
        given, grad, params, step, with_noise=with_noise, stats=stats
    )
    for a, b in zip(grad, kept, strict=True):
        assert torch.equal(a, b) or (a.isnan() == b.isnan()).all(), "the gradient was written"
    for i, (a, b) in enumerate(zip(out, wanted, strict=True)):
        assert a.data_ptr() == given[i].data_ptr() or not given[i].numel()
        compare(a, b, (i, params[i], opt))
    if stats:
        compare_stats(out_stats, wanted_stats, x[0].dtype, (params, opt))
    else:
        assert out_stats is None
    return out


PLAIN = StepParams(step_size=0.1, noise_scale=0.3)
SHAPES = [(3, 64), (3, 3, 3), (3,), (3, 2, 130)]

ONE_OPTION = {
    "plain": {},
    "grad_clip": {"grad_clip": 0.7},
    "grad_norm_clip": {"grad_norm_clip": 2.0},
    "max_update": {"max_update": 0.2},
    "prior_std": {"prior_std": 0.5},
    "low": {"low": -0.5},
    "high": {"high": 0.5},
    "bounds": {"low": -1.0, "high": 0.8},
    "all": {"grad_clip": 0.9, "grad_norm_clip": 3.0, "max_update": 0.25, "prior_std": 1.5, "low": -1.2, "high": 1.1},
}


@pytest.mark.parametrize("stats", [False, True], ids=["map", "chain"])
@pytest.mark.parametrize("name", ONE_OPTION)
def test_each_option(name: str, stats: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    params = [dataclasses.replace(PLAIN, **ONE_OPTION[name])] * len(SHAPES)
    check(state(SHAPES, generator), state(SHAPES, generator), params, options(len(SHAPES)), stats=stats)


@pytest.mark.parametrize("stats", [False, True], ids=["map", "chain"])
@pytest.mark.parametrize("name", ["plain", "prior_std", "all"])
def test_a_score_is_the_gradient_with_the_other_sign(name: str, stats: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, grad = state(SHAPES, generator), state(SHAPES, generator)
    params = [dataclasses.replace(PLAIN, **ONE_OPTION[name])] * len(SHAPES)
    a = check(x, [-g for g in grad], params, options(len(SHAPES), score=True), stats=stats)
    b = check(x, grad, params, options(len(SHAPES)), stats=stats)
    for one, other in zip(a, b, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("outside", ["clamp", "reject"])
@pytest.mark.parametrize("norm_over", ["chain", "tensor"])
@pytest.mark.parametrize("splits", [None, 3])
def test_sums_over_chains(norm_over: str, outside: str, splits: int | None, seed: int) -> None:
    """Norms and rejection, in one launch and in several (chains cut in splits, some of them empty)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 300), (4, 9)]
    # wide enough bounds for some chains to stay inside
    params = [
        dataclasses.replace(PLAIN, grad_norm_clip=4.0, low=-3.2, high=3.4),
        dataclasses.replace(PLAIN, grad_clip=1.0, grad_norm_clip=2.0),
    ]
    opt = options(2, norm_over=norm_over, outside=outside)
    x = state(shapes, generator)
    x[0].clamp_(-2.5, 2.5)
    x[0][2, 5] = 50.0
    out = check(x, state(shapes, generator), params, opt, splits=splits, tile=512)
    if outside == "reject":
        assert torch.equal(out[0][2], x[0][2]) and torch.equal(out[1][2], x[1][2])
        assert not torch.equal(out[1], x[1])


def test_a_long_chain(seed: int) -> None:
    """The choice of splits by itself: one chain of 3,000 elements."""
    generator = torch.Generator().manual_seed(seed)
    params = [dataclasses.replace(PLAIN, grad_norm_clip=20.0, low=-9.0, high=9.0)]
    check(state([(1, 3000)], generator), state([(1, 3000)], generator), params, options(1, outside="reject"))


def random_case(draw: random.Random, generator: torch.Generator, dtype: torch.dtype):
    chains = draw.choice([1, 2, 3, 7])
    count = draw.choice([1, 1, 2, 3])
    tails = [(), (1,), (2,), (3,), (4,), (8,), (3, 5), (16,), (33,), (2, 32), (100,), (129,)]
    shapes = [(chains, *draw.choice(tails)) for _ in range(count)]

    def value(low: float, high: float, shape: tuple[int, ...]):
        kind = draw.choice(["float", "float", "float", "scalar", "one", "chain"])
        number = draw.uniform(low, high)
        if kind == "float":
            return number
        if kind == "scalar":
            return torch.tensor(number)
        if kind == "one":
            return torch.full((1,) * len(shape), number)
        spread = torch.rand((chains, *[1] * (len(shape) - 1)), generator=generator)
        return number * (0.5 + spread)

    def maybe(low: float, high: float, shape: tuple[int, ...]):
        return value(low, high, shape) if draw.random() < 0.4 else None

    params, observed = [], []
    for shape in shapes:
        params.append(
            StepParams(
                step_size=value(0.01, 0.5, shape),
                noise_scale=value(0.01, 0.5, shape),
                grad_clip=maybe(0.3, 2, shape),
                grad_norm_clip=maybe(0.5, 5, shape),
                max_update=maybe(0.05, 0.5, shape),
                prior_std=maybe(0.3, 3, shape),
                low=maybe(-3, -0.5, shape),
                high=maybe(0.5, 3, shape),
            )
        )
        like = draw.choice([None, None, "full", "shared", "chain"])
        mask = {"full": shape, "shared": shape[1:], "chain": (chains, *[1] * (len(shape) - 1))}.get(like)
        observed.append(None if mask is None else torch.rand(mask, generator=generator) < 0.4)
    opt = StepOptions(
        seed=draw.choice([draw.randrange(2**63), scalar(draw.randrange(2**40))]),
        streams=tuple(draw.sample(range(2**24), count)),
        noisy=tuple(draw.random() < 0.8 for _ in range(count)),
        chain_offset=draw.choice([0, 5, 2**31 + 3, 2**32 - 2]),
        norm_over=draw.choice(["chain", "tensor"]),
        outside=draw.choice(["clamp", "reject"]),
        clamp_noise=draw.random() < 0.5,
        observed=tuple(observed),
    )
    x, grad = state(shapes, generator, dtype), state(shapes, generator, dtype)
    if draw.random() < 0.2:
        x[0].view(-1)[0] = draw.choice([float("nan"), float("inf"), float("-inf")])
    if draw.random() < 0.2:
        grad[-1].view(-1)[-1] = draw.choice([float("nan"), float("inf"), float("-inf")])
    return x, grad, params, opt


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", range(8))
def test_random_combinations(case: int, dtype: torch.dtype, seed: int) -> None:
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    x, grad, params, opt = random_case(draw, generator, dtype)
    step = draw.choice([0, 41, 2**31 + 5, 2**32 - 1, scalar(77)])
    check(
        x,
        grad,
        params,
        opt,
        step=step,
        with_noise=draw.random() < 0.8,
        stats=draw.random() < 0.6,
        tile=draw.choice([256, 1024]),
        splits=draw.choice([None, None, 1, 2]),
    )
    wanted = TorchStepper(opt).perturb(list(x), params, step)
    given = [xi.clone() for xi in x]
    out = TritonStepper(opt).perturb(given, params, step)
    for a, b in zip(out, wanted, strict=True):
        compare(a, b, opt)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stats", [False, True], ids=["map", "chain"])
def test_tile_changes_nothing(dtype: torch.dtype, stats: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(5, 70), (5, 7), (5, 8)]
    x, grad = state(shapes, generator, dtype), state(shapes, generator, dtype)
    params = [dataclasses.replace(PLAIN, grad_clip=1.0, max_update=0.4, low=-1.0, high=1.0)] * 3
    results = [
        TritonStepper(options(3), tile=tile).step(
            [xi.clone() for xi in x], grad, params, 1, with_noise=True, stats=stats
        )[0]
        for tile in (128, 512, 1024)
    ]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_split_of_the_batch_changes_nothing(dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(10, 30), (10, 5)]
    x, grad = state(shapes, generator, dtype), state(shapes, generator, dtype)
    whole, _ = TritonStepper(options(2, chain_offset=100)).step(
        [xi.clone() for xi in x], grad, [PLAIN] * 2, 9, with_noise=True, stats=False
    )
    for first, last in ((0, 4), (4, 10)):
        part, _ = TritonStepper(options(2, chain_offset=100 + first)).step(
            [xi[first:last].clone() for xi in x],
            [g[first:last] for g in grad],
            [PLAIN] * 2,
            9,
            with_noise=True,
            stats=True,
        )
        for a, b in zip(part, whole, strict=True):
            assert torch.equal(a, b[first:last])


@pytest.mark.parametrize("seed_kind", ["int", "tensor"])
@pytest.mark.parametrize("step_kind", ["int", "tensor"])
def test_seed_and_step_from_memory(seed_kind: str, step_kind: str) -> None:
    """What a captured graph relies on: the same launch draws other noise once the tensors hold other numbers."""
    key, step = scalar(5), scalar(11)
    opt = options(1, seed=key if seed_kind == "tensor" else 5)
    stepper = TritonStepper(opt)
    x, grad = [torch.zeros(3, 10)], [torch.zeros(3, 10)]

    def run() -> torch.Tensor:
        which = step if step_kind == "tensor" else 11
        return stepper.step([x[0].clone()], grad, [PLAIN], which, with_noise=True, stats=False)[0][0]

    first = run()
    compare(first, TorchStepper(options(1, seed=5)).step(x, grad, [PLAIN], 11, with_noise=True, stats=False)[0][0])
    key += 1
    step += 1
    second = run()
    fresh = seed_kind == "tensor" or step_kind == "tensor"
    assert torch.equal(first, second) != fresh


def test_parameters_are_read_at_each_step() -> None:
    scale = torch.ones(4, 1)
    params = [StepParams(step_size=torch.tensor(0.0, dtype=torch.float64), noise_scale=scale)]
    stepper = TritonStepper(options(1))
    x, grad = torch.zeros(4, 6), [torch.zeros(4, 6)]
    first = stepper.step([x.clone()], grad, params, 0, with_noise=True, stats=False)[0][0]
    scale[2] = 3.0
    second = stepper.step([x.clone()], grad, params, 0, with_noise=True, stats=False)[0][0]
    torch.testing.assert_close(second[2], 3 * first[2])
    assert torch.equal(second[:2], first[:2])


def test_more_tensors_than_a_launch_takes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, n) for n in (3, 4, 5, 6, 7, 8, 9, 10, 11)]
    params = [dataclasses.replace(PLAIN, low=-2.0 - 0.1 * i, high=2.5) for i in range(len(shapes))]
    x, grad = state(shapes, generator), state(shapes, generator)
    check(x, grad, params, options(len(shapes)), stats=False)
    check(x, grad, params, options(len(shapes), outside="reject"), stats=True)


def test_tensors_of_several_dtypes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes, dtypes = [(4, 40), (4, 12), (4, 16)], (torch.float32, torch.bfloat16, torch.float16)
    x = [xi.to(dtype) for xi, dtype in zip(state(shapes, generator), dtypes, strict=True)]
    grad = [gi.to(dtype) for gi, dtype in zip(state(shapes, generator), dtypes, strict=True)]
    params = [dataclasses.replace(PLAIN, low=-3.0, high=3.0, grad_norm_clip=2.0)] * 3
    for stats in (False, True):
        wanted, wanted_stats = TorchStepper(options(3, outside="reject")).step(
            list(x), grad, params, 2, with_noise=True, stats=stats
        )
        out, out_stats = TritonStepper(options(3, outside="reject")).step(
            [xi.clone() for xi in x], grad, params, 2, with_noise=True, stats=stats
        )
        for a, b in zip(out, wanted, strict=True):
            compare(a, b)
        if stats:
            compare_stats(out_stats, wanted_stats, torch.bfloat16)


def test_gradient_wider_than_the_state(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, grad = state([(3, 40)], generator, torch.bfloat16), state([(3, 40)], generator)
    check(x, grad, [PLAIN], options(1), stats=False)
    check(x, grad, [PLAIN], options(1), stats=True)


def test_layouts(seed: int) -> None:
    """Addresses off the 16 bytes, gradients that are expanded or transposed, a state that is not contiguous."""
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.randn(4 * 8 + 1, generator=generator)
    shifted = buffer[1:].view(4, 8)
    grad = [torch.randn(8, 4, generator=generator).t()]
    wanted = TorchStepper(options(1)).step([shifted.clone()], grad, [PLAIN], 0, with_noise=True, stats=False)[0][0]
    out = TritonStepper(options(1)).step([shifted], grad, [PLAIN], 0, with_noise=True, stats=False)[0][0]
    assert out.data_ptr() == shifted.data_ptr()
    compare(out, wanted)

    x = torch.randn(8, 4, generator=generator).t()
    before = x.clone()
    expanded = [torch.ones(1, 1).expand(4, 8)]
    wanted = TorchStepper(options(1)).step([before], expanded, [PLAIN], 0, with_noise=True, stats=False)[0][0]
    out = TritonStepper(options(1)).step([x], expanded, [PLAIN], 0, with_noise=True, stats=False)[0][0]
    compare(out, wanted)
    assert torch.equal(x, before), "what is not contiguous is copied, not written"


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    x, grad = [torch.zeros(shape)], [torch.zeros(shape)]
    stepper = TritonStepper(options(1))
    out, stats = stepper.step(x, grad, [PLAIN], 0, with_noise=True, stats=True)
    assert out[0].shape == shape and stats is not None
    assert stats.grad_norm.shape == stats.clipped.shape == (shape[0],)
    assert stepper.perturb(x, [PLAIN], 0)[0].shape == shape


def test_an_empty_tensor_beside_another(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 0), (3, 7)]
    params = [dataclasses.replace(PLAIN, low=-1.0, grad_norm_clip=1.0)] * 2
    check(state(shapes, generator), state(shapes, generator), params, options(2, outside="reject"))


def test_norm_zero_and_nan() -> None:
    """A zero gradient is not scaled to NaN; a NaN one stays visible; a zero limit silences a gradient."""
    grad = torch.zeros(4, 10)
    grad[1] = 3.0
    grad[2, 4] = float("nan")
    grad[3] = float("inf")
    for limit in (1.0, 0.5, torch.tensor([[1.0], [0.0], [1.0], [1.0]])):
        params = [StepParams(step_size=1.0, noise_scale=0.0, grad_norm_clip=limit)]
        for splits in (None, 2):
            check([torch.zeros(4, 10)], [grad], params, options(1, noisy=(False,)), splits=splits)


def test_autograd_notices_the_write() -> None:
    x = torch.randn(3, 4)
    weight = torch.ones(4, requires_grad=True)
    energy = (x * weight).square().sum()
    TritonStepper(options(1)).step([x], [torch.zeros(3, 4)], [PLAIN], 0, with_noise=True, stats=False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        energy.backward()


# -- what is not taken


def test_supports_gives_reasons() -> None:
    x = [torch.zeros(3, 4)]
    assert supports(x, options(1)) is None
    assert "rng" in supports(x, options(1, rng="torch"))
    assert "float64" in supports([torch.zeros(3, 4, dtype=torch.float64)], options(1))
    assert "meta" in supports([torch.zeros(3, 4, device="meta")], options(1))
    assert "no tensor" in supports([], options(0))
    assert "()" in supports([torch.zeros(())], options(1))
    assert "(2, 4)" in supports([torch.zeros(3, 4), torch.zeros(2, 4)], options(2))
    assert "mask" in supports(x, options(1, observed=(torch.zeros(3, 4),)))
    per_element = dataclasses.replace(PLAIN, step_size=torch.ones(3, 4))
    assert "step_size" in supports(x, options(1), [per_element])
    assert "low" in supports(x, options(1), [dataclasses.replace(PLAIN, low=torch.zeros(4))])
    assert supports(x, options(1), [dataclasses.replace(PLAIN, low=torch.zeros(3, 1))]) is None


def test_wrong_arguments_raise_before_a_launch() -> None:
    stepper = TritonStepper(options(1))
    x, grad = [torch.zeros(3, 4)], [torch.zeros(3, 4)]
    run = {"with_noise": True, "stats": False}
    with pytest.raises(ValueError, match="gradient of tensor 0"):
        stepper.step(x, [torch.zeros(3, 5)], [PLAIN], 0, **run)
    with pytest.raises(ValueError, match="expected 1 tensors"):
        stepper.step(x * 2, grad * 2, [PLAIN] * 2, 0, **run)
    with pytest.raises(ValueError, match="noise_scale"):
        stepper.step(x, grad, [dataclasses.replace(PLAIN, noise_scale=torch.ones(4))], 0, **run)
    with pytest.raises(ValueError, match="step"):
        stepper.step(x, grad, [PLAIN], torch.zeros(2, dtype=torch.int64), **run)
    with pytest.raises(ValueError, match="float64"):
        stepper.step([torch.zeros(3, 4, dtype=torch.float64)], grad, [PLAIN], 0, **run)
    with pytest.raises(ValueError, match="observed mask"):
        TritonStepper(options(1, observed=(torch.zeros(5, dtype=torch.bool),))).step(x, grad, [PLAIN], 0, **run)
    with pytest.raises(ValueError, match="rng"):
        TritonStepper(options(1, rng="torch"))
    with pytest.raises(ValueError, match="tile"):
        TritonStepper(options(1), tile=100)
    with pytest.raises(ValueError, match="splits"):
        TritonStepper(options(1), splits=65)


def test_the_reference_rounds_the_same_way(seed: int) -> None:
    """Thresholds in memory and in the kernel are the same bits: a step that is exact in fp32 rounds to the same."""
    generator = torch.Generator().manual_seed(seed)
    for dtype in (torch.bfloat16, torch.float16):
        x = [torch.randn(4, 37, generator=generator).to(dtype)]
        grad = [torch.randn(4, 37, generator=generator).to(dtype)]
        # x - g: a sum of two 16-bit numbers, rounded once in both
        params = [StepParams(step_size=1.0, noise_scale=0.0)]
        opt = options(1, noisy=(False,))
        out = TritonStepper(opt).step([x[0].clone()], grad, params, 4, with_noise=True, stats=False)[0][0]
        thresholds = noise.rounding_fraction((4, 37), seed=opt.seed, step=4, stream=noise.stream(0, noise.ROUNDING))
        exact = reference.stochastic_round(x[0].float() - grad[0].float(), dtype, thresholds)
        assert torch.equal(out, exact)
