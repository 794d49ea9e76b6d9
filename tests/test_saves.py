"""Checkpoints in the background, and the rules by which a run goes on from one."""

import math
import os
import resource
import stat
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nfnets_xla import checkpoint
from nfnets_xla.checkpoint_cli import held_out
from nfnets_xla.cli import main
from nfnets_xla.compose import composed, to_run
from nfnets_xla.data.order import Order
from nfnets_xla.history import evaluations
from nfnets_xla.hooks import Checkpointer
from nfnets_xla.prepare import make_plan
from nfnets_xla.record import RecordWriter, read_record
from nfnets_xla.resume import Beginning, RunState, find_resume
from nfnets_xla.saves import Saves
from tests.runs import PLAIN_CPU, RECIPE, SMALL, losses, run, run_killed_at

FORMS = {"model": {"w": torch.arange(6.0)}}
ORDER = Order(
    np.array([3, 2, 2]), seed=0, num_streams=2, unique_per_step=4, window_shards=2, epochs=2
)
IDENTITY = {"seed": 1, "model": {"name": "nfnet_mini_f0"}}
RANDOM = Beginning({"init_from": None}, lambda: None)


def test_the_step_waits_for_the_copy_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next checkpoint for the one before, so that one copy is in memory, not two."""
    slow, write = threading.Event(), checkpoint.save

    def slow_save(*arguments: object) -> int:
        slow.wait()
        return write(*arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(checkpoint, "save", slow_save)
    with Saves(str(tmp_path), keep=2, every_hours=None) as saves:
        saves.save(lambda: (1, FORMS, {}))
        assert saves.written() == []
        threading.Timer(0.3, slow.set).start()
        saves.save(lambda: (2, FORMS, {}))
        saves.wait()
        first, second = saves.written()
    assert [first.step, second.step] == checkpoint.steps(tmp_path)[::-1]
    assert first.stall_seconds < 0.1 < second.stall_seconds
    assert first.write_seconds > 0.25
    assert first.bytes == second.bytes > 24


def test_a_checkpoint_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    """A file lies where the second one's folder should be."""
    (tmp_path / "step-00000002").write_text("in the way")
    with Saves(str(tmp_path), keep=2, every_hours=None) as saves:
        for step in (1, 2, 3):
            saves.save(lambda: (step, FORMS, {}))  # noqa: B023 (called at once)
        saves.wait()
        one, two, three = saves.written()
    assert (one.fault, three.fault) == (None, None)
    assert two.fault is not None
    assert "step-00000002" in two.fault
    assert checkpoint.latest(tmp_path)[0] is not None


def test_a_full_disk_is_no_checkpoint(tmp_path: Path) -> None:
    """Where files may not grow, safetensors raises neither OSError nor ValueError."""
    large = {"model": {"w": torch.zeros(100_000)}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Saves(str(tmp_path), keep=2, every_hours=None) as saves:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            saves.save(lambda: (1, large, {}))
            saves.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        saves.save(lambda: (2, large, {}))
        saves.wait()
        one, two = saves.written()
    assert "SafetensorError" in str(one.fault)
    assert two.fault is None
    assert checkpoint.steps(tmp_path) == [2]  # what there was of the first is gone


def resume(
    tmp_path: Path, identity: dict, order: Order, said: list[str], beginning: Beginning = RANDOM
) -> int:
    known = identity, beginning, order, {"torch": "2"}
    found = find_resume("auto", str(tmp_path), tmp_path, *known, said.append)
    assert found is not None
    return found.step


def test_when_a_run_goes_on(tmp_path: Path) -> None:
    state = RunState(IDENTITY, ORDER, {"torch": "1"}, seconds_before=5.0)
    for step in (1, 2):
        checkpoint.save(tmp_path, step, FORMS, state.at(step))
    assert checkpoint.load(tmp_path / "step-00000002").state["samples"] == 8
    assert 5 <= checkpoint.load(tmp_path / "step-00000002").state["seconds"] < 10
    said: list[str] = []
    assert resume(tmp_path, IDENTITY, ORDER, said) == 2
    assert "other versions (torch: 1 -> 2)" in said[0]

    other = {**IDENTITY, "model": {"name": "nfnet_mini_f1"}}
    with pytest.raises(
        ValueError, match=r"another run \(model.name: nfnet_mini_f0 -> nfnet_mini_f1"
    ):
        resume(tmp_path, other, ORDER, said)
    elsewhere = Beginning({"init_from": "b"}, lambda: "d2")
    assert resume(tmp_path, IDENTITY, ORDER, said, elsewhere) == 2  # it was not recorded
    begun = Beginning({"init_from": "a"}, lambda: "d1").state()
    checkpoint.save(tmp_path, 3, FORMS, RunState(IDENTITY, ORDER, {"torch": "1"}, 5.0, begun).at(3))
    with pytest.raises(ValueError, match=r"another run \(initial_weights: d1 -> d2\)"):
        resume(tmp_path, IDENTITY, ORDER, said, elsewhere)
    moved = Beginning({"init_from": "b"}, lambda: "d1")
    gone = Beginning({"init_from": "a"}, lambda: pytest.fail("nobody need look at them"))
    assert resume(tmp_path, IDENTITY, ORDER, said, moved) == 3
    assert resume(tmp_path, IDENTITY, ORDER, said, gone) == 3
    checkpoint.discard(tmp_path, 3)
    said.clear()
    shuffled_otherwise = Order(ORDER.counts, 1, 2, 4, 2, 2)
    with pytest.raises(ValueError, match="another order of the same samples"):
        resume(tmp_path, IDENTITY, shuffled_otherwise, said)

    weights = tmp_path / "step-00000002" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    said.clear()
    assert resume(tmp_path, IDENTITY, ORDER, said) == 1
    assert "step-00000002 is not a complete checkpoint: model.safetensors has" in said[0]
    assert said[0].startswith("warning: ")


def test_a_run_is_known_by_what_it_begins_from_wherever_that_lies(
    tmp_path: Path, data: list[str]
) -> None:
    def beginning(begin: Path) -> Beginning:
        given = [*data, *PLAIN_CPU, "run_dir=R", "optim.epochs=50", f"model.init_from={begin}"]
        return make_plan(to_run(composed("finetune_sam_demo", given))).beginning

    one, other = tmp_path / "a" / "run", tmp_path / "b" / "run"
    checkpoint.save(one / "checkpoints", 1, FORMS, {})
    checkpoint.save(other / "checkpoints", 1, {"model": {"w": torch.ones(6)}}, {})
    first = beginning(one).state()
    (difference,) = beginning(other).differs_from(first)
    assert difference.startswith("initial_weights: ")
    assert not beginning(one / "checkpoints/step-00000001/model.safetensors").differs_from(first)
    assert not beginning(one.rename(tmp_path / "moved")).differs_from(first)
    assert not beginning(one).differs_from(first)  # under its name, where nothing is any more


def test_a_record_that_cannot_be_kept_costs_no_checkpoint(tmp_path: Path) -> None:
    """Step 1 is saved; saved again, after a start from it, the disk is full for the record."""
    checkpoint.save(tmp_path, 1, FORMS, {})

    def full() -> None:
        raise OSError(28, "No space left on device")

    with Saves(str(tmp_path), keep=1, every_hours=None, start=1, before=full) as saves:
        saves.save(lambda: (1, FORMS, {}))
        saves.wait()
        (written,) = saves.written()
    assert "No space left" in str(written.fault)
    found, _ = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.step == 1


def test_what_the_last_start_had_no_time_for_is_done(tmp_path: Path, data: list[str]) -> None:
    """Killed when its last step was saved, before the evaluation after it: that is made up for,
    the best checkpoint is kept, and a run that is finished stays so."""
    log, folder = tmp_path / "log.txt", tmp_path / "run"
    arguments = [*RECIPE, *data, *SMALL, *PLAIN_CPU, "optim.epochs=0.5"]
    arguments += ["trainer.checkpoint_every=null", "trainer.eval_every=2", f"run_dir={folder}"]
    arguments += ["trainer.keep_best=true", "trainer.keep_checkpoints=1"]
    run_killed_at(arguments, folder, 3, log, kind="samples")
    run(arguments, log)
    record = read_record(folder)
    evaluated = {row["step"]: row["loss"] for row in record.of_kind("eval")}
    assert sorted(evaluated) == [2, 4]
    best = min(evaluated, key=lambda step: evaluated[step])
    assert sorted({best, 4}, reverse=True) == checkpoint.steps(folder / "checkpoints")
    assert [row["step"] for row in record.of_kind("train")] == [1, 2, 3, 4]
    assert all(row["stall_seconds"] < 5 for row in record.of_kind("checkpoint"))

    end = folder / f"run-{len(record.headers)}.jsonl"
    lines = end.read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"kind":"eval"' not in line and '"kind":"end"' not in line]
    end.write_text("".join(kept))  # as if it had been killed there
    run(arguments, log)
    again = read_record(folder)
    assert {row["step"]: row["loss"] for row in again.of_kind("eval")}[4] == evaluated[4]
    assert losses(folder) == [row["loss"] for row in record.of_kind("train")]
    assert len(again.of_kind("end")) == 1
    run(arguments, log)
    assert log.read_text().splitlines()[-1].endswith("holds this run, finished")


def test_an_evaluation_that_was_not_finite_is_worse_than_any(tmp_path: Path) -> None:
    """A record has null for it."""
    with RecordWriter(tmp_path, {"resumed_from": 0}) as record:
        for step, loss in ((2, math.nan), (4, 0.5), (6, math.inf)):
            record.write("eval", step, weights="raw", loss=loss, top1=0.1, images=3)
    evaluated = evaluations(tmp_path, 6)
    assert evaluated == {2: math.inf, 4: 0.5, 6: math.inf}
    assert "not finite, on 3 images" in held_out(tmp_path, 2, "raw")["held out"]
    anything: Any = None
    for known, best in ((evaluated, 4), ({2: math.inf}, None), ({}, None)):
        saves = Saves(str(tmp_path), keep=1, every_hours=None)
        Checkpointer(
            saves, anything, anything, every=None, total_steps=8, state=anything, keep_best=True,
            evaluated=known, say=print,
        )  # fmt: skip
        assert saves.best == best


def test_the_checkpoint_commands(
    tmp_path: Path,
    data: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flushed, fsync = [], os.fsync

    def noted(descriptor: int) -> None:
        flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    folder, out = tmp_path / "run", tmp_path / "f0.safetensors"
    arguments = [*RECIPE, *data, *SMALL, *PLAIN_CPU, "optim.epochs=0.2"]
    main([*arguments, "optim.warmup_steps=1", "trainer.checkpoint_every=1", f"run_dir={folder}"])
    # A machine that stops must not leave a checkpoint without the steps before it.
    saved = flushed.index(folder / "checkpoints" / "step-00000001")
    assert {folder / "run-1.jsonl", folder / "ledger-1.bin", folder} <= set(flushed[:saved])
    capsys.readouterr()
    main(["checkpoint", "verify", str(folder)])
    assert capsys.readouterr().out.count("verified; ema, model, momentum;") == 2
    main(["checkpoint", "show", str(folder)])
    shown = capsys.readouterr().out
    assert "step               2\n" in shown
    assert "samples            20\n" in shown
    assert "NOT FINITE" not in shown
    main(["checkpoint", "export", str(folder), str(out), "--weights", "ema", "--to", "timm"])
    assert "nfnet_mini_f0, 5 classes, in timm's names" in capsys.readouterr().out
    assert not stat.S_IMODE(out.stat().st_mode) & stat.S_IWOTH

    newest = folder / "checkpoints" / "step-00000002"
    (newest / "state.json").unlink()
    for damaged in (folder, newest):
        with pytest.raises(SystemExit) as stopped:
            main(["checkpoint", "verify", str(damaged)])
        assert stopped.value.code == 1
        assert "step-00000002 is not a complete checkpoint: state.json is missing" in (
            capsys.readouterr().out
        )
    for command in ("show", "verify"):
        with pytest.raises(SystemExit) as stopped:
            main(["checkpoint", command, str(tmp_path / "nothing")])
        assert stopped.value.code == 2
        assert "holds no checkpoint" in capsys.readouterr().err
