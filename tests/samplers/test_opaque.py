"""Samplers inside torch.compile, with and without a fused chain, and inside torch.func."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmebm
from mmebm.samplers import HMC, MALA, Langevin, ParallelTempering, Underdamped, schedules


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 1))


def quartic(x: Tensor) -> Tensor:
    return x.pow(4).sum(1)


RUNS: dict[str, Callable[[Any, Tensor], Any]] = {
    "langevin": lambda energy, x: mmebm.langevin(energy, x, 3, step_size=0.01, seed=0),
    "Langevin": lambda energy, x: Langevin(0.01).sample(energy, x, 3, seed=0).state,
    "records": lambda energy, x: Langevin(0.01).sample(energy, x, 3, seed=0, thin=1, record=("energy",)).trajectory[-1],
    "loop": lambda energy, x: Langevin(0.01, backend="torch").sample(energy, x, 3, seed=0).state,
    "torch's noise": lambda energy, x: Langevin(0.01, rng="torch").sample(energy, x, 3, seed=0).state,
    "schedule": lambda energy, x: Langevin(schedules.linear(0.1, 0.01, 3)).sample(energy, x, 3, seed=0).state,
    "differentiable": lambda energy, x: Langevin(0.01).sample(energy, x, 2, seed=0, differentiable=True).state,
    "preset": lambda energy, x: mmebm.presets.igebm().sample(energy, x, 3, seed=0).state,
    "MALA": lambda energy, x: MALA(0.01).sample(energy, x, 3, seed=0).state,
    "HMC": lambda energy, x: HMC(0.1, 2).sample(energy, x, 3, seed=0).state,
    "Underdamped": lambda energy, x: Underdamped(0.1).sample(energy, x, 3, seed=0).state,
    "ParallelTempering": lambda energy, x: ParallelTempering(0.05, (1.0, 2.0)).sample(energy, x, 3, seed=0).state,
}
ENERGIES: dict[str, Callable[[], Any]] = {
    "fused": mlp,
    "function": lambda: quartic,
    "compiled": lambda: torch.compile(mlp(), backend="eager"),
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ENERGIES)
@pytest.mark.parametrize("name", RUNS)
def test_compiled_functions_around_samplers(name: str, kind: str) -> None:
    """The compiler leaves the chain alone and compiles what is around it; the sampler may be made inside or outside."""
    energy, x, compiled = ENERGIES[kind](), torch.randn(5, 4), []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    def function(x: Tensor) -> Tensor:
        return RUNS[name](energy, x.exp()).sin()

    wanted = function(x)
    for _ in range(2):
        assert torch.equal(torch.compile(function, backend=backend)(x), wanted)
    assert len(compiled) >= 2, "what is before and after the chain was not compiled"


def test_a_whole_graph_is_refused_by_the_compiler_itself() -> None:
    function = torch.compile(lambda x: Langevin(0.01).sample(quartic, x, 2).state, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="a chain runs as it is"):
        function(torch.randn(3, 4))


def test_a_compiled_energy_stays_compiled_inside() -> None:
    calls: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            calls.append(1)
            return graph.forward(*args)

        return run

    energy = torch.compile(quartic, backend=backend)
    function = torch.compile(lambda x: Langevin(0.01).sample(energy, x + 1, 3).state + 1, backend="eager")
    function(torch.randn(3, 4))
    assert len(calls) >= 3


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "vmap": lambda f, x: torch.func.vmap(f)(x[None]),
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "another's vmap": lambda f, x: torch.func.vmap(lambda y: f(x) + y)(torch.ones(2)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ["langevin", "Langevin", "HMC", "Underdamped", "ParallelTempering"])
def test_function_transforms_are_refused(name: str, transform: str) -> None:
    with pytest.raises(TypeError, match=re.escape("cannot run inside torch.func")):
        TRANSFORMS[transform](lambda x: RUNS[name](quartic, x), torch.randn(3, 4))


@pytest.mark.parametrize("name", ["Langevin", "HMC", "Underdamped", "ParallelTempering"])
def test_an_energy_may_use_function_transforms(name: str) -> None:
    energy = lambda x: torch.func.vmap(lambda row: row.pow(4).sum())(x)
    x = torch.randn(3, 4)
    torch.testing.assert_close(RUNS[name](energy, x), RUNS[name](quartic, x))
