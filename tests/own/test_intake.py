"""What `mmebm init` must not do with files: pair what does not belong together, write over what is not its own, keep
what is of another time, or propose what training refuses."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmebm.cli.main import main
from mmebm.data import load


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("src").mkdir()
    return tmp_path


def photos(names: Sequence[str], folder: str = "src/photo") -> None:
    """Photographs whose number stands in their first pixel."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        Image.fromarray(np.full((6, 6, 3), [i + 1, 0, 200], np.uint8)).save(f"{folder}/{name}")


def table(header: str, rows: Any) -> None:
    Path("src/m.csv").write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line with which init refuses, having written nothing."""
    before = sorted(map(str, Path().rglob("*")))
    assert main(["init", "src", *words]) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and sorted(map(str, Path().rglob("*"))) == before, said
    return said


def whole(name: str, folder: str = "src-arrays") -> np.ndarray:
    return np.concatenate([np.load(f"{folder}/{split}/{name}.npy") for split in ("train", "test")])


NUMBERED = [f"{i}.png" for i in range(1, 21)]


@pytest.mark.parametrize(
    "name", ["../../evil", "b/c", "b\\c", ".hid", "present", "items", "labels", "a.present", "type", "x" * 300]
)
def test_a_column_is_no_path_and_no_reserved_name(name: str, capsys: Any) -> None:
    table(f"a,{name}", [(i, f"text {i}") for i in range(20)])
    assert f"m.csv, column {name}: " in refused(capsys)


def test_files_and_folders_are_no_reserved_names_either(capsys: Any) -> None:
    photos(NUMBERED, "src/labels")
    assert "src/labels: a modality cannot be called 'labels', rename it" in refused(capsys)
    Path("src/labels").rename("src/present")
    assert "'present'" in refused(capsys)
    Path("src/present").rename("src/photo")
    np.save("src/items.npy", np.zeros((20, 2)))
    assert "'items'" in refused(capsys)
    Path("src/items.npy").unlink()
    table(",a", [(i, i) for i in range(20)])
    assert "m.csv has a column without a name" in refused(capsys)


def test_force_leaves_nothing_of_the_former_reading(capsys: Any) -> None:
    photos(NUMBERED)
    np.save("src/depth.npy", np.random.default_rng(0).normal(size=(20, 3)))
    table("id,w,label", [(i, i if i % 5 else "", f"c{i % 2}") for i in range(1, 21)])
    assert "goes by row" in refused(capsys)  # 10 before 2
    for i, name in enumerate(NUMBERED, 1):
        Path("src/photo", name).rename(f"src/photo/{i:02d}.png")
    table("id,w,label", [(f"{i:02d}", i if i % 5 else "", f"c{i % 2}") for i in range(1, 21)])
    assert main(["init", "src"]) == 0
    Path("src/depth.npy").unlink()
    table("id,w", [(f"{i:02d}", i) for i in range(1, 21)])
    Path("src/bad.npy").write_bytes(b"")
    refused(capsys, "--force")
    Path("src/bad.npy").unlink()
    assert main(["init", "src", "--force"]) == 0
    assert {file.name for file in Path("src-arrays").rglob("*.npy")} == {"m.npy", "photo.npy"}
    assert {m.name for m in load("folder", "train", path="src-arrays").modalities} == {"m", "photo"}


def test_what_is_there_already_is_not_written_over(capsys: Any) -> None:
    photos(NUMBERED)
    for place in ("mine/train/photo.npy", "mine/test/photo.npy", "mine/train.npz", "mine/validation/photo.npy"):
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        Path(place).write_bytes(b"theirs")
        for force in ([], ["--force"]):
            assert f"{place} is there already, and no earlier init wrote it" in refused(capsys, "--out", "mine", *force)
        assert Path(place).read_bytes() == b"theirs"
        Path(place).unlink()
    assert main(["init", "src", "--out", "mine"]) == 0


def test_names_twice_are_an_error_where_files_have_them(capsys: Any) -> None:
    photos(NUMBERED)
    table("id,weight", [(min(i, 19), i) for i in range(1, 21)])
    assert "m.csv, column id: '19' is in line 20 and in line 21" in refused(capsys)
    table("image,told", [(f"{i}.png", f"said {k} of {i}") for i in range(1, 21) for k in range(5)])
    assert "column image: '1' is in line 2 and in line 3: every tuple has one row" in refused(capsys)
    # of tables alone, too
    for i in range(1, 21):
        Path(f"src/photo/{i}.png").unlink()
    Path("src/photo").rmdir()
    table("id,weight", [(i, i) for i in range(1, 21)])
    Path("src/a.csv").write_text("id,size\n" + "".join(f"{min(i, 19)},{i}\n" for i in range(1, 21)))
    assert "a.csv, column id: '19' is in line 20 and in line 21" in refused(capsys)


@pytest.mark.parametrize(
    "header, row",
    [
        ("photo_id,weight", lambda i: (i, i)),
        ("image,id,weight", lambda i: (f"{i}.png", 100 + i, i)),
        ("id,image,weight", lambda i: (100 + i, f"{i}.png", i)),
        ("rank,id,weight", lambda i: (21 - i, i, i)),
        ("File,weight", lambda i: (f"photo/{i}.PNG", i)),
    ],
)
def test_the_column_that_holds_the_names_pairs(header: str, row: Any, capsys: Any) -> None:
    photos(NUMBERED)
    table(header, [row(i) for i in range(20, 0, -1)])
    assert main(["init", "src"]) == 0
    assert "m: paired by the column" in capsys.readouterr().out
    assert np.array_equal(whole("photo")[:, 0, 0, 0], whole("m")[:, -1])


def test_two_columns_of_names_in_another_order_are_not_chosen_from(capsys: Any) -> None:
    photos(NUMBERED)
    table("image,id,weight", [(f"{i}.png", 21 - i, i) for i in range(1, 21)])
    assert "the columns image and id both hold the names of the files, in another order" in refused(capsys)
    table("rank,photo_id,weight", [(21 - i, i, i) for i in range(1, 21)])
    assert "call the one that says which tuple a row belongs to 'id'" in refused(capsys)


def test_rows_go_by_numbered_names_only_where_there_is_one_order(capsys: Any) -> None:
    photos(NUMBERED)
    Path("src/told.txt").write_text("".join(f"line number {i}\n" for i in range(1, 21)))
    said = refused(capsys)
    assert "src/told.txt goes by row" in said and "row 2 is '10' or, in another order, '2'" in said
    for i, name in enumerate(NUMBERED, 1):
        Path("src/photo", name).rename(f"src/photo/{i:02d}.png")
    assert main(["init", "src"]) == 0
    assert [f"line number {i}" for i in whole("photo")[:, 0, 0, 0]] == whole("told").tolist()


def test_rows_go_by_the_table_that_names_them(capsys: Any) -> None:
    table("id,weight", [(i, i) for i in range(20, 0, -1)])
    np.save("src/depth.npy", np.arange(20.0, 0, -1)[:, None])
    assert main(["init", "src"]) == 0
    assert np.array_equal(whole("m"), whole("depth"))
    Path("src/z.csv").write_text("id,size\n" + "".join(f"{i},{i}\n" for i in range(1, 21)))
    assert "src/depth.npy goes by row" in refused(capsys, "--force")


def test_names_with_dots_and_accents(capsys: Any) -> None:
    names = [f"é.{i:02d}" for i in range(20)]
    photos([unicodedata.normalize("NFD", f"{name}.png") for name in names])
    table("file,weight", [(unicodedata.normalize("NFC", name), i + 1) for i, name in enumerate(names)][::-1])
    assert main(["init", "src"]) == 0, capsys.readouterr().err
    assert np.array_equal(whole("photo")[:, 0, 0, 0], whole("m")[:, 0])


@pytest.mark.parametrize(
    "content, message",
    [
        ("a,b\n" + "".join(f"{i},{chr(34) if i == 7 else ''}wide {i}\n" for i in range(20)), "begins in line 9 has"),
        (
            "a,b\n" + "".join(f"{i},{chr(34) if i in (7, 9) else ''}wide {i}\n" for i in range(20)),
            "begins in line 9 has a quote too few or too many",
        ),
        ('a,told\n\n0,"two\nlines"\n' + "1,x\n" * 20 + "12 cm,y\n", "in line 25 of the file, '12 cm'"),
        ('a,told\n\n0,"two\nlines"\n1\n', "see line 5"),
        ("a,b\n" + "".join(f"{i}e300,{i}\n" for i in range(1, 21)), "column a"),
    ],
)
def test_broken_tables_name_the_line(content: str, message: str, capsys: Any) -> None:
    Path("src/m.csv").write_text(content)
    assert message in refused(capsys)


def test_names_in_quotes_divide_nothing() -> None:
    Path("src/m.csv").write_text(
        '"length, in mm, at rest";"colour"\n' + "".join(f"{i},5;x{i % 2}\n" for i in range(20))
    )
    assert main(["init", "src"]) == 0
    assert sorted(whole("m")[:, 0]) == [i + 0.5 for i in range(20)] and set(whole("colour")) == {"x0", "x1"}


def test_long_cells_are_cells() -> None:
    long = "word " * 60_000
    table("a,told", [(i, f"{long if i == 7 else 'short'} {i}") for i in range(20)])
    assert main(["init", "src"]) == 0
    assert max(map(len, whole("told").tolist())) > 131_072


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((20, 2, 2, 2, 2)), "src/x.npy has shape"),
        (np.zeros((20, 16, 16, 16), np.uint8), "which of its sizes is that of the channels, 16 or 16"),
        (np.full((20, 2), 1e300), "src/x.npy: row 0 (from 0) holds a value that is not finite, or beyond 1e+30"),
        (np.where(np.arange(20) == 4, np.inf, 1.0), "src/x.npy: row 4 (from 0)"),
        (np.zeros((20, 0)), "src/x.npy must hold a row for each tuple, got shape (20, 0)"),
        (np.float64(3), "src/x.npy must hold a row for each tuple, got shape ()"),
        (np.zeros(20, complex), "src/x.npy: arrays hold numbers or strings"),
    ],
)
def test_arrays_that_training_would_refuse(array: Any, message: str, capsys: Any) -> None:
    np.save("src/x.npy", array)
    assert message in refused(capsys)


def test_masks_and_two_channels_are_images() -> None:
    mask = np.random.default_rng(0).random((20, 5, 6)) < 0.5
    np.save("src/mask.npy", mask)
    np.save("src/flow.npy", np.random.default_rng(0).random((20, 9, 7, 2)))
    assert main(["init", "src"]) == 0
    data = load("folder", "train", path="src-arrays")
    assert {m.name: m.shape for m in data.modalities} == {"flow": (2, 9, 7), "mask": (1, 5, 6)}
    assert set(data.batch(np_rows(18))["mask"].unique().tolist()) == {-1.0, 1.0}


def np_rows(n: int) -> Any:
    import torch

    return torch.arange(n)


def test_arrays_by_split_are_checked_in_both(capsys: Any) -> None:
    for split, n in (("train", 20), ("test", 5)):
        Path("src", split).mkdir()
        np.save(f"src/{split}/x.npy", np.where(np.arange(n) == 3, np.inf if split == "test" else 1.0, 1.0))
        np.save(f"src/{split}/items.npy", np.arange(n))
    assert "src, x, test: row 3 (from 0) holds" in refused(capsys)
    np.save("src/test/x.npy", np.ones(5))
    np.save("src/train/type.npy", np.ones(20))
    assert "both splits need the same modalities, but beside" in refused(capsys)
    np.save("src/test/type.npy", np.ones((5, 2)))
    assert "rows of a modality have one size in both splits" in refused(capsys)
    np.save("src/test/type.npy", np.ones(5))
    assert "src, type: a modality cannot be called 'type'" in refused(capsys)
    Path("src/train/type.npy").unlink()
    Path("src/test/type.npy").unlink()
    assert main(["init", "src"]) == 0
    assert list(json.loads(Path("src/meta.json").read_text())["modalities"]) == ["x"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipes_are_not_waited_for(capsys: Any) -> None:
    photos(NUMBERED)
    os.mkfifo("src/m.csv")
    os.mkfifo("src/photo/a.png")
    assert "src/photo/a.png cannot be read as an image: it is no file" in refused(capsys)
    Path("src/photo/a.png").unlink()
    assert main(["init", "src"]) == 0
    assert "not read: m.csv" in capsys.readouterr().out
