"""The loop: who learns in which stage and from what, resuming, and what happens when it goes astray."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmebm.data.base import MultimodalDataset
from mmebm.data.pools import ArrayPool
from mmebm.models import MixturePrior
from mmebm.samplers.capture.key import Identity, parts_of
from mmebm.training import PRESETS, Trainer, TrainingDiverged, checkpoint, preset
from mmebm.training.config import (
    AdamConfig,
    ChainConfig,
    Config,
    GuardConfig,
    LatentPriorConfig,
    LossConfig,
    ModelConfig,
    Stage,
    StartConfig,
)
from mmebm.training.system import Posterior
from mmebm.training.trainer import Minibatch


def networks(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.system.state_dict().items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """The networks (first part of the name) with a parameter that moved."""
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(
    "kind, learns",
    [
        ("warmup", {"generator", "inference"}),
        ("prior", {"prior"}),
        ("joint", {"generator", "inference", "energy", "prior", "latent_step"}),
    ],
)
def test_each_stage_teaches_its_networks(kind: str, learns: set[str], config: Config, data: MultimodalDataset) -> None:
    trainer = Trainer(config.replace(stages=(Stage(kind, 3),)), data)  # type: ignore[arg-type]
    before = networks(trainer)
    list(trainer.run())
    assert changed(before, networks(trainer)) == learns


@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_unequal_shapes_train(net: str, config: Config, data: MultimodalDataset) -> None:
    """Grey 28x28, colour 14x14 and a vector in one model; the warm-up learns them."""
    config = config.replace(
        model=config.model.__class__(
            latent=3,
            net=net,
            generator_width=8,
            inference_width=8,
            energy_width=16,  # type: ignore[arg-type]
            energy_trunk_width=4,
            energy_features=8,
        ),
        stages=(Stage("warmup", 40), Stage("joint", 3)),
        latent_prior=None,
        generator=AdamConfig(lr=1e-2),
        inference=AdamConfig(lr=1e-2),
    )
    rows = list(Trainer(config, data).run())
    warm = [row["mse"] for row in rows if row["stage"] == "warmup"]
    # a constant image has the mse of the data's variance, .8 here
    assert warm[-1] < 0.5 * warm[0]
    assert all(math.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))


def test_joint_losses_are_those_of_the_method(config: Config, data: MultimodalDataset) -> None:
    """With no extension and chains of no steps every term can be written down from the networks before the update."""
    config = config.replace(
        stages=(Stage("joint", 1),),
        latent_prior=None,
        shuffled_tuples=None,
        data_chain=ChainConfig(steps=0, step=0.1),
        latent_chain=ChainConfig(steps=0, step=0.1),
        loss=LossConfig(generator_real=2.0, generator_revised=3.0, inference_real=5.0, inference_revised=7.0),
    )
    trainer = Trainer(config, data)
    before = Trainer(config, data).system  # the same seed: the same weights
    rng = trainer._rng()
    batch = trainer.batch()
    x = batch.x
    seen: dict[str, Tensor] = {}

    def catch_q(given: dict[str, Tensor], generator: torch.Generator, **options: Any) -> Tensor:
        seen["z_q"] = before.inference.sample(given, generator)
        return seen["z_q"]

    def catch_p(n: int, **options: object) -> Tensor:
        seen["z_0"] = torch.randn(n, 3)
        return seen["z_0"]

    trainer.system.inference.sample = catch_q  # type: ignore[method-assign, assignment]
    trainer.system.prior.draw = catch_p  # type: ignore[method-assign, assignment]
    row = trainer.joint_step(batch, rng)
    z_q, z_0 = seen["z_q"], seen["z_0"]
    x_0 = before.generator(z_0)
    nll, log_q = before.generator.negative_log_likelihood, before.inference.log_prob
    torch.testing.assert_close(row["loss_generator"], (2 * nll(x, z_q).mean() + 3 * nll(x_0, z_0).mean()).detach())
    torch.testing.assert_close(row["loss_inference"], -(5 * log_q(z_q, x).mean() + 7 * log_q(z_0, x_0).mean()).detach())
    torch.testing.assert_close(row["generator_real"], nll(x, z_q).mean().detach())
    torch.testing.assert_close(row["generator_revised"], nll(x_0, z_0).mean().detach())
    torch.testing.assert_close(row["inference_real"], -log_q(z_q, x).mean().detach())
    torch.testing.assert_close(row["inference_revised"], -log_q(z_0, x_0).mean().detach())
    # the energy meets the samples of the generator that step 5 has updated
    moved = trainer.system.generator(z_0)
    expected = before.energy(x).mean() - before.energy(moved).mean()
    torch.testing.assert_close(row["loss_energy"], expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(row["energy_real"], before.energy(x).mean().detach())
    torch.testing.assert_close(row["energy_revised"], before.energy(moved).mean().detach())
    assert row["revision_mse"] == 0  # chains of no steps
    assert not torch.allclose(before.energy(moved), before.energy(x_0), rtol=1e-6, atol=0)


def test_the_latent_chain_descends_its_posterior(config: Config, data: MultimodalDataset) -> None:
    """Without noise the chain lowers -log p(x, z): the posterior's energy plus the Gaussian of the prior."""
    quiet = ChainConfig(steps=20, step="auto", noise=0.0)
    trainer = Trainer(config.replace(latent_chain=quiet), data)
    x = trainer.batch().x
    s = trainer.system
    s.measure_latent_step(x)
    z = s.inference.sample(x).detach()

    def target(z: Tensor) -> Tensor:
        return Posterior(s.generator, s.prior, x)(z) + 0.5 * z.square().sum(1)

    before = target(z)
    after = target(s.revise_latent(z, x, seed=1).state)
    assert (after < before).all()


def test_resuming_changes_nothing(config: Config, data: MultimodalDataset, tmp_path) -> None:
    """Stopped in the middle of a stage and read back from disk: the same networks, bit for bit."""
    whole = Trainer(config, data)
    list(whole.run())
    first = Trainer(config, data)
    for row in first.run():
        if row["iteration"] >= 12:
            first.stop = True
    assert 0 < first.iteration < first.total
    checkpoint.save(tmp_path / "c.pt", first.state_dict())
    second = Trainer(config, data)
    second.load_state_dict(checkpoint.load(tmp_path / "c.pt"))
    list(second.run())
    a, b = networks(whole), networks(second)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert whole.snapshots["vae"].keys() == second.snapshots["vae"].keys()
    assert all(torch.equal(value, second.snapshots["vae"][name]) for name, value in whole.snapshots["vae"].items())
    assert whole.evaluations == second.evaluations > 0


def test_moving_average_of_the_weights(config: Config, data: MultimodalDataset, tmp_path) -> None:
    """By its definition: a stage's first weights, then average <- .8 average + .2 weights after every iteration."""
    config = config.replace(ema=0.8, guard=GuardConfig(every=1))
    whole = Trainer(config, data)
    expected: dict[str, Tensor] = {}
    for row in whole.run():
        for name, value in whole.system.named_parameters():
            value = value.detach().double()
            begins = row["iteration"] in (1, 7, 11)  # of the stages of 6, 4 and 6
            expected[name] = value if begins else 0.8 * expected[name] + 0.2 * value
        if row["iteration"] == 12:
            checkpoint.save(tmp_path / "c.pt", whole.state_dict())
    assert whole.averaged is not None
    average = dict(whole.averaged.module.named_parameters())
    assert average.keys() == expected.keys()
    for name, value in average.items():
        # 16 float32 roundings of numbers of the weights' size, below 4
        assert (value.detach().double() - expected[name]).abs().max() <= 16 * 4 * 2**-24
    resumed = Trainer(config, data)
    resumed.load_state_dict(checkpoint.load(tmp_path / "c.pt"))
    list(resumed.run())
    assert resumed.averaged is not None
    again = dict(resumed.averaged.module.named_parameters())
    assert all(torch.equal(value, again[name]) for name, value in average.items())


def test_tuples_read_from_disk_are_those_in_memory(config: Config, data: MultimodalDataset, tmp_path) -> None:
    """A memory-mapped pool, read ahead in the background: the same networks, bit for bit, also after a rollback."""
    file = tmp_path / "vector.npy"
    np.save(file, data.instances("vector", torch.arange(64)).numpy())
    pool = ArrayPool(np.load(file, mmap_mode="r"), data.modalities[2], str(file))
    streamed = dataclasses.replace(data, pools={**data.pools, "vector": pool})
    ends = []
    for held in (data, streamed):
        trainer = Trainer(config, held)
        trainer.guard.reason = iter_once(trainer.guard.reason)  # type: ignore[method-assign]
        rows = list(trainer.run())
        assert sum("rolled_back" in row for row in rows) == 1
        ends.append(networks(trainer))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def iter_once(reason: Any) -> Any:
    """A guard that finds fault once, at its third look."""
    looks = iter(range(100))
    return lambda rows: "for the test" if next(looks) == 2 else reason(rows)


def test_training_leaves_the_global_generator_alone(config: Config, data: MultimodalDataset) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(Trainer(config, data).run())
    assert torch.equal(torch.rand(3), expected)


def test_rolls_back_and_goes_on(config: Config, data: MultimodalDataset) -> None:
    """A NaN in the energy's weights at one iteration: back to the last good state, then on to the end."""
    trainer = Trainer(config, data)
    step, hits = trainer._steps["joint"], []

    def poisoned(batch: Minibatch, rng: torch.Generator) -> dict[str, object]:
        row = step(batch, rng)
        if not hits:
            hits.append(trainer.iteration)
            for p in trainer.system.energy.parameters():
                p.data.fill_(float("nan"))
        return row

    trainer._steps["joint"] = poisoned
    rows = list(trainer.run())
    back = [row for row in rows if "rolled_back" in row]
    assert len(back) == 1 and back[0]["iteration"] <= hits[0]
    assert trainer.iteration == trainer.total
    assert all(torch.isfinite(v).all() for v in networks(trainer).values())
    assert trainer.lr == 0.5


def test_a_state_that_is_not_finite_is_no_good_state(config: Config, data: MultimodalDataset) -> None:
    """The last update of a window makes NaN, which no value that was logged before it can show."""
    trainer = Trainer(config, data)
    step, hits = trainer._steps["joint"], []

    def poisoned(batch: Minibatch, rng: torch.Generator) -> dict[str, object]:
        row = step(batch, rng)
        if trainer.iteration == 13 and not hits:  # windows end after 10 (a stage) and 14 iterations
            hits.append(trainer.iteration)
            next(trainer.system.energy.parameters()).data.view(-1)[0] = float("nan")
        return row

    trainer._steps["joint"] = poisoned
    rows = list(trainer.run())
    assert hits == [13]
    assert [row["iteration"] for row in rows if "rolled_back" in row] == [10]
    assert "is not finite" in next(row["rolled_back"] for row in rows if "rolled_back" in row)
    assert trainer.iteration == trainer.total
    assert all(torch.isfinite(v).all() for v in networks(trainer).values())


def test_a_rollback_restores_all_that_training_writes(config: Config, data: MultimodalDataset) -> None:
    """Networks, Adam's state, moving average and the persistent chains of both kinds are as they were."""
    start = StartConfig(data="buffer", latent="persistent", buffer=32)
    trainer = Trainer(config.replace(start=start, ema=0.9), data)
    reason, states, looks = trainer.guard.reason, [], iter(range(100))
    # the fifth window, the first of the joint stage is the third: the buffer has begun
    trainer.guard.reason = lambda rows: "for the test" if next(looks) == 4 else reason(rows)  # type: ignore[method-assign]
    for row in trainer.run():
        states.append(trainer.state_dict())
        if "rolled_back" in row:
            break
    before, after = flat(states[-2]), flat(states[-1])
    assert before.keys() == after.keys() and any("buffer" in name for name in before)
    differ = [name for name, value in before.items() if not same(value, after[name])]
    # the count of rollbacks, and what the chains have cost
    assert differ == ["rollbacks", "evaluations"]


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested dicts and lists by name."""
    if not isinstance(value, dict | list | tuple):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {leaf: v for key, part in items for leaf, v in flat(part, f"{name}.{key}" if name else str(key)).items()}


def same(a: Any, b: Any) -> bool:
    return torch.equal(a.nan_to_num(9), b.nan_to_num(9)) if isinstance(a, Tensor) else a == b


def test_draws_from_the_global_generator_resume_bit_for_bit(config: Config, data: MultimodalDataset, tmp_path) -> None:
    """As dropout draws: noise on a weight, after every iteration of the warm-up."""

    def trainer() -> Trainer:
        made = Trainer(config.replace(stages=(Stage("warmup", 16),)), data)
        step = made._steps["warmup"]

        def noisy(batch: Minibatch, rng: torch.Generator) -> dict[str, Any]:
            row = step(batch, rng)
            weight = next(made.system.generator.parameters()).data
            weight += 1e-3 * torch.randn_like(weight)
            return row

        made._steps["warmup"] = noisy
        return made

    ends = []
    for cut in (0, 8):
        one = trainer()
        for row in one.run():
            if row["iteration"] == cut:  # never for 0: that one is left alone
                checkpoint.save(tmp_path / "c.pt", one.state_dict())
                torch.manual_seed(cut)
                one = trainer()
                one.load_state_dict(checkpoint.load(tmp_path / "c.pt"))
                list(one.run())
                break
        ends.append(networks(one))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.update(iteration=10**6), "iteration 1000000 of 16"),
        (lambda s: s["system"].popitem(), "Missing key"),
        (lambda s: s["system"].update(more=torch.zeros(2)), "Unexpected key"),
        (lambda s: s["optimisers"].pop("energy"), "energy"),
        (lambda s: s["optimisers"]["energy"]["state"][0].update(exp_avg=torch.zeros(3)), "has not its shape"),
        (lambda s: s["optimisers"]["energy"]["state"].update({999: {}}), "of parameter 999"),
        (lambda s: s["optimisers"]["energy"]["param_groups"][0].update(betas=[0.5, 7.0]), "betas"),
        (lambda s: s["optimisers"]["energy"]["param_groups"][0].update(params=[0]), "params"),
        (lambda s: s.update(averaged=None), "averag|belong"),
        (lambda s: s["starts"]["latent"].update(ends=torch.zeros(1)), "persistent latent chains"),
        (lambda s: s["starts"]["data"]["buffer"].update(data=[torch.zeros(1)] * 3), "buffer|data"),
    ],
)
def test_a_state_of_another_configuration_is_refused(
    change: Any, message: str, config: Config, data: MultimodalDataset
) -> None:
    config = config.replace(ema=0.9, start=StartConfig(data="buffer", latent="persistent", buffer=32))
    trainer = Trainer(config, data)
    list(trainer.run())
    state = trainer.state_dict()
    change(state)
    with pytest.raises(ValueError, match=message):
        Trainer(config, data).load_state_dict(state)


def test_gives_up_after_too_many_rollbacks(config: Config, data: MultimodalDataset) -> None:
    trainer = Trainer(config.replace(guard=GuardConfig(every=4, rollbacks=2, max_gap=0.0)), data)
    with pytest.raises(TrainingDiverged, match=r"the energy gap is .* rolled back 2 times already"):
        list(trainer.run())
    # what is left is the last good state
    assert all(torch.isfinite(v).all() for v in networks(trainer).values())


def test_latent_alarm_is_in_the_log(config: Config, data: MultimodalDataset) -> None:
    rows = list(Trainer(config.replace(guard=GuardConfig(every=4, latent_alarm=1e-6)), data).run())
    assert any("the latent chain may be unstable" in row.get("alarm", "") for row in rows if row["stage"] == "joint")


@pytest.mark.parametrize("inference", ["mixture", "per_expert"])
@pytest.mark.parametrize(
    "model",
    [
        {"spectral": True, "energy_scale": 10.0},
        {"likelihood": "laplace"},
        {"inference": "product"},
        {"inference": "mixture_of_products"},
    ],
)
def test_switches_run(inference: str, model: dict[str, object], config: Config, data: MultimodalDataset) -> None:
    config = config.replace(
        model=dataclasses.replace(config.model, **model),
        loss=LossConfig(inference=inference),  # type: ignore[arg-type]
    )
    rows = list(Trainer(config, data).run())
    assert all(math.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))


def test_paper_preset_has_no_extension() -> None:
    paper, demo = preset("paper"), preset("demo")
    assert paper.latent_prior is None and paper.shuffled_tuples is None and paper.loss.elbo == 0
    assert paper.loss.contrastive == 0 and demo.latent_prior is not None and demo.loss.contrastive > 0
    known = re.escape(f"preset must be one of {sorted(PRESETS)}, got 'x'")
    with pytest.raises(ValueError, match=known):
        preset("x")


def conv(config: Config, **changes: Any) -> Config:
    """The configuration with convolutional networks and a joint stage of six iterations."""
    model = ModelConfig(
        latent=3,
        net="conv",
        generator_width=8,
        inference_width=8,
        energy_width=16,
        energy_trunk_width=4,
        energy_features=8,
    )
    return config.replace(model=model, stages=(Stage("warmup", 6), Stage("joint", 6)), **changes)


def test_bfloat16_trains(config: Config, data: MultimodalDataset) -> None:
    """Convolutions run in bfloat16, in the chains too; states, weights and losses stay float32 and near the others."""
    rows, seen = {}, set()
    for precision in ("fp32", "bf16"):
        trainer = Trainer(conv(config, precision=precision), data)
        convolution = next(m for m in trainer.system.energy.modules() if isinstance(m, nn.Conv2d))
        convolution.register_forward_hook(lambda m, args, out: seen.add(out.dtype))
        rows[precision] = list(trainer.run())
        assert all(p.dtype == torch.float32 for p in trainer.system.parameters())
        chain = trainer.system.revise_data(trainer.batch().x, seed=0)
        assert {t.dtype for t in chain.state.values()} == {torch.float32}
        assert seen == {{"fp32": torch.float32, "bf16": torch.bfloat16}[precision]}
        seen.clear()
    for a, b in zip(rows["fp32"], rows["bf16"], strict=True):
        assert a.keys() == b.keys() and all(math.isfinite(v) for v in b.values() if isinstance(v, float))
        # predictions of 8 bits: 2^-8 of the mean error; the roundings behind it average out (measured: 5e-4, Zen 4,
        # 2 cores, 2026-11-22)
        assert a["mse"] != b["mse"] and abs(a["mse"] - b["mse"]) < 2**-8 * a["mse"]


def test_channels_last_trains(config: Config, data: MultimodalDataset) -> None:
    """Weights of convolutions lie channels last, also after training and loading, and the numbers are the others'."""
    rows = {}
    for last in (False, True):
        trainer = Trainer(conv(config, channels_last=last), data)
        rows[last] = list(trainer.run())
        trainer.load_state_dict(trainer.state_dict())
        weights = [m.weight for m in trainer.system.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
        wide = [w for w in weights if w.shape[1] > 1 and w.shape[2] > 1]
        assert wide and all(w.is_contiguous(memory_format=torch.channels_last) == last for w in wide)
        assert all(w.is_contiguous() != last for w in wide)
    for a, b in zip(rows[False], rows[True], strict=True):
        # another order of sums: rounding of float32, which twelve iterations of Adam make larger
        assert abs(a["mse"] - b["mse"]) < 1e-3 * a["mse"]


def test_posteriors_of_two_batches_are_one_graph(config: Config, data: MultimodalDataset) -> None:
    """The latent chain's energy is made anew at each iteration; only its batch is another."""
    trainer = Trainer(conv(config), data)
    s = trainer.system
    keys = set()
    for trainer.iteration in range(2):
        x = {name: value.clone() for name, value in trainer.batch().x.items()}
        rebuild, parts, fixed = parts_of(Posterior(s.generator, s.prior, x))
        identity = Identity(torch.device("cpu"), training=False)
        identity.add(fixed)
        identity.input(parts)
        assert len(identity.inputs) == len(x) and identity.refusal is None
        keys.add(tuple(identity.full))
        z = torch.randn(16, 3)
        assert torch.equal(rebuild(parts)(z), Posterior(s.generator, s.prior, x)(z))
    assert len(keys) == 1


@pytest.mark.parametrize("field, value", [("precision", "fp16"), ("channels_last", 1)])
def test_precision_and_layout_are_checked(field: str, value: Any, config: Config) -> None:
    with pytest.raises((ValueError, TypeError), match=f"{field} must be"):
        config.replace(**{field: value})


def mixture(config: Config, **options: Any) -> Config:
    prior = LatentPriorConfig(kind="mixture", posterior="product", components=2, samples=60)
    prior = dataclasses.replace(prior, **options)
    return config.replace(latent_prior=prior, stages=(Stage("warmup", 4), Stage("prior", 1), Stage("joint", 3)))


def test_mixture_is_fitted_in_its_stage_and_rests_in_the_joint_one(config: Config, data: MultimodalDataset) -> None:
    pytest.importorskip("sklearn")
    trainer = Trainer(mixture(config).replace(ema=0.9), data)
    seen: list[tuple[str, Tensor]] = [("start", trainer.system.prior.means.clone())]
    for row in trainer.run():
        seen.append((row["stage"], trainer.system.prior.means.clone()))
        if row["stage"] == "prior":
            # it explains the product's samples at least as well as N(0, I) does
            z = trainer.system.inference.sample(trainer.data.batch(torch.arange(64)), joint="product")
            assert (-trainer.system.prior(z)).mean() > 0
    after = dict(seen)
    assert torch.equal(after["start"], after["warmup"]) and not torch.equal(after["warmup"], after["prior"])
    assert torch.equal(after["prior"], after["joint"])
    assert trainer.averaged is not None
    assert torch.equal(trainer.averaged.module.prior.means, after["prior"])  # type: ignore[union-attr]


def test_mixture_resumes_and_loads_without_scikit_learn(
    config: Config, data: MultimodalDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    whole = Trainer(mixture(config), data)
    list(whole.run())
    half = Trainer(mixture(config), data)
    for row in half.run():
        if row["stage"] == "prior":
            break
    state = half.state_dict()
    monkeypatch.setitem(sys.modules, "sklearn.mixture", None)
    resumed = Trainer(mixture(config), data)
    resumed.load_state_dict(state)
    list(resumed.run())
    for name, value in whole.system.state_dict().items():
        assert torch.equal(value, resumed.system.state_dict()[name]), name


def test_mixture_is_fitted_once_a_stage(
    config: Config, data: MultimodalDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    fits: list[int] = []
    monkeypatch.setattr(MixturePrior, "fit", lambda self, z, **kwargs: fits.append(len(z)))
    stages = (Stage("warmup", 2), Stage("prior", 5), Stage("joint", 2), Stage("prior", 1))
    list(Trainer(mixture(config).replace(stages=stages, accumulate=2), data).run())
    assert fits == [60, 60]


def test_contrastive_tells_rows_apart(config: Config, data: MultimodalDataset) -> None:
    """It joins the loss of the warm-up and of the joint stage's bound, and falls."""
    losses = dataclasses.replace(config.loss, contrastive=20.0)
    config = config.replace(loss=losses, stages=(Stage("warmup", 40), Stage("joint", 4)), latent_prior=None)
    rows = list(Trainer(config, data).run())
    first, last = rows[0]["loss_contrastive"], rows[-1]["loss_contrastive"]
    assert rows[-1]["stage"] == "joint" and last < first
    off = config.replace(loss=dataclasses.replace(losses, contrastive=0.0))
    assert "loss_contrastive" not in next(iter(Trainer(off, data).run()))


def test_matching_teaches_the_way_to_the_data(config: Config, data: MultimodalDataset) -> None:
    """The loss is the formula, redone by hand; where it has fallen, the chain as configured goes nearer to X."""
    stages = (Stage("warmup", 30), Stage("matching", 200, lr=10.0, final_lr=3.0))
    trainer = Trainer(config.replace(stages=stages, latent_prior=None, guard=GuardConfig(every=10)), data)
    before = networks(trainer)
    rows = list(trainer.run())
    moved = {name.split(".")[0] for name in changed(before, networks(trainer))}
    assert moved == {"generator", "inference", "energy"} and "vae" in trainer.snapshots
    ways = [row for row in rows if "loss_matching" in row]
    assert ways[-1]["loss_matching"] < 0.9 * ways[-1]["way"]

    s, batch = trainer.system, trainer.batch()
    rng = torch.Generator().manual_seed(4)
    z = s.inference.sample(batch.x, torch.Generator().manual_seed(4))
    x_0 = {name: value.detach() for name, value in s.generator(z).items()}
    state = torch.Generator().manual_seed(4)
    s.inference.sample(batch.x, state)
    t = torch.rand(batch.size, generator=state)
    total, count = 0.0, 0
    for i in range(batch.size):
        at = {n: (x_0[n][i] + t[i] * (batch.x[n][i] - x_0[n][i]))[None].requires_grad_() for n in batch.x}
        grads = torch.autograd.grad(s.energy(at).sum(), list(at.values()))
        for name, grad in zip(at, grads, strict=True):
            # travel 0.5 is K s^2, of which the update takes half
            off = 0.5 / 2 * grad[0] + batch.x[name][i] - x_0[name][i]
            total, count = total + off.square().sum().item(), count + off.numel()
    assert float(trainer.matching_step(batch, rng)["loss_matching"]) == pytest.approx(total / count, rel=1e-4)


def test_energy_trim_and_clamp(config: Config, data: MultimodalDataset) -> None:
    """The gradient is that of what is left: without the highest revised energies; none beyond the clamp."""

    def moved(**loss: Any) -> dict[str, Tensor]:
        losses = dataclasses.replace(config.loss, energy_l2=0.0, **loss)
        trainer = Trainer(config.replace(loss=losses, shuffled_tuples=None, latent_prior=None), data)
        real, fake = trainer.batch().x, {n: torch.rand(16, *v.shape[1:]) for n, v in trainer.batch().x.items()}
        energies = trainer.system.energy(fake).detach()
        row: dict[str, Any] = {}
        with torch.random.fork_rng():
            taken: list[Tensor] = []
            trainer.optimisers["energy"].step = lambda value, lr: taken.append(value)  # type: ignore[assignment, method-assign]
            trainer._teach_energy(real, fake, fake, torch.Generator(), row)
        up = trainer.system.energy(real).mean()
        return {"loss": taken[0].detach(), "up": up.detach(), "energies": energies.sort().values}

    torch.manual_seed(0)
    out = moved(energy_trim=0.25)
    torch.testing.assert_close(out["loss"], out["up"] - out["energies"][:12].mean())
    out = moved(energy_clamp=1e-6)
    plain = out["up"] - out["energies"].mean()
    torch.testing.assert_close(out["loss"], plain.clamp(min=-1e-6))


def test_completions_start_from_the_joint_that_is_asked_for(config: Config, data: MultimodalDataset) -> None:
    for joint in ("inference", "product"):
        start = dataclasses.replace(config.start, completion=joint)
        s = Trainer(config.replace(start=start, stages=(Stage("warmup", 5),)), data).system
        given = {name: value for name, value in data.batch(torch.arange(4)).items() if name != "grey"}
        name = None if joint == "inference" else joint
        z = s.inference.sample(given, torch.Generator().manual_seed(3), joint=name)
        done = s.complete(given, seed=3, latent_steps=0, data_steps=0)
        torch.testing.assert_close(done["grey"], s.generator(z)["grey"])


def test_flow_learns_in_its_stage_and_along(config: Config, data: MultimodalDataset) -> None:
    prior = dataclasses.replace(config.latent_prior, kind="flow", posterior="product")
    trainer = Trainer(config.replace(latent_prior=prior), data)
    before = networks(trainer)
    rows = list(trainer.run())
    assert "prior" in changed(before, networks(trainer))
    assert {row["stage"] for row in rows if "prior_loss" in row} == {"prior", "joint"}
    one = trainer.system.generate(3, seed=1)
    assert all(torch.isfinite(v).all() for v in one.values())
    with pytest.raises(ValueError, match="is a network of an energy"):
        config.replace(latent_prior=prior, model=dataclasses.replace(config.model, prior="a:B"))


def test_the_report_is_of_the_chains_that_run(config: Config, data: MultimodalDataset, need: Any) -> None:
    """It says what so many rows of an iteration do on so many threads."""
    need("cpp")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for batch, accumulate, idle in ((96, 1, False), (96, 48, True)):
            trainer = Trainer(config.replace(batch=batch, accumulate=accumulate), data)
            for name, line in trainer.chain_reports().items():
                # threads without chains help in nets
                wanted = idle and "langevin_mlp" in line
                assert line.startswith("one fused call"), (name, line)
                assert ("2 chains keep 1 of 2 threads" in line) is wanted, (name, line)
    finally:
        torch.set_num_threads(threads)
