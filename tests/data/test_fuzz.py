"""Damaged and hostile bytes: no crash, no hang, and no sample with another sample's image or label.

Mutations are seeded. By default 1,000 of each kind run; the slow tests run 10,000.
"""

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nfnets_xla.data import labels
from nfnets_xla.data.decode import decode
from nfnets_xla.data.index import build_index
from nfnets_xla.data.records import Records
from nfnets_xla.data.scan import scan_shard
from nfnets_xla.data.shards import ShardIndex
from tests.data.images import encoded
from tests.data.tars import FORMATS, opened, pairs, sample, tar_bytes

FEW, MANY = 1_000, 10_000
NUMBERS = [FEW, pytest.param(MANY, marks=pytest.mark.slow)]


def mutated(data: bytes, number: int) -> bytes:
    """Bytes changed, deleted, repeated or moved, in blocks of a tar or single bytes; or the end is
    cut."""
    rng = np.random.default_rng([99, number])
    bytes_ = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        size = len(bytes_)
        unit = 512 if rng.random() < 0.5 else 1
        start = int(rng.integers(0, max(size // unit, 1))) * unit
        length = int(rng.integers(1, 4)) * unit
        part = bytes_[start : start + length]
        match int(rng.integers(0, 7)):
            case 0 | 1:
                for place in range(start, min(start + length, size)):
                    bytes_[place] ^= int(rng.integers(1, 256))
            case 2:
                bytes_[start : start + length] = rng.bytes(len(part))
            case 3:
                del bytes_[start : start + length]
            case 4:
                bytes_[start:start] = part
            case 5:
                to = int(rng.integers(0, max(size // unit, 1))) * unit
                del bytes_[start : start + length]
                bytes_[to:to] = part
            case _:
                del bytes_[start:]
    return bytes(bytes_)


def with_sum(header: bytes) -> bytes:
    """A tar header with a valid checksum, so that its contents are trusted."""
    counted = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(counted) + header[156:]


def repaired(tar: bytes) -> bytes:
    """Mutated headers with valid checksums."""
    blocks = [tar[at : at + 512] for at in range(0, len(tar), 512)]
    return b"".join(
        with_sum(block) if block[257:262] == b"ustar" and len(block) == 512 else block
        for block in blocks
    )


# ---- tars ---------------------------------------------------------------------------------------

LABELS = {f"{format}{row}": 7 * row + 1 for format in FORMATS for row in range(3)}


def shard(format: str) -> bytes:
    members = []
    for row in range(3):
        key = f"{format}{row}"
        name = key if format == "ustar" else f"{'d' * 120}/{key}"
        # The image names its sample, as the label does.
        members += sample(name, LABELS[key], f"image of {key} ".encode() * 20)
    return tar_bytes(members, FORMATS[format])


@pytest.mark.parametrize("number", NUMBERS)
def test_a_damaged_tar_is_refused_or_read_as_tarfile_reads_it(tmp_path: Path, number: int) -> None:
    path = tmp_path / "a.tar"
    shards = {format: shard(format) for format in FORMATS}
    compared = more = 0
    for seed in range(number):
        data = mutated(shards[list(FORMATS)[seed % 3]], seed)
        file = opened(path, repaired(data) if seed % 2 else data)
        scan = scan_shard(file)
        if scan.faults:
            continue
        records, there = scan.records, pairs(path)
        assert records is not None
        ours = {
            records.key(row): (
                file.read(int(records.offsets_N[row]), int(records.sizes_N[row])),
                records.labels(row),
            )
            for row in range(records.num_samples)
        }
        # tarfile stops at a date that it cannot read: it may find fewer members, but no others.
        for key, (image, text) in there.items():
            assert ours[key] == (image, labels.parse("cls", text))
        compared += len(there)
        more += len(ours) - len(there)
    assert compared > number / 50  # otherwise nothing was tested
    assert more < compared / 5


def told(index: ShardIndex, row: int) -> tuple[str, bytes, dict[int, float]]:
    return index.sample_id(0, row), index.read(0, row), index.labels(0, row)


@pytest.mark.parametrize("number", NUMBERS)
def test_what_is_indexed_is_read_as_it_was_or_not_at_all(tmp_path: Path, number: int) -> None:
    """Damages the shard, the sidecar or the manifest after indexing."""
    good = shard("pax")
    (tmp_path / "a.tar").write_bytes(good)
    index = build_index(tmp_path)
    truth = [
        (index.sample_id(0, row), index.read(0, row), index.labels(0, row)) for row in range(3)
    ]
    files = {
        name: (tmp_path / name).read_bytes() for name in ("a.tar", "a.tar.idx.npz", "index.npz")
    }
    refused = 0
    for seed in range(number):
        name = list(files)[seed % 3]
        (tmp_path / name).write_bytes(mutated(files[name], seed))
        try:
            damaged = ShardIndex.load(tmp_path)
        except ValueError:
            refused += 1
        else:
            for row in range(3):
                try:
                    found = (
                        damaged.sample_id(0, row),
                        damaged.read(0, row),
                        damaged.labels(0, row),
                    )
                except ValueError:
                    refused += 1
                else:
                    assert found == truth[row]
        (tmp_path / name).write_bytes(files[name])
    assert refused > number / 2


def test_a_sidecar_that_is_no_sidecar_is_refused() -> None:
    for data in (b"", b"PK", b"\x93NUMPY", b"\x80\x04N.", bytes(999)):
        with pytest.raises(ValueError, match=r"^damaged$"):
            Records.from_bytes(data)


# ---- images -------------------------------------------------------------------------------------


def pictures() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 31, 3), np.uint8)
    image = Image.fromarray(pixels)
    modes = [image, image.convert("L"), image.convert("P"), image.convert("RGBA")]
    found = [encoded(mode, "PNG") for mode in modes] + [encoded(mode, "WEBP") for mode in modes]
    found += [encoded(image, "JPEG"), encoded(image.convert("CMYK"), "JPEG")]
    return [
        *found,
        encoded(image.convert("P"), "GIF"),
        encoded(image, "BMP"),
        encoded(image, "PPM"),
    ]


@pytest.mark.parametrize("number", NUMBERS)
def test_a_damaged_image_is_a_value_error_or_a_picture(number: int) -> None:
    decoded = 0
    originals = pictures()
    for seed in range(number):
        data = mutated(originals[seed % len(originals)], seed)
        with suppress(ValueError):  # in one line, which tests/data/test_decode.py checks
            image = decode(data)
            decoded += 1
            assert image.dtype == np.uint8
            assert image.ndim == 3
            assert image.shape[2] == 3
    assert decoded > number / 50


# ---- labels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", NUMBERS)
def test_a_damaged_label_is_refused_or_is_one(number: int) -> None:
    texts = [
        ("cls", b"3"),
        ("txt", b"3:0.5 7:0.25"),
        ("json", b'{"label": [3, 7], "weight": [1, 2]}'),
    ]
    for seed in range(number):
        kind, text = texts[seed % 3]
        found = labels.parse(kind, mutated(text, seed))
        if found is not None:
            assert found == labels.checked(list(found), list(found.values()))
