"""Two processes that train one model and draw its samples, over Gloo on the CPU (two_processes.py)."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mmebm.training import Config, Trainer, checkpoint, preset
from mmebm.training.config import AdamConfig, Stage, override
from mmebm.training.optimise import Optimiser
from mmebm.training.parallel import Processes
from mmebm.training.run import CHECKPOINT, Run, load_data

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process in ``run``, and what two processes made, in ``0.pt`` and ``1.pt``."""
    out = tmp_path_factory.mktemp("two")
    changes = {"data_chain.steps": "4", "data.options": '{"size": 14, "n": 500}', "batch": "16"}
    config = override(preset("demo"), changes)
    config = config.replace(stages=(Stage("warmup", 20), Stage("prior", 2), Stage("joint", 2)))
    trainer = Trainer(config, load_data(config, "train"))
    list(trainer.run())
    checkpoint.save(out / "run" / CHECKPOINT, trainer.state_dict())
    (out / "config.json").write_text(config.to_json())
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--standalone",
            str(Path(__file__).with_name("two_processes.py")),
            str(out),
        ],
        check=True,
        timeout=300,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    return out


@pytest.fixture(scope="module")
def both(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_shares_cover_all_rows_once() -> None:
    for world, n in ((1, 5), (3, 10), (4, 3)):
        shares = [Processes(rank, world).share(n) for rank in range(world)]
        assert [i for a, b in shares for i in range(a, b)] == list(range(n))


def test_gradients_of_all_processes_are_averaged(both: list[dict[str, Any]]) -> None:
    """Nine rows, four here and five there: each row counts the same."""
    torch.manual_seed(0)
    net, x = torch.nn.Linear(5, 2), torch.randn(9, 5)
    optimiser = Optimiser(net, AdamConfig())
    whole = torch.autograd.grad(net(x).square().mean(), list(net.parameters()))
    for _ in range(3):
        optimiser.step(net(x).square().mean())
    for one in both:
        # Adam's update has the gradient's sign and hardly its size: look at the gradient itself
        torch.testing.assert_close(one["gradient"], torch.cat([g.flatten() for g in whole]))
        for name, value in one["linear"].items():
            # another order of sums, through Adam's division by small second moments
            torch.testing.assert_close(value, net.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_networks_stay_equal(folder: Path, both: list[dict[str, Any]]) -> None:
    """Both processes hold the same networks at the end, trained on rows of their own, and log the same numbers."""
    a, b = both
    assert all(torch.equal(a["system"][name], b["system"][name]) for name in a["system"])
    assert all(torch.isfinite(value).all() for value in a["system"].values())
    for one in both:
        one["row"].pop("seconds_per_iteration", None)
    assert a["row"] == b["row"]
    config = Config.from_json((folder / "config.json").read_text())
    alone = Trainer(config, load_data(config, "train")).system.state_dict()
    assert {name.split(".")[0] for name in alone if not torch.equal(alone[name], a["system"][name])} == {
        "energy",
        "generator",
        "inference",
        "prior",
        "latent_step",
    }


def test_samples_do_not_depend_on_the_number_of_processes(folder: Path, both: list[dict[str, Any]]) -> None:
    run = Run(folder / "run")
    for one in both:
        assert set(one["samples"]) == set(run.points) == {"vae", "x0", "xk"}
        for point, x in one["samples"].items():
            for name, value in run.sample(31, point, seed=7).items():
                # matrix products over another number of rows: rounding, carried through 60 + 4 steps
                torch.testing.assert_close(x[name], value, rtol=1e-4, atol=1e-5)


def test_all_stop_after_the_same_iteration(both: list[dict[str, Any]]) -> None:
    assert both[0]["stopped"] == both[1]["stopped"] == [7, 15, 7]


def test_no_thread_of_the_group_stays(both: list[dict[str, Any]]) -> None:
    """One of Gloo's that is busy as Python ends aborts the process."""
    for one in both:
        assert not [name for name in one["threads"] if "gloo" in name]


def test_negatives_come_from_all_processes(both: list[dict[str, Any]]) -> None:
    """The third to fifth nearest of all nine rows, which are the own one and its neighbours by number."""
    seen = set()
    for rank, one in enumerate(both):
        begin, end = Processes(rank, 2).share(9)
        for drawn in one["hard"]:
            for at, own in enumerate(range(begin, end)):
                values = {float(drawn[name][at]) for name in ("a", "b")}
                (other,) = values - {float(own)}  # one of the two has changed, and the other has not
                order = sorted(range(9), key=lambda k: abs(k - own))
                far = [abs(order[k] - own) for k in (2, 4)]
                assert far[0] <= abs(other - own) <= far[1], (own, other)
                seen.add((rank, int(other)))
        parts = torch.stack([torch.stack([drawn["a"], drawn["b"]]) for drawn in one["uniform"]])
        assert set(parts.flatten().tolist()) == set(range(9))
        assert all(len(set(part.flatten().tolist())) == end - begin for pair in parts for part in pair)
    assert {(0, 4), (0, 5), (1, 2), (1, 3)} <= seen


def test_shares_that_differ_are_weighted() -> None:
    for world, n in ((2, 9), (3, 10), (4, 8)):
        parts = [Processes(rank, world) for rank in range(world)]
        sizes = [b - a for a, b in (p.share(n) for p in parts)]
        assert [p.weight(n) / world for p in parts] == pytest.approx([size / n for size in sizes])
    assert Processes().weight(5) == 1.0


def test_too_small_a_batch_is_named() -> None:
    config = dataclasses.replace(preset("paper"), batch=16, accumulate=16)
    with pytest.raises(ValueError, match="batch=16 in 16 parts has no row for each of 2 processes"):
        Trainer(config, load_data(config, "train"), processes=Processes(0, 2))
