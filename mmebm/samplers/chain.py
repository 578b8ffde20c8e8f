"""One Langevin run with everything resolved: settings per tensor, chain and step; blocks; parts of the chains."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmebm.ops.common.params import StepNumbers, StepParams, StepRows, varies
from mmebm.ops.langevin_step.reference import clamp, widen
from mmebm.samplers.arguments import at_steps, map_tensors
from mmebm.state import Key, Structure, broadcast, check_range, per_key

if TYPE_CHECKING:
    from mmebm.samplers.langevin import Langevin

# The numbers of a step, and what each may be (see check_setting).
NUMBERS: dict[str, dict[str, Any]] = {
    "step_size": {}, "noise_scale": {}, "temperature": {}, "grad_clip": {}, "grad_norm_clip": {"strict": True},
    "max_update": {}, "prior_std": {"strict": True},
}  # fmt: skip
REQUIRED = ("step_size", "noise_scale", "temperature")
BOUND: dict[str, Any] = {"low": -math.inf}
# A prior so wide that x / prior_std^2 is below the smallest number of any dtype.
FLAT = 1e150


@dataclass(frozen=True)
class Problem:
    """One chain run with everything resolved. ``calls`` and ``params`` have an entry per step, or one for all steps."""

    energy: Callable[..., Any]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    keys: tuple[Key, ...]
    build: Structure
    steps: int
    blocks: list[list[int]]
    masks: list[bool | Tensor]
    params: Sequence[list[StepParams]]
    ends: list[StepParams]  # whose bounds hold at the end only; empty where they hold at every step
    project: list[Callable[[Tensor], Tensor] | None]
    noisy: list[bool]
    seed: int | Tensor
    generator: torch.Generator | None
    chain_offset: int
    first_step: int | Tensor
    record: tuple[str, ...]
    thin: int | None
    offload: bool
    differentiable: int


@dataclass(frozen=True)
class Run:
    """What a chain returns, tensor by tensor. ``frozen``: bool (chains,), chains to be reported as non-finite whatever
    the state holds; ``never_accepted``: bool (chains,), with ``accept``; or ``None``. ``op``: that ran it."""

    state: list[Tensor]
    trace: dict[str, Tensor]
    trajectory: list[Tensor]
    frozen: Tensor | None
    backend: str
    reason: str
    op: str = "langevin_step"
    never_accepted: Tensor | None = None


def blocks_of(blocks: Any, keys: tuple[Key, ...], masks: list[bool | Tensor]) -> list[list[int]]:
    """The indices of the tensors that move, in the blocks in which they do."""
    moving = [i for i in range(len(keys)) if masks[i] is not True]
    if blocks is None:
        return [moving] if moving else []
    if not isinstance(blocks, (list, tuple)):
        raise TypeError(f"blocks must be a list of keys or of collections of keys, got {blocks!r:.80}")
    if not all(isinstance(item, (str, int, list, tuple, Set)) for item in blocks):
        raise TypeError(f"blocks must be a list of keys or of collections of keys, got {blocks!r:.80}")
    groups = [[item] if isinstance(item, (str, int)) else list(item) for item in blocks]
    named = [key for group in groups for key in group]
    if len(named) != len(keys) or any(key not in named for key in keys):
        raise ValueError(f"blocks must hold each of {list(keys)} exactly once, got {groups}")
    # in state order within a block, whatever the order of a set
    members = [[i for i in moving if keys[i] in group] for group in groups]
    return [group for group in members if group]


def least(name: str, dtype: torch.dtype) -> float:
    """The least value of a setting that the step divides by, or by its square, in the arithmetic of ``dtype``."""
    if name == "prior_std":
        return torch.finfo(dtype).max ** -0.5
    return torch.finfo(dtype).tiny if NUMBERS.get(name, {}).get("strict") else 0.0


def params_of(
    sampler: Langevin, keys: tuple[Key, ...], tensors: list[Tensor], first_step: int | Tensor, steps: int
) -> tuple[StepRows, list[bool]]:
    """The constants of every tensor, one row for all steps or, with schedules, one per step; and who gets noise."""
    settings = {name: per_key(name, getattr(sampler, name), keys, required=name in REQUIRED) for name in NUMBERS}
    pairs = [pair or (None, None) for pair in per_key("bounds", sampler.bounds, keys, required=False)]
    settings["low"], settings["high"] = [pair[0] for pair in pairs], [pair[1] for pair in pairs]

    count = max(steps, 1)

    def value(name: str, label: str, i: int, setting: Any) -> Any:
        """One value of a setting as a float, or as a tensor that broadcasts."""
        if setting is None:
            return None
        dtype = widen(tensors[i][:0]).dtype
        if not isinstance(setting, Tensor):
            check_range(label, setting, dtype if name != "prior_std" else torch.float64, least=least(name, dtype))
            if name == "prior_std" and setting > FLAT:
                return None
        out = broadcast(label, setting, tensors[i], dtype)
        if name == "grad_norm_clip" and isinstance(out, Tensor):
            per_chain_allowed = sampler.norm_over == "chain" and out.dim() > 0 and out.numel() == out.shape[0]
            if out.numel() != 1 and not per_chain_allowed:
                raise ValueError(f"{label} limits a norm, of each chain or of the whole tensor, got {tuple(out.shape)}")
        return out

    def column(name: str, i: int) -> Any:
        setting = settings[name][i]
        label = {"low": "bounds", "high": "bounds"}.get(name, name) + (f"[{keys[i]!r}]" if len(keys) > 1 else "")
        if not callable(setting):
            return value(name, label, i, setting)
        if isinstance(first_step, Tensor):
            raise ValueError("first_step must be an int where a setting is a function of the step, got a tensor")
        needed = name in ("step_size", "temperature")
        # evaluated before the chain starts, so that no step waits for a copy to the device
        values = at_steps(label, setting, first_step, count, NUMBERS.get(name, BOUND), needed)
        if isinstance(values, StepNumbers):
            dtype = widen(tensors[i][:0]).dtype
            check_range(label, values.vector, dtype if name != "prior_std" else torch.float64, least=least(name, dtype))
            if name != "prior_std" or float(values.vector.max()) <= FLAT:
                return values
        return [value(name, f"{label} at step {k}", i, v) for k, v in enumerate(values, first_step)]

    def tied(a: Any, t: Any, s: Any = None) -> Any:
        """sqrt(2 a t), where there is no noise scale."""
        if s is not None:
            return s
        product = 2 * a * t
        root = product.sqrt() if isinstance(product, Tensor) else math.sqrt(product)
        if not isinstance(root, Tensor) and math.isinf(root):
            raise ValueError(f"2 step_size temperature must be a number, got {product!r} for {a!r} and {t!r}")
        return root

    def check_bounds(low: Any, high: Any) -> None:
        if low is None or high is None:
            return
        inverted = low > high
        # reading a tensor elsewhere would wait for its device
        if bool(inverted.any()) if isinstance(inverted, Tensor) and inverted.is_cpu else inverted is True:
            raise ValueError(f"bounds must have low <= high, got {low!r} and {high!r}")

    def columns(i: int) -> dict[str, Any]:
        now = {name: column(name, i) for name in settings}
        a, t, s = now["step_size"], now.pop("temperature"), now["noise_scale"]
        numbers = [c.vector if isinstance(c, StepNumbers) else c for c in (a, t)]
        if (
            s is None
            and any(isinstance(c, StepNumbers) for c in (a, t))
            and all(isinstance(c, (float, StepNumbers)) for c in (a, t))
        ):
            # products and roots of float64 are Python's
            now["noise_scale"] = StepNumbers(tied(*numbers))
        else:
            now["noise_scale"] = along(tied, a, t, s)
        along(check_bounds, now["low"], now["high"])
        return now

    def silent(name: str, i: int) -> bool:
        constant = settings[name][i]
        return not (constant is None or callable(constant) or isinstance(constant, Tensor)) and float(constant) == 0.0

    noisy = [
        not (silent("noise_scale", i) or (settings["noise_scale"][i] is None and silent("temperature", i)))
        for i in range(len(keys))
    ]
    return StepRows([columns(i) for i in range(len(keys))], count), noisy


def along(function: Callable[..., Any], *columns: Any) -> Any:
    """``function`` of columns of settings step by step: a list where any of them is one, else of the values."""
    steps = next((len(column) for column in columns if varies(column)), None)
    if steps is None:
        return function(*columns)
    return [function(*row) for row in zip(*(c if varies(c) else [c] * steps for c in columns), strict=True)]


def cut(problem: Problem, chains: int, rows: slice) -> Problem:
    """The problem of some of the chains."""

    def cut(value: Any) -> Any:
        return value[rows] if isinstance(value, Tensor) and value.dim() and value.shape[0] == chains else value

    def cut_params(p: StepParams) -> StepParams:
        return StepParams(**{field.name: cut(getattr(p, field.name)) for field in dataclasses.fields(p)})

    return dataclasses.replace(
        problem,
        calls=map_tensors(problem.calls, cut),
        masks=[mask if isinstance(mask, bool) else mask[rows] for mask in problem.masks],
        params=problem.params.map(lambda _, value: cut(value))
        if isinstance(problem.params, StepRows)
        else [[cut_params(p) for p in row] for row in problem.params],
        ends=[cut_params(p) for p in problem.ends],
        chain_offset=problem.chain_offset + rows.start,
    )


def join(parts: list[Any]) -> Any:
    """The results of the parts that :func:`cut` made, side by side."""
    states, traces, trajectories, broken, infos = zip(*parts, strict=True)
    for name, rows in traces[0].items():
        if rows.dim() == 1:
            raise ValueError(f"record={name!r} with chunk_size needs one energy per chain, but it is a scalar")
    return (
        [torch.cat(column) for column in zip(*states, strict=True)],
        {name: torch.cat([trace[name] for trace in traces], dim=1) for name in traces[0]},
        [torch.cat(column, dim=1) for column in zip(*trajectories, strict=True)],
        torch.cat(broken),
        {
            name: torch.cat([info[name] for info in infos]) if isinstance(value, Tensor) else value
            for name, value in infos[0].items()
        },
    )


def clamp_at_end(p: Problem, i: int, x: Tensor) -> Tensor:
    """Tensor ``i`` clamped to its bounds at the end of the chain, where not observed."""
    end, mask = p.ends[i], p.masks[i]
    if mask is True:
        return x
    y = clamp(widen(x), end.low, end.high).to(x.dtype)
    return torch.where(mask, x, y) if isinstance(mask, Tensor) else y
