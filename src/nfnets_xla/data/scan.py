"""One pass over a shard: its samples as records, and every fault with its byte offset.

Samples are grouped as in WebDataset: members are `<key>.<extension>`, where the key is everything
before the first dot of the file name. Stricter than WebDataset: a sample's members must be
contiguous, with exactly one image and a label.
"""

import re
import zlib
from collections.abc import Callable
from typing import NamedTuple

from nfnets_xla.data import labels
from nfnets_xla.data.records import Records, make_records
from nfnets_xla.data.storage import OpenFile
from nfnets_xla.data.tar import BLOCK, Fault, Member, read_members

IMAGES = ("png", "jpg", "jpeg", "webp")
MAX_IMAGE = 2**28  # bytes
COMPRESSED = (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5")  # gzip, bzip2, xz, Zstandard

Sample = dict[str, Member]  # {lower-case extension: member}
ImageCheck = Callable[[bytes], str | None]  # what is wrong with an image file, or None


class Scan(NamedTuple):
    records: Records | None  # of the intact samples; None if there are none
    faults: list[Fault]  # of the tar, then of its samples: a damaged header explains missing ones


def scan_shard(file: OpenFile, check_image: ImageCheck | None = None) -> Scan:
    """Read a whole shard. With `check_image`, faults of the images are found too."""
    faults: list[Fault] = []
    samples = _group(file, faults)
    keys: list[str] = []
    images: list[tuple[int, int, int]] = []
    found: list[dict[int, float]] = []
    for key, sample in samples.items():
        complaints = list(_complaints(key, sample))
        if not complaints:
            image, label = _image(sample)[0], _label(sample)
            data = file.read(image.header, BLOCK + image.size)
            text = file.read(label[1].offset, label[1].size)
            values = labels.parse(label[0], text)
            if values is None:
                complaints.append(_bad_label(key, *label, text))
            elif check_image and (what := check_image(data[BLOCK:])):
                complaints.append(Fault(image.header, f"sample {key}: {what}"))
            else:
                keys.append(key)
                images.append((image.offset, image.size, zlib.crc32(data)))
                found.append(values)
        faults += complaints
    if not samples and not faults:
        faults.append(Fault(0, "holds no samples (key.jpg, key.cls): take it out of the folder"))
    records = make_records(keys, images, found) if keys else None
    return Scan(records, faults)


def _group(file: OpenFile, faults: list[Fault]) -> dict[str, Sample]:
    samples: dict[str, Sample] = {}
    last = None
    if file.read(0, 2) in COMPRESSED:
        faults.append(Fault(0, "compressed: a shard must be a plain tar; decompress it"))
        return samples
    for member in read_members(file):
        if isinstance(member, Fault):
            faults.append(member)
            continue
        directory, slash, name = member.name.rpartition("/")
        stem, dot, extension = name.partition(".")
        is_meta = re.match(r"__[^/]*__($|/)", member.name)
        extension = extension.lower()
        if member.is_elsewhere and stem and extension in (*IMAGES, *labels.KINDS) and not is_meta:
            how = "pack it with `tar --dereference --hard-dereference`, and not --sparse"
            faults.append(Fault(member.header, f"{member.name} is a link, or sparse: {how}"))
        if not (member.is_file and stem and dot) or is_meta:
            continue
        key = directory + slash + stem
        if not key.isprintable():
            faults.append(Fault(member.header, f"key {key!r}: pack it with printable names"))
            continue
        sample = samples.setdefault(key, {})
        if extension in sample:
            what = f"duplicate key {key} (.{extension}): give each its own"
            faults.append(Fault(member.header, what))
            continue
        if sample and key != last:
            what = f"members of sample {key} apart: pack it sorted by name"
            faults.append(Fault(member.header, what))
        sample[extension] = member
        last = key
    return samples


def _complaints(key: str, sample: Sample) -> list[Fault]:
    """Faults of a sample's members that can be found without reading them."""
    images = _image(sample)
    first = min(member.header for member in sample.values())
    if len(images) != 1:
        what = (
            f"sample {key} has {len(images) or 'no'} image: pack it with one .{', .'.join(IMAGES)}"
        )
        return [Fault(first, what)]
    if images[0].size > MAX_IMAGE:
        what = f"sample {key} has an image of {images[0].size} bytes: at most {MAX_IMAGE} are read"
        return [Fault(images[0].header, what)]
    if not any(kind in sample for kind in labels.KINDS):
        what = f"sample {key} has no label: pack it with a .{', .'.join(labels.KINDS)}"
        return [Fault(first, what)]
    kind, label = _label(sample)
    if label.size > labels.MAX_BYTES:
        return [_bad_label(key, kind, label, b"...")]
    return []


def _image(sample: Sample) -> list[Member]:
    return [sample[extension] for extension in IMAGES if extension in sample]


def _label(sample: Sample) -> tuple[str, Member]:
    kind = next(kind for kind in labels.KINDS if kind in sample)
    return kind, sample[kind]


def _bad_label(key: str, kind: str, member: Member, text: bytes) -> Fault:
    return Fault(
        member.header,
        f"sample {key} has label {text[:60]!r} in .{kind}: pack it with a whole number of 0 to "
        f"{labels.MAX_LABEL}, or up to {labels.MAX_LABELS} of them with weights (docs/data.md)",
    )
