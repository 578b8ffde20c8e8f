"""The door to native code: what it takes, what it refuses by name, and that nothing goes round it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import mmebm
from mmebm.ops.common import address as door

PACKAGE = Path(mmebm.__file__).parent
CPU = torch.device("cpu")

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
        if not isinstance(node.func.value, ast.Name) or node.func.value.id != "torch" or node.func.attr not in FACTORIES:
            continue
        given = {keyword.arg for keyword in node.keywords}
        if None not in given and not {"dtype", "device"} <= given:
            out.append(f"{node.lineno}: {ast.unparse(node)}")
    return out


def _addresses(tree: ast.AST) -> list[str]:
    return [f"{node.lineno}" for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "data_ptr"]


def test_every_factory_call_names_dtype_and_device() -> None:
    found = [f"{path.relative_to(PACKAGE)}:{call}" for path in _guarded() for call in _loose(ast.parse(path.read_text()))]
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
