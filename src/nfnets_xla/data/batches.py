"""Global batches by step number: puts order, image bytes, pixels, labels and masks together.

A dataset here maps a step to that step's whole global batch. There is no iterator with state to
lose: resuming means starting at another number.

    index = ShardIndex.load("shards")
    order = Order(index.counts, seed, num_streams, batch_size // repeats, window_shards, epochs)
    dataset = TrainBatches(index, order, seed=seed, repeats=repeats, ...)
    batch = dataset[1000]

The K views of an image come from one decode and are adjacent; rows are ordered by stream.

Shape suffixes: U unique images, B = U * K rows, H W C as usual, L labels of an image, N residual
blocks, P = ceil(F / 8) bytes of the F features that dropout masks.
"""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from nfnets_xla.data.ahead import ReadAhead
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
# dropout_bits_BP uint8 are tensors. If any sample of the data set has several labels, labels_B has
# the heaviest of each, and there are labels_BL int64 and label_weights_BL float32, padded with the
# heaviest label at weight 0. If images are mixed, there are mix_outside_B and mix_ratio_B float32,
# mix_box_B4 int32, and the partners' labels, with the prefix "mix_". What stays on the host is not
# a tensor: sample_U and epoch_U int64, weight_U float32 (numpy), step (int), layout (mix.Layout),
# and missed, a list of the samples that could not be decoded.
Batch = dict[str, Any]

GREY = 128  # pixels of a row whose image cannot be decoded


def check_mixing(order: Order) -> None:
    """Raises ValueError if an image could lack a partner in its stream, or streams are odd."""
    images_per_stream = order.unique_per_step // order.num_streams
    if order.num_streams % 2 or images_per_stream < 2:
        raise ValueError(
            f"a batch has {images_per_stream} images of each of {order.num_streams} streams; "
            "mixing needs 2 and an even number of streams: change data.num_streams"
        )


def check_window_room(index: ShardIndex, num_streams: int, window_shards: int) -> None:
    """ValueError if the cache cannot hold the streams' current windows and the next ones."""
    index.check_room(2 * num_streams * window_shards, "windows and the next ones")


def check_evaluation_room(index: ShardIndex) -> None:
    index.check_room(2 * SequentialOrder.ahead, "shards that are evaluated")


class Samples:
    """The images and labels of an index, by shard and row. Its errors name the sample."""

    def __init__(self, index: ShardIndex, num_classes: int) -> None:
        self.index = index
        self.num_classes = num_classes
        # A sample's number is the number of samples in all earlier shards, plus its row.
        self.first_of_shard = np.cumsum(index.counts) - index.counts

    def numbers(self, rows: StepRows) -> NDArray[np.int64]:
        return self.first_of_shard[rows.shard] + rows.row

    @cached_property
    def ahead(self) -> ReadAhead | None:
        index = self.index
        return ReadAhead(index.bring, index.keep) if index.folder.cache else None

    def place(self, number: int) -> tuple[int, int]:
        """Shard and row of a sample's number."""
        shard = int(np.searchsorted(self.first_of_shard, number, side="right")) - 1
        return shard, number - int(self.first_of_shard[shard])

    def name(self, number: int) -> str:
        return self.index.sample_id(*self.place(number))

    def pixels(self, shard: int, row: int) -> Pixels | dict[str, Any]:
        """The image; or, if it cannot be decoded, a dictionary about it for `missed`. Raises
        ValueError for a shard that is not the one that was indexed."""
        data = self.index.read(shard, row)
        try:
            return decode(data)
        except ValueError as error:
            return {
                "id": self.index.sample_id(shard, row),
                "shard": self.index.name(shard),
                "offset": self.index.offset(shard, row),
                "reason": str(error),
            }

    def labels(self, shard: int, row: int) -> list[tuple[int, float]]:
        """Labels with their weights, the heaviest first."""
        labels = sorted(self.index.labels(shard, row).items(), key=lambda item: -item[1])
        for label, _ in labels:
            if label >= self.num_classes:
                raise ValueError(
                    f"sample {self.index.sample_id(shard, row)} has label {label}; it must be in "
                    f"[0, {self.num_classes}): raise data.num_classes or correct the label"
                )
        return labels


class TrainBatches(Dataset[Batch]):
    """`self[step]` is global batch `step` of a run, the same in every process and every time."""

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
        streams: range | None = None,
    ) -> None:
        """`repeats` is K. With a dropout rate of 0, batches have no "dropout_bits_BP".

        With `streams`, batches are those streams' rows: one host's part of the global batch.
        """
        if not np.array_equal(index.counts, order.counts):
            raise ValueError(
                f"the order is of {order.num_samples} samples and the index of "
                f"{index.num_samples}, or of other shards: make the order from this index"
            )
        if mix:
            check_mixing(order)
        self.streams = range(order.num_streams) if streams is None else streams
        # A batch reads one window of every stream, or two where it crosses into the next window.
        touched = 2 * len(self.streams) * (order.window_shards + 1)
        self.samples = Samples(index.keeping(touched), num_classes)
        check_window_room(index, len(self.streams), order.window_shards)
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
        """Raises ValueError for a bad label, and for a shard that has changed or is unavailable."""
        return self.of_streams(step, self.streams)

    def of_streams(self, step: int, streams: range) -> Batch:
        """The rows of a batch that belong to these streams."""
        if self.samples.ahead:
            self.samples.ahead.want(step, partial(self.order.shards_ahead, streams=streams))
        rows = self.order.step(step, streams)
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
        """The ids and epochs of the samples that a batch shows, in order, without padding rows."""
        real = batch["weight_U"] > 0
        ids = [self.samples.name(int(number)) for number in batch["sample_U"][real]]
        return {"ids": ids, "epochs": batch["epoch_U"][real].tolist()}

    def ids(self, step: int) -> list[str]:
        """The ids of all samples in the global batch of update `step`, counted from 1."""
        rows = self.order.step(step - 1)
        return [self.samples.name(int(n)) for n in self.samples.numbers(rows)[rows.weight > 0]]

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
        """Draws which rows are mixed and how; the device mixes them."""
        images_per_stream = self.order.unique_per_step // self.order.num_streams
        layout = Layout(len(rows.row) // images_per_stream, images_per_stream, self.repeats)
        keys = list(zip(epoch_B.tolist(), sample_B.tolist(), view_B.tolist(), strict=True))
        mixes = draw_mixes(
            layout,
            self.image_size,
            sample_B=sample_B,
            stream_B=rows.stream.repeat(self.repeats),
            weight_B=batch["weight_U"].repeat(self.repeats),
            rng_of=lambda row: row_rng(MIX, self.seed, *keys[row]),
        )
        return {
            "layout": layout,
            "mix_outside_B": torch.from_numpy(mixes.outside_B),
            "mix_box_B4": torch.from_numpy(mixes.box_B4),
            "mix_ratio_B": torch.from_numpy(mixes.ratio_B),
            **{
                f"mix_{name}": batch[name][torch.from_numpy(mixes.partner_B)]
                for name in ("labels_B", "labels_BL", "label_weights_BL")
                if name in batch
            },
        }


class EvalBatches(Dataset[Batch]):
    """Every sample once, in index order; the last batch is padded with rows of weight 0."""

    def __init__(
        self,
        index: ShardIndex,
        *,
        num_classes: int,
        batch_size: int,
        image_size: int,
        margin: int,
        part: slice = slice(None),
    ) -> None:
        """With `part`, batches are that part of the rows: one host's of several."""
        check_evaluation_room(index)
        self.samples = Samples(index, num_classes)
        self.order = SequentialOrder(index.counts, batch_size)
        self.image_size = image_size
        self.margin = margin
        self.part = part

    @property
    def num_steps(self) -> int:
        return self.order.num_steps

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> Batch:
        if self.samples.ahead:
            self.samples.ahead.want(step, self.order.shards_ahead)
        rows = self.order.step(step, self.part)
        return _batch(step, rows, self.samples, self._view, self.image_size, repeats=1)

    def seen(self, number: int) -> Pixels:
        """Sample `number` as the model sees it."""
        pixels = self.samples.pixels(*self.samples.place(number))
        assert not isinstance(pixels, dict), pixels
        return self._view(pixels, 0, number, 0)

    def _view(self, pixels: Pixels, epoch: int, sample: int, view: int) -> Pixels:
        del epoch, sample, view
        return eval_view(pixels, size=self.image_size, margin=self.margin)


def _batch(
    step: int,
    rows: StepRows,
    samples: Samples,
    view_of: Callable[[Pixels, int, int, int], Pixels],
    size: int,
    repeats: int,
) -> Batch:
    """Common to training and evaluation: decode each image once, make K views of it."""
    sample_U, weight_U = samples.numbers(rows), rows.weight.copy()
    images_UKHWC = np.full((len(sample_U), repeats, size, size, 3), GREY, np.uint8)
    labels_U: list[list[tuple[int, float]]] = []
    missed: list[dict[str, Any]] = []
    for place, sample in enumerate(sample_U.tolist()):
        if place and not rows.weight[place] and sample == sample_U[place - 1]:
            images_UKHWC[place] = images_UKHWC[place - 1]
            labels_U.append(labels_U[-1])
            continue  # evaluation pads with one sample: decode it once
        shard, row, epoch = (int(column[place]) for column in (rows.shard, rows.row, rows.epoch))
        labels_U.append(samples.labels(shard, row))
        pixels = samples.pixels(shard, row)
        if isinstance(pixels, dict):
            if rows.weight[place]:
                missed.append({**pixels, "epoch": epoch, "sample": sample})
            weight_U[place] = 0
            continue
        for view in range(repeats):
            images_UKHWC[place, view] = view_of(pixels, epoch, sample, view)
    return {
        "step": step,
        "images_BHWC": torch.from_numpy(images_UKHWC.reshape(-1, size, size, 3)),
        **_label_tensors(labels_U, samples.index.max_labels, repeats),
        "weight_B": torch.from_numpy(weight_U.repeat(repeats)),
        "sample_U": sample_U,
        "epoch_U": rows.epoch,
        "weight_U": weight_U,
        "missed": missed,
    }


def _label_tensors(
    labels_U: list[list[tuple[int, float]]], most: int, repeats: int
) -> dict[str, torch.Tensor]:
    """Label tensors, of equal shape in every batch: `most` labels is the data set's maximum."""
    first_U = np.array([labels[0][0] for labels in labels_U])
    tensors = {"labels_B": torch.from_numpy(first_U.repeat(repeats))}
    if most > 1:
        labels_UL = first_U[:, None].repeat(most, axis=1)
        weights_UL = np.zeros(labels_UL.shape, np.float32)
        for place, labels in enumerate(labels_U):
            labels_UL[place, : len(labels)], weights_UL[place, : len(labels)] = zip(
                *labels, strict=True
            )
        tensors["labels_BL"] = torch.from_numpy(labels_UL.repeat(repeats, axis=0))
        tensors["label_weights_BL"] = torch.from_numpy(weights_UL.repeat(repeats, axis=0))
    return tensors
