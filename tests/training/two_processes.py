"""What tests/training/test_parallel.py has two processes do; started by torchrun, with the folder to work in."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from mmebm.training import Config, Trainer, parallel
from mmebm.training.config import AdamConfig
from mmebm.training.optimise import Optimiser
from mmebm.training.run import Run, load_data

folder = Path(sys.argv[1])
torch.set_num_threads(1)
processes = parallel.start(torch.device("cpu"))
out: dict[str, object] = {}

torch.manual_seed(0)
net, x = torch.nn.Linear(5, 2), torch.randn(10, 5)
begin, end = processes.share(10)
optimiser = Optimiser(net, AdamConfig(), processes=processes)
for _ in range(3):
    optimiser.step(net(x[begin:end]).square().mean())
out["linear"] = net.state_dict()

config = Config.from_json((folder / "config.json").read_text())
trainer = Trainer(config, load_data(config, "train"), processes=processes)
rows = list(trainer.run())
out["system"], out["row"] = trainer.system.state_dict(), rows[-1]

run = Run(folder / "run")
out["samples"] = {point: dict(run.sample(31, point, seed=7)) for point in run.points}

torch.save(out, folder / f"{processes.rank}.pt")
parallel.finish()
