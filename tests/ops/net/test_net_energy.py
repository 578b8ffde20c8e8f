"""Nets written by hand, and the op ``net_energy``: values, first and second derivatives, errors, torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmebm.native import BackendError
from mmebm.ops.net.graph import (
    Activation,
    Add,
    Affine,
    Conv,
    Input,
    Linear,
    LogSumExp,
    Map,
    Net,
    Norm,
    Product,
    View,
    pack,
    unpack,
)
from mmebm.ops.net.op import net_energy

CHAINS = 5


class Weights:
    """The tensors of :func:`net` and :func:`energy`."""

    kernel: Tensor
    bias: Tensor
    up: Tensor
    matrix: Tensor
    shift: Tensor
    scale: Tensor
    other: Tensor

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        g = torch.Generator().manual_seed(seed)
        shapes = {
            "kernel": (4, 2, 3, 3),
            "bias": (4,),
            "up": (4, 3, 4, 4),
            "matrix": (6, 126),
            "shift": (CHAINS, 6),
            "scale": (1, 6),
            "other": (6, 6),
        }
        drawn = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
        for name, t in drawn.items():
            setattr(self, name, (t / (8 if name == "matrix" else 3)).to(dtype))
        self.x = torch.randn(CHAINS, 40, generator=g, dtype=torch.float64).to(dtype)
        self.all = [getattr(self, name) for name in shapes]


def net(w: Any) -> Net:
    """Every kind of node."""
    return Net(
        (
            Input(0, (2, 5, 4)),
            Conv(0, w.kernel, w.bias, stride=(2, 2), padding=(1, 1)),  # (4, 3, 2)
            Norm(1, 2, 1e-5),
            Activation(2, "silu"),
            Conv(3, w.up, None, stride=(2, 2), transposed=True),  # (3, 8, 6)
            Map((4,), (3, 7, 6), torch.arange(144).reshape(3, 8, 6)[:, 1:].reshape(-1, 1)),
            Activation(5, "tanh"),
            Linear(6, w.matrix),
            Affine(7, w.scale),
            Add((8,), (1.0,), -w.shift),
            Product(9, 7),
            Activation(7, "square"),
            Add((11,), (1.0,), torch.ones_like(w.scale)),
            Product(10, 12, divide=True),
            View(13, (2, 3)),
            LogSumExp(14, (2,), torch.arange(6).reshape(2, 3)),
            Linear(13, w.other),
            Activation(16, "square"),
            Map(
                (15, 17), (1,), torch.arange(8).reshape(1, 8), torch.linspace(0.5, 1, 8, dtype=w.x.dtype).reshape(1, 8)
            ),
        )
    )


def energy(w: Any, x: Tensor) -> Tensor:
    """The same in functions of torch."""
    h = F.conv2d(x.reshape(-1, 2, 5, 4), w.kernel, w.bias, stride=2, padding=1)
    h = F.silu(F.group_norm(h, 2))
    h = torch.tanh(F.conv_transpose2d(h, w.up, stride=2)[:, :, 1:])
    a = F.linear(h.flatten(1), w.matrix)
    b = (a * w.scale - w.shift) * a / (a.square() + 1)
    parts = torch.cat([b.reshape(-1, 2, 3).logsumexp(2), F.linear(b, w.other).square()], 1)
    return (parts * torch.linspace(0.5, 1, 8, dtype=x.dtype)).sum(1)


def test_the_reference_is_the_definition(seed: int) -> None:
    w = Weights(seed, torch.float64)
    x = w.x.clone().requires_grad_()
    value = energy(w, x)
    (grad,) = torch.autograd.grad(value.sum(), x)
    ours, ours_grad = net_energy(w.x, net(w), backend="torch")
    torch.testing.assert_close(ours, value.detach(), rtol=1e-11, atol=1e-11)  # float64, sums in another order
    torch.testing.assert_close(ours_grad, grad, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("backend", ("torch", "cpp"))
def test_float32(need: Callable[[str], None], seed: int, backend: str) -> None:
    if backend == "cpp":
        need("cpp")
    exact, single = Weights(seed, torch.float64), Weights(seed, torch.float32)
    wanted = net_energy(exact.x, net(exact), backend="torch")
    for got, want in zip(net_energy(single.x, net(single), backend=backend), wanted, strict=True):
        # a dozen roundings of 2^-24 through layers that may double them
        assert float((got.double() - want).abs().max()) <= 2e-5 * float(want.abs().max())


@pytest.mark.parametrize("backend", ("torch", "cpp"))
def test_derivatives_in_the_weights(need: Callable[[str], None], seed: int, backend: str) -> None:
    """Of a loss of energy and gradient, as score matching has it, against autograd through the functions."""
    if backend == "cpp":
        need("cpp")
    dtype, tolerance = (torch.float64, 1e-9) if backend == "torch" else (torch.float32, 2e-4)
    results = []
    for ours in (True, False):
        w = Weights(seed, dtype if ours else torch.float64)
        leaves = [w.x, *w.all]
        for t in leaves:
            t.requires_grad_()
        if ours:
            value, grad = net_energy(w.x, net(w), backend=backend)
        else:
            value = energy(w, w.x)
            (grad,) = torch.autograd.grad(value.sum(), w.x, create_graph=True)
        results.append(torch.autograd.grad((0.3 * value + grad.square().sum(1)).sum(), leaves))
    for one, two in zip(*results, strict=True):
        assert float((one.double() - two).abs().max()) <= tolerance * max(1.0, float(two.abs().max()))


def test_pack_and_compile(need: Callable[[str], None], seed: int) -> None:
    need("cpp")
    w = Weights(seed, torch.float32)
    description, tensors = pack(net(w))
    again = unpack(description, tensors)
    assert pack(again)[0] == description and all(a is b for a, b in zip(pack(again)[1], tensors, strict=True))
    torch.library.opcheck(torch.ops.mmebm.net_energy, (w.x, tensors, description, "auto"))


def test_errors(seed: int) -> None:
    w = Weights(seed, torch.float32)
    good = net(w)

    def bad(i: int, **changes: Any) -> Net:
        return Net(tuple(replace(n, **changes) if j == i else n for j, n in enumerate(good.nodes)))

    cases = {
        r"nodes\[0\] \(Input\).*40 inputs": bad(0, start=1),
        r"nodes\[1\] \(Conv\).*groups": bad(1, groups=2),
        r"nodes\[1\] \(Conv\).*bias": bad(1, bias=w.scale),
        r"nodes\[1\] \(Conv\).*no output": bad(1, padding=(0, 0), dilation=(3, 3)),
        r"nodes\[2\] \(Norm\).*equal groups": bad(2, groups=5),
        r"nodes\[3\] \(Activation\).*'sine'": bad(3, function="sine"),
        r"nodes\[3\] \(Activation\).*earlier": bad(3, x=3),
        r"nodes\[5\] \(Map\).*\[-1, 144\)": bad(5, index=torch.full((126, 1), 144)),
        r"nodes\[5\] \(Map\).*int64": bad(5, index=torch.zeros(125, 1, dtype=torch.int64)),
        r"nodes\[7\] \(Linear\).*126": bad(7, weight=w.other),
        r"nodes\[9\] \(Add\).*shift": bad(9, shift=w.shift[:3]),
        r"nodes\[14\] \(View\)": bad(14, shape=(2, 4)),
        "last node": Net(good.nodes[:-1]),
    }
    for message, net_ in cases.items():
        with pytest.raises(ValueError, match=message):
            net_energy(w.x, net_)
    with pytest.raises(TypeError, match="net must be"):
        net_energy(w.x, good.nodes)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"nodes\[0\]"):
        net_energy(w.x, Net((w.x,)))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"a tensor of the net must be torch.float64 as x is, got torch.float32"):
        net_energy(w.x.double(), good)
    with pytest.raises(TypeError, match="no forward mode"):
        torch.func.jvp(lambda x: net_energy(x, good)[0], (w.x,), (w.x,))
    with pytest.raises(TypeError, match="x must be"):
        net_energy(w.x[0], good)
    with pytest.raises(BackendError, match="not built for cuda"):
        net_energy(w.x, good, backend="cuda")
    with pytest.raises(ValueError, match="backend must be"):
        net_energy(w.x, good, backend="numpy")
