"""Checkpoints in the background, and which earlier ones a later start uses."""

import math
import resource
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from nfnets_xla import checkpoint
from nfnets_xla.commands.checkpoint import held_out
from nfnets_xla.history import Past, best_of, continuation, evaluations, past_of
from nfnets_xla.record import RecordWriter, read_record
from nfnets_xla.saves import Saves, try_to_write
from tests.runs import PLAIN_CPU, RECIPE, SMALL, losses, run, run_killed_at

FORMS = {"model": {"w": torch.arange(6.0)}}


def test_the_step_waits_for_the_copy_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next copy waits for the previous checkpoint, so that memory holds one copy, not two."""
    go_on, write = {1: threading.Event(), 2: threading.Event()}, checkpoint.save

    def held(root: str, step: int, *others: Any) -> int:
        go_on[step].wait()
        return write(root, step, *others)

    def second() -> tuple[int, Any, Any]:
        assert checkpoint.steps(tmp_path) == [1]
        return 2, FORMS, {}

    monkeypatch.setattr(checkpoint, "save", held)
    with Saves(str(tmp_path), keep=2, every_hours=None) as saves:
        saves.save(lambda: (1, FORMS, {}))
        assert saves.written() == []
        threading.Timer(0.1, go_on[1].set).start()
        saves.save(second)
        threading.Timer(0.1, go_on[2].set).start()
    one, two = saves.written()  # the context has waited for the second
    assert [one.step, two.step] == [1, 2]
    assert one.bytes == two.bytes > 24


def test_the_best_stays_until_a_better_one_is_written(tmp_path: Path) -> None:
    """A file is where the folder of step 2 should be, so step 2 cannot be written."""
    (tmp_path / "step-00000002").write_text("in the way")
    left = []
    with Saves(str(tmp_path), keep=1, every_hours=None) as saves:
        for step, better in ((1, 1), (2, 2), (3, 2), (4, 4), (5, 4), (6, 5)):
            saves.better = better
            saves.save(lambda: (step, FORMS, {}))  # noqa: B023 (called at once)
            saves.wait()
            left.append(checkpoint.steps(tmp_path))
    assert left == [[1], [1], [3, 1], [4], [5, 4], [6, 5]]


def test_checkpoints_of_earlier_starts_count_until_newer_ones_are_there(tmp_path: Path) -> None:
    """A host that does not write only takes part in the copy, which needs all hosts."""
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, FORMS, {})
    for step, writes, left in ((4, True, [4, 3]), (5, False, [4, 3]), (6, True, [6, 4])):
        with Saves(str(tmp_path), keep=2, every_hours=None, start=step - 1, writes=writes) as saves:
            copied = list[int]()
            saves.save(lambda: (copied.append(step) or step, FORMS, {}))  # noqa: B023
        assert (copied, checkpoint.steps(tmp_path)) == ([step], left)


def test_where_checkpoints_can_be_written_nothing_is_left_of_the_trial(tmp_path: Path) -> None:
    try_to_write(str(tmp_path / "new"))
    assert list((tmp_path / "new").iterdir()) == []


def test_a_prune_that_fails_is_no_lost_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("nfnets_xla.saves.prune", fails)
    with Saves(str(tmp_path), keep=1, every_hours=None) as saves:
        saves.save(lambda: (1, FORMS, {}))
    assert saves.written()[0].fault is None
    assert checkpoint.steps(tmp_path) == [1]


def test_a_checkpoint_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    """A file is where the second one's folder should be."""
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
    """If files may not grow, safetensors raises neither OSError nor ValueError."""
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
    assert checkpoint.steps(tmp_path) == [2]  # the rest of the first is deleted


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
    """It was killed when its last step was saved, before the evaluation after it: the next start
    evaluates, the best checkpoint is kept, and a finished run stays finished."""
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
    saved = checkpoint.load(folder / "checkpoints" / "step-00000004").state["best"]
    assert saved == {"step": 2, "loss": evaluated[2]}  # the evaluation of 4 comes after

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
        record.write("eval", 6, weights="ema", loss=0.25, top1=0.1, images=3)
    record = read_record(tmp_path)
    evaluated = evaluations(record, "raw")
    assert evaluations(record, "ema") == {6: 0.25}  # the run may be killed between the two
    assert evaluated == {2: math.inf, 4: 0.5, 6: math.inf}
    assert "not finite, on 3 images" in held_out(tmp_path, 2, "raw")["held out"]
    start = checkpoint.load(save_at(tmp_path, 6, {}))
    assert best_of(start, evaluated, [2, 4, 6]) == (4, 0.5)  # from an older release
    assert best_of(start, {2: math.inf}, [2, 6]) is None
    assert best_of(start, {}, [6]) is None


def save_at(root: Path, step: int, state: dict[str, Any]) -> Path:
    checkpoint.save(root, step, FORMS, state)
    return root / f"step-{step:08d}"


def test_a_checkpoint_says_which_is_the_best(tmp_path: Path) -> None:
    """It is never one that could not be written (4); it needs no record (the third case)."""
    start = checkpoint.load(save_at(tmp_path, 6, {"best": {"step": 2, "loss": 0.7}}))
    assert best_of(start, {2: 0.7, 4: 0.5}, [2, 6]) == (2, 0.7)
    assert best_of(start, {2: 0.7, 6: 0.6}, [2, 6]) == (6, 0.6)
    assert best_of(start, {}, [2, 6]) == (2, 0.7)
    none = checkpoint.load(save_at(tmp_path, 3, {"best": None}))
    assert best_of(none, {2: 0.7}, [2, 3]) is None
    # From another folder, where this run began, or written before the best was kept.
    assert best_of(start, {2: 0.7, 6: 0.9}, [6]) == (6, 0.9)
    assert best_of(start, {}, [6]) is None
    older = checkpoint.load(save_at(tmp_path, 7, {}))
    assert best_of(older, {2: 0.7, 4: 0.8, 6: 0.9}, [4, 6, 7]) == (4, 0.8)


def test_a_start_goes_on_with_the_accounts_of_its_checkpoint(tmp_path: Path) -> None:
    """An older release did not count undecodable samples in it: then the record's count applies."""
    with RecordWriter(tmp_path, {"resumed_from": 0}) as writer:
        for split, count in (("train", 3), ("eval", 5)):
            writer.write("missed", 2, split=split, count=count)
        for weights, loss in (("raw", 0.5), ("ema", 0.25)):
            writer.write("eval", 2, weights=weights, loss=loss)
        writer._opened -= 10
        writer.write("train", 4, loss=1.0)
    record = read_record(tmp_path, {"resumed_from": 2})
    accounts = {"seconds": 60.0, "skipped": 1, "missed": 2, "start": "b", "resumed_from": 1}
    start = checkpoint.load(save_at(tmp_path, 2, accounts))
    assert continuation(start) == {"resumed_from": 2, "continues": "b", "since": 1}
    lost = record.seconds_lost
    assert lost > 9
    assert past_of(start, record, [2]) == Past(2, 60.0, lost, 2, 1, {2: 0.5}, (2, 0.5))
    assert past_of(start, None, [2]) == Past(2, 60.0, 0.0, 2, 1)
    checkpoint.save(tmp_path, 3, {**FORMS, "ema": FORMS["model"]}, {"seconds": 90.0})
    older = checkpoint.load(tmp_path / "step-00000003")
    assert past_of(older, record, [2, 3]) == Past(3, 90.0, lost, 3, 0, {2: 0.25}, (2, 0.25))
    assert past_of(None, record, []) == Past(lost_seconds=lost)
