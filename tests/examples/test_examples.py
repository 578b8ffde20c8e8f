"""Every example runs, its two loops agree, and it writes its picture."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("PIL", reason="the examples write pictures with Pillow (pip install 'mmebm[train]')")

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(p.stem for p in (ROOT / "examples").glob("*.py") if p.stem != "shared")
# the latent space EBM has two chains
CHAINS = {"latent_ebm": 2}


def run(name: str, folder: Path) -> str:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--quick", "--out", str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_example_runs_and_its_loops_agree(name, tmp_path):
    out = run(name, tmp_path)
    chains = CHAINS.get(name, 1)
    differences = [float(d) for d in re.findall(r"^agree: the two loops differ by at most (\S+)$", out, re.MULTILINE)]
    assert len(differences) == chains
    # what examples/shared.py asserts: rounding of float64, amplified by the chain
    assert max(differences) < 1e-9
    ratios = re.findall(r"^time: by hand (\S+) ms, ours (\S+) ms, ratio (\S+)$", out, re.MULTILINE)
    assert len(ratios) == chains and all(float(t) > 0 for row in ratios for t in row)
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_of_examples_names_them_all():
    table = (ROOT / "examples" / "README.md").read_text()
    assert sorted(re.findall(r"^\| \[`(\w+)\.py`\]", table, re.MULTILINE)) == SCRIPTS
