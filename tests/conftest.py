"""Fixtures that every test shares.

seed        a number for each test, the same in each run; MMEBM_TEST_SEED=N makes it another (.ci/run: one per commit)
need        need("cuda") skips with the reason if a backend is missing, or fails if MMEBM_REQUIRE_BACKENDS names it
(autouse)   torch.empty and its relatives return NaN when mmebm calls them, so that reading what was never written shows
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Callable

import pytest
import torch

SEED_KEY = pytest.StashKey[int]()
# A run without MMEBM_TEST_SEED is the same everywhere, so that whoever tries the project first sees what we saw.
DEFAULT_SEED = 0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz-examples",
        type=int,
        default=None,
        metavar="N",
        help="tests/fuzz: N fresh examples per test (--hypothesis-seed=S repeats them) instead of the few, always the "
        "same, that a plain run takes",
    )


def pytest_configure(config: pytest.Config) -> None:
    given = os.environ.get("MMEBM_TEST_SEED", "")
    if given and not given.isdigit():
        raise pytest.UsageError(f"MMEBM_TEST_SEED must be a number, got {given!r}")
    config.stash[SEED_KEY] = int(given) if given else DEFAULT_SEED


def _seed_line(config: pytest.Config) -> str:
    return f"mmebm seed: MMEBM_TEST_SEED={config.stash[SEED_KEY]}"


def pytest_report_header(config: pytest.Config) -> list[str]:
    required = os.environ.get("MMEBM_REQUIRE_BACKENDS", "")
    return [_seed_line(config), *([f"mmebm required backends: {required}"] if required else [])]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    # The header is not shown with -q, and the seed is what a failure needs
    if terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
        terminalreporter.write_line(_seed_line(config))


@pytest.fixture(scope="session")
def session_seed(request: pytest.FixtureRequest) -> int:
    """The number that names this run, below 2**31."""
    return request.config.stash[SEED_KEY]


@pytest.fixture
def seed(session_seed: int, request: pytest.FixtureRequest) -> int:
    """A number below 2**31 for this test in this run, whatever other tests run and in which order.

    The name of the test enters from the last "::" on, so that it does not matter where pytest was started.
    """
    return zlib.crc32(f"{session_seed}:{request.node.name}".encode()) >> 1


@pytest.fixture
def need() -> Callable[[str], None]:
    """A function of a backend's name that skips the test if the backend is missing, or fails if it is required."""
    from mmebm.backends import backends, require_backends

    def check(name: str) -> None:
        backend = backends()[name]
        if not backend.available:
            message = f"backend {name} is missing: {backend.reason}"
            if name in require_backends():
                pytest.fail(f"{message} (required by MMEBM_REQUIRE_BACKENDS)")
            pytest.skip(message)

    return check


def _poison(out: torch.Tensor) -> torch.Tensor:
    from torch._subclasses.fake_tensor import FakeTensor

    if isinstance(out, FakeTensor) or out.is_meta or out.numel() == 0:
        return out
    with torch.no_grad():
        if out.is_floating_point() or out.is_complex():
            out.fill_(float("nan"))
        elif out.dtype != torch.bool:
            out.fill_(torch.iinfo(out.dtype).max - 5)
    return out


def _poisoned(function: Callable) -> Callable:
    def wrapper(*args, **kwargs):
        out = function(*args, **kwargs)
        if torch.compiler.is_compiling():  # the compiler sees the plain function
            return out
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return _poison(out) if caller == "mmebm" or caller.startswith("mmebm.") else out

    return wrapper


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that mmebm allocates without initialising holds NaN, or a huge integer."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))
