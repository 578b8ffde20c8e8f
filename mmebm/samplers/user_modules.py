"""The modules behind an energy, and what a chain does to them while it runs: train/eval flags, undone exactly.

Parameters are not frozen: the gradient is asked of the state alone, so that another thread may train them meanwhile.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mmebm.introspect import reachable
from mmebm.ops.common.untyped import TORCH

Mode = Literal["eval", "train", "keep"]


def modules_of(*objects: Any) -> list[nn.Module]:
    """The modules behind an energy, wherever :mod:`mmebm.introspect` finds them; not those inside of others."""
    return [item for item in reachable(*objects) if isinstance(item, nn.Module)]


def _tree(roots: list[nn.Module]) -> list[nn.Module]:
    """The modules and all inside them, each once; however deep they are nested."""
    found: dict[int, nn.Module] = {}
    waiting = list(reversed(roots))
    while waiting:
        m = waiting.pop()
        if id(m) not in found:
            found[id(m)] = m
            waiting.extend(child for child in m._modules.values() if child is not None)  # pyright: ignore[reportPrivateUsage]
    return list(found.values())


# -- parametrized weights


class _Kept:
    """A parametrized weight and all that it was computed from. The objects are held, so that no other one has the
    identity of one of them."""

    __slots__ = ("live", "tensors", "then", "version", "weight")

    def __init__(self, weight: Any, of: Any) -> None:
        self.weight, self.version = weight, weight._version
        # flags and other plain attributes, the parametrizations, and hooks on them
        self.live: list[dict[str, Any]] = [d for m in (of, *of) for d in (m.__dict__, m._modules)]
        self.live += [d for m in of for d in (m._forward_hooks, m._forward_pre_hooks)]
        self.then = list(map(dict, self.live))
        self.tensors: list[Any] = [
            (place, name, t, t._version, t.data_ptr(), t.requires_grad)
            for m in (of, *of)
            for place in (m._parameters, m._buffers)
            for name, t in place.items()
            if t is not None
        ]

    def holds(self) -> bool:
        """Whether the weight would be the same now, and is not written to itself."""
        for place, name, t, version, pointer, graph in self.tensors:
            if (
                place.get(name) is not t
                or t._version != version
                or t.data_ptr() != pointer  # where .data is another
                or t.requires_grad is not graph
            ):
                return False
        return self.live == self.then and self.weight._version == self.version


def _is_known(of: Any) -> bool:
    """Whether a weight is made of ordinary tensors alone, by torch's own parametrizations in eval mode. Those of a user
    may count their calls, draw random numbers, or read anything."""
    parts = [*of.parameters(), *of.buffers()]
    return all(type(t) in (Tensor, nn.Parameter) and not t.is_inference() for t in parts) and all(
        type(m).__module__ == "torch.nn.utils.parametrizations"
        and not (m.training or m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__)
        for m in of
    )


class _Weights:
    """The parametrized weights of a chain, by the id of their ParametrizationList and whether they have a graph."""

    __slots__ = ("kept", "stopped")

    def __init__(self) -> None:
        self.kept: dict[tuple[int, bool], _Kept] = {}
        self.stopped = False

    def stop(self, gradient: Tensor) -> None:
        """The energy takes gradients by the parameters, which may free the graph of a weight."""
        self.stopped = True
        self.kept.clear()


class _Thread(threading.local):
    """The weights of the chain that this thread runs, or None where they are computed at each call."""

    weights: _Weights | None = None


_thread = _Thread()


class _Once(parametrize.ParametrizationList):
    """A ParametrizationList whose weight is computed once by each chain, and again wherever it may be another one.

    The weight has its graph, so that also an energy that takes gradients by the parameters has the right ones. Not
    seen is what writes to a parameter or a buffer through ``.data`` or NumPy in the middle of a chain.

    For other threads all is as before: torch's own ``parametrize.cached()`` would hand them this chain's weights.
    """

    mmebm_pure = True  # what it keeps is of this chain

    def forward(self) -> Tensor:
        weights = None if torch.compiler.is_compiling() else _thread.weights
        if weights is None or weights.stopped:
            return super().forward()
        if parametrize._cache_enabled:  # pyright: ignore[reportPrivateUsage, reportUnknownMemberType]
            # the caller's cache, in which no weight may stay without its graph
            with torch.enable_grad():
                return super().forward()
        if (
            TORCH._C._functorch.peek_interpreter_stack() is not None  # tensors of a transform, which end with it
            or torch.is_inference_mode_enabled()
            or TORCH._C._is_any_autocast_enabled()
            or TORCH._C._len_torch_dispatch_stack()
        ):
            return super().forward()
        place = id(self), torch.is_grad_enabled()
        kept = weights.kept.get(place)
        if kept is None or not kept.holds():
            weight: Any = super().forward()
            if not _is_known(self):
                return weight
            if weight.requires_grad:
                weight.register_hook(weights.stop)
            kept = weights.kept[place] = _Kept(weight, self)
        # another tensor each time, as by hand
        return kept.weight.view_as(kept.weight)

    def __reduce_ex__(self, protocol: Any) -> Any:
        make, arguments, *rest = super().__reduce_ex__(protocol)
        # copies that another thread makes meanwhile are plain ones
        return (make, (parametrize.ParametrizationList, *arguments[1:]), *rest)


# -- modules in a mode


class _Flag:
    """A module's own flag, the values at which chains in progress hold it, the latest last, and the chains that compute
    its weight once."""

    __slots__ = ("holds", "module", "once", "own")

    def __init__(self, module: nn.Module) -> None:
        self.module, self.own = module, module.training
        self.holds: dict[_Hold, bool] = {}
        self.once: set[_Hold] = set()

    @property
    def value(self) -> bool:
        return next(reversed(self.holds.values()), self.own)


def _set(m: nn.Module, training: bool) -> None:
    if type(m).__setattr__ is nn.Module.__setattr__ and "training" in m.__dict__:
        m.__dict__["training"] = training  # what it does in the end, after a microsecond of other questions
    else:
        m.training = training


# The flags that are held, by the module's id; for who has _changed.
_flags: dict[int, _Flag] = {}
_changed = threading.Condition()


class _Hold:
    """Modules in a mode for as long as a chain runs.

    A module has one flag for all threads. Chains of several threads that want the same share it, and the last one gives
    the module back its own. A chain that wants another mode, "keep" among them, waits for the others.
    """

    def __init__(self, modules: list[nn.Module], mode: Mode, once: bool) -> None:
        self.mode, self.once = mode, once
        self.thread = threading.get_ident()
        # a frozen TorchScript module has no flag, and a compiled module that of the one inside
        self.modules = [
            m
            for m in modules
            if isinstance(getattr(m, "training", None), bool)
            and not isinstance(getattr(type(m), "training", None), property)
        ]
        self.outer, self.weights = _thread.weights, _Weights() if once else None
        self.done = False

    def _wanted(self, m: nn.Module) -> bool:
        if self.mode != "keep":
            return self.mode == "train"
        flag = _flags.get(id(m))
        if flag is None or any(hold.thread == self.thread for hold in flag.holds):
            return m.training
        return flag.own

    def _obstacle(self) -> nn.Module | None:
        """A module that another thread's chain holds at another value."""
        for m in self.modules if _flags else ():
            flag = _flags.get(id(m))
            if flag is not None:
                wanted = self._wanted(m)
                if any(value != wanted and hold.thread != self.thread for hold, value in flag.holds.items()):
                    return m
        return None

    def take(self) -> None:
        """Puts the modules in the mode, once no other thread wants another.

        Raises:
            RuntimeError: where waiting might never end: inside a chain of this thread.
        """
        with _changed:
            while (m := self._obstacle()) is not None:
                if any(hold.thread == self.thread for flag in _flags.values() for hold in flag.holds):
                    raise RuntimeError(
                        f"mode={self.mode!r} inside another chain, while a chain of another thread holds "
                        f"{type(m).__name__} in the other mode; give both the same mode, or each a copy of the module"
                    )
                _changed.wait()
            for m in self.modules:
                wanted = self._wanted(m)
                flag = _flags.get(id(m))
                if flag is None:
                    flag = _flags[id(m)] = _Flag(m)
                flag.holds[self] = wanted
                if m.training != wanted:
                    _set(m, wanted)
                if self.once and type(m) in (parametrize.ParametrizationList, _Once):
                    flag.once.add(self)
                    m.__class__ = _Once
        _thread.weights = self.weights

    def release(self) -> None:
        """Gives the modules back. May be called again after an interrupt, and does what is left then.

        Raises:
            Exception: of a module that does not take its flag, after all others have theirs.
        """
        if self.done:
            return
        if self.thread == threading.get_ident():
            _thread.weights = self.outer
        if self.weights is not None:
            self.weights.kept.clear()  # a circle by the hook, which Python may not see
        # what the energy itself has changed goes back too; with several threads it may be another's that trains
        alone = threading.active_count() == 1
        refused: Exception | None = None
        with _changed:
            for m in self.modules:
                flag = _flags.get(id(m))
                if flag is None or (flag.holds and self not in flag.holds):
                    continue
                ours = flag.value
                rest = next((value for hold, value in reversed(flag.holds.items()) if hold is not self), flag.own)
                try:
                    if m.training != rest and (alone or m.training == ours):
                        _set(m, rest)
                except Exception as error:
                    refused = refused or error
                flag.once.discard(self)
                if not flag.once and type(m) is _Once:
                    m.__class__ = parametrize.ParametrizationList  # pyright: ignore[reportAttributeAccessIssue]
                # last: a second call, after an interrupt, finds by it what is left to do
                flag.holds.pop(self, None)
                if not flag.holds:
                    del _flags[id(m)]
            self.done = True
            _changed.notify_all()
        if refused is not None:
            raise refused


def _after_fork() -> None:
    """In a child process: other threads and their chains did not come along, nor whoever had the lock."""
    global _changed
    _changed = threading.Condition()
    here = threading.get_ident()
    for hold in {hold for flag in _flags.values() for hold in flag.holds if hold.thread != here}:
        hold.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def sampling(modules: list[nn.Module], mode: Mode, *, once: bool = True) -> Generator[None, None, None]:
    """Modules in ``mode``; every flag back as it was, whatever happens.

    In eval mode torch's parametrized weights (spectral, weight and orthogonal norms) are computed once and not at every
    step, unless ``once=False``, and again where anything that they are computed from has changed. A power iteration in
    train mode is not skipped.
    """
    hold = _Hold(_tree(modules), mode, once and mode == "eval")
    try:
        try:
            hold.take()
            yield
        finally:
            hold.release()
    finally:
        hold.release()  # what is left where an interrupt (Ctrl-C) ended the first
