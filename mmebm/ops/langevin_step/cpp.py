"""``langevin_step`` in C++: :file:`csrc/langevin_step`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from mmebm import native, noise
from mmebm.ops import dispatch
from mmebm.ops.common.address import known_addresses, step_addresses
from mmebm.ops.common.params import FIELDS, StepOptions, StepParams, StepStats
from mmebm.ops.langevin_step.native import (
    CHAIN,
    ELEMENT,
    LIMITS,
    SCALAR,
    STORAGE,
    NativeStepper,
    state_reason,
    stats_and_addresses,
)

__all__ = ["CppStepper", "cpp_reason"]

# Chains shorter than this get a constant per element instead of one per chain, so that C++ need not stop at each.
_SHORT_CHAIN: Final = 16


def cpp_reason(x: Sequence[Tensor], options: StepOptions) -> str | None:
    """``None`` if :class:`CppStepper` takes this state, else the reason why not."""
    reason = state_reason(x, options, "cpu")
    if reason is not None:
        return reason
    available, reason = native.available("cpp")
    return None if available else reason


class CppStepper(NativeStepper):
    """The update in C++: all tensors in one call a step, in place, by :file:`csrc/langevin_step/cpu_kernel.cpp`.

    The instruction set is the best this processor has; ``MMEBM_CPU_ISA`` = ``baseline``, ``avx2`` or ``avx512`` asks
    for another. Results do not depend on the number of threads (``torch.get_num_threads()``), and ``avx2`` and
    ``avx512`` agree bit for bit.

    Constants that are numbers or one per chain are read as they are; any other tensor that broadcasts is expanded once,
    and again when it was written to. A float32 state in channels_last keeps that order, and is read and written as it
    is, unless it can be rejected. Writing to the state does not raise its autograd version.
    """

    name = "cpp"

    def __init__(self, options: StepOptions, x: Sequence[Tensor]) -> None:
        reason = cpp_reason(x, options)
        if reason is not None:
            raise native.BackendError(f"cpp: {reason}")
        op = native.cpu().LangevinStep(x[0].shape[0], options.chain_offset & noise.MASK32, options.bits, dispatch.isa())
        super().__init__(op, options, x)
        self._plain_seed = not isinstance(options.seed, Tensor)
        self._seed = options.seed & (1 << 64) - 1 if self._plain_seed else options.seed
        self._large = sum(t.numel() for t in x) >= 1 << 14
        for i, (t, index, noisy) in enumerate(zip(x, options.streams, options.noisy, strict=True)):
            channels = t.shape[1] if self._orders[i] is torch.channels_last else 1
            op.add(math.prod(t.shape[1:]), index, noisy, STORAGE[t.dtype], self._mask_address(i), channels)
        row_major = all(order is torch.contiguous_format for order in self._orders)
        self._given = None if row_major else self._orders

    def _order(self, x: Tensor) -> torch.memory_format:
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        taken = last and x.dtype is torch.float32 and self.options.outside != "reject"
        return torch.channels_last if taken else torch.contiguous_format

    def _kind(self, i: int, slot: int, given: Tensor) -> tuple[int, Tensor]:
        shape = self._shapes[i]
        if given.numel() == 1 and given.dim() <= len(shape):
            return SCALAR, given
        chains, numel = shape[0], math.prod(shape[1:])
        if given.dim() == len(shape) and given.shape[0] == chains == given.numel() and numel >= _SHORT_CHAIN:
            return CHAIN, given
        return ELEMENT, given.expand(shape)

    def _check(self, i: int, slot: int, value: Tensor) -> None:
        # a clamp whose limit is NaN is NaN in torch, and no limit at all in the processor's min and max
        if FIELDS[slot] in LIMITS and bool(value.isnan().any()):
            raise ValueError(f"{FIELDS[slot]} of tensor {i} must not hold NaN")

    def _words(self, step: int | Tensor) -> tuple[int, int]:
        return int(self._seed) & (1 << 64) - 1, int(step) & noise.MASK32

    def perturb(self, x: list[Tensor], params: Sequence[StepParams], step: int | Tensor) -> list[Tensor]:
        x = self._prepare(x, params)
        threads = torch.get_num_threads() if self._large else 1
        self._op.perturb(known_addresses(x), *self._words(step), threads)
        return x

    def step(
        self,
        x: list[Tensor],
        grad: Sequence[Tensor],
        params: Sequence[StepParams],
        step: int | Tensor,
        *,
        with_noise: bool,
        stats: bool,
    ) -> tuple[list[Tensor], StepStats | None]:
        # A step over a few thousand elements takes 3 us in C++: this function counts. What is as it was in the last
        # step needs no look; a gradient is a new tensor each time.
        known, settled = self._x, self._params
        if len(x) != len(known) or len(grad) != len(known) or len(params) != len(known):
            counts = f"got {len(x)}, {len(grad)} and {len(params)}"
            raise ValueError(f"x, grad and params must have {len(known)} entries, {counts}")
        found = step_addresses(
            x, grad, params, known, settled, self._grad_dtypes, self._shapes, self._grad_sizes, self._given
        )
        if found is None or self._copied:
            x = self._prepare(x, params)
            # what was copied must live until C++ has read it
            grad = [self._gradient(i, g) for i, g in enumerate(grad)]
            found = known_addresses(x), known_addresses(grad)
        places, gradients = found
        if self._plain_seed and type(step) is int:
            seed, word = self._seed, step & 0xFFFFFFFF
        else:
            seed, word = self._words(step)
        threads = torch.get_num_threads() if self._large else 1
        if not stats:
            self._op.step(places, gradients, seed, word, with_noise, threads)
            return x, None
        out, places_out = stats_and_addresses(x[0].shape[0], self._device)
        self._op.step_stats(places, gradients, seed, word, with_noise, threads, *places_out)
        return x, out
