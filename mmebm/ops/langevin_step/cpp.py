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
from mmebm.ops.common.params import FIELDS, StepOptions, StepParams
from mmebm.ops.langevin_step.native import CHAIN, ELEMENT, LIMITS, SCALAR, STORAGE, NativeStepper, state_reason

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
        op = native.cpu().LangevinStep(
            chains=x[0].shape[0],
            chain_offset=options.chain_offset & noise.MASK32,
            options=options.bits,
            isa=dispatch.isa(),
        )
        super().__init__(op, options, x)
        self._plain_seed = not isinstance(options.seed, Tensor)
        self._seed = options.seed & (1 << 64) - 1 if self._plain_seed else options.seed
        self._large = sum(t.numel() for t in x) >= 1 << 14
        for i, (t, index, noisy) in enumerate(zip(x, options.streams, options.noisy, strict=True)):
            channels = t.shape[1] if self._orders[i] is torch.channels_last else 1
            op.add(
                numel=math.prod(t.shape[1:]),
                index=index,
                noisy=noisy,
                storage=STORAGE[t.dtype],
                observed=self._mask_address(i),
                channels=channels,
            )
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
        self._check_counts(x=x, params=params)
        x = self._prepare(x, params)
        threads = torch.get_num_threads() if self._large else 1
        self._op.perturb(known_addresses(x), *self._words(step), threads)
        return x

    def _unchanged(
        self, x: Sequence[Tensor], grad: Sequence[Tensor], params: Sequence[StepParams]
    ) -> tuple[list[int], list[int]] | None:
        known, settled = self._x, self._params
        return step_addresses(
            x, grad, params, known, settled, self._grad_dtypes, self._shapes, self._grad_sizes, self._given
        )

    def _run(
        self, x: list[int], grad: list[int], step: int | Tensor, with_noise: bool, sums: dict[str, int] | None
    ) -> None:
        if self._plain_seed and type(step) is int:
            seed, word = self._seed, step & 0xFFFFFFFF
        else:
            seed, word = self._words(step)
        self._op.step(x, grad, seed, word, with_noise, torch.get_num_threads() if self._large else 1, sums)
