"""A whole chain as one CUDA graph: captured once, replayed with fresh noise, weights read in place.

A step of a chain on a small batch is some hundred kernels of a few microseconds each, and Python takes longer to launch
them than the device to run them. A graph launches all steps at once.

What a graph has baked in is its key (:mod:`.key`): the energy's code and everything it can see, the addresses of its
weights, shapes, dtypes, the number of steps and the options. What changes from call to call is copied into static
tensors first (:mod:`.call`): the state, masks, the energy's tensors among ``args``, ``kwargs`` and the parts of a
``functools.partial``, the seed, the first step, step sizes and noise scales, settings that are tensors. A weight that
an optimiser writes in place is read where it lies; one that is replaced makes another key.

The engine knows no CUDA: a :class:`~.device.Backend` warms up, captures and replays, so that everything else is tested
without a GPU. The steps before a capture (the warm-up) run on copies, and what they may have changed is put back
(:mod:`.trial`): random numbers, buffers such as batch statistics, and other tensors that the energy holds. Python code
in the energy runs while it is captured and not at a replay; an energy that keeps count of its calls is noticed in the
warm-up and left to the loop.

The first replay is compared with the loop, which is run for it: they must agree bit for bit, or, where two runs of the
loop differ (sums in the order in which threads come), by no more than a few times what those do. A graph that differs
is dropped with a warning, and its kind of chain is left to the loop.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from mmebm.energies.lower import effects
from mmebm.native import BackendError
from mmebm.samplers.capture.call import Call, Static
from mmebm.samplers.capture.device import Backend, CannotCapture, CudaBackend, Graph, OnDevice, brief
from mmebm.samplers.capture.trial import Kept, distance, same, uncached_autocast
from mmebm.samplers.chain import Engine as Chain
from mmebm.samplers.chain import Problem, Run
from mmebm.state import integer

__all__ = ["GraphInfo", "cache_size", "clear", "graphs"]

Capture = Literal["auto", True, False]

# At most so many graphs are kept, the least recently used goes first; 0: none is captured. May be set.
cache_size: int = 8

_WARM_UP = 2  # steps: the second takes what accept="descent" keeps of the first
_REMEMBERED = 256  # keys of calls seen once, and reasons why not
# After so many graphs that were used less than twice each, or calls of which none was like another, a kind of chain is
# said to change from call to call and left to the loop.
_FRUITLESS = 4
# A third run of the loop may be this many times further from the first than the second was.
_SPREADS = 10.0


@dataclass(frozen=True)
class GraphInfo:
    """A graph in the cache. ``state``: the shapes of the state's tensors."""

    steps: int
    state: tuple[tuple[int, ...], ...]
    device: torch.device
    replays: int


@dataclass
class _Entry:
    graph: Graph
    static: Static
    kind: int
    info: GraphInfo
    alive: list[Any]  # weak references where they can be, else the objects
    replays: int = 0


@dataclass
class _Used:
    """Of a kind of chain: calls that differed from those before, captures, and replays of any of them."""

    calls: int = 0
    captures: int = 0
    replays: int = 0


class _Recent(OrderedDict[int, Any]):
    """A dict that forgets the least recently noted."""

    def note(self, key: Any, value: Any) -> None:
        self[key] = value
        self.move_to_end(key)
        while len(self) > _REMEMBERED:
            self.popitem(last=False)


class Engine:
    """Runs chains as graphs of ``backend``; see the module's docstring. Safe to be called from several threads."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.entries: OrderedDict[tuple[Any, ...], _Entry] = OrderedDict()
        self._seen = _Recent()
        self._refused = _Recent()
        self._used = _Recent()
        self._lock = threading.Lock()  # not reentrant: a collection inside a turn must not drop what the turn uses
        self._capturing = threading.Lock()
        self._dead: deque[tuple[Any, ...]] = deque()
        self._busy = threading.local()

    def run(self, capture: Capture, p: Problem, tensors: list[Tensor], chain: Chain) -> Run | str:
        """The chain as a graph, or the reason why it takes the loop.

        Args:
            capture: see :class:`mmebm.Langevin`.
            chain: the loop: of a problem and tensors, which it leaves as they are.

        Raises:
            BackendError: with ``capture=True``, where there is a reason.
        """
        out = self._run(capture, p, tensors, chain)
        if isinstance(out, str) and capture is True:
            raise BackendError(f"capture=True: {out}")
        return out

    def _options_reason(self, capture: Capture, p: Problem, tensors: list[Tensor]) -> str | None:
        if capture is False:
            return "capture=False"
        reason = self.backend.unsupported(tensors[0].device)
        if reason is not None:
            return reason
        if p.watch is not None:
            return "progress and callback look at the chain between its steps"
        if p.differentiable:
            return "differentiable steps need autograd"
        if p.sampler.rng != "philox":
            return f"rng={p.sampler.rng!r} draws on the host's order"
        if p.carried:
            return "the chain goes on from a step before it"
        if p.offload:
            return "offload copies to the host between the steps"
        if not p.steps or not tensors[0].shape[0]:
            return "there is nothing to do"
        if integer("mmebm.capture.cache_size", cache_size, 0) == 0:
            return "mmebm.capture.cache_size is 0"
        if getattr(self._busy, "now", False) or self.backend.capturing():
            return "inside another capture"
        return effects.watchers(everywhere=True)  # who would not see a replay

    def _run(self, capture: Capture, p: Problem, tensors: list[Tensor], chain: Chain) -> Run | str:
        reason = self._options_reason(capture, p, tensors)
        if reason is not None:
            return reason
        with self._lock:
            self._bury()
        try:
            call = Call(p, tensors)
            key, kind_key = call.keys()
            kind, full = hash(kind_key), hash(key)
        except Exception as error:  # objects that raise when they are looked at must not end a chain that would run
            return f"what the energy holds cannot be told: {brief(error)}"
        if call.identity.refusal is not None:
            return call.identity.refusal
        with self._lock:
            entry = self.entries.get(key)
            if entry is not None:
                return self._replay(key, entry, call)
            refused = self._refused.get(kind)
            if refused is not None:
                return refused
            first = full not in self._seen
            self._seen.note(full, True)
            used = self._used.get(kind, _Used())
            self._used.note(kind, used)
            used.calls += first
            if capture == "auto" and (
                (used.captures >= _FRUITLESS and used.replays < 2 * used.captures)
                or (first and used.calls > used.captures + _FRUITLESS)
            ):
                return (
                    "its numbers or the addresses of its tensors differ from call to call; give tensors that change as "
                    "args or kwargs"
                )
            if capture == "auto" and first:
                return "the first call of its kind; captured from the second equal one on"
        if not self._capturing.acquire(blocking=capture is True):
            return "another thread is capturing"
        self._busy.now = True
        try:
            with self._lock:
                entry = self.entries.get(key)
                if entry is not None:  # another thread's work
                    return self._replay(key, entry, call)
            entry = self._capture(call, chain, kind)
            reason = self._difference(entry, call, chain)
            if reason is not None:
                warnings.warn(f"mmebm: {reason}; such chains take the loop", RuntimeWarning, stacklevel=2)
                raise CannotCapture(reason)
        except CannotCapture as error:
            with self._lock:
                self._refused.note(kind, str(error))
            return str(error)
        finally:
            self._busy.now = False
            self._capturing.release()
        with self._lock:
            self._used.setdefault(kind, _Used()).captures += 1
            self.entries[key] = entry
            self._watch(key, entry, call)
            while len(self.entries) > max(cache_size, 1):
                self._drop(next(iter(self.entries)))
            return self._replay(key, entry, call, filled=True)

    def _capture(self, call: Call, chain: Chain, kind: int) -> _Entry:
        try:
            static = Static.like(call)
            static.fill(call)
            p, state = static.problem(call)
            kept = Kept(call.identity)
        except torch.cuda.OutOfMemoryError as error:
            raise CannotCapture(f"no memory for static copies: {brief(error)}") from error
        short = replace(p, steps=min(_WARM_UP, p.steps))
        generators = call.identity.generators
        host = self.backend.host_random()
        with uncached_autocast():

            def warm_up() -> None:
                chain(short, state)
                with OnDevice(call.device):  # apart: compiled energies run otherwise under a mode
                    chain(short, state)

            try:
                self.backend.warm_up(call.device, warm_up, generators)
            except torch.cuda.OutOfMemoryError as error:  # beside the copies; alone the chain may fit
                raise CannotCapture(f"no memory to warm up: {brief(error)}") from error
            finally:
                moved = [not same(a, b) for a, b in zip(host, self.backend.host_random(), strict=True)]
                self.backend.restore_host_random(host)
                reason = kept.restore()
            if any(moved):
                raise CannotCapture("the energy draws random numbers on the host")
            if reason is not None:
                raise CannotCapture(reason)
            after = Call(call.problem, call.tree["state"]).identity
            # an address may come back, an object does not
            held = zip(after.held, call.identity.held, strict=False)
            if after.full != call.identity.full or any(a is not b for a, b in held):
                raise CannotCapture("the energy changes what it holds when it is called")
            graph = self.backend.capture(call.device, lambda: chain(p, state), generators)
        info = GraphInfo(p.steps, tuple(tuple(t.shape) for t in state), call.device, 0)
        return _Entry(graph, static, kind, info, [])

    def _difference(self, entry: _Entry, call: Call, chain: Chain) -> str | None:
        """Runs the loop and replays once, on the call's values; what differs, or ``None``. Neither leaves a trace:
        buffers and random numbers are put back, so that the replay that follows is the first."""
        generators = call.identity.generators
        states, host = self.backend.random(call.device, generators), self.backend.host_random()
        kept = Kept(call.identity)

        def undone(run: Callable[[], Run]) -> Run:
            try:
                return run()
            finally:
                self.backend.restore_random(states)
                self.backend.restore_host_random(host)
                kept.restore()

        def loop() -> Run:
            with uncached_autocast():
                return chain(call.problem, call.tree["state"])

        try:
            expected = undone(loop)
            entry.graph.wait()
            found = undone(lambda: self._outputs(entry))
            gap = distance(found, expected)
            if gap == 0.0:
                return None
            # a loop that does not repeat itself cannot be repeated bit for bit
            spread = distance(undone(loop), expected)
        except torch.cuda.OutOfMemoryError as error:
            raise CannotCapture(f"no memory to compare a replay with the loop: {brief(error)}") from error
        if gap <= _SPREADS * spread:
            return None
        entry.graph.release()
        return (
            f"a replay of the captured chain differs from the loop by {gap:.1e}, two runs of the loop by {spread:.1e}"
        )

    def _outputs(self, entry: _Entry) -> Run:
        """Of one replay, as copies: the graph writes to its own again."""
        entry.graph.replay()
        copy: Run = entry.graph.outputs.map(torch.clone)
        entry.graph.done()
        return copy

    def _replay(self, key: tuple[Any, ...], entry: _Entry, call: Call, *, filled: bool = False) -> Run:
        """One replay with the call's values; the outputs are copies, as the graph writes to its own again."""
        self.entries.move_to_end(key)
        entry.graph.wait()
        if not filled:
            entry.static.fill(call)
        out = self._outputs(entry)
        entry.replays += 1
        self._used.note(entry.kind, self._used.get(entry.kind, _Used(captures=1)))
        self._used[entry.kind].replays += 1
        steps = call.problem.steps
        reason = f"captured: replay {entry.replays} of a graph of {steps} step{'s' * (steps != 1)}"
        return replace(out, info={**out.info, "reason": f"{out.info['reason']}; {reason}"})

    # -- eviction

    def _watch(self, key: tuple[Any, ...], entry: _Entry, call: Call) -> None:
        """Drop the graph when something that its key knows by id dies."""
        dead = self._dead

        def gone(_: Any) -> None:
            dead.append(key)
            # not from within a collection that runs inside a capture or another thread's turn
            engine = self_reference()
            if engine is not None and not engine._capturing.locked() and engine._lock.acquire(blocking=False):
                try:
                    engine._bury()
                finally:
                    engine._lock.release()

        self_reference = weakref.ref(self)
        for item in call.identity.watched:
            try:
                entry.alive.append(weakref.ref(item, gone))
            except TypeError:  # nothing to hold it by but itself
                entry.alive.append(item)

    def _bury(self) -> None:
        """Drops what :meth:`_watch` found dead; the caller has the lock."""
        while self._dead:
            self._drop(self._dead.popleft())

    def _drop(self, key: tuple[Any, ...]) -> None:
        entry = self.entries.pop(key, None)
        if entry is not None:
            entry.graph.release()

    def clear(self) -> None:
        """Drops every graph, and forgets what was refused."""
        with self._lock:
            for key in list(self.entries):
                self._drop(key)
            for memory in (self._seen, self._refused, self._used):
                memory.clear()

    def graphs(self) -> list[GraphInfo]:
        """The graphs there are, the least recently used first."""
        with self._lock:
            self._bury()
            return [replace(entry.info, replays=entry.replays) for entry in self.entries.values()]


_engine = Engine(CudaBackend())


def run(p: Problem, tensors: list[Tensor], chain: Chain) -> Run | str:
    """The chain as a graph, or the reason why it takes the loop; see :meth:`Engine.run`."""
    return _engine.run(p.sampler.capture, p, tensors, chain)


def clear() -> None:
    """Drops every graph and its memory (``torch.cuda.empty_cache()`` then gives it back to the device).

    Example:
        >>> mmebm.capture.clear()
    """
    _engine.clear()


def graphs() -> list[GraphInfo]:
    """The graphs in the cache, the least recently used first.

    Example:
        >>> mmebm.capture.clear()
        >>> mmebm.capture.graphs()
        []
    """
    return _engine.graphs()
