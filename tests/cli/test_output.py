"""What the command line says, where, and with which exit status; configuration files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mmebm.cli.main import main, parser
from mmebm.cli.progress import Progress
from mmebm.cli.train import configure
from mmebm.training import preset
from mmebm.training.config import Config, Stage

STAGES = '[{"kind": "warmup", "iterations": 4}]'
QUICK = [
    "train",
    "--preset",
    "paper",
    "--set",
    f"stages={STAGES}",
    "--set",
    "data.options.n=100",
    "--threads",
    "1",
    "--device",
    "cpu",
]


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["sample", "--help"], ["--version"]])
def test_help_and_version_import_no_torch(words: list[str]) -> None:
    """Which is what took two seconds."""
    code = f"import sys\nfrom mmebm.cli.main import main\ntry: main({words!r})\nexcept SystemExit as e: code = e.code\n"
    code += "heavy = [m for m in ('torch', 'numpy', 'pydantic', 'matplotlib') if m in sys.modules]\nprint(code, heavy)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
    assert ("mmebm" in done.stdout) and (words != ["--version"] or done.stdout.startswith("mmebm 0."))


def test_help_lists_the_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n  {status} " in text for status in (0, 1, 2, 130)) and "143" in text
    with pytest.raises(SystemExit) as caught:
        main(["train", "--nonsense"])
    assert caught.value.code == 2


def test_quiet_json_and_traceback(tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("mmebm.cli.train.report", lambda run, **options: print("a table") or {"points": {}})
    monkeypatch.chdir(tmp_path)
    assert main([*QUICK, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main([*QUICK, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"run": "runs/paper-2", "points": {}} and "a table" in err
    assert main(["backends", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["torch"]["available"] is True
    assert main(["sample", "nowhere", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["kind"] == "FileNotFoundError" and "no checkpoint at nowhere" in err
    with pytest.raises(FileNotFoundError, match="no checkpoint at nowhere"):
        main(["sample", "nowhere", "--traceback"])


@pytest.mark.parametrize(
    "name, message",
    [
        ("cuda:7", "--device cuda:7: torch sees"),
        ("tpu", "--device takes auto, cpu, cuda or cuda:N, got 'tpu'"),
        ("meta", "--device takes auto, cpu, cuda or cuda:N, got 'meta'"),
        ("cuda:x", "--device takes auto"),
    ],
)
def test_devices(name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "nowhere", "--device", name]) == 1
    assert message in capsys.readouterr().err


def test_devices_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from mmebm.cli.common import pick_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda", 1) and pick_device("auto") == torch.device("cuda")
    with pytest.raises(ValueError, match="torch sees 2 GPUs here, cuda:0 to cuda:1"):
        pick_device("cuda:2")


def test_the_printed_configuration_is_a_configuration_file(tmp_path: Path, capsys: Any) -> None:
    words = ["train", "--preset", "polymnist-14", "--set", "model.latent=7", "--print-config", "--device", "cpu"]
    assert main(words) == 0
    text = capsys.readouterr().out
    (tmp_path / "mine.json").write_text(text)
    assert main(["train", "--config", str(tmp_path / "mine.json"), "--print-config"]) == 0
    again = Config.from_json(capsys.readouterr().out)
    assert again == Config.from_json(text) and again.model.latent == 7 and again.preset == "polymnist-14"
    # as a run keeps it, inside more
    (tmp_path / "run.json").write_text(json.dumps({"config": json.loads(text), "seed": 3}))
    assert configure(file=str(tmp_path / "run.json")) == again


def test_toml_changes_what_it_names(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'batch = 50\n[data]\nname = "folder"\npath = "here"\n[loss]\nelbo = 0.5\n[[stages]]\n'
        'kind = "joint"\niterations = 3\ntrain = ["energy"]\n'
    )
    config = configure(file=str(file), changes=["loss.elbo=0.25"], seed=4)
    base = preset("base")
    assert (config.batch, config.data.path, config.loss.elbo, config.seed) == (50, "here", 0.25, 4)
    assert config.stages == (Stage("joint", 3, train=("energy",)),)
    assert config.latent_prior == base.latent_prior and config.data.options == {} and config.model.latent == "auto"
    file.write_text('preset = "paper"\n')
    assert configure(file=str(file)) == preset("paper")
    for text, message in (
        ("batch = 0", "batch must be at least 1"),
        ("a =", "cannot be read"),
        ("[model]\nlatnt = 3", r"unknown field 'model\.latnt' \(did you mean 'latent'\?\)"),
        ("preset = 3", "preset must be a string"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            configure(file=str(file))
    file.write_text('preset = "paper"')
    with pytest.raises(ValueError, match=r"--preset demo, but .* says preset 'paper'"):
        configure("demo", file=str(file))
    with pytest.raises(FileNotFoundError, match="no configuration file at"):
        configure(file="nowhere.toml")
    with pytest.raises(ValueError, match=r"ends in \.toml or \.json"):
        configure(file=str(tmp_path / "mine.yaml"))


def test_without_a_terminal_progress_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    stages = (Stage("warmup", 1000), Stage("joint", 500))
    with Progress(stages, 0) as progress:
        for iteration in range(5, 1501, 5):
            progress.show({"iteration": iteration, "loss_elbo": 12.345, "seconds_per_iteration": 0.01})
        progress.show({"iteration": 1500, "rolled_back": "the gap"})
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and "\r" not in err
    assert (
        lines[0] == "warmup 1/2: 5 of 1000, elbo 12.3, s/it 0.01"
        and lines[-1] == "rolled back to iteration 1500: the gap"
    )
    # the first and the last of each stage; more only where twenty seconds have gone by
    assert [line.partition(",")[0] for line in lines[:-1]] == [
        "warmup 1/2: 5 of 1000",
        "warmup 1/2: 1000 of 1000",
        "joint 2/2: 5 of 500",
        "joint 2/2: 500 of 500",
    ]
    with Progress(stages, 0, quiet=True) as progress:
        progress.show({"iteration": 5, "loss_elbo": 1.0, "alarm": "unstable"})
    assert capsys.readouterr().err == "warning at iteration 5: unstable\n"


def test_another_data_set_leaves_the_presets_own_options_out() -> None:
    for name in ("demo", "paper", "polymnist-14", "polymnist-5k", "base", "demo/coopnets"):
        config = configure(name, data="folder", data_path="mine")
        assert config.data.options == {} and config.model.weights == "auto" and config.data.path == "mine", name
    assert configure("demo", data="digits").data.options == {"size": 14}
    assert configure("demo").model.weights == {"word": 6.0}


def test_what_is_auto_follows_from_the_shapes() -> None:
    from mmebm.training.config import fitted

    base = preset("base")
    # 196 + 64 + 10 elements: about 16.4 squared; the word has 19.6 times fewer than the largest, the other digit 3.06
    config = fitted(base, {"mnist": (1, 14, 14), "optdigits": (1, 8, 8), "word": (10,)})
    assert config.model.latent == 16 and config.model.weights == {"optdigits": 1.75, "word": 4.427}
    assert fitted(base, {"a": (3,)}).model.latent == 8 and fitted(base, {"a": (3, 256, 256)}).model.latent == 128
    with pytest.raises(ValueError, match=r"model\.weights names \['word'\], but the modalities are \['photo'\]"):
        fitted(preset("demo"), {"photo": (3, 8, 8)})
