"""The user's modules during and after a chain: found wherever they hide, in the mode asked for, left as they were."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize

from mmebm.samplers import HMC, Langevin, Underdamped, langevin, schedules
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


@pytest.mark.parametrize(("mode", "evaluations"), [("eval", 1), ("keep", 5), ("train", 5)])
def test_spectral_norm_is_evaluated_once_a_chain_in_eval_mode(
    mode: Any, evaluations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = parametrizations.spectral_norm(nn.Linear(3, 1))
    kind, calls = type(net.parametrizations["weight"][0]), []
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, w: calls.append(1) or forward(self, w))
    Langevin(0.1, mode=mode, backend="torch").sample(net, torch.randn(2, 3), 5)
    assert len(calls) == evaluations


class Scaled(nn.Module):
    """A user's parametrization, with what a weight may depend on besides its original."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.schedule, self.table = 1.0, [1.0], torch.ones(())

    def forward(self, w: Tensor) -> Tensor:
        return self.scale * self.schedule[0] * self.table * w


class Growing(nn.Module):
    """A parametrization with a counter of its own, of Python or a buffer."""

    def __init__(self, buffer: bool) -> None:
        super().__init__()
        self.n = 0.0
        self.register_buffer("count", torch.zeros(()) if buffer else None)

    def forward(self, w: Tensor) -> Tensor:
        if self.count is None:
            self.n += 1.0
            return self.n * w
        self.count += 1
        return self.count * w


class Noisy(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w + 0.1 * torch.randn_like(w)


def normed() -> nn.Sequential:
    """Spectral norms with settled power iterations, and their flags in eval mode."""
    torch.manual_seed(0)
    norm = parametrizations.spectral_norm
    return nn.Sequential(norm(nn.Linear(3, 5)), nn.SiLU(), norm(nn.Linear(5, 1))).eval()


def parametrized(parametrization: nn.Module) -> nn.Sequential:
    net = normed()
    parametrize.register_parametrization(net[2], "bias", parametrization)
    parametrize.register_parametrization(net[0], "bias", parametrization)
    return net


def weights_of(net: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in net.named_parameters() if "original" in name]


def two_fast_weights() -> Callable[[Tensor], Tensor]:
    """One network called with two sets of weights, as ensembles and learners of fast weights do."""
    net = normed()
    first = {name: t.detach() for name, t in net.named_parameters()}
    second = {name: 2 * t + 0.1 for name, t in first.items()}
    return lambda x: functional_call(net, first, (x,)) + functional_call(net, second, (x,))


def own_and_fast_weights() -> Callable[[Tensor], Tensor]:
    net = normed()
    other = {name: 2 * t.detach() for name, t in net.named_parameters()}
    return lambda x: net(x) + functional_call(net, other, (x,))


def gradient_norm(**options: Any) -> Callable[[], Callable[[Tensor], Tensor]]:
    def make() -> Callable[[Tensor], Tensor]:
        net = normed()

        def energy(x: Tensor) -> Tensor:
            grads = torch.autograd.grad(net(x).sum(), weights_of(net), create_graph=True, **options)
            return sum(g.square().sum() for g in grads if g is not None) + 0.1 * x.square().sum(1)

        return energy

    return make


def gradients_by_the_weights_themselves() -> Callable[[Tensor], Tensor]:
    """A weight is another tensor at each access: the one that is asked for was not used, and None is its gradient."""
    net = normed()

    def energy(x: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(net(x).sum(), [net[0].weight], create_graph=True, allow_unused=True)
        return (0.0 if g is None else g.square().sum()) + x.square().sum(1)

    return energy


def two_graphs_that_are_freed() -> Callable[[Tensor], Tensor]:
    net = normed()

    def energy(x: Tensor) -> Tensor:
        losses = [net(x.detach()).square().mean(), net(x.detach() + 1).square().mean()]
        grads = [torch.autograd.grad(loss, weights_of(net))[0] for loss in losses]
        return (x - grads[0].mean() - grads[1].mean()).square().sum(1)

    return energy


def backward_into_the_parameters() -> Callable[[Tensor], Tensor]:
    net = normed()

    def energy(x: Tensor) -> Tensor:
        net(x.detach()).square().mean().backward()
        return (x - net[0].parametrizations["weight"].original.grad.mean()).square().sum(1)

    return energy


def gradients_of_each_sample() -> Callable[[Tensor], Tensor]:
    net = normed()
    weights = {name: t.detach() for name, t in net.named_parameters()}

    def of_one(t: Tensor) -> Tensor:
        grads = torch.func.grad(lambda p: functional_call(net, p, (t[None],)).sum())(weights)
        return sum(g.square().sum() for g in grads.values())

    return lambda x: torch.func.vmap(of_one)(x)


def ensemble() -> Callable[[Tensor], Tensor]:
    net = normed()
    weights = {name: torch.stack([t.detach(), 2 * t.detach()]) for name, t in net.named_parameters()}
    return lambda x: torch.func.vmap(lambda p: functional_call(net, p, (x,)).squeeze(1))(weights).sum(0)


def weight_changed_after_use() -> Callable[[Tensor], Tensor]:
    """What an energy does to the weight that it was given is gone at the next access."""
    net = normed()

    def energy(x: Tensor) -> Tensor:
        weight = net[0].weight
        with torch.no_grad():
            weight.mul_(3)
        return (x @ weight.T).square().sum(1) + net(x).squeeze(1)

    return energy


def branches_on_the_graph() -> Callable[[Tensor], Tensor]:
    net = normed()
    return lambda x: net(x).squeeze(1) * (2.0 if net[0].weight.requires_grad else 1.0)


def half_without_graph() -> Callable[[Tensor], Tensor]:
    net = normed()

    def energy(x: Tensor) -> Tensor:
        with torch.no_grad():
            net(x)
        return net(x).squeeze(1) * (2.0 if net[0].weight.requires_grad else 1.0)

    return energy


def attribute_set_by_the_energy() -> Callable[[Tensor], Tensor]:
    scaled = Scaled()
    net, calls = parametrized(scaled), [0]

    def energy(x: Tensor) -> Tensor:
        calls[0] += 1
        scaled.scale, scaled.schedule[0] = 1.0 / calls[0], 1.0 + calls[0]
        scaled.table.mul_(0.9)
        return net(x)

    return energy


def a_norm_in_train_mode_for_one_call() -> Callable[[Tensor], Tensor]:
    """Its power iteration moves."""
    net = normed()

    def energy(x: Tensor) -> Tensor:
        first = net(x)
        net[0].parametrizations.train()
        second = net(x)
        net[0].parametrizations.eval()
        return first + 2 * second

    return energy


def tied() -> Callable[[Tensor], Tensor]:
    """Two layers with one parametrization, and two that share the parametrized layer."""
    a = parametrizations.spectral_norm(nn.Linear(3, 3))
    b = nn.Linear(3, 3)
    parametrize.register_parametrization(b, "weight", a.parametrizations["weight"][0])
    net = nn.Sequential(a, nn.Tanh(), b, nn.Tanh(), a, nn.Linear(3, 1)).eval()
    return lambda x: net(x)


def nested() -> Callable[[Tensor], Tensor]:
    """A parametrized original, and a norm of what a user's parametrization gives."""
    growing, net = Growing(False), normed()
    parametrize.register_parametrization(net[0].parametrizations["weight"], "original", growing)
    parametrize.register_parametrization(net[2], "weight", growing)
    return lambda x: net(x)


# energies that are made anew by each call
OFTEN: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "two fast weights": two_fast_weights,
    "own and fast weights": own_and_fast_weights,
    "gradient norm": gradient_norm(),
    "gradient norm, some unused": gradient_norm(allow_unused=True),
    "gradients by the weights": gradients_by_the_weights_themselves,
    "two graphs that are freed": two_graphs_that_are_freed,
    "backward": backward_into_the_parameters,
    "gradients of each sample": gradients_of_each_sample,
    "an ensemble by vmap": ensemble,
    "weight changed after use": weight_changed_after_use,
    "branches on the graph": branches_on_the_graph,
    "half without graph": half_without_graph,
    "attribute set by the energy": attribute_set_by_the_energy,
    "counts in Python": lambda: parametrized(Growing(False)),
    "counts in a buffer": lambda: parametrized(Growing(True)),
    "random": lambda: parametrized(Noisy()),
    "train mode for one call": a_norm_in_train_mode_for_one_call,
    "tied": tied,
    "nested": nested,
}


def by_hand(energy: Callable[..., Tensor], x: Tensor, steps: int, after: Callable[[], None] = lambda: None) -> Tensor:
    for _ in range(steps):
        x = x.detach().requires_grad_()
        x = x - 0.05 * torch.autograd.grad(energy(x).sum(), x)[0]
        after()
    return x.detach()


@pytest.mark.parametrize("kind", OFTEN)
def test_a_weight_that_changes_within_a_chain_is_computed_again(kind: str) -> None:
    outs = []
    for ours in (True, False):
        torch.manual_seed(3)
        energy, x = OFTEN[kind](), torch.randn(4, 3)
        torch.manual_seed(5)  # of the parametrization that draws
        outs.append(Langevin(0.05, 0.0).sample(energy, x, 5, seed=0).state if ours else by_hand(energy, x, 5))
    # float32, over five steps of order 0.1: sums in another order
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sampler", [HMC(0.1, 3), Langevin(0.05, accept="metropolis"), Underdamped(0.1)])
@pytest.mark.parametrize("kind", [kind for kind in OFTEN if kind not in ("random", "counts in Python", "nested")])
def test_other_samplers_compute_weights_as_often_as_needed(sampler: Any, kind: str) -> None:
    """Where every weight is computed at each call: ``mode="keep"`` of modules in eval mode."""
    outs = []
    for mode in ("eval", "keep"):
        torch.manual_seed(3)
        energy, x = OFTEN[kind](), torch.randn(4, 3)
        outs.append(sampler.replace(mode=mode).sample(lambda x, energy=energy: energy(x).flatten(), x, 4, seed=0).state)
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-6)


def rebound(p: Tensor) -> None:
    p.data = 0.5 * p.data


def doubled(p: Tensor) -> None:
    with torch.no_grad():
        p.mul_(1.1)


@pytest.mark.parametrize("sampler", [Langevin(0.05, 0.0), Langevin(0.05, 0.0, backend="torch")])
@pytest.mark.parametrize("write", [doubled, rebound])
def test_weights_that_a_callback_writes_are_computed_again(write: Callable[[Tensor], None], sampler: Any) -> None:
    outs = []
    for ours in (True, False):
        net, x = normed(), torch.linspace(-1, 1, 12).reshape(4, 3)
        change = lambda *_, net=net: write(net[0].parametrizations["weight"].original)
        if ours:
            outs.append(sampler.sample(net, x, 5, callback=change).state)
        else:
            outs.append(by_hand(net, x, 5, change))
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-6)


def test_weights_go_with_their_chain() -> None:
    """Without waiting for Python's search for circles."""
    net, made = normed(), []

    def energy(x: Tensor) -> Tensor:
        made.append(weakref.ref(net[0].weight._base))
        return net(x)

    gc.disable()
    try:
        Langevin(0.1, backend="torch").sample(energy, torch.randn(2, 3), 2)
        assert made[0]() is None and made[1]() is None
    finally:
        gc.enable()


def test_step_arguments_that_a_parametrization_sees() -> None:
    scaled = Scaled()
    net, x = parametrized(scaled), torch.linspace(-1, 1, 12).reshape(4, 3)

    def energy(x: Tensor, scale: float) -> Tensor:
        scaled.scale = scale
        return net(x)

    scales = [1.0, 0.5, 3.0]
    got = Langevin(0.05, 0.0).sample(energy, x, 3, args=(schedules.table(scales),)).state
    left = iter(scales)
    torch.testing.assert_close(got, by_hand(lambda x: energy(x, next(left)), x, 3), rtol=1e-5, atol=1e-6)


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
