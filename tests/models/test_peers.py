"""Other networks through the same functions: timm's, and the paper's ViTs with published sizes."""

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data.config import resolve_model_data_config

from nfnets_xla import create_model, list_models
from nfnets_xla.commands import embedding
from nfnets_xla.commands.models import card
from nfnets_xla.models.peers import PEERS, VITS, Entry, Peer, create_peer
from nfnets_xla.models.registry import canonical_name, count_parameters, create_network
from nfnets_xla.models.weights import load_into, save_weights
from nfnets_xla.scaling.account import macs_per_image

# Encoder parameters in millions, and GFLOPs (2 per multiply-accumulate) at 224, 384 and 518 px:
# arXiv 2106.04560, Table 2, and arXiv 2305.13035, section 5.
PUBLISHED = {
    "vit_giant_14": (1011, 533.1, 1596.4, 3208),
    "vit_gigantic_14": (1843, 965.3, 2859.9, 5668),
    "sovit_400m_14": (428, 221, 672, 1374),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_papers_vits_have_their_published_sizes(name: str) -> None:
    """Parameters to the printed million. FLOPs to 1 %: the papers do not say how softmax and norms
    count."""
    million, *gflops = PUBLISHED[name]
    with torch.device("meta"):
        net = create_peer(name, num_classes=0)
    assert round(count_parameters(net) / 1e6) == million
    for size, expected in zip((224, 384, 518), gflops, strict=True):
        assert net.flops(size) / 1e9 == pytest.approx(expected, rel=0.01)
        assert net.macs(size) * 2 == net.flops(size)


@pytest.mark.parametrize(
    ("name", "beside", "within"),
    [("vit_mini_d3_4", "nfnet_mini_f1", 0.02), ("vit_mini_d6_4", "nfnet_mini_f3", 0.07)],
)
def test_the_mini_vits_cost_what_nfnets_do(name: str, beside: str, within: float) -> None:
    net = create_network(name, num_classes=200)
    assert net.macs(32) == pytest.approx(macs_per_image(beside, 32, 200), rel=within)
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 200)
    assert set(VITS) == {*PUBLISHED, "vit_mini_d3_4", "vit_mini_d6_4"}


def test_who_adds_a_family_to_the_table_is_through(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def make(*, size: int, **options: Any) -> torch.nn.Module:
        return timm.create_model("convnext_atto", **options)

    monkeypatch.setitem(PEERS, "conv_mini_1", Entry(make, 32, 40))
    assert list_models("conv_*") == ["conv_mini_1"]
    assert canonical_name("conv_mini_1") == "conv_mini_1"
    with pytest.raises(ValueError, match="did you mean conv_mini_1"):
        create_network("conv_mini_2")
    assert card("conv_mini_1").startswith("conv_mini_1 ")
    assert "MMACs at 32 px" in card("conv_mini_1")
    assert "MMACs at 40 px" in card("conv_mini_1")
    net = create_network("conv_mini_1", num_classes=3)
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    save_weights(net, tmp_path / "net.safetensors", {})
    with pytest.raises(ValueError, match="for which size of images conv_mini_1 was made"):
        embedding.load("conv_mini_1", str(tmp_path / "net.safetensors"))


@pytest.mark.parametrize("name", ["timm/test_vit", "timm/test_resnet"])
def test_a_timm_model_answers_as_an_nfnet_does(name: str) -> None:
    torch.manual_seed(0)
    net = create_network(name, num_classes=5, drop_rate=0.5, image_size=64)
    assert isinstance(net, Peer)
    net.eval()
    images = torch.randn(2, 3, 64, 64)
    logits = net(images)
    torch.testing.assert_close(logits, net.net(images))
    ones = torch.ones(2, net.num_features)
    bias = net.get_submodule(net.classifier_name).bias
    doubled = net(images, None, ones) - bias  # inverted dropout of rate 0.5 with nothing dropped
    torch.testing.assert_close(doubled, 2 * (logits - bias), rtol=1e-4, atol=1e-5)
    assert net(images.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(net(images.bfloat16()), logits, atol=0.05, rtol=0.1)
    net.reset_classifier(3)
    assert net(images).shape == (2, 3)
    assert net.num_classes == 3
    assert net.macs(64) > net.macs(32) > 0
    grey = create_network(name, num_classes=3, in_chans=1, image_size=64)
    assert 0 < grey.macs(64) < net.macs(64)
    assert create_network(name, num_classes=3, image_size=64).macs(64) == net.macs(64)


def test_timms_tools_see_through() -> None:
    net = create_network("timm/test_vit")
    assert isinstance(net, Peer)
    assert resolve_model_data_config(net) == resolve_model_data_config(net.net)
    undecayed = {name.removeprefix("net.") for name in net.no_weight_decay()}
    assert undecayed == net.net.no_weight_decay() >= {"pos_embed"}


def test_a_timm_model_runs_in_bfloat16() -> None:
    net = create_model("timm/test_vit", num_classes=5, image_size=64, dtype=torch.bfloat16).eval()
    logits = net(torch.randn(2, 3, 64, 64).bfloat16())
    assert logits.dtype == torch.float32
    net = create_network("timm/test_vit", num_classes=5, image_size=64).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert net(torch.randn(2, 3, 64, 64)).dtype == torch.float32
        inside: list[torch.dtype] = []
        net.get_submodule("net.blocks.0.mlp.fc1").register_forward_hook(
            lambda _module, _inputs, output: inside.append(output.dtype)
        )
        net(torch.randn(2, 3, 64, 64))
    net(torch.randn(2, 3, 64, 64))
    assert inside == [torch.bfloat16, torch.float32]  # as the caller's autocast sets
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", ["timm/test_vit", "vit_mini_d3_4"])
def test_a_peer_can_be_pickled(name: str) -> None:
    net = create_network(name, num_classes=5).eval()
    size = 32 if name in PEERS else 160
    images = torch.randn(1, 3, size, size)
    copy = pickle.loads(pickle.dumps(net))
    assert torch.equal(copy(images), net(images))
    assert copy.macs(64) == net.macs(64)
    torch.save(net, io.BytesIO())


@pytest.mark.parametrize(
    ("name", "head"),
    [("resnetv2_50x1_bit", "Conv2d"), ("deit_tiny_distilled_patch16_224", "tuple")],
)
def test_other_classifiers_are_refused(name: str, head: str) -> None:
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=f"{name} is a {head}, not one nn."),
    ):
        create_network(f"timm/{name}", num_classes=5)


def test_nothing_is_drawn_inside_of_timms_layers() -> None:
    """FocalNet drops paths at a rate of 0.1 by default."""
    net = create_network("timm/focalnet_tiny_srf", num_classes=5).train()
    images = torch.randn(8, 3, 32, 32)
    assert torch.equal(net(images), net(images))
    with pytest.raises(
        ValueError, match=r"drop_path_rate is 0\.1 for timm/test_vit: timm's layers"
    ):
        create_model("timm/test_vit", drop_path_rate=0.1)


def test_feature_maps_of_a_timm_model() -> None:
    maps = create_model("timm/test_resnet", features_only=True, out_indices=(1, 2))
    assert len(maps(torch.randn(1, 3, 64, 64))) == 2


def test_unknown_peers_and_absent_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="timm has no model 'vit_nothing'"):
        create_model("timm/vit_nothing")
    with pytest.raises(ValueError, match="vit_giant_14 has no public weights"):
        create_model("vit_giant_14", pretrained=True, device="meta")
    with pytest.raises(ValueError, match="drop_rate is 2"):
        create_model("timm/test_vit", drop_rate=2)


def test_a_size_that_only_an_evaluation_would_meet_is_refused_at_once() -> None:
    """256 px is not a multiple of patches of 14 px; a convolutional network takes any size."""
    with torch.device("meta"):
        assert create_peer("sovit_400m_14", image_size=224, eval_image_size=252).num_classes
        with pytest.raises(ValueError, match=r"of 224 px does not take 256 px .* multiples of its"):
            create_peer("sovit_400m_14", image_size=224, eval_image_size=256)
    assert create_peer("timm/test_resnet", image_size=64, eval_image_size=75, in_chans=1)
    with pytest.raises(ValueError, match=r"16 px does not take 16 px .*: choose others for data\."):
        create_peer("timm/convnext_atto", image_size=16)  # which has no patches


@pytest.mark.parametrize(
    ("name", "patch"),
    [
        ("vit_mini_d3_4", 4),
        ("timm/test_vit", 16),
        ("timm/test_vit3", 16),
        ("timm/eva02_tiny_patch14_224", 14),
    ],
)
def test_a_vit_takes_weights_that_were_trained_at_another_size(name: str, patch: int) -> None:
    """With and without a class token. The network then equals what timm makes for images of that
    size."""
    torch.manual_seed(0)
    before = create_peer(name, image_size=8 * patch, num_classes=5).eval()
    torch.nn.init.normal_(before.net.pos_embed)
    after = create_peer(name, image_size=10 * patch, num_classes=5).eval()
    state = before.state_dict()
    assert not load_into(after, state, source="there")
    assert after.net.pos_embed.shape[1] - before.net.pos_embed.shape[1] == 100 - 64
    images = torch.randn(2, 3, 10 * patch, 10 * patch)
    torch.testing.assert_close(after(images), before(images))
    assert not torch.equal(after(images), before(images + 0.1))
    assert torch.equal(state["net.pos_embed"], before.net.pos_embed)  # theirs is unchanged

    # Embeddings of images that were not square, or of another width, are refused as before.
    for wrong in (state["net.pos_embed"][:, :-3], state["net.pos_embed"][..., :-1]):
        with pytest.raises(ValueError, match=r"of another model: 'net.pos_embed' is"):
            load_into(after, state | {"net.pos_embed": wrong}, source="there")
