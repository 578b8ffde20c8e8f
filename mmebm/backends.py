"""Which backends can run here and, for the others, why not.

``mmebm.backends()`` is the function :func:`backends`; the module is reached with ``from mmebm.backends import ...``.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from typing import NamedTuple

import torch

from . import native
from .native import BackendError

__all__ = ["NAMES", "Backend", "BackendError", "backends", "check", "describe", "require_backends"]

NAMES = ("torch", "cpp", "triton", "cuda")


class Backend(NamedTuple):
    """One backend: whether it can run here, and how, or what is missing and what would help."""

    available: bool
    reason: str


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _triton() -> Backend:
    # Asks the importer, without importing: triton takes a second to import and reads its environment when it is.
    if importlib.util.find_spec("triton") is None:
        return Backend(False, "triton is not installed; pip install triton (Linux)")
    version = f"triton {_version('triton') or 'of unknown version'}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Backend(True, f"{version}, interpreted on the CPU (TRITON_INTERPRET=1): for tests, slow")
    if not torch.cuda.is_available():
        return Backend(False, f"{version}, but torch sees no GPU; TRITON_INTERPRET=1 runs it, slowly, on the CPU")
    return Backend(True, f"{version} on {torch.cuda.get_device_name()}")


def backends() -> dict[str, Backend]:
    """Every backend by name, in the order "torch", "cpp", "triton", "cuda", with the reason.

    Looks at the machine as it is now; imports the extensions, not triton.

    Example:
        >>> mmebm.backends()["torch"].available
        True
    """
    return {
        "torch": Backend(True, f"torch {torch.__version__}, the reference: any device, any dtype"),
        "cpp": Backend(*native.available("cpp")),
        "triton": _triton(),
        "cuda": Backend(*native.available("cuda")),
    }


def describe() -> list[str]:
    """The lines that ``mmebm backends`` prints: versions first, then each backend, available or why not."""
    cuda = f", built for CUDA {torch.version.cuda}" if torch.version.cuda else ""
    lines = [
        f"mmebm {_version('mmebm') or 'not installed'}, Python {platform.python_version()}, {platform.platform()}",
        f"torch {torch.__version__}{cuda}, {torch.get_num_threads()} threads",
    ]
    for name, backend in backends().items():
        lines.append(f"{name:<7}{'available' if backend.available else 'missing':<11}{backend.reason}")
    return lines


def check() -> int:
    """Prints a line for each op, implementation, device and instruction set that can run here: its error against the
    reference (:mod:`mmebm.ops.parity`). Returns how many failed, at most 1: the exit status of ``mmebm backends
    --check``."""
    from mmebm.ops import parity

    failed = 0
    for op, backend, device, isa, verdict in parity.check_all():
        name = f"{op:<15}{backend:<8}{device!s:<8}{isa:<9}"
        if verdict.reason is not None:
            failed = 1
            print(f"{name}FAILED   {verdict.reason}", flush=True)
        else:
            found = f"error {verdict.error:.1e}, allowed {verdict.limit:.1e}"
            print(f"{name}passed   {found}, {1e3 * verdict.seconds:.1f} ms", flush=True)
    return failed


def require_backends() -> frozenset[str]:
    """The backends that must not be missing: those named, separated by commas, in MMEBM_REQUIRE_BACKENDS.

    A test that would be skipped for want of one of these has to fail, so that a broken build is not a green run.

    Raises:
        ValueError: if the variable names a backend that does not exist.
    """
    value = os.environ.get("MMEBM_REQUIRE_BACKENDS", "")
    names = frozenset(name.strip() for name in value.split(",") if name.strip())
    if unknown := names - set(NAMES):
        raise ValueError(f"MMEBM_REQUIRE_BACKENDS must name some of {', '.join(NAMES)}, got {sorted(unknown)}")
    return names
