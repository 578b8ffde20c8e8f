"""Presets: functions that return the whole configuration; packages offer others by entry points
(:mod:`mmebm.plugins`). "preset/variant" is a named change of one (:mod:`mmebm.training.variants`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from mmebm import plugins
from mmebm.training.config import Config
from mmebm.training.presets import base, demo, paper, polymnist_5k, polymnist_14, published
from mmebm.training.variants import variant

PRESETS: dict[str, Callable[[], Config]] = {
    "demo": demo.config,
    "demo-energy-prior": demo.energy_prior,
    "base": base.config,
    "paper": paper.config,
    "polymnist-5k": polymnist_5k.config,
    "polymnist-14": polymnist_14.config,
    "polymnist-14-energy-prior": polymnist_14.energy_prior,
    "polymnist": published.polymnist,
    "polyfashion": published.polyfashion,
    "mnist-svhn-text": published.mnist_svhn_text,
    "cub": published.cub,
    "cub-128": partial(published.cub, 128),
    "coco": published.coco,
    "coco-128": partial(published.coco, 128),
}


def preset(name: str) -> Config:
    """The configuration of that name, e.g. ``"demo"`` or ``"demo/coopnets"``.

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    start, slash, change = name.partition("/")
    make = PRESETS.get(start) or plugins.offered("presets", start)
    if make is None:
        raise ValueError(f"preset must be one of {sorted([*PRESETS, *plugins.names('presets')])}, got {start!r}")
    return variant(make(), change) if slash else make()
