"""The configuration of a run: plain data, one file per preset, stored with the results."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from mmebm.choices import Activation, FittedTo, Joint, Metric, Net, PriorKind
from mmebm.training.settings import (
    Count,
    Decay,
    Positive,
    Range,
    Settings,
    Share,
    Size,
    Weight,
    checked,
    hints,
    kind_of,
    parse,
)

# Where the data chain starts, and the latent chain (mmebm.training.starts says what each is); also "unimodal:NAME".
DataStart = Literal["generator", "noise", "data+noise", "buffer", "independent", "shuffled", "aggregated"]
DATA_STARTS: tuple[str, ...] = get_args(DataStart)
LATENT_STARTS = (
    "inference",
    "mixture",
    "product",
    "product_without_prior",
    "mixture_of_products",
    "prior",
    "persistent",
)
NETWORKS = ("generator", "inference", "energy", "prior")
# Who learns in a stage that does not say.
TAUGHT: dict[str, tuple[str, ...]] = {
    "warmup": ("generator", "inference"),
    "prior": ("prior",),
    "matching": ("energy",),
    "joint": ("generator", "inference", "energy", "prior"),
}


@dataclass(frozen=True)
class DataConfig(Settings):
    """Which data set (:func:`mmebm.data.load`) and its options.

    ``name``: one of its names, or the import path of a builder, "package.module:function". ``missing``: the probability
    with which a training tuple loses each of its modalities; it keeps at least one. ``workers``: processes that read
    the batches of a set that is not in memory, ahead of their turn; 0 is a thread of the training process. The batches
    and their order are the same with any number. ``ahead``: batches that wait, of each worker.
    """

    name: str = "digits"
    seed: Count = 0
    path: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    missing: Decay = 0.0
    workers: Count = 0
    ahead: Size = 2


@dataclass(frozen=True)
class NetworkConfig(Settings):
    """A network of your own: the import path of its class, "package.module:Class", and arguments for it."""

    path: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        module, _, name = self.path.partition(":")
        if not module or not name:
            raise ValueError(f"path must be 'package.module:Class', got {self.path!r}")


@dataclass(frozen=True)
class ModelConfig(Settings):
    """The three networks.

    ``latent``: size of z, "auto" by the number of elements of a tuple (:func:`fitted`); ``private``: of it, what each
    modality has to itself (the baseline MMVAE+; 0 in the paper's method, where all modalities share the whole z).
    ``sigma``: scale of the generator's likelihood in units of [-1, 1]; ``weights``: weight of a modality in it, 1 where
    left out, "auto" more for small modalities (:func:`fitted`); ``spectral``: spectral norm on the energy, multiplied
    by ``energy_scale``; ``encoders``, ``decoders``, ``energy`` and ``prior``: networks of your own
    (docs/your-model.md).
    """

    latent: Size | Literal["auto"] = 16
    net: Net = "mlp"
    activation: Activation = "silu"
    generator_width: Size = 256
    inference_width: Size = 256
    energy_width: Size = 256
    energy_trunk_width: Size = 16
    energy_features: Size = 128
    depth: Count = 2
    sigma: Positive = 0.5
    likelihood: Literal["gaussian", "laplace"] = "gaussian"
    weights: dict[str, Weight] | Literal["auto"] = field(default_factory=dict)
    inference: Joint = "mixture"
    private: Count = 0
    spectral: bool = False
    energy_scale: Positive = 1.0
    encoders: dict[str, str | NetworkConfig] = field(default_factory=dict)
    decoders: dict[str, str | NetworkConfig] = field(default_factory=dict)
    energy: str | NetworkConfig | None = None
    prior: str | NetworkConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        named: dict[str, Any] = {"energy": self.energy, "prior": self.prior}
        for kind, networks in (("encoders", self.encoders), ("decoders", self.decoders)):
            named.update(
                {f"{kind}.{name}": path for name, path in networks.items()} if isinstance(networks, dict) else {}
            )
        for name, path in named.items():
            if isinstance(path, str):
                try:
                    NetworkConfig(path)
                except ValueError as error:
                    raise ValueError(str(error).replace("path must", f"{name} must")) from None

    @property
    def latent_size(self) -> int:
        """``latent`` where it is a number.

        Raises:
            ValueError: for "auto", which depends on the data.
        """
        if not isinstance(self.latent, int):
            raise ValueError("model.latent is 'auto', which depends on the data: give it as a number")
        return self.latent


@dataclass(frozen=True)
class ChainConfig(Settings):
    """One Langevin chain: x <- x - (s^2/2) dE/dx + noise xi.

    The step ``s`` is given by ``step`` or by ``travel`` = steps s^2, each a number or one per modality; or as ``step =
    "auto"``: ``auto_fraction`` of the largest stable one, measured on a batch every ``auto_every`` iterations. The
    chains of a batch differ in their limits; "auto" takes the quantile ``auto_quantile`` of them. The very worst chain
    (0) is often four times stiffer than all but a few, and then nothing moves; outputs bounded by tanh keep those few
    finite.
    ``noise=None`` ties the noise to the step (temperature 1). ``clamp`` keeps the chain in [-1, 1].
    ``anneal``: the noise of the first step in multiples of the last one's, which it falls to in equal ratios (simulated
    annealing); ``metropolis``: each step is a proposal that is accepted or not (MALA), for chains without ``clamp``.
    ``sample_steps``: steps, of the same size, when a run draws or completes samples (None: ``steps``).
    """

    steps: Count = 30
    sample_steps: Count | None = None
    step: Positive | dict[str, Positive] | Literal["auto"] | None = None
    travel: Positive | dict[str, Positive] | None = None
    noise: Weight | None = None
    clamp: bool = False
    anneal: Positive = 1.0
    metropolis: bool = False
    auto_fraction: Positive = 0.7
    auto_quantile: Share = 0.05
    auto_every: Size = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.step is None) == (self.travel is None):
            raise ValueError(f"give step or travel, one of them; got step={self.step!r}, travel={self.travel!r}")
        if self.metropolis and self.clamp:
            raise ValueError("metropolis=True needs clamp=False: a proposal that is clamped cannot be weighed")

    def size(self) -> float | dict[str, float]:
        """``s`` where it is fixed.

        Raises:
            ValueError: for ``step="auto"``, which is measured and not known here.
        """
        if self.step == "auto":
            raise ValueError("step='auto' is measured during training and has no fixed value")
        if self.step is not None:
            return self.step
        if isinstance(self.travel, Mapping):
            return {name: math.sqrt(t / max(self.steps, 1)) for name, t in self.travel.items()}
        assert self.travel is not None
        return math.sqrt(self.travel / max(self.steps, 1))

    def for_samples(self) -> ChainConfig:
        """The chain that a run draws its samples with."""
        if self.sample_steps is None:
            return self
        step = self.size() if self.step is None else self.step
        return dataclasses.replace(self, steps=self.sample_steps, step=step, travel=None)


@dataclass(frozen=True)
class AdamConfig(Settings):
    """One network's Adam."""

    lr: Weight = 1e-3
    beta1: Decay = 0.5
    beta2: Decay = 0.999
    weight_decay: Weight = 0.0
    clip_norm: Positive | None = None


@dataclass(frozen=True)
class LossConfig(Settings):
    """Weights of the loss terms (method: Gf, Sf, If) and what the paper leaves open. A weight of 0 switches its term
    off, and a chain that no term learns from does not run.

    ``objective`` names the bound of the warm-up (:mod:`mmebm.training.objectives`), with ``objective_options`` such as
    ``{"samples": 10}`` for "mmvae", and ``beta`` weighs its divergence;
    ``elbo`` keeps that bound in the joint stage, on real tuples, ``elbo_revised`` takes it on revised ones;
    ``contrastive`` is an extension: so many times the InfoNCE between the experts' means
    (:func:`mmebm.training.objectives.contrastive`, at ``contrastive_temperature``) is taken from that bound, wherever
    the bound is used. ``inference`` is the likelihood of the mixture or its lower bound per expert; ``energy`` weighs
    the joint energy's loss and ``energy_l2`` adds that much of E(real)^2 + E(fake)^2. Against chains that run away,
    ``energy_trim`` leaves that share of a batch's revised tuples, those of the highest energies, out of the loss, and
    ``energy_clamp`` keeps the difference of the two means from falling below minus that.
    """

    generator_real: Weight = 1.0
    generator_revised: Weight = 1.0
    inference_real: Weight = 1.0
    inference_revised: Weight = 0.1
    energy: Weight = 1.0
    objective: str = "single_expert"
    objective_options: dict[str, Any] = field(default_factory=dict)
    inference: Literal["mixture", "per_expert"] = "mixture"
    beta: Weight = 1.0
    elbo: Weight = 0.0
    elbo_revised: Weight = 0.0
    contrastive: Weight = 0.0
    contrastive_temperature: Positive = 0.1
    energy_l2: Weight = 0.0
    energy_trim: Decay = 0.0
    energy_clamp: Positive | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        from mmebm.training.objectives import objective  # which needs torch, and the types of the fields do not

        if isinstance(self.objective, str) and isinstance(self.objective_options, dict):
            try:
                objective(self.objective, **self.objective_options)  # refuses an unknown name or option
            except TypeError as error:
                raise ValueError(f"objective_options do not fit: {error}") from error

    def needs_posterior(self, network: str) -> bool:
        """Whether ``network`` has a loss in the joint stage that needs the revised z of real tuples."""
        weights = {"generator": self.generator_real, "inference": self.inference_real, "prior": 1.0}
        return weights.get(network, 0.0) > 0

    def needs_revised(self, network: str, *, pairs: bool = True) -> bool:
        """Whether ``network`` has one that needs revised tuples; ``pairs``: whether there is a z that they are from."""
        weights = {"generator": self.generator_revised, "inference": self.inference_revised}
        return network in weights and (self.elbo_revised > 0 or (pairs and weights[network] > 0))

    def teaches(self, network: str) -> bool:
        """Whether ``network`` has a loss in the joint stage at all."""
        if network == "energy":
            return self.energy > 0
        bound = self.elbo > 0 and network in ("generator", "inference")
        return bound or self.needs_posterior(network) or self.needs_revised(network)


@dataclass(frozen=True)
class LatentPriorConfig(Settings):
    """Extension: a prior of z that is learned from the posterior's samples of training tuples.

    ``kind``: "energy", an energy on z, learned with short latent chains in its own stage and in the joint stage;
    "flow", learned in both too but without a chain, drawn from in ``chain.steps`` of Heun's rule
    (:class:`mmebm.models.FlowPrior`; the rest of ``chain`` and ``energy_l2`` are not for it); or "mixture",
    ``components`` Gaussians with full covariance, fitted by scikit-learn in the first iteration of each stage "prior",
    whose others do nothing, to ``samples`` such z, ``regularisation`` added to the variances. A mixture rests in the
    joint stage, is drawn from exactly, and ``width``, ``depth``, ``chain``, ``adam`` and ``energy_l2`` are not for it.
    ``posterior``: whose samples a stage "prior" learns from: "inference", q(z | X) as it is configured, or another
    joint of the same experts.

    Twice the steps of training for samples (``chain.sample_steps``) raised their coherence on PolyMNIST; many more cost
    class balance (benchmarks/study).
    """

    kind: PriorKind = "energy"
    posterior: FittedTo = "inference"
    components: Size = 30
    regularisation: Positive = 1e-3
    samples: Size = 8000
    width: Size = 128
    depth: Count = 2
    chain: ChainConfig = field(default_factory=lambda: ChainConfig(steps=60, step=0.2))
    adam: AdamConfig = field(default_factory=lambda: AdamConfig(lr=5e-4))
    energy_l2: Weight = 0.01


@dataclass(frozen=True)
class ShuffledTuplesConfig(Settings):
    """Extension: tuples whose modalities come from different rows, as extra negatives of the joint energy.

    ``kind``: "uniform", every modality from a row of its own; or "hard", some modalities from a row that the inference
    network takes for another class but finds near: the nearest ``same`` of the batch count as the same class and are
    left out, one of the next ``near`` is taken.
    """

    weight: Weight = 1.0
    kind: Literal["uniform", "hard"] = "uniform"
    same: Share = 0.2
    near: Share = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.same and 0 < self.near and self.same + self.near <= 1):
            raise ValueError(f"same and near are parts of a batch, together at most 1, got {self.same}, {self.near}")


@dataclass(frozen=True)
class StartConfig(Settings):
    """Where the chains start, in training (:mod:`mmebm.training.starts`; at test another one may be asked for).

    ``data`` is one of :data:`DATA_STARTS`, ``latent`` one of :data:`LATENT_STARTS` or "unimodal:NAME"; ``completion``
    is the joint that completions infer z from, "inference" the one that is configured. ``noise``: the standard
    deviation that "data+noise" adds; ``buffer``: chains kept by "buffer", which begin as ``fresh`` says and restart
    with probability ``reinit``.
    """

    data: DataStart = "generator"
    latent: str = "inference"
    completion: FittedTo = "inference"
    noise: Weight = 0.3
    buffer: Size = 2000
    fresh: Literal["generator", "noise"] = "generator"
    reinit: Share = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latent not in LATENT_STARTS and not str(self.latent).startswith("unimodal:"):
            raise ValueError(
                f"latent must be one of {list(LATENT_STARTS)} or 'unimodal:' and a modality, got {self.latent!r}"
            )


_RAMPS = {
    *(f"loss.{f.name}" for f in dataclasses.fields(LossConfig) if f.type == "Weight"),
    "data_chain.steps",
    "latent_chain.steps",
}


@dataclass(frozen=True)
class Stage(Settings):
    """``iterations`` of one kind of step: "warmup" (multimodal VAE), "prior" (of the latent), "matching" (the energy's
    gradient is taught the way from g(z) to X, without a chain) and "joint" (the paper).

    Learning rates go linearly from ``lr`` to ``final_lr`` times the configured ones over the stage. ``train`` names the
    networks that learn (None: all that the kind teaches); a joint stage that trains the energy alone leaves what the
    evaluation calls "frozen": the EBM on top of the VAE as it is. ``ramp`` moves other settings linearly from one value
    to another over the stage, by their names in the configuration: ``{"loss.elbo": (1, 0), "data_chain.steps":
    (5, 30)}`` (weights of ``loss``, and the steps of the two chains, rounded).

    ``seconds``: the stage ends once its iterations took so many, measured by the run's ``clock`` without validations
    and checkpoints, and rates and ramps follow that time; ``iterations`` is then how many they were, or before its end
    a guess.
    """

    kind: Literal["warmup", "prior", "matching", "joint"]
    iterations: Count
    lr: Weight = 1.0
    final_lr: Weight = 1.0
    train: tuple[str, ...] | None = None
    ramp: dict[str, tuple[float, float]] = field(default_factory=dict)
    seconds: Positive | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = sorted(set(self.train or ()) - set(NETWORKS))
        if unknown or self.train == ():
            raise ValueError(f"train must name some of {list(NETWORKS)}, or be None for all, got {self.train!r}")
        for name in self.ramp:
            if name not in _RAMPS:
                raise ValueError(f"ramp moves one of {sorted(_RAMPS)}, got {name!r}")

    def settings(self, done: float) -> dict[str, float]:
        """The ramps' values when ``done`` (0 to 1) of the stage is over."""
        return {name: a + (b - a) * done for name, (a, b) in self.ramp.items()}


@dataclass(frozen=True)
class GuardConfig(Settings):
    """When training has gone astray and what is done: back to the last good state, at most ``rollbacks`` times.

    ``max_gap``: of the energy gap in any iteration. ``max_separation``: of the gap over ``every`` iterations, in
    standard deviations of single energies, once the energy has learned for ``grace`` iterations: beyond about two the
    energy tells nearly every real tuple from every revised one, the chain cannot follow it any more, and what it
    teaches is of saturated images (0: no limit; nor is there one for chains from noise, which are far behind at first).
    """

    max_gap: Weight = 1e4
    max_separation: Weight = 2.5
    grace: Count = 200
    every: Size = 50
    rollbacks: Count = 3
    latent_alarm: Positive = 1.3


@dataclass(frozen=True)
class ValidationConfig(Settings):
    """Tuples that are kept from training, and measured on the way (docs/training-runs.md).

    ``every``: iterations between two measurements; 0: none. They are the set's validation split, at most ``rows`` of
    it. Of a set without one, ``share`` of the tuples that lack no modality is kept back, at most ``rows``, with a tuple
    all that share an item with it (none, for ``every`` 0); which ones is drawn once, by ``data.seed``, and stored with
    the run.
    """

    every: Count = 0
    share: Annotated[float, Range(0, 1, "both")] = 0.1
    rows: Annotated[int, Range(2)] = 500


@dataclass(frozen=True)
class CheckpointConfig(Settings):
    """What is saved while a run trains, beside the last state.

    ``seconds``: between two saves of the last state. ``every``: iterations between two checkpoints that are kept, with
    a picture of samples, in ``checkpoints/ITERATION``; 0: none. ``keep``: so many of them, the newest; 0: all.
    ``best``: also keep ``checkpoints/best``, where this number of the validation was best: "bound", "mse", "cross_mse",
    "retrieval" or "kernel".
    """

    seconds: Weight = 30.0
    every: Count = 0
    keep: Count = 3
    best: Metric | None = None


@dataclass(frozen=True)
class Config(Settings):
    """A run, whole. ``threads``: CPU threads (None: the cores that the process may use). ``imports``: modules that are
    imported before data, presets and networks are looked up.

    ``batch`` tuples make an iteration, of all processes together; ``accumulate`` splits each process's share into so
    many parts whose gradients are averaged (less memory; in the joint stage the generator then is updated after the
    last part, and the chains of step 7 of the earlier ones start from it as it was).

    ``ema``: the decay of an exponential moving average of all weights, once an iteration and begun anew in each stage,
    which a run then samples with (0: none). Training itself, chains included, uses the weights as they are.

    ``clock`` measures the seconds of stages that have some: "wall", or "cpu", the processor time of all the process's
    threads, which does not count what else the machine does.

    For convolutional networks: ``precision="bf16"`` runs the energies of both chains and the losses under autocast (the
    chains' states, the updates and the weights stay float32; a chain that is one fused call is not affected), and
    ``channels_last`` lays the weights out so, which the activations then follow. Neither was measured on a GPU yet.
    """

    preset: str
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data_chain: ChainConfig = field(default_factory=lambda: ChainConfig(steps=30, step=0.3, noise=0.005))
    latent_chain: ChainConfig = field(default_factory=lambda: ChainConfig(steps=10, step="auto"))
    start: StartConfig = field(default_factory=StartConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    generator: AdamConfig = field(default_factory=AdamConfig)
    inference: AdamConfig = field(default_factory=AdamConfig)
    energy: AdamConfig = field(default_factory=lambda: AdamConfig(lr=3e-4, beta1=0.0, beta2=0.9))
    stages: tuple[Stage, ...] = (Stage("warmup", 2000), Stage("joint", 2000))
    latent_prior: LatentPriorConfig | None = None
    shuffled_tuples: ShuffledTuplesConfig | None = None
    guard: GuardConfig = field(default_factory=GuardConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    batch: Size = 100
    accumulate: Size = 1
    ema: Decay = 0.0
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    backend: Literal["auto", "torch", "cpp", "triton", "cuda"] = "auto"
    threads: Size | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False
    clock: Literal["wall", "cpu"] = "wall"
    imports: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpoint.best is not None and not self.validation.every:
            raise ValueError(
                f"checkpoint.best={self.checkpoint.best!r} goes by the validation, and validation.every "
                "is 0: give it a number of iterations"
            )
        p = self.latent_prior
        if p is not None and p.kind != "energy" and self.model.prior is not None:
            raise ValueError(
                f"model.prior is a network of an energy: latent_prior.kind must be 'energy', got {p.kind!r}"
            )
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate must divide batch={self.batch}, got {self.accumulate}")
        if not isinstance(self.channels_last, bool):
            raise TypeError(f"channels_last must be True or False, got {self.channels_last!r}")

    def replace(self, **changes: Any) -> Config:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def for_samples(self) -> Config:
        """The same with the chains that a run draws its samples with."""
        prior = self.latent_prior
        return self.replace(
            data_chain=self.data_chain.for_samples(),
            latent_chain=self.latent_chain.for_samples(),
            latent_prior=prior and dataclasses.replace(prior, chain=prior.chain.for_samples()),
        )

    def to_json(self) -> str:
        """The whole configuration as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Config:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: naming every field that is unknown, or that has another type or another value than it may have.
        """
        return checked(cls, json.loads(text))

    def checked(self) -> Config:
        """The same, every field of the type that is declared for it.

        Raises:
            ValueError: naming every field that is not.
        """
        return checked(Config, self)


def fitted(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> Config:
    """``config`` with what is "auto" in ``model`` as numbers for modalities of these shapes.

    The latent has the square root of a tuple's number of elements, in eights, from 8 to 128. The weight of a modality
    is the square root of how many times more elements the largest one has: halfway between weighing all elements alike
    (a word is then not heard among images) and all modalities alike.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    model, most = config.model, max(sizes.values())
    if model.latent == "auto":
        eights = round(math.sqrt(sum(sizes.values())) / 8)
        model = dataclasses.replace(model, latent=8 * min(max(eights, 1), 16))
    if model.weights == "auto":
        weights = {name: round(math.sqrt(most / size), 3) for name, size in sizes.items()}
        model = dataclasses.replace(model, weights={name: weight for name, weight in weights.items() if weight != 1})
    elif unknown := sorted(set(model.weights) - set(shapes)):
        raise ValueError(
            f"model.weights names {unknown}, but the modalities are {list(shapes)}: set model.weights for "
            'these, or "auto"'
        )
    return config.replace(model=model)


def extended(config: Config, iterations: int) -> Config:
    """``config`` with so many iterations more, as one more stage: as the last one at its end."""
    run = [stage for stage in config.stages if stage.iterations]
    if not iterations or not run:
        return config
    last = run[-1]
    ramp = {name: (end, end) for name, (_, end) in last.ramp.items()}
    more = dataclasses.replace(last, iterations=iterations, lr=last.final_lr, ramp=ramp, seconds=None)
    return config.replace(stages=(*config.stages, more))


def override(config: Config, changes: Mapping[str, str]) -> Config:
    """``config`` with dotted fields set from text, e.g. ``{"data_chain.steps": "60", "loss.elbo": "0"}``.

    Values are JSON where they parse, or as Python writes them, else strings; a stage is addressed by its position,
    ``stages.0.iterations``; a field that is a dict itself takes new keys, ``data.options.copies`` or
    ``model.decoders.photo.path``; a part that is None, such as ``latent_prior``, begins with its defaults where a field
    of it is set.

    Raises:
        ValueError: for an unknown field, naming it and the fields there are; for a value that a field cannot have.
    """
    plain = dataclasses.asdict(config)
    for dotted, text in changes.items():
        target: Any = plain
        kind: Any = config
        *parents, last = dotted.split(".")
        for name in parents:
            if isinstance(kind, dict) and isinstance(target, dict):  # of any keys, such as model.decoders
                target.setdefault(name, {})
            below, part = _step_into(target, name, dotted), _part(kind, name)
            if below is None and dataclasses.is_dataclass(kind):
                below = target[name] = _defaults(kind_of(hints(type(kind))[name]))
            # what is not there yet takes any key, and the check of the whole says which are none
            target, kind = below, below if part is None and isinstance(below, dict) else part
        # a field that is a dict itself, such as data.options, takes keys that it does not have yet
        if not isinstance(kind, dict):
            _step_into(target, last, dotted)
        target[int(last) if isinstance(target, (list, tuple)) else last] = parse(text)
    return checked(Config, plain)


def _defaults(kind: Any) -> dict[str, Any] | None:
    """The fields of a dataclass that have defaults; None for any other type."""
    if not dataclasses.is_dataclass(kind):
        return None
    made = {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(kind)
    }
    return {
        name: dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
        for name, value in made.items()
        if value is not dataclasses.MISSING
    }


def merged(config: Config, changes: Mapping[str, Any]) -> Config:
    """``config`` with the fields of nested tables instead of its own, as a configuration file has them. What is no part
    of the configuration itself (options, weights, the list of stages) is replaced as a whole.

    Raises:
        ValueError: as :func:`override`.
    """
    return checked(Config, _merged(Config, dataclasses.asdict(config), changes))


def _merged(kind: Any, plain: dict[str, Any] | None, changes: Any) -> Any:
    kind = kind_of(kind)
    if not dataclasses.is_dataclass(kind) or not isinstance(changes, Mapping) or plain is None:
        return changes
    inner = hints(kind) if isinstance(kind, type) else {}
    return {**plain, **{key: _merged(inner.get(key), plain.get(key), value) for key, value in changes.items()}}


def _part(whole: Any, name: str) -> Any:
    """What ``whole``, a configuration or a part of one, has under ``name``."""
    if isinstance(whole, (list, tuple)):
        return whole[int(name)] if int(name) < len(whole) else None
    return whole.get(name) if isinstance(whole, dict) else getattr(whole, name, None)


def _step_into(target: Any, name: str, dotted: str) -> Any:
    if isinstance(target, dict) and name in target:
        return target[name]
    if isinstance(target, (list, tuple)) and name.isdigit() and int(name) < len(target):
        return target[int(name)]
    known = (
        sorted(target)
        if isinstance(target, dict)
        else f"positions below {len(target)}"
        if isinstance(target, (list, tuple))
        else f"the parts of {target!r}, which has none"
    )
    raise ValueError(f"unknown field {dotted!r}: {name!r} is not among {known}")
