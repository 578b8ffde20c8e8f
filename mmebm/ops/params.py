"""The constants of one Langevin step for one tensor of the state: what every backend's ``langevin_step`` takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

NoiseAt = Literal["after", "before"]
NormOver = Literal["chain", "tensor"]
Outside = Literal["clamp", "reject"]


@dataclass(frozen=True, slots=True)
class StepParams:
    """One tensor's constants at one step. A value is a float, or a tensor that broadcasts against the state."""

    step_size: float | Tensor
    noise_scale: float | Tensor
    grad_clip: float | Tensor | None = None
    grad_norm_clip: float | Tensor | None = None
    max_update: float | Tensor | None = None
    prior_std: float | Tensor | None = None
    low: float | Tensor | None = None
    high: float | Tensor | None = None


@dataclass(slots=True)
class StepStats:
    """What one step did, per chain and over all tensors of the state. Each tensor has shape (chains,).

    ``grad_norm`` is the l2 norm of the energy's gradient before clips and prior, ``displacement`` that of ``y - x``,
    ``clipped`` counts the elements whose gradient or update a clip changed, ``nonfinite`` the inf and NaN in ``y``.
    """

    grad_norm: Tensor
    displacement: Tensor
    clipped: Tensor
    nonfinite: Tensor
