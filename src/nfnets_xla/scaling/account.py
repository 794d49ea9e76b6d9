"""The cost of training: operations, rows, core-hours, chip-hours, money.

"FLOPs" has two meanings: in the NFNet papers multiply-accumulates, in the ViT papers operations,
two per multiply-accumulate. Here `macs` are always multiply-accumulates and `flops` always
floating-point operations, 2 per MAC; no function takes or returns a number that could be either.

A row is one view of one image in a batch. With K views of an image (repeated augmentation) a run
of E epochs shows E / K passes of K views: as many rows, as much compute (arXiv 2310.16764,
footnote 4).
"""

import math

from nfnets_xla.devices import HARDWARE, Device
from nfnets_xla.models.variants import STAGE_STRIDES, STEM_STRIDES, VARIANTS, bottleneck

FLOPS_PER_MAC = 2
FORWARDS_PER_STEP = 3  # the backward pass has two products for each one of the forward pass
SE_RATIO = 0.5  # nfnets/base.py: squeeze-excite's hidden channels


# ---- operations -------------------------------------------------------------------------------


def macs_per_image(name: str, size: int, num_classes: int = 1000) -> int:
    """Multiply-accumulates of a forward pass on a `size` x `size` image: `NFNet.macs` by name.

    Convolutions, squeeze-excites and classifier, as the reference counts (nfnet.py:154-173).
    ValueError for a name that is not an NFNet's, and for a size or classes below 1.
    """
    if name not in VARIANTS:
        raise ValueError(f"model is {name!r}; it must be an NFNet: one of {', '.join(VARIANTS)}")
    at_least("size", size, 1)
    at_least("num_classes", num_classes, 0)
    variant = VARIANTS[name]
    total, channels = 0, 3
    stem = (*variant.stem, variant.width[0] // 2)
    for out, stride in zip(stem, STEM_STRIDES, strict=True):
        size = -(-size // stride)
        total += 9 * channels * out * size**2
        channels = out
    for out, depth, first in zip(variant.width, variant.depth, STAGE_STRIDES, strict=True):
        mid, groups = bottleneck(variant, out)
        for block in range(depth):
            stride = first if block == 0 else 1
            total += channels * mid * size**2
            size = -(-size // stride)
            total += (2 * 9 * mid * mid // groups + mid * out) * size**2
            if stride > 1 or channels != out:
                total += channels * out * size**2
            total += 2 * out * int(out * SE_RATIO)
            channels = out
    features = 2 * channels
    return total + channels * features * size**2 + features * num_classes


def train_flops(macs: float, rows: float, *, sam_fraction: float = 0.0) -> float:
    """Floating-point operations to train on `rows` images of `macs` multiply-accumulates each.

    SAM computes a second gradient on `sam_fraction` of the rows: 0 without it, 1 for whole batches
    and 0.2 for the fifth that arXiv 2102.06171 (A.4) uses.
    """
    at_least("macs", macs, 0)
    at_least("rows", rows, 0)
    if not 0 <= sam_fraction <= 1:
        raise ValueError(f"sam_fraction is {sam_fraction}; it must be in [0, 1]")
    return FLOPS_PER_MAC * FORWARDS_PER_STEP * macs * rows * (1 + sam_fraction)


def images_drawn(rows: float, repeats: int = 1) -> float:
    """Images read and decoded for `rows` views of `repeats` each."""
    at_least("repeats", repeats, 1)
    return rows / repeats


# ---- hardware ---------------------------------------------------------------------------------


def device(hardware: str) -> Device:
    """The device by name; ValueError if its peak is not known here."""
    if hardware not in HARDWARE:
        raise ValueError(f"hardware is {hardware!r}; it must be one of {', '.join(HARDWARE)}")
    return HARDWARE[hardware]


def core_peak(hardware: str) -> float:
    """FLOP/s of one core in bfloat16. "Core-hours" are TensorCore-hours in all of these papers."""
    return device(hardware).peak_flops / device(hardware).cores


def cores_per_chip(hardware: str) -> int:
    """Cores per chip, the unit of booking. On v2, v3 and v7 PyTorch sees each core as a device."""
    return 2 if hardware in ("v2", "v3", "v7") else device(hardware).cores


def core_hours(flops: float, hardware: str, *, mfu: float) -> float:
    """Core-hours for `flops` at a model FLOPs utilisation `mfu`: the share of the peak reached."""
    _share("mfu", mfu)
    return flops / (mfu * core_peak(hardware) * 3600)


def flops_in(hours: float, hardware: str, *, mfu: float) -> float:
    """Floating-point operations that `hours` core-hours pay for."""
    _share("mfu", mfu)
    return hours * 3600 * mfu * core_peak(hardware)


def utilisation(flops: float, hours: float, hardware: str) -> float:
    """The MFU of a run that took `hours` core-hours for `flops`. ValueError if it exceeds 1."""
    above("core-hours", hours)
    share = flops / (hours * 3600 * core_peak(hardware))
    if share > 1:
        raise ValueError(
            f"{flops:.3g} FLOPs in {hours:g} {hardware} core-hours are {share:.0%} of the peak; "
            "check that both are of the same run, and MACs against FLOPs"
        )
    return share


def converted(hours: float, source: str, target: str, *, mfu_ratio: float = 1.0) -> float:
    """Core-hours on `target` for a run of `hours` on `source`.

    `mfu_ratio` is the target's utilisation / the source's. By the peaks alone one v4 core equals
    2.24 of v3; in the paper's figures it equals 1.75 to 1.79 for ViTs (published.py) and
    2.27 for F7+, if its "250 TPU-v3 core hours" are thousands.
    """
    at_least("core-hours", hours, 0)
    above("mfu_ratio", mfu_ratio)
    return hours * core_peak(source) / (core_peak(target) * mfu_ratio)


def chip_hours(hours: float, hardware: str) -> float:
    """Core-hours in chip-hours, the unit in which machines are booked and paid."""
    at_least("core-hours", hours, 0)
    device(hardware)
    return hours / cores_per_chip(hardware)


def cost(hours: float, hardware: str, *, price: float) -> float:
    """The cost of `hours` core-hours, in the currency of `price` per chip-hour."""
    at_least("price", price, 0)
    return chip_hours(hours, hardware) * price


# ---- at the door ------------------------------------------------------------------------------


def above(name: str, value: float) -> None:
    if not value > 0 or math.isinf(value):
        raise ValueError(f"{name} is {value:g}; it must be finite and greater than 0")


def at_least(name: str, value: float, limit: float) -> None:
    if not value >= limit or math.isinf(value):
        raise ValueError(f"{name} is {value:g}; it must be finite and at least {limit:g}")


def _share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name} is {value:g}; it must be in (0, 1]: 36 % is 0.36")
