"""Random runs of HMC, underdamped dynamics and parallel tempering against their rules restated in float64 (rule.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from mmebm import HMC, ParallelTempering, Underdamped
from mmebm.samplers import Samples
from tests.fuzz import rule
from tests.fuzz.strategies import (
    NUMBERS,
    Settings,
    State,
    Tolerance,
    energies,
    masks,
    setting,
    states,
    states_at,
    traced,
)

DTYPES = (torch.float32, torch.float64)


def around(data: st.DataObject, state: State, first_step: int, records: tuple[str, ...]) -> tuple[Any, dict[str, Any]]:
    """(the masks, what ``sample`` takes)."""
    observed, plain = data.draw(masks(state))
    sample: dict[str, Any] = {
        "observed": observed,
        "first_step": first_step,
        "seed": data.draw(st.integers(-(2**63), 2**64 - 1), label="seed"),
        "chain_offset": data.draw(st.sampled_from((0, 7)), label="chain_offset"),
        "record": tuple(data.draw(st.sets(st.sampled_from(records)), label="record")),
        "thin": data.draw(st.sampled_from((None, 1, 2)), label="thin"),
    }
    if "expanded" not in state.layouts:
        sample["inplace"] = data.draw(st.booleans(), label="inplace")
    return plain, sample


def compare(
    out: Samples,
    state: State,
    steps: int,
    sample: dict[str, Any],
    run: Callable[..., rule.Result],
    energy: Any,
    whole_batch: bool = False,
) -> None:
    """``run(dtype, torch dtype, jitter)``: the rule; ``whole_batch``: whether chains depend on each other."""
    kinks: list[np.ndarray] = []
    truth = run(np.float64, energy.of(torch.float64, run.every), None)  # type: ignore[attr-defined]
    points = truth.trajectory
    if energy.kind.startswith(("mlp", "joint")):
        kinks = [energy.to_kink(x, 0) for x in points]
    for kink in kinks:
        truth.margin = np.minimum(truth.margin, kink)
    single = torch.float32 in state.dtypes
    rough = [
        # in float64 too: without jitter all three would be one draw of the roundings, which adaptation amplifies
        run(np.float32, energy.of(torch.float32, run.every), np.random.default_rng(n))  # type: ignore[attr-defined]
        for n in range(3)
    ]
    tolerance = Tolerance(truth, rough, 2.0**-24 if single else 2.0**-53)
    sound = tolerance.sound(1e-3)
    if whole_batch and not sound.all():
        sound = np.zeros_like(sound)
    assume(sound.any() or not state.chains)

    close = tolerance.close
    for i, (t, dtype) in enumerate(zip(state.parts(out.state), state.dtypes)):
        assert t.dtype == dtype
        close(f"state {i}", t, lambda r, i=i: r.state[i], sound)
    if "velocity" in truth.extra:
        for i, t in enumerate(state.parts(out.info["velocity"])):
            close(f"velocity {i}", t, lambda r, i=i: r.extra["velocity"][i], sound)
    if not (steps and state.chains):
        return
    if (thin := sample["thin"]) and steps >= thin:
        for i, t in enumerate(state.parts(out.trajectory)):
            kept = range(thin - 1, steps, thin)
            close(f"trajectory {i}", t, states_at(i, kept), (slice(None), sound))
    for name in sample["record"]:
        if name in truth.trace:
            close(name, out.trace[name], traced(name), (slice(None), sound))


def away_from_kinks(energy: Any) -> None:
    """Between two recorded states there are others, of which the test does not know how near a kink they are."""
    if energy.activation in ("relu", "leaky_relu"):
        energy.activation = "softplus"


@given(data=st.data())
def test_hmc(data: st.DataObject) -> None:
    first_step, steps = data.draw(st.sampled_from((0, 4)), label="first_step"), data.draw(st.integers(0, 4))
    state = data.draw(states(DTYPES))
    energy = data.draw(energies(state, first_step, one_per_chain=True, scores=False))
    away_from_kinks(energy)
    settings = Settings()
    data.draw(setting(settings, "step_size", state, first_step, 0.05, 0.4))
    data.draw(setting(settings, "mass", state, first_step, 0.5, 2.0))
    data.draw(setting(settings, "temperature", state, first_step, 0.5, 2.0, forms=(*NUMBERS, "chains"), mapping=False))
    options = {
        "leapfrog_steps": data.draw(st.integers(1, 4), label="leapfrog_steps"),
        "adapt": 0 if first_step else data.draw(st.sampled_from((0, 2, 9)), label="adapt"),
        "target_accept": data.draw(st.sampled_from((0.6, 0.8)), label="target_accept"),
        "adapt_over": data.draw(st.sampled_from(("chain", "all")), label="adapt_over"),
    }
    plain, sample = around(data, state, first_step, ("energy", "accept_prob", "accepted", "energy_error", "step_scale"))
    out = HMC(**settings.given, **options, log_prob=energy.log_prob).sample(
        energy.given, state.given, steps, args=energy.args, kwargs=energy.kwargs, **sample
    )

    def run(dtype: Any, of: Any, jitter: Any) -> rule.Result:
        return rule.hmc(
            of,
            [a.astype(dtype) for a in state.arrays],
            steps,
            settings,
            seed=sample["seed"] % 2**64,
            masks=plain,
            chain_offset=sample["chain_offset"],
            first_step=first_step,
            jitter=jitter,
            **options,
        )

    run.every = 1  # type: ignore[attr-defined]
    compare(
        out, state, steps, sample, run, energy, whole_batch=bool(options["adapt"]) and options["adapt_over"] == "all"
    )


@given(data=st.data())
def test_underdamped(data: st.DataObject) -> None:
    first_step, steps = data.draw(st.sampled_from((0, 4)), label="first_step"), data.draw(st.integers(0, 5))
    state = data.draw(states(DTYPES))
    energy = data.draw(energies(state, first_step))
    away_from_kinks(energy)
    settings = Settings()
    data.draw(setting(settings, "step_size", state, first_step, 0.05, 0.4, zero=True))
    data.draw(setting(settings, "friction", state, first_step, 0.2, 3.0, zero=True))
    data.draw(setting(settings, "mass", state, first_step, 0.5, 2.0))
    data.draw(setting(settings, "temperature", state, first_step, 0.2, 2.0, zero=True))
    # a scalar is not per chain, and a score has none
    records = ("grad_norm", "kinetic") + (() if energy.score or energy.returns == "scalar" else ("energy",))
    plain, sample = around(data, state, first_step, records)
    freeze = data.draw(st.sampled_from(("ignore", "freeze", "raise")), label="on_nonfinite")
    out = Underdamped(**settings.given, log_prob=energy.log_prob, score=energy.score, on_nonfinite=freeze).sample(
        energy.given, state.given, steps, args=energy.args, kwargs=energy.kwargs, **sample
    )

    def run(dtype: Any, of: Any, jitter: Any) -> rule.Result:
        return rule.underdamped(
            of,
            [a.astype(dtype) for a in state.arrays],
            steps,
            settings,
            seed=sample["seed"] % 2**64,
            masks=plain,
            chain_offset=sample["chain_offset"],
            first_step=first_step,
            jitter=jitter,
        )

    run.every = 1  # type: ignore[attr-defined]
    compare(out, state, steps, sample, run, energy)


@given(data=st.data())
def test_tempering(data: st.DataObject) -> None:
    first_step, steps = data.draw(st.sampled_from((0, 4)), label="first_step"), data.draw(st.integers(0, 4))
    state = data.draw(states(DTYPES, max_chains=5))
    energy = data.draw(energies(state, first_step, one_per_chain=True, scores=False))
    away_from_kinks(energy)
    rungs = data.draw(st.integers(1, 4), label="temperatures")
    temperatures = [1.0, 1.5, 2.5, 4.0][:rungs]
    form = data.draw(st.sampled_from(("number", "sequence", "mapping")), label="step_size")
    sizes = [0.02, 0.03, 0.05, 0.1][:rungs]
    step_size: Any = {"number": 0.05, "sequence": sizes, "mapping": {key: sizes for key in state.keys}}[form]
    options = {
        "swap_every": data.draw(st.integers(1, 3), label="swap_every"),
        "accept": data.draw(st.sampled_from(("metropolis", None)), label="accept"),
    }
    plain, sample = around(data, state, first_step, ("energy", "ladder_energy", "accept_prob", "replica"))
    out = ParallelTempering(step_size, temperatures, **options, log_prob=energy.log_prob).sample(
        energy.given, state.given, steps, args=energy.args, kwargs=energy.kwargs, **sample
    )

    def run(dtype: Any, of: Any, jitter: Any) -> rule.Result:
        return rule.tempering(
            of,
            [a.astype(dtype) for a in state.arrays],
            steps,
            lambda name, i, r: 0.05 if form == "number" else sizes[r],
            temperatures,
            seed=sample["seed"] % 2**64,
            masks=plain,
            chain_offset=sample["chain_offset"],
            first_step=first_step,
            jitter=jitter,
            **options,
        )

    run.every = rungs  # type: ignore[attr-defined]
    compare(out, state, steps, sample, run, energy)
