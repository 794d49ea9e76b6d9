"""`nfnets-xla convert`: round trips through all naming schemes; nothing is written by mistake."""

import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nfnets_xla.cli import main
from nfnets_xla.models.formats import read_metadata
from nfnets_xla.models.names import to_haiku, to_timm
from nfnets_xla.models.nfnet import NFNet
from nfnets_xla.models.variants import VARIANTS


@pytest.fixture
def net() -> NFNet:
    torch.manual_seed(0)
    return NFNet(VARIANTS["nfnet_mini_f0"], num_classes=7, in_chans=4)


@pytest.mark.parametrize("to", ["timm", "haiku"])
def test_there_and_back(
    net: NFNet, to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(net.state_dict(), tmp_path / "ours.pth")
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    main(["convert", f"{tmp_path}/ours.pth", str(there), "--model", "mini_f0", "--to", to])
    assert "nfnet_mini_f0, 7 classes" in capsys.readouterr().out
    theirs = load_file(there)
    expected = to_timm(net) if to == "timm" else to_haiku(net)
    assert theirs.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(theirs[name].numpy(), np.asarray(value))
    main(["convert", str(there), str(back), "--model", "nfnet_mini_f0"])
    state = load_file(back)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    about = read_metadata(back)
    assert (about["provenance"], about["names"], about["in_chans"]) == ("ours.pth", "ours", "4")


def test_mistakes_are_one_line_and_write_nothing(
    net: NFNet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "ours.pth", tmp_path / "out.safetensors"
    torch.save(net.state_dict(), source)
    (tmp_path / "taken.safetensors").write_text("precious")
    (folder := tmp_path / "folder.safetensors").mkdir()
    given = [str(source), str(target), "--model", "nfnet_mini_f0"]
    for arguments, message in (
        ([*given[:3], "nfnet_mini_f1"], "of another model"),
        ([*given[:3], "nfnet_f9"], "no model 'nfnet_f9'"),
        ([*given[:3], "vit_mini_d3_4"], "vit_mini_d3_4; it must be an NFNet"),
        ([str(source), str(tmp_path / "taken.safetensors"), *given[2:]], "give --force"),
        ([str(source), str(tmp_path / "out.npz"), *given[2:]], "has to end in .safetensors"),
        ([str(source), str(folder), *given[2:], "--force"], "is a folder"),
        ([str(source), str(tmp_path / "no" / "out.safetensors"), *given[2:]], "is not a folder"),
        ([str(tmp_path / "none"), *given[1:]], "there is no weights file"),
        ([*given, "--to", "jax"], "invalid choice: 'jax'"),
        (given[:2], "--model"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["convert", *arguments])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    there = {"folder.safetensors", "ours.pth", "taken.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == there
    assert (tmp_path / "taken.safetensors").read_text() == "precious"
    main(
        [
            "convert",
            str(source),
            str(tmp_path / "taken.safetensors"),
            "--model",
            "mini_f0",
            "--force",
        ]
    )
    assert load_file(tmp_path / "taken.safetensors").keys() == net.state_dict().keys()


def test_a_full_disk_leaves_what_there_was(
    net: NFNet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If files may not grow, safetensors' error is neither OSError nor ValueError."""
    torch.save(net.state_dict(), tmp_path / "ours.pth")
    target = tmp_path / "weights.safetensors"
    target.write_bytes(b"of another day")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(SystemExit) as exit:
            main(["convert", f"{tmp_path}/ours.pth", str(target), "--model", "mini_f0", "--force"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert exit.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"nfnets-xla: {target} could not be written: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours.pth", target.name]
    assert target.read_bytes() == b"of another day"
