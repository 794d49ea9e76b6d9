"""Packs ImageNet (ILSVRC 2012), from the archives of image-net.org, into shards.

    ILSVRC2012_img_train.tar          1,000 tars, one a class, of 1,281,167 JPEGs
    ILSVRC2012_img_val.tar            50,000 JPEGs
    ILSVRC2012_devkit_t12.tar.gz      the labels of these, as ILSVRC's class numbers, with a key

A label is the standard index: the position of the class's WordNet id among the sorted ids. With
`real.json` (Beyer et al., arXiv 2006.07159: all fitting labels of each validation image) shards
with those labels are made, too, without images that no label fits; top-1 on them is ReaL accuracy.

Nothing is unpacked: images are found by offset, training images in a keyed order over all classes.
"""

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nfnets_xla.data.labels import checked
from nfnets_xla.data.pack import Sample, check_empty, pack_samples
from nfnets_xla.data.storage import Folder, OpenFile
from nfnets_xla.data.tar import Member, read_members

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
MAX_DEVKIT_MEMBER = 2**26  # bytes; the largest file in the published one has half a million
DEVKIT, REAL = "ILSVRC2012_devkit_t12.tar.gz", "real.json"
TRUTH, META = "/data/ILSVRC2012_validation_ground_truth.txt", "/data/meta.mat"  # in the devkit
CLASSES, TRAIN_IMAGES, VAL_IMAGES = 1000, 1_281_167, 50_000  # of the challenge


class Place(NamedTuple):
    key: str
    offset: int
    size: int


def pack_imagenet(
    source: str | Path,
    folder: str | Path,
    *,
    samples_per_shard: int = 1000,
    seed: int = 0,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> list[Path]:
    """Pack into `<folder>/train`, `val` and, with real.json, `val-real`; returns these.

    `on_progress` is called with (the folder's name, images done, images).

    Raises ValueError if an archive is missing or faulty, or holds other than the known counts.
    """
    if not Path(source).is_dir():
        raise ValueError(f"{source} is not a folder: give the one that holds {TRAIN}")
    where, out = Folder(source), Path(folder)
    for name in (TRAIN, VAL, DEVKIT):
        if where.modified(name) is None:
            raise ValueError(f"{source} has no {name}: get it from image-net.org")
    has_real = where.modified(REAL) is not None
    for name in ("train", "val", "val-real")[: 2 + has_real]:
        check_empty(out / name)
    # The small files first: scanning the large ones takes a while.
    synsets = _val_synsets(where.read(DEVKIT))
    real = _real_labels(where.read(REAL)) if has_real else None
    train = where.open(TRAIN)
    by_class = _train_places(train)
    index_of = {synset: number for number, synset in enumerate(sorted(by_class))}
    val = where.open(VAL)
    images = sorted(_files(val, 0, val.size, VAL))
    _expect(len(images), VAL_IMAGES, f"images in {VAL}")
    unknown = sorted(set(synsets) - set(index_of))
    if unknown:
        raise ValueError(f"{DEVKIT} has class {unknown[0]}, which {TRAIN} has not: get both again")
    labels = [{index_of[synset]: 1.0} for synset in synsets]
    splits = {
        "train": (TRAIN_IMAGES, _shuffled(train, by_class, index_of, seed)),
        "val": (VAL_IMAGES, _val(val, images, labels)),
    }
    if real is not None:
        splits["val-real"] = sum(map(bool, real)), _val(val, images, real)
    for name, (count, samples) in splits.items():

        def report(done: int, name: str = name, count: int = count) -> None:
            if on_progress:
                on_progress(name, done, count)

        pack_samples(
            samples,
            out / name,
            samples_per_shard=samples_per_shard,
            classes=sorted(by_class),
            on_progress=report,
        )
    return [out / name for name in splits]


def _shuffled(
    file: OpenFile, by_class: dict[str, list[Place]], index_of: dict[str, int], seed: int
) -> Iterator[Sample]:
    places = [(place, index_of[name]) for name in sorted(by_class) for place in by_class[name]]
    for number in np.random.default_rng(seed).permutation(len(places)):
        place, label = places[number]
        yield place.key, file.read(place.offset, place.size), "jpg", label


def _val(file: OpenFile, images: list[Place], labels: list[dict[int, float]]) -> Iterator[Sample]:
    """Validation images in the order of their numbers, without those that have no label."""
    for place, label in zip(images, labels, strict=True):
        if label:
            yield place.key, file.read(place.offset, place.size), "jpg", label


def _train_places(file: OpenFile) -> dict[str, list[Place]]:
    """Images by WordNet id: the train archive is a tar of tars, none of them compressed."""
    found: dict[str, list[Place]] = {}
    for member in _members(file, 0, file.size, TRAIN):
        synset = Path(member.name).stem
        end = member.offset + member.size
        found[synset] = sorted(_files(file, member.offset, end, f"{TRAIN}/{member.name}"))
    _expect(len(found), CLASSES, f"classes in {TRAIN}")
    _expect(sum(map(len, found.values())), TRAIN_IMAGES, f"images in {TRAIN}")
    return found


def _files(file: OpenFile, start: int, end: int, name: str) -> list[Place]:
    return [
        Place(Path(member.name).stem, member.offset, member.size)
        for member in _members(file, start, end, name)
    ]


def _members(file: OpenFile, start: int, end: int, name: str) -> Iterator[Member]:
    for member in read_members(file, start, end):
        if not isinstance(member, Member):
            raise ValueError(f"{name}, offset {member.offset}: {member.what}; get it again")
        if member.is_file:
            yield member


def _val_synsets(devkit: bytes) -> list[str]:
    """WordNet ids of the validation images. ILSVRC numbers its classes in an order of its own."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ValueError(f"{DEVKIT} needs scipy to be read: pip install scipy") from error
    try:
        truth, meta = _ground_truth(devkit)
        file: Any = io.BytesIO(meta)  # whose type the stubs of loadmat lack
        rows: Any = loadmat(file, squeeze_me=True)["synsets"]
        synset_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows}
        synsets = [synset_of[int(number)] for number in truth.split()]
    except MemoryError:
        raise
    except Exception as error:  # on damaged bytes tarfile, zlib and scipy raise nearly anything
        what = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{DEVKIT} cannot be read ({what}): get it again") from error
    _expect(len(synsets), VAL_IMAGES, f"labels in {DEVKIT}")
    return synsets


def _ground_truth(devkit: bytes) -> tuple[bytes, bytes]:
    """Two files of the devkit: the validation images' class numbers, and the classes."""
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(devkit), mode="r:gz") as tar:
        for member in tar:
            if member.size > MAX_DEVKIT_MEMBER:
                raise ValueError(f"it holds {member.size} bytes in one file")
            file = tar.extractfile(member)  # into memory: nothing is unpacked
            if file and member.name.endswith((TRUTH, META)):
                found[Path(member.name).name] = file.read()
    if len(found) < 2:
        raise ValueError("it lacks the ground truth or meta.mat")
    return found[Path(TRUTH).name], found[Path(META).name]


def _real_labels(text: bytes) -> list[dict[int, float]]:
    """The labels of each validation image, perhaps none."""
    try:
        each = [dict.fromkeys(found, 1.0) for found in json.loads(text)]
        real = [checked([*found], [*found.values()]) if found else {} for found in each]
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{REAL} is no list of lists of labels ({error}): get it again") from error
    _expect(len(real), VAL_IMAGES, f"entries in {REAL}")
    return real


def _expect(count: int, wanted: int, what: str) -> None:
    if count != wanted:
        raise ValueError(f"{count} {what}: there must be {wanted}; get it again")
