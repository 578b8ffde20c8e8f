"""The plain MLP energy: the one that whole chains of run in one call."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmebm.ops.mlp_energy import mlp_energy
from mmebm.ops.terms import ACTIVATIONS, Activation
from mmebm.state import choice, integer, sizes

_MODULES: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
}


class MLP(nn.Module):
    """E(x) = an MLP of the flattened x with one output.

    Args:
        inputs: elements of one chain.
        hidden: widths of the hidden layers, e.g. (200, 200).
        activation: one of :data:`mmebm.ops.terms.ACTIVATIONS`.

    Raises:
        TypeError, ValueError: for an unknown activation or a width below 1.
    """

    mmebm_pure = True

    def __init__(self, inputs: int, hidden: Sequence[int] = (128, 128), activation: Activation = "silu") -> None:
        super().__init__()
        choice("activation", activation, ACTIVATIONS)
        inputs, hidden = integer("inputs", inputs, 1, 2**63), sizes("hidden", hidden, 1)
        layers: list[nn.Module] = [nn.Flatten()]
        for i, (a, b) in enumerate(itertools.pairwise((inputs, *hidden, 1))):
            layers += ([_MODULES[activation]()] if i else []) + [nn.Linear(a, b)]
        self.net: nn.Sequential = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(chains, ...) -> (chains,)."""
        return self.net(x).squeeze(1)

    def energy_and_gradient(self, x: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
        """E(x) (chains,) and dE/dx in the shape of ``x`` in one pass (:func:`mmebm.ops.mlp_energy.mlp_energy`),
        differentiable in the weights: for score matching and gradient penalties."""
        from mmebm.energies.lower import lower

        # the graph to the weights must not be cut, which lower does: its terms are for chains
        terms = lower(self, x).terms
        linear = [layer for layer in self.net if isinstance(layer, nn.Linear)]
        stack = terms[0].stack  # pyright: ignore[reportAttributeAccessIssue]
        live = stack.mlp([m.weight for m in linear], [m.bias for m in linear], stack.activation, stack.slope)
        energy, grad = mlp_energy(torch.flatten(x, 1), [type(terms[0])(live)], backend=backend)  # pyright: ignore
        return energy, grad.reshape(x.shape)
