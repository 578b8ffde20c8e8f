"""The op ``langevin_mlp``: the C++ room against the reference in float64, its invariances, the functional entry."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from mmebm import native, noise
from mmebm.ops.common.params import FIELDS, StepParams
from mmebm.ops.langevin_mlp import cpp, op
from mmebm.ops.parity import MLP_TOLERANCE as FLOAT_TOLERANCE
from mmebm.ops.parity import NORMAL_TOLERANCE, limit
from mmebm.ops.terms import ACTIVATIONS, LIMITS, Quadratic, Residual, Scalar, Stack, Term, pack
from tests.ops.cases import CHAIN_OPTIONS, KINK, PLAIN, away_from_kinks, check_activation, make_chain, points, rows_of

pytestmark = pytest.mark.usefixtures("cpp")

# Through a layer of one or three units the error of a single derivative (DERIVATIVE_ULPS) is that of the whole
# gradient: nothing averages it. Of the largest result: 2.4e-6 was the worst of 230 seeds.
NARROW_TOLERANCE = 5e-6

WIDTHS = (1, 3, 33, 63, 64, 65, 200, 256, 1000, 1024)
CHAINS = (1, 3, 17, 100)


def three_way(
    name: str, ours: Tensor, torchs: Tensor, exact: Tensor, tiny: float, relative: float = FLOAT_TOLERANCE
) -> None:
    """err(ours) <= 2 err(torch) + tiny, and the same elements not finite. ``ours`` may be the first rows only."""
    assert ours.dtype == torchs.dtype and ours.shape[1:] == torchs.shape[1:]
    different = (torch.isfinite(ours) != torch.isfinite(torchs[: len(ours)])).nonzero()
    assert len(different) == 0, f"{name}: only one is finite at {different[:5].tolist()}"
    finite = torch.isfinite(torchs) & torch.isfinite(exact)
    error = (ours.double() - exact[: len(ours)]).abs()[finite[: len(ours)]]
    if error.numel() == 0:
        return
    allowed = limit(torchs[finite], exact[finite], tiny, relative)
    assert error.max() <= allowed, f"{name}: error {error.max():.3e}, limit {allowed:.3e}"


def part_of(chain: op.MlpChain, rows: slice) -> op.MlpChain:
    """The problem of some of the chains."""
    terms = []
    for term in chain.terms:
        if isinstance(term, Residual):
            mask = term.observed
            mask = mask if mask is None or mask.shape[0] == 1 else mask[rows]
            term = replace(term, target=term.target[rows], observed=mask)
        terms.append(term)
    table, observed = chain.constants, chain.observed
    return replace(
        chain,
        terms=tuple(terms),
        constants=table if table.shape[-1] == 1 else table[..., rows].contiguous(),
        observed=observed if observed is None or observed.shape[0] == 1 else observed[rows],
        chain_offset=chain.chain_offset + (rows.start or 0),
    )


def compare(
    chain: op.MlpChain,
    x: Tensor,
    steps: int,
    double: Callable,
    *,
    first_step: int = 0,
    keep: Tensor | None = None,
    chains: int | None = None,
    relative: float = FLOAT_TOLERANCE,
) -> op.MlpResult:
    """The C++ room against the reference in fp32 and in float64, all results.

    ``keep``: the chains that count. ``chains``: C++ gets only the first of the batch; torch's error is still that of
    all of it, because the error of one chain alone may happen to be next to nothing.
    """
    chains = x.shape[0] if chains is None else chains
    ours_chain, start = part_of(chain, slice(0, chains)), x[:chains].clone()
    ours = cpp.run(ours_chain, start, steps, first_step, energy=True, grad_norm=True)
    assert torch.equal(start.nan_to_num(7.0), x[:chains].nan_to_num(7.0)), "the room changed its input"
    torchs = op.run_reference(chain, x, steps, first_step)
    exact = op.run_reference(double(chain), x.double(), steps, first_step)
    rows = torch.ones(x.shape[0], dtype=torch.bool) if keep is None else keep
    scale = chain.constants[:, :, FIELDS.index("noise_scale")].abs().max().item()
    for name in ("x", "energy", "grad_norm"):
        a, b, c = (getattr(result, name) for result in (ours, torchs, exact))
        a, b, c = (t if name == "x" else t.T for t in (a, b, c))
        tiny = steps * NORMAL_TOLERANCE * scale if name == "x" else 0.0
        three_way(name, a[rows[:chains]], b[rows], c[rows], tiny, relative)
    if chain.freeze:
        assert torch.equal(ours.frozen, torchs.frozen[:chains])
    else:
        assert ours.frozen is None
    # what is not asked for is not there, and asking changes nothing
    plain = cpp.run(ours_chain, start, steps, first_step)
    assert plain.energy is None and plain.grad_norm is None
    assert torch.equal(plain.x.nan_to_num(7.0), ours.x.nan_to_num(7.0))
    return ours


# -- activations


# In units of 2^-23 (1 + |exact|): the largest seen over 5.6 million bit patterns were 1.07 (silu) and at most 0.74 for
# the values, 1.6 (gelu) and at most 0.9 for the derivatives.
VALUE_ULPS, DERIVATIVE_ULPS = 1.25, 2.0


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(isa: str, seed: int, name: str) -> None:
    x = points(seed, 50_000)
    slope = float(torch.tensor(0.3))
    value, derivative = torch.full_like(x, math.nan), torch.full_like(x, math.nan)
    index = ACTIVATIONS.index(name)
    ours = "generic" if isa == "baseline" else isa
    native.cpu().mlp_activation(index, slope, x.data_ptr(), value.data_ptr(), derivative.data_ptr(), x.numel(), ours)
    check_activation(name, x, slope, value, derivative, VALUE_ULPS, DERIVATIVE_ULPS)
    nan = torch.full((5,), math.nan)
    native.cpu().mlp_activation(index, slope, nan.data_ptr(), value.data_ptr(), derivative.data_ptr(), 5, ours)
    assert value[:5].isnan().all()


# -- chains against the reference


@pytest.mark.parametrize("noise_at", ("after", "before"))
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_sums_of_terms(
    isa: str, seed: int, draw: Any, double: Callable, margin: Callable, name: str, noise_at: str
) -> None:
    steps = 12 if name not in ("relu", "leaky_relu", "elu") else 4
    chains, inputs = 50, 7
    terms = draw.sum_of_all(chains, inputs, name)
    x = draw.normal(chains, inputs)
    still = make_chain(terms, (3, 4), chains, seed)
    if noise_at == "after":
        compare(still, x, steps, double, keep=away_from_kinks(still, x, steps, double, margin))
        return
    # the gradient of a step with no noise is taken at the perturbed state, so one step at a time
    chain = replace(still, noise_at="before")
    exact = double(chain)
    drawn = [noise.normal((chains, w), seed=seed, step=5, stream=i, dtype=torch.float64) for i, w in enumerate((3, 4))]
    keep = margin(x.double() + exact.constants[0, 0, 1] * torch.cat(drawn, 1), exact.terms) > KINK
    compare(chain, x, 1, double, first_step=5, keep=keep)


@pytest.mark.parametrize("width", WIDTHS)
def test_widths(isa: str, seed: int, draw: Any, double: Callable, width: int) -> None:
    index = WIDTHS.index(width)
    outputs, chains = WIDTHS[-1 - index], CHAINS[index % len(CHAINS)]
    hidden = [WIDTHS[(index + i) % 8] for i in range(1, 2 + index % 4)]
    terms = [
        draw.residual(100, width, *hidden, outputs, activation="gelu", tanh=True),
        Scalar(draw.stack(width, *reversed(hidden), 1, activation="tanh")),
    ]
    chain = make_chain(terms, (width,), 100, seed)
    compare(chain, draw.normal(100, width), 3, double, chains=chains, relative=NARROW_TOLERANCE)


@pytest.mark.parametrize("layers", (1, 2, 3, 4))
@pytest.mark.parametrize("chains", CHAINS)
def test_depths(isa: str, seed: int, draw: Any, double: Callable, chains: int, layers: int) -> None:
    hidden = [33, 64, 20, 1][:layers]
    stack = draw.stack(5, *hidden, 1, activation="softplus")
    stack = Stack.mlp(stack.weights, (None, *stack.biases[1:-1], None), stack.activation, stack.slope)
    chain = make_chain([Scalar(stack, 2.0)], (5,), 100, seed)
    compare(chain, draw.normal(100, 5), 10, double, chains=chains)


@pytest.mark.parametrize("noise_at", ("after", "before"))
@pytest.mark.parametrize("option", CHAIN_OPTIONS)
def test_options(isa: str, seed: int, draw: Any, double: Callable, option: str, noise_at: Any) -> None:
    chains, widths = 37, (5, 1, 13)
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
def test_fixed_and_silent_tensors(isa: str, seed: int, draw: Any, double: Callable, noise_at: Any) -> None:
    widths = (3, 5, 2)
    x = draw.normal(21, 10)
    chain = make_chain(
        [Scalar(draw.stack(10, 40, 1))],
        widths,
        21,
        seed,
        moving=(True, False, True),
        noisy=(True, True, False),
        streams=(7, 1, 2**24 - 1),
        noise_at=noise_at,
    )
    out = compare(chain, x, 6, double)
    assert torch.equal(out.x[:, 3:8], x[:, 3:8])
    # what does not move is no part of the norm
    nothing = cpp.run(replace(chain, moving=(False, False, False)), x, 2, 0, grad_norm=True)
    assert torch.equal(nothing.x, x) and nothing.grad_norm is not None and not nothing.grad_norm.any()


def flat_quadratic(inputs: int) -> Quadratic:
    return Quadratic(torch.zeros(inputs), torch.zeros(inputs))


def test_noise_is_the_written_definition(isa: str, seed: int) -> None:
    widths, chains = (1, 2, 3, 4, 5, 63, 64, 65, 130), 37
    key, offset = seed * 0x9E3779B97F4A7C15 % 2**64, 2**32 - 3
    chain = make_chain(
        [flat_quadratic(sum(widths))], widths, chains, key, params=StepParams(0.0, 1.0), chain_offset=offset
    )
    x = torch.zeros(chains, sum(widths))
    for noise_at in ("after", "before"):
        out = cpp.run(replace(chain, noise_at=noise_at), x, 1, 2**32 + 17).x
        for i, part in enumerate(out.split(widths, dim=1)):
            exact = noise.normal(part.shape, seed=key, step=17, stream=i, chain_offset=offset, dtype=torch.float64)
            assert (part.double() - exact).abs().max() <= NORMAL_TOLERANCE


# -- what no result may depend on


def varied(draw: Any, seed: int, chains: int, steps: int) -> tuple[op.MlpChain, Tensor]:
    rows = [
        [
            StepParams(0.02 + 0.001 * k, 0.1, grad_norm_clip=torch.linspace(0.5, 3, chains), prior_std=2.0),
            StepParams(0.01, 0.05, grad_clip=0.5, low=-1.5),
        ]
        for k in range(steps)
    ]
    terms = draw.sum_of_all(chains, 9)
    return make_chain(terms, (4, 5), chains, seed, params=rows), draw.normal(chains, 9)


def everything(result: op.MlpResult) -> Tensor:
    assert result.energy is not None and result.grad_norm is not None
    return torch.cat([result.x.T, result.energy, result.grad_norm])


@pytest.mark.parametrize("noise_at", ("after", "before"))
def test_batch_split(isa: str, seed: int, draw: Any, noise_at: Any) -> None:
    chains, steps = 101, 15
    chain, x = varied(draw, seed, chains, steps)
    chain = replace(chain, noise_at=noise_at, observed=draw.mask(chains, 9).to(torch.uint8), freeze=True)
    whole = everything(cpp.run(chain, x, steps, 0, energy=True, grad_norm=True))
    cuts = [0, 1, 18, 34, 83, 101]
    parts = [
        everything(cpp.run(part_of(chain, slice(a, b)), x[a:b], steps, 0, energy=True, grad_norm=True))
        for a, b in pairwise(cuts)
    ]
    assert torch.equal(torch.cat(parts, 1), whole)


@pytest.mark.parametrize(
    "sizes", ((1024, 3, 256, 1000), (600, 2, 4, 7), (5, 200, 1, 33), (2, 64, 64, 4), (3, 9, 17, 1))
)
def test_rests_of_a_batch(isa: str, seed: int, draw: Any, sizes: tuple[int, ...]) -> None:
    """Few chains take other loops than many; sums have one order all the same, also where they are cut in parts."""
    chains = 48
    terms = [draw.residual(chains, *sizes, mask=chains), draw.quadratic(sizes[0]), Scalar(draw.stack(sizes[0], 20, 1))]
    x = draw.normal(chains, sizes[0])
    chain = make_chain(terms, (sizes[0],), chains, seed, params=replace(PLAIN, grad_norm_clip=1.0))
    whole = everything(cpp.run(chain, x, 3, 0, energy=True, grad_norm=True))
    for size in (1, 3, 4, 5, 7, 8, 9, 15, 20, 23):
        part = part_of(chain, slice(10, 10 + size))
        ours = everything(cpp.run(part, x[10 : 10 + size], 3, 0, energy=True, grad_norm=True))
        assert torch.equal(ours, whole[:, 10 : 10 + size]), size


def test_restart(isa: str, seed: int, draw: Any) -> None:
    chain, x = varied(draw, seed, 20, 15)
    whole = cpp.run(chain, x, 15, 3, energy=True, grad_norm=True)
    first = cpp.run(chain.rows(0, 6), x, 6, 3, energy=True, grad_norm=True)
    second = cpp.run(chain.rows(6, 15), first.x, 9, 9, energy=True, grad_norm=True)
    assert torch.equal(second.x, whole.x)
    for name in ("energy", "grad_norm"):
        assert torch.equal(torch.cat([getattr(first, name), getattr(second, name)]), getattr(whole, name))


def test_threads(isa: str, seed: int, draw: Any) -> None:
    chain, x = varied(draw, seed, 333, 4)
    results = []
    for threads in (1, 2, 3, 16):
        torch.set_num_threads(threads)
        results.append(everything(cpp.run(chain, x, 4, 0, energy=True, grad_norm=True)))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_instruction_sets_agree(seed: int, draw: Any, name: str, use_isa: Callable[[str], None]) -> None:
    chains = 70
    chain = make_chain(
        draw.sum_of_all(chains, 9, name),
        (4, 5),
        chains,
        seed,
        params=StepParams(0.02, 0.1, grad_norm_clip=1.0, grad_clip=0.4, prior_std=1.0, low=-2.0),
    )
    x = draw.normal(chains, 9)
    results = []
    for isa in ("avx2", "avx512"):
        use_isa(isa)
        results.append(everything(cpp.run(chain, x, 20, 0, energy=True, grad_norm=True)))
    assert torch.equal(*results)


# -- ends and what is not finite


def test_no_steps_and_no_chains(isa: str, seed: int, draw: Any) -> None:
    chain = make_chain([Scalar(draw.stack(4, 8, 1))], (4,), 3, seed, freeze=True)
    x = draw.normal(3, 4)
    out = cpp.run(chain, x, 0, 0, energy=True, grad_norm=True)
    assert torch.equal(out.x, x) and out.energy is not None and out.energy.shape == (0, 3)
    assert out.frozen is not None and not out.frozen.any()
    out = cpp.run(chain, x[:0], 5, 0, energy=True, grad_norm=True)
    assert out.x.shape == (0, 4) and out.energy is not None and out.energy.shape == (5, 0)
    assert out.frozen is not None and out.frozen.shape == (0,)


@pytest.mark.parametrize("noise_at", ("after", "before"))
@pytest.mark.parametrize("freeze", (False, True))
def test_not_finite(isa: str, seed: int, draw: Any, double: Callable, freeze: bool, noise_at: Any) -> None:
    chains = 23
    x = draw.normal(chains, 6)
    terms = [Scalar(draw.stack(6, 20, 1)), draw.quadratic(6)]
    options = StepParams(
        0.02, 0.1, grad_clip=1.0, grad_norm_clip=1.0, max_update=1.0, prior_std=1.0, low=-3.0, high=3.0
    )
    chain = make_chain(terms, (2, 4), chains, seed, params=options, freeze=freeze, noise_at=noise_at)
    healthy = cpp.run(chain, x, 5, 0)
    broken = x.clone()
    broken[4, 1] = math.nan
    broken[20, 5] = -math.nan
    out = compare(chain, broken, 5, double)
    sick = torch.zeros(chains, dtype=torch.bool).index_fill(0, torch.tensor([4, 20]), True)
    # its neighbours in the vector do not notice
    assert torch.equal(out.x[~sick], healthy.x[~sick])
    if freeze:
        assert torch.equal(out.frozen, sick)
        assert torch.equal(out.x.nan_to_num(7.0), torch.where(sick[:, None], broken.nan_to_num(7.0), out.x))
    else:
        assert out.x[4, :2].isnan().all() and out.x[20, 2:].isnan().all()


@pytest.mark.parametrize("noise_at", ("after", "before"))
def test_freeze_keeps_the_last_finite_state(isa: str, seed: int, draw: Any, double: Callable, noise_at: Any) -> None:
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
    out = cpp.run(chain, x, 9, 0)
    expected = op.run_reference(chain, x, 9, 0)
    assert out.frozen is not None and out.frozen.nonzero().flatten().tolist() == chosen.tolist()
    assert torch.equal(out.frozen, expected.frozen)
    # From the step before, where all was finite: two steps of 1e15. A chain that contracts has at most ten times the
    # error of a step, which is that of a normal, 2e-6 times the scale of 0.1, and some roundings of 2**-24 of numbers
    # below 10; the chosen two multiply the error of their first step, also where x + 0.1 xi has cancelled, by 1e30.
    gain = torch.where(step_size > 1, step_size.double().square(), 10.0)[:, None]
    limit = gain * (0.1 * 2e-6 + 4 * 2.0**-24 * 10) + 8 * 2.0**-24 * expected.x.double().abs()
    assert ((out.x.double() - expected.x.double()).abs() <= limit).all()
    assert (out.x[chosen].abs().amax(1) > 1e28).all() and torch.isfinite(out.x).all()


def test_stationary_variance(isa: str, seed: int) -> None:
    h, chains, inputs = 0.5, 8000, 3
    chain = make_chain(
        [Quadratic(torch.full((inputs,), 2.0), torch.ones(inputs))],
        (inputs,),
        chains,
        seed,
        params=StepParams(h, math.sqrt(2 * h)),
    )
    # (1 - h)^40: nothing is left of the start
    x = cpp.run(chain, torch.zeros(chains, inputs), 40, 0).x.double() - 2.0
    variance, n = 1 / (1 - h / 2), chains * inputs
    # six standard errors each
    assert abs(x.mean()) < 6 * math.sqrt(variance / n)
    assert abs(x.square().mean() - variance) < 6 * variance * math.sqrt(2 / n)


# -- refusals


def test_refusals(seed: int, draw: Any) -> None:
    terms = draw.sum_of_all(6, 9)
    chain, x = make_chain(terms, (4, 5), 6, seed), draw.normal(6, 9)
    assert cpp.supports(chain, x) is None
    nan = chain.constants.clone()
    nan[0, 1, FIELDS.index("low")] = math.nan
    wide = Scalar(draw.stack(8, 3, 1))
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
        (replace(chain, constants=nan), x, "low holds NaN"),
        (replace(chain, observed=torch.zeros(6, 9)), x, "observed"),
        (replace(chain, observed=torch.zeros(2, 9, dtype=torch.uint8)), x, "observed"),
        (replace(chain, terms=(wide,)), x, "8 inputs"),
        (replace(chain, terms=(Scalar(draw.stack(9, 0, 1)),)), x, "without inputs or outputs"),
        (replace(chain, terms=(Quadratic(torch.zeros(9).double(), torch.zeros(9)),)), x, "float64"),
    ]
    for wrong, state, words in cases:
        reason = cpp.supports(wrong, state)
        assert reason is not None and words in reason, (reason, words)
        with pytest.raises(native.BackendError, match="cpp: langevin_mlp"):
            cpp.run(wrong, state, 2, 0)
    with pytest.raises(native.BackendError, match="3 steps with constants for 2"):
        cpp.run(replace(chain, constants=chain.constants.repeat(2, 1, 1, 1)), x, 3, 0)
    # what supports leaves to the check of the terms
    good = draw.stack(9, 4, 1)
    for stack, words in (
        (Stack.mlp(good.weights, (torch.zeros(3), None)), "biases"),
        (Stack.mlp((good.weights[0], torch.zeros(1, 3)), good.biases), "weights"),
        (Stack.mlp(good.weights, good.biases, "sine"), "activation"),  # type: ignore[arg-type]
        (Stack(good.layers[:2]), "linear layers with an activation between them"),
        (Stack((good.layers[0], replace(good.layers[1], x=0), good.layers[2])), "each layer's result in the next"),
    ):
        with pytest.raises(ValueError, match=words):
            cpp.run(replace(chain, terms=(Scalar(stack),)), x, 1, 0)
    with pytest.raises(ValueError, match="target"):
        cpp.run(replace(chain, terms=(replace(terms[1], target=torch.zeros(5, 5)),)), x, 1, 0)


def test_binding_checks_sizes(seed: int, draw: Any) -> None:
    extension, x = native.cpu(), draw.normal(3, 4)
    w, out, table = draw.normal(1, 4), torch.zeros(3, 4), torch.zeros(1, 1, 8, 1)
    layer = {"weight": w.data_ptr(), "bias": 0, "inputs": 4, "outputs": 1}
    good = {"kind": "scalar", "layers": [layer], "activation": 0, "slope": 0.0, "weight": 1.0}
    tensor = {"width": 4, "stream": 0, "noisy": True, "moving": True, "present": 3}
    job = {
        "x": x.data_ptr(),
        "chains": 3,
        "inputs": 4,
        "threads": 1,
        "isa": "auto",
        "tensors": [tensor],
        "constants": table.data_ptr(),
        "rows": 1,
        "columns": 1,
        "observed": 0,
        "observed_stride": 0,
        "steps": 1,
        "seed": 0,
        "first_step": 0,
        "chain_offset": 0,
        "noise_before": False,
        "clamp_noise": False,
        "out": out.data_ptr(),
        "energy": 0,
        "grad_norm": 0,
        "frozen": 0,
    }
    extension.langevin_mlp(job, [good])
    assert torch.equal(out, x)
    residual = {"kind": "residual", "scale": 1.0, "laplace": False, "tanh": False, "target": w.data_ptr()}
    for term in (
        {"kind": "cubic"},
        {"layers": [{**layer, "inputs": 5}]},
        {"layers": []},
        {"activation": 7},
        {"layers": [{**layer, "weight": 0}]},
        {"layers": [{**layer, "outputs": 2}]},
        {"kind": "quadratic", "mean": 0, "precision": w.data_ptr()},
        {**residual, "observed": w.data_ptr(), "observed_stride": 2},
    ):
        with pytest.raises(ValueError):
            extension.langevin_mlp(job, [{**good, **term}])
    with pytest.raises(ValueError):
        extension.langevin_mlp(job, [])
    for wrong in (
        {"tensors": []},
        {"tensors": [{**tensor, "width": 5}]},
        {"tensors": [{**tensor, "width": 3}]},
        {"tensors": [{**tensor, "width": -1}, {**tensor, "width": 5}]},
        {"rows": 0},
        {"columns": 2},
        {"observed_stride": 3},
        {"x": 0},
        {"out": 0},
        {"constants": 0},
        {"chains": -1},
        {"inputs": 0},
        {"steps": -1},
    ):
        with pytest.raises(ValueError):
            extension.langevin_mlp({**job, **wrong}, [good])
    for name in ("seed", "steps", "tensors"):
        with pytest.raises((KeyError, ValueError)):
            extension.langevin_mlp({k: v for k, v in job.items() if k != name}, [good])


# -- the functional entry


def entry(draw: Any) -> tuple[list[Tensor], list[Term]]:
    x = [draw.normal(5, 2, 3), draw.normal(5)]
    return x, [Scalar(draw.stack(7, 12, 1)), draw.residual(5, 7, 6, 3, mask=1), draw.quadratic(7)]


SETTINGS: dict[str, Any] = {
    "steps": 4,
    "step_size": [0.05, 0.01],
    "noise_scale": 0.1,
    "seed": 3,
    "prior_std": [None, 2.0],
}


def test_entry(seed: int, draw: Any, double: Callable) -> None:
    x, terms = entry(draw)
    observed = [torch.tensor([True, False, False]), None]
    settings = {**SETTINGS, "seed": seed, "observed": observed, "low": torch.linspace(-2, -1, 5), "freeze": True}
    ours = op.langevin_mlp(x, terms, backend="cpp", **settings)
    exact = op.langevin_mlp(double(x), double(terms), backend="torch", **settings)
    for a, b, t in zip(ours.x, exact.x, x, strict=True):
        assert a.shape == t.shape and a.dtype == t.dtype
        # 4 steps of noise 0.1, each normal within 2e-6
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=4e-6)
    assert torch.equal(ours.x[0][..., 0], x[0][..., 0])
    torch.testing.assert_close(ours.energy.double(), exact.energy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.grad_norm.double(), exact.grad_norm, rtol=1e-5, atol=1e-5)
    assert ours.frozen.shape == (5,) and not ours.frozen.any()
    # auto is this room on a CPU; a state that it does not take goes to the reference, or is refused by name
    auto = op.langevin_mlp(x, terms, **settings)
    assert all(torch.equal(a, b) for a, b in zip(auto.x, ours.x, strict=True))
    assert all(a.dtype == torch.float64 for a in op.langevin_mlp(double(x), double(terms), **settings).x)
    with pytest.raises(native.BackendError, match="float64"):
        op.langevin_mlp(double(x), double(terms), backend="cpp", **settings)


def test_entry_takes_any_strides(seed: int, draw: Any) -> None:
    x, terms = entry(draw)
    settings = {**SETTINGS, "seed": seed, "backend": "cpp"}
    expected = op.langevin_mlp(x, terms, **settings)
    twice = [torch.stack([t, t], -1)[..., 0].requires_grad_() for t in x]
    stack = terms[0].stack
    weights = [w.T.contiguous().T.requires_grad_() for w in stack.weights]
    columns = Stack.mlp(weights, stack.biases, stack.activation, stack.slope)
    target = terms[1].target.T.contiguous().T
    strided = [replace(terms[0], stack=columns), replace(terms[1], target=target), terms[2]]
    out = op.langevin_mlp(twice, strided, **settings)
    for a, b in zip(out.x, expected.x, strict=True):
        assert torch.equal(a, b) and not a.requires_grad


def test_entry_without_steps_or_chains(seed: int, draw: Any) -> None:
    x, terms = entry(draw)
    for backend in ("torch", "cpp"):
        out = op.langevin_mlp(x, terms, **{**SETTINGS, "steps": 0, "backend": backend})
        assert all(torch.equal(a, b) for a, b in zip(out.x, x, strict=True)) and out.energy.shape == (0, 5)
        empty = op.langevin_mlp([t[:0] for t in x], terms[:1], **{**SETTINGS, "backend": backend})
        assert empty.x[0].shape == (0, 2, 3) and empty.grad_norm.shape == (4, 0)


def test_too_wide_is_refused_by_name(seed: int, draw: Any) -> None:
    for sizes in ((2, LIMITS.hidden + 1, 1), (LIMITS.ends + 1, 4, 1), (2, *[4] * (LIMITS.hidden_layers + 1), 1)):
        x = [draw.normal(2, sizes[0])]
        terms = [Scalar(draw.stack(*sizes))]
        with pytest.raises(native.BackendError, match="taken are"):
            op.langevin_mlp(x, terms, backend="cpp", **{**SETTINGS, "step_size": 0.1, "prior_std": None})


def packed(draw: Any, backend: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x, terms = entry(draw)
    description, tensors = pack(terms)
    table = op.constants_of([[StepParams(0.1, 0.1)] * 2], 5, torch.float32, torch.device("cpu"))
    flat = torch.cat([t.reshape(5, -1) for t in x], 1)
    return (flat, tensors, description, table[0], torch.zeros(1, 7, dtype=torch.uint8)), {
        "steps": 3,
        "seed": 1,
        "first_step": 2,
        "chain_offset": 0,
        "widths": [6, 1],
        "present": list(table[1]),
        "noise_at": "after",
        "clamp_noise": False,
        "freeze": True,
        "precision": "fp32",
        "backend": backend,
    }


@pytest.mark.parametrize("backend", ("torch", "cpp"))
def test_opcheck(draw: Any, backend: str) -> None:
    args, settings = packed(draw, backend)
    torch.library.opcheck(torch.ops.mmebm.langevin_mlp.default, args, settings)


def test_schema_refuses_what_the_room_cannot_take(draw: Any) -> None:
    """Past the checks of the entry, by the dispatcher: an exception, never a crash."""
    args, settings = packed(draw, "cpp")
    x, tensors, description, table, mask = args
    short = [None if t is None else t[:1] for t in tensors]
    for wrong in (
        (x[:, :6], *args[1:]),
        (x[0], *args[1:]),
        (x, short, *args[2:]),
        (x, tensors, description, table[:, :1], mask),
        (x, tensors, description, table, mask.bool()),
        (x, tensors, description, table, mask[:, :5]),
    ):
        with pytest.raises((ValueError, native.BackendError)):
            torch.ops.mmebm.langevin_mlp(*wrong, **settings)


def test_compiles_as_one_graph(seed: int, draw: Any) -> None:
    x, terms = entry(draw)

    def two_runs(x: list[Tensor], seed: int) -> list[Tensor]:
        y = op.langevin_mlp([2 * t for t in x], terms, **{**SETTINGS, "seed": seed}).x
        return op.langevin_mlp([torch.sin(t) for t in y], terms, **{**SETTINGS, "seed": seed + 1}).x

    torch._dynamo.reset()
    compiled = torch.compile(two_runs, fullgraph=True, backend="aot_eager")
    for at in range(3):
        for a, b in zip(compiled(x, seed + at), two_runs(x, seed + at), strict=True):
            assert torch.equal(a, b)
    torch._dynamo.reset()


def test_entry_names_what_is_wrong(draw: Any) -> None:
    x, terms = entry(draw)
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (TypeError, "x must be a list", {"x": x[0]}),
        (TypeError, "x must be a list", {"x": []}),
        (ValueError, r"x\[1\]", {"x": [x[0], x[1][:3]]}),
        (ValueError, r"x\[0\]", {"x": [x[0].long(), x[1]]}),
        (ValueError, r"x\[1\] must be torch.float32", {"x": [x[0], x[1].double()]}),
        (ValueError, "steps", {"steps": -1}),
        (ValueError, "steps", {"steps": 2.0}),
        (ValueError, "noise_at", {"noise_at": "during"}),
        (ValueError, "precision", {"precision": "fp64"}),
        (ValueError, "backend", {"backend": "gpu"}),
        (TypeError, "terms", {"terms": []}),
        (ValueError, r"terms\[0\].weights\[0\]", {"x": x[:1], "step_size": 0.1, "prior_std": None}),
        (ValueError, "step_size", {"step_size": None}),
        (ValueError, "noise_scale", {"noise_scale": [0.1]}),
        (TypeError, "grad_clip", {"grad_clip": "1"}),
        (ValueError, "low of tensor 0", {"low": torch.zeros(5, 2)}),
        (TypeError, "seed must be an int", {"seed": True}),
        (ValueError, "chain_offset must be an int", {"chain_offset": -1}),
        (TypeError, r"high\[0\] must hold real numbers", {"high": torch.ones(4, 1) > 0}),
        (TypeError, r"terms\[0\] must be torch.float64", {"x": [t.double() for t in x]}),
        (ValueError, "observed", {"observed": [None]}),
        (TypeError, r"observed\[0\]", {"observed": [torch.zeros(3), None]}),
        (ValueError, r"observed\[0\]", {"observed": [torch.zeros(4, dtype=torch.bool), None]}),
    ]
    for error, words, changes in cases:
        settings = {**SETTINGS, "x": x, "terms": terms, **changes}
        with pytest.raises(error, match=words):
            op.langevin_mlp(settings.pop("x"), settings.pop("terms"), **settings)


def test_a_clip_given_in_some_steps_only(seed: int) -> None:
    """The table says infinity in the others: over the norm's own infinity or not, that is no clip."""
    torch.manual_seed(seed)
    terms = [Quadratic(torch.zeros(5), torch.full((5,), 3.0))]
    params = [[StepParams(0.02, 0.1)], [StepParams(0.02, 0.1, grad_norm_clip=0.5)], [StepParams(0.02, 0.1)]]
    x = torch.randn(4, 5)
    chain = make_chain(terms, (5,), 4, seed, params=params)
    whole = [op.run(module, chain, x, 3, 0).x for module in (None, cpp)]
    assert torch.isfinite(whole[0]).all()
    torch.testing.assert_close(whole[1], whole[0], rtol=0, atol=3 * (NORMAL_TOLERANCE + FLOAT_TOLERANCE))
    unclipped = op.run(None, make_chain(terms, (5,), 4, seed), x, 1, 0).x
    assert torch.equal(op.run(None, chain.rows(0, 1), x, 1, 0).x, unclipped)


def test_a_prior_whose_precision_is_no_float(isa: str, seed: int) -> None:
    """1 / std^2 is beyond fp32 where x / std^2 is not."""
    terms = [Quadratic(torch.zeros(4), torch.ones(4))]
    params = StepParams(1e-3, 0.0, prior_std=1e-20, max_update=0.25)
    x = torch.tensor([[0.0, 3e-38, -3e-38, 0.5]])
    y = cpp.run(make_chain(terms, (4,), 1, seed, params=params), x, 1, 0).x
    torch.testing.assert_close(y, torch.tensor([[0.0, -0.25, 0.25, 0.25]]), rtol=1e-6, atol=0.0)


def test_idle_threads_are_said(isa: str, seed: int, draw: Any) -> None:
    terms = [Scalar(draw.stack(9, 4, 1))]
    chain = make_chain(terms, (4, 5), 64, seed)
    torch.set_num_threads(2)
    try:
        reasons = {n: op.room("cpp", chain, draw.normal(n, 9))[1] for n in (1, 64)}
    finally:
        torch.set_num_threads(1)
    assert "1 chains keep 1 of 2 threads busy" in reasons[1] and "threads" not in reasons[64]
