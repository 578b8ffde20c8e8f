"""The net ops in C++: :file:`csrc/net`.

The instruction set is the best this processor has; ``MMEBM_CPU_ISA`` = ``baseline``, ``avx2`` or ``avx512`` asks for
another. No result depends on the number of threads (``torch.get_num_threads()``) or on how a batch is split, and
``avx2`` and ``avx512`` agree bit for bit. Weights are read, and repacked, at each call. Up to W chains, 8 or 16, share
the lanes of a vector, so that fewer cost as much as W, and a thread runs at least one such tile.

Convolutions of 3 x 3 and stride 1 with enough channels take Winograd's form, with 16 products in the place of 36 and
other roundings; under ``torch.use_deterministic_algorithms`` all are summed product by product.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor

from mmebm import native
from mmebm.ops import dispatch
from mmebm.ops.common.address import Addresses
from mmebm.ops.langevin_mlp import MlpResult
from mmebm.ops.langevin_mlp.cpp import call_chain, call_energy, plain_on_cpu, supports_options
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
    check_net,
    reads,
    shapes_of,
    tensors_of,
)
from mmebm.ops.net.op import NetChain

__all__ = ["energy_and_gradient", "run", "supports", "supports_energy"]

# The kinds and functions that are built, in the order of csrc/net/net.h and csrc/common/activation.h
_KINDS: Final = (Input, View, Conv, Linear, Activation, Add, Affine, Product, Map, Norm, LogSumExp)
_FUNCTIONS: Final = (
    *("relu", "leaky_relu", "silu", "gelu", "softplus", "tanh", "elu"),
    *("sigmoid", "square", "abs", "exp", "sqrt", "reciprocal"),
)
# Numbers of one chain that all nodes hold together: three buffers of 16 lanes of them are 768 MiB a thread.
_ELEMENTS: Final = 1 << 22


def supports_energy(net: Net, x: Tensor) -> str | None:
    """Whether :func:`energy_and_gradient` takes ``net`` at the flat state ``x``: ``None``, or the reason why not."""
    reason = plain_on_cpu("the state", x)
    if reason is not None:
        return reason
    if x.dim() != 2 or x.dtype != torch.float32 or x.shape[1] == 0:
        return f"the state is {x.dtype} of shape {tuple(x.shape)}, taken is float32 (chains, inputs)"
    for t in tensors_of(net):
        reason = reason or plain_on_cpu("a tensor of the net", t)
        if t.dtype not in (torch.float32, torch.int64):
            return f"a tensor of the net is {t.dtype}, taken is float32"
    if reason is not None:
        return reason
    for node in net.nodes:
        if not isinstance(node, _KINDS):
            return f"{type(node).__name__} is not built"
        if isinstance(node, Activation) and node.function not in _FUNCTIONS:
            return f"the function {node.function} is not built"
    spans = sorted((n.start, n.start + math.prod(n.shape)) for n in net.nodes if isinstance(n, Input))
    if any(one[1] > two[0] for one, two in pairwise(spans)):
        return "inputs of the net overlap"
    elements = sum(math.prod(shape) for shape in shapes_of(net))
    if elements > _ELEMENTS:
        return f"the net has {elements} numbers a chain, taken are up to {_ELEMENTS}"
    available, reason = native.available("cpp")
    return None if available else reason


def supports(chain: NetChain, x: Tensor) -> str | None:
    """Whether :func:`run` takes ``chain`` from the flat state ``x``: ``None``, or the reason why not."""
    return supports_energy(chain.net, x) or supports_options(chain, x)


def note(chain: NetChain, x: Tensor) -> str | None:
    """What to know of a chain that :func:`run` takes, or ``None``."""
    lanes = 4 if dispatch.isa() == "baseline" else 8
    tiles, threads = -(-x.shape[0] // lanes), torch.get_num_threads()
    if tiles >= threads:
        return None
    return f"{x.shape[0]} chains keep {tiles} of {threads} threads busy, {lanes} chains each"


def _image(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """A shape as (channels, height, width) with the same row-major order."""
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    return (shape[0], 1, shape[1]) if len(shape) == 2 else (math.prod(shape), 1, 1)


def _described(net: Net, x: Tensor, addresses: Addresses) -> list[dict[str, Any]]:
    """The nodes as ``mmebm._cpu`` takes them."""

    def address(t: Tensor | None, dtype: torch.dtype = torch.float32) -> int:
        return addresses("a tensor of the net", t, dtype)

    out, tiles = [], not torch.are_deterministic_algorithms_enabled()
    for node, shape in zip(net.nodes, check_net(net, x.shape[0], x.shape[1], x.device), strict=True):
        d: dict[str, Any] = {"kind": _KINDS.index(type(node)), "xs": reads(node), "shape": _image(shape)}
        if isinstance(node, Input):
            d["start"] = node.start
        elif isinstance(node, (Conv, Linear)):
            d.update(weight=address(node.weight), bias=address(node.bias))
            if isinstance(node, Conv):
                d.update(
                    sizes=tuple(node.weight.shape),
                    stride=node.stride,
                    padding=node.padding,
                    dilation=node.dilation,
                    groups=node.groups,
                    transposed=node.transposed,
                    tiles=tiles,
                )
        elif isinstance(node, Activation):
            d.update(function=_FUNCTIONS.index(node.function), slope=float(node.slope))
        elif isinstance(node, (Add, Affine)):
            if isinstance(node, Add):
                d["coefficients"] = tuple(map(float, node.coefficients))
            else:
                d.update(scale=address(node.scale), scale_per_chain=node.scale.shape[0] > 1)
            d.update(shift=address(node.shift), shift_per_chain=node.shift is not None and node.shift.shape[0] > 1)
        elif isinstance(node, (Map, LogSumExp)):
            weight = node.weight if isinstance(node, Map) else None
            d.update(index=address(node.index, torch.int64), index_weight=address(weight), terms=node.index.shape[1])
        elif isinstance(node, Norm):
            d.update(groups=node.groups, eps=float(node.eps))
        out.append(d)
    return out


def energy_and_gradient(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    """E (chains,) and dE/dx (chains, inputs); see :func:`supports_energy`."""
    described = lambda addresses: _described(net, x, addresses)
    return call_energy("net_energy", x, described, supports_energy(net, x))


def run(
    chain: NetChain, x: Tensor, steps: int, first_step: int | Tensor, *, energy: bool = False, grad_norm: bool = False
) -> MlpResult:
    """``steps`` steps from the flat state ``x``, which stays as it is; see :func:`supports`."""
    return call_chain(
        "langevin_net",
        chain,
        x,
        lambda addresses: _described(chain.net, x, addresses),
        steps,
        first_step,
        energy=energy,
        grad_norm=grad_norm,
        reason=supports(chain, x),
    )
