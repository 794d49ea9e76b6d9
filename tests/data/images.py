"""Small real image files for tests."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from nfnets_xla.data.index import build_index
from nfnets_xla.data.pack import pack_samples
from nfnets_xla.data.shards import ShardIndex


def noise_png(number: int, size: int = 12) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (size, size + 3, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels), "PNG")


def encoded(image: Image.Image, format: str) -> bytes:
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def samples(count: int, classes: int = 5) -> Iterator[tuple[str, bytes, str, int]]:
    for number in range(count):
        yield f"{number:05d}", noise_png(number), "png", number % classes


def packed(folder: Path, count: int, per_shard: int, classes: int = 5) -> ShardIndex:
    pack_samples(samples(count, classes), folder, samples_per_shard=per_shard)
    return build_index(folder)
