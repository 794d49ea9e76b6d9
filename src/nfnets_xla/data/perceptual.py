"""Perceptual hashes: 128 signs of a picture's lowest frequencies, and those of its crops.

The signs of a cosine transform change little when a picture is resized, compressed, brightened or
written on, but much when it is cropped or rotated. So every reference is hashed in many crops and
rotations, and a query is hashed once. Mirroring only flips the signs of the odd columns, so the
hash of the mirror image follows from that of the picture.

Crops are not cut out and scaled: a crop's transform is `basis @ thumbnail @ basis.T`, where the
basis is the integral of the cosines over each pixel's part in the crop.

Shape suffixes: P pictures, S sides, V views of a reference, B bytes.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nfnets_xla.data.thumbnail import SIDE, Thumbnails

BITS = 128
FREQUENCIES = 13  # per side: enough to contain the BITS lowest
TURNS = (-4.2, -2.6, 2.6, 4.2)  # degrees: small rotations are up to about 5
MOST_DEVIATIONS = 1.5  # pixels are clipped this many standard deviations from the mean
STEP = 0.06  # between the sides of crops; a copy is within half of it of the nearest
SHIFT = 0.042  # between positions of crops

Codes = NDArray[np.uint8]


class View(NamedTuple):
    """A part of a picture, in shares of its sides, rotated about its middle by degrees."""

    top: float
    left: float
    side: float
    turn: float = 0.0


WHOLE = View(0.0, 0.0, 1.0)


def views(crop: float) -> list[View]:
    """The views of a reference that are hashed: crops down to this share of its area, rotations.

    Raises ValueError for a share that is out of range."""
    if not 0.2 <= crop <= 1:
        raise ValueError(f"crop is {crop}; it must be a share of a picture's area, 0.2 to 1")
    smallest = crop**0.5
    sides = np.linspace(1, smallest, 1 + int(np.ceil((1 - smallest) / STEP)))
    found = []
    for side in sides.tolist():
        places = np.linspace(0, 1 - side, 1 + int(np.ceil((1 - side) / SHIFT)))
        found += [View(top, left, side) for top in places.tolist() for left in places.tolist()]
    for turn in TURNS:
        # The largest upright square inside the rotated one, and the whole with its corners cut.
        side = 1 / (np.cos(np.radians(turn)) + abs(np.sin(np.radians(turn))))
        found += [View((1 - s) / 2, (1 - s) / 2, s, turn) for s in (1.0, float(side))]
    return found


def codes(pictures_PSS: Thumbnails, of: list[View] | None = None) -> Codes:
    """The codes of all views `of` the pictures, (P, V, B)."""
    of = [WHOLE] if of is None else of
    turned = {turn: _levelled(_turned(pictures_PSS, turn)) for turn in {view.turn for view in of}}
    signs_PVB = np.empty((len(pictures_PSS), len(of), BITS), np.bool_)
    for number, view in enumerate(of):
        rows, columns = _basis(view.top, view.side), _basis(view.left, view.side)
        waves = rows @ turned[view.turn] @ columns.T
        signs_PVB[:, number] = waves.reshape(len(waves), -1)[:, _LOWEST] > 0
    return np.packbits(signs_PVB, axis=-1)


def mirrored(of: Codes) -> Codes:
    """The codes of the mirror images."""
    return of ^ _ODD_COLUMNS


def _levelled(pictures_PSS: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Centred, and clipped far from the mean: this reduces the influence of writing on a dark
    picture, and of the corners of a rotated one."""
    flat = pictures_PSS.reshape(len(pictures_PSS), -1).astype(np.float32)
    flat -= flat.mean(axis=1, keepdims=True)
    most = MOST_DEVIATIONS * flat.std(axis=1, keepdims=True)
    return np.clip(flat, -most, most).reshape(pictures_PSS.shape)


def _turned(pictures_PSS: Thumbnails, degrees: float) -> NDArray[np.uint8]:
    if not degrees:
        return pictures_PSS
    return np.stack(
        [
            np.asarray(Image.fromarray(picture).rotate(degrees, Image.Resampling.BILINEAR))
            for picture in pictures_PSS
        ]
    )


@lru_cache(4096)
def _basis(start: float, length: float) -> NDArray[np.float32]:
    """(FREQUENCIES, S): integrals of cos(pi k t) over a thumbnail's pixels, t from 0 to 1 in the
    crop."""
    edges = np.clip((np.arange(SIDE + 1) / SIDE - start) / length, 0, 1)
    k = np.arange(FREQUENCIES)[:, None]
    integrals = np.where(k == 0, edges, np.sin(np.pi * k * edges) / (np.pi * np.maximum(k, 1)))
    return np.diff(integrals, axis=1).astype(np.float32)


def _lowest() -> NDArray[np.int64]:
    """The positions of the BITS lowest frequencies except 0, lowest first: these change least, so
    the first bits of a code find most copies."""
    row, column = np.mgrid[:FREQUENCIES, :FREQUENCIES]
    order = np.lexsort([row.ravel(), (row**2 + column**2).ravel()])
    return order[1 : BITS + 1]


_LOWEST = _lowest()
_ODD_COLUMNS = np.packbits(_LOWEST % FREQUENCIES % 2 == 1)
