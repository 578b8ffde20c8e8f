"""The Python blocks of the pages under docs/ run, one after the other, in one namespace per page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = sorted(page for page in DOCS.glob("*.md") if BLOCK.search(page.read_text()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, Any] = {}
    for block in BLOCK.finditer(page.read_text()):
        # so that a traceback points into the page
        line = page.read_text()[: block.start(1)].count("\n")
        exec(compile("\n" * line + block.group(1), str(page), "exec"), namespace)


def test_whole_chain_is_one_call(need: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """What docs/whole-chain.md says its first block prints."""
    need("cpp")
    block = BLOCK.search((DOCS / "whole-chain.md").read_text())
    assert block is not None
    exec(block.group(1), {})
    said = re.search(r"# (langevin_mlp - .*)$", block.group(1), re.MULTILINE)
    assert said is not None and capsys.readouterr().out.strip() == said.group(1)
