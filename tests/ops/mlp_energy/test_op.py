"""The op ``mlp_energy``: the reference against autograd, the C++ room against the reference, derivatives of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmebm import BackendError, native
from mmebm.ops.common.description import replaced
from mmebm.ops.langevin_mlp import cpp
from mmebm.ops.mlp_energy import mlp_energy
from mmebm.ops.mlp_energy.reference import mlp_energy as reference
from mmebm.ops.net.graph import Activation, Linear
from mmebm.ops.parity import MLP_TOLERANCE as FLOAT_TOLERANCE
from mmebm.ops.terms import ACTIVATIONS, Quadratic, Residual, Scalar, Stack, Term, pack, unpack

# fp32 and float64 may take different sides of a kink that is nearer than this.
KINK = 1e-4

MODULES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "relu": lambda a, slope: F.relu(a),
    "leaky_relu": F.leaky_relu,
    "silu": lambda a, slope: F.silu(a),
    "gelu": lambda a, slope: F.gelu(a),
    "softplus": lambda a, slope: F.softplus(a),
    "tanh": lambda a, slope: torch.tanh(a),
    "elu": F.elu,
}


pytestmark = pytest.mark.usefixtures("settings")


def written_out(x: Tensor, terms: Sequence[Term]) -> Tensor:
    """The energy as the docstrings of the terms define it, from torch's own functions."""
    total = x.new_zeros(x.shape[0])
    for term in terms:
        if isinstance(term, Quadratic):
            total = total + 0.5 * (term.precision * (x - term.mean) ** 2).sum(1)
            continue
        y = x
        for i, (w, b) in enumerate(zip(term.stack.weights, term.stack.biases, strict=True)):
            y = y @ w.T if b is None else y @ w.T + b
            if i + 1 < len(term.stack.weights):
                y = MODULES[term.stack.activation](y, term.stack.slope)
        if isinstance(term, Scalar):
            total = total + term.weight * y[:, 0]
            continue
        y = torch.tanh(y) if term.tanh else y
        distance = (term.target - y).abs() / term.scale
        value = distance if term.likelihood == "laplace" else 0.5 * distance**2
        if term.observed is not None:
            value = value * term.observed
        total = total + term.weight * value.sum(1)
    return total


# -- the reference


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_reference_is_what_autograd_finds(draw: Any, double: Callable, name: str) -> None:
    terms, x = double(draw.sum_of_all(30, 9, name)), draw.normal(30, 9).double().requires_grad_()
    exact = written_out(x, terms)
    (exact_grad,) = torch.autograd.grad(exact.sum(), x)
    energy, grad = reference(x.detach(), terms)
    # float64, sums of some hundred numbers of order 1
    torch.testing.assert_close(energy, exact.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, exact_grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ("silu", "gelu", "softplus", "tanh"))
def test_derivatives_of_the_reference(draw: Any, double: Callable, name: str) -> None:
    """Energy and gradient, differentiated once and twice in x and in every tensor, against differences."""
    terms = [
        Scalar(draw.stack(3, 4, 1, activation=name), -1.3),
        draw.residual(2, 3, 3, 2, 2, activation=name, tanh=True, mask=2),
        draw.quadratic(3),
    ]
    description, tensors = pack(double(terms))
    given = [t for t in tensors if t is not None and t.is_floating_point()]

    def energy(x: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        rest = iter(values)
        filled = [next(rest) if t is not None and t.is_floating_point() else t for t in tensors]
        return mlp_energy(x, unpack(description, filled), backend="torch")

    inputs = [t.detach().clone().requires_grad_() for t in (draw.normal(2, 3).double(), *given)]
    assert torch.autograd.gradcheck(energy, inputs)
    assert torch.autograd.gradgradcheck(energy, inputs)


def test_pack_and_unpack(draw: Any) -> None:
    terms = draw.sum_of_all(4, 5)
    terms.append(Scalar(draw.stack(5, 2, 1, activation="leaky_relu", slope=1e-30), float("-inf")))
    description, tensors = pack(terms)
    again = unpack(description, tensors)
    assert pack(again) == (description, tensors)
    for a, b in zip(again, terms, strict=True):
        assert type(a) is type(b)
        if isinstance(b, (Scalar, Residual)):
            assert isinstance(a, type(b)) and a.weight == b.weight and a.stack.slope == b.stack.slope
            assert all(v is w for v, w in zip(a.stack.weights, b.stack.weights, strict=True))
        if isinstance(a, Residual) and isinstance(b, Residual):
            assert a.target is b.target and a.observed is b.observed
            assert (a.scale, a.likelihood, a.tanh) == (b.scale, b.likelihood, b.tanh)


# -- the C++ room


def check_values(terms: Sequence[Term], x: Tensor, double: Callable, keep: Tensor | None = None) -> None:
    rows = torch.ones(x.shape[0], dtype=torch.bool) if keep is None else keep
    ours, torchs = cpp.energy_and_gradient(terms, x), reference(x, terms)
    exact = reference(x.double(), double(list(terms)))
    for name, a, b, c in zip(("energy", "gradient"), ours, torchs, exact, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        error, torch_error = ((v[rows].double() - c[rows]).abs().max().item() for v in (a, b))
        limit = 2 * torch_error + FLOAT_TOLERANCE * c[rows].abs().max().item()
        assert error <= limit, f"{name}: error {error:.3e}, torch's {torch_error:.3e}, limit {limit:.3e}"


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values(isa: str, draw: Any, double: Callable, margin: Callable, name: str) -> None:
    terms, x = draw.sum_of_all(100, 9, name), draw.normal(100, 9)
    check_values(terms, x, double, margin(x.double(), double(terms)) > KINK)


@pytest.mark.parametrize(
    "sizes",
    (
        (1, 1, 1),
        (3, 256, 1024),
        (33, 65, 63, 64),
        (1000, 200, 33),
        (1024, 3, 256, 1000),
        (64, 64, 64, 64, 64, 63),
        (2, 64, 64, 2),
        (7, 5, 6, 4),
    ),
)
def test_widths(isa: str, draw: Any, double: Callable, sizes: tuple[int, ...]) -> None:
    terms = [draw.residual(60, *sizes, activation="gelu"), Scalar(draw.stack(sizes[0], 40, 1))]
    check_values(terms, draw.normal(60, sizes[0]), double)


def test_no_hidden_layer(isa: str, draw: Any, double: Callable) -> None:
    """The dispatch leaves these to the reference; the room itself takes them."""
    check_values([draw.residual(60, 6, 11), Scalar(draw.stack(6, 1))], draw.normal(60, 6), double)


@pytest.mark.parametrize("backend", ("torch", "cpp"))
def test_derivatives_in_everything(need: Callable, draw: Any, double: Callable, backend: str) -> None:
    """Through the op, what training and second-order users take: against autograd in float64."""
    if backend == "cpp":
        need("cpp")
    terms = [Scalar(draw.stack(5, 16, 8, 1)), draw.residual(12, 5, 9, 4, tanh=True), draw.quadratic(5)]
    x = draw.normal(12, 5)
    probe, direction = torch.rand(12, generator=draw.generator), draw.normal(12, 5)

    def derivatives(x: Tensor, terms: list[Term], functional: Callable) -> list[Tensor]:
        description, tensors = pack(terms)
        leaves = [t.clone().requires_grad_() for t in (x, *tensors)]
        energy, grad = functional(leaves[0], unpack(description, leaves[1:]))
        return list(torch.autograd.grad((probe.to(x) * energy).sum() + (direction.to(x) * grad).sum(), leaves))

    def by_autograd(x: Tensor, terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
        energy = written_out(x, terms)
        return energy, torch.autograd.grad(energy.sum(), x, create_graph=True)[0]

    exact = derivatives(x.double(), double(terms), by_autograd)
    ours = derivatives(x, terms, lambda x, terms: mlp_energy(x, terms, backend=backend))
    for a, b in zip(ours, exact, strict=True):
        # sums over 12 chains of fp32 products of order 1 to 10
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_second_derivative_by_autograd(need: Callable, draw: Any, double: Callable) -> None:
    """The energy alone, differentiated twice through the op: its gradient is the op's other output."""
    need("cpp")
    terms, x = [Scalar(draw.stack(4, 12, 1))], draw.normal(6, 4).requires_grad_()
    energy, grad = mlp_energy(x, terms, backend="cpp")
    (first,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
    torch.testing.assert_close(first, grad, rtol=1e-5, atol=1e-6)  # fp32 sums of 12 numbers of order 1
    (second,) = torch.autograd.grad(first.square().sum(), x)
    wide = x.detach().double().requires_grad_()
    (g,) = torch.autograd.grad(written_out(wide, double(terms)).sum(), wide, create_graph=True)
    (exact,) = torch.autograd.grad(g.square().sum(), wide)
    torch.testing.assert_close(second.double(), exact, rtol=1e-4, atol=1e-5)


def test_forward_mode_is_the_reference_s(need: Callable, draw: Any, double: Callable) -> None:
    """A tangent ended at the op, and the derivative was 0. The bound: some roundings of values of order 1."""
    need("cpp")
    terms = double([Scalar(draw.stack(5, 7, 1)), draw.residual(6, 5, 8, 3)])
    x, v = draw.normal(6, 5).double(), draw.normal(6, 5).double()
    grad = mlp_energy(x, terms)[1]
    slope = torch.func.jvp(lambda x: mlp_energy(x, terms)[0], (x,), (v,))[1]
    assert (slope - (grad * v).sum(1)).abs().max() < 1e-13
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, v)
        assert torch.equal(torch.autograd.forward_ad.unpack_dual(mlp_energy(dual, terms)[0]).tangent, slope)
        with pytest.raises(native.BackendError, match="forward mode"):
            mlp_energy(dual, terms, backend="cpp")


def test_threads_and_splits(isa: str, draw: Any) -> None:
    terms, x = [Scalar(draw.stack(9, 50, 1)), draw.quadratic(9)], draw.normal(301, 9)
    expected = torch.cat([t.reshape(301, -1) for t in cpp.energy_and_gradient(terms, x)], 1)
    for threads in (2, 5):
        torch.set_num_threads(threads)
        again = torch.cat([t.reshape(301, -1) for t in cpp.energy_and_gradient(terms, x)], 1)
        assert torch.equal(again, expected)
    parts = [cpp.energy_and_gradient(terms, part) for part in x.split([1, 30, 170, 100])]
    for i, whole in enumerate(cpp.energy_and_gradient(terms, x)):
        assert torch.equal(torch.cat([part[i] for part in parts]), whole)


def test_no_chains(isa: str, draw: Any) -> None:
    energy, grad = mlp_energy(torch.zeros(0, 4), [Scalar(draw.stack(4, 3, 1))], backend="cpp")
    assert energy.shape == (0,) and grad.shape == (0, 4)


def test_not_finite(isa: str, draw: Any) -> None:
    x = draw.normal(20, 4)
    terms = [Scalar(draw.stack(4, 30, 1)), draw.quadratic(4)]
    healthy = cpp.energy_and_gradient(terms, x)
    broken = x.clone()
    broken[3, 2] = float("nan")
    energy, grad = cpp.energy_and_gradient(terms, broken)
    assert energy[3].isnan() and grad[3].isnan().all()
    rest = torch.arange(20) != 3
    assert torch.equal(energy[rest], healthy[0][rest]) and torch.equal(grad[rest], healthy[1][rest])


def one_way_off(kind: Any) -> tuple[Tensor, Scalar]:
    """A relu network whose gradient overflows on its way back into units that are off, and nowhere else."""
    draw = torch.Generator().manual_seed(5)
    sizes = (4, 8, 6, 1)
    weights = [torch.randn(o, i, generator=draw) for i, o in pairwise(sizes)]
    biases = [torch.randn(o, generator=draw) for o in sizes[1:]]
    biases[0][::2] = -1e3
    weights[2].abs_().mul_(1e20)
    weights[1][:, ::2] *= 1e20
    return torch.randn(40, 4, generator=draw), Scalar(Stack.mlp(tuple(weights), tuple(biases), kind))


def test_nothing_passes_a_unit_that_is_off(isa: str, double: Callable) -> None:
    x, term = one_way_off("relu")
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(written_out(leaf, [term]).sum(), leaf)
    assert grad.isfinite().all() and (grad != 0).any(1).sum() > 30
    for found in (reference(x, [term])[1], cpp.energy_and_gradient([term], x)[1]):
        torch.testing.assert_close(found, grad, rtol=1e-5, atol=float(1e-6 * grad.abs().max()))


# -- the op


@pytest.mark.parametrize("backend", ("torch", "cpp"))
def test_opcheck(need: Callable, draw: Any, backend: str) -> None:
    if backend == "cpp":
        need("cpp")
    terms, x = draw.sum_of_all(4, 5), draw.normal(4, 5).requires_grad_()
    description, tensors = pack(terms)
    given = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in tensors]
    torch.library.opcheck(torch.ops.mmebm.mlp_energy.default, (x, given, description, backend))


def test_compiles_as_one_graph(need: Callable, draw: Any) -> None:
    need("cpp")
    stack, x = draw.stack(5, 8, 1), draw.normal(6, 5)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        terms = [Scalar(Stack.mlp((w, *stack.weights[1:]), stack.biases))]
        energy, grad = mlp_energy(torch.sin(x), terms, backend="cpp")
        return (energy + grad.square().sum(1)).sum()

    def derivatives(function: Callable) -> tuple[Tensor, ...]:
        a, w = x.clone().requires_grad_(), stack.weights[0].clone().requires_grad_()
        return torch.autograd.grad(function(a, w), (a, w))

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(derivatives(compiled), derivatives(loss), strict=True):
        # compiled, the backward pass may order its sums differently
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_choice_of_backend(need: Callable, draw: Any, double: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    need("cpp")
    terms, x = [Scalar(draw.stack(5, 64, 1))], draw.normal(40, 5)
    ours, plain = mlp_energy(x, terms, backend="cpp"), mlp_energy(x, terms, backend="torch")
    assert torch.equal(mlp_energy(x, terms)[1], ours[1]) and not torch.equal(plain[1], ours[1])
    monkeypatch.setenv("MMEBM_BACKEND", "torch")
    assert torch.equal(mlp_energy(x, terms)[1], plain[1])
    monkeypatch.delenv("MMEBM_BACKEND")
    assert mlp_energy(x.double(), double(terms))[0].dtype == torch.float64
    with pytest.raises(native.BackendError, match="float32"):
        mlp_energy(x.double(), double(terms), backend="cpp")
    with pytest.raises(native.BackendError, match="hidden layers"):
        mlp_energy(x, [Scalar(draw.stack(5, 1))], backend="cpp")
    with pytest.raises(native.BackendError, match="not built for cuda"):
        mlp_energy(x, terms, backend="cuda")


def test_what_is_wrong_is_named(draw: Any) -> None:
    stack, x = draw.stack(5, 8, 1), draw.normal(4, 5)
    good = Scalar(stack)
    residual = draw.residual(4, 5, 6, 3)
    cases: list[tuple[type[Exception], str, Any, Any]] = [
        (TypeError, "x must be", x[0], good),
        (TypeError, "x must be", x.long(), good),
        (TypeError, "terms must be", x, []),
        (TypeError, r"terms\[0\] must be", x, [stack]),
        (ValueError, r"terms\[1\].weights\[0\]", x, [good, Scalar(draw.stack(4, 8, 1))]),
        (ValueError, r"terms\[0\].biases\[1\]", x, Scalar(Stack.mlp(stack.weights, (None, torch.zeros(2))))),
        (ValueError, "one output", x, Scalar(draw.stack(5, 8, 2))),
        (ValueError, "activation", x, Scalar(Stack.mlp(stack.weights, stack.biases, "sin"))),  # type: ignore[arg-type]
        (ValueError, "target", x, replace(residual, target=torch.zeros(3, 3))),
        (ValueError, "observed", x, replace(residual, observed=torch.zeros(4, 3))),
        (ValueError, "likelihood", x, replace(residual, likelihood="cauchy")),
        (ValueError, "scale", x, replace(residual, scale=0.0)),
        (ValueError, "mean", x, Quadratic(torch.zeros(4), torch.zeros(5))),
        (TypeError, r"terms\[0\] must be torch.float32", x, Quadratic(torch.zeros(5), torch.ones(5).double())),
        (TypeError, r"terms\[0\] must be torch.float64", x.double(), good),
        (TypeError, r"terms\[0\].weight must be a number", x, Scalar(stack, torch.tensor(2.0))),  # type: ignore[arg-type]
        (TypeError, r"terms\[0\].scale must be a number", x, replace(residual, scale="1")),
        (ValueError, "backend", x, good),
    ]
    for error, words, state, terms in cases:
        backend = "gpu" if words == "backend" else "auto"
        with pytest.raises(error, match=words):
            mlp_energy(state, terms, backend=backend)


def test_a_stack_of_several_activations_is_the_reference_s_alone(draw: Any) -> None:
    """Autograd through torch's own layers is the measure, in float64; the bound is some roundings of values of order 1.
    The fused implementations refuse it and say why."""
    (w0, b0), (w1, b1), (w2, b2) = (
        (draw.normal(o, i).double() / i**0.5, draw.normal(o).double()) for i, o in ((5, 9), (9, 7), (7, 1))
    )
    layers = (Linear(0, w0, b0), Activation(1, "tanh"), Linear(2, w1, b1), Activation(3, "elu", 0.7), Linear(4, w2, b2))
    x = draw.normal(6, 5).double().requires_grad_()
    value = F.linear(F.elu(F.linear(torch.tanh(F.linear(x, w0, b0)), w1, b1), 0.7), w2, b2).squeeze(1)
    (slope,) = torch.autograd.grad(value.sum(), x)
    terms = [Scalar(Stack(layers))]
    energy, grad = mlp_energy(x.detach(), terms)
    assert (energy - value).abs().max() < 1e-14 and (grad - slope).abs().max() < 1e-14
    single = [Scalar(Stack(tuple(replaced(layer, lambda t, _: t.float()) for layer in layers)))]
    with pytest.raises(BackendError, match=r"the activations \['tanh', 'elu'\], taken is one kind"):
        mlp_energy(x.detach().float(), single, backend="cpp")
    with pytest.raises(ValueError, match="several activations"):
        _ = terms[0].stack.activation
