"""What a callable reaches, by each way that Python has to hold a thing; and that no energy is taken for another."""

from __future__ import annotations

import functools
import gc
import importlib
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmebm import introspect
from mmebm.introspect import EMPTY, Memory, reachable


class Thing:
    """What is looked for."""


THING = Thing()


class Slotted:
    __slots__ = ("thing",)

    def __init__(self, thing: Thing) -> None:
        self.thing = thing


class Names:
    """Its method names a global, and its objects have no fields."""

    def __call__(self) -> Any:
        return THING


def wrapped(thing: Thing) -> Callable[[], Thing]:
    @functools.lru_cache
    def inner() -> Thing:
        return thing

    return inner


WAYS: dict[str, Any] = {
    "itself": THING,
    "closure": (lambda thing: lambda: thing)(THING),
    "default": lambda thing=THING: thing,
    "keyword default": lambda *, thing=THING: thing,
    "global": lambda: THING,
    "global of a function inside": lambda: lambda: THING,
    "global of a method": Names(),
    "argument of a partial": functools.partial(print, THING),
    "keyword of a partial": functools.partial(print, thing=THING),
    "field": Slotted(Slotted(THING)),  # type: ignore[arg-type]
    "list in a dict": {"a": [THING]},
    "key": {(1, 2): THING},
    "named tuple": namedtuple("Pair", "a b")(1, THING),
    "wrapper": wrapped(THING),
}


@pytest.mark.parametrize("way", WAYS)
def test_reached(way: str) -> None:
    assert THING in list(reachable(WAYS[way]))


def test_not_reached() -> None:
    assert THING not in list(reachable(lambda x: x.THING))  # an attribute of this name is no global
    assert THING not in list(reachable([THING].append))  # written in C: nothing to look into
    assert THING not in list(reachable([THING] * (introspect.MAX_ITEMS + 1)))
    deep: Any = THING
    for _ in range(introspect.MAX_DEPTH + 1):
        deep = [deep]
    assert THING not in list(reachable(deep)) and THING in list(reachable(deep[0]))


def test_the_standard_library_is_told_by_its_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its classes are not searched for globals, which would be most of a call; a user's module of the same name is."""
    assert not list(introspect.class_parts(type(tmp_path)))
    (tmp_path / "colorsys.py").write_text(
        "THING = object()\n\nclass Energy:\n    def __call__(self):\n        return THING\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    introspect._is_foreign.cache_clear()
    module: Any = importlib.import_module("colorsys")
    assert module.THING in list(reachable(module.Energy()))
    introspect._is_foreign.cache_clear()


def test_each_once_and_circles_end() -> None:
    circle: list[Any] = [THING, THING]
    circle.append(circle)
    assert [item for item in reachable(circle, THING) if item is THING] == [THING]


def test_a_variable_without_a_value() -> None:
    def outer() -> Callable[[], Any]:
        inner = lambda: later
        assert dict(introspect.closure(inner)) == {"later": EMPTY}
        assert list(introspect.parts(inner)) == []
        later = THING
        return inner

    assert dict(introspect.closure(outer())) == {"later": THING}  # type: ignore[arg-type]


def test_memory_knows_functions_by_code_and_objects_by_themselves() -> None:
    memory: Memory[list[int]] = Memory(2)
    make = lambda: lambda x: x
    entry = memory.get([make().__code__], None, list)
    assert memory.get([make().__code__], None, list) is entry
    assert memory.get([make().__code__], "other", list) is not entry
    first, second = Thing(), Thing()
    assert memory.get([first], None, list) is memory.get([first], None, list)
    assert memory.get([first], None, list) is not memory.get([second], None, list)
    assert len(memory.entries()) == 2 and memory.get([make().__code__], None, list) is not entry  # forgotten


def test_memory_does_not_take_an_id_for_the_object_that_had_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(introspect, "id", lambda item: 7, raising=False)
    memory: Memory[list[int]] = Memory(2)
    thing = Thing()
    entry = memory.get([thing], None, list)
    del thing
    gc.collect()
    assert memory.get([Thing()], None, list) is not entry
    assert memory.get([()], None, list) is not memory.get([()], None, list)  # nothing tells when it is gone
