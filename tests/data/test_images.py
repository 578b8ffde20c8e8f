"""The one image reader: every mode, depth and orientation comes out as a viewer shows it, or is a named error."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image", reason="not installed: Pillow (pip install 'mmebm[train]')")

from PIL import ImageOps  # noqa: E402

from mmebm.data.images import read_image  # noqa: E402

H, W = 5, 7


def colours() -> np.ndarray:
    """Smooth colours, so that formats with half the resolution or with loss stay near them: uint8 (H, W, 3)."""
    y, x = np.mgrid[0:H, 0:W]
    return np.stack([30 * x + 20, 40 * y + 10, 255 - 20 * x - 20 * y], axis=2).astype(np.uint8)


def saved(picture: Image.Image, path: Path, **options: object) -> Path:
    picture.save(path, **options)
    return path


def pixels(file: Path) -> np.ndarray:
    out = read_image(file)
    assert out.dtype == np.uint8 and out.shape[0] == 3 and out.flags.c_contiguous
    return out.transpose(1, 2, 0)


@pytest.mark.parametrize(
    "mode, suffix",
    [
        ("RGB", "png"),
        ("L", "png"),
        ("1", "png"),
        ("P", "png"),
        ("P", "gif"),
        ("RGB", "bmp"),
        ("RGB", "ppm"),
        ("L", "tif"),
        ("RGB", "tif"),
    ],
)
def test_lossless_modes_come_back_as_written(mode: str, suffix: str, tmp_path: Path) -> None:
    picture = Image.fromarray(colours()).convert(mode)
    expected = np.asarray(picture.convert("RGB"))
    assert np.array_equal(pixels(saved(picture, tmp_path / f"a.{suffix}")), expected)
    assert len(np.unique(expected)) > 1


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB"])
def test_other_colour_spaces_show_the_colours(mode: str, tmp_path: Path) -> None:
    if mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        picture = ImageCms.profileToProfile(Image.fromarray(colours()), *profiles, outputMode="LAB")
    else:
        picture = Image.fromarray(colours()).convert(mode)
    file = saved(picture, tmp_path / "a.tif")
    # bytes of LAB are coarse in strong colours; a wrong space is off by a hundred
    assert np.abs(pixels(file).astype(int) - colours()).max() <= (20 if mode == "LAB" else 3)


def test_jpeg_in_grey_colour_and_cmyk(tmp_path: Path) -> None:
    for mode in ("L", "RGB", "CMYK"):
        big = Image.fromarray(colours()).resize((56, 40))
        file = saved(big.convert(mode), tmp_path / f"{mode}.jpg", quality=98, subsampling=0)
        # quality 98: a few levels; inverted CMYK would be off by 200
        assert np.abs(pixels(file).astype(int) - np.asarray(big.convert(mode).convert("RGB"))).max() <= 12


@pytest.mark.parametrize("order", ["<u2", ">u2"])
@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_are_divided_by_257(order: str, suffix: str, tmp_path: Path) -> None:
    deep = np.linspace(0, 65535, H * W).round().astype("<u2").reshape(H, W)
    if suffix == "tif":
        picture = Image.frombytes("I;16" if order == "<u2" else "I;16B", (W, H), deep.astype(order).tobytes())
    else:
        picture = Image.fromarray(deep)
    out = pixels(saved(picture, tmp_path / f"a.{suffix}"))
    assert np.array_equal(out[:, :, 0], np.rint(deep / 257).astype(np.uint8))
    assert np.array_equal(out[:, :, 0], out[:, :, 2])


def test_sixteen_bits_with_white_at_zero_and_with_a_transparent_grey(tmp_path: Path) -> None:
    grey = (257 * np.arange(H * W).reshape(H, W)).astype(np.uint16)
    picture = Image.fromarray(grey)
    negative = saved(picture, tmp_path / "a.tif", tiffinfo={262: 0})
    assert np.array_equal(pixels(negative)[:, :, 1], 255 - grey // 257)
    assert np.array_equal(pixels(saved(picture, tmp_path / "b.tif"))[:, :, 1], grey // 257)
    file = saved(picture, tmp_path / "a.png")
    before, end = file.read_bytes().split(b"IDAT", 1)
    body = b"tRNS" + struct.pack(">H", 257 * 12)
    chunk = struct.pack(">I", 2) + body + struct.pack(">I", zlib.crc32(body))
    file.write_bytes(before[:-4] + chunk + before[-4:] + b"IDAT" + end)
    assert np.array_equal(pixels(file)[:, :, 0], np.where(grey == 257 * 12, 255, grey // 257))


def test_integers_and_floats_are_scaled_and_never_cut(tmp_path: Path) -> None:
    ramp = np.linspace(0, 1, H * W).reshape(H, W)
    cases = {
        "I": ((ramp * 65535).astype(np.int32), lambda x: x / 257),
        "wide": ((ramp * 3e6).astype(np.int32), lambda x: x * 255 / x.max()),
        "signed": ((ramp * 2000 - 1000).astype(np.int32), lambda x: (x - x.min()) * 255 / (x.max() - x.min())),
        "F": (ramp.astype(np.float32), lambda x: x * 255),
        "dim": ((ramp / 2).astype(np.float32), lambda x: x * 255),
        "celsius": ((ramp * 80 - 30).astype(np.float32), lambda x: (x - x.min()) * 255 / (x.max() - x.min())),
        "bytes": ((ramp * 255).astype(np.float32), lambda x: x * 255 / x.max()),
    }
    for name, (values, expected) in cases.items():
        out = pixels(saved(Image.fromarray(values), tmp_path / f"{name}.tif"))[:, :, 0]
        assert np.array_equal(out, np.rint(expected(values.astype(np.float64))).astype(np.uint8)), name
    flat = pixels(saved(Image.fromarray(np.full((H, W), 1e6, np.float32)), tmp_path / "flat.tif"))
    assert not flat.any()
    values = np.full((H, W), np.nan, np.float32)
    with pytest.raises(ValueError, match=r"nan\.tif cannot be read as an image: it has values that are not finite"):
        read_image(saved(Image.fromarray(values), tmp_path / "nan.tif"))


def test_sixteen_bit_colour_png_is_read_in_eight(tmp_path: Path) -> None:
    """Written by hand: Pillow writes none."""
    deep = colours().astype(np.uint16) * 257

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    header = struct.pack(">IIBBBBB", W, H, 16, 2, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    assert np.array_equal(pixels(tmp_path / "a.png"), colours())


def test_what_is_transparent_shows_white(tmp_path: Path) -> None:
    alpha = np.linspace(0, 255, H * W).astype(np.uint8).reshape(H, W, 1)
    full = np.concatenate([colours(), alpha], axis=2)
    out = pixels(saved(Image.fromarray(full), tmp_path / "a.png"))
    share = alpha / 255
    assert np.abs(out - (share * colours() + (1 - share) * 255)).max() <= 1  # Pillow rounds twice
    grey = Image.fromarray(colours()).convert("L")
    both = Image.merge("LA", (grey, Image.fromarray(alpha[:, :, 0])))
    out = pixels(saved(both, tmp_path / "la.png"))
    assert np.abs(out - (share * np.asarray(grey)[:, :, None] + (1 - share) * 255)).max() <= 1
    # one colour of a palette, of a grey image and of a colour image
    palette = Image.fromarray(colours()).quantize(8)
    number = int(np.asarray(palette)[0, 0])
    out = pixels(saved(palette, tmp_path / "p.png", transparency=number))
    hidden = np.asarray(palette) == number
    assert (out[hidden] == 255).all()
    assert np.array_equal(out[~hidden], np.asarray(palette.convert("RGB"))[~hidden])
    out = pixels(saved(grey, tmp_path / "l.png", transparency=int(np.asarray(grey)[0, 0])))
    assert (out[0, 0] == 255).all() and out[-1, -1, 0] == np.asarray(grey)[-1, -1]
    out = pixels(saved(Image.fromarray(colours()), tmp_path / "rgb.png", transparency=tuple(colours()[0, 0].tolist())))
    assert (out[0, 0] == 255).all() and np.array_equal(out[1:], colours()[1:])


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation: int, suffix: str, tmp_path: Path) -> None:
    big = Image.fromarray(np.kron(colours(), np.ones((8, 8, 1), np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if suffix == "webp" else {"quality": 98, "subsampling": 0} if suffix == "jpg" else {}
    file = saved(big, tmp_path / f"a.{suffix}", exif=exif, **options)
    turned = big.copy()
    turned.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(turned))
    out = pixels(file)
    assert out.shape == expected.shape
    # JPEG at quality 98 is off by a few levels; another orientation by more than a hundred
    assert np.abs(out.astype(int) - expected).max() <= (16 if suffix == "jpg" else 0)


@pytest.mark.parametrize("noted", [0, 9, 77])
def test_an_orientation_that_is_none_changes_nothing(noted: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = noted
    file = saved(Image.fromarray(colours()), tmp_path / "a.png", exif=exif)
    assert np.array_equal(pixels(file), colours())


def test_the_first_of_several_frames(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((H, W, 3), level, np.uint8)) for level in (50, 150, 250)]
    for suffix, options in (("gif", {}), ("webp", {"lossless": True}), ("tif", {}), ("png", {})):
        file = saved(frames[0], tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
        with Image.open(file) as several:
            assert several.n_frames == 3
        assert np.abs(pixels(file).astype(int) - 50).max() <= 1


def test_damaged_files_are_named(tmp_path: Path, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    for suffix in ("png", "jpg", "gif", "bmp", "tif", "webp", "ppm"):
        whole = saved(Image.fromarray(noise), tmp_path / f"whole.{suffix}").read_bytes()
        file = tmp_path / f"cut.{suffix}"
        for share in (0, 0.01, 0.3, 0.7):
            file.write_bytes(whole[: int(share * len(whole))])
            with pytest.raises(ValueError, match=rf"{re.escape(str(file))} cannot be read as an image"):
                read_image(file)
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    for name in ("text.png", "folder.png"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as an image"):
            read_image(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "absent.png")


def test_decompression_bombs_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    file = saved(Image.fromarray(colours()), tmp_path / "bomb.png")  # 35 pixels: more than the limit, less than twice
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ValueError, match=r"bomb\.png .*MAX_IMAGE_PIXELS"):
        read_image(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match=r"bomb\.png cannot be read as an image: Image size"):
        read_image(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert np.array_equal(pixels(file), colours())


def test_a_colour_profile_is_ignored(tmp_path: Path) -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    file = saved(Image.fromarray(colours()), tmp_path / "a.png", icc_profile=profile)
    assert np.array_equal(pixels(file), colours())


def test_a_file_in_memory_of_its_own_is_not_shared(tmp_path: Path) -> None:
    file = saved(Image.fromarray(colours()), tmp_path / "a.png")
    out = read_image(file)
    out[:] = 0
    assert read_image(file).any()
