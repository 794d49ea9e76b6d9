"""Every recipe composes to a typed run; the resolved values are pinned, so changes show in a diff.

To accept a change: REWRITE_GOLDEN=1 python -m pytest tests/test_recipes.py
"""

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nfnets_xla import config, list_models
from nfnets_xla.compose import composed as composed_config
from nfnets_xla.compose import to_run
from nfnets_xla.config import Run, differences
from nfnets_xla.inputs import make_order, untrained
from nfnets_xla.manual import recipes
from nfnets_xla.scaling.account import images_drawn, macs_per_image, train_flops
from nfnets_xla.steps import ascent_share, make_passes, make_schedule

GOLDEN = Path(__file__).parent / "golden" / "recipes"
REQUIRED = {
    "pretrain": ["data.shards=S", "optim.epochs=1"],
    "vit_baseline": ["data.shards=S", "optim.epochs=1"],
    "lr_sweep": ["data.shards=S", "optim.epochs=1"],
    "scaling_sweep": ["data.shards=S", "optim.epochs=1"],
    "finetune_sweep": ["data.shards=S", "model.init_from=W", "model.name=nfnet_f0"],
    "finetune_repeat_aug": ["data.shards=S", "model.init_from=W"],
    "finetune_sam": ["data.shards=S", "model.init_from=W"],
    "imagenet": ["data.shards=S"],
    "evaluate": ["data.eval_shards=S", "model.init_from=W"],
    "throughput": [],
    "smoke": [],
    "pretrain_demo": ["data.shards=S"],
    "finetune_sam_demo": ["data.shards=S", "model.init_from=W"],
    "evaluate_demo": ["data.eval_shards=S", "model.init_from=W"],
}


def composed(name: str) -> Run:
    run_dir = [] if name.startswith("evaluate") else ["run_dir=R"]
    return to_run(composed_config(name, [*REQUIRED[name], *run_dir]))


def test_every_recipe_is_here() -> None:
    assert REQUIRED.keys() == recipes().keys()


@pytest.mark.parametrize("name", REQUIRED)
def test_a_recipe_resolves_to_what_it_did(name: str) -> None:
    resolved = json.dumps(asdict(composed(name)), indent=1) + "\n"
    file = GOLDEN / f"{name}.json"
    if os.environ.get("REWRITE_GOLDEN"):
        file.write_text(resolved)
    assert resolved == file.read_text()


def test_what_an_optimizer_has_of_its_own_is_given_with_it_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By its line in config.py, which is all that a new one needs there."""

    def pretrain(*given: str) -> Run:
        return to_run(composed_config("pretrain", [*REQUIRED["pretrain"], "run_dir=R", *given]))

    monkeypatch.setitem(config.OPTIMIZERS, "with", {"beta2": 0.99})
    monkeypatch.setitem(config.OPTIMIZERS, "without", {})
    assert pretrain("optim.optimizer=with", "optim.beta2=0.5").optim.beta2 == 0.5
    assert pretrain("optim.optimizer=without").optim.beta2 is None
    whose = "it is a setting of adamw.* and with"
    with pytest.raises(ValueError, match=rf"beta2 is None .*=with; {whose}: give 0\.99, for exam"):
        pretrain("optim.optimizer=with")
    with pytest.raises(ValueError, match=rf"beta2 is 0\.5 .*=without; {whose}: give null"):
        pretrain("optim.optimizer=without", "optim.beta2=0.5")


@pytest.mark.parametrize("name", REQUIRED)
def test_a_recipe_opens_with_its_header(name: str) -> None:
    text = (Path(__file__).parents[1] / "recipes" / f"{name}.yaml").read_text()
    header = "".join(line for line in text.splitlines(True) if line.startswith("#"))
    hardware = [] if name == "evaluate" else ["Hardware:"]  # any hardware that the weights fit on
    for part in (f"nfnets-xla {name}", *hardware, "Expect", "Last measured:"):
        assert part in header


SCHEDULES = GOLDEN.parent / "schedules.json"
IMAGENET = np.array([1252] * 143 + [1251] * 881)  # 1,281,167 images
JFT = np.full(400_000, 10_000)
SMALL_SET = np.full(48, 32)  # of the demo


def derived(name: str) -> dict[str, Any] | None:
    """Derived quantities of a recipe on the data it is meant for; nothing for an evaluation."""
    run = composed(name)
    if run.job != "train":
        return None
    counts = IMAGENET if name.startswith(("imagenet", "finetune")) else JFT
    index: Any = SimpleNamespace(counts=SMALL_SET if "demo" in name else counts, folder="S")
    order = make_order(run, index)
    schedule, passes = make_schedule(run, order), make_passes(run, order)
    rows = order.num_steps * run.data.batch_size
    with torch.device("meta"):
        macs = untrained(run, num_classes=1000).macs(run.data.image_size)
    fraction = ascent_share(run, passes)
    return {
        "steps": order.num_steps,
        "peak_lr": schedule.peak,
        "warmup_steps": schedule.warmup_steps,
        "images_read": images_drawn(rows, run.data.repeats),
        "flops": train_flops(macs, rows, sam_fraction=fraction),
    }


def test_what_the_recipes_come_to() -> None:
    found = {name: values for name in REQUIRED if (values := derived(name))}
    text = json.dumps(found, indent=1) + "\n"
    if os.environ.get("REWRITE_GOLDEN"):
        SCHEDULES.write_text(text)
    assert text == SCHEDULES.read_text()


def test_what_they_come_to_by_hand() -> None:
    """From the papers' own numbers; GMACs of F0 at 192, 224 and 384 px are counted by the
    reference's formula (nfnet.py:154-173), which tests/models compares with DeepMind's."""
    golden = json.loads(SCHEDULES.read_text())
    # CM 2: an epoch of 4e9 in batches of 4096. NF A.1: 0.1 x 4096 / 256.
    assert golden["pretrain"]["steps"] == math.ceil(4e9 / 4096) == 976_563
    assert golden["pretrain"]["peak_lr"] == pytest.approx(1.6)
    assert golden["pretrain"]["flops"] == pytest.approx(6 * 9.48e9 * 4e9, rel=2e-3)
    # NF A.1: 360 epochs of 4096, 112,602 steps (experiment_nfnets.py:39), warm-up of 5.
    assert golden["imagenet"]["steps"] == math.ceil(360 * 1_281_167 / 4096) == 112_603
    assert golden["imagenet"]["warmup_steps"] == round(5 * 1_281_167 / 4096) == 1564
    # CM 3: 50 epochs, batch 2048 (NF A.5); SAM doubles the work.
    tuned, repeated = golden["finetune_sam"], golden["finetune_repeat_aug"]
    assert tuned["steps"] == math.ceil(50 * 1_281_167 / 2048) == 31_279
    assert (tuned["peak_lr"], tuned["warmup_steps"]) == (0.1, 5000)
    assert tuned["flops"] == pytest.approx(2 * 6 * 27.86e9 * 50 * 1_281_167, rel=2e-3)
    # CM, footnote 4: 4 views need a quarter of the images, for the same compute.
    assert repeated["images_read"] == pytest.approx(12.5 * 1_281_167, rel=1e-4)
    assert repeated["flops"] == pytest.approx(tuned["flops"], rel=1e-4)


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


def test_one_dial_sets_what_table_1_has_by_variant() -> None:
    """arXiv 2102.06171, table 1 and A.3, for F3 and F5; overrides still apply."""
    for model, expected in (
        ("nfnet_f3", (320, 416, 0.4, 15)),
        ("F5+", (416, 544, 0.5, 15)),
    ):
        given = ["data.shards=S", "run_dir=R", f"model.name={model}"]
        run = to_run(composed_config("imagenet", given))
        found = run.data.image_size, run.data.eval_image_size
        assert (*found, run.model.drop_rate, run.data.randaugment_magnitude) == expected
        assert run.model.drop_path_rate == 0.25
        larger = to_run(composed_config("imagenet", [*given, "data.eval_image_size=600"]))
        assert (larger.data.image_size, larger.data.eval_image_size) == (expected[0], 600)
    for recipe in ("pretrain", "finetune_sam"):  # these have one setting for all sizes
        small, large = (
            asdict(
                to_run(
                    composed_config(recipe, [*REQUIRED[recipe], "run_dir=R", f"model.name={name}"])
                )
            )
            for name in ("nfnet_f0", "nfnet_f7_plus")
        )
        assert {line.split(":")[0] for line in differences(small, large)} == {"model.name"}


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        *[(name, "nfnet_f3") for name in ("F3", "dm_nfnet_f3", "nfnet_f3")],
        ("nfnet_f3+", "nfnet_f3_plus"),
        *[(name, name) for name in ("timm/dm_nfnet_f3", "vit_giant_14", "local-dir:F3")],
    ],
)
def test_a_network_has_one_name_in_records(written: str, kept: str) -> None:
    given = [*REQUIRED["pretrain"], "run_dir=R", f"model.name={written}"]
    assert to_run(composed_config("pretrain", given)).model.name == kept


def test_public_weights_stand_in_for_a_run() -> None:
    given = ["data.shards=S", "run_dir=R", "model.pretrained=dm_in1k"]
    run = to_run(composed_config("finetune_sam", given))
    assert (run.model.init_from, run.model.pretrained) == (None, "dm_in1k")
    with pytest.raises(ValueError, match="two sources of weights"):
        to_run(composed_config("finetune_sam", [*given, "model.init_from=W"]))
    with pytest.raises(ValueError, match=r"model\.init_from not set"):
        to_run(composed_config("finetune_sam", given[:2]))


def test_repeated_augmentation_costs_the_same() -> None:
    """arXiv 2310.16764, footnote 4: with more views there are fewer passes. The arithmetic for
    ImageNet's 1,281,167 images, by hand: 50 passes in batches of 2048 are 31,278.5 steps."""
    plain, repeated = composed("finetune_sam"), composed("finetune_repeat_aug")
    assert (plain.optim.epochs, repeated.optim.epochs, repeated.data.repeats) == (50, 50, 4)
    changed = {line.split(":")[0] for line in differences(asdict(plain), asdict(repeated))}
    assert changed == {"data.repeats"}
    index: Any = SimpleNamespace(counts=np.full(1024, 1251), folder="S")  # 1,281,024 images
    steps = {
        name: make_order(run, index).num_steps
        for name, run in (("plain", plain), ("repeated", repeated))
    }
    images = 1024 * 1251
    assert steps["plain"] == math.ceil(50 * images / 2048)
    assert abs(steps["repeated"] - steps["plain"]) <= 1  # 12.5 passes, in batches of 512 images
    flops = {
        name: train_flops(macs_per_image("nfnet_f0", 384), steps[name] * 2048, sam_fraction=1.0)
        for name in steps
    }
    assert flops["repeated"] == pytest.approx(flops["plain"], rel=1e-4)
    drawn = images_drawn(steps["repeated"] * 2048, repeats=4)
    assert drawn == pytest.approx(12.5 * images, rel=1e-4)


@pytest.mark.parametrize(("epochs", "steps"), [(0.25, 244_141), (1, 976_563), (8, 7_812_500)])
def test_steps_on_jft(epochs: float, steps: int) -> None:
    """4e9 images in batches of 4096: an epoch is 976,562.5 steps."""
    run = composed("pretrain")
    run.optim.epochs = epochs
    shards: Any = SimpleNamespace(counts=np.full(400_000, 10_000), folder="S")
    order = make_order(run, shards)
    assert order.num_steps == steps
    schedule = make_schedule(run, order)
    assert (schedule.peak, schedule.warmup_steps) == (pytest.approx(1.6), 5000)
    assert schedule(5000) == pytest.approx(1.6)
    assert schedule(0) == 0
    # The cosine is half-way when half of the steps after the warm-up are done.
    assert schedule(5000 + (steps - 5000) // 2) == pytest.approx(0.8, rel=1e-4)
