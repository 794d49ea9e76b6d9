"""A held-out split by hash of the key: the same samples however they are packed into shards.

The split is the samples with the smallest hashes. They are copied into shards of their own, which
evaluation reads like any others, with the list of their ids beside them, which training excludes.
Keys must tell samples apart over all shards; numbers that start anew in each shard do not.
"""

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nfnets_xla.data.jobs import Progress, map_jobs
from nfnets_xla.data.pack import Sample, pack_samples
from nfnets_xla.data.records import SIDECAR, Records
from nfnets_xla.data.remote import AnyFolder
from nfnets_xla.data.shards import ShardIndex
from nfnets_xla.data.sources import extension_of

IDS = "held_out.txt"
MAX_EXCESS = 0.01  # of the split, by keys that several samples share


def hold_out(
    index: ShardIndex,
    folder: str | Path,
    *,
    samples: int,
    samples_per_shard: int = 1000,
    engine: str = "local",
    jobs: int = 1,
    on_progress: Progress | None = None,
) -> list[str]:
    """Copy the split into `folder`, as shards and a list of ids; returns the ids."""
    if not 0 < samples < index.num_samples:
        raise ValueError(
            f"{samples} samples are to be held out of {index.num_samples}: hold out at least one, "
            "and leave one"
        )
    chosen = choose(index, samples, engine=engine, jobs=jobs, on_progress=on_progress)
    ids = [index.sample_id(shard, row) for shard, row in chosen]

    def copies() -> Iterator[Sample]:
        for number, (shard, row) in enumerate(chosen):
            data = index.read(shard, row)
            # Numbered: keys may repeat over shards. The n-th line of the list says which it was.
            yield f"{number:08d}", data, extension_of(data), index.labels(shard, row)

    pack_samples(copies(), folder, samples_per_shard=samples_per_shard, prefix="held-out")
    (Path(folder) / IDS).write_text("".join(f"{sample_id}\n" for sample_id in ids))
    return ids


def choose(
    index: ShardIndex,
    samples: int,
    *,
    engine: str = "local",
    jobs: int = 1,
    on_progress: Progress | None = None,
) -> list[tuple[int, int]]:
    """(shard, row) of the samples with the smallest hashes, by hash and then by id.

    Samples that share a key are held out together. Raises ValueError if too many do.
    """
    # Twice the share that is wanted, and 6 deviations of small numbers, are surely enough to choose
    # from, and keep what the jobs hand back small.
    share = (2 * samples + 6 * samples**0.5 + 10) / index.num_samples
    limit = np.uint64(min(share, 1.0) * (2**64 - 2**11))
    job = partial(_hashes, index.folder, limit)
    shards = [(index.name(shard), index.excluded(shard)) for shard in range(index.num_shards)]
    parts = list(map_jobs(job, shards, engine=engine, jobs=jobs, on_progress=on_progress))
    hashes = np.concatenate([hashes for hashes, _ in parts])
    rows = np.concatenate([rows for _, rows in parts])
    of = np.repeat(np.arange(index.num_shards), [len(rows) for _, rows in parts])
    places = np.lexsort([rows, of, hashes])
    last = hashes[places[samples - 1]]
    count = int(np.searchsorted(hashes[places], last, side="right"))
    if count > samples + MAX_EXCESS * samples:
        raise ValueError(
            f"{index.folder}: keys repeat, so that {count} samples would be held out instead of "
            f"{samples}: pack them again with keys that are unique over all shards"
        )
    return [(int(of[place]), int(rows[place])) for place in places[:count]]


def key_hash(key: str) -> int:
    """64 bits; BLAKE2b with a name of its own, so that no other use of the key agrees with it."""
    digest = hashlib.blake2b(key.encode(), digest_size=8, person=b"nfnets held out").digest()
    return int.from_bytes(digest, "little")


def _hashes(
    folder: AnyFolder, limit: np.uint64, shard: tuple[str, NDArray[np.uint32]]
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Of one shard and its excluded rows: the hashes up to a limit, and the rows that have them."""
    name, excluded = shard
    records = Records.from_bytes(folder.read(name + SIDECAR))
    hashes = [key_hash(records.key(row)) for row in range(records.num_samples)]
    left = np.delete(np.array(hashes, np.uint64), excluded)
    rows = np.flatnonzero(left <= limit)
    return left[rows], rows
