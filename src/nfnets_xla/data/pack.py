"""Packs samples into tars that WebDataset reads.

The tars are written by webdataset's writer, and the same samples give the same bytes. They are made
in a temporary folder and moved into place at the end, so that a failure leaves nothing behind.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nfnets_xla.data import labels
from nfnets_xla.data.scan import IMAGES
from nfnets_xla.data.storage import Folder, local

CLASSES = "classes.json"

# Key, image file, its extension, and its label: a number, or several with weights.
Sample = tuple[str, bytes, str, int | Mapping[int, float]]


def pack_samples(
    samples: Iterable[Sample],
    folder: str | Path,
    *,
    samples_per_shard: int,
    shard_bytes: float = float("inf"),
    prefix: str = "shard",
    classes: Sequence[str] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write samples in their order to `<folder>/<prefix>-000000.tar` and so on; return the shards.

    A shard is full at `samples_per_shard` samples or `shard_bytes` bytes of images and labels. Keys
    must be unique, without dots and slashes; images are copied unchanged. `classes` are written
    beside the shards, as classes.json. `on_progress` is called with the number of samples so far.
    Raises ValueError for a bad or repeated sample, if there are no samples, and if the folder has
    shards already, or gets some meanwhile. A process that is killed leaves a folder `.packing-*`
    behind, which can be deleted.
    """
    # Before there is a folder: it imports torch, which takes a second.
    from webdataset.writer import ShardWriter

    _check_shards(samples_per_shard, shard_bytes, prefix)
    with _aside(local(folder)) as aside:
        if classes is not None:
            (aside / CLASSES).write_text(json.dumps(list(classes), indent=1) + "\n")
        writer = ShardWriter(
            # Absolute: webdataset takes what is before a colon for a protocol.
            str(aside.absolute()).replace("%", "%%") + f"/{prefix}-%06d.tar",
            maxcount=samples_per_shard,
            maxsize=shard_bytes,
            post=_flush_to_disk,
            verbose=0,
            encoder=False,
            # Pinned, as they are part of the bytes.
            mtime=0,
            user="bigdata",
            group="bigdata",
            mode=0o444,
        )
        _write(samples, writer, on_progress)
    return sorted(Path(folder).glob("*.tar"))


def check_empty(folder: Path, *others: str) -> None:
    """Raises ValueError, before any long work, if `index` would find shards in the folder, or if it
    has one of the `others`."""
    shards = Folder(folder).sizes() if folder.is_dir() else {}
    files = (name for name in (CLASSES, *others) if (folder / name).exists())
    for name in (*shards, *files):
        raise _not_empty(folder, name)


def claim(path: Path) -> None:
    """Create an empty file, to be replaced later. Raises ValueError if it exists: another process
    may have claimed it, and only one of two gets it."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        raise _not_empty(path.parent, path.name) from None


def _not_empty(folder: Path, name: str) -> ValueError:
    return ValueError(f"{folder} holds {name} already: choose an empty folder")


def encode_image(pixels_HWC: NDArray[np.uint8], ext: str = "png", quality: int = 95) -> bytes:
    """RGB pixels, (H, W, 3) uint8, as a PNG or JPEG file; `quality` is the JPEG's, 1 to 95."""
    if pixels_HWC.dtype != np.uint8 or pixels_HWC.ndim != 3 or pixels_HWC.shape[2] != 3:
        raise ValueError(
            f"pixels are {pixels_HWC.dtype} of shape {pixels_HWC.shape}; they must be uint8 of "
            "shape (H, W, 3)"
        )
    file = BytesIO()
    if ext == "png":
        Image.fromarray(pixels_HWC).save(file, "PNG")
    elif ext in ("jpg", "jpeg"):
        if not 1 <= quality <= 95:  # Pillow: above, files grow and pictures do not gain
            raise ValueError(f"quality is {quality}; it must be 1 to 95")
        Image.fromarray(pixels_HWC).save(file, "JPEG", quality=quality)
    else:
        raise ValueError(f"extension is {ext!r}; it must be png or jpg")
    return file.getvalue()


# ---- writing ----------------------------------------------------------------------------------


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """A temporary folder, whose files move into `folder` at the end, all or none of them."""
    check_empty(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    # Inside `folder`, so on the same file system, where renaming is atomic.
    aside = Path(mkdtemp(prefix=".packing-", dir=folder))
    claimed: list[Path] = []
    try:
        yield aside
        for name in sorted(os.listdir(aside)):
            claim(folder / name)
            claimed.append(folder / name)
        # After the claims, so that of two processes with other names at least one sees the other.
        others = Folder(folder).sizes().keys() - {path.name for path in claimed}
        if others:
            raise _not_empty(folder, min(others))
        for path in claimed:
            (aside / path.name).replace(path)
        aside.rmdir()
    except BaseException:
        for path in claimed:
            path.unlink()
        rmtree(aside)
        if is_new:
            with suppress(OSError):  # not empty: in use by another process
                folder.rmdir()
        raise


def _check_shards(samples_per_shard: int, shard_bytes: float, prefix: str) -> None:
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {samples_per_shard}; it must be at least 1")
    if not shard_bytes >= 1:
        raise ValueError(f"shard_bytes is {shard_bytes}; it must be at least 1")
    is_name = prefix.isprintable() and "/" not in prefix and not prefix.startswith(".")
    if not prefix or not is_name or "%" in prefix:
        raise ValueError(
            f"prefix is {prefix!r}; it must be a file name's beginning, printable and without %"
        )


def _write(
    samples: Iterable[Sample], writer: Any, on_progress: Callable[[int], None] | None
) -> None:
    keys: set[str] = set()
    with writer:
        for key, image, extension, label in samples:
            kind, text = _check(key, image, extension, label)
            if key in keys:
                raise ValueError(f"duplicate key {key}: every sample must have its own")
            keys.add(key)
            writer.write({"__key__": key, extension: image, kind: text})
            if on_progress:
                on_progress(len(keys))
    if not keys:
        raise ValueError("there are no samples: a shard must have at least one")


def _check(
    key: str, image: bytes, extension: str, label: int | Mapping[int, float]
) -> tuple[str, bytes]:
    """Check a sample; the label as it is written: (extension, text)."""
    if not key or not key.isprintable() or "." in key or "/" in key:
        raise ValueError(
            f"key is {key!r}; it must be printable and without dots, which end a key, and slashes"
        )
    if extension not in IMAGES:
        raise ValueError(
            f"extension of {key} is {extension!r}; it must be one of {', '.join(IMAGES)}"
        )
    if not image:
        raise ValueError(f"image of {key} is empty; it must be a {extension} file")
    several = label if isinstance(label, Mapping) else {label: 1.0}
    try:
        return labels.to_text(labels.checked(list(several), list(several.values())))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"label of {key} is {label} ({error}); it must be a whole number of 0 to "
            f"{labels.MAX_LABEL}, or 1 to {labels.MAX_LABELS} of them with weights"
        ) from error


def _flush_to_disk(name: str) -> None:
    with open(name, "rb") as file:
        os.fsync(file.fileno())
