"""What is done to the nodes of a trace before they are a net: the needed ones alone, norms folded into convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mmebm.ops.net import graph


def pruned(nodes: Sequence[graph.Node], last: int) -> list[graph.Node]:
    """The nodes that ``last`` needs, it at the end."""
    needed, waiting = set(), [last]
    while waiting:
        i = waiting.pop()
        if i not in needed:
            needed.add(i)
            waiting.extend(graph.reads(nodes[i]))
    order = {old: new for new, old in enumerate(sorted(needed))}
    return [graph.renumbered(nodes[old], order) for old in sorted(needed)]


def _users(nodes: Sequence[graph.Node]) -> list[int]:
    counts = [0] * len(nodes)
    for node in nodes:
        for i in graph.reads(node):
            counts[i] += 1
    return counts


def folded(nodes: list[graph.Node]) -> list[graph.Node]:
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
