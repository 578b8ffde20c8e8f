"""Energy and gradient of a described energy, a sum of MLP terms or a net, by the reference and by the fused op."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, TypeAlias

import torch
from torch import Tensor

from mmebm.ops.common.description import of_chains
from mmebm.ops.mlp_energy import mlp_energy
from mmebm.ops.mlp_energy.reference import mlp_energy as mlp_reference
from mmebm.ops.net.graph import Net, shapes_of
from mmebm.ops.net.op import net_energy
from mmebm.ops.net.reference import energy_and_gradient as net_reference
from mmebm.ops.terms import Term

Energy: TypeAlias = "Sequence[Term] | Net"


# Bytes that autograd may take for a net's values at a time: a check must not need more memory than what it checks.
MEMORY: Final = 1 << 29


def by_reference(x: Tensor, energy: Energy) -> tuple[Tensor, Tensor]:
    """E (chains,) and dE/dx (chains, inputs) at ``x`` (chains, inputs) in PyTorch, in the dtype of ``x``."""
    if not isinstance(energy, Net):
        return mlp_reference(x, energy)
    # a value, its slope, and the gradients of both
    bytes_each = 4 * x.element_size() * sum(map(math.prod, shapes_of(energy)))
    most = max(1, MEMORY // bytes_each)
    if x.shape[0] <= most:
        return net_reference(x, energy)
    every = torch.arange(x.shape[0], dtype=torch.int64, device=x.device)
    pieces = [every[i : i + most] for i in range(0, x.shape[0], most)]
    found = [net_reference(x[rows], of_chains(energy, rows)) for rows in pieces]
    return torch.cat([value for value, _ in found]), torch.cat([grad for _, grad in found])


def by_op(x: Tensor, energy: Energy, backend: str) -> tuple[Tensor, Tensor]:
    """The same by the op that a chain of ``backend`` is made of; by its reference where there is none."""
    backend = backend if backend in ("cpp", "triton") else "torch"
    return net_energy(x, energy, backend=backend) if isinstance(energy, Net) else mlp_energy(x, energy, backend=backend)
