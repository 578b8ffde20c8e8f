# Triton's language is no Python to a type checker: its scalars, loops and launches.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportInvalidTypeForm=false, reportReturnType=false
"""Likelihood residuals of all modalities in Triton, value and gradients (:mod:`mmebm.ops.residual.reference`).

One launch for up to 8 modalities of any likelihoods and dtypes. A program owns one chain of all of them and writes its
value, so that there are no atomics, no second launch, and one order of summation: a lane adds every 1,024th element of
a modality, then the lanes are added as a tree, then the modalities. Predictions, targets and mask are read once and the
gradient is written once; logits are read three times (maximum, sum, gradient), from cache.

Likelihoods, dtypes, presence of masks and tensors, and the tile of the classes are constants of compilation: a model
has one set of them. Sizes are arguments, and Triton compiles anew for divisibility by 16, which gives vector accesses.

Limits: fp32, bf16 and fp16 on CUDA (compute capability 8.0 or later) or ROCm; fewer than 2^31 predictions a chain and
modality. Few long chains leave the device idle: there is no split of a chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

__all__ = ["residual", "supports"]

_GAUSSIAN: Final = tl.constexpr(0)
_LAPLACE: Final = tl.constexpr(1)
_CATEGORICAL: Final = tl.constexpr(2)
_KINDS: Final = {"gaussian": _GAUSSIAN.value, "laplace": _LAPLACE.value, "categorical": _CATEGORICAL.value}

# How a factor or a mask is given
_ABSENT: Final = tl.constexpr(0)  # a float; no mask
_ONE: Final = tl.constexpr(1)  # a tensor of one value; a mask of one row for all chains
_ROWS: Final = tl.constexpr(2)  # a value or a row per chain

_TILE: Final = 1024  # elements
_THREADS: Final = 128
_WARPS: Final = _THREADS // (32 if torch.version.hip is None else 64)
_MOST: Final = 8  # modalities in a launch
_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


# -- device


@triton.jit
def _factor(number, values, chain, FORM: tl.constexpr):
    if FORM == _ABSENT:
        return number
    else:
        return tl.load(values + chain * (FORM == _ROWS)).to(tl.float32)


@triton.jit
def _counts(mask, chain, n, at, inside, FORM: tl.constexpr):
    """Where an element is inside and observed."""
    if FORM == _ABSENT:
        return inside
    else:
        row = chain * n * (FORM == _ROWS)
        return inside & (tl.load(mask + row + at, mask=inside, other=0) != 0)


@triton.jit
def _elements(
    y, t, mask, g, n, chain, slope, KIND: tl.constexpr, MASK: tl.constexpr, GRAD: tl.constexpr, TILE: tl.constexpr
):
    """The sum of squares, or of absolute values, of one chain's residuals; ``slope`` times their derivative to g."""
    lanes = tl.zeros([TILE], tl.float32)
    base = chain * n
    for start in range(0, n, TILE):
        at = start + tl.arange(0, TILE)
        inside = at < n
        keep = _counts(mask, chain, n, at, inside, MASK)
        r = tl.load(y + base + at, mask=inside, other=0).to(tl.float32)
        r = r - tl.load(t + base + at, mask=inside, other=0).to(tl.float32)
        if MASK != _ABSENT:
            r = tl.where(keep, r, 0.0)
        if KIND == _GAUSSIAN:
            lanes += r * r
            d = r
        else:
            lanes += tl.abs(r)
            # a NaN is its own sign, so that it stays visible
            d = tl.where(r > 0, 1.0, tl.where(r < 0, -1.0, r))
        if GRAD:
            d = tl.where(keep, slope * d, 0.0)
            tl.store(g + base + at, d.to(g.dtype.element_ty), mask=inside)
    return tl.sum(lanes, 0)


@triton.jit
def _classes(
    y, t, mask, g, n, classes, chain, weight, MASK: tl.constexpr, GRAD: tl.constexpr, BK: tl.constexpr, BP: tl.constexpr
):
    """The weighted cross-entropies of one chain, tiles of BK classes and BP positions."""
    lanes = tl.zeros([BP], tl.float32)
    base = y + chain * n * classes
    for start in range(0, n, BP):
        at = start + tl.arange(0, BP)
        inside = at < n
        most = tl.full([BP], float("-inf"), tl.float32)
        for k0 in range(0, classes, BK):
            k = k0 + tl.arange(0, BK)
            here = (k < classes)[:, None] & inside[None, :]
            v = tl.load(base + k[:, None] * n + at[None, :], mask=here, other=float("-inf")).to(tl.float32)
            most = tl.maximum(most, tl.max(v, 0))
        # lanes behind the last position
        most = tl.where(inside, most, 0.0)
        total = tl.zeros([BP], tl.float32)
        for k0 in range(0, classes, BK):
            k = k0 + tl.arange(0, BK)
            here = (k < classes)[:, None] & inside[None, :]
            v = tl.load(base + k[:, None] * n + at[None, :], mask=here, other=float("-inf")).to(tl.float32)
            total += tl.sum(tl.where(here, tl.exp(v - most[None, :]), 0.0), 0)
        target = tl.load(t + chain * n + at, mask=inside, other=0)
        known = (target >= 0) & (target < classes)
        chosen = tl.load(base + target * n + at, mask=inside & known, other=0).to(tl.float32)
        keep = _counts(mask, chain, n, at, inside, MASK)
        term = tl.where(known, (most - chosen) + tl.log(total), float("nan"))
        lanes += tl.where(keep, weight * term, 0.0)
        if GRAD:
            scale = tl.where(known, weight / total, float("nan"))
            for k0 in range(0, classes, BK):
                k = k0 + tl.arange(0, BK)
                here = (k < classes)[:, None] & inside[None, :]
                v = tl.load(base + k[:, None] * n + at[None, :], mask=here, other=0).to(tl.float32)
                d = scale[None, :] * tl.exp(v - most[None, :]) - tl.where(k[:, None] == target[None, :], weight, 0.0)
                d = tl.where(keep[None, :], d, 0.0)
                to = g + chain * n * classes + k[:, None] * n + at[None, :]
                tl.store(to, d.to(g.dtype.element_ty), mask=here)
    return tl.sum(lanes, 0)


@triton.jit
def _residual_kernel(
    ys,
    ts,
    ms,
    gs,
    scales,
    weights,
    scale_numbers,
    weight_numbers,
    sizes,
    classes,
    value,
    KINDS: tl.constexpr,
    MASKS: tl.constexpr,
    SCALES: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BKS: tl.constexpr,
    BPS: tl.constexpr,
    T: tl.constexpr,
    ADD: tl.constexpr,
    GRAD: tl.constexpr,
    TILE: tl.constexpr,
):
    chain = tl.program_id(0).to(tl.int64)
    out = 0.0
    if ADD:
        out = tl.load(value + chain)
        # Every warp reads it and the first one stores: where no sum crosses warps, nothing else keeps a late one from
        # reading what is stored
        tl.debug_barrier()
    for i in tl.static_range(T):
        w = _factor(weight_numbers[i], weights[i], chain, WEIGHTS[i])
        if KINDS[i] == _CATEGORICAL:
            out += _classes(ys[i], ts[i], ms[i], gs[i], sizes[i], classes[i], chain, w, MASKS[i], GRAD, BKS[i], BPS[i])
        else:
            s = _factor(scale_numbers[i], scales[i], chain, SCALES[i])
            if KINDS[i] == _GAUSSIAN:
                # not w / s^2: the square may underflow where the quotients do not overflow
                slope = w / s / s
                part = 0.5 * slope
            else:
                slope = w / s
                part = slope
            out += part * _elements(ys[i], ts[i], ms[i], gs[i], sizes[i], chain, slope, KINDS[i], MASKS[i], GRAD, TILE)
    tl.store(value + chain, out)


# -- host


def supports(predictions: Sequence[Tensor], targets: Sequence[Tensor], likelihood: Sequence[str]) -> str | None:
    """``None`` if :func:`residual` takes these tensors, else the reason why not."""
    interpreted = isinstance(_residual_kernel, InterpretedFunction)
    for i, y in enumerate(predictions):
        if y.device.type != "cuda" and not (interpreted and y.device.type == "cpu"):
            return f"predictions[{i}] is on {y.device}"
        if y.dtype not in _DTYPES:
            return f"predictions[{i}] is {y.dtype}; taken are float32, bfloat16 and float16"
        if prod(y.shape[1:]) >= 1 << 31:
            return f"predictions[{i}] has 2^31 elements a chain or more"
    return None


def _tile(classes: int, positions: int) -> tuple[int, int]:
    block = min(triton.next_power_of_2(classes), _TILE)
    return block, min(triton.next_power_of_2(positions), _TILE // block)


def residual(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    likelihood: Sequence[str],
    scale: Sequence[float | Tensor],
    weight: Sequence[float | Tensor],
    observed: Sequence[Tensor | None],
    gradients: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Value and gradients as :func:`mmebm.ops.residual.reference.residual`; the arguments are checked by the op."""
    chains, device = predictions[0].shape[0], predictions[0].device
    value = torch.zeros(chains, device=device)
    grads = [torch.empty(y.shape, dtype=y.dtype, device=device) for y in predictions] if gradients else []
    rows = []
    for i, (y, target, kind) in enumerate(zip(predictions, targets, likelihood, strict=True)):
        if y.numel() == 0:
            continue
        y, mask = y.contiguous(), observed[i]
        if kind == "categorical":
            target = target.to(torch.int64)
        elif target.dtype not in _DTYPES:
            target = target.to(torch.float32)
        size, classes = prod(target.shape[1:]), y.shape[1] if kind == "categorical" else 1
        form = _ABSENT.value
        if mask is not None:
            form = _ROWS.value if mask.dim() == target.dim() and mask.shape[0] != 1 else _ONE.value
            shape = target.shape if form == _ROWS.value else (1, *target.shape[1:])
            mask = mask.expand(shape).contiguous().view(torch.uint8)
        forms, numbers, tensors = [], [], []
        for factor in (scale[i], weight[i]):
            given = isinstance(factor, Tensor)
            forms.append((_ONE.value if factor.numel() == 1 else _ROWS.value) if given else _ABSENT.value)
            numbers.append(0.0 if given else factor)
            tensors.append(factor.contiguous() if given else value)
        # what is absent is a tensor that is not read
        rows.append(
            (
                y,
                target.contiguous(),
                y if mask is None else mask,
                grads[i] if gradients else y,
                *tensors,
                *numbers,
                size,
                classes,
                _KINDS[kind],
                form,
                *forms,
                *_tile(classes, size),
            )
        )
    if chains == 0:
        return value, grads
    names = (
        "ys",
        "ts",
        "ms",
        "gs",
        "scales",
        "weights",
        "scale_numbers",
        "weight_numbers",
        "sizes",
        "classes",
        "KINDS",
        "MASKS",
        "SCALES",
        "WEIGHTS",
        "BKS",
        "BPS",
    )
    for first in range(0, len(rows), _MOST):
        part = rows[first : first + _MOST]
        columns = dict(zip(names, zip(*part, strict=True), strict=True))
        _residual_kernel[(chains,)](
            **columns,
            value=value,
            T=len(part),
            ADD=first > 0,
            GRAD=gradients,
            TILE=_TILE,
            num_warps=_WARPS,
            enable_fp_fusion=True,
        )
    return value, grads
