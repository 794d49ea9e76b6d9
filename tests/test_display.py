"""What a user sees: plain lines in a pipe; in a terminal a bar that leaves it unchanged."""

import io
import os
import pty
import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console

from nfnets_xla.display import Lines, Live, clock, results

ROW: dict[str, Any] = {
    "step": 40,
    "steps": 96,
    "epoch": 0.8333,
    "epochs": 2.0,
    "step_ms": 2500.0,
    "loss": 1.98764,
    "top1": 0.25,
    "learning_rate": 0.04,
    "images_per_second": 51.4,
    "mfu": 0.123,
    "hfu": 0.123,
    "data_wait_share": 0.014,
    "lost_seconds": 0.0,
}


def test_a_line_has_all_that_one_steers_by() -> None:
    lines: list[str] = []
    with Lines(lines.append) as display:
        display.step(40, 96)
        display.numbers(ROW)
        display.numbers(ROW | {"mfu": None, "hfu": None, "lost_seconds": 75.2})
    assert lines == [
        "step 40/96  epoch 0.83/2  loss 1.9876  top-1 0.250  lr 0.04  51 images/s  MFU 12.3%  "
        "waiting for data 1%  0:02:20 left",
        "step 40/96  epoch 0.83/2  loss 1.9876  top-1 0.250  lr 0.04  51 images/s  "
        "waiting for data 1%  lost to restarts 0:01:15  0:02:20 left",
    ]


def test_hours_are_not_cut_off() -> None:
    assert [clock(seconds) for seconds in (0, 59.6, 3600, 100_000)] == [
        "0:00:00",
        "0:01:00",
        "1:00:00",
        "27:46:40",
    ]


@pytest.mark.parametrize("width", [60, 80, 160])
def test_the_live_view_fits_the_terminal_and_shows_the_numbers(width: int) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, color_system=None)
    with Live(console) as display:
        display.say("weights from [runs/a]")  # no markup
        for step in range(1, 41):
            display.step(step, 96)
        display.numbers(ROW)
    text = out.getvalue()
    assert "weights from [runs/a]" in text
    last = text.replace("\x1b[2K", "").replace("\x1b[1A", "").split("\r")[-1]
    shown = last.split("\x1b")[0]
    assert all(len(line) <= width for line in shown.splitlines())
    for part in ("40/96", "epoch 0.83/2", "loss 1.9876", "51 images/s", "MFU 12.3%"):
        assert part in shown


SCRIPT = """
from nfnets_xla.display import open_display
print(type(open_display()).__name__)
"""


def test_a_terminal_is_told_from_a_pipe() -> None:
    piped = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert piped.stdout == "Lines\n"
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    subprocess.run([sys.executable, "-c", SCRIPT], stdout=theirs, env=environment, check=True)
    assert os.read(ours, 100).strip() == b"Live"
    subprocess.run(
        [sys.executable, "-c", SCRIPT],
        stdout=theirs,
        env=environment | {"TERM": "dumb"},
        check=True,
    )
    assert os.read(ours, 100).strip() == b"Lines"
    os.close(ours)
    os.close(theirs)


def test_every_metric_of_an_evaluation_is_shown() -> None:
    metrics = {"loss": 0.5, "top1": 0.25, "top5": 1.0, "rank": 0.125, "images": 64}
    assert results(metrics) == "loss 0.5000  top-1 0.2500  top-5 1.0000  rank 0.1250"
