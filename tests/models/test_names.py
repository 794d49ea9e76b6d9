"""Names and layouts: between ours, DeepMind's and timm's, both ways, with the same logits."""

import numpy as np
import pytest
import timm
import torch
from timm.models.nfnet import NfCfg, NormFreeNet
from torch import Tensor

from nfnets_xla.models.names import (
    classes_in,
    from_haiku,
    from_timm,
    haiku_names,
    in_our_names,
    timm_names,
    to_haiku,
    to_timm,
)
from nfnets_xla.models.nfnet import NFNet
from nfnets_xla.models.registry import count_classes, create_network
from nfnets_xla.models.variants import VARIANTS
from nfnets_xla.models.weights import load_into
from tests.fixtures import deepmind
from tests.models.networks import trained


def test_classes_are_counted_in_anybodys_names() -> None:
    net, headless = trained(num_classes=7), trained(num_classes=0)
    haiku = {name: torch.from_numpy(array) for name, array in to_haiku(net).items()}
    states = (net.state_dict(), to_timm(net), haiku, headless.state_dict())
    assert [*map(classes_in, states)] == [7, 7, 7, 0]
    for peer in ("vit_mini_d3_4", "timm/test_resnet", "timm/test_efficientnet"):
        assert count_classes(peer, create_network(peer, num_classes=7).state_dict()) == 7
    assert count_classes("nfnet_mini_f0", net.state_dict()) == 7


def test_haiku_parameters_survive_the_round_trip() -> None:
    net = deepmind.network()
    given = deepmind.parameters()
    back = to_haiku(net)
    assert back.keys() == given.keys()
    for name, array in given.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_haiku_names_cover_every_parameter_once_and_number_blocks_through() -> None:
    net = NFNet(VARIANTS["nfnet_mini_f0"], num_classes=10)
    names = haiku_names(net)
    assert names.keys() == net.state_dict().keys()
    assert len(set(names.values())) == len(names)
    assert names["stages.0.0.conv0.weight"] == "NFNet.nf_block.conv0.w"
    assert names["stages.1.0.conv_shortcut.gain"] == "NFNet.nf_block_1.conv_shortcut.gain"
    assert names["stages.3.2.squeeze_excite.expand.bias"] == (
        "NFNet.nf_block_11.squeeze_excite.linear_1.b"
    )
    assert names["head.weight"] == "NFNet.linear.w"


def test_layouts_are_hwio_and_io() -> None:
    """Outputs are Haiku's last axis and our first; written without transpose."""
    state = from_haiku(deepmind.network(), deepmind.parameters())
    w_HWIO = deepmind.parameters()["NFNet.stem_conv1.w"]
    w_IO = deepmind.parameters()["NFNet.linear.w"]
    assert state["stem.1.weight"][5, 3, 0, 2] == w_HWIO[0, 2, 3, 5]
    assert state["head.weight"][7, 100] == w_IO[100, 7]


def test_haiku_parameters_of_another_model_are_refused() -> None:
    net, given = deepmind.network(), deepmind.parameters()
    with pytest.raises(ValueError, match=r"lack 'NFNet\.final_conv\.bias' \(3 such names\)"):
        from_haiku(net, {k: v for k, v in given.items() if "final_conv" not in k})
    with pytest.raises(ValueError, match=r"also hold 'NFNet\.extra\.w' \(1 such names\)"):
        from_haiku(net, {**given, "NFNet.extra.w": np.zeros(1)})


def as_timm(net: NFNet) -> NormFreeNet:
    """timm's network of the same shape, with `net`'s weights."""
    variant = net.variant
    config = NfCfg(
        depths=variant.depth,
        channels=variant.width,
        stem_type="deep_quad",
        stem_chs=variant.width[0] // 2,
        group_size=variant.group_width,
        bottle_ratio=0.5,
        extra_conv=True,
        num_features=net.num_features,
        reg=False,
        act_layer="gelu",
        same_padding=True,
        skipinit=True,
        gamma_in_act=True,
        attn_layer="se",
        attn_kwargs={"rd_ratio": 0.5},
    )
    theirs = NormFreeNet(config, num_classes=net.num_classes).eval()
    theirs.load_state_dict(to_timm(net))
    return theirs


def pair(**options: str) -> tuple[NFNet, NormFreeNet]:
    """A network and timm's, with widths that timm's stem allows: 16, 32, 64 and half of the first
    stage's."""
    torch.manual_seed(0)
    net = deepmind.network(**options).eval()
    return net, as_timm(net)


@torch.no_grad()
def test_timms_numerics_are_had_by_asking() -> None:
    """With timm's GELU and eps the logits are timm's to 1e-5 of the largest; otherwise to 1.2 %."""
    images = torch.from_numpy(deepmind.ARRAYS["x_NHWC"]).permute(0, 3, 1, 2)
    net, theirs = pair(gelu="erf", eps_mode="add")
    assert relative(net(images), theirs(images)) < 1e-5
    net, theirs = pair()
    assert 1e-3 < relative(net(images), theirs(images)) < 0.012


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_timms_weights_come_and_go_unchanged() -> None:
    net, theirs = pair()
    state = theirs.state_dict()
    assert to_timm(net).keys() == state.keys() == set(timm_names(net).values())
    other = deepmind.network()
    for parameter in other.parameters():
        parameter.data.zero_()
    assert not load_into(other, state, source="timm")
    for name, value in net.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("name", ["nfnet_f0", "nfnet_f3", "nfnet_f6"])
def test_names_and_shapes_are_those_of_timms_full_models(name: str) -> None:
    with torch.device("meta"):
        state = timm.create_model(f"dm_{name}").state_dict()
        net = NFNet(VARIANTS[name])
    ours = from_timm(net, state)
    assert {key: value.shape for key, value in ours.items()} == {
        key: value.shape for key, value in net.state_dict().items()
    }


def test_timms_own_nfnet_is_refused_with_the_reason() -> None:
    with torch.device("meta"):
        state = timm.create_model("nfnet_f0").state_dict()
    with pytest.raises(ValueError, match="x: it holds timm's own nfnet, a different network"):
        in_our_names(trained(), state, "x")


def test_a_classifier_may_be_missing_or_of_another_size() -> None:
    net = deepmind.network()
    state = to_timm(net)
    bare = {name: value for name, value in state.items() if not name.startswith("head.")}
    assert from_timm(net, bare).keys() == net.state_dict().keys() - {"head.weight", "head.bias"}
    assert load_into(net, bare, source="timm", allow_new_head=True)
    net.reset_classifier(3)
    with pytest.raises(ValueError, match="a classifier of 10 classes, expected 3"):
        load_into(net, state, source="timm")
