"""The CUDA C++ room of ``langevin_mlp`` without a GPU: what a block does, done on the host by the same object file.

``mmebm._cuda`` runs the kernel's functions lane by lane, sums in the order of the kernel's, and the tensor cores'
products by the layout of their fragments. What only a device can show (launches, streams, graphs) is in test_gpu.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmebm import native, noise
from mmebm.backends import require_backends
from mmebm.ops.common.params import FIELDS, StepParams
from mmebm.ops.langevin_mlp import cuda as room
from mmebm.ops.langevin_mlp import op
from mmebm.ops.parity import MLP_TOLERANCE as FLOAT_TOLERANCE
from mmebm.ops.parity import NORMAL_TOLERANCE
from mmebm.ops.terms import ACTIVATIONS, LIMITS, Quadratic, Scalar
from tests.ops.cases import CHAIN_OPTIONS, KINK, PLAIN, away_from_kinks, check_activation, make_chain, points, rows_of

# A gradient's relative error in fp32, as a norm over chains and inputs: two products forward and two back, in each a
# unit roundoff for the operands and one for the sums, whose errors have random signs. Measured over seeds 2.0e-7 to
# 2.9e-7; 24 products of the tensor cores in one accumulator, which they cut off towards zero, make 1.0e-6 to 1.3e-6.
GRADIENT_TOLERANCE = 8 * 2.0**-24
# Of one operand, relative: half a unit in the last place of bf16.
BF16 = 2.0**-8
# In units of 2^-23 (1 + |exact|), as for the C++ room (test_langevin_mlp.py): the same polynomials.
VALUE_ULPS, DERIVATIVE_ULPS = 1.25, 3.0

SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}  # bytes a block may have, CUDA's table of compute capabilities
WIDTHS = (1, 3, 4, 33, 63, 64, 65, 200, 256)


@pytest.fixture(autouse=True)
def _extension() -> None:
    """It loads without a device, so "cuda" can be required here although :func:`native.available` says no."""
    try:
        native.cuda()
    except native.BackendError as error:
        if "cuda" in require_backends() or "extension not built" not in str(error):
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The room on CPU tensors: the same checks and arguments, the launch by the host's function. Its settings."""
    settings = {"rows": 16, "blocks": 1, "bytes": SHARED["sm_90"]}

    def launch(x: Tensor, arguments: tuple[Any, ...]) -> None:
        assert native.cuda().host_langevin_mlp(*arguments, *settings.values())

    monkeypatch.setattr(room, "_launch", launch)
    monkeypatch.setattr(room, "supports", room._reason)
    return settings


def everything(result: op.MlpResult) -> Tensor:
    """All results side by side, a column per chain."""
    assert result.energy is not None and result.grad_norm is not None
    return torch.cat([result.x.T, result.energy, result.grad_norm])


# Three tf32 products keep 22 bits of each operand and leave out the product of what is left: 2^-22 of a product, where
# fp32 rounds by 2^-24. Seed 28000101 has 3.0 times torch's error where terms of the gradient cancel.
TIMES = {"tf32x3": 4}


def three_way(name: str, ours: Tensor, torchs: Tensor, exact: Tensor, tiny: float, times: int = 2) -> None:
    """err(ours) <= times err(torch) + tiny, and the same elements not finite."""
    assert ours.dtype == torchs.dtype and ours.shape == torchs.shape
    assert torch.equal(torch.isfinite(ours), torch.isfinite(torchs)), f"{name}: other elements are finite"
    finite = torch.isfinite(torchs) & torch.isfinite(exact)
    if not finite.any():
        return
    error = (ours.double() - exact).abs()[finite].max().item()
    torch_error = (torchs.double() - exact).abs()[finite].max().item()
    limit = times * torch_error + tiny + FLOAT_TOLERANCE * exact.abs()[finite].max().item()
    assert error <= limit, f"{name}: error {error:.3e}, torch's {torch_error:.3e}, limit {limit:.3e}"


def compare(
    chain: op.MlpChain, x: Tensor, steps: int, double: Callable, *, first_step: int = 0, keep: Tensor | None = None
) -> op.MlpResult:
    """The room against the reference in fp32 and in float64, all results of the chains ``keep``."""
    start = x.clone()
    ours = room.run(chain, start, steps, first_step, energy=True, grad_norm=True)
    assert torch.equal(start.nan_to_num(7.0), x.nan_to_num(7.0)), "the room changed its input"
    torchs = op.run_reference(chain, x, steps, first_step)
    exact = op.run_reference(double(chain), x.double(), steps, first_step)
    rows = torch.ones(x.shape[0], dtype=torch.bool) if keep is None else keep
    scale = chain.constants[:, :, FIELDS.index("noise_scale")].abs().max().item()
    for name in ("x", "energy", "grad_norm"):
        a, b, c = (getattr(result, name) for result in (ours, torchs, exact))
        a, b, c = (t if name == "x" else t.T for t in (a, b, c))
        tiny = steps * NORMAL_TOLERANCE * scale if name == "x" else 0.0
        three_way(name, a[rows], b[rows], c[rows], tiny, TIMES.get(chain.precision, 2))
    if chain.freeze:
        assert ours.frozen is not None and torchs.frozen is not None and torch.equal(ours.frozen, torchs.frozen)
    else:
        assert ours.frozen is None
    plain = room.run(chain, start, steps, first_step)
    assert plain.energy is None and plain.grad_norm is None
    assert torch.equal(plain.x.nan_to_num(7.0), ours.x.nan_to_num(7.0))
    return ours


# -- activations


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(seed: int, name: str) -> None:
    x = points(seed, 500_000)
    slope = float(torch.tensor(0.3))
    value, derivative = torch.full_like(x, math.nan), torch.full_like(x, math.nan)
    index, call = ACTIVATIONS.index(name), native.cuda().host_mlp_activation
    call(index, slope, x.data_ptr(), value.data_ptr(), derivative.data_ptr(), x.numel())
    check_activation(name, x, slope, value, derivative, VALUE_ULPS, DERIVATIVE_ULPS)
    nan = torch.full((1,), math.nan)
    call(index, slope, nan.data_ptr(), value.data_ptr(), derivative.data_ptr(), 1)
    assert value[:1].isnan().all()


# -- chains against the reference


@pytest.mark.parametrize("noise_at", ("after", "before"))
@pytest.mark.parametrize("precision", ("fp32", "tf32x3"))
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_sums_of_terms(
    host: dict[str, int],
    seed: int,
    draw: Any,
    double: Callable,
    margin: Callable,
    name: str,
    precision: Any,
    noise_at: str,
) -> None:
    """The error bound of fp32 holds for three tf32 products too."""
    steps = 12 if name not in ("relu", "leaky_relu", "elu") else 4
    chains, inputs = 21, 7
    x = draw.normal(chains, inputs)
    still = make_chain(draw.sum_of_all(chains, inputs, name), (3, 4), chains, seed, precision=precision)
    if noise_at == "after":
        compare(still, x, steps, double, keep=away_from_kinks(still, x, steps, double, margin))
        return
    # the gradient of a step with no noise is taken at the perturbed state, so one step at a time
    chain = replace(still, noise_at="before")
    exact = double(chain)
    drawn = [noise.normal((chains, w), seed=seed, step=5, stream=i, dtype=torch.float64) for i, w in enumerate((3, 4))]
    keep = margin(x.double() + exact.constants[0, 0, 1] * torch.cat(drawn, 1), exact.terms) > KINK
    compare(chain, x, 1, double, first_step=5, keep=keep)


@pytest.mark.parametrize("precision", ("fp32", "tf32x3"))
@pytest.mark.parametrize("width", WIDTHS)
def test_widths(host: dict[str, int], seed: int, draw: Any, double: Callable, width: int, precision: Any) -> None:
    index = WIDTHS.index(width)
    hidden = [WIDTHS[(index + i) % len(WIDTHS)] for i in range(1, 2 + index % 4)]
    terms = [
        draw.residual(70, width, *hidden, WIDTHS[-1 - index], activation="gelu", tanh=True),
        Scalar(draw.stack(width, *reversed(hidden), 1, activation="tanh")),
    ]
    compare(make_chain(terms, (width,), 70, seed, precision=precision), draw.normal(70, width), 3, double)


def test_limits(host: dict[str, int], seed: int, draw: Any, double: Callable) -> None:
    """The widest of everything, where 16 chains do not fit a block of any device, and 4 fit every one."""
    ends, hidden = LIMITS.ends, [LIMITS.hidden] * LIMITS.hidden_layers
    terms = [draw.residual(5, ends, *hidden, ends, mask=5), draw.quadratic(ends)]
    chain = make_chain(terms, (ends,), 5, seed, freeze=True)
    x = draw.normal(5, ends)
    with pytest.raises(AssertionError):
        room.run(chain, x, 1, 0)
    host["rows"] = 4
    host["bytes"] = SHARED["sm_80"]
    compare(chain, x, 2, double)


@pytest.mark.parametrize("noise_at", ("after", "before"))
@pytest.mark.parametrize("option", CHAIN_OPTIONS)
def test_options(host: dict[str, int], seed: int, draw: Any, double: Callable, option: str, noise_at: Any) -> None:
    chains, widths = 21, (5, 1, 13)
    terms = [Scalar(draw.stack(19, 30, 1)), draw.residual(chains, 19, 20, 8, mask=chains), draw.quadratic(19)]
    x = draw.normal(chains, 19)
    chain = make_chain(
        terms,
        widths,
        chains,
        seed,
        params=StepParams(0.05, 0.1, **CHAIN_OPTIONS[option]),
        noise_at=noise_at,
        clamp_noise=noise_at == "before",
    )
    compare(chain, x, 8, double)

    rows = rows_of(CHAIN_OPTIONS[option], chains, 8, draw.generator)
    mask = draw.mask(chains, 19).to(torch.uint8)
    table = make_chain(terms, widths, chains, seed, params=rows, noise_at=noise_at, observed=mask, chain_offset=11)
    out = compare(table, x, 8, double, first_step=2**32 - 3)
    assert torch.equal(out.x[mask.bool()], x[mask.bool()])
    compare(replace(table, observed=mask[:1], clamp_noise=True), x, 8, double)


@pytest.mark.parametrize("noise_at", ("after", "before"))
def test_fixed_and_silent_tensors(host: dict[str, int], seed: int, draw: Any, double: Callable, noise_at: Any) -> None:
    widths = (3, 0, 5, 2)
    x = draw.normal(21, 10)
    chain = make_chain(
        [Scalar(draw.stack(10, 40, 1))],
        widths,
        21,
        seed,
        moving=(True, True, False, True),
        noisy=(True, True, True, False),
        streams=(7, 2, 1, 2**24 - 1),
        noise_at=noise_at,
    )
    out = compare(chain, x, 6, double)
    assert torch.equal(out.x[:, 3:8], x[:, 3:8])
    # what does not move is no part of the norm
    nothing = room.run(replace(chain, moving=(False,) * 4), x, 2, 0, grad_norm=True)
    assert torch.equal(nothing.x, x) and nothing.grad_norm is not None and not nothing.grad_norm.any()


def test_noise_is_the_written_definition(host: dict[str, int], seed: int) -> None:
    widths, chains = (1, 2, 3, 4, 5, 63, 64, 65, 130), 37
    key, offset = seed * 0x9E3779B97F4A7C15 % 2**64, 2**32 - 3
    flat = Quadratic(torch.zeros(sum(widths)), torch.zeros(sum(widths)))
    chain = make_chain([flat], widths, chains, key, params=StepParams(0.0, 1.0), chain_offset=offset)
    x = torch.zeros(chains, sum(widths))
    for noise_at in ("after", "before"):
        at: Any = noise_at
        word = torch.tensor([key - 2**64 if key >= 2**63 else key])
        for number, step in ((key, 2**32 + 17), (word, torch.tensor([17]))):
            out = room.run(replace(chain, noise_at=at, seed=number), x, 1, step).x
            for i, part in enumerate(out.split(widths, dim=1)):
                exact = noise.normal(part.shape, seed=key, step=17, stream=i, chain_offset=offset, dtype=torch.float64)
                assert (part.double() - exact).abs().max() <= NORMAL_TOLERANCE


# -- products of the tensor cores


def test_bf16_products_are_those_of_rounded_operands(host: dict[str, int], seed: int, draw: Any) -> None:
    """A linear network by way of leaky_relu with slope 1, so that its sums can be made from rounded numbers."""
    chains, sizes = 19, (37, 50, 41, 21)
    stack = draw.stack(*sizes, activation="leaky_relu", slope=1.0)
    term = draw.residual(chains, *sizes)
    term = replace(term, stack=stack)
    x = draw.normal(chains, sizes[0])
    chain = make_chain([term], (sizes[0],), chains, seed, params=StepParams(1.0, 0.0), precision="bf16")
    out = room.run(chain, x, 1, 0, energy=True)

    def rounded(t: Tensor) -> Tensor:
        return t.float().bfloat16().double()

    weights = [rounded(w) for w in stack.weights]
    h = x
    for w, b in zip(weights, stack.biases, strict=True):
        assert b is not None
        h = rounded(h) @ w.T + b.double()
    r = (h - term.target.double()) / term.scale**2
    d = r
    for w in reversed(weights):
        d = rounded(d) @ w
    # an operand may be on the edge between two bf16 numbers in fp32 and fall to the other side: one of dozens
    limit = 4 * BF16 * d.abs().max() / math.sqrt(min(sizes))
    assert ((x.double() - out.x) - d).abs().max() <= limit
    # and the median is far below: nothing else was rounded
    assert ((x.double() - out.x) - d).abs().median() <= 1e-5 * d.abs().max()


@pytest.mark.parametrize("precision", ("fp32", "tf32x3"))
def test_gradients_are_as_near_as_fp32_is(
    host: dict[str, int], seed: int, draw: Any, double: Callable, precision: Any
) -> None:
    """Three products of tf32 numbers are no further from float64 than those of fp32, also when sums are cut off."""
    chains = 32
    chain = make_chain(
        [Scalar(draw.stack(64, 200, 200, 1))], (64,), chains, seed, params=StepParams(1.0, 0.0), precision=precision
    )
    # one step of size 1 without noise: the move is minus the gradient, and near 0 its subtraction loses nothing
    x = 0.01 * draw.normal(chains, 64)
    moved = (x - room.run(chain, x, 1, 0).x).double()
    exact = x.double() - op.run_reference(double(chain), x.double(), 1, 0).x
    error = ((moved - exact).norm() / exact.norm()).item()
    assert error <= GRADIENT_TOLERANCE, error


@pytest.mark.parametrize("precision", ("fp32", "tf32x3", "bf16"))
def test_results_do_not_depend_on_the_block(host: dict[str, int], seed: int, draw: Any, precision: Any) -> None:
    """Bit for bit: a cluster's chains and blocks, what is in shared memory, and what other chains there are."""
    chains = 21
    terms = [
        draw.residual(chains, 70, 200, 256, 300, mask=chains),
        draw.quadratic(70),
        Scalar(draw.stack(70, 33, 129, 1)),
    ]
    x = draw.normal(chains, 70)
    params = replace(PLAIN, grad_norm_clip=1.0)
    chain = make_chain(terms, (33, 37), chains, seed, params=params, precision=precision)
    whole = everything(room.run(chain, x, 3, 0, energy=True, grad_norm=True))
    assert torch.isfinite(whole).all()
    single = ((16, 120_000), (16, 96_000), (8, 227 * 1024), (8, 60_000), (4, 100_000), (4, 30_000))
    clusters = ((blocks, size) for blocks in (2, 4, 8) for size in (50_000, 80_000, 227 * 1024))
    for rows, blocks, size in (*((r, 1, s) for r, s in single), *((8, b, s) for b, s in clusters)):
        host.update(rows=rows, blocks=blocks, bytes=size)
        again = everything(room.run(chain, x, 3, 0, energy=True, grad_norm=True))
        assert torch.equal(again, whole), (rows, blocks, size)
    part = slice(9, 14)
    few = replace(
        chain,
        chain_offset=9,
        terms=(replace(terms[0], target=terms[0].target[part], observed=terms[0].observed[part]), *terms[1:]),
    )
    assert torch.equal(everything(room.run(few, x[part], 3, 0, energy=True, grad_norm=True)), whole[:, part])
    first = room.run(chain, x, 1, 0)
    second = room.run(chain, first.x, 2, 1)
    assert torch.equal(second.x.T, whole[:70])


# -- ends and what is not finite


@pytest.mark.parametrize("precision", ("fp32", "tf32x3", "bf16"))
@pytest.mark.parametrize("noise_at", ("after", "before"))
@pytest.mark.parametrize("freeze", (False, True))
def test_not_finite(host: dict[str, int], seed: int, draw: Any, freeze: bool, noise_at: Any, precision: Any) -> None:
    chains = 23
    x = draw.normal(chains, 6)
    options = StepParams(
        0.02, 0.1, grad_clip=1.0, grad_norm_clip=1.0, max_update=1.0, prior_std=1.0, low=-3.0, high=3.0
    )
    chain = make_chain(
        [Scalar(draw.stack(6, 20, 1)), draw.quadratic(6)],
        (2, 4),
        chains,
        seed,
        params=options,
        freeze=freeze,
        noise_at=noise_at,
        precision=precision,
    )
    healthy = room.run(chain, x, 5, 0)
    broken = x.clone()
    broken[4, 1] = math.nan
    broken[20, 5] = -math.nan
    out = room.run(chain, broken, 5, 0)
    sick = torch.zeros(chains, dtype=torch.bool).index_fill(0, torch.tensor([4, 20]), True)
    assert torch.equal(out.x[~sick], healthy.x[~sick])  # the others in the block do not notice
    if freeze:
        assert out.frozen is not None and torch.equal(out.frozen, sick)
        assert torch.equal(out.x[sick].nan_to_num(7.0), broken[sick].nan_to_num(7.0))
    else:
        assert out.x[4, :2].isnan().all() and out.x[20, 2:].isnan().all()


@pytest.mark.parametrize("noise_at", ("after", "before"))
def test_freeze_keeps_the_last_finite_state(host: dict[str, int], seed: int, draw: Any, noise_at: Any) -> None:
    chains, chosen = 19, torch.tensor([0, 7, 18])
    step_size = torch.full((chains,), 0.1)
    step_size[chosen] = 1e15  # overflows in the third step
    chain = make_chain(
        [Quadratic(torch.zeros(4), torch.ones(4))],
        (1, 3),
        chains,
        seed,
        params=StepParams(step_size, 0.1),
        freeze=True,
        noise_at=noise_at,
    )
    x = draw.normal(chains, 4)
    out = room.run(chain, x, 9, 0)
    expected = op.run_reference(chain, x, 9, 0)
    assert out.frozen is not None and out.frozen.nonzero().flatten().tolist() == chosen.tolist()
    # two steps of 1e15, and the bound that test_langevin_mlp.py derives
    gain = torch.where(step_size > 1, step_size.double().square(), 10.0)[:, None]
    limit = gain * (0.1 * 2e-6 + 4 * 2.0**-24 * 10) + 8 * 2.0**-24 * expected.x.double().abs()
    assert ((out.x.double() - expected.x.double()).abs() <= limit).all()
    assert (out.x[chosen].abs().amax(1) > 1e28).all() and torch.isfinite(out.x).all()


def test_no_steps_and_no_chains(host: dict[str, int], seed: int, draw: Any) -> None:
    chain = make_chain([Scalar(draw.stack(4, 8, 1))], (4,), 3, seed, freeze=True)
    x = draw.normal(3, 4)
    out = room.run(chain, x, 0, 0, energy=True, grad_norm=True)
    assert torch.equal(out.x, x) and out.energy is not None and out.energy.shape == (0, 3)
    assert out.frozen is not None and not out.frozen.any()
    out = room.run(chain, x[:0], 5, 0, energy=True, grad_norm=True)
    assert out.x.shape == (0, 4) and out.energy is not None and out.energy.shape == (5, 0)


# -- refusals


def test_refusals(host: dict[str, int], seed: int, draw: Any) -> None:
    terms = draw.sum_of_all(6, 9)
    chain, x = make_chain(terms, (4, 5), 6, seed), draw.normal(6, 9)
    assert room._reason(chain, x) is None
    cases: list[tuple[op.MlpChain, Tensor, str]] = [
        (chain, x.double(), "float64"),
        (chain, x[0], "shape"),
        (chain, x[:, :8], "inputs"),
        (chain, x.to_sparse(), "sparse"),
        (chain, x.to("meta"), "meta"),
        (replace(chain, widths=(4, 4)), x, "widths"),
        (replace(chain, widths=(10, -1)), x, "widths"),
        (replace(chain, streams=(0,)), x, "streams"),
        (replace(chain, present=(0, 0, 0)), x, "present"),
        (replace(chain, constants=chain.constants.double()), x, "constants"),
        (replace(chain, constants=chain.constants[..., :7, :]), x, "constants"),
        (replace(chain, constants=chain.constants.expand(1, 2, 8, 5)), x, "constants"),
        (replace(chain, constants=chain.constants[:0]), x, "constants"),
        (replace(chain, observed=torch.zeros(6, 9)), x, "observed"),
        (replace(chain, observed=torch.zeros(2, 9, dtype=torch.uint8)), x, "observed"),
        (replace(chain, seed=torch.zeros(1, dtype=torch.int64, device="meta")), x, "seed"),
        (replace(chain, terms=(Scalar(draw.stack(8, 3, 1)),)), x, "8 inputs"),
        (replace(chain, terms=(Scalar(draw.stack(9, 1)),)), x, "hidden layers"),
        (replace(chain, terms=(Scalar(draw.stack(9, LIMITS.hidden + 1, 1)),)), x, "hidden units"),
        (replace(chain, terms=(Scalar(draw.stack(9, 0, 1)),)), x, "without inputs or outputs"),
        (replace(chain, terms=(Quadratic(torch.zeros(9).double(), torch.zeros(9)),)), x, "float64"),
        (replace(chain, terms=tuple(terms) * 4), x, "terms"),
    ]
    for wrong, state, words in cases:
        reason = room._reason(wrong, state)
        assert reason is not None and words in reason, (reason, words)
        with pytest.raises(native.BackendError, match="cuda: langevin_mlp"):
            room.run(wrong, state, 2, 0)
    with pytest.raises(native.BackendError, match="3 steps with constants for 2"):
        room.run(replace(chain, constants=chain.constants.repeat(2, 1, 1, 1)), x, 3, 0)
    with pytest.raises(ValueError, match="first_step"):
        room.run(chain, x, 1, torch.zeros(2, dtype=torch.int64))


def test_a_state_on_the_cpu_is_refused(seed: int, draw: Any) -> None:
    chain, x = make_chain([Scalar(draw.stack(4, 8, 1))], (4,), 3, seed), draw.normal(3, 4)
    assert room.supports(chain, x) == "the state is on cpu, taken is a CUDA device"
    with pytest.raises(native.BackendError, match="the state is on cpu"):
        op.room("cuda", chain, x)
