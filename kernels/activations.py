# Triton's language is no Python to a type checker: its scalars, loops and launches.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false
"""The activations of :mod:`mmebm.ops.terms` and their derivatives as Triton device functions.

Which one is a run-time number, the same for all threads: a new activation compiles nothing. Beside ``exp``, division
and ``erf`` only polynomials are used, so that the interpreter runs the arithmetic of the GPU and no accuracy hangs on a
hardware logarithm near 1. Each is as accurate as PyTorch's in float32; tanh, elu and softplus are to a few units in
the last place of the value, however small. Tests in the interpreter and on the GPU hold them against float64. NaN stays
NaN.
"""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

from mmebm.ops.terms import ACTIVATIONS

__all__ = ["CODES", "activate", "tanh", "through"]

CODES: Final = {name: i for i, name in enumerate(ACTIVATIONS)}
_RELU: Final = tl.constexpr(CODES["relu"])
_LEAKY_RELU: Final = tl.constexpr(CODES["leaky_relu"])
_SILU: Final = tl.constexpr(CODES["silu"])
_GELU: Final = tl.constexpr(CODES["gelu"])
_SOFTPLUS: Final = tl.constexpr(CODES["softplus"])
_TANH: Final = tl.constexpr(CODES["tanh"])
# The derivative of relu where it is off: the smallest normal number, as a mark (csrc/common/activation.h)
_STOP: Final = tl.constexpr(2.0**-126)


@triton.jit
def _expm1(a):
    """exp(a) - 1 for a <= 0."""
    # least-squares fit on [-1/2, 0], 8e-8 relative in fp32; below, the difference loses nothing
    p = 1.1646067944e-3
    p = p * a + 8.2385416730e-3
    p = p * a + 4.1650030314e-2
    p = p * a + 1.6666563763e-1
    p = p * a + 4.9999998978e-1
    return tl.where(a < -0.5, tl.exp(a) - 1.0, a + (a * a) * p)


@triton.jit
def _log1p(t):
    """log(1 + t) for t in [0, 1]: 2 artanh(s) with s = t / (2 + t) <= 1/3."""
    s = t / (2.0 + t)
    z = s * s
    # least-squares fit, 1.7e-7 relative in fp32
    p = 2.6867548106e-1
    p = p * z + 2.8233956160e-1
    p = p * z + 4.0007670849e-1
    p = p * z + 6.6666639666e-1
    return 2.0 * s + (s * z) * p


@triton.jit
def tanh(a):
    """The hyperbolic tangent."""
    e = _expm1(-2.0 * tl.abs(a))
    h = -e / (2.0 + e)
    return tl.where(a < 0.0, -h, h)


@triton.jit
def through(d, derivative):
    """What is left of a gradient behind an activation: where relu is off nothing, be it infinite or NaN."""
    return tl.where(derivative == _STOP, 0.0, d * derivative)


@triton.jit
def activate(a, act, slope):
    """(act(a), act'(a)) of activation number ``act``; at a kink the derivative of the left."""
    if act == _RELU:
        h = tl.where(a <= 0.0, 0.0, a)
        d = tl.where(a <= 0.0, _STOP, 1.0)
    elif act == _LEAKY_RELU:
        h = tl.where(a > 0.0, a, slope * a)
        d = tl.where(a > 0.0, 1.0, slope)
    elif act == _SILU:
        # 1 - s is e s: as a difference it has the absolute error of s, which a multiplies. Where e overflows it is 0.
        e = tl.exp(-a)
        s = 1.0 / (1.0 + e)
        h = a * s
        d = tl.fma(h, tl.minimum(e, 3e38) * s, s)
    elif act == _GELU:
        s = 0.5 + 0.5 * tl.erf(a * 0.7071067811865476)
        h = a * s
        d = s + a * (tl.exp(-0.5 * a * a) * 0.3989422804014327)
    elif act == _SOFTPLUS:
        h = tl.where(a < 0.0, 0.0, a) + _log1p(tl.exp(-tl.abs(a)))
        d = tl.sigmoid(a)
    elif act == _TANH:
        h = tanh(a)
        d = 1.0 - h * h
    else:
        h = tl.where(a > 0.0, a, slope * _expm1(a))
        d = tl.where(a > 0.0, 1.0, h + slope)
    return h, d
