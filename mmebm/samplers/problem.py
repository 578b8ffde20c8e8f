"""One Langevin run with everything resolved: settings per tensor, chain and step; blocks; parts of the chains."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmebm.ops.params import StepParams
from mmebm.reference.langevin_step import clamp, widen
from mmebm.samplers.call import map_tensors
from mmebm.state import Key, Structure, broadcast, check_setting, per_key

if TYPE_CHECKING:
    from mmebm.samplers.langevin import Langevin

# The numbers of a step, and what each may be (see check_setting).
NUMBERS: dict[str, dict[str, Any]] = {
    "step_size": {}, "noise_scale": {}, "temperature": {}, "grad_clip": {}, "grad_norm_clip": {"strict": True},
    "max_update": {}, "prior_std": {"strict": True},
}  # fmt: skip
REQUIRED = ("step_size", "noise_scale", "temperature")
BOUND: dict[str, Any] = {"low": -math.inf}


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
    params: list[list[StepParams]]
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
    """What a chain returns, tensor by tensor. ``frozen``: bool (chains,), or ``None``. ``op``: that ran it."""

    state: list[Tensor]
    trace: dict[str, Tensor]
    trajectory: list[Tensor]
    frozen: Tensor | None
    backend: str
    reason: str
    op: str = "langevin_step"


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


def params_of(
    sampler: Langevin, keys: tuple[Key, ...], tensors: list[Tensor], first_step: int | Tensor, steps: int
) -> tuple[list[list[StepParams]], list[bool]]:
    """The constants of every tensor, one row for all steps or, with schedules, one per step; and who gets noise."""
    settings = {name: per_key(name, getattr(sampler, name), keys, required=name in REQUIRED) for name in NUMBERS}
    pairs = [pair or (None, None) for pair in per_key("bounds", sampler.bounds, keys, required=False)]
    settings["low"], settings["high"] = [pair[0] for pair in pairs], [pair[1] for pair in pairs]

    def value(name: str, i: int, k: int) -> Any:
        setting = settings[name][i]
        label = {"low": "bounds", "high": "bounds"}.get(name, name) + (f"[{keys[i]!r}]" if len(keys) > 1 else "")
        if callable(setting):
            setting, label = setting(k), f"{label} at step {k}"
            if setting is None and name in ("step_size", "temperature"):
                raise TypeError(f"{label} must be a number or a tensor, got None")
            if setting is not None:
                check_setting(label, setting, **NUMBERS.get(name, BOUND))
        if setting is None:
            return None
        out = broadcast(label, setting, tensors[i], widen(tensors[i][:0]).dtype)
        if name == "grad_norm_clip" and isinstance(out, Tensor):
            per_chain_allowed = sampler.norm_over == "chain" and out.dim() > 0 and out.numel() == out.shape[0]
            if out.numel() != 1 and not per_chain_allowed:
                raise ValueError(f"{label} limits a norm, of each chain or of the whole tensor, got {tuple(out.shape)}")
        return out

    def constants(i: int, k: int) -> StepParams:
        now = {name: value(name, i, k) for name in settings}
        temperature, low, high = now.pop("temperature"), now["low"], now["high"]
        if now["noise_scale"] is None:
            product = 2 * now["step_size"] * temperature
            now["noise_scale"] = product.sqrt() if isinstance(product, Tensor) else math.sqrt(product)
        if low is not None and high is not None:
            inverted = low > high
            # reading a tensor elsewhere would wait for its device
            if bool(inverted.is_cpu and inverted.any()) if isinstance(inverted, Tensor) else inverted:
                raise ValueError(f"bounds must have low <= high, got {low!r} and {high!r}")
        return StepParams(**now)

    def silent(name: str, i: int) -> bool:
        constant = settings[name][i]
        return not (constant is None or callable(constant) or isinstance(constant, Tensor)) and float(constant) == 0.0

    noisy = [
        not (silent("noise_scale", i) or (settings["noise_scale"][i] is None and silent("temperature", i)))
        for i in range(len(keys))
    ]
    if not any(callable(setting) for column in settings.values() for setting in column):
        return [[constants(i, 0) for i in range(len(keys))]], noisy
    if isinstance(first_step, Tensor):
        raise ValueError("first_step must be an int where a setting is a function of the step, got a tensor")
    # evaluated before the chain starts, so that no step waits for a copy to the device
    return [[constants(i, first_step + k) for i in range(len(keys))] for k in range(max(steps, 1))], noisy


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
        params=[[cut_params(p) for p in row] for row in problem.params],
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
        infos[0],
    )


def clamp_at_end(p: Problem, i: int, x: Tensor) -> Tensor:
    """Tensor ``i`` clamped to its bounds at the end of the chain, where not observed."""
    end, mask = p.ends[i], p.masks[i]
    if mask is True:
        return x
    y = clamp(widen(x), end.low, end.high).to(x.dtype)
    return torch.where(mask, x, y) if isinstance(mask, Tensor) else y
