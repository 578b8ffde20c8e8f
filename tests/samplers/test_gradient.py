"""What a gradient may be and what an energy may do: views of the state, writes in place, complex values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmebm.samplers import HMC, MALA, Langevin, ParallelTempering, Underdamped

SAMPLERS: dict[str, Any] = {
    "Langevin": Langevin(0.05),
    "loop": Langevin(0.05, backend="torch"),
    "MALA": Langevin(0.05, accept="metropolis"),
    "HMC": HMC(0.1, 2),
    "Underdamped": Underdamped(0.1),
    "ParallelTempering": ParallelTempering(0.05, (1.0, 2.0)),
}
every = pytest.mark.parametrize("name", SAMPLERS)


class Saved(torch.autograd.Function):
    """Half the square, whose gradient is not a new tensor but the state itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return 0.5 * x.square().sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return ctx.saved_tensors[0]


class Turned(torch.autograd.Function):
    """x^T x / 2 of square states, whose gradient is a view of the state with other strides."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return 0.5 * (x * x.transpose(1, 2)).sum((1, 2))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return ctx.saved_tensors[0].transpose(1, 2)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "metropolis": {"accept": "metropolis"},
    "descent": {"accept": "descent"},
    "freeze": {"on_nonfinite": "freeze"},
    "before": {"noise_at": "before"},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_gradients_that_are_views_of_the_state(backend: str, option: str, seed: int) -> None:
    """In the step and in the ratio that decides, the gradient is that of the state before the step."""
    sampler = Langevin(0.3, backend=backend, **OPTIONS[option])
    x = torch.randn(50, 4, 4, generator=torch.Generator().manual_seed(seed))
    for aliasing, own in (
        (lambda x: Saved.apply(x.flatten(1)), lambda x: 0.5 * x.flatten(1).square().sum(1)),
        (Turned.apply, lambda x: 0.5 * (x * x.transpose(1, 2)).sum((1, 2))),
    ):
        got, wanted = (sampler.sample(energy, x, 4, seed=seed, record=("grad_norm",)) for energy in (aliasing, own))
        torch.testing.assert_close(got.state, wanted.state, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.trace["grad_norm"], wanted.trace["grad_norm"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_recorded_energies_that_are_views_of_the_state(backend: str, seed: int) -> None:
    x = torch.randn(1, 1)
    out = Langevin(0.1, backend=backend).sample(lambda x: x[0, 0], x, 3, seed=seed, record=("energy",), thin=1)
    before = torch.cat([x, out.trajectory[:-1, :, 0]])
    torch.testing.assert_close(out.trace["energy"], before[:, 0])


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("accept", [None, "descent"])
def test_observed_elements_stay_where_functions_work_in_place(backend: str, accept: Any, seed: int) -> None:
    """``project`` and ``finish`` that write into what they are given, and return it, another tensor, or a view."""
    x = {"a": torch.randn(6, 4), "b": torch.randn(6, 2)}
    mask = torch.rand(6, 4, generator=torch.Generator().manual_seed(seed)) > 0.5
    energy = lambda s: s["a"].square().sum(1) + s["b"].square().sum(1)
    given = {key: t.clone() for key, t in x.items()}

    def project(y: Tensor) -> Tensor:
        return y.mul_(0.5)

    def finish(s: dict[str, Tensor]) -> dict[str, Tensor]:
        for t in s.values():
            t.add_(7.0)
        return {key: t.view_as(t) for key, t in s.items()}

    sampler = Langevin(0.1, backend=backend, accept=accept, project=project, finish=finish)
    out = sampler.sample(energy, x, 3, seed=seed, observed={"a": mask, "b": True}, thin=1)
    assert torch.equal(out.state["a"][mask], x["a"][mask]) and torch.equal(out.state["b"], x["b"])
    assert all(torch.equal(rows[:, mask], x["a"][mask].expand(3, -1)) for rows in (out.trajectory["a"],))
    assert bool((out.state["a"][~mask] > 3).all())  # finish was at work
    assert all(torch.equal(x[key], given[key]) for key in x)
    # functions that do the same without writing
    pure = Langevin(
        0.1,
        backend=backend,
        accept=accept,
        project=lambda y: 0.5 * y,
        finish=lambda s: {k: t + 7 for k, t in s.items()},
    )
    again = pure.sample(energy, x, 3, seed=seed, observed={"a": mask, "b": True})
    torch.testing.assert_close(out.state["a"], again.state["a"])


@every
def test_an_energy_that_writes_to_the_state_is_an_error(name: str) -> None:
    def observed(s: dict[str, Tensor]) -> Tensor:
        s["b"].zero_()
        return (s["a"] - s["b"]).square().sum(1)

    def moving(s: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            s["a"].clamp_(-1, 1)
        return s["a"].square().sum(1)

    x = {"a": torch.randn(3, 2), "b": torch.randn(3, 2)}
    for energy, key in ((observed, "b"), (moving, "a")):
        with pytest.raises(ValueError, match=rf"energy must leave the state as it is; it wrote to state\['{key}'\]"):
            SAMPLERS[name].sample(energy, x, 2, observed={"b"})


@every
def test_complex_energies_are_an_error(name: str) -> None:
    with pytest.raises(TypeError, match=r"energy must return real numbers, got a tensor of torch\.complex64"):
        SAMPLERS[name].sample(lambda x: torch.complex(x, x).sum(1), torch.randn(3, 2), 1)


KEEPERS: dict[str, Any] = {
    "Langevin": Langevin(0.1),
    "in PyTorch": Langevin(0.1, backend="torch"),
    "noise first": Langevin(0.1, noise_at="before"),
    "frozen": Langevin(0.1, on_nonfinite="freeze"),
    "MALA": MALA(0.1),
    "descent": Langevin(0.1, accept="descent"),
    "HMC": HMC(0.1, 3),
    "Underdamped": Underdamped(0.1),
    "ParallelTempering": ParallelTempering(0.1, [1.0, 2.0]),
}


@pytest.mark.parametrize("name", KEEPERS)
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("blocks", [None, ["a", "b"]])
def test_what_an_energy_keeps_of_the_state_stays_what_it_is(
    name: str, every: int, blocks: list[str] | None, seed: int
) -> None:
    """A log without ``clone``, as in a loop that makes a new tensor at each step."""
    kept: list[tuple[Tensor, Tensor]] = []
    calls = [0]

    def energy(s: dict[str, Tensor]) -> Tensor:
        if calls[0] % every == 0:
            kept.extend((t.detach(), t.detach().clone()) for t in s.values())
        calls[0] += 1
        return s["a"].square().sum(1) + (s["a"] * s["b"]).sum(1) + s["b"].square().sum(1)

    if blocks is not None and not isinstance(KEEPERS[name], Langevin):
        pytest.skip("blocks are Langevin's")
    turns = {} if blocks is None else {"blocks": blocks}
    start = {"a": torch.randn(5, 4), "b": torch.randn(5, 4)}
    KEEPERS[name].sample(energy, start, 7, seed=seed, **turns)
    assert calls[0] >= 7 and len(kept) >= 2 * 7 // every
    assert all(torch.equal(t, copy) for t, copy in kept)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_what_project_keeps_of_the_state_stays_what_it_is(backend: str, seed: int) -> None:
    kept: list[tuple[Tensor, Tensor]] = []

    def project(x: Tensor) -> Tensor:
        kept.append((x.detach(), x.detach().clone()))
        return x

    sampler = Langevin(0.1, project=project, backend=backend)
    start = torch.randn(5, 4)
    x = sampler.sample(lambda x: x.square().sum(1), start, 5, seed=seed).state
    assert all(torch.equal(t, copy) for t, copy in kept) and torch.equal(kept[-1][0], x)
    plain = sampler.replace(project=None).sample(lambda x: x.square().sum(1) + 0 * x.prod(1), start, 5, seed=seed)
    torch.testing.assert_close(x, plain.state)


@pytest.mark.parametrize("options", [{}, {"accept": "metropolis"}, {"score": True}])
def test_what_is_kept_later_in_a_langevin_chain_stays_what_it_is(options: dict[str, Any], seed: int) -> None:
    kept: list[tuple[Tensor, Tensor]] = []
    calls = [0]

    def energy(x: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] > 3:
            kept.append((x.detach(), x.detach().clone()))
        return -x if "score" in options else x.square().sum(1)

    start = torch.randn(5, 4)
    x = Langevin(0.1, **options).sample(energy, start, 7, seed=seed).state
    assert len(kept) >= 4 and all(torch.equal(t, copy) for t, copy in kept)
    forgets = (lambda x: -x) if "score" in options else lambda x: x.square().sum(1)
    assert torch.equal(x, Langevin(0.1, **options, backend="cpp").sample(forgets, start, 7, seed=seed).state)


def test_an_energy_that_keeps_the_state_later_is_told(seed: int) -> None:
    kept: list[Tensor] = []
    calls = [0]

    def energy(x: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] > 3:
            kept.append(x.detach())
        return x.square().sum(1)

    with pytest.warns(RuntimeWarning, match="the energy keeps the state that it was given"):
        HMC(0.1, 3).sample(energy, torch.randn(5, 4), 3, seed=seed)
    assert not any(torch.equal(t, kept[-1]) for t in kept[1:-1])
