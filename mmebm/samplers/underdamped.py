"""Underdamped Langevin dynamics: velocities, friction, and the BAOAB splitting."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from mmebm import noise
from mmebm.reference.langevin_step import per_chain
from mmebm.samplers.call import (
    Numbers,
    Recorder,
    Samples,
    check_numbers,
    choice,
    exp,
    resolve,
    running,
    settings,
    sqrt,
    total,
    where,
)
from mmebm.samplers.modes import Mode
from mmebm.samplers.opaque import opaque
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
        on_nonfinite: "ignore" (reported in ``info``), "freeze" a chain at its last finite state, or "raise" at the end.

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
    on_nonfinite: Literal["ignore", "freeze", "raise"] = "ignore"

    def __post_init__(self) -> None:
        choice("mode", self.mode, ("eval", "train", "keep"))
        flag("log_prob", self.log_prob)
        flag("score", self.score)
        choice("on_nonfinite", self.on_nonfinite, ("ignore", "freeze", "raise"))
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
            constants = [_Constants.of(row, call.moving) for row in rows]
            full = [t.detach().clone() for t in call.tensors]
            if velocity is None:
                v = [s * call.normals(i, 0, noise.MOMENTUM) for i, s in zip(call.moving, constants[0].thermal)]
            else:
                v = call.moving_parts("velocity", velocity)
            alive = None
            if self.on_nonfinite == "freeze":
                alive = torch.ones(call.chains, dtype=torch.bool, device=call.device)
            g: list[Tensor] | None = None
            e: Tensor | None = None
            # a network need not take an empty batch
            for k in range(call.steps if call.chains else 0):
                c = constants[min(k, len(constants) - 1)]
                if g is None or target.varies:
                    e, g = target(full, k)
                if call.record:
                    zero = torch.zeros(call.chains, dtype=full[0].dtype, device=call.device)
                    kinetic = total([0.5 * m * w * w for m, w in zip(c.mass, v)], zero)
                    recorder.add(energy=e, kinetic=kinetic, grad_norm=total([p * p for p in g], zero).sqrt())
                x = [full[i] for i in call.moving]
                w = [a - kick * p for a, kick, p in zip(v, c.kick, g)]
                y = [a + drift * b for a, drift, b in zip(x, c.drift, w)]
                w = [
                    decay * a + s * call.normals(i, k, noise.DRIFT)
                    for a, decay, s, i in zip(w, c.decay, c.noise, call.moving)
                ]
                y = [a + drift * b for a, drift, b in zip(y, c.drift, w)]
                moved = list(full)
                for i, t in zip(call.moving, y):
                    moved[i] = t
                e_new, g_new = target(moved, k)
                w = [a - kick * p for a, kick, p in zip(w, c.kick, g_new)]
                if alive is not None:
                    for t in (*y, *w):
                        alive = alive & torch.isfinite(per_chain(t)).all(dim=1)
                    moved = where(alive, moved, full)
                    w, g_new = where(alive, w, v), where(alive, g_new, g)
                    if e is not None and e_new is not None and e.dim():
                        e_new = torch.where(alive, e_new, e)
                full, v, e, g = moved, w, e_new, g_new
                recorder.keep(k, full)
            samples = recorder.samples(full, frozen=None if alive is None else ~alive, velocity=call.structure(v))
        broken = samples.info["nonfinite"]
        if self.on_nonfinite == "raise" and bool(broken.any()):
            raise FloatingPointError(
                f"{int(broken.sum())} of {call.chains} chains are not finite after {steps} steps; a smaller step_size "
                'or on_nonfinite="freeze" would keep them'
            )
        return samples


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
    def of(cls, row: dict[str, list[Any]], moving: Sequence[int]) -> _Constants:
        columns = [[row[name][i] for i in moving] for name in ("step_size", "friction", "temperature", "mass")]
        out = cls([], [], [], [], [], columns[3])
        for h, c, temperature, m in zip(*columns):
            decay = exp(-c * h)
            out.kick.append(0.5 * h / m)
            out.drift.append(0.5 * h)
            out.decay.append(decay)
            out.thermal.append(sqrt(temperature / m))
            out.noise.append(sqrt((1.0 - decay * decay) * temperature / m))
        return out
