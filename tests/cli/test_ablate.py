"""``mmebm ablate``: every variant trained once, one table, and what was finished is not trained again."""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path
from typing import Any

import pytest

from mmebm.cli import ablate
from mmebm.cli.main import main

STAGES = json.dumps([{"kind": "warmup", "iterations": 16}, {"kind": "joint", "iterations": 4}])
QUICK = [
    "--set",
    f"stages={STAGES}",
    "--set",
    "data_chain.steps=3",
    "--set",
    'data.options={"size": 14, "n": 300}',
    "--set",
    "batch=20",
    "--n",
    "200",
    "--threads",
    "1",
    "--device",
    "cpu",
]


def test_grid_to_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "grid"
    command = ["ablate", "--variants", "abp", "--seeds", "3", "4", "--scale", "0.5", "--out", str(out), *QUICK]
    assert main(command) == 0
    content = json.loads((out / "table.json").read_text())
    rows = content["rows"]
    assert content["split"] == "validation" and content["n"] == 200
    assert [(row["variant"], row["point"]) for row in rows] == [("abp", point) for point in ("vae", "x0")]
    assert all(row["seeds"] == [3, 4] for row in rows)
    # without an energy there is nothing that revises x0, and no third way of completing
    assert {"A: decode, 1 given", "B: latent chain, 2 given"} < set(rows[1]["numbers"])
    assert "C" not in {key[0] for key in rows[1]["numbers"]}
    metrics = [json.loads((out / f"abp-{seed}" / "metrics.json").read_text()) for seed in (3, 4)]
    values = [m["points"]["x0"]["frechet"] for m in metrics]
    row = next(r for r in rows if r["variant"] == "abp" and r["point"] == "x0")
    # 12.706 is the .975 quantile of Student's law with one degree of freedom
    half = pytest.approx(12.706 * statistics.stdev(values) / 2**0.5, rel=1e-4)
    assert row["numbers"]["frechet"] == {"mean": pytest.approx(statistics.mean(values)), "interval": half} | {
        "values": values
    }
    # 8 warm-up iterations need no chain; 2 joint ones 20 rows and 20 latent steps each
    assert row["numbers"]["evaluations"] == {"mean": 2 * 20 * 20, "interval": 0.0, "values": [800, 800]}
    # a seed is of weights, pairing and judges
    configs = [json.loads((out / f"abp-{seed}" / "config.json").read_text()) for seed in (3, 4)]
    assert [(c["seed"], c["data"]["seed"]) for c in configs] == [(3, 3), (4, 4)]
    for kind in ("classifiers", "second-judge"):
        files = [(out / f"{kind}-{seed}.pt").read_bytes() for seed in (3, 4)]
        assert files[0] != files[1] and files[0] == (out / "abp-3" / f"{kind}.pt").read_bytes()
    text = (out / "table.md").read_text()
    assert text.count("\n| abp | ") == 2 and "| abp | x0 | 2 |" in text

    stamps = {path: os.stat(path).st_mtime_ns for path in out.glob("*/checkpoint.pt")}
    (out / "abp-3" / "metrics.json").unlink()
    capsys.readouterr()
    assert main(command) == 0
    # only what was not finished is evaluated again, from its checkpoint
    assert capsys.readouterr().out.count("== ") == 1
    assert (out / "abp-3" / "metrics.json").is_file()
    assert all(os.stat(path).st_mtime_ns == stamp for path, stamp in stamps.items() if "abp-3" not in str(path))
    again = json.loads((out / "table.json").read_text())["rows"]
    assert again[0]["numbers"]["joint_coherence"] == rows[0]["numbers"]["joint_coherence"]

    # the test split, once: a second table does not use it again
    for _ in range(2):
        assert main([*command, "--split", "test", "--pairs", "abp/x0:abp/vae"]) == 0
        of = json.loads((out / "table-test.json").read_text())
        assert of["split"] == "test" and of["test evaluated"] == {"least": 1, "most": 1}
    assert json.loads((out / "table.json").read_text())["split"] == "validation"
    (pair,) = of["pairs"]
    assert (pair["of"], pair["minus"]) == ("abp/x0", "abp/vae")
    x0, vae = (next(r["numbers"]["frechet"] for r in of["rows"] if r["point"] == p)["values"] for p in ("x0", "vae"))
    assert pair["differences"]["frechet"]["values"] == pytest.approx([x0[0] - vae[0], x0[1] - vae[1]])
    text = (out / "table-test.md").read_text()
    assert "test split evaluated once" in text and "Paired differences" in text and "| abp/x0 | abp/vae | " in text


def test_names_are_grids_or_variants() -> None:
    assert ablate.variants_of(["baselines", "mvae", "vae"]) == ["mvae", "mmvae", "mopoe", "mvtcae", "mmvae+", "vae"]
    with pytest.raises(ValueError, match="'nothing' is no grid"):
        ablate.variants_of(["nothing"])


def number(mean: float | None, *values: float, interval: float | None = None) -> dict[str, Any]:
    return {"mean": mean, "interval": interval, "values": list(values)}


def test_table_says_nothing_where_nothing_was_measured() -> None:
    numbers = {
        "joint_coherence": number(0.5),
        "chance_joint": number(0.01, interval=0.002),
        "frechet": number(12.34),
        "seconds": ablate._spread([float("nan")]),
        "evaluations": number(2.5e6),
    }
    row = {"variant": "ebm", "point": "xk", "seeds": [0], "numbers": numbers}
    text = ablate.table({"preset": "demo", "split": "validation", "rows": [row], "real": {"frechet": number(0.5)}})
    lines = text.splitlines()
    assert lines[-2] == "| ebm | xk | 1 | 0.500 |  | 0.010 ± 0.002 |  | 12.3 |  |  |  |  |  |  | 2.5 |"
    assert lines[-1] == "| real |  | 1 |  |  |  |  | 0.5 |  |  |  |  |  |  |  |"
    assert lines[0] == "Variants of `demo` on validation: mean ± half of the 95 % interval over seeds (Student)."
    assert ablate._spread([]) == {"mean": None, "interval": None, "values": []}


def run_of(coherence: float, frechet: float, **more: Any) -> dict[str, Any]:
    return {
        "points": {"vae": {"n": 10, "joint_coherence": coherence, "frechet": frechet}},
        "conditional": {},
        "seconds": {},
        "settings": {"evaluations": 0, "n": 10},
        **more,
    }


def test_differences_are_of_one_seed() -> None:
    """Two variants far apart in each seed, and the seeds further apart still: only pairs tell."""
    results = {
        "a": [run_of(c, 1.0) for c in (0.1, 0.5, 0.9)],
        "b": [run_of(c - 0.05, 1.0) for c in (0.1, 0.5, 0.9)],
        "c": [run_of(c, 1.0) for c in (0.9, 0.1, 0.5)],
    }
    found = ablate.differences(results, ("a", None), ("b", "vae"))["differences"]
    assert found["joint_coherence"]["mean"] == pytest.approx(0.05)
    assert found["joint_coherence"]["interval"] == pytest.approx(0, abs=1e-9)
    other = ablate.differences(results, ("a", None), ("c", None))["differences"]["joint_coherence"]
    assert other["mean"] == pytest.approx(0, abs=1e-9) and other["interval"] > 0.9
    assert "seconds" not in found and "n" not in found
    with pytest.raises(ValueError, match="variant 'a' has no point 'xk'"):
        ablate.differences(results, ("a", "xk"), ("b", None))
    for text in ("a", "a:d", "a:b:c"):
        with pytest.raises(ValueError, match="--pairs takes A:B"):
            ablate.pair_of(text, list(results))
    diverged = ablate.summary({"a": [run_of(0.1, 1.0, diverged=True), run_of(0.2, 1.0)]}, [0, 1])
    assert diverged["rows"][0]["diverged"] == 1
    assert "| a (1 diverged) | vae | 2 |" in ablate.table({"preset": "demo", **diverged})


def test_settings_are_chosen_on_the_validation_and_then_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, Any, Any, Any]] = []

    def measured(folder: Path, name: str, seed: int, home: Path, arguments: Any, changes: Any, split: Any, *scale: Any):
        asked.append((folder.name, dict(changes), split, scale))
        return run_of({"1": 0.2, "2.5": 0.6, "5": 0.4}[changes.get("loss.beta", "1")], 3.0)

    monkeypatch.setattr(ablate, "_one", measured)
    command = ["ablate", "--variants", "vae", "mvae", "--seeds", "0", "1", "--out", str(tmp_path), "--split", "test"]
    assert main([*command, "--tune", "loss.beta=1,2.5,5", "--tune-scale", "0.5"]) == 0
    tries, runs = [a for a in asked if a[3]], [a for a in asked if not a[3]]
    assert len(tries) == 6 and all(split == "validation" and scale == (0.5,) for _, _, split, scale in tries)
    assert [(folder, changes, split) for folder, changes, split, _ in runs] == [
        (f"{name}-{seed}", {"loss.beta": "2.5"}, "test") for seed in (0, 1) for name in ("vae", "mvae")
    ]
    record = json.loads((tmp_path / "tuning.json").read_text())
    assert record["by"] == "joint_coherence"
    assert [t["mean"] for t in record["variants"]["mvae"]["tries"]] == [0.2, 0.6, 0.4]
    assert "* vae: loss.beta=2.5" in (tmp_path / "table-test.md").read_text()
    assert main([*command, "--tune", "loss.beta=1,5", "--select", "beauty"]) == 1
    assert "--select must be one of" in capsys.readouterr().err


def test_a_run_with_other_settings_is_not_taken_for_the_chosen_one(tmp_path: Path) -> None:
    folder = tmp_path / "vae-0"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"config": {"loss": {"beta": 1.0}, "stages": [{"lr": 2}]}}))
    ablate._check_settings(folder, {})
    ablate._check_settings(folder, {"loss.beta": "1", "stages.0.lr": "2"})
    with pytest.raises(ValueError, match=r"vae-0 holds a run with other settings than the chosen loss.beta=2.5"):
        ablate._check_settings(folder, {"loss.beta": "2.5"})
