"""One attempt to understand an energy: what is noted meanwhile, and how it ends early."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn


class CannotLower(ValueError):
    """The energy is not, or not visibly, made of what the fused ops take; the message says what it does.

    Attributes:
        lasting: whether that is by what the energy computes, and not by what it was given or what was around the call.
    """

    lasting: bool = True

    def passing(self) -> CannotLower:
        """The same, of this call alone."""
        self.lasting = False
        return self


@dataclass
class Attempt:
    """What is noted while an energy is called with symbols, or watched.

    Attributes:
        refusals: every reason that came up, so that an energy which swallows the exception is still refused.
        seen: the modules, and the code of functions and classes, that the energy consists of.
        held: the lists and dicts that it names, with copies of them as they were.
    """

    refusals: list[str] = field(default_factory=list)
    seen: list[Any] = field(default_factory=list)
    held: list[tuple[Any, Any]] = field(default_factory=list)


_current: contextvars.ContextVar[Attempt | None] = contextvars.ContextVar("attempt", default=None)


@contextmanager
def attempting() -> Iterator[Attempt]:
    """A new attempt, under way inside."""
    noted = Attempt()
    token = _current.set(noted)
    try:
        yield noted
    finally:
        _current.reset(token)


def attempt() -> Attempt:
    """The attempt that is under way, or one that nobody reads."""
    return _current.get() or Attempt()


def refuse(what: str) -> NoReturn:
    """Ends the attempt: "the energy is not lowered because ``what``"."""
    attempt().refusals.append(what)
    raise CannotLower(what)
