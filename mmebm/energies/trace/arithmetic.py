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
from mmebm.energies.trace.recorder import CPU, Recorder, positions, rule
from mmebm.ops.net import graph


def _elementwise(function: graph.Function) -> None:
    @rule(function, rows=True)
    def _(r: Recorder, out: Tensor, x: Tensor) -> int:
        return r.add(graph.Activation(r.node(x), function))


for _function in get_args(graph.Function):
    _elementwise(_function)  # those with arguments are below


@rule("leaky_relu", rows=True)
def _leaky_relu(r: Recorder, out: Tensor, x: Tensor, slope: float = 0.01) -> int:
    return r.add(graph.Activation(r.node(x), "leaky_relu", float(slope)))


@rule("elu", rows=True)
def _elu(r: Recorder, out: Tensor, x: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> int:
    if input_scale != 1:
        refuse(f"its elu has input_scale={input_scale}")
    node = r.add(graph.Activation(r.node(x), "elu", float(alpha)))
    return node if scale == 1 else r.add(graph.Add((node,), (float(scale),)))


@rule("celu", rows=True)
def _celu(r: Recorder, out: Tensor, x: Tensor, alpha: float = 1.0) -> int:
    node = r.add(graph.Activation(_shift(r, x, r.node(x), 1.0 / float(alpha), 0.0), "elu", 1.0))
    return _shift(r, x, node, float(alpha), 0.0)


@rule("gelu", rows=True)
def _gelu(r: Recorder, out: Tensor, x: Tensor, *, approximate: str = "none") -> int:
    node = r.node(x)
    if approximate == "none":
        return r.add(graph.Activation(node, "gelu"))
    # (1 + tanh(c (x + 0.044715 x^3))) / 2 is a sigmoid of twice that
    cube, twice = r.add(graph.Product(r.add(graph.Activation(node, "square")), node)), 2 * math.sqrt(2 / math.pi)
    gate = r.add(graph.Activation(r.add(graph.Add((node, cube), (twice, twice * 0.044715))), "sigmoid"))
    return r.add(graph.Product(node, gate))


@rule("mish", rows=True)
def _mish(r: Recorder, out: Tensor, x: Tensor) -> int:
    node = r.node(x)
    gate = r.add(graph.Activation(r.add(graph.Activation(node, "softplus")), "tanh"))
    return r.add(graph.Product(node, gate))


@rule("log_sigmoid_forward", rows=True)
def _log_sigmoid(r: Recorder, out: Any, x: Tensor) -> list[Any]:
    return [r.add(graph.Add((_softplus_of_minus(r, r.node(x)),), (-1.0,))), None]


def _softplus_of_minus(r: Recorder, node: int) -> int:
    return r.add(graph.Activation(r.add(graph.Add((node,), (-1.0,))), "softplus"))


@rule("softplus", rows=True)
def _softplus(r: Recorder, out: Tensor, x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> int:
    # threshold: from where on the function is taken for its argument, which changes less than rounding does
    if threshold * 1.0 < 15:
        refuse(f"its softplus has threshold={threshold}")
    if beta == 1:
        return r.add(graph.Activation(r.node(x), "softplus"))
    node = r.add(graph.Activation(r.add(graph.Add((r.node(x),), (float(beta),))), "softplus"))
    return r.add(graph.Add((node,), (1.0 / beta,)))


def _shift(r: Recorder, x: Tensor, node: int, factor: float, number: float) -> int:
    """``factor`` times the node plus a number."""
    if number == 0:
        return node if factor == 1 else r.add(graph.Add((node,), (factor,)))
    return r.add(graph.Add((node,), (factor,), x.new_full((1, *r.shapes[node]), number)))


def _limited(r: Recorder, x: Tensor, node: int, side: int, limit: float, *, slope: float = 1.0) -> int:
    """A relu that begins at ``limit``, of what is above it (``side`` 1) or below (-1), and the limit beyond. ``slope``:
    of the limit itself; where it is 1, as torch.clamp has it, the relu begins at the number before."""
    at = torch.tensor(limit, dtype=x.dtype, device=CPU)
    if slope:
        at = torch.nextafter(at, at - side * torch.inf) if limit != 0 else at - side * torch.finfo(torch.float32).tiny
    above = r.add(graph.Activation(_shift(r, x, node, float(side), -side * at.item()), "relu"))
    return _shift(r, x, above, float(side), at.item())


def _between(r: Recorder, x: Tensor, low: Any, high: Any, slope: float = 1.0) -> int:
    node = r.node(x)
    for side, given in ((1, low), (-1, high)):
        if isinstance(given, Tensor):
            if given.numel() != 1 or r.value(given) is not None:
                refuse("it clamps by a tensor")
            r.constants.append(given)
        limit = -side * math.inf if given is None else float(given)
        if limit == -side * math.inf:
            continue
        if not math.isfinite(limit):
            refuse(f"it clamps by {limit}")
        node = _limited(r, x, node, side, limit, slope=slope)
    return node


@rule("clamp", rows=True)
def _clamp(r: Recorder, out: Tensor, x: Tensor, min: Any = None, max: Any = None) -> int:
    return _between(r, x, min, max)


@rule("clamp_min", rows=True)
def _clamp_min(r: Recorder, out: Tensor, x: Tensor, min: Any) -> int:
    return _between(r, x, min, None)


@rule("clamp_max", rows=True)
def _clamp_max(r: Recorder, out: Tensor, x: Tensor, max: Any) -> int:
    return _between(r, x, None, max)


@rule("hardtanh", rows=True)
def _hardtanh(r: Recorder, out: Tensor, x: Tensor, low: float = -1.0, high: float = 1.0) -> int:
    return _between(r, x, low, high, slope=0.0)


@rule("hardsigmoid", rows=True)
def _hardsigmoid(r: Recorder, out: Tensor, x: Tensor, slope: float = 0.0) -> int:
    return _shift(r, x, _between(r, x, -3.0, 3.0, slope), 1 / 6, 0.5)


@rule("hardswish", rows=True)
def _hardswish(r: Recorder, out: Tensor, x: Tensor) -> int:
    return r.add(graph.Product(r.node(x), _hardsigmoid(r, out, x, slope=1.0)))


@rule("_prelu_kernel")
def _prelu(r: Recorder, out: Tensor, x: Tensor, weight: Tensor) -> int:
    up = r.add(graph.Activation(r.node(x), "relu"))
    # at 0 the slope is the weight
    down = r.add(graph.Activation(_shift(r, x, r.node(x), -1.0, torch.finfo(torch.float32).tiny), "relu"))
    return r.add(graph.Add((up, r.affine(down, -r.constant(weight, out, out.shape), None)), (1.0, 1.0)))


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


@rule("neg", rows=True)
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


@rule("linalg_vector_norm", "norm")
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
    tiny = torch.finfo(torch.float32).tiny
    root = r.add(graph.Activation(_shift(r, x, total, 1.0, tiny), "sqrt"))
    return _shift(r, x, root, 1.0, -(tiny**0.5))


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


def _loss(r: Recorder, node: int, shape: Sequence[int], reduction: int) -> Any:
    """Of the loss of each element; ``reduction``: 0 none, 1 the mean, 2 the sum."""
    if reduction == 0:
        return node
    total = r.summed(node)
    if reduction == 1:
        total = r.add(graph.Add((total,), (1.0 / math.prod(shape),)))
    return ("total", total)


@rule("mse_loss")
def _mse(r: Recorder, out: Tensor, a: Any, b: Any, reduction: int = 1) -> Any:
    shape = torch.broadcast_shapes(a.shape, b.shape)
    node = r.add(graph.Activation(_add(r, a.new_empty(()).expand(shape), a, b, alpha=-1), "square"))
    return _loss(r, node, shape, reduction)


@rule("huber_loss")
def _huber(r: Recorder, out: Tensor, a: Any, b: Any, reduction: int = 1, delta: float = 1.0, scale: float = 1.0) -> Any:
    shape = torch.broadcast_shapes(a.shape, b.shape)
    like = a.new_empty(()).expand(shape)
    apart = r.add(graph.Activation(_add(r, like, a, b, alpha=-1), "abs"))
    # with c = min(|a - b|, delta): c^2 / 2 + delta (|a - b| - c)
    near = _limited(r, a, apart, -1, delta, slope=0.0)
    parts = (r.add(graph.Activation(near, "square")), apart, near)
    return _loss(r, r.add(graph.Add(parts, (0.5 * scale, delta * scale, -delta * scale))), shape, reduction)


@rule("smooth_l1_loss")
def _smooth_l1(r: Recorder, out: Tensor, a: Any, b: Any, reduction: int = 1, beta: float = 1.0) -> Any:
    if beta <= 0:
        refuse("its smooth_l1_loss has beta=0")
    return _huber(r, out, a, b, reduction, beta, 1.0 / beta)


@rule("binary_cross_entropy_with_logits")
def _bernoulli(
    r: Recorder, out: Tensor, x: Tensor, target: Tensor, weight: Any = None, pos_weight: Any = None, reduction: int = 1
) -> Any:
    if weight is not None or pos_weight is not None or r.value(target) is not None:
        refuse("its cross-entropy of logits has weights, or a target that depends on the state")
    node = r.node(x)
    on = r.affine(node, 1.0 - r.constant(target, x, x.shape), None)
    return _loss(r, r.add(graph.Add((_softplus_of_minus(r, node), on), (1.0, 1.0))), x.shape, reduction)
