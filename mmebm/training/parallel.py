"""Several processes that train one model (``torchrun --nproc-per-node N -m mmebm train ...``).

Each process holds all networks and takes its share of the rows; gradients are averaged before every update, so that the
networks stay equal. Chains keep their global index (``chain_offset``): what a chain draws does not depend on how many
processes there are. What an iteration draws with a ``torch.Generator`` does (it is seeded with the rank too), so that a
training run on two processes is another run than on one, while samples of the same networks are the same.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process and how many there are."""

    rank: int = 0
    world: int = 1

    @classmethod
    def here(cls) -> Processes:
        """The process group that torch.distributed has begun, or this process alone."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def share(self, n: int) -> tuple[int, int]:
        """The rows of ``n`` that are this process's: from, to."""
        return n * self.rank // self.world, n * (self.rank + 1) // self.world

    def weight(self, n: int) -> float:
        """What a mean over this process's share of ``n`` rows counts in their whole mean, times the processes: 1 where
        all shares are alike."""
        begin, end = self.share(n)
        return self.world * (end - begin) / n

    def average(self, tensors: Sequence[Tensor], *, weight: float = 1.0) -> None:
        """Each tensor's mean over the processes, in place; one call of the network for all of them. ``weight`` is this
        process's (:meth:`weight`)."""
        if self.world == 1 or not tensors:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat.mul_(weight))
        flat /= self.world
        for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(part.view_as(t))

    def gather(self, parts: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
        """The rows of all processes, in order, on each of them: ``parts`` holds this one's share of ``n``."""
        if self.world == 1:
            return dict(parts)
        out = {}
        for name, value in parts.items():
            sizes = [Processes(rank, self.world).share(n) for rank in range(self.world)]
            most = max(b - a for a, b in sizes)
            padded = value.new_zeros(most, *value.shape[1:])
            padded[: len(value)] = value
            every = [torch.empty_like(padded) for _ in range(self.world)]
            dist.all_gather(every, padded)
            out[name] = torch.cat([rows[: b - a] for rows, (a, b) in zip(every, sizes, strict=True)])
        return out

    def largest(self, value: int) -> int:
        """The largest ``value`` of any process, on all of them; on the CPU, so that no GPU is waited for."""
        if self.world == 1:
            return value
        box = torch.tensor(value)
        dist.all_reduce(box, dist.ReduceOp.MAX)
        return int(box)

    def agree(self, decide: Callable[[], T]) -> T:
        """What the first process decides, on all of them; where it raises OSError or ValueError all do."""
        if self.world == 1:
            return decide()
        box: list[Any] = [None, None]
        if self.first:
            try:
                box[0] = decide()
            except (OSError, ValueError) as error:
                box[1] = str(error)
        dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise ValueError(box[1])
        return box[0]

    def barrier(self) -> None:
        """Waits for the others."""
        if self.world > 1:
            dist.barrier()


def start(device: torch.device) -> Processes:
    """Joins the processes that ``torchrun`` started; alone without it. NCCL on GPUs, Gloo elsewhere."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            if device.index is not None:
                raise ValueError(f"each process has a GPU of its own: use --device cuda, not {device}")
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # Before there is a group: imported later, as PyTorch itself does, its functions' defaults hold the group for
        # ever, and with it Gloo's threads. One that is still busy as Python ends aborts the process.
        importlib.import_module("torch.distributed.nn")
        # tensors of a GPU go by NCCL, those on the CPU by Gloo
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return Processes.here()


def finish() -> None:
    """Leaves the process group, where there is one, and waits for its threads to end."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
