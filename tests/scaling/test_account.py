"""Costs against numbers printed in the papers. Tolerances are those of their rounding."""

import pytest
import torch

from nfnets_xla.models.registry import create_network
from nfnets_xla.models.variants import VARIANTS
from nfnets_xla.scaling import account, published
from nfnets_xla.scaling.account import macs_per_image, train_flops


@pytest.mark.parametrize("name", ["nfnet_f0", "nfnet_f0_plus", "nfnet_mini_f1_plus"])
def test_macs_are_those_of_the_network(name: str) -> None:
    with torch.device("meta"):
        net = create_network(name, num_classes=37)
    for size in (32, 33, 224, 352):  # 33 is odd at every stride
        assert macs_per_image(name, size, 37) == net.macs(size)


@pytest.mark.parametrize("plus", ["", "_plus"])
@pytest.mark.parametrize("series", ["nfnet_f", "nfnet_mini_f"])
def test_a_variant_costs_its_first_blocks_and_so_many_equal_ones(series: str, plus: str) -> None:
    """Depth is linear in the index: F0, F1 and so on cost equal steps."""
    costs = [macs_per_image(f"{series}{n}{plus}", 224) for n in range(8)]
    first, second = costs[:2]
    assert costs == [first + n * (second - first) for n in range(8)]


def test_macs_against_the_papers_table() -> None:
    """arXiv 2102.06171, Table 3, whose "#FLOPs" are multiply-accumulates at the test resolution."""
    for name, billions in (("f0", 12.38), ("f3", 114.76), ("f6", 377.28)):
        variant = VARIANTS[f"nfnet_{name}"]
        assert macs_per_image(f"nfnet_{name}", variant.test_size) == pytest.approx(
            billions * 1e9, abs=0.005e9
        )


def paper_run(model: str, epochs: float) -> float:
    macs = macs_per_image(model, published.TRAIN_SIZE)
    return train_flops(macs, epochs * published.JFT_IMAGES)


def test_the_largest_run_of_the_paper() -> None:
    """F7+, 8 epochs, 110k v4 core-hours: 1.9e22 FLOPs, 36 % MFU."""
    flops = paper_run("nfnet_f7_plus", 8)
    assert flops == pytest.approx(1.93e22, rel=0.005)
    assert account.utilisation(flops, 110e3, "v4") == pytest.approx(0.355, abs=0.005)
    hours = account.core_hours(flops, "v4", mfu=published.PAPER_MFU)
    assert hours == pytest.approx(110e3, rel=0.02)
    assert account.flops_in(hours, "v4", mfu=published.PAPER_MFU) == pytest.approx(flops, rel=1e-12)


def test_the_smallest_run_of_the_paper() -> None:
    """F0, a quarter of an epoch: 0.4k core-hours at 29 % MFU."""
    flops = paper_run("nfnet_f0", 0.25)
    assert account.utilisation(flops, 0.4e3, "v4") == pytest.approx(0.29, abs=0.005)
    assert round(account.core_hours(flops, "v4", mfu=0.29) / 1e3, 1) == 0.4


@pytest.mark.parametrize(
    ("vit", "v3", "v4"),
    list(zip(published.VITS, (0.55, 0.54, 0.52), (0.43, 0.43, 0.41), strict=True)),
)
def test_the_vits_conversions(vit: published.Peer, v3: float, v4: float) -> None:
    """From the reported v3 to the paper's v4 core-hours, a v4 core counts for 1.75 to 1.79 v3
    cores, less than the peaks' ratio of 2.24, since the MFU falls."""
    assert vit.rows is not None
    flops = account.FORWARDS_PER_STEP * vit.gflops * 1e9 * vit.rows
    on_v3 = account.utilisation(flops, vit.v3_core_hours, "v3")
    on_v4 = account.utilisation(flops, vit.v4_core_hours, "v4")
    assert (on_v3, on_v4) == pytest.approx((v3, v4), abs=0.0051)
    assert vit.v3_core_hours / vit.v4_core_hours == pytest.approx(1.77, abs=0.025)
    by_peaks = account.converted(vit.v3_core_hours, "v3", "v4")
    assert vit.v3_core_hours / by_peaks == pytest.approx(2.236, abs=0.001)
    as_paper = account.converted(vit.v3_core_hours, "v3", "v4", mfu_ratio=on_v4 / on_v3)
    assert as_paper == pytest.approx(vit.v4_core_hours, rel=1e-9)


def test_the_unit_trap() -> None:
    """F7+ and SoViT-400m cost about the same forward, 201 and 221 GFLOPs. In the unit of the NFNet
    papers F7+ would seem half as expensive, and its MFU half as good."""
    macs = macs_per_image("nfnet_f7_plus", 224)
    forward = train_flops(macs, 1) / account.FORWARDS_PER_STEP
    assert macs / 1e9 == pytest.approx(100.74, abs=0.01)
    assert forward / 1e9 == pytest.approx(201.5, abs=0.05)
    sovit = published.VITS[2].gflops
    assert forward / 1e9 / sovit == pytest.approx(0.91, abs=0.01)


def test_sam_and_views() -> None:
    """Fine-tuning F7+ for 50 epochs at 384 px in 1.6k core-hours: 14 % MFU, or 29 % if SAM counts
    twice. Four views of an image cost the same compute and a quarter of the reading."""
    macs = macs_per_image("nfnet_f7_plus", published.FINETUNE_SIZE)
    rows = published.FINETUNE_EPOCHS * 1_281_167
    for fraction, share in ((0.0, 0.143), (0.2, 0.172), (1.0, 0.287)):
        flops = train_flops(macs, rows, sam_fraction=fraction)
        hours = published.FINETUNE_V4_CORE_HOURS
        assert account.utilisation(flops, hours, "v4") == pytest.approx(share, abs=0.002)
    assert account.images_drawn(rows, 4) == rows / 4


def test_chip_hours_and_money() -> None:
    """A v4 chip has two cores, as v3 and v7 chips have; a v5e chip has one."""
    assert account.chip_hours(110e3, "v4") == 55e3
    assert account.chip_hours(210e3, "v3") == 105e3
    assert account.chip_hours(1e3, "v7") == 500
    assert account.chip_hours(1e3, "v5e") == 1e3
    assert account.cost(110e3, "v4", price=3.0) == 165e3


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="178% of the peak; check"):
        account.utilisation(paper_run("nfnet_f7_plus", 8), 22e3, "v4")
    with pytest.raises(ValueError, match=r"mfu is 36; it must be in \(0, 1\]: 36 % is 0.36"):
        account.core_hours(1e18, "v4", mfu=36)
    with pytest.raises(ValueError, match="hardware is 'v9'; it must be one of v2, v3, v4"):
        account.chip_hours(1, "v9")
    with pytest.raises(ValueError, match="must be an NFNet"):
        macs_per_image("resnet50", 224)
    with pytest.raises(ValueError, match="sam_fraction is 2"):
        train_flops(1, 1, sam_fraction=2)
    with pytest.raises(ValueError, match="core-hours is -1; it must be finite and at least 0"):
        account.cost(-1, "v4", price=1)
