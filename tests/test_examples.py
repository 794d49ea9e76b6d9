"""Each example runs: the small ones whole, the demo's commands only up to composing."""

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nfnets_xla.compose import composed, to_run
from nfnets_xla.data.shards import ShardIndex
from nfnets_xla.record import RecordWriter, read_record
from tests.scaling.made_runs import header

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_loop_of_ones_own_trains_and_exports() -> None:
    printed = run("fine_tune.py", "2")
    assert "step   0  loss 2." in printed
    assert "of 297 digits\nexported: " in printed


def test_budgets_are_those_of_the_paper() -> None:
    """The paper's smallest and largest runs: F0 for a quarter of an epoch, F7+ for eight."""
    head, *rows = run("plan_budgets.py", "3").splitlines()
    assert head.split()[0] == "core-hours"
    assert rows[0].split()[:3] == ["400", "nfnet_f0", "0.31"]
    assert rows[-1].split()[:3] == ["110,000", "nfnet_f7_plus", "8.11"]
    assert rows[0].split()[-1] == "600"  # 200 chip-hours


def test_the_demo_packs_and_gives_commands_that_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`make demo` takes minutes on both cores: here its runs are only composed, and the rest is
    done."""
    demo: Any = runpy.run_path(str(EXAMPLES / "demo.py"))
    scope = demo["main"].__globals__
    given: list[list[str]] = []
    scope.update(LETTERS="AB", PER_CLASS=6, HELD_OUT_PER_CLASS=2)
    scope.update(nfnets_xla=given.append, kill_once=lambda words, _: given.append(words))
    monkeypatch.setattr(sys, "argv", ["demo.py", str(tmp_path / "demo")])
    with pytest.raises(FileNotFoundError):  # there are no runs
        demo["main"]()
    for words in given:
        to_run(composed(words[0], words[1:]))
    assert [words[0] for words in given] == [
        *["pretrain_demo"] * 2,
        *["finetune_sam_demo"] * 2,
        "evaluate_demo",
    ]
    assert ShardIndex.load(tmp_path / "demo" / "shards" / "letters").num_samples == 12
    with RecordWriter(tmp_path / "run", header()) as record:
        record.write("eval", 10, weights="raw", loss=2.25, top1=0.25, top5=0.5)
        record.write("end", 10, compilations=2)
    assert "25.0 %" in demo["summary"]({"run": read_record(tmp_path / "run")})


def test_every_example_is_run_by_a_test() -> None:
    here = Path(__file__).read_text()
    assert [file.name for file in EXAMPLES.glob("*.py") if file.name not in here] == []
