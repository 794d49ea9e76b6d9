"""What the views show, read from images whose pixels encode their own coordinates."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from nfnets_xla.data import augment
from nfnets_xla.data.augment import Box, Pixels, eval_view, random_resized_crop_flip
from tests.reference.resize import resized

AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)


def coordinates(width: int, height: int) -> Pixels:
    """Red grows with x and green with y, so a view reveals which part it shows."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, x * 0], axis=-1).astype(np.uint8)


def rng(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def boxes(width: int, height: int, number: int) -> list[Box]:
    found = [augment._random_box(width, height, rng(n), AREA, ASPECT, 10) for n in range(number)]
    return [box for box in found if box is not None]


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (32, 32), (1000, 200)])
def test_boxes_lie_inside_with_the_asked_area_and_aspect(width: int, height: int) -> None:
    found = boxes(width, height, 500)
    assert len(found) > 400
    for left, top, right, bottom in found:
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        columns, rows = right - left, bottom - top
        assert columns * rows >= 0.1 * width * height  # min_object_covered, not 0.08
        half = 0.5 / rows + 1e-9  # effect of rounding to whole pixels on the aspect
        assert 3 / 4 - half <= columns / rows <= 4 / 3 + half


def test_heights_are_uniform_as_in_the_reference() -> None:
    """At aspect 1, crops of 100 x 100 pixels have 32 (a tenth of the area, rounded) to 100 rows."""
    found = [augment._random_box(100, 100, rng(n), AREA, (1.0, 1.0), 10) for n in range(4000)]
    rows = np.array([box.bottom - box.top for box in found if box is not None])
    assert (rows.min(), rows.max()) == (32, 100)
    assert abs(rows.mean() - 66) < 4 * 20 / np.sqrt(len(rows))
    assert np.bincount(rows, minlength=101)[32:].min() > 25  # of 58 expected


def test_a_view_shows_its_box() -> None:
    image = coordinates(200, 100)
    box = augment._random_box(200, 100, rng(3), AREA, ASPECT, 10)
    assert box is not None
    view = random_resized_crop_flip(image, rng(3), size=32, flip=False)
    assert view.shape == (32, 32, 3)
    assert view.dtype == np.uint8
    assert np.array_equal(view, shown(image, box, 32))
    assert abs(int(view[0, 0, 0]) - 255 * box.left / 199) < 8
    assert abs(int(view[-1, 0, 1]) - 255 * box.bottom / 99) < 8


def test_half_of_the_views_are_mirrored_and_none_without_flip() -> None:
    image = coordinates(40, 40)
    mirrored = 0
    for n in range(400):
        plain = random_resized_crop_flip(image, rng(n), size=16, flip=False)
        view = random_resized_crop_flip(image, rng(n), size=16, flip=True)
        is_mirrored = np.array_equal(view, plain[:, ::-1])
        assert is_mirrored or np.array_equal(view, plain)
        mirrored += is_mirrored
        assert plain[0, 0, 0] < plain[0, -1, 0]
    assert abs(mirrored - 200) < 4 * 10


@pytest.mark.parametrize(("width", "height"), [(300, 100), (100, 300)])
def test_the_padded_centre_is_shown_where_no_crop_fits(width: int, height: int) -> None:
    """Here a crop of the whole area has an aspect of 3 or 1/3, which is out of range."""
    image = coordinates(width, height)
    view = random_resized_crop_flip(image, rng(0), size=32, area=(1.0, 1.0), flip=False)
    side = 50  # 32 of 32 + 32 pixels of the shorter side
    left, top = (width - side) // 2, (height - side) // 2
    assert np.array_equal(view, shown(image, Box(left, top, left + side, top + side), 32))


def test_a_crop_of_the_whole_image_counts_as_failed() -> None:
    image = coordinates(64, 64)
    view = random_resized_crop_flip(
        image, rng(0), size=32, area=(1.0, 1.0), aspect=(1.0, 1.0), flip=False
    )
    assert np.array_equal(view, shown(image, Box(16, 16, 48, 48), 32))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 50), (2, 3), (3, 2000)])
def test_the_smallest_and_narrowest_images_have_views(width: int, height: int) -> None:
    image = coordinates(width, height)
    for n in range(20):
        assert random_resized_crop_flip(image, rng(n), size=8).shape == (8, 8, 3)
    assert eval_view(image, size=8).shape == (8, 8, 3)


@pytest.mark.parametrize(("size", "margin", "offset"), [(32, 32, 16), (16, 8, 4), (16, 5, 3)])
def test_the_evaluation_view_is_the_centre_of_both_sides_resized(
    size: int, margin: int, offset: int
) -> None:
    image = coordinates(120, 60)
    view = eval_view(image, size=size, margin=margin)
    whole = shown(image, Box(0, 0, 120, 60), size + margin)
    assert np.array_equal(view, whole[offset : offset + size, offset : offset + size])


def test_without_margin_the_evaluation_view_is_the_whole_image() -> None:
    image = coordinates(16, 16)
    assert np.array_equal(eval_view(image, size=16, margin=0), image)


# ---- resizing -----------------------------------------------------------------------------------

SIZES = [(500, 375, 224), (40, 60, 224), (224, 224, 224), (224, 224, 96), (1, 7, 8), (999, 3, 16)]


def shown(image: Pixels, box: Box, side: int) -> Pixels:
    return augment._resized(image[box.top : box.bottom, box.left : box.right], side)


@pytest.mark.parametrize(("width", "height", "side"), SIZES)
def test_resizing_is_antialiased_bicubic(width: int, height: int, side: int) -> None:
    """On noise, the worst case. torch's weights have 8 bits, which causes at most 2 levels."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    difference = np.abs(augment._resized(noise, side) - resized(noise, side, side))
    assert difference.max() <= 2
    assert difference.mean() < 0.1


@pytest.mark.parametrize(("width", "height", "side"), SIZES)
def test_resizing_agrees_with_pillow(width: int, height: int, side: int) -> None:
    """On a smooth image. On noise, values are clipped between the two passes, so Pillow's result
    depends on which pass comes first, and it chooses that by the shape."""
    y, x = np.mgrid[:height, :width]
    waves = 128 + 60 * np.stack([np.sin(x / 9), np.cos(y / 7), np.sin((x + y) / 20)], axis=-1)
    image = waves.astype(np.uint8)
    pillows = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
    ours = augment._resized(image, side).astype(int)
    assert np.abs(ours - np.asarray(pillows)).max() <= 2


def test_a_view_sees_nothing_outside_of_its_crop() -> None:
    image = coordinates(64, 64)
    box = augment._random_box(64, 64, rng(3), AREA, ASPECT, 10)
    assert box is not None
    painted = np.full_like(image, 255)
    inside = slice(box.top, box.bottom), slice(box.left, box.right)
    painted[inside] = image[inside]
    one, other = (random_resized_crop_flip(pixels, rng(3), size=32) for pixels in (image, painted))
    assert np.array_equal(one, other)


def test_the_processor_and_the_threads_change_no_pixel() -> None:
    """With and without AVX2, on one thread and on two."""
    program = (
        "import hashlib, sys, numpy as np, torch; from nfnets_xla.data.augment import _resized\n"
        "torch.set_num_threads(int(sys.argv[1]))\n"
        "noise = np.random.default_rng(0).integers(0, 256, (90, 300, 3), np.uint8)\n"
        "print(hashlib.sha256(_resized(noise, 150)[20:].tobytes()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program, threads],
            env={**os.environ, **capability},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads, capability in [("1", {}), ("2", {"ATEN_CPU_CAPABILITY": "default"})]
    }
    assert len(digests) == 1
