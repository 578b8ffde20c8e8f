"""``sampler.step``: n steps of it are one call of n steps, bit for bit, and a carry is a value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmebm
from mmebm.samplers import HMC, MALA, Langevin, ParallelTempering, Underdamped
from mmebm.samplers.schedules import linear, table

STEPS, THIN, FIRST = 6, 2, 3
RAMP = linear(0.1, 0.02, 9)
SAMPLERS = {
    "langevin": Langevin(0.05),
    "langevin-schedule": Langevin(RAMP, noise_at="before", bounds=(-1.5, 1.5), grad_norm_clip=2.0),
    "langevin-reject": Langevin(RAMP, bounds=(-1.5, 1.5), outside="reject", on_nonfinite="freeze"),
    "langevin-torch": Langevin(0.05, rng="torch", backend="torch"),
    "descent": Langevin(0.3, noise_scale=0.3, accept="descent"),
    "mala": MALA(0.2, prior_std=2.0, grad_clip=1.0),
    "mala-schedule": MALA(RAMP, on_nonfinite="freeze"),
    "hmc": HMC(0.3, leapfrog_steps=3),
    "hmc-schedule": HMC(RAMP, mass=2.0, on_nonfinite="freeze"),
    "hmc-adapt": HMC(0.3, leapfrog_steps=3, adapt=FIRST + 2),
    "underdamped": Underdamped(0.2),
    "underdamped-schedule": Underdamped(RAMP, friction=linear(1.0, 2.0, 9), on_nonfinite="freeze"),
    "tempering": ParallelTempering(0.2, [1.0, 2.0, 3.0], swap_every=2),
    "tempering-unadjusted": ParallelTempering(0.05, [1.0, 1.5], accept=None),
    "tempering-freeze": ParallelTempering(0.05, [1.0, 1.5], accept=None, on_nonfinite="freeze"),
}


def energy(state: Any, scale: Any = 1.0) -> Tensor:
    tensors = list(state.values()) if isinstance(state, dict) else [state]
    return scale * sum((t**4 / 4 - t.square() / 2 + t).flatten(1).sum(1) for t in tensors)


def cliff(state: Any, scale: Any = 1.0) -> Tensor:
    """NaN beyond a wall that chains reach now and then."""
    value = energy(state, scale)
    return torch.where(value > 2.5, torch.nan, value)


def start(dtype: torch.dtype, structure: str) -> Any:
    x = torch.randn(7, 3, dtype=dtype)
    return (
        x if structure == "tensor" else {"a": x, "b": torch.randn(7, 2, 2, dtype=dtype), "c": torch.randn(7, 1).to(x)}
    )


def records_of(sampler: Any) -> tuple[str, ...]:
    return tuple(name for name in sampler.records if name != "accepted" or getattr(sampler, "accept", True))


def assert_same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:some chains have a state")
@pytest.mark.parametrize("structure", ["tensor", "dict"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("function", [energy, cliff])
@pytest.mark.parametrize("name", SAMPLERS)
def test_steps_are_the_chain(name: str, function: Any, dtype: torch.dtype, structure: str, seed: int) -> None:
    sampler: Any = SAMPLERS[name]
    first = 0 if "adapt" in name else FIRST
    x = start(dtype, structure)
    observed = {"b": torch.rand(7, 2, 2) < 0.4, "c": True} if structure == "dict" else None
    # an argument of each step's own is a schedule: the energy and gradient of the step before do not count
    args = (table([1.0, 1.0, 1.0, 1.0, 0.5, 0.7, 0.9]),) if "schedule" in name else ()
    offset = 0 if "torch" in name else 5
    common = {"observed": observed, "seed": seed, "chain_offset": offset, "first_step": first}
    record = records_of(sampler)
    out = sampler.sample(function, x, STEPS, args=args, thin=THIN, record=record, **common)
    # replicas that changed places are evaluated at other rows, where torch's vectors may round otherwise (1 ulp was
    # seen with the seeds 1, 7 and 99052191): each of the seven steps may add one or two
    ulps = 16 * torch.finfo(dtype).eps if name.startswith("tempering") else 0.0

    def assert_same(a: Any, b: Any) -> None:
        torch.testing.assert_close(a, b, rtol=ulps, atol=ulps, equal_nan=True)

    carry, now, states, rows = sampler.init(x, **common), x, [], []
    for _ in range(STEPS):
        now, carry, info = sampler.step(function, now, carry, args=args, record=record)
        states.append(now)
        rows.append(info)
    assert_same(out.state, now)
    assert type(now) is type(x) and carry.next_step == out.info["next_step"]
    for kept in record:
        assert_same(out.trace[kept], torch.stack([row["trace"][kept] for row in rows]))
    for i, k in enumerate(range(THIN - 1, STEPS, THIN)):
        kept = {key: t[i] for key, t in out.trajectory.items()} if structure == "dict" else out.trajectory[i]
        assert_same(kept, states[k])
    assert_same(out.info["nonfinite"], rows[-1]["nonfinite"])
    for kept in ("velocity", "ladder", "adaptation", "step_scale"):
        if kept in out.info:
            assert_same(out.info[kept], rows[-1][kept])


def test_steps_of_a_fused_chain(need: Any, seed: int) -> None:
    need("cpp")
    net = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 1))
    sampler, x = Langevin(0.05), torch.randn(9, 4)
    out = sampler.sample(net, x, STEPS, seed=seed)
    carry, now = sampler.init(x, seed=seed), x
    for _ in range(STEPS):
        now, carry, info = sampler.step(net, now, carry)
        assert info["op"] == out.info["op"] == "langevin_mlp", info["reason"]
    assert_same(out.state, now)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if "torch" not in name])
def test_a_carry_is_a_value(name: str, seed: int) -> None:
    """The same carry and state give the same step, whatever was done with them before."""
    sampler: Any = SAMPLERS[name]
    x = torch.randn(7, 3)
    x, carry, _ = sampler.step(energy, x, sampler.init(x, seed=seed))
    before = x.clone()
    once, after, _ = sampler.step(energy, x, carry)
    kept = once.clone()
    sampler.step(energy, once, after)
    again, _, _ = sampler.step(energy, x, carry)
    assert_same(x, before)
    assert_same(once, kept)
    assert_same(again, once)


@pytest.mark.parametrize("how", ["fused Adam", "data", "numpy", "a layer", "a hook"])
@pytest.mark.parametrize("name", ["mala", "descent", "hmc", "underdamped", "tempering"])
def test_a_step_is_that_of_the_energy_as_it_is(name: str, how: str, seed: int) -> None:
    """Whatever wrote to it: not all of it shows in a tensor's count of writes."""
    torch.manual_seed(seed)
    sampler: Any = SAMPLERS[name]
    net = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 1), nn.Flatten(0))
    adam = torch.optim.Adam(net.parameters(), 0.3, fused=True)
    x = torch.randn(7, 3)
    carry = sampler.init(x, seed=seed)
    for _ in range(3):
        wanted = net(x).detach()
        x, carry, info = sampler.step(net, x, carry, record=("energy",))
        found = info["trace"]["energy"].reshape(7, -1)[:, 0]  # of tempering that of the coldest replica, which is x
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        if how == "fused Adam":
            net(torch.randn(8, 3)).square().mean().backward()
            adam.step()
        elif how == "data":
            net[0].weight.data.mul_(-1.5)
        elif how == "numpy":
            net[0].weight.detach().numpy()[:] *= -1.5
        elif how == "a layer":
            net[1] = nn.Tanh() if type(net[1]) is nn.SiLU else nn.SiLU()
        else:
            net[0].register_forward_hook(lambda m, i, out: 1.5 * out)


def test_what_a_step_refuses(seed: int) -> None:
    x = torch.randn(3, 2)
    with pytest.raises(TypeError, match="carry must be what init"):
        Langevin(0.1).step(energy, x, None)  # pyright: ignore[reportArgumentType]
    for sampler, what in (
        (Langevin(0.1, finish=lambda x: x), "finish"),
        (Langevin(0.1, bounds=(0, 1), bounds_at="end"), "bounds_at"),
    ):
        with pytest.raises(ValueError, match=f"step goes without {what}"):
            sampler.step(energy, x, sampler.init(x, seed=seed))
    with pytest.raises(ValueError, match="blocks are Langevin's"):
        HMC(0.1).init(x, blocks=[0])
    with pytest.raises(ValueError, match="observed"):
        Langevin(0.1).init(x, observed={"image"})
    with pytest.raises(FloatingPointError):
        Langevin(1e38, on_nonfinite="raise").step(energy, 1e3 * x, Langevin(0.1).init(x, seed=seed))


def test_the_carry_says_what_it_holds() -> None:
    carry = HMC(0.1).init(torch.zeros(3, 2), seed=5, first_step=2)
    assert repr(carry) == "<Carry: next step 2, seed 5, with nothing else>"
    assert isinstance(carry, mmebm.samplers.Carry)
