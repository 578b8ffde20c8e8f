"""Turns an energy into a :class:`~mmebm.ops.net.graph.Net` by watching one call of it.

The energy is called once, without autograd, at the state itself, and every tensor operation that reads something of
the state is written down as nodes. What does not read the state (weights under spectral or weight norm, masks, a time
embedding, a posterior's data) is simply computed, so that nothing is stale: a net holds the values of this call. An
operation without a rule ends the attempt with its name, and so does one that would change a tensor that was there
before the call, draws random numbers, or brings a value of the state to Python.

Rules are for the operations that are left when torch has taken layers and functions apart, whatever module, function
or script they came from. To add one: a function in ``_RULES`` that adds nodes.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmebm.energies.lower import CannotLower, effects, inert, symbol
from mmebm.energies.lower.symbol import Attempt
from mmebm.ops.net import graph
from mmebm.ops.net.graph import Net
from mmebm.state import flatten

__all__ = ["Traced", "trace"]

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Traced:
    """As :class:`~mmebm.energies.lower.Lowered`, with a ``net`` in the place of terms."""

    net: Net
    scalar: bool
    seen: tuple[Any, ...] = ()


def _refuse(what: str) -> NoReturn:
    raise CannotLower(what)


@dataclass(frozen=True)
class _Value:
    """What a tensor stands for: a node; ``total`` where it is the node's sum over the chains."""

    tensor: Tensor  # kept, so that its id stays its own
    node: int
    total: bool = False


class _Recorder:
    """The nodes so far, and which tensor is which."""

    def __init__(self, chains: int) -> None:
        self.chains = chains
        self.nodes: list[graph.Node] = []
        self.shapes: list[tuple[int, ...]] = []
        self.values: dict[int, _Value] = {}
        self.refusals: list[str] = []

    def add(self, node: graph.Node) -> int:
        self.nodes.append(node)
        self.shapes.append(graph.shape_of(node, self.shapes))
        return len(self.nodes) - 1

    def value(self, t: Any) -> _Value | None:
        return self.values.get(id(t)) if isinstance(t, Tensor) else None

    def keep(self, t: Tensor, node: int, total: bool = False) -> None:
        if not total:
            shape = tuple(t.shape[1:])
            if not t.dim() or t.shape[0] != self.chains or math.prod(shape) != math.prod(self.shapes[node]):
                _refuse(f"a result of shape {tuple(t.shape)} is not one per chain ({self.chains} chains)")
            if (shape or (1,)) != self.shapes[node]:
                node = self.add(graph.View(node, shape or (1,)))
        self.values[id(t)] = _Value(t, node, total)

    # -- parts of rules

    def node(self, t: Tensor) -> int:
        """The node of a tensor that has one per chain."""
        value = self.value(t)
        if value is None or value.total:
            _refuse("it computes with sums over the chains")
        return value.node

    def constant(self, t: Any, like: Tensor, out: torch.Size) -> Tensor:
        """A number or tensor that does not read the state, as (1 or chains, *shape of a node)."""
        t = torch.as_tensor(t, dtype=like.dtype, device=like.device).detach()
        rest = tuple(out[1:])
        if t.dim() == len(out) and t.shape[0] == self.chains and self.chains > 1:
            return t.expand(out).reshape(self.chains, *(rest or (1,))).contiguous()
        if t.dim() == len(out):
            t = t[0]
        return t.expand(rest).reshape(1, *(rest or (1,))).contiguous()

    def spread(self, t: Tensor, out: torch.Size) -> int:
        """The node of ``t`` repeated to the shape ``out`` of a result."""
        node = self.node(t)
        if t.shape == out:
            return node
        if t.dim() != len(out):
            _refuse(f"it computes with shapes {tuple(t.shape)} and {tuple(out)}")
        index = (
            torch.arange(math.prod(t.shape[1:]), dtype=torch.int64, device=_CPU).reshape(t.shape[1:]).expand(out[1:])
        )
        return self.pick([node], tuple(out[1:]), index)

    def pick(self, nodes: list[int], shape: tuple[int, ...], index: Tensor, weight: Tensor | None = None) -> int:
        """A :class:`~mmebm.ops.net.graph.Map`; without one where it would change nothing."""
        shape = shape or (1,)
        size = math.prod(shape)
        index = index.reshape(size, -1).to(torch.int64)
        whole = len(nodes) == 1 and weight is None and index.shape[1] == 1 and size == math.prod(self.shapes[nodes[0]])
        if whole and torch.equal(index[:, 0], torch.arange(size, dtype=torch.int64, device=_CPU)):
            return nodes[0] if self.shapes[nodes[0]] == shape else self.add(graph.View(nodes[0], shape))
        return self.add(graph.Map(tuple(nodes), shape, index.contiguous(), weight))

    def reduced(self, t: Tensor, dims: Sequence[int]) -> tuple[tuple[int, ...], Tensor]:
        """(shape of what is left, index (elements left, elements of each sum)) where ``dims`` (not 0) go."""
        shape = t.shape[1:]
        index = torch.arange(math.prod(shape), dtype=torch.int64, device=_CPU).reshape(shape or (1,))
        gone = sorted((d % t.dim()) - 1 for d in dims)
        left = [d for d in range(len(shape)) if d not in gone]
        if not gone:
            return tuple(shape), index.reshape(-1, 1)
        index = index.permute(*left, *gone).reshape(math.prod([shape[d] for d in left]), -1)
        return tuple(shape[d] for d in left), index

    def affine(self, node: int, scale: Tensor, shift: Tensor | None) -> int:
        return self.add(graph.Affine(node, scale, shift))

    def channels(self, t: Tensor | None, shape: Sequence[int], default: float, like: Tensor) -> Tensor:
        """A constant per channel, over the shape of a node."""
        t = torch.full((shape[0],), default, dtype=like.dtype, device=_CPU) if t is None else t.detach()
        return t.reshape(1, -1, *[1] * (len(shape) - 1)).expand(1, *shape).contiguous()


Rule = Callable[..., int]


def _renumbered(node: graph.Node, to: Mapping[int, int]) -> graph.Node:
    if isinstance(node, graph.Input):
        return node
    if isinstance(node, (graph.Add, graph.Map)):
        return replace(node, xs=tuple(to[x] for x in node.xs))
    if isinstance(node, graph.Product):
        return replace(node, a=to[node.a], b=to[node.b])
    return replace(node, x=to[node.x])


# -- rules: (recorder, the operation's result, its arguments as given) -> node


def _view(r: _Recorder, out: Tensor, x: Tensor, *_: Any, **__: Any) -> int:
    return r.node(x)  # keep() gives it its shape


def _same(r: _Recorder, out: Tensor, x: Tensor, *_: Any, **__: Any) -> int:
    if out.dtype != x.dtype or out.device != x.device:
        _refuse(f"it casts {x.dtype} on {x.device} to {out.dtype} on {out.device}")
    return r.node(x)


def _positions(*dims: str) -> Callable[[Callable[..., Tensor]], Rule]:
    """A rule for an operation that only moves elements; the arguments named in ``dims`` must spare the chains."""

    def make(move: Callable[..., Tensor]) -> Rule:
        def rule(r: _Recorder, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> int:
            node = r.node(x)
            # the positions of one chain, seen as those of all
            index = (
                torch.arange(math.prod(x.shape[1:]), dtype=torch.int64, device=_CPU)
                .reshape(1, *x.shape[1:])
                .expand(x.shape)
            )
            moved = move(index, *args, **kwargs)
            return r.pick([node], tuple(out.shape[1:]), moved[:1])

        return rule

    return make


def _not_chains(x: Tensor, *dims: int) -> None:
    if any(d % x.dim() == 0 for d in dims):
        _refuse("it moves elements between chains")


def _permute(x: Tensor, dims: Sequence[int]) -> Tensor:
    if dims[0] % x.dim() != 0:
        _refuse("it moves the dimension of the chains")
    return x.permute(*dims)


def _transpose(x: Tensor, a: int, b: int) -> Tensor:
    if a % x.dim() != b % x.dim():
        _not_chains(x, a, b)
    return x.transpose(a, b)


def _slice(x: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Tensor:
    y = torch.ops.aten.slice.Tensor(x, dim, start, end, step)
    if dim % x.dim() == 0 and y.shape != x.shape:
        _refuse("it takes some of the chains")
    return y


def _select(x: Tensor, dim: int, index: int) -> Tensor:
    _not_chains(x, dim)
    return x.select(dim, index)


def _flip(x: Tensor, dims: Sequence[int]) -> Tensor:
    _not_chains(x, *dims)
    return torch.flip(x, list(dims))


def _roll(x: Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> Tensor:
    _not_chains(x, *(dims or (0,)))
    return x.roll(tuple(shifts), tuple(dims))


def _repeat(x: Tensor, repeats: Sequence[int]) -> Tensor:
    if len(repeats) != x.dim() or repeats[0] != 1:
        _refuse("it repeats chains")
    return x.repeat(*repeats)


def _expand(x: Tensor, size: Sequence[int], **_: Any) -> Tensor:
    if len(size) != x.dim():
        _refuse("it adds a dimension before the chains")
    return x.expand(*size)


def _pad(x: Tensor, pad: Sequence[int], value: float = 0.0) -> Tensor:
    if value != 0:
        _refuse(f"it pads with {value}")
    if len(pad) // 2 >= x.dim():
        _refuse("it pads chains")
    return F.pad(x[:1] + 1, pad) - 1


def _padded(mode: str) -> Callable[..., Tensor]:
    def move(x: Tensor, pad: Sequence[int]) -> Tensor:
        return F.pad(x[:1].double(), list(pad), mode=mode).round()

    return move


def _nearest(x: Tensor, size: Sequence[int], *scales: Any) -> Tensor:
    function = getattr(torch.ops.aten, f"upsample_nearest{len(size)}d").default
    return function(x[:1].double(), size, *scales).round()


def _take(x: Tensor, indices: Sequence[Any]) -> Tensor:
    if not indices or indices[0] is not None:
        _refuse("it indexes chains")
    return x[tuple(slice(None) if i is None else i for i in indices)]


def _shuffle(x: Tensor, factor: int) -> Tensor:
    return F.pixel_shuffle(x[:1].double(), factor).round()


def _split(r: _Recorder, out: Sequence[Tensor], x: Tensor, sizes: Any, dim: int = 0) -> list[int]:
    _not_chains(x, dim)
    node = r.node(x)
    index = torch.arange(math.prod(x.shape[1:]), dtype=torch.int64, device=_CPU).reshape(1, *x.shape[1:])
    parts = index.split(sizes, dim)
    return [r.pick([node], tuple(part.shape[1:]), part) for part in parts]


def _unbind(r: _Recorder, out: Sequence[Tensor], x: Tensor, dim: int = 0) -> list[int]:
    _not_chains(x, dim)
    node = r.node(x)
    index = torch.arange(math.prod(x.shape[1:]), dtype=torch.int64, device=_CPU).reshape(1, *x.shape[1:])
    return [r.pick([node], tuple(part.shape[1:]), part) for part in index.unbind(dim)]


def _joined(r: _Recorder, parts: Sequence[Tensor], dim: int, join: Callable[..., Tensor], out: Tensor) -> int:
    nodes, pieces, start = [], [], 0
    for part in parts:
        if r.value(part) is None:
            t = part.detach()
            if t.shape[0] == r.chains and r.chains > 1 and not bool((t == t[:1]).all()):
                _refuse("it concatenates the state with data of its own for each chain")
            # a node that is the constant whatever it reads
            t = t[:1].to(out.dtype)
            zero = torch.full((math.prod(t.shape[1:]), 1), -1, dtype=torch.int64, device=_CPU)
            first = next(r.node(p) for p in parts if r.value(p) is not None)
            shape = tuple(t.shape[1:]) or (1,)
            empty = r.add(graph.Map((first,), shape, zero))
            nodes.append(r.add(graph.Add((empty,), (1.0,), t.reshape(1, *shape).contiguous())))
        else:
            nodes.append(r.node(part))
        size = math.prod(part.shape[1:])
        pieces.append(torch.arange(start, start + size, dtype=torch.int64, device=_CPU).reshape(1, *part.shape[1:]))
        start += size
    return r.pick(nodes, tuple(out.shape[1:]), join(pieces, dim))


def _cat(r: _Recorder, out: Tensor, parts: Sequence[Tensor], dim: int = 0) -> int:
    _not_chains(out, dim)
    parts = [p for p in parts if p.shape != (0,)]
    return _joined(r, parts, dim, torch.cat, out)


def _stack(r: _Recorder, out: Tensor, parts: Sequence[Tensor], dim: int = 0) -> int:
    _not_chains(out, dim)
    return _joined(r, parts, dim, torch.stack, out)


def _elementwise(function: str, slope: Callable[..., float] | None = None) -> Rule:
    def rule(r: _Recorder, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> int:
        return r.add(graph.Activation(r.node(x), function, slope(*args, **kwargs) if slope else 0.0))  # type: ignore[arg-type]

    return rule


def _elu(r: _Recorder, out: Tensor, x: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> int:
    if input_scale != 1:
        _refuse(f"its elu has input_scale={input_scale}")
    node = r.add(graph.Activation(r.node(x), "elu", float(alpha)))
    return node if scale == 1 else r.add(graph.Add((node,), (float(scale),)))


def _gelu(r: _Recorder, out: Tensor, x: Tensor, *, approximate: str = "none") -> int:
    if approximate != "none":
        _refuse(f"its gelu has approximate={approximate!r}")
    return r.add(graph.Activation(r.node(x), "gelu"))


def _softplus(r: _Recorder, out: Tensor, x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> int:
    # threshold: from where on the function is taken for its argument, which changes less than rounding does
    if threshold * 1.0 < 15:
        _refuse(f"its softplus has threshold={threshold}")
    if beta == 1:
        return r.add(graph.Activation(r.node(x), "softplus"))
    node = r.add(graph.Activation(r.add(graph.Add((r.node(x),), (float(beta),))), "softplus"))
    return r.add(graph.Add((node,), (1.0 / beta,)))


def _add(r: _Recorder, out: Tensor, a: Any, b: Any, *, alpha: float = 1) -> int:
    values = r.value(a), r.value(b)
    if values[0] is not None and values[1] is not None:
        return r.add(graph.Add((r.spread(a, out.shape), r.spread(b, out.shape)), (1.0, float(alpha))))
    (x, other), (one, of) = ((a, b), (1.0, alpha)) if values[0] is not None else ((b, a), (alpha, 1.0))
    node = r.spread(x, out.shape)
    shift = r.constant(other, out, out.shape) * of
    if bool((shift == 0).all()):
        return node if one == 1 else r.add(graph.Add((node,), (float(one),)))
    return r.add(graph.Add((node,), (float(one),), shift))


def _sub(r: _Recorder, out: Tensor, a: Any, b: Any, *, alpha: float = 1) -> int:
    return _add(r, out, a, b, alpha=-alpha)


def _rsub(r: _Recorder, out: Tensor, a: Any, b: Any, alpha: float = 1) -> int:
    return _add(r, out, b, a, alpha=-alpha)


def _mul(r: _Recorder, out: Tensor, a: Any, b: Any) -> int:
    values = r.value(a), r.value(b)
    if values[0] is not None and values[1] is not None:
        if a is b:
            return r.add(graph.Activation(r.node(a), "square"))
        return r.add(graph.Product(r.spread(a, out.shape), r.spread(b, out.shape)))
    x, other = (a, b) if values[0] is not None else (b, a)
    node = r.spread(x, out.shape)
    if not isinstance(other, Tensor) or other.numel() == 1:
        return r.add(graph.Add((node,), (float(other),)))
    return r.affine(node, r.constant(other, out, out.shape), None)


def _div(r: _Recorder, out: Tensor, a: Any, b: Any, **options: Any) -> int:
    if options.get("rounding_mode") is not None:
        _refuse("it rounds")
    if r.value(b) is not None:
        inverse = r.add(graph.Activation(r.spread(b, out.shape), "reciprocal"))
        if r.value(a) is not None:
            return r.add(graph.Product(r.spread(a, out.shape), inverse))
        return r.affine(inverse, r.constant(a, out, out.shape), None)
    if not isinstance(b, Tensor) or b.numel() == 1:
        return r.add(graph.Add((r.spread(a, out.shape),), (1.0 / float(b),)))
    return r.affine(r.spread(a, out.shape), 1.0 / r.constant(b, out, out.shape), None)


def _neg(r: _Recorder, out: Tensor, x: Tensor) -> int:
    return r.add(graph.Add((r.node(x),), (-1.0,)))


def _pow(r: _Recorder, out: Tensor, x: Tensor, power: Any) -> int:
    node = r.node(x)
    if isinstance(power, Tensor) or power not in (0.5, 1, 2, 3, 4, -1):
        _refuse(f"it takes the power {power}")
    if power == 1:
        return node
    if power in (0.5, -1):
        return r.add(graph.Activation(node, "sqrt" if power == 0.5 else "reciprocal"))
    square = r.add(graph.Activation(node, "square"))
    if power == 2:
        return square
    return r.add(graph.Product(square, node) if power == 3 else graph.Activation(square, "square"))


def _convolution(
    r: _Recorder, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
    *_: Any,
) -> int:  # fmt: skip
    if r.value(weight) is not None or r.value(bias) is not None:
        _refuse("a weight depends on the state")
    if x.dim() not in (3, 4):
        _refuse(f"it has a convolution over {x.dim() - 2} dimensions")
    node, pairs = r.node(x), [list(stride), list(padding), list(dilation), list(output_padding)]
    weight = weight.detach()
    if x.dim() == 3:
        node = r.add(graph.View(node, (x.shape[1], 1, x.shape[2])))
        weight = weight.unsqueeze(2)
        pairs = [[one, *pair] for one, pair in zip((1, 0, 1, 0), pairs, strict=True)]
    stride, padding, dilation, output_padding = (tuple(p) for p in pairs)
    bias = None if bias is None else bias.detach().contiguous()
    return r.add(graph.Conv(
        node, weight.contiguous(), bias, stride, padding, dilation, groups, transposed, output_padding  # type: ignore[arg-type]
    ))  # fmt: skip


def _linear(r: _Recorder, x: Tensor, matrix: Tensor, bias: Tensor | None) -> int:
    """x (chains, n) times ``matrix`` (n, outputs)."""
    if r.value(matrix) is not None or r.value(bias) is not None:
        _refuse("it multiplies matrices that depend on the state")
    if bias is not None:
        bias = bias.detach().expand(matrix.shape[1]).contiguous()
    return r.add(graph.Linear(r.node(x), matrix.detach().t().contiguous(), bias))


def _mm(r: _Recorder, out: Tensor, x: Tensor, matrix: Tensor) -> int:
    return _linear(r, x, matrix, None)


def _addmm(
    r: _Recorder, out: Tensor, bias: Tensor, x: Tensor, matrix: Tensor, *, beta: float = 1, alpha: float = 1
) -> int:
    if beta != 1 or alpha != 1 or bias.dim() > 1:
        _refuse("it adds matrices with factors")
    return _linear(r, x, matrix, bias)


def _mv(r: _Recorder, out: Tensor, x: Tensor, vector: Tensor) -> int:
    return _linear(r, x, vector.unsqueeze(1), None)


def _sum(r: _Recorder, out: Tensor, x: Tensor, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    return _total(r, out, x, dims, lambda count: 1.0)


def _mean(r: _Recorder, out: Tensor, x: Tensor, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    return _total(r, out, x, dims, lambda count: 1.0 / count)


def _total(r: _Recorder, out: Tensor, x: Tensor, dims: Any, factor: Callable[[int], float]) -> Any:
    dims = list(range(x.dim())) if dims is None or len(dims) == 0 else [d % x.dim() for d in dims]
    if out.dtype != x.dtype:
        _refuse(f"it sums into {out.dtype}")
    over_chains = 0 in dims
    if over_chains and math.prod(x.shape[1:]) != 1 and len(dims) != x.dim():
        _refuse("it sums over the chains and not over all of their elements")
    node, count = r.node(x), math.prod(x.shape[d] for d in dims)
    shape, index = r.reduced(x, [d for d in dims if d])
    if index.shape[1] > 1:
        node = r.pick([node], shape, index)
    if factor(count) != 1:
        node = r.add(graph.Add((node,), (factor(count),)))
    return ("total", node) if over_chains else node


def _norm(
    r: _Recorder, out: Tensor, x: Tensor, order: float = 2, dims: Any = None, keepdim: bool = False, **_: Any
) -> int:
    if order not in (1, 2) or dims is None:
        _refuse(f"it takes a norm of order {order} over dimensions {dims}")
    dims = [dims] if isinstance(dims, int) else dims
    _not_chains(x, *dims)
    powers = r.add(graph.Activation(r.node(x), "abs" if order == 1 else "square"))
    shape, index = r.reduced(x, dims)
    total = r.pick([powers], shape, index)
    return total if order == 1 else r.add(graph.Activation(total, "sqrt"))


def _logsumexp(r: _Recorder, out: Tensor, x: Tensor, dims: Sequence[int], keepdim: bool = False) -> int:
    _not_chains(x, *dims)
    shape, index = r.reduced(x, dims)
    return r.add(graph.LogSumExp(r.node(x), shape or (1,), index.contiguous()))


def _log_softmax(r: _Recorder, out: Tensor, x: Tensor, dim: int, half_to_float: bool = False) -> int:
    _not_chains(x, dim)
    shape, index = r.reduced(x, [dim])
    total = r.add(graph.LogSumExp(r.node(x), shape or (1,), index.contiguous()))
    kept = [1 if d == dim % x.dim() else n for d, n in enumerate(x.shape)]
    where = torch.arange(math.prod(shape), dtype=torch.int64, device=_CPU).reshape(kept[1:]).expand(x.shape[1:])
    return r.add(graph.Add((r.node(x), r.pick([total], tuple(x.shape[1:]), where)), (1.0, -1.0)))


def _softmax(r: _Recorder, out: Tensor, x: Tensor, dim: int, half_to_float: bool = False) -> int:
    return r.add(graph.Activation(_log_softmax(r, out, x, dim), "exp"))


def _chosen(r: _Recorder, x: Tensor, labels: Tensor) -> int:
    """x (chains, n) at each chain's own index ``labels`` (chains,)."""
    if r.value(labels) is not None:
        _refuse("an index depends on the state")
    hot = F.one_hot(labels.reshape(-1).expand(r.chains), x.shape[1]).to(x.dtype)
    picked = r.affine(r.node(x), hot if r.chains > 1 else hot[:1], None)
    return r.pick([picked], (), torch.arange(x.shape[1], dtype=torch.int64, device=_CPU).reshape(1, -1))


def _gather(r: _Recorder, out: Tensor, x: Tensor, dim: int, index: Tensor, **_: Any) -> int:
    if x.dim() != 2 or dim % 2 != 1 or index.shape != (r.chains, 1):
        _refuse("it gathers otherwise than one element a chain")
    return _chosen(r, x, index)


def _index(r: _Recorder, out: Tensor, x: Tensor, indices: Sequence[Any]) -> int:
    if len(indices) == 2 and x.dim() == 2 and isinstance(indices[0], Tensor) and isinstance(indices[1], Tensor):
        rows = indices[0]
        if rows.shape == (r.chains,) and torch.equal(
            rows.long(), torch.arange(r.chains, dtype=torch.int64, device=_CPU)
        ):
            return _chosen(r, x, indices[1])
    if any(r.value(i) is not None for i in indices):
        _refuse("an index depends on the state")
    return _positions()(_take)(r, out, x, indices)


def _nll(r: _Recorder, out: Any, x: Tensor, labels: Tensor, weight: Any, reduction: int, ignore: int) -> list[Any]:
    if weight is not None or reduction not in (0, 1, 2) or x.dim() != 2 or bool((labels == ignore).any()):
        _refuse("it has weights, ignored labels or positions in its negative log-likelihood")
    node = r.add(graph.Add((_chosen(r, x, labels),), (-1.0 if reduction != 1 else -1.0 / r.chains,)))
    return [node if reduction == 0 else ("total", node), None]


def _mse(r: _Recorder, out: Tensor, a: Any, b: Any, reduction: int = 1) -> Any:
    shape = torch.broadcast_shapes(a.shape, b.shape)
    node = r.add(graph.Activation(_add(r, a.new_empty(()).expand(shape), a, b, alpha=-1), "square"))
    if reduction == 0:
        return node
    total = r.pick([node], (), torch.arange(math.prod(shape[1:]), dtype=torch.int64, device=_CPU).reshape(1, -1))
    if reduction == 1:
        total = r.add(graph.Add((total,), (1.0 / math.prod(shape),)))
    return ("total", total)


def _pooled(r: _Recorder, x: Tensor, index: Tensor, weight: Tensor | None, sides: Sequence[int]) -> int:
    """``index``, ``weight`` (positions out, k) of one channel -> a node for all channels."""
    channels, size = x.shape[1], math.prod(x.shape[2:])
    offsets = (torch.arange(channels, dtype=torch.int64, device=_CPU) * size).reshape(-1, 1, 1)
    every = torch.where(index < 0, index, index + offsets).reshape(channels * index.shape[0], -1)
    if weight is not None:
        weight = weight.to(x.dtype).repeat(channels, 1)
    return r.pick([r.node(x)], (channels, *sides), every, weight)


def _windows(sides: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """(positions out, elements of a window), -1 beyond the border."""
    index = torch.arange(1, math.prod(sides) + 1, dtype=torch.float64, device=_CPU).reshape(1, 1, *sides)
    windows = F.unfold(index, tuple(kernel), padding=tuple(padding), stride=tuple(stride))
    return windows[0].t().round().long() - 1


def _pair(value: Any) -> list[int]:
    value = [value] if isinstance(value, int) else list(value)
    return value * 2 if len(value) == 1 else value


def _avg_pool2d(
    r: _Recorder, out: Tensor, x: Tensor, kernel: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: Any = None,
) -> int:  # fmt: skip
    kernel, padding = _pair(kernel), _pair(padding)
    stride = _pair(stride) if stride else kernel
    index = _windows(x.shape[2:], kernel, stride, padding)
    if ceil_mode or x.dim() != 4 or index.shape[0] != math.prod(out.shape[2:]):
        _refuse("its average pooling has ceil_mode")
    inside = (index >= 0).double()
    count = (
        inside.sum(1, keepdim=True)
        if not count_include_pad
        else torch.tensor(float(math.prod(kernel)), dtype=torch.float64, device=_CPU)
    )
    if divisor_override is not None:
        count = torch.tensor(float(divisor_override), dtype=torch.float64, device=_CPU)
    return _pooled(r, x, index, (inside / count).expand(index.shape), out.shape[2:])


def _avg_pool1d(
    r: _Recorder, out: Tensor, x: Tensor, kernel: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> int:  # fmt: skip
    k, s, p = (v if isinstance(v, int) else next(iter(v)) for v in (kernel, stride or kernel, padding))
    index = _windows((1, x.shape[2]), (1, k), (1, s), (0, p))
    if ceil_mode or index.shape[0] != out.shape[2]:
        _refuse("its average pooling has ceil_mode")
    inside = (index >= 0).double()
    count = (
        torch.tensor(float(k), dtype=torch.float64, device=_CPU) if count_include_pad else inside.sum(1, keepdim=True)
    )
    return _pooled(r, x, index, (inside / count).expand(index.shape), out.shape[2:])


def _linear_map(one: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """(outputs, size): the matrix of a linear map of one row of numbers."""
    return one(torch.eye(size, dtype=torch.float64, device=_CPU).unsqueeze(1)).squeeze(1).t()


def _separable(r: _Recorder, x: Tensor, rows: Tensor, columns: Tensor) -> int:
    """A map of rows times a map of columns, each (out, in)."""
    most = [int((m != 0).sum(1).max()) for m in (rows, columns)]
    weight, index = [], []
    for m, k in zip((rows, columns), most, strict=True):
        where = m.abs().topk(k, dim=1).indices
        index.append(where)
        weight.append(m.gather(1, where))
    at = index[0][:, None, :, None] * x.shape[-1] + index[1][None, :, None, :]
    by = weight[0][:, None, :, None] * weight[1][None, :, None, :]
    shape = (rows.shape[0] * columns.shape[0], -1)
    return _pooled(r, x, at.reshape(shape), by.reshape(shape), (rows.shape[0], columns.shape[0]))


def _adaptive_avg_pool2d(r: _Recorder, out: Tensor, x: Tensor, size: Sequence[int]) -> int:
    maps = [
        _linear_map(lambda e, n=n: F.adaptive_avg_pool1d(e, n), side)
        for side, n in zip(x.shape[2:], out.shape[2:], strict=True)
    ]
    return _separable(r, x, *maps)


def _upsampled(function: Callable[[Tensor, int, bool, Any], Tensor]) -> Rule:
    """``function`` (rows, new size, whether corners are aligned, scale) of one dimension."""

    def rule(r: _Recorder, out: Tensor, x: Tensor, size: Any, align: bool = False, *scales: Any) -> int:
        maps = []
        for i, (side, n) in enumerate(zip(x.shape[2:], out.shape[2:], strict=True)):
            scale = scales[i] if i < len(scales) else None
            maps.append(_linear_map(lambda e, n=n, s=scale: function(e, n, align, s), side))
        return _separable(r, x, *maps)

    return rule


def _bilinear(x: Tensor, size: int, align: bool, scale: Any) -> Tensor:
    return torch.ops.aten.upsample_linear1d.default(x, [size], align, scale)


def _bicubic(x: Tensor, size: int, align: bool, scale: Any) -> Tensor:
    return torch.ops.aten.upsample_bicubic2d.default(x.unsqueeze(2), [1, size], align, None, scale).squeeze(2)


def _batch_norm(
    r: _Recorder, out: Any, x: Tensor, weight: Any, bias: Any, mean: Any, variance: Any, *rest: Any
) -> list[int | None]:
    eps = rest[-1]
    shape = x.shape[1:]
    scale = torch.rsqrt(variance.double() + eps)
    if weight is not None:
        scale = scale * weight.double()
    shift = -mean.double() * scale
    if bias is not None:
        shift = shift + bias.double()
    scale, shift = (r.channels(t.to(x.dtype), shape, 0.0, x) for t in (scale, shift))
    return [r.affine(r.node(x), scale, shift), None, None]


def _normed(r: _Recorder, node: int, weight: Any, bias: Any, scale: Callable[[Any, float], Tensor]) -> list[int | None]:
    if weight is None and bias is None:
        return [node, None, None]
    return [r.affine(node, scale(weight, 1.0), None if bias is None else scale(bias, 0.0)), None, None]


def _group_norm(
    r: _Recorder, out: Any, x: Tensor, weight: Any, bias: Any, n: int, c: int, hw: int, groups: int, eps: float
) -> list[int | None]:
    node = r.add(graph.Norm(r.node(x), groups, float(eps)))
    return _normed(r, node, weight, bias, lambda t, default: r.channels(t, x.shape[1:], default, x))


def _layer_norm(
    r: _Recorder, out: Any, x: Tensor, shape: Sequence[int], weight: Any, bias: Any, eps: float
) -> list[int | None]:
    if len(shape) >= x.dim():
        _refuse("it normalises over the chains")
    node = r.add(graph.Norm(r.node(x), math.prod(x.shape[1:]) // math.prod(shape), float(eps)))

    def over(t: Any, default: float) -> Tensor:
        t = torch.full(tuple(shape), default, dtype=x.dtype, device=_CPU) if t is None else t.detach()
        return t.expand(x.shape[1:]).unsqueeze(0).contiguous()

    return _normed(r, node, weight, bias, over)


def _residual(
    r: _Recorder, out: Any, predictions: Sequence[Tensor], targets: Sequence[Tensor], likelihood: str,
    numbers: Sequence[float], tensors: Sequence[Tensor | None], observed: Sequence[Tensor | None], *_: Any,
) -> list[Any]:  # fmt: skip
    """This library's op :mod:`mmebm.ops.residual`."""
    n, parts = len(predictions), []
    given = [number if t is None else t for number, t in zip(numbers, tensors, strict=True)]
    kinds = likelihood.split(",")
    for y, t, kind, scale, weight, mask in zip(
        predictions, targets, kinds, given[:n], given[n:], observed, strict=True
    ):
        if kind not in ("gaussian", "laplace") or r.value(y) is None or any(map(r.value, (t, scale, weight, mask))):
            _refuse(f"it takes a {kind} residual of something else than predictions")
        shape = torch.Size((r.chains, *y.shape[1:]))
        node = r.add(graph.Add((r.node(y),), (1.0,), -r.constant(t.to(y.dtype), y, shape)))
        if mask is not None:
            node = r.affine(node, r.constant(mask.to(y.dtype), y, shape), None)
        node = r.add(graph.Activation(node, "square" if kind == "gaussian" else "abs"))
        node = r.pick([node], (), torch.arange(math.prod(y.shape[1:]), dtype=torch.int64, device=_CPU).reshape(1, -1))
        factor = weight / (2 * scale**2) if kind == "gaussian" else weight / scale
        if isinstance(factor, Tensor):
            factor = factor.to(y.dtype).reshape(-1).expand(r.chains).reshape(r.chains, 1).contiguous()
            parts.append((r.affine(node, factor if r.chains > 1 else factor[:1], None), 1.0))
        else:
            parts.append((node, float(factor)))
    return [r.add(graph.Add(*map(tuple, zip(*parts, strict=True)))), None]  # type: ignore[arg-type]


_MOVES: dict[str, Callable[..., Tensor]] = {
    "permute": _permute, "transpose": _transpose, "slice": _slice, "select": _select, "flip": _flip, "roll": _roll,
    "repeat": _repeat, "expand": _expand, "constant_pad_nd": _pad, "reflection_pad2d": _padded("reflect"),
    "reflection_pad1d": _padded("reflect"), "replication_pad2d": _padded("replicate"),
    "replication_pad1d": _padded("replicate"), "upsample_nearest2d": _nearest, "upsample_nearest1d": _nearest,
    "pixel_shuffle": _shuffle, "t": lambda x: _transpose(x, 0, 1),
}  # fmt: skip
_RULES: dict[str, Callable[..., Any]] = {
    "view": _view, "_unsafe_view": _view, "reshape": _view, "unsqueeze": _view, "squeeze": _view, "alias": _same,
    "clone": _same, "_to_copy": _same, "contiguous": _same, "lift_fresh": _same,
    "split": _split, "split_with_sizes": _split, "unbind": _unbind, "cat": _cat, "stack": _stack,
    "relu": _elementwise("relu"), "silu": _elementwise("silu"), "tanh": _elementwise("tanh"),
    "sigmoid": _elementwise("sigmoid"), "abs": _elementwise("abs"), "exp": _elementwise("exp"),
    "sqrt": _elementwise("sqrt"), "square": _elementwise("square"), "reciprocal": _elementwise("reciprocal"),
    "leaky_relu": _elementwise("leaky_relu", lambda slope=0.01: float(slope)), "elu": _elu, "gelu": _gelu,
    "softplus": _softplus, "add": _add, "sub": _sub, "rsub": _rsub, "mul": _mul, "div": _div, "neg": _neg, "pow": _pow,
    "convolution": _convolution, "_convolution": _convolution, "mm": _mm, "addmm": _addmm, "mv": _mv, "sum": _sum,
    "mean": _mean,
    "linalg_vector_norm": _norm, "logsumexp": _logsumexp, "_log_softmax": _log_softmax, "_softmax": _softmax,
    "gather": _gather, "index": _index, "nll_loss_forward": _nll, "mse_loss": _mse, "avg_pool2d": _avg_pool2d,
    "avg_pool1d": _avg_pool1d, "_adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "upsample_bilinear2d": _upsampled(_bilinear),
    "upsample_bicubic2d": _upsampled(_bicubic), "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm, "_native_batch_norm_legit": _batch_norm,
    "native_group_norm": _group_norm, "native_layer_norm": _layer_norm, "residual": _residual,
    **{name: _positions()(move) for name, move in _MOVES.items()},
}  # fmt: skip


# What reads no value of its argument
_SHAPES = frozenset((
    "zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_full", "new_empty",
    "new_empty_strided",
))  # fmt: skip


# -- the two modes under which the energy is called


def _circular(x: Tensor, pad: Sequence[int]) -> Tensor:
    for i in range(len(pad) // 2):
        before, after, dim = pad[2 * i], pad[2 * i + 1], x.dim() - 1 - i
        n = x.shape[dim]
        if min(before, after) < 0 or max(before, after) > n:
            _refuse(f"it pads {n} elements circularly by {before} and {after}")
        x = torch.cat([x.narrow(dim, n - before, before), x, x.narrow(dim, 0, after)], dim)
    return x


# Where a batch norm is told that it is in train mode
_TRAINING = {"native_batch_norm": 5, "_native_batch_norm_legit": 5, "cudnn_batch_norm": 5, "miopen_batch_norm": 5}
# What no operation shows
_LEAVES = (Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.__dlpack__)


class _Rewrite(TorchFunctionMode):
    """Two functions that torch takes apart in a way in which chains are no longer seen, in another way."""

    def __init__(self, watched: Callable[[Any], Any]) -> None:
        super().__init__()
        self.watched = watched

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func in _LEAVES and args and self.watched(args[0]):
            _refuse(f"it takes a value of the state out of torch ({func.__name__})")
        if func is F.pad:
            pad = args[1] if len(args) > 1 else given.get("pad", ())
            mode = args[2] if len(args) > 2 else given.get("mode", "constant")
            if mode == "circular":
                return _circular(args[0], list(pad))
        if func is F.instance_norm:
            names = ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
            given = {**dict(zip(names, args, strict=False)), **given}
            if given.get("use_input_stats", True):
                if given.get("running_mean") is not None:
                    _refuse("its instance norm tracks running statistics")
                x = given["input"]
                return F.group_norm(x, x.shape[1], given.get("weight"), given.get("bias"), given.get("eps", 1e-5))
        return func(*args, **(kwargs or {}))


@functools.lru_cache(maxsize=2048)
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """(position, name) of the arguments that ``func`` writes to."""
    return tuple(
        (i, argument.name) for i, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )  # fmt: skip


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in arguments or results of an operation: lists at most."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for part in value for t in _tensors(part)]
    return [t for part in value.values() for t in _tensors(part)] if isinstance(value, dict) else []


class _Watch(TorchDispatchMode):
    """Runs every operation, and writes down those that read the state."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.own: dict[int, Tensor] = {}  # storages made during the call, kept

    def _own(self, result: Any) -> None:
        for t in _tensors(result):
            self.own.setdefault(t.untyped_storage()._cdata, t)

    def _examine(self, func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors that ``func`` changes. Refuses what must not happen in a call that nobody asked for."""
        if torch.Tag.nondeterministic_seeded in func.tags:
            _refuse(f"it draws random numbers ({name})")
        if name in _TRAINING and args[_TRAINING[name]]:
            _refuse("its batch norm is in train mode")
        changed = []
        for i, label in _written(func):
            changed += _tensors(args[i] if i < len(args) else kwargs.get(label))
        for t in changed:
            if t.untyped_storage()._cdata not in self.own:
                _refuse(f"it changes a tensor in place ({name})")
        return changed

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        try:
            return self._run(func, args, dict(kwargs or {}))
        except CannotLower as error:  # which the energy may catch, or a script lose
            self.recorder.refusals.append(str(error))
            raise

    def _run(self, func: Any, args: Sequence[Any], given: dict[str, Any]) -> Any:
        r, name = self.recorder, func._schema.name.rpartition("::")[2]
        flat = _tensors((args, given))
        values = [r.value(t) for t in flat]
        watched = any(value is not None for value in values) and name not in _SHAPES
        changed = self._examine(func, name, args, given)
        plain = name.removesuffix("_") if changed and name.endswith("_") else name
        if watched and (plain not in _RULES or (changed and plain == name)):
            _refuse(f"it calls {name}")
        if not watched and changed:
            storages = {t.untyped_storage()._cdata for t in changed}
            if any(v.tensor.untyped_storage()._cdata in storages for v in r.values.values()):
                _refuse(f"it changes what it computed in place ({name})")
        before = args
        if changed and watched:
            # another tensor that looks at the same memory would no longer be what was written down
            target = changed[0]
            sharing = [
                v for v in r.values.values() if v.tensor.untyped_storage()._cdata == target.untyped_storage()._cdata
            ]
            if r.value(target) is None or any(v.tensor is not target for v in sharing):
                _refuse(f"it changes a view in place ({name})")
        if watched and any(value is not None and value.total for value in values):
            result = func(*args, **given)
            self._own(result)
            self._total(plain, result, args, given)
            return result
        if changed and watched:
            # the rule reads the values as they were; the node is what it was
            result = func(*before, **given)
            self._keep(_RULES[plain](r, result, *before, **given), result)
            return result
        result = func(*args, **given)
        self._own(result)
        if watched:
            self._keep(_RULES[plain](r, result, *args, **given), result)
        return result

    def _keep(self, nodes: Any, result: Any) -> None:
        outputs = list(result) if isinstance(result, (list, tuple)) else [result]
        for node, t in zip(nodes if isinstance(nodes, list) else [nodes], outputs, strict=True):
            if node is None:
                continue
            total = isinstance(node, tuple)
            self.recorder.keep(t, node[1] if isinstance(node, tuple) else node, total)

    def _total(self, name: str, result: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """What may follow a sum over the chains: numbers times it, and sums of such."""
        r, parts = self.recorder, [r for r in map(self.recorder.value, args[:2])]
        if name in ("view", "reshape", "squeeze", "unsqueeze", "_unsafe_view", "alias", "detach", "clone") or (
            name == "sum" and args[0].numel() == 1
        ):
            parts, factors = parts[:1], (1.0,)
        elif name in ("neg", "mul", "div"):
            number = -1.0 if name == "neg" else args[1]
            if r.value(args[0]) is None and name == "mul":
                parts, number = parts[::-1], args[0]
            if r.value(number) is not None or (r.value(args[0]) is None and name == "div"):
                _refuse("it computes with sums over the chains")
            parts, factors = parts[:1], (1.0 / float(number) if name == "div" else float(number),)
        elif name in ("add", "sub"):
            alpha = float(kwargs.get("alpha", 1.0))
            factors = (1.0, alpha if name == "add" else -alpha)
            if any(p is None for p in parts):  # a constant changes no gradient, but each chain's energy
                number = args[1] if parts[0] is not None else args[0]
                if float(number) != 0:
                    _refuse("it adds a constant to a sum over the chains")
                factors = tuple(f for p, f in zip(parts, factors, strict=True) if p is not None)
                parts = [p for p in parts if p is not None]
        else:
            _refuse(f"it calls {name} on a sum over the chains")
        found = [p for p in parts if p is not None]
        if not found or not all(p.total for p in found):
            _refuse("it adds a sum over the chains to a value for each")
        ones = [r.add(graph.View(p.node, (1,))) if r.shapes[p.node] != (1,) else p.node for p in found]
        r.keep(result, r.add(graph.Add(tuple(ones), factors)), total=True)


# -- the net


def _pruned(nodes: Sequence[graph.Node], last: int) -> list[graph.Node]:
    """The nodes that ``last`` needs, it at the end."""
    needed, waiting = set(), [last]
    while waiting:
        i = waiting.pop()
        if i not in needed:
            needed.add(i)
            waiting.extend(graph.reads(nodes[i]))
    order = {old: new for new, old in enumerate(sorted(needed))}
    return [_renumbered(nodes[old], order) for old in sorted(needed)]


def _users(nodes: Sequence[graph.Node]) -> list[int]:
    counts = [0] * len(nodes)
    for node in nodes:
        for i in graph.reads(node):
            counts[i] += 1
    return counts


def _folded(nodes: list[graph.Node]) -> list[graph.Node]:
    """A norm in eval mode after a convolution becomes part of its weight, where nothing else reads that."""
    counts = _users(nodes)
    for i, node in enumerate(nodes):
        if not isinstance(node, graph.Affine) or counts[node.x] != 1:
            continue
        conv = nodes[node.x]
        shift = node.scale.new_zeros(node.scale.shape) if node.shift is None else node.shift
        if not isinstance(conv, graph.Conv) or conv.transposed or node.scale.shape[0] != 1 or shift.shape[0] != 1:
            continue
        per_channel = [t.flatten(2)[0] for t in (node.scale, shift)]
        if any(bool((t != t[:, :1]).any()) for t in per_channel):
            continue
        scale, move = (t[:, 0] for t in per_channel)
        weight = (conv.weight.double() * scale.double().reshape(-1, 1, 1, 1)).to(conv.weight.dtype)
        bias = move if conv.bias is None else conv.bias * scale + move
        nodes[i] = replace(conv, weight=weight, bias=bias)
    return nodes


def _examine(energy: Any) -> None:
    """Refuses an energy that may have an effect besides its result."""
    examination, kind = effects.Examination(traced=True), type(energy)
    if isinstance(energy, nn.Module):
        return examination.run(energy)
    if isinstance(energy, types.FunctionType):
        return examination.run(energy)
    if isinstance(energy, types.MethodType) and isinstance(energy.__self__, nn.Module):
        examination.run(energy.__self__)
        function, owner = energy.__func__, energy.__self__
        pure = getattr(effects.definer(type(owner), function.__name__), "mmebm_pure", False)
        if isinstance(function, types.FunctionType) and not pure and not function.__module__.startswith("torch."):
            examination.run(function, owner)
        return None
    if callable(energy) and effects.definer(kind, "__call__").__dict__.get("mmebm_pure", False):
        symbol.attempt().seen.append(kind)
        for part in vars(energy).values():
            if isinstance(part, nn.Module):
                examination.run(part)
        return None
    return _refuse(f"it is a {kind.__name__}")


def trace(
    energy: Callable[..., Any], state: Any, *, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None,
    log_prob: bool = False,
) -> Traced:  # fmt: skip
    """The net that ``energy`` computes at ``state``, where calling it once more than the chain does has no effect.

    Args:
        energy: as :meth:`mmebm.Langevin.sample` takes it. It is called once.
        state: a tensor (chains, ...), or a list, tuple or dict of such.
        args, kwargs: what else it is given.
        log_prob: whether ``energy`` returns log p and not E.

    Raises:
        CannotLower: naming what a net cannot say.
    """
    _, tensors, build = flatten(state)
    noted = Attempt()
    token = symbol._current.set(noted)
    try:
        effects.refuse_watchers()
        if not all(inert(value) for value in (*args, *(kwargs or {}).values())):
            _refuse("it is given arguments that are not plain data")
        _examine(energy)
        traced = _traced(energy, tensors, build, args, dict(kwargs or {}), log_prob)
    finally:
        symbol._current.reset(token)
    return replace(traced, seen=tuple(noted.seen))


def _traced(
    energy: Callable[..., Any], tensors: list[Tensor], build: Any, args: Sequence[Any], kwargs: dict[str, Any],
    log_prob: bool,
) -> Traced:  # fmt: skip
    chains = tensors[0].shape[0]
    if chains == 0:
        _refuse("there are no chains")
    if len({t.dtype for t in tensors}) != 1:
        _refuse("the state has several dtypes")
    if torch.is_autocast_enabled(tensors[0].device.type):
        _refuse("autocast is on")
    recorder, start = _Recorder(chains), 0
    with torch.no_grad():
        inputs = [t.detach().clone(memory_format=torch.contiguous_format) for t in tensors]
        for t in inputs:
            shape = tuple(t.shape[1:]) or (1,)
            if math.prod(shape) == 0:
                _refuse("a tensor of the state has no elements")
            recorder.keep(t, recorder.add(graph.Input(start, shape)))
            start += math.prod(shape)
        try:
            with _Rewrite(recorder.value), _Watch(recorder):
                result = energy(build(inputs), *args, **kwargs)
        except CannotLower:
            raise
        except Exception as error:
            if recorder.refusals:
                raise CannotLower(recorder.refusals[0]) from error
            raise CannotLower(f"{type(error).__name__}: {error}"[:200]) from error
    if recorder.refusals:  # the energy went on after an exception
        _refuse(recorder.refusals[0])
    value = recorder.value(result)
    if value is None:
        _refuse(f"it returns a {type(result).__name__} that does not come from the state")
    if math.prod(recorder.shapes[value.node]) != 1 or (not value.total and result.numel() != chains):
        _refuse(f"it returns shape {tuple(result.shape)}")
    last = value.node
    if log_prob:
        last = recorder.add(graph.Add((last,), (-1.0,)))
    nodes = _pruned(recorder.nodes, last)
    folded = _pruned(_folded(nodes), len(nodes) - 1)
    return Traced(Net(tuple(folded)), value.total)
