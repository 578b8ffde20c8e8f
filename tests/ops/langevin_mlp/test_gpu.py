"""``langevin_mlp`` in Triton and CUDA C++, and Triton's ``mlp_energy``, on a GPU: against float64, captured in a graph,
on several streams.

``python -m pytest -m gpu``; skipped with the reason where there is no CUDA device.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from mmebm.ops.common.params import StepParams
from mmebm.ops.langevin_mlp import MlpChain, MlpResult, constants_of
from mmebm.ops.langevin_mlp import run as run_in
from mmebm.ops.mlp_energy import reference
from mmebm.ops.terms import ACTIVATIONS, Quadratic, Residual, Scalar, Stack, Term

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch.cuda.is_available() is False"),
]
if torch.cuda.is_available():
    from mmebm.kernels import langevin_mlp as room
    from mmebm.ops.langevin_mlp import cuda as cuda_room

DEVICE = torch.device("cuda")
EPS = 2.0**-23
LAUNCH: dict[str, Any] = {}  # "room": the module that `launch` takes instead of Triton's
PRECISIONS = pytest.mark.parametrize("precision", ["fp32", "tf32x3", "bf16"])
PLAIN = StepParams(step_size=0.05, noise_scale=0.2)
ALL = StepParams(0.05, 0.2, grad_clip=0.9, grad_norm_clip=1.5, max_update=0.3, prior_std=0.8, low=-1.2, high=1.1)
SMOOTH = [name for name in ACTIVATIONS if name not in ("relu", "leaky_relu")]


@pytest.fixture(params=["triton", "cuda"])
def each_room(request: pytest.FixtureRequest, need: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> str:
    """``launch`` runs in this room."""
    need(request.param)
    if request.param == "cuda":
        monkeypatch.setitem(LAUNCH, "room", cuda_room)
    return request.param


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, device=DEVICE)


def stack(generator: torch.Generator, *sizes: int, activation: Any = "silu", slope: float = 0.3) -> Stack:
    return Stack.mlp(
        tuple(randn(generator, o, i) / i**0.5 for i, o in pairwise(sizes)),
        tuple(0.2 * randn(generator, o) for o in sizes[1:]),
        activation,
        slope,
    )


def wide(value: Any) -> Any:
    """Everything in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(wide(part) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{f.name: wide(getattr(value, f.name)) for f in dataclasses.fields(value)})
    return value


def residual(generator: torch.Generator, x: Tensor, net: Stack, masked: bool, **kinds: Any) -> Residual:
    """With a target at least 0.05 from every output, as a last bit decides a sign there, and NaN where unobserved."""
    out = reference._forward(x.double(), wide(net))[0]
    y = torch.tanh(out) if kinds.get("tanh") else out
    noise = randn(generator, *y.shape).double()
    target = y + noise.sign() * (0.05 + noise.abs())
    observed = randn(generator, *y.shape) < 0.5 if masked else None
    if observed is not None:
        target = torch.where(observed, target, torch.nan)
    return Residual(net, target.float(), 0.7, observed=observed, weight=1.3, **kinds)


def check(name: str, ours: Tensor, single: Tensor, exact: Tensor, extra: float = 0.0) -> None:
    """Three errors against float64: ours at most twice that of PyTorch in float32, plus 8 units in the last place of
    the largest value (sums in another order), plus ``extra``."""
    finite = torch.isfinite(exact)
    assert torch.equal(torch.isfinite(ours), finite), f"{name}: finite elsewhere"
    error, usual = ((t.double() - exact)[finite].abs().max().item() for t in (ours, single))
    bound = 2 * usual + 8 * EPS * max(1.0, exact[finite].abs().max().item()) + extra
    assert error <= bound, f"{name}: error {error:.2e}, of PyTorch in float32 {usual:.2e}, bound {bound:.2e}"


def compare(terms: tuple[Term, ...], x: Tensor, tile: Any = None) -> None:
    energy, grad = room.gradient(terms, x, tile=tile)
    single, exact = reference.mlp_energy(x, terms), reference.mlp_energy(x.double(), wide(terms))
    check("energy", energy, single[0], exact[0])
    check("gradient", grad, single[1], exact[1])


def chain_of(
    terms: tuple[Term, ...], widths: tuple[int, ...], params: list[list[StepParams]], chains: int, **options: Any
) -> MlpChain:
    table = constants_of(params, chains, torch.float32, DEVICE)
    assert not isinstance(table, str)
    count = len(widths)
    given = {
        "streams": tuple(range(count)),
        "noisy": (True,) * count,
        "moving": (True,) * count,
        "seed": 0x1234_5678_9ABC,
    } | options
    return MlpChain(terms=terms, widths=widths, constants=table[0], present=table[1], **given)


def launch(chain: MlpChain, x: Tensor, steps: int, first_step: int | Tensor = 5, **how: Any) -> MlpResult:
    module = LAUNCH.get("room", room)
    assert module.supports(chain, x) is None
    return module.run(chain, x, steps, first_step, energy=True, grad_norm=True, **how)


def check_chain(chain: MlpChain, x: Tensor, steps: int = 3, tile: Any = None) -> MlpResult:
    ours = launch(chain, x, steps, **({} if tile is None else {"tile": tile}))
    single = run_in(None, chain, x, steps, 5)
    double = dataclasses.replace(chain, terms=wide(chain.terms), constants=chain.constants.double())
    exact = run_in(None, double, x.double(), steps, 5)
    assert ours.energy is not None and single.energy is not None and exact.energy is not None
    assert ours.grad_norm is not None and single.grad_norm is not None and exact.grad_norm is not None
    # normals may differ by 2e-6 a step; the energy feels it times the gradient
    extra = 2e-6 * steps * chain.constants[:, :, 1].abs().max().item()
    slope = max(1.0, exact.grad_norm.nan_to_num(0, 0, 0).max().item())
    check("x", ours.x, single.x, exact.x, extra)
    check("energy", ours.energy, single.energy, exact.energy, extra * slope)
    check("norm", ours.grad_norm, single.grad_norm, exact.grad_norm, extra * slope)
    if chain.freeze:
        assert ours.frozen is not None and exact.frozen is not None and torch.equal(ours.frozen, exact.frozen)
    return ours


def latent(generator: torch.Generator, precision: Literal["fp32", "tf32x3", "bf16"] = "fp32", **options: Any):
    """The latent prior's chain: 100 x 64 on 64-200-200-1."""
    terms = (Scalar(stack(generator, 64, 200, 200, 1)),)
    chain = chain_of(terms, (64,), [[PLAIN]], 100, precision=precision, **options)
    return chain, randn(generator, 100, 64)


# -- energy and gradient


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("hidden", [(20,), (200, 200), (5, 256, 40), (33, 7, 256, 256)], ids=len)
def test_scalar(name: str, hidden: tuple[int, ...], generator: torch.Generator) -> None:
    compare((Scalar(stack(generator, 13, *hidden, 1, activation=name), -1.5),), randn(generator, 100, 13))


@pytest.mark.parametrize("name", ["relu", "leaky_relu"])
def test_piecewise_linear(name: str, generator: torch.Generator) -> None:
    """A unit within rounding of its kink may take either slope: nearly all chains agree, and no energy feels it."""
    x = randn(generator, 1000, 13)
    terms = (Scalar(stack(generator, 13, 100, 64, 1, activation=name)),)
    energy, grad = room.gradient(terms, x)
    exact = reference.mlp_energy(x.double(), wide(terms))
    check("energy", energy, reference.mlp_energy(x, terms)[0], exact[0])
    off = (grad.double() - exact[1]).abs().amax(1)
    assert (off > 1e-5).sum().item() <= 5, off.topk(6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("squash", [False, True], ids=["plain", "tanh"])
@pytest.mark.parametrize("likelihood", ["gaussian", "laplace"])
def test_residual(likelihood: str, squash: bool, masked: bool, generator: torch.Generator) -> None:
    x = randn(generator, 65, 20)
    net = stack(generator, 20, 200, 784, activation="gelu")
    compare((residual(generator, x, net, masked, likelihood=likelihood, tanh=squash),), x)


@pytest.mark.parametrize("chains", [1, 7, 8, 33, 5000])
def test_a_sum_of_different_stacks(chains: int, generator: torch.Generator) -> None:
    x = randn(generator, chains, 30)
    compare(
        (
            Scalar(stack(generator, 30, 20, 40, 1, activation="softplus"), -1.0),
            residual(generator, x, stack(generator, 30, 33, 130, activation="tanh"), True, likelihood="laplace"),
            Quadratic(randn(generator, 30), randn(generator, 30).abs()),
            Scalar(stack(generator, 30, 5, 6, 7, 8, 1, activation="elu"), 0.5),
        ),
        x,
    )


def test_limits(generator: torch.Generator) -> None:
    x = randn(generator, 40, 1024)
    compare((residual(generator, x, stack(generator, 1024, 256, 256, 256, 256, 1024), True),), x)


# -- chains


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("clamp_noise", [False, True])
@pytest.mark.parametrize("noise_at", ["after", "before"])
@pytest.mark.usefixtures("each_room")
def test_all_options(noise_at: str, clamp_noise: bool, freeze: bool, generator: torch.Generator) -> None:
    x = randn(generator, 100, 100)
    terms = (
        Scalar(stack(generator, 100, 64, 40, 1, activation="gelu"), 2.0),
        residual(generator, x, stack(generator, 100, 64, 30, activation="softplus"), True, tanh=True),
    )
    observed = (randn(generator, 100, 100) < -0.5).to(torch.uint8)
    params = [[ALL, PLAIN, dataclasses.replace(ALL, prior_std=0.5 + torch.rand(100, 1, device=DEVICE))]] * 3
    check_chain(
        chain_of(
            terms,
            (50, 1, 49),
            params,
            100,
            noise_at=noise_at,
            clamp_noise=clamp_noise,
            freeze=freeze,
            observed=observed,
            noisy=(True, True, False),
            moving=(True, False, True),
            chain_offset=2**32 - 50,
        ),
        x,
    )


@pytest.mark.parametrize("case", range(20))
@pytest.mark.usefixtures("each_room")
def test_random_combinations(case: int, seed: int, generator: torch.Generator) -> None:
    draw = random.Random(seed)
    chains = draw.choice([1, 3, 64, 257, 3000])
    widths = tuple(draw.choice([1, 2, 3, 8, 33, 100]) for _ in range(draw.choice([1, 1, 2, 5])))
    inputs = sum(widths)
    x = randn(generator, chains, inputs)
    terms: list[Term] = []
    for _ in range(draw.choice([1, 1, 2, 3])):
        sizes = (inputs, *(draw.choice([3, 20, 64, 200]) for _ in range(draw.randint(1, 4))))
        kind = draw.choice(["scalar", "scalar", "residual", "quadratic"])
        name = draw.choice(SMOOTH)
        if kind == "scalar":
            terms.append(Scalar(stack(generator, *sizes, 1, activation=name), draw.uniform(-1, 1)))
        elif kind == "residual":
            net = stack(generator, *sizes, draw.choice([1, 5, 130]), activation=name)
            terms.append(residual(generator, x, net, draw.random() < 0.5, tanh=draw.random() < 0.5))
        else:
            terms.append(Quadratic(randn(generator, inputs), randn(generator, inputs).abs()))

    def value(low: float, high: float) -> Any:
        number = draw.uniform(low, high)
        if draw.random() < 0.3:
            return number * (0.5 + torch.rand(chains, 1, generator=generator, device=DEVICE))
        return number

    ranges = {
        "grad_clip": (0.3, 2.0),
        "grad_norm_clip": (0.5, 5.0),
        "max_update": (0.05, 0.5),
        "prior_std": (0.5, 3.0),
        "low": (-3.0, -0.5),
        "high": (0.5, 3.0),
    }
    # a tensor has the same options in all steps
    given = [[name for name in ranges if draw.random() < 0.4] for _ in widths]
    params = [
        [StepParams(value(0.01, 0.1), value(0.01, 0.3), **{n: value(*ranges[n]) for n in names}) for names in given]
        for _ in range(draw.choice([1, 3]))
    ]
    chain = chain_of(
        tuple(terms),
        widths,
        params,
        chains,
        noise_at=draw.choice(["after", "before"]),
        clamp_noise=draw.random() < 0.5,
        freeze=draw.random() < 0.5,
        chain_offset=draw.choice([0, 5, 2**31 + 3]),
        observed=draw.choice([None, (randn(generator, 1, inputs) < 0).to(torch.uint8)]),
    )
    check_chain(chain, x)


@pytest.mark.usefixtures("each_room")
def test_freeze_keeps_the_last_finite_state(generator: torch.Generator) -> None:
    chain, x = latent(generator, freeze=True)
    x[2, 3], x[5, 8] = float("nan"), float("inf")
    out = check_chain(chain, x)
    assert out.frozen is not None and out.frozen.nonzero().flatten().tolist() == [2, 5]
    assert torch.equal(out.x[[2, 5]].nan_to_num(), x[[2, 5]].nan_to_num())


@PRECISIONS
@pytest.mark.usefixtures("each_room")
def test_precision(precision: Any, generator: torch.Generator) -> None:
    """Each is as far from float64 as it says: a gradient's error, relative to the gradient."""
    terms = (Scalar(stack(generator, 64, 200, 200, 1)),)
    # one step of size 1 without noise: the move is minus the gradient
    chain = chain_of(terms, (64,), [[StepParams(1.0, 0.0)]], 100, precision=precision)
    x = 0.01 * randn(generator, 100, 64)
    out = launch(chain, x, 1)
    exact = reference.mlp_energy(x.double(), wide(terms))[1]
    error = (((x - out.x).double() - exact).norm() / exact.norm()).item()
    # Two products forward and two back, in each a unit roundoff for the operands and one for the sums, whose errors
    # have random signs: sums that tensor cores cut off would make more than 1e-6, tf32 alone, operands to 2^-11,
    # more than 1e-4. bf16 operands are good to 2^-9.
    fp32 = 8 * 2.0**-24
    low, high = {"fp32": (0.0, fp32), "tf32x3": (0.0, fp32), "bf16": (1e-4, 2e-2)}[precision]
    assert low <= error <= high, error


@PRECISIONS
def test_the_cuda_room_does_not_depend_on_the_batch(
    precision: Any, generator: torch.Generator, need: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor on how many chains a block has, which is a question of how many there are: bit for bit."""
    need("cuda")
    monkeypatch.setitem(LAUNCH, "room", cuda_room)
    chain, _ = latent(generator, precision)
    x = randn(generator, 5000, 64)
    whole = launch(chain, x, 4)
    for start, stop in ((0, 9), (9, 1100)):
        part = dataclasses.replace(chain, chain_offset=start)
        assert torch.equal(launch(part, x[start:stop], 4).x, whole.x[start:stop])


@PRECISIONS
def test_tiles_and_batch_splits_agree(precision: Any, generator: torch.Generator) -> None:
    """A chain does not depend on the chains beside it (bit for bit), nor but for last bits on the tile."""
    chain, x = latent(generator, precision)
    alone, few, many = room.TILES[precision]
    whole = launch(chain, x, 4, tile=few)
    for tile, all_ in ((few, whole), (alone, launch(chain, x, 4, tile=alone))):
        for start, stop in ((0, 9), (9, 100)):
            part = dataclasses.replace(chain, chain_offset=start)
            assert torch.equal(launch(part, x[start:stop], 4, tile=tile).x, all_.x[start:stop])
    # bf16: a last bit of fp32 may round an operand to its neighbour
    near = 1e-3 if precision == "bf16" else 1e-5
    for tile in (alone, many):
        torch.testing.assert_close(launch(chain, x, 4, tile=tile).x, whole.x, rtol=0, atol=near)


@pytest.mark.usefixtures("each_room")
def test_runs_repeat_and_restart_bit_for_bit(generator: torch.Generator) -> None:
    chain, x = latent(generator)
    whole = launch(chain, x, 20)
    for _ in range(5):
        assert torch.equal(launch(chain, x, 20).x, whole.x)
    half = launch(chain, x, 8)
    assert torch.equal(launch(chain, half.x, 12, first_step=13).x, whole.x)


@pytest.mark.usefixtures("each_room")
def test_more_chains_than_run_at_a_time(generator: torch.Generator) -> None:
    """Programs take several tiles each; the scratch is theirs alone."""
    terms = (Scalar(stack(generator, 2, 64, 64, 1)),)
    x = randn(generator, 100_000, 2)
    check_chain(chain_of(terms, (2,), [[PLAIN]], len(x)), x)


# -- graphs and streams


@pytest.mark.usefixtures("each_room")
def test_a_replayed_graph_draws_fresh_noise_and_sees_the_weights(generator: torch.Generator) -> None:
    seed, step = torch.tensor([77], device=DEVICE), torch.tensor([0], device=DEVICE)
    chain, start = latent(generator, seed=seed)
    launch(chain, start, 10, step)  # compiles, and brings the program to the device
    torch.cuda.synchronize()
    x = start.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = launch(chain, x, 10, step)
        x.copy_(out.x)
        step += 10
    assert out.energy is not None
    plain = dataclasses.replace(chain, seed=77)
    expected = start
    for k in range(4):
        graph.replay()
        eager = launch(plain, expected, 10, 10 * k)
        expected = eager.x
        assert eager.energy is not None
        assert torch.equal(x, expected) and torch.equal(out.energy, eager.energy), k
    # other weights and another seed, without another capture
    term = chain.terms[0]
    assert isinstance(term, Scalar)
    term.stack.weights[1].mul_(-0.5)
    seed.fill_(78)
    step.zero_()
    x.copy_(start)
    graph.replay()
    assert torch.equal(x, launch(dataclasses.replace(chain, seed=78), start, 10, 0).x)


@pytest.mark.usefixtures("each_room")
def test_streams_do_not_meet(generator: torch.Generator) -> None:
    chain, x = latent(generator)
    wanted = launch(chain, x, 30)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for stream in streams * 3:
        with torch.cuda.stream(stream):
            results.append(launch(chain, x, 30))
    torch.cuda.synchronize()
    assert all(torch.equal(result.x, wanted.x) for result in results)


# -- distributions


@PRECISIONS
@pytest.mark.usefixtures("each_room")
def test_the_variance_of_a_long_chain(precision: Any, generator: torch.Generator) -> None:
    """Unadjusted Langevin on a standard Gaussian: the stationary variance is 1 / (1 - a / 2), with noise sqrt(2 a).

    A net of weight 0 takes part, so that the whole path runs; 4,096 chains x 64 elements, correlation time 10 steps.
    """
    a, chains = 0.1, 4096
    terms = (
        Quadratic(torch.zeros(64, device=DEVICE), torch.ones(64, device=DEVICE)),
        Scalar(stack(generator, 64, 200, 200, 1), 0.0),
    )
    params = [[StepParams(a, (2 * a) ** 0.5)]]
    x = torch.zeros(chains, 64, device=DEVICE)
    out = launch(chain_of(terms, (64,), params, chains, precision=precision), x, 200)
    count = out.x.numel()
    variance = 1 / (1 - a / 2)
    # 5 standard errors of independent elements
    assert abs(out.x.double().mean().item()) < 5 * (variance / count) ** 0.5
    assert abs(out.x.double().var().item() / variance - 1) < 5 * (2 / count) ** 0.5


@pytest.mark.usefixtures("each_room")
def test_a_long_chain_has_the_distribution_of_the_reference(generator: torch.Generator) -> None:
    """Trajectories part after many steps, what they draw must not: energies of 4,096 chains with other noise."""
    terms = (Scalar(stack(generator, 8, 64, 64, 1), 3.0), Quadratic(*torch.ones(2, 8, device=DEVICE).mul_(0.5)))
    x = randn(generator, 4096, 8)
    chain = chain_of(terms, (8,), [[StepParams(0.05, 0.1**0.5)]], len(x))
    ours = launch(chain, x, 200)
    theirs = run_in(None, dataclasses.replace(chain, seed=5), x, 200, 0)
    assert ours.energy is not None and theirs.energy is not None
    a, b = ours.energy[-1].double(), theirs.energy[-1].double()
    error = ((a.var() + b.var()) / len(x)).sqrt()
    assert ((a.mean() - b.mean()).abs() / error).item() < 5
    # a variance's own spread takes the fourth moment
    spread = sum(((t - t.mean()).pow(4).mean() - t.var() ** 2) / len(x) for t in (a, b)) ** 0.5
    assert ((a.var() - b.var()).abs() / spread).item() < 5
