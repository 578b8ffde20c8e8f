# Triton's language is no Python to a type checker: its scalars, loops and launches.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportInvalidTypeForm=false
"""Energy and gradient of a net of convolutions, and the update of the state, in Triton: the kernels.

:mod:`mmebm.ops.net.triton` says which of them run, in which order and where things lie; how the parts play together is
on the page docs/kernels.md.

    product     a convolution, its gradient in x, a transposed convolution, a linear layer: one gather and one product

                    out[n, m] = sum over (r, j) of  w[n, r, tap j] in[r, q(m) A + C + j D]

                with bias, a residual sum, the activation and its slope behind the forward pass; a sum with what is
                there already, the slope and, for the first layer, the update of the state behind the backward pass.
                A stride of s in the direction that spreads is s^2 classes of positions, each without wasted taps.
    gather      a sparse map of positions (pooling, padding, concatenation, sums, upsampling), or a logsumexp
    scatter     the transposed one: every element of the input collects from a list, so that there are no atomics
    pointwise   sums, products, activations that are not behind a product
    norm        per chain and group, both directions
    perturb     noise before the gradient
    rule        what follows the gradient: the update where it needs the whole chain, and the records

Memory: one row of float32 a chain, the *arena*, holds the state, every value, slope and gradient; one buffer holds all
tensors of the net, one the index lists. Places are offsets in these, so that the launches of a step are the same
whatever the numbers, and a captured graph of them is valid as long as the buffers live. All sizes are run-time values:
a new network compiles nothing. Sums have one order: results repeat bit for bit.
"""

from __future__ import annotations

from typing import Any, Final

import triton
import triton.language as tl

from mmebm.kernels.activations import CODES, activate, through
from mmebm.kernels.philox import key_words, normal_of, normals
from mmebm.kernels.rule import (
    BEFORE,
    CLAMP_NOISE,
    COUNT,
    FREEZE,
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
    proposed,
)

__all__ = [
    "BLOCK",
    "DEPTH",
    "FORMS",
    "FUNCTIONS",
    "NONE",
    "TILES",
    "WARPS",
    "gather_kernel",
    "norm_kernel",
    "perturb_kernel",
    "pointwise_kernel",
    "product_kernel",
    "rule_kernel",
    "scatter_kernel",
]

# The tiles of a product: (outputs, positions) by the number of outputs; the sum runs over DEPTH at a time. The tables
# of tests/ops/net/test_triton_compile.py say why these.
TILES: Final = {16: (16, 128), **({32: (32, 64)} if OLD else {32: (32, 128), 64: (64, 64)})}
DEPTH: Final = 32
WARPS: Final = {"product": 8, "others": 4}  # of 32 threads
# Elements of a program of the others; (outputs, terms of each at a time) of a gather by its number of terms
BLOCK: Final = 512
FORMS: Final = {1: (512, 1), 4: (128, 4), 32: (16, 32), 512: (1, 512)}

NONE: Final = -1  # an operand that is not there
_NONE: Final = tl.constexpr(NONE)
# The functions that are built, by their numbers
FUNCTIONS: Final = (*CODES, "sigmoid", "square", "abs", "exp", "sqrt", "reciprocal")
_PLAIN: Final = tl.constexpr(len(CODES))
_SIGMOID: Final = tl.constexpr(FUNCTIONS.index("sigmoid"))
_SQUARE: Final = tl.constexpr(FUNCTIONS.index("square"))
_ABS: Final = tl.constexpr(FUNCTIONS.index("abs"))
_EXP: Final = tl.constexpr(FUNCTIONS.index("exp"))
_SQRT: Final = tl.constexpr(FUNCTIONS.index("sqrt"))

# Words of a tensor of the state in the table of rule and perturb
_START: Final = tl.constexpr(0)
_WIDTH: Final = tl.constexpr(1)
_STREAM: Final = tl.constexpr(2)
_TENSOR_NOISY: Final = tl.constexpr(3)
_TENSOR_NORMED: Final = tl.constexpr(4)
_TENSOR_MOVES: Final = tl.constexpr(5)
_TENSOR_WORDS: Final = tl.constexpr(6)


def _jit(function: Any) -> Any:
    """A kernel that no value compiles anew: arguments of a declared type are not specialised."""
    declared = [name for name, kind in function.__annotations__.items() if kind != "tl.constexpr"]
    return triton.jit(do_not_specialize=declared)(function)


# -- device


@triton.jit
def _function(a, f, alpha):
    """(f(a), f'(a)) of function number ``f`` of :data:`FUNCTIONS`."""
    if f < _PLAIN:
        h, d = activate(a, f, alpha)
    elif f == _SIGMOID:
        e = tl.exp(-a)
        h = 1.0 / (1.0 + e)
        d = h * (tl.minimum(e, 3e38) * h)
    elif f == _SQUARE:
        h = a * a
        d = 2.0 * a
    elif f == _ABS:
        h = tl.abs(a)
        d = tl.where(a > 0.0, 1.0, tl.where(a < 0.0, -1.0, 0.0))
    elif f == _EXP:
        h = tl.exp(a)
        d = h
    elif f == _SQRT:
        h = tl.sqrt_rn(a)
        d = 0.5 / h
    else:
        h = 1.0 / a
        d = -h * h
    return h, d


@triton.jit
def _taps(r, pad, dilation, stride, period, kernel, spread):
    """(first tap, its input position at q = 0, number of taps) of the positions that are ``r`` modulo the stride.

    Output o = q stride + r gets tap k from input (o + pad - dilation k) / stride, where that is whole.
    """
    first = 0
    count = kernel
    begin = -pad
    if spread != 0:
        first = kernel
        for k in range(0, period):
            back = period - 1 - k
            # a multiple of the stride is added, as the remainder of a negative number is one
            if (r + pad - dilation * back + dilation * period * stride) % stride == 0:
                first = back
        count = tl.maximum(kernel - first + period - 1, 0) // period
        begin = (r + pad - dilation * first) // stride
    return first, begin, count


@triton.jit
def _scaled_noise(xi, row, tensor, chain, width, by_chain):
    return constant_of(row, tensor, chain, width, by_chain, NOISE_SCALE) * xi


@triton.jit
def _new_state(x, g, noise, kept, row, tensor, chain, width, by_chain, todo):
    """The one rule after the norm clip; ``tensor`` and ``chain`` are vectors of one element."""
    y = proposed(x, g, noise, row, tensor, chain, width, by_chain, todo)
    return tl.where(kept != 0, x, y)


@_jit
def product_kernel(
    a,
    w,
    ld: tl.int32,
    chains: tl.int32,
    in_at: tl.int32,
    out_at: tl.int32,
    slope_at: tl.int32,
    rest_at: tl.int32,
    w_at: tl.int32,
    bias_at: tl.int32,
    N: tl.int32,
    R: tl.int32,
    wn: tl.int32,
    wr: tl.int32,
    wg: tl.int32,
    KH: tl.int32,
    KW: tl.int32,
    IH: tl.int32,
    IW: tl.int32,
    OH: tl.int32,
    OW: tl.int32,
    SY: tl.int32,
    SX: tl.int32,
    PY: tl.int32,
    PX: tl.int32,
    DY: tl.int32,
    DX: tl.int32,
    QY: tl.int32,
    QX: tl.int32,
    spread: tl.int32,
    tiles: tl.int32,
    classes: tl.int32,
    function: tl.int32,
    alpha: tl.float32,
    rest_scale: tl.float32,
    numbers,
    counts,
    constants,
    observed,
    partials,
    parts: tl.int32,
    x_at: tl.int32,
    start: tl.int32,
    tensor: tl.int32,
    index: tl.int32,
    noisy: tl.int32,
    observed_stride: tl.int32,
    constant_step: tl.int32,
    constant_width: tl.int32,
    constant_chain: tl.int32,
    todo: tl.int32,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    MODE: tl.constexpr,
    UPDATE: tl.constexpr,
):
    """One tile of BN outputs of a group and BM positions; grid ([chains *] classes * tiles, groups * blocks of N).

    Without UPDATE the positions of all chains are one range; with it a program has positions of one chain, and leaves
    its part of the gradient's square in ``partials`` from ``out_at`` on. ``spread``: the gradient of a convolution,
    whose input is the smaller side. S, P, D: stride, padding and dilation; Q: s / gcd(s, d).
    """
    own_chain = tl.program_id(0) // (classes * tiles)
    part = tl.program_id(0) % (classes * tiles)
    cls = part // tiles
    tile = part % tiles
    blocks = tl.cdiv(N, BN)
    group = tl.program_id(1) // blocks
    n = (tl.program_id(1) % blocks) * BN + tl.arange(0, BN)
    ok_n = n < N

    # positions of this class: o = q B + r, input q A + begin + j step
    stride_y = 1
    stride_x = 1
    cells_y = SY
    cells_x = SX
    if spread != 0:
        stride_y = SY
        stride_x = SX
        cells_y = 1
        cells_x = 1
    r_y = cls // stride_x
    r_x = cls % stride_x
    height = (OH - r_y + stride_y - 1) // stride_y
    width = (OW - r_x + stride_x - 1) // stride_x
    tap_y, begin_y, count_y = _taps(r_y, PY, DY, SY, QY, KH, spread)
    tap_x, begin_x, count_x = _taps(r_x, PX, DX, SX, QX, KW, spread)
    step_y = DY
    step_x = DX
    apart_y = 1
    apart_x = 1
    if spread != 0:
        step_y = -(DY * QY) // SY
        step_x = -(DX * QX) // SX
        apart_y = QY
        apart_x = QX

    m = tile * BM + tl.arange(0, BM)
    cells = height * width
    if UPDATE:
        chain = own_chain + m * 0
        q = m
        ok_m = m < cells
    else:
        chain = m // tl.maximum(cells, 1)
        q = m - chain * cells
        ok_m = m < chains * cells
        chain = tl.minimum(chain, chains - 1)
    q_y = q // tl.maximum(width, 1)
    q_x = q - q_y * width
    row = chain * ld  # an arena has fewer than 2^31 numbers: offsets of 32 bits take half the registers
    from_y = q_y * cells_y + begin_y
    from_x = q_x * cells_x + begin_x
    inside = row + in_at + group * R * IH * IW

    acc = tl.zeros([BN, BM], tl.float32)
    taps = count_y * count_x
    depth = R * taps
    for k0 in range(0, depth, BK):
        kk = k0 + tl.arange(0, BK)
        ok_k = kk < depth
        r = kk // taps
        j = kk - r * taps
        j_y = j // count_x
        j_x = j - j_y * count_x
        y = (j_y * step_y)[:, None] + from_y[None, :]
        x = (j_x * step_x)[:, None] + from_x[None, :]
        there = (y >= 0) & (y < IH) & (x >= 0) & (x < IW) & ok_k[:, None] & ok_m[None, :]
        value = tl.load(a + (inside[None, :] + ((r * IH)[:, None] + y) * IW + x), mask=there, other=0.0)
        tap = (tap_y + j_y * apart_y) * KW + tap_x + j_x * apart_x
        weight = tl.load(
            w + (w_at + group * wg + n[:, None] * wn + (r * wr + tap)[None, :]),
            mask=ok_n[:, None] & ok_k[None, :],
            other=0.0,
        )
        acc = dot(weight, value, acc, MODE)

    channel = group * N + n
    at = channel[:, None] * (OH * OW) + ((q_y * stride_y + r_y) * OW + q_x * stride_x + r_x)[None, :]
    ok = ok_n[:, None] & ok_m[None, :]
    place = row[None, :] + at
    if bias_at != _NONE:
        acc += tl.load(w + bias_at + channel, mask=ok_n, other=0.0)[:, None]
    if rest_at != _NONE:
        acc += rest_scale * tl.load(a + (place + rest_at), mask=ok, other=0.0)
    if UPDATE:
        one = tl.zeros([1], tl.int32) + own_chain
        of = tl.zeros([1], tl.int32) + tensor
        step = tl.load(counts + own_chain)
        constant_row = constants + step * constant_step
        noise = tl.zeros([BN, BM], tl.float32)
        if noisy != 0:
            k_0, k_1 = key_words(tl.load(numbers))
            step_word = (tl.load(numbers + 1) + step).to(tl.uint32)
            chain_word = (tl.load(numbers + 2) + own_chain).to(tl.uint32)
            xi = normal_of(at.to(tl.uint32), chain_word, step_word, index.to(tl.uint32), k_0, k_1)
            noise = _scaled_noise(xi, constant_row, of, one, constant_width, constant_chain)
        old = tl.load(a + (place + x_at), mask=ok, other=0.0)
        kept = tl.zeros([BN, BM], tl.uint8)
        if (todo & OBSERVED) != 0:
            seen = observed + own_chain.to(tl.int64) * observed_stride + start
            kept = tl.load(seen + at, mask=ok, other=0)
        squares = tl.sum(tl.sum(tl.where(ok, acc * acc, 0.0), axis=1), axis=0)
        slot = tl.program_id(1) * (classes * tiles) + part
        tl.store(partials + own_chain.to(tl.int64) * parts + out_at + slot, squares)
        g = clip(acc, constant_row, of, one, constant_width, constant_chain, todo)
        new = _new_state(old, g, noise, kept, constant_row, of, one, constant_width, constant_chain, todo)
        tl.store(a + (place + x_at), new, mask=ok)
    else:
        if function != _NONE:
            acc, slope = _function(acc, function, alpha)
            tl.store(a + (place + slope_at), slope, mask=ok)
        elif slope_at != _NONE:
            acc = through(acc, tl.load(a + (place + slope_at), mask=ok, other=0.0))
        tl.store(a + (place + out_at), acc, mask=ok)


@_jit
def gather_kernel(
    a,
    w,
    lists,
    ld: tl.int32,
    chains: tl.int32,
    n: tl.int32,
    k: tl.int32,
    list_at: tl.int32,
    weight_at: tl.int32,
    out_at: tl.int32,
    lse: tl.int32,
    BO: tl.constexpr,
    BK: tl.constexpr,
):
    """out[i] = sum over k of weight[i, k] row[list[i, k]]; an entry of -1 is 0. With ``lse`` log sum exp of them."""
    index = tl.program_id(0).to(tl.int64) * BO + tl.arange(0, BO)
    ok = index < chains.to(tl.int64) * n
    chain = index // n
    i = index - chain * n
    row = a + chain * ld
    total = tl.zeros([BO, BK], tl.float32)
    most = tl.zeros([BO], tl.float32)
    if lse != 0:
        high = tl.full([BO, BK], float("-inf"), tl.float32)
        for k0 in range(0, k, BK):
            kk = k0 + tl.arange(0, BK)
            there = ok[:, None] & (kk < k)[None, :]
            entry = tl.load(lists + list_at + (i * k)[:, None] + kk[None, :], mask=there, other=0)
            value = tl.load(row[:, None] + entry, mask=there, other=float("-inf"))
            # by comparison, so that NaN is lost here and found again in the sum
            high = tl.where(value > high, value, high)
        most = tl.max(high, axis=1)
        # -inf everywhere, or inf somewhere, is its own logsumexp
        most = tl.where(tl.abs(most) < float("inf"), most, 0.0)
    for k1 in range(0, k, BK):
        kk = k1 + tl.arange(0, BK)
        there = ok[:, None] & (kk < k)[None, :]
        entry = tl.load(lists + list_at + (i * k)[:, None] + kk[None, :], mask=there, other=-1)
        value = tl.load(row[:, None] + entry, mask=entry >= 0, other=0.0)
        if lse != 0:
            value = tl.where(there, tl.exp(value - most[:, None]), 0.0)
        elif weight_at != _NONE:
            value *= tl.load(w + weight_at + (i * k)[:, None] + kk[None, :], mask=there, other=0.0)
        total += value
    out = tl.sum(total, axis=1)
    if lse != 0:
        out = most + tl.log(out)
    tl.store(row + out_at + i, out, mask=ok)


@_jit
def scatter_kernel(
    a,
    w,
    lists,
    ld: tl.int32,
    chains: tl.int32,
    n: tl.int32,
    k: tl.int32,
    starts_at: tl.int32,
    list_at: tl.int32,
    weight_at: tl.int32,
    in_at: tl.int32,
    out_at: tl.int32,
    rest_at: tl.int32,
    rest_scale: tl.float32,
    slope_at: tl.int32,
    lse: tl.int32,
    u_at: tl.int32,
    v_at: tl.int32,
    B: tl.constexpr,
):
    """The gradient of a gather in n of its elements: element j collects from entries starts[j] to starts[j + 1] of the
    sorted list, each a place i k + term of the forward list. ``lse``: exp(u[j] - v[i]) is the weight."""
    index = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    ok = index < chains.to(tl.int64) * n
    chain = index // n
    j = index - chain * n
    row = a + chain * ld
    begin = tl.load(lists + starts_at + j, mask=ok, other=0)
    end = tl.load(lists + starts_at + j + 1, mask=ok, other=0)
    own = tl.zeros([B], tl.float32)
    if lse != 0:
        own = tl.load(row + u_at + j, mask=ok, other=0.0)
    total = tl.zeros([B], tl.float32)
    for t in range(0, tl.max(end - begin, axis=0)):
        there = begin + t < end
        entry = tl.load(lists + list_at + begin + t, mask=there, other=0)
        i = entry // k
        d = tl.load(row + in_at + i, mask=there, other=0.0)
        if lse != 0:
            d *= tl.exp(own - tl.load(row + v_at + i, mask=there, other=0.0))
        elif weight_at != _NONE:
            d *= tl.load(w + weight_at + entry, mask=there, other=0.0)
        total += tl.where(there, d, 0.0)
    if rest_at != _NONE:
        total += rest_scale * tl.load(row + rest_at + j, mask=ok, other=0.0)
    if slope_at != _NONE:
        total = through(total, tl.load(row + slope_at + j, mask=ok, other=0.0))
    tl.store(row + out_at + j, total, mask=ok)


@_jit
def pointwise_kernel(
    a,
    w,
    ld: tl.int32,
    chains: tl.int32,
    n: tl.int32,
    u_at: tl.int32,
    u_scale: tl.float32,
    v_at: tl.int32,
    v_scale: tl.float32,
    times: tl.int32,
    scale_at: tl.int32,
    scale_stride: tl.int32,
    shift_at: tl.int32,
    shift_stride: tl.int32,
    rest_at: tl.int32,
    rest_scale: tl.float32,
    function: tl.int32,
    alpha: tl.float32,
    slope_at: tl.int32,
    out_at: tl.int32,
    B: tl.constexpr,
):
    """out = f(u_scale u [+ v_scale v | * v (times 1) | / v (2)] [* scale] [+ shift] [+ rest_scale rest]) [* slope].

    A ``function`` stores its slope. Scale and shift lie in the buffer of the net's tensors, one row for all chains
    (stride 0) or one for each.
    """
    index = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    ok = index < chains.to(tl.int64) * n
    chain = index // n
    i = index - chain * n
    row = a + chain * ld
    y = u_scale * tl.load(row + u_at + i, mask=ok, other=0.0)
    if v_at != _NONE:
        v = tl.load(row + v_at + i, mask=ok, other=0.0)
        if times == 1:
            y = y * v
        elif times == 2:
            y = tl.div_rn(y, v)
        else:
            y = y + v_scale * v
    if scale_at != _NONE:
        y = y * tl.load(w + scale_at + chain * scale_stride + i, mask=ok, other=0.0)
    if shift_at != _NONE:
        y = y + tl.load(w + shift_at + chain * shift_stride + i, mask=ok, other=0.0)
    if rest_at != _NONE:
        y = y + rest_scale * tl.load(row + rest_at + i, mask=ok, other=0.0)
    if function != _NONE:
        y, slope = _function(y, function, alpha)
        tl.store(row + slope_at + i, slope, mask=ok)
    elif slope_at != _NONE:
        y = through(y, tl.load(row + slope_at + i, mask=ok, other=0.0))
    tl.store(row + out_at + i, y, mask=ok)


@_jit
def norm_kernel(
    a,
    ld: tl.int32,
    chains: tl.int32,
    in_at: tl.int32,
    out_at: tl.int32,
    rstd_at: tl.int32,
    value_at: tl.int32,
    rest_at: tl.int32,
    rest_scale: tl.float32,
    slope_at: tl.int32,
    length: tl.int32,
    groups: tl.int32,
    eps: tl.float32,
    backward: tl.int32,
    B: tl.constexpr,
):
    """y = (x - mean) rstd of one group of ``length`` elements, or back: d_x = rstd (d - mean(d) - y mean(d y))."""
    chain = tl.program_id(0) // groups
    group = tl.program_id(0) % groups
    row = a + chain.to(tl.int64) * ld
    here = group * length
    first = tl.zeros([B], tl.float32)
    second = tl.zeros([B], tl.float32)
    for start in range(0, length, B):
        i = start + tl.arange(0, B)
        v = tl.load(row + in_at + here + i, mask=i < length, other=0.0)
        first += v
        if backward != 0:
            second += v * tl.load(row + value_at + here + i, mask=i < length, other=0.0)
    mean = tl.sum(first, axis=0) / length
    if backward == 0:
        for start2 in range(0, length, B):
            i = start2 + tl.arange(0, B)
            v = tl.load(row + in_at + here + i, mask=i < length, other=0.0) - mean
            second += tl.where(i < length, v * v, 0.0)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(second, axis=0) / length + eps)
        tl.store(row + rstd_at + group, rstd)
        for start3 in range(0, length, B):
            i = start3 + tl.arange(0, B)
            v = tl.load(row + in_at + here + i, mask=i < length, other=0.0) - mean
            tl.store(row + out_at + here + i, v * rstd, mask=i < length)
    else:
        along = tl.sum(second, axis=0) / length
        rstd = tl.load(row + rstd_at + group)
        for start4 in range(0, length, B):
            i = start4 + tl.arange(0, B)
            ok = i < length
            d = tl.load(row + in_at + here + i, mask=ok, other=0.0)
            y = tl.load(row + value_at + here + i, mask=ok, other=0.0)
            d = rstd * (d - mean - y * along)
            if rest_at != _NONE:
                d += rest_scale * tl.load(row + rest_at + here + i, mask=ok, other=0.0)
            if slope_at != _NONE:
                d = through(d, tl.load(row + slope_at + here + i, mask=ok, other=0.0))
            tl.store(row + out_at + here + i, d, mask=ok)


@triton.jit
def _tile_of_tensor(first, width, B: tl.constexpr):
    """(group, element, inside) of B // 4 groups of 4 elements from ``first`` on."""
    quad = first // 4 + tl.arange(0, B // 4)
    e = quad[:, None] * 4 + tl.arange(0, 4)[None, :]
    return quad, e, e < width


@triton.jit
def _noise_of_tile(quad, numbers, chain, step, stream, B: tl.constexpr):
    k_0, k_1 = key_words(tl.load(numbers))
    zero = tl.zeros([B // 4], tl.uint32)
    step_word = (tl.load(numbers + 1) + step).to(tl.uint32) + zero
    chain_word = (tl.load(numbers + 2) + chain).to(tl.uint32) + zero
    return normals(quad.to(tl.uint32), chain_word, step_word, stream.to(tl.uint32) + zero, k_0, k_1, 4)


@triton.jit
def _kept_of_tile(observed, observed_stride, chain, at, ok, todo, B: tl.constexpr):
    kept = tl.zeros([B // 4, 4], tl.uint8)
    if (todo & OBSERVED) != 0:
        kept = tl.load(observed + chain.to(tl.int64) * observed_stride + at, mask=ok, other=0)
    return kept


@_jit
def perturb_kernel(
    a,
    table,
    numbers,
    counts,
    constants,
    observed,
    ld: tl.int32,
    x_at: tl.int32,
    c_at: tl.int32,
    tensors: tl.int32,
    observed_stride: tl.int32,
    constant_step: tl.int32,
    constant_width: tl.int32,
    constant_chain: tl.int32,
    todo: tl.int32,
    B: tl.constexpr,
):
    """c = x + s xi, clamped where asked for; grid (chains, tiles of the widest tensor)."""
    chain = tl.program_id(0)
    row = a + chain.to(tl.int64) * ld
    step = tl.load(counts + chain)
    constant_row = constants + step * constant_step
    one = tl.zeros([1], tl.int32) + chain
    for t in range(0, tensors):
        words = table + t * _TENSOR_WORDS
        start, width = tl.load(words + _START), tl.load(words + _WIDTH)
        if tl.program_id(1) * B < width:
            quad, e, ok = _tile_of_tensor(tl.program_id(1) * B, width, B)
            old = tl.load(row + x_at + start + e, mask=ok, other=0.0)
            of = tl.zeros([1], tl.int32) + t
            y = old
            if tl.load(words + _TENSOR_NOISY) != 0:
                xi = _noise_of_tile(quad, numbers, chain, step, tl.load(words + _STREAM), B)
                y = old + _scaled_noise(xi, constant_row, of, one, constant_width, constant_chain)
            if (todo & CLAMP_NOISE) != 0:
                y = bounded(y, constant_row, of, one, constant_width, constant_chain)
            kept = _kept_of_tile(observed, observed_stride, chain, start + e, ok, todo, B)
            keep = (kept != 0) | (tl.load(words + _TENSOR_MOVES) == 0)
            tl.store(row + c_at + start + e, tl.where(keep, old, y), mask=ok)


@_jit
def rule_kernel(
    a,
    table,
    numbers,
    counts,
    constants,
    observed,
    partials,
    energy,
    norms,
    alive,
    ld: tl.int32,
    chains: tl.int32,
    parts: tl.int32,
    x_at: tl.int32,
    c_at: tl.int32,
    n_at: tl.int32,
    g_at: tl.int32,
    energy_at: tl.int32,
    tensors: tl.int32,
    updated: tl.int32,
    observed_stride: tl.int32,
    constant_step: tl.int32,
    constant_width: tl.int32,
    constant_chain: tl.int32,
    todo: tl.int32,
    B: tl.constexpr,
):
    """The end of a chain's step: a program has one chain, updates it unless ``updated``, writes the records and counts
    the step. The state that the gradient was taken at is at ``c_at``; the new one goes to ``n_at``, and with a freeze
    from there to ``x_at``, where it is finite."""
    chain = tl.program_id(0)
    row = a + chain.to(tl.int64) * ld
    step = tl.load(counts + chain)
    constant_row = constants + step * constant_step
    one = tl.zeros([1], tl.int32) + chain
    squares = tl.zeros([B // 4, 4], tl.float32)
    finite = 1
    if updated != 0:
        for p in range(0, parts, B):
            _quad, e, ok = _tile_of_tensor(p, parts, B)
            squares += tl.load(partials + chain.to(tl.int64) * parts + e, mask=ok, other=0.0)
    else:
        for t in range(0, tensors):
            words = table + t * _TENSOR_WORDS
            start, width = tl.load(words + _START), tl.load(words + _WIDTH)
            stream, noisy = tl.load(words + _STREAM), tl.load(words + _TENSOR_NOISY)
            moves = tl.load(words + _TENSOR_MOVES)
            of = tl.zeros([1], tl.int32) + t
            factor = 1.0
            if (todo & NORM) != 0:  # noqa: SIM102 (Triton's "and" loads both sides)
                if tl.load(words + _TENSOR_NORMED) != 0:
                    clipped = tl.zeros([B // 4, 4], tl.float32)
                    for first in range(0, width, B):
                        _quad, e, ok = _tile_of_tensor(first, width, B)
                        g = tl.load(row + g_at + start + e, mask=ok, other=0.0)
                        g = clip(g, constant_row, of, one, constant_width, constant_chain, todo)
                        clipped += tl.where(ok, g * g, 0.0)
                    limit = tl.load(constant_row + (t * COUNT + NORM_CLIP) * constant_width + chain * constant_chain)
                    factor = norm_factor(tl.sum(tl.sum(clipped, axis=1), axis=0), limit)
            for first2 in range(0, width, B):
                quad, e, ok = _tile_of_tensor(first2, width, B)
                x = tl.load(row + c_at + start + e, mask=ok, other=0.0)
                y = x
                if moves != 0:
                    noise = tl.zeros([B // 4, 4], tl.float32)
                    if ((todo & (BEFORE | NOISY)) == NOISY) & (noisy != 0):
                        xi = _noise_of_tile(quad, numbers, chain, step, stream, B)
                        noise = _scaled_noise(xi, constant_row, of, one, constant_width, constant_chain)
                    g = tl.load(row + g_at + start + e, mask=ok, other=0.0)
                    squares += g * g
                    g = clip(g, constant_row, of, one, constant_width, constant_chain, todo) * factor
                    kept = _kept_of_tile(observed, observed_stride, chain, start + e, ok, todo, B)
                    y = _new_state(x, g, noise, kept, constant_row, of, one, constant_width, constant_chain, todo)
                    # anything finite minus itself is 0
                    bad = tl.where(ok & ((y - y) != 0.0), 1, 0)
                    finite = finite & (1 - tl.max(tl.max(bad, axis=1), axis=0))
                tl.store(row + n_at + start + e, y, mask=ok)
        if (todo & FREEZE) != 0:
            finite = finite & tl.load(alive + chain)
            tl.debug_barrier()  # all warps have read it
            tl.store(alive + chain, finite)
            tl.debug_barrier()
            for t2 in range(0, tensors):
                words = table + t2 * _TENSOR_WORDS
                start, width = tl.load(words + _START), tl.load(words + _WIDTH)
                for first3 in range(0, width, B):
                    _quad, e, ok = _tile_of_tensor(first3, width, B)
                    y = tl.load(row + n_at + start + e, mask=ok & (finite != 0), other=0.0)
                    tl.store(row + x_at + start + e, y, mask=ok & (finite != 0))
    record = step * chains + chain
    tl.store(energy + record, tl.load(row + energy_at))
    tl.store(norms + record, tl.sqrt_rn(tl.sum(tl.sum(squares, axis=1), axis=0)))
    tl.debug_barrier()
    tl.store(counts + chain, step + 1)
