"""The chain a step at a time: the gradient of the user's energy, one fused update, and what options ask for between."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmebm import noise
from mmebm.ops import langevin_step as op
from mmebm.reference.langevin_step import per_chain, widen
from mmebm.samplers import metropolis
from mmebm.samplers.call import where
from mmebm.samplers.gradient import Target, one_per_chain
from mmebm.samplers.modes import modules_of, sampling
from mmebm.samplers.problem import Problem, Run

if TYPE_CHECKING:
    from mmebm.samplers.langevin import Langevin


def run(sampler: Langevin, p: Problem, tensors: list[Tensor]) -> Run:
    """The loop, from ``tensors``, which stay as they are."""
    chains, device = tensors[0].shape[0], tensors[0].device
    modules = modules_of(p.energy, *p.calls[0])
    plain = p.steps - p.differentiable
    # with all steps differentiable, the graph reaches back to the given state
    x = [t.clone() if p.differentiable and not plain else t.detach().clone() for t in tensors]
    loop = Loop(sampler, p, x)
    # a network need not take an empty batch
    steps = range(p.steps if chains else 0)
    with torch.no_grad(), sampling(modules, sampler.mode):
        for k in steps[:plain]:
            x = loop.step(k, x)
    if p.differentiable:
        loop.cached = None  # has no graph
        with torch.enable_grad(), sampling(modules, sampler.mode, once=False):
            for k in steps[plain:]:
                x = loop.step(k, x, create_graph=True)
    empty = torch.zeros(p.steps, chains, dtype=torch.float32, device=device)
    trace = {name: torch.stack(rows) if rows else empty for name, rows in loop.trace.items()}
    frozen = None if loop.alive is None else ~loop.alive
    return Run(x, trace, loop.kept, frozen, loop.backend, loop.reason)


class Loop:
    """The steps of one run: holds what goes along the chain (records, frozen chains, the cached energy)."""

    def __init__(self, sampler: Langevin, problem: Problem, tensors: list[Tensor]) -> None:
        p = problem
        self.sampler, self.problem = sampler, problem
        self.target = Target(
            p.energy, p.calls, p.keys, p.build, (), [False] * len(tensors), log_prob=sampler.log_prob,
            score=sampler.score,
        )  # fmt: skip
        self.params = [[[row[i] for i in group] for group in p.blocks] for row in p.params]
        self.steppers: list[op.Stepper] = []
        self.references: list[op.Stepper] = []
        self.backend, self.reason = "torch", "nothing to update"
        for group in p.blocks:
            options = op.StepOptions(
                seed=p.seed, streams=tuple(group), noisy=tuple(p.noisy[i] for i in group), chain_offset=p.chain_offset,
                norm_over=sampler.norm_over, outside=sampler.outside, clamp_noise=sampler.clamp_noise,
                observed=tuple(self._mask(i) for i in group), rng=sampler.rng, generator=p.generator,
            )  # fmt: skip
            chosen, self.reason = op.stepper(
                sampler.backend, [tensors[i].detach() for i in group], options, [p.params[0][i] for i in group]
            )
            self.backend = chosen.name
            self.steppers.append(chosen)
            self.references.append(chosen if chosen.name == "torch" else op.TorchStepper(options))
        chains, device = tensors[0].shape[0], tensors[0].device
        self.trace: dict[str, list[Tensor]] = {name: [] for name in p.record}
        self.kept: list[Tensor] = []
        if p.thin:
            # pinned, so that the copies do not hold up the steps
            home: dict[str, Any] = {"device": "cpu", "pin_memory": device.type == "cuda"} if p.offload else {}
            self.kept = [torch.empty(p.steps // p.thin, *t.shape, dtype=t.dtype, **{"device": device, **home})
                         for t in tensors]  # fmt: skip
        self.alive: Tensor | None = None
        if sampler.on_nonfinite == "freeze":
            self.alive = torch.ones(chains, dtype=torch.bool, device=device)
        # the accepted point's energy and gradients (by tensor) are the next update's: one gradient per update
        self.cached: tuple[Tensor | None, dict[int, Tensor]] | None = None
        self.moving = [i for group in p.blocks for i in group]
        self.reuses = sampler.accept is not None and len(p.calls) == 1
        self.temperatures: list[float | Tensor] = []
        if sampler.accept == "metropolis" and self.moving:
            names = [p.keys[i] for i in self.moving]
            self.temperatures = [metropolis.temperature([row[i] for i in self.moving], names) for row in p.params]
        # what a step must do besides the update, known before the chain starts
        self.noise_first = sampler.noise_at == "before"
        self.projects = any(function is not None for function in p.project)
        self.stats = any(name not in ("energy", "accepted") for name in p.record)
        self.wants_energy = "energy" in p.record or sampler.accept is not None
        revised = self.noise_first or self.projects or sampler.accept is not None or self.alive is not None
        self.measures = "displacement" in p.record and revised
        self.keeps_old = sampler.accept is not None or self.alive is not None or self.measures

    def _mask(self, i: int) -> Tensor | None:
        mask = self.problem.masks[i]
        return mask if isinstance(mask, Tensor) else None

    def step(self, k: int, x: list[Tensor], *, create_graph: bool = False) -> list[Tensor]:
        """Step ``k`` of this run; a new list."""
        p = self.problem
        x = list(x)
        totals: dict[str, Tensor] = {}
        if not p.blocks and "energy" in self.trace:
            totals["energy"] = self.target.value(x, k)
        for b in range(len(p.blocks)):
            self._update(b, k, x, totals, create_graph)
        for name, rows in self.trace.items():
            rows.append(
                totals[name] if name in totals else torch.zeros(x[0].shape[0], dtype=torch.float32, device=x[0].device)
            )
        if p.thin and (k + 1) % p.thin == 0:
            for rows, t in zip(self.kept, x, strict=True):
                rows[(k + 1) // p.thin - 1].copy_(t.detach(), non_blocking=p.offload)
        return x

    def _update(self, b: int, k: int, x: list[Tensor], totals: dict[str, Tensor], create_graph: bool) -> None:
        """One block's update, written into the list ``x``."""
        p, group = self.problem, self.problem.blocks[b]
        stepper = self.references[b] if create_graph else self.steppers[b]
        params = self.params[min(k, len(self.params) - 1)][b]
        position = p.first_step + k
        current = [x[i] for i in group]
        old = [t.clone() for t in current] if stepper.inplace and self.keeps_old else current
        if self.noise_first:
            current = stepper.perturb(current, params, position)
            for i, t in zip(group, current, strict=True):
                x[i] = t
        energy, slopes = self.cached if self.cached is not None else self._slopes(b, k, x, create_graph)
        grads = [slopes[i] for i in group]
        y, stats = stepper.step(current, grads, params, position, with_noise=not self.noise_first, stats=self.stats)
        if self.projects:
            y = [self._project(i, t) for i, t in zip(group, y, strict=True)]
        if self.alive is not None:
            for t in y:
                self.alive = self.alive & torch.isfinite(per_chain(t.detach())).all(dim=1)
            y = where(self.alive, y, old)
        if self.sampler.accept is not None:
            moved = self._accept(b, k, x, old, y, energy, slopes, create_graph)
            y = where(moved, y, old)
            if "accepted" in self.trace:
                totals["accepted"] = totals.get("accepted", 0) + moved.to(torch.float32) / len(p.blocks)
        for i, t in zip(group, y, strict=True):
            x[i] = t
        if energy is not None and "energy" in self.trace:
            # blocks: the energy at the step's first gradient
            totals.setdefault("energy", energy)
        if stats is not None:
            if self.measures:
                moved = [per_chain(widen(t.detach()) - widen(o.detach())) for t, o in zip(y, old, strict=True)]
                stats = dataclasses.replace(stats, displacement=torch.cat(moved, dim=1).norm(dim=1))
            for name in ("grad_norm", "displacement"):
                part = getattr(stats, name).detach()
                totals[name] = torch.hypot(totals[name], part) if name in totals else part
            for name in ("clipped", "nonfinite"):
                totals[name] = totals.get(name, 0) + getattr(stats, name)

    def _project(self, i: int, y: Tensor) -> Tensor:
        function = self.problem.project[i]
        if function is None:
            return y
        mask = self._mask(i)
        # a copy where something of y must stay, as the function may work in place
        out = function(y if mask is None else y.clone())
        if not isinstance(out, Tensor) or out.shape != y.shape or out.dtype != y.dtype:
            raise ValueError(f"project must return a tensor of shape {tuple(y.shape)} and {y.dtype}, got {out!r:.80}")
        if mask is not None:
            return torch.where(mask, y, out)
        # what the function returns may be the user's own tensor, and a stepper may overwrite the state
        return out if out is y else out.clone(memory_format=torch.contiguous_format)

    def _slopes(self, b: int, k: int, x: list[Tensor], create_graph: bool) -> tuple[Tensor | None, dict[int, Tensor]]:
        """The energy per chain and its gradient by tensor: block ``b``'s, or all where the next block can use them."""
        wanted = self.moving if self.reuses else self.problem.blocks[b]
        energy, grads = self.target(x, k, moving=wanted, create_graph=create_graph, energy=self.wants_energy)
        if self.steppers[b].inplace:
            # a gradient may be the state itself, or a view of it, which the step writes to
            state = {t.untyped_storage().data_ptr() for t in x}
            grads = [g.clone() if g.untyped_storage().data_ptr() in state else g for g in grads]
        return energy, dict(zip(wanted, grads, strict=True))

    def _accept(
        self, b: int, k: int, x: list[Tensor], old: list[Tensor], y: list[Tensor], energy: Tensor | None,
        slopes: dict[int, Tensor], create_graph: bool,
    ) -> Tensor:  # fmt: skip
        """The chains that move from ``old`` to ``y``: boolean (chains,)."""
        group = self.problem.blocks[b]
        energy = one_per_chain(f'accept="{self.sampler.accept}"', energy)
        trial = list(x)
        for i, t in zip(group, y, strict=True):
            trial[i] = t
        new_energy, new_slopes = self._slopes(b, k, trial, create_graph)
        assert new_energy is not None
        if self.sampler.accept == "descent":
            moved = new_energy < energy
        else:
            ratio = metropolis.log_ratio(
                old, y, [slopes[i] for i in group], [new_slopes[i] for i in group], energy, new_energy,
                self.params[min(k, len(self.params) - 1)][b], [self._mask(i) for i in group],
                self.temperatures[min(k, len(self.temperatures) - 1)], self.sampler.norm_over,
            )  # fmt: skip
            moved = self._uniform(b, k, ratio) < ratio.exp()
        if self.reuses:
            kept = where(moved, list(new_slopes.values()), list(slopes.values()))
            self.cached = torch.where(moved, new_energy, energy), dict(zip(slopes, kept, strict=True))
        return moved

    def _uniform(self, b: int, k: int, like: Tensor) -> Tensor:
        """The numbers in [0, 1) that decide about block ``b`` in step ``k``, one per chain."""
        p = self.problem
        if self.sampler.rng == "torch":
            return torch.rand(like.shape, dtype=like.dtype, device=like.device, generator=p.generator)
        return noise.uniform(
            like.shape, seed=p.seed, step=p.first_step + k, stream=noise.stream(p.blocks[b][0], noise.ACCEPT),
            chain_offset=p.chain_offset, dtype=like.dtype, device=like.device,
        )  # fmt: skip
