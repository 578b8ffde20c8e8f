"""Langevin's step: the gradient of the user's energy, one fused update, and what options ask for between."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmebm import noise
from mmebm.ops import dynamics
from mmebm.ops import langevin_step as op
from mmebm.ops import noise as drawn
from mmebm.ops.common.layout import per_chain, widen
from mmebm.ops.common.params import StepParams
from mmebm.samplers import driver, metropolis
from mmebm.samplers.arithmetic import finite_chains, masked, where
from mmebm.samplers.chain import Problem, Run
from mmebm.samplers.driver import Steps
from mmebm.samplers.gradient import Target, one_per_chain, uses


def run(p: Problem, tensors: list[Tensor]) -> Run:
    """The chain a step at a time, from ``tensors``, which stay as they are."""
    return driver.loop(LangevinSteps, p, tensors)


class LangevinSteps(Steps):
    """The steps of one run: holds what goes along the chain (frozen chains, the cached energy)."""

    backend: str
    reason: str
    differentiates: bool

    def __init__(self, p: Problem, tensors: list[Tensor]) -> None:
        sampler = p.sampler
        if sampler.accept == "metropolis":  # whose test takes no state in channels_last, which a stepper would keep
            tensors = [t.contiguous() for t in tensors]
        super().__init__(p, tensors)
        # the update takes the sign of a log density's gradient; the Metropolis test wants dE/dx
        score = (sampler.log_prob or sampler.score) and sampler.accept is None
        self.target: Target = Target.of(p, downhill=not score, moves=True)
        self.params: list[list[list[Any]]] = [[[row[i] for i in group] for group in p.blocks] for row in p.params]
        self.steppers: list[op.Stepper] = []
        self.references: list[op.Stepper] = []
        self.backend, self.reason = "torch", "nothing to update"
        for group in p.blocks:
            options = op.StepOptions(
                seed=p.seed,
                streams=tuple(group),
                noisy=tuple(p.noisy[i] for i in group),
                chain_offset=p.chain_offset,
                norm_over=sampler.norm_over,
                outside=sampler.outside,
                clamp_noise=sampler.clamp_noise,
                score=score,
                observed=tuple(p.mask(i) for i in group),
                rng=sampler.rng,
                generator=p.generator,
            )
            chosen, self.reason = op.stepper(
                sampler.backend, [tensors[i].detach() for i in group], options, [p.params[0][i] for i in group]
            )
            self.backend = chosen.name
            self.steppers.append(chosen)
            self.references.append(chosen if chosen.name == "torch" else op.TorchStepper(options))
        # where state, energy and gradient were finite so far; with `accept`, unless frozen, where they are now
        every = torch.ones(self.chains, dtype=torch.bool, device=self.device)
        self.alive = p.carried["alive"].clone() if "alive" in p.carried else every
        # who was accepted at all
        self.ever: Tensor | None = torch.zeros_like(self.alive) if sampler.accept is not None else None
        # the accepted point's energy and gradients (by tensor) are the next update's: one gradient per update
        self.cached: tuple[Tensor | None, dict[int, Tensor]] | None = None
        self.moving: list[int] = p.moving
        self.reuses: bool = sampler.accept is not None and len(p.calls) == 1
        self.temperatures: list[float | Tensor] = []
        if sampler.accept == "metropolis" and self.moving:
            names = [p.keys[i] for i in self.moving]
            self.temperatures = [metropolis.temperature([row[i] for i in self.moving], names) for row in p.params]
        # what a step must do besides the update, known before the chain starts
        self.noise_first: bool = sampler.noise_at == "before"
        self.projects: bool = any(function is not None for function in p.project)
        self.stats: bool = any(name not in ("energy", "accepted") for name in p.record)
        self.wants_energy: bool = not sampler.score
        # what may make a finite update of a gradient that is not
        self.hides: bool = (
            self.projects
            or sampler.outside == "reject"
            or any(
                value is not None
                for row in p.params
                for c in row
                for value in (c.grad_clip, c.max_update, c.low, c.high)
            )
        )
        revised = self.noise_first or self.projects or sampler.accept is not None or self.freeze
        self.measures: bool = "displacement" in p.record and revised
        self.keeps_old: bool = sampler.accept is not None or self.freeze or self.measures
        self.test: dynamics.Proposals | None = self._test(tensors)
        self.olds: list[Tensor] = []
        self.differentiates = False
        if self.test is not None and self.freeze and "alive" in p.carried:
            self.test.set_alive(self.alive)

    def _test(self, tensors: list[Tensor]) -> dynamics.Proposals | None:
        """The Metropolis test in C++, or None where it runs in PyTorch."""
        p = self.problem
        if self.problem.sampler.accept != "metropolis" or len(p.blocks) != 1 or self.problem.sampler.rng != "philox":
            return None
        group = p.blocks[0]
        mine = [tensors[i] for i in group]
        # where they are tensors, a graph may be captured
        if isinstance(p.seed, Tensor) or isinstance(p.first_step, Tensor):
            return None
        if self.backend != "cpp" or p.differentiable or dynamics.reason(mine, p.seed, p.first_step) is not None:
            return None
        if not all(dynamics.Proposals.takes(row[0], mine) for row in self.params):
            return None
        return dynamics.Proposals(
            [t.shape for t in mine],
            [p.mask(i) for i in group],
            seed=drawn.plain(p.seed),
            stream=noise.stream(group[0], noise.ACCEPT),
            chain_offset=p.chain_offset,
            keep=self.reuses,
        )

    def step(self, k: int, *, create_graph: bool = False) -> Mapping[str, Tensor]:
        p, x = self.problem, list(self.x)
        if create_graph and not self.differentiates:
            self.differentiates, self.cached = True, None  # what is cached has no graph
        if self.changed:
            self.cached = None
        totals: dict[str, Tensor] = {}
        if not p.blocks and "energy" in p.record:
            totals["energy"] = self.target.value(x, k)
        for b in range(len(p.blocks)):
            self._update(b, k, x, totals, create_graph)
        self.x = x
        return totals

    def broken(self) -> Tensor:
        return ~self.alive

    def info(self) -> dict[str, Any]:
        moved = {} if self.ever is None else {"never_accepted": ~self.ever}
        return {"backend": self.backend, "op": "langevin_step", "reason": self.reason, **moved}

    def carried(self) -> dict[str, Any]:
        return {"alive": self.alive}

    def _update(self, b: int, k: int, x: list[Tensor], totals: dict[str, Tensor], create_graph: bool) -> None:
        """One block's update, written into the list ``x``."""
        p, group = self.problem, self.problem.blocks[b]
        stepper = self.references[b] if create_graph else self.steppers[b]
        params = self.params[min(k, len(self.params) - 1)][b]
        position = p.first_step + k
        current = [x[i] for i in group]
        old = self._copies(current) if stepper.inplace and self.keeps_old else current
        if self.noise_first:
            current = stepper.perturb(current, params, position)
            for i, t in zip(group, current, strict=True):
                x[i] = t
        energy, slopes = self.cached if self.cached is not None else self._slopes(b, k, x, create_graph)
        current, grads = [x[i] for i in group], [slopes[i] for i in group]
        self._judge(group, energy, grads)
        y, stats = stepper.step(current, grads, params, position, with_noise=not self.noise_first, stats=self.stats)
        if self.projects:
            y = [self._project(i, t) for i, t in zip(group, y, strict=True)]
        if self.problem.sampler.accept is None and self.freeze:
            for t in y:
                dynamics.finite_rows_(self.alive, t.detach())
            y = where(self.alive, y, old)
        if self.problem.sampler.accept is not None:
            if self.test is not None and "energy" in p.record and energy is not None:
                energy = energy.clone()  # accepted ones are written over it
            moved, y = self._accept(b, k, x, old, y, energy, slopes, create_graph)
            assert self.ever is not None
            self.ever.logical_or_(moved)
            if "accepted" in p.record:
                totals["accepted"] = totals.get("accepted", 0) + moved.to(torch.float32) / len(p.blocks)
        for i, t in zip(group, y, strict=True):
            x[i] = t
        if energy is not None and "energy" in p.record:
            # blocks: the energy at the step's first gradient
            totals.setdefault("energy", energy)
        if stats is not None:
            if self.measures:
                moved = [per_chain(widen(t.detach()) - widen(o.detach())) for t, o in zip(y, old, strict=True)]
                apart: Any = torch.cat(moved, dim=1)
                stats = dataclasses.replace(stats, displacement=apart.norm(dim=1))
            for name in ("grad_norm", "displacement"):
                part = getattr(stats, name).detach()
                totals[name] = torch.hypot(totals[name], part) if name in totals else part
            for name in ("clipped", "nonfinite"):
                totals[name] = totals.get(name, 0) + getattr(stats, name)

    def _copies(self, current: list[Tensor]) -> list[Tensor]:
        """The state before the step; with the test in C++ in memory of its own, as nothing of it is handed on."""
        if self.test is None:
            return [t.clone() for t in current]
        if not self.olds:
            self.olds = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in current]
        for to, t in zip(self.olds, current, strict=True):
            to.copy_(t)
        return self.olds

    def _judge(self, group: list[int], energy: Tensor | None, grads: list[Tensor]) -> None:
        """Marks the chains at whose state the energy or its gradient is not finite.

        Without clips, bounds and the like a gradient that is not makes a state that is not, which shows by itself. A
        scalar energy does not say which chain made it what it is.
        """
        energies = [energy.detach()] if energy is not None and energy.dim() else []
        if self.problem.sampler.accept is None:
            for t in (*energies, *(self._moving(group, grads) if self.hides or self.freeze else ())):
                dynamics.finite_rows_(self.alive, t)
        elif self.cached is None:
            sound = finite_chains([*energies, *self._moving(group, grads)], len(self.alive), self.alive.device)
            self.alive = self.alive & sound if self.freeze else sound

    def _moving(self, group: list[int], parts: Sequence[Tensor]) -> list[Tensor]:
        """One tensor for each of the block's, 0 where observed: what is there does not move the chain."""
        return [masked(self.problem.mask(i), t.detach()) for i, t in zip(group, parts, strict=True)]

    def _project(self, i: int, y: Tensor) -> Tensor:
        function = self.problem.project[i]
        if function is None:
            return y
        mask = self.problem.mask(i)
        before = uses(y)
        # a copy where something of y must stay, as the function may work in place
        out: Any = function(y if mask is None else y.clone())
        if not isinstance(out, Tensor) or out.shape != y.shape or out.dtype != y.dtype:
            raise ValueError(f"project must return a tensor of shape {tuple(y.shape)} and {y.dtype}, got {out!r:.80}")
        if mask is not None:
            return torch.where(mask, y, out)
        # what the function returns or keeps may be the user's own tensor, and a stepper may overwrite the state
        return out if out is y and uses(y) == before else out.clone(memory_format=torch.contiguous_format)

    def _slopes(self, b: int, k: int, x: list[Tensor], create_graph: bool) -> tuple[Tensor | None, dict[int, Tensor]]:
        """The energy per chain and its gradient by tensor: block ``b``'s, or all where the next block can use them.
        A tensor of ``x`` that the energy kept is replaced by a copy."""
        wanted = self.moving if self.reuses else self.problem.blocks[b]
        energy, grads = self.target(x, k, moving=wanted, create_graph=create_graph, energy=self.wants_energy)
        if self.steppers[b].inplace:
            # a gradient may be the state itself, or a view of it, which the step writes to
            state = {t.untyped_storage().data_ptr() for t in x}
            grads = [g.clone() if g.untyped_storage().data_ptr() in state else g for g in grads]
        return energy, dict(zip(wanted, grads, strict=True))

    def _accept(
        self,
        b: int,
        k: int,
        x: list[Tensor],
        old: list[Tensor],
        y: list[Tensor],
        energy: Tensor | None,
        slopes: dict[int, Tensor],
        create_graph: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        """The chains that move from ``old`` to ``y``, boolean (chains,), and the block's tensors then."""
        group = self.problem.blocks[b]
        energy = one_per_chain(f'accept="{self.problem.sampler.accept}"', energy)
        for i, t in zip(group, y, strict=True):
            x[i] = t
        new_energy, new_slopes = self._slopes(b, k, x, create_graph)
        y = [x[i] for i in group]
        assert new_energy is not None
        params = self.params[min(k, len(self.params) - 1)][b]
        ends = [new_slopes[i] for i in group]
        if self.test is not None and energy.dtype is new_energy.dtype is torch.float32:
            return self._tested(k, old, y, energy, slopes, new_energy, ends, params), y
        if self.problem.sampler.accept == "descent":
            moved = new_energy < energy
        else:
            starts, masks = [slopes[i] for i in group], [self.problem.mask(i) for i in group]
            t, norm_over = self._temperature(k), self.problem.sampler.norm_over
            ratio = metropolis.log_ratio(old, y, starts, ends, energy, new_energy, params, masks, t, norm_over)
            moved = self._uniform(b, k, ratio) < ratio.exp()
        # a broken proposal is never accepted, nor does a frozen chain move
        parts = [new_energy.detach(), *self._moving(group, y), *self._moving(group, ends)]
        moved = moved & finite_chains(parts, len(moved), moved.device)
        if self.freeze:
            moved = moved & self.alive
        self.alive = self.alive if self.freeze else self.alive | moved
        if self.reuses:
            kept = where(moved, list(new_slopes.values()), list(slopes.values()))
            self.cached = torch.where(moved, new_energy, energy), dict(zip(slopes, kept, strict=True))
        return moved, where(moved, y, old)

    def _tested(
        self,
        k: int,
        old: list[Tensor],
        y: list[Tensor],
        energy: Tensor,
        slopes: dict[int, Tensor],
        new_energy: Tensor,
        ends: list[Tensor],
        params: list[StepParams],
    ) -> Tensor:
        """The Metropolis test in C++: rejected chains of ``y`` are those of ``old`` again."""
        assert self.test is not None
        starts = list(slopes.values())
        if self.cached is None:
            # accepted chains' energies and gradients are written over them
            energy, starts = energy.clone(), [t.contiguous().clone() for t in starts]
            if self.freeze:
                self.test.set_alive(self.alive)
        elif self.cached[0] is not None:
            energy = self.cached[0]
        self.test.set(params, y, self._temperature(k))
        self.test.decide(old, y, starts, ends, energy, new_energy, drawn.plain(self.problem.first_step) + k)
        moved = self.test.accepted
        if not self.freeze:
            self.alive.logical_or_(moved)
        if self.reuses:
            self.cached = energy, dict(zip(slopes, starts, strict=True))
        return moved

    def _temperature(self, k: int) -> float | Tensor:
        return self.temperatures[min(k, len(self.temperatures) - 1)]

    def _uniform(self, b: int, k: int, like: Tensor) -> Tensor:
        """The numbers in [0, 1) that decide about block ``b`` in step ``k``, one per chain."""
        p = self.problem
        if self.problem.sampler.rng == "torch":
            return torch.rand(like.shape, dtype=like.dtype, device=like.device, generator=p.generator)
        draw = noise if isinstance(p.seed, Tensor) or isinstance(p.first_step, Tensor) else drawn
        place = p.draw(k, noise.stream(p.blocks[b][0], noise.ACCEPT))
        return draw.uniform(like.shape, **place, dtype=like.dtype, device=like.device)
