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
    rows = json.loads((out / "table.json").read_text())
    assert [(row["variant"], row["point"]) for row in rows] == [("abp", point) for point in ("vae", "x0")]
    assert all(row["seeds"] == 2 for row in rows)
    # without an energy there is nothing that revises x0, and no third way of completing
    assert {"A: decode, 1 given", "B: latent chain, 2 given"} < set(rows[1]) and "C" not in {key[0] for key in rows[1]}
    metrics = [json.loads((out / f"abp-{seed}" / "metrics.json").read_text()) for seed in (3, 4)]
    values = [m["points"]["x0"]["frechet"] for m in metrics]
    row = next(r for r in rows if r["variant"] == "abp" and r["point"] == "x0")
    assert row["frechet"] == pytest.approx([statistics.mean(values), statistics.stdev(values)])
    # 8 warm-up iterations need no chain; 2 joint ones 20 rows and 20 latent steps each
    assert row["evaluations"] == [2 * 20 * 20, 0.0]
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
    assert json.loads((out / "table.json").read_text())[0]["joint_coherence"] == rows[0]["joint_coherence"]


def test_names_are_grids_or_variants() -> None:
    assert ablate.variants_of(["baselines", "mvae", "vae"]) == ["mvae", "mmvae", "mopoe", "mvtcae", "mmvae+", "vae"]
    with pytest.raises(ValueError, match="'nothing' is no grid"):
        ablate.variants_of(["nothing"])


def test_spread() -> None:
    assert ablate.spread([]) == [None, None]
    assert ablate.spread([2.0]) == [2.0, None]
    assert ablate.spread([1.0, 3.0]) == [2.0, pytest.approx(2**0.5)]


def test_table_says_nothing_where_nothing_was_measured() -> None:
    row: dict[str, Any] = {
        "variant": "ebm",
        "point": "xk",
        "seeds": 1,
        "joint_coherence": [0.5, None],
        "chance_joint": [0.01, None],
        "class_share_min": [0.1, None],
        "frechet": [12.34, None],
        "seconds": [float("nan"), None],
        "evaluations": [2.5e6, None],
    }
    line = ablate.table([row], "demo").splitlines()[-1]
    assert line == "| ebm | xk | 1 | 0.500 | 0.010 | 0.100 | 12.3 |  | 2.5 |"
