"""Curves beside the record: each attempt's CSV, and what TensorBoard shows for a resumed run."""

import csv
import sys
from pathlib import Path

import pytest

from nfnets_xla.curves import Curves


def attempt(folder: Path, number: int, start: int, stop: int) -> None:
    curves = Curves(folder, number, start_step=start, tensorboard=True)
    for step in range(start + 1, stop + 1):
        curves.add("train", step, {"loss": number + step / 100, "mfu": None})
    curves.add("eval-raw", stop, {"top1": 0.5})
    curves.close()


def test_a_resumed_run_is_one_curve(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    attempt(tmp_path, 1, start=0, stop=6)
    attempt(tmp_path, 2, start=4, stop=8)  # 5 and 6 are computed again
    board = EventAccumulator(str(tmp_path / "curves")).Reload()
    assert set(board.Tags()["scalars"]) == {"train/loss", "eval-raw/top1"}
    shown = [(event.step, round(event.value, 4)) for event in board.Scalars("train/loss")]
    expected = [(step, 1 + step / 100) for step in range(1, 5)]
    assert shown == expected + [(step, 2 + step / 100) for step in range(5, 9)]


def test_csv_of_every_attempt(tmp_path: Path) -> None:
    attempt(tmp_path, 1, start=0, stop=2)
    attempt(tmp_path, 2, start=1, stop=3)
    names = sorted(path.name for path in (tmp_path / "curves").glob("*.csv"))
    assert names == ["eval-raw-1.csv", "eval-raw-2.csv", "train-1.csv", "train-2.csv"]
    with (tmp_path / "curves" / "train-2.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"step": "2", "loss": "2.02", "mfu": ""},
        {"step": "3", "loss": "2.03", "mfu": ""},
    ]


def test_tensorboard_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"pip install tensorboard, or set trainer\.tensorboard"):
        Curves(tmp_path, 1, start_step=0, tensorboard=True)
    Curves(tmp_path, 1, start_step=0, tensorboard=False).close()
