"""Diagnostics of chains and energies, on the device."""

from mmebm.diagnostics.curvature import curvature, largest_stable_step

__all__ = ["curvature", "largest_stable_step"]
