"""Loading weights into a network: all of them or none; a new classifier only on request."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from nfnets_xla.models.deploy import fuse
from nfnets_xla.models.formats import read_metadata
from nfnets_xla.models.nfnet import NFNet
from nfnets_xla.models.registry import create_model, create_network
from nfnets_xla.models.variants import VARIANTS
from nfnets_xla.models.weights import describe, load_checkpoint, load_into, save_weights


def mini_f0(num_classes: int, name: str = "nfnet_mini_f0") -> NFNet:
    return NFNet(VARIANTS[name], num_classes=num_classes)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_weights_round_trip_through_a_file(tmp_path: Path, suffix: str) -> None:
    net = mini_f0(7)
    path = tmp_path / f"model.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(net.state_dict(), path)
    other = create_network("nfnet_mini_f0", num_classes=7, checkpoint_path=path)
    for name, value in net.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_a_compiled_network_takes_weights() -> None:
    compiled: Any = torch.compile(mini_f0(7))
    state = mini_f0(7).state_dict()
    load_into(compiled, state, source="mine")
    assert torch.equal(compiled.state_dict()["_orig_mod.head.weight"], state["head.weight"])


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, fuse, lambda _: create_model("nfnet_mini_f0", features_only=True)],
    ids=["wrapped", "fused", "feature maps"],
)
def test_weights_go_into_networks_and_nothing_else(wrap: Callable[[Any], Any]) -> None:
    net: Any = mini_f0(7)
    with pytest.raises(ValueError, match=r"load_into was given a .*: give the network that create"):
        load_into(wrap(net), net.state_dict(), source="mine")


def test_wrapped_networks_give_weights() -> None:
    for wrapper in (torch.compile, AveragedModel):
        net, other = mini_f0(7), mini_f0(7)
        wrapped: Any = wrapper(other)
        load_into(net, wrapped.state_dict(), source="mine")
        assert torch.equal(net.state_dict()["head.weight"], other.state_dict()["head.weight"])


@pytest.mark.parametrize("prefix", ["model.", "net.backbone._orig_mod."])
def test_a_training_modules_network_is_found(tmp_path: Path, prefix: str) -> None:
    """As in Lightning's checkpoints. With two networks it is unclear which is meant."""
    net = mini_f0(7)
    state = {f"{prefix}{name}": value for name, value in net.state_dict().items()}
    state["loss.weight"] = torch.ones(3)
    torch.save({"state_dict": state}, tmp_path / "net.ckpt")
    other = create_network("nfnet_mini_f0", num_classes=7, checkpoint_path=tmp_path / "net.ckpt")
    assert torch.equal(net.state_dict()["head.weight"], other.state_dict()["head.weight"])
    two = {f"{name}.{key}": value for name in "ab" for key, value in net.state_dict().items()}
    with pytest.raises(ValueError, match="x is of another model: no stages"):
        load_into(net, two, source="x")


def test_whole_numbers_are_no_weights() -> None:
    state = {name: (100 * value).long() for name, value in mini_f0(7).state_dict().items()}
    with pytest.raises(ValueError, match=r"x has torch.int64 in 'final_conv.bias': weights are of"):
        load_into(mini_f0(7), state, source="x")


def test_a_new_head_is_made_only_when_allowed() -> None:
    state = mini_f0(7).state_dict()
    net = mini_f0(5)
    head = net.state_dict()["head.weight"].clone()
    with pytest.raises(ValueError, match="run-x has a classifier of 7 classes, expected 5: give"):
        load_into(net, state, source="run-x")
    assert load_into(net, state, source="run-x", allow_new_head=True)
    assert torch.equal(net.state_dict()["head.weight"], head)
    assert torch.equal(net.state_dict()["stem.0.weight"], state["stem.0.weight"])


def test_create_network_drops_a_classifier_of_another_size_only_when_allowed(
    tmp_path: Path,
) -> None:
    state, file = mini_f0(7).state_dict(), tmp_path / "model.safetensors"
    save_file(state, file)
    with pytest.raises(ValueError, match="a classifier of 7 classes, expected 5"):
        create_network("nfnet_mini_f0", num_classes=5, checkpoint_path=file)
    net = create_network("nfnet_mini_f0", num_classes=5, checkpoint_path=file, allow_new_head=True)
    assert net.state_dict()["head.weight"].shape[0] == 5
    assert torch.equal(net.state_dict()["stem.0.weight"], state["stem.0.weight"])


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
    net = create_network(
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
    state = mini_f0(5, other).state_dict()
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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(value: float) -> None:
    net, state = mini_f0(5), mini_f0(5).state_dict()
    state["stages.2.3.conv1b.weight"][1, 2, 0, 0] = value
    before = net.state_dict()["stem.0.weight"].clone()
    with pytest.raises(ValueError, match=r"values in 'stages\.2\.3\.conv1b\.weight' that are not"):
        load_into(net, state, source="x")
    assert torch.equal(net.state_dict()["stem.0.weight"], before)


def test_saved_weights_say_what_they_are(tmp_path: Path) -> None:
    net = mini_f0(5)
    path = tmp_path / "net.safetensors"
    save_weights(net, path, describe(net, "nfnet_mini_f0", "a test"))
    assert read_metadata(path) == {
        "model": "nfnet_mini_f0",
        "num_classes": "5",
        "in_chans": "3",
        "plus_bottleneck": "code",
        "provenance": "a test",
    }
    assert not load_into(mini_f0(5), load_checkpoint(path), source="x")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
