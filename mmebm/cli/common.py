"""What several commands do."""

from __future__ import annotations

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
