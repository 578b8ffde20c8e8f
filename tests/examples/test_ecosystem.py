"""The training loops of others: two processes learn what one does, and the page quotes the scripts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "ecosystem"
LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", sys.executable)
# A script, and then the threads that it leaves behind: one of Gloo's aborts the process now and then as Python ends
RUN = """
import glob, runpy, sys
sys.path.insert(0, sys.argv[1].rpartition("/")[0])
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
left = [open(path).read().strip() for path in glob.glob("/proc/self/task/*/comm")]
assert not [name for name in left if "gloo" in name], left
"""
SCRIPTS = {"plain_ddp": "torch", "with_accelerate": "accelerate", "with_lightning": "lightning"}


def learned(name: str, processes: int, out: Path) -> dict[str, torch.Tensor]:
    launch = LAUNCH if processes > 1 and name != "with_lightning" else ()
    words = ["--iterations", "6", "--batch", "32", "--out", str(out), "--processes", str(processes)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *launch, "-c", RUN, str(FOLDER / f"{name}.py"), *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert f"{processes} processes, 6 iterations" in done.stdout
    return torch.load(out, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_two_processes_learn_what_one_does(name: str, tmp_path: Path) -> None:
    pytest.importorskip(SCRIPTS[name])
    if not torch.distributed.is_available():
        pytest.skip("torch without torch.distributed")
    one, two = (learned(name, processes, tmp_path / f"{processes}.pt") for processes in (1, 2))
    # The gradient is summed in another order: float32's 6e-8, which Adam divides by the gradient's size; a step of
    # 1e-3 then differs by about 1e-3 times that of the smallest gradients, measured 3e-6. Chains that were not placed
    # by their rank differ by the steps themselves.
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 5e-5
    start = {key: value for key, value in one.items() if value.dim() == 2}
    assert all(value.abs().max() > 0 for value in start.values())


def test_the_page_quotes_the_scripts() -> None:
    page = (ROOT / "docs" / "ecosystem.md").read_text()
    blocks = re.findall(r"^<!-- (\w+\.py) -->\n```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert {name for name, _ in blocks} == {f"{name}.py" for name in SCRIPTS}
    for name, block in blocks:
        assert block in re.sub(r"^    ", "", (FOLDER / name).read_text(), flags=re.MULTILINE), name
