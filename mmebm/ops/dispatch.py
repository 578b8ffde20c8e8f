"""Which implementation of an op runs: one table, one chooser, and the environment variables that rule both.

``MMEBM_BACKEND`` replaces "auto" and counts as asked for by name; ``MMEBM_CPU_ISA`` = ``baseline``, ``avx2`` or
``avx512`` asks the C++ implementations for another instruction set than the best of this processor.

No implementation is chosen before it has passed its parity case on the device (:mod:`mmebm.ops.parity`).
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final, NamedTuple, TypeAlias

import torch

from mmebm.backends import NAMES
from mmebm.native import BackendError
from mmebm.ops.common.address import tangents

__all__ = ["NAMES", "OPS", "Choice", "Op", "choose", "forward_mode", "implementation", "isa", "requested", "using_isa"]


@dataclass(frozen=True, slots=True)
class Op:
    """``modules``: what implements the op, by backend; the reference is not among them. ``auto``: by type of device the
    backends that "auto" tries, in order. ``precisions``: that kernels on a GPU may be asked for, a parity case each."""

    modules: dict[str, str]
    auto: dict[str, tuple[str, ...]]
    precisions: tuple[str, ...] = ("",)


_ALL: Final = {"cpu": ("cpp",), "cuda": ("triton", "cuda")}
_NET: Final = {"cpp": "mmebm.ops.net.cpp", "triton": "mmebm.ops.net.triton"}
OPS: Final[dict[str, Op]] = {
    "noise": Op({"cpp": "mmebm.native", "triton": "mmebm.kernels.noise", "cuda": "mmebm.native"}, _ALL),
    "langevin_step": Op(
        {
            "cpp": "mmebm.ops.langevin_step.cpp",
            "triton": "mmebm.kernels.langevin_step",
            "cuda": "mmebm.ops.langevin_step.cuda",
        },
        _ALL,
    ),
    "langevin_mlp": Op(
        {
            "cpp": "mmebm.ops.langevin_mlp.cpp",
            "triton": "mmebm.kernels.langevin_mlp",
            "cuda": "mmebm.ops.langevin_mlp.cuda",
        },
        _ALL,
        ("fp32", "tf32x3", "bf16"),
    ),
    "mlp_energy": Op(
        {"cpp": "mmebm.ops.langevin_mlp.cpp", "triton": "mmebm.kernels.mlp_energy"},
        {"cpu": ("cpp",), "cuda": ("triton",)},
    ),
    "dynamics": Op({"cpp": "mmebm.ops.dynamics.cpp"}, {"cpu": ("cpp",)}),
    "langevin_net": Op(_NET, {"cpu": ("cpp",), "cuda": ("triton",)}, ("fp32", "tf32x3")),
    "net_energy": Op(_NET, {"cpu": ("cpp",), "cuda": ("triton",)}),
    # Triton's has not been timed on a GPU
    "residual": Op({"cpp": "mmebm.ops.residual.cpp", "triton": "mmebm.kernels.residual"}, {"cpu": ("cpp",)}),
}


class Choice(NamedTuple):
    """The backend; the module that implements the op there, ``None`` for the reference; and why."""

    backend: str
    module: ModuleType | None
    reason: str


# Of a backend and its module, why it does not take the arguments, or None
Refusal: TypeAlias = Callable[[str, ModuleType], "str | None"]

_thread = threading.local()


def isa() -> str:
    """The instruction set that is asked for, as ``mmebm._cpu`` names it: "auto", "generic", "avx2" or "avx512"."""
    name = getattr(_thread, "isa", None) or os.environ.get("MMEBM_CPU_ISA", "") or "auto"
    return "generic" if name == "baseline" else name


@contextmanager
def using_isa(name: str) -> Generator[None, None, None]:
    """``name`` in the place of ``MMEBM_CPU_ISA``, in this thread."""
    before, _thread.isa = getattr(_thread, "isa", None), name
    try:
        yield
    finally:
        _thread.isa = before


def requested(backend: str) -> tuple[str, str]:
    """``backend`` after a look at ``MMEBM_BACKEND``, and the words that name the choice.

    Raises:
        ValueError: for an unknown backend.
    """
    why = f"backend={backend!r}"
    named = os.environ.get("MMEBM_BACKEND") if backend == "auto" else None
    if named:
        backend, why = named, f"MMEBM_BACKEND={named}"
    if backend not in ("auto", *NAMES):
        raise ValueError(f"backend must be one of {', '.join(('auto', *NAMES))}, got {why}")
    return backend, why


def forward_mode(op: str, backend: str, *tensors: Any) -> bool:
    """Whether forward-mode differentiation goes through one of ``tensors``, so that the reference is to be called.

    Raises:
        BackendError: where it does, and another backend is asked for by name.
    """
    if not tangents(*tensors):
        return False
    name, why = requested(backend)
    if name not in ("auto", "torch"):
        raise BackendError(f"{name}: {op}: forward mode is the reference's alone, and {why} asks for another backend")
    return True


def implementation(op: str, backend: str) -> tuple[ModuleType | None, str | None]:
    """(the module that implements ``op``, None), or (None, why there is none)."""
    path = OPS[op].modules.get(backend)
    if path is None:
        return None, f"{op} is not built for {backend}"
    try:
        return importlib.import_module(path), None
    except ImportError as error:
        remedy = "; pip install triton" if backend == "triton" else ""
        return None, f"{path} does not import ({error}){remedy}"


def backend_of(op: str, module: ModuleType) -> str:
    """The backend whose implementation of ``op`` the module is."""
    modules = OPS[op].modules
    return next((name for name, path in modules.items() if path == module.__name__), module.__name__)


def _candidate(
    op: str, backend: str, device: torch.device, refusal: Refusal, precision: str
) -> tuple[ModuleType | None, str | None]:
    from mmebm.ops import parity

    module, reason = implementation(op, backend)
    if module is not None:
        reason = refusal(backend, module) or parity.failure(op, backend, device, precision)
    return (None, reason) if reason is not None else (module, None)


def choose(op: str, backend: str, device: torch.device, refusal: Refusal, precision: str = "") -> Choice:
    """The implementation of ``op`` that runs on ``device``, and the reason for the choice.

    Args:
        op: a key of :data:`OPS`.
        backend: "auto", or one of :data:`NAMES`.
        refusal: see :data:`Refusal`.
        precision: one of the op's ``precisions``.

    Raises:
        ValueError: for an unknown backend.
        BackendError: where a backend asked for by name does not take the arguments, or failed its parity case.
    """
    backend, why = requested(backend)
    if backend == "torch":
        return Choice("torch", None, why)
    if backend != "auto":
        module, reason = _candidate(op, backend, device, refusal, precision)
        if reason is not None:
            raise BackendError(f"{backend}: {op}: {reason}")
        return Choice(backend, module, why)
    reasons: list[str] = []
    for name in OPS[op].auto.get(device.type, ()):
        module, reason = _candidate(op, name, device, refusal, precision)
        if reason is None:
            but = f", and {'; '.join(reasons)}" if reasons else ""
            return Choice(name, module, f"auto: {name}, the state is on {device}{but}")
        reasons.append(f"not {name}: {reason}")
    return Choice(
        "torch", None, f"auto: the reference, {'; '.join(reasons) or f'no other backend runs on {device.type}'}"
    )
