"""Whole chains of convolutional energies: one call of ``langevin_net`` against the loop people write.

    python -m pytest benchmarks/bench_net_chain.py --benchmark-only
    MMEBM_BENCH_THREADS=1 MMEBM_CPU_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ... (an AVX2 machine)

Rows: the eager loop, the loop on a ``torch.compile``'d energy, ours, and JAX (``jit`` of a ``lax.scan``) where it is
installed (``pip install -c constraints.txt jax``, in an environment of its own if need be) and the network is written
for it here. Ours is everything that a call costs: the key of the kept net, packing, verification when it is due. The
gate before each measurement: a noiseless chain of 20 steps, in which x moves by a good part of its range, is within
three times the error that PyTorch makes in float32 against float64, in the median of the chains.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.nn import functional as F

import mmebm
from mmebm.models import JointEnergy, SharedGenerator

STEPS, NOISE, BOUNDS = 20, 0.005, (-1.0, 1.0)
State = dict[str, Tensor]
Energy = Callable[[State], Tensor]

# Of the largest element of x, beside three times torch's error: some last bits
LAST_BITS = 1e-6
# Mean distance that an element of x, which lies in [-1, 1], moves in the gate's chain
MOVES = 0.1


class Block(nn.Module):
    """A residual block with average pooling, as IGEBM has it."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(a, b, 3, padding=1), nn.Conv2d(b, b, 3, padding=1)
        self.shortcut = nn.Conv2d(a, b, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.two(F.leaky_relu(self.one(x), 0.2))
        return F.avg_pool2d(F.leaky_relu(h + self.shortcut(x), 0.2), 2)


def residual_energy() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        Block(16, 16),
        Block(16, 32),
        Block(32, 64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 1),
    )


def tutorial_energy() -> nn.Sequential:
    """That of a well-known tutorial on deep energy models."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=4),
        nn.SiLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(64, 64, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(256, 64),
        nn.SiLU(),
        nn.Linear(64, 1),
    )


def plain_energy(width: int, channels: int) -> nn.Sequential:
    """Convolutions without pooling, as of Nijkamp et al."""
    w = width
    return nn.Sequential(
        nn.Conv2d(channels, w, 3, 1, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(w, 2 * w, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(2 * w, 4 * w, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(4 * w, 4 * w, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * w, 1),
    )


class OfOne(nn.Module):
    """An energy of one tensor as one of a state {"x": tensor}."""

    def __init__(self, energy: nn.Module) -> None:
        super().__init__()
        self.energy = energy

    def forward(self, x: State) -> Tensor:
        return self.energy(x["x"]).squeeze(1)


class Posterior(nn.Module):
    """-log p(z | x) of a convolutional decoder."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.generator = SharedGenerator({"a": (3, 28, 28)}, 32, net="conv", width=16)
        self.register_buffer("target", target)

    def forward(self, x: State) -> Tensor:
        y = self.generator.decoders["a"](x["z"])
        return (y - self.target).flatten(1).square().sum(1) + 0.5 * x["z"].square().sum(1)


def images(*shape: int) -> Tensor:
    return torch.rand(*shape) * 2 - 1


def joint(chains: int, width: int) -> tuple[nn.Module, State]:
    shapes = {f"m{i}": (3, 28, 28) for i in range(5)}
    return JointEnergy(shapes, net="conv", trunk_width=width), {k: images(chains, *s) for k, s in shapes.items()}


WORKLOADS: dict[str, Callable[[], tuple[nn.Module, State]]] = {
    "joint energy, five (64, 3, 28, 28), width 12": lambda: joint(64, 12),
    "joint energy, five (64, 3, 28, 28), width 32": lambda: joint(64, 32),
    "joint energy, five (8, 3, 28, 28), width 12": lambda: joint(8, 12),
    "tutorial's energy, (64, 1, 28, 28)": lambda: (OfOne(tutorial_energy()), {"x": images(64, 1, 28, 28)}),
    "residual 16/32/64, (64, 3, 32, 32)": lambda: (OfOne(residual_energy()), {"x": images(64, 3, 32, 32)}),
    "plain, width 16, (64, 1, 28, 28)": lambda: (OfOne(plain_energy(16, 1)), {"x": images(64, 1, 28, 28)}),
    "posterior through a decoder, 64 x 32": lambda: (Posterior(images(64, 3, 28, 28)), {"z": torch.randn(64, 32)}),
}


def eager(energy: Energy, x: State, step: float, steps: int = STEPS, noise: float = NOISE) -> State:
    """The loop people write."""
    x = {name: t.clone() for name, t in x.items()}
    for _ in range(steps):
        for t in x.values():
            t.requires_grad_()
        grads = torch.autograd.grad(energy(x).sum(), list(x.values()))
        with torch.no_grad():
            for t, g in zip(x.values(), grads, strict=True):
                t.requires_grad_(False)
                t.add_(g, alpha=-step)
                if noise:
                    t.add_(torch.randn_like(t), alpha=noise)
                t.clamp_(*BOUNDS)
    return x


def ours(energy: Energy, x: State, step: float, steps: int = STEPS, noise: float = NOISE) -> State:
    out = mmebm.Langevin(step, noise, bounds=BOUNDS).sample(energy, x, steps, seed=0)
    assert out.info["op"] == "langevin_net", out.info["reason"]
    return out.state


_compiled: dict[int, Any] = {}


def compiled(energy: Any, x: State, step: float, steps: int = STEPS, noise: float = NOISE) -> State:
    if id(energy) not in _compiled:
        torch._dynamo.reset()
        _compiled.clear()
        _compiled[id(energy)] = torch.compile(energy)
    try:
        return eager(_compiled[id(energy)], x, step, steps, noise)
    except TorchDynamoException as error:
        pytest.skip(f"torch.compile cannot build this here: {error}")


def _jax_function(module: Any, jax: Any) -> Callable[[Any], Any]:
    """What a network of the workloads computes, in JAX; its parameters become constants of the program."""
    jnp, lax = jax.numpy, jax.lax
    array = lambda t: jnp.asarray(t.detach().numpy())
    if isinstance(module, nn.Sequential):
        layers = [_jax_function(layer, jax) for layer in module]

        def chained(x: Any) -> Any:
            for layer in layers:
                x = layer(x)
            return x

        return chained
    if isinstance(module, Block):
        one, two, shortcut = (_jax_function(m, jax) for m in (module.one, module.two, module.shortcut))
        act = lambda x: jax.nn.leaky_relu(x, 0.2)
        pool = lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 1, 2, 2), (1, 1, 2, 2), "VALID") / 4
        return lambda x: pool(act(two(act(one(x))) + shortcut(x)))
    if isinstance(module, nn.Conv2d):
        assert module.bias is not None
        w, b, pads = array(module.weight), array(module.bias), [(int(p), int(p)) for p in module.padding]
        stride = module.stride
        return lambda x: lax.conv_general_dilated(x, w, stride, pads) + b.reshape(1, -1, 1, 1)
    if isinstance(module, nn.Linear):
        w, b = array(module.weight), array(module.bias)
        return lambda x: x @ w.T + b
    if isinstance(module, nn.LeakyReLU):
        slope = module.negative_slope
        return lambda x: jax.nn.leaky_relu(x, slope)
    simple: dict[type, Callable[[Any], Any]] = {
        nn.SiLU: jax.nn.silu,
        nn.Flatten: lambda x: x.reshape(x.shape[0], -1),
        nn.AdaptiveAvgPool2d: lambda x: x.mean((2, 3), keepdims=True),
    }
    if type(module) not in simple:
        pytest.skip(f"{type(module).__name__} is not written in JAX here")
    return simple[type(module)]


def _jax_energy(energy: nn.Module, jax: Any) -> Callable[[Any], Any]:
    """Energy (chains, 1) of a state {name: array}."""
    if isinstance(energy, OfOne):
        function = _jax_function(energy.energy, jax)
        return lambda x: function(x["x"])
    if isinstance(energy, JointEnergy):
        trunks = {name: _jax_function(trunk, jax) for name, trunk in energy.trunks.items()}
        fusion = _jax_function(energy.fusion, jax)
        return lambda x: fusion(jax.numpy.concatenate([trunk(x[name]) for name, trunk in trunks.items()], 1))
    return pytest.skip(f"{type(energy).__name__} is not written in JAX here")


def _jax_chain(energy: nn.Module, x: State, step: float, noise: float = NOISE) -> Callable[[], State]:
    """The chain in JAX, as people write it: a jitted scan of the steps."""
    jax = pytest.importorskip("jax")
    jnp, value = jax.numpy, _jax_energy(energy, jax)
    total = lambda x: value(x).sum()

    @jax.jit
    def chain(x: Any, key: Any) -> Any:
        def one(x: Any, key: Any) -> Any:
            grads = jax.grad(total)(x)
            keys = dict(zip(x, jax.random.split(key, len(x)), strict=True))
            move = lambda n, v: v - step * grads[n] + (noise * jax.random.normal(keys[n], v.shape) if noise else 0.0)
            return {n: jnp.clip(move(n, v), *BOUNDS) for n, v in x.items()}, None

        return jax.lax.scan(one, x, jax.random.split(key, STEPS))[0]

    start, key = {n: jnp.asarray(t.numpy()) for n, t in x.items()}, jax.random.PRNGKey(0)
    return lambda: jax.block_until_ready(chain(start, key))


def flat(x: State) -> Tensor:
    return torch.cat([t.flatten(1) for t in x.values()], dim=1).double()


def gate(run: Callable[..., State], energy: nn.Module, x: State, step: float) -> None:
    """The noiseless chain of ``run`` against float64: the largest error of a chain, in the median of the chains, for
    one that passes a kink on the other side ends elsewhere, whoever computes it."""
    exact = flat(eager(copy.deepcopy(energy).double(), {k: t.double() for k, t in x.items()}, step, noise=0.0))
    moved = float((exact - flat(x)).abs().mean())
    assert moved > MOVES, f"x moves by {moved:.3f} in the gate's chain: it would check nothing"
    off = lambda chain: (flat(chain(energy, x, step, noise=0.0)) - exact).abs().amax(1).median()
    error, torchs = float(off(run)), float(off(eager))
    limit = 3 * torchs + LAST_BITS * float(exact.abs().max())
    assert error <= limit, f"error {error:.3e}, torch's {torchs:.3e}, limit {limit:.3e}"


@pytest.mark.parametrize("implementation", ("eager", "torch.compile'd energy", "mmebm", "jax"))
@pytest.mark.parametrize("workload", WORKLOADS)
def test_net_chain(benchmark: Any, measure: Callable[..., None], workload: str, implementation: str) -> None:
    torch.manual_seed(0)
    energy, x = WORKLOADS[workload]()
    energy.requires_grad_(False).eval()
    leaves = {name: t.clone().requires_grad_() for name, t in x.items()}
    grads = torch.autograd.grad(energy(leaves).sum(), list(leaves.values()))
    step = 0.03 / float(torch.cat([g.flatten() for g in grads]).abs().mean())
    run: Callable[[], object]
    if implementation == "jax":
        run = _jax_chain(energy, x, step)
        silent = _jax_chain(energy, x, step, noise=0.0)
        gate(lambda *_, **__: {n: torch.from_numpy(np.array(v)) for n, v in silent().items()}, energy, x, step)
    else:
        chain = {"eager": eager, "torch.compile'd energy": compiled, "mmebm": ours}[implementation]
        if chain is not eager:
            gate(chain, energy, x, step)

        def run() -> object:
            return chain(energy, x, step)

    benchmark.group = f"{STEPS} steps, {workload}, {torch.get_num_threads()} threads"
    benchmark.extra_info.update(implementation=implementation, baseline=implementation == "eager")
    measure(run)


# Layers of a stack, whose forward pass and gradient are compared with a matrix product of as many operations
LAYERS, SIDE, CHAINS = 4, 16, 64


@pytest.mark.parametrize("implementation", ("torch.mm", "mmebm"))
@pytest.mark.parametrize("channels", (12, 16, 32, 64))
def test_layers_against_mm(benchmark: Any, measure: Callable[..., None], channels: int, implementation: str) -> None:
    """To be at least 0.7 of torch's own matrix product on layers of 12 channels and more."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(LAYERS)]
    # made once: the first chain of an energy is compared with it
    energy = OfOne(nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * SIDE**2, 1)).requires_grad_(False))
    x = torch.randn(CHAINS, channels, SIDE, SIDE)
    products = STEPS * 2 * LAYERS * CHAINS * SIDE**2 * 9 * channels**2
    n = 2048
    a, b = torch.randn(n, n), torch.randn(round(products / n**2), n).T
    run = {"torch.mm": lambda: a @ b, "mmebm": lambda: ours(energy, {"x": x}, 1e-3)}[implementation]
    benchmark.group = f"{STEPS} steps, {LAYERS} layers of {channels} channels, {torch.get_num_threads()} threads"
    benchmark.extra_info.update(implementation=implementation, baseline=implementation == "torch.mm")
    measure(run)
