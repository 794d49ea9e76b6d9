"""A batch is a function of its step: the same from any process, with its views, masks and names."""

import io
import multiprocessing
import pickle
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nfnets_xla.data.batches import Batch, EvalBatches, TrainBatches
from nfnets_xla.data.index import build_index
from nfnets_xla.data.loader import Batches
from nfnets_xla.data.masks import RANDAUGMENT, dropout_bits, keep_masks, row_rng
from nfnets_xla.data.mix import partner_rows
from nfnets_xla.data.order import Order
from nfnets_xla.data.pack import pack_samples
from nfnets_xla.data.randaugment import rand_augment
from nfnets_xla.data.shards import ShardIndex
from tests.data.images import packed
from tests.reference.resize import resized

SAMPLES, CLASSES = 29, 5
STREAMS, UNIQUE, REPEATS = 2, 6, 3
RATES = (0.0, 0.5, 0.9)


def encoded(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (20, 24, 3), np.uint8)


def pack(folder: Path, images: list[bytes]) -> ShardIndex:
    folder.mkdir(parents=True, exist_ok=True)
    samples = ((f"{n:05}", data, "png", n % CLASSES) for n, data in enumerate(images))
    pack_samples(samples, folder, samples_per_shard=8)
    build_index(folder)
    return ShardIndex.load(folder)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    folder = tmp_path_factory.mktemp("shards")
    return pack(folder, [encoded(picture(n)) for n in range(SAMPLES)])


def train(index: ShardIndex, *, epochs: float = 1.5, seed: int = 0, **changes: Any) -> TrainBatches:
    order = Order(index.counts, seed, STREAMS, UNIQUE, window_shards=2, epochs=epochs)
    options: dict[str, Any] = {
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
    return TrainBatches(index, order, seed=seed, **(options | changes))


def assert_same(one: Batch, other: Batch) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert type(value) is type(other[name])
        if name not in ("step", "missed"):
            assert value.dtype == other[name].dtype
        assert np.array_equal(value, other[name]), name


def _workers() -> int:
    """Without those that joblib keeps from other tests of this process."""
    return sum(child.daemon for child in multiprocessing.active_children())


# ---- the same batches, however they are made ----------------------------------------------------


@pytest.fixture(scope="module")
def in_this_process(index: ShardIndex) -> list[Batch]:
    dataset = train(index)
    return [dataset[step] for step in range(len(dataset))]


# torch warns of more workers than cores, which is about speed.
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(
    index: ShardIndex, in_this_process: list[Batch], workers: int
) -> None:
    dataset = train(index)
    loader = Batches(dataset, start_step=0, stop_step=len(dataset), workers=workers)
    with closing(loader):
        loaded = list(loader)
        assert _workers() == workers
    assert _workers() == 0
    assert [batch["step"] for batch in loaded] == list(range(len(dataset)))
    for one, other in zip(loaded, in_this_process, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("start", [0, 3, 8])
def test_resuming_is_a_suffix(index: ShardIndex, in_this_process: list[Batch], start: int) -> None:
    dataset = train(index)
    assert len(dataset) == 8  # ceil(1.5 * 29 / 6)
    rest = list(Batches(dataset, start_step=start, stop_step=8, workers=0))
    assert len(rest) == 8 - start
    for one, other in zip(rest, in_this_process[start:], strict=True):
        assert_same(one, other)


def test_a_copy_sent_to_a_worker_and_another_order_of_asking_change_nothing(
    index: ShardIndex, in_this_process: list[Batch]
) -> None:
    dataset = pickle.loads(pickle.dumps(train(index)))
    for step in (5, 1, 7, 5):
        assert_same(dataset[step], in_this_process[step])


def test_the_seed_changes_the_batches(index: ShardIndex, in_this_process: list[Batch]) -> None:
    other = train(index, seed=1)[0]
    assert not np.array_equal(other["sample_U"], in_this_process[0]["sample_U"])


# ---- what is in a batch -------------------------------------------------------------------------


def test_shapes_and_dtypes_are_those_of_every_step(in_this_process: list[Batch]) -> None:
    rows = UNIQUE * REPEATS
    for batch in in_this_process:
        shapes = {
            name: (tuple(value.shape), value.dtype)
            for name, value in batch.items()
            if isinstance(value, torch.Tensor)
        }
        assert shapes == {
            "images_BHWC": ((rows, 16, 16, 3), torch.uint8),
            "labels_B": ((rows,), torch.int64),
            "weight_B": ((rows,), torch.float32),
            "keep_masks_BN": ((rows, 3), torch.uint8),
            "dropout_bits_BP": ((rows, 2), torch.uint8),
        }
        assert isinstance(batch["step"], int)
        for name in ("sample_U", "epoch_U", "weight_U"):  # stay on the host
            assert isinstance(batch[name], np.ndarray)
            assert batch[name].shape == (UNIQUE,)


def test_every_sample_is_shown_once_per_epoch(
    index: ShardIndex, in_this_process: list[Batch]
) -> None:
    dataset = train(index)
    names = [name for batch in in_this_process for name in dataset.samples_shown(batch)["ids"]]
    everything = [
        index.sample_id(shard, row)
        for shard, count in enumerate(index.counts)
        for row in range(count)
    ]
    shown = Counter(names)
    assert len(names) == round(1.5 * SAMPLES)
    assert sorted(shown) == sorted(everything)
    assert set(shown.values()) == {1, 2}
    assert sum(float(batch["weight_B"].sum()) for batch in in_this_process) == len(names) * REPEATS


def test_views_of_an_image_are_neighbours_that_differ(
    index: ShardIndex, in_this_process: list[Batch]
) -> None:
    sample, first = in_this_process[0]["sample_U"], in_this_process[0]
    labels = first["labels_B"].reshape(UNIQUE, REPEATS)
    assert labels.tolist() == [[int(n) % CLASSES] * REPEATS for n in sample]
    views = first["images_BHWC"].reshape(UNIQUE, REPEATS, -1)
    keeps = first["keep_masks_BN"].reshape(UNIQUE, REPEATS, -1)
    for one in range(UNIQUE):
        assert len({tuple(view.tolist()) for view in views[one]}) == REPEATS
    assert len(keeps.unique(dim=1)) > 1
    # More repeats are more views of the same images: the first ones stay what they were.
    more = train(index, repeats=5)[0]
    assert torch.equal(more["images_BHWC"].reshape(UNIQUE, 5, -1)[:, :REPEATS], views)


def test_pixels_are_those_of_the_named_sample(index: ShardIndex) -> None:
    """Without a crop or a flip all views are the padded centre."""
    dataset = train(index, min_crop_area=1.0, flip=False)
    batch = dataset[0]
    for place, number in enumerate(batch["sample_U"].tolist()):
        side = 6  # 16 / (16 + 32) of the 20 pixels of the shorter side
        centre = resized(picture(number)[7 : 7 + side, 9 : 9 + side], 16, 16)
        for view in range(REPEATS):
            shown = batch["images_BHWC"][place * REPEATS + view].numpy()
            assert np.abs(shown - centre).max() <= 2  # as in test_augment


def test_masks_are_keyed_by_sample_epoch_and_view(in_this_process: list[Batch]) -> None:
    for batch in in_this_process[4:6]:  # step 4 holds the end of epoch 0
        keys = (
            batch["epoch_U"].repeat(REPEATS),
            batch["sample_U"].repeat(REPEATS),
            np.tile(range(REPEATS), UNIQUE),
        )
        assert np.array_equal(batch["keep_masks_BN"], keep_masks(0, *keys, RATES))
        bits = dropout_bits(0, *keys, features=11, rate=0.25)
        assert np.array_equal(batch["dropout_bits_BP"], bits)
    assert set(in_this_process[4]["epoch_U"].tolist()) == {0, 1}


def test_an_epoch_shows_other_views_of_a_sample(index: ShardIndex) -> None:
    dataset = train(index, epochs=2)
    seen: dict[int, list[np.ndarray]] = {}
    for step in range(len(dataset)):
        batch = dataset[step]
        for place, (sample, weight) in enumerate(
            zip(batch["sample_U"].tolist(), batch["weight_U"], strict=True)
        ):
            if weight:
                seen.setdefault(sample, []).append(batch["images_BHWC"][place * REPEATS].numpy())
    assert len(seen) == SAMPLES
    assert not any(np.array_equal(first, second) for first, second in seen.values())


def test_without_dropout_a_batch_has_no_bits(index: ShardIndex) -> None:
    assert "dropout_bits_BP" not in train(index, dropout_rate=0.0)[0]


def test_randaugment_changes_the_views_and_nothing_else(
    index: ShardIndex, in_this_process: list[Batch]
) -> None:
    """Each view is the plain one, augmented with the row's own key."""
    batch, plain = train(index, randaugment_magnitude=5)[4], in_this_process[4]
    keys = zip(
        batch["epoch_U"].repeat(REPEATS).tolist(),
        batch["sample_U"].repeat(REPEATS).tolist(),
        list(range(REPEATS)) * UNIQUE,
        strict=True,
    )
    for row, key in enumerate(keys):
        view = plain["images_BHWC"][row].numpy()
        rng = row_rng(RANDAUGMENT, 0, *key)
        expected = rand_augment(view, rng, operations=2, magnitude=5)
        assert np.array_equal(batch["images_BHWC"][row], expected)
    for name in plain.keys() - {"images_BHWC", "step"}:
        assert np.array_equal(batch[name], plain[name])


def test_mixing_adds_what_the_device_needs_and_leaves_the_images(
    index: ShardIndex, in_this_process: list[Batch]
) -> None:
    dataset = train(index, mix=True)
    for step, plain in enumerate(in_this_process):
        batch = dataset[step]
        assert np.array_equal(batch["images_BHWC"], plain["images_BHWC"])
        layout = batch["layout"]
        assert layout == (STREAMS, UNIQUE // STREAMS, REPEATS)
        partner = partner_rows(layout)
        assert np.array_equal(batch["mix_labels_B"], batch["labels_B"][partner])
        kept = batch["mix_ratio_B"] == 1  # also where Beta(0.2, 0.2) comes that close
        is_spare = batch["weight_B"][partner] == 0
        assert kept[is_spare].all()
        assert kept[~is_spare].float().mean() < 0.5
        assert batch["mix_outside_B"].dtype == batch["mix_ratio_B"].dtype == torch.float32
        assert batch["mix_box_B4"].dtype == torch.int32


def test_some_streams_of_a_batch_are_as_in_the_whole(index: ShardIndex) -> None:
    dataset = train(index, mix=True, randaugment_magnitude=5)
    for stream in range(STREAMS):
        part, whole = dataset.of_streams(2, range(stream, stream + 1)), dataset[2]
        for name, value in part.items():
            if isinstance(value, (torch.Tensor, np.ndarray)):
                length = len(value)
                assert np.array_equal(value, whole[name][stream * length :][:length]), name


def test_a_batch_too_small_to_be_mixed_is_refused(index: ShardIndex) -> None:
    order = Order(index.counts, 0, 6, 6, window_shards=2, epochs=1)
    options = vars(train(index)) | {"num_classes": CLASSES, "mix": True, "order": order}
    del options["samples"]
    with pytest.raises(ValueError, match=r"1 images of each of 6 streams; mixing needs 2 and"):
        TrainBatches(index, **options)


# ---- evaluation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_shows_everything_once_and_fills_up_with_weight_0(
    index: ShardIndex, workers: int
) -> None:
    dataset = EvalBatches(index, num_classes=CLASSES, batch_size=8, image_size=16, margin=4)
    assert dataset.num_steps == len(dataset) == 4
    loaded = list(Batches(dataset, start_step=0, stop_step=4, workers=workers))
    weight = torch.cat([batch["weight_B"] for batch in loaded])
    assert weight.tolist() == [1] * SAMPLES + [0] * 3
    images = torch.cat([batch["images_BHWC"] for batch in loaded])
    labels = torch.cat([batch["labels_B"] for batch in loaded])
    for number in range(32):
        shown = min(number, SAMPLES - 1)  # the last sample fills up
        whole = resized(picture(shown), 20, 20)
        assert np.abs(images[number].numpy() - whole[2:18, 2:18]).max() <= 2
        assert labels[number] == shown % CLASSES
    assert "keep_masks_BN" not in loaded[0]


# ---- errors and start-up ------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_does_not_decode_is_grey_weighs_nothing_and_is_told(
    index: ShardIndex, tmp_path: Path, workers: int
) -> None:
    images = [encoded(picture(n)) for n in range(SAMPLES)]
    images[9] = images[9][:100]
    faulty = pack(tmp_path, images)
    for make in (train, evaluation):
        good, dataset = make(index), make(faulty)
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


def evaluation(index: ShardIndex) -> EvalBatches:
    return EvalBatches(index, num_classes=CLASSES, batch_size=4, image_size=16, margin=0)


def test_a_shard_that_has_changed_stops_the_run(tmp_path: Path) -> None:
    index = pack(tmp_path, [encoded(picture(n)) for n in range(3)])
    data = bytearray((tmp_path / "shard-000000.tar").read_bytes())
    data[index.offset(0, 0) + 50] ^= 1
    (tmp_path / "shard-000000.tar").write_bytes(data)
    with pytest.raises(ValueError, match=r"no longer matches its shards.*wrong checksum"):
        evaluation(index)[0]


def test_what_the_machine_refuses_a_worker_is_no_traceback(tmp_path: Path) -> None:
    index = pack(tmp_path, [encoded(picture(n)) for n in range(3)])
    sidecar = tmp_path / "shard-000000.tar.idx.npz"
    sidecar.unlink()
    sidecar.mkdir()
    with pytest.raises(IsADirectoryError) as error:
        next(iter(Batches(evaluation(index), start_step=0, stop_step=1, workers=1)))
    assert (error.value.strerror, error.value.filename) == ("Is a directory", str(sidecar))


def test_several_labels_have_one_shape_and_the_heaviest_first(tmp_path: Path) -> None:
    labels: list[Any] = [3, {1: 1.0, 4: 3.0}, {0: 0.5, 1: 0.25, 2: 0.25}, {2: 1.0, 3: 1.0}]
    samples = ((f"{n}", encoded(picture(n)), "png", label) for n, label in enumerate(labels))
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
def test_hosts_make_parts_of_the_batch(index: ShardIndex, hosts: int) -> None:
    whole = train(index)
    order = whole.order
    parts = [train(index, streams=order.streams_of(host, hosts)) for host in range(hosts)]
    for step in range(len(whole)):
        batches = [part[step] for part in parts]
        for name, value in whole[step].items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, torch.cat([batch[name] for batch in batches]))
    for host, of in ((0, 3), (2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="2 streams must divide among them"):
            order.streams_of(host, of)


def test_a_label_outside_the_classes_is_named(index: ShardIndex) -> None:
    dataset = train(index, num_classes=4)
    with pytest.raises(ValueError, match=r"sample .* has label 4; it must be in \[0, 4\): raise"):
        [dataset[step] for step in range(len(dataset))]


def test_an_order_of_other_shards_is_refused(index: ShardIndex) -> None:
    order = Order(index.counts + 1, 0, STREAMS, UNIQUE, window_shards=2, epochs=1)
    with pytest.raises(ValueError, match="the order is of 33 samples and the index of 29"):
        TrainBatches(
            index,
            order,
            num_classes=CLASSES,
            seed=0,
            image_size=16,
            repeats=1,
            flip=True,
            min_crop_area=0.1,
            randaugment_ops=2,
            randaugment_magnitude=None,
            mix=False,
            drop_path_rates=RATES,
            dropout_features=1,
            dropout_rate=0.0,
        )


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 9)])
def test_steps_outside_the_run_are_refused(index: ShardIndex, start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="must lie in 0 to 8"):
        Batches(train(index), start_step=start, stop_step=stop, workers=0)


def test_a_worker_starts_light() -> None:
    """It imports this module and what that needs: no device runtime, trainer or model zoo."""
    heavy = ["torch_xla", "lightning", "timm", "hydra", "torchvision", "webdataset", "torchmetrics"]
    program = f"import sys, nfnets_xla.data.loader; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


KILLED = """
import os, sys, multiprocessing
import numpy as np
from nfnets_xla.data.loader import Batches

class Slow:
    def __len__(self):
        return 9
    def __getitem__(self, step):
        return {"step": step, "sample_U": np.zeros(10**6)}

if __name__ == "__main__":
    batches = iter(Batches(Slow(), start_step=0, stop_step=9, workers=2))
    next(batches)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    sys.stdin.read()
"""


def test_workers_of_a_killed_run_end_too(tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    run = subprocess.Popen(
        [sys.executable, tmp_path / "killed.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert run.stdout is not None
    workers = [int(pid) for pid in run.stdout.readline().split()]
    assert len(workers) == 2
    run.kill()
    run.communicate()
    end = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < end:
        time.sleep(0.1)
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
