"""The report of `shards dedup`: a histogram of distances, and the pairs nearest to the threshold.

Pairs are drawn in order of their distance, equally many on either side of the threshold; each shows
the sample and its match, in colour.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from nfnets_xla.data.decode import decode
from nfnets_xla.data.dedup import FARTHEST, Matches
from nfnets_xla.data.shards import ShardIndex
from nfnets_xla.sheet import draw_sheet

PAIRS, COLUMNS = 24, 8  # pairs at most, two tiles each; tiles of a row
SIDE, FRAME = 160, 5  # pixels of a tile and of the frame around a pair
BINS, HEIGHT, MARGIN = 70, 220, 44  # of the histogram
EXCLUDED, KEPT = "#b03a2e", "#7f8c8d"


def draw_report(matches: Matches, most_distance: float, path: Path) -> None:
    chosen = at_border(matches.distance_M, most_distance)
    tiles = [tile for match in chosen for tile in _pair(matches, int(match), most_distance)]
    width = COLUMNS * (SIDE + 4)
    parts = [histogram(matches.distance_M, most_distance, width)]
    if tiles:
        parts.append(draw_sheet(tiles, COLUMNS))
    sheet = Image.new("RGB", (width, sum(part.height for part in parts)), "white")
    for number, part in enumerate(parts):
        sheet.paste(part, (0, sum(other.height for other in parts[:number])))
    sheet.save(path, "PNG")


def at_border(distance_M: np.ndarray, most_distance: float) -> np.ndarray:
    """The pairs nearest to the threshold, half of them on either side if there are as many; in
    order of their distance."""
    order = np.argsort(distance_M, kind="stable")
    split = int(np.searchsorted(distance_M[order], most_distance, side="right"))
    below = max(PAIRS // 2, PAIRS - (len(order) - split))
    first = max(split - below, 0)
    return order[first : first + PAIRS]


def histogram(distance_M: np.ndarray, most_distance: float, width: int) -> Image.Image:
    """Logarithmic, so that a few pairs near the threshold show beside thousands of copies."""
    count, edges = np.histogram(distance_M, BINS, (0, FARTHEST))
    image = Image.new("RGB", (width, HEIGHT), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    floor, left, right = HEIGHT - MARGIN, MARGIN, width - MARGIN
    scale = (floor - MARGIN) / np.log10(max(int(count.max(initial=0)), 9) + 1)

    def across(distance: float) -> float:
        return left + distance / FARTHEST * (right - left)

    for number, start, end in zip(count, edges[:-1], edges[1:], strict=True):
        top = floor - scale * np.log10(number + 1)
        if number:
            colour = EXCLUDED if end <= most_distance + 1e-9 else KEPT
            pen.rectangle((across(start) + 1, top, across(end) - 1, floor), colour)
    pen.line((left, floor, right, floor), "black")
    for tick in np.arange(0, FARTHEST + 0.01, 0.1):
        pen.text((across(tick), floor + 4), f"{tick:.1f}", "black", font, "ma")
    for power in range(int(np.log10(max(int(count.max(initial=0)), 9))) + 1):
        pen.text(
            (left - 4, floor - scale * np.log10(10**power + 1)),
            f"{10**power:,}",
            "black",
            font,
            "rm",
        )
    pen.line((across(most_distance), MARGIN - 10, across(most_distance), floor), "black", 2)
    near = int((distance_M <= most_distance).sum())
    title = (
        f"{len(distance_M):,} pairs whose hashes are near, by distance; {near:,} of them within "
        f"{most_distance:g}, which is where the line is. Below, the pairs next to it."
    )
    pen.text((left, 8), title, "black", font)
    return image


def _pair(
    matches: Matches, match: int, most_distance: float
) -> Sequence[tuple[np.ndarray, str, str]]:
    """Two tiles in one frame."""
    distance = float(matches.distance_M[match])
    (shard, row), (other, at) = matches.sample_M2[match], matches.reference_M2[match]
    verdict, colour = ("excluded", EXCLUDED) if distance <= most_distance else ("stays", KEPT)
    sample, reference = (matches.train[shard], int(row)), (matches.against[other], int(at))
    captions = f"{distance:.3f}  {verdict}", f"hashes: {matches.bits_M[match]} bits"
    return [
        (_tile(*of, colour, is_left), caption, of[0].sample_id(0, of[1]))
        for of, caption, is_left in zip((sample, reference), captions, (True, False), strict=True)
    ]


def _tile(shard: ShardIndex, row: int, colour: str, is_left: bool) -> np.ndarray:
    """The whole picture in a square, with three sides of a frame."""
    inside = SIDE - 2 * FRAME
    picture = Image.fromarray(decode(shard.read(0, row)))
    square = Image.new("RGB", (SIDE, SIDE), colour)
    left = FRAME if is_left else 0
    square.paste("white", (left, FRAME, left + SIDE - FRAME, SIDE - FRAME))
    square.paste(ImageOps.pad(picture, (inside, inside), color="white"), (FRAME, FRAME))
    return np.asarray(square)
