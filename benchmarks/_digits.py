"""scikit-learn's handwritten digits as samples to pack: real images that come with a package."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from nfnets_xla.data.pack import Sample, encode_image

TRAIN_DIGITS = 480  # of 1797: so few that pre-training can make a difference


def digit_samples(size: int) -> Iterator[Sample]:
    """All digits in a fixed random order, enlarged from 8 to `size` pixels."""
    bunch: Any = load_digits()
    for number in np.random.default_rng(0).permutation(len(bunch.target)):
        pixels = (bunch.images[number] * 255 / 16).round().astype(np.uint8)
        image = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
        encoded = encode_image(np.asarray(image.convert("RGB")), "jpg", 95)
        yield f"{number:05d}", encoded, "jpg", int(bunch.target[number])
