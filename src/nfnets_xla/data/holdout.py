"""A held-out split by hash of the key, the same however the samples are packed into shards.

The split consists of the samples with the smallest hashes. They are copied into separate shards for
evaluation, with a list of their ids for training to exclude. Keys must be unique over all shards;
numbers that start again in each shard are not.

A group of near-duplicates (`dedup.py`) is held out, or left, as a whole: every sample in it gets
the smallest hash of the group.
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
MAX_EXCESS = 0.01  # largest excess over the wanted size, as a share, from repeated keys


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

    `alike` are pairs of ids that must not be separated; all must be in the index."""
    if not 0 < samples < index.num_samples:
        raise ValueError(
            f"{samples} samples are to be held out of {index.num_samples}: hold out at least one, "
            "and leave one"
        )
    where = local(folder)
    if is_below(Path(folder) / IDS, index.folder) or is_below(index.folder, folder):
        raise ValueError(
            f"{folder} is inside {index.folder}, or the other way round, and an index includes the "
            "shards of all subfolders: choose a folder beside it"
        )
    check_empty(where, IDS)
    chosen = choose(index, samples, alike=alike, engine=engine, jobs=jobs, on_progress=on_progress)
    ids = [index.sample_id(shard, row) for shard, row in chosen]

    def copies() -> Iterator[Sample]:
        for number, (shard, row) in enumerate(chosen):
            data = index.read(shard, row)
            if not data:  # still listed, so training does not show it either
                continue
            # Keys are numbers, as the original ones may repeat; line n of the list has the id.
            yield f"{number:08d}", data, extension_of(data), index.labels(shard, row)

    # The list comes first: without the whole list, existing shards would be trained on.
    is_new = not Path(folder).exists()
    Path(folder).mkdir(parents=True, exist_ok=True)
    claim(Path(folder, IDS))
    try:
        Folder(folder).write(IDS, "".join(f"{sample_id}\n" for sample_id in ids).encode())
        pack_samples(copies(), folder, samples_per_shard=samples_per_shard, prefix="held-out")
    except BaseException:  # without shards, the list would exclude what nobody evaluates
        Path(folder, IDS).unlink(missing_ok=True)
        if is_new:
            with suppress(OSError):  # not empty: in use by another process
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

    Samples with the same key are held out together, and so are groups of `alike`; if the last group
    does not fit, fewer are held out. Raises ValueError if too many samples share a key.
    """
    # Twice the wanted share, plus 6 standard deviations for small numbers, is surely enough to
    # choose from, and keeps the jobs' results small.
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
    # If many samples share one hash, fewer may be below the limit.
    last = found[samples - 1] if len(found) >= samples else limit
    count = int(np.searchsorted(found, last, side="right"))
    if smallest and count > samples:  # the last group does not fit: leave it out
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
    """A 64-bit BLAKE2b hash, personalised so that it is independent of other hashes of keys."""
    digest = hashlib.blake2b(key.encode(), digest_size=8, person=b"nfnets held out").digest()
    return int.from_bytes(digest, "little")


def group_hashes(alike: Iterable[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """{shard's name: {key: smallest hash in the sample's group}}."""
    groups: dict[str, list[str]] = {}  # {id: all ids of its group}
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
    """For one shard, given as (name, manifest key, excluded rows, {key: group's hash}): the hashes
    up to `limit`, their rows, and an id that is in a group but not in the shard, if any."""
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
        f"{sample_id!r} is in a group of near-duplicates, but not a sample of {index.folder}: give "
        "a list that was made from these shards"
    )
