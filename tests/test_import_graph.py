"""Imports point one way: no circle of files below training, and no room that imports one above it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mmebm"
# From the bottom up; a room may import what stands before it in the list, and itself.
ROOMS = (
    "ops reference native noise state introspect backends build_record",
    "energies",
    "samplers",
    "diagnostics presets",
    "data models files plugins",
    "training evaluation",
    "report",
    "cli adapters",
)
# A compiled implementation is judged by its parity case when it is first asked for, by what the case itself uses.
KNOWN = {
    ("mmebm.native", "mmebm.ops.dispatch"),
    ("mmebm.native", "mmebm.ops.parity"),
    ("mmebm.backends", "mmebm.ops.parity"),
    ("mmebm.ops.dispatch", "mmebm.ops.parity"),
}
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms.split()}


def room(name: str) -> str:
    """The first level below the package, of a module's name."""
    return name.split(".")[1] if "." in name else ""


def _module(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Those that run, also inside functions: not the ones for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _imports(ast.Module(child.orelse, []))
        else:
            yield from _imports(child)


def edges(files: dict[str, str]) -> dict[str, set[str]]:
    """From each module, by its name and text, to those that it imports."""
    out: dict[str, set[str]] = {}
    for name, text in files.items():
        out[name] = set()
        for item in _imports(ast.parse(text)):
            if isinstance(item, ast.Import):
                wanted = [alias.name for alias in item.names]
            else:
                above = name.split(".")[: -item.level] if item.level else []
                base = ".".join([*above, *([item.module] if item.module else [])])
                # a name of a package may be a module
                wanted = [f"{base}.{alias.name}" for alias in item.names]
                wanted = [w if w in files else base for w in wanted]
            out[name].update(w for w in wanted if w in files and w != name)
    return out


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    """One circle of modules, or None."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        found = next(filter(None, (visit(to, [*path, name]) for to in sorted(graph[name]))), None)
        done.add(name)
        return found

    return next(filter(None, (visit(name, []) for name in sorted(graph))), None)


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return edges({_module(path): path.read_text() for path in PACKAGE.rglob("*.py")})


def test_no_circle(graph: dict[str, set[str]]) -> None:
    assert all(to in graph[name] for name, to in KNOWN), "an exception that is none any more"
    core = [name for name in graph if LEVEL.get(room(name), 99) <= LEVEL["diagnostics"]]
    found = circle({name: {to for to in graph[name] if to in core and (name, to) not in KNOWN} for name in core})
    assert found is None, " -> ".join(found)


def test_no_import_runs_up(graph: dict[str, set[str]]) -> None:
    up = [
        f"{name} imports {to}"
        for name, targets in graph.items()
        for to in targets
        if room(name) in LEVEL and room(to) in LEVEL and LEVEL[room(to)] > LEVEL[room(name)]
    ]
    assert not up, "\n".join(sorted(up))


def test_the_walk_sees_circles() -> None:
    files = {
        "p": "",
        "p.a": "from p import b",
        "p.b": "def f():\n    import p.c",
        "p.c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p import a\nelse:\n    import p.d",
        "p.d": "",
    }
    assert circle(edges(files)) is None
    assert circle(edges({**files, "p.d": "from p.b import x"})) == ["p.b", "p.c", "p.d", "p.b"]
