"""What the average guarantees; test_optim and test_deepmind_trajectory test its numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from nfnets_xla.inductor import Clock, as_it_is
from nfnets_xla.optim.ema import EMA
from nfnets_xla.optim.schedule import Schedule
from tests.optim.network import images_and_labels, small_net


def test_a_one_element_decay_gives_the_floats_bits() -> None:
    net = small_net()
    ours, theirs = (EMA(net.named_parameters(), 0.9) for _ in range(2))
    for decay in (0.1, 0.0, 0.99999, 1.0):
        torch.nn.init.normal_(net.gain)
        torch.nn.init.constant_(net.skip_gain, decay)
        ours.update(decay)
        theirs.update(torch.tensor([decay]))
    assert all(torch.equal(ours.shadow[name], theirs.shadow[name]) for name in ours.shadow)
    assert ours.shadow["skip_gain"].shape == ()


def test_decay_0_copies_the_weights_and_1_keeps_the_average() -> None:
    net = small_net()
    ema = EMA(net.named_parameters(), 0.9)
    torch.nn.init.normal_(net.gain)
    ema.update(1.0)
    assert torch.equal(ema.shadow["gain"], torch.ones(8))
    ema.update(0.0)
    assert torch.equal(ema.shadow["gain"], net.gain)


def test_evaluation_with_the_average_leaves_the_module_alone() -> None:
    net = small_net()
    images, _ = images_and_labels()
    expected = net(images)
    ema = EMA(net.named_parameters(), 0.9)
    torch.nn.init.normal_(net.head.weight)
    now = net(images)
    assert torch.equal(functional_call(net, ema.shadow, (images,)), expected)
    assert torch.equal(net(images), now)


def test_bfloat16_weights_are_averaged_in_float32() -> None:
    ema = EMA(small_net().bfloat16().named_parameters(), 0.9)
    ema.update(0.5)
    assert {shadow.dtype for shadow in ema.shadow.values()} == {torch.float32}


# torch_xla, which other tests have imported, disables it.
@torch._dynamo.config.patch(automatic_dynamic_shapes=True)  # pyright: ignore[reportPrivateImportUsage]
def test_a_loop_compiled_by_inductor_has_the_same_rates_and_average() -> None:
    """Over the decay's warm-up and beyond, with more updates than torch.compile allows graphs."""
    torch._dynamo.reset()  # pyright: ignore[reportPrivateImportUsage]
    clock, schedule = Clock(), Schedule("cosine", peak=1.6, warmup_steps=3, total_steps=12)
    (plain, plain_rates), (compiled, rates) = (
        averaged(schedule, compile) for compile in (as_it_is, torch.compile)
    )
    assert clock.graphs <= 4  # two pieces; the number of updates is first a constant, then symbolic
    assert all(torch.equal(compiled[name], plain[name]) for name in plain)
    torch.testing.assert_close(rates, plain_rates, rtol=1e-6, atol=0)


def averaged(
    schedule: Schedule, compile: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> tuple[dict[str, Tensor], Tensor]:
    """The average after a loop's updates, and the rates that it used."""
    net = small_net()
    ema = EMA(net.named_parameters(), 0.5)

    def step(number: int) -> Tensor:
        rate = torch.ones(1) * schedule(number)
        with torch.no_grad():
            net.gain.add_(1)
        ema.update(ema.decay_at(number))
        return rate

    compiled = compile(step)
    rates = torch.cat([compiled(number) for number in range(12)])
    return ema.shadow, rates


def test_loading_takes_copies() -> None:
    ema = EMA(small_net().named_parameters(), 0.9)
    given = {name: torch.full_like(tensor, 3.0) for name, tensor in ema.shadow.items()}
    ema.load(given)
    ema.update(0.0)
    assert all(bool((tensor == 3).all()) for tensor in given.values())
    ema.load(given)
    assert all(bool((tensor == 3).all()) for tensor in ema.shadow.values())


def test_bad_values_are_refused() -> None:
    ema = EMA(small_net().named_parameters(), 0.9)
    with pytest.raises(ValueError, match=r"decay is 1\.5"):
        ema.update(1.5)
    with pytest.raises(ValueError, match=r"decay is a tensor of shape \(\)"):
        ema.update(torch.tensor(0.5))
    with pytest.raises(ValueError, match="update is -1"):
        ema.decay_at(-1)
    net = small_net()
    ema = EMA(net.named_parameters(), 0.9)
    net.double()
    with pytest.raises(ValueError, match=r"are torch\.float64 and their average is"):
        ema.update(0.5)
    with pytest.raises(ValueError, match="no parameters to average"):
        EMA([], 0.9)
