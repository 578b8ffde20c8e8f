"""Underdamped Langevin dynamics: velocities, friction, and the BAOAB splitting."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from mmebm import noise
from mmebm.ops.dynamics import Dynamics, energies, finite_rows_
from mmebm.ops.noise import plain
from mmebm.samplers import driver
from mmebm.samplers.arguments import parts_like
from mmebm.samplers.arithmetic import exp, masked, sqrt, total, where
from mmebm.samplers.chain import Problem, Run
from mmebm.samplers.driver import Sampler, Steps
from mmebm.samplers.gradient import Target
from mmebm.samplers.opaque import opaque
from mmebm.samplers.options import Setting, UnderdampedOptions
from mmebm.samplers.samples import NonFinite, Samples
from mmebm.samplers.settings import Numbers, check_numbers, check_quotients, rows_of
from mmebm.samplers.user_modules import Mode
from mmebm.samplers.watch import Callback
from mmebm.state import State

if TYPE_CHECKING:
    from typing_extensions import Unpack

_NUMBERS: Numbers = {"step_size": {}, "friction": {}, "temperature": {}, "mass": {"strict": True}}


@dataclass(frozen=True)
class Underdamped(Sampler):
    """An immutable description of underdamped Langevin dynamics; :meth:`sample` runs it.

    With h, friction c, temperature T and mass m, a step is

        v <- v - (h / 2) g(x) / m
        x <- x + (h / 2) v
        v <- exp(-c h) v + sqrt((1 - exp(-2 c h)) T / m) xi
        x <- x + (h / 2) v
        v <- v - (h / 2) g(x) / m

    (BAOAB: Leimkuhler and Matthews, Applied Mathematics Research eXpress 2013), xi standard normal, with one gradient:
    the last one is the next step's first. On a quadratic energy the stationary law of x is exact for
    every stable step, h sqrt(curvature / m) < 2; that of v is not. Friction 0 is leapfrog without noise.

    Every number may be a float, a tensor that broadcasts (a 1-D tensor of length chains means one value per chain), a
    mapping from the state's keys to such values, or a function of the step (:mod:`mmebm.samplers.schedules`). Step
    sizes that differ between elements or tensors leave the stationary law as it is.

    Args:
        step_size: ``h``, a time. In the limit of high friction it does what Langevin's step_size h^2 / (2 m) does.
        friction: ``c``, per unit of time.
        temperature: of the target exp(-E / T).

    Other args:
        mass: ``m``, of each element.
        log_prob: the callable returns log p instead of E.
        score: the callable returns the score d log p / dx, in the state's structure.
        mode: modules found in the energy run in "eval" or "train" mode or as they are ("keep"); restored afterwards.
        on_nonfinite: where a chain's state, energy or gradient is not finite: "warn" once, "ignore" (it is reported in
            ``info`` in any case), "freeze" it at its last finite state, or "raise" at the end.

    Raises:
        TypeError, ValueError: naming the argument, the value and what would do.

    Example:
        >>> sampler = mmebm.Underdamped(step_size=0.5, friction=1.0)
        >>> x = sampler.sample(lambda x: 0.5 * x.square().sum(1), torch.zeros(1000, 2), 100, seed=0).state
        >>> bool((x.var(0) - 1).abs().max() < 0.2)
        True
    """

    records: ClassVar[tuple[str, ...]] = ("energy", "grad_norm", "kinetic")
    carries: ClassVar[tuple[str, ...]] = ("velocity",)

    step_size: Setting
    friction: Setting = 1.0
    temperature: Setting = 1.0
    mass: Setting = 1.0
    log_prob: bool = False
    score: bool = False
    mode: Mode = "eval"
    on_nonfinite: NonFinite = "warn"

    def __post_init__(self) -> None:
        self._check_options()
        check_numbers(self, _NUMBERS)

    def replace(self, **changes: Unpack[UnderdampedOptions]) -> Underdamped:
        """A copy with some options changed.

        Example:
            >>> mmebm.Underdamped(0.1).replace(friction=2.0).friction
            2.0
        """
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
        progress: bool = False,
        callback: Callback | None = None,
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

        Example:
            >>> energy, x, sampler = lambda x: 0.5 * x.square().sum(1), torch.zeros(100, 2), mmebm.Underdamped(0.2)
            >>> first = sampler.sample(energy, x, 10, seed=0)
            >>> then = sampler.sample(
            ...     energy, first.state, 10, seed=0, first_step=10, velocity=first.info["velocity"]
            ... )
            >>> bool((then.state == sampler.sample(energy, x, 20, seed=0).state).all())
            True
        """
        return self._sample(locals())

    def _run(self, p: Problem, tensors: list[Tensor]) -> Run:
        rows = rows_of(self, _NUMBERS, p.keys, tensors, p.first_step, p.steps)
        constants = [_Constants.of(row, p.moving, tensors[0].dtype) for row in rows]
        return driver.loop(init, replace(p, params=constants), tensors)


def init(p: Problem, x: list[Tensor]) -> Steps:
    """The chain from ``x``: in C++ where that takes the state and float32 energies, else in PyTorch."""
    target, e, g = driver.start(p, x)
    chain = (_CppSteps if driver.in_cpp(p, x, e) else _Steps)(p, target, x)
    chain.restart(e, g)
    return chain


class _Steps(Steps):
    """The steps in PyTorch.

    Attributes:
        v: velocities of the tensors that move. energy, g: at the state.
        alive: bool (chains,), cleared where state, velocity, energy or gradient was not finite.
    """

    def __init__(self, p: Problem, target: Target, x: list[Tensor]) -> None:
        super().__init__(p, x)
        self.target = target
        given = p.carried.get("velocity")
        if given is None:
            self.v = [s * self.normals(i, 0, noise.MOMENTUM) for i, s in zip(p.moving, p.row(0).thermal)]
        else:
            parts = parts_like("velocity", given, p, x)
            self.v = [masked(p.masks[i], parts[i].detach().clone()) for i in p.moving]
        every = torch.ones(self.chains, dtype=torch.bool, device=self.device)
        self.alive = p.carried["alive"].clone() if "alive" in p.carried else every

    def restart(self, energy: Tensor | None, g: list[Tensor]) -> None:
        """``energy`` and gradient at the state."""
        self.energy, self.g = energy, g
        self._mark([*(self.x[i] for i in self.problem.moving), *self.v, *g], energy)

    def _mark(self, parts: list[Tensor], energy: Tensor | None) -> None:
        # a scalar energy does not say which chain made it what it is
        each = [energy] if energy is not None and energy.dim() else []
        for part in (*parts, *each):
            finite_rows_(self.alive, part)

    def step(self, k: int, *, create_graph: bool = False) -> Mapping[str, Tensor]:
        p = self.problem
        if (k and self.target.varies) or self.changed:
            self.restart(*self.target(self.x, k))
        c: _Constants = p.row(k)
        out: dict[str, Tensor] = {}
        if p.record:
            zero = torch.zeros(self.chains, dtype=self.x[0].dtype, device=self.device)
            out["kinetic"] = total([0.5 * m * w * w for m, w in zip(c.mass, self.v)], zero)
            out["grad_norm"] = total([p * p for p in self.g], zero).sqrt()
            if self.energy is not None:
                out["energy"] = self.energy.clone()  # frozen chains keep theirs in place
        self.move(c, k)
        return out

    def move(self, c: _Constants, k: int) -> None:
        moving = self.problem.moving
        x, v = [self.x[i] for i in moving], self.v
        w = [a - kick * p for a, kick, p in zip(v, c.kick, self.g)]
        y = [a + drift * b for a, drift, b in zip(x, c.drift, w)]
        w = [decay * a + s * self.normals(i, k, noise.DRIFT) for a, decay, s, i in zip(w, c.decay, c.noise, moving)]
        y = [a + drift * b for a, drift, b in zip(y, c.drift, w)]
        moved = list(self.x)
        for i, t in zip(moving, y):
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

    def broken(self) -> Tensor:
        return ~self.alive

    def info(self) -> dict[str, Any]:
        # zeros for tensors that stay
        full = [torch.zeros_like(t) for t in self.x]
        for i, part in zip(self.problem.moving, self.v, strict=True):
            full[i] = part
        return {"velocity": self.problem.build(full)}

    def carried(self) -> dict[str, Any]:
        return {"alive": self.alive, **self.info()}


class _CppSteps(_Steps):
    """The same in C++: a call before each gradient, and one after it."""

    def __init__(self, p: Problem, target: Target, x: list[Tensor]) -> None:
        super().__init__(p, target, x)
        self.op = Dynamics(
            [x[i] for i in p.moving],
            indices=p.moving,
            masks=[p.masks[i] for i in p.moving],
            seed=plain(p.seed),
            chain_offset=p.chain_offset,
            alive=self.alive,
            keeps=self.freeze,
            freeze=self.freeze,
        )
        self.first = plain(p.first_step)
        for own, given in zip(self.op.v, self.v, strict=True):
            own.copy_(given)
        self.v = self.op.v
        self.y = list(x)
        for i, t, to in zip(p.moving, self.op.x, self.op.y):
            self.x[i], self.y[i] = t, to
        self._constants: _Constants | None = None

    def restart(self, energy: Tensor | None, g: list[Tensor]) -> None:
        super().restart(energy, g)
        if self.freeze:
            for own, given in zip(self.op.g, g, strict=True):
                own.copy_(given)
            self.g = self.op.g
            if energy is not None and energy.dim():
                self.energy = energies(energy, self.chains).clone()
                self.op.set_energy(self.energy)

    def move(self, c: _Constants, k: int) -> None:
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
