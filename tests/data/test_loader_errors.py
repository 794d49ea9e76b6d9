"""Faults while batches are made are named, refused or counted; workers start and end."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from nfnets_xla.data.batches import TrainBatches
from nfnets_xla.data.index import build_index
from nfnets_xla.data.loader import Batches
from nfnets_xla.data.order import Order
from nfnets_xla.data.pack import pack_samples
from nfnets_xla.data.shards import ShardIndex
from tests.data.images import packed
from tests.data.loading import (
    OPTIONS,
    SAMPLES,
    STREAMS,
    UNIQUE,
    evaluation,
    pack,
    picture,
    png,
    train,
)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_does_not_decode_is_grey_weighs_nothing_and_is_told(
    pictures: ShardIndex, tmp_path: Path, workers: int
) -> None:
    images = [png(picture(n)) for n in range(SAMPLES)]
    images[9] = images[9][:100]
    faulty = pack(tmp_path, images)
    for make in (train, evaluation):
        good, dataset = make(pictures), make(faulty)
        missed = []
        for batch in Batches(dataset, start_step=0, stop_step=len(dataset), workers=workers):
            whole = good[batch["step"]]
            missed += batch["missed"]
            torn_U = batch["sample_U"] == 9
            torn_B = torn_U.repeat(len(batch["labels_B"]) // len(torn_U))
            assert (batch["weight_B"][torn_B] == 0).all()
            assert (batch["images_BHWC"][torn_B] == 128).all()
            for name in ("images_BHWC", "weight_B"):
                assert torch.equal(batch[name][~torn_B], whole[name][~torn_B])
            assert torch.equal(batch["labels_B"], whole["labels_B"])
        name, offset = faulty.sample_id(1, 1), faulty.offset(1, 1)
        for sample in missed:
            assert sample["id"] == name
            assert (sample["shard"], sample["offset"]) == ("shard-000001.tar", offset)
            assert "100 bytes do not decode as an image" in sample["reason"]
        epochs = [sample["epoch"] for sample in missed]
        assert epochs in ([0], [0, 1])  # the second epoch shows half of the samples


def test_a_shard_that_has_changed_stops_the_run(tmp_path: Path) -> None:
    index = pack(tmp_path, [png(picture(n)) for n in range(3)])
    data = bytearray((tmp_path / "shard-000000.tar").read_bytes())
    data[index.offset(0, 0) + 50] ^= 1
    (tmp_path / "shard-000000.tar").write_bytes(data)
    with pytest.raises(ValueError, match=r"no longer matches its shards.*wrong checksum"):
        evaluation(index)[0]


def test_what_the_machine_refuses_a_worker_is_no_traceback(tmp_path: Path) -> None:
    index = pack(tmp_path, [png(picture(n)) for n in range(3)])
    sidecar = tmp_path / "shard-000000.tar.idx.npz"
    sidecar.unlink()
    sidecar.mkdir()
    with pytest.raises(IsADirectoryError) as error:
        next(iter(Batches(evaluation(index), start_step=0, stop_step=1, workers=1)))
    assert (error.value.strerror, error.value.filename) == ("Is a directory", str(sidecar))


def test_several_labels_have_one_shape_and_the_heaviest_first(tmp_path: Path) -> None:
    labels: list[Any] = [3, {1: 1.0, 4: 3.0}, {0: 0.5, 1: 0.25, 2: 0.25}, {2: 1.0, 3: 1.0}]
    samples = ((f"{n}", png(picture(n)), "png", label) for n, label in enumerate(labels))
    pack_samples(samples, tmp_path, samples_per_shard=2)
    index = build_index(tmp_path)
    assert index.max_labels == 3
    for batch in (evaluation(index)[0], train(index, epochs=2)[0]):
        views = len(batch["labels_B"]) // len(batch["sample_U"])
        expected = {
            0: (3, [3, 3, 3], [1, 0, 0]),
            1: (4, [4, 1, 4], [3, 1, 0]),
            2: (0, [0, 1, 2], [0.5, 0.25, 0.25]),
            3: (2, [2, 3, 2], [1, 1, 0]),
        }
        for place, sample in enumerate(batch["sample_U"].repeat(views).tolist()):
            first, row, weights = expected[sample]
            assert batch["labels_B"][place] == first
            assert batch["labels_BL"][place].tolist() == row
            assert batch["label_weights_BL"][place].tolist() == weights
    assert "labels_BL" not in evaluation(packed(tmp_path / "one", 4, 2))[0]


@pytest.mark.parametrize("hosts", [1, 2])
def test_hosts_make_parts_of_the_batch(pictures: ShardIndex, hosts: int) -> None:
    whole = train(pictures)
    order = whole.order
    parts = [train(pictures, streams=order.streams_of(host, hosts)) for host in range(hosts)]
    for step in range(len(whole)):
        batches = [part[step] for part in parts]
        for name, value in whole[step].items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, torch.cat([batch[name] for batch in batches]))
    for host, of in ((0, 3), (2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="2 streams must divide among them"):
            order.streams_of(host, of)


def test_a_label_outside_the_classes_is_named(pictures: ShardIndex) -> None:
    dataset = train(pictures, num_classes=4)
    with pytest.raises(ValueError, match=r"sample .* has label 4; it must be in \[0, 4\): raise"):
        [dataset[step] for step in range(len(dataset))]


def test_an_order_of_other_shards_is_refused(pictures: ShardIndex) -> None:
    order = Order(pictures.counts + 1, 0, STREAMS, UNIQUE, window_shards=2, epochs=1)
    with pytest.raises(ValueError, match="the order is of 33 samples and the index of 29"):
        TrainBatches(pictures, order, seed=0, **OPTIONS)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 9)])
def test_steps_outside_the_run_are_refused(pictures: ShardIndex, start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="must lie in 0 to 8"):
        Batches(train(pictures), start_step=start, stop_step=stop, workers=0)


def test_a_worker_starts_light() -> None:
    """It imports this module and its dependencies: no device runtime, trainer or model zoo."""
    heavy = ["torch_xla", "lightning", "timm", "hydra", "torchvision", "webdataset", "torchmetrics"]
    program = f"import sys, nfnets_xla.data.loader; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


KILLED = """
import os, sys, threading, multiprocessing
import numpy as np
from nfnets_xla.data.loader import Batches

LOCK = threading.Lock()  # such as the device runtime's threads hold

class Slow:
    def __len__(self):
        return 9
    def __getitem__(self, step):
        return {"step": step, "sample_U": np.zeros(10**6), "held": LOCK.locked()}

if __name__ == "__main__":
    LOCK.acquire()
    batches = iter(Batches(Slow(), start_step=0, stop_step=9, workers=2))
    workers = [child.pid for child in multiprocessing.active_children()]
    print(next(batches)["held"], *workers, flush=True)
    sys.stdin.read()
"""


def blocked(pid: int) -> set[int]:
    status = Path(f"/proc/{pid}/status").read_text()
    mask = int(status.partition("SigBlk:")[2].split()[0], 16)
    return {number for number in (signal.SIGINT, signal.SIGTERM) if mask >> (number - 1) & 1}


def test_workers_hear_no_signal_of_the_group_and_end_when_the_run_is_killed(tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    run = subprocess.Popen(
        [sys.executable, tmp_path / "killed.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert run.stdout is not None
    held, *pids = run.stdout.readline().split()
    assert held == b"False"  # a fork would have inherited it
    workers = [int(pid) for pid in pids]
    assert len(workers) == 2
    assert all(blocked(pid) == {signal.SIGINT, signal.SIGTERM} for pid in workers)
    assert blocked(run.pid) == set()
    run.kill()
    run.communicate()
    end = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < end:
        time.sleep(0.1)
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
