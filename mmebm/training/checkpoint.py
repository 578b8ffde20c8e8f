"""Checkpoints: written atomically, read without executing code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mmebm.files import write_atomically

FORMAT = "mmebm-run-2"


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes ``content`` (tensors, numbers, strings, lists, dicts) to ``path``."""
    write_atomically(path, lambda file: torch.save(content, file))


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads a checkpoint; nothing in it is executed.

    Raises:
        FileNotFoundError: naming the path and how such a file comes about.
        ValueError: where the file is not a checkpoint of this library.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: `mmebm train` writes one into its run folder")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a readable checkpoint: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this library (format {FORMAT})")
    return content
