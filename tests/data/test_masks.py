"""Masks depend on the row's key alone, and are as random as claimed."""

from typing import Any

import numpy as np
import pytest

from nfnets_xla.data import masks
from nfnets_xla.data.masks import AUGMENT, DROPOUT, STOCHASTIC_DEPTH, dropout_bits, keep_masks

ROWS = 4096
SAMPLE = np.arange(ROWS) + 3_999_000_000  # sample numbers as large as real ones
EPOCH, VIEW = np.full(ROWS, 5), np.zeros(ROWS, np.int64)


def depth(
    sample: np.ndarray = SAMPLE, *, seed: int = 0, epoch: int = 5, view: int = 0
) -> np.ndarray:
    epochs, views = np.full(len(sample), epoch), np.full(len(sample), view)
    return keep_masks(seed, epochs, sample, views, [0.5] * 12)


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Share of equal bits; 0.5 for unrelated masks of rate 0.5."""
    return float((a == b).mean())


# ---- what a row's masks depend on ---------------------------------------------------------------


def test_a_row_has_its_masks_in_any_batch() -> None:
    whole_depth = depth()
    whole_bits = dropout_bits(0, EPOCH, SAMPLE, VIEW, features=13, rate=0.3)
    rows = np.random.default_rng(0).permutation(ROWS)[:50]
    assert np.array_equal(depth(SAMPLE[rows]), whole_depth[rows])
    some = dropout_bits(0, EPOCH[rows], SAMPLE[rows], VIEW[rows], features=13, rate=0.3)
    assert np.array_equal(some, whole_bits[rows])
    for row in rows[:5]:
        assert np.array_equal(depth(SAMPLE[[row]])[0], whole_depth[row])


def test_more_blocks_or_features_leave_the_first_ones_as_they_were() -> None:
    few = keep_masks(0, EPOCH, SAMPLE, VIEW, [0.5] * 5)
    assert np.array_equal(few, depth()[:, :5])


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 6}, {"view": 1}], ids=str)
def test_every_part_of_the_key_matters(change: dict[str, Any]) -> None:
    assert abs(agreement(depth(), depth(**change)) - 0.5) < 0.01


def test_neighbouring_samples_are_unrelated() -> None:
    assert abs(agreement(depth()[:-1], depth()[1:]) - 0.5) < 0.01


def test_parts_of_the_key_are_not_added_up() -> None:
    """(sample 1, view 0) and (sample 0, view 1) have different keys; so do any two parts."""
    keys = [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    draws = {tuple(masks.row_rng(AUGMENT, *key).random(4)) for key in keys}
    assert len(draws) == 4


def test_purposes_do_not_meet() -> None:
    depth_words, dropout_words = (
        masks._row_words(purpose, 0, EPOCH, SAMPLE, VIEW, 2)
        for purpose in (STOCHASTIC_DEPTH, DROPOUT)
    )
    assert np.intersect1d(depth_words, dropout_words).size == 0  # 0.02 expected by chance


def test_all_rows_at_once_draw_what_each_would_draw_alone() -> None:
    words = masks._row_words(DROPOUT, 0, EPOCH[:20], SAMPLE[:20], VIEW[:20] + 3, 9)
    for sample, row in zip(SAMPLE[:20].tolist(), words, strict=True):
        alone = masks.row_rng(DROPOUT, 0, 5, sample, 3).bit_generator.random_raw(5)
        assert np.array_equal(alone.astype("<u8").view("<u4")[:9], row)


def test_known_words() -> None:
    """Golden: if they change, so do the masks and views of every run ever started."""
    philox = masks.row_rng(AUGMENT, 1, 2, 3, 4).bit_generator
    assert philox.random_raw(2).tolist() == [9613461377887383460, 11213342618990657159]


# ---- how often they drop ------------------------------------------------------------------------


def test_stochastic_depth_drops_at_its_rates() -> None:
    rates = [0.0, 0.05, 0.25, 0.5, 0.9]
    kept = keep_masks(0, EPOCH, SAMPLE, VIEW, rates)
    assert kept.dtype == np.uint8
    assert kept.shape == (ROWS, 5)
    assert kept[:, 0].all()
    deviation = np.sqrt(np.multiply(rates, np.subtract(1, rates)) / ROWS)
    assert (abs(kept.mean(axis=0) - np.subtract(1, rates)) <= 4 * deviation).all()
    together = np.corrcoef(kept[:, 1:].T) - np.eye(4)
    assert abs(together).max() < 4 / np.sqrt(ROWS)  # blocks are dropped independently


def test_dropout_is_packed_low_bit_first_and_drops_at_its_rate() -> None:
    bits = dropout_bits(0, EPOCH, SAMPLE, VIEW, features=45, rate=0.2)
    assert bits.dtype == np.uint8
    assert bits.shape == (ROWS, 6)
    unpacked = np.unpackbits(bits, axis=1, bitorder="little")
    assert not unpacked[:, 45:].any()
    words = masks._row_words(DROPOUT, 0, EPOCH, SAMPLE, VIEW, 45)
    assert np.array_equal(unpacked[:, :45], words >= 0.2 * 2**32)
    assert abs(unpacked[:, :45].mean() - 0.8) < 4 * np.sqrt(0.16 / (45 * ROWS))


def test_words_are_uniform() -> None:
    """Chi-square over 256 bins of the highest byte, which decides: 255 +- 5 deviations of 22.6."""
    words = masks._row_words(DROPOUT, 0, EPOCH, SAMPLE, VIEW, 64)
    counts = np.bincount((words >> 24).ravel(), minlength=256)
    expected = words.size / 256
    assert abs(((counts - expected) ** 2 / expected).sum() - 255) < 5 * np.sqrt(2 * 255)


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_rates_outside_their_range_are_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
        keep_masks(0, EPOCH, SAMPLE, VIEW, [0.0, rate])
    with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
        dropout_bits(0, EPOCH, SAMPLE, VIEW, features=8, rate=rate)


def test_negative_keys_and_no_features_are_refused() -> None:
    """A negative number would wrap around to the key of another row."""
    with pytest.raises(ValueError, match="the sample of a row's key is -1"):
        depth(np.array([4, -1]))
    with pytest.raises(ValueError, match="the view of a row's key is -2"):
        masks.row_rng(AUGMENT, 0, 0, 0, -2)
    with pytest.raises(ValueError, match="the seed of a row's key is -3"):
        depth(seed=-3)
    with pytest.raises(ValueError, match="dropout has 0 features"):
        dropout_bits(0, EPOCH, SAMPLE, VIEW, features=0, rate=0.1)
