"""A network of a few hundred parameters with every role, and a loss for it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfnets_xla.optim.by_role import ByRole
from nfnets_xla.optim.choice import make_optimizer

SETTINGS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9, "weight_decay": 2e-5, "clipping": 0.01},
    "adamw": {"momentum": 0.9, "beta2": 0.99, "weight_decay": 0.03, "clipping": 0.01},
}


def an_optimizer(name: str, net: nn.Module, roles: dict[str, str], **options: Any) -> ByRole:
    settings = {"guard": None, **SETTINGS[name], **options}
    return make_optimizer(name, dict(net.named_parameters()), roles, **settings)


class SmallNet(nn.Module):
    """A residual block between a convolution and a classifier; smooth."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.gain = nn.Parameter(torch.ones(8))
        self.gate = nn.Linear(8, 8)
        self.skip_gain = nn.Parameter(torch.zeros(()))
        self.head = nn.Linear(8, 5)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x = torch.tanh(self.stem(images_BCHW))
        branch = self.grouped(x) * self.gain[:, None, None]
        gates = torch.sigmoid(self.gate(branch.mean(dim=(2, 3))))
        x = x + self.skip_gain * branch * gates[:, :, None, None]
        return self.head(x.mean(dim=(2, 3)))


def small_net() -> SmallNet:
    """Has the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SmallNet()


def images_and_labels() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(6, 3, 8, 8, generator=generator)
    return images, torch.randint(5, (6,), generator=generator)


def closure_of(net: nn.Module) -> Callable[[], Tensor]:
    """Zero gradients, forward, backward, with `images_and_labels` on the network's device."""
    device = next(net.parameters()).device
    images, labels = (tensor.to(device) for tensor in images_and_labels())

    def closure() -> Tensor:
        net.zero_grad()
        loss = F.cross_entropy(net(images), labels)
        loss.backward()
        return loss

    return closure
