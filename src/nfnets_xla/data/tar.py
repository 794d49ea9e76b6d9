"""Reads the members of an untrusted tar: ustar (POSIX 1003.1), GNU and pax long names.

Python's `tarfile` silently takes a broken header for the end of the archive; here every fault is
reported with its byte offset, and reading continues at the next intact header. Offsets only grow,
and sizes are checked before use, so that no input can make it hang or fill memory.
"""

from collections.abc import Iterator
from typing import NamedTuple

from nfnets_xla.data.storage import OpenFile

BLOCK = 512  # bytes of a header; a member's data are padded to a multiple of it
MAX_META = 2**20  # bytes of a long name or a pax header
MAX_PADDING = 2**20  # bytes of zeros after the end: tars are padded to records of 10 KiB
RESYNC = 2**16  # bytes read at a time while searching for the next intact header

# Type flags. Links, devices, folders and pipes have no data, whatever their size field says.
REGULAR = (b"0", b"\0", b"7")
LINKS = (b"1", b"2")  # hard and symbolic
DATALESS = (*LINKS, b"3", b"4", b"5", b"6")
LONG_NAME, LONG_LINK, SPARSE = b"L", b"K", b"S"
PAX, PAX_SOLARIS, PAX_GLOBAL = b"x", b"X", b"g"


class Member(NamedTuple):
    name: str
    header: int  # offset of its own header, which is right before its data
    offset: int  # of its data
    size: int
    is_file: bool  # a regular file with contiguous bytes
    is_elsewhere: bool  # a link, or sparse: its bytes are elsewhere, or not contiguous


class Fault(NamedTuple):
    """What is wrong at an offset of the shard, and what to do about it."""

    offset: int
    what: str


class _Bad(Exception):
    """An invalid header; the message says why."""


class _Next(NamedTuple):
    """What extension headers say about the member that follows them."""

    name: str | None = None
    size: int | None = None
    is_sparse: bool = False


def read_members(
    file: OpenFile, start: int = 0, end: int | None = None
) -> Iterator[Member | Fault]:
    """Members and faults, by offset, of the tar in bytes `start` to `end` of the file."""
    stop = file.size if end is None else min(end, file.size)
    at, following = start, _Next()
    while True:
        header = file.read(at, BLOCK) if at + BLOCK <= stop else b""
        if not header:
            yield Fault(at, f"truncated: it ends at byte {stop} without the two closing blocks")
            return
        if not any(header):
            yield from _check_end(file, at, stop)
            return
        try:
            member, following, after = _parse(file, header, at, stop, following)
        except _Bad as error:
            yield Fault(at, str(error))
            at, following = _resync(file, at + BLOCK, stop), _Next()
            continue
        if member is not None:
            yield member
        at = after


def _parse(
    file: OpenFile, header: bytes, at: int, stop: int, following: _Next
) -> tuple[Member | None, _Next, int]:
    """A header's member, None if it only extends the next; and the offset of the next one."""
    if not _checksum_holds(header):
        raise _Bad("damaged header: its checksum is wrong")
    kind, size, data = header[156:157], _number(header[124:136]), at + BLOCK
    is_meta = kind in (LONG_NAME, LONG_LINK, PAX, PAX_SOLARIS, PAX_GLOBAL)
    if not is_meta and following.size is not None:
        size = following.size
    if kind in DATALESS:
        size = 0
    while kind == SPARSE and header[482 if data == at + BLOCK else 504]:
        header = file.read(data, BLOCK) if data + BLOCK <= stop else b""
        if not header:
            raise _Bad("truncated: the map of a sparse member is not whole")
        data += BLOCK
    after = data + -(-size // BLOCK) * BLOCK
    if after > stop:
        raise _Bad(f"truncated: a member of {size} bytes needs {after - stop} more than there are")
    if not is_meta:
        name = _name(header) if following.name is None else following.name
        whole = kind in REGULAR and not following.is_sparse and not name.endswith("/")
        elsewhere = kind in (*LINKS, SPARSE) or following.is_sparse
        return Member(name, at, data, size, whole, elsewhere), _Next(), after
    if size > MAX_META:
        raise _Bad(f"damaged header: a long name of {size} bytes; at most {MAX_META} are read")
    extension = file.read(data, size)
    if kind == LONG_NAME:
        following = following._replace(name=_text(extension.split(b"\0", 1)[0]))
    elif kind == PAX_GLOBAL:
        if _pax(extension) != _Next():
            raise _Bad("a global pax header that names or sizes its members: pack it again")
    elif kind != LONG_LINK:
        following = _pax(extension)
    return None, following, after


def _check_end(file: OpenFile, at: int, stop: int) -> Iterator[Fault]:
    """Faults of the end, which must be two or more blocks of zeros, and nothing else."""
    tail = file.read(at, min(stop - at, MAX_PADDING + 1))
    used = len(tail) - len(tail.lstrip(b"\0"))
    if used < len(tail):
        place = at + used // BLOCK * BLOCK
        yield Fault(place, f"data after the end of the archive at byte {at}: two tars joined?")
    elif len(tail) < 2 * BLOCK:
        yield Fault(at, f"truncated: it ends at byte {stop} within the two closing blocks")
    elif len(tail) > MAX_PADDING:
        yield Fault(at, f"more than {MAX_PADDING} bytes of zeros after the end of the archive")


def _resync(file: OpenFile, at: int, stop: int) -> int:
    """The offset of the next block that is an intact header; or the end."""
    while at + BLOCK <= stop:
        chunk = file.read(at, min(RESYNC, stop - at))
        for place in range(0, len(chunk) - BLOCK + 1, BLOCK):
            block = chunk[place : place + BLOCK]
            if block[257:262] == b"ustar" and _checksum_holds(block):
                return at + place
        at += max(len(chunk) // BLOCK, 1) * BLOCK
    return at


def _checksum_holds(header: bytes) -> bool:
    """Unsigned as POSIX has it, or signed as some old tars wrote it."""
    try:
        wanted = _number(header[148:156])
    except _Bad:
        return False
    counted = header[:148] + b" " * 8 + header[156:]
    unsigned = sum(counted)
    return wanted in (unsigned, unsigned - 256 * sum(byte > 127 for byte in counted))


def _number(field: bytes) -> int:
    """Octal digits, or GNU's binary form for what these cannot hold."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip(b" ")
    if any(byte not in b"01234567" for byte in digits):
        raise _Bad(f"damaged header: the number {field!r}")
    return int(digits or b"0", 8)


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0]
    # GNU tar's own format (magic "ustar  ") has times there.
    is_posix = header[257:263] == b"ustar\0"
    return _text(prefix + b"/" + name if prefix and is_posix else name)


def _pax(records: bytes) -> _Next:
    """Lines of `length key=value`, the length counting the whole line with its newline."""
    following, at = _Next(), 0
    while at < len(records) and records[at]:
        digits, space, _ = records[at : at + 20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        line = records[at : at + length]
        key, equals, value = line[len(digits) + 1 : -1].partition(b"=")
        if not space or not equals or len(line) < length or line[-1:] != b"\n":
            raise _Bad("damaged pax header")
        if key == b"path":
            following = following._replace(name=_text(value.rstrip(b"/")))
        elif key == b"size":
            if not value.isdigit() or len(value) > 20:
                raise _Bad(f"damaged pax header: size {value[:20]!r}")
            following = following._replace(size=int(value))
        elif key.startswith(b"GNU.sparse."):
            following = following._replace(is_sparse=True)
        at += length
    return following


def _text(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise _Bad(
            f"the name {name[:60]!r} is not UTF-8: pack it again with names that are"
        ) from None
