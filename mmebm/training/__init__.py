"""Training: the paper's interleaved loop (:mod:`mmebm.training.trainer`), its stages, guards and checkpoints, and
runs that can be left alone (:mod:`mmebm.training.fitting`).

Importing this package does not import torch; what is used is imported then.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmebm.training.callbacks import Callback
    from mmebm.training.config import Config
    from mmebm.training.fitting import fit
    from mmebm.training.presets import PRESETS, preset
    from mmebm.training.system import System
    from mmebm.training.trainer import Trainer, TrainingDiverged

__all__ = ["PRESETS", "Callback", "Config", "System", "Trainer", "TrainingDiverged", "fit", "preset"]

_HOME = {
    "Callback": "callbacks",
    "Config": "config",
    "PRESETS": "presets",
    "fit": "fitting",
    "preset": "presets",
    "System": "system",
    "Trainer": "trainer",
    "TrainingDiverged": "trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mmebm.training' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"mmebm.training.{_HOME[name]}"), name)
    globals()[name] = value
    return value
