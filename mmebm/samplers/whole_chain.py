"""Runs a whole chain in one call where the energy and the options allow it, or says why not.

The call is ``langevin_mlp`` for a sum of MLPs, else ``langevin_net`` for what :mod:`mmebm.energies.trace` understands.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmebm import native
from mmebm.energies.lower import CannotLower, Lowered, lower
from mmebm.energies.trace import Traced
from mmebm.introspect import Memory
from mmebm.native import BackendError
from mmebm.ops import dispatch
from mmebm.ops import langevin_mlp as mlp
from mmebm.ops.common.layout import per_chain
from mmebm.ops.net import op as net
from mmebm.ops.net.graph import Conv, Linear
from mmebm.ops.terms import too_wide
from mmebm.samplers.chain import Problem, Run
from mmebm.samplers.gradient import Target
from mmebm.samplers.kept_nets import Seen, trace
from mmebm.samplers.user_modules import modules_of
from mmebm.samplers.verify import Check

RECORDS = ("energy", "grad_norm")
# Steps of a call, times chains: energy and gradient norm of each are kept to see which chains broke.
_TRACE = 1 << 22


def _options_reason(p: Problem, tensors: Sequence[Tensor]) -> str | None:
    """What the options ask for that only the loop does."""
    sampler = p.sampler
    if sampler.backend == "torch":
        return "backend='torch' is the loop with autograd"
    if sampler.score:
        return "score=True: there is no energy"
    if sampler.rng != "philox":
        return f"rng={sampler.rng!r}"
    if p.differentiable:
        return "differentiable steps need autograd"
    if len(p.blocks) != 1:
        return f"{len(p.blocks)} blocks"
    if sampler.accept is not None or any(function is not None for function in p.project):
        return "accept and project act between the steps"
    if sampler.outside != "clamp" or (sampler.norm_over != "chain" and sampler.grad_norm_clip is not None):
        return f"outside={sampler.outside!r}, norm_over={sampler.norm_over!r}"
    if any(name not in RECORDS for name in p.record):
        return f"record={p.record}; taken are {RECORDS}"
    if len(p.calls) != 1:
        return "the energy's arguments are functions of the step"
    if any(t.dtype != torch.float32 for t in tensors):
        return "the state is not float32"
    return None


class _Refusals:
    """Energies that could not be traced, which costs an evaluation of the energy: they are tried again at every
    ``PERIOD``-th chain only. A function counts by its code, an object by itself, and what both reach by its mode."""

    PERIOD = 32

    def __init__(self, *, whole: bool = False) -> None:
        self._whole = whole  # whether the number of chains and the device count
        self._known: Memory[dict[str, Any]] = Memory(256)

    def _entry(self, energy: Any, tensors: Sequence[Tensor]) -> dict[str, Any]:
        what = energy.__code__ if isinstance(energy, types.FunctionType) else energy
        shapes = tuple((t.shape, t.device) if self._whole else t.shape[1:] for t in tensors)
        modes = tuple((id(m), getattr(m, "training", None)) for m in modules_of(energy))
        rest: Any = (energy.__class__, modes, shapes)
        return self._known.get([what], rest, lambda: {"why": None, "chains": 0, "net": False})

    def get(self, energy: Any, tensors: Sequence[Tensor]) -> str | None:
        """Why ``energy`` is not to be tried at this chain, or None."""
        entry = self._entry(energy, tensors)
        if entry["why"] is None:
            return None
        entry["chains"] += 1
        return entry["why"] if entry["chains"] % self.PERIOD else None

    def add(self, energy: Any, tensors: Sequence[Tensor], why: str) -> None:
        """Notes that ``energy`` was refused."""
        self._entry(energy, tensors)["why"] = why

    def is_net(self, energy: Any, tensors: Sequence[Tensor]) -> bool:
        """Whether ``energy`` was traced before."""
        return self._entry(energy, tensors)["net"]

    def add_net(self, energy: Any, tensors: Sequence[Tensor]) -> None:
        """Notes that ``energy`` was traced."""
        self._entry(energy, tensors)["net"] = True


_refusals = _Refusals()
# nets that are faster otherwise, at these shapes: they would be traced for nothing
_elsewhere = _Refusals(whole=True)


def _net_missing(backend: str, device: torch.device) -> str | None:
    """What nets of any layers need to be fused on ``device`` and have not, or None."""
    if device.type == "cpu" and dispatch.requested(backend)[0] != "triton":
        return None if native.loaded("cpp") else "need the C++ extension"
    if device.type not in ("cpu", "cuda"):
        return "are fused on the CPU and on CUDA only"
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "are not traced inside a capture"
    missing = dispatch.implementation("langevin_net", "triton")[1]
    return None if missing is None else f"need Triton: {missing}"


def _understood(p: Problem, tensors: list[Tensor]) -> Lowered | Traced | str:
    """What the energy computes, or why neither op can say it."""
    args, kwargs = p.calls[0]
    state = p.build(tensors)
    given: dict[str, Any] = {"args": args, "kwargs": kwargs, "log_prob": p.sampler.log_prob}
    missing = _net_missing(p.sampler.backend, tensors[0].device)
    traced_before, auto = _refusals.is_net(p.energy, tensors), dispatch.requested(p.sampler.backend)[0] == "auto"
    better = _elsewhere.get(p.energy, tensors) if traced_before and auto else None
    if missing is None and better is None and traced_before:
        # what was no sum of MLPs is none as long as its net is the kept one
        with contextlib.suppress(CannotLower):
            traced = trace(p.energy, state, **given, only_kept=True)
            if traced is not None:
                return traced
    try:
        lowered = lower(p.energy, state, **given)
        wide = too_wide(lowered.terms)
        if wide is None:
            return lowered
        reason = f"the energy has {wide}"
    except CannotLower as error:
        reason = f"the energy is not a sum of MLPs: {error}"
    if missing is not None:
        return f"{reason}; nets of other layers {missing}"
    if better is not None:
        return f"{reason}; as a net: {better}"
    known = _refusals.get(p.energy, tensors)
    if known is not None:
        return f"{reason}; nor a net: {known}"
    try:
        traced = trace(p.energy, state, **given)
        assert traced is not None
        # without one the gradient is little of the time, and the loop's update is fused as it is
        if any(isinstance(node, (Conv, Linear)) for node in traced.net.nodes):
            _refusals.add_net(p.energy, tensors)
            return traced
        why, lasting = "it has no layer", True
    except CannotLower as error:
        why, lasting = str(error), error.lasting
    if lasting:
        _refusals.add(p.energy, tensors, why)
    return f"{reason}; nor a net: {why}"


@dataclasses.dataclass(frozen=True)
class Rest:
    """A chain of which a callback has seen some steps: the ``run`` so far, and why the rest takes the loop."""

    reason: str
    run: Run


@dataclasses.dataclass
class _Steps:
    """What ``start`` steps of a fused chain gave: the flat state; which chains broke in their energy or gradient, and
    which are frozen; the rows of the records and of the trajectory."""

    x: Tensor
    broken: Tensor
    frozen: Tensor | None
    traces: dict[str, list[Tensor]]
    kept: list[Tensor] = dataclasses.field(default_factory=list[Tensor])
    start: int = 0

    def copy(self) -> _Steps:
        """As they are now."""
        traces = {name: list(rows) for name, rows in self.traces.items()}
        return dataclasses.replace(self, traces=traces, kept=list(self.kept))


def run(p: Problem, tensors: list[Tensor]) -> Run | Rest | str:
    """The chain from ``tensors``, which stay as they are, or the reason why it takes the loop."""
    reason = _options_reason(p, tensors)
    if reason is not None:
        return reason
    understood = _understood(p, tensors)
    if isinstance(understood, str):
        return understood
    if understood.scalar and "energy" in p.record:
        return "the energy returns a scalar, not one value per chain"
    sampler, chains, device = p.sampler, tensors[0].shape[0], tensors[0].device
    moving = [i in p.blocks[0] for i in range(len(tensors))]
    table = mlp.constants_of(p.params, chains, torch.float32, device, moving)
    if isinstance(table, str):
        return table
    flat = [per_chain(t) for t in tensors]
    options: dict[str, Any] = {
        "widths": tuple(t.shape[1] for t in flat),
        "streams": tuple(range(len(tensors))),
        "noisy": tuple(p.noisy),
        "moving": tuple(moving),
        "constants": table[0],
        "present": table[1],
        "observed": mlp.flat_mask([mask if isinstance(mask, Tensor) else None for mask in p.masks], tensors),
        "seed": p.seed,
        "chain_offset": p.chain_offset,
        "noise_at": sampler.noise_at,
        "clamp_noise": sampler.clamp_noise,
        "freeze": sampler.on_nonfinite == "freeze",
        "precision": sampler.precision,
    }
    x = flat[0].contiguous() if len(flat) == 1 else torch.cat(flat, dim=1)
    op: Any
    try:
        if isinstance(understood, Traced):
            op, chain = net, net.NetChain(net=understood.net, **options)
            module, why = net.room(sampler.backend, chain, x)
        else:
            op, chain = mlp, mlp.MlpChain(terms=understood.terms, **options)
            module, why = mlp.room(sampler.backend, chain, x)
    except BackendError as error:
        return str(error)
    if module is None:
        if isinstance(understood, Traced) and device.type == "cuda":
            _elsewhere.add(p.energy, tensors, why)
        return why
    fused = _FusedChain(p, tensors, understood, op, module, dataclasses.replace(chain, checked=True), why)
    return fused.check.before(tensors) or fused.run(x)


class _FusedChain:
    """A chain of one problem that :attr:`op` runs in as few calls as its records and callbacks allow."""

    def __init__(
        self,
        p: Problem,
        tensors: list[Tensor],
        understood: Lowered | Traced,
        op: Any,
        module: types.ModuleType,
        chain: Any,
        why: str,
    ) -> None:
        self.p: Problem = p
        self.tensors: list[Tensor] = tensors
        self.understood: Lowered | Traced = understood
        self.op: Any = op
        self.module: types.ModuleType = module
        self.chain: Any = chain
        self.name: str = "langevin_net" if op is net else "langevin_mlp"
        self.backend: str = dispatch.backend_of(self.name, module)
        self.why: str = why  # this backend
        self.check: Check = Check(Target.of(p), understood, self.backend)
        self.overflowed: bool = False  # a gradient's norm
        self.first: _Steps
        self.seen: _Steps | None = None  # by a callback, which is not called again

    # -- what a flat state is

    def _apart(self, rows: Tensor) -> list[Tensor]:
        parts = torch.split(rows, list(self.chain.widths), dim=1)
        return [part.reshape(t.shape) for part, t in zip(parts, self.tensors, strict=True)]

    def _state(self, now: _Steps) -> list[Tensor]:
        # a tensor that does not move is handed back as it came, whatever its bits
        parts = zip(self._apart(now.x), self.tensors, self.chain.moving, strict=True)
        return [part.contiguous() if moves else t.clone() for part, t, moves in parts]

    def _so_far(self, now: _Steps) -> Run:
        p, chains, device = self.p, now.x.shape[0], now.x.device
        empty = torch.zeros(0, chains, dtype=torch.float32, device=device)
        trajectory: list[Tensor] = []
        if p.thin:
            no_rows = torch.zeros(0, *now.x.shape, dtype=torch.float32, device="cpu" if p.offload else device)
            parts = torch.split(torch.stack(now.kept) if now.kept else no_rows, list(self.chain.widths), dim=2)
            trajectory = [part.reshape(len(now.kept), *t.shape) for part, t in zip(parts, self.tensors, strict=True)]
        broken = now.broken if now.frozen is None else now.broken | now.frozen
        info: dict[str, Any] = {"backend": self.backend, "op": self.name, "reason": self.why}
        if now.start < p.steps:
            info["steps"] = now.start
        trace = {name: torch.cat(rows) if rows else empty for name, rows in now.traces.items()}
        return Run(self._state(now), trace, trajectory, broken, info, {"alive": ~broken})

    # -- whether the steps are to be used

    def _sound(self) -> Tensor:
        """Of the chains at the start, those with a state that is finite where it moves."""
        x, observed = self.first.x, self.chain.observed
        widths = torch.tensor(self.chain.widths, dtype=torch.int64, device=x.device)
        still = ~torch.tensor(self.chain.moving, dtype=torch.bool, device=x.device).repeat_interleave(widths)
        still = still if observed is None else still | observed.bool()
        return ~self.first.broken & (x.isfinite() | still).all(dim=1)

    def _late(self, now: _Steps) -> str | None:
        """Why these steps are not to be used, but for the last comparison."""
        if self.overflowed:
            return "a gradient's norm is beyond float32, of which the loop says whether the gradient is finite"
        # a chain that is frozen now may have moved on first
        if now.frozen is not None and bool((now.broken & (~now.frozen | self._sound())).any()):
            return "a chain's energy or gradient was not finite at a finite state, where the loop freezes it"
        return None

    def _last_finite(self, now: _Steps) -> list[Tensor]:
        """The state to compare at: of chains that left the finite numbers the last one before, as the energy may not
        do so there."""
        since = self.first if self.seen is None else self.seen
        if not self.check.looks(self.tensors) or not bool((since.x.isfinite() & ~now.x.isfinite()).any()):
            return self._state(now)
        again = dataclasses.replace(self.chain, freeze=True).rows(since.start, now.start)
        x = self.op.run(self.module, again, since.x, now.start - since.start, self.p.first_step + since.start).x
        return self._state(dataclasses.replace(now, x=x))

    def _looped(self, reason: str) -> Rest | str:
        """What a callback has seen stays, and the loop goes on from there."""
        return reason if self.seen is None else Rest(reason, self._so_far(self.seen))

    def _renew(self, x: Tensor) -> str | None:
        """Takes the energy as a callback has changed it, or says why not."""
        again = _understood(self.p, self._apart(x))
        if isinstance(again, str):
            return f"a callback changed the energy into one that is not fused: {again}"
        if type(again) is not type(self.understood):
            return "a callback changed the energy into one of another kind"
        new = {"net": again.net} if isinstance(again, Traced) else {"terms": again.terms}
        self.understood, self.chain = again, dataclasses.replace(self.chain, **new)
        self.check.renew(again)
        return None

    # -- the steps

    def _begin(self, x: Tensor) -> _Steps:
        p = self.p
        alive: Tensor | None = p.carried.get("alive")
        broken = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device) if alive is None else ~alive
        frozen = None if alive is None or not self.chain.freeze else broken
        return _Steps(x, broken, frozen, {name: [] for name in p.record})

    def _advance(self, now: _Steps) -> None:
        """The steps up to where somebody looks at the chain, or as many as a call does."""
        p, start, chains = self.p, now.start, now.x.shape[0]
        stop = min(p.steps, start + max(1, _TRACE // chains), (start // p.thin + 1) * p.thin if p.thin else p.steps)
        if p.watch is not None:
            stop = min(stop, (start // p.watch.every + 1) * p.watch.every)
        rows, first = self.chain.rows(start, stop), p.first_step + start
        result = self.op.run(self.module, rows, now.x, stop - start, first, energy=True, grad_norm=True)
        # a frozen chain stays so in the pieces that follow
        now.x = result.x if now.frozen is None else torch.where(now.frozen.unsqueeze(1), now.x, result.x)
        for name, values in now.traces.items():
            values.append(getattr(result, name))
        assert result.energy is not None and result.grad_norm is not None
        finite = result.energy.isfinite()
        now.broken = now.broken | ~(finite & result.grad_norm.isfinite()).all(dim=0)
        if now.x.device.type == "cpu":
            self.overflowed |= bool((finite & result.grad_norm.isposinf()).any())
        if result.frozen is not None:
            now.frozen = result.frozen if now.frozen is None else now.frozen | result.frozen
        if p.thin and stop % p.thin == 0:
            now.kept.append(now.x.cpu() if p.offload else now.x)
        now.start = stop

    def run(self, x: Tensor) -> Run | Rest | str:
        """The chain from the flat state ``x``; a reason, or the rest of the chain with one, for the loop."""
        p, watch = self.p, self.p.watch
        now = self._begin(x)
        self.first = now.copy()
        calls_back = watch is not None and watch.callback is not None
        depends = Seen(p, self.tensors, self.understood.seen) if calls_back else None
        while now.start < p.steps:
            self._advance(now)
            if watch is None or not watch.due(now.start):
                continue
            if calls_back:
                reason = self._late(now) or self.check.between(self._last_finite(now))
                if reason is not None:
                    return self._looped(reason)
                self.seen = now.copy()
            if watch(now.start, self._apart(now.x)):
                break
            if depends is None or now.start == p.steps:
                continue
            before, depends = depends, Seen(p, self.tensors, self.understood.seen)
            reason = self._renew(now.x) if before != depends else None
            if reason is not None:
                return self._looped(reason)
        if self.seen is not None:
            if self.check.due:
                self.check.settle()
            return self._so_far(now)
        return self._late(now) or self.check.after(self._last_finite(now)) or self._so_far(now)
