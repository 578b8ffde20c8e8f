"""Rules for operations that only move elements: views, permutations, slices, padding, concatenation."""

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


@rule("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", rows=True)
def _view(r: Recorder, out: Tensor, x: Tensor, *_: Any, **__: Any) -> int:
    return r.node(x)  # keep() gives it its shape


@rule("alias", "clone", "_to_copy", "contiguous", "lift_fresh")
def _same(r: Recorder, out: Tensor, x: Tensor, *_: Any, **__: Any) -> int:
    if out.dtype != x.dtype or out.device != x.device:
        refuse(f"it casts {x.dtype} on {x.device} to {out.dtype} on {out.device}")
    return r.node(x)


def moved(r: Recorder, out: Tensor, x: Tensor, move: Callable[..., Tensor], *args: Any, **kwargs: Any) -> int:
    """The node of an operation ``move`` that only moves elements: what it does to their positions."""
    node = r.node(x)
    # those of one chain, seen as those of all
    index = move(positions(x.shape[1:]).expand(x.shape), *args, **kwargs)
    return r.pick([node], tuple(out.shape[1:]), index[:1])


def _moves(*names: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Registers an operation on positions as the rule of the operations ``names``. It must spare the chains."""

    def register(move: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @rule(*names)
        def _(r: Recorder, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> int:
            return moved(r, out, x, move, *args, **kwargs)

        return move

    return register


def not_chains(x: Tensor, *dims: int) -> None:
    if any(d % x.dim() == 0 for d in dims):
        refuse("it moves elements between chains")


@_moves("permute")
def _permute(x: Tensor, dims: Sequence[int]) -> Tensor:
    if dims[0] % x.dim() != 0:
        refuse("it moves the dimension of the chains")
    return x.permute(*dims)


@_moves("transpose", "t")
def _transpose(x: Tensor, a: int = 0, b: int = 1) -> Tensor:
    if a % x.dim() != b % x.dim():
        not_chains(x, a, b)
    return x.transpose(a, b)


@_moves("slice")
def _slice(x: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Tensor:
    y = torch.ops.aten.slice.Tensor(x, dim, start, end, step)
    if dim % x.dim() == 0 and y.shape != x.shape:
        refuse("it takes some of the chains")
    return y


@_moves("select")
def _select(x: Tensor, dim: int, index: int) -> Tensor:
    not_chains(x, dim)
    return x.select(dim, index)


@_moves("flip")
def _flip(x: Tensor, dims: Sequence[int]) -> Tensor:
    not_chains(x, *dims)
    return torch.flip(x, list(dims))


@_moves("roll")
def _roll(x: Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> Tensor:
    not_chains(x, *(dims or (0,)))
    return x.roll(tuple(shifts), tuple(dims))


@_moves("repeat")
def _repeat(x: Tensor, repeats: Sequence[int]) -> Tensor:
    if len(repeats) != x.dim() or repeats[0] != 1:
        refuse("it repeats chains")
    return x.repeat(*repeats)


@_moves("expand")
def _expand(x: Tensor, size: Sequence[int], **_: Any) -> Tensor:
    if len(size) != x.dim():
        refuse("it adds a dimension before the chains")
    return x.expand(*size)


@_moves("constant_pad_nd")
def _pad(x: Tensor, pad: Sequence[int], value: float = 0.0) -> Tensor:
    if value != 0:
        refuse(f"it pads with {value}")
    if len(pad) // 2 >= x.dim():
        refuse("it pads chains")
    return F.pad(x[:1] + 1, pad) - 1


@_moves("reflection_pad1d", "reflection_pad2d")
def _reflected(x: Tensor, pad: Sequence[int]) -> Tensor:
    return F.pad(x[:1].double(), list(pad), mode="reflect").round()


@_moves("replication_pad1d", "replication_pad2d")
def _replicated(x: Tensor, pad: Sequence[int]) -> Tensor:
    return F.pad(x[:1].double(), list(pad), mode="replicate").round()


@_moves("upsample_nearest2d", "upsample_nearest1d")
def _nearest(x: Tensor, size: Sequence[int], *scales: Any) -> Tensor:
    function = getattr(torch.ops.aten, f"upsample_nearest{len(size)}d").default
    return function(x[:1].double(), size, *scales).round()


def take(x: Tensor, indices: Sequence[Any]) -> Tensor:
    if not indices or indices[0] is not None:
        refuse("it indexes chains")
    return x[tuple(slice(None) if i is None else i for i in indices)]


@_moves("pixel_shuffle")
def _shuffle(x: Tensor, factor: int) -> Tensor:
    return F.pixel_shuffle(x[:1].double(), factor).round()


@rule("split", "split_with_sizes")
def _split(r: Recorder, out: Sequence[Tensor], x: Tensor, sizes: Any, dim: int = 0) -> list[int]:
    not_chains(x, dim)
    node = r.node(x)
    parts = positions(x.shape[1:]).unsqueeze(0).split(sizes, dim)
    return [r.pick([node], tuple(part.shape[1:]), part) for part in parts]


@rule("unbind")
def _unbind(r: Recorder, out: Sequence[Tensor], x: Tensor, dim: int = 0) -> list[int]:
    not_chains(x, dim)
    node = r.node(x)
    parts = positions(x.shape[1:]).unsqueeze(0).unbind(dim)
    return [r.pick([node], tuple(part.shape[1:]), part) for part in parts]


def _joined(r: Recorder, parts: Sequence[Tensor], dim: int, join: Callable[..., Tensor], out: Tensor) -> int:
    nodes, pieces, start = [], [], 0
    for part in parts:
        if r.value(part) is None:
            t = part.detach().to(out.dtype)
            if bool((t == t[:1]).all()):
                t = t[:1]
            # a node that is the constant whatever it reads
            zero = torch.full((math.prod(t.shape[1:]), 1), -1, dtype=torch.int64, device=CPU)
            first = next(r.node(p) for p in parts if r.value(p) is not None)
            shape = tuple(t.shape[1:]) or (1,)
            empty = r.add(graph.Map((first,), shape, zero))
            nodes.append(r.add(graph.Add((empty,), (1.0,), t.reshape(-1, *shape).contiguous())))
        else:
            nodes.append(r.node(part))
        pieces.append(start + positions(part.shape[1:]).unsqueeze(0))
        start += math.prod(part.shape[1:])
    return r.pick(nodes, tuple(out.shape[1:]), join(pieces, dim))


@rule("cat")
def _cat(r: Recorder, out: Tensor, parts: Sequence[Tensor], dim: int = 0) -> int:
    not_chains(out, dim)
    parts = [p for p in parts if p.shape != (0,)]
    return _joined(r, parts, dim, torch.cat, out)


@rule("stack")
def _stack(r: Recorder, out: Tensor, parts: Sequence[Tensor], dim: int = 0) -> int:
    not_chains(out, dim)
    return _joined(r, parts, dim, torch.stack, out)
