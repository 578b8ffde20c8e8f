"""Samplers: Langevin dynamics of any energy, and what belongs to a chain."""

from mmebm.samplers import capture, initial, schedules
from mmebm.samplers.buffer import ReplayBuffer
from mmebm.samplers.langevin import Langevin, Samples, langevin

__all__ = ["Langevin", "ReplayBuffer", "Samples", "capture", "initial", "langevin", "schedules"]
