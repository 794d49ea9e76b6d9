"""The NFNet family F0 ... F7 and F0+ ... F7+ (arXiv 2102.06171), as DeepMind's code has it.

Reference: deepmind-research/nfnets, nfnet.py and base.py at f5de0ed; where the paper's text differs
(the squeeze-excite's activation), the code holds. Parameter counts and multiply-accumulates of all
16 equal the reference's.

Shape suffixes: B batch, C channels, H W pixels, O out and I in channels of a weight, N residual
blocks, F pooled features, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GELU_GAIN = 1.7015043497085571  # base.py: unit variance out for N(0, 1) in, tanh approximation
WS_FLOOR = 1e-4  # base.py: a floor under variance * fan_in, not an addend
ALPHA = 0.2  # nfnet.py: weight of the residual branch
STAGE_STRIDES = (1, 2, 2, 2)
STEM_STRIDES = (2, 1, 1, 2)


@dataclass(frozen=True)
class Variant:
    """What distinguishes one member of the family. Sizes in pixels."""

    width: tuple[int, int, int, int]  # channels out of each stage
    depth: tuple[int, int, int, int]  # residual blocks of each stage
    train_size: int
    test_size: int
    drop_rate: float  # dropout before the classifier, for ImageNet from scratch
    group_width: int = 128  # channels per group of the 3x3 convolutions
    stem: tuple[int, int, int] = (16, 32, 64)  # the fourth has width[0] // 2
    dense_remainder: bool = False  # keep a bottleneck that group_width does not divide, ungrouped


# Of F0 ... F7: Table 1 of the paper; F7 from the code (base.py:57-90).
_TRAIN_SIZES = (192, 224, 256, 320, 384, 416, 448, 480)
_TEST_SIZES = (256, 320, 352, 416, 512, 544, 576, 608)
_DROP_RATES = (0.2, 0.3, 0.4, 0.4, 0.5, 0.5, 0.5, 0.5)
_WIDTH = {"": (256, 512, 1536, 1536), "_plus": (384, 768, 2048, 2048)}


def _family() -> dict[str, Variant]:
    """16 published variants, and the same 16 at an eighth of the width for small machines.

    The minis' sizes are chosen here: at 32 px their last stage is one pixel.
    """
    family = {}
    for plus, width in _WIDTH.items():
        members = zip(_TRAIN_SIZES, _TEST_SIZES, _DROP_RATES, strict=True)
        for n, (train_size, test_size, drop_rate) in enumerate(members):
            a, b, c, d = ((n + 1) * blocks for blocks in (1, 2, 6, 3))
            full = Variant(width, (a, b, c, d), train_size, test_size, drop_rate)
            family[f"nfnet_f{n}{plus}"] = full
            w0, w1, w2, w3 = (channels // 8 for channels in width)
            family[f"nfnet_mini_f{n}{plus}"] = replace(
                full,
                width=(w0, w1, w2, w3),
                train_size=32,
                test_size=40,
                group_width=16,
                stem=(8, 8, 8),
            )
    return family


VARIANTS: dict[str, Variant] = _family()


def scaled_gelu(x: Tensor) -> Tensor:
    """GELU's tanh form, scaled to give unit variance for N(0, 1); any shape, dtype kept."""
    return F.gelu(x, approximate="tanh") * GELU_GAIN


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME: pixels before and after. A stride-2 3x3 on an even size pads (0, 1)."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def at_least_float32(x: Tensor) -> Tensor:
    """bfloat16 and float16 become float32; float32 and float64 stay what they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Linear(nn.Linear):
    """nn.Linear that computes in its input's dtype, whatever its own, as WSConv2d does."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype), self.bias.to(input.dtype))


class WSConv2d(nn.Conv2d):
    """Convolution with scaled weight standardisation, a gain per output channel, and SAME padding.

    The weight is standardised in float32 and cast to the input's dtype, so that the dtype of the
    input decides what the convolution computes in while the master weights stay float32.
    Reference: base.py:121-154. The gain is `(O,)` as there: AGC clips it as one vector.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, groups=groups, bias=bias)
        self.gain = nn.Parameter(torch.ones(out_channels))
        self.fan_in = self.weight[0].numel()
        nn.init.normal_(self.weight, std=self.fan_in**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def standardised_weight(self) -> Tensor:
        """`(O, I / groups, H, W)`, mean 0 and variance 1 / fan-in per output channel, times gain.

        float32, or float64 for a float64 weight.
        """
        weight = at_least_float32(self.weight)
        variance, mean = torch.var_mean(weight, dim=(1, 2, 3), correction=0, keepdim=True)
        scale = torch.rsqrt((variance * self.fan_in).clamp(min=WS_FLOOR))
        return (weight - mean) * (scale * self.gain.to(weight.dtype)[:, None, None, None])

    def forward(self, input: Tensor) -> Tensor:
        """`(B, C, H, W)` to `(B, O, ceil(H / stride), ceil(W / stride))`, in the input's dtype."""
        x_BCHW = input
        kernel, stride = self.kernel_size[0], self.stride[0]
        top, bottom = same_padding(x_BCHW.shape[2], kernel, stride)
        left, right = same_padding(x_BCHW.shape[3], kernel, stride)
        padding = (top, left)
        if (top, left) != (bottom, right):  # asymmetric: pad by hand
            x_BCHW = F.pad(x_BCHW, (left, right, top, bottom))
            padding = (0, 0)
        weight = self.standardised_weight().to(x_BCHW.dtype)
        bias = None if self.bias is None else self.bias.to(x_BCHW.dtype)
        return F.conv2d(x_BCHW, weight, bias, self.stride, padding, groups=self.groups)


class SqueezeExcite(nn.Module):
    """Channel gates sigmoid(W relu(W mean(x))), doubled by the caller. base.py:177-199."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = Linear(channels, channels // 2)
        self.expand = Linear(channels // 2, channels)
        for linear in (self.reduce, self.expand):
            # Haiku's TruncatedNormal: cut at two standard deviations, not rescaled for the cut.
            std = linear.in_features**-0.5
            nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
            nn.init.zeros_(linear.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Gates in (0, 1), `(B, C, 1, 1)`, in the input's dtype."""
        hidden = F.relu(self.reduce(x_BCHW.mean(dim=(2, 3))))
        return torch.sigmoid(self.expand(hidden))[:, :, None, None]


class NFBlock(nn.Module):
    """x -> shortcut + ALPHA * skip_gain * keep * branch(x). nfnet.py:176-251.

    The first block of a stage projects: its shortcut is a 1x1 convolution of the activated input,
    pooled 2x2 if the stage strides. Every other block adds to its raw input.
    """

    def __init__(
        self, variant: Variant, in_channels: int, out_channels: int, *, stride: int, beta: float
    ) -> None:
        super().__init__()
        self.beta = beta
        self.stride = stride
        mid, groups = bottleneck(variant, out_channels)
        self.conv0 = WSConv2d(in_channels, mid, 1)
        self.conv1 = WSConv2d(mid, mid, 3, stride=stride, groups=groups)
        self.conv1b = WSConv2d(mid, mid, 3, groups=groups)
        self.conv2 = WSConv2d(mid, out_channels, 1)
        self.squeeze_excite = SqueezeExcite(out_channels)
        self.skip_gain = nn.Parameter(torch.zeros(()))
        projects = stride > 1 or in_channels != out_channels
        self.conv_shortcut = WSConv2d(in_channels, out_channels, 1) if projects else None

    def forward(self, x_BCHW: Tensor, keep_B: Tensor | None = None) -> Tensor:
        """`(B, C, H, W)` to `(B, O, ceil(H / stride), ceil(W / stride))`.

        `keep_B` is 1 for rows whose branch counts, 0 for rows that are only the shortcut.
        """
        activated = scaled_gelu(x_BCHW) * self.beta
        shortcut = self._shortcut(x_BCHW, activated)
        branch = self.branch(activated)
        if keep_B is not None:  # not divided by the keep probability: base.py:202-220
            branch = branch * keep_B.to(branch.dtype)[:, None, None, None]
        return shortcut + branch * (self.skip_gain * ALPHA).to(branch.dtype)

    def _shortcut(self, x_BCHW: Tensor, activated: Tensor) -> Tensor:
        if self.conv_shortcut is None:
            return x_BCHW
        if self.stride > 1:  # SAME pooling that leaves the padding out of the mean
            window = [min(2, size) for size in activated.shape[2:]]  # XLA: no 2 over 1
            activated = F.avg_pool2d(activated, window, 2, ceil_mode=True, count_include_pad=False)
        return self.conv_shortcut(activated)

    def branch(self, activated: Tensor) -> Tensor:
        """Bottleneck and squeeze-excite, before the skip gain."""
        out = self.conv0(activated)
        out = self.conv1(scaled_gelu(out))
        out = self.conv1b(scaled_gelu(out))
        out = self.conv2(scaled_gelu(out))
        return out * self.squeeze_excite(out) * 2


class Stage(nn.ModuleList):
    """`stage[0]` projects; `stage[1:]` are alike and keep their input's shape.

    The network calls a stage as one thing, so that one scan over a stacked tail can take its place.
    """

    def forward(self, x_BCHW: Tensor, keep_masks_BN: Tensor | None = None) -> Tensor:
        """N counts this stage's blocks."""
        for number, block in enumerate(self):
            x_BCHW = block(x_BCHW, None if keep_masks_BN is None else keep_masks_BN[:, number])
        return x_BCHW


def bottleneck(variant: Variant, out_channels: int) -> tuple[int, int]:
    """Channels and groups of the 3x3 convolutions (nfnet.py:193-196).

    The code rounds half the width down to whole groups. The numbers printed for F4+ in the paper
    (527M, 367B) need the 192 channels of its first stage kept, as one dense group.
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
    schedule = []
    for blocks in depth:
        stage = []
        for block in range(blocks):
            stage.append(1 / expected_std)
            if block == 0:
                expected_std = 1.0
            expected_std = (expected_std**2 + ALPHA**2) ** 0.5
        schedule.append(stage)
    return schedule


class NFNet(nn.Module):
    """The network: stem, four stages, a last convolution to twice the width, pooling, head.

    Parameters are named by place, e.g. `stages.2.0.conv1b.gain`: stage, block in it, convolution.
    """

    classifier_name = "head"

    def __init__(
        self,
        variant: Variant,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float | None = None,
        drop_path_rate: float = 0.25,
        plus_bottleneck: str = "code",
    ) -> None:
        """`drop_rate=None` takes the variant's; `num_classes=0` returns pooled features.

        `plus_bottleneck="paper"` keeps 192 dense channels in a "+" model's first stage. Raises
        ValueError for a rate outside [0, 1), and for any other `plus_bottleneck`.
        """
        super().__init__()
        if plus_bottleneck not in ("code", "paper"):
            raise ValueError(f"plus_bottleneck is {plus_bottleneck!r}; give 'code' or 'paper'")
        if plus_bottleneck == "paper":
            variant = replace(variant, dense_remainder=True)
        self.variant = variant
        self.drop_rate = variant.drop_rate if drop_rate is None else drop_rate
        for name, rate in (("drop_rate", self.drop_rate), ("drop_path_rate", drop_path_rate)):
            if not 0 <= rate < 1:
                raise ValueError(f"{name} is {rate}; it must be in [0, 1)")
        self.num_blocks = sum(variant.depth)
        self.stochastic_depth_rates = tuple(  # nfnet.py:97: the first block is never dropped
            drop_path_rate * block / self.num_blocks for block in range(self.num_blocks)
        )
        channels = [in_chans, *variant.stem, variant.width[0] // 2]
        self.stem = nn.ModuleList(
            WSConv2d(into, out, 3, stride=stride)
            for into, out, stride in zip(channels, channels[1:], STEM_STRIDES, strict=False)
        )
        self.stages = nn.ModuleList()
        into = channels[-1]
        plan = zip(variant.width, STAGE_STRIDES, betas(variant.depth), strict=True)
        for width, stride, (first_beta, *tail_betas) in plan:
            stage = Stage([NFBlock(variant, into, width, stride=stride, beta=first_beta)])
            for beta in tail_betas:
                stage.append(NFBlock(variant, width, width, stride=1, beta=beta))
            self.stages.append(stage)
            into = width
        self.num_features = 2 * into
        self.final_conv = WSConv2d(into, self.num_features, 1)
        self.head: Linear | nn.Identity = nn.Identity()
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """A new head: weight N(0, 0.01**2), bias 0; or none for 0. ValueError below 0."""
        if num_classes < 0:
            raise ValueError(f"num_classes is {num_classes}; it must be 0 (no head) or more")
        self.num_classes = num_classes
        if num_classes == 0:
            self.head = nn.Identity()
            return
        head = Linear(self.num_features, num_classes)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        self.head = head.to(self.final_conv.weight)  # device and dtype

    def forward(
        self,
        images_BCHW: Tensor,
        keep_masks_BN: Tensor | None = None,
        dropout_keep_BF: Tensor | None = None,
    ) -> Tensor:
        """Logits `(B, K)` in float32; the convolutions compute in the images' dtype.

        A trainer that keys its randomness passes both masks (any dtype; 1 keeps). Masks that are
        given are applied in either mode. Without them the model draws its own from torch's
        generator in training mode, and drops nothing in evaluation mode. Raises ValueError for a
        mask of another shape. float64 images give float64 logits.
        """
        features_BFHW = self.forward_features(images_BCHW, keep_masks_BN)
        pooled_BF = at_least_float32(features_BFHW).mean(dim=(2, 3))
        return self.head(self._drop(pooled_BF, dropout_keep_BF))

    def forward_features(self, images_BCHW: Tensor, keep_masks_BN: Tensor | None = None) -> Tensor:
        """The last activation, `(B, F, H / 32, W / 32)` rounded up, in the images' dtype."""
        batch, device = images_BCHW.shape[0], images_BCHW.device
        if keep_masks_BN is None and self.training and any(self.stochastic_depth_rates):
            rates_N = torch.tensor(self.stochastic_depth_rates, device=device)
            keep_masks_BN = torch.rand(batch, self.num_blocks, device=device) >= rates_N
        stage_masks: Sequence[Tensor | None] = [None] * len(self.stages)
        if keep_masks_BN is not None:
            _check_shape("keep_masks_BN", keep_masks_BN, (batch, self.num_blocks))
            stage_masks = keep_masks_BN.split(self.variant.depth, dim=1)
        x = images_BCHW
        for number, conv in enumerate(self.stem):
            x = conv(x if number == 0 else scaled_gelu(x))
        for stage, masks_BN in zip(self.stages, stage_masks, strict=True):
            x = stage(x, masks_BN)
        return scaled_gelu(self.final_conv(x))

    def _drop(self, pooled_BF: Tensor, keep_BF: Tensor | None) -> Tensor:
        if keep_BF is None:
            return F.dropout(pooled_BF, self.drop_rate, self.training)
        _check_shape("dropout_keep_BF", keep_BF, tuple(pooled_BF.shape))
        return pooled_BF * (keep_BF.to(pooled_BF.dtype) / (1 - self.drop_rate))

    def macs(self, size: int) -> int:
        """Multiply-accumulates of one `size` x `size` image, forward. What NF calls "FLOPs".

        Counted as the reference does (nfnet.py:154-173): convolutions, squeeze-excites, classifier.
        """
        total = 0
        for conv in self.stem:
            assert isinstance(conv, WSConv2d)
            size = -(-size // conv.stride[0])
            total += _conv_macs(conv, size)
        for stage in self.stages:
            assert isinstance(stage, Stage)
            for block in stage:
                assert isinstance(block, NFBlock)
                total += _conv_macs(block.conv0, size)
                size = -(-size // block.stride)
                for conv in (block.conv1, block.conv1b, block.conv2, block.conv_shortcut):
                    total += 0 if conv is None else _conv_macs(conv, size)
                gates = block.squeeze_excite
                total += gates.reduce.weight.numel() + gates.expand.weight.numel()
        return total + _conv_macs(self.final_conv, size) + self.num_features * self.num_classes


def _conv_macs(conv: WSConv2d, out_size: int) -> int:
    return conv.weight.numel() * out_size**2


def _check_shape(name: str, mask: Tensor, shape: tuple[int, ...]) -> None:
    """A mask of another shape could broadcast, and drop the wrong thing without a word."""
    if tuple(mask.shape) != shape:
        raise ValueError(f"{name} is {tuple(mask.shape)}; for these images it must be {shape}")
