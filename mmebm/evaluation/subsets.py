"""Which subsets of the modalities an evaluation looks at."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final

import torch

from mmebm.data.base import check_count

__all__ = ["SUBSETS_PER_SIZE", "subsets"]

SUBSETS_PER_SIZE: Final = 10


def subsets(
    names: Sequence[str], sizes: Sequence[int], *, per_size: int | None = SUBSETS_PER_SIZE, seed: int = 0
) -> dict[int, list[tuple[str, ...]]]:
    """The subsets of ``names`` of each size, in order; where there are more than ``per_size``, so many drawn by seed.

    Ten of a size are all there are for up to five modalities. From six on they grow as 2^M, and with them the chains
    that an evaluation runs.

    Raises:
        ValueError: if ``per_size`` is below 1.
    """
    if per_size is not None:
        check_count("per_size", per_size)
    rng = torch.Generator().manual_seed(seed)
    found = {}
    for size in sizes:
        every = list(itertools.combinations(names, size))
        if per_size is not None and len(every) > per_size:
            kept = torch.randperm(len(every), generator=rng)[:per_size].sort().values
            every = [every[int(i)] for i in kept]
        found[size] = every
    return found
