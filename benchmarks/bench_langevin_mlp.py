"""Whole Langevin chains on MLP energies, in one call and as the loops that people write.

    python -m pytest benchmarks/bench_langevin_mlp.py --benchmark-only

Every implementation passes a parity gate before it is timed: with next to no noise it ends where the chain in float64
does, and what the noise adds has its variance. GFLOP/s count the matrix products of the forward pass and of the
backward pass in x; "torch.mm" is what torch's own product of large matrices reaches in the same run.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmebm.native import BackendError
from mmebm.ops.langevin_mlp import langevin_mlp
from mmebm.ops.terms import Residual, Scalar, Stack, Term

STEP_SIZE, NOISE_SCALE = 0.01, 0.005
Measure = Callable[..., None]
Run = Callable[[float], Any]  # the noise's scale -> the final state


@dataclass(frozen=True)
class Workload:
    """``decoders``: sizes of stacks whose tanh outputs explain a target; ``sizes[0]`` is the state's width."""

    chains: int
    sizes: tuple[int, ...]
    steps: int
    decoders: tuple[tuple[int, ...], ...] = ()
    clamp: bool = False
    prior_std: float | None = None

    @property
    def flops(self) -> int:
        products = sum(i * o for sizes in (self.sizes, *self.decoders) for i, o in pairwise(sizes))
        return 4 * self.chains * self.steps * products


LARGE = "1,024 x 128, MLP 128-256-256-1, 30 steps"
WORKLOADS: dict[str, Workload] = {
    "100 x 64, MLP 64-200-200-1, 60 steps": Workload(100, (64, 200, 200, 1), 60),
    "100 x 2, MLP 2-64-64-1, 100 steps": Workload(100, (2, 64, 64, 1), 100),
    LARGE: Workload(1024, (128, 256, 256, 1), 30),
    "demo's data chain: 100 x 270, MLP 270-256-256-1, 30 steps, clamped": Workload(
        100, (270, 256, 256, 1), 30, clamp=True
    ),
    "posterior: 100 x 16, MLP 16-128-128-1 and decoders 16-256-256-{196, 64, 10}, 20 steps": Workload(
        100, (16, 128, 128, 1), 20, tuple((16, 256, 256, n) for n in (196, 64, 10)), prior_std=1.0
    ),
}


def problem(w: Workload) -> tuple[Tensor, list[Term]]:
    generator = torch.Generator().manual_seed(0)

    def stack(sizes: Sequence[int]) -> Stack:
        weights = [torch.randn(o, i, generator=generator) / math.sqrt(i) for i, o in pairwise(sizes)]
        return Stack.mlp(tuple(weights), tuple(0.1 * torch.randn(o, generator=generator) for o in sizes[1:]))

    x = 0.2 + 0.6 * torch.rand(w.chains, w.sizes[0], generator=generator)
    terms: list[Term] = [Scalar(stack(w.sizes))]
    for sizes in w.decoders:
        target = torch.tanh(torch.randn(w.chains, sizes[-1], generator=generator))
        terms.append(Residual(stack(sizes), target, 1.0, tanh=True))
    return x, terms


class Energy(torch.nn.Module):
    """The sum of terms as torch users write it."""

    def __init__(self, terms: Sequence[Term], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.stacks = torch.nn.ModuleList()
        self.targets: list[Tensor] = []
        for term in terms:
            assert isinstance(term, (Scalar, Residual))
            layers: list[torch.nn.Module] = []
            for weight, bias in zip(term.stack.weights, term.stack.biases, strict=True):
                layer = torch.nn.Linear(weight.shape[1], weight.shape[0], dtype=dtype)
                assert bias is not None
                layer.load_state_dict({"weight": weight, "bias": bias})
                layers += [layer.requires_grad_(False), torch.nn.SiLU()]
            self.stacks.append(torch.nn.Sequential(*layers[:-1]))
            if isinstance(term, Residual):
                self.targets.append(term.target.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        energy = self.stacks[0](x).squeeze(1)
        for stack, target in zip(list(self.stacks)[1:], self.targets, strict=True):
            energy = energy + 0.5 * F.mse_loss(torch.tanh(stack(x)), target, reduction="none").sum(1)
        return energy


def eager(w: Workload, x: Tensor, terms: Sequence[Term], dtype: torch.dtype = torch.float32) -> Run:
    """The loop that people write."""
    energy, start = Energy(terms, dtype), x.to(dtype)

    def run(scale: float) -> Tensor:
        x = start.clone()
        for _ in range(w.steps):
            x.requires_grad_()
            (grad,) = torch.autograd.grad(energy(x).sum(), x)
            x = x.detach()
            if w.prior_std is not None:
                grad.add_(x, alpha=w.prior_std**-2)
            x = x.sub_(grad, alpha=STEP_SIZE).add_(torch.randn_like(x), alpha=scale)
            if w.clamp:
                x.clamp_(0, 1)
        return x

    return run


def with_backend(backend: str) -> Callable[[Workload, Tensor, Sequence[Term]], Run]:
    def prepare(w: Workload, x: Tensor, terms: Sequence[Term]) -> Run:
        bounds = {"low": 0.0, "high": 1.0} if w.clamp else {}
        seeds = itertools.count(1)

        def run(scale: float) -> Tensor:
            return langevin_mlp(
                [x],
                terms,
                steps=w.steps,
                step_size=STEP_SIZE,
                noise_scale=scale,
                seed=next(seeds),
                prior_std=w.prior_std,
                backend=backend,
                **bounds,
            ).x[0]

        try:
            run(0.0)
        except BackendError as error:
            pytest.skip(str(error))
        return run

    return prepare


def peer(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} is not installed ({error}); pip install 'mmebm[peers]'")


def jax_scan(w: Workload, x: Tensor, terms: Sequence[Term]) -> Run:
    """The chain as one jitted ``lax.scan``; its threads are XLA's own."""
    jax = peer("jax")
    device = jax.devices("cpu")[0]

    def put(t: Tensor) -> Any:
        return jax.device_put(t.numpy(), device)

    stacks = [
        [(put(m), put(b)) for m, b in zip(t.stack.weights, t.stack.biases, strict=True)]  # type: ignore[union-attr]
        for t in terms
    ]
    targets = [put(t.target) for t in terms if isinstance(t, Residual)]

    def forward(layers: Any, h: Any) -> Any:
        for weight, bias in layers[:-1]:
            h = jax.nn.silu(h @ weight.T + bias)
        return h @ layers[-1][0].T + layers[-1][1]

    def energy(x: Any, stacks: Any, targets: Any) -> Any:
        total = forward(stacks[0], x).sum()
        for layers, target in zip(stacks[1:], targets, strict=True):
            total = total + 0.5 * ((jax.numpy.tanh(forward(layers, x)) - target) ** 2).sum()
        return total

    @jax.jit
    def chain(x: Any, key: Any, stacks: Any, targets: Any, scale: Any) -> Any:
        def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
            x, key = carry
            key, this = jax.random.split(key)
            grad = jax.grad(energy)(x, stacks, targets)
            if w.prior_std is not None:
                grad = grad + x / w.prior_std**2
            x = x - STEP_SIZE * grad + scale * jax.random.normal(this, x.shape)
            return (jax.numpy.clip(x, 0, 1) if w.clamp else x, key), None

        return jax.lax.scan(step, (x, key), length=w.steps)[0][0]

    start, keys = put(x), (jax.random.key(seed) for seed in itertools.count())
    return lambda scale: chain(start, next(keys), stacks, targets, scale).block_until_ready()


def torchebm(w: Workload, x: Tensor, terms: Sequence[Term]) -> Run:
    if w.clamp:
        pytest.skip("torchebm's Langevin sampler does not clamp")
    core, samplers = peer("torchebm.core"), peer("torchebm.samplers")

    class Model(core.BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.energy = Energy(terms)

        def forward(self, x: Tensor) -> Tensor:
            energy = self.energy(x)
            return energy if w.prior_std is None else energy + 0.5 * x.square().sum(1) / w.prior_std**2

    model = Model()

    def run(scale: float) -> Tensor:
        relative = scale / math.sqrt(2 * STEP_SIZE)
        sampler = samplers.LangevinDynamics(
            model, step_size=STEP_SIZE, noise_scale=relative, device=torch.device("cpu")
        )
        return sampler.sample(x=x, n_steps=w.steps)

    return run


IMPLEMENTATIONS: dict[str, Callable[[Workload, Tensor, Sequence[Term]], Run]] = {
    "eager": eager,
    "mmebm torch": with_backend("torch"),
    "mmebm cpp": with_backend("cpp"),
    "jax, jitted scan": jax_scan,
    "torchebm": torchebm,
}


def gate(w: Workload, run: Run, x: Tensor, terms: Sequence[Term]) -> None:
    """Nothing is timed that does not compute the chain."""
    still = eager(w, x, terms, torch.float64)(0.0)
    wide = lambda scale: torch.tensor(run(scale).tolist(), dtype=torch.float64)
    wanted = still - x.double()
    error = (wide(1e-9) - still).norm() / wanted.norm()
    # float32's roundings of x, of 6e-8 a step, are 1e-4 of what the least of these chains moves
    assert error < 1e-3, f"the chain without noise is off by {error} of what it moves"
    # what a chain makes of its noise, of ours and of the loop's: to six standard errors of their ratio
    repeats = max(1, min(10, 10_000 // x.numel()))
    loop = eager(w, x, terms, torch.float64)
    ours, theirs = (
        sum(float((chain(NOISE_SCALE) - still).square().mean()) for _ in range(repeats)) for chain in (wide, loop)
    )
    limit = 6 * math.sqrt(2 * 2 / (repeats * x.numel()))
    assert abs(ours / theirs - 1) < limit, f"the noise's variance is {ours / theirs} of what it is to be"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_chain(benchmark: Any, measure: Measure, workload: str, implementation: str) -> None:
    w = WORKLOADS[workload]
    x, terms = problem(w)
    run = IMPLEMENTATIONS[implementation](w, x, terms)
    gate(w, run, x, terms)
    benchmark.group = f"{workload}, {torch.get_num_threads()} threads"
    benchmark.extra_info.update(implementation=implementation, flops=w.flops, baseline=implementation == "eager")
    measure(lambda: run(NOISE_SCALE))


def test_torch_mm(benchmark: Any, measure: Measure) -> None:
    n = 2048
    a, b, out = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
    benchmark.group = f"{LARGE}, {torch.get_num_threads()} threads"
    benchmark.extra_info.update(implementation=f"torch.mm, {n}^3", flops=2 * n**3)
    measure(lambda: torch.mm(a, b, out=out))
