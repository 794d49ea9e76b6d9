"""Sources of samples to pack: a folder of images, a table, or a data set of `datasets`.

Folders and tables are read in an order drawn from a seed, so that no shard has only one class; data
sets are read in their own order.
"""

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nfnets_xla.data import labels
from nfnets_xla.data.decode import to_rgb
from nfnets_xla.data.jobs import Progress
from nfnets_xla.data.pack import Sample, encode_image, pack_samples
from nfnets_xla.data.scan import IMAGES


def pack_image_folder(
    source: str | Path,
    folder: str | Path,
    *,
    samples_per_shard: int = 1000,
    shard_bytes: float = float("inf"),
    prefix: str = "shard",
    seed: int = 0,
    on_progress: Progress | None = None,
) -> list[Path]:
    """Pack `<source>/<class>/<image>`; return the shards.

    A class's label is its position among the sorted folder names, which `classes.json` lists in
    that order. Keys are `<class>-<file name>`, with dots as underscores. Hidden files, and files
    beside the class folders, are ignored. Raises ValueError for any other file that is not an
    image, for a class without images, and as `pack_samples` does.
    """
    classes, images = _find_images(Path(source))
    return pack_samples(
        _shuffled(images, seed),
        folder,
        samples_per_shard=samples_per_shard,
        shard_bytes=shard_bytes,
        prefix=prefix,
        classes=classes,
        on_progress=_out_of(len(images), on_progress),
    )


def pack_table(
    table: str | Path,
    folder: str | Path,
    *,
    samples_per_shard: int = 1000,
    shard_bytes: float = float("inf"),
    prefix: str = "shard",
    seed: int = 0,
    on_progress: Progress | None = None,
) -> list[Path]:
    """Pack the images that a .csv or .parquet file lists; return the shards.

    Columns: `path`, relative to the table's folder; `label`, as in a .txt member (`3`, `3 7`,
    `3:0.8 7:0.2`) or, in Parquet, a number or a list of them; and optionally `key`, which defaults
    to the path, with slashes and dots as underscores. Other columns are ignored.
    """
    images = _read_table(Path(table))
    return pack_samples(
        _shuffled(images, seed),
        folder,
        samples_per_shard=samples_per_shard,
        shard_bytes=shard_bytes,
        prefix=prefix,
        on_progress=_out_of(len(images), on_progress),
    )


def dataset_samples(
    dataset: Iterable[Mapping[str, Any]], *, image: str = "image", label: str = "label"
) -> Iterator[Sample]:
    """Samples for `pack_samples` of rows like those of Hugging Face's `datasets`.

    An image is a Pillow image, which is written as PNG, or a file's bytes (or `{"bytes": ...}`),
    which are copied. A label is a number, a list of them, or labels with weights. Keys are the row
    numbers.
    """
    for number, row in enumerate(dataset):
        found = row[image].get("bytes") if isinstance(row[image], Mapping) else row[image]
        if isinstance(found, Image.Image):
            _check_range(found, f"row {number}: {image}")
            data, extension = encode_image(np.asarray(to_rgb(found))), "png"
        elif isinstance(found, bytes):
            data, extension = found, extension_of(found)
        else:
            raise ValueError(
                f"row {number}: {image} is {type(found).__name__}; it must be a Pillow image or a "
                "file's bytes"
            )
        found = row[label]
        if isinstance(found, np.ndarray) and found.ndim == 0:
            found = found.item()
        if isinstance(found, list | tuple | np.ndarray):
            found = _several(list(found), f"row {number}")
        yield f"{number:09d}", data, extension, found


def _check_range(image: Image.Image, what: str) -> None:
    """ValueError for 32-bit pixels (Pillow's modes I, F) whose value for white is unknown."""
    advice = 'bring it to 0 to 255 and convert it to "L" or "RGB"'
    if image.mode == "F":
        raise ValueError(f"{what} has fractions as pixels, mode F: {advice}")
    if image.mode == "I":
        pixels = np.asarray(image)
        low, high = pixels.min(), pixels.max()
        if low < 0 or not 255 < high < 2**16:  # of 16 bits, as to_rgb takes them
            raise ValueError(f"{what} has pixels of {low} to {high}, mode I: {advice}")


def extension_of(data: bytes) -> str:
    """The extension by the file's first bytes; "jpg" if it is neither PNG nor WebP."""
    if data.startswith(b"\x89PNG"):
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else "jpg"


# ---- tables -----------------------------------------------------------------------------------

Found = dict[str, tuple[Path, Any]]  # {key: (image file, label)}


def _read_table(path: Path) -> Found:
    if not path.is_file() or path.suffix not in TABLES:
        raise ValueError(f"{path} is no table: give a file that ends in {' or '.join(TABLES)}")
    images: Found = {}
    for number, row in enumerate(TABLES[path.suffix](path), start=1):
        where = f"{path}, row {number}"
        if not row.get("path") or row.get("label") in (None, ""):
            raise ValueError(f"{where}: it must have a path and a label")
        if not isinstance(row["path"], str):
            raise ValueError(f"{where}: path is {row['path']!r}; it must be text")
        image = path.parent / row["path"]
        if not image.is_file() or _extension(image) not in IMAGES:
            raise ValueError(f"{where}: {image} is not a {', '.join(IMAGES)} file")
        given = row.get("key")
        key = str(Path(row["path"]).with_suffix("") if given in (None, "") else given)
        key = key.replace("/", "_").replace(".", "_")
        if key in images:
            raise ValueError(f"{where}: duplicate key {key}: give each its own")
        images[key] = image, _label(row["label"], where)
    return images


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    done = 0
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # Excel writes a byte-order mark
            for row in csv.DictReader(file, strict=True):
                yield row
                done += 1
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): save it so") from error
    except csv.Error as error:
        raise ValueError(f"{path}, row {done + 1}: {error}: mend its quotes") from error


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(f"{path} needs pyarrow to be read: pip install pyarrow") from error
    done = 0
    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in COLUMNS if name in file.schema_arrow.names]
            for batch in file.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    yield row
                    done += 1
    except (ArrowException, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # from the disk, not damage
            raise
        what = " ".join(str(error).split())
        raise ValueError(f"{path}, row {done + 1}: {what}: write the file again") from error


TABLES = {".csv": _csv_rows, ".parquet": _parquet_rows}
COLUMNS = ("path", "label", "key")


def _label(value: Any, where: str) -> Any:
    if isinstance(value, list):
        return _several(value, where)
    if not isinstance(value, str):
        return _one(value, where)
    found = labels.parse("txt", value.encode())
    if found is None:
        raise ValueError(f"{where}: label {value!r} is none of 3, 3 7, 3:0.8 7:0.2")
    return found


def _one(value: Any, where: str) -> dict[int, float]:
    try:
        return labels.checked([value], [1.0])
    except (ValueError, TypeError):
        raise ValueError(
            f"{where}: label is {value!r}; it must be a whole number of 0 to {labels.MAX_LABEL}, "
            "in a column of integers"
        ) from None


def _several(values: list[Any], where: str) -> dict[int, float]:
    try:
        return labels.checked(values, [1.0] * len(values))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {values!r} is no list of labels, each once ({error})") from None


# ---- folders ----------------------------------------------------------------------------------


def _shuffled(images: Found, seed: int) -> Iterator[Sample]:
    keys = sorted(images)
    for number in np.random.default_rng(seed).permutation(len(keys)):
        path, label = images[keys[number]]
        yield keys[number], path.read_bytes(), _extension(path), label


def _out_of(total: int, on_progress: Progress | None) -> Callable[[int], None] | None:
    return None if on_progress is None else lambda done: on_progress(done, total)


def _find_images(source: Path) -> tuple[list[str], Found]:
    """Class names, and by key each image's path and label."""
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder: give one that holds <class>/<image>")
    folders = sorted(
        (path for path in source.iterdir() if path.is_dir() and not path.name.startswith(".")),
        key=lambda path: path.name,
    )
    if not folders:
        raise ValueError(f"{source} holds no class folders: images must be <class>/<image>")
    images: Found = {}
    for label, folder in enumerate(folders):
        before = len(images)
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                continue
            if not path.is_file() or _extension(path) not in IMAGES:
                raise ValueError(
                    f"{path} is not a {', '.join(IMAGES)} file: convert it or move it away"
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
