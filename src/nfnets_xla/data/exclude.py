"""Samples in the shards that are not to be shown: duplicates, held-out ones, faulty ones.

A list is a text file of sample ids, `shard/key`, one per line; text after a tab is for people
(`shards dedup` writes the reason there). `resolve` finds their rows, and reads the sidecars of the
named shards for that. A list of millions is resolved once, by `nfnets-xla shards exclude`, into an
.npz file of rows, which is valid only for that index.

    index = without(ShardIndex.load("shards"), "duplicates.txt")
"""

import io
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nfnets_xla.data.npz import Arrays, from_npz
from nfnets_xla.data.records import SIDECAR, Records
from nfnets_xla.data.shards import MANIFEST, Exclusions, ShardIndex, short_name
from nfnets_xla.data.storage import Folder

RESOLVED = ".npz"


def without(index: ShardIndex, path: str | Path) -> ShardIndex:
    """The index less the samples of a list. Raises ValueError for a list that does not fit it."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file: give a list of sample ids, one on a line")
    if path.suffix == RESOLVED:
        exclusions = load_exclusions(path, index)
    else:
        exclusions = resolve(index, read_ids(path), str(path))
    left = replace(index, exclusions=exclusions)
    if not left.num_samples:
        raise ValueError(f"{path} excludes every sample of {index.folder}: shorten the list")
    return left


def read_ids(path: Path) -> list[str]:
    """The ids: the first tab-separated field of each line that is not empty."""
    return [fields[0] for fields in _read_fields(path)]


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Pairs of ids, sample and match, from a list that `shards dedup` has written."""
    rows = _read_fields(path)
    if any(len(fields) < 2 for fields in rows):
        raise ValueError(f"{path} is no list of pairs: give one of `nfnets-xla shards dedup`")
    return [(fields[0], fields[1]) for fields in rows]


def _read_fields(path: Path) -> list[list[str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file of sample ids ({error})") from error
    return [line.split("\t") for line in lines if line]


def resolve(index: ShardIndex, ids: Iterable[str], source: str = "the list") -> Exclusions:
    """The rows of the samples. Raises ValueError for an unknown id, and if there are no ids."""
    numbers = {short_name(index.name(shard)): shard for shard in range(index.num_shards)}
    keys: dict[int, list[str]] = {}
    for sample_id in ids:
        shard, slash, key = sample_id.partition("/")
        if not slash or shard not in numbers:
            raise ValueError(_unknown(sample_id, source, index))
        keys.setdefault(numbers[shard], []).append(key)
    if not keys:
        raise ValueError(f"{source} names no samples: make it again, or exclude nothing")
    rows: dict[int, NDArray[np.uint32]] = {}
    for shard in sorted(keys):
        row_of = rows_by_key(index.records(shard))
        missing = [key for key in keys[shard] if key not in row_of]
        if missing:
            sample_id = f"{short_name(index.name(shard))}/{missing[0]}"
            raise ValueError(_unknown(sample_id, source, index))
        rows[shard] = np.unique(np.array([row_of[key] for key in keys[shard]], np.uint32))
    return Exclusions(
        shards_E=np.array(sorted(rows), np.int64),
        ends_E=np.cumsum([len(rows[shard]) for shard in sorted(rows)], dtype=np.int64),
        rows=np.concatenate([np.zeros(0, np.uint32), *(rows[shard] for shard in sorted(rows))]),
    )


def rows_by_key(records: Records) -> dict[str, int]:
    return {records.key(row): row for row in range(records.num_samples)}


def check_output(path: Path) -> None:
    """Raises ValueError for an invalid path, before any long work."""
    if path.suffix != RESOLVED:
        raise ValueError(f"{path} must end in {RESOLVED}: rows are no text")
    if path.name == MANIFEST or path.name.endswith(SIDECAR):
        raise ValueError(f"{path} has the name of an index's file: give another, FILE{RESOLVED}")
    if not path.parent.is_dir():
        raise ValueError(f"{path} is in no folder that is there: make {path.parent}")


def save_exclusions(path: Path, index: ShardIndex, exclusions: Exclusions) -> None:
    check_output(path)
    file = io.BytesIO()
    fingerprint = np.frombuffer(bytes.fromhex(index.manifest.fingerprint()), "u1")
    np.savez(file, **exclusions._asdict(), fingerprint=fingerprint)
    Folder(path.parent).write(path.name, file.getvalue())


def load_exclusions(path: Path, index: ShardIndex) -> Exclusions:
    """Raises ValueError for a list of another index."""
    fault = f"{path} is damaged, or no resolved list; {_again(index)}"
    exclusions, fingerprint = from_npz(path.read_bytes(), _ordered, fault)
    if fingerprint != index.manifest.fingerprint():
        raise ValueError(f"{path} was resolved against another index; {_again(index)}")
    return exclusions


def _ordered(arrays: Arrays) -> tuple[Exclusions, str]:
    """The exclusions, and the fingerprint of the index they are for."""
    fingerprint = arrays.pop("fingerprint").tobytes().hex()
    exclusions = Exclusions(**arrays)
    ends_E = exclusions.ends_E
    is_whole = len(ends_E) == 0 or ends_E[-1] == len(exclusions.rows)
    if not is_whole or not np.all(np.diff(exclusions.shards_E) > 0):
        raise ValueError("altered by hand")
    return exclusions, fingerprint


def _unknown(sample_id: str, source: str, index: ShardIndex) -> str:
    return (
        f"{source} names {sample_id!r}, which is not in {index.folder}: a line must be the id "
        "shard/key of a sample there"
    )


def _again(index: ShardIndex) -> str:
    return f"run `nfnets-xla shards exclude {index.folder} IDS FILE{RESOLVED}`"
