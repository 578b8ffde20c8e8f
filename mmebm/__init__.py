"""Fused Langevin samplers for (multimodal) energy-based models.

    x = mmebm.langevin(energy, x0, steps=60, step_size=1e-2)

replaces a hand-written Langevin loop; :class:`mmebm.Langevin` is the same with records, trajectories and every option
of the published loops. Importing this package imports neither Triton nor a compiled extension.
"""

from importlib.metadata import PackageNotFoundError, version

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

__all__ = [
    "HMC", "MALA", "BackendError", "Langevin", "ParallelTempering", "ReplayBuffer", "Samples", "Underdamped",
    "__version__", "backends", "capture", "diagnostics", "initial", "langevin", "noise", "presets", "rank_offset",
    "schedules",
]  # fmt: skip

try:
    __version__ = version("mmebm")
except PackageNotFoundError:  # used from a source tree that is not installed
    __version__ = "0+unknown"
