"""The paper's loop as reconstructed, without extensions: method and settings of its lineage, on `digits`."""

from mmebm.training.config import AdamConfig, ChainConfig, Config, DataConfig, LossConfig, ModelConfig, Stage


def config() -> Config:
    """Warm-up as a multimodal VAE, then the interleaved loop with the three losses and nothing else."""
    return Config(
        preset="paper",
        data=DataConfig("digits", options={"size": 14}),
        model=ModelConfig(weights={"word": 6.0}),
        data_chain=ChainConfig(steps=30, step=0.3, noise=0.005, clamp=True),
        latent_chain=ChainConfig(steps=10, step=0.1),
        loss=LossConfig(energy_l2=0.01),
        energy=AdamConfig(lr=6e-4, beta1=0.0, beta2=0.9),
        stages=(Stage("warmup", 8000, lr=1.0, final_lr=0.3), Stage("joint", 1500, lr=0.5, final_lr=0.3)),
    )
