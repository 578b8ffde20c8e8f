"""Turns an energy into the terms of the fused ops (:mod:`mmebm.ops.terms`), where it is a sum of MLPs and quadratics.

How: the energy is called once with a :class:`Symbol` in place of the state. A symbol knows its shape and what it stands
for (the input, the output of a stack, a residual, a value per chain) and takes part in the few operations that terms
can express; anything else ends the attempt, with the reason. The weights are whatever the modules themselves hand to
``linear`` at that moment, so that spectral and weight norm need no code here, and nothing is stale after an optimiser
step: a chain is lowered anew each time it is run, which takes some tenths of a millisecond.

Somebody's ``forward`` may also count its calls, or print. It is therefore called only where its bytecode shows that it
has no such effect (:func:`_refuse_effects`); a class may also say so itself, by ``mmebm_pure = True``. What is not
recognised is never changed: the chain then calls it at every step, as it always did.
"""

from __future__ import annotations

import builtins
import dis
import functools
import inspect
import math
import numbers
import operator
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from mmebm.ops.terms import Activation, Likelihood, Quadratic, Residual, Scalar, Stack, Term
from mmebm.state import flatten

__all__ = ["CannotLower", "Lowered", "Symbol", "call", "lower", "residual"]


class CannotLower(ValueError):
    """The energy is not, or not visibly, a sum of the terms that the fused ops take; the message says what it does."""


@dataclass(frozen=True)
class Lowered:
    """``terms`` of the energy; ``scalar`` where it returns their sum over the chains and not a value for each."""

    terms: tuple[Term, ...]
    scalar: bool


# -- symbols


@dataclass(frozen=True)
class _Input:
    """Some of the state's tensors, flattened or not; ``order``: which, as they stand side by side."""

    order: tuple[int, ...]
    squared: bool = False


@dataclass(frozen=True)
class _Quadratic:
    """1/2 sum precision (x - mean)^2 over the tensors of ``order``."""

    order: tuple[int, ...]
    mean: Tensor
    precision: Tensor


@dataclass(frozen=True)
class _Outputs:
    """What a stack gives. ``open``: the last layer's activation can still follow. ``order``: of the input's tensors."""

    order: tuple[int, ...]
    layers: tuple[tuple[Tensor, Tensor | None], ...]
    activations: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class _Residual:
    """target - outputs; ``power``: 0 itself, 1 its absolute value, 2 its square."""

    outputs: _Outputs
    target: Tensor
    power: int = 0


@dataclass(frozen=True)
class _Value:
    """A value per chain: sum of weight times part, where a part is outputs, squared inputs, or a residual's power."""

    parts: tuple[tuple[float, Any], ...] = ()


def _refuse(what: str) -> NoReturn:
    raise CannotLower(what)


@dataclass(frozen=True, eq=False)
class Symbol:
    """Stands for a tensor of ``shape`` while an energy is lowered (see the module's docstring)."""

    shape: torch.Size
    means: Any
    layout: _Layout

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", str(func)).strip("_")
        rule = _RULES.get(name)
        if rule is None:
            _refuse(f"it calls {name}")
        return rule(*args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        rule = _RULES.get(name)
        if rule is None:
            _refuse(f"it uses .{name}")
        return functools.partial(rule, self)

    def with_(self, shape: Sequence[int], means: Any = None) -> Symbol:
        """The same, in another shape or with another meaning."""
        return Symbol(torch.Size(shape), self.means if means is None else means, self.layout)

    def quadratic(self, mean: Tensor, precision: Tensor) -> Symbol:
        """The value 1/2 sum precision (x - mean)^2 of a tensor of the state, for a ``mmebm_lowered`` method."""
        if not isinstance(self.means, _Input) or self.means.squared:
            _refuse("it takes a Gaussian of something else than the state")
        width = math.prod(self.shape[1:])
        rows = [t.detach().expand(width) if t.dim() == 0 else t.detach() for t in (mean, precision)]
        if any(t.shape != (width,) for t in rows):
            _refuse(f"a Gaussian over {width} elements has mean and precision of other shapes")
        return self.with_(self.shape[:1], _Value(((1.0, _Quadratic(self.means.order, *rows)),)))

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

    def __bool__(self) -> bool:
        _refuse("it branches on values")

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> NoReturn:
        _refuse("it iterates over chains")

    def __getitem__(self, key: Any) -> Symbol:
        return _getitem(self, key)

    def __neg__(self) -> Symbol:
        return _multiply(self, -1.0)

    def __add__(self, other: Any) -> Symbol:
        return _add(self, other)

    def __sub__(self, other: Any) -> Symbol:
        return _subtract(self, other)

    def __rsub__(self, other: Any) -> Symbol:
        return _subtract(other, self)

    def __mul__(self, other: Any) -> Symbol:
        return _multiply(self, other)

    def __truediv__(self, other: Any) -> Symbol:
        return _divide(self, other)

    def __pow__(self, power: Any) -> Symbol:
        return _power(self, power)

    __radd__ = __add__
    __rmul__ = __mul__


@dataclass(frozen=True)
class _Layout:
    widths: tuple[int, ...]
    chains: int
    dtype: torch.dtype
    device: torch.device


def _number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _as_value(s: Symbol) -> _Value:
    """``s`` as a value per chain, where it is one."""
    if isinstance(s.means, _Value):
        return s.means
    if isinstance(s.means, _Outputs) and math.prod(s.shape) == s.layout.chains:
        return _Value(((1.0, s.means),))
    return _refuse("it computes with something else than values per chain")


def _closed(means: _Outputs) -> _Outputs:
    if len(means.activations) >= len(means.layers):
        _refuse("an activation follows its last layer")
    return means


def _linear(x: Any, weight: Any, bias: Any = None) -> Symbol:
    if not isinstance(x, Symbol) or not isinstance(weight, Tensor):
        _refuse("a weight depends on the state")
    if x.ndim != 2:
        _refuse(f"a linear layer acts on the last of {x.ndim} dimensions; flatten the state first")
    if x.shape[1] != weight.shape[1]:
        _refuse(f"a linear layer takes {weight.shape[1]} inputs and gets {x.shape[1]}")
    layer = (weight.detach(), None if bias is None else bias.detach())
    if isinstance(x.means, _Input) and not x.means.squared:
        means = _Outputs(x.means.order, (layer,), ())
    elif isinstance(x.means, _Outputs) and len(x.means.activations) == len(x.means.layers):
        means = replace(x.means, layers=(*x.means.layers, layer))
    else:
        _refuse("a linear layer follows another one without an activation")
    return x.with_((x.shape[0], weight.shape[0]), means)


def _activation(name: Activation, defaults: Mapping[str, Any], slope: str | None = None) -> Callable[..., Symbol]:
    """A rule for an activation whose other arguments have to be ``defaults``."""

    def rule(x: Symbol, *args: Any, **kwargs: Any) -> Symbol:
        given = {**dict(zip((slope, *defaults) if slope else defaults, args, strict=False)), **kwargs}
        value = float(given.pop(slope, {"leaky_relu": 0.01, "elu": 1.0}[name])) if slope else 0.0
        given.pop("inplace", None)
        wrong = {key: v for key, v in given.items() if v != defaults.get(key)}
        if wrong:
            _refuse(f"its {name} has {wrong}")
        if not isinstance(x.means, _Outputs) or len(x.means.activations) != len(x.means.layers) - 1:
            _refuse(f"{name} does not follow a linear layer")
        return x.with_(x.shape, replace(x.means, activations=(*x.means.activations, (name, value))))

    return rule


def _reshaped(x: Symbol, shape: Sequence[int]) -> Symbol:
    """Row-major, so that only the chains have to stay apart."""
    known = math.prod(n for n in shape if n != -1)
    count = math.prod(x.shape)
    full = [(count // known if known else 0) if n == -1 else n for n in shape]
    if math.prod(full) != count:
        _refuse(f"it reshapes {tuple(x.shape)} to {tuple(shape)}")
    if not full or full[0] != x.layout.chains:
        _refuse("it reshapes across chains")
    if isinstance(x.means, (_Input, _Outputs, _Residual)) and x.ndim > 1 and len(full) == 1 and count != full[0]:
        _refuse("it reshapes across chains")
    return x.with_(full)


def _reshape(x: Symbol, *shape: Any) -> Symbol:
    sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list, torch.Size)) else shape
    return _reshaped(x, sizes)


def _flatten(x: Symbol, start_dim: int = 0, end_dim: int = -1) -> Symbol:
    start, end = start_dim % max(x.ndim, 1), end_dim % max(x.ndim, 1)
    return _reshaped(x, [*x.shape[:start], math.prod(x.shape[start : end + 1]), *x.shape[end + 1 :]])


def _unflatten(x: Symbol, dim: int, sizes: Sequence[int]) -> Symbol:
    dim = dim % x.ndim
    return _reshaped(x, [*x.shape[:dim], *sizes, *x.shape[dim + 1 :]])


def _squeeze(x: Symbol, dim: int | None = None) -> Symbol:
    if dim is None:
        if x.shape[0] == 1:
            _refuse("it squeezes all dimensions, and there is one chain")
        return _reshaped(x, [n for n in x.shape if n != 1])
    dim = dim % x.ndim
    if dim == 0:
        _refuse("it squeezes the chains")
    return _reshaped(x, [n for i, n in enumerate(x.shape) if i != dim or n != 1])


def _unsqueeze(x: Symbol, dim: int) -> Symbol:
    dim = dim % (x.ndim + 1)
    if dim == 0:
        _refuse("it adds a dimension before the chains")
    return _reshaped(x, [*x.shape[:dim], 1, *x.shape[dim:]])


def _getitem(x: Symbol, key: Any) -> Symbol:
    key = key if isinstance(key, tuple) else (key,)
    column = len(key) == 2 and key[0] in (slice(None), Ellipsis) and key[1] in (0, -1)
    if column and x.ndim == 2 and x.shape[1] == 1:
        return _reshaped(x, x.shape[:1])
    return _refuse("it takes parts of a tensor")


def _dims(x: Symbol, dim: Any) -> tuple[int, ...]:
    if dim is None:
        return tuple(range(x.ndim))
    return tuple(sorted(d % x.ndim for d in (dim if isinstance(dim, (tuple, list)) else (dim,))))


def _sum(x: Symbol, dim: Any = None, keepdim: bool = False, dtype: Any = None, **names: Any) -> Symbol:
    if "axis" in names:
        dim = names["axis"]
    dims = _dims(x, dim)
    if dtype is not None or x.ndim == 0:
        _refuse("it sums into another dtype")
    rest = [1 if i in dims else n for i, n in enumerate(x.shape)]
    shape = rest if keepdim else [n for i, n in enumerate(x.shape) if i not in dims]
    means = x.means
    per_chain = math.prod(n for i, n in enumerate(x.shape) if i > 0 and i not in dims) == 1
    if not per_chain:
        _refuse("it sums some of a chain's elements")
    if isinstance(means, (_Value, _Outputs)):
        means = _as_value(x)
    elif (isinstance(means, _Input) and means.squared) or (isinstance(means, _Residual) and means.power):
        if x.ndim < 2:
            _refuse("it sums something that is not a chain's")
        means = _Value(((1.0, means),))
    else:
        _refuse("it sums elements of the state")
    return x.with_(shape, means)


def _square(x: Symbol) -> Symbol:
    return _power(x, 2)


def _power(x: Symbol, power: Any) -> Symbol:
    if power == 2 and isinstance(x.means, _Input) and not x.means.squared:
        return x.with_(x.shape, replace(x.means, squared=True))
    if power == 2 and isinstance(x.means, _Residual) and x.means.power == 0:
        return x.with_(x.shape, replace(x.means, power=2))
    return _refuse("it takes powers of something else than the state or a residual")


def _abs(x: Symbol) -> Symbol:
    if isinstance(x.means, _Residual) and x.means.power == 0:
        return x.with_(x.shape, replace(x.means, power=1))
    return _refuse("it takes absolute values")


def _multiply(x: Any, other: Any) -> Symbol:
    if isinstance(other, Symbol):
        x, other = other, x
    if isinstance(other, Symbol):
        if other.means is x.means and other.shape == x.shape:
            return _power(x, 2)
        _refuse("it multiplies what depends on the state")
    if not _number(other):
        _refuse("it multiplies by a tensor")
    return x.with_(x.shape, _Value(tuple((weight * float(other), part) for weight, part in _as_value(x).parts)))


def _divide(x: Any, other: Any) -> Symbol:
    if not isinstance(x, Symbol) or not _number(other) or other == 0:
        _refuse("it divides by something else than a number")
    return _multiply(x, 1.0 / float(other))


def _add(x: Any, other: Any, *, alpha: float = 1) -> Symbol:
    if not isinstance(x, Symbol):
        x, other = other, x
    if _number(other) and other == 0:
        return x
    if not isinstance(other, Symbol) or alpha != 1:
        _refuse("it adds what does not depend on the state")
    if x.shape != other.shape:
        _refuse(f"it adds shapes {tuple(x.shape)} and {tuple(other.shape)}")
    return x.with_(x.shape, _Value(_as_value(x).parts + _as_value(other).parts))


def _subtract(x: Any, other: Any, *, alpha: float = 1) -> Symbol:
    if alpha != 1:
        _refuse("it subtracts a multiple")
    for symbol, tensor in ((x, other), (other, x)):
        if isinstance(symbol, Symbol) and isinstance(tensor, Tensor):
            if not isinstance(symbol.means, _Outputs):
                _refuse("it subtracts a tensor from something else than outputs")
            if tensor.shape != symbol.shape:
                _refuse(f"it subtracts shape {tuple(tensor.shape)} from {tuple(symbol.shape)}")
            return symbol.with_(symbol.shape, _Residual(symbol.means, tensor.detach()))
    if isinstance(x, Symbol) and isinstance(other, Symbol):
        return _add(x, _multiply(other, -1.0))
    return _refuse("it subtracts what does not depend on the state")


def _cat(tensors: Sequence[Any], dim: int = 0, **names: Any) -> Symbol:
    dim = names.get("axis", dim)
    parts = list(tensors)
    if not all(isinstance(p, Symbol) and isinstance(p.means, _Input) and not p.means.squared for p in parts):
        _refuse("it concatenates something else than the state's tensors")
    if any(p.ndim != 2 for p in parts) or dim % 2 != 1:
        _refuse("it concatenates otherwise than side by side")
    order = tuple(i for p in parts for i in p.means.order)
    return parts[0].with_((parts[0].shape[0], sum(p.shape[1] for p in parts)), _Input(order))


def _dropout(x: Symbol, p: float = 0.5, training: bool = True, inplace: bool = False) -> Symbol:
    if training and p > 0:
        _refuse("dropout is on")
    return x


def _zeros(x: Symbol, *size: Any, **options: Any) -> Symbol:
    sizes = size[0] if len(size) == 1 and isinstance(size[0], (tuple, list, torch.Size)) else size
    if tuple(sizes) != (x.layout.chains,):
        _refuse("it makes a tensor of zeros")
    return x.with_(sizes, _Value())


_RULES: dict[str, Callable[..., Any]] = {
    "linear": _linear, "dropout": _dropout, "cat": _cat, "concat": _cat, "concatenate": _cat,
    "relu": _activation("relu", {"inplace": False}),
    "leaky_relu": _activation("leaky_relu", {"inplace": False}, "negative_slope"),
    "silu": _activation("silu", {"inplace": False}),
    "gelu": _activation("gelu", {"approximate": "none"}),
    "softplus": _activation("softplus", {"beta": 1.0, "threshold": 20.0}),
    "tanh": _activation("tanh", {}),
    "elu": _activation("elu", {"inplace": False}, "alpha"),
    "flatten": _flatten, "unflatten": _unflatten, "reshape": _reshape, "view": _reshape, "squeeze": _squeeze,
    "unsqueeze": _unsqueeze, "getitem": _getitem, "sum": _sum, "square": _square, "pow": _power, "abs": _abs,
    "neg": lambda x: _multiply(x, -1.0), "negative": lambda x: _multiply(x, -1.0), "mul": _multiply, "rmul": _multiply,
    "multiply": _multiply, "div": _divide, "divide": _divide, "truediv": _divide, "true_divide": _divide,
    "add": _add, "radd": _add, "sub": _subtract, "subtract": _subtract, "rsub": lambda x, y: _subtract(y, x),
    "contiguous": lambda x: x, "clone": lambda x: x, "new_zeros": _zeros,
    "size": lambda x, dim=None: x.shape if dim is None else x.shape[dim], "dim": lambda x: x.ndim,
    "numel": lambda x: math.prod(x.shape),
}  # fmt: skip


def residual(outputs: Symbol, target: Tensor, *, scale: float, likelihood: Likelihood, weight: float = 1.0) -> Symbol:
    """The value per chain of a :class:`~mmebm.ops.terms.Residual`, for a ``mmebm_lowered`` method: minus the
    log-likelihood of ``target`` (chains, ...) under ``outputs`` of the same shape."""
    difference = _subtract(outputs, target)
    if likelihood == "gaussian":
        return _multiply(_sum(_flatten(_square(difference), 1), 1), weight / (2 * scale**2))
    return _multiply(_sum(_flatten(_abs(difference), 1), 1), weight / scale)


# -- from values to terms


def _columns(weight: Tensor, order: tuple[int, ...], layout: _Layout) -> Tensor:
    """The first layer's weight for the whole state, in the state's order; zero for a tensor that it does not read."""
    if order == tuple(range(len(layout.widths))):
        return weight
    if len(set(order)) != len(order):
        _refuse("it reads a tensor of the state twice")
    parts = dict(zip(order, weight.split([layout.widths[i] for i in order], dim=1), strict=True))
    return torch.cat([
        parts.get(i, weight.new_zeros(weight.shape[0], width)) for i, width in enumerate(layout.widths)
    ], dim=1)  # fmt: skip


def _stack(means: _Outputs, layout: _Layout, *, tanh: bool = False) -> Stack:
    activations = means.activations[: len(means.layers) - 1]
    if len(set(activations)) > 1:
        _refuse(f"its activations differ: {[name for name, _ in activations]}")
    name, slope = activations[0] if activations else ("relu", 0.0)
    first, *rest = (w for w, _ in means.layers)
    weights = [_columns(first, means.order, layout), *rest]
    biases = [b for _, b in means.layers]
    for t in (*weights, *biases):
        if t is not None and (t.dtype != layout.dtype or t.device != layout.device):
            _refuse(f"a layer is {t.dtype} on {t.device}, the state {layout.dtype} on {layout.device}")
    return Stack(
        tuple(w.contiguous() for w in weights), tuple(None if b is None else b.contiguous() for b in biases),
        name, slope,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip


def _term(weight: float, part: Any, layout: _Layout) -> Term:
    if isinstance(part, _Outputs):
        return Scalar(_stack(_closed(part), layout), weight)
    if isinstance(part, _Input):
        zero = torch.zeros(sum(layout.widths[i] for i in part.order), dtype=layout.dtype, device=layout.device)
        part = _Quadratic(part.order, zero, zero + 2.0)
    if isinstance(part, _Quadratic):
        if part.mean.dtype != layout.dtype or part.mean.device != layout.device:
            _refuse(f"a Gaussian is {part.mean.dtype} on {part.mean.device}")
        mean, precision = (_columns(t.unsqueeze(0), part.order, layout)[0] for t in (part.mean, part.precision))
        return Quadratic(mean.contiguous(), weight * precision)
    outputs: _Outputs = part.outputs
    tanh = len(outputs.activations) == len(outputs.layers)
    if tanh and outputs.activations[-1][0] != "tanh":
        _refuse(f"{outputs.activations[-1][0]} follows the last layer of a residual")
    if part.target.dtype != layout.dtype or part.target.device != layout.device:
        _refuse(f"a target is {part.target.dtype} on {part.target.device}")
    target = part.target.reshape(layout.chains, -1).contiguous()
    # square: weight r^2 = weight r^2 / (2 scale^2) with scale^2 = 1/2
    likelihood, scale = ("gaussian", math.sqrt(0.5)) if part.power == 2 else ("laplace", 1.0)
    return Residual(_stack(outputs, layout), target, scale, likelihood, tanh, weight)


# -- which code may be called with a symbol


_STORES = frozenset((
    "STORE_ATTR", "STORE_GLOBAL", "STORE_NAME", "STORE_SUBSCR", "STORE_SLICE", "STORE_DEREF", "DELETE_ATTR",
    "DELETE_GLOBAL", "DELETE_NAME", "DELETE_SUBSCR", "DELETE_DEREF", "IMPORT_NAME", "IMPORT_FROM", "YIELD_VALUE",
    "RAISE_VARARGS", "SETUP_WITH", "BEFORE_WITH", "MAKE_FUNCTION", "LOAD_BUILD_CLASS", "SEND", "GET_AWAITABLE",
))  # fmt: skip
_NAMES = frozenset((*_RULES, "shape", "ndim", "dtype", "device", "nn", "functional"))
_BUILTINS = (int, float, len)
_NOTHING = object()


def _harmless(value: Any) -> bool:
    if isinstance(value, (nn.Module, Tensor, numbers.Number, str, type(None), torch.dtype)):
        return True
    return any(value is known for known in (torch, nn, nn.functional, math, operator, *_BUILTINS))


def _attribute(owner: Any, name: str) -> Any:
    """``owner.name`` without running anybody's code for it."""
    if isinstance(owner, nn.Module):
        for place in (owner._modules, owner._parameters, owner._buffers):
            if name in place:
                return place[name]
    return inspect.getattr_static(owner, name, _NOTHING)


@functools.lru_cache(maxsize=1024)
def _reads(code: types.CodeType) -> tuple[str | None, frozenset[str], frozenset[str]]:
    """(an instruction that may have an effect, names of globals, names of attributes)."""
    instructions = list(dis.get_instructions(code))
    stores = next((i.opname for i in instructions if i.opname in _STORES), None)
    found = frozenset(str(i.argval) for i in instructions if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    return stores, found, frozenset(code.co_names) - found


def _defaults(function: types.FunctionType) -> list[Any]:
    return [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def _refuse_effects(function: types.FunctionType, owner: Any) -> list[nn.Module]:
    """Refuses ``function`` unless all it can do is compute: it stores nothing, and all it names are modules, tensors,
    numbers, and operations that symbols know. Returns the modules it names."""
    code, label = function.__code__, function.__qualname__
    store, found, attributes = _reads(code)
    if store is not None:
        _refuse(f"{label} may have an effect ({store})")
    named: dict[str, Any] = {f"default {i}": value for i, value in enumerate(_defaults(function))}
    for cell, name in zip(function.__closure__ or (), code.co_freevars, strict=True):
        try:
            named[name] = cell.cell_contents
        except ValueError:
            _refuse(f"{label} names {name}, which is empty")
    for name in found:
        named[name] = function.__globals__.get(name, getattr(builtins, name, _NOTHING))
    for name in attributes:
        value = _attribute(owner, name)
        if value is not _NOTHING or name not in _NAMES:
            named[f".{name}"] = value
    for name, value in named.items():
        if not _harmless(value):
            _refuse(f"{label} uses {name}, which is not known to be without effect")
    return [value for value in named.values() if isinstance(value, nn.Module)]


# What torch.nn has that only computes, and that terms can say
_KNOWN = frozenset((
    nn.Linear, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.ReLU,
    nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Softplus, nn.Tanh, nn.ELU, nn.Module,
))  # fmt: skip
_NORMED = "torch.nn.utils.parametriz"
_NORMS = ("torch.nn.utils.spectral_norm", "torch.nn.utils.weight_norm")


def _definer(kind: type, name: str) -> type:
    return next(owner for owner in kind.__mro__ if name in owner.__dict__)


def _examine_call(m: nn.Module) -> None:
    """Refuses a module whose call is more than its ``forward``."""
    label = type(m).__name__
    if "forward" in m.__dict__ or "__call__" in m.__dict__ or type(m).__call__ is not nn.Module.__call__:
        _refuse(f"{label}'s call was replaced")
    hooks = [*m._forward_hooks.values(), *m._backward_hooks.values(), *m._backward_pre_hooks.values()]
    hooks += [h for h in m._forward_pre_hooks.values() if type(h).__module__ not in _NORMS]
    if hooks:
        _refuse(f"{label} has hooks")


def _examine(module: nn.Module) -> None:
    """Refuses a module, or one inside it or named by it, that may do more than its ``forward`` shows."""
    waiting, seen = [module], set()
    while waiting:
        m = waiting.pop()
        if id(m) in seen:
            continue
        seen.add(id(m))
        waiting.extend(m.children())
        _examine_call(m)
        kind = type(m)
        label = kind.__name__
        if m.training and (m._forward_pre_hooks or torch.nn.utils.parametrize.is_parametrized(m)):
            _refuse(f"{label} is parametrized and in train mode, where a call may change it")
        owner = _definer(kind, "forward")
        if owner in _KNOWN or owner.__module__.startswith(_NORMED) or owner.__dict__.get("mmebm_pure", False):
            continue
        if owner.__module__.startswith("torch."):  # batch norm, for one, counts its calls
            _refuse(f"it holds a {label}")
        function = owner.__dict__["forward"]
        if not isinstance(function, types.FunctionType):
            _refuse(f"{label}.forward is a {type(function).__name__}")
        waiting.extend(_refuse_effects(function, m))


def call(energy: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
    """What ``energy`` makes of the symbolic ``state``, for a ``mmebm_lowered`` method that calls others."""
    kind = type(energy)
    if hasattr(kind, "mmebm_lowered"):
        if isinstance(energy, nn.Module):
            _examine_call(energy)
        method = "forward" if isinstance(energy, nn.Module) else "__call__"
        own, there = _definer(kind, "mmebm_lowered"), _definer(kind, method)
        if there is not own and issubclass(there, own):
            _refuse(f"{there.__name__} overrides {method} of {own.__name__}")
        return kind.mmebm_lowered(energy, state, *args, **kwargs)
    if isinstance(energy, nn.Module):
        _examine(energy)
        return nn.Module.__call__(energy, state, *args, **kwargs)
    if isinstance(energy, types.FunctionType):
        for module in _refuse_effects(energy, None):
            _examine(module)
        return energy(state, *args, **kwargs)
    return _refuse(f"it is a {kind.__name__}")


def _inert(value: Any) -> bool:
    """Whether an argument is plain data: tensors, numbers, and lists and dicts of these."""
    if type(value) in (list, tuple):
        return all(_inert(part) for part in value)
    if type(value) is dict:
        return all(_inert(part) for part in value.values())
    return isinstance(value, (Tensor, numbers.Number, str, type(None)))


def lower(
    energy: Callable[..., Any], state: Any, *, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None,
    log_prob: bool = False,
) -> Lowered:  # fmt: skip
    """The terms of ``energy`` at a state of this structure.

    Recognised are ``nn.Sequential`` of ``nn.Linear`` and activations, modules and functions around them that reshape,
    negate, scale and add, squares of the state, what has a method ``mmebm_lowered`` (the energies and models of this
    package), and their sums. Modules are looked at as they are: train mode, hooks and dropout count.

    Args:
        energy: as :meth:`mmebm.Langevin.sample` takes it.
        state: a tensor (chains, ...), or a list, tuple or dict of such; only shapes, dtype and device are read.
        args, kwargs: what else it is given: tensors, numbers, lists and dicts of these; a posterior's data, say.
        log_prob: whether ``energy`` returns log p and not E.

    Raises:
        CannotLower: with what it does that terms cannot say.
    """
    _, tensors, build = flatten(state)
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) != 1:
        _refuse(f"the state has several dtypes, {sorted(map(str, dtypes))}")
    if torch.is_autocast_enabled(tensors[0].device.type):
        _refuse("autocast is on")
    given = dict(kwargs or {})
    if not all(_inert(value) for value in (*args, *given.values())):
        _refuse("it is given arguments that are not plain data")
    chains = tensors[0].shape[0]
    if chains == 0:
        _refuse("there are no chains")
    layout = _Layout(tuple(math.prod(t.shape[1:]) for t in tensors), chains, tensors[0].dtype, tensors[0].device)
    symbols: Any = [Symbol(t.shape, _Input((i,)), layout) for i, t in enumerate(tensors)]
    try:
        with torch.no_grad():
            value = call(energy, build(symbols), *args, **given)
    except CannotLower:
        raise
    except Exception as error:
        raise CannotLower(f"it does not take a symbol: {type(error).__name__}: {error}"[:200]) from error
    if not isinstance(value, Symbol):
        _refuse(f"it returns a {type(value).__name__}")
    if value.ndim > 0 and math.prod(value.shape) != chains:
        _refuse(f"it returns shape {tuple(value.shape)}")
    parts = _as_value(value).parts
    if not parts:
        _refuse("it is constant")
    sign = -1.0 if log_prob else 1.0
    return Lowered(tuple(_term(sign * weight, part, layout) for weight, part in parts), value.ndim == 0)
