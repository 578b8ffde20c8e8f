"""Samplers: Langevin dynamics of any energy, and what belongs to a chain."""

from mmebm.samplers import schedules
from mmebm.samplers.langevin import Langevin, Samples, langevin

__all__ = ["Langevin", "Samples", "langevin", "schedules"]
