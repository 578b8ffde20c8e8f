"""What an iteration of the presets of published sets takes: on this machine measured, on a GPU estimated by operations.

    python benchmarks/study/published/measure.py polymnist cub-128 [--batch 8] [--precision fp32] [--json FILE]
    python benchmarks/study/published/measure.py polymnist cub --costs       # for mmebm/training/variants.py

Each set is written in its published layout, random images of the published sizes, and trained from there as `mmebm
train --preset NAME --data-path FOLDER` does: two iterations of each kind of stage, of which the second counts. Nothing
is learned: these are times and memory. Operations are those of a joint iteration in which all learn, as
torch.utils.flop_counter counts them: convolutions and matrices, backward passes and chains included, and a measurement
of the latent step.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mmebm.data import MultimodalDataset, load
from mmebm.data.text_codec import fit_text_autoencoder
from mmebm.training import Config, Trainer, preset
from mmebm.training.config import LatentPriorConfig, Stage
from mmebm.training.variants import GRIDS, variant

# What one GPU of 80 GB is taken to do: its makers' dense bf16 peak, and the share of it that such networks may reach.
PEAK, SHARE = 312e12, 0.3


def _image(file: Path, draw: np.random.Generator, width: int, height: int) -> None:
    from PIL import Image

    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file)


def write_polymnist(root: Path, n: int, draw: np.random.Generator) -> None:
    for split in ("train", "test"):
        for m in range(5):
            for i in range(n):
                _image(root / "MMNIST" / split / f"m{m}" / f"{i}.{i % 10}.png", draw, 28, 28)


def write_fashion(root: Path, n: int, draw: np.random.Generator) -> None:
    for stem in ("train", "t10k"):
        images, labels = draw.integers(0, 256, (n, 28, 28), dtype=np.uint8), (np.arange(n) % 10).astype(np.uint8)
        header = struct.pack(">BBBBIII", 0, 0, 8, 3, *images.shape)
        (root / f"{stem}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (root / f"{stem}-labels-idx1-ubyte").write_bytes(struct.pack(">BBBBI", 0, 0, 8, 1, n) + labels.tobytes())


def write_mnist_svhn(root: Path, n: int, draw: np.random.Generator) -> None:
    from scipy.io import savemat

    write_fashion(root, n, draw)
    for split in ("train", "test"):
        x = draw.integers(0, 256, (32, 32, 3, n), dtype=np.uint8)
        savemat(root / f"{split}_32x32.mat", {"X": x, "y": (np.arange(n) % 10 + 1)[:, None].astype(np.uint8)})


def _sentence(draw: random.Random) -> str:
    return f"a {draw.choice(('red', 'blue', 'small'))} bird with a {draw.choice(('long', 'black'))} beak."


def write_cub(root: Path, n: int, draw: np.random.Generator) -> None:
    words = random.Random(int(draw.integers(2**31)))
    for split, text in (("train", "trainval"), ("test", "test")):
        for i in range(n):
            _image(root / "cub" / split / f"{1 + i % 2:03}.Bird" / f"b{i:03}.jpg", draw, 500, 375)
        lines = "".join(_sentence(words) + "\n" for _ in range(10 * n))
        (root / "cub" / f"text_{text}classes.txt").write_text(lines)


def write_coco(root: Path, n: int, draw: np.random.Generator) -> None:
    words = random.Random(int(draw.integers(2**31)))
    (root / "annotations").mkdir(exist_ok=True)
    for part in ("train", "val"):
        for k in range(1, n + 1):
            _image(root / f"{part}2017" / f"{k:012}.jpg", draw, 640, 480)
        images = [{"id": k, "file_name": f"{k:012}.jpg"} for k in range(1, n + 1)]
        pairs = [
            {"image_id": k, "id": 10 * k + j, "caption": _sentence(words)} for k in range(1, n + 1) for j in range(5)
        ]
        content = {"info": {}, "images": images, "annotations": pairs}
        (root / "annotations" / f"captions_{part}2017.json").write_text(json.dumps(content))


WRITERS: dict[str, Callable[[Path, int, np.random.Generator], None]] = {
    "polymnist": write_polymnist,
    "polyfashion": write_fashion,
    "mnist-svhn-text": write_mnist_svhn,
    "cub": write_cub,
    "cub-128": write_cub,
    "coco": write_coco,
    "coco-128": write_coco,
}


def prepared(name: str, root: Path, n: int = 20, seed: int = 0) -> Config:
    """The set of the preset ``name``, ``n`` images a split, below ``root``, and the preset that reads it from there."""
    WRITERS[name](root, n, np.random.default_rng(seed))
    config = preset(name)
    options = config.data.options
    if name.startswith(("cub", "coco")):  # the own one is fitted for hours, and costs an iteration nothing
        texts = [_sentence(random.Random(i)) for i in range(50)]
        fit_text_autoencoder(texts, dim=128, hidden=16, rounds=1, round=5).save(root / "codec.pt")
        options = {**options, "codec": str(root / "codec.pt")}
    return config.replace(data=dataclasses.replace(config.data, path=str(root), options=options))


class _Operations(TorchDispatchMode):
    """torch's FlopCounterMode without its hooks on modules, which double backward passes refuse."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def operations(trainer: Trainer) -> float:
    """Multiplications and additions of one joint iteration in which all learn, a tuple."""
    config = trainer.config.replace(backend="torch", batch=2, precision="fp32", stages=(Stage("joint", 1),))
    plain = Trainer(config, trainer.data)
    with _Operations() as counted:
        list(plain.run())
    return counted.total / config.batch


def saved_bytes(trainer: Trainer) -> float:
    """What a warm-up iteration keeps for its backward pass, a tuple, without the weights."""
    trainer = Trainer(trainer.config.replace(stages=(Stage("warmup", 1),)), trainer.data)
    weights = {p.untyped_storage().data_ptr() for p in trainer.system.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    batch = trainer.batch()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        trainer.warmup_step(batch, torch.Generator().manual_seed(0))
    return sum(size for at, size in kept.items() if at not in weights) / batch.size


def costs(config: Config, data: MultimodalDataset, repeats: int = 5) -> dict[str, float]:
    """What the parts of a joint iteration take, in iterations of the warm-up: an entry of
    mmebm.training.variants.COSTS. The best of some repeats of each; on the CPU."""

    def seconds(work: Callable[[], Any]) -> float:
        found = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            work()
            found.append(time.perf_counter() - start)
        return min(found[1:])  # the first one also warms up

    plain = config.replace(loss=dataclasses.replace(config.loss, elbo=0.0), stages=(Stage("joint", 1),))
    rng = torch.Generator().manual_seed(0)
    t = Trainer(plain, data)
    batch = t.batch()
    z_0 = t.system.prior.draw(batch.size, seed=0, device=t.device)
    x_0 = t.system.decode(z_0)
    x_k, z_k = t._data_chain(batch, x_0, 1, {}), t._latent_chain(batch, rng, 2, {})
    teacher = t.prior_teacher
    parts: dict[str, Callable[[], Any]] = {
        "posterior": lambda: t._teach_vae(batch, z_k, None, None, rng, {}),
        "revised": lambda: t._teach_vae(batch, None, x_k, z_0, rng, {}),
        "latent": lambda: t._latent_chain(batch, rng, 2, {}),
        "prior": lambda: teacher and teacher.update(z_k, lambda: t._prior(batch, 3), rng, t.lr),
        "data": lambda: t._data_chain(batch, x_0, 1, {}),
        "energy": lambda: t._teach_energy(batch.x, x_0, x_k, rng, {}),
    }
    unit = seconds(lambda: t.warmup_step(batch, rng))
    found = {name: seconds(work) / unit for name, work in parts.items()}
    fitted = dataclasses.replace(config.latent_prior or LatentPriorConfig(), kind="mixture", posterior="product")
    mixed = Trainer(config.replace(latent_prior=fitted, stages=(Stage("prior", 1),)), data)
    found["fit"] = seconds(lambda: mixed.prior_step(batch, rng)) / unit
    for name in GRIDS["baselines"]:
        other = Trainer(variant(config, name).replace(stages=(Stage("warmup", 1),)), data)
        found[name] = seconds(lambda other=other: other.warmup_step(other.batch(), rng)) / unit
    return {name: round(value, 2) for name, value in found.items()}


def measure(name: str, batch: int, precision: str) -> dict[str, Any]:
    """One preset in this process."""
    with tempfile.TemporaryDirectory() as folder:
        config = prepared(name, Path(folder))
        published = config.batch
        kinds = {stage.kind: dataclasses.replace(stage, iterations=2) for stage in config.stages[::-1]}
        stages = tuple(kinds[kind] for kind in ("warmup", "prior", "joint"))
        config = config.replace(
            batch=batch,
            stages=stages,
            guard=dataclasses.replace(config.guard, every=1),
            precision=precision,
            channels_last=False,
        )
        trainer = Trainer(config, load(config.data.name, "train", path=folder, **config.data.options))
        rows = list(trainer.run())[1::2]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        count = operations(trainer)
        return {
            "preset": name,
            "batch": batch,
            "precision": precision,
            "parameters": {
                part: sum(p.numel() for p in getattr(trainer.system, part).parameters())
                for part in ("generator", "inference", "energy", "prior")
            },
            "seconds": {row["stage"]: round(row["seconds_per_iteration"], 3) for row in rows},
            "peak_memory_mib": round(peak),
            "saved_mib_per_tuple": round(saved_bytes(trainer) / 2**20, 2),
            "gflop_per_tuple": round(count / 1e9, 1),
            "gpu_estimate_seconds": round(count * published / (PEAK * SHARE), 3),
            "gpu_estimate_batch": published,
            "chains": trainer.chain_reports(),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="+", choices=sorted(WRITERS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--costs", action="store_true", help="the presets' entries of COSTS, and nothing else")
    a = parser.parse_args()
    torch.set_num_threads(1)
    if a.costs:
        for name in a.presets:
            with tempfile.TemporaryDirectory() as folder:
                config = prepared(name, Path(folder)).replace(batch=a.batch, precision=a.precision, channels_last=False)
                data = load(config.data.name, "train", path=folder, **config.data.options)
                print(json.dumps({name: costs(config, data)}))
        return
    if len(a.presets) == 1:
        results = [measure(a.presets[0], a.batch, a.precision)]
    else:  # a process each: the peak of memory is a process's
        lines = [
            subprocess.run(
                [sys.executable, __file__, name, "--batch", str(a.batch), "--precision", a.precision],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            for name in a.presets
        ]
        results = [json.loads(line)["results"][0] for line in lines]
    found = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "load_before": os.getloadavg()[0],
        "results": results,
    }
    print(json.dumps(found, indent=2))
    if a.json is not None:
        a.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
