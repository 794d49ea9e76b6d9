"""Real signals to real processes, in every window of a run: exit code 75, and nothing new lost."""

import os
import re
import signal
import socketserver
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nfnets_xla import checkpoint, preempt
from nfnets_xla.callbacks.stop import Stop
from nfnets_xla.hosts import Hosts
from nfnets_xla.preempt import Preemption, announced
from nfnets_xla.record import read_record
from tests.data.server import serving
from tests.runs import PLAIN_CPU, RECIPE, SMALL, assert_bit_equal, final_state, losses, run, xla

slow = pytest.mark.slow
ONE = [*RECIPE, *SMALL, "optim.epochs=1", "trainer.checkpoint_every=null"]


class Process:
    """A run that has reached a window."""

    def __init__(
        self, window: str, arguments: list[str], folder: Path, seconds: float = 0.5
    ) -> None:
        self.run_dir, self.log = folder / "run", folder / "log.txt"
        file = folder / "announced"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.announced", window, str(file), str(seconds)),
                    *(*arguments, f"run_dir={self.run_dir}"),
                ],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
            )
        while not file.exists():
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.01)

    def signalled(self, *signals: signal.Signals, pause: float = 0.2) -> None:
        """Send the signals one after another, and check that the process ends with 75."""
        for place, each in enumerate(signals):
            time.sleep(pause if place else 0.1)
            self.process.send_signal(each)
        assert self.process.wait(120) == 75, self.log.read_text()

    @property
    def saved(self) -> list[int]:
        return checkpoint.steps(self.run_dir / "checkpoints")


@pytest.mark.parametrize(
    "window",
    ["first_batch", pytest.param("worker_start", marks=slow), pytest.param("compile", marks=slow)],
)
def test_before_the_first_step_is_done_there_is_nothing_to_save(
    tmp_path: Path, data: list[str], window: str
) -> None:
    device = xla(1) if window == "compile" else PLAIN_CPU
    workers = ["data.workers=2"] if window == "worker_start" else []
    seconds = 0 if window == "compile" else 20
    process = Process(window, [*ONE, *data, *device, *workers], tmp_path, seconds)
    process.signalled(signal.SIGTERM)
    assert process.saved == []
    assert "SIGTERM; nothing is new since the last checkpoint: ending with 75" in (
        process.log.read_text()
    )


@pytest.mark.parametrize(
    ("window", "step"),
    [
        ("training", 3),
        pytest.param("ascent", 3, marks=slow),
        pytest.param("average", 3, marks=slow),
        pytest.param("validation", 4, marks=slow),
        pytest.param("saving", 3, marks=slow),
    ],
)
def test_what_is_new_is_saved_and_the_run_goes_on(
    tmp_path: Path, data: list[str], window: str, step: int
) -> None:
    """It ends with the bits of a run that nobody stopped."""
    arguments = [*ONE, *data, *PLAIN_CPU, "trainer.eval_every=4"]
    if window == "saving":
        arguments += ["trainer.checkpoint_every=2"]  # a step finishes during the half second
    process = Process(window, arguments, tmp_path)
    process.signalled(signal.SIGTERM)
    assert process.saved[0] >= step
    (stopped,) = read_record(process.run_dir).of_kind("stopped")
    assert (stopped["step"], stopped["reason"]) == (process.saved[0], "SIGTERM")
    assert f"stopped after step {process.saved[0]}, which is saved" in process.log.read_text()
    run([*arguments, f"run_dir={process.run_dir}"], process.log)
    run([*arguments, f"run_dir={tmp_path / 'whole'}"], process.log)
    record = read_record(process.run_dir)
    assert record.steps_lost == 0
    assert losses(process.run_dir) == losses(tmp_path / "whole")
    evaluated = [
        [(row["step"], row["weights"], row["loss"]) for row in read_record(each).of_kind("eval")]
        for each in (process.run_dir, tmp_path / "whole")
    ]
    assert evaluated[0] == evaluated[1]
    assert_bit_equal(final_state(process.run_dir), final_state(tmp_path / "whole"))


def test_a_step_is_new_until_it_is_known_to_be_written() -> None:
    """Whoever asks just after a checkpoint need not wait for another."""
    asked = Preemption()
    keeper: Any = SimpleNamespace(durable_at=5)
    stop: Any = Stop(asked, keeper, Hosts())
    for step, new in ((4, True), (5, False), (6, True)):
        stop.on_train_batch_end(None, None, None, {"step": step - 1}, 0)
        assert asked.unsaved is new


def test_what_cannot_be_saved_is_interrupted_too(tmp_path: Path, data: list[str]) -> None:
    """The disk is full, or unreachable for a while: the same command resumes as soon as it can."""
    arguments = [*ONE, *data, *PLAIN_CPU]
    root = tmp_path / "run" / "checkpoints"
    root.mkdir(parents=True)
    in_the_way = [root / f"step-{step:08d}" for step in range(1, 20)]
    for file in in_the_way:
        file.touch()
    process = Process("training", arguments, tmp_path)
    process.signalled(signal.SIGTERM)
    assert re.search(
        r"stopped after step \d+ \(SIGTERM\): step \d+ could not be saved in .*: make room",
        process.log.read_text(),
    )
    for file in in_the_way:
        file.unlink()
    run([*arguments, f"run_dir={process.run_dir}"], process.log)
    assert read_record(process.run_dir).of_kind("end")


@slow
def test_at_the_very_end(tmp_path: Path, data: list[str]) -> None:
    """All is saved: 75 at once, and the next start reports that the run has finished."""
    arguments = [*ONE, *data, *PLAIN_CPU]
    process = Process("teardown", arguments, tmp_path, seconds=20)
    process.signalled(signal.SIGINT)
    run([*arguments, f"run_dir={process.run_dir}"], process.log)
    assert process.log.read_text().endswith("holds this run, finished\n")


def test_a_second_signal_and_the_end_of_patience(tmp_path: Path, data: list[str]) -> None:
    """A step hangs for a minute. After the first signal the run waits `grace` seconds, after the
    second it does not."""
    arguments = [*ONE, *data, *PLAIN_CPU]
    (tmp_path / "a").mkdir()
    twice = Process("training", arguments, tmp_path / "a", seconds=60)
    twice.signalled(signal.SIGINT, signal.SIGTERM)
    assert "SIGTERM after SIGINT: ending with 75" in twice.log.read_text()
    (tmp_path / "b").mkdir()
    once = Process("training", [*arguments, "trainer.grace=1"], tmp_path / "b", seconds=60)
    once.signalled(signal.SIGTERM)
    assert "not saved in 1 s: ending with 75" in once.log.read_text()
    assert once.saved == twice.saved == []


def test_only_a_second_signal_ends_what_is_being_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine announces its shutdown, and then sends a signal: that is one reason to save, not
    two."""
    ended: list[tuple[str, int]] = []
    preemption = Preemption()
    preemption.unsaved = True
    monkeypatch.setattr(preemption, "_end", lambda why, code=75: ended.append((why, code)))
    preemption.ask("a notice")
    preemption.ask("SIGTERM", signal.SIGTERM)
    preemption.ask("the sweep is gone")
    assert ended == []
    preemption.ask("SIGINT", signal.SIGINT)
    assert ended == [("SIGINT after a notice", 75)]


def test_a_request_that_is_passed_on_ends_nothing_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep ends after its run, which saves; and says why, however often it is asked."""
    done: list[str] = []
    sweep = Preemption()
    monkeypatch.setattr(sweep, "_end", lambda why, code=75: done.append("ended"))
    sweep.pass_on = lambda: done.append("passed on")
    for reason in ("SIGINT", "SIGTERM"):
        sweep.ask(reason, signal.Signals[reason])
        assert sweep.reason == reason
    assert done == ["passed on", "passed on"]


def test_what_does_not_go_on_ends_as_any_command() -> None:
    """By the signal; and the terminal's cursor, which a live display hides, is restored."""
    from_there = "from nfnets_xla.preempt import Preemption; p = Preemption(); p.resumes = False; "
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        terminal, other_end = os.openpty()
        ask = f"p.ask('{number.name}', {int(number)})"
        done = subprocess.run(
            [sys.executable, "-c", from_there + ask],
            stdout=other_end,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        assert done.returncode == code
        assert done.stderr == f"nfnets-xla: {number.name}: ending with {code}\n"
        assert b"\x1b[?25h" in os.read(terminal, 100)
        os.close(other_end)
        os.close(terminal)


@slow
def test_workers_leave_signals_to_the_run(tmp_path: Path, data: list[str]) -> None:
    """The signal goes to the whole process group, as from a terminal or a job manager."""
    process = Process("training", [*ONE, *data, *PLAIN_CPU, "data.workers=2"], tmp_path)
    group = Path(f"/proc/{process.process.pid}/task/{process.process.pid}/children")
    children = [int(pid) for pid in group.read_text().split()]
    assert len(children) >= 3  # two workers and the resource tracker
    for pid in children:
        os.kill(pid, signal.SIGINT)
    process.signalled(signal.SIGINT)
    assert process.saved == [3]
    assert "Traceback" not in process.log.read_text()


@slow
def test_a_machine_that_announces_its_end(tmp_path: Path, data: list[str]) -> None:
    notice = tmp_path / "notice"
    arguments = [*ONE, *data, *PLAIN_CPU, f"trainer.maintenance={notice}"]
    process = Process("training", arguments, tmp_path, seconds=8)
    notice.touch()
    process.signalled()
    assert process.saved == [3]
    assert read_record(process.run_dir).of_kind("stopped")[0]["reason"].endswith("maintenance")
    run([*arguments, f"run_dir={process.run_dir}"], process.log)  # it is still there, so not new


def test_what_announces_maintenance(tmp_path: Path) -> None:
    file = tmp_path / "event"
    assert not announced(str(file))
    for text, event in (("", True), ("NONE\n", False), ("FALSE", False), ("TERMINATE", True)):
        file.write_text(text)
        assert announced(str(file)) is event
        with serving(tmp_path) as server:
            assert announced(f"{server.url}/event") is event
            assert announced(f"{server.url}/absent") is None


@pytest.mark.parametrize("first", [True, None])
def test_a_question_that_fails_makes_no_new_notice(
    first: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that stands from the start has its run; a server may fail once while it does."""
    answers = iter([first, None, True, False, None, True])
    monkeypatch.setattr(preempt, "announced", lambda _: next(answers))
    monkeypatch.setattr(preempt, "POLL_SECONDS", 0)
    asked: list[str] = []
    preemption = Preemption(25)
    monkeypatch.setattr(preemption, "ask", asked.append)
    woken, write = os.pipe()
    monkeypatch.setattr(preemption, "_write", write, raising=False)
    with pytest.raises(StopIteration):
        preemption._poll("http://metadata/event")
    os.close(write)
    with os.fdopen(woken, "rb") as pipe:  # or the other thread would not see the deadline
        assert pipe.read() == b"\0"
    assert asked == ["http://metadata/event announces maintenance"]
    assert list(answers) == []


WATCH = """
import sys, time
from nfnets_xla import preempt
preempt.POLL_SECONDS = 0.1
watching = preempt.Preemption()
watching.start()
watching.poll(sys.argv[1])
time.sleep(60)
"""


def test_one_malformed_answer_does_not_end_the_watch() -> None:
    """A status line that is none, a body that is cut, and then a notice: 75."""
    good = "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{}"
    none, cut, notice = good.format(4, "NONE"), good.format(9, "NO"), good.format(9, "TERMINATE")
    answers = [none, "garbage\r\n", cut, none, notice]

    class Metadata(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while self.rfile.readline().strip():
                pass
            self.wfile.write((answers.pop(0) if len(answers) > 1 else answers[0]).encode())

    with socketserver.TCPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        notice_at = f"http://127.0.0.1:{server.server_address[1]}/event"
        command = [sys.executable, "-c", WATCH, notice_at]
        done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
        server.shutdown()
    assert done.returncode == 75, done.stderr
    assert done.stderr.startswith(f"nfnets-xla: {notice_at} announces maintenance; nothing is new")
