"""How many examples: a few, always the same, or ``--fuzz-examples N`` of fresh ones (CONTRIBUTING.md)."""

from __future__ import annotations

import os

import hypothesis
import pytest


def pytest_configure(config: pytest.Config) -> None:
    examples = config.getoption("--fuzz-examples")
    common = dict(
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=[
            hypothesis.HealthCheck.function_scoped_fixture,
            hypothesis.HealthCheck.too_slow,
            hypothesis.HealthCheck.data_too_large,
        ],
    )
    hypothesis.settings.register_profile("fuzz-plain", derandomize=True, max_examples=60, **common)
    hypothesis.settings.register_profile("fuzz-long", derandomize=False, max_examples=examples or 1, **common)
    hypothesis.settings.load_profile("fuzz-long" if examples else "fuzz-plain")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend named in the environment is taken as asked for by name, and cannot take every example."""
    if os.environ.get("MMEBM_BACKEND"):
        monkeypatch.delenv("MMEBM_BACKEND")
