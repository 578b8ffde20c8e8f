"""``mmebm.reference``, where the references were once."""

from __future__ import annotations

import importlib
import sys

import pytest


@pytest.mark.parametrize("op", ["langevin_step", "langevin_mlp", "mlp_energy", "residual"])
def test_the_old_name_is_the_new_module_and_warns(op, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("mmebm.reference")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.warns(DeprecationWarning, match=r"mmebm\.ops\.<op>\.reference"):
        old = importlib.import_module(f"mmebm.reference.{op}")
    assert old is importlib.import_module(f"mmebm.ops.{op}.reference")
