"""Five colour modalities of 28x28 for two CPU cores: the preset ``polymnist-14`` at the set's own size."""

from mmebm.training.config import ChainConfig, Config, DataConfig, ModelConfig, Stage
from mmebm.training.presets import polymnist_14


def config() -> Config:
    """`mmebm train --preset polymnist-5k` runs this."""
    small = polymnist_14.config()
    return small.replace(
        preset="polymnist-5k",
        data=DataConfig("polymnist-5k", options={"copies": 6}),
        model=ModelConfig(latent=64, sigma=0.2, generator_width=384, inference_net="conv", inference_width=16),
        data_chain=ChainConfig(steps=8, travel=5.0, noise=0.005, clamp=True),
        latent_chain=ChainConfig(steps=8, step="auto"),
        stages=(
            Stage("warmup", 10000, final_lr=0.3),
            Stage("prior", 2500, final_lr=0.5),
            Stage("joint", 1000, lr=0.5, final_lr=0.3),
            Stage("joint", 1000, final_lr=0.05, train=("prior",)),
            Stage("joint", 1200, lr=0.5, final_lr=0.05, train=("energy", "prior")),
        ),
        batch=50,
    )
