"""Arithmetic chain by chain, and of settings that are numbers or tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from mmebm.ops.common.layout import per_chain
from mmebm.ops.dynamics import finite_rows_
from mmebm.samplers.settings import Value


def finite_chains(tensors: Sequence[Tensor], chains: int, device: torch.device) -> Tensor:
    """bool (chains,): where all these tensors (chains, ...) are finite."""
    alive = torch.ones(chains, dtype=torch.bool, device=device)
    for t in tensors:
        finite_rows_(alive, t)
    return alive


def per_chain_shape(value: Tensor, like: Tensor) -> Tensor:
    """(chains,) reshaped so that it broadcasts against ``like``, (chains, ...), which keeps its dtype."""
    value = value.to(like.dtype) if value.is_floating_point() else value
    return value.reshape(-1, *[1] * (like.dim() - 1))


def sqrt(value: Value) -> Value:
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


def exp(value: Value) -> Value:
    return value.exp() if isinstance(value, Tensor) else math.exp(value)


def where(rows: Tensor, yes: Sequence[Tensor], no: Sequence[Tensor]) -> list[Tensor]:
    """Chain by chain from ``yes`` or ``no``."""
    return [torch.where(per_chain_shape(rows, a), a, b) for a, b in zip(yes, no, strict=True)]


def total(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """The sum over all elements and tensors, (chains,); zeros like ``like`` without any."""
    out = torch.zeros_like(like)
    for part in parts:
        out = out + per_chain(part).sum(1)
    return out


def masked(mask: bool | Tensor | None, value: Tensor) -> Tensor:
    """``value`` with 0 in the elements that a mask marks."""
    return value.masked_fill(mask, 0.0) if isinstance(mask, Tensor) else value


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """``function`` of every tensor in nested lists, tuples and dicts. Where it changes none these are the same objects,
    as an energy may write to a list or dict that it is given."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (list, tuple):
        parts = [map_tensors(part, function) for part in value]
        return value if all(a is b for a, b in zip(parts, value, strict=True)) else type(value)(parts)
    if type(value) is dict:
        entries = cast("dict[Any, Any]", value)
        mapped = {name: map_tensors(part, function) for name, part in entries.items()}
        return entries if all(mapped[name] is part for name, part in entries.items()) else mapped
    return value
