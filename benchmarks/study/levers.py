"""One setting of a preset, trained and judged on validation tuples that share no digit with the training ones.

    python benchmarks/study/levers.py --preset polymnist-14 --set loss.contrastive=60 --out contrastive-60.json

The tuples are those of the splits "train" and "validation", which share no digit and no crop; the judges learn from
the first, by ``--judge-seed``. No test tuple is read. What lies in benchmarks/study/levers was measured before the
data sets had that split: the script divided the training instances in the same shares itself. After every stage from
the prior's on, x0 and, once there is an energy, x_k are measured: joint coherence, class shares, Frechet and kernel
distance and precision and recall on the judges' features, and the pixels' standard deviation over samples relative to
that over real tuples, by modality. ``--keep`` writes the state after the first stage, and ``--begin`` starts from
such a state, so that what comes after a warm-up can be varied.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmebm.data.base import MultimodalDataset
from mmebm.evaluation.classifiers import Classifiers, fit_classifiers
from mmebm.evaluation.evaluate import evaluate_samples
from mmebm.evaluation.metrics import precision_recall
from mmebm.training import Trainer, preset
from mmebm.training.config import override
from mmebm.training.run import load_data

CHUNK = 500


class Measure:
    """Numbers of a trained system on validation tuples."""

    def __init__(self, valid: MultimodalDataset, judges: Classifiers, n: int) -> None:
        self.valid, self.judges, self.n = valid, judges, min(n, len(valid))
        self.real = valid.batch(torch.arange(self.n))
        # each instance once: tuples repeat them, and a repeated one would have no distance to its neighbours
        pools = {m: pool[: self.n] for m, pool in valid.pools.items() if isinstance(pool, Tensor)}
        self.features = {m: judges.features({m: pool})[m] for m, pool in pools.items() if m in judges.learned}

    def joint(self, samples: dict[str, Tensor]) -> dict[str, Any]:
        """Joint samples."""
        found = evaluate_samples(samples, self.real, self.judges, len(self.valid.classes))
        keys = ("joint_coherence", "class_share_min", "class_share_max", "frechet")
        out: dict[str, Any] = {key: found[key] for key in keys}
        kernels = [k["value"] for k in found["kernel_by_modality"].values()]
        out["kernel"] = sum(kernels) / len(kernels)
        features = self.judges.features(samples)
        both = [precision_recall(features[m][: len(of)], of) for m, of in self.features.items()]
        out["precision"], out["recall"] = (sum(values) / len(both) for values in zip(*both, strict=True))
        out["spread"] = {m: (v.std(0).mean() / self.real[m].std(0).mean()).item() for m, v in samples.items()}
        return out

    def conditional(self, trainer: Trainer, mode: str, joints: tuple[str, ...], rows: int = 500) -> dict[str, Any]:
        """Accuracy of the missing modalities, given one or all but one; by the joint that z is inferred from."""
        system = trainer._sampling()
        names = [m.name for m in self.valid.modalities]
        x, labels = self.valid.batch(torch.arange(rows)), self.valid.labels[:rows]
        steps = {"decode": (0, 0), "latent": (None, 0), "data": (None, None)}[mode]
        out: dict[str, Any] = {}
        for joint in joints:
            system.inference.joint, before = joint, system.inference.joint  # type: ignore[assignment]
            for size in {1, len(names) - 1}:
                hits = []
                for i, name in enumerate(names):
                    given = {m: x[m] for m in names if (m == name) == (size == 1)}
                    done = system.complete(given, seed=i, latent_steps=steps[0], data_steps=steps[1])
                    pred = self.judges.predict(done)
                    targets = [j for j, m in enumerate(names) if m not in given]
                    hits.append((pred[:, targets] == labels[:, None]).float().mean().item())
                out[f"{joint} given {size}"] = sum(hits) / len(hits)
            system.inference.joint = before
        return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--judge-seed", type=int, default=0)
    parser.add_argument("--judges", type=Path, help="where the judges are kept between calls")
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--begin", type=Path)
    parser.add_argument("--skip", type=int, default=0, help="stages left out, which --begin has behind it")
    parser.add_argument("--conditional", default="", help="modes: decode,latent,data")
    parser.add_argument("--steps", default="", help="more lengths of the data chain, measured at the end: 5,20,60")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = override(preset(arguments.preset), dict(one.split("=", 1) for one in arguments.set))
    config = config.replace(seed=arguments.seed, threads=1, stages=config.stages[arguments.skip :])
    train, valid = load_data(config, "train"), load_data(config, "validation")
    if arguments.judges and arguments.judges.is_file():
        judges = Classifiers.load(arguments.judges)
    else:
        judges = fit_classifiers(train, valid, seed=arguments.judge_seed)
        if arguments.judges:
            judges.save(arguments.judges)
    measure = Measure(valid, judges, arguments.n)
    real = valid.batch(torch.arange(len(valid))[torch.randperm(len(valid), generator=torch.Generator().manual_seed(1))])
    trainer = Trainer(config, train)
    if arguments.begin:
        trainer.begin_with(torch.load(arguments.begin, weights_only=True))
    result: dict[str, Any] = {"config": json.loads(config.to_json()), "judges": dict(judges.accuracy), "points": {}}
    result["real"] = measure.joint({m: v[: measure.n] for m, v in train.batch(torch.arange(measure.n)).items()})
    result["real_coherence"] = evaluate_samples(real, measure.real, judges, 10)["joint_coherence"]
    print("real", result["real"], "valid", result["real_coherence"], flush=True)
    ends, at = {}, 0
    for i, stage in enumerate(config.stages):
        at += stage.iterations
        ends[at] = i
    seconds, started = 0.0, time.process_time()
    for row in trainer.run():
        if trainer.iteration not in ends or "rolled_back" in row:
            continue
        seconds += time.process_time() - started
        i = ends[trainer.iteration]
        stage = config.stages[i]
        print(
            f"stage {i} {stage.kind} {seconds:.0f} s", {k: round(v, 3) for k, v in row.items() if isinstance(v, float)}
        )
        if i == 0 and arguments.keep:
            torch.save(trainer.state_dict(), arguments.keep)
        points = {}
        with trainer._aside(config.seed) as s:
            chunks = [s.generate(CHUNK, seed=7, chain_offset=k) for k in range(0, measure.n, CHUNK)]
            x0 = {m: torch.cat([c[m] for c in chunks]) for m in chunks[0]}
            points["x0"] = measure.joint(x0)
            if trainer._learned("energy"):
                last = i == len(config.stages) - 1
                lengths = [
                    s.config.data_chain.steps,
                    *map(int, filter(None, arguments.steps.split(",") if last else [])),
                ]
                for steps in lengths:
                    xk = s.revise_data(x0, seed=8, steps=steps, chunk_size=CHUNK).state
                    points[f"x{steps}"] = measure.joint(xk)
            if i == len(config.stages) - 1 or i == 0:
                for mode in filter(None, arguments.conditional.split(",")):
                    if mode == "decode" or i:
                        points[mode] = measure.conditional(trainer, mode, ("mixture", "product"))
        result["points"][f"{i} {stage.kind}"] = {"seconds": seconds, **points}
        for name, found in points.items():
            print(f"  {name}", json.dumps(found, default=lambda v: round(v, 3)), flush=True)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        started = time.process_time()


if __name__ == "__main__":
    main()
