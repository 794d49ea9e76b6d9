"""Names, their spellings and their order."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from nfnets_xla import NFNet, create_model, list_models
from nfnets_xla.models import registry
from nfnets_xla.models.names import to_timm
from nfnets_xla.models.registry import canonical_name, count_parameters, create_network
from nfnets_xla.models.variants import VARIANTS
from nfnets_xla.models.weights import save_weights


def test_the_family_is_complete_and_in_natural_order() -> None:
    assert len(list_models("nfnet_f*")) == 16
    assert len(list_models("nfnet_mini_*")) == 16
    assert list_models("nfnet_f?")[-1] == "nfnet_f7"


def test_numbers_sort_as_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "VARIANTS", VARIANTS | {"nfnet_f10": VARIANTS["nfnet_f7"]})
    assert list_models("nfnet_f?*")[-2:] == ["nfnet_f7_plus", "nfnet_f10"]


@pytest.mark.parametrize(
    "written", ["nfnet_f7+", "F7+", "NFNet-F7+", "nfnet_f7_plus", "dm_nfnet_f7+"]
)
def test_spellings_people_use(written: str) -> None:
    assert canonical_name(written) == "nfnet_f7_plus"


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no model 'nfnet_f9'; did you mean nfnet_f"):
        create_model("nfnet_f9")
    with pytest.raises(ValueError, match=r"no model 'resnet50'"):
        create_model("resnet50")


def test_a_name_that_is_suggested_is_taken() -> None:
    with pytest.raises(ValueError, match="did you mean vit_giant_14"):
        create_model("vit_giant14")
    for peer in ("vit_giant_14", "timm/convnext_atto"):
        assert canonical_name(peer) == peer
    with pytest.raises(ValueError, match=r"no public weights of vit_giant_14; leave out \.dm_in1k"):
        create_model("vit_giant_14.dm_in1k")


def test_torchs_current_device_is_taken() -> None:
    with torch.device("meta"):
        net = create_model("nfnet_f7_plus")
        elsewhere = create_model("nfnet_mini_f0", device="cpu")
    assert elsewhere.get_parameter("head.weight").device.type == "cpu"
    assert {parameter.device.type for parameter in net.parameters()} == {"meta"}


def test_options_reach_the_model() -> None:
    net = create_network(
        "nfnet_mini_f0", num_classes=3, in_chans=5, drop_rate=0.1, drop_path_rate=0.12
    )
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    assert shapes["head.weight"] == (3, 2 * 192)
    assert shapes["stem.0.weight"] == (8, 5, 3, 3)
    assert net.drop_rate == 0.1
    assert net.stochastic_depth_rates[-1] == pytest.approx(0.11)


def test_minis_are_the_same_family_at_an_eighth_of_the_width() -> None:
    for name in list_models("nfnet_f*"):
        full, mini = VARIANTS[name], VARIANTS[name.replace("nfnet_", "nfnet_mini_")]
        assert mini.depth == full.depth
        assert mini.width == tuple(width // 8 for width in full.width)
        assert mini.group_width == full.group_width // 8


def test_nothing_is_allocated_on_the_meta_device() -> None:
    net = create_model("nfnet_f7_plus", device="meta", dtype=torch.bfloat16)
    assert {parameter.device.type for parameter in net.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in net.parameters()} == {torch.bfloat16}


def test_weights_for_the_meta_device_are_refused(tmp_path: Path) -> None:
    """Torch copies them to nowhere, silently."""
    net = create_network("nfnet_mini_f0", num_classes=3)
    save_weights(net, tmp_path / "net.safetensors", {})
    options = {"num_classes": 3, "checkpoint_path": tmp_path / "net.safetensors"}
    with pytest.raises(ValueError, match="on the meta device"):
        create_model("nfnet_mini_f0", device="meta", **options)
    with torch.device("meta"), pytest.raises(ValueError, match="nfnet_f0 cannot be loaded"):
        create_model("nfnet_f0", pretrained=True)  # nothing is downloaded


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("nfnet_mini_f0", [8, 32, 64, 192, 192 * 2]),
        ("timm/convnext_atto", [40, 80, 160, 320]),
        ("timm/test_resnet", [32, 48, 192, 96]),
        ("vit_mini_d3_4", [48] * 3),
        ("timm/test_vit", [64] * 4),
    ],
)
def test_without_indices_feature_maps_are_all_or_a_peers_last(
    name: str, channels: list[int]
) -> None:
    maps = create_model(name, features_only=True).eval()
    assert [level.shape[1] for level in maps(torch.randn(1, 3, 64, 64))] == channels


def test_the_first_feature_map_needs_no_more_than_itself() -> None:
    net = create_model("nfnet_mini_f0", features_only=True, out_indices=(0,))
    (level,) = net(torch.randn(1, 3, 32, 32))
    level.sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    whole = create_model("nfnet_mini_f0", features_only=True)
    whole.load_state_dict({**whole.state_dict(), **net.state_dict()})
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(net(images)[0], whole(images)[0])


def test_feature_maps_are_those_asked_for_and_the_rest_is_dropped() -> None:
    images = torch.randn(2, 3, 65, 64)
    torch.manual_seed(0)
    maps = create_model("nfnet_mini_f0", features_only=True, out_indices=(1, 3)).eval()
    torch.manual_seed(0)
    net = create_network("nfnet_mini_f0").eval()
    assert isinstance(net, NFNet)
    last, every = net.forward_intermediates(images)
    assert torch.equal(net.forward_head(last), net(images))
    assert [tuple(map.shape[1:]) for map in every] == [
        (8, 33, 32),
        (32, 17, 16),
        (64, 9, 8),
        (192, 5, 4),
        (384, 3, 2),
    ]
    for place in range(4):
        last, some = net.forward_intermediates(images, [place], stop_early=True)
        assert torch.equal(last, some[0])
        assert torch.equal(some[0], every[place])
    for one, other in zip(maps(images), (every[1], every[3]), strict=True):
        assert torch.equal(one, other)
    assert count_parameters(maps) < count_parameters(net) / 2
    assert maps.feature_info.channels() == [32, 192]  # type: ignore[union-attr,operator]


# ---- public weights, from a cache that looks like the Hub's ------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub that is offline, with weights of a small network cached as timm's dm_nfnet_f0."""
    small = replace(VARIANTS["nfnet_f0"], width=(256, 256, 512, 256), depth=(1, 2, 1, 1))
    monkeypatch.setitem(VARIANTS, "nfnet_f0", small)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    repository = tmp_path / "models--timm--dm_nfnet_f0.dm_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    torch.manual_seed(5)
    net = NFNet(small)
    save_file(
        {name: value.contiguous() for name, value in to_timm(net).items()},
        repository / "snapshots" / "abc" / "model.safetensors",
    )


@pytest.mark.usefixtures("hub")
def test_pretrained_weights_come_from_the_hubs_cache() -> None:
    torch.manual_seed(5)
    expected = NFNet(VARIANTS["nfnet_f0"]).state_dict()
    for name in ("nfnet_f0", "nfnet_f0.dm_in1k", "dm_nfnet_f0.dm_in1k"):
        net = create_network(name, pretrained=True)
        assert all(torch.equal(value, expected[key]) for key, value in net.state_dict().items())
    fine = create_network("nfnet_f0", pretrained=True, num_classes=7).state_dict()
    assert fine["head.weight"].shape == (7, 512)
    assert torch.equal(fine["final_conv.weight"], expected["final_conv.weight"])
    grey = create_network("nfnet_f0", pretrained=True, in_chans=1).state_dict()
    torch.testing.assert_close(
        grey["stem.0.weight"], expected["stem.0.weight"].sum(dim=1, keepdim=True)
    )
    with pytest.raises(
        ValueError, match=r"dm_nfnet_f1\.dm_in1k is neither in the Hugging Face cache"
    ):
        create_network("nfnet_f1", pretrained=True)


@pytest.mark.usefixtures("hub")
def test_timm_finds_the_same_weights_under_our_name() -> None:
    torch.manual_seed(5)
    expected = NFNet(VARIANTS["nfnet_f0"]).state_dict()
    net = timm.create_model("xla_nfnet_f0", pretrained=True, num_classes=3)
    state = net.state_dict()
    assert state["head.weight"].shape == (3, 512)
    body = [name for name in expected if not name.startswith("head.")]
    assert all(torch.equal(state[name], expected[name]) for name in body)
