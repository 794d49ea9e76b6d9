"""Updates that are not finite are skipped to the bit, wherever in the step the fault is."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nfnets_xla.optim import SAM, Guard, parameter_roles
from nfnets_xla.optim.ema import EMA
from tests.optim.network import SETTINGS, SmallNet, an_optimizer, closure_of, small_net

CPU = torch.device("cpu")


class Training:
    """`small_net` with all its state."""

    def __init__(
        self, guard: Guard | None, *, apart: bool, rho: float | None, optimizer: str = "sgd"
    ) -> None:
        self.net, self.guard, self.rho = small_net(), guard, rho
        roles = parameter_roles(self.net, "head")
        self.updater = an_optimizer(optimizer, self.net, roles, lr=0.3, guard=guard)
        if apart:  # as traced on XLA devices
            self.updater._clip_and_update_fused = self.updater._clip_and_update_apart
        self.sam = None if rho is None else SAM(self.updater, rho=rho, microbatches=2)
        self.ema = EMA(self.net.named_parameters(), 0.9)

    def step(self, wound: Callable[[SmallNet], None] | None = None, at: int = 0) -> None:
        """`wound` is called after backward pass number `at`."""
        passes, gradient = [0], closure_of(self.net)

        def closure() -> Tensor:
            loss = gradient()
            if wound is not None and passes[0] == at:
                wound(self.net)
            passes[0] += 1
            return loss

        if self.sam is None:
            closure()
            self.updater.step()
        else:
            self.sam.step(closure)
        holds = torch.zeros(1) if self.guard is None else self.guard.holds
        assert holds is not None
        self.ema.update(torch.maximum(torch.tensor([0.9]), holds))

    def state(self) -> dict[str, Tensor]:
        parts = {"": dict(self.net.named_parameters()), "e/": self.ema.shadow}
        parts |= {f"{n}/": kept for n, kept in enumerate(self.updater.state.values())}
        return {p + n: t.detach().clone() for p, named in parts.items() for n, t in named.items()}


def set_to(value: float, name: str) -> Callable[[SmallNet], None]:
    def wound(net: SmallNet) -> None:
        grad = net.get_parameter(name).grad
        assert grad is not None
        grad.view(-1)[-1] = value

    return wound


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a | b)


@pytest.mark.parametrize("optimizer", SETTINGS)
@pytest.mark.parametrize("apart", [False, True], ids=["fused", "apart"])
@pytest.mark.parametrize(
    ("rho", "at"),
    [(None, 0), *((0.05, each) for each in range(4))],
    ids=["no sam", "ascent", "descent", "second ascent", "second descent"],
)
@pytest.mark.parametrize(("value", "name"), [(math.nan, "head.weight"), (-math.inf, "skip_gain")])
def test_bad_steps_change_nothing_and_the_others_what_they_always_did(
    value: float, name: str, rho: float | None, at: int, apart: bool, optimizer: str
) -> None:
    """In the first step (without momentum), and later; compared with a twin without guard."""
    guard = Guard(CPU, allowed=2, memory=3)
    guarded = Training(guard, apart=apart, rho=rho, optimizer=optimizer)
    twin = Training(None, apart=apart, rho=rho, optimizer=optimizer)
    for step in range(5):
        before = guarded.state()
        bad = step in (0, 3)
        guarded.step(set_to(value, name) if bad else None, at)
        if bad:
            assert equal(guarded.state(), before)
        else:
            twin.step()
            assert not equal(guarded.state(), before)
        assert equal(guarded.state(), twin.state())
    assert guard.numbers_G.tolist() == [2, 0, 0, 1, 0]


def test_one_too_many_freezes_for_good() -> None:
    guard = Guard(CPU, allowed=3, left_out=2, memory=2)
    training = Training(guard, apart=False, rho=None)
    wound = set_to(math.nan, "gain")
    training.step(wound)
    training.step()
    assert guard.numbers_G.tolist() == [3, 0, 1, 0]
    kept = training.state()
    for number, bad in enumerate([True, False, True, False], start=1):
        training.step(wound if bad else None)
        assert equal(training.state(), kept)
        assert guard.numbers_G.tolist()[:2] == [3, number]


def test_a_norm_that_overflows_and_a_loss_count_and_a_large_gradient_does_not() -> None:
    guard = Guard(CPU, allowed=9)
    gradients = [torch.ones(3), torch.full((2, 2), 1e18)]
    assert guard.judge(gradients).tolist() == [0]
    assert guard.judge([*gradients, torch.full((2,), 3e38)]).tolist() == [1]
    for loss in (math.inf, -math.inf):
        guard.watch(torch.tensor([1.0, loss]))
        guard.watch(torch.tensor([1.0, 2.0]))
        assert guard.judge(gradients).tolist() == [1]
        assert guard.judge(gradients).tolist() == [0]  # a watched loss counts for one update
    assert guard.numbers_G.tolist() == [3, 0, 0]


@pytest.mark.parametrize(("allowed", "memory"), [(-1, 1), (0, 0)])
def test_what_makes_no_sense_is_refused(allowed: int, memory: int) -> None:
    with pytest.raises(ValueError, match=r"(allowed is -1|memory is 0); it must be"):
        Guard(CPU, allowed=allowed, memory=memory)
