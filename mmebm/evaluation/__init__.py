"""Judging samples: classifiers and coherence, distances to real data, figures.

    classifiers   one small judge per modality, trained here and always in eval mode
    metrics       coherence, chance, balance, Frechet and kernel distances: pure functions of predictions and features
    figures       sample grids, chains and training curves as PNG; needs matplotlib, which is imported when one is drawn
"""

from mmebm.evaluation.classifiers import Classifiers, fit_classifiers
from mmebm.evaluation.figures import curves, sample_grid, trajectory_grid
from mmebm.evaluation.metrics import (
    Agreement,
    ClassBalance,
    KernelDistance,
    binomial_error,
    chance_agreement,
    class_balance,
    conditional_coherence,
    frechet_distance,
    joint_coherence,
    kernel_distance,
    pair_agreement,
)

__all__ = [
    "Agreement", "ClassBalance", "Classifiers", "KernelDistance",
    "binomial_error", "chance_agreement", "class_balance", "conditional_coherence", "curves", "fit_classifiers",
    "frechet_distance", "joint_coherence", "kernel_distance", "pair_agreement", "sample_grid", "trajectory_grid",
]  # fmt: skip
