"""Small networks in which every parameter has an effect: new ones have zero gains and biases."""

from dataclasses import replace
from typing import Any

import torch

from nfnets_xla.models.nfnet import NFNet
from nfnets_xla.models.variants import VARIANTS

# Only the second stage has a tail, of one block: every kind of block, yet fast.
DEPTH = (1, 2, 1, 1)


def trained(name: str = "nfnet_mini_f0", *, num_classes: int = 10, **options: Any) -> NFNet:
    """Move gains, biases and skip gains away from their initial values, as training does."""
    torch.manual_seed(0)
    variant = replace(VARIANTS[name], depth=DEPTH)
    net = NFNet(variant, num_classes=num_classes, **options)
    with torch.no_grad():
        for parameter_name, parameter in net.named_parameters():
            if parameter_name.endswith("skip_gain"):
                parameter.add_(0.5 + 0.1 * torch.randn(()))
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return net
