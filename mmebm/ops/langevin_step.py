"""``langevin_step``: one update of all tensors of the state, with its noise. Validation and the choice of a backend.

A chain prepares a :class:`Stepper` once and calls it at every step; what does not change along the chain (seed, streams,
masks, pointers) is resolved at construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from mmebm import noise
from mmebm.ops.params import NormOver, Outside, StepParams, StepStats
from mmebm.reference import langevin_step as reference

__all__ = ["StepOptions", "Stepper", "TorchStepper", "stepper"]

Rng = Literal["philox", "torch"]


@dataclass(frozen=True, slots=True)
class StepOptions:
    """What stays the same along one chain.

    Attributes:
        seed: the key of the noise, an int or a 1-element int64 tensor on the state's device.
        streams: the tensor index of each tensor in the noise's stream word (its position in the whole state).
        chain_offset: global index of the first chain.
        norm_over, outside, clamp_noise: see :func:`mmebm.reference.langevin_step.langevin_step`.
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
    observed: tuple[Tensor | None, ...] = ()
    rng: Rng = "philox"
    generator: torch.Generator | None = None


class Stepper(Protocol):
    """One backend's step. Methods may overwrite ``x`` and return it: the caller goes on with what is returned."""

    name: str
    inplace: bool

    def perturb(self, x: list[Tensor], params: Sequence[StepParams], step: int | Tensor) -> list[Tensor]:
        """``x + noise_scale xi`` (``noise_at="before"``)."""
        ...

    def step(
        self, x: list[Tensor], grad: Sequence[Tensor], params: Sequence[StepParams], step: int | Tensor, *,
        with_noise: bool, stats: bool,
    ) -> tuple[list[Tensor], StepStats | None]:  # fmt: skip
        """The whole update; ``with_noise=False`` where the noise was added before the gradient."""
        ...


class TorchStepper:
    """The reference as a backend: any device, any floating dtype."""

    name = "torch"
    inplace = False

    def __init__(self, options: StepOptions) -> None:
        self.options = options

    def _noise(self, x: Sequence[Tensor], step: int | Tensor) -> list[Tensor | None]:
        o = self.options
        out: list[Tensor | None] = []
        for xi, index, noisy in zip(x, o.streams, o.noisy, strict=True):
            dtype = reference.widen(xi[:0]).dtype
            if not noisy:
                out.append(None)
            elif o.rng == "torch":
                # randn in the tensor's own dtype: the draw a hand-written loop makes
                draw = torch.randn(xi.shape, dtype=xi.dtype, device=xi.device, generator=o.generator)
                out.append(draw.to(dtype))
            else:
                out.append(noise.normal(
                    xi.shape, seed=o.seed, step=step, stream=noise.stream(index, noise.DRIFT),
                    chain_offset=o.chain_offset, dtype=dtype, device=xi.device,
                ))  # fmt: skip
        return out

    def _thresholds(self, x: Sequence[Tensor], step: int | Tensor, purpose: int) -> list[Tensor | None]:
        o = self.options
        if o.rng == "torch":
            # a ported script rounds to nearest
            return [None] * len(x)
        return [
            noise.rounding_fraction(
                xi.shape, seed=o.seed, step=step, stream=noise.stream(index, purpose), chain_offset=o.chain_offset,
                device=xi.device,
            )
            if xi.dtype in (torch.float16, torch.bfloat16)
            else None
            for xi, index in zip(x, o.streams, strict=True)
        ]  # fmt: skip

    def perturb(self, x: list[Tensor], params: Sequence[StepParams], step: int | Tensor) -> list[Tensor]:
        return reference.perturb(
            x, self._noise(x, step), params, clamp_noise=self.options.clamp_noise, observed=self.options.observed,
            thresholds=self._thresholds(x, step, noise.PERTURB_ROUNDING),
        )  # fmt: skip

    def step(
        self, x: list[Tensor], grad: Sequence[Tensor], params: Sequence[StepParams], step: int | Tensor, *,
        with_noise: bool, stats: bool,
    ) -> tuple[list[Tensor], StepStats | None]:  # fmt: skip
        drawn = self._noise(x, step) if with_noise else [None] * len(x)
        return reference.langevin_step(
            x, grad, drawn, params, norm_over=self.options.norm_over, outside=self.options.outside,
            observed=self.options.observed, thresholds=self._thresholds(x, step, noise.ROUNDING), stats=stats,
        )  # fmt: skip


def stepper(backend: str, x: Sequence[Tensor], options: StepOptions) -> tuple[Stepper, str]:
    """The stepper of ``backend`` for the state ``x``, and the reason for the choice.

    Raises:
        ValueError: for an unknown backend.
        BackendError: where an explicit ``backend`` cannot take this state.
    """
    if backend in ("auto", "torch"):
        return TorchStepper(options), "the reference"
    raise ValueError(f"backend must be 'auto' or 'torch', got {backend!r}")
