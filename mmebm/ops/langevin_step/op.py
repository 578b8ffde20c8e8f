"""``langevin_step``: one update of all tensors of the state, with its noise. Validation and the choice of a backend.

A chain prepares a :class:`Stepper` once and calls it at every step; what does not change along the chain (seed,
streams, masks, pointers) is resolved at construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal, Protocol

import torch
from torch import Tensor

from mmebm import noise
from mmebm.ops import dispatch
from mmebm.ops.common.address import obstacle, require_broadcast, require_dense
from mmebm.ops.common.params import (
    FIELDS,
    Constant,
    NormOver,
    Outside,
    StepOptions,
    StepParams,
    StepStats,
    per_tensor,
    word64,
)
from mmebm.ops.common.untyped import register
from mmebm.ops.langevin_step import reference
from mmebm.ops.langevin_step.cpp import CppStepper, cpp_reason
from mmebm.ops.langevin_step.cuda import CudaStepper, cuda_reason
from mmebm.state import flag, integer

__all__ = ["CppStepper", "CudaStepper", "StepOptions", "Stepper", "TorchStepper", "langevin_step", "make", "stepper"]


class Stepper(Protocol):
    """One backend's step. Methods may overwrite ``x`` and return it: the caller goes on with what is returned."""

    name: str
    inplace: bool

    def perturb(self, x: list[Tensor], params: Sequence[StepParams], step: int | Tensor) -> list[Tensor]:
        """``x + noise_scale xi`` (``noise_at="before"``)."""
        ...

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
                out.append(
                    noise.normal(
                        xi.shape,
                        seed=o.seed,
                        step=step,
                        stream=noise.stream(index, noise.DRIFT),
                        chain_offset=o.chain_offset,
                        dtype=dtype,
                        device=xi.device,
                    )
                )
        return out

    def thresholds(self, x: Sequence[Tensor], step: int | Tensor, purpose: int) -> list[Tensor | None]:
        """Those of stochastic rounding, of the 16-bit tensors."""
        o = self.options
        if o.rng == "torch":
            # a ported script rounds to nearest
            return [None] * len(x)
        return [
            noise.rounding_fraction(
                xi.shape,
                seed=o.seed,
                step=step,
                stream=noise.stream(index, purpose),
                chain_offset=o.chain_offset,
                device=xi.device,
            )
            if xi.dtype in (torch.float16, torch.bfloat16)
            else None
            for xi, index in zip(x, o.streams, strict=True)
        ]

    def perturb(self, x: list[Tensor], params: Sequence[StepParams], step: int | Tensor) -> list[Tensor]:
        return reference.perturb(
            x,
            self._noise(x, step),
            params,
            clamp_noise=self.options.clamp_noise,
            observed=self.options.observed,
            thresholds=self.thresholds(x, step, noise.PERTURB_ROUNDING),
        )

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
        drawn = self._noise(x, step) if with_noise else [None] * len(x)
        return reference.langevin_step(
            x,
            grad,
            drawn,
            params,
            norm_over=self.options.norm_over,
            outside=self.options.outside,
            score=self.options.score,
            observed=self.options.observed,
            thresholds=self.thresholds(x, step, noise.ROUNDING),
            stats=stats,
        )


def make(backend: str, module: Any, options: StepOptions, x: Sequence[Tensor]) -> Stepper:
    """The stepper of ``backend``, whose module :func:`mmebm.ops.dispatch.choose` gave; ``None`` is the reference's."""
    if module is None:
        return TorchStepper(options)
    return module.TritonStepper(options) if backend == "triton" else _STEPPERS[backend](options, x)


_STEPPERS: Final[dict[str, Any]] = {"cpp": CppStepper, "cuda": CudaStepper}


def stepper(
    backend: str, x: Sequence[Tensor], options: StepOptions, params: Sequence[StepParams] | None = None
) -> tuple[Stepper, str]:
    """The stepper of ``backend`` for the state ``x``, and the reason for the choice.

    "auto" takes C++ for a state on the CPU and Triton, or else CUDA C++, for one on a GPU, each where it is there,
    takes these options and has passed its parity case, else the reference. The environment variable ``MMEBM_BACKEND``
    replaces "auto", and counts as asked for by name.

    Args:
        backend: "auto", "torch", "cpp", "triton" or "cuda".
        x: the state's tensors.
        options: what stays the same along the chain.
        params: the first step's constants, where known: a backend that does not take them is then not chosen.

    Raises:
        ValueError: for an unknown backend.
        BackendError: where a backend asked for by name cannot take this state.
    """

    def refusal(name: str, module: Any) -> str | None:
        if name == "cpp":
            return cpp_reason(x, options)
        if name == "cuda":
            return cuda_reason(x, options, params)
        for i, t in enumerate(x):
            reason = obstacle(t)
            if reason is not None:
                return f"tensor {i} of the state is {reason}"
        return module.supports(x, options, params)

    device = x[0].device if len(x) else torch.device("cpu")
    name, module, why = dispatch.choose("langevin_step", backend, device, refusal)
    return make(name, module, options, x), why


# -- the functional entry


_SCHEMA: Final = (
    "langevin_step(Tensor[] x, Tensor[] grad, float[] numbers, Tensor?[] tensors, int[] present, *, str phase, "
    "SymInt seed, SymInt step, SymInt chain_offset, Tensor?[] observed, str norm_over, str outside, bool clamp_noise, "
    "bool score, str backend) -> Tensor[]"
)


def _run(
    x: list[Tensor],
    grad: list[Tensor],
    numbers: list[float],
    tensors: list[Tensor | None],
    present: list[int],
    *,
    phase: str,
    seed: int,
    step: int,
    chain_offset: int,
    observed: list[Tensor | None],
    norm_over: NormOver,
    outside: Outside,
    clamp_noise: bool,
    score: bool,
    backend: str,
) -> list[Tensor]:
    """The op: constants in rows of ``FIELDS`` per tensor of the state, as numbers or tensors; ``present`` has bit f of
    a row set where field f is given."""
    values = iter(number if value is None else value for number, value in zip(numbers, tensors, strict=True))
    rows = [[(name, next(values), bits >> f & 1) for f, name in enumerate(FIELDS)] for bits in present]
    params = [StepParams(**{name: value for name, value, given in row if given}) for row in rows]
    options = StepOptions(
        seed=seed,
        streams=tuple(range(len(x))),
        noisy=(True,) * len(x),
        chain_offset=chain_offset,
        norm_over=norm_over,
        outside=outside,
        clamp_noise=clamp_noise,
        score=score,
        observed=tuple(observed),
    )
    dtypes = [t.dtype for t in x]
    with torch.no_grad():
        x = [t.clone(memory_format=torch.contiguous_format) for t in x]
        chosen, _ = stepper(backend, x, options, params)
        if phase == "perturb":
            x = chosen.perturb(x, params, step)
        else:
            x, _ = chosen.step(x, grad, params, step, with_noise=phase == "step", stats=False)
        # the reference promotes: to float64 where the gradient or a constant is
        return [t.to(dtype).contiguous() for t, dtype in zip(x, dtypes, strict=True)]


def _fake(x: list[Tensor], grad: list[Tensor], *args: object, **kwargs: object) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in x]


_library = register(_SCHEMA, _run, _fake)


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
    score: bool = False,
    observed: Sequence[Tensor | None] | None = None,
    backend: str = "auto",
) -> list[Tensor]:
    """One Langevin step for all tensors of a state; new tensors, without gradients. Works under ``torch.compile``.

    The rule is :func:`mmebm.ops.langevin_step.reference.langevin_step`. A constant is a number, a tensor that
    broadcasts against the state's tensor (shape (chains, 1, ...) for one value per chain), or a list with one of these
    (or ``None``) per tensor.

    Args:
        x: tensors (chains, ...) of one number of chains, contiguous or not.
        grad: the gradient of the energy, one tensor for each of ``x``. ``None`` with ``noise_at="before"``: the
            half-step ``x + noise_scale xi`` that comes before the gradient; ``clamp_noise`` then clamps to the bounds.
        seed, step, chain_offset: where in the noise this step lies (:mod:`mmebm.noise`).
        noise_at: "after" adds the noise to the drift; "before" leaves it out of the drift (it is in the half-step).
        grad_clip, grad_norm_clip, norm_over, max_update, prior_std, low, high, outside, score: see the rule.
        observed: per tensor ``None`` or a boolean mask that broadcasts: these elements keep their value.
        backend: see :func:`stepper`.

    Raises:
        TypeError, ValueError: for anything else, naming the argument.
        BackendError: where ``backend`` cannot take this state.
    """
    x = _tensors("x", x)
    flag("clamp_noise", clamp_noise)
    flag("score", score)
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
            if t.device == g.device:
                require_dense(f"grad[{i}]", g, t)
            if t.shape != g.shape or t.device != g.device:
                raise ValueError(
                    f"grad[{i}] must be {tuple(t.shape)} on {t.device} as x[{i}], got {tuple(g.shape)} on {g.device}"
                )
    masks: list[Any] = [None] * len(x) if observed is None else list(observed)
    if len(masks) != len(x):
        raise ValueError(f"observed must have {len(x)} entries, one for each of x, got {len(masks)}")
    for i, mask in enumerate(masks):
        if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool):
            raise TypeError(f"observed[{i}] must be None or a boolean tensor, got {type(mask).__name__}")
        if mask is not None:
            require_dense(f"observed[{i}]", mask, x[0])
            require_broadcast(f"observed[{i}]", mask, x[i])
    columns = [
        per_tensor(name, value, len(x), x[0])
        for name, value in zip(
            FIELDS, (step_size, noise_scale, grad_clip, grad_norm_clip, max_update, prior_std, low, high), strict=True
        )
    ]
    for name, column in zip(FIELDS[:2], columns, strict=False):
        if any(value is None for value in column):
            raise ValueError(f"{name} must be given for every tensor, got None")
    for name, column in zip(FIELDS, columns, strict=True):
        for i, value in enumerate(column):
            if isinstance(value, Tensor):
                require_broadcast(f"{name} of tensor {i}", value, x[i])
    values = [column[i] for i in range(len(x)) for column in columns]
    return torch.ops.mmebm.langevin_step(
        [t.detach() for t in x],
        [g.detach() for g in gradients],
        [v if isinstance(v, float) else 0.0 for v in values],
        [v if isinstance(v, Tensor) else None for v in values],
        [sum(1 << f for f, column in enumerate(columns) if column[i] is not None) for i in range(len(x))],
        phase="perturb" if grad is None else "step" if noise_at == "after" else "drift",
        seed=word64("seed", seed),
        step=word64("step", step),
        chain_offset=integer("chain_offset", chain_offset, 0, 2**62),
        observed=masks,
        norm_over=norm_over,
        outside=outside,
        clamp_noise=bool(clamp_noise),
        score=bool(score),
        backend=backend,
    )


def _tensors(name: str, value: Sequence[Any]) -> list[Tensor]:
    if isinstance(value, Tensor) or not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list of tensors, got {type(value).__name__}")
    if len(value) == 0:
        raise ValueError(f"{name} must hold at least one tensor")
    for i, t in enumerate(value):
        if not isinstance(t, Tensor) or not t.is_floating_point():
            raise TypeError(f"{name}[{i}] must be a floating-point tensor, got {t!r:.80}")
        require_dense(f"{name}[{i}]", t)
    return list(value)
