"""Langevin dynamics as one call: ``langevin(energy, x0, steps=60, step_size=1e-2)``.

The update rule stands in :mod:`mmebm.reference.langevin_step`; the noise in :mod:`mmebm.noise`. This module is the loop
around them: the gradient of the user's energy, settings per tensor, chain and step, records, and the user's modules
left as they were.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mmebm import noise
from mmebm.ops import langevin_step as op
from mmebm.ops.langevin_mlp import Precision
from mmebm.ops.params import NormOver, Outside, Rng, StepParams
from mmebm.reference.langevin_step import clamp, per_chain, widen
from mmebm.samplers import capture, fused, metropolis
from mmebm.samplers.modes import Mode, modules_of, sampling
from mmebm.samplers.schedules import Schedule
from mmebm.state import (
    Key,
    State,
    Structure,
    broadcast,
    check_setting,
    flatten,
    integer,
    like_state,
    observed_masks,
    per_key,
)

__all__ = ["Langevin", "Samples", "langevin"]

RECORDS = ("energy", "grad_norm", "displacement", "clipped", "nonfinite", "accepted")
# The numbers of a step, and what each may be (see check_setting).
_NUMBERS: dict[str, dict[str, Any]] = {
    "step_size": {}, "noise_scale": {}, "temperature": {}, "grad_clip": {}, "grad_norm_clip": {"strict": True},
    "max_update": {}, "prior_std": {"strict": True},
}  # fmt: skip
_REQUIRED = ("step_size", "noise_scale", "temperature")
_BOUND: dict[str, Any] = {"low": -math.inf}


@dataclass(frozen=True)
class Samples:
    """What a chain returns. Nothing here has synchronised with the device.

    Attributes:
        state: the final state, in the structure that was given, detached unless ``differentiable``.
        trace: per recorded quantity a tensor (steps, chains), or (steps,) for the energy where it returns a scalar; see
            ``record`` in :meth:`Langevin.sample`.
        trajectory: with ``thin=t`` the states after steps t, 2t, ...: the given structure of (steps // t, chains, ...).
        info: seed, steps, first_step, next_step (where a restart goes on), backend, op ("langevin_mlp" for the whole
            chain in one call, "langevin_graph" for a captured graph of all steps, "langevin_step" for a step at a time)
            and the reason for both, and ``nonfinite``, a boolean (chains,) tensor: chains that hold an inf or NaN, or
            were frozen for it.
    """

    state: Any
    trace: dict[str, Tensor]
    trajectory: Any
    info: dict[str, Any]


@dataclass(frozen=True)
class _Problem:
    """One chain run with everything resolved. ``calls`` and ``params`` have an entry per step, or one for all steps."""

    energy: Callable[..., Any]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    keys: tuple[Key, ...]
    build: Structure
    steps: int
    blocks: list[list[int]]
    masks: list[bool | Tensor]
    params: list[list[StepParams]]
    ends: list[StepParams]  # whose bounds hold at the end only; empty where they hold at every step
    project: list[Callable[[Tensor], Tensor] | None]
    noisy: list[bool]
    seed: int | Tensor
    generator: torch.Generator | None
    chain_offset: int
    first_step: int | Tensor
    record: tuple[str, ...]
    thin: int | None
    offload: bool
    differentiable: int


def _choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}")


def _leaves(name: str, value: Any) -> list[tuple[str, Any]]:
    """What a setting holds, with a name for messages: each entry of a mapping, or itself; None is left out."""
    if not isinstance(value, Mapping):
        return [] if value is None else [(name, value)]
    return [(f"{name}[{key!r}]", leaf) for key, leaf in value.items() if leaf is not None]


def _map(value: Any, function: Callable[[Any], Any]) -> Any:
    """``function`` of a setting's value: of each entry of a mapping, of a schedule's value at each step."""
    if isinstance(value, Mapping):
        return {key: _map(leaf, function) for key, leaf in value.items()}
    return (lambda k: function(value(k))) if callable(value) else function(value)


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """``function`` of every tensor in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (list, tuple):
        return type(value)(_map_tensors(part, function) for part in value)
    if type(value) is dict:
        return {name: _map_tensors(part, function) for name, part in value.items()}
    return value


@dataclass(frozen=True)
class Langevin:
    """An immutable description of Langevin dynamics; :meth:`sample` runs it.

    Every number may be a float, a tensor that broadcasts (a 1-D tensor of length chains means one value per chain), a
    mapping from the state's keys (names of a dict, indices of a list) to such values, or a function of the step
    (:mod:`mmebm.samplers.schedules`). A tensor that a mapping of clips, bounds or priors leaves out has none.

    Args:
        step_size: ``a``, literally the coefficient of the gradient.
        noise_scale: ``s``, literally the standard deviation of the noise; ``None`` means sqrt(2 step_size temperature).
        temperature: of the target exp(-E / temperature), where ``noise_scale`` is None.
        noise_at: "after" the gradient (Langevin), or "before" it (IGEBM and its relatives).
        clamp_noise: with ``noise_at="before"``, clamp to the bounds before the gradient is taken too.
        grad_clip: limit of each element of the gradient.
        grad_norm_clip: limit of the gradient's l2 norm, of each chain or of the whole tensor (``norm_over``).
        max_update: limit of each element of the update, noise included.
        prior_std: adds x / prior_std^2 to the gradient, the drift of a Gaussian prior or reference N(0, prior_std^2).
        bounds: (low, high), each as above or None.
        bounds_at: at every "step" or only at the "end" (the states of the trajectory are then without bounds).
        outside: at the bounds "clamp", or "reject": a chain with an element outside stays where it was.
        project: a function (or one per key) applied to a tensor after its update, e.g. onto a sphere.
        finish: a function of the final state, in its structure, that returns the state to hand out (a denoising step,
            a rescaling); after the bounds at the end, without effect on the trajectory and on observed elements.
        accept: None, "descent": a chain moves only where its energy fell, or "metropolis": the step is a proposal
            (MALA), so that the chain's law is exp(-E / T) exactly, T = s^2 / (2a), which all tensors must share.
        log_prob: the callable returns log p (or f = -E) instead of E.
        score: the callable returns the score d log p / dx, in the state's structure.
        mode: modules found in the energy run in "eval" or "train" mode or as they are ("keep"); restored afterwards.
        rng: "philox", noise that depends on (seed, chain, step, tensor, element) only, or "torch", ``torch.randn`` per
            tensor in state order, so that a ported script gives its old numbers.
        backend: "auto", or one by name, which then must be available (:func:`mmebm.backends`).
        precision: of a fused MLP energy's matrix products on a GPU (:class:`mmebm.ops.langevin_mlp.MlpChain`).
        capture: a chain that is not one fused call as one CUDA graph, replayed (:mod:`mmebm.samplers.capture`): "auto"
            from the second equal call on, where it can be; True at once, or a BackendError with the reason; False not.
        on_nonfinite: "ignore" (reported in ``info``), "freeze" a chain at its last finite state, or "raise" at the end.

    Raises:
        TypeError, ValueError: naming the argument, the value and what would do.
    """

    step_size: Any
    noise_scale: Any = None
    temperature: Any = 1.0
    _: dataclasses.KW_ONLY
    noise_at: Literal["after", "before"] = "after"
    clamp_noise: bool = False
    grad_clip: Any = None
    grad_norm_clip: Any = None
    norm_over: NormOver = "chain"
    max_update: Any = None
    prior_std: Any = None
    bounds: Any = None
    bounds_at: Literal["step", "end"] = "step"
    outside: Outside = "clamp"
    project: Any = None
    finish: Callable[[Any], Any] | None = None
    accept: Literal["descent", "metropolis"] | None = None
    log_prob: bool = False
    score: bool = False
    mode: Mode = "eval"
    rng: Rng = "philox"
    backend: str = "auto"
    precision: Precision = "fp32"
    capture: Literal["auto", True, False] = "auto"
    on_nonfinite: Literal["ignore", "freeze", "raise"] = "ignore"

    def __post_init__(self) -> None:
        _choice("noise_at", self.noise_at, ("after", "before"))
        _choice("norm_over", self.norm_over, ("chain", "tensor"))
        _choice("bounds_at", self.bounds_at, ("step", "end"))
        _choice("outside", self.outside, ("clamp", "reject"))
        _choice("accept", self.accept, (None, "descent", "metropolis"))
        _choice("mode", self.mode, ("eval", "train", "keep"))
        _choice("rng", self.rng, ("philox", "torch"))
        _choice("precision", self.precision, get_args(Precision))
        if self.capture != "auto" and not isinstance(self.capture, bool):
            raise ValueError(f"capture must be 'auto', True or False, got {self.capture!r}")
        _choice("on_nonfinite", self.on_nonfinite, ("ignore", "freeze", "raise"))
        for name in ("step_size", "temperature"):
            value = getattr(self, name)
            if value is None or (isinstance(value, Mapping) and any(leaf is None for leaf in value.values())):
                raise TypeError(
                    f"{name} must be a number, a tensor, a mapping or a function of the step, got {value!r}"
                )
        for name, allowed in _NUMBERS.items():
            for label, leaf in _leaves(name, getattr(self, name)):
                if not callable(leaf):
                    check_setting(label, leaf, **allowed)
        plain = isinstance(self.temperature, (int, float)) and self.temperature == 1.0
        if self.noise_scale is not None and not plain:
            raise ValueError(
                "give noise_scale or temperature, not both: noise_scale is the noise's standard deviation; "
                f"got {self.noise_scale!r} and {self.temperature!r}"
            )
        if self.log_prob and self.score:
            raise ValueError("give log_prob=True or score=True, not both")
        for label, pair in _leaves("bounds", self.bounds):
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise ValueError(f"{label} must be (low, high), or a mapping to such pairs, got {pair!r:.80}")
            fixed = [end for end in pair if end is not None and not callable(end)]
            for end in fixed:
                check_setting(label, end, **_BOUND)
            if len(fixed) == 2 and not any(isinstance(end, Tensor) for end in fixed) and fixed[0] > fixed[1]:
                raise ValueError(f"{label} must have low <= high, got {pair!r}")
        if self.clamp_noise and (self.bounds is None or self.bounds_at == "end" or self.noise_at != "before"):
            raise ValueError('clamp_noise=True needs bounds at every step and noise_at="before"')
        if self.outside == "reject" and (self.bounds is None or self.bounds_at == "end" or self.noise_at == "before"):
            raise ValueError('outside="reject" needs bounds at every step and noise_at="after"')
        if self.accept is not None and (self.score or self.noise_at == "before"):
            raise ValueError(f'accept={self.accept!r} needs an energy and noise_at="after"')
        why = metropolis.refusal(self) if self.accept == "metropolis" else None
        if why is not None:
            raise ValueError(f'accept="metropolis" needs a step that can be taken back; it goes without {why}')
        if self.finish is not None and not callable(self.finish):
            raise TypeError(f"finish must be a function of the state, got {self.finish!r:.80}")
        for label, item in _leaves("project", self.project):
            if not callable(item):
                raise TypeError(f"{label} must be a function of a tensor, or a mapping to such, got {item!r:.80}")

    @classmethod
    def from_sgld(cls, scale: Any, **options: Any) -> Langevin:
        """The convention x <- x - s^2/2 dE/dx + s xi: step_size = s^2 / 2, noise_scale = s; temperature 1.

        Args:
            scale: ``s``, whatever a setting may be: a number, a tensor, a mapping or a function of the step.
        """
        for label, leaf in _leaves("scale", scale):
            if not callable(leaf):
                check_setting(label, leaf)
        return cls(_map(scale, lambda s: s**2 / 2), scale, **options)

    def replace(self, **changes: Any) -> Langevin:
        """A copy with some options changed."""
        return dataclasses.replace(self, **changes)

    @property
    def implied_temperature(self) -> Any:
        """s^2 / (2a): the chain's stationary law is close to exp(-E / T). A mapping where the settings are mappings;
        the value at step 0 where they are schedules; inf for step_size 0 with noise."""

        def temperature(a: Any, s: Any, t: Any) -> Any:
            a, s, t = (v(0) if callable(v) else v for v in (a, s, t))
            if s is None:
                return t
            if isinstance(a, Tensor) or isinstance(s, Tensor):
                return s**2 / (2 * a)
            return s**2 / (2 * a) if a else (math.inf if s else 0.0)

        parts = (self.step_size, self.noise_scale, self.temperature)
        keys = [key for part in parts if isinstance(part, Mapping) for key in part]
        if not keys:
            return temperature(*parts)
        return {
            key: temperature(*(part.get(key) if isinstance(part, Mapping) else part for part in parts))
            for key in dict.fromkeys(keys)
        }

    def sample(
        self,
        energy: Callable[..., Any],
        state: State,
        steps: int,
        *,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        observed: Any = None,
        blocks: Sequence[Any] | None = None,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
        chain_offset: int = 0,
        first_step: int | Tensor = 0,
        record: Collection[str] = (),
        thin: int | None = None,
        offload: bool = False,
        inplace: bool = False,
        chunk_size: int | None = None,
        differentiable: int | bool | None = None,
    ) -> Samples:
        """Runs ``steps`` steps from ``state``.

        Args:
            energy: called as ``energy(state, *args, **kwargs)`` with the state in the structure given; returns anything
                with a leading chain dimension, or a scalar; the gradient is that of its sum.
            state: a tensor (chains, ...), or a list, tuple or dict of such tensors. Left as it is, unless ``inplace``.
            steps: number of updates; 0 returns a copy.
            args, kwargs: what else the energy is given; a :class:`~mmebm.samplers.schedules.Schedule` among them stands
                for its value at each step.
            observed: what keeps its value: a collection of keys, a mapping from key to a boolean mask, or one mask.
            blocks: keys, or collections of keys, updated in turn within a step, each with its own gradient; together
                they hold every key once.
            seed: 64-bit int, or a 1-element int64 tensor on the state's device; None draws one from ``generator`` or,
                without one, from torch's global CPU generator.
            generator: a ``torch.Generator``; with ``rng="torch"`` it draws the noise itself.
            chain_offset: global index of the first chain: rows [o, o+n) alone equal those of the whole run.
            first_step: index of the first step, so that K1 steps and then K2 with ``first_step=K1`` equal K1 + K2.
            record: any of "energy" and "grad_norm" (where the gradient is taken; before clips and prior),
                "displacement" (distance from the state before the step to the one after it), "clipped" (elements whose
                gradient or update a clip changed), "nonfinite" (elements of the update that are inf or NaN),
                "accepted" (with ``accept``: the fraction of the step's blocks that moved, so 0 or 1 without blocks).
            thin: keep the state after every ``thin``-th step.
            offload: keep the trajectory in the CPU's memory (pinned where the state is on a GPU: the copies overlap
                with the steps, and the call waits for them at its end).
            inplace: write the result into the given tensors.
            chunk_size: run at most so many chains at a time; tensors in ``args`` and ``kwargs`` (also inside lists,
                tuples and dicts) whose first dimension is the number of chains are cut along.
            differentiable: keep the graph of the last k steps (True: all), with parameters and ``state`` as they are.

        Returns:
            :class:`Samples`.

        Raises:
            TypeError, ValueError: naming the argument, the value and what would do.
            BackendError: where an explicit backend cannot run this chain.
            FloatingPointError: with ``on_nonfinite="raise"``, where a chain ended non-finite.
        """
        if not callable(energy):
            raise TypeError(f"energy must be callable, got {type(energy).__name__}")
        keys, tensors, build = flatten(state)
        chains, device = tensors[0].shape[0], tensors[0].device
        steps = integer("steps", steps, 0)
        thin = None if thin is None else integer("thin", thin, 1)
        chunk_size = None if chunk_size is None else integer("chunk_size", chunk_size, 1)
        chain_offset = integer("chain_offset", chain_offset, 0, 2**32 - chains + 1)
        first_step = _counter("first_step", first_step, 0, 2**32 - steps + 1, device)
        last = steps if differentiable is True else integer("differentiable", differentiable or 0, 0)
        if last and (inplace or chunk_size is not None):
            raise ValueError(f"differentiable goes without inplace and chunk_size, got {differentiable!r}")
        if not isinstance(args, (list, tuple)):
            raise TypeError(f"args must be a list or tuple of further arguments, got {type(args).__name__}")
        if isinstance(record, str) or not isinstance(record, Collection) or any(name not in RECORDS for name in record):
            raise ValueError(f"record must be a collection of {list(RECORDS)}, got {record!r}")
        if "energy" in record and self.score:
            raise ValueError('record="energy" needs an energy; with score=True there is none')
        if "accepted" in record and self.accept is None:
            raise ValueError('record="accepted" needs accept="metropolis" or "descent"')
        if offload and thin is None:
            raise ValueError("offload moves the trajectory: it needs thin")
        if self.accept == "metropolis" and any(widen(t[:0]).dtype != t.dtype for t in tensors):
            raise ValueError('accept="metropolis" needs float32 or float64: a step rounded to 16 bits is no Gaussian')
        if inplace:
            _check_writable(keys, tensors)
        if self.rng == "torch" and (chain_offset or chunk_size is not None):
            raise ValueError('chain_offset and chunk_size need rng="philox": torch\'s noise depends on the batch')
        if chunk_size is not None and self.norm_over == "tensor" and self.grad_norm_clip is not None:
            raise ValueError('chunk_size cannot go with norm_over="tensor": its norm runs over all chains')
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        if seed is not None:
            if generator is not None:
                raise ValueError("give seed or generator, not both")
            seed = _counter("seed", seed, -(2**63), 2**64, device)
        given_seed = seed
        if self.rng == "torch":
            if isinstance(seed, Tensor):
                raise TypeError('seed must be an int with rng="torch", got a tensor')
            if generator is not None and generator.device.type != device.type:
                raise ValueError(f'rng="torch" draws on {device}, but the generator is on {generator.device}')
            if seed is not None:
                generator = torch.Generator(device).manual_seed(seed)
            seed = 0
        elif seed is None:
            seed = given_seed = noise.draw_seed(generator)

        masks = observed_masks(observed, keys, tensors)
        groups = _blocks(blocks, keys, masks)
        # leaving inference mode, so that autograd works; what was made in it is copied, as autograd cannot save it
        with torch.inference_mode(False), torch.set_grad_enabled(last > 0):
            params, noisy = _params(self, keys, tensors, first_step, steps)
            calls = _calls(tuple(args), dict(kwargs or {}), first_step, steps)
            problem = _Problem(
                energy=energy, calls=calls, keys=keys, build=build, steps=steps, blocks=groups, masks=masks,
                params=params, ends=[], project=per_key("project", self.project, keys, required=False), noisy=noisy,
                seed=seed, generator=generator, chain_offset=chain_offset, first_step=first_step,
                record=tuple(record), thin=thin, offload=bool(offload), differentiable=min(last, steps),
            )  # fmt: skip
            if self.bounds_at == "end":
                free = [[dataclasses.replace(p, low=None, high=None) for p in row] for row in params]
                problem = dataclasses.replace(problem, params=free, ends=params[-1] if steps else [])
            if chunk_size is None or chains <= chunk_size:
                result = self._run(problem, tensors)
            else:
                rows = [slice(start, start + chunk_size) for start in range(0, chains, chunk_size)]
                result = _join([self._run(_cut(problem, chains, part), [t[part] for t in tensors]) for part in rows])
            out, trace, trajectory, broken, info = result
            if offload and device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
            if self.finish is not None:
                out = self._finished(problem, out)
            if self.on_nonfinite == "raise" and bool(broken.any()):
                raise FloatingPointError(
                    f"{int(broken.sum())} of {chains} chains are not finite after {steps} steps; a smaller step_size, "
                    'grad_clip or on_nonfinite="freeze" would keep them'
                )
        if inplace:
            with torch.no_grad():
                for given, new in zip(tensors, out, strict=True):
                    given.copy_(new)
            out = tensors
        info = {
            "seed": given_seed, "steps": steps, "first_step": first_step, "next_step": first_step + steps,
            "nonfinite": broken, **info,
        }  # fmt: skip
        return Samples(build(out), trace, None if thin is None else build(trajectory), info)

    def _run(self, p: _Problem, tensors: list[Tensor]) -> Any:
        modules = modules_of(p.energy, *p.calls[0])
        with torch.no_grad(), sampling(modules, self.mode):
            whole = fused.run(self, p, [t.detach() for t in tensors])
        if isinstance(whole, fused.FusedRun):
            return self._finish(p, whole.state, whole.trace, whole.trajectory, whole.frozen, {
                "backend": whole.backend, "op": "langevin_mlp", "reason": whole.reason
            })  # fmt: skip
        captured = capture.run(self, p, [t.detach() for t in tensors], self._chain)
        if isinstance(captured, str):
            op_name, ran = "langevin_step", self._chain(p, tensors)
            reason = f"{ran.reason}; a step at a time: {whole}; not captured: {captured}"
        else:
            op_name, ran = "langevin_graph", captured
            reason = f"{ran.reason}; not a fused call: {whole}"
        return self._finish(p, ran.state, ran.trace, ran.trajectory, ran.frozen, {
            "backend": ran.backend, "op": op_name, "reason": reason
        })  # fmt: skip

    def _chain(self, p: _Problem, tensors: list[Tensor]) -> fused.FusedRun:
        """The loop, from ``tensors``, which stay as they are."""
        chains, device = tensors[0].shape[0], tensors[0].device
        modules = modules_of(p.energy, *p.calls[0])
        plain = p.steps - p.differentiable
        # with all steps differentiable, the graph reaches back to the given state
        x = [t.clone() if p.differentiable and not plain else t.detach().clone() for t in tensors]
        loop = _Loop(self, p, x)
        # a network need not take an empty batch
        steps = range(p.steps if chains else 0)
        with torch.no_grad(), sampling(modules, self.mode):
            for k in steps[:plain]:
                x = loop.step(k, x)
        if p.differentiable:
            loop.cached = None  # has no graph
            with torch.enable_grad(), sampling(modules, self.mode, freeze=False):
                for k in steps[plain:]:
                    x = loop.step(k, x, create_graph=True)
        empty = torch.zeros(p.steps, chains, device=device)
        trace = {name: torch.stack(rows) if rows else empty for name, rows in loop.trace.items()}
        frozen = None if loop.alive is None else ~loop.alive
        return fused.FusedRun(x, trace, loop.kept, frozen, loop.backend, loop.reason)

    def _finished(self, p: _Problem, x: list[Tensor]) -> list[Tensor]:
        """``finish`` of the final state, observed elements as they were."""
        assert self.finish is not None
        # on always, as for a score: the function may take a gradient itself
        with torch.enable_grad(), sampling(modules_of(self.finish), self.mode, freeze=not p.differentiable):
            value = self.finish(p.build(list(x)))
        out = like_state(value, p.keys, x, name="finish")
        if not p.differentiable:
            out = [t.detach() for t in out]
        pairs = zip(x, out, p.masks, strict=True)
        return [t if mask is True else torch.where(mask, t, y) if mask is not False else y for t, y, mask in pairs]

    @staticmethod
    def _finish(
        p: _Problem, x: list[Tensor], trace: dict[str, Tensor], kept: list[Tensor], frozen: Tensor | None,
        info: dict[str, str],
    ) -> Any:  # fmt: skip
        """What is left after the last step: bounds at the end, which chains are broken."""
        if p.ends:
            x = [_clamp_at_end(p, i, t) for i, t in enumerate(x)]
        if not p.differentiable:
            x = [t.detach() for t in x]
        broken = torch.zeros(x[0].shape[0], dtype=torch.bool, device=x[0].device) if frozen is None else frozen
        for t in x:
            broken = broken | ~torch.isfinite(per_chain(t.detach())).all(dim=1)
        return x, trace, kept, broken, info


class _Loop:
    """The steps of one run: holds what goes along the chain (records, frozen chains, the cached energy)."""

    def __init__(self, sampler: Langevin, problem: _Problem, tensors: list[Tensor]) -> None:
        p = problem
        self.sampler, self.problem = sampler, problem
        self.params = [[[row[i] for i in group] for group in p.blocks] for row in p.params]
        self.steppers: list[op.Stepper] = []
        self.references: list[op.Stepper] = []
        self.backend, self.reason = "torch", "nothing to update"
        for group in p.blocks:
            options = op.StepOptions(
                seed=p.seed, streams=tuple(group), noisy=tuple(p.noisy[i] for i in group), chain_offset=p.chain_offset,
                norm_over=sampler.norm_over, outside=sampler.outside, clamp_noise=sampler.clamp_noise,
                observed=tuple(self._mask(i) for i in group), rng=sampler.rng, generator=p.generator,
            )  # fmt: skip
            chosen, self.reason = op.stepper(
                sampler.backend, [tensors[i].detach() for i in group], options, [p.params[0][i] for i in group]
            )
            self.backend = chosen.name
            self.steppers.append(chosen)
            self.references.append(chosen if chosen.name == "torch" else op.TorchStepper(options))
        chains, device = tensors[0].shape[0], tensors[0].device
        self.trace: dict[str, list[Tensor]] = {name: [] for name in p.record}
        self.kept: list[Tensor] = []
        if p.thin:
            # pinned, so that the copies do not hold up the steps
            home: dict[str, Any] = {"device": "cpu", "pin_memory": device.type == "cuda"} if p.offload else {}
            self.kept = [torch.empty(p.steps // p.thin, *t.shape, dtype=t.dtype, **{"device": device, **home})
                         for t in tensors]  # fmt: skip
        self.alive: Tensor | None = None
        if sampler.on_nonfinite == "freeze":
            self.alive = torch.ones(chains, dtype=torch.bool, device=device)
        # the accepted point's energy and gradients (by tensor) are the next update's: one gradient per update
        self.cached: tuple[Tensor | None, dict[int, Tensor]] | None = None
        self.moving = [i for group in p.blocks for i in group]
        self.reuses = sampler.accept is not None and len(p.calls) == 1
        self.temperatures: list[float | Tensor] = []
        if sampler.accept == "metropolis" and self.moving:
            names = [p.keys[i] for i in self.moving]
            self.temperatures = [metropolis.temperature([row[i] for i in self.moving], names) for row in p.params]
        # what a step must do besides the update, known before the chain starts
        self.noise_first = sampler.noise_at == "before"
        self.projects = any(function is not None for function in p.project)
        self.stats = any(name not in ("energy", "accepted") for name in p.record)
        self.wants_energy = "energy" in p.record or sampler.accept is not None
        revised = self.noise_first or self.projects or sampler.accept is not None or self.alive is not None
        self.measures = "displacement" in p.record and revised
        self.keeps_old = sampler.accept is not None or self.alive is not None or self.measures

    def _mask(self, i: int) -> Tensor | None:
        mask = self.problem.masks[i]
        return mask if isinstance(mask, Tensor) else None

    def step(self, k: int, x: list[Tensor], *, create_graph: bool = False) -> list[Tensor]:
        """Step ``k`` of this run; a new list."""
        p = self.problem
        x = list(x)
        totals: dict[str, Tensor] = {}
        if not p.blocks and "energy" in self.trace:
            totals["energy"] = self._per_chain(self._call(x, k).detach())
        for b in range(len(p.blocks)):
            self._update(b, k, x, totals, create_graph)
        for name, rows in self.trace.items():
            rows.append(totals[name] if name in totals else torch.zeros(x[0].shape[0], device=x[0].device))
        if p.thin and (k + 1) % p.thin == 0:
            for rows, t in zip(self.kept, x, strict=True):
                rows[(k + 1) // p.thin - 1].copy_(t.detach(), non_blocking=p.offload)
        return x

    def _update(self, b: int, k: int, x: list[Tensor], totals: dict[str, Tensor], create_graph: bool) -> None:
        """One block's update, written into the list ``x``."""
        p, group = self.problem, self.problem.blocks[b]
        stepper = self.references[b] if create_graph else self.steppers[b]
        params = self.params[min(k, len(self.params) - 1)][b]
        position = p.first_step + k
        current = [x[i] for i in group]
        old = [t.clone() for t in current] if stepper.inplace and self.keeps_old else current
        if self.noise_first:
            current = stepper.perturb(current, params, position)
            for i, t in zip(group, current, strict=True):
                x[i] = t
        energy, slopes = self.cached if self.cached is not None else self._slopes(b, k, x, create_graph)
        grads = [slopes[i] for i in group]
        y, stats = stepper.step(current, grads, params, position, with_noise=not self.noise_first, stats=self.stats)
        if self.projects:
            y = [self._project(i, t) for i, t in zip(group, y, strict=True)]
        if self.alive is not None:
            for t in y:
                self.alive = self.alive & torch.isfinite(per_chain(t.detach())).all(dim=1)
            y = _where(self.alive, y, old)
        if self.sampler.accept is not None:
            moved = self._accept(b, k, x, old, y, energy, slopes, create_graph)
            y = _where(moved, y, old)
            if "accepted" in self.trace:
                totals["accepted"] = totals.get("accepted", 0) + moved.to(torch.float32) / len(p.blocks)
        for i, t in zip(group, y, strict=True):
            x[i] = t
        if energy is not None and "energy" in self.trace:
            # blocks: the energy at the step's first gradient
            totals.setdefault("energy", energy)
        if stats is not None:
            if self.measures:
                moved = [per_chain(widen(t.detach()) - widen(o.detach())) for t, o in zip(y, old, strict=True)]
                stats = dataclasses.replace(stats, displacement=torch.cat(moved, dim=1).norm(dim=1))
            for name in ("grad_norm", "displacement"):
                part = getattr(stats, name).detach()
                totals[name] = torch.hypot(totals[name], part) if name in totals else part
            for name in ("clipped", "nonfinite"):
                totals[name] = totals.get(name, 0) + getattr(stats, name)

    def _call(self, x: list[Tensor], k: int) -> Any:
        p = self.problem
        args, kwargs = p.calls[min(k, len(p.calls) - 1)]
        value = p.energy(p.build(x), *args, **kwargs)
        if self.sampler.score:
            return value
        if not isinstance(value, Tensor):
            raise TypeError(f"energy must return a tensor, got {type(value).__name__}")
        if value.dim() and value.shape[0] != x[0].shape[0]:
            raise ValueError(
                f"energy must return a scalar or one value per chain ({x[0].shape[0]}, ...), "
                f"got shape {tuple(value.shape)}"
            )
        return value

    def _per_chain(self, value: Tensor) -> Tensor:
        value = per_chain(value).sum(1) if value.dim() else value
        return -value if self.sampler.log_prob else value

    def _evaluate(
        self, x: list[Tensor], group: Sequence[int], k: int, create_graph: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """The energy per chain, where it is wanted, and its gradient for the tensors of ``group``."""
        full = list(x)
        # on always: a user's score may take a gradient itself, and records nothing otherwise, as nothing requires one
        with torch.enable_grad():
            if self.sampler.score:
                parts = like_state(self._call(full, k), self.problem.keys, x)
                return None, [-parts[i] if create_graph else -parts[i].detach() for i in group]
            for i in group:
                if not (create_graph and full[i].requires_grad):
                    full[i] = full[i].detach().requires_grad_()
            value = self._call(full, k)
            leaves = [full[i] for i in group]
            grads: Sequence[Tensor | None] = [None] * len(leaves)
            if value.requires_grad:
                total = value.sum() if value.dim() else value
                grads = torch.autograd.grad(total, leaves, create_graph=create_graph, allow_unused=True)
        if all(g is None for g in grads) and not self._depends(x, k):
            raise ValueError("energy must depend on the state through differentiable operations; it does not")
        found = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True)]
        energy = self._per_chain(value.detach()) if self.wants_energy else None
        return energy, [-g for g in found] if self.sampler.log_prob else found

    def _depends(self, x: list[Tensor], k: int) -> bool:
        """Whether the energy depends on anything in the state (on some tensors it need not)."""
        every = [t.detach().requires_grad_() for t in x]
        with torch.enable_grad():
            total = self._call(every, k).sum()
            grads = torch.autograd.grad(total, every, allow_unused=True) if total.requires_grad else ()
        return any(g is not None for g in grads)

    def _project(self, i: int, y: Tensor) -> Tensor:
        function = self.problem.project[i]
        if function is None:
            return y
        out = function(y)
        if not isinstance(out, Tensor) or out.shape != y.shape or out.dtype != y.dtype:
            raise ValueError(f"project must return a tensor of shape {tuple(y.shape)} and {y.dtype}, got {out!r:.80}")
        mask = self._mask(i)
        if mask is not None:
            return torch.where(mask, y, out)
        # what the function returns may be the user's own tensor, and a stepper may overwrite the state
        return out if out is y else out.clone(memory_format=torch.contiguous_format)

    def _slopes(self, b: int, k: int, x: list[Tensor], create_graph: bool) -> tuple[Tensor | None, dict[int, Tensor]]:
        """The energy per chain and its gradient by tensor: block ``b``'s, or all where the next block can use them."""
        wanted = self.moving if self.reuses else self.problem.blocks[b]
        energy, grads = self._evaluate(x, wanted, k, create_graph)
        return energy, dict(zip(wanted, grads, strict=True))

    def _accept(
        self, b: int, k: int, x: list[Tensor], old: list[Tensor], y: list[Tensor], energy: Tensor | None,
        slopes: dict[int, Tensor], create_graph: bool,
    ) -> Tensor:  # fmt: skip
        """The chains that move from ``old`` to ``y``: boolean (chains,)."""
        group = self.problem.blocks[b]
        if energy is None or energy.dim() == 0:
            raise ValueError(f'accept="{self.sampler.accept}" needs one energy per chain; the energy returned a scalar')
        trial = list(x)
        for i, t in zip(group, y, strict=True):
            trial[i] = t
        new_energy, new_slopes = self._slopes(b, k, trial, create_graph)
        assert new_energy is not None
        if self.sampler.accept == "descent":
            moved = new_energy < energy
        else:
            ratio = metropolis.log_ratio(
                old, y, [slopes[i] for i in group], [new_slopes[i] for i in group], energy, new_energy,
                self.params[min(k, len(self.params) - 1)][b], [self._mask(i) for i in group],
                self.temperatures[min(k, len(self.temperatures) - 1)], self.sampler.norm_over,
            )  # fmt: skip
            moved = self._uniform(b, k, ratio) < ratio.exp()
        if self.reuses:
            kept = _where(moved, list(new_slopes.values()), list(slopes.values()))
            self.cached = torch.where(moved, new_energy, energy), dict(zip(slopes, kept, strict=True))
        return moved

    def _uniform(self, b: int, k: int, like: Tensor) -> Tensor:
        """The numbers in [0, 1) that decide about block ``b`` in step ``k``, one per chain."""
        p = self.problem
        if self.sampler.rng == "torch":
            return torch.rand(like.shape, dtype=like.dtype, device=like.device, generator=p.generator)
        return noise.uniform(
            like.shape, seed=p.seed, step=p.first_step + k, stream=noise.stream(p.blocks[b][0], noise.ACCEPT),
            chain_offset=p.chain_offset, dtype=like.dtype, device=like.device,
        )  # fmt: skip


def _clamp_at_end(p: _Problem, i: int, x: Tensor) -> Tensor:
    """Tensor ``i`` clamped to its bounds at the end of the chain, where not observed."""
    end, mask = p.ends[i], p.masks[i]
    if mask is True:
        return x
    y = clamp(widen(x), end.low, end.high).to(x.dtype)
    return torch.where(mask, x, y) if isinstance(mask, Tensor) else y


def _where(rows: Tensor, yes: Sequence[Tensor], no: Sequence[Tensor]) -> list[Tensor]:
    return [torch.where(rows.reshape(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(yes, no, strict=True)]


def _counter(name: str, value: Any, low: int, high: int, device: torch.device) -> int | Tensor:
    if not isinstance(value, Tensor):
        return integer(name, value, low, high)
    if value.numel() != 1 or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be an int or a 1-element integer tensor, got {value!r:.80}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device} but the state is on {device}")
    return value


def _check_writable(keys: Sequence[Key], tensors: Sequence[Tensor]) -> None:
    for key, t in zip(keys, tensors, strict=True):
        if any(size > 1 and stride == 0 for size, stride in zip(t.shape, t.stride(), strict=True)):
            raise ValueError(f"inplace needs memory for every element of state[{key!r}], got an expanded tensor")
        if t.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(f"inplace cannot write state[{key!r}] outside inference mode: it was made inside")


def _blocks(blocks: Any, keys: tuple[Key, ...], masks: list[bool | Tensor]) -> list[list[int]]:
    """The indices of the tensors that move, in the blocks in which they do."""
    moving = [i for i in range(len(keys)) if masks[i] is not True]
    if blocks is None:
        return [moving] if moving else []
    if not isinstance(blocks, (list, tuple)):
        raise TypeError(f"blocks must be a list of keys or of collections of keys, got {blocks!r:.80}")
    groups = [[item] if isinstance(item, (str, int)) else list(item) for item in blocks]
    named = [key for group in groups for key in group]
    if len(named) != len(keys) or set(named) != set(keys):
        raise ValueError(f"blocks must hold each of {list(keys)} exactly once, got {groups}")
    # in state order within a block, whatever the order of a set
    members = [[i for i in moving if keys[i] in group] for group in groups]
    return [group for group in members if group]


def _params(
    sampler: Langevin, keys: tuple[Key, ...], tensors: list[Tensor], first_step: int | Tensor, steps: int
) -> tuple[list[list[StepParams]], list[bool]]:
    """The constants of every tensor, one row for all steps or, with schedules, one per step; and who gets noise."""
    settings = {name: per_key(name, getattr(sampler, name), keys, required=name in _REQUIRED) for name in _NUMBERS}
    pairs = [pair or (None, None) for pair in per_key("bounds", sampler.bounds, keys, required=False)]
    settings["low"], settings["high"] = [pair[0] for pair in pairs], [pair[1] for pair in pairs]

    def value(name: str, i: int, k: int) -> Any:
        setting = settings[name][i]
        label = {"low": "bounds", "high": "bounds"}.get(name, name) + (f"[{keys[i]!r}]" if len(keys) > 1 else "")
        if callable(setting):
            setting, label = setting(k), f"{label} at step {k}"
            if setting is None and name in ("step_size", "temperature"):
                raise TypeError(f"{label} must be a number or a tensor, got None")
            if setting is not None:
                check_setting(label, setting, **_NUMBERS.get(name, _BOUND))
        if setting is None:
            return None
        out = broadcast(label, setting, tensors[i], widen(tensors[i][:0]).dtype)
        if name == "grad_norm_clip" and isinstance(out, Tensor):
            per_chain_allowed = sampler.norm_over == "chain" and out.dim() > 0 and out.numel() == out.shape[0]
            if out.numel() != 1 and not per_chain_allowed:
                raise ValueError(f"{label} limits a norm, of each chain or of the whole tensor, got {tuple(out.shape)}")
        return out

    def constants(i: int, k: int) -> StepParams:
        now = {name: value(name, i, k) for name in settings}
        temperature, low, high = now.pop("temperature"), now["low"], now["high"]
        if now["noise_scale"] is None:
            product = 2 * now["step_size"] * temperature
            now["noise_scale"] = product.sqrt() if isinstance(product, Tensor) else math.sqrt(product)
        if low is not None and high is not None:
            inverted = torch.as_tensor(low > high)
            # reading a tensor elsewhere would wait for its device
            if inverted.device.type == "cpu" and bool(inverted.any()):
                raise ValueError(f"bounds must have low <= high, got {low!r} and {high!r}")
        return StepParams(**now)

    def silent(name: str, i: int) -> bool:
        constant = settings[name][i]
        return not (constant is None or callable(constant) or isinstance(constant, Tensor)) and float(constant) == 0.0

    noisy = [
        not (silent("noise_scale", i) or (settings["noise_scale"][i] is None and silent("temperature", i)))
        for i in range(len(keys))
    ]
    if not any(callable(setting) for column in settings.values() for setting in column):
        return [[constants(i, 0) for i in range(len(keys))]], noisy
    if isinstance(first_step, Tensor):
        raise ValueError("first_step must be an int where a setting is a function of the step, got a tensor")
    # evaluated before the chain starts, so that no step waits for a copy to the device
    return [[constants(i, first_step + k) for i in range(len(keys))] for k in range(max(steps, 1))], noisy


def _calls(
    args: tuple[Any, ...], kwargs: dict[str, Any], first_step: int | Tensor, steps: int
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The energy's further arguments: one entry for all steps or, with schedules among them, one per step."""
    args, kwargs = _map_tensors((args, kwargs), lambda t: t.clone() if t.is_inference() else t)
    if not any(isinstance(value, Schedule) for value in (*args, *kwargs.values())):
        return [(args, kwargs)]
    if isinstance(first_step, Tensor):
        raise ValueError("first_step must be an int where an argument is a function of the step, got a tensor")

    def at(value: Any, k: int) -> Any:
        return value(k) if isinstance(value, Schedule) else value

    return [
        (tuple(at(value, k) for value in args), {name: at(value, k) for name, value in kwargs.items()})
        for k in range(first_step, first_step + max(steps, 1))
    ]


def _cut(problem: _Problem, chains: int, rows: slice) -> _Problem:
    """The problem of some of the chains."""

    def cut(value: Any) -> Any:
        return value[rows] if isinstance(value, Tensor) and value.dim() and value.shape[0] == chains else value

    def cut_params(p: StepParams) -> StepParams:
        return StepParams(**{field.name: cut(getattr(p, field.name)) for field in dataclasses.fields(p)})

    return dataclasses.replace(
        problem,
        calls=_map_tensors(problem.calls, cut),
        masks=[mask if isinstance(mask, bool) else mask[rows] for mask in problem.masks],
        params=[[cut_params(p) for p in row] for row in problem.params],
        ends=[cut_params(p) for p in problem.ends],
        chain_offset=problem.chain_offset + rows.start,
    )


def _join(parts: list[Any]) -> Any:
    states, traces, trajectories, broken, infos = zip(*parts, strict=True)
    for name, rows in traces[0].items():
        if rows.dim() == 1:
            raise ValueError(f"record={name!r} with chunk_size needs one energy per chain, but it is a scalar")
    return (
        [torch.cat(column) for column in zip(*states, strict=True)],
        {name: torch.cat([trace[name] for trace in traces], dim=1) for name in traces[0]},
        [torch.cat(column, dim=1) for column in zip(*trajectories, strict=True)],
        torch.cat(broken),
        infos[0],
    )


_SAMPLE_OPTIONS = (
    "args", "kwargs", "observed", "blocks", "seed", "generator", "chain_offset", "first_step", "inplace", "chunk_size",
    "differentiable",
)  # fmt: skip


def langevin(energy: Callable[..., Any], state: State, steps: int, **both: Any) -> Any:
    """Langevin dynamics in one call: state in, state out.

    Args:
        energy, state, steps, and any keyword of :class:`Langevin` (``step_size`` is required) and of
        :meth:`Langevin.sample`, except ``record``, ``thin`` and ``offload``, whose results only ``sample`` returns.

    Returns:
        The final state, in the structure that was given.

    Raises:
        TypeError, ValueError: naming the argument, the value and what would do.
    """
    if "record" in both or "thin" in both:
        raise TypeError("langevin returns only the state: use Langevin(...).sample(...) for record and thin")
    options = {name: both.pop(name) for name in _SAMPLE_OPTIONS if name in both}
    known = {f.name for f in dataclasses.fields(Langevin)}
    unknown = sorted(set(both) - known)
    if unknown:
        raise TypeError(f"langevin got unknown options {unknown}; known: {sorted(known | set(_SAMPLE_OPTIONS))}")
    if "step_size" not in both:
        raise TypeError("langevin needs step_size, the coefficient of the gradient")
    return Langevin(**both).sample(energy, state, steps, **options).state
