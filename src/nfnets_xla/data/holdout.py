"""A held-out split by hash of the key: the same samples however they are packed into shards.

The split is the samples with the smallest hashes. They are copied into shards of their own, which
evaluation reads like any others, with the list of their ids beside them, which training excludes.
Keys must tell samples apart over all shards; numbers that start anew in each shard do not.

A group of near-duplicates (`dedup.py`) is held out as a whole, or left as a whole: each has the
smallest of its hashes.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from nfnets_xla.data.jobs import Progress, map_jobs
from nfnets_xla.data.pack import Sample, check_empty, claim, pack_samples
from nfnets_xla.data.remote import AnyFolder
from nfnets_xla.data.shards import ShardIndex, read_records, short_name
from nfnets_xla.data.sources import extension_of
from nfnets_xla.data.storage import Folder, is_below, local

IDS = "held_out.txt"
MAX_EXCESS = 0.01  # of the split, by keys that several samples share


def hold_out(
    index: ShardIndex,
    folder: str | Path,
    *,
    samples: int,
    samples_per_shard: int = 1000,
    alike: Iterable[tuple[str, str]] = (),
    engine: str = "local",
    jobs: int = 1,
    on_progress: Progress | None = None,
) -> list[str]:
    """Copy the split into `folder`, as shards and a list of ids; returns the ids. A failure leaves
    nothing behind.

    `alike` are pairs of ids that must not be parted, all of samples that are there."""
    if not 0 < samples < index.num_samples:
        raise ValueError(
            f"{samples} samples are to be held out of {index.num_samples}: hold out at least one, "
            "and leave one"
        )
    where = local(folder)
    if is_below(Path(folder) / IDS, index.folder) or is_below(index.folder, folder):
        raise ValueError(
            f"{folder} and {index.folder}, of which samples are to be held out, lie in each other, "
            "and an index takes in the shards of all folders below: choose a folder beside it"
        )
    check_empty(where, IDS)
    chosen = choose(index, samples, alike=alike, engine=engine, jobs=jobs, on_progress=on_progress)
    ids = [index.sample_id(shard, row) for shard, row in chosen]

    def copies() -> Iterator[Sample]:
        for number, (shard, row) in enumerate(chosen):
            data = index.read(shard, row)
            if not data:  # listed, and so shown to nobody
                continue
            # Numbered: keys may repeat over shards. The n-th line of the list says which it was.
            yield f"{number:08d}", data, extension_of(data), index.labels(shard, row)

    # The list first: without it, or with a part of it, shards that are there would be trained on.
    is_new = not Path(folder).exists()
    Path(folder).mkdir(parents=True, exist_ok=True)
    claim(Path(folder, IDS))
    try:
        Folder(folder).write(IDS, "".join(f"{sample_id}\n" for sample_id in ids).encode())
        pack_samples(copies(), folder, samples_per_shard=samples_per_shard, prefix="held-out")
    except BaseException:  # no shards are there now: the list would leave out what nobody evaluates
        Path(folder, IDS).unlink(missing_ok=True)
        if is_new:
            with suppress(OSError):  # not empty: another process's by now
                Path(folder).rmdir()
        raise
    return ids


def choose(
    index: ShardIndex,
    samples: int,
    *,
    alike: Iterable[tuple[str, str]] = (),
    engine: str = "local",
    jobs: int = 1,
    on_progress: Progress | None = None,
) -> list[tuple[int, int]]:
    """(shard, row) of the samples with the smallest hashes, by hash and then by id.

    Samples that share a key are held out together; so are pairs of ids that are alike, and if that
    is too many, a few less. Raises ValueError if too many share a key.
    """
    # Twice the share that is wanted, and 6 deviations of small numbers, are surely enough to choose
    # from, and keep what the jobs hand back small.
    share = (2 * samples + 6 * samples**0.5 + 10) / index.num_samples
    limit = np.uint64(min(share, 1.0) * (2**64 - 2**11))
    job = partial(_hashes, index.folder, limit)
    smallest = group_hashes(alike)
    names = {short_name(index.name(shard)) for shard in range(index.num_shards)}
    if strangers := sorted(smallest.keys() - names):
        refuse_unknown(index, f"{strangers[0]}/{min(smallest[strangers[0]])}")
    shards = [
        (name, key, index.excluded(shard), smallest.get(short_name(name), {}))
        for shard, (name, key) in enumerate(index.sidecars())
    ]
    parts = list(map_jobs(job, shards, engine=engine, jobs=jobs, on_progress=on_progress))
    for unknown in filter(None, (unknown for _, _, unknown in parts)):
        refuse_unknown(index, unknown)
    hashes = np.concatenate([hashes for hashes, _, _ in parts])
    rows = np.concatenate([rows for _, rows, _ in parts])
    of = np.repeat(np.arange(index.num_shards), [len(rows) for _, rows, _ in parts])
    places = np.lexsort([rows, of, hashes])
    found = hashes[places]
    # Where many samples have one hash there may be fewer below the limit.
    last = found[samples - 1] if len(found) >= samples else limit
    count = int(np.searchsorted(found, last, side="right"))
    if smallest and count > samples:  # the last group does not fit: fewer, then
        count = int(np.searchsorted(found, last)) or count
    grouped = [value for by_key in smallest.values() for value in by_key.values()]
    single = found[:count][~np.isin(found[:count], np.array(grouped, np.uint64))]
    shared = len(single) - len(np.unique(single))
    if len(found) < samples or max(count - samples, shared) > MAX_EXCESS * samples:
        raise ValueError(
            f"{index.folder}: keys repeat, so that {count} samples with {count - shared} keys "
            f"would be held out instead of {samples}: pack them again with keys that are unique "
            "over all shards"
        )
    return [(int(of[place]), int(rows[place])) for place in places[:count]]


def key_hash(key: str) -> int:
    """64 bits; BLAKE2b with a name of its own, so that no other use of the key agrees with it."""
    digest = hashlib.blake2b(key.encode(), digest_size=8, person=b"nfnets held out").digest()
    return int.from_bytes(digest, "little")


def group_hashes(alike: Iterable[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """By shard's name and key, the smallest hash of the group that a sample is in."""
    groups: dict[str, list[str]] = {}  # by each of its ids
    for one, other in alike:
        joined = groups.setdefault(one, [one])
        also = groups.setdefault(other, [other])
        if joined is not also:
            if len(joined) < len(also):
                joined, also = also, joined
            joined += also
            groups.update(dict.fromkeys(also, joined))
    found: dict[str, dict[str, int]] = {}
    for group in {id(group): group for group in groups.values()}.values():
        parts = [sample_id.partition("/") for sample_id in group]
        smallest = min(key_hash(key) for _, _, key in parts)
        for shard, _, key in parts:
            found.setdefault(shard, {})[key] = smallest
    return found


def _hashes(
    folder: AnyFolder,
    limit: np.uint64,
    shard: tuple[str, str, NDArray[np.uint32], Mapping[str, int]],
) -> tuple[NDArray[np.uint64], NDArray[np.int64], str | None]:
    """Of one shard, its excluded rows and its keys that have another's hash: the hashes up to a
    limit, the rows that have them, and the id of a key that it should have and has not."""
    name, key, excluded, smallest = shard
    records = read_records(folder, name, key)
    keys = [records.key(row) for row in range(records.num_samples)]
    hashes = [smallest[key] if key in smallest else key_hash(key) for key in keys]
    left = np.delete(np.array(hashes, np.uint64), excluded)
    rows = np.flatnonzero(left <= limit)
    absent = min(smallest.keys() - set(keys), default=None) if smallest else None
    unknown = None if absent is None else f"{short_name(name)}/{absent}"
    return left[rows], rows, unknown


def refuse_unknown(index: ShardIndex, sample_id: str) -> NoReturn:
    raise ValueError(
        f"{sample_id!r} is to stay with what is like it, and is no sample of {index.folder}: give "
        "a list that was made of these shards"
    )
