"""Tars for tests, written by `tarfile`, and their contents as plain code reads them."""

import io
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from webdataset.writer import TarWriter

from nfnets_xla.data.records import Records
from nfnets_xla.data.scan import IMAGES, scan_shard
from nfnets_xla.data.storage import Folder, OpenFile

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}

PACKED = 7  # samples of each shard that `make_folder` writes

Member = tuple[str, bytes]


def tar_bytes(members: list[Member], format: int = tarfile.USTAR_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def write_tar(path: Path, members: list[Member], format: int = tarfile.USTAR_FORMAT) -> None:
    path.write_bytes(tar_bytes(members, format))


def sample(key: str, label: int | str = 0, image: bytes = b"picture") -> list[Member]:
    return [(f"{key}.cls", str(label).encode()), (f"{key}.png", image)]


def opened(path: Path, data: bytes) -> OpenFile:
    path.write_bytes(data)
    return OpenFile(path)


def pairs(path: Path) -> dict[str, tuple[bytes, bytes]]:
    """Image and label text by key, read by `tarfile`, up to the first fault."""
    images: dict[str, bytes] = {}
    texts: dict[str, bytes] = {}
    with suppress(tarfile.TarError), tarfile.open(path, "r:") as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isreg() else None
            folder, slash, name = member.name.rpartition("/")
            stem, dot, extension = name.partition(".")
            if file is None or not stem or not dot:
                continue
            key = folder + slash + stem
            if extension.lower() in IMAGES:
                images[key] = file.read()
            elif extension.lower() in ("cls", "txt", "json"):
                texts.setdefault(key, file.read())
    return {key: (images[key], texts[key]) for key in images.keys() & texts.keys()}


def make_folder(folder: Path) -> Path:
    """Shards in every tar format and by webdataset's writer, with long names and odd labels."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for number, (name, format) in enumerate(FORMATS.items()):
        members: list[Member] = [("__meta__", b"skipped")]
        for row in range(PACKED):
            key = f"{name}/row{row}"
            if name != "ustar":
                key = f"{'deep/' * 30}{'long' * 40}é{row}"  # no ustar header holds such a name
            image, label = rng.bytes(int(rng.integers(0, 3000))), number * PACKED + row
            text = [
                (".cls", f"{label}\n"),
                (".txt", f" {label}"),
                (".json", f'{{"label":{label}}}'),
            ]
            extension, value = text[row % 3]
            members += [(key + ".JPEG", image), (key + extension, value.encode())]
            members += [(key + ".seg.png", b"another member")]
        write_tar(folder / f"{name}.tar", members, format)
    with TarWriter(str(folder / "wds.tar"), encoder=False, mtime=0.5) as writer:
        for row in range(PACKED):
            writer.write({"__key__": f"w{row}", "jpg": rng.bytes(100), "cls": b"%d" % row})
    return folder


def scanned(folder: Path, name: str) -> Records:
    records = scan_shard(Folder(folder).open(name)).records
    assert records is not None
    return records


def one_line(action: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (callers compare the message)
        action()
    assert "\n" not in str(error.value)
    return str(error.value)
