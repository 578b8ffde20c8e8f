"""A symbol stands for a tensor while an energy is lowered, and what it can mean.

Symbols behave like tensors in one more way: what shares memory changes together. An in-place operation gives its symbol
another meaning, under every name that the energy has for it; a view of the same memory can then no longer say what it
holds, and its use is refused.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from mmebm.energies.lower.attempt import refuse

# -- what a symbol can stand for


@dataclass(frozen=True)
class Input:
    """Some of the state's tensors, flattened or not; ``order``: which, as they stand side by side."""

    order: tuple[int, ...]
    squared: bool = False


@dataclass(frozen=True)
class Gauss:
    """1/2 sum precision (x - mean)^2 over the tensors of ``order``."""

    order: tuple[int, ...]
    mean: Tensor
    precision: Tensor


@dataclass(frozen=True)
class Outputs:
    """What a stack gives. ``order``: of the input's tensors. The last layer's activation can still follow where there
    is one activation less than layers."""

    order: tuple[int, ...]
    layers: tuple[tuple[Tensor, Tensor | None], ...]
    activations: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Difference:
    """target - outputs; ``power``: 0 itself, 1 its absolute value, 2 its square."""

    outputs: Outputs
    target: Tensor
    power: int = 0


@dataclass(frozen=True)
class Value:
    """A value per chain: sum of weight times part, where a part is outputs, squared inputs, or a difference's power."""

    parts: tuple[tuple[float, Any], ...] = ()


@dataclass(frozen=True)
class Layout:
    """Of the state: elements per chain of each tensor, chains, dtype, device."""

    widths: tuple[int, ...]
    chains: int
    dtype: torch.dtype
    device: torch.device


@dataclass(eq=False)
class Memory:
    """What views of one another share. ``writes``: how often it was changed in place."""

    given: bool = False  # the state's own
    writes: int = 0


def _operator(name: str, *, swap: bool = False, inplace: bool = False) -> Callable[..., Any]:
    def method(self: Symbol, *others: Any) -> Any:
        args = (others[0], self) if swap else (self, *others)
        return _operation(name + "_" * inplace, args, {})

    return method


class Symbol:
    """Stands for a tensor of ``shape`` while an energy is lowered (see the module's docstring)."""

    rules: Mapping[str, Callable[..., Any]] = {}  # by an operation's name; mmebm.energies.lower.rules fills it

    def __init__(self, shape: Sequence[int], means: Any, layout: Layout, memory: Memory | None = None) -> None:
        self.shape: torch.Size = torch.Size(shape)
        self.means = means
        self.layout = layout
        self.memory: Memory = memory or Memory()
        self._writes = self.memory.writes

    # -- operations

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _operation(getattr(func, "__name__", str(func)), args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name.removesuffix("_") not in self.rules:
            refuse(f"it uses .{name}")

        def method(*args: Any, **kwargs: Any) -> Any:
            return _operation(name, (self, *args), kwargs)

        return method

    def view_as_shape(self, shape: Sequence[int]) -> Symbol:
        """The same elements, in the same memory, in another shape."""
        return Symbol(shape, self.means, self.layout, self.memory)

    def result(self, shape: Sequence[int], means: Any) -> Symbol:
        """Another tensor, computed from this one."""
        return Symbol(shape, means, self.layout)

    def check_current(self) -> None:
        """Refuses a symbol whose memory was changed through a view."""
        if self._writes != self.memory.writes:
            refuse("it uses a tensor that was changed in place through a view of it")

    def assign(self, other: Any) -> Symbol:
        """This tensor after an in-place operation that gave ``other``."""
        if self.memory.given:
            refuse("it changes the state in place")
        if not isinstance(other, Symbol) or other.shape != self.shape:
            refuse("it changes the shape of a tensor in place")
        self.memory.writes += 1
        self._writes = self.memory.writes
        self.means: Any = other.means
        return self

    def quadratic(self, mean: Tensor, precision: Tensor) -> Symbol:
        """The value 1/2 sum precision (x - mean)^2 of a tensor of the state, for a ``mmebm_lowered`` method."""
        if not isinstance(self.means, Input) or self.means.squared:
            refuse("it takes a Gaussian of something else than the state")
        width = math.prod(self.shape[1:])
        rows = [t.detach().expand(width) if t.dim() == 0 else t.detach() for t in (mean, precision)]
        if any(t.shape != (width,) for t in rows):
            refuse(f"a Gaussian over {width} elements has mean and precision of other shapes")
        return self.result(self.shape[:1], Value(((1.0, Gauss(self.means.order, *rows)),)))

    # -- what Python asks of a tensor

    @property
    def ndim(self) -> int:
        """As of a tensor."""
        return len(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """That of the state."""
        return self.layout.dtype

    @property
    def device(self) -> torch.device:
        """That of the state."""
        return self.layout.device

    @property
    def is_cuda(self) -> bool:
        """As of a tensor."""
        return self.layout.device.type == "cuda"

    def __bool__(self) -> NoReturn:
        refuse("it branches on values")

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> NoReturn:
        refuse("it iterates over chains")

    def __hash__(self) -> int:  # equality is refused, not identity
        return id(self)

    __neg__: Callable[..., Any] = _operator("neg")
    __abs__: Callable[..., Any] = _operator("abs")
    __getitem__: Callable[..., Any] = _operator("getitem")
    __add__: Callable[..., Any] = _operator("add")
    __radd__: Callable[..., Any] = _operator("add", swap=True)
    __iadd__: Callable[..., Any] = _operator("add", inplace=True)
    __sub__: Callable[..., Any] = _operator("sub")
    __rsub__: Callable[..., Any] = _operator("sub", swap=True)
    __isub__: Callable[..., Any] = _operator("sub", inplace=True)
    __mul__: Callable[..., Any] = _operator("mul")
    __rmul__: Callable[..., Any] = _operator("mul", swap=True)
    __imul__: Callable[..., Any] = _operator("mul", inplace=True)
    __truediv__: Callable[..., Any] = _operator("div")
    __rtruediv__: Callable[..., Any] = _operator("div", swap=True)
    __itruediv__: Callable[..., Any] = _operator("div", inplace=True)
    __pow__: Callable[..., Any] = _operator("pow")
    __rpow__: Callable[..., Any] = _operator("pow", swap=True)
    __ipow__: Callable[..., Any] = _operator("pow", inplace=True)
    __matmul__: Callable[..., Any] = _operator("matmul")
    __rmatmul__: Callable[..., Any] = _operator("matmul", swap=True)
    __imatmul__: Callable[..., Any] = _operator("matmul", inplace=True)


def _operation(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The rule ``name`` of its arguments; ``name_`` writes the result into the first of them."""
    inside = name.startswith("__") and name.endswith("__")
    name = name[2:-2] if inside else name
    writes = name.endswith("_") and not inside
    rule = Symbol.rules.get(name.removesuffix("_"))
    if rule is None:
        refuse(f"it calls {name}")
    kwargs = dict(kwargs)
    if kwargs.pop("out", None) is not None:
        refuse(f"it calls {name} with out=")
    for value in args:
        for part in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(part, Symbol):
                part.check_current()
    result = rule(*args, **kwargs)
    if not writes:
        return result
    if not isinstance(args[0], Symbol):
        refuse(f"it calls {name} on what does not depend on the state")
    return args[0].assign(result)


def _refusing(name: str) -> Callable[..., Any]:
    def method(self: Symbol, *others: Any) -> NoReturn:
        refuse(f"it uses {name} of a tensor")

    return method


# Anything else that an operator or a conversion asks for, in case the energy swallows Python's TypeError
for _name in (
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "mod",
    "rmod",
    "imod",
    "floordiv",
    "rfloordiv",
    "ifloordiv",
    "and",
    "rand",
    "iand",
    "or",
    "ror",
    "ior",
    "xor",
    "rxor",
    "ixor",
    "lshift",
    "rlshift",
    "ilshift",
    "rshift",
    "rrshift",
    "irshift",
    "invert",
    "pos",
    "divmod",
    "rdivmod",
    "float",
    "int",
    "index",
    "complex",
    "round",
    "contains",
    "setitem",
    "delitem",
    "array",
    "dlpack",
    "reversed",
    "copy",
    "deepcopy",
    "reduce_ex",
):
    setattr(Symbol, f"__{_name}__", _refusing(f"__{_name}__"))


@functools.cache
def harmless_names() -> frozenset[str]:
    """Names of attributes that a symbol has, or that only compute (:mod:`mmebm.energies.lower.effects`)."""
    properties = ("shape", "ndim", "dtype", "device", "is_cuda", "nn", "functional")
    return frozenset((*Symbol.rules, *(f"{name}_" for name in Symbol.rules), *properties))
