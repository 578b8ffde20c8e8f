"""What a chain does to the user's modules while it runs, and undoes exactly: train/eval flags and frozen parameters."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils import parametrize

Mode = Literal["eval", "train", "keep"]

# Nothing a chain must care about hides in these, and some are large.
_LEAVES = (str, bytes, int, float, complex, torch.Tensor, torch.dtype, torch.device, type, types.ModuleType)
# Nor in these libraries' objects that are no modules (optimizers, data loaders, loggers) and in their functions.
_LIBRARIES = ("torch", "numpy", "logging", "threading")
_MAX_DEPTH = 6
# Energies keep their modules in short containers; long ones are data.
_MAX_ITEMS = 256


def _library(item: Any) -> bool:
    return (getattr(item, "__module__", None) or "").partition(".")[0] in _LIBRARIES


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:  # functions defined inside
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _parts(item: Any) -> Iterator[Any]:
    """The objects that ``item`` may compute with."""
    if isinstance(item, functools.partial):
        yield from (item.func, *item.args, *item.keywords.values())
    elif isinstance(item, (list, tuple, set, frozenset)):
        yield from item if len(item) <= _MAX_ITEMS else ()
    elif isinstance(item, dict):
        yield from item.values() if len(item) <= _MAX_ITEMS else ()
    elif isinstance(item, types.MethodType):
        yield from (item.__self__, item.__func__)
    else:
        if isinstance(item, types.FunctionType):
            yield from (item.__defaults__, item.__kwdefaults__)
            for cell in item.__closure__ or ():
                try:
                    yield cell.cell_contents
                except ValueError:  # a cell that is not filled yet
                    continue
            # a script's energy often names its network as a global
            if not _library(item):
                for name in _names(item.__code__):
                    yield item.__globals__.get(name)
        elif _library(type(item)):
            return
        yield from getattr(item, "__dict__", {}).values()
        for owner in type(item).__mro__:
            slots = owner.__dict__.get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                yield getattr(item, name, None)


def modules_of(*objects: Any) -> list[nn.Module]:
    """The modules behind an energy: itself, a method's owner, a partial's parts, a function's closure, defaults and
    the globals it names, an object's fields, the items of short containers."""
    found: list[nn.Module] = []
    seen: dict[int, Any] = {}  # holds what it names, so that no id is used twice
    level = list(objects)
    for _ in range(_MAX_DEPTH + 1):
        below: list[Any] = []
        for item in level:
            if item is None or isinstance(item, _LEAVES) or id(item) in seen:
                continue
            seen[id(item)] = item
            if isinstance(item, nn.Module):
                found.append(item)
            else:
                below.extend(_parts(item))
        level = below
    return found


@contextmanager
def _parametrized_once() -> Iterator[None]:
    """Parametrized weights computed once, in a cache of their own: frozen, they carry no graph, so that they must not
    stay in a cache that the caller has open (``parametrize.cached()`` around a whole training step)."""
    outer = parametrize._cache
    parametrize._cache = {}
    try:
        with parametrize.cached():
            yield
    finally:
        parametrize._cache = outer


@contextmanager
def sampling(modules: list[nn.Module], mode: Mode, *, freeze: bool = True) -> Iterator[None]:
    """Modules in ``mode``, parameters frozen unless ``freeze=False``; every flag back as it was, whatever happens.

    In eval mode parametrized weights (spectral or weight norm) are computed once and not at every step.
    """
    every = list({id(m): m for root in modules for m in root.modules()}.values())
    flags = [(m, m.training) for m in every]
    parameters = [(p, p.requires_grad) for p in {id(p): p for root in modules for p in root.parameters()}.values()]
    # a power iteration in train mode must not be skipped
    once = freeze and mode == "eval" and any(parametrize.is_parametrized(m) for m in every)
    try:
        if mode != "keep":
            for m in every:
                m.training = mode == "train"
        for p, flag in parameters:
            if freeze and flag:
                p.requires_grad_(False)
        if once:
            with _parametrized_once():
                yield
        else:
            yield
    finally:
        for m, flag in flags:
            m.training = flag
        for p, flag in parameters:
            if p.requires_grad != flag:
                p.requires_grad_(flag)
