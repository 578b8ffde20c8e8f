"""Chains that several processes share: their offsets, over Gloo, and that their noise is then that of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import mmebm

ROOT = Path(__file__).resolve().parents[2]
PROCESS = """
import sys, torch, torch.distributed as dist, mmebm
folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=3)
chains = [3, 1, 4][rank]
torch.manual_seed(0)  # as every rank does
offset = mmebm.rank_offset(chains)
x = mmebm.langevin(lambda x: x.square().sum(1), torch.zeros(chains, 2), 3, step_size=0.1, chain_offset=offset)
torch.save((offset, x), f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.skipif(not dist.is_gloo_available(), reason="no Gloo here")
def test_chains_of_three_processes_are_those_of_one(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", PROCESS, str(tmp_path), str(rank)], env=environment)
        for rank in range(3)
    ]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    offsets, states = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(3)), strict=True)
    assert offsets == (0, 3, 4)
    torch.manual_seed(0)
    one = mmebm.langevin(lambda x: x.square().sum(1), torch.zeros(8, 2), 3, step_size=0.1)
    assert torch.equal(torch.cat(states), one)


def test_one_process_has_offset_0() -> None:
    assert mmebm.rank_offset(7) == 0
    with pytest.raises(TypeError, match=r"chains must be an int of at least 0, got 1\.5"):
        mmebm.rank_offset(1.5)  # type: ignore[arg-type]
