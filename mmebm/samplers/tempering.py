"""Parallel tempering: a ladder of temperatures as a batch dimension, with exchanges between neighbours."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mmebm import noise
from mmebm.ops import noise as drawn
from mmebm.ops.common.params import StepOptions, StepParams
from mmebm.ops.dynamics import Proposals, energies, exchange, reason
from mmebm.ops.langevin_step import CppStepper
from mmebm.ops.noise import plain
from mmebm.samplers.arguments import (
    NONFINITE,
    Call,
    NonFinite,
    Recorder,
    Samples,
    choice,
    finite_chains,
    leaves,
    map_tensors,
    per_chain_shape,
    resolve,
    running,
    where,
)
from mmebm.samplers.gradient import Target, one_per_chain
from mmebm.samplers.metropolis import log_ratio
from mmebm.samplers.opaque import opaque
from mmebm.samplers.user_modules import Mode
from mmebm.state import State, check_setting, flag, flatten, integer, per_key

RECORDS = ("energy", "ladder_energy", "accept_prob", "swap_prob", "replica")


@dataclass(frozen=True)
class ParallelTempering:
    """An immutable description of parallel tempering with Langevin steps; :meth:`sample` runs it.

    Every chain has a replica at each of R temperatures. A step moves all replicas of all chains, with one call of the
    energy on (chains * R, ...) rows and one gradient, by x - a dE/dx + sqrt(2 a T) xi, and then tries to exchange
    neighbours: pairs (0, 1), (2, 3), ... and pairs (1, 2), (3, 4), ... in turn, each with probability
    min(1, exp((1 / T_r - 1 / T_r+1) (E_r - E_r+1))). The result is the replicas at the first temperature.

    Args:
        step_size: ``a``, the coefficient of the gradient: a number, a sequence or 1-D tensor of R numbers, one per
            temperature, or a mapping from the state's keys to such.
        temperatures: R increasing numbers, of the targets exp(-E / T); the first is the one that is wanted. Neighbours
            must be close: exchanges are rare once T_r+1 / T_r - 1 is above about sqrt(2 / elements).
        swap_every: try exchanges after every so many steps.
        accept: "metropolis", so that every temperature has its exact law, or None, Langevin steps with their bias.
        log_prob: the callable returns log p instead of E.
        mode: modules found in the energy run in "eval" or "train" mode or as they are ("keep"); restored afterwards.
        on_nonfinite: where a replica's state, energy or gradient is not finite, it is not exchanged, and its chain is
            reported in ``info``: "warn" once, "ignore", "freeze" the replica where it is, or "raise" at the end.

    Raises:
        TypeError, ValueError: naming the argument, the value and what would do.
    """

    step_size: Any
    temperatures: Sequence[float]
    _: dataclasses.KW_ONLY
    swap_every: int = 1
    accept: Literal["metropolis"] | None = "metropolis"
    log_prob: bool = False
    mode: Mode = "eval"
    on_nonfinite: NonFinite = "warn"

    def __post_init__(self) -> None:
        choice("mode", self.mode, ("eval", "train", "keep"))
        flag("log_prob", self.log_prob)
        choice("on_nonfinite", self.on_nonfinite, NONFINITE)
        choice("accept", self.accept, ("metropolis", None))
        integer("swap_every", self.swap_every, 1)
        given = self.temperatures
        if isinstance(given, (str, Mapping)) or not hasattr(given, "__len__") or not hasattr(given, "__iter__"):
            raise TypeError(f"temperatures must be a sequence of increasing numbers, got {given!r:.80}")
        try:
            ladder = tuple(float(t) for t in given)
        except (TypeError, ValueError, RuntimeError):  # the last, of tensors without numbers
            raise TypeError(f"temperatures must be a sequence of increasing numbers, got {given!r:.80}") from None
        increasing = all(a < b for a, b in itertools.pairwise(ladder))
        if not ladder or not increasing or not (0 < ladder[0] and ladder[-1] < math.inf):
            raise ValueError(f"temperatures must be increasing, positive and finite, got {ladder}")
        object.__setattr__(self, "temperatures", ladder)
        for label, leaf in leaves("step_size", self.step_size) or [("step_size", None)]:
            self._rungs(label, leaf)

    def replace(self, **changes: Any) -> ParallelTempering:
        """A copy with some options changed."""
        return dataclasses.replace(self, **changes)

    def _rungs(self, label: str, value: Any) -> float | Tensor:
        """A step size as a number, or as a 1-D tensor with one per temperature."""
        if isinstance(value, Tensor) and value.dim() == 0:
            check_setting(label, value, strict=True)
            return value.reshape(1).expand(len(self.temperatures))
        if not isinstance(value, (list, tuple, Tensor)):
            check_setting(label, value, strict=True)
            return float(value)
        for item in [value] if isinstance(value, Tensor) else value:
            check_setting(label, item, strict=True)
        out = value
        if not isinstance(out, Tensor):
            out = torch.tensor([float(item) for item in value], dtype=torch.float64, device="cpu")
        if out.shape != (len(self.temperatures),):
            raise ValueError(
                f"{label} must be a number or one per temperature ({len(self.temperatures)},), got shape "
                f"{tuple(out.shape)}"
            )
        return out

    @opaque
    def sample(
        self,
        energy: Callable[..., Any],
        state: State,
        steps: int,
        *,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        observed: Any = None,
        ladder: Any = None,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
        chain_offset: int = 0,
        first_step: int = 0,
        record: Collection[str] = (),
        thin: int | None = None,
        inplace: bool = False,
    ) -> Samples:
        """Runs ``steps`` steps. What is not named here is as in :meth:`mmebm.Langevin.sample`.

        Args:
            energy: returns one value per row, of that row only; the rows are chain 0 at all temperatures, then chain 1.
            state: as there, in float32 or float64; every replica of a chain starts from it.
            args, kwargs: tensors among them (also inside lists, tuples and dicts) whose first dimension is the number
                of chains are repeated for the replicas.
            ladder: where the replicas start instead: ``out.info["ladder"]`` of the run before, in the state's structure
                of (chains, R, ...). K1 steps and then K2 with ``first_step=K1`` and the ladder equal K1 + K2.
            record: any of "energy" (at the first temperature, before the step), "ladder_energy" (the same at all R),
                "accept_prob" (of the move, R), "swap_prob" (of the exchange of r and r + 1, R - 1; NaN where it was not
                tried) and "replica" (which of the run's R replicas is at which temperature after the step). The last
                four have shape (steps, chains, R or R - 1).

        Returns:
            :class:`~mmebm.Samples`; state and trajectory are those of the first temperature. ``info`` holds the
            ``ladder``, the mean probabilities ``acceptance`` (chains, R) and ``swap_acceptance`` (chains, R - 1), and
            ``never_accepted`` (chains, R): temperatures at which no move was accepted.

        Raises:
            TypeError, ValueError: naming the argument, the value and what would do.
            FloatingPointError: with ``on_nonfinite="raise"``, where a replica ended non-finite.
        """
        call = resolve(
            energy, state, steps, args=args, kwargs=kwargs, observed=observed, seed=seed, generator=generator,
            chain_offset=chain_offset, first_step=first_step, record=record, records=RECORDS, thin=thin,
            inplace=inplace,
        )  # fmt: skip
        first = call.first_step
        if isinstance(first, Tensor):
            raise ValueError("first_step must be an int, as it says which neighbours are next, got a tensor")
        rungs, chains, device = len(self.temperatures), call.chains, call.device
        sizes = per_key("step_size", self.step_size, call.keys, required=True)

        def repeat(t: Tensor) -> Tensor:
            return t.repeat_interleave(rungs, 0) if t.dim() and t.shape[0] == chains else t

        recorder = Recorder(call, {
            "ladder_energy": (rungs,), "accept_prob": (rungs,), "swap_prob": (rungs - 1,), "replica": (rungs,),
        })  # fmt: skip
        # what the energy sees: chains * rungs rows
        rows = dataclasses.replace(
            call, tensors=self._rows(call, ladder),
            masks=[mask if isinstance(mask, bool) else repeat(mask) for mask in call.masks],
        )  # fmt: skip
        with running(rows, self.mode, log_prob=self.log_prob, each=lambda pair: map_tensors(pair, repeat)) as target:
            x = [t.detach().clone() for t in rows.tensors]
            wide = x[0].dtype
            temperatures = torch.tensor(self.temperatures, dtype=wide, device=device)
            per_row = temperatures.repeat(chains)
            params = []
            for i in call.moving:
                size = self._rungs("step_size", sizes[i])
                if isinstance(size, Tensor):
                    size = per_chain_shape(size.to(device, x[i].dtype).repeat(chains), x[i])
                params.append(StepParams(size, (2 * size * per_chain_shape(per_row, x[i])).sqrt()))
            masks = [mask if isinstance(mask := rows.masks[i], Tensor) else None for i in call.moving]
            moves: _Ladders | None = None
            # a network need not take an empty batch
            for k in range(call.steps if chains else 0):
                if moves is None or target.varies:
                    e, g = target(x if moves is None else moves.x, k)
                    e = one_per_chain("ParallelTempering", e)
                    if moves is None:
                        moving = [x[i] for i in call.moving]
                        fast = (
                            moving and e.dtype is torch.float32 and reason(moving, call.seed, call.first_step) is None
                            and Proposals.takes(params, moving)
                        )  # fmt: skip
                        make = _CppLadders if fast else _Ladders
                        moves = make(self, call, target, x, params, masks, temperatures)
                    moves.restart(e, g)
                before = moves.energy.reshape(chains, rungs)
                if call.record:
                    before = before.clone()
                    recorder.add(energy=before[:, 0], ladder_energy=before)
                accept_prob = moves.move(k)
                count, due = divmod(first + k + 1, self.swap_every)
                swap_prob = moves.exchange((count - 1) % 2, k) if not due and rungs > 1 else None
                if call.record:
                    tried = torch.full_like(moves.swap_sum, math.nan) if swap_prob is None else swap_prob.clone()
                    recorder.add(accept_prob=accept_prob.clone(), swap_prob=tried, replica=moves.origin.clone())
                if call.thin and (k + 1) % call.thin == 0:
                    recorder.keep(k, self._cold(call, moves.x))
            accept_sum = torch.zeros(chains, rungs, dtype=wide, device=device)
            swap_sum = torch.zeros(chains, max(rungs - 1, 0), dtype=wide, device=device)
            ever = living = torch.ones(chains, rungs, dtype=torch.bool, device=device)
            if moves is not None:
                x, accept_sum, swap_sum, ever = moves.x, moves.accept_sum, moves.swap_sum, moves.ever
                living = moves.living.reshape(chains, rungs)
                for side in (0, 1):
                    # NaN where nothing was tried
                    swap_sum[:, side::2] /= moves.tried[side] or math.nan
            else:
                swap_sum = swap_sum * math.nan
            broken = ~(living & finite_chains(x, chains * rungs, device).reshape(chains, rungs)).all(1)
            return recorder.samples(
                self._cold(call, x), self.on_nonfinite, broken=broken,
                ladder=call.build([t.reshape(chains, rungs, *t.shape[1:]) for t in x]),
                acceptance=accept_sum / (call.steps or math.nan), swap_acceptance=swap_sum, never_accepted=~ever,
            )  # fmt: skip

    def _rows(self, call: Call, ladder: Any) -> list[Tensor]:
        """Where the replicas start, (chains * R, ...)."""
        rungs = len(self.temperatures)
        if ladder is None:
            return [t.detach().repeat_interleave(rungs, 0) for t in call.tensors]
        keys, parts, _ = flatten(ladder, "ladder")
        if keys != call.keys:
            raise ValueError(f"ladder must have the state's keys {list(call.keys)}, got {list(keys)}")
        for key, part, t in zip(keys, parts, call.tensors):
            wanted = (call.chains, rungs, *t.shape[1:])
            if part.shape != wanted or part.dtype != t.dtype or part.device != t.device:
                raise ValueError(
                    f"ladder[{key!r}] must be {wanted}, {t.dtype}, {t.device}, got {tuple(part.shape)}, {part.dtype}, "
                    f"{part.device}"
                )
        return [part.detach().flatten(0, 1) for part in parts]

    def _cold(self, call: Call, x: list[Tensor]) -> list[Tensor]:
        return [t.reshape(call.chains, len(self.temperatures), *t.shape[1:])[:, 0].clone() for t in x]


class _Ladders:
    """Moves and exchanges in PyTorch.

    Attributes:
        x, energy: the replicas, (chains * R, ...), and their energies.
        living: bool (chains * R,), where state, energy and gradient are finite now.
        accept_sum, swap_sum: the probabilities summed, (chains, R) and (chains, R - 1); tried: exchanges by side.
        ever: bool (chains, R), where any move was accepted. origin: int64 (chains, R), which replica is there.
    """

    def __init__(
        self, sampler: ParallelTempering, call: Call, target: Target, x: list[Tensor], params: list[StepParams],
        masks: list[Tensor | None], temperatures: Tensor,
    ) -> None:  # fmt: skip
        self.sampler, self.call, self.target, self.x, self.params, self.masks = sampler, call, target, x, params, masks
        rungs, chains, device = len(temperatures), call.chains, call.device
        self.rungs = rungs
        self.inverse = 1.0 / temperatures
        self.per_row = temperatures.repeat(chains)
        self.accept_sum = torch.zeros(chains, rungs, dtype=temperatures.dtype, device=device)
        self.swap_sum = torch.zeros(chains, rungs - 1, dtype=temperatures.dtype, device=device)
        self.tried = [0, 0]
        self.ever = torch.zeros(chains, rungs, dtype=torch.bool, device=device)
        self.origin = torch.arange(rungs, dtype=torch.int64, device=device).repeat(chains, 1)
        self.freeze = sampler.on_nonfinite == "freeze"

    def restart(self, energy: Tensor, g: list[Tensor]) -> None:
        """``energy`` and gradient at the replicas."""
        self.energy, self.g = energy, g
        parts = [self.x[i] for i in self.call.moving]
        self.living = finite_chains([*parts, energy, *g], len(energy), self.call.device)

    def move(self, k: int) -> Tensor:
        """A Langevin step of all replicas; the probability of each, (chains, R)."""
        call, x, e, g = self.call, self.x, self.energy, self.g
        y = list(x)
        for i, p, gradient in zip(call.moving, self.params, g):
            y[i] = x[i] - p.step_size * gradient + p.noise_scale * self._normals(i, k)
        e_new, g_new = self.target(y, k)
        e_new = one_per_chain("ParallelTempering", e_new)
        old, new = [x[i] for i in call.moving], [y[i] for i in call.moving]
        sound = finite_chains([e_new, *new, *g_new], len(e), call.device)
        if self.sampler.accept is None:
            accept_prob = torch.ones_like(e)
            accept = self.living | (not self.freeze)
            self.living = sound & accept
            if self.freeze:
                accept = accept & sound
                self.living = accept
        else:
            ratio = log_ratio(old, new, g, g_new, e, e_new, self.params, self.masks, self.per_row, "chain")
            # NaN, a broken proposal, is never accepted
            accept_prob = torch.nan_to_num(ratio.clamp(max=0.0).exp(), nan=0.0).to(self.accept_sum.dtype)
            allowed = sound & self.living if self.freeze else sound
            accept_prob = torch.where(allowed, accept_prob, 0.0)
            accept = call.uniforms(self.rungs, k, noise.ACCEPT).reshape(-1) < accept_prob
            self.living = self.living | accept
        self.x, self.energy, self.g = where(accept, y, x), torch.where(accept, e_new, e), where(accept, g_new, g)
        accept_prob = accept_prob.reshape(-1, self.rungs)
        self.accept_sum = self.accept_sum + accept_prob
        self.ever = self.ever | accept.reshape(-1, self.rungs)
        return accept_prob

    def exchange(self, side: int, k: int) -> Tensor:
        """Neighbours exchanged; the probability of each pair, (chains, R - 1), NaN where it was not tried."""
        call, rungs = self.call, self.rungs
        swap_prob = torch.full_like(self.swap_sum, math.nan)
        energies, living = self.energy.reshape(-1, rungs), self.living.reshape(-1, rungs)
        lower, upper = slice(side, rungs - 1, 2), slice(side + 1, rungs, 2)
        ratio = (self.inverse[lower] - self.inverse[upper]) * (energies[:, lower] - energies[:, upper])
        prob = torch.nan_to_num(ratio.clamp(max=0.0).exp(), nan=0.0)
        prob = torch.where(living[:, lower] & living[:, upper], prob, 0.0)
        swap_prob[:, lower] = prob
        self.swap_sum[:, lower] += prob
        self.tried[side] += 1
        swapped = call.uniforms(rungs - 1, k, noise.SWAP)[:, lower] < prob
        source = torch.arange(rungs, dtype=torch.int64, device=call.device).repeat(call.chains, 1)
        source[:, lower] += swapped
        source[:, upper] -= swapped.long()
        flat = (source + rungs * torch.arange(call.chains, dtype=torch.int64, device=call.device)[:, None]).reshape(-1)
        self.x = [t.index_select(0, flat) for t in self.x]
        self.energy, self.g = self.energy.index_select(0, flat), [t.index_select(0, flat) for t in self.g]
        self.living, self.origin = self.living[flat], self.origin.gather(1, source)
        return swap_prob

    def _normals(self, i: int, k: int) -> Tensor:
        """Normals of the replicas of tensor ``i``, (chains * R, ...): a chain's elements are replica by replica, so
        that the first temperature has Langevin's noise and a longer ladder leaves the lower rungs theirs."""
        call = self.call
        t, mask = call.tensors[i], call.masks[i]
        xi = drawn.normal(
            (call.chains, self.rungs, *t.shape[1:]), seed=call.seed, step=call.first_step + k,
            stream=noise.stream(i), chain_offset=call.chain_offset, dtype=t.dtype, device=t.device,
        )  # fmt: skip
        if isinstance(mask, Tensor):
            xi = xi.masked_fill(mask.unsqueeze(1), 0.0)
        return xi.flatten(0, 1)


class _CppLadders(_Ladders):
    """The same in C++: the Langevin step, the Metropolis test and the exchange are a call each."""

    def __init__(
        self, sampler: ParallelTempering, call: Call, target: Target, x: list[Tensor], params: list[StepParams],
        masks: list[Tensor | None], temperatures: Tensor,
    ) -> None:  # fmt: skip
        super().__init__(sampler, call, target, x, params, masks, temperatures)
        rungs, chains = self.rungs, call.chains
        self.seed, self.first = plain(call.seed), plain(call.first_step)
        self.old = [x[i].contiguous() for i in call.moving]
        self.new = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in self.old]
        # a chain's replicas are one long chain of the step, so that the noise is as in _normals
        by_chain = lambda t: t.reshape(chains, rungs, *t.shape[1:])
        self.views = [by_chain(t) for t in self.new]
        self.constants = [
            StepParams(*(by_chain(v) if isinstance(v, Tensor) and v.dim() else v for v in (p.step_size, p.noise_scale)))
            for p in params
        ]
        options = StepOptions(
            seed=self.seed, streams=tuple(call.moving), noisy=(True,) * len(self.new), chain_offset=call.chain_offset,
            observed=tuple(None if mask is None else by_chain(mask) for mask in masks),
        )  # fmt: skip
        self.step = CppStepper(options, self.views)
        shapes = [t.shape for t in self.old]
        self.test = Proposals(
            shapes, masks, seed=self.seed, stream=noise.stream(0, noise.ACCEPT), chain_offset=call.chain_offset,
            keep=True, rows_per_chain=rungs,
        )  # fmt: skip
        self.test.set(params, self.old, self.per_row)
        self.swap_prob = torch.zeros_like(self.swap_sum)
        self.all_live = True

    def restart(self, energy: Tensor, g: list[Tensor]) -> None:
        # accepted rows are written over them
        super().restart(energies(energy, len(energy)).clone(), [t.contiguous().clone() for t in g])
        self.all_live = bool(self.living.all())
        if self.freeze:
            self.test.set_alive(self.living)

    def move(self, k: int) -> Tensor:
        call = self.call
        for t, old in zip(self.new, self.old, strict=True):
            t.copy_(old)
        grads = [t.reshape(v.shape) for t, v in zip(self.g, self.views, strict=True)]
        self.step.step(self.views, grads, self.constants, self.first + k, with_noise=True, stats=False)
        y = list(self.x)
        for i, t in zip(call.moving, self.new, strict=True):
            y[i] = t
        e_new, g_new = self.target(y, k)
        e_new = one_per_chain("ParallelTempering", e_new)
        if self.sampler.accept is None:
            accept_prob = torch.ones_like(self.accept_sum)
            if self.freeze:
                sound = finite_chains([e_new, *self.new, *g_new], len(e_new), call.device)
                self.living = self.living & sound
                self.new = [t.contiguous() for t in where(self.living, self.new, self.old)]
                self.energy = torch.where(self.living, energies(e_new, len(e_new)), self.energy)
                self.g = [t.contiguous() for t in where(self.living, g_new, self.g)]
                self.views = [t.reshape(v.shape) for t, v in zip(self.new, self.views, strict=True)]
                self.ever.logical_or_(self.living.reshape(-1, self.rungs))
            else:
                self.restart(e_new, g_new)
                self.ever.fill_(True)
        else:
            self.test.decide(self.old, self.new, self.g, g_new, self.energy, e_new, self.first + k)
            accept_prob = self.test.prob.reshape(-1, self.rungs)
            self.ever.logical_or_(self.test.accepted.reshape(-1, self.rungs))
            if not self.all_live:
                self.living.logical_or_(self.test.accepted)
        # the states before the step lie where the next one goes
        self.old, self.new = self.new, self.old
        self.views = [t.reshape(v.shape) for t, v in zip(self.new, self.views, strict=True)]
        for i, t in zip(call.moving, self.old, strict=True):
            self.x[i] = t
        self.accept_sum += accept_prob
        return accept_prob

    def exchange(self, side: int, k: int) -> Tensor:
        exchange(
            [*self.old, *self.g], rungs=self.rungs, seed=self.seed, step=self.first + k,
            stream=noise.stream(0, noise.SWAP), chain_offset=self.call.chain_offset, inverse=self.inverse,
            energy=self.energy, alive=self.living, origin=self.origin, prob=self.swap_prob, prob_sum=self.swap_sum,
            side=side,
        )  # fmt: skip
        self.tried[side] += 1
        return self.swap_prob
