"""Image bytes to RGB pixels: exact, bounded, and the same for every file that holds the picture."""

from io import BytesIO

import numpy as np
from PIL import Image

# What image data sets consist of. Others are not tried: some of Pillow's readers start programs
# (EPS runs Ghostscript), and nothing that this library reads can run code.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM")

# 256 MiB of RGB; Pillow calls more a decompression bomb. Larger than any picture of ImageNet.
MAX_PIXELS = 2**28 // 3


def decode(data: bytes) -> Image.Image:
    """The first frame as an RGB image. Raises ValueError for anything that is not a whole picture.

    Transparent pixels show white. An orientation in the metadata is ignored, as DeepMind's decoder
    does. The JPEG is always decoded at full size: decoding at a fraction of it (`draft`) would be
    faster and would give other pixels.
    """
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width} x {height} pixels are more than {MAX_PIXELS}")
            image.load()
            return _to_rgb(image)
    except Exception as error:  # on hostile bytes Pillow raises nearly anything
        what = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{len(data)} bytes do not decode as an image: {what}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        picture = image.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return image.convert("RGB")
