# Triton's language is no Python to a type checker: its scalars, loops and launches.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportInvalidTypeForm=false
"""The noise of :mod:`mmebm.noise` written to a tensor: words, normals or uniforms, by the functions of philox.py.

For what draws outside a fused step: the momenta and decisions of HMC and MALA, initial states, buffers. One launch
where the definition takes one for each of its operations; a lane makes the four numbers of a Philox call and stores
them as one vector where a row is a multiple of four.

Limits: CUDA (compute capability 8.0 or later) or ROCm, a tensor of fewer than 2^31 Philox calls.
"""

from __future__ import annotations

from contextlib import nullcontext
from math import prod
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from mmebm.kernels.philox import join4, key_words, normals, philox

__all__ = ["fill_normal", "fill_uniform", "fill_words", "supports"]

_WORDS: Final = tl.constexpr(0)
_NORMAL: Final = tl.constexpr(1)
_UNIFORM: Final = tl.constexpr(2)

_LANES: Final = 256
_WARPS: Final = _LANES // (32 if torch.version.hip is None else 64)
_MOST: Final = 1 << 31  # Philox calls


@triton.jit(do_not_specialize=("seed", "step", "stream", "first", "calls", "numel", "total"))
def _noise_kernel(
    out,
    seed: tl.int64,
    step: tl.int64,
    stream: tl.int64,
    first: tl.int64,
    calls: tl.int64,
    numel: tl.int64,
    total: tl.int64,
    KIND: tl.constexpr,
    WHOLE: tl.constexpr,
    LANES: tl.constexpr,
):
    """Element 4 b + i of row c is number i of the call with the counter (b, first + c, step, stream)."""
    call = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    row, block = call // calls, call % calls
    k0, k1 = key_words(seed)
    b, chain = block.to(tl.uint32), row.to(tl.uint32) + first.to(tl.uint32)
    s, t = step.to(tl.uint32), stream.to(tl.uint32)
    if KIND == _NORMAL:
        value = normals(b, chain, s, t, k0, k1, 4)
    else:
        w0, w1, w2, w3 = philox(b, chain, s, t, k0, k1)
        w = join4(w0, w1, w2, w3)
        if KIND == _WORDS:
            value = w.to(tl.int32, bitcast=True)
        else:
            value = (w >> 8).to(out.dtype.element_ty) * 5.9604644775390625e-8  # 2^-24, exact in both types
    four = tl.arange(0, 4)[None, :]
    if WHOLE:  # rows of whole calls follow each other: vectors
        tl.store(out + call[:, None] * 4 + four, value, mask=(call < total)[:, None])
    else:
        element = block[:, None] * 4 + four
        tl.store(out + row[:, None] * numel + element, value, mask=(call < total)[:, None] & (element < numel))


# -- host


def supports(out: Tensor) -> str | None:
    """``None`` if a kernel writes to ``out`` (chains, ...), else the reason why not."""
    interpreted = isinstance(_noise_kernel, InterpretedFunction)
    if out.device.type != "cuda" and not (interpreted and out.device.type == "cpu"):
        return f"the tensor is on {out.device}"
    if out.shape[0] * -(-prod(out.shape[1:]) // 4) >= _MOST:
        return "the tensor takes 2^31 Philox calls or more"
    return None


def _launch(out: Tensor, kind: int, seed: int, step: int, stream: int, chain_offset: int) -> None:
    if out.numel() == 0:
        return
    numel = prod(out.shape[1:])
    calls = -(-numel // 4)
    total = out.shape[0] * calls
    seed = seed - (1 << 64) if seed >= 1 << 63 else seed  # the signed number of the same bits
    with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
        _noise_kernel[(triton.cdiv(total, _LANES),)](
            out,
            seed,
            step,
            stream,
            chain_offset,
            calls,
            numel,
            total,
            KIND=kind,
            WHOLE=numel % 4 == 0,
            LANES=_LANES,
            num_warps=_WARPS,
        )


def fill_words(out: Tensor, *, seed: int, step: int, stream: int, chain_offset: int) -> None:
    """:func:`mmebm.noise.words` into int32 (chains, blocks, 4), contiguous."""
    _launch(out, _WORDS.value, seed, step, stream, chain_offset)


def fill_normal(out: Tensor, *, seed: int, step: int, stream: int, chain_offset: int) -> None:
    """:func:`mmebm.noise.normal` into float32 (chains, ...), contiguous."""
    _launch(out, _NORMAL.value, seed, step, stream, chain_offset)


def fill_uniform(out: Tensor, *, seed: int, step: int, stream: int, chain_offset: int) -> None:
    """:func:`mmebm.noise.uniform` into float32 or float64 (chains, ...), contiguous, bit for bit."""
    _launch(out, _UNIFORM.value, seed, step, stream, chain_offset)
