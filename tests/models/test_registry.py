"""Names, their spellings and their order."""

import pytest

from nfnets_xla import create_model, list_models
from nfnets_xla.models import registry
from nfnets_xla.models.registry import canonical_name, card, register
from nfnets_xla.models.variants import VARIANTS


def test_the_family_is_complete_and_in_natural_order() -> None:
    assert len(list_models("nfnet_f*")) == 16
    assert len(list_models("nfnet_mini_*")) == 16
    assert list_models("nfnet_f?")[-1] == "nfnet_f7"


def test_numbers_sort_as_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "VARIANTS", dict(VARIANTS))
    register("nfnet_f10", VARIANTS["nfnet_f7"])
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


def test_a_registered_variant_is_built_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "VARIANTS", dict(VARIANTS))
    register("Mine", VARIANTS["nfnet_mini_f1"])
    assert create_model("Mine", num_classes=3).num_blocks == 24
    with pytest.raises(ValueError, match="'Mine' is taken"):
        register("Mine", VARIANTS["nfnet_f0"])


def test_options_reach_the_model() -> None:
    net = create_model(
        "nfnet_mini_f0", num_classes=3, in_chans=5, drop_rate=0.1, drop_path_rate=0.12
    )
    assert net.head.weight.shape == (3, 2 * 192)
    assert net.stem[0].weight.shape == (8, 5, 3, 3)
    assert net.drop_rate == 0.1
    assert net.stochastic_depth_rates[-1] == pytest.approx(0.11)


def test_minis_are_the_same_family_at_an_eighth_of_the_width() -> None:
    for name in list_models("nfnet_f*"):
        full, mini = VARIANTS[name], VARIANTS[name.replace("nfnet_", "nfnet_mini_")]
        assert mini.depth == full.depth
        assert mini.width == tuple(width // 8 for width in full.width)
        assert mini.group_width == full.group_width // 8


def test_card_names_size_and_cost() -> None:
    assert "71.49M" in card("nfnet_f0")
    assert "12.38 GMACs at 256 px" in card("nfnet_f0")
