"""Every test of an op has the marker ``cpp``: ``.ci/sanitize`` runs them again with sanitizers, new ops too.

Fixtures: settings (one thread, no choice from outside), cpp (the backend, in them), isa (each of its instruction
sets), use_isa, draw (random terms of the MLP ops), double (the same in float64), margin (the distance to the nearest
kink).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmebm import native
from mmebm.ops.mlp_energy.reference import activate
from mmebm.ops.terms import Quadratic, Residual, Scalar, Stack, Term

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("cpp")


# -- the C++ backend

ISAS = ("baseline", "avx2", "avx512")


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, and nothing is chosen from outside."""
    for name in ("MMEBM_BACKEND", "MMEBM_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    # torch's parallel loops over small tensors take milliseconds each where the cores are busy with something else
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cpp(need: Callable[[str], None], settings: None) -> None:
    """The C++ backend is needed, in these settings."""
    need("cpp")


@pytest.fixture
def use_isa(cpp: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Asks for an instruction set; the test is skipped where the processor has it not."""

    def use(isa: str) -> None:
        if isa.replace("baseline", "generic") not in native.cpu().isas():
            pytest.skip(f"this processor has no {isa}")
        monkeypatch.setenv("MMEBM_CPU_ISA", isa)

    return use


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, use_isa: Callable[[str], None]) -> str:
    use_isa(request.param)
    return request.param


# -- terms of the MLP ops


def _stack(sizes: Sequence[int], generator: torch.Generator, activation: str, slope: float) -> Stack:
    weights = [torch.randn(o, i, generator=generator) / i**0.5 for i, o in pairwise(sizes)]
    biases = [0.3 * torch.randn(o, generator=generator) for o in sizes[1:]]
    return Stack.mlp(tuple(weights), tuple(biases), activation, slope)  # type: ignore[arg-type]


class DrawTerms:
    """Random terms of the MLP ops: all of a chain's activations are of order 1."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def stack(self, *sizes: int, activation: str = "silu", slope: float = 0.3) -> Stack:
        return _stack(sizes, self.generator, activation, slope)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def mask(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator) < 0.6

    def residual(self, chains: int, *sizes: int, activation: str = "silu", mask: int = 0, **options: Any) -> Residual:
        """``mask``: 0 for none, or the rows it has."""
        observed = self.mask(mask, sizes[-1]) if mask else None
        stack = self.stack(*sizes, activation=activation)
        return Residual(stack, self.normal(chains, sizes[-1]), options.pop("scale", 0.8), observed=observed, **options)

    def quadratic(self, inputs: int) -> Quadratic:
        return Quadratic(self.normal(inputs), torch.rand(inputs, generator=self.generator))

    def sum_of_all(self, chains: int, inputs: int, activation: str = "silu") -> list[Term]:
        """Every kind of term and every option of a residual; a kink only where ``activation`` has one, or in |r|."""
        return [
            Scalar(self.stack(inputs, 33, 1, activation=activation), -0.7),
            self.residual(chains, inputs, 24, 17, 5, activation=activation, mask=1, tanh=True, weight=1.5),
            self.quadratic(inputs),
            self.residual(chains, inputs, 9, 65, activation=activation, mask=chains),
            self.residual(chains, inputs, 16, 6, activation=activation, likelihood="laplace", tanh=True),
        ]


@pytest.fixture
def draw(seed: int) -> DrawTerms:
    return DrawTerms(seed)


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(_double(part) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{f.name: _double(getattr(value, f.name)) for f in dataclasses.fields(value)}
        )
    return value


@pytest.fixture
def double() -> Callable[[Any], Any]:
    """Tensors, terms, chains and lists of them, with float64 in the place of float32."""
    return _double


def _margin(x: Tensor, terms: Sequence[Term]) -> Tensor:
    """Per chain, how far the nearest kink (of relu, leaky_relu, elu or |r|) is from the numbers in the forward pass."""
    nearest = x.new_full((x.shape[0],), float("inf"))
    for term in terms:
        if isinstance(term, Quadratic):
            continue
        h, kinked = x, term.stack.activation in ("relu", "leaky_relu", "elu")
        last = len(term.stack.weights) - 1
        for i, (w, b) in enumerate(zip(term.stack.weights, term.stack.biases, strict=True)):
            h = torch.nn.functional.linear(h, w, b)
            if i < last:
                nearest = torch.minimum(nearest, h.abs().amin(1)) if kinked else nearest
                h = activate(h, term.stack.activation, term.stack.slope)[0]
        if isinstance(term, Residual) and term.likelihood == "laplace":
            r = ((torch.tanh(h) if term.tanh else h) - term.target).abs()
            nearest = torch.minimum(nearest, r.amin(1))
    return nearest


@pytest.fixture
def margin() -> Callable[[Tensor, Sequence[Term]], Tensor]:
    return _margin
