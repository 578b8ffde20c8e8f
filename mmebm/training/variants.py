"""Named changes of a preset: what switches a part of the method off, adds one lever, or is a baseline.

``preset("demo/coopnets")`` is the preset ``demo`` as the variant ``coopnets`` changes it; ``mmebm ablate`` runs a grid
of them. Every variant has the seconds of the preset: what it does not spend on joint iterations it spends on its
warm-up and the other way round, by :data:`COSTS`. Evaluations of gradients and seconds are in each result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from mmebm.training.config import TAUGHT, ChainConfig, Config, LatentPriorConfig, ShuffledTuplesConfig, Stage, override
from mmebm.training.objectives import JOINT_OF

# What the parts of a joint iteration take, in iterations of the warm-up: the losses of generator and inference network
# on real tuples with their revised z ("posterior") and on revised tuples with theirs ("revised"); the latent chain;
# drawing from the prior and its update; one data chain; the energy's update. The warm-up's bound counts 1 where it is
# kept. And an iteration of the warm-up by a baseline's bound, 1 where it is not here, and the fit of a mixture.
# Measured on one thread each, two runs at a time on two cores.
COSTS: dict[str, dict[str, float]] = {
    "demo": {
        "posterior": 0.85,
        "revised": 0.2,
        "latent": 2.5,
        "prior": 0.8,
        "data": 1.65,
        "energy": 0.45,
        "fit": 230.0,
        "mvae": 1.8,
        "mmvae": 1.4,
        "mmvae+": 1.45,
    },
    "polymnist-14": {
        "posterior": 2.3,
        "revised": 0.4,
        "latent": 1.9,
        "prior": 0.7,
        "data": 2.05,
        "energy": 0.7,
        "fit": 170.0,
        "mvae": 2.6,
        "mmvae": 2.05,
        "mopoe": 1.1,
        "mmvae+": 2.25,
    },
    "polymnist-5k": {
        "posterior": 2.1,
        "revised": 0.85,
        "latent": 2.85,
        "prior": 0.4,
        "data": 3.15,
        "energy": 1.15,
        "fit": 60.0,
        "mvae": 3.8,
        "mmvae": 2.85,
        "mopoe": 1.05,
        "mmvae+": 2.9,
    },
}


# Hard negatives of sets with ten classes: in a batch of 100 a row and its nearest eleven count as one class
OF_TEN_CLASSES = ShuffledTuplesConfig(weight=12.0, kind="hard", same=0.12, near=0.3)


def _with(config: Config, **loss: Any) -> Config:
    return config.replace(loss=dataclasses.replace(config.loss, **loss))


def _costs(config: Config) -> dict[str, float]:
    return COSTS.get(config.preset.partition("/")[0].removesuffix("-energy-prior"), COSTS["demo"])


def cost(config: Config, stage: Stage) -> float:
    """What an iteration of ``stage`` takes, in iterations of the warm-up."""
    costs, loss = _costs(config), config.loss
    if stage.kind == "warmup":
        return costs.get(loss.objective, 1.0)
    if stage.kind == "prior":
        prior = config.latent_prior
        return costs["fit"] / max(stage.iterations, 1) if prior is not None and prior.kind == "mixture" else 1.0
    if stage.kind == "matching":
        return 1.0
    teach = [name for name in stage.train or TAUGHT["joint"] if name != "prior" or config.latent_prior is not None]
    vae = {"generator", "inference"} & set(teach)
    energy = "energy" in teach and loss.teaches("energy")
    posterior, revised = any(map(loss.needs_posterior, teach)), any(map(loss.needs_revised, teach))
    parts = {
        "posterior": any(map(loss.needs_posterior, vae)),
        "revised": bool(vae and (loss.generator_revised or loss.inference_revised)),
        "latent": posterior,
        "prior": "prior" in teach,
        "data": energy + revised,
        "energy": energy,
    }
    bounds = bool(vae) * (bool(loss.elbo) + bool(loss.elbo_revised))
    return bounds + sum(costs[name] * times for name, times in parts.items())


def budget(config: Config) -> float:
    """What all stages take together, in iterations of the warm-up."""
    return sum(stage.iterations * cost(config, stage) for stage in config.stages)


def _warmup(config: Config) -> tuple[Stage, ...]:
    return tuple(stage for stage in config.stages if stage.kind == "warmup")


def _then_joint(config: Config, plain: Config, before: tuple[Stage, ...], **changes: Any) -> Config:
    """``plain`` with the stages ``before`` and one joint stage that takes what is left of ``config``'s budget."""
    joint = [stage for stage in config.stages if stage.kind == "joint"] or [Stage("joint", 0, lr=0.5, final_lr=0.3)]
    stage = dataclasses.replace(joint[0], **{"train": None, **changes})
    left = budget(config) - sum(s.iterations * cost(plain, s) for s in before)
    stage = dataclasses.replace(stage, iterations=max(round(left / cost(plain, stage)), 0))
    return plain.replace(stages=(*before, stage))


def _plain(config: Config) -> Config:
    start = dataclasses.replace(config.start, completion="inference")
    return _with(config.replace(latent_prior=None, shuffled_tuples=None, start=start), elbo=0.0, contrastive=0.0)


def full(config: Config) -> Config:
    """The preset as it is."""
    return config


def paper(config: Config) -> Config:
    """The paper's loop alone: no ELBO kept, no latent prior, no shuffled tuples. The automatic latent step stays."""
    return _then_joint(config, _plain(config), _warmup(config))


def vae(config: Config) -> Config:
    """Generator and inference network as a multimodal VAE, no chain."""
    first = _warmup(config)[0] if _warmup(config) else Stage("warmup", 0)
    return _plain(config).replace(stages=(dataclasses.replace(first, iterations=round(budget(config))),))


def abp(config: Config) -> Config:
    """Generator and inference network with the latent chain, no energy: alternating back-propagation, short-run."""
    plain = _with(_plain(config), energy=0.0, generator_revised=0.0, inference_revised=0.0)
    return _then_joint(config, plain, _warmup(config))


def ebm(config: Config) -> Config:
    """The energy alone, its chains started from noise."""
    plain = _plain(config).replace(start=dataclasses.replace(config.start, data="noise"))
    return _then_joint(config, plain, (), lr=1.0, train=("energy",))


def coopnets(config: Config) -> Config:
    """Energy and generator teach each other; no inference network, no warm-up (Xie et al., 2018)."""
    plain = _with(_plain(config), generator_real=0.0, inference_real=0.0, inference_revised=0.0)
    return _then_joint(config, plain, (), lr=1.0)


def coop_vae(config: Config) -> Config:
    """Energy and VAE, the VAE taught by revised samples only; no warm-up (Xie et al., 2021)."""
    plain = _with(
        _plain(config),
        generator_real=0.0,
        generator_revised=0.0,
        inference_real=0.0,
        inference_revised=0.0,
        elbo_revised=1.0,
    )
    return _then_joint(config, plain, (), lr=1.0)


def frozen(config: Config) -> Config:
    """The VAE as the warm-up left it, and an energy on top of it."""
    return _then_joint(config, _plain(config), _warmup(config), train=("energy",))


def paper_elbo(config: Config) -> Config:
    """The paper's loop with the warm-up's bound kept."""
    return _then_joint(config, _with(_plain(config), elbo=1.0), _warmup(config))


def paper_prior(config: Config) -> Config:
    """The paper's loop with the latent energy prior."""
    plain = _plain(config).replace(latent_prior=config.latent_prior or LatentPriorConfig())
    return _then_joint(config, plain, (*_warmup(config), _prior_stage(config)))


def paper_contrastive(config: Config) -> Config:
    """The paper's loop with the contrastive term, which needs the bound that it is taken from in the joint stage."""
    return _then_joint(config, _contrasted(_with(_plain(config), elbo=1.0), config), _warmup(config))


def paper_shuffled(config: Config) -> Config:
    """The paper's loop with shuffled tuples as negatives."""
    return paper(config).replace(shuffled_tuples=ShuffledTuplesConfig())


def paper_hard(config: Config) -> Config:
    """The paper's loop with hard shuffled tuples as negatives, those of the preset where it has them."""
    own = config.shuffled_tuples
    hard = own if own is not None and own.kind == "hard" else OF_TEN_CLASSES
    return paper(config).replace(shuffled_tuples=hard)


def no_warmup(config: Config) -> Config:
    """The paper's loop from the first iteration on: no VAE is trained beforehand."""
    return _then_joint(config, _plain(config), (), lr=1.0)


def staged(config: Config) -> Config:
    """The VAE, then half of what is left for an energy on top of it, then all three networks together."""
    plain, before = _plain(config), _warmup(config)
    alone = Stage("joint", 0, lr=0.5, final_lr=0.3, train=("energy",))
    left = budget(config) - sum(stage.iterations * cost(plain, stage) for stage in before)
    alone = dataclasses.replace(alone, iterations=max(round(left / 2 / cost(plain, alone)), 0))
    return _then_joint(config, plain, (*before, alone))


def _contrasted(plain: Config, config: Config) -> Config:
    """``plain`` with the contrastive term of ``config``, or of the demo's weight where it has none."""
    return _with(plain, contrastive=config.loss.contrastive or 5.0)


def _prior_stage(config: Config) -> Stage:
    """The preset's first stage of the latent prior, or a fifth of its budget."""
    own = [stage for stage in config.stages if stage.kind == "prior"]
    return own[0] if own else Stage("prior", round(budget(config) / 5), final_lr=0.5)


def with_prior(name: str) -> Callable[[Config], Config]:
    """A multimodal VAE with the preset's latent prior, and no energy on data: what the prior alone is worth."""

    def change(config: Config) -> Config:
        plain = VARIANTS[name](config).replace(latent_prior=config.latent_prior or LatentPriorConfig())
        prior = _prior_stage(config)
        left = budget(config) - prior.iterations * cost(plain, prior)
        first = plain.stages[0]
        first = dataclasses.replace(first, iterations=max(round(left / cost(plain, first)), 0))
        return plain.replace(stages=(first, prior))

    change.__doc__ = f"{name!r} with the preset's latent prior, and no energy on data."
    return change


def with_contrastive(name: str) -> Callable[[Config], Config]:
    """A multimodal VAE with the contrastive term."""

    def change(config: Config) -> Config:
        return _contrasted(VARIANTS[name](config), config)

    change.__doc__ = f"{name!r} with the contrastive term between its experts."
    return change


# What `full` is made of, each with the setting that it is without it.
PARTS: dict[str, Callable[[Config], Config]] = {
    "prior": lambda config: config.replace(
        latent_prior=None, stages=tuple(stage for stage in config.stages if stage.kind != "prior")
    ),
    "contrastive": lambda config: _with(config, contrastive=0.0),
    "shuffled": lambda config: config.replace(shuffled_tuples=None),
    "elbo": lambda config: _with(config, elbo=0.0),
    "matching": lambda config: config.replace(
        stages=tuple(stage for stage in config.stages if stage.kind != "matching")
    ),
}


def full_without(part: str) -> Callable[[Config], Config]:
    """The preset without one of :data:`PARTS`, the seconds that it took given to the warm-up."""

    def change(config: Config) -> Config:
        less = PARTS[part](config)
        first, *rest = less.stages
        left = budget(config) - sum(stage.iterations * cost(less, stage) for stage in rest)
        first = dataclasses.replace(first, iterations=max(round(left / cost(less, first)), 0))
        return less.replace(stages=(first, *rest))

    change.__doc__ = f"The preset without its part {part!r}."
    return change


def independent_inference(config: Config) -> Config:
    """The paper's loop with experts that learn each for itself, none by its part of the mixture."""
    return _with(paper(config), inference="per_expert")


def from_noise(changes: Mapping[str, str] | None = None, *, steps: float = 1.0) -> Callable[[Config], Config]:
    """An energy alone whose chains get more to come from noise to the data: ``steps`` times as many, ``changes``."""
    fields = dict(changes or {})

    def change(config: Config) -> Config:
        alone, costs = ebm(config), _costs(config)
        (stage,) = alone.stages
        chain = alone.data_chain
        more = dataclasses.replace(chain, steps=round(steps * chain.steps), step=chain.size(), travel=None)
        # a longer chain takes its seconds from the number of iterations
        each = costs["data"] + costs["energy"]
        fewer = round(stage.iterations * each / (each + (steps - 1.0) * costs["data"]))
        stage = dataclasses.replace(stage, iterations=fewer)
        return override(alone.replace(data_chain=more, stages=(stage,)), fields)

    settings = ", ".join([f"{steps:g} times the steps"] * (steps != 1.0) + [f"{k}={v}" for k, v in fields.items()])
    change.__doc__ = f"An energy alone, chains from noise with {settings}."
    return change


def noise_steps(steps: int) -> Callable[[Config], Config]:
    """An energy alone, with so many steps of one size from noise (more steps take longer: iterations are alike)."""

    def change(config: Config) -> Config:
        alone = ebm(config)
        chain = dataclasses.replace(alone.data_chain, steps=steps, step=config.data_chain.size(), travel=None)
        return alone.replace(data_chain=chain)

    change.__doc__ = f"An energy alone, {steps} steps from noise, of the preset's size."
    return change


def at_beta(name: str, beta: float) -> Callable[[Config], Config]:
    """Another variant with this weight of the divergence."""

    def change(config: Config) -> Config:
        return _with(VARIANTS[name](config), beta=beta)

    change.__doc__ = f"{name!r} with beta = {beta:g}."
    return change


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


# What the lineage sets otherwise than our presets do, a field or a few at a time (docs/method.md has the table).
LINEAGE: dict[str, dict[str, str]] = {
    "weights": {"loss.generator_revised": "50"},
    "spectral": {"loss.energy_l2": "0", "model.spectral": "true", "model.energy_scale": "10"},
    "sigma": {"model.sigma": "0.3"},
    "latent": {"model.latent": "128"},
    "noise": {"data_chain.noise": "0.001"},
    "unbounded": {"data_chain.clamp": "false"},
    "activation": {"model.activation": "relu"},
    "adam": {
        "energy.lr": "1e-4",
        **{
            f"{network}.{field}": value
            for network, lr in (("generator", "3e-4"), ("inference", "1e-4"))
            for field, value in (("lr", lr), ("beta1", "0"), ("beta2", "0.9"), ("weight_decay", "5e-4"))
        },
    },
}
LINEAGE["all"] = {field: value for fields in LINEAGE.values() for field, value in fields.items()}


def as_lineage(name: str) -> Callable[[Config], Config]:
    """The paper's loop with some settings of its lineage."""
    fields = LINEAGE[name]

    def change(config: Config) -> Config:
        return override(paper(config), fields)

    change.__doc__ = f"The paper's loop with {', '.join(f'{field}={value}' for field, value in fields.items())}."
    return change


def baseline(objective: str) -> Callable[[Config], Config]:
    """A published multimodal VAE on the same networks."""

    def change(config: Config) -> Config:
        model = dataclasses.replace(config.model, inference=JOINT_OF[objective] or config.model.inference)
        if objective == "mmvae+":
            # as many latents for each decoder as before, half of them its own
            own = config.model.latent_size // 2
            modalities = config.data.options.get("modalities", MODALITIES.get(config.data.name))
            if modalities is None:
                raise ValueError(
                    f"mmvae+ needs the number of modalities of {config.data.name!r}: known are {sorted(MODALITIES)}"
                )
            model = dataclasses.replace(model, latent=config.model.latent_size - own + modalities * own, private=own)
        plain = _with(vae(config).replace(model=model), objective=objective)
        stage = plain.stages[0]
        each = cost(plain, stage)
        return plain.replace(stages=(dataclasses.replace(stage, iterations=round(stage.iterations / each)),))

    change.__doc__ = f"The baseline {objective} on the same networks."
    return change


# How many modalities a data set has, for the size of MMVAE+'s latent.
MODALITIES = {
    "digits": 3,
    "polymnist-5k": 5,
    "polymnist": 5,
    "polyfashion": 5,
    "mnist-svhn-text": 3,
    "mnist-svhn": 2,
    "cub": 2,
    "coco": 2,
}

BASELINES = ("mvae", "mmvae", "mopoe", "mvtcae", "mmvae+")
LATENT_ONLY = ("vae", *BASELINES)  # no energy on data

VARIANTS: dict[str, Callable[[Config], Config]] = {
    "full": full,
    "paper": paper,
    "vae": vae,
    "abp": abp,
    "ebm": ebm,
    "coopnets": coopnets,
    "coop-vae": coop_vae,
    "frozen": frozen,
    "no-warmup": no_warmup,
    "staged": staged,
    "independent-inference": independent_inference,
    **{f"noise={steps}": noise_steps(steps) for steps in (10, 30, 60, 100)},
    "ebm+long": from_noise(steps=3.0),
    "ebm+travel": from_noise({"data_chain.step": "1.0"}),
    "ebm+annealed": from_noise({"data_chain.anneal": "40"}, steps=3.0),
    "ebm+buffer": from_noise({"start.data": "buffer", "start.fresh": "noise"}),
    "ebm+buffer+annealed": from_noise({"start.data": "buffer", "start.fresh": "noise", "data_chain.anneal": "40"}),
    "ebm+metropolis": from_noise({"data_chain.metropolis": "true", "data_chain.clamp": "false"}),
    "paper+elbo": paper_elbo,
    "paper+prior": paper_prior,
    "paper+shuffled": paper_shuffled,
    "paper+hard": paper_hard,
    **{
        f"start={name}": data_start(name)
        for name in ("noise", "data+noise", "buffer", "independent", "shuffled", "aggregated")
    },
    **{f"latent={name}": latent_start(name) for name in ("product", "mixture_of_products", "prior", "persistent")},
    "paper+contrastive": paper_contrastive,
    **{f"full-{part}": full_without(part) for part in PARTS},
    **{name: baseline(name) for name in BASELINES},
    **{f"lineage={name}": as_lineage(name) for name in LINEAGE},
}
VARIANTS |= {f"{name}+prior": with_prior(name) for name in LATENT_ONLY}
VARIANTS |= {
    f"{name}+contrastive": with_contrastive(name)
    for name in list(VARIANTS)
    if name.removesuffix("+prior") in LATENT_ONLY
}

# Three points a model on the plane of coherence and distance, as multimodal VAEs are compared.
BETAS = (1.0, 2.5, 5.0)
SWEPT = ("vae", "mmvae", "mopoe", "mvtcae", "paper", "full")
VARIANTS |= {f"{name}@beta={beta:g}": at_beta(name, beta) for name in SWEPT for beta in BETAS}

GRIDS: dict[str, tuple[str, ...]] = {
    "components": ("vae", "abp", "ebm", "coopnets", "coop-vae", "frozen", "paper", "full"),
    "levers": (
        "paper",
        "paper+elbo",
        "paper+contrastive",
        "paper+prior",
        "paper+shuffled",
        "paper+hard",
        "start=aggregated",
        *(f"full-{part}" for part in PARTS),
        "full",
    ),
    "starts": ("paper", *(name for name in VARIANTS if name.startswith(("start=", "latent=")))),
    "baselines": BASELINES,
    # what the data-space revision adds beyond a learned prior, with and without the contrastive term
    "priors": (
        *(f"{name}{more}" for name in LATENT_ONLY for more in ("", "+prior", "+contrastive", "+prior+contrastive")),
        "full",
    ),
}
# What a referee asks: does the result hang on the warm-up, on stages, on the prior; and the paper's figures 1, 2 and 3.
GRIDS |= {
    "circularity": ("paper", "no-warmup", "coopnets"),
    "staging": ("frozen", "staged", "paper"),
    "revision": ("vae", "vae+prior", "frozen", "paper", "paper+prior", "full"),
    "betas": tuple(name for name in VARIANTS if "@" in name),
    "generators": ("paper", "start=independent"),
    "noise": tuple(name for name in VARIANTS if name.startswith("noise=")),
    "from-noise": ("ebm", *(name for name in VARIANTS if name.startswith("ebm+")), "frozen"),
    "inference": ("paper", "independent-inference"),
    "lineage": ("paper", *(f"lineage={name}" for name in LINEAGE)),
}
GRIDS["study"] = (*GRIDS["components"], *GRIDS["baselines"])


def scaled(config: Config, factor: float) -> Config:
    """``config`` with ``factor`` times the iterations in every stage.

    Raises:
        ValueError: for a factor that is not positive.
    """
    if not factor > 0:
        raise ValueError(f"factor must be positive, got {factor!r}")
    return config.replace(
        stages=tuple(
            dataclasses.replace(stage, iterations=max(round(factor * stage.iterations), 1)) for stage in config.stages
        )
    )


def without_data(config: Config) -> Config:
    """``config`` without what belongs to its own data set: the set's options and path, and what is said of modalities
    by their names."""

    def plain(chain: ChainConfig) -> ChainConfig:
        by_name = [name for name in ("step", "travel") if isinstance(getattr(chain, name), dict)]
        return dataclasses.replace(chain, step=0.3, travel=None) if by_name else chain

    return config.replace(
        data=dataclasses.replace(config.data, options={}, path=None),
        model=dataclasses.replace(config.model, weights="auto", encoders={}, decoders={}),
        data_chain=plain(config.data_chain),
    )


def variant(config: Config, name: str) -> Config:
    """``config`` as the variant ``name`` changes it; the preset's name then ends in ``/name``.

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    if name not in VARIANTS:
        raise ValueError(f"variant must be one of {sorted(VARIANTS)}, got {name!r}")
    return VARIANTS[name](config).replace(preset=f"{config.preset}/{name}")
