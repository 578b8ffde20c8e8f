"""A run's folder is a model: without its data, in the units of the data, seeded, saved and loaded again."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mmebm
from mmebm.cli.main import main
from mmebm.cli.train import fit, prepare
from mmebm.data.text_codec import fit_text_autoencoder
from mmebm.training.run import Run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, write_folder: Any, own_config: Any) -> Path:
    """A run on own arrays, moved away from its data, which is gone."""
    root = tmp_path_factory.mktemp("own")
    trainer = prepare(root / "run", CPU, own_config(write_folder(root / "data")), threads=1)
    assert fit(trainer, root / "run")
    shutil.rmtree(root / "data")
    return Path(shutil.move(root / "run", root / "elsewhere"))


@pytest.fixture
def model(trained: Path) -> mmebm.Model:
    return mmebm.load(trained)


def photos(n: int = 4) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (n, 3, 8, 8), dtype=np.uint8)


def test_samples_are_in_the_units_of_the_data(model: mmebm.Model) -> None:
    x = model.sample(50, seed=3)
    assert x["photo"].dtype == np.uint8 and x["photo"].shape == (50, 3, 8, 8)
    assert x["sound"].dtype == np.float32 and x["sound"].shape == (50, 5)
    # the chain is clamped to model space, which is the range of the sound: both of its ends, and no other scale
    assert -80 <= x["sound"].min() < -45 and -35 < x["sound"].max() <= 0
    assert set(x["word"]) <= {"low", "high"}
    again, other = model.sample(50, seed=3), model.sample(50, seed=4)
    assert all(np.array_equal(x[name], again[name]) for name in x)
    assert not np.array_equal(x["photo"], other["photo"])
    # a pixel of the generator, by hand
    run = model._run
    x0 = run.sample(5, "x0", seed=1)["photo"]
    by_hand = ((x0.double() + 1) / 2 * 255).clamp(0, 255).round().to(torch.uint8).numpy()
    assert np.array_equal(model.sample(5, seed=1, point="x0")["photo"], by_hand)


def test_every_subset_is_completed_and_what_is_given_stays(model: mmebm.Model) -> None:
    whole = {"photo": photos(), "sound": np.full((4, 5), -20.0), "word": np.array(["low", "high", "low", "high"])}
    for size in (1, 2, 3):
        for names in itertools.combinations(whole, size):
            given = {name: whole[name] for name in names}
            for mode in ("decode", "latent", "data"):
                out = model.complete(given, seed=2, mode=mode)  # type: ignore[arg-type]
                assert list(out) == list(model.modalities) and {len(value) for value in out.values()} == {4}
                assert all(np.array_equal(out[name], whole[name]) for name in names)
    # by hand: z as inferred from the photo, decoded, in decibels
    x = torch.from_numpy(photos()).float() / 127.5 - 1
    system = model._run.system
    with torch.no_grad():
        z = system.inference.sample({"photo": x}, torch.Generator().manual_seed(2))
        decibels = system.generator(z)["sound"].double() * 40 - 40
    out = model.complete({"photo": photos()}, seed=2, mode="decode")
    np.testing.assert_allclose(out["sound"], decibels.numpy(), rtol=0, atol=1e-4)  # float32 at 80: 4e-6 per rounding
    assert not np.array_equal(out["sound"], model.complete({"photo": photos()}, seed=3, mode="decode")["sound"])


def test_layouts_of_images(model: mmebm.Model) -> None:
    expected = model.complete({"photo": photos()}, seed=2)["sound"]
    for same in (photos().transpose(0, 2, 3, 1), photos() / 255, torch.from_numpy(photos()), list(photos())):
        np.testing.assert_array_equal(model.complete({"photo": same}, seed=2)["sound"], expected)
    one = model.complete({"photo": photos()[0].transpose(1, 2, 0)}, seed=2)
    assert one["photo"].shape == (1, 3, 8, 8) and one["sound"].shape == (1, 5)
    assert model.complete({"word": "high"})["photo"].shape == (1, 3, 8, 8)
    assert model.complete({"sound": np.full(5, -3.0)})["photo"].shape == (1, 3, 8, 8)


def test_energy_revision_and_encoding(model: mmebm.Model) -> None:
    x = {"photo": photos(), "sound": np.full((4, 5), -20.0), "word": ["low", "high", "low", "high"]}
    code = torch.tensor([[1.0, -1.0], [-1.0, 1.0]] * 2)
    inside = {"photo": torch.from_numpy(photos()).float() / 127.5 - 1, "sound": torch.full((4, 5), 0.5), "word": code}
    system = model._run.system
    with torch.no_grad():
        energy = system.energy(inside)
    # one rounding of a pixel more or less, through a network: a few units of float32 in the last place
    np.testing.assert_allclose(model.energy(x), energy.numpy(), rtol=1e-5, atol=1e-6)
    revised = model.revise(x, seed=1, observed={"word", "photo"})
    assert np.array_equal(revised["photo"], x["photo"]) and list(revised["word"]) == x["word"]
    assert not np.array_equal(revised["sound"], x["sound"])
    assert np.allclose(model.revise(x, steps=0)["sound"], x["sound"])
    z = model.encode({"photo": photos()})
    with torch.no_grad():
        (expert,) = system.inference({"photo": inside["photo"]})
    np.testing.assert_allclose(z, expert.mean.numpy(), rtol=1e-5, atol=1e-6)
    samples = np.stack([model.encode({"photo": photos(1)}, seed=k)[0] for k in range(400)])
    assert np.array_equal(samples[7], model.encode({"photo": photos(1)}, seed=7)[0])
    # 400 samples of q(z | x), here one Gaussian: their mean within 5 standard errors of its mean
    deviation = (0.5 * expert.logvar[0]).exp().detach().numpy()
    assert (np.abs(samples.mean(0) - model.encode({"photo": photos(1)})[0]) < 5 * deviation / 20).all()
    assert model.decode(z)["photo"].shape == (4, 3, 8, 8)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m.complete({}), "given is empty; the modalities are"),
        (lambda m: m.complete({"smell": [1]}), r"given names \['smell'\]"),
        (
            lambda m: m.complete({"photo": np.zeros((2, 3, 9, 9))}),
            r"'photo' is images \(n, 3, 8, 8\), got \(2, 3, 9, 9\)",
        ),
        (
            lambda m: m.complete({"photo": np.full((2, 3, 8, 8), 200.0)}),
            r"'photo': floating images must lie in \[0, 1\]",
        ),
        (lambda m: m.complete({"word": ["medium"]}), r"'word': unknown words \['medium'\]"),
        (lambda m: m.complete({"sound": np.full((1, 5), np.nan)}), "'sound' holds a value that is not finite"),
        (lambda m: m.complete({"sound": ["a"]}), r"'sound' is numbers, got \['a'\]"),
        (lambda m: m.complete({"sound": None}), "'sound' is numbers, got None"),
        (lambda m: m.complete({"sound": np.full((1, 5), 1j)}), "'sound' is numbers, .* of dtype complex128"),
        (lambda m: m.complete({"word": ["low"], "sound": np.zeros((2, 5))}), "as many rows of every modality"),
        (lambda m: m.complete({"word": ["low"]}, mode="best"), "mode must be 'decode', 'latent' or 'data', got 'best'"),
        (lambda m: m.energy({"word": ["low"]}), r"x lacks \['photo', 'sound'\]"),
        (lambda m: m.revise({"word": ["low"] * 4}, observed="word"), "observed must"),
        (lambda m: m.sample(0), "n must be at least 1"),
        (lambda m: m.sample(1, seed=-1), "seed must be at least 0"),
        (lambda m: m.sample(1, point="xx"), "point must be one of"),
        (lambda m: m.decode(np.zeros((1, 4))), r"z must be \(n, 3\)"),
    ],
)
def test_errors_name_the_argument(model: mmebm.Model, call: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call(model)  # type: ignore[operator]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sound": {"kind": "vector", "range": [-100, 0]}}, "'sound' was trained with centre"),
        ({"photo": {"kind": "image", "layout": "CHW"}}, "'photo' was trained with shape"),
        ({"word": {"kind": "text", "words": ["high", "low"]}}, "'word' was trained with words"),
    ],
)
def test_another_reading_of_the_data_is_an_error(
    trained: Path, tmp_path: Path, change: dict[str, dict[str, object]], message: str, write_folder: Any, meta_with: Any
) -> None:
    data = write_folder(tmp_path / "data")
    held = Run(trained, data_path=str(data)).dataset("test")  # as it was: fine
    assert len(held) == 20
    (data / "meta.json").write_text(meta_with(**change))
    with pytest.raises(ValueError, match=message):
        Run(trained, data_path=str(data)).dataset("test")
    # samples do not care, and neither does what is completed
    assert Run(trained, data_path=str(data)).modalities == Run(trained).modalities


def test_the_range_of_an_image_is_part_of_its_reading(
    tmp_path: Path, write_folder: Any, own_config: Any, meta_with: Any
) -> None:
    data = write_folder(tmp_path / "data")
    for split in ("train", "test"):
        np.save(data / split / "photo.npy", np.load(data / split / "photo.npy") * 10.0 - 1000)
    photo = {"kind": "image", "layout": "HWC", "range": [-1000, 1550]}
    (data / "meta.json").write_text(meta_with(photo=photo))
    trainer = prepare(tmp_path / "run", CPU, own_config(data), threads=1)
    assert fit(trainer, tmp_path / "run")
    model = mmebm.load(tmp_path / "run")
    real = np.load(data / "test" / "photo.npy")
    out = model.revise({"photo": real[:3], "sound": np.zeros((3, 5)), "word": ["low"] * 3}, steps=0)
    np.testing.assert_allclose(out["photo"], real[:3].transpose(0, 3, 1, 2), rtol=0, atol=1e-3)  # float32 at 2,550
    photo["range"] = [-1000, 1551]
    (data / "meta.json").write_text(meta_with(photo=photo))
    with pytest.raises(ValueError, match="'photo' was trained with settings"):
        Run(tmp_path / "run").dataset("test")
    with pytest.raises(ValueError, match="'photo' was trained with settings"):
        prepare(tmp_path / "run", CPU, None, threads=1)  # to resume


def test_saved_and_loaded_it_draws_the_same(trained: Path, model: mmebm.Model, tmp_path: Path) -> None:
    folder = model.save_pretrained(tmp_path / "saved")
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md", "samples.png"}
    again = mmebm.from_pretrained(folder)
    assert again.points == model.points == ("vae", "x0", "xk") and again.config == model.config
    for point in model.points:
        a, b = model.sample(6, seed=1, point=point), again.sample(6, seed=1, point=point)
        assert all(np.array_equal(a[name], b[name]) for name in a), point
    assert np.array_equal(model.complete({"photo": photos()})["sound"], again.complete({"photo": photos()})["sound"])
    card = (folder / "README.md").read_text()
    assert "| `photo` | image | 3 x 8 x 8 |" in card and "library_name: mmebm" in card and "samples.png" in card
    # saved once more from the copy: nothing is lost on the way
    third = mmebm.load(again.save_pretrained(tmp_path / "third"))
    assert np.array_equal(third.sample(4, point="vae")["photo"], model.sample(4, point="vae")["photo"])


def test_a_broken_folder_is_named(model: mmebm.Model, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        mmebm.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no folder, and no hub id"):
        mmebm.from_pretrained(tmp_path / "nothing")
    folder = model.save_pretrained(tmp_path / "saved")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is no model that save_pretrained wrote"):
        mmebm.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(whole)
    (folder / "config.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="its format is 'other'"):
        mmebm.from_pretrained(folder)


def test_the_hub(model: mmebm.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for huggingface_hub that keeps repositories in a folder."""

    class HfApi:
        def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
            assert exist_ok and private
            (tmp_path / repo_id).mkdir(parents=True)

        def upload_folder(self, *, repo_id: str, folder_path: str) -> str:
            shutil.copytree(folder_path, tmp_path / repo_id, dirs_exist_ok=True)
            return f"hub:{repo_id}"

    hub = types.ModuleType("huggingface_hub")
    hub.HfApi = HfApi  # type: ignore[attr-defined]
    hub.snapshot_download = lambda repo_id, **options: str(tmp_path / repo_id)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert model.push_to_hub("me/digits", private=True) == "hub:me/digits"
    again = mmebm.from_pretrained("me/digits")
    assert np.array_equal(again.sample(3)["photo"], model.sample(3)["photo"])
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mmebm\[hub\]'"):
        mmebm.from_pretrained("me/digits")


def test_captions_travel_with_their_codec(tmp_path: Path, write_folder: Any, own_config: Any) -> None:
    data = write_folder(
        tmp_path / "data",
        meta={"modalities": {"sound": {"kind": "vector", "range": [-80, 0]}, "word": {"kind": "caption"}}},
    )
    for split, n in (("train", 40), ("test", 20)):
        np.save(data / split / "photo.npy", np.zeros((n, 3, 8, 8), np.uint8))
        np.save(data / split / "word.npy", np.array(["a low sound", "a high sound"])[np.arange(n) % 2])
    fit_text_autoencoder(["a low sound", "a high sound"], dim=4, hidden=8, rounds=1, round=5).save(tmp_path / "c.pt")
    config = own_config(data)
    config = config.replace(
        data=type(config.data)("folder", path=str(data), options={"codecs": {"word": str(tmp_path / "c.pt")}})
    )
    assert fit(prepare(tmp_path / "run", CPU, config, threads=1), tmp_path / "run")
    (tmp_path / "c.pt").unlink()
    shutil.rmtree(data)
    model = mmebm.load(tmp_path / "run")
    drawn = model.sample(5)["word"]
    assert {word for text in drawn for word in text.split()} <= {"a", "low", "high", "sound", "<unk>"}
    assert list(mmebm.load(model.save_pretrained(tmp_path / "saved")).sample(5)["word"]) == list(drawn)


def test_the_command_line_samples_without_the_data(
    trained: Path, tmp_path: Path, write_folder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "mine.npz", photo=photos(3))
    base = ["sample", str(trained), "--device", "cpu"]
    assert main([*base, "--n", "4", "--out", str(tmp_path / "s.npz")]) == 0
    assert (
        main([*base, "--given-file", str(tmp_path / "mine.npz"), "--out", str(tmp_path / "g.npz"), "--seed", "5"]) == 0
    )
    out = dict(np.load(tmp_path / "g.npz"))
    assert np.array_equal(out["photo"], photos(3)) and out["sound"].shape == (3, 5)
    assert np.array_equal(out["sound"], mmebm.load(trained).complete({"photo": photos(3)}, seed=5)["sound"])
    assert json.loads((tmp_path / "g.json").read_text())["given"] == ["photo"]
    assert main([*base, "--n", "3", "--out", str(tmp_path / "grid.png")]) == 0
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG") and not (tmp_path / "grid.png.npz").exists()
    assert main([*base, "--given-file", str(tmp_path / "mine.npz"), "--out", str(tmp_path / "g.png")]) == 0
    for options, message in (
        (["--out", "x.txt"], "ends in .npz, or a picture to .png"),
        (["--given-file", str(tmp_path / "mine.npz"), "--given", "word"], "leave out --given"),
        (["--given-file", str(trained / "config.json")], "must be an archive of numpy.savez"),
        (["--given", "word"], "say where it is by --data-path, in Python data_path= (no test split"),
    ):
        assert main([*base, *options]) == 1
        assert message in capsys.readouterr().err
    data = write_folder(tmp_path / "moved")
    assert main([*base, "--n", "2", "--given", "word", "--data-path", str(data), "--out", str(tmp_path / "w.npz")]) == 0
    assert main(["evaluate", str(trained), "--data-path", str(data), "--n", "100", "--device", "cpu"]) == 0
