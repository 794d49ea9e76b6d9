"""A bounded folder of copies on a local disk, shared by all processes of a host.

    cache = Cache(Path("/mnt/ssd/shards"), limit=200 * 10**9)
    copy = cache.open("3f2a.tar", fetch)  # `fetch` is called if no process has the copy yet

These guarantees hold even if a process is killed at any time:

- a copy gets its name only when it is whole: it is written under another name, then renamed;
- one process fetches a copy while the others wait; a lock ends with the process that holds it;
- copies, and the space reserved for downloads, never exceed `limit` bytes: the least recently used
  copies are evicted first. The file names are the only bookkeeping.

A reader opens a copy anew for each read: the disk keeps the bytes of a deleted file while it is
open, and they would not be counted here.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from nfnets_xla.data.storage import OpenFile, local

OWN = "nfnets-xla-shards"  # subfolder of data.cache_dir: nothing outside it is deleted
LOCK, PART = ".lock", ".part"
POLL = 0.05  # seconds between checks whether there is room now

Room = Callable[[int], Path]  # reserves that many bytes; returns the path to write to
Fetch = Callable[[Room], None]  # asks for room once, and writes the copy there


@dataclass(frozen=True)
class Cache:
    """Keys are file names; one key always stands for the same content."""

    folder: Path  # on a local disk: locks are flock's
    limit: float  # bytes
    sharers: int = 1  # processes of this machine that read different shards through it

    def open(self, key: str, fetch: Fetch) -> OpenFile:
        """The copy, fetched if missing. Raises what `fetch` raises, and ValueError for a file that
        is larger than the whole cache."""
        if file := self._opened(key):
            return file
        with _held(self._lock(key), wait=True):
            return self._opened(key) or self._fetched(key, fetch)

    def bring(self, key: str, fetch: Fetch) -> None:
        """Fetch the copy unless it is there or another process is fetching it. It becomes the most
        recently used."""
        if self._opened(key):
            return
        with _held(self._lock(key), wait=False) as held:
            if held and not self._opened(key):
                self._fetched(key, fetch)

    def keep(self, key: str) -> None:
        """Make a copy, if it is there, the last to be evicted."""
        with suppress(FileNotFoundError):
            _use(self.folder / key)

    def drop(self, key: str) -> None:
        """Delete a copy with wrong content."""
        (self.folder / key).unlink(missing_ok=True)

    def _opened(self, key: str) -> OpenFile | None:
        self.keep(key)
        try:
            return OpenFile(self.folder / key)
        except FileNotFoundError:
            return None

    def _fetched(self, key: str, fetch: Fetch) -> OpenFile:
        """Fetch and open a copy; it is opened before another process could evict it."""
        parts: list[Path] = []

        def room(size: int) -> Path:
            parts.append(self._make_room(key, size))
            return parts[-1]

        try:
            fetch(room)
            file = OpenFile(parts[-1])
            # Not synced: a copy that a machine's crash has damaged fails its checksums.
            _use(parts[-1])
            with _held(self.folder / LOCK, wait=True):  # others count it under one name only
                parts[-1].replace(self.folder / key)
            return file
        finally:
            for part in parts:
                part.unlink(missing_ok=True)

    def _make_room(self, key: str, size: int) -> Path:
        """An empty file whose name reserves `size` bytes."""
        if size > self.limit:
            raise ValueError(
                f"{key} has {size} bytes, more than the {self.limit:.0f} of the whole cache: raise "
                "data.cache_bytes"
            )
        part = self.folder / f"{key}.{size}{PART}"
        while True:
            with _held(self.folder / LOCK, wait=True):
                for entry in self._entries():
                    if entry.on_its_way and entry.key == key:  # left by a killed process
                        entry.path.unlink(missing_ok=True)
                if self._evict(self.limit - size):
                    part.touch()
                    return part
            time.sleep(POLL)  # until another download is complete, and may be evicted

    def _evict(self, limit: float) -> bool:
        """Evict down to `limit` bytes; False if that is impossible, as downloads take more."""
        entries = list(self._entries())
        used = sum(entry.size for entry in entries)
        # Parts left by killed processes go first: nobody holds their locks.
        for entry in sorted(entries, key=lambda entry: (not entry.on_its_way, entry.used)):
            if used <= limit:
                break
            if entry.on_its_way:
                with _held(self._lock(entry.key), wait=False) as held:
                    if not held:
                        continue
                    entry.path.unlink(missing_ok=True)
            else:
                entry.path.unlink(missing_ok=True)
            used -= entry.size
        return used <= limit

    def _entries(self) -> Iterator["_Entry"]:
        for path in self.folder.iterdir():
            if path.name.endswith(LOCK) or path.is_dir():
                continue
            with suppress(FileNotFoundError):  # it may have been renamed or dropped by now
                stat, on_its_way = path.stat(), path.name.endswith(PART)
                key, size = path.name, stat.st_size
                if on_its_way:
                    key, reserved = path.name.removesuffix(PART).rsplit(".", 1)
                    size = max(size, int(reserved))
                yield _Entry(path, key, size, stat.st_mtime_ns, on_its_way)

    def _lock(self, key: str) -> Path:
        return self.folder / f"{key}{LOCK}"


def open_cache(folder: str | Path, limit: float, sharers: int = 1) -> Cache:
    """The cache in a subfolder of `folder`. Raises ValueError if that cannot be made or written."""
    path = local(folder) / OWN
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"data.cache_dir is {folder}, which cannot be made ({error})") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(
            f"data.cache_dir is {folder}, where {OWN} cannot be written: name another folder"
        )
    return Cache(path.resolve(), limit, sharers)


class _Entry(NamedTuple):
    path: Path
    key: str
    size: int  # bytes; for a download, its final size
    used: int  # nanoseconds, when it was last read
    on_its_way: bool


def _use(path: Path) -> None:
    """Record that the file is used now, with a clock finer than the file system's own, which
    advances only every few milliseconds."""
    now = time.time_ns()
    try:
        os.utime(path, ns=(now, now))
    except PermissionError:  # only the owner may set other times than now
        os.utime(path)


@contextmanager
def _held(path: Path, *, wait: bool) -> Iterator[bool]:
    """Holds a lock, and yields whether it does: without `wait`, not if another process has it.

    The lock's file is deleted on release; a process that waited for a deleted file tries again.
    """
    descriptor = _take(path, wait)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            path.unlink()
            os.close(descriptor)


def _take(path: Path, wait: bool) -> int | None:
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)  # as any file: the umask decides
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass  # deleted between the two lines
        os.close(descriptor)
