"""Weights files, and DeepMind's names for what they hold."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from nfnets_xla import NFNet, create_model
from nfnets_xla.models.weights import (
    from_haiku,
    haiku_names,
    load_checkpoint,
    load_into,
    to_haiku,
)
from tests.fixtures import deepmind


def mini_f0(num_classes: int) -> NFNet:
    return create_model("nfnet_mini_f0", num_classes=num_classes)


def test_haiku_parameters_survive_the_round_trip() -> None:
    net = deepmind.network()
    given = deepmind.parameters()
    back = to_haiku(net)
    assert back.keys() == given.keys()
    for name, array in given.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_haiku_names_cover_every_parameter_once_and_number_blocks_through() -> None:
    net = mini_f0(10)
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
    """In Haiku's layouts the output is the last axis, here the first; written without transpose."""
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


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_weights_round_trip_through_a_file(tmp_path: Path, suffix: str) -> None:
    net = mini_f0(7)
    path = tmp_path / f"model.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(net.state_dict(), path)
    other = create_model("nfnet_mini_f0", num_classes=7, checkpoint_path=path)
    for name, value in net.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_a_new_head_is_made_only_when_allowed() -> None:
    state = mini_f0(7).state_dict()
    net = mini_f0(5)
    head = net.state_dict()["head.weight"].clone()
    with pytest.raises(ValueError, match="run-x has a classifier of 7 classes, expected 5: give"):
        load_into(net, state, source="run-x")
    assert load_into(net, state, source="run-x", allow_new_head=True)
    assert torch.equal(net.state_dict()["head.weight"], head)
    assert torch.equal(net.state_dict()["stem.0.weight"], state["stem.0.weight"])


def test_create_model_never_drops_a_classifier_for_another_size(tmp_path: Path) -> None:
    save_file(mini_f0(7).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="a classifier of 7 classes, expected 5"):
        create_model("nfnet_mini_f0", num_classes=5, checkpoint_path=tmp_path / "model.safetensors")


def test_half_a_head_is_not_taken_for_a_whole_one() -> None:
    state = mini_f0(5).state_dict()
    del state["head.weight"]
    with pytest.raises(ValueError, match=r"'head\.weight' is absent there"):
        load_into(mini_f0(5), state, source="run-x")


def test_a_head_that_fits_is_loaded_even_if_a_new_one_is_allowed() -> None:
    state = mini_f0(5).state_dict()
    net = mini_f0(5)
    assert not load_into(net, state, source="x", allow_new_head=True)
    assert torch.equal(net.state_dict()["head.weight"], state["head.weight"])


def test_a_classifier_is_left_out_only_on_request(tmp_path: Path) -> None:
    state = mini_f0(7).state_dict()
    with pytest.raises(ValueError, match="a classifier of 7 classes, expected 0"):
        load_into(mini_f0(0), state, source="x")
    save_file(state, tmp_path / "model.safetensors")  # num_classes=0 is such a request
    net = create_model(
        "nfnet_mini_f0", num_classes=0, checkpoint_path=tmp_path / "model.safetensors"
    )
    assert torch.equal(net.state_dict()["final_conv.weight"], state["final_conv.weight"])


@pytest.mark.parametrize(
    ("other", "theirs"),
    [
        ("nfnet_mini_f1", "stages of 2, 4, 12, 6 blocks and 32, 64, 192, 192 channels"),
        ("nfnet_mini_f0_plus", "stages of 1, 2, 6, 3 blocks and 48, 96, 256, 256 channels"),
    ],
)
def test_weights_of_another_model_are_refused_and_change_nothing(other: str, theirs: str) -> None:
    net = mini_f0(5)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = create_model(other, num_classes=5).state_dict()
    message = f"run-x is of another model: {theirs}, expected stages of 1, 2, 6, 3 blocks and 32"
    with pytest.raises(ValueError, match=message) as error:
        load_into(net, state, source="run-x", allow_new_head=True)
    assert "\n" not in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "stem.0.weight",
            torch.zeros(8, 1, 3, 3),
            r"'stem\.0\.weight' is \(8, 1, 3, 3\) there, ex",
        ),
        ("stem.0.gain", None, r"'stem\.0\.gain' is absent there, expected \(8,\)"),
        ("stages.0.0.skip_gain", None, r"'stages\.0\.0\.skip_gain' is absent there, expected \(\)"),
        ("head.scale", torch.zeros(()), r"'head\.scale' is \(\) there, expected absent"),
    ],
)
def test_a_parameter_that_does_not_fit_is_named(
    name: str, value: torch.Tensor | None, message: str
) -> None:
    state = mini_f0(5).state_dict()
    state.pop(name, None)
    if value is not None:
        state[name] = value
    with pytest.raises(ValueError, match=message):
        load_into(mini_f0(5), state, source="run-x", allow_new_head=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [("nfnet_f0", "a different network"), ("dm_nfnet_f0", "which are not converted yet")],
)
def test_timms_weights_are_refused_with_the_reason(name: str, message: str) -> None:
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    with pytest.raises(ValueError, match=message):
        load_into(mini_f0(1000), state, source="timm")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("F0_haiku.npz", b"x", "are pickles by another name"),
        ("weights.h5", b"x", r"is \.h5; weights are"),
        ("torn.safetensors", b"x", r"not a whole \.safetensors file"),
        ("torn.pt", b"", "not a file of tensors alone"),
        ("absent.safetensors", None, "there is no weights file"),
    ],
)
def test_unreadable_files_are_refused(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / name)


class RunsOnOpening:
    """Unpickling this makes the file it names."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_and_its_code_does_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    torch.save({"stem.0.weight": RunsOnOpening(ran)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="unpickling can run code"):
        load_checkpoint(tmp_path / "model.pt")
    assert not ran.exists()
    pickle.loads(pickle.dumps(RunsOnOpening(ran)))  # the test can fail: this does run it
    assert ran.exists()


def test_a_checkpoint_around_the_weights_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": mini_f0(5).state_dict()}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="not a plain state dict"):
        load_checkpoint(tmp_path / "model.pth")
