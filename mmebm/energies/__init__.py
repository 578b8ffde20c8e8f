"""Energies to start from, and :func:`lower`, which finds the MLPs in anybody's.

The fused ops take these by themselves; so do they any ``nn.Sequential`` of linear layers and activations.
"""

from mmebm.energies.gaussian import Gaussian, GaussianMixture
from mmebm.energies.lower import CannotLower, Lowered, Symbol, lower, residual
from mmebm.energies.mlp import MLP
from mmebm.energies.sums import Sum

__all__ = ["MLP", "CannotLower", "Gaussian", "GaussianMixture", "Lowered", "Sum", "Symbol", "lower", "residual"]
