"""Gaussians and their mixtures, without the constants that a chain does not see."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mmebm.energies.lower import Symbol
from mmebm.state import check_type, dense, integer


def _tensor(name: str, value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    try:
        return dense(name, torch.as_tensor(value, dtype=dtype, device=device))
    except (TypeError, ValueError, RuntimeError, OverflowError):  # of what holds no numbers, or ragged ones
        raise TypeError(f"{name} must be a number or a dense tensor, got {value!r:.80}") from None


def _row(name: str, value: float | Tensor) -> Tensor:
    if not isinstance(value, Tensor):  # as a module's own tensors: what torch's defaults are now
        value = _tensor(name, value, torch.get_default_dtype(), torch.get_default_device()).clone()
    dense(name, value)
    if value.dim() > 1 or not value.is_floating_point():
        shape = tuple(value.shape)
        raise ValueError(f"{name} must be a float or a floating-point tensor (inputs,), got {value.dtype} {shape}")
    return value


def _require_width(x: Tensor, inputs: int, *, one: bool = False) -> None:
    """A state of one element would broadcast, and be counted once for each input."""
    if x.shape[1] != inputs and not (one and inputs == 1):
        raise ValueError(f"x must have {inputs} elements a chain, as mean and std have, got {x.shape[1]}")


class Gaussian(nn.Module):
    """E(x) = 1/2 sum_j ((x_j - mean_j) / std_j)^2; x (chains, ...) is flattened.

    Args:
        mean, std: a number for all elements, or (inputs,). Buffers, not parameters.

    Raises:
        TypeError, ValueError: for other shapes, or a std that is not above 0.
    """

    mmebm_pure = True

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float | Tensor = 0.0, std: float | Tensor = 1.0) -> None:
        super().__init__()
        self.register_buffer("mean", _row("mean", mean))
        self.register_buffer("std", _row("std", std))
        if self.mean.numel() != self.std.numel() and 1 not in (self.mean.numel(), self.std.numel()):
            raise ValueError(f"mean and std must be of one size, got {self.mean.numel()} and {self.std.numel()}")
        if not bool((self.std > 0).all()):
            raise ValueError(f"std must be above 0, got {std!r:.80}")

    def forward(self, x: Tensor) -> Tensor:
        """(chains, ...) -> (chains,)."""
        x = x.flatten(1)
        _require_width(x, max(self.mean.numel(), self.std.numel()), one=True)
        return 0.5 * ((x - self.mean) / self.std).square().sum(1)

    def mmebm_lowered(self, x: Symbol) -> Symbol:
        """The same on a symbol, for :func:`mmebm.energies.lower`."""
        return x.quadratic(self.mean, 1.0 / self.std**2)


class GaussianMixture(nn.Module):
    """E(x) = -log sum_k w_k N(x; mean_k, std_k^2 I), without (2 pi)^(-inputs/2).

    Args:
        means: (components, inputs).
        std: a number, or (components,).
        weights: (components,), normalised here; ``None`` for equal ones.

    Raises:
        TypeError, ValueError: for other shapes, or weights or stds that are not above 0.
    """

    means: Tensor
    std: Tensor
    log_weights: Tensor

    def __init__(self, means: Tensor, std: float | Tensor = 1.0, weights: Tensor | None = None) -> None:
        super().__init__()
        if dense("means", means).dim() != 2 or not means.is_floating_point() or means.element_size() < 2:
            raise ValueError(f"means must be (components, inputs), of floats, got {means.dtype} {tuple(means.shape)}")
        components = means.shape[0]
        like = {"dtype": means.dtype, "device": means.device}
        std = _tensor("std", std, means.dtype, means.device)
        std = (std.expand(components) if std.numel() == 1 and std.dim() < 2 else std).clone()
        weights = torch.ones(components, **like) if weights is None else _tensor("weights", weights, **like)
        for name, value in (("std", std), ("weights", weights)):
            if value.shape != (components,) or not bool((value > 0).all()):
                raise ValueError(f"{name} must be ({components},) and above 0, got {value!r:.80}")
        self.register_buffer("means", means)
        self.register_buffer("std", std)
        self.register_buffer("log_weights", (weights / weights.sum()).log())

    def forward(self, x: Tensor) -> Tensor:
        """(chains, ...) -> (chains,)."""
        x = x.flatten(1)
        _require_width(x, self.means.shape[1])
        square = (x.unsqueeze(1) - self.means).square().sum(2)
        parts = self.log_weights - x.shape[1] * self.std.log() - 0.5 * square / self.std**2
        return -parts.logsumexp(1)

    def sample(self, chains: int, generator: torch.Generator | None = None) -> Tensor:
        """Exact samples (chains, inputs)."""
        chains = integer("chains", chains, 1, 2**63)
        if generator is not None:
            check_type("generator", generator, torch.Generator, "a torch.Generator")
        pick = torch.multinomial(self.log_weights.exp(), chains, replacement=True, generator=generator)
        noise = torch.randn(
            chains, self.means.shape[1], dtype=self.means.dtype, device=self.means.device, generator=generator
        )
        return self.means[pick] + self.std[pick].unsqueeze(1) * noise

    def log_normaliser(self) -> float:
        """log Z of exp(-E): (inputs / 2) log(2 pi)."""
        return 0.5 * self.means.shape[1] * math.log(2 * math.pi)
