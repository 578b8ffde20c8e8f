"""Training: the paper's interleaved loop (:mod:`mmebm.training.trainer`), its stages, guards and checkpoints, and runs
that can be left alone (:mod:`mmebm.training.fitting`)."""

from mmebm.training.callbacks import Callback
from mmebm.training.config import Config
from mmebm.training.fitting import fit
from mmebm.training.presets import PRESETS, preset
from mmebm.training.system import System
from mmebm.training.trainer import Trainer, TrainingDiverged

__all__ = ["PRESETS", "Callback", "Config", "System", "Trainer", "TrainingDiverged", "fit", "preset"]
