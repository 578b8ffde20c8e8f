"""What tests/training/test_parallel.py has two processes do; started by torchrun, with the folder to work in."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from mmebm.training import Callback, Config, Trainer, parallel
from mmebm.training.config import AdamConfig, ShuffledTuplesConfig
from mmebm.training.extensions import ShuffledTuples
from mmebm.training.optimise import Optimiser
from mmebm.training.run import Run, load_data

folder = Path(sys.argv[1])
torch.set_num_threads(1)
processes = parallel.start(torch.device("cpu"))
out: dict[str, object] = {}

torch.manual_seed(0)
net, x = torch.nn.Linear(5, 2), torch.randn(9, 5)
begin, end = processes.share(9)  # 4 and 5 rows
optimiser = Optimiser(net, AdamConfig(), processes=processes, weight=processes.weight(9))
gradients: list[torch.Tensor] = []
optimiser.adam.register_step_pre_hook(
    lambda *_: gradients.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
)
for _ in range(3):
    optimiser.step(net(x[begin:end]).square().mean())
out["gradient"] = gradients[0]
out["linear"] = net.state_dict()

config = Config.from_json((folder / "config.json").read_text())
trainer = Trainer(config, load_data(config, "train"), processes=processes)
rows = list(trainer.run())
out["system"], out["row"] = trainer.system.state_dict(), rows[-1]

run = Run(folder / "run")
out["samples"] = {point: dict(run.sample(31, point, seed=7)) for point in run.points}


class Stops(Callback):
    """The second process alone is told to stop, as a signal may reach one sooner than the other."""

    def on_iteration(self, trainer: Trainer) -> None:
        if processes.rank == 1 and trainer.iteration == 7:
            trainer.stop = 15


stopped = Trainer(config, load_data(config, "train"), processes=processes, callbacks=[Stops()])
rows = list(stopped.run())
out["stopped"] = [stopped.iteration, stopped.stop, rows[-1]["iteration"]]

# negatives: row i of 9 holds the number i in both modalities, and its latent is near those of its neighbours
begin, end = processes.share(9)
numbers = torch.arange(begin, end, dtype=torch.float32)[:, None]


class Means:
    """An inference network whose experts' mean is the number that a row holds."""

    def inference(self, x):
        return [torch.distributions.Normal(x["a"], 1.0)]


rng = torch.Generator().manual_seed(processes.rank)
term = ShuffledTuples(ShuffledTuplesConfig(kind="hard", same=0.2, near=0.3), processes, 9)
out["hard"] = [term.hard(Means(), {"a": numbers, "b": numbers}, rng) for _ in range(50)]
out["uniform"] = [term.uniform({"a": numbers, "b": numbers}, rng) for _ in range(50)]

parallel.finish()
out["threads"] = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
torch.save(out, folder / f"{processes.rank}.pt")
