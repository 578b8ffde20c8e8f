"""A fused chain runs only where it agrees with the user's energy; elsewhere it is the loop's, with the reason."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmebm.energies import MLP, lower
from mmebm.energies.lower import Symbol
from mmebm.energies.trace import trace
from mmebm.ops import evaluate
from mmebm.ops.terms import ACTIVATIONS
from mmebm.samplers import Langevin, Samples, verify

STEPS = 12


@pytest.fixture(autouse=True)
def fresh(need: Callable[[str], None], seed: int) -> Iterator[None]:
    need("cpp")
    torch.manual_seed(seed)
    verify._entries.clear()
    yield
    verify._entries.clear()


def sample(energy: Any, x: Tensor, steps: int = STEPS, **options: Any) -> Samples:
    return Langevin(0.05, **options).sample(energy, x, steps, seed=3)


def assert_loops(energy: Any, x: Tensor, *, reason: str, steps: int = STEPS, **options: Any) -> None:
    """The chain is the loop's bit for bit, with the reason."""
    out = sample(energy, x, steps, **options)
    loop = sample(functools.partial(energy), x, steps, **options)  # a partial is not looked at
    assert out.info["op"] == "langevin_step" and reason in out.info["reason"], out.info
    assert torch.equal(out.state, loop.state)


class Net(nn.Module):
    def __init__(self, inputs: int = 6, outputs: int = 1, act: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(inputs, 9), nn.Linear(9, outputs), act or nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x)))


# -- the tolerance


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_two_orders_of_the_same_sums_agree(activation: Any) -> None:
    """100 networks: autograd on permuted hidden units, that is, sums in another order, at 1 to 100 chains, large and
    small weights and states."""
    for trial in range(100):
        torch.manual_seed(1000 + trial)
        inputs, hidden = (int(torch.randint(1, 80, ())) for _ in range(2))
        chains = [1, 2, 7, 100][trial % 4]
        net = MLP(inputs, (hidden, hidden), activation)
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(float(10 ** torch.empty(()).uniform_(-1, 0.7)))
        x = torch.randn(chains, inputs) * float(10 ** torch.empty(()).uniform_(-2, 2))
        (term,) = lower(net, x).terms
        order = torch.randperm(hidden)
        stack = term.stack  # pyright: ignore[reportAttributeAccessIssue]
        w, b = list(stack.weights), list(stack.biases)
        live = x.clone().requires_grad_()
        h = F.linear(live, w[0][order], b[0][order])
        layer = {"leaky_relu": functools.partial(F.leaky_relu, negative_slope=stack.slope)}
        layer["elu"] = functools.partial(F.elu, alpha=stack.slope)
        act = layer.get(activation) or getattr(F, activation)
        h = act(F.linear(act(h), w[1][:, order], b[1]))
        value = F.linear(h, w[2], b[2]).squeeze(1)
        (grad,) = torch.autograd.grad(value.sum(), live)
        assert verify.disagreement(value.detach(), grad, x, [term], "cpp") is None, trial


@pytest.mark.parametrize("chains", [1, 3, 200])
def test_a_change_of_one_in_ten_thousand_is_seen(chains: int) -> None:
    net, x = MLP(8, (16, 16)), torch.randn(chains, 8)
    live = x.clone().requires_grad_()
    value = net(live)
    (grad,) = torch.autograd.grad(value.sum(), live)
    terms = lower(net, x).terms
    assert verify.disagreement(value.detach(), grad, x, terms) is None
    assert "gradient" in str(verify.disagreement(value.detach(), grad * 1.0001, x, terms))
    assert "value" in str(verify.disagreement(value.detach() + 1e-3, grad, x, terms))
    grad[-1, 0] += 1e-3 * grad.abs().max()
    assert "as 1 of" in str(verify.disagreement(value.detach(), grad, x, terms))


def test_numbers_in_the_place_of_nan_are_seen() -> None:
    """And the other way round: an energy that is finite where what replaces it is not, or a gradient that is."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 1)), torch.randn(5, 4)
    with torch.no_grad():
        net[0].weight.mul_(100)
    terms = lower(net, x).terms
    leaf = x.clone().requires_grad_()
    value = net(leaf).squeeze(1)
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    value = value.detach()
    assert verify.disagreement(value, grad, x, terms) is None
    for one, two in ((value.clone(), grad), (value, grad.clone())):
        (one if two is grad else two)[3] = torch.nan
        assert "autograd is infinite or NaN" in str(verify.disagreement(one, two, x, terms))
    huge = x.clone()
    huge[2] = 1e38  # the terms overflow there
    assert "the terms are" in str(verify.disagreement(value, grad, huge, terms))


def test_a_formula_that_rounds_badly_is_no_excuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own error is what is allowed, up to a share of the largest gradient."""
    x = torch.rand(6, 3) + 1
    exact = 2 * x

    def reference(x: Tensor, energy: Any) -> tuple[Tensor, Tensor]:
        right = x.square().sum(1), 2 * x
        return right if x.dtype == torch.float64 else (right[0], torch.zeros_like(x))  # as where a slope underflows

    monkeypatch.setattr(verify, "by_reference", reference)
    monkeypatch.setattr(verify, "by_op", lambda x, energy, backend: reference(x, energy))
    assert "gradient" in str(verify.disagreement(x.square().sum(1), exact, x, (), "cpp"))


def test_large_nets_are_compared_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the comparison needs no more memory than the energy."""
    torch.manual_seed(0)
    target = torch.randn(9, 2, 4, 4)
    energy = nn.Sequential(nn.Conv2d(1, 2, 3), nn.SiLU())
    x = torch.randn(9, 1, 6, 6)
    net = trace(lambda x: (energy(x) - target).square().flatten(1).sum(1), x).net
    whole = evaluate.by_reference(x.flatten(1), net)
    taken: list[int] = []
    reference = evaluate.net_reference
    monkeypatch.setattr(evaluate, "net_reference", lambda x, net: taken.append(len(x)) or reference(x, net))
    monkeypatch.setattr(evaluate, "MEMORY", 8000)
    pieces = evaluate.by_reference(x.flatten(1), net)
    assert sum(taken) == 9 and len(taken) > 1
    for one, two in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


def test_beside_a_kink_either_slope_is_right() -> None:
    """At 2^-25 beside inputs of 1, the side of 0 is a matter of rounding; half a slope is not."""
    w0, w1 = torch.tensor([[0.0, 1.0, 0.0], [0.3, -0.2, 0.1]]), torch.randn(1, 2)
    x = torch.tensor([[1.0, 2.0**-25, 1.0]])
    terms = lower(lambda x: F.linear(F.relu(F.linear(x, w0)), w1), x).terms
    on, off = (w1[0] * torch.tensor([first, 1.0]) @ w0 for first in (1.0, 0.0))
    value = torch.relu(x.double() @ w0.double().T) @ w1.double().T
    for grad in (on, off):
        assert verify.disagreement(value.float().reshape(1), grad[None], x, terms) is None
    assert verify.disagreement(value.float().reshape(1), (0.5 * (on + off))[None], x, terms) is not None


# -- energies that were understood wrongly


class Lies(Net):
    """Its terms are ``factor`` times what it computes."""

    factor = 1.001

    def mmebm_lowered(self, x: Symbol) -> Any:
        return self.factor * self.b(self.act(self.a(x))).squeeze(1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze(1)


class Flat(Net):
    """Its terms do not know that it never falls below a limit."""

    def mmebm_lowered(self, x: Symbol) -> Any:
        return self.b(self.act(self.a(x))).squeeze(1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze(1).clamp(min=self.limit)

    def set_below(self, x: Tensor) -> None:
        self.limit = float(super().forward(x).detach().min()) - 0.05


def test_a_disagreement_is_a_loop_one_warning_and_a_reason() -> None:
    net, x = Lies(), torch.randn(5, 6)
    with pytest.warns(RuntimeWarning, match="gradient|value"):
        out = sample(net, x)
    assert "autograd and the terms differ by" in out.info["reason"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_loops(net, x, reason="not what it was understood to be: at the start")
    good = Lies()
    good.factor = 1.0
    assert sample(good, x).info["op"] == "langevin_mlp"


def test_what_shows_only_at_the_end_is_seen_too() -> None:
    net, x = Flat(), torch.randn(5, 6)
    net.set_below(x)
    with pytest.warns(RuntimeWarning, match="at the end"):
        assert_loops(net, x, reason="at the end", steps=400, noise_scale=0.0)


def test_chains_that_only_the_terms_lead_out_of_the_finite_numbers_are_seen() -> None:
    """Where they end nothing can be compared; the energy is asked where they were last."""

    class Walled(nn.Module):
        def mmebm_lowered(self, x: Symbol) -> Any:
            return -0.01 * (x**2).sum(1)

        def forward(self, x: Tensor) -> Tensor:
            return -0.01 * x.clamp(-5.0, 5.0).square().sum(1)

    sampler, x = Langevin(50.0, noise_scale=0.01), 0.1 * torch.randn(5, 6)
    with pytest.warns(RuntimeWarning, match="at the end of the chain the terms are infinite"):
        out = sampler.sample(Walled(), x, 200, seed=3)
    assert out.info["op"] == "langevin_step" and out.state.isfinite().all()
    assert torch.equal(out.state, sampler.sample(functools.partial(Walled()), x, 200, seed=3).state)


def test_coupled_chains_are_seen() -> None:
    class Coupled(Lies):
        factor = 1.0

        def mmebm_lowered(self, x: Symbol) -> Any:
            return super().mmebm_lowered(x)

        def forward(self, x: Tensor) -> Tensor:
            e = super().forward(x)
            return e + (e - e.mean()).square() * 0.1

    with pytest.warns(RuntimeWarning):
        assert_loops(Coupled(), torch.randn(5, 6), reason="not what it was understood")


@pytest.mark.parametrize("error", [ValueError, AssertionError, KeyError])
def test_an_energy_that_raises_raises_as_in_a_loop(error: type[Exception]) -> None:
    class Raises(Lies):
        factor = 1.0

        def forward(self, x: Tensor) -> Tensor:
            raise error("mine")

    with pytest.raises(error, match="mine"):
        sample(Raises(), torch.randn(5, 6))


def test_when_it_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = Net(), torch.randn(4, 6)
    at: list[int] = []
    original = verify.Check._compare
    monkeypatch.setattr(
        verify.Check,
        "_compare",
        lambda self, tensors, where: at.append(self._entry.chains) or original(self, tensors, where),
    )
    for _ in range(200):
        sample(net, x, 1)
        with torch.no_grad():
            net.a.weight.add_(0.001)  # another weight is no other energy
    assert at == [n for n in (1, 8, 64, 128, 192) for _ in range(2)]
    at.clear()
    sample(net, x, 1, log_prob=True)
    sample(Net(), x, 1)
    net.act = nn.ReLU()
    sample(net, x, 1)
    # functions made anew at each call, of the same code and module, are one energy
    for _ in range(2):
        sample(lambda x: net(x).sum(1), x, 1)
    assert at == [1, 1, 1, 1, 1, 1, 1, 1]
    assert [entry.chains for entry in verify._entries.entries()] == [200, 1, 1, 1, 2]


def test_a_module_at_the_address_of_a_dead_one_is_another() -> None:
    for _ in range(20):
        net = Net()
        sample(net, torch.randn(2, 6), 1)
        assert verify._entries.entries()[-1].chains == 1
        del net


# -- in-place operations


class RectifiedInPlace(Net):
    def forward(self, x: Tensor) -> Tensor:
        e = super().forward(x)
        F.relu(e, inplace=True)
        return e.squeeze(1)


class ByModule(Net):
    def __init__(self) -> None:
        super().__init__()
        self.rectify = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.rectify(h)
        return self.b(h).squeeze(1)


class Total(Net):
    def __init__(self) -> None:
        super().__init__()
        self.other = Net()

    def forward(self, x: Tensor) -> Tensor:
        e = super().forward(x)
        total = e
        total += self.other(x)
        return (e + total).squeeze(1)


class FlatView(Net):
    def forward(self, x: Tensor) -> Tensor:
        e = super().forward(x)
        flat = e.view(-1)
        flat *= 3
        return e.squeeze(1)


class Multiplied(Net):
    def forward(self, x: Tensor) -> Tensor:
        e = super().forward(x).squeeze(1)
        e.mul_(2)
        return e.neg_()


class Accumulates(Net):
    """The way that sums are mostly written: nothing else has a name for what changes."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList([Net(), Net()])

    def forward(self, x: Tensor) -> Tensor:
        e = 0
        for net in self.nets:
            e += net(x).squeeze(1)
        return sum((net(x).squeeze(1) for net in self.nets), e)


class ChangesItsInput(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y.view(-1)[:1].zero_()
        return super().forward(y).squeeze(1)


@pytest.mark.parametrize(
    ("kind", "fused"),
    [
        (RectifiedInPlace, False),
        (ByModule, True),
        (Total, True),
        (FlatView, False),
        (Multiplied, True),
        (Accumulates, True),
        (ChangesItsInput, False),
    ],
)
def test_in_place_operations_are_the_loops(kind: type[Net], fused: bool) -> None:
    net, x = kind(), torch.randn(7, 6)
    loop = sample(functools.partial(net), x, 40)
    out = sample(net, x, 40)
    assert (out.info["op"] == "langevin_mlp") == fused, out.info["reason"]
    # two orders of the same sums over 40 steps of a smooth energy: some roundings a step
    whole = out.info["op"] != "langevin_step"  # as terms of MLPs, or as a net
    torch.testing.assert_close(out.state, loop.state, rtol=1e-5, atol=1e-5 if whole else 0)


# -- what a loop's caller would notice


class CountsInABuffer(Net):
    def __init__(self, how: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count()
        return super().forward(x)

    def count(self) -> None:
        c: Any = self.calls
        c += 1


class CountsByOut(CountsInABuffer):
    def count(self) -> None:
        torch.add(self.calls, 1, out=self.calls)  # pyright: ignore[reportCallIssue, reportArgumentType]


@pytest.mark.parametrize("kind", [CountsInABuffer, CountsByOut])
def test_effects_on_buffers_happen_once_a_step(kind: type[CountsInABuffer]) -> None:
    net = kind(len)
    sample(net, torch.randn(3, 6), 10)
    assert float(net.calls) == 10  # pyright: ignore[reportArgumentType]


def test_watchers_are_called_as_in_a_loop() -> None:
    from torch.nn.modules.module import register_module_forward_hook
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    net, x = Net(), torch.randn(3, 6)
    calls: list[Any] = []
    handle = register_module_forward_hook(lambda m, i, o: calls.append(o) if m is net else None)
    try:
        sample(net, x, 10)
    finally:
        handle.remove()
    assert len(calls) == 10 and all(isinstance(o, Tensor) for o in calls)

    class Counts(TorchDispatchMode):
        products = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Counts.products += func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
            return func(*args, **(kwargs or {}))

    with Counts():
        sample(net, x, 10)
    assert Counts.products == 10 * 4  # two layers, forward and backward

    class Doubles(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            return 2 * out if func is F.linear else out

    with Doubles():
        out = sample(net, x, 10)
    assert "Doubles is active" in out.info["reason"]
    seen: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        sample(net, x, 10)
    assert len(seen) >= 10


class MyLinear(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * out if func is F.linear else out


def awkward(name: str) -> nn.Module:
    net = Net()
    if name == "subclass":
        net.a.weight = nn.Parameter(net.a.weight.detach().as_subclass(MyLinear), requires_grad=False)
    elif name == "bias of one":
        net.a.bias = nn.Parameter(torch.randn(1))
    elif name == "bias of none":
        net.b.bias = nn.Parameter(torch.randn(()))
    elif name == "non-contiguous":
        net.a.weight = nn.Parameter(torch.randn(6, 9).t())
    elif name == "not a leaf":
        net.a._parameters["weight"] = net.a.weight * 1.0  # pyright: ignore[reportArgumentType]
    return net


@pytest.mark.parametrize("name", ["subclass", "bias of one", "bias of none", "non-contiguous", "not a leaf"])
def test_weights_of_odd_kinds(name: str) -> None:
    net, x = awkward(name), torch.randn(3, 6)
    torch.testing.assert_close(sample(net, x).state, sample(functools.partial(net), x).state, rtol=1e-5, atol=1e-5)


class Swallows(Net):
    def forward(self, x: Tensor) -> Tensor:
        e = super().forward(x).squeeze(1)
        try:
            return e + torch.sin(x).sum(1)
        except:  # noqa: E722
            return e


class OwnSum(nn.Module):
    """A method with the name of an operation, and an effect."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.log = Net(), []

    def sum(self, x: Tensor) -> Tensor:
        self.log.append(len(x))
        return self.net(x).squeeze(1)


class CallsSum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = OwnSum()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner.sum(x)


class NoColumn(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, False].sum((1, 2)) + x.square().sum(1)


def test_refusals_that_hide() -> None:
    x = torch.randn(3, 6)
    assert_loops(Swallows(), x, reason="sin")
    assert_loops(NoColumn(), x, reason="parts of a tensor")
    net = CallsSum()
    assert sample(net, x, 10).info["op"] == "langevin_step" and len(net.inner.log) == 10


class Random(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze(1) * float(torch.rand(()))


def test_random_numbers_stay_the_users() -> None:
    net, x = Random(), torch.randn(3, 6)
    torch.manual_seed(5)
    out = sample(net, x)
    torch.manual_seed(5)
    assert torch.equal(out.state, sample(functools.partial(net), x).state)


# -- methods and helpers are looked into


class WithHelpers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(6, 8), nn.Linear(8, 1)

    def features(self, x: Tensor) -> Tensor:
        return helper(self.trunk(x))

    def energy(self, x: Tensor) -> Tensor:
        return -self.head(self.features(x)).squeeze(-1)


def helper(x: Tensor) -> Tensor:
    return F.silu(x)


def test_methods_and_helper_functions_are_fused() -> None:
    net, x = WithHelpers(), torch.randn(3, 6)
    out = sample(net.energy, x)
    assert out.info["op"] == "langevin_mlp", out.info["reason"]
    torch.testing.assert_close(out.state, sample(functools.partial(net.energy), x).state, rtol=1e-5, atol=1e-5)
    weights = net.trunk.weight.detach(), net.head.weight.detach()
    matrices = sample(lambda x: (F.silu(x @ weights[0].t()) @ weights[1].t()).squeeze(1), x)
    assert matrices.info["op"] == "langevin_mlp", matrices.info["reason"]


# -- chains that break at a finite state


def huge() -> Net:
    """Its gradient overflows at states of about 1, which a clip hides from the state."""
    net = Net(act=nn.ReLU())
    with torch.no_grad():
        net.a.weight.fill_(1e25)
        net.b.weight.fill_(1e25)
        net.a.bias.zero_()
    return net


@pytest.mark.parametrize("option", ["ignore", "raise"])
def test_a_gradient_that_overflows_behind_a_clip_is_reported(option: str) -> None:
    net, x = huge(), torch.stack([torch.ones(6), -torch.ones(6)])  # the second one is where the network is 0
    options: dict[str, Any] = {"grad_clip": 0.1, "noise_scale": 0.0, "on_nonfinite": option}
    if option == "raise":
        with pytest.raises(FloatingPointError):
            sample(net, x, **options)
        return
    out = sample(net, x, **options)
    assert out.info["nonfinite"].tolist() == [True, False] and out.state.isfinite().all()
    if option == "freeze":
        assert torch.equal(out.state[0], x[0])


def test_long_chains_are_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = Net(), torch.randn(5, 6)
    options: dict[str, Any] = {"seed": 3, "record": ("energy",), "thin": 4}
    whole = Langevin(0.05).sample(net, x, 30, **options)
    monkeypatch.setattr("mmebm.samplers.whole_chain._TRACE", 15)
    pieces = Langevin(0.05).sample(net, x, 30, **options)
    assert torch.equal(whole.state, pieces.state) and torch.equal(whole.trajectory, pieces.trajectory)
    assert torch.equal(whole.trace["energy"], pieces.trace["energy"]) and len(pieces.trace["energy"]) == 30


def test_weights_that_another_thread_changes_meanwhile_are_no_verdict() -> None:
    class Trained(Net):
        """Its weights change between its evaluation and the op's, as by an optimiser in another thread."""

        def mmebm_lowered(self, x: Symbol) -> Any:
            return self.b(self.act(self.a(x))).squeeze(1)

        def forward(self, x: Tensor) -> Tensor:
            value = super().forward(x).squeeze(1)
            if self.training_elsewhere:
                with torch.no_grad():
                    self.b.bias.add_(1.0)
            return value

    net, x = Trained(), torch.randn(4, 6)
    net.training_elsewhere = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = Langevin(0.05, backend="cpp").sample(net, x, 0, seed=3)
    assert "the weights changed" in out.info["reason"]
    net.training_elsewhere = False
    assert sample(net, x).info["op"] == "langevin_mlp"
