"""One image to one view: the random crop and flip of training, the fixed crop of evaluation.

As in the reference, deepmind-research/nfnets/dataset.py at f5de0ed (cited by line), with one
deviation: its bicubic resize neither antialiases nor clamps, and its values leave [0, 255]. Ours is
Pillow's, which does both, so that views stay uint8 until they are on the device.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

MIN_COVERED = 0.1  # dataset.py:454: a crop shows a tenth of the image, whatever its smallest area
PADDING = 32  # pixels around the centre crop, at the size of the view (dataset.py:476)


class Box(NamedTuple):
    left: int
    top: int
    right: int
    bottom: int


def random_resized_crop_flip(
    image: Image.Image,
    rng: np.random.Generator,
    *,
    size: int,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
    attempts: int = 10,
    flip: bool = True,
) -> Pixels:
    """A training view of an RGB image, (size, size, 3) uint8.

    A crop of `area` (a range of fractions of the image) and `aspect` (width over height), resized,
    and mirrored half of the time. If no crop fits, or the one that does is the whole image, the
    view is the centre of the image instead (dataset.py:458-460).
    """
    whole = Box(0, 0, *image.size)
    box = _random_box(*image.size, rng, area, aspect, attempts)
    if box is None or box == whole:
        box = _centre_box(*image.size, size)
    view = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    if flip and rng.random() < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(view)


def eval_view(image: Image.Image, *, size: int, margin: int = 32) -> Pixels:
    """The evaluation view of an RGB image, (size, size, 3) uint8.

    Both sides are resized to `size + margin`, so that the aspect ratio is lost, and the centre is
    cut out (dataset.py:508-527).
    """
    resized = image.resize((size + margin, size + margin), Image.Resampling.BICUBIC)
    offset = (margin + 1) // 2
    return np.asarray(resized.crop((offset, offset, offset + size, offset + size)))


def _random_box(
    width: int,
    height: int,
    rng: np.random.Generator,
    area: tuple[float, float],
    aspect: tuple[float, float],
    attempts: int,
) -> Box | None:
    """The first of several random boxes that fits.

    The distribution of TensorFlow's `sample_distorted_bounding_box`: the aspect is uniform, and so
    is the height among those that the aspect allows; it is not the area that is uniform.
    """
    smallest, largest = (fraction * width * height for fraction in area)
    for _ in range(attempts):
        ratio = aspect[0] + (aspect[1] - aspect[0]) * rng.random()
        highest = min(round((largest / ratio) ** 0.5), height, int((width + 0.5) / ratio))
        lowest = min(round((smallest / ratio) ** 0.5), highest)
        rows = lowest + int((highest - lowest + 1) * rng.random())
        columns = round(rows * ratio)
        if rows * columns < smallest:  # mend what rounding did to the area, one way or the other
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
