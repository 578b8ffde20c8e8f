"""Building blocks shared by the networks: an encoder and a decoder for a tensor of any shape."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmebm.choices import Net

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
}


# A "resnet" has so many times ``width`` channels where its map is smallest, and as many units for a vector.
WIDEST = 8


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


class Residual(nn.Module):
    """shortcut(x) + 0.1 body(x): small at first, so that deep stacks without norms neither grow nor vanish.

    Args:
        body, shortcut: modules of the same output shape.
    """

    mmebm_pure = True

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body: nn.Module = body
        self.shortcut: nn.Module = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + 0.1 * self.body(x)


def _block(channels: int, out: int, act: str, *, up: bool) -> Residual:
    """Two convolutions of 3x3, each after its activation, between which the map is doubled or halved."""
    resize = nn.Upsample(scale_factor=2) if up else nn.AvgPool2d(2)
    middle = out if up else channels
    first, second = nn.Conv2d(channels, middle, 3, padding=1), nn.Conv2d(middle, out, 3, padding=1)
    before, after = ([resize], []) if up else ([], [resize])
    # a map of positions and a 1x1 convolution commute: the shortcut is done where the map is small
    across = nn.Conv2d(channels, out, 1)
    return Residual(
        nn.Sequential(activation(act), *before, first, activation(act), *after, second),
        nn.Sequential(across, resize) if up else nn.Sequential(resize, across),
    )


def _channels(width: int, halvings: int) -> list[int]:
    """Of a "resnet", from the full map to the smallest: doubled at each halving, up to eight times ``width``."""
    return [width * min(2**i, WIDEST) for i in range(halvings + 1)]


def _halvings(shape: Sequence[int], side: int) -> int:
    """How often an image is halved until its shorter side is at most ``side``; at least once."""
    return max(1, math.ceil(math.log2(min(shape[1:]) / side)))


def encoder(shape: Sequence[int], out: int, *, net: Net, width: int, depth: int, act: str) -> nn.Sequential:
    """(n, *shape) -> (n, out). "conv" halves images by strided convolutions to a side of 4, "resnet" by residual blocks
    to a side of 8, from ``width`` channels on; vectors get an MLP in all cases."""
    if net == "resnet" and is_image(shape):
        halvings = _halvings(shape, 8)
        counts, side = _channels(width, halvings), [s >> halvings for s in shape[1:]]
        blocks = [_block(a, b, act, up=False) for a, b in itertools.pairwise(counts)]
        head = [activation(act), nn.Flatten(), nn.Linear(counts[-1] * math.prod(side), out)]
        return nn.Sequential(nn.Conv2d(shape[0], width, 3, padding=1), *blocks, *head)
    width = width * WIDEST if net == "resnet" else width
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
    """(n, latent) -> (n, *shape) in (-1, 1) (tanh): :func:`encoder` the other way round."""
    if net == "resnet" and is_image(shape):
        halvings = _halvings(shape, 8)
        counts, side = _channels(width, halvings)[::-1], [-(-s // 2**halvings) for s in shape[1:]]
        blocks = [_block(a, b, act, up=True) for a, b in itertools.pairwise(counts)]
        first = [nn.Linear(latent, counts[0] * math.prod(side)), nn.Unflatten(1, (counts[0], *side))]
        last = [activation(act), nn.Conv2d(width, shape[0], 3, padding=1), _Crop(*shape[1:]), nn.Tanh()]
        return nn.Sequential(*first, *blocks, *last)
    width = width * WIDEST if net == "resnet" else width
    if net == "conv" and is_image(shape):
        # small maps stop at a side of 7 or 8: most of the cost is there where the maps are large
        halvings = _halvings(shape, 8)
        side = [-(-s // 2**halvings) for s in shape[1:]]
        channels = width * 2**halvings
        layers: list[nn.Module] = [
            nn.Linear(latent, channels * math.prod(side)),
            activation(act),
            nn.Unflatten(1, (channels, *side)),
        ]
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
