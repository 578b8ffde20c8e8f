"""A chain of a convolutional joint energy on the CPU: what there is to gain around and inside the network.

    python -m pytest benchmarks/bench_conv_energy.py

The energy keeps its own forward and backward, so that ours is the loop with a fused update. The other rows change how
the network computes: memory layout, precision, compilation. The gate: the state after two steps is that of the eager
loop, to rounding (bf16: to bf16's).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mmebm
from mmebm.models import JointEnergy

SHAPES = {f"m{i}": (3, 28, 28) for i in range(5)}
CHAINS, STEPS = 64, 3
SETTINGS: dict[str, Any] = {"step_size": 0.08, "noise_scale": 0.005, "bounds": (-1.0, 1.0)}

Chain = Callable[[torch.nn.Module, dict[str, Tensor], int], dict[str, Tensor]]


def eager(energy: torch.nn.Module, x: dict[str, Tensor], steps: int, noise: float = 0.005) -> dict[str, Tensor]:
    """The loop people write."""
    x = {name: t.clone() for name, t in x.items()}
    for _ in range(steps):
        for t in x.values():
            t.requires_grad_()
        grads = torch.autograd.grad(energy(x).sum(), list(x.values()))
        with torch.no_grad():
            for t, g in zip(x.values(), grads, strict=True):
                t.requires_grad_(False)
                t.add_(g, alpha=-SETTINGS["step_size"]).add_(torch.randn_like(t), alpha=noise).clamp_(-1, 1)
    return x


def mmebm_chain(energy: Any, x: dict[str, Tensor], steps: int, **settings: Any) -> dict[str, Tensor]:
    return mmebm.langevin(energy, x, steps=steps, seed=0, **{**SETTINGS, **settings})


def channels_last(energy: torch.nn.Module, x: dict[str, Tensor], steps: int, **settings: Any) -> dict[str, Tensor]:
    energy = energy.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    last = lambda x: energy({name: t.contiguous(memory_format=torch.channels_last) for name, t in x.items()})
    return mmebm_chain(last, x, steps, **settings)


def bf16(energy: torch.nn.Module, x: dict[str, Tensor], steps: int, **settings: Any) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        return mmebm_chain(energy, x, steps, **settings)


COMPILED: dict[int, Any] = {}


def compiled(energy: torch.nn.Module, x: dict[str, Tensor], steps: int, **settings: Any) -> dict[str, Tensor]:
    if id(energy) not in COMPILED:
        COMPILED.clear()
        torch._dynamo.reset()
        COMPILED[id(energy)] = torch.compile(energy)
    try:
        return mmebm_chain(COMPILED[id(energy)], x, steps, **settings)
    except torch._dynamo.exc.TorchDynamoException as error:
        pytest.skip(f"torch.compile cannot build this here: {error}")


IMPLEMENTATIONS: dict[str, tuple[Callable[..., dict[str, Tensor]], float]] = {
    # how far the state may be from the eager loop's: fp32 sums in another order; 8 bits of mantissa
    "eager": (eager, 0.0),
    "mmebm": (mmebm_chain, 1e-5),
    "mmebm, channels_last": (channels_last, 1e-5),
    "mmebm, bf16 autocast": (bf16, 2e-2),
    "mmebm, torch.compile'd energy": (compiled, 1e-5),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_conv_chain(benchmark: Any, measure: Callable[..., None], implementation: str) -> None:
    run, tolerance = IMPLEMENTATIONS[implementation]
    torch.manual_seed(0)
    energy = JointEnergy(SHAPES, net="conv", trunk_width=12).requires_grad_(False)
    x = {name: torch.rand(CHAINS, *shape) * 2 - 1 for name, shape in SHAPES.items()}
    if run is not eager:
        wanted = eager(energy, x, 2, noise=0.0)
        for name, t in run(energy, x, 2, noise_scale=0.0).items():
            torch.testing.assert_close(t, wanted[name], rtol=0, atol=tolerance)
    benchmark.group = f"{STEPS} steps, conv energy of five (64, 3, 28, 28), {torch.get_num_threads()} threads"
    benchmark.extra_info.update(implementation=implementation, baseline=implementation == "eager")
    measure(lambda: run(energy, x, STEPS))
