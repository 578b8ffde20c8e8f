"""The Python blocks of the pages under docs/ run, one after the other, in one namespace per page.

The messages in troubleshooting.md are raised by the blocks beside them, and the API pages have all that is public.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
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


# ### `message`, and the block that raises it, if there is one
MESSAGE = re.compile(r"^### `([^\n]*)`\n\n(?:```python title=\"raises it\"\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
TROUBLES = [(m[1], m[2]) for m in MESSAGE.finditer((DOCS / "troubleshooting.md").read_text())]


@pytest.mark.parametrize(("message", "code"), TROUBLES, ids=[message for message, _ in TROUBLES])
def test_messages_are_those_that_are_raised(message: str, code: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    if code is None:  # a machine without the package or the tool it speaks of: its words stand in the source
        files = [ROOT / "setup.py", *(ROOT / "mmebm").rglob("*.py")]
        # string literals that follow each other are one
        source = "\n".join(re.sub(r'"\s*\n\s*f?"', "", path.read_text()) for path in files)
        assert message in source
        return
    namespace: dict[str, Any] = {}
    first = BLOCK.search((DOCS / "troubleshooting.md").read_text())
    assert first is not None
    exec(first.group(1), namespace)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            exec(code, namespace)
        except Exception as error:
            said = str(error)
        else:
            said = capsys.readouterr().out + "\n".join(str(warning.message) for warning in caught)
    assert message in said, said


def test_api_pages_have_every_public_name() -> None:
    pages = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    described = set()
    for name in re.findall(r"^::: (\S+)$", pages, re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        try:
            described.add(id(importlib.import_module(name)))
        except ImportError:
            if not module.startswith("mmebm.adapters"):  # they need the other library; the build of the site reads them
                described.add(id(getattr(importlib.import_module(module), attribute)))
    missing = []
    for home in ("mmebm", "mmebm.diagnostics", "mmebm.energies", "mmebm.training", "mmebm.data"):
        module = importlib.import_module(home)
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.ismodule(value):
                found = re.search(rf"^::: {re.escape(value.__name__)}\b", pages, re.MULTILINE) is not None
            else:
                found = id(value) in described or id(inspect.getmodule(value)) in described
                found = found or not (inspect.isclass(value) or inspect.isfunction(value))
            if not found:
                missing.append(f"{home}.{name}")
    assert missing == []


NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_were_executed_whole_and_in_order(path: Path) -> None:
    """.ci/run executes them; here only that what is committed is the output of one execution, without an error."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
    assert "/tmp/" not in path.read_text() and "/root" not in path.read_text()
