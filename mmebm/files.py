"""Files that survive: written whole or not at all, checked when read, and folders that one process works in at a time.

Temporary files carry the host and the process that write them; what a killed process left is removed by the next one
that writes there.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import socket
import struct
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final

import torch

__all__ = [
    "FolderLock",
    "check_writable",
    "new_folder",
    "read_archive",
    "sealed",
    "unwritable",
    "write_archive",
    "write_atomically",
]

TEMPORARY: Final = re.compile(r"\..+\.(?P<host>[\w-]+)-(?P<pid>\d+)-[0-9a-f]{16}\.tmp")
# Where the process cannot be asked (another host's, or its number is in use again), a file so old is nobody's: a write
# takes seconds.
OLD_SECONDS: Final = 24 * 3600.0
PROBE: Final = bytes(4096)  # of a block, so that a full disk shows
COMMENT: Final = b"mmebm-sha256:"
EMPTY_END: Final = 22  # bytes of a zip's last record, when it has no comment
_own: set[str] = set()  # temporary files of this process's threads


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Runs ``write`` on a temporary file beside ``path``, open for reading and writing, and renames it.

    A reader sees the old file or the new one, also after a power cut. Temporary files of killed processes that wrote
    in the same folder are removed.

    Raises:
        OSError: naming ``path``, where it cannot be written: no such folder, a file or folder in its place, no
            permission, a full disk. What was at ``path`` stays.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path.parent)
        temporary = _temporary(path)
        _own.add(temporary.name)
        # "x": a new file, as readable as any other
        with temporary.open("x+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise unwritable(path, error) from error
        raise
    finally:
        if temporary is not None:
            _own.discard(temporary.name)


def check_writable(path: Path | str) -> None:
    """Finds out now whether a file can be written at ``path``, before hours of work for it; makes its folder.

    Raises:
        OSError: as :func:`write_atomically`.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = _temporary(path)
        _own.add(probe.name)
        try:
            with probe.open("xb") as file:
                file.write(PROBE)
                file.flush()
                os.fsync(file.fileno())
        finally:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)
            _own.discard(probe.name)
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> OSError:
    """``error`` of the same kind, with the path that was to be written."""
    reason = error.strerror or str(error)
    if isinstance(error, FileExistsError | NotADirectoryError):
        files = [parent for parent in path.parents if parent.exists() and not parent.is_dir()]
        reason = f"{files[0]} is a file, and no folder" if files else reason
    return OSError(error.errno or errno.EIO, f"{path} cannot be written: {reason}")


def _host() -> str:
    return re.sub(r"[^\w-]", "_", socket.gethostname()) or "host"


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name[:100]}.{_host()}-{os.getpid()}-{secrets.token_hex(8)}.tmp")


def _alive(pid: int) -> bool:
    """Whether a process of this host has the number ``pid``."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def _remove_stale(folder: Path) -> None:
    """Removes the temporary files in ``folder`` that nobody writes any more."""
    for entry in os.scandir(folder):
        found = TEMPORARY.fullmatch(entry.name)
        if found is None or entry.name in _own:
            continue
        with contextlib.suppress(OSError):  # another process was faster, or it is not ours to remove
            here = found["host"] == _host()
            # this process's number on a file that is not its own: the number is in use again
            gone = here and (int(found["pid"]) == os.getpid() or not _alive(int(found["pid"])))
            if gone or time.time() - entry.stat().st_mtime > OLD_SECONDS:
                os.unlink(entry.path)


def _sync_folder(folder: Path) -> None:
    """Makes a rename in ``folder`` last through a power cut, where the system can."""
    with contextlib.suppress(OSError):  # Windows opens no folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class _Hashed:
    """A file to write to that knows the SHA-256 of what was written, and the error that ended it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.failure = file, hashlib.sha256(), None

    def write(self, data: Any) -> int:
        try:
            self.file.write(data)
        except OSError as error:  # torch.save turns it into a riddle
            self.failure = error
            raise
        self.digest.update(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def write_archive(path: Path, content: Any) -> None:
    """Writes ``content`` (tensors, numbers, strings, lists, dicts) as torch.save does, atomically and with a checksum.

    The file is a zip archive that torch.load reads; its comment is the SHA-256 of what stands before it.

    Raises:
        OSError: as :func:`write_atomically`.
    """

    def write(file: BinaryIO) -> None:
        hashed = _Hashed(file)
        try:
            torch.save(content, hashed)  # pyright: ignore[reportArgumentType]
        except RuntimeError:
            if hashed.failure is not None:
                raise hashed.failure from None
            raise
        comment = COMMENT + hashed.digest.hexdigest().encode()
        file.seek(-2, os.SEEK_END)  # the length of the comment ends an archive without one
        file.write(struct.pack("<H", len(comment)) + comment)

    write_atomically(path, write)


def read_archive(path: Path, device: torch.device | str = "cpu") -> tuple[Any, bool]:
    """What :func:`write_archive` wrote, on ``device``; nothing in the file is executed.

    Returns:
        The content, and whether the file had a checksum: files of torch.save have none.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it is no such archive or its checksum does not fit: it is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing" if not path.exists() else f"{path} is no file")
    try:
        with path.open("rb") as file:
            sealed = _check_seal(file)
            file.seek(0)
            return torch.load(file, map_location=device, weights_only=True), sealed
    except Exception as error:  # torch and the pickle in the file promise no set of exceptions
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged, or no file of this library: {reason}") from error


def sealed(path: Path) -> bool:
    """Whether ``path`` is a file of :func:`write_archive` that is as it was written."""
    try:
        with path.open("rb") as file:
            return _check_seal(file)
    except (OSError, ValueError):
        return False


def _check_seal(file: BinaryIO) -> bool:
    """Whether the archive has a checksum, which fits; ValueError where it does not, or the archive's end is none."""
    size = file.seek(0, os.SEEK_END)
    length = len(COMMENT) + 64
    file.seek(max(size - length - EMPTY_END, 0))
    tail = file.read()
    if tail[-EMPTY_END:][:4] == b"PK\x05\x06" and tail[-2:] == b"\0\0":
        return False
    begins = tail[:EMPTY_END][:4] == b"PK\x05\x06" and tail[EMPTY_END - 2 : EMPTY_END] == struct.pack("<H", length)
    if not begins or tail[EMPTY_END:][: len(COMMENT)] != COMMENT:
        raise ValueError("it is no zip archive, or cut short, or it was changed at its end")
    digest, left = hashlib.sha256(), size - length - 2
    file.seek(0)
    while left:
        block = file.read(min(left, 2**20))
        if not block:
            raise ValueError("it is cut short")
        digest.update(block)
        left -= len(block)
    digest.update(b"\0\0")  # the length of the comment, as it was before there was one
    if tail[-64:] != digest.hexdigest().encode():
        raise ValueError("its checksum does not fit: at least one bit was changed after it was written")
    return True


class FolderLock:
    """The right to work in a folder: one process at a time has it, until it is released or the process ends.

    The system lets go of it when the process dies, however it dies. A lock that a process on another host has, or left,
    is respected: whether that one lives cannot be asked from here.

    Args:
        folder: it is made where it is not there.
        wait: until it is free, with a warning that says for whom; by default it is an error that it is not.

    Raises:
        ValueError: naming the folder and who is at work there.
        OSError: where the folder cannot be written.
    """

    NAME: Final = ".lock"

    def __init__(self, folder: Path, *, wait: bool = False) -> None:
        self.folder: Path = folder
        self.path: Path = folder / self.NAME
        told = False
        self._new = _missing(folder)
        self._handle: int | None = None
        while self._handle is None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
            except FileNotFoundError:  # another process has removed the empty folder in between
                continue
            except OSError as error:
                raise unwritable(self.path, error) from error
            try:
                try:
                    self._take(handle)
                except ValueError as error:
                    if not wait:
                        raise
                    if not told:
                        warnings.warn(f"waiting: {error}", stacklevel=2)
                    told = True
                    time.sleep(0.2)
                    continue
                # where the one before has removed its file in between this is a lock on nothing
                if os.path.exists(self.path) and os.path.samestat(os.fstat(handle), os.stat(self.path)):
                    self._handle, handle = handle, -1
                    _locks.add(self)
            finally:
                if handle >= 0:
                    os.close(handle)

    def _take(self, handle: int) -> None:
        owner = os.pread(handle, 200, 0).decode(errors="replace") if hasattr(os, "pread") else ""
        host, _, process = owner.partition(" ")
        who = f"process {process or '?'} on {host or 'this host'}"
        if not _lock(handle):
            raise ValueError(f"{self.folder} is in use by {who}: wait for its end, or take another folder")
        if host and host != _host():
            raise ValueError(
                f"{self.folder} is in use by {who}, or was when that ended: if it is gone, delete {self.path}"
            )
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        os.write(handle, f"{_host()} {os.getpid()}".encode())

    def release(self, *, remove_empty: bool = False) -> None:
        """Ends the right; may be called twice. ``remove_empty`` removes the folder and those above it that were made
        for it, too, if nothing is in them."""
        if self._handle is None:
            return
        handle, self._handle = self._handle, None
        _locks.discard(self)
        with contextlib.suppress(OSError):  # Windows removes no open file: there it stays, unlocked
            os.unlink(self.path)
        os.close(handle)
        if remove_empty:
            _remove_empty([self.folder, *self._new])

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release(remove_empty=error is not None)


# Held by this process. Its children inherit the open files, and with them the right: it would outlive the process.
_locks: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _leave_to_the_parent() -> None:
    for lock in _locks:
        if lock._handle is not None:
            os.close(lock._handle)
            lock._handle = None
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_the_parent)


def _missing(folder: Path) -> list[Path]:
    """``folder`` and those above it that are not there, the deepest first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _lock(handle: int) -> bool:
    """Takes the lock of an open file; whether nobody else has it."""
    try:
        import fcntl
    except ImportError:
        import msvcrt

        try:
            os.lseek(handle, 2**30, os.SEEK_SET)  # far behind what is written there
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: what stands in the file is all there is
        return True
    return True


@contextlib.contextmanager
def new_folder(parent: Path, name: str) -> Iterator[Path]:
    """A folder of one's own: ``name`` in ``parent``, or with the first number that is free (``name-2``), locked.

    It is removed again where an error leaves it empty.

    Raises:
        OSError: where nothing can be written to ``parent``.
    """
    number, new = 1, _missing(parent)
    while True:
        folder = parent / (name if number == 1 else f"{name}-{number}")
        number += 1
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            if isinstance(error, FileExistsError) and parent.is_dir():
                continue
            raise unwritable(folder, error) from error
        try:
            lock = FolderLock(folder)
        except ValueError:  # another was faster between the two lines
            continue
        try:
            with lock:
                yield folder
        except BaseException:
            _remove_empty(new)
            raise
        return
