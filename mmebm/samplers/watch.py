"""What looks at a chain while it runs: a callback, which may end it, and a line that says how far it is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from mmebm.state import Structure

Callback = Callable[[int, Any], "bool | None"]

PARTS = 100  # looks at a chain whose states are not kept
SECONDS = 10.0  # between two lines where there is no terminal


class Watch:
    """Called by the engines with the number of steps done and the state's tensors, every ``every`` steps and at the
    end; says whether the chain is to end there.

    Args:
        steps: of the run.
        every: steps between two looks.
        build: of the state, from its tensors.
        callback: given the number of steps done, and the state.
        progress: whether to say on standard error how far the chain is.

    Attributes:
        before: steps of the run that another engine has done.
    """

    def __init__(
        self, steps: int, thin: int | None, build: Structure, callback: Callback | None, progress: bool
    ) -> None:
        if callback is not None and not callable(callback):
            raise TypeError(f"callback must be a function of the number of steps and the state, got {callback!r:.80}")
        self.steps: int = steps
        self.every: int = thin or max(-(-steps // PARTS), 1)
        self.build: Structure = build
        self.callback: Callback | None = callback
        self.progress: bool = progress
        self.began: float = time.monotonic()
        self.said, self.open = self.began, False
        self.before: int = 0

    def due(self, done: int) -> bool:
        """Whether the chain is looked at after so many steps."""
        done += self.before
        return done % self.every == 0 or done == self.steps

    def __call__(self, done: int, x: list[Tensor]) -> bool:
        done += self.before
        # copies, which may be kept: the chain goes on in the memory of its state
        ends: Any = None if self.callback is None else self.callback(done, self.build([t.clone() for t in x]))
        if not isinstance(ends, (bool, type(None))):
            raise TypeError(f"callback must return True, which ends the chain, False or None, got {ends!r:.80}")
        ends = bool(ends)
        if self.progress:
            self._say(done, ends or done == self.steps)
        return ends

    def _say(self, done: int, last: bool) -> None:
        now = time.monotonic()
        terminal = sys.stderr.isatty()
        if not last and now - self.said < (0.1 if terminal else SECONDS):
            return
        self.said: float = now
        seconds = now - self.began
        rate = f", {done / seconds:.3g} a second" if seconds > 0 else ""
        line = f"step {done} of {self.steps} ({done / max(self.steps, 1):.0%}), {seconds:.1f} s{rate}"
        self.open: bool = terminal and not last
        # a line of a terminal is written over
        text, end = (f"\r{line:<70}", "" if self.open else "\n") if terminal else (line, "\n")
        print(text, end=end, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends a line that is still written over, as where the chain raised."""
        if self.open:
            print(file=sys.stderr)
