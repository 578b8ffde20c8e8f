"""A flag for every field of the configuration: ``--data-chain.steps 60`` is ``--set data_chain.steps=60``."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Final

from mmebm.training.config import Config, Stage
from mmebm.training.settings import described, hints, kind_of

# What has an option of its own, and the name of the preset, which is no setting.
OWN: Final = ("preset", "imports", "seed", "threads", "data.name", "data.path")
Section = tuple[str, type, list[tuple[str, Any]]]


def sections(kind: type = Config, prefix: str = "") -> Iterator[Section]:
    """(prefix, dataclass, its fields by dotted name with their types), and the same of every part below it."""
    mine = {f"{prefix}{name}": hint for name, hint in hints(kind).items()}
    parts = {name: kind_of(hint) for name, hint in mine.items() if _is_part(hint)}
    optional = {name: hint for name, hint in mine.items() if name in parts and type(None) in typing.get_args(hint)}
    yield prefix, kind, [(name, hint) for name, hint in mine.items() if name not in parts or name in optional]
    for name, part in parts.items():
        yield from sections(part, f"{name}.")
    if kind is Config:
        yield "stages.N.", Stage, [(f"stages.N.{name}", hint) for name, hint in hints(Stage).items()]


def _is_part(hint: Any) -> bool:
    kind = kind_of(hint)
    # a network of one's own is a path or a table, and so one value
    return dataclasses.is_dataclass(kind) and str not in typing.get_args(hint)


def add_fields(parser: argparse.ArgumentParser) -> None:
    """Adds the flags, a group for each part of the configuration; they go into ``set``, in the order given."""
    explained: dict[type, str] = {}
    for prefix, kind, fields in sections():
        title = f"configuration, {_flag(prefix.rstrip('.'))}" if prefix else "configuration"
        text = f"As of {_flag(explained[kind])}." if kind in explained else _prose(inspect.getdoc(kind) or "")
        text = f"Of the stage at position N, 0 is the first. {text}" if kind is Stage else text
        explained.setdefault(kind, prefix.rstrip("."))
        group = parser.add_argument_group(title, text)
        for name, hint in fields:
            if name not in OWN:  # of a flag without help, the choices say all
                group.add_argument(f"--{_flag(name)}", action=_Field, **_takes(hint))


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _prose(text: str) -> str:
    """A docstring as plain words."""
    return re.sub(r":\w+:`~?([^`]*)`", r"\1", text).replace("``", "").replace("\n\n", "\n")


def _takes(hint: Any) -> dict[str, Any]:
    """What argparse is told of a value of this type."""
    if hint is bool:
        return {"nargs": "?", "const": "true", "choices": ("true", "false"), "help": "alone it stands for true"}
    if typing.get_origin(hint) is typing.Literal:
        return {"choices": typing.get_args(hint)}
    text = "a table (JSON)" if dataclasses.is_dataclass(kind_of(hint)) and _is_part(hint) else described(hint)
    if _is_part(hint):
        text += "; null: without it, {}: with its defaults"
    return {"metavar": "VALUE", "help": text.replace("%", "%%")}


class _Field(argparse.Action):
    """Appends FIELD=VALUE to ``set``."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        field = self.option_strings[0][2:].replace("-", "_")  # the whole of what may have been given in short
        namespace.set = [*namespace.set, f"{field}={values}"]


def others(rest: Sequence[str]) -> tuple[list[str], list[str]]:
    """Of the words that no option took, those that name a field which only the data or the preset have, such as
    ``--stages.0.iterations 100`` or ``--model.weights.word=6``, as FIELD=VALUE; and the words that remain."""
    found, left, words = [], [], iter(rest)
    tables = [
        name
        for _, _, fields in sections()
        for name, hint in fields
        if any(typing.get_origin(option) is dict for option in (hint, *typing.get_args(hint)))
    ]
    top = {name for prefix, _, fields in sections() if not prefix for name, _ in fields} - {*OWN}
    for word in words:
        flag, equals, value = word.partition("=")
        named = re.fullmatch(r"--\w[\w-]*(\.[\w-]+)+", flag) or flag[2:].replace("-", "_") in top
        value = value if equals or not named else next(words, None)
        if named and value is not None:
            name = flag[2:].replace("-", "_")
            # keys of a table are the user's own
            own = next((len(table) for table in tables if name.startswith(f"{table}.")), len(name))
            found.append(f"{name[:own]}{flag[2 + own :]}={value}")
        else:
            left.append(word)
    return found, left
