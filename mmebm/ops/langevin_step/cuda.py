"""``langevin_step`` in CUDA C++: :file:`csrc/langevin_step/cuda.cu`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from mmebm import native, noise
from mmebm.ops.common.address import address, known_addresses, readable
from mmebm.ops.common.params import FIELDS, StepOptions, StepParams, per_chain_or_single
from mmebm.ops.langevin_step.native import CHAIN, ONE, STORAGE, NativeStepper, state_reason

__all__ = ["CudaStepper", "cuda_reason"]


def constants_reason(x: Sequence[Tensor], params: Sequence[StepParams]) -> str | None:
    """``None`` if :class:`CudaStepper` takes these constants, else the reason why not."""
    for i, (t, p) in enumerate(zip(x, params, strict=False)):
        for name in FIELDS:
            value = getattr(p, name)
            if not isinstance(value, Tensor):
                continue
            if not per_chain_or_single(value, t.shape):
                return (
                    f"{name} of tensor {i} has shape {tuple(value.shape)}; taken are one element, or one per chain: "
                    f"{(t.shape[0], *[1] * (t.dim() - 1))}"
                )
            if value.device != t.device:
                return f"{name} of tensor {i} is on {value.device}, the state on {t.device}"
    return None


def cuda_reason(x: Sequence[Tensor], options: StepOptions, params: Sequence[StepParams] | None = None) -> str | None:
    """``None`` if :class:`CudaStepper` takes this state, else the reason why not."""
    reason = state_reason(x, options, "cuda") or constants_reason(x, params or ())
    if reason is not None:
        return reason
    available, reason = native.available("cuda")
    if not available:
        return reason
    major, minor = torch.cuda.get_device_capability(x[0].device)
    return f"compute capability {major}.{minor} is below 8.0" if major < 8 else None


class CudaStepper(NativeStepper):
    """The update in CUDA C++: all tensors in one launch a step, in place, by :file:`csrc/langevin_step/cuda.cu`.

    Runs on the current stream of the state's device, never waits for it, and may be captured in a graph: what a graph
    then reads (the state, the gradients, constants and masks, tensors of seed and step) must live as long as it does.

    Constants are numbers, or float32 tensors with one element or one per chain, which the kernel reads as they are at
    that moment; a tensor of another dtype or layout is copied, and again when it was written to and in every capture.
    """

    name = "cuda"

    def __init__(self, options: StepOptions, x: Sequence[Tensor]) -> None:
        self._require(options, x)
        op = native.cuda().LangevinStep(
            chains=x[0].shape[0], chain_offset=options.chain_offset & noise.MASK32, options=options.bits
        )
        super().__init__(op, options, x)
        self._seed = self._number("seed", options.seed)
        for i, (t, index, noisy, mask) in enumerate(zip(x, options.streams, options.noisy, self._masks, strict=True)):
            rows = mask is not None and mask.shape[0] > 1
            op.add(
                numel=math.prod(t.shape[1:]),
                index=index,
                noisy=noisy,
                storage=STORAGE[t.dtype],
                observed=self._mask_address(i),
                observed_rows=rows,
            )

    def _require(self, options: StepOptions, x: Sequence[Tensor]) -> None:
        reason = cuda_reason(x, options)
        if reason is not None:
            raise native.BackendError(f"cuda: {reason}")
        with torch.cuda.device(x[0].device):
            native.check_cuda(native.cuda().prepare_langevin_step(x[0].device.index), "loading langevin_step")

    def _mask_shape(self, mask: Tensor, x: Tensor) -> tuple[int, ...]:
        # no row per chain where the mask is the same for all
        rows = mask.dim() == x.dim() and mask.shape[0] > 1
        return tuple(x.shape) if rows else (1, *x.shape[1:])

    def _kind(self, i: int, slot: int, given: Tensor) -> tuple[int, Tensor]:
        shape = self._shapes[i]
        if not per_chain_or_single(given, shape):
            raise ValueError(
                f"{FIELDS[slot]} of tensor {i} has shape {tuple(given.shape)}; taken are one element, or one per "
                f"chain: {(shape[0], *[1] * (len(shape) - 1))}"
            )
        return ONE if given.numel() == 1 else CHAIN, given

    def _stale(self, value: Tensor, version: int | None) -> bool:
        # what a graph replays must make the copy again, from what the original holds then
        return super()._stale(value, version) or (value.is_cuda and torch.cuda.is_current_stream_capturing())

    def _number(self, name: str, value: int | Tensor) -> tuple[int, int, Tensor | None]:
        """(value, address, what must live meanwhile): an int itself, a tensor on the state's device by its address."""
        if not isinstance(value, Tensor):
            return int(value) & (1 << 64) - 1, 0, None
        if value.numel() != 1 or value.dtype.is_floating_point or value.dtype.is_complex:
            raise ValueError(f"{name} must be an int or 1-element int tensor, got {tuple(value.shape)} {value.dtype}")
        if value.device != self._device:
            if value.device.type != "cpu":
                raise ValueError(f"{name} must be on {self._device}, got {value.device}")
            return int(value) & (1 << 64) - 1, 0, None
        value = readable(name, value.to(torch.int64), self._device, (torch.int64,))
        return 0, address(name, value, self._device, torch.int64), value

    def _call(self, function: str, **arguments: Any) -> None:
        """One function of the extension on the current stream."""
        index = self._device.index
        guard = nullcontext() if index == torch.cuda.current_device() else torch.cuda.device(index)
        with guard:
            queue = torch.cuda.current_stream(index).cuda_stream
            code = getattr(self._op, function)(**arguments, device=index, cuda_stream=queue)
        native.check_cuda(code, f"langevin_step ({function})")

    @staticmethod
    def _written(x: Sequence[Tensor]) -> None:
        # the kernel writes behind autograd's back: a graph that saved the old state must still be able to notice
        for t in x:
            if not t.is_inference():
                torch.autograd.graph.increment_version(t)

    def perturb(self, x: list[Tensor], params: Sequence[StepParams], step: int | Tensor) -> list[Tensor]:
        self._check_counts(x=x, params=params)
        x = self._prepare(x, params)
        word, place, _alive = self._number("step", step)
        seed, seed_at, _ = self._seed
        self._call("perturb", x=known_addresses(x), seed=seed, seed_at=seed_at, step=word, step_at=place)
        self._written(x)
        return x

    def _run(
        self, x: list[int], grad: list[int], step: int | Tensor, with_noise: bool, sums: dict[str, int] | None
    ) -> None:
        word, place, _alive = self._number("step", step)
        seed, seed_at, _ = self._seed
        size = self._op.scratch_bytes(sums is not None)
        scratch = torch.empty(size, dtype=torch.uint8, device=self._device) if size else None
        self._call(
            "step",
            x=x,
            grad=grad,
            seed=seed,
            seed_at=seed_at,
            step=word,
            step_at=place,
            noise=with_noise,
            scratch=0 if scratch is None else address("the scratch", scratch, self._device, torch.uint8),
            # two of each, one after the other
            floats=0 if sums is None else sums["grad_norm"],
            counts=0 if sums is None else sums["clipped"],
        )
        self._written(self._x)
