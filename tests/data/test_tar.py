"""Every form of tar is read as `tarfile` reads it, and every fault is reported with its offset."""

import io
import tarfile
from pathlib import Path

import pytest

from nfnets_xla.data.scan import Fault, scan_shard
from nfnets_xla.data.storage import OpenFile
from nfnets_xla.data.tar import Member, read_members
from tests.data.tars import FORMATS, opened, sample, tar_bytes

LONG = "deep/" * 40 + "long" * 40 + "é.png"


def members(path: Path, data: bytes) -> list[Member | Fault]:
    return list(read_members(opened(path, data)))


def names_and_data(path: Path, data: bytes) -> list[tuple[str, bytes]]:
    file = opened(path, data)
    found = list(read_members(file))
    assert all(isinstance(member, Member) for member in found), found
    whole = [member for member in found if isinstance(member, Member) and member.is_file]
    return [(member.name, file.read(member.offset, member.size)) for member in whole]


@pytest.mark.parametrize("format", FORMATS)
def test_it_reads_what_tarfile_wrote(tmp_path: Path, format: str) -> None:
    wrote = [("a.png", b"x" * 511), ("b/c.cls", b""), ("d.png", b"y" * 1024)]
    wrote += [(f"{'p' * 90}/{'n' * 90}.cls", b"3")]  # a ustar header splits it in two
    if format != "ustar":
        wrote += [(LONG, b"z" * 513), ("after.png", b"w")]
    assert names_and_data(tmp_path / "a.tar", tar_bytes(wrote, FORMATS[format])) == wrote


def test_what_is_no_regular_file_is_passed_over(tmp_path: Path) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("x.png")
            info.type, info.linkname, info.size = kind, "l" * 200, 700
            tar.addfile(info)
        info = tarfile.TarInfo("y.png")
        info.pax_headers = {"comment": "of no matter", "mtime": "1.5"}
        info.size = 3
        tar.addfile(info, io.BytesIO(b"yes"))
    assert names_and_data(tmp_path / "a.tar", file.getvalue()) == [("y.png", b"yes")]


def test_sparse_files_are_passed_over_whole(tmp_path: Path) -> None:
    """GNU's old format: the map continues in a second header block."""
    header = bytearray(tar_bytes([("s.png", b"d" * 512)], tarfile.GNU_FORMAT)[:512])
    header[156:157], header[482] = b"S", 1
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    rest = tar_bytes([("t.png", b"t")], tarfile.GNU_FORMAT)
    data = bytes(header) + bytes(512) + b"d" * 512 + rest
    assert names_and_data(tmp_path / "a.tar", data) == [("t.png", b"t")]


def test_sizes_beyond_octal_digits(tmp_path: Path) -> None:
    """GNU's binary numbers; the file ends long before that size."""
    tar = tarfile.TarInfo("x.png")
    tar.size = 2**40
    header = tar.tobuf(tarfile.GNU_FORMAT)
    fault, end = members(tmp_path / "a.tar", header)
    assert isinstance(fault, Fault)
    assert isinstance(end, Fault)
    assert fault.what.startswith("truncated: a member of 1099511627776 bytes needs")
    assert (fault.offset, end.offset) == (0, 512)


def test_reading_goes_on_at_the_next_whole_header(tmp_path: Path) -> None:
    data = bytearray(tar_bytes([("a.png", b"a"), ("b.png", b"b" * 2000), ("c.png", b"c")]))
    data[1024 + 5] ^= 1  # in the header of b
    a, fault, c = members(tmp_path / "a.tar", bytes(data))
    assert isinstance(a, Member)
    assert isinstance(c, Member)
    assert (a.name, c.name) == ("a.png", "c.png")
    assert fault == Fault(1024, "damaged header: its checksum is wrong")


PAX_FAULTS = {
    "no length": b"path=x\n",
    "a wrong length": b"99 path=x\n",
    "no newline": b"9 path=xy",
    "no number": b"10 size=x\n",
}


@pytest.mark.parametrize("case", PAX_FAULTS)
def test_a_damaged_pax_header_is_named(tmp_path: Path, case: str) -> None:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(PAX_FAULTS[case])
    header = info.tobuf(tarfile.USTAR_FORMAT) + PAX_FAULTS[case].ljust(512, b"\0")
    found = members(tmp_path / "a.tar", header + tar_bytes(sample("x")))
    assert isinstance(found[0], Fault)
    assert found[0].offset == 0
    assert "damaged pax header" in found[0].what
    assert len(found) == 3


def test_every_fault_of_a_shard_is_listed_with_its_offset(tmp_path: Path) -> None:
    data = tar_bytes(
        [
            *sample("good", 1),  # headers at 0 and 1024
            ("alone.png", b"x"),  # 2048
            ("named.cls", b"1"),  # 3072
            *sample("word", "cat"),  # 4096, 5120
            *sample("apart"),  # 6144, 7168
            *sample("good2"),  # 8192, 9216
            ("apart.txt", b"1"),  # 10240
            *sample("good"),  # 11264, 12288
        ]
    )
    scan = scan_shard(opened(tmp_path / "a.tar", data[: 13 * 1024 - 400]))
    assert sorted((fault.offset, fault.what.split(":")[0]) for fault in scan.faults) == [
        (2048, "sample alone has no label"),
        (3072, "sample named has no image"),
        (4096, "sample word has label b'cat' in .cls"),
        (10240, "members of sample apart apart"),
        (11264, "duplicate key good (.cls)"),
        (12288, "truncated"),
        (12800, "truncated"),
    ]
    assert scan.records is not None
    assert [scan.records.key(row) for row in range(3)] == ["good", "apart", "good2"]


def test_offsets_within_a_member_for_a_tar_in_a_tar(tmp_path: Path) -> None:
    inner = tar_bytes([("a.JPEG", b"picture")])
    path = tmp_path / "outer.tar"
    path.write_bytes(tar_bytes([("n01.tar", inner)]))
    file = OpenFile(path)
    (outer,) = read_members(file)
    assert isinstance(outer, Member)
    (image,) = read_members(file, outer.offset, outer.offset + outer.size)
    assert isinstance(image, Member)
    assert file.read(image.offset, image.size) == b"picture"
