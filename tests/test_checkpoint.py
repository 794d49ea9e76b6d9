"""A checkpoint exists if and only if its manifest verifies."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nfnets_xla import checkpoint

FORMS = {"model": {"w": torch.arange(6.0).reshape(2, 3), "gain": torch.tensor(0.5)}}


def save(root: Path, step: int) -> Path:
    return checkpoint.save(root, step, FORMS, {"identity": {"seed": 1}})


def test_round_trip_is_bit_equal(tmp_path: Path) -> None:
    loaded = checkpoint.load(save(tmp_path, 7))
    assert (loaded.step, loaded.state["identity"]) == (7, {"seed": 1})
    tensors = loaded.tensors("model")
    assert tensors.keys() == FORMS["model"].keys()
    assert all(torch.equal(tensors[name], value) for name, value in FORMS["model"].items())
    with pytest.raises(ValueError, match="holds no 'ema' weights; it holds model"):
        loaded.tensors("ema")


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def torn_manifest(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text[:-5])


def missing_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def short_file(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1])


def flipped_bit(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def changed_state(folder: Path) -> None:
    (folder / "state.json").write_text(json.dumps({"step": 9999}))


DAMAGE = [no_manifest, torn_manifest, missing_file, short_file, flipped_bit, changed_state]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_does_not_exist(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    save(tmp_path, 1)
    damaged = save(tmp_path, 2)
    damage(damaged)
    with pytest.raises(ValueError, match="is not a complete checkpoint"):
        checkpoint.load(damaged)
    found, skipped = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert len(skipped) == 1
    assert "step-00000002" in skipped[0]
    assert checkpoint.load(save(tmp_path, 2)).step == 2  # written anew over the remains


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    no_manifest(tmp_path / "step-00000003")
    checkpoint.prune(tmp_path, keep=2)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["step-00000002", "step-00000003", "step-00000004"]
    checkpoint.prune(tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_weights_are_found_from_a_file_a_checkpoint_or_a_run(tmp_path: Path) -> None:
    folder = save(tmp_path / "checkpoints", 3)
    file = folder / "model.safetensors"
    assert checkpoint.weights_file(file, "raw") == file
    assert checkpoint.weights_file(folder, "raw") == file
    assert checkpoint.weights_file(tmp_path, "raw") == file
    with pytest.raises(ValueError, match="holds no ema weights"):
        checkpoint.weights_file(tmp_path, "ema")
    with pytest.raises(ValueError, match="holds no weights: give"):
        checkpoint.weights_file(tmp_path / "nothing", "raw")
