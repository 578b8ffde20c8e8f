"""``residual``: value and gradient of the likelihood terms of all modalities in one call. Validation and dispatch.

The gradient is computed with the value and kept, so that the backward pass through the decoders starts from it. The
terms are those of :mod:`mmebm.ops.residual.reference`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Final, TypeAlias, Union

import torch
from torch import Tensor

from mmebm.ops import dispatch
from mmebm.ops.common.address import obstacle, require_dense
from mmebm.ops.common.untyped import LISTS, register
from mmebm.ops.residual import reference

__all__ = ["residual", "residual_and_gradient"]

# one for all modalities, or one per modality
Value: TypeAlias = Union[float, Tensor, "Sequence[float | Tensor]"]

LIKELIHOODS: Final = ("gaussian", "laplace", "categorical")


def _refusal(
    module: ModuleType, ys: list[Tensor], others: dict[str, Sequence[Any]], kinds: Sequence[str]
) -> str | None:
    """Why ``module`` does not take these arguments, or ``None``."""
    for name, column in (("predictions", ys), *others.items()):
        for i, t in enumerate(column):
            reason = obstacle(t) if isinstance(t, Tensor) else None
            if reason is not None:
                return f"{name}[{i}] is {reason}"
    return module.supports(ys, others["targets"], kinds)


def _check_classes(i: int, prediction: Tensor, target: Tensor, mask: Tensor | None) -> None:
    classes, target = prediction.shape[1], target.long()
    wrong = (target < 0) | (target >= classes)
    if mask is not None:
        wrong = wrong & mask
    if bool(wrong.any()):
        first = target[wrong].flatten()[0].item()
        raise ValueError(f"targets[{i}] must hold classes in [0, {classes}) where observed, got {first}")


# -- the op


_SCHEMA: Final = (
    "residual(Tensor[] predictions, Tensor[] targets, str[] likelihood, float[] numbers, Tensor?[] tensors, "
    "Tensor?[] observed, bool gradients, str backend) -> (Tensor, Tensor[])"
)


def _unpack(numbers: Sequence[float], tensors: Sequence[Tensor | None]) -> tuple[list[Any], list[Any]]:
    """Scales and weights, of which the op takes first all of the one, then all of the other."""
    values = [n if t is None else t for n, t in zip(numbers, tensors, strict=True)]
    return values[: len(values) // 2], values[len(values) // 2 :]


def _op(
    predictions: list[Tensor],
    targets: list[Tensor],
    likelihood: list[str],
    numbers: list[float],
    tensors: list[Tensor | None],
    observed: list[Tensor | None],
    gradients: bool,
    backend: str,
) -> tuple[Tensor, list[Tensor]]:
    kinds: list[Any] = likelihood
    scale, weight = _unpack(numbers, tensors)
    with torch.no_grad():
        for i, kind in enumerate(kinds):
            # elsewhere looking would make the host wait for the device: a NaN says it there
            if kind == "categorical" and targets[i].device.type == "cpu":
                _check_classes(i, predictions[i], targets[i], observed[i])
        others: dict[str, Sequence[Any]] = {"targets": targets, "scale": scale, "weight": weight, "observed": observed}
        module = dispatch.choose(
            "residual", backend, predictions[0].device, lambda _, module: _refusal(module, predictions, others, kinds)
        ).module
        if module is not None:
            return module.residual(predictions, targets, kinds, scale, weight, observed, gradients)
        value, grads = reference.residual(
            predictions, targets, likelihood=kinds, scale=scale, weight=weight, observed=observed, gradients=gradients
        )
        return value, [g.contiguous() for g in grads]


def _fake(
    predictions: list[Tensor],
    targets: list[Tensor],
    likelihood: list[str],
    numbers: list[float],
    tensors: list[Tensor | None],
    observed: list[Tensor | None],
    gradients: bool,
    backend: str,
) -> tuple[Tensor, list[Tensor]]:
    wide = any(y.dtype == torch.float64 for y in predictions)
    value = predictions[0].new_empty(predictions[0].shape[0], dtype=torch.float64 if wide else torch.float32)
    return value, [y.new_empty(y.shape) for y in predictions] if gradients else []


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    predictions, targets, likelihood, numbers, tensors, observed, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.likelihood, ctx.numbers, ctx.count, ctx.saved_gradients = likelihood, numbers, len(predictions), len(output[1])
    optional = [*tensors, *observed]
    ctx.present = [t is not None for t in optional]
    ctx.save_for_backward(*output[1], *predictions, *targets, *(t for t in optional if t is not None))


def _backward(ctx: Any, d_value: Tensor | None, d_grads: list[Tensor | None] | None) -> tuple[Any, ...]:
    """The saved gradients, per chain; for a second derivative autograd through the reference's gradients."""
    saved, n = list(ctx.saved_tensors), ctx.count
    grads, rest = saved[: ctx.saved_gradients], saved[ctx.saved_gradients :]
    predictions = rest[:n]
    found: list[Tensor | None] = [None] * n
    if d_value is not None:
        found = [(d_value.reshape(-1, *[1] * (g.dim() - 1)) * g).to(g.dtype) for g in grads]
    if d_grads is not None and any(d is not None for d in d_grads):
        targets, given = rest[n : 2 * n], iter(rest[2 * n :])
        optional = [next(given) if there else None for there in ctx.present]
        scale, weight = _unpack(ctx.numbers, optional[: 2 * n])
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # aliases, so that the graph ends here and, with create_graph, goes on into the predictions
            leaves = [y.view_as(y) if y.requires_grad else y.detach().requires_grad_() for y in predictions]
            _, again = reference.residual(
                leaves, targets, likelihood=ctx.likelihood, scale=scale, weight=weight, observed=optional[2 * n :]
            )
            second = torch.autograd.grad(
                [g for g, d in zip(again, d_grads, strict=True) if d is not None],
                leaves,
                [d for d in d_grads if d is not None],
                create_graph=create_graph,
                allow_unused=True,
            )
        found = [a if b is None else b if a is None else a + b for a, b in zip(found, second, strict=True)]  # pyright: ignore[reportUnnecessaryComparison]
    # torch wants a list back where it was given one of nothing but tensors, else None
    parts = ctx.present[: 2 * n], ctx.present[2 * n :]
    nothing = [[None] * len(part) if all(part) else None for part in parts]
    return found, [None] * n, None, None, *nothing, None, None


_library = register(_SCHEMA, _op, _fake, _backward, _setup)


class _Residual(torch.autograd.Function):
    """The op's value where nothing is compiled: torch's own wrapper of ops with lists costs 200 us a call (Xeon,
    2026-11-22). A second derivative is left to the op.
    """

    @staticmethod
    def forward(ctx: Any, settings: tuple[Any, ...], targets: list[Tensor], *predictions: Tensor) -> Tensor:
        likelihood, numbers, tensors, observed, backend = settings
        value, grads = _op(list(predictions), targets, likelihood, numbers, tensors, observed, True, backend)
        ctx.settings = settings
        ctx.save_for_backward(*grads, *predictions, *targets)
        return value

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Any, ...]:
        (d_value,) = d_outputs
        saved = list(ctx.saved_tensors)
        n = len(saved) // 3
        grads = saved[:n]
        if torch.is_grad_enabled():
            likelihood, numbers, tensors, observed, backend = ctx.settings
            _, grads = torch.ops.mmebm.residual(
                saved[n : 2 * n], saved[2 * n :], likelihood, numbers, tensors, observed, True, backend
            )
        elif d_value.device.type == "cpu" and bool((d_value == 1).all()):
            # of value.sum(), as chains have it. With a second reference autograd cannot make the saved tensor a leaf's
            # .grad, which the next backward pass would add to.
            ctx.kept = grads
            return None, None, *grads
        return None, None, *((d_value.reshape(-1, *[1] * (g.dim() - 1)) * g).to(g.dtype) for g in grads)


# -- the functional entry


def _list(name: str, value: Any) -> list[Tensor]:
    if isinstance(value, Tensor) or not isinstance(value, LISTS):
        raise TypeError(f"{name} must be a list of tensors, one per modality, got {type(value).__name__}")
    for i, t in enumerate(value):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}[{i}] must be a tensor, got {type(t).__name__}")
        require_dense(f"{name}[{i}]", t)
    return list(value)


def _check_modality(i: int, y: Tensor, target: Tensor, kind: str, chains: int, device: torch.device) -> None:
    if not y.is_floating_point():
        raise TypeError(f"predictions[{i}] must be floating-point, got {y.dtype}")
    if y.dim() == 0 or y.shape[0] != chains:
        raise ValueError(f"predictions[{i}] must have {chains} chains first, got shape {tuple(y.shape)}")
    if y.device != device or target.device != device:
        raise ValueError(
            f"predictions[{i}] and targets[{i}] must be on {device} as predictions[0], got {y.device} and "
            f"{target.device}"
        )
    expected = tuple(y.shape)
    if kind == "categorical":
        if y.dim() < 2 or y.shape[1] == 0:
            raise ValueError(f"predictions[{i}] must be logits (chains, classes, ...), got shape {expected}")
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise TypeError(f"targets[{i}] must be integer classes, got {target.dtype}")
        expected = (expected[0], *expected[2:])
    elif not target.is_floating_point():
        raise TypeError(f"targets[{i}] must be floating-point, got {target.dtype}")
    if tuple(target.shape) != expected:
        raise ValueError(f"targets[{i}] must have shape {expected}, got {tuple(target.shape)}")
    if target.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"targets[{i}] requires grad, and residual has no derivative in targets: detach it")


def _values(name: str, value: Any, chains: int, count: int, like: Tensor) -> list[float | Tensor]:
    """One number or 1-D tensor per modality."""
    each: list[Any] = list(value) if isinstance(value, LISTS) else [value] * count
    device = like.device
    if len(each) != count:
        raise ValueError(f"{name} must be one value or a list of {count}, one per modality, got {len(each)}")
    for i, v in enumerate(each):
        if isinstance(v, Tensor):
            require_dense(f"{name}[{i}]", v, like if v.device == device else None)
            if v.numel() != 1 and tuple(v.shape) not in {(chains,), (chains, *[1] * (v.dim() - 1))}:
                raise ValueError(f"{name}[{i}] must hold one value or one for each of {chains} chains, got {v.shape}")
            if not v.is_floating_point() or (v.device != device and v.numel() != 1):
                raise ValueError(f"{name}[{i}] must be floating-point on {device}, got {v.dtype} on {v.device}")
            if v.requires_grad and torch.is_grad_enabled():
                raise ValueError(f"{name}[{i}] requires grad, and residual has no derivative in {name}: detach it")
            each[i] = v.to(device).reshape(-1)
        elif isinstance(v, bool) or not isinstance(v, (int, float)):
            raise TypeError(f"{name}[{i}] must be a number or a tensor, got {type(v).__name__}")
        elif not math.isfinite(v) or (name == "scale" and v <= 0):
            raise ValueError(f"{name}[{i}] must be finite{' and positive' if name == 'scale' else ''}, got {v}")
        else:
            each[i] = float(v)
    return each


def _masks(observed: Any, targets: list[Tensor]) -> list[Tensor | None]:
    masks: Any = [None] * len(targets) if observed is None else observed
    if isinstance(masks, Tensor) or not isinstance(masks, LISTS) or len(masks) != len(targets):
        raise ValueError(f"observed must be None or a list of {len(targets)}, one per modality, got {observed!r:.80}")
    for i, (mask, target) in enumerate(zip(masks, targets, strict=True)):
        if mask is None:
            continue
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"observed[{i}] must be None or a boolean tensor, got {type(mask).__name__}")
        require_dense(f"observed[{i}]", mask)
        sizes = zip(reversed(mask.shape), reversed(target.shape), strict=False)
        if mask.dim() > target.dim() or any(m not in (1, t) for m, t in sizes):
            shapes = f"{tuple(mask.shape)}, which does not broadcast to {tuple(target.shape)}"
            raise ValueError(f"observed[{i}] must broadcast against its targets, got {shapes}")
        if mask.device != target.device:
            raise ValueError(f"observed[{i}] must be on {target.device} as its targets, got {mask.device}")
        require_dense(f"observed[{i}]", mask, target)
    return list(masks)


def _call(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    likelihood: str | Sequence[str],
    scale: Value,
    weight: Value,
    observed: Sequence[Tensor | None] | None,
    backend: str,
    gradients: bool | None,
) -> tuple[Tensor, list[Tensor]]:
    ys, ts = _list("predictions", predictions), _list("targets", targets)
    if len(ys) == 0 or len(ts) != len(ys):
        raise ValueError(
            f"predictions and targets must have one tensor for each modality, at least one, got {len(ys)} and {len(ts)}"
        )
    kinds: list[Any] = [likelihood] * len(ys) if isinstance(likelihood, str) else list(likelihood)
    if len(kinds) != len(ys):
        raise ValueError(f"likelihood must be one name or a list of {len(ys)}, one per modality, got {len(kinds)}")
    for i, kind in enumerate(kinds):
        if kind not in LIKELIHOODS:
            raise ValueError(f"likelihood[{i}] must be one of {', '.join(LIKELIHOODS)}, got {kind!r}")
    chains = ys[0].shape[0] if ys[0].dim() else 0
    device = ys[0].device
    for name, column in (("predictions", ys), ("targets", ts)):
        for i, t in enumerate(column):
            if t.device == device:
                require_dense(f"{name}[{i}]", t, ys[0])
    for i, (y, target, kind) in enumerate(zip(ys, ts, kinds, strict=True)):
        _check_modality(i, y, target, kind, chains, device)
    factors = [*_values("scale", scale, chains, len(ys), ys[0]), *_values("weight", weight, chains, len(ys), ys[0])]
    settings = (
        kinds,
        [f if isinstance(f, float) else math.nan for f in factors],
        [f if isinstance(f, Tensor) else None for f in factors],
        _masks(observed, ts),
    )
    if dispatch.forward_mode("residual", backend, *ys, *ts, *factors):
        scales, weights = factors[: len(ys)], factors[len(ys) :]
        return reference.residual(
            ys, ts, likelihood=kinds, scale=scales, weight=weights, observed=settings[3], gradients=gradients is True
        )
    if gradients is None:
        gradients = torch.is_grad_enabled() and any(y.requires_grad for y in ys)
        if gradients and not torch.compiler.is_compiling():
            return _Residual.apply((*settings, backend), ts, *ys), []  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return torch.ops.mmebm.residual(ys, ts, *settings, gradients, backend)


def residual(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    *,
    likelihood: str | Sequence[str] = "gaussian",
    scale: Value = 1.0,
    weight: Value = 1.0,
    observed: Sequence[Tensor | None] | None = None,
    backend: str = "auto",
) -> Tensor:
    """-sum_m w_m log p(target_m | prediction_m) without the constants: (chains,). Works under ``torch.compile``.

    Differentiable in the predictions, also twice: the second derivative goes through the reference, as does
    differentiation in forward mode.

    Args:
        predictions: per modality (chains, ...), float32, bfloat16 or float16, or float64 (the reference); logits
            (chains, classes, ...) where categorical. Arithmetic is float32, of float64 float64.
        targets: of the same shapes, floating; integer classes (chains, ...) where categorical.
        likelihood: "gaussian", "laplace" or "categorical", one for all modalities or a list.
        scale: the standard deviation, or Laplace's scale; not used where categorical. A number, or a tensor of one
            value or one per chain, for all modalities or in a list. Tensors are not checked to be positive.
        weight: factor of the modality's term, likewise; may be 0 or negative.
        observed: per modality ``None`` or a boolean mask that broadcasts against its targets: the elements that count.
            The others may hold anything, NaN and classes that do not exist too.
        backend: "auto" takes C++ where predictions are on the CPU, else the reference; "torch", "cpp" and "triton" are
            taken as asked for. ``MMEBM_BACKEND`` replaces "auto". Triton has not been timed on a GPU, so that "auto"
            does not take it.

    Returns:
        float32, or float64 where a prediction is.

    Raises:
        TypeError, ValueError: for anything else, naming the argument. A class outside its range raises on the CPU; on
            a GPU, where looking would wait for the device, it makes the chain's value NaN.
        BackendError: where ``backend`` cannot take these tensors.
    """
    return _call(predictions, targets, likelihood, scale, weight, observed, backend, None)[0]


def residual_and_gradient(
    predictions: Sequence[Tensor],
    targets: Sequence[Tensor],
    *,
    likelihood: str | Sequence[str] = "gaussian",
    scale: Value = 1.0,
    weight: Value = 1.0,
    observed: Sequence[Tensor | None] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, list[Tensor]]:
    """:func:`residual` and its gradients in the predictions, of their shapes and dtypes, in one pass.

    Both are differentiable in the predictions.

    What a posterior chain needs: ``torch.autograd.grad(predictions, z, gradients)`` is the gradient in z.
    """
    return _call(predictions, targets, likelihood, scale, weight, observed, backend, True)
