"""The demo: `digits` on two CPU cores in minutes, with both extensions and the ELBO kept in the joint stage."""

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
    """`mmebm train` runs this."""
    return Config(
        preset="demo",
        data=DataConfig("digits"),
        model=ModelConfig(weights={"word": 6.0}),
        data_chain=ChainConfig(steps=30, travel=4.8, noise=0.005, clamp=True),
        latent_chain=ChainConfig(steps=10, step="auto"),
        loss=LossConfig(elbo=1.0, energy_l2=0.01),
        generator=AdamConfig(lr=5e-4),
        inference=AdamConfig(lr=5e-4),
        stages=(Stage("warmup", 8000), Stage("prior", 3000), Stage("joint", 800)),
        latent_prior=LatentPriorConfig(),
        shuffled_tuples=ShuffledTuplesConfig(),
    )
