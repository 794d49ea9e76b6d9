"""A contact sheet: pictures in rows, each with two lines below it."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SMALLEST_TILE = 128  # pixels: smaller pictures are enlarged by a whole factor
CAPTION = 30  # pixels, two lines


def draw_sheet(tiles: Sequence[tuple[np.ndarray, str, str]], columns: int) -> Image.Image:
    """Tiles are (pixels, first line, second line); pixels (side, side, 3) uint8, all one size."""
    side = len(tiles[0][0])
    side *= -(-SMALLEST_TILE // side)
    lines = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (side + 4), lines * (side + CAPTION + 4)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for number, (pixels, label, sample) in enumerate(tiles):
        left, top = number % columns * (side + 4), number // columns * (side + CAPTION + 4)
        tile = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(tile, (left, top))
        for line, text in enumerate((label, sample)):
            while font.getlength(text) > side:
                text = "~" + text[2:]  # cuts the beginning, since an id's end tells more
            pen.text((left, top + side + 2 + 14 * line), text, "black", font)
    return sheet
