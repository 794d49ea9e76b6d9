"""Pictures for dedup.py, and the transformations that make copies of them.

The photographs come from packages (nothing is downloaded): Debian's gcompris-qt-data,
lomiri-wallpapers-16.04, mate-backgrounds, plasma-workspace-wallpapers and opencv-doc, installed or
unpacked below one folder, and scikit-learn's two. Large ones are cut into up to 9 tiles that do not
overlap; tiles without contrast (clear sky) are left out. There is one fractal of each class.
"""

import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps
from sklearn.datasets import load_sample_images

from nfnets_xla.data.fractals import fractal

LONGEST = 320  # pixels of a picture's longer side
LEAST_TILE = 360  # minimum number of pixels of a photograph's shorter side per tile
LEAST_DEVIATION = 15  # minimum standard deviation of a tile, in grey levels
BUNDLES = ("explore_monuments", "erase", "explore_world_animals", "explore_farm_animals")
WALLPAPERS = ("Autumn", "BytheWater", "ColorfulCups", "EveningGlow", "FallenLeaf", "Path")
EXAMPLES = [
    "aero1.jpg",
    "aloeL.jpg",
    "apple.jpg",
    "baboon.jpg",
    "board.jpg",
    "building.jpg",
    "butterfly.jpg",
    "fruits.jpg",
    "home.jpg",
    "leuvenA.jpg",
    "messi5.jpg",
    "orange.jpg",
    "squirrel_cls.jpg",
]

Rng = np.random.Generator
Picture = tuple[str, Image.Image]  # name of the photograph or class it shows, and the picture


def photographs(root: Path) -> Iterator[tuple[str, Picture]]:
    """Pairs of a package's name and a photograph."""
    share = root / "usr/share"
    for bundle in BUNDLES:
        data = (share / f"gcompris-qt/rcc/{bundle}.rcc").read_bytes()
        # A Qt resource file contains its WebP files unchanged.
        for number, match in enumerate(re.finditer(rb"RIFF(....)WEBP", data, re.DOTALL)):
            size = int.from_bytes(match[1], "little") + 8
            image = Image.open(io.BytesIO(data[match.start() : match.start() + size]))
            if min(image.size) >= 256 and image.mode == "RGB":
                yield "gcompris-qt-data", (f"{bundle} {number}", image)
    folders = {
        "lomiri-wallpapers-16.04": sorted((share / "backgrounds").glob("*_by_*.jpg")),
        "mate-backgrounds": sorted((share / "backgrounds/mate/nature").glob("*.jpg")),
        "plasma-workspace-wallpapers": [
            max((share / f"wallpapers/{name}/contents/images").iterdir()) for name in WALLPAPERS
        ],
        "opencv-doc": [share / f"doc/opencv-doc/examples/data/{name}" for name in EXAMPLES],
    }
    for package, paths in folders.items():
        for path in paths:
            yield package, (str(path), Image.open(path))
    for number, pixels in enumerate(load_sample_images().images):
        yield "scikit-learn", (f"sample {number}", Image.fromarray(pixels))


def tiles(photograph: Picture) -> Iterator[Picture]:
    name, image = photograph
    image = image.convert("RGB")
    across = min(max(min(image.size) // LEAST_TILE, 1), 3)
    image.thumbnail((LONGEST * across, LONGEST * across))
    width, height = image.width / across, image.height / across
    for row in range(across):
        for column in range(across):
            left, top = round(column * width), round(row * height)
            tile = image.crop((left, top, left + round(width), top + round(height)))
            if np.asarray(tile.convert("L")).std() >= LEAST_DEVIATION:
                yield name, tile


def fractals(first: int, number: int) -> Iterator[Picture]:
    for class_index in range(first, first + number):
        yield f"class {class_index}", Image.fromarray(fractal(0, class_index, 0, 256))


# ---- copies -----------------------------------------------------------------------------------


def resized(image: Image.Image, rng: Rng) -> Image.Image:
    scale = rng.choice([0.4, 0.6, 1.5])
    return image.resize((round(image.width * scale), round(image.height * scale)))


def stretched(image: Image.Image, rng: Rng) -> Image.Image:
    return image.resize((image.width, round(image.height * rng.uniform(0.75, 0.95))))


def cropped(area: float) -> Callable[[Image.Image, Rng], Image.Image]:
    def crop(image: Image.Image, rng: Rng) -> Image.Image:
        width, height = round(image.width * area**0.5), round(image.height * area**0.5)
        left = int(rng.integers(image.width - width + 1))
        top = int(rng.integers(image.height - height + 1))
        return image.crop((left, top, left + width, top + height))

    return crop


def turned(image: Image.Image, rng: Rng) -> Image.Image:
    """Rotated by 2 to 5 degrees; the corners are filled with black or white."""
    degrees = rng.uniform(2, 5) * rng.choice([-1, 1])
    fill = (int(rng.choice([0, 255])),) * 3
    return image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=fill)


def turned_inside(image: Image.Image, rng: Rng) -> Image.Image:
    """Rotated by 2 to 5 degrees, and cropped so that no filled corners remain."""
    degrees = rng.uniform(2, 5) * rng.choice([-1, 1])
    image = image.rotate(degrees, Image.Resampling.BICUBIC)
    side = 1 - 1.35 * np.sin(np.radians(abs(degrees)))
    return ImageOps.crop(
        image, (round(image.width * (1 - side) / 2), round(image.height * (1 - side) / 2))
    )


def framed(image: Image.Image, rng: Rng) -> Image.Image:
    return ImageOps.expand(image, round(image.width * rng.uniform(0.04, 0.12)), _colour(rng))


def barred(image: Image.Image, rng: Rng) -> Image.Image:
    share = rng.uniform(0.06, 0.18)
    bars = (
        (0, round(image.height * share)) if rng.random() < 0.6 else (round(image.width * share), 0)
    )
    return ImageOps.expand(image, bars, _colour(rng))


def _colour(rng: Rng) -> tuple[int, int, int]:
    is_plain = rng.random() < 0.7  # black or white, not a colour
    red, green, blue = [int(rng.choice([0, 255]))] * 3 if is_plain else rng.integers(0, 256, 3)
    return int(red), int(green), int(blue)


def recoloured(image: Image.Image, rng: Rng) -> Image.Image:
    pixels = np.asarray(image) * rng.uniform(0.75, 1.3, 3)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return ImageEnhance.Color(image).enhance(rng.uniform(0.0, 1.8))


def recontrasted(image: Image.Image, rng: Rng) -> Image.Image:
    pixels = (np.asarray(image) / 255) ** rng.uniform(0.6, 1.6)
    pixels = (pixels - 0.5) * rng.uniform(0.6, 1.4) + 0.5 + rng.uniform(-0.12, 0.12)
    return Image.fromarray((pixels * 255).clip(0, 255).astype(np.uint8))


def watermarked(image: Image.Image, rng: Rng) -> Image.Image:
    layer = Image.new("RGBA", image.size)
    pen, font = ImageDraw.Draw(layer), ImageFont.load_default(image.height / 9)
    left = int(rng.integers(image.width // 4)) - image.width // 4
    for top in range(image.height // 12, image.height, image.height // 3):
        for across in range(left, image.width, round(image.width * 0.55)):
            pen.text((across, top), "© sample", (255, 255, 255, 110), font)
    return Image.alpha_composite(image.convert("RGBA"), layer.rotate(20)).convert("RGB")


def captioned(image: Image.Image, rng: Rng) -> Image.Image:
    del rng
    image = image.copy()
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(image.height / 8)
    stroke = max(image.height // 100, 1)
    for place, text in ((0.1, "WHEN THE TEST"), (0.9, "FINALLY PASSES")):
        middle = (image.width / 2, image.height * place)
        pen.text(middle, text, "white", font, "mm", stroke_width=stroke, stroke_fill="black")
    return image


def mirrored(image: Image.Image, rng: Rng) -> Image.Image:
    del rng
    return ImageOps.mirror(image)


def several(image: Image.Image, rng: Rng) -> Image.Image:
    image = recontrasted(cropped(0.75)(image, rng), rng)
    return captioned(mirrored(image, rng) if rng.random() < 0.5 else image, rng)


def unchanged(image: Image.Image, rng: Rng) -> Image.Image:
    del rng
    return image


Transform = Callable[[Image.Image, Rng], Image.Image]
# Each transformation with the format it is saved in: a JPEG of this quality (None: a random one
# from 30 to 95), or another format.
COPIES: dict[str, tuple[Transform, int | str | None]] = {
    "resized to 0.4, 0.6 or 1.5": (resized, None),
    "stretched by up to a quarter": (stretched, None),
    "JPEG of quality 30": (unchanged, 30),
    "JPEG of quality 60": (unchanged, 60),
    "cropped to 80 % of its area": (cropped(0.8), None),
    "cropped to 70 % of its area": (cropped(0.7), None),
    "cropped to 49 % (70 % of each side)": (cropped(0.49), None),
    "mirrored": (mirrored, None),
    "mirrored, cropped to 70 %": (lambda image, rng: cropped(0.7)(mirrored(image, rng), rng), None),
    "turned by 2 to 5 degrees": (turned, None),
    "turned, corners cut off": (turned_inside, None),
    "framed": (framed, None),
    "bars at two sides": (barred, None),
    "colours changed": (recoloured, None),
    "contrast, gamma, brightness": (recontrasted, None),
    "watermarked": (watermarked, None),
    "captioned": (captioned, None),
    "WebP of quality 40": (unchanged, "WEBP"),
    "GIF of 64 colours": (unchanged, "GIF"),
    "cropped, contrast, captioned, half mirrored": (several, 50),
}


def copy(image: Image.Image, name: str, rng: Rng) -> bytes:
    """The bytes of a file with the transformed image."""
    transform, saved = COPIES[name]
    image, file = transform(image, rng), io.BytesIO()
    if saved == "GIF":
        image.convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(file, "GIF")
    elif saved == "WEBP":
        image.save(file, "WEBP", quality=40)
    else:
        image.save(file, "JPEG", quality=saved or int(rng.integers(30, 96)))
    return file.getvalue()
