"""What ``lower`` recognises gives the energy and gradient of autograd; what it does not recognise is left alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmebm import Langevin
from mmebm.energies import MLP, CannotLower, Gaussian, GaussianMixture, Sum, lower
from mmebm.ops.mlp_energy.reference import mlp_energy
from mmebm.ops.terms import LIMITS, Quadratic, Residual, Scalar, too_wide

# float64 throughout: both sides do the same sums in another order, of fewer than 10^3 terms of size about 1
TOLERANCE = 1e-11
D = torch.float64


def flat(state: Any) -> Tensor:
    parts = [state] if isinstance(state, Tensor) else list(state.values()) if isinstance(state, dict) else list(state)
    return torch.cat([t.flatten(1) for t in parts], dim=1)


def assert_same(energy: Callable[[Any], Tensor], state: Any) -> tuple[Any, ...]:
    """The terms' energy and gradient are those of autograd."""
    lowered = lower(energy, state)
    value, grad = mlp_energy(flat(state), lowered.terms)
    with torch.enable_grad():
        if isinstance(state, Tensor):
            live: Any = state.detach().requires_grad_()
            leaves = [live]
        elif isinstance(state, dict):
            live = {key: t.detach().requires_grad_() for key, t in state.items()}
            leaves = list(live.values())
        else:
            live = [t.detach().requires_grad_() for t in state]
            leaves = live
        wanted = energy(live)
        grads = torch.autograd.grad(wanted.sum(), leaves, allow_unused=True)
    found = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True)]
    assert lowered.scalar == (wanted.dim() == 0)
    if wanted.dim():
        torch.testing.assert_close(value, wanted.detach().flatten(), rtol=0, atol=TOLERANCE)
    else:
        torch.testing.assert_close(value.sum(), wanted.detach(), rtol=0, atol=TOLERANCE * value.shape[0])
    torch.testing.assert_close(grad, torch.cat([g.flatten(1) for g in found], dim=1), rtol=0, atol=TOLERANCE)
    return lowered.terms


@pytest.fixture(autouse=True)
def float64(seed: int) -> Any:
    torch.manual_seed(seed)
    torch.set_default_dtype(D)
    yield
    torch.set_default_dtype(torch.float32)


class Plain(nn.Module):
    """How people write it."""

    def __init__(self, inputs: int = 6) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(inputs, 8), nn.SiLU(), nn.Linear(8, 5), nn.SiLU(), nn.Linear(5, 1))
        self.scale = 2.5

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.view(x.size(0), -1)).squeeze(-1)


class Everything(Plain):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.flatten(x, start_dim=1)
        return -self.scale * self.net(h)[:, 0] / 3 + 0.5 * (h**2).sum(dim=1) - 2 * self.net(h).sum(1)


class Functional(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 9), nn.Linear(9, 1, bias=False)
        self.act = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x)))


class ByF(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 9), nn.Linear(9, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.leaky_relu(self.b(F.leaky_relu(self.a(x), 0.2)), negative_slope=0.2)).flatten()


class Normed(nn.Module):
    """Every way torch has to norm a weight."""

    def __init__(self, norm: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.a, self.b = norm(nn.Linear(6, 9)), norm(nn.Linear(9, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


GELU_NET = nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 1), nn.Flatten(0)).double()

ENERGIES: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "Sequential": lambda: nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 1)),
    "Sequential, flattened": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 1), nn.Flatten(0)
    ),
    "nested Sequential": lambda: nn.Sequential(
        nn.Sequential(nn.Linear(6, 7), nn.ELU(0.7)), nn.Identity(), nn.Linear(7, 1)
    ),
    "dropout, off": lambda: nn.Sequential(nn.Linear(6, 7), nn.Softplus(), nn.Dropout(), nn.Linear(7, 1)).eval(),
    "no bias": lambda: nn.Sequential(nn.Linear(6, 7, bias=False), nn.ReLU(), nn.Linear(7, 1, bias=False)),
    "linear": lambda: nn.Linear(6, 1),
    "four hidden layers": lambda: MLP(6, (3, 4, 5, 6), "gelu"),
    "class": Plain,
    "class with arithmetic": Everything,
    "functional": ByF,
    "function of a global": lambda: lambda x: GELU_NET(x),
    "function, summed": lambda: lambda x: GELU_NET(x).sum(),
    "closure": lambda: (lambda net: lambda x: -net(x))(Plain()),
    "default": lambda: lambda x, net=GELU_NET: 3 * net(x),
    "square": lambda: lambda x: 0.5 * (x**2).sum(1),
    "square, summed": lambda: lambda x: x.pow(2).sum() / 3,
    "square by product": lambda: lambda x: (x * x).sum(-1),
    "Gaussian": lambda: Gaussian(torch.randn(6), torch.rand(6) + 0.5),
    "sum": lambda: Sum(Gaussian(0.3, 2.0), Plain(), MLP(6, (4,), "elu"), weights=(0.5, -1.0, 2.0)),
    "spectral norm": lambda: Normed(torch.nn.utils.parametrizations.spectral_norm).eval(),
    "weight norm": lambda: Normed(torch.nn.utils.parametrizations.weight_norm).eval(),
    "old spectral norm": lambda: Normed(torch.nn.utils.spectral_norm).eval(),
}


@pytest.mark.parametrize("name", ENERGIES)
def test_recognised(name: str) -> None:
    assert_same(ENERGIES[name](), torch.randn(5, 6))


@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(), nn.LeakyReLU(0.3), nn.SiLU(), nn.GELU(), nn.Softplus(), nn.Tanh(), nn.ELU(0.6)],
    ids=lambda m: type(m).__name__,
)
def test_activations(activation: nn.Module) -> None:
    (term,) = assert_same(nn.Sequential(nn.Linear(6, 5), activation, nn.Linear(5, 1)), torch.randn(4, 6))
    assert isinstance(term, Scalar)
    assert_same(Functional(activation), torch.randn(4, 6))


@pytest.mark.parametrize("chains", [1, 2, 7])
def test_images_and_any_number_of_chains(chains: int) -> None:
    assert_same(Plain(12), torch.randn(chains, 3, 2, 2))


def test_weights_are_read_anew_after_an_optimiser_step() -> None:
    energy, x = Plain(), torch.randn(5, 6)
    before = mlp_energy(x, lower(energy, x).terms)[0]
    optimiser = torch.optim.SGD(energy.parameters(), lr=0.1)
    energy(x).sum().backward()
    optimiser.step()
    assert not torch.equal(mlp_energy(x, lower(energy, x).terms)[0], before)
    assert_same(energy, x)


class Conditional(nn.Module):
    """A posterior, its data an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4), nn.Tanh())
        self.prior = Plain()

    def forward(self, z: Tensor, x: Tensor, weight: float = 1.0) -> Tensor:
        return weight * (self.decoder(z) - x).square().sum(1) / (2 * 0.3**2) + self.prior(z)


def test_arguments_are_data() -> None:
    energy, z, x = Conditional(), torch.randn(5, 6), torch.randn(5, 4)
    lowered = lower(energy, z, args=(x,), kwargs={"weight": 0.5})
    assert [type(t) for t in lowered.terms] == [Residual, Scalar]
    live = z.clone().requires_grad_()
    wanted = energy(live, x, weight=0.5)
    value, grad = mlp_energy(z, lowered.terms)
    torch.testing.assert_close(value, wanted.detach(), rtol=0, atol=100 * TOLERANCE)
    torch.testing.assert_close(grad, torch.autograd.grad(wanted.sum(), live)[0], rtol=0, atol=100 * TOLERANCE)
    with pytest.raises(CannotLower, match="subtracts shape"):
        lower(energy, z, args=(x[:1],))
    with pytest.raises(CannotLower, match="not plain data"):
        lower(energy, z, args=(x,), kwargs={"weight": Counts()})


class Joint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4 + 6, 8), nn.SiLU(), nn.Linear(8, 1))

    mmebm_pure = True

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return self.net(torch.cat([x["word"], x["image"].flatten(1)], dim=1)).squeeze(1)


def test_modalities_in_another_order_than_the_state_and_one_not_read() -> None:
    state = {"image": torch.randn(3, 2, 3), "other": torch.randn(3, 5), "word": torch.randn(3, 4)}
    (term,) = assert_same(Joint(), state)
    assert isinstance(term, Scalar) and term.stack.sizes == (15, 8, 1)
    assert not term.stack.weights[0][:, 6:11].any()


def test_log_prob_turns_the_sign() -> None:
    energy, x = Plain(), torch.randn(5, 6)
    value, _ = mlp_energy(x, lower(energy, x, log_prob=True).terms)
    torch.testing.assert_close(value, -energy(x).detach(), rtol=0, atol=TOLERANCE)


# -- what is not recognised


CALLS: list[Any] = []


class Counts(Plain):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x)


class Appends(Plain):
    def forward(self, x: Tensor) -> Tensor:
        CALLS.append(x)
        return self.net(x)


class Prints(Plain):
    def forward(self, x: Tensor) -> Tensor:
        print("called")
        return self.net(x)


class Property(Plain):
    @property
    def factor(self) -> float:
        CALLS.append("property")
        return 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.net(x)


class Overridden(Gaussian):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Branches(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if (x**2).sum() > 0 else -self.net(x)


class Outside(Plain):
    """Uses a module that is none of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + ELSEWHERE(x).squeeze(1)


class Hidden(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.__dict__["other"] = Appends()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.other(x)


ELSEWHERE = Appends()


def hooked() -> nn.Module:
    net = Plain()
    net.net[0].register_forward_hook(lambda *_: CALLS.append("hook"))
    return net


def replaced() -> nn.Module:
    net = Plain()
    net.forward = lambda x: CALLS.append(x)  # pyright: ignore[reportAttributeAccessIssue]
    return net


def sequential(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), *layers, nn.Linear(6, 1))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "counts its calls": (Counts, "may have an effect|not known to be without effect"),
    "appends": (Appends, "append"),
    "names a module elsewhere": (Outside, "append"),
    "holds a module out of sight": (Hidden, "append"),
    "prints": (Prints, "print"),
    "property": (Property, "factor"),
    "subclass": (Overridden, "overrides forward"),
    "branches": (Branches, "__gt__"),
    "hook": (hooked, "hooks"),
    "forward replaced": (replaced, "replaced"),
    "partial": (lambda: functools.partial(Plain()), "partial"),
    "train-mode dropout": (lambda: sequential(nn.Dropout()), "dropout is on"),
    "train-mode spectral norm": (lambda: Normed(torch.nn.utils.parametrizations.spectral_norm), "train mode"),
    "batch norm": (lambda: sequential(nn.BatchNorm1d(6)), "it holds a BatchNorm1d"),
    "layer norm": (lambda: sequential(nn.LayerNorm(6)), "it holds a LayerNorm"),
    "tanh GELU": (lambda: sequential(nn.GELU(approximate="tanh")), "approximate"),
    "another softplus": (lambda: sequential(nn.Softplus(beta=2.0)), "beta"),
    "unknown activation": (lambda: sequential(nn.Mish()), "it holds a Mish"),
    "two kinds of activation": (lambda: sequential(nn.ReLU(), nn.Linear(6, 6), nn.Tanh()), "activations differ"),
    "two linear layers": (lambda: sequential(), "without an activation"),
    "two activations": (lambda: sequential(nn.ReLU(), nn.ReLU()), "does not follow a linear layer"),
    "activation at the end": (lambda: nn.Sequential(nn.Linear(6, 1), nn.ReLU()), "activation follows its last layer"),
    "several outputs": (lambda: nn.Linear(6, 2), "returns shape"),
    "residual connection": (lambda: lambda x: GELU_NET(x + 0.1 * x), "adds|multiplies|values per chain"),
    "mean": (lambda: lambda x: GELU_NET(x).mean(), "mean"),
    "mixture": (lambda: GaussianMixture(torch.randn(3, 6)), "effect|GaussianMixture|uses"),
    "constant": (lambda: lambda x: x.new_zeros(x.shape[0]), "constant"),
    "sum over chains": (lambda: lambda x: (x**2).sum(0).sum(), "sums some"),
    "fourth power": (lambda: lambda x: ((x**2) ** 2).sum(1), "powers"),
    "conv": (lambda: nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 1, 1), nn.Flatten()), "it holds a Conv2d"),
    "wrong width": (lambda: nn.Linear(5, 1), "takes 5 inputs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason_and_without_a_call(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, reason = REFUSED[name]
    CALLS.clear()
    energy = make()
    buffers = {key: b.clone() for key, b in energy.named_buffers()} if isinstance(energy, nn.Module) else {}
    with pytest.raises(CannotLower, match=reason):
        lower(energy, torch.randn(5, 6))
    assert CALLS == [] and not hasattr(energy, "calls") and capsys.readouterr().out == ""
    for key, b in buffers.items():
        assert torch.equal(dict(energy.named_buffers())[key], b)


def test_a_linear_layer_over_the_last_of_three_dimensions_is_no_mlp_of_the_chain() -> None:
    with pytest.raises(CannotLower, match="flatten the state first"):
        lower(nn.Sequential(nn.Linear(6, 1), nn.Flatten()), torch.randn(5, 3, 6))


def test_autocast_is_not_folded() -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(CannotLower, match="autocast"):
        lower(Plain(), torch.randn(5, 6))


def test_another_dtype_than_the_state() -> None:
    with pytest.raises(CannotLower, match="float32"):
        lower(Plain().float(), torch.randn(5, 6))


def test_limits_are_said() -> None:
    def wide(*hidden: int, inputs: int = 3) -> str | None:
        return too_wide(lower(MLP(inputs, hidden), torch.randn(2, inputs)).terms)

    assert wide(LIMITS.hidden) is None and wide(*[5] * LIMITS.hidden_layers) is None
    assert wide(2, inputs=LIMITS.ends) is None
    assert "257 hidden units" in str(wide(257))
    assert "5 hidden layers" in str(wide(*[5] * 5))
    assert "0 hidden layers" in str(wide())
    assert "1025 inputs" in str(wide(2, inputs=1025))


# -- the energies themselves


def test_gaussian_and_mixture_are_densities(seed: int) -> None:
    mean, std = torch.randn(3), torch.rand(3) + 0.5
    x = torch.randn(7, 3)
    normal = torch.distributions.Normal(mean, std)
    wanted = normal.log_prob(x).sum(1) + std.log().sum() + 1.5 * math.log(2 * math.pi)
    torch.testing.assert_close(-Gaussian(mean, std)(x), wanted, rtol=0, atol=TOLERANCE)
    means, weights = torch.randn(4, 3), torch.rand(4) + 0.1
    scales = torch.rand(4) + 0.5
    mixture = GaussianMixture(means, scales, weights)
    reference = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(weights),
        torch.distributions.Independent(torch.distributions.Normal(means, scales.unsqueeze(1).expand(4, 3)), 1),
    )
    torch.testing.assert_close(-mixture(x) - mixture.log_normaliser(), reference.log_prob(x), rtol=0, atol=TOLERANCE)
    n = 200_000
    samples = mixture.sample(n, torch.Generator().manual_seed(seed))
    p = mixture.log_weights.exp().unsqueeze(1)
    centre = (p * means).sum(0)
    variance = (p * (scales.unsqueeze(1) ** 2 + (means - centre) ** 2)).sum(0)
    # 5.7 sigma of a mean of n samples
    assert ((samples.mean(0) - centre).abs() < 5.7 * (variance / n).sqrt()).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gaussian(0.0, -1.0), "std must be above 0"),
        (lambda: Gaussian(torch.zeros(2, 2)), "mean must be"),
        (lambda: GaussianMixture(torch.zeros(3)), "means must be"),
        (lambda: GaussianMixture(torch.zeros(3, 2), weights=torch.tensor([1.0, 0.0, 1.0])), "weights must be"),
        (lambda: MLP(3, (4,), "swish"), "activation must be one of"),  # pyright: ignore[reportArgumentType]
        (lambda: MLP(0), "at least 1"),
        (lambda: Sum(Plain(), weights=(1.0, 2.0)), "weights must be 1"),
    ],
)
def test_bad_arguments(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_energies_do_not_broadcast_over_chains_or_inputs() -> None:
    """A network's (chains, 1) beside a prior's (chains,) made all pairs of chains, whose gradient is so many times as
    large; a state of one element was counted once for each mean."""
    x = torch.zeros(7, 3)
    with pytest.raises(ValueError, match=r"each return \(chains,\), got the shapes \[\(7, 1\), \(7,\)\]"):
        Langevin(0.1).sample(Sum(nn.Linear(3, 1), Gaussian()), x, 1)
    for energy in (Gaussian(torch.zeros(5)), Gaussian(0.0, torch.ones(5)), GaussianMixture(torch.zeros(2, 5))):
        with pytest.raises(ValueError, match=r"x must have 5 elements a chain, .* got 1"):
            energy(x[:, :1])


def test_mlp_energy_and_gradient_reach_the_weights() -> None:
    energy, x = MLP(6, (5, 4)), torch.randn(3, 6)
    value, grad = energy.energy_and_gradient(x, backend="torch")
    live = x.clone().requires_grad_()
    wanted = energy(live)
    (by_autograd,) = torch.autograd.grad(wanted.sum(), live, create_graph=True)
    torch.testing.assert_close(grad, by_autograd, rtol=0, atol=TOLERANCE)
    parameters = list(energy.parameters())
    ours = torch.autograd.grad(value.sum() + grad.square().sum(), parameters)
    theirs = torch.autograd.grad(wanted.sum() + by_autograd.square().sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)


def test_the_systems_energies_are_terms(seed: int) -> None:
    from mmebm.training.presets.demo import energy_prior
    from mmebm.training.system import Posterior, System

    shapes = {"mnist": (1, 14, 14), "optdigits": (1, 8, 8), "word": (10,)}
    system = System(energy_prior(), shapes)
    x = {name: torch.randn(4, *shape) for name, shape in shapes.items()}
    assert [type(t) for t in assert_same(system.energy, x)] == [Scalar]
    z = torch.randn(4, 16)
    assert [type(t) for t in assert_same(system.prior, z)] == [Scalar]
    posterior = Posterior(system.generator, system.prior, x)
    # the posterior's sums of squares are of some 10^2, times weights of up to 6
    terms = lower(posterior, z).terms
    assert [type(t) for t in terms] == [Residual] * 3 + [Scalar]
    live = z.clone().requires_grad_()
    wanted = posterior(live)
    value, grad = mlp_energy(z, terms)
    torch.testing.assert_close(value, wanted.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(grad, torch.autograd.grad(wanted.sum(), live)[0], rtol=1e-11, atol=1e-11)
    given = Posterior(system.generator, system.prior, {"word": x["word"]})
    assert [type(t) for t in lower(given, z).terms] == [Residual, Scalar]


def test_quadratic_of_some_tensors_leaves_the_others_alone() -> None:
    state = [torch.randn(3, 2), torch.randn(3, 4)]
    (term,) = assert_same(lambda x: (x[1] ** 2).sum(1), state)
    assert isinstance(term, Quadratic) and not term.precision[:2].any()
