"""One image to one view: the random crop and flip of training, the fixed crop of evaluation.

As in the reference, deepmind-research/nfnets/dataset.py at f5de0ed (cited by line), with one
deviation: the reference's bicubic resize neither antialiases nor clamps to [0, 255]. Ours does
both, so that views stay uint8 until they are on the device.

The resize is torch's: Pillow's filter in integer arithmetic, at about twice the speed. As in the
reference, only pixels inside the crop are used. The result does not depend on the number of
threads, nor on whether the processor has AVX2.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

MIN_COVERED = 0.1  # dataset.py:454: a crop shows a tenth of the image, whatever its smallest area
PADDING = 32  # pixels around the centre crop, at the size of the view (dataset.py:476)


class Box(NamedTuple):
    left: int
    top: int
    right: int
    bottom: int


def random_resized_crop_flip(
    pixels_HWC: Pixels,
    rng: np.random.Generator,
    *,
    size: int,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
    attempts: int = 10,
    flip: bool = True,
) -> Pixels:
    """A training view of an RGB image, (size, size, 3).

    A crop of `area` (a range of fractions of the image) and `aspect` (width over height), resized,
    and mirrored half of the time. If no crop fits, or the one that does is the whole image, the
    view is the centre of the image instead (dataset.py:458-460).
    """
    height, width, _ = pixels_HWC.shape
    box = _random_box(width, height, rng, area, aspect, attempts)
    if box is None or box == Box(0, 0, width, height):
        box = _centre_box(width, height, size)
    crop_HWC = pixels_HWC[box.top : box.bottom, box.left : box.right]
    return _resized(crop_HWC, size, mirrored=flip and rng.random() < 0.5)


def eval_view(pixels_HWC: Pixels, *, size: int, margin: int = 32) -> Pixels:
    """The evaluation view of an RGB image, (size, size, 3).

    Both sides are resized to `size + margin`, so that the aspect ratio is lost, and the centre is
    cut out (dataset.py:508-527).
    """
    offset = (margin + 1) // 2
    return _resized(pixels_HWC, size + margin)[offset : offset + size, offset : offset + size]


def _resized(pixels_HWC: Pixels, side: int, mirrored: bool = False) -> Pixels:
    """A square of `side` pixels: bicubic, antialiased, rows before columns, uint8 in between."""
    images_1CHW = torch.from_numpy(pixels_HWC)[None].permute(0, 3, 1, 2)  # torch sees channels-last
    resized_1CHW = F.interpolate(images_1CHW, (side, side), mode="bicubic", antialias=True)
    if mirrored:  # here: torch flips five times as fast as numpy
        resized_1CHW = resized_1CHW.flip(3)
    return resized_1CHW[0].permute(1, 2, 0).numpy()


def _random_box(
    width: int,
    height: int,
    rng: np.random.Generator,
    area: tuple[float, float],
    aspect: tuple[float, float],
    attempts: int,
) -> Box | None:
    """The first of several random boxes that fits.

    The distribution is that of TensorFlow's `sample_distorted_bounding_box`: the aspect is uniform,
    and so is the height among those possible with it; the area is not uniform.
    """
    smallest, largest = (fraction * width * height for fraction in area)
    for _ in range(attempts):
        ratio = aspect[0] + (aspect[1] - aspect[0]) * rng.random()
        highest = min(round((largest / ratio) ** 0.5), height, int((width + 0.5) / ratio))
        lowest = min(round((smallest / ratio) ** 0.5), highest)
        rows = lowest + int((highest - lowest + 1) * rng.random())
        columns = round(rows * ratio)
        if rows * columns < smallest:  # correct the rounding of the area
            rows += 1
        elif rows * columns > largest:
            rows -= 1
        columns = round(rows * ratio)
        # The kernel draws an offset from [0, slack): a crop never touches the far edge.
        top = int((height - rows) * rng.random())
        left = int((width - columns) * rng.random())
        fits = 0 < rows <= height and 0 < columns <= width
        enough = max(smallest, MIN_COVERED * width * height) <= rows * columns <= largest
        if fits and enough:
            return Box(left, top, left + columns, top + rows)
    return None


def _centre_box(width: int, height: int, size: int) -> Box:
    """The square that leaves PADDING pixels around it once it is `size` (dataset.py:464-485)."""
    side = max(1, int(min(width, height) / (size + PADDING) * size))
    left, top = (width - side + 1) // 2, (height - side + 1) // 2
    return Box(left, top, left + side, top + side)
