"""The demo: `digits` on two CPU cores in minutes, with the contrastive term and a fitted prior of the latent.

MNIST at 14x14: at 28x28 the same networks need 1.4 times the seconds for a joint coherence lower by .04, and a
`model.weights` of mnist 0.25 (four times the pixels).
"""

from mmebm.training.config import (
    AdamConfig,
    ChainConfig,
    Config,
    DataConfig,
    LatentPriorConfig,
    LossConfig,
    ModelConfig,
    Stage,
    StartConfig,
)
from mmebm.training.variants import OF_TEN_CLASSES


def config() -> Config:
    """`mmebm train` runs this."""
    return energy_prior().replace(
        preset="demo",
        loss=LossConfig(elbo=1.0, energy_l2=0.01, contrastive=5.0),
        stages=(
            Stage("warmup", 8000, lr=1.0, final_lr=0.3),
            Stage("prior", 1),
            Stage("joint", 700, lr=0.5, final_lr=0.3),
            # generator and inference network rest: the energy catches up with them
            Stage("joint", 1500, lr=0.5, final_lr=0.05, train=("energy",)),
        ),
        latent_prior=LatentPriorConfig(kind="mixture", posterior="product"),
        # given two modalities .991 for .980 on validation tuples; given one the same (benchmarks/study/levers)
        start=StartConfig(completion="product"),
        # experts that agree need no negatives made of other classes, and no number of classes
        shuffled_tuples=None,
    )


def energy_prior() -> Config:
    """`mmebm train --preset demo-energy-prior`: the demo as it was in 0.1.0, the prior of the latent an energy that
    short chains draw from, negatives of the data's energy made of other classes, no contrastive term."""
    return Config(
        preset="demo-energy-prior",
        data=DataConfig("digits", options={"size": 14}),
        model=ModelConfig(weights={"word": 6.0}),
        data_chain=ChainConfig(steps=30, travel=2.2, noise=0.005, clamp=True),
        latent_chain=ChainConfig(steps=20, step="auto"),
        loss=LossConfig(elbo=1.0, energy_l2=0.01),
        generator=AdamConfig(lr=1e-3),
        inference=AdamConfig(lr=1e-3),
        energy=AdamConfig(lr=6e-4, beta1=0.0, beta2=0.9),
        stages=(
            Stage("warmup", 8000, lr=1.0, final_lr=0.3),
            Stage("prior", 3000, lr=0.5, final_lr=0.5),
            Stage("joint", 700, lr=0.5, final_lr=0.3),
            # generator and inference network rest: the prior catches up with them, then the energy with its samples
            Stage("joint", 2000, lr=0.5, final_lr=0.05, train=("prior",)),
            Stage("joint", 2000, lr=0.5, final_lr=0.05, train=("energy", "prior")),
        ),
        # the prior must keep up with the posterior in the joint stage: at half this rate x_k loses .07 of coherence
        latent_prior=LatentPriorConfig(adam=AdamConfig(lr=2e-3)),
        shuffled_tuples=OF_TEN_CLASSES,
    )
