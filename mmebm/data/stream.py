"""Batches prepared ahead of time, so that decoding files and training overlap: by a thread, or by processes."""

from __future__ import annotations

import collections
import hashlib
import random
import signal
import threading
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mmebm.data.base import MultimodalDataset, check_count

__all__ = ["Prefetch", "WorkerBatches"]


@dataclass(eq=False)
class _Shared:
    """What both threads see; every access under ``changed``."""

    depth: int
    changed: threading.Condition = field(default_factory=threading.Condition)
    ready: collections.deque[tuple[Tensor, dict[str, Tensor]]] = field(default_factory=collections.deque)
    failure: BaseException | None = None
    finished: bool = False
    stopped: bool = False


class Prefetch:
    """Iterates over ``(rows, data.batch(rows))``, preparing the next batches in a background thread.

    The batches are those of a plain loop over ``data.batch(rows)``, in the same order. It pays where pools are read
    when asked (:mod:`mmebm.data.pools`); tensors need no help. At most ``depth`` batches wait, and one more is in work.
    An exception of the source or of a batch is raised in the consumer's thread, at the place of that batch.

        with Prefetch(data, (torch.randint(len(data), (100,), generator=rng) for _ in range(1000))) as batches:
            for rows, x in batches:
                ...

    Leaving the ``with`` block, :meth:`close`, the end of ``rows``, or dropping the last reference ends the thread.

    Args:
        data: where batches come from; it must not change meanwhile.
        rows: int64 ``(b,)`` tensors. It is advanced in the background thread, ahead of the consumer: a generator of
            random numbers that it uses must be its own.
        depth: batches that may wait.

    Raises:
        TypeError, ValueError: if ``depth`` is no positive integer.
    """

    def __init__(self, data: MultimodalDataset, rows: Iterable[Tensor], *, depth: int = 2) -> None:
        self._shared = _Shared(check_count("depth", depth))
        # The thread knows the shared state and not this object, which can therefore be collected while it runs.
        self._thread = threading.Thread(
            target=_work, args=(self._shared, data, rows), name="mmebm-prefetch", daemon=True
        )
        self._finalizer = weakref.finalize(self, _stop, self._shared)
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        return self

    def __next__(self) -> tuple[Tensor, dict[str, Tensor]]:
        shared = self._shared
        with shared.changed:
            shared.changed.wait_for(lambda: shared.ready or shared.finished or shared.stopped)
            if shared.ready:
                item = shared.ready.popleft()
                shared.changed.notify_all()
                return item
            failure, shared.failure = shared.failure, None
        if failure is not None:
            raise failure
        raise StopIteration

    def close(self) -> None:
        """Ends the thread after the batch it is at, and drops what was prepared. May be called twice."""
        _stop(self._shared)
        if self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class WorkerBatches:
    """Iterates over ``(rows, data.batch(rows))``, the batches read by ``workers`` processes, each a whole batch at a
    time, by a ``torch.utils.data.DataLoader``; on their way to a GPU they are pinned.

    The batches and their order do not depend on the number of workers. What items draw at random (augmentations, by
    Python's, NumPy's or torch's global generator) is seeded for each batch by ``seed`` and its rows, and does not
    either. Of :class:`Prefetch` it has the methods.

    Args:
        data: where batches come from; not changed meanwhile.
        rows: int64 ``(b,)`` tensors.
        workers: processes, at least 1.
        ahead: batches that wait, of each worker.
        seed: of what items draw at random.

    Raises:
        TypeError, ValueError: for counts that are none.
    """

    def __init__(
        self, data: MultimodalDataset, rows: Iterable[Tensor], *, workers: int, ahead: int = 2, seed: int = 0
    ) -> None:
        self._device = data.index.device
        pinned = self._device.type == "cuda"
        loader: DataLoader[Any] = DataLoader(
            _Batches(data.to("cpu"), seed),
            batch_size=None,
            sampler=_Rows(rows),
            num_workers=check_count("workers", workers),
            prefetch_factor=check_count("ahead", ahead),
            pin_memory=pinned,
            worker_init_fn=_outlive_signals,
            # what it draws for its workers must not be drawn from the generator of training
            generator=torch.Generator().manual_seed(0),
        )
        self._batches: Iterator[Any] | None = iter(loader)

    def __iter__(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        return self

    def __next__(self) -> tuple[Tensor, dict[str, Tensor]]:
        if self._batches is None:
            raise StopIteration
        rows, x = next(self._batches)
        if isinstance(x, Exception):
            raise x
        return rows.to(self._device), {name: v.to(self._device, non_blocking=True) for name, v in x.items()}

    def close(self) -> None:
        """Ends the processes. May be called twice."""
        self._batches = None


# Seconds that a reading process stays after a SIGTERM
_GRACE = 60


def _outlive_signals(worker: int) -> None:
    """Ctrl-C and SIGTERM go to all processes of a job. The first one ends it when the iteration in hand is saved, and
    ends these processes; by themselves they would be a failure before that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_GRACE))


class _Rows(Sampler[Tensor]):
    """The rows of the batches to come."""

    def __init__(self, rows: Iterable[Tensor]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Tensor]:
        return (rows.cpu() for rows in self.rows)


class _Batches(Dataset[Any]):
    """Batches by their rows."""

    def __init__(self, data: MultimodalDataset, seed: int) -> None:
        self.data, self.seed = data, seed

    def __getitem__(self, rows: Any) -> tuple[Tensor, dict[str, Tensor] | Exception]:
        # the rows in their order, so that another order is another seed
        told = f"{self.seed} {rows.tolist()}".encode()
        seed = int.from_bytes(hashlib.blake2b(told, digest_size=4).digest(), "little")
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            return rows, self.data.batch(rows)
        except (OSError, TypeError, ValueError) as error:
            # raised here it would become a text with the worker's traceback in it
            return rows, error


def _stop(shared: _Shared) -> None:
    with shared.changed:
        shared.stopped = True
        shared.ready.clear()
        shared.failure = None
        shared.changed.notify_all()


def _work(shared: _Shared, data: MultimodalDataset, rows: Iterable[Tensor]) -> None:
    failure: BaseException | None = None
    try:
        for chosen in rows:
            with shared.changed:  # before the batch is made, so that no more than depth + 1 are in memory
                if shared.stopped:
                    return
            batch = data.batch(chosen)
            with shared.changed:
                shared.changed.wait_for(lambda: shared.stopped or len(shared.ready) < shared.depth)
                if shared.stopped:
                    return
                shared.ready.append((chosen, batch))
                shared.changed.notify_all()
    except BaseException as error:  # the consumer raises it
        failure = error
    finally:
        with shared.changed:
            shared.failure = None if shared.stopped else failure
            shared.finished = True
            shared.changed.notify_all()
