"""The one driver of all samplers: resolves a call, has an engine run it, and hands out what comes back.

A sampler brings its description, a :class:`Sampler`, and ``init(problem, tensors) -> Steps``, whose ``step(k)`` is one
step of its rule. :func:`loop` is the engine that takes the steps one by one and records; those that run a whole chain
in one call stand beside it (:mod:`mmebm.samplers.whole_chain`, :mod:`mmebm.samplers.capture`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from mmebm import noise
from mmebm.ops import noise as drawn
from mmebm.ops.common.params import Rng
from mmebm.ops.dynamics import reason
from mmebm.samplers.arguments import resolve
from mmebm.samplers.arithmetic import finite_chains, masked
from mmebm.samplers.autograd_remedies import Remedies
from mmebm.samplers.chain import Problem, Run
from mmebm.samplers.gradient import Target
from mmebm.samplers.kept_nets import Seen
from mmebm.samplers.opaque import opaque
from mmebm.samplers.samples import NONFINITE, NonFinite, Samples, report_nonfinite
from mmebm.samplers.user_modules import Mode, modules_of, sampling
from mmebm.samplers.watch import Watch
from mmebm.state import State, check_type, choice, flag, flatten, like_state

S = TypeVar("S", bound=State)  # the state's structure


class Steps:
    """A chain that is taken a step at a time.

    Attributes:
        x: the state's tensors, the chain's own.
        shapes: of the records that hold more than one value per chain, what follows (steps, chains).
        changed: whether the energy is not the one that was evaluated at the state, but what a callback made of it.
    """

    shapes: Mapping[str, tuple[int, ...]] = {}

    def __init__(self, p: Problem, x: list[Tensor]) -> None:
        self.problem: Problem = p
        self.x: list[Tensor] = x
        self.chains: int = x[0].shape[0]
        self.device: torch.device = x[0].device
        self.freeze: bool = p.sampler.on_nonfinite == "freeze"
        self.changed: bool = False

    def step(self, k: int, *, create_graph: bool = False) -> Mapping[str, Tensor]:
        """Step ``k`` of this run; what of the step is recorded, where the problem asks for it."""
        raise NotImplementedError

    def state(self) -> list[Tensor]:
        """The tensors of the state that is handed out."""
        return self.x

    def broken(self) -> Tensor:
        """bool (chains,), chains to be reported as non-finite whatever the state holds."""
        raise NotImplementedError

    def info(self) -> dict[str, Any]:
        """What else is said of the run."""
        return {}

    def carried(self) -> dict[str, Any]:
        """See :attr:`mmebm.samplers.chain.Run.carried`."""
        return {}

    def normals(self, i: int, k: int, purpose: int) -> Tensor:
        """The normals of tensor ``i`` at step ``k`` of this run, 0 where observed."""
        p, t = self.problem, self.x[i]
        place = p.draw(k, noise.stream(i, purpose))
        return masked(p.masks[i], drawn.normal(t.shape, **place, dtype=t.dtype, device=t.device))

    def uniforms(self, count: int, k: int, purpose: int) -> Tensor:
        """(chains, count) uniforms in [0, 1) at step ``k`` of this run."""
        place = self.problem.draw(k, noise.stream(0, purpose))
        return drawn.uniform((self.chains, count), **place, device=self.device)


def start(p: Problem, x: list[Tensor]) -> tuple[Target, Tensor | None, list[Tensor]]:
    """The energy, and its value and gradient at ``x``, where a chain starts that goes along with both."""
    target = Target.of(p, masked=True)
    # a network need not take an empty batch
    if p.steps and x[0].shape[0]:
        return target, *target(x, 0)
    zero = torch.zeros(x[0].shape[0], dtype=x[0].dtype, device=x[0].device)
    return target, zero, [torch.zeros_like(x[i]) for i in p.moving]


def in_cpp(p: Problem, x: list[Tensor], energy: Tensor | None) -> bool:
    """Whether the steps are taken in C++, which takes float32 states and, but for scalars, energies."""
    known = energy is None or energy.dim() == 0 or energy.dtype is torch.float32
    moving = [x[i] for i in p.moving]
    return bool(moving) and len(x[0]) > 0 and known and reason(moving, p.seed, p.first_step) is None


class _Records:
    """The trace and the trajectory of a run, on the device."""

    def __init__(self, p: Problem, tensors: list[Tensor]) -> None:
        self.problem, self.like = p, tensors[0]
        self.rows: dict[str, Tensor] = {}
        self.kept: list[Tensor] = []
        if p.thin:
            # pinned, so that the copies do not hold up the steps
            pin = p.offload and self.like.is_cuda
            self.kept = [
                torch.empty(
                    p.steps // p.thin, *t.shape, dtype=t.dtype, device="cpu" if p.offload else t.device, pin_memory=pin
                )
                for t in tensors
            ]

    def add(self, k: int, values: Mapping[str, Tensor], chain: Steps) -> None:
        p = self.problem
        for name in p.record:
            value = values.get(name)
            if value is None:
                continue
            if name not in self.rows:
                self.rows[name] = torch.zeros(p.steps, *value.shape, dtype=value.dtype, device=value.device)
            self.rows[name][k].copy_(value.detach())
        if p.thin and (k + 1) % p.thin == 0:
            for rows, t in zip(self.kept, chain.state(), strict=True):
                rows[(k + 1) // p.thin - 1].copy_(t.detach(), non_blocking=p.offload)

    def trace(self, chain: Steps) -> dict[str, Tensor]:
        def empty(name: str) -> Tensor:
            shape = (self.problem.steps, chain.chains, *chain.shapes.get(name, ()))
            return torch.zeros(shape, dtype=torch.float32, device=self.like.device)

        return {name: self.rows[name] if name in self.rows else empty(name) for name in self.problem.record}


def loop(init: Callable[[Problem, list[Tensor]], Steps], p: Problem, tensors: list[Tensor]) -> Run:
    """The chain a step at a time, from ``tensors``, which stay as they are."""
    plain = p.steps - p.differentiable
    modules = modules_of(p.energy, *p.calls[0])
    records = _Records(p, tensors)
    # with all steps differentiable, the graph reaches back to the given state
    x = [t.clone() if p.differentiable and not plain else t.detach().clone() for t in tensors]
    # a network need not take an empty batch
    steps, taken = range(p.steps if x[0].shape[0] else 0), p.steps
    with torch.no_grad(), sampling(modules, p.sampler.mode):
        chain = init(p, x)
        seen = None if p.watch is None or p.watch.callback is None else Seen(p, x)
        for k in steps[:plain]:
            records.add(k, chain.step(k), chain)
            chain.changed = False
            if p.watch is not None and p.watch.due(k + 1):
                if p.watch(k + 1, [t.detach() for t in chain.state()]):
                    taken = k + 1
                    break
                if seen is not None:
                    chain.changed = seen != (seen := Seen(p, x))
    if p.differentiable:
        with torch.enable_grad(), sampling(modules, p.sampler.mode, once=False):
            for k in steps[plain:]:
                records.add(k, chain.step(k, create_graph=True), chain)
    with torch.no_grad():
        info, broken = chain.info(), chain.broken()
    if taken < p.steps:
        info = {**info, "steps": taken}
    trace = {name: rows[:taken] for name, rows in records.trace(chain).items()}
    kept = [rows[: taken // p.thin] for rows in records.kept] if p.thin else []
    return Run(chain.state(), trace, kept, broken, info, chain.carried())


@dataclass(frozen=True, repr=False, eq=False)
class Carry:
    """What goes along a chain besides its state, between two calls of a sampler's ``step``; its ``init`` makes one.

    A carry is not changed by the step that it is given to: the same carry and state give the same step again.

    Attributes:
        next_step: index of the step that comes next, which settings that are functions of the step are given.
        seed: of the noise; with ``rng="torch"`` that of ``generator``, or None.
        generator: with ``rng="torch"`` what draws the noise (this one does move on), or None: torch's own.
        carried: the sampler's own: velocities, a warm-up, a ladder.

    Example:
        >>> mmebm.Langevin(0.1).init(torch.zeros(8, 2), seed=3)
        <Carry: next step 0, seed 3, with nothing else>
    """

    next_step: int | Tensor
    seed: int | Tensor | None
    generator: torch.Generator | None
    options: Mapping[str, Any]
    carried: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __repr__(self) -> str:
        return (
            f"<Carry: next step {self.next_step}, seed {self.seed}, with {', '.join(self.carried) or 'nothing else'}>"
        )


class Sampler:
    """What all samplers share. A sampler is a frozen dataclass of its options.

    Attributes:
        records: what its steps can record.
        carries: what ``init`` takes for the chain to go on from.
        takes_16_bits, takes_blocks: whether states of float16 and bfloat16 are taken, and updates in turn.
    """

    records: ClassVar[tuple[str, ...]] = ()
    carries: ClassVar[tuple[str, ...]] = ()
    takes_16_bits: ClassVar[bool] = False
    takes_blocks: ClassVar[bool] = False

    # options of all, or with the value that they have in samplers without them
    mode: Mode = "eval"
    log_prob: bool = False
    score: bool = False
    rng: Rng = "philox"
    finish: Callable[[Any], Any] | None = None
    on_nonfinite: NonFinite = "warn"

    def _check_options(self) -> None:
        choice("mode", self.mode, ("eval", "train", "keep"))
        flag("log_prob", self.log_prob)
        flag("score", self.score)
        choice("on_nonfinite", self.on_nonfinite, NONFINITE)
        if self.log_prob and self.score:
            raise ValueError("give log_prob=True or score=True, not both")

    def _run(self, p: Problem, tensors: list[Tensor]) -> Run:
        """The sampler's engine. ``p`` has no constants yet."""
        raise NotImplementedError

    def _without_steps(self) -> str | None:
        """The option that a single step cannot have, or None."""
        return None if self.finish is None else "finish, which is applied once to the end of a chain"

    def _advance(self, p: Problem, tensors: list[Tensor]) -> tuple[list[Tensor], Tensor, Run]:
        """The state handed out, which chains are broken, and the run."""
        # leaving inference mode, so that autograd works
        with torch.inference_mode(False), torch.set_grad_enabled(p.differentiable > 0):
            run = self._run(p, tensors)
            x = run.state if p.differentiable else [t.detach() for t in run.state]
            broken = run.broken | ~finite_chains([t.detach() for t in x], x[0].shape[0], x[0].device)
            if p.offload and x[0].is_cuda:
                torch.cuda.current_stream(x[0].device).synchronize()
            if self.finish is not None:
                x = self._finished(p, x)
            report_nonfinite(self.on_nonfinite, broken, p.steps)
        return x, broken, run

    def _finished(self, p: Problem, x: list[Tensor]) -> list[Tensor]:
        """``finish`` of the final state, observed elements as they were."""
        assert self.finish is not None
        # on always, as for a score: the function may take a gradient itself
        with torch.enable_grad(), sampling(modules_of(self.finish), self.mode, once=not p.differentiable):
            # copies, as the function may work in place
            value = Remedies()(self.finish, p.build([t.clone() for t in x]))
        out = like_state(value, p.keys, x, name="finish")
        if not p.differentiable:
            out = [t.detach() for t in out]
        pairs = zip(x, out, p.masks, strict=True)
        return [t if mask is True else torch.where(mask, t, y) if mask is not False else y for t, y, mask in pairs]

    def _sample(self, given: Mapping[str, Any]) -> Samples:
        """``sample``, whose arguments by name are ``given``: those of :func:`mmebm.samplers.arguments.resolve`, what
        the sampler carries, and ``progress`` and ``callback``."""
        arguments = {name: value for name, value in given.items() if name not in ("self", *self.carries)}
        progress, callback = arguments.pop("progress"), arguments.pop("callback")
        carried = {name: given[name] for name in self.carries}
        p, tensors, seed = resolve(self, carried=carried, **arguments)
        flag("progress", progress)
        watch = None
        if progress or callback is not None:
            if p.differentiable or p.chunk_size is not None:
                raise ValueError("progress and callback go without differentiable and chunk_size")
            watch = Watch(p.steps, p.thin, p.build, callback, progress)
        try:
            x, broken, run = self._advance(replace(p, watch=watch), tensors)
        finally:
            if watch is not None:
                watch.close()
        taken = run.info.get("steps", p.steps)
        if given["inplace"]:
            with torch.no_grad():
                for t, new in zip(tensors, x, strict=True):
                    t.copy_(new)
            x = tensors
        place = {"seed": seed, "steps": taken, "first_step": p.first_step, "next_step": p.first_step + taken}
        info = {**place, "nonfinite": broken, **run.info}
        return Samples(p.build(x), run.trace, None if p.thin is None else p.build(run.trajectory), info)

    def init(
        self,
        state: State,
        *,
        carried: Mapping[str, Any] | None = None,
        observed: Any = None,
        blocks: Sequence[Any] | None = None,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
        chain_offset: int = 0,
        first_step: int | Tensor = 0,
    ) -> Carry:
        """What the first :meth:`step` from ``state`` is given.

        Args:
            carried: what the chain goes on from besides the state, by its name in ``sample``: Underdamped's "velocity",
                HMC's "adaptation", the "ladder" of parallel tempering. ``out.info`` of ``sample`` holds it.
            observed, blocks, seed, generator, chain_offset, first_step: as in ``sample``; blocks are Langevin's.

        Raises:
            TypeError, ValueError: naming the argument, the value and what would do.

        Example:
            >>> sampler, energy, x = mmebm.Underdamped(0.1), lambda x: x.square().sum(1), torch.zeros(100, 2)
            >>> out = sampler.sample(energy, x, 50, seed=0)
            >>> carry = sampler.init(out.state, carried=out.info, seed=0, first_step=50)
            >>> x, carry, info = sampler.step(energy, out.state, carry)
        """
        if blocks is not None and not self.takes_blocks:
            raise ValueError(
                f"blocks are Langevin's: a step of {type(self).__name__} moves all tensors, got {blocks!r:.80}"
            )
        if carried is not None:
            check_type("carried", carried, Mapping, "a mapping from name to value, as info of sample is")
        given = {name: value for name, value in (carried or {}).items() if name in self.carries and value is not None}
        options: dict[str, Any] = {"observed": observed, "blocks": blocks, "chain_offset": chain_offset}
        p, _, seed = resolve(self, flatten, state, 0, seed=seed, generator=generator, first_step=first_step, **options)
        return Carry(p.first_step, seed, p.generator if self.rng == "torch" else None, options, given)

    @opaque
    def step(
        self,
        energy: Callable[..., Any],
        state: S,
        carry: Carry,
        *,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        record: Collection[str] = (),
    ) -> tuple[S, Carry, dict[str, Any]]:
        """One step, for a loop of your own; ``n`` of them are ``sample(energy, state, n)`` bit for bit. Those of
        tempering are to a rounding of the energy: replicas that changed places are evaluated at other rows.

        State, weights, energy and arguments may be others at each step: energy and gradient at the state are evaluated
        by the step itself. So MALA, HMC, underdamped dynamics and tempering take one evaluation more than in
        ``sample``, which takes them from step to step.

        Args:
            energy, args, kwargs, record: as in ``sample``; they may differ from step to step.
            state: where the chain is; left as it is.
            carry: of ``init``, or of the step before; left as it is.

        Returns:
            The next state, in the same structure; the next carry; and of this step alone what ``sample`` has in
            ``info``, with what was recorded by name in ``info["trace"]``.

        Raises:
            TypeError, ValueError: naming the argument, the value and what would do.
            FloatingPointError: with ``on_nonfinite="raise"``, where a chain is not finite.

        Example:
            >>> sampler, x = mmebm.HMC(0.2), torch.zeros(100, 2)
            >>> carry = sampler.init(x, seed=0)
            >>> for k in range(10):
            ...     x, carry, info = sampler.step(lambda x: x.square().sum(1), x, carry)
            >>> carry.next_step
            10
        """
        if not isinstance(carry, Carry):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"carry must be what init or the last step returned, got {type(carry).__name__}")
        option = self._without_steps()
        if option is not None:
            raise ValueError(f"step goes without {option}")
        _, tensors, _ = flatten(state)
        own = {"generator": carry.generator} if self.rng == "torch" else {"seed": carry.seed}
        p, tensors, _ = resolve(
            self,
            energy,
            state,
            1,
            args=args,
            kwargs=kwargs,
            first_step=carry.next_step,
            record=record,
            carried=carry.carried,
            **own,
            **carry.options,
        )
        x, broken, run = self._advance(p, tensors)
        recorded = {name: rows[0] for name, rows in run.trace.items()}
        after = Carry(p.first_step + 1, carry.seed, carry.generator, carry.options, run.carried)
        return p.build(x), after, {"nonfinite": broken, **run.info, "trace": recorded}
