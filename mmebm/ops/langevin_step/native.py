"""What ``langevin_step`` in C++ and in CUDA C++ share: from tensors and constants to addresses and numbers.

The extensions believe what they are told, so everything is checked here: a wrong address is a crash, and no input may
crash the process.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from mmebm import noise
from mmebm.ops.common.address import (
    MOST_CHAINS,
    address,
    known_addresses,
    obstacle,
    plain,
    readable,
    require_dense,
    same_memory,
)
from mmebm.ops.common.params import FIELDS, StepOptions, StepParams, StepStats

LIMITS: Final = frozenset(("grad_clip", "grad_norm_clip", "max_update", "low", "high"))
STORAGE: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# How a constant is given: Kind in csrc/common/langevin.h
ABSENT, SCALAR, CHAIN, ELEMENT, ONE = range(5)


def state_reason(x: Sequence[Tensor], options: StepOptions, device: str) -> str | None:
    """``None`` if the compiled rooms take this state on devices of this type, else the reason why not."""
    if options.rng != "philox":
        return f"rng={options.rng!r} is torch's own stream of numbers"
    if len(x) == 0:
        return "the state has no tensor"
    for i, t in enumerate(x):
        if t.device.type != device or t.device != x[0].device:
            return f"tensor {i} of the state is on {t.device}"
        if t.dtype not in STORAGE:
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


def _version(t: Tensor) -> int | None:
    """How often ``t`` was written to; ``None`` where torch does not count."""
    return None if t.is_inference() else t._version


def stats_and_addresses(chains: int, device: torch.device) -> tuple[StepStats, dict[str, int]]:
    """Statistics to be filled, and the address of each."""
    norms = torch.empty((2, chains), dtype=torch.float32, device=device)
    counts = torch.empty((2, chains), dtype=torch.int64, device=device)
    out = StepStats(*norms.unbind(), *counts.unbind())
    each = [(name, getattr(out, name)) for name in StepStats.__slots__]
    return out, {name: address(name, t, device, t.dtype) for name, t in each}


class NativeStepper:
    """What the compiled rooms share: constants, masks and tensors, checked once and again when they change.

    ``_op`` is the extension's object, which the subclass makes. A constant is handed over as a number or as the address
    of float32 numbers; a copy that this needs is made again when the original was written to.
    """

    inplace = True

    def __init__(self, op: Any, options: StepOptions, x: Sequence[Tensor]) -> None:
        self._op = op
        self.options = options
        self._device = x[0].device
        self._orders = [self._order(t) for t in x]
        # A state that is not dense must not be taken for one that was seen: a step makes a copy of it.
        self._x = [
            t if t.is_contiguous(memory_format=order) and not t.is_neg() else t.detach().contiguous(memory_format=order)
            for t, order in zip(x, self._orders, strict=True)
        ]
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

    def _order(self, x: Tensor) -> torch.memory_format:
        """The order of elements in memory in which the state and its gradients are taken."""
        return torch.contiguous_format

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
            self._hand_over(i, slot, ABSENT)
        elif value != value and FIELDS[slot] in LIMITS:
            raise ValueError(f"{FIELDS[slot]} of tensor {i} must not be NaN")
        else:
            self._hand_over(i, slot, SCALAR, value)
        self._alive.pop((i, slot), None)
        self._copied.pop((i, slot), None)

    def _hand_over(self, i: int, slot: int, kind: int, value: float = 0.0, values: int = 0) -> None:
        self._op.set(tensor=i, slot=slot, kind=kind, value=value, values=values)

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
        if kind == SCALAR:
            self._hand_over(i, slot, kind, float(value))
        else:
            place = address(f"{name} of tensor {i}", value, self._device, torch.float32)
            self._hand_over(i, slot, kind, values=place)
        self._alive[i, slot] = value
        if kind == SCALAR or not same_memory(value, given):
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
            out[i] = t if t is self._x[i] else readable(f"x[{i}]", t, self._device, (t.dtype,), self._orders[i])
        self._x = out
        return out

    def _gradient(self, i: int, g: Tensor) -> Tensor:
        """``g``, made dense and of a dtype that the extension takes."""
        require_dense(f"grad[{i}]", g)
        if g.shape != self._shapes[i] or g.device != self._device:
            shape = tuple(self._shapes[i])
            raise ValueError(
                f"grad[{i}] must be {shape} on {self._device} as x[{i}] is, got {tuple(g.shape)} on {g.device}"
            )
        g = readable(f"grad[{i}]", g, self._device, (g.dtype,), self._orders[i])
        if g.dtype not in STORAGE or self._orders[i] is not torch.contiguous_format:
            g = g.to(torch.float32)
        if g.dtype != self._grad_dtypes[i]:
            self._op.set_grad(i, STORAGE[g.dtype])
            self._grad_dtypes[i], self._grad_sizes[i] = g.dtype, g.nbytes
        return g

    def _prepare(self, x: list[Tensor], params: Sequence[StepParams]) -> list[Tensor]:
        """Take in what is not as it was in the last step; the state's tensors as the extension needs them."""
        if not all(map(operator.is_, x, self._x)):
            x = self._state(x)
        self._constants(params)
        return x

    # -- the step

    def _check_counts(self, **lists: Sequence[Any]) -> None:
        if any(len(each) != len(self._shapes) for each in lists.values()):
            names, counts = (
                f"{', '.join(words[:-1])} and {words[-1]}"
                for words in (list(lists), [str(len(v)) for v in lists.values()])
            )
            raise ValueError(f"{names} must have {len(self._shapes)} entries, got {counts}")

    def _unchanged(
        self, x: Sequence[Tensor], grad: Sequence[Tensor], params: Sequence[StepParams]
    ) -> tuple[list[int], list[int]] | None:
        """The addresses of ``x`` and ``grad`` where all is as it was in the last step but the gradients' numbers."""
        return None

    def _run(
        self, x: list[int], grad: list[int], step: int | Tensor, with_noise: bool, sums: dict[str, int] | None
    ) -> None:
        """The extension's step of what lies at these addresses."""
        raise NotImplementedError

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
        if not len(x) == len(grad) == len(params) == len(self._shapes):
            self._check_counts(x=x, grad=grad, params=params)
        places = None if self._copied else self._unchanged(x, grad, params)
        if places is None:
            x = self._prepare(x, params)
            # what was copied must live until the extension has read it
            grad = [self._gradient(i, g) for i, g in enumerate(grad)]
            places = known_addresses(x), known_addresses(grad)
        out, sums = stats_and_addresses(x[0].shape[0], self._device) if stats else (None, None)
        self._run(*places, step, with_noise, sums)
        return x, out
