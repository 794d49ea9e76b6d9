"""Thumbnails, small enough to keep for a whole data set: grey, without borders, 48 x 48.

Near-duplicates are searched among them (`dedup.py`). A JPEG is decoded at the smallest fraction of
its size that still has 44 pixels per side, and only its luminance, which takes a third of the time.

Shape suffixes: P pictures, Y and X pixels of a side, S = SIDE.
"""

from functools import lru_cache

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from nfnets_xla.data.decode import MAX_PIXELS, START_OF_IMAGE, check_scans, decode

SIDE = 48
DECODED_SIDE = 44  # pixels at least: an eighth of most photographs, whose sides are 352 and more
TOLERANCE = 8  # grey levels by which a border may vary, including JPEG's ringing
MOST_BORDER = 0.35  # largest border at each end, as a share of the side
LEAST_SIDE = 16  # smallest side, in pixels, of a picture inside a border

Grey = NDArray[np.uint8]
Thumbnails = NDArray[np.uint8]  # (P, S, S)


def thumbnails(data: bytes) -> Thumbnails:
    """The whole picture and, if it has a border, the part inside it: (1 or 2, S, S).

    Raises ValueError for what is not a whole picture."""
    grey_YX = decode_grey(data)
    inside = trimmed(grey_YX)
    found = [grey_YX] if inside is None else [grey_YX, inside]
    return np.stack([_shrunk(picture) for picture in found])


def decode_grey(data: bytes) -> Grey:
    """The picture's luminance at a fraction of its size; both sides have at least 44 pixels, unless
    the picture is smaller."""
    if data.startswith(START_OF_IMAGE):
        check_scans(data)
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            if int(height) * int(width) <= MAX_PIXELS and colours in ("YCbCr", "RGB", "Gray"):
                side = DECODED_SIDE
                return simplejpeg.decode_jpeg(
                    data, "GRAY", fastdct=True, min_height=side, min_width=side
                )[:, :, 0]
        except ValueError:
            pass  # Pillow decides
    image = Image.fromarray(decode(data)).convert("L")
    return np.asarray(image.reduce(max(1, min(image.size) // DECODED_SIDE)))


def trimmed(grey_YX: Grey) -> Grey | None:
    """The picture inside a border of one colour; None if there is no border."""
    height, width = grey_YX.shape
    rows, columns = int(height * MOST_BORDER), int(width * MOST_BORDER)
    top, bottom = _flat_lines(grey_YX[:rows]), _flat_lines(grey_YX[::-1][:rows])
    left, right = _flat_lines(grey_YX.T[:columns]), _flat_lines(grey_YX.T[::-1][:columns])
    if top + bottom + left + right == 0:
        return None
    if min(height - top - bottom, width - left - right) < LEAST_SIDE:
        return None
    inside = grey_YX[top : height - bottom, left : width - right]
    return None if _is_flat(inside) else inside


def _flat_lines(lines_NM: Grey) -> int:
    """The number of lines, from the first, that have the first line's colour; plus one, as the
    border may end within a line; 0 if the first has several colours."""
    if not len(lines_NM) or not _is_flat(lines_NM[0]):  # the usual case, without looking further
        return 0
    low_N, high_N = lines_NM.min(axis=1).astype(int), lines_NM.max(axis=1).astype(int)
    flat_N = (high_N - low_N <= 2 * TOLERANCE) & (abs(high_N + low_N - high_N[0] - low_N[0]) <= 16)
    flat = len(flat_N) if flat_N.all() else int(flat_N.argmin())
    return flat + 1 if flat else 0


def _is_flat(grey: Grey) -> bool:
    return int(grey.max()) - int(grey.min()) <= 2 * TOLERANCE


def _shrunk(grey_YX: Grey) -> Grey:
    """Scaled to S x S by area averages, then stretched to all grey levels."""
    height, width = grey_YX.shape
    small_SS = _cover(height) @ grey_YX.astype(np.float32) @ _cover(width).T
    low, high = small_SS.min(), small_SS.max()
    return ((small_SS - low) * (255 / max(high - low, 1.0)) + 0.5).astype(np.uint8)


@lru_cache(1024)
def _cover(size: int) -> NDArray[np.float32]:
    """(S, size): the weight of each of `size` pixels in each of S."""
    edges = np.arange(size + 1) / size
    starts_S1 = np.arange(SIDE)[:, None] / SIDE
    inside = np.clip(edges, starts_S1, starts_S1 + 1 / SIDE)
    return (np.diff(inside, axis=1) * SIDE).astype(np.float32)
