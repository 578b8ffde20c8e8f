"""Five colour modalities of 28x28: ``polymnist-14-energy-prior`` at the set's own size, half an hour on one core."""

import dataclasses

from mmebm.training.config import AdamConfig, ChainConfig, Config, DataConfig, LatentPriorConfig, Stage
from mmebm.training.presets import polymnist_14


def config() -> Config:
    """`mmebm train --preset polymnist-5k` runs this."""
    small = polymnist_14.energy_prior()
    return small.replace(
        preset="polymnist-5k",
        data=DataConfig("polymnist-5k", options={"copies": 6}),
        # four times the pixels, each trusted less
        model=dataclasses.replace(small.model, sigma=0.5),
        # 10 / 30 / 60 steps for samples gave x_k a coherence of .69 / .79 / .83 (seed 0); from 60 on halos show
        data_chain=dataclasses.replace(small.data_chain, sample_steps=30),
        # the higher rates of the small set's prior were not tried here
        stages=(
            Stage("warmup", 8000, final_lr=0.3),
            Stage("prior", 2000, lr=0.5, final_lr=0.5),
            Stage("joint", 600, lr=0.5, final_lr=0.3),
            Stage("joint", 1000, lr=0.5, final_lr=0.05, train=("prior",)),
            Stage("joint", 1200, lr=0.5, final_lr=0.05, train=("energy", "prior")),
        ),
        latent_prior=LatentPriorConfig(
            width=200, chain=ChainConfig(steps=60, step=0.2, sample_steps=240), adam=AdamConfig(lr=2e-3)
        ),
    )
