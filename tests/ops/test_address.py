"""The door to native code: what it takes, what it refuses by name, and that nothing goes round it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mmebm

PACKAGE = Path(mmebm.__file__).parent

# What goes through the door, and what feeds it: a number of the wrong dtype or device here is one in a kernel.
GUARDED = ("ops", "reference", "samplers", "energies", "diagnostics", "noise.py", "native.py", "state.py", "presets.py")
# These take torch's default dtype or device where they are not told.
FACTORIES = frozenset((
    "arange", "as_tensor", "asarray", "empty", "empty_permuted", "empty_strided", "eye", "full", "linspace", "logspace",
    "normal", "ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "zeros",
))  # fmt: skip


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
    # identity.py tells a graph's tensors apart by their addresses and hands them to nobody
    allowed = {PACKAGE / "ops" / "common" / "address.py", PACKAGE / "samplers" / "identity.py"}
    found = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in _guarded() if path not in allowed for line in _addresses(ast.parse(path.read_text()))
    ]  # fmt: skip
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
stack = Stack((normal(9, 5), normal(1, 9)), (normal(9), None))
decoder = Stack((normal(9, 5), normal(4, 9)), (normal(9), normal(4)))
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
