"""The NFNets: F0 ... F7, F0+ ... F7+, and the same at an eighth of the width.

Reference: deepmind-research/nfnets, base.py at f5de0ed, and Table 1 of arXiv 2102.06171.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Gelu = Literal["tanh", "erf"]
EpsMode = Literal["floor", "add"]

ALPHA = 0.2  # nfnet.py: weight of the residual branch
STAGE_STRIDES = (1, 2, 2, 2)
STEM_STRIDES = (2, 1, 1, 2)


@dataclass(frozen=True)
class Variant:
    """What distinguishes one NFNet. Sizes in pixels.

    Sizes, dropout and RandAugment's magnitude are those of ImageNet from scratch.
    """

    family: str  # its members differ in depth; a scaling plan stays within one
    width: tuple[int, int, int, int]  # channels out of each stage
    depth: tuple[int, int, int, int]  # residual blocks of each stage
    train_size: int
    test_size: int
    drop_rate: float  # dropout before the classifier
    randaugment_magnitude: int
    group_width: int = 128  # channels per group of the 3x3 convolutions
    stem: tuple[int, int, int] = (16, 32, 64)  # the fourth has width[0] // 2
    dense_remainder: bool = False  # keep a bottleneck that group_width does not divide, ungrouped
    gelu: Gelu = "tanh"  # or "erf", as timm has it
    eps_mode: EpsMode = "floor"  # of a weight's variance; "add": eps is added to it, as timm does


# Of F0 ... F7: Table 1 of the paper and its A.3; F7 from the code (base.py:57-90).
_TRAIN_SIZES = (192, 224, 256, 320, 384, 416, 448, 480)
_TEST_SIZES = (256, 320, 352, 416, 512, 544, 576, 608)
_DROP_RATES = (0.2, 0.3, 0.4, 0.4, 0.5, 0.5, 0.5, 0.5)
_MAGNITUDES = (5, 10, 10, 15, 15, 15, 15, 15)
_WIDTH = {"": (256, 512, 1536, 1536), "_plus": (384, 768, 2048, 2048)}
_NUM_BLOCKS = (1, 2, 6, 3)  # of F0, by stage; F<n> has n + 1 times as many


def _variants() -> dict[str, Variant]:
    """16 published variants, and the same 16 at an eighth of the width for small machines.

    The minis' sizes are chosen here: at 32 px their last stage is one pixel.
    """
    variants: dict[str, Variant] = {}
    for plus, width in _WIDTH.items():
        members = zip(_TRAIN_SIZES, _TEST_SIZES, _DROP_RATES, _MAGNITUDES, strict=True)
        for n, settings in enumerate(members):
            a, b, c, d = ((n + 1) * blocks for blocks in _NUM_BLOCKS)
            full = Variant(f"nfnet_f{plus}", width, (a, b, c, d), *settings)
            variants[f"nfnet_f{n}{plus}"] = full
            w0, w1, w2, w3 = (channels // 8 for channels in width)
            variants[f"nfnet_mini_f{n}{plus}"] = replace(
                full,
                family=f"nfnet_mini_f{plus}",
                width=(w0, w1, w2, w3),
                train_size=32,
                test_size=40,
                group_width=16,
                stem=(8, 8, 8),
            )
    return variants


VARIANTS: dict[str, Variant] = _variants()


def bottleneck(variant: Variant, out_channels: int) -> tuple[int, int]:
    """Channels and groups of the 3x3 convolutions (nfnet.py:193-196).

    The code rounds half the width down to whole groups. The paper's numbers for F4+ (527M, 367B)
    hold only if the first stage keeps its 192 channels, as one dense group.
    """
    mid = out_channels // 2
    groups = max(mid // variant.group_width, 1)
    if mid % variant.group_width and variant.dense_remainder:
        return mid, groups if mid % groups == 0 else 1
    return variant.group_width * groups, groups


def betas(depth: Sequence[int]) -> list[list[float]]:
    """1 / expected standard deviation at each block's input, by stage (nfnet.py:85-115).

    A stage's first block still divides by what the previous stage has accumulated; its projection
    then resets the variance to 1, and every block adds ALPHA**2.
    """
    expected_std = 1.0
    schedule: list[list[float]] = []
    for blocks in depth:
        stage: list[float] = []
        for block in range(blocks):
            stage.append(1 / expected_std)
            if block == 0:
                expected_std = 1.0
            expected_std = (expected_std**2 + ALPHA**2) ** 0.5
        schedule.append(stage)
    return schedule
