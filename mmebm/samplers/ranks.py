"""Chains that several processes share."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from mmebm.state import integer


def rank_offset(chains: int, group: Any = None) -> int:
    """The ``chain_offset`` of this process: how many chains the processes of lower rank run.

    With the same seed in every process, the chains of all are then those of one process that runs them all. Without it,
    processes with equal seeds (``torch.manual_seed(0)`` in each, as DistributedDataParallel has it) draw equal noise.

    Args:
        chains: how many chains this process runs; it may be another number in each.
        group: a process group of ``torch.distributed``; None is that of all processes. Every process of it must call
            this function, as it waits for the others: once, not at every chain.

    Returns:
        0 where ``torch.distributed`` is not initialised.

    Raises:
        TypeError, ValueError: where ``chains`` is no int of at least 0.

    Example:
        >>> x = torch.zeros(8, 2)
        >>> offset = mmebm.rank_offset(len(x))
        >>> x = mmebm.langevin(lambda x: x.square().sum(1), x, 60, step_size=1e-2, seed=0, chain_offset=offset)
    """
    chains = integer("chains", chains, 0)
    if not (dist.is_available() and dist.is_initialized()):
        return 0
    counts: list[int] = [0] * dist.get_world_size(group)
    dist.all_gather_object(counts, chains, group)  # pyright: ignore[reportUnknownMemberType]
    return sum(counts[: dist.get_rank(group)])
