"""Samples beside the training tuples: the nearest ones, and whether samples are copies or all alike. No labels needed.

The distance between two tuples is the root mean square over modalities of the Euclidean distance in model space, each
in units of its root mean square between two training tuples: every modality counts alike, whatever its size. The
training tuples' mean is taken off first: ``torch.cdist`` squares in float32, and the squares of what all tuples have in
common, such as a white ground, would drown the distances.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor

from mmebm.data.base import MultimodalDataset
from mmebm.evaluation import metrics
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
        self._mean = {name: x.mean(0) for name, x in _flat(self.tuples).items()}
        self._points = self._scaled(self.tuples)

    def _scaled(self, x: Batch) -> Tensor:
        parts = [
            (v - self._mean[name]) / (2 * self.variance[name] * len(self.variance)).sqrt()
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
            near 0 for copies. ``nearest_by_modality``: the same of each modality by itself, which tells copies of
            images in tuples that were never there. ``spread``: by modality, the samples' standard deviation over that
            of training tuples: near 0 where all samples are alike.
        """
        flat, real_flat, own = _flat(samples), _flat(real), _flat(self.tuples)
        varied = [name for name in own if self.variance[name] > 0]
        return {
            "nearest": _ratio(self._scaled(samples), self._scaled(real), self._points),
            "nearest_by_modality": {name: _ratio(flat[name], real_flat[name], own[name]) for name in varied},
            "spread": {name: metrics.spread(flat[name], own[name]) for name in varied},
        }


def _flat(x: Batch) -> dict[str, Tensor]:
    return {name: value.detach().float().flatten(1) for name, value in x.items()}


def _ratio(samples: Tensor, real: Tensor, points: Tensor) -> float | None:
    """The samples' median distance to the nearest of ``points`` by that of real ones; None where that is 0."""
    mean = points.mean(0)
    distance = [torch.cdist(x - mean, points - mean).min(1).values.median() for x in (samples, real)]
    return float(distance[0] / distance[1]) if distance[1] > 0 else None


def _variance(x: Tensor) -> Tensor:
    """Summed over the elements, (n, D) -> ()."""
    return x.var(0).sum()
