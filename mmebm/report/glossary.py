"""The words of a report, each in a sentence or two."""

from __future__ import annotations

from typing import Final

from mmebm.report.page import Html, details, element, join

__all__ = ["glossary"]

# term -> (how it may stand on a page, what it means)
TERMS: Final[dict[str, tuple[tuple[str, ...], str]]] = {
    "tuple": (("tuple",), "One row of the data: a value of every modality, such as an image and its caption."),
    "VAE after the warm-up": (
        ("VAE after", "VAE only"),
        "Samples of the multimodal VAE alone, before any energy was learned: the baseline.",
    ),
    "frozen": (("frozen: ",), "Langevin by a joint energy that was learned on top of the VAE, which rested meanwhile."),
    "x0": (("x0",), "Samples of the generator: z from the prior, decoded. Where the data chain starts."),
    "xk": (("xk",), "Samples after the data chain: x0 revised by Langevin under the joint energy."),
    "data chain": (
        ("data chain", "Data chain", "data-space"),
        "Langevin on all modalities at once, under the joint energy.",
    ),
    "latent chain": (
        ("latent chain", "Latent chain"),
        "Langevin on z, given a tuple: it moves z from the inference "
        "network's guess to where the generator explains the tuple.",
    ),
    "real against real": (
        ("real against real",),
        "The same numbers for real tuples that were not trained on: the best "
        "that a model could have, given the judges.",
    ),
    "joint coherence": (("joint coherence",), "Share of samples whose modalities are all judged to be of one class."),
    "pair agreement": (("pair agreement",), "The same for two modalities, averaged over the pairs."),
    "by chance": (
        ("by chance",),
        "The agreement that the same modalities would have if they were drawn independently. "
        "A model that makes one class only has full coherence, by chance.",
    ),
    "class shares": (
        ("class shares", "lass shares"),
        "How often the rarest and the commonest class occur among the samples.",
    ),
    "lowest class entropy": (
        ("lowest class entropy",),
        "How evenly the classes occur, of the least even modality: 1 "
        "where all are alike often, 0 where there is one only.",
    ),
    "conditional coherence": (
        ("Conditional coherence",),
        "Some modalities of a test tuple are given, the others "
        "made: the share of those made that show the tuple's class. A: decoded from the "
        "inferred z. B: z revised by the latent chain first. C: the data chain after that, "
        "the given ones held.",
    ),
    "Frechet distance": (
        ("Frechet",),
        "Distance between two sets of samples: of Gaussians with the mean and the "
        "covariance of their features. 0 for equal sets; it falls with the number of samples, so "
        "compare equal numbers only.",
    ),
    "second judge": (
        ("second judge",),
        "Classifiers of another kind, trained on the other half of the items: a coherence that both see is no weakness "
        "of one of them.",
    ),
    "precision, recall": (
        ("precision", "recall"),
        "Share of samples within the reach of real tuples, and of real tuples within that of samples.",
    ),
    "spread": (
        ("spread",),
        "Standard deviation of the samples by that of real tuples, of the least varied modality: below 1 they are "
        "prototypes.",
    ),
    "training tuples": (
        ("training tuples",),
        "The same numbers for what the model learned from: those of a model that only copies.",
    ),
    "kernel distance": (
        ("kernel",),
        "Squared maximum mean discrepancy, of whole tuples or of features, unbiased: 0 up to its error for samples of "
        "the same law.",
    ),
    "nearest training tuple": (
        ("nearest", "Nearest"),
        "By the root mean square distance over modalities, each in "
        "units of its own between two training tuples. Samples far nearer to it than "
        "test tuples are would be copies.",
    ),
    "energy": (("energy",), "The number that the joint energy gives a tuple: the lower, the likelier."),
    "gap": (("gap",), "Mean energy of real tuples less that of revised ones. Near 0 while both learn well."),
    "prior_gap": (("prior_gap",), "The same for the latent prior: posterior samples less its own."),
    "bound": (
        ("bound, nats",),
        "A lower bound on the mean log probability of held-out tuples, by importance weighting; higher is better.",
    ),
    "found, among first 5": (
        ("found, among first", "among the first"),
        "Given one modality of a held-out tuple: how often the decoder ranks another one of its modalities among the "
        "first five of all tuples'. By chance: where the distinct values come in a random order.",
    ),
    "validation, test": (
        ("(validation)", ", validation"),
        "Tuples that training never saw: those kept back from the train split, to choose by, and those of the test "
        "split, to compare by.",
    ),
    "mse": (("mse", "reconstruction error"), "Mean squared error of reconstructions, in units of [-1, 1]."),
    "revision_mse": (("revision_mse",), "Mean squared change that the data chain makes."),
    "loss_elbo": (("loss_elbo",), "The negative bound that the VAE learns from; constants are left out."),
    "loss_generator, loss_inference, loss_energy": (("loss_generator",), "What each network's update minimises."),
    "latent_size": (
        ("latent_size",),
        "Median length of z after the latent chain, over the square root of its size; 1 fits a standard normal prior.",
    ),
    "frozen_chains": (("frozen_chains",), "Chains of an iteration that came to a value that is inf or NaN."),
    "rolled back": (("rolled back",), "Training had diverged, and went back to its last good state."),
    "R-hat": (
        ("R-hat",),
        "Spread of several chains together, over that within each: 1 where they have forgotten their "
        "starts; up to 1.01 is good, beyond 1.1 they have not.",
    ),
    "bulk ESS, tail ESS": (
        ("ESS",),
        "To how many independent draws those of the chains are worth, for means and for quantiles.",
    ),
    "autocorrelation time": (("autocorrelation time",), "Steps that make one independent draw."),
    "acceptance": (
        ("acceptance",),
        "What a Metropolis test would accept of the unadjusted steps: near 1, the step is "
        "small enough to sample the energy.",
    ),
    "temperature": (("temperature",), "The chain samples exp(-energy / temperature); 0 is descent."),
}


def glossary(page: str) -> Html | None:
    """The terms that occur on a page; None where none does."""
    found = [
        join(element("dt", term), element("dd", meaning))
        for term, (signs, meaning) in TERMS.items()
        if any(sign in page for sign in signs)
    ]
    return details(f"{len(found)} terms of this page", element("dl", *found)) if found else None
