"""Two starts in one folder: the second is refused while the first lives, however that ends; and a
start that looked before another wrote does not continue from what it saw."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from nfnets_xla.cli import main
from nfnets_xla.compose import composed, to_run
from nfnets_xla.display import Lines
from nfnets_xla.exits import Interrupted
from nfnets_xla.prepare import Ready, make_plan, prepare
from nfnets_xla.record import RecordWriter, read_record
from nfnets_xla.watch import open_watch
from tests.runs import PLAIN_CPU, RECIPE, SMALL, reach, run, start
from tests.warm import Warm

ONE = [*RECIPE, *SMALL, *PLAIN_CPU, "trainer.checkpoint_every=1"]


def test_a_second_start_is_refused_and_leaves_the_first_alone(
    tmp_path: Path, data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, log, other = tmp_path / "run", tmp_path / "log", tmp_path / "other"
    arguments = [*ONE, *data, "optim.epochs=0.5", "trainer.ledger=true", f"run_dir={run_dir}"]
    (first,) = reach(lambda: [start(arguments, log)], run_dir, 1, log, "samples")
    first.send_signal(signal.SIGSTOP)  # so that it cannot end first
    second = start(arguments, other)
    assert second.wait() == 2
    first.send_signal(signal.SIGCONT)
    (line,) = (line for line in other.read_text().splitlines() if line.startswith("nfnets-xla"))
    assert line.startswith(f"nfnets-xla: run_dir is {str(run_dir)!r}, where a run is going on")
    assert line.endswith("wait until it has ended, or choose another run_dir")
    assert first.wait() == 0, log.read_text()
    assert len(list(run_dir.glob("run-*.jsonl"))) == 1
    main(["audit", str(run_dir)])
    assert capsys.readouterr().out.endswith("every sample exactly once\n")


@pytest.mark.parametrize("ahead", ["first", "second", "first, to the end"])
def test_of_two_machines_that_train_a_run_the_one_ahead_goes_on(
    tmp_path: Path, data: list[str], capsys: pytest.CaptureFixture[str], ahead: str
) -> None:
    """The other ends when it comes to save, and no sample of the remaining run was shown twice. The
    one behind leaves no trace, even if it began last and nothing was started after it.
    """
    run_dir, logs = tmp_path / "run", {"first": tmp_path / "1", "second": tmp_path / "2"}
    arguments = [*ONE, *data, "optim.epochs=2", "trainer.ledger=true", f"run_dir={run_dir}"]
    arguments += ["trainer.checkpoint_every=2"]

    def reached(log: Path, step: int, module: str = "nfnets_xla") -> Warm:
        begin = lambda: [start(arguments, log, module)]  # noqa: E731
        (process,) = reach(begin, run_dir, step, log, "samples")
        process.send_signal(signal.SIGSTOP)
        return process

    first = reached(logs["first"], 3)
    second = reached(logs["second"], 3, "tests.elsewhere")
    both = {"first": first, "second": second}
    ahead, *finished = ahead.split(", ")
    both[ahead].send_signal(signal.SIGCONT)
    while not (run_dir / "checkpoints" / "step-00000004" / "manifest.json").exists():
        assert both[ahead].poll() is None, logs[ahead].read_text()
    if finished:
        assert both[ahead].wait() == 0, logs[ahead].read_text()
    both[ahead].kill()
    (behind,) = both.keys() - {ahead}
    both[behind].send_signal(signal.SIGCONT)
    assert both[behind].wait() == 75, logs[behind].read_text()
    assert "was saved by another start of this run, which trains" in logs[behind].read_text()
    if not finished:
        run(arguments, tmp_path / "log")
    record = read_record(run_dir)
    assert record.line[-1 if finished else -2] == record.headers[ahead == "second"]
    assert record.rivals == ({2} if ahead == "first" else set())
    assert [row["step"] for row in record.of_kind("samples")] == list(range(1, 14))
    main(["audit", str(run_dir)])
    assert capsys.readouterr().out.endswith("every sample exactly once\n")


def test_a_killed_run_leaves_no_lock_though_its_workers_live(
    tmp_path: Path, data: list[str]
) -> None:
    """The kernel releases it with the last descriptor, and only the run itself may have one."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    arguments = [*ONE, *data, "data.workers=2", "optim.epochs=0.5", f"run_dir={run_dir}"]
    (first,) = reach(lambda: [start(arguments, log)], run_dir, 1, log, "samples")
    children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    assert len(children) >= 3  # two workers and the resource tracker
    assert locked(run_dir, str(first.pid))
    assert [pid for pid in children if locked(run_dir, pid)] == []
    first.kill()
    first.wait()
    run(arguments, log)
    assert read_record(run_dir).of_kind("end")


def locked(run_dir: Path, pid: str) -> bool:
    opened = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
    return any(path.startswith(f"{run_dir}/.lock-") for path in opened)


def made_ready(run_dir: Path, data: list[str]) -> Ready:
    plan = make_plan(to_run(composed(ONE[0], [*ONE[1:], *data, f"run_dir={run_dir}"])))
    return prepare(plan, None, print)


def test_nobody_goes_on_from_a_checkpoint_that_is_being_deleted(
    tmp_path: Path, data: list[str]
) -> None:
    """By another machine, which makes room while this one reads; it deletes the manifest first.
    Without momentum, the rest could still be resumed, but to other weights."""
    options = [*ONE, *data, "optim.epochs=0.25", "optim.warmup_steps=1"]
    run([*options, f"run_dir={tmp_path / 'run'}"], tmp_path / "log")
    deleted: list[str] = []
    for name in ("manifest.json", "state.json", "momentum.safetensors", "model.safetensors"):
        deleted.append(name)
        run_dir = tmp_path / name
        shutil.copytree(tmp_path / "run", run_dir)
        plan = make_plan(to_run(composed(options[0], [*options[1:], f"run_dir={run_dir}"])))
        start = plan.find_start(print)
        assert start is not None
        for file in deleted:
            (start.folder / file).unlink()
        with pytest.raises(Interrupted, match="was deleted while it was read, by another start"):
            prepare(plan, start, print)


def test_what_another_start_wrote_meanwhile_is_not_replaced(
    tmp_path: Path, data: list[str]
) -> None:
    """The other has ended when this one gets the folder; otherwise this one would begin anew."""
    ready = made_ready(tmp_path, data)
    with RecordWriter(tmp_path, {"resumed_from": 0, "num_steps": 9}) as record:
        record._opened -= 1  # a step takes some time
        record.write("train", 1, loss=1.0)
    with ExitStack() as open_files:
        with pytest.raises(Interrupted, match=r"has written into .* start again"):
            open_watch(ready, Lines(), open_files)
        with RecordWriter(tmp_path, {"resumed_from": 1, "num_steps": 9}) as record:
            assert record.attempt == 2  # and the folder is free
    assert len(read_record(tmp_path).rows) == 1


def test_the_folder_is_free_when_a_record_is_closed_and_when_its_process_ends(
    tmp_path: Path,
) -> None:
    code = "import pathlib, sys, nfnets_xla.record as record; "
    code += "record.RecordWriter(pathlib.Path(sys.argv[1]), {'resumed_from': 0})"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with RecordWriter(tmp_path, {"resumed_from": 0}):
        other = subprocess.run(command, capture_output=True, check=False)
        assert b"a run is going on on this machine" in other.stderr
    for _ in range(2):
        subprocess.run(command, check=True)
    assert len(list(tmp_path.glob("run-*"))) == 3


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(_descriptor: int, _how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with RecordWriter(tmp_path, {"resumed_from": 0}) as record:
        assert record.attempt == 1
