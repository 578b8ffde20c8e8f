"""Hamiltonian Monte Carlo: leapfrog trajectories, accepted or rejected chain by chain."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from mmebm import noise
from mmebm.ops.dynamics import Dynamics
from mmebm.ops.noise import plain
from mmebm.samplers import driver
from mmebm.samplers.arithmetic import finite_chains, per_chain_shape, sqrt, total, where
from mmebm.samplers.chain import Problem, Run
from mmebm.samplers.driver import Sampler, Steps
from mmebm.samplers.gradient import Target, one_per_chain
from mmebm.samplers.opaque import opaque
from mmebm.samplers.options import HMCOptions, Setting
from mmebm.samplers.samples import NonFinite, Samples
from mmebm.samplers.settings import Numbers, check_numbers, check_quotients, is_mapping, rows_of
from mmebm.samplers.user_modules import Mode
from mmebm.samplers.watch import Callback
from mmebm.state import State, check_setting, choice, integer

if TYPE_CHECKING:
    from typing_extensions import Unpack

_NUMBERS: Numbers = {"step_size": {}, "temperature": {"strict": True}, "mass": {"strict": True}}


@dataclass(frozen=True)
class HMC(Sampler):
    """An immutable description of Hamiltonian Monte Carlo (Duane et al. 1987; Neal 2011); :meth:`sample` runs it.

    A step draws velocities from N(0, T / m), follows the Hamiltonian E(x) + sum of m v^2 / 2, over all elements of all
    tensors, for ``leapfrog_steps`` leapfrog steps

        v <- v - (h / 2) dE/dx / m;  x <- x + h v;  v <- v - (h / 2) dE/dx / m

    and accepts each chain's end with probability min(1, exp(-(change of the Hamiltonian) / T)). It takes one gradient
    per leapfrog step. The stationary law is the target's, whatever the step size. A trajectory that overflows, or
    ends where the energy or its gradient is inf or NaN, is rejected. A chain that is at such a place itself is
    reported in ``info["nonfinite"]`` and takes no part in the warm-up; from an energy of +inf it moves to any finite
    one, from NaN nowhere.

    ``step_size``, ``mass`` and ``temperature`` may each be a float, a tensor that broadcasts (a 1-D tensor of length
    chains means one value per chain), or a function of the step; the first two also a mapping from the state's keys.

    Args:
        step_size: of a leapfrog step, a time; stable below 2 / sqrt(curvature / m).
        leapfrog_steps: per trajectory. 1 is Metropolis-adjusted Langevin with step_size h^2 / (2 m).
        temperature: of the target exp(-E / T); a number, or one per chain.
        adapt: number of warm-up steps (those of index below ``adapt``) in which dual averaging moves a factor of all
            step sizes towards ``target_accept``; it is fixed afterwards. Samples of the warm-up are not the target's.
            Hoffman and Gelman, JMLR 2014, section 3.2.

    Other args:
        mass: ``m``, of each element.
        target_accept: the mean acceptance probability that the warm-up aims at.
        adapt_over: a factor for each "chain", or one for "all" chains of the call, which settles sooner, but lets a
            chain depend on the batch it is in.
        log_prob: the callable returns log p instead of E.
        mode: modules found in the energy run in "eval" or "train" mode or as they are ("keep"); restored afterwards.
        on_nonfinite: "warn" once where a chain is at a state of non-finite energy or gradient, "ignore" (it is reported
            in ``info`` in any case), "freeze" it where it is, or "raise" at the end.

    Raises:
        TypeError, ValueError: naming the argument, the value and what would do.

    Example:
        >>> sampler = mmebm.HMC(step_size=0.1, leapfrog_steps=5, adapt=50)
        >>> out = sampler.sample(lambda x: 0.5 * x.square().sum(1), torch.zeros(1000, 2), 100, seed=0)
        >>> bool((out.state.var(0) - 1).abs().max() < 0.2), out.info["acceptance"].shape
        (True, torch.Size([1000]))
    """

    records: ClassVar[tuple[str, ...]] = ("energy", "accept_prob", "accepted", "energy_error", "step_scale")
    carries: ClassVar[tuple[str, ...]] = ("adaptation",)

    step_size: Setting
    leapfrog_steps: int = 10
    mass: Setting = 1.0
    temperature: Setting = 1.0
    adapt: int = 0
    target_accept: float = 0.8
    adapt_over: Literal["chain", "all"] = "chain"
    log_prob: bool = False
    mode: Mode = "eval"
    on_nonfinite: NonFinite = "warn"

    def __post_init__(self) -> None:
        self._check_options()
        choice("adapt_over", self.adapt_over, ("chain", "all"))
        integer("leapfrog_steps", self.leapfrog_steps, 1)
        integer("adapt", self.adapt, 0)
        check_numbers(self, _NUMBERS)
        if is_mapping(self.temperature):
            raise TypeError(
                f"temperature must be a number or one per chain, as all tensors are accepted together, got "
                f"{self.temperature!r}"
            )
        check_setting("target_accept", self.target_accept, strict=True)
        if isinstance(self.target_accept, Tensor) or self.target_accept >= 1:
            raise ValueError(f"target_accept must be a number between 0 and 1, got {self.target_accept!r}")

    def replace(self, **changes: Unpack[HMCOptions]) -> HMC:
        """A copy with some options changed.

        Example:
            >>> mmebm.HMC(0.1).replace(adapt=100).adapt
            100
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
        adaptation: Mapping[str, Tensor] | None = None,
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

        Example:
            >>> energy, x = lambda x: 0.5 * x.square().sum(1), torch.zeros(100, 2)
            >>> first = mmebm.HMC(0.1, adapt=20).sample(energy, x, 10, seed=0)
            >>> then = mmebm.HMC(0.1, adapt=20).sample(
            ...     energy, first.state, 10, seed=0, first_step=10, adaptation=first.info["adaptation"]
            ... )
            >>> bool((then.state == mmebm.HMC(0.1, adapt=20).sample(energy, x, 20, seed=0).state).all())
            True
        """
        return self._sample(locals())

    def _run(self, p: Problem, tensors: list[Tensor]) -> Run:
        rows = rows_of(self, _NUMBERS, p.keys, tensors, p.first_step, p.steps)
        for row in rows:
            _check_per_chain(row["temperature"][0], tensors[0].shape[0])
            for i in p.moving:
                check_quotients(row["step_size"][i], row["temperature"][i], row["mass"][i], tensors[i].dtype)
        return driver.loop(init, replace(p, params=rows), tensors)


def init(p: Problem, x: list[Tensor]) -> Steps:
    """The chain from ``x``: in C++ where that takes the state and float32 energies, else in PyTorch."""
    target, e, g = driver.start(p, x)
    e = one_per_chain("HMC", e)
    chain = (_CppTrajectories if driver.in_cpp(p, x, e) else _Trajectories)(p, target, x)
    chain.restart(e, g)
    return chain


class _Trajectories(Steps):
    """The steps in PyTorch.

    Attributes:
        energy, g: at the state, (chains,) and of the tensors that move.
        living: bool (chains,), where state, energy and gradient are finite now. alive: where they were at every
            gradient, with ``on_nonfinite="freeze"``; else True.
        ever: bool (chains,), who moved at all. counted: steps since the warm-up.
    """

    def __init__(self, p: Problem, target: Target, x: list[Tensor]) -> None:
        super().__init__(p, x)
        self.target = target
        self.warmup = _Adaptation.start(p, x[0])
        self.counted = 0
        self.prob_sum = torch.zeros(self.chains, dtype=x[0].dtype, device=self.device)
        self.ever = torch.zeros(self.chains, dtype=torch.bool, device=self.device)
        self.alive = p.carried["alive"].clone() if "alive" in p.carried else ~self.ever

    def restart(self, energy: Tensor, g: list[Tensor]) -> None:
        """``energy`` and gradient at the state."""
        self.energy, self.g = energy, g
        parts = [self.x[i] for i in self.problem.moving]
        self.living = finite_chains([*parts, energy.detach(), *g], self.chains, self.device)
        if self.freeze:
            self.alive.logical_and_(self.living)

    def step(self, k: int, *, create_graph: bool = False) -> Mapping[str, Tensor]:
        p = self.problem
        if (k and self.target.varies) or self.changed:
            e, g = self.target(self.x, k)
            self.restart(one_per_chain("HMC", e), g)
        scale = self.warmup.scale if self.warmup else None
        before = {"energy": self.energy.clone()} if "energy" in p.record else {}
        out = self.move(p.row(k), scale, k)
        self.counted += 1
        if p.record:
            before["step_scale"] = torch.ones_like(self.prob_sum, dtype=self.x[0].dtype) if scale is None else scale
        if self.warmup and self.warmup.update(out["accept_prob"], self.living):
            # the mean acceptance is that of the steps after the warm-up
            self.prob_sum.zero_()
            self.counted = 0
        return {**out, **before}

    def move(self, row: dict[str, list[Any]], scale: Tensor | None, k: int) -> dict[str, Tensor]:
        """One trajectory; what may be recorded."""
        x, e, g = self.x, self.energy, self.g
        moving = self.problem.moving
        h, mass, temperature = ([row[name][i] for i in moving] for name in ("step_size", "mass", "temperature"))
        if scale is not None:
            h = [size * per_chain_shape(scale, x[i]) for size, i in zip(h, moving)]
        v = [self.normals(i, k, noise.MOMENTUM) * sqrt(t / m) for i, t, m in zip(moving, temperature, mass)]
        y, w, e_new, p = leapfrog(self.target, k, x, v, g, h, mass, self.problem.sampler.leapfrog_steps)
        e_new = one_per_chain("HMC", e_new)
        # the change of m v^2 / 2, element by element: the two sums' own rounding would be large for a large state
        error = total([0.5 * m * (b - a) * (b + a) for m, a, b in zip(mass, v, w)], e_new - e) + (e_new - e)
        t = row["temperature"][0]
        ratio = -error / (t.reshape(-1) if isinstance(t, Tensor) else t)
        # NaN, the end of a broken trajectory, is never accepted; nor is an energy of -inf, or a gradient that leads out
        accept_prob = torch.nan_to_num(ratio.clamp(max=0.0).exp(), nan=0.0)
        allowed = finite_chains([e_new, *(y[i] for i in moving), *p], self.chains, self.device) & self.alive
        accept_prob = torch.where(allowed, accept_prob, 0.0)
        accept = self.uniforms(1, k, noise.ACCEPT).squeeze(1) < accept_prob
        self.x, self.energy, self.g = where(accept, y, x), torch.where(accept, e_new, e), where(accept, p, g)
        self.ever, self.living = self.ever | accept, self.living | accept
        self.prob_sum = self.prob_sum + accept_prob
        return {"accept_prob": accept_prob, "accepted": accept.to(e.dtype), "energy_error": error}

    def broken(self) -> Tensor:
        return ~(self.living & self.alive)

    def info(self) -> dict[str, Any]:
        one = torch.ones(self.chains, dtype=self.x[0].dtype, device=self.device)
        out = {
            "acceptance": (self.prob_sum / self.counted).to(one.dtype) if self.counted else one * math.nan,
            "step_scale": self.warmup.scale if self.warmup else one,
            "never_accepted": ~self.ever if self.problem.steps else self.ever,
        }
        return {**out, "adaptation": self.warmup.state()} if self.warmup else out

    def carried(self) -> dict[str, Any]:
        return {"alive": self.alive, **({"adaptation": self.warmup.state()} if self.warmup else {})}


class _CppTrajectories(_Trajectories):
    """The same in C++: a call for each piece of a trajectory between two gradients."""

    def __init__(self, p: Problem, target: Target, x: list[Tensor]) -> None:
        super().__init__(p, target, x)
        self.op = Dynamics(
            [x[i] for i in p.moving],
            indices=p.moving,
            masks=[p.masks[i] for i in p.moving],
            seed=plain(p.seed),
            chain_offset=p.chain_offset,
            alive=self.alive,
            keeps=True,
            freeze=self.freeze,
        )
        self.first = plain(p.first_step)
        self.y = list(x)
        for i, t, to in zip(p.moving, self.op.x, self.op.y):
            self.x[i], self.y[i] = t, to
        self.prob_sum = self.prob_sum.double()
        self.out = {
            name: torch.zeros(self.chains, dtype=torch.float32, device=self.device)
            for name in ("accept_prob", "accepted", "energy_error")
        }
        self.energy, self.g = torch.zeros_like(self.out["accepted"]), self.op.g
        self.op.set_energy(self.energy)
        self.op.set_outputs(**self.out, prob_sum=self.prob_sum, ever_accepted=self.ever)
        self._row: dict[str, list[Any]] | None = None

    def restart(self, energy: Tensor, g: list[Tensor]) -> None:
        for own, given in zip((self.energy, *self.g), (energy, *g), strict=True):
            own.copy_(given)
        super().restart(self.energy, self.g)
        self._all_live = bool(self.living.all())

    def move(self, row: dict[str, list[Any]], scale: Tensor | None, k: int) -> dict[str, Tensor]:
        op = self.op
        if scale is not None or row is not self._row:
            for n, i in enumerate(self.problem.moving):
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
        for _ in range(self.problem.sampler.leapfrog_steps - 1):
            op.leap(self.target(self.y, k)[1])
        e_new, g = self.target(self.y, k)
        op.hmc_end(g, one_per_chain("HMC", e_new), self.first + k)
        if not self._all_live:
            self.living = self.living | (self.out["accepted"] > 0)
        return self.out


def leapfrog(
    target: Target,
    k: int,
    x: list[Tensor],
    v: list[Tensor],
    g: list[Tensor],
    h: Sequence[Any],
    mass: Sequence[Any],
    steps: int,
) -> tuple[list[Tensor], list[Tensor], Tensor | None, list[Tensor]]:
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
    def start(cls, p: Problem, like: Tensor) -> _Adaptation | None:
        sampler, first, given = p.sampler, p.first_step, p.carried.get("adaptation")
        if not sampler.adapt:
            if given is not None:
                raise ValueError("adaptation needs a sampler with adapt above 0, got adapt=0")
            return None
        if isinstance(first, Tensor):
            raise ValueError("first_step must be an int with adapt, got a tensor")
        chains = like.shape[0]
        if given is None:
            if first:
                raise ValueError(
                    f'first_step={first} with adapt={sampler.adapt} needs adaptation=out.info["adaptation"] of the run '
                    "before it"
                )
            return cls(sampler, 0, dict.fromkeys(cls.STATE, torch.zeros(chains, dtype=like.dtype, device=like.device)))
        for name in cls.STATE:
            value = given.get(name)
            if not isinstance(value, Tensor) or value.shape != (chains,) or value.device != like.device:
                raise ValueError(
                    f"adaptation[{name!r}] must be a tensor ({chains},) on {like.device}, got {value!r:.80}"
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
