"""Training: the paper's interleaved loop (:mod:`mmebm.training.trainer`), its stages, guards and checkpoints."""

from mmebm.training.config import Config
from mmebm.training.presets import PRESETS, preset
from mmebm.training.system import System
from mmebm.training.trainer import Trainer, TrainingDiverged

__all__ = ["PRESETS", "Config", "System", "Trainer", "TrainingDiverged", "preset"]
