"""Energy and gradient in x of a sum of MLP terms in one pass, in plain PyTorch: differentiable, any dtype and device.

The gradient is the hand-derived backward pass, so that it costs no autograd graph; autograd through it gives the
derivatives in the weights and the second ones in x.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mmebm.ops.net.graph import Activation, Linear
from mmebm.ops.terms import Quadratic, Residual, Stack, Term

_INV_SQRT_2PI = 1 / math.sqrt(2 * math.pi)


def activate(a: Tensor, name: str, slope: float) -> tuple[Tensor, Tensor]:
    """(act(a), act'(a)); at a kink the derivative is that of the left, as torch has it."""
    if name == "relu":
        return F.relu(a), (~(a <= 0)).to(a.dtype)
    if name == "leaky_relu":
        return F.leaky_relu(a, slope), torch.where(a > 0, torch.ones_like(a), slope)
    if name == "silu":
        s = torch.sigmoid(a)
        return a * s, s * (1 + a * (1 - s))
    if name == "gelu":
        phi = 0.5 * (1 + torch.erf(a * math.sqrt(0.5)))
        return a * phi, phi + a * torch.exp(-0.5 * a * a) * _INV_SQRT_2PI
    if name == "softplus":
        return F.softplus(a), torch.sigmoid(a)
    if name == "tanh":
        h = torch.tanh(a)
        return h, 1 - h * h
    if name == "elu":
        h = F.elu(a, slope)
        return h, torch.where(a > 0, torch.ones_like(a), h + slope)
    raise ValueError(f"activation {name!r} is not known")


def _forward(x: Tensor, stack: Stack) -> tuple[Tensor, list[Tensor]]:
    """The outputs, and act' of each hidden layer."""
    h = x
    slopes: list[Tensor] = []
    for layer in stack.layers:
        if isinstance(layer, Linear):
            h = F.linear(h, layer.weight, layer.bias)
        else:
            h, d = activate(h, layer.function, layer.slope)
            slopes.append(d)
    return h, slopes


def _through(d: Tensor, layer: Activation, slope: Tensor) -> Tensor:
    """``d`` behind an activation. Where relu is off nothing passes, be it infinite or NaN."""
    return torch.where(slope == 0, 0.0, d) if layer.function == "relu" else d * slope


def _backward(d: Tensor, stack: Stack, slopes: list[Tensor]) -> Tensor:
    """From dE/d(outputs) to dE/dx."""
    activations = [layer for layer in stack.layers if isinstance(layer, Activation)]
    for w, layer, slope in zip(reversed(stack.weights[1:]), reversed(activations), reversed(slopes), strict=True):
        d = _through(d @ w, layer, slope)
    return d @ stack.weights[0]


def mlp_energy(x: Tensor, terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
    """E(x) (chains,) and dE/dx (chains, inputs).

    Args:
        x: (chains, inputs).
        terms: see :mod:`mmebm.ops.terms`.
    """
    energy, grad = x.new_zeros(x.shape[0]), torch.zeros_like(x)
    for term in terms:
        if isinstance(term, Quadratic):
            moved = x - term.mean
            pull = term.precision * moved
            energy, grad = energy + 0.5 * (pull * moved).sum(1), grad + pull
            continue
        out, slopes = _forward(x, term.stack)
        if isinstance(term, Residual):
            y = torch.tanh(out) if term.tanh else out
            r = y - term.target
            if term.observed is not None:
                r = torch.where(term.observed, r, 0.0)
            if term.likelihood == "gaussian":
                value, d = 0.5 * (r * r).sum(1) / term.scale**2, r / term.scale**2
            else:
                value, d = r.abs().sum(1) / term.scale, r.sign() / term.scale
            d = term.weight * d * ((1 - y * y) if term.tanh else 1.0)
            energy = energy + term.weight * value
        else:
            energy = energy + term.weight * out.squeeze(1)
            d = torch.full_like(out, term.weight)
        grad = grad + _backward(d, term.stack, slopes)
    return energy, grad
