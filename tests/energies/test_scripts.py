"""Energies of TorchScript: their graphs are read, as other energies' code is."""

from collections.abc import Callable
from typing import Any, Dict, List  # noqa: UP035 (TorchScript of torch 2.4)

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmebm.energies import CannotLower
from mmebm.energies.trace import trace
from mmebm.samplers import Langevin


class Counts(nn.Module):
    """After six calls it is another energy."""

    n: int

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.n = nn.Conv1d(3, 7, 3), 0

    def forward(self, x):  # type: ignore[no-untyped-def]
        self.n += 1
        e = self.conv(x).square().sum((1, 2))
        if self.n > 6:
            e = e * 0.1
        return e


class Decays(nn.Module):
    n: float

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.n = nn.Conv1d(3, 7, 3), 1.0

    def forward(self, x):  # type: ignore[no-untyped-def]
        self.n *= 0.9
        return self.n * F.silu(self.conv(x)).sum((1, 2))


class Lists(nn.Module):
    log: List[int]  # noqa: UP006

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.log = nn.Conv1d(3, 7, 3), [0]

    def forward(self, x):  # type: ignore[no-untyped-def]
        log = self.log
        log += [1]
        return len(self.log) * F.silu(self.conv(x)).sum((1, 2))


class Dicts(nn.Module):
    log: Dict[str, int]  # noqa: UP006

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.log = nn.Conv1d(3, 7, 3), {"n": 0}

    def forward(self, x):  # type: ignore[no-untyped-def]
        self.log["n"] += 1
        return self.log["n"] * F.silu(self.conv(x)).sum((1, 2))


class NoGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.conv = nn.Conv1d(3, 7, 3), nn.Conv1d(3, 7, 3)

    def forward(self, x):  # type: ignore[no-untyped-def]
        with torch.no_grad():
            w = torch.sigmoid(self.gate(x))
        return (w * self.conv(x)).sum((1, 2))


class Outer(nn.Module):
    """The effect is in a module inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):  # type: ignore[no-untyped-def]
        return self.inner(x) + x.square().sum((1, 2))


class Prints(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 7, 3)

    def forward(self, x):  # type: ignore[no-untyped-def]
        print("called")
        return F.silu(self.conv(x)).sum((1, 2))


EFFECTS: dict[str, Callable[[], nn.Module]] = {
    "counts": Counts,
    "decays": Decays,
    "writes to a list": Lists,
    "writes to a dict": Dicts,
    "no gradient": NoGrad,
    "inside": lambda: Outer(Counts()),
    "prints": Prints,
}


@pytest.mark.parametrize("case", EFFECTS)
def test_scripts_with_effects_are_called_at_every_step(case: str) -> None:
    energies: list[Any] = []
    for _ in range(2):
        torch.manual_seed(0)
        energies.append(torch.jit.script(EFFECTS[case]()))
    x = torch.randn(4, 3, 5)
    with pytest.raises(CannotLower):
        trace(energies[0], x)
    got = Langevin(0.01, 0.0).sample(energies[0], x, 10, seed=0).state
    for _ in range(10):
        x = x.detach().requires_grad_()
        x = x - 0.01 * torch.autograd.grad(energies[1](x).sum(), x)[0]
    # float32, ten steps of order 0.1
    torch.testing.assert_close(got, x.detach(), rtol=1e-5, atol=1e-6)


class Pure(nn.Module):
    """Lists of its own, numbers that it reads, and errors that it may raise."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(3, 3, 3, padding=1) for _ in range(2))
        self.scale = 0.5

    def forward(self, x):  # type: ignore[no-untyped-def]
        if x.dim() != 3:
            raise ValueError("not three dimensions")
        terms = [x.square().sum((1, 2))]
        for layer in self.layers:
            x = F.relu(layer(x), inplace=True)
            terms.append(x.sum((1, 2)))
        return self.scale * terms[0] + terms[1] + terms[2]


@pytest.mark.parametrize("way", ["script", "frozen", "traced"])
def test_pure_scripts_are_found(way: str) -> None:
    torch.manual_seed(0)
    net, x = Pure().eval(), torch.randn(4, 3, 5)
    made: Any = torch.jit.trace(net, x) if way == "traced" else torch.jit.script(net)
    made = torch.jit.freeze(made) if way == "frozen" else made
    out = Langevin(0.01, 0.0).sample(made, x, 5, seed=0)
    assert out.info["op"] == "langevin_net"
    for _ in range(5):
        x = x.detach().requires_grad_()
        x = x - 0.01 * torch.autograd.grad(net(x).sum(), x)[0]
    torch.testing.assert_close(out.state, x.detach(), rtol=1e-5, atol=1e-6)
