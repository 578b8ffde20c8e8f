"""The one place that looks into callables: what an object can compute with, and which energy is which.

Seen are closures, defaults, the globals that code names, partials, methods and their owners, fields and slots, items of
short containers, and what the methods of a user's class close over and name. Not seen is what code reads by other ways:
files, the environment, strings given to ``eval``, long containers.
"""

from __future__ import annotations

import dis
import functools
import os
import sys
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Final, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

MAX_DEPTH: Final = 6
# Energies keep what they compute with in short containers; long ones are data.
MAX_ITEMS: Final = 256
# The value of a name that has none yet
EMPTY: Final = object()

# Nothing hides in these, and some are large.
_LEAVES = (str, bytes, int, float, complex, Tensor, torch.dtype, torch.device, type, types.ModuleType, type(None))
# Nor in these libraries' objects that are no modules (optimizers, data loaders, loggers) and in their functions.
_LIBRARIES = ("torch", "numpy", "logging", "threading", "_thread", "concurrent", "multiprocessing")
_STANDARD = os.path.dirname(os.__file__)
# What a class may hold for all of its objects
_SHARED = (bool, int, float, Tensor, nn.Module)


def package(item: Any) -> str:
    """The package of a class or function."""
    return (getattr(item, "__module__", None) or "").partition(".")[0]


def in_library(item: Any) -> bool:
    """Whether a class or function is of a library in which nothing of an energy hides."""
    return package(item) in _LIBRARIES


@functools.lru_cache(maxsize=1024)
def _is_foreign(module: str) -> bool:
    """Whether classes and functions of a module are a library's, so that no energy hides in what their code names."""
    if module.partition(".")[0] in (*_LIBRARIES, "mmebm", "builtins"):
        return True
    # the standard library by its files, as a user's module may have the name of one
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return file.startswith(_STANDARD) and "site-packages" not in file


def is_foreign(kind: type) -> bool:
    """Whether a class is of a library, or of this package."""
    return _is_foreign(kind.__module__ or "")


def definer(kind: type, name: str) -> type:
    """The class from which ``kind`` has ``name``."""
    return next(owner for owner in kind.__mro__ if name in owner.__dict__)


# -- code


class Names(NamedTuple):
    """What code names: globals (and builtins), and attributes of whatever it has."""

    globals: tuple[str, ...]
    attributes: tuple[str, ...]


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """``code`` and that of the functions defined inside."""
    yield code
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            yield from codes(part)


@functools.lru_cache(maxsize=1024)
def names_in(code: types.CodeType) -> Names:
    """The names in ``code`` and in the functions defined inside."""
    read = [(i.opname, str(i.argval)) for part in codes(code) for i in dis.get_instructions(part)]

    def named(*by: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for operation, name in read if operation in by))

    return Names(named("LOAD_GLOBAL", "LOAD_NAME"), named("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"))


def closure(f: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """(name, value) of the variables that ``f`` closes over; :data:`EMPTY` where one is not filled yet."""
    for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:
            yield name, EMPTY


def _named(f: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """(name, value) of the variables that ``f`` closes over and of the globals, no classes or
    modules of Python, that it names."""
    yield from ((name, value) for name, value in closure(f) if value is not EMPTY)
    if not _is_foreign(f.__module__ or ""):
        for name in names_in(f.__code__).globals:
            value = f.__globals__.get(name, EMPTY)
            if value is not EMPTY and not isinstance(value, (type, types.ModuleType)):
                yield name, value


# -- objects


def _fields(item: Any) -> Iterator[tuple[str, Any]]:
    own = getattr(item, "__dict__", None)
    if isinstance(own, dict):
        yield from list(own.items())
    for owner in type(item).__mro__:
        slots = owner.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(item, name):
                yield name, getattr(item, name)


def function_in(value: Any) -> types.FunctionType | None:
    """The function of what stands in a class: a method, a property, a static or class method."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    elif isinstance(value, property):
        value = value.fget
    elif isinstance(value, functools.cached_property):
        value = value.func
    return value if isinstance(value, types.FunctionType) else None


def _given(f: types.FunctionType) -> Iterator[tuple[Any, Any]]:
    """(name, value) of the defaults of ``f``, and of what it closes over and names."""
    yield from enumerate(f.__defaults__ or ())
    yield from (f.__kwdefaults__ or {}).items()
    yield from _named(f)


def class_parts(kind: type) -> Iterator[tuple[str, Any]]:
    """(name, value) of what a user's class holds for its objects, and of what its methods are given, close over and
    name."""
    for base in kind.__mro__:
        if is_foreign(base):
            continue
        for name, value in vars(base).items():
            if isinstance(value, _SHARED) and not name.startswith("__"):
                yield name, value
            f = function_in(value)
            if f is not None:
                yield from _given(f)


def parts(item: Any) -> Iterator[tuple[Any, Any]]:
    """(name, value) of what ``item`` may compute with: one step of :func:`reachable`.

    A name says where the value stands: of a field, a variable or an argument, or the key or place in a container. Of a
    module these are its fields; containers of more than :data:`MAX_ITEMS` have none.
    """
    if isinstance(item, functools.partial):
        yield "func", item.func
        yield from enumerate(item.args)
        yield from item.keywords.items()
    elif isinstance(item, types.MethodType):
        yield "__func__", item.__func__
        yield "__self__", item.__self__
    elif isinstance(item, types.FunctionType):
        yield from _given(item)
        yield from list(item.__dict__.items())
    else:
        if isinstance(item, (list, tuple, set, frozenset, dict)):
            if len(item) > MAX_ITEMS:
                return
            yield from list(item.items() if isinstance(item, dict) else enumerate(item))
        if type(item) not in (list, tuple, set, frozenset, dict):
            yield from _fields(item)
            yield from class_parts(type(item))


def reachable(*objects: Any) -> Iterator[Any]:
    """``objects`` and what they can compute with, each once, the nearest first, up to :data:`MAX_DEPTH` steps away.

    Modules are not looked into, nor are objects of libraries.
    """
    seen: dict[int, Any] = {}  # holds what it names, so that no id is used twice
    level = list(objects)
    for _ in range(MAX_DEPTH + 1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, _LEAVES) or id(item) in seen:
                continue
            seen[id(item)] = item
            yield item
            if not isinstance(item, nn.Module) and not in_library(type(item)):
                below.extend(value for _, value in parts(item))
        level = below


# -- which energy is which

Entry = TypeVar("Entry")


class Memory(Generic[Entry]):
    """What is known of energies. The least recently asked for are forgotten beyond ``most``.

    An energy is what it consists of: modules and other objects count by themselves, classes and code by what they are,
    so that a function that is made anew for each call stays the same energy.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._entries: OrderedDict[Any, tuple[list[weakref.ref[Any]], Entry]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, consists_of: Sequence[Any], rest: Hashable, make: Callable[[], Entry]) -> Entry:
        """The entry of an energy, as ``make`` gave it the first time. ``rest``: what else tells entries apart."""
        by_what = (type, types.CodeType)
        objects = [item for item in consists_of if not isinstance(item, by_what)]
        key = (tuple(item if isinstance(item, by_what) else id(item) for item in consists_of), rest)
        with self._lock:
            references, entry = self._entries.get(key, ([], None))
            if entry is None or any(ref() is not item for ref, item in zip(references, objects, strict=True)):
                try:
                    references, entry = [weakref.ref(item) for item in objects], make()
                except TypeError:  # such an object may give its id to another one
                    return make()
                self._entries[key] = references, entry
            self._entries.move_to_end(key)
            while len(self._entries) > self._most:
                self._entries.popitem(last=False)
            return entry

    def entries(self) -> list[Entry]:
        """The entries, the least recently asked for first."""
        with self._lock:
            return [entry for _, entry in self._entries.values()]

    def clear(self) -> None:
        """Forgets all."""
        with self._lock:
            self._entries.clear()
