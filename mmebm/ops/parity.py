"""Parity: no compiled implementation is used on a device before it has agreed with the reference there.

Per op a small case of fixed numbers, run once per process, implementation, device and instruction set when the op is
first called: in the implementation, in the reference and in the reference in float64. Words of the noise, counts and
16-bit states must be equal bit for bit, other results within

    |ours - exact| <= 2 |reference - exact| + slack + relative |exact|,   each the largest of the result,

which is also the bound of the tests. The case runs in a thread of its own: gradient and inference mode, autocast,
torch's modes and transforms and the current stream belong to the thread that calls. It draws no random number.

``mmebm backends --check`` runs all cases that can run.
"""

from __future__ import annotations

import math
import os
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from types import ModuleType
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from mmebm import native, noise
from mmebm.ops import dispatch
from mmebm.ops.common import originals
from mmebm.ops.common.params import StepOptions, StepParams
from mmebm.ops.common.untyped import LISTS
from mmebm.ops.terms import Quadratic, Residual, Scalar, Stack, Term

__all__ = ["Comparison", "Verdict", "check", "check_all", "clear", "failure", "limit"]

# A normal may be this far from its float64 value (mmebm.noise); the largest distance seen is 9.6e-7.
NORMAL_TOLERANCE: Final = 2e-6
# A float32 result may be off by some of its last bits, also where torch's happens to be exact: relative to the largest.
STEP_TOLERANCE: Final = 3e-7
MLP_TOLERANCE: Final = 5e-7
# Through a dozen layers and a norm, which subtracts a mean (7e-7 seen, 2026-11-29).
NET_TOLERANCE: Final = 3e-6
# The relative error of matrix products in these precisions, added to the above. Three tf32 products keep 22 bits of
# each operand, and a kernel that added them up in one accumulator was 1.4e-6 off (2.1e-7 as it is). bf16 keeps 8 bits,
# 2^-9 an operand; a gradient goes through some ten such products, the tests on a device allow 2e-2.
PRECISION: Final = {"": 0.0, "fp32": 0.0, "tf32x3": 1e-6, "bf16": 2e-2}
# Norms are sums of squares in another order.
NORM_TOLERANCE: Final = 1e-5
# Gradients of residual, relative to the largest: a rounded factor, residual and product (together 3 2^-24 = 1.8e-7;
# 1.2e-7 seen), or a softmax (1.1e-7 seen: 240 cases on a Xeon, 2026-11-22).
GRADIENT_TOLERANCE: Final = 2.5e-7
# Its values, relative to the sum of absolute terms (2.5e-7 seen), and absolute for cross-entropies near 0.
VALUE_TOLERANCE: Final = (5e-7, 1e-6)
# Rounding to nearest in 16 bits: half a unit of the last place, relative.
HALF: Final = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@dataclass(frozen=True, slots=True)
class Comparison:
    """One result of a case; ``exact=None``: equal to the reference's bit for bit."""

    name: str
    ours: Tensor
    reference: Tensor
    exact: Tensor | None = None
    slack: float = 0.0
    relative: float = 0.0


class Verdict(NamedTuple):
    """The largest error, in a unit of what is allowed; the time of the case; and why it failed, or ``None``."""

    error: float
    limit: float
    seconds: float
    reason: str | None


def limit(reference: Tensor, exact: Tensor, slack: float, relative: float) -> float:
    """How far a result may be from ``exact`` (see the module's docstring)."""
    error = (reference.double() - exact).abs().max().item()
    return 2 * error + slack + relative * exact.abs().max().item()


# -- the cases: fixed numbers on the CPU

_SEED: Final = 0x9E3779B97F4A7C15
_CPU: Final = torch.device("cpu")


class _Numbers:
    """Fixed normals, handed out piece by piece: one draw costs as much as a small case."""

    def __init__(self, stream: int) -> None:
        self.left = noise.normal((1, 1 << 12), seed=_SEED, stream=stream, dtype=torch.float32, device=_CPU)[0]

    def normal(self, *shape: int) -> Tensor:
        count = math.prod(shape)
        out, self.left = self.left[:count].reshape(shape), self.left[count:]
        return out.clone()

    def mask(self, *shape: int) -> Tensor:
        return self.normal(*shape) < 0.3


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """``function`` of every tensor in lists, tuples and dataclasses."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, LISTS):
        return value.__class__(_mapped(part, function) for part in value)
    if hasattr(value, "__dataclass_fields__"):
        return replace(value, **{name: _mapped(getattr(value, name), function) for name in value.__dataclass_fields__})
    return value


def _on(value: Any, device: torch.device) -> Any:
    """A copy, which an implementation may overwrite."""
    return _mapped(value, lambda t: t.to(device, copy=True))


def _double(value: Any) -> Any:
    return _mapped(value, lambda t: t.double() if t.is_floating_point() else t)


def _noise(module: ModuleType, backend: str, device: torch.device) -> Iterator[Comparison]:
    """Words, normals and uniforms, where the chain counter wraps."""
    at = {"seed": _SEED, "step": 0xFEDCBA98, "stream": noise.stream(5, noise.MOMENTUM), "chain_offset": 2**32 - 2}
    words = torch.zeros((5, 7, 4), dtype=torch.int32, device=device)
    module.fill_words(words, **at)
    expected = noise.words(5, 7, **at, device=_CPU)
    yield Comparison("words", words.cpu().long() & noise.MASK32, expected)
    out = torch.zeros((5, 27), dtype=torch.float32, device=device)
    module.fill_normal(out, **at)
    exact = noise.normal((5, 27), **at, dtype=torch.float64, device=_CPU)
    yield Comparison("normals", out.cpu(), exact.float(), exact, NORMAL_TOLERANCE)
    module.fill_uniform(out, **at)
    yield Comparison("uniforms", out.cpu(), noise.uniform((5, 27), **at, dtype=torch.float32, device=_CPU))


class _StepCase(NamedTuple):
    """A step at a time of ``x``; ``first``: whether the noise is added before the gradient is taken."""

    name: str
    x: list[Tensor]
    params: list[StepParams]
    options: StepOptions
    first: bool = False


def _step_cases(numbers: _Numbers) -> list[_StepCase]:
    normal = numbers.normal
    per_chain = 0.05 + 0.01 * torch.arange(5, dtype=torch.float32, device=_CPU)[:, None]
    both = StepOptions(seed=_SEED, streams=(0, 3), noisy=(True, True), chain_offset=2**32 - 2)
    one = replace(both, streams=(2,), noisy=(True,))
    bounded = StepParams(
        0.05, 0.3, grad_clip=1.2, grad_norm_clip=3.0, max_update=0.5, prior_std=2.0, low=-1.5, high=1.4
    )
    return [
        _StepCase(
            "all options",
            [normal(5, 67), normal(5, 3)],
            [bounded, StepParams(per_chain, 0.2)],
            replace(both, observed=(numbers.mask(5, 67), None)),
        ),
        _StepCase(
            "noise first, reject",
            [normal(5, 21)],
            [StepParams(per_chain, 0.3, low=-2.1, high=2.1)],
            replace(one, outside="reject", clamp_noise=True),
            first=True,
        ),
        _StepCase(
            "16 bits",
            [normal(5, 37).bfloat16(), normal(5, 19).half()],
            [StepParams(0.1, 0.1), StepParams(0.1, 0.1)],
            both,
        ),
    ]


def _langevin_step(module: ModuleType, backend: str, device: torch.device) -> Iterator[Comparison]:
    from mmebm.ops.langevin_step import op
    from mmebm.ops.langevin_step import reference as rule

    numbers = _Numbers(1)
    for name, x, params, options, first in _step_cases(numbers):
        grad = [numbers.normal(*t.shape) for t in x]
        there, here = _on(x, device), _on(params, device)
        stepper = op.make(backend, module, _on(options, device), there)
        # the reference's noise, drawn once for both precisions
        xi = [
            noise.normal(
                t.shape,
                seed=_SEED,
                step=7,
                stream=i,
                chain_offset=options.chain_offset,
                dtype=torch.float64,
                device=_CPU,
            )
            for t, i in zip(x, options.streams, strict=True)
        ]
        narrow: list[Any] = [t.float() for t in xi]
        wide: list[Any] = [*xi]
        thresholds = op.TorchStepper(options).thresholds(x, 7, noise.ROUNDING)
        precise = x[0].dtype == torch.float32
        before, exact = x, _double(x)

        def state(part: str, ours: Any, expected: Any, exact: Any, case: str = name, precise: bool = precise) -> Any:
            for i, (a, b, c) in enumerate(zip(ours, expected, exact, strict=True)):
                # 0.3: the largest noise scale
                slack, exactly = (0.3 * NORMAL_TOLERANCE, c) if precise else (0.0, None)
                yield Comparison(f"{case}: tensor {i} {part}", a.cpu(), b, exactly, slack, STEP_TOLERANCE)

        if first:
            there = stepper.perturb(there, here, 7)
            settings: dict[str, Any] = {"clamp_noise": options.clamp_noise}
            before = rule.perturb(before, narrow, params, **settings)
            exact = rule.perturb(exact, wide, _double(params), **settings)
            yield from state("with its noise", there, before, exact)
            narrow = wide = [None] * len(x)
        settings = {
            "norm_over": options.norm_over,
            "outside": options.outside,
            "observed": options.observed or None,
            "stats": True,
        }
        after, counts = rule.langevin_step(before, grad, narrow, params, thresholds=thresholds, **settings)
        exact, norms = rule.langevin_step(exact, _double(grad), wide, _double(params), **settings)
        slopes, again = _on(grad, device), _on(there, device)
        ours, _ = stepper.step(again, slopes, here, 7, with_noise=not first, stats=False)
        yield from state("after a step", ours, after, exact)
        ours, stats = stepper.step(there, slopes, here, 7, with_noise=not first, stats=True)
        yield from state("after a step with statistics", ours, after, exact)
        assert stats is not None and counts is not None and norms is not None
        for field in ("clipped", "nonfinite"):
            yield Comparison(f"{name}: {field}", getattr(stats, field).cpu(), getattr(counts, field))
        for field in ("grad_norm", "displacement")[: 2 if precise else 1]:
            a, b, c = (getattr(one, field) for one in (stats, counts, norms))
            yield Comparison(f"{name}: {field}", a.cpu(), b, c, 0.0, NORM_TOLERANCE)


_CHAINS: Final = 67  # one block of every width, and a rest


def _terms(numbers: _Numbers) -> list[Term]:
    """Every activation and kind of term, for 6 inputs."""
    normal = numbers.normal

    def stack(*sizes: int, activation: Any = "silu", slope: float = 0.3) -> Stack:
        weights = tuple(normal(o, i) / i**0.5 for i, o in pairwise(sizes))
        return Stack.mlp(weights, tuple(0.3 * normal(o) for o in sizes[1:]), activation, slope)

    return [
        Scalar(stack(6, 33, 17, 1), -0.7),
        Residual(
            stack(6, 19, 5, activation="gelu"),
            normal(_CHAINS, 5),
            0.8,
            tanh=True,
            weight=1.5,
            observed=numbers.mask(1, 5),
        ),
        Residual(stack(6, 18, 9, activation="softplus"), normal(_CHAINS, 9), 0.7, "laplace"),
        Quadratic(normal(6), normal(6).abs()),
        *(Scalar(stack(6, 9, 1, activation=name)) for name in ("tanh", "relu", "leaky_relu", "elu")),
    ]


def _mlp_energy(module: ModuleType, backend: str, device: torch.device) -> Iterator[Comparison]:
    from mmebm.ops.mlp_energy.reference import mlp_energy

    numbers = _Numbers(2)
    terms, x = tuple(_terms(numbers)), numbers.normal(_CHAINS, 6)
    ours = module.energy_and_gradient(_on(terms, device), x.to(device))
    results = zip(ours, mlp_energy(x, terms), mlp_energy(x.double(), _double(terms)), strict=True)
    for name, (a, b, c) in zip(("energy", "gradient"), results, strict=True):
        yield Comparison(name, a.cpu(), b, c, 0.0, MLP_TOLERANCE)


def _chains(numbers: _Numbers, terms: tuple[Term, ...]) -> Iterator[tuple[str, Any, int]]:
    """(name, chain, steps)."""
    from mmebm.ops.langevin_mlp import op

    per_chain = 0.01 + 0.001 * torch.arange(_CHAINS, dtype=torch.float32, device=_CPU)[:, None]
    bounded = StepParams(
        per_chain, 0.1, grad_clip=2.0, grad_norm_clip=4.0, max_update=0.2, prior_std=2.0, low=-2.0, high=2.0
    )

    def chain(terms: tuple[Term, ...], widths: tuple[int, ...], params: list[StepParams], **changes: Any) -> Any:
        table = op.constants_of([params], _CHAINS, torch.float32, _CPU)
        assert not isinstance(table, str), table
        n = len(widths)
        # the last tensor alone gets noise: its stream is not its index, and its elements are not the first
        return op.MlpChain(
            terms,
            widths,
            (0, 3)[-n:],
            (False, True)[-n:],
            (True,) * n,
            *table,
            seed=_SEED,
            chain_offset=2**32 - 2,
            **changes,
        )

    observed = numbers.mask(_CHAINS, 6).to(torch.uint8)
    yield "all options", chain(terms, (4, 2), [StepParams(0.02, 0.1), bounded], observed=observed), 2
    first: dict[str, Any] = {"noise_at": "before", "freeze": True, "clamp_noise": True}
    yield "noise first", chain((terms[0], terms[3]), (6,), [replace(bounded, grad_norm_clip=None)], **first), 1


def _langevin_mlp(
    module: ModuleType, backend: str, device: torch.device, precision: Any = "fp32"
) -> Iterator[Comparison]:
    from mmebm.ops.langevin_mlp import op

    numbers = _Numbers(3)
    terms, x = tuple(_terms(numbers)), numbers.normal(_CHAINS, 6)
    for name, chain, steps in _chains(numbers, terms):
        there = replace(_on(chain, device), precision=precision)
        ours = module.run(there, x.to(device), steps, 7, energy=True, grad_norm=True)
        expected, exact = op.run_reference(chain, x, steps, 7), op.run_reference(_double(chain), x.double(), steps, 7)
        for field in ("x", "energy", "grad_norm"):
            a, b, c = (getattr(result, field) for result in (ours, expected, exact))
            slack = steps * NORMAL_TOLERANCE * 0.1 if field == "x" else 0.0  # 0.1: the noise scale
            yield Comparison(f"{name}: {field}", a.cpu(), b, c, slack, MLP_TOLERANCE + PRECISION[precision])
        if chain.freeze:
            assert expected.frozen is not None
            yield Comparison(f"{name}: frozen", ours.frozen.cpu(), expected.frozen)


def _residual(module: ModuleType, backend: str, device: torch.device) -> Iterator[Comparison]:
    from mmebm.ops.residual.reference import residual

    numbers = _Numbers(4)
    normal = numbers.normal
    ys = [normal(5, 67), normal(5, 21).bfloat16(), normal(5, 7, 19), normal(5, 33).half()]
    classes = [(normal(5, 19).abs() * 3).long() % 7, (normal(5).abs() * 9).long() % 33]
    targets = [normal(5, 67), normal(5, 21), *classes]
    kinds: Any = ["gaussian", "laplace", "categorical", "categorical"]
    scale: list[Any] = [0.5 + normal(5).abs(), 0.7, 1.0, 1.0]
    weight: list[Any] = [1.5, 0.8 + normal(5).abs(), 2.0, -0.5]
    observed = [numbers.mask(5, 67), None, numbers.mask(19), None]
    arguments = (ys, targets, kinds, scale, weight, observed)
    value, grads = module.residual(*_on(arguments, device), True)
    exact, sizes = 0.0, 0.0
    slopes: list[Tensor] = []
    for y, target, kind, s, w, mask in zip(*_double(arguments), strict=True):
        part, (slope,) = residual([y], [target], likelihood=[kind], scale=[s], weight=[w], observed=[mask])
        exact, sizes = exact + part, sizes + part.abs()
        slopes.append(slope)
    assert isinstance(exact, Tensor) and isinstance(sizes, Tensor)
    relative, absolute = VALUE_TOLERANCE
    # against the exact value alone: the reference may be as far from it as it likes
    yield Comparison("value", value.cpu(), exact, exact, relative * sizes.min().item() + absolute)
    for i, (g, slope, w) in enumerate(zip(grads, slopes, weight, strict=True)):
        half = HALF[ys[i].dtype]
        factor = w.abs().max().item() if isinstance(w, Tensor) else abs(w)
        slack = GRADIENT_TOLERANCE * max(slope.abs().max().item(), factor) * (1 + half)
        yield Comparison(f"gradient {i}", g.cpu(), slope, slope, slack, half)


def _net(numbers: _Numbers) -> Any:
    """Every kind of node, for a state of 40."""
    from mmebm.ops.net import graph as g

    normal = numbers.normal
    crop = torch.arange(144, device=_CPU, dtype=torch.int64).reshape(3, 8, 6)[:, 1:].reshape(-1, 1)
    return g.Net(
        (
            g.Input(0, (2, 5, 4)),
            g.Conv(0, normal(4, 2, 3, 3) / 3, normal(4), stride=(2, 2), padding=(1, 1)),
            g.Norm(1, 2, 1e-5),
            g.Activation(2, "silu"),
            g.Conv(3, normal(4, 3, 4, 4) / 3, stride=(2, 2), transposed=True),
            g.Map((4,), (3, 7, 6), crop),
            g.Activation(5, "tanh"),
            g.Linear(6, normal(6, 126) / 16, normal(6) / 2),
            g.Affine(7, normal(1, 6)),
            g.Add((8,), (1.0,), normal(_CHAINS, 6) / 2),
            g.Product(9, 7),
            g.View(10, (2, 3)),
            g.LogSumExp(11, (2,), torch.arange(6, device=_CPU, dtype=torch.int64).reshape(2, 3)),
            g.Linear(10, normal(6, 6) / 4),
            g.Linear(7, normal(6, 6) / 4),
            g.Add((13, 14), (1.0, 1.0)),
            g.Activation(15, "square"),
            g.Map((12, 16), (1,), torch.arange(8, device=_CPU, dtype=torch.int64).reshape(1, 8), normal(1, 8)),
        )
    )


def _net_energy(module: ModuleType, backend: str, device: torch.device) -> Iterator[Comparison]:
    from mmebm.ops.net.reference import energy_and_gradient

    numbers = _Numbers(5)
    net, x = _net(numbers), _Numbers(6).normal(_CHAINS, 40)
    ours = module.energy_and_gradient(_on(net, device), x.to(device))
    results = zip(ours, energy_and_gradient(x, net), energy_and_gradient(x.double(), _double(net)), strict=True)
    for name, (a, b, c) in zip(("energy", "gradient"), results, strict=True):
        yield Comparison(name, a.cpu(), b, c, 0.0, NET_TOLERANCE)


def _langevin_net(
    module: ModuleType, backend: str, device: torch.device, precision: Any = "fp32"
) -> Iterator[Comparison]:
    """Two tensors, one with noise, with limits; and the state as one tensor, without: another kernel in Triton."""
    from mmebm.ops.langevin_mlp import op as mlp
    from mmebm.ops.net import op

    numbers = _Numbers(5)
    net, x = _net(numbers), _Numbers(6).normal(_CHAINS, 40)
    limited = [StepParams(0.001, 0.05, grad_norm_clip=4.0), StepParams(0.002, 0.1, grad_clip=2.0, low=-2.0)]
    plain = [StepParams(0.001, 0.1)]
    for name, widths, noisy, params in (("", (30, 10), (False, True), limited), ("plain: ", (40,), (True,), plain)):
        table = mlp.constants_of([params], _CHAINS, torch.float32, _CPU)
        assert not isinstance(table, str), table
        chain = op.NetChain(
            net=net,
            widths=widths,
            streams=(0, 3)[-len(widths) :],
            noisy=noisy,
            moving=(True,) * len(widths),
            constants=table[0],
            present=table[1],
            seed=_SEED,
            chain_offset=2**32 - 2,
            freeze=params is limited,
        )
        there = replace(_on(chain, device), precision=precision)
        ours = module.run(there, x.to(device), 2, 7, energy=True, grad_norm=True)
        expected, exact = op.run(None, chain, x, 2, 7), op.run(None, _double(chain), x.double(), 2, 7)
        for field in ("x", "energy", "grad_norm"):
            a, b, c = (getattr(result, field) for result in (ours, expected, exact))
            # 0.1: the noise scale, which moves energy and gradient by as much as they are steep
            slack = 2 * NORMAL_TOLERANCE * 0.1 * (1.0 if field == "x" else float(c.abs().max()))
            yield Comparison(f"{name}{field}", a.cpu(), b, c, slack, NET_TOLERANCE + PRECISION[precision])
        if chain.freeze:
            assert expected.frozen is not None
            yield Comparison("frozen", ours.frozen.cpu(), expected.frozen)


def _dynamics(module: ModuleType, backend: str, device: torch.device) -> Iterator[Comparison]:
    """BAOAB, a trajectory of HMC with its decision, the Metropolis test, an exchange: each written out once more."""
    numbers, offset, step = _Numbers(6), 2**32 - 2, 7
    chains, width = 5, 67
    x, v, *g = (numbers.normal(chains, width) for _ in range(5))
    energy, new_energy = 3 * numbers.normal(chains), 3 * numbers.normal(chains)
    h, decay, scale, mass, temperature = 0.2, 0.9, 0.3, 2.0, 8.0

    def normals(purpose: int) -> Tensor:
        return noise.normal(
            x.shape,
            seed=_SEED,
            step=step,
            stream=noise.stream(2, purpose),
            chain_offset=offset,
            dtype=torch.float64,
            device=_CPU,
        )

    def uniforms(count: int, stream: int, rows: int = chains) -> Tensor:
        at = {"seed": _SEED, "step": step, "stream": stream, "chain_offset": offset}
        return noise.uniform((rows, count), **at, dtype=torch.float32, device=_CPU)

    def both(rule: Callable[..., Any], *tensors: Tensor, xi: Tensor | None = None) -> list[Any]:
        drawn = [] if xi is None else [xi]
        return [rule(*tensors, *(t.float() for t in drawn)), rule(*_double(tensors), *drawn)]

    def made(keeps: bool) -> Any:
        op = module.Dynamics(
            [x.clone()],
            indices=[2],
            masks=[False],
            seed=_SEED,
            chain_offset=offset,
            alive=torch.ones(chains, dtype=torch.bool, device=_CPU),
            keeps=keeps,
            freeze=False,
        )
        op.set(0, kick=h / mass, drift=h, decay=decay, noise=scale, thermal=scale, mass=mass)
        return op

    def baoab(x: Tensor, v: Tensor, a: Tensor, b: Tensor, xi: Tensor) -> tuple[Tensor, Tensor]:
        w = v - h / mass * a
        w, y = decay * w + scale * xi, x + h * w
        return y + h * w, w - h / mass * b

    op = made(keeps=False)
    op.v[0].copy_(v)
    op.baoa([g[0]], step)
    op.baoab_end([g[1]], None)
    results = both(baoab, x, v, g[0], g[1], xi=normals(noise.DRIFT))
    for name, ours, a, b in zip(("state", "velocity"), (op.x[0], op.v[0]), *results, strict=True):
        yield Comparison(f"BAOAB: {name}", ours, a, b, scale * NORMAL_TOLERANCE, STEP_TOLERANCE)

    def trajectory(x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, xi: Tensor) -> tuple[Tensor, Tensor]:
        v = scale * xi
        w = v - 0.5 * h / mass * a
        y = x + h * w
        w = w - h / mass * b
        end = w - 0.5 * h / mass * c
        return y + h * w, (0.5 * mass * (end - v) * (end + v)).sum(1) + d

    op = made(keeps=True)
    op.g[0].copy_(g[0])
    op.set_temperature(temperature)
    held = energy.clone()
    op.set_energy(held)
    prob, accepted, error = (torch.zeros(chains, dtype=torch.float32, device=_CPU) for _ in range(3))
    total = torch.zeros(chains, dtype=torch.float64, device=_CPU)
    ever = torch.zeros(chains, dtype=torch.bool, device=_CPU)
    op.set_outputs(accept_prob=prob, accepted=accepted, energy_error=error, prob_sum=total, ever_accepted=ever)
    op.hmc_start(step)
    op.leap([g[1]])
    op.hmc_end([g[2]], new_energy, step)
    results = both(trajectory, x, *g, new_energy - energy, xi=normals(noise.MOMENTUM))
    (y, change), (y_exact, change_exact) = results
    # the change sums some hundred products of velocities of 0.3 and kicks
    yield Comparison("HMC: error", error, change, change_exact, width * scale * NORMAL_TOLERANCE, NORM_TOLERANCE)
    expected = uniforms(1, noise.stream(0, noise.ACCEPT))[:, 0] < (-change_exact / temperature).clamp(max=0).exp()
    yield Comparison("HMC: accepted", accepted, expected.float())
    rows = expected[:, None]
    state, exact = torch.where(rows, y, x), torch.where(rows, y_exact, x.double())
    yield Comparison("HMC: state", op.x[0], state, exact, scale * NORMAL_TOLERANCE, STEP_TOLERANCE)
    yield Comparison("HMC: energy", held, torch.where(expected, new_energy, energy))

    def proposal(x: Tensor, y: Tensor, a: Tensor, b: Tensor, d: Tensor) -> Tensor:
        there, back = y - x + h * a, x - y + h * b
        return (there.square().sum(1) - back.square().sum(1)) / (2 * scale**2) - d / temperature

    other = x + 0.1 * v
    slopes = [0.1 * g[0], 0.1 * g[1]]
    test = module.Proposals([x.shape], [None], seed=_SEED, stream=5, chain_offset=offset, keep=False)
    test.set([StepParams(h, scale)], [x], temperature)
    y = other.clone()
    test.decide([x.clone()], [y], [slopes[0].clone()], slopes[1:], energy.clone(), new_energy, step)
    ratio, ratio_exact = both(proposal, x, other, *slopes, new_energy - energy)
    a, b = (r.clamp(max=0).exp() for r in (ratio, ratio_exact))
    yield Comparison("Metropolis: probability", test.prob, a, b, 0.0, NORM_TOLERANCE)
    expected = uniforms(1, 5)[:, 0] < b
    yield Comparison("Metropolis: accepted", test.accepted, expected)
    yield Comparison("Metropolis: state", y, torch.where(expected[:, None], other, x))

    rungs = 3
    ladder, levels = numbers.normal(2 * rungs, 19), 2 * numbers.normal(2 * rungs)
    inverse = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float32, device=_CPU)
    places = torch.arange(rungs, dtype=torch.int64, device=_CPU).repeat(2, 1)
    alive = torch.ones(2 * rungs, dtype=torch.bool, device=_CPU)
    chance, sums = (torch.zeros(2, rungs - 1, dtype=torch.float32, device=_CPU) for _ in range(2))
    moved, energies = ladder.clone(), levels.clone()
    module.exchange(
        [moved],
        rungs=rungs,
        seed=_SEED,
        step=step,
        stream=9,
        chain_offset=offset,
        inverse=inverse,
        energy=energies,
        alive=alive,
        origin=places,
        prob=chance,
        prob_sum=sums,
        side=1,
    )
    each = levels.reshape(2, rungs)
    prob = ((inverse[1] - inverse[2]) * (each[:, 1] - each[:, 2])).clamp(max=0).exp()
    yield Comparison("exchange: probability", chance[:, 1], prob, prob.double(), 0.0, STEP_TOLERANCE)
    order = torch.arange(2 * rungs, dtype=torch.int64, device=_CPU).reshape(2, rungs)
    order[:, 1:] = torch.where((uniforms(rungs - 1, 9, 2)[:, 1] < prob)[:, None], order[:, 1:].flip(1), order[:, 1:])
    yield Comparison("exchange: state", moved, ladder[order.reshape(-1)])
    yield Comparison("exchange: energy", energies, levels[order.reshape(-1)])


CASES: Final[dict[str, Callable[..., Iterator[Comparison]]]] = {
    "noise": _noise,
    "langevin_step": _langevin_step,
    "langevin_mlp": _langevin_mlp,
    "mlp_energy": _mlp_energy,
    "residual": _residual,
    "dynamics": _dynamics,
    "net_energy": _net_energy,
    "langevin_net": _langevin_net,
}


# -- the verdict


def _judge(comparisons: Iterator[Comparison]) -> tuple[float, float, str | None]:
    """The error and the limit of the result that comes closest to its limit, and the first reason to fail."""
    error, allowed = 0.0, 1.0
    for c in comparisons:
        if c.ours.shape != c.reference.shape:
            return error, allowed, f"{c.name} has shape {tuple(c.ours.shape)}, not {tuple(c.reference.shape)}"
        if c.exact is None:
            different = int((c.ours != c.reference).sum())
            if different:
                return error, allowed, f"{c.name}: {different} of {c.ours.numel()} differ from the reference"
            continue
        if not torch.equal(torch.isfinite(c.ours), torch.isfinite(c.exact)):
            return error, allowed, f"{c.name} is not finite where the reference is, or the other way round"
        off, bound = (c.ours.double() - c.exact).abs().max().item(), limit(c.reference, c.exact, c.slack, c.relative)
        if off > bound:
            return off, bound, f"{c.name} is off by {off:.1e}, allowed is {bound:.1e}"
        if off / bound >= error / allowed:
            error, allowed = off, bound
    return error, allowed, None


_lock = threading.Lock()
_checking = threading.local()
# by op, backend, device, and the instruction set of C++ or the precision of a GPU's matrix products
_verdicts: dict[tuple[str, str, torch.device, str], Verdict] = {}


def _forked() -> None:
    # another thread of the parent may have held it
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def check(op: str, backend: str, device: torch.device, isa: str = "auto", precision: str = "") -> Verdict:
    """Runs the case of ``op``, in a thread of its own. An implementation that raises has failed.

    Args:
        isa: the instruction set, of C++.
        precision: one of the op's (:data:`mmebm.ops.dispatch.OPS`), on a GPU.
    """
    found: list[Verdict] = []
    asked = (precision,) if precision else ()

    def run() -> None:
        _checking.now = True
        start = time.perf_counter()
        try:
            module, reason = dispatch.implementation(op, backend)
            error, allowed = 0.0, 0.0
            if module is not None:
                with torch.no_grad(), dispatch.using_isa(isa), _current(device):
                    error, allowed, reason = _judge(CASES[op](module, backend, device, *asked))
        except Exception as raised:
            text = str(raised).strip().splitlines()
            place = traceback.extract_tb(raised.__traceback__)[-1]
            error, allowed = float("nan"), float("nan")
            reason = f"{type(raised).__name__}: {text[0] if text else ''} ({place.name}:{place.lineno})"
        found.append(Verdict(error, allowed, time.perf_counter() - start, reason))

    thread = threading.Thread(target=run, name="mmebm parity", daemon=True)
    thread.start()
    thread.join()
    return found[0]


def _current(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def failure(op: str, backend: str, device: torch.device, precision: str = "") -> str | None:
    """Why the implementation of ``op`` is not to be used on ``device``: ``None`` once it has passed.

    The first call runs the case; one that fails warns, once. While a program has put other functions in the place of
    torch's, a failure is not remembered.
    """
    if getattr(_checking, "now", False):  # a case is what calls
        return None
    isa, precision = (dispatch.isa(), "") if backend == "cpp" else ("auto", precision)
    key = (op, backend, device, precision or isa)
    verdict = _verdicts.get(key)
    if verdict is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return "it has not been checked on this device, and a capture must not be interrupted: call it once before"
        if backend == "cpp" and isa not in ("auto", *native.cpu().isas()):
            raise ValueError(f"MMEBM_CPU_ISA must be one of {', '.join(native.cpu().isas())}, got {isa!r}")
        with _lock:
            verdict = _verdicts.get(key)
            new = verdict is None
            if verdict is None:
                verdict = _verdicts[key] = check(op, backend, device, isa, precision)
        if verdict.reason is not None:
            name = originals.replaced(everywhere=True)
            if name is not None:
                # the reference was computed by it: nothing was learned, and the case runs again
                with _lock:
                    _verdicts.pop(key, None)
                return f"it failed its parity case while {name} is not torch's own ({verdict.reason})"
        if new and verdict.reason is not None:
            warnings.warn(
                f"mmebm: {backend} is not used for {op} on {device}: it failed its parity case ({verdict.reason}); "
                "please report it with the output of `mmebm backends --check`",
                RuntimeWarning,
                stacklevel=2,
            )
    return None if verdict.reason is None else f"it failed its parity case ({verdict.reason})"


def clear() -> None:
    """Forgets all verdicts: the next call of an op runs its case again."""
    with _lock:
        _verdicts.clear()


def check_all() -> Iterator[tuple[str, str, torch.device, str, Verdict]]:
    """(op, backend, device, instruction set or precision, verdict) of every implementation that can run here, as they
    come."""
    from mmebm.backends import backends

    there = {name for name, backend in backends().items() if backend.available}
    devices = [_CPU, *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    for op, entry in dispatch.OPS.items():
        for backend in entry.modules:
            if backend not in there:
                continue
            interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
            kind = "cpu" if backend == "cpp" or interpreted else "cuda"
            for device in devices:
                if device.type == kind and backend == "cpp":
                    for isa in native.cpu().isas():
                        yield op, backend, device, isa, check(op, backend, device, isa)
                elif device.type == kind:
                    for precision in entry.precisions:
                        yield op, backend, device, precision, check(op, backend, device, precision=precision)
