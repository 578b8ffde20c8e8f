"""Batches prepared ahead of time, so that decoding files and training overlap."""

from __future__ import annotations

import collections
import threading
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType

from torch import Tensor

from mmebm.data.base import MultimodalDataset, check_count

__all__ = ["Prefetch"]


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
