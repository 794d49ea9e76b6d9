"""MixUp on half of a batch's streams, CutMix on the others: drawn on the host, mixed on the device.

As in the reference, deepmind-research/nfnets/dataset.py at f5de0ed (cited by line): shares from
Beta(0.2, 0.2), boxes of uniform area, labels mixed by the share of pixels. There are two
deviations. The reference draws a batch twice as large and mixes its halves; here rows are mixed
with others of their batch, so that each is used once as itself and once as a partner. And the
reference applies RandAugment after mixing; here before, so that the host's pixels are final.

A row's partner shows the same view of another image of its stream: of the next image for view 0, of
the one after for view 1, and so on, cyclically. As a stream is shuffled already, this is a random
partner. A whole stream is on one host and, where the devices divide the streams, on one device, so
that mixing needs no gather or communication.

Shape suffixes: C streams, U unique images of the batch, N = U / C of a stream, K views, B = U * K
rows, H W D the pixels of a view, 4 a box's top, left, bottom, right.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

POWER = 5  # 1 / alpha of MixUp's Beta distribution, 0.2 (dataset.py:158)


class Layout(NamedTuple):
    """The order of a batch's rows: by stream, then image, then view."""

    streams: int  # C
    images: int  # N
    views: int  # K


class Mixes(NamedTuple):
    """How rows are mixed. A row that is not mixed has shares of 1 and an empty box."""

    partner_B: NDArray[np.int64]  # row numbers; on the device they follow from the layout
    outside_B: NDArray[np.float32]  # share of the row's own pixels outside of its box; inside: 1
    box_B4: NDArray[np.int32]
    ratio_B: NDArray[np.float32]  # share of the row's own label


def draw_mixes(
    layout: Layout,
    size: int,
    *,
    sample_B: NDArray[np.int64],
    stream_B: NDArray[np.int64],
    weight_B: NDArray[np.float32],
    rng_of: Callable[[int], np.random.Generator],
) -> Mixes:
    """`rng_of(row)` is the row's own generator. Even streams are for MixUp, odd ones for CutMix.

    A row is not mixed if its partner shows the same sample or has weight 0, which happens where an
    epoch, or the run, ends within the batch.
    """
    partner_B = partner_rows(layout)
    mixes = Mixes(
        partner_B,
        np.ones(len(partner_B), np.float32),
        np.zeros((len(partner_B), 4), np.int32),
        np.ones(len(partner_B), np.float32),
    )
    mixable_B = (sample_B != sample_B[partner_B]) & (weight_B[partner_B] > 0)
    for row in np.nonzero(mixable_B)[0].tolist():
        if stream_B[row] % 2:
            top, left, bottom, right = box = cutmix_box(rng_of(row), size)
            mixes.outside_B[row] = 0
            mixes.box_B4[row] = box
            mixes.ratio_B[row] = (bottom - top) * (right - left) / size**2
        else:
            mixes.outside_B[row] = mixes.ratio_B[row] = mixup_share(rng_of(row))
    return mixes


def partner_rows(layout: Layout) -> NDArray[np.int64]:
    """The row number of each row's partner, (B,)."""
    rows_CNK = np.arange(np.prod(layout)).reshape(layout)
    shifted = [np.roll(rows_CNK[..., v], -shift, 1) for v, shift in enumerate(_shifts(layout))]
    return np.stack(shifted, axis=2).reshape(-1)


def mixup_share(rng: np.random.Generator) -> float:
    """From Beta(0.2, 0.2) by Jöhnk's method, since numpy's method may change with a release."""
    while True:
        # Products, since powers differ between processors in their last bits.
        own, other = (math.prod([number] * POWER) for number in rng.random(2).tolist())
        if 0 < own + other <= 1:
            return own / (own + other)


def cutmix_box(rng: np.random.Generator, size: int) -> tuple[int, int, int, int]:
    """The box in which a row keeps its own pixels: a square of uniform area around a random pixel,
    cut off at the edges (dataset.py:226-247)."""
    x, y, area = rng.random(3).tolist()
    column, row, half = int(x * size), int(y * size), int(math.sqrt(1 - area) * size) // 2
    top, left = max(0, row - half), max(0, column - half)
    return top, left, min(size, row + half), min(size, column + half)


def mixed(images_BHWD: Tensor, layout: Layout, outside_B: Tensor, box_B4: Tensor) -> Tensor:
    """The batch's images, uint8, mixed in float32. Every batch makes the same graph."""
    height, width = images_BHWD.shape[1:3]
    rows_H1 = torch.arange(height, device=images_BHWD.device)[:, None]
    columns_W = torch.arange(width, device=images_BHWD.device)
    top, left, bottom, right = box_B4[:, :, None, None].unbind(dim=1)
    inside_BHW = (rows_H1 >= top) & (rows_H1 < bottom) & (columns_W >= left) & (columns_W < right)
    own_BHW1 = torch.where(inside_BHW, 1.0, outside_B[:, None, None])[..., None]
    partners_BHWD = _partners(images_BHWD, layout).float()
    return own_BHW1 * images_BHWD.float() + (1 - own_BHW1) * partners_BHWD


def _partners(images_BHWD: Tensor, layout: Layout) -> Tensor:
    images_CNKHWD = images_BHWD.unflatten(0, layout)
    shifted = [
        images_CNKHWD[:, :, view].roll(-shift, dims=1) for view, shift in enumerate(_shifts(layout))
    ]
    return torch.stack(shifted, dim=2).flatten(0, 2)


def _shifts(layout: Layout) -> list[int]:
    """For each view, how many images further its partner is; never 0 modulo the images."""
    return [1 + view % (layout.images - 1) for view in range(layout.views)]
