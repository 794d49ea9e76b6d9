"""A run's inputs: shards, number of classes, order and batches; and the untrained network for
them."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from nfnets_xla.config import Run
from nfnets_xla.data.batches import EvalBatches, TrainBatches
from nfnets_xla.data.cache import open_cache
from nfnets_xla.data.exclude import without
from nfnets_xla.data.loader import Batches
from nfnets_xla.data.order import Order
from nfnets_xla.data.records import DIGEST
from nfnets_xla.data.shards import ShardIndex
from nfnets_xla.data.storage import address, is_below
from nfnets_xla.hosts import ALONE, Hosts
from nfnets_xla.models.card import SCHEME, WEIGHTS
from nfnets_xla.models.peers import is_peer
from nfnets_xla.models.registry import Network, create_network


def open_shards(run: Run) -> tuple[ShardIndex, ShardIndex | None]:
    if run.data.shards is None:
        raise ValueError("data.shards is not set; it must name a folder of indexed shards")
    held_out = None
    if run.data.eval_shards is not None:
        check_apart(run.data.shards, run.data.eval_shards)
        held_out = open_index(run, run.data.eval_shards)
    index = open_index(run, run.data.shards)
    if run.data.exclude is not None:
        index = without(index, run.data.exclude)
    if held_out is not None:
        check_unshared(index, held_out)
    return index, held_out


def check_apart(shards: str, eval_shards: str) -> None:
    """Raises ValueError if one folder is inside the other. The outer index includes the inner
    folder's shards, so held-out samples would be trained on, under ids that no list names."""
    if is_below(eval_shards, shards) or is_below(shards, eval_shards):
        raise ValueError(
            f"data.shards is {shards} and data.eval_shards {eval_shards}: one is inside the other, "
            "whose index then includes it; move it out, and index both again"
        )


def check_unshared(index: ShardIndex, held_out: ShardIndex) -> None:
    """Raises ValueError if a held-out shard, or a copy of it, is also a training shard that is not
    excluded completely."""
    one, other = (each.manifest.digests_S.view(f"S{DIGEST}") for each in (index, held_out))
    shared = np.flatnonzero(np.isin(one, other) & (index.counts > 0))
    if len(shared):
        twin = held_out.name(int(np.flatnonzero(other == one[shared[0]])[0]))
        raise ValueError(
            f"data.shards and data.eval_shards have {len(shared)} shards of the same samples "
            f"({index.folder}/{index.name(int(shared[0]))} and {held_out.folder}/{twin}): take "
            "them out of one of the two and index it again, or name the samples in data.exclude"
        )


def open_index(run: Run, shards: str) -> ShardIndex:
    folder = run.data.cache_dir
    sharers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's
    cache = None if folder is None else open_cache(folder, run.data.cache_bytes, sharers)
    return ShardIndex.load(shards, cache)


def check_cache(run: Run) -> None:
    """Raises ValueError for remote shards without a cache: one request per sample is too slow."""
    for shards in (run.data.shards, run.data.eval_shards):
        if run.data.cache_dir is None and (url := address(shards)):
            raise ValueError(
                f"{url} is read through a cache, and data.cache_dir is not set: name a folder on a "
                f"local disk that has data.cache_bytes={run.data.cache_bytes:.0f} bytes to spare"
            )


def sizes_of(run: Run) -> dict[str, int]:
    """The run's image sizes, as options for a network that is built for one size."""
    sizes = {"image_size": run.data.image_size}
    if run.data.eval_shards is not None:
        sizes["eval_image_size"] = run.data.eval_image_size
    return sizes


def untrained(run: Run, num_classes: int) -> Network:
    """The run's network with random weights; ValueError if it cannot be trained."""
    name, drop_path_rate = run.model.name, run.model.drop_path_rate
    options: dict[str, Any] = {"drop_path_rate": drop_path_rate}
    if name.startswith(SCHEME):
        raise ValueError(
            f"model.name is {name}: train the model that it is of, with model.init_from="
            f"{name.removeprefix(SCHEME)}/{WEIGHTS}"
        )
    if is_peer(name):
        if drop_path_rate:
            raise ValueError(
                f"model.drop_path_rate is {drop_path_rate} for {name}: timm's "
                "layers draw their own randomness, which no restart could repeat; give 0"
            )
        if (tag := run.model.pretrained) is not None:
            raise ValueError(f"model.pretrained is {tag!r} for {name}: it is for NFNets; give null")
        check_form(run)
        options = sizes_of(run)
    net = create_network(name, num_classes=num_classes, drop_rate=run.model.drop_rate, **options)
    running = [name for name, _ in net.named_buffers() if name.endswith("running_mean")]
    if running:
        raise ValueError(
            f"{name} keeps running statistics ({running[0]}), which neither SAM, the "
            "average nor an update left out would treat as weights: train one without BatchNorm"
        )
    return net


def check_form(run: Run) -> None:
    name, stacked = run.model.name, run.model.stacked
    if is_peer(name) and (stacked is True or run.model.recompute):
        raise ValueError(f"model.stacked and model.recompute are not for {name}")


def count_classes(run: Run, *indexes: ShardIndex | None) -> int:
    """Classes of the head. Raises ValueError if a label does not fit `data.num_classes`."""
    present = [index for index in indexes if index is not None]
    if run.data.num_classes is None:
        return max(index.num_classes for index in present)
    for index in present:
        if index.num_classes > run.data.num_classes:
            raise ValueError(
                f"data.num_classes is {run.data.num_classes}, but {index.folder} holds label "
                f"{index.num_classes - 1}: labels must be below it; raise data.num_classes"
            )
    return run.data.num_classes


def make_order(run: Run, index: ShardIndex) -> Order:
    """The order of unique images. With K views of each, K times fewer passes: equal compute."""
    data = run.data
    if data.batch_size % data.repeats:
        raise ValueError(
            f"data.batch_size is {data.batch_size}; it must be a multiple of data.repeats "
            f"({data.repeats}), so that every image of a batch has all its views"
        )
    return Order(
        counts=index.counts,
        seed=run.seed,
        num_streams=data.num_streams,
        unique_per_step=data.batch_size // data.repeats,
        window_shards=data.window_shards,
        epochs=run.optim.epochs / data.repeats,
    )


def make_train_batches(
    run: Run,
    index: ShardIndex,
    order: Order,
    num_classes: int,
    *,
    drop_path_rates: Sequence[float],
    num_features: int,
    hosts: Hosts = ALONE,
) -> TrainBatches:
    return TrainBatches(
        index,
        order,
        num_classes=num_classes,
        seed=run.seed,
        image_size=run.data.image_size,
        repeats=run.data.repeats,
        flip=run.data.flip,
        min_crop_area=run.data.min_crop_area,
        randaugment_ops=run.data.randaugment_ops,
        randaugment_magnitude=run.data.randaugment_magnitude,
        mix=run.data.mix == "mixup_cutmix",
        drop_path_rates=drop_path_rates,
        dropout_features=num_features,
        dropout_rate=run.model.drop_rate,
        streams=order.streams_of(hosts.number, hosts.count),
    )


def make_eval_batches(
    run: Run, held_out: ShardIndex, num_classes: int, hosts: Hosts
) -> EvalBatches:
    return EvalBatches(
        held_out,
        num_classes=num_classes,
        batch_size=run.data.eval_batch_size,
        image_size=run.data.eval_image_size,
        margin=run.data.eval_margin,
        part=hosts.rows(run.data.eval_batch_size),
    )


def make_eval_loader(run: Run, held_out: ShardIndex, num_classes: int, hosts: Hosts) -> Batches:
    dataset = make_eval_batches(run, held_out, num_classes, hosts)
    return Batches(dataset, start_step=0, stop_step=len(dataset), workers=run.data.workers)
