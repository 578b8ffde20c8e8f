"""Energies as plain descriptions: dataclasses of numbers, names, tensors and one another, and what is done with any.

A kind of description is a frozen dataclass under :class:`Described`. Its tensors stay the caller's. What is written
here works on every kind, so that a new one is its fields and what they mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field
from typing import Any, ClassVar, Final, TypeVar

from torch import Tensor

from mmebm.ops.common.untyped import DICT, LISTS

# Metadata of a field whose tensor has a row for each chain, or one row for all where there may be one
PER_CHAIN: Final[Mapping[str, Any]] = {"chains": "each"}
SHARED_OR_PER_CHAIN: Final[Mapping[str, Any]] = {"chains": "one or each"}


class Described:
    """Base of all kinds."""

    __slots__ = ()
    kinds: ClassVar[dict[str, type[Any]]] = {}  # by name
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __init_subclass__(cls) -> None:
        Described.kinds[cls.__name__] = cls


T = TypeVar("T")
_HOLD: Final = (Described, *LISTS)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a description, in the order of the fields."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Described):
        value = [getattr(value, name) for name in value.__dataclass_fields__]
    found: list[Tensor] = []
    for part in value if isinstance(value, LISTS) else ():
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, _HOLD):  # not asked of each number: a call of a chain looks through its net
            found += tensors_in(part)
    return found


def replaced(value: T, function: Callable[[Tensor, str | None], Tensor]) -> T:
    """The same description of other tensors: ``function`` of each and of what its field says of chains."""

    def of(value: Any, chains: str | None) -> Any:
        if isinstance(value, Tensor):
            return function(value, chains)
        if isinstance(value, Described):
            fields = value.__dataclass_fields__
            return type(value)(**{n: of(getattr(value, n), f.metadata.get("chains")) for n, f in fields.items()})
        return tuple([of(part, chains) for part in value]) if isinstance(value, LISTS) else value

    return of(value, None)


def of_chains(value: T, index: Tensor) -> T:
    """The description for the chains ``index`` alone."""

    def cut(t: Tensor, chains: str | None) -> Tensor:
        return t if chains is None or (t.shape[0] == 1 and chains != "each") else t[index]

    return replaced(value, cut)


def structure(value: Any) -> Any:
    """The kinds, shapes and names of a description, without its numbers: equal where one code computes both."""
    if isinstance(value, Described):
        parts = [getattr(value, name) for name in value.__dataclass_fields__]
        return (type(value), *map(structure, parts))
    if isinstance(value, Tensor):
        return tuple(value.shape[1:] if value.dim() > 1 else value.shape)
    if isinstance(value, LISTS):
        return tuple(map(structure, value))
    return value if isinstance(value, (str, bool, int, type(None))) else value.__class__


# -- as what a torch.library schema can carry: a string, and tensors in the order of the fields


def pack(value: Any) -> tuple[str, list[Tensor | None]]:
    """(text, tensors); :func:`unpack` is the inverse."""
    tensors: list[Tensor | None] = []

    # JSON by hand: torch.compile cannot trace json.dumps
    def text(value: Any) -> str:
        if isinstance(value, Described):
            fields = [f'"{name}": {text(getattr(value, name))}' for name in value.__dataclass_fields__]
            return f'{{"kind": "{type(value).__name__}", {", ".join(fields)}}}'
        if isinstance(value, Tensor):
            tensors.append(value)
            return f'{{"tensor": {len(tensors) - 1}}}'
        if isinstance(value, LISTS):
            return "[" + ", ".join([text(part) for part in value]) + "]"
        if value is None or isinstance(value, bool):
            return {None: "null", True: "true", False: "false"}[value]
        if isinstance(value, str):
            return f'"{value}"'
        if isinstance(value, int):
            return repr(value)
        number = float(value)
        if number != number or number in (math.inf, -math.inf):
            return "NaN" if number != number else "Infinity" if number > 0 else "-Infinity"
        return repr(number)

    return text(value), tensors


def unpack(description: str, tensors: Sequence[Tensor | None]) -> Any:
    """What :func:`pack` was given, lists as tuples."""

    def rebuilt(value: Any) -> Any:
        if isinstance(value, DICT):
            if "tensor" in value:
                place: int = value["tensor"]
                return tensors[place]
            return Described.kinds[value.pop("kind")](**{name: rebuilt(part) for name, part in value.items()})
        return tuple([rebuilt(part) for part in value]) if isinstance(value, LISTS) else value

    return rebuilt(json.loads(description))
