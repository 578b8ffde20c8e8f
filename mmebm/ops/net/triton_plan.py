"""A net as launches of :mod:`mmebm.kernels.net`: which, in which order, and where everything lies in a chain's row.

Views share their input's place. A convolution or linear layer takes what follows it into its kernel: a residual sum
that nothing else needs, and an activation, whose slope is stored beside its value. Backwards, a gradient is a sum of
contributions, one from each reader. What only passes a gradient on (a sum, a view) writes nothing: its own place is
noted, and read where the next kernel adds to the same gradient. The last one to write multiplies by the slope.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from mmebm import noise
from mmebm.kernels import net as kernels
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
    reads,
    shapes_of,
)
from mmebm.ops.net.op import NetChain

__all__ = ["BUILT", "OPTIONS", "IndexLists", "Launch", "Plan", "plan_of", "room_of"]

OPTIONS: Final = ("num_warps", "num_stages", "enable_fp_fusion")
_NONE: Final = kernels.NONE
_WAVE: Final = 32 if torch.version.hip is None else 64


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel: what it is given beside the workspace's tensors."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class IndexLists:
    """The index lists of a :class:`Map` or :class:`LogSumExp`: where they lie among the lists, for ``total`` elements
    that are read, which lie at ``places`` of the row."""

    node: int
    list_at: int
    starts_at: int
    sorted_at: int
    places: tuple[tuple[int, int], ...]  # (first place, elements) of each source
    total: int


@dataclass
class Plan:
    """The launches of a step, and how much memory they need.

    Attributes:
        row, tensors, lists, parts: numbers of a chain's row, of all tensors of the net, of the index lists, and sums
            of squares of a chain.
        at: places in the row: x, c, n, g (see ``rule_kernel``), "one", whose value is 1, and "energy".
        tensors_at: per tensor of the net where it lies.
        updates: whether the first layers' gradients go straight into the update.
    """

    row: int = 0
    tensors: int = 0
    lists: int = 0
    parts: int = 0
    at: dict[str, int] = field(default_factory=dict[str, int])
    tensors_at: list[int] = field(default_factory=list[int])
    indices: list[IndexLists] = field(default_factory=list[IndexLists])
    launches: list[Launch] = field(default_factory=list[Launch])
    updates: bool = False


@dataclass(frozen=True, slots=True)
class _Group:
    """A product with what follows it in the same kernel: a residual sum, and an activation."""

    layer: int
    tail: int
    rest: tuple[int, float] | None
    function: Activation | None


def room_of(n: int) -> int:
    return -(-n // 4) * 4


class _Planner:
    """Builds the :class:`Plan` of a net for so many chains; ``chain`` adds the update."""

    def __init__(self, net: Net, chains: int, inputs: int, mode: str, chain: NetChain | None) -> None:
        self.nodes: tuple[Any, ...] = net.nodes
        self.chains, self.inputs, self.mode, self.chain = chains, inputs, mode, chain
        self.plan, self.shapes = Plan(), shapes_of(net)
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.roots: list[int] = []
        for i, node in enumerate(self.nodes):
            self.roots.append(self.roots[node.x] if isinstance(node, View) else i)
        self.last = self.roots[-1]
        self.weights: dict[int, dict[str, int]] = {}
        for i, node in enumerate(self.nodes):
            for name in node.__dataclass_fields__:
                t = getattr(node, name)
                if isinstance(t, Tensor) and name != "index":
                    self.weights.setdefault(i, {})[name] = self.plan.tensors
                    self.plan.tensors_at.append(self.plan.tensors)
                    self.plan.tensors += room_of(t.numel())
        self._find_users()
        self._find_groups()
        self._lay_out()
        self.rstd: dict[int, int] = {}
        self.gradients: dict[int, int] = {}
        self.pending: dict[int, list[tuple[int, float]]] = {}
        self.left: dict[int, int] = {}
        self.stored: set[int] = set()
        self.steep: set[int] = set()  # those whose gradient has been multiplied by the slope

    # the net as the kernels see it

    def _find_users(self) -> None:
        """``users``: of each root the nodes that read it, once for each time; ``moving``: what the gradient reaches."""
        self.live = {self.last}
        for i in reversed(range(len(self.nodes))):
            if i in self.live:
                self.live.update(self.roots[r] for r in reads(self.nodes[i]))
        self.users: dict[int, list[int]] = {i: [] for i in self.live}
        self.moving: set[int] = set()
        for i in sorted(self.live):
            for r in reads(self.nodes[i]):
                self.users[self.roots[r]].append(i)
            node = self.nodes[i]
            if isinstance(node, Input):
                if self._moves(node.start, self.sizes[i]):
                    self.moving.add(i)
            elif any(self.roots[r] in self.moving for r in reads(node)):
                self.moving.add(i)

    def _moves(self, start: int, size: int) -> bool:
        if self.chain is None:
            return True
        at = 0
        for width, moves in zip(self.chain.widths, self.chain.moving, strict=True):
            if moves and start < at + width and at < start + size:
                return True
            at += width
        return False

    def _find_groups(self) -> None:
        """``groups``: by tail."""
        self.groups: dict[int, _Group] = {}
        self.inner: set[int] = set()  # of a group, and not its tail
        claimed: set[int] = set()
        for i in sorted(self.live):
            if not isinstance(self.nodes[i], (Conv, Linear)):
                continue
            tail, rest, function = i, None, None
            user = self._only_user(tail)
            if isinstance(user, Add) and user.shift is None and len(user.xs) == 2:
                sides = [self.roots[x] for x in user.xs]
                own = sides.index(tail)
                following = self.users[tail][0]
                if sides[0] != sides[1] and user.coefficients[own] == 1.0 and following not in claimed:
                    rest, tail = (sides[1 - own], float(user.coefficients[1 - own])), following
                    claimed.add(following)
            user = self._only_user(tail)
            if isinstance(user, Activation) and self.users[tail][0] != self.last:
                function, tail = user, self.users[tail][0]
            self.groups[tail] = _Group(i, tail, rest, function)
        for group in self.groups.values():
            self.inner.add(group.layer)
            if group.function is not None:
                self.inner.add(self.roots[group.function.x])
        self.inner -= self.groups.keys()

    def _only_user(self, i: int) -> Any:
        return self.nodes[self.users[i][0]] if len(self.users[i]) == 1 else None

    def _lay_out(self) -> None:
        plan, chain = self.plan, self.chain
        freeze = chain is not None and chain.freeze
        before = chain is not None and chain.noise_at == "before"
        plan.at["x"] = self._place(self.inputs)
        plan.at["g"] = self._place(self.inputs)
        plan.at["n"] = self._place(self.inputs) if freeze else plan.at["x"]
        plan.at["c"] = plan.at["n"] if before else plan.at["x"]
        plan.at["one"] = self._place(1)
        self.values: dict[int, int] = {}
        self.slopes: dict[int, int] = {}
        for i in sorted(self.live - self.inner):
            node = self.nodes[i]
            self.values[i] = plan.at["c"] + node.start if isinstance(node, Input) else self._place(self.sizes[i])
            group = self.groups.get(i)
            if isinstance(node, Activation) and (group is None or group.function is not None):
                self.slopes[i] = self._place(self.sizes[i])
        plan.at["energy"] = self.values[self.last]

    def _place(self, n: int) -> int:
        at = self.plan.row
        self.plan.row += room_of(n)
        return at

    # launches

    def _add(self, kernel: Any, grid: Sequence[int], **arguments: Any) -> None:
        warps = kernels.WARPS["product" if kernel is kernels.product_kernel else "others"] * 32 // _WAVE
        options = {"num_warps": warps, "enable_fp_fusion": True}
        self.plan.launches.append(Launch(kernel, tuple(grid), {"chains": self.chains, **options, **arguments}))

    def pointwise(self, n: int, u_at: int, out_at: int, **arguments: Any) -> None:
        absent = dict.fromkeys(("v_at", "scale_at", "shift_at", "rest_at", "function", "slope_at"), _NONE)
        zeros = {"times": 0, "scale_stride": 0, "shift_stride": 0, "v_scale": 0.0, "rest_scale": 0.0, "alpha": 0.0}
        given = {**absent, **zeros, "u_scale": 1.0, **arguments}
        grid = (-(-self.chains * n // kernels.BLOCK),)
        self._add(kernels.pointwise_kernel, grid, n=n, u_at=u_at, out_at=out_at, B=kernels.BLOCK, **given)

    def _product(self, i: int, backward: bool, *, in_at: int, out_at: int, update: int | None = None, **tail: Any):
        """A layer, or its gradient in x; ``update``: the tensor of the state whose update follows."""
        node = self.nodes[i]
        source, target, w = self.shapes[reads(node)[0]], self.shapes[i], node.weight
        if isinstance(node, Linear):
            outputs, inputs = w.shape
            n, r, wn, wr = (inputs, outputs, 1, inputs) if backward else (outputs, inputs, inputs, 1)
            sizes = {"KH": 1, "KW": 1, "IH": 1, "IW": 1, "OH": 1, "OW": 1}
            stride = padding = dilation = (1, 1)
            padding, groups, wg, spread = (0, 0), 1, 0, False
        else:
            first, second, kh, kw = w.shape  # of all groups, of one
            stride, padding, dilation, groups = node.stride, node.padding, node.dilation, node.groups
            if backward:
                source, target = target, source
            # the reduced side is the weight's second one, except in the gradient and in a transposed convolution
            spread = backward != node.transposed
            n, r = (second, first // groups) if spread else (first // groups, second)
            wn, wr = (kh * kw, second * kh * kw) if spread else (second * kh * kw, kh * kw)
            wg = (first // groups) * second * kh * kw
            sizes = {"KH": kh, "KW": kw, "IH": source[1], "IW": source[2], "OH": target[1], "OW": target[2]}
        classes = stride[0] * stride[1] if spread else 1
        cells = math.prod(
            -(-sizes[name] // s) if spread else sizes[name] for name, s in zip(("OH", "OW"), stride, strict=True)
        )
        block, positions = kernels.TILES[min(max(kernels.TILES), max(16, 1 << (n - 1).bit_length()))]
        tiles = -(-(cells if update is not None else self.chains * cells) // positions)
        blocks = groups * -(-n // block)
        period = [s // math.gcd(s, d) for s, d in zip(stride, dilation, strict=True)]
        absent = {
            "slope_at": _NONE,
            "rest_at": _NONE,
            "bias_at": _NONE,
            "function": _NONE,
            "alpha": 0.0,
            "rest_scale": 0.0,
        }
        ruled = {"parts": 0, "x_at": 0, "start": 0, "tensor": 0, "index": 0, "noisy": 0}
        if update is not None:
            chain = self.chain
            assert chain is not None
            start = sum(chain.widths[:update])
            ruled = {
                "x_at": self.plan.at["x"] + start,
                "start": start,
                "tensor": update,
                "index": noise.stream(chain.streams[update], noise.DRIFT),
                "noisy": int(chain.noisy[update] and chain.noise_at == "after"),
            }
            out_at = self.plan.parts
            self.plan.parts += classes * tiles * blocks
        self._add(
            kernels.product_kernel,
            ((self.chains if update is not None else 1) * classes * tiles, blocks),
            in_at=in_at,
            out_at=out_at,
            w_at=self.weights[i]["weight"],
            N=n,
            R=r,
            wn=wn,
            wr=wr,
            wg=wg,
            **sizes,
            SY=stride[0],
            SX=stride[1],
            PY=padding[0],
            PX=padding[1],
            DY=dilation[0],
            DX=dilation[1],
            QY=period[0],
            QX=period[1],
            spread=int(spread),
            tiles=tiles,
            classes=classes,
            **{**absent, **tail},
            **ruled,
            BN=block,
            BM=positions,
            BK=kernels.DEPTH,
            MODE=self.mode,
            UPDATE=update is not None,
            num_stages=3,
        )

    def _kind(self, i: int) -> type[Any]:
        return self.nodes[self.groups[i].layer if i in self.groups else i].__class__

    def _forward(self, i: int) -> None:
        """Launches what gives node ``i`` its value."""
        at = [self.values.get(self.roots[r], _NONE) for r in reads(self.nodes[i])]
        _KINDS[self._kind(i)].forward(self, i, self.nodes[i], at)

    def layer(self, i: int, node: Any, at: list[int]) -> None:
        group = self.groups[i]
        tail: dict[str, Any] = {"bias_at": self.weights[group.layer].get("bias", _NONE)}
        if group.rest is not None:
            tail |= {"rest_at": self.values[group.rest[0]], "rest_scale": group.rest[1]}
        if group.function is not None:
            tail |= self.called(group.function, i)
        in_at = self.values[self.roots[self.nodes[group.layer].x]]
        self._product(group.layer, False, in_at=in_at, out_at=self.values[i], **tail)

    def sum(self, i: int, node: Add, at: list[int]) -> None:
        n, out = self.sizes[i], self.values[i]
        pairs = list(zip(at, map(float, node.coefficients), strict=True))
        (u, p), more = pairs[0], {}
        if len(pairs) > 1:
            more = {"v_at": pairs[1][0], "v_scale": pairs[1][1]}
        self.pointwise(n, u, out, u_scale=p, **more, **self.per_chain(i, "shift"))
        for v, q in pairs[2:]:
            self.pointwise(n, out, out, v_at=v, v_scale=q)

    def normed(self, i: int, node: Norm, at: list[int]) -> None:
        self.rstd[i] = self._place(node.groups)
        self.norm(i, at[0], self.values[i], backward=0)

    def gathered(self, i: int, node: Map | LogSumExp, at: list[int]) -> None:
        lists, n = self._lists(i, node), self.sizes[i]
        k = node.index.shape[1]
        outputs, terms = kernels.FORMS[min(f for f in kernels.FORMS if f >= min(k, 512))]
        self._add(
            kernels.gather_kernel,
            (-(-self.chains * n // outputs),),
            n=n,
            k=k,
            list_at=lists.list_at,
            weight_at=self.weights.get(i, {}).get("weight", _NONE),
            out_at=self.values[i],
            lse=int(isinstance(node, LogSumExp)),
            BO=outputs,
            BK=terms,
        )

    def called(self, node: Activation, i: int) -> dict[str, Any]:
        return {
            "function": kernels.FUNCTIONS.index(node.function),
            "alpha": float(node.slope),
            "slope_at": self.slopes[i],
        }

    def per_chain(self, i: int, name: str) -> dict[str, int]:
        t = getattr(self.nodes[i], name)
        if t is None:
            return {}
        return {f"{name}_at": self.weights[i][name], f"{name}_stride": self.sizes[i] if t.shape[0] > 1 else 0}

    def norm(self, i: int, in_at: int, out_at: int, **arguments: Any) -> None:
        node = self.nodes[i]
        self._add(
            kernels.norm_kernel,
            (self.chains * node.groups,),
            **{"rest_at": _NONE, "rest_scale": 0.0, "slope_at": _NONE, **arguments},
            in_at=in_at,
            out_at=out_at,
            rstd_at=self.rstd[i],
            value_at=self.values[i],
            length=self.sizes[i] // node.groups,
            groups=node.groups,
            eps=float(node.eps),
            B=kernels.BLOCK,
        )

    def _lists(self, i: int, node: Map | LogSumExp) -> IndexLists:
        found = [lists for lists in self.plan.indices if lists.node == i]
        if found:
            return found[0]
        sources = [(self.values[self.roots[r]], self.sizes[r]) for r in reads(node)]
        total, entries = sum(n for _, n in sources), node.index.numel()
        at = self.plan.lists
        made = IndexLists(i, at, at + entries, at + entries + total + 1, tuple(sources), total)
        self.plan.lists += 2 * entries + total + 1
        self.plan.indices.append(made)
        return made

    # gradients: each is a sum of contributions, which come one by one, the user that is last in the net first

    def contribute(self, i: int, at: int, scale: float) -> None:
        """``scale`` times what is at ``at`` is part of the gradient of ``i``: added where that is cheapest."""
        if i in self.moving:
            self.left[i] -= 1
            self.pending.setdefault(i, []).append((at, scale))

    def target(self, i: int) -> dict[str, Any]:
        """Where a kernel writes its contribution to the gradient of ``i``, and what it does on the way."""
        self.left[i] -= 1
        return self._written(i)

    def _written(self, i: int) -> dict[str, Any]:
        node = self.nodes[i]
        out: dict[str, Any] = {}
        if i in self.stored:
            out |= {"rest_at": self.gradients[i], "rest_scale": 1.0}
        elif self.pending.get(i):
            at, scale = self.pending[i].pop(0)
            out |= {"rest_at": at, "rest_scale": scale}
        if i not in self.gradients:
            self.gradients[i] = (
                self.plan.at["g"] + node.start if isinstance(node, Input) else self._place(self.sizes[i])
            )
        self.stored.add(i)
        if i in self.slopes and self.left[i] == 0 and not self.pending.get(i):
            out["slope_at"] = self.slopes[i]
            self.steep.add(i)
        return {**out, "out_at": self.gradients[i]}

    def _gradient(self, i: int) -> int | None:
        """The place of the whole gradient of ``i``; behind an activation, before it. None where it is 0."""
        pending = self.pending.setdefault(i, [])
        whole = i in self.slopes and i not in self.steep
        if i not in self.stored and not pending:
            return None
        if i not in self.stored and not whole and not isinstance(self.nodes[i], Input) and len(pending) == 1:
            at, scale = pending[0]
            if scale == 1.0:
                return at
        while pending:
            at, scale = pending.pop(0)
            self.pointwise(self.sizes[i], at, u_scale=scale, **self._written(i))
        return self.gradients[i]

    def _backward(self, i: int) -> None:
        """Hands the gradient of node ``i`` on to those that it reads."""
        d = self._gradient(i)
        if d is not None:
            _KINDS[self._kind(i)].backward(self, i, self.nodes[i], d, [self.roots[r] for r in reads(self.nodes[i])])

    def layer_back(self, i: int, node: Any, d: int, before: list[int]) -> None:
        group = self.groups[i]
        if group.rest is not None:
            self.contribute(group.rest[0], d, group.rest[1])
        x = self.roots[reads(self.nodes[group.layer])[0]]
        if x in self.moving:
            tensor = self._updated(x)
            self._product(group.layer, True, in_at=d, update=tensor, **self.target(x))

    def sum_back(self, i: int, node: Add, d: int, before: list[int]) -> None:
        for x, c in zip(before, node.coefficients, strict=True):
            self.contribute(x, d, float(c))

    def affine_back(self, i: int, node: Affine, d: int, before: list[int]) -> None:
        if before[0] in self.moving:
            self.pointwise(self.sizes[i], d, **self.per_chain(i, "scale"), **self.target(before[0]))

    def times_back(self, i: int, node: Product, d: int, before: list[int]) -> None:
        (a, b), n = before, self.sizes[i]
        if a in self.moving:
            self.pointwise(n, d, v_at=self.values[b], times=2 if node.divide else 1, **self.target(a))
        if b not in self.moving:
            return
        factor = self.values[a]
        if node.divide:  # -(a / b) / b
            factor = self._place(n)
            self.pointwise(n, self.values[i], factor, u_scale=-1.0, v_at=self.values[b], times=2)
        self.pointwise(n, d, v_at=factor, times=1, **self.target(b))

    def scattered(self, i: int, node: Map | LogSumExp, d: int, before: list[int]) -> None:
        lists, start = self._lists(i, node), 0
        for x, (_, size) in zip(before, lists.places, strict=True):
            if x in self.moving:
                self._add(
                    kernels.scatter_kernel,
                    (-(-self.chains * size // kernels.BLOCK),),
                    n=size,
                    k=node.index.shape[1],
                    starts_at=lists.starts_at + start,
                    list_at=lists.sorted_at,
                    weight_at=self.weights.get(i, {}).get("weight", _NONE),
                    in_at=d,
                    lse=int(isinstance(node, LogSumExp)),
                    u_at=self.values[x],
                    v_at=self.values[i],
                    B=kernels.BLOCK,
                    **{"rest_at": _NONE, "rest_scale": 0.0, "slope_at": _NONE, **self.target(x)},
                )
            start += size

    # the update

    def _updated(self, i: int) -> int | None:
        """The tensor of the state that node ``i`` is, where its update follows its gradient in the same kernel."""
        node = self.nodes[i]
        if not self.plan.updates or not isinstance(node, Input):
            return None
        assert self.chain is not None
        return [sum(self.chain.widths[:t]) for t in range(len(self.chain.widths))].index(node.start)

    def _straight(self) -> bool:
        """Whether every moving tensor has one reader, a convolution, and the rule needs no sum over the chain."""
        chain = self.chain
        if chain is None or chain.freeze or chain.has("grad_norm_clip"):
            return False
        at = 0
        for width, moves in zip(chain.widths, chain.moving, strict=True):
            readers = [
                self._only_user(i)
                for i in self.live
                if isinstance(self.nodes[i], Input) and self.nodes[i].start == at and self.sizes[i] == width
            ]
            if moves and not (len(readers) == 1 and isinstance(readers[0], Conv)):
                return False
            at += width
        return sum(i in self.moving for i in self.live if isinstance(self.nodes[i], Input)) == sum(chain.moving)

    def build(self) -> Plan:
        plan = self.plan
        plan.updates = self._straight()
        order = sorted(self.live - self.inner)
        for i in order:
            self._forward(i)
        self.left = {i: len(self.users[i]) for i in self.live}
        self.pending = {self.last: [(plan.at["one"], 1.0)]}
        for i in reversed(order):
            if i in self.moving:
                self._backward(i)
        if self.chain is not None:
            self._rule(self.chain)
        row = {"ld": plan.row}
        for launch in plan.launches:
            launch.arguments.update({**row, "parts": plan.parts} if "parts" in launch.kernel.arg_names else row)
        return plan

    def _rule(self, chain: NetChain) -> None:
        plan = self.plan
        places = {f"{name}_at": plan.at[name] for name in ("x", "c", "n", "g", "energy")}
        tensors = len(chain.widths)
        if chain.noise_at == "before":
            grid = (self.chains, -(-max(chain.widths) // kernels.BLOCK))
            self._add(
                kernels.perturb_kernel, grid, x_at=places["x_at"], c_at=places["c_at"], tensors=tensors, B=kernels.BLOCK
            )
            plan.launches.insert(0, plan.launches.pop())
        self._add(
            kernels.rule_kernel, (self.chains,), **places, tensors=tensors, updated=int(plan.updates), B=kernels.BLOCK
        )


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a kind of node launches: ``forward(planner, i, node, places of what it reads)`` for its value, and
    ``backward(planner, i, node, place of its gradient, roots of what it reads)`` to hand its gradient on."""

    forward: Callable[[_Planner, int, Any, list[int]], None]
    backward: Callable[[_Planner, int, Any, int, list[int]], None]


# An input lies in the state, a view where what it views does
_NOTHING: Final = _Kind(lambda plan, i, node, at: None, lambda plan, i, node, d, before: None)
_LAYER: Final = _Kind(_Planner.layer, _Planner.layer_back)
_LIST: Final = _Kind(_Planner.gathered, _Planner.scattered)
# The kinds that have kernels; what is not here is refused.
_KINDS: Final[dict[type[Any], _Kind]] = {
    Input: _NOTHING,
    View: _NOTHING,
    Conv: _LAYER,
    Linear: _LAYER,
    Activation: _Kind(
        lambda plan, i, node, at: plan.pointwise(plan.sizes[i], at[0], plan.values[i], **plan.called(node, i)),
        lambda plan, i, node, d, before: plan.contribute(before[0], d, 1.0),
    ),
    Add: _Kind(_Planner.sum, _Planner.sum_back),
    Affine: _Kind(
        lambda plan, i, node, at: plan.pointwise(
            plan.sizes[i], at[0], plan.values[i], **plan.per_chain(i, "scale"), **plan.per_chain(i, "shift")
        ),
        _Planner.affine_back,
    ),
    Product: _Kind(
        lambda plan, i, node, at: plan.pointwise(
            plan.sizes[i], at[0], plan.values[i], v_at=at[1], times=2 if node.divide else 1
        ),
        _Planner.times_back,
    ),
    Map: _LIST,
    Norm: _Kind(
        _Planner.normed, lambda plan, i, node, d, before: plan.norm(i, d, backward=1, **plan.target(before[0]))
    ),
    LogSumExp: _LIST,
}
BUILT: Final = tuple(_KINDS)


def plan_of(net: Net, chains: int, inputs: int, mode: str = "ieee", chain: NetChain | None = None) -> Plan:
    """The plan of a net, and with ``chain`` of a step on it."""
    return _Planner(net, chains, inputs, mode, chain).build()
