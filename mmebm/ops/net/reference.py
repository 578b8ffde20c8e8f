"""Energy and gradient in x of a net in plain PyTorch: the ground truth, on any dtype and device.

The gradient is autograd's. With ``create_graph`` both are differentiable in x and in the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

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
    shapes_of,
    tensors_of,
    unpack,
)  # fmt: skip

__all__ = ["energy", "energy_and_gradient"]

_FUNCTIONS: Final[dict[str, Callable[[Tensor, float], Tensor]]] = {
    "relu": lambda x, _: F.relu(x), "leaky_relu": F.leaky_relu, "silu": lambda x, _: F.silu(x),
    "gelu": lambda x, _: F.gelu(x), "softplus": lambda x, _: F.softplus(x), "tanh": lambda x, _: torch.tanh(x),
    "elu": F.elu, "sigmoid": lambda x, _: torch.sigmoid(x), "square": lambda x, _: x.square(),
    "abs": lambda x, _: x.abs(), "exp": lambda x, _: x.exp(), "sqrt": lambda x, _: x.sqrt(),
    "reciprocal": lambda x, _: x.reciprocal(),
}  # fmt: skip


def _conv(node: Conv, x: Tensor) -> Tensor:
    options: dict[str, Any] = {
        "stride": node.stride, "padding": node.padding, "dilation": node.dilation, "groups": node.groups
    }  # fmt: skip
    if node.transposed:
        return F.conv_transpose2d(x, node.weight, node.bias, output_padding=node.output_padding, **options)
    return F.conv2d(x, node.weight, node.bias, **options)


def _gathered(values: list[Tensor], index: Tensor) -> Tensor:
    """(chains, n, k): the elements of ``values`` side by side at ``index``, 0 where it is -1."""
    flat = torch.cat([v.flatten(1) for v in values], dim=1)
    taken = flat[:, index.clamp_min(0)]
    return torch.where(index < 0, torch.zeros((), dtype=flat.dtype, device=flat.device), taken)


def _forward(node: Any, values: list[Tensor], state: Tensor) -> Tensor:
    """The value (chains, elements...) of a node, up to its shape."""
    if isinstance(node, Input):
        size = torch.Size(node.shape).numel()
        return state[:, node.start : node.start + size]
    if isinstance(node, View):
        return values[node.x]
    if isinstance(node, Conv):
        return _conv(node, values[node.x])
    if isinstance(node, Linear):
        return F.linear(values[node.x].flatten(1), node.weight, node.bias)
    if isinstance(node, Activation):
        return _FUNCTIONS[node.function](values[node.x], node.slope)
    if isinstance(node, Add):
        total: Any = 0.0 if node.shift is None else node.shift
        for x, c in zip(node.xs, node.coefficients, strict=True):
            total = total + c * values[x]
        return total
    if isinstance(node, Affine):
        y = values[node.x] * node.scale
        return y if node.shift is None else y + node.shift
    if isinstance(node, Product):
        return values[node.a] * values[node.b]
    if isinstance(node, Map):
        taken = _gathered([values[x] for x in node.xs], node.index)
        return (taken if node.weight is None else taken * node.weight).sum(2)
    if isinstance(node, LogSumExp):
        return values[node.x].flatten(1)[:, node.index].logsumexp(2)
    if isinstance(node, Norm):
        parts = values[node.x].flatten(1).unflatten(1, (node.groups, -1))
        centred = parts - parts.mean(2, keepdim=True)
        return centred / (centred.square().mean(2, keepdim=True) + node.eps).sqrt()
    raise ValueError(f"a net has no {type(node).__name__}")


def energy(x: Tensor, net: Net) -> Tensor:
    """E(x), (chains,), differentiable in ``x`` (chains, inputs) and in the tensors of ``net``."""
    values: list[Tensor] = []
    for node, shape in zip(net.nodes, shapes_of(net), strict=True):
        values.append(_forward(node, values, x).reshape(-1, *shape))
    return values[-1].reshape(-1)


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
    grad = torch.zeros_like(x) if grad is None else grad
    return (value, grad) if create_graph else (value.detach(), grad)
