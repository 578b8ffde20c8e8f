"""What is written down while an energy is called: nodes, and which tensor stands for which of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmebm.energies.lower.attempt import refuse
from mmebm.ops.net import graph

CPU = torch.device("cpu")
# By an operation's name: (recorder, the operation's result, its arguments as given) -> the result's node, None for a
# result that is not read, ("total", node) for the node's sum over the chains; a list of these for several results
Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}
# Those that also take tensors whose first dimension is chains and positions in one, as of a layer over points
ROWS: set[str] = set()


def rule(*names: str, rows: bool = False) -> Callable[[Rule], Rule]:
    """Makes a function the rule of the operations ``names``; ``rows``: see :data:`ROWS`."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        ROWS.update(names if rows else ())
        return function

    return register


def positions(shape: Sequence[int]) -> Tensor:
    """The row-major position of each element: int64 of this shape."""
    return torch.arange(math.prod(shape), dtype=torch.int64, device=CPU).reshape(tuple(shape))


@dataclass(frozen=True)
class Value:
    """What a tensor stands for: a node; ``total`` where it is the node's sum over the chains; ``rows`` where its first
    dimension is the chains and the node's first dimension in one."""

    tensor: Tensor  # kept, so that its id stays its own
    node: int
    total: bool = False
    rows: bool = False


class Recorder:
    """The nodes so far, and which tensor is which."""

    def __init__(self, chains: int) -> None:
        self.chains = chains
        self.rows = False  # whether the rule at work is among ROWS
        self.nodes: list[graph.Node] = []
        self.shapes: list[tuple[int, ...]] = []
        self.values: dict[int, Value] = {}
        self.constants: list[Tensor] = []

    def add(self, node: graph.Node) -> int:
        shape = graph.shape_of(node, self.shapes)
        if min(shape) < 1:
            refuse("it computes with a tensor of no elements")
        self.nodes.append(node)
        self.shapes.append(shape)
        return len(self.nodes) - 1

    def value(self, t: Any) -> Value | None:
        return self.values.get(id(t)) if isinstance(t, Tensor) else None

    def keep(self, t: Tensor, node: int, total: bool = False, *, rows: bool = False) -> None:
        """Notes that ``t`` is a node; ``rows``: it may have chains and positions in its first dimension."""
        rows = rows and not total and t.dim() > 0 and t.shape[0] > self.chains and t.shape[0] % self.chains == 0
        if not total:
            shape = (t.shape[0] // self.chains, *t.shape[1:]) if rows else tuple(t.shape[1:])
            each = rows or (t.dim() > 0 and t.shape[0] == self.chains)
            if not each or math.prod(shape) != math.prod(self.shapes[node]):
                refuse(f"a result of shape {tuple(t.shape)} is not one per chain ({self.chains} chains)")
            if (shape or (1,)) != self.shapes[node]:
                node = self.add(graph.View(node, shape or (1,)))
        self.values[id(t)] = Value(t, node, total, rows)

    # -- parts of rules

    def node(self, t: Tensor) -> int:
        """The node of a tensor that has one per chain."""
        value = self.value(t)
        if value is None or value.total:
            refuse("it computes with sums over the chains")
        if value.rows and not self.rows:
            refuse("it computes with chains and positions in one dimension")
        return value.node

    def constant(self, t: Any, like: Tensor, out: torch.Size) -> Tensor:
        """A number or tensor that does not read the state, as (1 or chains, *shape of a node)."""
        t = torch.as_tensor(t, dtype=like.dtype, device=like.device).detach()
        self.constants.append(t)
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
            refuse(f"it computes with shapes {tuple(t.shape)} and {tuple(out)}")
        return self.pick([node], tuple(out[1:]), positions(t.shape[1:]).expand(out[1:]))

    def pick(self, nodes: list[int], shape: tuple[int, ...], index: Tensor, weight: Tensor | None = None) -> int:
        """A :class:`~mmebm.ops.net.graph.Map`; without one where it would change nothing."""
        shape = shape or (1,)
        size = math.prod(shape)
        if size == 0:
            refuse("it computes with a tensor of no elements")
        index = index.reshape(size, -1).to(torch.int64)
        whole = len(nodes) == 1 and weight is None and index.shape[1] == 1 and size == math.prod(self.shapes[nodes[0]])
        if whole and torch.equal(index[:, 0], positions((size,))):
            return nodes[0] if self.shapes[nodes[0]] == shape else self.add(graph.View(nodes[0], shape))
        return self.add(graph.Map(tuple(nodes), shape, index.contiguous(), weight))

    def reduced(self, t: Tensor, dims: Sequence[int]) -> tuple[tuple[int, ...], Tensor]:
        """(shape of what is left, index (elements left, elements of each sum)) where ``dims`` (not 0) go."""
        shape = t.shape[1:]
        index = positions(shape)
        gone = sorted((d % t.dim()) - 1 for d in dims)
        left = [d for d in range(len(shape)) if d not in gone]
        if not gone:
            return tuple(shape), index.reshape(-1, 1)
        index = index.permute(*left, *gone).reshape(math.prod([shape[d] for d in left]), -1)
        return tuple(shape[d] for d in left), index

    def summed(self, node: int) -> int:
        """The sum of each chain's elements of ``node``."""
        return self.pick([node], (), positions((1, math.prod(self.shapes[node]))))

    def affine(self, node: int, scale: Tensor, shift: Tensor | None) -> int:
        return self.add(graph.Affine(node, scale, shift))

    def channels(self, t: Tensor | None, shape: Sequence[int], default: float, like: Tensor) -> Tensor:
        """A constant per channel, over the shape of a node."""
        t = torch.full((shape[0],), default, dtype=like.dtype, device=CPU) if t is None else t.detach()
        return t.reshape(1, -1, *[1] * (len(shape) - 1)).expand(1, *shape).contiguous()
