"""Presets: one file each, a ``config()`` that returns the whole configuration."""

from __future__ import annotations

from collections.abc import Callable

from mmebm.training.config import Config
from mmebm.training.presets import demo, paper, polymnist_5k

PRESETS: dict[str, Callable[[], Config]] = {
    "demo": demo.config,
    "paper": paper.config,
    "polymnist-5k": polymnist_5k.config,
}


def preset(name: str) -> Config:
    """The configuration of that name.

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {name!r}")
    return PRESETS[name]()
