"""What every sampler's ``sample`` does around its steps: arguments checked, settings resolved, results recorded."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mmebm import noise
from mmebm.ops import noise as drawn
from mmebm.ops.common.params import StepNumbers, varies
from mmebm.ops.dynamics import finite_rows_
from mmebm.ops.langevin_step.reference import per_chain
from mmebm.samplers.gradient import Target
from mmebm.samplers.schedules import Schedule
from mmebm.samplers.user_modules import Mode, modules_of, sampling
from mmebm.state import (
    Key,
    State,
    Structure,
    broadcast,
    check_apart,
    check_range,
    check_setting,
    flag,
    flatten,
    integer,
    observed_masks,
    per_key,
)

Numbers = Mapping[str, Mapping[str, Any]]
Value = float | Tensor


@dataclass(frozen=True, repr=False)
class Samples:
    """What a chain returns. Nothing here has synchronised with the device.

    Attributes:
        state: the final state, in the structure that was given, detached unless ``differentiable``.
        trace: per recorded quantity a tensor (steps, chains), or (steps,) for the energy where it returns a scalar; see
            ``record`` in :meth:`Langevin.sample`.
        trajectory: with ``thin=t`` the states after steps t, 2t, ...: the given structure of (steps // t, chains, ...).
        info: seed, steps, first_step, next_step (where a restart goes on), backend, op ("langevin_mlp" or
            "langevin_net" for the whole chain in one call, "langevin_graph" for a captured graph of all steps,
            "langevin_step" for a step at a time) and the reason for both, and ``nonfinite``, a boolean (chains,)
            tensor: chains whose state, energy or gradient was not finite (see :data:`NONFINITE`). Samplers that accept
            or reject say in ``never_accepted`` which chains did not move once.
    """

    state: Any
    trace: dict[str, Tensor]
    trajectory: Any
    info: dict[str, Any]

    def __repr__(self) -> str:
        """Shapes and how it ran, in a line."""
        parts = [f"state {_shapes(self.state)}", f"{self.info.get('steps')} steps"]
        if self.trajectory is not None:
            parts.append(f"trajectory {_shapes(self.trajectory)}")
        if self.trace:
            parts.append(f"trace of {', '.join(self.trace)}")
        return f"<Samples: {'; '.join(parts)}; {self.info.get('op')} on {self.info.get('backend')}>"

    def to_arviz(self, *, thin: int | None = None, burn_in: int = 0) -> Any:
        """The trajectory and what was recorded, as ArviZ takes them: groups ``posterior``, a variable of (chain, draw,
        ...) for each tensor of the state (``x`` for a bare tensor), and ``sample_stats``, what the trace holds of each
        chain at these steps.

        Args:
            thin: the ``thin`` of :meth:`Langevin.sample`; only needed where the numbers of steps and states leave it
                open, and something was recorded.
            burn_in: so many states are left out at the start.

        Returns:
            What ``arviz_base.from_dict`` makes: an ``xarray.DataTree``.

        Raises:
            ModuleNotFoundError: without the package arviz-base.
            ValueError: for a chain without trajectory (``thin=`` keeps one), a ``burn_in`` that leaves nothing, or a
                ``thin`` that is not the chain's.

        Example:
            >>> tree = sampler.sample(energy, x0, 1000, thin=10).to_arviz(burn_in=20)
            >>> tree["posterior"]["x"].mean(("chain", "draw"))
        """
        try:
            from arviz_base import from_dict  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("to_arviz needs ArviZ: pip install arviz-base") from error
        if self.trajectory is None:
            raise ValueError("there is no trajectory: sample with thin=1, or another distance of the states to keep")
        keys, tensors, _ = flatten(self.trajectory)
        states, steps = tensors[0].shape[0], self.info["steps"]
        if not 0 <= burn_in < states:
            raise ValueError(f"burn_in must leave one of {states} states at least, got {burn_in}")
        fits = [t for t in range(1, steps + 1) if steps // t == states]
        if thin is not None and thin not in fits:
            raise ValueError(f"thin must be that of the chain, which kept {states} states of {steps} steps, got {thin}")
        if thin is None and len(fits) > 1 and self.trace:
            raise ValueError(f"thin= must say which: {states} states of {steps} steps are left by each of {fits}")
        every = fits[0] if thin is None else thin

        def chains_first(values: Tensor) -> Any:
            values = values[burn_in:].detach().cpu()
            return (values.float() if values.dtype == torch.bfloat16 else values).transpose(0, 1).numpy()

        bare = isinstance(self.trajectory, Tensor)
        groups = {
            "posterior": {"x" if bare else str(key): chains_first(t) for key, t in zip(keys, tensors, strict=True)}
        }
        by_chain = {
            name: chains_first(values[every - 1 :: every][:states]) for name, values in self.trace.items()
            if values.dim() == 2
        }  # fmt: skip
        return from_dict({**groups, **({"sample_stats": by_chain} if by_chain else {})})


def _shapes(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_shapes(part)}" for name, part in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_shapes, value)) + "]"
    return type(value).__name__


# What becomes of a chain whose state, or the energy or gradient at it, is inf or NaN. All report it in
# info["nonfinite"]. "warn" also warns, once per line of the caller; a state on a GPU is not read for that.
NONFINITE = ("warn", "ignore", "freeze", "raise")
NonFinite = Literal["warn", "ignore", "freeze", "raise"]


def report_nonfinite(on_nonfinite: str, broken: Tensor, steps: int) -> None:
    """Warns or raises, as asked, where chains are ``broken`` (chains,).

    Raises:
        FloatingPointError: with ``on_nonfinite="raise"``.
    """
    if on_nonfinite == "raise" and bool(broken.any()):
        raise FloatingPointError(
            f"{int(broken.sum())} of {broken.numel()} chains are not finite after {steps} steps: state, energy or "
            'gradient is inf or NaN; a smaller step_size, grad_clip or on_nonfinite="freeze" would keep them'
        )
    # reading it elsewhere would wait for the device
    if on_nonfinite == "warn" and broken.is_cpu and bool(broken.any()):
        level, frame = 2, sys._getframe(1)
        while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("mmebm", "torch"):
            level, frame = level + 1, frame.f_back
        warnings.warn(
            "some chains have a state, energy or gradient that is inf or NaN, and cannot be trusted: see "
            "info['nonfinite'] of sample, and on_nonfinite=\"freeze\", \"raise\" or \"ignore\"",
            RuntimeWarning, stacklevel=level,
        )  # fmt: skip


def finite_chains(tensors: Sequence[Tensor], chains: int, device: torch.device) -> Tensor:
    """bool (chains,): where all these tensors (chains, ...) are finite."""
    alive = torch.ones(chains, dtype=torch.bool, device=device)
    for t in tensors:
        finite_rows_(alive, t)
    return alive


def choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raises a ValueError where ``value`` is not among those allowed."""
    # by type too: 1 is no True, and an array compares with anything
    if not any(isinstance(value, type(each)) and value == each for each in allowed):
        raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}")


def check_arguments(args: Any, kwargs: Any) -> None:
    """Raises a TypeError where these are not what else an energy is called with."""
    if not isinstance(args, (list, tuple)):
        raise TypeError(f"args must be a list or tuple of further arguments, got {type(args).__name__}")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(f"kwargs must be a mapping from names to further arguments, got {type(kwargs).__name__}")


def check_record(record: Any, records: Sequence[str]) -> None:
    """Raises a ValueError where ``record`` is no collection of names among ``records``."""
    if not isinstance(record, (list, tuple, Set)) or any(name not in records for name in record):
        raise ValueError(f"record must be a collection of {list(records)}, got {record!r:.80}")


def leaves(name: str, value: Any) -> list[tuple[str, Any]]:
    """What a setting holds, with a name for messages: each entry of a mapping, or itself; None is left out."""
    if not isinstance(value, Mapping):
        return [] if value is None else [(name, value)]
    return [(f"{name}[{key!r}]", leaf) for key, leaf in value.items() if leaf is not None]


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """``function`` of every tensor in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (list, tuple):
        return type(value)(map_tensors(part, function) for part in value)
    if type(value) is dict:
        return {name: map_tensors(part, function) for name, part in value.items()}
    return value


def counter(name: str, value: Any, low: int, high: int, device: torch.device) -> int | Tensor:
    """A seed or step: an int in [low, high), or a 1-element integer tensor on ``device``, then int64."""
    if not isinstance(value, Tensor):
        return integer(name, value, low, high)
    if value.numel() != 1 or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be an int or a 1-element integer tensor, got {value!r:.80}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device} but the state is on {device}")
    # a narrower one would wrap when steps are added; int64 holds the bits of uint64
    wide = value.to(torch.int64)
    if wide.is_cpu and not (low <= (int(value) if value.dtype == torch.uint64 else int(wide)) < high):
        raise ValueError(f"{name} must be in [{low}, {high}), got {value!r:.80}")
    return wide


def check_writable(keys: Sequence[Key], tensors: Sequence[Tensor]) -> None:
    """Raises a ValueError where ``inplace`` cannot write a tensor."""
    for key, t in zip(keys, tensors, strict=True):
        if t.numel() and any(size > 1 and stride == 0 for size, stride in zip(t.shape, t.stride(), strict=True)):
            raise ValueError(f"inplace needs memory for every element of state[{key!r}], got an expanded tensor")
        if t.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(f"inplace cannot write state[{key!r}] outside inference mode: it was made inside")
    check_apart(keys, tensors)


def calls_of(
    args: tuple[Any, ...], kwargs: dict[str, Any], first_step: int | Tensor, steps: int
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The energy's further arguments: one entry for all steps or, with schedules among them, one per step."""
    args, kwargs = map_tensors((args, kwargs), lambda t: t.clone() if t.is_inference() else t)
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


@dataclass(frozen=True)
class Call:
    """The checked arguments of one ``sample``. ``moving``: indices of the tensors that are not wholly observed."""

    energy: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keys: tuple[Key, ...]
    tensors: list[Tensor]
    build: Structure
    masks: list[bool | Tensor]
    moving: list[int]
    steps: int
    seed: int | Tensor
    chain_offset: int
    first_step: int | Tensor
    record: tuple[str, ...]
    thin: int | None
    inplace: bool

    @property
    def chains(self) -> int:
        return self.tensors[0].shape[0]

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    def masked(self, i: int, value: Tensor) -> Tensor:
        """``value`` with 0 in the observed elements of tensor ``i``."""
        mask = self.masks[i]
        return value.masked_fill(mask, 0.0) if isinstance(mask, Tensor) else value

    def normals(self, i: int, k: int, purpose: int) -> Tensor:
        """The normals of tensor ``i`` at step ``k`` of this run, 0 where observed."""
        t = self.tensors[i]
        xi = drawn.normal(
            t.shape, seed=self.seed, step=self.first_step + k, stream=noise.stream(i, purpose),
            chain_offset=self.chain_offset, dtype=t.dtype, device=t.device,
        )  # fmt: skip
        return self.masked(i, xi)

    def uniforms(self, count: int, k: int, purpose: int) -> Tensor:
        """(chains, count) uniforms in [0, 1) at step ``k`` of this run."""
        return drawn.uniform(
            (self.chains, count), seed=self.seed, step=self.first_step + k, stream=noise.stream(0, purpose),
            chain_offset=self.chain_offset, device=self.device,
        )  # fmt: skip

    def structure(self, parts: Sequence[Tensor]) -> Any:
        """One tensor for each moving tensor of the state, in the state's structure; 0 for those that stay."""
        full = [torch.zeros_like(t) for t in self.tensors]
        for i, part in zip(self.moving, parts, strict=True):
            full[i] = part
        return self.build(full)

    def parts(self, name: str, value: Any) -> list[Tensor]:
        """The tensors of ``value``, which must be like the state.

        Raises:
            TypeError, ValueError: where it has not the state's structure, shapes, dtypes and device.
        """
        keys, parts, _ = flatten(value, name)
        if keys != self.keys:
            raise ValueError(f"{name} must have the state's keys {list(self.keys)}, got {list(keys)}")
        for key, part, t in zip(keys, parts, self.tensors, strict=True):
            if part.shape != t.shape or part.dtype != t.dtype or part.device != t.device:
                raise ValueError(
                    f"{name}[{key!r}] must be like the state, {tuple(t.shape)}, {t.dtype}, {t.device}, "
                    f"got {tuple(part.shape)}, {part.dtype}, {part.device}"
                )
        return parts

    def moving_parts(self, name: str, value: Any) -> list[Tensor]:
        """The inverse of :meth:`structure`: copies of the parts that move, 0 where observed."""
        parts = self.parts(name, value)
        return [self.masked(i, parts[i].detach().clone()) for i in self.moving]


def per_chain_shape(value: Tensor, like: Tensor) -> Tensor:
    """(chains,) reshaped so that it broadcasts against ``like``, (chains, ...), which keeps its dtype."""
    value = value.to(like.dtype) if value.is_floating_point() else value
    return value.reshape(-1, *[1] * (like.dim() - 1))


def check_numbers(sampler: Any, numbers: Numbers) -> None:
    """Checks a description's settings, each a number, a tensor, a mapping or a function of the step.

    Raises:
        TypeError, ValueError: naming the setting.
    """
    for name, allowed in numbers.items():
        value = getattr(sampler, name)
        given = value.values() if isinstance(value, Mapping) else [value]
        if any(leaf is None for leaf in given):
            raise TypeError(f"{name} must be a number, a tensor, a mapping or a function of the step, got {value!r}")
        for label, leaf in leaves(name, value):
            if not callable(leaf):
                check_setting(label, leaf, **allowed)


def check_quotients(step_size: Value, temperature: Value, mass: Value, dtype: torch.dtype) -> None:
    """Checks that what numbers are divided by the mass to is finite in ``dtype``.

    Raises:
        ValueError: naming both.
    """
    for name, value in (("step_size", step_size), ("temperature", temperature)):
        if not isinstance(value, Tensor) and not isinstance(mass, Tensor) and value / mass > torch.finfo(dtype).max:
            raise ValueError(f"{name} / mass must be finite in {dtype}, got {value!r} and {mass!r}")


def at_steps(
    label: str, setting: Callable[[int], Any], first: int, steps: int, allowed: Mapping[str, Any], required: bool
) -> Sequence[Any]:
    """A setting that is a function of the step: its values at ``steps`` steps from ``first`` on, checked.

    A :class:`~mmebm.samplers.schedules.Schedule` has them at once; any other function is asked step by step.

    Raises:
        TypeError, ValueError: naming the setting and the step.
    """
    values = setting.values_at(first, steps) if isinstance(setting, Schedule) else None
    if values is None:
        values = [setting(k) for k in range(first, first + steps)]
    if not isinstance(values, StepNumbers) and set(map(type, values)) == {float}:
        values = StepNumbers(torch.tensor(values, dtype=torch.float64, device="cpu"))
    if isinstance(values, StepNumbers):
        vector, low = values.vector, allowed.get("low", 0.0)
        good = vector.isfinite() & (vector > low if allowed.get("strict") else vector >= low)
        if bool(good.all()):
            return values
    for k, value in enumerate(values, first):
        if value is None and required:
            raise TypeError(f"{label} at step {k} must be a number or a tensor, got None")
        if value is not None:
            check_setting(f"{label} at step {k}", value, **allowed)
    return list(values)


def settings(sampler: Any, numbers: Numbers, call: Call) -> list[dict[str, list[Value]]]:
    """The settings of every tensor by name: one entry for all steps or, with functions among them, one per step."""
    given = {name: per_key(name, getattr(sampler, name), call.keys, required=True) for name in numbers}

    def column(name: str, i: int) -> Any:
        setting, like = given[name][i], call.tensors[i]
        label = name + (f"[{call.keys[i]!r}]" if len(call.keys) > 1 else "")
        # a divisor must be one in the state's dtype too
        least = torch.finfo(like.dtype).tiny if numbers[name].get("strict") else 0.0
        if not callable(setting):
            check_range(label, setting, like.dtype, least=least)
            return broadcast(label, setting, like, like.dtype)
        if isinstance(call.first_step, Tensor):
            raise ValueError("first_step must be an int where a setting is a function of the step, got a tensor")
        values = at_steps(label, setting, call.first_step, max(call.steps, 1), numbers[name], True)
        # evaluated before the chain starts, so that no step waits for a copy to the device
        if isinstance(values, StepNumbers):
            check_range(label, values.vector, like.dtype, least=least)
            return values
        for k, v in enumerate(values, call.first_step):
            check_range(f"{label} at step {k}", v, like.dtype, least=least)
        return [broadcast(f"{label} at step {k}", v, like, like.dtype) for k, v in enumerate(values, call.first_step)]

    columns = {name: [column(name, i) for i in range(len(call.keys))] for name in given}
    steps = max((len(c) for each in columns.values() for c in each if varies(c)), default=1)

    def row(k: int) -> dict[str, list[Value]]:
        return {name: [c[k] if varies(c) else c for c in each] for name, each in columns.items()}

    return [row(k) for k in range(steps)]


def resolve(
    energy: Any, state: State, steps: int, *, args: Sequence[Any], kwargs: Mapping[str, Any] | None, observed: Any,
    seed: int | Tensor | None, generator: torch.Generator | None, chain_offset: int, first_step: int | Tensor,
    record: Collection[str], records: Sequence[str], thin: int | None, inplace: bool,
) -> Call:  # fmt: skip
    """Checks what every ``sample`` takes. ``records``: the names that ``record`` may hold.

    Raises:
        TypeError, ValueError: naming the argument, the value and what would do.
    """
    if not callable(energy):
        raise TypeError(f"energy must be callable, got {type(energy).__name__}")
    keys, tensors, build = flatten(state)
    for key, t in zip(keys, tensors, strict=True):
        if t.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"state[{key!r}] must be float32 or float64, got {t.dtype}; Langevin takes 16 bits too")
    chains, device = tensors[0].shape[0], tensors[0].device
    steps = integer("steps", steps, 0)
    check_arguments(args, kwargs)
    check_record(record, records)
    flag("inplace", inplace)
    if inplace:
        check_writable(keys, tensors)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if seed is not None and generator is not None:
        raise ValueError("give seed or generator, not both")
    masks = observed_masks(observed, keys, tensors)
    return Call(
        energy=energy, args=tuple(args), kwargs=dict(kwargs or {}), keys=keys, tensors=tensors, build=build,
        masks=masks, moving=[i for i in range(len(keys)) if masks[i] is not True], steps=steps,
        chain_offset=integer("chain_offset", chain_offset, 0, 2**32 - chains + 1),
        first_step=counter("first_step", first_step, 0, 2**32 - steps + 1, device),
        record=tuple(record), thin=None if thin is None else integer("thin", thin, 1), inplace=inplace,
        seed=noise.draw_seed(generator) if seed is None else counter("seed", seed, -(2**63), 2**64, device),
    )  # fmt: skip


@contextmanager
def running(
    call: Call, mode: Mode, *, log_prob: bool, score: bool = False,
    each: Callable[[Any], Any] = lambda value: value,
) -> Iterator[Target]:  # fmt: skip
    """The energy, with the user's modules in ``mode``, and neither inference mode nor gradients around.

    ``each`` is applied to every (args, kwargs) of the energy.
    """
    # what was made in inference mode cannot be saved by autograd: calls_of copies it, and the samplers copy the state
    with torch.inference_mode(False), torch.no_grad():
        calls = [each(pair) for pair in calls_of(call.args, call.kwargs, call.first_step, call.steps)]
        with sampling(modules_of(call.energy, *calls[0]), mode):
            yield Target(
                call.energy, calls, call.keys, call.build, call.moving, call.masks, log_prob=log_prob, score=score
            )


class Recorder:
    """The trace and the trajectory of a run, kept on the device."""

    def __init__(self, call: Call, shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
        """``shapes``: of the records that hold more than one value per chain, what follows (steps, chains)."""
        self.call = call
        self.shapes = dict(shapes or {})
        self.rows: dict[str, list[Tensor]] = {name: [] for name in call.record}
        self.kept = [t.new_empty(call.steps // call.thin, *t.shape) for t in call.tensors] if call.thin else []

    def add(self, **values: Tensor | None) -> None:
        for name, value in values.items():
            if name in self.rows and value is not None:
                self.rows[name].append(value)

    def keep(self, k: int, x: Sequence[Tensor]) -> None:
        """``x``, the state after step ``k`` of the run."""
        thin = self.call.thin
        if thin and (k + 1) % thin == 0:
            for rows, t in zip(self.kept, x, strict=True):
                rows[(k + 1) // thin - 1].copy_(t)

    def samples(self, x: list[Tensor], on_nonfinite: str, *, broken: Tensor, **info: Any) -> Samples:
        """What ``sample`` returns. ``broken``: (chains,), chains to be reported as non-finite whatever ``x`` holds."""
        call = self.call
        with torch.inference_mode(False), torch.no_grad():
            broken = broken | ~finite_chains(x, call.chains, call.device)
            report_nonfinite(on_nonfinite, broken, call.steps)
            trace = {
                name: torch.stack(rows) if rows
                else torch.zeros(
                    call.steps, call.chains, *self.shapes.get(name, ()), dtype=torch.float32, device=call.device
                )
                for name, rows in self.rows.items()
            }  # fmt: skip
        if call.inplace:
            with torch.no_grad():
                for given, got in zip(call.tensors, x, strict=True):
                    given.copy_(got)
            x = call.tensors
        info = {
            "seed": call.seed, "steps": call.steps, "first_step": call.first_step,
            "next_step": call.first_step + call.steps, "nonfinite": broken, **info,
        }  # fmt: skip
        return Samples(call.build(x), trace, call.build(self.kept) if call.thin else None, info)


def sqrt(value: Value) -> Value:
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


def exp(value: Value) -> Value:
    return value.exp() if isinstance(value, Tensor) else math.exp(value)


def where(rows: Tensor, yes: Sequence[Tensor], no: Sequence[Tensor]) -> list[Tensor]:
    """Chain by chain from ``yes`` or ``no``."""
    return [torch.where(per_chain_shape(rows, a), a, b) for a, b in zip(yes, no, strict=True)]


def total(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """The sum over all elements and tensors, (chains,); zeros like ``like`` without any."""
    out = torch.zeros_like(like)
    for part in parts:
        out = out + per_chain(part).sum(1)
    return out
