"""The update of a Langevin step, and whole chains of them, against hand-written loops and the peers.

    python -m pytest benchmarks/bench_langevin_step.py --benchmark-only

Every implementation passes a parity gate before it is timed: without noise it computes the reference's update, and with
noise the displacement has the mean and the variance it must have. See benchmarks/README.md.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import mmebm
from mmebm import native
from mmebm.ops import langevin_step as op
from mmebm.ops.common.params import StepParams

STEP_SIZE, NOISE_SCALE = 0.01, 0.005
Update = Callable[[int], object]
Measure = Callable[..., None]

UPDATES: dict[str, list[tuple[int, ...]]] = {
    "4,096 floats": [(64, 64)],
    "150,528 floats": [(64, 3, 28, 28)],
    "752,640 floats": [(320, 3, 28, 28)],
    "3,010,560 floats": [(1280, 3, 28, 28)],
    "5 tensors of 150,528 floats": [(64, 3, 28, 28)] * 5,
    "4,090 floats, 10 a chain": [(409, 10)],
}


def eager(x: Sequence[Tensor], grad: Sequence[Tensor], scale: float) -> Update:
    """The loop that people write, in place."""

    def update(step: int) -> None:
        for t, g in zip(x, grad, strict=True):
            t.add_(g, alpha=-STEP_SIZE)
            t.add_(torch.randn_like(t), alpha=scale)
            t.clamp_(0, 1)

    return update


def compiled(x: Sequence[Tensor], grad: Sequence[Tensor], scale: float) -> Update:
    """The same loop under torch.compile."""

    def body(x: Sequence[Tensor], grad: Sequence[Tensor]) -> None:
        for t, g in zip(x, grad, strict=True):
            t.copy_((t - STEP_SIZE * g + scale * torch.randn_like(t)).clamp(0, 1))

    torch._dynamo.reset()
    function = torch.compile(body, fullgraph=True)
    try:
        function(x, grad)
    except Exception as error:
        pytest.skip(f"torch.compile cannot build this here: {error}")
    return lambda step: function(x, grad)


def with_stepper(backend: str) -> Callable[[Sequence[Tensor], Sequence[Tensor], float], Update]:
    def prepare(x: Sequence[Tensor], grad: Sequence[Tensor], scale: float) -> Update:
        state = list(x)
        n = len(state)
        options = op.StepOptions(seed=1, streams=tuple(range(n)), noisy=(True,) * n)
        try:
            stepper, _ = op.stepper(backend, state, options)
        except native.BackendError as error:
            pytest.skip(str(error))
        params = [StepParams(STEP_SIZE, scale, low=0.0, high=1.0)] * n

        def update(step: int) -> None:
            out, _ = stepper.step(state, grad, params, step, with_noise=True, stats=False)
            if not stepper.inplace:
                state[:] = out
                for t, y in zip(x, out, strict=True):
                    t.copy_(y)

        return update

    return prepare


COPY = "copy of as many bytes"
IMPLEMENTATIONS: dict[str, Callable[[Sequence[Tensor], Sequence[Tensor], float], Update]] = {
    "eager": eager,
    "torch.compile": compiled,
    "mmebm torch": with_stepper("torch"),
    "mmebm cpp": with_stepper("cpp"),
}


def tensors(shapes: Sequence[tuple[int, ...]], seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = [torch.rand(shape, generator=generator) for shape in shapes]
    return x, [torch.randn(shape, generator=generator) for shape in shapes]


def gate(prepare: Callable[[Sequence[Tensor], Sequence[Tensor], float], Update]) -> None:
    """Nothing is timed that does not compute the update."""
    x, grad = tensors([(64, 3, 28, 28), (64, 10)], seed=1)
    exact = [(t.double() - STEP_SIZE * g.double()).clamp(0, 1) for t, g in zip(x, grad, strict=True)]
    ours = [t.clone() for t in x]
    update = prepare(ours, grad, 0.0)
    for t, start in zip(ours, x, strict=True):
        t.copy_(start)  # torch.compile has run once already
    update(0)
    error = max(float((y - e).abs().max()) for y, e in zip(ours, exact, strict=True))
    assert error < 1e-6, f"the update without noise is off by {error}"
    middle = [torch.full_like(t, 0.5) for t in x]
    update = prepare(middle, [torch.zeros_like(g) for g in grad], NOISE_SCALE)
    for t in middle:
        t.fill_(0.5)
    update(0)
    moved = (middle[0] - 0.5).double().flatten() / NOISE_SCALE
    n = moved.numel()
    assert abs(moved.var() - 1) < 6 * math.sqrt(2 / n), f"variance {moved.var()}"
    assert abs(moved.mean()) < 6 / math.sqrt(n), f"mean {moved.mean()}"


@pytest.mark.parametrize("implementation", (*IMPLEMENTATIONS, COPY))
@pytest.mark.parametrize("workload", UPDATES)
def test_update(benchmark: Any, measure: Measure, workload: str, implementation: str) -> None:
    x, grad = tensors(UPDATES[workload])
    elements = sum(t.numel() for t in x)
    benchmark.group = f"update, {workload}, {torch.get_num_threads()} threads"
    # an update reads x and the gradient and writes x
    benchmark.extra_info.update(implementation=implementation, bytes=12 * elements)
    if implementation == COPY:
        benchmark.extra_info["roof"] = True
        # a copy reads and writes: half of the bytes each; ones, as memory never written may all be one page of zeros
        source = torch.ones(6 * elements, dtype=torch.uint8)
        target = source.clone()
        update: Update = lambda step: target.copy_(source)
    else:
        benchmark.extra_info.update(elements=elements, baseline=implementation == "eager")
        prepare = IMPLEMENTATIONS[implementation]
        gate(prepare)
        update = prepare(x, grad, NOISE_SCALE)
    count = iter(range(1 << 62))
    # short updates are timed in bunches, so that the clock does not count
    bunch = max(1, 200_000 // elements)

    def run() -> None:
        for _ in range(bunch):
            update(next(count))

    measure(run, bunch)


# -- options


OPTIONS: dict[str, dict[str, Any]] = {
    "value clip and prior": {"grad_clip": 1.0, "prior_std": 1.0},
    "norm clip": {"grad_norm_clip": 10.0},
    "step size per chain": {"step_size": torch.full((64, 1, 1, 1), STEP_SIZE)},
    "statistics": {},
}


def eager_option(name: str, x: Tensor, g: Tensor, scale: float = NOISE_SCALE) -> None:
    if name == "value clip and prior":
        g = g.clamp(-1.0, 1.0) + x
    if name == "norm clip":
        g = g * (10.0 / g.flatten(1).norm(dim=1).clamp_min(10.0)).view(-1, 1, 1, 1)
    before = x.clone() if name == "statistics" else x
    if name == "step size per chain":
        x.sub_(OPTIONS[name]["step_size"] * g)
    else:
        x.add_(g, alpha=-STEP_SIZE)
    x.add_(torch.randn_like(x), alpha=scale)
    x.clamp_(0, 1)
    if name == "statistics":
        g.flatten(1).norm(dim=1)
        (x - before).flatten(1).norm(dim=1)
        (~torch.isfinite(x)).flatten(1).sum(1)


Step = Callable[[Tensor, Tensor, list[StepParams]], Tensor]


def option_params(name: str, scale: float = NOISE_SCALE) -> list[StepParams]:
    values: dict[str, Any] = {"step_size": STEP_SIZE, "noise_scale": scale, "low": 0.0, "high": 1.0}
    return [StepParams(**{**values, **OPTIONS[name]})]


def gate_option(name: str, step: Step, options: op.StepOptions, scale: float) -> None:
    """The update is the reference's; ``scale`` 0 for a loop with noise of its own."""
    (x,), (g,) = tensors([(64, 3, 28, 28)])
    params = option_params(name, scale)
    expected, _ = op.TorchStepper(options).step([x.clone()], [g], params, 0, with_noise=True, stats=True)
    torch.testing.assert_close(step(x.clone(), g, params), expected[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("implementation", ("eager", "mmebm cpp"))
@pytest.mark.parametrize("name", OPTIONS)
def test_options(benchmark: Any, measure: Measure, name: str, implementation: str) -> None:
    (x,), (g,) = tensors([(64, 3, 28, 28)])
    params = option_params(name)
    options = op.StepOptions(seed=1, streams=(0,), noisy=(True,))
    try:
        stepper, _ = op.stepper("cpp", [x], options)
    except native.BackendError as error:
        pytest.skip(str(error))

    def eager_step(x: Tensor, g: Tensor, params: list[StepParams]) -> Tensor:
        eager_option(name, x, g, 0.0)
        return x

    def cpp_step(x: Tensor, g: Tensor, params: list[StepParams]) -> Tensor:
        return stepper.step([x], [g], params, 0, with_noise=True, stats=True)[0][0]

    gate_option(name, eager_step, options, 0.0)
    gate_option(name, cpp_step, options, NOISE_SCALE)
    count = iter(range(1 << 62))

    def cpp() -> None:
        stepper.step([x], [g], params, next(count), with_noise=True, stats=name == "statistics")

    benchmark.group = f"150,528 floats, {name}, {torch.get_num_threads()} threads"
    benchmark.extra_info.update(implementation=implementation, elements=x.numel(), baseline=implementation == "eager")
    run = cpp if implementation == "mmebm cpp" else lambda: eager_option(name, x, g)
    measure(run)


# -- a score that costs nothing: what a sampler adds to it


@pytest.mark.parametrize("implementation", ("eager", "mmebm"))
def test_score_given(benchmark: Any, measure: Measure, implementation: str) -> None:
    steps, generator = 20, torch.Generator().manual_seed(0)
    shapes = [(64, 3, 28, 28)] * 5
    x, score = ([torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2))
    sampler = mmebm.Langevin(STEP_SIZE, NOISE_SCALE, score=True)
    still = mmebm.Langevin(STEP_SIZE, 0.0, score=True)

    def loop(scale: float) -> list[Tensor]:
        state = [t.clone() for t in x]
        for _ in range(steps):
            for t, s in zip(state, score, strict=True):
                t.add_(s, alpha=STEP_SIZE)
                t.add_(torch.randn_like(t), alpha=scale)
        return state

    for a, b in zip(loop(0.0), still.sample(lambda x: score, x, steps).state, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    benchmark.group = f"score given, five modalities of 150,528, {torch.get_num_threads()} threads"
    benchmark.extra_info.update(implementation=implementation, elements=5 * 150_528, baseline=implementation == "eager")
    ours = lambda: sampler.sample(lambda x: score, x, steps)
    measure(ours if implementation == "mmebm" else lambda: loop(NOISE_SCALE))


# -- whole chains


CHAINS: dict[str, tuple[int, int, int, int]] = {
    "100 chains of 64, MLP 64-200-200-1": (100, 64, 200, 20),
    "4,096 chains of 2, MLP 2-64-64-1": (4096, 2, 64, 20),
}


Chainable = Callable[[Tensor], Tensor]


class Energy(torch.nn.Sequential):
    def __init__(self, dim: int, width: int) -> None:
        super().__init__(
            torch.nn.Linear(dim, width),
            torch.nn.SiLU(),
            torch.nn.Linear(width, width),
            torch.nn.SiLU(),
            torch.nn.Linear(width, 1),
            torch.nn.Flatten(0),
        )


def eager_chain(energy: Chainable, x: Tensor, steps: int, scale: float = NOISE_SCALE) -> Tensor:
    for _ in range(steps):
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(energy(x).sum(), x)
        x = x.detach() - STEP_SIZE * grad + scale * torch.randn_like(x)
    return x


def mmebm_chain(energy: Chainable, x: Tensor, steps: int, scale: float = NOISE_SCALE) -> Tensor:
    return mmebm.langevin(energy, x, steps=steps, step_size=STEP_SIZE, noise_scale=scale)


def peer(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} is not installed ({error}); pip install 'mmebm[peers]'")


def torchebm_chain(energy: Chainable, x: Tensor, steps: int, scale: float = NOISE_SCALE) -> Tensor:
    core, samplers = peer("torchebm.core"), peer("torchebm.samplers")

    class Model(core.BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.energy = energy

        def forward(self, x: Tensor) -> Tensor:
            return self.energy(x)

    relative = scale / math.sqrt(2 * STEP_SIZE)
    sampler = samplers.LangevinDynamics(Model(), step_size=STEP_SIZE, noise_scale=relative, device=torch.device("cpu"))
    return sampler.sample(x=x, n_steps=steps)


def ebmkit_chain(energy: Chainable, x: Tensor, steps: int, scale: float = NOISE_SCALE) -> Tensor:
    samplers = peer("ebm.samplers")
    sampler = samplers.LangevinDynamics(step_size=STEP_SIZE, steps=steps, noise_scale=scale)
    return sampler.sample(energy, x)


WHOLE: dict[str, Callable[..., Tensor]] = {
    "eager": eager_chain,
    "mmebm": mmebm_chain,
    "torchebm": torchebm_chain,
    "ebmkit": ebmkit_chain,
}


def gate_chain(run: Callable[..., Tensor], chains: int, dim: int, width: int, steps: int) -> None:
    """With next to no noise the chain ends where it does in float64; what the noise adds has its mean and variance."""
    torch.manual_seed(0)
    energy, x = Energy(dim, width), torch.randn(chains, dim)
    wide = Energy(dim, width).double()
    wide.load_state_dict(energy.state_dict())
    still = eager_chain(wide, x.double(), steps, 0.0).detach()
    moved = (run(energy, x, steps, 1e-9).double() - x.double()).detach()
    wanted = still - x.double()
    error = float((moved - wanted).norm() / wanted.norm())
    # float32's roundings of x, of 6e-8 a step, are 1e-4 of what the flat energy of an untrained network moves
    assert error < 1e-3, f"the chain without noise is off by {error} of what it moves"
    noise = (run(energy, x, steps).double() - still) / (NOISE_SCALE * math.sqrt(steps))
    limit = 6 * math.sqrt(2 / noise.numel()) + 0.02  # and what the drift makes of the noise
    assert abs(noise.var() - 1) < limit, f"variance {noise.var()} of the noise"
    assert abs(noise.mean()) < limit, f"mean {noise.mean()} of the noise"


@pytest.mark.parametrize("implementation", WHOLE)
@pytest.mark.parametrize("workload", CHAINS)
def test_chain(benchmark: Any, measure: Measure, workload: str, implementation: str) -> None:
    chains, dim, width, steps = CHAINS[workload]
    run = WHOLE[implementation]
    torch.manual_seed(0)
    energy, x = Energy(dim, width), torch.randn(chains, dim)
    gate_chain(run, chains, dim, width, steps)
    benchmark.group = f"{steps} steps, {workload}, {torch.get_num_threads()} threads"
    benchmark.extra_info.update(implementation=implementation, baseline=implementation == "eager")
    measure(lambda: run(energy, x, steps))


# -- a full step: everything included, and an energy that costs next to nothing


FULL = (256, 32, 100)  # chains, elements, steps


def quadratic(x: Tensor) -> Tensor:
    return x.square().sum(1)


def jem_chain(energy: Chainable, x: Tensor, steps: int) -> Tensor:
    """The loop of the JEM code and what descends from it: through ``.data``, one gradient a step."""
    x = x.clone().requires_grad_()
    for _ in range(steps):
        (grad,) = torch.autograd.grad(energy(x).sum(), [x], retain_graph=True)
        x.data += -STEP_SIZE * grad + NOISE_SCALE * torch.randn_like(x)
    return x.detach()


def jax_chain() -> Callable[[Tensor], Callable[[], Any]]:
    """SGLD as one jitted ``lax.scan``; its threads are XLA's own."""
    jax = peer("jax")

    def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
        x, key = carry
        key, this = jax.random.split(key)
        gradient = jax.grad(lambda x: (x * x).sum())(x)
        return (x - STEP_SIZE * gradient + NOISE_SCALE * jax.random.normal(this, x.shape), key), None

    @jax.jit
    def chain(x: Any, key: Any) -> Any:
        return jax.lax.scan(step, (x, key), length=FULL[2])[0][0]

    def prepare(x: Tensor) -> Callable[[], Any]:
        start, key = jax.device_put(x.numpy(), jax.devices("cpu")[0]), jax.random.key(0)
        return lambda: chain(start, key).block_until_ready()

    return prepare


def gate_full_step(run: Callable[[], Any], x: Tensor) -> None:
    """x_k = r^k x_0 + noise of variance s^2 (1 + r^2 + ... + r^(2k - 2)), to six standard errors."""
    steps = FULL[2]
    out = torch.tensor(run().tolist(), dtype=torch.float64)
    rate = 1 - 2 * STEP_SIZE
    variance = NOISE_SCALE**2 * (1 - rate ** (2 * steps)) / (1 - rate**2)
    noise = out - rate**steps * x.double()
    assert abs(noise.var() / variance - 1) < 6 * math.sqrt(2 / x.numel()), f"variance {noise.var()} of the noise"
    drift = (noise * x).sum() / x.norm()
    assert abs(drift) < 6 * math.sqrt(variance), f"the drift is off by {drift / x.norm()}"


@pytest.mark.parametrize("implementation", ("JEM loop", "torchebm", "ebmkit", "jax, jitted scan", "mmebm"))
def test_full_step(benchmark: Any, measure: Measure, implementation: str) -> None:
    chains, size, steps = FULL
    x = torch.randn(chains, size, generator=torch.Generator().manual_seed(0))
    if implementation.startswith("jax"):
        run = jax_chain()(x)
    else:
        whole = jem_chain if implementation == "JEM loop" else WHOLE[implementation]
        run = lambda: whole(quadratic, x, steps)
    gate_full_step(run, x)
    benchmark.group = f"full step, {steps} steps of {chains} chains of {size}, sum of squares"
    benchmark.extra_info.update(
        implementation=implementation, elements=steps * x.numel(), baseline=implementation == "JEM loop"
    )
    measure(run)
