"""Perceptual hashes: 128 signs of a picture's lowest frequencies, and those of its crops.

The signs of a cosine transform change little when a picture is resized, compressed, brightened or
written on, but much when it is cropped or turned. So every reference is hashed in all the crops
that copies are made of, and turned; a picture that is looked for is hashed once. Mirroring only
changes the signs of the odd columns: the hash of the mirror image is known without looking.

A crop is not cut out and scaled: its transform is `basis @ thumbnail @ basis.T`, where the basis is
the integral of the cosines over each pixel's part in the crop.

Shape suffixes: P pictures, S sides, V views of a reference, B bytes.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nfnets_xla.data.thumbnail import SIDE, Thumbnails

BITS = 128
FREQUENCIES = 13  # a side; the BITS lowest of them all lie within
TURNS = (-4.2, -2.6, 2.6, 4.2)  # degrees: small rotations are up to about 5
MOST_DEVIATIONS = 1.5  # that light and dark count
STEP = 0.06  # between the sides of crops; what a copy may deviate from the nearest is half of it
SHIFT = 0.042  # between places of crops

Codes = NDArray[np.uint8]


class View(NamedTuple):
    """A part of a picture, as shares of its sides; turned about its middle, in degrees."""

    top: float
    left: float
    side: float
    turn: float = 0.0


WHOLE = View(0.0, 0.0, 1.0)


def views(crop: float) -> list[View]:
    """What a reference is hashed in: crops down to this share of its area, and turned ones.

    Raises ValueError for no share."""
    if not 0.2 <= crop <= 1:
        raise ValueError(f"crop is {crop}; it must be a share of a picture's area, 0.2 to 1")
    smallest = crop**0.5
    sides = np.linspace(1, smallest, 1 + int(np.ceil((1 - smallest) / STEP)))
    found = []
    for side in sides.tolist():
        places = np.linspace(0, 1 - side, 1 + int(np.ceil((1 - side) / SHIFT)))
        found += [View(top, left, side) for top in places.tolist() for left in places.tolist()]
    for turn in TURNS:
        # The largest upright square in a turned one, and the whole one with its corners cut.
        side = 1 / (np.cos(np.radians(turn)) + abs(np.sin(np.radians(turn))))
        found += [View((1 - s) / 2, (1 - s) / 2, s, turn) for s in (1.0, float(side))]
    return found


def codes(pictures_PSS: Thumbnails, of: list[View] | None = None) -> Codes:
    """(P, V, B)."""
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
    """Cut off where light and dark are far from the mean: of what is written on a dark picture, and
    of the corners of a turned one, little is left."""
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
    """The places of the BITS lowest frequencies but 0, the lowest first: these change least, so
    that the first bits of a code find the most."""
    row, column = np.mgrid[:FREQUENCIES, :FREQUENCIES]
    order = np.lexsort([row.ravel(), (row**2 + column**2).ravel()])
    return order[1 : BITS + 1]


_LOWEST = _lowest()
_ODD_COLUMNS = np.packbits(_LOWEST % FREQUENCIES % 2 == 1)
