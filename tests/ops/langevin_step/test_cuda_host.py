"""The CUDA C++ room of ``langevin_step`` without a GPU: what its threads do, done on the host by the same object file.

``mmebm._cuda`` runs the kernels' device functions lane by lane, reductions in the order of the kernel's. What only a
device can show (launches, alignment, streams, graphs) is in test_gpu.py.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmebm import native, noise
from mmebm.backends import require_backends
from mmebm.ops import dispatch, parity
from mmebm.ops.common.params import StepParams, StepStats
from mmebm.ops.langevin_step import cuda as room
from mmebm.ops.langevin_step import op, reference
from mmebm.ops.parity import NORMAL_TOLERANCE
from mmebm.ops.parity import STEP_TOLERANCE as FLOAT_TOLERANCE
from tests.ops.cases import STEP_OPTIONS

SIXTEEN = (torch.bfloat16, torch.float16)
# Groups of 4: a lane, a part of a warp, a warp, 8 turns of it, a block, a block and a bit, splits (from 8,192 on)
SIZES = (1, 3, 4, 5, 63, 64, 65, 128, 1000, 1024, 1028, 1030, 5000, 8192, 8193, 8200, 20_000)


@pytest.fixture(autouse=True)
def _extension() -> None:
    """It loads without a device, so "cuda" can be required here although :func:`native.available` says no."""
    try:
        native.cuda()
    except native.BackendError as error:
        if "cuda" in require_backends() or "extension not built" not in str(error):
            pytest.fail(str(error))
        pytest.skip(str(error))


class HostStepper(room.CudaStepper):
    """The stepper on CPU tensors: the same checks, constants and scratch memory, without a launch."""

    def _require(self, options: op.StepOptions, x: Sequence[Tensor]) -> None:
        assert room.state_reason(x, options, "cpu") is None

    def _call(self, function: str, **arguments: Any) -> None:
        assert getattr(self._op, f"host_{function}")(**arguments) == 0


def make_options(x: Sequence[Tensor], seed: int, **changes: Any) -> op.StepOptions:
    n = len(x)
    return replace(op.StepOptions(seed=seed, streams=tuple(range(n)), noisy=(True,) * n), **changes)


def draw(shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tuple(shape), generator=generator).to(dtype)


def plain(**changes: Any) -> StepParams:
    return replace(StepParams(step_size=0.05, noise_scale=0.1), **changes)


def double(p: StepParams) -> StepParams:
    values = {field.name: getattr(p, field.name) for field in fields(StepParams)}
    return StepParams(**{k: v.double() if isinstance(v, Tensor) else v for k, v in values.items()})


def truth(
    x: Sequence[Tensor],
    grad: Sequence[Tensor],
    params: Sequence[StepParams],
    options: op.StepOptions,
    step: int,
    with_noise: bool,
) -> tuple[list[Tensor], StepStats]:
    """The reference in float64, on the same noise; a 16-bit state before it is rounded."""
    drawn = [
        noise.normal(
            t.shape, seed=options.seed, step=step, stream=index, chain_offset=options.chain_offset, dtype=torch.float64
        )
        if with_noise and noisy
        else None
        for t, index, noisy in zip(x, options.streams, options.noisy, strict=True)
    ]
    out, stats = reference.langevin_step(
        [t.double() for t in x],
        [g.double() for g in grad],
        drawn,
        [double(p) for p in params],
        norm_over=options.norm_over,
        outside=options.outside,
        observed=options.observed or None,
        stats=True,
    )
    assert stats is not None
    return out, stats


def near_a_bound(
    x: list[Tensor], grad: list[Tensor], params: list[StepParams], options: op.StepOptions, with_noise: bool
) -> bool:
    """Whether a proposal is so near a bound that rounding decides about its chain."""
    free = [replace(p, low=None, high=None) for p in params]
    proposals, _ = truth(x, grad, free, options, 3, with_noise)
    return any(
        bool(((y - bound).abs() < 1e-5 + 1e-6 * y.abs()).any())
        for y, p in zip(proposals, params, strict=True)
        for bound in (p.low, p.high)
        if bound is not None and y.numel()
    )


def scale_of(p: StepParams) -> float:
    scale = torch.as_tensor(p.noise_scale)
    return float(scale.abs().max()) if scale.numel() else 0.0


def close_to_truth(ours: Tensor, torchs: Tensor, exact: Tensor, scale: float, context: str) -> None:
    """err(ours) <= 2 err(torch) + tolerance, and the same elements NaN and infinite."""
    assert torch.equal(ours.isnan(), torchs.isnan()), f"{context}: NaN at other places"
    assert torch.equal(ours.isinf(), torchs.isinf()), f"{context}: infinite at other places"
    finite = torch.isfinite(torchs) & torch.isfinite(exact)
    if not finite.any():
        return
    error = (ours.double() - exact).abs()[finite].max().item()
    torch_error = (torchs.double() - exact).abs()[finite].max().item()
    largest = exact.abs()[finite].max().item()
    limit = 2 * torch_error + NORMAL_TOLERANCE * scale + FLOAT_TOLERANCE * largest
    assert error <= limit, f"{context}: error {error:.3e}, torch's {torch_error:.3e}, limit {limit:.3e}"


def rounded(ours: Tensor, torchs: Tensor, exact: Tensor, scale: float, context: str) -> None:
    """16 bits: a neighbour of the exact value, and nearly always the one that the reference takes too."""
    assert torch.equal(ours.isnan(), torchs.isnan()), f"{context}: NaN at other places"
    finite = torch.isfinite(torchs) & torch.isfinite(ours) & torch.isfinite(exact)
    if not finite.any():
        return
    # a unit in the last place is at most this part of the number, and never below the smallest subnormal
    part, smallest = (2.0**-7, 0.0) if ours.dtype == torch.bfloat16 else (2.0**-10, 2.0**-24)
    right = exact[finite]
    slack = NORMAL_TOLERANCE * scale + FLOAT_TOLERANCE * right.abs().max().item()
    off = (ours[finite].double() - right).abs() - right.abs() * part - smallest
    assert off.max() <= 2 * slack, f"{context}: {off.max()} beyond the neighbours of the exact value"
    # fp32 errors of 2e-7 against a unit of 6e-5 at 0.1: one in a hundred, with room for few numbers
    different = (ours != torchs) & ~ours.isnan()
    count = int(different.sum())
    assert count <= 3 + 0.01 * different.numel(), f"{context}: {count} of {different.numel()} differ"


def same_stats(ours: StepStats, torchs: StepStats, exact: StepStats, wide: bool, context: str) -> None:
    for name in ("grad_norm", "displacement"):
        a, b, c = getattr(ours, name), getattr(torchs, name), getattr(exact, name)
        assert a.dtype == torch.float32 and a.shape == b.shape
        assert torch.equal(a.isnan(), b.isnan()), f"{context}: {name} {a} against {b}"
        finite = torch.isfinite(b)
        # of rounded states: the rounding is the reference's but for a few units
        right = c if wide or name == "grad_norm" else b.double()
        loose = 1e-5 if wide or name == "grad_norm" else 2e-2
        close = torch.isclose(a[finite].double(), right[finite], rtol=loose, atol=loose)
        assert close.all(), f"{context}: {name} {a} against {right}"
    assert ours.clipped.dtype == ours.nonfinite.dtype == torch.int64
    assert torch.equal(ours.nonfinite, torchs.nonfinite), f"{context}: {ours.nonfinite} against {torchs.nonfinite}"
    # an update within rounding of max_update may fall on either side
    assert (ours.clipped - torchs.clipped).abs().sum() <= 2, f"{context}: {ours.clipped} against {torchs.clipped}"


def compare(
    x: list[Tensor],
    grad: list[Tensor],
    params: list[StepParams],
    options: op.StepOptions,
    *,
    step: int = 3,
    with_noise: bool = True,
    context: str = "",
) -> list[Tensor]:
    """One step on the host against torch in the same dtype and in float64, with statistics and without."""
    wanted, wanted_stats = op.TorchStepper(options).step(
        [t.clone() for t in x], grad, params, step, with_noise=with_noise, stats=True
    )
    exact, exact_stats = truth(x, grad, params, options, step, with_noise)
    ours = [t.clone() for t in x]
    stepper = HostStepper(options, ours)
    out, stats = stepper.step(ours, grad, params, step, with_noise=with_noise, stats=True)
    assert all(a is b for a, b in zip(out, ours, strict=True)), "the step is not in place"
    for i, (a, b, c, p) in enumerate(zip(out, wanted, exact, params, strict=True)):
        if a.dtype == torch.float32:
            close_to_truth(a, b, c, scale_of(p) if with_noise else 0.0, f"{context} tensor {i}")
        else:
            rounded(a, b, c, scale_of(p) if with_noise else 0.0, f"{context} tensor {i}")
    assert stats is not None and wanted_stats is not None
    same_stats(stats, wanted_stats, exact_stats, all(t.dtype == torch.float32 for t in x), context)
    # without statistics it is another kernel, or another path of the same one
    again, nothing = stepper.step([t.clone() for t in x], grad, params, step, with_noise=with_noise, stats=False)
    assert nothing is None
    for a, b in zip(again, out, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), f"{context}: statistics changed the update"
    return out


# -- noise and rounding


@pytest.mark.parametrize("size", SIZES)
def test_noise_is_the_written_definition(size: int, seed: int) -> None:
    for chains in (1, 3):
        x = [torch.zeros(chains, size)]
        options = make_options(x, seed * 0x9E3779B97F4A7C15 % 2**64, streams=(5,), chain_offset=2**32 - 2)
        exact = noise.normal(
            x[0].shape, seed=options.seed, step=17, stream=5, chain_offset=options.chain_offset, dtype=torch.float64
        )
        HostStepper(options, x).perturb(x, [plain(noise_scale=1.0)], 2**32 + 17)
        assert (x[0].double() - exact).abs().max() <= NORMAL_TOLERANCE


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_a_normal_has_the_same_bits_in_every_kernel_and_storage(dtype: torch.dtype, seed: int) -> None:
    """16-bit groups take two Philox blocks: rounded the reference's way, the normals of the fp32 groups are theirs."""
    x = torch.zeros(5, 1003)
    params = [plain(noise_scale=1.0)]
    options = make_options([x], seed)
    wide = HostStepper(options, [x]).perturb([x.clone()], params, 2)[0]
    half = x.to(dtype)
    got = HostStepper(options, [half]).perturb([half.clone()], params, 2)[0]
    threshold = noise.rounding_fraction(x.shape, seed=seed, step=2, stream=noise.stream(0, noise.PERTURB_ROUNDING))
    assert torch.equal(got, reference.stochastic_round(wide, dtype, threshold))
    grad = torch.zeros_like(x)
    for t, expected in ((x, wide), (half, None)):
        stepped = [
            HostStepper(options, [t]).step([t.clone()], [grad], params, 2, with_noise=True, stats=stats)[0][0]
            for stats in (False, True)
        ]
        assert torch.equal(stepped[0], stepped[1])
        if expected is not None:
            assert torch.equal(stepped[0], expected)


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("purpose", ["step", "perturb"])
def test_stochastic_rounding_bit_for_bit(dtype: torch.dtype, purpose: str, seed: int) -> None:
    # 65504 and 65520 are the largest fp16 and what rounds to infinity; fp16 has subnormals below 6.1e-5
    ends = [0.0, math.inf, -math.inf, math.nan, 6e-5, -6e-5, 3e-6, 1e-7, -2e-8, 65504.0, 65520.0, -7e4, 1e38, 1e-39]
    generator = torch.Generator().manual_seed(seed)
    values = torch.cat([torch.tensor(ends), torch.randn(50, generator=generator) * 10.0 ** torch.arange(-25, 25)])
    values = values * (1 + torch.linspace(-1e-3, 1e-3, 64)[:, None])
    x = [torch.zeros(64, len(ends) + 50, dtype=dtype)]
    options = make_options(x, seed, noisy=(False,))
    # -1 times -value, exactly; the half-step has nothing that is not in the state, and rounds what it finds exactly
    if purpose == "step":
        params = [plain(step_size=1.0)]
        wanted, _ = op.TorchStepper(options).step(x, [-values], params, 1, with_noise=True, stats=False)
        out, _ = HostStepper(options, x).step([x[0].clone()], [-values], params, 1, with_noise=True, stats=False)
    else:
        x = [values.to(dtype)]
        wanted, out = x, HostStepper(options, x).perturb([x[0].clone()], [plain()], 1)
    nan = wanted[0].isnan()
    assert torch.equal(out[0].isnan(), nan)
    assert torch.equal(out[0][~nan], wanted[0][~nan])


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_small_steps_are_not_lost(dtype: torch.dtype, seed: int) -> None:
    x = [torch.ones(1, 20_000, dtype=dtype)]
    stepper = HostStepper(make_options(x, seed, noisy=(False,)), x)
    grad = [torch.full((1, 20_000), -1.0)]
    for k in range(50):
        stepper.step(x, grad, [plain(step_size=1e-4)], k, with_noise=False, stats=False)
    # each step is a fiftieth of a bf16 unit: rounding to nearest would stay at 1. Six standard errors of 50 roundings
    # of variance below unit * 1e-4 are 6 sqrt(50 * 2^-7 * 1e-4 / 20000)
    assert abs(x[0].double().mean() - 1.005) < 6 * math.sqrt(50 * 2**-7 * 1e-4 / 20_000)


# -- the update against the reference


@pytest.mark.parametrize("name", STEP_OPTIONS)
@pytest.mark.parametrize("outside", ("clamp", "reject"))
@pytest.mark.parametrize("norm_over", ("chain", "tensor"))
@pytest.mark.parametrize("dtype", (torch.float32, *SIXTEEN), ids=("fp32", "bf16", "fp16"))
def test_each_option(name: str, outside: str, norm_over: str, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for chains, size in ((7, 65), (3, 1032), (2, 17_000), (2, 1)):
        x, grad = [draw((chains, size), generator, dtype)], [draw((chains, size), generator, dtype)]
        if outside == "reject":
            x[0][0] *= 0.01
        options = make_options(x, seed, outside=outside, norm_over=norm_over)
        params = [plain(**STEP_OPTIONS[name])]
        for with_noise in (True, False):
            if outside == "reject" and near_a_bound(x, grad, params, options, with_noise):
                continue
            context = f"{name} {outside} {norm_over} {chains}x{size} noise {with_noise}"
            compare(x, grad, params, options, with_noise=with_noise, context=context)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("chains", (1, 2, 33))
def test_sizes(size: int, chains: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, grad = [draw((chains, size), generator)], [draw((chains, size), generator)]
    per_chain = 0.01 + 0.1 * torch.rand(chains, 1, generator=generator)
    params = [plain(grad_norm_clip=1.0, low=-2.0, high=2.0, step_size=per_chain)]
    compare(x, grad, params, make_options(x, seed), context=f"{chains}x{size}")
    compare(x, grad, [plain(noise_scale=per_chain)], make_options(x, seed), context=f"{chains}x{size}")


def random_value(rng: random.Random, generator: torch.Generator, x: Tensor, low: float, high: float) -> float | Tensor:
    kind = rng.choice(["number", "number", "one", "chain"])
    if kind == "number":
        return rng.uniform(low, high)
    shape = rng.choice([(), (1,)]) if kind == "one" else (x.shape[0], *[1] * (x.dim() - 1))
    return low + (high - low) * torch.rand(shape, generator=generator)


@pytest.mark.parametrize("part", range(8))
def test_random_combinations(part: int, seed: int) -> None:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    for case in range(20):
        chains = rng.choice((1, 2, 5, 33))
        x, grad, params, masks = [], [], [], []
        for _ in range(rng.choice((1, 1, 2, 3, 5, 40))):
            shape = rng.choice([(), (1,), (3,), (10,), (2, 3), (64,), (3, 7, 5), (130,), (1040,), (9001,)])
            if len(x) > 5:
                shape = shape[:1]
            t = draw((chains, *shape), generator, rng.choice((torch.float32, torch.float32, *SIXTEEN)))
            x.append(t)
            g = draw(t.shape, generator, rng.choice((torch.float32, t.dtype, *SIXTEEN)))
            grad.append(g * rng.choice((0.25, 1.0, 8.0)))
            if rng.random() < 0.1:
                grad[-1].view(-1)[rng.randrange(t.numel())] = rng.choice((math.nan, math.inf, -math.inf))

            def value(low: float, high: float, t: Tensor = t) -> float | Tensor:
                return random_value(rng, generator, t, low, high)

            def maybe(low: float, high: float, t: Tensor = t) -> float | Tensor | None:
                return random_value(rng, generator, t, low, high) if rng.random() < 0.3 else None

            params.append(
                StepParams(
                    value(0.001, 0.2),
                    value(0.0, 0.2),
                    maybe(0.1, 2.0),
                    maybe(0.5, 4.0),
                    maybe(0.01, 0.5),
                    maybe(0.5, 2.0),
                    maybe(-2.0, -0.5),
                    maybe(0.5, 2.0),
                )
            )
            mask = rng.choice([None, None, None, t.shape, t.shape[1:], (chains, *[1] * (t.dim() - 1))])
            masks.append(None if mask is None else torch.rand(mask, generator=generator) < 0.3)
        over = rng.choice(("chain", "tensor"))
        if over == "tensor":
            params = [replace(p, grad_norm_clip=2.0) if p.grad_norm_clip is not None else p for p in params]
        options = make_options(
            x,
            rng.getrandbits(64),
            outside=rng.choice(("clamp", "clamp", "reject")),
            norm_over=over,
            observed=tuple(masks),
            chain_offset=rng.choice((0, 5, 2**31 + 3)),
            noisy=tuple(rng.random() < 0.8 for _ in x),
            streams=tuple(rng.randrange(2**24) for _ in x),
        )
        with_noise = rng.random() < 0.8
        if options.outside == "reject" and near_a_bound(x, grad, params, options, with_noise):
            continue
        compare(x, grad, params, options, with_noise=with_noise, context=f"case {case}: {params}")


@pytest.mark.parametrize("clamp_noise", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, *SIXTEEN), ids=("fp32", "bf16", "fp16"))
def test_perturb(dtype: torch.dtype, clamp_noise: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for shape in ((5, 7), (3, 2504), (40, 10), (2,)):
        x = [draw(shape, generator, dtype), draw(shape, generator, dtype)]
        masks = (None, torch.rand(shape, generator=generator) < 0.5)
        options = make_options(x, seed, clamp_noise=clamp_noise, observed=masks, noisy=(True, shape != (5, 7)))
        scale = torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator)
        # a half-step takes nothing of a step's other constants
        params = [plain(low=-0.2, high=0.5, max_update=0.01, prior_std=0.1), plain(noise_scale=scale, grad_clip=0.1)]
        wanted = op.TorchStepper(options).perturb([t.clone() for t in x], params, 9)
        out = HostStepper(options, x).perturb([t.clone() for t in x], params, 9)
        drawn = [
            noise.normal(t.shape, seed=seed, step=9, stream=j, dtype=torch.float64) if options.noisy[j] else None
            for j, t in enumerate(x)
        ]
        exact = reference.perturb(
            [t.double() for t in x], drawn, [double(p) for p in params], clamp_noise=clamp_noise, observed=masks
        )
        for i, p in enumerate(params):
            check = close_to_truth if dtype == torch.float32 else rounded
            check(out[i], wanted[i], exact[i], scale_of(p), f"{shape} tensor {i}")
        assert torch.equal(out[1][masks[1]], x[1][masks[1]])


def test_nan_and_infinity(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e38, -1e38, 1e-44, 3e-39])
    x0 = special.repeat_interleave(len(special)).repeat(4, 1)
    g0 = special.repeat(len(special)).repeat(4, 1)
    x0[1] = draw(x0[1].shape, generator)
    g0[2] = draw(x0[2].shape, generator)
    for name, changes in STEP_OPTIONS.items():
        if name == "zero norm clip":
            continue
        for outside in ("clamp", "reject"):
            compare([x0], [g0], [plain(**changes)], make_options([x0], seed, outside=outside), context=name)


def test_a_nan_limit_shows() -> None:
    """As in torch: a clamp whose limit is NaN gives NaN, and is no clamp that silently does nothing."""
    x, grad = torch.zeros(3, 5), torch.ones(3, 5)
    bad = torch.tensor([[1.0], [math.nan], [1.0]])
    for name in ("grad_clip", "max_update", "low", "high", "grad_norm_clip"):
        limit = -bad if name == "low" else bad
        stepper = HostStepper(make_options([x], 0), [x])
        out, _ = stepper.step([x.clone()], [grad], [plain(**{name: limit})], 0, with_noise=True, stats=False)
        assert out[0].isnan().any(1).tolist() == [False, True, False], name
        with pytest.raises(ValueError, match=f"{name} of tensor 0 must not be NaN"):
            stepper.step([x.clone()], [grad], [plain(**{name: math.nan})], 0, with_noise=True, stats=False)


def test_rejection_keeps_a_chain_in_all_its_tensors(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for more in (0, 40):  # 40 small tensors take two launches, which must agree
        shapes = [(6, 30_000 if more == 0 else 500), (6, 5), (6, 2), *[(6, 3)] * more]
        x = [0.1 * draw(s, generator) for s in shapes]
        grad = [torch.zeros_like(t) for t in x]
        grad[0][1, -1] = 1e3
        grad[1][3, 0] = -1e3
        grad[1][4, 1] = math.nan
        grad[-1][5, 0] = 1e3 if more else 0.0
        quiet = plain(noise_scale=0.01, high=5.0)
        params = [replace(quiet, low=-5.0), quiet, plain(), *[replace(quiet, low=-5.0)] * more]
        out = compare(x, grad, params, make_options(x, seed, outside="reject"))
        for t, b in zip(out, x, strict=True):
            moved = (t != b).any(dim=1)
            assert moved.tolist() == [True, False, True, False, False, more == 0]


def test_observed_elements_stay(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for dtype in (torch.float32, *SIXTEEN):
        x, grad = [draw((9, 3, 11), generator, dtype)], [draw((9, 3, 11), generator)]
        x[0][0, 0, 0] = math.nan
        for shape in ((9, 3, 11), (3, 11), (11,), (9, 1, 1), (1, 1, 1)):
            mask = torch.rand(shape, generator=generator) < 0.5
            out = compare(x, grad, [plain(low=-0.1)], make_options(x, seed, observed=(mask,)))
            kept = mask.expand(x[0].shape)
            integer = torch.int32 if dtype == torch.float32 else torch.int16
            assert torch.equal(out[0][kept].view(integer), x[0][kept].view(integer))


@pytest.mark.parametrize("shapes", ([(0, 5)], [(0,), (0, 3)], [(4, 0)], [(4, 0), (4, 3)], [(3,)], [(2, 0), (2, 0)]))
def test_empty(shapes: list[tuple[int, ...]], seed: int) -> None:
    x, grad = [torch.ones(shape) for shape in shapes], [torch.ones(shape) for shape in shapes]
    params = [plain(grad_norm_clip=1.0, low=-1.0) for _ in shapes]
    for outside in ("clamp", "reject"):
        compare(x, grad, params, make_options(x, seed, outside=outside))
    assert HostStepper(make_options(x, seed), x).perturb(x, params, 0) is x


# -- what results must not depend on


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("outside", ("clamp", "reject"))
def test_a_batch_may_be_split(dtype: torch.dtype, outside: str, seed: int) -> None:
    shapes = ((11, 3, 28, 28), (11, 10), (11, 20_000), (11, 64), (11,))
    generator = torch.Generator().manual_seed(seed)
    x, grad = [draw(s, generator, dtype) for s in shapes], [draw(s, generator) for s in shapes]
    params = [plain(grad_norm_clip=2.0, prior_std=3.0, max_update=0.3, low=-5.0, high=3.5) for _ in x]

    def run(first: int, last: int) -> list[Tensor]:
        part = [t[first:last].clone() for t in x]
        stepper = HostStepper(make_options(part, seed, outside=outside, chain_offset=5 + first), part)
        out, found = stepper.step(part, [g[first:last] for g in grad], params, 7, with_noise=True, stats=True)
        assert found is not None
        return [*out, found.grad_norm, found.displacement, found.clipped, found.nonfinite]

    whole = run(0, 11)
    for cut in (1, 4):
        for a, b, c in zip(whole, run(0, cut), run(cut, 11), strict=True):
            assert torch.equal(a, torch.cat([b, c]))


def test_a_part_of_the_state_takes_the_same_noise(seed: int) -> None:
    """Launches of many tensors, and one of a single tensor, find the same numbers."""
    shapes = [(3, 1 + 7 * i) for i in range(70)]
    x = [torch.zeros(s) for s in shapes]
    params = [plain(noise_scale=1.0)] * len(x)
    whole = HostStepper(make_options(x, seed), x).perturb([t.clone() for t in x], params, 1)
    for i in (0, 31, 32, 63, 64, 69):
        alone = HostStepper(make_options(x[:1], seed, streams=(i,)), [x[i]]).perturb([x[i].clone()], params[:1], 1)
        assert torch.equal(alone[0], whole[i])


def test_seed_and_step_may_be_tensors(seed: int) -> None:
    x = [torch.zeros(3, 50)]
    number = torch.tensor([seed])
    step = torch.tensor(7)
    stepper = HostStepper(replace(make_options(x, 0), seed=number), x)
    a = HostStepper(make_options(x, seed), x).perturb([x[0].clone()], [plain()], 7)[0]
    assert torch.equal(stepper.perturb([x[0].clone()], [plain()], step)[0], a)
    assert torch.equal(stepper.perturb([x[0].clone()], [plain()], step.int())[0], a)
    # read when the step runs, not when the stepper was made
    number += 1
    assert not torch.equal(stepper.perturb([x[0].clone()], [plain()], step)[0], a)
    number -= 1
    step += 1
    assert not torch.equal(stepper.perturb([x[0].clone()], [plain()], step)[0], a)
    negative = HostStepper(make_options(x, -1), x).perturb([x[0].clone()], [plain()], 7)[0]
    unsigned = HostStepper(make_options(x, 2**64 - 1), x).perturb([x[0].clone()], [plain()], 7)[0]
    assert torch.equal(negative, unsigned)
    for wrong in (torch.tensor([1, 2]), torch.tensor(1.0), torch.zeros(1, dtype=torch.int64, device="meta")):
        with pytest.raises(ValueError, match="step must be"):
            stepper.perturb([x[0].clone()], [plain()], wrong)


def test_constants_may_change_along_the_chain(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = [draw((5, 40), generator)]
    options = make_options(x, seed)
    ours = [x[0].clone()]
    stepper, torchs = HostStepper(options, ours), op.TorchStepper(options)
    number, per_chain = torch.tensor(0.1), 0.5 + torch.rand(5, 1, generator=generator)
    wide, strided = torch.tensor(0.1, dtype=torch.float64), (0.5 + torch.rand(5, 2, generator=generator))[:, :1]
    rows = [
        plain(),
        plain(step_size=0.2, low=0.0),
        plain(step_size=number, grad_clip=per_chain),
        plain(step_size=wide, prior_std=strided),
        plain(step_size=wide, prior_std=strided),
        plain(),
    ]
    for k, p in enumerate(rows * 2):
        grad = [draw((5, 40), generator)]
        theirs, _ = torchs.step([ours[0].clone()], grad, [p], k, with_noise=True, stats=False)
        stepper.step(ours, grad, [p], k, with_noise=True, stats=False)
        torch.testing.assert_close(ours[0], theirs[0].float(), rtol=1e-6, atol=2e-6)
        # written to in place: the next step sees it, whether it was copied or not
        for t in (number, per_chain, wide, strided):
            t.mul_(0.9)


def test_layouts(seed: int) -> None:
    """Offsets that are no multiple of 16 bytes, states and gradients that are not contiguous, gradients of float64."""
    generator = torch.Generator().manual_seed(seed)
    base, grad = draw((4, 6, 8), generator), draw((4, 6, 8), generator)
    options, params = make_options([base], seed), [plain(grad_clip=0.7)]

    def run(x: Tensor, g: Tensor) -> Tensor:
        return HostStepper(options, [x]).step([x], [g], params, 0, with_noise=True, stats=False)[0][0]

    expected = run(base.clone(), grad)
    for offset in (1, 2, 3):
        x = torch.empty(base.numel() + offset)[offset:].view(base.shape).copy_(base)
        assert torch.equal(run(x, grad), expected)
        shifted = torch.empty(grad.numel() + offset)[offset:].view(grad.shape).copy_(grad)
        assert torch.equal(run(base.clone(), shifted), expected)
    strided = base.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(run(strided.clone(memory_format=torch.preserve_format), grad), expected)
    for layout in (
        grad.transpose(1, 2).contiguous().transpose(1, 2),
        grad.double(),
        grad.clone().requires_grad_(),
        torch.stack([grad, grad], -1)[..., 0],
    ):
        assert torch.equal(run(base.clone(), layout), expected)


def test_in_place_and_noticed(seed: int) -> None:
    x, grad = [torch.zeros(4, 33)], [torch.ones(4, 33)]
    stepper = HostStepper(make_options(x, seed), x)
    version, address = x[0]._version, x[0].data_ptr()
    out, _ = stepper.step(x, grad, [plain()], 0, with_noise=True, stats=False)
    assert out[0].data_ptr() == address and x[0]._version > version and bool((x[0] != 0).all())


# -- errors


def test_stepper_names_what_is_wrong(seed: int) -> None:
    x, grad = [torch.zeros(3, 40), torch.zeros(3, 5)], [torch.zeros(3, 40), torch.zeros(3, 5)]
    stepper, params = HostStepper(make_options(x, seed), x), [plain(), plain()]

    def step(**changes: Any) -> None:
        call = {"x": x, "grad": grad, "params": params, **changes}
        stepper.step(call["x"], call["grad"], call["params"], 0, with_noise=True, stats=False)

    for name, changes in {
        r"x\[1\]": {"x": [x[0], torch.zeros(3, 6)]},
        r"x\[0\]": {"x": [x[0].double(), x[1]]},
        "x, grad and params": {"x": x[:1]},
        r"grad\[0\]": {"grad": [torch.zeros(3, 41), grad[1]]},
        r"grad\[1\]": {"grad": [grad[0], torch.zeros(3, 5, device="meta")]},
        "got 2, 1 and 2": {"grad": grad[:1]},
        "low of tensor 0": {"params": [plain(low=math.nan), params[1]]},
        "step_size of tensor 0": {"params": [plain(step_size=torch.ones(40)), params[1]]},
        "high of tensor 1": {"params": [params[0], plain(high=torch.ones(3, 5))]},
        "noise_scale of tensor 0": {"params": [plain(noise_scale=torch.ones(3, 1, device="meta")), params[1]]},
    }.items():
        with pytest.raises(ValueError, match=name):
            step(**changes)
        step()
    with pytest.raises(ValueError, match=r"observed\[0\]"):
        HostStepper(make_options(x, seed, observed=(torch.ones(7, dtype=torch.bool), None)), x)
    with pytest.raises(ValueError, match=r"observed\[1\]"):
        HostStepper(make_options(x, seed, observed=(None, torch.ones(3, 5))), x)
    with pytest.raises(ValueError, match="tensor_index"):
        HostStepper(make_options(x, seed, streams=(0, 2**24)), x)


def test_binding_refuses_what_would_crash() -> None:
    cuda = native.cuda()
    with pytest.raises(ValueError):
        cuda.LangevinStep(-1, 0, 0)
    step = cuda.LangevinStep(2, 0, 0)
    step.add(3, 0, True, 0, 0, False)
    address = torch.zeros(8).data_ptr()
    for call in (
        lambda: step.add(-1, 0, True, 0, 0, False),
        lambda: step.add(1, 0, True, 3, 0, False),
        lambda: step.add(1, 2**24, True, 0, 0, False),
        lambda: step.set(1, 0, 1, 0.0, 0),
        lambda: step.set(0, 8, 1, 0.0, 0),
        lambda: step.set(0, 0, 2, 0.0, 0),
        lambda: step.set(0, 0, 3, 0.0, address),
        lambda: step.set(0, 0, 5, 0.0, address),
        lambda: step.set_grad(1, 0),
        lambda: step.host_perturb([0], 0, 0, 0, 0),
        lambda: step.host_perturb([], 0, 0, 0, 0),
        lambda: step.host_perturb((address,), 0, 0, 0, 0),
        lambda: step.host_step([address], [], 0, 0, 0, 0, True, 0, 0, 0),
    ):
        with pytest.raises(ValueError):
            call()
    with pytest.raises(TypeError):
        step.host_perturb([1.5], 0, 0, 0, 0)
    step.set(0, 3, 1, 1.0, 0)
    long = cuda.LangevinStep(2, 0, 0)
    long.add(10**5, 0, True, 0, 0, False)
    long.set(0, 3, 1, 1.0, 0)
    assert long.scratch_bytes(False) > 0 == step.scratch_bytes(False)
    with pytest.raises(ValueError, match="scratch"):
        long.host_step([address], [address], 0, 0, 0, 0, True, 0, 0, 0)


def test_asking_for_cuda_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    x = [torch.zeros(3, 4)]
    with pytest.raises(native.BackendError, match="cuda: langevin_step: tensor 0 of the state is on cpu"):
        op.stepper("cuda", x, make_options(x, 0))
    with pytest.raises(native.BackendError, match="cuda: langevin_step: rng='torch'"):
        op.stepper("cuda", x, make_options(x, 0, rng="torch"))
    # the launch of a device that is not there is an error, not a crash
    if native.cuda().device_count()[0] == 0:
        assert native.cuda().prepare_langevin_step(0) != 0
        step = native.cuda().LangevinStep(3, 0, 0)
        step.add(4, 0, True, 0, 0, False)
        assert step.perturb([x[0].data_ptr()], 0, 0, 0, 0, 0, 0) != 0


def test_constants_that_are_refused_are_known_before_the_chain_starts() -> None:
    x = [torch.zeros(3, 4, 5)]
    for value, word in ((torch.ones(4, 5), "one per chain"), (torch.ones(3, 1, 1, device="meta"), "on meta")):
        reason = room.constants_reason(x, [plain(high=value)])
        assert reason is not None and "high of tensor 0" in reason and word in reason
    for value in (1.0, None, torch.ones(()), torch.ones(1, 1, 1), torch.ones(3, 1, 1)):
        assert room.constants_reason(x, [plain(high=value)]) is None


def test_auto_takes_cuda_only_where_triton_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    state: Any = [SimpleNamespace(device=torch.device("cuda:0"))]
    options = op.StepOptions(seed=0, streams=(0,), noisy=(True,))
    triton = SimpleNamespace(name="triton")
    monkeypatch.delenv("MMEBM_BACKEND", raising=False)
    monkeypatch.setitem(op._STEPPERS, "cuda", lambda options, x: SimpleNamespace(name="cuda"))
    monkeypatch.setattr(op, "cuda_reason", lambda x, options, params: None)
    monkeypatch.setattr(op, "obstacle", lambda t: None)
    monkeypatch.setattr(parity, "failure", lambda *key: None)
    modules = {"triton": SimpleNamespace(TritonStepper=lambda options: triton, supports=lambda *given: None)}

    def implementation(name: str, backend: str) -> tuple[Any, str | None]:
        return (room, None) if backend == "cuda" else (modules.get(backend), "it is not installed")

    monkeypatch.setattr(dispatch, "implementation", implementation)
    assert op.stepper("auto", state, options)[0] is triton
    modules.clear()
    chosen, reason = op.stepper("auto", state, options)
    assert chosen.name == "cuda" and "it is not installed" in reason
    monkeypatch.setattr(op, "cuda_reason", lambda x, options, params: "nor is this")
    chosen, reason = op.stepper("auto", state, options)
    assert chosen.name == "torch" and "it is not installed" in reason and "nor is this" in reason
    for backend, word in (("triton", "it is not installed"), ("cuda", "nor is this")):
        with pytest.raises(native.BackendError, match=f"{backend}: langevin_step: {word}"):
            op.stepper(backend, state, options)


SCORES: dict[str, dict[str, Any]] = {
    "plain": {},
    "every limit": {"grad_clip": 0.9, "grad_norm_clip": 3.0, "max_update": 0.25, "low": -1.2, "high": 1.1},
    "prior": {"prior_std": 0.7},
    "per chain": {"step_size": torch.tensor([[0.1], [0.2], [0.3]]), "prior_std": torch.tensor([[0.5], [2.0], [1.0]])},
}


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("name", SCORES)
def test_a_score_is_the_gradient_with_the_other_sign(name: str, stats: bool, seed: int) -> None:
    """Bit for bit, as a change of sign is exact."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = [torch.randn(3, 70, generator=generator)], [torch.randn(3, 70, generator=generator)]
    params = [replace(StepParams(0.1, 0.3), **SCORES[name])]
    options = make_options(x, seed)
    out = []
    for score, g in ((False, grad), (True, [-g for g in grad])):
        state = [t.clone() for t in x]
        stepper = HostStepper(replace(options, score=score), state)
        out.append(stepper.step(state, g, params, 3, with_noise=True, stats=stats))
    (a, a_stats), (b, b_stats) = out
    assert torch.equal(a[0], b[0]) and not torch.equal(a[0], x[0])
    if a_stats is not None and b_stats is not None:
        assert torch.equal(a_stats.clipped, b_stats.clipped) and torch.equal(a_stats.grad_norm, b_stats.grad_norm)
