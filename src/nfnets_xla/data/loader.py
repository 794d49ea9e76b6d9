"""Global batches from step numbers: order, bytes, pixels, labels and masks put together.

A dataset here maps a step to that step's whole global batch. There is no iterator whose state could
be lost: to resume is to start at another number, and workers only change how soon a batch is there.

    index = ShardIndex.load("shards")
    order = Order(index.counts, seed, num_streams, batch_size // repeats, window_shards, epochs)
    dataset = TrainBatches(index, order, seed=seed, repeats=repeats, ...)
    for batch in Batches(dataset, start_step=1000, stop_step=order.num_steps, workers=8): ...

Of one image, the K views come from one decode and lie next to each other; rows stay stream-major.

Shape suffixes: U unique images, B = U * K rows, H W C as usual, N residual blocks, P = ceil(F / 8)
bytes of the F features that dropout masks.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from nfnets_xla.data.augment import Pixels, eval_view, random_resized_crop_flip
from nfnets_xla.data.decode import decode
from nfnets_xla.data.masks import (
    AUGMENT,
    MIX,
    RANDAUGMENT,
    dropout_bits,
    keep_masks,
    row_rng,
)
from nfnets_xla.data.mix import Layout, draw_mixes
from nfnets_xla.data.order import Order, SequentialOrder, StepRows
from nfnets_xla.data.randaugment import rand_augment
from nfnets_xla.data.shards import ShardIndex

# images_BHWC uint8, labels_B int64, weight_B float32 and, in training, keep_masks_BN and
# dropout_bits_BP uint8 are tensors; so are mix_outside_B and mix_ratio_B float32, mix_box_B4 int32
# and mix_labels_B int64, where images are to be mixed. What stays on the host is not: sample_U and
# epoch_U int64, weight_U float32 (numpy), step (int), layout (mix.Layout).
Batch = dict[str, Any]


class Samples:
    """The images and labels of an index, by shard and row. Its errors name the sample."""

    def __init__(self, index: ShardIndex, num_classes: int) -> None:
        self.index = index
        self.num_classes = num_classes
        # A sample's number: the samples of the shards before its own, plus its row.
        self.first_of_shard = np.cumsum(index.counts) - index.counts

    def numbers(self, rows: StepRows) -> NDArray[np.int64]:
        return self.first_of_shard[rows.shard] + rows.row

    def name(self, number: int) -> str:
        shard = int(np.searchsorted(self.first_of_shard, number, side="right")) - 1
        return self.index.sample_id(shard, number - int(self.first_of_shard[shard]))

    def pixels(self, shard: int, row: int) -> Pixels:
        try:
            return decode(self.index.read(shard, row))
        except ValueError as error:
            raise ValueError(
                f"sample {self.index.sample_id(shard, row)}: {error}; take it out of its shard "
                "and index the shards again"
            ) from error

    def label(self, shard: int, row: int) -> int:
        label = self.index.label(shard, row)
        if not 0 <= label < self.num_classes:
            raise ValueError(
                f"sample {self.index.sample_id(shard, row)} has label {label}; it must be in "
                f"[0, {self.num_classes}): raise data.num_classes or correct the label"
            )
        return label


class TrainBatches(Dataset[Batch]):
    """`self[step]` is global batch `step` of a run: the same in any process, at any time."""

    def __init__(
        self,
        index: ShardIndex,
        order: Order,
        *,
        num_classes: int,
        seed: int,
        image_size: int,
        repeats: int,
        flip: bool,
        min_crop_area: float,
        randaugment_ops: int,
        randaugment_magnitude: int | None,
        mix: bool,
        drop_path_rates: Sequence[float],
        dropout_features: int,
        dropout_rate: float,
    ) -> None:
        """`repeats` is K. With a dropout rate of 0, batches have no "dropout_bits_BP"."""
        if not np.array_equal(index.counts, order.counts):
            raise ValueError(
                f"the order is of {order.num_samples} samples and the index of "
                f"{index.num_samples}, or of other shards: make the order from this index"
            )
        images_per_stream = order.unique_per_step // order.num_streams
        if mix and (order.num_streams % 2 or images_per_stream < 2):
            raise ValueError(
                f"a batch has {images_per_stream} images of each of {order.num_streams} streams; "
                "mixing needs 2 and an even number of streams: change data.num_streams"
            )
        self.samples = Samples(index, num_classes)
        self.order = order
        self.seed = seed
        self.image_size = image_size
        self.repeats = repeats
        self.flip = flip
        self.min_crop_area = min_crop_area
        self.randaugment_ops = randaugment_ops
        self.randaugment_magnitude = randaugment_magnitude
        self.mix = mix
        self.drop_path_rates = tuple(drop_path_rates)
        self.dropout_features = dropout_features
        self.dropout_rate = dropout_rate

    def __len__(self) -> int:
        return self.order.num_steps

    def __getitem__(self, step: int) -> Batch:
        """Raises ValueError, with the sample's name, for an image or a label that is no good."""
        return self._of_rows(step, self.order.step(step))

    def of_streams(self, step: int, streams: Sequence[int]) -> Batch:
        """The part of a batch that these streams make: its rows are those of the whole."""
        rows = self.order.step(step)
        chosen = np.isin(rows.stream, streams)
        return self._of_rows(step, StepRows._make(column[chosen] for column in rows))

    def _of_rows(self, step: int, rows: StepRows) -> Batch:
        batch = _batch(step, rows, self.samples, self._view, self.image_size, self.repeats)
        keys = {
            "epoch_B": rows.epoch.repeat(self.repeats),
            "sample_B": batch["sample_U"].repeat(self.repeats),
            "view_B": np.tile(np.arange(self.repeats), len(rows.row)),
        }
        masks_BN = keep_masks(self.seed, **keys, rates_N=self.drop_path_rates)
        batch["keep_masks_BN"] = torch.from_numpy(masks_BN)
        if self.dropout_rate:
            bits_BP = dropout_bits(
                self.seed, **keys, features=self.dropout_features, rate=self.dropout_rate
            )
            batch["dropout_bits_BP"] = torch.from_numpy(bits_BP)
        if self.mix:
            batch |= self._mixes(batch, rows, **keys)
        return batch

    def samples_shown(self, batch: Batch) -> dict[str, list]:
        """The ids and epochs of the samples that a batch shows, in its order; no spare rows."""
        real = batch["weight_U"] > 0
        ids = [self.samples.name(int(number)) for number in batch["sample_U"][real]]
        return {"ids": ids, "epochs": batch["epoch_U"][real].tolist()}

    def _view(self, pixels: Pixels, epoch: int, sample: int, view: int) -> Pixels:
        key = self.seed, epoch, sample, view
        shown = random_resized_crop_flip(
            pixels,
            row_rng(AUGMENT, *key),
            size=self.image_size,
            area=(self.min_crop_area, 1.0),
            flip=self.flip,
        )
        if self.randaugment_magnitude is None:
            return shown
        return rand_augment(
            shown,
            row_rng(RANDAUGMENT, *key),
            operations=self.randaugment_ops,
            magnitude=self.randaugment_magnitude,
        )

    def _mixes(
        self,
        batch: Batch,
        rows: StepRows,
        epoch_B: NDArray[np.int64],
        sample_B: NDArray[np.int64],
        view_B: NDArray[np.int64],
    ) -> Batch:
        """What is to be mixed with what; the device does it."""
        images_per_stream = self.order.unique_per_step // self.order.num_streams
        layout = Layout(len(rows.row) // images_per_stream, images_per_stream, self.repeats)
        keys = list(zip(epoch_B.tolist(), sample_B.tolist(), view_B.tolist(), strict=True))
        mixes = draw_mixes(
            layout,
            self.image_size,
            sample_B=sample_B,
            stream_B=rows.stream.repeat(self.repeats),
            weight_B=rows.weight.repeat(self.repeats),
            rng_of=lambda row: row_rng(MIX, self.seed, *keys[row]),
        )
        return {
            "layout": layout,
            "mix_outside_B": torch.from_numpy(mixes.outside_B),
            "mix_box_B4": torch.from_numpy(mixes.box_B4),
            "mix_ratio_B": torch.from_numpy(mixes.ratio_B),
            "mix_labels_B": batch["labels_B"][torch.from_numpy(mixes.partner_B)],
        }


class EvalBatches(Dataset[Batch]):
    """Every sample once, in index order; the last batch is filled up with rows of weight 0."""

    def __init__(
        self, index: ShardIndex, *, num_classes: int, batch_size: int, image_size: int, margin: int
    ) -> None:
        self.samples = Samples(index, num_classes)
        self.order = SequentialOrder(index.counts, batch_size)
        self.image_size = image_size
        self.margin = margin

    @property
    def num_steps(self) -> int:
        return self.order.num_steps

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> Batch:
        rows = self.order.step(step)
        return _batch(step, rows, self.samples, self._view, self.image_size, repeats=1)

    def _view(self, pixels: Pixels, epoch: int, sample: int, view: int) -> Pixels:
        del epoch, sample, view
        return eval_view(pixels, size=self.image_size, margin=self.margin)


class Batches:
    """Iterates over `dataset[start_step] ... dataset[stop_step - 1]`, in order.

    With `workers=0` they are made in this process; else each worker makes whole batches, on one
    thread, `prefetch` ahead. Workers are spawned: a fork would copy the locks that the device
    runtime's threads hold, and workers of a fork server outlive a parent that is killed. There is
    no length on purpose: Lightning would add lengths up on the device, which compiles twice.
    """

    def __init__(
        self,
        dataset: TrainBatches | EvalBatches,
        *,
        start_step: int,
        stop_step: int,
        workers: int,
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> None:
        """`pin_memory` is for a GPU, which copies from such memory while it computes."""
        if not 0 <= start_step <= stop_step <= len(dataset):
            raise ValueError(
                f"steps {start_step} to {stop_step} are asked for; they must lie in 0 to "
                f"{len(dataset)}"
            )
        self._loader = DataLoader(
            _Caught(dataset),
            batch_size=None,
            sampler=range(start_step, stop_step),
            collate_fn=_unchanged,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            multiprocessing_context="spawn" if workers else None,
        )

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            if isinstance(batch, ValueError):
                raise batch
            yield batch


class _Caught(Dataset[Any]):
    """Hands a worker's ValueError over as a value: raised there, it would come as a traceback."""

    def __init__(self, dataset: TrainBatches | EvalBatches) -> None:
        self.dataset = dataset

    def __getitem__(self, step: int) -> Batch | ValueError:
        try:
            return self.dataset[step]
        except ValueError as error:
            return error


def _batch(
    step: int,
    rows: StepRows,
    samples: Samples,
    view_of: Callable[[Pixels, int, int, int], Pixels],
    size: int,
    repeats: int,
) -> Batch:
    """What training and evaluation have in common: decode each image once, view it K times."""
    sample_U = samples.numbers(rows)
    images_UKHWC = np.empty((len(sample_U), repeats, size, size, 3), np.uint8)
    labels_U = np.empty(len(sample_U), np.int64)
    for place, sample in enumerate(sample_U.tolist()):
        if place and not rows.weight[place] and sample == sample_U[place - 1]:
            images_UKHWC[place], labels_U[place] = images_UKHWC[place - 1], labels_U[place - 1]
            continue  # evaluation fills up with one sample, which need not be decoded each time
        shard, row, epoch = (int(column[place]) for column in (rows.shard, rows.row, rows.epoch))
        labels_U[place] = samples.label(shard, row)
        pixels = samples.pixels(shard, row)
        for view in range(repeats):
            images_UKHWC[place, view] = view_of(pixels, epoch, sample, view)
    return {
        "step": step,
        "images_BHWC": torch.from_numpy(images_UKHWC.reshape(-1, size, size, 3)),
        "labels_B": torch.from_numpy(labels_U.repeat(repeats)),
        "weight_B": torch.from_numpy(rows.weight.repeat(repeats)),
        "sample_U": sample_U,
        "epoch_U": rows.epoch,
        "weight_U": rows.weight,
    }


def _unchanged(batch: Any) -> Any:
    """In place of torch's conversion, which would make tensors of what stays on the host."""
    return batch
