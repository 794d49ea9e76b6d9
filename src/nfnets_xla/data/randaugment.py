"""RandAugment as the NFNets used it: a few of 16 operations, applied in turn to a uint8 view.

As in the reference, deepmind-research/nfnets/autoaugment.py at f5de0ed (cited by line). Pixels
match the reference, even where it does not do what an operation's name says:

- `Contrast` blends with a grey that depends on the size of the image only (line 209 divides the
  number of pixels by 256), which is white from 256 x 256 on;
- the threshold of `Solarize` is kept in 8 bits, so that magnitude 10 inverts every pixel;
- `Posterize` changes less at a larger magnitude, and `Equalize`, `AutoContrast` and `Invert` have
  no magnitude;
- shifts and cut-outs are in pixels, whatever the size of the image.

Where a mean is a whole number, the reference's float32 may be just below it: there `Sharpness`
differs by one level before blending. Every operation gets three numbers, whether it needs them or
not, so that its numbers do not depend on which operations came before.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops

Pixels = NDArray[np.uint8]
Float = NDArray[np.float32]

MAX_LEVEL = 10  # line 33; magnitudes may exceed it
FILL = (128, 128, 128)  # line 689

# At a level of 1, that is a magnitude of 10 (lines 477-531 and 692).
DEGREES, SHEAR, SHIFT, CUTOUT = 30.0, 0.3, 100.0, 40
BITS, THRESHOLD, ADDITION = 4, 256, 110

# Weights from RGB to grey with the same result as tf.image, which computes in [0, 1]: scaled by
# 255.5 instead of 255, then truncated. Pillow adds a half, which is subtracted here.
TO_GREY = (*(weight * 255.5 / 255 for weight in (0.2989, 0.587, 0.114)), -0.5)


class Draw(NamedTuple):
    """The numbers that an operation may use."""

    level: float  # the magnitude / MAX_LEVEL
    first: float  # drawn from [0, 1), like the second
    second: float

    def signed(self, amount: float) -> float:
        return self.level * amount * (1 if self.first >= 0.5 else -1)


def rand_augment(
    pixels: Pixels, rng: np.random.Generator, *, operations: int, magnitude: float
) -> Pixels:
    """`operations` of the 16, each drawn anew and always applied, to one view (H, W, 3)."""
    image = Image.fromarray(pixels)
    names = tuple(OPERATIONS)
    for which, first, second in rng.random((operations, 3)).tolist():
        name = names[int(which * len(names))]
        image = OPERATIONS[name](image, Draw(magnitude / MAX_LEVEL, first, second))
    return np.asarray(image)


# ---- colours ----------------------------------------------------------------------------------


def _auto_contrast(image: Image.Image, draw: Draw) -> Image.Image:
    """Each channel is stretched over 0 to 255."""
    tables = []
    for low, high in np.array(image.getextrema(), np.float32):
        scale = np.float32(255) / max(high - low, np.float32(1))
        stretched = np.clip(_RAMP * scale - low * scale, 0, 255)
        tables.append(stretched if high > low else _RAMP)
    return _mapped(image, *tables)


def _equalize(image: Image.Image, draw: Draw) -> Image.Image:
    """Each channel's histogram is made as even as a table allows."""
    tables = []
    for counts in np.array(image.histogram()).reshape(3, 256):
        last = counts[np.nonzero(counts)[0][-1]]
        step = (counts.sum() - last) // 255
        before = np.cumsum(counts) - counts
        even = np.minimum((before + step // 2) // max(step, 1), 255)
        even[0] = 0
        tables.append(even if step else _RAMP)
    return _mapped(image, *tables)


def _invert(image: Image.Image, draw: Draw) -> Image.Image:
    return ImageChops.invert(image)


def _posterize(image: Image.Image, draw: Draw) -> Image.Image:
    shift = min(8 - int(draw.level * BITS), 7)  # TensorFlow shifts 8 bits by 7 at most
    return _mapped(image, _RAMP.astype(np.uint8) >> shift << shift)


def _solarize(image: Image.Image, draw: Draw) -> Image.Image:
    threshold = int(draw.level * THRESHOLD) % 256
    return _mapped(image, np.where(np.less(_RAMP, threshold), _RAMP, 255 - _RAMP))


def _solarize_add(image: Image.Image, draw: Draw) -> Image.Image:
    """Dark pixels become lighter."""
    lighter = np.minimum(_RAMP + int(draw.level * ADDITION), 255)
    return _mapped(image, np.where(_RAMP < 128, lighter, _RAMP))


def _color(image: Image.Image, draw: Draw) -> Image.Image:
    return Image.blend(image.convert("L", TO_GREY).convert("RGB"), image, _factor(draw))


def _contrast(image: Image.Image, draw: Draw) -> Image.Image:
    grey = min(image.width * image.height // 256, 255)
    return Image.blend(Image.new("RGB", image.size, (grey,) * 3), image, _factor(draw))


def _brightness(image: Image.Image, draw: Draw) -> Image.Image:
    return Image.blend(Image.new("RGB", image.size), image, _factor(draw))


def _sharpness(image: Image.Image, draw: Draw) -> Image.Image:
    """Blended with the mean over 3 x 3 pixels, the middle one counting 5; the edge stays."""
    pixels = np.asarray(image)
    if min(image.size) < 3:
        return image
    wide = pixels.astype(np.uint16)
    columns = wide[:-2] + wide[1:-1] + wide[2:]
    total = columns[:, :-2] + columns[:, 1:-1] + columns[:, 2:] + 4 * wide[1:-1, 1:-1]
    smooth = pixels.copy()
    smooth[1:-1, 1:-1] = total // 13
    return Image.blend(Image.fromarray(smooth), image, _factor(draw))


def _factor(draw: Draw) -> float:
    """Of a blend: 0 is the degenerate image, 1 the image itself, more the opposite direction."""
    return draw.level * 1.8 + 0.1


_RAMP: Float = np.arange(256, dtype=np.float32)


def _mapped(image: Image.Image, *tables: NDArray) -> Image.Image:
    """Every level replaced through a table: one for all channels, or one for each. Table values are
    truncated, not rounded."""
    joined = b"".join(table.astype(np.uint8).tobytes() for table in tables)
    return image.point(list(joined * (3 // len(tables))))


# ---- places -----------------------------------------------------------------------------------


def _rotate(image: Image.Image, draw: Draw) -> Image.Image:
    angle = np.float32(draw.signed(DEGREES)) * np.float32(np.pi / 180)
    cos, sin = np.cos(angle), np.sin(angle)
    right, bottom = np.float32(image.width - 1), np.float32(image.height - 1)
    x_offset = (right - (cos * right - sin * bottom)) / np.float32(2)
    y_offset = (bottom - (sin * right + cos * bottom)) / np.float32(2)
    return _moved(image, (cos, -sin, x_offset), (sin, cos, y_offset))


def _shear_x(image: Image.Image, draw: Draw) -> Image.Image:
    return _moved(image, (1, draw.signed(SHEAR), 0), (0, 1, 0))


def _shear_y(image: Image.Image, draw: Draw) -> Image.Image:
    return _moved(image, (1, 0, 0), (draw.signed(SHEAR), 1, 0))


def _translate_x(image: Image.Image, draw: Draw) -> Image.Image:
    return _moved(image, (1, 0, draw.signed(SHIFT)), (0, 1, 0))


def _translate_y(image: Image.Image, draw: Draw) -> Image.Image:
    return _moved(image, (1, 0, 0), (0, 1, draw.signed(SHIFT)))


def _cutout(image: Image.Image, draw: Draw) -> Image.Image:
    """A grey square around a random pixel."""
    half = int(draw.level * CUTOUT)
    row, column = int(draw.first * image.height), int(draw.second * image.width)
    square = image.copy()
    top, left = max(0, row - half), max(0, column - half)
    square.paste(FILL, (left, top, min(image.width, column + half), min(image.height, row + half)))
    return square


def _moved(
    image: Image.Image, x_row: tuple[float, float, float], y_row: tuple[float, float, float]
) -> Image.Image:
    """Each pixel (x, y) comes from the pixel nearest to where the rows of an affine map send it.

    Written out in float32: a shear sends many pixels exactly halfway between two others, where
    tensorflow_addons rounds away from 0, and Pillow's fixed-point numbers round either way.
    """
    width, height = image.size
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    # A map of one coordinate only stays a row or a column, which is much cheaper.
    from_x, from_y = (
        _nearest(a * x if b == 0 else b * y if a == 0 else a * x + b * y, c)
        for a, b, c in np.array([x_row, y_row], np.float32)
    )
    inside = (from_x >= 0) & (from_x < width) & ((from_y >= 0) & (from_y < height))
    pixels = np.concatenate([np.asarray(image).reshape(-1, 3), np.array([FILL], np.uint8)])
    source = np.where(inside, from_y * width + from_x, len(pixels) - 1)
    return Image.fromarray(pixels.take(source, axis=0))


def _nearest(coordinates: Float, shift: np.float32) -> NDArray[np.intp]:
    """Shifted and rounded, a half away from 0."""
    shifted = coordinates + shift
    return (shifted + np.copysign(np.float32(0.5), shifted)).astype(np.intp)


OPERATIONS: dict[str, Callable[[Image.Image, Draw], Image.Image]] = {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "Rotate": _rotate,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "Color": _color,
    "Contrast": _contrast,
    "Brightness": _brightness,
    "Sharpness": _sharpness,
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateX": _translate_x,
    "TranslateY": _translate_y,
    "Cutout": _cutout,
    "SolarizeAdd": _solarize_add,
}
