"""One call of a chain, taken apart into what a graph has baked in and the tensors that it reads."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from mmebm.ops.common.layout import widen
from mmebm.ops.common.params import StepParams
from mmebm.samplers.arithmetic import map_tensors
from mmebm.samplers.capture.key import Identity, parts_of
from mmebm.samplers.chain import Problem

# Step sizes and noise scales are read from memory, so that another number is no other graph; the rest is baked in.
_STATIC = ("step_size", "noise_scale")
# Options of a sampler that its loop reads.
_OPTIONS = ("noise_at", "clamp_noise", "norm_over", "outside", "accept", "log_prob", "score", "mode", "rng", "backend")
_SETTINGS = [f.name for f in fields(StepParams)]


def _tf32() -> tuple[Any, ...]:
    try:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError as error:  # set by the names of another version of the interface
        return (str(error),)


def _numerics(device: torch.device) -> tuple[Any, ...]:
    """torch's global switches that choose kernels."""
    kind = device.type
    return (
        torch.is_autocast_enabled(kind),
        torch.get_autocast_dtype(kind),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        *_tf32(),
        os.environ.get("MMEBM_BACKEND"),
    )


class Call:
    """One call of a chain, taken apart: ``identity`` of what a graph has baked in, and the values that it has not."""

    def __init__(self, p: Problem, tensors: list[Tensor]) -> None:
        sampler = p.sampler
        self.problem: Problem = p
        self.device: torch.device = tensors[0].device
        self.rebuild: Callable[[Any], Callable[..., Any]]
        self.rebuild, parts, fixed = parts_of(p.energy)
        self.tree: dict[str, Any] = {"state": tensors, "calls": p.calls, "parts": parts, "masks": p.masks}
        self.numbers: dict[torch.dtype, list[float]] = {}
        # the ratio of Metropolis takes the temperature in double precision, which a number is and a tensor is not
        self.static: tuple[str, ...] = () if sampler.accept == "metropolis" else _STATIC
        made = Identity(self.device, training=sampler.mode == "keep")
        self.identity: Identity = made
        made.both(
            self.device,
            _numerics(self.device),
            tuple(getattr(sampler, name) for name in _OPTIONS),
            sampler.on_nonfinite == "freeze",
            type(p.build(tensors)),
            p.keys,
            p.steps,
            tuple(map(tuple, p.blocks)),
            tuple(p.noisy),
            p.record,
            p.thin,
        )
        made.full.append(p.chain_offset)
        made.add(fixed)
        made.add(list(p.project))
        made.input(self.tree)
        dtypes = [widen(t[:0]).dtype for t in tensors]
        made.both(len(p.params))
        for row in p.params:
            for dtype, one in zip(dtypes, row, strict=True):
                for name in _SETTINGS:
                    value = getattr(one, name)
                    if isinstance(value, Tensor):
                        made.tensor_input(value)
                    elif value is not None and name in self.static:
                        self.numbers.setdefault(dtype, []).append(value)
                        made.both("number")
                    else:
                        made.add(value)
        self.dtypes = dtypes

    def keys(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """(full, kind); see :class:`Identity`."""
        return tuple(self.identity.full), tuple(self.identity.kind)


def _signed64(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


@dataclass
class Static:
    """The tensors a graph reads, and the chain on them."""

    inputs: list[Tensor]
    numbers: dict[torch.dtype, Tensor]
    seed: Tensor
    first_step: Tensor
    written: dict[torch.dtype, list[float]] = field(default_factory=dict[torch.dtype, list[float]])

    @classmethod
    def like(cls, call: Call) -> Static:
        """Of the call's shapes; nothing is in them yet but the inputs."""
        device = call.device
        word = torch.zeros((), dtype=torch.int64, device=device)
        return cls(
            [t.detach().clone().requires_grad_(t.requires_grad) for t in call.identity.inputs],
            {dtype: torch.zeros(len(v), dtype=dtype, device=device) for dtype, v in call.numbers.items()},
            word,
            word.clone(),
        )

    def fill(self, call: Call) -> None:
        """The call's values, written in place."""
        with torch.no_grad():
            for mine, given in zip(self.inputs, call.identity.inputs, strict=True):
                mine.copy_(given)
            for dtype, values in call.numbers.items():
                if self.written.get(dtype) != values:
                    self.numbers[dtype].copy_(torch.tensor(values, dtype=dtype, device="cpu"), non_blocking=True)
                    self.written[dtype] = list(values)
            for mine, given in ((self.seed, call.problem.seed), (self.first_step, call.problem.first_step)):
                if isinstance(given, Tensor):
                    mine.copy_(given.reshape(()))
                else:
                    mine.fill_(_signed64(given))

    def problem(self, call: Call) -> tuple[Problem, list[Tensor]]:
        """The call's chain, with every tensor replaced by a static one."""
        place = {id(t): mine for t, mine in zip(call.identity.inputs, self.inputs, strict=True)}

        def mine(t: Tensor) -> Tensor:
            return place.get(id(t), t)

        tree = map_tensors(call.tree, mine)
        left = {dtype: iter(t.unbind()) for dtype, t in self.numbers.items()}

        def settings(dtype: torch.dtype, one: StepParams) -> StepParams:
            found: dict[str, Any] = {}
            for name in _SETTINGS:
                value = getattr(one, name)
                if isinstance(value, Tensor):
                    value = mine(value)
                elif value is not None and name in call.static:
                    value = next(left[dtype])
                found[name] = value
            return StepParams(**found)

        p = call.problem
        rows = [[settings(dtype, one) for dtype, one in zip(call.dtypes, row, strict=True)] for row in p.params]
        p = replace(
            p,
            energy=call.rebuild(tree["parts"]),
            calls=tree["calls"],
            masks=tree["masks"],
            params=rows,
            seed=self.seed,
            first_step=self.first_step,
        )
        return p, tree["state"]
