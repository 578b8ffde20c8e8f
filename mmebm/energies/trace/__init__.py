"""Turns an energy into a :class:`~mmebm.ops.net.graph.Net` by watching one call of it.

The energy is called once, without autograd, at the state itself, and every tensor operation that reads something of
the state is written down as nodes. What does not read the state (weights under spectral or weight norm, masks, a time
embedding, a posterior's data) is simply computed, so that nothing is stale: a net holds the values of this call. An
operation without a rule ends the attempt with its name, and so does one that would change a tensor that was there
before the call, draws random numbers, or brings a value of the state to Python.

Rules are for the operations that are left when torch has taken layers and functions apart, whatever module, function
or script they came from. To add one: a function under ``@rule`` that adds nodes.

One idea a file: :mod:`.recorder` what is written down, :mod:`.moves`, :mod:`.arithmetic` and :mod:`.layers` the rules,
:mod:`.watch` how the call is watched, :mod:`.simplify` what becomes of the nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmebm.energies.lower import effects, inert
from mmebm.energies.lower.attempt import CannotLower, attempt, attempting, refuse
from mmebm.energies.trace.recorder import Recorder
from mmebm.energies.trace.simplify import folded, pruned
from mmebm.energies.trace.tape import Tape
from mmebm.energies.trace.watch import Rewrite, Watch
from mmebm.ops.common.description import replaced
from mmebm.ops.net import graph
from mmebm.ops.net.graph import Net
from mmebm.state import flatten

__all__ = ["Traced", "examined", "retrace", "tied", "trace"]


@dataclass(frozen=True)
class Traced:
    """As :class:`~mmebm.energies.lower.Lowered`, with a ``net`` in the place of terms."""

    net: Net
    scalar: bool
    tape: Tape
    seen: tuple[Any, ...] = ()

    @property
    def energy(self) -> Net:
        """What was understood."""
        return self.net


def trace(
    energy: Callable[..., Any],
    state: Any,
    *,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    log_prob: bool = False,
) -> Traced:
    """The net that ``energy`` computes at ``state``, where calling it once more than the chain does has no effect.

    Args:
        energy: as :meth:`mmebm.Langevin.sample` takes it. It is called once.
        state: a tensor (chains, ...), or a list, tuple or dict of such.
        args, kwargs: what else it is given.
        log_prob: whether ``energy`` returns log p and not E.

    Raises:
        CannotLower: naming what a net cannot say.
    """
    _, tensors, build = flatten(state)
    kwargs = dict(kwargs or {})
    with attempting() as noted:
        _examine(energy, tensors, args, kwargs)
        seen = tuple(noted.seen)
        return replace(_traced(energy, tensors, build, args, kwargs, log_prob), seen=seen)


def tied(net: Net, module: nn.Module) -> Net:
    """``net`` on the parameters of ``module`` themselves, where :func:`trace` has tensors on their memory without a
    graph: gradients of :func:`mmebm.ops.net.op.net_energy` then reach them.

    Raises:
        ValueError: naming a parameter with ``requires_grad`` that is no tensor of the net as it lies, such as one under
            spectral norm.

    Example:
        >>> energy = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 1))
        >>> x = torch.randn(8, 1, 4, 4)
        >>> value, gradient = mmebm.ops.net.op.net_energy(x.flatten(1), tied(trace(energy, x).net, energy))
        >>> gradient.square().sum().backward()
    """

    def place(t: Tensor) -> tuple[Any, ...]:
        return t.data_ptr(), tuple(t.shape), t.stride()

    parameters, found = {place(p): p for p in module.parameters()}, set[int]()

    def own(t: Tensor, _: Any) -> Tensor:
        p = parameters.get(place(t), t)
        found.add(id(p))
        return p

    net = replaced(net, own)
    for name, p in module.named_parameters():
        if p.requires_grad and id(p) not in found:
            raise ValueError(f"{name} is no tensor of the net as it lies: gradients would not reach it")
    return net


def examined(
    energy: Callable[..., Any], tensors: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """The modules and the code that ``energy`` consists of, where calling it on the state's ``tensors`` has no effect
    besides its result.

    Raises:
        CannotLower: naming what may have one, or what is around the call or given to it.
    """
    with attempting() as noted:
        _examine(energy, tensors, args, kwargs)
        return tuple(noted.seen)


def _examine(energy: Any, tensors: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """See :func:`examined`."""
    try:
        if tensors[0].shape[0] == 0:
            refuse("there are no chains")
        if len({t.dtype for t in tensors}) != 1:
            refuse("the state has several dtypes")
        if torch.is_autocast_enabled(tensors[0].device.type):
            refuse("autocast is on")
        effects.refuse_watchers()
        if not all(inert(value) for value in (*args, *kwargs.values())):
            refuse("it is given arguments that are not plain data")
        effects.hold((*args, *kwargs.values()))
        effects.examine(energy, traced=True)
    except CannotLower as error:
        error.passing()  # it is cheap to find again
        raise


def retrace(traced: Traced, given: Mapping[int, Tensor], log_prob: bool = False) -> Traced:
    """What :func:`trace` would give where the energy did the same operations again; see :class:`.tape.Tape`.

    Args:
        given: tensors in the place of others that the energy was given, by their ids.
    """
    tape = traced.tape
    recorder = Recorder(tape.state[0].shape[0])
    with attempting(), torch.no_grad():
        _note_state(recorder, tape.state)
        try:
            result = tape.replay(recorder, given)
        except CannotLower:
            raise
        except Exception as error:
            raise CannotLower(f"{type(error).__name__}: {error}"[:200]) from error
        return replace(traced, net=_net_of(recorder, result, log_prob)[0])


def _note_state(recorder: Recorder, tensors: Sequence[Tensor]) -> None:
    start = 0
    for t in tensors:
        shape = tuple(t.shape[1:]) or (1,)
        if math.prod(shape) == 0:
            refuse("a tensor of the state has no elements")
        recorder.keep(t, recorder.add(graph.Input(start, shape)))
        start += math.prod(shape)


def _net_of(recorder: Recorder, result: Any, log_prob: bool) -> tuple[Net, bool]:
    """(the net, whether its energy is summed over the chains) of a call that gave ``result``."""
    value = recorder.value(result)
    if value is None:
        refuse(f"it returns a {type(result).__name__} that does not come from the state")
    if math.prod(recorder.shapes[value.node]) != 1 or (not value.total and result.numel() != recorder.chains):
        refuse(f"it returns shape {tuple(result.shape)}")
    last = value.node
    if log_prob:
        last = recorder.add(graph.Add((last,), (-1.0,)))
    nodes = pruned(recorder.nodes, last)
    return Net(tuple(pruned(folded(nodes), len(nodes) - 1))), value.total


def _traced(
    energy: Callable[..., Any],
    tensors: list[Tensor],
    build: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    log_prob: bool,
) -> Traced:
    chains = tensors[0].shape[0]
    recorder, tape = Recorder(chains), Tape()
    with torch.no_grad():
        inputs = [t.detach().clone(memory_format=torch.contiguous_format) for t in tensors]
        _note_state(recorder, inputs)
        try:
            with effects.writes_undone(), Rewrite(recorder.value, tape), Watch(recorder, tape):
                result = energy(build(inputs), *args, **kwargs)
        except CannotLower:
            raise
        except Exception as error:
            why = [*attempt().refusals, f"{type(error).__name__}: {error}"[:200]]
            raise CannotLower(why[0]).passing() from error
    if attempt().refusals:  # the energy went on after an exception
        refuse(attempt().refusals[0])
    net, scalar = _net_of(recorder, result, log_prob)
    return Traced(net, scalar, tape.sealed(recorder, inputs, result))
