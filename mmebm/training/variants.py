"""Named changes of a preset: what switches a part of the method off, adds one lever, or is a baseline.

``preset("demo/coopnets")`` is the preset ``demo`` as the variant ``coopnets`` changes it; ``mmebm ablate`` runs a grid
of them. Every variant has the seconds of the preset: what it does not spend on joint iterations it spends on its
warm-up and the other way round, by :data:`JOINT_COST`. Evaluations of gradients and seconds are in each result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from mmebm.training.config import Config, LatentPriorConfig, ShuffledTuplesConfig, Stage
from mmebm.training.objectives import JOINT_OF

# Warm-up iterations that take as long as one joint iteration (two CPU cores; the joint stage with both extensions).
JOINT_COST = {"demo": 8.5, "paper": 8.5, "polymnist-5k": 5.0}


def _with(config: Config, **loss: Any) -> Config:
    return config.replace(loss=dataclasses.replace(config.loss, **loss))


def _iterations(config: Config, kind: str) -> int:
    return sum(stage.iterations for stage in config.stages if stage.kind == kind)


def _cost(config: Config) -> float:
    return JOINT_COST.get(config.preset.partition("/")[0], 5.0)


def _joint(config: Config) -> Stage:
    joint = [stage for stage in config.stages if stage.kind == "joint"]
    return joint[-1] if joint else Stage("joint", 0, lr=0.5, final_lr=0.3)


def _warmup(config: Config) -> Stage:
    warm = [stage for stage in config.stages if stage.kind == "warmup"]
    return warm[0] if warm else Stage("warmup", 0)


def _only_joint(config: Config, **changes: Any) -> tuple[Stage, ...]:
    """All the time in one joint stage, without a warm-up."""
    joint = _joint(config)
    n = joint.iterations + round((_iterations(config, "warmup") + _iterations(config, "prior")) / _cost(config))
    return (dataclasses.replace(joint, iterations=n, lr=1.0, final_lr=joint.final_lr, **changes),)


def full(config: Config) -> Config:
    """The preset as it is."""
    return config


def paper(config: Config) -> Config:
    """The paper's loop alone: no ELBO kept, no latent prior, no shuffled tuples. The automatic latent step stays."""
    # a prior iteration takes about as long as one of the warm-up
    joint = _joint(config)
    extra = round(_iterations(config, "prior") / _cost(config))
    stages = tuple(stage for stage in config.stages if stage.kind == "warmup")
    stages += (dataclasses.replace(joint, iterations=joint.iterations + extra),)
    return _with(config.replace(latent_prior=None, shuffled_tuples=None, stages=stages), elbo=0.0)


def vae(config: Config) -> Config:
    """Generator and inference network as a multimodal VAE, no chain."""
    plain = paper(config)
    n = _iterations(plain, "warmup") + round(_cost(config) * _iterations(plain, "joint"))
    return plain.replace(stages=(dataclasses.replace(_warmup(config), iterations=n),))


def abp(config: Config) -> Config:
    """Generator and inference network with the latent chain, no energy: alternating back-propagation, short-run."""
    return _with(paper(config), energy=0.0, generator_revised=0.0, inference_revised=0.0)


def ebm(config: Config) -> Config:
    """The energy alone, its chains started from noise."""
    plain = paper(config)
    start = dataclasses.replace(config.start, data="noise")
    return plain.replace(start=start, stages=_only_joint(config, train=("energy",)))


def coopnets(config: Config) -> Config:
    """Energy and generator teach each other; no inference network, no warm-up (Xie et al., 2018)."""
    plain = _with(paper(config), generator_real=0.0, inference_real=0.0, inference_revised=0.0)
    return plain.replace(stages=_only_joint(config))


def coop_vae(config: Config) -> Config:
    """Energy and VAE, the VAE taught by revised samples only; no warm-up (Xie et al., 2021)."""
    plain = _with(
        paper(config), generator_real=0.0, generator_revised=0.0, inference_real=0.0, inference_revised=0.0,
        elbo_revised=1.0,
    )  # fmt: skip
    return plain.replace(stages=_only_joint(config))


def frozen(config: Config) -> Config:
    """The VAE as the warm-up left it, and an energy on top of it."""
    plain = paper(config)
    return plain.replace(stages=(_warmup(plain), dataclasses.replace(_joint(plain), train=("energy",))))


def paper_elbo(config: Config) -> Config:
    """The paper's loop with the warm-up's bound kept."""
    return _with(paper(config), elbo=1.0)


def paper_prior(config: Config) -> Config:
    """The paper's loop with the latent energy prior."""
    return _with(
        config.replace(latent_prior=config.latent_prior or LatentPriorConfig(), shuffled_tuples=None), elbo=0.0
    )


def paper_shuffled(config: Config) -> Config:
    """The paper's loop with shuffled tuples as negatives."""
    return paper(config).replace(shuffled_tuples=ShuffledTuplesConfig())


def paper_hard(config: Config) -> Config:
    """The paper's loop with hard shuffled tuples as negatives."""
    return paper(config).replace(shuffled_tuples=ShuffledTuplesConfig(kind="hard"))


def data_start(name: str) -> Callable[[Config], Config]:
    """The paper's loop with data chains that start elsewhere."""

    def change(config: Config) -> Config:
        return paper(config).replace(start=dataclasses.replace(config.start, data=name))

    change.__doc__ = f"The paper's loop, data chains started by {name!r}."
    return change


def latent_start(name: str) -> Callable[[Config], Config]:
    """The paper's loop with latent chains that start elsewhere."""

    def change(config: Config) -> Config:
        return paper(config).replace(start=dataclasses.replace(config.start, latent=name))

    change.__doc__ = f"The paper's loop, latent chains started by {name!r}."
    return change


def baseline(objective: str) -> Callable[[Config], Config]:
    """A published multimodal VAE on the same networks."""

    def change(config: Config) -> Config:
        model = dataclasses.replace(config.model, inference=JOINT_OF[objective] or config.model.inference)
        if objective == "mmvae+":
            # as many latents for each decoder as before, half of them its own
            own = config.model.latent // 2
            modalities = MODALITIES.get(config.data.name)
            if modalities is None:
                raise ValueError(f"mmvae+ needs the number of modalities of {config.data.name!r}: known are "
                                 f"{sorted(MODALITIES)}")  # fmt: skip
            model = dataclasses.replace(model, latent=config.model.latent - own + modalities * own, private=own)
        return _with(vae(config).replace(model=model), objective=objective)

    change.__doc__ = f"The baseline {objective} on the same networks."
    return change


# How many modalities a data set has, for the size of MMVAE+'s latent.
MODALITIES = {"digits": 3, "polymnist-5k": 5, "polymnist": 5}

VARIANTS: dict[str, Callable[[Config], Config]] = {
    "full": full, "paper": paper, "vae": vae, "abp": abp, "ebm": ebm, "coopnets": coopnets, "coop-vae": coop_vae,
    "frozen": frozen,
    "paper+elbo": paper_elbo, "paper+prior": paper_prior, "paper+shuffled": paper_shuffled, "paper+hard": paper_hard,
    **{f"start={name}": data_start(name)
       for name in ("noise", "data+noise", "buffer", "independent", "shuffled", "aggregated")},
    **{f"latent={name}": latent_start(name) for name in ("product", "mixture_of_products", "prior", "persistent")},
    **{name: baseline(name) for name in ("mvae", "mmvae", "mopoe", "mvtcae", "mmvae+")},
}  # fmt: skip

GRIDS: dict[str, tuple[str, ...]] = {
    "components": ("vae", "abp", "ebm", "coopnets", "coop-vae", "frozen", "paper", "full"),
    "levers": ("paper", "paper+elbo", "paper+prior", "paper+shuffled", "paper+hard", "start=aggregated", "full"),
    "starts": ("paper", *(name for name in VARIANTS if name.startswith(("start=", "latent=")))),
    "baselines": ("mvae", "mmvae", "mopoe", "mvtcae", "mmvae+"),
}
GRIDS["study"] = (*GRIDS["components"], *GRIDS["baselines"])


def variant(config: Config, name: str) -> Config:
    """``config`` as the variant ``name`` changes it; the preset's name then ends in ``/name``.

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    if name not in VARIANTS:
        raise ValueError(f"variant must be one of {sorted(VARIANTS)}, got {name!r}")
    return VARIANTS[name](config).replace(preset=f"{config.preset}/{name}")
