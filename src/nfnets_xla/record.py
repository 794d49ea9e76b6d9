"""The record of a run: one JSON-lines file per start, which every later tool reads.

`run-<attempt>.jsonl` opens with a header (kind "header"), then one object per line, each with a
"kind", a "step" and the "seconds" since the file was opened. A later start writes a new file, since
object stores cannot append: a run that was interrupted twice leaves three. Steps count from 1: step
n is the n-th update, and an evaluation or a checkpoint at step n follows that update. On a machine
only one process at a time writes into a folder. Uses only the standard library.
"""

import errno
import fcntl
import json
import math
import os
import platform
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from nfnets_xla.lineage import (
    Row,
    Start,
    builds_on,
    computed_again,
    computed_in_vain,
    rivals,
    still_built_on,
)

CHECKPOINTS = "checkpoints"  # default folder for them, inside the run's


class RecordWriter:
    """Writes one attempt's file; every line is complete and flushed before `write` returns."""

    def __init__(
        self, run_dir: Path, header: Row, first: Callable[[], None] = lambda: None
    ) -> None:
        """`header["resumed_from"]` is the step of the checkpoint that this start resumes from (0:
        none); lineage.py explains the related entries.

        `first` is called once the folder is locked, before this start writes anything there. Raises
        ValueError if another start is running in the folder.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(run_dir)
        try:
            first()
            self._opened = time.monotonic()
            self.attempt = 1 + max((number for number, _ in _attempts(run_dir)), default=0)
            self.path, self._file = self._new(run_dir)
            try:
                self.write("header", header["resumed_from"], **header)
            except BaseException:
                with suppress(OSError):  # closing retries the write that failed
                    self._file.close()
                raise
        except BaseException:
            os.close(self._lock)
            raise

    def _new(self, run_dir: Path) -> tuple[Path, TextIO]:
        """Retries: another machine may just have taken the number, unseen on a network share."""
        while True:
            path = run_dir / f"run-{self.attempt}.jsonl"
            try:
                return path, path.open("x", encoding="utf-8")
            except FileExistsError:
                self.attempt += 1

    def write(self, kind: str, step: int, **fields: Any) -> None:
        seconds = round(time.monotonic() - self._opened, 3)
        row = {"kind": kind, "step": step, "seconds": seconds, **fields}
        self._file.write(json.dumps(finite(row), allow_nan=False, separators=(",", ":")) + "\n")
        self._file.flush()

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, *_: object) -> None:
        os.fsync(self._file.fileno())
        self._file.close()
        os.close(self._lock)


# From file systems without locks (Lustre, NFS without its daemon): starts there run unlocked.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def _lock(run_dir: Path) -> int:
    """A descriptor that keeps other starts out until it is closed or this process ends in any way.
    Child processes do not inherit it.

    Each machine has its own lock file: over NFS 3 the lock of a machine that disappeared would stay
    forever, and no other machine could resume the run.
    """
    path = run_dir / f".lock-{_machine()}"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:  # the file belongs to another user who has run here before
        descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return descriptor
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise ValueError(
                f"run_dir is {str(run_dir)!r}, where a run is going on on this machine: wait until "
                "it has ended, or choose another run_dir"
            ) from None
        raise
    return descriptor


def _machine() -> str:
    """An ID of this machine since its boot, shared by its containers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


class Discard:
    """Stands in for RecordWriter on hosts that write nothing."""

    attempt = 0

    def write(self, kind: str, step: int, **fields: Any) -> None: ...

    def __enter__(self) -> "Discard":
        return self

    def __exit__(self, *_: object) -> None: ...


@dataclass(frozen=True)
class RunRecord:
    """All attempts of a run as one history: what a restart repeated appears once."""

    headers: list[Row]
    line: list[Row]  # the headers of the starts that led to the current weights: see lineage.py
    opening: Row  # the header of the start at which that line begins; {} without one
    rows: list[Row]
    steps_lost: int  # computed but not saved, so computed again (as far as the record shows)
    seconds: float | None  # of all attempts, to the last line of each; None: an older record
    seconds_lost: float  # the part of `seconds` spent on rows that a later start replaced
    saved: int  # the newest step that any start has recorded as saved; 0: none
    newest: list[Row]  # the header and all rows of the last start in line
    rivals: frozenset[int]  # attempts that are not in line
    builds_on: dict[int, int]  # {attempt: step up to which it builds on the attempts before it}

    def of_kind(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row["kind"] == kind]


def has_record(run_dir: Path) -> bool:
    return (run_dir / "run-1.jsonl").is_file()


def refuse_training(run_dir: str | None) -> None:
    """Raises ValueError if `run_dir` holds a training run: the record of a job that does not train
    would replace its rows."""
    if run_dir is None or not has_record(Path(run_dir)):
        return
    if any("num_steps" in header for header in read_record(run_dir).headers):
        raise ValueError(
            f"run_dir is {run_dir!r}, which holds a training run, and its record would be "
            "replaced: choose another run_dir"
        )


def read_record(
    run_dir: Path | str, following: Row | None = None, begun: Collection[int] = ()
) -> RunRecord:
    """Join the attempts in `run_dir`.

    A start that resumed from step n replaces whatever earlier starts wrote after step n. A start of
    a training does so once it has a row after its header, or if its number is in `begun`.
    `following` is the header of a start that has not written yet: rows that it will replace are
    dropped already. An incomplete last line (the process was killed while writing) is dropped; one
    elsewhere is damage and a ValueError, as is a folder without a record.
    """
    folder = Path(run_dir)
    attempts = sorted(_attempts(folder))
    if not attempts:
        raise ValueError(f"{folder} holds no run-*.jsonl: it is not the folder of a run")
    starts = [Start(number, lines) for number, path in attempts if (lines := _read_lines(path))]
    # A file without a complete header is no start. A start of a training that has computed nothing
    # replaces nothing.
    counted = [
        start
        for start in starts
        if len(start.lines) > 1 or "num_steps" not in start.header or start.number in begun
    ]
    to_come = [] if following is None else [Start(0, [following])]
    beside = rivals([*starts, *to_come]) if starts else frozenset[int]()
    up_to = builds_on([*starts, *to_come])
    line = [start for start in starts if start.number not in beside]
    kept = [start for start in counted if start.number not in beside]
    in_vain = [start for start in counted if start.number in beside]
    built_on = [up_to[start.number] for start in kept]
    rows, lost = still_built_on(kept, [*built_on[1:], up_to.get(0)] if kept else [])
    clocks: list[float | None] = [start.lines[-1].get("seconds") for start in counted]
    known = [clock for clock in clocks if clock is not None]
    return RunRecord(
        headers=[start.header for start in starts],
        line=[start.header for start in line],
        opening=_opening(starts, kept),
        rows=rows,
        steps_lost=computed_again(kept, built_on) + sum(map(computed_in_vain, in_vain)),
        seconds=sum(known) if len(known) == len(clocks) else None,
        seconds_lost=lost + sum(start.lines[-1].get("seconds", 0.0) for start in in_vain),
        saved=max((start.saved for start in starts), default=0),
        newest=line[-1].lines if line else [],
        rivals=beside,
        builds_on=up_to,
    )


def _opening(starts: list[Start], kept: list[Start]) -> Row:
    for start in reversed(kept):
        if start.resumed_from == 0:
            return start.header
    return starts[0].header if starts else {}


def _attempts(run_dir: Path) -> Iterable[tuple[int, Path]]:
    for path in run_dir.glob("run-*.jsonl"):
        number = path.stem.removeprefix("run-")
        if number.isdecimal():
            yield int(number), path


def _read_lines(path: Path) -> list[Row]:
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):  # no newline after it: incomplete
                break
            raise ValueError(
                f"{path}, line {number} is not JSON ({error}): the file was damaged; take it from "
                "a copy, or delete the line, which costs what it says"
            ) from None
    return rows


def finite(value: Any) -> Any:
    """JSON has no NaN or infinity; both become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
