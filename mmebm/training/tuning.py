"""Settings to choose among, the same for every variant, and equal measured time for all of them.

A comparison is fair where every method got the same search: ``mmebm ablate --tune published`` trains each variant with
every setting of the grid, chooses by a number of the validation, and goes on with the chosen one.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import Literal

from mmebm.training.config import Config
from mmebm.training.variants import cost

__all__ = ["TUNING", "grid", "timed"]

# Fields and their values as text. Among them the published ones of the PolyMNIST lineage: beta 2.5 with Laplace of
# scale .75 on images in [0, 1], which is 1.5 in [-1, 1] (MoPoE, MVTCAE, MMVAE+), and what the presets have.
TUNING: dict[str, dict[str, tuple[str, ...]]] = {
    "published": {
        "loss.beta": ("1", "2.5", "5"),
        "model.sigma": ("0.3", "0.75", "1.5"),
        "model.likelihood": ("gaussian", "laplace"),
    }
}


def grid(words: Sequence[str]) -> list[dict[str, str]]:
    """Every combination that names in :data:`TUNING` and words FIELD=VALUE,VALUE,... stand for: changes as
    :func:`mmebm.training.config.override` takes them.

    Raises:
        ValueError: for a word that is neither, or a field that is there twice.
    """
    fields: dict[str, tuple[str, ...]] = {}
    for word in words:
        field, equals, values = word.partition("=")
        if not equals and word not in TUNING:
            raise ValueError(f"--tune takes {sorted(TUNING)}, or FIELD=VALUE,VALUE,..., got {word!r}")
        for name, of in TUNING[word].items() if not equals else [(field, tuple(values.split(",")))]:
            if name in fields:
                raise ValueError(f"--tune has the field {name!r} twice")
            fields[name] = of
    return [dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values())]


def timed(config: Config, seconds: float, clock: Literal["wall", "cpu"] = "wall") -> Config:
    """``config``, its training stopped at so many measured seconds: each stage has the share of them that it has of the
    iterations' cost (:func:`mmebm.training.variants.cost`), and its rates and ramps follow the time.

    Raises:
        ValueError: for seconds that are not positive, or a configuration without iterations.
    """
    if not seconds > 0:
        raise ValueError(f"seconds must be positive, got {seconds!r}")
    costs = [stage.iterations * cost(config, stage) for stage in config.stages]
    if not sum(costs):
        raise ValueError("seconds are divided between stages with iterations, and there is none")
    stages = [
        dataclasses.replace(stage, seconds=seconds * each / sum(costs)) if each else stage
        for stage, each in zip(config.stages, costs, strict=True)
    ]
    return config.replace(stages=tuple(stages), clock=clock)


def said(changes: dict[str, str]) -> str:
    """The settings in a line; "as configured" for none."""
    return ", ".join(f"{name}={value}" for name, value in changes.items()) or "as configured"


def same(plain: object, changes: dict[str, str]) -> bool:
    """Whether the configuration ``plain`` (as JSON holds it) has these settings."""
    for dotted, text in changes.items():
        at = plain
        for name in dotted.split("."):
            at = at[int(name)] if isinstance(at, list) else at.get(name) if isinstance(at, dict) else None
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        if at != value:
            return False
    return True
