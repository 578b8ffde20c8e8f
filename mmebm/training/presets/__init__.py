"""Presets: one file each, a ``config()`` that returns the whole configuration. "preset/variant" is a named change of
one (:mod:`mmebm.training.variants`)."""

from __future__ import annotations

from collections.abc import Callable

from mmebm.training.config import Config
from mmebm.training.presets import demo, paper, polymnist_5k, polymnist_14
from mmebm.training.variants import variant

PRESETS: dict[str, Callable[[], Config]] = {
    "demo": demo.config,
    "paper": paper.config,
    "polymnist-5k": polymnist_5k.config,
    "polymnist-14": polymnist_14.config,
}


def preset(name: str) -> Config:
    """The configuration of that name, e.g. ``"demo"`` or ``"demo/coopnets"``.

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    base, slash, change = name.partition("/")
    if base not in PRESETS:
        raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {base!r}")
    return variant(PRESETS[base](), change) if slash else PRESETS[base]()
