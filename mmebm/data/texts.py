"""Text files as people have them: byte-order marks, line ends of three systems, bytes that are no UTF-8; and what a
loader leaves out of them, said once."""

from __future__ import annotations

import codecs
import json
import warnings
from pathlib import Path
from typing import Any, Final

__all__ = ["Skipped", "read_json", "read_lines", "read_text"]

MARKS: Final = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class Skipped:
    """Records that a loader leaves out, where that moves no other record: one warning says how many, and the first."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str]] = {}

    def add(self, what: str, where: str, count: int = 1) -> None:
        """``count`` records more of kind ``what``; ``where`` names the file, and the record in it."""
        before, first = self._found.get(what, (0, where))
        self._found[what] = (before + count, first)

    def say(self) -> None:
        """Warns of each kind, if there was any."""
        for what, (count, first) in self._found.items():
            warnings.warn(f"{first}: {what} ({count} in all)", stacklevel=3)
        self._found.clear()


def read_text(file: Path, skipped: Skipped | None = None) -> str:
    """The text of a file: by its byte-order mark, or else UTF-8. A byte that is neither becomes U+FFFD and is said.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if its byte-order mark is not what follows it.
    """
    raw = file.read_bytes()
    encoding = next((name for mark, name in MARKS if raw.startswith(mark)), "utf-8")
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding in ("utf-16", "utf-32"):
            raise ValueError(f"{file} is not the {encoding.upper()} that its first bytes say: {error}") from error
        line = raw[: error.start].count(b"\n") + 1
        collect = Skipped() if skipped is None else skipped
        collect.add(
            "bytes that are no UTF-8 cost their words; save the file as UTF-8",
            f"{file}, line {line}",
            raw.decode("utf-8", "replace").count("\ufffd"),
        )
        if skipped is None:
            collect.say()
        return raw.decode(encoding, "replace")


def read_lines(
    file: Path, skipped: Skipped | None = None, *, what: str = "the captions, one a line", empty: bool = False
) -> list[str]:
    """The lines of a text file without the spaces around them and without the empty lines at its end; empty lines
    before that are "".

    Lines end at a newline and nowhere else (at a carriage return where a file has no newline): not at a full stop, not
    at the other separators of Unicode.

    Raises:
        FileNotFoundError: if there is no such file; it says that it holds ``what``.
        ValueError: if it holds no line with text and may not be ``empty``.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: it holds {what}")
    text = read_text(file, skipped)
    lines = [line.strip() for line in text.split("\n" if "\n" in text else "\r")]
    while lines and not lines[-1]:
        lines.pop()
    if not lines and not empty:
        raise ValueError(f"{file} is empty: it should hold {what}")
    return lines


def read_json(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is not JSON.
    """
    try:
        return json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
