"""RandAugment's operations by their definitions, in plain numpy and float64.

Where deepmind-research/nfnets/autoaugment.py (f5de0ed) departs from a definition, so does this.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Source = Callable[[int, int], tuple[float, float]]


def auto_contrast(image: Pixels) -> NDArray:
    low, high = (extreme(image, axis=(0, 1)).astype(float) for extreme in (np.min, np.max))
    stretched = (image - low) * 255 / np.where(high > low, high - low, 1)
    return np.where(high > low, stretched, image)


def equalize(image: Pixels) -> NDArray:
    """In each channel, a pixel becomes the number of darker pixels, in units of a step."""
    result = image.astype(int)
    for channel in range(3):
        values = image[..., channel]
        step = (values.size - np.sum(values == values.max())) // 255
        if step:
            for value in np.unique(values):
                darker = np.sum(values < value)
                even = (darker + step // 2) // step if value else 0
                result[..., channel][values == value] = min(even, 255)
    return result


def invert(image: Pixels) -> NDArray:
    return 255 - image.astype(int)


def posterize(image: Pixels, magnitude: int) -> NDArray:
    """Keeps this many of the highest bits, but at least one."""
    bits = max(int(magnitude / 10 * 4), 1)
    return image // 2 ** (8 - bits) * 2 ** (8 - bits)


def solarize(image: Pixels, magnitude: int) -> NDArray:
    threshold = int(magnitude / 10 * 256) % 256
    return np.where(image < threshold, image, 255 - image)


def solarize_add(image: Pixels, magnitude: int) -> NDArray:
    lighter = np.minimum(image.astype(int) + int(magnitude / 10 * 110), 255)
    return np.where(image < 128, lighter, image)


def blend(degenerate: NDArray, image: Pixels, magnitude: int) -> NDArray:
    factor = magnitude / 10 * 1.8 + 0.1
    degenerate = np.floor(degenerate)
    return np.clip(degenerate + factor * (image - degenerate), 0, 255)


def color(image: Pixels, magnitude: int) -> NDArray:
    grey = image @ np.array([0.2989, 0.587, 0.114]) * 255.5 / 255
    return blend(np.repeat(grey[..., None], 3, axis=2), image, magnitude)


def contrast(image: Pixels, magnitude: int) -> NDArray:
    height, width, _ = image.shape
    return blend(np.full(image.shape, min(height * width / 256, 255)), image, magnitude)


def brightness(image: Pixels, magnitude: int) -> NDArray:
    return blend(np.zeros(image.shape), image, magnitude)


def sharpness(image: Pixels, magnitude: int) -> NDArray:
    smooth = image.astype(float)
    for row in range(1, image.shape[0] - 1):
        for column in range(1, image.shape[1] - 1):
            around = image[row - 1 : row + 2, column - 1 : column + 2].astype(int)
            total = around.sum(axis=(0, 1)) + 4 * around[1, 1]
            smooth[row, column] = total // 13
    return blend(smooth, image, magnitude)


def rotate(image: Pixels, magnitude: int, sign: int) -> NDArray:
    """Around the middle of the image; y points down."""
    angle = sign * magnitude / 10 * 30 * math.pi / 180
    middle_x, middle_y = (image.shape[1] - 1) / 2, (image.shape[0] - 1) / 2

    def source(x: int, y: int) -> tuple[float, float]:
        right, down = x - middle_x, y - middle_y
        return (
            middle_x + math.cos(angle) * right - math.sin(angle) * down,
            middle_y + math.sin(angle) * right + math.cos(angle) * down,
        )

    return _moved(image, source)


def shear_x(image: Pixels, magnitude: int, sign: int) -> NDArray:
    return _moved(image, lambda x, y: (x + sign * magnitude * 3 * y / 100, y))


def shear_y(image: Pixels, magnitude: int, sign: int) -> NDArray:
    return _moved(image, lambda x, y: (x, y + sign * magnitude * 3 * x / 100))


def translate_x(image: Pixels, magnitude: int, sign: int) -> NDArray:
    return _moved(image, lambda x, y: (x + sign * magnitude * 10, y))


def translate_y(image: Pixels, magnitude: int, sign: int) -> NDArray:
    return _moved(image, lambda x, y: (x, y + sign * magnitude * 10))


def cutout(image: Pixels, magnitude: int, row: int, column: int) -> NDArray:
    half = int(magnitude / 10 * 40)
    y, x = np.indices(image.shape[:2])
    inside = (row - half <= y) & (y < row + half) & (column - half <= x) & (x < column + half)
    return np.where(np.expand_dims(inside, 2), 128, image)


def _moved(image: Pixels, source: Source) -> NDArray:
    """Nearest neighbours, halves rounded away from 0; 128 outside of the image."""
    height, width, _ = image.shape
    moved = np.full(image.shape, 128)
    for y in range(height):
        for x in range(width):
            from_x, from_y = (
                int(math.copysign(math.floor(abs(place) + 0.5), place)) for place in source(x, y)
            )
            if 0 <= from_x < width and 0 <= from_y < height:
                moved[y, x] = image[from_y, from_x]
    return moved
