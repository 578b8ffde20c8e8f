"""Importing the adapters imports no other library; a missing one is named with the extra that brings it."""

from __future__ import annotations

import subprocess
import sys

import pytest

PEERS = {"torchebm": ("torchebm", "peers"), "ebmkit": ("ebm", "peers"), "multivae": ("multivae", "multivae")}


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_importing_the_package_imports_no_peer():
    names = sorted({module for module, _ in PEERS.values()})
    out = run(f"import sys, mmebm.adapters; print([n for n in {names!r} if n in sys.modules])")
    assert out.strip() == "[]"


@pytest.mark.parametrize("adapter", PEERS)
def test_a_missing_peer_is_named_with_its_extra(adapter):
    module, extra = PEERS[adapter]
    out = run(
        f"import sys\nsys.modules[{module!r}] = None\n"
        f"try:\n    import mmebm.adapters.{adapter}\nexcept ImportError as error:\n    print(error.name, error)"
    )
    assert out.startswith(f"{module} ") and f"mmebm[{extra}]" in out
