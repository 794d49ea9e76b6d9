"""Checkpoints in the background, and the rules by which a run goes on from one."""

import math
import resource
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nfnets_xla import checkpoint, sources
from nfnets_xla.commands.checkpoint import held_out
from nfnets_xla.compose import composed, to_run
from nfnets_xla.data.order import Order
from nfnets_xla.history import best_of, evaluations, refuse_half_a_history, take_history
from nfnets_xla.prepare import make_plan
from nfnets_xla.record import RecordWriter, read_record
from nfnets_xla.resume import Beginning, RunState, find_resume
from nfnets_xla.saves import Saves
from tests.runs import PLAIN_CPU, RECIPE, SMALL, losses, reach, run, run_killed_at, start

FORMS = {"model": {"w": torch.arange(6.0)}}
ORDER = Order(
    np.array([3, 2, 2]), seed=0, num_streams=2, unique_per_step=4, window_shards=2, epochs=2
)
IDENTITY = {"seed": 1, "model": {"name": "nfnet_mini_f0"}}
RANDOM = Beginning({"init_from": None}, lambda: None)


def test_the_step_waits_for_the_copy_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next copy for the checkpoint before, so that one is in memory, not two."""
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
    """A file lies where the folder of step 2 should be."""
    (tmp_path / "step-00000002").write_text("in the way")
    left = []
    with Saves(str(tmp_path), keep=1, every_hours=None) as saves:
        for step, better in ((1, 1), (2, 2), (3, 2), (4, 4), (5, 4), (6, 5)):
            saves.better = better
            saves.save(lambda: (step, FORMS, {}))  # noqa: B023 (called at once)
            saves.wait()
            left.append(checkpoint.steps(tmp_path))
    assert left == [[1], [1], [3, 1], [4], [5, 4], [6, 5]]


def test_a_prune_that_fails_is_no_lost_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint, "prune", fails)
    with Saves(str(tmp_path), keep=1, every_hours=None) as saves:
        saves.save(lambda: (1, FORMS, {}))
    assert saves.written()[0].fault is None
    assert checkpoint.steps(tmp_path) == [1]


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
    shutil.rmtree(tmp_path / "step-00000003")
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


def test_where_another_run_saves_is_what_is_named(tmp_path: Path) -> None:
    """Not a run_dir that there may not be yet."""
    root, run_dir = str(tmp_path / "shared"), tmp_path / "run"
    checkpoint.save(root, 1, FORMS, RunState(IDENTITY, ORDER, {}, 0.0).at(1))
    other = {**IDENTITY, "seed": 2}, RANDOM, ORDER, {}
    for given, part in (
        ("auto", r" holds another run \(seed: 1 -> 2\)"),
        ("never", " holds a run, and resume is never"),
    ):
        with pytest.raises(ValueError, match=f"^{root}{part}: choose another trainer.checkpoint_"):
            find_resume(given, root, run_dir, *other, print)


def test_a_run_ends_where_another_one_saves(tmp_path: Path, data: list[str]) -> None:
    """Which came while it trained: both had found the folder empty."""
    log, shared, folder = tmp_path / "log.txt", tmp_path / "shared", tmp_path / "run"
    arguments = [*RECIPE, *data, *SMALL, *PLAIN_CPU, "optim.epochs=50", f"run_dir={folder}"]
    arguments += [f"trainer.checkpoint_dir={shared}"]
    (process,) = reach(lambda: [start(arguments, log)], folder, 1, log, "samples")
    checkpoint.save(shared, 999, FORMS, RunState({"seed": 1}, ORDER, {}, 0.0).at(999))
    assert process.wait() == 2, log.read_text()
    assert f"nfnets-xla: {shared}/step-00000999 is of another run (" in log.read_text()
    assert checkpoint.latest(shared)[0] is not None
    process = start(arguments, log)
    assert process.wait() == 2, log.read_text()
    assert f"nfnets-xla: {shared} holds another run (" in log.read_text()


def test_a_folder_that_is_behind_where_it_is_to_begin_is_refused(tmp_path: Path) -> None:
    state = RunState(IDENTITY, ORDER, {}, seconds_before=0.0)
    for name, step in (("a", 3), ("b", 2)):
        checkpoint.save(tmp_path / name / "checkpoints", step, FORMS, state.at(step))
    own, known = tmp_path / "b", (IDENTITY, RANDOM, ORDER, {})
    with pytest.raises(ValueError, match=r"run_dir already holds .*step-00000002: nothing is"):
        find_resume(str(tmp_path / "a"), str(own / "checkpoints"), own, *known, print)


def test_a_run_that_was_saved_does_not_begin_anew(tmp_path: Path) -> None:
    """Where its checkpoints are not mounted, or all damaged; one that never was saved does."""
    root, known = str(tmp_path / "checkpoints"), (IDENTITY, RANDOM, ORDER, {"torch": "1"})
    with RecordWriter(tmp_path, {"resumed_from": 0}) as record:
        record.write("train", 1, loss=1.0)
        assert find_resume("auto", root, tmp_path, *known, print) is None
        record.write("checkpoint", 2)
    saved = rf"{tmp_path} holds a run that was saved up to step 2, and {root} lacks it"
    with pytest.raises(ValueError, match=saved):
        find_resume("auto", root, tmp_path, *known, print)
    checkpoint.save(root, 2, FORMS, RunState(IDENTITY, ORDER, {"torch": "1"}, 0.0).at(2))
    assert find_resume("auto", root, tmp_path, *known, print) is not None
    checkpoint.save(root, 1, FORMS, RunState(IDENTITY, ORDER, {"torch": "1"}, 0.0).at(1))
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000002")
    said: list[str] = []
    assert find_resume("auto", root, tmp_path, *known, said.append) is not None
    assert said[0].endswith("lacks it: steps after 1 are computed again")
    (tmp_path / "checkpoints" / "step-00000001" / "state.json").unlink()
    with pytest.raises(ValueError, match=saved):
        find_resume("auto", root, tmp_path, *known, print)


def test_checkpoints_that_lie_elsewhere_are_not_forgotten(tmp_path: Path) -> None:
    """Of a start that was killed before it could record its first one."""
    root, elsewhere = str(tmp_path / "run" / "checkpoints"), str(tmp_path / "elsewhere")
    config = {"trainer": {"checkpoint_dir": elsewhere}}
    with RecordWriter(tmp_path / "run", {"resumed_from": 0, "config": config}) as record:
        record.write("train", 1, loss=1.0)
    known = (IDENTITY, RANDOM, ORDER, {"torch": "1"})
    assert find_resume("auto", root, tmp_path / "run", *known, print) is None
    checkpoint.save(elsewhere, 2, FORMS, RunState(IDENTITY, ORDER, {"torch": "1"}, 0.0).at(2))
    with pytest.raises(ValueError, match=f"saved up to step 2, and {root} lacks it"):
        find_resume("auto", root, tmp_path / "run", *known, print)
    found = find_resume("auto", elsewhere, tmp_path / "run", *known, print)
    assert found is not None


def test_half_a_history_is_no_beginning(tmp_path: Path) -> None:
    """Of a copy that was interrupted, and is not asked for any more."""
    refuse_half_a_history(tmp_path)
    for name in ("ledger-1.bin", "run-2.jsonl", "other.txt"):
        (tmp_path / name).touch()
    with pytest.raises(
        ValueError, match=r"holds ledger-1\.bin, run-2\.jsonl and no run-1\.jsonl, h"
    ):
        refuse_half_a_history(tmp_path)
    (tmp_path / "run-1.jsonl").touch()
    refuse_half_a_history(tmp_path)


def test_where_a_run_that_began_from_another_goes_on(tmp_path: Path) -> None:
    """From its own checkpoints once it has some; before that, where its history is told."""
    source, branch = tmp_path / "source", tmp_path / "branch"
    root, known = str(branch / "checkpoints"), (IDENTITY, RANDOM, ORDER, {"torch": "1"})
    state, given = RunState(IDENTITY, ORDER, {"torch": "1"}, 0.0), str(source)
    said: list[str] = []
    checkpoint.save(source / "checkpoints", 2, FORMS, state.at(2))
    start = sources.find(source)
    assert start is not None

    def step() -> int:
        found = find_resume(given, root, branch, *known, said.append)
        return -1 if found is None else found.step

    with RecordWriter(branch, {"resumed_from": 0}) as record:  # a start that died early
        record.write("train", 1, loss=1.0)
        with pytest.raises(ValueError, match="another start, which lacks the steps up to 2"):
            step()
        record.write("train", 2, loss=1.0)
        assert step() == 2  # nothing is beside the checkpoint
    with RecordWriter(source, {"resumed_from": 0}) as record:
        record.write("train", 1, loss=3.0)
        record.write("train", 2, loss=2.0)
        with pytest.raises(ValueError, match="another start"):
            step()
        (branch / "run-1.jsonl").unlink()
        take_history(start, branch)
        record.write("train", 3, loss=1.0)
    assert step() == 2
    checkpoint.save(root, 3, FORMS, state.at(3))
    assert step() == 3
    # The other run has gone on since; it is where this one was begun, and no longer its business.
    checkpoint.save(source / "checkpoints", 5, FORMS, state.at(5))
    assert step() == 3
    given = f"{source}/checkpoints/step-00000005"  # but this asks for more than there is
    with pytest.raises(ValueError, match="run_dir already holds"):
        step()
    given = str(source)
    shutil.rmtree(source)
    assert step() == 3
    assert "no checkpoint any more; taken is" in said[-2]


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
    assert evaluations(record, "ema") == {6: 0.25}  # a kill may have come between the two
    assert evaluated == {2: math.inf, 4: 0.5, 6: math.inf}
    assert "not finite, on 3 images" in held_out(tmp_path, 2, "raw")["held out"]
    start = checkpoint.load(save_at(tmp_path, 6, {}))
    assert best_of(start, evaluated, [2, 4, 6]) == (4, 0.5)  # of an older release
    assert best_of(start, {2: math.inf}, [2, 6]) is None
    assert best_of(start, {}, [6]) is None


def save_at(root: Path, step: int, state: dict[str, Any]) -> Path:
    checkpoint.save(root, step, FORMS, state)
    return root / f"step-{step:08d}"


def test_a_checkpoint_says_which_is_the_best(tmp_path: Path) -> None:
    """Not one that could not be written (4); and wherever the record is (nowhere, the last)."""
    start = checkpoint.load(save_at(tmp_path, 6, {"best": {"step": 2, "loss": 0.7}}))
    assert best_of(start, {2: 0.7, 4: 0.5}, [2, 6]) == (2, 0.7)
    assert best_of(start, {2: 0.7, 6: 0.6}, [2, 6]) == (6, 0.6)
    assert best_of(start, {}, [2, 6]) == (2, 0.7)
    none = checkpoint.load(save_at(tmp_path, 3, {"best": None}))
    assert best_of(none, {2: 0.7}, [2, 3]) is None
    # Of another folder, from which this one was begun, or written before anyone kept the best.
    assert best_of(start, {2: 0.7, 6: 0.9}, [6]) == (6, 0.9)
    assert best_of(start, {}, [6]) is None
    older = checkpoint.load(save_at(tmp_path, 7, {}))
    assert best_of(older, {2: 0.7, 4: 0.8, 6: 0.9}, [4, 6, 7]) == (4, 0.8)
