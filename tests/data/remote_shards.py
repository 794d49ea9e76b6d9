"""Shards behind a server of the test's own, and a cache whose size is watched."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from nfnets_xla.data.batches import TrainBatches
from nfnets_xla.data.cache import Cache
from nfnets_xla.data.order import Order
from nfnets_xla.data.remote import Patience, RemoteFolder
from nfnets_xla.data.shards import SIDECAR_SAMPLE, ShardIndex
from tests.data.remote_reader import QUICK
from tests.data.server import Server

PER_SHARD, STREAMS, WINDOW = 5, 2, 2
LARGE = 10**9  # bytes; enough for a cache that holds everything


def served(server: Server, cache: Cache | None = None, patience: Patience = QUICK) -> ShardIndex:
    return ShardIndex.load(RemoteFolder(server.url, cache, patience))


def path_of(index: ShardIndex) -> Path:
    return Path(str(index.folder))


def train(index: ShardIndex, epochs: float = 1.5) -> TrainBatches:
    order = Order(index.counts, 0, STREAMS, 2 * STREAMS, window_shards=WINDOW, epochs=epochs)
    return TrainBatches(
        index,
        order,
        num_classes=5,
        seed=0,
        image_size=16,
        repeats=2,
        flip=True,
        min_crop_area=0.2,
        randaugment_ops=2,
        randaugment_magnitude=None,
        mix=False,
        drop_path_rates=(0.5,),
        dropout_features=8,
        dropout_rate=0.25,
    )


def windows(index: ShardIndex) -> int:
    """Size in bytes of the smallest cache that `train` may have."""
    sizes = index.manifest.bytes_S + SIDECAR_SAMPLE * index.manifest.counts_S.astype(np.int64)
    return int(np.sort(sizes)[-2 * STREAMS * WINDOW :].sum())


@contextmanager
def watched(cache: Cache) -> Iterator[list[int]]:
    """The cache's size in bytes, measured repeatedly until the end."""
    seen, done = [0], threading.Event()

    def used() -> int:
        sizes: dict[int, int] = {}  # by inode, because a file may be renamed during the measurement
        for path in cache.folder.iterdir():
            with suppress(FileNotFoundError):
                sizes[path.stat().st_ino] = path.stat().st_size
        return sum(sizes.values())

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(used())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("waited in vain")
