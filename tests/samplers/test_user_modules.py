"""The user's modules during and after a chain: found wherever they hide, in the mode asked for, left as they were."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from mmebm.samplers import langevin
from mmebm.samplers.user_modules import modules_of, sampling


class Recorder(nn.Module):
    """An energy that notes in which mode it was called and whether its weight is as it was, not frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 1)
        self.calls: list[tuple[bool, bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append((self.training, self.inner.training, self.inner.weight.requires_grad))
        return self.inner(x)


class Holder:
    """Not callable; its method is the energy."""

    def __init__(self, net: nn.Module) -> None:
        self.nets = {"energy": [net]}

    def energy(self, x: Tensor) -> Tensor:
        return self.nets["energy"][0](x)


@dataclass
class Callable_:
    net: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        return self.net(x)


class Slotted:
    __slots__ = ("__weakref__", "net", "unset")

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def __call__(self, x: Tensor) -> Tensor:
        return self.net(x)


def scaled(net: nn.Module, x: Tensor, *, scale: float = 1.0) -> Tensor:
    return scale * net(x)


def decorated(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    @functools.wraps(function)
    def wrapper(x: Tensor) -> Tensor:
        return function(x)

    return wrapper


GLOBAL = Recorder()


def helper(x: Tensor) -> Tensor:
    return GLOBAL(x)


def closure(net: nn.Module) -> Callable[[Tensor], Tensor]:
    inner = lambda x: net(x)
    return lambda x: inner(x)


# every way to hand over an energy: a function of the module that returns (energy, args)
HIDING: dict[str, Callable[[nn.Module], tuple[Any, tuple[Any, ...]]]] = {
    "module": lambda net: (net, ()),
    "closure of a closure": lambda net: (closure(net), ()),
    "method of the module": lambda net: (net.forward, ()),
    "method of a holder": lambda net: (Holder(net).energy, ()),
    "closure of a holder": lambda net: ((lambda holder: lambda x: holder.energy(x))(Holder(net)), ()),
    "callable object": lambda net: (Callable_(net), ()),
    "object with slots": lambda net: (Slotted(net), ()),
    "partial": lambda net: (functools.partial(scaled, net, scale=2.0), ()),
    "partial of a method": lambda net: (functools.partial(Holder(net).energy), ()),
    "keyword of a partial": lambda net: (functools.partial(lambda x, net: net(x), net=net), ()),
    "decorated": lambda net: (decorated(closure(net)), ()),
    "default of an argument": lambda net: (lambda x, net=net: net(x), ()),
    "default of a keyword": lambda net: ((lambda x, *, nets=(net,): nets[0](x)), ()),
    "closure of a list": lambda net: ((lambda nets: lambda x: nets[0](x))([net]), ()),
    "argument": lambda net: (lambda x, net: net(x), (net,)),
    "argument inside a dict": lambda net: (lambda x, nets: nets["a"](x), ({"a": net},)),
}


@pytest.mark.parametrize("way", HIDING)
@pytest.mark.parametrize(
    ("mode", "training"), [("eval", (False, False)), ("train", (True, True)), ("keep", (True, False))]
)
def test_modules_are_found_and_put_in_mode(way: str, mode: Any, training: tuple[bool, bool]) -> None:
    net = Recorder()
    net.inner.eval()  # mixed flags
    energy, args = HIDING[way](net)
    langevin(energy, torch.randn(2, 3), 2, step_size=0.1, mode=mode, args=args)
    assert net.calls == [(*training, True)] * 2
    assert (net.training, net.inner.training) == (True, False)
    assert net.inner.weight.requires_grad and net.inner.bias.requires_grad


class NamesGlobal:
    """A callable object without fields, whose network is a global."""

    def __call__(self, x: Tensor) -> Tensor:
        return GLOBAL(x)


@pytest.mark.parametrize("energy", [lambda x: GLOBAL(x), helper, lambda x: helper(x), NamesGlobal()])
def test_modules_that_functions_name_as_globals(energy: Callable[[Tensor], Tensor]) -> None:
    GLOBAL.calls.clear()
    langevin(energy, torch.randn(2, 3), 1, step_size=0.1)
    assert GLOBAL.calls == [(False, False, True)]
    assert GLOBAL.training and GLOBAL.inner.weight.requires_grad


def test_each_module_once_and_cycles_end() -> None:
    net = nn.Linear(1, 1)
    ring: list[Any] = [net]
    ring.append(ring)
    assert modules_of(ring, net, {"a": net}) == [net]
    assert modules_of(None, 3, "abc", torch.zeros(2), torch.sin) == []


def test_long_containers_are_data_and_not_searched() -> None:
    class Long(list):
        def __iter__(self) -> Iterator[Any]:
            raise AssertionError("searched")

    assert modules_of(Long(range(10**4))) == []


def mixed() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Sequential(nn.Linear(4, 1), nn.BatchNorm1d(1)))
    net.train()
    net[1].eval()
    net[2][0].eval()
    net[0].weight.requires_grad_(False)
    net[2][1].bias.requires_grad_(False)
    return net


def flags(net: nn.Module) -> tuple[list[bool], list[bool]]:
    return [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]


@pytest.mark.parametrize("mode", ["eval", "train", "keep"])
@pytest.mark.parametrize("differentiable", [None, 1])
@pytest.mark.parametrize("raises", [False, True])
def test_mixed_flags_are_restored_also_when_the_energy_raises(mode: Any, differentiable: Any, raises: bool) -> None:
    net = mixed()
    before = flags(net)
    assert len(set(before[0])) == len(set(before[1])) == 2
    left = [2]

    def energy(x: Tensor) -> Tensor:
        left[0] -= 1
        if raises and left[0] < 0:
            raise KeyError("from the energy")
        return net(x)

    options = {"step_size": 0.1, "mode": mode, "differentiable": differentiable}
    run = functools.partial(langevin, energy, torch.randn(5, 3), 3, **options)
    if raises:
        with pytest.raises(KeyError, match="from the energy"):
            run()
    else:
        run()
    assert left[0] < 0
    assert flags(net) == before


def test_eval_mode_leaves_buffers_alone_and_train_mode_does_not() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    before = {name: t.clone() for name, t in net.state_dict().items()}
    langevin(net, torch.randn(6, 3), 3, step_size=0.1)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    langevin(net, torch.randn(6, 3), 3, step_size=0.1, mode="train")
    assert int(net[1].num_batches_tracked) == 3
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Parametrized weights: computed once for a chain in eval mode, never stale, never without their graph afterwards
# ---------------------------------------------------------------------------------------------------------------------


class Double(nn.Module):
    """A parametrization that counts how often it is evaluated."""

    calls = 0

    def forward(self, w: Tensor) -> Tensor:
        self.calls += 1
        return 2 * w


@pytest.mark.parametrize(("mode", "evaluations"), [("eval", 1), ("keep", 5), ("train", 5)])
def test_parametrizations_are_evaluated_once_a_chain_in_eval_mode(mode: Any, evaluations: int) -> None:
    net, double = nn.Linear(3, 1), Double()
    parametrize.register_parametrization(net, "weight", double)
    double.calls = 0
    langevin(net, torch.randn(2, 3), 5, step_size=0.1, mode=mode)
    assert double.calls == evaluations


SPECTRAL = {"parametrization": parametrizations.spectral_norm, "hook": torch.nn.utils.spectral_norm}


@pytest.mark.parametrize("kind", SPECTRAL)
def test_spectral_norm_follows_the_optimizer_and_not_the_chain(kind: str, seed: int) -> None:
    net = SPECTRAL[kind](nn.Linear(3, 1, bias=False)).double()
    net(torch.randn(4, 3, dtype=torch.float64))  # settles the power iteration of a rank-1 weight
    optimizer = torch.optim.SGD(net.parameters(), lr=0.7)
    x = torch.randn(4, 3, dtype=torch.float64)
    for _ in range(3):
        buffers = {name: t.clone() for name, t in net.state_dict().items()}
        out = langevin(net, x, 2, step_size=0.5, noise_scale=0.0)
        assert all(torch.equal(t, buffers[name]) for name, t in net.state_dict().items())
        net.eval()
        weight = net.weight.detach().clone()  # what the chain must have used
        net.train()
        torch.testing.assert_close(out, x - weight, rtol=1e-12, atol=1e-12)
        # and training still reaches the parameters, which move the weight
        optimizer.zero_grad()
        (net(out).sum() ** 2 + net(out + 1).square().sum()).backward()
        moved = next(net.parameters())
        assert moved.grad is not None and moved.grad.abs().sum() > 0
        optimizer.step()
        net(x)
        assert not torch.allclose(net.weight.detach(), weight, rtol=0, atol=1e-6)


def test_a_chain_inside_the_callers_cache_leaves_no_weights_without_graph(seed: int) -> None:
    net = parametrizations.weight_norm(nn.Linear(3, 1))
    with parametrize.cached():
        x = langevin(net, torch.randn(4, 3), 2, step_size=0.1)
        net(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    with parametrize.cached():
        net(torch.randn(4, 3)).sum()  # cached with its graph, before the chain
        kept = net.weight
        langevin(net, torch.randn(4, 3), 2, step_size=0.1)
        assert net.weight is kept and kept.requires_grad


def test_sampling_restores_modes_that_the_body_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no other thread may have changed them: one that an earlier test left does not count."""
    monkeypatch.setattr("threading.active_count", lambda: 1)
    net = mixed()
    before = flags(net)
    with pytest.raises(RuntimeError, match="body"), sampling([net], "eval"):
        net.train()
        raise RuntimeError("body")
    assert flags(net) == before


def test_modules_that_share_parameters_and_submodules() -> None:
    shared = nn.Linear(3, 1)
    a, b = nn.Sequential(shared), nn.Sequential(shared, nn.Tanh())
    shared.eval()
    langevin(lambda x: a(x) + b(x), torch.randn(2, 3), 2, step_size=0.1)
    assert not shared.training and a.training and b.training and shared.weight.requires_grad
