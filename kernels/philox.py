# Triton's language is no Python to a type checker: its scalars, loops and launches.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false
"""The noise of :mod:`mmebm.noise` as Triton device functions.

Everything here is inlined into the kernels that use it, works on one-dimensional tensors of counters and makes no
library call: Philox is integer arithmetic, and log, sin and cos are polynomials over the narrow ranges that Box-Muller
needs (``u`` in [2^-33, 1], the angle within one turn). So the interpreter runs the arithmetic that the GPU runs, NVIDIA
and AMD agree, and the slow paths of a library sine, with their stack, are not there.

Layout. One Philox call makes four normals for four consecutive elements. A program holds *groups* of ``G`` consecutive
elements per row of a (B, G) tensor, G = 4 for 32-bit and 8 for 16-bit storage: one 16-byte vector per row. The words of
a call are joined along new trailing axes and reshaped, which renames registers and moves nothing, so that loads, noise
and stores share one layout.

Accuracy. ``u`` and the angle are bit-equal to :mod:`mmebm.noise`. The log is good to about 2e-7 relative also near
u = 1, where a hardware ``lg2.approx`` (small absolute error) would cost up to 7e-4 in the radius; sine and cosine to
about 1e-7. The normals are within 2e-6 of float64: the interpreter's tests check it, test_gpu.py on hardware.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "box_muller",
    "join4",
    "join8",
    "key_words",
    "normal_of",
    "normals",
    "philox",
    "rounding_halves",
    "split4",
    "split8",
    "stochastic_round",
]


@triton.jit
def key_words(seed):
    """The two words of an int64 seed, low first."""
    return seed.to(tl.uint32), (seed >> 32).to(tl.uint32)


@triton.jit
def _xor3(a, b, c, PTX: tl.constexpr):
    if PTX:
        # one instruction, which Triton does not make by itself
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0x96;", "=r,r,r,r", [a, b, c], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        return a ^ b ^ c


@triton.jit
def philox(c0, c1, c2, c3, k0, k1, PTX: tl.constexpr = False):
    """Philox4x32-10: four uint32 tensors (or scalars) and a key of two words to four words."""
    for _round in tl.static_range(10):
        # one 32 x 32 -> 64 bit multiply gives both halves
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = _xor3((p1 >> 32).to(tl.uint32), c1, k0, PTX)
        c1 = p1.to(tl.uint32)
        c2 = _xor3((p0 >> 32).to(tl.uint32), c3, k1, PTX)
        c3 = p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _radius(w):
    """sqrt(-2 log u) of a word; at most 6.77, exactly 0 at u = 1."""
    u = w.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 2^-32, 2^-33
    bits = u.to(tl.int32, bitcast=True)
    # u = 2^e m with m in [sqrt(1/2), sqrt(2)), so that log is accurate relative to itself also next to u = 1
    e = (bits - 0x3F3504F3) & -8388608  # times 2^23
    f = (bits - e).to(tl.float32, bitcast=True) - 1.0
    # -2 log(1 + f) = f p(f); minimax in the relative error, which is 1.8e-7
    p = 2.0167014e-1
    p = p * f - 3.236021e-1
    p = p * f + 3.4485322e-1
    p = p * f - 3.981384e-1
    p = p * f + 4.9942574e-1
    p = p * f - 6.6669428e-1
    p = p * f + 1.0000064
    p = p * f - 2.0
    # next to u = 1, f <= 0 and e = 0: no NaN; written as the fused multiply-add that it is to be
    return tl.sqrt(tl.fma(f, p, e.to(tl.float32) * -1.6525917e-7))  # -2 log(2) 2^-23


@triton.jit
def _turned(a, b, PTX: tl.constexpr):
    """float32 ``a`` with its sign turned where int32 ``b`` is odd."""
    # the lowest bit of b, added to the highest of a: nothing else is carried
    if PTX:
        bits = tl.inline_asm_elementwise(
            "mad.lo.s32 $0, $1, 0x80000000, $2;",
            "=r,r,r",
            [b, a.to(tl.int32, bitcast=True)],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        bits = a.to(tl.int32, bitcast=True) ^ (b << 31)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _polar(radius, w, PTX: tl.constexpr = False):
    """radius (cos pi a, sin pi a), a the word read as int32 times 2^-31."""
    a = w.to(tl.int32, bitcast=True).to(tl.float32)
    # 2^-30 a are quarter turns. Adding 1.5 2^24 rounds them to an even number, half turns, and leaves that in the low
    # bits; t is what is left.
    shifted = a * 9.313225746154785e-10 + 25165824.0
    t = tl.fma(a, 9.313225746154785e-10, 25165824.0 - shifted)  # exact, in [-1, 1]
    # Minimax of sine and cosine: errors 4e-9 and 1e-9. The sine is t and the rest, so that little is rounded next to 1.
    z = t * t
    s = z * (z * (z * (z * 1.5105301e-4 - 4.67283e-3) + 7.968902e-2) - 6.4596355e-1) + 5.707963e-1
    c = z * (z * (z * (z * (z * -2.340213e-5 + 9.167334e-4) - 2.08619e-2) + 2.5366908e-1) - 1.2337005) + 1.0
    # both change their sign with every half turn
    radius = _turned(radius, shifted.to(tl.int32, bitcast=True), PTX)
    return radius * c, radius * tl.fma(t, s, t)


@triton.jit
def box_muller(w0, w1, w2, w3, PTX: tl.constexpr = False):
    """Four normals from four words."""
    n0, n1 = _polar(_radius(w0), w1, PTX)
    n2, n3 = _polar(_radius(w2), w3, PTX)
    return n0, n1, n2, n3


@triton.jit
def _quad(v0, v1, v2, v3):
    """Four (B,) tensors to (B, 2, 2), v_(2 i + j) at [:, i, j]."""
    return tl.join(tl.join(v0, v2), tl.join(v1, v3))


@triton.jit
def join4(v0, v1, v2, v3):
    """Four (B,) tensors to (B, 4)."""
    return tl.reshape(_quad(v0, v1, v2, v3), [v0.shape[0], 4])


@triton.jit
def join8(v0, v1, v2, v3, v4, v5, v6, v7):
    """Eight (B,) tensors to (B, 8): v_(4 i + 2 j + k) at [:, i, j, k] before the reshape."""
    return tl.reshape(tl.join(_quad(v0, v2, v4, v6), _quad(v1, v3, v5, v7)), [v0.shape[0], 8])


@triton.jit
def _split_quad(v):
    even, odd = tl.split(v)
    v0, v2 = tl.split(even)
    v1, v3 = tl.split(odd)
    return v0, v1, v2, v3


@triton.jit
def split4(v):
    """The inverse of :func:`join4`."""
    return _split_quad(tl.reshape(v, [v.shape[0], 2, 2]))


@triton.jit
def split8(v):
    """The inverse of :func:`join8`."""
    even, odd = tl.split(tl.reshape(v, [v.shape[0], 2, 2, 2]))
    v0, v2, v4, v6 = _split_quad(even)
    v1, v3, v5, v7 = _split_quad(odd)
    return v0, v1, v2, v3, v4, v5, v6, v7


@triton.jit
def normals(group, chain, step, stream, k0, k1, G: tl.constexpr, PTX: tl.constexpr = False):
    """The normals of ``group`` (uint32, (B,)) of ``chain`` (uint32, (B,)): float32 (B, G), G = 4 or 8."""
    if G == 4:
        w0, w1, w2, w3 = philox(group, chain, step, stream, k0, k1, PTX)
        n0, n1, n2, n3 = box_muller(w0, w1, w2, w3, PTX)
        return join4(n0, n1, n2, n3)
    else:
        w0, w1, w2, w3 = philox(group * 2, chain, step, stream, k0, k1, PTX)
        w4, w5, w6, w7 = philox(group * 2 + 1, chain, step, stream, k0, k1, PTX)
        n0, n1, n2, n3 = box_muller(w0, w1, w2, w3, PTX)
        n4, n5, n6, n7 = box_muller(w4, w5, w6, w7, PTX)
        return join8(n0, n1, n2, n3, n4, n5, n6, n7)


@triton.jit
def normal_of(element, chain, step, stream, k0, k1):
    """The normal of each ``element`` (uint32, any shape), where neighbours are not together: four calls for one."""
    zero = element * 0
    w0, w1, w2, w3 = philox(element >> 2, chain + zero, step + zero, stream + zero, k0, k1)
    second = (element & 2) != 0
    first, other = _polar(_radius(tl.where(second, w2, w0)), tl.where(second, w3, w1))
    return tl.where((element & 1) != 0, other, first)


@triton.jit
def rounding_halves(group, chain, step, stream, k0, k1, PTX: tl.constexpr = False):
    """The 16-bit thresholds of a group of 8 elements: uint32 (B, 8), one Philox call. With PTX both of a pair get the
    word that has them, the even one's below."""
    w0, w1, w2, w3 = philox(group, chain, step, stream, k0, k1, PTX)
    w = _quad(w0, w1, w2, w3)
    pair = tl.join(w, w) if PTX else tl.join(w & 0xFFFF, w >> 16)
    return tl.reshape(pair, [group.shape[0], 8])


@triton.jit
def stochastic_round(y, half, DTYPE: tl.constexpr, PTX: tl.constexpr = False):
    """float32 ``y`` to bfloat16 or float16, up where the fraction left over exceeds (half + 1/2) 2^-16."""
    bits = y.to(tl.int32, bitcast=True)
    if PTX and DTYPE == tl.bfloat16:
        # As below, two at a time, neighbours in a group: (half ^ ~sign) & 0xffff is what is added, and a dot product
        # takes one of the two from their word. NaN, which the GPU's arithmetic makes as 0x7fffffff, is lowered so that
        # nothing carries into its sign.
        out = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, s;
            prmt.b32 s, $1, $2, 0xffbb;
            lop3.b32 s, $3, s, 0, 0xc3;
            min.s32 a, $1, 0x7fff0000;
            min.s32 b, $2, 0x7fff0000;
            dp2a.lo.u32.u32 a, s, 0x0001, a;
            dp2a.lo.u32.u32 b, s, 0x0100, b;
            prmt.b32 $0, a, b, 0x7632;
            }""",
            "=r,r,r,r,r",
            [bits, half],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    elif DTYPE == tl.bfloat16:
        # The fraction is the low half of the bits, also for subnormals; that of inf is 0. It exceeds the threshold
        # where adding the threshold's complement carries. "Up" is towards +inf, so of a negative number the magnitude
        # grows where the rest up to the next magnitude does not exceed the threshold.
        h = half.to(tl.int32)
        high = (bits + tl.where(bits < 0, h, 0xFFFF - h)) >> 16
        high = tl.where(y != y, 0x7FC0, high)
        out = high.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        if PTX:
            half = (half >> (16 * (tl.arange(0, 8) & 1))[None, :].to(tl.uint32)) & 0xFFFF
        # a unit in the last place of float16 at y is a power of two: scaling by it is exact, subnormals included
        exponent = tl.maximum((bits >> 23) & 0xFF, 113)
        ulp = ((exponent - 10) << 23).to(tl.float32, bitcast=True)
        scaled = tl.abs(y) * ((264 - exponent) << 23).to(tl.float32, bitcast=True)
        down = tl.floor(scaled)
        fraction = scaled - down
        threshold = (half.to(tl.float32) + 0.5) * 1.52587890625e-05
        # of a negative number 1 - fraction is what is left over; the comparison turned round stays exact
        grow = tl.where(bits < 0, fraction >= 1.0 - threshold, fraction > threshold)
        rounded = (down + grow.to(tl.float32)) * ulp
        rounded = tl.where(bits < 0, -rounded, rounded)
        out = tl.where((bits & 0x7F800000) != 0x7F800000, rounded, y).to(DTYPE)
    return out
