"""Where weights are found: in a file, a checkpoint, a folder of them, a run."""

from pathlib import Path

import pytest
import torch

from nfnets_xla import checkpoint, sources
from nfnets_xla.checkpoint_cli import checkpoints
from nfnets_xla.models.registry import create_network
from tests.runs import PLAIN_CPU, run
from tests.test_checkpoint import FORMS, save, short_file


def test_weights_are_found_from_a_file_a_checkpoint_or_a_run(tmp_path: Path) -> None:
    folder = save(tmp_path / "checkpoints", 3)
    file = folder / "model.safetensors"
    for given in (file, folder, folder.parent, tmp_path):
        weights, source = sources.weights(str(given), "raw")
        assert source == str(file if given == file else folder)
        assert torch.equal(weights["w"], FORMS["model"]["w"])
    with pytest.raises(ValueError, match="holds no ema weights"):
        sources.weights(str(tmp_path), "ema")
    with pytest.raises(ValueError, match="holds no weights: give"):
        sources.weights(str(tmp_path / "nothing"), "raw")


def test_a_damaged_newest_is_not_passed_over_without_a_word(
    tmp_path: Path, data: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever asks; and in a run's own process, where Hydra has a say, on its stderr."""
    net = create_network("nfnet_mini_f0", num_classes=5)
    identity = {"model": {"name": "nfnet_mini_f0"}, "num_classes": 5, "seed": 0, "shards": "f"}
    for step in (1, 2):
        forms = {"model": dict(net.state_dict())}
        checkpoint.save(tmp_path / "checkpoints", step, forms, {"identity": identity})
    short_file(tmp_path / "checkpoints" / "step-00000002")
    said = f"warning: {tmp_path}/checkpoints/step-00000002 is not a complete checkpoint: "
    for given in (tmp_path, tmp_path / "checkpoints"):
        checkpoints(["show", str(given)])
        assert caplog.messages[-1].startswith(f"{said}model.safetensors has ")
    log, command = tmp_path / "log.txt", ["evaluate_demo", *data, *PLAIN_CPU, "data.workers=0"]
    run([*command, f"model.init_from={tmp_path}", "data.shards=null"], log)
    assert log.read_text().count(said) == 1
