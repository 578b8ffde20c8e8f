"""Samplers: Langevin dynamics of any energy, and what belongs to a chain."""

from mmebm.samplers import capture, initial, schedules
from mmebm.samplers.buffer import ReplayBuffer
from mmebm.samplers.driver import Carry
from mmebm.samplers.hmc import HMC
from mmebm.samplers.langevin import MALA, Langevin, langevin
from mmebm.samplers.ranks import rank_offset
from mmebm.samplers.samples import Samples
from mmebm.samplers.tempering import ParallelTempering
from mmebm.samplers.underdamped import Underdamped

__all__ = [
    "HMC",
    "MALA",
    "Carry",
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
]
