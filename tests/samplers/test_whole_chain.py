"""A chain in one call is the chain of the loop: same noise, same rule, same records; taken wherever it can be."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmebm.energies import MLP, Gaussian
from mmebm.ops.langevin_mlp import cpp as mlp_room
from mmebm.ops.net import cpp as net_room
from mmebm.samplers import Langevin, Samples, langevin
from mmebm.samplers.schedules import linear, table

STEPS = 8


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def cpp(need: Callable[[str], None], seed: int) -> None:
    need("cpp")
    torch.manual_seed(seed)


class Joint(nn.Module):
    """Two modalities, one MLP."""

    mmebm_pure = True

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6 + 3, 17), nn.SiLU(), nn.Linear(17, 9), nn.SiLU(), nn.Linear(9, 1))

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return self.net(torch.cat([x["image"].flatten(1), x["text"]], dim=1)).squeeze(1)


def state(chains: int = 5) -> dict[str, Tensor]:
    return {"image": torch.rand(chains, 1, 2, 3), "text": torch.rand(chains, 3)}


def both(
    energy: nn.Module,
    start: Any,
    *,
    sampler: dict[str, Any],
    options: dict[str, Any] | None = None,
    seed: int,
    steps: int = STEPS,
) -> tuple[Samples, Samples, Samples]:
    """(in one call, by the loop, by the loop in float64) with the same noise."""
    hidden = functools.partial(energy)  # what a partial computes is not looked at
    wide = copy.deepcopy(energy).double()

    def double(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: double(v) for key, v in value.items()}
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    options = options or {}
    description = Langevin(**sampler)
    fused = description.sample(energy, start, steps, seed=seed, **options)
    loop = description.sample(hidden, start, steps, seed=seed, **options)
    exact = Langevin(**{key: double(v) for key, v in sampler.items()}).sample(
        functools.partial(wide), double(start), steps, seed=seed, **options
    )
    return fused, loop, exact


def leaves(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value.values())


def assert_close(fused: Any, loop: Any, exact: Any) -> None:
    """At most twice the loop's error against float64, plus that of the noise: 2e-6 a normal (mmebm/noise.py), STEPS of
    them with a scale of at most 1."""
    for a, b, c in zip(leaves(fused), leaves(loop), leaves(exact), strict=True):
        assert a.shape == c.shape and a.dtype == torch.float32
        if not a.numel():
            continue
        ours, theirs = (float((t.double() - c).abs().max()) for t in (a, b))
        assert ours <= 2 * theirs + 2e-6 * STEPS * max(1.0, float(c.abs().max())), (ours, theirs)


PER_CHAIN = torch.tensor([0.02, 0.05, 0.1, 0.01, 0.03])
SAMPLERS: dict[str, dict[str, Any]] = {
    "plain": {"step_size": 0.05},
    "noise scale": {"step_size": 0.05, "noise_scale": 0.3},
    "no noise": {"step_size": 0.05, "noise_scale": 0.0},
    "temperature": {"step_size": 0.05, "temperature": 0.2},
    "per modality": {"step_size": {"image": 0.05, "text": 0.2}, "noise_scale": {"image": 0.0, "text": 0.1}},
    "per chain": {"step_size": PER_CHAIN, "noise_scale": 0.1},
    "schedule": {"step_size": linear(0.1, 0.01, STEPS), "temperature": linear(1.0, 0.1, STEPS)},
    "schedule of one modality": {"step_size": {"image": linear(0.1, 0.0, STEPS), "text": PER_CHAIN}},
    "clips": {"step_size": 0.05, "grad_clip": 0.02, "max_update": 0.1},
    "norm clip": {"step_size": 0.5, "noise_scale": 0.01, "grad_norm_clip": {"image": 0.05}},
    "prior": {"step_size": 0.05, "prior_std": {"text": 0.7}},
    "bounds": {"step_size": 0.05, "bounds": (0.2, 0.8)},
    "bounds of one modality": {"step_size": 0.05, "bounds": {"image": (None, 0.5)}},
    "bounds at the end": {"step_size": 0.05, "bounds": (0.2, 0.8), "bounds_at": "end"},
    "noise before": {"step_size": 0.05, "noise_scale": 0.2, "noise_at": "before"},
    "noise before, clamped": {
        "step_size": 0.05,
        "noise_scale": 0.4,
        "noise_at": "before",
        "bounds": (0.0, 1.0),
        "clamp_noise": True,
    },
    "log prob": {"step_size": 0.05, "log_prob": True},
    "freeze": {"step_size": 0.05, "on_nonfinite": "freeze"},
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_options_of_the_sampler(name: str, seed: int) -> None:
    record = {"record": ("energy", "grad_norm"), "thin": 3}
    fused, loop, exact = both(Joint(), state(), sampler=SAMPLERS[name], options=record, seed=seed)
    assert (fused.info["op"], fused.info["backend"]) == ("langevin_mlp", "cpp"), fused.info["reason"]
    assert loop.info["op"] == "langevin_step" and "partial" in loop.info["reason"]
    assert_close(fused.state, loop.state, exact.state)
    assert_close(fused.trace, loop.trace, exact.trace)
    assert_close(fused.trajectory, loop.trajectory, exact.trajectory)
    assert not fused.info["nonfinite"].any()


MASK = torch.tensor([True, False, False])
CALLS: dict[str, dict[str, Any]] = {
    "a modality observed": {"observed": {"text"}},
    "elements observed": {"observed": {"text": MASK}},
    "elements of some chains observed": {"observed": {"image": torch.rand(5, 1, 2, 3) < 0.5}},
    "offset": {"chain_offset": 1000, "first_step": 17},
    "chunks": {"chunk_size": 2},
    "no steps recorded": {"record": ()},
    "thin longer than the chain": {"thin": STEPS + 1},
    "thin all": {"thin": 1, "record": ("energy",)},
}


@pytest.mark.parametrize("name", CALLS)
def test_options_of_the_call(name: str, seed: int) -> None:
    sampler = {"step_size": 0.05, "noise_scale": 0.1}
    fused, loop, exact = both(Joint(), state(), sampler=sampler, options=CALLS[name], seed=seed)
    assert fused.info["op"] == "langevin_mlp", fused.info["reason"]
    assert_close(fused.state, loop.state, exact.state)
    assert_close(fused.trace, loop.trace, exact.trace)
    if "thin" in CALLS[name]:
        assert_close(fused.trajectory, loop.trajectory, exact.trajectory)


def test_observed_values_keep_their_bits(seed: int) -> None:
    start = state()
    start["text"][0, 0] = -0.0
    out = Langevin(0.1, bounds=(0.4, 0.6)).sample(Joint(), start, STEPS, seed=seed, observed={"text"})
    assert out.info["op"] == "langevin_mlp"
    assert torch.equal(out.state["text"].view(torch.int32), start["text"].view(torch.int32))
    assert out.state["text"].data_ptr() != start["text"].data_ptr()


def test_a_frozen_chain_stays_frozen_in_later_pieces(seed: int) -> None:
    energy = MLP(4, (5,))
    start = torch.randn(3, 4)
    # 1 / prior_std^2 is no float32: what the prior adds to the gradient of chain 1 in step 2 is infinite
    prior = lambda k: torch.tensor([1.0, 1e-20 if k == 2 else 1.0, 1.0])
    sampler = Langevin(0.01, 0.1, prior_std=prior, on_nonfinite="freeze")
    out = sampler.sample(energy, start, 9, seed=seed, thin=3)
    loop = sampler.sample(functools.partial(energy), start, 9, seed=seed, thin=3)
    assert out.info["op"] == "langevin_mlp" and loop.info["op"] == "langevin_step"
    assert out.info["nonfinite"].tolist() == loop.info["nonfinite"].tolist() == [False, True, False]
    two = langevin(energy, start, 2, step_size=0.01, noise_scale=0.1, prior_std=1.0, seed=seed)
    # steps 0 and 1 of the chain that breaks at step 2; fp32 rounding of six operations a step
    torch.testing.assert_close(out.state[1], two[1], rtol=0, atol=1e-5)
    assert torch.equal(out.trajectory[:, 1], out.state[1].expand(3, 4))


@pytest.mark.parametrize("op", ["langevin_mlp", "langevin_net"])
@pytest.mark.parametrize("observed", [False, True])
def test_a_chain_is_frozen_where_its_energy_was_last_finite(op: str, observed: bool, seed: int) -> None:
    """Not some steps later, where its gradient or state is not finite either."""
    net = nn.Sequential(
        nn.Linear(4, 8), nn.Tanh(), *([nn.LayerNorm(8)] if op == "langevin_net" else []), nn.Linear(8, 1)
    )
    energy = lambda x: net(x).squeeze(1) + x.square().sum(1)
    start = torch.randn(3, 4)
    start[1, 0] = 1e20 if observed else 1.0  # of which the square is infinite
    sampler = Langevin(table([0.1, 1e10, 1e10, 1e10, 1e10]), 0.0, on_nonfinite="freeze")
    options: dict[str, Any] = {"thin": 1, "observed": torch.arange(4)[None] == 0} if observed else {"thin": 1}
    assert sampler.sample(energy, torch.randn(3, 4), 1).info["op"] == op
    ours, loop = (sampler.replace(backend=b).sample(energy, start, 5, seed=seed, **options) for b in ("auto", "torch"))
    assert ours.info["nonfinite"].all() and loop.info["nonfinite"].all()
    torch.testing.assert_close(ours.trajectory, loop.trajectory, rtol=1e-3, atol=1e-5)  # some 1e20 times a rounding


def test_raise_on_nonfinite(seed: int) -> None:
    start = torch.randn(3, 4)
    start[1, 2] = math.nan
    with pytest.raises(FloatingPointError, match="1 of 3 chains"):
        langevin(MLP(4, (5,)), start, 3, step_size=0.1, seed=seed, on_nonfinite="raise")


def test_input_and_module_are_left_alone(seed: int) -> None:
    energy, start = Joint(), state()
    kept = {key: t.clone() for key, t in start.items()}
    energy.train()
    weights = [p.clone() for p in energy.parameters()]
    out = Langevin(0.1).sample(energy, start, STEPS, seed=seed)
    assert out.info["op"] == "langevin_mlp"
    assert all(torch.equal(start[key], t) for key, t in kept.items())
    assert energy.training and all(p.requires_grad and p.grad is None for p in energy.parameters())
    assert all(torch.equal(a, b) for a, b in zip(weights, energy.parameters(), strict=True))
    assert not any(t.requires_grad for t in out.state.values())


def test_restart_and_split_batch_are_exact(seed: int) -> None:
    energy, start = MLP(7, (33, 16), "gelu"), torch.randn(13, 7)
    sampler = Langevin(0.05, noise_scale=0.2)
    whole = sampler.sample(energy, start, 11, seed=seed)
    first = sampler.sample(energy, start, 4, seed=seed)
    rest = sampler.sample(energy, first.state, 7, seed=seed, first_step=first.info["next_step"])
    assert torch.equal(rest.state, whole.state)
    part = sampler.sample(energy, start[5:9], 11, seed=seed, chain_offset=5)
    assert torch.equal(part.state, whole.state[5:9])


def test_stationary_variance_of_a_gaussian(seed: int) -> None:
    """1 / (1 - h/2), the unadjusted chain's (docs/conventions.md)."""
    h, chains, size = 0.4, 400, 256
    out = Langevin(h).sample(Gaussian(), torch.zeros(chains, size), 24, seed=seed)
    # a Gaussian has no hidden layer, and is one term all the same
    assert out.info["op"] == "langevin_mlp", out.info["reason"]
    n = chains * size
    off = (float(out.state.double().square().sum()) * (1 - h / 2) - n) / math.sqrt(2 * n)
    assert abs(off) < 5.7


WHY: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "torch": ({"backend": "torch"}, {}, "backend='torch'"),
    "rng": ({"rng": "torch"}, {}, "rng='torch'"),
    "accept": ({"accept": "descent"}, {}, "accept"),
    "project": ({"project": lambda x: x / 2}, {}, "project"),
    "reject": ({"bounds": (-9.0, 9.0), "outside": "reject"}, {}, "reject"),
    "tensor norm": ({"grad_norm_clip": 1.0, "norm_over": "tensor"}, {}, "norm_over"),
    "bounds per element": ({"bounds": (torch.zeros(4), torch.ones(4))}, {}, "one value per chain"),
    "records": ({}, {"record": ("displacement",)}, "displacement"),
    "differentiable": ({}, {"differentiable": 1}, "differentiable"),
}


@pytest.mark.parametrize("name", WHY)
def test_the_loop_is_taken_and_says_why(name: str, seed: int) -> None:
    sampler, options, reason = WHY[name]
    out = Langevin(0.1, **sampler).sample(MLP(4, (5,)), torch.randn(3, 4), 2, seed=seed, **options)
    assert out.info["op"] == "langevin_step" and reason in out.info["reason"], out.info["reason"]


@pytest.mark.parametrize("chunk", [None, 2])
def test_a_posteriors_data_as_an_argument(chunk: int | None, seed: int) -> None:
    decoder = nn.Sequential(nn.Linear(4, 9), nn.ELU(), nn.Linear(9, 6), nn.Tanh())
    energy = lambda z, x: (decoder(z) - x).square().sum(1)
    z, x = torch.randn(5, 4), torch.randn(5, 6)
    sampler = Langevin(0.05, 0.1, prior_std=1.0)
    fused = sampler.sample(energy, z, STEPS, seed=seed, args=(x,), chunk_size=chunk)
    loop = sampler.sample(functools.partial(energy), z, STEPS, seed=seed, args=(x,))
    assert (fused.info["op"], loop.info["op"]) == ("langevin_mlp", "langevin_step"), fused.info["reason"]
    wide = copy.deepcopy(decoder).double()
    exact = sampler.sample(lambda z, x: (wide(z) - x).square().sum(1), z.double(), STEPS, seed=seed, args=(x.double(),))
    assert_close(fused.state, loop.state, exact.state)


def test_a_scalar_energy_is_recorded_by_the_loop(seed: int) -> None:
    net = MLP(4, (5,))
    energy = lambda x: net(x).sum()
    assert Langevin(0.1).sample(energy, torch.randn(3, 4), 2, seed=seed).info["op"] == "langevin_mlp"
    out = Langevin(0.1).sample(energy, torch.randn(3, 4), 2, seed=seed, record=("energy",))
    assert out.info["op"] == "langevin_step" and out.trace["energy"].shape == (2,)


def test_wide_is_a_net_and_double_takes_the_loop(seed: int) -> None:
    energy, x = MLP(4, (257,)), torch.randn(3, 4)
    out = Langevin(0.1).sample(energy, x, 2, seed=seed)
    assert out.info["op"] == "langevin_net"
    wanted = Langevin(0.1, backend="torch").sample(energy, x, 2, seed=seed)
    torch.testing.assert_close(out.state, wanted.state, rtol=0, atol=1e-5)  # normals within 2e-6, sums in another order
    out = Langevin(0.1).sample(MLP(4, (5,)).double(), torch.randn(3, 4, dtype=torch.float64), 2, seed=seed)
    assert out.info["op"] == "langevin_step" and "float32" in out.info["reason"]


def test_every_chain_of_the_demo_is_one_call(seed: int) -> None:
    from mmebm.training.presets.demo import config, energy_prior
    from mmebm.training.system import System

    shapes = {"mnist": (1, 14, 14), "optdigits": (1, 8, 8), "word": (10,)}
    system = System(energy_prior(), shapes)
    x = {name: torch.rand(4, *shape) for name, shape in shapes.items()}
    z = torch.randn(4, 16)
    data = system.revise_data(x, seed=seed, steps=3)
    given = system.revise_data(x, seed=seed, steps=3, observed={"word"})
    latent = system.revise_latent(z, x, seed=seed, steps=3)
    prior = system.prior.sampler.sample(system.prior, z, 3, seed=seed)  # pyright: ignore
    for out in (data, given, latent, prior):
        assert out.info["op"] == "langevin_mlp", out.info["reason"]
    # a mixture of Gaussians is no MLP, but a net
    today = System(config(), shapes)
    assert today.revise_data(x, seed=seed, steps=3).info["op"] == "langevin_mlp"
    latent = today.revise_latent(z, x, seed=seed, steps=3)
    assert latent.info["op"] == "langevin_net", latent.info["reason"]


def test_a_chain_in_pieces_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    for kind in (mlp_room, net_room):
        real = kind.supports
        monkeypatch.setattr(kind, "supports", lambda c, x, real=real: looks.append(c) or real(c, x))
    conv = nn.Conv2d(1, 2, 3)
    for energy, start in (
        (MLP(4, (8,)), torch.randn(3, 4)),
        (lambda x: conv(x).square().flatten(1).sum(1), torch.randn(3, 1, 4, 4)),
    ):
        Langevin(0.01).sample(energy, start, 1, seed=0)  # the parity case looks too
        looks.clear()
        out = Langevin(0.01).sample(energy, start, 6, seed=0, thin=1)
        assert out.info["op"] != "langevin_step" and len(looks) == 1 and not looks[0].checked
