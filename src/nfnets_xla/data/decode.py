"""Image bytes to RGB pixels: exact, bounded, and the same for every file that holds the picture.

JPEGs are decoded by simplejpeg, a thin layer over libjpeg-turbo: 1.4 times as fast as Pillow, which
uses the same library (benchmarks/loader.py), with the same pixels bit for bit. Everything else, and
whatever simplejpeg refuses, goes to Pillow, which alone decides whether a file is intact.
"""

import re
from io import BytesIO

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

Pixels = NDArray[np.uint8]

# The formats of image data sets. Others are not tried: some of Pillow's readers start programs (EPS
# runs Ghostscript), and nothing that this library reads may run code.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM")

# 256 MiB of RGB; Pillow calls more a decompression bomb. Larger than any picture of ImageNet.
MAX_PIXELS = 2**28 // 3

# Most scans of a progressive JPEG; each passes over all pixels. Encoders write about 10.
MAX_SCANS = 200
START_OF_IMAGE = b"\xff\xd8"
START_OF_SCAN = re.compile(rb"\xff\xda")  # finds them in a third of the time of bytes.count


def decode(data: bytes) -> Pixels:
    """The first frame, (height, width, 3). Raises ValueError for anything but an intact image.

    Transparent pixels show white. An orientation in the metadata is ignored, as DeepMind's decoder
    does. A JPEG is always decoded at full size: a fraction of it gives other pixels, for a gain of
    1.3 times (docs/data.md).
    """
    try:
        if data.startswith(START_OF_IMAGE):
            check_scans(data)
            pixels = _by_simplejpeg(data)
            if pixels is not None:
                return pixels
        return _by_pillow(data)
    except MemoryError:  # not the image's fault: it may decode another time
        raise
    except Exception as error:  # on hostile bytes Pillow raises nearly anything
        what = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{len(data)} bytes do not decode as an image: {what}") from error


def check_scans(data: bytes) -> None:
    """Raises ValueError for a JPEG with too many scans."""
    # Compressed pixels never contain the marker; a thumbnail's scans are counted, too.
    scans = len(START_OF_SCAN.findall(data))
    if scans > MAX_SCANS:
        raise ValueError(f"{scans} scans are more than {MAX_SCANS}")


def _by_simplejpeg(data: bytes) -> Pixels | None:
    """None if Pillow must decide: other colour spaces, too many pixels, faults of any kind."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if int(height) * int(width) > MAX_PIXELS or colours not in ("YCbCr", "RGB", "Gray"):
            return None
        return simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return None


def _by_pillow(data: bytes) -> Pixels:
    try:
        opened = Image.open(BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:  # its message names an object in memory
        raise ValueError(f"they are none of {', '.join(FORMATS)}") from error
    with opened as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width} x {height} pixels are more than {MAX_PIXELS}")
        image.load()
        return np.array(to_rgb(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """16 bits become 8, transparency becomes white; two rare PNGs differ (docs/data.md)."""
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
        grey = np.asarray(image)
        shown = (grey >> 8).astype(np.uint8)
        if (see_through := image.info.get("transparency")) is not None:
            shown[grey == see_through] = 255
        return Image.fromarray(shown).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        picture = image.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return image.convert("RGB")
