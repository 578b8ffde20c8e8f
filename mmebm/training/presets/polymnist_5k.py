"""Five colour modalities of 28x28 for two CPU cores: the preset ``polymnist-14`` at the set's own size."""

from mmebm.training.config import AdamConfig, ChainConfig, Config, DataConfig, LatentPriorConfig, ModelConfig, Stage
from mmebm.training.presets import polymnist_14


def config() -> Config:
    """`mmebm train --preset polymnist-5k` runs this."""
    small = polymnist_14.config()
    return small.replace(
        preset="polymnist-5k",
        data=DataConfig("polymnist-5k", options={"copies": 6}),
        # four times the pixels, each trusted less: at sigma 0.2 the latent chain drives |z| to 1.6 sqrt(latent), where
        # the prior did not follow (gap -90)
        model=ModelConfig(latent=48, sigma=0.5, generator_width=384, inference_net="conv", inference_width=16),
        data_chain=ChainConfig(steps=8, travel=8.0, noise=0.005, clamp=True),
        latent_chain=ChainConfig(steps=8, step="auto"),
        stages=(
            Stage("warmup", 8000, final_lr=0.3),
            Stage("prior", 2000, final_lr=0.5),
            Stage("joint", 1000, lr=0.5, final_lr=0.3),
            Stage("joint", 800, final_lr=0.05, train=("prior",)),
            Stage("joint", 1200, lr=0.5, final_lr=0.05, train=("energy", "prior")),
        ),
        latent_prior=LatentPriorConfig(
            width=200, chain=ChainConfig(steps=100, step=0.2), sample_steps=200, adam=AdamConfig(lr=3e-3)
        ),
        batch=50,
    )
