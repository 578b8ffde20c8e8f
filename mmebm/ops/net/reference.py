"""Energy and gradient in x of a net in plain PyTorch: the ground truth, on any dtype and device.

The gradient is autograd's. With ``create_graph`` both are differentiable in x and in the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from mmebm.ops.net import graph
from mmebm.ops.net.graph import Net, pack, shapes_of, tensors_of, unpack

__all__ = ["energy", "energy_and_gradient"]

_FUNCTIONS: Final[dict[str, Callable[..., Tensor]]] = {
    **{
        name: getattr(torch, name) for name in ("relu", "tanh", "sigmoid", "square", "abs", "exp", "sqrt", "reciprocal")
    },
    **{name: getattr(F, name) for name in ("leaky_relu", "silu", "gelu", "softplus", "elu")},
}
_SLOPED: Final = ("leaky_relu", "elu")


def _conv(node: graph.Conv, x: Tensor) -> Tensor:
    names = ("stride", "padding", "dilation", "groups", *(["output_padding"] if node.transposed else []))
    function: Any = F.conv_transpose2d if node.transposed else F.conv2d
    return function(x, node.weight, node.bias, **{name: getattr(node, name) for name in names})


def _gathered(values: list[Tensor], index: Tensor) -> Tensor:
    """(chains, n, k): the elements of ``values`` side by side at ``index``, 0 where it is -1."""
    flat = torch.cat([v.flatten(1) for v in values], dim=1)
    taken = flat[:, index.clamp_min(0)]
    return torch.where(index < 0, torch.zeros((), dtype=flat.dtype, device=flat.device), taken)


def _add(node: graph.Add, values: Mapping[int, Tensor]) -> Tensor:
    total: Any = 0.0 if node.shift is None else node.shift
    for x, c in zip(node.xs, node.coefficients, strict=True):
        total = total + c * values[x]
    return total


def _affine(node: graph.Affine, values: Mapping[int, Tensor]) -> Tensor:
    y = values[node.x] * node.scale
    return y if node.shift is None else y + node.shift


def _map(node: graph.Map, values: Mapping[int, Tensor]) -> Tensor:
    taken = _gathered([values[x] for x in node.xs], node.index)
    return (taken if node.weight is None else taken * node.weight).sum(2)


def _norm(node: graph.Norm, values: Mapping[int, Tensor]) -> Tensor:
    parts = torch.unflatten(values[node.x].flatten(1), 1, (node.groups, -1))
    centred = parts - parts.mean(2, keepdim=True)
    return centred / (centred.square().mean(2, keepdim=True) + node.eps).sqrt()


def _activation(node: graph.Activation, values: Mapping[int, Tensor]) -> Tensor:
    return _FUNCTIONS[node.function](values[node.x], *([node.slope] if node.function in _SLOPED else []))


# The value (chains, elements...) of a node of each kind but the input, up to its shape, from those before it
_VALUES: Final[dict[type[Any], Callable[[Any, Mapping[int, Tensor]], Tensor]]] = {
    graph.View: lambda node, values: values[node.x],
    graph.Conv: lambda node, values: _conv(node, values[node.x]),
    graph.Linear: lambda node, values: F.linear(values[node.x].flatten(1), node.weight, node.bias),
    graph.Activation: _activation,
    graph.Add: _add,
    graph.Affine: _affine,
    graph.Product: lambda node, values: (
        values[node.a] / values[node.b] if node.divide else values[node.a] * values[node.b]
    ),
    graph.Map: _map,
    graph.LogSumExp: lambda node, values: values[node.x].flatten(1)[:, node.index].logsumexp(2),
    graph.Norm: _norm,
}


def values_of(x: Tensor, net: Net) -> list[Tensor]:
    """The value (chains, *shape) of each node."""
    values: dict[int, Tensor] = {}
    for i, (node, shape) in enumerate(zip(net.nodes, shapes_of(net), strict=True)):
        if isinstance(node, graph.Input):
            value = x[:, node.start : node.start + math.prod(shape)]
        elif type(node) in _VALUES:
            value = _VALUES[type(node)](node, values)
        else:
            raise ValueError(f"a net has no {type(node).__name__}")
        values[i] = value.reshape(-1, *shape)
    return list(values.values())


def energy(x: Tensor, net: Net) -> Tensor:
    """E(x), (chains,), differentiable in ``x`` (chains, inputs) and in the tensors of ``net``."""
    return values_of(x, net)[-1].reshape(-1)


def energy_and_gradient(x: Tensor, net: Net, *, create_graph: bool = False) -> tuple[Tensor, Tensor]:
    """E(x), (chains,), and dE/dx, (chains, inputs). Without ``create_graph`` both are free of a graph."""
    with torch.inference_mode(False), torch.enable_grad():
        if any(t.is_inference() for t in (x, *tensors_of(net))):  # autograd does not take them
            description, tensors = pack(net)
            x, net = x.clone(), unpack(description, [t.clone() for t in tensors])
        start = x if create_graph and x.requires_grad else x.detach().requires_grad_()
        value = energy(start, net)
        if not value.requires_grad:
            raise RuntimeError("autograd is off below an op or in a dispatch mode: there is no gradient of a net")
        (grad,) = torch.autograd.grad(value.sum(), start, create_graph=create_graph, allow_unused=True)
    grad = torch.zeros_like(x) if grad is None else grad  # pyright: ignore[reportUnnecessaryComparison]
    return (value, grad) if create_graph else (value.detach(), grad)
