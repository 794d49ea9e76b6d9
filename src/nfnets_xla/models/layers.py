"""What NFNets are made of: the scaled activation, the standardised convolution, squeeze-excite.

Reference: deepmind-research/nfnets, base.py at f5de0ed. Shape suffixes: B batch, C channels, H W
pixels, O out and I in channels of a weight.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GELU_GAIN = 1.7015043497085571  # base.py: unit variance out for N(0, 1) in, tanh approximation
WS_FLOOR = 1e-4  # base.py: a floor under variance * fan_in, not an addend
WS_ADDEND = 1e-5  # timm's dm_nfnet (std_conv_eps): added to the variance

Gelu = Literal["tanh", "erf"]
EpsMode = Literal["floor", "add"]


def gelu(x: Tensor, form: Gelu = "tanh") -> Tensor:
    """GELU without its gain, which the convolution that follows folds into its weight."""
    return F.gelu(x, approximate="tanh" if form == "tanh" else "none")


def scaled_gelu(x: Tensor, form: Gelu = "tanh") -> Tensor:
    """GELU scaled to give unit variance for N(0, 1); any shape, dtype kept."""
    return gelu(x, form) * GELU_GAIN


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME: pixels before and after. A stride-2 3x3 on an even size pads (0, 1)."""
    if stride == 1:  # whatever the size, which then need not be known when a graph is exported
        return (kernel - 1) // 2, kernel // 2
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
        eps_mode: EpsMode = "floor",
    ) -> None:
        """`eps_mode="add"` is timm's: 1e-5 added to the variance instead of DeepMind's floor."""
        super().__init__(in_channels, out_channels, kernel_size, stride, groups=groups, bias=bias)
        self.gain = nn.Parameter(torch.ones(out_channels))
        self.fan_in = self.weight[0].numel()
        self.eps_mode = eps_mode
        nn.init.normal_(self.weight, std=self.fan_in**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def standardised_weight(self, input_gain: float = 1.0) -> Tensor:
        """`(O, I / groups, H, W)`: mean 0, variance 1 / fan-in per output channel, times the gains.

        float32, or float64 for a float64 weight.
        """
        weight = at_least_float32(self.weight)
        variance, mean = torch.var_mean(weight, dim=(1, 2, 3), correction=0, keepdim=True)
        if self.eps_mode == "floor":
            scale = torch.rsqrt((variance * self.fan_in).clamp(min=WS_FLOOR))
        else:
            scale = torch.rsqrt((variance + WS_ADDEND) * self.fan_in)
        scale = scale * (self.gain.to(weight.dtype) * input_gain)[:, None, None, None]
        return torch.addcmul(-mean * scale, weight, scale)

    def forward(self, input: Tensor, input_gain: float = 1.0) -> Tensor:
        """`(B, C, H, W)` to `(B, O, ceil(H / stride), ceil(W / stride))`, in the input's dtype.

        As if the input were multiplied by `input_gain`, which costs nothing here.
        """
        weight = self.standardised_weight(input_gain).to(input.dtype)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return same_conv2d(input, weight, bias, self.stride[0], self.groups)


def same_conv2d(
    x_BCHW: Tensor, weight: Tensor, bias: Tensor | None, stride: int, groups: int
) -> Tensor:
    """Convolution with TensorFlow's SAME padding; square strides, any kernel."""
    top, bottom = same_padding(x_BCHW.shape[2], weight.shape[2], stride)
    left, right = same_padding(x_BCHW.shape[3], weight.shape[3], stride)
    padding = (top, left)
    if (top, left) != (bottom, right):  # asymmetric: pad by hand
        x_BCHW = F.pad(x_BCHW, (left, right, top, bottom))
        padding = (0, 0)
    return F.conv2d(x_BCHW, weight, bias, stride, padding, groups=groups)


def same_avg_pool2d(x_BCHW: Tensor, stride: int) -> Tensor:
    """Mean over 2x2 windows; at an odd edge over the pixels that are there."""
    if stride == 1:
        return x_BCHW
    window = [min(2, size) for size in x_BCHW.shape[2:]]  # XLA: no 2 over 1
    return F.avg_pool2d(x_BCHW, window, stride, ceil_mode=True, count_include_pad=False)


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
