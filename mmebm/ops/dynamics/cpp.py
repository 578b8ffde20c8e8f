"""The steps of HMC, Underdamped and tempering, and the Metropolis test of the Langevin step, in C++.

The rules stand in PyTorch in :mod:`mmebm.samplers.hmc`, :mod:`~mmebm.samplers.underdamped`,
:mod:`~mmebm.samplers.tempering` and :mod:`~mmebm.samplers.metropolis`, which run where :func:`reason` says why these do
not. Here one call does what lies between two gradients, noise included, for all tensors of the state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from mmebm import native, noise
from mmebm.ops import dispatch
from mmebm.ops.common.address import address, readable
from mmebm.ops.noise import native_reason

__all__ = ["Dynamics", "Proposals", "energies", "exchange", "finite_rows_", "reason"]

# The order of DynamicsSlot and ProposalSlot in csrc/dynamics/job.h.
SLOTS: Final = ("kick", "drift", "decay", "noise", "thermal", "mass")
PROPOSAL_SLOTS: Final = ("step_size", "noise_scale", "grad_clip", "grad_norm_clip", "prior_std")
_NUMBER, _CHAIN, _ELEMENT = range(3)
_CPU = torch.device("cpu")
# Below this many elements a second thread does not pay.
_LARGE = 1 << 14


def reason(tensors: Sequence[Tensor], *numbers: int | Tensor) -> str | None:
    """Why C++ does not take a state of these tensors, with these seeds and steps, or None.

    Raises:
        BackendError: where MMEBM_BACKEND asks for it by name, and it failed its parity case.
    """
    missing = native_reason(tensors[0].device, *numbers)
    if missing is not None:
        return missing
    if any(type(t) is not Tensor or t.dtype != torch.float32 or t.layout != torch.strided for t in tensors):
        return "the state is not plain float32"
    if any(math.prod(t.shape[1:]) > 1 << 33 for t in tensors):
        return "a chain has more than 2**33 elements"
    failed = native.parity_failure("dynamics", "cpp", tensors[0].device)
    if failed is not None and dispatch.requested("auto")[0] == "cpp":
        raise native.BackendError(f"cpp: dynamics: {failed}")
    return failed


def _address(t: Tensor | None) -> int:
    return 0 if t is None else address("a tensor of the chain", t, _CPU, t.dtype)


def _floats(values: Sequence[Tensor], shapes: Sequence[torch.Size]) -> list[Tensor]:
    """``values`` as contiguous float32 of these shapes: what an address may be taken of."""
    out = list(values)
    for i, (t, shape) in enumerate(zip(values, shapes, strict=True)):
        if t.shape != shape or not t.is_cpu:
            raise ValueError(f"a gradient must be {tuple(shape)} on the CPU as its state is, got {tuple(t.shape)}")
        if t.dtype is not torch.float32 or not t.is_contiguous():
            out[i] = readable("a gradient", t.to(torch.float32), _CPU, (torch.float32,))
    return out


def energies(value: Tensor, chains: int) -> Tensor:
    """One float32 energy per chain, contiguous."""
    if value.shape != (chains,) or not value.is_cpu:
        raise ValueError(f"the energy must be ({chains},) on the CPU, got {tuple(value.shape)} on {value.device}")
    if value.dtype is not torch.float32 or not value.is_contiguous():
        value = value.to(torch.float32).contiguous()
    return value


def _kind(value: Any, like: Tensor) -> tuple[int, float, Tensor | None]:
    """A coefficient as (kind, number, what its address is taken of)."""
    if not isinstance(value, Tensor):
        return _NUMBER, float(value), None
    if value.numel() == 1:
        return _NUMBER, float(value), None
    if value.numel() == 0:  # one for each of no elements
        return _NUMBER, 1.0, None
    value = value.detach().to(torch.float32)
    if value.dim() == like.dim() and value.shape[0] == like.shape[0] == value.numel():
        return _CHAIN, 0.0, value.contiguous()
    return _ELEMENT, 0.0, value.expand(like.shape).contiguous()


class Dynamics:
    """What a run of HMC or Underdamped keeps: state, velocities and gradient of the tensors that move.

    Attributes:
        x: the state, written in place. Where steps may be taken back (``keeps``), ``y`` is where a step goes, and ``g``
            the gradient at ``x``; else ``y`` is ``x``.
        alive: bool (chains,), cleared where a chain is not finite any more.
    """

    def __init__(
        self,
        x: Sequence[Tensor],
        *,
        indices: Sequence[int],
        masks: Sequence[bool | Tensor],
        seed: int,
        chain_offset: int,
        alive: Tensor,
        keeps: bool,
        freeze: bool,
    ) -> None:
        self.x: list[Tensor] = [t.contiguous() for t in x]
        self.shapes: list[torch.Size] = [t.shape for t in self.x]
        self.chains: int = self.x[0].shape[0]
        self.alive = alive
        fresh = lambda: [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in self.x]
        self.y: list[Tensor] = fresh() if keeps else self.x
        self.v: list[Tensor] = fresh()
        self.g: list[Tensor] = fresh() if keeps else []
        self._before = fresh() if keeps else []
        self._masks = [mask.contiguous() if isinstance(mask, Tensor) else None for mask in masks]
        self._constants: list[dict[str, Any]] = [{} for _ in self.x]
        self._held: dict[Any, Any] = {}
        self._large = sum(t.numel() for t in self.x) >= _LARGE
        self._given: Sequence[Tensor] | None = None
        self._grads: list[Tensor] = []
        self._places: list[int] = []
        moving = [
            {
                "numel": math.prod(t.shape[1:]),
                "index": index,
                "observed": _address(self._masks[i]),
                "x": _address(t),
                "y": _address(self.y[i]),
                "v": _address(self.v[i]),
                "before": _address(self._before[i]) if keeps else 0,
                "g": _address(self.g[i]) if keeps else 0,
            }
            for i, (t, index) in enumerate(zip(self.x, indices, strict=True))
        ]
        self._op = native.cpu().Dynamics(
            {
                "chains": self.chains,
                "chain_offset": chain_offset & noise.MASK32,
                "seed": seed & (1 << 64) - 1,
                "alive": _address(alive),
                "freeze": freeze,
                "isa": dispatch.isa(),
                "tensors": moving,
            }
        )

    @property
    def _threads(self) -> int:
        # asked at every step: the number may be set meanwhile
        return torch.get_num_threads() if self._large else 1

    def set(self, i: int, **values: Any) -> None:
        """Coefficients of tensor ``i``: numbers, or tensors that broadcast against it."""
        known = self._constants[i]
        for name, value in values.items():
            if name in known and known[name] is value:
                continue
            kind, number, held = _kind(value, self.x[i])
            self._op.set(tensor=i, slot=SLOTS.index(name), kind=kind, value=number, values=_address(held))
            known[name] = value
            self._held[i, name] = held

    def set_temperature(self, value: Any) -> None:
        """HMC's: a number, or one per chain."""
        if isinstance(value, Tensor) and value.numel() > 1:
            held = self._held["temperature"] = value.detach().reshape(-1).to(torch.float32).contiguous()
            if held.numel() != self.chains:
                raise ValueError(f"temperature must be a number or one per chain, got {tuple(value.shape)}")
            self._op.temperature(1.0, _address(held))
        else:
            self._op.temperature(float(value), 0)

    def set_energy(self, energy: Tensor | None) -> None:
        """The energy at ``x``, float32 (chains,), which accepted steps overwrite."""
        self._held["energy"] = energy
        self._op.energies(_address(energy))

    def set_outputs(self, **to: Tensor) -> None:
        """Where HMC's decisions go, (chains,): ``accept_prob``, ``accepted``, ``energy_error`` in float32, ``prob_sum``
        in float64, and ``ever_accepted``, bool."""
        self._held["outputs"] = to
        self._op.outputs({name: _address(t) for name, t in to.items()})

    def _addresses(self, grads: Sequence[Tensor]) -> list[int]:
        """Of gradients, which are held until the next ones come."""
        if grads is not self._given:
            self._given, self._grads = grads, _floats(grads, self.shapes)
            self._places = [_address(t) for t in self._grads]
        return self._places

    def hmc_start(self, step: int) -> None:
        """Velocities drawn, half a kick by ``g``, a drift: ``y``."""
        self._op.hmc_start(step & noise.MASK32, self._threads)

    def leap(self, grads: Sequence[Tensor]) -> None:
        """A kick by the gradient at ``y``, and a drift."""
        self._op.leap(self._addresses(grads), self._threads)

    def hmc_end(self, grads: Sequence[Tensor], energy: Tensor, step: int) -> None:
        """The last half kick by the gradient at ``y``, and the decision."""
        energy = energies(energy, self.chains)
        self._op.hmc_end(self._addresses(grads), _address(energy), step & noise.MASK32, self._threads)

    def baoa(self, grads: Sequence[Tensor], step: int) -> None:
        """Kick by the gradient at ``x``, drift, friction with noise, drift: ``y``."""
        self._op.baoa(self._addresses(grads), step & noise.MASK32, self._threads)

    def baoab_end(self, grads: Sequence[Tensor], energy: Tensor | None) -> None:
        """The last kick by the gradient at ``y``; chains that are not finite are marked and, frozen, stay at ``x``."""
        energy = None if energy is None else energies(energy, self.chains)
        self._op.baoab_end(self._addresses(grads), _address(energy), self._threads)


class Proposals:
    """The Metropolis test of :func:`mmebm.samplers.metropolis.log_ratio`.

    Rows are chains, or the replicas of a chain one after the other (``rows_per_chain``). Where a row is rejected,
    :meth:`decide` writes the old state over the proposal; where it is accepted and ``keep``, the new gradient and
    energy over the old ones.
    """

    def __init__(
        self,
        shapes: Sequence[torch.Size],
        masks: Sequence[Tensor | None],
        *,
        seed: int,
        stream: int,
        chain_offset: int,
        keep: bool,
        rows_per_chain: int = 1,
    ) -> None:
        rows = shapes[0][0]
        self.rows: int = rows
        self.shapes = shapes
        self.prob: Tensor = torch.zeros(rows, dtype=torch.float32, device="cpu")
        self.accepted: Tensor = torch.zeros(rows, dtype=torch.bool, device="cpu")
        self._masks = [None if mask is None else mask.expand(shape).contiguous() for mask, shape in zip(masks, shapes)]
        self._known: list[Any] = [None] * len(shapes)
        self._held: dict[Any, Any] = {}
        self._op = native.cpu().Proposals(
            {
                "rows": rows,
                "rows_per_chain": rows_per_chain,
                "chain_offset": chain_offset & noise.MASK32,
                "seed": seed & (1 << 64) - 1,
                "stream": stream,
                "keep": keep,
                "isa": dispatch.isa(),
                "tensors": [
                    {"numel": math.prod(shape[1:]), "observed": _address(mask)}
                    for shape, mask in zip(shapes, self._masks, strict=True)
                ],
            }
        )
        self._large = sum(math.prod(shape) for shape in shapes) >= _LARGE
        self.set_alive(None)

    @staticmethod
    def takes(params: Sequence[Any], tensors: Sequence[Tensor]) -> bool:
        """Whether the constants are numbers or one per row."""
        values = [(getattr(p, name), t) for p, t in zip(params, tensors, strict=True) for name in PROPOSAL_SLOTS]
        return all(value is None or _kind(value, t)[0] != _ELEMENT for value, t in values)

    def set(self, params: Sequence[Any], tensors: Sequence[Tensor], temperature: float | Tensor) -> None:
        """The constants of the step and the temperature, each one or one per row."""
        for i, (p, t) in enumerate(zip(params, tensors, strict=True)):
            if p is self._known[i]:
                continue
            for slot, name in enumerate(PROPOSAL_SLOTS):
                value = getattr(p, name)
                kind, number, held = (-1, 0.0, None) if value is None else _kind(value, t)
                self._op.set(tensor=i, slot=slot, kind=kind, value=number, values=_address(held))
                self._held[i, slot] = held
            self._known[i] = p
        if temperature is self._held.get("given"):
            return
        self._held["given"] = temperature
        if isinstance(temperature, Tensor) and temperature.numel() > 1:
            held = self._held["temperature"] = temperature.detach().reshape(-1).to(torch.float64).contiguous()
            if held.numel() != self.rows:
                raise ValueError(f"temperature must be a number or one per row ({self.rows},), got {tuple(held.shape)}")
            self._op.temperature(1.0, _address(held))
        else:
            self._op.temperature(float(temperature), 0)

    def set_alive(self, alive: Tensor | None) -> None:
        """bool (rows,): False never moves."""
        self._held["alive"] = alive
        to = {"accept_prob": self.prob, "accepted": self.accepted, "alive": alive}
        self._op.outputs({name: _address(t) for name, t in to.items()})

    def decide(
        self,
        x: Sequence[Tensor],
        y: Sequence[Tensor],
        grad_x: Sequence[Tensor],
        grad_y: Sequence[Tensor],
        energy: Tensor,
        new_energy: Tensor,
        step: int,
    ) -> None:
        """The decision, in ``prob`` and ``accepted``. ``x``, ``y``, ``grad_x`` and ``energy`` are the caller's own,
        float32 and contiguous; what the energy returned may be anything."""
        grad_y, new_energy = _floats(grad_y, self.shapes), energies(new_energy, self.rows)
        lists = {"x": x, "y": y, "gx": grad_x, "gy": grad_y}
        self._op.decide(
            **{name: [_address(t) for t in tensors] for name, tensors in lists.items()},
            energy=_address(energy),
            new_energy=_address(new_energy),
            step=step & noise.MASK32,
            threads=torch.get_num_threads() if self._large else 1,
        )


def exchange(
    tensors: Sequence[Tensor],
    *,
    rungs: int,
    seed: int,
    step: int,
    stream: int,
    chain_offset: int,
    side: int,
    **rows: Tensor,
) -> None:
    """Exchanges neighbours (side, side + 1), ... of a ladder in place: rows of ``tensors`` and what there is per row.

    Args:
        tensors: float32 (chains * rungs, ...), contiguous, as are all.
        rows: ``inverse``, float32 (rungs,), 1 / T; ``energy`` and ``alive``, float32 and bool (chains * rungs,), a row
            that is not alive stays where it is; ``origin``, int64 (chains, rungs); ``prob`` and ``prob_sum``, float32
            (chains, rungs - 1), written and added to.
    """
    native.cpu().exchange(
        {
            "tensors": [{"values": _address(t), "numel": math.prod(t.shape[1:])} for t in tensors],
            "chains": rows["energy"].shape[0] // rungs,
            "rungs": rungs,
            "seed": seed & (1 << 64) - 1,
            "step": step & noise.MASK32,
            "stream": stream,
            "chain_offset": chain_offset & noise.MASK32,
            "side": side,
            **{name: _address(t) for name, t in rows.items()},
        }
    )


def finite_rows_(alive: Tensor, values: Tensor) -> Tensor:
    """Clears ``alive``, bool (chains,), where a row of ``values`` (chains, ...) holds an inf or NaN, and returns it."""
    plain = values.dtype is torch.float32 and values.is_contiguous() and type(values) is Tensor
    if plain and values.is_cpu and native.loaded("cpp"):
        rows, numel = values.shape[0], math.prod(values.shape[1:])
        threads = torch.get_num_threads() if rows * numel >= _LARGE else 1
        native.cpu().finite_rows(_address(values), rows, numel, _address(alive), threads)
        return alive
    if values.numel():
        alive.logical_and_(torch.isfinite(values.reshape(values.shape[0], -1)).all(dim=1))
    return alive
