"""Folders of shards and checkpoints. Only this and `remote.py` open a shard or a sidecar.

`Folder` is a local folder; `remote.RemoteFolder` is one at an address, with the same interface.
Shards need a folder that can list names with sizes, open a file for reads at an offset, and write a
small file as a whole; checkpoints also need writing large files, and deleting.
"""

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

SHARD = ".tar"
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}")  # a file that is being written


class Folder:
    """Shards and the files beside them, by names relative to the folder, with slashes."""

    cache = None  # local files need none

    def __init__(self, where: str | Path) -> None:
        """Raises ValueError for what is not a local folder."""
        self.path = local(where)
        if not self.path.is_dir():
            raise ValueError(f"{where} is not a folder: give one that holds shards (*{SHARD})")

    def __str__(self) -> str:
        return str(self.path)

    @property
    def how_to_index(self) -> str:
        return f"run `nfnets-xla shards index {self}`"

    def sizes(self, ending: str = SHARD) -> dict[str, int]:
        """{name: bytes} of all files with this ending, sorted by name, without hidden ones. Links
        to folders are followed only for shards: a checkpoint's files, once found, may be
        deleted."""
        found: dict[str, int] = {}
        for top, files in self._folders(links=ending.startswith(SHARD)):
            inside = Path(top).relative_to(self.path)
            for name in files:
                if name.endswith(ending) and not name.startswith("."):
                    path = os.path.join(top, name)
                    try:
                        status = os.stat(path)
                    except FileNotFoundError:  # deleted meanwhile, unless it is a broken link
                        if os.path.lexists(path):
                            raise
                        continue
                    if not stat.S_ISREG(status.st_mode):  # opening a pipe may block forever
                        raise ValueError(f"{path} is no regular file: take it out")
                    found[str(inside / name)] = status.st_size
        return dict(sorted(found.items()))

    def _folders(self, *, links: bool) -> Iterator[tuple[str, list[str]]]:
        """Every folder with the names of its files, each only once, since links may be circular; a
        folder's own name is preferred to a link's."""
        known: set[str] = set()
        starts = [str(self.path)]
        while starts:
            linked: list[str] = []
            for start in starts:
                for top, folders, files in os.walk(start, onerror=_unless_gone):
                    folders[:] = sorted(filter(_is_ours, folders))
                    if (real := os.path.realpath(top)) in known:
                        folders.clear()
                        continue
                    known.add(real)
                    paths = [os.path.join(top, name) for name in folders]
                    linked += filter(os.path.islink, paths)
                    yield top, files
            starts = linked if links else []

    def modified(self, name: str) -> int | None:
        """When the file was last written, in nanoseconds; None if there is none."""
        try:
            return (self.path / name).stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def placed(self, name: str) -> int | None:
        """When the file was written or put here, whichever is later: `cp -p` and `rsync -a` keep
        the time of the original. A change of owner or mode, or a new link to it, counts, too."""
        path = self.path / name
        try:
            status, links = path.stat(), [os.lstat(link) for link in _links(path)]
        except FileNotFoundError:
            return None
        return max(status.st_mtime_ns, status.st_ctime_ns, *(link.st_ctime_ns for link in links))

    def open(self, name: str) -> "OpenFile":
        return OpenFile(self.path / name)

    def indexed(self, name: str, key: str, size: int | None) -> "OpenFile":
        """A file that an index describes."""
        del key, size
        return self.open(name)

    def read(self, name: str) -> bytes:
        """A whole file that belongs to an index."""
        return (self.path / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        """Write atomically: if the machine stops, the file is either the new one or the old."""
        path = self.path / name
        temporary = path.with_name(f".{path.name}.{uuid4().hex}")  # as TEMPORARY has it
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        flush_to_disk(path.parent)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A path to write a large file to, in at most one new level of folders.

        The file is flushed to disk when the context ends; before, it may be incomplete.
        """
        path = self.path / name
        if not path.parent.is_dir():
            path.parent.mkdir()
            flush_to_disk(self.path)
        yield path
        flush_to_disk(path)

    def remove(self, name: str) -> None:
        """Delete a file, and its subfolder if that is empty but for leftovers of `write`."""
        path = self.path / name
        path.unlink(missing_ok=True)
        if path.parent == self.path:
            return
        left = [*path.parent.iterdir()]
        if all(TEMPORARY.fullmatch(file.name) for file in left):
            for file in left:
                file.unlink(missing_ok=True)
            path.parent.rmdir()


def _unless_gone(error: OSError) -> None:
    """Raise if a folder cannot be listed: its shards would be left out silently."""
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


def _links(path: Path) -> Iterator[str]:
    """All symbolic links on the path to an existing file."""
    at, parts = "/", [*reversed(path.absolute().parts[1:])]
    while parts:
        part = parts.pop()
        step = os.path.dirname(at) if part == ".." else os.path.join(at, part)
        if os.path.islink(step):
            yield step
            target = Path(os.readlink(step))
            at = "/" if target.is_absolute() else at
            parts += reversed(target.parts[target.is_absolute() :])
        else:
            at = step


def _is_ours(folder: str) -> bool:
    """Not hidden, and not lost+found, which belongs to root."""
    return not folder.startswith(".") and folder != "lost+found"


def flush_to_disk(path: Path) -> None:
    """Flush a file's content, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def address(where: object) -> str | None:
    """The address, or None for a local path. ValueError for file://, which is local."""
    parts = re.fullmatch(
        r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*?)/*", str(where)
    )  # Path makes gs:/a of gs://a
    if parts and parts[1].lower() == "file":
        raise ValueError(f"{where} is on this machine: give the path alone, /{parts[2]}")
    return f"{parts[1]}://{parts[2]}" if parts else None


def is_below(where: object, folder: object) -> bool:
    """Whether `where` is inside `folder`, at any depth: its shards are then also the folder's."""
    if address(where) or address(folder):
        return (address(where) or "").startswith(f"{address(folder)}/")
    return Path(str(folder)).resolve() in Path(str(where)).resolve().parents


def local(where: str | Path) -> Path:
    """Raises ValueError for an address."""
    if address(where):
        raise ValueError(f"{where} is an address: give a local folder here")
    return Path(where)


class OpenFile:
    """A file to read at any offset; closed when it is garbage-collected."""

    def __init__(self, path: Path) -> None:
        self._path, self._descriptor = path, os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._descriptor).st_size

    def read(self, offset: int, size: int) -> bytes:
        """Bytes from `offset` on: `size` of them, or fewer if the file ends before."""
        try:
            return os.pread(self._descriptor, size, offset)
        except OSError as error:
            error.filename = str(self._path)  # a descriptor has no name
            raise

    def whole(self) -> bytes:
        return self.read(0, self.size)

    def refresh(self) -> bool:
        """Whether reading again may give other bytes: no, this is the only copy."""
        return False

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)
