"""What the optimizers guarantee: roles, refusals, shared state, restored weights."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nfnets_xla import config
from nfnets_xla.optim import (
    SAM,
    SGD_AGC,
    Guard,
    Schedule,
    agc_,
    choice,
    parameter_roles,
    scaled_peak,
)
from nfnets_xla.optim.agc import clip_adaptively
from tests.optim.network import SETTINGS, SmallNet, an_optimizer, closure_of, small_net


def sgd(net: nn.Module, **options: Any) -> SGD_AGC:
    return SGD_AGC(net.named_parameters(), parameter_roles(net, "head"), **{"lr": 0.5, **options})


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# ---- roles ------------------------------------------------------------------------------------


def test_roles_come_from_the_module_tree() -> None:
    assert parameter_roles(small_net(), "head") == {
        "gain": "vector",
        "skip_gain": "scalar",
        "stem.weight": "conv",
        "stem.bias": "vector",
        "grouped.weight": "conv",
        "grouped.bias": "vector",
        "gate.weight": "linear",
        "gate.bias": "vector",
        "head.weight": "classifier_weight",
        "head.bias": "classifier_bias",
    }
    headless = parameter_roles(small_net(), None)
    assert (headless["head.weight"], headless["head.bias"]) == ("linear", "vector")


def test_a_classifier_that_is_no_linear_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"has a Conv2d there; name an nn\.Linear"):
        parameter_roles(small_net(), "stem")
    with pytest.raises(ValueError, match="its last is 'head'"):
        parameter_roles(small_net(), "fc")


def test_parameters_without_names_are_refused() -> None:
    net = small_net()
    roles: Any = parameter_roles(net, "head")
    unnamed: Any = net.parameters()
    with pytest.raises(ValueError, match=r"give module\.named_parameters\(\), not module\.param"):
        SGD_AGC(unnamed, roles, lr=0.1)
    with pytest.raises(ValueError, match=r"give module\.named_parameters\(\), not module\.param"):
        agc_(unnamed, roles)


def test_flattened_weights_have_no_role() -> None:
    """Each shard of a filter bank would count as one unit."""
    net = small_net()
    net.grouped.weight = nn.Parameter(net.grouped.weight.detach().flatten()[:99])
    with pytest.raises(ValueError, match=r"'grouped.weight' of a Conv2d has shape \(99,\)"):
        parameter_roles(net, "head")
    with pytest.raises(ValueError, match=r"of a Linear has shape .* it is sharded or flattened"):
        parameter_roles(nn.Sequential(flat_linear()), None)


def flat_linear() -> nn.Linear:
    linear = nn.Linear(2, 3)
    linear.weight = nn.Parameter(torch.zeros(6))
    return linear


def test_a_recipe_can_name_every_optimizer() -> None:
    assert choice.OPTIMIZERS.keys() == config.OPTIMIZERS.keys()


def test_every_optimizer_is_tested_with_all_its_settings() -> None:
    common = {"momentum", "weight_decay", "clipping"}
    given = {name: settings.keys() - common for name, settings in SETTINGS.items()}
    assert given == {name: own.keys() for name, own in config.OPTIMIZERS.items()}


# ---- SGD_AGC ----------------------------------------------------------------------------------


def test_clipping_is_invariant_to_a_common_scale() -> None:
    """By a power of two, so that the only inexact steps scale exactly, too."""
    generator = torch.Generator().manual_seed(0)
    weight, grad = (torch.randn(4, 3, 3, 3, generator=generator) for _ in range(2))
    clipped, _ = clip_adaptively(grad, weight, 0.01, 1e-3)
    assert torch.equal(clip_adaptively(8 * grad, 8 * weight, 0.01, 1e-3)[0], 8 * clipped)
    # A clipped unit does not depend on the length of its gradient.
    torch.testing.assert_close(clip_adaptively(1000 * grad, weight, 0.01, 1e-3)[0], clipped)


def test_a_float32_one_element_rate_gives_the_floats_bits() -> None:
    net, twin = small_net(), small_net()
    ours, theirs = sgd(net), sgd(twin)
    for lr in (0.0, 0.3, 1.0, 0.1):
        ours.set_lr(lr)
        theirs.set_lr(torch.tensor([lr]))
        ours.step(closure_of(net))
        theirs.step(closure_of(twin))
    assert equal(net, twin)
    assert not equal(net, small_net())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, r"lr is -0\.1"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": torch.tensor(0.1)}, r"lr is a tensor of shape \(\)"),
        ({"lr": torch.tensor([0.1], dtype=torch.float64)}, r"torch\.float64"),
        ({"lr": float("inf")}, "lr is inf"),
        ({"weight_decay": -1.0}, r"weight_decay is -1\.0"),
        ({"weight_decay": float("inf")}, "weight_decay is inf"),
        ({"clipping_eps": 0.0}, r"eps is 0\.0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sgd(small_net(), **options)


def test_parameters_that_do_not_match_their_roles_are_refused() -> None:
    net = small_net()
    named: list[tuple[str, Tensor]] = list(net.named_parameters())
    roles = parameter_roles(net, "head")
    name, parameter = named[0]
    cases: list[tuple[list[tuple[str, Tensor]], dict[str, str], str]] = [
        ([*named, named[0]], roles, "'gain' is given twice"),
        ([*named, ("again", parameter)], {**roles, "again": "vector"}, "are one tensor"),
        ([*named, ("new", torch.ones(2))], roles, "roles differ in new"),
        (named, {**roles, name: "matrix"}, "role of 'gain' is 'matrix'; it must be one of"),
        ([("w", torch.ones(2).bfloat16())], {"w": "vector"}, "must be torch.float32"),
        ([], {}, "no parameters"),
    ]
    for given, their_roles, message in cases:
        with pytest.raises(ValueError, match=message):
            SGD_AGC(given, their_roles, lr=0.1)


def test_momentum_of_another_shape_changes_nothing() -> None:
    optimizer = sgd(small_net())
    buffers = {name: torch.ones_like(b) for name, b in optimizer.slots()["momentum"].items()}
    with pytest.raises(
        ValueError, match=r"'head.bias' has shape \(2,\), the parameter here \(5,\)"
    ):
        optimizer.load_slots({"momentum": {**buffers, "head.bias": torch.ones(2)}}, updates=0)
    assert not any(buffer.any() for buffer in optimizer.slots()["momentum"].values())


def test_state_comes_in_the_parameters_dtype_and_of_these_parameters_only() -> None:
    optimizer = sgd(small_net())
    own = optimizer.slots()["momentum"]
    optimizer.load_slots({"momentum": {name: b.double() + 1 for name, b in own.items()}}, updates=0)
    now = optimizer.slots()["momentum"]
    assert all(torch.equal(now[name], own[name] + 1) for name in own)  # both of dtype float32
    for given, message in (
        ({**own, "more": own["gain"]}, "that of 'more' has no parameter here"),
        ({name: b for name, b in own.items() if name != "gain"}, "that of 'gain' is missing here"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_slots({"momentum": given}, updates=0)


def test_a_state_dict_without_names_is_taken() -> None:
    """Names are only used in messages; torch before 2.6 had none."""
    state = sgd(small_net(), lr=0.25).state_dict()
    for group in state["param_groups"]:
        del group["param_names"]
    net = small_net()
    optimizer = sgd(net)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.25
    optimizer.step(closure_of(net))
    assert optimizer.clipped_names[0] in dict(net.named_parameters())


def test_a_scheduler_of_torchs_does_not_make_it_another_optimizer() -> None:
    """It adds an initial_lr to the groups, which a state saved without it lacks."""
    net = small_net()
    state, optimizer = sgd(net, lr=0.25).state_dict(), sgd(net)
    torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("through", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("around", [lambda it: it, lambda it: SAM(it, rho=0.05)])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_copy_goes_on_as_the_original_does(
    name: str, around: Callable[[Any], Any], through: Callable[[Any], Any]
) -> None:
    """When copied with its network; copied alone it has its own weights, as torch's have."""
    net, guard = small_net(), Guard(torch.device("cpu"), allowed=1)
    optimizer = around(an_optimizer(name, net, parameter_roles(net, "head"), lr=0.1, guard=guard))
    optimizer.step(closure_of(net))
    twin, its_copy = through((net, optimizer))
    its_copy.step(closure_of(twin))
    assert not equal(net, twin)
    optimizer.step(closure_of(net))
    assert equal(net, twin)
    base = getattr(its_copy, "base_optimizer", its_copy)
    base.load_state_dict(optimizer.state_dict())
    assert its_copy.state is base.state
    assert base.guard is not guard


# ---- SAM --------------------------------------------------------------------------------------


@pytest.mark.parametrize("around", [lambda o: o, lambda o: SAM(o, rho=0.1)])
def test_no_group_can_be_added(around: Callable[..., torch.optim.Optimizer]) -> None:
    """Its parameters would have no role and no slots. torch.optim.SGD allows it, in SAM too."""
    extra = {"params": [("extra", nn.Parameter(torch.zeros(2)))]}
    with pytest.raises(ValueError, match="groups of SGD_AGC follow from its parameters' roles"):
        around(copy.deepcopy(sgd(small_net()))).add_param_group(extra)
    plain = around(torch.optim.SGD(small_net().parameters(), lr=0.1))
    plain.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert len(plain.param_groups) == 2


@pytest.mark.parametrize("to", [torch.float64, torch.bfloat16])
def test_a_network_converted_afterwards_is_refused(to: torch.dtype) -> None:
    net = small_net()
    optimizer = SGD_AGC(net.named_parameters(), parameter_roles(net, "head"), lr=0.1)
    net.to(to)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = net.head.weight.detach().clone()
    with pytest.raises(
        ValueError, match=f"is {to} and was torch.float32 when its SGD_AGC was made"
    ):
        optimizer.step()
    assert torch.equal(net.head.weight, before)


def test_an_empty_state_dict_is_refused() -> None:
    net = small_net()
    optimizer = SGD_AGC(net.named_parameters(), parameter_roles(net, "head"), lr=0.1)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})


def test_a_state_dict_of_another_optimizer_is_refused() -> None:
    net = small_net()
    theirs = torch.optim.SGD(net.parameters(), lr=0.1).state_dict()
    with pytest.raises(ValueError, match="the state has no 'clipping', which SGD_AGC needs"):
        sgd(net).load_state_dict(theirs)
    without = sgd(net).state_dict()
    without["state"] = {}
    with pytest.raises(ValueError, match="the state has no 'momentum', which SGD_AGC needs"):
        sgd(net).load_state_dict(without)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(("theirs", "ours"), [(7, 3), (3, 7), (1, 3)])
def test_state_of_another_shape_is_refused_and_changes_nothing(
    name: str, theirs: int, ours: int
) -> None:
    """A new head with the state of the old one: torch's fused kernel would write out of bounds."""
    nets = [small_net() for _ in range(2)]
    for net, classes in zip(nets, (theirs, ours), strict=True):
        net.head = nn.Linear(net.head.in_features, classes)
    one, other = (an_optimizer(name, net, parameter_roles(net, "head"), lr=0.1) for net in nets)
    before = copy.deepcopy(other.state_dict())
    slot = other.SLOTS[0]
    with pytest.raises(
        ValueError,
        match=rf"{slot} of another model: that of 'head.bias' has shape \({theirs},\), the p",
    ):
        other.load_state_dict(one.state_dict())
    torch.testing.assert_close(other.state_dict()["state"], before["state"], rtol=0, atol=0)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("around", [lambda o: o, lambda o: SAM(o, rho=0.1)])
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, about its hooks around a step
def test_what_contains_a_step_can_be_compiled(
    name: str, around: Callable[..., torch.optim.Optimizer]
) -> None:
    nets = small_net(), small_net()
    for net, backend in zip(nets, (None, "eager"), strict=True):
        step = around(an_optimizer(name, net, parameter_roles(net, "head"), lr=0.1)).step
        closure = closure_of(net)
        update: Callable[..., Any] = lambda step=step, closure=closure: step(closure)  # noqa: E731
        if backend:
            update = torch.compile(update, backend=backend)
        for _ in range(2):
            update()
    assert equal(*nets)


def test_both_objects_keep_one_state_whichever_loads_it() -> None:
    for load_into in (lambda sam: sam, lambda sam: sam.base_optimizer):
        sam = SAM(sgd(small_net()), rho=0.05)
        load_into(sam).load_state_dict(sgd(small_net(), lr=0.25).state_dict())
        assert sam.param_groups is sam.base_optimizer.param_groups
        assert sam.state is sam.base_optimizer.state
        assert sam.param_groups[0]["lr"] == 0.25


def test_hooks_fire_once_a_step() -> None:
    net = small_net()
    sam = SAM(sgd(net), rho=0.05)
    calls: list[str] = []
    sam.register_step_pre_hook(lambda *_: calls.append("before"))
    sam.register_step_post_hook(lambda *_: calls.append("after"))
    sam.step(closure_of(net))
    assert calls == ["before", "after"]


def test_an_error_in_the_second_pass_leaves_the_weights_as_they_were() -> None:
    net = small_net()
    run, passes = closure_of(net), iter(range(2))

    def closure() -> Tensor:
        if next(passes) == 1:
            assert not equal(net, small_net())
            raise KeyboardInterrupt
        return run()

    with pytest.raises(KeyboardInterrupt):
        SAM(sgd(net), rho=0.05).step(closure)
    assert equal(net, small_net())


def test_a_one_element_rho_gives_the_floats_bits() -> None:
    net, twin = small_net(), small_net()
    SAM(sgd(net), rho=0.05).step(closure_of(net))
    SAM(sgd(twin), rho=torch.tensor([0.05])).step(closure_of(twin))
    assert equal(net, twin)


def test_a_closure_without_backward_is_refused() -> None:
    net: SmallNet = small_net()
    forward_only: Callable[[], Tensor] = lambda: net.gain.sum()  # noqa: E731
    with pytest.raises(ValueError, match="must call backward"):
        SAM(sgd(net), rho=0.05).step(forward_only)


# ---- schedule ---------------------------------------------------------------------------------


def test_peak_follows_the_batch() -> None:
    assert scaled_peak(4096) == 1.6
    assert scaled_peak(512, base=0.5) == 1.0
    with pytest.raises(ValueError, match="batch_size is 0"):
        scaled_peak(0)


def test_steps_outside_the_run_are_refused() -> None:
    for step in (-1, 7):
        with pytest.raises(ValueError, match=f"step is {step}; it must be in"):
            Schedule("cosine", 1.0, 2, 6)(step)
    with pytest.raises(ValueError, match="peak is inf"):
        Schedule("cosine", float("inf"), 2, 6)(0)
