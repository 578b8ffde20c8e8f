"""``mmebm figure``: every figure of the paper, of runs of seconds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from matplotlib.image import imread

from mmebm.cli.figure import coherence_and_distance
from mmebm.cli.main import main

STAGES = json.dumps([{"kind": kind, "iterations": n} for kind, n in (("warmup", 20), ("joint", 6))])
QUICK = [
    "--set",
    f"stages={STAGES}",
    "--set",
    "data_chain.steps=3",
    "--set",
    "guard.every=2",
    "--set",
    "batch=20",
    "--set",
    'data.options={"size": 14, "n": 300}',
    "--threads",
    "1",
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the demo's data and method, cut short."""
    runs = tmp_path_factory.mktemp("runs")
    assert main(["train", "--runs", str(runs), "--name", "one", *QUICK]) == 0
    return runs / "one"


def drawn(file: Path) -> bool:
    """Whether a picture shows anything: more than a hundredth of it is not white."""
    picture = imread(file)[..., :3]
    return bool((picture < 0.9).any(-1).mean() > 0.01)


@pytest.mark.parametrize("number", ["4", "5", "6", "7", "8", "9", "10", "A.1"])
def test_figures_of_one_run(number: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "f.png"
    assert main(["figure", number, str(run), "--out", str(out), "--device", "cpu", "--json"]) == 0
    written = [Path(path) for path in json.loads(capsys.readouterr().out)["out"]]
    names = ["f-data-chain.png", "f-latent-chain.png"] if number == "4" else ["f.png"]
    assert [path.name for path in written] == names == sorted(path.name for path in tmp_path.iterdir())
    assert all(drawn(path) for path in written)


@pytest.mark.parametrize("number", ["1", "2", "3"])
def test_figures_of_several_runs(number: str, run: Path, tmp_path: Path) -> None:
    """A second run shows up: the picture is another one."""
    other = tmp_path / "other"
    shutil.copytree(run, other)
    config = json.loads((run / "config.json").read_text())
    config["config"]["preset"] = "demo/paper@beta=5"
    (other / "config.json").write_text(json.dumps(config))
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    moved = [{k: 2 * v if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    (other / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in moved))
    pictures = []
    for runs in ([run], [run, other]):
        assert main(["figure", number, *map(str, runs), "--out", str(tmp_path / "f.png")]) == 0
        pictures.append((tmp_path / "f.png").read_bytes())
        assert drawn(tmp_path / "f.png")
    assert pictures[0] != pictures[1]


def test_a_point_is_what_the_metrics_say(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs of a variant at two betas are one line, in the order of beta."""
    folders = []
    for beta, coherence in ((5.0, 0.25), (1.0, 0.75)):
        folder = tmp_path / f"{beta:g}"
        folder.mkdir()
        folders.append(folder)
        config = {"config": {"preset": f"demo/vae@beta={beta:g}", "loss": {"beta": beta}}}
        point = {"joint_coherence": coherence, "frechet": 10 * beta}
        metrics = {"points": {"vae": point, "xk": point}, "conditional": {"C": {"by_given": {"1": coherence / 2}}}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "metrics.json").write_text(json.dumps(metrics))
    seen = {}
    monkeypatch.setattr("mmebm.cli.figure.figures.scatter", lambda panels, out, **_: seen.update(panels) or out)
    coherence_and_distance(folders, tmp_path / "f.png")
    assert seen == {
        "unconditional": {"vae": [(10.0, 0.75, "β=1"), (50.0, 0.25, "β=5")]},
        "one modality given": {"vae": [(10.0, 0.375, "β=1"), (50.0, 0.125, "β=5")]},
    }


def test_what_cannot_be_drawn_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, message in (
        (["9", str(run), str(tmp_path)], "figure 9 is of one run, got 2"),
        (["1", str(tmp_path)], "metrics.json is missing: `mmebm evaluate"),
        (["2", str(tmp_path)], "has no log of loss_energy or gap"),
        (["9", str(run), "--out", "f.pdf"], "--out must end in .png, got 'f.pdf'"),
    ):
        assert main(["figure", *command, "--device", "cpu"]) == 1
        assert message in capsys.readouterr().err
