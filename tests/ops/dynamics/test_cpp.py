"""The C++ steps of HMC, Underdamped, tempering and the Metropolis test against the samplers' PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mmebm
from mmebm import native, noise
from mmebm.ops import noise as drawn
from mmebm.ops.dynamics import cpp as dynamics
from mmebm.samplers import HMC, Langevin, ParallelTempering, Underdamped
from mmebm.samplers.schedules import linear

pytestmark = pytest.mark.skipif(not native.loaded("cpp"), reason="the C++ extension is not built")

CHAINS, STEPS = 24, 4
# The normals are within 2e-6 of the reference's; each of the four steps (HMC: of 12 leapfrog steps) multiplies them by
# less than 3 and adds some ten float32 roundings of numbers below 10, 6e-7 each. The same bound for the records.
TOLERANCE = 1e-4


def energy(s: dict[str, Tensor]) -> Tensor:
    a, b = s["a"].flatten(1), s["b"].flatten(1)
    return 0.5 * a.square().sum(1) + (0.25 * b**4).sum(1) + 0.3 * a[:, 0] * b[:, 0]


def state(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(CHAINS, 3, 7, generator=g), "b": torch.randn(CHAINS, 5, generator=g)}


PER_CHAIN = torch.linspace(0.5, 1.5, CHAINS)
PER_ELEMENT = torch.linspace(0.5, 1.5, 7)
SAMPLERS: dict[str, Any] = {
    "HMC": HMC(0.2, 3),
    "HMC, per chain and element": HMC(
        {"a": 0.2 * PER_CHAIN, "b": 0.1}, 3, mass={"a": PER_ELEMENT, "b": 2.0}, temperature=PER_CHAIN
    ),
    # the first factor of the warm-up is ten
    "HMC, adapted": HMC(0.02, 2, adapt=3),
    "HMC, adapted over all, schedule": HMC(linear(0.02, 0.01, STEPS), 2, adapt=2, adapt_over="all"),
    "Underdamped": Underdamped(0.2, 0.7),
    "Underdamped, frozen": Underdamped(0.2, 0.7, on_nonfinite="freeze"),
    "Underdamped, per chain and element": Underdamped(
        {"a": 0.2 * PER_CHAIN, "b": linear(0.2, 0.1, STEPS)}, 0.5, PER_CHAIN, {"a": PER_ELEMENT, "b": 2.0}
    ),
    "Underdamped, no friction": Underdamped(0.2, 0.0),
    "MALA": mmebm.MALA(0.05),
    "MALA, clipped": mmebm.MALA(0.05, 1.5, grad_clip=0.8, grad_norm_clip={"a": 2.0, "b": PER_CHAIN}, prior_std=1.3),
    "MALA, per chain, schedule": mmebm.MALA(linear(0.05, 0.02, STEPS), PER_CHAIN, prior_std={"a": PER_CHAIN}),
    "MALA, frozen": mmebm.MALA(0.05, on_nonfinite="freeze"),
    "tempering": ParallelTempering(0.05, (1.0, 1.2, 1.5, 2.0)),
    "tempering, sizes": ParallelTempering({"a": [0.05, 0.06, 0.08], "b": 0.02}, (1.0, 1.3, 1.7), swap_every=2),
    "tempering, frozen": ParallelTempering(0.05, (1.0, 1.3, 1.7), on_nonfinite="freeze"),
    "tempering, unadjusted": ParallelTempering(0.05, (1.0, 1.2, 1.5), accept=None),
    "tempering, unadjusted, frozen": ParallelTempering(0.05, (1.0, 1.2), accept=None, on_nonfinite="freeze"),
}
RECORDS = {
    HMC: ("energy", "accept_prob", "energy_error", "step_scale"),
    Underdamped: ("energy", "grad_norm", "kinetic"),
    Langevin: ("energy", "grad_norm"),
    ParallelTempering: ("energy", "ladder_energy", "accept_prob", "swap_prob"),
}
CALLS: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    "plain": lambda s: {},
    "observed": lambda s: {"observed": {"a": s["a"] > 0.5}},
    "a tensor observed": lambda s: {"observed": {"b"}, "chain_offset": 7, "first_step": 2**31},
    "energy of the step": lambda s: {"args": (linear(1.0, 2.0, STEPS),)},
}


def same_chains(got: Any, wanted: Any, name: str) -> Tensor:
    """Which chains agree, bool (chains,), of tensors (chains, ...); NaN equals NaN."""
    near = torch.isclose(got.double(), wanted.double(), rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
    return near.reshape(len(near), -1).all(1)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_equals_the_reference(name: str, call: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, x = SAMPLERS[name], state(seed)
    options = CALLS[call](x)
    if "adapted" in name:
        options.pop("first_step", None)
    f = (lambda s, scale: scale * energy(s)) if "args" in options else energy
    run = lambda: sampler.sample(f, x, STEPS, seed=seed, record=RECORDS[type(sampler)], thin=1, **options)
    fast = run()
    # what ran was C++, and not the reference twice
    used: list[str] = []
    with monkeypatch.context() as patch:
        for kind in (dynamics.Dynamics, dynamics.Proposals):
            patch.setattr(kind, "__init__", lambda self, *a, **k: used.append("cpp") or 1 / 0)
        if name != "tempering, unadjusted":
            with pytest.raises(ZeroDivisionError):
                run()
            assert used
    monkeypatch.setenv("MMEBM_BACKEND", "torch")
    slow = run()
    agree = torch.ones(CHAINS, dtype=torch.bool)
    for key in x:
        assert not torch.equal(fast.state[key], x[key]) or key in options.get("observed", ())
        agree &= same_chains(fast.state[key], slow.state[key], key)
        agree &= same_chains(fast.trajectory[key].transpose(0, 1), slow.trajectory[key].transpose(0, 1), key)
    for record in RECORDS[type(sampler)]:
        agree &= same_chains(fast.trace[record].transpose(0, 1), slow.trace[record].transpose(0, 1), record)
    for item in ("nonfinite", "never_accepted", "acceptance", "step_scale", "swap_acceptance"):
        assert (item in fast.info) == (item in slow.info)
        if item in fast.info:
            agree &= same_chains(fast.info[item], slow.info[item], item)
    # a decision within 1e-5 of its threshold may fall the other way: of 400 decisions one in 250 runs, two in 10^5
    assert int((~agree).sum()) <= 1, (~agree).nonzero().flatten().tolist()


@pytest.mark.parametrize("name", ["HMC", "Underdamped", "MALA", "tempering"])
def test_threads_and_splits_change_nothing(name: str, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = {"a": torch.randn(CHAINS, 3, 1000, generator=g), "b": torch.randn(CHAINS, 5, generator=g)}
    f = lambda s: 0.5 * s["a"].flatten(1).square().sum(1) + 0.5 * s["b"].square().sum(1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = SAMPLERS[name].sample(f, x, 3, seed=seed).state
        part = SAMPLERS[name].sample(f, {k: t[5:9] for k, t in x.items()}, 3, seed=seed, chain_offset=5).state
        torch.set_num_threads(3)
        three = SAMPLERS[name].sample(f, x, 3, seed=seed).state
    finally:
        torch.set_num_threads(before)
    for key in x:
        assert torch.equal(one[key], three[key]) and torch.equal(one[key][5:9], part[key])


@pytest.mark.parametrize(
    "name", ["HMC, per chain and element", "Underdamped, frozen", "MALA, clipped", "tempering, sizes"]
)
def test_instruction_sets_agree(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for isa in native.cpu().isas():
        monkeypatch.setenv("MMEBM_CPU_ISA", "baseline" if isa == "generic" else isa)
        found[isa] = SAMPLERS[name].sample(energy, state(seed), STEPS, seed=seed).state
    wide = [out for isa, out in found.items() if isa != "generic"]
    for out in wide:
        assert all(torch.equal(out[key], wide[0][key]) for key in out)
        off = [~same_chains(out[key], found["generic"][key], key) for key in out]
        assert int((off[0] | off[1]).sum()) <= 1


@pytest.mark.parametrize("shape", [(5, 1), (5, 4), (3, 2, 7), (2, 33), (0, 4), (4, 0), (300,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniforms_and_words_are_bit_equal(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    where = {"seed": seed - 2**62, "step": 2**32 - 1, "stream": noise.stream(3, noise.SWAP), "chain_offset": 2**31}
    got = drawn.uniform(shape, dtype=dtype, **where)
    assert torch.equal(got, noise.uniform(shape, dtype=dtype, **where)) and got.dtype == dtype
    assert torch.equal(drawn.words(len(got), 3, **where), noise.words(len(got), 3, **where))
    close = drawn.normal(shape, dtype=dtype, **where).double() - noise.normal(shape, dtype=torch.float64, **where)
    # the bound of mmebm/noise.py, and a rounding to float32
    assert not close.numel() or float(close.abs().max()) < 2e-6 + 5e-7


def test_uniforms_come_from_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the definition was asked")

    drawn.normal((3, 4), seed=1)  # whoever is first compares the extension with the definition
    for name in ("normal", "uniform", "words"):
        monkeypatch.setattr(noise, name, never)
    drawn.normal((3, 4), seed=1)
    drawn.uniform((3, 4), seed=1)
    drawn.words(3, 4, seed=1)
    monkeypatch.setenv("MMEBM_BACKEND", "torch")
    with pytest.raises(AssertionError, match="the definition was asked"):
        drawn.normal((3, 4), seed=1)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("numel", [1, 7, 16, 4099])
def test_finite_rows(numel: int, bad: float, seed: int) -> None:
    x = torch.randn(6, numel, generator=torch.Generator().manual_seed(seed))
    x[1, 0], x[4, -1] = bad, bad
    alive = torch.tensor([True, True, False, True, True, True])
    assert dynamics.finite_rows_(alive, x) is alive
    assert alive.tolist() == [True, False, False, True, False, True]
    # not for the extension: another dtype, strides
    for other in (x.double(), x.t().contiguous().t(), x.to(torch.bfloat16)):
        alive = dynamics.finite_rows_(torch.ones(6, dtype=torch.bool), other)
        assert alive.tolist() == [True, False, True, True, False, True]


def test_energies_in_float64_take_the_reference(seed: int) -> None:
    """A float32 state with an energy summed in float64: the decision keeps its digits."""
    x = torch.randn(8, 30, generator=torch.Generator().manual_seed(seed))
    f = lambda x: 1e9 + 0.5 * x.double().square().sum(1)
    for sampler in (HMC(0.2, 3), mmebm.MALA(0.05), ParallelTempering(0.05, (1.0, 1.5))):
        wanted = sampler.sample(lambda x: 0.5 * x.double().square().sum(1), x, 5, seed=seed).state
        # 1e9 leaves 1e-7 of a float64 energy
        off = (sampler.sample(f, x, 5, seed=seed).state - wanted).abs().amax(1)
        assert int((off > 1e-5).sum()) <= 1
