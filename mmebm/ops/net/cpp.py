"""The net ops in C++: :file:`csrc/net`.

The instruction set is the best this processor has; ``MMEBM_CPU_ISA`` = ``baseline``, ``avx2`` or ``avx512`` asks for
another. No result depends on the number of threads (``torch.get_num_threads()``) or on how a batch is split, and
``avx2`` and ``avx512`` agree bit for bit. Weights are read, and repacked, at each call. Up to W chains, 8 or 16, share
the lanes of a vector, so that fewer cost as much as W, and a thread runs at least one such tile.

Convolutions of 3 x 3 and stride 1 or 4 x 4 and stride 2, say, and their gradients take Winograd's tiles where there are
channels enough, with 16 products in the place of 36 and other roundings; under
``torch.use_deterministic_algorithms`` all are summed product by product.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from mmebm import native
from mmebm.ops import dispatch
from mmebm.ops.common.address import Addresses
from mmebm.ops.langevin_mlp import MlpResult
from mmebm.ops.langevin_mlp.cpp import Described, call_chain, call_energy, plain_on_cpu, supports_options
from mmebm.ops.net import graph
from mmebm.ops.net.graph import Net, check_net, reads, shapes_of, tensors_of
from mmebm.ops.net.op import NetChain

__all__ = ["energy_and_gradient", "run", "supports", "supports_energy"]

# The functions that are built, in the order of csrc/common/activation.h
_FUNCTIONS: Final = (
    *("relu", "leaky_relu", "silu", "gelu", "softplus", "tanh", "elu"),
    *("sigmoid", "square", "abs", "exp", "sqrt", "reciprocal"),
)
# Of the machine's memory that a chain's buffers may take: the user's own tensors and network lie there too.
_SHARE: Final = 0.25


def _machine() -> int:
    """Bytes of memory that this machine has; 8 GiB where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 8 << 30


def _buffers(net: Net, chains: int) -> int:
    """About how many bytes hold a value, a slope and a gradient of each element, for the chains that run at a time."""
    lanes = 16 if dispatch.isa() in ("auto", "avx512") and "avx512" in native.cpu().isas() else 8
    tiles = min(torch.get_num_threads(), -(-chains // lanes))
    return 3 * 4 * lanes * tiles * sum(math.prod(shape) for shape in shapes_of(net))


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
        if type(node) not in _KINDS:
            return f"{type(node).__name__} is not built"
        if isinstance(node, graph.Activation) and node.function not in _FUNCTIONS:
            return f"the function {node.function} is not built"
    spans = sorted((n.start, n.start + math.prod(n.shape)) for n in net.nodes if isinstance(n, graph.Input))
    if any(one[1] > two[0] for one, two in pairwise(spans)):
        return "inputs of the net overlap"
    available, reason = native.available("cpp")
    if not available:
        return reason
    needed, there = _buffers(net, x.shape[0]), _machine()
    if needed > _SHARE * there:
        return (
            f"the net takes up to {needed / 2**30:.3g} GiB of buffers on {torch.get_num_threads()} threads, taken is "
            f"{_SHARE:.0%} of the {there / 2**30:.3g} GiB of this machine: fewer threads need less"
        )
    return None


def supports(chain: NetChain, x: Tensor) -> str | None:
    """Whether :func:`run` takes ``chain`` from the flat state ``x``: ``None``, or the reason why not."""
    return supports_energy(chain.net, x) or supports_options(chain, x)


def _image(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """A shape as (channels, height, width) with the same row-major order."""
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    return (shape[0], 1, shape[1]) if len(shape) == 2 else (math.prod(shape), 1, 1)


# What a node's address of a tensor is made by
_At: TypeAlias = "Callable[[Tensor | None, torch.dtype], int]"


def _product(node: Any, at: _At) -> dict[str, Any]:
    return {"weight": at(node.weight, torch.float32), "bias": at(node.bias, torch.float32)}


def _conv(node: graph.Conv, at: _At) -> dict[str, Any]:
    same = ("stride", "padding", "dilation", "groups", "transposed")
    tiles = not torch.are_deterministic_algorithms_enabled()
    fields = {name: getattr(node, name) for name in same}
    return {**_product(node, at), **fields, "sizes": tuple(node.weight.shape), "tiles": tiles}


def _rows(name: str, t: Tensor | None, at: _At) -> dict[str, Any]:
    """A constant of one row for all chains, or of one for each."""
    return {name: at(t, torch.float32), f"{name}_per_chain": t is not None and t.shape[0] > 1}


def _list(node: graph.Map | graph.LogSumExp, at: _At) -> dict[str, Any]:
    weight = node.weight if isinstance(node, graph.Map) else None
    places = {"index": at(node.index, torch.int64), "index_weight": at(weight, torch.float32)}
    return {**places, "terms": node.index.shape[1]}


# The kinds that are built, each with its fields beside those of all (csrc/net/bind.h); what is not here is refused.
_KINDS: Final[dict[type, Callable[[Any, _At], dict[str, Any]]]] = {
    graph.Input: lambda node, at: {"start": node.start},
    graph.View: lambda node, at: {},
    graph.Conv: _conv,
    graph.Linear: _product,
    graph.Activation: lambda node, at: {"function": _FUNCTIONS.index(node.function), "slope": float(node.slope)},
    graph.Add: lambda node, at: {
        "coefficients": tuple(map(float, node.coefficients)),
        **_rows("shift", node.shift, at),
    },
    graph.Affine: lambda node, at: {**_rows("scale", node.scale, at), **_rows("shift", node.shift, at)},
    graph.Product: lambda node, at: {"divide": node.divide},
    graph.Map: _list,
    graph.Norm: lambda node, at: {"groups": node.groups, "eps": float(node.eps)},
    graph.LogSumExp: _list,
}


def _described(net: Net, addresses: Addresses) -> list[dict[str, Any]]:
    """The nodes as ``mmebm._cpu`` takes them."""
    at: _At = lambda t, dtype: addresses("a tensor of the net", t, dtype)
    return [
        {"kind": type(node).__name__.lower(), "xs": reads(node), "shape": _image(shape), **_KINDS[type(node)](node, at)}
        for node, shape in zip(net.nodes, shapes_of(net), strict=True)
    ]


def energy_and_gradient(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    """E (chains,) and dE/dx (chains, inputs); see :func:`supports_energy`."""
    reason = supports_energy(net, x)
    if reason is None:
        check_net(net, x.shape[0], x.shape[1], x.device)
    return call_energy("net_energy", x, lambda addresses: _described(net, addresses), reason)


def run(
    chain: NetChain, x: Tensor, steps: int, first_step: int | Tensor, *, energy: bool = False, grad_norm: bool = False
) -> MlpResult:
    """``steps`` steps from the flat state ``x``, which stays as it is; see :func:`supports`."""
    reason = None
    if not chain.checked:
        reason = supports(chain, x)
        if reason is None:
            check_net(chain.net, x.shape[0], x.shape[1], x.device)
    described: Described = lambda addresses: _described(chain.net, addresses)
    records = {"energy": energy, "grad_norm": grad_norm}
    return call_chain("langevin_net", chain, x, described, steps, first_step, **records, reason=reason)
