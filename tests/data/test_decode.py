"""Every kind of picture becomes RGB; everything else becomes a ValueError."""

import io
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nfnets_xla.data import decode as module
from nfnets_xla.data.decode import decode

COLOURS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = decode(data)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "WEBP"])
def test_lossless_formats_come_back_bit_for_bit(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(Image.fromarray(COLOURS), kind, **options)
    assert np.array_equal(pixels(data), COLOURS)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_of_any_colour_space(mode: str) -> None:
    smooth = Image.fromarray(COLOURS).resize((64, 48), Image.Resampling.BICUBIC)
    data = encoded(smooth.convert(mode), "JPEG", quality=95, subsampling=0)
    expected = np.asarray(smooth.convert(mode).convert("RGB"), np.int64)
    assert abs(pixels(data) - expected).mean() < 4


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_one_channel_becomes_three(mode: str) -> None:
    image = Image.fromarray(COLOURS).convert(mode)
    assert np.array_equal(pixels(encoded(image, "PNG")), np.asarray(image.convert("RGB")))


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    grey = np.linspace(0, 2**16 - 1, 240).astype(np.uint16).reshape(12, 20)
    data = encoded(Image.fromarray(grey), "PNG")
    assert np.array_equal(pixels(data), np.repeat(grey[..., None] >> 8, 3, axis=2))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparent_pixels_show_white(mode: str) -> None:
    """A palette's or a colour's transparency is kept outside of the pixels (tRNS)."""
    if mode == "P":
        image = Image.new("P", (4, 2))
        image.putpalette([10, 20, 30, 200, 100, 50])
        image.putdata([0, 1] * 4)
        data = encoded(image, "PNG", transparency=b"\x00\xff")
    elif mode == "RGB":
        image = Image.new("RGB", (4, 2), (10, 20, 30))
        image.putpixel((1, 0), (200, 100, 50))
        data = encoded(image, "PNG", transparency=(10, 20, 30))
    else:
        colour = (200, 100, 50, 255) if mode == "RGBA" else (200, 255)
        image = Image.new(mode, (4, 2))
        image.putpixel((1, 0), colour)
        data = encoded(image, "PNG")
    shown = pixels(data)
    assert shown[0, 0].tolist() == [255, 255, 255]
    assert shown[0, 1].tolist() == ([200] * 3 if mode == "LA" else [200, 100, 50])


def test_the_orientation_in_the_metadata_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    data = encoded(Image.fromarray(COLOURS), "PNG", exif=exif)
    assert np.array_equal(pixels(data), COLOURS)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM"])
@pytest.mark.parametrize("part", [0.0, 0.02, 0.5, 0.9])
def test_part_of_a_file_is_refused(kind: str, part: float) -> None:
    data = encoded(Image.fromarray(np.tile(COLOURS, (8, 8, 1))), kind)
    with pytest.raises(ValueError, match="bytes do not decode as an image: ") as caught:
        decode(data[: int(part * len(data))])
    assert "\n" not in str(caught.value)


def test_no_other_format_is_tried() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = encoded(Image.fromarray(COLOURS), "EPS")
    with pytest.raises(ValueError, match="do not decode as an image"):
        decode(data)


def test_more_pixels_than_allowed_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.fromarray(COLOURS), "PNG")
    monkeypatch.setattr(module, "MAX_PIXELS", 239)
    with pytest.raises(ValueError, match="20 x 12 pixels are more than 239"):
        decode(data)


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_a_decompression_bomb_is_refused_by_its_header(side: int) -> None:
    """A PNG header that claims 10^8 or 4*10^9 pixels, before any of them is decoded."""
    data = bytearray(encoded(Image.new("RGB", (1, 1)), "PNG"))
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    with pytest.raises(ValueError, match="do not decode as an image"):
        decode(bytes(data))
