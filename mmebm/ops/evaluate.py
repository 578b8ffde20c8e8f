"""Energy and gradient of a described energy, a sum of MLP terms or a net, by the reference and by the fused op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

from mmebm.ops.mlp_energy import mlp_energy
from mmebm.ops.mlp_energy.reference import mlp_energy as mlp_reference
from mmebm.ops.net.graph import Net
from mmebm.ops.net.op import net_energy
from mmebm.ops.net.reference import energy_and_gradient as net_reference
from mmebm.ops.terms import Term

Energy: TypeAlias = "Sequence[Term] | Net"


def by_reference(x: Tensor, energy: Energy) -> tuple[Tensor, Tensor]:
    """E (chains,) and dE/dx (chains, inputs) at ``x`` (chains, inputs) in PyTorch, in the dtype of ``x``."""
    return net_reference(x, energy) if isinstance(energy, Net) else mlp_reference(x, energy)


def by_op(x: Tensor, energy: Energy, backend: str) -> tuple[Tensor, Tensor]:
    """The same by the op that a chain of ``backend`` is made of; by its reference where there is none."""
    backend = backend if backend in ("cpp", "triton") else "torch"
    return net_energy(x, energy, backend=backend) if isinstance(energy, Net) else mlp_energy(x, energy, backend=backend)
