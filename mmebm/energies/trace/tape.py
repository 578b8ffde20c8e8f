"""The operations of one call of an energy, so that its net can be made again without the energy.

A net holds the values of one call. Replayed, a tape computes again what does not read the state (a weight under
spectral norm, a target with its sign turned) and applies the rules again to what does, at the values that the tensors
have now. It is right for a call in which Python would ask for the same operations, which
:mod:`mmebm.samplers.kept_nets` sees to; a call that read a value into Python, say, has a tape that is not to be
replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmebm.energies.lower.attempt import refuse
from mmebm.energies.trace.recorder import Recorder

# Operations that read values into Python, or whose result's shape depends on values
_READS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
# What may have a constant of Python's as its argument
_LITERALS = ("lift_fresh", "lift_fresh_copy")
# Layers whose weights a net takes as they lie
_LAYERS = ("convolution", "_convolution", "mm", "addmm", "mv")


class Step(NamedTuple):
    """``apply``: what writes down an operation that reads the state, as (recorder, result, args, kwargs)."""

    func: Any
    name: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    result: Any
    apply: Callable[..., None] | None


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in arguments or results of an operation: lists at most."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for part in value for t in tensors_in(part)]
    return [t for part in value.values() for t in tensors_in(part)] if isinstance(value, dict) else []


def _made_by(step: Step) -> list[Tensor]:
    """The results of an operation that it was not given: a constant of Python's comes out as what went in, and is
    nowhere else."""
    given = {id(t) for t in tensors_in((step.args, step.kwargs))}
    return [t for t in tensors_in(step.result) if id(t) not in given]


def _stub(t: Tensor) -> Tensor:
    """What stands for a tensor of which the shape is enough."""
    return torch.empty((), dtype=torch.uint8 if t.is_quantized else t.dtype, device=t.device).expand(t.shape)


def _swapped(value: Any, by: Mapping[int, Tensor]) -> Any:
    """``value`` with other tensors in the place of those in ``by``."""
    if isinstance(value, Tensor):
        return by.get(id(value), value)
    if isinstance(value, (list, tuple)):
        return type(value)([_swapped(part, by) for part in value])
    return {name: _swapped(part, by) for name, part in value.items()} if isinstance(value, dict) else value


class Tape:
    """Grows while the energy is called; :meth:`sealed` ends that.

    Attributes:
        valid: whether it may be replayed.
        static: whether a replay gives the net that there is, since that reads all its numbers where they lie.
    """

    def __init__(self) -> None:
        self.valid, self.static = True, False
        self._steps: list[Step] = []
        self._state: list[Tensor] = []
        self._stubs: dict[int, Tensor] = {}  # held, so that no id is used twice
        self._result: Any = None

    def add(self, step: Step, changed: Sequence[Tensor]) -> None:
        """Notes an operation that changed these tensors in place."""
        if any(tag in step.func.tags for tag in _READS) or (changed and step.apply is None):
            self.valid = False
        self._steps.append(step)

    def sealed(self, recorder: Recorder, state: Sequence[Tensor], result: Any) -> Tape:
        """The tape without the values that depend on the state: of those, shapes are enough."""
        stubs = {number: _stub(v.tensor) for number, v in recorder.values.items()}
        self._stubs = {id(stub): stub for stub in stubs.values()}
        self._state, self._result = _swapped(list(state), stubs), _swapped(result, stubs)
        self._swap(stubs)
        return self

    def _swap(self, by: Mapping[int, Tensor]) -> None:
        self._steps = [
            s._replace(args=_swapped(s.args, by), kwargs=_swapped(s.kwargs, by), result=_swapped(s.result, by))
            for s in self._steps
        ]

    def tie(self, held: Iterable[Tensor], given: Iterable[Tensor], net: Iterable[Tensor]) -> list[Tensor]:
        """Settles :attr:`valid` and :attr:`static`, and lets go of all tensors but the parameters.

        Args:
            held: the tensors that every call reads where they lie.
            given: those that each call has of its own.
            net: those of the net's layers.

        Returns:
            What stands for each of ``given`` and of ``held`` from here on.
        """

        def memory(tensors: Iterable[Tensor]) -> set[int]:
            return {t.untyped_storage()._cdata for t in tensors}

        held, given = list(held), list(given)
        places, inputs = memory(held), memory(given)
        # other tensors on the memory of the parameters: a module may swap these for others as long as nobody holds them
        own = {id(t): t.detach() for t in held if isinstance(t, torch.nn.Parameter)}
        for t in given:
            own.pop(id(t), None)
        self._swap(own)
        self.static = memory(net) <= places - inputs
        made: set[int] = set()
        for step in self._steps:
            read = [t for t in tensors_in((step.args, step.kwargs)) if id(t) not in self._stubs]
            if step.name not in _LITERALS and not memory(t for t in read if id(t) not in made) <= places | inputs:
                self.valid: bool = False
            if step.apply is None:
                made.update(id(t) for t in tensors_in(step.result))
            elif read and step.name not in _LAYERS:
                self.static: bool = False
        computed = [t for step in self._steps if step.apply is None for t in _made_by(step)]
        stubs = {id(t): _stub(t) for t in (*given, *held, *computed)}
        self._stubs.update((id(stub), stub) for stub in stubs.values())
        self._swap(stubs)
        return [stubs[id(t)] for t in (*given, *held)]

    def replay(self, recorder: Recorder, given: Mapping[int, Tensor]) -> Any:
        """Writes the call down once more, and returns what stands for the energy's result.

        ``given``: tensors in the place of others, by their ids. :attr:`state` has been noted as the state before.
        """
        by = dict(given)
        for step in self._steps:
            args, kwargs = _swapped(step.args, by), _swapped(step.kwargs, by)
            if any(id(t) in self._stubs and recorder.value(t) is None for t in tensors_in((args, kwargs))):
                refuse(f"its tape has no numbers for {step.name}")
            if step.apply is not None:
                step.apply(recorder, step.result, args, kwargs)
                continue
            fresh = step.func(*args, **kwargs)
            by.update((id(old), new) for old, new in zip(tensors_in(step.result), tensors_in(fresh), strict=True))
        return self._result

    @property
    def state(self) -> list[Tensor]:
        """What stands for the state's tensors."""
        return self._state
