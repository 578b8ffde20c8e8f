"""The compiled extensions, ``mmebm._cpu`` (C++) and ``mmebm._cuda`` (CUDA): imported when first needed, or why not.

The extensions take raw pointers, which come from :mod:`mmebm.ops.common.address` alone: a wrong pointer is a crash, and
no input of this library may crash the process.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import operator
import os
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from mmebm import build_record
from mmebm.ops.common.address import address, obstacle

__all__ = ["BackendError", "available", "check_cuda", "cpu", "cuda", "loaded", "normal_"]

_EXTENSIONS = {"cpp": "mmebm._cpu", "cuda": "mmebm._cuda"}
_SWITCHES = {"cpp": "MMEBM_BUILD_CPU", "cuda": "MMEBM_BUILD_CUDA"}


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot be had, or failed; the message says why and what would help."""


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str]:
    """(module, how it was built) or (None, why not); the failure is remembered too."""
    extension = _EXTENSIONS[name]
    here = Path(__file__).parent
    record = build_record.read(here, extension)
    spec = importlib.util.find_spec(extension)
    # An editable install offers its own extension to any other copy of mmebm that lacks it: another version, perhaps.
    if spec is None or spec.origin is None or Path(spec.origin).parent != here:
        reason = record.get("reason") or "the package was not installed, or by another Python"
        remedy = f"then reinstall with {_SWITCHES[name]}=1, e.g. {_SWITCHES[name]}=1 pip install -e ."
        return None, f"extension not built ({reason}); {remedy}"
    # of an editable install: after git pull, the old machine code beside new Python would fail, or compute another rule
    sources = build_record.digest(here.parent / "csrc")
    if sources and sources != record.get("sources", sources):
        return None, f"{extension} was built from other files than csrc/ has now; pip install -e . builds it anew"
    try:
        module = importlib.import_module(extension)
    except ImportError as error:
        return None, f"{extension} is built but does not load ({error}); reinstall mmebm on this machine"
    return module, f"built with {record.get('with', 'an unrecorded compiler')}"


def _module(name: str) -> ModuleType:
    module, reason = _load(name)
    if module is None:
        raise BackendError(f"{name}: {reason}")
    return module


def cpu() -> ModuleType:
    """``mmebm._cpu``; raises :class:`BackendError` with the reason and a remedy if it is not there."""
    return _module("cpp")


def cuda() -> ModuleType:
    """``mmebm._cuda``, on machines without a GPU too; raises :class:`BackendError` if the extension is not there."""
    return _module("cuda")


def loaded(name: str) -> bool:
    """Whether the extension of ``name`` is there: one look into a dictionary, for every step of a chain."""
    return _load(name)[0] is not None


def available(name: str) -> tuple[bool, str]:
    """Whether backend ``"cpp"`` or ``"cuda"`` can run here, and how it was built or what is missing.

    ``"cuda"`` needs the extension, a device, and a torch that sees it.
    """
    if name not in _EXTENSIONS:
        raise ValueError(f"name must be one of {sorted(_EXTENSIONS)}, got {name!r}")
    module, reason = _load(name)
    if module is None:
        return False, reason
    if name == "cpp":
        return True, f"{reason}; uses {module.isas()[-1]}"
    reason += f"; architectures {module.architectures}"
    count, code = module.device_count()
    if count == 0:
        return False, f"{reason}; no device: CUDA error {code} ({module.error_string(code)})"
    if not torch.cuda.is_available():
        hint = "torch has no CUDA" if torch.version.cuda is None else "torch.cuda.is_available() is False"
        return False, f"{reason}; {count} device(s), but {hint}: install a CUDA build of torch"
    return True, f"{reason}; {count} device(s)"


def check_cuda(code: int, what: str) -> None:
    """Raise :class:`BackendError` if ``code``, which a function of ``mmebm._cuda`` returned, is not success."""
    if code != 0:
        raise BackendError(f"cuda: {what} failed with CUDA error {code} ({cuda().error_string(code)})")


def _word(name: str, value: int, low: int, high: int) -> int:
    """``value`` if it is an integer in [low, high), reduced to its bits."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or isinstance(value, Tensor):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not low <= value < high:
        raise ValueError(f"{name} must be in [{low}, {high}), got {value}")
    return operator.index(value) % high


def _words(*, seed: int, **others: int) -> dict[str, int]:
    """A seed of 64 bits and words of 32, each reduced to its bits."""
    words = {name: _word(name, value, 0, 2**32) for name, value in others.items()}
    return {"seed": _word("seed", seed, -(2**63), 2**64), **words}


def normal_(out: Tensor, *, seed: int, step: int = 0, stream: int = 0, chain_offset: int = 0) -> Tensor:
    """Fill ``out`` with the normals of :func:`mmebm.noise.normal`, within 2e-6 of its float64 values, and return it.

    Args:
        out: float32 (chains, ...), contiguous, on the CPU (C++) or a CUDA device. Rows are chains
            ``chain_offset``, ``chain_offset + 1``, ...
        seed: 64 bits; a negative number stands for the same bits, as in :mod:`mmebm.noise`.
        step: 32 bits, the Langevin step.
        stream: 32 bits, see :func:`mmebm.noise.stream`.
        chain_offset: 32 bits.

    Raises:
        TypeError, ValueError: for anything else than the above, naming the argument.
        BackendError: if the extension for the device of ``out`` is not there, or the launch failed. One that fails its
            parity case (:mod:`mmebm.ops.parity`) warns, and the reference takes its place.
    """
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor, got {type(out).__name__}")
    if out.device.type not in ("cpu", "cuda"):
        raise ValueError(f"out must be on the CPU or a CUDA device, got {out.device}")
    if out.dtype != torch.float32:
        raise ValueError(f"out must be float32, got {out.dtype}")
    if out.dim() == 0:
        raise ValueError("out must have a leading chain dimension, got shape ()")
    if out.layout != torch.strided or not out.is_contiguous() or out.is_neg():
        raise ValueError(f"out must be contiguous, got layout {out.layout} and strides {out.stride()}")
    reason = obstacle(out)
    if reason is not None:
        raise TypeError(f"out must be a plain tensor, got {reason}")
    if out.requires_grad:
        raise ValueError("out must not require grad: it is overwritten")
    where = _words(seed=seed, step=step, stream=stream, chain_offset=chain_offset)
    backend = "cuda" if out.is_cuda else "cpp"
    _module(backend)  # raises where there is none
    reason = parity_failure("noise", backend, out.device)
    if reason is None:
        fill_normal(out, **where)
    elif os.environ.get("MMEBM_BACKEND") == backend:
        raise BackendError(f"{backend}: noise: {reason}")
    else:
        from mmebm import noise

        out.copy_(noise.normal(out.shape, **where, dtype=torch.float32, device=out.device))
    return out


def parity_failure(op: str, backend: str, device: torch.device) -> str | None:
    """:func:`mmebm.ops.parity.failure`, imported when first needed."""
    from mmebm.ops import parity

    return parity.failure(op, backend, device)


def fill_normal(out: Tensor, *, seed: int, step: int, stream: int, chain_offset: int) -> None:
    """:func:`normal_` of arguments that are as they must be, by the extension of the device."""
    _fill("normal", out, out.shape[0], math.prod(out.shape[1:]), seed, step, stream, chain_offset)


def fill_uniform(out: Tensor, *, seed: int, step: int, stream: int, chain_offset: int) -> None:
    """:func:`mmebm.noise.uniform` into float32 or float64 (chains, ...), contiguous, by the extension of the device."""
    if out.is_cuda:  # which makes words
        words = torch.empty((out.shape[0], -(-math.prod(out.shape[1:]) // 4), 4), dtype=torch.int32, device=out.device)
        fill_words(words, seed=seed, step=step, stream=stream, chain_offset=chain_offset)
        bits = (words >> 8 & 0xFFFFFF).flatten(1)[:, : math.prod(out.shape[1:])]
        out.copy_((bits.to(out.dtype) * 2.0**-24).reshape(out.shape))
        return
    place = address("out", out, torch.device("cpu"), out.dtype)
    sizes = out.shape[0], math.prod(out.shape[1:])
    cpu().uniform(place, *sizes, seed, step, stream, chain_offset, out.dtype == torch.float64)


def fill_words(out: Tensor, *, seed: int, step: int, stream: int, chain_offset: int) -> None:
    """:func:`mmebm.noise.words` into int32 (chains, blocks, 4), by the extension of the device."""
    _fill("philox_words", out, out.shape[0], out.shape[1], seed, step, stream, chain_offset)


def _fill(function: str, out: Tensor, *numbers: int) -> None:
    place = address("out", out, out.device, out.dtype)
    if out.is_cuda:
        queue = torch.cuda.current_stream(out.device).cuda_stream
        with torch.cuda.device(out.device):
            check_cuda(getattr(cuda(), function)(place, *numbers, out.device.index, queue), function)
    else:
        from mmebm.ops import dispatch

        getattr(cpu(), function)(place, *numbers, torch.get_num_threads(), dispatch.isa())
