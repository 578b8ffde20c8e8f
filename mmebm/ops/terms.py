"""What the MLP ops take as an energy: a sum of terms, each a plain description of weights that stay the caller's.

    E(x) = sum_t E_t(x),  x (chains, inputs): all tensors of the state, flattened and side by side

The terms share their input, so that a joint energy, a latent prior, and the decoders of all modalities of a posterior
are each one call. :mod:`mmebm.energies` makes terms from modules.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from mmebm.ops.common.address import require_dense
from mmebm.ops.common.description import PER_CHAIN, SHARED_OR_PER_CHAIN, Described, tensors_in
from mmebm.ops.common.description import pack as pack
from mmebm.ops.common.description import unpack as unpack
from mmebm.ops.common.untyped import LISTS
from mmebm.ops.net import graph
from mmebm.ops.net.graph import Linear

Activation = graph.Nonlinearity
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
    """Layers of which each reads the one before, and the first the whole input: a net without branches.

    The kinds are those of :mod:`mmebm.ops.net.graph`, layer ``i`` with ``x = i``. Taken are linear layers with an
    activation between them, ``W_n a(... a(W_1 x + b_1) ...) + b_n``; the fused implementations want one and the same
    activation and say so (:func:`too_wide`). What is no such stack is a :class:`~mmebm.ops.net.graph.Net`.
    """

    layers: tuple[Linear | graph.Activation, ...]

    @classmethod
    def mlp(
        cls,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        activation: Activation = "silu",
        slope: float = 0.0,
    ) -> Stack:
        """Linear layers with one activation between them.

        Args:
            weights: per layer (outputs, inputs), as ``nn.Linear`` has them.
            biases: per layer (outputs,) or ``None``.
            activation: between the layers. "gelu" is the exact one (erf).
            slope: of "leaky_relu" below 0, and the alpha of "elu"; the others have none.

        Raises:
            ValueError: for other than as many weights as biases, at least one.
        """
        if len(weights) == 0 or len(biases) != len(weights):
            counts = f"{len(weights)} and {len(biases)}"
            raise ValueError(f"there must be as many weights as biases (or None), at least one, got {counts}")
        layers: list[Linear | graph.Activation] = []
        for w, b in zip(weights, biases):
            if layers:
                layers.append(graph.Activation(len(layers), activation, slope))
            layers.append(Linear(len(layers), w, b))
        return cls(tuple(layers))

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """Of the linear layers, each (outputs, inputs)."""
        return tuple([layer.weight for layer in self.layers if isinstance(layer, Linear)])

    @property
    def biases(self) -> tuple[Tensor | None, ...]:
        """Of the linear layers, each (outputs,) or ``None``."""
        return tuple([layer.bias for layer in self.layers if isinstance(layer, Linear)])

    @property
    def activations(self) -> tuple[tuple[str, float], ...]:
        """(function, slope) between the linear layers."""
        return tuple([(a.function, a.slope) for a in self.layers if isinstance(a, graph.Activation)])

    @property
    def activation(self) -> Activation:
        """The one activation; "relu" where there is none. A ValueError where they differ."""
        return self._activation()[0]

    @property
    def slope(self) -> float:
        """That of :attr:`activation`."""
        return self._activation()[1]

    def _activation(self) -> tuple[Any, float]:
        if any(each != self.activations[0] for each in self.activations):
            raise ValueError(f"the stack has several activations, {self.activations}")
        return self.activations[0] if self.activations else ("relu", 0.0)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Inputs, hidden widths, outputs."""
        weights = self.weights
        return (weights[0].shape[1], *[w.shape[0] for w in weights])


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
    wanted = [graph.Activation if i % 2 else Linear for i in range(len(stack.layers))]
    if len(wanted) % 2 == 0 or any(type(layer) is not kind for layer, kind in zip(stack.layers, wanted)):
        kinds = [type(layer).__name__ for layer in stack.layers]
        raise ValueError(f"{name} must be linear layers with an activation between them, got {kinds}")
    if any(layer.x != i for i, layer in enumerate(stack.layers)):
        raise ValueError(f"{name} must read each layer's result in the next, got x of {[a.x for a in stack.layers]}")
    for function, _ in stack.activations:
        if function not in ACTIVATIONS:
            raise ValueError(f"{name}.activation must be one of {list(ACTIVATIONS)}, got {function!r}")
    width = inputs
    for i, (w, b) in enumerate(zip(stack.weights, stack.biases)):
        if not isinstance(w, Tensor) or w.dim() != 2 or w.shape[1] != width:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"{name}.weights[{i}] must be (outputs, {width}), got {getattr(w, 'shape', w)!r:.60}")
        width = w.shape[0]
        if b is not None and (not isinstance(b, Tensor) or b.shape != (width,)):  # pyright: ignore[reportUnnecessaryIsInstance]
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
        for factor in ("weight", "scale"):
            value = getattr(term, factor, 1.0)
            # a tensor's graph would end here
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"{name}.{factor} must be a number, got {value!r:.80}")
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
        elif isinstance(term, Residual):  # pyright: ignore[reportUnnecessaryIsInstance]
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
    for i, term in enumerate(terms if isinstance(terms, LISTS) else [terms]):
        for t in tensors_of(term) if isinstance(term, (Scalar, Residual, Quadratic)) else []:
            require_dense(f"a tensor of terms[{i}]", t, like)
            if not t.is_floating_point() and t.dtype != torch.bool:
                raise TypeError(f"a tensor of terms[{i}] must be floating-point, got {t.dtype}")
            # autocast makes one dtype of several
            if t.dtype not in (like.dtype, torch.bool) and not torch.is_autocast_enabled(like.device.type):
                raise TypeError(f"a tensor of terms[{i}] must be {like.dtype} as the state is, got {t.dtype}")


def too_wide(terms: Sequence[Term]) -> str | None:
    """What no fused implementation takes of ``terms``: above :data:`LIMITS`, or several activations; or ``None``."""
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
        if len(set(term.stack.activations)) > 1:
            return f"term {i} has the activations {[name for name, _ in term.stack.activations]}, taken is one kind"
        if max(hidden) > LIMITS.hidden:
            return f"term {i} has {max(hidden)} hidden units, taken are up to {LIMITS.hidden}"
        if outputs > LIMITS.ends:
            return f"term {i} has {outputs} outputs, taken are up to {LIMITS.ends}"
    return None
