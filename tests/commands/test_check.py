"""The cost of a run, against sums by hand; and runs that are impossible."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nfnets_xla.cli import main
from nfnets_xla.compose import composed, to_run
from nfnets_xla.data.shards import ShardIndex
from nfnets_xla.inputs import make_order
from nfnets_xla.models.nfnet import NFNet
from nfnets_xla.models.variants import VARIANTS
from nfnets_xla.steps import make_schedule

OF_32 = ["data.batch_size=32", "data.eval_batch_size=32", "optim.warmup_steps=1"]
SLICES = ["data.batch_size=16", "data.eval_batch_size=16", "data.num_streams=4"]


@pytest.fixture
def recipe(shards: Path) -> list[str]:
    data = [f"data.shards={shards / 'train'}", f"data.eval_shards={shards / 'held-out'}"]
    return ["check", "pretrain_demo", *data, *SLICES, "optim.epochs=3"]


def lines(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    main(arguments)
    rows = capsys.readouterr().out.splitlines()
    return {line[:12].strip(): line[13:] for line in rows}


def test_it_is_the_arithmetic_of_the_run(
    recipe: list[str], shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """100 images for 3 epochs in batches of 16 are 18.75, hence 19 steps, the last one padded."""
    train, held_out = (ShardIndex.load(shards / name) for name in ("train", "held-out"))
    steps = -(-3 * train.num_samples // 16)
    found = lines([*recipe, "--mfu", "0.5", "--price", "2", "trainer.eval_every=10"], capsys)
    assert found["steps"].startswith(f"{steps} of 16 rows")
    size = sum(path.stat().st_size for path in (shards / "train").glob("*.tar")) / 2**30
    assert f"{train.num_shards} shards, {size:.3f} GiB in all, 3.04 times" in found["reads"]
    net = NFNet(VARIANTS["nfnet_mini_f0"], num_classes=train.num_classes)
    assert f"{sum(p.numel() for p in net.parameters()):,} parameters" in found["model"]
    training = 6 * net.macs(32) * 16 * steps
    evaluating = 2 * net.macs(32) * held_out.num_samples * -(-steps // 10)
    assert float(found["training"].split()[0]) == pytest.approx(training, rel=1e-3)
    assert float(found["evaluation"].split()[0]) == pytest.approx(evaluating, rel=1e-3)
    hours = (training + evaluating) / (0.5 * 275e12 / 2 * 3600)
    assert float(found["core-hours"].split()[0]) == pytest.approx(hours, rel=1e-3)
    assert float(found["wall-clock"].split()[0]) == pytest.approx(hours / 2, rel=1e-3)
    assert found["cost"] == f"{hours:.2f} at 2 a chip-hour"  # two cores per chip


def test_what_costs_more_is_counted(recipe: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    plain = lines(recipe, capsys)
    sam = lines([*recipe, "optim.sam_rho=0.05", "optim.ema_decay=0.99"], capsys)
    assert float(sam["training"].split()[0]) == pytest.approx(
        2 * float(plain["training"].split()[0]), rel=1e-3
    )
    assert float(sam["evaluation"].split()[0]) == pytest.approx(
        2 * float(plain["evaluation"].split()[0]), rel=1e-3
    )
    assert "3 copies" in plain["memory"]
    assert "5 copies" in sam["memory"]
    repeated = lines([*recipe, "data.repeats=2"], capsys)
    assert repeated["steps"].split(";")[0] == plain["steps"].split(";")[0]  # equal compute
    assert "2 views of each" in repeated["epochs"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--chips", "3"], "data.batch_size is 16; it must be a multiple of the 3 devices"),
        (
            ["--chips", "16", "--hardware", "v3"],
            "devices of 16 v3 chips (--chips)",
        ),
        (["--chips", "16", "--hardware", "v7"], "a multiple of the 32 devices of 16 v7 chips"),
        (["--hardware", "v9"], "hardware is 'v9'; it must be one of v2"),
        (["--mfu", "36"], "36 % is 0.36"),
        (
            ["--chips", "4", "trainer.fsdp=3"],
            "it must divide the 4 devices (--chips)",
        ),
        (
            ["--chips", "4", "trainer.fsdp=4", "--hardware", "H100"],
            "on H100 every process keeps all",
        ),
        (
            ["--hardware", "v2", "model.name=nfnet_f7_plus", "trainer.fsdp=1"],
            "are 9.2 GiB a device, and v2 has 8: shard them over more",
        ),
        (["model.name=vit_mini_d3_4", "model.drop_path_rate=0.2"], "model.drop_path_rate is 0.2"),
        (["model.name=vit_mini_d3_4", "model.pretrained=dm_in1k"], "it is for NFNets; give null"),
        (["model.name=vit_mini_d3_4", "model.recompute=true"], "model.recompute are not for vit"),
        (["model.name=timm/test_resnet"], "timm/test_resnet keeps running statistics"),
        (["model.name=local-dir:card"], "model.init_from=card/model.safetensors"),
        (["data.num_streams=5"], "unique samples per step do not divide among 5 streams"),
        (
            [*OF_32, "--chips", "32"],
            "data.num_streams is 4; it must be a multiple of the 8 hosts of 32 v4 chips (--chips)",
        ),
        (
            ["--chips", "16", "--hardware", "v6e", "data.num_streams=2"],
            "data.num_streams is 2; it must be a multiple of the 4 hosts of 16 v6e chips",
        ),
        (
            ["--chips", "8", "--hardware", "H100"],
            "data.num_streams is 4; it must be a multiple of the 8 hosts of 8 H100 chips",
        ),
        (["data.num_streams=1", "data.mix=mixup_cutmix"], "mixing needs 2 and an even number of"),
        (["model.width=3"], "there is no setting model.width"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    recipe: list[str], change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*recipe, *change])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


@pytest.mark.parametrize("repeats", [1, 4])
def test_rates_know_rows_and_epochs_of_views(repeats: int) -> None:
    """With repeated augmentation a batch counts rows, and an epoch as many views as there are
    images."""
    given = ["data.shards=S", "run_dir=R", f"data.repeats={repeats}", "data.batch_size=256"]
    given += ["optim.peak_lr=0.1", "optim.lr_batch=128", "optim.warmup_epochs=2"]
    run = to_run(composed("imagenet", [*given, "data.eval_shards=E"]))
    index: Any = SimpleNamespace(counts=np.full(64, 400), folder="S")
    schedule = make_schedule(run, make_order(run, index))
    assert (schedule.peak, schedule.warmup_steps) == (pytest.approx(0.2), 200)
