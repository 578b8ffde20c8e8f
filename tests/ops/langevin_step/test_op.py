"""The op ``langevin_step``: the C++ room against the reference, the choice of backends, the functional entry."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

import mmebm
from mmebm import native, noise
from mmebm.ops.common.params import StepParams, StepStats
from mmebm.ops.langevin_step import op, reference
from mmebm.ops.parity import NORMAL_TOLERANCE, limit
from mmebm.ops.parity import STEP_TOLERANCE as FLOAT_TOLERANCE
from tests.ops.cases import STEP_OPTIONS

pytestmark = pytest.mark.usefixtures("cpp")

SIZES = (1, 3, 5, 63, 64, 65, 127, 1000)
CHAINS = (1, 2, 7, 100)
FIELDS = tuple(field.name for field in fields(StepParams))


def make_options(x: Sequence[Tensor], seed: int, **changes: Any) -> op.StepOptions:
    n = len(x)
    return replace(op.StepOptions(seed=seed, streams=tuple(range(n)), noisy=(True,) * n), **changes)


def draw(shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tuple(shape), generator=generator).to(dtype)


def double_params(params: Sequence[StepParams]) -> list[StepParams]:
    out = []
    for p in params:
        values = {name: getattr(p, name) for name in FIELDS}
        out.append(StepParams(**{k: v.double() if isinstance(v, Tensor) else v for k, v in values.items()}))
    return out


def truth(
    x: Sequence[Tensor],
    grad: Sequence[Tensor] | None,
    params: Sequence[StepParams],
    options: op.StepOptions,
    step: int,
    *,
    with_noise: bool = True,
    stats: bool = False,
) -> tuple[list[Tensor], StepStats | None]:
    """The reference in float64; ``grad=None`` is the half-step."""
    drawn: list[Tensor | None] = [
        noise.normal(
            t.shape, seed=options.seed, step=step, stream=index, chain_offset=options.chain_offset, dtype=torch.float64
        )
        if with_noise and noisy
        else None
        for t, index, noisy in zip(x, options.streams, options.noisy, strict=True)
    ]
    wide, exact = [t.double() for t in x], double_params(params)
    observed = options.observed or None
    if grad is None:
        return reference.perturb(wide, drawn, exact, clamp_noise=options.clamp_noise, observed=observed), None
    return reference.langevin_step(
        wide,
        [g.double() for g in grad],
        drawn,
        exact,
        norm_over=options.norm_over,
        outside=options.outside,
        score=options.score,
        observed=observed,
        stats=stats,
    )


def three_way(ours: Tensor, torchs: Tensor, exact: Tensor, scale: float, context: str) -> None:
    """err(ours) <= 2 err(torch) + tolerance, and the same elements NaN and infinite."""
    for name, check in (("NaN", torch.isnan), ("infinite", torch.isinf)):
        different = (check(ours) != check(torchs)).nonzero()
        assert len(different) == 0, f"{context}: {name} differs from torch at {different[:5].tolist()}"
    finite = torch.isfinite(torchs) & torch.isfinite(exact)
    error = (ours.double() - exact).abs()[finite]
    if error.numel() == 0:
        return
    allowed = limit(torchs[finite], exact[finite], NORMAL_TOLERANCE * scale, FLOAT_TOLERANCE)
    if error.max().item() > allowed:
        worst = int(error.argmax())
        pytest.fail(
            f"{context}: error {error.max():.3e}, limit {allowed:.3e}; at element "
            f"{worst}: {ours[finite][worst].item()!r} against {exact[finite][worst].item()!r}"
        )


def largest_scale(p: StepParams) -> float:
    return float(torch.as_tensor(p.noise_scale).abs().max()) if torch.as_tensor(p.noise_scale).numel() else 0.0


def compare(
    x: list[Tensor],
    grad: list[Tensor],
    params: list[StepParams],
    options: op.StepOptions,
    *,
    step: int = 3,
    with_noise: bool = True,
    stats: bool = True,
    context: str = "",
) -> list[Tensor]:
    """One step in C++ against torch in fp32 and in float64, with statistics; the new state."""
    expected, expected_stats = op.TorchStepper(options).step(
        [t.clone() for t in x], grad, params, step, with_noise=with_noise, stats=stats
    )
    exact, exact_stats = truth(x, grad, params, options, step, with_noise=with_noise, stats=stats)
    ours = [t.clone() for t in x]
    stepper = op.CppStepper(options, ours)
    out, out_stats = stepper.step(ours, grad, params, step, with_noise=with_noise, stats=stats)
    for a, b in zip(out, ours, strict=True):
        assert a is b, "the step is not in place"
    for i, p in enumerate(params):
        three_way(out[i], expected[i], exact[i], largest_scale(p) if with_noise else 0.0, f"{context} tensor {i}")
    if stats:
        assert out_stats is not None and expected_stats is not None and exact_stats is not None
        check_stats(out_stats, expected_stats, exact_stats, context)
        # the statistics are a path of their own: the update must not depend on it
        plain, nothing = stepper.step([t.clone() for t in x], grad, params, step, with_noise=with_noise, stats=False)
        assert nothing is None
        for a, b in zip(plain, out, strict=True):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), f"{context}: stats changed the update"
    return out


def check_stats(ours: StepStats, torchs: StepStats, exact: StepStats, context: str) -> None:
    for name in ("grad_norm", "displacement"):
        a, b, c = getattr(ours, name), getattr(torchs, name), getattr(exact, name)
        assert a.dtype == b.dtype and a.shape == b.shape
        finite = torch.isfinite(b)
        assert torch.equal(torch.isnan(a), torch.isnan(b)), f"{context}: {name} {a} against {b}"
        close = torch.isclose(a[finite].double(), c[finite].double(), rtol=1e-5, atol=1e-5)
        assert close.all(), f"{context}: {name} {a} against {c}"
    assert torch.equal(ours.nonfinite, torchs.nonfinite), f"{context}: {ours.nonfinite} against {torchs.nonfinite}"
    assert ours.clipped.dtype == torchs.clipped.dtype == torch.int64
    # an update within rounding of max_update may fall on either side
    difference = (ours.clipped - torchs.clipped).abs().sum()
    assert difference <= 2, f"{context}: clipped {ours.clipped} against {torchs.clipped}"


def plain_params(**changes: Any) -> StepParams:
    return replace(StepParams(step_size=0.05, noise_scale=0.1), **changes)


# -- noise


@pytest.mark.parametrize("size", (*SIZES, 2, 10, 16, 784, 2047, 2048, 2049, 5000))
def test_noise_is_the_written_definition(isa: str, seed: int, size: int) -> None:
    for chains in CHAINS if size < 2000 else (1, 3):
        x = [torch.zeros(chains, size)]
        options = make_options(x, seed * 0x9E3779B97F4A7C15 % 2**64, streams=(5,), chain_offset=2**32 - 3)
        op.CppStepper(options, x).perturb(x, [plain_params(noise_scale=1.0)], 2**32 + 17)
        exact = noise.normal(
            x[0].shape, seed=options.seed, step=17, stream=5, chain_offset=options.chain_offset, dtype=torch.float64
        )
        assert (x[0].double() - exact).abs().max() <= NORMAL_TOLERANCE


def words_as_int32(words: Tensor) -> Tensor:
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).contiguous()


def test_box_muller_reaches_its_ends(isa: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    near = torch.arange(-300, 300)
    ends = torch.cat([2**k + near for k in range(33)] + [(2**k * math.sqrt(0.5)) // 1 + near for k in range(33)])
    ends = ends.to(torch.int64) % 2**32
    shuffled = ends[torch.randperm(len(ends), generator=generator)]
    free = torch.randint(0, 2**32, (len(ends), 4), generator=generator)
    words = torch.cat(
        [
            torch.stack([ends, shuffled, shuffled, ends], 1),
            torch.stack([ends, free[:, 1], free[:, 2], ends], 1),
            torch.tensor([[0, 0, 0, 2**31], [2**32 - 1, 2**31 - 1, 2**32 - 1, 0], [0, 2**30, 0, 3 * 2**30]]),
        ]
    )
    given = words_as_int32(words)
    out = torch.full((len(words), 4), math.nan)
    name = "generic" if isa == "baseline" else isa
    native.cpu().step_normals(given.data_ptr(), out.data_ptr(), len(words), name)
    exact = noise.box_muller(words)
    assert torch.isfinite(out).all()
    assert (out.double() - exact).abs().max() <= NORMAL_TOLERANCE
    assert out.abs().max() > 6.7  # no truncation


def test_moments(seed: int) -> None:
    x = [torch.zeros(64, 16384)]
    op.CppStepper(make_options(x, seed), x).perturb(x, [plain_params(noise_scale=1.0)], 0)
    z = x[0].double()
    n = z.numel()
    # six standard errors each
    assert abs(z.mean()) < 6 / math.sqrt(n)
    assert abs(z.var() - 1) < 6 * math.sqrt(2 / n)
    assert abs((z**4).mean() - 3) < 6 * math.sqrt(96 / n)
    assert abs((z[:, 1:] * z[:, :-1]).mean()) < 6 / math.sqrt(n)
    assert abs((z[1:] * z[:-1]).mean()) < 6 / math.sqrt(n)


# -- the update against the reference


@pytest.mark.parametrize("name", STEP_OPTIONS)
@pytest.mark.parametrize("outside", ("clamp", "reject"))
@pytest.mark.parametrize("norm_over", ("chain", "tensor"))
def test_each_option(isa: str, seed: int, name: str, outside: str, norm_over: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    for chains, size in ((7, 65), (3, 5000), (2, 1)):
        x, grad = [draw((chains, size), generator)], [draw((chains, size), generator)]
        if outside == "reject":
            x[0][0] *= 0.01
        options = make_options(x, seed, outside=outside, norm_over=norm_over)
        params = [plain_params(**STEP_OPTIONS[name])]
        for with_noise in (True, False):
            if outside == "reject" and near_a_bound(x, grad, params, options, with_noise):
                continue
            context = f"{name} {outside} {norm_over} {chains}x{size} noise {with_noise}"
            compare(x, grad, params, options, with_noise=with_noise, context=context)


def near_a_bound(
    x: list[Tensor], grad: list[Tensor], params: list[StepParams], options: op.StepOptions, with_noise: bool
) -> bool:
    """Whether a proposal is so near a bound that rounding decides about its chain."""
    free = [replace(p, low=None, high=None) for p in params]
    proposals, _ = truth(x, grad, free, options, 3, with_noise=with_noise)
    for y, p in zip(proposals, params, strict=True):
        for bound in (p.low, p.high):
            if bound is not None and y.numel() and ((y - bound).abs() < 1e-5 + 1e-6 * y.abs()).any():
                return True
    return False


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("chains", CHAINS)
def test_sizes(isa: str, seed: int, chains: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, grad = [draw((chains, size), generator)], [draw((chains, size), generator)]
    params = [plain_params(grad_clip=1.0, low=-2.0, high=2.0)]
    compare(x, grad, params, make_options(x, seed), context=f"{chains}x{size}")
    params = [plain_params(grad_norm_clip=1.0, step_size=torch.rand(chains, 1, generator=generator))]
    compare(x, grad, params, make_options(x, seed), context=f"{chains}x{size} per chain")


def random_value(rng: random.Random, generator: torch.Generator, x: Tensor, low: float, high: float) -> float | Tensor:
    """A number, or a tensor of one of the shapes that broadcast."""
    kind = rng.choice(["number", "number", "zero", "chain", "element", "last"])
    if kind == "number":
        return rng.uniform(low, high)
    shape: tuple[int, ...] = ()
    if kind == "chain":
        shape = (x.shape[0], *[1] * (x.dim() - 1))
    elif kind == "element":
        shape = tuple(x.shape)
    elif kind == "last":
        shape = tuple(x.shape[1:])[-1:]
    return low + (high - low) * torch.rand(shape, generator=generator)


@pytest.mark.parametrize("part", range(6))
def test_random_combinations(isa: str, seed: int, part: int) -> None:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    for case in range(25):
        chains = rng.choice((1, 2, 5, 33))
        x, grad, params, masks = [], [], [], []
        for _ in range(rng.choice((1, 1, 2, 3, 5))):
            shape = rng.choice([(), (1,), (3,), (10,), (2, 3), (64,), (3, 7, 5), (130,), (2500,)])
            t = draw((chains, *shape), generator)
            x.append(t)
            grad.append(draw(t.shape, generator) * rng.choice((0.1, 1.0, 10.0)))
            if rng.random() < 0.1 and t.numel():
                grad[-1].view(-1)[rng.randrange(t.numel())] = rng.choice((math.nan, math.inf, -math.inf))
            value = partial(random_value, rng, generator, t)
            maybe = partial(lambda value, low, high: value(low, high) if rng.random() < 0.3 else None, value)
            # a power of two: torch divides a number by a tensor by its reciprocal, and would count 1 - 2^-24 as a clip
            limit = rng.choice((0.5, 1.0, 2.0, 4.0))
            norm: Any = rng.choice([None, None, limit, torch.full((chains, *[1] * (t.dim() - 1)), limit)])
            bounds = (maybe(-2.0, -0.5), maybe(0.5, 2.0))
            params.append(
                StepParams(
                    value(0.001, 0.2),
                    value(0.0, 0.2),
                    maybe(0.1, 2.0),
                    norm,
                    maybe(0.01, 0.5),
                    maybe(0.5, 2.0),
                    *bounds,
                )
            )
            masks.append(
                None
                if rng.random() < 0.6
                else torch.rand(rng.choice([t.shape, t.shape[1:]]), generator=generator) < 0.3
            )
        outside = rng.choice(("clamp", "clamp", "reject"))
        over = rng.choice(("chain", "tensor"))
        if over == "tensor":
            params = [replace(p, grad_norm_clip=2.0) if p.grad_norm_clip is not None else p for p in params]
        options = make_options(
            x,
            rng.getrandbits(64),
            outside=outside,
            norm_over=over,
            observed=tuple(masks),
            chain_offset=rng.randrange(99),
            noisy=tuple(rng.random() < 0.8 for _ in x),
            streams=tuple(rng.randrange(2**24) for _ in x),
        )
        with_noise = rng.random() < 0.8
        if outside == "reject" and near_a_bound(x, grad, params, options, with_noise):
            continue
        compare(x, grad, params, options, with_noise=with_noise, context=f"case {case} of seed {seed}: {params}")


@pytest.mark.parametrize("clamp_noise", (False, True))
def test_perturb(isa: str, seed: int, clamp_noise: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    for shape in ((5, 7), (3, 2500), (100, 10), (2,)):
        x = [draw(shape, generator), draw(shape, generator)]
        masks = (None, torch.rand(shape, generator=generator) < 0.5)
        options = make_options(x, seed, clamp_noise=clamp_noise, observed=masks, noisy=(True, shape != (5, 7)))
        scale = torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator)
        params = [plain_params(low=-0.2, high=0.5), plain_params(noise_scale=scale)]
        expected = op.TorchStepper(options).perturb([t.clone() for t in x], params, 9)
        exact, _ = truth(x, None, params, options, 9)
        out = op.CppStepper(options, x).perturb([t.clone() for t in x], params, 9)
        for i in range(2):
            three_way(out[i], expected[i], exact[i], largest_scale(params[i]), f"{shape} tensor {i}")
        assert torch.equal(out[1][masks[1]], x[1][masks[1]])


def test_nan_and_infinity(isa: str, seed: int) -> None:
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
            compare([x0], [g0], [plain_params(**changes)], make_options([x0], seed, outside=outside), context=name)
            simple = [x0.clone()]
            expected, _ = op.TorchStepper(make_options(simple, seed)).step(
                [x0.clone()], [g0], [plain_params(**changes)], 0, with_noise=True, stats=False
            )
            op.CppStepper(make_options(simple, seed), simple).step(
                simple, [g0], [plain_params(**changes)], 0, with_noise=True, stats=False
            )
            assert torch.equal(torch.isnan(simple[0]), torch.isnan(expected[0])), name


def test_one_broken_chain_breaks_no_other(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, grad = [draw((5, 33), generator)], [draw((5, 33), generator)]
    grad[0][2, 7] = math.nan
    out = compare(x, grad, [plain_params(grad_norm_clip=1.0)], make_options(x, seed))
    assert torch.isnan(out[0][2]).all()
    assert torch.isfinite(out[0][[0, 1, 3, 4]]).all()


def test_rejection_keeps_a_chain_in_all_its_tensors(isa: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = [0.1 * draw((6, 3000), generator), 0.1 * draw((6, 5), generator), draw((6, 2), generator)]
    grad = [torch.zeros_like(t) for t in x]
    grad[0][1, 2999] = 1e3
    grad[1][3, 0] = -1e3
    grad[1][4, 1] = math.nan
    quiet = plain_params(noise_scale=0.01, high=5.0)
    params = [replace(quiet, low=-5.0), quiet, plain_params()]
    before = [t.clone() for t in x]
    out = compare(x, grad, params, make_options(x, seed, outside="reject"))
    for t, b in zip(out, before, strict=True):
        moved = (t != b).any(dim=1)
        assert moved.tolist() == [True, False, True, False, False, True]


def test_observed_elements_stay(isa: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, grad = [draw((9, 3, 11), generator)], [draw((9, 3, 11), generator)]
    x[0][0, 0, 0] = math.nan
    for shape in ((9, 3, 11), (3, 11), (11,), (9, 1, 1), (1, 1, 1)):
        mask = torch.rand(shape, generator=generator) < 0.5
        out = compare(x, grad, [plain_params(low=-0.1)], make_options(x, seed, observed=(mask,)))
        kept = mask.expand(x[0].shape)
        assert torch.equal(out[0][kept].nan_to_num(9.0), x[0][kept].nan_to_num(9.0))


@pytest.mark.parametrize("shapes", ([(0, 5)], [(0,), (0, 3)], [(4, 0)], [(4, 0), (4, 3)], [(3,)]))
def test_empty(isa: str, seed: int, shapes: list[tuple[int, ...]]) -> None:
    x, grad = [torch.ones(shape) for shape in shapes], [torch.ones(shape) for shape in shapes]
    params = [plain_params(grad_norm_clip=1.0, low=-1.0) for _ in shapes]
    for outside in ("clamp", "reject"):
        compare(x, grad, params, make_options(x, seed, outside=outside))
    assert op.CppStepper(make_options(x, seed), x).perturb(x, params, 0) is x


# -- what results must not depend on


def run_chain(
    x: list[Tensor], seed: int, steps: int = 3, stats: bool = False, **changes: Any
) -> tuple[list[Tensor], list[Tensor]]:
    x = [t.clone() for t in x]
    options = make_options(x, seed, **changes)
    stepper = op.CppStepper(options, x)
    params = [plain_params(grad_norm_clip=2.0, prior_std=3.0, max_update=0.3, low=-2.0, high=2.0) for _ in x]
    seen: list[Tensor] = []
    for k in range(steps):
        x, found = stepper.step(x, [torch.sin(3 * t) for t in x], params, k, with_noise=True, stats=stats)
        if found is not None:
            seen += [found.grad_norm, found.displacement, found.clipped, found.nonfinite]
    return x, seen


def test_avx2_and_avx512_agree_bit_for_bit(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    available = native.cpu().isas()
    x = [draw(shape, torch.Generator().manual_seed(seed)) for shape in ((20, 3, 28, 28), (20, 10), (20,))]
    results = {}
    for name in ("generic", "avx2", "avx512"):
        if name in available:
            monkeypatch.setenv("MMEBM_CPU_ISA", name)
            results[name] = run_chain(x, seed, stats=True)
    if "avx512" in results:
        for a, b in zip(chain(*results["avx2"]), chain(*results["avx512"]), strict=True):
            assert torch.equal(a, b)
    # the generic loops have no fused multiply-add
    for a, b in zip(results["generic"][0], next(reversed(results.values()))[0], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("outside", ("clamp", "reject"))
@pytest.mark.parametrize("over", ("chain", "tensor"))
def test_threads_do_not_matter(seed: int, outside: str, over: str) -> None:
    x = [draw(shape, torch.Generator().manual_seed(seed)) for shape in ((40, 3, 28, 28), (40, 10), (40, 64))]
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(list(chain(*run_chain(x, seed, stats=True, outside=outside, norm_over=over))))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("outside", ("clamp", "reject"))
def test_a_batch_may_be_split(isa: str, seed: int, outside: str) -> None:
    shapes = ((11, 3, 28, 28), (11, 10), (11, 3), (11, 64), (11,))
    x = [draw(shape, torch.Generator().manual_seed(seed)) for shape in shapes]
    whole, whole_stats = run_chain(x, seed, stats=True, outside=outside, chain_offset=5)
    for cut in (1, 4):
        first, first_stats = run_chain([t[:cut] for t in x], seed, stats=True, outside=outside, chain_offset=5)
        rest, rest_stats = run_chain([t[cut:] for t in x], seed, stats=True, outside=outside, chain_offset=5 + cut)
        for a, b, c in zip(whole + whole_stats, first + first_stats, rest + rest_stats, strict=True):
            assert torch.equal(a, torch.cat([b, c]))


def test_a_small_state_is_the_start_of_a_large_one(isa: str, seed: int) -> None:
    # by chain, by vectors shared between chains, in parts: all the same noise
    out = {}
    for size in (3, 40, 784, 2048, 9000):
        x = [torch.zeros(3, size)]
        out[size] = op.CppStepper(make_options(x, seed), x).perturb(x, [plain_params(noise_scale=1.0)], 4)[0]
    for size, z in out.items():
        assert torch.equal(z, out[9000][:, :size])


# -- 16-bit storage


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("outside", ("clamp", "reject"))
def test_sixteen_bits_are_the_reference_rounded(isa: str, seed: int, dtype: torch.dtype, outside: str) -> None:
    # Where no normal enters, both compute the same fp32 numbers, so the rounded ones are equal bit for bit.
    generator = torch.Generator().manual_seed(seed)
    for shape in ((3, 1), (4, 5), (7, 63), (2, 65), (5, 1000), (2, 5000), (100, 10), (100, 16)):
        x = [draw(shape, generator, dtype)]
        for grad_dtype in (dtype, torch.float32):
            grad = [draw(shape, generator, grad_dtype)]
            options = make_options(x, seed, outside=outside, noisy=(False,), chain_offset=3)
            params = [plain_params(step_size=2.0**-7, low=-2.0, high=2.0 if outside == "clamp" else 3.5)]
            a, a_stats = op.TorchStepper(options).step([x[0].clone()], grad, params, 8, with_noise=True, stats=True)
            ours = [x[0].clone()]
            b, b_stats = op.CppStepper(options, ours).step(ours, grad, params, 8, with_noise=True, stats=True)
            assert torch.equal(a[0], b[0]), (shape, grad_dtype)
            assert a_stats is not None and b_stats is not None
            check_stats(b_stats, a_stats, a_stats, str(shape))
            plain, _ = op.CppStepper(options, x).step([x[0].clone()], grad, params, 8, with_noise=True, stats=False)
            assert torch.equal(plain[0], b[0])
            half_step = op.CppStepper(replace(options, clamp_noise=True), x).perturb([x[0].clone()], params, 8)
            assert torch.equal(half_step[0], x[0].clamp(-2.0, 2.0 if outside == "clamp" else 3.5))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_sixteen_bits_at_the_ends(isa: str, seed: int, dtype: torch.dtype) -> None:
    # 65504 and 65520 are the largest fp16 and what rounds to infinity; fp16 has subnormals below 6.1e-5
    ends = [0.0, math.inf, -math.inf, math.nan, 6e-5, -6e-5, 3e-6, 1e-7, -2e-8, 60000.0, 65504.0, 1.0, -1.0, 4097.0]
    values = torch.tensor(ends)
    x = [torch.zeros(64, len(ends), dtype=dtype)]
    grad = [-(values * (1 + torch.linspace(-1e-3, 1e-3, 64)[:, None]))]
    options = make_options(x, seed, noisy=(False,))
    for shift in (1.0, 1.03):
        params = [plain_params(step_size=shift)]
        expected, _ = op.TorchStepper(options).step(x, grad, params, 1, with_noise=False, stats=False)
        out, _ = op.CppStepper(options, x).step([x[0].clone()], grad, params, 1, with_noise=False, stats=False)
        nan = torch.isnan(expected[0])
        assert torch.equal(torch.isnan(out[0]), nan)
        assert torch.equal(out[0][~nan], expected[0][~nan])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_sixteen_bits_with_noise(isa: str, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, grad = [draw((20, 301), generator, dtype)], [draw((20, 301), generator, dtype)]
    params = [plain_params(prior_std=2.0)]
    options = make_options(x, seed)
    ours = [x[0].clone()]
    out, _ = op.CppStepper(options, ours).step(ours, grad, params, 1, with_noise=True, stats=False)
    expected, _ = op.TorchStepper(options).step(x, grad, params, 1, with_noise=True, stats=False)
    different = out[0] != expected[0]
    # a normal that is off by 1e-6 changes the rounding of about that many in a thousand, and by one unit only; where
    # terms cancel to next to nothing, units are finer than that error times the noise's scale
    assert different.float().mean() < 2e-3
    bits = (out[0].view(torch.int16).int() - expected[0].view(torch.int16).int()).abs()
    off = (out[0].double() - expected[0].double()).abs()
    assert ((bits <= 1) | (off <= 1e-6 * params[0].noise_scale)).all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_small_steps_are_not_lost(seed: int, dtype: torch.dtype) -> None:
    x = [torch.ones(1, 20000, dtype=dtype)]
    stepper = op.CppStepper(make_options(x, seed, noisy=(False,)), x)
    grad = [torch.full((1, 20000), -1.0)]
    for k in range(100):
        stepper.step(x, grad, [plain_params(step_size=1e-4)], k, with_noise=False, stats=False)
    # each step is a fiftieth of a bf16 unit: rounding to nearest would stay at 1
    assert abs(x[0].double().mean() - 1.01) < 5e-4


def test_mixed_dtypes(isa: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    x, grad = [draw((6, 37), generator, d) for d in dtypes], [draw((6, 37), generator, d) for d in dtypes]
    options = make_options(x, seed, noisy=(True, False, False))
    params = [plain_params() for _ in x]
    expected, _ = op.TorchStepper(options).step(x, grad, params, 1, with_noise=True, stats=False)
    out, _ = op.CppStepper(options, x).step([t.clone() for t in x], grad, params, 1, with_noise=True, stats=False)
    torch.testing.assert_close(out[0], expected[0], rtol=0, atol=1e-6)
    # C++ fuses a multiplication and an addition: the last bit of a sum in float32 decides one stochastic rounding in
    # 2^15, here of 222 a tensor, to the neighbour in 16 bits
    for ours, other, unit in zip(out[1:], expected[1:], (2.0**-7, 2.0**-10)):
        assert (ours != other).sum() <= 1
        torch.testing.assert_close(ours.float(), other.float(), rtol=unit, atol=0)


# -- what the caller may do


def test_in_place_and_pointers_may_change(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = [draw((4, 33), generator)]
    grad = [draw((4, 33), generator)]
    options, params = make_options(x, seed), [plain_params()]
    stepper = op.CppStepper(options, x)
    start, address = x[0].clone(), x[0].data_ptr()
    out, _ = stepper.step(x, grad, params, 0, with_noise=True, stats=False)
    assert out[0].data_ptr() == address and not torch.equal(x[0], start)
    again, _ = stepper.step([start.clone()], grad, params, 0, with_noise=True, stats=False)
    assert torch.equal(again[0], out[0])
    # a state that is no longer contiguous is copied, and not written to
    strided = start.t().contiguous().t()
    copy, _ = stepper.step([strided], grad, params, 0, with_noise=True, stats=False)
    assert torch.equal(copy[0], out[0]) and torch.equal(strided, start)


def test_gradients_of_any_layout(isa: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, grad = [draw((4, 6, 8), generator)], [draw((4, 6, 8), generator)]
    stepper, params = op.CppStepper(make_options(x, seed), x), [plain_params()]
    start = x[0].clone()

    def with_gradient(g: Tensor) -> Tensor:
        return stepper.step([start.clone()], [g], params, 0, with_noise=True, stats=False)[0][0]

    expected = with_gradient(grad[0])
    for layout in (
        grad[0].transpose(1, 2).contiguous().transpose(1, 2),
        grad[0].double(),
        grad[0].flip(1).flip(1),
        torch.stack([grad[0], grad[0]], -1)[..., 0],
        grad[0].clone().requires_grad_(),
    ):
        assert torch.equal(with_gradient(layout), expected)
    ones = torch.ones(1, 1, 1).expand(4, 6, 8)
    assert torch.equal(with_gradient(ones), with_gradient(ones.contiguous()))
    half = grad[0].bfloat16()
    assert torch.equal(with_gradient(half), with_gradient(half.float()))
    assert torch.equal(with_gradient(grad[0]), expected)


def test_constants_may_change_along_the_chain(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = [draw((5, 40), generator)]
    options = make_options(x, seed)
    ours = [x[0].clone()]
    stepper, torchs = op.CppStepper(options, ours), op.TorchStepper(options)
    number, per_chain = torch.tensor(0.1), 0.5 + torch.rand(5, 1, generator=generator)
    element = torch.rand(40, generator=generator)
    rows = [
        plain_params(),
        plain_params(step_size=0.2, low=0.0),
        plain_params(step_size=number, grad_clip=per_chain),
        plain_params(step_size=number, grad_clip=per_chain),
        plain_params(grad_clip=element, noise_scale=per_chain),
        plain_params(prior_std=per_chain.t().contiguous().t()),
        plain_params(),
    ]
    for k, p in enumerate(rows * 2):
        grad = [draw((5, 40), generator)]
        theirs, _ = torchs.step(ours, grad, [p], k, with_noise=True, stats=False)
        stepper.step(ours, grad, [p], k, with_noise=True, stats=False)
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=2e-6)
        # written to in place: the next step sees it, whether it was copied or not
        for t in (number, per_chain, element):
            t.mul_(0.9)


def test_seed_and_step_may_be_tensors(seed: int) -> None:
    x = [torch.zeros(3, 50)]
    seed_tensor, step = torch.tensor(seed), torch.tensor([7])
    a = op.CppStepper(make_options(x, seed), x).perturb([x[0].clone()], [plain_params()], 7)[0]
    stepper = op.CppStepper(replace(make_options(x, 0), seed=seed_tensor), x)
    assert torch.equal(stepper.perturb([x[0].clone()], [plain_params()], step)[0], a)
    seed_tensor += 1
    assert not torch.equal(stepper.perturb([x[0].clone()], [plain_params()], step)[0], a)
    negative = op.CppStepper(make_options(x, -1), x).perturb([x[0].clone()], [plain_params()], 7)[0]
    unsigned = op.CppStepper(make_options(x, 2**64 - 1), x).perturb([x[0].clone()], [plain_params()], 7)[0]
    assert torch.equal(negative, unsigned)


def test_inference_mode(seed: int) -> None:
    with torch.inference_mode():
        x = [torch.zeros(3, 50)]
        stepper = op.CppStepper(make_options(x, seed), x)
        scale = torch.full((50,), 0.1)
        a = stepper.perturb([x[0].clone()], [plain_params(noise_scale=scale)], 7)[0]
        scale.mul_(2)
        b = stepper.perturb([x[0].clone()], [plain_params(noise_scale=scale)], 7)[0]
    torch.testing.assert_close(2 * a, b)


def test_two_threads_with_a_stepper_each(seed: int) -> None:
    x = [draw((32, 3000), torch.Generator().manual_seed(seed))]
    expected = run_chain(x, seed, 20)[0][0]
    results: list[Tensor] = []
    workers = [threading.Thread(target=lambda: results.append(run_chain(x, seed, 20)[0][0])) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 3 and all(torch.equal(r, expected) for r in results)


FORK = """
import os, sys, torch
from mmebm.ops.langevin_step import op
from mmebm.ops.common.params import StepParams
torch.set_num_threads(2)
def run():
    # from bytes, because torch's own parallel loops hang in a child that did not set its threads to 1
    x = [torch.frombuffer(bytearray(4 * 64 * 4000), dtype=torch.float32).view(64, 4000)]
    s = op.CppStepper(op.StepOptions(seed=1, streams=(0,), noisy=(True,)), x)
    for k in range(5):
        s.step(x, grad, [StepParams(0.1, 0.1)], k, with_noise=True, stats=False)
    return hash(x[0].numpy().tobytes())
grad = [torch.ones(64, 4000)]
before = run()
pid = os.fork()
if pid == 0:
    os._exit(0 if run() == before else 3)
_, status = os.waitpid(pid, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
assert run() == before
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork() -> None:
    # in a process of its own: it forks with threads running
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# -- the choice of a backend


def test_auto_takes_cpp_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    x = [torch.zeros(3, 4)]
    chosen, reason = op.stepper("auto", x, make_options(x, 0))
    assert (chosen.name, chosen.inplace) == ("cpp", True) and "cpu" in reason
    fallbacks = {"float64": [torch.zeros(3, 4, dtype=torch.float64)], "rng": x}
    for word, state in fallbacks.items():
        options = make_options(state, 0, rng="torch" if word == "rng" else "philox")
        chosen, reason = op.stepper("auto", state, options)
        assert chosen.name == "torch" and word in reason and "cpp" in reason
        with pytest.raises(native.BackendError, match=word):
            op.stepper("cpp", state, options)
    monkeypatch.setattr(native, "_load", lambda name: (None, "not built for this test"))
    chosen, reason = op.stepper("auto", x, make_options(x, 0))
    assert chosen.name == "torch" and "not built for this test" in reason
    with pytest.raises(native.BackendError, match="not built for this test"):
        op.stepper("cpp", x, make_options(x, 0))


def test_environment_variable_counts_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    x = [torch.zeros(3, 4)]
    monkeypatch.setenv("MMEBM_BACKEND", "torch")
    chosen, reason = op.stepper("auto", x, make_options(x, 0))
    assert chosen.name == "torch" and "MMEBM_BACKEND" in reason
    assert op.stepper("cpp", x, make_options(x, 0))[0].name == "cpp"
    monkeypatch.setenv("MMEBM_BACKEND", "cpp")
    with pytest.raises(native.BackendError, match="cpp"):
        op.stepper("auto", [torch.zeros(3, 4, dtype=torch.float64)], make_options(x, 0))
    monkeypatch.setenv("MMEBM_BACKEND", "fast")
    with pytest.raises(ValueError, match="MMEBM_BACKEND=fast"):
        op.stepper("auto", x, make_options(x, 0))


def test_unknown_and_missing_backends() -> None:
    x = [torch.zeros(3, 4)]
    with pytest.raises(ValueError, match="'numpy'"):
        op.stepper("numpy", x, make_options(x, 0))
    with pytest.raises(native.BackendError, match="cuda"):
        op.stepper("cuda", x, make_options(x, 0))
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        with pytest.raises(native.BackendError, match="triton"):
            op.stepper("triton", x, make_options(x, 0))


def test_instruction_set_must_be_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMEBM_CPU_ISA", "sse9")
    x = [torch.zeros(3, 4)]
    with pytest.raises(ValueError, match="sse9"):
        op.CppStepper(make_options(x, 0), x)


def test_stepper_names_what_is_wrong(seed: int) -> None:
    x, grad = [torch.zeros(3, 40), torch.zeros(3, 5)], [torch.zeros(3, 40), torch.zeros(3, 5)]
    stepper, params = op.CppStepper(make_options(x, seed), x), [plain_params(), plain_params()]

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
        "low of tensor 0": {"params": [plain_params(low=math.nan), params[1]]},
        "grad_clip of tensor 1": {"params": [params[0], plain_params(grad_clip=torch.tensor([math.nan]))]},
        "step_size of tensor 0": {"params": [plain_params(step_size=torch.ones(7)), params[1]]},
        "noise_scale of tensor 0": {"params": [plain_params(noise_scale=torch.ones(3, 1, device="meta")), params[1]]},
    }.items():
        with pytest.raises(ValueError, match=name):
            step(**changes)
        step()
    with pytest.raises(ValueError, match=r"observed\[0\]"):
        op.CppStepper(make_options(x, seed, observed=(torch.ones(7, dtype=torch.bool), None)), x)
    with pytest.raises(ValueError, match=r"observed\[1\]"):
        op.CppStepper(make_options(x, seed, observed=(None, torch.ones(3, 5))), x)
    with pytest.raises(ValueError, match="tensor_index"):
        op.CppStepper(make_options(x, seed, streams=(0, 2**24)), x)


def test_binding_refuses_what_would_crash() -> None:
    cpu = native.cpu()
    with pytest.raises(ValueError):
        cpu.LangevinStep(-1, 0, 0, "auto")
    step = cpu.LangevinStep(2, 0, 0, "auto")
    step.add(3, 0, True, 0, 0)
    for call in (
        lambda: step.add(-1, 0, True, 0, 0),
        lambda: step.add(1, 0, True, 3, 0),
        lambda: step.set(1, 0, 1, 0.0, 0),
        lambda: step.set(0, 8, 1, 0.0, 0),
        lambda: step.set(0, 0, 2, 0.0, 0),
        lambda: step.set_grad(1, 0),
        lambda: step.perturb([0], 0, 0, 1),
        lambda: step.perturb([], 0, 0, 1),
        lambda: step.perturb((1,), 0, 0, 1),
    ):
        with pytest.raises(ValueError):
            call()
    with pytest.raises(TypeError):
        step.perturb([1.5], 0, 0, 1)


# -- the functional entry


def entry_case(seed: int, chains: int = 4) -> tuple[list[Tensor], list[Tensor], dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    x = [draw((chains, 3, 5), generator), draw((chains, 10), generator)]
    grad = [draw(t.shape, generator) for t in x]
    settings: dict[str, Any] = {
        "step_size": [0.1, torch.rand(chains, 1, generator=generator)],
        "noise_scale": 0.05,
        "grad_clip": [None, 0.5],
        "low": -1.0,
        "high": 1.0,
        "observed": [None, torch.arange(10) < 3],
        "seed": seed,
        "step": 4,
        "chain_offset": 2,
    }
    return x, grad, settings


@pytest.mark.parametrize("backend", ("auto", "torch", "cpp"))
def test_entry(seed: int, backend: str) -> None:
    x, grad, settings = entry_case(seed)
    before = [t.clone() for t in x]
    out = op.langevin_step(x, grad, **settings, backend=backend)
    params = [
        StepParams(0.1, 0.05, low=-1.0, high=1.0),
        StepParams(settings["step_size"][1], 0.05, grad_clip=0.5, low=-1.0, high=1.0),
    ]
    options = make_options(x, seed, chain_offset=2, observed=(None, settings["observed"][1]))
    expected, _ = op.TorchStepper(options).step(x, grad, params, 4, with_noise=True, stats=False)
    for a, b, c, d in zip(out, expected, x, before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        assert torch.equal(c, d) and a.data_ptr() != c.data_ptr()
    del settings["noise_scale"]
    settings.update(noise_scale=0.05, noise_at="before", backend=backend)
    first = op.langevin_step(x, None, **settings, clamp_noise=True)
    half = op.TorchStepper(replace(options, clamp_noise=True)).perturb(x, params, 4)
    second = op.langevin_step(first, grad, **settings)
    whole, _ = op.TorchStepper(options).step(half, grad, params, 4, with_noise=False, stats=False)
    for a, b in zip(second, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_entry_takes_any_layout_and_dtype(seed: int) -> None:
    x, grad, settings = entry_case(seed)
    expected = op.langevin_step(x, grad, **settings)
    strided = [t.transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for t in x]
    for a, b in zip(op.langevin_step(strided, grad, **settings), expected, strict=True):
        assert torch.equal(a, b) and a.is_contiguous() and not a.requires_grad
    double = op.langevin_step([t.double() for t in x], [g.double() for g in grad], **settings)
    for a, b in zip(double, expected, strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a.float(), b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ("torch", "cpp"))
def test_entry_has_the_state_s_shapes_and_dtypes(seed: int, backend: str) -> None:
    """Whatever the gradient's and the constants' are; a compiled caller believes the fake. Seeds have 64 bits."""
    x, grad, settings = entry_case(seed)
    expected = op.langevin_step(x, grad, **settings, backend=backend)
    settings["step_size"] = [t.double() if isinstance(t, Tensor) else t for t in settings["step_size"]]
    wide = op.langevin_step(x, [g.double() for g in grad], **settings, backend=backend)
    for a, b in zip(wide, expected, strict=True):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    a, b = (op.langevin_step(x, grad, **{**settings, "seed": s}, backend=backend) for s in (2**64 - 1, -1))
    assert all(torch.equal(*pair) for pair in zip(a, b, strict=True))
    # on one chain a constant of several rows made several chains
    one = [t[:1] for t in x]
    with pytest.raises(ValueError, match=r"low of tensor 0 of shape \(5, 1\)"):
        op.langevin_step(
            one, one, step_size=0.1, noise_scale=0.0, seed=seed, low=[torch.zeros(5, 1), None], backend=backend
        )


def test_opcheck(seed: int) -> None:
    x, grad, _ = entry_case(seed)
    numbers, present = [0.1, 0.05, 0.0, 1.0, 0.0, 0.0, -1.0, 1.0] * 2, [0b11001011] * 2
    tensors: list[Tensor | None] = [None] * 16
    tensors[8] = torch.rand(4, 1)
    for phase in ("step", "drift", "perturb"):
        torch.library.opcheck(
            torch.ops.mmebm.langevin_step.default,
            (x, [] if phase == "perturb" else grad, numbers, tensors, present),
            {
                "phase": phase,
                "seed": seed,
                "step": 3,
                "chain_offset": 0,
                "observed": [None, torch.arange(10) < 3],
                "norm_over": "chain",
                "outside": "clamp",
                "clamp_noise": False,
                "score": False,
                "backend": "auto",
            },
        )


def test_compiles_as_one_graph(seed: int) -> None:
    x, grad, settings = entry_case(seed)
    del settings["step"]
    graphs = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(module)
        return module.forward

    def two_steps(x: list[Tensor], grad: list[Tensor], step: int) -> list[Tensor]:
        y = op.langevin_step(x, grad, **settings, step=step)
        return op.langevin_step(y, [torch.sin(t) for t in y], **settings, step=step + 1)

    torch._dynamo.reset()
    compiled = torch.compile(two_steps, fullgraph=True, backend=backend)
    for step in range(4):
        for a, b in zip(compiled(x, grad, step), two_steps(x, grad, step), strict=True):
            assert torch.equal(a, b)
    # the first graph has the step as a constant, the second as a number: no graph per step
    assert len(graphs) <= 2
    torch._dynamo.reset()


def test_entry_names_what_is_wrong(seed: int) -> None:
    x, grad, settings = entry_case(seed)
    mask = settings.pop("observed")
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (TypeError, "x must be a list", {"x": x[0]}),
        (ValueError, "x must hold", {"x": [], "grad": []}),
        (TypeError, r"x\[0\]", {"x": [torch.zeros(4, 3, dtype=torch.int64)], "grad": grad[:1]}),
        (ValueError, r"x\[1\]", {"x": [x[0], torch.zeros(5, 10)]}),
        (TypeError, "grad must be a list", {"grad": grad[0]}),
        (ValueError, "grad must have 2", {"grad": grad[:1]}),
        (ValueError, r"grad\[1\]", {"grad": [grad[0], grad[1].t()]}),
        (ValueError, "grad must be given", {"grad": None}),
        (ValueError, "noise_at", {"noise_at": "later"}),
        (ValueError, "norm_over", {"norm_over": "row"}),
        (ValueError, "outside", {"outside": "wrap"}),
        (ValueError, "observed must have 2", {"observed": mask[:1]}),
        (TypeError, r"observed\[1\]", {"observed": [None, torch.ones(10)]}),
        (ValueError, "step_size must be given", {"step_size": None}),
        (ValueError, "step_size must be one value or a list of 2", {"step_size": [0.1]}),
        (TypeError, r"noise_scale\[0\]", {"noise_scale": "big"}),
        (ValueError, r"low\[0\]", {"low": math.nan}),
        (ValueError, "prior_std of tensor 0", {"prior_std": torch.ones(7)}),
        (ValueError, r"step_size of tensor 0 of shape \(2, 4, 3\)", {"step_size": torch.ones(2, 4, 3)}),
        (ValueError, r"observed\[0\] of shape \(2, 4, 3\)", {"observed": [torch.ones(2, 4, 3) > 0, None]}),
        (TypeError, r"high\[0\] must hold real numbers", {"high": torch.ones(4, 1) > 0}),
        (TypeError, r"grad_clip\[0\] must hold real numbers", {"grad_clip": torch.ones(4, 1) * 1j}),
        (TypeError, "seed must be an int", {"seed": 1.5}),
        (ValueError, "seed must be an int", {"seed": 2**64}),
        (TypeError, "step must be an int", {"step": True}),
        (ValueError, "chain_offset must be an int", {"chain_offset": -1}),
        (TypeError, "score must be True or False", {"score": "no"}),
        (ValueError, "'fast'", {"backend": "fast"}),
    ]
    for error, name, changes in cases:
        call = {"x": x, "grad": grad, **settings, **changes}
        with pytest.raises(error, match=name):
            op.langevin_step(call.pop("x"), call.pop("grad"), **call)


SCORES: dict[str, dict[str, Any]] = {
    "plain": {},
    "every limit": {"grad_clip": 0.9, "grad_norm_clip": 3.0, "max_update": 0.25, "low": -1.2, "high": 1.1},
    "prior": {"prior_std": 0.7},
    "per chain": {"step_size": torch.tensor([[0.1], [0.2], [0.3]]), "prior_std": torch.tensor([[0.5], [2.0], [1.0]])},
    "per element": {"step_size": torch.linspace(0.1, 0.2, 70), "prior_std": torch.linspace(0.5, 2, 210).view(3, 70)},
}


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("name", SCORES)
def test_a_score_is_the_gradient_with_the_other_sign(name: str, stats: bool, isa: str, seed: int) -> None:
    """Bit for bit, as a change of sign is exact."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = [torch.randn(3, 70, generator=generator)], [torch.randn(3, 70, generator=generator)]
    params = [replace(StepParams(0.1, 0.3), **SCORES[name])]
    options = make_options(x, seed)
    out = []
    for score, g in ((False, grad), (True, [-g for g in grad])):
        state = [t.clone() for t in x]
        stepper = op.CppStepper(replace(options, score=score), state)
        out.append(stepper.step(state, g, params, 3, with_noise=True, stats=stats))
    (a, a_stats), (b, b_stats) = out
    assert torch.equal(a[0], b[0]) and not torch.equal(a[0], x[0])
    if a_stats is not None and b_stats is not None:
        assert torch.equal(a_stats.clipped, b_stats.clipped) and torch.equal(a_stats.grad_norm, b_stats.grad_norm)


# parts of a channel, of a chain, several chains a tile; one position; more channels than positions
@pytest.mark.parametrize("shape", [(3, 3, 5, 7), (2, 16, 40, 40), (5, 2, 1, 1), (2, 70, 3, 3), (2, 3, 64, 33)])
@pytest.mark.parametrize("name", ["plain", "every limit", "per element", "perturb", "observed"])
def test_channels_last_is_taken_as_it_is(name: str, shape: tuple[int, ...], isa: str, seed: int) -> None:
    """The same numbers bit for bit, in the memory that the state had."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    options = make_options([x], seed)
    params = StepParams(0.1, 0.3, low=-1.0, high=1.0)
    if name == "every limit":
        params = StepParams(0.1, 0.3, **SCORES[name])
    if name == "per element":
        params = StepParams(torch.rand(shape, generator=generator), torch.rand(shape, generator=generator))
    if name == "observed":
        options = replace(options, observed=(torch.rand(shape, generator=generator) < 0.5,))
    last = {"memory_format": torch.channels_last}
    for stats in (False, True):
        ours, expected = x.clone(**last), x.clone()
        for state, g in ((expected, grad), (ours, grad.clone(**last))):
            stepper = op.CppStepper(options, [state])
            if name == "perturb":
                out = stepper.perturb([state], [params], 3)
            else:
                out, _ = stepper.step([state], [g], [params], 3, with_noise=True, stats=stats)
                out, _ = stepper.step(out, [grad], [params], 4, with_noise=False, stats=stats)
            assert out[0] is state
        assert ours.is_contiguous(**last) and torch.equal(ours, expected)


def test_channels_last_chain_keeps_its_order() -> None:
    x = torch.rand(4, 3, 6, 5)
    energy = lambda x: x.square().sum((1, 2, 3)) + x.sin().sum((1, 2, 3))
    run = lambda x: mmebm.Langevin(0.1, bounds=(0, 1)).sample(energy, x, 5, seed=1)
    out = run(x.contiguous(memory_format=torch.channels_last))
    assert out.state.is_contiguous(memory_format=torch.channels_last) and out.info["backend"] == "cpp"
    assert torch.equal(out.state, run(x).state)
