"""Our models in timm: all are registered, evaluated as DeepMind does, with timm's own tools."""

import subprocess
import sys
from copy import deepcopy
from typing import Any

import pytest
import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from timm.optim._optim_factory import create_optimizer_v2

import nfnets_xla
from nfnets_xla import NFNet, list_models
from nfnets_xla.models.stacked import stack
from nfnets_xla.models.variants import VARIANTS

create: Any = timm.create_model  # timm types its models as bare modules

OURS = [f"xla_{name}" for name in VARIANTS]


def test_all_models_are_there() -> None:
    assert set(OURS) <= set(timm.list_models("xla_*"))
    public = timm.list_models("xla_*", pretrained=True)
    assert public == [f"xla_{name}" for name in list_models(pretrained=True)]


@pytest.mark.parametrize(
    "order", ["timm, nfnets_xla", "nfnets_xla, timm", "timm.models, nfnets_xla"]
)
def test_either_may_be_imported_first(order: str) -> None:
    """And importing only ours does not load timm, which takes as long as torch."""
    code = f"import {order}; import timm; assert timm.is_model('xla_nfnet_f7_plus')"
    subprocess.run([sys.executable, "-c", code], check=True)
    alone = "import nfnets_xla, sys; assert 'timm' not in sys.modules"
    subprocess.run([sys.executable, "-c", alone], check=True)


@pytest.mark.parametrize("name", [f"nfnet_f{n}" for n in range(8)])
@pytest.mark.parametrize("test_size", [False, True])
def test_evaluation_resizes_both_sides_to_size_plus_32(name: str, test_size: bool) -> None:
    with torch.device("meta"):
        net = create(f"xla_{name}")
    config = resolve_model_data_config(net, use_test_size=test_size)
    ours = nfnets_xla.create_model(name, device="meta")
    assert resolve_model_data_config(ours, use_test_size=test_size) == config
    transform: Any = create_transform(**config)
    resize, crop = transform.transforms[:2]
    size = VARIANTS[name].test_size if test_size else VARIANTS[name].train_size
    assert tuple(resize.size) == (size + 32, size + 32)
    assert tuple(crop.size) == (size, size)
    assert resize.interpolation.value == "bicubic"
    assert config["mean"] == (0.485, 0.456, 0.406)


# ---- what timm's own tests ask of a model -----------------------------------------------------


@pytest.mark.parametrize("name", ["xla_nfnet_mini_f0", "xla_nfnet_mini_f0_plus"])
def test_the_model_keeps_timms_contract(name: str) -> None:
    images = torch.randn(2, 3, 32, 32)
    net = create(name).eval()
    cfg = net.pretrained_cfg
    state = net.state_dict()
    assert f"{cfg['classifier']}.weight" in state
    assert f"{cfg['first_conv']}.weight" in state
    assert net(images).shape == (2, 1000)
    features = net.forward_features(images)
    assert features.shape[-2:] == cfg["pool_size"]
    assert net.forward_head(features).shape == (2, 1000)
    assert net.forward_head(features, pre_logits=True).shape == (2, net.num_features)
    assert net.get_classifier() is net.head
    net.reset_classifier(0)
    assert net(images).shape == (2, net.num_features)
    net.reset_classifier(0, "")
    assert net(images).shape == features.shape
    net.reset_classifier(7, "avg")
    assert net(images).shape == (2, 7)
    bare = create(name, num_classes=0, global_pool="")
    assert bare(images).shape == features.shape
    assert net.num_features == net.head_hidden_size == net.feature_info[-1]["num_chs"]


def test_every_parameter_gets_a_gradient() -> None:
    net = create("xla_nfnet_mini_f0", num_classes=5, drop_path_rate=0.0).train()
    net(torch.randn(2, 3, 32, 32)).mean().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


def test_features_only_through_timm() -> None:
    net = create("xla_nfnet_mini_f0", features_only=True, out_indices=(0, 2, 4)).eval()
    maps = net(torch.randn(1, 3, 64, 64))
    for map, channels, stride in zip(
        maps, net.feature_info.channels(), net.feature_info.reduction(), strict=True
    ):
        assert map.shape == (1, channels, 64 // stride, 64 // stride)


def test_a_pruned_network_trains() -> None:
    """With its own masks for the remaining blocks, or with given ones."""
    net = create("xla_nfnet_mini_f0").train()
    assert net.prune_intermediate_layers([1, 3]) == [1, 3]
    assert net.num_blocks == len(net.stochastic_depth_rates) == 1 + 2 + 6
    images = torch.randn(2, 3, 64, 64)
    assert net(images).shape == (2, net.num_features, 4, 4)
    keep = torch.ones(2, net.num_blocks)
    assert torch.equal(net(images, keep), net.eval()(images))


def test_recomputing_blocks_gives_the_same_gradients() -> None:
    torch.manual_seed(0)
    net = create("xla_nfnet_mini_f0", num_classes=5).train()
    for name, parameter in net.named_parameters():
        if name.endswith("skip_gain"):
            parameter.data.fill_(0.5)
    images, gradients, saved = torch.randn(2, 3, 32, 32), [], []
    for enable in (False, True):
        net.set_grad_checkpointing(enable)
        net.zero_grad()
        torch.manual_seed(1)  # for stochastic depth and dropout
        kept = 0

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = net(images).square().sum()
        loss.backward()
        saved.append(kept)
        gradients.append([parameter.grad.clone() for parameter in net.parameters()])
    assert saved[1] < saved[0] / 4
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_timms_optimizer_groups_spare_gains_and_see_depth() -> None:
    net = create("xla_nfnet_mini_f0")
    plain = create_optimizer_v2(net, "sgd", lr=0.1, weight_decay=0.1)
    for group in plain.param_groups:
        assert all(
            (parameter.ndim > 1) == (group["weight_decay"] > 0) for parameter in group["params"]
        )
    layered = create_optimizer_v2(net, "sgd", lr=0.1, weight_decay=0.1, layer_decay=0.5)
    scales = {group["lr_scale"] for group in layered.param_groups}
    assert len(scales) == 14  # stem, 12 blocks, and the layers after them
    stacked = create_optimizer_v2(
        stack(deepcopy(net)), "sgd", lr=0.1, weight_decay=0.1, layer_decay=0.5
    )
    scales = {group["lr_scale"] for group in stacked.param_groups}
    assert len(scales) == 9  # the first block of each stage, and of three stages the rest
    assert net.no_weight_decay() == {n for n, p in net.named_parameters() if p.ndim <= 1}


def test_it_is_our_class() -> None:
    assert isinstance(create("xla_nfnet_mini_f0"), NFNet)
    assert nfnets_xla.NFNet is NFNet
