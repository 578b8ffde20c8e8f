"""States in every structure, settings in every form, and wrong input: an error that names it, before any run."""

from __future__ import annotations

import collections
import dataclasses
import inspect
import math
import re
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mmebm.samplers import Langevin, langevin
from mmebm.state import broadcast, flatten, observed_masks, per_key


class Pair(NamedTuple):
    image: Tensor
    text: Tensor


class Scene(dict):  # type: ignore[type-arg]
    """A dict that cannot be made from pairs, with a field of its own."""

    def __init__(self, title: str, **parts: Tensor) -> None:
        super().__init__(**parts)
        self.title = title


class Several(list):  # type: ignore[type-arg]
    pass


A, B, C = torch.zeros(3, 2), torch.ones(3, 4, 5), torch.zeros(4, 8)


@pytest.mark.parametrize(
    ("state", "keys", "kind"),
    [
        (A, (0,), Tensor),
        ([A, B], (0, 1), list),
        ((A, B), (0, 1), tuple),
        (Pair(A, B), (0, 1), Pair),
        ({"image": A, "text": B}, ("image", "text"), dict),
        (collections.OrderedDict(text=B, image=A), ("text", "image"), collections.OrderedDict),
        (collections.defaultdict(list, text=B, image=A), ("text", "image"), collections.defaultdict),
        (Scene("living room", text=B, image=A), ("text", "image"), Scene),
        (collections.UserDict(text=B, image=A), ("text", "image"), collections.UserDict),
        (types.MappingProxyType({"text": B, "image": A}), ("text", "image"), dict),
        (Several([A, B]), (0, 1), Several),
    ],
)
def test_structures_come_back_as_they_were(state: Any, keys: tuple[Any, ...], kind: type) -> None:
    got, tensors, build = flatten(state)
    assert got == keys
    assert all(t is (A if t.dim() == 2 else B) for t in tensors)
    rebuilt = build([t + 1 for t in tensors])
    assert type(rebuilt) is kind
    if isinstance(rebuilt, Mapping):
        assert list(rebuilt) == list(keys)
        assert all(torch.equal(rebuilt[key], state[key] + 1) for key in keys)
    assert getattr(rebuilt, "title", None) == getattr(state, "title", None)
    assert getattr(rebuilt, "default_factory", None) is getattr(state, "default_factory", None)
    seen: list[Any] = []

    def energy(s: Any) -> Tensor:
        seen.append(s)
        parts = [s] if isinstance(s, Tensor) else s.values() if isinstance(s, Mapping) else s
        return sum(t.flatten(1).square().sum(1) for t in parts)  # pyright: ignore

    out = Langevin(0.1).sample(energy, state, 2, thin=1)
    assert {type(s) for s in [*seen, out.state, out.trajectory]} == {kind}
    if kind is Pair:
        assert out.state.image.shape == A.shape and out.state.text.shape == B.shape


@pytest.mark.parametrize(
    "value", [0.5, np.float32(0.5), np.float64(0.5), 1, np.int64(1), torch.tensor(0.5), torch.tensor(1)]
)
def test_numbers_of_every_kind(value: Any) -> None:
    x = torch.ones(2, 3)
    out = langevin(lambda x: x.square().sum(1), x, 1, step_size=value, noise_scale=0.0)
    torch.testing.assert_close(out, x - 2 * float(value))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((), ()),
        ((3,), (3, 1, 1)),  # per chain
        ((5,), (1, 1, 5)),  # per element of the last dimension
        ((4, 5), (1, 4, 5)),
        ((4, 1), (1, 4, 1)),
        ((3, 1, 1), (3, 1, 1)),
        ((3, 4, 5), (3, 4, 5)),
        ((1,), (1, 1, 1)),
    ],
)
def test_settings_broadcast(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    value = torch.rand(shape, dtype=torch.float64)
    got = broadcast("step_size", value, B, torch.float32)
    assert isinstance(got, Tensor)
    assert got.shape == expected and got.dtype == torch.float32
    torch.testing.assert_close(got.flatten(), value.float().flatten())


def test_a_setting_of_as_many_values_as_chains_is_per_chain() -> None:
    square = torch.ones(3, 3)
    out = langevin(lambda x: x.sum(1), square, 1, step_size=torch.tensor([1.0, 2.0, 3.0]), noise_scale=0.0)
    assert torch.equal(out, torch.tensor([[0.0] * 3, [-1.0] * 3, [-2.0] * 3]))


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 4), (2, 3, 4, 5), (3, 5)])
def test_settings_that_do_not_broadcast(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"step_size of shape .* does not broadcast against the state's \(3, 4, 5\)"):
        broadcast("step_size", torch.ones(shape), B, torch.float32)


def test_per_key() -> None:
    assert per_key("a", 1.0, ("x", "y"), required=True) == [1.0, 1.0]
    assert per_key("a", {"y": 2.0, "x": 1.0}, ("x", "y"), required=True) == [1.0, 2.0]
    assert per_key("a", {"y": 2.0}, ("x", "y"), required=False) == [None, 2.0]
    assert per_key("a", {1: 2.0}, (0, 1), required=False) == [None, 2.0]


@pytest.mark.parametrize(
    "observed", [{"b"}, ["b"], ("b",), frozenset("b"), {"b": True}, {"b": True, "a": False}, {"b": 0}.keys()]
)
def test_observed_by_name(observed: Any) -> None:
    assert observed_masks(observed, ("a", "b"), [A, B]) == [False, True]


@pytest.mark.parametrize("shape", [(3,), (4, 5), (3, 1, 1), (3, 4, 5), ()])
def test_observed_by_mask(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) < 0.5
    got = observed_masks({"b": mask}, ("a", "b"), [A, B])
    assert got[0] is False and isinstance(got[1], Tensor)
    full = mask[:, None, None] if shape == (3,) else mask
    assert torch.equal(got[1], full.expand(3, 4, 5))


def test_a_1d_mask_never_changes_its_meaning_with_the_number_of_chains() -> None:
    """Chains or elements, by its length; where it could be either, an error says how to write both."""
    mask = torch.tensor([True, False, True])
    for chains in (2, 4, 5):
        (got,) = observed_masks(mask, (0,), [torch.zeros(chains, 3)])
        assert torch.equal(got, mask.expand(chains, 3))  # type: ignore[arg-type]
    for elements in (2, 4, 5):
        (got,) = observed_masks(mask, (0,), [torch.zeros(3, elements)])
        assert torch.equal(got, mask[:, None].expand(3, elements))  # type: ignore[arg-type]
    for shape, chains in (((3, 3), "mask[:, None]"), ((3, 5, 3), "mask[:, None, None]")):
        state = torch.zeros(shape)
        with pytest.raises(ValueError, match=re.escape(f"write {chains} for chains, mask[None] for elements")):
            observed_masks(mask, (0,), [state])
        (rows,) = observed_masks(eval(chains), (0,), [state])
        (columns,) = observed_masks(mask[None], (0,), [state])
        assert bool(rows[0].all()) and not bool(rows[1].any())  # type: ignore[index]
        assert bool(columns[..., 0].all()) and not bool(columns[..., 1].any())  # type: ignore[index]
    for state in (torch.zeros(3), torch.zeros(1, 1)):  # both mean the same
        (got,) = observed_masks(mask[: len(state)], (0,), [state])
        assert torch.equal(got.flatten(), mask[: len(state)])  # type: ignore[union-attr]


# ---------------------------------------------------------------------------------------------------------------------
# Errors. Every case names its argument and its value, and none reaches the energy.
# ---------------------------------------------------------------------------------------------------------------------


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.zeros(2, 3)


def nested(layout: torch.layout) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(1, 3)], layout=layout)


STATES = [
    ("abc", TypeError, "state must be a tensor, or a list, tuple or dict of tensors, got str"),
    (None, TypeError, "state must be a tensor, .* got NoneType"),
    (np.zeros((2, 3)), TypeError, "state must be a tensor, .* got ndarray"),
    ([], ValueError, "state must hold at least one tensor"),
    ({}, ValueError, "state must hold at least one tensor"),
    ([A, [B]], TypeError, r"state\[1\] must be a tensor, got list"),
    ({"a": 1.0}, TypeError, r"state\['a'\] must be a tensor, got float"),
    (torch.zeros(2, 3, dtype=torch.long), TypeError, r"state\[0\] must be a dense floating-point .* torch.int64"),
    (torch.zeros(2, 3, dtype=torch.cfloat), TypeError, "got torch.complex64"),
    (torch.zeros(2, 3).to_sparse(), TypeError, "got torch.float32, torch.sparse_coo"),
    (torch.zeros(()), ValueError, r"state\[0\] must have a leading chain dimension"),
    ({"a": A, "b": torch.zeros(4, 2)}, ValueError, r"state\['b'\] has 4 chains but state\['a'\] has 3"),
    (torch.zeros(2, 3, device="meta"), TypeError, r"state\[0\] must hold numbers, got a meta tensor"),
    ({"a": fake()}, TypeError, r"state\['a'\] must hold numbers, got a FakeTensor"),
    (torch.zeros(2, 3).to(torch.float8_e4m3fn), TypeError, r"of 16, 32 or 64 bits, got torch.float8_e4m3fn"),
    (nested(torch.strided), TypeError, r"state\[0\] must be a dense tensor, got a nested one; pad it"),
    (nested(torch.jagged), TypeError, r"state\[0\] must be a dense tensor, got a nested one; pad it"),
    ([A, A.to("meta")], ValueError, r"state\[1\] is on meta but state\[0\] is on cpu"),
]

SAMPLERS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"step_size": None}, TypeError, "step_size must be a number, .* got None"),
    ({"step_size": {"a": None}}, TypeError, r"step_size must be a number, .* got \{'a': None\}"),
    ({"step_size": "0.1"}, TypeError, "step_size must be a number, .* got '0.1'"),
    ({"step_size": True}, TypeError, "step_size must be a number, .* got True"),
    ({"step_size": [0.1, 0.2]}, TypeError, r"step_size must be a number, .* got \[0.1, 0.2\]"),
    ({"step_size": np.array([0.1])}, TypeError, "step_size must be a number"),
    ({"step_size": 1j}, TypeError, "step_size must be a number, .* got 1j"),
    ({"step_size": torch.tensor([True])}, TypeError, "step_size must hold real numbers, got a tensor of torch.bool"),
    ({"step_size": -0.1}, ValueError, "step_size must be finite and at least 0, got -0.1"),
    ({"step_size": math.inf}, ValueError, "step_size must be finite and at least 0, got inf"),
    ({"step_size": torch.tensor([0.1, -0.1])}, ValueError, r"step_size must be finite and at least 0, got tensor\("),
    ({"step_size": {"a": math.nan}}, ValueError, r"step_size\['a'\] must be finite and at least 0, got nan"),
    ({"noise_scale": -1}, ValueError, "noise_scale must be finite and at least 0, got -1"),
    ({"noise_scale": 0.1, "temperature": 2.0}, ValueError, "give noise_scale or temperature, not both"),
    ({"temperature": None}, TypeError, "temperature must be a number"),
    ({"temperature": -1.0}, ValueError, "temperature must be finite and at least 0, got -1.0"),
    ({"grad_clip": -0.01}, ValueError, "grad_clip must be finite and at least 0, got -0.01"),
    ({"grad_norm_clip": 0}, ValueError, "grad_norm_clip must be finite and above 0, got 0"),
    ({"max_update": {"a": "1"}}, TypeError, r"max_update\['a'\] must be a number"),
    ({"prior_std": 0.0}, ValueError, "prior_std must be finite and above 0, got 0.0"),
    ({"bounds": 1.0}, ValueError, r"bounds must be \(low, high\), .* got 1.0"),
    ({"bounds": (0, 1, 2)}, ValueError, r"bounds must be \(low, high\), .* got \(0, 1, 2\)"),
    ({"bounds": (1.0, 0.0)}, ValueError, r"bounds must have low <= high, got \(1.0, 0.0\)"),
    ({"bounds": {"a": (0.0, math.nan)}}, ValueError, r"bounds\['a'\] must be no NaN, got nan"),
    ({"bounds": ("0", 1)}, TypeError, "bounds must be a number"),
    ({"noise_at": "first"}, ValueError, r"noise_at must be one of \['after', 'before'\], got 'first'"),
    ({"norm_over": "batch"}, ValueError, "norm_over must be one of .* got 'batch'"),
    ({"bounds_at": "never"}, ValueError, "bounds_at must be one of .* got 'never'"),
    ({"outside": "wrap"}, ValueError, "outside must be one of .* got 'wrap'"),
    ({"accept": "mala"}, ValueError, "accept must be one of .* got 'mala'"),
    ({"mode": "test"}, ValueError, "mode must be one of .* got 'test'"),
    ({"rng": "numpy"}, ValueError, "rng must be one of .* got 'numpy'"),
    ({"on_nonfinite": "stop"}, ValueError, "on_nonfinite must be one of .* got 'stop'"),
    ({"log_prob": True, "score": True}, ValueError, "give log_prob=True or score=True, not both"),
    ({"clamp_noise": True}, ValueError, "clamp_noise=True needs bounds"),
    ({"clamp_noise": True, "bounds": (0, 1)}, ValueError, 'clamp_noise=True needs .* noise_at="before"'),
    ({"outside": "reject"}, ValueError, 'outside="reject" needs bounds'),
    ({"outside": "reject", "bounds": (0, 1), "bounds_at": "end"}, ValueError, 'outside="reject" needs bounds at every'),
    ({"outside": "reject", "bounds": (0, 1), "noise_at": "before"}, ValueError, '"reject" needs .* noise_at="after"'),
    ({"accept": "descent", "score": True}, ValueError, "accept='descent' needs an energy"),
    ({"accept": "descent", "noise_at": "before"}, ValueError, "accept='descent' needs .* noise_at=\"after\""),
    ({"project": 3}, TypeError, "project must be a function of a tensor, .* got 3"),
    ({"project": {"a": "sphere"}}, TypeError, r"project\['a'\] must be a function of a tensor"),
]

TWO = {"a": A, "b": B}
CALLS: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (A, {"steps": -1}, ValueError, "steps must be an int of at least 0, got -1"),
    (A, {"steps": 2.0}, TypeError, "steps must be an int of at least 0, got 2.0"),
    (A, {"steps": True}, TypeError, "steps must be an int of at least 0, got True"),
    (A, {"steps": "2"}, TypeError, "steps must be an int of at least 0, got '2'"),
    (A, {"thin": 0}, ValueError, "thin must be an int of at least 1, got 0"),
    (A, {"thin": 1.5}, TypeError, "thin must be an int of at least 1, got 1.5"),
    (A, {"chunk_size": 0}, ValueError, "chunk_size must be an int of at least 1, got 0"),
    (A, {"chain_offset": -1}, ValueError, "chain_offset must be an int of at least 0 .* got -1"),
    (A, {"chain_offset": 2**32 - 2}, ValueError, "chain_offset must be .* below 4294967294, got 4294967294"),
    (A, {"first_step": -1}, ValueError, "first_step must be an int of at least 0 .* got -1"),
    (A, {"first_step": 2**32}, ValueError, "first_step must be .* got 4294967296"),
    (A, {"first_step": 1.0}, TypeError, "first_step must be an int .* got 1.0"),
    (A, {"first_step": torch.tensor([1, 2])}, TypeError, "first_step must be an int or a 1-element integer tensor"),
    (A, {"first_step": torch.tensor(1, device="meta")}, ValueError, "first_step is on meta but the state is on cpu"),
    (A, {"seed": 1.5}, TypeError, "seed must be an int .* got 1.5"),
    (A, {"seed": 2**64}, ValueError, "seed must be an int .* got 18446744073709551616"),
    (A, {"seed": torch.tensor(0.5)}, TypeError, "seed must be an int or a 1-element integer tensor"),
    (A, {"seed": torch.tensor(1), "sampler": {"rng": "torch"}}, TypeError, 'seed must be an int with rng="torch"'),
    (A, {"seed": 1, "generator": torch.Generator()}, ValueError, "give seed or generator, not both"),
    (A, {"generator": 3}, TypeError, "generator must be a torch.Generator, got int"),
    (A, {"args": A}, TypeError, "args must be a list or tuple of further arguments, got Tensor"),
    (A, {"record": "energy"}, ValueError, "record must be a collection of .* got 'energy'"),
    (A, {"record": ("energie",)}, ValueError, r"record must be a collection of .* got \('energie',\)"),
    (A, {"record": 3}, ValueError, "record must be a collection of .* got 3"),
    (A, {"record": ("energy",), "sampler": {"score": True}}, ValueError, 'record="energy" needs an energy'),
    (A, {"differentiable": -1}, ValueError, "differentiable must be an int of at least 0, got -1"),
    (A, {"differentiable": "last"}, TypeError, "differentiable must be an int of at least 0, got 'last'"),
    (A, {"differentiable": 1, "inplace": True}, ValueError, "differentiable goes without inplace .* got 1"),
    (A, {"differentiable": True, "chunk_size": 1}, ValueError, "differentiable goes without inplace and chunk_size"),
    (A, {"chain_offset": 1, "sampler": {"rng": "torch"}}, ValueError, 'chain_offset and chunk_size need rng="philox"'),
    (A, {"chunk_size": 1, "sampler": {"norm_over": "tensor", "grad_norm_clip": 1.0}}, ValueError, 'norm_over="tensor"'),
    (torch.zeros(1, 2).expand(3, 2), {"inplace": True}, ValueError, r"inplace needs memory .* state\[0\]"),
    (torch.zeros(4, 6).unfold(1, 4, 2), {"inplace": True}, ValueError, r"memory .* state\[0\], .* elements overlap"),
    (torch.zeros(9).as_strided((3, 4), (2, 1)), {"inplace": True}, ValueError, r"state\[0\], .* elements overlap"),
    ([A, A], {"inplace": True}, ValueError, r"tensors apart: state\[1\] shares memory with another"),
    ([A, A], {"inplace": True, "observed": [1]}, ValueError, r"tensors apart: state\[1\] shares memory"),
    ([C[:, :5], C[:, 4:]], {"inplace": True}, ValueError, r"tensors apart: state\[1\] shares memory"),
    ([C, C.view(torch.float64)], {"inplace": True}, ValueError, r"tensors apart: state\[1\] shares memory"),
    (TWO, {"observed": {"c"}}, ValueError, r"observed names \['c'\] but the state has \['a', 'b'\]"),
    (TWO, {"observed": "a"}, TypeError, "observed must be a collection of keys, a mapping or a mask, got 'a'"),
    ([A, B], {"observed": 1}, TypeError, "observed must be a collection of keys, a mapping or a mask, got 1"),
    ([A, B], {"observed": [True, False]}, TypeError, r"observed must be a collection of keys, .* got \[True, False\]"),
    ([A, B], {"observed": np.array([0])}, TypeError, "observed must be a collection of keys"),
    (TWO, {"observed": A > 0}, ValueError, r"observed is one mask but the state has \['a', 'b'\]"),
    (TWO, {"observed": {"a": A}}, TypeError, r"observed\['a'\] must be a boolean mask or True"),
    (TWO, {"observed": {"a": B > 0}}, ValueError, r"observed\['a'\] of shape \(3, 4, 5\) does not broadcast"),
    (TWO, {"blocks": ["a"]}, ValueError, r"blocks must hold each of \['a', 'b'\] exactly once, got \[\['a'\]\]"),
    (TWO, {"blocks": [["a", "b"], ["a"]]}, ValueError, "blocks must hold each of .* exactly once"),
    ([A, B], {"blocks": ["0", "1"]}, ValueError, "blocks must hold each of .* exactly once"),
    (TWO, {"blocks": "ab"}, TypeError, "blocks must be a list of keys or of collections of keys, got 'ab'"),
    (TWO, {"sampler": {"step_size": {"a": 0.1}}}, ValueError, r"step_size has no value for \['b'\]"),
    (TWO, {"sampler": {"step_size": {"a": 0.1, "B": 0.1}}}, ValueError, r"step_size names \['B'\] but the state has"),
    ([A, B], {"sampler": {"grad_clip": {2: 0.1}}}, ValueError, r"grad_clip names \[2\] but the state has \[0, 1\]"),
    (TWO, {"sampler": {"bounds": {"c": (0, 1)}}}, ValueError, r"bounds names \['c'\]"),
    (TWO, {"sampler": {"project": {"c": abs}}}, ValueError, r"project names \['c'\]"),
    (TWO, {"sampler": {"prior_std": {"b": torch.ones(7)}}}, ValueError, r"prior_std\['b'\] of shape \(7,\) does not"),
    (A, {"sampler": {"bounds": (torch.zeros(7), 1)}}, ValueError, r"bounds of shape \(7,\) does not broadcast"),
    (A, {"sampler": {"bounds": (torch.tensor([0.0, 2.0]), 1.0)}}, ValueError, "bounds must have low <= high"),
    (A, {"sampler": {"grad_norm_clip": torch.ones(3, 2)}}, ValueError, r"grad_norm_clip limits .* got \(3, 2\)"),
    (A, {"sampler": {"grad_norm_clip": torch.ones(3), "norm_over": "tensor"}}, ValueError, "grad_norm_clip limits a"),
    (A, {"sampler": {"backend": "gpu"}}, ValueError, "backend must be one of .* got backend=.gpu."),
]


def never(*args: Any, **kwargs: Any) -> Tensor:
    raise AssertionError("the energy was called")


@pytest.mark.parametrize(("state", "error", "message"), STATES)
def test_bad_states(state: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        langevin(never, state, 2, step_size=0.1)


@pytest.mark.parametrize(("options", "error", "message"), SAMPLERS)
def test_bad_samplers(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Langevin(**{"step_size": 0.1, **options})


@pytest.mark.parametrize(("state", "call", "error", "message"), CALLS)
def test_bad_calls(state: Any, call: dict[str, Any], error: type[Exception], message: str) -> None:
    call = dict(call)
    sampler = Langevin(**{"step_size": 0.1, **call.pop("sampler", {})})
    with pytest.raises(error, match=message):
        sampler.sample(never, state, call.pop("steps", 2), **call)


@pytest.mark.parametrize(
    ("energy", "error", "message"),
    [
        (lambda x: 1.0, TypeError, "energy must return a tensor, got float"),
        (lambda x: (x.sum(1), None), TypeError, "energy must return a tensor, got tuple"),
        (lambda x: x.sum(1).to_sparse(), TypeError, "energy must return a dense tensor, got one of torch.sparse_coo"),
        (lambda x: x.sum(0), ValueError, r"a scalar or one value per chain \(3, \.\.\.\), got shape \(2,\)"),
        (lambda x: x.sum().reshape(1), ValueError, r"one value per chain \(3, \.\.\.\), got shape \(1,\)"),
    ],
)
def test_bad_energies(energy: Callable[..., Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        langevin(energy, A, 2, step_size=0.1)


@pytest.mark.parametrize(
    ("state", "score", "error", "message"),
    [
        (A, lambda x: x.sum(1), ValueError, r"the state's shapes \{0: \(3, 2\)\}, got \{0: \(3,\)\}"),
        (A, lambda x: None, TypeError, "the score must be tensors in the state's structure"),
        (TWO, lambda s: {"a": s["a"]}, ValueError, "the score must have the state's shapes"),
        (TWO, lambda s: [s["a"], s["b"]], ValueError, "the score must have the state's shapes"),
        ([A, B], lambda s: s[0], ValueError, "the score must have the state's shapes"),
    ],
)
def test_bad_scores(state: Any, score: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        langevin(score, state, 2, step_size=0.1, score=True)


def test_descent_needs_an_energy_for_each_chain() -> None:
    with pytest.raises(ValueError, match='accept="descent" needs one energy per chain; the energy returned a scalar'):
        langevin(lambda x: x.square().sum(), A + 1, 2, step_size=0.1, accept="descent")


def test_the_function_has_the_options_of_the_class_and_of_sample() -> None:
    """With their defaults, each written out for editors and type checkers."""
    mine = dict(inspect.signature(langevin).parameters)
    wanted = {f.name: f.default for f in dataclasses.fields(Langevin)}
    more = inspect.signature(Langevin.sample).parameters
    wanted |= {name: p.default for name, p in more.items() if name not in ("self", "energy", "state", "steps")}
    wanted = {name: value for name, value in wanted.items() if name not in ("record", "thin", "offload")}
    assert list(mine)[:3] == ["energy", "state", "steps"] and set(mine) - {"energy", "state", "steps"} == set(wanted)
    for name, value in wanted.items():
        expected = inspect.Parameter.empty if value is dataclasses.MISSING else value
        assert mine[name].default == expected and mine[name].kind is inspect.Parameter.KEYWORD_ONLY, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "required keyword-only argument: 'step_size'"),
        ({"step_size": 0.1, "stepsize": 0.1}, "unexpected keyword argument 'stepsize'"),
        ({"step_size": 0.1, "record": ("energy",)}, "unexpected keyword argument 'record'"),
    ],
)
def test_bad_options_of_the_function(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        langevin(never, A, 2, **options)
    with pytest.raises(TypeError, match="energy must be callable, got Tensor"):
        langevin(A, A, 2, step_size=0.1)  # pyright: ignore


@pytest.mark.parametrize(
    "views",
    [
        lambda t: t.T,
        lambda t: t[:, ::2],
        lambda t: t.flip(0)[1:],
        lambda t: [t[:, :4], t[:, 4:]],
        lambda t: [t[:, ::2], t[:, 1::2]],
        lambda t: [t[:, :4].to(torch.float64), t[:, 4:]],
        lambda t: [t[:, :4].view(torch.float64), t[:, 4:]],
        lambda t: [t[:2], t[2:]],
        lambda t: [t, torch.zeros(4, 0)],
        lambda t: t.as_strided((3, 2), (9, 3)),
    ],
)
def test_views_that_lie_apart_are_written_in_place(views: Callable[[Tensor], Any]) -> None:
    state = views(torch.randn(4, 8))
    energy = lambda s: sum(t.square().sum(1) for t in (s if isinstance(s, list) else [s]))
    wanted = langevin(energy, state, 2, step_size=0.1, seed=0)
    got = langevin(energy, state, 2, step_size=0.1, seed=0, inplace=True)
    pairs = zip(got, state, wanted, strict=True) if isinstance(state, list) else [(got, state, wanted)]
    assert all(a is b and torch.equal(a, c) for a, b, c in pairs)


def test_inference_tensors_cannot_be_written_outside() -> None:
    with torch.inference_mode():
        x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"inplace cannot write state\[0\] outside inference mode"):
        langevin(never, x, 2, step_size=0.1, inplace=True)
    assert langevin(lambda x: x.square().sum(1), x, 2, step_size=0.1).shape == (2, 3)


def test_from_sgld_checks_its_scale() -> None:
    with pytest.raises(TypeError, match=r"scale must be a number, .* got 'a'"):
        Langevin.from_sgld("a")
    with pytest.raises(ValueError, match=r"scale must be finite and at least 0, got -1\.0"):
        Langevin.from_sgld(-1.0)
