"""The TPU's program on virtual devices: two graphs in all, and equal runs on 1 and 4 devices."""

import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from nfnets_xla.optim import Schedule
from nfnets_xla.record import read_record
from tests.runs import (
    PLAIN_CPU,
    RECIPE,
    SMALL,
    UNOPTIMISED,
    assert_bit_equal,
    final_state,
    losses,
    run,
    run_killed_at,
    samples,
    xla,
)
from tests.shallow import SHALLOW

pytest.importorskip("torch_xla", exc_type=ModuleNotFoundError)

BEFORE = "*before_optimizations.txt"
EXACT = "operand_precision={highest,highest}"
EPOCHS = 4.75  # 475 images in 30 steps, the last with spare rows
MESHES = {"one": (1, 1), "2 x 2": (4, 2), "1 x 4": (4, 4), "2 x 4": (8, 4), "8": (8, 1)}


@pytest.fixture(scope="module")
def on_four(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "four"
    command = [*arguments(shards), *xla(4), f"run_dir={folder}"]
    run(command, folder.parent / "log.txt", XLA_FLAGS=dumping_to(folder.parent / "programs"))
    return folder


def dumping_to(folder: Path) -> str:
    return f"{UNOPTIMISED} --xla_dump_to={folder} --xla_dump_hlo_as_text"


def step_program(folder: Path) -> str:
    """The largest of the programs that XLA compiled."""
    texts = [path.read_text() for path in folder.glob(BEFORE)]
    return max(texts, key=len)


def arguments(shards: Path) -> list[str]:
    data = [f"data.shards={shards / 'train'}", f"data.eval_shards={shards / 'held-out'}"]
    return [*RECIPE, *SHALLOW, *data, *SMALL, f"optim.epochs={EPOCHS}"]


def test_one_compilation_for_training_one_for_evaluation_and_no_fallback(on_four: Path) -> None:
    """With SAM, EMA, a learning rate that is first 0, evaluations and checkpoints: two graphs in
    all."""
    record = read_record(on_four)
    (end,) = record.of_kind("end")
    assert record.headers[0]["num_devices"] == 4
    assert record.of_kind("train")[0]["learning_rate"] == 0
    assert len(record.of_kind("eval")) >= 6
    assert len(record.of_kind("checkpoint")) >= 4
    assert end["compilations"] == 2
    assert end["fallbacks"] == {}


def test_float32_is_float32(on_four: Path) -> None:
    """By default a TPU rounds the factors of products to bfloat16. In the evaluation, and in the
    heads; torch_xla 2.9 does not pass the setting on for a convolution's gradient by its input."""
    programs = [path.read_text() for path in (on_four.parent / "programs").glob(BEFORE)]
    step, evaluation, *_ = sorted(programs, key=len, reverse=True)
    heads = re.findall(r" = (\w+)\[.* dot\(.*", step)
    assert len(heads) == len(re.findall(r" = f32\[.* dot\(.*" + EXACT, step)) > 4
    products = re.findall(r" = \w+\[.* (?:convolution|dot)\(.*", evaluation)
    assert len(products) > 25
    assert all(EXACT in product for product in products)


@pytest.mark.parametrize(
    "device",
    ["cpu", "2 x 2", *(pytest.param(m, marks=pytest.mark.slow) for m in MESHES if m != "2 x 2")],
)
def test_the_device_is_not_part_of_the_run(
    shards: Path, on_four: Path, tmp_path: Path, device: str
) -> None:
    """Equal ids in every batch; losses equal to 1e-4 over 30 steps in float32.

    With dropout, stochastic depth, SAM and an average, on any mesh: "2 x 4" is eight devices, of
    which groups of four share a copy of the parameters.
    """
    folder = tmp_path / "run"
    options, fsdp = PLAIN_CPU, 1
    if device != "cpu":
        devices, fsdp = MESHES[device]
        options = [*xla(devices), f"trainer.fsdp={fsdp}"]
    run([*arguments(shards), *options, f"run_dir={folder}"], tmp_path / "log.txt")
    assert samples(folder) == samples(on_four)
    assert len(losses(folder)) == 30
    np.testing.assert_allclose(losses(folder), losses(on_four), rtol=1e-4)
    if device != "cpu":
        (end,) = read_record(folder).of_kind("end")
        assert end["compilations"] == 2
        assert end["gather_compilations"] == (0 if fsdp == 1 else 1)


@pytest.mark.slow
def test_bfloat16_convolves_in_bfloat16_and_keeps_float32(
    shards: Path, on_four: Path, tmp_path: Path
) -> None:
    """In a step's program as given to XLA; and 30 losses differ by less than 1e-3 relative.

    Parameters, momentum and average enter and leave in float32. Before a convolution a weight is
    standardised in float32 and then rounded.
    """
    programs = tmp_path / "programs"
    folder = tmp_path / "run"
    command = [*arguments(shards), *xla(4), "model.compute_dtype=bfloat16", f"run_dir={folder}"]
    run(command, tmp_path / "log.txt", XLA_FLAGS=dumping_to(programs))
    np.testing.assert_allclose(losses(folder), losses(on_four), rtol=1e-3)
    assert losses(folder) != losses(on_four)

    step = step_program(programs).partition("\nENTRY ")[2]  # without the bodies of reductions
    results = {
        kind: Counter(re.findall(rf"= (\w+)\[\d[^=]*\]\S* {kind}\(", step))  # not of scalars
        for kind in ("convolution", "parameter", "rsqrt", "log")
    }
    assert results["convolution"].keys() == {"bf16"}
    assert "bf16" not in results["parameter"]
    assert results["parameter"]["f32"] > 100  # three for each of the model's
    assert results["rsqrt"].keys() == {"f32"}  # of standardisation
    assert results["log"].keys() == {"f32"}  # of the loss


@pytest.mark.slow
def test_nothing_that_changes_in_50_steps_compiles_again(shards: Path, tmp_path: Path) -> None:
    """The rate passes through exactly 0, 0.5 and 1; in bfloat16; with SAM, mixing, an average
    swapped in for evaluation, checkpoints, and a logged step each time. Each logged interval reads
    one tensor, plus three per checkpoint: weights, momentum, average."""
    options = ["optim.epochs=8", "optim.peak_lr=1", "optim.warmup_steps=4", "trainer.fsdp=2"]
    options += ["model.compute_dtype=bfloat16", "trainer.log_every=3"]
    folder = tmp_path / "run"
    run([*arguments(shards), *options, *xla(4), f"run_dir={folder}"], tmp_path / "log.txt")
    record = read_record(folder)
    (end,) = record.of_kind("end")
    assert record.headers[0]["num_steps"] == 50
    rates = Schedule("cosine", 1.0, 4, 50)
    assert [rates(step) for step in (0, 2, 4)] == [0, 0.5, 1]
    assert (end["compilations"], end["gather_compilations"], end["fallbacks"]) == (2, 1, {})
    rows = record.of_kind("train")
    assert [row["compilations"] for row in rows] == [1] + [0] * (len(rows) - 1)
    saved_at = [row["step"] for row in record.of_kind("checkpoint")]
    logged_at = [row["step"] for row in rows]
    for before, row in zip([0, *logged_at[:-1]], rows, strict=True):
        saves = sum(before <= step < row["step"] for step in saved_at)
        assert row["tensors_to_host"] <= 1 + 3 * saves


@pytest.mark.slow
def test_parts_of_a_batch_are_one_graph_and_the_same_on_any_device(
    shards: Path, tmp_path: Path
) -> None:
    """SAM on half of each batch, in two microbatches of two slices: still two graphs in all."""
    parts = ["optim.sam_ascent_fraction=0.5", "optim.sam_microbatches=2", "optim.accumulation=2"]
    parts += ["data.num_streams=2", "optim.epochs=1", "data.repeats=2", "data.batch_size=16"]
    for name, options in (("two", xla(2)), ("cpu", PLAIN_CPU)):
        folder = tmp_path / name
        command = [*arguments(shards), *parts, *options, f"run_dir={folder}"]
        run(command, tmp_path / "log.txt")
    (end,) = read_record(tmp_path / "two").of_kind("end")
    assert end["compilations"] == 2
    assert end["fallbacks"] == {}
    assert len(losses(tmp_path / "cpu")) == 7
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "cpu"), rtol=1e-4)
    assert "SAM ascends on 50.0% of each batch" in (tmp_path / "log.txt").read_text()


def test_a_killed_run_on_four_devices_ends_as_if_it_had_not_been(
    shards: Path, on_four: Path, tmp_path: Path
) -> None:
    """And with the program that it began with: where programs are cached, no restart compiles."""
    folder = tmp_path / "killed"
    command = [*arguments(shards), *xla(4), f"run_dir={folder}"]
    run_killed_at(command, folder, random.randint(2, 28), tmp_path / "log.txt")
    run(command, tmp_path / "log.txt", XLA_FLAGS=dumping_to(tmp_path / "programs"))
    began, resumed = step_program(on_four.parent / "programs"), step_program(tmp_path / "programs")
    is_the_same = began == resumed  # asserted alone: pytest would compare megabytes line by line
    assert is_the_same
    assert samples(folder) == samples(on_four)
    assert losses(folder) == losses(on_four)
    assert_bit_equal(final_state(folder), final_state(on_four))
    assert read_record(folder).of_kind("end")[0]["compilations"] == 2


@pytest.mark.slow
@pytest.mark.timeout(3600)  # bfloat16 is emulated on a CPU
def test_a_killed_run_in_bfloat16_ends_as_if_it_had_not_been(shards: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [*arguments(shards), *xla(2), "model.compute_dtype=bfloat16", "optim.epochs=1.5"]
    run([*command, f"run_dir={whole}"], tmp_path / "log.txt")
    command.append(f"run_dir={killed}")
    run_killed_at(command, killed, random.randint(6, 9), tmp_path / "log.txt")
    run(command, tmp_path / "log.txt")
    assert read_record(killed).headers[1]["resumed_from"] == 5
    assert losses(killed) == losses(whole)
    assert_bit_equal(final_state(killed), final_state(whole))


def test_pretrain_goes_on_from_the_cpu_to_xla_and_back(shards: Path, tmp_path: Path) -> None:
    """Killed on each; checkpoints do not depend on devices. The tolerance is that of whole runs."""
    whole, folder, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log.txt"
    command = ["pretrain", "model.compute_dtype=float32"]
    command += [*arguments(shards)[len(RECIPE) :], "optim.lr_batch=null"]
    command += ["trainer.trace_samples=true", "trainer.tensorboard=false"]
    run([*command, *PLAIN_CPU, f"run_dir={whole}"], log)
    command.append(f"run_dir={folder}")
    run_killed_at([*command, *PLAIN_CPU], folder, 8, log)
    run_killed_at([*command, *xla(2)], folder, 18, log)
    run([*command, *PLAIN_CPU], log)
    headers = read_record(folder).headers
    assert [header["num_devices"] for header in headers] == [1, 2, 1]
    assert 5 <= headers[1]["resumed_from"] < headers[2]["resumed_from"] < 30
    assert samples(folder) == samples(whole)
    assert len(losses(folder)) == 30
    np.testing.assert_allclose(losses(folder), losses(whole), rtol=1e-4)


@pytest.mark.parametrize("fsdp", [1, 2])
def test_a_foreign_module_trains_with_the_strategy(tmp_path: Path, fsdp: int) -> None:
    """Automatic optimization, a timm model, Lightning's own checkpoint; equal to plain CPU."""
    environment = {**os.environ, "XLA_FLAGS": UNOPTIMISED}
    command = [sys.executable, "-m", "tests.foreign_module"]
    outputs = [
        subprocess.run(
            [
                *command,
                device,
                str(fsdp),
                str(tmp_path / device),
            ],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        for device in ("xla", "cpu")
    ]
    for output in outputs:
        assert output.returncode == 0, output.stderr
    on_xla, on_cpu = ([float(x) for x in o.stdout.split("losses:")[1].split()] for o in outputs)
    assert len(on_xla) == 6
    np.testing.assert_allclose(on_xla, on_cpu, rtol=1e-4)
