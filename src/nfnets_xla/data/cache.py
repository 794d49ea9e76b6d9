"""A bounded folder of copies on a local disk, shared by all processes of a host.

    cache = Cache(Path("/mnt/ssd/shards"), limit=200 * 10**9)
    copy = cache.open("3f2a.tar", fetch)  # `fetch` is called if no process has the copy yet

What holds, whenever a process is killed:

- a copy has its name only when it is whole: it is written under another and then renamed;
- one process fetches a copy, the others wait for it; a lock ends with the process that holds it;
- copies and what is reserved for those on their way are never more than `limit` bytes: the least
  recently used give way first. Names on the disk are all the bookkeeping there is.

A reader opens a copy for each read: of a deleted file that is kept open the disk keeps the bytes,
and they would count for nothing here.
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

OWN = "nfnets-xla-shards"  # within the folder that is given: nothing else there is deleted
LOCK, PART = ".lock", ".part"
POLL = 0.05  # seconds between looks whether others have left room

Room = Callable[[int], Path]  # of so many bytes: where to write a file of that size
Fetch = Callable[[Room], None]  # writes a copy into the room that it asks for, once


@dataclass(frozen=True)
class Cache:
    """The keys are file names, each of which stands for one content."""

    folder: Path  # on a local disk: locks are flock's
    limit: float  # bytes
    sharers: int = 1  # processes of this machine, each of which reads shards of its own through it

    def open(self, key: str, fetch: Fetch) -> OpenFile:
        """The copy, fetched if it is not there. Raises what `fetch` raises, and ValueError for a
        file that is larger than the whole cache."""
        if file := self._opened(key):
            return file
        with _held(self._lock(key), wait=True):
            return self._opened(key) or self._fetched(key, fetch)

    def bring(self, key: str, fetch: Fetch) -> None:
        """Fetch the copy unless it is there, or another process is at it. The copy becomes the most
        recently used."""
        if self._opened(key):
            return
        with _held(self._lock(key), wait=False) as held:
            if held and not self._opened(key):
                self._fetched(key, fetch)

    def keep(self, key: str) -> None:
        """Have a copy, if it is there, be the last to give way."""
        with suppress(FileNotFoundError):
            _use(self.folder / key)

    def drop(self, key: str) -> None:
        """Forget a copy that is not what it should be."""
        (self.folder / key).unlink(missing_ok=True)

    def _opened(self, key: str) -> OpenFile | None:
        self.keep(key)
        try:
            return OpenFile(self.folder / key)
        except FileNotFoundError:
            return None

    def _fetched(self, key: str, fetch: Fetch) -> OpenFile:
        """Opened before it can be evicted again, so that whoever fetches also reads."""
        parts: list[Path] = []

        def room(size: int) -> Path:
            parts.append(self._make_room(key, size))
            return parts[-1]

        try:
            fetch(room)
            file = OpenFile(parts[-1])
            # Not synced: a copy that a crash of the machine has spoiled fails its checksums.
            _use(parts[-1])
            with _held(self.folder / LOCK, wait=True):  # who counts sees it under one name
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
                    if entry.on_its_way and entry.key == key:  # of a process that was killed
                        entry.path.unlink(missing_ok=True)
                if self._evict(self.limit - size):
                    part.touch()
                    return part
            time.sleep(POLL)  # until another download is whole, and may be evicted

    def _evict(self, limit: float) -> bool:
        """Delete until there are at most `limit` bytes; False if what is left is on its way."""
        entries = list(self._entries())
        used = sum(entry.size for entry in entries)
        # What a killed process left goes first: its lock can be had.
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
    """In a folder of its own within this one. Raises ValueError for a folder that cannot be made or
    written."""
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
    size: int  # bytes; of what is on its way, those that it will have
    used: int  # nanoseconds, when it was last read
    on_its_way: bool


def _use(path: Path) -> None:
    """Write down that the file is used now, by a clock that does not stand still for milliseconds,
    as a file system's own does."""
    now = time.time_ns()
    try:
        os.utime(path, ns=(now, now))
    except PermissionError:  # the owner's right alone
        os.utime(path)


@contextmanager
def _held(path: Path, *, wait: bool) -> Iterator[bool]:
    """Holds a lock, and says whether: without `wait`, not if another has it.

    Its file goes with it. Who waited for one that is deleted by now has to begin again.
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
