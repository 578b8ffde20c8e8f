"""What captures: the protocol that the engine needs, and CUDA's part of it."""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


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


def _where(frames: Sequence[traceback.FrameSummary]) -> str:
    """The user's line among ``frames``, as far as it can be told."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parents[2]))
    users = [f for f in frames if not f.filename.startswith((*ours, "<"))]
    return f" ({Path(users[-1].filename).name}:{users[-1].lineno})" if users else ""


def brief(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    place = _where(traceback.extract_tb(error.__traceback__))
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200] + place


# Operations that wait for the device to tell a number or a size.
_READS = frozenset(
    f"aten::{name}" for name in ("_local_scalar_dense", "equal", "masked_select", "nonzero", "_unique2", "unique_dim")
)


class OnDevice(TorchDispatchMode):
    """Refuses what waits for the host, before a capture is begun.

    A capture that fails leaves things behind in torch: reserved memory, generators that believe to be captured, before
    torch 2.12 also an allocator that believes so. It is the last resort, not the test.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
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
        self.graph: torch.cuda.CUDAGraph = graph
        self.outputs: Any = outputs
        self.device: torch.device = device
        self.event: torch.cuda.Event = torch.cuda.Event()

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
        causes: list[Exception] = []  # of an exception that ending the capture raises in turn

        def noted() -> Any:
            try:
                return body()
            except Exception as error:
                causes.append(error)
                raise

        try:
            graph, outputs = self._record(device, noted, generators)
        except Exception as error:
            # a capture that succeeds: generators of one that failed refuse to draw, as they wait for its end
            word = torch.zeros((), dtype=torch.float32, device=device)
            with suppress(RuntimeError):
                self._record(device, lambda: word.add_(1), generators)
            cause = causes[0] if causes else error
            raise CannotCapture(brief(cause)) from cause
        return CudaGraph(graph, outputs, device)

    def _record(
        self, device: torch.device, body: Callable[[], Any], generators: Sequence[torch.Generator]
    ) -> tuple[torch.cuda.CUDAGraph, Any]:
        graph, side = torch.cuda.CUDAGraph(), self._stream(device)
        for generator in generators:
            graph.register_generator_state(generator)  # pyright: ignore[reportUnknownMemberType]
        # the outer stream context puts the caller's stream back also where ending the capture raises
        options: Any = {"stream": side, "capture_error_mode": "thread_local"}
        with torch.cuda.device(device), torch.cuda.stream(side), torch.cuda.graph(graph, **options):
            return graph, body()

    def host_random(self) -> tuple[Any, ...]:
        return random.getstate(), torch.get_rng_state()

    def restore_host_random(self, state: tuple[Any, ...]) -> None:
        random.setstate(state[0])
        torch.set_rng_state(state[1])
