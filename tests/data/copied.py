"""Pictures that are easy to tell apart, and copies of them."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageOps

SIZE = (240, 180)


def picture(number: int) -> Image.Image:
    """Coloured noise with the spectrum of photographs."""
    rng = np.random.default_rng([7, number])
    width, height = SIZE
    along = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    along[0, 0] = 1
    spectrum = np.fft.rfft2(rng.normal(size=(3, height, width))) / along**1.2
    pixels = np.fft.irfft2(spectrum, (height, width)).transpose(1, 2, 0)
    pixels = pixels @ np.array([[1, 0.6, 0.6], [0.6, 1, 0.6], [0.6, 0.6, 1]])
    low, high = np.quantile(pixels, [0.01, 0.99])
    return Image.fromarray(((pixels - low) / (high - low) * 255).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, quality: int = 80) -> bytes:
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=quality)
    return file.getvalue()


def captioned(image: Image.Image) -> Image.Image:
    image = image.copy()
    ImageDraw.Draw(image).rectangle((0, 150, SIZE[0], 172), "white")
    return image


def darker(image: Image.Image) -> Image.Image:
    return Image.fromarray((np.asarray(image) * 0.5 + 10).astype(np.uint8))


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "smaller": lambda image: image.resize((120, 90)),
    "squeezed": lambda image: image.resize((240, 140)),
    "cropped": lambda image: image.crop((25, 6, 225, 156)),  # 69 % of its area
    "mirrored": ImageOps.mirror,
    "mirrored and cropped": lambda image: ImageOps.mirror(image).crop((0, 20, 205, 174)),
    "turned": lambda image: image.rotate(3).crop((12, 9, 228, 171)),
    "framed": lambda image: ImageOps.expand(image, 20, "white"),
    "barred": lambda image: ImageOps.expand(image, (0, 25), "black"),
    "captioned": captioned,
    "darker": darker,
    "grey": lambda image: image.convert("L"),
}
