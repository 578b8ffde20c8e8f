"""Parallel tempering: a ladder of temperatures as a batch dimension, with exchanges between neighbours."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, SupportsFloat

import torch
from torch import Tensor

from mmebm import noise
from mmebm.ops import noise as drawn
from mmebm.ops.common.params import StepOptions, StepParams
from mmebm.ops.dynamics import Proposals, energies, exchange
from mmebm.ops.langevin_step import CppStepper
from mmebm.ops.noise import plain
from mmebm.samplers import driver
from mmebm.samplers.arguments import parts_like
from mmebm.samplers.arithmetic import finite_chains, map_tensors, masked, per_chain_shape, where
from mmebm.samplers.chain import Problem, Run
from mmebm.samplers.driver import Sampler, Steps
from mmebm.samplers.gradient import Target, one_per_chain
from mmebm.samplers.metropolis import log_ratio
from mmebm.samplers.opaque import opaque
from mmebm.samplers.options import TemperingOptions
from mmebm.samplers.samples import NonFinite, Samples
from mmebm.samplers.separable import check_repeated
from mmebm.samplers.settings import is_sequence, leaves
from mmebm.samplers.user_modules import Mode
from mmebm.samplers.watch import Callback
from mmebm.state import State, check_setting, choice, integer, per_key

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class ParallelTempering(Sampler):
    """An immutable description of parallel tempering with Langevin steps (Swendsen and Wang, Physical Review Letters
    1986; Geyer 1991); :meth:`sample` runs it.

    Every chain has a replica at each of R temperatures. A step moves all replicas of all chains, with one call of the
    energy on (chains * R, ...) rows and one gradient, by x - a dE/dx + sqrt(2 a T) xi, and then tries to exchange
    neighbours: pairs (0, 1), (2, 3), ... and pairs (1, 2), (3, 4), ... in turn, each with probability
    min(1, exp((1 / T_r - 1 / T_r+1) (E_r - E_r+1))). The result is the replicas at the first temperature.

    Args:
        step_size: ``a``, the coefficient of the gradient: a number, a sequence or 1-D tensor of R numbers, one per
            temperature, or a mapping from the state's keys to such.
        temperatures: R increasing numbers, of the targets exp(-E / T); the first is the one that is wanted. Neighbours
            must be close: exchanges are rare once T_r+1 / T_r - 1 is above about sqrt(2 / elements).

    Other args:
        swap_every: try exchanges after every so many steps.
        accept: "metropolis", so that every temperature has its exact law, or None, Langevin steps with their bias.
        log_prob: the callable returns log p instead of E.
        mode: modules found in the energy run in "eval" or "train" mode or as they are ("keep"); restored afterwards.
        on_nonfinite: where a replica's state, energy or gradient is not finite, it is not exchanged, and its chain is
            reported in ``info``: "warn" once, "ignore", "freeze" the replica where it is, or "raise" at the end.

    Raises:
        TypeError, ValueError: naming the argument, the value and what would do.

    Example:
        >>> two_modes = lambda x: 4 * (x.square() - 1).square().sum(1)
        >>> sampler = mmebm.ParallelTempering(step_size=0.02, temperatures=[1.0, 2.0, 4.0, 8.0])
        >>> x = sampler.sample(two_modes, torch.ones(200, 1), 500, seed=0).state
        >>> bool(0.3 < (x < 0).double().mean() < 0.7)  # all of them started in the other one
        True
    """

    records: ClassVar[tuple[str, ...]] = ("energy", "ladder_energy", "accept_prob", "swap_prob", "replica")
    carries: ClassVar[tuple[str, ...]] = ("ladder",)

    step_size: SupportsFloat | Sequence[float] | Mapping[Any, Any]
    temperatures: Sequence[float]
    _: dataclasses.KW_ONLY
    swap_every: int = 1
    accept: Literal["metropolis"] | None = "metropolis"
    log_prob: bool = False
    mode: Mode = "eval"
    on_nonfinite: NonFinite = "warn"

    def __post_init__(self) -> None:
        self._check_options()
        choice("accept", self.accept, ("metropolis", None))
        integer("swap_every", self.swap_every, 1)
        given = self.temperatures
        if isinstance(given, (str, Mapping)) or not hasattr(given, "__len__") or not hasattr(given, "__iter__"):
            raise TypeError(f"temperatures must be a sequence of increasing numbers, got {given!r:.80}")
        try:
            ladder = tuple(float(t) for t in given)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # the last, of tensors without numbers
            raise TypeError(f"temperatures must be a sequence of increasing numbers, got {given!r:.80}") from None
        increasing = all(a < b for a, b in itertools.pairwise(ladder))
        if not ladder or not increasing or not (0 < ladder[0] and ladder[-1] < math.inf):
            raise ValueError(f"temperatures must be increasing, positive and finite, got {ladder}")
        object.__setattr__(self, "temperatures", ladder)
        for label, leaf in leaves("step_size", self.step_size) or [("step_size", None)]:
            self._rungs(label, leaf)

    def replace(self, **changes: Unpack[TemperingOptions]) -> ParallelTempering:
        """A copy with some options changed.

        Example:
            >>> mmebm.ParallelTempering(0.1, [1.0, 2.0]).replace(swap_every=5).swap_every
            5
        """
        return dataclasses.replace(self, **changes)

    def _rungs(self, label: str, value: Any) -> float | Tensor:
        """A step size as a number, or as a 1-D tensor with one per temperature."""
        if isinstance(value, Tensor) and value.dim() == 0:
            check_setting(label, value, strict=True)
            return value.reshape(1).expand(len(self.temperatures))
        if not isinstance(value, Tensor) and not is_sequence(value):
            check_setting(label, value, strict=True)
            return float(value)
        items: Sequence[Any] = [value] if isinstance(value, Tensor) else value
        for item in items:
            check_setting(label, item, strict=True)
        if isinstance(value, Tensor):
            out = value
        else:
            out = torch.tensor([float(item) for item in items], dtype=torch.float64, device="cpu")
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
        progress: bool = False,
        callback: Callback | None = None,
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

        Example:
            >>> sampler, energy = mmebm.ParallelTempering(0.1, [1.0, 2.0]), lambda x: 0.5 * x.square().sum(1)
            >>> out = sampler.sample(energy, torch.zeros(100, 2), 50, seed=0)
            >>> out.info["swap_acceptance"].shape, out.info["ladder"].shape
            (torch.Size([100, 1]), torch.Size([100, 2, 2]))
        """
        return self._sample(locals())

    def _run(self, p: Problem, tensors: list[Tensor]) -> Run:
        if isinstance(p.first_step, Tensor):
            raise ValueError("first_step must be an int, as it says which neighbours are next, got a tensor")
        chains, device = tensors[0].shape[0], tensors[0].device
        sizes = per_key("step_size", self.step_size, p.keys, required=True)
        temperatures = torch.tensor(self.temperatures, dtype=tensors[0].dtype, device=device).repeat(chains)
        params: list[StepParams] = []
        for i, t in enumerate(tensors):
            size = self._rungs("step_size", sizes[i])
            if isinstance(size, Tensor):
                size = per_chain_shape(size.to(device, t.dtype).repeat(chains), t)
            params.append(StepParams(size, (2 * size * per_chain_shape(temperatures, t)).sqrt()))
        return driver.loop(init, dataclasses.replace(p, params=[params]), tensors)


def init(p: Problem, x: list[Tensor]) -> Steps:
    """The ladders from ``x``: in C++ where that takes the state and float32 energies, else in PyTorch."""
    rungs, chains = len(p.sampler.temperatures), x[0].shape[0]

    def repeat(t: Tensor) -> Tensor:
        return t.repeat_interleave(rungs, 0) if t.dim() and t.shape[0] == chains else t

    # what the energy sees: chains * rungs rows
    rows = dataclasses.replace(
        p,
        calls=[map_tensors(call, repeat) for call in p.calls],
        masks=[mask if isinstance(mask, bool) else repeat(mask) for mask in p.masks],
    )
    ladder = p.carried.get("ladder")
    if ladder is None:
        replicas = [t.repeat_interleave(rungs, 0) for t in x]
    else:
        replicas = [part.detach().flatten(0, 1).clone() for part in parts_like("ladder", ladder, p, x, rungs)]
    target, e, g = driver.start(rows, replicas)
    if rungs > 1 and p.steps and chains and ladder is None:
        check_repeated(p, [t[::rungs] for t in replicas], [t[::rungs] for t in g])
    e = one_per_chain("ParallelTempering", e)
    moving, params = [replicas[i] for i in p.moving], [p.row(0)[i] for i in p.moving]
    fast = driver.in_cpp(p, replicas, e) and Proposals.takes(params, moving)
    chain = (_CppLadders if fast else _Ladders)(p, rows, target, replicas, params)
    chain.restart(e, g, p.carried.get("living"))
    return chain


class _Ladders(Steps):
    """Moves and exchanges in PyTorch.

    Attributes:
        x, energy: the replicas, (chains * R, ...), and their energies.
        living: bool (chains * R,), where state, energy and gradient are finite now.
        accept_sum, swap_sum: the probabilities summed, (chains, R) and (chains, R - 1); tried: exchanges by side.
        ever: bool (chains, R), where any move was accepted. origin: int64 (chains, R), which replica is there.
    """

    energy: Tensor
    g: list[Tensor]
    living: Tensor
    ever: Tensor
    origin: Tensor

    def __init__(self, p: Problem, rows: Problem, target: Target, x: list[Tensor], params: list[StepParams]) -> None:
        super().__init__(p, x)
        self.target, self.params, self.masks = target, params, [rows.mask(i) for i in p.moving]
        rungs = self.rungs = len(p.sampler.temperatures)
        chains = self.chains = x[0].shape[0] // rungs
        temperatures = torch.tensor(p.sampler.temperatures, dtype=x[0].dtype, device=self.device)
        self.inverse = 1.0 / temperatures
        self.per_row = temperatures.repeat(chains)
        self.accept_sum = torch.zeros(chains, rungs, dtype=temperatures.dtype, device=self.device)
        self.swap_sum = torch.zeros(chains, rungs - 1, dtype=temperatures.dtype, device=self.device)
        self.tried = [0, 0]
        self.ever = torch.zeros(chains, rungs, dtype=torch.bool, device=self.device)
        self.origin = torch.arange(rungs, dtype=torch.int64, device=self.device).repeat(chains, 1)
        if "replica" in p.carried:
            self.origin = p.carried["replica"].clone()
        self.shapes = {
            **dict.fromkeys(("ladder_energy", "accept_prob", "replica"), (rungs,)),
            "swap_prob": (rungs - 1,),
        }

    def restart(self, energy: Tensor, g: list[Tensor], living: Tensor | None = None) -> None:
        """``energy`` and gradient at the replicas; ``living``: those that were not frozen before."""
        self.energy, self.g = energy, g
        parts = [self.x[i] for i in self.problem.moving]
        self.living = (
            finite_chains([*parts, energy, *g], len(energy), self.device) if living is None else living.clone()
        )

    def step(self, k: int, *, create_graph: bool = False) -> Mapping[str, Tensor]:
        p = self.problem
        if (k and self.target.varies) or self.changed:
            e, g = self.target(self.x, k)
            self.restart(one_per_chain("ParallelTempering", e), g)
        before = self.energy.reshape(self.chains, self.rungs).clone() if p.record else self.energy
        accept_prob = self.move(k)
        count, due = divmod(int(p.first_step) + k + 1, p.sampler.swap_every)
        swap_prob = self.exchange((count - 1) % 2, k) if not due and self.rungs > 1 else None
        if not p.record:
            return {}
        if swap_prob is None:
            swap_prob = torch.full_like(self.swap_sum, math.nan)
        return {
            "energy": before[:, 0],
            "ladder_energy": before,
            "accept_prob": accept_prob,
            "swap_prob": swap_prob,
            "replica": self.origin,
        }

    def state(self) -> list[Tensor]:
        return [t.reshape(self.chains, self.rungs, *t.shape[1:])[:, 0].clone() for t in self.x]

    def broken(self) -> Tensor:
        rows = self.living & finite_chains(self.x, len(self.living), self.device)
        return ~rows.reshape(self.chains, self.rungs).all(1)

    def info(self) -> dict[str, Any]:
        p, swaps = self.problem, self.swap_sum.clone()
        for side in (0, 1):
            # NaN where nothing was tried
            swaps[:, side::2] /= self.tried[side] or math.nan
        return {
            "ladder": p.build([t.reshape(self.chains, self.rungs, *t.shape[1:]) for t in self.x]),
            "acceptance": self.accept_sum / (p.steps or math.nan),
            "swap_acceptance": swaps,
            "never_accepted": ~self.ever if p.steps else self.ever,
        }

    def carried(self) -> dict[str, Any]:
        out = {"ladder": self.info()["ladder"], "replica": self.origin}
        return {**out, "living": self.living} if self.freeze else out

    def move(self, k: int) -> Tensor:
        """A Langevin step of all replicas; the probability of each, (chains, R)."""
        x, e, g = self.x, self.energy, self.g
        moving, y = self.problem.moving, list(x)
        for i, p, gradient in zip(moving, self.params, g):
            y[i] = x[i] - p.step_size * gradient + p.noise_scale * self._normals(i, k)
        e_new, g_new = self.target(y, k)
        e_new = one_per_chain("ParallelTempering", e_new)
        old, new = [x[i] for i in moving], [y[i] for i in moving]
        sound = finite_chains([e_new, *new, *g_new], len(e), self.device)
        if self.problem.sampler.accept is None:
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
            accept = self.uniforms(self.rungs, k, noise.ACCEPT).reshape(-1) < accept_prob
            self.living = self.living | accept
        self.x, self.energy, self.g = where(accept, y, x), torch.where(accept, e_new, e), where(accept, g_new, g)
        accept_prob = accept_prob.reshape(-1, self.rungs)
        self.accept_sum = self.accept_sum + accept_prob
        self.ever = self.ever | accept.reshape(-1, self.rungs)
        return accept_prob

    def exchange(self, side: int, k: int) -> Tensor:
        """Neighbours exchanged; the probability of each pair, (chains, R - 1), NaN where it was not tried."""
        rungs = self.rungs
        swap_prob = torch.full_like(self.swap_sum, math.nan)
        energies, living = self.energy.reshape(-1, rungs), self.living.reshape(-1, rungs)
        lower, upper = slice(side, rungs - 1, 2), slice(side + 1, rungs, 2)
        ratio = (self.inverse[lower] - self.inverse[upper]) * (energies[:, lower] - energies[:, upper])
        prob = torch.nan_to_num(ratio.clamp(max=0.0).exp(), nan=0.0)
        prob = torch.where(living[:, lower] & living[:, upper], prob, 0.0)
        swap_prob[:, lower] = prob
        self.swap_sum[:, lower] += prob
        self.tried[side] += 1
        swapped = self.uniforms(rungs - 1, k, noise.SWAP)[:, lower] < prob
        source = torch.arange(rungs, dtype=torch.int64, device=self.device).repeat(self.chains, 1)
        source[:, lower] += swapped
        source[:, upper] -= swapped.long()
        flat = (source + rungs * torch.arange(self.chains, dtype=torch.int64, device=self.device)[:, None]).reshape(-1)
        self.x = [t.index_select(0, flat) for t in self.x]
        self.energy, self.g = self.energy.index_select(0, flat), [t.index_select(0, flat) for t in self.g]
        self.living, self.origin = self.living[flat], self.origin.gather(1, source)
        return swap_prob

    def _normals(self, i: int, k: int) -> Tensor:
        """Normals of the replicas of tensor ``i``, (chains * R, ...): a chain's elements are replica by replica, so
        that the first temperature has Langevin's noise and a longer ladder leaves the lower rungs theirs."""
        p, t = self.problem, self.x[i]
        shape = (self.chains, self.rungs, *t.shape[1:])
        xi = drawn.normal(shape, **p.draw(k, noise.stream(i)), dtype=t.dtype, device=t.device)
        mask = p.mask(i)
        return masked(None if mask is None else mask.unsqueeze(1), xi).flatten(0, 1)


class _CppLadders(_Ladders):
    """The same in C++: the Langevin step, the Metropolis test and the exchange are a call each."""

    old: list[Tensor]
    new: list[Tensor]
    views: list[Tensor]

    def __init__(self, p: Problem, rows: Problem, target: Target, x: list[Tensor], params: list[StepParams]) -> None:
        super().__init__(p, rows, target, x, params)
        rungs, chains = self.rungs, self.chains
        self.seed, self.first = plain(p.seed), plain(p.first_step)
        self.old = [x[i].contiguous() for i in p.moving]
        self.new = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in self.old]
        # a chain's replicas are one long chain of the step, so that the noise is as in _normals

        def by_chain(t: Tensor) -> Tensor:
            return t.reshape(chains, rungs, *t.shape[1:])

        self.views = [by_chain(t) for t in self.new]
        self.constants = [
            StepParams(*(by_chain(v) if isinstance(v, Tensor) and v.dim() else v for v in (c.step_size, c.noise_scale)))
            for c in params
        ]
        options = StepOptions(
            seed=self.seed,
            streams=tuple(p.moving),
            noisy=(True,) * len(self.new),
            chain_offset=p.chain_offset,
            observed=tuple(None if mask is None else by_chain(mask) for mask in self.masks),
        )
        self.stepper = CppStepper(options, self.views)
        shapes = [t.shape for t in self.old]
        self.test = Proposals(
            shapes,
            self.masks,
            seed=self.seed,
            stream=noise.stream(0, noise.ACCEPT),
            chain_offset=p.chain_offset,
            keep=True,
            rows_per_chain=rungs,
        )
        self.test.set(params, self.old, self.per_row)
        self.swap_prob = torch.zeros_like(self.swap_sum)
        self.all_live = True

    def restart(self, energy: Tensor, g: list[Tensor], living: Tensor | None = None) -> None:
        # accepted rows are written over them
        super().restart(energies(energy, len(energy)).clone(), [t.contiguous().clone() for t in g], living)
        self.all_live = bool(self.living.all())
        if self.freeze:
            self.test.set_alive(self.living)

    def move(self, k: int) -> Tensor:
        for t, old in zip(self.new, self.old, strict=True):
            t.copy_(old)
        grads = [t.reshape(v.shape) for t, v in zip(self.g, self.views, strict=True)]
        self.stepper.step(self.views, grads, self.constants, self.first + k, with_noise=True, stats=False)
        y = list(self.x)
        for i, t in zip(self.problem.moving, self.new, strict=True):
            y[i] = t
        e_new, g_new = self.target(y, k)
        e_new = one_per_chain("ParallelTempering", e_new)
        if self.problem.sampler.accept is None:
            accept_prob = torch.ones_like(self.accept_sum)
            if self.freeze:
                sound = finite_chains([e_new, *self.new, *g_new], len(e_new), self.device)
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
        for i, t in zip(self.problem.moving, self.old, strict=True):
            self.x[i] = t
        self.accept_sum += accept_prob
        return accept_prob

    def exchange(self, side: int, k: int) -> Tensor:
        exchange(
            [*self.old, *self.g],
            rungs=self.rungs,
            seed=self.seed,
            step=self.first + k,
            stream=noise.stream(0, noise.SWAP),
            chain_offset=self.problem.chain_offset,
            inverse=self.inverse,
            energy=self.energy,
            alive=self.living,
            origin=self.origin,
            prob=self.swap_prob,
            prob_sum=self.swap_sum,
            side=side,
        )
        self.tried[side] += 1
        return self.swap_prob
