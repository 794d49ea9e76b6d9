"""A stacked network is the same network: outputs, gradients, names, weights, refusals.

Eager, on the CPU, where both forms call the same kernels and agree bit for bit;
tests/test_xla_stacked.py tests XLA's loop.
"""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call
from torch.nn.utils.parametrizations import weight_norm

from nfnets_xla.models.deploy import fuse
from nfnets_xla.models.names import haiku_names, to_haiku
from nfnets_xla.models.nfnet import NFNet
from nfnets_xla.models.stacked import StackedStage, as_in, per_block, stack, unstack
from nfnets_xla.models.variants import VARIANTS
from nfnets_xla.models.weights import load_into

NAME = "nfnet_mini_f0"  # depths 1, 2, 6, 3: two stages have a tail worth stacking


def network(seed: int = 0) -> NFNet:
    """With skip gains that are not 0, so that every parameter has a gradient."""
    torch.manual_seed(seed)
    net = NFNet(VARIANTS[NAME], num_classes=10)
    for name, parameter in net.named_parameters():
        if name.endswith(("skip_gain", "bias")):
            torch.nn.init.uniform_(parameter, 0.1, 0.6)
    return net


def inputs(net: NFNet, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Images, and both masks."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 32, 32, generator=generator).to(dtype)
    keep = torch.rand(4, net.num_blocks, generator=generator) > 0.3
    return images, keep, torch.rand(4, net.num_features, generator=generator) > 0.2


def gradients(net: NFNet, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Gradients of all parameters, under the names of single blocks; and the logits."""
    net.zero_grad()
    logits = net(*inputs(net, dtype))
    logits.square().sum().backward()
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert len(found) == len(list(net.parameters()))
    return {**per_block(found), "logits": logits.detach()}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
def test_outputs_and_gradients_are_the_unrolled_networks_bit_for_bit(
    dtype: torch.dtype, recompute: bool
) -> None:
    net, stacked = network(), stack(network())
    if recompute:
        stacked.set_grad_checkpointing()
    assert_equal(gradients(net, dtype), gradients(stacked, dtype))


def test_recomputation_calls_every_block_of_a_tail() -> None:
    """As in the unrolled form: one call per block, which keeps its input but nothing inside."""
    calls = {"unrolled": 0, "stacked": 0}
    for form, net in (("unrolled", network()), ("stacked", stack(network()))):

        def counting(function, *arguments, form=form):  # type: ignore[no-untyped-def]
            calls[form] += 1
            return function(*arguments)

        net.set_grad_checkpointing(checkpoint=counting)
        net(*inputs(net))
        with torch.no_grad():
            net(*inputs(net))  # nothing to recompute
        assert calls[form] == net.num_blocks


def test_one_parameter_per_role_and_the_same_counts() -> None:
    net, stacked = network(), stack(network())
    assert stacked.get_parameter("stages.2.tail.conv0.gain").shape == (5, 96)
    assert stacked.get_parameter("stages.2.tail.skip_gain").shape == (5,)
    assert not isinstance(stacked.stages[1], StackedStage)  # a tail of one block is not made a loop
    assert len(list(net.parameters())) - len(list(stacked.parameters())) == (4 + 1) * 17
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in stacked.parameters())
    assert net.macs(32) == stacked.macs(32)
    assert {name.replace("tail", "1") for name in stacked.no_weight_decay()} <= (
        net.no_weight_decay()
    )
    assert "stages.2.tail.conv0.gain" in stacked.no_weight_decay()
    assert net.no_weight_decay() == {
        name
        for name, value in per_block(dict(stacked.named_parameters())).items()
        if value.ndim <= 1
    }


def test_state_dicts_have_the_names_of_single_blocks_and_load_into_either_form(
    tmp_path: Path,
) -> None:
    net, stacked = network(0), stack(network(1))
    assert list(stacked.state_dict()) == list(net.state_dict())
    save_file(net.state_dict(), tmp_path / "unrolled.safetensors")
    load_into(stacked, load_file(tmp_path / "unrolled.safetensors"), source="unrolled")
    assert_equal(stacked.state_dict(), net.state_dict())
    save_file(stacked.state_dict(), tmp_path / "stacked.safetensors")
    third = network(2)
    third.load_state_dict(load_file(tmp_path / "stacked.safetensors"))
    assert_equal(gradients(third), gradients(stacked))
    assert haiku_names(stacked) == haiku_names(net)
    assert to_haiku(stacked).keys() == to_haiku(net).keys()


def test_a_name_that_is_missing_is_reported() -> None:
    stacked = stack(network())
    state = stacked.state_dict()
    del state["stages.2.4.conv1.weight"]
    with pytest.raises(RuntimeError, match=r"stages\.2\.tail\.conv1\.weight"):
        stacked.load_state_dict(state)
    with pytest.raises(ValueError, match=r"no 'stages\.2\.4\.conv1\.weight'"):
        as_in(stacked, state)


def test_unstacking_gives_the_network_back() -> None:
    net = network()
    net.stages[2].requires_grad_(False)
    back = unstack(stack(copy.deepcopy(net)))
    assert list(back.state_dict()) == list(net.state_dict())
    assert_equal(back.state_dict(), net.state_dict())
    assert [p.requires_grad for p in back.parameters()] == [
        p.requires_grad for p in net.parameters()
    ]
    assert torch.equal(back(*inputs(net)), net(*inputs(net)))


def test_names_of_one_form_turn_into_the_others_and_back() -> None:
    net, stacked = network(), stack(network())
    named = {name: p.detach() for name, p in net.named_parameters()}
    assert_equal(as_in(net, named), named)
    assert_equal(per_block(named), named)
    in_stack = as_in(stacked, named)
    assert in_stack.keys() == dict(stacked.named_parameters()).keys()
    assert_equal(per_block(in_stack), named)


def test_an_average_of_the_weights_is_evaluated_without_touching_them() -> None:
    net, other = network(0), network(1)
    stacked = stack(network(0))
    average = as_in(stacked, {n: p.detach() for n, p in other.named_parameters()})
    with torch.no_grad():
        assert torch.equal(functional_call(stacked, average, inputs(net)), other(*inputs(net)))
        assert torch.equal(stacked(*inputs(net)), net(*inputs(net)))


def test_a_frozen_tail_passes_gradients_through() -> None:
    net, stacked = network(), stack(network())
    for one in (net, stacked):
        one.stages[2].requires_grad_(False)
        one.zero_grad()
        one(*inputs(net)).square().sum().backward()
    assert torch.equal(_grad(net, "stem.0.weight"), _grad(stacked, "stem.0.weight"))
    assert stacked.get_parameter("stages.2.tail.conv0.weight").grad is None


def test_a_copy_is_a_network_of_its_own() -> None:
    stacked = stack(network())
    copied = copy.deepcopy(stacked)
    with torch.no_grad():
        for parameter in stacked.parameters():
            parameter.zero_()
    assert torch.equal(copied(*inputs(copied)), network()(*inputs(copied)))


def test_in_training_mode_it_draws_its_own_masks() -> None:
    """Both forms draw the same: one mask for the whole network."""
    net, stacked = network(), stack(network())
    images, _, dropout = inputs(net)
    results = []
    for one in (net, stacked):
        torch.manual_seed(3)
        results.append(one(images, None, dropout))
    assert torch.equal(*results)


def test_its_gains_outlive_smaller_dtypes_and_the_meta_device() -> None:
    """They are not in the state dict."""
    plain, net = network().eval(), stack(network()).eval()
    images = inputs(net)[0]
    state = net.state_dict()
    net.bfloat16().float()
    net.load_state_dict(state)
    assert torch.equal(net(images), plain(images))
    with torch.device("meta"):
        empty = stack(NFNet(VARIANTS[NAME], num_classes=10)).eval()
    empty.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(empty(images), plain(images))


def test_its_gains_are_not_rounded_with_its_weights() -> None:
    """They are constants, which an unstacked block uses in float32."""
    plain, net = network().eval().bfloat16(), stack(network()).eval().bfloat16()
    images = inputs(net)[0]
    assert torch.equal(net(images), plain(images))


def test_stacking_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="stage 2 is stacked already; call unstack"):
        stack(stack(network()))


def test_what_a_stack_would_lose_is_refused() -> None:
    partly = network()
    partly.get_submodule("stages.2.3").requires_grad_(False)
    with pytest.raises(ValueError, match="is frozen in some blocks of a stage and not in others"):
        stack(partly)
    hooked = network()
    hooked.get_submodule("stages.2.1.conv0").register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="a block of stage 2 has hooks: stack first"):
        stack(hooked)
    parametrised = network()
    weight_norm(parametrised.get_submodule("stages.2.1.conv0"))
    with pytest.raises(ValueError, match=r"'conv0.weight' of a block is no parameter"):
        stack(parametrised)
    assert not any(module.training for module in stack(network().eval()).modules())


def _grad(net: NFNet, name: str) -> Tensor:
    grad = net.get_parameter(name).grad
    assert grad is not None
    return grad


@torch.no_grad()
def test_it_counts_and_fuses_as_the_same_network() -> None:
    net, stacked = network().eval(), stack(network()).eval()
    assert stacked.macs(32) == net.macs(32)
    images = inputs(net)[0]
    torch.testing.assert_close(fuse(stacked)(images), net(images), atol=1e-5, rtol=1e-4)
    assert isinstance(stacked.stages[2], StackedStage)
