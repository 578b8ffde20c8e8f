"""The test split is for the end: every use is written down, and the second one says so."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmebm.cli.evaluate import TEST_USES, _uses_of_test, metrics_file, said_of_test
from mmebm.cli.main import main


def test_uses_are_counted_in_the_runs_folder(tmp_path: Path) -> None:
    run: Any = SimpleNamespace(folder=tmp_path)
    assert len(_uses_of_test(run, {"n": 100, "seed": 0})) == 1
    # a checkpoint that was kept is of its run
    kept: Any = SimpleNamespace(folder=tmp_path / "checkpoints" / "best")
    uses = _uses_of_test(kept, {"n": 200, "seed": 3})
    assert json.loads((tmp_path / TEST_USES).read_text()) == uses and len(uses) == 2
    assert [(use["checkpoint"], use["n"]) for use in uses] == [("last", 100), ("best", 200)]
    assert all({"when", "version"} <= set(use) for use in uses)


def test_what_is_said() -> None:
    assert said_of_test(1) == "test split evaluated once, now"
    assert said_of_test(3).startswith("test split evaluated 3 times") and "chosen on test" in said_of_test(3)
    usual: Any = SimpleNamespace(judged_on="validation")
    assert (metrics_file(usual, "validation"), metrics_file(usual, "test")) == ("metrics.json", "metrics-test.json")
    old: Any = SimpleNamespace(judged_on="test")  # a run that has no validation
    assert metrics_file(old, "test") == "metrics.json"


def test_train_is_no_split_to_measure_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "run", "--split", "train"])
    assert "invalid choice: 'train'" in capsys.readouterr().err
