"""Random Langevin chains, every option of it and of ``sample``, against the rule restated in float64 (rule.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import assume, event, given, note
from hypothesis import strategies as st
from torch import Tensor

from mmebm import Langevin
from mmebm.samplers import Samples
from tests.fuzz import rule
from tests.fuzz.strategies import (
    NUMBERS,
    Draw,
    Energy,
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

ALL_RECORDS = ("energy", "grad_norm", "displacement", "clipped", "nonfinite", "accepted")


@dataclass
class Example:
    state: State
    energy: Energy
    steps: int
    settings: Settings
    options: dict[str, Any]
    sample: dict[str, Any]
    rule: dict[str, Any]

    def run(self) -> Samples:
        return Langevin(**self.settings.given, **self.options).sample(
            self.energy.given,
            self.state.given,
            self.steps,
            args=self.energy.args,
            kwargs=self.energy.kwargs,
            **self.sample,
        )

    def restated(self, dtype: Any, jitter: int | None = None, **more: Any) -> rule.Result:
        torch_dtype = torch.float32 if dtype is np.float32 else torch.float64
        return rule.langevin(
            self.energy.of(torch_dtype),
            [a.astype(dtype) for a in self.state.arrays],
            self.steps,
            self.settings,
            jitter=None if jitter is None else np.random.default_rng(jitter),
            **self.rule,
            **more,
        )


def halve(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: 0.5 * t for key, t in x.items()}
    return 0.5 * x if isinstance(x, Tensor) else type(x)(0.5 * t for t in x)


@st.composite
def examples(
    draw: Draw, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64), fused: bool = False, one: bool = False
) -> Example:
    """``fused``: only options that leave the chain one call; ``one``: nothing but one plain update."""
    steps = 1 if one else draw(st.integers(0, 6), label="steps")
    first_step = draw(st.sampled_from((0, 0, 3, 2**32 - 7)), label="first_step")
    state = draw(states(dtypes, min_dims=int(fused)))
    count = len(state.keys)
    settings = Settings()
    accept = (
        None if fused or one else draw(st.sampled_from((None, None, None, "descent", "metropolis")), label="accept")
    )
    metropolis = accept == "metropolis"
    before = not one and accept is None and draw(st.booleans(), label="noise before")
    energy = draw(
        energies(state, first_step, one_per_chain=accept is not None, scores=not fused and accept is None, fused=fused)
    )
    options: dict[str, Any] = {"log_prob": energy.log_prob, "score": energy.score}
    restated: dict[str, Any] = {}

    def number(name: str, low: float, high: float, **more: Any) -> Any:
        if fused:
            more.setdefault("forms", (*NUMBERS, "chains"))
        return draw(setting(settings, name, state, first_step, low, high, **more))

    def drawn(label: str) -> bool:
        return draw(st.booleans(), label=label)

    # one temperature for all tensors and elements of a chain, and a proposal that can be taken back
    number("step_size", 0.01, 0.2, zero=not metropolis)
    for i in range(count):
        settings.table["temperature", i] = lambda k: np.asarray(1.0)
    if not metropolis and drawn("noise_scale"):
        number("noise_scale", 0.01, 0.3, zero=True)
    elif drawn("temperature"):
        number("temperature", 0.2, 2.0, forms=(*NUMBERS, "chains"), mapping=not metropolis, zero=not metropolis)
    if drawn("grad_clip"):
        number("grad_clip", 0.05, 1.0, optional=True, zero=True)
    over = "tensor" if not metropolis and not fused and drawn("norm over tensor") else "chain"
    if drawn("grad_norm_clip"):
        number("grad_norm_clip", 0.1, 2.0, optional=True, forms=NUMBERS if over == "tensor" else (*NUMBERS, "chains"))
    if not metropolis and drawn("max_update"):
        number("max_update", 0.05, 0.5, optional=True, zero=True)
    if drawn("prior_std"):
        number("prior_std", 0.5, 3.0, optional=True)
    at_step = False
    if drawn("bounds"):
        at_step = not metropolis and (one or drawn("bounds at step"))
        more: dict[str, Any] = {"mapping": False, "given": False, "optional": True}
        if fused:
            more["forms"] = (*NUMBERS, "chains")
        keys = list(range(count))
        if drawn("bounds by key") and state.structure != "tensor":
            keys = sorted(draw(st.sets(st.sampled_from(range(count)), min_size=1), label="keys of bounds"))

        def pair(indices: list[int]) -> Any:
            ends = []
            for name, low, high in (("low", -1.5, -0.2), ("high", 0.2, 1.5)):
                one = Settings()
                part = State(state.structure, tuple(indices), [state.arrays[i] for i in indices], [], [])
                value = draw(setting(one, name, part, first_step, low, high, **more)) if drawn(name) else None
                settings.varies |= one.varies
                for j, i in enumerate(indices):
                    if (name, j) in one.table:
                        settings.table[name, i] = one.table[name, j]
                ends.append(value)
            return tuple(ends)

        options["bounds"] = pair(keys) if len(keys) == count else {state.keys[i]: pair([i]) for i in keys}
        options["bounds_at"] = "step" if at_step else "end"
    outside = "reject" if at_step and not before and not fused and drawn("reject") else "clamp"
    clamp_noise = at_step and before and drawn("clamp_noise")
    options |= {
        "noise_at": "before" if before else "after",
        "norm_over": over,
        "outside": outside,
        "accept": accept,
        "clamp_noise": clamp_noise,
        "backend": draw(st.sampled_from(("auto",) if fused else ("auto", "torch")), label="backend"),
        "capture": draw(st.sampled_from(("auto", False)), label="capture"),
        "mode": draw(st.sampled_from(("eval", "train", "keep")), label="mode"),
        "on_nonfinite": draw(st.sampled_from(("ignore", "freeze", "raise")), label="on_nonfinite"),
    }
    project: list[Any] = [None] * count
    if not metropolis and not fused and not one and drawn("project"):
        if drawn("project by key"):
            chosen = draw(st.sets(st.sampled_from(range(count))), label="projected")
            options["project"] = {state.keys[i]: torch.tanh for i in chosen}
        else:
            chosen, options["project"] = range(count), torch.tanh
        for i in chosen:
            project[i] = np.tanh
    finish: Callable[[list[Any]], list[Any]] | None = None
    if not one and drawn("finish"):
        options["finish"], finish = halve, lambda x: [0.5 * t for t in x]
    observed, plain = draw(masks(state))
    blocks: list[list[int]] | None = None
    sample: dict[str, Any] = {"observed": observed}
    if not fused and not one and drawn("blocks"):
        order = draw(st.permutations(range(count)), label="order")
        cuts = sorted(draw(st.sets(st.integers(1, count)), label="cuts"))
        blocks = [sorted(order[a:b]) for a, b in zip([0, *cuts], [*cuts, count]) if b > a]
        make = draw(st.sampled_from((list, tuple, set)))
        bare = drawn("bare keys")
        sample["blocks"] = [
            state.keys[b[0]] if bare and len(b) == 1 else make(state.keys[i] for i in b) for b in blocks
        ]
    seed = draw(st.one_of(st.integers(-(2**63), 2**64 - 1), st.integers(0, 5)), label="seed")
    offset = draw(st.sampled_from((0, 0, 5, 2**32 - state.chains)), label="chain_offset")
    as_tensor = seed < 2**63 and drawn("seed as a tensor")
    sample["seed"] = torch.tensor(seed) if as_tensor else seed
    fixed_step = settings.varies or "schedule" in str(energy.args)
    plain_step = fixed_step or any(callable(a) for a in energy.args) or not drawn("first_step as a tensor")
    sample["first_step"] = first_step if plain_step else torch.tensor([first_step])
    sample["chain_offset"] = offset
    allowed = [r for r in ALL_RECORDS if not (r == "energy" and energy.score) and (accept or r != "accepted")]
    if fused:
        allowed = [r for r in ("energy", "grad_norm") if not (r == "energy" and energy.returns == "scalar")]
    sample["record"] = tuple(draw(st.sets(st.sampled_from(allowed)), label="record"))
    sample["thin"] = draw(st.sampled_from((None, 1, 2, 5)), label="thin")
    if sample["thin"] is not None:
        sample["offload"] = drawn("offload")
    ways = ("plain", "plain", "inplace", "chunks") + (() if fused else ("differentiable",))
    way = draw(st.sampled_from(ways), label="way")
    if way == "inplace" and "expanded" not in state.layouts:
        sample["inplace"] = True
    chunked_norm = over == "tensor" and "grad_norm_clip" in settings.given
    chunked_energy = energy.returns == "scalar" and "energy" in sample["record"]
    if way == "chunks" and not chunked_norm and not chunked_energy:
        sample["chunk_size"] = draw(st.integers(1, 5), label="chunk_size")
    if way == "differentiable":
        sample["differentiable"] = draw(st.sampled_from((True, 1, 2)), label="differentiable")
    restated |= {
        "seed": seed % 2**64,
        "masks": plain,
        "blocks": blocks,
        "noise_at": options["noise_at"],
        "norm_over": over,
        "clamp_noise": clamp_noise,
        "bounds_at": options.get("bounds_at", "step"),
        "outside": outside,
        "project": project,
        "finish": finish,
        "accept": accept,
        "chain_offset": offset,
        "first_step": first_step,
    }
    return Example(state, energy, steps, settings, options, sample, restated)


def compare(example: Example, out: Samples, jitter: bool = True) -> None:
    state, steps = example.state, example.steps
    truth = example.restated(np.float64, after_gradient=example.energy.to_kink)
    single = torch.float32 in state.dtypes
    rough = [example.restated(np.float32, jitter=n if single and jitter else None) for n in range(3)]
    tolerance = Tolerance(truth, rough, 2.0**-24 if single else 2.0**-53)
    # a decision that float32 may take otherwise: an energy of up to 100 is known to 1e-5 there
    sound = tolerance.sound(1e-3)
    if example.rule["norm_over"] == "tensor" and not sound.all():
        sound = np.zeros_like(sound)
    assume(sound.any() or not state.chains)
    event(f"{out.info['op']} {out.info['backend']}")
    note(out.info["reason"])

    close = tolerance.close
    assert type(out.state) is type(state.given)
    for i, (t, dtype) in enumerate(zip(state.parts(out.state), state.dtypes)):
        assert t.dtype == dtype
        close(f"state {i}", t, lambda r, i=i: r.state[i], sound)
    thin = example.sample["thin"]
    if thin is not None:
        for i, t in enumerate(state.parts(out.trajectory)):
            kept = range(thin - 1, steps if state.chains else 0, thin)
            shape = (steps // thin, *state.arrays[i].shape)
            assert t.shape == shape, (t.shape, shape)
            if kept:
                close(f"trajectory {i}", t, states_at(i, kept), (slice(None), sound))
    for name in example.sample["record"]:
        got = out.trace[name]
        if name == "energy" and example.energy.returns == "scalar":
            if sound.all() and state.chains and steps:
                assert got.shape == (steps,), got.shape
                close(name, got, traced("energy"), slice(None))
            continue
        assert got.shape == (steps, state.chains), (name, got.shape)
        if not (steps and state.chains):
            continue
        if name == "clipped":
            # the range: a float32 gradient may lie on the other side of its limit, and 0 is not changed by a factor
            low = np.min([np.stack(r.trace["clipped"]) for r in (truth, *rough)], 0)[:, sound]
            high = np.max([np.stack(r.trace["clipped_most"]) for r in (truth, *rough)], 0)[:, sound]
            assert ((low <= got.numpy()[:, sound]) & (got.numpy()[:, sound] <= high)).all(), (low, got, high)
        elif name == "nonfinite":
            assert (got == 0).all()
        else:
            close(name, got, traced(name), (slice(None), sound))


@given(example=examples())
def test_chain(example: Example) -> None:
    before = [t.clone() for t in example.state.parts(example.state.given)]
    out = example.run()
    inside = example.sample.get("inplace", False)
    for t, old, new in zip(example.state.parts(example.state.given), before, example.state.parts(out.state)):
        assert torch.equal(t, new if inside else old)
        assert inside or t.numel() == 0 or t.data_ptr() != new.data_ptr()
    if "torch" in example.options["backend"]:
        assert out.info["backend"] == "torch"
    compare(example, out)


@given(example=examples(dtypes=(torch.float32,), fused=True))
def test_whole_chain(example: Example) -> None:
    out = example.run()
    if out.info["op"] == "langevin_mlp":
        assert out.info["backend"] != "torch"
    compare(example, out)


@given(example=examples(dtypes=(torch.float32,)), data=st.data())
def test_torch_noise(example: Example, data: st.DataObject) -> None:
    """``rng="torch"``: one ``randn`` per tensor that has noise, in the order in which they are updated."""
    assume(example.options["accept"] is None)
    example.sample.pop("chunk_size", None)
    example.options["rng"] = "torch"
    example.sample["chain_offset"] = 0
    seed = data.draw(st.integers(0, 2**32), label="generator's seed")
    example.sample["seed"] = seed
    drawn: dict[tuple[int, int], Any] = {}
    torch_generator = torch.Generator().manual_seed(seed)

    def draw(i: int, k: int) -> Any:
        # each of the rule's runs asks in the same order
        if (i, k) not in drawn:
            shape = example.state.arrays[i].shape
            name = "noise_scale" if "noise_scale" in example.settings.given else "temperature"
            value = example.settings.given.get(name, 1.0)
            value = value.get(example.state.keys[i]) if isinstance(value, dict) else value
            nothing = not isinstance(value, Tensor) and not callable(value) and value == 0
            drawn[i, k] = np.zeros(shape) if nothing else torch.randn(shape, generator=torch_generator).numpy()
        return drawn[i, k]

    out = example.run()
    example.rule["draw"] = draw
    compare(example, out, jitter=False)


@given(example=examples(dtypes=(torch.bfloat16, torch.float16), one=True))
def test_sixteen_bits(example: Example) -> None:
    """One step: each number is the neighbour that its threshold says, but where it is too close to call."""
    out = example.run()
    truth = example.restated(np.float64, after_gradient=example.energy.to_kink)
    sound = truth.margin > 2e-2  # autograd hands the gradient over in the state's dtype: 2^-9 of it
    assume(sound.all())
    for i, (got, old, mask) in enumerate(
        zip(example.state.parts(out.state), example.state.arrays, example.rule["masks"])
    ):
        dtype = example.state.dtypes[i]
        assert got.dtype == dtype
        bits, least = (7, -126) if dtype == torch.bfloat16 else (10, -14)
        y = truth.state[i]
        new = got.detach().double().numpy()
        with np.errstate(divide="ignore"):
            exponent = np.maximum(np.floor(np.log2(np.abs(y))), least)
        spacing = 2.0 ** (exponent - bits)
        a = np.asarray(example.settings("step_size", i, 0))
        slope = np.abs(example.energy.of(torch.float64)(example.state.arrays, 0)[1][i])
        # the gradient's rounding to the state's dtype (twice: autograd sums parts), its own in float32, and the noise's
        free = a * 2.0**-bits * np.max(slope, initial=0.0) + 1e-5
        far = np.abs(new - y) > spacing + free
        moving = ~np.broadcast_to(np.asarray(mask, dtype=bool), y.shape)
        assert not (far & moving).any(), (new, y)
        assert np.array_equal(new[~moving], old[~moving])
        down = np.floor(y / spacing) * spacing
        threshold = rule.thresholds(
            y.shape, example.rule["seed"], example.rule["first_step"], i, rule.ROUNDING, example.rule["chain_offset"]
        )
        gap = (y - down) / spacing - threshold
        clear = moving & (np.abs(gap) > free / spacing) & ((y - down) > free) & ((down + spacing - y) > free)
        assert np.array_equal(new[clear], (down + spacing * (gap > 0))[clear])
