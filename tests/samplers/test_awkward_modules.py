"""Modules that cannot take a flag, and inference tensors wherever they hide: the chain is the hand-written one, and
every module is as it was."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from mmebm.samplers import HMC, Langevin, ParallelTempering, Underdamped
from mmebm.samplers.user_modules import _flags

SAMPLERS: dict[str, Any] = {
    "Langevin": Langevin(0.05),
    "loop": Langevin(0.05, backend="torch"),
    "MALA": Langevin(0.05, accept="metropolis"),
    "HMC": HMC(0.1, 2),
    "Underdamped": Underdamped(0.1),
    "ParallelTempering": ParallelTempering(0.05, (1.0, 2.0)),
}
every = pytest.mark.parametrize("name", SAMPLERS)


@pytest.fixture(autouse=True)
def nothing_held() -> Iterator[None]:
    yield
    assert not _flags


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Dropout(0.5), nn.Linear(8, 1))


def by_hand(energy: Callable[[Tensor], Tensor], x: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        x = x.detach().requires_grad_()
        x = x - 0.05 * torch.autograd.grad(energy(x).sum(), x)[0]
    return x.detach()


def plain(net: nn.Module) -> nn.Module:
    return net


def non_leaf(net: nn.Module) -> nn.Module:
    """As learners of fast weights do."""
    for layer in (net[0], net[3]):  # type: ignore[index]
        layer._parameters["weight"] = layer.weight * 1.0
    return net


def lazy(net: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(1))


def deep(net: nn.Module) -> nn.Module:
    for _ in range(200):
        net = nn.Sequential(net)
    return net


def shared(net: nn.Module) -> nn.Module:
    return nn.ModuleList([net, nn.ModuleList([net])])[0]


class Data(nn.Module):
    """A wrapper as DataParallel and its relatives are: another name for each parameter, state of its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.register_forward_pre_hook(lambda m, a: None)

    def forward(self, *args: Any) -> Any:
        return self.module(*args)


def sparse(net: nn.Module) -> nn.Module:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(net[0].weight.detach().to_sparse())  # type: ignore[index]

        def forward(self, x: Tensor) -> Tensor:
            return torch.sparse.mm(self.weight, x.T).square().sum(0)

    return Sparse()


def quantised(net: nn.Module) -> nn.Module:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(
                torch.quantize_per_tensor(net[0].weight.detach(), 0.01, 0, torch.qint8),
                requires_grad=False,  # type: ignore[index]
            )

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.dequantize()).square().sum(1)

    return Quantised()


AWKWARD: dict[str, Callable[[nn.Module], Any]] = {
    "plain": plain,
    "non-leaf parameters": non_leaf,
    "scripted": lambda net: torch.jit.script(net),
    "traced": lambda net: torch.jit.trace(net.eval(), torch.zeros(5, 4)),
    "frozen script": lambda net: torch.jit.freeze(torch.jit.script(net.eval())),
    "lazy": lazy,
    "deep": deep,
    "shared": shared,
    "wrapper": Data,
    "DataParallel": nn.DataParallel,
    "sparse": sparse,
    "quantised": quantised,
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "weight norm": lambda net: nn.Sequential(parametrizations.weight_norm(net[0]), *net[1:]),
    "spectral norm": lambda net: nn.Sequential(parametrizations.spectral_norm(net[0]), *net[1:]),
    "weight norm by hooks": lambda net: nn.Sequential(nn.utils.weight_norm(net[0]), *net[1:]),
    "half frozen": lambda net: (net[0].requires_grad_(False), net)[1],
}


def look(net: nn.Module) -> list[Any]:
    """Flags, gradients and hooks of every module and parameter."""
    return [
        *((getattr(m, "training", None), type(m), len(m._forward_hooks)) for m in net.modules()),
        *((id(p), p.requires_grad, p.grad) for p in net.parameters()),
    ]


@pytest.mark.parametrize("kind", AWKWARD)
@every
def test_awkward_modules(kind: str, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (FutureWarning, UserWarning, DeprecationWarning))
        net, x = AWKWARD[kind](mlp()), torch.randn(5, 4)
        if kind == "lazy":
            other = AWKWARD[kind](mlp())
            SAMPLERS[name].sample(other, x, 1)  # initialised by the chain
            assert not any(nn.parameter.is_lazy(p) for p in other.parameters())
            assert all(m.training and p.requires_grad for m in other.modules() for p in other.parameters())
            net(x)
        before = look(net)
        energy = lambda x: net(x).flatten(1).sum(1) if net(x).dim() > 1 else net(x)
        out = SAMPLERS[name].sample(energy, x, 3, seed=0)
        assert bool(out.state.isfinite().all()) and not out.state.requires_grad
        assert look(net) == before
        if name in ("Langevin", "loop"):
            sampler = SAMPLERS[name].replace(noise_scale=0.0)
            for way in (net, energy, functools.partial(lambda m, x: m(x), net)):
                got = sampler.sample(way, x, 3).state
                assert look(net) == before
                flags = [(m, m.training) for m in net.modules() if hasattr(m, "training")]
                for m, _ in flags:
                    m.training = False
                torch.testing.assert_close(got, by_hand(net, x, 3), rtol=1e-5, atol=1e-6)
                for m, flag in flags:
                    m.training = flag
            got = sampler.sample(lambda x, nets: nets["a"][0](x), x, 3, kwargs={"nets": {"a": [net]}}).state
            assert look(net) == before and bool(got.isfinite().all())


def test_spectral_norm_in_train_mode_iterates_as_by_hand() -> None:
    """The power iteration moves once a step in train mode, and in eval mode not at all."""
    x = torch.randn(5, 4)
    for mode, steps in (("train", 3), ("keep", 3), ("eval", 0)):
        nets = []
        for _ in range(2):
            torch.manual_seed(0)
            nets.append(nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 1)))
        ours, theirs = nets
        got = Langevin(0.05, 0.0, mode=mode).sample(ours, x, 3).state
        theirs.train(steps > 0)
        torch.testing.assert_close(got, by_hand(theirs, x, 3), rtol=1e-6, atol=1e-6)
        assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True))


class Refuses(nn.Linear):
    """A module that does not take its flag back."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "training" and value is True and "training" in self.__dict__ and not self.__dict__.get("open", True):
            raise RuntimeError("this module stays")
        super().__setattr__(name, value)


@every
def test_one_module_that_refuses_does_not_keep_the_others(name: str) -> None:
    net = nn.Sequential(nn.Linear(4, 4), Refuses(4, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    net[1].__dict__["open"] = False
    with pytest.raises(RuntimeError, match="this module stays"):
        SAMPLERS[name].sample(net, torch.randn(3, 4), 2)
    assert [m.training for m in net.modules()] == [True, True, False, True, True]


@every
def test_an_energy_may_take_gradients_of_its_parameters(name: str) -> None:
    """What frozen parameters made an error: the energy of a gradient."""
    net = nn.Linear(4, 1)

    def energy(x: Tensor) -> Tensor:
        loss = net(x.detach()).square().mean()
        (grad,) = torch.autograd.grad(loss, net.weight)
        return (x - grad).square().sum(1)

    out = SAMPLERS[name].sample(energy, torch.randn(3, 4), 2)
    assert bool(out.state.isfinite().all()) and net.weight.grad is None


# ---------------------------------------------------------------------------------------------------------------------
# Inference tensors
# ---------------------------------------------------------------------------------------------------------------------


class Fields:
    """A tensor in a long list, which no search looks into."""

    def __init__(self, t: Tensor) -> None:
        self.rows = [t] * 300

    def __call__(self, x: Tensor) -> Tensor:
        return ((x - self.rows[7]).square() * self.rows[9].square()).sum(1)


def convolution() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2), nn.Flatten(), nn.BatchNorm1d(3), nn.Linear(3, 1)
    )


def bilinear() -> Callable[[Tensor], Tensor]:
    torch.manual_seed(0)
    net = nn.Bilinear(4, 4, 1)
    return lambda x: net(x, x)


HELD: dict[str, Callable[[Tensor], Any]] = {
    "closure": lambda t: lambda x: ((x - t).square() * t.square()).sum(1),
    "default": lambda t: lambda x, t=t: (x * t * t.exp() + x.square()).sum(1),
    "partial": lambda t: functools.partial(lambda x, t: (x * t * t + x.square()).sum(1), t=t),
    "field": Fields,
    "weights": lambda t: mlp(),
    "convolution": lambda t: convolution(),
    "bilinear": lambda t: bilinear(),
    "einsum": lambda t: lambda x: torch.einsum("bi,i->b", x, t) + x.square().sum(1),
    "concatenated": lambda t: lambda x: torch.cat([x * t, x], 1).square().sum(1),
    "in place": lambda t: lambda x: x.clone().mul_(t).add_(t).square().sum(1),
    "attention": lambda t: (
        lambda x: (
            F.scaled_dot_product_attention(x[:, None], t[None, None], t[None, None]).sum((1, 2))
            + (x * t).square().sum(1)
        )
    ),
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("where", HELD)
@every
def test_inference_tensors_that_an_energy_holds(name: str, where: str, inside: bool) -> None:
    """As Lightning's validation step makes them: the chain is that of ordinary tensors, in and outside of the mode."""
    t, x = torch.linspace(-1, 1, 4), torch.randn(5, 4)
    wanted = SAMPLERS[name].sample(HELD[where](t), x, 3, seed=0).state
    with torch.inference_mode():
        energy = HELD[where](t.clone())
        if inside:
            got = SAMPLERS[name].sample(energy, x.clone(), 3, seed=0).state
    if not inside:
        got = SAMPLERS[name].sample(energy, x, 3, seed=0).state
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    assert not got.is_inference()


def test_inference_tensors_in_scores_finishes_and_differentiable_chains() -> None:
    x = torch.randn(5, 4)
    with torch.inference_mode():
        t = torch.randn(4)

    def slope(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(((x - t).square() * t).sum(), x)[0]

    got = Langevin(0.05, 0.0, score=True).sample(lambda x: -slope(x), x, 2).state
    torch.testing.assert_close(got, by_hand(lambda x: (x - t.clone()).square() * t.clone(), x, 2))
    out = Langevin(0.05, 0.0, finish=lambda x: x - slope(x)).sample(lambda x: x.square().sum(1), x, 1).state
    y = 0.9 * x
    torch.testing.assert_close(out, y - 2 * (y - t.clone()) * t.clone())
    start = x.clone().requires_grad_()
    Langevin(0.05).sample(lambda x: ((x - t).square() * t).sum(1), start, 2, differentiable=True).state.sum().backward()
    assert start.grad is not None and bool(start.grad.abs().sum() > 0)


def test_what_writes_to_inference_tensors_is_torchs_error_or_writes() -> None:
    """A copy must not swallow what an energy writes."""
    with torch.inference_mode():
        t, net = torch.ones(4), nn.BatchNorm1d(4)
        mean, variance = torch.zeros(4), torch.ones(4)

    def adds(x: Tensor) -> Tensor:
        (x * t).square()
        t.add_(1)
        return x.sum(1)

    for energy, mode in ((adds, "eval"), (net, "train")):
        with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
            Langevin(0.05, mode=mode).sample(energy, torch.randn(5, 4), 1)
    normalised = lambda x: F.batch_norm(x, mean, variance, training=True).square().sum(1)
    Langevin(0.05).sample(normalised, torch.randn(5, 4) + 3, 1)
    assert bool((mean > 0.05).all())  # torch's momentum of 0.1 times a mean of about 3


def train_under_data_parallel(folder: str, unused: bool) -> None:
    """Chains between the steps leave the reducer's books in order, and every parameter its gradient."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
    kept = []  # torch may wait for ever where a reducer goes while its thread waits for the interpreter's lock
    for name, sampler in SAMPLERS.items():
        net = nn.parallel.DistributedDataParallel(mlp(), find_unused_parameters=unused)
        kept.append(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        for _ in range(3):
            x = sampler.sample(net, torch.randn(5, 4), 2).state
            optimizer.zero_grad()
            net(x).mean().backward()
            assert all(p.grad is not None and p.requires_grad for p in net.parameters()), name
            optimizer.step()
        assert all(m.training for m in net.modules()), name
    print("trained", len(kept), flush=True)
    os._exit(0)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="no Gloo here")
@pytest.mark.parametrize("unused", [False, True])
def test_training_under_data_parallel_goes_on(unused: bool, tmp_path: Path) -> None:
    """In a process of its own, which ends without destructors."""
    code = (
        f"import importlib.util as u; s = u.spec_from_file_location('awkward', {__file__!r}); "
        f"m = u.module_from_spec(s); s.loader.exec_module(m); m.train_under_data_parallel({str(tmp_path)!r}, {unused})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and f"trained {len(SAMPLERS)}" in done.stdout, done.stderr
