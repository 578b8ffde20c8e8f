"""The noise of :mod:`mmebm.noise` by its fastest implementation: C++ on the CPU, else the definition itself.

Words and uniforms are bit-equal to the definition, normals within 2e-6 of it. ``MMEBM_BACKEND=torch`` takes the
definition itself.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from mmebm import native, noise
from mmebm.ops.common.address import surroundings

__all__ = ["native_reason", "normal", "plain", "uniform", "words"]

_CPU = torch.device("cpu")


def plain(number: int | Tensor) -> int:
    """A seed or step on the host as an int."""
    return number if type(number) is int else int(number)


def native_reason(device: torch.device, *numbers: int | Tensor) -> str | None:
    """Why C++ does not draw for ``device`` with these seeds and steps, or None."""
    if os.environ.get("MMEBM_BACKEND") == "torch":
        return "MMEBM_BACKEND=torch"
    if device.type != "cpu":
        return f"the state is on {device.type}"
    if any(isinstance(number, Tensor) and not number.is_cpu for number in numbers):
        return "seed or step is a tensor on a device"
    if not native.loaded("cpp"):
        return native.available("cpp")[1]
    return native.parity_failure("noise", "cpp", device) or surroundings()


def normal(
    shape: Sequence[int], *, seed: int | Tensor, step: int | Tensor = 0, stream: int = 0, chain_offset: int = 0,
    dtype: torch.dtype = torch.float32, device: torch.device = _CPU,
) -> Tensor:  # fmt: skip
    """:func:`mmebm.noise.normal`."""
    if dtype == torch.float32 and math.prod(shape) and native_reason(device, seed, step) is None:
        seed, step = plain(seed), plain(step)
        out = torch.empty(tuple(shape), dtype=torch.float32, device=device)
        return native.normal_(out, seed=seed, step=step & noise.MASK32, stream=stream, chain_offset=chain_offset)
    return noise.normal(
        shape, seed=seed, step=step, stream=stream, chain_offset=chain_offset, dtype=dtype, device=device
    )


def uniform(
    shape: Sequence[int], *, seed: int | Tensor, step: int | Tensor = 0, stream: int = noise.INITIAL << 24,
    chain_offset: int = 0, dtype: torch.dtype = torch.float32, device: torch.device = _CPU,
) -> Tensor:  # fmt: skip
    """:func:`mmebm.noise.uniform`, bit for bit."""
    known = dtype in (torch.float32, torch.float64)
    if known and math.prod(shape) and native_reason(device, seed, step) is None:
        seed, step = plain(seed), plain(step)
        out = torch.empty(tuple(shape), dtype=dtype, device=device)
        return native.uniform_(out, seed=seed, step=step & noise.MASK32, stream=stream, chain_offset=chain_offset)
    return noise.uniform(
        shape, seed=seed, step=step, stream=stream, chain_offset=chain_offset, dtype=dtype, device=device
    )


def words(
    chains: int, blocks: int, *, seed: int | Tensor, step: int | Tensor = 0, stream: int = 0, chain_offset: int = 0,
    device: torch.device = _CPU,
) -> Tensor:  # fmt: skip
    """:func:`mmebm.noise.words`, bit for bit."""
    if chains * blocks and native_reason(device, seed, step) is None:
        seed, step = plain(seed), plain(step)
        out = torch.empty((chains, blocks, 4), dtype=torch.int32, device=device)
        words_at = {"step": step & noise.MASK32, "stream": stream, "chain_offset": chain_offset}
        native.fill_words(out, seed=seed & (1 << 64) - 1, **words_at)
        return out.to(torch.int64) & noise.MASK32
    return noise.words(chains, blocks, seed=seed, step=step, stream=stream, chain_offset=chain_offset, device=device)
