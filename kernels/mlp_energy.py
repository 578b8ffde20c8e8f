"""Energy and gradient of a sum of MLP terms in Triton: one step of :mod:`mmebm.kernels.langevin_mlp` that stays put.

The same kernels, compiled once for both ops: what differs is a run-time bit. Products are exact fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmebm.kernels.langevin_mlp import gradient, refusal
from mmebm.ops.terms import Term

__all__ = ["energy_and_gradient", "supports_energy"]


def supports_energy(terms: Sequence[Term], x: Tensor) -> str | None:
    """``None`` if :func:`energy_and_gradient` takes these terms, else the reason why not."""
    return refusal(x)


def energy_and_gradient(terms: Sequence[Term], x: Tensor) -> tuple[Tensor, Tensor]:
    """(chains,) and (chains, inputs)."""
    return gradient(terms, x)
