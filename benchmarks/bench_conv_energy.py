"""A chain of a convolutional joint energy on the CPU: what there is to gain around and inside the network.

    python -m pytest benchmarks/bench_conv_energy.py

The energy keeps its own forward and backward, so that ours is the loop with a fused update. The other rows change how
the network computes: memory layout, precision, compilation. The gate: two steps so large that the state moves by a good
part of its range end where the eager loop does, to rounding (bf16: to bf16's), and the noise has its variance.
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

Chain = Callable[..., dict[str, Tensor]]


def eager(energy: torch.nn.Module, x: dict[str, Tensor], steps: int, **settings: Any) -> dict[str, Tensor]:
    """The loop people write."""
    size, noise = ({**SETTINGS, **settings}[name] for name in ("step_size", "noise_scale"))
    x = {name: t.clone() for name, t in x.items()}
    for _ in range(steps):
        for t in x.values():
            t.requires_grad_()
        grads = torch.autograd.grad(energy(x).sum(), list(x.values()))
        with torch.no_grad():
            for t, g in zip(x.values(), grads, strict=True):
                t.requires_grad_(False)
                t.add_(g, alpha=-size).add_(torch.randn_like(t), alpha=noise).clamp_(-1, 1)
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
    # how far a number may be from the eager loop's, as a part of the root mean square of what two steps move: fp32 sums
    # in another order; 8 bits of mantissa in each layer
    "eager": (eager, 1e-4),
    "mmebm": (mmebm_chain, 1e-4),
    "mmebm, channels_last": (channels_last, 1e-4),
    "mmebm, bf16 autocast": (bf16, 0.5),
    "mmebm, torch.compile'd energy": (compiled, 1e-4),
}


def problem(chains: int = CHAINS) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    energy = JointEnergy(SHAPES, net="conv", trunk_width=12).requires_grad_(False)
    return energy, {name: torch.rand(chains, *shape) * 2 - 1 for name, shape in SHAPES.items()}


def gate(run: Chain, tolerance: float, energy: torch.nn.Module, x: dict[str, Tensor]) -> None:
    """Nothing is timed that does not compute the chain."""
    flat = lambda state: torch.cat([t.flatten(1) for t in state.values()], 1).double()
    start = {name: 0.5 * t for name, t in x.items()}
    small = flat(eager(energy, start, 1, step_size=1.0, noise_scale=0.0)) - flat(start)
    # an untrained network is nearly flat: a step of the size that is timed moves the state by 2e-6
    size = 0.2 / float(small.square().mean().sqrt())
    wanted = flat(eager(energy, start, 2, step_size=size, noise_scale=0.0)) - flat(start)
    scale = float(wanted.square().mean().sqrt())
    assert scale > 0.1, f"the state moves by {scale} only"
    moved = flat(run(energy, start, 2, step_size=size, noise_scale=0.0)) - flat(start)
    error = float((moved - wanted).abs().max()) / scale
    assert error < tolerance, f"a number is off by {error} of what the chain moves"
    # bf16's roundings go both ways: together they make less than a thousandth of the step
    slope = float((moved * wanted).sum() / wanted.square().sum())
    assert abs(slope - 1) < 2e-3, f"the step is {slope} of what it is to be"
    noise = (flat(run(energy, start, 1, step_size=0.0)) - flat(start)) / SETTINGS["noise_scale"]
    limit = 6 * (2 / noise.numel()) ** 0.5
    assert abs(float(noise.var()) - 1) < limit, f"variance {float(noise.var())} of the noise"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_conv_chain(benchmark: Any, measure: Callable[..., None], implementation: str) -> None:
    run, tolerance = IMPLEMENTATIONS[implementation]
    energy, x = problem()
    gate(run, tolerance, energy, x)
    benchmark.group = f"{STEPS} steps, conv energy of five (64, 3, 28, 28), {torch.get_num_threads()} threads"
    benchmark.extra_info.update(implementation=implementation, baseline=implementation == "eager")
    measure(lambda: run(energy, x, STEPS))
