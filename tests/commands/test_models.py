"""What `nfnets-xla models` prints about sizes, cost and published accuracy."""

import pytest

from nfnets_xla import list_models
from nfnets_xla.commands.models import card, full_card, main


def test_every_model_has_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list_models()


def test_card_names_size_and_cost() -> None:
    assert "71.49M" in card("nfnet_f0")
    assert "12.38 GMACs at 256 px" in card("nfnet_f0")
    assert "4.00 MMACs at 32 px" in card("nfnet_mini_f0")


def test_the_full_card_has_the_published_numbers() -> None:
    lines = full_card("nfnet_f5")
    assert "377,214,144 with 1000 classes" in lines
    assert "86.0 top-1, 97.6 top-5 (86.3 and 97.9 with SAM)" in lines
    assert "resized to 576, centre cropped" in lines
    assert "289.76 GMACs,   579.51 GFLOPs (2 per MAC)" in lines
    assert "nfnet_f5.dm_in1k" in lines
    plus = full_card("nfnet_f7_plus")
    assert "none are public" in plus
    assert "90.3 top-1 after 8 epochs of JFT-4B" in plus


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("F0", "nfnet_f0"),
        ("mini_f7+", "nfnet_mini_f7_plus"),
        ("dm_nfnet_f0", "nfnet_f0"),
        ("nfnet_f0.dm_in1k", "nfnet_f0"),
    ],
)
def test_a_name_is_taken_as_it_is_for_runs(
    written: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main([written])
    assert capsys.readouterr().out == full_card(name) + "\n"


def test_a_timm_model_is_described_at_its_own_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    main(["timm/convnext_atto", "timm/vit_base_patch14_dinov2.lvd142m"])
    convnext, vit = capsys.readouterr().out.split("timm/vit_base")
    assert "3,695,520 with 1000 classes" in convnext
    assert [line.split()[1] for line in convnext.splitlines() if " px " in line] == ["224", "288"]
    assert "at 518 px" in vit
    assert "none are public" not in convnext + vit


def test_a_name_of_no_model_is_refused_with_those_that_are_near() -> None:
    for written, said in (
        ("plus", "no model matches 'plus': there are nfnet_f0_plus, nfnet_f1_plus"),
        ("resnet50", "there is no model 'resnet50'"),
        ("timm/nothing", "timm has no model 'nothing'"),
        ("nfnet_f0.in1k", r"there is no tag 'in1k'; give nfnet_f0\.dm_in1k"),
    ):
        with pytest.raises(ValueError, match=said):
            main([written])


def test_minis_are_counted_at_the_sizes_of_their_images() -> None:
    """A small ViT is counted at its own sizes, not those of the ViTs for photographs."""
    assert "6.87 MMACs at 32 px" in card("nfnet_mini_f1")
    vit = full_card("vit_mini_d3_4")
    assert " MMACs" in vit
    assert "at  32 px" in vit
    assert "224" not in vit
    assert "224" not in full_card("nfnet_mini_f1")
