"""The theory of the signal's scaling, seen in measurements; and their plot."""

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from nfnets_xla.cli import main
from nfnets_xla.commands.signal import BlockSignal, open_branches, signals
from nfnets_xla.models.card import write_card
from nfnets_xla.models.nfnet import NFNet
from nfnets_xla.models.variants import ALPHA, VARIANTS
from nfnets_xla.models.weights import save_weights


def measured(name: str) -> list[list[BlockSignal]]:
    """Signal by stage, of a new network with open branches, on noise."""
    torch.manual_seed(0)
    net = NFNet(VARIANTS[name])
    open_branches(net)
    found = signals(net.train(), torch.randn(64, 3, 64, 64))
    assert net.training  # unchanged
    return [[s for s in found if s.name.startswith(f"stages.{n}.")] for n in range(4)]


def test_variance_grows_by_alpha_squared_of_the_branch_and_begins_again_with_each_stage() -> None:
    """Within 15 %: branches of finite width are not quite independent of the shortcut."""
    for name in ("nfnet_mini_f1", "nfnet_mini_f3"):  # whose first stages differ in depth
        stages = measured(name)
        for stage in (stages[1], stages[2]):
            growth = stage[-1].variance - stage[0].variance
            added = ALPHA**2 * sum(block.branch_variance for block in stage[1:])
            assert growth == pytest.approx(added, rel=0.15)
        again = 1 / 4 + ALPHA**2 * stages[1][0].branch_variance  # mean over four pixels
        assert stages[1][0].variance == pytest.approx(again, rel=0.15)
        assert stages[0][0].variance == pytest.approx(1 + ALPHA**2, rel=0.15)
        expected = [block.expected for block in stages[2]]
        assert expected == pytest.approx([1 + ALPHA**2 * (n + 1) for n in range(len(expected))])


def test_a_new_network_adds_nothing_until_its_branches_are_open() -> None:
    net = NFNet(VARIANTS["nfnet_mini_f1"])
    stage = signals(net, torch.randn(8, 3, 64, 64))[2:6]
    assert {block.variance for block in stage[1:]} != {0.0}
    assert len({block.variance for block in stage}) == 1


def test_another_network_is_refused() -> None:
    with pytest.raises(ValueError, match="it must be an unrolled NFNet"):
        signals(timm.create_model("test_vit"), torch.randn(1, 3, 64, 64))


def test_the_command_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "signal.png"
    main(["signal", "nfnet_mini_f0", "--out", str(out), "--batch", "2"])
    printed = capsys.readouterr().out
    assert printed.count("stages.") == 12
    with Image.open(out) as image:
        assert image.size[0] > 1000
    with pytest.raises(SystemExit) as stopped:
        main(["signal", "nfnet_mini_f0", "--out", str(out), "--batch", "0"])
    assert stopped.value.code == 2
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["signal", "local-dir:X", "--out", str(out), "--weights", "R"])
    assert stopped.value.code == 2
    assert "its own weights: leave out --weights R" in capsys.readouterr().err


def test_a_card_is_measured_with_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if its weights' file were given; the branches are not opened."""
    net = NFNet(VARIANTS["nfnet_mini_f0"], num_classes=3)
    for name, parameter in net.named_parameters():
        if name.endswith("skip_gain"):
            torch.nn.init.constant_(parameter, 0.3)
    write_card(net, "nfnet_mini_f0", tmp_path / "card", {}, "a test")
    monkeypatch.chdir(tmp_path)
    small = ["--batch", "2", "--size", "32"]
    main(["signal", f"local-dir:{tmp_path / 'card'}", *small])
    of_card = capsys.readouterr().out.replace("card-signal", "")
    assert (tmp_path / "card-signal.png").is_file()
    file = str(tmp_path / "card" / "model.safetensors")
    main(["signal", "nfnet_mini_f0", "--weights", file, *small])
    assert capsys.readouterr().out.replace("nfnet_mini_f0-signal", "") == of_card
    with pytest.raises(SystemExit, match="2"):
        main(["signal", "nfnet_mini_f0", "--out", "plot"])
    assert "--out is plot; it has to end in .png" in capsys.readouterr().err


def test_the_command_takes_weights_of_any_number_of_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for classes in (3, 0):
        file = tmp_path / f"{classes}.safetensors"
        save_weights(NFNet(VARIANTS["nfnet_mini_f0"], num_classes=classes), file, {})
        command = ["signal", "nfnet_mini_f0", "--weights", str(file), "--batch", "1"]
        main([*command, "--size", "32", "--out", str(tmp_path / "signal.png")])
        assert capsys.readouterr().out.count("stages.") == 12
