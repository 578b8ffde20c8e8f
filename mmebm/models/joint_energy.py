"""One energy over all modalities: pi(X) = exp(-E(x_1, ..., x_M)) / Z. Lower is better."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmebm.choices import Net
from mmebm.models.nets import encoder, is_image, mlp, spectral_norm


class JointEnergy(nn.Module):
    """A trunk per modality, their features side by side, an MLP on top, one scalar per tuple.

    Vectors, and with ``net="mlp"`` everything, enter the fusion as they are: the whole energy is then one plain MLP on
    the concatenated numbers. With ``net="conv"`` or "resnet" images get a convolutional trunk of ``features``
    outputs.

    Args:
        shapes: modality name -> shape without the chain dimension. Any number of modalities, any shapes.
        net, width, depth, act: of the fusion MLP (``width`` hidden units) and the trunks (``trunk_width`` channels).
        spectral: spectral norm on every layer; then the energy is times ``scale`` (a unit scale barely moves x).
    """

    mmebm_pure = True

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        net: Net = "mlp",
        width: int = 256,
        depth: int = 2,
        act: str = "silu",
        trunk_width: int = 16,
        features: int = 128,
        spectral: bool = False,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.shapes: dict[str, tuple[int, ...]] = dict(shapes)
        self.scale = scale
        trunks: dict[str, nn.Module] = {}
        total = 0
        for name, shape in self.shapes.items():
            conv = net != "mlp" and is_image(shape)
            trunks[name] = (
                encoder(shape, features, net=net, width=trunk_width, depth=depth, act=act) if conv else nn.Flatten()
            )
            total += features if conv else math.prod(shape)
        self.trunks: nn.ModuleDict = nn.ModuleDict(trunks)
        self.fusion: nn.Sequential = mlp([total, *[width] * depth, 1], act)
        if spectral:
            spectral_norm(self)

    def forward(self, x: Mapping[str, Tensor]) -> Tensor:
        """{modality: (n, *shape)} -> energies (n,). All modalities, in any order."""
        parts = [trunk(x[name]) for name, trunk in self.trunks.items()]
        return self.scale * self.fusion(torch.cat(parts, dim=1)).squeeze(1)
