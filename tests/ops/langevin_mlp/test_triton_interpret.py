"""The Triton ``langevin_mlp`` and ``mlp_energy`` in Triton's interpreter, against the reference in float64.

Run with ``TRITON_INTERPRET=1 python -m pytest -m interpret``; it replaces the compiler for the whole process. Chains
use smooth activations and targets away from the outputs: on the other side of a kink a last bit changes the gradient.
"""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from mmebm.kernels import activations, mlp_energy  # noqa: E402
from mmebm.kernels import langevin_mlp as room  # noqa: E402
from mmebm.kernels.langevin_mlp import Tile  # noqa: E402
from mmebm.ops import parity  # noqa: E402
from mmebm.ops.common.params import StepParams  # noqa: E402
from mmebm.ops.langevin_mlp import MlpChain, MlpResult, constants_of, langevin_mlp  # noqa: E402
from mmebm.ops.langevin_mlp import run as run_in  # noqa: E402
from mmebm.ops.mlp_energy import mlp_energy as mlp_energy_op  # noqa: E402
from mmebm.ops.mlp_energy import reference  # noqa: E402
from mmebm.ops.terms import ACTIVATIONS, Quadratic, Residual, Scalar, Stack, Term  # noqa: E402
from tests.ops.cases import STOP  # noqa: E402

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
    # NumPy's, of the interpreter: overflow, 0 / 0 and inf - inf are meant, as on the GPU
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

SMALL = Tile(16, 32, 16, 4, 1)  # several blocks of everything in small problems
EPS = 2.0**-23
SMOOTH = [name for name in ACTIVATIONS if name not in ("relu", "leaky_relu")]


def stack(
    generator: torch.Generator, *sizes: int, activation: Any = "silu", slope: float = 0.3, bias: bool = True
) -> Stack:
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    return Stack.mlp(
        tuple(draw(o, i) / i**0.5 for i, o in pairwise(sizes)),
        tuple(0.2 * draw(o) if bias else None for o in sizes[1:]),
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


def residual(generator: torch.Generator, x: Tensor, net: Stack, mask: str, **kinds: Any) -> Residual:
    """With a target at least 0.05 from every output, and NaN where it does not count."""
    out = reference._forward(x.double(), wide(net))[0]
    y = torch.tanh(out) if kinds.get("tanh") else out
    shape = y.shape
    away = 0.05 + torch.rand(shape, generator=generator, dtype=torch.float64)
    target = y + away * (torch.rand(shape, generator=generator) < 0.5).double().sub(0.5).sign()
    observed = None
    if mask != "none":
        observed = torch.rand((1, shape[1]) if mask == "shared" else shape, generator=generator) < 0.6
        target = torch.where(observed, target, torch.nan)
    return Residual(net, target.float(), 0.7, observed=observed, weight=1.3, **kinds)


def clear_of_kinks(x: Tensor, net: Stack) -> bool:
    """Whether no unit of a piecewise linear net is within rounding of its kink."""
    h = x.double()
    for w, b in zip(wide(net.weights)[:-1], wide(net.biases)[:-1], strict=True):
        a = torch.nn.functional.linear(h, w, b)
        if a.abs().min() < 1e-5:
            return False
        h = reference.activate(a, net.activation, net.slope)[0]
    return True


def check(name: str, ours: Tensor, single: Tensor, exact: Tensor, extra: float = 0.0) -> None:
    """Three errors against float64: ours at most twice that of PyTorch in float32, plus 8 units in the last place of
    the largest value (sums in another order), plus ``extra``."""
    finite = torch.isfinite(exact)
    assert ours.dtype == torch.float32 and ours.shape == exact.shape
    assert torch.equal(torch.isfinite(ours), finite), f"{name}: finite elsewhere"
    if not finite.any():
        return
    error, usual = ((t.double() - exact)[finite].abs().max().item() for t in (ours, single))
    bound = 2 * usual + 8 * EPS * max(1.0, exact[finite].abs().max().item()) + extra
    assert error <= bound, f"{name}: error {error:.2e}, of PyTorch in float32 {usual:.2e}, bound {bound:.2e}"


def compare(terms: tuple[Term, ...], x: Tensor, tile: Tile | None = SMALL) -> None:
    energy, grad = room.gradient(terms, x, tile=tile)
    single, exact = reference.mlp_energy(x, terms), reference.mlp_energy(x.double(), wide(terms))
    check("energy", energy, single[0], exact[0])
    check("gradient", grad, single[1], exact[1])


# -- activations


@triton.jit
def activation_kernel(out, derivative, a, act, slope, B: tl.constexpr):
    i = tl.arange(0, B)
    h, d = activations.activate(tl.load(a + i), act, slope)  # pyright: ignore[reportGeneralTypeIssues]
    tl.store(out + i, h)
    tl.store(derivative + i, d)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(4096, generator=generator) * 10.0 ** torch.randint(-6, 2, (4096,), generator=generator)
    a[:8] = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 30.0, -30.0, -0.5, 1.0])
    out, derivative = torch.empty_like(a), torch.empty_like(a)
    activation_kernel[(1,)](out, derivative, a, activations.CODES[name], 0.3, B=4096)
    single = reference.activate(a, name, 0.3)
    exact = reference.activate(a.double(), name, 0.3)
    check("value", out, single[0], exact[0])
    check("derivative", derivative.masked_fill(derivative == STOP, 0.0), single[1], exact[1])
    if name in ("tanh", "elu", "softplus"):
        # 8 units in the last place, however small the value; exp(-a) alone loses |a| / 2 units
        units = 8 + a.double().abs() / 2
        assert ((out.double() - exact[0]).abs() <= units * EPS * exact[0].abs() + 1e-37).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_with_the_errors_of_a_device(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """exp and division off by what the PTX manual allows ex2.approx and div.full, 2^-22 of the result, either way."""
    draw = np.random.default_rng(seed)

    def off(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        def wrong(*arguments: np.ndarray) -> np.ndarray:
            exact = function(*arguments)
            return exact * np.where(draw.random(exact.shape) < 0.5, 1 - 2.0**-22, 1 + 2.0**-22).astype(exact.dtype)

        return wrong

    builder = interpreter.InterpreterBuilder
    exponential, quotient = off(np.exp), off(np.divide)
    monkeypatch.setattr(builder, "create_exp", lambda self, a: self.unary_op(a, exponential))
    monkeypatch.setattr(builder, "create_fdiv", lambda self, a, b: self.binary_op(a, b, quotient))
    a = torch.empty(4096).uniform_(-16, 16, generator=torch.Generator().manual_seed(seed))
    out, derivative = torch.empty_like(a), torch.empty_like(a)
    activation_kernel[(1,)](out, derivative, a, activations.CODES[name], 0.3, B=4096)
    single, exact = reference.activate(a, name, 0.3), reference.activate(a.double(), name, 0.3)
    check("value", out, single[0], exact[0])
    check("derivative", derivative.masked_fill(derivative == STOP, 0.0), single[1], exact[1])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_what_is_not_finite(name: str) -> None:
    a = torch.tensor([float("nan"), float("inf"), float("-inf"), 100.0, -100.0, 3e38, -3e38, 0.0])
    out, derivative = torch.empty_like(a), torch.empty_like(a)
    activation_kernel[(1,)](out, derivative, a, activations.CODES[name], 0.3, B=8)
    derivative.masked_fill_(derivative == STOP, 0.0)
    for found, wanted in zip((out, derivative), reference.activate(a, name, 0.3), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6, equal_nan=True)


# -- energy and gradient


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("hidden", [(20,), (17, 33), (5, 16, 40), (33, 7, 18, 20)], ids=lambda h: f"{len(h)}layers")
def test_scalar(name: str, hidden: tuple[int, ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    while True:
        net = stack(generator, 13, *hidden, 1, activation=name, bias=len(hidden) != 2)
        x = torch.randn(3, 13, generator=generator)
        if name in SMOOTH or clear_of_kinks(x, net):
            break
    compare((Scalar(net, -1.5),), x)


@pytest.mark.parametrize("mask", ["none", "shared", "chain"])
@pytest.mark.parametrize("squash", [False, True], ids=["plain", "tanh"])
@pytest.mark.parametrize("likelihood", ["gaussian", "laplace"])
def test_residual(likelihood: str, squash: bool, mask: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(18, 6, generator=generator)
    net = stack(generator, 6, 20, 37, activation="gelu")
    compare((residual(generator, x, net, mask, likelihood=likelihood, tanh=squash),), x)


def test_quadratic_alone(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 50, generator=generator)
    compare((Quadratic(torch.randn(50, generator=generator), torch.rand(50, generator=generator)),), x)


@pytest.mark.parametrize("tile", [SMALL, None], ids=["small", "shipped"])
def test_a_sum_of_different_stacks(tile: Tile | None, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(19, 10, generator=generator)
    compare(
        (
            Scalar(stack(generator, 10, 20, 40, 1, activation="softplus"), -1.0),
            residual(generator, x, stack(generator, 10, 33, 130, activation="tanh"), "chain", likelihood="laplace"),
            Quadratic(torch.randn(10, generator=generator), torch.rand(10, generator=generator)),
            Scalar(stack(generator, 10, 5, 6, 7, 8, 1, activation="elu", bias=False), 0.5),
            residual(generator, x, stack(generator, 10, 20, 35, 3), "none", tanh=True),
        ),
        x,
        tile,
    )


def test_limits(seed: int) -> None:
    """1,024 inputs and outputs, 256 hidden units."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 1024, generator=generator)
    compare((residual(generator, x, stack(generator, 1024, 256, 1024), "shared"),), x, None)


@pytest.mark.parametrize("inputs", [1, 2, 31, 32, 33])
def test_odd_inputs(inputs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(17, inputs, generator=generator)
    compare((Scalar(stack(generator, inputs, 9, 1)),), x)


def test_the_op_comes_here_and_is_differentiable(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, generator=generator, requires_grad=True)
    net = stack(generator, 3, 8, 1)
    assert mlp_energy.supports_energy((Scalar(net),), x) is None
    results = []
    for backend in ("torch", "triton"):
        energy, grad = mlp_energy_op(x, [Scalar(net)], backend=backend)
        results.append((energy, grad, *torch.autograd.grad(energy.sum() + grad.square().sum(), x)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_no_chains(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    energy, grad = mlp_energy.energy_and_gradient((Scalar(stack(generator, 3, 8, 1)),), torch.zeros(0, 3))
    assert energy.shape == (0,) and grad.shape == (0, 3)


# -- chains


WIDTHS = (6, 1, 9)


@dataclasses.dataclass
class Case:
    chain: MlpChain
    x: Tensor
    steps: int = 2
    first_step: int | Tensor = 5


def case(
    generator: torch.Generator,
    params: list[list[StepParams]],
    *,
    chains: int = 18,
    widths: tuple[int, ...] = WIDTHS,
    terms: tuple[Term, ...] | None = None,
    **options: Any,
) -> Case:
    inputs = sum(widths)
    x = torch.randn(chains, inputs, generator=generator)
    if terms is None:
        terms = (
            Scalar(stack(generator, inputs, 20, 12, 1, activation="gelu"), 2.0),
            residual(generator, x, stack(generator, inputs, 18, 7, activation="softplus"), "chain", tanh=True),
        )
    table = constants_of(params, chains, torch.float32, x.device)
    assert not isinstance(table, str)
    given = {
        "streams": tuple(range(3, 3 + len(widths))),
        "noisy": (True,) * len(widths),
        "moving": (True,) * len(widths),
        "seed": 0x1234_5678_9ABC,
        "chain_offset": 2**32 - 7,
    } | options
    return Case(MlpChain(terms=terms, widths=widths, constants=table[0], present=table[1], **given), x)


class Out(NamedTuple):
    """An :class:`MlpResult` with all records."""

    x: Tensor
    energy: Tensor
    grad_norm: Tensor
    frozen: Tensor


def all_of(result: MlpResult, c: Case) -> Out:
    assert result.energy is not None and result.grad_norm is not None
    assert (result.frozen is None) != c.chain.freeze
    frozen = torch.zeros(len(c.x), dtype=torch.bool) if result.frozen is None else result.frozen
    return Out(result.x, result.energy, result.grad_norm, frozen)


def run(c: Case, tile: Tile | None = SMALL) -> Out:
    assert room.supports(c.chain, c.x) is None
    kept = c.x.clone()
    result = room.run(c.chain, c.x, c.steps, c.first_step, energy=True, grad_norm=True, tile=tile)
    assert torch.equal(c.x, kept) or kept.isnan().any(), "the state was written"
    return all_of(result, c)


def check_chain(c: Case, tile: Tile | None = SMALL) -> Out:
    ours = run(c, tile)
    single = run_in(None, c.chain, c.x, c.steps, c.first_step)
    assert single.energy is not None and single.grad_norm is not None
    double = dataclasses.replace(c.chain, terms=wide(c.chain.terms), constants=c.chain.constants.double())
    exact = run_in(None, double, c.x.double(), c.steps, c.first_step)
    assert exact.energy is not None and exact.grad_norm is not None and exact.frozen is not None
    # normals may differ by 2e-6 a step; twice in float32 itself
    extra = 2e-6 * c.steps * c.chain.constants[:, :, 1].abs().max().item()
    slope = max(1.0, exact.grad_norm.nan_to_num(0, 0, 0).max().item())
    check("x", ours.x, single.x, exact.x, extra)
    check("energy", ours.energy, single.energy, exact.energy, extra * slope)
    check("norm", ours.grad_norm, single.grad_norm, exact.grad_norm, extra * slope)
    assert ours.frozen.dtype == torch.bool and torch.equal(ours.frozen, exact.frozen)
    return ours


PLAIN = StepParams(step_size=0.05, noise_scale=0.2)
ALL = StepParams(0.05, 0.2, grad_clip=0.9, grad_norm_clip=1.5, max_update=0.3, prior_std=0.8, low=-1.2, high=1.1)
ONE = {
    "plain": {},
    "grad_clip": {"grad_clip": 0.5},
    "grad_norm_clip": {"grad_norm_clip": 1.0},
    "norm_above": {"grad_norm_clip": 1e6},
    "max_update": {"max_update": 0.15},
    "prior": {"prior_std": 0.5},
    "low": {"low": -0.4},
    "high": {"high": 0.4},
    "zero_noise": {"noise_scale": 0.0},
}


@pytest.mark.parametrize("noise_at", ["after", "before"])
@pytest.mark.parametrize("name", ONE)
def test_each_option(name: str, noise_at: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # one tensor without it
    changed = dataclasses.replace(PLAIN, **ONE[name])
    check_chain(case(generator, [[changed, PLAIN, changed]], noise_at=noise_at))


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("clamp_noise", [False, True])
@pytest.mark.parametrize("noise_at", ["after", "before"])
def test_all_options(noise_at: str, clamp_noise: bool, freeze: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    observed = (torch.rand(18, sum(WIDTHS), generator=generator) < 0.3).to(torch.uint8)
    check_chain(
        case(generator, [[ALL] * 3], noise_at=noise_at, clamp_noise=clamp_noise, freeze=freeze, observed=observed)
    )


def test_the_shipped_tiles(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    c = case(generator, [[ALL] * 3], chains=34)
    for tile in {tile for tiles in room.TILES.values() for tile in tiles}:
        check_chain(c, tile)


def test_what_does_not_move_and_what_is_not_noisy(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    c = case(generator, [[ALL] * 3], moving=(True, False, True), noisy=(False, True, True))
    out = check_chain(c)
    assert torch.equal(out.x[:, 6], c.x[:, 6]) and not torch.equal(out.x[:, :6], c.x[:, :6])


def test_a_shared_mask(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    observed = (torch.arange(sum(WIDTHS)) % 3 == 0).to(torch.uint8)[None]
    c = case(generator, [[PLAIN] * 3], observed=observed)
    out = check_chain(c)
    assert torch.equal(out.x[:, ::3], c.x[:, ::3]) and (out.x != c.x)[:, 1::3].all()


def test_constants_of_each_step_and_each_chain(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    per_chain = lambda scale: scale * (0.5 + torch.rand(18, 1, generator=generator))
    params = [
        [
            StepParams(
                per_chain(0.05),
                per_chain(0.2),
                grad_clip=per_chain(0.8),
                grad_norm_clip=per_chain(1.0),
                max_update=per_chain(0.3),
                prior_std=per_chain(1.0),
                low=-per_chain(1.0),
                high=per_chain(1.0),
            ),
            StepParams(0.1 / (k + 1), torch.tensor(0.1)),
            dataclasses.replace(PLAIN, high=per_chain(0.8)),
        ]
        for k in range(3)
    ]
    c = case(generator, params)
    c.steps = 3
    check_chain(c)


def test_seed_and_step_in_memory(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    key = random.Random(seed).randrange(2**62, 2**63)
    c = case(generator, [[PLAIN] * 3], seed=key)
    c.first_step = 2**32 - 1  # wraps
    there = dataclasses.replace(c, chain=dataclasses.replace(c.chain, seed=torch.tensor([key])))
    there.first_step = torch.tensor([2**32 - 1])
    for a, b in zip(check_chain(c)[:3], run(there)[:3], strict=True):
        assert torch.equal(a, b)


def test_twenty_tensors(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    widths = tuple(range(1, 21))
    terms = (Scalar(stack(generator, sum(widths), 10, 1)),)
    check_chain(case(generator, [[ALL, PLAIN] * 10], chains=3, widths=widths, terms=terms))


def test_a_restart_changes_nothing(seed: int) -> None:
    """Bit for bit: steps 5 to 8 at once, or 5 to 6 and then 7 to 8."""
    generator = torch.Generator().manual_seed(seed)
    c = case(generator, [[ALL] * 3])
    whole = run(dataclasses.replace(c, steps=4))
    first = run(c)
    second = run(dataclasses.replace(c, x=first.x, first_step=7))
    assert torch.equal(whole.x, second.x)
    assert torch.equal(whole.energy, torch.cat([first.energy, second.energy]))


def test_a_split_of_the_batch_changes_nothing(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    c = case(generator, [[ALL] * 3], chains=40, terms=(Scalar(stack(generator, 16, 20, 1)),))
    whole = run(c)
    for start, stop in ((0, 7), (7, 40)):
        part = dataclasses.replace(c.chain, chain_offset=c.chain.chain_offset + start)
        out = run(dataclasses.replace(c, chain=part, x=c.x[start:stop]))
        # the interpreter's matrix product may round a row by its place; the noise must not differ at all
        torch.testing.assert_close(out.x, whole.x[start:stop], rtol=0, atol=8 * EPS * whole.x.abs().max().item())
        torch.testing.assert_close(out.energy, whole.energy[:, start:stop], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("noise_at", ["after", "before"])
def test_freeze_keeps_the_last_finite_state(noise_at: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    c = case(generator, [[PLAIN] * 3], noise_at=noise_at, freeze=True)
    c.x[2, 3], c.x[5, 8], c.x[7, 6] = float("nan"), float("inf"), -3e38
    out = check_chain(c)
    assert out.frozen[[2, 5]].all() and not out.frozen[:2].any()
    assert torch.equal(out.x[[2, 5]].nan_to_num(), c.x[[2, 5]].nan_to_num())
    # the others, and what is recorded, do not notice
    assert torch.isfinite(out.energy[:, [0, 1, 3, 4, 6]]).all()


@pytest.mark.parametrize("noise_at", ["after", "before"])
def test_a_frozen_chain_does_not_thaw(noise_at: str, seed: int) -> None:
    """Chain 4 leaves the finite numbers in the first of three steps; the next ones would be harmless."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.full((18, 1), 0.05)
    size[4] = torch.inf
    rows = [[dataclasses.replace(PLAIN, step_size=value)] * 3 for value in (size, 0.05, 0.05)]
    c = case(generator, rows, noise_at=noise_at, freeze=True)
    c.steps = 3
    out = check_chain(c)
    assert out.frozen.nonzero().flatten().tolist() == [4]
    assert torch.equal(out.x[4], c.x[4])


def test_nan_stays_visible_through_clips_and_bounds(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for params in (ALL, dataclasses.replace(ALL, grad_norm_clip=None), dataclasses.replace(PLAIN, low=-1.0, high=1.0)):
        c = case(generator, [[params] * 3])
        c.x[3, 1] = float("nan")
        out = check_chain(c)
        assert out.x[3].isnan().all() and not out.x[4].isnan().any()


# -- precision


def rounded_gradient(x: Tensor, net: Stack, weight: float) -> tuple[Tensor, Tensor]:
    """A scalar's energy and gradient with operands of all products in bfloat16, sums in float64."""
    r = lambda t: t.float().bfloat16().double()
    h, slopes = x.double(), []
    biases: Sequence[Tensor] = [b.double() for b in net.biases if b is not None]
    for w, b in zip(net.weights[:-1], biases[:-1], strict=True):
        h, d = reference.activate(r(h) @ r(w).T + b, net.activation, net.slope)
        slopes.append(d)
    last = weight * net.weights[-1][0].double()
    energy = h @ last + weight * biases[-1]
    d = last * slopes[-1]
    for w, slope in zip(reversed(net.weights[1:-1]), reversed(slopes[:-1]), strict=True):
        d = (r(d) @ r(w)) * slope
    return energy, r(d) @ r(net.weights[0])


def test_bf16_rounds_the_operands_and_nothing_else(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    net = stack(generator, 16, 40, 24, 1)
    # one step without noise, of size 1: the move is the gradient
    c = case(generator, [[StepParams(1.0, 0.0)]], widths=(16,), terms=(Scalar(net, -1.0),), precision="bf16")
    c.steps = 1
    out = run(c)
    energy, grad = rounded_gradient(c.x, net, -1.0)
    exact = reference.mlp_energy(c.x.double(), wide(c.chain.terms))
    # a value on the edge may round to its neighbour, 2^-8 of one of 16 to 40 addends
    for ours, rounded, truth in ((out.energy[0], energy, exact[0]), (c.x - out.x, grad, exact[1])):
        off, real = ((ours.double() - t).abs().mean().item() for t in (rounded, truth))
        assert off < 0.1 * real, f"{off:.2e} from the rounded one, {real:.2e} from the exact one"


def test_tf32x3_is_taken(seed: int) -> None:
    # the interpreter multiplies in float32; the GPU tests measure it
    generator = torch.Generator().manual_seed(seed)
    check_chain(case(generator, [[PLAIN] * 3], precision="tf32x3"))


# -- the op, and what is refused


def test_through_the_op(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = [torch.randn(3, 2, 3, generator=generator), torch.randn(3, 5, generator=generator)]
    terms = [Scalar(stack(generator, 11, 20, 1))]
    how = {"steps": 2, "step_size": 0.1, "noise_scale": [0.1, 0.2], "seed": 3, "high": [None, 1.0], "freeze": True}
    ours = langevin_mlp(x, terms, backend="triton", **how)
    wanted = langevin_mlp(x, terms, backend="torch", **how)
    for a, b in zip([*ours.x, *ours[1:3]], [*wanted.x, *wanted[1:3]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert not ours.frozen.any()


def test_another_device_is_refused(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    c = case(generator, [[PLAIN] * 3])
    reason = room.supports(c.chain, c.x.to("meta"))
    assert reason is not None and "meta" in reason


@pytest.mark.parametrize("precision", ["fp32", "tf32x3", "bf16"])
def test_the_parity_case_of_each_precision(precision: str) -> None:
    cpu = torch.device("cpu")
    verdict = parity.check("langevin_mlp", "triton", cpu, precision=precision)
    assert verdict.reason is None
    # it did run in this precision
    assert (verdict.error > 1e-4) == (precision == "bf16")
