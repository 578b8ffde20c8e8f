"""What it costs that a fused chain is compared with the user's energy before it is trusted (mmebm/samplers/verify.py).

    python -m pytest benchmarks/bench_verify.py --benchmark-only

A round is the first 128 calls of an energy (four of them are checked), or as many iterations of a training loop; "first
call" is one call of an energy that was not seen before. The row "verified" is below 1 by what the checks cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmebm import Langevin
from mmebm.samplers import verify

CALLS = 128
SIZES = {"100 x 2, MLP 2-64-64-1, 100 steps": (2, 64, 100), "100 x 64, MLP 64-200-200-1, 60 steps": (64, 200, 60)}


def network(inputs: int, hidden: int) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 1)]
    return nn.Sequential(*layers)


def chains(net: nn.Module, x: Tensor, steps: int, calls: int) -> Tensor:
    verify._entries.clear()
    sampler = Langevin(1e-3)
    for i in range(calls):
        out = sampler.sample(net, x, steps, seed=i)
    assert out.info["op"] == "langevin_mlp", out.info["reason"]
    return out.state


def training(net: nn.Module, x: Tensor, steps: int, calls: int) -> Tensor:
    verify._entries.clear()
    sampler, optimiser = Langevin(1e-3), torch.optim.SGD(net.parameters(), 1e-4)
    for i in range(calls):
        y = sampler.sample(net, x, steps, seed=i).state
        optimiser.zero_grad()
        (net(x).mean() - net(y).mean()).backward()
        optimiser.step()
    return y


@pytest.mark.parametrize("verified", [False, True], ids=["trusted", "verified"])
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(
    ("what", "run", "calls"),
    [("first call", chains, 1), ("128 calls", chains, CALLS), ("training loop, 128 iterations", training, CALLS)],
)
def test_verification(
    benchmark: Any,
    measure: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    run: Callable[..., Tensor],
    calls: int,
    name: str,
    verified: bool,
) -> None:
    inputs, hidden, steps = SIZES[name]
    x = torch.randn(100, inputs, generator=torch.Generator().manual_seed(1))
    compared: list[str] = []
    original = verify.Check._compare
    monkeypatch.setattr(
        verify.Check, "_compare", lambda self, t, where: compared.append(where) or original(self, t, where)
    )
    checked = run(network(inputs, hidden), x, steps, calls)
    assert len(compared) == (2 if calls == 1 else 8)  # the gate: both rows compute the same, one of them checks
    monkeypatch.undo()
    if not verified:
        monkeypatch.setattr(verify.Check, "before", lambda self, tensors: None)
        monkeypatch.setattr(verify.Check, "after", lambda self, tensors: None)
    assert torch.equal(run(network(inputs, hidden), x, steps, calls), checked)
    net = network(inputs, hidden)
    benchmark.group = f"verification, {what}: {name}"
    benchmark.extra_info.update(implementation="verified" if verified else "trusted", baseline=not verified)
    measure(lambda: run(net, x, steps, calls), calls)
