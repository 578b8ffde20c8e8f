"""What several commands do."""

from __future__ import annotations

import resource

import torch


def pick_device(name: str) -> torch.device:
    """The device of ``--device``.

    Raises:
        ValueError: for "cuda" where torch sees no GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; use --device cpu or auto")
    return torch.device(name)


def peak_memory(device: torch.device) -> float:
    """The most memory held so far, MiB: tensors on a GPU; on the CPU the whole process and what came before."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts it in KiB
