"""What all parts of a configuration have in common: ranges and choices in their types, and a check of the whole."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import json
import math
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """The numbers from ``low`` to ``high``; ``without`` names the ends that do not belong to it."""

    low: float
    high: float = math.inf
    without: Literal["", "low", "high", "both"] = ""

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.without in ("low", "both") else value >= self.low
        below = value < self.high if self.without in ("high", "both") else value <= self.high
        return above and below and not math.isinf(value)  # written so that NaN fails too

    def __str__(self) -> str:
        if math.isinf(self.high):
            least = f"be at least {self.low:g}"
            return least if self.without == "" else "be positive" if self.low == 0 else f"lie above {self.low:g}"
        opens, closes = (
            "(" if self.without in ("low", "both") else "[",
            ")" if self.without in ("high", "both") else "]",
        )
        return f"lie in {opens}{self.low:g}, {self.high:g}{closes}"


Count = Annotated[int, Range(0)]
Size = Annotated[int, Range(1)]
Weight = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, without="low")]
Share = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, 1, "high")]


class Settings:
    """Base of the dataclasses that make a configuration: a value outside its range or choices is an error at once, by
    whichever way the object is made; types are checked of the whole (:func:`checked`)."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "extra": "forbid",
        "strict": True,
        "allow_inf_nan": False,
        "revalidate_instances": "always",
    }

    def __post_init__(self) -> None:
        for name, hint in hints(type(self)).items():
            wrong = _outside(name, hint, getattr(self, name))
            if wrong:
                raise ValueError(wrong)


@functools.cache
def hints(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields."""
    of = typing.get_type_hints(kind, include_extras=True)
    return {field.name: of[field.name] for field in dataclasses.fields(kind)}


def _outside(name: str, hint: Any, value: Any) -> str:
    """What is wrong with a value of the right type; "" for nothing, and for values of another type."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if origin is Annotated and number:
        return next(
            (f"{name} must {r}, got {value!r}" for r in inner[1:] if isinstance(r, Range) and value not in r), ""
        )
    if origin in (typing.Union, types.UnionType):
        wrong = next(
            filter(
                None, (_outside(name, option, value) for option in inner if typing.get_origin(option) is not Literal)
            ),
            "",
        )
        return wrong.replace(", got", ", or None, got") if type(None) in inner and number else wrong
    if origin is Literal and isinstance(value, str) and value not in inner:
        return f"{name} must be {described(hint)}, got {value!r}{_meant(value, inner)}"
    if origin is dict and isinstance(value, Mapping):
        return next(filter(None, (_outside(f"{name}.{key}", inner[1], item) for key, item in value.items())), "")
    return ""


def described(hint: Any) -> str:
    """A type as a person says it."""
    origin, inner = typing.get_origin(hint), list(typing.get_args(hint))
    if origin is Annotated:
        ranges = [str(r) for r in inner[1:] if isinstance(r, Range)]
        if ranges == ["be positive"]:
            return f"a positive {described(inner[0]).removeprefix('a ')}"
        return " ".join([described(inner[0]), *(r.replace("be ", "of ").replace("lie ", "") for r in ranges)])
    if origin in (typing.Union, types.UnionType):
        several = [described(option) for option in inner]
        return f"{', '.join(several[:-1])} or {several[-1]}"
    if origin is Literal:
        return f"one of {', '.join(map(repr, inner))}" if len(inner) > 1 else repr(inner[0])
    if origin is dict:
        return "a table" if inner[1] is Any else f"a table of names to {described(inner[1])}"
    if origin is tuple:
        return "a list" if inner[-1] is not ... else f"a list, each {described(inner[0])}"
    if dataclasses.is_dataclass(hint):
        return f"a table of {', '.join(field.name for field in dataclasses.fields(hint))}"
    names: dict[Any, str] = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "a string",
        type(None): "null",
    }
    return names.get(hint, str(hint))


def checked(kind: type[T], value: Any) -> T:
    """``value``, plain data or an object, as ``kind``, a dataclass of :class:`Settings`: every field has the type that
    is declared for it, nothing is converted.

    Raises:
        ValueError: naming every field that is wrong by its path, its value, and what would do.
        ModuleNotFoundError: without pydantic.
    """
    try:
        from pydantic import TypeAdapter, ValidationError
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("configurations are checked by pydantic: pip install 'mmebm[model]'") from error
    adapter = TypeAdapter(kind)
    try:
        # JSON has lists for tuples, and tables for dataclasses; an object has the types themselves
        if isinstance(value, kind):
            return adapter.validate_python(value)
        return adapter.validate_json(json.dumps(value))
    except ValidationError as error:
        lines = [_line(kind, value, found) for found in error.errors()]
        # of a table among other choices, what is wrong inside it says more
        within = {path for path, _ in lines}
        told = [text for path, text in lines if not any(p.startswith(f"{path}.") and path for p in within)]
        raise ValueError("\n".join(dict.fromkeys(told))) from None


def _line(kind: Any, value: Any, found: Any) -> tuple[str, str]:
    """One error of pydantic's: the path of its field, and the error in this library's words."""
    hint, at, path = kind, value, ""
    for name in found["loc"]:
        table = _table(hint)
        if table is not None and str(name).startswith("dict[") and isinstance(at, Mapping):
            hint = table  # pydantic names the choice that it tried
            continue
        parts = _step(hint, name)
        if parts is None:
            break
        hint, path = parts, f"{path}.{name}" if path else str(name)
        at = _value(at, name)
    if found["type"] == "value_error":  # of a __post_init__, which knows the name of its field but not the path
        message = str(found["ctx"]["error"])
        known = message.partition(" ")[0].partition(".")[0] in getattr(kind_of(hint), "__dataclass_fields__", {})
        return path, f"{path}{'.' if known else ': '}{message}" if path else message
    if found["type"] == "unexpected_keyword_argument":
        known, name = list(hints(kind_of(hint))), str(found["loc"][-1])
        where = f"{path}.{name}" if path else name
        return where, (
            f"unknown field {where!r}{_meant(name, known)}; "
            f"there {'are' if len(known) > 1 else 'is'} {', '.join(known)}"
        )
    if found["type"] == "missing":
        return path, f"{path} is missing: {described(hint)}"
    if found["type"] == "tuple_type" and isinstance(at, list):
        return path, f"{path} must be a tuple here, got a list"
    return path, f"{path or 'the configuration'} must be {described(hint)}, got {_json(at)}"


def kind_of(hint: Any) -> Any:
    """The dataclass in a type such as ``Guard | None``, or the type itself."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next((option for option in options if dataclasses.is_dataclass(option)), hint)


def _table(hint: Any) -> Any:
    """The ``dict[...]`` among the choices of a type, where there are several."""
    several = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else ()
    return next((option for option in several if typing.get_origin(option) is dict), None)


def _step(hint: Any, name: str | int) -> Any:
    """The type of what is called ``name`` in a value of type ``hint``; None where nothing is."""
    kind = kind_of(hint)
    if dataclasses.is_dataclass(kind):
        return hints(kind).get(str(name)) if isinstance(kind, type) else None
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    options = [option for option in options if option is not type(None)]
    if len(options) > 1:  # pydantic names the option that it tried, and the whole is told
        return None
    inner = typing.get_args(options[0])
    if typing.get_origin(options[0]) is tuple and isinstance(name, int):
        return inner[0]
    return inner[1] if typing.get_origin(options[0]) is dict and name != "[key]" else None


def _value(whole: Any, name: str | int) -> Any:
    if isinstance(whole, Mapping):
        return whole.get(name)
    if isinstance(whole, (list, tuple)) and isinstance(name, int):
        return whole[name]
    return getattr(whole, str(name), None)


def _json(value: Any) -> str:
    try:
        text = json.dumps(value)
    except TypeError:
        text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _meant(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, [str(option) for option in known], n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def read_file(path: Path) -> dict[str, Any]:
    """The settings of a .toml or .json file, nested tables; of a run's ``config.json`` those of the run.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: for another ending, or where it cannot be read.
    """
    if path.suffix not in (".toml", ".json"):
        raise ValueError(f"a configuration file ends in .toml or .json, got {path}")
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file at {path}")
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else _toml(text)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a table of settings, got {_json(found)}")
    inner = found.get("config")
    return inner if isinstance(inner, dict) else found


def _toml(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # pyright: ignore[reportMissingImports]
    return _replaced(tomllib.loads(text), NULL, None)


# TOML has no null: this text stands for it
NULL: Final = "null"


def _replaced(value: Any, old: Any, new: Any) -> Any:
    """``value``, plain data, with ``new`` for ``old``."""
    if isinstance(value, Mapping):
        return {key: _replaced(item, old, new) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replaced(item, old, new) for item in value]
    return new if value is old or (isinstance(old, str) and value == old) else value


def to_toml(plain: Mapping[str, Any]) -> str:
    """Settings as a .toml file, as :func:`read_file` reads them.

    Raises:
        ModuleNotFoundError: without tomli_w.
    """
    try:
        import tomli_w
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("TOML is written by tomli_w: pip install 'mmebm[model]', or take json") from error
    return tomli_w.dumps(_replaced(plain, None, NULL))


def parse(text: str) -> Any:
    """The value that a text stands for: JSON, else as Python writes it (True, None, 'quoted'), else the text itself."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return text
