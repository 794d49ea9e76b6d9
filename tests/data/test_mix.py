"""Which rows are mixed, in what shares, and that the device does what the host drew."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nfnets_xla.data.index import build_index
from nfnets_xla.data.mix import (
    Layout,
    Mixes,
    cutmix_box,
    draw_mixes,
    mixed,
    mixup_share,
    partner_rows,
)
from nfnets_xla.data.pack import pack_samples
from tests.data.loading import SAMPLES, pack, picture, png, train

LAYOUTS = [Layout(2, 2, 1), Layout(4, 3, 1), Layout(2, 4, 3), Layout(2, 2, 4), Layout(1, 5, 7)]


def rng(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def drawn(layout: Layout, size: int = 16, **changes: np.ndarray) -> Mixes:
    rows = {
        "sample_B": np.arange(layout.streams * layout.images).repeat(layout.views),
        "stream_B": np.arange(layout.streams).repeat(layout.images * layout.views),
        "weight_B": np.ones(np.prod(layout), np.float32),
    }
    return draw_mixes(layout, size, **(rows | changes), rng_of=rng)


def pictures(layout: Layout, size: int = 16) -> torch.Tensor:
    noise = np.random.default_rng(0).integers(0, 256, (np.prod(layout), size, size, 3), np.uint8)
    return torch.from_numpy(noise)


def on_device(images: torch.Tensor, layout: Layout, mixes: Mixes) -> np.ndarray:
    outside, box = torch.from_numpy(mixes.outside_B), torch.from_numpy(mixes.box_B4)
    return mixed(images, layout, outside, box).numpy()


# ---- partners -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_row_is_a_partner_once_within_its_stream_and_never_of_its_own_image(
    layout: Layout,
) -> None:
    partners = partner_rows(layout)
    rows = np.arange(np.prod(layout))
    per_stream = layout.images * layout.views
    assert sorted(partners) == rows.tolist()
    assert np.array_equal(partners // per_stream, rows // per_stream)
    assert np.array_equal(partners % layout.views, rows % layout.views)
    assert (partners // layout.views != rows // layout.views).all()


def test_views_of_an_image_meet_different_images_as_far_as_there_are_any() -> None:
    partners = partner_rows(Layout(1, 4, 5)).reshape(4, 5) // 5
    assert partners[0].tolist() == [1, 2, 3, 1, 2]


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_a_part_of_the_streams_is_mixed_as_in_the_whole(hosts: int) -> None:
    """As several hosts would, each for its own streams."""
    layout = Layout(4, 3, 2)
    whole = drawn(layout)
    sample = np.arange(12).repeat(2)
    stream = np.arange(4).repeat(6)
    for part in np.split(np.arange(24), hosts):
        first = int(part[0])
        ours = draw_mixes(
            Layout(4 // hosts, 3, 2),
            16,
            sample_B=sample[part],
            stream_B=stream[part],
            weight_B=np.ones(len(part), np.float32),
            rng_of=lambda row, first=first: rng(first + row),
        )
        assert np.array_equal(ours.partner_B + first, whole.partner_B[part])
        for one, other in zip(ours[1:], whole[1:], strict=True):
            assert np.array_equal(one, other[part])


def test_rows_of_weight_0_and_the_same_sample_of_another_epoch_are_not_mixed_in() -> None:
    layout = Layout(2, 4, 1)
    sample = np.array([0, 1, 2, 3, 4, 4, 6, 7])
    weight = np.array([1, 1, 1, 0, 1, 1, 1, 1], np.float32)
    mixes = drawn(layout, sample_B=sample, weight_B=weight)
    alone = [2, 4]  # their partners are row 3, of weight 0, and row 5, the same sample
    assert (mixes.ratio_B[alone] == 1).all()
    assert (mixes.outside_B[alone] == 1).all()
    others = [0, 1, 3, 5, 6, 7]
    assert (mixes.ratio_B[others] < 1).all()
    images = pictures(layout)
    result = on_device(images, layout, mixes)
    assert np.array_equal(result[alone], images[alone].float())
    changed = images.clone()
    changed[3] = 0
    unused = on_device(changed, layout, mixes)
    assert np.array_equal(np.delete(unused, 3, axis=0), np.delete(result, 3, axis=0))


# ---- shares and boxes ---------------------------------------------------------------------------


def test_even_streams_have_mixup_and_odd_ones_cutmix() -> None:
    mixes = drawn(Layout(4, 3, 2))
    is_cutmix = np.arange(4).repeat(6) % 2 == 1
    assert (mixes.outside_B[is_cutmix] == 0).all()
    assert np.array_equal(mixes.outside_B[~is_cutmix], mixes.ratio_B[~is_cutmix])
    assert (mixes.box_B4[~is_cutmix] == 0).all()
    top, left, bottom, right = mixes.box_B4.T
    area = (bottom - top) * (right - left) / 16**2
    np.testing.assert_allclose(mixes.ratio_B[is_cutmix], area[is_cutmix], rtol=1e-7)


def test_mixup_shares_have_the_moments_and_tails_of_beta() -> None:
    """Beta(a, a): mean 1/2, variance 1/(4(2a + 1)); tails beside torch's."""
    shares = np.array([mixup_share(rng(n)) for n in range(20_000)])
    assert ((shares >= 0) & (shares <= 1)).all()
    assert abs(shares.mean() - 0.5) < 4 * (1 / 5.6) ** 0.5 / 20_000**0.5
    assert abs(shares.var() - 1 / 5.6) < 0.003
    exact = torch.distributions.Beta(0.2, 0.2)
    torch.manual_seed(0)
    reference = np.sort(exact.sample((20_000,)).numpy())
    for point in (0.001, 0.05, 0.3, 0.7, 0.95, 0.999):
        below, expected = (shares < point).mean(), (reference < point).mean()
        assert abs(below - expected) < 0.02


@pytest.mark.parametrize("size", [1, 7, 224])
def test_boxes_lie_inside_and_before_cutting_have_uniform_area(size: int) -> None:
    boxes = np.array([cutmix_box(rng(n), size) for n in range(2_000)])
    top, left, bottom, right = boxes.T
    assert ((top >= 0) & (left >= 0) & (bottom <= size) & (right <= size)).all()
    assert ((top <= bottom) & (left <= right)).all()
    if size == 224:
        uncut = (top > 0) & (left > 0) & (bottom < size) & (right < size)
        assert (bottom - top == right - left)[uncut].all()
        # A box has half of the image on average before it is clipped at the edges, about a third
        # after.
        area = (bottom - top) * (right - left) / size**2
        assert 0.31 < area.mean() < 0.36


# ---- on the device ------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_device_mixes_what_the_host_drew(layout: Layout) -> None:
    """Against a plain loop over rows; in float32, so to 1e-4 of 255."""
    mixes, images = drawn(layout), pictures(layout)
    result = on_device(images, layout, mixes)
    pixels = images.numpy().astype(np.float64)
    for row, partner in enumerate(mixes.partner_B):
        share = np.full((16, 16, 1), float(mixes.outside_B[row]))
        top, left, bottom, right = mixes.box_B4[row]
        share[top:bottom, left:right] = 1
        expected = share * pixels[row] + (1 - share) * pixels[partner]
        np.testing.assert_allclose(result[row], expected, atol=0.03)
        # The row's share of its own pixels is the share of its label.
        assert share.mean() == pytest.approx(float(mixes.ratio_B[row]), abs=1e-6)


def test_nothing_is_mixed_with_an_image_that_does_not_decode(tmp_path: Path) -> None:
    images = [png(picture(n)) for n in range(SAMPLES)]
    images[9] = images[9][:100]
    dataset = train(pack(tmp_path, images), mix=True)
    seen = 0
    for step in range(len(dataset)):
        batch = dataset[step]
        beside_B = batch["weight_B"].numpy()[partner_rows(batch["layout"])] == 0
        assert (batch["mix_ratio_B"].numpy()[beside_B] == 1).all()
        assert (batch["mix_outside_B"].numpy()[beside_B] == 1).all()
        seen += any(sample["sample"] == 9 for sample in batch["missed"])
    assert seen


def test_partners_bring_all_of_their_labels(tmp_path: Path) -> None:
    labels: list[Any] = [3, {1: 1.0, 4: 3.0}, {0: 0.5, 1: 0.25, 2: 0.25}, {2: 1.0, 3: 1.0}] * 3
    samples = ((f"{n}", png(picture(n)), "png", label) for n, label in enumerate(labels))
    pack_samples(samples, tmp_path, samples_per_shard=4)
    batch = train(build_index(tmp_path), mix=True)[0]
    partner = partner_rows(batch["layout"])
    for name in ("labels_B", "labels_BL", "label_weights_BL"):
        assert np.array_equal(batch[f"mix_{name}"], batch[name][partner]), name
