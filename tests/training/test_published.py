"""The presets of published sets: each starts and trains from folders in its published layout."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mmebm.data import load
from mmebm.training import PRESETS, Config, Trainer, preset
from mmebm.training.config import ChainConfig, LatentPriorConfig
from mmebm.training.networks import chain_reports
from mmebm.training.presets import published
from mmebm.training.run import Run
from mmebm.training.system import System
from mmebm.training.variants import COSTS

FILE = Path(__file__).parents[2] / "benchmarks" / "study" / "published" / "measure.py"
pytest.importorskip("PIL", reason="the extra 'train' reads images")


@pytest.fixture(scope="module")
def measure() -> ModuleType:
    """The benchmark, which writes the sets."""
    spec = importlib.util.spec_from_file_location("measure_published", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def narrow(config: Config) -> Config:
    """The same with two channels, short chains and two iterations a stage."""
    model = dataclasses.replace(
        config.model, generator_width=2, inference_width=2, energy_trunk_width=2, energy_width=8, energy_features=4
    )
    prior = dataclasses.replace(
        config.latent_prior or LatentPriorConfig(), width=8, chain=ChainConfig(steps=2, step=0.2)
    )
    return config.replace(
        model=model,
        batch=4,
        latent_prior=prior,
        data_chain=dataclasses.replace(config.data_chain, steps=2),
        latent_chain=dataclasses.replace(config.latent_chain, steps=2),
        stages=tuple(dataclasses.replace(stage, iterations=2) for stage in config.stages),
        guard=dataclasses.replace(config.guard, every=1),
    )


SHAPES = {
    "polymnist": {f"m{i}": (3, 28, 28) for i in range(5)},
    "polyfashion": {f"m{i}": (3, 28, 28) for i in range(5)},
    "mnist-svhn-text": {"mnist": (1, 28, 28), "svhn": (3, 32, 32), "text": (216,)},
    "cub": {"image": (3, 64, 64), "caption": (128,)},
    "cub-128": {"image": (3, 128, 128), "caption": (128,)},
    "coco": {"image": (3, 64, 64), "caption": (128,)},
    "coco-128": {"image": (3, 128, 128), "caption": (128,)},
}


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_a_preset_trains_from_the_published_layout(name: str, measure: ModuleType, tmp_path: Path, seed: int) -> None:
    for needed in {"polyfashion": ("skimage",), "mnist-svhn-text": ("scipy",)}.get(name, ()):
        pytest.importorskip(needed, reason="the extra 'digits'")
    config = narrow(measure.prepared(name, tmp_path, n=24 if name == "polyfashion" else 8, seed=seed))
    data = load(config.data.name, "train", seed=config.data.seed, path=tmp_path, **config.data.options)
    assert {m.name: m.shape for m in data.modalities} == SHAPES[name]
    trainer = Trainer(config, data)
    before = {key: value.clone() for key, value in trainer.system.named_parameters()}
    rows = list(trainer.run())
    assert len(rows) == trainer.total == 2 * len(config.stages) and not any("rolled_back" in row for row in rows)
    still = {key for key, value in trainer.system.named_parameters() if torch.equal(value, before[key])}
    # the energy's constant: real and revised tuples move it by the same, up to what bfloat16 keeps of energy_l2
    assert still <= {"energy.fusion.4.bias"}
    # the run is a model without its data: samples in natural space, captions as strings
    trainer.save(tmp_path / "run")
    run = Run(tmp_path / "run", data_path=str(tmp_path / "gone"))
    x = run.sample(3, run.points[-1], seed=seed)
    for m in run.modalities:
        natural = m.natural(x[m.name])
        assert len(natural) == 3 and (natural.dtype.kind == "U") == (m.kind == "caption")


def test_costs_have_every_part(measure: ModuleType, tmp_path: Path, seed: int) -> None:
    """What the benchmark measures is what an entry of COSTS holds, and none is free."""
    config = narrow(measure.prepared("cub", tmp_path, n=8, seed=seed)).replace(precision="fp32", channels_last=False)
    prior = dataclasses.replace(config.latent_prior or LatentPriorConfig(), components=2, samples=20)
    config = config.replace(latent_prior=prior)
    data = load(config.data.name, "train", path=tmp_path, **config.data.options)
    found = measure.costs(config, data, repeats=1)
    assert set(found) >= set(COSTS["polymnist-5k"]) and all(value > 0 for value in found.values())


def test_the_sets_of_the_presets_are_those_that_are_written(measure: ModuleType) -> None:
    assert set(SHAPES) == set(measure.WRITERS) <= set(PRESETS)


@pytest.mark.parametrize("name", ["polymnist", "mnist-svhn-text"])
def test_both_chains_are_one_call_in_float32(name: str, measure: ModuleType, tmp_path: Path, need) -> None:
    """Under autocast they are not, and the report says so."""
    need("cpp")
    config = narrow(preset(name))
    fused = chain_reports(System(config.replace(precision="fp32"), SHAPES[name]), 2)
    assert all(line.startswith("one fused call") for line in fused.values()), fused
    if config.precision == "bf16":
        lines = chain_reports(System(config.replace(precision="bf16"), SHAPES[name]), 2)
        assert "autocast is on" in lines["data chain"] and "autocast is on" in lines["latent chain"]


def test_energy_and_generator_are_of_one_size() -> None:
    for name in ("polymnist", "cub", "coco-128"):
        with torch.device("meta"):
            system = System(preset(name).replace(channels_last=False), SHAPES[name])
        sizes = [sum(p.numel() for p in part.parameters()) for part in (system.energy, system.generator)]
        assert 0.5 < sizes[0] / sizes[1] < 2, (name, sizes)


def test_the_large_presets_differ_by_their_size_alone() -> None:
    for make in (published.cub, published.coco):
        small, large = json.loads(make().to_json()), json.loads(make(128).to_json())
        assert large["data"]["options"].pop("size") == 128 and small["data"]["options"].pop("size") == 64
        assert large.pop("preset") == small.pop("preset") + "-128" and small == large
