# Triton's language is no Python to a type checker: its scalars and loads.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""The update rule in Triton, for the kernels of whole chains, on MLPs and on nets, and what they share with the step.

The definition is :mod:`mmebm.ops.langevin_step.reference`. :mod:`mmebm.kernels.langevin_step`, which has no table,
states it in its own form, without branches.

    g = clip(g);  g = f g;  g = g + x / prior_std^2
    d = s xi - a g;  d = clamp(d);  y = x + d;  y = clamp(y)

Constants lie in a table (steps or 1, tensors, FIELDS, chains or 1), made by :func:`table_of`; which of them there are,
and what else a launch does, are bits of ``todo``, a run-time value: an absent option is a branch not taken.
"""

from __future__ import annotations

from typing import Any, Final

import triton
import triton.language as tl
from torch import Tensor

from mmebm.ops.common.params import FIELDS

# Triton 3.6, whose code needs more registers: wide tiles would spill (docs/kernels.md)
OLD: Final = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)

__all__ = [
    "BEFORE",
    "BOUNDS",
    "CLAMP_NOISE",
    "CLIP",
    "COUNT",
    "ENERGY",
    "FREEZE",
    "GRADIENT",
    "GRAD_CLIP",
    "GRAD_NORM",
    "LOWER",
    "MAX",
    "MAX_UPDATE",
    "NOISE_SCALE",
    "NOISY",
    "NORM",
    "NORM_CLIP",
    "OBSERVED",
    "OLD",
    "PRIOR",
    "PRIOR_STD",
    "STEP_SIZE",
    "UPPER",
    "bounded",
    "clip",
    "constant_of",
    "dot",
    "norm_factor",
    "number_of",
    "proposed",
    "rounded",
    "signed64",
    "table_of",
    "todo_of",
]

# What a launch does: bits of ``todo``
CLIP: Final = tl.constexpr(1 << 0)
NORM: Final = tl.constexpr(1 << 1)
MAX: Final = tl.constexpr(1 << 2)
PRIOR: Final = tl.constexpr(1 << 3)
BOUNDS: Final = tl.constexpr(1 << 4)
BEFORE: Final = tl.constexpr(1 << 5)  # noise before the gradient, else after
CLAMP_NOISE: Final = tl.constexpr(1 << 6)
OBSERVED: Final = tl.constexpr(1 << 7)
FREEZE: Final = tl.constexpr(1 << 8)
ENERGY: Final = tl.constexpr(1 << 9)  # record it
GRAD_NORM: Final = tl.constexpr(1 << 10)
GRADIENT: Final = tl.constexpr(1 << 11)  # no step: the gradient is the result
NOISY: Final = tl.constexpr(1 << 12)

# Columns of the table of constants
(STEP_SIZE, NOISE_SCALE, GRAD_CLIP, NORM_CLIP, MAX_UPDATE, PRIOR_STD, LOWER, UPPER) = map(
    tl.constexpr, range(len(FIELDS))
)
COUNT: Final = tl.constexpr(len(FIELDS))


@triton.jit
def number_of(value, address):
    """An int64: the argument itself, or what a 1-element tensor holds now."""
    out = value.to(tl.int64)
    if address != 0:
        out = tl.load(address.to(tl.int64).to(tl.pointer_type(tl.int64)))
    return out


@triton.jit
def rounded(a, MODE: tl.constexpr):
    """A factor of a product as a chain's precision has it, in fp32."""
    if MODE == "bf16":
        return a.to(tl.bfloat16).to(tl.float32)
    elif MODE == "rounded":
        # The interpreter's conversion cuts off: to nearest even, from the bits
        bits = a.to(tl.int32, bitcast=True)
        near = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        return tl.where(a == a, near, a)
    else:
        return a


@triton.jit
def dot(a, b, acc, MODE: tl.constexpr):
    """acc + a b in a chain's precision."""
    if MODE == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
    elif MODE == "rounded":
        # The interpreter has no bf16 products
        return tl.dot(rounded(a.to(tl.float32), MODE), rounded(b.to(tl.float32), MODE), acc, input_precision="ieee")
    elif MODE == "tf32x3":
        return tl.dot(a, b, acc, input_precision="tf32x3")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def constant_of(row, tensor, chain, width, by_chain, FIELD: tl.constexpr):
    """A constant of each chain and column: (BM, DB)."""
    return tl.load(row + ((tensor * COUNT + FIELD) * width)[None, :] + (chain * by_chain)[:, None])


@triton.jit
def bounded(y, row, tensor, chain, width, by_chain):
    # by comparisons: NaN stays NaN, and bounds that are not there change nothing
    low = constant_of(row, tensor, chain, width, by_chain, LOWER)
    y = tl.where(y < low, low, y)
    high = constant_of(row, tensor, chain, width, by_chain, UPPER)
    return tl.where(y > high, high, y)


@triton.jit
def clip(g, row, tensor, chain, width, by_chain, todo):
    if (todo & CLIP) != 0:
        c = constant_of(row, tensor, chain, width, by_chain, GRAD_CLIP)
        g = tl.where(g > c, c, g)
        g = tl.where(g < -c, -c, g)
    return g


@triton.jit
def proposed(x, g, noise, row, tensor, chain, width, by_chain, todo):
    """The rule from the clipped gradient on, but for what keeps its value."""
    if (todo & PRIOR) != 0:
        inverse = constant_of(row, tensor, chain, width, by_chain, PRIOR_STD)
        # not times 1 / std^2, which overflows where the quotient does not; and where there is no prior nothing, ever
        g = g + tl.where(inverse != 0.0, x * inverse * inverse, 0.0)
    d = noise - constant_of(row, tensor, chain, width, by_chain, STEP_SIZE) * g
    if (todo & MAX) != 0:
        m = constant_of(row, tensor, chain, width, by_chain, MAX_UPDATE)
        d = tl.where(d > m, m, d)
        d = tl.where(d < -m, -m, d)
    y = x + d
    if (todo & BOUNDS) != 0:
        y = bounded(y, row, tensor, chain, width, by_chain)
    return y


@triton.jit
def norm_factor(squares, limit):
    """Of a norm clip. Exactly 1 up to the limit, infinite ones too; a NaN norm stays NaN."""
    norm = tl.sqrt_rn(squares)
    return tl.where(norm <= limit, 1.0, tl.div_rn(limit, norm))


# -- host


def table_of(chain: Any) -> Tensor:
    """The constants of a chain as the kernels read them: the prior's inverted, as a division by IEEE costs a kernel
    registers that it has not got."""
    table = chain.constants.contiguous()
    if not chain.has("prior_std"):
        return table
    table = table.clone()
    table[:, :, PRIOR_STD.value].reciprocal_()
    return table


def signed64(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def todo_of(chain: Any) -> int:
    """The options of a chain on MLPs or on a net, as the kernels' word of bits."""
    bits = (
        (CLIP, chain.has("grad_clip")),
        (NORM, chain.has("grad_norm_clip")),
        (MAX, chain.has("max_update")),
        (PRIOR, chain.has("prior_std")),
        (BOUNDS, chain.has("low") or chain.has("high")),
        (BEFORE, chain.noise_at == "before"),
        (CLAMP_NOISE, chain.clamp_noise),
        (OBSERVED, chain.observed is not None),
        (FREEZE, chain.freeze),
        (NOISY, any(chain.noisy)),
    )
    return sum(bit.value for bit, wanted in bits if wanted)
