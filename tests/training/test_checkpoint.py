"""Checkpoints: whole or not at all, and never code."""

import errno
import os
import pickle
import random
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from mmebm.files import write_atomically
from mmebm.training import checkpoint

ROOT = Path(__file__).resolve().parents[2]


def content(iteration: int = 0, **changes: Any) -> dict[str, Any]:
    """What a checkpoint must have, and no more."""
    return {
        "format": checkpoint.FORMAT,
        "config": "{}",
        "iteration": iteration,
        "rollbacks": 0,
        "evaluations": 0,
        "system": {"weight": torch.arange(600.0).reshape(20, 30)},
        "optimisers": {},
        "snapshots": {},
        "starts": {"data": {}, "latent": {}},
        **changes,
    }


def test_round_trip(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "deep" / "c.pt", content(7))
    back = checkpoint.load(tmp_path / "deep" / "c.pt")
    assert back["iteration"] == 7 and torch.equal(back["system"]["weight"], content()["system"]["weight"])
    # still an archive that torch reads
    assert torch.load(tmp_path / "deep" / "c.pt", weights_only=True)["iteration"] == 7


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.pt"
    checkpoint.save(path, content(1))

    def broken(file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"c\.pt cannot be written: No space left on device"):
        write_atomically(path, broken)
    assert checkpoint.load(path)["iteration"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_a_full_disk_is_named_and_leaves_the_old_file(tmp_path: Path) -> None:
    """The limit of a file's size stands in for a full disk: write() fails in the middle of the file alike."""
    path = tmp_path / "c.pt"
    checkpoint.save(path, content(1))
    code = (
        "import resource, signal, sys, torch; from pathlib import Path; from mmebm.training import checkpoint\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100_000,) * 2)\n"
        "path = Path(sys.argv[1]); content = checkpoint.load(path)\n"
        "content['system']['weight'] = torch.zeros(100_000)\n"
        "try: checkpoint.save(path, content)\n"
        "except OSError as error: print(error); sys.exit(7)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 7, ended.stderr
    assert f"{path} cannot be written: File too large" in ended.stdout
    assert checkpoint.load(path)["iteration"] == 1
    # the second name of the old one, and no half of the new one
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.previous.pt", "c.pt"]


def test_every_flipped_bit_is_found(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "c.pt"
    checkpoint.save(path, content(3))
    whole = path.read_bytes()
    # anywhere, and all of the end, where the checksum itself is
    places = [*random.Random(seed).sample(range(8 * len(whole)), 300), *range(8 * len(whole) - 8 * 101, 8 * len(whole))]
    for place in places:
        changed = bytearray(whole)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            checkpoint.load(path)
    for length in random.Random(seed).sample(range(len(whole)), 50):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            checkpoint.load(path)
    path.write_bytes(whole)
    assert checkpoint.load(path)["iteration"] == 3


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"iteration": -1}, "iteration is -1"),
        ({"iteration": 2.0}, r"iteration is 2\.0"),
        ({"iteration": True}, "iteration is True"),
        ({"rollbacks": None}, "rollbacks is None"),
        ({"config": 3}, "it has no configuration"),
        ({"system": []}, "system is list"),
        ({"starts": {}}, "starts has no"),
        ({"system": {"a": torch.tensor([1.0, float("nan")])}}, r"system\.a holds numbers that are not finite"),
        ({"system": {"a": torch.tensor([1.0, float("-inf")])}}, r"system\.a holds numbers"),
        ({"averaged": {"module.a": torch.tensor(float("nan"))}}, r"averaged\.module\.a holds"),
        ({"snapshots": {"vae": {"a": torch.tensor(float("inf"))}}}, r"snapshots\.vae\.a holds"),
        ({"optimisers": {"energy": {"state": {0: {"exp_avg": torch.tensor(float("inf"))}}}}}, "exp_avg holds"),
        ({"optimisers": {"energy": {"param_groups": [{"eps": float("nan")}]}}}, r"param_groups\.0\.eps is nan"),
        ({"starts": {"data": {"buffer": {"data": [torch.tensor([float("inf")])]}}, "latent": {}}}, "data.buffer.data"),
    ],
)
def test_nonsense_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c.pt", content(**changes))
    with pytest.raises(ValueError, match=rf"c\.pt is not a checkpoint that training wrote: .*{message}"):
        checkpoint.load(tmp_path / "c.pt")


def test_masks_and_chains_that_have_not_begun_are_no_nonsense(tmp_path: Path) -> None:
    mask, ends = torch.tensor([0.0, float("-inf")]), torch.full((4, 2), float("nan"))
    system, starts = {"mask": mask}, {"data": {}, "latent": {"ends": ends}}
    given = content(
        system=system,
        averaged={"module.mask": mask},
        snapshots={"vae": {"mask": mask}},
        starts=starts,
        buffers=["mask"],
    )
    checkpoint.save(tmp_path / "c.pt", given)
    assert checkpoint.load(tmp_path / "c.pt")["starts"]["latent"]["ends"].isnan().all()
    given["system"] = {"mask": torch.tensor([0.0, float("nan")])}
    checkpoint.save(tmp_path / "c.pt", given)
    with pytest.raises(ValueError, match=r"system\.mask holds"):
        checkpoint.load(tmp_path / "c.pt")


def test_a_checkpoint_of_0_1_0_loads_with_a_note(tmp_path: Path) -> None:
    torch.save(content(5, format="mmebm-run-2"), tmp_path / "c.pt")
    with pytest.warns(UserWarning, match=r"c\.pt was written by an earlier version, without a checksum"):
        assert checkpoint.load(tmp_path / "c.pt")["iteration"] == 5
    # today's format without its checksum is no old file
    torch.save(content(5), tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c\.pt has lost its checksum"):
        checkpoint.load(tmp_path / "c.pt")


def test_the_checkpoint_before_is_kept_and_used_where_the_last_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    for iteration in (1, 2, 3):
        checkpoint.save(path, content(iteration))
    assert checkpoint.load(checkpoint.previous(path))["iteration"] == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.resume(path)["iteration"] == 3
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"c\.pt is damaged.*c\.previous\.pt is the one before it"):
        checkpoint.load(path)
    with pytest.warns(UserWarning, match=r"c\.pt is damaged.*Going on from .*c\.previous\.pt, iteration 2"):
        assert checkpoint.resume(path)["iteration"] == 2
    # a damaged one never takes the place of the good one
    checkpoint.save(path, content(4))
    assert checkpoint.load(checkpoint.previous(path))["iteration"] == 2
    path.unlink()
    with pytest.warns(UserWarning, match="iteration 2"):
        assert checkpoint.resume(path)["iteration"] == 2
    checkpoint.previous(path).unlink()
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        checkpoint.resume(path)


def test_a_save_after_a_kill_between_the_two_names_leaves_no_third(tmp_path: Path) -> None:
    """Both names are then one file, which a rename of one to the other leaves as it is (seed 1382703698)."""
    path = tmp_path / "c.pt"
    checkpoint.save(path, content(1))
    os.link(path, checkpoint.previous(path))
    checkpoint.save(path, content(2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.previous.pt", "c.pt"]
    assert [checkpoint.load(p)["iteration"] for p in (checkpoint.previous(path), path)] == [1, 2]


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
