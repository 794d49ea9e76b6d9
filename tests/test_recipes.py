"""Every recipe composes to a typed run; what it resolves to is pinned, so a change shows in a diff.

To accept a change: REWRITE_GOLDEN=1 python -m pytest tests/test_recipes.py
"""

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.plugins import Plugins

from nfnets_xla.cli import ConfOnPath, recipes, to_run
from nfnets_xla.config import Run
from nfnets_xla.models import list_models

GOLDEN = Path(__file__).parent / "golden" / "recipes"
REQUIRED = {
    "pretrain": ["data.shards=S", "optim.epochs=1"],
    "pretrain_vit": ["data.shards=S", "optim.epochs=1"],
    "finetune_sam": ["data.shards=S", "model.init_from=W"],
    "imagenet": ["data.shards=S"],
    "evaluate": ["data.eval_shards=S", "model.init_from=W"],
    "pretrain_demo": ["data.shards=S"],
    "finetune_sam_demo": ["data.shards=S", "model.init_from=W"],
    "evaluate_demo": ["data.eval_shards=S", "model.init_from=W"],
}


def composed(name: str) -> Run:
    Plugins.instance().register(ConfOnPath)
    with initialize_config_module("nfnets_xla.recipes", version_base="1.3"):
        run_dir = [] if name.startswith("evaluate") else ["run_dir=R"]
        return to_run(compose(name, [*REQUIRED[name], *run_dir]))


def test_every_recipe_is_here() -> None:
    assert REQUIRED.keys() == recipes().keys()


@pytest.mark.parametrize("name", REQUIRED)
def test_a_recipe_resolves_to_what_it_did(name: str) -> None:
    resolved = json.dumps(asdict(composed(name)), indent=1) + "\n"
    file = GOLDEN / f"{name}.json"
    if os.environ.get("REWRITE_GOLDEN"):
        file.write_text(resolved)
    assert resolved == file.read_text()


@pytest.mark.parametrize("name", REQUIRED)
def test_a_recipe_opens_with_its_header(name: str) -> None:
    text = (Path(__file__).parents[1] / "recipes" / f"{name}.yaml").read_text()
    header = "".join(line for line in text.splitlines(True) if line.startswith("#"))
    for part in (f"nfnets-xla {name}", "Hardware:", "Expect", "Last measured:"):
        assert part in header or part.replace("Hardware:", "Expect") in header


def test_the_papers_numbers() -> None:
    pretrain, finetune = composed("pretrain"), composed("finetune_sam")
    imagenet = composed("imagenet")
    assert pretrain.data.batch_size == 4096
    assert (pretrain.optim.peak_lr, pretrain.optim.lr_batch) == (0.1, 256)
    assert (pretrain.data.image_size, pretrain.data.eval_image_size) == (224, 256)
    assert (finetune.data.image_size, finetune.data.eval_image_size) == (384, 480)
    assert (finetune.optim.epochs, finetune.optim.sam_rho) == (50, 0.05)
    assert pretrain.model.name in list_models()
    assert (imagenet.optim.warmup_epochs, imagenet.optim.warmup_steps) == (5, None)
    assert (imagenet.data.image_size, imagenet.data.eval_image_size) == (192, 256)
    assert (imagenet.data.randaugment_ops, imagenet.data.randaugment_magnitude) == (4, 5)
    assert imagenet.data.mix == "mixup_cutmix"
    for others in (pretrain, finetune):  # crop and flip only
        assert (others.data.randaugment_magnitude, others.data.mix) == (None, "none")
