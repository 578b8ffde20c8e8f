"""Nets of energies, kept from one chain to the next.

To trace an energy costs one evaluation of it and some milliseconds. What it does is written down on a tape
(:mod:`mmebm.energies.trace.tape`), and the tape is good for as long as Python would do the same: the same code, modes,
numbers and shapes, tensors at the same addresses, in all that the energy can see (:mod:`mmebm.samplers.capture.key`).
The values of weights and arguments are read again at each chain.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from mmebm.energies import trace as tracing
from mmebm.energies.trace import Traced
from mmebm.ops.net.graph import Conv, Linear, Net
from mmebm.samplers.capture.key import Identity, parts_of
from mmebm.samplers.chain import Problem
from mmebm.state import flatten

__all__ = ["Seen", "clear", "trace"]

MOST: Final = 32


@dataclass
class _Kept:
    """A net, without what would keep the energy's modules or a call's data alive.

    ``stubs``: what stands on its tape for the arguments' tensors and for those that are read where they lie.
    """

    key: list[Any]
    references: list[weakref.ref[Any]]
    stubs: list[Tensor]
    traced: Traced


_kept: OrderedDict[Any, _Kept] = OrderedDict()
_lock = threading.Lock()


def clear() -> None:
    """Forgets all nets."""
    with _lock:
        _kept.clear()


def _identity(energy: Any, state: Any, args: Any, kwargs: dict[str, Any], seen: tuple[Any, ...]) -> Identity:
    """What the operations of a call depend on."""
    names, tensors, _ = flatten(state)
    key = Identity(torch.device("cpu"), training=True)
    _, parts, fixed = parts_of(energy)
    key.add(fixed)
    for value in (parts, tuple(args), kwargs):
        key.input(value)
    key.both(type(state), tuple(names), tuple((t.shape, t.dtype) for t in tensors))
    key.both(torch.get_default_dtype(), torch.is_inference_mode_enabled())
    # code that was replaced under an object's hands
    for item in seen:
        key.both(inspect.getattr_static(type(item), "forward", None) if isinstance(item, nn.Module) else item)
    places = {t.untyped_storage().data_ptr() for t in key.inputs}
    if places and any(t.untyped_storage().data_ptr() in places for t in key.held):
        # on a tape they are one tensor, of which the next call has two
        key.refuse("a tensor is an argument, and read where it lies as well")
    return key


class Seen:
    """What an energy's operations depend on at one moment, to tell whether somebody changed it since."""

    def __init__(self, p: Problem, tensors: list[Tensor], seen: tuple[Any, ...] = ()) -> None:
        args, kwargs = p.calls[0]
        key = _identity(p.energy, p.build(tensors), args, kwargs, seen)
        self.known: bool = key.refusal is None  # or something is hidden, and may have changed
        self.key: list[Any] = key.full
        self.tensors: list[tuple[Tensor, int]] = [
            (t, t._version) for t in (*key.held, *key.inputs) if not t.is_inference()
        ]

    def __eq__(self, other: object) -> bool:
        """Whether nothing changed; tensors by their counts of writes."""
        if not isinstance(other, Seen) or not (self.known and other.known) or len(self.tensors) != len(other.tensors):
            return False
        same = all(a is b and i == j for (a, i), (b, j) in zip(self.tensors, other.tensors, strict=True))
        return same and self.key == other.key


def trace(
    energy: Callable[..., Any],
    state: Any,
    *,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    log_prob: bool = False,
    only_kept: bool = False,
) -> Traced | None:
    """As :func:`mmebm.energies.trace.trace`; with ``only_kept`` None where the net is not kept."""
    kwargs = kwargs or {}
    seen = tracing.examined(energy, flatten(state)[1], args, kwargs)
    key = _identity(energy, state, args, kwargs, seen)
    key.both(log_prob)
    if key.refusal is not None:
        return None if only_kept else tracing.trace(energy, state, args=args, kwargs=kwargs, log_prob=log_prob)
    place = tuple(id(item) for item in seen if isinstance(item, nn.Module)), tuple(key.kind)
    with _lock:
        kept = _kept.get(place)
        if kept is not None:
            _kept.move_to_end(place)
    if kept is not None and kept.key == key.full and all(reference() is not None for reference in kept.references):
        same = replace(kept.traced, seen=seen)
        if same.tape.static:
            return same
        tensors = dict(zip(map(id, kept.stubs), (*key.inputs, *key.held), strict=True))
        return tracing.retrace(same, tensors, log_prob)
    if only_kept:
        return None
    found = tracing.trace(energy, state, args=args, kwargs=kwargs, log_prob=log_prob)
    weights = [t for n in found.net.nodes if isinstance(n, (Conv, Linear)) for t in (n.weight, n.bias) if t is not None]
    stubs = found.tape.tie(key.held, key.inputs, weights)
    # what a replay makes anew is not kept: it may hold a call's data
    kept_of = found if found.tape.static else replace(found, net=Net(()))
    with _lock:
        _kept.pop(place, None)
        if found.tape.valid:
            try:
                references = [weakref.ref(item, lambda _: _kept.pop(place, None)) for item in key.watched]
            except TypeError:  # such an object may give its id to another one
                return found
            _kept[place] = _Kept(key.full, references, stubs, replace(kept_of, seen=()))
            while len(_kept) > MOST:
                _kept.popitem(last=False)
    return found
