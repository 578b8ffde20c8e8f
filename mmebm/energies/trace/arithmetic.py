"""Rules for functions of each element, arithmetic, sums and what is computed from sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from mmebm.energies.lower.attempt import refuse
from mmebm.energies.trace.moves import moved, not_chains, take
from mmebm.energies.trace.recorder import Recorder, positions, rule
from mmebm.ops.net import graph


def _elementwise(function: graph.Function) -> None:
    @rule(function)
    def _(r: Recorder, out: Tensor, x: Tensor) -> int:
        return r.add(graph.Activation(r.node(x), function))


for _function in get_args(graph.Function):
    _elementwise(_function)  # those with arguments are below


@rule("leaky_relu")
def _leaky_relu(r: Recorder, out: Tensor, x: Tensor, slope: float = 0.01) -> int:
    return r.add(graph.Activation(r.node(x), "leaky_relu", float(slope)))


@rule("elu")
def _elu(r: Recorder, out: Tensor, x: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> int:
    if input_scale != 1:
        refuse(f"its elu has input_scale={input_scale}")
    node = r.add(graph.Activation(r.node(x), "elu", float(alpha)))
    return node if scale == 1 else r.add(graph.Add((node,), (float(scale),)))


@rule("gelu")
def _gelu(r: Recorder, out: Tensor, x: Tensor, *, approximate: str = "none") -> int:
    if approximate != "none":
        refuse(f"its gelu has approximate={approximate!r}")
    return r.add(graph.Activation(r.node(x), "gelu"))


@rule("softplus")
def _softplus(r: Recorder, out: Tensor, x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> int:
    # threshold: from where on the function is taken for its argument, which changes less than rounding does
    if threshold * 1.0 < 15:
        refuse(f"its softplus has threshold={threshold}")
    if beta == 1:
        return r.add(graph.Activation(r.node(x), "softplus"))
    node = r.add(graph.Activation(r.add(graph.Add((r.node(x),), (float(beta),))), "softplus"))
    return r.add(graph.Add((node,), (1.0 / beta,)))


@rule("add")
def _add(r: Recorder, out: Tensor, a: Any, b: Any, *, alpha: float = 1) -> int:
    values = r.value(a), r.value(b)
    if values[0] is not None and values[1] is not None:
        return r.add(graph.Add((r.spread(a, out.shape), r.spread(b, out.shape)), (1.0, float(alpha))))
    (x, other), (one, of) = ((a, b), (1.0, alpha)) if values[0] is not None else ((b, a), (alpha, 1.0))
    node = r.spread(x, out.shape)
    shift = r.constant(other, out, out.shape) * of
    if bool((shift == 0).all()):
        return node if one == 1 else r.add(graph.Add((node,), (float(one),)))
    return r.add(graph.Add((node,), (float(one),), shift))


@rule("sub")
def _sub(r: Recorder, out: Tensor, a: Any, b: Any, *, alpha: float = 1) -> int:
    return _add(r, out, a, b, alpha=-alpha)


@rule("rsub")
def _rsub(r: Recorder, out: Tensor, a: Any, b: Any, alpha: float = 1) -> int:
    return _add(r, out, b, a, alpha=-alpha)


@rule("mul")
def _mul(r: Recorder, out: Tensor, a: Any, b: Any) -> int:
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


@rule("div")
def _div(r: Recorder, out: Tensor, a: Any, b: Any, **options: Any) -> int:
    if options.get("rounding_mode") is not None:
        refuse("it rounds")
    if r.value(b) is not None and r.value(a) is not None:
        return r.add(graph.Product(r.spread(a, out.shape), r.spread(b, out.shape), divide=True))
    if r.value(b) is not None:
        inverse = r.add(graph.Activation(r.spread(b, out.shape), "reciprocal"))
        return r.affine(inverse, r.constant(a, out, out.shape), None)
    if not isinstance(b, Tensor) or b.numel() == 1:
        return r.add(graph.Add((r.spread(a, out.shape),), (1.0 / float(b),)))
    return r.affine(r.spread(a, out.shape), 1.0 / r.constant(b, out, out.shape), None)


@rule("neg")
def _neg(r: Recorder, out: Tensor, x: Tensor) -> int:
    return r.add(graph.Add((r.node(x),), (-1.0,)))


@rule("pow")
def _pow(r: Recorder, out: Tensor, x: Tensor, power: Any) -> int:
    node = r.node(x)
    if isinstance(power, Tensor) or power not in (0.5, 1, 2, 3, 4, -1):
        refuse(f"it takes the power {power}")
    if power == 1:
        return node
    if power in (0.5, -1):
        return r.add(graph.Activation(node, "sqrt" if power == 0.5 else "reciprocal"))
    square = r.add(graph.Activation(node, "square"))
    if power == 2:
        return square
    return r.add(graph.Product(square, node) if power == 3 else graph.Activation(square, "square"))


@rule("sum")
def _sum(r: Recorder, out: Tensor, x: Tensor, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    return _total(r, out, x, dims, lambda count: 1.0)


@rule("mean")
def _mean(r: Recorder, out: Tensor, x: Tensor, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    return _total(r, out, x, dims, lambda count: 1.0 / count)


def _total(r: Recorder, out: Tensor, x: Tensor, dims: Any, factor: Callable[[int], float]) -> Any:
    dims = list(range(x.dim())) if dims is None or len(dims) == 0 else [d % x.dim() for d in dims]
    if out.dtype != x.dtype:
        refuse(f"it sums into {out.dtype}")
    over_chains = 0 in dims
    if over_chains and math.prod(x.shape[1:]) != 1 and len(dims) != x.dim():
        refuse("it sums over the chains and not over all of their elements")
    node, count = r.node(x), math.prod(x.shape[d] for d in dims)
    shape, index = r.reduced(x, [d for d in dims if d])
    if index.shape[1] > 1:
        node = r.pick([node], shape, index)
    if factor(count) != 1:
        node = r.add(graph.Add((node,), (factor(count),)))
    return ("total", node) if over_chains else node


@rule("linalg_vector_norm")
def _norm(
    r: Recorder, out: Tensor, x: Tensor, order: float = 2, dims: Any = None, keepdim: bool = False, **_: Any
) -> int:
    if order not in (1, 2) or dims is None:
        refuse(f"it takes a norm of order {order} over dimensions {dims}")
    dims = [dims] if isinstance(dims, int) else dims
    not_chains(x, *dims)
    powers = r.add(graph.Activation(r.node(x), "abs" if order == 1 else "square"))
    shape, index = r.reduced(x, dims)
    total = r.pick([powers], shape, index)
    if order == 1:
        return total
    # torch's norm has the slope 0 at 0, where the root of a sum of squares has none: the smallest number that is not
    # denormal, 2^-126, is added under the root and its root, 2^-63, taken off. Of 0 the norm is 0, and numbers above
    # 1e-12 do not feel it.
    tiny, shape = torch.finfo(torch.float32).tiny, (1, *r.shapes[total])
    total = r.add(graph.Add((total,), (1.0,), x.new_full(shape, tiny)))
    root = r.add(graph.Activation(total, "sqrt"))
    return r.add(graph.Add((root,), (1.0,), x.new_full(shape, -(tiny**0.5))))


@rule("logsumexp")
def _logsumexp(r: Recorder, out: Tensor, x: Tensor, dims: Sequence[int], keepdim: bool = False) -> int:
    not_chains(x, *dims)
    shape, index = r.reduced(x, dims)
    return r.add(graph.LogSumExp(r.node(x), shape or (1,), index.contiguous()))


@rule("_log_softmax")
def _log_softmax(r: Recorder, out: Tensor, x: Tensor, dim: int, half_to_float: bool = False) -> int:
    not_chains(x, dim)
    shape, index = r.reduced(x, [dim])
    total = r.add(graph.LogSumExp(r.node(x), shape or (1,), index.contiguous()))
    kept = [1 if d == dim % x.dim() else n for d, n in enumerate(x.shape)]
    where = positions(kept[1:]).expand(x.shape[1:])
    return r.add(graph.Add((r.node(x), r.pick([total], tuple(x.shape[1:]), where)), (1.0, -1.0)))


@rule("_softmax")
def _softmax(r: Recorder, out: Tensor, x: Tensor, dim: int, half_to_float: bool = False) -> int:
    return r.add(graph.Activation(_log_softmax(r, out, x, dim), "exp"))


def _chosen(r: Recorder, x: Tensor, labels: Tensor) -> int:
    """x (chains, n) at each chain's own index ``labels`` (chains,)."""
    if r.value(labels) is not None:
        refuse("an index depends on the state")
    if not all(bool(t.isfinite().all()) for t in r.constants):  # none of which may be all that is left
        refuse("it chooses among numbers to which infinite ones were added")
    # the others are taken out of a sum of exponentials: 0 times one that overflowed would be NaN
    other = F.one_hot(labels.reshape(-1).expand(r.chains), x.shape[1]).logical_not()
    out = torch.zeros(other.shape, dtype=x.dtype, device=x.device).masked_fill(other, -torch.inf)
    left = r.add(graph.Add((r.node(x),), (1.0,), out if r.chains > 1 else out[:1]))
    return r.add(graph.LogSumExp(left, (1,), positions((1, x.shape[1]))))


@rule("gather")
def _gather(r: Recorder, out: Tensor, x: Tensor, dim: int, index: Tensor, **_: Any) -> int:
    if x.dim() != 2 or dim % 2 != 1 or index.shape != (r.chains, 1):
        refuse("it gathers otherwise than one element a chain")
    return _chosen(r, x, index)


@rule("index")
def _index(r: Recorder, out: Tensor, x: Tensor, indices: Sequence[Any]) -> int:
    if len(indices) == 2 and x.dim() == 2 and isinstance(indices[0], Tensor) and isinstance(indices[1], Tensor):
        rows = indices[0]
        if rows.shape == (r.chains,) and torch.equal(rows.long(), positions((r.chains,))):
            return _chosen(r, x, indices[1])
    if any(r.value(i) is not None for i in indices):
        refuse("an index depends on the state")
    return moved(r, out, x, take, indices)


@rule("nll_loss_forward")
def _nll(r: Recorder, out: Any, x: Tensor, labels: Tensor, weight: Any, reduction: int, ignore: int) -> list[Any]:
    if weight is not None or reduction not in (0, 1, 2) or x.dim() != 2 or bool((labels == ignore).any()):
        refuse("it has weights, ignored labels or positions in its negative log-likelihood")
    node = r.add(graph.Add((_chosen(r, x, labels),), (-1.0 if reduction != 1 else -1.0 / r.chains,)))
    return [node if reduction == 0 else ("total", node), None]


@rule("mse_loss")
def _mse(r: Recorder, out: Tensor, a: Any, b: Any, reduction: int = 1) -> Any:
    shape = torch.broadcast_shapes(a.shape, b.shape)
    node = r.add(graph.Activation(_add(r, a.new_empty(()).expand(shape), a, b, alpha=-1), "square"))
    if reduction == 0:
        return node
    total = r.summed(node)
    if reduction == 1:
        total = r.add(graph.Add((total,), (1.0 / math.prod(shape),)))
    return ("total", total)
