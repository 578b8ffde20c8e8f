"""Building blocks shared by the networks: an encoder and a decoder for a tensor of any shape."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmebm.choices import Net

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "silu": nn.SiLU, "gelu": nn.GELU, "softplus": nn.Softplus,
    "tanh": nn.Tanh, "elu": nn.ELU,
}  # fmt: skip


def activation(name: str) -> nn.Module:
    """A fresh activation module by name.

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]()


def mlp(sizes: Sequence[int], act: str) -> nn.Sequential:
    """Linear layers of the given sizes with activations between them: a plain ``nn.Sequential``."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        layers += [activation(act)] if i else []
        layers.append(nn.Linear(a, b))
    return nn.Sequential(*layers)


def is_image(shape: Sequence[int]) -> bool:
    """(C, H, W) with room for at least one halving."""
    return len(shape) == 3 and min(shape[1:]) >= 4


def _halvings(shape: Sequence[int], side: int) -> int:
    """How often an image is halved until its shorter side is at most ``side``; at least once."""
    return max(1, math.ceil(math.log2(min(shape[1:]) / side)))


def encoder(shape: Sequence[int], out: int, *, net: Net, width: int, depth: int, act: str) -> nn.Sequential:
    """(n, *shape) -> (n, out). "conv" halves images by strided convolutions; vectors get an MLP in both cases."""
    if net == "conv" and is_image(shape):
        layers: list[nn.Module] = []
        channels, side = shape[0], list(shape[1:])
        for i in range(_halvings(shape, 4)):
            layers += [nn.Conv2d(channels, width * 2**i, 4, stride=2, padding=1), activation(act)]
            channels, side = width * 2**i, [s // 2 for s in side]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * math.prod(side), out))
    return nn.Sequential(nn.Flatten(), *mlp([math.prod(shape), *[width] * depth, out], act))


class _Crop(nn.Module):
    """Cuts an image to its size: transposed convolutions double, and 28 is no power of two times 3."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.height, self.width = height, width

    def forward(self, x: Tensor) -> Tensor:
        return x[..., : self.height, : self.width]


def decoder(latent: int, shape: Sequence[int], *, net: Net, width: int, depth: int, act: str) -> nn.Sequential:
    """(n, latent) -> (n, *shape) in (-1, 1) (tanh)."""
    if net == "conv" and is_image(shape):
        # small maps stop at a side of 7 or 8: most of the cost is there where the maps are large
        halvings = _halvings(shape, 8)
        side = [-(-s // 2**halvings) for s in shape[1:]]
        channels = width * 2**halvings
        layers: list[nn.Module] = [
            nn.Linear(latent, channels * math.prod(side)), activation(act), nn.Unflatten(1, (channels, *side)),
        ]  # fmt: skip
        for _ in range(halvings):
            layers += [nn.ConvTranspose2d(channels, channels // 2, 4, stride=2, padding=1), activation(act)]
            channels //= 2
        return nn.Sequential(*layers, nn.Conv2d(channels, shape[0], 3, padding=1), _Crop(*shape[1:]), nn.Tanh())
    body = mlp([latent, *[width] * depth, math.prod(shape)], act)
    return nn.Sequential(*body, nn.Tanh(), nn.Unflatten(1, tuple(shape)))


def spectral_norm(module: nn.Module) -> None:
    """Spectral norm on every linear layer and convolution of ``module``, in place."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            torch.nn.utils.parametrizations.spectral_norm(layer)
