"""timm's NFNets for comparison: any of the 16 variants, at full width or an eighth of it."""

from typing import TypeVar

from timm.models.nfnet import NfCfg, NormFreeNet
from torch import nn

from nfnets_xla.models.variants import VARIANTS

Net = TypeVar("Net", bound=nn.Module)


def timms_network(name: str, num_classes: int) -> NormFreeNet:
    """dm_nfnet_*'s configuration at any width; timm derives the stem's widths from the last of
    them."""
    variant = VARIANTS[name]
    configuration = NfCfg(
        depths=variant.depth,
        channels=variant.width,
        stem_type="deep_quad",
        stem_chs=variant.width[0] // 2,
        group_size=variant.group_width,
        bottle_ratio=0.5,
        extra_conv=True,
        gamma_in_act=True,
        same_padding=True,
        skipinit=True,
        num_features=2 * variant.width[-1],
        act_layer="gelu",
        attn_layer="se",
        attn_kwargs={"rd_ratio": 0.5},
    )
    return NormFreeNet(configuration, num_classes=num_classes)


def with_branches(net: Net) -> Net:
    """Set skip gains to 0.5, as if trained a while: a branch whose gain is 0 gets no gradient."""
    for name, parameter in net.named_parameters():
        if name.endswith(("skip_gain", "skipinit_gain")):
            nn.init.constant_(parameter, 0.5)
    return net.train()
