"""``langevin_step`` on a GPU, in Triton and in CUDA C++: against float64, in a graph, on streams, beyond 2^31 bytes.

``python -m pytest -m gpu``; skipped with the reason where there is no CUDA device.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import pytest
import torch

from mmebm import noise
from mmebm.ops.common.params import StepParams
from mmebm.ops.langevin_step import StepOptions, Stepper, TorchStepper, op, reference
from mmebm.ops.parity import NORMAL_TOLERANCE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch.cuda.is_available() is False"),
]

Make = Callable[..., Stepper]

DEVICE = torch.device("cuda")
PLAIN = StepParams(step_size=0.1, noise_scale=0.3)
HALF = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
FULL = dataclasses.replace(PLAIN, grad_clip=0.9, grad_norm_clip=6.0, max_update=0.4, prior_std=1.5, low=-2.5, high=2.6)
ONE_OPTION = {
    "plain": PLAIN,
    "grad_clip": dataclasses.replace(PLAIN, grad_clip=0.7),
    "grad_norm_clip": dataclasses.replace(PLAIN, grad_norm_clip=2.0),
    "max_update": dataclasses.replace(PLAIN, max_update=0.2),
    "prior_std": dataclasses.replace(PLAIN, prior_std=0.5),
    "low": dataclasses.replace(PLAIN, low=-0.5),
    "high": dataclasses.replace(PLAIN, high=0.5),
    "all": FULL,
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])


def options(count: int, **change) -> StepOptions:
    given = {"seed": 0x1234_5678_9ABC, "streams": tuple(range(count)), "noisy": (True,) * count} | change
    return StepOptions(**given)


def state(shapes, generator: torch.Generator, dtype=torch.float32) -> list[torch.Tensor]:
    return [torch.randn(shape, generator=generator, device=DEVICE).to(dtype) for shape in shapes]


@pytest.fixture(params=["triton", "cuda"])
def make(request: pytest.FixtureRequest, need: Callable[[str], None]) -> Make:
    """A function of options and a state that gives the stepper of one backend; raises where it is not taken."""
    need(request.param)

    def build(given: StepOptions, x: list[torch.Tensor], params: list[StepParams] | None = None) -> Stepper:
        return op.stepper(request.param, x, given, params)[0]

    return build


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def double(value):
    return value.double() if isinstance(value, torch.Tensor) else value


def exact(x, grad, params, opt: StepOptions, step, *, with_noise: bool = True, stats: bool = True):
    """The reference in float64 on the same noise: what is right, the fp32 state before a rounding to 16 bits. And how
    far fp32 may be off: a normal by its limit, and each term of the sum x - a (f g + x / std^2) + s xi by a unit
    roundoff for each of the ten roundings that it can meet (those of constants that are no fp32 numbers, of the
    inverse, twice each of its square's, and one for each operation), all of one sign."""
    drawn = [
        noise.normal(
            xi.shape,
            seed=opt.seed,
            step=step,
            stream=index,
            chain_offset=opt.chain_offset,
            dtype=torch.float64,
            device=xi.device,
        )
        if noisy and with_noise
        else None
        for xi, index, noisy in zip(x, opt.streams, opt.noisy, strict=True)
    ]
    wide = [StepParams(**{f.name: double(getattr(p, f.name)) for f in dataclasses.fields(StepParams)}) for p in params]
    slack = []
    for xi, gi, ni, p in zip(x, grad, drawn, wide, strict=True):
        pull = reference.pull(xi.double(), gi.double(), dataclasses.replace(p, prior_std=None), opt.norm_over).abs()
        if p.prior_std is not None:
            pull = pull + xi.double().abs() / p.prior_std**2
        terms = xi.double().abs() + p.step_size * pull
        slack.append(10 * 2.0**-24 * (terms if ni is None else terms + p.noise_scale * ni.abs()))
        if ni is not None:
            slack[-1] = slack[-1] + NORMAL_TOLERANCE * p.noise_scale
    right, found = reference.langevin_step(
        [xi.double() for xi in x],
        [gi.double() for gi in grad],
        drawn,
        wide,
        norm_over=opt.norm_over,
        outside=opt.outside,
        observed=opt.observed,
        stats=stats,
    )
    return right, slack, found


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    finite = torch.isfinite(b)
    assert torch.equal(torch.isfinite(a.double()), finite)
    return (a.double() - b)[finite].abs().max().item() if finite.any() else 0.0


def check(
    make: Make, x, grad, params, opt: StepOptions, *, step=3, with_noise: bool = True, stats: bool = True
) -> None:
    """No further from float64 than what rounding explains, and for norms, which are sums in another order, twice what
    the reference in fp32 is. In 16 bits the rounding of such a number, which does not fall where the number rises."""
    right, slack, right_stats = exact(x, grad, params, opt, step, with_noise=with_noise)
    torchs = TorchStepper(opt)
    eager, _ = torchs.step(
        [xi.float() for xi in x], [g.float() for g in grad], params, step, with_noise=with_noise, stats=False
    )
    thresholds = torchs.thresholds(x, step, noise.ROUNDING)
    out, out_stats = make(opt, x, params).step(
        [xi.clone() for xi in x], grad, params, step, with_noise=with_noise, stats=stats
    )
    for i, (a, e, r, s, t) in enumerate(zip(out, eager, right, slack, thresholds, strict=True)):
        finite, theirs = torch.isfinite(r), error(e, r)
        assert torch.equal(torch.isfinite(a), finite)
        limits = [r - s - 2 * theirs, r + s + 2 * theirs]
        if t is not None:
            limits = [reference.stochastic_round(y, a.dtype, t).double() for y in limits]
        low, high = limits
        assert ((low <= a) & (a <= high))[finite].all(), (
            f"tensor {i}: error {error(a, r)}, {s[finite].max()} explained, of eager fp32 {theirs}"
        )
    if not stats:
        return
    assert out_stats is not None and right_stats is not None
    torch.testing.assert_close(
        out_stats.grad_norm.double(), right_stats.grad_norm, rtol=1e-5, atol=1e-6, equal_nan=True
    )
    if x[0].dtype == torch.float32:
        torch.testing.assert_close(
            out_stats.displacement.double(), right_stats.displacement, rtol=1e-5, atol=1e-5, equal_nan=True
        )
    assert (out_stats.clipped - right_stats.clipped).abs().max().item() <= 2
    assert torch.equal(out_stats.nonfinite, right_stats.nonfinite)


# -- noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normals_on_this_device(make: Make, dtype: torch.dtype) -> None:
    """32 million of them within 2e-6 of float64 (fp32), and unit moments."""
    chains, length = 512, 1 << 16
    x, grad = [torch.zeros(chains, length, device=DEVICE, dtype=dtype)], [torch.zeros(1, 1, device=DEVICE, dtype=dtype)]
    grad = [grad[0].expand(chains, length)]
    params = [StepParams(step_size=0.0, noise_scale=1.0)]
    out = make(options(1), x).step(x, grad, params, 7, with_noise=True, stats=False)[0][0]
    if dtype == torch.float32:
        worst = 0.0
        for first in range(0, chains, 64):
            expected = noise.normal(
                (64, length), seed=0x1234_5678_9ABC, step=7, chain_offset=first, dtype=torch.float64, device=DEVICE
            )
            worst = max(worst, (out[first : first + 64].double() - expected).abs().max().item())
        assert worst < 2e-6
    wide = out.double()
    assert abs(wide.mean().item()) < 5 * wide.numel() ** -0.5
    assert abs(wide.square().mean().item() - 1) < (1e-3 if dtype == torch.float32 else 3e-3)
    assert abs(wide.pow(4).mean().item() - 3) < 0.03


# -- options


@DTYPES
@pytest.mark.parametrize("stats", [False, True], ids=["map", "chain"])
@pytest.mark.parametrize("name", ONE_OPTION)
def test_each_option(make: Make, name: str, stats: bool, dtype: torch.dtype, generator: torch.Generator) -> None:
    shapes = [(37, 3, 32, 32), (37, 40), (37, 7), (37,)]
    check(
        make,
        state(shapes, generator, dtype),
        state(shapes, generator, dtype),
        [ONE_OPTION[name]] * 4,
        options(4),
        stats=stats,
    )


@pytest.mark.parametrize("shape", [(100, 64), (10**5, 2), (999, 100), (65, 784), (3, 1_000_003), (1, 5), (1, 1 << 20)])
@pytest.mark.parametrize("stats", [False, True], ids=["map", "chain"])
def test_shapes(make: Make, shape: tuple[int, ...], stats: bool, generator: torch.Generator) -> None:
    check(make, state([shape], generator), state([shape], generator), [PLAIN], options(1), stats=stats)


@pytest.mark.parametrize("outside", ["clamp", "reject"])
@pytest.mark.parametrize("norm_over", ["chain", "tensor"])
@pytest.mark.parametrize("shape", [(300, 50), (4, 200_000)])
def test_sums_over_chains(make: Make, shape, norm_over: str, outside: str, generator: torch.Generator) -> None:
    params = [dataclasses.replace(PLAIN, grad_norm_clip=9.0, low=-4.0, high=4.0), PLAIN]
    opt = options(2, norm_over=norm_over, outside=outside)
    x = state([shape, (shape[0], 10)], generator)
    x[0].clamp_(-2.2, 2.2)
    x[0][::2, 1] = 9.0
    check(make, x, state([shape, (shape[0], 10)], generator), params, opt)


def test_splits_agree(need: Callable[[str], None], generator: torch.Generator) -> None:
    """The same update however Triton cuts the chains; only norms may move by a last bit. CUDA C++ has no choice."""
    need("triton")
    from mmebm.kernels.langevin_step import TritonStepper

    x, grad = state([(5, 30_000)], generator), state([(5, 30_000)], generator)
    results = [
        TritonStepper(options(1, outside="reject"), splits=splits).step(
            [x[0].clone()], grad, [dataclasses.replace(FULL, low=-9.0, high=9.0)], 0, with_noise=True, stats=True
        )
        for splits in (1, 2, 7, 64)
    ]
    for out, stats in results[1:]:
        torch.testing.assert_close(out[0], results[0][0][0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(stats.grad_norm, results[0][1].grad_norm, rtol=1e-6, atol=0)


@DTYPES
@pytest.mark.parametrize("case", range(20))
def test_random_combinations(make: Make, case: int, dtype: torch.dtype, seed: int, generator: torch.Generator) -> None:
    draw = random.Random(seed)
    chains = draw.choice([1, 3, 64, 257])
    count = draw.choice([1, 2, 3, 8, 11])
    tails = [(), (1,), (2,), (3, 5), (8,), (33,), (3, 32, 32), (100,), (1029,), (4096,)]
    shapes = [(chains, *draw.choice(tails)) for _ in range(count)]

    def value(low: float, high: float, shape):
        number = draw.uniform(low, high)
        kind = draw.choice(["float", "float", "one", "chain"])
        if kind == "float":
            return number
        if kind == "one":
            return torch.full((), number, device=DEVICE)
        return number * (0.5 + torch.rand((chains, *[1] * (len(shape) - 1)), generator=generator, device=DEVICE))

    def maybe(low: float, high: float, shape):
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
                low=maybe(-5, -0.5, shape),
                high=maybe(0.5, 5, shape),
            )
        )
        mask = draw.choice([None, None, shape, shape[1:], (chains, *[1] * (len(shape) - 1))])
        observed.append(None if mask is None else torch.rand(mask, generator=generator, device=DEVICE) < 0.4)
    key = draw.randrange(2**63)
    opt = options(
        count,
        seed=draw.choice([key, torch.tensor([key], device=DEVICE)]),
        noisy=tuple(draw.random() < 0.8 for _ in shapes),
        chain_offset=draw.choice([0, 5, 2**31 + 3]),
        norm_over=draw.choice(["chain", "tensor"]),
        outside=draw.choice(["clamp", "clamp", "reject"]),
        observed=tuple(observed),
    )
    x, grad = state(shapes, generator, dtype), state(shapes, generator, dtype)
    check(make, x, grad, params, opt, stats=draw.random() < 0.5, with_noise=draw.random() < 0.8)


@DTYPES
def test_perturb(make: Make, dtype: torch.dtype, generator: torch.Generator) -> None:
    x = state([(50, 33), (50, 256)], generator, dtype)
    opt = options(2, clamp_noise=True)
    params = [dataclasses.replace(PLAIN, low=-1.0, high=1.0)] * 2
    wanted = TorchStepper(opt).perturb(list(x), params, 5)
    out = make(opt, x).perturb([xi.clone() for xi in x], params, 5)
    for a, b in zip(out, wanted, strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=2e-6)
        else:
            assert (a != b).float().mean().item() <= 0.01
            torch.testing.assert_close(a, b, rtol=HALF[dtype], atol=1e-6)


@DTYPES
@pytest.mark.parametrize("stats", [False, True], ids=["map", "chain"])
def test_addresses_that_are_not_aligned(
    make: Make, stats: bool, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Views that start anywhere give the same bits as tensors that start where vectors do."""
    x, grad = state([(20, 1000)], generator, dtype), state([(20, 1000)], generator)
    mask = torch.rand(20, 1000, generator=generator, device=DEVICE) < 0.3

    def moved(t: torch.Tensor, by: int) -> torch.Tensor:
        return torch.empty(t.numel() + by, dtype=t.dtype, device=DEVICE)[by:].view(t.shape).copy_(t)

    params = [FULL if stats else dataclasses.replace(FULL, grad_norm_clip=None)]
    results = []
    for by in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 2, 0), (0, 0, 1), (3, 1, 5)):
        here = [moved(x[0], by[0])]
        opt = options(1, observed=(moved(mask, by[2]),))
        results.append(
            make(opt, here).step(here, [moved(grad[0], by[1])], params, 0, with_noise=True, stats=stats)[0][0]
        )
    assert all(torch.equal(other, results[0]) for other in results[1:])


def test_many_tensors(make: Make, generator: torch.Generator) -> None:
    """More than one launch takes, and a chain that one of them rejects."""
    shapes = [(9, 1 + 5 * i) for i in range(70)]
    x, grad = state(shapes, generator), state(shapes, generator)
    for t in x:
        t.clamp_(-2.0, 2.0)
    x[69][4, 3] = 9.0
    params = [dataclasses.replace(PLAIN, low=-5.0, high=5.0)] * 70
    check(make, x, grad, params, options(70, outside="reject"))
    check(make, x, grad, params, options(70), stats=False)


def test_nan_and_inf_stay_visible(make: Make) -> None:
    x, grad = torch.zeros(6, 40, device=DEVICE), torch.zeros(6, 40, device=DEVICE)
    grad[1, 3], grad[2, 4], grad[3, 5] = float("nan"), float("inf"), float("-inf")
    x[4, 6] = float("nan")
    params = [dataclasses.replace(PLAIN, grad_clip=1.0, max_update=1.0, low=-1.0, high=1.0)]
    for stats in (False, True):
        out, found = make(options(1), [x]).step([x.clone()], [grad], params, 0, with_noise=True, stats=stats)
        assert out[0].isnan().sum(1).tolist() == [0, 1, 0, 0, 1, 0]
        if found is not None:
            assert found.nonfinite.tolist() == [0, 1, 0, 0, 1, 0]


def test_runs_repeat_bit_for_bit(make: Make, generator: torch.Generator) -> None:
    shapes = [(4, 100_000), (4, 30)]
    x, grad = state(shapes, generator), state(shapes, generator)
    runs = [
        make(options(2, outside="reject"), x).step(
            [xi.clone() for xi in x], grad, [FULL] * 2, 0, with_noise=True, stats=True
        )
        for _ in range(5)
    ]
    for out, stats in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(out, runs[0][0], strict=True))
        assert torch.equal(stats.grad_norm, runs[0][1].grad_norm)


@DTYPES
def test_split_of_the_batch_changes_nothing(make: Make, dtype: torch.dtype, generator: torch.Generator) -> None:
    shapes = [(64, 3, 32, 32), (64, 10)]
    x, grad = state(shapes, generator, dtype), state(shapes, generator, dtype)
    whole = make(options(2), x).step([xi.clone() for xi in x], grad, [PLAIN] * 2, 1, with_noise=True, stats=False)[0]
    for first, last in ((0, 10), (10, 64)):
        some = [xi[first:last].clone() for xi in x]
        part = make(options(2, chain_offset=first), some).step(
            some, [g[first:last] for g in grad], [PLAIN] * 2, 1, with_noise=True, stats=False
        )[0]
        assert all(torch.equal(a, b[first:last]) for a, b in zip(part, whole, strict=True))


# -- graphs, streams, size


@pytest.mark.parametrize("stats", [False, True], ids=["map", "chain"])
def test_a_replayed_graph_draws_fresh_noise(make: Make, stats: bool, generator: torch.Generator) -> None:
    """The step is a number in memory that the graph counts up; each replay equals the eager step of that number."""
    params = [dataclasses.replace(FULL, low=-9.0, high=9.0)] * 2
    shapes = [(33, 100), (33, 7)]
    start = state(shapes, generator)
    grad = state(shapes, generator)
    seed, step = torch.tensor([77], device=DEVICE), torch.tensor([0], device=DEVICE)
    stepper = make(options(2, seed=seed), start)
    stepper.step([xi.clone() for xi in start], grad, params, step, with_noise=True, stats=stats)  # compiles
    torch.cuda.synchronize()
    x = [xi.clone() for xi in start]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, found = stepper.step(x, grad, params, step, with_noise=True, stats=stats)
        step += 1
    eager = [xi.clone() for xi in start]
    reference_stepper = make(options(2, seed=77), start)
    for k in range(4):
        graph.replay()
        eager, expected = reference_stepper.step(eager, grad, params, k, with_noise=True, stats=stats)
        assert all(torch.equal(a, b) for a, b in zip(out, eager, strict=True)), k
        if stats:
            assert torch.equal(found.displacement, expected.displacement)
    # another seed, without another capture
    seed.fill_(78)
    step.zero_()
    for xi, first in zip(x, start, strict=True):
        xi.copy_(first)
    graph.replay()
    other = make(options(2, seed=78), start).step(
        [xi.clone() for xi in start], grad, params, 0, with_noise=True, stats=False
    )[0]
    assert all(torch.equal(a, b) for a, b in zip(out, other, strict=True))


def test_a_captured_chain_with_its_gradient(make: Make, generator: torch.Generator) -> None:
    """Gradient and update of 5 steps in one graph: the addresses of the gradients are those of the graph's pool."""
    weight = torch.randn(32, 32, generator=generator, device=DEVICE) / 8
    scale = torch.linspace(0.1, 0.3, 5, device=DEVICE)
    seed = torch.tensor([3], device=DEVICE)
    stepper = make(options(1, seed=seed), [torch.empty(40, 32, device=DEVICE)])

    def chain(x: torch.Tensor) -> torch.Tensor:
        for k in range(5):
            leaf = x.detach().requires_grad_()
            energy = torch.nn.functional.softplus(leaf @ weight).sum() + leaf.square().sum() / 2
            (g,) = torch.autograd.grad(energy, leaf)
            params = [StepParams(step_size=0.1, noise_scale=scale[k])]
            x = stepper.step([x], [g], params, k, with_noise=True, stats=False)[0][0]
        return x

    start = torch.randn(40, 32, generator=generator, device=DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            chain(start.clone())
    torch.cuda.current_stream().wait_stream(side)
    x = start.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(x)
    for key in (3, 4):
        seed.fill_(key)
        x.copy_(start)
        graph.replay()
        got = out.clone()
        torch.testing.assert_close(got, chain(start.clone()), rtol=1e-4, atol=1e-4)


def test_a_captured_step_reads_its_constants_anew(make: Make, generator: torch.Generator) -> None:
    """Constants on the device are read at each replay, also where the kernel reads a copy of another dtype."""
    start, grad = state([(6, 50)], generator), state([(6, 50)], generator)
    size = torch.tensor(0.1, device=DEVICE, dtype=torch.float64)
    scale = torch.rand(6, 1, device=DEVICE, generator=generator)
    params = [StepParams(step_size=size, noise_scale=scale)]
    stepper = make(options(1), start)
    stepper.step([start[0].clone()], grad, params, 0, with_noise=True, stats=False)
    torch.cuda.synchronize()
    x = start[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = stepper.step([x], grad, params, 0, with_noise=True, stats=False)[0][0]
    for factor in (1.0, 0.5):
        size.mul_(factor)
        scale.mul_(factor)
        x.copy_(start[0])
        graph.replay()
        fixed = [StepParams(step_size=size.item(), noise_scale=scale.clone())]
        wanted = make(options(1), start).step([start[0].clone()], grad, fixed, 0, with_noise=True, stats=False)[0][0]
        assert torch.equal(out, wanted)


def test_streams(make: Make, generator: torch.Generator) -> None:
    """Chains on two streams at once, each ordered with its own work only."""
    starts = [torch.randn(256, 4096, generator=generator, device=DEVICE) for _ in range(2)]
    grads = [torch.randn(256, 4096, generator=generator, device=DEVICE) for _ in range(2)]
    wanted = []
    for i in range(2):
        stepper, x = make(options(1, seed=i), [starts[i]]), starts[i].clone()
        for k in range(20):
            x = stepper.step([x], [grads[i]], [PLAIN], k, with_noise=True, stats=False)[0][0]
        wanted.append(x)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    steppers = [make(options(1, seed=i), [starts[i]]) for i in range(2)]
    states = [s.clone() for s in starts]
    torch.cuda.synchronize()
    for k in range(20):
        for i in range(2):
            with torch.cuda.stream(streams[i]):
                states[i] = steppers[i].step([states[i]], [grads[i]], [PLAIN], k, with_noise=True, stats=False)[0][0]
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(states, wanted, strict=True))


@pytest.mark.parametrize("stats", [False, True], ids=["map", "chain"])
def test_beyond_two_gigabytes(make: Make, stats: bool) -> None:
    """2^31 + 2^22 elements of bf16: offsets in elements and in bytes leave 32 bits."""
    free, _ = torch.cuda.mem_get_info()
    chains, length = 2049, 1 << 20
    if free < 5 * chains * length:
        pytest.skip(f"needs {5 * chains * length >> 30} GiB of free device memory, has {free >> 30}")
    x = torch.zeros(chains, length, device=DEVICE, dtype=torch.bfloat16)
    grad = torch.zeros(chains, length, device=DEVICE, dtype=torch.bfloat16)
    grad[-1] = 1.0
    params = [StepParams(step_size=2.0, noise_scale=0.5)]
    opt = options(1)
    out, _ = make(opt, [x]).step([x], [grad], params, 0, with_noise=True, stats=stats)
    assert out[0].data_ptr() == x.data_ptr()
    for chain in (0, 1023, 1024, 2047, 2048):
        alone = [torch.zeros(1, length, device=DEVICE, dtype=torch.bfloat16)]
        part = make(options(1, chain_offset=chain), alone).step(
            alone, [grad[chain : chain + 1]], params, 0, with_noise=True, stats=False
        )[0]
        assert torch.equal(part[0][0], x[chain]), chain
    # no element was left out
    assert (x == 0).sum().item() < 0.001 * x.numel()


def test_nothing_synchronises(make: Make, generator: torch.Generator) -> None:
    x, grad = state([(64, 100)], generator), state([(64, 100)], generator)
    stepper = make(options(1, seed=torch.tensor([1], device=DEVICE), outside="reject"), x)
    step = torch.tensor([0], device=DEVICE)
    params = [dataclasses.replace(FULL, noise_scale=torch.full((64, 1), 0.1, device=DEVICE))]
    stepper.step([x[0].clone()], grad, params, step, with_noise=True, stats=True)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        stepper.step([x[0].clone()], grad, params, step, with_noise=True, stats=True)
        stepper.step([x[0].clone()], grad, params, step, with_noise=True, stats=False)
        stepper.perturb([x[0].clone()], params, step)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_nothing_compiles_anew_for_another_value(need: Callable[[str], None], generator: torch.Generator) -> None:
    """Sizes, options, seeds and steps are arguments: one kernel that Triton compiled takes them all."""
    need("triton")
    from mmebm.kernels import langevin_step as room

    def compiled() -> int:
        return sum(len(caches[0]) for caches in room._map_kernel.device_caches.values())

    def run(shapes, params: StepParams, step: int, key: int) -> None:
        room.TritonStepper(options(2, seed=key)).step(
            state(shapes, generator), state(shapes, generator), [params] * 2, step, with_noise=True, stats=False
        )

    run([(4, 64), (4, 8)], PLAIN, 0, 0)
    count = compiled()
    run([(1, 1), (1, 7)], PLAIN, 1, 1)
    run([(16, 3, 32, 32), (16, 129)], dataclasses.replace(PLAIN, low=-1.0, prior_std=1.0), 2**31, 2**63 - 1)
    run([(5, 100), (5, 1)], dataclasses.replace(PLAIN, step_size=1, noise_scale=0), 16, 2**32)
    assert compiled() == count
