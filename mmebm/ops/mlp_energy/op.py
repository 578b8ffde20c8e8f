"""``mlp_energy``: energy and gradient of a sum of MLP terms in one pass, differentiable in x and in the weights.

Rooms as :mod:`mmebm.ops.langevin_mlp` has them, in the same modules:

    supports_energy(terms, x) -> None, or the reason why not
    energy_and_gradient(terms, x) -> (chains,), (chains, inputs)
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor

from mmebm.ops import dispatch
from mmebm.ops.common.address import require_dense, unfit
from mmebm.ops.common.untyped import gradients, register
from mmebm.ops.mlp_energy.reference import mlp_energy as reference
from mmebm.ops.terms import Term, check_terms, pack, require_dense_terms, tensors_of, too_wide, unpack

__all__ = ["mlp_energy"]


def _refusal(module: ModuleType, terms: tuple[Term, ...], x: Tensor) -> str | None:
    """Why ``module`` does not take these arguments, or ``None``."""
    tensors = [t for term in terms for t in tensors_of(term)]
    return unfit("the terms", x, tensors, torch.bool) or too_wide(terms) or module.supports_energy(terms, x)


def _op(x: Tensor, tensors: list[Tensor | None], terms: str, backend: str) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        unpacked = unpack(terms, tensors)
        module = dispatch.choose("mlp_energy", backend, x.device, lambda _, m: _refusal(m, unpacked, x)).module
        return reference(x, unpacked) if module is None else module.energy_and_gradient(unpacked, x.contiguous())


def _fake(x: Tensor, tensors: list[Tensor | None], terms: str, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0]), x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, tensors, terms, _ = inputs
    ctx.present = [t is not None for t in tensors]
    ctx.terms = terms
    ctx.save_for_backward(x, *(t for t in tensors if t is not None))


def _backward(ctx: Any, d_energy: Tensor | None, d_grad: Tensor | None) -> tuple[Any, ...]:
    """By autograd through the reference, which is differentiable, so that it can be differentiated again."""
    x, *given = ctx.saved_tensors
    rest = iter(given)
    tensors = [next(rest) if there else None for there in ctx.present]
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # aliases, so that the graph ends here and, with create_graph, goes on into the inputs
        leaves = [t.view_as(t) if t.requires_grad else t for t in (x, *given)]
        rest = iter(leaves[1:])
        energy, grad = reference(leaves[0], unpack(ctx.terms, [next(rest) if there else None for there in ctx.present]))
        grads = gradients([(energy, d_energy), (grad, d_grad)], leaves, create_graph=create_graph)
    rest_grads = iter(grads[1:])
    return grads[0], [next(rest_grads) if t is not None else None for t in tensors], None, None


_SCHEMA: Final = "mlp_energy(Tensor x, Tensor?[] tensors, str terms, str backend) -> (Tensor, Tensor)"
_library = register(_SCHEMA, _op, _fake, _backward, _setup)


def mlp_energy(x: Tensor, terms: Sequence[Term], *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """E(x) and dE/dx in one pass. Differentiable, also twice, in ``x`` and in every tensor of the terms, and in forward
    mode by the reference.

    Args:
        x: (chains, inputs), floating.
        terms: see :mod:`mmebm.ops.terms`.
        backend: "auto", "torch", "cpp" or "triton".

    Returns:
        (chains,) and (chains, inputs).

    Raises:
        TypeError, ValueError: naming the argument.
        BackendError: where ``backend`` does not take these terms.
    """
    if isinstance(x, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        require_dense("x", x)
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() != 2:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"x must be a floating-point tensor (chains, inputs), got {getattr(x, 'shape', x)!r:.80}")
    require_dense_terms(terms, x)
    checked = check_terms(terms, x.shape[0], x.shape[1], x.device)
    description, tensors = pack(checked)
    if dispatch.forward_mode("mlp_energy", backend, x, *tensors):
        return reference(x, checked)
    return torch.ops.mmebm.mlp_energy(x, tensors, description, backend)
