"""SAM's options against references; perturbed weights are never visible from outside."""

import os
import signal
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from nfnets_xla.optim import SAM, SGD_AGC, parameter_roles
from nfnets_xla.optim.agc import gradient
from tests.optim.network import closure_of, images_and_labels, small_net
from tests.reference.sam import TwoPassSAM

STEPS, ROWS = 12, 6


def double_net() -> nn.Module:
    """In float64, so that a twin agrees to rounding; its skip gain is not 0."""
    net = small_net().double()
    nn.init.constant_(net.skip_gain, 0.5)
    return net


def sgd(net: nn.Module, **options: Any) -> SGD_AGC:
    given = {"lr": 0.3, "weight_decay": 0.01, "clipping": 0.05, **options}
    return SGD_AGC(net.named_parameters(), parameter_roles(net, "head"), **given)


def loss_of(net: nn.Module, rows: slice, step: int = 0) -> Tensor:
    """The loss of some rows, as their share of the batch, with these rows' dropout mask."""
    images, labels = images_and_labels()
    keep = torch.rand(images.shape, generator=torch.Generator().manual_seed(step)) > 0.3
    logits = net((images * keep).double()[rows])
    return F.cross_entropy(logits, labels[rows], reduction="sum") / ROWS


def backward(net: nn.Module, rows: slice, step: int = 0) -> Tensor:
    net.zero_grad()
    loss = loss_of(net, rows, step)
    loss.backward()
    return loss


def assert_close(a: nn.Module, b: nn.Module) -> None:
    for one, other in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("adaptive", [False, True])
def test_it_is_the_usual_two_pass_sam(adaptive: bool) -> None:
    """Around clipping, decay and momentum; the same masks in both passes."""
    net, twin = double_net(), double_net()
    rho = 0.5 if adaptive else 0.05
    ours = SAM(sgd(net), rho=rho, adaptive=adaptive)
    theirs = TwoPassSAM(sgd(twin), rho, adaptive)
    for step in range(STEPS):
        ours.step(lambda step=step: backward(net, slice(None), step))
        backward(twin, slice(None), step)
        theirs.first_step()
        backward(twin, slice(None), step)
        theirs.second_step()
    assert_close(net, twin)
    plain = double_net()
    optimizer = sgd(plain)
    for step in range(STEPS):
        optimizer.step(lambda step=step: backward(plain, slice(None), step))
    assert not torch.allclose(plain.head.weight, net.head.weight, rtol=1e-3)  # type: ignore[union-attr, arg-type]


def test_an_adaptive_ascent_is_of_length_rho_relative_to_the_weights() -> None:
    """|e / |w|| = rho over the weights that are not 0; zero weights stay zero."""
    net = double_net()
    nn.init.zeros_(net.gate.bias)  # type: ignore[union-attr, arg-type]
    optimizer = SAM(sgd(net), rho=0.7, adaptive=True)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    ratios: list[Tensor] = []

    def closure() -> Tensor:
        if not optimizer.ascending:
            for now, was in zip(net.parameters(), before, strict=True):
                assert torch.equal(now[was == 0], was[was == 0])
                ratios.append(((now - was) / was)[was != 0].flatten().detach())
        return backward(net, slice(None))

    optimizer.step(closure)
    torch.testing.assert_close(torch.cat(ratios).norm(), torch.tensor(0.7).double())


def test_each_microbatch_ascends_by_itself() -> None:
    """m-sharpness, written out: each part has its own e, and the gradients at w + e are added."""
    net, twin = double_net(), double_net()
    ours, theirs = SAM(sgd(net), rho=0.05, microbatches=3), sgd(twin)
    for step in range(STEPS):
        calls: list[tuple[int, bool]] = []

        def closure(step: int = step, calls: list = calls) -> Tensor:
            calls.append((ours.microbatch, ours.ascending))
            return backward(net, slice(2 * ours.microbatch, 2 * ours.microbatch + 2), step)

        first = ours.step(closure)
        assert calls == [(part, ascends) for part in range(3) for ascends in (True, False)]

        weights = [parameter.detach().clone() for parameter in twin.parameters()]
        total = [torch.zeros_like(weight) for weight in weights]
        for part in range(3):
            rows = slice(2 * part, 2 * part + 2)
            loss = backward(twin, rows, step)
            if part == 0:
                torch.testing.assert_close(first, loss)
            grads = [parameter.grad.clone() for parameter in twin.parameters()]  # type: ignore[union-attr]
            norm = torch.cat([grad.flatten() for grad in grads]).norm()
            with torch.no_grad():
                for parameter, grad in zip(twin.parameters(), grads, strict=True):
                    parameter.add_(0.05 * grad / norm)
            backward(twin, rows, step)
            with torch.no_grad():
                for parameter, weight, sum_ in zip(twin.parameters(), weights, total, strict=True):
                    sum_ += parameter.grad  # type: ignore[operator]
                    parameter.copy_(weight)
        for parameter, grad in zip(twin.parameters(), total, strict=True):
            parameter.grad = grad
        theirs.step()
    assert_close(net, twin)


def test_gradients_may_live_in_buffers_that_are_written_again() -> None:
    """As in DistributedDataParallel with gradient_as_bucket_view."""
    net, twin = double_net(), double_net()
    buckets = [torch.empty_like(parameter) for parameter in net.parameters()]
    for each in (net, twin):
        sam = SAM(sgd(each), rho=0.05, microbatches=3)

        def closure(each: nn.Module = each, sam: SAM = sam) -> Tensor:
            loss = backward(each, slice(2 * sam.microbatch, 2 * sam.microbatch + 2))
            if each is net:
                for parameter, bucket in zip(net.parameters(), buckets, strict=True):
                    parameter.grad = bucket.copy_(gradient(parameter))
            return loss

        for _ in range(STEPS):
            sam.step(closure)
    assert_close(net, twin)


def test_one_ascent_and_many_are_different() -> None:
    one, three = double_net(), double_net()
    for net, parts in ((one, 1), (three, 3)):
        sam = SAM(sgd(net), rho=0.5, microbatches=parts)
        size = ROWS // parts
        sam.step(
            lambda sam=sam, net=net, size=size: backward(
                net, slice(size * sam.microbatch, size * (sam.microbatch + 1))
            )
        )
    difference = max(
        float((a - b).detach().abs().max())
        for a, b in zip(one.parameters(), three.parameters(), strict=True)
    )
    assert difference > 1e-5


def test_a_signal_between_the_passes_saves_the_weights_and_changes_nothing() -> None:
    net, twin = small_net(), small_net()
    sam = SAM(sgd(net), rho=0.05)
    run = closure_of(net)
    saved: list[dict[str, Tensor]] = []
    perturbed: list[bool] = []

    def save(number: int, frame: object) -> None:
        del number, frame
        perturbed.append(not torch.equal(net.stem.weight, small_net().stem.weight))
        with sam.unperturbed():
            saved.append({name: p.detach().clone() for name, p in net.named_parameters()})

    def closure() -> Tensor:
        if not sam.ascending:
            os.kill(os.getpid(), signal.SIGUSR1)
        return run()

    before = signal.signal(signal.SIGUSR1, save)
    try:
        sam.step(closure)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert perturbed == [True]
    for name, parameter in small_net().named_parameters():
        assert torch.equal(saved[0][name], parameter)
    SAM(sgd(twin), rho=0.05).step(closure_of(twin))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize(
    ("gradient", "count", "dtype"), [(1e-6, 4, torch.float32), (1e3, 10_000, torch.float16)]
)
def test_an_ascent_is_of_length_rho_however_small_or_large_the_gradient(
    gradient: float, count: int, dtype: torch.dtype
) -> None:
    """In half precision the norm, 1e5, exceeds that type's range."""
    weight = nn.Parameter(torch.zeros(count, dtype=dtype))
    seen: list[Tensor] = []

    def closure() -> None:
        weight.grad = torch.full_like(weight, gradient)
        seen.append(weight.detach().double())

    SAM(torch.optim.SGD([weight], lr=0.0), rho=0.5).step(closure)
    assert float(seen[1].norm()) == pytest.approx(0.5, rel=1e-3)


def test_outside_a_step_it_says_neither_ascent_nor_microbatch() -> None:
    net = small_net()
    sam = SAM(sgd(net), rho=0.05, microbatches=2)
    sam.step(closure_of(net))
    assert (sam.ascending, sam.microbatch) == (False, 0)

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sam.step(interrupted)
    assert not sam.ascending


def test_a_gradient_scaler_is_refused() -> None:
    """It would unscale only the ascent's gradient: weights went to 640 in one step."""
    net = small_net()
    before = [parameter.detach().clone() for parameter in net.parameters()]
    scaler = GradScaler("cpu", init_scale=65536.0)
    sam, closure = SAM(sgd(net), rho=0.05), closure_of(net)
    closure()
    for parameter in net.parameters():
        assert parameter.grad is not None
        parameter.grad = parameter.grad * 65536
    scaler.scale(torch.ones(()))
    with pytest.raises(ValueError, match="called by a GradScaler"):
        scaler.step(sam, closure)
    assert all(map(torch.equal, net.parameters(), before))


def test_a_parameter_without_a_gradient_is_left_out_alone() -> None:
    """The parameters after it are updated as if it did not exist, also with microbatches."""
    for microbatches in (1, 2):
        nets = small_net(), small_net()
        for net in nets:
            first, *others = net.parameters()
            first.requires_grad_(False)
            given = others if net is nets[0] else [first, *others]
            base = torch.optim.SGD(given, lr=0.1)
            SAM(base, rho=0.05, microbatches=microbatches).step(closure_of(net))
        assert all(map(torch.equal, *(net.parameters() for net in nets)))
        second = [[*net.parameters()][1] for net in (*nets, small_net())]
        assert not torch.equal(second[0], second[2])


def test_no_microbatch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"microbatches is 0; it must be 1"):
        SAM(sgd(small_net()), rho=0.05, microbatches=0)
