"""Rules for layers: convolutions, matrices, pooling, upsampling, norms, and this library's residual."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmebm.energies.lower.attempt import refuse
from mmebm.energies.trace.recorder import CPU, Recorder, positions, rule
from mmebm.ops.net import graph


@rule("convolution", "_convolution")
def _convolution(
    r: Recorder,
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    *_: Any,
) -> int:
    if r.value(weight) is not None or r.value(bias) is not None:
        refuse("a weight depends on the state")
    if x.dim() not in (3, 4):
        refuse(f"it has a convolution over {x.dim() - 2} dimensions")
    node, pairs = r.node(x), [list(stride), list(padding), list(dilation), list(output_padding)]
    weight = weight.detach()
    if x.dim() == 3:
        node = r.add(graph.View(node, (x.shape[1], 1, x.shape[2])))
        weight = weight.unsqueeze(2)
        pairs = [[one, *pair] for one, pair in zip((1, 0, 1, 0), pairs, strict=True)]
    by, pad, dilate, more = [(a, b) for a, b in pairs]
    bias = None if bias is None else bias.detach().contiguous()
    return r.add(graph.Conv(node, weight.contiguous(), bias, by, pad, dilate, groups, transposed, more))


def _linear(r: Recorder, x: Tensor, matrix: Tensor, bias: Tensor | None) -> int:
    """x (chains, n), or (chains times positions, n), times ``matrix`` (n, outputs)."""
    if r.value(matrix) is not None or r.value(bias) is not None:
        refuse("it multiplies matrices that depend on the state")
    if bias is not None:
        bias = bias.detach().expand(matrix.shape[1]).contiguous()
    node, weight = r.node(x), matrix.detach().t().contiguous()
    if len(r.shapes[node]) == 1:
        return r.add(graph.Linear(node, weight, bias))
    # one layer for every position: a convolution of one tap, whose channels come first
    count, channels = r.shapes[node]
    first = r.pick([node], (channels, 1, count), positions((count, channels)).t())
    out = r.add(graph.Conv(first, weight[:, :, None, None], bias))
    return r.pick([out], (count, weight.shape[0]), positions((weight.shape[0], count)).t())


@rule("mm", rows=True)
def _mm(r: Recorder, out: Tensor, x: Tensor, matrix: Tensor) -> int:
    return _linear(r, x, matrix, None)


@rule("addmm", rows=True)
def _addmm(
    r: Recorder, out: Tensor, bias: Tensor, x: Tensor, matrix: Tensor, *, beta: float = 1, alpha: float = 1
) -> int:
    if beta != 1 or alpha != 1 or bias.dim() > 1:
        refuse("it adds matrices with factors")
    return _linear(r, x, matrix, bias)


@rule("mv", rows=True)
def _mv(r: Recorder, out: Tensor, x: Tensor, vector: Tensor) -> int:
    return _linear(r, x, vector.unsqueeze(1), None)


def _pooled(r: Recorder, x: Tensor, index: Tensor, weight: Tensor | None, sides: Sequence[int]) -> int:
    """``index``, ``weight`` (positions out, k) of one channel -> a node for all channels."""
    channels, size = x.shape[1], math.prod(x.shape[2:])
    offsets = (positions((channels,)) * size).reshape(-1, 1, 1)
    every = torch.where(index < 0, index, index + offsets).reshape(channels * index.shape[0], -1)
    if weight is not None:
        weight = weight.to(x.dtype).repeat(channels, 1)
    return r.pick([r.node(x)], (channels, *sides), every, weight)


def _windows(sides: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """(positions out, elements of a window), -1 beyond the border."""
    index = (positions(sides) + 1).double().reshape(1, 1, *sides)
    windows = F.unfold(index, tuple(kernel), padding=tuple(padding), stride=tuple(stride))
    return windows[0].t().round().long() - 1


def _pair(value: Any) -> list[int]:
    value = [value] if isinstance(value, int) else list(value)
    return value * 2 if len(value) == 1 else value


@rule("avg_pool2d")
def _avg_pool2d(
    r: Recorder,
    out: Tensor,
    x: Tensor,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: Any = None,
) -> int:
    kernel, padding = _pair(kernel), _pair(padding)
    stride = _pair(stride) if stride else kernel
    index = _windows(x.shape[2:], kernel, stride, padding)
    if ceil_mode or x.dim() != 4 or index.shape[0] != math.prod(out.shape[2:]):
        refuse("its average pooling has ceil_mode")
    inside = (index >= 0).double()
    count = float(math.prod(kernel)) if count_include_pad else inside.sum(1, keepdim=True)
    if divisor_override is not None:
        count = float(divisor_override)
    return _pooled(r, x, index, (inside / count).expand(index.shape), out.shape[2:])


@rule("avg_pool1d")
def _avg_pool1d(
    r: Recorder,
    out: Tensor,
    x: Tensor,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> int:
    k, s, p = (v if isinstance(v, int) else next(iter(v)) for v in (kernel, stride or kernel, padding))
    index = _windows((1, x.shape[2]), (1, k), (1, s), (0, p))
    if ceil_mode or index.shape[0] != out.shape[2]:
        refuse("its average pooling has ceil_mode")
    inside = (index >= 0).double()
    count = float(k) if count_include_pad else inside.sum(1, keepdim=True)
    return _pooled(r, x, index, (inside / count).expand(index.shape), out.shape[2:])


def _linear_map(one: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """(outputs, size): the matrix of a linear map of one row of numbers."""
    return one(torch.eye(size, dtype=torch.float64, device=CPU).unsqueeze(1)).squeeze(1).t()


def _separable(r: Recorder, x: Tensor, out: Tensor, maps: Sequence[Tensor]) -> int:
    """``out`` as a map of rows times a map of columns, each (out, in), of ``x``; in one dimension of columns alone."""
    rows, columns = maps if len(maps) == 2 else (torch.ones(1, 1, dtype=maps[0].dtype, device=CPU), maps[0])
    most = [int((m != 0).sum(1).max()) for m in (rows, columns)]
    weight, index = [], []
    for m, k in zip((rows, columns), most, strict=True):
        where = m.abs().topk(k, dim=1).indices
        index.append(where)
        weight.append(m.gather(1, where))
    at = index[0][:, None, :, None] * x.shape[-1] + index[1][None, :, None, :]
    by = weight[0][:, None, :, None] * weight[1][None, :, None, :]
    shape = (rows.shape[0] * columns.shape[0], -1)
    return _pooled(r, x, at.reshape(shape), by.reshape(shape), out.shape[2:])


@rule("_adaptive_avg_pool2d")
def _adaptive_avg_pool2d(r: Recorder, out: Tensor, x: Tensor, size: Sequence[int]) -> int:
    maps = [
        _linear_map(lambda e, n=n: F.adaptive_avg_pool1d(e, n), side)
        for side, n in zip(x.shape[2:], out.shape[2:], strict=True)
    ]
    return _separable(r, x, out, maps)


def _upsampled(name: str, function: Callable[[Tensor, int, bool, Any], Tensor]) -> None:
    """``function`` (rows, new size, whether corners are aligned, scale) of one dimension."""

    @rule(name)
    def _(r: Recorder, out: Tensor, x: Tensor, size: Any, align: bool = False, *scales: Any) -> int:
        maps = []
        for i, (side, n) in enumerate(zip(x.shape[2:], out.shape[2:], strict=True)):
            scale = scales[i] if i < len(scales) else None
            maps.append(_linear_map(lambda e, n=n, s=scale: function(e, n, align, s), side))
        return _separable(r, x, out, maps)


_aten = torch.ops.aten
for _name in ("upsample_linear1d", "upsample_bilinear2d"):
    _upsampled(_name, lambda x, n, align, by: _aten.upsample_linear1d.default(x, [n], align, by))
_upsampled(
    "upsample_bicubic2d",
    lambda x, n, align, by: _aten.upsample_bicubic2d.default(x.unsqueeze(2), [1, n], align, None, by).squeeze(2),
)


@rule("native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit")
def _batch_norm(
    r: Recorder, out: Any, x: Tensor, weight: Any, bias: Any, mean: Any, variance: Any, *rest: Any
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


def _normed(r: Recorder, node: int, weight: Any, bias: Any, scale: Callable[[Any, float], Tensor]) -> list[int | None]:
    if weight is None and bias is None:
        return [node, None, None]
    return [r.affine(node, scale(weight, 1.0), None if bias is None else scale(bias, 0.0)), None, None]


def _normalised(r: Recorder, x: Tensor, groups: int, eps: float) -> int:
    """A group norm's node, of ``groups`` groups a chain."""
    if math.prod(x.shape[1:]) == groups:
        # whose result is 0, and whose gradient in a kernel what rounding leaves, times 1 / sqrt(eps)
        refuse("its norm has one element a group")
    return r.add(graph.Norm(r.node(x), groups, float(eps)))


@rule("native_group_norm")
def _group_norm(
    r: Recorder, out: Any, x: Tensor, weight: Any, bias: Any, n: int, c: int, hw: int, groups: int, eps: float
) -> list[int | None]:
    node = _normalised(r, x, groups, eps)
    return _normed(r, node, weight, bias, lambda t, default: r.channels(t, x.shape[1:], default, x))


@rule("native_layer_norm")
def _layer_norm(
    r: Recorder, out: Any, x: Tensor, shape: Sequence[int], weight: Any, bias: Any, eps: float
) -> list[int | None]:
    if len(shape) >= x.dim():
        refuse("it normalises over the chains")
    node = _normalised(r, x, math.prod(x.shape[1:]) // math.prod(shape), eps)

    def over(t: Any, default: float) -> Tensor:
        t = torch.full(tuple(shape), default, dtype=x.dtype, device=CPU) if t is None else t.detach()
        return t.expand(x.shape[1:]).unsqueeze(0).contiguous()

    return _normed(r, node, weight, bias, over)


@rule("residual")
def _residual(
    r: Recorder,
    out: Any,
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    likelihood: Sequence[str],
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    observed: Sequence[Tensor | None],
    *_: Any,
) -> list[Any]:
    """This library's op :mod:`mmebm.ops.residual`."""
    n, parts = len(predictions), []
    given = [number if t is None else t for number, t in zip(numbers, tensors, strict=True)]
    for y, t, kind, scale, weight, mask in zip(
        predictions, targets, likelihood, given[:n], given[n:], observed, strict=True
    ):
        if kind not in ("gaussian", "laplace") or r.value(y) is None or any(map(r.value, (t, scale, weight, mask))):
            refuse(f"it takes a {kind} residual of something else than predictions")
        shape = torch.Size((r.chains, *y.shape[1:]))
        t = t.to(y.dtype)
        if mask is not None:  # what is masked may hold anything
            t = torch.where(mask.to(torch.bool), t, 0.0)
        node = r.add(graph.Add((r.node(y),), (1.0,), -r.constant(t, y, shape)))
        if mask is not None:
            node = r.affine(node, r.constant(mask.to(y.dtype), y, shape), None)
        node = r.add(graph.Activation(node, "square" if kind == "gaussian" else "abs"))
        node = r.summed(node)
        factor = weight / (2 * scale**2) if kind == "gaussian" else weight / scale
        if isinstance(factor, Tensor):
            factor = factor.to(y.dtype).reshape(-1).expand(r.chains).reshape(r.chains, 1).contiguous()
            parts.append((r.affine(node, factor if r.chains > 1 else factor[:1], None), 1.0))
        else:
            parts.append((node, float(factor)))
    nodes, coefficients = zip(*parts, strict=True)
    return [r.add(graph.Add(nodes, coefficients)), None]
