"""The rules by which a run resumes from a checkpoint, begins anew, or is refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from nfnets_xla import checkpoint, sources
from nfnets_xla.compose import composed, to_run
from nfnets_xla.data.order import Order
from nfnets_xla.history import refuse_half_a_history, take_history
from nfnets_xla.prepare import make_plan
from nfnets_xla.record import RecordWriter
from nfnets_xla.resume import Beginning, RunState, adopt, find_resume, is_in
from tests.runs import PLAIN_CPU, RECIPE, SMALL, reach, start
from tests.test_checkpoint import no_manifest

FORMS = {"model": {"w": torch.arange(6.0)}}
ORDER = Order(
    np.array([3, 2, 2]), seed=0, num_streams=2, unique_per_step=4, window_shards=2, epochs=2
)
IDENTITY = {"seed": 1, "model": {"name": "nfnet_mini_f0"}}
RANDOM = Beginning({"init_from": None}, lambda: None)


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
    end = state.at(ORDER.num_steps)  # a batch that is not full
    assert (end["samples"], end["next"]) == (ORDER.total_draws, None)
    said: list[str] = []
    assert resume(tmp_path, IDENTITY, ORDER, said) == 2
    assert "other versions (torch: 1 -> 2)" in said[0]
    assert "will lack the record of the steps up to 2, which is not beside" in said[1]

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
    """The message must not name a run_dir that may not exist yet."""
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
    """The other came while this one trained: both had found the folder empty."""
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


def checkpoint_at(root: Path | str, step: int) -> Path:
    checkpoint.save(root, step, FORMS, RunState(IDENTITY, ORDER, {}, 0.0).at(step))
    return Path(root) / f"step-{step:08d}"


def test_an_earlier_checkpoint_of_its_own_is_refused_by_whatever_path(tmp_path: Path) -> None:
    """Its later steps would be replaced; the run resumes from the newest anyway."""
    root, known = tmp_path / "run" / "checkpoints", (IDENTITY, RANDOM, ORDER, {})
    earlier, newest = (str(checkpoint_at(root, step)) for step in (1, 2))
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for given in (earlier, str(tmp_path / "link" / "checkpoints" / "step-00000001")):
        with pytest.raises(ValueError, match=r"run_dir already holds .*step-00000002: nothing is"):
            find_resume(given, str(root), tmp_path / "run", *known, print)
    found = find_resume(newest, str(root), tmp_path / "run", *known, print)
    assert found is not None
    assert (found.step, is_in(f"{root}/", found)) == (2, True)
    there = checkpoint.Checkpoint("gs://bucket/run/step-00000002", root, {})
    assert is_in("gs://bucket/run/", there)
    assert not is_in("gs://bucket", there)


def test_a_start_that_was_killed_before_its_first_step_begins_again(tmp_path: Path) -> None:
    """From a checkpoint without a record beside it, and from an earlier copy of the run: what the
    folder has belongs to the same run."""
    run_dir, known = tmp_path / "run", (IDENTITY, RANDOM, ORDER, {})
    given = str(checkpoint_at(tmp_path / "lone", 2))
    with RecordWriter(run_dir, {"resumed_from": 2}) as record:
        found = find_resume(given, str(run_dir / "checkpoints"), run_dir, *known, print)
        assert found is not None
        copy = tmp_path / "copy"
        checkpoint_at(copy / "checkpoints", 2)
        shutil.copy(record.path, copy)
        record.write("train", 3, loss=1.0)
        found = find_resume(str(copy), str(run_dir / "checkpoints"), run_dir, *known, print)
        assert found is not None


def test_a_checkpoint_that_is_taken_along_is_one_when_all_of_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b").mkdir()
    start, copy, copied = checkpoint.load(checkpoint_at(tmp_path / "a", 2)), shutil.copyfile, []

    def noted(file: Path, to: Path) -> None:
        copied.append(file.name)
        assert checkpoint.complete(tmp_path / "b") == set()
        copy(file, to)

    monkeypatch.setattr(shutil, "copyfile", noted)
    adopt(str(tmp_path / "b"), start)
    assert len(copied) == 3
    assert checkpoint.load(tmp_path / "b" / "step-00000002").state == start.state


def test_a_run_that_was_saved_does_not_begin_anew(tmp_path: Path) -> None:
    """Its checkpoints are not mounted, or damaged; a run that was never saved does begin anew."""
    root, known = str(tmp_path / "checkpoints"), (IDENTITY, RANDOM, ORDER, {"torch": "1"})
    with RecordWriter(tmp_path, {"resumed_from": 0}) as record:
        record.write("train", 1, loss=1.0)
        assert find_resume("auto", root, tmp_path, *known, print) is None
        with pytest.raises(ValueError, match=r"holds a run, and resume is never: choose another"):
            find_resume("never", root, tmp_path, *known, print)
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
    """They belong to a start that was killed before it could record the first one."""
    root, elsewhere = str(tmp_path / "run" / "checkpoints"), str(tmp_path / "elsewhere")
    config = {"trainer": {"checkpoint_dir": elsewhere}}
    with RecordWriter(tmp_path / "run", {"resumed_from": 0, "config": config}) as record:
        record.write("train", 1, loss=1.0)
    known = (IDENTITY, RANDOM, ORDER, {"torch": "1"})
    assert find_resume("auto", root, tmp_path / "run", *known, print) is None
    no_manifest(checkpoint_at(elsewhere, 1))  # killed while writing it: there the run begins anew
    assert find_resume("auto", elsewhere, tmp_path / "run", *known, print) is None
    checkpoint.save(elsewhere, 2, FORMS, RunState(IDENTITY, ORDER, {"torch": "1"}, 0.0).at(2))
    with pytest.raises(ValueError, match=f"saved up to step 2, and {root} lacks it"):
        find_resume("auto", root, tmp_path / "run", *known, print)
    found = find_resume("auto", elsewhere, tmp_path / "run", *known, print)
    assert found is not None


def test_whose_record_lacks_what_another_run_dir_has(tmp_path: Path) -> None:
    """Two run_dirs that share their checkpoints, one after the other."""
    root, known, said = str(tmp_path / "kept"), (IDENTITY, RANDOM, ORDER, {}), list[str]()
    checkpoint.save(root, 2, FORMS, RunState(IDENTITY, ORDER, {}, 0.0, start="a").at(2))
    for folder, name in (("one", "a"), ("two", "b")):
        with RecordWriter(tmp_path / folder, {"resumed_from": 0, "start": name}) as record:
            record.write("train", 1, loss=1.0)
        assert find_resume("auto", root, tmp_path / folder, *known, said.append) is not None
    lacks = "will lack the record of steps up to 2: another run_dir has that of the start"
    (line,) = (line for line in said if "will lack" in line)
    assert line.startswith(f"warning: {tmp_path}/two {lacks}")
    assert len(said) == 3


def test_half_a_history_is_no_beginning(tmp_path: Path) -> None:
    """It was copied by a start that was interrupted, and that is not repeated."""
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
    """From its own checkpoints once it has some; before that, from where its history says."""
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
    # The other run has continued since; this one began there, but no longer depends on it.
    checkpoint.save(source / "checkpoints", 5, FORMS, state.at(5))
    assert step() == 3
    given = f"{source}/checkpoints/step-00000005"  # this asks for more steps than exist
    with pytest.raises(ValueError, match="run_dir already holds"):
        step()
    given = str(source)
    shutil.rmtree(source)
    assert step() == 3
    assert "no checkpoint any more; using" in said[-2]


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
    assert not beginning(one).differs_from(first)  # by its name, where nothing exists any more
