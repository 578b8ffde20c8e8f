"""The configuration of a run: plain data, one file per preset, stored with the results."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class DataConfig:
    """Which data set (:func:`mmebm.data.load`) and its options."""

    name: str = "digits"
    seed: int = 0
    path: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelConfig:
    """The three networks.

    ``sigma``: scale of the generator's likelihood in units of [-1, 1]; ``weights``: weight of a modality in it;
    ``spectral``: spectral norm on the energy, multiplied by ``energy_scale``.
    """

    latent: int = 16
    net: Literal["mlp", "conv"] = "mlp"
    activation: str = "silu"
    generator_width: int = 256
    inference_width: int = 256
    energy_width: int = 256
    energy_trunk_width: int = 16
    energy_features: int = 128
    depth: int = 2
    sigma: float = 0.5
    likelihood: Literal["gaussian", "laplace"] = "gaussian"
    weights: dict[str, float] = field(default_factory=dict)
    inference: Literal["mixture", "product", "mixture_of_products"] = "mixture"
    spectral: bool = False
    energy_scale: float = 1.0


@dataclass(frozen=True)
class ChainConfig:
    """One Langevin chain: x <- x - (s^2/2) dE/dx + noise xi.

    The step ``s`` is given by ``step`` (a number, or "auto": ``auto_fraction`` of the largest stable one, measured on a
    batch every ``auto_every`` iterations), or by ``travel`` = steps s^2, a number or one per modality. The chains of a
    batch differ in their limits; "auto" takes the quantile ``auto_quantile`` of them. The very worst chain (0) is often
    four times stiffer than all but a few, and then nothing moves; outputs bounded by tanh keep those few finite.
    ``noise=None`` ties the noise to the step (temperature 1). ``clamp`` keeps the chain in [-1, 1].
    """

    steps: int = 30
    step: float | Literal["auto"] | None = None
    travel: float | dict[str, float] | None = None
    noise: float | None = None
    clamp: bool = False
    auto_fraction: float = 0.7
    auto_quantile: float = 0.05
    auto_every: int = 100

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps must be at least 0, got {self.steps}")
        if (self.step is None) == (self.travel is None):
            raise ValueError(f"give step or travel, one of them; got step={self.step!r}, travel={self.travel!r}")

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


@dataclass(frozen=True)
class AdamConfig:
    """One network's Adam."""

    lr: float = 1e-3
    beta1: float = 0.5
    beta2: float = 0.999
    weight_decay: float = 0.0
    clip_norm: float | None = None


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms (method: Gf, Sf, If) and what the paper leaves open.

    ``elbo`` keeps the warm-up's bound in the joint stage; ``inference`` is the likelihood of the mixture or its lower
    bound per expert; ``energy_l2`` adds that much of E(real)^2 + E(fake)^2.
    """

    generator_real: float = 1.0
    generator_revised: float = 1.0
    inference_real: float = 1.0
    inference_revised: float = 0.1
    inference: Literal["mixture", "per_expert"] = "mixture"
    beta: float = 1.0
    elbo: float = 0.0
    energy_l2: float = 0.0


@dataclass(frozen=True)
class LatentPriorConfig:
    """Extension: an energy on z, learned with short latent chains in its own stage and in the joint stage."""

    width: int = 128
    depth: int = 2
    chain: ChainConfig = field(default_factory=lambda: ChainConfig(steps=60, step=0.2))
    adam: AdamConfig = field(default_factory=lambda: AdamConfig(lr=5e-4))
    energy_l2: float = 0.01


@dataclass(frozen=True)
class ShuffledTuplesConfig:
    """Extension: tuples whose modalities come from different rows, as extra negatives of the joint energy."""

    weight: float = 1.0


@dataclass(frozen=True)
class Stage:
    """``iterations`` of one kind of step: "warmup" (multimodal VAE), "prior" (latent energy), "joint" (the paper).

    Learning rates go linearly from ``lr`` to ``final_lr`` times the configured ones over the stage.
    """

    kind: Literal["warmup", "prior", "joint"]
    iterations: int
    lr: float = 1.0
    final_lr: float = 1.0


@dataclass(frozen=True)
class GuardConfig:
    """When training has gone astray and what is done: back to the last good state, at most ``rollbacks`` times."""

    max_gap: float = 1e4
    every: int = 50
    rollbacks: int = 3
    latent_alarm: float = 1.3


@dataclass(frozen=True)
class Config:
    """A run, whole. ``threads``: CPU threads (None: torch's own choice).

    For convolutional networks: ``precision="bf16"`` runs the energies of both chains and the losses under autocast (the
    chains' states, the updates and the weights stay float32; a chain that is one fused call is not affected), and
    ``channels_last`` lays the weights out so, which the activations then follow. Neither was measured on a GPU yet.
    """

    preset: str
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data_chain: ChainConfig = field(default_factory=lambda: ChainConfig(steps=30, step=0.3, noise=0.005))
    latent_chain: ChainConfig = field(default_factory=lambda: ChainConfig(steps=10, step="auto"))
    loss: LossConfig = field(default_factory=LossConfig)
    generator: AdamConfig = field(default_factory=AdamConfig)
    inference: AdamConfig = field(default_factory=AdamConfig)
    energy: AdamConfig = field(default_factory=lambda: AdamConfig(lr=3e-4, beta1=0.0, beta2=0.9))
    stages: tuple[Stage, ...] = (Stage("warmup", 2000), Stage("joint", 2000))
    latent_prior: LatentPriorConfig | None = None
    shuffled_tuples: ShuffledTuplesConfig | None = None
    guard: GuardConfig = field(default_factory=GuardConfig)
    batch: int = 100
    seed: int = 0
    backend: str = "auto"
    threads: int | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be 'fp32' or 'bf16', got {self.precision!r}")
        if not isinstance(self.channels_last, bool):
            raise TypeError(f"channels_last must be True or False, got {self.channels_last!r}")

    def replace(self, **changes: Any) -> Config:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """The whole configuration as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Config:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: for an unknown field, naming it.
        """
        return _build(cls, json.loads(text))


def _build(kind: Any, value: Any) -> Any:
    """Rebuilds nested dataclasses from plain data, following the annotations."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        nested = [option for option in typing.get_args(kind) if dataclasses.is_dataclass(option)]
        return _build(nested[0], value) if nested and isinstance(value, dict) else value
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        unknown = sorted(set(value) - set(hints))
        if unknown:
            raise ValueError(f"unknown fields {unknown} in {getattr(kind, '__name__', kind)}; known: {sorted(hints)}")
        return typing.cast(Any, kind)(**{name: _build(hints[name], item) for name, item in value.items()})
    if typing.get_origin(kind) is tuple:
        return tuple(_build(typing.get_args(kind)[0], item) for item in value)
    return value


def override(config: Config, changes: Mapping[str, str]) -> Config:
    """``config`` with dotted fields set from text, e.g. ``{"data_chain.steps": "60", "loss.elbo": "0"}``.

    Values are JSON where they parse, else as strings; a stage is addressed by its position, ``stages.0.iterations``.

    Raises:
        ValueError: for an unknown field, naming it and the fields there are.
    """
    plain = dataclasses.asdict(config)
    for dotted, text in changes.items():
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        target: Any = plain
        *parents, last = dotted.split(".")
        for name in parents:
            target = _step_into(target, name, dotted)
        _step_into(target, last, dotted)
        target[int(last) if isinstance(target, (list, tuple)) else last] = value
    return _build(Config, plain)


def _step_into(target: Any, name: str, dotted: str) -> Any:
    if isinstance(target, dict) and name in target:
        return target[name]
    if isinstance(target, (list, tuple)) and name.isdigit() and int(name) < len(target):
        return target[int(name)]
    known = sorted(target) if isinstance(target, dict) else f"positions below {len(target or ())}"
    raise ValueError(f"unknown field {dotted!r}: {name!r} is not among {known}")
