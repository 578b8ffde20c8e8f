"""The compiled rooms of ``langevin_step`` as steppers: C++ and CUDA C++. Addresses and sizes go to :mod:`mmebm.native`.

The extensions believe what they are told, so everything is checked here: a wrong address is a crash, and no input may
crash the process.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Final

import torch
from torch import Tensor

from mmebm import native, noise
from mmebm.ops import dispatch
from mmebm.ops.common.address import (
    MOST_CHAINS,
    address,
    known_addresses,
    obstacle,
    plain,
    readable,
    require_dense,
    same_memory,
    step_addresses,
)
from mmebm.ops.params import FIELDS, StepOptions, StepParams, StepStats, per_chain_or_single

__all__ = ["CppStepper", "CudaStepper", "cpp_reason", "cuda_reason"]

_LIMITS: Final = frozenset(("grad_clip", "grad_norm_clip", "max_update", "low", "high"))
_STORAGE: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# How a constant is given: Kind in csrc/include/mmebm/langevin.h
_ABSENT, _SCALAR, _CHAIN, _ELEMENT, _ONE = range(5)
# Chains shorter than this get a constant per element instead of one per chain, so that C++ need not stop at each.
_SHORT_CHAIN: Final = 16


def _state_reason(x: Sequence[Tensor], options: StepOptions, device: str) -> str | None:
    """``None`` if the compiled rooms take this state on devices of this type, else the reason why not."""
    if options.rng != "philox":
        return f"rng={options.rng!r} is torch's own stream of numbers"
    if len(x) == 0:
        return "the state has no tensor"
    for i, t in enumerate(x):
        if t.device.type != device or t.device != x[0].device:
            return f"tensor {i} of the state is on {t.device}"
        if t.dtype not in _STORAGE:
            return f"tensor {i} of the state is {t.dtype}; taken are float32, bfloat16 and float16"
        reason = obstacle(t)
        if reason is not None:
            return f"tensor {i} of the state is {reason}"
        if t.dim() == 0 or t.shape[0] != x[0].shape[0]:
            return f"tensor {i} of the state has shape {tuple(t.shape)}; taken is ({tuple(x[0].shape)[:1]}, ...)"
        if t.shape[0] > MOST_CHAINS:
            return f"tensor {i} of the state has {t.shape[0]} chains; the noise tells 2^32 apart"
        if math.prod(t.shape[1:]) > 1 << 33:
            return f"tensor {i} of the state has more than 2^33 elements per chain"
    return None


def cpp_reason(x: Sequence[Tensor], options: StepOptions) -> str | None:
    """``None`` if :class:`CppStepper` takes this state, else the reason why not."""
    reason = _state_reason(x, options, "cpu")
    if reason is not None:
        return reason
    available, reason = native.available("cpp")
    return None if available else reason


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
    reason = _state_reason(x, options, "cuda") or constants_reason(x, params or ())
    if reason is not None:
        return reason
    available, reason = native.available("cuda")
    if not available:
        return reason
    major, minor = torch.cuda.get_device_capability(x[0].device)
    return f"compute capability {major}.{minor} is below 8.0" if major < 8 else None


def _version(t: Tensor) -> int | None:
    """How often ``t`` was written to; ``None`` where torch does not count."""
    return None if t.is_inference() else t._version


def _stats(chains: int, device: torch.device) -> tuple[StepStats, list[int]]:
    """Statistics to be filled, and the addresses of the four."""
    norms = torch.empty((2, chains), dtype=torch.float32, device=device)
    counts = torch.empty((2, chains), dtype=torch.int64, device=device)
    out = StepStats(*norms.unbind(), *counts.unbind())
    return out, [
        address("a statistic", t, device, t.dtype)
        for t in (out.grad_norm, out.displacement, out.clipped, out.nonfinite)
    ]


class _NativeStepper:
    """What the compiled rooms share: constants, masks and tensors, checked once and again when they change.

    ``_op`` is the extension's object, which the subclass makes. A constant is handed over as a number or as the address
    of float32 numbers; a copy that this needs is made again when the original was written to.
    """

    inplace = True

    def __init__(self, op: Any, options: StepOptions, x: Sequence[Tensor]) -> None:
        self._op = op
        self.options = options
        self._device = x[0].device
        # A state that is not contiguous must not be taken for one that was seen: a step makes a copy of it.
        self._x = [t if t.is_contiguous() and not t.is_neg() else t.detach().contiguous() for t in x]
        self._shapes = [t.shape for t in x]
        self._dtypes = [t.dtype for t in x]
        self._grad_dtypes = list(self._dtypes)
        self._grad_sizes = [t.nbytes for t in x]
        self._masks = [self._mask(i, t) for i, t in enumerate(x)]
        for index in options.streams:
            noise.stream(index)  # raises where it is out of range
        self._params: list[StepParams | None] = [None] * len(x)
        self._values: list[list[object]] = [[None] * len(FIELDS) for _ in x]
        self._alive: dict[tuple[int, int], Tensor] = {}
        self._copied: dict[tuple[int, int], tuple[Tensor, int | None]] = {}

    def _mask_shape(self, mask: Tensor, x: Tensor) -> tuple[int, ...]:
        """The shape that a mask is expanded to."""
        return tuple(x.shape)

    def _mask(self, i: int, x: Tensor) -> Tensor | None:
        mask = self.options.observed[i] if self.options.observed else None
        if mask is None:
            return None
        if mask.dtype != torch.bool or mask.device != self._device:
            raise ValueError(
                f"observed[{i}] must be a bool mask on {self._device} as the state is, "
                f"got {mask.dtype} on {mask.device}"
            )
        mask = readable(f"observed[{i}]", mask, self._device, (torch.bool,))
        try:
            return mask.expand(self._mask_shape(mask, x)).contiguous()
        except RuntimeError:
            shapes = f"{tuple(mask.shape)} does not broadcast against {tuple(x.shape)}"
            raise ValueError(f"observed[{i}] of shape {shapes}") from None

    def _mask_address(self, i: int) -> int:
        mask = self._masks[i]
        return 0 if mask is None else address(f"observed[{i}]", mask, self._device, torch.bool)

    # -- constants

    def _kind(self, i: int, slot: int, given: Tensor) -> tuple[int, Tensor]:
        """How a constant's tensor is handed over, and the tensor laid out for that."""
        raise NotImplementedError

    def _check(self, i: int, slot: int, value: Tensor) -> None:
        """Raise for values that the room cannot take."""

    def _set(self, i: int, slot: int, value: float | Tensor | None) -> None:
        """Hand over one constant of tensor ``i``."""
        if isinstance(value, Tensor):
            self._set_tensor(i, slot, value)
            return
        if value is None:
            self._op.set(i, slot, _ABSENT, 0.0, 0)
        elif value != value and FIELDS[slot] in _LIMITS:
            raise ValueError(f"{FIELDS[slot]} of tensor {i} must not be NaN")
        else:
            self._op.set(i, slot, _SCALAR, value, 0)
        self._alive.pop((i, slot), None)
        self._copied.pop((i, slot), None)

    def _set_tensor(self, i: int, slot: int, given: Tensor) -> None:
        name = FIELDS[slot]
        if given.device != self._device:
            raise ValueError(f"{name} of tensor {i} must be on {self._device} as the state is, got {given.device}")
        try:
            kind, value = self._kind(i, slot, plain(f"{name} of tensor {i}", given))
        except RuntimeError:
            shapes = f"{tuple(given.shape)} does not broadcast against {tuple(self._shapes[i])}"
            raise ValueError(f"{name} of tensor {i} has shape {shapes}") from None
        value = value.detach().to(torch.float32).resolve_neg().contiguous()
        self._check(i, slot, value)
        if kind == _SCALAR:
            self._op.set(i, slot, kind, float(value), 0)
        else:
            self._op.set(i, slot, kind, 0.0, address(f"{name} of tensor {i}", value, self._device, torch.float32))
        self._alive[i, slot] = value
        if kind == _SCALAR or not same_memory(value, given):
            self._copied[i, slot] = given, _version(given)
        else:
            self._copied.pop((i, slot), None)

    def _stale(self, value: Tensor, version: int | None) -> bool:
        """Whether the copy of a constant may differ from what it was made of."""
        return version is None or value._version != version

    def _constants(self, params: Sequence[StepParams]) -> None:
        """Hand over what differs from the last step."""
        for i, p in enumerate(params):
            if p is self._params[i]:
                continue
            known = self._values[i]
            for slot, name in enumerate(FIELDS):
                value = getattr(p, name)
                if value is not known[slot]:
                    self._set(i, slot, value)
                    known[slot] = value
            self._params[i] = p
        if self._copied:
            for (i, slot), (value, version) in list(self._copied.items()):
                if self._stale(value, version):
                    self._set(i, slot, value)

    # -- tensors

    def _state(self, x: list[Tensor]) -> list[Tensor]:
        """``x``, with a contiguous copy of a tensor that is not what this stepper was made for."""
        out = list(x)
        for i, t in enumerate(x):
            if t.shape != self._shapes[i] or t.dtype != self._dtypes[i] or t.device != self._device:
                raise ValueError(
                    f"x[{i}] must be {tuple(self._shapes[i])}, {self._dtypes[i]} on {self._device} as it was when the "
                    f"stepper was made, got {tuple(t.shape)}, {t.dtype} on {t.device}"
                )
            out[i] = readable(f"x[{i}]", t, self._device, (t.dtype,)) if t is not self._x[i] else t
        self._x = out
        return out

    def _gradient(self, i: int, g: Tensor) -> Tensor:
        """``g``, made contiguous and of a dtype that the extension takes."""
        require_dense(f"grad[{i}]", g)
        if g.shape != self._shapes[i] or g.device != self._device:
            shape = tuple(self._shapes[i])
            raise ValueError(
                f"grad[{i}] must be {shape} on {self._device} as x[{i}] is, got {tuple(g.shape)} on {g.device}"
            )
        g = readable(f"grad[{i}]", g, self._device, (g.dtype,))
        if g.dtype not in _STORAGE:
            g = g.to(torch.float32)
        if g.dtype != self._grad_dtypes[i]:
            self._op.set_grad(i, _STORAGE[g.dtype])
            self._grad_dtypes[i], self._grad_sizes[i] = g.dtype, g.nbytes
        return g

    def _prepare(self, x: list[Tensor], params: Sequence[StepParams]) -> list[Tensor]:
        """Take in what is not as it was in the last step; the state's tensors as the extension needs them."""
        if len(x) != len(self._shapes) or len(params) != len(self._shapes):
            raise ValueError(f"x and params must have {len(self._shapes)} entries, got {len(x)} and {len(params)}")
        if not all(map(operator.is_, x, self._x)):
            x = self._state(x)
        self._constants(params)
        return x


class CppStepper(_NativeStepper):
    """The update in C++: all tensors in one call a step, in place, by :file:`csrc/cpu/langevin_step_kernel.h`.

    The instruction set is the best this processor has; ``MMEBM_CPU_ISA`` = ``baseline``, ``avx2`` or ``avx512`` asks
    for another. Results do not depend on the number of threads (``torch.get_num_threads()``), and ``avx2`` and
    ``avx512`` agree bit for bit.

    Constants that are numbers or one per chain are read as they are; any other tensor that broadcasts is expanded once,
    and again when it was written to. Writing to the state does not raise its autograd version.
    """

    name = "cpp"

    def __init__(self, options: StepOptions, x: Sequence[Tensor]) -> None:
        reason = cpp_reason(x, options)
        if reason is not None:
            raise native.BackendError(f"cpp: {reason}")
        op = native.cpu().LangevinStep(
            x[0].shape[0], options.chain_offset & noise.MASK32, options.outside == "reject", options.clamp_noise,
            options.norm_over == "tensor", dispatch.isa(),
        )  # fmt: skip
        super().__init__(op, options, x)
        self._plain_seed = not isinstance(options.seed, Tensor)
        self._seed = options.seed & (1 << 64) - 1 if self._plain_seed else options.seed
        self._large = sum(t.numel() for t in x) >= 1 << 14
        for i, (t, index, noisy) in enumerate(zip(x, options.streams, options.noisy, strict=True)):
            op.add(math.prod(t.shape[1:]), index, noisy, _STORAGE[t.dtype], self._mask_address(i))

    def _kind(self, i: int, slot: int, given: Tensor) -> tuple[int, Tensor]:
        shape = self._shapes[i]
        if given.numel() == 1 and given.dim() <= len(shape):
            return _SCALAR, given
        chains, numel = shape[0], math.prod(shape[1:])
        if given.dim() == len(shape) and given.shape[0] == chains == given.numel() and numel >= _SHORT_CHAIN:
            return _CHAIN, given
        return _ELEMENT, given.expand(shape)

    def _check(self, i: int, slot: int, value: Tensor) -> None:
        # a clamp whose limit is NaN is NaN in torch, and no limit at all in the processor's min and max
        if FIELDS[slot] in _LIMITS and bool(value.isnan().any()):
            raise ValueError(f"{FIELDS[slot]} of tensor {i} must not hold NaN")

    def _words(self, step: int | Tensor) -> tuple[int, int]:
        return int(self._seed) & (1 << 64) - 1, int(step) & noise.MASK32

    def perturb(self, x: list[Tensor], params: Sequence[StepParams], step: int | Tensor) -> list[Tensor]:
        x = self._prepare(x, params)
        threads = torch.get_num_threads() if self._large else 1
        self._op.perturb(known_addresses(x), *self._words(step), threads)
        return x

    def step(
        self, x: list[Tensor], grad: Sequence[Tensor], params: Sequence[StepParams], step: int | Tensor, *,
        with_noise: bool, stats: bool,
    ) -> tuple[list[Tensor], StepStats | None]:  # fmt: skip
        # A step over a few thousand elements takes 3 us in C++: this function counts. What is as it was in the last
        # step needs no look; a gradient is a new tensor each time.
        known, settled = self._x, self._params
        if len(x) != len(known) or len(grad) != len(known) or len(params) != len(known):
            counts = f"got {len(x)}, {len(grad)} and {len(params)}"
            raise ValueError(f"x, grad and params must have {len(known)} entries, {counts}")
        found = step_addresses(
            x, grad, params, known, settled, self._grad_dtypes, self._shapes, self._grad_sizes
        )  # fmt: skip
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
        out, places_out = _stats(x[0].shape[0], self._device)
        self._op.step_stats(places, gradients, seed, word, with_noise, threads, *places_out)
        return x, out


class CudaStepper(_NativeStepper):
    """The update in CUDA C++: all tensors in one launch a step, in place, by :file:`csrc/cuda/langevin_step.cu`.

    Runs on the current stream of the state's device, never waits for it, and may be captured in a graph: what a graph
    then reads (the state, the gradients, constants and masks, tensors of seed and step) must live as long as it does.

    Constants are numbers, or float32 tensors with one element or one per chain, which the kernel reads as they are at
    that moment; a tensor of another dtype or layout is copied, and again when it was written to and in every capture.
    """

    name = "cuda"

    def __init__(self, options: StepOptions, x: Sequence[Tensor]) -> None:
        self._require(options, x)
        op = native.cuda().LangevinStep(
            x[0].shape[0], options.chain_offset & noise.MASK32, options.outside == "reject", options.clamp_noise,
            options.norm_over == "tensor",
        )  # fmt: skip
        super().__init__(op, options, x)
        self._seed = self._number("seed", options.seed)
        for i, (t, index, noisy, mask) in enumerate(zip(x, options.streams, options.noisy, self._masks, strict=True)):
            rows = mask is not None and mask.shape[0] > 1
            op.add(math.prod(t.shape[1:]), index, noisy, _STORAGE[t.dtype], self._mask_address(i), rows)

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
        return _ONE if given.numel() == 1 else _CHAIN, given

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

    def _call(self, function: str, *arguments: Any) -> None:
        """One function of the extension on the current stream."""
        index = self._device.index
        guard = nullcontext() if index == torch.cuda.current_device() else torch.cuda.device(index)
        with guard:
            queue = torch.cuda.current_stream(index).cuda_stream
            code = getattr(self._op, function)(*arguments, index, queue)
        native.check_cuda(code, f"langevin_step ({function})")

    @staticmethod
    def _written(x: Sequence[Tensor]) -> None:
        # the kernel writes behind autograd's back: a graph that saved the old state must still be able to notice
        for t in x:
            if not t.is_inference():
                torch.autograd.graph.increment_version(t)

    def perturb(self, x: list[Tensor], params: Sequence[StepParams], step: int | Tensor) -> list[Tensor]:
        x = self._prepare(x, params)
        word, place, _alive = self._number("step", step)
        self._call("perturb", known_addresses(x), *self._seed[:2], word, place)
        self._written(x)
        return x

    def step(
        self, x: list[Tensor], grad: Sequence[Tensor], params: Sequence[StepParams], step: int | Tensor, *,
        with_noise: bool, stats: bool,
    ) -> tuple[list[Tensor], StepStats | None]:  # fmt: skip
        x = self._prepare(x, params)
        if len(grad) != len(x):
            raise ValueError(f"x, grad and params must have {len(x)} entries, got {len(x)}, {len(grad)}, {len(params)}")
        gradients = [self._gradient(i, g) for i, g in enumerate(grad)]
        word, place, _alive = self._number("step", step)
        size = self._op.scratch_bytes(stats)
        scratch = torch.empty(size, dtype=torch.uint8, device=self._device) if size else None
        found, places = _stats(x[0].shape[0], self._device) if stats else (None, [0, 0, 0, 0])
        self._call(
            "step", known_addresses(x), known_addresses(gradients), *self._seed[:2], word, place, with_noise,
            0 if scratch is None else address("the scratch", scratch, self._device, torch.uint8), places[0], places[2],
        )  # fmt: skip
        self._written(x)
        return x, found
