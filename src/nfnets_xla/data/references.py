"""The pictures whose near-duplicates are searched: their thumbnails, and an index of hashes.

An index holds the codes of all views of a picture (`perceptual.py`), and is searched by multi-index
hashing (Norouzi, Punjani and Fleet, 2012): near codes agree, or nearly agree, in some part, and
only codes that do are compared. It is a file, which every searching process reads once. A picture
that recurs, such as a web site's placeholder, is in it once.

Shape suffixes: P pictures, N of all samples, S sides of a thumbnail, V views, B bytes of a code,
Q queries, C found.
"""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from nfnets_xla.data.perceptual import BITS, View, codes, mirrored, views
from nfnets_xla.data.storage import flush_to_disk
from nfnets_xla.data.thumbnail import SIDE, Thumbnails

# Six parts of 20 bits, in each of which two may differ: this finds nearly all that comparing with
# all codes finds (tests/data/test_dedup.py), in buckets of a millionth of the codes each.
PARTS, PART_BITS, FLIPPED = 6, 20, 2
MOST = 32  # nearest references with which a picture is compared
AT_A_TIME = 1024  # pictures whose codes are computed together: 70 MB
SEARCHED = 16  # pictures searched together: each may have thousands of candidates
PICTURES, SAMPLES = ".pictures", ".samples.npy"


class Found(NamedTuple):
    """Candidates of some queries, nearest first within each."""

    query_C: NDArray[np.int64]
    reference_C: NDArray[np.int64]
    bits_C: NDArray[np.int64]  # number of differing bits
    view_C: NDArray[np.int64]  # the view that matched
    mirrored_C: NDArray[np.bool_]


class References(NamedTuple):
    pictures_PSS: Thumbnails  # each different from the others
    first_P2: NDArray[np.int64]  # shard and row of the first sample that shows it
    samples_N3: NDArray[np.int64]  # shard, row, and number of the picture: what every sample shows
    views: list[View]
    index: Any

    def shown_by(self, shard: int) -> NDArray[np.int64]:
        """Numbers of the pictures that a shard's samples show, in order of the samples."""
        begin, end = np.searchsorted(self.samples_N3[:, 0], [shard, shard + 1])
        return self.samples_N3[begin:end, 2]

    def search(self, pictures_QSS: Thumbnails, bits: int) -> Found:
        """References within `bits` bits of each query, or of its mirror image."""
        upright = codes(pictures_QSS)[:, 0]
        found = [
            self._search(first, upright[first : first + SEARCHED], bits)
            for first in range(0, len(upright), SEARCHED)
        ]
        return Found(*(np.concatenate(column) for column in zip(*found, strict=True)))

    def _search(self, first: int, upright: NDArray[np.uint8], bits: int) -> Found:
        sides = [self._within(queries, bits) for queries in (upright, mirrored(upright))]
        query, code, distance = (np.concatenate(parts) for parts in zip(*sides, strict=True))
        is_mirrored = np.repeat([False, True], [len(part[0]) for part in sides])
        reference, view = np.divmod(code, len(self.views))
        # The nearest view of each pair; then the nearest references of each query.
        order = np.lexsort([is_mirrored, view, distance, reference, query])
        pairs = np.stack([query, reference], axis=1)[order]
        order = order[is_first(pairs)]
        order = order[np.lexsort([reference[order], distance[order], query[order]])]
        order = order[_place_among_equals(query[order]) < MOST]
        found = (values[order] for values in (query + first, reference, distance, view))
        return Found(*found, mirrored_C=is_mirrored[order])

    def _within(self, queries_QB: NDArray[np.uint8], bits: int) -> tuple[NDArray[np.int64], ...]:
        ends, distances, found = self.index.range_search(queries_QB, bits + 1)
        query = np.repeat(np.arange(len(queries_QB)), np.diff(ends.astype(np.int64)))
        return query, found.astype(np.int64), distances.astype(np.int64)


def build_references(
    path: Path, parts: Iterable[tuple[Thumbnails, NDArray[np.int64]]], crop: float
) -> None:
    """Write the index to `path`, and thumbnails and samples beside it, unless `path` exists.

    A part has thumbnails, and the shard and row of each; ValueError if there are none. The index
    takes the most memory, here and when it is searched: docs/dedup.md says how much."""
    faiss = _faiss()
    of = views(crop)
    if path.is_file():
        return
    index = faiss.IndexBinaryMultiHash(BITS, PARTS, PART_BITS)
    numbers: dict[bytes, int] = {}  # of pictures, by the hash of their bytes
    samples = []
    with _replaced(path.with_suffix(PICTURES)) as temporary, temporary.open("wb") as file:
        for part_PSS, rows_P2 in parts:
            known = len(numbers)
            hashes = [hashlib.blake2b(picture, digest_size=16).digest() for picture in part_PSS]
            shown_P = np.array([numbers.setdefault(key, len(numbers)) for key in hashes], np.int64)
            samples.append(np.column_stack([rows_P2, shown_P]))
            _, first_P = np.unique(shown_P, return_index=True)
            new = part_PSS[first_P[shown_P[first_P] >= known]]
            for first in range(0, len(new), AT_A_TIME):
                some = new[first : first + AT_A_TIME]
                file.write(some.tobytes())
                index.add(codes(some, of).reshape(-1, BITS // 8))
        if not numbers:
            raise ValueError("no reference shows anything: give shards of whole pictures")
    with _replaced(path.with_suffix(SAMPLES)) as temporary, temporary.open("wb") as file:
        np.save(file, np.concatenate(samples))
    with _replaced(path) as temporary:
        try:
            faiss.write_index_binary(index, str(temporary))
        except RuntimeError as error:  # also if the disk is full
            raise OSError(f"{path} could not be written: {error}") from error


@lru_cache(1)  # a process searches one shard after another
def load_references(path: Path, crop: float) -> References:
    """What `build_references` wrote. Raises ValueError for what is damaged."""
    faiss = _faiss()
    try:
        index = faiss.read_index_binary(str(path))
        index.nflip = FLIPPED
        pictures = np.memmap(path.with_suffix(PICTURES), np.uint8, mode="r")
        samples_N3 = np.load(path.with_suffix(SAMPLES), allow_pickle=False)
        _, first_P = np.unique(samples_N3[:, 2], return_index=True)
        first_P2 = samples_N3[first_P, :2]
        pictures_PSS = pictures.reshape(len(first_P2), SIDE, SIDE)
    except (RuntimeError, ValueError, IndexError, EOFError) as error:  # the first is faiss's
        raise ValueError(
            f"{path} or a file beside it is damaged: delete {path.parent / path.stem}.*, and give "
            "the same command again"
        ) from error
    return References(pictures_PSS, first_P2, samples_N3, views(crop), index)


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """A temporary path to write to; at the end it replaces `path` as a whole."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        yield temporary
        flush_to_disk(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def is_first(rows_C2: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each of the sorted rows is the first of its equals."""
    return np.concatenate([[True], (np.diff(rows_C2, axis=0) != 0).any(axis=1)])[: len(rows_C2)]


def _place_among_equals(sorted_C: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.arange(len(sorted_C)) - np.searchsorted(sorted_C, sorted_C)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ValueError(
            f"near-duplicates are searched by faiss ({error}): pip install 'nfnets_xla[dedup]'"
        ) from error
    faiss.omp_set_num_threads(1)  # jobs are the parallelism
    return faiss
