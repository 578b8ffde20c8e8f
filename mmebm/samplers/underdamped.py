"""Underdamped Langevin dynamics: velocities, friction, and the BAOAB splitting."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmebm import noise
from mmebm.ops.dynamics import Dynamics, energies, finite_rows_, reason
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
    exp,
    finite_chains,
    resolve,
    running,
    settings,
    sqrt,
    total,
    where,
)
from mmebm.samplers.gradient import Target
from mmebm.samplers.opaque import opaque
from mmebm.samplers.user_modules import Mode
from mmebm.state import State, flag

RECORDS = ("energy", "grad_norm", "kinetic")
_NUMBERS: Numbers = {"step_size": {}, "friction": {}, "temperature": {}, "mass": {"strict": True}}


@dataclass(frozen=True)
class Underdamped:
    """An immutable description of underdamped Langevin dynamics; :meth:`sample` runs it.

    With h, friction c, temperature T and mass m, a step is

        v <- v - (h / 2) g(x) / m
        x <- x + (h / 2) v
        v <- exp(-c h) v + sqrt((1 - exp(-2 c h)) T / m) xi
        x <- x + (h / 2) v
        v <- v - (h / 2) g(x) / m

    with one gradient: the last one is the next step's first. On a quadratic energy the stationary law of x is exact for
    every stable step, h sqrt(curvature / m) < 2; that of v is not. Friction 0 is leapfrog without noise.

    Every number may be a float, a tensor that broadcasts (a 1-D tensor of length chains means one value per chain), a
    mapping from the state's keys to such values, or a function of the step (:mod:`mmebm.samplers.schedules`). Step
    sizes that differ between elements or tensors leave the stationary law as it is.

    Args:
        step_size: ``h``, a time. In the limit of high friction it does what Langevin's step_size h^2 / (2 m) does.
        friction: ``c``, per unit of time.
        temperature: of the target exp(-E / T).
        mass: ``m``, of each element.
        log_prob: the callable returns log p instead of E.
        score: the callable returns the score d log p / dx, in the state's structure.
        mode: modules found in the energy run in "eval" or "train" mode or as they are ("keep"); restored afterwards.
        on_nonfinite: where a chain's state, energy or gradient is not finite: "warn" once, "ignore" (it is reported in
            ``info`` in any case), "freeze" it at its last finite state, or "raise" at the end.

    Raises:
        TypeError, ValueError: naming the argument, the value and what would do.
    """

    step_size: Any
    friction: Any = 1.0
    temperature: Any = 1.0
    mass: Any = 1.0
    log_prob: bool = False
    score: bool = False
    mode: Mode = "eval"
    on_nonfinite: NonFinite = "warn"

    def __post_init__(self) -> None:
        choice("mode", self.mode, ("eval", "train", "keep"))
        flag("log_prob", self.log_prob)
        flag("score", self.score)
        choice("on_nonfinite", self.on_nonfinite, NONFINITE)
        check_numbers(self, _NUMBERS)
        if self.log_prob and self.score:
            raise ValueError("give log_prob=True or score=True, not both")

    def replace(self, **changes: Any) -> Underdamped:
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
        velocity: Any = None,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
        chain_offset: int = 0,
        first_step: int | Tensor = 0,
        record: Collection[str] = (),
        thin: int | None = None,
        inplace: bool = False,
    ) -> Samples:
        """Runs ``steps`` steps from ``state``. What is not named here is as in :meth:`mmebm.Langevin.sample`.

        Args:
            state: as there, in float32 or float64.
            velocity: in the state's structure; None draws from the velocities' stationary law, N(0, T / m). K1 steps,
                then K2 with ``first_step=K1`` and ``velocity=out.info["velocity"]``, equal K1 + K2.
            record: any of "energy" and "grad_norm" (of the state before the step) and "kinetic" (the sum of m v^2 / 2
                before the step).

        Returns:
            :class:`~mmebm.Samples`; its ``info`` holds the final ``velocity``, in the state's structure.

        Raises:
            TypeError, ValueError: naming the argument, the value and what would do.
            FloatingPointError: with ``on_nonfinite="raise"``, where a chain ended non-finite.
        """
        if self.score and "energy" in record:
            raise ValueError('record="energy" needs an energy; with score=True there is none')
        call = resolve(
            energy, state, steps, args=args, kwargs=kwargs, observed=observed, seed=seed, generator=generator,
            chain_offset=chain_offset, first_step=first_step, record=record, records=RECORDS, thin=thin,
            inplace=inplace,
        )  # fmt: skip
        recorder = Recorder(call)
        with running(call, self.mode, log_prob=self.log_prob, score=self.score) as target:
            rows = settings(self, _NUMBERS, call)
            constants = [_Constants.of(row, call.moving, call.tensors[0].dtype) for row in rows]
            x = [t.detach().clone() for t in call.tensors]
            if velocity is None:
                v = [s * call.normals(i, 0, noise.MOMENTUM) for i, s in zip(call.moving, constants[0].thermal)]
            else:
                v = call.moving_parts("velocity", velocity)
            moves: _Steps | _CppSteps | None = None
            # a network need not take an empty batch
            for k in range(call.steps if call.chains else 0):
                if moves is None or target.varies:
                    e, g = target(x if moves is None else moves.x, k)
                    if moves is None:
                        moves = _steps(self, call, target, x, v, e)
                    moves.restart(e, g)
                c = constants[min(k, len(constants) - 1)]
                if call.record:
                    zero = torch.zeros(call.chains, dtype=x[0].dtype, device=call.device)
                    kinetic = total([0.5 * m * w * w for m, w in zip(c.mass, moves.v)], zero)
                    slope = total([p * p for p in moves.g], zero).sqrt()
                    # frozen chains keep theirs in place
                    now = None if moves.energy is None else moves.energy.clone()
                    recorder.add(energy=now, kinetic=kinetic, grad_norm=slope)
                moves.step(c, k)
                recorder.keep(k, moves.x)
            broken = torch.zeros(call.chains, dtype=torch.bool, device=call.device)
            if moves is not None:
                x, v, broken = moves.x, moves.v, ~moves.alive
            return recorder.samples(x, self.on_nonfinite, broken=broken, velocity=call.structure(v))


def _steps(
    sampler: Underdamped, call: Call, target: Target, x: list[Tensor], v: list[Tensor], energy: Tensor | None
) -> _Steps | _CppSteps:
    """What runs the steps: C++ where it takes the state and float32 energies, else PyTorch."""
    moving = [x[i] for i in call.moving]
    known = energy is None or energy.dim() == 0 or energy.dtype is torch.float32
    if moving and known and reason(moving, call.seed, call.first_step) is None:
        return _CppSteps(sampler, call, target, x, v)
    return _Steps(sampler, call, target, x, v)


class _Steps:
    """The steps in PyTorch.

    Attributes:
        x, v: state, and velocities of the tensors that move. energy, g: at ``x``.
        alive: bool (chains,), cleared where state, velocity, energy or gradient was not finite.
    """

    def __init__(self, sampler: Underdamped, call: Call, target: Target, x: list[Tensor], v: list[Tensor]) -> None:
        self.call, self.target, self.x, self.v = call, target, x, v
        self.alive = torch.ones(call.chains, dtype=torch.bool, device=call.device)
        self.freeze = sampler.on_nonfinite == "freeze"
        self.energy: Tensor | None = None
        self.g: list[Tensor] = []

    def restart(self, energy: Tensor | None, g: list[Tensor]) -> None:
        """``energy`` and gradient at the state."""
        self.energy, self.g = energy, g
        self._mark([*(self.x[i] for i in self.call.moving), *self.v, *g], energy)

    def _mark(self, parts: list[Tensor], energy: Tensor | None) -> None:
        # a scalar energy does not say which chain made it what it is
        each = [energy] if energy is not None and energy.dim() else []
        self.alive = self.alive & finite_chains([*parts, *each], self.call.chains, self.call.device)

    def step(self, c: _Constants, k: int) -> None:
        call = self.call
        x, v = [self.x[i] for i in call.moving], self.v
        w = [a - kick * p for a, kick, p in zip(v, c.kick, self.g)]
        y = [a + drift * b for a, drift, b in zip(x, c.drift, w)]
        w = [
            decay * a + s * call.normals(i, k, noise.DRIFT) for a, decay, s, i in zip(w, c.decay, c.noise, call.moving)
        ]
        y = [a + drift * b for a, drift, b in zip(y, c.drift, w)]
        moved = list(self.x)
        for i, t in zip(call.moving, y):
            moved[i] = t
        e_new, g_new = self.target(moved, k)
        w = [a - kick * p for a, kick, p in zip(w, c.kick, g_new)]
        self._mark([*y, *w, *g_new], e_new)
        if self.freeze:
            alive = self.alive
            moved, w, g_new = where(alive, moved, self.x), where(alive, w, v), where(alive, g_new, self.g)
            if self.energy is not None and e_new is not None and e_new.dim():
                e_new = torch.where(alive, e_new, self.energy)
        self.x, self.v, self.energy, self.g = moved, w, e_new, g_new


class _CppSteps(_Steps):
    """The same in C++: a call before each gradient, and one after it."""

    def __init__(self, sampler: Underdamped, call: Call, target: Target, x: list[Tensor], v: list[Tensor]) -> None:
        super().__init__(sampler, call, target, x, v)
        self.op = Dynamics(
            [x[i] for i in call.moving], indices=call.moving, masks=[call.masks[i] for i in call.moving],
            seed=plain(call.seed), chain_offset=call.chain_offset, alive=self.alive, keeps=self.freeze,
            freeze=self.freeze,
        )  # fmt: skip
        self.first = plain(call.first_step)
        for own, given in zip(self.op.v, v, strict=True):
            own.copy_(given)
        self.v = self.op.v
        self.y = list(x)
        for i, t, to in zip(call.moving, self.op.x, self.op.y):
            self.x[i], self.y[i] = t, to
        self._constants: _Constants | None = None

    def restart(self, energy: Tensor | None, g: list[Tensor]) -> None:
        self._mark([*self.op.x, *self.v, *g], energy)
        if self.freeze:
            for own, given in zip(self.op.g, g, strict=True):
                own.copy_(given)
            g = self.op.g
            if energy is not None and energy.dim():
                energy = energies(energy, self.call.chains).clone()
                self.op.set_energy(energy)
        self.energy, self.g = energy, g

    def _mark(self, parts: list[Tensor], energy: Tensor | None) -> None:
        each = [energy] if energy is not None and energy.dim() else []
        for part in (*parts, *each):
            finite_rows_(self.alive, part)

    def step(self, c: _Constants, k: int) -> None:
        if c is not self._constants:
            for n in range(len(self.op.x)):
                self.op.set(n, kick=c.kick[n], drift=c.drift[n], decay=c.decay[n], noise=c.noise[n])
            self._constants = c
        self.op.baoa(self.g, self.first + k)
        e, g = self.target(self.y, k)
        self.op.baoab_end(g, e if e is not None and e.dim() else None)
        if not self.freeze:
            self.energy, self.g = e, g
        elif e is not None and not e.dim():
            self.energy = e


@dataclass(frozen=True)
class _Constants:
    """A step's coefficients, one for each tensor that moves. ``thermal``: the velocities' standard deviation."""

    kick: list[Any]
    drift: list[Any]
    decay: list[Any]
    noise: list[Any]
    thermal: list[Any]
    mass: list[Any]

    @classmethod
    def of(cls, row: dict[str, list[Any]], moving: Sequence[int], dtype: torch.dtype) -> _Constants:
        columns = [[row[name][i] for i in moving] for name in ("step_size", "friction", "temperature", "mass")]
        out = cls([], [], [], [], [], columns[3])
        for h, c, temperature, m in zip(*columns):
            check_quotients(h, temperature, m, dtype)
            decay = exp(-c * h)
            out.kick.append(0.5 * h / m)
            out.drift.append(0.5 * h)
            out.decay.append(decay)
            out.thermal.append(sqrt(temperature / m))
            out.noise.append(sqrt((1.0 - decay * decay) * temperature / m))
        return out
