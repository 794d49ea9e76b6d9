"""`nfnets-xla runs`: every state that a run's folder can be in, and the filters."""

import io
import json
import os
import time
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from nfnets_xla.cli import main
from nfnets_xla.commands.runs import cells, overviews, table
from nfnets_xla.record import RecordWriter
from nfnets_xla.scaling.account import train_flops
from tests.scaling.made_runs import header

NOW = 1_800_000_000.0
EVALUATED: dict[str, Any] = {"weights": "raw", "loss": 2.25, "top1": 0.25, "top5": 0.5}


@pytest.fixture(autouse=True)
def clock_that_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(time=lambda: NOW, sleep=time.sleep)
    monkeypatch.setattr("nfnets_xla.commands.runs.time", clock)


def made(
    folder: Path,
    *,
    ended: bool,
    seconds_ago: float = 0.0,
    step_ms: float = 100.0,
    **changes: object,
) -> None:
    opening = header(**changes)  # pyright: ignore[reportArgumentType]
    with RecordWriter(folder, opening) as record:
        record.write("train", 10, loss=2.5, top1=0.1, images_per_second=100.0, step_ms=step_ms)
        record.write("eval", 10, **EVALUATED)
        if ended:
            record.write("end", opening["num_steps"])
    then = NOW - seconds_ago
    os.utime(folder / "run-1.jsonl", (then, then))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    made(tmp_path / "a" / "done", ended=True, epochs=1)
    made(tmp_path / "a" / "going", ended=False, epochs=2)
    made(tmp_path / "gone", ended=False, seconds_ago=3661, epochs=4)
    return tmp_path


def test_each_is_told_by_its_record(runs: Path) -> None:
    found = {run.name: run for run in overviews(runs)}
    assert {name: run.status for name, run in found.items()} == {
        "a/done": "finished",
        "a/going": "running",
        "gone": "stopped 1:01:01 ago",
    }
    going, opening = found["a/going"], header(epochs=2)
    assert (going.step, going.steps) == (10, opening["num_steps"])
    assert (going.loss, going.held_out) == (2.5, (2.25, 0.25))
    rows = opening["num_steps"] * opening["config"]["data"]["batch_size"]
    assert going.flops == train_flops(opening["macs_per_image"], rows)


def test_a_slow_run_is_not_taken_for_one_that_has_stopped(tmp_path: Path) -> None:
    """No row for 150 s, while a row comes every 25 steps."""

    def status(name: str, *kinds: str, seconds_ago: float = 150.0, at: int = 0) -> str:
        with RecordWriter(tmp_path / name, header(resumed_from=at)) as record:
            for kind in kinds:
                record.write(kind, 25, loss=2.5, step_ms=2500.0)
        then = NOW - seconds_ago
        os.utime(tmp_path / name / f"run-{record.attempt}.jsonl", (then, then))
        (found,) = (run for run in overviews(tmp_path) if run.name == name)
        return found.status

    assert status("slow", "train") == "running"
    assert status("gone", "train", seconds_ago=190) == "stopped 0:03:10 ago"
    assert status("new") == "starting"
    assert status("never", seconds_ago=3661) == "stopped 1:01:01 ago"
    assert status("asked to", "train", "stopped", seconds_ago=3) == "stopped 0:00:03 ago"
    assert status("asked to", at=25) == "starting"  # again


def test_the_table_has_all_of_them(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["runs", str(runs)])
    printed = capsys.readouterr().out
    for word in ("a/done", "a/going", "gone", "finished", "running", "2.2500", "25.0%", "lost"):
        assert word in printed


def test_in_a_pipe_a_run_is_one_line_however_long_its_name(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "/".join(["sweep-of-" + "x" * 90] * 3)
    made(runs / long, ended=True)
    main(["runs", str(runs)])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + 4
    assert sum(long in line for line in printed) == 1


@pytest.mark.parametrize(("width", "gone"), [(200, []), (100, ["starts", "lost"])])
def test_a_narrow_terminal_is_spared_columns_and_no_digits(
    runs: Path, width: int, gone: list[str]
) -> None:
    made(runs / "a" / ("long-" * 8), ended=True)
    printed = io.StringIO()
    found = list(overviews(runs))
    Console(file=printed, width=width).print(table(found, width))
    head, *rows = printed.getvalue().splitlines()
    assert max(map(len, [head, *rows])) <= width
    assert [name for name in ("starts", "lost", "loss", "top-1") if name not in head] == gone
    assert "…" not in printed.getvalue()
    assert all(cells(run)["held out"] in printed.getvalue() for run in found)


def test_a_list_is_for_another_command(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(runs / "b", ended=True, epochs=1)
    main(["runs", str(runs), "--list"])
    assert capsys.readouterr().out == f"{runs / 'a' / 'done'},{runs / 'b'}\n"
    cost = next(run.flops for run in overviews(runs) if run.name == "gone")
    main(["runs", str(runs), "--flops", str(cost * 1.2)])
    printed = capsys.readouterr().out
    assert "gone" in printed
    assert "done" not in printed


@pytest.mark.parametrize("words", [["--list"], ["--finished"], ["--list", "--flops", "1e30"]])
def test_where_none_is_finished_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    made(tmp_path / "going", ended=False)
    with pytest.raises(SystemExit):
        main(["runs", str(tmp_path), *words])
    assert f"none of the 1 training runs below {tmp_path} is finished" in capsys.readouterr().err


def test_watching_ends_when_nothing_runs(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def sleep(seconds: float) -> None:
        slept.append(seconds)
        with (runs / "a" / "going" / "run-1.jsonl").open("a") as file:
            print('{"kind": "stopped", "step": 10, "seconds": 9.0}', file=file)

    slept: list[float] = []
    clock = SimpleNamespace(time=lambda: NOW, sleep=sleep)
    monkeypatch.setattr("nfnets_xla.commands.runs.time", clock)
    main(["runs", str(runs), "--watch", "--every", "3"])
    assert "a/going" in capsys.readouterr().out
    assert slept == [3]


def test_how_long_a_run_may_be_silent(tmp_path: Path) -> None:
    """The limit follows the newest start's settings, and the duration of its evaluations."""

    def status(trainer: dict[str, int], *lines: tuple[str, int, float], ago: float) -> str:
        opening = header(epochs=50)  # 1,562 steps
        opening["config"]["trainer"] |= trainer
        folder = tmp_path / str(next(number))
        with RecordWriter(folder, opening) as record:
            pass
        with record.path.open("a") as file:
            for kind, step, seconds in lines:
                row: dict[str, Any] = {"kind": kind, "step": step, "seconds": seconds}
                row |= {"step_ms": 1000.0} if kind == "train" else EVALUATED
                print(json.dumps(row), file=file)
        os.utime(record.path, (NOW - ago, NOW - ago))
        (run,) = overviews(folder)
        return run.status

    number = count()

    assert status({"log_every": 10}, ("train", 10, 10.0), ago=900) == "stopped 0:15:00 ago"
    assert status({"log_every": 1000}, ("train", 20, 20.0), ago=900) == "running"
    # The duration of the first evaluation is unknown, later ones take as long; none is due yet.
    often = {"log_every": 10, "eval_every": 100}
    assert status(often, ("train", 70, 70.0), ago=900) == "stopped 0:15:00 ago"
    assert status(often, ("train", 80, 80.0), ago=900) == "running"
    past = [("train", 80, 80.0), ("eval", 100, 700.0), ("train", 180, 780.0)]
    assert status(often, *past, ago=900) == "running"
    assert status(often, *past, ago=1300) == "stopped 0:21:40 ago"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--flops", "0"], "--flops is 0; it must be greater than 0"),
        (["--flops", "1e30"], "none of the 3 training runs below"),
        (["--watch", "--finished"], "--watch follows unfinished runs"),
        (["--watch", "--list"], "--watch follows unfinished runs"),
        (["--every", "-1"], "--every is -1; it must be in (0, 86,400] seconds"),
        (["--every", "1e30", "--watch"], "--every is 1e+30"),  # too large for any timer
    ],
)
def test_mistakes_are_one_line(
    runs: Path, capsys: pytest.CaptureFixture[str], words: list[str], part: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["runs", str(runs), *words])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1
