"""Configurations survive the way to disk and reject what they do not know."""

import math

import pytest

from mmebm.training import PRESETS, Config, preset
from mmebm.training.config import ChainConfig, override


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_json_round_trip(name: str) -> None:
    config = preset(name)
    assert Config.from_json(config.to_json()) == config
    assert config.preset == name


def test_override_sets_fields_of_every_kind() -> None:
    config = override(preset("demo"), {
        "data_chain.steps": "60", "loss.elbo": "0", "stages.0.iterations": "5", "latent_prior": "null",
        "data.name": "polymnist", "model.weights": '{"m0": 2.0}', "data_chain.travel": '{"m0": 1.0}',
    })  # fmt: skip
    assert (config.data_chain.steps, config.loss.elbo, config.stages[0].iterations) == (60, 0, 5)
    assert config.latent_prior is None and config.data.name == "polymnist"
    assert config.model.weights == {"m0": 2.0} and config.data_chain.travel == {"m0": 1.0}


def test_override_adds_keys_to_fields_that_are_dicts() -> None:
    config = override(preset("demo"), {"data.options.n": "50", "stages.1.ramp": "{}", "model.weights.mnist": "0.5"})
    assert config.data.options == {"size": 14, "n": 50} and config.model.weights == {"word": 6.0, "mnist": 0.5}


@pytest.mark.parametrize("field", ["data_chain.stepz", "chain.steps", "stages.9.iterations", "data_chain.travel.mnist"])
def test_override_names_unknown_fields(field: str) -> None:
    with pytest.raises(ValueError, match=f"unknown field '{field}'"):
        override(preset("demo"), {field: "1"})


def test_travel_fixes_the_step() -> None:
    """travel = steps s^2, per modality where it is a mapping."""
    assert ChainConfig(steps=30, travel=2.7).size() == pytest.approx(0.3)
    assert ChainConfig(steps=4, travel={"a": 1.0, "b": 4.0}).size() == {"a": 0.5, "b": 1.0}
    # more steps of the same size, whichever way it was given
    for given in ({"travel": 2.7}, {"travel": {"a": 1.0, "b": 4.0}}, {"step": 0.2}):
        chain = ChainConfig(steps=30, sample_steps=70, **given)  # type: ignore[arg-type]
        assert chain.for_samples().steps == 70 and chain.for_samples().size() == chain.size()
    assert ChainConfig(steps=30, sample_steps=70, step="auto").for_samples().step == "auto"
    assert ChainConfig(steps=30, travel=2.7).for_samples() == ChainConfig(steps=30, travel=2.7)


def test_chain_needs_one_of_step_and_travel() -> None:
    for options in ({}, {"step": 0.1, "travel": 1.0}):
        with pytest.raises(ValueError, match="give step or travel, one of them"):
            ChainConfig(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no fixed value"):
        ChainConfig(step="auto").size()
    assert math.isclose(ChainConfig(step=0.2).size(), 0.2)  # type: ignore[arg-type]
