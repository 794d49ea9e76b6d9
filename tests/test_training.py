"""Whole runs on plain CPU: killed and resumed, every sample once, consistent evaluations."""

import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from nfnets_xla import checkpoint
from nfnets_xla.cli import main
from nfnets_xla.data.index import build_index
from nfnets_xla.data.pack import pack_samples
from nfnets_xla.data.shards import ShardIndex
from nfnets_xla.ledger import audit
from nfnets_xla.record import read_record
from tests.conftest import IMAGES
from tests.data.images import samples as image_samples
from tests.runs import (
    PLAIN_CPU,
    RECIPE,
    SMALL,
    assert_bit_equal,
    final_state,
    losses,
    run,
    run_killed_at,
    samples,
    start,
)


@pytest.mark.parametrize(
    ("epochs", "steps", "dtype"),
    [
        (0.25, 2, "float32"),
        (1.5, 10, "float32"),
        pytest.param(1.5, 10, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_ends_as_if_it_had_not_been(
    tmp_path: Path, data: list[str], epochs: float, steps: int, dtype: str
) -> None:
    """With SAM, EMA, dropout, stochastic depth and augmentation. 100 images, 16 rows a step.

    It is killed twice: during a step, and right after a checkpoint, whose step is not computed
    again and so must have written its numbers by then.
    """
    arguments = [*RECIPE, *data, *SMALL, *PLAIN_CPU, f"optim.epochs={epochs}"]
    arguments += ["optim.warmup_steps=1", "trainer.checkpoint_every=1", "trainer.eval_every=3"]
    # The short one has a worker, which has to end with its run.
    arguments += [f"model.compute_dtype={dtype}", f"data.workers={int(epochs < 1)}"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    log = tmp_path / "log.txt"
    run([*arguments, f"run_dir={whole}"], log)
    middle = random.randint(1, steps // 2)
    run_killed_at([*arguments, f"run_dir={killed}"], killed, middle, log)
    later = random.randint(steps // 2, steps - 1)
    run_killed_at([*arguments, f"run_dir={killed}"], killed, later, log, kind="checkpoint")
    run([*arguments, f"run_dir={killed}"], log)

    record = read_record(killed)
    assert len(record.headers) == 3
    assert record.headers[0]["num_steps"] == steps
    assert samples(killed) == samples(whole)
    shown = [row for rows in samples(killed) for row in rows]
    assert len(shown) == len(set(shown)) == round(epochs * IMAGES)  # no (epoch, id) twice
    per_epoch = Counter(epoch for epoch, _ in shown)
    assert per_epoch == {0.25: {0: 25}, 1.5: {0: 100, 1: 50}}[epochs]
    assert losses(killed) == losses(whole)
    assert_bit_equal(final_state(killed), final_state(whole))


def test_a_run_begins_from_an_earlier_checkpoint_in_a_folder_of_its_own(
    tmp_path: Path, data: list[str]
) -> None:
    """The steps before it come along: the audit and the record cover the whole run."""
    whole, branch, log = tmp_path / "whole", tmp_path / "branch", tmp_path / "log.txt"
    arguments = [*RECIPE, *data, *SMALL, *PLAIN_CPU, "optim.epochs=0.6"]
    arguments += ["trainer.checkpoint_every=1", "trainer.keep_checkpoints=9"]
    run([*arguments, f"run_dir={whole}"], log)
    before = sorted(path.stat().st_mtime_ns for path in whole.rglob("*"))
    third = whole / "checkpoints" / "step-00000003"
    for _ in range(2):  # repeated, it resumes from its own; here it reports that it has finished
        run([*arguments, f"run_dir={branch}", f"resume={third}"], log)
    assert before == sorted(path.stat().st_mtime_ns for path in whole.rglob("*"))
    assert [header["resumed_from"] for header in read_record(branch).headers] == [0, 3]
    assert checkpoint.steps(branch / "checkpoints")[-1] == 3  # the first is its own already
    assert samples(branch) == samples(whole)
    assert losses(branch) == losses(whole)
    assert_bit_equal(final_state(branch), final_state(whole))
    assert audit(branch).report()[-1] == "every sample exactly once"
    linked = tmp_path / "linked"
    linked.symlink_to(whole)
    for name in (third, linked / "checkpoints" / third.name):
        process = start([*arguments, f"run_dir={whole}", f"resume={name}"], log)
        assert process.wait() == 2
        assert "already holds" in log.read_text().splitlines()[-1]
    # A finished run leaves nothing to compute, but all of it must be kept.
    copy = [*arguments, f"run_dir={tmp_path / 'copy'}", f"resume={whole}"]
    run(copy, log)
    whole.rename(tmp_path / "gone")
    run(copy, log)
    assert log.read_text().splitlines()[-1].endswith("copy holds this run, finished")
    assert_bit_equal(final_state(tmp_path / "copy"), final_state(branch))


def test_workers_have_no_effect_and_repeats_divide_the_epochs(
    tmp_path: Path, data: list[str]
) -> None:
    """Two views of each image, by this process and by two workers: the same run both times."""
    arguments = [*RECIPE, *data, *SMALL, *PLAIN_CPU, "optim.epochs=1", "data.repeats=2"]
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        run([*arguments, f"data.workers={workers}", f"run_dir={folder}"], tmp_path / "log.txt")
    assert losses(tmp_path / "0") == losses(tmp_path / "2")
    assert_bit_equal(final_state(tmp_path / "0"), final_state(tmp_path / "2"))
    shown = [row for rows in samples(tmp_path / "0") for row in rows]
    assert len(shown) == len(set(shown)) == IMAGES // 2  # one epoch of views: half of the images


def test_evaluating_a_runs_weights_gives_its_last_evaluation(
    tmp_path: Path, data: list[str]
) -> None:
    trained = tmp_path / "run"
    short = ["optim.epochs=0.5", f"run_dir={trained}"]
    run([*RECIPE, *data, *SMALL, *PLAIN_CPU, *short], tmp_path / "log.txt")
    last = {row["weights"]: row for row in read_record(trained).of_kind("eval")[-2:]}
    assert last["raw"]["images"] == last["ema"]["images"] == 21
    for weights in ("raw", "ema"):
        again = tmp_path / weights
        arguments = ["evaluate_demo", f"model.init_from={trained}", f"model.init_weights={weights}"]
        evaluate = [option for option in SMALL if option.startswith("data.")]
        run([*arguments, data[1], *evaluate, *PLAIN_CPU, f"run_dir={again}"], tmp_path / "log.txt")
        (row,) = read_record(again).of_kind("eval")
        for name in ("loss", "top1", "top5", "images"):
            assert row[name] == pytest.approx(last[weights][name], rel=1e-6)


def test_a_run_killed_before_it_says_that_it_has_ended_is_not_evaluated_twice(
    tmp_path: Path, data: list[str]
) -> None:
    """Its last evaluation follows the last step, which is no multiple of `eval_every`."""
    arguments = [*RECIPE, *data, *SMALL, *PLAIN_CPU, "optim.epochs=0.5", f"run_dir={tmp_path}"]
    run(arguments, tmp_path / "log.txt")
    evaluated = read_record(tmp_path).of_kind("eval")
    (file,) = tmp_path.glob("run-*.jsonl")
    *rows, end = file.read_text().splitlines(keepends=True)
    assert json.loads(end)["kind"] == "end"
    file.write_text("".join(rows))
    run(arguments, tmp_path / "log.txt")
    record = read_record(tmp_path)
    assert len(record.of_kind("end")) == 1
    assert record.of_kind("eval") == evaluated


def test_fine_tuning_starts_from_the_pre_trained_body(tmp_path: Path, data: list[str]) -> None:
    """A learning rate of almost 0 leaves the body where the first run left it."""
    first, second = tmp_path / "first", tmp_path / "second"
    common = [*data, *SMALL, *PLAIN_CPU, "optim.epochs=0.5"]
    run([*RECIPE, *common, f"run_dir={first}"], tmp_path / "log.txt")
    tiny = ["optim.peak_lr=1e-12", f"model.init_from={first}", "data.num_classes=9"]
    run([*RECIPE, *common, *tiny, f"run_dir={second}"], tmp_path / "log.txt")
    before, after = final_state(first), final_state(second)
    assert after["model/head.weight"].shape[0] == 9
    body = [name for name in before if name.startswith("model/") and "head" not in name]
    for name in body:
        assert (before[name] - after[name]).abs().max() < 1e-6, name
    assert "(new classifier)" in (tmp_path / "log.txt").read_text()


def test_a_timm_model_trains_and_is_evaluated_as_an_nfnet_is(
    tmp_path: Path, data: list[str]
) -> None:
    """SAM, clipping, averaging and keyed dropout for a ViT; running it twice gives the same. It is
    evaluated at another size than it was made for."""
    sizes = ["data.image_size=32", "data.eval_image_size=48", "optim.epochs=0.5"]
    peer = ["model.name=timm/test_vit", "model.drop_path_rate=0", *sizes]
    for name in ("one", "two"):
        run(
            [*RECIPE, *data, *SMALL, *PLAIN_CPU, *peer, f"run_dir={tmp_path / name}"],
            tmp_path / "log",
        )
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    record = read_record(tmp_path / "one")
    first = record.headers[0]
    assert first["macs_per_image"] > 0
    for key, given in (("fingerprint", data[0]), ("held_out", data[1])):
        assert first[key] == ShardIndex.load(given.partition("=")[2]).fingerprint
    last = {row["weights"]: row for row in record.of_kind("eval")[-2:]}
    arguments = ["evaluate_demo", *SMALL[:6], *sizes[:2], f"model.init_from={tmp_path / 'one'}"]
    arguments += ["model.name=timm/test_vit", data[1], *PLAIN_CPU, f"run_dir={tmp_path / 'eval'}"]
    run([*arguments, "model.init_weights=ema"], tmp_path / "log")
    (row,) = read_record(tmp_path / "eval").of_kind("eval")
    assert row["loss"] == pytest.approx(last["ema"]["loss"], rel=1e-6)


def test_all_that_a_run_writes_is_the_users_own(tmp_path: Path, data: list[str]) -> None:
    """Record, ledger, curves and checkpoints have exactly the permissions of the user's umask."""
    old = os.umask(0o077)
    try:
        run_dir = tmp_path / "run"
        options = ["optim.epochs=0.25", "optim.warmup_steps=1"]
        main([*RECIPE, *data, *SMALL, *PLAIN_CPU, *options, f"run_dir={run_dir}"])
    finally:
        os.umask(old)
    written = [run_dir, *run_dir.rglob("*")]
    kinds = {path.suffix for path in written if path.is_file()}
    assert {".jsonl", ".json", ".bin", ".csv", ".safetensors"} <= kinds
    assert [path for path in written if path.stat().st_mode & 0o077] == []


def test_undecodable_samples_are_listed_and_counted_over_a_kill(tmp_path: Path) -> None:
    """Five of 100 images and one held-out image; the run stops exactly at the ceiling."""
    for name, count in (("train", IMAGES), ("held-out", 21)):
        torn = (
            (name[0] + key, image[:60] if number % 20 == 3 else image, extension, label)
            for number, (key, image, extension, label) in enumerate(image_samples(count))
        )
        pack_samples(torn, tmp_path / name, samples_per_shard=15)
        build_index(tmp_path / name)
    log, run_dir = tmp_path / "log.txt", tmp_path / "run"
    arguments = [*RECIPE, *SMALL, *PLAIN_CPU, "optim.epochs=1.5", "trainer.checkpoint_every=1"]
    arguments += [f"data.{key}={tmp_path / name}" for key, name in FOLDERS]
    lenient = [*arguments, "data.max_missed=0.1", f"run_dir={run_dir}"]
    lenient += ["trainer.keep_checkpoints=4"]
    run_killed_at(lenient, run_dir, 4, log, kind="checkpoint")
    run(lenient, log)

    record = read_record(run_dir)
    shown = [row for rows in samples(run_dir) for row in rows]
    missed = [row for row in record.of_kind("missed") if row["split"] == "train"]
    assert len(shown) == len(set(shown)) == 150 - missed[-1]["total"]
    assert sum(row["count"] for row in missed) == missed[-1]["total"]
    assert record.of_kind("end")[-1]["missed"] == missed[-1]["total"]
    assert {row["images"] for row in record.of_kind("eval")} == {20}
    listed = [
        json.loads(line)
        for file in sorted(run_dir.glob("missed-*.jsonl"))
        for line in file.read_text().splitlines()
    ]
    names = {sample["id"] for sample in listed if sample["split"] == "train"}
    assert names == {f"shard-00000{n // 15}/t{n:05d}" for n in (3, 23, 43, 63, 83)}
    assert all("60 bytes do not decode" in sample["reason"] for sample in listed)

    # With checkpoints alone, without the record that names them.
    kept, oldest = tmp_path / "kept", min((run_dir / "checkpoints").iterdir())
    shutil.copytree(oldest, kept / oldest.name)
    other = [*arguments, "data.max_missed=0.1", f"run_dir={tmp_path / 'other'}"]
    then = int(oldest.name.removeprefix("step-")) + 1
    other += [f"resume={kept}"]
    run_killed_at(other, tmp_path / "other", then, log, kind="checkpoint")
    run(other, log)
    (end,) = read_record(tmp_path / "other").of_kind("end")
    assert end["missed"] == missed[-1]["total"]

    strict = [*arguments, "data.max_missed=0.01", f"run_dir={tmp_path / 'strict'}"]
    process = start(strict, log := tmp_path / "strict.txt")
    assert process.wait() == 1
    last = log.read_text().splitlines()[-1]
    assert "2 undecodable train samples, now" in last
    assert "More than data.max_missed=0.01 of 150: restore the shards, list" in last
    assert len((tmp_path / "strict" / "missed-1.jsonl").read_text().splitlines()) == 2


FOLDERS = (("shards", "train"), ("eval_shards", "held-out"))
