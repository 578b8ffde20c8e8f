"""The sampler: what its chains converge to, what they leave alone, and what their rows, seeds and records promise.

The published loops are in test_published_loops.py; structures and errors in test_state.py; modules in
test_user_modules.py.
"""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmebm import noise
from mmebm.ops import langevin_step as op
from mmebm.ops.common.params import StepParams, StepStats
from mmebm.samplers import Langevin, Samples, langevin
from mmebm.samplers.schedules import linear, table

# Every statistical test compares a sum of at least 10^5 independent terms with its mean, in standard deviations; 5.7 is
# exceeded with probability 1.2e-8 by a normal number, so that all of this file together gives a false alarm in fewer
# than one of 10^6 runs.
SIGMAS = 5.7


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are small here: on a busy machine, waiting for a second thread takes 70 times the work (measured)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def quadratic(x: Tensor) -> Tensor:
    """A standard Gaussian's energy, (chains,)."""
    return 0.5 * x.flatten(1).square().sum(1)


def leaves(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    return list(state.values()) if isinstance(state, dict) else list(state)


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# What a chain converges to
# ---------------------------------------------------------------------------------------------------------------------

CHAINS, SIZE, BURN_IN = 400, 256, 24
H = 0.4  # (1 - H)^(2 BURN_IN) = 2e-11 of the start's variance is left


def assert_variance(x: Tensor, variance: float) -> None:
    """The elements of ``x`` are independent N(0, variance): their squares sum to a chi-square variable."""
    n = x.numel()
    assert n >= 100_000
    off = (float(x.double().square().sum()) / variance - n) / math.sqrt(2 * n)
    assert abs(off) < SIGMAS, f"variance {float(x.double().var()):.4f} and not {variance:.4f}, off by {off:.1f} sigma"
    assert abs(float(x.double().sum())) < SIGMAS * math.sqrt(n * variance)


def stationary(a: float, s: float, precision: float = 1.0) -> float:
    """Variance v of x <- (1 - a p) x + s xi: v = (1 - a p)^2 v + s^2."""
    return s**2 / (1 - (1 - a * precision) ** 2)


PLAIN = 1 / (1 - H / 2)  # stationary(H, sqrt(2 H))
GAUSSIANS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Tensor], float]] = {
    "step_size": ({"step_size": H}, quadratic, PLAIN),
    "noise_scale": ({"step_size": H, "noise_scale": 0.7}, quadratic, stationary(H, 0.7)),
    "temperature": ({"step_size": H, "temperature": 2.5}, quadratic, 2.5 * PLAIN),
    "schedule": ({"step_size": lambda k: H, "temperature": lambda k: 0.5}, quadratic, 0.5 * PLAIN),
    "schedule of tensors": ({"step_size": table(torch.full((3,), H))}, quadratic, PLAIN),
    "ramp between equal ends": (
        {"step_size": linear(H, H, 5), "noise_scale": linear(0.7, 0.7, 5)},
        quadratic,
        stationary(H, 0.7),
    ),
    "prior instead of energy": ({"step_size": H, "prior_std": 1.0}, lambda x: 0 * quadratic(x), PLAIN),
    "half prior, half energy": ({"step_size": H, "prior_std": math.sqrt(2)}, lambda x: 0.5 * quadratic(x), PLAIN),
    "narrow prior": (
        {"step_size": H, "prior_std": 0.8},
        lambda x: 0 * quadratic(x),
        stationary(H, math.sqrt(2 * H), 1 / 0.64),
    ),
    "log_prob": ({"step_size": H, "log_prob": True}, lambda x: -quadratic(x), PLAIN),
    "score": ({"step_size": H, "score": True}, lambda x: -x, PLAIN),
    "tensor of no dimension": ({"step_size": torch.tensor(H)}, quadratic, PLAIN),
    # x' = x + s xi, then y = (1 - a) x': v = (1 - a)^2 (v + s^2), and so v = (1 - a)^2 s^2 / (1 - (1 - a)^2)
    "noise before": ({"step_size": H, "noise_at": "before"}, quadratic, (1 - H) ** 2 * PLAIN),
}


@pytest.mark.parametrize("way", GAUSSIANS)
def test_stationary_variance(way: str, seed: int) -> None:
    options, energy, variance = GAUSSIANS[way]
    x = langevin(energy, torch.zeros(CHAINS, SIZE), BURN_IN, seed=seed, **options)
    assert_variance(x, variance)


@pytest.mark.parametrize("scale", [0.8, lambda k: 0.8, torch.tensor(0.8), {0: 0.8}])
def test_stationary_variance_of_from_sgld(scale: Any, seed: int) -> None:
    sampler = Langevin.from_sgld(scale)
    start = torch.zeros(CHAINS, SIZE)
    x = sampler.sample(quadratic, start, BURN_IN, seed=seed).state
    assert_variance(x, 1 / (1 - 0.8**2 / 4))


def test_stationary_variance_of_settings_per_chain(seed: int) -> None:
    size = torch.tensor([0.4, 0.6]).repeat(CHAINS)
    temperature = torch.tensor([1.0, 1.0, 3.0, 3.0]).repeat(CHAINS // 2)
    sampler = Langevin(size, temperature=temperature)
    x = sampler.sample(quadratic, torch.zeros(2 * CHAINS, 2 * SIZE), BURN_IN, seed=seed).state
    for first in range(4):
        h, t = float(size[first]), float(temperature[first])
        assert_variance(x[first::4], t / (1 - h / 2))


def test_stationary_variance_of_settings_per_modality(seed: int) -> None:
    state = {"image": torch.zeros(CHAINS, 16, SIZE // 16), "text": torch.zeros(CHAINS, SIZE)}
    x = langevin(
        lambda s: quadratic(s["image"]) + quadratic(s["text"]),
        state,
        BURN_IN,
        seed=seed,
        step_size={"image": 0.4, "text": 0.6},
        noise_scale={"image": None, "text": 0.5},
        prior_std={"text": 2.0},
    )
    assert_variance(x["image"], PLAIN)
    assert_variance(x["text"], stationary(0.6, 0.5, 1.25))


def test_implied_temperature() -> None:
    assert Langevin(0.1).implied_temperature == 1.0
    assert Langevin(0.1, temperature=0.3).implied_temperature == 0.3
    assert Langevin.from_sgld(0.03).implied_temperature == pytest.approx(1.0)
    assert Langevin(1.0, 0.01).implied_temperature == pytest.approx(5e-5)  # JEM's, which few know
    assert Langevin(0.0, 0.01).implied_temperature == math.inf
    assert Langevin(linear(2.0, 1.0, 5), 2.0).implied_temperature == 1.0
    per_key = Langevin({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": None}).implied_temperature
    assert per_key == {"a": 0.5, "b": 1.0}
    per_chain = Langevin(torch.tensor([1.0, 2.0]), 2.0).implied_temperature
    assert per_chain.tolist() == [2.0, 1.0]


# ---------------------------------------------------------------------------------------------------------------------
# Rows, steps and chunks
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Split:
    """A run of 12 chains that is then run in parts."""

    energy: Callable[..., Any]
    state: Any
    options: dict[str, Any]
    call: dict[str, Any]


def rows(value: Any, part: slice) -> Any:
    """What of a setting, argument or state belongs to some of the 12 chains."""
    if isinstance(value, Tensor):
        return value[part] if value.dim() and value.shape[0] == 12 else value
    if isinstance(value, dict):
        return {key: rows(item, part) for key, item in value.items()}
    return type(value)(rows(item, part) for item in value) if isinstance(value, (list, tuple)) else value


def double_well(x: Tensor) -> Tensor:
    """Minima at -1 and 1; of bounded curvature, so that no chain diverges; and no function that rounds by position."""
    square = x.flatten(1).square()
    return (0.5 * square + 2 / (1 + square)).sum(1)


def joint(s: dict[str, Tensor], shift: Tensor | None = None) -> Tensor:
    b = s["b"] if shift is None else s["b"] - shift[:, None]
    return double_well(s["a"]) + quadratic(b) + (s["a"][:, 0, :3] * b[:, :3]).sum(1)


def splits(seed: int) -> dict[str, Split]:
    g = torch.Generator().manual_seed(seed)
    flat = torch.randn(12, 5, generator=g)
    both = {"a": torch.randn(12, 2, 3, generator=g), "b": torch.randn(12, 5, generator=g)}
    per_chain = 0.01 + 0.02 * torch.rand(12, generator=g)
    net = nn.Sequential(nn.Linear(5, 16), nn.SiLU(), nn.Linear(16, 1))
    return {
        "tensor": Split(double_well, flat, {"step_size": 0.02}, {}),
        "network": Split(net, flat, {"step_size": 0.1}, {}),
        "list": Split(
            lambda s: double_well(s[0]) + double_well(s[1]),
            [flat, both["a"]],
            {"step_size": {0: 0.02, 1: 0.01}, "grad_norm_clip": 3.0},
            {},
        ),
        "dict, blocks, schedule": Split(
            joint, both, {"step_size": linear(0.03, 0.01, 9), "grad_clip": {"a": 1.0}}, {"blocks": ("b", "a")}
        ),
        "dict, per chain, args": Split(
            joint,
            both,
            {"step_size": per_chain, "bounds": {"b": (-per_chain * 50, 1.5)}},
            {"args": (per_chain,), "observed": {"a": both["a"][:, :1, :1] > 0}},
        ),
        # five values for five elements: chunks of five chains must not take them for one value per chain
        "per element": Split(double_well, flat, {"step_size": torch.linspace(0.01, 0.03, 5)}, {}),
        "noise before": Split(double_well, flat, {"step_size": 0.02, "noise_at": "before"}, {}),
        "descent": Split(double_well, flat, {"step_size": 1.6, "accept": "descent"}, {}),
        "metropolis": Split(double_well, flat, {"step_size": 0.9, "accept": "metropolis", "prior_std": 2.0}, {}),
        "metropolis, dict, blocks": Split(
            joint,
            both,
            {"step_size": per_chain * 9, "accept": "metropolis"},
            {"blocks": ("b", "a"), "observed": {"a": both["a"][:, :1, :1] > 0}},
        ),
        "bfloat16": Split(double_well, flat.bfloat16(), {"step_size": 0.02}, {}),
    }


SPLITS = tuple(splits(0))


def close(a: Any, b: Any, name: str) -> bool:
    if name != "network":
        return same(a, b)
    # a matrix product's rounding depends on its number of rows; worst seen 5e-7 over 200 seeds
    return all(torch.allclose(x, y, rtol=0, atol=1e-5) for x, y in zip(leaves(a), leaves(b), strict=True))


@pytest.mark.parametrize("name", SPLITS)
def test_some_chains_alone_equal_rows_of_the_whole(name: str, seed: int) -> None:
    s = splits(seed)[name]
    whole = Langevin(**s.options).sample(s.energy, s.state, 9, seed=seed, **s.call).state
    for part in (slice(0, 4), slice(4, 5), slice(5, 12)):
        sampler = Langevin(**{key: rows(value, part) for key, value in s.options.items()})
        call = {key: value if key == "blocks" else rows(value, part) for key, value in s.call.items()}
        alone = sampler.sample(s.energy, rows(s.state, part), 9, seed=seed, chain_offset=part.start, **call).state
        assert close(alone, rows(whole, part), name)


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("chunk_size", [1, 5, 12, 100])
def test_chunks_equal_the_whole(name: str, chunk_size: int, seed: int) -> None:
    s = splits(seed)[name]
    sampler = Langevin(**s.options)
    options = {"seed": seed, "record": ("energy", "displacement"), "thin": 4, **s.call}
    whole = sampler.sample(s.energy, s.state, 9, **options)
    parts = sampler.sample(s.energy, s.state, 9, chunk_size=chunk_size, **options)
    assert close(parts.state, whole.state, name) and close(parts.trajectory, whole.trajectory, name)
    # sums over a chain's elements may be taken in another order; worst seen 2e-7 over 200 seeds
    for key, value in whole.trace.items():
        torch.testing.assert_close(parts.trace[key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("first", [0, 4])
def test_steps_in_two_runs_equal_one_run(name: str, first: int, seed: int) -> None:
    s = splits(seed)[name]
    sampler = Langevin(**s.options)
    whole = sampler.sample(s.energy, s.state, 9, seed=seed, first_step=2, **s.call)
    before = sampler.sample(s.energy, s.state, first, seed=seed, first_step=2, **s.call)
    call = dict(s.call)
    after = sampler.sample(
        s.energy, before.state, 9 - first, seed=before.info["seed"], first_step=before.info["next_step"], **call
    )
    assert same(after.state, whole.state)
    assert after.info["next_step"] == whole.info["next_step"] == 11


def test_seed_and_first_step_may_be_tensors(seed: int) -> None:
    x = torch.randn(6, 3)
    wanted = langevin(double_well, x, 4, step_size=0.02, seed=seed, first_step=5)
    got = langevin(double_well, x, 4, step_size=0.02, seed=torch.tensor([seed]), first_step=torch.tensor(5))
    assert torch.equal(got, wanted)


def test_blocks_are_updated_in_turn_with_the_same_noise(seed: int) -> None:
    """By hand: ``b`` moves at the old ``a``, then ``a`` at the new ``b``; a set has no order that could matter."""
    s = splits(seed)["dict, blocks, schedule"].state
    sampler = Langevin(0.05)
    b = sampler.sample(joint, s, 1, seed=seed, observed={"a"}).state["b"]
    a = sampler.sample(joint, {"a": s["a"], "b": b}, 1, seed=seed, observed={"b"}).state["a"]
    got = sampler.sample(joint, s, 1, seed=seed, blocks=[{"b"}, {"a"}]).state
    assert same(got, {"a": a, "b": b})
    assert not same(got, sampler.sample(joint, s, 1, seed=seed).state)
    assert same(
        sampler.sample(joint, s, 1, seed=seed, blocks=[{"b", "a"}]).state, sampler.sample(joint, s, 1, seed=seed).state
    )


# ---------------------------------------------------------------------------------------------------------------------
# Seeds
# ---------------------------------------------------------------------------------------------------------------------


def run(**options: Any) -> Samples:
    return Langevin(0.3, rng=options.pop("rng", "philox")).sample(quadratic, torch.zeros(64, 8), 5, **options)


def test_manual_seed_rules_and_every_call_differs(seed: int) -> None:
    torch.manual_seed(seed)
    first, second = run(), run()
    torch.manual_seed(seed)
    again = run()
    assert torch.equal(first.state, again.state) and first.info["seed"] == again.info["seed"]
    assert not torch.equal(first.state, second.state)


@pytest.mark.parametrize("rng", ["philox", "torch"])
def test_generator_rules(rng: str, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    before = torch.random.get_rng_state()
    first, second = run(generator=g, rng=rng), run(generator=g, rng=rng)
    again = run(generator=torch.Generator().manual_seed(seed), rng=rng)
    assert torch.equal(first.state, again.state) and not torch.equal(first.state, second.state)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("rng", ["philox", "torch"])
def test_the_reported_seed_reproduces(rng: str, seed: int) -> None:
    first = run(seed=seed, rng=rng)
    assert first.info["seed"] == seed
    assert torch.equal(run(seed=first.info["seed"], rng=rng).state, first.state)
    drawn = run()
    assert torch.equal(run(seed=drawn.info["seed"]).state, drawn.state)


@pytest.mark.parametrize("other", [{"seed": 1}, {"seed": 1 << 32}, {"seed": 0, "first_step": BURN_IN}])
def test_different_seeds_decorrelate(other: dict[str, int], seed: int) -> None:
    """Also s and s + 1, where a key of seed + step would share all noise but one step's (correlation 0.6 here)."""
    sampler, start = Langevin(H), torch.zeros(CHAINS, SIZE)
    x = sampler.sample(quadratic, start, BURN_IN, seed=seed).state.flatten().double()
    y = sampler.sample(quadratic, start, BURN_IN, seed=seed + other["seed"], first_step=other.get("first_step", 0))
    # under independence sqrt(n) times the correlation is close to a standard normal
    r = float(torch.corrcoef(torch.stack((x, y.state.flatten().double())))[0, 1])
    assert abs(r) * math.sqrt(x.numel()) < SIGMAS


@pytest.mark.parametrize(
    "call", [{}, {"blocks": ("b", "a")}, {"observed": {"a"}}, {"blocks": ("b", "a"), "observed": {"a"}}]
)
def test_a_tensor_has_its_noise_whatever_moves_with_it(call: dict[str, Any], seed: int) -> None:
    state = {"a": torch.zeros(3, 4), "b": torch.zeros(3, 2, 5)}
    flat = lambda s: 0 * (quadratic(s["a"]) + quadratic(s["b"]))
    out = langevin(flat, state, 1, step_size=0.1, noise_scale=2.0, seed=seed, first_step=7, chain_offset=9, **call)
    for i, key in enumerate(state):
        xi = noise.normal(state[key].shape, seed=seed, step=7, stream=noise.stream(i), chain_offset=9)
        expected = torch.zeros_like(xi) if key in call.get("observed", ()) else 2 * xi
        # backends agree on the noise to 2e-6
        torch.testing.assert_close(out[key], expected, rtol=0, atol=4e-6)


def test_tensors_and_chains_have_noise_of_their_own(seed: int) -> None:
    state = [torch.zeros(CHAINS, SIZE), torch.zeros(CHAINS, SIZE)]
    a, b = langevin(lambda s: quadratic(s[0]) + quadratic(s[1]), state, 1, step_size=1.0, seed=seed)
    for x, y in ((a, b), (a, a.roll(1, 0)), (a, a.roll(1, 1))):
        r = float(torch.corrcoef(torch.stack((x.flatten(), y.flatten())).double())[0, 1])
        assert abs(r) * math.sqrt(a.numel()) < SIGMAS


# ---------------------------------------------------------------------------------------------------------------------
# What a chain leaves alone
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("make", [lambda x: x, lambda x: [x, x.clone()], lambda x: {"a": x, "b": x.clone()}])
@pytest.mark.parametrize("differentiable", [None, True])
def test_the_given_state_is_neither_changed_nor_aliased(make: Any, steps: int, differentiable: Any) -> None:
    state = make(torch.randn(4, 3))
    given = [t.clone() for t in leaves(state)]
    observed = {0} if isinstance(state, list) else None
    out = langevin(
        lambda s: sum(quadratic(t) for t in leaves(s)),
        state,
        steps,
        step_size=0.1,
        observed=observed,
        differentiable=differentiable,
    )
    assert type(out) is type(state)
    assert all(torch.equal(a, b) for a, b in zip(given, leaves(state), strict=True))
    for a, b in zip(leaves(out), leaves(state), strict=True):
        assert a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr()
        assert torch.equal(a, b) == (steps == 0 or (observed is not None and b is leaves(state)[0]))
        assert differentiable or not a.requires_grad


def test_inplace_writes_the_result_into_the_given_tensors(seed: int) -> None:
    state = {"a": torch.randn(4, 3).t().contiguous().t(), "b": torch.randn(4, 2, requires_grad=True)}
    expected = langevin(lambda s: sum(map(quadratic, s.values())), state, 3, step_size=0.1, seed=seed)
    out = langevin(lambda s: sum(map(quadratic, s.values())), state, 3, step_size=0.1, seed=seed, inplace=True)
    assert all(out[key] is state[key] for key in state)
    assert same(out, expected)


def test_inplace_writes_nothing_when_the_run_fails() -> None:
    x = torch.ones(2, 2)
    for energy, error in ((lambda x: quadratic(x) / 0, FloatingPointError), (lambda x: 1 / 0, ZeroDivisionError)):
        with pytest.raises(error):
            langevin(energy, x, 2, step_size=0.1, inplace=True, on_nonfinite="raise")
        assert torch.equal(x, torch.ones(2, 2))


def test_parameters_get_no_gradient_and_keep_the_one_they_have() -> None:
    net = nn.Linear(3, 1)
    net.weight.grad = torch.full_like(net.weight, 7.0)
    langevin(net, torch.randn(4, 3), 3, step_size=0.1)
    assert net.bias.grad is None and torch.equal(net.weight.grad, torch.full_like(net.weight, 7.0))


@pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_gradient_mode_gives_the_same(outer: Any, seed: int) -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    energy = lambda x, c, d: (net(x) * c).flatten() + (x * d["scale"]).square().sum(1)
    given = torch.randn(4, 3), torch.randn(4, 1), torch.rand(4, 3)
    expected = langevin(energy, given[0], 5, step_size=0.1, seed=seed, args=(given[1], {"scale": given[2]}))
    with outer():
        x, c, scale = (t.clone() for t in given)  # made inside: in inference mode, tensors autograd cannot save
        got = langevin(energy, x, 5, step_size=0.1, seed=seed, args=(c, {"scale": scale}))
        assert torch.equal(got, expected)
        written = langevin(energy, x, 5, step_size=0.1, seed=seed, args=(c, {"scale": scale}), inplace=True)
        assert written is x and torch.equal(x, expected)


def test_autocast_changes_only_the_energy(seed: int) -> None:
    """The state stays float32 and the update is made in it: against the same rule by hand, under autocast."""
    net = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 1))
    start = torch.randn(4, 6)
    x = start.clone()
    with torch.autocast("cpu", torch.bfloat16):
        got = langevin(net, start, 3, step_size=0.5, noise_scale=0.0)
        for _ in range(3):
            x.requires_grad_()
            g = torch.autograd.grad(net(x).sum(), x)[0]
            x = x.detach() - 0.5 * g
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, x, rtol=1e-6, atol=1e-6)
    # and it did run in bfloat16
    assert not torch.allclose(got, langevin(net, start, 3, step_size=0.5, noise_scale=0.0), rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Energies
# ---------------------------------------------------------------------------------------------------------------------

SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "(B,)": quadratic,
    "(B, 1)": lambda x: quadratic(x)[:, None],
    "(B, 1, 1, 1)": lambda x: quadratic(x)[:, None, None, None],
    "(B, D)": lambda x: 0.5 * x.square(),
    "scalar": lambda x: quadratic(x).sum(),
    "mean times B": lambda x: quadratic(x).mean() * len(x),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_energies_of_every_shape_are_summed(shape: str, seed: int) -> None:
    start = torch.randn(5, 4, dtype=torch.float64)
    out = Langevin(0.1, 0.0).sample(SHAPES[shape], start, 3, record=("energy", "grad_norm"))
    torch.testing.assert_close(out.state, 0.9**3 * start)
    energy = torch.stack([quadratic(0.9**k * start) for k in range(3)])
    torch.testing.assert_close(out.trace["energy"], energy.sum(1) if shape in ("scalar", "mean times B") else energy)
    torch.testing.assert_close(out.trace["grad_norm"], torch.stack([0.9**k * start.norm(dim=1) for k in range(3)]))


@pytest.mark.parametrize("blocks", [None, ("a", "b"), ("b", "a")])
@pytest.mark.parametrize("observed", [None, {"a"}])
def test_a_modality_the_energy_ignores_has_no_drift(blocks: Any, observed: Any) -> None:
    state = {"a": torch.randn(3, 2), "b": torch.randn(3, 4)}
    out = langevin(
        lambda s: quadratic(s["a"]),
        state,
        2,
        step_size=0.5,
        noise_scale=0.0,
        prior_std={"b": 1.0},
        blocks=blocks,
        observed=observed,
    )
    torch.testing.assert_close(out["a"], state["a"] * (1 if observed else 0.25))
    torch.testing.assert_close(out["b"], state["b"] * 0.25)


@pytest.mark.parametrize(
    "energy", [lambda x: quadratic(x.detach()), lambda x: quadratic(x).data, lambda x: torch.zeros(len(x))]
)
@pytest.mark.parametrize("parameter", [False, True])
def test_an_energy_cut_off_from_the_state_is_an_error(energy: Any, parameter: bool) -> None:
    weight = nn.Parameter(torch.ones(()))
    cut = (lambda x: energy(x) * next(iter([weight]))) if parameter else energy
    for state in (torch.randn(3, 2), [torch.randn(3, 2), torch.randn(3, 2)]):
        f = cut if isinstance(state, Tensor) else lambda s: cut(s[0]) + cut(s[1])
        for observed in (None, {0}) if isinstance(state, list) else (None,):
            with pytest.raises(ValueError, match="energy must depend on the state"):
                langevin(f, state, 2, step_size=0.1, observed=observed)


def test_labels_and_schedules_reach_the_energy_as_arguments() -> None:
    net = nn.Linear(3, 4).double()
    x, labels = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])

    def energy(x: Tensor, y: Tensor, *, scale: float) -> Tensor:
        return scale * net(x)[torch.arange(len(x)), y]

    given = {"args": (labels,), "kwargs": {"scale": table([1.0, 2.0, 4.0])}}
    out = langevin(energy, x, 3, step_size=1.0, noise_scale=0.0, **given)
    torch.testing.assert_close(out, x - 7.0 * net.weight.detach()[labels])
    resumed = langevin(energy, x, 1, step_size=1.0, noise_scale=0.0, first_step=2, **given)
    torch.testing.assert_close(resumed, x - 4.0 * net.weight.detach()[labels])


def test_score_is_matched_by_key_not_by_order() -> None:
    state = {"a": torch.ones(3, 2), "b": torch.full((3, 2), 2.0)}
    sampler = Langevin(0.5, 0.0, score=True)
    out = sampler.sample(lambda s: {"b": -s["b"], "a": 0 * s["a"]}, state, 1).state
    assert torch.equal(out["a"], state["a"]) and torch.equal(out["b"], 0.5 * state["b"])


def test_score_may_take_a_gradient_itself(seed: int) -> None:
    def score(x: Tensor) -> Tensor:
        x.requires_grad_()
        return torch.autograd.grad(-double_well(x).sum(), x)[0]

    x = torch.randn(4, 3)
    with torch.no_grad():
        got = langevin(score, x, 4, step_size=0.02, score=True, seed=seed)
    assert torch.equal(got, langevin(double_well, x, 4, step_size=0.02, seed=seed))
    assert not x.requires_grad


@pytest.mark.parametrize("steps", [0, 3])
def test_no_chains_and_no_steps(steps: int) -> None:
    for state in (torch.zeros(0, 3), [torch.zeros(0), torch.zeros(0, 2, 3)], {"a": torch.zeros(0, 0, 2)}):
        out = Langevin(0.1).sample(lambda s: 1 / 0, state, steps, record=("energy", "clipped"), thin=2)
        assert [t.shape for t in leaves(out.state)] == [t.shape for t in leaves(state)]
        assert all(rows.shape == (steps, 0) for rows in out.trace.values())
        assert [t.shape for t in leaves(out.trajectory)] == [(steps // 2, *t.shape) for t in leaves(state)]
    empty = Langevin(0.1).sample(quadratic, torch.zeros(4, 0), steps)
    assert empty.state.shape == (4, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------------------------------

EVERY = ("energy", "grad_norm", "displacement", "clipped", "nonfinite")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "noise before": {"noise_at": "before"},
    "clips": {"grad_clip": 0.5, "grad_norm_clip": 0.9, "max_update": 0.08},
    "projected": {"project": {"a": lambda t: t / t.flatten(1).norm(dim=1)[:, None, None]}},
    "descent": {"accept": "descent", "step_size": 1.6},
    "metropolis": {"accept": "metropolis", "step_size": 0.5},
    "frozen": {"on_nonfinite": "freeze"},
    "log_prob": {"log_prob": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_records_equal_what_the_trajectory_shows(name: str, seed: int) -> None:
    state = {key: x.double() for key, x in splits(seed)["dict, per chain, args"].state.items()}
    options = {"step_size": 0.03, **VARIANTS[name]}
    sign = -1.0 if options.get("log_prob") else 1.0
    energy = lambda s: sign * joint(s)
    out = Langevin(**options).sample(energy, state, 6, seed=seed, record=EVERY, thin=1)
    assert all(rows.shape == (6, 12) for rows in out.trace.values())
    assert same({key: rows[-1] for key, rows in out.trajectory.items()}, out.state)
    states = [state] + [{key: rows[k] for key, rows in out.trajectory.items()} for k in range(6)]
    moved = torch.stack(
        [
            sum((b[key] - a[key]).flatten(1).square().sum(1) for key in state).sqrt()
            for a, b in itertools.pairwise(states)
        ]
    )
    torch.testing.assert_close(out.trace["displacement"], moved)
    assert not out.trace["nonfinite"].any() and not out.info["nonfinite"].any()
    if name == "noise before":  # the gradient is taken after the noise, at a state that is not kept
        return
    for k, s in enumerate(states[:-1]):
        leaf = {key: x.clone().requires_grad_() for key, x in s.items()}
        value = joint(leaf)
        grads = torch.autograd.grad(value.sum(), list(leaf.values()))
        torch.testing.assert_close(out.trace["energy"][k], value.detach())
        norm = sum(g.flatten(1).square().sum(1) for g in grads).sqrt()
        torch.testing.assert_close(out.trace["grad_norm"][k], norm)
        if name == "clips":
            # a clip by value, then one by norm (which changes all of a tensor's elements), then the update's
            count = torch.zeros(12, dtype=torch.long)
            for g, key in zip(grads, leaf, strict=True):
                clipped = g.clamp(-0.5, 0.5)
                over = clipped.flatten(1).norm(dim=1) > 0.9
                update = (states[k + 1][key] - s[key]).abs() > 0.08 - 1e-9
                shape = [-1, *[1] * (g.dim() - 1)]
                count += ((g != clipped) | over.reshape(shape) | update).flatten(1).sum(1)
            assert torch.equal(out.trace["clipped"][k], count)
            assert count.any()
        else:
            assert not out.trace["clipped"][k].any()


@pytest.mark.parametrize("thin", [1, 2, 3, 7, 8])
def test_thin_keeps_every_so_many(thin: int, seed: int) -> None:
    every = Langevin(0.1).sample(quadratic, torch.randn(4, 2, 3), 7, seed=seed, thin=1)
    assert every.trajectory.shape == (7, 4, 2, 3)
    out = Langevin(0.1).sample(quadratic, torch.randn(4, 2, 3), 7, seed=seed, thin=thin)
    assert out.trajectory.shape == (7 // thin, 4, 2, 3)
    again = Langevin(0.1).sample(quadratic, every.trajectory[0] * 0, 7, seed=seed, thin=thin)
    full = Langevin(0.1).sample(quadratic, every.trajectory[0] * 0, 7, seed=seed, thin=1)
    assert torch.equal(again.trajectory, full.trajectory[thin - 1 :: thin])


def test_blocks_record_the_first_energy_and_all_norms(seed: int) -> None:
    s = splits(seed)["dict, blocks, schedule"].state
    out = Langevin(0.05, 0.0).sample(joint, s, 1, blocks=("b", "a"), record=EVERY)
    moved = sum((out.state[key] - s[key]).flatten(1).square().sum(1) for key in s).sqrt()
    torch.testing.assert_close(out.trace["displacement"][0], moved)
    # without noise the update is the step times the gradient
    torch.testing.assert_close(out.trace["grad_norm"][0], moved / 0.05, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.trace["energy"][0], joint(s))


def test_a_wholly_observed_state_stays_and_its_energy_is_recorded(seed: int) -> None:
    s = splits(seed)["dict, blocks, schedule"].state
    out = Langevin(0.05).sample(joint, s, 2, observed=("a", "b"), record=EVERY, thin=1)
    assert same(out.state, s)
    assert torch.equal(out.trace["energy"], joint(s).expand(2, -1))
    assert not any(out.trace[name].any() for name in EVERY[1:])


def test_nothing_is_recorded_unasked() -> None:
    out = Langevin(0.1).sample(quadratic, torch.zeros(2, 2), 3)
    assert out.trace == {} and out.trajectory is None
    assert out.info["backend"] and out.info["reason"]
    assert (out.info["steps"], out.info["first_step"], out.info["next_step"]) == (3, 0, 3)


def test_a_sampler_and_its_schedules_pickle() -> None:
    sampler = Langevin(linear(0.1, 0.2, 3), bounds=(-1, 1), prior_std={"a": 1.0})
    assert pickle.loads(pickle.dumps(sampler)) == sampler
    assert sampler.replace(bounds=None) == Langevin(linear(0.1, 0.2, 3), prior_std={"a": 1.0})


# ---------------------------------------------------------------------------------------------------------------------
# Bounds, masks and projections the published loops do not have
# ---------------------------------------------------------------------------------------------------------------------


def test_observed_elements_do_not_make_a_chain_leave_the_box() -> None:
    x = torch.tensor([[0.5, 5.0], [0.5, 0.5]])
    mask = torch.tensor([[False, True], [False, False]])
    out = langevin(
        lambda x: x.sum(1), x, 2, step_size=0.1, noise_scale=0.0, bounds=(0.0, 1.0), outside="reject", observed=mask
    )
    torch.testing.assert_close(out, torch.tensor([[0.3, 5.0], [0.3, 0.3]]))


@pytest.mark.parametrize("bounds_at", ["step", "end"])
def test_observed_elements_are_neither_clamped_nor_projected(bounds_at: str) -> None:
    x = torch.tensor([[3.3, -3.0, 4.0]])
    out = langevin(
        quadratic,
        x,
        2,
        step_size=0.01,
        observed=torch.tensor([True, False, False]),
        bounds=(-1, 1),
        bounds_at=bounds_at,
        project=lambda t: t.round(),
    )
    assert out[0, 0] == x[0, 0] and out[0, 1] == -1.0 and out[0, 2] == 1.0


def test_descent_refuses_any_rise() -> None:
    """Steps of 1.9, 2 and 2.1 on x^2 / 2 from 1 lead to -0.9, -1 and -1.1: lower, equal, higher."""
    size = torch.tensor([1.9, 2.0, 2.1], dtype=torch.float64)
    x = torch.ones(3, 1, dtype=torch.float64)
    out = Langevin(size, 0.0, accept="descent").sample(quadratic, x, 2, thin=1)
    torch.testing.assert_close(out.trajectory[:, :, 0], torch.tensor([[-0.9, 1, 1], [0.81, 1, 1]], dtype=torch.float64))


@pytest.mark.parametrize("blocks", [None, ("a", "b")])
def test_descent_takes_each_gradient_where_it_belongs(blocks: Any, seed: int) -> None:
    """Blocks, or an energy that changes from step to step: a gradient kept from the step before would be another."""
    start = {key: t.double() for key, t in splits(seed)["dict, blocks, schedule"].state.items()}
    weights = [1.0, 3.0, 0.2, 2.0]
    energy = lambda s, w: w * joint(s)
    out = langevin(
        energy, start, 4, step_size=0.7, noise_scale=0.0, accept="descent", blocks=blocks, args=(table(weights),)
    )
    x = dict(start)
    for w in weights:
        for group in (("a", "b"),) if blocks is None else (("a",), ("b",)):
            leaf = {key: t.clone().requires_grad_(key in group) for key, t in x.items()}
            old = energy(leaf, w)
            grads = torch.autograd.grad(old.sum(), [leaf[key] for key in group])
            new = {**x, **{key: x[key] - 0.7 * g for key, g in zip(group, grads, strict=True)}}
            falls = energy(new, w) < old
            x = {key: torch.where(falls.reshape(-1, *[1] * (t.dim() - 1)), new[key], t) for key, t in x.items()}
    for key in x:
        torch.testing.assert_close(out[key], x[key], rtol=1e-10, atol=1e-10)


def test_one_sided_bounds_and_none_for_a_modality_left_out() -> None:
    state = {"a": torch.full((2, 2), 9.0), "b": torch.full((2, 2), 9.0)}
    energy = lambda s: s["a"].sum(1) + s["b"].sum(1)
    out = langevin(energy, state, 1, step_size=100.0, noise_scale=0.0, bounds={"a": (-1.0, None)})
    assert (out["a"] == -1).all() and (out["b"] == -91).all()


def test_rejection_keeps_all_tensors_of_the_chain() -> None:
    state = [torch.tensor([[0.5], [0.5]]), torch.tensor([[0.5], [0.05]])]
    energy = lambda s: (s[0] + s[1]).sum(1)
    out = langevin(energy, state, 1, step_size=0.1, noise_scale=0.0, bounds=(0.0, 1.0), outside="reject")
    torch.testing.assert_close(out, [torch.tensor([[0.4], [0.5]]), torch.tensor([[0.4], [0.05]])])


@pytest.mark.parametrize("steps", [1, 3])
def test_a_projection_may_return_a_tensor_of_the_users(steps: int) -> None:
    mine = torch.arange(6.0).reshape(2, 3)
    out = langevin(quadratic, torch.zeros(2, 3), steps, step_size=0.1, project=lambda t: mine)
    assert torch.equal(mine, torch.arange(6.0).reshape(2, 3)) and torch.equal(out, mine)
    assert out.data_ptr() != mine.data_ptr()


def test_finish_sees_the_state_after_its_bounds_and_changes_what_is_handed_out() -> None:
    start = {"a": torch.tensor([[3.0, -3.0]]), "b": torch.tensor([[2.0, 5.0]])}
    seen: list[Any] = []

    def halve(s: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append({key: t.clone() for key, t in s.items()})
        return {key: t / 2 for key, t in reversed(s.items())}

    sampler = Langevin(0.5, 0.0, bounds={"a": (-1, 1)}, bounds_at="end", finish=halve)
    observed = {"b": torch.tensor([[True, False]])}
    energy = lambda s: quadratic(s["a"]) + quadratic(s["b"])
    for options in ({}, {"chunk_size": 1}):
        out = sampler.sample(energy, start, 1, thin=1, observed=observed, **options)
        assert seen[-1]["a"].tolist() == [[1.0, -1.0]] and seen[-1]["b"].tolist() == [[2.0, 2.5]]
        assert out.state["a"].tolist() == [[0.5, -0.5]]
        assert out.state["b"].tolist() == [[2.0, 1.25]]
        assert out.trajectory["a"].tolist() == [[[1.5, -1.5]]]
    assert len(seen) == 2  # once a call, whatever the chunks


def test_finish_keeps_the_graph_of_differentiable_steps() -> None:
    scale = torch.tensor(2.0, requires_grad=True)
    start = torch.ones(1, 2, requires_grad=True)
    out = langevin(quadratic, start, 1, step_size=0.5, noise_scale=0.0, differentiable=True, finish=lambda x: scale * x)
    out.sum().backward()
    assert scale.grad is not None and start.grad is not None
    torch.testing.assert_close(scale.grad, torch.tensor(1.0))
    torch.testing.assert_close(start.grad, torch.ones(1, 2))
    plain = langevin(quadratic, start, 1, step_size=0.5, noise_scale=0.0, finish=lambda x: scale * x)
    assert not plain.requires_grad


def test_finish_runs_its_network_in_the_mode_of_the_chain() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    denoise = lambda x: x + torch.autograd.grad(net(leaf := x.detach().requires_grad_()).sum(), leaf)[0]
    results = [langevin(quadratic, torch.ones(50, 2), 1, step_size=0.1, noise_scale=0.0, finish=denoise) for _ in "ab"]
    assert torch.equal(*results) and net.training
    assert len(results[0].unique(dim=0)) == 1


@pytest.mark.parametrize(
    ("finish", "error", "message"),
    [
        (lambda s: s["a"], ValueError, "finish must have the state's shapes"),
        (lambda s: {"a": s["a"][:1], "b": s["b"]}, ValueError, "finish must have the state's shapes"),
        (lambda s: None, TypeError, "finish must be tensors in the state's structure"),
        (3, TypeError, "finish must be a function of the state, got 3"),
    ],
)
def test_finish_must_return_the_states_like(finish: Any, error: type[Exception], message: str) -> None:
    state = {"a": torch.ones(3, 1), "b": torch.ones(3, 2)}
    with pytest.raises(error, match=message):
        langevin(lambda s: quadratic(s["a"]), state, 1, step_size=0.1, finish=finish)


def test_an_offloaded_trajectory_is_the_same(seed: int) -> None:
    """On the CPU it is where it was; test_capture_gpu.py has the rest."""
    s = splits(seed)["dict, blocks, schedule"]
    sampler = Langevin(**s.options)
    kept, moved = (
        sampler.sample(s.energy, s.state, 9, seed=seed, thin=2, offload=offload, chunk_size=5, **s.call)
        for offload in (False, True)
    )
    assert same(kept.trajectory, moved.trajectory) and same(kept.state, moved.state)
    with pytest.raises(ValueError, match="offload moves the trajectory: it needs thin"):
        sampler.sample(s.energy, s.state, 9, offload=True, **s.call)


@pytest.mark.parametrize("bad", [lambda t: t[:1], lambda t: t.double(), lambda t: None])
def test_a_projection_must_return_its_like(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"project must return a tensor of shape \(2, 3\) and torch.float32"):
        langevin(quadratic, torch.zeros(2, 3), 1, step_size=0.1, project=bad)


# ---------------------------------------------------------------------------------------------------------------------
# Chains that break
# ---------------------------------------------------------------------------------------------------------------------


def explosive(x: Tensor) -> Tensor:
    """x^4: far from 0 the step overshoots more each time, near it the chain is tame."""
    return x.flatten(1).pow(4).sum(1)


BROKEN_START = torch.tensor([[0.1, 0.2], [0.3, 50.0], [60.0, 70.0]])


def test_broken_chains_are_counted_and_kept_by_ignore() -> None:
    out = Langevin(0.1, 0.0).sample(explosive, BROKEN_START, 12, record=("nonfinite",))
    assert out.info["nonfinite"].tolist() == [False, True, True]
    assert out.trace["nonfinite"][-1].tolist() == [0, 1, 2] and out.trace["nonfinite"][0].tolist() == [0, 0, 0]
    assert out.state.isfinite().tolist() == [[True, True], [True, False], [False, False]]


@pytest.mark.parametrize("noise_at", ["after", "before"])
def test_broken_chains_freeze_at_their_last_finite_state(noise_at: Any, seed: int) -> None:
    options = {"seed": seed, "record": ("displacement", "nonfinite"), "thin": 1}
    free = Langevin(0.1, 0.01, noise_at=noise_at).sample(explosive, BROKEN_START, 12, **options)
    out = Langevin(0.1, 0.01, noise_at=noise_at, on_nonfinite="freeze").sample(explosive, BROKEN_START, 12, **options)
    assert out.state.isfinite().all() and out.info["nonfinite"].tolist() == [False, True, True]
    states = torch.cat([BROKEN_START[None], free.trajectory])
    for chain in (1, 2):
        last = int(states[:, chain].isfinite().all(dim=1).sum()) - 1
        assert 0 < last < 12
        assert torch.equal(out.state[chain], states[last, chain])
        assert not out.trace["displacement"][last:, chain].any()
        # counted in the step that broke it, and what it would do again in each step after
        assert out.trace["nonfinite"][last, chain] > 0 and not out.trace["nonfinite"][:last, chain].any()
    assert torch.equal(out.state[0], free.state[0])


def test_broken_chains_raise_on_request() -> None:
    with pytest.raises(FloatingPointError, match="2 of 3 chains are not finite after 12 steps"):
        langevin(explosive, BROKEN_START, 12, step_size=0.1, on_nonfinite="raise")
    langevin(explosive, BROKEN_START[:1], 12, step_size=0.001, on_nonfinite="raise")


def test_a_state_that_starts_broken_is_reported_whatever_the_choice() -> None:
    start = torch.tensor([[math.nan, 1.0], [1.0, 1.0]])
    for choice in ("ignore", "freeze"):
        out = Langevin(0.1, on_nonfinite=choice).sample(quadratic, start, 2)
        assert out.info["nonfinite"].tolist() == [True, False]


# ---------------------------------------------------------------------------------------------------------------------
# 16-bit storage
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "spacing"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
@pytest.mark.parametrize("noise_at", ["after", "before"])
def test_small_steps_are_not_lost_in_16_bits(dtype: torch.dtype, spacing: float, noise_at: Any, seed: int) -> None:
    """From 1, below which numbers are ``spacing`` apart, by steps of a fiftieth of that: to nearest, nothing moves."""
    start = torch.ones(CHAINS, SIZE, dtype=dtype)
    steps, size = 25, spacing / 50
    options = {"step_size": size, "noise_scale": 0.0, "noise_at": noise_at}
    x = langevin(lambda x: x.sum(1), start, steps, seed=seed, **options)
    assert x.dtype == dtype
    # each step rounds by a martingale difference of variance f (1 - f) spacing^2 with f = size / spacing = 1 / 50
    deviation = spacing * math.sqrt(steps * 0.02 * 0.98 / x.numel())
    assert abs(float(x.double().mean()) - (1 - steps * size)) < SIGMAS * deviation
    nearest = langevin(lambda x: x.sum(1), start, steps, rng="torch", **options)
    assert torch.equal(nearest, start)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stationary_variance_in_16_bits(dtype: torch.dtype, seed: int) -> None:
    """Rounding adds u^2 f (1 - f) to each step's noise variance: at most spacing^2 / 4, below 1e-4 of it here."""
    x = langevin(quadratic, torch.zeros(CHAINS, SIZE, dtype=dtype), BURN_IN, step_size=H, seed=seed)
    assert_variance(x.float(), PLAIN)


@pytest.mark.parametrize("rng", ["philox", "torch"])
def test_float64_keeps_its_digits(rng: Any, seed: int) -> None:
    start = torch.ones(2, 3, dtype=torch.float64)
    x = langevin(lambda x: x.sum(1), start, 4, step_size=1e-13, noise_scale=0.0, rng=rng)
    assert torch.equal(x, start - 1e-13 - 1e-13 - 1e-13 - 1e-13)


# ---------------------------------------------------------------------------------------------------------------------
# Backends that overwrite the state they are given, as the fused ones do
# ---------------------------------------------------------------------------------------------------------------------


class Overwriting:
    """The reference's numbers, written into the tensors given."""

    name = "overwriting"
    inplace = True

    def __init__(self, options: op.StepOptions) -> None:
        self.inner = op.TorchStepper(options)

    def perturb(self, x: list[Tensor], params: Sequence[StepParams], step: int | Tensor) -> list[Tensor]:
        return self._write(x, self.inner.perturb(x, params, step))

    def step(
        self,
        x: list[Tensor],
        grad: Sequence[Tensor],
        params: Sequence[StepParams],
        step: int | Tensor,
        *,
        with_noise: bool,
        stats: bool,
    ) -> tuple[list[Tensor], StepStats | None]:
        y, report = self.inner.step(x, grad, params, step, with_noise=with_noise, stats=stats)
        return self._write(x, y), report

    def _write(self, x: list[Tensor], y: list[Tensor]) -> list[Tensor]:
        for given, new in zip(x, y, strict=True):
            given.copy_(new)
        return x


@pytest.mark.parametrize("name", [*VARIANTS, "blocks", "differentiable"])
def test_a_backend_may_overwrite_the_state(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    state = splits(seed)["dict, per chain, args"].state
    given = {key: x.clone() for key, x in state.items()}
    call: dict[str, Any] = {"blocks": {"blocks": ("a", "b")}, "differentiable": {"differentiable": 2}}.get(name, {})
    sampler = Langevin(**{"step_size": 0.03, "backend": "torch", **VARIANTS.get(name, {})})
    expected = sampler.sample(joint, state, 6, seed=seed, record=EVERY, thin=2, **call)
    monkeypatch.setattr(op, "stepper", lambda backend, x, options, params: (Overwriting(options), "a test"))
    out = sampler.sample(joint, state, 6, seed=seed, record=EVERY, thin=2, **call)
    assert out.info["backend"] == "overwriting"
    assert same(out.state, expected.state) and same(out.trajectory, expected.trajectory)
    assert same(out.trace, expected.trace)
    assert same(state, given)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients through the chain
# ---------------------------------------------------------------------------------------------------------------------


def test_descent_keeps_its_graph_in_the_differentiable_steps(seed: int) -> None:
    """The accepted point's gradient is kept for the next step; from the steps without a graph it has none."""
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    options = {"step_size": 0.05, "noise_scale": 0.0}
    whole = langevin(net, x, 3, accept="descent", differentiable=1, **options)
    plain = langevin(net, x, 3, differentiable=1, **options)
    torch.testing.assert_close(whole, plain)  # such small steps all fall
    grads = [torch.autograd.grad(out.square().sum(), net[0].weight)[0] for out in (whole, plain)]
    assert grads[1].abs().max() > 0
    torch.testing.assert_close(*grads)


def test_a_gradient_of_zero_under_a_norm_clip_is_differentiable() -> None:
    weight = torch.zeros(3, requires_grad=True)
    energy = lambda x: (x * weight).sum(1)
    options = {"step_size": 0.1, "noise_scale": 0.0, "grad_norm_clip": 1.0}
    out = langevin(energy, torch.ones(2, 3), 1, differentiable=True, **options)
    out.sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, torch.full((3,), -0.2))


def test_bounds_at_the_end_keep_the_graph() -> None:
    x = torch.tensor([[0.5, 3.0]], requires_grad=True)
    with torch.no_grad():
        sampler = Langevin(0.1, 0.0, bounds=(-1, 1), bounds_at="end")
        out = sampler.sample(quadratic, x, 1, differentiable=True).state
    out.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([[0.9, 0.0]]))
