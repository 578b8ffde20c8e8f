"""Five colour modalities of 28x28, small convolutional networks: half an hour to an hour on two cores."""

from mmebm.training.config import (
    AdamConfig,
    ChainConfig,
    Config,
    DataConfig,
    LatentPriorConfig,
    LossConfig,
    ModelConfig,
    ShuffledTuplesConfig,
    Stage,
)


def config() -> Config:
    """`mmebm train --preset polymnist-5k` runs this."""
    return Config(
        preset="polymnist-5k",
        data=DataConfig("polymnist-5k"),
        model=ModelConfig(
            latent=64, net="conv", generator_width=16, inference_width=16, energy_trunk_width=16, sigma=0.2,
        ),
        data_chain=ChainConfig(steps=5, travel=2.5, noise=0.005, clamp=True),
        latent_chain=ChainConfig(steps=5, step="auto"),
        loss=LossConfig(elbo=1.0, energy_l2=0.01),
        generator=AdamConfig(lr=1e-3),
        inference=AdamConfig(lr=1e-3),
        energy=AdamConfig(lr=2e-3, beta1=0.0, beta2=0.9),
        stages=(
            Stage("warmup", 4000),
            Stage("prior", 2000, lr=0.5, final_lr=0.5),
            Stage("joint", 600, lr=0.5, final_lr=0.3),
        ),
        # as in the demo: at 5e-4 the prior lags behind the posterior (gap -30)
        latent_prior=LatentPriorConfig(width=200, adam=AdamConfig(lr=2e-3)),
        shuffled_tuples=ShuffledTuplesConfig(),
        batch=50,
    )  # fmt: skip
