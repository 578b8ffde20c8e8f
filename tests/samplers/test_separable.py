"""Chains in chunks are those of the whole, or an error."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmebm.samplers import Langevin, ParallelTempering


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 1))


NET, DATA = mlp(), torch.randn(9, 4)
SEPARABLE: dict[str, Any] = {
    "module": NET,
    "per chain": lambda x: NET(x).squeeze(1),
    "sum": lambda x: NET(x).sum(),
    "data": (lambda x, y: (x - y).square().sum(1), (DATA,)),
    "mean over elements": lambda x: NET(x).squeeze(1) + x.square().mean(1),
    "flat": lambda x: x.clamp(min=9).sum(1),
    "batch norm": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)),
    "large": lambda x: 1e4 * x.square().sum(1),
    "cancelling": lambda x: (x + 1e4).square().sum(1) - 1e8,
}
COUPLED: dict[str, Any] = {
    "mean": lambda x: NET(x).mean(),
    "mean of squares": lambda x: x.square().sum(1).mean(),
    "by the number of chains": lambda x: x.square().sum(1) / x.shape[0],
    "log of a sum": lambda x: -torch.logsumexp(NET(x).squeeze(1), 0),
    "centred": lambda x: (x - x.mean(0)).square().sum(1),
    "pairs": lambda x: torch.cdist(x, x).square().sum(1),
    "with data": (lambda x, y: (x - y).square().mean(), (DATA,)),
}


@pytest.mark.parametrize("start", ["zeros", "normal"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("name", SEPARABLE)
def test_chunks_of_separable_energies(name: str, backend: str, start: str) -> None:
    energy, args = SEPARABLE[name] if isinstance(SEPARABLE[name], tuple) else (SEPARABLE[name], ())
    x = torch.zeros(9, 4) if start == "zeros" else torch.randn(9, 4)
    sampler = Langevin(1e-3, backend=backend)
    whole, parts = (sampler.sample(energy, x, 3, args=args, seed=1, chunk_size=n).state for n in (None, 4))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", ["zeros", "normal"])
@pytest.mark.parametrize("chunk_size", [1, 4, 8])
@pytest.mark.parametrize("name", COUPLED)
def test_chunks_of_coupled_energies_are_an_error(name: str, chunk_size: int, start: str) -> None:
    energy, args = COUPLED[name] if isinstance(COUPLED[name], tuple) else (COUPLED[name], ())
    x = torch.zeros(9, 4) if start == "zeros" else torch.randn(9, 4)
    Langevin(1e-3).sample(energy, x, 1, args=args, chunk_size=9)  # all at once is one chunk
    with pytest.raises(ValueError, match=f"chunk_size={chunk_size} would change the chain"):
        Langevin(1e-3).sample(energy, x, 1, args=args, chunk_size=chunk_size)


def test_scores_are_looked_at_too() -> None:
    with pytest.raises(ValueError, match="would change the chain"):
        Langevin(0.1, score=True).sample(lambda x: -x / x.shape[0], torch.randn(9, 4), 1, chunk_size=4)
    Langevin(0.1, score=True).sample(lambda x: -x, torch.randn(9, 4), 1, chunk_size=4)


def test_looking_changes_no_random_numbers_and_no_buffers() -> None:
    """An energy that draws is not judged, and what it would draw, and statistics in train mode, are left alone."""

    def draws(x: Tensor) -> Tensor:
        return (x * torch.randn_like(x) * random.random()).sum(1)

    seen: list[Callable[[], Any]] = []
    for chunk_size in (4, 9):
        torch.manual_seed(0)
        random.seed(0)
        Langevin(0.1).sample(draws, torch.zeros(9, 4), 0, seed=0, chunk_size=chunk_size)
        seen.append((torch.get_rng_state().tolist(), random.getstate()))  # type: ignore[arg-type]
    assert seen[0] == seen[1]
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))
    Langevin(0.1, mode="train").sample(net, torch.randn(8, 4), 1, chunk_size=4)
    assert int(net[0].num_batches_tracked) == 2  # one step of two chunks


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_a_closure_over_rows_of_all_chains_is_an_error(chunk_size: int) -> None:
    """One chain alone would be drawn to all rows."""
    with pytest.raises((ValueError, RuntimeError), match="size of tensor"):
        Langevin(1e-3).sample(lambda x: (x - DATA).square().sum(), torch.zeros(9, 4), 1, chunk_size=chunk_size)
    # written for one chain alone
    alone = lambda x: (x.reshape(4) - DATA[0]).square().sum()
    Langevin(1e-3).sample(alone, torch.zeros(9, 4), 1, chunk_size=1)


def regression(w: Tensor, inputs: Tensor, *, outputs: Tensor) -> Tensor:
    """Of weights (chains, d), on data that all chains share."""
    return (w @ inputs.mT - outputs).square().sum(-1).reshape(len(w))


@pytest.mark.parametrize("rows", [8, 9, 10])
def test_data_that_all_chains_share(rows: int, seed: int) -> None:
    """As many data as chains are an error, not one datum for each chain."""
    torch.manual_seed(seed)
    w, inputs, outputs = torch.randn(9, 4), torch.randn(rows, 4), torch.randn(rows)
    given: dict[str, Any] = {"args": (inputs,), "kwargs": {"outputs": outputs}, "seed": seed}
    closed = lambda w: regression(w, inputs, outputs=outputs)
    for sampler, cut in ((Langevin(1e-3), {"chunk_size": 4}), (ParallelTempering(1e-3, [1.0, 2.0]), {})):
        expected = sampler.sample(closed, w, 3, seed=seed, **cut).state
        shared = given
        if rows == len(w):
            with pytest.raises(ValueError, match=r"args\[0\], kwargs\['outputs'\]"):
                sampler.sample(regression, w, 3, **given, **cut)
            shared = {"args": (inputs[None],), "kwargs": {"outputs": outputs[None]}, "seed": seed}
        # matrices of one row more are multiplied otherwise
        torch.testing.assert_close(sampler.sample(regression, w, 3, **shared, **cut).state, expected)


def test_arguments_of_each_chain_are_repeated_for_its_replicas(seed: int) -> None:
    torch.manual_seed(seed)
    sampler, energy = ParallelTempering(1e-2, [1.0, 2.0]), lambda x, y: (x - y).square().sum(1)
    expected = sampler.sample(lambda x: energy(x, DATA.repeat_interleave(2, 0)), torch.zeros(9, 4), 3, seed=seed).state
    assert torch.equal(sampler.sample(energy, torch.zeros(9, 4), 3, args=(DATA,), seed=seed).state, expected)
    # nothing is said of a random energy, and of one that reads no chain's own
    for other in (
        lambda x, y: (x - y + torch.randn_like(x)).square().sum(1),
        lambda x, y: (x * x).sum(1) + 0 * y[0, 0],
    ):
        sampler.sample(other, torch.zeros(9, 4), 3, args=(DATA,), seed=seed)
