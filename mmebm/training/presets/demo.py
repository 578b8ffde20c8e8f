"""The demo: `digits` on two CPU cores in minutes, with both extensions and the ELBO kept in the joint stage.

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
    ShuffledTuplesConfig,
    Stage,
)


def config() -> Config:
    """`mmebm train` runs this."""
    return Config(
        preset="demo",
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
        # ten classes in a batch of 100: a row and its nearest eleven count as one class
        shuffled_tuples=ShuffledTuplesConfig(weight=12.0, kind="hard", same=0.12, near=0.3),
    )
