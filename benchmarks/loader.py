"""Training views beside webdataset's pipeline: python benchmarks/loader.py

Both read the same shards, decode, crop at random, flip and stack uint8 views, in one process and on
one thread. The peer is the usual pipeline: webdataset, Pillow, torchvision, timm's RandAugment.
Ours also draws keyed masks, verifies a checksum per image, and fixes the order. Speeds are per
second of processor time, because the machine may have other work, and are medians of several rounds
taken in turns. DeepMind's crops are smaller than torchvision's, which is part of the difference;
the row "resize: ours, their crops" excludes it.

Then the share of time that a training loop waits for data: in place of a step it sleeps 1.25 times
as long as the worker took for the batch.
"""

import io
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data.auto_augment import rand_augment_transform
from torchvision.transforms import v2
from webdataset.compat import WebDataset

from _turns import Report
from nfnets_xla.data.augment import _resized
from nfnets_xla.data.batches import TrainBatches
from nfnets_xla.data.decode import decode
from nfnets_xla.data.index import build_index
from nfnets_xla.data.loader import Batches
from nfnets_xla.data.order import Order
from nfnets_xla.data.pack import pack_samples
from nfnets_xla.data.randaugment import rand_augment
from nfnets_xla.data.shards import ShardIndex

IMAGES, BATCH, SIZE, ROUNDS = 512, 64, 224, 7
WAIT_BATCH = 256  # a worker hands over whole batches, in 5 ms whatever their size
OPERATIONS, MAGNITUDE = 4, 9
# timm's RandAugment with as many operations, always applied, at the same magnitude and with the
# same constants.
TIMMS = f"rand-m{MAGNITUDE}-n{OPERATIONS}-p1-inc1"
TIMMS_CONSTANTS = {"translate_const": 100, "img_mean": (128, 128, 128)}
LIBRARIES = ["numpy", "pillow", "simplejpeg", "torchvision", "webdataset"]


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves shards open
    report = Report("loader", "python benchmarks/loader.py")
    report.say(", ".join(f"{name} {version(name)}" for name in LIBRARIES))
    with tempfile.TemporaryDirectory() as folder:
        index = make_shards(Path(folder))
        size = index.manifest.bytes_S.sum() / IMAGES
        report.say(
            f"{IMAGES} JPEGs of 500 x 375, {size:.0f} bytes each, to {SIZE} px, batch {BATCH}, "
            f"{ROUNDS} rounds"
        )
        medians = measured(contestants(index))
        waited = [wait_share(index) for _ in range(5)]
    result = {"per core-second": medians, "ratios": ratios(medians), "waited for data": waited}
    report.say(json.dumps(result, indent=1))
    report.save()


def contestants(index: ShardIndex) -> dict[str, Callable[[], int]]:
    """Functions that each make some views and return their number."""
    files = [index.read(0, row) for row in range(64)]
    pixels = [decode(data) for data in files]
    views = [_resized(image, SIZE) for image in pixels]
    pictures = [Image.fromarray(view) for view in views]
    timms = rand_augment_transform(TIMMS, TIMMS_CONSTANTS)
    rng = np.random.Generator(np.random.Philox(0))
    crop = v2.RandomResizedCrop(SIZE, interpolation=3)

    def resized_by_us() -> None:
        for image in pixels:
            height, width = image.shape[:2]
            top, left, rows, columns = v2.RandomResizedCrop.make_params(
                crop, [Image.new("1", (width, height))]
            ).values()
            _resized(image[top : top + rows, left : left + columns], SIZE)

    def each(do: Callable[[Any], object], items: list[Any]) -> Callable[[], int]:
        return lambda: len([do(item) for item in items])

    return {
        "ours": lambda: ours(index),
        "webdataset": lambda: webdatasets(index),
        "ours, 4 views": lambda: ours(index, repeats=4),
        "ours, RandAugment": lambda: ours(index, magnitude=MAGNITUDE),
        "webdataset, RandAugment": lambda: webdatasets(index, timms),
        "decode: ours": each(decode, files),
        "decode: Pillow": each(lambda data: np.asarray(by_pillow(data)), files),
        "resize: ours, their crops": lambda: (resized_by_us(), len(pixels))[1],
        "resize: torchvision, Pillow": each(lambda p: np.asarray(crop(p)), pictures_of(pixels)),
        "RandAugment: ours": each(
            lambda v: rand_augment(v, rng, operations=OPERATIONS, magnitude=MAGNITUDE), views
        ),
        "RandAugment: timm": each(lambda picture: np.asarray(timms(picture)), pictures),
    }


def measured(shown_by: dict[str, Callable[[], int]]) -> dict[str, float]:
    """Views per core-second of each contestant: the median over rounds taken in turns."""
    speeds: dict[str, list[float]] = {name: [] for name in shown_by}
    for round_number in range(ROUNDS + 1):
        for name, show in shown_by.items():
            start = time.process_time()
            views = show()
            if round_number:  # the first round warms up
                speeds[name].append(views / (time.process_time() - start))
    return {name: round(statistics.median(values), 1) for name, values in speeds.items()}


def ratios(speed: dict[str, float]) -> dict[str, float]:
    pairs = {
        "images": ("ours", "webdataset"),
        "views with K=4": ("ours, 4 views", "webdataset"),
        "images with RandAugment": ("ours, RandAugment", "webdataset, RandAugment"),
        "decode": ("decode: ours", "decode: Pillow"),
        "resize": ("resize: ours, their crops", "resize: torchvision, Pillow"),
        "RandAugment": ("RandAugment: ours", "RandAugment: timm"),
    }
    return {name: round(speed[ours] / speed[theirs], 2) for name, (ours, theirs) in pairs.items()}


# ---- the shards -------------------------------------------------------------------------------


def make_shards(folder: Path) -> ShardIndex:
    """Shards of JPEGs of ImageNet's usual size, cropped from two photographs."""
    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    rng = np.random.default_rng(0)

    def samples() -> Iterator[tuple[str, bytes, str, int]]:
        for number in range(IMAGES):
            photo = photos[number % len(photos)]
            height = int(rng.integers(240, photo.height + 1))
            width = min(height * 4 // 3, photo.width)
            left = int(rng.integers(photo.width - width + 1))
            top = int(rng.integers(photo.height - height + 1))
            box = (left, top, left + width, top + height)
            file = io.BytesIO()
            photo.resize((500, 375), Image.Resampling.BICUBIC, box).save(file, "JPEG", quality=95)
            yield f"{number:05d}", file.getvalue(), "jpg", number % 10

    pack_samples(samples(), folder, samples_per_shard=128)
    return build_index(folder)


# ---- the two pipelines ------------------------------------------------------------------------


def dataset_of(
    index: ShardIndex,
    repeats: int,
    magnitude: int | None,
    batch: int = BATCH,
    kind: type[TrainBatches] = TrainBatches,
) -> TrainBatches:
    order = Order(index.counts, 0, 8, batch // repeats, 2, 3.0)
    return kind(
        index,
        order,
        num_classes=10,
        seed=0,
        image_size=SIZE,
        repeats=repeats,
        flip=True,
        min_crop_area=0.08,
        randaugment_ops=OPERATIONS,
        randaugment_magnitude=magnitude,
        mix=False,
        drop_path_rates=[0.1] * 12,
        dropout_features=3072,
        dropout_rate=0.2,
    )


def ours(index: ShardIndex, repeats: int = 1, magnitude: int | None = None) -> int:
    dataset = dataset_of(index, repeats, magnitude)
    steps = IMAGES // BATCH
    return sum(len(dataset[step]["images_BHWC"]) for step in range(steps))


def webdatasets(index: ShardIndex, augment: Callable[[Any], Any] | None = None) -> int:
    steps: list[Any] = [v2.RandomResizedCrop(SIZE, interpolation=3), v2.RandomHorizontalFlip()]
    transform = v2.Compose(steps)

    def view(image: Image.Image) -> np.ndarray:
        shown = transform(image)
        return np.asarray(shown if augment is None else augment(shown))

    dataset = (
        WebDataset(
            [f"{index.folder}/{index.name(shard)}" for shard in range(index.num_shards)],
            shardshuffle=100,
        )
        .shuffle(256)
        .decode("pilrgb")
        .to_tuple("jpg", "cls")
        .map_tuple(view, int)
        .batched(BATCH)
    )
    return sum(len(labels) for _, labels in iter(dataset))  # type: ignore[call-overload]


def by_pillow(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


def pictures_of(pixels: list[np.ndarray]) -> list[Image.Image]:
    return [Image.fromarray(image) for image in pixels]


# ---- waiting for data -------------------------------------------------------------------------


class Timed(TrainBatches):
    def __getitem__(self, step: int) -> dict[str, Any]:
        start = time.perf_counter()
        return super().__getitem__(step) | {"made in": time.perf_counter() - start}


def wait_share(index: ShardIndex, batches: int = 16) -> dict[str, float]:
    """Share of time that a loop waits, after its first batch; see the docstring of this file."""
    dataset = dataset_of(index, repeats=4, magnitude=None, batch=WAIT_BATCH, kind=Timed)
    waited, slept, made = [], [], []
    asked = time.perf_counter()
    for batch in Batches(dataset, start_step=0, stop_step=batches, workers=1):
        waited.append(time.perf_counter() - asked)
        made.append(batch["made in"])
        slept.append(1.25 * made[-1])
        done = time.perf_counter() + slept[-1]
        del batch  # as after a copy to the device
        time.sleep(max(0.0, done - time.perf_counter()))
        asked = time.perf_counter()
    share = sum(waited[1:]) / (sum(waited[1:]) + sum(slept[1:]))
    return {"batch ready in": round(statistics.median(made), 4), "share": round(share, 4)}


if __name__ == "__main__":
    main()
