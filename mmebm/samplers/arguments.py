"""What every sampler's ``sample`` takes, checked and resolved to a :class:`~mmebm.samplers.chain.Problem`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence, Set
from typing import Any, cast

import torch
from torch import Tensor

from mmebm import noise
from mmebm.samplers.arithmetic import map_tensors
from mmebm.samplers.chain import Problem
from mmebm.samplers.schedules import Schedule, values_of
from mmebm.samplers.settings import is_sequence
from mmebm.state import Key, State, check_apart, check_type, flag, flatten, integer, observed_masks, one_integer


def check_arguments(args: Any, kwargs: Any) -> None:
    """Raises a TypeError where these are not what else an energy is called with."""
    if not isinstance(args, (list, tuple)):
        raise TypeError(f"args must be a list or tuple of further arguments, got {type(args).__name__}")
    if kwargs is not None:
        check_type("kwargs", kwargs, Mapping, "a mapping from names to further arguments")
        unnamed = [name for name in kwargs if not isinstance(name, str)]
        if unnamed:
            raise TypeError(f"kwargs must have names of further arguments for keys, got {unnamed!r:.80}")


def check_record(record: Any, records: Sequence[str]) -> None:
    """Raises a ValueError where ``record`` is no collection of names among ``records``."""
    given = cast("Collection[Any]", record if isinstance(record, (list, tuple, Set)) else [None])
    if any(name not in records for name in given):
        raise ValueError(f"record must be a collection of {list(records)}, got {record!r:.80}")


def counter(name: str, value: Any, low: int, high: int, device: torch.device) -> int | Tensor:
    """A seed or step: an int in [low, high), or a 1-element integer tensor on ``device``, then int64."""
    if not isinstance(value, Tensor):
        return integer(name, value, low, high)
    wide = one_integer(name, value)
    if value.device != device:
        raise ValueError(f"{name} is on {value.device} but the state is on {device}")
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

    count = max(steps, 1)

    def along(value: Any) -> list[Any]:
        return values_of(value, first_step, count) if isinstance(value, Schedule) else [value] * count

    columns, named = list(map(along, args)), {name: along(value) for name, value in kwargs.items()}
    return [
        (tuple(column[k] for column in columns), {name: column[k] for name, column in named.items()})
        for k in range(count)
    ]


def blocks_of(blocks: Any, keys: tuple[Key, ...], masks: list[bool | Tensor]) -> list[list[int]]:
    """The indices of the tensors that move, in the blocks in which they do."""
    moving = [i for i in range(len(keys)) if masks[i] is not True]
    if blocks is None:
        return [moving] if moving else []
    if not is_sequence(blocks) or not all(isinstance(item, (str, int, list, tuple, Set)) for item in blocks):
        raise TypeError(f"blocks must be a list of keys or of collections of keys, got {blocks!r:.80}")
    groups: list[list[Any]] = [[item] if isinstance(item, (str, int)) else list(item) for item in blocks]
    named = [key for group in groups for key in group]
    if len(named) != len(keys) or any(key not in named for key in keys):
        raise ValueError(f"blocks must hold each of {list(keys)} exactly once, got {groups}")
    # in state order within a block, whatever the order of a set
    members = [[i for i in moving if keys[i] in group] for group in groups]
    return [group for group in members if group]


def parts_like(name: str, value: Any, p: Problem, tensors: Sequence[Tensor], rungs: int | None = None) -> list[Tensor]:
    """The tensors of ``value``, which must be like the state, or like ``rungs`` of each of its chains.

    Raises:
        TypeError, ValueError: where it has not the state's structure, shapes, dtypes and device.
    """
    keys, parts, _ = flatten(value, name)
    if keys != p.keys:
        raise ValueError(f"{name} must have the state's keys {list(p.keys)}, got {list(keys)}")
    for key, part, t in zip(keys, parts, tensors, strict=True):
        shape = tuple(t.shape) if rungs is None else (t.shape[0], rungs, *t.shape[1:])
        like = "like the state, " if rungs is None else ""
        if part.shape != shape or part.dtype != t.dtype or part.device != t.device:
            raise ValueError(
                f"{name}[{key!r}] must be {like}{shape}, {t.dtype}, {t.device}, "
                f"got {tuple(part.shape)}, {part.dtype}, {part.device}"
            )
    return parts


def resolve(
    sampler: Any,
    energy: Any,
    state: State,
    steps: int,
    *,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    observed: Any = None,
    blocks: Any = None,
    seed: int | Tensor | None = None,
    generator: Any = None,
    chain_offset: int = 0,
    first_step: int | Tensor = 0,
    record: Collection[str] = (),
    thin: int | None = None,
    offload: bool = False,
    inplace: bool = False,
    chunk_size: int | None = None,
    differentiable: int | bool | None = None,
    carried: Mapping[str, Any] | None = None,
) -> tuple[Problem, list[Tensor], int | Tensor | None]:
    """The problem but for the sampler's constants, the state's tensors, and the seed to report.

    Raises:
        TypeError, ValueError: naming the argument, the value and what would do.
    """
    check_type("energy", energy, Callable, "callable")
    keys, tensors, build = flatten(state)
    if not sampler.takes_16_bits:
        for key, t in zip(keys, tensors, strict=True):
            if t.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"state[{key!r}] must be float32 or float64, got {t.dtype}; Langevin takes 16 bits too")
    chains, device = tensors[0].shape[0], tensors[0].device
    steps = integer("steps", steps, 0)
    thin = None if thin is None else integer("thin", thin, 1)
    chain_offset = integer("chain_offset", chain_offset, 0, 2**32 - chains + 1)
    first_step = counter("first_step", first_step, 0, 2**32 - steps + 1, device)
    wanted = 0 if differentiable is None or differentiable is False else differentiable
    last = steps if wanted is True else integer("differentiable", wanted, 0)
    check_arguments(args, kwargs)
    check_record(record, sampler.records)
    flag("offload", offload)
    flag("inplace", inplace)
    if "energy" in record and sampler.score:
        raise ValueError('record="energy" needs an energy; with score=True there is none')
    if offload and thin is None:
        raise ValueError("offload moves the trajectory: it needs thin")
    chunk_size = None if chunk_size is None else integer("chunk_size", chunk_size, 1)
    if last and (inplace or chunk_size is not None):
        raise ValueError(f"differentiable goes without inplace and chunk_size, got {differentiable!r}")
    if inplace:
        check_writable(keys, tensors)
    if generator is not None:
        check_type("generator", generator, torch.Generator, "a torch.Generator")
    if seed is not None:
        if generator is not None:
            raise ValueError("give seed or generator, not both")
        seed = counter("seed", seed, -(2**63), 2**64, device)
    told = seed
    if sampler.rng == "torch":
        if isinstance(seed, Tensor):
            raise TypeError('seed must be an int with rng="torch", got a tensor')
        if generator is not None and generator.device.type != device.type:
            raise ValueError(f'rng="torch" draws on {device}, but the generator is on {generator.device}')
        if seed is not None:
            generator = torch.Generator(device).manual_seed(seed)
        seed = 0
    elif seed is None:
        seed = told = noise.draw_seed(generator)
    masks = observed_masks(observed, keys, tensors)
    groups = blocks_of(blocks, keys, masks)
    # what was made in inference mode is copied, as autograd cannot save it
    with torch.inference_mode(False), torch.set_grad_enabled(last > 0):
        calls = calls_of(tuple(args), dict(kwargs or {}), first_step, steps)
    problem = Problem(
        sampler=sampler,
        energy=energy,
        calls=calls,
        keys=keys,
        build=build,
        steps=steps,
        blocks=groups,
        masks=masks,
        seed=seed,
        generator=generator,
        chain_offset=chain_offset,
        first_step=first_step,
        record=tuple(record),
        thin=thin,
        offload=bool(offload),
        differentiable=min(last, steps),
        carried=carried or {},
        chunk_size=chunk_size,
    )
    return problem, tensors, told
