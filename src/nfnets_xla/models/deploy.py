"""A network for inference: weights standardised once, and every scalar gain folded away.

    fused = nfnets_xla.fuse(net)     # the same logits, from plain convolutions

Only ordinary convolutions and linear layers, GELU, and one multiply-add per block remain, so that
the result exports and quantises like any other network; the head stays in float32. It cannot be
trained.

Shape suffixes as in nfnet.py.
"""

# pyright: reportUnknownMemberType=false, reportUntypedFunctionDecorator=false
# pyright: reportPrivateUsage=false
# torch types its own signatures in part.

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from nfnets_xla.models.blocks import NFBlock
from nfnets_xla.models.layers import (
    GELU_GAIN,
    Gelu,
    Linear,
    WSConv2d,
    at_least_float32,
    gelu,
    same_avg_pool2d,
    same_conv2d,
    same_padding,
    uncompiled,
    without_autocast,
)
from nfnets_xla.models.nfnet import NFNet
from nfnets_xla.models.stacked import is_stacked, unstack
from nfnets_xla.models.variants import ALPHA


@torch.no_grad()
def fuse(net: NFNet) -> "FusedNFNet":
    """A copy of `net` (stacked or not) for inference, in channels_last: the same logits to 1e-4.

    Device and dtypes are kept, and images must have the weights' dtype: `fuse(net).bfloat16()` for
    bfloat16 images. `net` itself is not changed. ValueError for a network that is no NFNet, and for
    one whose last stages were dropped (`prune_intermediate_layers`).
    """
    whole = uncompiled(net)
    if not isinstance(whole, NFNet):
        raise ValueError(
            f"the network is a {type(whole).__name__}; only an NFNet can be fused: for feature "
            "maps, build it without features_only"
        )
    net = whole
    if not isinstance(net.final_conv, WSConv2d):
        raise ValueError(
            f"the network ends after {len(net.stages)} stages: fuse the whole network, "
            "before prune_intermediate_layers"
        )
    if is_stacked(net):
        net = unstack(deepcopy(net))
    fused = FusedNFNet(net).requires_grad_(False).eval()
    fused.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return fused


class FusedNFNet(nn.Module):
    """What `fuse` returns. Overwrites its activations in place, never its input; so there is no
    backward pass, not even to the input."""

    pretrained_cfg: dict[str, Any]  # the network's, if it has one: for timm.data's transforms

    def __init__(self, net: NFNet) -> None:
        super().__init__()
        self.num_classes, self.num_features = net.num_classes, net.num_features
        self.global_pool = net.global_pool
        if hasattr(net, "pretrained_cfg"):
            self.pretrained_cfg = net.pretrained_cfg
        self.gelu: Gelu = net.variant.gelu
        gains = [1.0] + [GELU_GAIN] * (len(net.stem) - 1)  # images are not activated
        self.stem = nn.ModuleList(map(_plain, net.stem, gains))
        self.blocks = nn.ModuleList(
            FusedBlock(block) for stage in net.stages for block in stage.children()
        )
        self.final_conv = _plain(net.final_conv)
        own = isinstance(net.head, Linear)
        self.head = _plain_linear(net.head, Linear) if own else deepcopy(net.head)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits `(B, K)` in float32; pooled features `(B, F)` if there is no classifier; unpooled
        ones if `net` does not pool."""
        features_BFHW = self.forward_features(images_BCHW)
        if self.global_pool == "":
            return features_BFHW * GELU_GAIN
        pooled_BF = at_least_float32(features_BFHW).mean(dim=(2, 3))
        return without_autocast(self.head, pooled_BF * GELU_GAIN)

    def forward_features(self, images_BCHW: Tensor) -> Tensor:
        """`(B, F, H / 32, W / 32)` rounded up: the last activation without its gain."""
        x = images_BCHW
        for number, conv in enumerate(self.stem):
            x = conv(x if number == 0 else gelu_(x, self.gelu))
        for block in self.blocks:
            x = block(x)
        return gelu_(self.final_conv(x), self.gelu)


class FusedBlock(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        assert isinstance(block, NFBlock)
        self.gelu: Gelu = block.gelu
        self.stride = block.stride
        self.conv0 = _plain(block.conv0, GELU_GAIN * block.beta)
        self.conv1 = _plain(block.conv1, GELU_GAIN)
        self.conv1b = _plain(block.conv1b, GELU_GAIN)
        self.conv2 = _plain(block.conv2, GELU_GAIN)
        self.conv_shortcut = None
        if block.conv_shortcut is not None:
            self.conv_shortcut = _plain(block.conv_shortcut, GELU_GAIN * block.beta)
        plain = {id(linear): _plain_linear(linear) for linear in block.squeeze_excite.children()}
        self.squeeze_excite = deepcopy(block.squeeze_excite, plain)  # `plain` replaces the linears
        # A buffer, so that the state dict holds the whole network.
        self.branch_gain: Tensor
        self.register_buffer("branch_gain", block.skip_gain.detach() * (2 * ALPHA))

    def forward(self, x: Tensor) -> Tensor:
        activated = gelu(x, self.gelu)
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(same_avg_pool2d(activated, self.stride))
        out = self.conv0(activated)
        for conv in (self.conv1, self.conv1b, self.conv2):
            out = conv(gelu_(out, self.gelu))
        gates_BC11 = self.squeeze_excite(out) * self.branch_gain.to(out.dtype)
        return x.addcmul_(out, gates_BC11)


class SameConv2d(nn.Conv2d):
    """An ordinary convolution whose padding follows from the size of its input."""

    def forward(self, input: Tensor) -> Tensor:
        return same_conv2d(input, self.weight, self.bias, self.stride[0], self.groups)


def gelu_(x: Tensor, form: Gelu) -> Tensor:
    """In place: at large batches writing to fresh memory costs more than the activation does."""
    return torch.ops.aten.gelu_(x, approximate="tanh" if form == "tanh" else "none")


def _plain_linear(linear: nn.Module, kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    """A copy without hooks or parametrisations of torch.nn.utils. By default of torch's own class,
    which quantisation recognises, and whose input must have the weights' dtype."""
    assert isinstance(linear, nn.Linear)
    _bring_up_to_date(linear)
    with torch.device("meta"):
        plain = kind(linear.in_features, linear.out_features)
    plain.weight = nn.Parameter(linear.weight.detach().clone())
    plain.bias = nn.Parameter(linear.bias.detach().clone())
    return plain


def _bring_up_to_date(module: nn.Module) -> None:
    """Run the hooks by which pruning and the older weight norm set a weight before each use."""
    for hook in module._forward_pre_hooks.values():  # pyright: ignore[reportUnknownVariableType]
        kind = type(hook)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        if kind.__module__.startswith("torch.nn.utils."):
            hook(module, ())  # pyright: ignore[reportUnknownArgumentType]


def _plain(conv: nn.Module, input_gain: float = 1.0) -> nn.Conv2d:
    """The ordinary convolution equal to this WSConv2d, with `input_gain` folded into its weight."""
    assert isinstance(conv, WSConv2d)
    _bring_up_to_date(conv)
    strided = conv.stride[0] > 1
    kind = SameConv2d if strided else nn.Conv2d
    weight = conv.standardised_weight(input_gain).to(conv.weight.dtype)
    with torch.device(weight.device):
        plain = kind(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size[0],
            stride=conv.stride[0],
            padding=0 if strided else same_padding(0, conv.kernel_size[0], 1)[0],
            groups=conv.groups,
            dtype=weight.dtype,
        )
    plain.weight = nn.Parameter(weight)
    assert conv.bias is not None
    plain.bias = nn.Parameter(conv.bias.detach().clone())
    return plain
