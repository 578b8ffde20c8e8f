"""Judging samples: classifiers and coherence, distances to real data, likelihood, figures.

classifiers   one small judge per modality, trained here and always in eval mode
metrics       coherence, chance, balance, Frechet and kernel distances: pure functions of predictions and features
features      networks trained elsewhere whose features the distances may be taken on
latent        classes read off the latent before and after its chain; interpolation
matching      how well a caption fits an image
heldout       tuples that training never saw: likely, rebuilt, found and imitated, with or without labels
likelihood    log p(X) of the generator by annealed importance sampling
sweep         metrics against the number of test-time steps
mixing        do the chains mix
evaluate      all of it about a model, as plain data and as a table
figures       sample grids, chains and training curves as PNG; needs matplotlib, which is imported when one is drawn
"""

from mmebm.evaluation.classifiers import Classifiers, fit_classifiers
from mmebm.evaluation.features import FeatureExtractor, Inception, Lite0
from mmebm.evaluation.figures import curves, sample_grid, trajectory_grid
from mmebm.evaluation.heldout import held_out
from mmebm.evaluation.latent import encoders, interpolate, interpolate_prior, latent_classification, latent_report
from mmebm.evaluation.likelihood import Gap, Likelihood, likelihood_gap, log_likelihood
from mmebm.evaluation.metrics import (
    Agreement,
    ClassBalance,
    KernelDistance,
    agreement_by_class,
    binomial_error,
    chance_agreement,
    class_accuracy,
    class_balance,
    conditional_coherence,
    frechet_distance,
    gaussian_kernel_distance,
    joint_coherence,
    kernel_distance,
    pair_agreement,
)
from mmebm.evaluation.sweep import STEPS, Chain, data_chain, latent_chain, run_sweep

__all__ = [
    "STEPS",
    "Agreement",
    "Chain",
    "ClassBalance",
    "Classifiers",
    "FeatureExtractor",
    "Gap",
    "Inception",
    "KernelDistance",
    "Likelihood",
    "Lite0",
    "agreement_by_class",
    "binomial_error",
    "chance_agreement",
    "class_accuracy",
    "class_balance",
    "conditional_coherence",
    "curves",
    "data_chain",
    "encoders",
    "fit_classifiers",
    "frechet_distance",
    "gaussian_kernel_distance",
    "held_out",
    "interpolate",
    "interpolate_prior",
    "joint_coherence",
    "kernel_distance",
    "latent_chain",
    "latent_classification",
    "latent_report",
    "likelihood_gap",
    "log_likelihood",
    "pair_agreement",
    "run_sweep",
    "sample_grid",
    "trajectory_grid",
]
