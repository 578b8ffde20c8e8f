"""Deprecated: the references are :file:`mmebm/ops/<op>/reference.py`. These names work until 0.2."""

import sys
import warnings
from importlib import import_module

warnings.warn(
    "mmebm.reference.<op> is mmebm.ops.<op>.reference; the old name goes with 0.2", DeprecationWarning, stacklevel=2
)
for _op in ("langevin_step", "langevin_mlp", "mlp_energy", "residual"):
    globals()[_op] = sys.modules[f"{__name__}.{_op}"] = import_module(f"mmebm.ops.{_op}.reference")
