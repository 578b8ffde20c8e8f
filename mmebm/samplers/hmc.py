"""Hamiltonian Monte Carlo: leapfrog trajectories, accepted or rejected chain by chain."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from mmebm import noise
from mmebm.samplers.call import (
    Call,
    Numbers,
    Recorder,
    Samples,
    check_numbers,
    choice,
    per_chain_shape,
    resolve,
    running,
    settings,
    sqrt,
    total,
    where,
)
from mmebm.samplers.gradient import Target, one_per_chain
from mmebm.samplers.modes import Mode
from mmebm.samplers.opaque import opaque
from mmebm.state import State, check_setting, flag, integer

RECORDS = ("energy", "accept_prob", "accepted", "energy_error", "step_scale")
_NUMBERS: Numbers = {"step_size": {}, "temperature": {"strict": True}, "mass": {"strict": True}}


@dataclass(frozen=True)
class HMC:
    """An immutable description of Hamiltonian Monte Carlo; :meth:`sample` runs it.

    A step draws velocities from N(0, T / m), follows the Hamiltonian E(x) + sum of m v^2 / 2, over all elements of all
    tensors, for ``leapfrog_steps`` leapfrog steps, and accepts each chain's end with probability
    min(1, exp(-(change of the Hamiltonian) / T)). It takes one gradient per leapfrog step. The stationary law is the
    target's, whatever the step size. A trajectory that overflows is rejected.

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

    def __post_init__(self) -> None:
        choice("mode", self.mode, ("eval", "train", "keep"))
        flag("log_prob", self.log_prob)
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
            after the warm-up, ``step_scale``, the factor of the step sizes for the next step, both (chains,), and, with
            ``adapt``, ``adaptation``. A chain that starts non-finite stays where it is and is reported in
            ``info["nonfinite"]``.

        Raises:
            TypeError, ValueError: naming the argument, the value and what would do.
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
            warmup = _Adaptation.start(self, call, adaptation)
            x = [t.detach().clone() for t in call.tensors]
            accepted_sum = torch.zeros(call.chains, dtype=x[0].dtype, device=call.device)
            counted = 0
            current: tuple[Tensor, list[Tensor]] | None = None
            # a network need not take an empty batch
            for k in range(call.steps if call.chains else 0):
                if current is None or target.varies:
                    e, g = target(x, k)
                    current = one_per_chain("HMC", e), g
                scale = warmup.scale if warmup else None
                row = rows[min(k, len(rows) - 1)]
                x, current, what = self._step(call, target, row, scale, k, x, *current)
                recorder.add(step_scale=torch.ones_like(accepted_sum) if scale is None else scale, **what)
                if warmup and warmup.update(what["accept_prob"]):
                    accepted_sum, counted = torch.zeros_like(accepted_sum), 0
                else:
                    accepted_sum, counted = accepted_sum + what["accept_prob"], counted + 1
                recorder.keep(k, x)
            info: dict[str, Any] = {
                "acceptance": accepted_sum / counted if counted else accepted_sum * math.nan,
                "step_scale": warmup.scale if warmup else torch.ones_like(accepted_sum),
            }
            if warmup:
                info["adaptation"] = warmup.state()
            return recorder.samples(x, **info)

    def _step(
        self, call: Call, target: Target, row: dict[str, list[Any]], scale: Tensor | None, k: int, x: list[Tensor],
        e: Tensor, g: list[Tensor],
    ) -> tuple[list[Tensor], tuple[Tensor, list[Tensor]], dict[str, Tensor]]:  # fmt: skip
        """One trajectory from ``x``, of energy ``e`` and gradient ``g``: the next state, its energy and gradient, and
        what may be recorded."""
        moving = call.moving
        h, mass, temperature = ([row[name][i] for i in moving] for name in ("step_size", "mass", "temperature"))
        if scale is not None:
            h = [size * per_chain_shape(scale, x[i]) for size, i in zip(h, moving)]
        v = [call.normals(i, k, noise.MOMENTUM) * sqrt(t / m) for i, t, m in zip(moving, temperature, mass)]
        y, w, e_new, p = leapfrog(target, k, x, v, g, h, mass, self.leapfrog_steps)
        e_new = one_per_chain("HMC", e_new)
        # the change of m v^2 / 2, element by element: the two sums' own rounding would be large for a large state
        error = total([0.5 * m * (b - a) * (b + a) for m, a, b in zip(mass, v, w)], e_new - e) + (e_new - e)
        t = row["temperature"][0]
        ratio = -error / (t.reshape(-1) if isinstance(t, Tensor) else t)
        # NaN, the end of a broken trajectory, is never accepted
        accept_prob = torch.nan_to_num(ratio.clamp(max=0.0).exp(), nan=0.0)
        accept = call.uniforms(1, k, noise.ACCEPT).squeeze(1) < accept_prob
        what = {"energy": e, "accept_prob": accept_prob, "accepted": accept.to(e.dtype), "energy_error": error}
        return where(accept, y, x), (torch.where(accept, e_new, e), where(accept, p, g)), what


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

    def update(self, accept_prob: Tensor) -> bool:
        """After a step; whether the step belonged to the warm-up."""
        if self.done >= self.sampler.adapt:
            return False
        self.done += 1
        t = self.done
        if self.sampler.adapt_over == "all":
            accept_prob = accept_prob.mean().expand_as(accept_prob)
        rate = 1.0 / (t + self.OFFSET)
        self.shortfall = (1.0 - rate) * self.shortfall + rate * (self.sampler.target_accept - accept_prob)
        self.log_scale = self.START - math.sqrt(t) / self.GAMMA * self.shortfall
        weight = t**-self.KAPPA
        self.mean_log_scale = weight * self.log_scale + (1.0 - weight) * self.mean_log_scale
        return True

    def state(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.STATE}
