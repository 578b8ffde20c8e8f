"""Batches ahead of time, by a thread or by processes: the same ones, a bounded number, exceptions where they belong,
and nobody left behind."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from mmebm.data import Modality, MultimodalDataset, Prefetch, WorkerBatches, from_dataset


class Counting:
    """A pool whose instance ``i`` is ``(i,)``; it counts its calls, and fails for row ``broken``."""

    def __init__(self, n: int, broken: int = -1) -> None:
        self.n, self.broken, self.calls = n, broken, 0

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.n, 1)

    def __len__(self) -> int:
        return self.n

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.broken in rows.tolist():
            raise ValueError(f"file {self.broken} cannot be read")
        return rows.float()[:, None]


def dataset(pool: Counting) -> MultimodalDataset:
    nobody = torch.full((pool.n,), -1)
    return MultimodalDataset(
        "counting",
        "train",
        0,
        (Modality("x", (1,), "vector"),),
        (),
        {"x": pool},
        {"x": nobody},
        torch.arange(pool.n)[:, None],
        nobody,
    )


def eventually(condition) -> bool:
    """Whether ``condition()`` becomes true within ten seconds, far longer than it can take."""
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    return condition()


def threads() -> int:
    return sum(thread.name == "mmebm-prefetch" for thread in threading.enumerate())


@pytest.mark.parametrize("depth", [1, 3])
def test_batches_are_those_of_a_plain_loop(seed: int, depth: int) -> None:
    data = dataset(Counting(50))

    def rows() -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        for size in range(12):
            yield torch.randint(50, (size,), generator=generator)

    seen = list(Prefetch(data, rows(), depth=depth))
    assert len(seen) == 12
    for (chosen, batch), expected in zip(seen, rows()):
        assert torch.equal(chosen, expected) and torch.equal(batch["x"], expected.float()[:, None])
    assert eventually(lambda: threads() == 0)


def test_no_more_than_depth_batches_and_one_are_prepared() -> None:
    pool = Counting(100)
    with Prefetch(dataset(pool), (torch.tensor([i]) for i in range(100)), depth=2) as batches:
        assert eventually(lambda: pool.calls == 3)
        next(batches)
        assert eventually(lambda: pool.calls == 4)
        time.sleep(0.05)  # it would run on here
        assert pool.calls == 4
    assert threads() == 0 and pool.calls == 4
    with pytest.raises(StopIteration):
        next(batches)
    batches.close()


def test_an_exception_comes_after_the_batches_before_it() -> None:
    batches = Prefetch(dataset(Counting(9, broken=2)), (torch.tensor([i]) for i in range(9)), depth=5)
    assert [int(next(batches)[0]) for _ in range(2)] == [0, 1]
    with pytest.raises(ValueError, match="file 2 cannot be read"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)
    assert eventually(lambda: threads() == 0)


def test_an_exception_of_the_rows_surfaces_too() -> None:
    def rows() -> Iterator[torch.Tensor]:
        yield torch.tensor([0])
        raise RuntimeError("no more rows")

    with Prefetch(dataset(Counting(3)), rows()) as batches:
        next(batches)
        with pytest.raises(RuntimeError, match="no more rows"):
            next(batches)
    with Prefetch(dataset(Counting(3)), [torch.tensor([3])]) as batches, pytest.raises(IndexError):
        next(batches)


def test_dropping_the_last_reference_ends_the_thread() -> None:
    batches = Prefetch(dataset(Counting(9)), (torch.tensor([i % 9]) for i in range(10**6)))
    next(batches)
    assert threads() == 1
    del batches
    gc.collect()
    assert eventually(lambda: threads() == 0)


def test_leaving_by_an_exception_ends_the_thread() -> None:
    with pytest.raises(KeyError), Prefetch(dataset(Counting(9)), (torch.tensor([i % 9]) for i in range(10**6))):
        raise KeyError
    assert threads() == 0


@pytest.mark.parametrize(("depth", "error"), [(0, ValueError), (1.5, TypeError)])
def test_depth_is_checked(depth: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="depth must be"):
        Prefetch(dataset(Counting(1)), [], depth=depth)  # type: ignore[arg-type]


def coming(n: int, seed: int, batches: int = 7) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(n, (5,), generator=rng) for _ in range(batches)]


class Restless(torch.utils.data.Dataset):
    """Items with an augmentation from each of the three global generators."""

    def __len__(self) -> int:
        return 30

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        drawn = [float(i), random.random(), np.random.random(), float(torch.rand(()))]
        return {"x": np.array(drawn, np.float32)}


@pytest.mark.parametrize("threads", [0, 2])
def test_worker_processes_give_the_same_batches_however_many_they_are(threads: int, seed: int) -> None:
    data = from_dataset(Restless(), workers=threads)
    data.batch(torch.arange(3))  # its threads are there before the processes are
    rows, states = coming(30, seed), (random.getstate(), torch.get_rng_state())
    found = []
    for workers in (1, 2):
        batches = WorkerBatches(data, rows, workers=workers, seed=seed)
        found.append(list(batches))
        batches.close()
        batches.close()
        assert next(batches, None) is None
    for (a, x), (b, y), expected in zip(*found, rows, strict=True):
        assert torch.equal(a, expected) and torch.equal(b, expected) and torch.equal(x["x"], y["x"])
        assert torch.equal(x["x"][:, 0], expected.float())
    drawn = torch.cat([x["x"][:, 1:] for _, x in found[0]])
    assert len(drawn.unique(dim=0)) == len(drawn)  # no two items draw the same
    # a run that goes on behind the third batch has the others as they would have been
    rest = list(WorkerBatches(data, rows[3:], workers=2, seed=seed))
    assert all(torch.equal(x["x"], y["x"]) for (_, x), (_, y) in zip(rest, found[0][3:], strict=True))
    other = next(WorkerBatches(data, rows, workers=1, seed=seed + 1))[1]
    assert not torch.equal(other["x"], found[0][0][1]["x"])
    # nothing that training draws depends on it
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_outlive_signals_to_a_whole_job(seed: int, number: int) -> None:
    """As a terminal and batch systems send them: the iteration in hand still wants its batches."""
    batches = WorkerBatches(dataset(Counting(20)), coming(20, seed, 50), workers=2)
    next(batches)
    children = multiprocessing.active_children()
    for child in children:
        os.kill(child.pid or 0, number)
    time.sleep(0.2)
    assert len([next(batches) for _ in range(30)]) == 30
    assert all(child.is_alive() for child in children)
    batches.close()
    del batches
    gc.collect()
    assert eventually(lambda: not any(child.is_alive() for child in children))


def test_worker_processes_end_and_their_errors_arrive(seed: int) -> None:
    batches = WorkerBatches(dataset(Counting(20, broken=7)), [torch.tensor([1]), torch.tensor([6, 7])], workers=1)
    assert next(batches)[1]["x"].tolist() == [[1.0]]
    with pytest.raises(ValueError, match=r"^file 7 cannot be read$"):
        next(batches)
    batches.close()
    running = WorkerBatches(dataset(Counting(20)), coming(20, seed, 50), workers=2)
    next(running)
    assert len(multiprocessing.active_children()) >= 2
    running.close()
    del running
    gc.collect()
    deadline = time.monotonic() + 60
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()
    for options in ({"workers": 0}, {"workers": 1, "ahead": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            WorkerBatches(dataset(Counting(20)), [], **options)
