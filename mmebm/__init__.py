"""Fused Langevin samplers for (multimodal) energy-based models.

    x = mmebm.langevin(energy, x0, steps=60, step_size=1e-2)

replaces a hand-written Langevin loop; :class:`mmebm.Langevin` is the same with records, trajectories and every option
of the published loops. ``mmebm.load("runs/demo")`` is a finished run as a model. Importing this package imports neither
torch nor a compiled extension; what is used is imported then.
"""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmebm import diagnostics, noise, presets
    from mmebm.backends import BackendError, backends
    from mmebm.samplers import (
        HMC,
        MALA,
        Langevin,
        ParallelTempering,
        ReplayBuffer,
        Samples,
        Underdamped,
        capture,
        initial,
        langevin,
        rank_offset,
        schedules,
    )
    from mmebm.training.model import Model, from_pretrained, load

__all__ = [
    "HMC",
    "MALA",
    "BackendError",
    "Langevin",
    "Model",
    "ParallelTempering",
    "ReplayBuffer",
    "Samples",
    "Underdamped",
    "__version__",
    "backends",
    "capture",
    "diagnostics",
    "from_pretrained",
    "initial",
    "langevin",
    "load",
    "noise",
    "presets",
    "rank_offset",
    "schedules",
]

# where each public name is; the others are modules of this package
_HOME = {
    **dict.fromkeys(("BackendError", "backends"), "mmebm.backends"),
    **dict.fromkeys(("Model", "from_pretrained", "load"), "mmebm.training.model"),
    **dict.fromkeys(
        (
            "HMC",
            "MALA",
            "Langevin",
            "ParallelTempering",
            "ReplayBuffer",
            "Samples",
            "Underdamped",
            "capture",
            "initial",
            "langevin",
            "rank_offset",
            "schedules",
        ),
        "mmebm.samplers",
    ),
}
_MODULES = frozenset(
    (
        "adapters",
        "data",
        "diagnostics",
        "energies",
        "evaluation",
        "models",
        "native",
        "noise",
        "ops",
        "presets",
        "reference",
        "report",
        "samplers",
        "state",
        "training",
    )
)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"mmebm.{name}")
    else:
        raise AttributeError(f"module 'mmebm' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})


class _Package(ModuleType):
    """``mmebm.backends`` is a function; importing the module of that name must not put the module in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value.backends if name == "backends" and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Package

try:
    __version__ = version("mmebm")
except PackageNotFoundError:  # used from a source tree that is not installed
    __version__ = "0+unknown"
