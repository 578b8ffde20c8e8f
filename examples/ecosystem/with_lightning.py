"""Lightning: python examples/ecosystem/with_lightning.py --processes 2"""

from __future__ import annotations

from typing import Any

import lightning
import torch
import torch.distributed as dist
from model import data, energy, loss, options, revised
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

import mmebm


class EBM(lightning.LightningModule):
    def __init__(self, examples: Tensor, batch: int) -> None:
        super().__init__()
        self.examples, self.batch, self.energy, self.offset = examples, batch, energy(), 0

    def on_fit_start(self) -> None:
        # once, as every process waits for the others here
        self.offset = mmebm.rank_offset(self.batch)

    def training_step(self, real: Tensor, iteration: int) -> Tensor:
        fake = revised(self.energy, len(real), iteration, self.offset)
        return loss(self.energy(real), self.energy(fake))

    def validation_step(self, real: Tensor, iteration: int) -> None:
        # chains run in inference mode too
        self.log("gap", (self.energy(real) - self.energy(revised(self.energy, len(real), iteration, 0))).mean())

    def train_dataloader(self) -> Any:
        # Lightning's own sampler would shuffle, which one process alone does not
        share: Any = DistributedSampler(
            self.examples,
            self.trainer.world_size,
            self.trainer.global_rank,
            shuffle=False,  # pyright: ignore
        )
        return DataLoader(self.examples, self.batch, sampler=share)  # pyright: ignore[reportArgumentType]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main() -> None:
    o = options(__doc__ or "")
    share = o.batch // o.processes
    model = EBM(data(o.batch * o.iterations), share)
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=o.processes,
        strategy="ddp" if o.processes > 1 else "auto",
        max_epochs=1,
        num_sanity_val_steps=1,
        use_distributed_sampler=False,
        **quiet,
    )
    trainer.fit(model, val_dataloaders=DataLoader(data(64), 64))  # pyright: ignore[reportArgumentType]
    if trainer.is_global_zero:
        print(f"{trainer.world_size} processes, {trainer.global_step} iterations")
        if o.out is not None:
            torch.save(model.energy.state_dict(), o.out)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
