"""Runs that nobody watches: signals, the first save, used folders, longer runs and runs that begin with another's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mmebm.cli.main import main
from mmebm.cli.train import configure, fit, prepare
from mmebm.data import load
from mmebm.files import FolderLock
from mmebm.training import Trainer, checkpoint
from mmebm.training.config import Stage, extended

CPU = torch.device("cpu")
BASE = [
    "model.generator_width=16",
    "model.inference_width=16",
    "model.energy_width=16",
    "data.options.n=200",
    "data_chain.steps=2",
    "latent_prior=null",
    "guard.every=5",
]


def stages(*of: tuple[str, int]) -> str:
    return "stages=" + json.dumps([{"kind": kind, "iterations": n, "lr": 1.0, "final_lr": 0.5} for kind, n in of])


def begin(tmp_path: Path) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "mmebm",
        "train",
        "--runs",
        str(tmp_path),
        "--name",
        "r",
        "--device",
        "cpu",
        "--threads",
        "1",
        "--set",
        stages(("warmup", 1_000_000)),
    ]
    for change in BASE:
        command += ["--set", change]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ})


def wait_for(process: subprocess.Popen[str], there: Any) -> None:
    deadline = time.monotonic() + 120
    while not there():
        assert process.poll() is None and time.monotonic() < deadline, process.stdout and process.stdout.read()
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="a system without SIGUSR1")
def test_sigterm_saves_and_stops_and_sigusr1_saves_and_goes_on(tmp_path: Path) -> None:
    process, path = begin(tmp_path), tmp_path / "r" / "checkpoint.pt"
    wait_for(process, path.is_file)  # before the first iteration, so that it may come at any moment
    log = tmp_path / "r" / "log.jsonl"
    wait_for(process, lambda: log.is_file() and log.read_text().count("\n") > 3)
    assert checkpoint.load(path)["iteration"] == 0  # the next one by itself is due after half a minute
    process.send_signal(signal.SIGUSR1)
    wait_for(process, lambda: checkpoint.load(path)["iteration"] > 0)
    saved = checkpoint.load(path)["iteration"]
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143, out
    assert "go on with: mmebm train --resume" in out
    assert checkpoint.load(path)["iteration"] > saved


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
def test_children_do_not_inherit_the_right_to_a_folder(tmp_path: Path) -> None:
    """Such as the processes that read data, which outlive a killed run for a while."""
    code = (
        "import os, sys, time; from pathlib import Path; from mmebm.files import FolderLock\n"
        "lock = FolderLock(Path(sys.argv[1])); child = os.fork()\n"
        "if child == 0: time.sleep(60); os._exit(0)\n"
        "Path(sys.argv[2]).write_text(str(child)); os._exit(0)"
    )
    folder, told = tmp_path / "run", tmp_path / "child"
    subprocess.run([sys.executable, "-c", code, str(folder), str(told)], timeout=60, check=True)
    child = int(told.read_text())
    try:
        os.kill(child, 0)  # it lives
        FolderLock(folder).release()
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_folder_that_holds_something_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "log.jsonl").write_text('{"iteration": 5}\n')
    assert main(["train", "--runs", str(tmp_path), "--name", "r", "--device", "cpu"]) == 1
    assert "is not empty, it has log.jsonl: give another --name" in capsys.readouterr().err
    assert (tmp_path / "r" / "log.jsonl").read_text() == '{"iteration": 5}\n'


def test_an_extended_run_is_the_run_that_was_longer(tmp_path: Path) -> None:
    short = configure("demo", changes=[*BASE, stages(("warmup", 10), ("joint", 10))])
    assert fit(prepare(tmp_path / "r", CPU, short, threads=1), tmp_path / "r", quiet=True)
    trainer = prepare(tmp_path / "r", CPU, None, threads=1, extend=5)
    assert (trainer.iteration, trainer.total) == (20, 25)
    assert fit(trainer, tmp_path / "r", quiet=True)
    whole = prepare(tmp_path / "whole", CPU, extended(short, 5), threads=1)
    assert fit(whole, tmp_path / "whole", quiet=True)
    for name, value in whole.system.state_dict().items():
        assert torch.equal(value, trainer.system.state_dict()[name]), name
    rows = [json.loads(line) for line in (tmp_path / "r" / "log.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [5, 10, 15, 20, 25]
    # stored: it goes on from there without being told again
    assert checkpoint.load(tmp_path / "r" / "checkpoint.pt")["iteration"] == 25
    assert prepare(tmp_path / "r", CPU, None, threads=1).total == 25


def test_what_an_extension_is() -> None:
    config = configure("demo", changes=[stages(("warmup", 10), ("joint", 0))])
    assert extended(config, 7).stages[-1] == Stage("warmup", 7, lr=0.5, final_lr=0.5)
    ramped = config.replace(stages=(Stage("joint", 5, ramp={"loss.elbo": (1.0, 0.25)}),))
    assert extended(ramped, 3).stages[-1].ramp == {"loss.elbo": (0.25, 0.25)}
    assert extended(config, 0) == config


def test_a_run_that_begins_with_anothers_networks(tmp_path: Path) -> None:
    first = configure("demo", changes=[*BASE, "ema=0.5", stages(("warmup", 10))])
    trainer = prepare(tmp_path / "a", CPU, first, threads=1)
    assert fit(trainer, tmp_path / "a", quiet=True)
    assert trainer.averaged is not None
    second = configure("demo", changes=[*BASE, "seed=9", stages(("joint", 5))])
    other = prepare(tmp_path / "b", CPU, second, threads=1, init_from=tmp_path / "a")
    assert other.iteration == 0
    for name, value in other.system.state_dict().items():
        assert torch.equal(value, trainer.averaged.module.state_dict()[name]), name
    assert fit(other, tmp_path / "b", quiet=True)
    wider = configure("demo", changes=[*BASE, "model.energy_width=17", stages(("joint", 5))])
    with pytest.raises(ValueError, match=r"--init-from .*its networks are others: energy\..* is \(16.*there and \(17"):
        prepare(tmp_path / "c", CPU, wider, threads=1, init_from=tmp_path / "a")
    # a prior is taken where both have one
    prior = configure("demo", changes=[*BASE[:5], "guard.every=5", stages(("prior", 5))])
    assert fit(prepare(tmp_path / "d", CPU, prior, threads=1, init_from=tmp_path / "a"), tmp_path / "d", quiet=True)


def test_options_that_do_not_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {
        "--extend 5": "--extend goes with --resume",
        "--callback builtins:dict": "--callback builtins:dict must give a mmebm.training.Callback, got dict",
        "--callback no": "'no' is none of mmebm.callbacks",
        "--logger no": "come with it are jsonl, tensorboard, wandb",
        "--set checkpoint.best=bound": "goes by the validation, and validation.every is 0",
        "--resume x --init-from y": "leave out --init-from",
        "--resume x --extend 0": "--extend must be at least 1, got 0",
        "--init-from nowhere --set data.options.n=100": "no checkpoint at nowhere",
    }
    for words, message in wrong.items():
        assert main(["train", "--runs", str(tmp_path), "--device", "cpu", *words.split()]) == 1
        assert message in capsys.readouterr().err


def test_a_trainer_stops_where_it_is_told() -> None:
    plain = configure("demo", changes=[*BASE, stages(("warmup", 50))])
    trainer = Trainer(plain, load("digits", "train", size=14, n=200))
    for _ in trainer.run():
        trainer.stop = 15
    assert trainer.iteration == 5 and trainer.stop == 15
