"""Checkpoints: whole or not at all, and never code."""

import pickle
from pathlib import Path

import pytest
import torch

from mmebm.files import write_atomically
from mmebm.training import checkpoint


def test_round_trip(tmp_path: Path) -> None:
    content = {"format": checkpoint.FORMAT, "iteration": 7, "weights": {"a": torch.arange(3.0)}}
    checkpoint.save(tmp_path / "deep" / "c.pt", content)
    back = checkpoint.load(tmp_path / "deep" / "c.pt")
    assert back["iteration"] == 7 and torch.equal(back["weights"]["a"], torch.arange(3.0))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"format": checkpoint.FORMAT, "iteration": 1})

    def broken(file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, broken)
    assert checkpoint.load(path)["iteration"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nothing\.pt"):
        checkpoint.load(tmp_path / "nothing.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        checkpoint.load(tmp_path / "text.pt")
    torch.save({"other": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="not a checkpoint of this library"):
        checkpoint.load(tmp_path / "other.pt")


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("executed"),))


def test_loading_executes_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with open("evil.pt", "wb") as file:
        pickle.dump({"format": checkpoint.FORMAT, "x": Evil()}, file)
    torch.save({"format": checkpoint.FORMAT, "x": Evil()}, "evil2.pt")
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(ValueError, match="not a readable checkpoint"):
            checkpoint.load(tmp_path / name)
    assert not Path("executed").exists()
