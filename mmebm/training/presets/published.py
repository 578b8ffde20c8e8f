"""The paper's own data sets, read from their published layouts: residual convolutional networks, for one GPU of 80 GB.

The method with its extensions, as in ``polymnist-5k``; rates, step and noise of the lineage ("Learning energy-based
model via dual-MCMC teaching", NeurIPS 2023); widths so that energy, generator and inference network are about alike.
What an iteration takes is in benchmarks/study/published; only ``polyfashion`` was trained to its end yet, so that
lengths of stages and ``sigma`` are a start and not a result. ``NAME/paper`` is the paper's loop alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

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
    ValidationConfig,
)
from mmebm.training.variants import OF_TEN_CLASSES


def _config(
    preset: str,
    data: DataConfig,
    *,
    latent: int,
    width: int = 64,
    shuffled: ShuffledTuplesConfig = OF_TEN_CLASSES,
    batch: int = 128,
    **model: Any,
) -> Config:
    return Config(
        preset=preset,
        data=data,
        model=ModelConfig(
            latent=latent,
            net="resnet",
            generator_width=width,
            inference_width=width,
            energy_trunk_width=width,
            energy_width=512,
            sigma=0.3,
            weights="auto",
            **model,
        ),
        data_chain=ChainConfig(steps=30, step=0.3, noise=0.001, clamp=True),
        latent_chain=ChainConfig(steps=10, step="auto"),
        loss=LossConfig(elbo=1.0, energy_l2=0.01),
        generator=AdamConfig(lr=3e-4),
        inference=AdamConfig(lr=1e-4),
        energy=AdamConfig(lr=1e-4, beta1=0.0, beta2=0.9),
        stages=(
            Stage("warmup", 50_000, final_lr=0.3),
            Stage("prior", 5_000, final_lr=0.5),
            Stage("joint", 20_000, final_lr=0.3),
            # as in polymnist-5k: the prior, then the energy, catch up with a generator that rests
            Stage("joint", 3_000, final_lr=0.05, train=("prior",)),
            Stage("joint", 7_000, final_lr=0.05, train=("energy", "prior")),
        ),
        latent_prior=LatentPriorConfig(width=200, chain=ChainConfig(steps=60, step=0.2, sample_steps=120)),
        shuffled_tuples=shuffled,
        # sets of finished tuples keep some of them back; those that are built of items have a validation split
        validation=ValidationConfig(every=5_000, share=0.05, rows=2_000),
        batch=batch,
        ema=0.999,
        precision="bf16",
        channels_last=True,
    )


def polymnist() -> Config:
    """`mmebm train --preset polymnist --data-path FOLDER`: five images of 28x28."""
    return _config("polymnist", DataConfig("polymnist"), latent=64)


def polyfashion() -> Config:
    """`mmebm train --preset polyfashion`: the recipe over Fashion-MNIST at full size, narrow and in float32 for an hour
    or two of one CPU core, where both chains are one call, with the demo's contrastive term and fitted prior. It ran to
    its end (benchmarks/study/published). `--preset polymnist --data polyfashion` is the wide one."""
    wide = _config("polyfashion", DataConfig("polyfashion"), latent=64, width=8, batch=50)
    chain = ChainConfig(steps=10, travel=2.5, noise=0.001, clamp=True, sample_steps=30)
    return wide.replace(
        model=dataclasses.replace(wide.model, energy_width=256, energy_features=64),
        data_chain=chain,
        loss=dataclasses.replace(wide.loss, contrastive=200.0),
        generator=AdamConfig(lr=1e-3),
        inference=AdamConfig(lr=1e-3),
        energy=AdamConfig(lr=3e-4, beta1=0.0, beta2=0.9),
        stages=(
            Stage("warmup", 7_000, final_lr=0.3),
            Stage("prior", 1),
            Stage("joint", 700, lr=0.5, final_lr=0.3),
            # the energy catches up with a generator that rests
            Stage("joint", 1_000, lr=0.5, final_lr=0.05, train=("energy",)),
        ),
        latent_prior=LatentPriorConfig(kind="mixture", posterior="product", components=30),
        shuffled_tuples=None,
        precision="fp32",
        channels_last=False,
    )


def mnist_svhn_text() -> Config:
    """`mmebm train --preset mnist-svhn-text --data-path FOLDER`: 28x28, 3x32x32, and a word in characters."""
    return _config("mnist-svhn-text", DataConfig("mnist-svhn-text"), latent=32)


def cub(size: int = 64) -> Config:
    """`mmebm train --preset cub --data-path FOLDER`, or ``cub-128``: an image of that size and a code of a caption."""
    name = "cub" if size == 64 else f"cub-{size}"
    return _config(name, DataConfig("cub", options={"size": size}), latent=64, shuffled=ShuffledTuplesConfig())


def coco(size: int = 64) -> Config:
    """`mmebm train --preset coco --data-path FOLDER`, or ``coco-128``: as :func:`cub`; images are read by the batch."""
    name = "coco" if size == 64 else f"coco-{size}"
    return _config(name, DataConfig("coco", options={"size": size}), latent=128, shuffled=ShuffledTuplesConfig())
