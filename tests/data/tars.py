"""Tars for tests, written by `tarfile`, and what it and plain code say of them."""

import io
import tarfile
from contextlib import suppress
from pathlib import Path

from nfnets_xla.data.scan import IMAGES
from nfnets_xla.data.storage import OpenFile

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}

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
    """Image and label text by key, as `tarfile` reads them, as far as it gets."""
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
