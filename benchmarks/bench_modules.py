"""What it costs that parameters are not frozen while a chain runs (mmebm/samplers/user_modules.py): the loop on a
network whose parameters require gradients, and on the same network frozen by hand.

    python -m pytest benchmarks/bench_modules.py --benchmark-only

The row "trainable" is below 1 by what autograd writes down of the parameters; no gradient of theirs is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from mmebm import Langevin

STEPS = 60
SIZES = {"100 x 2, MLP 2-64-64-1": (2, 64), "100 x 64, MLP 64-200-200-1": (64, 200)}


class Watch(TorchFunctionMode):
    """Notes whether the weights that layers are called with require a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.open: set[bool] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            self.open.add(args[1].requires_grad)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("name", SIZES)
def test_loop(benchmark: Any, measure: Callable[..., None], name: str, trainable: bool) -> None:
    inputs, hidden = SIZES[name]
    torch.manual_seed(0)
    layers = [nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 1)]
    net, x = nn.Sequential(*layers), torch.randn(100, inputs)
    sampler = Langevin(1e-2, backend="torch", rng="torch")
    wanted = sampler.sample(net, x, STEPS, seed=0).state
    net.requires_grad_(trainable)
    with Watch() as watch:
        found = sampler.sample(net, x, STEPS, seed=0).state
    # the gate: the same chain, and the weights as the row says
    assert torch.equal(found, wanted) and watch.open == {trainable}
    assert all(p.grad is None for p in net.parameters())
    benchmark.group = f"parameters in the loop: {name}, {STEPS} steps"
    benchmark.extra_info.update(implementation="trainable" if trainable else "frozen", baseline=not trainable)
    measure(lambda: sampler.sample(net, x, STEPS, seed=0), STEPS)
