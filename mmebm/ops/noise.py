"""The noise of :mod:`mmebm.noise` by its fastest implementation: C++ on the CPU, Triton or CUDA C++ on a GPU.

Words and uniforms are bit-equal to the definition, normals within 2e-6 of it. ``MMEBM_BACKEND=torch`` takes the
definition itself, as do seeds and steps that are tensors on a device, of which the host knows no number.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from mmebm import native, noise
from mmebm.ops import dispatch
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


def _module(device: torch.device, *numbers: int | Tensor) -> ModuleType | None:
    """What draws on ``device`` with these seeds and steps; None: the definition."""
    if device.type == "cpu":
        return native if native_reason(device, *numbers) is None else None
    if any(isinstance(number, Tensor) and not number.is_cpu for number in numbers) or surroundings() is not None:
        return None
    named = dispatch.requested("auto")[0]
    for name in dispatch.OPS["noise"].auto.get(device.type, ()):
        if named not in ("auto", name) or (name == "cuda" and not native.loaded("cuda")):
            continue
        module, _ = dispatch.implementation("noise", name)
        if module is not None and native.parity_failure("noise", name, device) is None:
            return module
    return None


def _at(seed: int | Tensor, step: int | Tensor, stream: int, chain_offset: int) -> dict[str, int]:
    """The four numbers as words, of the host."""
    return {
        "seed": plain(seed) & (1 << 64) - 1,
        "step": plain(step) & noise.MASK32,
        "stream": stream,
        "chain_offset": chain_offset & noise.MASK32,
    }


def normal(
    shape: Sequence[int],
    *,
    seed: int | Tensor,
    step: int | Tensor = 0,
    stream: int = 0,
    chain_offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device = _CPU,
) -> Tensor:
    """:func:`mmebm.noise.normal`."""
    if dtype == torch.float32 and len(shape) and math.prod(shape):
        module = _module(device, seed, step)
        if module is not None:
            out = torch.empty(tuple(shape), dtype=dtype, device=device)
            module.fill_normal(out, **_at(seed, step, stream, chain_offset))
            return out
    return noise.normal(
        shape, seed=seed, step=step, stream=stream, chain_offset=chain_offset, dtype=dtype, device=device
    )


def uniform(
    shape: Sequence[int],
    *,
    seed: int | Tensor,
    step: int | Tensor = 0,
    stream: int = noise.INITIAL << 24,
    chain_offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device = _CPU,
) -> Tensor:
    """:func:`mmebm.noise.uniform`, bit for bit."""
    if dtype in (torch.float32, torch.float64) and len(shape) and math.prod(shape):
        module = _module(device, seed, step)
        if module is not None:
            out = torch.empty(tuple(shape), dtype=dtype, device=device)
            module.fill_uniform(out, **_at(seed, step, stream, chain_offset))
            return out
    return noise.uniform(
        shape, seed=seed, step=step, stream=stream, chain_offset=chain_offset, dtype=dtype, device=device
    )


def words(
    chains: int,
    blocks: int,
    *,
    seed: int | Tensor,
    step: int | Tensor = 0,
    stream: int = 0,
    chain_offset: int = 0,
    device: torch.device = _CPU,
) -> Tensor:
    """:func:`mmebm.noise.words`, bit for bit."""
    if chains * blocks:
        module = _module(device, seed, step)
        if module is not None:
            out = torch.empty((chains, blocks, 4), dtype=torch.int32, device=device)
            module.fill_words(out, **_at(seed, step, stream, chain_offset))
            return out.to(torch.int64) & noise.MASK32
    return noise.words(chains, blocks, seed=seed, step=step, stream=stream, chain_offset=chain_offset, device=device)
