"""Checkpoints: written atomically with a checksum, read without executing code, checked for sense before they are used.

The last two are kept, so that a damaged one leaves something to resume from.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmebm.files import read_archive, sealed, write_archive

FORMAT = "mmebm-run-3"
# 0.1.0 wrote no checksum
WITHOUT_CHECKSUM = "mmebm-run-2"


def previous(path: Path) -> Path:
    """Where the checkpoint before the one at ``path`` is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def save(path: Path, content: dict[str, Any], *, keep_previous: bool = True) -> None:
    """Writes ``content`` (tensors, numbers, strings, lists, dicts) to ``path``; what was there is kept beside it.

    Raises:
        OSError: naming ``path``, where it cannot be written. The checkpoints that are there stay.
    """
    # a damaged one must not take the place of a good one
    if keep_previous and sealed(path):
        _keep(path)
    write_archive(path, content)


class Writer:
    """Writes one after the other in a thread of its own, so that training goes on meanwhile.

    What fails there is raised by the next call of a method. As a context manager it waits for
    what is under way when it is left.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "mmebm-checkpoint")
        self._last: Future[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether something is being written."""
        return self._last is not None and not self._last.done()

    def submit(self, write: Callable[[], None]) -> None:
        """Has ``write`` called, after what is under way: no more than one waits, since each holds a copy of a run."""
        self.wait()
        self._last = self._pool.submit(write)

    def wait(self) -> None:
        """Until what is under way is written."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def close(self) -> None:
        """Waits for what is under way."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _keep(path: Path) -> None:
    """A second name for the file at ``path``, which itself stays where it is at all times."""
    with contextlib.suppress(OSError):  # no second names on this file system: then there is one checkpoint
        link = path.with_name(f".{previous(path).name}.link")
        link.unlink(missing_ok=True)
        os.link(path, link)
        os.replace(link, previous(path))
        # a process killed before the new file came left both names to one file; renaming does nothing then
        link.unlink(missing_ok=True)


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads a checkpoint; nothing in it is executed.

    Raises:
        FileNotFoundError: naming the path and how such a file comes about.
        ValueError: naming the file, where it is not a checkpoint of this library, is damaged, or holds what training
            cannot have written: numbers that are not finite, a negative iteration.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: `mmebm train` writes one into its run folder")
    try:
        content, has_checksum = read_archive(path, device)
    except ValueError as error:
        raise ValueError(f"not a readable checkpoint: {error}{_advice(path)}") from error
    written = content.get("format") if isinstance(content, dict) else None
    if written not in (FORMAT, WITHOUT_CHECKSUM):
        raise ValueError(f"{path} is not a checkpoint of this library (format {FORMAT})")
    if written == FORMAT and not has_checksum:
        raise ValueError(f"{path} has lost its checksum: it was changed after it was written{_advice(path)}")
    if not has_checksum:
        warnings.warn(
            f"{path} was written by an earlier version, without a checksum: it cannot be told whether it is damaged",
            stacklevel=2,
        )
    wrong = _nonsense(content)
    if wrong:
        raise ValueError(f"{path} is not a checkpoint that training wrote: {wrong}{_advice(path)}")
    return content


def weights(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The networks' weights in a checkpoint: their moving average where the run keeps one."""
    averaged = content.get("averaged")
    if averaged is None:
        return content["system"]
    inside = "module."
    return {name.removeprefix(inside): value for name, value in averaged.items() if name.startswith(inside)}


def _advice(path: Path) -> str:
    """What is left where ``path`` is lost."""
    other = previous(path)
    return f"; {other} is the one before it, and --resume goes on from there" if sealed(other) else ""


def resume(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """:func:`load`, or the checkpoint before where that one is damaged or missing; a warning says so.

    Raises:
        FileNotFoundError, ValueError: as :func:`load`, where there is no other to go on from.
    """
    try:
        return load(path, device)
    except (FileNotFoundError, ValueError) as error:
        try:
            content = load(previous(path), device)
        except (FileNotFoundError, ValueError):
            raise error from None
        warnings.warn(f"{error}. Going on from {previous(path)}, iteration {content['iteration']}", stacklevel=2)
        return content


def _nonsense(content: Mapping[str, Any]) -> str | None:
    """What in a checkpoint cannot be, or None."""
    for name in ("iteration", "rollbacks", "evaluations"):
        value = content.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            return f"{name} is {value!r:.80}"
    if not isinstance(content.get("config"), str):
        return "it has no configuration"
    for name in ("system", "optimisers", "snapshots", "starts"):
        if not isinstance(content.get(name), dict):
            return f"{name} is {type(content.get(name)).__name__}, not a dict"
    starts = content["starts"]
    if not all(isinstance(starts.get(name), dict) for name in ("data", "latent")):
        return "starts has no 'data' and 'latent'"
    # where a persistent latent chain has not begun its end is NaN
    for name in ("system", "averaged", "optimisers", "snapshots"):
        found = not_finite(content.get(name), name, buffers=frozenset(content.get("buffers", ())))
        if found:
            return found
    return not_finite(starts["data"], "starts.data")


def not_finite(value: Any, name: str, *, buffers: frozenset[str] = frozenset()) -> str | None:
    """What in nested dicts and lists is inf or NaN, or None. ``buffers`` may hold inf, as masks do."""
    if isinstance(value, Tensor):
        if not value.is_floating_point() and not value.is_complex():
            return None
        # "system.X", "averaged.module.X", "snapshots.vae.X"
        masked = not buffers.isdisjoint((name.partition(".")[2], name.split(".", 2)[-1]))
        good = not value.isnan().any() if masked else value.isfinite().all()
        return None if bool(good) else f"{name} holds numbers that are not finite"
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{name} is {value}"
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, part in items:
        found = not_finite(part, f"{name}.{key}", buffers=buffers)
        if found:
            return found
    return None
