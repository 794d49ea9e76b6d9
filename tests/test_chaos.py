"""The short form of `make chaos`: in a process of its own, because it forks."""

import subprocess
import sys
from pathlib import Path

from tests.chaos_suite import BEGIN, END, HEAD, Result, write


def test_runs_end_as_if_nothing_had_been_done_to_them() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.chaos", "--short"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("bit for bit |") == 3


def test_the_table_keeps_what_was_not_run(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"above\n{BEGIN}\n{END}\nbelow\n")
    one, two = (Result(name, 3, True, True, "bit for bit", 4, 1.26) for name in ("one", "two"))
    write(page, [one, two])
    write(page, [Result("two", 9, False, False, "no", 0, 0.0)])
    lines = page.read_text().splitlines()
    assert lines[0] == "above"
    assert lines[-1] == "below"
    assert lines[3:7] == [
        *HEAD,
        "| one | 3 | yes | yes | bit for bit | 4 | 1.3 |  |",
        "| two | 9 | NO | NO | no | 0 | 0.0 |  |",
    ]
