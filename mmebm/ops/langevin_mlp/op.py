"""``langevin_mlp``: a whole chain on a sum of MLP terms in one call. Validation and the choice of a backend.

Every room but the reference works on one flat state (chains, inputs), float32, the tensors side by side, and on one
table of constants; :class:`MlpChain` holds all that stays the same along the chain. A room is a module with

    supports(chain, x) -> None, or the reason why not
    run(chain, x, steps, first_step, energy=, grad_norm=) -> MlpResult
    note(chain, x) -> None, or what to know of a chain that it takes; may be absent

which leaves ``x`` as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mmebm.ops import dispatch
from mmebm.ops.common.address import require_broadcast, require_dense, unfit
from mmebm.ops.common.layout import per_chain, widen
from mmebm.ops.common.params import (
    FIELDS,
    NEUTRAL,
    Constant,
    NoiseAt,
    StepNumbers,
    StepParams,
    StepRows,
    per_tensor,
    word64,
)
from mmebm.ops.common.untyped import register
from mmebm.ops.langevin_mlp.reference import langevin_mlp as reference
from mmebm.ops.langevin_step import StepOptions, TorchStepper
from mmebm.ops.terms import Term, check_terms, pack, require_dense_terms, tensors_of, too_wide, unpack
from mmebm.state import integer

__all__ = ["MlpChain", "MlpResult", "Precision", "constants_of", "flat_mask", "langevin_mlp", "room", "run"]

Precision = Literal["fp32", "tf32x3", "bf16"]


@dataclass(frozen=True, slots=True)
class MlpChain:
    """One chain's problem on the flat state.

    Attributes:
        terms: the energy; their tensors in the state's dtype, contiguous.
        widths: elements per chain of each tensor of the state, in order; their sum is the terms' input.
        streams: the tensor index of each in the noise's stream word.
        noisy: per tensor whether it gets noise at all.
        moving: per tensor whether it moves; one that does not is input only, and no part of the gradient norm.
        constants: (steps or 1, tensors, len(FIELDS), chains or 1), in the dtype of the arithmetic, on the device.
        present: per tensor a word with bit f set where field f was given; an absent one has a neutral value.
        observed: uint8 (chains or 1, inputs), nonzero where an element keeps its value, or ``None``.
        seed: int, or 1-element int64 tensor on the device.
        chain_offset: global index of the first chain.
        noise_at, clamp_noise, freeze: see :func:`mmebm.ops.langevin_mlp.reference.langevin_mlp`.
        precision: of the matrix products on a GPU: "fp32", "tf32x3" (three tf32 products, about fp32), or "bf16"
            operands; sums are fp32 always. Elsewhere fp32.
        checked: whether :func:`room` has found the problem sound, and the module that it gave has taken it from a state
            of this shape: a module's ``run`` then does not look again, at pieces of the chain (:meth:`rows`) either.
    """

    terms: tuple[Term, ...]
    widths: tuple[int, ...]
    streams: tuple[int, ...]
    noisy: tuple[bool, ...]
    moving: tuple[bool, ...]
    constants: Tensor
    present: tuple[int, ...]
    observed: Tensor | None = None
    seed: int | Tensor = 0
    chain_offset: int = 0
    noise_at: NoiseAt = "after"
    clamp_noise: bool = False
    freeze: bool = False
    precision: Precision = "fp32"
    checked: bool = False

    def has(self, field: str) -> bool:
        """Whether a moving tensor has the constant ``field``."""
        bit = 1 << FIELDS.index(field)
        return any(word & bit for word, moves in zip(self.present, self.moving, strict=True) if moves)

    def rows(self, start: int, stop: int) -> MlpChain:
        """The problem of steps ``start`` to ``stop`` alone."""
        return self if self.constants.shape[0] == 1 else dataclasses.replace(self, constants=self.constants[start:stop])


class MlpResult(NamedTuple):
    """``x``: the final flat state; ``energy``, ``grad_norm``: (steps, chains), where asked for; ``frozen``: (chains,),
    ``None`` for a chain without ``freeze``."""

    x: Tensor
    energy: Tensor | None
    grad_norm: Tensor | None
    frozen: Tensor | None


def constants_of(
    params: Sequence[Sequence[StepParams]],
    chains: int,
    dtype: torch.dtype,
    device: torch.device,
    moving: Sequence[bool] | None = None,
) -> tuple[Tensor, tuple[int, ...]] | str:
    """(``constants``, ``present``) of :class:`MlpChain` from per-step lists of parameters, or why there are none.

    Taken are numbers, tensors of one element and tensors with one element per chain. ``moving``: which tensors do.
    """
    if moving is not None:
        still = StepParams(0.0, 0.0)
        if isinstance(params, StepRows):
            params = params.still(moving)
        else:
            params = [[p if moves else still for p, moves in zip(row, moving, strict=True)] for row in params]
    if isinstance(params, StepRows):
        quick = _from_columns(params)
        if quick is not None:
            return quick[0].to(dtype).to(device), quick[1]
    present = [0] * len(params[0])
    varies = False
    rows: list[list[list[Any]]] = []
    for row in params:
        rows.append([])
        for i, p in enumerate(row):
            values: list[Any] = []
            for f, name in enumerate(FIELDS):
                value = getattr(p, name)
                if value is None:
                    values.append(NEUTRAL[name])
                    continue
                present[i] |= 1 << f
                if isinstance(value, Tensor):
                    one = value.numel() == 1
                    if not one and (value.dim() == 0 or value.numel() != chains or value.shape[0] != chains):
                        return f"{name} of tensor {i} has shape {tuple(value.shape)}; taken is one value per chain"
                    varies = varies or not one
                    value = value.detach().reshape(-1)
                values.append(value)
            rows[-1].append(values)
    flat = [value for row in rows for values in row for value in values]
    shape = (len(rows), len(present), len(FIELDS))
    if not any(isinstance(value, Tensor) for value in flat):
        # one copy to the device a chain
        table = torch.tensor(flat, dtype=torch.float64, device="cpu").to(dtype).reshape(*shape, 1)
        return table.to(device), tuple(present)
    width = chains if varies else 1
    table = torch.stack(
        [
            (
                value.to(device, dtype)
                if isinstance(value, Tensor)
                else torch.full((1,), value, dtype=dtype, device=device)
            ).expand(width)
            for value in flat
        ]
    )
    return table.reshape(*shape, width), tuple(present)


def _from_columns(params: StepRows) -> tuple[Tensor, tuple[int, ...]] | None:
    """The table of constants that are all numbers, float64, without a row being made; None where some are tensors."""
    numbers: list[float] = []
    series: list[tuple[int, int, StepNumbers]] = []
    present = [0] * len(params.columns)
    for i, column in enumerate(params.columns):
        for f, name in enumerate(FIELDS):
            value = column[name]
            if value is None:
                numbers.append(NEUTRAL[name])
                continue
            present[i] |= 1 << f
            if isinstance(value, StepNumbers):
                series.append((i, f, value))
                value = 1.0
            elif not isinstance(value, float):
                return None
            numbers.append(value)
    table = torch.tensor(numbers, dtype=torch.float64, device="cpu").reshape(1, len(present), len(FIELDS), 1)
    if series:
        table = table.repeat(len(params), 1, 1, 1)
    for i, f, each in series:
        table[:, i, f, 0] = each.vector
    return table, tuple(present)


# -- rooms


def _refusal(module: ModuleType, chain: MlpChain, x: Tensor) -> str | None:
    """Why ``module`` does not take this chain, or ``None``."""
    tensors = [t for term in chain.terms for t in tensors_of(term)]
    return unfit("the terms", x, tensors, torch.bool) or too_wide(chain.terms) or module.supports(chain, x)


def room(backend: str, chain: MlpChain, x: Tensor) -> tuple[ModuleType | None, str]:
    """The module that runs ``chain`` from the flat state ``x``, ``None`` for the reference, and the reason.

    "auto" takes C++ on the CPU and Triton, then CUDA, on a GPU; see :func:`mmebm.ops.dispatch.choose`.

    Raises:
        TypeError, ValueError: for an unknown backend, and for terms that do not fit together.
        BackendError: where a backend asked for by name does not take this chain.
    """
    chosen = dispatch.choose("langevin_mlp", backend, x.device, lambda _, m: _refusal(m, chain, x), chain.precision)
    if chosen.module is not None:
        check_terms(chain.terms, x.shape[0], x.shape[1], x.device)
    return chosen.module, noted(chosen, chain, x)


def noted(chosen: dispatch.Choice, chain: MlpChain, x: Tensor) -> str:
    """The reason for the choice, and what the module has to say of the chain."""
    say = getattr(chosen.module, "note", None)
    note = None if say is None else say(chain, x)
    return chosen.reason if note is None else f"{chosen.reason}; {note}"


def run_reference(chain: MlpChain, x: Tensor, steps: int, first_step: int | Tensor, energy: Any = None) -> MlpResult:
    """The chain in PyTorch. ``energy``: what gives energy and gradient at the flat state, instead of the terms."""
    group = [i for i, moves in enumerate(chain.moving) if moves]
    tensors = list(x.split_with_sizes(chain.widths, dim=1))
    masks: list[Tensor | None] = [None] * len(tensors)
    if chain.observed is not None:
        masks = [part.bool() for part in chain.observed.split_with_sizes(chain.widths, dim=1)]
    stepper = TorchStepper(
        StepOptions(
            seed=chain.seed,
            streams=tuple(chain.streams[i] for i in group),
            noisy=tuple(chain.noisy[i] for i in group),
            chain_offset=chain.chain_offset,
            clamp_noise=chain.clamp_noise,
            observed=tuple(masks[i] for i in group),
        )
    )

    def row(table: Tensor) -> list[StepParams]:
        out: list[StepParams] = []
        for word, fields in zip(chain.present, table, strict=True):
            values: dict[str, Any] = {
                name: fields[f].unsqueeze(1) if word >> f & 1 else None for f, name in enumerate(FIELDS)
            }
            limit = values["grad_norm_clip"]
            if limit is not None and bool(limit.isinf().all()):  # given in other steps only
                values["grad_norm_clip"] = None
            for name in ("step_size", "noise_scale"):  # of a tensor that does not move
                values[name] = 0.0 if values[name] is None else values[name]
            out.append(StepParams(**values))
        return out

    result = reference(
        tensors,
        energy or chain.terms,
        [row(table) for table in chain.constants],
        stepper,
        steps=steps,
        first_step=first_step,
        noise_at=chain.noise_at,
        moving=chain.moving,
        freeze=chain.freeze,
    )
    return MlpResult(torch.cat(result.x, dim=1), result.energy, result.grad_norm, result.frozen)


def run(
    module: ModuleType | None,
    chain: MlpChain,
    x: Tensor,
    steps: int,
    first_step: int | Tensor,
    *,
    energy: bool = False,
    grad_norm: bool = False,
) -> MlpResult:
    """``steps`` steps from the flat state ``x`` (chains, inputs) in the room that :func:`room` chose."""
    if steps == 0 or x.shape[0] == 0:
        empty = x.new_zeros(steps, x.shape[0])
        return MlpResult(x.clone(), empty, empty, torch.zeros(x.shape[0], dtype=torch.bool, device=x.device))
    if module is None:
        return run_reference(chain, x, steps, first_step)
    return module.run(chain, x, steps, first_step, energy=energy, grad_norm=grad_norm)


# -- the functional entry


_SCHEMA: Final = (
    "langevin_mlp(Tensor x, Tensor?[] tensors, str terms, Tensor constants, Tensor? observed, *, SymInt steps, "
    "SymInt seed, SymInt first_step, SymInt chain_offset, int[] widths, int[] present, str noise_at, bool clamp_noise, "
    "bool freeze, str precision, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _op(
    x: Tensor,
    tensors: list[Tensor | None],
    terms: str,
    constants: Tensor,
    observed: Tensor | None,
    *,
    steps: int,
    seed: int,
    first_step: int,
    chain_offset: int,
    widths: list[int],
    present: list[int],
    noise_at: NoiseAt,
    clamp_noise: bool,
    freeze: bool,
    precision: Precision,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = len(widths)
    chain = MlpChain(
        terms=unpack(terms, tensors),
        widths=tuple(widths),
        streams=tuple(range(n)),
        noisy=(True,) * n,
        moving=(True,) * n,
        constants=constants,
        present=tuple(present),
        observed=observed,
        seed=seed,
        chain_offset=chain_offset,
        noise_at=noise_at,
        clamp_noise=clamp_noise,
        freeze=freeze,
        precision=precision,
    )
    with torch.no_grad():
        module, _ = room(backend, chain, x)
        chain = dataclasses.replace(chain, checked=True)
        result = run(module, chain, x, steps, first_step, energy=True, grad_norm=True)
    frozen = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device) if result.frozen is None else result.frozen
    assert result.energy is not None and result.grad_norm is not None
    return result.x, result.energy, result.grad_norm.clone(), frozen


def _fake(x: Tensor, *args: object, steps: int, **kwargs: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    trace = x.new_empty(steps, x.shape[0])
    return torch.empty_like(x), trace, torch.empty_like(trace), x.new_empty(x.shape[0], dtype=torch.bool)


_library = register(_SCHEMA, _op, _fake)


class MlpSamples(NamedTuple):
    """``x``: the final tensors. ``energy``, ``grad_norm``: (steps, chains), where each gradient was taken, before clips
    and prior. ``frozen``: bool (chains,)."""

    x: list[Tensor]
    energy: Tensor
    grad_norm: Tensor
    frozen: Tensor


def langevin_mlp(
    x: Sequence[Tensor],
    terms: Sequence[Term],
    *,
    steps: int,
    step_size: Constant,
    noise_scale: Constant,
    seed: int,
    first_step: int = 0,
    chain_offset: int = 0,
    noise_at: NoiseAt = "after",
    clamp_noise: bool = False,
    grad_clip: Constant | None = None,
    grad_norm_clip: Constant | None = None,
    max_update: Constant | None = None,
    prior_std: Constant | None = None,
    low: Constant | None = None,
    high: Constant | None = None,
    observed: Sequence[Tensor | None] | None = None,
    freeze: bool = False,
    precision: Precision = "fp32",
    backend: str = "auto",
) -> MlpSamples:
    """``steps`` Langevin steps on the energy ``sum(terms)`` in one call. Works under ``torch.compile``.

    :class:`mmebm.Langevin` comes here by itself where it recognises the energy (:func:`mmebm.energies.lower`).

    Args:
        x: tensors (chains, ...); flattened and side by side they are the terms' input. float32 for the fused rooms;
            the reference takes any floating dtype.
        terms: see :mod:`mmebm.ops.terms`.
        steps: number of steps, 0 or more.
        step_size, noise_scale, grad_clip, grad_norm_clip (per chain), max_update, prior_std, low, high: a number, a
            tensor with one element or one per chain, or a list of these, one per tensor of the state.
        seed, first_step, chain_offset: where in the noise the chain lies (:mod:`mmebm.noise`).
        noise_at, clamp_noise: "before" adds the noise before the gradient is taken, then clamped if ``clamp_noise``.
        observed: per tensor ``None`` or a boolean mask that broadcasts: these elements keep their value.
        freeze: a chain that turns non-finite stays at its last finite state.
        precision, backend: see :class:`MlpChain` and :func:`room`.

    Raises:
        TypeError, ValueError: naming the argument.
        BackendError: where ``backend`` does not take this chain.
    """
    if isinstance(x, Tensor) or not isinstance(x, (list, tuple)) or not x:
        raise TypeError(f"x must be a list of at least one tensor, got {type(x).__name__}")
    for i, t in enumerate(x):
        if not isinstance(t, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"x[{i}] must be a tensor, got {type(t).__name__}")
        require_dense(f"x[{i}]", t, x[0])
    chains, device = x[0].shape[0] if x[0].dim() else 0, x[0].device
    for i, t in enumerate(x):
        if not t.is_floating_point() or t.dim() == 0 or t.shape[0] != chains or t.device != device:
            raise ValueError(
                f"x[{i}] must be floating, ({chains}, ...) on {device}, got {t.dtype} {tuple(t.shape)} on {t.device}"
            )
        if t.dtype != x[0].dtype:
            raise ValueError(f"x[{i}] must be {x[0].dtype} as x[0] is, got {t.dtype}")
    if isinstance(steps, bool) or not isinstance(steps, int) or not 0 <= steps < 1 << 31:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"steps must be an int of at least 0 and below 2^31, got {steps!r}")
    if noise_at not in ("after", "before"):
        raise ValueError(f"noise_at must be 'after' or 'before', got {noise_at!r}")
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {get_args(Precision)}, got {precision!r}")
    flat = [per_chain(t) for t in x]
    widths = [t.shape[1] for t in flat]
    require_dense_terms(terms, widen(x[0]))
    checked = check_terms(terms, chains, sum(widths), device)
    columns = [
        per_tensor(name, value, len(x), x[0])
        for name, value in zip(
            FIELDS, (step_size, noise_scale, grad_clip, grad_norm_clip, max_update, prior_std, low, high), strict=True
        )
    ]
    for name, column in zip(FIELDS[:2], columns, strict=False):
        if any(value is None for value in column):
            raise ValueError(f"{name} must be given for every tensor, got None")
    params: Any = [[StepParams(**dict(zip(FIELDS, values, strict=True))) for values in zip(*columns, strict=True)]]
    table = constants_of(params, chains, widen(x[0][:0]).dtype, device)
    if isinstance(table, str):
        raise ValueError(table)
    masks: list[Tensor | None] = [None] * len(x) if observed is None else list(observed)
    if len(masks) != len(x):
        raise ValueError(f"observed must have {len(x)} entries, one for each of x, got {len(masks)}")
    description, tensors = pack(checked)
    out, energy, grad_norm, frozen = torch.ops.mmebm.langevin_mlp(
        torch.cat([widen(t).detach() for t in flat], dim=1),
        [None if t is None else t.detach() for t in tensors],
        description,
        table[0],
        flat_mask(masks, x),
        steps=steps,
        seed=word64("seed", seed),
        first_step=word64("first_step", first_step),
        chain_offset=integer("chain_offset", chain_offset, 0, 2**62),
        widths=widths,
        present=table[1],
        noise_at=noise_at,
        clamp_noise=clamp_noise,
        freeze=freeze,
        precision=precision,
        backend=backend,
    )
    parts = [part.reshape(t.shape).to(t.dtype) for part, t in zip(out.split(widths, dim=1), x, strict=True)]
    return MlpSamples(parts, energy, grad_norm, frozen)


def flat_mask(masks: Sequence[Tensor | None], x: Sequence[Tensor]) -> Tensor | None:
    """Per-tensor masks as the ``observed`` of :class:`MlpChain`.

    Raises:
        TypeError, ValueError: for a mask that is not boolean or does not broadcast.
    """
    if all(mask is None for mask in masks):
        return None
    parts: list[Tensor] = []
    for i, (mask, t) in enumerate(zip(masks, x, strict=True)):
        if mask is None:
            parts.append(torch.zeros(t.shape, dtype=torch.bool, device=t.device))
            continue
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"observed[{i}] must be None or a boolean tensor, got {type(mask).__name__}")
        require_dense(f"observed[{i}]", mask, t)
        require_broadcast(f"observed[{i}]", mask, t)
        parts.append(mask.expand(t.shape))
    return torch.cat([per_chain(part) for part in parts], dim=1).to(torch.uint8)
