"""A flag for every field, help that needs no torch and no time, completion, TOML out and in."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mmebm.cli.fields import others
from mmebm.cli.main import main
from mmebm.training import PRESETS, preset
from mmebm.training.config import Config, LatentPriorConfig, NetworkConfig
from mmebm.training.settings import read_file


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> Config:
    assert main(["train", *words, "--print-config"]) == 0
    return Config.from_json(capsys.readouterr().out)


def names(plain: dict[str, Any], prefix: str = "") -> set[str]:
    """The dotted names of all fields, as far down as there are dataclasses, by their values in a preset."""
    tables = {"options", "weights", "encoders", "decoders", "objective_options", "ramp"}
    found = set()
    for name, value in plain.items():
        nested = isinstance(value, dict) and name not in tables
        found |= names(value, f"{prefix}{name}.") if nested else {prefix + name}
    return found


def test_every_field_has_a_flag_and_its_choices_are_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    # the demo has every optional part
    fields = names(dataclasses.asdict(preset("demo"))) | {f"stages.N.{name}" for name in ("kind", "lr", "ramp")}
    own = {"imports": "--import"}
    for field in fields:
        flag = own.get(field, f"--{field.replace('_', '-')}")
        assert f"  {flag} " in text or f", {flag} " in text, field
    assert "{relu,leaky_relu,silu,gelu,softplus,tanh,elu}" in text and "configuration, latent-chain:" in text
    assert len(text.split("\n\n")[0].splitlines()) <= 2  # the usage is not all of it once more


def test_help_takes_less_than_half_a_second() -> None:
    """Of the processor: others may keep it busy meanwhile."""
    before = os.times()
    subprocess.run([sys.executable, "-m", "mmebm", "train", "--help"], capture_output=True, check=True)
    after = os.times()
    assert 0 < sum(after[2:4]) - sum(before[2:4]) < 0.5  # user and system time of ended children


def test_flags_set_fields(capsys: pytest.CaptureFixture[str]) -> None:
    config = printed(
        capsys,
        "--preset",
        "paper",
        "--loss.elbo",
        "0.25",
        "--data_chain.steps",
        "7",
        "--model.net",
        "conv",
        "--channels-last",
        "--model.spectral=false",
        "--stages.0.final-lr",
        "0.5",
        "--data.options.my-key=3",
        "--model.weights",
        '{"word": 2}',
        "--batch",
        "64",
        "--set",
        "batch=32",
        "--latent-prior.width",
        "9",
        "--latent-prior.chain.steps",
        "4",
    )
    assert (config.loss.elbo, config.data_chain.steps, config.model.net) == (0.25, 7, "conv")
    assert config.channels_last and not config.model.spectral and config.model.weights == {"word": 2}
    assert config.stages[0].final_lr == 0.5 and config.data.options["my-key"] == 3
    assert config.batch == 32  # the later one
    # the paper has none: it begins with its defaults
    assert config.latent_prior is not None and config.latent_prior.width == 9
    assert config.latent_prior.chain.steps == 4 and config.latent_prior.depth == LatentPriorConfig().depth
    own = printed(capsys, "--preset", "paper", "--model.energy.path", "my.nets:Energy").model.energy
    assert own == NetworkConfig("my.nets:Energy")
    assert printed(capsys, "--latent-prior", "null").latent_prior is None
    assert printed(capsys, "--data.name", "folder", "--data.path", "x").data.options == {}  # as --data does


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--model.net", "unet"], 2, "invalid choice: 'unet'"),
        (["--wrong", "3"], 2, "unrecognized arguments: --wrong 3"),
        (["stray"], 2, "unrecognized arguments: stray"),
        (["--model.wrong", "3", "--print-config"], 1, "unknown field 'model.wrong'"),
        (["--preset", "paper", "--latent-prior.widht", "3", "--print-config"], 1, "did you mean 'width'?"),
        (["--data-chain.steps", "-1", "--print-config"], 1, "data_chain.steps must be at least 0, got -1"),
    ],
)
def test_wrong_flags(words: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        got: Any = main(["train", *words])
    except SystemExit as error:
        got = error.code
    assert got == status and said in capsys.readouterr().err


def test_fields_are_told_from_other_words() -> None:
    assert others(["--a.b_c-d", "1", "--x", "2", "y", "--model.weights.my-word=3"]) == (
        ["a.b_c_d=1", "model.weights.my-word=3"],
        ["--x", "2", "y"],
    )
    assert others(["--a.b"]) == ([], ["--a.b"])
    # fields of no part, which only train has as flags of its own
    assert others(["--batch", "8", "--ema=0.9", "--latent-prior", "null"])[0] == [
        "batch=8",
        "ema=0.9",
        "latent_prior=null",
    ]
    assert others(["--seed", "3"]) == ([], ["--seed", "3"])
    with pytest.raises(SystemExit):
        main(["evaluate", "run", "--model.net", "conv"])  # which has no configuration to change


@pytest.mark.parametrize("name", PRESETS)
def test_toml_out_is_toml_in(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--preset", name, "--latent-prior", "null", "--print-config", "toml"]) == 0
    file = tmp_path / "mine.toml"
    file.write_text(capsys.readouterr().out)
    config = printed(capsys, "--config", str(file))
    assert config == printed(capsys, "--preset", name, "--latent-prior", "null") and config.latent_prior is None
    assert read_file(file) == json.loads(config.to_json())


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_completion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as caught:
        main(["--print-completion", "bash"])
    assert caught.value.code == 0
    script = tmp_path / "mmebm.bash"
    script.write_text(capsys.readouterr().out)

    def complete(*words: str) -> set[str]:
        quoted = " ".join(f"'{word}'" for word in words)
        line = f"source {script}; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _shtab_mmebm; "
        done = subprocess.run(["bash", "-c", line + 'printf "%s\\n" "${COMPREPLY[@]}"'], capture_output=True, text=True)
        return set(done.stdout.split())

    assert complete("mmebm", "back") == {"backends"}
    assert complete("mmebm", "train", "--model.net", "") == {"mlp", "conv", "resnet"}
    assert complete("mmebm", "train", "--start.") == {
        f"--start.{name}" for name in ("data", "latent", "completion", "noise", "buffer", "fresh", "reinit")
    }
