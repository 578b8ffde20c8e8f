"""Hamiltonian Monte Carlo: leapfrog trajectories, accepted or rejected chain by chain."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from mmebm import noise
from mmebm.ops.dynamics import Dynamics, reason
from mmebm.ops.noise import plain
from mmebm.samplers.arguments import (
    NONFINITE,
    Call,
    NonFinite,
    Numbers,
    Recorder,
    Samples,
    check_numbers,
    check_quotients,
    choice,
    finite_chains,
    per_chain_shape,
    resolve,
    running,
    settings,
    sqrt,
    total,
    where,
)
from mmebm.samplers.gradient import Target, one_per_chain
from mmebm.samplers.opaque import opaque
from mmebm.samplers.user_modules import Mode
from mmebm.state import State, check_setting, flag, integer

RECORDS = ("energy", "accept_prob", "accepted", "energy_error", "step_scale")
_NUMBERS: Numbers = {"step_size": {}, "temperature": {"strict": True}, "mass": {"strict": True}}


@dataclass(frozen=True)
class HMC:
    """An immutable description of Hamiltonian Monte Carlo; :meth:`sample` runs it.

    A step draws velocities from N(0, T / m), follows the Hamiltonian E(x) + sum of m v^2 / 2, over all elements of all
    tensors, for ``leapfrog_steps`` leapfrog steps, and accepts each chain's end with probability
    min(1, exp(-(change of the Hamiltonian) / T)). It takes one gradient per leapfrog step. The stationary law is the
    target's, whatever the step size. A trajectory that overflows, or ends where the energy or its gradient is inf or
    NaN, is rejected. A chain that is at such a place itself is reported in ``info["nonfinite"]`` and takes no part in
    the warm-up; from an energy of +inf it moves to any finite one, from NaN nowhere.

    ``step_size``, ``mass`` and ``temperature`` may each be a float, a tensor that broadcasts (a 1-D tensor of length
    chains means one value per chain), or a function of the step; the first two also a mapping from the state's keys.

    Args:
        step_size: of a leapfrog step, a time; stable below 2 / sqrt(curvature / m).
        leapfrog_steps: per trajectory. 1 is Metropolis-adjusted Langevin with step_size h^2 / (2 m).
        mass: ``m``, of each element.
        temperature: of the target exp(-E / T); a number, or one per chain.
        adapt: number of warm-up steps (those of index below ``adapt``) in which dual averaging moves a factor of all
            step sizes towards ``target_accept``; it is fixed afterwards. Samples of the warm-up are not the target's.
        target_accept: the mean acceptance probability that the warm-up aims at.
        adapt_over: a factor for each "chain", or one for "all" chains of the call, which settles sooner, but lets a
            chain depend on the batch it is in.
        log_prob: the callable returns log p instead of E.
        mode: modules found in the energy run in "eval" or "train" mode or as they are ("keep"); restored afterwards.
        on_nonfinite: "warn" once where a chain is at a state of non-finite energy or gradient, "ignore" (it is reported
            in ``info`` in any case), "freeze" it where it is, or "raise" at the end.

    Raises:
        TypeError, ValueError: naming the argument, the value and what would do.
    """

    step_size: Any
    leapfrog_steps: int = 10
    mass: Any = 1.0
    temperature: Any = 1.0
    adapt: int = 0
    target_accept: float = 0.8
    adapt_over: Literal["chain", "all"] = "chain"
    log_prob: bool = False
    mode: Mode = "eval"
    on_nonfinite: NonFinite = "warn"

    def __post_init__(self) -> None:
        choice("mode", self.mode, ("eval", "train", "keep"))
        flag("log_prob", self.log_prob)
        choice("on_nonfinite", self.on_nonfinite, NONFINITE)
        choice("adapt_over", self.adapt_over, ("chain", "all"))
        integer("leapfrog_steps", self.leapfrog_steps, 1)
        integer("adapt", self.adapt, 0)
        check_numbers(self, _NUMBERS)
        if isinstance(self.temperature, Mapping):
            raise TypeError(f"temperature must be a number or one per chain, as all tensors are accepted together, got "
                            f"{self.temperature!r}")  # fmt: skip
        check_setting("target_accept", self.target_accept, strict=True)
        if isinstance(self.target_accept, Tensor) or self.target_accept >= 1:
            raise ValueError(f"target_accept must be a number between 0 and 1, got {self.target_accept!r}")

    def replace(self, **changes: Any) -> HMC:
        """A copy with some options changed."""
        return replace(self, **changes)

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
        adaptation: Mapping[str, Tensor] | None = None,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
        chain_offset: int = 0,
        first_step: int | Tensor = 0,
        record: Collection[str] = (),
        thin: int | None = None,
        inplace: bool = False,
    ) -> Samples:
        """Runs ``steps`` trajectories from ``state``. What is not named here is as in :meth:`mmebm.Langevin.sample`.

        Args:
            energy: returns one value per chain, of that chain only.
            state: as there, in float32 or float64.
            adaptation: with ``adapt`` and a ``first_step`` above 0, ``out.info["adaptation"]`` of the run before.
            record: any of "energy" (of the state before the step), "accept_prob", "accepted" (1 or 0), "energy_error"
                (the change of the Hamiltonian along the trajectory) and "step_scale" (the warm-up's factor).

        Returns:
            :class:`~mmebm.Samples`; its ``info`` holds ``acceptance``, the mean acceptance probability of the steps
            after the warm-up, ``step_scale``, the factor of the step sizes for the next step, ``never_accepted``, which
            chains did not move in any of the steps, all (chains,), and, with ``adapt``, ``adaptation``.

        Raises:
            TypeError, ValueError: naming the argument, the value and what would do.
            FloatingPointError: with ``on_nonfinite="raise"``, where a chain ended non-finite.
        """
        call = resolve(
            energy, state, steps, args=args, kwargs=kwargs, observed=observed, seed=seed, generator=generator,
            chain_offset=chain_offset, first_step=first_step, record=record, records=RECORDS, thin=thin,
            inplace=inplace,
        )  # fmt: skip
        recorder = Recorder(call)
        with running(call, self.mode, log_prob=self.log_prob) as target:
            rows = settings(self, _NUMBERS, call)
            for row in rows:
                _check_per_chain(row["temperature"][0], call.chains)
                for i in call.moving:
                    check_quotients(row["step_size"][i], row["temperature"][i], row["mass"][i], call.tensors[i].dtype)
            warmup = _Adaptation.start(self, call, adaptation)
            x = [t.detach().clone() for t in call.tensors]
            zero = torch.zeros(call.chains, dtype=x[0].dtype, device=call.device)
            moves: _Trajectories | _CppTrajectories | None = None
            # a network need not take an empty batch
            for k in range(call.steps if call.chains else 0):
                if moves is None or target.varies:
                    e, g = target(x if moves is None else moves.x, k)
                    e = one_per_chain("HMC", e)
                    if moves is None:
                        moves = _trajectories(self, call, target, x, e)
                    moves.restart(e, g)
                recorded = {"energy": moves.energy} if "energy" in call.record else {}
                scale = warmup.scale if warmup else None
                what = moves.step(rows[min(k, len(rows) - 1)], scale, k)
                if call.record:
                    what["step_scale"] = torch.ones_like(zero) if scale is None else scale
                    recorder.add(**recorded, **{name: what[name].clone() for name in call.record if name in what})
                if warmup and warmup.update(what["accept_prob"], moves.living):
                    moves.forget()
                recorder.keep(k, moves.x)
            never, living = zero.bool(), ~zero.bool()
            if moves is not None:
                x, never, living = moves.x, ~moves.ever, moves.living & moves.alive
            info: dict[str, Any] = {
                "acceptance": zero * math.nan if moves is None or not moves.counted else moves.acceptance(zero.dtype),
                "step_scale": warmup.scale if warmup else torch.ones_like(zero),
                "never_accepted": never,
            }
            if warmup:
                info["adaptation"] = warmup.state()
            return recorder.samples(x, self.on_nonfinite, broken=~living, **info)


def _trajectories(
    sampler: HMC, call: Call, target: Target, x: list[Tensor], energy: Tensor
) -> _Trajectories | _CppTrajectories:
    """What runs the steps: C++ where it takes the state and float32 energies, else PyTorch."""
    moving = [x[i] for i in call.moving]
    if moving and energy.dtype is torch.float32 and reason(moving, call.seed, call.first_step) is None:
        return _CppTrajectories(sampler, call, target, x)
    return _Trajectories(sampler, call, target, x)


class _Trajectories:
    """The steps in PyTorch.

    Attributes:
        x, energy: the state, and its energy (chains,).
        living: bool (chains,), where state, energy and gradient are finite now. alive: where they were at every
            gradient, with ``on_nonfinite="freeze"``; else True.
        ever: bool (chains,), who moved at all. counted: steps since the last :meth:`forget`.
    """

    def __init__(self, sampler: HMC, call: Call, target: Target, x: list[Tensor]) -> None:
        self.sampler, self.call, self.target, self.x = sampler, call, target, x
        self.counted = 0
        self.prob_sum = torch.zeros(call.chains, dtype=x[0].dtype, device=call.device)
        self.ever = torch.zeros(call.chains, dtype=torch.bool, device=call.device)
        self.alive = ~self.ever
        self.freeze = sampler.on_nonfinite == "freeze"

    def restart(self, energy: Tensor, g: list[Tensor]) -> None:
        """``energy`` and gradient at the state."""
        self.energy, self.g = energy, g
        parts = [self.x[i] for i in self.call.moving]
        self.living = finite_chains([*parts, energy.detach(), *g], self.call.chains, self.call.device)
        if self.freeze:
            self.alive = self.alive & self.living

    def forget(self) -> None:
        """After the warm-up's steps: the mean acceptance is that of the steps to come."""
        self.prob_sum, self.counted = torch.zeros_like(self.prob_sum), 0

    def acceptance(self, dtype: torch.dtype) -> Tensor:
        return (self.prob_sum / self.counted).to(dtype)

    def step(self, row: dict[str, list[Any]], scale: Tensor | None, k: int) -> dict[str, Tensor]:
        """One trajectory; what may be recorded."""
        call, x, e, g = self.call, self.x, self.energy, self.g
        moving = call.moving
        h, mass, temperature = ([row[name][i] for i in moving] for name in ("step_size", "mass", "temperature"))
        if scale is not None:
            h = [size * per_chain_shape(scale, x[i]) for size, i in zip(h, moving)]
        v = [call.normals(i, k, noise.MOMENTUM) * sqrt(t / m) for i, t, m in zip(moving, temperature, mass)]
        y, w, e_new, p = leapfrog(self.target, k, x, v, g, h, mass, self.sampler.leapfrog_steps)
        e_new = one_per_chain("HMC", e_new)
        # the change of m v^2 / 2, element by element: the two sums' own rounding would be large for a large state
        error = total([0.5 * m * (b - a) * (b + a) for m, a, b in zip(mass, v, w)], e_new - e) + (e_new - e)
        t = row["temperature"][0]
        ratio = -error / (t.reshape(-1) if isinstance(t, Tensor) else t)
        # NaN, the end of a broken trajectory, is never accepted; nor is an energy of -inf, or a gradient that leads out
        accept_prob = torch.nan_to_num(ratio.clamp(max=0.0).exp(), nan=0.0)
        allowed = finite_chains([e_new, *(y[i] for i in moving), *p], call.chains, call.device) & self.alive
        accept_prob = torch.where(allowed, accept_prob, 0.0)
        accept = call.uniforms(1, k, noise.ACCEPT).squeeze(1) < accept_prob
        self.x, self.energy, self.g = where(accept, y, x), torch.where(accept, e_new, e), where(accept, p, g)
        self.ever, self.living = self.ever | accept, self.living | accept
        self.prob_sum, self.counted = self.prob_sum + accept_prob, self.counted + 1
        return {"accept_prob": accept_prob, "accepted": accept.to(e.dtype), "energy_error": error}


class _CppTrajectories(_Trajectories):
    """The same in C++: a call for each piece of a trajectory between two gradients."""

    def __init__(self, sampler: HMC, call: Call, target: Target, x: list[Tensor]) -> None:
        super().__init__(sampler, call, target, x)
        self.op = Dynamics(
            [x[i] for i in call.moving], indices=call.moving, masks=[call.masks[i] for i in call.moving],
            seed=plain(call.seed), chain_offset=call.chain_offset, alive=self.alive, keeps=True, freeze=self.freeze,
        )  # fmt: skip
        self.first = plain(call.first_step)
        self.y = list(x)
        for i, t, to in zip(call.moving, self.op.x, self.op.y):
            self.x[i], self.y[i] = t, to
        self.prob_sum = self.prob_sum.double()
        self.out = {
            name: torch.zeros(call.chains, dtype=torch.float32, device=call.device)
            for name in ("accept_prob", "accepted", "energy_error")
        }
        self._energy = torch.zeros_like(self.out["accepted"])
        self.op.set_energy(self._energy)
        prob, accepted, error = self.out.values()
        self.op.set_outputs(prob, accepted, error, self.prob_sum, self.ever)
        self._row: dict[str, list[Any]] | None = None

    @property
    def energy(self) -> Tensor:
        return self._energy.clone()

    @energy.setter
    def energy(self, value: Tensor) -> None:
        self._energy.copy_(value)

    def restart(self, energy: Tensor, g: list[Tensor]) -> None:
        self.energy = energy
        self.living = finite_chains([*self.op.x, energy.detach(), *g], self.call.chains, self.call.device)
        self._all_live = bool(self.living.all())
        if self.freeze:
            self.alive.logical_and_(self.living)
        for own, given in zip(self.op.g, g, strict=True):
            own.copy_(given)

    def forget(self) -> None:
        self.prob_sum.zero_()
        self.counted = 0

    def step(self, row: dict[str, list[Any]], scale: Tensor | None, k: int) -> dict[str, Tensor]:
        op, call = self.op, self.call
        if scale is not None or row is not self._row:
            for n, i in enumerate(call.moving):
                h, m, t = (row[name][i] for name in ("step_size", "mass", "temperature"))
                if row is not self._row:
                    op.set(n, thermal=sqrt(t / m), mass=m)
                if scale is not None:
                    h = h * per_chain_shape(scale, self.x[i])
                op.set(n, kick=h / m, drift=h)
            if row is not self._row:
                op.set_temperature(row["temperature"][0])
            self._row = row
        op.hmc_start(self.first + k)
        for _ in range(self.sampler.leapfrog_steps - 1):
            op.leap(self.target(self.y, k)[1])
        e_new, g = self.target(self.y, k)
        op.hmc_end(g, one_per_chain("HMC", e_new), self.first + k)
        self.counted += 1
        if not self._all_live:
            self.living = self.living | (self.out["accepted"] > 0)
        return self.out


def leapfrog(
    target: Target, k: int, x: list[Tensor], v: list[Tensor], g: list[Tensor], h: Sequence[Any], mass: Sequence[Any],
    steps: int,
) -> tuple[list[Tensor], list[Tensor], Tensor | None, list[Tensor]]:  # fmt: skip
    """``steps`` leapfrog steps from ``x``, of gradient ``g``, with velocities ``v``, each moving tensor with its own h.

    Returns:
        The state, the velocities, and the energy and gradient at the end.
    """
    x, e = list(x), None
    v = [a - 0.5 * size / m * p for a, size, m, p in zip(v, h, mass, g)]
    for step in range(steps):
        for i, size, a in zip(target.moving, h, v):
            x[i] = x[i] + size * a
        e, g = target(x, k)
        part = 0.5 if step == steps - 1 else 1.0
        v = [a - part * size / m * p for a, size, m, p in zip(v, h, mass, g)]
    return x, v, e, g


def _check_per_chain(temperature: Any, chains: int) -> None:
    if isinstance(temperature, Tensor) and temperature.numel() not in (1, chains):
        raise ValueError(
            f"temperature must be a number or one per chain ({chains},), got shape {tuple(temperature.shape)}"
        )


class _Adaptation:
    """Dual averaging of the logarithm of the step sizes' factor (Hoffman and Gelman, JMLR 2014, section 3.2).

    On the device throughout: only the count of steps is known to the host.
    """

    GAMMA, OFFSET, KAPPA = 0.05, 10, 0.75  # the paper's
    START = math.log(10.0)  # where the paper's iterates are drawn to: ten times the first guess
    STATE = ("log_scale", "mean_log_scale", "shortfall")

    def __init__(self, sampler: HMC, done: int, state: dict[str, Tensor]) -> None:
        self.sampler, self.done = sampler, done
        self.log_scale, self.mean_log_scale, self.shortfall = (state[name] for name in self.STATE)

    @classmethod
    def start(cls, sampler: HMC, call: Call, given: Mapping[str, Tensor] | None) -> _Adaptation | None:
        if not sampler.adapt:
            if given is not None:
                raise ValueError("adaptation needs a sampler with adapt above 0, got adapt=0")
            return None
        first = call.first_step
        if isinstance(first, Tensor):
            raise ValueError("first_step must be an int with adapt, got a tensor")
        like = call.tensors[0]
        if given is None:
            if first:
                raise ValueError(
                    f'first_step={first} with adapt={sampler.adapt} needs adaptation=out.info["adaptation"] of the run '
                    "before it"
                )
            zero = torch.zeros(call.chains, dtype=like.dtype, device=like.device)
            return cls(sampler, 0, dict.fromkeys(cls.STATE, zero))
        for name in cls.STATE:
            value = given.get(name)
            if not isinstance(value, Tensor) or value.shape != (call.chains,) or value.device != like.device:
                raise ValueError(
                    f"adaptation[{name!r}] must be a tensor ({call.chains},) on {like.device}, got {value!r:.80}"
                )
        return cls(sampler, first, {name: given[name].to(like.dtype) for name in cls.STATE})

    @property
    def scale(self) -> Tensor:
        """The factor for the next step, (chains,)."""
        return (self.log_scale if self.done < self.sampler.adapt else self.mean_log_scale).exp()

    def update(self, accept_prob: Tensor, living: Tensor) -> bool:
        """After a step; whether the step belonged to the warm-up. Only ``living`` chains (chains,) count."""
        if self.done >= self.sampler.adapt:
            return False
        self.done += 1
        t = self.done
        learns = living
        if self.sampler.adapt_over == "all":
            counted = torch.where(living, accept_prob, 0.0).sum() / living.sum().clamp(min=1)
            accept_prob, learns = counted.expand_as(accept_prob), living.any()
        rate = 1.0 / (t + self.OFFSET)
        shortfall = (1.0 - rate) * self.shortfall + rate * (self.sampler.target_accept - accept_prob)
        self.shortfall = torch.where(learns, shortfall, self.shortfall)
        log_scale = self.START - math.sqrt(t) / self.GAMMA * self.shortfall
        self.log_scale = torch.where(learns, log_scale, self.log_scale)
        weight = t**-self.KAPPA
        mean = weight * self.log_scale + (1.0 - weight) * self.mean_log_scale
        self.mean_log_scale = torch.where(learns, mean, self.mean_log_scale)
        return True

    def state(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.STATE}
