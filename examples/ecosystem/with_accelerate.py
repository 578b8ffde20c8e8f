"""Accelerate: accelerate launch --cpu --num_processes 2 examples/ecosystem/with_accelerate.py"""

from __future__ import annotations

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from model import data, energy, loss, options, revised
from torch.utils.data import DataLoader

import mmebm


def main() -> None:
    o = options(__doc__ or "")
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True))
    examples = data(o.batch * o.iterations)
    net = energy()
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
    loader = DataLoader(examples, o.batch)  # pyright: ignore[reportArgumentType]
    model, optimiser, loader = accelerator.prepare(net, optimiser, loader)
    # once, as every process waits for the others here
    offset = mmebm.rank_offset(o.batch // accelerator.num_processes)
    for iteration, real in enumerate(loader):
        # the network itself: what prepare returned is for the pass whose gradients are averaged
        fake = revised(accelerator.unwrap_model(model), len(real), iteration, offset)
        both = model(torch.cat([real, fake]))
        optimiser.zero_grad()
        accelerator.backward(loss(*both.split(len(real))))
        optimiser.step()
    if accelerator.is_main_process:
        print(f"{accelerator.num_processes} processes, {iteration + 1} iterations")
        if o.out is not None:
            torch.save(accelerator.unwrap_model(model).state_dict(), o.out)
    model, optimiser, loader = accelerator.free_memory(model, optimiser, loader)
    accelerator.end_training()


if __name__ == "__main__":
    main()
