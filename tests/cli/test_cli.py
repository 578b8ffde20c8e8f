"""The command line on the real digits, with a training of seconds: files, formats, resuming, Ctrl-C, errors."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mmebm.cli.main import main
from mmebm.cli.train import configure, fit, prepare
from mmebm.files import FolderLock
from mmebm.training import checkpoint
from mmebm.training.run import Run

STAGES = json.dumps([{"kind": kind, "iterations": n} for kind, n in (("warmup", 40), ("prior", 4), ("joint", 4))])
QUICK = [
    "--set",
    f"stages={STAGES}",
    "--set",
    "data_chain.steps=4",
    "--set",
    "guard.every=4",
    "--threads",
    "1",
    "--device",
    "cpu",
]
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run through the whole of ``mmebm train``."""
    runs = tmp_path_factory.mktemp("runs")
    assert main(["train", "--runs", str(runs), "--name", "quick", *QUICK]) == 0
    return runs / "quick"


def test_train_leaves_everything(run: Path) -> None:
    expected = {
        "config.json",
        "checkpoint.pt",
        "log.jsonl",
        "samples.png",
        "trajectory.png",
        "curves.png",
        "metrics.json",
        "classifiers.pt",
    }
    assert expected <= {p.name for p in run.iterdir()}
    config = json.loads((run / "config.json").read_text())
    assert config["config"]["preset"] == "demo" and config["versions"]["torch"] and "commit" in config
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["warmup"] * 10 + ["prior"] + ["joint"]
    assert {"gap", "loss_energy", "loss_generator", "loss_inference", "seconds_per_iteration"} <= set(rows[-1])


def test_a_run_samples_with_its_moving_average(tmp_path: Path) -> None:
    stages = json.dumps([{"kind": "warmup", "iterations": 4}, {"kind": "joint", "iterations": 2}])
    config = configure("demo", changes=["ema=0.5", f"stages={stages}", "data.options.n=200", "data_chain.steps=2"])
    trainer = prepare(tmp_path / "run", torch.device("cpu"), config, threads=1)
    assert fit(trainer, tmp_path / "run")
    assert trainer.averaged is not None
    average, weights = trainer.averaged.module.state_dict(), trainer.system.state_dict()
    held = Run(tmp_path / "run").system.state_dict()
    assert held.keys() == average.keys() and all(torch.equal(value, average[name]) for name, value in held.items())
    moved = {name.split(".")[0] for name, value in held.items() if not torch.equal(value, weights[name])}
    assert {"generator", "inference", "energy"} <= moved


def test_a_run_samples_with_its_own_length_of_the_data_chain(tmp_path: Path) -> None:
    stages = json.dumps([{"kind": "warmup", "iterations": 2}, {"kind": "joint", "iterations": 2}])
    lengths = ["data_chain.steps=2", "data_chain.sample_steps=5", "latent_chain.steps=2", "latent_chain.sample_steps=3"]
    changes = [f"stages={stages}", "data.options.n=200", "latent_prior.chain.steps=3", *lengths]
    trainer = prepare(tmp_path / "run", torch.device("cpu"), configure("demo", changes=changes), threads=1)
    assert fit(trainer, tmp_path / "run")
    run, s = Run(tmp_path / "run"), trainer.system
    assert s.config.data_chain.steps == 2 and run.config.data_chain.steps == 2
    settings = run.settings()
    assert settings["data_steps"] == 5 and settings["latent_steps"] == 3
    # more steps, of the size that was trained
    assert settings["data_step"] == s.config.data_chain.size()
    x0 = run.sample(5, "x0", seed=4)
    for steps, expected in ((None, 5), (2, 2)):
        xk, out = run.sample(5, "xk", seed=4, steps=steps), s.revise_data(x0, seed=5, steps=expected).state
        assert all(torch.equal(xk[name], value) for name, value in out.items())
    given = {"word": run.real(4)["word"]}
    completed = run.completions()["C: B + data chain"](given, 1)
    out = s.complete(given, seed=1, latent_steps=3, data_steps=5)
    assert all(torch.equal(completed[name], value) for name, value in out.items())
    with pytest.raises(ValueError, match="sample_steps must be at least 0, or None, got -1"):
        configure("demo", changes=["data_chain.sample_steps=-1"])


def test_a_run_samples_with_its_own_length_of_the_prior_chain(tmp_path: Path) -> None:
    stages = json.dumps([{"kind": "warmup", "iterations": 2}, {"kind": "prior", "iterations": 2}])
    lengths = ["latent_prior.chain.steps=3", "latent_prior.chain.sample_steps=7"]
    changes = [f"stages={stages}", "data.options.n=200", *lengths]
    chained = configure("demo-energy-prior", changes=changes)
    trainer = prepare(tmp_path / "run", torch.device("cpu"), chained, threads=1)
    assert fit(trainer, tmp_path / "run")
    run, s, here = Run(tmp_path / "run"), trainer.system, torch.device("cpu")
    assert s.prior.steps == 3 and run.settings()["prior_steps"] == 7
    expected = s.decode(s.prior.draw(5, seed=4, device=here, steps=7))
    x0 = run.sample(5, "x0", seed=4)
    assert all(torch.equal(x0[name], value) for name, value in expected.items())
    again = Run(tmp_path / "run", prior_steps=3)
    assert again.settings()["prior_steps"] == 3
    x0 = again.sample(5, "x0", seed=4)
    assert all(torch.equal(x0[name], value) for name, value in s.generate(5, seed=4).items())
    assert any(not torch.equal(x0[name], value) for name, value in expected.items())
    with pytest.raises(ValueError, match="sample_steps"):
        Run(tmp_path / "run", prior_steps=-1)
    with pytest.raises(ValueError, match="sample_steps"):
        configure("demo", changes=["latent_prior.chain.sample_steps=-1"])
    stages = json.dumps([{"kind": "warmup", "iterations": 1}])
    plain = configure("demo", changes=[f"stages={stages}", "data.options.n=200", "latent_prior=null"])
    assert fit(prepare(tmp_path / "plain", torch.device("cpu"), plain, threads=1), tmp_path / "plain")
    with pytest.raises(ValueError, match="prior_steps=5 is for runs with a latent prior"):
        Run(tmp_path / "plain", prior_steps=5)
    exact = configure("demo", changes=[f"stages={stages}", "data.options.n=200"])
    assert fit(prepare(tmp_path / "exact", torch.device("cpu"), exact, threads=1), tmp_path / "exact")
    with pytest.raises(ValueError, match="prior_steps=5 is for priors that a chain draws from"):
        Run(tmp_path / "exact", prior_steps=5)


def test_metrics_have_every_point_and_setting(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics["points"]) == {"vae", "x0", "xk"}
    for point in metrics["points"].values():
        assert 0 <= point["joint_coherence"] <= 1 and point["frechet"] > 0
        assert 0 <= point["class_share_min"] <= 0.1 <= point["class_share_max"] <= 1
    assert metrics["floor"]["frechet"] < metrics["points"]["vae"]["frechet"]
    # a judge worth listening to; word is decoded exactly
    assert metrics["classifiers"]["mnist"] > 0.95 and metrics["classifiers"]["word"] == 1.0
    assert set(metrics["conditional"]["A: decode"]["by_given"]) == {"1", "2"}
    settings = metrics["settings"]
    assert settings["data_steps"] == 4 and settings["seed"] == 0 and settings["data_noise"] == 0.005
    assert metrics["seconds"]["training"] > 0 and metrics["peak_memory_mib"] > 100


def test_samples_are_natural_and_repeatable(run: Path, tmp_path: Path) -> None:
    def draw(name: str, *options: str) -> dict[str, np.ndarray]:
        assert main(["sample", str(run), "--out", str(tmp_path / name), "--device", "cpu", *options]) == 0
        return dict(np.load(tmp_path / name))

    a = draw("a.npz", "--n", "30", "--seed", "3")
    assert a["mnist"].dtype == np.float32 and a["mnist"].shape == (30, 1, 14, 14)
    assert a["optdigits"].shape == (30, 1, 8, 8)
    assert a["mnist"].min() >= 0 and a["mnist"].max() <= 1
    assert set(a["word"]) <= set(WORDS) and "label" not in a
    assert set(a) == {"mnist", "optdigits", "word"}
    info = json.loads((tmp_path / "a.json").read_text())
    assert info["seed"] == 3 and info["point"] == "xk" and info["data_steps"] == 4
    b, c = draw("b.npz", "--n", "30", "--seed", "3"), draw("c.npz", "--n", "30", "--seed", "4")
    assert np.array_equal(a["mnist"], b["mnist"]) and not np.array_equal(a["mnist"], c["mnist"])
    still = draw("d.npz", "--n", "30", "--seed", "3", "--steps", "0")
    start = draw("e.npz", "--n", "30", "--seed", "3", "--point", "x0")
    assert np.array_equal(still["mnist"], start["mnist"]) and not np.array_equal(a["mnist"], start["mnist"])


def test_starts_modes_and_automatic_steps(run: Path, tmp_path: Path) -> None:
    """Other starts and ways of completing give other samples; "auto" says how many steps it took."""

    def draw(name: str, *options: str) -> tuple[dict[str, np.ndarray], dict[str, object]]:
        assert main(["sample", str(run), "--out", str(tmp_path / name), "--n", "20", "--device", "cpu", *options]) == 0
        return dict(np.load(tmp_path / name)), json.loads((tmp_path / name).with_suffix(".json").read_text())

    usual, _ = draw("a.npz")
    noise, info = draw("b.npz", "--start", "noise", "--point", "x0")
    assert info["start"] == "noise" and not np.array_equal(usual["mnist"], noise["mnist"])
    assert 0.4 < noise["mnist"].mean() < 0.6  # uniform noise, not a dark image of a digit
    _, info = draw("c.npz", "--steps", "auto")
    assert isinstance(info["data_steps"], int) and 0 <= info["data_steps"] <= 4 * 4
    given = ["--given", "word"]
    decoded, latent, data = (draw(f"{mode}.npz", *given, "--mode", mode)[0] for mode in ("decode", "latent", "data"))
    assert np.array_equal(decoded["word"], data["word"]) and np.array_equal(decoded["label"], data["label"])
    assert not np.array_equal(decoded["mnist"], latent["mnist"]) and not np.array_equal(latent["mnist"], data["mnist"])
    for bad in (
        ["--point", "frozen"],
        ["--start", "x"],
        ["--given", "word", "--start", "noise"],
        ["--given", "word", "--steps", "auto"],
    ):
        assert main(["sample", str(run), "--out", str(tmp_path / "x.npz"), "--device", "cpu", *bad]) == 1
    assert not (tmp_path / "x.npz").exists()


def test_conditional_samples_keep_what_is_given(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "given.npz"
    given = ["--given", "word", "mnist"]
    assert main(["sample", str(run), "--n", "20", *given, "--out", str(out), "--device", "cpu"]) == 0
    arrays = dict(np.load(out))
    assert [WORDS[c] for c in arrays["label"]] == list(arrays["word"])
    # real digits: both extremes are there, which a tanh never reaches
    assert arrays["mnist"].min() == 0.0 and arrays["mnist"].max() == 1.0


def test_resume_of_a_finished_run_evaluates_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", str(run), "--device", "cpu"]) == 0
    assert "0 iterations" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "--preset", "nope"], "preset must be one of"),
        (["train", "--set", "data_chain.stepz=3"], "unknown field 'data_chain.stepz'"),
        (["train", "--set", "nonsense"], "--set takes FIELD=VALUE"),
        (["train", "--data", "nope"], "nope"),
        (["train", "--resume", "nowhere"], "no checkpoint at nowhere"),
        (["sample", "nowhere"], "no checkpoint at nowhere"),
        (["evaluate", "nowhere"], "no checkpoint at nowhere"),
    ],
)
def test_errors_are_one_line_and_status_one(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "runs").exists()


def test_wrong_sample_options(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--n", "0"], "--n must be at least 1"),
        (["--given", "sound"], "['sound']"),
        (["--given", "word", "--point", "vae"], "--point x0 or xk"),
    ):
        assert main(["sample", str(run), "--device", "cpu", *options]) == 1
        assert message in capsys.readouterr().err
    assert main(["train", "--runs", str(run.parent), "--name", run.name]) == 1
    assert "holds a run already" in capsys.readouterr().err


def test_backends_prints_each_with_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backends"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("torch", "cpp", "triton", "cuda"))


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_that_goes_on(tmp_path: Path) -> None:
    stages = '[{"kind": "warmup", "iterations": 100000}]'
    command = [
        sys.executable,
        "-m",
        "mmebm",
        "train",
        "--runs",
        str(tmp_path),
        "--name",
        "cut",
        *QUICK[2:],
        "--set",
        f"stages={stages}",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ})
    log = tmp_path / "cut" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and log.read_text().count("\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline, process.stdout and process.stdout.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert b"mmebm train --resume" in out
    content = checkpoint.load(tmp_path / "cut" / "checkpoint.pt")
    assert 12 <= content["iteration"] < 100000


def test_a_folder_trains_one_run_at_a_time(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (run / "log.jsonl").read_bytes()
    with FolderLock(run):
        assert main(["train", "--resume", str(run), "--device", "cpu"]) == 1
        assert f"{run} is in use by process {os.getpid()}" in capsys.readouterr().err
    assert (run / "log.jsonl").read_bytes() == before
    with FolderLock(tmp_path / "mine"):
        assert main(["train", "--runs", str(tmp_path), "--name", "mine", *QUICK]) == 1
        assert "is in use by" in capsys.readouterr().err
    # a lock of another host is respected, whether or not it lives
    (run / ".lock").write_text("elsewhere 1")
    assert main(["train", "--resume", str(run), "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert "in use by process 1 on elsewhere" in error and f"delete {run / '.lock'}" in error
    (run / ".lock").unlink()


@pytest.mark.parametrize("command", ["train", "ablate", "sample", "evaluate", "report", "figure"])
def test_a_result_that_cannot_be_written_is_found_before_the_work(
    command: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file where a folder should be, in the way of every command; none begins its work."""

    def work(*args: object, **options: object) -> None:
        raise AssertionError("the work has begun")

    for name in (
        "mmebm.cli.train.load_data",
        "mmebm.cli.evaluate.fit_classifiers",
        "mmebm.cli.evaluate.measure",
        "mmebm.training.run.Run.sample",
        "mmebm.report.write_report",
    ):
        monkeypatch.setattr(name, work)
    (tmp_path / "file").write_text("in the way")
    out = str(tmp_path / "file" / "out")
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "checkpoint.pt").write_bytes((run / "checkpoint.pt").read_bytes())
    (tmp_path / "blocked" / "metrics.json").mkdir()
    arguments = {
        "train": ["--runs", out, *QUICK],
        "ablate": ["--out", out, "--device", "cpu"],
        "sample": [str(run), "--out", out, "--device", "cpu"],
        "evaluate": [str(tmp_path / "blocked"), "--device", "cpu"],
        "report": [str(run), "--out", out, "--device", "cpu"],
        "figure": ["9", str(run), "--out", out + ".png", "--device", "cpu"],
    }
    assert main([command, *arguments[command]]) == 1
    error = capsys.readouterr().err
    assert "cannot be written" in error
    assert ("metrics.json" if command == "evaluate" else f"{tmp_path / 'file'} is a file, and no folder") in error


def test_a_log_goes_on_where_the_checkpoint_is(tmp_path: Path) -> None:
    """Rows that were written after the last save, and a half one, are written again; a run of the same name that was
    killed before its first save leaves none."""
    stages = json.dumps([{"kind": "warmup", "iterations": 12}])
    config = configure("demo", changes=[f"stages={stages}", "data.options.n=200", "guard.every=4"])
    folder, here = tmp_path / "run", torch.device("cpu")
    folder.mkdir()
    (folder / "log.jsonl").write_text('{"stage": "old", "iteration": 4}\n{"stage": "ol')
    trainer = prepare(folder, here, config, threads=1)
    assert fit(trainer, folder)
    assert [row["iteration"] for row in Run(folder).log()] == [4, 8, 12]
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    content["config"] = config.replace(stages=(*config.stages, *config.stages)).to_json()
    checkpoint.save(folder / "checkpoint.pt", content)
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"stage": "warmup", "iteration": 16}\n{"stage": "wa')
    assert [row["iteration"] for row in Run(folder).log()] == [4, 8, 12, 16]
    resumed = prepare(folder, here, None, threads=1)
    assert fit(resumed, folder)
    assert [row["iteration"] for row in Run(folder).log()] == [4, 8, 12, 16, 20, 24]


def test_a_damaged_checkpoint_is_named_and_the_one_before_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    stages = json.dumps([{"kind": "warmup", "iterations": 12}])
    config = configure("demo", changes=[f"stages={stages}", "data.options.n=200", "guard.every=4"])
    folder, here = tmp_path / "run", torch.device("cpu")
    trainer = prepare(folder, here, config, threads=1)
    assert fit(trainer, folder)
    path = folder / "checkpoint.pt"
    checkpoint.save(path, trainer.state_dict())
    whole, draw = path.read_bytes(), np.random.default_rng(seed)
    for _ in range(60):
        damaged, place = bytearray(whole), int(draw.integers(8 * len(whole)))
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            Run(folder)
    assert main(["sample", str(folder), "--out", str(tmp_path / "s.npz"), "--device", "cpu"]) == 1
    assert str(path) in capsys.readouterr().err
    with pytest.warns(UserWarning, match=r"Going on from .*checkpoint\.previous\.pt, iteration 12"):
        assert prepare(folder, here, None, threads=1).iteration == 12
