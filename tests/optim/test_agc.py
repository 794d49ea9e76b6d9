"""Clipping many gradients at once, on its own and in the step: causes, effects, and timm's."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nfnets_xla.models.nfnet import NFNet
from nfnets_xla.models.stacked import stack
from nfnets_xla.models.variants import VARIANTS
from nfnets_xla.optim import SGD_AGC, agc_, by_role, parameter_roles
from nfnets_xla.optim.agc import clip_adaptively, clip_factor, unit_shape, unitwise_norm
from nfnets_xla.optim.ema import EMA
from nfnets_xla.optim.roles import CLASSIFIER_WEIGHT, CONV, LINEAR, STACKED, VECTOR
from tests.optim.network import SETTINGS, an_optimizer, closure_of, small_net

HYPER: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "clipping": 0.02}
PARTLY: dict[str, Any] = HYPER | {"clipping": 0.16}  # clips some filters of a layer and others not


def with_gradients(net: Any, scale: float = 1.0) -> Any:
    """Some units are far above the bound, others below."""
    generator = torch.Generator().manual_seed(2)
    for parameter in net.parameters():
        size = torch.randn(parameter.shape, generator=generator).abs().square()
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.grad = scale * noise * size.reshape(parameter.shape) * 0.02
    return net


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def test_together_they_become_what_each_becomes_alone() -> None:
    net = with_gradients(stack(NFNet(VARIANTS["nfnet_mini_f1"])))  # every role, stacked and not
    roles = parameter_roles(net, "head")
    before, weights = copy.deepcopy(gradients(net)), dict(net.named_parameters())
    shares = agc_(net.named_parameters(), roles)
    assert len({*roles.values()}) >= 7
    seen = set()
    for name, grad in gradients(net).items():
        if roles[name] == CLASSIFIER_WEIGHT:
            assert torch.equal(grad, before[name])
            assert name not in shares
            continue
        stacked = roles[name].startswith(STACKED)
        alone, factor = clip_adaptively(before[name], weights[name], 0.01, 1e-3, stacked=stacked)
        share = (factor < 1).float().mean()
        torch.testing.assert_close(grad, alone, rtol=1e-6, atol=0)
        assert float(shares[name]) == pytest.approx(float(share), abs=1e-6)
        within = unitwise_norm(before[name], stacked=stacked) < 0.0099 * unitwise_norm(
            weights[name], stacked=stacked
        ).clamp(min=1e-3)
        within = within.expand(grad.shape)
        assert torch.equal(grad[within], before[name][within])  # bit for bit
        seen.add((roles[name], float(share) > 0))
    assert {role for role, clipped in seen if clipped} == {*roles.values()} - {CLASSIFIER_WEIGHT}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_fused_step_is_the_one_written_out(
    layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 steps of a network with every role; parameters within 1e-6, for any memory layout."""
    results = []
    for fused_on in (by_role.FUSED_ON, ()):
        monkeypatch.setattr(by_role, "FUSED_ON", fused_on)
        net = small_net().to(memory_format=layout)  # type: ignore[call-overload]
        optimizer = SGD_AGC(net.named_parameters(), parameter_roles(net, "head"), **PARTLY)
        start = {name: 0.01 * torch.ones(p.shape) for name, p in net.named_parameters()}
        optimizer.load_slots({"momentum": start}, updates=0)
        shares = []
        for _ in range(20):
            optimizer.step(closure_of(net))
            assert optimizer.clipped_P is not None
            shares.append(dict(zip(optimizer.clipped_names, optimizer.clipped_P, strict=True)))
        results.append((dict(net.named_parameters()), optimizer.slots()["momentum"], shares))
    for one, other in zip(results[0][:2], results[1][:2], strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)
    assert [{n: float(s) for n, s in step.items()} for step in results[0][2]] == [
        {n: float(s) for n, s in step.items()} for step in results[1][2]
    ]
    assert any(0 < share < 1 for step in results[0][2] for share in step.values())


class Calls(TorchDispatchMode):
    """Counts all of the host's calls, views included: on a GPU a step waits for these."""

    number = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def calls_of_an_update(vectors: int, matrices: int) -> int:
    shapes = {f"v{n}": (5,) for n in range(vectors)} | {f"m{n}": (4, 6) for n in range(matrices)}
    named = {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    roles = {name: VECTOR if name[0] == "v" else LINEAR for name in named}
    sgd, ema = SGD_AGC(named.items(), roles, **HYPER), EMA(named.items(), 0.9)
    with Calls() as calls:
        sgd.step()
        ema.update(0.9)
    return calls.number


def test_vectors_cost_no_calls_of_their_own_and_matrices_three() -> None:
    """Two norms, and the view of their factors. torch's foreach is dispatched once, however many
    tensors there are."""
    few = calls_of_an_update(3, 3)
    assert calls_of_an_update(40, 3) == few
    assert calls_of_an_update(3, 40) == few + 37 * 3


def test_gradients_that_lie_otherwise_than_their_weights() -> None:
    """A kernel that walked through memory would silently mix them up."""
    plain, turned = small_net(), small_net()
    for net, layout in ((plain, torch.contiguous_format), (turned, torch.channels_last)):
        with_gradients(net)
        for parameter in net.parameters():
            if parameter.ndim == 4:
                assert parameter.grad is not None
                parameter.grad = parameter.grad.contiguous(memory_format=layout)
        SGD_AGC(net.named_parameters(), parameter_roles(net, "head"), **HYPER).step()
    for one, other in zip(plain.parameters(), turned.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", SETTINGS)
def test_state_that_lies_otherwise_than_its_weights(name: str) -> None:
    """Saved from a network in another layout; or the network's layout is changed later."""
    net, turned = small_net(), small_net().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer, fresh = (
        an_optimizer(name, n, parameter_roles(n, "head"), lr=0.1) for n in (net, turned)
    )
    optimizer.step(closure_of(net))
    turned.load_state_dict(net.state_dict())
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        optimizer.step(closure_of(net))
        fresh.step(closure_of(turned))
        for one, other in zip(net.parameters(), turned.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        turned.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def test_before_another_optimizer() -> None:
    net = with_gradients(small_net(), scale=1000)
    shares = agc_(net.named_parameters(), parameter_roles(net, "head"), clipping=0.5)
    assert all(float(share) == 1 for name, share in shares.items() if name != "head.weight")
    for name, grad in gradients(net).items():
        if name != "head.weight":
            bound = 0.5 * unitwise_norm(net.get_parameter(name).detach()).clamp(min=1e-3)
            torch.testing.assert_close(unitwise_norm(grad), bound, rtol=1e-5, atol=0)
    torch.optim.AdamW(net.parameters()).step()


def vector(value: float, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """A vector parameter whose gradient is ones."""
    parameter = nn.Parameter(torch.full((3,), value, dtype=dtype))
    parameter.grad = torch.ones_like(parameter)
    return parameter


@pytest.mark.parametrize("fused_on", [by_role.FUSED_ON, ()])
def test_zeros_are_clipped_as_if_eps_were_their_norm(
    fused_on: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_role, "FUSED_ON", fused_on)
    alone, stepped = vector(0.0), vector(0.0)
    agc_([("w", alone)], {"w": VECTOR}, clipping=0.5, eps=0.2)
    assert alone.grad is not None
    assert float(alone.grad.norm()) == pytest.approx(0.5 * 0.2)
    hyper: dict[str, Any] = {"lr": 1.0, "momentum": 0.0, "clipping": 0.5, "clipping_eps": 0.2}
    SGD_AGC([("w", stepped)], {"w": VECTOR}, **hyper).step()
    assert float(stepped.detach().norm()) == pytest.approx(0.5 * 0.2)


def test_a_gradient_of_nearly_nothing_counts_as_deepminds_floor() -> None:
    """1e-6: a bound of 1e-7 is a tenth of it, however much smaller the gradient is."""
    factor = clip_factor(torch.tensor(5e-7), torch.tensor(0.0), 1e-4, 1e-3)
    assert float(factor) == pytest.approx(0.1)
    within = clip_factor(torch.tensor(5e-8), torch.tensor(0.0), 1e-4, 1e-3)
    assert float(within) == 1  # below the floor, but also below the bound


def test_parameters_of_two_types_are_each_clipped_in_their_own() -> None:
    named = [(str(dtype), vector(1.0, dtype)) for dtype in (torch.float32, torch.float64)]
    shares = agc_(named, dict.fromkeys(dict(named), VECTOR))
    assert [str(share.dtype) for share in shares.values()] == [*shares]


def test_norms_of_float16_do_not_overflow() -> None:
    """Above 65,504 they were infinite, and the gradient was multiplied by 0."""
    weight = torch.randn(64, 512, 3, 3) * 0.02
    grad = torch.randn_like(weight) * 1024
    clipped = {}
    for dtype in (torch.float32, torch.float16):
        parameter = nn.Parameter(weight.to(dtype))
        parameter.grad = grad.to(dtype, copy=True)
        (share,) = agc_([("w", parameter)], {"w": CONV}).values()
        assert float(share) == 1
        clipped[dtype] = parameter.grad.float()
    torch.testing.assert_close(clipped[torch.float16], clipped[torch.float32], rtol=3e-3, atol=1e-7)


def test_parameters_without_elements_are_left_out() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 1, 3, bias=False))
    net[1].weight = nn.Parameter(torch.empty(0, 4, 3, 3))
    roles = parameter_roles(net, classifier=None)
    optimizer = SGD_AGC(net.named_parameters(), roles, **HYPER)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert [*agc_(net.named_parameters(), roles)] == ["0.weight", "0.bias"]
    optimizer.step()
    assert optimizer.clipped_names == ["0.weight", "0.bias"]
    assert optimizer.clipped_P is not None
    assert optimizer.clipped_P.shape == (2,)


def test_parameters_without_gradient_are_left_out() -> None:
    net = with_gradients(small_net())
    net.stem.requires_grad_(False)
    for parameter in net.stem.parameters():
        parameter.grad = None
    before = net.stem.weight.detach().clone()
    optimizer = SGD_AGC(net.named_parameters(), parameter_roles(net, "head"), **HYPER)
    optimizer.step()
    assert torch.equal(net.stem.weight, before)
    assert "stem.weight" not in optimizer.clipped_names
    assert optimizer.clipped_P is not None
    assert len(optimizer.clipped_P) == len(optimizer.clipped_names)


def test_nothing_made_under_a_fake_mode_is_used_outside() -> None:
    def clip() -> None:
        net = torch.nn.Linear(5, 7)
        net(torch.ones(2, 5)).sum().backward()
        agc_(net.named_parameters(), parameter_roles(net, classifier=None))

    for _ in range(2):
        with FakeTensorMode():
            clip()
        clip()


def test_mistakes_are_refused() -> None:
    net = with_gradients(small_net())
    roles = parameter_roles(net, "head")
    for clipping in (0, math.inf):
        with pytest.raises(ValueError, match=f"clipping is {clipping}; it must be greater than 0"):
            agc_(net.named_parameters(), roles, clipping=clipping)
    del roles["gain"]
    with pytest.raises(ValueError, match="'gain' has no role"):
        agc_(net.named_parameters(), roles)


def test_what_timm_clips_otherwise() -> None:
    """Filters are clipped alike; timm clips a layer's gains one by one, where DeepMind has one
    vector (optim.py:446)."""
    ours = NFNet(VARIANTS["nfnet_mini_f0"])
    ours, timms = with_gradients(ours), with_gradients(copy.deepcopy(ours))
    agc_(ours.named_parameters(), parameter_roles(ours, "head"))
    with torch.no_grad():  # timm's gains are (C, 1, 1, 1), so each is a filter of one number
        for name, parameter in timms.named_parameters():
            if name.endswith("gain") and parameter.ndim == 1:
                assert parameter.grad is not None
                grad = parameter.grad[:, None, None, None]
                parameter.data = parameter.data[:, None, None, None]
                parameter.grad = grad
    adaptive_clip_grad([p for n, p in timms.named_parameters() if n != "head.weight"])
    theirs = gradients(timms)
    for name, grad in gradients(ours).items():
        same = torch.allclose(grad, theirs[name].reshape(grad.shape), rtol=1e-5, atol=0)
        assert same == (not name.endswith("gain") or grad.ndim == 0), name


def test_a_vision_transformer_is_clipped_by_the_same_rules() -> None:
    net = with_gradients(timm.create_model("test_vit", num_classes=5), scale=1000)
    roles = parameter_roles(net, "head")
    shares = agc_(net.named_parameters(), roles)
    assert {*shares} == {name for name in roles if name != "head.weight"}
    tokens = net.get_parameter("pos_embed")
    assert unit_shape(tokens.shape, stacked=False) == (1,)  # all tokens are one unit
    assert float(shares["pos_embed"]) == 1
    for name in ("blocks.0.attn.qkv.weight", "patch_embed.proj.weight"):
        weight = net.get_parameter(name)
        assert weight.grad is not None
        bound = 0.01 * unitwise_norm(weight.detach()).clamp(min=1e-3)
        assert bool((unitwise_norm(weight.grad) <= bound * 1.00001).all())
