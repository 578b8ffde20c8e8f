"""Five colour modalities of 14x14 for two CPU cores: PolyMNIST-5k at half its size, plain MLPs, chains of ten steps."""

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
    """`mmebm train --preset polymnist-14` runs this."""
    return energy_prior().replace(
        preset="polymnist-14",
        loss=LossConfig(elbo=1.0, energy_l2=0.01, contrastive=60.0),
        stages=(
            Stage("warmup", 8000, final_lr=0.3),
            Stage("prior", 1),
            Stage("joint", 1200, lr=0.5, final_lr=0.1),
            # the energy catches up with a generator that rests; 1,800 iterations make it so steep that ten steps
            # overshoot (benchmarks/study/README.md)
            Stage("joint", 300, lr=0.5, final_lr=0.05, train=("energy",)),
        ),
        latent_prior=LatentPriorConfig(kind="mixture", posterior="product"),
        # decoded, given four modalities .97 for .85 of the mixture, given one .83 for .84 (benchmarks/study/levers)
        start=StartConfig(completion="product"),
        shuffled_tuples=None,
    )


def energy_prior() -> Config:
    """`mmebm train --preset polymnist-14-energy-prior`: as it was in 0.1.0, the prior of the latent an energy that
    short chains draw from, negatives of the data's energy made of other classes, no contrastive term."""
    return Config(
        preset="polymnist-14-energy-prior",
        # more crops than the set's own three: photographs are what there is plenty of
        data=DataConfig("polymnist-5k", options={"size": 14, "copies": 6}),
        model=ModelConfig(latent=48, sigma=0.3),
        # ten steps of the demo's travel, for its thirty: the chain is most of an iteration's seconds
        data_chain=ChainConfig(steps=10, travel=2.5, noise=0.005, clamp=True),
        latent_chain=ChainConfig(steps=10, step="auto"),
        loss=LossConfig(elbo=1.0, energy_l2=0.01),
        generator=AdamConfig(lr=1e-3),
        inference=AdamConfig(lr=1e-3),
        energy=AdamConfig(lr=6e-4, beta1=0.0, beta2=0.9),
        stages=(
            Stage("warmup", 8000, final_lr=0.3),
            Stage("prior", 2000, final_lr=0.5),
            Stage("joint", 600, lr=0.5, final_lr=0.3),
            # as in the demo: the prior, then the energy, catch up with a generator that rests
            Stage("joint", 1000, final_lr=0.05, train=("prior",)),
            Stage("joint", 1200, lr=0.5, final_lr=0.05, train=("energy", "prior")),
        ),
        # samples: 60 / 120 / 240 steps of the prior's chain gave x_k a coherence of .72 / .77 / .78 and its least class
        # a share of .07 / .06 / .03 (seed 0; `mmebm evaluate RUN --prior-steps 240`)
        latent_prior=LatentPriorConfig(
            width=200, chain=ChainConfig(steps=60, step=0.2, sample_steps=120), adam=AdamConfig(lr=3e-3)
        ),
        shuffled_tuples=OF_TEN_CLASSES,
    )
