"""Nets that are kept from chain to chain are never those of another energy, and are kept where nothing changed."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from mmebm import Langevin
from mmebm.samplers import kept_nets
from mmebm.state import flatten

# As in test_net_chain.py: two fp32 chains whose sums run in another order
CLOSE = 2e-5
SHAPE = (3, 6, 5)


@pytest.fixture(autouse=True)
def _fresh(need: Callable[[str], None], seed: int) -> None:
    need("cpp")
    torch.manual_seed(seed)
    kept_nets.clear()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The energies that were traced anew."""
    calls: list[Any] = []
    original = kept_nets.tracing.trace
    monkeypatch.setattr(kept_nets.tracing, "trace", lambda e, *a, **k: calls.append(e) or original(e, *a, **k))
    return calls


def body(outputs: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, outputs, 3, padding=1), nn.SiLU(), nn.Conv2d(outputs, outputs, 3))


class Net(nn.Module):
    """Reads a number, a buffer, a list and a mode of its own."""

    switch: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body, self.scale, self.kinds = body(), 1.0, ["silu"]
        self.register_buffer("shift", torch.randn(4, 1, 1))
        self.register_buffer("switch", torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x) + self.shift
        h = F.silu(h) if self.kinds[0] == "silu" else F.relu(h)
        if self.training:
            h = 2 * h
        return self.scale * h.flatten(1).sum(1)


FACTOR = 1.0


class Words(Net):
    """Reads a word of its class, and a global number."""

    kind = "sum"

    def forward(self, x: Tensor) -> Tensor:
        h = FACTOR * self.body(x).flatten(1)
        return h.sum(1) if self.kind == "sum" else h.square().sum(1)


class Branch(Net):
    """A branch on the value of a buffer."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x).flatten(1)
        return h.sum(1) if float(self.switch) > 0 else h.square().sum(1)


class Changed(Net):
    """Another ``forward`` for the class of an object."""

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).square().flatten(1).sum(1)


def _forward_replaced(net: Any) -> None:
    class Local(Net):
        pass

    net.__class__ = Local
    Local.forward = Changed.forward  # type: ignore[method-assign]


def _hook(net: Any) -> None:
    net.body[0].register_forward_hook(lambda m, i, out: 2 * out)


def _replaced(net: Any) -> None:
    net.body[0].weight = nn.Parameter(torch.randn_like(net.body[0].weight))


def _by_data(net: Any) -> None:
    net.body[0].weight.data.mul_(-1.5)
    net.shift.data = torch.randn_like(net.shift)


def _in_place(net: Any) -> None:
    with torch.no_grad():
        for t in (*net.parameters(), net.shift):
            t.add_(0.3 * torch.randn_like(t))


@dataclasses.dataclass
class Settings:
    scale: float = 1.0
    tuned: float = 1.0

    @property
    def factor(self) -> float:
        return self.scale * self.tuned


class Configured(Net):
    """Reads the settings that people keep beside a network."""

    def __init__(self, settings: Any) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, x: Tensor) -> Tensor:
        return self.settings.scale * self.body(x[BAND]).flatten(1).sum(1)


class Kelvin(float):
    """A number of a class of its own, without fields."""


class Scaled(Net):
    """By a number of any kind."""

    def __init__(self, scale: Any) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return float(self.scale) * self.body(x).flatten(1).sum(1)


class ByProperty(Configured):
    def forward(self, x: Tensor) -> Tensor:
        return self.settings.factor * super().forward(x)


class ByClass(Net):
    """Calls a function that stands in its class."""

    act = torch.tanh

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.body(x)).flatten(1).sum(1)


@dataclasses.dataclass
class Named:
    kind: ClassVar[str] = "sum"


class ByClassOfSettings(Configured):
    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x).flatten(1)
        return h.sum(1) if self.settings.kind == "sum" else h.square().sum(1)


class Gathered(Net):
    """Puts numbers of tensors into a tensor, which no operation shows."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).flatten(1).sum(1) * torch.tensor([self.factor, 1.0]).prod()


DEEP = 1.0


def deepest(h: Tensor) -> Tensor:
    return DEEP * h


def _nested(inner: Callable[[Tensor], Tensor], times: int) -> Callable[[Tensor], Tensor]:
    return inner if times == 0 else _nested(lambda h: inner(h), times - 1)


class Helped(Net):
    """Names a global in a helper of a helper of a helper, further away than anybody looks."""

    def __init__(self) -> None:
        super().__init__()
        self.help = _nested(deepest, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.help(self.body(x)).flatten(1).sum(1)


BAND = (slice(None), slice(None), slice(1, 6), ...)

CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "weights in place": (Net, _in_place),
    "weights by .data": (Net, _by_data),
    "a weight replaced": (Net, _replaced),
    "weights assigned": (
        Net,
        lambda e: e.load_state_dict({k: torch.randn_like(v) for k, v in e.state_dict().items()}, assign=True),
    ),
    "a number": (Net, lambda e: setattr(e, "scale", -0.5)),
    "an entry of a list": (Net, lambda e: e.kinds.__setitem__(0, "relu")),
    "a layer": (Net, lambda e: e.body.__setitem__(1, nn.ReLU())),
    "a layer's number": (Net, lambda e: setattr(e.body[2], "padding", (1, 1))),
    "a dataclass": (lambda: Configured(Settings()), lambda e: setattr(e.settings, "scale", -0.5)),
    "a property's field": (lambda: ByProperty(Settings()), lambda e: setattr(e.settings, "tuned", -0.5)),
    "a namespace": (
        lambda: Configured(SimpleNamespace(scale=1.0)),
        lambda e: setattr(e, "settings", SimpleNamespace(scale=-0.5)),
    ),
    "a number of a class of its own": (lambda: Scaled(Kelvin(1)), lambda e: setattr(e, "scale", Kelvin(-0.5))),
    "a decimal": (lambda: Scaled(Decimal(1)), lambda e: setattr(e, "scale", Decimal("-0.5"))),
    "a fraction": (lambda: Scaled(Fraction(1)), lambda e: setattr(e, "scale", Fraction(-1, 2))),
    "a hook": (Net, _hook),
    "forward": (Net, _forward_replaced),
    "a word of the class": (Words, lambda e: setattr(type(e), "kind", "sum" if e.kind == "mean" else "mean")),
    "a function of the class": (
        ByClass,
        lambda e: setattr(type(e), "act", torch.relu if ByClass.act is torch.tanh else torch.tanh),
    ),
    "a word of the settings' class": (
        lambda: ByClassOfSettings(Named()),
        lambda e: setattr(Named, "kind", "sum" if Named.kind == "mean" else "mean"),
    ),
    "numbers that a tensor was made of": (Gathered, _in_place),
    "a global of a far helper": (Helped, lambda e: globals().update(DEEP=-2 * DEEP)),
    "a global": (Words, lambda e: globals().update(FACTOR=2 * FACTOR)),
    "train mode": (Net, lambda e: e.train()),
    "a branch on a buffer": (Branch, lambda e: e.switch.neg_()),
}


def agrees(energy: Any, x: Any, mode: Any = "keep", **options: Any) -> Any:
    """The chain by default is the loop's with autograd."""
    ours = Langevin(0.02, 0.0, mode=mode).sample(energy, x, 2, seed=0, **options)
    loop = Langevin(0.02, 0.0, mode=mode, backend="torch").sample(energy, x, 2, seed=0, **options)
    for a, b in zip(flatten(ours.state)[1], flatten(loop.state)[1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=CLOSE)
    return ours


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_seen(change: str) -> None:
    make, mutate = CHANGES[change]
    energy, x = make().eval(), torch.randn(3, *SHAPE)
    for _ in range(3):  # the second and third chain are not verified
        before = agrees(energy, x)
    assert before.info["op"] == "langevin_net", before.info["reason"]
    mutate(energy)
    for _ in range(2):
        after = agrees(energy, x)
    assert not torch.allclose(after.state, before.state, atol=1e-3), "the change changes nothing"


def test_what_stays_is_kept(traced: list[Any]) -> None:
    energy, x = Net().eval(), torch.randn(3, *SHAPE)
    for _ in range(4):
        agrees(energy, x)
        _in_place(energy)
    assert len(traced) == 1
    agrees(energy, x[:2])
    agrees(energy, torch.randn(3, 3, 8, 8))
    assert len(traced) == 3  # other shapes are another net
    agrees(energy, x)
    assert len(traced) <= 4


def test_a_function_made_anew(traced: list[Any]) -> None:
    net, x = body(), torch.randn(3, *SHAPE)
    for scale in (1.0, 1.0, 2.0):
        agrees(lambda x, s=scale: s * net(x).flatten(1).sum(1), x)
    assert len(traced) == 2


def test_a_closure_that_is_mutated() -> None:
    net, x, held = body(), torch.randn(3, *SHAPE), {"power": 1, "shift": torch.zeros(3, 4, 4, 3)}

    def energy(x: Tensor) -> Tensor:
        h = net(x) + held["shift"]
        return (h if held["power"] == 1 else h * h).flatten(1).sum(1)

    for _ in range(2):
        agrees(energy, x)
    held["power"] = 2
    agrees(energy, x)
    held["shift"] = torch.randn(3, 4, 4, 3)
    agrees(energy, x)
    held["shift"].add_(1.0)
    assert agrees(energy, x).info["op"] == "langevin_net"


def test_arguments_are_those_of_the_call(traced: list[Any]) -> None:
    net, x = body(), torch.randn(3, *SHAPE)

    def energy(x: Tensor, y: Tensor, weight: float) -> Tensor:
        return weight * (net(x) - y).square().flatten(1).sum(1)

    for _ in range(3):
        agrees(energy, x, args=(torch.randn(3, 4, 4, 3), 0.1))
    assert len(traced) == 1
    agrees(energy, x, args=(torch.randn(3, 4, 4, 3), 0.2))
    agrees(energy, x, args=(torch.randn(1, 4, 4, 3), 0.2))
    assert len(traced) == 3


@pytest.mark.parametrize("mode", ["keep", "eval"])
def test_derived_weights(traced: list[Any], mode: str) -> None:
    """Spectral and weight norm and a folded batch norm are computed again from what they come from; in mode "eval"
    by what computes them once a chain."""
    net = nn.Sequential(
        parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)),
        nn.SiLU(),
        nn.Conv2d(4, 5, 3, padding=1),
        nn.BatchNorm2d(5),
        nn.SiLU(),
        parametrizations.weight_norm(nn.Conv2d(5, 2, 2)),
    )
    energy = nn.Sequential(net, nn.Flatten(), nn.Linear(12, 1, bias=False)).eval()
    x = torch.randn(3, *SHAPE)
    for _ in range(3):
        ours = agrees(energy, x, mode)
        assert ours.info["op"] == "langevin_net", ours.info["reason"]
        with torch.no_grad():
            for t in (*energy.parameters(), *energy.buffers()):
                if t.is_floating_point():
                    t.mul_(0.8).add_(0.1 * torch.rand_like(t))
    assert len(traced) == 1


def test_settings_that_do_more_than_hold_values_are_the_loops() -> None:
    @dataclasses.dataclass
    class Counting:
        calls: int = 0

        @property
        def scale(self) -> float:
            self.calls += 1
            return 1.0

    @dataclasses.dataclass
    class Called:
        calls: int = 0

        def __getitem__(self, name: str) -> float:
            self.calls += 1
            return 1.0

    @dataclasses.dataclass
    class Contained:
        calls: int = 0

        def __contains__(self, name: str) -> bool:
            self.calls += 1
            return True

    @dataclasses.dataclass(eq=False)
    class Equal:
        calls: int = 0

        def __eq__(self, other: object) -> bool:
            self.calls += 1
            return True

    x = torch.randn(3, *SHAPE)
    counting, called, contained, equal = Counting(), Called(), Contained(), Equal()
    net = body()
    assert Langevin(0.02, 0.0).sample(Configured(counting).eval(), x, 4, seed=0).info["op"] == "langevin_step"
    energy = lambda x: called["scale"] * net(x).flatten(1).sum(1)
    assert Langevin(0.02, 0.0).sample(energy, x, 4, seed=0).info["op"] == "langevin_step"
    for asked in (lambda: "scale" in contained, lambda: equal == 1):
        energy = lambda x, asked=asked: net(x).flatten(1).sum(1) * (1.0 if asked() else 2.0)
        assert Langevin(0.02, 0.0).sample(energy, x, 4, seed=0).info["op"] == "langevin_step"
    assert counting.calls == called.calls == contained.calls == equal.calls == 4


def test_two_of_a_kind(traced: list[Any]) -> None:
    first, second, x = Net().eval(), Net().eval(), torch.randn(3, *SHAPE)
    for energy in (first, second, first, second):
        agrees(energy, x)
    assert len(traced) == 2


def test_what_is_read_into_python_is_not_kept(traced: list[Any]) -> None:
    energy, x = Branch().eval(), torch.randn(3, *SHAPE)
    for _ in range(2):
        agrees(energy, x)
    assert len(traced) == 2


def test_structures_of_the_state(traced: list[Any]) -> None:
    net = body()
    energy = lambda s: net(s["b"] if isinstance(s, dict) else s[0]).flatten(1).sum(1)
    x = torch.randn(3, *SHAPE)
    for state in ({"b": x}, [x], {"b": x}, {"b": x, "c": x}):
        agrees(energy, state)
    assert len(traced) == 3


def test_weights_are_let_go() -> None:
    energy, holder = Net().eval(), SimpleNamespace()
    holder.weight = weakref.ref(energy.body[0].weight)
    agrees(energy, torch.randn(3, *SHAPE))
    del energy
    gc.collect()
    assert holder.weight() is None


def _through_data(p: Tensor) -> None:
    p.data.mul_(1.7)


def _through_numpy(p: Tensor) -> None:
    p.detach().numpy()[...] *= 1.7


def _by_other_memory(p: Tensor) -> None:
    p.data = p.data * 1.7


@pytest.mark.parametrize("write", (_through_data, _through_numpy, _by_other_memory))
@pytest.mark.parametrize("kind", ("convolution", "batch norm", "weight norm", "mlp", "mlp, weight norm"))
def test_weights_that_autograd_does_not_see_change_count_at_the_next_step(
    kind: str, write: Callable[[Tensor], None]
) -> None:
    """``_version`` stays where they are written to through ``.data`` or NumPy, as many a moving average does."""
    normed = parametrizations.weight_norm
    net = {
        "convolution": body,
        "batch norm": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 1, 3)),
        "weight norm": lambda: nn.Sequential(normed(nn.Conv2d(3, 4, 3)), nn.SiLU(), nn.Conv2d(4, 1, 3)),
        "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(90, 8), nn.SiLU(), nn.Linear(8, 1)),
        "mlp, weight norm": lambda: nn.Sequential(nn.Flatten(), normed(nn.Linear(90, 8)), nn.SiLU(), nn.Linear(8, 1)),
    }[kind]()
    net.eval()
    energy = lambda x: net(x).flatten(1).sum(1)
    sampler, x = Langevin(0.05, 0.0), torch.randn(4, *SHAPE)
    carry = sampler.init(x, seed=0)
    for _ in range(3):
        x, carry, info = sampler.step(energy, x, carry)
    assert info["op"] in ("langevin_net", "langevin_mlp")
    for t in [*net.parameters(), *net.buffers()]:
        if t.is_floating_point():
            write(t)
    at = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(energy(at).sum(), at)
    expected = x - 0.05 * gradient
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(sampler.step(energy, x, carry)[0], expected, rtol=CLOSE, atol=CLOSE)
    torch.testing.assert_close(sampler.sample(energy, x, 1, seed=0).state, expected, rtol=CLOSE, atol=CLOSE)


def test_an_argument_that_is_also_read_where_it_lies() -> None:
    """On a tape they are one tensor; the next call has two."""
    net, x, held = body(), torch.randn(3, *SHAPE), torch.randn(3, 4, 4, 3)

    def energy(x: Tensor, y: Tensor) -> Tensor:
        h = net(x)
        return 0.1 * ((h - y).square() + (h - held).square()).flatten(1).sum(1)

    one = agrees(energy, x, args=(held,))
    for _ in range(2):
        other = agrees(energy, x, args=(held + 2.0,))
    assert not torch.allclose(one.state, other.state, atol=1e-3) and other.info["op"] == "langevin_net"


@pytest.mark.parametrize("make", [torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor, "new_tensor"])
def test_numbers_given_to_a_tensor_are_those_of_the_call(make: Any) -> None:
    net, x = body(), torch.randn(3, *SHAPE)

    def energy(x: Tensor, y: Tensor) -> Tensor:
        numbers = [y, 2 * y]
        weights = x.new_tensor(numbers) if make == "new_tensor" else make(numbers)
        return weights.sum() * net(x).flatten(1).square().sum(1)

    for y in (0.1, 0.3, -0.2):
        agrees(energy, x, args=(torch.tensor(y),))


@pytest.mark.parametrize(
    "make",
    [
        lambda x: torch.tensor(3.0),
        lambda x: torch.tensor([3.0, 2.0]).sum(),
        lambda x: torch.as_tensor([3.0])[0],
        lambda x: x.new_tensor([[3.0, 1.0]]).mean(),
        lambda x: torch.scalar_tensor(3.0) + torch.full((), 2.0) * torch.ones_like(x).mean() * torch.arange(3).sum(),
    ],
    ids=["tensor", "tensor of a list", "as_tensor", "new_tensor", "factories"],
)
def test_constants_stay_what_they_are(traced: list[Any], make: Any) -> None:
    """Also in the chains that are not verified."""
    net, x = body(), torch.randn(3, *SHAPE)
    energy = lambda x: make(x) * net(x).flatten(1).square().sum(1)
    for _ in range(3):
        out = agrees(energy, x)
    assert out.info["op"] == "langevin_net" and len(traced) == 1


@pytest.mark.parametrize("make", [torch.tensor, torch.Tensor])
def test_a_value_of_the_state_in_a_new_tensor_is_the_loops(make: Any) -> None:
    """The first chain hardly moves, so that no comparison shows what is held constant."""
    net, x = body(), torch.randn(3, *SHAPE)

    def energy(x: Tensor) -> Tensor:
        h = net(x).flatten(1)
        return (h * h * make([h.mean(), 1.0]).sum()).sum(1)

    for step in (1e-6, 0.02, 0.02):
        ours = Langevin(step, 0.0).sample(energy, x, 4, seed=0)
        loop = Langevin(step, 0.0, backend="torch").sample(energy, x, 4, seed=0)
        torch.testing.assert_close(ours.state, loop.state, rtol=0, atol=CLOSE)
    assert "takes a value of the state" in ours.info["reason"]


def test_autocast_around_a_later_chain() -> None:
    energy, x = Net().eval(), torch.randn(3, *SHAPE)

    def end(backend: Any) -> Tensor:
        return Langevin(0.2, 0.0, backend=backend).sample(energy, x, 8, seed=0).state

    plain = [end("auto") for _ in range(2)][-1]
    with torch.autocast("cpu", torch.bfloat16):
        half = end("auto")
        torch.testing.assert_close(half, end("torch"), rtol=0, atol=CLOSE)
    assert float((half - plain).abs().max()) > 10 * CLOSE


def _annealed(energy: Any) -> Callable[[int, Any], None]:
    def callback(done: int, state: Any) -> None:
        energy.shift.mul_(-0.5)
        energy.scale *= 0.8

    return callback


@pytest.mark.parametrize("first", [True, False])
def test_a_callback_that_changes_the_energy(first: bool) -> None:
    """By tensors and by numbers, whether or not the net was there before."""
    x, ends = torch.randn(3, *SHAPE), []
    for backend in ("auto", "torch", "auto"):
        torch.manual_seed(1)
        energy = Net().eval()
        if not first:
            Langevin(0.02, 0.0, backend=backend).sample(energy, x, 2, seed=0)
        callback = None if len(ends) == 2 else _annealed(energy)
        ends.append(Langevin(0.02, 0.0, backend=backend).sample(energy, x, 8, seed=0, thin=2, callback=callback))
    assert ends[0].info["op"] == "langevin_net", ends[0].info["reason"]
    torch.testing.assert_close(ends[0].state, ends[1].state, rtol=0, atol=CLOSE)
    torch.testing.assert_close(ends[0].trajectory, ends[1].trajectory, rtol=0, atol=CLOSE)
    assert not torch.allclose(ends[0].state, ends[2].state, rtol=0, atol=10 * CLOSE)


def test_a_head_of_zeros_proves_nothing() -> None:
    """What is in front of it is compared once it is trained."""
    counted = []

    class Hidden(Net):
        def forward(self, x: Tensor) -> Tensor:
            counted.append(1)
            return super().forward(x)

    Hidden.mmebm_pure = True  # type: ignore[attr-defined]
    energy, x = Hidden().eval(), torch.randn(3, *SHAPE)
    with torch.no_grad():
        energy.body[2].weight.zero_()
    calls = []
    for _ in range(4):
        before = len(counted)
        Langevin(0.02, 0.0).sample(energy, x, 2, seed=0)
        calls.append(len(counted) - before)
    assert min(calls) >= 3, "traced, and compared at both ends of each chain"
    with torch.no_grad():
        energy.body[2].weight.normal_()
    for _ in range(3):
        before = len(counted)
        Langevin(0.02, 0.0).sample(energy, x, 2, seed=0)
        calls.append(len(counted) - before)
    assert calls[4] >= 3 and max(calls[5:]) <= 1


def test_a_refusal_of_one_call_is_not_that_of_the_next() -> None:
    """No chains, an autocast, an error of the energy's own: the next chain is fused."""
    net = body()

    def energy(x: Tensor, fail: bool = False) -> Tensor:
        if fail:
            raise ValueError("not now")
        return net(x).flatten(1).sum(1)

    x = torch.randn(3, *SHAPE)
    assert Langevin(0.02, 0.0).sample(energy, x[:0], 2, seed=0).state.shape[0] == 0
    with torch.autocast("cpu", torch.bfloat16):
        Langevin(0.02, 0.0).sample(energy, x, 2, seed=0)
    with pytest.raises(ValueError, match="not now"):
        Langevin(0.02, 0.0).sample(energy, x, 2, seed=0, kwargs={"fail": True})
    assert agrees(energy, x).info["op"] == "langevin_net"


def test_parameters_of_a_kept_net_may_be_swapped() -> None:
    """As torch does where it converts by swapping: nobody else may hold them."""
    energy, x = Net().eval(), torch.randn(3, *SHAPE)
    for _ in range(2):
        agrees(energy, x)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        energy.load_state_dict({k: torch.randn_like(v) for k, v in energy.state_dict().items()})
        assert agrees(energy, x).info["op"] == "langevin_net"
        energy.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert all(p.dtype == torch.float64 for p in energy.parameters())


class Classwide(Net):
    """What its methods are given, close over and name, by every kind of method."""

    @property
    def named(self) -> float:
        return FACTOR

    @staticmethod
    def given(h: Tensor, by: float = 1.0) -> Tensor:
        return by * h

    def forward(self, x: Tensor) -> Tensor:
        return self.named * self.given(self.body(x)).flatten(1).sum(1)


def _closing_over(value: float) -> Any:
    return staticmethod(lambda h: value * h)


@pytest.mark.parametrize("change", ["a global of a property", "a default", "another closure of the same code"])
def test_what_methods_of_any_kind_are_given(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Local(Classwide):
        pass

    if change == "another closure of the same code":
        Local.given = _closing_over(1.0)  # type: ignore[assignment]
    energy, x = Local().eval(), torch.randn(3, *SHAPE)
    for _ in range(2):
        before = agrees(energy, x)
    assert before.info["op"] == "langevin_net", before.info["reason"]
    if change == "a global of a property":
        monkeypatch.setitem(globals(), "FACTOR", -3.0 * FACTOR)
    elif change == "a default":
        monkeypatch.setattr(Classwide.given, "__defaults__", (-3.0,))
    else:
        Local.given = _closing_over(-3.0)  # type: ignore[assignment]
    for _ in range(2):
        after = agrees(energy, x)
    assert not torch.allclose(after.state, before.state, atol=1e-3)


def test_the_data_of_a_call_is_let_go() -> None:
    decoder = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Unflatten(1, (1, 4, 4)), nn.ConvTranspose2d(1, 2, 4, 2))

    def posterior(z: Tensor, x: Tensor) -> Tensor:
        return (decoder(z) - x).square().flatten(1).sum(1)

    alive = []
    for chains in (3, 4, 4, 5):
        x = torch.rand(chains, 2, 10, 10)
        alive.append(weakref.ref(x))
        out = Langevin(1e-3, 0.0).sample(posterior, torch.randn(chains, 8), 2, args=(x,), seed=0)
        assert out.info["op"] == "langevin_net", out.info["reason"]
        x = torch.rand(chains, 2, 10, 10)
        alive.append(weakref.ref(x))
        Langevin(1e-3, 0.0).sample((lambda y: lambda z: posterior(z, y))(x), torch.randn(chains, 8), 2, seed=0)
    del x, out
    gc.collect()
    assert not any(reference() is not None for reference in alive)
