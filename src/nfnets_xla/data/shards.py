"""Shards: WebDataset tars in a folder, an index beside them, and reading samples by offset.

The index has two levels. The manifest, `index.npz`, is held in memory: 32 bytes per shard plus its
name. Each shard's sidecar (`records.py`) says where its samples are, and is read with the shard.
Both depend only on the tars, and so does the fingerprint, which identifies the data in a run's
record: a run that resumes finds the same samples in the same places, or is refused.

    index = build_index("shards")        # data/index.py, once; afterwards ShardIndex.load("shards")
    data = index.read(shard=3, row=17)   # the image's bytes, checked

Shards are numbered in the order of their names, rows in the order of the tar. Excluded samples
(`exclude.py`) have no row: only the remaining ones are counted, ordered and read here.

Shape suffixes: S shards.
"""

import hashlib
import io
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nfnets_xla.data.cache import Cache
from nfnets_xla.data.npz import Arrays, from_npz
from nfnets_xla.data.records import DIGEST, SIDECAR, Records
from nfnets_xla.data.remote import AnyFolder, CachedFile, RangeFile, open_folder
from nfnets_xla.data.storage import SHARD, Folder, OpenFile
from nfnets_xla.data.tar import BLOCK

FORMAT = 2
MANIFEST = "index.npz"

AnyFile = OpenFile | CachedFile | RangeFile

# Bytes per sample in a sidecar, estimated: 24, the key, and further labels.
SIDECAR_SAMPLE = 100

# Attempts to read content that is wrong though its length is right: servers have been seen to send
# half of a file, with half its length and status 200. A permanently wrong file should fail fast.
READS = 6

# Shards kept open per process: below the usual limit of 1,024 open files.
OPEN_FILES = 512


class Manifest(NamedTuple):
    """All shards, in the order of their names. Little-endian, so that fingerprints agree."""

    names: NDArray[np.uint8]  # all names end to end, in UTF-8
    name_ends_S: NDArray[np.uint32]
    counts_S: NDArray[np.uint32]  # samples
    bytes_S: NDArray[np.int64]  # of the tar
    digests_S: NDArray[np.void]  # of the records
    head: NDArray[np.int64]  # format, largest label + 1, the most labels of a sample

    def name(self, shard: int) -> str:
        start = int(self.name_ends_S[shard - 1]) if shard else 0
        return self.names[start : int(self.name_ends_S[shard])].tobytes().decode()

    def key(self, shard: int) -> str:
        """The key of cached copies: it identifies everything that is read of the shard."""
        return self.digests_S[shard].tobytes().hex()

    def fingerprint(self) -> str:
        sha = hashlib.sha256()
        for name, values in self._asdict().items():
            sha.update(f"{name} {values.dtype.str} {len(values)}\n".encode() + values.tobytes())
        return sha.hexdigest()


class Exclusions(NamedTuple):
    """Excluded rows, for the E shards that have any."""

    shards_E: NDArray[np.int64]  # ascending
    ends_E: NDArray[np.int64]  # of each shard's part of `rows`
    rows: NDArray[np.uint32]  # ascending within a shard

    def of(self, shard: int) -> NDArray[np.uint32]:
        place = int(np.searchsorted(self.shards_E, shard))
        if place == len(self.shards_E) or self.shards_E[place] != shard:
            return self.rows[:0]
        return self.rows[int(self.ends_E[place - 1]) if place else 0 : int(self.ends_E[place])]

    def digest(self) -> bytes:
        parts = [self.shards_E.astype("<i8"), self.ends_E.astype("<i8"), self.rows.astype("<u4")]
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).digest()


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The samples of a folder, by shard and row. Pickles as its manifest, without open files."""

    folder: AnyFolder
    manifest: Manifest
    exclusions: Exclusions | None = None
    open_sidecars: int = OPEN_FILES  # kept in memory; should cover the shards of a batch

    @classmethod
    def load(cls, folder: str | Path | AnyFolder, cache: Cache | None = None) -> "ShardIndex":
        """Read the manifest. Raises ValueError if there is none, or if local shards do not fit it.

        Remote shards are not listed, which takes minutes for 400,000, but checked against the
        manifest as they are read: through `cache`, or without one by a request per sample.
        """
        where = open_folder(folder, cache)
        index = cls(where, _read_manifest(where))
        if isinstance(where, Folder):
            index._check_folder(where)
        return index

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled without its caches, for the loader's workers."""
        return ShardIndex, tuple(getattr(self, field.name) for field in fields(self))

    def keeping(self, open_sidecars: int) -> "ShardIndex":
        """The same index, keeping up to `open_sidecars` sidecars in memory."""
        return replace(self, open_sidecars=open_sidecars)

    @property
    def num_shards(self) -> int:
        return len(self.manifest.counts_S)

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Samples of each shard, (S,)."""
        counts_S = self.manifest.counts_S.astype(np.int64)
        if self.exclusions is not None:
            counts_S[self.exclusions.shards_E] -= np.diff(self.exclusions.ends_E, prepend=0)
        return counts_S

    @cached_property
    def num_samples(self) -> int:
        return int(self.counts.sum())

    @property
    def num_classes(self) -> int:
        """Largest label + 1, excluded samples included: a head may not depend on them."""
        return int(self.manifest.head[1])

    @property
    def max_labels(self) -> int:
        """The most labels that any sample has, also including excluded samples."""
        return int(self.manifest.head[2])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of each shard's name, count, size and samples, in their order,
        and of the rows that are excluded."""
        fingerprint = self.manifest.fingerprint()
        if self.exclusions is None:
            return fingerprint
        return hashlib.sha256(fingerprint.encode() + self.exclusions.digest()).hexdigest()

    def name(self, shard: int) -> str:
        return self.manifest.name(shard)

    def sample_id(self, shard: int, row: int) -> str:
        """`<shard's file name without .tar>/<key>`; the key itself may have slashes."""
        records, row = self._at(shard, row)
        return f"{short_name(self.name(shard))}/{records.key(row)}"

    def labels(self, shard: int, row: int) -> dict[int, float]:
        """Labels of a sample with their weights."""
        records, row = self._at(shard, row)
        return records.labels(row)

    def offset(self, shard: int, row: int) -> int:
        """The offset of the image's first byte in the shard."""
        records, row = self._at(shard, row)
        return int(records.offsets_N[row])

    def read(self, shard: int, row: int) -> bytes:
        """The image's bytes in the tar. Raises ValueError if they are not those indexed."""
        records, row = self._at(shard, row)
        offset, size = int(records.offsets_N[row]), int(records.sizes_N[row])
        file = self._file(shard)
        for _ in range(READS):
            member = file.read(offset - BLOCK, BLOCK + size)
            if zlib.crc32(member) == records.crcs_N[row]:
                return member[BLOCK:]
            if not file.refresh():
                break
        place = f"{self.name(shard)}, key {records.key(row)}, {size} bytes at offset {offset}"
        fix = "restore the shard, or to take it as it is, index it with --force"
        raise _mismatch(self.folder, f"{place}: wrong checksum; {fix}")

    def records(self, shard: int) -> Records:
        """The whole sidecar of a shard, including excluded samples."""
        return self._opened(shard).records

    def sidecars(self) -> list[tuple[str, str]]:
        """For each shard, the (name, key) that `read_records` needs in another process."""
        return [(self.name(shard), self.manifest.key(shard)) for shard in range(self.num_shards)]

    def excluded(self, shard: int) -> NDArray[np.uint32]:
        """The excluded rows of a shard's sidecar."""
        return _excluded(self.exclusions, shard)

    def bring(self, shard: int) -> None:
        """Fetch a remote shard and its sidecar into the cache, unless another process does."""
        for file in self._copies(shard):
            file.bring()

    def keep(self, shard: int) -> None:
        """Make a remote shard's cached files the last to be evicted."""
        for file in self._copies(shard):
            file.keep()

    def _copies(self, shard: int) -> Iterator[CachedFile]:
        name, key = self.name(shard), self.manifest.key(shard)
        for file in (_sidecar(self.folder, name, key), self._file(shard)):
            assert isinstance(file, CachedFile)
            yield file

    def check_room(self, num_shards: int, what: str) -> None:
        """Raises ValueError if the cache cannot hold any `num_shards` shards for each sharer."""
        cache = self.folder.cache
        if cache is None:
            return
        num_shards *= cache.sharers
        bytes_S = self.manifest.bytes_S + SIDECAR_SAMPLE * self.manifest.counts_S.astype(np.int64)
        need = int(np.sort(bytes_S)[-num_shards:].sum())
        if cache.limit < need:
            of_each = f" of each of {cache.sharers} processes" * (cache.sharers > 1)
            raise ValueError(
                f"data.cache_bytes is {cache.limit:.0f}, and {what}{of_each} hold up to {need} "
                f"bytes of {self.folder}: raise it to that or more"
            )

    def _at(self, shard: int, row: int) -> tuple[Records, int]:
        """The sidecar, and the row in it."""
        opened = self._opened(shard)
        return opened.records, row if opened.kept is None else int(opened.kept[row])

    # Both caches are bound to fields, not to self: a reference cycle would keep files open after
    # the index is deleted.

    @cached_property
    def _opened(self) -> Callable[[int], "_Sidecar"]:
        make = partial(_open_sidecar, self.folder, self.manifest, self.exclusions)
        return lru_cache(self.open_sidecars)(make)

    @cached_property
    def _file(self) -> Callable[[int], AnyFile]:
        return lru_cache(OPEN_FILES)(partial(_open_file, self.folder, self.manifest))

    def _check_folder(self, folder: Folder) -> None:
        """Raises ValueError unless the folder's tars and sidecars match the manifest."""
        sizes, sidecars = folder.sizes(), folder.sizes(SHARD + SIDECAR)
        for shard in range(self.num_shards):
            name, indexed = self.name(shard), int(self.manifest.bytes_S[shard])
            size = sizes.pop(name, None)
            if size is None:
                raise _mismatch(self.folder, f"{name} is missing")
            if size != indexed:
                raise _mismatch(self.folder, f"{name} has {size} bytes instead of {indexed}")
            if name + SIDECAR not in sidecars:
                raise _mismatch(self.folder, f"{name}{SIDECAR} is missing")
        if sizes:
            raise _mismatch(self.folder, f"{min(sizes)} is not in it")


class _Sidecar(NamedTuple):
    records: Records
    kept: NDArray[np.int64] | None  # rows that are left, if any is excluded


def _open_sidecar(
    folder: AnyFolder, manifest: Manifest, exclusions: Exclusions | None, shard: int
) -> _Sidecar:
    records = read_records(folder, manifest.name(shard), manifest.key(shard))
    excluded = _excluded(exclusions, shard)
    kept = np.delete(np.arange(records.num_samples), excluded) if len(excluded) else None
    return _Sidecar(records, kept)


def read_records(folder: AnyFolder, name: str, key: str) -> Records:
    """The sidecar of the shard with this name and key in the manifest. Raises ValueError if it is
    missing, damaged or of another index."""
    try:
        file = _sidecar(folder, name, key)
        records = _records(file.whole(), key)
        for _ in range(READS - 1):
            if not isinstance(records, str) or not file.refresh():
                break
            records = _records(file.whole(), key)
    except FileNotFoundError as error:
        raise _mismatch(folder, f"{name}{SIDECAR} is missing ({error})") from error
    if isinstance(records, str):
        raise _mismatch(folder, f"{name}{SIDECAR} is {records}")
    return records


def _records(data: bytes, key: str) -> Records | str:
    """The records in a sidecar's bytes; or what is wrong with them."""
    try:
        records = Records.from_bytes(data)
    except ValueError as error:
        return str(error)
    return records if records.digest().hex() == key else "of another index"


def _excluded(exclusions: Exclusions | None, shard: int) -> NDArray[np.uint32]:
    return np.zeros(0, np.uint32) if exclusions is None else exclusions.of(shard)


def _open_file(folder: AnyFolder, manifest: Manifest, shard: int) -> AnyFile:
    name, size = manifest.name(shard), int(manifest.bytes_S[shard])
    return folder.indexed(name, manifest.key(shard) + SHARD, size)


def _sidecar(folder: AnyFolder, name: str, key: str) -> AnyFile:
    return folder.indexed(name + SIDECAR, key + SIDECAR, None)


# ---- manifests --------------------------------------------------------------------------------


class Line(NamedTuple):
    """What the manifest keeps of one shard."""

    name: str
    num_samples: int
    num_bytes: int  # of the tar
    digest: bytes
    num_classes: int
    max_labels: int


def make_manifest(lines: list[Line]) -> Manifest:
    names = [line.name.encode() for line in lines]
    classes = max(line.num_classes for line in lines)
    return Manifest(
        names=np.frombuffer(b"".join(names), "u1"),
        name_ends_S=np.cumsum([len(name) for name in names]).astype("<u4"),
        counts_S=np.array([line.num_samples for line in lines], "<u4"),
        bytes_S=np.array([line.num_bytes for line in lines], "<i8"),
        digests_S=np.frombuffer(b"".join(line.digest for line in lines), f"V{DIGEST}"),
        head=np.array([FORMAT, classes, max(line.max_labels for line in lines)], "<i8"),
    )


def manifest_bytes(manifest: Manifest) -> bytes:
    file = io.BytesIO()
    fingerprint = np.frombuffer(bytes.fromhex(manifest.fingerprint()), "u1")
    np.savez(file, **manifest._asdict(), fingerprint=fingerprint)
    return file.getvalue()


def _read_manifest(folder: AnyFolder) -> Manifest:
    for read in range(1, READS + 1):
        try:
            data = folder.read(MANIFEST)
        except FileNotFoundError:
            raise ValueError(f"{folder} has no {MANIFEST}; {folder.how_to_index}") from None
        fault = f"{folder}/{MANIFEST} is damaged, or no index of format {FORMAT}"
        try:
            return from_npz(data, _of_format, f"{fault}; {folder.how_to_index}")
        except ValueError:
            if isinstance(folder, Folder) or read == READS:
                raise
    raise AssertionError("the last read returns or raises")


def _of_format(arrays: Arrays) -> Manifest:
    fingerprint = arrays.pop("fingerprint").tobytes().hex()
    manifest = Manifest(**arrays)
    if manifest.head[0] != FORMAT or manifest.fingerprint() != fingerprint:
        raise ValueError("another format, or altered by hand")
    return manifest


def short_name(name: str) -> str:
    """A shard's file name without its folder and .tar: what the ids of its samples begin with."""
    return name.rpartition("/")[2].removesuffix(SHARD)


def _mismatch(folder: AnyFolder, fault: str) -> ValueError:
    return ValueError(
        f"{folder}: index no longer matches its shards: {fault}; {folder.how_to_index}"
    )
