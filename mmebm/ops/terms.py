"""What the MLP ops take as an energy: a sum of terms, each a plain description of weights that stay the caller's.

    E(x) = sum_t E_t(x),  x (chains, inputs): all tensors of the state, flattened and side by side

The terms share their input, so that a joint energy, a latent prior, and the decoders of all modalities of a posterior
are each one call. :mod:`mmebm.energies` makes terms from modules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from mmebm.ops.common.address import require_dense
from mmebm.ops.common.description import PER_CHAIN, SHARED_OR_PER_CHAIN, Described, pack, tensors_in, unpack

__all__ = [
    "ACTIVATIONS", "LIMITS", "Activation", "Likelihood", "Quadratic", "Residual", "Scalar", "Stack", "Term",
    "check_terms", "inputs_of", "pack", "require_dense_terms", "tensors_of", "too_wide", "unpack",
]  # fmt: skip

Activation = Literal["relu", "leaky_relu", "silu", "gelu", "softplus", "tanh", "elu"]
Likelihood = Literal["gaussian", "laplace"]
ACTIVATIONS: Final[tuple[str, ...]] = get_args(Activation)


@dataclass(frozen=True)
class Limits:
    """What the fused rooms take; the reference takes anything."""

    hidden_layers: int = 4
    hidden: int = 256
    ends: int = 1024  # inputs, and outputs of a residual
    tensors: int = 32
    terms: int = 16


LIMITS: Final = Limits()


@dataclass(frozen=True, slots=True)
class Stack(Described):
    """Linear layers with one activation between them: ``W_n a(... a(W_1 x + b_1) ...) + b_n``.

    Attributes:
        weights: per layer (outputs, inputs), as ``nn.Linear`` has them.
        biases: per layer (outputs,) or ``None``.
        activation: between the layers. "gelu" is the exact one (erf).
        slope: of "leaky_relu" below 0, and the alpha of "elu"; the others have none.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    activation: Activation = "silu"
    slope: float = 0.0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Inputs, hidden widths, outputs."""
        return (self.weights[0].shape[1], *(w.shape[0] for w in self.weights))


@dataclass(frozen=True, slots=True)
class Scalar(Described):
    """``weight`` times the one output of a stack: a data energy, a latent energy prior; -1 for a log density."""

    stack: Stack
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Residual(Described):
    """Minus the log-likelihood of each chain's own target under a stack's outputs y, without the constant.

        weight sum_j (t_j - y_j)^2 / (2 scale^2)   gaussian;    weight sum_j |t_j - y_j| / scale   laplace

    Attributes:
        target: (chains, outputs).
        tanh: whether y is the tanh of the last layer's output.
        observed: bool (chains, outputs) or (1, outputs), the elements that count; ``None``: all.
    """

    stack: Stack
    target: Tensor = field(metadata=PER_CHAIN)
    scale: float
    likelihood: Likelihood = "gaussian"
    tanh: bool = False
    weight: float = 1.0
    observed: Tensor | None = field(default=None, metadata=SHARED_OR_PER_CHAIN)


@dataclass(frozen=True, slots=True)
class Quadratic(Described):
    """``1/2 sum_j precision_j (x_j - mean_j)^2``: a diagonal Gaussian; both of shape (inputs,)."""

    mean: Tensor
    precision: Tensor


Term: TypeAlias = "Scalar | Residual | Quadratic"


def inputs_of(term: Term) -> int:
    """The width of the input."""
    return term.mean.shape[0] if isinstance(term, Quadratic) else term.stack.sizes[0]


def tensors_of(term: Term) -> list[Tensor]:
    """The tensors a term holds."""
    return tensors_in(term)


def _check_stack(name: str, stack: Stack, inputs: int, device: torch.device) -> None:
    if len(stack.weights) == 0 or len(stack.biases) != len(stack.weights):
        counts = f"{len(stack.weights)} and {len(stack.biases)}"
        raise ValueError(f"{name} must have as many weights as biases (or None), at least one, got {counts}")
    if stack.activation not in ACTIVATIONS:
        raise ValueError(f"{name}.activation must be one of {list(ACTIVATIONS)}, got {stack.activation!r}")
    width = inputs
    for i, (w, b) in enumerate(zip(stack.weights, stack.biases, strict=True)):
        if not isinstance(w, Tensor) or w.dim() != 2 or w.shape[1] != width:
            raise ValueError(f"{name}.weights[{i}] must be (outputs, {width}), got {getattr(w, 'shape', w)!r:.60}")
        width = w.shape[0]
        if b is not None and (not isinstance(b, Tensor) or b.shape != (width,)):
            raise ValueError(f"{name}.biases[{i}] must be ({width},) or None, got {getattr(b, 'shape', b)!r:.60}")
        for t in (w, b):
            if t is not None and t.device != device:
                raise ValueError(f"{name} must be on {device} as the state is, got {t.device}")


def check_terms(terms: Sequence[Term], chains: int, inputs: int, device: torch.device) -> tuple[Term, ...]:
    """``terms`` as a tuple, all of them sound for a state (chains, inputs) on ``device``.

    Raises:
        TypeError, ValueError: naming the term.
    """
    if isinstance(terms, (Scalar, Residual, Quadratic)):
        terms = (terms,)
    if not isinstance(terms, (list, tuple)) or not terms:
        raise TypeError(f"terms must be a list of at least one Scalar, Residual or Quadratic, got {terms!r:.80}")
    for i, term in enumerate(terms):
        name = f"terms[{i}]"
        if isinstance(term, Quadratic):
            for field, t in (("mean", term.mean), ("precision", term.precision)):
                if t.shape != (inputs,) or t.device != device:
                    raise ValueError(
                        f"{name}.{field} must be ({inputs},) on {device}, got {tuple(t.shape)} on {t.device}"
                    )
        elif isinstance(term, Scalar):
            _check_stack(name, term.stack, inputs, device)
            if term.stack.sizes[-1] != 1:
                raise ValueError(f"{name} must have one output, got {term.stack.sizes[-1]}")
        elif isinstance(term, Residual):
            _check_stack(name, term.stack, inputs, device)
            shape = (chains, term.stack.sizes[-1])
            if term.target.shape != shape or term.target.device != device:
                got = f"{tuple(term.target.shape)} on {term.target.device}"
                raise ValueError(f"{name}.target must be {shape} on {device}, one row per chain, got {got}")
            if term.likelihood not in get_args(Likelihood):
                raise ValueError(f"{name}.likelihood must be one of {get_args(Likelihood)}, got {term.likelihood!r}")
            if not 0 < term.scale < math.inf:
                raise ValueError(f"{name}.scale must be above 0 and finite, got {term.scale!r}")
            mask = term.observed
            if mask is not None and (
                mask.dtype != torch.bool or mask.shape not in (shape, (1, shape[1])) or mask.device != device
            ):
                got = f"{mask.dtype} {tuple(mask.shape)} on {mask.device}"
                raise ValueError(f"{name}.observed must be bool {shape} or (1, {shape[1]}) on {device}, got {got}")
        else:
            raise TypeError(f"{name} must be a Scalar, Residual or Quadratic, got {type(term).__name__}")
    return tuple(terms)


def require_dense_terms(terms: Any, like: Tensor) -> None:
    """Raises a TypeError, naming the term, where it holds a tensor that no implementation takes beside ``like``."""
    for i, term in enumerate(terms if isinstance(terms, (list, tuple)) else [terms]):
        for t in tensors_of(term) if isinstance(term, (Scalar, Residual, Quadratic)) else []:
            if isinstance(t, Tensor):
                require_dense(f"a tensor of terms[{i}]", t, like)
                if not t.is_floating_point() and t.dtype != torch.bool:
                    raise TypeError(f"a tensor of terms[{i}] must be floating-point, got {t.dtype}")


def too_wide(terms: Sequence[Term]) -> str | None:
    """The first limit of the fused rooms (:data:`LIMITS`) that ``terms`` are above, or ``None``."""
    if len(terms) > LIMITS.terms:
        return f"{len(terms)} terms, taken are up to {LIMITS.terms}"
    for i, term in enumerate(terms):
        if inputs_of(term) > LIMITS.ends:
            return f"{inputs_of(term)} inputs, taken are up to {LIMITS.ends}"
        if isinstance(term, Quadratic):
            continue
        _, *hidden, outputs = term.stack.sizes
        if not 1 <= len(hidden) <= LIMITS.hidden_layers:
            return f"term {i} has {len(hidden)} hidden layers, taken are 1 to {LIMITS.hidden_layers}"
        if max(hidden) > LIMITS.hidden:
            return f"term {i} has {max(hidden)} hidden units, taken are up to {LIMITS.hidden}"
        if outputs > LIMITS.ends:
            return f"term {i} has {outputs} outputs, taken are up to {LIMITS.ends}"
    return None
