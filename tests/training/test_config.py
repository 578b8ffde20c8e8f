"""Configurations survive the way to disk and reject what they do not know."""

import json
import math
import subprocess
import sys
from typing import Any

import pytest

from mmebm.training import PRESETS, preset
from mmebm.training.config import AdamConfig, ChainConfig, Config, LossConfig, ModelConfig, Stage, merged, override


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_json_round_trip(name: str) -> None:
    config = preset(name)
    assert Config.from_json(config.to_json()) == config
    assert config.preset == name


def test_override_sets_fields_of_every_kind() -> None:
    config = override(
        preset("demo"),
        {
            "data_chain.steps": "60",
            "loss.elbo": "0",
            "stages.0.iterations": "5",
            "latent_prior": "null",
            "data.name": "polymnist",
            "model.weights": '{"m0": 2.0}',
            "data_chain.travel": '{"m0": 1.0}',
        },
    )
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


def test_tables_of_any_keys_take_new_ones_at_any_depth() -> None:
    changes = {"model.decoders.photo.path": "a:B", "model.decoders.photo.arguments.width": "8"}
    decoder = override(preset("base"), changes).model.decoders["photo"]
    assert decoder == override(
        preset("base"), {"model.decoders": '{"photo": {"path": "a:B", "arguments": {"width": 8}}}'}
    ).model.decoders["photo"]  # fmt: skip


# the first words of the error: the path of the field, and what would do
WRONG = {
    "data_chain.clamp=no": 'data_chain.clamp must be true or false, got "no"',
    "data_chain.clamp=0": "data_chain.clamp must be true or false, got 0",
    "model.spectral=off": "model.spectral must be true or false",
    "loss.inference=per-expert": "loss.inference must be one of 'mixture', 'per_expert', got \"per-expert\"",
    "model.net=unet": "model.net must be one of 'mlp', 'conv', 'resnet', got \"unet\"",
    "model.activation=swish": "model.activation must be one of 'relu'",
    "model.likelihood=normal": "model.likelihood must be one of 'gaussian', 'laplace'",
    "model.latent=0": "model.latent must be at least 1, got 0",
    "model.latent=16.5": "model.latent must be an integer of at least 1 or 'auto', got 16.5",
    "model.sigma=0": "model.sigma must be positive, got 0",
    "model.sigma=true": "model.sigma must be a positive number, got true",
    "model.weights.word=heavy": 'model.weights.word must be a number of at least 0, got "heavy"',
    "model.weights.word=-1": "model.weights.word must be at least 0, got -1",
    'data_chain.travel={"mnist": "far"}': 'data_chain.travel.mnist must be a positive number, got "far"',
    "model.decoders.photo=nets": "model.decoders.photo must be 'package.module:Class', got 'nets'",
    'model.decoders={"photo": {"class": "a:B"}}': "unknown field 'model.decoders.photo.class'; there are path",
    "model.energy=3": "model.energy must be a string, a table of path, arguments or null, got 3",
    "imports=mypkg": 'imports must be a list, each a string, got "mypkg"',
    "model=big": "model must be a table of latent, ",
    "guard=null": "guard must be a table of max_gap, max_separation, grace, every, rollbacks, latent_alarm, got null",
    "guard.every=0": "guard.every must be at least 1, got 0",
    "latent_chain.auto_every=0": "latent_chain.auto_every must be at least 1, got 0",
    "latent_chain.step=fast": "latent_chain.step must be a positive number, a table of names to a positive number, "
    "'auto' or null, got \"fast\"",
    "latent_chain.step=-1": "latent_chain.step must be positive, or None, got -1",
    'data_chain.travel={"mnist": 0}': "data_chain.travel.mnist must be positive, got 0",
    "data_chain.noise=-0.1": "data_chain.noise must be at least 0, or None, got -0.1",
    "latent_prior.chain.steps=many": 'latent_prior.chain.steps must be an integer of at least 0, got "many"',
    "latent_prior.adam.beta1=1": "latent_prior.adam.beta1 must lie in [0, 1), got 1",
    "generator.lr=1e999": "generator.lr must be a number of at least 0, got Infinity",
    "generator.lr=nan": 'generator.lr must be a number of at least 0, got "nan"',
    "stages.1.kind=warm": "stages.1.kind must be one of 'warmup', 'prior', 'matching', 'joint', got \"warm\"",
    "stages.0.iterations=-3": "stages.0.iterations must be at least 0, got -3",
    'stages.0.train=["me"]': "stages.0.train must name some of",
    'stages.0.ramp={"loss.elbo": 3}': "stages.0.ramp.loss.elbo must be a list, got 3",
    'stages=[{"kind": "joint"}]': "stages.0.iterations is missing: an integer of at least 0",
    "stages=5": "stages must be a list, each a table of kind, iterations",
    "loss.objective=vae": "loss.objective must be one of 'single_expert'",
    'loss.objective_options={"k": 3}': "loss.objective_options do not fit: objective 'single_expert'",
    "loss.energy=-1": "loss.energy must be at least 0, got -1",
    "start.data=nothing": "start.data must be one of 'generator', 'noise'",
    "start.latent=nothing": "start.latent must be one of ['inference'",
    "shuffled_tuples.kind=easy": "shuffled_tuples.kind must be one of 'uniform', 'hard'",
    "data.missing=1": "data.missing must lie in [0, 1), got 1",
    "data.options=3": "data.options must be a table, got 3",
    "data.seed=-1": "data.seed must be at least 0, got -1",
    "threads=two": 'threads must be an integer of at least 1 or null, got "two"',
    "threads=0": "threads must be at least 1, or None, got 0",
    "batch=0": "batch must be at least 1, got 0",
    "seed=-1": "seed must lie in [0, ",
    "backend=gpu": "backend must be one of 'auto', 'torch', 'cpp', 'triton', 'cuda'",
    "precision=fp16": "precision must be one of 'fp32', 'bf16'",
    "channels_last=1": "channels_last must be true or false, got 1",
}


@pytest.mark.parametrize("setting", WRONG)
def test_wrong_settings_are_refused_by_their_path(setting: str) -> None:
    field, _, text = setting.partition("=")
    with pytest.raises(ValueError) as caught:
        override(preset("demo"), {field: text})
    assert str(caught.value).startswith(WRONG[setting])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "field, text, value",
    [
        ("model.spectral", "False", False),
        ("model.spectral", "true", True),
        ("data_chain.clamp", "False", False),
        ("latent_prior", "None", None),
        ("data_chain.noise", "null", None),
        ("data.path", "'1'", "1"),
        ("data.path", "mydata", "mydata"),
        ("stages.0.train", "('energy',)", ("energy",)),
        ("loss.elbo", "1", 1.0),
    ],
)
def test_settings_as_json_or_as_python_writes_them(field: str, text: str, value: Any) -> None:
    found: Any = override(preset("demo"), {field: text})
    for name in field.split("."):
        found = found[int(name)] if name.isdigit() else getattr(found, name)
    assert found == value and type(found) is type(value)


def test_all_errors_are_named_at_once_with_what_was_meant() -> None:
    with pytest.raises(ValueError) as caught:
        Config.from_json('{"presett": "x", "data": {"nam": "x", "seed": "1"}, "model": {"sigma": true}}')
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    fields = "name, seed, path, options, missing, workers, ahead"
    assert f"unknown field 'data.nam' (did you mean 'name'?); there are {fields}" in lines
    assert 'data.seed must be an integer of at least 0, got "1"' in lines
    assert any(line.startswith("unknown field 'presett' (did you mean 'preset'?)") for line in lines)
    with pytest.raises(ValueError, match="the configuration must be a table of preset"):
        Config.from_json("3")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ModelConfig(net="unet"), "net must be one of 'mlp', 'conv', 'resnet', got 'unet'"),  # type: ignore
        (lambda: LossConfig(inference="per-expert"), "inference must be one of .*mean 'per_expert'"),  # type: ignore
        (lambda: AdamConfig(lr=float("nan")), "lr must be at least 0, got nan"),
        (lambda: ChainConfig(step={"a": -1.0}), r"step\.a must be positive, got -1\.0"),
        (lambda: Stage("joint", 3, lr=-1.0), "lr must be at least 0"),
        (lambda: Config("x", batch=0), "batch must be at least 1, got 0"),
    ],
)
def test_ranges_and_choices_hold_in_python_too(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_types_are_checked_where_training_starts(config: Config, data: Any) -> None:
    from mmebm.training import Trainer

    wrong = config.replace(model=ModelConfig(latent=3, spectral="False"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r'model\.spectral must be true or false, got "False"'):
        Trainer(wrong, data)


def test_a_file_changes_what_it_names() -> None:
    base = preset("demo")
    config = merged(base, {"data": {"name": "folder", "options": {}}, "latent_prior": {"width": 5}, "batch": 50})
    assert config.data.options == {} and config.data.seed == base.data.seed and config.batch == 50
    assert config.latent_prior is not None and base.latent_prior is not None
    assert config.latent_prior.width == 5 and config.latent_prior.adam == base.latent_prior.adam
    assert merged(preset("paper"), {"latent_prior": {"width": 5}}).latent_prior.depth == 2  # type: ignore
    with pytest.raises(ValueError, match=r"unknown field 'model\.latnt'"):
        merged(base, {"model": {"latnt": 3}})


def test_sampling_alone_needs_no_pydantic() -> None:
    code = (
        "import sys, torch, mmebm; mmebm.langevin(lambda x: (x * x).sum(1), torch.zeros(2, 2), steps=3, step_size=.1)\n"
    )
    code += "print([name for name in ('pydantic', 'safetensors', 'matplotlib') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.replace("'", '"')) == []
