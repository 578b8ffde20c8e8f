"""Odd values for every argument: taken, or refused by a TypeError, a ValueError or a BackendError that names it."""

from __future__ import annotations

import dataclasses
import inspect
import math
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

from mmebm import HMC, BackendError, Langevin, ParallelTempering, Underdamped

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
SLOW = {("steps", "2**32"), ("steps", "2**70"), ("leapfrog_steps", "2**32"), ("leapfrog_steps", "2**70")}


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
