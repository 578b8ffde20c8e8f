"""What the net ops take as an energy: a list of nodes, each a plain description whose weights stay the caller's.

    E(x) = the last node, one number per chain;  x (chains, inputs): all tensors of the state, flattened, side by side

A node reads earlier nodes by their position in the list and has a shape per chain. Few kinds say much: a
:class:`Linear` reads all elements of its input, whatever their shape; a :class:`Map` is any fixed sparse linear map of
positions (padding, cropping, pooling, upsampling, concatenation, sums and means); residual blocks are :class:`Add`, a
folded norm is :class:`Affine`, a squared distance to data is ``Add``, ``Activation("square")`` and ``Map``.

To add a kind: a class here, its ``forward`` in ``reference.py``, and in ``csrc/net`` its forward and backward loops. A
backend that lacks a kind refuses it by its name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, get_args

import torch
from torch import Tensor

__all__ = [
    "KINDS", "Activation", "Add", "Affine", "Conv", "Function", "Input", "Linear", "LogSumExp", "Map", "Net", "Node",
    "Norm", "Product", "View", "check_net", "pack", "reads", "shape_of", "shapes_of", "tensors_of", "unpack",
]  # fmt: skip

Function = Literal[
    "relu", "leaky_relu", "silu", "gelu", "softplus", "tanh", "elu", "sigmoid", "square", "abs", "exp", "sqrt",
    "reciprocal",
]  # fmt: skip
FUNCTIONS: Final[tuple[str, ...]] = get_args(Function)
Shape: TypeAlias = "tuple[int, ...]"


@dataclass(frozen=True, slots=True)
class Input:
    """Elements ``start``, ``start + 1``, ... of the state, in this shape."""

    start: int
    shape: Shape


@dataclass(frozen=True, slots=True)
class View:
    """The elements of ``x`` in their row-major order, in another shape."""

    x: int
    shape: Shape


@dataclass(frozen=True, slots=True)
class Conv:
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


@dataclass(frozen=True, slots=True)
class Linear:
    """``weight`` (outputs, elements of x) times all elements of ``x`` in row-major order, plus ``bias`` (outputs,)."""

    x: int
    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Activation:
    """``function`` of each element. ``slope``: of leaky_relu below 0, and the alpha of elu; the others have none."""

    x: int
    function: Function
    slope: float = 0.0


@dataclass(frozen=True, slots=True)
class Add:
    """``sum_i coefficients_i xs_i + shift``, all of one shape. ``shift``: (1 or chains, *shape) or ``None``."""

    xs: tuple[int, ...]
    coefficients: tuple[float, ...]
    shift: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Affine:
    """``scale x + shift``, both (1 or chains, *shape), the shift may be ``None``."""

    x: int
    scale: Tensor
    shift: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Product:
    """``a b``, element by element, of one shape."""

    a: int
    b: int


@dataclass(frozen=True, slots=True)
class Map:
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


@dataclass(frozen=True, slots=True)
class Norm:
    """``(x - mean) / sqrt(variance + eps)`` in each of ``groups`` consecutive parts of equal length."""

    x: int
    groups: int
    eps: float


@dataclass(frozen=True, slots=True)
class LogSumExp:
    """Output i is ``log sum_k exp x[index_ik]``. ``index``: int64 (n, k), n the elements of ``shape``."""

    x: int
    shape: Shape
    index: Tensor


Node: TypeAlias = "Input | View | Conv | Linear | Activation | Add | Affine | Product | Map | Norm | LogSumExp"
KINDS: Final[tuple[type, ...]] = (
    Input, View, Conv, Linear, Activation, Add, Affine, Product, Map, Norm, LogSumExp,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Net:
    """The nodes in an order in which each reads earlier ones; the last is the energy."""

    nodes: tuple[Node, ...]


def reads(node: Node) -> tuple[int, ...]:
    """The positions of the nodes that ``node`` reads."""
    if isinstance(node, Input):
        return ()
    if isinstance(node, (Add, Map)):
        return node.xs
    if isinstance(node, Product):
        return node.a, node.b
    return (node.x,)


def tensors_of(net: Net) -> list[Tensor]:
    """The tensors that the nodes hold."""
    values = [getattr(node, name) for node in net.nodes for name in node.__dataclass_fields__]
    return [value for value in values if isinstance(value, Tensor)]


def _conv_shape(node: Conv, shape: Shape) -> Shape:
    w = node.weight
    channels = w.shape[1] * node.groups if node.transposed else w.shape[0]
    sides = []
    for i in range(2):
        reach = node.dilation[i] * (w.shape[2 + i] - 1) + 1
        if node.transposed:
            sides.append((shape[1 + i] - 1) * node.stride[i] - 2 * node.padding[i] + reach + node.output_padding[i])
        else:
            sides.append((shape[1 + i] + 2 * node.padding[i] - reach) // node.stride[i] + 1)
    return channels, *sides


def shape_of(node: Node, shapes: Sequence[Shape]) -> Shape:
    """The shape per chain of ``node``; ``shapes``: those of the nodes before it."""
    if isinstance(node, (Input, View, Map, LogSumExp)):
        return tuple(node.shape)
    if isinstance(node, Conv):
        return _conv_shape(node, shapes[node.x])
    return (node.weight.shape[0],) if isinstance(node, Linear) else shapes[reads(node)[0]]


def shapes_of(net: Net) -> list[Shape]:
    """The shape per chain of each node."""
    shapes: list[Shape] = []
    for node in net.nodes:
        shapes.append(shape_of(node, shapes))
    return shapes


def _check(net: Net, i: int, shapes: list[Shape], chains: int, inputs: int) -> Shape:
    """The shape of node ``i``, or a ValueError that says what is wrong with it, without its name."""
    node = net.nodes[i]
    before = reads(node)
    if not all(0 <= r < i for r in before):
        raise ValueError(f"must read earlier nodes, got {before}")
    if not isinstance(node, Input) and not before:
        raise ValueError("must read at least one node")
    sizes = [math.prod(shapes[r]) for r in before]
    if isinstance(node, (Input, View, Map, LogSumExp)) and (not node.shape or min(node.shape) < 1):
        raise ValueError(f"must have a shape of at least one dimension, each at least 1, got {node.shape}")
    if isinstance(node, Input) and not 0 <= node.start <= inputs - math.prod(node.shape):
        raise ValueError(f"must lie in the {inputs} inputs, got start={node.start}, shape={node.shape}")
    if isinstance(node, View) and math.prod(node.shape) != sizes[0]:
        raise ValueError(f"has shape {node.shape}, but its input has {sizes[0]} elements")
    if isinstance(node, Conv):
        shape, w = shapes[node.x], node.weight
        pairs = (node.stride, node.padding, node.dilation, node.output_padding)
        if len(shape) != 3 or w.dim() != 4 or any(len(pair) != 2 or min(pair) < 0 for pair in pairs):
            raise ValueError(f"must read (channels, height, width), weight of four dimensions, got {shape}, {w.shape}")
        if min(*node.stride, *node.dilation, node.groups, *w.shape) < 1:
            raise ValueError("must have stride, dilation, groups and kernel of at least 1")
        taken = w.shape[0] if node.transposed else w.shape[1] * node.groups
        given = w.shape[0] if not node.transposed else taken
        if taken != shape[0] or given % node.groups or shape[0] % node.groups:
            raise ValueError(f"has weight {tuple(w.shape)} in {node.groups} groups, its input {shape[0]} channels")
        if min(_conv_shape(node, shape)) < 1:
            raise ValueError(f"has no output at an input of {shape}")
    if isinstance(node, Linear) and (node.weight.dim() != 2 or node.weight.shape[1] != sizes[0]):
        raise ValueError(f"must have weight (outputs, {sizes[0]}), got {tuple(node.weight.shape)}")
    if isinstance(node, Activation) and node.function not in FUNCTIONS:
        raise ValueError(f"must have a function of {FUNCTIONS}, got {node.function!r}")
    if isinstance(node, (Add, Product)) and len({shapes[r] for r in before}) != 1:
        raise ValueError(f"must read one shape, got {[shapes[r] for r in before]}")
    if isinstance(node, Add) and len(node.coefficients) != len(node.xs):
        raise ValueError(f"has {len(node.xs)} inputs and {len(node.coefficients)} coefficients")
    shape = shape_of(node, shapes)
    if isinstance(node, (Conv, Linear)) and node.bias is not None and node.bias.shape != shape[:1]:
        raise ValueError(f"must have bias ({shape[0]},), got {tuple(node.bias.shape)}")
    if isinstance(node, (Add, Affine)):
        for name in ("scale", "shift"):
            t = getattr(node, name, None)
            if t is not None and tuple(t.shape) not in ((1, *shape), (chains, *shape)):
                raise ValueError(f"must have {name} (1 or {chains}, {str(shape)[1:]}, got {tuple(t.shape)}")
    if isinstance(node, (Map, LogSumExp)):
        index, low = node.index, -1 if isinstance(node, Map) else 0
        if index.dtype != torch.int64 or index.dim() != 2 or index.shape[0] != math.prod(shape) or index.shape[1] < 1:
            raise ValueError(f"must have index int64 ({math.prod(shape)}, k), got {index.dtype} {tuple(index.shape)}")
        if isinstance(node, Map) and node.weight is not None and node.weight.shape != index.shape:
            raise ValueError(f"must have weight {tuple(index.shape)}, got {tuple(node.weight.shape)}")
        if index.device.type != "meta" and not (low <= int(index.min()) and int(index.max()) < sum(sizes)):
            raise ValueError(f"must have index in [{low}, {sum(sizes)}), got {int(index.min())} to {int(index.max())}")
    if isinstance(node, Norm) and (node.groups < 1 or sizes[0] % node.groups or not node.eps >= 0):
        raise ValueError(f"must cut {sizes[0]} elements in equal groups, eps of at least 0, got {node}")
    return shape


def check_net(net: Net, chains: int, inputs: int, device: torch.device) -> list[Shape]:
    """The shapes of the nodes, all of them sound for a state (chains, inputs) on ``device``.

    Raises:
        TypeError, ValueError: naming the node.
    """
    if not isinstance(net, Net) or not isinstance(net.nodes, tuple) or not net.nodes:
        raise TypeError(f"net must be a Net of at least one node, got {net!r:.80}")
    shapes: list[Shape] = []
    for i, node in enumerate(net.nodes):
        name = f"nodes[{i}]"
        if not isinstance(node, KINDS):
            raise TypeError(f"{name} must be one of {[kind.__name__ for kind in KINDS]}, got {type(node).__name__}")
        for t in tensors_of(Net((node,))):
            if t.device != device:
                raise ValueError(f"{name} ({type(node).__name__}) must be on {device} as the state is, got {t.device}")
        try:
            shapes.append(_check(net, i, shapes, chains, inputs))
        except ValueError as error:
            raise ValueError(f"{name} ({type(node).__name__}) {error}") from None
    if math.prod(shapes[-1]) != 1:
        raise ValueError(f"the last node is the energy and must have one element, got {shapes[-1]}")
    return shapes


# -- nets as what a torch.library schema can carry: a string, and tensors in the order of the fields


def pack(net: Net) -> tuple[str, list[Tensor]]:
    """(description, tensors); :func:`unpack` is the inverse."""
    tensors: list[Tensor] = []

    # JSON by hand: torch.compile cannot trace json.dumps
    def text(value: Any) -> str:
        if isinstance(value, Tensor):
            tensors.append(value)
            return f'{{"tensor": {len(tensors) - 1}}}'
        if isinstance(value, tuple):
            return "[" + ", ".join([text(part) for part in value]) + "]"
        if value is None or isinstance(value, bool):
            return {None: "null", True: "true", False: "false"}[value]
        if isinstance(value, str):
            return f'"{value}"'
        if isinstance(value, float) and not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        return repr(value)

    nodes = []
    for node in net.nodes:
        fields = [f'"{name}": {text(getattr(node, name))}' for name in node.__dataclass_fields__]
        nodes.append(f'{{"kind": "{type(node).__name__}", {", ".join(fields)}}}')
    return "[" + ", ".join(nodes) + "]", tensors


def unpack(description: str, tensors: Sequence[Tensor]) -> Net:
    """The net from what :func:`pack` made."""
    kinds = {kind.__name__: kind for kind in KINDS}

    def rebuilt(value: Any) -> Any:
        if isinstance(value, dict):
            if "tensor" in value:
                return tensors[value["tensor"]]
            kind = kinds[value["kind"]]
            return kind(**{name: rebuilt(part) for name, part in value.items() if name != "kind"})
        return tuple(rebuilt(part) for part in value) if isinstance(value, list) else value

    return Net(tuple(rebuilt(node) for node in json.loads(description)))
