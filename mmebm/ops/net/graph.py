"""What the net ops take as an energy: a list of nodes, each a plain description whose weights stay the caller's.

    E(x) = the last node, one number per chain;  x (chains, inputs): all tensors of the state, flattened, side by side

A node reads earlier nodes by their position in the list and has a shape per chain. Few kinds say much: a
:class:`Linear` reads all elements of its input, whatever their shape; a :class:`Map` is any fixed sparse linear map of
positions (padding, cropping, pooling, upsampling, concatenation, sums and means); residual blocks are :class:`Add`, a
folded norm is :class:`Affine`, a squared distance to data is ``Add``, ``Activation("square")`` and ``Map``.

To add a kind: a class here with its shape and what must hold, its value in ``reference.py``, and in
:mod:`mmebm.energies.trace` the rule that makes one. A backend names the kinds that it takes and refuses the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from mmebm.ops.common import description
from mmebm.ops.common.description import SHARED_OR_PER_CHAIN, Described, tensors_in

Nonlinearity = Literal["relu", "leaky_relu", "silu", "gelu", "softplus", "tanh", "elu"]
Function = Literal[Nonlinearity, "sigmoid", "square", "abs", "exp", "sqrt", "reciprocal"]
FUNCTIONS: Final[tuple[str, ...]] = get_args(Function)
Shape: TypeAlias = "tuple[int, ...]"


class Node(Described):
    """Base of the kinds. ``before``: the shapes per chain of the nodes that this one reads."""

    __slots__ = ()

    def shape_after(self, before: Sequence[Shape]) -> Shape:
        """The shape per chain."""
        return before[0]

    def check(self, before: Sequence[Shape], chains: int, inputs: int) -> None:
        """Raises a ValueError that says what is wrong, without this node's name."""


def _check_shape(shape: Shape) -> None:
    if not shape or min(shape) < 1:
        raise ValueError(f"must have a shape of at least one dimension, each at least 1, got {shape}")


def _check_rows(name: str, t: Tensor | None, chains: int, shape: Shape) -> None:
    if t is not None and tuple(t.shape) not in ((1, *shape), (chains, *shape)):
        raise ValueError(f"must have {name} (1 or {chains}, {str(shape)[1:]}, got {tuple(t.shape)}")


def _check_bias(bias: Tensor | None, outputs: int) -> None:
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"must have bias ({outputs},), got {tuple(bias.shape)}")


def _check_index(index: Tensor, shape: Shape, low: int, high: int) -> None:
    if index.dtype != torch.int64 or index.dim() != 2 or index.shape[0] != math.prod(shape) or index.shape[1] < 1:
        raise ValueError(f"must have index int64 ({math.prod(shape)}, k), got {index.dtype} {tuple(index.shape)}")
    if index.device.type != "meta" and not (low <= int(index.min()) and int(index.max()) < high):
        raise ValueError(f"must have index in [{low}, {high}), got {int(index.min())} to {int(index.max())}")


@dataclass(frozen=True, slots=True)
class Input(Node):
    """Elements ``start``, ``start + 1``, ... of the state, in this shape."""

    start: int
    shape: Shape

    def shape_after(self, before: Sequence[Shape]) -> Shape:
        return tuple(self.shape)

    def check(self, before: Sequence[Shape], chains: int, inputs: int) -> None:
        _check_shape(self.shape)
        if not 0 <= self.start <= inputs - math.prod(self.shape):
            raise ValueError(f"must lie in the {inputs} inputs, got start={self.start}, shape={self.shape}")


@dataclass(frozen=True, slots=True)
class View(Node):
    """The elements of ``x`` in their row-major order, in another shape."""

    x: int
    shape: Shape

    def shape_after(self, before: Sequence[Shape]) -> Shape:
        return tuple(self.shape)

    def check(self, before: Sequence[Shape], chains: int, inputs: int) -> None:
        _check_shape(self.shape)
        if math.prod(self.shape) != math.prod(before[0]):
            raise ValueError(f"has shape {self.shape}, but its input has {math.prod(before[0])} elements")


@dataclass(frozen=True, slots=True)
class Conv(Node):
    """A convolution of (channels, height, width), or with ``transposed`` the gradient of one.

    Attributes:
        weight: (outputs, inputs / groups, kh, kw); transposed (inputs, outputs / groups, kh, kw), as torch has them.
        bias: (outputs,) or ``None``.
        output_padding: rows and columns added at the end of a transposed convolution's output.
    """

    x: int
    weight: Tensor
    bias: Tensor | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, int] = (0, 0)

    def shape_after(self, before: Sequence[Shape]) -> Shape:
        w = self.weight
        sides: list[int] = []
        channels = w.shape[1] * self.groups if self.transposed else w.shape[0]
        for i in range(2):
            size, reach = before[0][1 + i], self.dilation[i] * (w.shape[2 + i] - 1) + 1
            if self.transposed:
                sides.append((size - 1) * self.stride[i] - 2 * self.padding[i] + reach + self.output_padding[i])
            else:
                sides.append((size + 2 * self.padding[i] - reach) // self.stride[i] + 1)
        return channels, *sides

    def check(self, before: Sequence[Shape], chains: int, inputs: int) -> None:
        shape, w = before[0], self.weight
        pairs = (self.stride, self.padding, self.dilation, self.output_padding)
        if len(shape) != 3 or w.dim() != 4 or any(len(pair) != 2 or min(pair) < 0 for pair in pairs):
            raise ValueError(f"must read (channels, height, width), weight of four dimensions, got {shape}, {w.shape}")
        if min(*self.stride, *self.dilation, self.groups, *w.shape) < 1:
            raise ValueError("must have stride, dilation, groups and kernel of at least 1")
        taken = w.shape[0] if self.transposed else w.shape[1] * self.groups
        given = w.shape[0] if not self.transposed else taken
        if taken != shape[0] or given % self.groups or shape[0] % self.groups:
            raise ValueError(f"has weight {tuple(w.shape)} in {self.groups} groups, its input {shape[0]} channels")
        after = self.shape_after(before)
        if min(after) < 1:
            raise ValueError(f"has no output at an input of {shape}")
        _check_bias(self.bias, after[0])


@dataclass(frozen=True, slots=True)
class Linear(Node):
    """``weight`` (outputs, elements of x) times all elements of ``x`` in row-major order, plus ``bias`` (outputs,)."""

    x: int
    weight: Tensor
    bias: Tensor | None = None

    def shape_after(self, before: Sequence[Shape]) -> Shape:
        return (self.weight.shape[0],)

    def check(self, before: Sequence[Shape], chains: int, inputs: int) -> None:
        size = math.prod(before[0])
        if self.weight.dim() != 2 or self.weight.shape[1] != size:
            raise ValueError(f"must have weight (outputs, {size}), got {tuple(self.weight.shape)}")
        _check_bias(self.bias, self.weight.shape[0])


@dataclass(frozen=True, slots=True)
class Activation(Node):
    """``function`` of each element. ``slope``: of leaky_relu below 0, and the alpha of elu; the others have none."""

    x: int
    function: Function
    slope: float = 0.0

    def check(self, before: Sequence[Shape], chains: int, inputs: int) -> None:
        if self.function not in FUNCTIONS:
            raise ValueError(f"must have a function of {FUNCTIONS}, got {self.function!r}")


@dataclass(frozen=True, slots=True)
class Add(Node):
    """``sum_i coefficients_i xs_i + shift``, all of one shape. ``shift``: (1 or chains, *shape) or ``None``."""

    xs: tuple[int, ...]
    coefficients: tuple[float, ...]
    shift: Tensor | None = field(default=None, metadata=SHARED_OR_PER_CHAIN)

    def check(self, before: Sequence[Shape], chains: int, inputs: int) -> None:
        if len(set(before)) != 1:
            raise ValueError(f"must read one shape, got {list(before)}")
        if len(self.coefficients) != len(self.xs):
            raise ValueError(f"has {len(self.xs)} inputs and {len(self.coefficients)} coefficients")
        _check_rows("shift", self.shift, chains, before[0])


@dataclass(frozen=True, slots=True)
class Affine(Node):
    """``scale x + shift``, both (1 or chains, *shape), the shift may be ``None``."""

    x: int
    scale: Tensor = field(metadata=SHARED_OR_PER_CHAIN)
    shift: Tensor | None = field(default=None, metadata=SHARED_OR_PER_CHAIN)

    def check(self, before: Sequence[Shape], chains: int, inputs: int) -> None:
        _check_rows("scale", self.scale, chains, before[0])
        _check_rows("shift", self.shift, chains, before[0])


@dataclass(frozen=True, slots=True)
class Product(Node):
    """``a b``, or ``a / b``, element by element, of one shape."""

    a: int
    b: int
    divide: bool = False

    def check(self, before: Sequence[Shape], chains: int, inputs: int) -> None:
        if len(set(before)) != 1:
            raise ValueError(f"must read one shape, got {list(before)}")


@dataclass(frozen=True, slots=True)
class Map(Node):
    """Output i is ``sum_k weight_ik y[index_ik]``, where y are the elements of all ``xs``, side by side.

    Attributes:
        shape: of the output, n elements.
        index: int64 (n, k); -1 stands for 0.
        weight: (n, k), or ``None`` for ones.
    """

    xs: tuple[int, ...]
    shape: Shape
    index: Tensor
    weight: Tensor | None = None

    def shape_after(self, before: Sequence[Shape]) -> Shape:
        return tuple(self.shape)

    def check(self, before: Sequence[Shape], chains: int, inputs: int) -> None:
        _check_shape(self.shape)
        _check_index(self.index, self.shape, -1, sum(map(math.prod, before)))
        if self.weight is not None and self.weight.shape != self.index.shape:
            raise ValueError(f"must have weight {tuple(self.index.shape)}, got {tuple(self.weight.shape)}")


@dataclass(frozen=True, slots=True)
class Norm(Node):
    """``(x - mean) / sqrt(variance + eps)`` in each of ``groups`` consecutive parts of equal length."""

    x: int
    groups: int
    eps: float

    def check(self, before: Sequence[Shape], chains: int, inputs: int) -> None:
        size = math.prod(before[0])
        if self.groups < 1 or size % self.groups or not self.eps >= 0:
            raise ValueError(f"must cut {size} elements in equal groups, eps of at least 0, got {self}")


@dataclass(frozen=True, slots=True)
class LogSumExp(Node):
    """Output i is ``log sum_k exp x[index_ik]``. ``index``: int64 (n, k), n the elements of ``shape``."""

    x: int
    shape: Shape
    index: Tensor

    def shape_after(self, before: Sequence[Shape]) -> Shape:
        return tuple(self.shape)

    def check(self, before: Sequence[Shape], chains: int, inputs: int) -> None:
        _check_shape(self.shape)
        _check_index(self.index, self.shape, 0, math.prod(before[0]))


@dataclass(frozen=True, slots=True)
class Net(Described):
    """The nodes in an order in which each reads earlier ones; the last is the energy."""

    nodes: tuple[Node, ...]


def reads(node: Any) -> tuple[int, ...]:
    """The positions of the nodes that ``node`` reads."""
    if isinstance(node, Product):
        return node.a, node.b
    return node.xs if hasattr(node, "xs") else (node.x,) if hasattr(node, "x") else ()


def renumbered(node: Node, to: Mapping[int, int]) -> Node:
    """``node`` where it reads others: ``to`` says which in the place of which."""
    if isinstance(node, Product):
        return replace(node, a=to[node.a], b=to[node.b])
    moved = tuple(to[x] for x in reads(node))
    one: Any = node
    return replace(one, xs=moved) if hasattr(node, "xs") else replace(one, x=moved[0]) if moved else node


def tensors_of(net: Net) -> list[Tensor]:
    """The tensors that the nodes hold."""
    return tensors_in(net)


def shape_of(node: Node, shapes: Sequence[Shape]) -> Shape:
    """The shape per chain of ``node``; ``shapes``: those of the nodes before it."""
    return node.shape_after([shapes[r] for r in reads(node)])


def shapes_of(net: Net) -> list[Shape]:
    """The shape per chain of each node."""
    shapes: list[Shape] = []
    for node in net.nodes:
        shapes.append(shape_of(node, shapes))
    return shapes


def check_net(net: Net, chains: int, inputs: int, device: torch.device) -> list[Shape]:
    """The shapes of the nodes, all of them sound for a state (chains, inputs) on ``device``.

    Raises:
        TypeError, ValueError: naming the node.
    """
    if not isinstance(net, Net) or not isinstance(net.nodes, tuple) or not net.nodes:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"net must be a Net of at least one node, got {net!r:.80}")
    shapes: list[Shape] = []
    for i, node in enumerate(net.nodes):
        name = f"nodes[{i}]"
        if not isinstance(node, Node):  # pyright: ignore[reportUnnecessaryIsInstance]
            kinds = [kind for kind, cls in Described.kinds.items() if issubclass(cls, Node) and cls is not Node]
            raise TypeError(f"{name} must be one of {kinds}, got {type(node).__name__}")
        for t in tensors_in(node):
            if t.device != device:
                raise ValueError(f"{name} ({type(node).__name__}) must be on {device} as the state is, got {t.device}")
        before = reads(node)
        try:
            if not all(0 <= r < i for r in before):
                raise ValueError(f"must read earlier nodes, got {before}")
            if not isinstance(node, Input) and not before:
                raise ValueError("must read at least one node")
            node.check([shapes[r] for r in before], chains, inputs)
            shapes.append(shape_of(node, shapes))
        except ValueError as error:
            raise ValueError(f"{name} ({type(node).__name__}) {error}") from None
    if math.prod(shapes[-1]) != 1:
        raise ValueError(f"the last node is the energy and must have one element, got {shapes[-1]}")
    return shapes


def pack(net: Net) -> tuple[str, list[Tensor]]:
    """(description, tensors) for the schema of an op; :func:`unpack` is the inverse."""
    text, tensors = description.pack(net)
    return text, [t for t in tensors if t is not None]


unpack: Callable[[str, Sequence[Tensor]], Net] = description.unpack
