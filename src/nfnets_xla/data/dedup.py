"""Near-duplicates: samples that show the same picture, perhaps cropped or written on.

    matches = find([train], [imagenet], "dedup", Settings())   # goes on where it was stopped
    lines = doubles(matches, most_distance=0.25)               # what `data.exclude` reads

There are three passes, and each writes files into a folder; the first and last work shard by shard.
`thumbnails/` has the thumbnails of a shard (`thumbnail.py`), named after its checksums, so that
unchanged shards are not read again. `references-*` is the index of the pictures to search for
(`references.py`). `matches/` has, for each shard, the pairs with near hashes and the distances of
their pictures (`likeness.py`), so that a threshold can be chosen afterwards, in seconds.

Shape suffixes: P pictures, S shards or sides, M matches, C candidates.
"""

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from nfnets_xla.data.jobs import Progress, map_jobs
from nfnets_xla.data.likeness import likeness
from nfnets_xla.data.npz import Arrays, from_npz
from nfnets_xla.data.perceptual import views
from nfnets_xla.data.references import (
    AT_A_TIME,
    Found,
    References,
    build_references,
    is_first,
    load_references,
)
from nfnets_xla.data.shards import ShardIndex
from nfnets_xla.data.storage import Folder, local
from nfnets_xla.data.thumbnail import SIDE, Thumbnails, thumbnails

In = TypeVar("In")
Out = TypeVar("Out")
Ints = NDArray[np.int64]

FORMAT = 2  # of all files; changes with their content
OPENED = 64  # shards kept open at a time
THUMBNAILS, MATCHES, REFERENCES = "thumbnails", "matches", "references"
MOST_BITS = 44  # above, about every thousandth pair of pictures is near by chance
FARTHEST = 0.7  # largest distance of the pairs kept, to choose a threshold from


@dataclass(frozen=True)
class Settings:
    crop: float = 0.7  # share of a picture's area that a copy may be cropped to
    most_bits: int = 32  # of 128 that may differ between hashes
    compare: bool = True  # compare pixels; else every pair with near hashes has distance 0

    def check(self) -> None:
        """Raises ValueError for what is out of range."""
        views(self.crop)
        if not 0 <= self.most_bits <= MOST_BITS:
            raise ValueError(f"bits is {self.most_bits}; it must be 0 to {MOST_BITS} of 128")


class Matches(NamedTuple):
    """Samples of `train` that are near ones of `against`, each perhaps near several."""

    train: list[ShardIndex]  # of one shard each
    against: list[ShardIndex]
    sample_M2: NDArray[np.int64]  # shard and row
    reference_M2: NDArray[np.int64]
    bits_M: NDArray[np.int64]
    distance_M: NDArray[np.float32]
    undecodable: int  # samples that could not be decoded, and so not be compared


class Kept(NamedTuple):
    """The thumbnails of a shard, and the row of each."""

    pictures_PSS: Thumbnails
    rows_P: NDArray[np.int64]


def find(
    train: Sequence[ShardIndex],
    against: Sequence[ShardIndex],
    folder: str | Path,
    settings: Settings,
    *,
    engine: str = "local",
    jobs: int = 1,
    on_progress: Callable[[str], Progress | None] = lambda verb: None,
) -> Matches:
    """Samples of `train` that are near one of `against`; or without any, near one another."""
    settings.check()
    path = local(folder)
    for part in (THUMBNAILS, MATCHES):
        (path / part).mkdir(parents=True, exist_ok=True)
    where = Folder(path)
    shards = _single(train)
    references = _single(against) if against else shards
    every = list({_file(shard): shard for shard in [*references, *shards]}.values())

    def mapped(job: Callable[[In], Out], items: Sequence[In], verb: str) -> list[Out]:
        bar = on_progress(verb)
        return list(map_jobs(job, items, engine=engine, jobs=jobs, on_progress=bar))

    undecodable = mapped(partial(_keep, where), every, "hashed")
    name = _refer(where, references, settings.crop)
    job = partial(_search, where, name, settings, not against)
    files = mapped(job, list(enumerate(shards)), "searched")
    found = [_read(where, file) for file in files]
    return Matches(
        shards,
        references,
        sample_M2=np.concatenate([_numbered(n, part["row"]) for n, part in enumerate(found)]),
        reference_M2=np.concatenate([part["reference"] for part in found]),
        bits_M=np.concatenate([part["bits"] for part in found]),
        distance_M=np.concatenate([part["distance"] for part in found]),
        undecodable=sum(undecodable),
    )


# ---- what is in both, and which to leave out --------------------------------------------------


class Double(NamedTuple):
    """A sample to be left out, and the one that stays, or is evaluated on."""

    sample: tuple[int, int]  # shard and row
    matched: tuple[int, int]
    distance: float


def doubles(matches: Matches, most_distance: float) -> list[Double]:
    """Samples to leave out, in order. Within one set, the first sample of each group stays; for the
    others the distance is that to the nearest in their group."""
    near = np.flatnonzero(matches.distance_M <= most_distance)
    near = near[np.argsort(matches.distance_M[near], kind="stable")]
    within = matches.against is matches.train
    group = _Groups() if within else None
    nearest: dict[tuple[int, int], tuple[tuple[int, int], float]] = {}
    for match in near:
        (shard, row), (other, at) = matches.sample_M2[match], matches.reference_M2[match]
        sample, reference = (int(shard), int(row)), (int(other), int(at))
        distance = float(matches.distance_M[match])
        nearest.setdefault(sample, (reference, distance))
        if group is not None:
            nearest.setdefault(reference, (sample, distance))
            group.join(sample, reference)
    found = []
    for sample, (reference, distance) in sorted(nearest.items()):
        matched = reference if group is None else group.first(sample)
        if group is None or matched != sample:
            found.append(Double(sample, matched, distance))
    return found


class _Groups:
    """Groups of samples (union-find), each identified by its first sample."""

    def __init__(self) -> None:
        self._before: dict[tuple[int, int], tuple[int, int]] = {}

    def first(self, sample: tuple[int, int]) -> tuple[int, int]:
        path = [sample]
        while (before := self._before.get(path[-1], path[-1])) != path[-1]:
            path.append(before)
        self._before.update(dict.fromkeys(path, path[-1]))
        return path[-1]

    def join(self, one: tuple[int, int], other: tuple[int, int]) -> None:
        first, second = sorted([self.first(one), self.first(other)])
        self._before[second] = first


def exclusion_lines(matches: Matches, found: Iterable[Double]) -> Iterator[str]:
    """Lines of an exclusion list: id, matched id, distance, separated by tabs."""
    opened = opener(matches)
    for double in found:
        (shard, row), (other, at) = double.sample, double.matched
        ids = opened(False, shard).sample_id(0, row), opened(True, other).sample_id(0, at)
        yield f"{ids[0]}\t{ids[1]}\t{double.distance:.3f}\n"


def opener(matches: Matches) -> Callable[[bool, int], ShardIndex]:
    """`opened(is_reference, shard)`: a copy of a shard's index; the latest OPENED ones are cached,
    since each keeps its file open and the ids it has read."""

    @lru_cache(OPENED)
    def opened(is_reference: bool, shard: int) -> ShardIndex:
        return replace((matches.against if is_reference else matches.train)[shard])

    return opened


# ---- jobs -------------------------------------------------------------------------------------


def _keep(where: Folder, shard: ShardIndex) -> int:
    """Make the thumbnails of a shard, if missing; the number of samples that do not decode."""
    kept = _kept(where, shard)
    if kept is None:
        shard = replace(shard)  # a copy, so that its open file is closed at the end
        pictures, rows = [np.zeros((0, SIDE, SIDE), np.uint8)], []
        for row in range(shard.num_samples):
            data = shard.read(0, row)
            try:
                pictures.append(thumbnails(data))
            except ValueError:
                continue  # counted here, named by `lint`; training gives it weight 0
            rows += [row] * len(pictures[-1])
        kept = Kept(np.concatenate(pictures), np.array(rows, np.int64))
        _write(where, _file(shard), {"pictures": kept.pictures_PSS, "rows": kept.rows_P})
    return shard.num_samples - len(np.unique(kept.rows_P))


def _refer(where: Folder, references: list[ShardIndex], crop: float) -> str:
    """Build the index of references, if missing; its name without suffix."""
    sha = hashlib.sha256(f"{FORMAT} {crop}".encode())
    for shard in references:
        sha.update(shard.manifest.digests_S.tobytes())
    name = f"{REFERENCES}-{sha.hexdigest()[:16]}"
    kept = (_known(where, shard) for shard in references)
    parts = ((part.pictures_PSS, _numbered(n, part.rows_P)) for n, part in enumerate(kept))
    build_references(where.path / f"{name}.faiss", parts, crop)
    return name


COLUMNS = ("row", "reference", "bits", "distance")


def _search(
    where: Folder, name: str, settings: Settings, within: bool, item: tuple[int, ShardIndex]
) -> str:
    """Find the matches of a shard, if missing; the name of their file."""
    number, shard = item
    described = f"{name} {settings} {number if within else ''} {shard.manifest.key(0)}"
    file = f"{MATCHES}/{hashlib.sha256(described.encode()).hexdigest()[:32]}.npz"
    if where.modified(file) is not None:
        return file
    references = load_references(where.path / f"{name}.faiss", settings.crop)
    kept, parts = _known(where, shard), [_nothing()]
    if within:
        # A picture that an earlier sample shows is searched for there; here it is just a copy.
        first_K2 = references.first_P2[references.shown_by(number)]
        again = (first_K2 != _numbered(number, kept.rows_P)).any(axis=1)
        bits, distance = np.zeros((2, int(again.sum())))
        same = [bits.astype(np.int64), distance.astype(np.float32)]
        parts.append([kept.rows_P[again], first_K2[again], *same])
        kept = Kept(kept.pictures_PSS[~again], kept.rows_P[~again])
    for first in range(0, len(kept.rows_P), AT_A_TIME):
        pictures = kept.pictures_PSS[first : first + AT_A_TIME]
        found, distance_C = _near(references, settings, pictures)
        row_C = kept.rows_P[first + found.query_C]
        parts.append([row_C, references.first_P2[found.reference_C], found.bits_C, distance_C])
    columns = [np.concatenate(part) for part in zip(*parts, strict=True)]
    chosen = _chosen(columns, number if within else -1)
    _write(where, file, {key: part[chosen] for key, part in zip(COLUMNS, columns, strict=True)})
    return file


def _near(
    references: References, settings: Settings, pictures_QSS: Thumbnails
) -> tuple[Found, NDArray[np.float32]]:
    """References whose hashes are near, and the distances of their pictures."""
    found = references.search(pictures_QSS, settings.most_bits)
    if not settings.compare:
        return found, np.zeros(len(found.query_C), np.float32)
    copies = pictures_QSS[found.query_C]
    copies[found.mirrored_C] = copies[found.mirrored_C, :, ::-1]
    placed = [references.views[view] for view in found.view_C]
    theirs = references.pictures_PSS[found.reference_C]
    distance_C = 1 - likeness(copies, theirs, placed)
    distance_C[(copies == theirs).all(axis=(1, 2))] = 0  # without the fit's rounding errors
    return found, distance_C


def _chosen(columns: list[NDArray], number: int) -> Ints:
    """The matches to keep, in order: no sample with itself, and only the nearer picture of a sample
    that has two because it has a border."""
    row_M, reference_M2, bits_M, distance_M = columns
    is_other_M = (reference_M2 != _numbered(number, row_M)).any(axis=1)
    order = np.lexsort([bits_M, distance_M, *reference_M2.T[::-1], row_M])
    order = order[(is_other_M & (distance_M <= FARTHEST))[order]]
    return order[is_first(np.column_stack([row_M, reference_M2])[order])]


def _nothing() -> list[NDArray]:
    ints = np.zeros(0, np.int64)
    return [ints, np.zeros((0, 2), np.int64), ints, np.zeros(0, np.float32)]


# ---- files ------------------------------------------------------------------------------------


def _single(indexes: Sequence[ShardIndex]) -> list[ShardIndex]:
    """One index per shard, as a job needs it."""
    found = []
    for index in indexes:
        names = (index.name(shard).encode() for shard in range(index.num_shards))
        for shard, name in enumerate(names):
            manifest = index.manifest._replace(
                names=np.frombuffer(name, "u1"),
                name_ends_S=np.array([len(name)], "<u4"),
                counts_S=index.manifest.counts_S[shard : shard + 1],
                bytes_S=index.manifest.bytes_S[shard : shard + 1],
                digests_S=index.manifest.digests_S[shard : shard + 1],
            )
            found.append(ShardIndex(index.folder, manifest))
    return found


def _file(shard: ShardIndex) -> str:
    return f"{THUMBNAILS}/{shard.manifest.key(0)}.npz"


def _known(where: Folder, shard: ShardIndex) -> Kept:
    """Thumbnails to search, without plain ones, which would all match one another."""
    kept = _kept(where, shard)
    if kept is None:
        raise ValueError(f"{where}/{_file(shard)} is missing or damaged: give the command again")
    plain_P = np.ptp(kept.pictures_PSS, axis=(1, 2)) == 0
    return Kept(kept.pictures_PSS[~plain_P], kept.rows_P[~plain_P])


def _kept(where: Folder, shard: ShardIndex) -> Kept | None:
    try:
        arrays = _read(where, _file(shard))
        return Kept(arrays["pictures"], arrays["rows"])
    except (FileNotFoundError, ValueError, KeyError):
        return None


def _write(where: Folder, name: str, arrays: dict[str, NDArray]) -> None:
    file, every = io.BytesIO(), {"format": np.array([FORMAT, SIDE]), **arrays}
    np.savez(file, allow_pickle=False, **every)
    where.write(name, file.getvalue())


def _read(where: Folder, name: str) -> dict[str, NDArray]:
    """Raises ValueError for a damaged file, or one of another format."""
    fault = f"{where}/{name} is damaged, or of another format: delete it"
    return from_npz(where.read(name), _of_format, fault)


def _of_format(arrays: Arrays) -> Arrays:
    if arrays.pop("format").tolist() != [FORMAT, SIDE]:
        raise ValueError("another format")
    return arrays


def _numbered(shard: int, rows: Ints) -> Ints:
    return np.column_stack([np.full(len(rows), shard, np.int64), rows])
