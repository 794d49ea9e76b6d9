"""Shards: WebDataset tars in a folder, an index beside them, and samples read by offset.

A shard is any tar whose members `<key>.<extension>` lie together by key, as WebDataset has it. The
index is `index.json`, which lists the shards, and for each a `<shard>.idx.npz`, which says where
its images lie. It is a function of the tars alone, and so is its fingerprint, which names the data
in a run's record: a run that resumes finds the same samples in the same places, or is told.

    index = build_index("shards")        # once; afterwards ShardIndex.load("shards")
    data = index.read(shard=3, row=17)   # the image's bytes, checked
    label = index.label(shard=3, row=17)

Shape suffixes: S shards, N samples of one shard.
"""

import hashlib
import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, fields
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import IO, Any, NamedTuple
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

FORMAT = 1
MANIFEST = "index.json"
SIDECAR = ".idx.npz"  # after the shard's whole name
TARS = "[!.]*.tar"
IMAGES = ("png", "jpg", "jpeg", "webp")
LABELS = ("cls", "json", "txt")  # the first that a sample has counts
MAX_LABEL = 2**31 - 1
BLOCK = 512  # bytes: of a tar's header, and what its members are padded to

# Shards a process keeps open: above what a batch of 64 streams in windows of 4 shards touches, and
# below the 1,024 files that a process may commonly open.
OPEN_SHARDS = 512

Members = dict[str, tarfile.TarInfo]  # of one sample, by extension


@dataclass(frozen=True)
class Shard:
    """A line of the manifest."""

    name: str  # with .tar
    count: int  # samples
    bytes: int  # of the tar
    digest: str  # of its records


class Records(NamedTuple):
    """A sidecar: where the samples of one shard lie. Little-endian, so that digests agree."""

    keys: NDArray[np.uint8]  # all keys end to end, in UTF-8
    key_ends_N: NDArray[np.int64]
    offsets_N: NDArray[np.int64]  # of the image's first byte in the tar
    sizes_N: NDArray[np.int64]  # bytes of the image
    labels_N: NDArray[np.int64]
    crcs_N: NDArray[np.uint32]  # CRC-32 of the image's tar header and data

    def digest(self) -> str:
        sha = hashlib.sha256()
        for name, values in self._asdict().items():
            sha.update(f"{name} {values.dtype.str} {len(values)}\n".encode() + values.tobytes())
        return sha.hexdigest()

    def key(self, row: int) -> str:
        start = int(self.key_ends_N[row - 1]) if row else 0
        return self.keys[start : int(self.key_ends_N[row])].tobytes().decode()


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The samples of a folder, by shard and row. Pickles as its manifest, without open files."""

    folder: Path
    shards: tuple[Shard, ...]  # in the order of their names
    num_classes: int  # largest label + 1

    @classmethod
    def load(cls, folder: str | Path) -> "ShardIndex":
        """Read the manifest. Raises ValueError if there is none, or if the shards do not fit it."""
        folder = _local(folder)
        if not (folder / MANIFEST).exists():
            raise ValueError(f"{folder} has no {MANIFEST}; {_rebuild(folder)}")
        try:
            manifest = json.loads((folder / MANIFEST).read_bytes())
            shards = tuple(Shard(**shard) for shard in manifest["shards"])
            index = cls(folder, shards, manifest["num_classes"])
            if (manifest["format"], manifest["fingerprint"]) != (FORMAT, index.fingerprint):
                raise ValueError("another format, or altered by hand")
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{folder / MANIFEST} is not a whole index of format {FORMAT} ({error}); "
                f"{_rebuild(folder)}"
            ) from error
        index._check_folder()
        return index

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled without its caches, for the loader's workers."""
        return ShardIndex, tuple(getattr(self, field.name) for field in fields(self))

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(shard.name for shard in self.shards)

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Samples of each shard, (S,)."""
        return np.array([shard.count for shard in self.shards], np.int64)

    @cached_property
    def num_samples(self) -> int:
        return int(self.counts.sum())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of each shard's name, count, size and samples in order."""
        return hashlib.sha256(json.dumps([astuple(s) for s in self.shards]).encode()).hexdigest()

    def sample_id(self, shard: int, row: int) -> str:
        """`<shard's name without .tar>/<key>`; the key itself may have slashes."""
        return f"{self.names[shard].removesuffix('.tar')}/{self._open(shard).records.key(row)}"

    def label(self, shard: int, row: int) -> int:
        return int(self.labels(shard)[row])

    def labels(self, shard: int) -> NDArray[np.int64]:
        """Labels of one shard, (N,)."""
        return self._open(shard).records.labels_N

    def read(self, shard: int, row: int) -> bytes:
        """The image as it is in the tar. Raises ValueError if it is not what was indexed."""
        opened = self._open(shard)
        offset, size = int(opened.records.offsets_N[row]), int(opened.records.sizes_N[row])
        member = os.pread(opened.descriptor, BLOCK + size, offset - BLOCK)
        if zlib.crc32(member) != opened.records.crcs_N[row]:
            key = opened.records.key(row)
            place = f"{self.names[shard]}, key {key}, {size} bytes at offset {offset}"
            raise _mismatch(self.folder, f"{place}: wrong checksum; restore the shard")
        return member[BLOCK:]

    @cached_property
    def _open(self) -> Callable[[int], "OpenShard"]:
        # Bound to the fields, not to self: a cycle would keep files open after the index is gone.
        return lru_cache(OPEN_SHARDS)(partial(OpenShard, self.folder, self.shards))

    def _check_folder(self) -> None:
        """Raises ValueError unless the tars and sidecars there are those of the manifest."""
        sizes = {path.name: path.stat().st_size for path in self.folder.glob(TARS)}
        indexed = {shard.name: shard.bytes for shard in self.shards}
        for name in sorted(sizes | indexed):
            if name not in sizes:
                raise _mismatch(self.folder, f"{name} is missing")
            if name not in indexed:
                raise _mismatch(self.folder, f"{name} is not in it")
            if sizes[name] != indexed[name]:
                fault = f"{name} has {sizes[name]} bytes instead of {indexed[name]}"
                raise _mismatch(self.folder, fault)
            if not (self.folder / (name + SIDECAR)).exists():
                raise _mismatch(self.folder, f"{name}{SIDECAR} is missing")


class OpenShard:
    """Records and a file descriptor, which closes when the last reader lets go of it."""

    def __init__(self, folder: Path, shards: tuple[Shard, ...], number: int) -> None:
        shard = shards[number]
        try:
            with np.load(folder / (shard.name + SIDECAR), allow_pickle=False) as arrays:
                self.records = Records(**arrays)
            if self.records.digest() != shard.digest:
                raise ValueError("of another index")
        except Exception as error:  # of a damaged file, zipfile and numpy raise nearly anything
            raise _mismatch(folder, f"{shard.name}{SIDECAR} is damaged ({error})") from error
        self.descriptor = os.open(folder / shard.name, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


# ---- building ---------------------------------------------------------------------------------


def build_index(
    folder: str | Path, *, on_progress: Callable[[int, int], None] | None = None
) -> ShardIndex:
    """Index every *.tar of a local folder, and write the index into it, the manifest last.

    Shards are scanned one by one, or as an enclosing `joblib.parallel_config` says. `on_progress`
    is called with (shards done, shards). Raises ValueError for a shard that is not a whole tar, or
    has a sample without one image and a label.
    """
    from joblib import Parallel, delayed  # here, for readers of an index do without it

    folder = _local(folder)
    paths = sorted(folder.glob(TARS))
    if not paths:
        raise ValueError(f"{folder} holds no shards: give a folder that has files named *.tar")
    shards: list[Shard] = []
    num_classes = 0
    scans: Any = Parallel(return_as="generator")(delayed(scan_shard)(path) for path in paths)
    for path, records in zip(paths, scans, strict=True):
        _write(folder / (path.name + SIDECAR), partial(np.savez, **records._asdict()))
        size = path.stat().st_size
        shards.append(Shard(path.name, len(records.labels_N), size, records.digest()))
        num_classes = max(num_classes, int(records.labels_N.max()) + 1)
        if on_progress:
            on_progress(len(shards), len(paths))
    index = ShardIndex(folder, tuple(shards), num_classes)
    manifest = {"format": FORMAT, "fingerprint": index.fingerprint, "num_classes": num_classes}
    manifest["shards"] = [asdict(shard) for shard in shards]
    _write(folder / MANIFEST, lambda file: file.write(json.dumps(manifest, indent=1).encode()))
    return index


def scan_shard(path: Path) -> Records:
    """Records of one tar, in its order. Raises ValueError as `build_index` does."""
    try:
        with (
            path.open("rb") as file,
            tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="strict") as tar,
        ):
            samples = _group(path, tar)
            # tarfile takes a broken header for the end, and stops where `cat` joined two tars. The
            # true end is two blocks of zeros, and more of them up to a record of 10 KiB.
            file.seek(tar.offset)
            tail = file.read(2**16)
            if len(tail) < 2 * BLOCK or tail.strip(b"\0"):
                raise tarfile.ReadError(f"it does not end at offset {tar.offset}")
            keys = [key.encode() for key in samples]
            rows = [_row(f"sample {key} of {path}", samples[key], file) for key in samples]
    except (tarfile.TarError, UnicodeError) as error:
        raise ValueError(
            f"{path} is not a whole, uncompressed tar ({error}): copy or pack it again"
        ) from error
    if not rows:
        raise ValueError(f"{path} holds no samples (key.jpg, key.cls): take it out of the folder")
    ends_N = np.cumsum([len(key) for key in keys], dtype="<i8")
    offsets_N, sizes_N, labels_N, crcs_N = np.array(rows, "<i8").T
    joined = np.frombuffer(b"".join(keys), "u1")
    return Records(joined, ends_N, offsets_N, sizes_N, labels_N, crcs_N.astype("<u4"))


def _group(path: Path, tar: tarfile.TarFile) -> dict[str, Members]:
    """Members by key and lower-case extension: webdataset's rule, but none may lie apart."""
    samples: dict[str, Members] = {}
    last = None
    for member in tar:
        directory, slash, name = member.name.rpartition("/")
        stem, dot, extension = name.partition(".")
        is_meta = re.match(r"__[^/]*__($|/)", member.name)
        if not (member.isreg() and stem and dot) or is_meta or member.issparse():
            continue
        key, extension = directory + slash + stem, extension.lower()
        if not key.isprintable():
            raise ValueError(f"{path} has key {key!r}: pack it with printable names")
        parts = samples.setdefault(key, {})
        if extension in parts:
            raise ValueError(f"{path} has duplicate key {key} (.{extension}): give each its own")
        if parts and key != last:
            raise ValueError(f"{path} has members of sample {key} apart: pack it sorted by name")
        parts[extension], last = member, key
    return samples


def _row(sample: str, members: Members, file: IO[bytes]) -> tuple[int, int, int, int]:
    """Offset, size, label and CRC-32 of a sample's image."""
    images = [members[extension] for extension in IMAGES if extension in members]
    if len(images) != 1:
        raise ValueError(
            f"{sample} has {len(images) or 'no'} image: pack it with one .{', .'.join(IMAGES)}"
        )
    image = images[0]
    file.seek(image.offset_data - BLOCK)
    checksum = zlib.crc32(file.read(BLOCK + image.size))
    return image.offset_data, image.size, _label(sample, members, file), checksum


def _label(sample: str, members: Members, file: IO[bytes]) -> int:
    kind = next((extension for extension in LABELS if extension in members), None)
    if kind is None:
        raise ValueError(f"{sample} has no label: pack it with a .{', .'.join(LABELS)}")
    file.seek(members[kind].offset_data)
    text = file.read(members[kind].size)
    label = None
    with suppress(ValueError, LookupError, TypeError, RecursionError):
        if kind == "json":
            label = json.loads(text)["label"]
        elif text.strip().isdigit():  # int() alone takes 1_0, too
            label = int(text)
    if type(label) is not int or not 0 <= label <= MAX_LABEL:
        raise ValueError(
            f"{sample} has label {text[:60]!r} in .{kind}: pack it with a whole number of 0 to "
            f'{MAX_LABEL}, in .json as {{"label": number}}'
        )
    return label


# ---- files ------------------------------------------------------------------------------------


def _write(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """The whole file or, if `write` fails or the machine stops, the one that was there."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _local(folder: str | Path) -> Path:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(folder)):  # Path makes gs:/a of gs://a
        raise ValueError(
            f"{folder} is remote: remote shards are not supported yet; copy them to a local folder"
        )
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder: give one that holds shards (*.tar)")
    return Path(folder)


def _mismatch(folder: Path, fault: str) -> ValueError:
    return ValueError(f"{folder}: index no longer matches its shards: {fault}; {_rebuild(folder)}")


def _rebuild(folder: Path) -> str:
    return f"run `nfnets-xla shards index {folder}`"
