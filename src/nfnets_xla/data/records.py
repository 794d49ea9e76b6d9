"""A sidecar: where the samples of one shard are in the tar, and their labels.

It is `<shard>.idx.npz` beside the shard, and depends only on the shard's bytes, which its digest
identifies. It has about 24 bytes per sample plus the key: 10,000 samples take 0.3 MB.

Shape suffixes: N samples of one shard, M labels of them all, one sample's after another's.
"""

import hashlib
import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nfnets_xla.data.npz import Arrays, from_npz

SIDECAR = ".idx.npz"  # after the shard's whole name
DIGEST = 16  # bytes of SHA-256: against accidents, which happen among 400,000 shards

Labels = Mapping[int, float]  # of one sample: label -> weight


class Records(NamedTuple):
    """Little-endian, so that digests agree everywhere."""

    keys: NDArray[np.uint8]  # all keys end to end, in UTF-8
    key_ends_N: NDArray[np.uint32]
    offsets_N: NDArray[np.int64]  # of the image's first byte in the tar
    sizes_N: NDArray[np.uint32]  # bytes of the image
    crcs_N: NDArray[np.uint32]  # CRC-32 of the image's tar header and data
    labels_M: NDArray[np.int32]
    weights_M: NDArray[np.float32]  # of the labels; empty if all are 1
    label_ends_N: NDArray[np.uint32]  # empty if every sample has one label

    @property
    def num_samples(self) -> int:
        return len(self.offsets_N)

    @property
    def max_labels(self) -> int:
        """The most labels that a sample has."""
        if not len(self.label_ends_N):
            return 1
        return int(np.diff(self.label_ends_N, prepend=np.uint32(0)).max())

    def key(self, row: int) -> str:
        start = int(self.key_ends_N[row - 1]) if row else 0
        return self.keys[start : int(self.key_ends_N[row])].tobytes().decode()

    def labels(self, row: int) -> dict[int, float]:
        """Labels of a sample with their weights, in the order in which it lists them."""
        start, end = row, row + 1
        if len(self.label_ends_N):
            start = int(self.label_ends_N[row - 1]) if row else 0
            end = int(self.label_ends_N[row])
        weights = (
            self.weights_M[start:end].tolist() if len(self.weights_M) else [1.0] * (end - start)
        )
        return dict(zip(self.labels_M[start:end].tolist(), weights, strict=True))

    def digest(self) -> bytes:
        sha = hashlib.sha256()
        for name, values in self._asdict().items():
            sha.update(f"{name} {values.dtype.str} {len(values)}\n".encode() + values.tobytes())
        return sha.digest()[:DIGEST]

    def to_bytes(self) -> bytes:
        file = io.BytesIO()
        np.savez(file, **self._asdict())
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Records":
        """Raises ValueError for a damaged file; the digest tells whether it is the right one."""
        return from_npz(data, _of_types, "damaged")


def _of_types(arrays: Arrays) -> Records:
    records = Records(**arrays)
    for values, dtype in zip(records, _DTYPES, strict=True):
        if values.dtype != dtype or values.ndim != 1:
            raise ValueError("arrays of other types")
    return records


_DTYPES = ("<u1", "<u4", "<i8", "<u4", "<u4", "<i4", "<f4", "<u4")


def make_records(
    keys: Sequence[str], images: Sequence[tuple[int, int, int]], labels: Sequence[Labels]
) -> Records:
    """From each sample's key, (offset, size, CRC-32) of its image, and labels."""
    coded = [key.encode() for key in keys]
    offsets, sizes, crcs = zip(*images, strict=True)
    weights_M = np.array([weight for of in labels for weight in of.values()], "<f4")
    label_ends_N = np.cumsum([len(of) for of in labels]).astype("<u4")
    return Records(
        keys=np.frombuffer(b"".join(coded), "u1"),
        key_ends_N=np.cumsum([len(key) for key in coded]).astype("<u4"),
        offsets_N=np.array(offsets, "<i8"),
        sizes_N=np.array(sizes, "<u4"),
        crcs_N=np.array(crcs, "<u4"),
        labels_M=np.array([label for of in labels for label in of], "<i4"),
        weights_M=weights_M[:0] if (weights_M == 1).all() else weights_M,
        label_ends_N=label_ends_N[:0] if len(weights_M) == len(keys) else label_ends_N,
    )
