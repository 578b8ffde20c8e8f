"""The likelihood residual of a posterior chain, value and gradient in the predictions, against autograd of the terms.

    python -m pytest benchmarks/bench_residual.py --benchmark-only

Every implementation first has to give the value and the gradients of the terms in float64. See benchmarks/README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmebm import native
from mmebm.ops import residual as op

SIGMA, WEIGHT = 0.5, 2.0
Measure = Callable[..., None]
Out = tuple[Tensor, Sequence[Tensor]]


@dataclass(frozen=True)
class Workload:
    """(chains, ...) of the predictions, their likelihood, and whether half of the elements count."""

    shapes: list[tuple[int, ...]]
    likelihood: str
    masked: bool = False


WORKLOADS = {
    "5 modalities (64, 3, 28, 28), gaussian": Workload([(64, 3, 28, 28)] * 5, "gaussian"),
    "5 modalities (64, 3, 28, 28), laplace, masked": Workload([(64, 3, 28, 28)] * 5, "laplace", True),
    "digits (64, 784), (64, 64), gaussian": Workload([(64, 784), (64, 64)], "gaussian"),
    "words (64, 71, 32), categorical": Workload([(64, 71, 32)], "categorical"),
    "labels (64, 10), categorical": Workload([(64, 10)], "categorical"),
}


def tensors(work: Workload) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
    generator = torch.Generator().manual_seed(0)
    ys = [torch.randn(shape, generator=generator) for shape in work.shapes]
    if work.likelihood == "categorical":
        ts = [torch.randint(0, s[1], s[:1] + s[2:], generator=generator) for s in work.shapes]
    else:
        ts = [torch.randn(shape, generator=generator) for shape in work.shapes]
    return ys, ts, [torch.rand(t.shape, generator=generator) < 0.5 if work.masked else None for t in ts]


def eager(work: Workload, ys: Sequence[Tensor], ts: Sequence[Tensor], masks: Sequence[Tensor | None]) -> Out:
    """The terms as people write them, and autograd."""
    ys = [y.detach().requires_grad_() for y in ys]
    total = torch.zeros(ys[0].shape[0], dtype=ys[0].dtype)
    for y, t, mask in zip(ys, ts, masks, strict=True):
        if work.likelihood == "categorical":
            each = F.cross_entropy(y, t, reduction="none")
        elif work.likelihood == "gaussian":
            each = (t - y).square() / (2 * SIGMA**2)
        else:
            each = (t - y).abs() / SIGMA
        if mask is not None:
            each = each * mask
        total = total + WEIGHT * each.reshape(each.shape[0], -1).sum(1)
    return total.detach(), torch.autograd.grad(total.sum(), ys)


def fused(backend: str) -> Callable[..., Out]:
    def run(work: Workload, ys: Sequence[Tensor], ts: Sequence[Tensor], masks: Sequence[Tensor | None]) -> Out:
        return op.residual_and_gradient(
            ys, ts, likelihood=work.likelihood, scale=SIGMA, weight=WEIGHT, observed=masks, backend=backend
        )

    return run


def differentiated(work: Workload, ys: Sequence[Tensor], ts: Sequence[Tensor], masks: Sequence[Tensor | None]) -> Out:
    """The differentiable value and one backward pass, as a decoder's chain calls it."""
    ys = [y.detach().requires_grad_() for y in ys]
    total = op.residual(ys, ts, likelihood=work.likelihood, scale=SIGMA, weight=WEIGHT, observed=masks, backend="cpp")
    return total.detach(), torch.autograd.grad(total.sum(), ys)


IMPLEMENTATIONS: dict[str, Callable[..., Out]] = {
    "eager autograd": eager,
    "mmebm torch": fused("torch"),
    "mmebm cpp": fused("cpp"),
    "mmebm cpp, through autograd": differentiated,
}
COPY = "copy of as many bytes"


def gate(function: Callable[..., Out], work: Workload) -> None:
    """Nothing is timed that does not compute value and gradients."""
    ys, ts, masks = tensors(work)
    value, grads = function(work, ys, ts, masks)
    exact, slopes = eager(work, [y.double() for y in ys], ts, masks)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)
    for g, slope in zip(grads, slopes, strict=True):
        torch.testing.assert_close(g.double(), slope, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", (*IMPLEMENTATIONS, COPY))
@pytest.mark.parametrize("workload", WORKLOADS)
def test_residual(benchmark: Any, measure: Measure, workload: str, implementation: str) -> None:
    work = WORKLOADS[workload]
    ys, ts, masks = tensors(work)
    elements = sum(y.numel() for y in ys)
    # predictions and targets in, gradients out
    moved = 2 * sum(y.nbytes for y in ys) + sum(t.nbytes for t in (*ts, *masks) if t is not None)
    benchmark.group = f"residual, {workload}, {torch.get_num_threads()} threads"
    benchmark.extra_info.update(implementation=implementation, bytes=moved)
    if implementation == COPY:
        benchmark.extra_info["roof"] = True
        source = torch.ones(moved // 2, dtype=torch.uint8)
        target = source.clone()
        run: Callable[[], object] = lambda: target.copy_(source)
    else:
        if "cpp" in implementation and not native.available("cpp")[0]:
            pytest.skip(native.available("cpp")[1])
        benchmark.extra_info.update(elements=elements, baseline=implementation == "eager autograd")
        function = IMPLEMENTATIONS[implementation]
        gate(function, work)
        run = lambda: function(work, ys, ts, masks)
    bunch = max(1, 200_000 // elements)

    def bunched() -> None:
        for _ in range(bunch):
            run()

    measure(bunched, bunch)
