"""The gate of every benchmark can fail: a step of one percent too much, or noise of a fifth too much, does not pass."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def refused(gate: Callable[[], Any]) -> None:
    with pytest.raises(AssertionError):
        gate()


@pytest.fixture(autouse=True)
def same_noise(seed: int) -> None:
    torch.manual_seed(seed)


def test_conv_energy() -> None:
    bench = load("bench_conv_energy")
    energy, x = bench.problem(4)
    for name in ("mmebm", "mmebm, bf16 autocast"):
        run, tolerance = bench.IMPLEMENTATIONS[name]
        bench.gate(run, tolerance, energy, x)

        def longer(energy: Any, x: Any, steps: int, run: Any = run, **settings: Any) -> Any:
            return run(energy, x, steps, **{**settings, "step_size": 1.01 * settings["step_size"]})

        def louder(energy: Any, x: Any, steps: int, run: Any = run, **settings: Any) -> Any:
            scale = settings.get("noise_scale", bench.SETTINGS["noise_scale"])
            return run(energy, x, steps, **{**settings, "noise_scale": 1.2 * scale})

        refused(lambda tolerance=tolerance, longer=longer: bench.gate(longer, tolerance, energy, x))
        refused(lambda tolerance=tolerance, louder=louder: bench.gate(louder, tolerance, energy, x))


@pytest.mark.parametrize("number", [0, 1, 3, 4])
def test_langevin_mlp(number: int) -> None:
    bench = load("bench_langevin_mlp")
    w = list(bench.WORKLOADS.values())[number]
    x, terms = bench.problem(w)
    run = bench.eager(w, x, terms)
    bench.gate(w, run, x, terms)
    refused(lambda: bench.gate(w, lambda scale: run(1.2 * scale), x, terms))

    def longer(scale: float) -> torch.Tensor:
        bench.STEP_SIZE *= 1.01
        try:
            return run(scale)
        finally:
            bench.STEP_SIZE /= 1.01

    refused(lambda: bench.gate(w, longer, x, terms))


def test_langevin_step() -> None:
    bench = load("bench_langevin_step")
    for prepare in (bench.eager, bench.with_stepper("torch")):
        bench.gate(prepare)
        refused(lambda p=prepare: bench.gate(lambda x, g, scale: p(x, [1.01 * t for t in g], scale)))
        refused(lambda p=prepare: bench.gate(lambda x, g, scale: p(x, g, 1.2 * scale)))
        # of one update too many
        refused(lambda p=prepare: bench.gate(lambda x, g, scale: twice(p(x, g, scale))))


def twice(update: Callable[[int], Any]) -> Callable[[int], Any]:
    def run(step: int) -> None:
        update(step)
        update(step + 1)

    return run


def test_options() -> None:
    bench = load("bench_langevin_step")
    options = bench.op.StepOptions(seed=1, streams=(0,), noisy=(True,))
    for name in bench.OPTIONS:

        def step(x: Any, g: Any, params: Any, factor: float = 1.0, name: str = name) -> Any:
            before = x.clone()
            bench.eager_option(name, x, g, 0.0)
            return before + factor * (x - before)

        bench.gate_option(name, step, options, 0.0)
        refused(lambda n=name, s=step: bench.gate_option(n, lambda *a: s(*a, factor=1.01), options, 0.0))
        # without the option
        plain = lambda x, g, p: step(x, g, p, name="")
        if name not in ("statistics", "step size per chain"):  # which change nothing here
            refused(lambda n=name, s=plain: bench.gate_option(n, s, options, 0.0))


def test_chains() -> None:
    bench = load("bench_langevin_step")
    scale = bench.NOISE_SCALE
    for size in bench.CHAINS.values():
        bench.gate_chain(bench.eager_chain, *size)
        louder = lambda energy, x, steps, s=scale: bench.eager_chain(energy, x, steps, 1.2 * s)
        longer = lambda energy, x, steps, s=scale: bench.eager_chain(lambda y: 1.01 * energy(y), x, steps, s)
        refused(lambda z=size, run=louder: bench.gate_chain(run, *z))
        refused(lambda z=size, run=longer: bench.gate_chain(run, *z))
    x = torch.randn(*bench.FULL[:2])
    full = lambda factor=1.0, louder=1.0: bench.gate_full_step(
        lambda: bench.eager_chain(lambda y: factor * bench.quadratic(y), x, bench.FULL[2], louder * scale), x
    )
    full()
    refused(lambda: full(factor=1.01))
    refused(lambda: full(louder=1.2))


def test_residual() -> None:
    bench = load("bench_residual")
    for work in bench.WORKLOADS.values():
        bench.gate(bench.eager, work)

        def steeper(*args: Any) -> Any:
            value, grads = bench.eager(*args)
            return value, [1.01 * g for g in grads]

        def higher(*args: Any) -> Any:
            value, grads = bench.eager(*args)
            return 1.01 * value, grads

        refused(lambda w=work, f=steeper: bench.gate(f, w))
        refused(lambda w=work, f=higher: bench.gate(f, w))


@pytest.mark.slow
def test_training_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load("bench_training_iteration")
    device = torch.device("cpu")
    bench.gate("demo", device)
    init = bench.HandWritten.__init__

    def longer(self: Any, *args: Any) -> None:
        init(self, *args)
        self.step_size *= 1.01

    monkeypatch.setattr(bench.HandWritten, "__init__", longer)
    refused(lambda: bench.gate("demo", device))
