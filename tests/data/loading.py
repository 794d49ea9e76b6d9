"""Shards of a few small images, and the batches that the loader's tests make of them."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nfnets_xla.data.batches import Batch, EvalBatches, TrainBatches
from nfnets_xla.data.index import build_index
from nfnets_xla.data.order import Order
from nfnets_xla.data.pack import pack_samples
from nfnets_xla.data.shards import ShardIndex
from tests.data.images import encoded

SAMPLES, CLASSES = 29, 5
STREAMS, UNIQUE, REPEATS = 2, 6, 3
RATES = (0.0, 0.5, 0.9)
OPTIONS: dict[str, Any] = {
    "num_classes": CLASSES,
    "image_size": 16,
    "repeats": REPEATS,
    "flip": True,
    "min_crop_area": 0.2,
    "randaugment_ops": 2,
    "randaugment_magnitude": None,
    "mix": False,
    "drop_path_rates": RATES,
    "dropout_features": 11,
    "dropout_rate": 0.25,
}


def png(pixels: np.ndarray) -> bytes:
    return encoded(Image.fromarray(pixels), "PNG")


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (20, 24, 3), np.uint8)


def pack(folder: Path, images: list[bytes]) -> ShardIndex:
    folder.mkdir(parents=True, exist_ok=True)
    samples = ((f"{n:05}", data, "png", n % CLASSES) for n, data in enumerate(images))
    pack_samples(samples, folder, samples_per_shard=8)
    build_index(folder)
    return ShardIndex.load(folder)


def train(index: ShardIndex, *, epochs: float = 1.5, seed: int = 0, **changes: Any) -> TrainBatches:
    order = Order(index.counts, seed, STREAMS, UNIQUE, window_shards=2, epochs=epochs)
    return TrainBatches(index, order, seed=seed, **(OPTIONS | changes))


def assert_same(one: Batch, other: Batch) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert type(value) is type(other[name])
        if name not in ("step", "missed"):
            assert value.dtype == other[name].dtype
        assert np.array_equal(value, other[name]), name


def evaluation(index: ShardIndex) -> EvalBatches:
    return EvalBatches(index, num_classes=CLASSES, batch_size=4, image_size=16, margin=0)
