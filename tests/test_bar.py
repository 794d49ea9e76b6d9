"""Progress: the time left is estimated from what this process has done."""

import pytest

from nfnets_xla import bar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seconds = [0.0]
    monkeypatch.setattr(bar.time, "monotonic", lambda: seconds[0])
    return seconds


@pytest.mark.parametrize(
    ("reports", "left"),
    [
        ([(0, 0), (60, 25)], "3.0"),  # (seconds, done of 100)
        ([(0, 75), (60, 80)], "4.0"),  # resumed where an earlier process stopped
        ([(0, 75), (1, 80), (60, 0), (120, 50)], "1.0"),  # and later restarted from the beginning
    ],
)
def test_the_time_left(
    reports: list[tuple[float, int]],
    left: str,
    clock: list[float],
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = bar.progress("fetched")
    for clock[0], done in reports:
        report(done, 100)
    told = capsys.readouterr().err.splitlines()
    assert told[-1].endswith(f"{reports[-1][1]} of 100, {left} minutes left")


def test_what_is_done_at_once_has_no_time_left(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    bar.progress("fetched")(7, 7)
    assert capsys.readouterr().err.endswith("] 7 of 7\n")


def test_a_file_of_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    bar.progress("fetched")(0, 0)
    assert capsys.readouterr().err == "fetched 0\n"
