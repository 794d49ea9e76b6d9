"""Curves for other tools: the record's numbers as CSV and for TensorBoard, in the run's folder.

They are written with the record, one set per attempt, and this library never reads them.
"""

import csv
from pathlib import Path
from typing import Any, TextIO

Row = dict[str, Any]


class Curves:
    """One CSV file per kind of row and attempt; TensorBoard drops steps that are repeated."""

    def __init__(self, run_dir: Path, attempt: int, start_step: int, tensorboard: bool) -> None:
        """Raises ValueError if TensorBoard's curves are asked for and it is not installed."""
        self._folder = run_dir / "curves"
        self._folder.mkdir(exist_ok=True)
        self._attempt = attempt
        self._files: dict[str, tuple[TextIO, csv.DictWriter[str]]] = {}
        self._board = _open_board(self._folder, start_step) if tensorboard else None

    def add(self, kind: str, step: int, row: Row) -> None:
        """Add the numbers of one step; all rows of one kind have the same keys."""
        if kind not in self._files:
            path = self._folder / f"{kind}-{self._attempt}.csv"
            file = path.open("x", newline="", encoding="utf-8")
            self._files[kind] = file, csv.DictWriter(file, ["step", *row])
            self._files[kind][1].writeheader()
        file, writer = self._files[kind]
        writer.writerow({"step": step, **row})
        file.flush()
        if self._board is not None:
            for name, value in row.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        for file, _ in self._files.values():
            file.close()
        if self._board is not None:
            self._board.close()


class NoCurves:
    """Stands in for Curves on hosts that write nothing."""

    def add(self, kind: str, step: int, row: Row) -> None: ...

    def close(self) -> None: ...


def _open_board(folder: Path, start_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"trainer.tensorboard is true, but it cannot be imported ({error}): "
            "pip install tensorboard, or set trainer.tensorboard=false"
        ) from error
    return SummaryWriter(str(folder), purge_step=start_step + 1, flush_secs=30)
