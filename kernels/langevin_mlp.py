# Triton's language is no Python to a type checker: its scalars, loops and launches.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false
"""A whole Langevin chain on a sum of MLP terms in one launch, in Triton. See :mod:`mmebm.ops.langevin_mlp.reference`.

    noise_at="before":  c = x + s xi, clamped if clamp_noise;   "after":  c = x
    h_0 = c;  h_l = act(h_(l-1) W_l + b_l);  E from the last layer;  d_n = dE/dh_n;  d_(l-1) = (d_l W_l^T) act'_(l-1)
    g = sum over the terms of d_0;  then the one update rule on c and g, noise included (:mod:`mmebm.kernels.philox`)

One kernel for everything. It interprets a short program in memory: an operation is one layer forward, one layer
backward or a quadratic, with its widths, places, activation and constants as numbers. Depth, widths, kinds and number
of terms, activations, tensors of the state and all options are run-time values, so that Triton compiles **three kernels
a precision, nine in all**, whatever the networks (``TILES``: a chain a program, few chains and many; both ops of this
family share them). A network compiled as a constant would not be faster by much where it counts: a step is a sequence
of small products that wait for weights from L2, and those are fetched ahead by the software pipeline either way.

Layout. A program has BM chains and does all K steps of them, then takes the next BM. What it keeps between operations
lies in its own piece of global memory, rows of one chain each: the state, the gradient, per hidden layer the value and
the slope act', and the outputs of a residual. That is 4 to 15 KB a chain and step, written and read by the same
multiprocessor: it stays in L1 and L2, and programs are as many as run at a time, so that it also does for 10^6 chains.
Registers hold one block of one layer, (BM, 128), and the sum over blocks of 32 units. ``tl.debug_barrier`` separates
writing from reading. (On AMD it waits for LDS only; the waves of a workgroup share the vector L1, which keeps their
order.) Values of the backward pass overwrite those of the forward pass.

Up to 128 chains are one a program, so that as many multiprocessors work. In fp32 tensor cores have nothing to do there:
a thread multiplies what it loads of the weights by the chain's values and adds, and the sums of a program's threads
meet once a block. A step takes a fourth of the instructions of the smallest tile with ``tl.dot`` (docs/kernels.md). In
bf16 that would convert every weight, which costs as much as its product: tensor cores take weights as they are, on the
left, where a tile of 16 x 8 wastes least on one chain.

Why not in registers: cross-compiled for sm_90 with Triton 3.7.1 on 2026-11-22, a kernel with both hidden layers of
64-256-256-1 in registers (BM 16, 8 warps, options included) spilled 1.6 KB a thread with tf32x3 products and 9.3 KB
with fp32 ones (whose operands Triton keeps per thread over the whole sum); only bf16 fitted. State carried over the
steps in registers was kept in four layouts at a time. Loads of weights in a loop over constants are hoisted out of the
step loop, all of them; in the run-time loops here they are not.

Tensors of the state lie side by side, each padded to a multiple of 4 columns, so that a Philox call never straddles
two; their sum is padded to a multiple of 32 and the weights of the first layer with zero rows for the padding. Other
widths are padded to multiples of 32 likewise. Weights are copied at each call into one buffer, both ways round (forward
and backward then both read rows), which a captured graph repeats: it sees new weights. What depends on shapes alone,
the program and the columns, is kept on the device from call to call; the first call must not be a captured one.

Precision. "fp32": exact products (FMA units); "tf32x3": three tf32 products, errors near fp32; "bf16": operands
rounded, products on tensor cores. Where a program has one chain the FMA units make those of tf32x3, which are then
exact. Sums are fp32. A chain's result does not depend on the chains beside it; it may depend in the last bits on
``TILES``.

Specialisation as in :mod:`mmebm.kernels.langevin_step`: seed and step are integers or addresses of 1-element int64
tensors, scalars have declared types, and no value compiles anything anew.

Limits: float32; those of :data:`mmebm.ops.terms.LIMITS` (:func:`mmebm.ops.terms.too_wide` says so before a room is
asked); CUDA of compute capability 8.0 or later, or ROCm (without tf32x3). :func:`supports` says what is not taken.
"""

from __future__ import annotations

import ctypes
import struct
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from mmebm.kernels.activations import CODES, activate, tanh, through
from mmebm.kernels.philox import box_muller, key_words, philox
from mmebm.kernels.rule import (
    BEFORE,
    CLAMP_NOISE,
    COUNT,
    ENERGY,
    FREEZE,
    GRAD_NORM,
    GRADIENT,
    NOISE_SCALE,
    NOISY,
    NORM,
    NORM_CLIP,
    OBSERVED,
    OLD,
    bounded,
    clip,
    constant_of,
    dot,
    norm_factor,
    number_of,
    proposed,
    signed64,
    table_of,
    todo_of,
)
from mmebm.ops.common.params import FIELDS
from mmebm.ops.langevin_mlp import MlpChain, MlpResult
from mmebm.ops.terms import Quadratic, Residual, Scalar, Stack, Term

__all__ = ["TILES", "Plan", "Tile", "gradient", "refusal", "run", "supports", "tile_of"]

# The program: kinds of operation, and the words of one
_HIDDEN: Final = tl.constexpr(0)  # h = act(a W + b), and act'
_HEAD: Final = tl.constexpr(1)  # the last hidden layer of a scalar: the energy, and back to before the activation
_OUTPUT: Final = tl.constexpr(2)  # the outputs of a residual: the energy, and its derivative in them
_BACK: Final = tl.constexpr(3)  # d = (d' W) act'
_INPUT: Final = tl.constexpr(4)  # gradient += d W
_QUADRATIC: Final = tl.constexpr(5)
_WORDS: Final = tl.constexpr(16)
_TANH_OUTPUT: Final = tl.constexpr(1)
_LAPLACE: Final = tl.constexpr(2)
_MASKED: Final = tl.constexpr(4)
_MOVING: Final = tl.constexpr(1)
_COLUMN_NOISY: Final = tl.constexpr(2)

# Arguments whose value must not compile anything anew
_SCALARS: Final = (
    "x",
    "out",
    "target",
    "masks",
    "observed",
    "constants",
    "energy",
    "norms",
    "frozen",
    "seed",
    "seed_at",
    "step",
    "step_at",
    "offset",
    "chains",
    "inputs",
    "columns16",
    "steps",
    "count",
    "tensors",
    "tensors_at",
    "columns_at",
    "quads_at",
    "ld16",
    "x16",
    "c16",
    "n16",
    "g16",
    "factors_at",
    "target_stride",
    "mask_stride",
    "observed_stride",
    "constant_step",
    "constant_width",
    "constant_chain",
    "todo",
)

UNIT: Final = 16  # offsets and widths are multiples of it, so that rows are read in whole vectors


# -- device


@triton.jit
def _word(table, at):
    return tl.load(table + at)


@triton.jit
def _real(table, at):
    return tl.load(table + at).to(tl.float32, bitcast=True)


@triton.jit
def _noise(table, tensors_at, quads_at, first, chain_word, step_word, k0, k1, BM: tl.constexpr, DB: tl.constexpr):
    """The normals of DB columns from ``first`` on, which is a multiple of 4."""
    quad = first // 4 + tl.arange(0, DB // 4)
    tensor = _word(table, quads_at + 2 * quad)
    block = _word(table, quads_at + 2 * quad + 1).to(tl.uint32)
    stream = _word(table, tensors_at + 4 * tensor + 2).to(tl.uint32)
    zero = tl.zeros([BM, DB // 4], tl.uint32)
    w0, w1, w2, w3 = philox(
        block[None, :] + zero, chain_word[:, None] + zero, step_word + zero, stream[None, :] + zero, k0, k1
    )
    n0, n1, n2, n3 = box_muller(w0, w1, w2, w3)
    # a renaming of registers, see join4 in mmebm.kernels.philox
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [BM, DB])


@triton.jit
def _kept(observed, observed_stride, chain, source, flags, todo):
    """Where a value stays: padding, tensors that do not move, observed elements. (BM, DB)"""
    moves = (source >= 0) & ((flags & _MOVING) != 0)
    keep = ((chain * 0)[:, None] + (1 - moves.to(tl.int32))[None, :]) != 0
    if (todo & OBSERVED) != 0:
        p = observed + chain.to(tl.int64)[:, None] * observed_stride + source[None, :]
        keep = keep | (tl.load(p, mask=(source >= 0)[None, :] & (chain >= 0)[:, None], other=0) != 0)
    return keep


@triton.jit
def _scaled(xi, row, tensor, flags, chain, width, by_chain):
    s = constant_of(row, tensor, chain, width, by_chain, NOISE_SCALE)
    return tl.where(((flags & _COLUMN_NOISY) != 0)[None, :], s * xi, 0.0)


@triton.jit
def _residual(y, goal, seen, flags, weight, inverse):
    """(value, derivative before the tanh) of a residual's outputs, elementwise."""
    slope = y * 0.0 + 1.0
    if (flags & _TANH_OUTPUT) != 0:
        y = tanh(y)
        slope = 1.0 - y * y
    r = tl.where(seen != 0, y - goal, 0.0)
    if (flags & _LAPLACE) != 0:
        value = tl.abs(r)
        d = tl.where(r > 0.0, 1.0, tl.where(r < 0.0, -1.0, r))
    else:
        value = 0.5 * r * r
        d = r
    return weight * (value * inverse), weight * (d * inverse) * slope


@triton.jit
def _fetch(x_row, own, table, columns_at, columns, x_at, NB: tl.constexpr):
    """The state into the scratch, zeros in the padding."""
    for c in range(0, columns, NB):
        col = c + tl.arange(0, NB)
        source = _word(table, columns_at + 2 * col)
        value = tl.load(x_row + source[None, :], mask=(source >= 0)[None, :], other=0.0)
        tl.store(own + (x_at + col)[None, :], value)
    tl.debug_barrier()


@triton.jit
def _deliver(out_row, own, table, columns_at, columns, at, inside, NB: tl.constexpr):
    for c in range(0, columns, NB):
        col = c + tl.arange(0, NB)
        source = _word(table, columns_at + 2 * col)
        value = tl.load(own + (at + col)[None, :])
        tl.store(out_row + source[None, :], value, mask=inside[:, None] & (source >= 0)[None, :])
    tl.debug_barrier()


@triton.jit
def _perturb(
    own,
    table,
    observed,
    row,
    chain,
    chain_word,
    step_word,
    k0,
    k1,
    columns,
    x_at,
    c_at,
    tensors_at,
    columns_at,
    quads_at,
    observed_stride,
    width,
    by_chain,
    todo,
    BM: tl.constexpr,
    NB: tl.constexpr,
):
    """Noise before the gradient, from x to c."""
    for c in range(0, columns, NB):
        col = c + tl.arange(0, NB)
        source = _word(table, columns_at + 2 * col)
        flags = _word(table, columns_at + 2 * col + 1)
        tensor = flags >> 2
        xi = _noise(table, tensors_at, quads_at, c, chain_word, step_word, k0, k1, BM, NB)
        old = tl.load(own + (x_at + col)[None, :])
        y = old + _scaled(xi, row, tensor, flags, chain, width, by_chain)
        if (todo & CLAMP_NOISE) != 0:
            y = bounded(y, row, tensor, chain, width, by_chain)
        keep = _kept(observed, observed_stride, chain, source, flags, todo)
        tl.store(own + (c_at + col)[None, :], tl.where(keep, old, y))
    tl.debug_barrier()


@triton.jit
def _update(
    own,
    table,
    observed,
    row,
    chain,
    chain_word,
    step_word,
    k0,
    k1,
    columns,
    tensors,
    x_at,
    c_at,
    n_at,
    g_at,
    factors_at,
    tensors_at,
    columns_at,
    quads_at,
    observed_stride,
    width,
    by_chain,
    todo,
    alive,
    BM: tl.constexpr,
    NB: tl.constexpr,
):
    """The rule, from c and the gradient to n, and for frozen chains back to x. Returns (squared norm, alive)."""
    # the factors of the norm clip, one for each tensor
    if (todo & NORM) != 0:
        for t in range(tensors):
            start = _word(table, tensors_at + 4 * t)
            end = _word(table, tensors_at + 4 * t + 1)
            factor = tl.full([BM], 1.0, tl.float32)
            if _word(table, tensors_at + 4 * t + 3) != 0:
                sum_t = tl.zeros([BM], tl.float32)
                for c_t in range(start, end, NB):
                    col_t = c_t + tl.arange(0, NB)
                    of_t = (col_t < end)[None, :]
                    g_t = tl.load(own + (g_at + col_t)[None, :], mask=of_t, other=0.0)
                    g_t = clip(g_t, row, t + tl.zeros([NB], tl.int32), chain, width, by_chain, todo)
                    g_t = tl.where(of_t, g_t, 0.0)
                    sum_t += tl.sum(g_t * g_t, axis=1)
                limit = tl.load(row + (t * COUNT + NORM_CLIP) * width + chain * by_chain)
                factor = norm_factor(sum_t, limit)
            tl.store(own + factors_at + t, factor[:, None])
        tl.debug_barrier()

    finite = tl.full([BM], 1, tl.int32)
    squares = tl.zeros([BM], tl.float32)
    for c in range(0, columns, NB):
        col = c + tl.arange(0, NB)
        source = _word(table, columns_at + 2 * col)
        flags = _word(table, columns_at + 2 * col + 1)
        tensor = flags >> 2
        # the noise first: it needs most registers, and nothing has to be kept meanwhile
        noise = tl.zeros([BM, NB], tl.float32)
        if (todo & (BEFORE | NOISY)) == NOISY:
            noise = _noise(table, tensors_at, quads_at, c, chain_word, step_word, k0, k1, BM, NB)
            noise = _scaled(noise, row, tensor, flags, chain, width, by_chain)
        current = tl.load(own + (c_at + col)[None, :])
        g = tl.load(own + (g_at + col)[None, :])
        moves = (source >= 0) & ((flags & _MOVING) != 0)
        squares += tl.sum(tl.where(moves[None, :], g * g, 0.0), axis=1)
        g = clip(g, row, tensor, chain, width, by_chain, todo)
        if (todo & NORM) != 0:
            g = g * tl.load(own + (factors_at + tensor)[None, :])
        y = proposed(current, g, noise, row, tensor, chain, width, by_chain, todo)
        y = tl.where(_kept(observed, observed_stride, chain, source, flags, todo), current, y)
        # inf - inf and NaN - NaN are NaN, anything finite minus itself is 0
        bad = ((y - y) != 0.0) & moves[None, :]
        finite = finite & (1 - tl.max(bad.to(tl.int32), axis=1))
        tl.store(own + (n_at + col)[None, :], y)
    tl.debug_barrier()
    if (todo & FREEZE) != 0:
        alive = alive & finite
        for c_f in range(0, columns, NB):
            col_f = c_f + tl.arange(0, NB)
            new = tl.load(own + (n_at + col_f)[None, :])
            old = tl.load(own + (x_at + col_f)[None, :])
            tl.store(own + (x_at + col_f)[None, :], tl.where((alive != 0)[:, None], new, old))
        tl.debug_barrier()
    return squares, alive


@triton.jit
def _product(own, a_at, w, b_at, K, N, n, ok, BM: tl.constexpr, NB: tl.constexpr, KB: tl.constexpr, MODE: tl.constexpr):
    """Columns n of a W for the one chain of a program: by fused multiply-adds, or in bf16 by tensor cores."""
    tl.static_assert(BM == 1)
    kk = tl.arange(0, KB)
    # pointers that move on: an offset made anew would cost more than its product
    if MODE == "bf16" or MODE == "rounded":
        # the values are a matrix of eight columns, the least there is, of which the first is not zero
        column = tl.arange(0, 8)[None, :]
        a_row = own + (a_at + kk)[:, None] + column * 0
        b_row = w + b_at + kk[:, None] * N + n[None, :]
        total = tl.zeros([NB, 8], tl.float32)
        for _ in range(0, K, KB):
            a = tl.load(a_row, mask=column == 0, other=0.0)
            b = tl.load(b_row, mask=ok[None, :], other=0.0)
            total = dot(tl.trans(b), a, total, MODE)
            a_row += KB
            b_row += KB * N
        return tl.sum(total, axis=1)[None, :]
    else:
        a_row = own + (a_at + kk)[None, :]
        b_row = w + b_at + (kk[:, None] * N + n[None, :])[None, :, :]
        total = tl.zeros([BM, KB, NB], tl.float32)
        for _ in range(0, K, KB):
            total += tl.load(a_row)[:, :, None] * tl.load(b_row, mask=ok[None, None, :], other=0.0)
            a_row += KB
            b_row += KB * N
        return tl.sum(total, axis=1)


@triton.jit(do_not_specialize=_SCALARS)
def _chain_kernel(
    x,
    out,
    w,
    v,
    target,
    masks,
    observed,
    constants,
    energy,
    norms,
    frozen,
    scratch,
    table,
    seed: tl.int64,
    seed_at: tl.int64,
    step: tl.int64,
    step_at: tl.int64,
    offset: tl.int64,
    chains: tl.int32,
    inputs: tl.int32,
    columns16: tl.int32,
    steps: tl.int32,
    count: tl.int32,
    tensors: tl.int32,
    tensors_at: tl.int32,
    columns_at: tl.int32,
    quads_at: tl.int32,
    ld16: tl.int32,
    x16: tl.int32,
    c16: tl.int32,
    n16: tl.int32,
    g16: tl.int32,
    factors_at: tl.int32,
    target_stride: tl.int64,
    mask_stride: tl.int64,
    observed_stride: tl.int64,
    constant_step: tl.int64,
    constant_width: tl.int32,
    constant_chain: tl.int32,
    todo: tl.int32,
    BM: tl.constexpr,
    NB: tl.constexpr,
    KB: tl.constexpr,
    MODE: tl.constexpr,
):
    """All steps of BM chains, then of the next ones (see the module docstring)."""
    pid = tl.program_id(0)
    columns = columns16 * 16
    x_at, c_at, n_at, g_at = x16 * 16, c16 * 16, n16 * 16, g16 * 16
    own = scratch + (pid.to(tl.int64) * BM + tl.arange(0, BM))[:, None] * (ld16 * 16)
    k0, k1 = key_words(number_of(seed, seed_at))
    first_step = number_of(step, step_at)
    for tile in range(pid, tl.cdiv(chains, BM), tl.num_programs(0)):
        here = tile * BM + tl.arange(0, BM)
        inside = here < chains
        # a row past the end does the last chain's work and stores nothing
        chain = tl.minimum(here, chains - 1)
        chain_word = (chain.to(tl.int64) + offset).to(tl.uint32)
        row_at = chain.to(tl.int64)[:, None] * inputs
        _fetch(x + row_at, own, table, columns_at, columns, x_at, NB)
        alive = tl.full([BM], 1, tl.int32)
        for k in range(steps):
            row = constants + k * constant_step
            step_word = (first_step + k).to(tl.uint32)
            if (todo & BEFORE) != 0:
                _perturb(
                    own,
                    table,
                    observed,
                    row,
                    chain,
                    chain_word,
                    step_word,
                    k0,
                    k1,
                    columns,
                    x_at,
                    c_at,
                    tensors_at,
                    columns_at,
                    quads_at,
                    observed_stride,
                    constant_width,
                    constant_chain,
                    todo,
                    BM,
                    NB,
                )

            e = tl.zeros([BM], tl.float32)
            for i in range(count):
                op = table + i * _WORDS
                kind = tl.load(op)
                K, N = tl.load(op + 1) * 16, tl.load(op + 2) * 16
                a_at, b_at = tl.load(op + 3) * 16, tl.load(op + 4) * 16
                v_at, u_at = tl.load(op + 5) * 16, tl.load(op + 6) * 16
                out_at, s_at = tl.load(op + 7) * 16, tl.load(op + 8) * 16
                flags = tl.load(op + 9)
                p0, weight, inverse = _real(op, 10), _real(op, 11), _real(op, 12)
                if kind == _HEAD:
                    e += weight * tl.load(v + tl.load(op + 13))
                for n0 in range(0, N, NB):
                    n = n0 + tl.arange(0, NB)
                    ok = n < N
                    if BM == 1:
                        acc = _product(own, a_at, w, b_at, K, N, n, ok, BM, NB, KB, MODE)
                    else:
                        acc = tl.zeros([BM, NB], tl.float32)
                        for j in range(0, K, KB):
                            kk = j + tl.arange(0, KB)
                            a = tl.load(own + (a_at + kk)[None, :])
                            b = tl.load(w + b_at + kk[:, None] * N + n[None, :], mask=ok[None, :], other=0.0)
                            acc = dot(a, b, acc, MODE)
                    if kind <= _OUTPUT:
                        acc += tl.load(v + v_at + n, mask=ok, other=0.0)[None, :]
                    if kind <= _HEAD:
                        h, d = activate(acc, flags, p0)
                        if kind == _HEAD:
                            u = (weight * tl.load(v + u_at + n, mask=ok, other=0.0))[None, :]
                            e += tl.sum(h * u, axis=1)
                            h = d * u  # which is finite: no need for through
                        else:
                            tl.store(own + (s_at + n)[None, :], d, mask=ok[None, :])
                        acc = h
                    elif kind == _OUTPUT:
                        place = (tl.load(op + 14) + n)[None, :]
                        goal_at = target + chain.to(tl.int64)[:, None] * target_stride + place
                        goal = tl.load(goal_at, mask=ok[None, :], other=0.0)
                        seen = tl.full([BM, NB], 1, tl.uint8)
                        if (flags & _MASKED) != 0:
                            seen_at = masks + chain.to(tl.int64)[:, None] * mask_stride + place
                            seen = tl.load(seen_at, mask=ok[None, :], other=0)
                        value, acc = _residual(acc, goal, seen, flags, weight, inverse)
                        e += tl.sum(value, axis=1)
                    elif kind == _BACK:
                        acc = through(acc, tl.load(own + (s_at + n)[None, :], mask=ok[None, :], other=0.0))
                    else:
                        if kind == _QUADRATIC:
                            moved = tl.load(own + (a_at + n)[None, :], mask=ok[None, :], other=0.0)
                            moved -= tl.load(v + v_at + n, mask=ok, other=0.0)[None, :]
                            acc = tl.load(v + u_at + n, mask=ok, other=0.0)[None, :] * moved
                            e += 0.5 * tl.sum(acc * moved, axis=1)
                        if flags == 0:  # not the first to write the gradient
                            acc += tl.load(own + (out_at + n)[None, :], mask=ok[None, :], other=0.0)
                    tl.store(own + (out_at + n)[None, :], acc, mask=ok[None, :])
                tl.debug_barrier()

            if (todo & ENERGY) != 0:
                tl.store(energy + k * chains.to(tl.int64) + here, e, mask=inside)
            if (todo & GRADIENT) == 0:
                squares, alive = _update(
                    own,
                    table,
                    observed,
                    row,
                    chain,
                    chain_word,
                    step_word,
                    k0,
                    k1,
                    columns,
                    tensors,
                    x_at,
                    c_at,
                    n_at,
                    g_at,
                    factors_at,
                    tensors_at,
                    columns_at,
                    quads_at,
                    observed_stride,
                    constant_width,
                    constant_chain,
                    todo,
                    alive,
                    BM,
                    NB,
                )
                if (todo & GRAD_NORM) != 0:
                    tl.store(norms + k * chains.to(tl.int64) + here, tl.sqrt_rn(squares), mask=inside)

        result_at = tl.where((todo & GRADIENT) != 0, g16, x16) * 16
        _deliver(out + row_at, own, table, columns_at, columns, result_at, inside, NB)
        if (todo & FREEZE) != 0:
            tl.store(frozen + here, (1 - alive).to(tl.uint8), mask=inside)


# -- host

_INTERPRETED: Final = isinstance(_chain_kernel, InterpretedFunction)
_WAVE: Final = 32 if torch.version.hip is None else 64


@dataclass(frozen=True)
class Tile:
    """What a launch leaves constant beside the precision.

    Attributes:
        chains: of a program at a time.
        outputs: columns of a layer, or of the state, at a time.
        depth: units summed over at a time; widths are padded to a multiple of it.
        warps: of 32 threads; of 64 half as many.
        stages: of the software pipeline that fetches weights.
    """

    chains: int
    outputs: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A description of an energy and a state for the kernels: everything but the values of tensors.

    Attributes:
        tile: see :class:`Tile`.
        words: the table, as int32 (floats by their bits).
        matrices, vectors: floats in the two buffers of weights.
        columns: width of the state in the scratch, padded.
        sources: of each of its columns the column of the flat state, -1 for padding.
        scratch: floats a chain.
        count: operations.
        layouts: per term where its tensors lie in the buffers.
        at: offsets in the table and in a chain's scratch, by the kernel's names for them.
    """

    tile: Tile
    words: tuple[int, ...]
    matrices: int
    vectors: int
    columns: int
    sources: tuple[int, ...]
    scratch: int
    count: int
    layouts: tuple[Any, ...]
    at: tuple[tuple[str, int], ...]


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _bits(value: float) -> int:
    """Of the value as float32; what is too large is infinite."""
    return struct.unpack("<i", struct.pack("<f", ctypes.c_float(value).value))[0]


@dataclass(frozen=True, slots=True)
class _Layer:
    """Where one layer lies in the buffers: (inputs, outputs) for the way forward, (outputs, inputs) for the way back,
    the bias, all padded. The one row of a scalar's last layer is a vector (``forward`` in the vectors, no ``back``)."""

    inputs: int
    outputs: int
    forward: int
    back: int
    bias: int


class _Buffers:
    def __init__(self) -> None:
        self.matrices = self.vectors = 0

    def matrix(self, size: int) -> int:
        self.matrices += size
        return self.matrices - size

    def vector(self, size: int) -> int:
        self.vectors += _up(size, UNIT)
        return self.vectors - _up(size, UNIT)


def _shape(term: Term) -> tuple[Any, ...]:
    """A term without its tensors."""
    if isinstance(term, Quadratic):
        return ("quadratic",)
    stack = (term.stack.sizes, term.stack.activation, float(term.stack.slope), float(term.weight))
    if isinstance(term, Scalar):
        return ("scalar", *stack)
    return ("residual", *stack, float(term.scale), term.likelihood, term.tanh, term.observed is not None)


def _layers(sizes: tuple[int, ...], widths: Sequence[int], scalar: bool, buffers: _Buffers) -> list[_Layer]:
    """The layers of one stack of padded ``widths`` (inputs, hidden ones, outputs)."""
    layers = []
    for i in range(len(sizes) - 1):
        inputs, outputs = widths[i], widths[i + 1]
        if scalar and i == len(sizes) - 2:
            layers.append(_Layer(inputs, 1, buffers.vector(inputs), -1, buffers.vector(1)))
        else:
            size = inputs * outputs
            layers.append(_Layer(inputs, outputs, buffers.matrix(size), buffers.matrix(size), buffers.vector(outputs)))
    return layers


def _operations(
    shapes: tuple[Any, ...], columns: int, tile: Tile, buffers: _Buffers, slots: dict[str, int], layouts: list[Any]
) -> list[list[int]]:
    """The kernel's program. ``slots``: where in a chain's scratch what lies; grows as terms need."""
    pad = tile.depth
    hidden = [0] * 8
    outputs = 0
    for shape in shapes:
        if shape[0] != "quadratic":
            inner = shape[1][1:-1]
            for i, n in enumerate(inner):
                hidden[i] = max(hidden[i], _up(n, pad))
            if shape[0] == "residual":
                outputs = max(outputs, _up(shape[1][-1], pad))
    end = slots["end"]
    values, slopes = [], []
    for n in hidden:
        values.append(end)
        slopes.append(end + n)
        end += 2 * n
    output_at = end
    slots["end"] = end + outputs

    program: list[list[int]] = []
    target = 0

    def add(
        kind: tl.constexpr,
        k: int,
        n: int,
        a: int,
        b: int,
        v: int,
        u: int,
        out: int,
        slope_at: int,
        flags: int,
        *rest: int,
    ) -> None:
        units = [k, n, a, b, v, u, out, slope_at]
        assert all(unit % UNIT == 0 for unit in units)
        word = [kind.value, *(unit // UNIT for unit in units), flags, *rest]
        program.append([*word, *[0] * (_WORDS.value - len(word))])

    first = 1
    for shape in shapes:
        if shape[0] == "quadratic":
            mean, precision = buffers.vector(columns), buffers.vector(columns)
            layouts.append((mean, precision))
            add(_QUADRATIC, 0, columns, slots["c"], 0, mean, precision, slots["g"], 0, first)
            first = 0
            continue
        kind, sizes, activation, slope, weight, *rest = shape
        scalar = kind == "scalar"
        widths = [columns, *(_up(n, pad) for n in sizes[1:])]
        layers = _layers(sizes, widths, scalar, buffers)
        layouts.append(layers)
        act, reals = CODES[activation], (_bits(slope), _bits(weight))
        last = len(sizes) - 3  # the last hidden layer
        inputs_at = slots["c"]
        for i in range(last + 1):
            layer = layers[i]
            if scalar and i == last:
                head = layers[-1]
                add(
                    _HEAD,
                    layer.inputs,
                    layer.outputs,
                    inputs_at,
                    layer.forward,
                    layer.bias,
                    head.forward,
                    values[i],
                    0,
                    act,
                    *reals,
                    0,
                    head.bias,
                )
            else:
                add(
                    _HIDDEN,
                    layer.inputs,
                    layer.outputs,
                    inputs_at,
                    layer.forward,
                    layer.bias,
                    0,
                    values[i],
                    slopes[i],
                    act,
                    *reals,
                )
            inputs_at = values[i]
        if not scalar:
            scale, likelihood, squash, masked = rest
            layer = layers[-1]
            flags = _TANH_OUTPUT.value * squash | _LAPLACE.value * (likelihood == "laplace") | _MASKED.value * masked
            inverse = 1 / scale if likelihood == "laplace" else 1 / scale / scale  # scale**2 may be 0
            add(
                _OUTPUT,
                layer.inputs,
                layer.outputs,
                inputs_at,
                layer.forward,
                layer.bias,
                0,
                output_at,
                0,
                flags,
                *reals,
                _bits(inverse),
                0,
                target,
            )
            target += layer.outputs
            add(_BACK, layer.outputs, layer.inputs, output_at, layer.back, 0, 0, values[last], slopes[last], 0)
        for i in range(last, 0, -1):
            layer = layers[i]
            add(_BACK, layer.outputs, layer.inputs, values[i], layer.back, 0, 0, values[i - 1], slopes[i - 1], 0)
        add(_INPUT, layers[0].outputs, columns, values[0], layers[0].back, 0, 0, slots["g"], 0, first)
        first = 0
    return program


@lru_cache(maxsize=256)
def _plan(
    shapes: tuple[Any, ...],
    widths: tuple[int, ...],
    streams: tuple[int, ...],
    noisy: tuple[bool, ...],
    moving: tuple[bool, ...],
    normed: tuple[bool, ...],
    freeze: bool,
    before: bool,
    tile: Tile,
) -> Plan:
    starts, end = [], 0
    for width in widths:
        starts.append(end)
        end += _up(width, 4)
    columns = _up(max(_up(end, tile.depth), 1), tile.outputs)
    sources = [-1] * columns
    column_flags = [0] * columns
    quads = [(0, 0)] * (columns // 4)
    flat = 0
    for t, (start, width) in enumerate(zip(starts, widths, strict=True)):
        for j in range(width):
            sources[start + j] = flat + j
        for j in range(_up(width, 4)):
            column_flags[start + j] = t << 2 | _MOVING.value * moving[t] | _COLUMN_NOISY.value * noisy[t]
            quads[(start + j) // 4] = (t, j // 4)
        flat += width

    buffers, layouts, slots = _Buffers(), [], {}
    names = ["x", "g", *(["n"] if freeze else [])]
    slots |= {name: i * columns for i, name in enumerate(names)}
    slots.setdefault("n", slots["x"])
    slots["c"] = slots["n"] if before else slots["x"]
    slots["factors"] = len(names) * columns
    slots["end"] = slots["factors"] + _up(len(widths), UNIT)
    program = _operations(shapes, _up(end, tile.depth), tile, buffers, slots, layouts)
    words = [word for operation in program for word in operation]
    at = {"tensors_at": len(words)}
    for t in range(len(widths)):
        words += [starts[t], starts[t] + widths[t], streams[t], int(normed[t] and moving[t])]
    at["columns_at"] = len(words)
    words += [word for pair in zip(sources, column_flags, strict=True) for word in pair]
    at["quads_at"] = len(words)
    words += [word for pair in quads for word in pair]
    at |= {f"{name}16": slots[name] // UNIT for name in ("x", "c", "n", "g")}
    at |= {"factors_at": slots["factors"], "ld16": slots["end"] // UNIT}
    return Plan(
        tile=tile,
        words=tuple(words),
        matrices=buffers.matrices,
        vectors=buffers.vectors,
        columns=columns,
        sources=tuple(sources),
        scratch=slots["end"],
        count=len(program),
        layouts=tuple(layouts),
        at=tuple(at.items()),
    )


_CODES_OF_PRECISION: Final = {"fp32": "ieee", "tf32x3": "tf32x3", "bf16": "rounded" if _INTERPRETED else "bf16"}
_BROAD: Final = 64 if OLD else 128  # columns; broader ones spill
_ALONE: Final = Tile(1, 128, 32, 4, 1)
_ALONE_DOT: Final = Tile(1, 128, 32, 4, 2)  # where the pipeline fetches for tl.dot
# By precision: a chain a program, few chains, and many. The table of tests/ops/langevin_mlp/test_triton_compile.py and
# docs/kernels.md say why these.
TILES: Final = {
    "fp32": (_ALONE, Tile(8, _BROAD, 32, 8, 3), Tile(32, _BROAD, 32, 8, 3)),
    "tf32x3": (_ALONE, Tile(16, _BROAD, 32, 8, 3), Tile(32, _BROAD, 32, 8, 3)),
    "bf16": (_ALONE_DOT, Tile(16, _BROAD, 32, 8, 3), Tile(32, _BROAD, 32, 8, 3)),
}
_FEW: Final = 128  # programs of one chain: no more than there are multiprocessors, as each reads all weights
_MANY: Final = 256  # programs that fill a device


def tile_of(chains: int, precision: str) -> Tile:
    """The tile of a problem. A function of the chains alone, not of the device: last bits could depend on it."""
    alone, few, many = TILES[precision]
    if chains <= _FEW:
        return alone
    return few if chains <= _MANY * few.chains else many


# What a captured graph reads must stay: the tables of chains that were captured are never given up.
_tables: OrderedDict[tuple[Plan, torch.device], tuple[Tensor, Tensor]] = OrderedDict()
_captured: dict[tuple[Plan, torch.device], tuple[Tensor, Tensor]] = {}


def _table(plan: Plan, device: torch.device) -> tuple[Tensor, Tensor]:
    """The plan's words, and the column of each element of the flat state, on the device."""
    key = (plan, device)
    found = _captured.get(key) or _tables.get(key)
    if found is None:
        columns = [column for column, source in enumerate(plan.sources) if source >= 0]
        found = (
            torch.tensor(plan.words, dtype=torch.int32, device=device),
            torch.tensor(columns, dtype=torch.int64, device=device),
        )
        _tables[key] = found
        if len(_tables) > 64:
            _tables.popitem(last=False)
    else:
        _tables.pop(key, None)
        _tables[key] = found
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured[key] = found
    return found


def _pack(plan: Plan, terms: Sequence[Term], index: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The weights as the kernels read them: both orders of each matrix, padded with zeros. New each time: the weights
    may have changed, and a captured graph is to see it."""
    device = index.device
    w = torch.zeros(max(plan.matrices, UNIT), dtype=dtype, device=device)
    v = torch.zeros(max(plan.vectors, UNIT), dtype=torch.float32, device=device)
    # without gaps between the tensors of the state, plain slices will do
    plain = plan.sources[: len(index)] == tuple(range(len(index)))
    for term, layout in zip(terms, plan.layouts, strict=True):
        if isinstance(term, Quadratic):
            for at, value in zip(layout, (term.mean, term.precision), strict=True):
                v[at:].index_copy_(0, index, value)
            continue
        stack: Stack = term.stack
        for i, (layer, weight, bias) in enumerate(zip(layout, stack.weights, stack.biases, strict=True)):
            outputs, inputs = weight.shape
            if bias is not None:
                v[layer.bias : layer.bias + outputs].copy_(bias)
            if layer.back < 0:
                v[layer.forward : layer.forward + inputs].copy_(weight[0])
                continue
            size = layer.inputs * layer.outputs
            forward = w[layer.forward : layer.forward + size].view(layer.inputs, layer.outputs)[:, :outputs]
            back = w[layer.back : layer.back + size].view(layer.outputs, layer.inputs)[:outputs]
            if i > 0 or plain:
                forward[:inputs].copy_(weight.t())
                back[:, :inputs].copy_(weight)
            else:
                forward.index_copy_(0, index, weight.t().to(dtype))
                back.index_copy_(1, index, weight.to(dtype))
    return w, v


def _goals(plan: Plan, terms: Sequence[Term], v: Tensor, chains: int) -> tuple[Tensor, Tensor, dict[str, int]]:
    """The targets of all residuals side by side (chains, outputs), and which elements count, as bytes."""
    nothing = {"target_stride": 0, "mask_stride": 0}
    pairs = [(t, layout[-1].outputs) for t, layout in zip(terms, plan.layouts, strict=True) if isinstance(t, Residual)]
    if not pairs:
        return v, v.view(torch.uint8), nothing
    total = sum(width for _, width in pairs)
    target = torch.zeros(chains, total, dtype=torch.float32, device=v.device)
    at = 0
    for term, width in pairs:
        target[:, at : at + term.target.shape[1]].copy_(term.target)
        at += width
    masks = v.view(torch.uint8)
    stride = 0
    if any(term.observed is not None for term, _ in pairs):
        rows = max(term.observed.shape[0] for term, _ in pairs if term.observed is not None)
        masks = torch.ones(rows, total, dtype=torch.uint8, device=v.device)
        at = 0
        for term, width in pairs:
            if term.observed is not None:
                masks[:, at : at + term.observed.shape[1]].copy_(term.observed)
            at += width
        stride = total if rows > 1 else 0
    return target, masks, {"target_stride": total, "mask_stride": stride}


def _address(value: int | Tensor, device: torch.device, name: str) -> tuple[int, int, Tensor | None]:
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


def _programs(tiles: int, device: torch.device) -> int:
    """How many programs: what the device runs at a time, so that the scratch stays in its cache."""
    if _INTERPRETED:
        return min(tiles, 2)
    return min(tiles, 2 * torch.cuda.get_device_properties(device).multi_processor_count)


def compile_options(tile: Tile, wave: int) -> dict[str, Any]:
    """What the compiler is told beside constants, for threads in waves of 32 (NVIDIA) or 64 (AMD)."""
    options = {"num_warps": max(1, tile.warps * 32 // wave), "num_stages": tile.stages, "enable_fp_fusion": True}
    if wave == 32 and tile.chains == 1:
        # no more programs than fit with them all: ptxas need not spill to make room for others
        options["maxnreg"] = 255
    return options


def _launch(
    plan: Plan, terms: Sequence[Term], x: Tensor, precision: str, arguments: dict[str, Any], chains: int, steps: int
) -> None:
    tile, device = plan.tile, x.device
    table, index = _table(plan, device)
    w, v = _pack(plan, terms, index, torch.bfloat16 if precision == "bf16" else torch.float32)
    target, masks, strides = _goals(plan, terms, v, chains)
    tiles = -(-chains // tile.chains)
    common = {
        "x": x,
        "w": w,
        "v": v,
        "target": target,
        "masks": masks,
        "table": table,
        "chains": chains,
        "inputs": x.shape[1],
        "columns16": plan.columns // UNIT,
        "steps": steps,
        "count": plan.count,
        **strides,
        **dict(plan.at),
        "BM": tile.chains,
        "MODE": _CODES_OF_PRECISION[precision],
        **compile_options(tile, _WAVE),
    }
    filled = {
        "observed": masks.view(torch.uint8),
        "constants": v,
        "energy": v,
        "norms": v,
        "frozen": v.view(torch.uint8),
        "seed": 0,
        "seed_at": 0,
        "step": 0,
        "step_at": 0,
        "offset": 0,
        "tensors": 0,
        "observed_stride": 0,
        "constant_step": 0,
        "constant_width": 1,
        "constant_chain": 0,
    } | arguments
    programs = _programs(tiles, device)
    scratch = torch.empty(programs * tile.chains * plan.scratch, dtype=torch.float32, device=device)
    _chain_kernel[(programs,)](**common, **filled, scratch=scratch, NB=tile.outputs, KB=tile.depth)


def _guard(device: torch.device):
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return nullcontext()


def refusal(x: Tensor, precision: str = "fp32") -> str | None:
    """Why Triton does not run on the state ``x``, or ``None``."""
    device = x.device
    if _INTERPRETED:
        if device.type != "cpu":
            return f"Triton's interpreter (TRITON_INTERPRET=1) runs on the CPU, the state is on {device}"
    elif device.type != "cuda":
        return f"the state is on {device}, Triton needs a CUDA or ROCm device"
    elif torch.version.hip is not None:
        if precision == "tf32x3":
            return "Triton has no tf32x3 products for ROCm devices; precision='fp32' is exact there"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"compute capability {major}.{minor} is below 8.0"
    if x.shape[0] > 2**30:
        return f"{x.shape[0]} chains, taken are up to 2^30"
    return None


def supports(chain: MlpChain, x: Tensor) -> str | None:
    """``None`` if :func:`run` takes this chain, else the reason why not."""
    reason = refusal(x, chain.precision)
    if reason is not None:
        return reason
    if isinstance(chain.seed, Tensor) and chain.seed.device not in (x.device, torch.device("cpu")):
        return f"the seed is on {chain.seed.device}, the state on {x.device}"
    return None


def run(
    chain: MlpChain,
    x: Tensor,
    steps: int,
    first_step: int | Tensor,
    *,
    energy: bool = False,
    grad_norm: bool = False,
    tile: Tile | None = None,
) -> MlpResult:
    """``steps`` steps from the flat state ``x`` (chains, inputs), which stays as it is.

    ``tile`` replaces the choice of :func:`tile_of`; it changes nothing but the order of sums.
    """
    device, chains = x.device, x.shape[0]
    tensors = len(chain.widths)
    before = chain.noise_at == "before"
    norm_bit = 1 << FIELDS.index("grad_norm_clip")
    made = _plan(
        tuple(_shape(term) for term in chain.terms),
        chain.widths,
        chain.streams,
        chain.noisy,
        chain.moving,
        tuple(bool(word & norm_bit) for word in chain.present),
        chain.freeze,
        before,
        tile or tile_of(chains, chain.precision),
    )
    todo = todo_of(chain) | ENERGY.value * energy | GRAD_NORM.value * grad_norm
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    arguments: dict[str, Any] = {"out": out, "offset": chain.chain_offset, "tensors": tensors, "todo": todo}
    records: dict[str, Tensor] = {}
    for name, wanted in (("energy", energy), ("norms", grad_norm)):
        if wanted:
            records[name] = torch.empty(steps, chains, dtype=torch.float32, device=device)
    frozen = None
    if chain.freeze:
        frozen = torch.empty(chains, dtype=torch.bool, device=device)
        records["frozen"] = frozen.view(torch.uint8)
    seed, seed_at, seed_alive = _address(chain.seed, device, "seed")
    step, step_at, step_alive = _address(first_step, device, "first_step")
    constants = table_of(chain)
    rows, _, fields, width = constants.shape
    arguments |= {
        **records,
        "seed": seed,
        "seed_at": seed_at,
        "step": step,
        "step_at": step_at,
        "constants": constants,
        "constant_step": 0 if rows == 1 else tensors * fields * width,
        "constant_width": width,
        "constant_chain": int(width > 1),
    }
    if chain.observed is not None:
        observed = chain.observed.contiguous()
        arguments |= {"observed": observed, "observed_stride": observed.shape[1] if observed.shape[0] > 1 else 0}
    with _guard(device):
        _launch(made, chain.terms, x.contiguous(), chain.precision, arguments, chains, steps)
    # what addresses point to had to live until here
    del seed_alive, step_alive
    return MlpResult(out, records.get("energy"), records.get("norms"), frozen)


def gradient(terms: Sequence[Term], x: Tensor, *, tile: Tile | None = None) -> tuple[Tensor, Tensor]:
    """(energy (chains,), its gradient (chains, inputs)) by the same kernels, in fp32."""
    chains, inputs = x.shape
    out, energy = torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(chains)
    if chains == 0:
        return energy, out
    widths = (inputs,)
    made = _plan(
        tuple(_shape(term) for term in terms),
        widths,
        (0,),
        (False,),
        (True,),
        (False,),
        False,
        False,
        tile or tile_of(chains, "fp32"),
    )
    arguments = {"out": out, "energy": energy, "todo": GRADIENT.value | ENERGY.value}
    with _guard(x.device):
        _launch(made, terms, x.contiguous(), "fp32", arguments, chains, 1)
    return energy, out
