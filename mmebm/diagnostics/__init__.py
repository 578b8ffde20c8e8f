"""Diagnostics of chains and energies, on the device."""

from mmebm.diagnostics.acceptance import mala_acceptance
from mmebm.diagnostics.chains import autocorrelation, autocorrelation_time, ess, rhat
from mmebm.diagnostics.curvature import curvature, largest_stable_step

__all__ = [
    "autocorrelation",
    "autocorrelation_time",
    "curvature",
    "ess",
    "largest_stable_step",
    "mala_acceptance",
    "rhat",
]
