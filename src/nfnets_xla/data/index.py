"""Builds an index: scans every shard of a folder once, in any number of processes.

A shard's sidecar is written as soon as it is scanned, the manifest last. So a stopped run, given
again, continues where it left off: a shard that is older than its sidecar is not read again.
"""

from collections.abc import Hashable, Iterable
from functools import partial
from pathlib import Path

import numpy as np

from nfnets_xla.data.jobs import Progress, map_jobs
from nfnets_xla.data.records import SIDECAR, Records
from nfnets_xla.data.remote import AnyFolder, open_folder
from nfnets_xla.data.scan import scan_shard
from nfnets_xla.data.shards import (
    MANIFEST,
    Line,
    ShardIndex,
    make_manifest,
    manifest_bytes,
    short_name,
)


def build_index(
    folder: str | Path | AnyFolder,
    *,
    engine: str = "local",
    jobs: int = 1,
    force: bool = False,
    on_progress: Progress | None = None,
) -> ShardIndex:
    """Index every *.tar in a folder and its subfolders, and write the index beside them.

    With `force`, all shards are scanned again. Raises ValueError for a shard's name that is not
    printable, for two shards with the same file name or samples, for the first fault of a shard
    (`lint.py` lists them all), and for an address that cannot be written to.
    """
    where = open_folder(folder)
    sizes = shard_sizes(where)
    twice = same_names(list(sizes))
    if twice:
        raise ValueError(f"{folder}: {twice[0][1]}")
    job = partial(index_shard, where, force)
    shards = list(sizes.items())
    lines = list(map_jobs(job, shards, engine=engine, jobs=jobs, on_progress=on_progress))
    twice = same_samples((line.name, line.digest) for line in lines)
    if twice:
        raise ValueError(f"{folder}: {twice[0][1]}")
    manifest = make_manifest(lines)
    where.write(MANIFEST, manifest_bytes(manifest))
    return ShardIndex(where, manifest)


def index_shard(folder: AnyFolder, force: bool, shard: tuple[str, int]) -> Line:
    """Scan a shard (name, size) and write its sidecar, or read one that is up to date."""
    name, size = shard
    records = None if force else _up_to_date(folder, name, size)
    if records is None:
        before = folder.placed(name)
        file = folder.open(name)
        size, scan = file.size, scan_shard(file)
        if scan.faults or scan.records is None:
            more = f" (and {len(scan.faults) - 1} more: run `nfnets-xla shards lint {folder}`)"
            fault = scan.faults[0]
            raise ValueError(
                f"{folder}/{name}, offset {fault.offset}: {fault.what}"
                + (more if len(scan.faults) > 1 else "")
            )
        records = scan.records
        if folder.placed(name) != before:  # else the sidecar would seem up to date
            raise ValueError(
                f"{folder}/{name} was changed while it was read: when it is whole, give the same "
                "command again"
            )
        folder.write(name + SIDECAR, records.to_bytes())
    classes = int(records.labels_M.max()) + 1
    return Line(name, records.num_samples, size, records.digest(), classes, records.max_labels)


def _up_to_date(folder: AnyFolder, name: str, size: int) -> Records | None:
    written, changed = folder.modified(name + SIDECAR), folder.placed(name)
    if written is None or changed is None or written <= changed:
        return None
    try:
        records = Records.from_bytes(folder.read(name + SIDECAR))
    except ValueError:
        return None
    return records if np.all(records.offsets_N + records.sizes_N <= size) else None


def shard_sizes(folder: AnyFolder) -> dict[str, int]:
    """{name: bytes} of all shards. Raises ValueError if there are none, and for a name that could
    not be written in a list of ids (UTF-8, one per line)."""
    sizes = folder.sizes()
    if not sizes:
        raise ValueError(f"{folder} holds no shards: give a folder that has files named *.tar")
    for name in sizes:
        if not name.isprintable():
            raise ValueError(f"{folder} holds {name!r}, which is not printable in UTF-8: rename it")
    return sizes


def same_names(names: list[str]) -> list[tuple[str, str]]:
    """Shards whose sample ids would be the same, each with a description of the fault."""
    first: dict[str, str] = {}
    found: list[tuple[str, str]] = []
    for name in names:
        other = first.setdefault(short_name(name), name)
        if other != name:
            found.append((name, f"{name} and {other} have one file name: rename one of them"))
    return found


def same_samples(digests: Iterable[tuple[str, Hashable]]) -> list[tuple[str, str]]:
    """Shards that are a copy of, or link to, another, each with a description of the fault."""
    first: dict[Hashable, str] = {}
    found: list[tuple[str, str]] = []
    for name, digest in digests:
        other = first.setdefault(digest, name)
        if other != name:
            what = f"{name} and {other} hold the same samples, as a copy or a link does"
            found.append((name, f"{what}: take one of them out"))
    return found
