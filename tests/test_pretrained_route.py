"""The only way without JFT: public ImageNet weights, a new head, SAM; from a local cache."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nfnets_xla.models.names import to_timm
from nfnets_xla.models.nfnet import NFNet
from nfnets_xla.models.variants import VARIANTS
from tests.runs import SMALL, run


def as_downloaded(home: Path) -> None:
    """An nfnet_f0 in timm's names, in huggingface_hub's cache."""
    torch.manual_seed(0)
    net = NFNet(VARIANTS["nfnet_f0"])
    commit = "0" * 40
    repository = home / "hub" / "models--timm--dm_nfnet_f0.dm_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    save_file(to_timm(net), repository / "snapshots" / commit / "model.safetensors")


@pytest.mark.slow
def test_fine_tuning_from_public_weights(shards: Path, tmp_path: Path) -> None:
    as_downloaded(tmp_path / "hf")
    offline = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    data = [f"data.shards={shards / 'train'}", f"data.eval_shards={shards / 'held-out'}"]
    small = [word for word in SMALL if not word.startswith("data.image_size")]
    recipe = ["finetune_sam", "model.pretrained=dm_in1k", *data, *small, "data.image_size=32"]
    recipe += ["trainer.device=cpu", "model.compute_dtype=float32", "optim.epochs=0.3"]
    recipe += ["optim.warmup_steps=1"]
    recipe += ["trainer.tensorboard=false", f"run_dir={tmp_path / 'run'}"]
    run(recipe, tmp_path / "log", **offline)
    said = (tmp_path / "log").read_text()
    assert "public weights nfnet_f0.dm_in1k" in said
    assert "finished after 2 steps" in said
    evaluate = ["evaluate", "model.pretrained=dm_in1k", "trainer.device=cpu", *data[1:], *small[1:]]
    run(evaluate, tmp_path / "log", **offline)
    assert "nfnet_f0.dm_in1k: loss" in (tmp_path / "log").read_text()


def test_without_them_it_is_one_line(shards: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "nfnets_xla", "evaluate", "model.pretrained=dm_in1k"]
    command += [f"data.eval_shards={shards / 'held-out'}", "trainer.device=cpu"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "neither in the Hugging Face cache nor available" in ended.stderr
