"""All faults of a folder of shards, by shard and byte offset; and statistics of its content.

Indexing stops at the first fault; `lint` names them all, and decodes every image.
"""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nfnets_xla.data.decode import decode
from nfnets_xla.data.index import same_names, same_samples, shard_sizes
from nfnets_xla.data.jobs import Progress, map_jobs
from nfnets_xla.data.remote import AnyFolder, open_folder
from nfnets_xla.data.scan import scan_shard
from nfnets_xla.data.shards import ShardIndex, read_records
from nfnets_xla.data.tar import Fault

# Smaller or longer pictures are icons, trackers and separators, not photographs.
MIN_SIDE = 8  # pixels
MAX_ASPECT = 32


class ShardFault(NamedTuple):
    shard: str
    offset: int
    what: str

    def __str__(self) -> str:
        return f"{self.shard}, offset {self.offset}: {self.what}"


def lint(
    folder: str | Path,
    *,
    engine: str = "local",
    jobs: int = 1,
    on_progress: Progress | None = None,
) -> list[ShardFault]:
    """Scan all shards of a folder; needs no index and writes none. Raises ValueError for shards'
    names that cannot be printed."""
    where = open_folder(folder)
    names = list(shard_sizes(where))
    job = partial(_lint_shard, where)
    scans = map_jobs(job, names, engine=engine, jobs=jobs, on_progress=on_progress)
    found: list[ShardFault] = []
    digests: list[tuple[str, Any]] = []
    for name, (faults, digest) in zip(names, scans, strict=True):
        found += [ShardFault(name, *fault) for fault in faults]
        if digest is not None:  # covers intact samples; a copy has the same faults, too
            digests.append((name, (digest, *faults)))
    twice = same_names(names) + same_samples(digests)
    return sorted(found + [ShardFault(name, 0, what) for name, what in twice])


def check_image(data: bytes) -> str | None:
    """What is wrong with an image file, or None. The decoder itself refuses pictures too large."""
    try:
        height, width, _ = decode(data).shape
    except ValueError as error:
        return str(error)
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
        return (
            f"{width} x {height} pixels: sides must have {MIN_SIDE} or more, and one be at most "
            f"{MAX_ASPECT} times the other"
        )
    return None


def _lint_shard(folder: AnyFolder, name: str) -> tuple[list[Fault], bytes | None]:
    records, faults = scan_shard(folder.open(name), check_image)
    return faults, None if records is None else records.digest()


# ---- what there is ----------------------------------------------------------------------------


class _Part(NamedTuple):
    """Statistics of one shard."""

    smallest: int  # image, in bytes
    largest: int
    image_bytes: int
    class_counts: dict[int, int]  # {class: samples}


def stats(
    index: ShardIndex,
    *,
    engine: str = "local",
    jobs: int = 1,
    on_progress: Progress | None = None,
) -> dict[str, str]:
    """Statistics of an index, as lines to print; they include excluded samples."""
    job, shards = partial(_shard_stats, index.folder), index.sidecars()
    per_class: Counter[int] = Counter()
    smallest, largest, image_bytes = 2**63, 0, 0
    for part in map_jobs(job, shards, engine=engine, jobs=jobs, on_progress=on_progress):
        per_class.update(part.class_counts)
        smallest, largest = min(smallest, part.smallest), max(largest, part.largest)
        image_bytes += part.image_bytes
    samples = int(index.manifest.counts_S.sum(dtype=np.int64))
    per_sample = f"mean {per_class.total() / samples:.2f}, at most {index.max_labels}"
    empty = index.num_classes - len(per_class)
    spread = _spread(np.array(list(per_class.values())), empty)
    return {
        "samples": f"{samples:,}",
        "shards": f"{len(shards):,}, each of {_spread(index.manifest.counts_S)} samples",
        "bytes": f"{int(index.manifest.bytes_S.sum()):,}",
        "image bytes": f"{smallest:,} to {largest:,} (mean {image_bytes // samples:,})",
        "labels per sample": per_sample,
        "classes": f"{index.num_classes:,}, each of {spread} samples; {empty:,} empty",
        "fingerprint": index.fingerprint,
    }


def _shard_stats(folder: AnyFolder, shard: tuple[str, str]) -> _Part:
    records = read_records(folder, *shard)
    sizes = records.sizes_N
    total = int(sizes.sum(dtype=np.int64))
    classes, counts = np.unique(records.labels_M, return_counts=True)
    per_class = dict(zip(classes.tolist(), counts.tolist(), strict=True))
    return _Part(int(sizes.min()), int(sizes.max()), total, per_class)


def _spread(values: np.ndarray, zeros: int = 0) -> str:
    """Smallest, largest and median of `values` and `zeros` zeros."""
    last, ordered = len(values) + zeros - 1, np.sort(values)
    low, below, above, high = (
        int(ordered[place - zeros]) if place >= zeros else 0
        for place in (0, last // 2, -(-last // 2), last)
    )
    return f"{low:,} to {high:,} (median {(below + above) // 2:,})"
