"""Shards and checkpoints at an address: `gs://`, `s3://`, `http(s)://`, or any that fsspec knows.

`RemoteFolder` has the interface of `storage.Folder`. Files that an index describes are fetched
whole into a cache (`cache.py`) or, without one, read by ranges. A request that fails is repeated,
with growing waits, if its failure may be temporary. Credentials, endpoints and proxies are settings
of fsspec (its configuration files, or FSSPEC_<PROTOCOL>_<OPTION> in the environment).
"""

import errno
import logging
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

from nfnets_xla.data.cache import Cache, Fetch, Room
from nfnets_xla.data.storage import SHARD, Folder, OpenFile, address
from nfnets_xla.exits import Unreachable

Out = TypeVar("Out")

LONGEST_WAIT = 60.0  # seconds between two attempts
FAMILIAR = 3  # from this many failures in a row on, each is reported
PASSING = (408, 425, 429)  # HTTP statuses among 400 to 499 that may be temporary
AGREEING = 5  # answers in a row with the same wrong length: then the file has changed
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)  # not the network's


class Patience(NamedTuple):
    """How long a request is repeated."""

    total: float  # seconds after which it is not repeated any more
    first_wait: float  # seconds; doubles, up to LONGEST_WAIT
    timeout: float  # seconds without a byte after which it has failed


PATIENCE = Patience(total=300.0, first_wait=1.0, timeout=60.0)


def open_folder(where: "str | Path | AnyFolder", cache: Cache | None = None) -> "AnyFolder":
    """A local folder, or one at an address. Raises ValueError for what is neither."""
    if isinstance(where, Folder | RemoteFolder):
        return where
    url = address(where)
    return RemoteFolder(url, cache) if url else Folder(where)


@dataclass(frozen=True)
class RemoteFolder:
    """Shards and the files beside them, by names relative to the folder, with slashes.

    Raises a ValueError that names a file which is unavailable; but FileNotFoundError if `read`
    finds no file.
    """

    url: str
    cache: Cache | None = None
    patience: Patience = PATIENCE

    def __post_init__(self) -> None:
        """Raises ValueError for an address that nothing installed can read."""
        try:
            _ = self._files
        except ImportError as error:
            raise ValueError(
                f"{self.url} cannot be read: {error}: pip install 'nfnets-xla[remote]'"
            ) from error
        except ValueError as error:
            raise ValueError(
                f"{self.url} cannot be read ({error}): give a local folder, gs://, s3:// or http(s)://"
            ) from error

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled without its connections, for other processes."""
        return RemoteFolder, (self.url, self.cache, self.patience)

    def __str__(self) -> str:
        return self.url

    @property
    def how_to_index(self) -> str:
        if self._is_http:
            return (
                "run `nfnets-xla shards index` on the shards where they lie, and publish index.npz "
                "and *.idx.npz beside them"
            )
        return f"run `nfnets-xla shards index {self.url}`"

    def sizes(self, ending: str = SHARD) -> dict[str, int]:
        """{name: bytes} of all files with this ending, sorted by name, without hidden ones."""
        if self._is_http:
            raise ValueError(f"{self.url} can be neither listed nor written: {self.how_to_index}")
        found = self._tried("", lambda: self._files.find(self.url, detail=True, withdirs=False))
        top = self._files._strip_protocol(self.url).strip("/") + "/"
        sizes = {name.strip("/").removeprefix(top): info for name, info in found.items()}
        return {
            name: int(info["size"])
            for name, info in sorted(sizes.items())
            if name.endswith(ending) and not re.search(r"(^|/)\.", name)
        }

    def modified(self, name: str) -> int | None:
        """When the file was last written, in nanoseconds; None if missing or unknown."""
        try:
            at = self._tried(name, lambda: self._files.modified(self._at(name)))
        except (FileNotFoundError, NotImplementedError):
            return None
        return int(at.timestamp() * 1e6) * 1000

    placed = modified  # object stores use the time of upload

    def open(self, name: str) -> OpenFile:
        """A temporary copy, to be read once; deleted when it is closed."""
        with tempfile.TemporaryDirectory(prefix="nfnets-xla-") as folder:
            path = Path(folder) / "shard"
            size = self._tried(name, lambda: int(self._files.size(self._at(name))))
            self._download(name, size, lambda _: path)
            return OpenFile(path)

    def indexed(self, name: str, key: str, size: int | None) -> "CachedFile | RangeFile":
        """A file that an index describes. `key` identifies its content; only for small files may
        the size be unknown."""
        if self.cache is None:
            return RangeFile(self, name)
        fetch = partial(self._fetch_small, name)
        return CachedFile(
            self.cache, key, fetch if size is None else partial(self._download, name, size)
        )

    def read(self, name: str) -> bytes:
        """A whole file that belongs to an index."""
        return self._tried(name, lambda: self._files.cat_file(self._at(name)))

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        def ask() -> bytes:
            data = self._files.cat_file(self._at(name), start=offset, end=offset + size)
            if len(data) > size:  # the whole file, each time
                raise NoRanges(
                    f"{self.url} does not answer requests for a part of a file: read through a "
                    "cache (data.cache_dir), or bring the shards to a local folder"
                )
            if len(data) != size:
                raise OSError(f"{len(data)} bytes came instead of the {size} that were asked for")
            return data

        return self._found(name, ask)

    def write(self, name: str, data: bytes) -> None:
        """Object stores only show whole files; elsewhere an incomplete index is refused later."""
        self._tried(name, lambda: self._files.pipe_file(self._at(name), data))

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A local path to write a large file to; it is uploaded when the context ends."""
        with tempfile.TemporaryDirectory(prefix="nfnets-xla-") as folder:
            path = Path(folder) / "file"
            yield path
            self._tried(name, lambda: self._files.put_file(str(path), self._at(name)))

    def download(self, name: str, size: int, path: Path) -> None:
        """Fetch a file of this size to `path`."""
        self._download(name, size, lambda _: path)

    def remove(self, name: str) -> None:
        def ask() -> None:
            with suppress(FileNotFoundError):  # an earlier attempt may have succeeded
                self._files.rm_file(self._at(name))

        self._tried(name, ask)

    # ---- requests -----------------------------------------------------------------------------

    def _download(self, name: str, size: int, room: Room, began: float | None = None) -> None:
        wrong: list[str] = []

        def ask() -> None:
            try:
                self._files.get_file(self._at(name), str(path), callback=_atmost(size))
                came = str(path.stat().st_size)
            except TooMuch as error:
                came = str(error)
            if came == str(size):
                return
            wrong[:] = [*wrong, came][-AGREEING:]
            if wrong == [came] * AGREEING:
                raise Replaced(
                    f"{self.url}/{name} has {came} bytes and had {size}: it has changed at its "
                    f"place; {self.how_to_index}"
                )
            raise OSError(f"{came} bytes came instead of {size}")

        with self._keeping(name):
            path = room(size)
            self._found(name, ask, began)

    def _fetch_small(self, name: str, room: Room, began: float | None = None) -> None:
        data = self._found(name, lambda: self._files.cat_file(self._at(name)), began)
        with self._keeping(name):
            room(len(data)).write_bytes(data)

    @contextmanager
    def _keeping(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in DISK_FAULTS:
                raise
            other = "set TMPDIR to a folder on another disk"
            if self.cache:
                other = "lower data.cache_bytes, or give a data.cache_dir on another disk"
            raise ValueError(
                f"{self.url}/{name} cannot be kept ({error}): make room, or {other}"
            ) from error

    def _found(self, name: str, ask: Callable[[], Out], began: float | None = None) -> Out:
        """As `_tried`, for files that exist according to an index."""
        try:
            return self._tried(name, ask, began)
        except FileNotFoundError:
            raise ValueError(
                f"{self.url}/{name} is missing: put it back and give the same command again, which "
                f"goes on; or if it is gone for good, {self.how_to_index}"
            ) from None

    def _tried(self, name: str, ask: Callable[[], Out], began: float | None = None) -> Out:
        """The answer, asked for again while the failure may be temporary.

        `began` is the monotonic time at which the reader first wanted it: a process that waited
        while another one tried in vain does not start over, or all would time out one by one.
        """
        where = f"{self.url}/{name}".rstrip("/")
        end = self.patience.total + (time.monotonic() if began is None else began)
        for attempt in count(1):
            try:
                return ask()
            except FINAL:
                raise
            except Exception as error:  # each of fsspec's file systems has its own
                what = " ".join(f"{type(error).__name__} {error}".split())[:300]
                if isinstance(error, OSError) and error.errno in DISK_FAULTS:
                    raise
                if not _may_pass(error):
                    raise ValueError(
                        f"{where} is refused ({what}): correct the address or the credentials"
                    ) from error
                left = end - time.monotonic()
                if left <= 0:
                    raise Unreachable(
                        f"{where} could not be had in {self.patience.total:g} s (last of {attempt} "
                        f"attempts: {what}); when it can, the same command goes on"
                    ) from error
                wait = min(self.patience.first_wait * 2.0 ** (attempt - 1), LONGEST_WAIT)
                wait *= _jitter.uniform(0.5, 1)  # else all would retry at once
                wait = min(wait, left)
                if attempt >= FAMILIAR:
                    _log.warning("%s: %s; attempt %d in %.0f s", where, what, attempt + 1, wait)
                time.sleep(wait)
        raise AssertionError("count() has no end")

    @property
    def _is_http(self) -> bool:
        return self.url.startswith(("http://", "https://"))

    def _at(self, name: str) -> str:
        return f"{self.url}/{quote(name) if self._is_http else name}"

    @cached_property
    def _files(self) -> Any:
        """fsspec's file system."""
        import fsspec

        protocol = self.url.partition(":")[0]
        options = _options(protocol, self.patience.timeout)
        return fsspec.filesystem(protocol, use_listings_cache=False, **options)


class NoRanges(ValueError):
    """The server only sends whole files."""


class Replaced(ValueError):
    """A file is not the one that the index describes."""


class TooMuch(OSError):
    """More bytes came than expected; the message says how many."""


FINAL = (FileNotFoundError, NoRanges, Replaced, NotImplementedError, TypeError, AttributeError)


AnyFolder = Folder | RemoteFolder

_log = logging.getLogger(__name__)
_jitter = random.Random()  # not the global one, which a user may have seeded


class CachedFile:
    """A file that is read through the cache."""

    def __init__(self, cache: Cache, key: str, fetch: Callable[..., None]) -> None:
        """`fetch(room, began=...)` is the cache's `fetch`, plus the time at which the reader first
        wanted the file."""
        self._cache, self._key, self._fetch = cache, key, fetch

    def read(self, offset: int, size: int) -> bytes:
        return self._cache.open(self._key, self._fetch_now()).read(offset, size)

    def whole(self) -> bytes:
        return self._cache.open(self._key, self._fetch_now()).whole()

    def bring(self) -> None:
        """Fetch the copy unless it is there or another process is fetching it."""
        self._cache.bring(self._key, self._fetch_now())

    def keep(self) -> None:
        self._cache.keep(self._key)

    def refresh(self) -> bool:
        """Drop the copy, which may be damaged: the next read fetches a new one."""
        self._cache.drop(self._key)
        return True

    def _fetch_now(self) -> Fetch:
        return partial(self._fetch, began=time.monotonic())


class RangeFile:
    """A file that is read in parts, one request for each."""

    def __init__(self, folder: RemoteFolder, name: str) -> None:
        self._folder, self._name = folder, name

    def read(self, offset: int, size: int) -> bytes:
        return self._folder.read_range(self._name, offset, size)

    def whole(self) -> bytes:
        return self._folder.read(self._name)

    def refresh(self) -> bool:
        return True


def _may_pass(error: Exception) -> bool:
    """Whether a failure may be temporary, as of the network, or is permanent."""
    if isinstance(error, PermissionError | ValueError | ImportError):
        return False
    if "Credential" in type(error).__name__ or str(error).startswith("Forbidden"):  # gcsfs's 403
        return False
    status = str(getattr(error, "status", None) or getattr(error, "code", None))
    status = int(status) if status.isdigit() else 0
    return not 400 <= status < 500 or status in PASSING


def _options(protocol: str, timeout: float) -> dict[str, Any]:
    """Timeouts, so that a stalled answer fails, merged with fsspec's configuration."""
    if protocol in ("http", "https", "gs", "gcs"):
        import aiohttp

        name = "client_kwargs" if protocol.startswith("http") else "session_kwargs"
        limit = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
        options: dict[str, Any] = {"timeout": limit}
    elif protocol in ("s3", "s3a"):
        name, options = "config_kwargs", {"connect_timeout": timeout, "read_timeout": timeout}
    else:
        return {}
    from fsspec.config import conf

    return {name: {**conf.get(protocol, {}).get(name, {}), **options}}


def _atmost(size: int) -> Any:
    """A callback that ends a download once it exceeds the reserved size."""
    from fsspec.callbacks import Callback

    class AtMost(Callback):
        def relative_update(self, inc: int = 1) -> None:
            super().relative_update(inc)
            if self.value > size:
                raise TooMuch(f"more than {size}")

    return AtMost()
