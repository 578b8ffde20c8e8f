"""Odd values for every argument: taken, or refused by a TypeError, a ValueError or a BackendError that names it."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import warnings
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmebm import (
    HMC,
    BackendError,
    Langevin,
    ParallelTempering,
    ReplayBuffer,
    Underdamped,
    diagnostics,
    initial,
    noise,
    presets,
    rank_offset,
    schedules,
)
from mmebm.energies import MLP, Gaussian, GaussianMixture, Sum

CHAINS, SIZE = 3, 4


class Odd:
    """An object that says nothing about itself."""


WHOLE = (CHAINS, SIZE)
ODD: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "False": lambda: False,
    "0": lambda: 0,
    "-1": lambda: -1,
    "2": lambda: 2,
    "2**32": lambda: 2**32,
    "2**70": lambda: 2**70,
    "10**400": lambda: 10**400,
    "0.0": lambda: 0.0,
    "-0.5": lambda: -0.5,
    "0.5": lambda: 0.5,
    "1e300": lambda: 1e300,
    "1e-300": lambda: 1e-300,
    "nan": lambda: math.nan,
    "inf": lambda: math.inf,
    "-inf": lambda: -math.inf,
    "complex": lambda: 1 + 2j,
    "str": lambda: "before",
    "empty str": lambda: "",
    "bytes": lambda: b"x",
    "list": lambda: [1.0, 2.0],
    "empty list": list,
    "empty tuple": tuple,
    "empty dict": dict,
    "empty set": set,
    "pair": lambda: (-1.0, 1.0),
    "inverted pair": lambda: (1.0, -1.0),
    "pair of str": lambda: ("a", "b"),
    "nested": lambda: [[1], [2, 3]],
    "dict": lambda: {"a": 1.0},
    "dict of 0": lambda: {0: 0.5},
    "dict of None": lambda: {0: None},
    "set of str": lambda: {"energy"},
    "set of 0": lambda: {0},
    "object": Odd,
    "type": lambda: int,
    "ellipsis": lambda: ...,
    "range": lambda: range(3),
    "generator": lambda: (i for i in range(3)),
    "Decimal": lambda: Decimal("0.5"),
    "Fraction": lambda: Fraction(1, 2),
    "slice": lambda: slice(1),
    "function of the step": lambda: lambda k: 0.5,
    "function that returns None": lambda: lambda k: None,
    "function that returns str": lambda: lambda k: "a",
    "function of nothing": lambda: lambda: 1.0,
    "numpy float": lambda: np.float32(0.5),
    "numpy int": lambda: np.int64(1),
    "numpy array": lambda: np.ones(CHAINS),
    "numpy object array": lambda: np.array([Odd()]),
    "numpy bool": lambda: np.bool_(True),
    "0-dim": lambda: torch.tensor(0.5),
    "0-dim int": lambda: torch.tensor(1),
    "0-dim nan": lambda: torch.tensor(math.nan),
    "0-dim bool": lambda: torch.tensor(True),
    "0-dim negative": lambda: torch.tensor(-1.0),
    "chains": lambda: torch.full((CHAINS,), 0.5),
    "other length": lambda: torch.ones(CHAINS + 1),
    "other length mask": lambda: torch.ones(CHAINS + 2, dtype=torch.bool),
    "empty tensor": lambda: torch.ones(0),
    "like state": lambda: torch.full(WHOLE, 0.5),
    "mask": lambda: torch.ones(*WHOLE, dtype=torch.bool),
    "too many dimensions": lambda: torch.ones(2, CHAINS, SIZE),
    "int tensor": lambda: torch.ones(CHAINS, 1, dtype=torch.int32),
    "uint8": lambda: torch.tensor([3], dtype=torch.uint8),
    "complex tensor": lambda: torch.ones(CHAINS, dtype=torch.complex64),
    "half": lambda: torch.ones(CHAINS, dtype=torch.float16),
    "sparse": lambda: torch.eye(CHAINS).to_sparse(),
    "meta": lambda: torch.ones(CHAINS, device="meta"),
    "meta state": lambda: torch.ones(*WHOLE, device="meta"),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(*WHOLE), 0.1, 0, torch.qint8),
    "float8": lambda: torch.ones(*WHOLE).to(torch.float8_e4m3fn),
    "nested tensor": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "bool state": lambda: torch.ones(*WHOLE, dtype=torch.bool),
    "int state": lambda: torch.ones(*WHOLE).long(),
    "dict of states": lambda: {"a": torch.ones(CHAINS, 2), "b": torch.ones(CHAINS + 1, 2)},
    "list of states": lambda: [torch.ones(CHAINS, 2), None],
    "generator object": lambda: torch.Generator(),
    "module": lambda: torch.nn.Linear(SIZE, 1),
    "dtype": lambda: torch.float32,
}
SAMPLERS: dict[str, Callable[..., Any]] = {
    "Langevin": lambda **o: Langevin(**{"step_size": 0.1, **o}),
    "HMC": lambda **o: HMC(**{"step_size": 0.1, "leapfrog_steps": 2, **o}),
    "Underdamped": lambda **o: Underdamped(**{"step_size": 0.1, **o}),
    "ParallelTempering": lambda **o: ParallelTempering(**{"step_size": 0.1, "temperatures": [1.0, 2.0], **o}),
}
TYPES = {"Langevin": Langevin, "HMC": HMC, "Underdamped": Underdamped, "ParallelTempering": ParallelTempering}
OURS = (TypeError, ValueError, BackendError, FloatingPointError)
# what an argument's error may call it instead
ALSO = {
    "low": ("bounds",),
    "args": ("argument", "energy"),
    "kwargs": ("argument", "energy"),
    "differentiable": (),
    "temperatures": ("step_size",),
    "norm_over": ("grad_norm_clip",),
}
# arguments that are functions of the user's, or given to them
USERS = ("args", "kwargs", "project", "finish", "callback")
# functions of the user's that raise, and numbers of steps that take too long
FAILING = ("function of nothing", "module")
CALLABLE = ("type", "function of the step", "function that returns None", "function that returns str", *FAILING)
SLOW = {(name, many) for name in ("steps", "leapfrog_steps") for many in ("2**32", "2**70", "10**400")}


def energy(x: Any, *args: Any, **kwargs: Any) -> Tensor:
    parts = [x] if isinstance(x, Tensor) else list(x.values() if isinstance(x, dict) else x)
    squares = [t.float().square().reshape(len(t), math.prod(t.shape[1:])).sum(1) for t in parts]
    return torch.stack(squares).sum(0)


def arguments() -> list[tuple[str, str, str]]:
    """(sampler, "option" or "argument", name)."""
    out = []
    for name, kind in TYPES.items():
        out += [(name, "option", f.name) for f in dataclasses.fields(kind) if f.name != "_"]
        out += [(name, "argument", p) for p in inspect.signature(kind.sample).parameters if p not in ("self", "energy")]
    return out


def check(sampler: str, kind: str, name: str, label: str, **more: Any) -> None:
    value = ODD[label]()
    options, call = dict(more), {"state": torch.ones(*WHOLE), "steps": 2}
    (options if kind == "option" else call)[name] = value
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            SAMPLERS[sampler](**options).sample(energy, **call)
    except OURS as error:
        if name in USERS or label in FAILING:
            return  # the user's own function raised, or was given what it does not take
        text = str(error)
        assert any(word in text for word in (name, *ALSO.get(name, ()))), f"{type(error).__name__}: {text}"
        assert len(text) < 600, text
    else:
        assert kind != "argument" or name != "steps" or label in ("0", "2", "numpy int"), f"steps={label} was taken"


@pytest.mark.parametrize("case", arguments(), ids="-".join)
def test_odd_values(case: tuple[str, str, str]) -> None:
    """Each odd value for each argument: all of them, which takes no luck."""
    failed = []
    for label in ODD:
        if (case[2], label) in SLOW:
            continue
        try:
            check(*case, label)
        except Exception as error:
            failed.append(f"{case[2]}={label}: {type(error).__name__}: {str(error)[:300]}")
    assert not failed, "\n".join(failed)


@given(data=st.data())
def test_two_odd_values(data: st.DataObject) -> None:
    """Two at once: an error of ours, whichever it names."""
    options: dict[str, Any] = {}
    call: dict[str, Any] = {"state": torch.ones(*WHOLE), "steps": 2}
    sampler = data.draw(st.sampled_from(tuple(SAMPLERS)), label="sampler")
    mine = [case for case in arguments() if case[0] == sampler]
    failing = False
    for _ in range(2):
        _, kind, name = data.draw(st.sampled_from(mine), label="argument")
        label = data.draw(st.sampled_from([o for o in ODD if (name, o) not in SLOW]), label="value")
        (options if kind == "option" else call)[name] = ODD[label]()
        failing |= name in USERS or label in FAILING
    names = (*options, *call)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            SAMPLERS[sampler](**options).sample(energy, **call)
    except OURS as error:
        allowed = [*names, *(also for name in names for also in ALSO.get(name, ()))]
        assert failing or any(word in str(error) for word in allowed), f"{type(error).__name__}: {error}"


# --- Functions

X = torch.ones(CHAINS, 2)
LABELS = torch.arange(CHAINS) % 2
EXAMPLES = torch.arange(float(CHAINS))[:, None] * torch.ones(SIZE)
START = initial.normal((2,))
BUFFER = ReplayBuffer(4, START, classes=2, seed=0)
DRAWS = torch.arange(16.0).reshape(8, 2).sin()


def at(x: Tensor) -> Tensor:
    return x.square().sum(1)


def drawn(make: Callable[..., Any], *labels: Tensor) -> Callable[..., Any]:
    """Makes an initialiser, and draws from it."""
    return lambda **o: make(**o)(CHAINS, torch.Generator().manual_seed(0), *labels)


def taken(make: Callable[..., schedules.Schedule]) -> Callable[..., Any]:
    """Makes a schedule, and takes its values."""
    return lambda **o: (lambda made: (made(0), made.values_at(0, 4)))(make(**o))


def stepped(make: Callable[..., Langevin]) -> Callable[..., Any]:
    """Makes a sampler, and takes a step."""
    return lambda **o: make(**o).sample(energy, torch.ones(*WHOLE), 1, seed=0)


PLACE = {"seed": 1, "step": 2, "stream": 3, "chain_offset": 4, "device": None}
RAMP = {"start": 1.0, "end": 0.5, "steps": 3}
CURVED = {"energy": at, "x": torch.ones(*WHOLE), "iterations": 2, "generator": None}
DTYPE = {"dtype": torch.float32}
STORED = {"capacity": 4, "init": START, "classes": None, "dtype": None, "value_range": None, "transform": None}
STORED |= {"policy": "slots", "draw": "uniform", "storage": "device", "reinit": 0.5, "dequantise": True}
STORED |= {"device": "cpu", "seed": 0}
# what is called, and arguments that it takes
FUNCTIONS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "init": (Langevin(0.1).init, {"state": X, "carried": None, "generator": None, "chain_offset": 0, "first_step": 0}),
    "linear": (taken(schedules.linear), RAMP),
    "geometric": (taken(schedules.geometric), RAMP),
    "polynomial": (taken(schedules.polynomial), {**RAMP, "power": 2.0}),
    "table": (taken(schedules.table), {"values": [0.1]}),
    "uniform": (drawn(initial.uniform), {"shape": (2,), "low": 0.0, "high": 1.0, **DTYPE}),
    "normal": (drawn(initial.normal), {"shape": (2,), "std": 1.0, "mean": 0.0, **DTYPE}),
    "data": (initial.data, {"examples": EXAMPLES, "labels": LABELS}),
    "class_gaussian": (
        drawn(initial.class_gaussian, torch.zeros_like(LABELS)),
        {"examples": EXAMPLES, "labels": LABELS, "covariance": "full", "jitter": 0.1},
    ),
    "generated": (initial.generated, {"generator_net": torch.nn.Linear(2, 5), "latent": START}),
    "each": (initial.each, {"parts": {"x": START}}),
    "noise.stream": (noise.stream, {"tensor_index": 1, "purpose": 2}),
    "noise.draw_seed": (noise.draw_seed, {"generator": None}),
    "noise.philox4x32": (noise.philox4x32, {"counter": [torch.tensor(1)] * 4, "key": (1, 2), "rounds": 2}),
    "noise.words": (noise.words, {"chains": 2, "blocks": 3, **PLACE}),
    "noise.normal": (noise.normal, {"shape": WHOLE, **PLACE, **DTYPE}),
    "noise.uniform": (noise.uniform, {"shape": WHOLE, **PLACE, **DTYPE}),
    "noise.rounding_fraction": (noise.rounding_fraction, {"shape": WHOLE, **PLACE}),
    "curvature": (diagnostics.curvature, CURVED),
    "largest_stable_step": (diagnostics.largest_stable_step, {**CURVED, "prior_std": 1.0}),
    "mala_acceptance": (
        diagnostics.mala_acceptance,
        {"energy": energy, "state": X, "sampler": Langevin(0.1), "temperature": 1.0, "seed": 1, "generator": None},
    ),
    "rhat": (diagnostics.rhat, {"draws": DRAWS, "method": "rank"}),
    "ess": (diagnostics.ess, {"draws": DRAWS, "method": "bulk"}),
    "autocorrelation": (diagnostics.autocorrelation, {"draws": DRAWS}),
    "autocorrelation_time": (diagnostics.autocorrelation_time, {"draws": DRAWS}),
    "rank_offset": (rank_offset, {"chains": 2}),
    "improved_cd": (stepped(presets.improved_cd), {"steps": 3}),
    "lsd": (stepped(presets.lsd), {"steps": 3}),
    "ncsn": (presets.ncsn, {"sigmas": [1.0, 0.5], "steps_each": 2, "epsilon": 0.1}),
    "levels": (taken(presets.levels), {"sigmas": [1.0, 0.5], "steps_each": 2}),
    "recovery_likelihood": (stepped(presets.recovery_likelihood), {"scale": 0.1, "alpha": 1.0}),
    "ibc": (stepped(presets.ibc), {"low": 0.0, "high": 1.0, "steps": 3}),
    "energy_matching": (stepped(presets.energy_matching), {"epsilon": 0.1}),
    "ired": (stepped(presets.ired), {"step_size": 0.1, "limit": 1.0}),
    "ReplayBuffer": (lambda **o: ReplayBuffer(**o).draw(2), STORED),
    "draw": (BUFFER.draw, {"n": 2, "labels": None}),
    "write": (BUFFER.write, {"handle": BUFFER.draw(CHAINS)[1], "state": X}),
    "states": (BUFFER.states, {"slots": None}),
    "load_state_dict": (BUFFER.load_state_dict, {"state": BUFFER.state_dict()}),
    "Gaussian": (Gaussian, {"mean": 0.0, "std": 1.0}),
    "GaussianMixture": (GaussianMixture, {"means": torch.ones(2, SIZE), "std": 1.0, "weights": None}),
    "GaussianMixture.sample": (GaussianMixture(torch.ones(2, 2)).sample, {"chains": 2, "generator": None}),
    "MLP": (MLP, {"inputs": 3, "hidden": (4,), "activation": "silu"}),
    "Sum": (lambda **o: Sum(at, **o), {"weights": [1.0]}),
}
# what an argument is in the sampler that is made of it, or is compared with
AS = {
    "scale": ("step_size",),
    "epsilon": ("temperature",),
    "low": ("max_update",),
    "high": ("max_update",),
    "limit": ("bounds",),
    "examples": ("labels",),
}
CALLED = ("energy", "init", "transform", "reinit", "scale", "epsilon", "step_size")
# so many of them would take too long, or too much memory
MANY = ("chains", "blocks", "rounds", "iterations", "steps_each", "inputs", "n", "capacity")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_odd_values_of_functions(function: str) -> None:
    """Each odd value for each argument is taken, or refused by name; what is nothing of the kind is refused."""
    call, given = FUNCTIONS[function]
    failed = []
    for name in given:
        for label, make in ODD.items():
            if (name in MANY and label in ("2**32", "2**70", "10**400")) or (name in CALLED and label in CALLABLE):
                continue
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    call(**{**given, name: make()})
            except (TypeError, ValueError) as error:
                if not any(word in str(error) for word in (name, *AS.get(name, ()))) or len(str(error)) > 600:
                    failed.append(f"{name}={label}: {type(error).__name__}: {str(error)[:300]}")
            except Exception as error:
                failed.append(f"{name}={label}: {type(error).__name__}: {str(error)[:300]}")
            else:
                if label in ("str", "object", "ellipsis", "complex", "10**400"):
                    failed.append(f"{name}={label} was taken")
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize(
    ("function", "argument"),
    [
        ("init", {"carried": [1]}),
        ("init", {"carried": torch.ones(3)}),
        ("geometric", {"start": torch.ones(3)}),
        ("polynomial", {"power": 0}),
        ("table", {"values": torch.tensor(1.0)}),
        ("uniform", {"shape": (2, -1)}),
        ("uniform", {"low": 2.0}),
        ("normal", {"std": torch.ones(3)}),
        ("data", {"examples": []}),
        ("data", {"labels": [0, 1, 0]}),
        ("class_gaussian", {"labels": [0, 1, 0]}),
        ("class_gaussian", {"jitter": 1e-300}),
        ("noise.draw_seed", {"generator": 3}),
        ("noise.normal", {"seed": 1.5}),
        ("noise.normal", {"chain_offset": -2.5}),
        ("noise.words", {"chains": -1}),
        ("noise.philox4x32", {"counter": [torch.ones(2).long(), torch.ones(3).long()] * 2}),
        ("curvature", {"energy": lambda x: 1.0}),
        ("curvature", {"energy": lambda x: torch.ones(3)}),
        ("curvature", {"x": torch.ones(3)}),
        ("largest_stable_step", {"prior_std": False}),
        ("largest_stable_step", {"prior_std": 1e200}),
        ("largest_stable_step", {"prior_std": 1e-200}),
        ("improved_cd", {"steps": 0}),
        ("ncsn", {"sigmas": [1, 0]}),
        ("ncsn", {"sigmas": [1e300, 1e-3]}),
        ("ncsn", {"sigmas": []}),
        ("recovery_likelihood", {"scale": 1e308}),
        ("recovery_likelihood", {"alpha": torch.ones(7)}),
        ("ibc", {"low": torch.tensor(True)}),
        ("ibc", {"high": -1.0}),
        ("ReplayBuffer", {"device": "abc"}),
        ("ReplayBuffer", {"dtype": torch.ones(3)}),
        ("states", {"slots": torch.tensor([4])}),
        ("Gaussian", {"std": [1.0, [2.0]]}),
        ("MLP", {"hidden": (0,)}),
    ],
)
def test_bad_values_of_functions(function: str, argument: dict[str, Any]) -> None:
    call, given = FUNCTIONS[function]
    with pytest.raises((TypeError, ValueError), match=re.escape(next(iter(argument)))):
        call(**{**given, **argument})


def test_keywords_of_an_energy_are_names() -> None:
    with pytest.raises(TypeError, match=r"kwargs must have names .* got \[0\]"):
        Langevin(0.1).sample(energy, X, 1, kwargs={0: 1})  # pyright: ignore[reportArgumentType]
