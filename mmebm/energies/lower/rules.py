"""What each operation makes of symbols: the table in which a symbol looks up the names of operations."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mmebm.energies.lower.attempt import refuse
from mmebm.energies.lower.symbol import Difference, Input, Outputs, Symbol, Value
from mmebm.ops.terms import Activation, Likelihood


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def as_value(s: Symbol) -> Value:
    """``s`` as a value per chain, where it is one."""
    if isinstance(s.means, Value):
        return s.means
    if isinstance(s.means, Outputs) and math.prod(s.shape) == s.layout.chains:
        return Value(((1.0, s.means),))
    return refuse("it computes with something else than values per chain")


# -- layers


def _check_plain(name: str, t: Tensor) -> None:
    """Refuses what only looks like a dense tensor of numbers: subclasses with a say of their own, other layouts."""
    if type(t) not in (Tensor, nn.Parameter):
        refuse(f"{name} is a {type(t).__name__}")
    if t.layout is not torch.strided or t.is_quantized or not t.is_floating_point():
        refuse(f"{name} is {t.layout}, {t.dtype}")


def _linear(x: Any, weight: Any, bias: Any = None) -> Symbol:
    if not isinstance(x, Symbol) or not isinstance(weight, Tensor) or isinstance(bias, Symbol):
        refuse("a weight depends on the state")
    _check_plain("a weight", weight)
    if x.ndim != 2 or weight.dim() != 2:
        refuse(f"a linear layer acts on the last of {x.ndim} dimensions; flatten the state first")
    if x.shape[1] != weight.shape[1]:
        refuse(f"a linear layer takes {weight.shape[1]} inputs and gets {x.shape[1]}")
    if bias is not None:
        _check_plain("a bias", bias)
        if bias.shape != (weight.shape[0],):
            refuse(f"a bias has shape {tuple(bias.shape)} for {weight.shape[0]} outputs")
    layer = (weight, bias)
    if isinstance(x.means, Input) and not x.means.squared:
        means = Outputs(x.means.order, (layer,), ())
    elif isinstance(x.means, Outputs) and len(x.means.activations) == len(x.means.layers):
        means = replace(x.means, layers=(*x.means.layers, layer))
    else:
        refuse("a linear layer follows another one without an activation")
    return x.result((x.shape[0], weight.shape[0]), means)


def _matmul(x: Any, other: Any) -> Symbol:
    if not isinstance(x, Symbol) or not isinstance(other, Tensor):
        refuse("it multiplies a matrix by what depends on the state")
    if other.dim() != 2:
        refuse(f"it multiplies by a matrix of shape {tuple(other.shape)}")
    _check_plain("a matrix", other)
    return _linear(x, other.detach().t())


def _activation(name: Activation, defaults: Mapping[str, Any], slope: str | None = None) -> Callable[..., Symbol]:
    """A rule for an activation whose other arguments have to be ``defaults``."""

    def rule(x: Symbol, *args: Any, **kwargs: Any) -> Symbol:
        given = {**dict(zip((slope, *defaults) if slope else defaults, args, strict=False)), **kwargs}
        value = float(given.pop(slope, {"leaky_relu": 0.01, "elu": 1.0}[name])) if slope else 0.0
        inplace = bool(given.pop("inplace", False))
        wrong = {key: v for key, v in given.items() if v != defaults.get(key)}
        if wrong:
            refuse(f"its {name} has {wrong}")
        if not isinstance(x.means, Outputs) or len(x.means.activations) != len(x.means.layers) - 1:
            refuse(f"{name} does not follow a linear layer")
        out = x.result(x.shape, replace(x.means, activations=(*x.means.activations, (name, value))))
        return x.assign(out) if inplace else out

    return rule


def _dropout(x: Symbol, p: float = 0.5, training: bool = True, inplace: bool = False) -> Symbol:
    if training and p > 0:
        refuse("dropout is on")
    return x


# -- shapes


def _reshaped(x: Symbol, shape: Sequence[int]) -> Symbol:
    """Row-major, so that only the chains have to stay apart."""
    known = math.prod(n for n in shape if n != -1)
    count = math.prod(x.shape)
    full = [(count // known if known else 0) if n == -1 else n for n in shape]
    if math.prod(full) != count:
        refuse(f"it reshapes {tuple(x.shape)} to {tuple(shape)}")
    if not full or full[0] != x.layout.chains:
        refuse("it reshapes across chains")
    if isinstance(x.means, (Input, Outputs, Difference)) and x.ndim > 1 and len(full) == 1 and count != full[0]:
        refuse("it reshapes across chains")
    return x.view_as_shape(full)


def _sizes(given: Sequence[Any]) -> Sequence[int]:
    """Sizes given one by one or as one tuple."""
    return given[0] if len(given) == 1 and isinstance(given[0], (tuple, list, torch.Size)) else given


def _reshape(x: Symbol, *shape: Any) -> Symbol:
    if any(isinstance(size, torch.dtype) for size in shape):
        refuse("it reads the state as another dtype")
    return _reshaped(x, _sizes(shape))


def _flatten(x: Symbol, start_dim: int = 0, end_dim: int = -1) -> Symbol:
    start, end = start_dim % max(x.ndim, 1), end_dim % max(x.ndim, 1)
    return _reshaped(x, [*x.shape[:start], math.prod(x.shape[start : end + 1]), *x.shape[end + 1 :]])


def _unflatten(x: Symbol, dim: int, sizes: Sequence[int]) -> Symbol:
    dim = dim % x.ndim
    return _reshaped(x, [*x.shape[:dim], *sizes, *x.shape[dim + 1 :]])


def _squeeze(x: Symbol, dim: int | None = None) -> Symbol:
    if dim is None:
        if x.shape[0] == 1:
            refuse("it squeezes all dimensions, and there is one chain")
        return _reshaped(x, [n for n in x.shape if n != 1])
    dim = dim % x.ndim
    if dim == 0:
        refuse("it squeezes the chains")
    return _reshaped(x, [n for i, n in enumerate(x.shape) if i != dim or n != 1])


def _unsqueeze(x: Symbol, dim: int) -> Symbol:
    dim = dim % (x.ndim + 1)
    if dim == 0:
        refuse("it adds a dimension before the chains")
    return _reshaped(x, [*x.shape[:dim], 1, *x.shape[dim:]])


def _getitem(x: Symbol, key: Any) -> Symbol:
    key = key if isinstance(key, tuple) else (key,)
    # by type: False is 0 to Python, and no column to torch
    rows = len(key) == 2 and (key[0] is Ellipsis or (isinstance(key[0], slice) and key[0] == slice(None)))
    if rows and type(key[1]) is int and key[1] in (0, -1) and x.ndim == 2 and x.shape[1] == 1:
        return _reshaped(x, x.shape[:1])
    return refuse("it takes parts of a tensor")


def _cat(tensors: Sequence[Any], dim: int = 0, **names: Any) -> Symbol:
    dim = names.pop("axis", dim)
    parts = list(tensors)
    if not all(isinstance(p, Symbol) and isinstance(p.means, Input) and not p.means.squared for p in parts):
        refuse("it concatenates something else than the state's tensors")
    if any(p.ndim != 2 for p in parts) or dim % 2 != 1 or names:
        refuse("it concatenates otherwise than side by side")
    order = tuple(i for p in parts for i in p.means.order)
    return parts[0].result((parts[0].shape[0], sum(p.shape[1] for p in parts)), Input(order))


def _zeros(x: Symbol, *size: Any, **options: Any) -> Symbol:
    sizes = _sizes(size)
    if tuple(sizes) != (x.layout.chains,) or options:
        refuse("it makes a tensor of zeros")
    return x.result(sizes, Value())


# -- sums and arithmetic


def _sum(x: Symbol, dim: Any = None, keepdim: bool = False, dtype: Any = None, **names: Any) -> Symbol:
    dim = names.get("axis", dim)
    dims = range(x.ndim) if dim is None else [d % x.ndim for d in (dim if isinstance(dim, (tuple, list)) else (dim,))]
    if dtype is not None or x.ndim == 0:
        refuse("it sums into another dtype")
    rest = [1 if i in dims else n for i, n in enumerate(x.shape)]
    shape = rest if keepdim else [n for i, n in enumerate(x.shape) if i not in dims]
    means = x.means
    per_chain = math.prod(n for i, n in enumerate(x.shape) if i > 0 and i not in dims) == 1
    if not per_chain:
        refuse("it sums some of a chain's elements")
    if isinstance(means, (Value, Outputs)):
        means = as_value(x)
    elif (isinstance(means, Input) and means.squared) or (isinstance(means, Difference) and means.power):
        if x.ndim < 2:
            refuse("it sums something that is not a chain's")
        means = Value(((1.0, means),))
    else:
        refuse("it sums elements of the state")
    return x.result(shape, means)


def _power(x: Any, power: Any) -> Symbol:
    if isinstance(x, Symbol) and _is_number(power) and power == 2:
        if isinstance(x.means, Input) and not x.means.squared:
            return x.result(x.shape, replace(x.means, squared=True))
        if isinstance(x.means, Difference) and x.means.power == 0:
            return x.result(x.shape, replace(x.means, power=2))
    return refuse("it takes powers of something else than the state or a residual")


def _abs(x: Symbol) -> Symbol:
    if isinstance(x.means, Difference) and x.means.power == 0:
        return x.result(x.shape, replace(x.means, power=1))
    return refuse("it takes absolute values")


def _multiply(x: Any, other: Any) -> Symbol:
    if isinstance(other, Symbol):
        x, other = other, x
    if isinstance(other, Symbol):
        if other.means is x.means and other.shape == x.shape:
            return _power(x, 2)
        refuse("it multiplies what depends on the state")
    if not _is_number(other):
        refuse("it multiplies by a tensor")
    return x.result(x.shape, Value(tuple((weight * float(other), part) for weight, part in as_value(x).parts)))


def _divide(x: Any, other: Any, *, rounding_mode: str | None = None) -> Symbol:
    if not isinstance(x, Symbol) or not _is_number(other) or other == 0 or rounding_mode is not None:
        refuse("it divides by something else than a number")
    return _multiply(x, 1.0 / float(other))


def _add(x: Any, other: Any, *, alpha: float = 1) -> Symbol:
    if not isinstance(x, Symbol):
        x, other = other, x
    if _is_number(other) and other == 0:
        return x.result(x.shape, x.means)
    if not isinstance(other, Symbol) or alpha != 1:
        refuse("it adds what does not depend on the state")
    if x.shape != other.shape:
        refuse(f"it adds shapes {tuple(x.shape)} and {tuple(other.shape)}")
    return x.result(x.shape, Value(as_value(x).parts + as_value(other).parts))


def _subtract(x: Any, other: Any, *, alpha: float = 1) -> Symbol:
    if alpha != 1:
        refuse("it subtracts a multiple")
    for symbol, tensor in ((x, other), (other, x)):
        if isinstance(symbol, Symbol) and isinstance(tensor, Tensor):
            if not isinstance(symbol.means, Outputs):
                refuse("it subtracts a tensor from something else than outputs")
            if tensor.shape != symbol.shape:
                refuse(f"it subtracts shape {tuple(tensor.shape)} from {tuple(symbol.shape)}")
            _check_plain("a target", tensor)
            return symbol.result(symbol.shape, Difference(symbol.means, tensor))
    if isinstance(x, Symbol) and isinstance(other, Symbol):
        return _add(x, _multiply(other, -1.0))
    return refuse("it subtracts what does not depend on the state")


def residual(outputs: Symbol, target: Tensor, *, scale: float, likelihood: Likelihood, weight: float = 1.0) -> Symbol:
    """The value per chain of a :class:`~mmebm.ops.terms.Residual`, for a ``mmebm_lowered`` method: minus the
    log-likelihood of ``target`` (chains, ...) under ``outputs`` of the same shape."""
    difference = _subtract(outputs, target)
    if likelihood == "gaussian":
        return _multiply(_sum(_flatten(_power(difference, 2), 1), 1), weight / (2 * scale**2))
    return _multiply(_sum(_flatten(_abs(difference), 1), 1), weight / scale)


Symbol.rules = {
    "linear": _linear,
    "matmul": _matmul,
    "mm": _matmul,
    "dropout": _dropout,
    "cat": _cat,
    "concat": _cat,
    "concatenate": _cat,
    "relu": _activation("relu", {"inplace": False}),
    "leaky_relu": _activation("leaky_relu", {"inplace": False}, "negative_slope"),
    "silu": _activation("silu", {"inplace": False}),
    "gelu": _activation("gelu", {"approximate": "none"}),
    "softplus": _activation("softplus", {"beta": 1.0, "threshold": 20.0}),
    "tanh": _activation("tanh", {}),
    "elu": _activation("elu", {"inplace": False}, "alpha"),
    "flatten": _flatten,
    "unflatten": _unflatten,
    "reshape": _reshape,
    "view": _reshape,
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    "getitem": _getitem,
    "sum": _sum,
    "square": lambda x: _power(x, 2),
    "pow": _power,
    "abs": _abs,
    "neg": lambda x: _multiply(x, -1.0),
    "negative": lambda x: _multiply(x, -1.0),
    "mul": _multiply,
    "rmul": _multiply,
    "multiply": _multiply,
    "div": _divide,
    "divide": _divide,
    "truediv": _divide,
    "true_divide": _divide,
    "add": _add,
    "radd": _add,
    "sub": _subtract,
    "subtract": _subtract,
    "rsub": lambda x, y: _subtract(y, x),
    "contiguous": lambda x: x,
    "clone": lambda x: x.result(x.shape, x.means),
    "new_zeros": _zeros,
    "size": lambda x, dim=None: x.shape if dim is None else x.shape[dim],
    "dim": lambda x: x.ndim,
    "numel": lambda x: math.prod(x.shape),
}
