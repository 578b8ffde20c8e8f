"""What other packages and the user's own modules bring along: objects by import path, and entry points.

A package offers data sets, presets, judges, loggers and callbacks by entry points of the groups ``mmebm.datasets``,
``mmebm.presets``, ``mmebm.judges``, ``mmebm.loggers`` and ``mmebm.callbacks``; docs/your-model.md says what each is
called with.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from importlib.metadata import entry_points
from typing import Any, Literal, Protocol

Group = Literal["datasets", "presets", "judges", "loggers", "callbacks"]


class Logger(Protocol):
    """What keeps the rows of training somewhere; a logger of ``mmebm.loggers`` is called with the run's folder and its
    configuration, plain data, and returns one. It may also have ``image(name, pixels, iteration)``, which is given
    pictures of samples, uint8 ``(H, W, 3)``."""

    def write(self, row: dict[str, Any], /) -> None:
        """A row: ``iteration``, ``stage``, losses and other numbers by name; ``rolled_back`` or ``alarm``, a text."""

    def close(self) -> None:
        """After the last row."""


def import_modules(names: Iterable[str]) -> None:
    """Imports modules that are installed or lie in the current folder.

    Raises:
        ModuleNotFoundError: for one that is neither.
    """
    names = list(names)
    if names and "" not in sys.path:
        sys.path.insert(0, "")
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
                raise  # the module is there, and what it imports is not
            raise ModuleNotFoundError(
                f"there is no module {name!r}: it must be installed, or lie in the folder where this runs"
            ) from error


def by_path(path: str) -> Any:
    """The object of an import path, "package.module:name".

    Raises:
        ValueError: where the path has another form, or the module has no such name.
        ModuleNotFoundError: where there is no such module.
    """
    module, colon, name = path.partition(":")
    if not colon or not module or not name:
        raise ValueError(f"an import path is 'package.module:name', got {path!r}")
    import_modules([module])
    found: Any = sys.modules[module]
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{path!r}: {getattr(found, '__name__', found)} has no {part!r}")
        found = getattr(found, part)
    return found


def names(group: Group) -> list[str]:
    """The names that installed packages offer in a group."""
    return sorted({entry.name for entry in entry_points(group=f"mmebm.{group}")})


def offered(group: Group, name: str) -> Any:
    """What an installed package offers by this name in a group; None where none does.

    Raises:
        ValueError: where two packages offer different things by one name.
    """
    found = {entry.value: entry for entry in entry_points(group=f"mmebm.{group}", name=name)}
    if len(found) > 1:
        raise ValueError(f"{name!r} in mmebm.{group} is offered twice: {sorted(found)}")
    return next((entry.load() for entry in found.values()), None)


def find(group: Group, name: str) -> Any:
    """What ``name`` stands for in a group: an import path where it has a colon, else an entry point.

    Raises:
        ValueError: where there is none.
    """
    if ":" in name:
        return by_path(name)
    found = offered(group, name)
    if found is None:
        raise ValueError(
            f"{name!r} is none of mmebm.{group}, which are {names(group)}, and no import path 'package.module:name'"
        )
    return found
