"""DistributedDataParallel: python -m torch.distributed.run --nproc-per-node 2 examples/ecosystem/plain_ddp.py

Without the launcher it is one process, and learns the same.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from model import data, energy, loss, options, revised
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import mmebm


def train(o: argparse.Namespace) -> None:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    examples = data(o.batch * o.iterations)
    share = DistributedSampler(examples, world, rank, shuffle=False)  # pyright: ignore[reportArgumentType]
    loader = DataLoader(examples, o.batch // world, sampler=share)  # pyright: ignore[reportArgumentType]
    net = energy()
    model = DistributedDataParallel(net) if world > 1 else net
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    # once, as every process waits for the others here
    offset = mmebm.rank_offset(o.batch // world)
    for iteration, real in enumerate(loader):
        # the network itself: the wrapper's forward is for the pass whose gradients are averaged
        fake = revised(net, len(real), iteration, offset)
        both = model(torch.cat([real, fake]))
        optimiser.zero_grad()
        loss(*both.split(len(real))).backward()
        optimiser.step()
    if rank == 0:
        print(f"{world} processes, {iteration + 1} iterations")
        if o.out is not None:
            torch.save(net.state_dict(), o.out)


def main() -> None:
    o = options(__doc__ or "")
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    train(o)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
