"""The generator: p(X, z) = p0(z) prod_m p_m(x_m | z), one latent shared by all modalities."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mmebm.choices import Net
from mmebm.models.nets import decoder
from mmebm.ops.residual import residual

Likelihood = Literal["gaussian", "laplace"]


def latent_columns(names: Sequence[str], latent: int, private: int) -> dict[str, list[int]]:
    """Which elements of z = [u, w_1, ..., w_M] belong to each modality: those of u, which all share, and of its own w.

    Args:
        names: the modalities, in the order of their w.
        latent: size of z, u and every w together.
        private: size of each w.

    Raises:
        ValueError: where nothing is left for u.
    """
    shared = latent - len(names) * private
    if private < 0 or shared < 1:
        raise ValueError(
            f"latent={latent} must hold private={private} elements for each of {len(names)} modalities and at least "
            "one that they share; private must be at least 0"
        )
    return {
        name: [*range(shared), *range(shared + m * private, shared + (m + 1) * private)] for m, name in enumerate(names)
    }


def rows_with(x: Mapping[str, Tensor], present: Mapping[str, Tensor] | None) -> dict[str, Tensor | None]:
    """Per modality of ``x`` which rows have it, bool (n,); None where ``present`` does not name it: then all do.

    Raises:
        TypeError, ValueError: for a mask that is not boolean, or not one value per row.
    """
    masks = {name: None if present is None else present.get(name) for name in x}
    for name, mask in masks.items():
        if mask is None:
            continue
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"present[{name!r}] must be a boolean tensor, got {kind}")
        if mask.shape != x[name].shape[:1]:
            raise ValueError(
                f"present[{name!r}] must hold one value for each of {x[name].shape[0]} rows, got {tuple(mask.shape)}"
            )
    return masks


class PartLinear(nn.Module):
    """A linear layer that reads some columns of its input: (n, inputs) -> (n, out).

    It multiplies by a weight with zeros in the other columns and does not cut the input, so that a decoder of a part of
    z is an MLP of the whole z to :func:`mmebm.energies.lower`, and its chain stays one call.

    Args:
        layer: its weight (out, len(columns)) and bias become this layer's.
        columns: which columns of the input the weight's columns meet.
        inputs: columns of the input.
    """

    mmebm_pure = True
    columns: Tensor

    def __init__(self, layer: nn.Linear, columns: Sequence[int], inputs: int) -> None:
        super().__init__()
        self.weight: Tensor = layer.weight
        self.bias: nn.Parameter = layer.bias
        self.inputs: int = inputs
        self.register_buffer("columns", torch.tensor(columns), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        zeros = self.weight.new_zeros(self.weight.shape[0], self.inputs)
        return nn.functional.linear(x, zeros.index_copy(1, self.columns, self.weight), self.bias)


class Columns(nn.Module):
    """Some columns of the input: what a decoder of the user's own sees of z where parts of z are private."""

    columns: Tensor

    def __init__(self, columns: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("columns", torch.tensor(columns), persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        return z.index_select(1, self.columns)


class SharedGenerator(nn.Module):
    """A decoder per modality: z (n, latent) -> {modality: (n, *shape)} in (-1, 1).

    The likelihood of x_m is N(g_m(z), sigma^2 I), or Laplace of that scale, tempered by ``weights[m]``: a small
    modality (a word among images) would otherwise not be heard.

    Args:
        shapes: modality name -> shape without the batch dimension.
        latent: size of z.
        sigma: scale of the likelihood, in units of the model space [-1, 1].
        weights: modality name -> weight of its log-likelihood; 1 where left out.
        private: size of the part of z that one modality has for itself: z = [u, w_1, ..., w_M], in the order of
            ``shapes``, and decoder m reads u and w_m. 0: all modalities share all of z. ``latent`` is the whole, so
            that a decoder has as many parameters as a plain one of latent - (M - 1) * private.
        decoders: modality name -> a module of the user's own, (n, latent) -> (n, *shape), instead of the built-in one;
            with ``private`` it is given u and w_m alone.
    """

    mmebm_pure = True

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        latent: int,
        *,
        net: Net = "mlp",
        width: int = 256,
        depth: int = 2,
        act: str = "silu",
        sigma: float = 0.5,
        likelihood: Likelihood = "gaussian",
        weights: Mapping[str, float] | None = None,
        private: int = 0,
        decoders: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        unknown = set(weights or {}) - set(shapes)
        if unknown:
            raise ValueError(f"weights name {sorted(unknown)}, but the modalities are {list(shapes)}")
        if likelihood not in ("gaussian", "laplace"):
            raise ValueError(f"likelihood must be 'gaussian' or 'laplace', got {likelihood!r}")
        self.shapes: dict[str, tuple[int, ...]] = dict(shapes)
        self.latent: int = latent
        self.sigma: float = sigma
        self.likelihood: Likelihood = likelihood
        self.weights: dict[str, float] = {name: (weights or {}).get(name, 1.0) for name in shapes}
        self.private: int = private
        self.columns: dict[str, list[int]] = latent_columns(list(shapes), latent, private)
        own = dict(decoders or {})
        self.decoders: nn.ModuleDict = nn.ModuleDict(
            {
                name: own[name]
                if name in own
                else decoder(len(self.columns[name]), shape, net=net, width=width, depth=depth, act=act)
                for name, shape in shapes.items()
            }
        )
        if private:
            for name, decode in self.decoders.items():
                if name in own:
                    self.decoders[name] = nn.Sequential(Columns(self.columns[name]), decode)
                    continue
                assert isinstance(decode, nn.Sequential)
                first = decode[0]
                assert isinstance(first, nn.Linear)
                decode[0] = PartLinear(first, self.columns[name], latent)

    def forward(self, z: Tensor) -> dict[str, Tensor]:
        """The means g_m(z) of all modalities."""
        return {name: decode(z) for name, decode in self.decoders.items()}

    def negative_log_likelihood(
        self, x: Mapping[str, Tensor], z: Tensor, present: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """-sum_m w_m log p(x_m | z) without the constant, over the modalities that ``x`` holds: (n,).

        Differentiable in all of them, also twice.

        Args:
            x: {modality: (n, *shape)}; what a row lacks may hold anything.
            z: (n, latent).
            present: {modality: bool (n,)}, which rows have it; None, or a modality left out, where all do.
        """
        if not x:
            return torch.zeros(z.shape[0], device=z.device, dtype=z.dtype)
        means, values = [self.decoders[name](z) for name in x], list(x.values())
        weights, masks = [self.weights[name] for name in x], self._masks(x, present)
        if not any(value.requires_grad for value in values):
            return residual(means, values, likelihood=self.likelihood, scale=self.sigma, weight=weights, observed=masks)
        # the op has no derivative in its targets
        off = [
            _held(mean - value, mask).flatten(1) / self.sigma
            for mean, value, mask in zip(means, values, masks, strict=True)
        ]
        gaussian = self.likelihood == "gaussian"
        terms = [(0.5 * r.square() if gaussian else r.abs()).sum(1) for r in off]
        return torch.stack([w * term for w, term in zip(weights, terms, strict=True)]).sum(0)

    def squared_error(self, x: Mapping[str, Tensor], z: Tensor, present: Mapping[str, Tensor] | None = None) -> Tensor:
        """Mean squared error per element over the modalities that ``x`` holds and the row has: (n,), for the logs."""
        masks = self._masks(x, present)
        sums = [
            _held(v - self.decoders[name](z), mask).flatten(1).square().sum(1)
            for (name, v), mask in zip(x.items(), masks, strict=True)
        ]
        sizes = [
            math.prod(self.shapes[name]) * (1 if mask is None else mask.flatten())
            for name, mask in zip(x, masks, strict=True)
        ]
        return torch.stack(sums).sum(0) / sum(sizes)

    def _masks(self, x: Mapping[str, Tensor], present: Mapping[str, Tensor] | None) -> list[Tensor | None]:
        """:func:`rows_with` in the shapes (n, 1, ...) of the modalities."""
        masks = rows_with(x, present)
        return [None if mask is None else mask.reshape(-1, *[1] * (x[name].dim() - 1)) for name, mask in masks.items()]


def _held(value: Tensor, mask: Tensor | None) -> Tensor:
    return value if mask is None else torch.where(mask, value, 0.0)
