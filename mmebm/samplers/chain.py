"""One run of a chain with everything resolved, and what it returns: what an engine takes and gives.

An engine is a function ``run(problem, tensors) -> Run``; one that may decline returns the reason instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mmebm.ops.common.layout import widen
from mmebm.ops.common.params import StepParams, StepRows
from mmebm.ops.langevin_step.reference import clamp
from mmebm.samplers.arithmetic import map_tensors
from mmebm.samplers.watch import Watch
from mmebm.state import Key, Structure


@dataclass(frozen=True)
class Problem:
    """One run of a chain. ``calls`` and ``params`` have an entry per step, or one for all steps.

    Attributes:
        sampler: the description (:class:`mmebm.Langevin`, :class:`mmebm.HMC`, ...), whose options the engines read.
        energy, calls: the callable, and the (args, kwargs) that it is called with.
        keys, build: of the state, from :func:`mmebm.state.flatten`.
        masks: per tensor True (wholly observed), False, or a boolean mask of the observed elements.
        blocks: the indices of the tensors that move, in the blocks in which they do.
        carried: what the run before left, by the names of the sampler's engine; see :attr:`Run.carried`.
        params: the sampler's constants, of the tensors in the state's order.
        watch: what looks at the chain while it runs, and may end it; None where nobody does.
        project, noisy, chunk_size: Langevin's functions of each tensor, who gets noise at all, and how many chains are
            run at a time.
    """

    sampler: Any
    energy: Callable[..., Any]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    keys: tuple[Key, ...]
    build: Structure
    steps: int
    blocks: list[list[int]]
    masks: list[bool | Tensor]
    seed: int | Tensor
    generator: torch.Generator | None
    chain_offset: int
    first_step: int | Tensor
    record: tuple[str, ...]
    thin: int | None
    offload: bool
    differentiable: int
    carried: Mapping[str, Any] = field(default_factory=dict[str, Any])
    params: Sequence[Any] = ()
    project: list[Callable[[Tensor], Tensor] | None] = field(default_factory=list[Any])
    noisy: list[bool] = field(default_factory=list[bool])
    chunk_size: int | None = None
    watch: Watch | None = None

    @property
    def moving(self) -> list[int]:
        """The indices of the tensors that move."""
        return [i for group in self.blocks for i in group]

    def mask(self, i: int) -> Tensor | None:
        """The observed elements of a tensor that moves, or None."""
        mask = self.masks[i]
        return mask if isinstance(mask, Tensor) else None

    def draw(self, k: int, stream: int) -> dict[str, Any]:
        """Where the noise of step ``k`` of this run stands in a stream."""
        place = {"seed": self.seed, "step": self.first_step + k, "chain_offset": self.chain_offset}
        return {**place, "stream": stream}

    def row(self, k: int) -> Any:
        """The constants of step ``k`` of this run."""
        return self.params[min(k, len(self.params) - 1)]


@dataclass(frozen=True)
class Run:
    """What a chain returns, tensor by tensor.

    Attributes:
        trajectory: per tensor (steps // thin, chains, ...), or nothing.
        broken: bool (chains,), chains to be reported as non-finite whatever the state holds.
        info: what else is said of the run.
        carried: what the next step goes on from besides the state, given as :attr:`Problem.carried`.
    """

    state: list[Tensor]
    trace: dict[str, Tensor]
    trajectory: list[Tensor]
    broken: Tensor
    info: dict[str, Any]
    carried: dict[str, Any] = field(default_factory=dict[str, Any])

    def map(self, function: Callable[[Tensor], Tensor]) -> Run:
        """With ``function`` of every tensor that is handed out."""
        parts = {f.name: map_tensors(getattr(self, f.name), function) for f in dataclasses.fields(self)}
        return Run(**parts)


Engine: TypeAlias = Callable[[Problem, list[Tensor]], Run]


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
        chain_offset=problem.chain_offset + rows.start,
    )


def join(parts: Sequence[Run]) -> Run:
    """The results of the parts that :func:`cut` made, side by side."""
    first = parts[0]
    for name, rows in first.trace.items():
        if rows.dim() == 1:
            raise ValueError(f"record={name!r} with chunk_size needs one energy per chain, but it is a scalar")
    return Run(
        [torch.cat(column) for column in zip(*(part.state for part in parts), strict=True)],
        {name: torch.cat([part.trace[name] for part in parts], dim=1) for name in first.trace},
        [torch.cat(column, dim=1) for column in zip(*(part.trajectory for part in parts), strict=True)],
        torch.cat([part.broken for part in parts]),
        {
            name: torch.cat([part.info[name] for part in parts]) if isinstance(value, Tensor) else value
            for name, value in first.info.items()
        },
    )


def follow(before: Run, after: Run) -> Run:
    """The results of a chain that another engine went on with, where ``before`` ends."""
    info, done = dict(after.info), before.info["steps"]
    if "steps" in info:
        info["steps"] += done
    trace: dict[str, Tensor] = {}
    for name, rows in after.trace.items():
        first = before.trace[name]
        # an energy that became a scalar meanwhile
        trace[name] = torch.cat([first, rows if rows.dim() > 1 else rows.unsqueeze(1).expand(-1, first.shape[1])])
    trajectory = [torch.cat(pair) for pair in zip(before.trajectory, after.trajectory, strict=True)]
    return dataclasses.replace(after, trace=trace, trajectory=trajectory, info=info)


def clamp_at_end(end: StepParams, mask: bool | Tensor, x: Tensor) -> Tensor:
    """A tensor clamped to its bounds at the end of the chain, where not observed."""
    if mask is True:
        return x
    y = clamp(widen(x), end.low, end.high).to(x.dtype)
    return torch.where(mask, x, y) if isinstance(mask, Tensor) else y
