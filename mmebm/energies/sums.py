"""Sums of energies: a joint energy and a prior, a product of experts, guidance."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from mmebm.energies.lower import Symbol, call
from mmebm.state import items, one_number


class Sum(nn.Module):
    """E(x) = sum_i weight_i E_i(x).

    Args:
        energies: callables of the same state, each (chains,); modules among them are registered.
        weights: a number for each; ``None``: 1.

    Raises:
        TypeError, ValueError: for something not callable, another number of weights, or energies whose values are of
            several shapes.
    """

    def __init__(self, *energies: Callable[..., Any], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        if not energies or not all(callable(e) for e in energies):
            raise TypeError(f"Sum takes at least one energy, each callable, got {energies!r:.80}")
        given = [1.0] * len(energies) if weights is None else items("weights", weights)
        for i, weight in enumerate(given):
            one_number(f"weights[{i}]", weight, low=-math.inf)
        self.weights: list[float] = [float(w) for w in given]
        if len(self.weights) != len(energies):
            raise ValueError(f"weights must be {len(energies)} numbers, one per energy, got {len(self.weights)}")
        self.energies: list[Callable[..., Any]] = list(energies)
        self.parts: nn.ModuleList = nn.ModuleList(e for e in energies if isinstance(e, nn.Module))

    def forward(self, x: Any) -> Tensor:
        """The state -> (chains,)."""
        values = [e(x) for e in self.energies]
        shapes = [tuple(getattr(value, "shape", ())) for value in values]
        # (chains, 1) and (chains,) would add up to all pairs of chains
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError(f"energies of a Sum must each return (chains,), got the shapes {shapes}")
        return functools.reduce(operator.add, (w * value for w, value in zip(self.weights, values, strict=True)))

    def mmebm_lowered(self, x: Any) -> Symbol:
        """The same on a symbolic state, for :func:`mmebm.energies.lower`."""
        values = (w * call(e, x) for w, e in zip(self.weights, self.energies, strict=True))
        return functools.reduce(operator.add, values)
