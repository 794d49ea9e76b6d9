"""The residual block of an NFNet, and a stage of them.

Reference: deepmind-research/nfnets, nfnet.py and base.py at f5de0ed.

Scalar gains (the activation's, beta, alpha, squeeze-excite's 2) are multiplied into weights and
gates, never into feature maps: each saves one pass over memory.

Shape suffixes: B batch, C channels in and O out, H W pixels, N residual blocks.
"""

# pyright: reportUnknownMemberType=false
# torch types its own signatures in part.

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint  # pyright: ignore[reportUnknownVariableType]

from nfnets_xla.models.layers import GELU_GAIN, SqueezeExcite, WSConv2d, gelu, same_avg_pool2d
from nfnets_xla.models.variants import ALPHA, Gelu, Variant, bottleneck

Recompute = Callable[..., Tensor]  # as torch.utils.checkpoint: (function, *arguments)


class NFBlock(nn.Module):
    """x -> shortcut + ALPHA * skip_gain * keep * branch(x). nfnet.py:176-251.

    The first block of a stage projects: its shortcut is a 1x1 convolution of the activated input,
    pooled 2x2 if the stage strides. Every other block adds to its raw input.
    """

    def __init__(
        self, variant: Variant, in_channels: int, out_channels: int, *, stride: int, beta: float
    ) -> None:
        super().__init__()
        self._beta = (beta,)  # a constant to torch.compile: see PooledDropout
        self.stride = stride
        self.gelu: Gelu = variant.gelu
        mid, groups = bottleneck(variant, out_channels)
        eps = variant.eps_mode
        self.conv0 = WSConv2d(in_channels, mid, 1, eps_mode=eps)
        self.conv1 = WSConv2d(mid, mid, 3, stride=stride, groups=groups, eps_mode=eps)
        self.conv1b = WSConv2d(mid, mid, 3, groups=groups, eps_mode=eps)
        self.conv2 = WSConv2d(mid, out_channels, 1, eps_mode=eps)
        self.squeeze_excite = SqueezeExcite(out_channels)
        self.skip_gain = nn.Parameter(torch.zeros(()))
        self.conv_shortcut = None
        if stride > 1 or in_channels != out_channels:
            self.conv_shortcut = WSConv2d(in_channels, out_channels, 1, eps_mode=eps)

    @property
    def beta(self) -> float:
        """The gain on the input: 1 / its expected standard deviation."""
        return self._beta[0]

    @property
    def input_gain(self) -> float | Tensor:
        """`beta` times the GELU gain that `gelu` leaves out; a tensor in a stack of blocks."""
        return GELU_GAIN * self.beta

    def forward(self, x_BCHW: Tensor, keep_B: Tensor | None = None) -> Tensor:
        """`(B, C, H, W)` to `(B, O, ceil(H / stride), ceil(W / stride))`.

        `keep_B` is 1 where the branch is kept, 0 where it is dropped and the shortcut remains.
        """
        activated = gelu(x_BCHW, self.gelu)
        shortcut = x_BCHW
        if self.conv_shortcut is not None:
            shortcut = self.conv_shortcut(same_avg_pool2d(activated, self.stride), self.input_gain)
        out = self.conv0(activated, self.input_gain)
        for conv in (self.conv1, self.conv1b, self.conv2):
            out = conv(gelu(out, self.gelu), GELU_GAIN)
        gates_BC11 = self.squeeze_excite(out) * (self.skip_gain * (2 * ALPHA)).to(out.dtype)
        if keep_B is not None:  # not divided by the keep probability: base.py:202-220
            gates_BC11 = gates_BC11 * keep_B.to(out.dtype)[:, None, None, None]
        return torch.addcmul(shortcut, out, gates_BC11)


class Stage(nn.ModuleList):
    """`stage[0]` projects; `stage[1:]` are identical and keep their input's shape.

    The network calls stages, not blocks, so that one scan over stacked blocks can replace a stage.
    """

    checkpoint: Recompute | None = None  # recomputes a block in the backward pass

    def forward(self, x_BCHW: Tensor, keep_masks_BN: Tensor | None = None) -> Tensor:
        """N counts this stage's blocks."""
        for number, block in enumerate(self):
            keep_B = None if keep_masks_BN is None else keep_masks_BN[:, number]
            x_BCHW = self.run(block, x_BCHW, keep_B)
        return x_BCHW

    def run(self, block: nn.Module, x_BCHW: Tensor, keep_B: Tensor | None) -> Tensor:
        if self.checkpoint is not None and torch.is_grad_enabled():
            return self.checkpoint(block, x_BCHW, keep_B)
        return block(x_BCHW, keep_B)


def recompute(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """torch's checkpointing, without saving RNG state: a block's masks are arguments."""
    result = torch_checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore[reportUnknownVariableType]
    assert isinstance(result, Tensor)
    return result
