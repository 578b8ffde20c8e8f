"""A whole chain as one CUDA graph: captured once, replayed with fresh noise, weights read in place.

A step of a chain on a small batch is some hundred kernels of a few microseconds each, and Python takes longer to launch
them than the device to run them. A graph launches all steps at once.

What a graph has baked in is its key: the energy's code and everything it can see (:mod:`mmebm.samplers.graph_key`), the
addresses of its weights, shapes, dtypes, the number of steps and the options. What changes from call to call is copied
into static tensors first: the state, masks, the energy's tensors among ``args``, ``kwargs`` and the parts of a
``functools.partial``, the seed, the first step, step sizes and noise scales, settings that are tensors. A weight that
an optimiser writes in place is read where it lies; one that is replaced makes another key.

The engine knows no CUDA: a :class:`Backend` warms up, captures and replays, so that everything else is tested without a
GPU. The steps before a capture (the warm-up) run on copies, and what they may have changed is put back: random numbers,
buffers such as batch statistics, and other tensors that the energy holds. Python code in the energy runs while it is
captured and not at a replay; an energy that keeps count of its calls is noticed in the warm-up and left to the loop.

The first replay is compared with the loop, which is run for it: they must agree bit for bit, or, where two runs of the
loop differ (sums in the order in which threads come), by no more than a few times what those do. A graph that differs
is dropped with a warning, and its kind of chain is left to the loop.
"""

from __future__ import annotations

import math
import os
import random
import threading
import traceback
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmebm.native import BackendError
from mmebm.ops.params import StepParams
from mmebm.reference.langevin_step import widen
from mmebm.samplers.chain import Problem, Run
from mmebm.samplers.graph_key import Identity, parts_of
from mmebm.state import integer

if TYPE_CHECKING:
    from mmebm.samplers.langevin import Langevin

__all__ = ["GraphInfo", "cache_size", "clear", "graphs"]

Capture = Literal["auto", True, False]
Chain = Callable[[Problem, list[Tensor]], Run]

# At most so many graphs are kept, the least recently used goes first; 0: none is captured. May be set.
cache_size: int = 8

_WARM_UP = 2  # steps: the second takes what accept="descent" keeps of the first
_REMEMBERED = 256  # keys of calls seen once, and reasons why not
# After so many graphs that were used less than twice each, or calls of which none was like another, a kind of chain is
# said to change from call to call and left to the loop.
_FRUITLESS = 4
# Elements of a tensor, not a parameter, that is put back if the warm-up writes to it.
_RESTORABLE = 1 << 24
# A third run of the loop may be this many times further from the first than the second was.
_SPREADS = 10.0
# Step sizes and noise scales are read from memory, so that another number is no other graph; the rest is baked in.
_STATIC = ("step_size", "noise_scale")
# Options of a sampler that Problem does not hold and that its loop reads.
_OPTIONS = ("noise_at", "clamp_noise", "norm_over", "outside", "accept", "log_prob", "score", "mode", "rng", "backend")


class CannotCapture(RuntimeError):
    """The chain is not made of kernels alone; the message says what else it does."""


class Graph(Protocol):
    """A captured chain."""

    outputs: Any

    def wait(self) -> None:
        """Let what the caller launches next come after the last replay, on whatever stream that was."""
        ...

    def replay(self) -> None:
        """The kernels once more, on the caller's stream."""
        ...

    def done(self) -> None:
        """The caller has launched the last kernel that reads the outputs."""
        ...

    def release(self) -> None:
        """Give the memory back, once the device has finished with it."""
        ...


class Backend(Protocol):
    """What captures."""

    def unsupported(self, device: torch.device) -> str | None:
        """Why chains on ``device`` are not captured, or None."""
        ...

    def capturing(self) -> bool:
        """Whether the caller is inside a capture already, ours or the user's."""
        ...

    def warm_up(self, device: torch.device, body: Callable[[], object], generators: Sequence[torch.Generator]) -> None:
        """``body`` as it will be captured, without capturing it; the device's generators are put back."""
        ...

    def capture(self, device: torch.device, body: Callable[[], Any], generators: Sequence[torch.Generator]) -> Graph:
        """The kernels of ``body``, which does not run.

        Raises:
            CannotCapture: saying why.
        """
        ...

    def random(self, device: torch.device, generators: Sequence[torch.Generator]) -> list[Any]:
        """The state of the device's generators, the default one and these."""
        ...

    def restore_random(self, state: list[Any]) -> None:
        """Put them back."""
        ...

    def host_random(self) -> tuple[Any, ...]:
        """The state of the generators on the host, whose numbers a graph would repeat."""
        ...

    def restore_host_random(self, state: tuple[Any, ...]) -> None:
        """Put them back."""
        ...


# -- CUDA


def _where(frames: Sequence[traceback.FrameSummary]) -> str:
    """The user's line among ``frames``, as far as it can be told."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parents[2]))
    users = [f for f in frames if not f.filename.startswith((*ours, "<"))]
    return f" ({Path(users[-1].filename).name}:{users[-1].lineno})" if users else ""


def _brief(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    place = _where(traceback.extract_tb(error.__traceback__))
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200] + place


# Operations that wait for the device to tell a number or a size.
_READS = frozenset(
    f"aten::{name}" for name in ("_local_scalar_dense", "equal", "masked_select", "nonzero", "_unique2", "unique_dim")
)


class _OnDevice(TorchDispatchMode):
    """Refuses what waits for the host, before a capture is begun.

    A capture that fails leaves things behind in torch: reserved memory, generators that believe to be captured, before
    torch 2.12 also an allocator that believes so. It is the last resort, not the test.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def _refuse(self, what: str) -> NoReturn:
        raise CannotCapture(f"the energy {what}{_where(traceback.extract_stack())}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "name", str)().partition(".")[0]
        if name in _READS and args[0].device == self.device:
            self._refuse("reads a value on the host")
        if name == "aten::index" and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]):
            self._refuse("selects by a mask, so that a shape depends on values")
        out = func(*args, **(kwargs or {}))
        if name in ("aten::_to_copy", "aten::copy_"):
            places = {t.device for t in (out, *args[:2]) if isinstance(t, Tensor)}
            if self.device in places and len(places) > 1:
                self._refuse("copies between the host and the device")
        return out


class CudaGraph:
    """A ``torch.cuda.CUDAGraph`` with its own memory pool, ordered after its last use."""

    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: Any, device: torch.device) -> None:
        self.graph, self.outputs, self.device = graph, outputs, device
        self.event = torch.cuda.Event()

    def wait(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.event)

    def replay(self) -> None:
        with torch.cuda.device(self.device):
            self.graph.replay()

    def done(self) -> None:
        self.event.record(torch.cuda.current_stream(self.device))

    def release(self) -> None:
        self.event.synchronize()
        self.graph.reset()


class CudaBackend:
    """``torch.cuda.CUDAGraph``.

    Warm-up and capture share one side stream per device: libraries make their handles and workspaces per stream, and
    what is made inside a capture would belong to the graph. Calls of other threads (allocations among them) are
    allowed during a capture. Of a capture that failed, torch may keep the memory reserved to the end of the process
    (https://github.com/pytorch/pytorch/pull/190348): one more reason not to try twice.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def unsupported(self, device: torch.device) -> str | None:
        return None if device.type == "cuda" else f"the state is on {device.type}"

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def warm_up(self, device: torch.device, body: Callable[[], object], generators: Sequence[torch.Generator]) -> None:
        states = self.random(device, generators)
        side, now = self._stream(device), torch.cuda.current_stream(device)
        try:
            side.wait_stream(now)
            with torch.cuda.stream(side):
                body()
            now.wait_stream(side)
        finally:
            self.restore_random(states)

    def random(self, device: torch.device, generators: Sequence[torch.Generator]) -> list[Any]:
        default = torch.cuda.default_generators[torch.device(device).index or 0]
        return [(g, g.get_state()) for g in (default, *generators)]

    def restore_random(self, state: list[Any]) -> None:
        for generator, of in state:
            generator.set_state(of)

    def capture(
        self, device: torch.device, body: Callable[[], Any], generators: Sequence[torch.Generator]
    ) -> CudaGraph:
        side = self._stream(device)
        cause: Exception | None = None
        try:
            graph = torch.cuda.CUDAGraph()
            for generator in generators:
                graph.register_generator_state(generator)
            # the outer stream context puts the caller's stream back also where ending the capture raises
            with (
                torch.cuda.device(device), torch.cuda.stream(side),
                torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"),
            ):  # fmt: skip
                try:
                    outputs = body()
                except Exception as error:
                    cause = error
                    raise
        except Exception as error:
            self._recover(device, generators)
            raise CannotCapture(_brief(cause or error)) from (cause or error)
        return CudaGraph(graph, outputs, device)

    def _recover(self, device: torch.device, generators: Sequence[torch.Generator]) -> None:
        """A capture that succeeds: generators of one that failed refuse to draw, as they wait for its end."""
        side = self._stream(device)
        word = torch.zeros((), dtype=torch.float32, device=device)
        with suppress(RuntimeError):
            graph = torch.cuda.CUDAGraph()
            for generator in generators:
                graph.register_generator_state(generator)
            with (
                torch.cuda.device(device), torch.cuda.stream(side),
                torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"),
            ):  # fmt: skip
                word.add_(1)

    def host_random(self) -> tuple[Any, ...]:
        return random.getstate(), torch.get_rng_state()

    def restore_host_random(self, state: tuple[Any, ...]) -> None:
        random.setstate(state[0])
        torch.set_rng_state(state[1])


# -- the call as key, static tensors and a chain on them


def _tensors_in(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """``function`` of every tensor in nested lists, tuples and dicts, as :meth:`Identity.input` walks them."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (list, tuple):
        return type(value)(_tensors_in(part, function) for part in value)
    if type(value) is dict:
        return {name: _tensors_in(part, function) for name, part in value.items()}
    return value


_SETTINGS = [f.name for f in fields(StepParams)]


def _tf32() -> tuple[Any, ...]:
    try:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError as error:  # set by the names of another version of the interface
        return (str(error),)


def _numerics(device: torch.device) -> tuple[Any, ...]:
    """torch's global switches that choose kernels."""
    kind = device.type
    return (
        torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic, *_tf32(), os.environ.get("MMEBM_BACKEND"),
    )  # fmt: skip


class _Call:
    """One call of a chain, taken apart: ``identity`` of what a graph has baked in, and the values that it has not."""

    def __init__(self, sampler: Langevin, p: Problem, tensors: list[Tensor]) -> None:
        self.sampler, self.problem, self.device = sampler, p, tensors[0].device
        self.rebuild, parts, fixed = parts_of(p.energy)
        self.tree = {"state": tensors, "calls": p.calls, "parts": parts, "masks": p.masks}
        self.numbers: dict[torch.dtype, list[float]] = {}
        # the ratio of Metropolis takes the temperature in double precision, which a number is and a tensor is not
        self.static = () if sampler.accept == "metropolis" else _STATIC
        made = self.identity = Identity(self.device, training=sampler.mode == "keep")
        made.both(
            self.device, _numerics(self.device), tuple(getattr(sampler, name) for name in _OPTIONS),
            sampler.on_nonfinite == "freeze", type(p.build(tensors)), p.keys, p.steps, tuple(map(tuple, p.blocks)),
            tuple(p.noisy), p.record, p.thin,
        )  # fmt: skip
        made.full.append(p.chain_offset)
        made.add(fixed)
        made.add(list(p.project))
        made.input(self.tree)
        dtypes = [widen(t[:0]).dtype for t in tensors]
        made.both(len(p.params))
        for row in p.params:
            for dtype, one in zip(dtypes, row, strict=True):
                for name in _SETTINGS:
                    value = getattr(one, name)
                    if isinstance(value, Tensor):
                        made.tensor_input(value)
                    elif value is not None and name in self.static:
                        self.numbers.setdefault(dtype, []).append(value)
                        made.both("number")
                    else:
                        made.add(value)
        self.dtypes = dtypes

    def keys(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """(full, kind); see :class:`Identity`."""
        return tuple(self.identity.full), tuple(self.identity.kind)


def _signed64(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


@dataclass
class _Static:
    """The tensors a graph reads, and the chain on them."""

    inputs: list[Tensor]
    numbers: dict[torch.dtype, Tensor]
    seed: Tensor
    first_step: Tensor
    written: dict[torch.dtype, list[float]] = field(default_factory=dict)

    @classmethod
    def like(cls, call: _Call) -> _Static:
        """Of the call's shapes; nothing is in them yet but the inputs."""
        device = call.device
        word = torch.zeros((), dtype=torch.int64, device=device)
        return cls(
            [t.detach().clone().requires_grad_(t.requires_grad) for t in call.identity.inputs],
            {dtype: torch.zeros(len(v), dtype=dtype, device=device) for dtype, v in call.numbers.items()},
            word, word.clone(),
        )  # fmt: skip

    def fill(self, call: _Call) -> None:
        """The call's values, written in place."""
        with torch.no_grad():
            for mine, given in zip(self.inputs, call.identity.inputs, strict=True):
                mine.copy_(given)
            for dtype, values in call.numbers.items():
                if self.written.get(dtype) != values:
                    self.numbers[dtype].copy_(torch.tensor(values, dtype=dtype, device="cpu"), non_blocking=True)
                    self.written[dtype] = list(values)
            for mine, given in ((self.seed, call.problem.seed), (self.first_step, call.problem.first_step)):
                if isinstance(given, Tensor):
                    mine.copy_(given.reshape(()))
                else:
                    mine.fill_(_signed64(given))

    def problem(self, call: _Call) -> tuple[Problem, list[Tensor]]:
        """The call's chain, with every tensor replaced by a static one."""
        place = {id(t): mine for t, mine in zip(call.identity.inputs, self.inputs, strict=True)}

        def mine(t: Tensor) -> Tensor:
            return place.get(id(t), t)

        tree = _tensors_in(call.tree, mine)
        left = {dtype: iter(t.unbind()) for dtype, t in self.numbers.items()}

        def settings(dtype: torch.dtype, one: StepParams) -> StepParams:
            found: dict[str, Any] = {}
            for name in _SETTINGS:
                value = getattr(one, name)
                if isinstance(value, Tensor):
                    value = mine(value)
                elif value is not None and name in call.static:
                    value = next(left[dtype])
                found[name] = value
            return StepParams(**found)

        p = call.problem
        rows = [[settings(dtype, one) for dtype, one in zip(call.dtypes, row, strict=True)] for row in p.params]
        p = replace(
            p, energy=call.rebuild(tree["parts"]), calls=tree["calls"], masks=tree["masks"], params=rows, ends=[],
            seed=self.seed, first_step=self.first_step,
        )  # fmt: skip
        return p, tree["state"]


@contextmanager
def _uncached_autocast() -> Iterator[None]:
    """Autocast without its cache: a weight cast outside the graph would be baked in, one cast inside would leak."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


class _Kept:
    """What the warm-up may write to, put back on leaving; ``changed`` says what could not be."""

    def __init__(self, identity: Identity) -> None:
        self.buffers = [(m, name, m._buffers[name]) for m, name in identity.buffers]
        self.tensors: list[tuple[Tensor, int, Tensor | None]] = []
        for t in {id(t): t for t in identity.held}.values():
            if not t.is_inference():
                small = not isinstance(t, nn.Parameter) and t.numel() <= _RESTORABLE
                self.tensors.append((t, t._version, t.detach().clone() if small else None))

    def restore(self) -> str | None:
        """Puts back; the reason where something stays changed."""
        for m, name, t in self.buffers:
            if m._buffers.get(name) is not t:
                m._buffers[name] = t
        with torch.no_grad():
            for t, version, copy in self.tensors:
                # batch norm writes its statistics behind the version's back; what is as it was is not written to, as a
                # graph of the caller's may have saved it
                if copy is not None and not torch.equal(t, copy):
                    t.copy_(copy)
                elif copy is None and t._version != version:
                    return f"the energy writes to a tensor of shape {tuple(t.shape)} that it holds"
        return None


# -- the cache


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
    static: _Static
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

    def run(self, capture: Capture, sampler: Langevin, p: Problem, tensors: list[Tensor], chain: Chain) -> Run | str:
        """The chain as a graph, or the reason why it takes the loop.

        Args:
            capture: see :class:`mmebm.Langevin`.
            chain: the loop: of a problem and tensors, which it leaves as they are.

        Raises:
            BackendError: with ``capture=True``, where there is a reason.
        """
        out = self._run(capture, sampler, p, tensors, chain)
        if isinstance(out, str) and capture is True:
            raise BackendError(f"capture=True: {out}")
        return out

    def _options_reason(self, capture: Capture, sampler: Langevin, p: Problem, tensors: list[Tensor]) -> str | None:
        if capture is False:
            return "capture=False"
        reason = self.backend.unsupported(tensors[0].device)
        if reason is not None:
            return reason
        if p.differentiable:
            return "differentiable steps need autograd"
        if sampler.rng != "philox":
            return f"rng={sampler.rng!r} draws on the host's order"
        if p.offload:
            return "offload copies to the host between the steps"
        if not p.steps or not tensors[0].shape[0]:
            return "there is nothing to do"
        if integer("mmebm.capture.cache_size", cache_size, 0) == 0:
            return "mmebm.capture.cache_size is 0"
        if getattr(self._busy, "now", False) or self.backend.capturing():
            return "inside another capture"
        return None

    def _run(self, capture: Capture, sampler: Langevin, p: Problem, tensors: list[Tensor], chain: Chain) -> Run | str:
        reason = self._options_reason(capture, sampler, p, tensors)
        if reason is not None:
            return reason
        with self._lock:
            self._bury()
        try:
            call = _Call(sampler, p, tensors)
            key, kind_key = call.keys()
            kind, full = hash(kind_key), hash(key)
        except Exception as error:  # objects that raise when they are looked at must not end a chain that would run
            return f"what the energy holds cannot be told: {_brief(error)}"
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

    def _capture(self, call: _Call, chain: Chain, kind: int) -> _Entry:
        try:
            static = _Static.like(call)
            static.fill(call)
            p, state = static.problem(call)
            kept = _Kept(call.identity)
        except torch.cuda.OutOfMemoryError as error:
            raise CannotCapture(f"no memory for static copies: {_brief(error)}") from error
        short = replace(p, steps=min(_WARM_UP, p.steps))
        generators = call.identity.generators
        host = self.backend.host_random()
        with _uncached_autocast():

            def warm_up() -> None:
                chain(short, state)
                with _OnDevice(call.device):  # apart: compiled energies run otherwise under a mode
                    chain(short, state)

            try:
                self.backend.warm_up(call.device, warm_up, generators)
            except torch.cuda.OutOfMemoryError as error:  # beside the copies; alone the chain may fit
                raise CannotCapture(f"no memory to warm up: {_brief(error)}") from error
            finally:
                moved = [not _same(a, b) for a, b in zip(host, self.backend.host_random(), strict=True)]
                self.backend.restore_host_random(host)
                reason = kept.restore()
            if any(moved):
                raise CannotCapture("the energy draws random numbers on the host")
            if reason is not None:
                raise CannotCapture(reason)
            after = _Call(call.sampler, call.problem, call.tree["state"]).identity
            # an address may come back, an object does not
            held = zip(after.held, call.identity.held, strict=False)
            if after.full != call.identity.full or any(a is not b for a, b in held):
                raise CannotCapture("the energy changes what it holds when it is called")
            graph = self.backend.capture(call.device, lambda: chain(p, state), generators)
        info = GraphInfo(p.steps, tuple(tuple(t.shape) for t in state), call.device, 0)
        return _Entry(graph, static, kind, info, [])

    def _difference(self, entry: _Entry, call: _Call, chain: Chain) -> str | None:
        """Runs the loop and replays once, on the call's values; what differs, or ``None``. Neither leaves a trace:
        buffers and random numbers are put back, so that the replay that follows is the first."""
        generators = call.identity.generators
        states, host = self.backend.random(call.device, generators), self.backend.host_random()
        kept = _Kept(call.identity)

        def undone(run: Callable[[], Run]) -> Run:
            try:
                return run()
            finally:
                self.backend.restore_random(states)
                self.backend.restore_host_random(host)
                kept.restore()

        def loop() -> Run:
            with _uncached_autocast():
                return chain(call.problem, call.tree["state"])

        try:
            expected = undone(loop)
            entry.graph.wait()
            found = undone(lambda: self._outputs(entry))
            gap = _distance(found, expected)
            if gap == 0.0:
                return None
            # a loop that does not repeat itself cannot be repeated bit for bit
            spread = _distance(undone(loop), expected)
        except torch.cuda.OutOfMemoryError as error:
            raise CannotCapture(f"no memory to compare a replay with the loop: {_brief(error)}") from error
        if gap <= _SPREADS * spread:
            return None
        entry.graph.release()
        return (
            f"a replay of the captured chain differs from the loop by {gap:.1e}, two runs of the loop by {spread:.1e}"
        )

    def _outputs(self, entry: _Entry) -> Run:
        """Of one replay, as copies: the graph writes to its own again."""
        entry.graph.replay()
        out: Run = entry.graph.outputs
        copy = replace(
            out, state=[t.clone() for t in out.state], trace={name: t.clone() for name, t in out.trace.items()},
            trajectory=[t.clone() for t in out.trajectory], frozen=None if out.frozen is None else out.frozen.clone(),
            never_accepted=None if out.never_accepted is None else out.never_accepted.clone(),
        )  # fmt: skip
        entry.graph.done()
        return copy

    def _replay(self, key: tuple[Any, ...], entry: _Entry, call: _Call, *, filled: bool = False) -> Run:
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
        reason = f"{out.reason}; captured: replay {entry.replays} of a graph of {steps} step{'s' * (steps != 1)}"
        return replace(out, reason=reason)

    # -- eviction

    def _watch(self, key: tuple[Any, ...], entry: _Entry, call: _Call) -> None:
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


def _distance(a: Run, b: Run) -> float:
    """The largest difference of two runs, relative to the largest number of the tensor; inf where one is not finite
    and the other is, or where decisions differ."""
    pairs = [*zip(a.state, b.state, strict=True), *zip(a.trajectory, b.trajectory, strict=True)]
    pairs += [(t, b.trace[name]) for name, t in a.trace.items()]
    if a.frozen is not None and b.frozen is not None:
        pairs.append((a.frozen, b.frozen))
    worst = 0.0
    for x, y in pairs:
        x, y = x.detach(), y.detach()
        if torch.equal(x.nan_to_num(), y.nan_to_num()) and torch.equal(x.isnan(), y.isnan()):
            continue
        finite = x.isfinite()
        if not x.is_floating_point() or not torch.equal(finite, y.isfinite()):
            return math.inf
        x, y = x[finite].double(), y[finite].double()
        worst = max(worst, ((x - y).abs().max() / y.abs().max().clamp_min(1e-30)).item())
    return worst


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


_engine = Engine(CudaBackend())


def run(sampler: Langevin, p: Problem, tensors: list[Tensor], chain: Chain) -> Run | str:
    """The chain as a graph, or the reason why it takes the loop; see :meth:`Engine.run`."""
    return _engine.run(sampler.capture, sampler, p, tensors, chain)


def clear() -> None:
    """Drops every graph and its memory (``torch.cuda.empty_cache()`` then gives it back to the device)."""
    _engine.clear()


def graphs() -> list[GraphInfo]:
    """The graphs in the cache, the least recently used first."""
    return _engine.graphs()
