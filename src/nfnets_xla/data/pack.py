"""Packing: samples, or a folder of images by class, into tars that WebDataset reads.

The tars are written by webdataset's own writer, and the same samples give the same bytes. They are
made aside and moved into place when all is well, so that a failure leaves nothing behind.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

import numpy as np
from numpy.typing import NDArray
from PIL import Image

EXTENSIONS = ("png", "jpg", "jpeg", "webp")
CLASSES = "classes.json"

Sample = tuple[str, bytes, str, int]  # key, image file, its extension, label


def pack_samples(
    samples: Iterable[Sample],
    folder: str | Path,
    *,
    samples_per_shard: int,
    prefix: str = "shard",
    on_progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write samples in their order to `<folder>/<prefix>-000000.tar` and so on; return the shards.

    Keys must be unique, without dots and slashes; images are copied as they are. `on_progress` is
    called with the samples done so far. Raises ValueError for a bad or repeated sample, for none at
    all, and for a folder that has shards already. A process that is killed leaves a folder
    `.packing-*` behind, which can be deleted.
    """
    with _aside(Path(folder)) as aside:
        _write_shards(samples, aside, samples_per_shard, prefix, on_progress)
    return sorted(Path(folder).glob("*.tar"))


def pack_image_folder(
    source: str | Path,
    folder: str | Path,
    *,
    samples_per_shard: int = 1000,
    prefix: str = "shard",
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Pack `<source>/<class>/<image>`; return the shards.

    A class's label is its place among the sorted folder names, which `classes.json` lists in this
    order. Images are shuffled by `seed`, so that no shard is of one class; keys are
    `<class>-<file name>`, dots as underscores. `on_progress` is called with (images done, images).
    Hidden files, and files beside the class folders, are left out. Raises ValueError for any other
    file that is not an image, for a class without images, and as `pack_samples` does.
    """
    classes, images = _find_images(Path(source))
    keys = sorted(images)

    def shuffled() -> Iterator[Sample]:
        for number in np.random.default_rng(seed).permutation(len(keys)):
            path, label = images[keys[number]]
            yield keys[number], path.read_bytes(), _extension(path), label

    def progress(done: int) -> None:
        if on_progress:
            on_progress(done, len(keys))

    with _aside(Path(folder)) as aside:
        (aside / CLASSES).write_text(json.dumps(classes, indent=1) + "\n")
        _write_shards(shuffled(), aside, samples_per_shard, prefix, progress)
    return sorted(Path(folder).glob("*.tar"))


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
    """A place to write files in, which at the end move into `folder`, all or none of them."""
    if any(folder.glob("*.tar")) or (folder / CLASSES).exists():
        raise ValueError(f"{folder} holds shards or {CLASSES} already: choose an empty folder")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    # Within the folder, and so on its file system: there, to rename is atomic.
    aside = Path(mkdtemp(prefix=".packing-", dir=folder))
    moved: list[Path] = []
    try:
        yield aside
        for path in sorted(aside.iterdir()):
            path.replace(folder / path.name)
            moved.append(folder / path.name)
        aside.rmdir()
    except BaseException:
        for path in moved:
            path.unlink()
        rmtree(aside)
        if is_new:
            folder.rmdir()
        raise


def _write_shards(
    samples: Iterable[Sample],
    folder: Path,
    samples_per_shard: int,
    prefix: str,
    on_progress: Callable[[int], None] | None,
) -> None:
    from webdataset.writer import ShardWriter  # imports torch, which the rest does without

    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {samples_per_shard}; it must be at least 1")
    if not prefix or "/" in prefix or "%" in prefix or prefix.startswith("."):
        raise ValueError(f"prefix is {prefix!r}; it must be a file name's beginning, without %")
    keys: set[str] = set()
    with ShardWriter(
        str(folder).replace("%", "%%") + f"/{prefix}-%06d.tar",
        maxcount=samples_per_shard,
        maxsize=float("inf"),
        post=_flush_to_disk,
        verbose=0,
        encoder=False,
        # Pinned, as they are part of the bytes.
        mtime=0,
        user="bigdata",
        group="bigdata",
        mode=0o444,
    ) as writer:
        for key, image, extension, label in samples:
            _check(key, image, extension, label)
            if key in keys:
                raise ValueError(f"duplicate key {key}: every sample must have its own")
            keys.add(key)
            writer.write({"__key__": key, extension: image, "cls": str(int(label)).encode()})
            if on_progress:
                on_progress(len(keys))
    if not keys:
        raise ValueError("there are no samples: a shard must have at least one")


def _check(key: str, image: bytes, extension: str, label: int) -> None:
    if not key or not key.isprintable() or "." in key or "/" in key:
        raise ValueError(
            f"key is {key!r}; it must be printable and without dots, which end a key, and slashes"
        )
    if extension not in EXTENSIONS:
        raise ValueError(
            f"extension of {key} is {extension!r}; it must be one of {', '.join(EXTENSIONS)}"
        )
    if not image:
        raise ValueError(f"image of {key} is empty; it must be a {extension} file")
    if isinstance(label, bool) or not isinstance(label, int | np.integer) or label < 0:
        raise ValueError(f"label of {key} is {label}; it must be a whole number of 0 or more")


def _flush_to_disk(name: str) -> None:
    with open(name, "rb") as file:
        os.fsync(file.fileno())


# ---- finding ----------------------------------------------------------------------------------


def _find_images(source: Path) -> tuple[list[str], dict[str, tuple[Path, int]]]:
    """Class names, and by key each image's path and label."""
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder: give one that holds <class>/<image>")
    folders = sorted(
        (path for path in source.iterdir() if path.is_dir() and not path.name.startswith(".")),
        key=lambda path: path.name,
    )
    if not folders:
        raise ValueError(f"{source} holds no class folders: images must be <class>/<image>")
    images: dict[str, tuple[Path, int]] = {}
    for label, folder in enumerate(folders):
        before = len(images)
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                continue
            if not path.is_file() or _extension(path) not in EXTENSIONS:
                raise ValueError(
                    f"{path} is not a {', '.join(EXTENSIONS)} file: convert it or move it away"
                )
            key = f"{folder.name}-{path.stem}".replace(".", "_")
            if key in images:
                raise ValueError(
                    f"duplicate key {key}, of {images[key][0]} and {path}: rename one of them"
                )
            images[key] = path, label
        if len(images) == before:
            raise ValueError(f"class folder {folder} holds no images: remove it or fill it")
    return [folder.name for folder in folders], images


def _extension(path: Path) -> str:
    return path.suffix.lower().removeprefix(".")
