"""Random calls of the ops, in PyTorch and in C++ at every instruction set, against their formulas in float64."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from mmebm import native
from mmebm.ops.langevin_mlp import langevin_mlp
from mmebm.ops.langevin_step import langevin_step
from mmebm.ops.mlp_energy import mlp_energy
from mmebm.ops.residual import residual, residual_and_gradient
from mmebm.ops.terms import ACTIVATIONS, Quadratic, Residual, Scalar, Stack
from tests.fuzz import rule
from tests.fuzz.strategies import KINKED, Draw, Tolerance, laid_out

Array = np.ndarray


def places() -> list[tuple[str, str]]:
    """(backend, instruction set)."""
    if not native.available("cpp")[0]:
        return [("torch", "")]
    names = [name.replace("generic", "baseline") for name in native.cpu().isas()]
    return [("torch", ""), *(("cpp", name) for name in names if name != "auto")]


@contextmanager
def at(isa: str) -> Iterator[None]:
    before = os.environ.get("MMEBM_CPU_ISA")
    if isa:
        os.environ["MMEBM_CPU_ISA"] = isa
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("MMEBM_CPU_ISA", None)
        else:
            os.environ["MMEBM_CPU_ISA"] = before


def close(got: Tensor, exact: Tensor, rough: Tensor, chosen: Any = slice(None)) -> None:
    """The tolerance of the fuzz: how far float32 PyTorch is from float64, and some roundings."""
    tolerance = Tolerance(rule.Result([exact.numpy()]), [rule.Result([rough.double().numpy()])], 2.0**-24)
    tolerance.close("result", got, lambda r: r.state[0], chosen)


class Numbers:
    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def mask(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator) < 0.6


seeds = st.integers(0, 2**32 - 1)


# -- one step


@given(data=st.data())
def test_langevin_step(data: st.DataObject) -> None:
    draw = data.draw
    numbers = Numbers(draw(seeds, label="numbers"))
    chains = draw(st.integers(0, 20), label="chains")
    count = draw(st.integers(1, 3), label="tensors")
    shapes = [(chains, *draw(st.lists(st.integers(0, 9), max_size=3), label="shape")) for _ in range(count)]
    layouts = [draw(st.sampled_from(("contiguous", "transposed", "strided", "offset")), label="layout") for _ in shapes]
    x = [laid_out(numbers.normal(*shape), layout) for shape, layout in zip(shapes, layouts)]
    grad = [numbers.normal(*shape) for shape in shapes]
    backend, isa = draw(st.sampled_from(places()), label="backend")
    if any(layout != "contiguous" for layout in layouts):
        backend = "auto" if backend == "cpp" else backend

    def constant(low: float, high: float) -> tuple[Any, list[Any]]:
        """As given, and per tensor as an array."""
        form = draw(st.sampled_from(("number", "chains", "list")), label="form")
        one = lambda i: float(torch.rand((), generator=numbers.generator) * (high - low) + low)
        if form == "number":
            value = one(0)
            return value, [np.asarray(value)] * count
        if form == "list":
            values = [one(i) for i in range(count)]
            return values, [np.asarray(v) for v in values]
        rows = torch.rand(chains, generator=numbers.generator) * (high - low) + low
        given = [rows.reshape(-1, *[1] * (len(s) - 1)) for s in shapes]
        return given, [t.double().numpy() for t in given]

    options: dict[str, Any] = {}
    table: dict[str, list[Any]] = {}
    ranges = {
        "step_size": (0.01, 0.3),
        "noise_scale": (0.0, 0.3),
        "grad_clip": (0.1, 1.5),
        "grad_norm_clip": (0.3, 3.0),
        "max_update": (0.05, 0.5),
        "prior_std": (0.5, 3.0),
        "low": (-1.5, -0.2),
        "high": (0.2, 1.5),
    }
    for name, (low, high) in ranges.items():
        if name in ("step_size", "noise_scale") or draw(st.booleans(), label=name):
            options[name], table[name] = constant(low, high)
    per_chain = "grad_norm_clip" in table and any(t.ndim for t in table["grad_norm_clip"])
    over: Any = "chain" if per_chain else draw(st.sampled_from(("chain", "tensor")), label="norm_over")
    noise_at = draw(st.sampled_from(("after", "before")), label="noise_at")
    outside = draw(st.sampled_from(("clamp", "reject")), label="outside")
    observed = [numbers.mask(*shape) if draw(st.booleans(), label="observed") else None for shape in shapes]
    where = {"seed": draw(st.integers(0, 2**63 - 1), label="seed"), "step": draw(st.sampled_from((0, 2**32 - 1)))}
    offset = draw(st.sampled_from((0, 3, 2**32 - chains)), label="chain_offset")
    with at(isa):
        got = langevin_step(
            x,
            grad,
            **options,
            **where,
            chain_offset=offset,
            noise_at=noise_at,
            norm_over=over,
            outside=outside,
            observed=observed,
            backend=backend,
        )

    def setting(name: str, i: int, k: int) -> Any:
        if name == "noise_scale" and noise_at == "before":
            return 0.0  # it is in the half-step
        return table[name][i] if name in table else None

    def run(dtype: Any, jitter: int | None) -> rule.Result:
        slopes = [g.numpy().astype(dtype) for g in grad]
        return rule.langevin(
            lambda points, k: (np.zeros(chains), slopes),
            [t.numpy().astype(dtype) for t in x],
            1,
            setting,
            seed=where["seed"],
            first_step=where["step"],
            chain_offset=offset,
            norm_over=over,
            outside=outside,
            masks=[False if m is None else m.numpy() for m in observed],
            jitter=None if jitter is None else np.random.default_rng(jitter),
        )

    truth = run(np.float64, None)
    tolerance = Tolerance(truth, [run(np.float32, n) for n in range(2)], 2.0**-24)
    for i, t in enumerate(got):
        tolerance.close(f"x[{i}]", t, lambda r, i=i: r.state[i], tolerance.sound(1e-5))


# -- MLPs


def act(a: Tensor, name: str, slope: float) -> Tensor:
    if name == "leaky_relu":
        return F.leaky_relu(a, slope)
    return F.elu(a, slope) if name == "elu" else getattr(F, name)(a)


class Terms:
    """Random terms, and their formula."""

    def __init__(self, draw: Draw, chains: int, inputs: int, numbers: Numbers) -> None:
        self.terms: list[Any] = []
        for _ in range(draw(st.integers(1, 3), label="terms")):
            kind = draw(st.sampled_from(("scalar", "residual", "quadratic")), label="kind")
            if kind == "quadratic":
                self.terms.append(Quadratic(numbers.normal(inputs), numbers.normal(inputs).abs() + 0.1))
                continue
            hidden = draw(st.lists(st.integers(1, 70), min_size=1, max_size=4), label="hidden")
            outputs = 1 if kind == "scalar" else draw(st.integers(1, 20), label="outputs")
            sizes = [inputs, *hidden, outputs]
            weights = tuple(numbers.normal(o, i) / i**0.5 for i, o in pairwise(sizes))
            biases = tuple(0.3 * numbers.normal(o) if draw(st.booleans(), label="bias") else None for o in sizes[1:])
            name: Any = draw(st.sampled_from(ACTIVATIONS), label="activation")
            stack = Stack.mlp(weights, biases, name, 0.3 if name == "leaky_relu" else 1.0 if name == "elu" else 0.0)
            if kind == "scalar":
                self.terms.append(Scalar(stack, draw(st.sampled_from((1.0, -0.7)))))
                continue
            mask = draw(st.sampled_from((0, 1, chains)), label="mask's rows")
            self.terms.append(
                Residual(
                    stack,
                    numbers.normal(chains, outputs),
                    draw(st.sampled_from((0.5, 1.3))),
                    draw(st.sampled_from(("gaussian", "laplace"))),
                    draw(st.booleans(), label="tanh"),
                    draw(st.sampled_from((1.0, 2.0))),
                    numbers.mask(mask, outputs) if mask else None,
                )
            )

    def value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The energy, and how far the nearest kink is, (chains,) each, in the dtype of ``x``."""
        wide = lambda t: t.to(x.dtype)
        total, nearest = x.new_zeros(len(x)), x.new_full((len(x),), math.inf)
        for term in self.terms:
            if isinstance(term, Quadratic):
                total = total + 0.5 * (wide(term.precision) * (x - wide(term.mean)).square()).sum(1)
                continue
            h, stack = x, term.stack
            for i, (w, b) in enumerate(zip(stack.weights, stack.biases)):
                h = F.linear(h, wide(w), None if b is None else wide(b))
                if i < len(stack.weights) - 1:
                    if stack.activation in KINKED:
                        nearest = torch.minimum(nearest, h.detach().abs().amin(1))
                    h = act(h, stack.activation, stack.slope)
            if isinstance(term, Scalar):
                total = total + term.weight * h.squeeze(1)
                continue
            r = (torch.tanh(h) if term.tanh else h) - wide(term.target)
            if term.likelihood == "laplace":
                nearest = torch.minimum(nearest, r.detach().abs().amin(1))
            each = r.square() / (2 * term.scale**2) if term.likelihood == "gaussian" else r.abs() / term.scale
            keep = torch.ones(1, 1, dtype=torch.bool) if term.observed is None else term.observed
            total = total + term.weight * torch.where(keep, each, 0.0).sum(1)
        return total, nearest

    def with_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        value = self.value(x)[0]
        return value.detach(), torch.autograd.grad(value.sum(), x)[0]


@given(data=st.data())
def test_mlp_energy(data: st.DataObject) -> None:
    chains, inputs = data.draw(st.integers(1, 40), label="chains"), data.draw(st.integers(1, 40), label="inputs")
    numbers = Numbers(data.draw(seeds, label="numbers"))
    terms = Terms(data.draw, chains, inputs, numbers)
    x = laid_out(numbers.normal(chains, inputs), data.draw(st.sampled_from(("contiguous", "transposed", "strided"))))
    backend, isa = data.draw(st.sampled_from(places()), label="backend")
    sound = (terms.value(x.double())[1] > 1e-4).numpy()
    assume(sound.any())
    with at(isa):
        value, grad = mlp_energy(x, terms.terms, backend=backend)
    exact, rough = terms.with_gradient(x.double()), terms.with_gradient(x)
    close(value, exact[0], rough[0])
    close(grad, exact[1], rough[1], sound)


@given(data=st.data())
def test_langevin_mlp(data: st.DataObject) -> None:
    draw = data.draw
    chains, steps = draw(st.integers(1, 40), label="chains"), draw(st.integers(0, 5), label="steps")
    widths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=3), label="inputs")
    numbers = Numbers(draw(seeds, label="numbers"))
    terms = Terms(draw, chains, sum(widths), numbers)
    x = [numbers.normal(chains, n) for n in widths]
    backend, isa = draw(st.sampled_from(places()), label="backend")
    options: dict[str, Any] = {"step_size": 0.02, "noise_scale": 0.1}
    for name, value in {
        "grad_clip": 0.5,
        "grad_norm_clip": 1.0,
        "max_update": 0.2,
        "prior_std": 1.5,
        "low": -1.0,
        "high": 1.0,
    }.items():
        if draw(st.booleans(), label=name):
            options[name] = value
    if draw(st.booleans(), label="step size per chain"):
        options["step_size"] = torch.linspace(0.01, 0.05, chains)
    noise_at: Any = draw(st.sampled_from(("after", "before")), label="noise_at")
    clamp_noise = noise_at == "before" and draw(st.booleans(), label="clamp_noise")
    observed = [numbers.mask(chains, n) if draw(st.booleans(), label="observed") else None for n in widths]
    where = {"seed": draw(st.integers(0, 2**63 - 1), label="seed"), "first_step": 5, "chain_offset": 2}
    with at(isa):
        out = langevin_mlp(
            x,
            terms.terms,
            steps=steps,
            **options,
            **where,
            noise_at=noise_at,
            clamp_noise=clamp_noise,
            observed=observed,
            backend=backend,
        )
    join = lambda points: torch.from_numpy(np.concatenate(points, 1))

    def energy(points: Sequence[Array], k: int) -> tuple[Array, list[Array]]:
        value, grad = terms.with_gradient(join(points))
        return value.numpy(), [g.numpy() for g in grad.split(widths, 1)]

    def setting(name: str, i: int, k: int) -> Any:
        value = options.get(name)
        return value.double().numpy()[:, None] if isinstance(value, Tensor) else value

    def run(dtype: Any, jitter: int | None) -> rule.Result:
        return rule.langevin(
            energy,
            [t.numpy().astype(dtype) for t in x],
            steps,
            setting,
            **where,
            noise_at=noise_at,
            clamp_noise=clamp_noise,
            masks=[False if m is None else m.numpy() for m in observed],
            jitter=None if jitter is None else np.random.default_rng(jitter),
            after_gradient=lambda points, k: terms.value(join(points).double())[1].numpy(),
        )

    truth = run(np.float64, None)
    tolerance = Tolerance(truth, [run(np.float32, n) for n in range(2)], 2.0**-24)
    sound = tolerance.sound(1e-4)
    assume(sound.any())
    for i, t in enumerate(out.x):
        tolerance.close(f"x[{i}]", t, lambda r, i=i: r.state[i], sound)


# -- likelihoods


@given(data=st.data())
def test_residual(data: st.DataObject) -> None:
    draw = data.draw
    numbers = Numbers(draw(seeds, label="numbers"))
    chains = draw(st.integers(0, 9), label="chains")
    backend, isa = draw(st.sampled_from(places()), label="backend")
    predictions, targets, kinds, masks, scales, weights = [], [], [], [], [], []
    for _ in range(draw(st.integers(1, 3), label="modalities")):
        kind = draw(st.sampled_from(("gaussian", "laplace", "categorical")), label="likelihood")
        shape = draw(st.lists(st.integers(0, 12), max_size=3), label="shape")
        if kind == "categorical":
            classes = draw(st.integers(1, 12), label="classes")
            predictions.append(3 * numbers.normal(chains, classes, *shape))
            targets.append(torch.randint(0, classes, (chains, *shape), generator=numbers.generator))
        else:
            predictions.append(numbers.normal(chains, *shape))
            targets.append(numbers.normal(chains, *shape))
        layout = draw(st.sampled_from(("contiguous", "transposed", "strided")), label="layout")
        predictions[-1] = laid_out(predictions[-1], layout)
        kinds.append(kind)
        masks.append(numbers.mask(*targets[-1].shape) if draw(st.booleans(), label="observed") else None)
        scales.append(numbers.normal(chains).abs() + 0.3 if draw(st.booleans(), label="scale per chain") else 0.7)
        weights.append(numbers.normal(chains) if draw(st.booleans(), label="weight per chain") else 1.5)

    def by_hand(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        leaves = [y.detach().to(dtype).requires_grad_() for y in predictions]
        total = torch.zeros(chains, dtype=dtype)
        for y, t, kind, mask, scale, weight in zip(leaves, targets, kinds, masks, scales, weights):
            if kind == "categorical":
                each = F.cross_entropy(y, t, reduction="none") if t.numel() else y.sum(1) * 0
            else:
                s = scale.to(dtype).reshape(-1, *[1] * (y.dim() - 1)) if isinstance(scale, Tensor) else scale
                r = y - t.to(dtype)
                each = r.square() / (2 * s**2) if kind == "gaussian" else r.abs() / s
            if mask is not None:
                each = torch.where(mask, each, 0.0)
            each = each.reshape(chains, math.prod(each.shape[1:])).sum(1)
            total = total + (weight.to(dtype) if isinstance(weight, Tensor) else weight) * each
        grads = torch.autograd.grad(total.sum(), leaves, allow_unused=True)
        return total.detach(), [torch.zeros_like(y) if g is None else g for g, y in zip(grads, leaves)]

    options: dict[str, Any] = {
        "likelihood": kinds,
        "scale": scales,
        "weight": weights,
        "observed": masks,
        "backend": backend,
    }
    with at(isa):
        value, grads = residual_and_gradient(predictions, targets, **options)
        leaves = [y.detach().requires_grad_() for y in predictions]
        again = residual(leaves, targets, **options)
        through = torch.autograd.grad(again.sum(), leaves, allow_unused=True)
    exact, rough = by_hand(torch.float64), by_hand(torch.float32)
    close(value, exact[0], rough[0])
    close(again, exact[0], rough[0])
    for g, h, e, r in zip(grads, through, exact[1], rough[1]):
        close(g, e, r)
        close(torch.zeros_like(g) if h is None else h, e, r)
