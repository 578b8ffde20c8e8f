"""Metrics as functions of the number of test-time steps, and of the seconds they take.

The number of Langevin steps at test is a setting of its own: published codes change it from training to test without
saying so. The noise is a function of (seed, chain, step, element), so the state after k steps of a long chain *is* the
sample of a run of k steps; one chain, stopped to be measured at each mark, gives the whole sweep.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from mmebm.data.base import check_count
from mmebm.evaluation.latent import System
from mmebm.state import Batch

__all__ = ["STEPS", "Chain", "data_chain", "latent_chain", "run_sweep"]

STEPS: Final = (0, 1, 5, 10, 20, 30, 60, 100)


class Chain(NamedTuple):
    """A chain that can be stopped and gone on with.

    ``start``: its first state. ``advance``: from a state, a number of steps and the number of the first of them to a
    result whose ``state`` is the state after them (:class:`mmebm.Samples`).
    """

    start: Any
    advance: Callable[[Any, int, int], Any]


def data_chain(system: System, n: int, *, seed: int, start: Batch | None = None) -> Chain:
    """The data chain of ``n`` tuples from ``start``, or from the generator: after k steps what ``run.sample(n, "xk",
    seed=seed, steps=k)`` gives of the run whose system this is, and whose ``run.start(n, seed=seed)`` that is."""
    return Chain(
        system.generate(n, seed=seed) if start is None else dict(start),
        lambda x, steps, first: system.revise_data(x, seed=seed + 1, steps=steps, first_step=first),
    )


def latent_chain(system: System, given: Batch, *, seed: int) -> Chain:
    """The latent chain from q(z | given): after k steps the z from which ``system.complete(given, seed=seed,
    latent_steps=k)`` decodes."""
    with torch.no_grad():
        z = system.inference.sample(given, torch.Generator(system.device).manual_seed(seed))
    return Chain(z, lambda z, steps, first: system.revise_latent(z, given, seed=seed, steps=steps, first_step=first))


def run_sweep(
    chain: Chain, measure: Callable[[Any], Mapping[str, Any]], steps: Sequence[int] = STEPS
) -> list[dict[str, Any]]:
    """Runs ``chain`` once to the largest of ``steps`` and measures its state at each of them.

    Args:
        chain: see :func:`data_chain` and :func:`latent_chain`.
        measure: state -> plain data; its time does not count.
        steps: numbers of steps, in any order.

    Returns:
        A row per number of steps, ascending: ``steps``, ``seconds`` of the chain up to there (what the first call
        compiles or captures included), ``nonfinite``, how many chains have left the numbers by then, and what
        ``measure`` returned.

    Raises:
        TypeError, ValueError: if ``steps`` are none, or not integers of at least 0.
    """
    marks = sorted({check_count("steps", k, least=0) for k in steps})
    if not marks:
        raise ValueError("steps must name at least one number of steps, got none")
    state, at, seconds = chain.start, 0, 0.0
    broken: Tensor | None = None
    rows = []
    for k in marks:
        if k > at:
            _synchronise(state)
            started = time.perf_counter()
            out = chain.advance(state, k - at, at)
            _synchronise(out.state)
            seconds += time.perf_counter() - started
            state, at = out.state, k
            lost = out.info.get("nonfinite")
            if lost is not None:
                broken = lost if broken is None else broken | lost
        count = 0 if broken is None else int(broken.sum())
        rows.append({"steps": k, "seconds": seconds, "nonfinite": count, **measure(state)})
    return rows


def _synchronise(state: Any) -> None:
    first = next(iter(state.values())) if isinstance(state, Mapping) else state
    if isinstance(first, Tensor) and first.device.type == "cuda":
        torch.cuda.synchronize(first.device)
