"""Stacked parameters are clipped, decayed and averaged like the blocks that they consist of."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nfnets_xla import NFNet
from nfnets_xla.models.stacked import as_in, per_block, stack
from nfnets_xla.models.variants import Variant
from nfnets_xla.optim import SAM, SGD_AGC, parameter_roles
from nfnets_xla.optim.agc import unitwise_norm
from nfnets_xla.optim.ema import EMA
from tests.reference.sgd_agc import ema_update, sgd_agc_step

STEPS = 8
HYPER: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.01, "clipping": 0.01}
TINY = Variant(
    family="tiny",
    width=(16, 16, 32, 16),
    depth=(1, 3, 4, 1),
    train_size=16,
    test_size=16,
    drop_rate=0.0,
    randaugment_magnitude=5,
    group_width=8,
    stem=(4, 4, 4),
)


def network() -> NFNet:
    """In float64, so that a numpy twin agrees to rounding."""
    torch.manual_seed(0)
    net = NFNet(TINY, num_classes=10).double()
    for name, parameter in net.named_parameters():
        if name.endswith(("skip_gain", "bias")):
            torch.nn.init.uniform_(parameter, 0.1, 0.6)
    return net


def sgd(net: NFNet) -> SGD_AGC:
    return SGD_AGC(net.named_parameters(), parameter_roles(net, "head"), lr=0.05, **HYPER)


def closure_for(net: NFNet, step: int) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(4, 3, 16, 16, generator=generator, dtype=torch.float64)
    keep = torch.rand(4, net.num_blocks, generator=generator) > 0.2
    dropout = torch.ones(4, net.num_features)
    labels = torch.randint(10, (4,), generator=generator)

    def closure() -> Tensor:
        net.zero_grad()
        loss = F.cross_entropy(10 * net(images, keep, dropout), labels)
        loss.backward()
        return loss

    return closure


def arrays(named: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: t.detach().numpy().copy() for name, t in per_block(named).items()}


def largest_share_clipped(net: NFNet, roles: dict[str, str]) -> dict[str, float]:
    """By role: the ratio of the largest unit's gradient to its bound."""
    worst: dict[str, float] = {}
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None
        bound = HYPER["clipping"] * unitwise_norm(parameter.detach()).clamp(min=1e-3)
        excess = float((unitwise_norm(parameter.grad) / bound).max())
        worst[roles[name]] = max(worst.get(roles[name], 0.0), excess)
    return worst


def test_roles_of_a_stack_are_those_of_its_blocks() -> None:
    plain = parameter_roles(network(), "head")
    stacked = parameter_roles(stack(network()), "head")
    assert stacked["stages.2.tail.conv1.weight"] == "stacked conv"
    assert stacked["stages.2.tail.conv1.gain"] == "stacked vector"
    assert stacked["stages.2.tail.skip_gain"] == "stacked scalar"
    assert stacked["stages.2.tail.squeeze_excite.reduce.weight"] == "stacked linear"
    assert stacked["head.bias"] == "classifier_bias"
    for name, role in stacked.items():
        assert role.removeprefix("stacked ") == plain[name.replace("tail", "1")]


def test_units_of_a_stack_are_those_of_its_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((7,), (7, 5), (7, 1), (7, 4, 5), (7, 1, 5), (7, 4, 2, 3, 3), (7, 1, 1, 1, 1)):
        x = torch.randn(shape, generator=generator)
        expected = torch.stack([unitwise_norm(one).expand(one.shape) for one in x])
        torch.testing.assert_close(unitwise_norm(x, stacked=True).expand(shape), expected)


@pytest.mark.parametrize("rho", [None, 0.05])
def test_many_steps_are_those_of_the_unrolled_network(rho: float | None) -> None:
    """Weights, momentum and average, with clipping active on every role it applies to."""
    net, stacked = network(), stack(network())
    optimizers = [sgd(net), sgd(stacked)]
    averages = [EMA(one.named_parameters(), 0.9) for one in (net, stacked)]
    clipped: dict[str, float] = {}
    for step in range(STEPS):
        closure_for(net, step)()
        now = largest_share_clipped(net, parameter_roles(net, "head"))
        for one, optimizer, ema in zip((net, stacked), optimizers, averages, strict=True):
            stepping = optimizer if rho is None else SAM(optimizer, rho=rho)
            stepping.step(closure_for(one, step))
            ema.update(ema.decay_at(step))
        clipped = {role: max(clipped.get(role, 0.0), excess) for role, excess in now.items()}
    del clipped["classifier_weight"]  # exempt
    assert min(clipped.values()) > 1
    for of_net, of_stacked in (
        (dict(net.named_parameters()), dict(stacked.named_parameters())),
        (optimizers[0].slots()["momentum"], optimizers[1].slots()["momentum"]),
        (averages[0].shadow, averages[1].shadow),
    ):
        expected, found = arrays(of_net), arrays(of_stacked)
        assert expected.keys() == found.keys()
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-9, atol=1e-12)


def test_steps_equal_the_numpy_twin_of_single_blocks() -> None:
    net = stack(network())
    optimizer, ema = sgd(net), EMA(net.named_parameters(), 0.9)
    roles = parameter_roles(network(), "head")
    weights, shadow = (arrays(dict(net.named_parameters())) for _ in range(2))
    momenta = {name: np.zeros_like(weight) for name, weight in weights.items()}
    for step in range(STEPS):
        closure_for(net, step)()
        grads = arrays({n: p.grad for n, p in net.named_parameters() if p.grad is not None})
        optimizer.step()  # clips them in place
        sgd_agc_step(weights, grads, momenta, roles, lr=0.05, **HYPER)
        ema.update(ema.decay_at(step))
        ema_update(shadow, weights, 0.9, step)
    for found, expected in (
        (dict(net.named_parameters()), weights),
        (optimizer.slots()["momentum"], momenta),
        (ema.shadow, shadow),
    ):
        for name, array in arrays(found).items():
            np.testing.assert_allclose(array, expected[name], rtol=1e-9, atol=1e-12)


def test_momentum_and_average_move_between_the_forms() -> None:
    """Unrolled for three steps, stacked for three, against unrolled for six."""
    net, twin, stacked = network(), network(), stack(network())
    first, straight, second = sgd(net), sgd(twin), sgd(stacked)
    for step in range(3):
        first.step(closure_for(net, step))
    stacked.load_state_dict(net.state_dict())
    second.load_slots({"momentum": as_in(stacked, first.slots()["momentum"])}, updates=1)
    for step in range(3, 6):
        second.step(closure_for(stacked, step))
    for step in range(6):
        straight.step(closure_for(twin, step))
    for name, value in stacked.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name], rtol=1e-9, atol=1e-12)
