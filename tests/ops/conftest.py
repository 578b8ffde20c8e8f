"""Every test of an op has the marker ``cpp``: ``.ci/sanitize`` runs them again with sanitizers, new ops too."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("cpp")
