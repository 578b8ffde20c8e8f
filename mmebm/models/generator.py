"""The generator: p(X, z) = p0(z) prod_m p_m(x_m | z), one latent shared by all modalities."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from mmebm.models.nets import Net, decoder
from mmebm.ops.residual import residual

Likelihood = Literal["gaussian", "laplace"]


class SharedGenerator(nn.Module):
    """A decoder per modality: z (n, latent) -> {modality: (n, *shape)} in (-1, 1).

    The likelihood of x_m is N(g_m(z), sigma^2 I), or Laplace of that scale, tempered by ``weights[m]``: a small
    modality (a word among images) would otherwise not be heard.

    Args:
        shapes: modality name -> shape without the batch dimension.
        latent: size of z.
        sigma: scale of the likelihood, in units of the model space [-1, 1].
        weights: modality name -> weight of its log-likelihood; 1 where left out.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], latent: int, *, net: Net = "mlp", width: int = 256, depth: int = 2,
        act: str = "silu", sigma: float = 0.5, likelihood: Likelihood = "gaussian",
        weights: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        unknown = set(weights or {}) - set(shapes)
        if unknown:
            raise ValueError(f"weights name {sorted(unknown)}, but the modalities are {list(shapes)}")
        if likelihood not in ("gaussian", "laplace"):
            raise ValueError(f"likelihood must be 'gaussian' or 'laplace', got {likelihood!r}")
        self.shapes, self.latent, self.sigma = dict(shapes), latent, sigma
        self.likelihood: Likelihood = likelihood
        self.weights = {name: (weights or {}).get(name, 1.0) for name in shapes}
        self.decoders = nn.ModuleDict({
            name: decoder(latent, shape, net=net, width=width, depth=depth, act=act) for name, shape in shapes.items()
        })  # fmt: skip

    def forward(self, z: Tensor) -> dict[str, Tensor]:
        """The means g_m(z) of all modalities."""
        return {name: decode(z) for name, decode in self.decoders.items()}

    def negative_log_likelihood(self, x: Mapping[str, Tensor], z: Tensor) -> Tensor:
        """-sum_m w_m log p(x_m | z) without the constant, over the modalities that ``x`` holds: (n,).

        Differentiable in all of them, also twice.
        """
        if not x:
            return torch.zeros(z.shape[0], device=z.device, dtype=z.dtype)
        means, values = [self.decoders[name](z) for name in x], list(x.values())
        weights = [self.weights[name] for name in x]
        if not any(value.requires_grad for value in values):
            return residual(means, values, likelihood=self.likelihood, scale=self.sigma, weight=weights)
        # the op has no derivative in its targets
        off = [(mean - value).flatten(1) / self.sigma for mean, value in zip(means, values, strict=True)]
        gaussian = self.likelihood == "gaussian"
        terms = [(0.5 * r.square() if gaussian else r.abs()).sum(1) for r in off]
        return torch.stack([w * term for w, term in zip(weights, terms, strict=True)]).sum(0)

    def squared_error(self, x: Mapping[str, Tensor], z: Tensor) -> Tensor:
        """Mean squared error per element over the modalities that ``x`` holds: (n,), for the logs."""
        sums = [(v - self.decoders[name](z)).flatten(1).square().sum(1) for name, v in x.items()]
        return torch.stack(sums).sum(0) / sum(math.prod(self.shapes[name]) for name in x)
