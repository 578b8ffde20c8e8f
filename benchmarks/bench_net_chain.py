"""Whole chains of convolutional energies: one call of ``langevin_net`` against the loop people write.

    python -m pytest benchmarks/bench_net_chain.py --benchmark-only
    MMEBM_BENCH_THREADS=1 MMEBM_CPU_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ... (an AVX2 machine)

Rows: the eager loop, the loop on a ``torch.compile``'d energy, ours, and JAX (``jit`` of a ``lax.scan``) where it is
installed and the energy is written for it here. Ours is everything that a call costs: tracing, packing, verification
when it is due. The gate before each measurement: a noiseless chain of 20 steps, in which x moves by a good part of its
range, is within three times the error that PyTorch makes in float32 against float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

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
        nn.Conv2d(3, 16, 3, padding=1), Block(16, 16), Block(16, 32), Block(32, 64), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(64, 1),
    )  # fmt: skip


def tutorial_energy() -> nn.Sequential:
    """That of a well-known tutorial on deep energy models."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=4), nn.SiLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.SiLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.SiLU(), nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.SiLU(),
        nn.Flatten(), nn.Linear(256, 64), nn.SiLU(), nn.Linear(64, 1),
    )  # fmt: skip


def plain_energy(width: int, channels: int) -> nn.Sequential:
    """Convolutions without pooling, as of Nijkamp et al."""
    w = width
    return nn.Sequential(
        nn.Conv2d(channels, w, 3, 1, 1), nn.LeakyReLU(0.2), nn.Conv2d(w, 2 * w, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(2 * w, 4 * w, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(4 * w, 4 * w, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * w, 1),
    )  # fmt: skip


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


def _jax_chain(energy: nn.Sequential, x: State, step: float) -> Callable[[], Any]:
    """The tutorial's energy in JAX: a jitted scan of the steps."""
    jax = pytest.importorskip("jax")
    jnp, lax = jax.numpy, jax.lax
    weights = [
        (jnp.asarray(m.weight.detach().numpy()), jnp.asarray(m.bias.detach().numpy()), getattr(m, "padding", None))
        for m in energy if isinstance(m, (nn.Conv2d, nn.Linear)) and m.bias is not None
    ]  # fmt: skip

    def value(x: Any) -> Any:
        for i, (w, b, padding) in enumerate(weights):
            if padding is None:
                x = x.reshape(x.shape[0], -1) @ w.T + b
            else:
                pads = [(p, p) for p in padding]
                x = lax.conv_general_dilated(x, w, (2, 2), pads) + b.reshape(1, -1, 1, 1)
            x = jax.nn.silu(x) if i + 1 < len(weights) else x
        return x.sum()

    @jax.jit
    def chain(x: Any, key: Any) -> Any:
        def one(x: Any, key: Any) -> Any:
            x = x - step * jax.grad(value)(x) + NOISE * jax.random.normal(key, x.shape)
            return jnp.clip(x, *BOUNDS), None

        return lax.scan(one, x, jax.random.split(key, STEPS))[0]

    start, key = jnp.asarray(x["x"].numpy()), jax.random.PRNGKey(0)
    return lambda: chain(start, key).block_until_ready()


def flat(x: State) -> Tensor:
    return torch.cat([t.flatten(1) for t in x.values()], dim=1).double()


def gate(run: Callable[..., State], energy: nn.Module, x: State, step: float) -> None:
    """The noiseless chain of ``run`` against float64."""
    exact = flat(eager(copy.deepcopy(energy).double(), {k: t.double() for k, t in x.items()}, step, noise=0.0))
    moved = float((exact - flat(x)).abs().mean())
    assert moved > MOVES, f"x moves by {moved:.3f} in the gate's chain: it would check nothing"
    error, torchs = (float((flat(f(energy, x, step, noise=0.0)) - exact).abs().max()) for f in (run, eager))
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
    if implementation == "jax":
        if workload != "tutorial's energy, (64, 1, 28, 28)":
            pytest.skip("written in JAX is the tutorial's energy only")
        run = _jax_chain(energy.energy, x, step)  # type: ignore[arg-type]
    else:
        chain = {"eager": eager, "torch.compile'd energy": compiled, "mmebm": ours}[implementation]
        if chain is not eager:
            gate(chain, energy, x, step)

        def run() -> object:
            return chain(energy, x, step)

    benchmark.group = f"{STEPS} steps, {workload}, {torch.get_num_threads()} threads"
    benchmark.extra_info.update(implementation=implementation, baseline=implementation == "eager")
    measure(run)
