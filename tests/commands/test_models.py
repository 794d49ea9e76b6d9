"""What `nfnets-xla models` says of sizes, cost and published accuracy."""

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


def test_minis_are_counted_at_the_sizes_of_their_images() -> None:
    """A small ViT's sizes are its own, not those of the ViTs for photographs."""
    assert "6.87 MMACs at 32 px" in card("nfnet_mini_f1")
    vit = full_card("vit_mini_d3_4")
    assert " MMACs" in vit
    assert "at  32 px" in vit
    assert "224" not in vit
    assert "224" not in full_card("nfnet_mini_f1")
