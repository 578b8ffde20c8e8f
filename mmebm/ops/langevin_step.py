"""``langevin_step``: one update of all tensors of the state, with its noise. Validation and the choice of a backend.

A chain prepares a :class:`Stepper` once and calls it at every step; what does not change along the chain (seed,
streams, masks, pointers) is resolved at construction.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import torch
from torch import Tensor

from mmebm import native, noise
from mmebm.backends import NAMES
from mmebm.ops.params import Constant, NormOver, Outside, StepParams, StepStats, per_tensor
from mmebm.reference import langevin_step as reference

__all__ = ["CppStepper", "StepOptions", "Stepper", "TorchStepper", "langevin_step", "stepper"]

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


_FIELDS: Final = ("step_size", "noise_scale", "grad_clip", "grad_norm_clip", "max_update", "prior_std", "low", "high")
_LIMITS: Final = frozenset(("grad_clip", "grad_norm_clip", "max_update", "low", "high"))
_STORAGE: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Chains shorter than this get a constant per element instead of one per chain, so that C++ need not stop at each.
_SHORT_CHAIN: Final = 16


def _cpp_reason(x: Sequence[Tensor], options: StepOptions) -> str | None:
    """``None`` if :class:`CppStepper` takes this state, else the reason why not."""
    if options.rng != "philox":
        return f"rng={options.rng!r} is torch's own stream of numbers"
    if len(x) == 0:
        return "the state has no tensor"
    for i, t in enumerate(x):
        if t.device.type != "cpu":
            return f"tensor {i} of the state is on {t.device}"
        if t.dtype not in _STORAGE or t.layout is not torch.strided:
            return f"tensor {i} of the state is {t.dtype}, {t.layout}; taken are float32, bfloat16 and float16"
        if t.dim() == 0 or t.shape[0] != x[0].shape[0]:
            return f"tensor {i} of the state has shape {tuple(t.shape)}; taken is ({tuple(x[0].shape)[:1]}, ...)"
        if not t.is_contiguous():
            return f"tensor {i} of the state is not contiguous (strides {t.stride()})"
        if math.prod(t.shape[1:]) > 1 << 33:
            return f"tensor {i} of the state has more than 2^33 elements per chain"
    available, reason = native.available("cpp")
    return None if available else reason


def _version(t: Tensor) -> int | None:
    """How often ``t`` was written to; ``None`` where torch does not count."""
    return None if t.is_inference() else t._version


class CppStepper:
    """The update in C++: all tensors in one call a step, in place, by :file:`csrc/cpu/langevin_step_kernel.h`.

    The instruction set is the best this processor has; ``MMEBM_CPU_ISA`` = ``baseline``, ``avx2`` or ``avx512`` asks
    for another. Results do not depend on the number of threads (``torch.get_num_threads()``), and ``avx2`` and
    ``avx512`` agree bit for bit.

    Constants that are numbers or one per chain are read as they are; any other tensor that broadcasts is expanded once,
    and again when it was written to. Writing to the state does not raise its autograd version.
    """

    name = "cpp"
    inplace = True

    def __init__(self, options: StepOptions, x: Sequence[Tensor]) -> None:
        reason = _cpp_reason(x, options)
        if reason is not None:
            raise native.BackendError(f"cpp: {reason}")
        isa = os.environ.get("MMEBM_CPU_ISA", "") or "auto"
        self._op = native.cpu().LangevinStep(
            x[0].shape[0], options.chain_offset & noise.MASK32, options.outside == "reject", options.clamp_noise,
            options.norm_over == "tensor", "generic" if isa == "baseline" else isa,
        )  # fmt: skip
        self.options = options
        self._plain_seed = not isinstance(options.seed, Tensor)
        self._seed = options.seed & (1 << 64) - 1 if self._plain_seed else options.seed
        self._x = list(x)
        self._shapes = [t.shape for t in x]
        self._dtypes = [t.dtype for t in x]
        self._grad_dtypes = list(self._dtypes)
        self._large = sum(t.numel() for t in x) >= 1 << 14
        self._masks = [self._mask(i, t) for i, t in enumerate(x)]
        for t, index, noisy, mask in zip(x, options.streams, options.noisy, self._masks, strict=True):
            noise.stream(index)
            self._op.add(
                math.prod(t.shape[1:]), index, noisy, _STORAGE[t.dtype], 0 if mask is None else mask.data_ptr()
            )
        self._params: list[StepParams | None] = [None] * len(x)
        self._values: list[list[object]] = [[None] * len(_FIELDS) for _ in x]
        self._alive: dict[tuple[int, int], Tensor] = {}
        self._copied: dict[tuple[int, int], tuple[Tensor, int | None]] = {}

    def _mask(self, i: int, x: Tensor) -> Tensor | None:
        mask = self.options.observed[i] if self.options.observed else None
        if mask is None:
            return None
        if mask.dtype != torch.bool or mask.device.type != "cpu":
            raise ValueError(f"observed[{i}] must be a bool mask on the CPU, got {mask.dtype} on {mask.device}")
        try:
            return mask.expand(x.shape).contiguous()
        except RuntimeError:
            shapes = f"{tuple(mask.shape)} does not broadcast against {tuple(x.shape)}"
            raise ValueError(f"observed[{i}] of shape {shapes}") from None

    # -- constants

    def _set(self, i: int, slot: int, value: float | Tensor | None) -> None:
        """Hand one constant of tensor ``i`` to C++."""
        if isinstance(value, Tensor):
            self._set_tensor(i, slot, value)
            return
        if value is None:
            self._op.set(i, slot, 0, 0.0, 0)
        elif value != value and _FIELDS[slot] in _LIMITS:
            raise ValueError(f"{_FIELDS[slot]} of tensor {i} must not be NaN")
        else:
            self._op.set(i, slot, 1, value, 0)
        self._alive.pop((i, slot), None)
        self._copied.pop((i, slot), None)

    def _set_tensor(self, i: int, slot: int, given: Tensor) -> None:
        name, shape = _FIELDS[slot], self._shapes[i]
        if given.device.type != "cpu":
            raise ValueError(f"{name} of tensor {i} must be on the CPU as the state is, got {given.device}")
        chains, numel = shape[0], math.prod(shape[1:])
        single = given.numel() == 1 and given.dim() <= len(shape)
        per_chain = given.dim() == len(shape) and given.shape[0] == chains == given.numel() and numel >= _SHORT_CHAIN
        try:
            value = given if single or per_chain else given.expand(shape)
        except RuntimeError:
            shapes = f"{tuple(given.shape)} does not broadcast against {tuple(shape)}"
            raise ValueError(f"{name} of tensor {i} has shape {shapes}") from None
        value = value.detach().to(torch.float32).contiguous()
        # a clamp whose limit is NaN is NaN in torch, and no limit at all in the processor's min and max
        if name in _LIMITS and bool(value.isnan().any()):
            raise ValueError(f"{name} of tensor {i} must not hold NaN")
        if single:
            self._op.set(i, slot, 1, float(value), 0)
        else:
            self._op.set(i, slot, 2 if per_chain else 3, 0.0, value.data_ptr())
        self._alive[i, slot] = value
        if single or value.data_ptr() != given.data_ptr():
            self._copied[i, slot] = given, _version(given)
        else:
            self._copied.pop((i, slot), None)

    def _constants(self, params: Sequence[StepParams]) -> None:
        """Hand over what differs from the last step."""
        for i, p in enumerate(params):
            if p is self._params[i]:
                continue
            known = self._values[i]
            for slot, name in enumerate(_FIELDS):
                value = getattr(p, name)
                if value is not known[slot]:
                    self._set(i, slot, value)
                    known[slot] = value
            self._params[i] = p
        if self._copied:
            for (i, slot), (value, version) in list(self._copied.items()):
                if version is None or value._version != version:
                    self._set(i, slot, value)

    # -- tensors

    def _state(self, x: list[Tensor]) -> list[Tensor]:
        """``x``, with a contiguous copy of a tensor that is not what this stepper was made for."""
        out = list(x)
        for i, t in enumerate(x):
            if t.shape != self._shapes[i] or t.dtype != self._dtypes[i] or t.device.type != "cpu":
                raise ValueError(
                    f"x[{i}] must be {tuple(self._shapes[i])}, {self._dtypes[i]} on the CPU as it was when the stepper "
                    f"was made, got {tuple(t.shape)}, {t.dtype} on {t.device}"
                )
            out[i] = t.contiguous()
        self._x = out
        return out

    def _gradient(self, i: int, g: Tensor) -> Tensor:
        """``g``, made contiguous and of a dtype that C++ takes."""
        if g.shape != self._shapes[i] or g.device.type != "cpu":
            shape = tuple(self._shapes[i])
            raise ValueError(f"grad[{i}] must be {shape} on the CPU as x[{i}] is, got {tuple(g.shape)} on {g.device}")
        if g.dtype not in _STORAGE:
            g = g.to(torch.float32)
        if g.dtype != self._grad_dtypes[i]:
            self._op.set_grad(i, _STORAGE[g.dtype])
            self._grad_dtypes[i] = g.dtype
        return g.contiguous()

    def _words(self, step: int | Tensor) -> tuple[int, int]:
        return int(self._seed) & (1 << 64) - 1, int(step) & noise.MASK32

    def _prepare(self, x: list[Tensor], params: Sequence[StepParams]) -> list[Tensor]:
        """Take in what is not as it was in the last step; the state's tensors as C++ needs them."""
        if len(x) != len(self._x) or len(params) != len(self._x):
            raise ValueError(f"x and params must have {len(self._x)} entries, got {len(x)} and {len(params)}")
        if not all(map(operator.is_, x, self._x)):
            x = self._state(x)
        self._constants(params)
        return x

    def perturb(self, x: list[Tensor], params: Sequence[StepParams], step: int | Tensor) -> list[Tensor]:
        x = self._prepare(x, params)
        threads = torch.get_num_threads() if self._large else 1
        self._op.perturb([t.data_ptr() for t in x], *self._words(step), threads)
        return x

    def step(
        self, x: list[Tensor], grad: Sequence[Tensor], params: Sequence[StepParams], step: int | Tensor, *,
        with_noise: bool, stats: bool,
    ) -> tuple[list[Tensor], StepStats | None]:  # fmt: skip
        # A step over a few thousand elements takes 3 us in C++: this function counts, so all checks are in one loop.
        known, settled, dtypes, shapes = self._x, self._params, self._grad_dtypes, self._shapes
        if len(x) != len(known) or len(grad) != len(known) or len(params) != len(known):
            counts = f"got {len(x)}, {len(grad)} and {len(params)}"
            raise ValueError(f"x, grad and params must have {len(known)} entries, {counts}")
        places, gradients = [], []
        changed = bool(self._copied)
        converted = None
        for i, g in enumerate(grad):
            t = x[i]
            if t is not known[i] or params[i] is not settled[i]:
                changed = True
            if not (g.dtype is dtypes[i] and g.is_contiguous() and g.is_cpu and g.shape == shapes[i]):
                g = self._gradient(i, g)
                converted = [*(converted or ()), g]  # it must live until C++ has read it
            places.append(t.data_ptr())
            gradients.append(g.data_ptr())
        if changed:
            x = self._prepare(x, params)
            places = [t.data_ptr() for t in x]
        if self._plain_seed and type(step) is int:
            seed, word = self._seed, step & 0xFFFFFFFF
        else:
            seed, word = self._words(step)
        threads = torch.get_num_threads() if self._large else 1
        if not stats:
            self._op.step(places, gradients, seed, word, with_noise, threads)
            return x, None
        chains = x[0].shape[0]
        out = StepStats(
            grad_norm=torch.empty(chains), displacement=torch.empty(chains),
            clipped=torch.empty(chains, dtype=torch.int64), nonfinite=torch.empty(chains, dtype=torch.int64),
        )  # fmt: skip
        self._op.step_stats(
            places, gradients, seed, word, with_noise, threads, out.grad_norm.data_ptr(), out.displacement.data_ptr(),
            out.clipped.data_ptr(), out.nonfinite.data_ptr(),
        )  # fmt: skip
        return x, out


def _triton_reason(
    x: Sequence[Tensor], options: StepOptions, params: Sequence[StepParams] | None
) -> tuple[str | None, type | None]:
    """(reason why not, None) or (None, the class)."""
    try:
        from mmebm.kernels.langevin_step import TritonStepper, supports
    except ImportError as error:
        return f"triton does not import ({error}); pip install triton", None
    reason = supports(x, options, params)
    return reason, None if reason else TritonStepper


def _explicit(
    backend: str, x: Sequence[Tensor], options: StepOptions, params: Sequence[StepParams] | None, why: str
) -> tuple[Stepper, str]:
    if backend == "torch":
        return TorchStepper(options), why
    if backend == "cpp":
        return CppStepper(options, x), why
    if backend == "triton":
        reason, chosen = _triton_reason(x, options, params)
        if chosen is None:
            raise native.BackendError(f"triton: {reason}")
        return chosen(options), why
    native.cuda()  # raises with the reason where the extension is not there
    raise native.BackendError("cuda: langevin_step is not built in CUDA C++; use backend='triton' or 'auto'")


def stepper(
    backend: str, x: Sequence[Tensor], options: StepOptions, params: Sequence[StepParams] | None = None
) -> tuple[Stepper, str]:
    """The stepper of ``backend`` for the state ``x``, and the reason for the choice.

    "auto" takes C++ for a contiguous state on the CPU and Triton for one on a GPU, each where it is there and takes
    these options, else the reference. The environment variable ``MMEBM_BACKEND`` replaces "auto", and counts as asked
    for by name.

    Args:
        backend: "auto", "torch", "cpp", "triton" or "cuda".
        x: the state's tensors.
        options: what stays the same along the chain.
        params: the first step's constants, where known: a backend that does not take them is then not chosen.

    Raises:
        ValueError: for an unknown backend.
        BackendError: where a backend asked for by name cannot take this state.
    """
    why = f"backend={backend!r}"
    if backend == "auto" and os.environ.get("MMEBM_BACKEND"):
        backend = os.environ["MMEBM_BACKEND"]
        why = f"MMEBM_BACKEND={backend}"
    if backend not in ("auto", *NAMES):
        raise ValueError(f"backend must be one of {', '.join(('auto', *NAMES))}, got {why}")
    if backend != "auto":
        return _explicit(backend, x, options, params, why)
    device = x[0].device.type if len(x) else "cpu"
    if device == "cpu":
        reason = _cpp_reason(x, options)
        if reason is None:
            return CppStepper(options, x), "auto: the state is on the CPU and contiguous"
        return TorchStepper(options), f"auto: the reference, not cpp: {reason}"
    if device == "cuda":
        reason, chosen = _triton_reason(x, options, params)
        if chosen is not None:
            return chosen(options), f"auto: the state is on {x[0].device}"
        return TorchStepper(options), f"auto: the reference, not triton: {reason}"
    return TorchStepper(options), f"auto: the reference, no other backend runs on {device}"


# -- the functional entry


_SCHEMA: Final = (
    "langevin_step(Tensor[] x, Tensor[] grad, float[] numbers, Tensor?[] tensors, *, str phase, SymInt seed, "
    "SymInt step, SymInt chain_offset, Tensor?[] observed, str norm_over, str outside, bool clamp_noise, "
    "str backend) -> Tensor[]"
)


def _run(
    x: list[Tensor], grad: list[Tensor], numbers: list[float], tensors: list[Tensor | None], *, phase: str, seed: int,
    step: int, chain_offset: int, observed: list[Tensor | None], norm_over: NormOver, outside: Outside,
    clamp_noise: bool, backend: str,
) -> list[Tensor]:  # fmt: skip
    """The op: constants in rows of ``_FIELDS`` per tensor, a NaN number for one that is absent or a tensor."""
    values = [number if value is None else value for number, value in zip(numbers, tensors, strict=True)]
    constants = [None if isinstance(value, float) and value != value else value for value in values]
    rows = [constants[i : i + len(_FIELDS)] for i in range(0, len(constants), len(_FIELDS))]
    params = [StepParams(**dict(zip(_FIELDS, row, strict=True))) for row in rows]  # pyright: ignore[reportArgumentType]
    options = StepOptions(
        seed=seed, streams=tuple(range(len(x))), noisy=(True,) * len(x), chain_offset=chain_offset,
        norm_over=norm_over, outside=outside, clamp_noise=clamp_noise, observed=tuple(observed),
    )  # fmt: skip
    with torch.no_grad():
        x = [t.clone(memory_format=torch.contiguous_format) for t in x]
        chosen, _ = stepper(backend, x, options, params)
        if phase == "perturb":
            x = chosen.perturb(x, params, step)
        else:
            x, _ = chosen.step(x, grad, params, step, with_noise=phase == "step", stats=False)
        return [t.contiguous() for t in x]


def _fake(x: list[Tensor], grad: list[Tensor], *args: object, **kwargs: object) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in x]


_library = torch.library.Library("mmebm", "FRAGMENT")
if not hasattr(torch.ops.mmebm, "langevin_step"):
    _library.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl("langevin_step", _run, "CompositeExplicitAutograd")
    torch.library.register_fake("mmebm::langevin_step", _fake, lib=_library)


def langevin_step(
    x: Sequence[Tensor],
    grad: Sequence[Tensor] | None,
    *,
    step_size: Constant,
    noise_scale: Constant,
    seed: int,
    step: int = 0,
    chain_offset: int = 0,
    noise_at: Literal["after", "before"] = "after",
    grad_clip: Constant | None = None,
    grad_norm_clip: Constant | None = None,
    norm_over: NormOver = "chain",
    max_update: Constant | None = None,
    prior_std: Constant | None = None,
    low: Constant | None = None,
    high: Constant | None = None,
    outside: Outside = "clamp",
    clamp_noise: bool = False,
    observed: Sequence[Tensor | None] | None = None,
    backend: str = "auto",
) -> list[Tensor]:
    """One Langevin step for all tensors of a state; new tensors, without gradients. Works under ``torch.compile``.

    The rule is :func:`mmebm.reference.langevin_step.langevin_step`. A constant is a number, a tensor that broadcasts
    against the state's tensor (shape (chains, 1, ...) for one value per chain), or a list with one of these (or
    ``None``) per tensor.

    Args:
        x: tensors (chains, ...) of one number of chains, contiguous or not.
        grad: the gradient of the energy, one tensor for each of ``x``. ``None`` with ``noise_at="before"``: the
            half-step ``x + noise_scale xi`` that comes before the gradient; ``clamp_noise`` then clamps to the bounds.
        seed, step, chain_offset: where in the noise this step lies (:mod:`mmebm.noise`).
        noise_at: "after" adds the noise to the drift; "before" leaves it out of the drift (it is in the half-step).
        grad_clip, grad_norm_clip, norm_over, max_update, prior_std, low, high, outside: see the rule.
        observed: per tensor ``None`` or a boolean mask that broadcasts: these elements keep their value.
        backend: see :func:`stepper`.

    Raises:
        TypeError, ValueError: for anything else, naming the argument.
        BackendError: where ``backend`` cannot take this state.
    """
    x = _tensors("x", x)
    gradients = [] if grad is None else _tensors("grad", grad)
    if noise_at not in ("after", "before"):
        raise ValueError(f"noise_at must be 'after' or 'before', got {noise_at!r}")
    if norm_over not in ("chain", "tensor"):
        raise ValueError(f"norm_over must be 'chain' or 'tensor', got {norm_over!r}")
    if outside not in ("clamp", "reject"):
        raise ValueError(f"outside must be 'clamp' or 'reject', got {outside!r}")
    if grad is None and noise_at == "after":
        raise ValueError("grad must be given with noise_at='after', got None")
    for i, t in enumerate(x):
        if t.dim() == 0 or t.shape[0] != x[0].shape[0]:
            raise ValueError(f"x[{i}] must have {x[0].shape[:1]} chains first, got shape {tuple(t.shape)}")
    if grad is not None:
        if len(gradients) != len(x):
            raise ValueError(f"grad must have {len(x)} tensors, one for each of x, got {len(gradients)}")
        for i, (t, g) in enumerate(zip(x, gradients, strict=True)):
            if t.shape != g.shape or t.device != g.device:
                raise ValueError(
                    f"grad[{i}] must be {tuple(t.shape)} on {t.device} as x[{i}], got {tuple(g.shape)} on {g.device}"
                )
    masks: list[Tensor | None] = [None] * len(x) if observed is None else list(observed)
    if len(masks) != len(x):
        raise ValueError(f"observed must have {len(x)} entries, one for each of x, got {len(masks)}")
    for i, mask in enumerate(masks):
        if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool):
            raise TypeError(f"observed[{i}] must be None or a boolean tensor, got {type(mask).__name__}")
    columns = [
        per_tensor(name, value, len(x))
        for name, value in zip(
            _FIELDS, (step_size, noise_scale, grad_clip, grad_norm_clip, max_update, prior_std, low, high), strict=True
        )
    ]
    for name, column in zip(_FIELDS[:2], columns, strict=False):
        if any(value is None for value in column):
            raise ValueError(f"{name} must be given for every tensor, got None")
    values = [column[i] for i in range(len(x)) for column in columns]
    return torch.ops.mmebm.langevin_step(
        [t.detach() for t in x], [g.detach() for g in gradients],
        [v if isinstance(v, float) else math.nan for v in values],
        [v if isinstance(v, Tensor) else None for v in values],
        phase="perturb" if grad is None else "step" if noise_at == "after" else "drift", seed=seed, step=step,
        chain_offset=chain_offset, observed=masks, norm_over=norm_over, outside=outside, clamp_noise=clamp_noise,
        backend=backend,
    )  # fmt: skip


def _tensors(name: str, value: Sequence[Tensor]) -> list[Tensor]:
    if isinstance(value, Tensor) or not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list of tensors, got {type(value).__name__}")
    if len(value) == 0:
        raise ValueError(f"{name} must hold at least one tensor")
    for i, t in enumerate(value):
        if not isinstance(t, Tensor) or not t.is_floating_point():
            raise TypeError(f"{name}[{i}] must be a floating-point tensor, got {t!r:.80}")
    return list(value)
