"""A batch is a function of its step: equal from any process, with its views, masks and names."""

import multiprocessing
import pickle
import time
from collections import Counter
from contextlib import closing

import numpy as np
import pytest
import torch

from nfnets_xla.data.batches import Batch, EvalBatches, TrainBatches
from nfnets_xla.data.loader import Batches
from nfnets_xla.data.masks import RANDAUGMENT, dropout_bits, keep_masks, row_rng
from nfnets_xla.data.mix import partner_rows
from nfnets_xla.data.order import Order
from nfnets_xla.data.randaugment import rand_augment
from nfnets_xla.data.shards import ShardIndex
from tests.data.loading import (
    CLASSES,
    RATES,
    REPEATS,
    SAMPLES,
    STREAMS,
    UNIQUE,
    assert_same,
    picture,
    train,
)
from tests.reference.resize import resized


def _workers() -> int:
    """Child processes, without those that joblib keeps from other tests in this process."""
    return sum(child.daemon for child in multiprocessing.active_children())


# ---- the same batches, however they are made ----------------------------------------------------


@pytest.fixture(scope="module")
def in_this_process(pictures: ShardIndex) -> list[Batch]:
    dataset = train(pictures)
    return [dataset[step] for step in range(len(dataset))]


# torch warns about more workers than cores, which only affects speed.
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(
    pictures: ShardIndex, in_this_process: list[Batch], workers: int
) -> None:
    dataset = train(pictures)
    loader = Batches(dataset, start_step=0, stop_step=len(dataset), workers=workers)
    with closing(loader):
        loaded = list(loader)
        assert _workers() == workers
    end = time.monotonic() + 30  # torch gives them five seconds, and does not wait for the rest
    while _workers() and time.monotonic() < end:
        time.sleep(0.1)
    assert _workers() == 0
    assert [batch["step"] for batch in loaded] == list(range(len(dataset)))
    for one, other in zip(loaded, in_this_process, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("start", [0, 3, 8])
def test_resuming_is_a_suffix(
    pictures: ShardIndex, in_this_process: list[Batch], start: int
) -> None:
    dataset = train(pictures)
    assert len(dataset) == 8  # ceil(1.5 * 29 / 6)
    rest = list(Batches(dataset, start_step=start, stop_step=8, workers=0))
    assert len(rest) == 8 - start
    for one, other in zip(rest, in_this_process[start:], strict=True):
        assert_same(one, other)


def test_a_copy_sent_to_a_worker_and_another_order_of_asking_change_nothing(
    pictures: ShardIndex, in_this_process: list[Batch]
) -> None:
    dataset = pickle.loads(pickle.dumps(train(pictures)))
    for step in (5, 1, 7, 5):
        assert_same(dataset[step], in_this_process[step])


def test_the_seed_changes_the_batches(pictures: ShardIndex, in_this_process: list[Batch]) -> None:
    other = train(pictures, seed=1)[0]
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
    pictures: ShardIndex, in_this_process: list[Batch]
) -> None:
    dataset = train(pictures)
    names = [name for batch in in_this_process for name in dataset.samples_shown(batch)["ids"]]
    everything = [
        pictures.sample_id(shard, row)
        for shard, count in enumerate(pictures.counts)
        for row in range(count)
    ]
    shown = Counter(names)
    assert len(names) == round(1.5 * SAMPLES)
    assert sorted(shown) == sorted(everything)
    assert set(shown.values()) == {1, 2}
    assert sum(float(batch["weight_B"].sum()) for batch in in_this_process) == len(names) * REPEATS


def test_views_of_an_image_are_neighbours_that_differ(
    pictures: ShardIndex, in_this_process: list[Batch]
) -> None:
    sample, first = in_this_process[0]["sample_U"], in_this_process[0]
    labels = first["labels_B"].reshape(UNIQUE, REPEATS)
    assert labels.tolist() == [[int(n) % CLASSES] * REPEATS for n in sample]
    views = first["images_BHWC"].reshape(UNIQUE, REPEATS, -1)
    keeps = first["keep_masks_BN"].reshape(UNIQUE, REPEATS, -1)
    for one in range(UNIQUE):
        assert len({tuple(view.tolist()) for view in views[one]}) == REPEATS
    assert len(keeps.unique(dim=1)) > 1
    # More repeats add views of the same images: the first views stay equal.
    more = train(pictures, repeats=5)[0]
    assert torch.equal(more["images_BHWC"].reshape(UNIQUE, 5, -1)[:, :REPEATS], views)


def test_pixels_are_those_of_the_named_sample(pictures: ShardIndex) -> None:
    """Without a crop or a flip all views are the padded centre."""
    dataset = train(pictures, min_crop_area=1.0, flip=False)
    batch = dataset[0]
    for place, number in enumerate(batch["sample_U"].tolist()):
        side = 6  # 16 / (16 + 32) of the 20 pixels of the shorter side
        centre = resized(picture(number)[7 : 7 + side, 9 : 9 + side], 16, 16)
        for view in range(REPEATS):
            shown = batch["images_BHWC"][place * REPEATS + view].numpy()
            assert np.abs(shown - centre).max() <= 2  # as in test_augment


def test_masks_are_keyed_by_sample_epoch_and_view(in_this_process: list[Batch]) -> None:
    for batch in in_this_process[4:6]:  # step 4 contains the end of epoch 0
        keys = (
            batch["epoch_U"].repeat(REPEATS),
            batch["sample_U"].repeat(REPEATS),
            np.tile(range(REPEATS), UNIQUE),
        )
        assert np.array_equal(batch["keep_masks_BN"], keep_masks(0, *keys, RATES))
        bits = dropout_bits(0, *keys, features=11, rate=0.25)
        assert np.array_equal(batch["dropout_bits_BP"], bits)
    assert set(in_this_process[4]["epoch_U"].tolist()) == {0, 1}


def test_an_epoch_shows_other_views_of_a_sample(pictures: ShardIndex) -> None:
    dataset = train(pictures, epochs=2)
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


def test_without_dropout_a_batch_has_no_bits(pictures: ShardIndex) -> None:
    assert "dropout_bits_BP" not in train(pictures, dropout_rate=0.0)[0]


def test_randaugment_changes_the_views_and_nothing_else(
    pictures: ShardIndex, in_this_process: list[Batch]
) -> None:
    """Each view is the plain one, augmented with the row's own key."""
    batch, plain = train(pictures, randaugment_magnitude=5)[4], in_this_process[4]
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
    pictures: ShardIndex, in_this_process: list[Batch]
) -> None:
    dataset = train(pictures, mix=True)
    for step, plain in enumerate(in_this_process):
        batch = dataset[step]
        assert np.array_equal(batch["images_BHWC"], plain["images_BHWC"])
        layout = batch["layout"]
        assert layout == (STREAMS, UNIQUE // STREAMS, REPEATS)
        partner = partner_rows(layout)
        assert np.array_equal(batch["mix_labels_B"], batch["labels_B"][partner])
        kept = batch["mix_ratio_B"] == 1  # or where Beta(0.2, 0.2) is that close to 1
        is_spare = batch["weight_B"][partner] == 0
        assert kept[is_spare].all()
        assert kept[~is_spare].float().mean() < 0.5
        assert batch["mix_outside_B"].dtype == batch["mix_ratio_B"].dtype == torch.float32
        assert batch["mix_box_B4"].dtype == torch.int32


def test_some_streams_of_a_batch_are_as_in_the_whole(pictures: ShardIndex) -> None:
    dataset = train(pictures, mix=True, randaugment_magnitude=5)
    for stream in range(STREAMS):
        part, whole = dataset.of_streams(2, range(stream, stream + 1)), dataset[2]
        for name, value in part.items():
            if isinstance(value, (torch.Tensor, np.ndarray)):
                length = len(value)
                assert np.array_equal(value, whole[name][stream * length :][:length]), name


def test_a_batch_too_small_to_be_mixed_is_refused(pictures: ShardIndex) -> None:
    order = Order(pictures.counts, 0, 6, 6, window_shards=2, epochs=1)
    options = vars(train(pictures)) | {"num_classes": CLASSES, "mix": True, "order": order}
    del options["samples"]
    with pytest.raises(ValueError, match=r"1 images of each of 6 streams; mixing needs 2 and"):
        TrainBatches(pictures, **options)


# ---- evaluation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_shows_everything_once_and_fills_up_with_weight_0(
    pictures: ShardIndex, workers: int
) -> None:
    dataset = EvalBatches(pictures, num_classes=CLASSES, batch_size=8, image_size=16, margin=4)
    assert dataset.num_steps == len(dataset) == 4
    loaded = list(Batches(dataset, start_step=0, stop_step=4, workers=workers))
    weight = torch.cat([batch["weight_B"] for batch in loaded])
    assert weight.tolist() == [1] * SAMPLES + [0] * 3
    images = torch.cat([batch["images_BHWC"] for batch in loaded])
    labels = torch.cat([batch["labels_B"] for batch in loaded])
    for number in range(32):
        shown = min(number, SAMPLES - 1)  # padded with the last sample
        whole = resized(picture(shown), 20, 20)
        assert np.abs(images[number].numpy() - whole[2:18, 2:18]).max() <= 2
        assert labels[number] == shown % CLASSES
    assert "keep_masks_BN" not in loaded[0]
