"""Where weights are found: in a file, a checkpoint, a folder of them, a run."""

from pathlib import Path

import pytest
import torch

from nfnets_xla import sources
from tests.test_checkpoint import FORMS, save


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
