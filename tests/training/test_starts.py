"""Where chains start, who learns when, and the named variants of a preset."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

import mmebm
from mmebm.data.base import MultimodalDataset
from mmebm.training import Config, Trainer, checkpoint, preset
from mmebm.training.config import (
    DATA_STARTS,
    LATENT_STARTS,
    AdamConfig,
    ChainConfig,
    DataConfig,
    LossConfig,
    ShuffledTuplesConfig,
    Stage,
    StartConfig,
    override,
)
from mmebm.training.extensions import ShuffledTuples
from mmebm.training.optimise import Optimiser
from mmebm.training.starts import DataStarts, LatentStarts
from mmebm.training.trainer import Minibatch
from mmebm.training.variants import COSTS, GRIDS, LATENT_ONLY, LINEAGE, VARIANTS, budget, cost, variant

LATENTS = (*LATENT_STARTS, "unimodal:vector")


def joint(config: Config, iterations: int = 2, **changes: Any) -> Config:
    return config.replace(stages=(Stage("joint", iterations),), **changes)


def moved(trainer: Trainer) -> set[str]:
    """The networks whose parameters differ from those of a fresh trainer of the same seed."""
    fresh = Trainer(trainer.config, trainer.data).system.state_dict()
    now = trainer.system.state_dict()
    return {name.split(".")[0] for name, value in now.items() if not torch.equal(value, fresh[name])}


@pytest.mark.parametrize("name", DATA_STARTS)
def test_every_data_start_trains(name: str, config: Config, data: MultimodalDataset) -> None:
    """The generator and the inference network learn from X_k where there is a z that it came from."""
    loss = LossConfig(generator_real=0.0, inference_real=0.0, inference_revised=1.0)
    settings = joint(config, loss=loss, latent_prior=None, start=StartConfig(data=name, buffer=32))
    trainer = Trainer(settings, data)
    rows = list(trainer.run())
    paired = {
        "generator": {"generator", "inference"},
        "aggregated": {"generator", "inference"},
        "independent": {"generator"},
    }
    assert moved(trainer) - {"latent_step"} == {"energy"} | paired.get(name, set())
    assert ("loss_inference" in rows[-1]) == ("inference" in paired.get(name, set()))


def test_data_starts_are_what_they_say(config: Config, data: MultimodalDataset) -> None:
    system = Trainer(config, data).system
    starts = DataStarts(system, StartConfig(noise=0.1, buffer=64), seed=1)
    x = data.batch(torch.arange(40))
    n = 40

    def drawn(name: str, **options: Any) -> Any:
        return starts(n, seed=5, x=x, name=name, **options)

    generator = drawn("generator")
    assert all(torch.equal(generator.x[m], system.generator(generator.z)[m]) for m in x)
    apart = drawn("independent")
    assert len({tuple(z[0].tolist()) for z in apart.z.values()}) == 3
    assert all(torch.equal(apart.x[m], system.generator(apart.z[m])[m]) for m in x)
    noise = torch.cat([t.flatten() for t in drawn("noise").x.values()])
    # 40 x 1,378 uniforms in [-1, 1): six standard errors of the mean and of the mean square
    assert noise.abs().max() <= 1 and abs(noise.mean()) < 6 * (1 / 3 / len(noise)) ** 0.5
    assert abs(noise.square().mean() - 1 / 3) < 6 * (4 / 45 / len(noise)) ** 0.5
    shuffled = drawn("shuffled").x
    for m, value in x.items():
        mine, theirs = shuffled[m].flatten(1), value.flatten(1)
        assert torch.equal(mine.sum(1).sort().values, theirs.sum(1).sort().values)  # the same rows in another order
    near = drawn("data+noise").x
    off = torch.cat([(near[m] - x[m]).flatten() for m in x])
    # of values on the bound half of the noise is clamped away
    assert 0 < off.abs().mean() < 0.1 and all(t.abs().max() <= 1 for t in near.values())
    assert drawn("aggregated").z.shape == (n, 3)
    assert drawn("noise").z is None and drawn("shuffled").z is None
    with pytest.raises(ValueError, match="data must be one of"):
        StartConfig(data="nothing")


def test_starts_do_not_depend_on_the_split(config: Config, data: MultimodalDataset) -> None:
    """Chains 7 to 12 alone are chains 7 to 12 of all: what sharding over processes needs."""
    system = Trainer(config, data).system
    starts = DataStarts(system, StartConfig(), seed=1)
    for name in ("generator", "independent", "noise"):
        whole, part = (starts(n, seed=3, x={}, name=name, offset=at).x for n, at in ((20, 0), (5, 7)))
        for m in whole:
            # another batch size is another order of sums in a matrix product
            torch.testing.assert_close(part[m], whole[m][7:12], rtol=1e-5, atol=1e-6)


def test_persistent_chains_may_begin_as_noise(config: Config, data: MultimodalDataset) -> None:
    settings = joint(config, start=StartConfig(data="buffer", buffer=32, fresh="noise"))
    trainer = Trainer(settings, data)
    held = torch.cat([t.flatten() for t in trainer.data_starts.buffer.state_dict()["data"]])
    # 32 x 1,378 uniforms in [-1, 1): six standard errors of the mean square; the generator's are near 0
    assert held.abs().max() <= 1 and abs(held.square().mean() - 1 / 3) < 6 * (4 / 45 / len(held)) ** 0.5
    assert moved(trainer) == set()
    list(trainer.run())
    assert "energy" in moved(trainer)


def test_annealed_noise_falls_to_the_configured_one(config: Config, data: MultimodalDataset) -> None:
    """Noise 8 s, 4 s, 2 s, s in four steps, and over as many steps as are asked for."""
    chain = ChainConfig(steps=4, step=0.1, noise=0.02, anneal=8.0)
    system = Trainer(config.replace(data_chain=chain), data).system
    x = data.batch(torch.arange(6))
    for steps, noise in ((4, [0.16, 0.08, 0.04, 0.02]), (2, [0.16, 0.02])):
        ours = system.revise_data(x, seed=3, steps=steps).state
        values = mmebm.schedules.table(torch.tensor(noise, dtype=torch.float64))
        by_hand = mmebm.langevin(system.energy, x, steps, step_size=0.005, noise_scale=values, seed=3)
        for m in x:
            torch.testing.assert_close(ours[m], by_hand[m], rtol=1e-6, atol=1e-6)
    plain = dataclasses.replace(chain, anneal=1.0)
    other = Trainer(config.replace(data_chain=plain), data).system.revise_data(x, seed=3).state
    assert not torch.allclose(other["vector"], system.revise_data(x, seed=3).state["vector"], atol=1e-3)


def test_metropolis_chains_refuse_what_is_too_far(config: Config, data: MultimodalDataset) -> None:
    x = data.batch(torch.arange(40))
    moves = []
    for step in (0.01, 30.0):
        chain = ChainConfig(steps=1, step=step, metropolis=True)
        system = Trainer(config.replace(data_chain=chain), data).system
        with torch.no_grad():  # an energy that knows what is far
            head = [p for p in system.energy.parameters() if p.dim() == 2][-1]
            head *= 50.0
        end = system.revise_data(x, seed=1).state
        moves.append((end["vector"] != x["vector"]).flatten(1).any(1).float().mean())
    assert moves[0] > 0.9 and moves[1] < 0.6
    with pytest.raises(ValueError, match="clamp=False"):
        ChainConfig(step=0.1, metropolis=True, clamp=True)


def test_buffer_goes_on_where_chains_ended(config: Config, data: MultimodalDataset, tmp_path: Any) -> None:
    settings = joint(config, 6, latent_prior=None, start=StartConfig(data="buffer", buffer=32, reinit=0.0))
    whole, first = Trainer(settings, data), Trainer(settings, data)
    before = [t.clone() for t in whole.data_starts.buffer.state_dict()["data"]]
    list(whole.run())
    after = whole.data_starts.buffer.state_dict()["data"]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for row in first.run():
        first.stop = row["iteration"] >= 4
    checkpoint.save(tmp_path / "c.pt", first.state_dict())
    second = Trainer(settings, data)
    second.load_state_dict(checkpoint.load(tmp_path / "c.pt"))
    list(second.run())
    resumed = second.data_starts.buffer.state_dict()["data"]
    assert all(torch.equal(a, b) for a, b in zip(after, resumed, strict=True))


@pytest.mark.parametrize("name", LATENTS)
def test_every_latent_start_trains(name: str, config: Config, data: MultimodalDataset) -> None:
    trainer = Trainer(joint(config, start=StartConfig(latent=name)), data)
    list(trainer.run())
    assert {"generator", "inference", "energy", "prior"} <= moved(trainer)


def test_persistent_latents_start_where_they_ended(config: Config, data: MultimodalDataset) -> None:
    system = Trainer(config, data).system
    starts = LatentStarts(system, StartConfig(latent="persistent"), len(data))
    rows, rng = torch.tensor([4, 9]), torch.Generator().manual_seed(0)
    x = data.batch(rows)
    ends = torch.randn(2, 3)
    assert not torch.equal(starts(x, rng, rows=rows), ends)  # never visited: inferred
    starts.keep(rows, ends)
    assert torch.equal(starts(x, rng, rows=rows), ends)
    again = LatentStarts(system, StartConfig(latent="persistent"), len(data))
    again.load_state_dict(starts.state_dict())
    assert torch.equal(again(x, rng, rows=rows), ends)


def test_unimodal_start_reads_one_modality(config: Config, data: MultimodalDataset) -> None:
    system = Trainer(config, data).system
    starts = LatentStarts(system, StartConfig(latent="unimodal:vector"), len(data))
    x = data.batch(torch.arange(8))
    other = {**x, "grey": -x["grey"], "colour": x["colour"].flip(0)}
    a, b = (starts(v, torch.Generator().manual_seed(1)) for v in (x, other))
    assert torch.equal(a, b)
    changed = starts({**x, "vector": -x["vector"]}, torch.Generator().manual_seed(1))
    assert not torch.equal(a, changed)


def test_a_term_of_weight_zero_costs_no_chain(config: Config, data: MultimodalDataset) -> None:
    """Evaluations of gradients: 16 rows, 3 data steps (twice an iteration in the whole loop), 2 latent, 3 prior."""

    def evaluations(**changes: Any) -> int:
        trainer = Trainer(joint(config, 1, **changes), data)
        list(trainer.run())
        return trainer.evaluations

    assert evaluations() == 16 * (3 + 3 + 3 + 2)
    assert evaluations(latent_prior=None) == 16 * (3 + 3 + 2)
    plain: dict[str, Any] = {"latent_prior": None, "shuffled_tuples": None}
    assert evaluations(loss=LossConfig(energy=0.0, generator_revised=0.0, inference_revised=0.0), **plain) == 16 * 2
    assert evaluations(loss=LossConfig(generator_real=0.0, inference_real=0.0), **plain) == 16 * 6
    assert (
        evaluations(
            loss=LossConfig(
                generator_real=0.0,
                inference_real=0.0,
                inference_revised=0.0,
                energy=0.0,
                generator_revised=0.0,
                elbo=1.0,
            ),
            **plain,
        )
        == 0
    )


def test_stage_names_who_learns_and_leaves_frozen(config: Config, data: MultimodalDataset) -> None:
    settings = config.replace(
        stages=(Stage("warmup", 2), Stage("joint", 2, train=("energy",)), Stage("joint", 2)), latent_prior=None
    )
    trainer = Trainer(settings, data)
    list(trainer.run())
    vae, frozen = trainer.snapshots["vae"], trainer.snapshots["frozen"]
    same = {name.split(".")[0] for name in vae if torch.equal(vae[name], frozen[name])}
    differs = {name.split(".")[0] for name in vae if not torch.equal(vae[name], frozen[name])}
    assert differs == {"energy"} and {"generator", "inference"} <= same
    now = trainer.system.state_dict()
    assert any(not torch.equal(now[name], frozen[name]) for name in now if name.startswith("generator"))


def test_ramps_move_weights_and_steps(config: Config, data: MultimodalDataset) -> None:
    ramp = {"loss.elbo": (1.0, 0.0), "data_chain.steps": (2.0, 6.0)}
    trainer = Trainer(config.replace(stages=(Stage("joint", 5, ramp=ramp),)), data)
    seen = []
    step = trainer._steps["joint"]

    def watched(batch: Minibatch, rng: torch.Generator) -> Any:
        seen.append((trainer.loss.elbo, trainer.data_steps))
        return step(batch, rng)

    trainer._steps["joint"] = watched
    list(trainer.run())
    assert seen == [(1.0, 2), (0.75, 3), (0.5, 4), (0.25, 5), (0.0, 6)]
    with pytest.raises(ValueError, match="ramp moves one of"):
        Stage("joint", 5, ramp={"loss.objective": (0, 1)})


def test_missing_modalities(config: Config, data: MultimodalDataset) -> None:
    """Rows that lose modalities train every stage; what a row lacks has no influence on generator and inference."""
    settings = config.replace(data=DataConfig(missing=0.5), shuffled_tuples=None)
    rows = list(Trainer(settings, data).run())
    assert all(torch.isfinite(torch.tensor(v)) for row in rows for v in row.values() if isinstance(v, float))

    trainer = Trainer(settings, data)
    drawn = []
    for trainer.iteration in range(200):
        drawn.append(trainer.batch())
    has = torch.cat([torch.stack(list(b.present.values()), 1) for b in drawn if b.present is not None])
    assert has.any(1).all()
    # each kept with probability 1/2, and the luckiest where none is: 1/2 + 1/8/3 of them; six standard errors
    assert abs(has.double().mean() - (0.5 + 1 / 24)) < 6 * (0.25 / len(has) / 1.5) ** 0.5

    batch = drawn[0]
    assert batch.present is not None
    hidden = {
        m: torch.where(batch.present[m].reshape(-1, *[1] * (v.dim() - 1)), v, torch.full_like(v, 0.77))
        for m, v in batch.x.items()
    }
    quiet = settings.replace(loss=LossConfig(energy=0.0), latent_prior=None)
    ends = []
    for x in (batch.x, hidden):
        one = Trainer(quiet, data)
        one._begin(Stage("joint", 1), 0.0)
        one.joint_step(batch._replace(x=x), torch.Generator().manual_seed(1))
        ends.append(one.system.state_dict())
    for name in ends[0]:
        if name.startswith("generator"):
            torch.testing.assert_close(ends[0][name], ends[1][name], rtol=0, atol=0)


def test_fill_keeps_what_is_there(config: Config, data: MultimodalDataset) -> None:
    s = Trainer(config, data).system
    x = data.batch(torch.arange(6))
    present = {
        "grey": torch.arange(6) % 2 == 0,
        "colour": torch.ones(6, dtype=torch.bool),
        "vector": torch.arange(6) % 2 == 1,
    }
    full = s.fill(x, present, torch.randn(6, 3), seed=1)
    for m, value in x.items():
        assert torch.equal(full[m][present[m]], value[present[m]])
        assert not any(torch.equal(full[m][i], value[i]) for i in (~present[m]).nonzero().flatten())


def test_hard_tuples_change_some_modalities(config: Config, data: MultimodalDataset) -> None:
    """From a row that is near in the latent, but not among the nearest; at least one modality stays and one changes."""
    trainer = Trainer(config, data)
    s, batch = trainer.system, trainer.batch()
    # tuples with every value their own, so that each is recognised
    x = {m: torch.randn_like(v) for m, v in batch.x.items()}
    term = ShuffledTuples(ShuffledTuplesConfig(kind="hard", same=0.25, near=0.5))
    out = term.hard(s, x, torch.Generator().manual_seed(1))
    z = torch.stack([c.mean for c in s.inference(x)]).mean(0)
    rank = torch.cdist(z, z).argsort(1).argsort(1)
    source = {
        m: torch.stack([(out[m][i] == v).flatten(1).all(1).nonzero()[0, 0] for i in range(16)]) for m, v in x.items()
    }
    kept = torch.stack([source[m] == torch.arange(16) for m in x], 1)
    assert kept.any(1).all() and not kept.all(1).any()
    for i in range(16):
        others = {int(source[m][i]) for m in x} - {i}
        assert len(others) == 1
        assert 4 <= int(rank[i, others.pop()]) < 12


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_are_those_of_the_batch(parts: int, config: Config, data: MultimodalDataset) -> None:
    """The mean of the parts' gradients is the whole batch's; and a run in parts goes to its end."""
    net = torch.nn.Linear(5, 1)
    twin = torch.nn.Linear(5, 1)
    twin.load_state_dict(net.state_dict())
    x = torch.randn(16, 5)
    whole, split = Optimiser(net, AdamConfig()), Optimiser(twin, AdamConfig(), accumulate=parts)
    for _ in range(3):
        whole.step(net(x).square().mean())
        for piece in x.chunk(parts):
            split.step(twin(piece).square().mean())
    torch.testing.assert_close(net.weight, twin.weight, rtol=1e-5, atol=1e-6)
    rows = list(Trainer(config.replace(accumulate=parts), data).run())
    assert rows[-1]["iteration"] == 16
    with pytest.raises(ValueError, match="accumulate must divide batch=16, got 3"):
        config.replace(accumulate=3)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_every_variant_trains(name: str, config: Config, data: MultimodalDataset) -> None:
    small = dataclasses.replace(config.model, latent=4)
    settings = variant(config.replace(model=small, preset="demo"), name)
    assert settings.preset == f"demo/{name}" and Config.from_json(settings.to_json()) == settings
    stages = tuple(dataclasses.replace(stage, iterations=2) for stage in settings.stages)
    trainer = Trainer(settings.replace(stages=stages), data)
    rows = list(trainer.run())
    assert all(torch.isfinite(torch.tensor(v)) for row in rows for v in row.values() if isinstance(v, float))
    learns = {
        "ebm": {"energy"},
        "coopnets": {"energy", "generator"},
        "frozen": {"energy", "generator", "inference"},
        "abp": {"generator", "inference"},
        **{
            name: {"energy", "generator", "inference", "prior"}
            for name in VARIANTS
            if name.startswith("full") and name != "full-prior"
        },
        "paper+prior": {"energy", "generator", "inference", "prior"},
        **{name: {"energy"} for name in VARIANTS if name.startswith(("noise=", "ebm+"))},
    }
    name = name.partition("@")[0]
    expected = {"energy", "generator", "inference"}
    if name.removesuffix("+contrastive").removesuffix("+prior") in LATENT_ONLY:
        expected = {"generator", "inference"} | ({"prior"} if "+prior" in name else set())
    assert moved(trainer) - {"latent_step"} == learns.get(name, expected)


def test_objectives_take_their_options(config: Config, data: MultimodalDataset) -> None:
    """More samples per row tighten the importance-weighted bound: (Burda et al., 2016), here with the same networks."""
    bounds = []
    for samples in (1, 50):
        loss = LossConfig(objective="mmvae", objective_options={"samples": samples})
        trainer = Trainer(config.replace(loss=loss, batch=64), data)
        with torch.no_grad():
            bounds.append(trainer._bound(trainer.batch().x, torch.Generator().manual_seed(0), {}, "loss_elbo")[0])
    assert bounds[1] > bounds[0]
    with pytest.raises(ValueError, match=r"objective 'mmvae' has no option 'sample', only samples"):
        Trainer(config.replace(loss=LossConfig(objective="mmvae", objective_options={"sample": 3})), data)


def test_grids_name_variants_and_presets_take_them() -> None:
    assert {name for grid in GRIDS.values() for name in grid} <= set(VARIANTS)
    config = preset("demo/coopnets")
    assert config.preset == "demo/coopnets" and config.loss.inference_real == 0
    assert override(config, {"start.data": "noise"}).start.data == "noise"
    with pytest.raises(ValueError, match=r"variant must be one of .*, got 'x'"):
        preset("demo/x")


def test_grids_of_figures_change_what_they_say() -> None:
    base = preset("demo")
    assert preset("demo/mopoe@beta=2.5").loss == dataclasses.replace(preset("demo/mopoe").loss, beta=2.5)
    chains = [preset(f"demo/{name}").data_chain for name in GRIDS["noise"]]
    assert [chain.steps for chain in chains] == [10, 30, 60, 100]
    assert {chain.size() for chain in chains} == {base.data_chain.size()}
    assert [stage.kind for stage in preset("demo/no-warmup").stages] == ["joint"]
    assert [stage.train for stage in preset("demo/staged").stages] == [None, ("energy",), None]
    revised, vae = preset("demo/vae+prior"), preset("demo/vae")
    assert [stage.kind for stage in revised.stages] == ["warmup", "prior"] and vae.latent_prior is None
    assert revised.latent_prior == base.latent_prior
    one, other = preset("demo/paper"), preset("demo/independent-inference")
    assert other.replace(loss=one.loss, preset=one.preset) == one and other.loss.inference == "per_expert"


def test_bad_settings_are_named() -> None:
    for make, match in (
        (lambda: Stage("joint", 1, train=()), "train must name some of"),
        (lambda: Stage("joint", 1, train=("vae",)), "train must name some of"),
        (lambda: Stage("other", 1), "kind must be one of 'warmup'"),  # type: ignore[arg-type]
        (lambda: DataConfig(missing=1.0), r"missing must lie in \[0, 1\)"),
        (lambda: ShuffledTuplesConfig(kind="x"), "kind must be one of 'uniform', 'hard'"),  # type: ignore[arg-type]
        (lambda: ShuffledTuplesConfig(same=0.9, near=0.2), "parts of a batch"),
        (lambda: StartConfig(latent="x"), "latent must be one of"),
    ):
        with pytest.raises(ValueError, match=match):
            make()


@pytest.mark.parametrize("base", ["demo", "polymnist-14", "polymnist-5k"])
def test_variants_have_the_presets_budget(base: str) -> None:
    """In iterations of the warm-up, to within one iteration of the dearest stage; a longer chain costs more."""
    whole, steps = budget(preset(base)), preset(base).data_chain.steps
    for name in VARIANTS:
        config = preset(f"{base}/{name}")
        more = config.data_chain.steps / steps - 1 if name.startswith("ebm+") else 0.0
        chain = more * COSTS[base]["data"]
        spent = budget(config) + chain * sum(stage.iterations for stage in config.stages)
        assert abs(spent - whole) <= max(cost(config, stage) for stage in config.stages) + chain


def test_settings_of_the_lineage() -> None:
    """Each variant is the paper's loop but for its fields, none of which is there already; the last has all of them."""

    def flat(value: Any, name: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            return {name: value}
        return {k: v for key, part in value.items() for k, v in flat(part, f"{name}.{key}".strip(".")).items()}

    paper = flat(json.loads(preset("paper/paper").to_json()))
    for name, fields in LINEAGE.items():
        other = flat(json.loads(preset(f"paper/lineage={name}").to_json()))
        changed = {field for field in other if other[field] != paper[field]}
        assert changed == {"preset", *fields}, name
    assert set(LINEAGE["all"]) == {field for fields in LINEAGE.values() for field in fields}
