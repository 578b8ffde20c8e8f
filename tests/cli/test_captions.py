"""A run on images with captions: trained, evaluated and sampled by the command line, its codec kept with it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from mmebm.cli.evaluate import classes_shared
from mmebm.cli.main import main
from mmebm.data.text_codec import TextAutoencoder, TextSettings
from mmebm.data.words import Vocabulary

CLASSES = ("001.Grey_bird", "002.Red_bird")


@pytest.fixture
def cub(tmp_path: Path) -> Path:
    """The layout of CUB's image-caption files, with 24 training and 20 test images of two classes."""
    root, rng = tmp_path / "cub", np.random.default_rng(0)
    for split, lines, per_class in (("train", "text_trainvalclasses.txt", 12), ("test", "text_testclasses.txt", 10)):
        captions = []
        for c, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(per_class):
                pixels = rng.integers(120 * c, 120 * c + 100, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i:03d}.jpg")
                captions += [f"a {('grey', 'red')[c]} bird with a {k} wing." for k in ("small", "long") * 5]
        (root / lines).write_text("\n".join(captions) + "\n")
    return root


def test_a_run_keeps_its_codec(
    cub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"a {a} bird with a {b} wing." for a, b in itertools.product(("grey", "red"), ("small", "long"))]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = TextSettings(dim=8, embedding=8, hidden=8, length=10)
        TextAutoencoder(Vocabulary.of(words), settings).eval().save(tmp_path / "fitted.pt")
    stages = json.dumps([{"kind": "warmup", "iterations": 5}, {"kind": "joint", "iterations": 2}])
    options = json.dumps({"size": 8, "dim": 8, "codec": str(tmp_path / "fitted.pt")})
    assert (
        main(
            [
                "train",
                "--preset",
                "paper",
                "--data",
                "cub",
                "--data-path",
                str(cub),
                "--runs",
                str(tmp_path),
                "--name",
                "r",
                "--device",
                "cpu",
                "--threads",
                "1",
                "--set",
                f"stages={stages}",
                "--set",
                f"data.options={options}",
                "--set",
                "model.weights={}",
                "--set",
                "batch=8",
                "--set",
                "data_chain.steps=2",
            ]
        )
        == 0
    ), capsys.readouterr().err
    kept = (tmp_path / "r" / "codec.pt").read_bytes()
    (tmp_path / "fitted.pt").unlink()
    assert main(["sample", str(tmp_path / "r"), "--n", "3", "--out", str(tmp_path / "s.npz"), "--device", "cpu"]) == 0
    arrays = dict(np.load(tmp_path / "s.npz"))
    assert arrays["image"].shape == (3, 3, 8, 8) and arrays["caption"].shape == (3,)
    drawn, known = (set(" ".join(texts).replace(".", " .").split()) for texts in (arrays["caption"], words))
    assert drawn <= known | {"<unk>"}
    assert (tmp_path / "r" / "codec.pt").read_bytes() == kept

    # the score of captions: with the plain features, and with functions given by import path
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    found = metrics["matching"]["image ~ caption"]
    assert found["real"]["n"] == 20 and found["fitted_to"] == 24 and set(found["points"]) == {"vae", "x0", "xk"}
    assert found["features"] == {"image": "plain", "caption": "plain"}
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "birdfeatures.py").write_text(
        "def look(images):\n    return images.mean((2, 3))\n"
        "def read(texts):\n    return [['grey' in text, 'red' in text, 'small' in text] for text in texts]\n"
    )
    own = ["--features", "image=birdfeatures:look", "caption=birdfeatures:read"]
    capsys.readouterr()
    for number in ("7", "8"):
        out = ["--out", str(tmp_path / "f.png"), "--device", "cpu", "--json"]
        assert main(["figure", number, str(tmp_path / "r"), *own, *out]) == 0
        said, told = capsys.readouterr()
        found = json.loads(said)["matching"]["image ~ caption"]
        assert found["features"] == {"image": "given", "caption": "given"}
        assert bool(found["points"]) == (number == "7") and bool(found["given image"]) == (number == "8")
        assert "real tuples" in told and "image -> caption" in told
    for wrong, message in (
        (["7", "--features", "word=birdfeatures:look"], r"looks at ['caption', 'image']"),
        (["7", "--features", "clip"], "takes lite0, inception:FILE or MODALITY=package.module:function"),
        (["9", "--features", "lite0"], "of figures 7 and 8"),
    ):
        assert main(["figure", wrong[0], str(tmp_path / "r"), *wrong[1:], "--device", "cpu"]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("train", "test", "shared"), [([0, 1], [1, 2], True), ([0, 1], [2], False), ([-1], [-1], False)]
)
def test_classes_that_no_training_tuple_has_judge_nothing(train: list[int], test: list[int], shared: bool) -> None:
    """As the species of CUB, whose captions come in two splits without a species in both."""
    trained, unseen = SimpleNamespace(labels=torch.tensor(train)), SimpleNamespace(labels=torch.tensor(test))
    run = SimpleNamespace(dataset=lambda split: trained, unseen=lambda split: unseen)
    assert classes_shared(cast(Any, run)) == shared
