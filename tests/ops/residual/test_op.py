"""The op ``residual``: terms and gradients against autograd of the written formulas, C++ against the reference."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmebm import native
from mmebm.ops.parity import GRADIENT_TOLERANCE as GRADIENT
from mmebm.ops.parity import HALF
from mmebm.ops.parity import VALUE_TOLERANCE as VALUE
from mmebm.ops.residual import cpp as residual_cpp
from mmebm.ops.residual import op, reference

pytestmark = pytest.mark.usefixtures("cpp")

KINDS = ("gaussian", "laplace", "categorical")
# The reference in float64 against torch's losses: rounding of sums of up to 10^4 terms.
DOUBLE = 1e-11
SHAPES = [(), (1,), (7,), (16,), (33,), (3, 4, 5), (2047,), (2048,), (2049,), (3, 28, 28), (5000,)]
# classes first
LOGITS = [(1,), (2,), (16,), (33,), (2500,), (5, 7), (27, 8), (3, 2, 9), (3, 700), (100, 40), (2100, 3), (1, 4)]


def written(
    y: Tensor, t: Tensor, kind: str, scale: float | Tensor, weight: float | Tensor, mask: Tensor | None
) -> Tensor:
    """One modality's term as the textbook has it, by torch's own losses: what autograd is taken of."""
    if kind == "categorical":
        each = F.cross_entropy(y, t.long(), reduction="none")
    else:
        power = 2 if kind == "gaussian" else 1
        s = scale.to(y.dtype).view(-1, *[1] * (y.dim() - 1)) if isinstance(scale, Tensor) else scale
        each = ((y - t.to(y.dtype)).abs() / s) ** power / power
    if mask is not None:
        each = each * mask
    return each.reshape(y.shape[0], -1).sum(1) * weight


def draw(
    rng: random.Random,
    generator: torch.Generator,
    chains: int,
    kind: str,
    shape: tuple[int, ...] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Predictions, targets, and a mask or none."""
    shape = shape if shape is not None else rng.choice(LOGITS if kind == "categorical" else SHAPES)
    dtype = dtype or rng.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16))
    y = (3 * torch.randn((chains, *shape), generator=generator)).to(dtype)
    if kind == "categorical":
        integers = rng.choice((torch.int64, torch.int32, torch.int16))
        t = torch.randint(0, shape[0], (chains, *shape[1:]), generator=generator).to(integers)
    else:
        t = torch.randn((chains, *shape), generator=generator).to(rng.choice((dtype, torch.float32, torch.float64)))
    mask = rng.choice([None, t.shape, t.shape[1:], (chains, *[1] * (t.dim() - 1)), (1,) * t.dim()])
    return y, t, None if mask is None else torch.rand(tuple(mask), generator=generator) < 0.6


def factor(rng: random.Random, generator: torch.Generator, chains: int) -> float | Tensor:
    kind = rng.choice(("number", "number", "one", "chain", "column"))
    if kind == "number":
        return rng.uniform(0.2, 2.0)
    shape = {"one": (1,), "chain": (chains,), "column": (chains, 1, 1)}[kind]
    return 0.2 + torch.rand(shape, generator=generator)


def flat(value: float | Tensor) -> float | Tensor:
    return value.double().reshape(-1) if isinstance(value, Tensor) else value


def compare(ys: list[Tensor], ts: list[Tensor], kinds: list[str], scale: Any, weight: Any, masks: Any) -> None:
    """C++, and the reference in float64, against autograd of the written terms in float64."""
    wide = [y.double().requires_grad_() for y in ys]
    each = [written(*args) for args in zip(wide, ts, kinds, map(flat, scale), map(flat, weight), masks, strict=True)]
    exact = torch.stack(each).sum(0)
    slopes = torch.autograd.grad(exact.sum(), wide)
    sizes = torch.stack(each).abs().sum(0).detach()
    settings = {"likelihood": kinds, "scale": scale, "weight": weight, "observed": masks}
    value, grads = op.residual_and_gradient([y.detach() for y in wide], ts, **settings, backend="torch")
    torch.testing.assert_close(value, exact.detach(), rtol=DOUBLE, atol=DOUBLE)
    torch.testing.assert_close(grads, list(slopes), rtol=DOUBLE, atol=DOUBLE)
    value, grads = op.residual_and_gradient(ys, ts, **settings, backend="cpp")
    assert value.dtype == torch.float32 and value.shape == exact.shape
    error = (value - exact.detach()).abs()
    assert (error <= VALUE[0] * sizes + VALUE[1]).all(), f"{kinds}: {error} of {sizes}"
    for y, g, slope, w in zip(ys, grads, slopes, weight, strict=True):
        assert g.dtype == y.dtype and g.shape == y.shape and g.is_contiguous()
        if g.numel() == 0:
            continue
        largest = max(float(slope.abs().max()), float(torch.as_tensor(w).abs().max()))
        limit = GRADIENT * largest * (1 + HALF[y.dtype]) + HALF[y.dtype] * slope.abs()
        if y.dtype == torch.float16:
            limit += 2.0**-25  # half of its smallest number
        worst = ((g.double() - slope).abs() - limit).max()
        assert worst <= 0, f"{kinds} {tuple(y.shape)} {y.dtype}: over the limit by {worst}"
    alone = op.residual(ys, ts, **settings, backend="cpp")
    assert torch.equal(alone, value), "the value must not depend on whether gradients are wanted"


@pytest.mark.parametrize("kind", KINDS)
def test_shapes(isa: str, seed: int, kind: str) -> None:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    for shape in LOGITS if kind == "categorical" else SHAPES:
        for chains in (1, 3):
            y, t, mask = draw(rng, generator, chains, kind, shape)
            compare([y], [t], [kind], [factor(rng, generator, chains)], [factor(rng, generator, chains)], [mask])


@pytest.mark.parametrize("part", range(4))
def test_random_modalities(isa: str, seed: int, part: int) -> None:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    for _ in range(6):
        chains, count = rng.choice((1, 2, 7, 40)), rng.choice((1, 2, 3, 6))
        kinds = [rng.choice(KINDS) for _ in range(count)]
        ys, ts, masks = map(list, zip(*[draw(rng, generator, chains, kind) for kind in kinds], strict=True))
        scale, weight = ([factor(rng, generator, chains) for _ in kinds] for _ in range(2))
        compare(ys, ts, kinds, scale, weight, masks)


@pytest.mark.parametrize("backend", ("torch", "cpp"))
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_observed_does_not_matter(isa: str, backend: str, kind: str) -> None:
    # more than a vector of 16, and its tail
    y, t = torch.linspace(-2, 2, 2 * 21).view(2, 21), torch.zeros(2, 21)
    mask = torch.arange(21) % 3 > 0
    if kind == "categorical":
        y, t = torch.stack([y, -y, y / 2], 1), torch.arange(42).view(2, 21) % 3
    clean = op.residual_and_gradient([y[..., mask]], [t[..., mask]], likelihood=kind, scale=0.5, backend=backend)
    y, t = y.clone(), t.clone()
    y[..., ~mask] = torch.tensor([math.nan, math.inf, -math.inf, 1e38, math.nan, 0.0, 1.0])
    t[..., ~mask] = -7 if kind == "categorical" else math.nan
    value, (grad,) = op.residual_and_gradient([y], [t], likelihood=kind, scale=0.5, observed=[mask], backend=backend)
    torch.testing.assert_close(value, clean[0], rtol=1e-6, atol=0)
    # the last bit may depend on where in a vector an element stands
    torch.testing.assert_close(grad[..., mask], clean[1][0], rtol=1e-6, atol=1e-7)
    assert not grad[..., ~mask].any()


@pytest.mark.parametrize("backend", ("torch", "cpp"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_nan_and_infinity_stay_visible(isa: str, backend: str, dtype: torch.dtype) -> None:
    y, logits = torch.zeros(4, 40, dtype=dtype), torch.zeros(4, 5, 20, dtype=dtype)
    y[1, 35], y[2, 3] = math.nan, math.inf
    logits[1, 2, 18], logits[3, 4, 1] = math.nan, -math.inf
    classes = torch.zeros(4, 20, dtype=torch.int64)
    for kind in ("gaussian", "laplace"):
        value, (g,) = op.residual_and_gradient([y], [torch.zeros(4, 40)], likelihood=kind, backend=backend)
        assert value.isnan().tolist() == [False, True, False, False] and value[2] == math.inf
        assert g.isnan().nonzero().tolist() == [[1, 35]] and g[2, 3] == (math.inf if kind == "gaussian" else 1)
    value, (g,) = op.residual_and_gradient([logits], [classes], likelihood="categorical", backend=backend)
    assert value.isnan().tolist() == [False, True, False, False]
    assert g.isnan().any(1).nonzero().tolist() == [[1, 18]]
    assert g[3, 4, 1] == 0  # no share for a logit of minus infinity, and the others share alike
    torch.testing.assert_close(g[3, 1:4, 1].float(), torch.full((3,), 0.25))
    classes[3, 1] = 4
    value = op.residual([logits], [classes], likelihood="categorical", backend=backend)
    assert value[3] == math.inf


def test_sixteen_bits_round_to_nearest(isa: str) -> None:
    """Every float16 through the narrowing and the widening: the residual from 0 is the number itself."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        y = bits.view(dtype)[None]
        zero = torch.zeros(1, 2**16)
        _, (g,) = op.residual_and_gradient([y], [zero], backend="cpp")
        nan = y.isnan()
        assert torch.equal(g.isnan(), nan) and torch.equal(g[~nan], y[~nan])
        # numbers between two 16-bit ones, ties among them
        for shift in (0.25, 0.5, 0.75):
            wide = y.float()
            unit = torch.nextafter(y, torch.full_like(y, math.inf)).float() - wide
            between = wide + shift * unit
            fine = torch.isfinite(between) & torch.isfinite(unit)
            _, (g,) = op.residual_and_gradient([torch.zeros_like(y)], [-between], backend="cpp")
            assert torch.equal(g[fine], between[fine].to(dtype))


# -- what results must not depend on


def big_case(seed: int, chains: int = 9) -> tuple[list[Tensor], list[Tensor], dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)
    kinds = ["gaussian", "laplace", "categorical", "categorical", "gaussian"]
    shapes = [(3, 28, 28), (10,), (27, 300), (33,), (64,)]
    drawn = [draw(rng, generator, chains, k, s, torch.float32) for k, s in zip(kinds, shapes, strict=True)]
    ys, ts, _ = map(list, zip(*drawn, strict=True))
    scale: list[Any] = [0.5, torch.rand(chains, generator=generator) + 0.5, 1.0, 1.0, 0.3]
    observed = [torch.rand(28, 28, generator=generator) < 0.5, None, None, None, torch.rand(chains, 64) < 0.5]
    return ys, ts, {"likelihood": kinds, "scale": scale, "weight": [1.0, 2.0, 0.5, 3.0, 1.0], "observed": observed}


def test_threads_do_not_matter(isa: str, seed: int) -> None:
    ys, ts, settings = big_case(seed)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        value, grads = op.residual_and_gradient(ys, ts, **settings, backend="cpp")
        results.append([value, *grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_batch_may_be_split(isa: str, seed: int) -> None:
    ys, ts, settings = big_case(seed)

    def part(rows: slice) -> list[Tensor]:
        cut = lambda v: v[rows] if isinstance(v, Tensor) and v.shape[:1] == (9,) else v
        some = {k: [cut(v) for v in settings[k]] for k in ("scale", "observed")}
        value, grads = op.residual_and_gradient([y[rows] for y in ys], [t[rows] for t in ts], **{**settings, **some})
        return [value, *grads]

    whole = part(slice(0, 9))
    for cut in (1, 4):
        for a, b, c in zip(whole, part(slice(0, cut)), part(slice(cut, 9)), strict=True):
            assert torch.equal(a, torch.cat([b, c]))


def test_instruction_sets_agree_bit_for_bit(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ys, ts, settings = big_case(seed)
    pick = [i for i, kind in enumerate(settings["likelihood"]) if kind != "categorical"]
    some = {k: [v[i] for i in pick] for k, v in settings.items()}
    results = []
    for name in native.cpu().isas():
        monkeypatch.setenv("MMEBM_CPU_ISA", name)
        value, grads = op.residual_and_gradient([ys[i] for i in pick], [ts[i] for i in pick], **some, backend="cpp")
        results.append([value, *grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_layouts(isa: str, seed: int) -> None:
    ys, ts, settings = big_case(seed)
    expected = op.residual_and_gradient(ys, ts, **settings)
    turned = [[t.transpose(0, -1).contiguous().transpose(0, -1) for t in each] for each in (ys, ts)]
    settings["observed"] = [m if m is None else m.t().contiguous().t() for m in settings["observed"]]
    value, grads = op.residual_and_gradient(*turned, **settings)
    assert torch.equal(value, expected[0])
    assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(grads, expected[1], strict=True))


@pytest.mark.parametrize("backend", ("torch", "cpp"))
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,), (0, 4, 2), (3, 4, 0)])
def test_empty(backend: str, shape: tuple[int, ...]) -> None:
    y = torch.zeros(shape)
    targets = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64)
    kinds = ["gaussian", "laplace", *(["categorical"] if len(shape) > 2 else [])]
    value, grads = op.residual_and_gradient(
        [y] * len(kinds), [y, y, targets][: len(kinds)], likelihood=kinds, backend=backend
    )
    assert value.tolist() == [0.0] * shape[0] and [g.shape for g in grads] == [y.shape] * len(kinds)
    # beside a modality that is not empty
    if shape[0]:
        value = op.residual([y, torch.ones(3, 2)], [y, torch.zeros(3, 2)], backend=backend)
        assert value.tolist() == [1.0] * 3


# -- autograd, torch.compile


def double_case(seed: int) -> tuple[list[Tensor], list[Tensor], dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    ys = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((2, 3, 2), (2, 5), (2, 3, 4), (2, 4))]
    ts: list[Tensor] = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in ys[:2]]
    # away from the kink of the absolute value, which finite differences would step over
    ts[1] = torch.where((ys[1] - ts[1]).abs() < 1e-3, ts[1] + 0.1, ts[1])
    ts += [torch.randint(0, 3, (2, 4), generator=generator), torch.randint(0, 4, (2,), generator=generator)]
    return (
        [y.requires_grad_() for y in ys],
        ts,
        {
            "likelihood": ["gaussian", "laplace", "categorical", "categorical"],
            "scale": [0.5, 0.7, 1.0, 1.0],
            "weight": [1.0, torch.rand(2, generator=generator, dtype=torch.float64), 2.0, 1.0],
            "observed": [torch.tensor([True, False]), None, torch.tensor([True, True, False, True]), None],
        },
    )


def test_gradcheck(seed: int) -> None:
    ys, ts, settings = double_case(seed)
    function = lambda *ys: op.residual(ys, ts, **settings)
    assert torch.autograd.gradcheck(function, ys)
    assert torch.autograd.gradgradcheck(function, ys)


def test_second_derivative_of_the_cpp_room(seed: int) -> None:
    """Through a decoder, against autograd of the written terms: the Hessian in z."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 12, generator=generator)
    target = torch.randn(1, 12, generator=generator)
    z = torch.randn(4, generator=generator)

    def hessian(term: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.autograd.functional.hessian(lambda z: term(torch.tanh(z @ weight)[None]).sum(), z)

    ours = hessian(lambda y: op.residual([y], [target], scale=0.5, backend="cpp"))
    expected = hessian(lambda y: written(y, target, "gaussian", 0.5, 1.0, None))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert expected.abs().max() > 1


def test_backward_passes_add_up() -> None:
    y = torch.linspace(1, 2, 24).view(4, 6).requires_grad_()
    value = op.residual([y], [torch.zeros(4, 6)])
    for passes in (1, 2, 3):
        value.sum().backward(retain_graph=True)
        torch.testing.assert_close(y.grad, passes * y.detach())
    ((2 * value).sum() + value[1]).backward()
    torch.testing.assert_close(y.grad, y.detach() * torch.tensor([5.0, 6.0, 5.0, 5.0])[:, None])


def test_one_backward_through_two_decoders(seed: int) -> None:
    ys, ts, settings = big_case(seed)
    settings = {k: v[:2] for k, v in settings.items()}
    z = torch.full((9, 1), 0.3, requires_grad=True)
    decoded = [ys[0] * z.view(9, 1, 1, 1), ys[1] * z]
    expected = torch.autograd.grad(op.residual(decoded, ts[:2], **settings).sum(), z, retain_graph=True)[0]
    value, grads = op.residual_and_gradient(decoded, ts[:2], **settings)
    with torch.no_grad():
        assert torch.equal(value, op.residual(decoded, ts[:2], **settings))
    assert torch.equal(torch.autograd.grad(decoded, z, grads)[0], expected)


def test_modes(seed: int) -> None:
    ys, ts, settings = big_case(seed)
    expected = op.residual(ys, ts, **settings)
    with torch.inference_mode():
        assert torch.equal(op.residual(ys, ts, **settings), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(op.residual(ys, ts, **settings), expected)
    double = op.residual([y.double() for y in ys], ts, **settings)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), expected)
    z = ys[0].clone().requires_grad_()
    mixed = op.residual([z, ys[1].double()], ts[:2], **{k: v[:2] for k, v in settings.items()})
    assert mixed.dtype == torch.float64 and torch.autograd.grad(mixed.sum(), z)[0].dtype == torch.float32


@pytest.mark.parametrize("kind", ("gaussian", "categorical"))
def test_forward_mode_is_the_reference_s(seed: int, kind: str) -> None:
    """A tangent ended at the op, and the derivative was 0. The bound: some roundings of values of order 1."""
    rng = torch.Generator().manual_seed(seed)
    y, v = (torch.randn(5, 4, generator=rng, dtype=torch.float64) for _ in range(2))
    target = torch.randint(4, (5,), generator=rng) if kind == "categorical" else torch.zeros_like(y)
    both = lambda y: op.residual_and_gradient([y], [target], likelihood=kind, scale=0.5)
    slope = torch.func.jvp(lambda y: op.residual([y], [target], likelihood=kind, scale=0.5), (y,), (v,))[1]
    assert (slope - (both(y)[1][0] * v).sum(1)).abs().max() < 1e-13
    assert torch.equal(torch.func.jvp(lambda y: both(y)[0], (y,), (v,))[1], slope)
    with pytest.raises(native.BackendError, match="forward mode"):
        torch.func.jvp(lambda y: op.residual([y], [target], likelihood=kind, backend="cpp"), (y,), (v,))


def test_opcheck(seed: int) -> None:
    ys, ts, settings = double_case(seed)
    numbers = [0.5, 0.7, 1.0, 1.0, 1.0, math.nan, 2.0, 1.0]
    tensors: list[Tensor | None] = [None] * 8
    tensors[5] = settings["weight"][1]
    for predictions in (ys, [y.detach().float().requires_grad_() for y in ys]):
        for gradients in (True, False):
            given = predictions if gradients else [y.detach() for y in predictions]
            arguments = (given, ts, settings["likelihood"], numbers, tensors, settings["observed"])
            torch.library.opcheck(torch.ops.mmebm.residual.default, (*arguments, gradients, "auto"))


def test_compiles_as_one_graph(seed: int) -> None:
    ys, ts, settings = big_case(seed, chains=3)

    def function(z: Tensor) -> Tensor:
        return op.residual([y * z for y in ys], ts, **{**settings, "scale": 0.5, "observed": None}).sum()

    torch._dynamo.reset()
    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        z = torch.tensor(0.7, requires_grad=True)
        value = run(z)
        results.append((value.detach(), torch.autograd.grad(value, z)[0]))
    torch._dynamo.reset()
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=0)


# -- the choice of a backend, and what is refused


def test_choice_of_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    y, t = [torch.zeros(2, 3)], [torch.ones(2, 3)]
    for backend, word in {"cuda": "cuda", "cpp": "float64"}.items():
        with pytest.raises(native.BackendError, match=word):
            op.residual([y[0].double()], t, backend=backend)
    with pytest.raises(ValueError, match="'numpy'"):
        op.residual(y, t, backend="numpy")
    called = []
    monkeypatch.setattr(
        residual_cpp,
        "residual",
        lambda *args: (
            called.append(args)
            or reference.residual(
                args[0], args[1], likelihood=args[2], scale=args[3], weight=args[4], observed=args[5], gradients=args[6]
            )
        ),
    )
    op.residual(y, t)
    assert len(called) == 1
    monkeypatch.setenv("MMEBM_BACKEND", "torch")
    op.residual(y, t)
    assert len(called) == 1
    monkeypatch.delenv("MMEBM_BACKEND")
    monkeypatch.setattr(native, "_load", lambda name: (None, "not built for this test"))
    assert op.residual(y, t).tolist() == [1.5, 1.5] and len(called) == 1
    with pytest.raises(native.BackendError, match="not built for this test"):
        op.residual(y, t, backend="cpp")


Y, T = torch.zeros(3, 4), torch.zeros(3, 4)
CLASSES = torch.zeros(3, dtype=torch.int64)
REFUSED: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "a tensor": (TypeError, "predictions must be a list", {"predictions": Y}),
    "no modality": (ValueError, "at least one", {"predictions": [], "targets": []}),
    "counts": (ValueError, "got 1 and 2", {"targets": [T, T]}),
    "not a tensor": (TypeError, r"targets\[0\] must be a tensor", {"targets": [0]}),
    "integers": (TypeError, r"predictions\[0\].*int64", {"predictions": [Y.long()]}),
    "scalar": (ValueError, r"predictions\[0\].*shape \(\)", {"predictions": [Y[0, 0]], "targets": [T[0, 0]]}),
    "chains": (ValueError, r"predictions\[1\].*3 chains", {"predictions": [Y, Y[:2]], "targets": [T, T[:2]]}),
    "shape": (ValueError, r"targets\[0\].*\(3, 4\), got \(3, 5\)", {"targets": [torch.zeros(3, 5)]}),
    "no broadcast": (ValueError, r"targets\[0\]", {"targets": [torch.zeros(1, 4)]}),
    "device": (ValueError, "meta", {"targets": [T.to("meta")]}),
    "integer targets": (TypeError, r"targets\[0\].*int64", {"targets": [T.long()]}),
    "likelihood": (ValueError, "'normal'", {"likelihood": "normal"}),
    "likelihoods": (ValueError, "likelihood.*got 2", {"likelihood": ["gaussian", "laplace"]}),
    "float classes": (TypeError, r"targets\[0\].*integer", {"likelihood": "categorical", "targets": [torch.zeros(3)]}),
    "class": (ValueError, r"targets\[0\].*\[0, 4\).*got 4", {"likelihood": "categorical", "targets": [CLASSES + 4]}),
    "negative class": (ValueError, r"targets\[0\].*got -1", {"likelihood": "categorical", "targets": [CLASSES - 1]}),
    "no classes": (
        ValueError,
        r"predictions\[0\].*logits",
        {"likelihood": "categorical", "predictions": [Y[:, :0]], "targets": [CLASSES]},
    ),
    "scale": (ValueError, r"scale\[0\].*positive.*0", {"scale": 0.0}),
    "scale nan": (ValueError, r"scale\[0\]", {"scale": math.nan}),
    "scale type": (TypeError, r"scale\[0\]", {"scale": "wide"}),
    "scales": (ValueError, "scale.*got 2", {"scale": [1.0, 1.0]}),
    "scale shape": (ValueError, r"scale\[0\].*3 chains", {"scale": torch.ones(4)}),
    "scale per element": (ValueError, r"scale\[0\].*3 chains", {"scale": torch.ones(3, 4)}),
    "scale dtype": (ValueError, r"scale\[0\].*int64", {"scale": torch.ones(3).long()}),
    "scale grad": (ValueError, r"scale\[0\] requires grad", {"scale": torch.ones(3, requires_grad=True)}),
    "weight": (ValueError, r"weight\[0\].*inf", {"weight": math.inf}),
    "weight bool": (TypeError, r"weight\[0\].*bool", {"weight": True}),
    "target grad": (ValueError, r"targets\[0\] requires grad", {"targets": [T.clone().requires_grad_()]}),
    "mask dtype": (TypeError, r"observed\[0\].*boolean", {"observed": [T]}),
    "masks": (ValueError, "observed", {"observed": [None, None]}),
    "mask": (ValueError, r"observed\[0\].*\(3,\)", {"observed": [torch.ones(3, dtype=torch.bool)]}),
    "mask too large": (ValueError, r"observed\[0\]", {"observed": [torch.ones(2, 3, 4, dtype=torch.bool)]}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_names_what_is_wrong(name: str) -> None:
    error, words, changes = REFUSED[name]
    arguments = {"predictions": [Y], "targets": [T], **changes}
    with pytest.raises(error, match=words):
        op.residual(arguments.pop("predictions"), arguments.pop("targets"), **arguments)
    assert op.residual([Y], [T]).tolist() == [0.0] * 3


def test_binding_refuses_what_would_crash() -> None:
    cpu = native.cpu()
    value = torch.empty(3)
    names = ("likelihood", "storage", "target_storage", "observed", "observed_rows", "scales", "weights", "grad")
    good = dict.fromkeys(names, 0)
    good.update(positions=4, classes=1, prediction=Y.data_ptr(), target=T.data_ptr(), scale=1.0, weight=1.0)
    whole = {"chains": 3, "value": value.data_ptr(), "threads": 1, "isa": "auto"}

    def call(**changes: Any) -> None:
        row = {name: changes.get(name, entry) for name, entry in good.items()}
        cpu.residual({"modalities": [row], **{name: changes.get(name, entry) for name, entry in whole.items()}})

    call()
    assert value.tolist() == [0.0] * 3
    for wrong in (
        {"chains": -1},
        {"value": 0},
        {"likelihood": 3},
        {"positions": -1},
        {"positions": 2**41},
        {"classes": 2},
        {"storage": 3},
        {"target_storage": -1},
        {"prediction": 0},
        {"target": 0},
        {"likelihood": 2, "classes": 2**31},
    ):
        with pytest.raises(ValueError):
            call(**wrong)
    for name in ("likelihood", "positions", "observed_rows", "scale"):
        with pytest.raises(KeyError, match=name):
            cpu.residual({"modalities": [{k: v for k, v in good.items() if k != name}], **whole})
    with pytest.raises((RuntimeError, TypeError)):
        call(positions=1.5)
