"""The door to native code: what it takes, what it refuses by name, and that nothing goes round it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import mmebm
from mmebm import native
from mmebm.ops.common.params import StepParams
from mmebm.ops.langevin_mlp import langevin_mlp
from mmebm.ops.langevin_step import CppStepper, StepOptions, langevin_step
from mmebm.ops.langevin_step.cpp import cpp_reason
from mmebm.ops.mlp_energy import mlp_energy
from mmebm.ops.residual import residual_and_gradient
from mmebm.ops.terms import Scalar, Stack

PACKAGE = Path(mmebm.__file__).parent

# What goes through the door, and what feeds it: a number of the wrong dtype or device here is one in a kernel.
GUARDED = ("ops", "reference", "samplers", "energies", "diagnostics", "noise.py", "native.py", "state.py", "presets.py")
# These take torch's default dtype or device where they are not told.
FACTORIES = frozenset(
    (
        "arange",
        "as_tensor",
        "asarray",
        "empty",
        "empty_permuted",
        "empty_strided",
        "eye",
        "full",
        "linspace",
        "logspace",
        "normal",
        "ones",
        "rand",
        "randint",
        "randn",
        "randperm",
        "range",
        "scalar_tensor",
        "tensor",
        "zeros",
    )
)


def _guarded() -> list[Path]:
    files: list[Path] = []
    for name in GUARDED:
        path = PACKAGE / name
        files += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    assert len(files) > 20
    return files


def _loose(tree: ast.AST) -> list[str]:
    """Factory calls of torch without dtype= and device=, as "line: call"; ``**`` may hold both."""
    out = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if (
            not isinstance(node.func.value, ast.Name)
            or node.func.value.id != "torch"
            or node.func.attr not in FACTORIES
        ):
            continue
        given = {keyword.arg for keyword in node.keywords}
        if None not in given and not {"dtype", "device"} <= given:
            out.append(f"{node.lineno}: {ast.unparse(node)}")
    return out


def _addresses(tree: ast.AST) -> list[str]:
    return [f"{node.lineno}" for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "data_ptr"]


def test_every_factory_call_names_dtype_and_device() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{call}" for path in _guarded() for call in _loose(ast.parse(path.read_text()))
    ]
    assert not found, "\n".join(found)


def test_addresses_are_made_at_the_door_alone() -> None:
    # the others tell tensors apart by where their memory lies, and hand no address on
    names = ("ops/common/address.py", "samplers/capture/key.py", "samplers/langevin_steps.py", "state.py")
    names += ("samplers/gradient.py", "samplers/kept_nets.py", "samplers/user_modules.py", "energies/trace/__init__.py")
    allowed = {PACKAGE / name for name in names}
    found = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in _guarded()
        if path not in allowed
        for line in _addresses(ast.parse(path.read_text()))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("call", ["torch.zeros(3)", "torch.full((), 2.0, device=d)", "torch.tensor([1], dtype=t)"])
def test_the_rule_sees(call: str) -> None:
    assert _loose(ast.parse(call)) == [f"1: {call}"]
    assert _addresses(ast.parse("f(x.data_ptr())")) == ["1"]
    assert not _loose(ast.parse("torch.zeros(3, dtype=t, device=d), x.new_zeros(3), torch.zeros_like(x)"))


# -- torch's defaults: the results are those of any other process, bit for bit. In processes of their own, as what went
# wrong here were crashes.

PRELUDE = """
import sys
import torch
import mmebm
from mmebm import HMC, MALA, Langevin, ParallelTempering, ReplayBuffer, Underdamped, native, noise
from mmebm.ops.langevin_mlp import langevin_mlp
from mmebm.ops.langevin_step import langevin_step
from mmebm.ops.mlp_energy import mlp_energy
from mmebm.ops.residual import residual_and_gradient
from mmebm.ops.terms import Quadratic, Residual, Scalar, Stack

g = torch.Generator().manual_seed(3)
normal = lambda *shape: torch.randn(shape, generator=g)
x, big = normal(6, 5), normal(4000, 5)
stack = Stack.mlp((normal(9, 5), normal(1, 9)), (normal(9), None))
decoder = Stack.mlp((normal(9, 5), normal(4, 9)), (normal(9), normal(4)))
residual = Residual(decoder, normal(6, 4), 0.5, observed=normal(6, 4) > 0)
terms = [Scalar(stack), residual, Quadratic(normal(5), normal(5).abs())]
net = torch.nn.Sequential(torch.nn.Linear(5, 9), torch.nn.SiLU(), torch.nn.Linear(9, 1))
for parameter, value in zip(net.parameters(), (normal(9, 5), normal(9), normal(1, 9), normal(1))):
    parameter.data = value
classes = torch.tensor([0, 1, 2, 0, 1, 4])
rows = torch.linspace(0.01, 0.02, 6)[:, None]
cos = lambda x: x.cos().sum(1)
RECORD = ("energy", "grad_norm", "displacement", "clipped", "nonfinite")


def results():
    out = []
    for backend in ("auto", "torch"):
        add = lambda *tensors: out.extend(tensors)
        add(*langevin_step([x, x.bfloat16()], [x, x.half()], step_size=0.1, noise_scale=rows, seed=7, backend=backend,
                           observed=[x > 0, None], grad_norm_clip=1.0, low=-1.0))
        add(*langevin_step([x], None, step_size=0.1, noise_scale=0.1, seed=7, noise_at="before", backend=backend))
        add(*langevin_mlp([x], terms, steps=3, step_size=rows, noise_scale=0.1, prior_std=2.0, seed=7, freeze=True,
                          backend=backend)[1:])
        add(*mlp_energy(x, terms, backend=backend))
        value, grads = residual_and_gradient([x, x.half(), x], [x + 1, x, classes], scale=[rows[:, 0], 0.5, 1.0],
                                             likelihood=["gaussian", "laplace", "categorical"], backend=backend)
        add(value, *grads)
        for options in ({}, {"noise_at": "before", "bounds": (-2.0, 2.0)}, {"accept": "metropolis"}, {"mode": "keep"}):
            for size in (0.01, rows):
                s = Langevin(size, backend=backend, **options)
                for energy, state in ((cos, x), (net, x), *([(cos, big)] if size is not rows else [])):
                    run = s.sample(lambda x: energy(x).reshape(-1), state, 3, seed=1, thin=2,
                                   record=("energy", "accepted") if s.accept else RECORD)
                    add(run.state, run.trajectory, *run.trace.values(), run.info["nonfinite"])
                    add(s.sample(energy, state, 2, seed=1, first_step=5).state)
    for s in (MALA(0.05), HMC(0.1, 3), Underdamped(0.1, 1.0), ParallelTempering([0.1, 0.2], [1.0, 2.0])):
        run = s.sample(cos, x, 4, seed=1)
        out += [run.state, *run.trace.values(), run.info["nonfinite"]]
    out.append(native.normal_(torch.zeros(4, 7, dtype=torch.float32, device="cpu"), seed=5))
    out.append(noise.normal((4, 7), seed=5, device="cpu"))
    torch.manual_seed(11)
    out += [torch.tensor(noise.draw_seed(), device="cpu")]
    return [t.clone() for t in out]


def same(expected, found):
    assert len(expected) == len(found)
    for i, (a, b) in enumerate(zip(expected, found)):
        assert a.dtype == b.dtype and a.device == b.device and a.shape == b.shape, (i, a.dtype, b.dtype, b.device)
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), (i, a, b)


expected = results()
"""
# one process for each kind: it takes seconds to start
DEFAULTS = {
    "dtype": """
for dtype in (torch.bfloat16, torch.float16, torch.float64):
    torch.set_default_dtype(dtype)
    print(dtype, file=sys.stderr)
    same(expected, results())
""",
    "device": """
with torch.device("meta"):
    found = results()
same(expected, found)
torch.set_default_device("meta")
same(expected, results())
""",
    "mode": """
with torch.inference_mode():
    found = results()
same(expected, found)
with torch.no_grad():
    found = results()
same(expected, found)
torch.use_deterministic_algorithms(True)
same(expected, results())
""",
}


def _process(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("name", DEFAULTS)
def test_results_do_not_depend_on_torch_s_defaults(name: str) -> None:
    _process(PRELUDE + DEFAULTS[name])


# -- tensors that are no plain memory


class Subclass(Tensor):
    """One that says nothing about its memory."""


class Wrapper(Tensor):
    """One whose memory is not its value, and never asked for."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{func} of a Wrapper")


def _short(t: Tensor, left: int) -> Tensor:
    t = torch.cat([t.flatten(), t.flatten()])[t.numel() :].view(t.shape)
    t.untyped_storage().resize_(left)
    return t


FAKE = FakeTensorMode()
ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "meta": lambda t: t.to("meta"),
    "fake": FAKE.from_tensor,
    "sparse": lambda t: t.to_sparse(),
    "no storage": lambda t: _short(t, 0),
    "half a storage": lambda t: _short(t, t.nbytes),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "mkldnn": lambda t: t.to_mkldnn(),
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
}
# Memory in another order, or with a sign to come: the result is that of the plain tensor.
SOUND: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.t().contiguous().t(),
    "negative bit": lambda t: torch._neg_view(-t),
    "part": lambda t: torch.stack([t, t], dim=-1)[..., 1],
    "offset": lambda t: torch.cat([t, t])[len(t) :],
    "subclass": lambda t: t.as_subclass(Subclass),
    "functional": torch._to_functional_tensor,
}


def _calls() -> dict[str, tuple[Tensor, Callable[..., Any]]]:
    """By the argument that is replaced: a plain value, and a call of a value and a backend."""
    g = torch.Generator().manual_seed(1)
    x, w, w2 = (torch.randn(shape, generator=g) for shape in ((6, 5), (9, 5), (1, 9)))
    rows = torch.linspace(0.1, 0.2, 6)[:, None]

    def terms(w: Tensor) -> list[Any]:
        return [Scalar(Stack.mlp((w, w2), (None, None)))]

    def step(x: Any, grad: Any, size: Any, backend: str) -> Tensor:
        return langevin_step([x], [grad], step_size=size, noise_scale=0.1, seed=3, backend=backend)[0]

    def chain(x: Any, w: Any, size: Any, backend: str) -> Tensor:
        out = langevin_mlp([x], terms(w), steps=2, step_size=size, noise_scale=0.1, seed=3, backend=backend)
        return out.x[0]

    def likelihood(y: Any, target: Any, scale: Any, backend: str) -> Tensor:
        return residual_and_gradient([y], [target], scale=scale, backend=backend)[1][0]

    return {
        "langevin_step x": (x, lambda t, b: step(t, x, 0.1, b)),
        "langevin_step grad": (x, lambda t, b: step(x, t, 0.1, b)),
        "langevin_step step_size": (rows, lambda t, b: step(x, x, t, b)),
        "langevin_mlp x": (x, lambda t, b: chain(t, w, 0.1, b)),
        "langevin_mlp terms": (w, lambda t, b: chain(x, t, 0.1, b)),
        "langevin_mlp step_size": (rows, lambda t, b: chain(x, w, t, b)),
        "mlp_energy x": (x, lambda t, b: mlp_energy(t, terms(w), backend=b)[1]),
        "mlp_energy terms": (w, lambda t, b: mlp_energy(x, terms(t), backend=b)[1]),
        "residual predictions": (x, lambda t, b: likelihood(t, x.flip(0), 1.0, b)),
        "residual targets": (x, lambda t, b: likelihood(x.flip(0), t, 1.0, b)),
        "residual scale": (rows, lambda t, b: likelihood(x, x.flip(0), t, b)),
        "normal_ out": (torch.zeros(6, 5), lambda t, b: native.normal_(t, seed=3)),
    }


CALLS = _calls()


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_memory_is_refused_by_name(name: str, kind: str) -> None:
    plain, call = CALLS[name]
    for backend in ("auto", "cpp"):
        # one that holds no data among others that do: named may be either side
        with pytest.raises((TypeError, ValueError), match=r"^(a tensor of terms|[a-z_]+)\[0\] |^(out|x|terms\[0\]) "):
            call(ODD[kind](plain.clone()), backend)


@pytest.mark.parametrize("kind", SOUND)
@pytest.mark.parametrize("name", [name for name in CALLS if name != "normal_ out"])
def test_memory_in_another_order_is_read_right(name: str, kind: str) -> None:
    plain, call = CALLS[name]
    expected = call(plain.clone(), "cpp")
    try:
        found = call(SOUND[kind](plain.clone()), "auto")
    except mmebm.BackendError:
        pytest.fail("auto refused")
    if isinstance(found, Subclass):  # by the reference, which keeps the class
        torch.testing.assert_close(found.as_subclass(Tensor), expected, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(found, expected)


def cosines(x: Tensor) -> Tensor:
    return x.cos().flatten(1).sum(1)


@pytest.mark.parametrize("kind", ODD)
def test_a_sampler_names_its_state(kind: str) -> None:
    with pytest.raises(TypeError, match=r"state\[0\]"):
        mmebm.langevin(cosines, ODD[kind](torch.zeros(6, 5)), steps=2, step_size=0.1)


def test_a_sampler_inside_fake_mode() -> None:
    x = torch.zeros(6, 5)
    with FakeTensorMode(), pytest.raises(TypeError, match=r"state\[0\] must hold numbers, got .* FakeTensorMode"):
        mmebm.langevin(cosines, x, steps=2, step_size=0.1)


def test_more_chains_than_the_noise_tells_apart() -> None:
    for shape in ((2**33, 1), (2**40, 0)):
        with pytest.raises(ValueError, match=r"state\[0\] must have at most 2\^32 chains"):
            mmebm.langevin(cosines, torch.zeros(1, shape[1]).expand(shape), steps=2, step_size=0.1)
    options = StepOptions(seed=0, streams=(0,), noisy=(True,))
    reason = cpp_reason([torch.zeros(1, 0).expand(2**33, 0)], options)
    assert reason is not None and "2^32" in reason
    reason = cpp_reason([torch.zeros(1, 1).expand(1, 2**34)], options)
    assert reason is not None and "2^33" in reason


def test_a_gradient_whose_memory_shrank_is_refused() -> None:
    """The look at every step, where a stepper has seen plain gradients before."""
    x, options = torch.zeros(6, 5), StepOptions(seed=0, streams=(0,), noisy=(True,))
    stepper, params = CppStepper(options, [x]), [StepParams(0.1, 0.1)]
    run = lambda grad: stepper.step([x], [grad], params, 0, with_noise=True, stats=False)
    run(torch.ones(6, 5))
    for odd in (*ODD.values(), Wrapper):
        with pytest.raises((TypeError, ValueError), match=r"grad\[0\]"):
            run(odd(torch.ones(6, 5)))
    before = x.clone()
    run(torch._neg_view(torch.ones(6, 5)))  # is -1
    with_minus = x.clone()
    x.copy_(before)
    run(-torch.ones(6, 5))
    assert torch.equal(x, with_minus)


@pytest.mark.parametrize("shape", [(3, 4, 6, 5), (3, 4, 2, 6, 5)])
def test_channels_last_runs_in_cpp(shape: tuple[int, ...]) -> None:
    """Through one contiguous copy: the chain of the contiguous state, bit for bit; what was given stays as it is."""
    g = torch.Generator().manual_seed(2)
    start = torch.randn(shape, generator=g)
    memory = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    other = start.to(memory_format=memory)
    for options in ({}, {"noise_at": "before"}, {"on_nonfinite": "freeze"}, {"accept": "descent"}):
        s = mmebm.Langevin(0.05, **options)
        expected = s.sample(cosines, start, 4, seed=1, record=("energy",))
        found = s.sample(cosines, other, 4, seed=1, record=("energy",))
        assert found.info["backend"] == "cpp", found.info["reason"]
        assert torch.equal(found.state, expected.state)
        torch.testing.assert_close(found.trace["energy"], expected.trace["energy"], rtol=1e-5, atol=1e-5)
    assert torch.equal(other, start) and not other.is_contiguous()
