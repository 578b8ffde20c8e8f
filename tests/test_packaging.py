"""What is in the wheel and the sdist, what importing costs, and what setup.py does without its tools."""

from __future__ import annotations

import email
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_COPIED = (".git", ".venv", "build", "dist", "*.egg-info", "*.so", "_build.json", "__pycache__", ".*_cache", "runs")

if sys.platform == "win32":
    pytest.skip("the source tree needs symbolic links", allow_module_level=True)


def copy_tree(to: Path) -> Path:
    shutil.copytree(ROOT, to, symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
    return to


def run(command: list[str], where: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    done = subprocess.run(command, cwd=where, env=env, capture_output=True, text=True, timeout=300)
    if check:
        assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done


def build(kind: str, source: Path, to: Path) -> Path:
    """Build a "wheel" or "sdist" of ``source`` without compiling anything; its path."""
    to.mkdir(parents=True)
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(to)!r}))"
    name = run([sys.executable, "-c", code], source, MMEBM_BUILD_CPU="0", MMEBM_BUILD_CUDA="0").stdout.split()[-1]
    return to / name


@pytest.fixture(scope="module")
def wheel_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the repository."""
    base = tmp_path_factory.mktemp("wheel")
    return build("wheel", copy_tree(base / "tree"), base / "dist")


@pytest.fixture(scope="module")
def wheel(wheel_path: Path) -> list[str]:
    """The file names in that wheel."""
    with zipfile.ZipFile(wheel_path) as archive:
        return sorted(archive.namelist())


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of an unpacked sdist built from a copy of the repository."""
    base = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("sdist", copy_tree(base / "tree"), base / "dist")) as archive:
        archive.extractall(base, filter="data")
    return next(path for path in base.glob("mmebm-*") if path.is_dir())


def sources(folder: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts}


def test_wheel_holds_the_package_and_nothing_else(wheel):
    files = {name for name in wheel if ".dist-info/" not in name}
    expected = sources("mmebm") | {f"mmebm/{name}" for name in sources("kernels")}
    assert "mmebm/noise.py" in expected
    assert files == expected | {"mmebm/py.typed", "mmebm/_build.json"}


def test_wheel_without_extensions_is_for_every_platform(wheel_path):
    assert wheel_path.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel_path) as archive:
        wheel = next(name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        assert "Root-Is-Purelib: true" in archive.read(wheel).decode()


def test_metadata_is_what_an_index_shows(wheel_path):
    with zipfile.ZipFile(wheel_path) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata["License-Expression"] == "MIT"
    assert {url.split(",")[0] for url in metadata.get_all("Project-URL")} >= {"Documentation", "Source", "Changelog"}
    assert metadata["Description-Content-Type"] == "text/markdown"
    text = metadata.get_payload()
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert len(links) > 10
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    # and each leads to a file of the repository
    files = [link.split("/blob/main/")[1].partition("#")[0] for link in links if "/blob/main/" in link]
    assert files and [file for file in files if not (ROOT / file).exists()] == []
    requires = metadata.get_all("Requires-Dist")
    base = {re.split(r"[ >=<\[;]", line)[0] for line in requires if "extra ==" not in line}
    train = {re.split(r"[ >=<\[;]", line)[0] for line in requires if 'extra == "train"' in line}
    model = {re.split(r"[ >=<\[;]", line)[0] for line in requires if 'extra == "model"' in line}
    assert base == {"torch", "numpy"}
    assert train == {"mmebm", "matplotlib", "pillow", "shtab", "tqdm"}
    assert model == {"pydantic", "safetensors", "tomli", "tomli-w"}


def test_citation_names_this_version():
    text = (ROOT / "CITATION.cff").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    version = re.search(r'^version = "(.*)"$', project, re.MULTILINE)
    assert version and f"\nversion: {version[1]}\n" in text
    source = re.search(r'^Source = "(.*)"$', project, re.MULTILINE)
    assert source and f'repository-code: "{source[1]}"' in text


def test_wheel_records_why_nothing_was_compiled(wheel_path):
    with zipfile.ZipFile(wheel_path) as archive:
        record = json.loads(archive.read("mmebm/_build.json"))
    assert record["mmebm._cpu"] == {"built": False, "reason": "at install: MMEBM_BUILD_CPU=0"}
    assert record["mmebm._cuda"] == {"built": False, "reason": "at install: MMEBM_BUILD_CUDA=0"}


def test_wheel_does_not_depend_on_what_lies_around(tmp_path, wheel):
    """A library, an object or a record of an earlier build in the tree must not travel."""
    tree = copy_tree(tmp_path / "tree")
    for name in ("_cpu.cpython-311-x86_64-linux-gnu.so", "_build.json", "stray.txt", "__pycache__/noise.pyc"):
        path = tree / "mmebm" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("stale")
    with zipfile.ZipFile(build("wheel", tree, tmp_path / "dist")) as archive:
        assert sorted(archive.namelist()) == wheel
        assert b"stale" not in archive.read("mmebm/_build.json")


def test_sdist_to_wheel_equals_repository_to_wheel(sdist, wheel, tmp_path):
    with zipfile.ZipFile(build("wheel", sdist, tmp_path / "dist")) as archive:
        assert sorted(archive.namelist()) == wheel


def test_sdist_can_compile_and_test(sdist):
    """Everything that a build and the tests read, which setuptools does not find by itself."""
    have = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    want = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    want |= sources("tests") | {"constraints.txt", "LICENSE", "setup.py", "pyproject.toml", "README.md"}
    assert want <= have, sorted(want - have)
    assert not [name for name in have if name.endswith((".so", ".pyc", ".o"))]


def test_kernels_is_the_committed_link():
    link = ROOT / "mmebm" / "kernels"
    if not link.is_symlink():
        assert (ROOT / "PKG-INFO").is_file(), "mmebm/kernels must be a symbolic link (in an sdist, real files)"
        return
    assert os.readlink(link) == "../kernels"
    assert link.resolve() == ROOT / "kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow the package `kernels` of others"
    if (ROOT / ".git").exists() and shutil.which("git"):
        staged = run(["git", "ls-files", "-s", "mmebm/kernels"], ROOT).stdout
        assert not staged or staged.startswith("120000 "), staged  # empty before the first commit


def test_a_tree_without_the_link_does_not_build(tmp_path):
    """Unpacking a .zip leaves a text file where the link was; the wheel would silently lack the kernels."""
    tree = copy_tree(tmp_path / "tree")
    link = tree / "mmebm" / "kernels"
    link.unlink() if link.is_symlink() else shutil.rmtree(link)
    link.write_text("../kernels")
    done = run([sys.executable, "setup.py", "--version"], tree, check=False)
    assert done.returncode != 0
    assert "lost the symbolic link mmebm/kernels" in done.stderr


def test_nothing_imports_the_top_level_kernels():
    """A file imported both as kernels.x and mmebm.kernels.x would be two modules, with two sets of registered ops."""
    wrong = re.compile(r"^\s*(import|from)\s+kernels\b", re.MULTILINE)
    folders = ("mmebm", "kernels", "tests", "benchmarks", "examples")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert files
    assert [str(path) for path in files if wrong.search(path.read_text())] == []
    assert wrong.search("from kernels import x") and wrong.search("    import kernels.x")


def test_kernels_are_imported_through_the_package(tmp_path):
    """In a fresh process with only PYTHONPATH set, from the kernels folder itself, where names could be shadowed."""
    modules = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
    assert "triton" not in modules, "kernels/triton.py would shadow triton for scripts run in kernels/"
    have_triton = run([sys.executable, "-c", "import triton"], tmp_path, check=False).returncode == 0
    names = [f"mmebm.kernels.{module}" for module in modules] if have_triton else []
    code = (
        "import importlib, sys, mmebm.kernels\n"
        f"modules = [importlib.import_module(name) for name in {names!r}]\n"
        "assert 'kernels' not in sys.modules\n"
        "origin = getattr(sys.modules.get('triton'), '__file__', None) or ''\n"
        f"assert not origin.startswith({str(ROOT / 'kernels')!r}), origin\n"
        "print(list(mmebm.kernels.__path__)[0])"
    )
    printed = run([sys.executable, "-c", code], ROOT / "kernels", PYTHONPATH=str(ROOT)).stdout.split()[-1]
    assert Path(printed) == ROOT / "mmebm" / "kernels"


def test_importing_mmebm_imports_neither_triton_nor_an_extension():
    code = (
        "import sys, mmebm, mmebm.backends, mmebm.native\n"
        "print([name for name in sys.modules if name in ('triton', 'mmebm._cpu', 'mmebm._cuda') "
        "or name.startswith('mmebm.kernels.')])"
    )
    # torch itself may import triton, which is not ours to forbid
    torch_only = "import sys, torch; print('triton' in sys.modules)"
    torch_too = run([sys.executable, "-c", torch_only], ROOT).stdout.split()[-1]
    loaded = run([sys.executable, "-c", code], ROOT, PYTHONPATH=str(ROOT)).stdout.splitlines()[-1]
    assert loaded == ("['triton']" if torch_too == "True" else "[]")


def test_importing_all_of_mmebm_loads_torch_and_numpy_only():
    """Beside what torch loads by itself, and the standard library; what an extra brings is imported when it is used."""
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import mmebm; [getattr(mmebm, name) for name in mmebm.__all__]\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "print(sorted(new - {'mmebm', 'torch', 'numpy'}))"
    )
    hidden = {"MMEBM_BACKEND": "torch", "PYTHONPATH": str(ROOT)}
    assert run([sys.executable, "-c", code], ROOT, **hidden).stdout.splitlines()[-1] == "[]"


def test_nothing_needs_a_unix_module_at_import():
    """On Windows there are no fcntl, resource and the like, and no SIGUSR1."""
    code = (
        "import importlib, pkgutil, signal, sys, torch, numpy, mmebm\n"
        "for name in ('fcntl', 'grp', 'pwd', 'resource', 'termios'): sys.modules[name] = None\n"
        "del signal.SIGUSR1\n"
        "names = [m.name for m in pkgutil.walk_packages(mmebm.__path__, 'mmebm.', lambda name: None)]\n"
        # what needs another package: Triton, a compiled extension, the adapters' libraries
        "skipped = ('mmebm.kernels', 'mmebm._', 'mmebm.adapters.')\n"
        "names = [name for name in names if not name.startswith(skipped)]\n"
        "for name in names: importlib.import_module(name)\n"
        "print(len(names))"
    )
    assert int(run([sys.executable, "-c", code], ROOT, PYTHONPATH=str(ROOT)).stdout.split()[-1]) > 100


OWN_DATA = """
import pathlib, sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {absent!r} else super().find_spec(name, path, target)

sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
import numpy as np
from PIL import Image

folder = pathlib.Path("birds")
(folder / "photo").mkdir(parents=True)
rng = np.random.default_rng(0)
rows = ["file,label,length,weight"]
for i in range(60):
    Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(folder / "photo" / f"{{i}}.png")
    rows.append(f"{{i}},{{'ab'[i % 2]}},{{rng.normal():.3f}},{{rng.normal():.3f}}")
(folder / "measures.csv").write_text("\\n".join(rows) + "\\n")
from mmebm.cli.main import main

assert main(["init", "birds", "--size", "8"]) == 0
small = ["--set", 'stages=[{{"kind": "warmup", "iterations": 3}}, {{"kind": "joint", "iterations": 2}}]',
         "--set", "batch=10", "--set", "data_chain.steps=2", "--device", "cpu", "--threads", "1"]
assert main(["train", "--config", "birds.toml", "--name", "birds", *small]) == 0
assert main(["sample", "runs/birds", "--n", "4", "--out", "grid.png"]) == 0
print("trained")
"""


@pytest.mark.slow
def test_own_data_needs_the_extra_train_only(tmp_path):
    """Photographs and a table, trained, judged and drawn, without what the extra `digits` brings."""
    absent = ("sklearn", "skimage", "mlxtend", "scipy", "pandas", "arviz_base")
    script = OWN_DATA.format(absent=absent)
    printed = run([sys.executable, "-c", script], tmp_path, PYTHONPATH=str(ROOT)).stdout
    assert printed.splitlines()[-1] == "trained"


@pytest.fixture
def bare(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A copy of the tree, and an environment in which no compiler can be found."""
    empty = tmp_path / "bin"
    empty.mkdir()
    hidden = {"PATH": str(empty), "CUDA_HOME": str(empty), "CXX": ""}
    return copy_tree(tmp_path / "tree"), {**hidden, "MMEBM_BUILD_CPU": "auto", "MMEBM_BUILD_CUDA": "auto"}


BUILD = [sys.executable, "setup.py", "build_ext", "--inplace"]


def test_setup_without_compilers_says_what_is_missing_and_goes_on(bare):
    tree, hidden = bare
    printed = run(BUILD, tree, **hidden).stdout
    assert "mmebm._cpu is not built: no C++ compiler found" in printed
    assert "mmebm._cuda is not built: nvcc not found" in printed
    code = "import runpy, setuptools; setuptools.setup = lambda **given: print(given['distclass']().has_ext_modules())"
    assert run([sys.executable, "-c", f"{code}\nrunpy.run_path('setup.py')"], tree, **hidden).stdout == "False\n"
    record = json.loads((tree / "mmebm" / "_build.json").read_text())
    assert "no C++ compiler" in record["mmebm._cpu"]["reason"]
    # and the package tells the user, with the remedy
    code = "from mmebm.backends import describe; print('\\n'.join(describe()))"
    text = run([sys.executable, "-c", code], tree, PYTHONPATH=str(tree)).stdout
    assert re.search(r"^cpp +missing +extension not built \(at install: no C\+\+ compiler found", text, re.MULTILINE)
    assert re.search(r"^cuda +missing +extension not built \(at install: nvcc not found", text, re.MULTILINE)
    assert "MMEBM_BUILD_CUDA=1 pip install" in text


@pytest.mark.parametrize("switch", ["MMEBM_BUILD_CPU", "MMEBM_BUILD_CUDA"])
def test_a_demanded_extension_that_cannot_be_built_is_an_error(bare, switch):
    tree, hidden = bare
    done = run(BUILD, tree, check=False, **{**hidden, switch: "1"})
    assert done.returncode != 0
    assert f"{switch}=1, but mmebm._" in done.stderr


def test_a_misspelt_switch_is_an_error(bare):
    tree, hidden = bare
    done = run(BUILD, tree, check=False, **{**hidden, "MMEBM_BUILD_CUDA": "yes"})
    assert done.returncode != 0
    assert "MMEBM_BUILD_CUDA must be auto, 0 or 1, got 'yes'" in done.stderr


@pytest.mark.skipif(not shutil.which("c++") and not shutil.which("g++"), reason="no C++ compiler to fail with")
def test_a_compile_error_is_an_error_also_in_auto(bare):
    tree, _ = bare
    for path in (tree / "csrc").glob("*/*.cpp"):
        path.unlink()
    (tree / "csrc" / "bind_cpu.cpp").write_text("this is not C++\n")
    done = run(BUILD, tree, check=False, MMEBM_BUILD_CPU="auto", MMEBM_BUILD_CUDA="0")
    assert done.returncode != 0
    assert "compiling the extensions failed" in done.stderr


def test_setup_does_not_need_torch(bare, tmp_path):
    """Neither to build nor as a build requirement: an isolated build would fetch another torch than the one in use."""
    tree, hidden = bare
    (tmp_path / "trap").mkdir()
    (tmp_path / "trap" / "torch.py").write_text("raise SystemExit('setup.py imported torch')")
    run(BUILD, tree, **hidden, PYTHONPATH=str(tmp_path / "trap"))
    requires = re.search(r"^requires = (.*)$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert requires and "setuptools" in requires[1] and "torch" not in requires[1]


def test_vector_flags_never_reach_a_baseline_file():
    """-mavx* only for kernels: one such flag on a common file is a crash on an older processor."""
    ninja = next((ROOT / "build").glob("temp.*/ninja/build.ninja"), None)
    if ninja is None:
        pytest.skip("nothing was built in this tree")
    rules = dict(re.findall(r"^rule (\S+)\n  command = (.*)$", ninja.read_text(), re.MULTILINE))
    assert any("-mavx" in command for command in rules.values()) == (os.uname().machine == "x86_64")
    for rule, source in re.findall(r"^build \S+: (\S+) (\S+\.(?:cpp|cu))$", ninja.read_text(), re.MULTILINE):
        assert source.endswith("cpu_kernel.cpp") or "-mavx" not in rules[rule], source
    for path in (ROOT / "csrc").glob("*/cpu_kernel.cpp"):
        # inline functions of the standard library would be merged with the baseline's copies (csrc/common/isa.h)
        assert not re.search(r"#include <(?!cstdint|cstring|math\.h)", path.read_text()), path
