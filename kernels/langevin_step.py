# Triton's language is no Python to a type checker: its scalars, loops and launches.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false
"""One Langevin step for all tensors of the state, in Triton. The rule is :mod:`mmebm.ops.langevin_step.reference`.

    g = clip(g);  g = +-g + x / prior_std^2;  d = -a g + s xi;  d = clamp(d);  y = x + d;  y = clamp(y) | keep the chain
    y = x where observed;  the noise xi is :mod:`mmebm.noise`, made in registers (:mod:`mmebm.kernels.philox`)

Three kernels:

``_map_kernel``    Whatever needs no sum over a chain: one launch, every element read and written once (x in, g in, x
                   out: 12 bytes an element in fp32). The groups of all chains of a tensor are one flat range, so that
                   memory is walked without gaps whatever the chain's length; the tensors' tiles follow each other.
``_chain_kernel``  Norm clips, rejection and statistics. A program owns R whole chains of all tensors and passes over
                   them: for the norm of a tensor's gradient, for the check of the bounds, and for the update. Noise is
                   a function of its counter, so a second pass makes the same proposal again instead of keeping it, and
                   what it reads again mostly lies in cache. Sums are taken in a fixed order, without atomics: results
                   repeat bit for bit. A few long chains would leave the device idle: they are cut into up to 64
                   splits, whose sums pass through memory, and the passes are launches (norm, check, update).
``_norm_kernel``   The partial sums of that case, and of ``norm_over="tensor"``.

How tensors reach the kernel. The gradients are new tensors in every step: a table of addresses on the device would
cost a host-to-device copy a step, which a graph capture does not allow from pageable memory, and a flat state with
views would need the gradients copied together. So all addresses and constants are kernel arguments, in tuples of 1, 2
or 8 tensors (more tensors or several dtypes: several launches), and a program selects its tensor's. A captured graph
has them baked in and needs no table kept alive.

Specialisation. Triton compiles anew for an argument's type, for the value 1 and for divisibility by 16, and inside
tuples this cannot be switched off. So integers in tuples, addresses too, are sent as ``2 v + 1`` or ``2 v + 3``: an
odd number above 1 has no special property (alignment is a flag instead). Scalars have declared types and are
never specialised, options are bits of a run-time word (a branch that all threads take alike), floats are fp32.
Constants of compilation are
the dtypes, the number of tensors, whether any parameter is a tensor, and the shape of the chain kernel's tile: no
value of a seed, step, size or option compiles anything anew. There is no autotuning: it would run the update several
times on the real state.

``seed`` and ``step`` may be 1-element int64 device tensors, read by the kernel: a replayed graph then draws fresh
noise. Parameters are floats or float32 tensors of one element or one per chain, read by the kernel as well.

Layout. A tile is a (B, G) tensor of B groups of G consecutive elements, G = 4 (fp32) or 8 (16-bit): one 16-byte
vector a row where the chain's length is a multiple of G and the address of 16, element by element otherwise. All
accesses, the noise and the arithmetic share one register layout; nothing of the map kernel passes through shared
memory. Offsets are 64-bit.

Instructions decide in 16 bits, so some are named on NVIDIA (``PTX``): the exclusive or of three words, the rounding of
two numbers, and the clamps, which LLVM would otherwise take out of the branch of an option that is absent.

Limits: fp32, bf16, fp16 on CUDA (compute capability 8.0 or later) or ROCm; contiguous tensors are updated in place,
others are copied first; fewer than 2^30 elements a chain and 2^31 - 2^16 groups of 4 a tensor (34 GB in fp32).
:func:`supports` says what is not taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import prod
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from mmebm import noise
from mmebm.kernels.philox import key_words, normals, rounding_halves, split4, split8, stochastic_round
from mmebm.kernels.rule import (
    COUNT,
    GRAD_CLIP,
    LOWER,
    MAX_UPDATE,
    NOISE_SCALE,
    NORM_CLIP,
    PRIOR_STD,
    STEP_SIZE,
    UPPER,
    number_of,
    signed64,
)
from mmebm.ops.common.params import FIELDS, NEUTRAL, StepOptions, StepParams, StepStats, per_chain_or_single

__all__ = ["TritonStepper", "supports"]

# Bits of a tensor's option word: bit k says that parameter k, in the order of StepParams, is given. Step size and noise
# scale always are, so that Triton sees nothing special in the word's value.
_NORM: Final = tl.constexpr(1 << FIELDS.index("grad_norm_clip"))
_CLIP: Final = tl.constexpr(1 << FIELDS.index("grad_clip"))
_MAX: Final = tl.constexpr(1 << FIELDS.index("max_update"))
_PRIOR: Final = tl.constexpr(1 << FIELDS.index("prior_std"))
_LOW: Final = tl.constexpr(1 << FIELDS.index("low"))
_HIGH: Final = tl.constexpr(1 << FIELDS.index("high"))
_NOISE: Final = tl.constexpr(1 << 8)
_GRAD: Final = tl.constexpr(1 << 9)
_SCORE: Final = tl.constexpr(1 << 10)  # the gradient is that of log p
_MASK: Final = tl.constexpr(1 << 11)
_MASK_ROWS: Final = tl.constexpr(1 << 12)  # the mask has a row per chain
_ALIGNED: Final = tl.constexpr(1 << 13)
_TENSOR: Final = tl.constexpr(14)  # bit 14 + k: parameter k is a tensor
_ROWS: Final = tl.constexpr(22)  # bit 22 + k: with one value per chain

# What a launch of the chain kernel does
_CHECK: Final = tl.constexpr(1)  # pass 0: does the proposal stay inside?
_UPDATE: Final = tl.constexpr(2)  # pass 1
_REJECT: Final = tl.constexpr(4)  # bounds reject instead of clamping
_SHARED: Final = tl.constexpr(8)  # the answers of pass 0 lie in memory (chains cut into splits)
_STATS: Final = tl.constexpr(16)
_FINISH: Final = tl.constexpr(32)  # this program has the whole sums: take their roots

# Arguments whose value must not compile anything anew; a declared type alone still does for 1 and multiples of 16
_SCALARS: Final = (
    "seed",
    "seed_at",
    "step",
    "step_at",
    "offset",
    "purpose",
    "chains",
    "span_log2",
    "tensors",
    "todo",
    "splits",
    "norms_at",
    "norm_parts",
    "norm_row_stride",
    "norm_tensor_stride",
    "outside_at",
    "floats_at",
    "counts_at",
    "column0",
    "columns",
    "out_at",
)

_PARTS: Final = tl.constexpr(64)  # at most so many splits of a chain
_WIDTHS: Final = {"map": (1, 2, 8), "chain": (1, 8)}  # lengths of the tuples, so also tensors per launch
_SHORT_CHAINS: Final = 8  # chains a program of the chain kernel has where that many fit in its tile, else one
_ABSENT: Final = 1 << 40  # stands for an address that is never read
_REMEMBERED: Final = 32  # sets of addresses and parameters
_TILE: Final = 1024  # elements
_THREADS: Final = 128
_WARPS: Final = _THREADS // (32 if torch.version.hip is None else 64)
# Below this many programs a device is not full, and long chains are cut. Not a property of the device: the order of
# sums, and with it the last bit of a norm, would depend on it.
_BUSY: Final = 128


# -- device


@triton.jit
def _select(t, values, K: tl.constexpr, STRIDE: tl.constexpr, T: tl.constexpr):
    """``values[t * STRIDE + K]`` of a tuple of T * STRIDE scalars."""
    out = values[K]
    for i in tl.static_range(1, T):
        out = tl.where(t == i, values[i * STRIDE + K], out)
    return out


@triton.jit
def _param(t, fs, vs, meta, chain, ok, K: tl.constexpr, T: tl.constexpr, VECTOR: tl.constexpr):
    """Parameter K of tensor t: an fp32 scalar, or with VECTOR a column with the value of each of ``chain``."""
    value = _select(t, fs, K, COUNT, T).to(tl.float32)
    if VECTOR:
        # (B, 1) from the start: a (B,) load would get a layout of its own
        column = tl.zeros([chain.shape[0], 1], tl.float32) + value
        if ((meta >> (_TENSOR + K)) & 1) != 0:
            address = (_select(t, vs, K, COUNT, T) >> 1).to(tl.pointer_type(tl.float32))
            column = tl.load(address + (chain * ((meta >> (_ROWS + K)) & 1))[:, None], mask=ok[:, None], other=0.0)
        return column
    else:
        return value


@triton.jit
def _vectors(address, offset, DTYPE: tl.constexpr, G: tl.constexpr):
    """Pointers to the G elements from each ``offset``, which the caller knows to start a vector."""
    bytes_a_group: tl.constexpr = G * DTYPE.primitive_bitwidth // 8
    p = address.to(tl.pointer_type(DTYPE)) + (offset[:, None] + tl.arange(0, G)[None, :])
    return tl.max_contiguous(tl.multiple_of(p, [bytes_a_group, bytes_a_group]), [1, G])


@triton.jit
def _load(address, offset, left, meta, DTYPE: tl.constexpr, G: tl.constexpr):
    """(B, G) elements from each ``offset`` on, 0 from the first one that is not ``left``."""
    if (meta & _ALIGNED) != 0:
        # a whole group is inside the chain, or none of it
        out = tl.load(_vectors(address, offset, DTYPE, G), mask=(left > 0)[:, None], other=0)
    else:
        p = address.to(tl.pointer_type(DTYPE)) + (offset[:, None] + tl.arange(0, G)[None, :])
        out = tl.load(p, mask=tl.arange(0, G)[None, :] < left[:, None], other=0)
    return out


@triton.jit
def _store(address, offset, y, left, meta, DTYPE: tl.constexpr, G: tl.constexpr):
    if (meta & _ALIGNED) != 0:
        tl.store(_vectors(address, offset, DTYPE, G), y, mask=(left > 0)[:, None])
    else:
        # One store per position in the group: a (B, G) store of single elements would get a layout of its own, and
        # what computes y with it, through shared memory
        p = address.to(tl.pointer_type(DTYPE)) + offset
        if G == 4:
            v0, v1, v2, v3 = split4(y)
        else:
            v0, v1, v2, v3, v4, v5, v6, v7 = split8(y)
            tl.store(p + 4, v4, mask=left > 4)
            tl.store(p + 5, v5, mask=left > 5)
            tl.store(p + 6, v6, mask=left > 6)
            tl.store(p + 7, v7, mask=left > 7)
        tl.store(p, v0, mask=left > 0)
        tl.store(p + 1, v1, mask=left > 1)
        tl.store(p + 2, v2, mask=left > 2)
        tl.store(p + 3, v3, mask=left > 3)


@triton.jit
def _clamp(v, low, high, PTX: tl.constexpr):
    # NaN stays NaN, as in torch.clamp
    if PTX:
        # LLVM would take these out of the branch that they are in, to be done for nothing
        return tl.inline_asm_elementwise(
            "{ max.NaN.f32 $0, $1, $2; min.NaN.f32 $0, $0, $3; }",
            "=&f,f,f,f",
            [v, low, high],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        v = tl.maximum(v, low, propagate_nan=tl.PropagateNan.ALL)
        return tl.minimum(v, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _bounds(y, t, fs, vs, meta, chain, ok, T: tl.constexpr, VECTOR: tl.constexpr, PTX: tl.constexpr):
    low = _param(t, fs, vs, meta, chain, ok, LOWER, T, VECTOR)
    high = _param(t, fs, vs, meta, chain, ok, UPPER, T, VECTOR)
    return _clamp(y, low, high, PTX)


@triton.jit
def _propose(
    x_stored,
    g_stored,
    factor,
    t,
    fs,
    vs,
    meta,
    chain,
    ok,
    group,
    offset,
    step,
    stream,
    k0,
    k1,
    T: tl.constexpr,
    VECTOR: tl.constexpr,
    NORMED: tl.constexpr,
    G: tl.constexpr,
    PTX: tl.constexpr,
):
    """x + d, before the bounds, and where a clip changed something. ``factor`` is the norm clip's (NORMED)."""
    # The noise first: it needs most registers, and nothing but what was loaded has to be kept meanwhile
    xi = tl.zeros(x_stored.shape, tl.float32)
    if (meta & _NOISE) != 0:
        global_chain = (chain.to(tl.int64) + offset).to(tl.uint32)
        xi = normals(group.to(tl.uint32), global_chain, step, stream, k0, k1, G, PTX)
        xi *= _param(t, fs, vs, meta, chain, ok, NOISE_SCALE, T, VECTOR)
    x = x_stored.to(tl.float32)
    g = g_stored.to(tl.float32)
    changed = tl.zeros(x_stored.shape, tl.int32)
    if (meta & _CLIP) != 0:
        c = _param(t, fs, vs, meta, chain, ok, GRAD_CLIP, T, VECTOR)
        changed = (tl.abs(g) > c).to(tl.int32)
        g = _clamp(g, -c, c, PTX)
    # nested, as only a constant condition keeps Triton from compiling what is inside
    if NORMED:  # noqa: SIM102
        if (meta & _NORM) != 0:
            changed = changed | (factor < 1.0).to(tl.int32)
            g = g * factor
    # the sign of a score goes into the factors, one number each
    a = _param(t, fs, vs, meta, chain, ok, STEP_SIZE, T, VECTOR)
    a = tl.where((meta & _SCORE) != 0, -a, a)
    if (meta & _PRIOR) != 0:
        # not 1 / std^2, which overflows where the quotient does not
        inverse = tl.div_rn(1.0, _param(t, fs, vs, meta, chain, ok, PRIOR_STD, T, VECTOR))
        g = tl.fma(x * inverse, tl.zeros(x.shape, tl.float32) + tl.where((meta & _SCORE) != 0, -inverse, inverse), g)
    d = xi - a * g
    if (meta & _MAX) != 0:
        m = _param(t, fs, vs, meta, chain, ok, MAX_UPDATE, T, VECTOR)
        changed = changed | (tl.abs(d) > m).to(tl.int32)
        d = _clamp(d, -m, m, PTX)
    return x + d, changed


@triton.jit
def _observed(mask_address, n, meta, chain, left, group, G: tl.constexpr):
    """Where the mask says that the old value stays, as bytes."""
    row = tl.where((meta & _MASK_ROWS) != 0, chain.to(tl.int64) * n, 0)
    return _load(mask_address, row + group * G, left, meta, tl.uint8, G)


@triton.jit
def _finish(
    y,
    x_stored,
    mask_address,
    n,
    meta,
    chain,
    left,
    group,
    offset,
    step,
    stream,
    purpose,
    k0,
    k1,
    DTYPE: tl.constexpr,
    G: tl.constexpr,
    PTX: tl.constexpr,
):
    """y as it is stored: rounded, and the old value where observed."""
    if DTYPE == tl.float32:
        out = y
    else:
        global_chain = (chain.to(tl.int64) + offset).to(tl.uint32)
        tag = stream | (purpose << 24).to(tl.uint32)
        halves = rounding_halves(group.to(tl.uint32), global_chain, step, tag, k0, k1, PTX)
        out = stochastic_round(y, halves, DTYPE, PTX)
    if (meta & _MASK) != 0:
        out = tl.where(_observed(mask_address, n, meta, chain, left, group, G) != 0, x_stored, out)
    return out


@triton.jit(do_not_specialize=_SCALARS)
def _map_kernel(
    xs,
    gs,
    ms,
    ns,
    metas,
    streams,
    fs,
    vs,
    seed: tl.int64,
    seed_at: tl.int64,
    step: tl.int64,
    step_at: tl.int64,
    offset: tl.int64,
    purpose: tl.int32,
    chains: tl.int32,
    span_log2: tl.int32,
    DTYPE: tl.constexpr,
    GDTYPE: tl.constexpr,
    T: tl.constexpr,
    VECTOR: tl.constexpr,
    B: tl.constexpr,
    G: tl.constexpr,
    PTX: tl.constexpr,
):
    """Each program: 2^span_log2 consecutive groups of one tensor. Nothing is summed."""
    # the tensor, and the first tile of it in the grid
    pid = tl.program_id(0)
    t = 0
    first = 0
    end = 0
    for i in tl.static_range(T - 1):
        groups_i = chains * ((((ns[i] - 3) >> 1) + (G - 1)) // G)
        end += ((groups_i - 1) >> span_log2) + 1
        t = tl.where(pid >= end, i + 1, t)
        first = tl.where(pid >= end, end, first)
    x_at, g_at, m_at = _select(t, xs, 0, 1, T) >> 1, _select(t, gs, 0, 1, T) >> 1, _select(t, ms, 0, 1, T) >> 1
    n = (_select(t, ns, 0, 1, T) - 3) >> 1
    meta = _select(t, metas, 0, 1, T)
    stream = ((_select(t, streams, 0, 1, T) - 3) >> 1).to(tl.uint32)
    k0, k1 = key_words(number_of(seed, seed_at))
    step_word = number_of(step, step_at).to(tl.uint32)

    # unsigned: the division of signed numbers takes longer
    per_chain = ((n + (G - 1)).to(tl.uint32) // G).to(tl.int32)
    groups = chains * per_chain
    start = (pid - first) << span_log2
    for begin in range(start, tl.minimum(start + (1 << span_log2), groups), B):
        index = begin + tl.arange(0, B)
        ok = index < groups
        chain = (index.to(tl.uint32) // per_chain.to(tl.uint32)).to(tl.int32)
        group = index - chain * per_chain
        left = tl.where(ok, n - group * G, 0)  # elements from here to the chain's end
        place = chain.to(tl.int64) * n + group * G

        x_stored = _load(x_at, place, left, meta, DTYPE, G)
        g_stored = tl.zeros([B, G], GDTYPE)
        if (meta & _GRAD) != 0:
            g_stored = _load(g_at, place, left, meta, GDTYPE, G)
        y, _changed = _propose(
            x_stored,
            g_stored,
            1.0,
            t,
            fs,
            vs,
            meta,
            chain,
            ok,
            group,
            offset,
            step_word,
            stream,
            k0,
            k1,
            T,
            VECTOR,
            False,
            G,
            PTX,
        )
        if (meta & (_LOW | _HIGH)) != 0:
            y = _bounds(y, t, fs, vs, meta, chain, ok, T, VECTOR, PTX)
        out = _finish(
            y, x_stored, m_at, n, meta, chain, left, group, offset, step_word, stream, purpose, k0, k1, DTYPE, G, PTX
        )
        _store(x_at, place, out, left, meta, DTYPE, G)


@triton.jit
def _squares(v):
    """v^2, rounded before it is added to anything.

    A compiler may fuse one of two products into their sum. Lanes that hold the same sum of a butterfly take its terms
    in different orders, and their sums would then differ in the last bit: which one is stored would be undefined.
    """
    return tl.fma(v, v, 0.0)


@triton.jit
def _rows(v, R: tl.constexpr, C: tl.constexpr):
    """The sum over each chain's part of a tile: (R C,) to (R,)."""
    return tl.sum(tl.reshape(v, [R, C]), axis=1)


@triton.jit
def _spread(v, R: tl.constexpr, C: tl.constexpr):
    """A value per chain to all its groups: (R,) to (R C,)."""
    return tl.reshape(tl.broadcast_to(v[:, None], [R, C]), [R * C])


@triton.jit
def _sum_of_squares(
    g_at,
    n,
    t,
    fs,
    vs,
    meta,
    chain,
    ok,
    col,
    first,
    last,
    GDTYPE: tl.constexpr,
    T: tl.constexpr,
    VECTOR: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    G: tl.constexpr,
    PTX: tl.constexpr,
):
    """Of the gradient after the clip by value, over tiles [first, last) of each chain: (R,)."""
    total = tl.zeros([R * C], tl.float32)
    for norm_tile in range(first, last):
        norm_group = norm_tile * C + col
        left = tl.where(ok, n - norm_group * G, 0)
        g = _load(g_at, chain.to(tl.int64) * n + norm_group * G, left, meta, GDTYPE, G).to(tl.float32)
        c = _param(t, fs, vs, meta, chain, ok, GRAD_CLIP, T, VECTOR)
        # what was not loaded is 0 and must stay 0, also where the limit is NaN
        g = tl.where(tl.arange(0, G)[None, :] < left[:, None], _clamp(g, -c, c, PTX), 0.0)
        total += tl.sum(_squares(g), axis=1)
    return _rows(total, R, C)


@triton.jit
def _partial_sums(address, row, row_ok, parts, R: tl.constexpr):
    """Sum over ``parts`` floats from ``row`` on, in a fixed order: (R,)."""
    total = tl.zeros([R, _PARTS], tl.float32)
    for part in range(0, parts, _PARTS):
        i = part + tl.arange(0, _PARTS)
        p = address.to(tl.pointer_type(tl.float32)) + (row[:, None] + i[None, :])
        total += tl.load(p, mask=row_ok[:, None] & (i < parts)[None, :], other=0.0)
    return tl.sum(total, axis=1)


@triton.jit(do_not_specialize=_SCALARS)
def _norm_kernel(
    gs,
    ns,
    metas,
    fs,
    vs,
    out_at: tl.int64,
    chains: tl.int32,
    splits: tl.int32,
    tensors: tl.int32,
    GDTYPE: tl.constexpr,
    T: tl.constexpr,
    C: tl.constexpr,
    G: tl.constexpr,
    PTX: tl.constexpr,
):
    """Each program: one split of one chain, all tensors; partial sums of squares to out (tensors, chains, splits)."""
    pid = tl.program_id(0)
    row, split = pid // splits, pid % splits
    col = tl.arange(0, C)
    chain = row + tl.zeros([C], tl.int32)
    ok = col >= 0
    for t in range(tensors):
        n = (_select(t, ns, 0, 1, T) - 3) >> 1
        meta = _select(t, metas, 0, 1, T)
        tiles = tl.cdiv((n + (G - 1)) // G, C)
        share = tl.cdiv(tiles, splits)
        first = split * share
        total = _sum_of_squares(
            _select(t, gs, 0, 1, T) >> 1,
            n,
            t,
            fs,
            vs,
            meta,
            chain,
            ok,
            col,
            first,
            tl.minimum(first + share, tiles),
            GDTYPE,
            T,
            True,
            1,
            C,
            G,
            PTX,
        )
        place = (t * chains + row).to(tl.int64) * splits + split
        tl.store(out_at.to(tl.int64).to(tl.pointer_type(tl.float32)) + place + tl.arange(0, 1), total)


@triton.jit(do_not_specialize=_SCALARS)
def _chain_kernel(
    xs,
    gs,
    ms,
    ns,
    metas,
    streams,
    fs,
    vs,
    seed: tl.int64,
    seed_at: tl.int64,
    step: tl.int64,
    step_at: tl.int64,
    offset: tl.int64,
    purpose: tl.int32,
    chains: tl.int32,
    tensors: tl.int32,
    todo: tl.int32,
    splits: tl.int32,
    norms_at: tl.int64,
    norm_parts: tl.int32,
    norm_row_stride: tl.int32,
    norm_tensor_stride: tl.int64,
    outside_at: tl.int64,
    floats_at: tl.int64,
    counts_at: tl.int64,
    column0: tl.int32,
    columns: tl.int32,
    DTYPE: tl.constexpr,
    GDTYPE: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    G: tl.constexpr,
    PTX: tl.constexpr,
):
    """Each program: one split of R chains, all tensors (see the module docstring; ``todo`` holds the bits above).

    Memory that programs share, each may be absent: norms (tensors, chains or 1, norm_parts); outside (chains, columns),
    a positive number where the split's part of the proposal leaves the bounds; floats (2, chains, columns), the sums of
    squares of the gradient and of the displacement; counts (2, chains, columns), clipped and non-finite.
    """
    B: tl.constexpr = R * C
    pid = tl.program_id(0)
    block, split = pid // splits, pid % splits
    index = tl.arange(0, B)
    chain = block * R + index // C
    col = index % C
    chain_ok = chain < chains
    row = block * R + tl.arange(0, R)
    row_ok = row < chains
    k0, k1 = key_words(number_of(seed, seed_at))
    step_word = number_of(step, step_at).to(tl.uint32)

    outside = tl.zeros([B], tl.int32)
    if (todo & _SHARED) != 0:
        found = _partial_sums(outside_at.to(tl.int64), row.to(tl.int64) * columns, row_ok, columns, R)
        outside = _spread((found > 0.0).to(tl.int32), R, C)
    grad2 = tl.zeros([B], tl.float32)
    moved2 = tl.zeros([B], tl.float32)
    clipped = tl.zeros([B], tl.int32)
    nonfinite = tl.zeros([B], tl.int32)

    for turn in range(tl.where((todo & _CHECK) != 0, 0, 1), tl.where((todo & _UPDATE) != 0, 2, 1)):
        # in the update pass: what the check pass found, all of each chain's groups together
        keeps = _spread(_rows(outside, R, C), R, C) != 0
        counting = ((todo & _STATS) != 0) & (turn == 1)
        for t in range(tensors):
            x_at, g_at, m_at = _select(t, xs, 0, 1, T) >> 1, _select(t, gs, 0, 1, T) >> 1, _select(t, ms, 0, 1, T) >> 1
            n = (_select(t, ns, 0, 1, T) - 3) >> 1
            meta = _select(t, metas, 0, 1, T)
            stream = ((_select(t, streams, 0, 1, T) - 3) >> 1).to(tl.uint32)
            per_chain = (n + (G - 1)) // G
            tiles = tl.cdiv(per_chain, C)
            share = tl.cdiv(tiles, splits)
            first = split * share
            last = tl.minimum(first + share, tiles)

            factor = tl.full([B], 1.0, tl.float32)
            if (meta & _NORM) != 0:
                if norm_parts == 0:
                    squares = _sum_of_squares(
                        g_at, n, t, fs, vs, meta, chain, chain_ok, col, first, last, GDTYPE, T, True, R, C, G, PTX
                    )
                else:
                    norm_row = t * norm_tensor_stride.to(tl.int64) + row.to(tl.int64) * norm_row_stride
                    squares = _partial_sums(norms_at.to(tl.int64), norm_row, row_ok, norm_parts, R)
                limit = _param(t, fs, vs, meta, row, row_ok, NORM_CLIP, T, True)
                # norm 0 gives inf, which becomes 1; NaN stays NaN
                ratio = tl.div_rn(limit, tl.sqrt_rn(squares)[:, None])
                ratio = tl.minimum(ratio, 1.0, propagate_nan=tl.PropagateNan.ALL)
                factor = tl.reshape(tl.broadcast_to(ratio, [R, C]), [B])

            for tile in range(first, last):
                group = tile * C + col
                ok = chain_ok & (group < per_chain)
                left = tl.where(ok, n - group * G, 0)
                valid = tl.arange(0, G)[None, :] < left[:, None]
                place = chain.to(tl.int64) * n + group * G

                x_stored = _load(x_at, place, left, meta, DTYPE, G)
                g_stored = _load(g_at, place, left, meta, GDTYPE, G)
                # each statistic as early as it can be, so that fewer values wait in registers
                if counting:
                    g = g_stored.to(tl.float32)
                    grad2 += tl.sum(_squares(g), axis=1)
                y, changed = _propose(
                    x_stored,
                    g_stored,
                    factor[:, None],
                    t,
                    fs,
                    vs,
                    meta,
                    chain,
                    ok,
                    group,
                    offset,
                    step_word,
                    stream,
                    k0,
                    k1,
                    T,
                    True,
                    True,
                    G,
                    PTX,
                )
                if counting:
                    clipped += tl.sum(tl.where(valid, changed, 0), axis=1)
                if turn == 0:
                    if (meta & (_LOW | _HIGH)) != 0:
                        # not equal also where y is NaN
                        leaves = ((_bounds(y, t, fs, vs, meta, chain, ok, T, True, PTX) != y) & valid).to(tl.int32)
                        if (meta & _MASK) != 0:
                            # what stays anyway rejects nothing
                            leaves = tl.where(_observed(m_at, n, meta, chain, left, group, G) != 0, 0, leaves)
                        outside = outside | tl.max(leaves, axis=1)
                else:
                    if (todo & _REJECT) == 0:
                        y = _bounds(y, t, fs, vs, meta, chain, ok, T, True, PTX)
                    out = _finish(
                        y,
                        x_stored,
                        m_at,
                        n,
                        meta,
                        chain,
                        left,
                        group,
                        offset,
                        step_word,
                        stream,
                        purpose,
                        k0,
                        k1,
                        DTYPE,
                        G,
                        PTX,
                    )
                    out = tl.where(keeps[:, None], x_stored, out)
                    _store(x_at, place, out, left, meta, DTYPE, G)
                    if counting:
                        new = out.to(tl.float32)
                        move = tl.where(valid, new - x_stored.to(tl.float32), 0.0)
                        moved2 += tl.sum(_squares(move), axis=1)
                        # inf - inf and NaN - NaN are NaN, anything finite minus itself is 0
                        nonfinite += tl.sum((((new - new) != 0.0) & valid).to(tl.int32), axis=1)

    place0 = row.to(tl.int64) * columns + column0 + split
    place1 = chains.to(tl.int64) * columns + place0
    if (todo & _UPDATE) == 0:
        p = outside_at.to(tl.int64).to(tl.pointer_type(tl.float32)) + place0
        tl.store(p, _rows(outside, R, C).to(tl.float32), mask=row_ok)
    if (todo & _STATS) != 0:
        grad_sum, moved_sum = _rows(grad2, R, C), _rows(moved2, R, C)
        if (todo & _FINISH) != 0:
            grad_sum, moved_sum = tl.sqrt_rn(grad_sum), tl.sqrt_rn(moved_sum)
        floats = floats_at.to(tl.int64).to(tl.pointer_type(tl.float32))
        tl.store(floats + place0, grad_sum, mask=row_ok)
        tl.store(floats + place1, moved_sum, mask=row_ok)
        counts = counts_at.to(tl.int64).to(tl.pointer_type(tl.int64))
        tl.store(counts + place0, _rows(clipped, R, C).to(tl.int64), mask=row_ok)
        tl.store(counts + place1, _rows(nonfinite, R, C).to(tl.int64), mask=row_ok)


# -- host

_DTYPES: Final = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_INTERPRETED: Final = isinstance(_map_kernel, InterpretedFunction)
_PTX: Final = not _INTERPRETED and torch.version.hip is None  # NVIDIA's instructions may be named


def supports(x: Sequence[Tensor], options: StepOptions, params: Sequence[StepParams] | None = None) -> str | None:
    """``None`` if :class:`TritonStepper` takes this state, else the reason why not, as a sentence for a log."""
    if options.rng != "philox":
        return f"rng={options.rng!r} is torch's own stream of numbers"
    if len(x) == 0:
        return "the state has no tensor"
    device, chains = x[0].device, x[0].shape[0] if x[0].dim() else 0
    if _INTERPRETED:
        if device.type != "cpu":
            return f"Triton's interpreter (TRITON_INTERPRET=1) runs on the CPU, the state is on {device}"
    elif device.type != "cuda":
        return f"the state is on {device}, Triton needs a CUDA or ROCm device"
    elif torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"compute capability {major}.{minor} is below 8.0"
    for i, xi in enumerate(x):
        if xi.dtype not in _DTYPES:
            return f"tensor {i} of the state is {xi.dtype}; taken are float32, float16 and bfloat16"
        if xi.dim() == 0 or xi.shape[0] != chains or xi.device != device:
            return f"tensor {i} of the state is {tuple(xi.shape)} on {xi.device}, not ({chains}, ...) on {device}"
        numel = prod(xi.shape[1:])
        if numel >= 2**30 or chains * -(-numel // 4) > 2**31 - 2**16:
            return f"tensor {i} of the state is {tuple(xi.shape)}: more than 2^30 - 1 elements a chain or 2^33 in all"
    for i, mask in enumerate(options.observed):
        if mask is not None and (mask.dtype != torch.bool or mask.device != device):
            return f"the observed mask of tensor {i} is {mask.dtype} on {mask.device}, not bool on {device}"
    if isinstance(options.seed, Tensor) and options.seed.device not in (device, torch.device("cpu")):
        return f"the seed is on {options.seed.device}, the state on {device}"
    for i, (p, xi) in enumerate(zip(params or (), x, strict=False)):
        for name in FIELDS:
            value = getattr(p, name)
            if not isinstance(value, Tensor):
                continue
            if not per_chain_or_single(value, xi.shape):
                return (
                    f"{name} of tensor {i} has shape {tuple(value.shape)}; taken are one element, or one per chain: "
                    f"{(chains, *[1] * (xi.dim() - 1))}"
                )
            if value.device != device:
                return f"{name} of tensor {i} is on {value.device}, the state on {device}"
    return None


def _groups(tile: int, group: int, vector: bool, ptx: bool) -> int:
    """Groups a program of the map kernel has at a time.

    Two of 16 bits a thread, so that what is the same for both is done once, but where their registers do not allow it:
    with parameters that are tensors, and on AMD.
    """
    return tile // (4 if ptx and not vector else group)


def map_options(ptx: bool) -> dict[str, int]:
    """What the compiler of the map kernel is told beside warps: registers for 20 warps a multiprocessor. Triton 3.9.0
    would take more, without need."""
    return {"maxnreg": 96} if ptx else {}


@dataclass(slots=True)
class _Packed:
    """One tensor's parameters as the kernel takes them."""

    flags: int
    floats: tuple[float, ...]
    addresses: tuple[int, ...]
    alive: tuple[Any, ...] = field(default=())  # what the addresses point to
    converted: bool = False  # an address is that of a copy, which must be made again for the next step


_NO_ADDRESS: Final = (2 * _ABSENT + 1,) * len(FIELDS)


def _pack(p: StepParams, x: Tensor) -> _Packed:
    flags, floats, addresses, alive, converted = 0, [], [], [], False
    for k, name in enumerate(FIELDS):
        value = getattr(p, name)
        if value is None:
            floats.append(NEUTRAL[name])
            addresses.append(2 * _ABSENT + 1)
            continue
        flags |= 1 << k
        if not isinstance(value, Tensor):
            floats.append(float(value))
            addresses.append(2 * _ABSENT + 1)
            continue
        if not per_chain_or_single(value, x.shape):
            raise ValueError(
                f"{name} must be a number or a tensor with one element or one per chain, "
                f"got shape {tuple(value.shape)} for a state of shape {tuple(x.shape)}"
            )
        if value.device != x.device:
            raise ValueError(f"{name} must be on {x.device} as the state is, got {value.device}")
        if value.dtype != torch.float32 or not value.is_contiguous():
            value, converted = value.to(torch.float32).contiguous(), True
        flags |= 1 << (_TENSOR.value + k)
        if value.numel() > 1:
            flags |= 1 << (_ROWS.value + k)
        floats.append(0.0)
        addresses.append(2 * value.data_ptr() + 1)
        alive.append(value)
    return _Packed(flags, tuple(floats), tuple(addresses), tuple(alive), converted)


@dataclass(slots=True)
class _Batch:
    """The tensors of one launch: at most eight of one dtype."""

    members: list[int]
    width: int  # length of the kernel's tuples
    dtype: torch.dtype
    grad_dtype: torch.dtype
    arguments: dict[str, Any]
    metas: list[int]
    floats: list[float]
    vector: bool


def _bits(*names: str) -> int:
    """All bits of an option word that are about these parameters."""
    return sum(
        1 << k | 1 << (_TENSOR.value + k) | 1 << (_ROWS.value + k) for k, name in enumerate(FIELDS) if name in names
    )


class TritonStepper:
    """The update in Triton: all tensors in one launch a step, in place.

    Args:
        options: see :class:`mmebm.ops.common.params.StepOptions`; :func:`supports` says what is not taken.
        tile: elements per program and turn, a power of two from 128 on; changes nothing but the last bits of norms.
        splits: cut every chain of the chain kernel in so many; ``None`` decides by shape.
    """

    name = "triton"
    inplace = True

    def __init__(self, options: StepOptions, *, tile: int = _TILE, splits: int | None = None) -> None:
        if tile < 128 or tile & (tile - 1):
            raise ValueError(f"tile must be a power of two from 128 on, got {tile}")
        if splits is not None and not 1 <= splits <= _PARTS.value:
            raise ValueError(f"splits must be in [1, {_PARTS.value}], got {splits}")
        if options.rng != "philox":
            raise ValueError(f"rng must be 'philox' for the triton backend, got {options.rng!r}")
        self.options = options
        self._tile = tile
        # one group a thread: with two, the passes of the chain kernel spill
        self._chain_groups = min(_THREADS, tile // 4)
        self._splits = splits
        self._streams = [2 * noise.stream(i) + 3 for i in options.streams]
        self._masks: dict[int, tuple[tuple[int, ...], Tensor | None]] = {}
        self._packed: dict[int, tuple[StepParams, tuple[int, ...], _Packed]] = {}
        self._made: dict[tuple[Any, ...], tuple[list[_Batch], tuple[StepParams, ...]]] = {}
        self._seed: tuple[int, int] | None = None
        self._seed_tensor: Tensor | None = None

    # -- what goes into a launch

    def _number(self, value: int | Tensor, device: torch.device, name: str) -> tuple[int, int, Tensor | None]:
        """(value, address, tensor to keep alive): an int is sent as it is, a device tensor by its address."""
        if not isinstance(value, Tensor):
            return signed64(int(value)), 0, None
        if value.numel() != 1 or value.dtype.is_floating_point:
            raise ValueError(f"{name} must be an int or 1-element int tensor, got {tuple(value.shape)} {value.dtype}")
        if value.device != device:
            if value.device.type != "cpu":
                raise ValueError(f"{name} must be on {device}, got {value.device}")
            return signed64(int(value)), 0, None
        value = value.to(torch.int64)
        return 0, value.data_ptr(), value

    def _mask(self, i: int, x: Tensor) -> tuple[Tensor | None, int]:
        """The observed mask of tensor i as (1 or chains, elements) bytes, and its option bits."""
        observed = self.options.observed
        source = observed[i] if observed else None
        if source is None:
            return None, 0
        cached = self._masks.get(i)
        if cached is None or cached[0] != tuple(x.shape):
            pairs = zip(reversed(source.shape), reversed(x.shape), strict=False)
            broadcasts = source.dim() <= x.dim() and all(m in (1, n) for m, n in pairs)
            if not broadcasts or source.dtype != torch.bool or source.device != x.device:
                raise ValueError(
                    f"the observed mask of tensor {i} must be bool on {x.device} and broadcast to {tuple(x.shape)}, "
                    f"got {source.dtype} {tuple(source.shape)} on {source.device}"
                )
            # no row per chain where the mask is the same for all
            rows = source.dim() == x.dim() and source.shape[0] > 1
            full = source.expand(x.shape if rows else (1, *x.shape[1:])).contiguous().view(torch.uint8)
            cached = tuple(x.shape), full
            self._masks[i] = cached
        mask = cached[1]
        assert mask is not None
        return mask, _MASK.value | (_MASK_ROWS.value if mask.shape[0] > 1 else 0)

    def _params(self, i: int, p: StepParams, x: Tensor) -> _Packed:
        cached = self._packed.get(i)
        if cached is not None and cached[0] is p and cached[1] == tuple(x.shape) and not cached[2].converted:
            return cached[2]
        packed = _pack(p, x)
        self._packed[i] = (p, tuple(x.shape), packed)
        return packed

    def _batches(
        self,
        kernel: str,
        x: Sequence[Tensor],
        grad: Sequence[Tensor] | None,
        params: Sequence[StepParams],
        keep: int,
        noisy: bool,
    ) -> list[_Batch]:
        """The launches' tensors and tuples. ``keep``: the options of params that count here."""
        # Addresses repeat from step to step with a caching allocator, and the tuples take longer to make than to find
        key = (
            kernel,
            keep,
            noisy,
            tuple([(xi.data_ptr(), xi.shape, xi.dtype) for xi in x]),
            None if grad is None else tuple([(gi.data_ptr(), gi.dtype) for gi in grad]),
            tuple([id(p) for p in params]),
        )
        found = self._made.get(key)
        if found is not None:
            return found[0]
        widths = _WIDTHS[kernel]
        groups: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
        for i, xi in enumerate(x):
            if xi.numel():
                groups.setdefault((xi.dtype, grad[i].dtype if grad else xi.dtype), []).append(i)
        out = []
        for (dtype, grad_dtype), members in groups.items():
            for start in range(0, len(members), widths[-1]):
                part = members[start : start + widths[-1]]
                width = min(w for w in widths if w >= len(part))
                out.append(self._batch(part, width, dtype, grad_dtype, x, grad, params, keep, noisy))
        if not any(packed.converted for _, _, packed in self._packed.values()):
            if len(self._made) >= _REMEMBERED:
                self._made.clear()
            # with the params, so that no other object gets their id, and what their tensors' addresses belong to
            self._made[key] = out, tuple(params)
        return out

    def _batch(
        self,
        members: list[int],
        width: int,
        dtype: torch.dtype,
        grad_dtype: torch.dtype,
        x: Sequence[Tensor],
        grad: Sequence[Tensor] | None,
        params: Sequence[StepParams],
        keep: int,
        noisy: bool,
    ) -> _Batch:
        xs, gs, ms, ns, metas, streams, floats, addresses = [], [], [], [], [], [], [], []
        vector = False
        for i in members:
            xi = x[i]
            n = prod(xi.shape[1:])
            packed = self._params(i, params[i], xi)
            mask, meta = self._mask(i, xi)
            meta |= 3 | (packed.flags & keep)
            x_at = xi.data_ptr()
            g_at = _ABSENT
            if grad is not None:
                g_at = grad[i].data_ptr()
                meta |= _GRAD.value | (_SCORE.value if self.options.score else 0)
            if noisy and self.options.noisy[i]:
                meta |= _NOISE.value
            per_vector = 16 // xi.element_size()
            m_at = _ABSENT if mask is None else mask.data_ptr()
            if (
                n % per_vector == 0
                and x_at % 16 == 0
                and (grad is None or g_at % 32 == 0)
                and (mask is None or m_at % per_vector == 0)
            ):
                meta |= _ALIGNED.value
            xs.append(2 * x_at + 1)
            gs.append(2 * g_at + 1)
            ms.append(2 * m_at + 1)
            ns.append(2 * n + 3)
            metas.append(meta)
            streams.append(self._streams[i])
            floats.extend(
                value if keep >> k & 1 else NEUTRAL[name]
                for k, (name, value) in enumerate(zip(FIELDS, packed.floats, strict=True))
            )
            addresses.extend(packed.addresses)
            vector |= bool(packed.alive)
        for _ in range(width - len(members)):
            xs.append(2 * _ABSENT + 1)
            gs.append(2 * _ABSENT + 1)
            ms.append(2 * _ABSENT + 1)
            ns.append(3)
            metas.append(3)
            streams.append(3)
            floats.extend((0.0,) * len(FIELDS))
            addresses.extend(_NO_ADDRESS)
        arguments = {
            "xs": tuple(xs),
            "gs": tuple(gs),
            "ms": tuple(ms),
            "ns": tuple(ns),
            "metas": tuple(metas),
            "streams": tuple(streams),
            "fs": tuple(floats),
            "vs": tuple(addresses),
        }
        return _Batch(members, width, dtype, grad_dtype, arguments, metas, floats, vector)

    # -- launches

    def _common(
        self, batch: _Batch, step: int | Tensor, purpose: int, x: Sequence[Tensor]
    ) -> tuple[dict[str, Any], Tensor | None]:
        device = x[0].device
        if self._seed is None:
            value, address, self._seed_tensor = self._number(self.options.seed, device, "seed")
            self._seed = value, address
        step_value, step_at, alive = self._number(step, device, "step")
        per_vector = 16 // batch.dtype.itemsize
        return {
            "seed": self._seed[0],
            "seed_at": self._seed[1],
            "step": step_value,
            "step_at": step_at,
            "offset": self.options.chain_offset,
            "purpose": purpose,
            "chains": x[0].shape[0],
            "DTYPE": _DTYPES[batch.dtype],
            "GDTYPE": _DTYPES[batch.grad_dtype],
            "T": batch.width,
            "G": per_vector,
            "PTX": _PTX,
            "num_warps": _WARPS,
            "enable_fp_fusion": True,
        }, alive

    def _map(self, batch: _Batch, x: Sequence[Tensor], step: int | Tensor, purpose: int) -> None:
        common, _alive = self._common(batch, step, purpose, x)
        block = _groups(self._tile, common["G"], batch.vector, _PTX)
        chains = x[0].shape[0]
        groups = [chains * -(-prod(x[i].shape[1:]) // common["G"]) for i in batch.members]
        # Choosing its tensor costs a program some hundred instructions: spread them where there are programs enough
        turns = 2 if sum(groups) >= 16 * _BUSY * block else 0
        span_log2 = block.bit_length() - 1 + turns
        grid = sum(-(-count >> span_log2) for count in groups)
        _map_kernel[(grid,)](
            **batch.arguments, **common, **map_options(_PTX), VECTOR=batch.vector, B=block, span_log2=span_log2
        )

    def _shape(self, batch: _Batch, x: Sequence[Tensor], per_vector: int) -> tuple[int, int, int]:
        """(chains a program, groups of a chain a turn, splits of a chain) of the chain kernel."""
        block, chains = self._chain_groups, x[0].shape[0]
        longest = max(-(-prod(x[i].shape[1:]) // per_vector) for i in batch.members)
        if self._splits is not None:
            return 1, block, self._splits
        if longest <= block // _SHORT_CHAINS:
            return _SHORT_CHAINS, block // _SHORT_CHAINS, 1
        tiles = -(-longest // block)
        return 1, block, 1 if chains >= _BUSY else min(_PARTS.value, -(-tiles // 4), -(-2 * _BUSY // chains))

    def _norms(
        self, batch: _Batch, x: Sequence[Tensor], common: dict[str, Any], block: int, splits: int
    ) -> tuple[Tensor | None, dict[str, int]]:
        """The squared norms that the chain kernel reads, and how; nothing where it can sum them itself."""
        whole = self.options.norm_over == "tensor"
        if not any(meta & _NORM.value for meta in batch.metas) or (splits == 1 and not whole):
            return None, {"norms_at": 0, "norm_parts": 0, "norm_row_stride": 0, "norm_tensor_stride": 0}
        chains, tensors = x[0].shape[0], len(batch.members)
        sums = torch.empty((tensors, chains, splits), dtype=torch.float32, device=x[0].device)
        _norm_kernel[(chains * splits,)](
            **{name: batch.arguments[name] for name in ("gs", "ns", "metas", "fs", "vs")},
            out_at=sums.data_ptr(),
            chains=chains,
            splits=splits,
            tensors=tensors,
            GDTYPE=common["GDTYPE"],
            T=batch.width,
            C=block,
            G=common["G"],
            PTX=_PTX,
            num_warps=_WARPS,
            enable_fp_fusion=True,
        )
        if whole:
            sums = sums.sum(dim=(1, 2))
            return sums, {"norms_at": sums.data_ptr(), "norm_parts": 1, "norm_row_stride": 0, "norm_tensor_stride": 1}
        return sums, {
            "norms_at": sums.data_ptr(),
            "norm_parts": splits,
            "norm_row_stride": splits,
            "norm_tensor_stride": chains * splits,
        }

    def _chain(
        self, batches: Sequence[_Batch], x: Sequence[Tensor], step: int | Tensor, stats: bool, reject: bool
    ) -> StepStats | None:
        device, chains = x[0].device, x[0].shape[0]
        launches, alive, columns = [], [], 0
        for batch in batches:
            common, kept = self._common(batch, step, noise.ROUNDING, x)
            rows, width, splits = self._shape(batch, x, common["G"])
            norms, norm_arguments = self._norms(batch, x, common, width, splits)
            alive.extend((kept, norms))
            launches.append(
                (
                    (-(-chains // rows) * splits,),
                    {
                        **batch.arguments,
                        **common,
                        **norm_arguments,
                        "tensors": len(batch.members),
                        "splits": splits,
                        "column0": columns,
                        "R": rows,
                        "C": width,
                    },
                )
            )
            columns += splits
        outside = floats = counts = None
        if stats:
            floats = torch.empty((2, chains, columns), dtype=torch.float32, device=device)
            counts = torch.empty((2, chains, columns), dtype=torch.int64, device=device)
        todo = _UPDATE.value
        if reject:
            todo |= _REJECT.value | (_CHECK.value if columns == 1 else _SHARED.value)
        if reject and columns > 1:
            outside = torch.empty((chains, columns), dtype=torch.float32, device=device)
        if stats:
            todo |= _STATS.value | (_FINISH.value if columns == 1 else 0)
        shared = {
            "columns": columns,
            "outside_at": 0 if outside is None else outside.data_ptr(),
            "floats_at": 0 if floats is None else floats.data_ptr(),
            "counts_at": 0 if counts is None else counts.data_ptr(),
        }
        if outside is not None:
            for grid, arguments in launches:
                _chain_kernel[grid](**arguments, **shared, todo=_CHECK.value | _REJECT.value)
        for grid, arguments in launches:
            _chain_kernel[grid](**arguments, **shared, todo=todo)
        if floats is None or counts is None:
            return None
        if columns > 1:
            floats, counts = floats.sum(-1).sqrt_(), counts.sum(-1)
        return StepStats(*floats.reshape(2, chains).unbind(), *counts.reshape(2, chains).unbind())

    # -- the protocol

    def _prepare(self, x: Sequence[Tensor], params: Sequence[StepParams]) -> list[Tensor]:
        count = len(self.options.streams)
        if not len(x) == len(params) == count:
            raise ValueError(f"expected {count} tensors and as many params, got {len(x)} and {len(params)}")
        for i, xi in enumerate(x):
            if xi.dtype not in _DTYPES or xi.dim() == 0 or xi.shape[0] != x[0].shape[0] or xi.device != x[0].device:
                raise ValueError(
                    f"tensor {i} of the state must be float32, float16 or bfloat16 of shape ({x[0].shape[0]}, ...) on "
                    f"{x[0].device}, got {xi.dtype} {tuple(xi.shape)} on {xi.device}"
                )
        return [xi.detach().contiguous() for xi in x]

    def _guard(self, device: torch.device):
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            return torch.cuda.device(device)
        return nullcontext()

    @staticmethod
    def _written(x: Sequence[Tensor]) -> None:
        # the kernel writes behind autograd's back: a graph that saved the old state must still be able to notice
        for xi in x:
            if not xi.is_inference():
                torch.autograd.graph.increment_version(xi)

    def perturb(self, x: list[Tensor], params: Sequence[StepParams], step: int | Tensor) -> list[Tensor]:
        """``x + noise_scale xi``, in place; clamped to the bounds if ``clamp_noise``."""
        out = self._prepare(x, params)
        keep = _bits("noise_scale", *(("low", "high") if self.options.clamp_noise else ()))
        with self._guard(out[0].device):
            for batch in self._batches("map", out, None, params, keep, noisy=True):
                self._map(batch, out, step, noise.PERTURB_ROUNDING)
        self._written(out)
        return out

    def step(
        self,
        x: list[Tensor],
        grad: Sequence[Tensor],
        params: Sequence[StepParams],
        step: int | Tensor,
        *,
        with_noise: bool,
        stats: bool,
    ) -> tuple[list[Tensor], StepStats | None]:
        """The whole update, in place."""
        out = self._prepare(x, params)
        gradients = []
        for i, (gi, xi) in enumerate(zip(grad, out, strict=True)):
            if gi.shape != xi.shape or gi.device != xi.device or not gi.is_floating_point():
                raise ValueError(
                    f"the gradient of tensor {i} must be floating, {tuple(xi.shape)} on {xi.device}, "
                    f"got {gi.dtype} {tuple(gi.shape)} on {gi.device}"
                )
            gi = gi.detach()
            gradients.append((gi if gi.dtype in _DTYPES else gi.float()).contiguous())
        bounded = any(p.low is not None or p.high is not None for p in params)
        normed = any(p.grad_norm_clip is not None for p in params)
        reject = bounded and self.options.outside == "reject"
        result = None
        with self._guard(out[0].device):
            sums = stats or reject or normed
            batches = self._batches("chain" if sums else "map", out, gradients, params, keep=-1, noisy=with_noise)
            if not batches:
                if stats:
                    zeros = out[0].new_zeros((2, out[0].shape[0]), dtype=torch.float32)
                    counts = out[0].new_zeros((2, out[0].shape[0]), dtype=torch.int64)
                    result = StepStats(*zeros.unbind(), *counts.unbind())
            elif sums:
                result = self._chain(batches, out, step, stats, reject)
            else:
                for batch in batches:
                    self._map(batch, out, step, noise.ROUNDING)
        self._written(out)
        return out, result
