"""One of several hosts, in its own process; it writes its part of every global batch.

python -m tests.data.host SHARDS OUT HOST HOSTS FIRST_STEP STEP_TO_WAIT_AT
"""

import hashlib
import json
import signal
import sys
from pathlib import Path

import torch

from nfnets_xla.data.batches import Batch, TrainBatches
from nfnets_xla.data.order import Order
from nfnets_xla.data.shards import ShardIndex

STREAMS, UNIQUE, REPEATS, EPOCHS, SEED = 4, 12, 2, 2.3, 5


def batches(index: ShardIndex, host: int = 0, hosts: int = 1) -> TrainBatches:
    order = Order(index.counts, SEED, STREAMS, UNIQUE, window_shards=2, epochs=EPOCHS)
    return TrainBatches(
        index,
        order,
        num_classes=5,
        seed=SEED,
        image_size=16,
        repeats=REPEATS,
        flip=True,
        min_crop_area=0.2,
        randaugment_ops=2,
        randaugment_magnitude=9,
        mix=True,
        drop_path_rates=[0.2, 0.4],
        dropout_features=9,
        dropout_rate=0.25,
        streams=order.streams_of(host, hosts),
    )


def rows(dataset: TrainBatches, batch: Batch) -> list[list]:
    """For each row its sample, epoch and weight, and a digest of all that the device would get."""
    tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    found = []
    for row, weight in enumerate(batch["weight_B"].tolist()):
        data = b"".join(tensor[row].numpy().tobytes() for tensor in tensors)
        unique = row // REPEATS
        name = dataset.samples.name(int(batch["sample_U"][unique]))
        digest = hashlib.sha256(data).hexdigest()
        found.append([name, int(batch["epoch_U"][unique]), weight, digest])
    return found


def main() -> None:
    shards, out = Path(sys.argv[1]), Path(sys.argv[2])
    host, hosts, first, wait_at = map(int, sys.argv[3:])
    dataset = batches(ShardIndex.load(shards), host, hosts)
    for step in range(first, len(dataset)):
        if step == wait_at:
            signal.pause()
        path = out / f"{step:04d}-{host}-of-{hosts}.json"
        path.with_suffix(".part").write_text(json.dumps(rows(dataset, dataset[step])))
        path.with_suffix(".part").replace(path)


if __name__ == "__main__":
    main()
