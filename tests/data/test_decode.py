"""Every kind of picture becomes RGB, as with Pillow; anything else raises ValueError."""

import io
import resource
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nfnets_xla.data import decode as module
from nfnets_xla.data.batches import EvalBatches
from nfnets_xla.data.decode import decode
from nfnets_xla.data.index import build_index
from nfnets_xla.data.loader import Batches
from nfnets_xla.data.pack import pack_samples

COLOURS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(data: bytes) -> np.ndarray:
    decoded = decode(data)
    assert (decoded.ndim, decoded.shape[2], decoded.dtype) == (3, 3, np.uint8)
    return decoded


def pillows(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def photo(width: int, height: int) -> Image.Image:
    """An image that is neither smooth nor pure noise."""
    coarse = Image.fromarray(COLOURS).resize((width, height), Image.Resampling.BICUBIC)
    grain = np.random.default_rng(1).integers(-20, 21, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8))


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


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (17, 9), (333, 250)])
def test_jpegs_are_pillows_bit_for_bit(
    subsampling: str, progressive: bool, size: tuple[int, int]
) -> None:
    data = encoded(photo(*size), "JPEG", subsampling=subsampling, progressive=progressive)
    assert module._by_simplejpeg(data) is not None
    assert np.array_equal(pixels(data), pillows(data))


@pytest.mark.parametrize("mode", ["L", "CMYK", "YCbCr"])
def test_jpegs_of_other_colour_spaces_are_pillows_bit_for_bit(mode: str) -> None:
    data = encoded(photo(60, 50).convert(mode), "JPEG")
    assert (module._by_simplejpeg(data) is None) == (mode == "CMYK")
    assert np.array_equal(pixels(data), pillows(data))


def test_jpegs_that_keep_rgb_are_pillows_bit_for_bit() -> None:
    data = encoded(photo(60, 50), "JPEG", keep_rgb=True)
    assert np.array_equal(pixels(data), pillows(data))


def test_a_jpeg_that_only_pillow_forgives_is_read_by_pillow() -> None:
    """Some files of ImageNet have stray bytes before a marker."""
    whole = encoded(photo(60, 50), "JPEG")
    scan = whole.index(b"\xff\xda")
    data = whole[:scan] + b"stray" + whole[scan:]
    assert module._by_simplejpeg(data) is None
    assert np.array_equal(pixels(data), pillows(whole))


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_one_channel_becomes_three(mode: str) -> None:
    image = Image.fromarray(COLOURS).convert(mode)
    assert np.array_equal(pixels(encoded(image, "PNG")), np.asarray(image.convert("RGB")))


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    grey = np.linspace(0, 2**16 - 1, 240).astype(np.uint16).reshape(12, 20)
    data = encoded(Image.fromarray(grey), "PNG")
    assert np.array_equal(pixels(data), np.repeat(grey[..., None] >> 8, 3, axis=2))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "I;16"])
def test_transparent_pixels_show_white(mode: str) -> None:
    """In a palette or in one colour, transparency is stored outside of the pixels (tRNS)."""
    if mode == "P":
        image = Image.new("P", (4, 2))
        image.putpalette([10, 20, 30, 200, 100, 50])
        image.putdata([0, 1] * 4)
        data = encoded(image, "PNG", transparency=b"\x00\xff")
    elif mode == "RGB":
        image = Image.new("RGB", (4, 2), (10, 20, 30))
        image.putpixel((1, 0), (200, 100, 50))
        data = encoded(image, "PNG", transparency=(10, 20, 30))
    elif mode == "I;16":  # the second pixel differs in its lower byte alone
        grey = np.array([[51_200, 51_201]], dtype=np.uint16)
        data = encoded(Image.fromarray(grey), "PNG", transparency=51_200)
    else:
        colour = (200, 100, 50, 255) if mode == "RGBA" else (200, 255)
        image = Image.new(mode, (4, 2))
        image.putpixel((1, 0), colour)
        data = encoded(image, "PNG")
    shown = pixels(data)
    assert shown[0, 0].tolist() == [255, 255, 255]
    assert shown[0, 1].tolist() == ([200] * 3 if mode in ("LA", "I;16") else [200, 100, 50])


def test_the_orientation_in_the_metadata_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    data = encoded(Image.fromarray(COLOURS), "PNG", exif=exif)
    assert np.array_equal(pixels(data), COLOURS)
    jpeg = encoded(photo(40, 30), "JPEG", exif=exif)
    assert np.array_equal(pixels(jpeg), pillows(encoded(photo(40, 30), "JPEG")))


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


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_more_pixels_than_allowed_are_refused(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    data = encoded(Image.fromarray(COLOURS), kind)
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


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_a_jpegs_header_that_lies_is_refused(side: int) -> None:
    """It claims more pixels than the file has, below and above the limit."""
    data = bytearray(encoded(Image.fromarray(COLOURS), "JPEG"))
    size_at = data.index(b"\xff\xc0") + 5  # start of frame: marker, length, precision
    data[size_at : size_at + 4] = side.to_bytes(2, "big") * 2
    with pytest.raises(ValueError, match="do not decode as an image"):
        decode(bytes(data))


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    data = encoded(photo(64, 48), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    assert 5 < data.count(b"\xff\xda") < 15
    bomb = data[:last] + data[last:-2] * 200 + data[-2:]
    with pytest.raises(ValueError, match=r"20\d scans are more than 200"):
        decode(bomb)


def test_a_lack_of_memory_is_no_fault_of_the_sample(tmp_path: Path) -> None:
    """If the sample were blamed, the run would continue with other numbers."""
    image = encoded(Image.new("1", (9000, 9000)), "PNG")
    pack_samples([("big", image, "png", 0)], tmp_path, samples_per_shard=1)
    dataset = EvalBatches(
        build_index(tmp_path), num_classes=1, batch_size=1, image_size=8, margin=0
    )
    batches = iter(Batches(dataset, start_step=0, stop_step=1, workers=0))
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**25, hard))
    try:
        with pytest.raises(OSError, match="no memory is left to make a batch"):
            next(batches)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
