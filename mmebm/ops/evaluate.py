"""Energy and gradient of a described energy, a sum of MLP terms or a net, by the reference and by the fused op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from torch import Tensor

from mmebm.ops.mlp_energy import mlp_energy
from mmebm.ops.mlp_energy.reference import mlp_energy as mlp_reference
from mmebm.ops.net.graph import Net
from mmebm.ops.net.op import net_energy
from mmebm.ops.net.reference import energy_and_gradient
from mmebm.ops.terms import Term

__all__ = ["Energy", "by_op", "by_reference"]

Energy: TypeAlias = "Sequence[Term] | Net"


class _Rooms(NamedTuple):
    reference: Callable[..., tuple[Tensor, Tensor]]
    op: Callable[..., tuple[Tensor, Tensor]]
    backends: tuple[str, ...]  # of a chain that the op has as well; for others its reference


_MLP = _Rooms(mlp_reference, mlp_energy, ("cpp", "triton"))
_NET = _Rooms(energy_and_gradient, net_energy, ("cpp", "triton"))


def _rooms(energy: Energy) -> _Rooms:
    return _NET if isinstance(energy, Net) else _MLP


def by_reference(x: Tensor, energy: Energy) -> tuple[Tensor, Tensor]:
    """E (chains,) and dE/dx (chains, inputs) at ``x`` (chains, inputs) in PyTorch, in the dtype of ``x``."""
    return _rooms(energy).reference(x, energy)


def by_op(x: Tensor, energy: Energy, backend: str) -> tuple[Tensor, Tensor]:
    """The same by the op that a chain of ``backend`` is made of."""
    op, backends = _rooms(energy).op, _rooms(energy).backends
    return op(x, energy, backend=backend if backend in backends else "torch")
