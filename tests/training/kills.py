"""Training that is killed with SIGKILL at random moments and resumed, against the same training left alone.

    python tests/training/kills.py --kills 50

Each process is a fork of this one, so that a kill costs no start of Python. It does what ``mmebm train`` does (the
folder's lock, the configuration, log and checkpoint, and ``--resume``) on a small set that is read from disk, with all
that training can write: two optimisers' states and more, persistent chains of both kinds, a moving average, a latent
prior, snapshots, a validation, kept and best checkpoints. It saves after every logged row, so that many kills fall into
the writing of a checkpoint.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmebm.cli import train
from mmebm.training import checkpoint
from mmebm.training.config import (
    ChainConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    GuardConfig,
    LatentPriorConfig,
    LossConfig,
    ModelConfig,
    ShuffledTuplesConfig,
    Stage,
    StartConfig,
    ValidationConfig,
)
from mmebm.training.fitting import CHECKPOINTS
from mmebm.training.run import CHECKPOINT, read_log

UNEQUAL = ("seconds_per_iteration", "peak_memory_mib")  # what no two runs have in common


def write_data(folder: Path) -> None:
    """A folder of arrays: grey images and vectors of two classes."""
    draw = np.random.default_rng(0)
    for split, n in (("train", 48), ("test", 16)):
        (folder / split).mkdir(parents=True)
        labels = np.arange(n) % 2
        grey = np.clip(labels[:, None, None, None] * 0.6 + 0.4 * draw.random((n, 1, 6, 6)), 0, 1)
        np.save(folder / split / "grey.npy", grey.astype(np.float32))
        np.save(folder / split / "vector.npy", draw.normal(size=(n, 4)).astype(np.float32) / 4)
        np.save(folder / split / "labels.npy", labels)


def configuration(data: Path) -> Config:
    """A run of a second or two that writes everything there is to write."""
    return Config(
        preset="kills",
        data=DataConfig("folder", path=str(data)),
        batch=8,
        ema=0.9,
        seed=7,
        model=ModelConfig(latent=3, generator_width=16, inference_width=16, energy_width=16),
        data_chain=ChainConfig(steps=3, travel=0.5, noise=0.005, clamp=True),
        latent_chain=ChainConfig(steps=2, step="auto", auto_every=4),
        loss=LossConfig(elbo=1.0, energy_l2=0.01),
        stages=(Stage("warmup", 12), Stage("prior", 6), Stage("joint", 12)),
        latent_prior=LatentPriorConfig(width=8, chain=ChainConfig(steps=3, step=0.2)),
        shuffled_tuples=ShuffledTuplesConfig(),
        start=StartConfig(data="buffer", latent="persistent", buffer=32),
        guard=GuardConfig(every=3),
        validation=ValidationConfig(every=5, share=0.5),
        checkpoint=CheckpointConfig(seconds=0.0, every=7, keep=2, best="kernel"),
    )


def begin(folder: Path, config: Config | None) -> int:
    """Trains in ``folder`` in another process: a new run, or with ``config=None`` one that goes on. Its number."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        output = os.open(folder.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        # a kill never damages a checkpoint: nothing is written in place
        warnings.filterwarnings("error", message=".*Going on from")
        claim = train._resumed(folder) if config is None else train._folder(folder.parent, folder.name, "")
        with claim:
            trainer = train.prepare(folder, torch.device("cpu"), config, threads=1)
            status = 0 if train.fit(trainer, folder) else 2
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
    finally:
        sys.stdout.flush()
        os._exit(status)


def finish(pid: int, folder: Path) -> None:
    """Waits for a process that must end well."""
    status = os.waitpid(pid, 0)[1]
    if status:
        raise AssertionError(f"training ended with status {status}: {folder.with_suffix('.out').read_text()[-2000:]}")


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts and lists, with their names."""
    if isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors(part, f"{name}.{key}")
    else:
        yield name, value


def files(folder: Path) -> list[str]:
    """What is in a run's folder and below."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def difference(a: Path, b: Path) -> str | None:
    """Where the checkpoints or the logs of two runs differ, or None. Tensors are compared by their bytes."""
    for kept in sorted((a / CHECKPOINTS).glob("*")) if (a / CHECKPOINTS).is_dir() else []:
        wrong = difference(kept, b / CHECKPOINTS / kept.name)
        if wrong is not None:
            return f"{kept.name}: {wrong}"
    first, second = (dict(tensors(checkpoint.load(folder / CHECKPOINT))) for folder in (a, b))
    if first.keys() != second.keys():
        return f"other entries: {sorted(first.keys() ^ second.keys())[:5]}"
    for name, value in first.items():
        other = second[name]
        if isinstance(value, Tensor):
            same = value.shape == other.shape and value.dtype == other.dtype
            same = same and value.numpy().tobytes() == other.numpy().tobytes()
        else:
            same = value == other
        if not same:
            return f"{name} differs"
    rows = [[{k: v for k, v in row.items() if k not in UNEQUAL} for row in read_log(folder)] for folder in (a, b)]
    return None if rows[0] == rows[1] else "the logs differ"


def kill_and_resume(out: Path, kills: int, draw: random.Random) -> dict[str, int]:
    """Kills trainings until ``kills`` processes died in their work; every run must end as the one left alone did.

    Returns:
        How many processes were killed, in how many runs, and how many while they wrote a file.

    Raises:
        AssertionError: where a run ends otherwise, or leaves files behind.
    """
    import torch._dynamo

    torch.set_num_threads(1)
    write_data(out / "data")
    config = configuration(out / "data")
    whole = out / "whole"
    started = time.perf_counter()
    finish(begin(whole, config), whole)
    seconds = time.perf_counter() - started
    expected = files(whole)
    counts = {"killed": 0, "runs": 0, "writing": 0}
    while counts["killed"] < kills:
        counts["runs"] += 1
        folder = out / f"run-{counts['runs']}"
        ended = False
        while not ended:
            # killed before the first save: the same name begins anew
            pid = begin(folder, None if (folder / CHECKPOINT).exists() else config)
            ended = counts["killed"] == kills or not _kill(pid, folder, seconds, draw, counts)
            if ended:
                finish(pid, folder)
        wrong = difference(whole, folder)
        assert wrong is None, f"after {counts['killed']} kills, in run {counts['runs']}: {wrong}"
        left = files(folder)
        assert left == expected, f"files in {folder} are {left}, not {expected}"
    return counts


def _kill(pid: int, folder: Path, seconds: float, draw: random.Random, counts: dict[str, int]) -> bool:
    """Kills a process at a random moment, every other time at the next one at which it writes a file; whether it was
    not at its end before."""
    until, writing = time.perf_counter() + draw.uniform(0, seconds), draw.random() < 0.5
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.perf_counter() > until and not (writing and not any(folder.glob(".*.tmp"))):
            os.kill(pid, signal.SIGKILL)
            end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            if end is None or end.si_code != os.CLD_KILLED:  # it came to its end first
                return False
            os.waitpid(pid, 0)
            counts["killed"] += 1
            counts["writing"] += any(folder.glob(".*.tmp"))
            return True
        time.sleep(1e-4)
    return False


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Kill and resume trainings, and compare with one left alone.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=None, help="of the moments (default: drawn and printed)")
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(2**31) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as out:
        started = time.perf_counter()
        counts = kill_and_resume(Path(out), arguments.kills, random.Random(seed))
        seconds = time.perf_counter() - started
    print(
        f"{counts['killed']} processes killed in {counts['runs']} runs, {counts['writing']} of them in a write, in "
        f"{seconds:.0f} s: every run ended bit for bit as the one left alone"
    )


if __name__ == "__main__":
    main()
