"""AdamW: equal to torch's after clipping, in both forms; its count of updates; restored state."""

import io
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from nfnets_xla.optim import AdamW_AGC, Guard, agc_, by_role, parameter_roles
from nfnets_xla.optim.roles import CLASSIFIER_WEIGHT, CONV, LINEAR
from tests.optim.network import closure_of, small_net

DECAYED = (CONV, LINEAR, CLASSIFIER_WEIGHT)
HYPER: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def adamw(net: nn.Module, **options: Any) -> AdamW_AGC:
    given = {**HYPER, **options}
    return AdamW_AGC(net.named_parameters(), parameter_roles(net, "head"), **given)


@pytest.fixture(params=["fused", "apart"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The form for CPU and GPU, and the one that is traced on XLA devices."""
    if request.param == "apart":
        monkeypatch.setattr(by_role, "FUSED_ON", ())


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize(("betas", "steps"), [((0.8, 0.95), 20), ((0.0, 0.95), 2)])
@pytest.mark.parametrize("clipping", [None, 0.05])
def test_it_is_torchs_after_the_clipping(
    clipping: float | None, betas: tuple[float, float], steps: int
) -> None:
    """Within 1e-6, float32; vectors and gains do not decay."""
    ours, theirs = small_net(), small_net()
    roles = parameter_roles(theirs, "head")
    named = dict(theirs.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in named.items() if roles[n] in DECAYED]},
        {"params": [p for n, p in named.items() if roles[n] not in DECAYED], "weight_decay": 0.0},
    ]
    hyper: dict[str, Any] = {**HYPER, "betas": betas}
    reference = torch.optim.AdamW(groups, **hyper)
    optimizer = adamw(ours, clipping=clipping, betas=betas)
    for _ in range(steps):
        optimizer.step(closure_of(ours))
        closure_of(theirs)()
        if clipping is not None:
            agc_(named.items(), roles, clipping=clipping)
        reference.step()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, named[name], rtol=0, atol=1e-6)
    for slot, key in (("first_moment", "exp_avg"), ("second_moment", "exp_avg_sq")):
        for name, moment in optimizer.slots()[slot].items():
            torch.testing.assert_close(moment, reference.state[named[name]][key], rtol=0, atol=1e-6)


@pytest.mark.usefixtures("form")
def test_only_updates_that_were_made_are_counted() -> None:
    """Otherwise the first update after a skipped one would be too small."""
    net, twin = small_net(), small_net()
    guarded, plain = adamw(net, guard=Guard(torch.device("cpu"), allowed=5)), adamw(twin)
    for bad in (True, False, True, True, False):
        closure_of(net)()
        if bad:
            net.head.weight.grad = torch.full_like(net.head.weight, float("nan"))
        guarded.step()
        if not bad:
            plain.step(closure_of(twin))
    guarded.zero_grad()
    guarded.step()  # without gradients there is no update either
    assert guarded.updates_1.tolist() == [2]
    assert_same(net, twin)


@pytest.mark.usefixtures("form")
def test_a_run_goes_on_from_slots_and_the_number_of_updates() -> None:
    net, other = small_net(), small_net()
    optimizer = adamw(net)
    for _ in range(3):
        optimizer.step(closure_of(net))
    other.load_state_dict(net.state_dict())
    fresh = adamw(other)
    fresh.load_slots(optimizer.slots(), updates=3)
    for one, of in ((optimizer, net), (fresh, other)):
        one.step(closure_of(of))
    assert_same(net, other)


@pytest.mark.usefixtures("form")
def test_a_saved_state_dict_holds_the_number_of_updates() -> None:
    net, other = small_net(), small_net()
    optimizer, fresh = adamw(net), adamw(other)
    for _ in range(3):
        optimizer.step(closure_of(net))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(net.state_dict())
    fresh.load_state_dict(torch.load(file))
    for one, of in ((optimizer, net), (fresh, other)):
        one.step(closure_of(of))
    assert_same(net, other)


def test_two_optimizers_of_one_state_count_for_themselves() -> None:
    net = small_net()
    one, two = adamw(net), adamw(small_net())
    two.load_state_dict(one.state_dict())
    one.step(closure_of(net))
    assert (float(one.updates_1), float(two.updates_1)) == (1, 0)


def test_its_defaults_are_torchs() -> None:
    net = small_net()
    ours = AdamW_AGC(net.named_parameters(), parameter_roles(net, "head"), lr=0.1).defaults
    theirs = torch.optim.AdamW(net.parameters()).defaults
    assert all(ours[name] == theirs[name] for name in ("betas", "eps", "weight_decay"))


def test_a_state_dict_without_the_number_of_updates_is_refused() -> None:
    optimizer = adamw(small_net())
    state = optimizer.state_dict()
    del state["state"][0]["updates"]
    with pytest.raises(ValueError, match="the state has no 'updates', which AdamW_AGC needs"):
        optimizer.load_state_dict(state)


def test_torchs_distributed_checkpoints_hold_the_number_of_updates() -> None:
    """They save only what is in the state of a parameter."""
    net, other = small_net(), small_net()
    one, two = adamw(net), adamw(other)
    one.step(closure_of(net))
    saved = deepcopy(get_optimizer_state_dict(net, one))  # otherwise both share the same moments
    other.load_state_dict(net.state_dict())
    set_optimizer_state_dict(other, two, saved)
    assert two.updates_1.tolist() == [1]
    for optimizer, of in ((one, net), (two, other)):
        optimizer.step(closure_of(of))
    assert_same(net, other)


def assert_same(net: nn.Module, other: nn.Module) -> None:
    values: dict[str, Tensor] = dict(other.named_parameters())
    assert all(torch.equal(p, values[name]) for name, p in net.named_parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (1.0, 0.9)}, r"beta1 is 1\.0; it must be in \[0, 1\)"),
        ({"betas": (0.9, -0.1)}, r"beta2 is -0\.1; it must be in \[0, 1\)"),
        ({"eps": 0.0}, r"eps is 0\.0; it must be greater than 0"),
        ({"eps": float("inf")}, r"eps is inf; it must be greater than 0"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adamw(small_net(), **options)


def test_the_state_of_another_optimizer_is_refused() -> None:
    optimizer = adamw(small_net())
    momentum = {"momentum": optimizer.slots()["first_moment"]}
    with pytest.raises(ValueError, match=r"keeps first_moment, second_moment was given momentum"):
        optimizer.load_slots(momentum, updates=0)
