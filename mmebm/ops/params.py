"""The constants of one Langevin step for one tensor of the state: what every backend's ``langevin_step`` takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, Union

from torch import Tensor

NoiseAt = Literal["after", "before"]
NormOver = Literal["chain", "tensor"]
Outside = Literal["clamp", "reject"]
# what a functional op takes: one for all tensors, or one per tensor
Constant: TypeAlias = Union[float, Tensor, "Sequence[float | Tensor | None]"]


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


def per_tensor(name: str, value: Constant | None, tensors: int) -> list[float | Tensor | None]:
    """``value`` for each tensor: one for all, or a list with one for each."""
    values: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value] * tensors
    if len(values) != tensors:
        raise ValueError(f"{name} must be one value or a list of {tensors}, one per tensor, got {len(values)}")
    for i, v in enumerate(values):
        if v is None or isinstance(v, Tensor):
            continue
        if isinstance(v, bool) or not isinstance(v, (int, float)):
            raise TypeError(f"{name}[{i}] must be a number or a tensor, got {type(v).__name__}")
        if v != v:
            raise ValueError(f"{name}[{i}] must be a number, got nan")
        values[i] = float(v)
    return values
