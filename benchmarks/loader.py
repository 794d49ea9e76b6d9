"""Training batches from shards beside webdataset's own pipeline: python benchmarks/loader.py

Both read the same shards, decode, crop at random, flip and stack 224 px views, in one process and
on one thread. Ours also draws keyed masks, verifies a checksum per image, and fixes the order.
Prints the median of several rounds, taken in turns, and the ratio of their speeds.
"""

import io
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2
from webdataset.compat import WebDataset

from nfnets_xla.data.index import build_index
from nfnets_xla.data.loader import TrainBatches
from nfnets_xla.data.order import Order
from nfnets_xla.data.pack import pack_samples
from nfnets_xla.data.shards import ShardIndex

IMAGES, BATCH, SIZE, ROUNDS = 512, 64, 224, 5


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves shards open
    with tempfile.TemporaryDirectory() as folder:
        index = make_shards(Path(folder))
        print(f"{IMAGES} JPEGs of 500 x 375 to {SIZE} px, batch {BATCH}, median of {ROUNDS} rounds")
        speeds: dict[str, list[float]] = {"ours": [], "webdataset": []}
        for number in range(ROUNDS):
            speeds["ours"].append(ours(index, number))
            speeds["webdataset"].append(webdatasets(index))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    for name, speed in medians.items():
        print(f"{name:11} {speed:7.1f} images/s")
    print(f"ours / webdataset: {medians['ours'] / medians['webdataset']:.2f}")


def make_shards(folder: Path) -> ShardIndex:
    rng = np.random.default_rng(0)

    def samples() -> Iterator[tuple[str, bytes, str, int]]:
        for number in range(IMAGES):
            coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            file = io.BytesIO()
            coarse.resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
            yield f"{number:05d}", file.getvalue(), "jpg", number % 10

    pack_samples(samples(), folder, samples_per_shard=128)
    return build_index(folder)


def ours(index: ShardIndex, seed: int) -> float:
    order = Order(index.counts, seed, 8, BATCH, 2, 1.0)
    dataset = TrainBatches(
        index,
        order,
        num_classes=10,
        seed=seed,
        image_size=SIZE,
        repeats=1,
        flip=True,
        min_crop_area=0.08,
        randaugment_ops=4,
        randaugment_magnitude=None,
        mix=False,
        drop_path_rates=[0.1] * 12,
        dropout_features=3072,
        dropout_rate=0.2,
    )
    start = time.perf_counter()
    for step in range(order.num_steps):
        dataset[step]
    return IMAGES / (time.perf_counter() - start)


def webdatasets(index: ShardIndex) -> float:
    transform = v2.Compose([v2.RandomResizedCrop(SIZE, interpolation=3), v2.RandomHorizontalFlip()])
    urls = [str(index.folder / name) for name in map(index.name, range(index.num_shards))]
    dataset = (
        WebDataset(urls, shardshuffle=len(urls))
        .shuffle(256)
        .decode("pilrgb")
        .to_tuple("jpg", "cls")
        .map_tuple(lambda image: np.asarray(transform(image)), int)
        .batched(BATCH)
    )
    start = time.perf_counter()
    shown = sum(len(labels) for _, labels in iter(dataset))  # type: ignore[call-overload]
    return shown / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
