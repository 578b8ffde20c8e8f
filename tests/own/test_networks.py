"""Networks of the user's own: trained, checked, stored and rebuilt; what other packages offer."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mmebm
from mmebm.cli.main import main
from mmebm.cli.train import prepare
from mmebm.data import load as load_data
from mmebm.training import Trainer, checkpoint
from mmebm.training.config import ChainConfig, LatentPriorConfig, ModelConfig
from mmebm.training.run import CHECKPOINT

CPU = torch.device("cpu")


class UNet(nn.Module):
    """A decoder with a skip connection and a batch norm, to (n, 3, 8, 8)."""

    def __init__(self, latent: int, width: int = 6) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(latent, width * 64), nn.BatchNorm2d(width)
        self.down, self.up = nn.Conv2d(width, width, 4, 2, 1), nn.ConvTranspose2d(width, width, 4, 2, 1)
        self.last = nn.Conv2d(2 * width, 3, 3, padding=1)
        self.width = width

    def forward(self, z: Tensor) -> Tensor:
        h = self.norm(self.first(z).reshape(-1, self.width, 8, 8))
        return torch.tanh(self.last(torch.cat([h, self.up(torch.relu(self.down(h)))], dim=1)))


class ConvEnergy(nn.Module):
    """Convolutions on the photo, a linear layer on the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.photo, self.rest = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(7, 4)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        h = torch.nn.functional.silu(self.photo(x["photo"])).mean((2, 3))
        return (h * torch.tanh(self.rest(torch.cat([x["sound"], x["word"]], 1)))).sum(1)


class SortEnergy(ConvEnergy):
    """With an operation that no fused chain has."""

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return super().forward(x) + x["photo"].flatten(1).sort(dim=1).values[:, 0]


class Encoder(nn.Module):
    def __init__(self, out: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten(), nn.Linear(16, out))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Prior(nn.Module):
    def __init__(self, latent: int) -> None:
        super().__init__()
        self.net = nn.Linear(latent, 4)

    def forward(self, z: Tensor) -> Tensor:
        return torch.nn.functional.softplus(self.net(z)).sum(1)


def own() -> dict[str, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {
            "decoders": {"photo": UNet(3)},
            "encoders": {"photo": Encoder(6)},
            "energy": ConvEnergy(),
            "prior": Prior(3),
        }


@pytest.fixture
def config(tmp_path: Path, write_folder: Any, own_config: Any) -> Any:
    prior = LatentPriorConfig(chain=ChainConfig(steps=3, step=0.2))
    return own_config(write_folder(tmp_path / "data"), latent_prior=prior)


def test_objects_are_trained_themselves_and_given_again_to_load(config: Any, tmp_path: Path) -> None:
    networks, before = own(), own()
    data = load_data("folder", "train", path=config.data.path)
    trainer = Trainer(config, data, networks=networks)
    assert trainer.system.generator.decoders["photo"] is networks["decoders"]["photo"]
    assert list(trainer.run())[-1]["iteration"] == 10
    pairs = [(networks[kind]["photo"], before[kind]["photo"]) for kind in ("encoders", "decoders")]
    for net, fresh in [*pairs, (networks["energy"], before["energy"]), (networks["prior"], before["prior"])]:
        moved = [not torch.equal(p, q) for p, q in zip(net.parameters(), fresh.parameters(), strict=True)]
        assert all(moved), type(net)
    checkpoint.save(tmp_path / "run" / CHECKPOINT, trainer.state_dict())
    with pytest.raises(ValueError, match=r"trained with networks given as objects: .*'decoders.photo': '.*UNet'"):
        mmebm.load(tmp_path / "run")
    model = mmebm.load(tmp_path / "run", networks=own())
    weights = model._run.system.generator.decoders["photo"].state_dict()
    assert all(torch.equal(weights[name], value) for name, value in networks["decoders"]["photo"].state_dict().items())
    x = model.sample(4, seed=1)
    assert x["photo"].shape == (4, 3, 8, 8)
    again = mmebm.from_pretrained(model.save_pretrained(tmp_path / "saved"), networks=own())
    assert np.array_equal(again.sample(4, seed=1)["photo"], x["photo"])
    with pytest.raises(ValueError, match=r"network 'energy' must be a .*ConvEnergy, as in training, got .*Linear"):
        mmebm.load(tmp_path / "run", networks={**own(), "energy": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"networks has 'decoders\.word', and the run was trained with"):
        mmebm.load(tmp_path / "run", networks={**own(), "decoders": {"photo": UNet(3), "word": nn.Linear(3, 2)}})


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's own in the current folder."""
    source = Path(__file__).read_text().partition("class UNet")[2].partition("def own()")[0]
    (tmp_path / "work").mkdir()
    header = "import torch\nfrom torch import Tensor, nn\n\n\nclass UNet"
    (tmp_path / "work" / "own_nets.py").write_text(header + source)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_nets", raising=False)
    return "own_nets"


def test_import_paths_are_stored_and_rebuilt(config: Any, package: str, tmp_path: Path) -> None:
    settings = tmp_path / "work" / "mine.toml"
    settings.write_text(
        textwrap.dedent(f"""
        preset = "base"
        batch = 16
        stages = [
            {{kind = "warmup", iterations = 4}}, {{kind = "prior", iterations = 2}}, {{kind = "joint", iterations = 2}},
        ]
        [data]
        name = "folder"
        path = "{config.data.path}"
        [data_chain]
        steps = 2
        [guard]
        every = 2
        [model]
        latent = 3
        energy = "{package}:ConvEnergy"
        encoders.photo = "{package}:Encoder"
        prior = "{package}:Prior"
        [model.decoders.photo]
        path = "{package}:UNet"
        arguments = {{width = 5}}
    """)
    )
    command = ["train", "--config", str(settings), "--name", "r", "--device", "cpu", "--threads", "1", "--quiet"]
    assert main(command) == 0
    model = mmebm.load("runs/r")
    assert model._run.system.generator.decoders["photo"].width == 5
    stored = json.loads(Path("runs/r/config.json").read_text())["config"]["model"]
    assert stored["decoders"]["photo"] == {"path": "own_nets:UNet", "arguments": {"width": 5}}
    x = model.sample(3)
    again = mmebm.from_pretrained(model.save_pretrained("saved"))
    assert np.array_equal(again.sample(3)["photo"], x["photo"])
    # a hub's model must be trusted to import from here
    hub = type(sys)("huggingface_hub")
    hub.snapshot_download = lambda repo_id, **options: "saved"  # type: ignore[attr-defined]
    sys.modules["huggingface_hub"] = hub
    try:
        with pytest.raises(ValueError, match="give trust_code=True"):
            mmebm.from_pretrained("some/body")
        assert np.array_equal(mmebm.from_pretrained("some/body", trust_code=True).sample(3)["photo"], x["photo"])
    finally:
        del sys.modules["huggingface_hub"]


@pytest.mark.parametrize(
    "spec, message",
    [
        ("own_nets:Nothing", "'own_nets:Nothing': own_nets has no 'Nothing'"),
        ("no_such_module:Net", "there is no module 'no_such_module'"),
        ("os:system", "must be a class of torch.nn.Module, got <built-in function system>"),
        ({"path": "own_nets:UNet", "arguments": {"widht": 5}}, "unexpected keyword argument 'widht'"),
        ("torch.nn:Linear", "missing .* required positional"),
    ],
)
def test_wrong_import_paths(config: Any, package: str, spec: Any, message: str) -> None:
    from mmebm.training.config import NetworkConfig

    spec = NetworkConfig(**spec) if isinstance(spec, dict) else spec
    data = load_data("folder", "train", path=config.data.path)
    with pytest.raises((ValueError, TypeError, ModuleNotFoundError), match=message):
        Trainer(config.replace(model=ModelConfig(latent=3, decoders={"photo": spec})), data)


class Net(nn.Module):
    """Whatever function it is given."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.ones(()))

    def forward(self, x: Any) -> Any:
        return self.function(self.weight, x)


def photo_like(z: Tensor, side: int = 8) -> Tensor:
    return z.sum(1)[:, None, None, None].expand(-1, 3, side, side)


@pytest.mark.parametrize(
    "networks, message",
    [
        (
            {"decoders": {"photo": Net(lambda w, z: w * photo_like(z, 9))}},
            r"network 'decoders\.photo' returns \(2, 3, 9, 9\) for z \(2, 3\); it must return \(2, 3, 8, 8\)",
        ),
        (
            {"decoders": {"photo": Net(lambda w, z: w * z @ torch.ones(4, 4))}},
            r"network 'decoders\.photo' fails on z \(2, 3\): RuntimeError",
        ),
        (
            {"decoders": {"photo": Net(lambda w, z: w * torch.zeros(2, 3, 8, 8))}},
            r"'decoders\.photo' has no gradient in z",
        ),
        ({"decoders": {"photo": Net(lambda w, z: photo_like(z) / 0)}}, "values that are not all finite"),
        (
            {"encoders": {"sound": Net(lambda w, x: w * x)}},
            r"network 'encoders\.sound' returns \(2, 5\) for sound \(2, 5\); it must return \(2, 6\): mean",
        ),
        ({"energy": Net(lambda w, x: w * x["sound"].sum(1, keepdim=True))}, r"returns \(2, 1\) .* must return \(2,\)"),
        ({"energy": Net(lambda w, x: w * x["sound"].sum(1))}, "'energy' has no gradient in photo, word"),
        (
            {"prior": Net(lambda w, z: w * z.sum())},
            r"network 'prior' returns \(\) for z \(2, 3\); it must return \(2,\)",
        ),
        ({"decoder": {}}, "must have some of 'encoders', 'decoders', 'energy', 'prior', got 'decoder'"),
        ({"decoders": {"photos": nn.Linear(3, 3)}}, r"networks\['decoders'\] names \['photos'\]; the modalities are"),
        ({"decoders": nn.Linear(3, 3)}, r"networks\['decoders'\] must map modalities to modules"),
        ({"energy": lambda x: x}, "network 'energy' must be a torch.nn.Module, got function"),
    ],
)
def test_networks_that_do_not_fit_are_named(config: Any, networks: Any, message: str) -> None:
    data = load_data("folder", "train", path=config.data.path)
    with pytest.raises((ValueError, TypeError), match=message):
        Trainer(config, data, networks=networks)


def test_the_check_leaves_networks_and_random_numbers_as_they_were(config: Any) -> None:
    data, decoder = load_data("folder", "train", path=config.data.path), UNet(3)
    decoder.down.eval()
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    state = torch.get_rng_state()
    Trainer(config, data, networks={"decoders": {"photo": decoder}})
    assert all(torch.equal(before[name], value) for name, value in decoder.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and decoder.training and not decoder.down.training
    assert all(p.grad is None for p in decoder.parameters())


def test_a_prior_of_ones_own_needs_its_settings(config: Any) -> None:
    data = load_data("folder", "train", path=config.data.path)
    with pytest.raises(ValueError, match="needs latent_prior"):
        Trainer(config.replace(latent_prior=None), data, networks={"prior": Prior(3)})


def test_training_says_which_chains_are_fused(
    config: Any, package: str, tmp_path: Path, need: Any, capsys: Any
) -> None:
    need("cpp")
    prepare(tmp_path / "run", CPU, config, threads=1)
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.partition(":")[0] for line in lines] == ["data chain", "latent chain", "chain of the latent prior"]
    assert all("one fused call (langevin_mlp, cpp)" in line for line in lines)
    model = ModelConfig(latent=3, energy=f"{package}:SortEnergy")
    prepare(tmp_path / "other", CPU, config.replace(model=model), threads=1)
    first, second, _ = capsys.readouterr().out.splitlines()[1:]
    assert "a fused update after each gradient (langevin_step" in first and "sort" in first
    assert "one fused call" in second


def test_private_latents_reach_a_decoder_of_ones_own(config: Any) -> None:
    """It is given u and its own w alone."""
    data = load_data("folder", "train", path=config.data.path)
    model = ModelConfig(latent=9, private=2, generator_width=8, inference_width=8, energy_width=8)
    system = Trainer(config.replace(model=model), data, networks={"decoders": {"photo": UNet(5)}}).system
    z = torch.randn(4, 9)
    moved = z.clone()
    moved[:, 5:] += 1.0  # the w of sound and word
    assert torch.equal(system.generator(z)["photo"], system.generator(moved)["photo"])
    assert not torch.equal(system.generator(z)["sound"], system.generator(moved)["sound"])


def test_a_module_and_a_package_bring_their_own(package: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """``--import`` registers a data set; entry points of an installed package offer one, and a preset."""
    source = textwrap.dedent("""
        import dataclasses
        from mmebm.data import DATASETS, load
        from mmebm.training import preset

        def few(split, *, seed=0, path=None, n=40):
            return dataclasses.replace(load("digits", split, seed=seed, size=14, n=n), name="few")

        def quick():
            return preset("base").replace(preset="quick", batch=20)
    """)
    Path("registers.py").write_text(source + "\nDATASETS['few-registered'] = few\n")
    (tmp_path / "site" / "offers-1.0.dist-info").mkdir(parents=True)
    (tmp_path / "site" / "offers.py").write_text(source)
    (tmp_path / "site" / "offers-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: offers\nVersion: 1.0\n"
    )
    (tmp_path / "site" / "offers-1.0.dist-info" / "entry_points.txt").write_text(
        "[mmebm.datasets]\nfew-offered = offers:few\n[mmebm.presets]\nquick = offers:quick\n"
    )
    stages = '[{"kind": "warmup", "iterations": 2}]'
    command = ["train", "--preset", "base", "--device", "cpu", "--threads", "1", "--set", f"stages={stages}", "--quiet"]
    assert main([*command, "--data", "few-registered", "--name", "none"]) == 1
    assert "unknown data set 'few-registered'" in capsys.readouterr().err
    monkeypatch.setattr("mmebm.cli.train.report", lambda run, **options: {})
    assert main([*command, "--data", "few-registered", "--import", "registers", "--name", "a"]) == 0
    assert json.loads(Path("runs/a/config.json").read_text())["config"]["imports"] == ["registers"]
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert main([*command, "--data", "few-offered", "--name", "b"]) == 0
    command[2] = "quick"
    assert main([*command, "--name", "c"]) == 0
    assert json.loads(Path("runs/c/config.json").read_text())["config"]["batch"] == 20
    Path("judges_and_loggers.py").write_text(
        textwrap.dedent("""
        from pathlib import Path

        def darkness(samples, real):
            return {"of_samples": samples["mnist"].mean(), "of_real": real["mnist"].mean()}

        class Tracker:
            def __init__(self, folder, config):
                self.file = Path(folder, "tracked.txt").open("w")
                self.file.write(config["preset"])

            def write(self, row):
                self.file.write(f" {row['iteration']}")

            def close(self):
                self.file.close()
    """)
    )
    assert main([*command, "--name", "d", "--logger", "judges_and_loggers:Tracker"]) == 0
    assert Path("runs/d/tracked.txt").read_text() == "quick 2"
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path / "work")
    capsys.readouterr()
    evaluate = ["evaluate", "runs/a", "--n", "100", "--device", "cpu", "--json"]
    assert main([*evaluate, "--judge", "judges_and_loggers:darkness"]) == 0
    judged = json.loads(capsys.readouterr().out)["judges"]["judges_and_loggers:darkness"]["vae"]
    # digits are dark, as an untrained decoder is not
    assert 0.05 < judged["of_real"] < 0.2 < judged["of_samples"] < 0.8
    assert main([*evaluate, "--judge", "nobody"]) == 1
    assert "'nobody' is none of mmebm.judges" in capsys.readouterr().err
    assert main([*command, "--import", "no_such_module"]) == 1
    assert "there is no module 'no_such_module'" in capsys.readouterr().err
