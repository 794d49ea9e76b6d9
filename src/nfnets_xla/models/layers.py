"""The layers of NFNets: scaled activation, weight-standardised convolution, squeeze-excite.

Reference: deepmind-research/nfnets, base.py at f5de0ed. Shape suffixes: B batch, C channels, H W
pixels, O out and I in channels of a weight.
"""

# pyright: reportUnknownMemberType=false
# torch types its own signatures in part.

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from nfnets_xla.models.variants import EpsMode, Gelu

GELU_GAIN = 1.7015043497085571  # base.py: unit variance out for N(0, 1) in, tanh approximation
WS_FLOOR = 1e-4  # base.py: a floor under variance * fan_in, not an addend
WS_ADDEND = 1e-5  # timm's dm_nfnet (std_conv_eps): added to the variance

vector_norm: Callable[..., Tensor] = torch.linalg.vector_norm  # pyright: ignore[reportUnknownVariableType]


def uncompiled(net: Any) -> Any:
    """The network inside torch.compile's wrapper, or `net` itself if it has none."""
    return getattr(net, "_orig_mod", net)


def gelu(x: Tensor, form: Gelu = "tanh") -> Tensor:
    """GELU without its gain, which the next convolution folds into its weight."""
    return F.gelu(x, approximate="tanh" if form == "tanh" else "none")


def scaled_gelu(x: Tensor, form: Gelu = "tanh") -> Tensor:
    """GELU scaled to give unit variance for N(0, 1); any shape, dtype kept."""
    return gelu(x, form) * GELU_GAIN


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME: pixels before and after. A stride-2 3x3 on an even size pads (0, 1)."""
    if stride == 1:  # does not depend on the size, which may be symbolic in an exported graph
        return (kernel - 1) // 2, kernel // 2
    # The remainder is found as a plain number: with a symbolic size, a formula would grow from
    # layer to layer until the compiler could not simplify it.
    last = next(length for length in range(1, stride + 1) if (size - length) % stride == 0)
    total = max(kernel - last, 0)
    return total // 2, total - total // 2


def pixels(x_BCHW: Tensor) -> tuple[int, int]:
    """Height and width as numbers: torch.jit.trace has tensors there (its trace fits one size)."""
    _, _, height, width = x_BCHW.shape
    tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    return (int(height), int(width)) if tracing else (height, width)


def at_least_float32(x: Tensor) -> Tensor:
    """bfloat16 and float16 become float32; float32 and float64 stay what they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_autocast(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)` with autocast off, which would compute it in a lower precision than `x`'s."""
    device = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device):  # the meta device has no autocast
        return layer(x)
    with torch.autocast(device, enabled=False):
        return layer(x)


class Linear(nn.Linear):
    """nn.Linear that casts its weights to the input's dtype, as WSConv2d does."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype), self.bias.to(input.dtype))


class PooledDropout(nn.Module):
    """A network with dropout on its pooled features: by a given mask, or drawn at `drop_rate`.

    The rate is kept in a tuple. Once torch.compile makes sizes symbolic, it makes a module's bare
    floats symbolic too, and torch 2.9 then drops the guards on a graph's sizes: it silently
    computed wrong logits.
    """

    def __init__(self, drop_rate: float) -> None:
        super().__init__()
        self.drop_rate = drop_rate

    @property
    def drop_rate(self) -> float:
        """In [0, 1), else ValueError."""
        return self._drop_rate[0]

    @drop_rate.setter
    def drop_rate(self, rate: float) -> None:
        check_rate("drop_rate", rate)
        self._drop_rate = (rate,)

    def drop(self, pooled_BF: Tensor, keep_BF: Tensor | None) -> Tensor:
        """`keep_BF` (1 keeps) applies in train and eval mode; without it, torch's dropout."""
        if keep_BF is None:
            return F.dropout(pooled_BF, self.drop_rate, self.training)
        check_mask("dropout_keep_BF", keep_BF, tuple(pooled_BF.shape))
        return pooled_BF * (keep_BF.to(pooled_BF.dtype) / (1 - self.drop_rate))


def check_rate(name: str, rate: float) -> None:
    if not 0 <= rate < 1:
        raise ValueError(f"{name} is {rate}; it must be in [0, 1)")


def check_mask(name: str, mask: Tensor, shape: tuple[int, ...]) -> None:
    """A mask of another shape could broadcast, and silently drop the wrong things."""
    if tuple(mask.shape) != shape:
        raise ValueError(f"{name} is {tuple(mask.shape)}; for these images it must be {shape}")


class Standardise(torch.autograd.Function):
    """(w - mean) / sqrt(max(sum (w - mean)^2, floor) + addend) * gain, per output channel.

    Its backward pass is written by hand, and needs only the weight: autograd would keep a centred
    copy of every weight. benchmarks/standardise.py times it beside others. Only the first of its
    three results can be differentiated.
    """

    generate_vmap_rule = True  # gradients per sample

    @staticmethod
    def forward(
        weight_OIHW: Tensor, gain_O: Tensor, floor: float, addend: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean_O111 = weight_OIHW.mean(dim=(1, 2, 3), keepdim=True)
        centred = weight_OIHW - mean_O111
        squares_O111 = vector_norm(centred, dim=(1, 2, 3), keepdim=True).square()
        scale_O111 = torch.rsqrt(squares_O111.clamp(min=floor) + addend)
        return centred * (scale_O111 * gain_O[:, None, None, None]), mean_O111, squares_O111

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        weight_OIHW, gain_O, *ctx.floor_and_addend = inputs
        _, mean_O111, squares_O111 = output
        ctx.save_for_backward(weight_OIHW, gain_O, mean_O111, squares_O111)
        ctx.mark_non_differentiable(mean_O111, squares_O111)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """With c = w - mean and s the scale: dw = gain s (G - mean G) - gain s^3 c sum(G c)."""
        weight_OIHW, gain_O, mean_O111, squares_O111 = ctx.saved_tensors
        floor, addend = ctx.floor_and_addend
        if torch.is_grad_enabled():  # double backward: the saved statistics would be constants
            _, mean_O111, squares_O111 = Standardise.forward(weight_OIHW, gain_O, floor, addend)
        grad_OIHW = grads[0]
        centred = weight_OIHW - mean_O111
        scale_O111 = torch.rsqrt(squares_O111.clamp(min=floor) + addend)
        scaled_gain_O111 = scale_O111 * gain_O[:, None, None, None]
        along_O111 = (grad_OIHW * centred).sum(dim=(1, 2, 3), keepdim=True)
        above_O111 = squares_O111 > floor  # below the floor the scale is constant
        shrink_O111 = scaled_gain_O111 * scale_O111.square() * along_O111 * above_O111
        shift_O111 = scaled_gain_O111 * grad_OIHW.mean(dim=(1, 2, 3), keepdim=True)
        grad_weight = torch.addcmul(-shift_O111, grad_OIHW, scaled_gain_O111)
        grad_weight = torch.addcmul(grad_weight, centred, shrink_O111, value=-1)
        return grad_weight, (along_O111 * scale_O111).flatten(), None, None


def in_forward_mode() -> bool:
    """Whether torch.func.jvp, or anything built on it, is differentiating this."""
    return forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage, reportUnknownVariableType]


class WSConv2d(nn.Conv2d):
    """Convolution with scaled weight standardisation, a gain per output channel, and SAME padding.

    The weight is standardised in float32 and then cast to the input's dtype: the convolution
    computes in the input's dtype while the master weights stay float32.
    Reference: base.py:121-154. The gain is `(O,)` as there: AGC clips it as one vector.

    `place_weight`, if set, is applied to the standardised, cast weight: where parameters are
    sharded over devices, it gathers the weight in the lower precision.
    """

    place_weight: Callable[[Tensor], Tensor] | None = None

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
        for name, value in (("kernel_size", kernel_size), ("stride", stride)):
            if not isinstance(value, int):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ValueError(f"{name} is {value!r}; it must be one number, for both axes")
        if in_channels < 1:
            raise ValueError(f"in_channels is {in_channels}; it must be at least 1")
        super().__init__(in_channels, out_channels, kernel_size, stride, groups=groups, bias=bias)
        self.gain = nn.Parameter(torch.ones(out_channels))
        self.fan_in = self.weight[0].numel()
        self.eps_mode = eps_mode
        nn.init.normal_(self.weight, std=self.fan_in**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def standardised_weight(self, input_gain: float | Tensor = 1.0) -> Tensor:
        """`(O, I / groups, H, W)`: mean 0, variance 1 / fan-in per output channel, times the gains.

        float32, or float64 for a float64 weight. `input_gain` may be a 0-d tensor.
        """
        weight = at_least_float32(self.weight)
        gain = self.gain.to(weight.dtype) * input_gain
        floor, addend = (
            (WS_FLOOR, 0.0) if self.eps_mode == "floor" else (0.0, WS_ADDEND * self.fan_in)
        )
        # Not in forward mode: torch takes a function's own jvp for a constant if it is to be
        # differentiated in forward mode again, as jacfwd(jacfwd(...)) does.
        if torch.is_grad_enabled() and not in_forward_mode():
            results = Standardise.apply(weight, gain, floor, addend)  # pyright: ignore[reportUnknownVariableType]
            return results[0]  # pyright: ignore[reportUnknownVariableType, reportOptionalSubscript]
        return Standardise.forward(weight, gain, floor, addend)[0]  # traceable

    def forward(self, input: Tensor, input_gain: float | Tensor = 1.0) -> Tensor:
        """`(B, C, H, W)` to `(B, O, ceil(H / stride), ceil(W / stride))`, in the input's dtype.

        The result is as if the input were multiplied by `input_gain`, which is free here.
        ValueError for integers, which cannot be normalised images.
        """
        if input.ndim != 4:
            raise ValueError(
                f"the input is {tuple(input.shape)}; it must be (B, C, H, W): give one image a "
                "batch axis by image[None]"
            )
        if not input.is_floating_point():
            raise ValueError(
                f"the input is {input.dtype}; it must be of floating point: convert images, and "
                "normalise them by the mean and std of net.pretrained_cfg"
            )
        weight = self.standardised_weight(input_gain).to(input.dtype)
        if self.place_weight is not None:
            weight = self.place_weight(weight)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return same_conv2d(input, weight, bias, self.stride[0], self.groups)


def same_conv2d(
    x_BCHW: Tensor, weight: Tensor, bias: Tensor | None, stride: int, groups: int
) -> Tensor:
    """Convolution with TensorFlow's SAME padding; kernel and stride are square."""
    (height, width), kernel = pixels(x_BCHW), pixels(weight)[0]
    top, bottom = same_padding(height, kernel, stride)
    left, right = same_padding(width, kernel, stride)
    padding = (top, left)
    if (top, left) != (bottom, right):  # asymmetric: pad by hand
        x_BCHW = F.pad(x_BCHW, (left, right, top, bottom))
        padding = (0, 0)
    # Along an axis of one pixel the stride does not matter. With a stride there, oneDNN's bfloat16
    # weight gradient is uninitialised memory (torch 2.9 on CPUs with AVX-512).
    strides = [stride if size != 1 else 1 for size in (height, width)]
    return F.conv2d(x_BCHW, weight, bias, strides, padding, groups=groups)


def same_avg_pool2d(x_BCHW: Tensor, stride: int) -> Tensor:
    """Mean over 2x2 windows; at an odd edge, over the pixels inside the image."""
    if stride == 1:
        return x_BCHW
    window = [
        2 if size > 1 else 1 for size in pixels(x_BCHW)
    ]  # XLA rejects a window of 2 over 1 pixel
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
