"""The net ops in Triton: which kernels of :mod:`mmebm.kernels.net` a net needs, their memory, and their graph.

A net becomes a list of launches on places in one row of memory a chain, planned once for its shapes. Energies and
chains of equal shapes share a :class:`_Workspace`, which owns everything that the launches read or write. A call copies
state, tensors and constants into it and runs the launches, the second time as one captured CUDA graph a step: the
step's number is counted on the device, so that the graph serves for any number of steps, and no address of the caller's
is in it.

``docs/kernels.md`` says how the kernels work, what they cost, and when "auto" leaves a net to cuDNN.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor

from mmebm import noise
from mmebm.kernels.langevin_mlp import refusal
from mmebm.kernels.net import FUNCTIONS
from mmebm.kernels.rule import signed64, table_of, todo_of
from mmebm.native import BackendError
from mmebm.ops.common.params import FIELDS
from mmebm.ops.common.untyped import TORCH
from mmebm.ops.langevin_mlp import MlpResult
from mmebm.ops.net.graph import Activation, Input, Net, check_net, pack, shapes_of, tensors_of
from mmebm.ops.net.op import NetChain
from mmebm.ops.net.triton_cost import slower
from mmebm.ops.net.triton_plan import BUILT, OPTIONS, plan_of, room_of

__all__ = ["energy_and_gradient", "run", "slower", "supports", "supports_energy"]

_MODES: Final = {"fp32": "ieee", "tf32x3": "tf32x3"}
# Numbers of all rows, and of all tensors: places are of 32 bits
_MOST: Final = (1 << 31) - 1
# Workspaces that are kept, and the numbers of all their rows (2 GiB): the least recently used go first
_WORKSPACES: Final = 8
_KEPT: Final = 1 << 29


# -- the workspace


class _Workspace:
    """A plan with its memory, the launches bound to it, and their graph once it is captured."""

    def __init__(self, net: Net, x: Tensor, chain: NetChain | None, capacity: int) -> None:
        self.lock = threading.Lock()
        self.chains, self.inputs = x.shape
        device = x.device
        mode = _MODES["fp32" if chain is None else chain.precision]
        plan = self.plan = plan_of(net, self.chains, self.inputs, mode, chain)

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        rows, tensors, width = (1, 1, 1) if chain is None else (*chain.constants.shape[:2], chain.constants.shape[3])
        masked = None if chain is None else chain.observed
        self.arena = torch.empty((self.chains, plan.row), dtype=torch.float32, device=device)
        self.arena[:, plan.at["one"]] = 1.0
        # where no gradient reaches the state, nothing is written
        self.arena[:, plan.at["g"] : plan.at["g"] + self.inputs] = 0.0
        self.lists = zeros(max(plan.lists, 1), dtype=torch.int32)
        self.w = zeros(max(plan.tensors, 1))
        self.numbers = zeros(3, dtype=torch.int64)
        self.counts = zeros(self.chains, dtype=torch.int32)
        self.alive = zeros(self.chains, dtype=torch.int32)
        self.constants = zeros(capacity if rows > 1 else 1, tensors, len(FIELDS), width)
        self.observed = zeros(*(masked.shape if masked is not None else (1, 1)), dtype=torch.uint8)
        self.partials = zeros(self.chains * max(plan.parts, 1))
        self.energies, self.norms = zeros(capacity, self.chains), zeros(capacity, self.chains)
        self.table = torch.tensor(self._words(chain), dtype=torch.int32, device=device)
        self.places = [
            torch.cat([torch.arange(at, at + n, dtype=torch.int32, device=device) for at, n in lists.places])
            for lists in plan.indices
        ]
        self.views: list[Tensor] = []
        for at, t in zip(plan.tensors_at, _floats(net), strict=True):
            self.views.append(self.w[at : at + t.numel()].view(t.shape))
        self.known: list[tuple[Tensor, int] | None] = [None] * len(plan.indices)
        pointers = {
            "a": self.arena,
            "w": self.w,
            "lists": self.lists,
            "numbers": self.numbers,
            "counts": self.counts,
            "constants": self.constants,
            "observed": self.observed,
            "partials": self.partials,
            "table": self.table,
            "energy": self.energies,
            "norms": self.norms,
            "alive": self.alive,
        }
        scalars = {
            "observed_stride": self.inputs if masked is not None and masked.shape[0] > 1 else 0,
            "constant_step": tensors * len(FIELDS) * width if rows > 1 else 0,
            "constant_width": width,
            "constant_chain": int(width > 1),
            "todo": 0 if chain is None else todo_of(chain),
        }
        self.calls: list[tuple[Any, tuple[int, ...], dict[str, Any]]] = []
        for launch in plan.launches:
            shared = {name: v for name, v in {**pointers, **scalars}.items() if name in launch.kernel.arg_names}
            named = {name: v for name, v in launch.arguments.items() if name in (*launch.kernel.arg_names, *OPTIONS)}
            self.calls.append((launch.kernel, launch.grid, {**shared, **named}))
        self.ran = False
        self.graph: Any = None
        self.done: Any = torch.cuda.Event() if device.type == "cuda" else None

    @staticmethod
    def _words(chain: NetChain | None) -> list[int]:
        words: list[int] = []
        at = 0
        if chain is not None:
            norm = 1 << FIELDS.index("grad_norm_clip")
            for t, width in enumerate(chain.widths):
                moves = chain.moving[t]
                words += [
                    at,
                    width,
                    noise.stream(chain.streams[t], noise.DRIFT),
                    int(chain.noisy[t] and moves),
                    int(bool(chain.present[t] & norm) and moves),
                    int(moves),
                ]
                at += width
        return words or [0]

    def fill(self, net: Net, x: Tensor) -> None:
        """State and tensors, written where the launches read them."""
        at = self.plan.at["x"]
        self.arena[:, at : at + self.inputs].copy_(x)
        if self.views:
            TORCH._foreach_copy_(self.views, _floats(net))
        for j, (lists, places) in enumerate(zip(self.plan.indices, self.places, strict=True)):
            node: Any = net.nodes[lists.node]
            index: Tensor = node.index
            known = self.known[j]
            if known is not None and known[0] is index and known[1] == index._version:
                continue
            flat = index.reshape(-1)
            order = flat.argsort(stable=True)
            ends = torch.arange(lists.total + 1, dtype=flat.dtype, device=flat.device)
            parts = (
                (lists.list_at, torch.where(flat < 0, -1, places[flat.clamp_min(0)])),
                (lists.starts_at, torch.searchsorted(flat[order], ends)),
                (lists.sorted_at, order),
            )
            for start, part in parts:
                self.lists[start : start + part.numel()].copy_(part)
            self.known[j] = None if index.is_inference() else (index, index._version)

    def fill_chain(self, chain: NetChain, first_step: int | Tensor) -> None:
        self.constants[: chain.constants.shape[0]].copy_(table_of(chain))
        if chain.observed is not None:
            self.observed.copy_(chain.observed)
        for i, value in enumerate((chain.seed, first_step, chain.chain_offset)):
            if isinstance(value, Tensor):
                self.numbers[i].copy_(value.reshape(()))
            else:
                self.numbers[i].fill_(signed64(int(value)))
        self.counts.zero_()
        self.alive.fill_(1)

    def launch(self) -> None:
        """The kernels of one step: no allocation, no synchronisation, no address but the workspace's own."""
        for kernel, grid, arguments in self.calls:
            kernel[grid](**arguments)

    def advance(self, steps: int) -> None:
        """``steps`` steps; the first of all compiles the kernels, and those behind it are a graph."""
        for _ in range(steps):
            if not self.ran:
                self.launch()
                self.ran = True
                continue
            if self.graph is None:
                self.graph = _captured(self.launch, self.arena.device)
            self.graph()


def _floats(net: Net) -> list[Tensor]:
    """The tensors of the net but its indices, in the order of the nodes and their fields."""
    nodes: tuple[Any, ...] = net.nodes
    values = [getattr(node, name) for node in nodes for name in node.__dataclass_fields__ if name != "index"]
    return [value for value in values if isinstance(value, Tensor)]


def _captured(launch: Any, device: torch.device) -> Any:
    """A function that does what ``launch`` does: on CUDA the replay of its graph, where it can be captured."""
    if device.type != "cuda":
        return launch
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            launch()
    except RuntimeError:  # the same kernels one by one
        return launch
    return graph.replay


_workspaces: OrderedDict[Any, _Workspace] = OrderedDict()
_lock = threading.Lock()


def _workspace(net: Net, x: Tensor, chain: NetChain | None, steps: int) -> _Workspace:
    """The workspace of these shapes and options, made where there is none."""
    capacity = max(64, 1 << (steps - 1).bit_length())
    description, tensors = pack(net)
    key: tuple[Any, ...] = (description, tuple(t.shape for t in tensors), tuple(x.shape), x.device)
    if chain is not None:
        mask = chain.observed
        key += (
            chain.widths,
            chain.streams,
            chain.noisy,
            chain.moving,
            chain.present,
            chain.noise_at,
            chain.clamp_noise,
            chain.freeze,
            chain.precision,
            None if mask is None else mask.shape,
            chain.constants.shape[0] > 1,
            chain.constants.shape[3],
            capacity,
        )
    with _lock:
        found = _workspaces.pop(key, None)
        if found is None:
            found = _Workspace(net, x, chain, capacity)
        _workspaces[key] = found
        while len(_workspaces) > 1 and (
            len(_workspaces) > _WORKSPACES or sum(w.arena.numel() for w in _workspaces.values()) > _KEPT
        ):
            old = _workspaces.popitem(last=False)[1]
            if old.done is not None:  # its memory may go to another stream than that of its last use
                old.done.synchronize()
    return found


class _Turn:
    """The workspace for one caller at a time, on its device and behind the last use of it."""

    def __init__(self, workspace: _Workspace, device: torch.device) -> None:
        self.workspace, self.device = workspace, device
        self.on: Any = torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def __enter__(self) -> None:
        self.workspace.lock.acquire()
        self.on.__enter__()
        if self.workspace.done is not None:
            torch.cuda.current_stream(self.device).wait_event(self.workspace.done)

    def __exit__(self, *error: Any) -> None:
        if self.workspace.done is not None:
            self.workspace.done.record(torch.cuda.current_stream(self.device))
        self.on.__exit__(*error)
        self.workspace.lock.release()


# -- what is taken


def supports_energy(net: Net, x: Tensor) -> str | None:
    """``None`` if :func:`energy_and_gradient` takes ``net`` at the flat state ``x``, else the reason why not."""
    reason = refusal(x)
    if reason is not None:
        return reason
    if x.dim() != 2 or x.dtype != torch.float32 or x.shape[1] == 0:
        return f"the state is {x.dtype} of shape {tuple(x.shape)}, taken is float32 (chains, inputs)"
    for node in net.nodes:
        if type(node) not in BUILT:
            return f"{type(node).__name__} is not built"
        if isinstance(node, Activation) and node.function not in FUNCTIONS:
            return f"the function {node.function} is not built"
    for t in tensors_of(net):
        if t.dtype not in (torch.float32, torch.int64):
            return f"a tensor of the net is {t.dtype}, taken is float32"
    spans = sorted((n.start, n.start + math.prod(n.shape)) for n in net.nodes if isinstance(n, Input))
    if any(one[1] > two[0] for one, two in pairwise(spans)):
        return "inputs of the net overlap"
    # at most a value, a slope and a gradient for each element of a node, and the state four times
    row = 3 * sum(room_of(math.prod(shape)) for shape in shapes_of(net)) + 4 * room_of(x.shape[1])
    if row * x.shape[0] > _MOST:
        return f"{x.shape[0]} chains hold up to {row * x.shape[0]} numbers, taken are fewer than 2^31; see chunk_size"
    if sum(room_of(t.numel()) for t in tensors_of(net)) > _MOST:
        return "the tensors of the net hold 2^31 numbers or more"
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return "a capture would keep addresses that the next call writes to"
    return None


def supports(chain: NetChain, x: Tensor) -> str | None:
    """``None`` if :func:`run` takes ``chain`` from the flat state ``x``, else the reason why not."""
    reason = supports_energy(chain.net, x)
    if reason is None and chain.precision not in _MODES:
        reason = f"precision={chain.precision!r} is not built for nets, only {', '.join(map(repr, _MODES))}"
    return reason or refusal(x, chain.precision)


# -- the op


def _require(name: str, reason: str | None) -> None:
    if reason is not None:
        raise BackendError(f"triton: {name}: {reason}")


def energy_and_gradient(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    """E (chains,) and dE/dx (chains, inputs); see :func:`supports_energy`."""
    _require("net_energy", supports_energy(net, x))
    check_net(net, x.shape[0], x.shape[1], x.device)
    if x.shape[0] == 0:
        return x.new_zeros(0), torch.zeros_like(x)
    workspace = _workspace(net, x, None, 1)
    with torch.no_grad(), _Turn(workspace, x.device):
        workspace.fill(net, x)
        workspace.advance(1)
        at = workspace.plan.at
        # clones: of one chain these are contiguous views of what the next call writes to
        gradient = workspace.arena[:, at["g"] : at["g"] + x.shape[1]]
        return workspace.arena[:, at["energy"]].clone(), gradient.clone(memory_format=torch.contiguous_format)


def run(
    chain: NetChain, x: Tensor, steps: int, first_step: int | Tensor, *, energy: bool = False, grad_norm: bool = False
) -> MlpResult:
    """``steps`` steps from the flat state ``x``, which stays as it is; see :func:`supports`."""
    reason = None if chain.checked else supports(chain, x)
    if reason is None and 1 < chain.constants.shape[0] < steps:
        reason = f"{steps} steps with constants for {chain.constants.shape[0]}"
    _require("langevin_net", reason)
    if not chain.checked:
        check_net(chain.net, x.shape[0], x.shape[1], x.device)
    workspace = _workspace(chain.net, x, chain, max(steps, chain.constants.shape[0]))
    with torch.no_grad(), _Turn(workspace, x.device):
        workspace.fill(chain.net, x)
        workspace.fill_chain(chain, first_step)
        workspace.advance(steps)
        at = workspace.plan.at["x"]
        return MlpResult(
            workspace.arena[:, at : at + x.shape[1]].clone(memory_format=torch.contiguous_format),
            workspace.energies[:steps].clone() if energy else None,
            workspace.norms[:steps].clone() if grad_norm else None,
            workspace.alive == 0 if chain.freeze else None,
        )
