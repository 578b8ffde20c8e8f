"""What every backend's ``langevin_step`` takes: the constants of a step, and what stays the same along a chain."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, TypeAlias, Union

import torch
from torch import Tensor

from mmebm.ops.common.address import require_dense
from mmebm.ops.common.untyped import TORCH
from mmebm.state import integer

NoiseAt = Literal["after", "before"]
NormOver = Literal["chain", "tensor"]
Outside = Literal["clamp", "reject"]
Rng = Literal["philox", "torch"]
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


FIELDS: Final = tuple(field.name for field in fields(StepParams))
# What a field that is absent says, so that a backend need not ask: these change nothing, NaN included where a backend
# clamps by comparisons. (The norm clip is asked for: infinity over an infinite norm is no 1.)
NEUTRAL: Final = {
    "step_size": 0.0,
    "noise_scale": 0.0,
    "grad_clip": math.inf,
    "grad_norm_clip": math.inf,
    "max_update": math.inf,
    "prior_std": math.inf,
    "low": -math.inf,
    "high": math.inf,
}


class StepNumbers(Sequence[float]):
    """A number for each step, as a float64 vector on the CPU; an entry is a float."""

    def __init__(self, vector: Tensor) -> None:
        self.vector = vector
        self._list: Any = None

    def __len__(self) -> int:
        return self.vector.shape[0]

    def __getitem__(self, k: Any) -> Any:
        if self._list is None:
            self._list = TORCH.Tensor.tolist(self.vector)
        return self._list[k]


def varies(column: Any) -> bool:
    """Whether a column of :class:`StepRows` has a constant for each step."""
    return type(column) in (list, StepNumbers)  # isinstance of a Sequence runs Python


class StepRows(Sequence[list[StepParams]]):
    """The constants of every tensor, one row for all steps or one per step, kept by columns.

    A row is made when it is asked for: a long chain in one call needs the columns only.

    Attributes:
        columns: per tensor a mapping from field to its constant, or to a list or :class:`StepNumbers` of one per step.
    """

    def __init__(self, columns: Sequence[dict[str, Any]], steps: int) -> None:
        self.columns: list[dict[str, Any]] = list(columns)
        self._varies: bool = any(varies(column) for each in columns for column in each.values())
        self._length = steps if self._varies else 1
        self._only: list[StepParams] = []  # the row of constants that are the same at all steps

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, k: Any) -> Any:
        if isinstance(k, slice):
            return [self[i] for i in range(*k.indices(self._length))]
        if not -self._length <= k < self._length:
            raise IndexError(f"row {k} of {self._length}")
        if not self._varies:
            self._only = self._only or [StepParams(**column) for column in self.columns]
            return list(self._only)
        return [StepParams(**{name: c[k] if varies(c) else c for name, c in column.items()}) for column in self.columns]

    def still(self, moving: Sequence[bool]) -> StepRows:
        """With the constants of no step at all for tensors that do not move."""
        none: dict[str, Any] = {**dict.fromkeys(FIELDS), "step_size": 0.0, "noise_scale": 0.0}
        columns = [column if moves else none for column, moves in zip(self.columns, moving, strict=True)]
        return StepRows(columns, self._length)

    def map(self, function: Callable[[str, Any], Any]) -> StepRows:
        """``function(field, value)`` of every constant."""

        def mapped(name: str, column: Any) -> Any:
            return [function(name, value) for value in column] if varies(column) else function(name, column)

        return StepRows([{name: mapped(name, c) for name, c in each.items()} for each in self.columns], self._length)


def per_chain_or_single(value: Tensor, shape: Sequence[int]) -> bool:
    """Whether a constant of a tensor (chains, ...) is one number or one per chain: what backends on a GPU take."""
    if value.numel() == 1:
        return value.dim() <= len(shape)
    return value.dim() == len(shape) and value.shape[0] == shape[0] == value.numel()


@dataclass(frozen=True, slots=True)
class StepOptions:
    """What stays the same along one chain.

    Attributes:
        seed: the key of the noise, an int or a 1-element int64 tensor on the state's device.
        streams: the tensor index of each tensor in the noise's stream word (its position in the whole state).
        chain_offset: global index of the first chain.
        norm_over, outside, clamp_noise, score: see :func:`mmebm.ops.langevin_step.reference.langevin_step`.
        noisy: per tensor whether it gets noise at all (False: its scale is the constant 0).
        observed: per tensor ``None`` or a boolean mask of the elements that keep their value.
        rng: "philox" (this library's noise) or "torch" (``torch.randn`` per tensor in state order).
        generator: the generator of ``rng="torch"``; ``None`` is torch's global one.
    """

    seed: int | Tensor
    streams: tuple[int, ...]
    noisy: tuple[bool, ...]
    chain_offset: int = 0
    norm_over: NormOver = "chain"
    outside: Outside = "clamp"
    clamp_noise: bool = False
    score: bool = False
    observed: tuple[Tensor | None, ...] = ()
    rng: Rng = "philox"
    generator: torch.Generator | None = None

    @property
    def bits(self) -> int:
        """The switches in one word, as C++ and CUDA take them (``Option`` in :file:`csrc/common/langevin.h`)."""
        return sum(
            on << i
            for i, on in enumerate((self.outside == "reject", self.clamp_noise, self.norm_over == "tensor", self.score))
        )


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


def word64(name: str, value: Any) -> Any:
    """A seed or step of 64 bits as a schema's signed int; a tensor is torch's to convert."""
    if isinstance(value, Tensor):
        return value
    number = integer(name, value, -(2**63), 2**64)
    return number - 2**64 if number >= 2**63 else number


def per_tensor(name: str, value: Constant | None, tensors: int, like: Tensor) -> list[float | Tensor | None]:
    """``value`` for each tensor: one for all, or a list with one for each; ``like``: a tensor of the state."""
    values: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value] * tensors
    if len(values) != tensors:
        raise ValueError(f"{name} must be one value or a list of {tensors}, one per tensor, got {len(values)}")
    for i, v in enumerate(values):
        if v is None:
            continue
        if isinstance(v, Tensor):
            require_dense(f"{name}[{i}]", v, like)
            if v.is_complex() or v.dtype == torch.bool:
                raise TypeError(f"{name}[{i}] must hold real numbers, got a tensor of {v.dtype}")
            continue
        if isinstance(v, bool) or not isinstance(v, (int, float)):
            raise TypeError(f"{name}[{i}] must be a number or a tensor, got {type(v).__name__}")
        if v != v:
            raise ValueError(f"{name}[{i}] must be a number, got nan")
        values[i] = float(v)
    return values
