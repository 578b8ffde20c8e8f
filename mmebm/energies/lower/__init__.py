"""Turns an energy into the terms of the fused ops (:mod:`mmebm.ops.terms`), where it is a sum of MLPs and quadratics.

How: the energy is called once with a :class:`Symbol` in place of the state. A symbol knows its shape and what it stands
for (the input, the output of a stack, a residual, a value per chain) and takes part in the few operations that terms
can express; anything else ends the attempt, with the reason. The weights are whatever the modules themselves hand to
``linear`` at that moment, so that spectral and weight norm need no code here, and nothing is stale after an optimiser
step: a chain is lowered anew each time it is run, which takes some tenths of a millisecond.

One idea a file: :mod:`.symbol` what stands for a tensor, :mod:`.rules` what operations make of it, :mod:`.effects`
which code may be called with it, :mod:`.terms` what comes out. That the result is the energy is not believed but
measured, by :mod:`mmebm.samplers.verify`. What is not recognised is never changed: the chain calls it at every step.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmebm import introspect
from mmebm.energies.lower import effects
from mmebm.energies.lower.attempt import CannotLower, attempt, attempting, refuse
from mmebm.energies.lower.rules import as_value, residual
from mmebm.energies.lower.symbol import Input, Layout, Memory, Symbol
from mmebm.energies.lower.terms import term_of
from mmebm.ops.terms import Term
from mmebm.state import flatten

__all__ = ["CannotLower", "Lowered", "Symbol", "call", "inert", "lower", "residual"]


@dataclass(frozen=True)
class Lowered:
    """``terms`` of the energy; ``scalar`` where it returns their sum over the chains and not a value for each.

    ``seen``: the modules, and the code of the functions and classes, that they were read from.
    """

    terms: tuple[Term, ...]
    scalar: bool
    seen: tuple[Any, ...] = ()

    @property
    def energy(self) -> tuple[Term, ...]:
        """What was understood."""
        return self.terms


def call(energy: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
    """What ``energy`` makes of the symbolic ``state``, for a ``mmebm_lowered`` method that calls others."""
    kind = type(energy)
    if hasattr(kind, "mmebm_lowered"):
        attempt().seen.append(energy if isinstance(energy, nn.Module) else kind)
        if isinstance(energy, nn.Module):
            effects.examine_call(energy)
        method = "forward" if isinstance(energy, nn.Module) else "__call__"
        own, there = introspect.definer(kind, "mmebm_lowered"), introspect.definer(kind, method)
        if there is not own and issubclass(there, own):
            refuse(f"{there.__name__} overrides {method} of {own.__name__}")
        return kind.mmebm_lowered(energy, state, *args, **kwargs)
    effects.examine(energy)
    return energy(state, *args, **kwargs)


def inert(value: Any) -> bool:
    """Whether an argument is plain data: tensors, numbers, and lists and dicts of these."""
    if type(value) in (list, tuple):
        return all(inert(part) for part in value)
    if type(value) is dict:
        return all(inert(part) for part in value.values())
    return isinstance(value, (Tensor, numbers.Number, str, type(None)))


def lower(
    energy: Callable[..., Any],
    state: Any,
    *,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    log_prob: bool = False,
) -> Lowered:
    """The terms of ``energy`` at a state of this structure.

    Recognised are ``nn.Sequential`` of ``nn.Linear`` and activations, modules, methods and functions around them that
    reshape, negate, scale and add, squares of the state, what has a method ``mmebm_lowered`` (the energies and models
    of this package), and their sums. Modules are looked at as they are: train mode, hooks and dropout count.

    Args:
        energy: as :meth:`mmebm.Langevin.sample` takes it.
        state: a tensor (chains, ...), or a list, tuple or dict of such; only shapes, dtype and device are read.
        args, kwargs: what else it is given: tensors, numbers, lists and dicts of these; a posterior's data, say.
        log_prob: whether ``energy`` returns log p and not E.

    Raises:
        CannotLower: with what it does that terms cannot say.
    """
    _, tensors, build = flatten(state)
    try:
        with attempting(), torch.enable_grad():  # as in the loop
            return _lower(energy, tensors, build, args, dict(kwargs or {}), log_prob)
    except CannotLower:
        raise
    except Exception as error:
        raise CannotLower(f"it does not take a symbol: {type(error).__name__}: {error}"[:200]) from error


def _lower(
    energy: Any, tensors: list[Tensor], build: Any, args: Sequence[Any], kwargs: dict[str, Any], log_prob: bool
) -> Lowered:
    first = tensors[0]
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) != 1:
        refuse(f"the state has several dtypes, {sorted(map(str, dtypes))}")
    if torch.is_autocast_enabled(first.device.type):
        refuse("autocast is on")
    effects.refuse_watchers()
    if not all(inert(value) for value in (*args, *kwargs.values())):
        refuse("it is given arguments that are not plain data")
    effects.hold((*args, *kwargs.values()))
    chains = first.shape[0]
    if chains == 0:
        refuse("there are no chains")
    layout = Layout(tuple(math.prod(t.shape[1:]) for t in tensors), chains, first.dtype, first.device)
    symbols: Any = [Symbol(t.shape, Input((i,)), layout, Memory(given=True)) for i, t in enumerate(tensors)]
    with effects.writes_undone(), effects.Watch():
        value = call(energy, build(symbols), *args, **kwargs)
    noted = attempt()
    if noted.refusals:  # the energy went on after an exception
        refuse(noted.refusals[0])
    if not isinstance(value, Symbol):
        refuse(f"it returns a {type(value).__name__}")
    value.check_current()
    if value.ndim > 0 and math.prod(value.shape) != chains:
        refuse(f"it returns shape {tuple(value.shape)}")
    parts = as_value(value).parts
    if not parts:
        refuse("it is constant")
    sign = -1.0 if log_prob else 1.0
    terms = tuple(term_of(sign * weight, part, layout) for weight, part in parts)
    return Lowered(terms, value.ndim == 0, tuple(noted.seen))
