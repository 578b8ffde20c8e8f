"""The options of the samplers as keywords: what ``replace``, presets and other functions that hand them on take.

The types are those of the dataclasses, where each option is described.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, SupportsFloat, TypeAlias, TypedDict, Union

from torch import Tensor

from mmebm.ops.common.params import NormOver, Outside, Rng
from mmebm.ops.langevin_mlp import Precision
from mmebm.samplers.samples import NonFinite
from mmebm.samplers.user_modules import Mode

# A number, a tensor that broadcasts, a function of the step, or a mapping from the state's keys to such.
Setting: TypeAlias = Union[SupportsFloat, "Callable[[int], Any]", "Mapping[Any, Any]"]
# (low, high), either of which may be None, or a mapping to such pairs.
Bounds: TypeAlias = Union["Sequence[Setting | None]", "Mapping[Any, Any]"]
# A function of one tensor, or a mapping from the state's keys to such.
Project: TypeAlias = Union["Callable[[Tensor], Tensor]", "Mapping[Any, Callable[[Tensor], Tensor] | None]"]


class LangevinKeywords(TypedDict, total=False):
    """Of :class:`mmebm.Langevin`, but for step size, noise scale, temperature and test."""

    noise_at: Literal["after", "before"]
    clamp_noise: bool
    grad_clip: Setting | None
    grad_norm_clip: Setting | None
    norm_over: NormOver
    max_update: Setting | None
    prior_std: Setting | None
    bounds: Bounds | None
    bounds_at: Literal["step", "end"]
    outside: Outside
    project: Project | None
    finish: Callable[[Any], Any] | None
    log_prob: bool
    score: bool
    mode: Mode
    rng: Rng
    backend: str
    precision: Precision
    capture: Literal["auto", True, False]
    on_nonfinite: NonFinite


class LangevinOptions(LangevinKeywords, total=False):
    """Of :class:`mmebm.Langevin`."""

    step_size: Setting
    noise_scale: Setting | None
    temperature: Setting
    accept: Literal["descent", "metropolis"] | None


class HMCOptions(TypedDict, total=False):
    """Of :class:`mmebm.HMC`."""

    step_size: Setting
    leapfrog_steps: int
    mass: Setting
    temperature: Setting
    adapt: int
    target_accept: float
    adapt_over: Literal["chain", "all"]
    log_prob: bool
    mode: Mode
    on_nonfinite: NonFinite


class UnderdampedOptions(TypedDict, total=False):
    """Of :class:`mmebm.Underdamped`."""

    step_size: Setting
    friction: Setting
    temperature: Setting
    mass: Setting
    log_prob: bool
    score: bool
    mode: Mode
    on_nonfinite: NonFinite


class TemperingOptions(TypedDict, total=False):
    """Of :class:`mmebm.ParallelTempering`."""

    step_size: SupportsFloat | Sequence[float] | Mapping[Any, Any]
    temperatures: Sequence[float]
    swap_every: int
    accept: Literal["metropolis"] | None
    log_prob: bool
    mode: Mode
    on_nonfinite: NonFinite
