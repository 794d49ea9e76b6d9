"""Keyed randomness: what is drawn for a row depends only on the row's key.

A row's key is (seed, epoch, sample, view). `sample` is its number in the whole index: the number of
samples in all earlier shards, plus its row. Batch, worker, host, device and earlier draws do not
matter. Stochastic-depth and dropout masks are inputs of the step, so both passes of SAM use the
same ones.

The generator is Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), a
keyed bijection of a 256-bit counter. The row's key is put *into* the counter, a word for each part,
so that distinct keys give disjoint streams by construction, not by the luck of a hash:

    Philox key      (seed, purpose)
    Philox counter  (n-th block drawn, view, epoch, sample)

Only its raw words and `Generator.random` are used: neither changes between releases of numpy.

Shape suffixes: B rows, N residual blocks, F features, P = ceil(F / 8) bytes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

UInt8 = NDArray[np.uint8]

# Purposes of draws; those for different purposes are independent.
AUGMENT, STOCHASTIC_DEPTH, DROPOUT, RANDAUGMENT, MIX = 3, 4, 5, 6, 7


def row_rng(purpose: int, seed: int, epoch: int, sample: int, view: int) -> np.random.Generator:
    """The generator of one row. Raises ValueError for a negative part of the key."""
    for name, part in (("seed", seed), ("epoch", epoch), ("sample", sample), ("view", view)):
        _check_part(name, part)
    counter = np.array([0, view, epoch, sample], np.uint64)
    return np.random.Generator(np.random.Philox(key=_key(seed, purpose), counter=counter))


def keep_masks(
    seed: int, epoch_B: ArrayLike, sample_B: ArrayLike, view_B: ArrayLike, rates_N: Sequence[float]
) -> UInt8:
    """Stochastic depth's masks `(B, N)`: 1, with probability 1 - rate, keeps the row's block.

    Raises ValueError for a rate outside [0, 1) or a negative part of a key.
    """
    thresholds_N = np.array([_threshold(rate) for rate in rates_N], np.uint32)
    words = _row_words(STOCHASTIC_DEPTH, seed, epoch_B, sample_B, view_B, len(thresholds_N))
    return (words >= thresholds_N).astype(np.uint8)


def dropout_bits(
    seed: int,
    epoch_B: ArrayLike,
    sample_B: ArrayLike,
    view_B: ArrayLike,
    *,
    features: int,
    rate: float,
) -> UInt8:
    """Dropout's masks, packed: `(B, P)`, feature f of a row being bit f % 8 of its byte f // 8.

    A bit is 1, and keeps the feature, with probability 1 - rate; bits past the last feature are 0.
    Raises ValueError for a rate outside [0, 1), no features, or a negative part of a key.
    """
    if features < 1:
        raise ValueError(f"dropout has {features} features to mask; it needs at least 1")
    words = _row_words(DROPOUT, seed, epoch_B, sample_B, view_B, features)
    return np.packbits(words >= _threshold(rate), axis=1, bitorder="little")


def _row_words(
    purpose: int, seed: int, epoch_B: ArrayLike, sample_B: ArrayLike, view_B: ArrayLike, number: int
) -> NDArray[np.uint32]:
    """`number` random words for every row: (B, number)."""
    _check_part("seed", seed)
    sample_B = np.asarray(sample_B)
    counters_B4 = np.zeros((len(sample_B), 4), np.uint64)
    for column, (name, part_B) in enumerate(
        [("view", view_B), ("epoch", epoch_B), ("sample", sample_B)], start=1
    ):
        _check_part(name, np.min(part_B, initial=0))
        counters_B4[:, column] = part_B
    philox = np.random.Philox(key=_key(seed, purpose))
    # Setting one generator's counter for each row is twice as fast as making new generators.
    state: Any = philox.state
    raw = np.empty((len(sample_B), -(-number // 2)), "<u8")
    for row, counter in enumerate(counters_B4):
        state["state"]["counter"] = counter
        philox.state = state
        raw[row] = philox.random_raw(raw.shape[1])
    return raw.view("<u4")[:, :number]


def _key(seed: int, purpose: int) -> NDArray[np.uint64]:
    return np.array([seed, purpose], np.uint64)


def _threshold(rate: float) -> np.uint32:
    """Words below it drop. A word is below it with probability `rate`, to within 2**-32."""
    if not 0 <= rate < 1:
        raise ValueError(f"a drop rate is {rate}; it must be in [0, 1)")
    return np.uint32(min(round(rate * 2**32), 2**32 - 1))


def _check_part(name: str, smallest: Any) -> None:
    if smallest < 0:
        raise ValueError(f"the {name} of a row's key is {smallest}; it must be 0 or more")
