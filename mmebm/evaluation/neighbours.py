"""Samples beside the training tuples: the nearest ones, and whether samples are copies or all alike. No labels needed.

The distance between two tuples is the root mean square over modalities of the Euclidean distance in model space, each
in units of its root mean square between two training tuples: every modality counts alike, whatever its size.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor

from mmebm.data.base import MultimodalDataset
from mmebm.evaluation.latent import usable_rows
from mmebm.state import Batch

__all__ = ["Neighbours"]

ROWS: Final = 5000  # training tuples that are compared with, at most
ELEMENTS: Final = 2**25  # of them together, at most


class Neighbours:
    """Training tuples to compare with.

    Args:
        train: the data set's training split. At most 5,000 of its tuples that lack no modality are used, drawn by
            ``seed``.
        seed: of that choice.
    """

    def __init__(self, train: MultimodalDataset, *, seed: int = 0) -> None:
        wide = sum(math.prod(m.shape) for m in train.modalities)
        rows = usable_rows(train, labelled=False)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        self.rows: Tensor = rows[order[: max(min(ROWS, ELEMENTS // wide), 2)].to(rows.device)]
        self.tuples: dict[str, Tensor] = train.batch(self.rows)
        self.variance: dict[str, Tensor] = {name: _variance(x) for name, x in _flat(self.tuples).items()}
        self._points = self._scaled(self.tuples)

    def _scaled(self, x: Batch) -> Tensor:
        parts = [
            v / (2 * self.variance[name] * len(self.variance)).sqrt()
            for name, v in _flat(x).items()
            if self.variance[name] > 0
        ]
        return torch.cat(parts, 1)

    def nearest(self, x: Batch) -> Batch:
        """Of each tuple of ``x`` (n, ...) the nearest training tuple, in model space."""
        index = torch.cdist(self._scaled(x), self._points).argmin(1)
        return {name: value[index.to(value.device)] for name, value in self.tuples.items()}

    def compare(self, samples: Batch, real: Batch) -> dict[str, Any]:
        """What tells copies and a collapse.

        Args:
            samples: of the model, (n, ...) in model space.
            real: tuples that were not trained on.

        Returns:
            ``nearest``: the median distance from a sample to the nearest training tuple, over that from a real one:
            near 0 for copies. ``spread``: by modality, the samples' standard deviation over that of training tuples:
            near 0 where all samples are alike.
        """
        distance = [torch.cdist(self._scaled(x), self._points).min(1).values.median() for x in (samples, real)]
        spread = {
            name: float((_variance(x) / self.variance[name]).sqrt())
            for name, x in _flat(samples).items()
            if self.variance[name] > 0
        }
        return {"nearest": float(distance[0] / distance[1]) if distance[1] > 0 else None, "spread": spread}


def _flat(x: Batch) -> dict[str, Tensor]:
    return {name: value.detach().float().flatten(1) for name, value in x.items()}


def _variance(x: Tensor) -> Tensor:
    """Summed over the elements, (n, D) -> ()."""
    return x.var(0).sum()
