"""Whether two thumbnails show the same picture: aligns them and compares block by block.

The hash tells roughly which part of the reference a copy shows. From there an affine map is fitted
(Lucas and Kanade, by Gauss-Newton steps, with weights that reduce the influence of differences),
which aligns crops and rotations to a fraction of a pixel. Then each block of the copy is correlated
with the pixels below it. Both are high-pass filtered first, so that detail must agree, not only
brightness. Writing on a copy spoils only the blocks that it covers, and the worst quarter of the
blocks does not count.

Shape suffixes: B pairs, S sides, N = S * S pixels, K blocks, Q pixels of a block.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from nfnets_xla.data.perceptual import View
from nfnets_xla.data.thumbnail import SIDE, Thumbnails

BATCH = 64  # pairs at a time: 30 MB
STEPS = (2, 2, 2, 1, 1, 1, 1)  # for each step of the fit, how often both are blurred
LONGEST_STEP = 0.1  # in units of half a side
SAME = 0.5  # standard deviations: larger differences get less and less weight
BLOCK = 8
COUNTED = 0.75  # of the blocks, by weight
LEAST_SHOWN = 0.55  # of a copy's pixels that must lie on the reference
SAME_SHADE = 0.05  # difference of brightness, in standard deviations of the picture's
LEAST_SHADE = 8.0  # standard deviation, in grey levels, at which shade has half its weight
NOISE = 4.0  # variance of a block, in squared grey levels, that compression alone may cause


def likeness(
    copies: Thumbnails, references: Thumbnails, placed: Sequence[View]
) -> NDArray[np.float32]:
    """(B,), 0 to 1 for each pair. `placed` is the part of the reference that each copy shows."""
    found = [
        _likeness(
            torch.from_numpy(copies[first : first + BATCH]).float(),
            torch.from_numpy(references[first : first + BATCH]).float(),
            torch.tensor(np.stack([_map(view) for view in placed[first : first + BATCH]])).float(),
        )
        for first in range(0, len(copies), BATCH)
    ]
    return torch.cat([torch.zeros(0), *found]).numpy()


@torch.no_grad()
def _likeness(copies_BSS: Tensor, references_BSS: Tensor, maps_B23: Tensor) -> Tensor:
    for blurs in STEPS:
        maps_B23 = _fitted(_blurred(copies_BSS, blurs), _blurred(references_BSS, blurs), maps_B23)
    layers_B2SS = torch.stack([_detail(references_BSS), references_BSS], 1)
    laid_B2N, shown_BN = _sampled(layers_B2SS, maps_B23)
    shade_B2N = torch.stack([copies_BSS.flatten(1), laid_B2N[:, 1]], 1)
    found_B = _agreement(_detail(copies_BSS).flatten(1), laid_B2N[:, 0], shade_B2N, shown_BN)
    is_sane_B = _is_sane(maps_B23) & (shown_BN.mean(1) >= LEAST_SHOWN)
    return torch.where(is_sane_B, found_B.clamp(0, 1), 0)


def _map(view: View) -> NDArray[np.float64]:
    """From places in the copy to places in the reference; both from -1 to 1, x first."""
    middle = np.array([2 * view.left + view.side - 1, 2 * view.top + view.side - 1])
    sine, cosine = np.sin(np.radians(view.turn)), np.cos(np.radians(view.turn))
    back = np.array([[cosine, -sine], [sine, cosine]])
    return np.column_stack([back * view.side, back @ middle])


# ---- laying one over the other ----------------------------------------------------------------


def _fitted(copies_BSS: Tensor, references_BSS: Tensor, maps_B23: Tensor) -> Tensor:
    """The maps after one Gauss-Newton step."""
    rows, columns = torch.gradient(references_BSS, dim=(1, 2))
    sampled_B3N, shown_BN = _sampled(torch.stack([references_BSS, columns, rows], 1), maps_B23)
    copy_BN, _ = _standard(copies_BSS.flatten(1), shown_BN)
    laid_BN, scale_B1 = _standard(sampled_B3N[:, 0], shown_BN)
    wrong_BN = copy_BN - laid_BN
    weights_BN = shown_BN / (1 + (wrong_BN / SAME) ** 2)
    slopes_B21N = (sampled_B3N[:, 1:] * (SIDE / 2) / scale_B1[:, None])[:, :, None]
    jacobian_B6N = (slopes_B21N * _PLACES_3N).flatten(1, 2)
    weighted_B6N = jacobian_B6N * weights_BN[:, None]
    normal_B66 = weighted_B6N @ jacobian_B6N.mT
    towards_B61 = weighted_B6N @ wrong_BN[:, :, None]
    damping_B = 1e-3 * normal_B66.diagonal(dim1=1, dim2=2).sum(1) + 1e-3
    step_B61 = torch.linalg.solve(normal_B66 + damping_B[:, None, None] * torch.eye(6), towards_B61)
    return maps_B23 + step_B61.clamp(-LONGEST_STEP, LONGEST_STEP).view(-1, 2, 3)


def _sampled(layers_BCSS: Tensor, maps_B23: Tensor) -> tuple[Tensor, Tensor]:
    """The layers sampled through the map, (B, C, N); 1 where inside the picture, (B, N)."""
    size = [len(layers_BCSS), 1, SIDE, SIDE]
    places_BSS2 = functional.affine_grid(maps_B23, size, align_corners=False)
    shown_BN = (places_BSS2.abs() < 1).all(-1).flatten(1).float()
    laid_BCSS = functional.grid_sample(
        layers_BCSS, places_BSS2, padding_mode="border", align_corners=False
    )
    return laid_BCSS.flatten(2), shown_BN


def _standard(values_BN: Tensor, shown_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Standardised to mean 0 and deviation 1 over shown pixels; and the deviation, (B, 1)."""
    count_B1 = shown_BN.sum(1, keepdim=True).clamp(min=1)
    centred = values_BN - (values_BN * shown_BN).sum(1, keepdim=True) / count_B1
    # Plus one grey level, so that a picture of one colour is not divided by 0.
    scale_B1 = ((centred**2 * shown_BN).sum(1, keepdim=True) / count_B1).sqrt() + 1
    return centred / scale_B1, scale_B1


def _is_sane(maps_B23: Tensor) -> Tensor:
    """Whether the map is plausible: hardly sheared, and scaled no more than the crops are."""
    across_B2, down_B2 = maps_B23[:, :, 0], maps_B23[:, :, 1]
    lengths_B2 = torch.stack([across_B2.norm(dim=1), down_B2.norm(dim=1)], 1)
    shear_B = (across_B2 * down_B2).sum(1) / lengths_B2.prod(1).clamp(min=1e-6)
    return ((lengths_B2 > 0.4) & (lengths_B2 < 1.4)).all(1) & (shear_B.abs() < 0.15)


# ---- comparing --------------------------------------------------------------------------------


def _agreement(copy_BN: Tensor, laid_BN: Tensor, shade_B2N: Tensor, shown_BN: Tensor) -> Tensor:
    """The mean correlation of the blocks that agree best, weighted by their contrast.

    Blocks without detail, such as blue sky, are compared by their brightness."""
    mask_BKQ = _blocks(shown_BN)
    count_BK = mask_BKQ.sum(-1).clamp(min=1)
    copy_BKQ, laid_BKQ = _blocks(copy_BN) * mask_BKQ, _blocks(laid_BN) * mask_BKQ
    means = copy_BKQ.sum(-1) / count_BK, laid_BKQ.sum(-1) / count_BK
    ours_BK = (copy_BKQ**2).sum(-1) / count_BK - means[0] ** 2
    theirs_BK = (laid_BKQ**2).sum(-1) / count_BK - means[1] ** 2
    shared_BK = (copy_BKQ * laid_BKQ).sum(-1) / count_BK - means[0] * means[1]
    shade_BK = _same_shade(shade_B2N, shown_BN, mask_BKQ)
    alike_BK = (shared_BK + NOISE * shade_BK) / ((ours_BK + NOISE) * (theirs_BK + NOISE)).sqrt()
    weight_BK = torch.minimum(ours_BK, theirs_BK).clamp(min=0).sqrt() + 0.5
    weight_BK = weight_BK * (mask_BKQ.mean(-1) > 0.5)
    alike_BK, order_BK = alike_BK.sort(dim=1, descending=True)
    weight_BK = weight_BK.gather(1, order_BK)
    before_BK = weight_BK.cumsum(1) - weight_BK
    left_BK = COUNTED * weight_BK.sum(1, keepdim=True) - before_BK
    counted_BK = torch.minimum(left_BK.clamp(min=0), weight_BK)
    return (counted_BK * alike_BK).sum(1) / counted_BK.sum(1).clamp(min=1e-6)


def _same_shade(shade_B2N: Tensor, shown_BN: Tensor, mask_BKQ: Tensor) -> Tensor:
    """1 if a block has the same brightness in both, relative to the whole picture's; towards 0 if
    not, and for pictures of nearly one colour, whose brightness proves nothing."""
    copy_BN, copy_B1 = _standard(shade_B2N[:, 0], shown_BN)
    laid_BN, laid_B1 = _standard(shade_B2N[:, 1], shown_BN)
    apart_BK = (_blocks(copy_BN - laid_BN) * mask_BKQ).sum(-1) / mask_BKQ.sum(-1).clamp(min=1)
    seen_B1 = torch.minimum(copy_B1, laid_B1) - 1
    return torch.exp(-((apart_BK / SAME_SHADE) ** 2)) * seen_B1**2 / (seen_B1**2 + LEAST_SHADE**2)


def _blocks(values_BN: Tensor) -> Tensor:
    """(B, K, Q)."""
    across = SIDE // BLOCK
    cut = values_BN.view(-1, across, BLOCK, across, BLOCK)
    return cut.transpose(2, 3).reshape(len(values_BN), across**2, BLOCK**2)


def _detail(pictures_BSS: Tensor) -> Tensor:
    return _blurred(pictures_BSS, 1) - _blurred(pictures_BSS, 12)


def _blurred(pictures_BSS: Tensor, times: int) -> Tensor:
    """By 1 2 1 in both directions, `times` times."""
    blur_SS = _blur(times)
    return blur_SS @ pictures_BSS @ blur_SS.T


@lru_cache
def _blur(times: int) -> Tensor:
    wide = np.pad(np.eye(SIDE), [(1, 1), (0, 0)], "edge")
    once = (wide[:-2] + 2 * wide[1:-1] + wide[2:]) / 4
    return torch.from_numpy(np.linalg.matrix_power(once, times)).float()


def _places() -> Tensor:
    """(3, N): x, y and 1 of a copy's pixels."""
    line = (torch.arange(SIDE) + 0.5) * (2 / SIDE) - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x.flatten(), y.flatten(), torch.ones(SIDE**2)])


_PLACES_3N = _places()
