"""Every operation is DeepMind's: equal to pixels of its code, and to plain twins at any size."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nfnets_xla.data.randaugment import OPERATIONS, Draw, rand_augment
from tests.reference import randaugment as twins

# Made by deepmind-research/nfnets/autoaugment.py (f5de0ed) under tensorflow 2.13.1, its addons
# 0.22.0 and numpy 1.24.3, with the random numbers fixed: the array "Rotate/15/-1" is `image` turned
# with magnitude 15 and a negative sign, "Cutout/5/6,21" cut out around row 6 and column 21.
DEEPMINDS = dict(np.load(Path(__file__).parents[1] / "fixtures" / "deepmind_randaugment.npz"))
IMAGE = DEEPMINDS.pop("image")

SIGNED = {"Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"}
PLAIN = {"AutoContrast", "Equalize", "Invert"}  # without a magnitude


def noise(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def rng(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def applied(name: str, image: np.ndarray, magnitude: float, first: float = 0, second: float = 0):
    result = OPERATIONS[name](Image.fromarray(image), Draw(magnitude / 10, first, second))
    return np.asarray(result).astype(int)


def test_the_fixture_has_every_operation() -> None:
    assert {key.split("/")[0] for key in DEEPMINDS} == set(OPERATIONS)
    assert len(OPERATIONS) == 16


@pytest.mark.parametrize("key", DEEPMINDS)
def test_pixels_are_deepminds(key: str) -> None:
    name, magnitude, *rest = key.split("/")
    first = second = 0.0
    if name == "Cutout":
        row, column = map(int, rest[0].split(","))
        first, second = (row + 0.5) / IMAGE.shape[0], (column + 0.5) / IMAGE.shape[1]
    elif rest:
        first = {"1": 0.5, "-1": 0.49}[rest[0]]
    ours = applied(name, IMAGE, int(magnitude), first, second)
    if name == "Sharpness":  # float32 just below a whole number: one level, before it is blended
        difference = np.abs(ours - DEEPMINDS[key])
        assert difference.max() <= max(1, abs(1 - (int(magnitude) / 10 * 1.8 + 0.1)) + 1)
        assert (difference > 0).mean() < 0.01
    else:
        assert np.array_equal(ours, DEEPMINDS[key])


@pytest.mark.parametrize("magnitude", [1, 5, 10, 15, 20])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_agree_with_plain_twins(name: str, magnitude: int) -> None:
    """Where float64 and float32 may fall on different sides of a whole number, either is right; so
    two of a hundred pixels of a rotated or sheared image may come from the neighbour."""
    twin = getattr(twins, re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    for seed, (height, width) in enumerate([(40, 40), (17, 61), (3, 4), (1, 1), (1, 5)]):
        for image in (noise(seed, height, width), np.full((height, width, 3), 77, np.uint8)):
            arguments: list[Any] = [] if name in PLAIN else [magnitude]
            first, second = rng(seed).random(2).tolist()
            if name in SIGNED:
                arguments.append(1 if first >= 0.5 else -1)
            if name == "Cutout":
                arguments += [int(first * height), int(second * width)]
            expected = twin(image, *arguments)
            result = applied(name, image, magnitude, first, second)
            below, above = np.floor(expected - 1e-3), np.floor(expected + 1e-3)
            wrong = ((result != below) & (result != above)).any(axis=2).sum()
            assert wrong <= (0.02 * height * width if name in SIGNED else 0)


@pytest.mark.parametrize("name", OPERATIONS)
def test_black_white_and_the_input_are_kept_whole(name: str) -> None:
    for value in (0, 255):
        image = np.full((9, 11, 3), value, np.uint8)
        result = applied(name, image, 15, 0.3, 0.6)
        assert result.shape == image.shape
        assert 0 <= result.min() <= result.max() <= 255
        assert (image == value).all()


def test_what_magnitude_10_means_here() -> None:
    """The threshold of 256 is stored in 8 bits; a view of 256 x 256 is blended with white."""
    assert np.array_equal(applied("Solarize", IMAGE, 10), 255 - IMAGE.astype(int))
    large = noise(0, 256, 256)
    assert applied("Contrast", large, 5).min() == 0  # a factor of 1 keeps the image
    assert applied("Contrast", large, 0).min() >= 0.9 * 255 - 1


def test_the_same_key_gives_the_same_view_and_every_operation_is_drawn() -> None:
    view = noise(0, 32, 32)
    one, other = (rand_augment(view, rng(7), operations=4, magnitude=15) for _ in range(2))
    assert np.array_equal(one, other)
    assert one.dtype == np.uint8
    calls = dict.fromkeys(OPERATIONS, 0)
    drawn = [int(which * 16) for n in range(400) for which, _, _ in rng(n).random((4, 3))]
    for which in drawn:
        calls[tuple(OPERATIONS)[which]] += 1
    assert min(calls.values()) > 100 - 5 * 10  # of 100 expected
    assert max(calls.values()) < 100 + 5 * 10


def test_operations_are_applied_in_turn() -> None:
    view, operations = noise(1, 24, 24), []
    image = Image.fromarray(view)
    for which, first, second in rng(3).random((3, 3)).tolist():
        name = tuple(OPERATIONS)[int(which * 16)]
        operations.append(name)
        image = OPERATIONS[name](image, Draw(1.0, first, second))
    result = rand_augment(view, rng(3), operations=3, magnitude=10)
    assert np.array_equal(result, np.asarray(image)), operations
    assert np.array_equal(rand_augment(view, rng(3), operations=0, magnitude=10), view)


def test_a_mirrored_view_is_taken_as_it_is_shown() -> None:
    view = noise(2, 16, 16)
    mirrored = view[:, ::-1]
    contiguous = np.ascontiguousarray(mirrored)
    one = rand_augment(mirrored, rng(5), operations=4, magnitude=5)
    assert np.array_equal(one, rand_augment(contiguous, rng(5), operations=4, magnitude=5))
