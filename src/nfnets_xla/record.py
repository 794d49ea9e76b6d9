"""The record of a run: one JSON-lines file per start, which every later tool reads.

`run-<attempt>.jsonl` opens with a header (kind "header"), then one object per line, each with a
"kind", a "step" and the "seconds" since the file was opened. Files are never appended to by a later
start, because object stores cannot; a run that was interrupted twice leaves three. Steps count from
1: step n is the n-th update, and an evaluation or a checkpoint at step n follows that update. One
process of a machine writes into a folder at a time. Standard library only.
"""

import errno
import fcntl
import json
import math
import os
import platform
import time
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

Row = dict[str, Any]
CHECKPOINTS = "checkpoints"  # in the run's folder, if no other place is named for them


class RecordWriter:
    """Writes one attempt's file; every line is complete and flushed before `write` returns."""

    def __init__(
        self, run_dir: Path, header: Row, first: Callable[[], None] = lambda: None
    ) -> None:
        """`header["resumed_from"]` is the step whose checkpoint this start continues (0: none);
        `header["start"]` names this start, `header["continues"]` the one that wrote it.

        `first` is done when no other start can write into the folder, and before this one does.
        Raises ValueError if one is going on there.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(run_dir)
        try:
            first()
            self.attempt = 1 + max((number for number, _ in _attempts(run_dir)), default=0)
            self.path = run_dir / f"run-{self.attempt}.jsonl"
            self._opened = time.monotonic()
            self._file: TextIO = self.path.open("x", encoding="utf-8")
            try:
                self.write("header", header["resumed_from"], **header)
            except BaseException:
                with suppress(OSError):  # what did not fit is tried again
                    self._file.close()
                raise
        except BaseException:
            os.close(self._lock)
            raise

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


# Lustre and others without locks, NFS without its daemon: there a start goes on without one.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def _lock(run_dir: Path) -> int:
    """A descriptor that keeps other starts out until it is closed, or this process ends in any way.
    Processes that this one starts do not have it.

    The file is the machine's own: over NFS 3 the lock of one that was taken away would stay for
    good, and no other machine could go on.
    """
    path = run_dir / f".lock-{_machine()}"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:  # another user's, who has run here before
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
    """Since it was last started; containers have their machine's."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


class Discard:
    """In place of a writer on hosts that write nothing."""

    attempt = 0

    def write(self, kind: str, step: int, **fields: Any) -> None: ...

    def __enter__(self) -> "Discard":
        return self

    def __exit__(self, *_: object) -> None: ...


@dataclass(frozen=True)
class RunRecord:
    """All attempts of a run as one history: what a restart repeated appears once."""

    headers: list[Row]
    opening: Row  # the header of the start that the run, as it is now, began with; {} without one
    rows: list[Row]
    steps_lost: int  # computed (as far as the record shows), in no checkpoint, computed again
    seconds: float | None  # of all attempts, to the last line of each; None: an older record
    seconds_lost: float  # of them, those after a line that a later start still builds on
    newest: list[Row]  # all lines of the last start, with its header
    rivals: frozenset[int] = frozenset()  # attempts of which nothing is built on: see _rivals

    def of_kind(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row["kind"] == kind]


def has_record(run_dir: Path) -> bool:
    return (run_dir / "run-1.jsonl").is_file()


def refuse_training(run_dir: str | None) -> None:
    """For jobs that train nothing: a record of theirs would replace a training's rows. Raises
    ValueError."""
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

    A start that resumed from step n replaces whatever earlier starts wrote after step n; one of a
    training once it has a row, or is among those that are known to have `begun` without one. A torn
    last line (the process was killed while writing) is dropped; a torn line elsewhere is damage
    and a ValueError, as is a folder without a record. What a start that is still to write its
    header, `following`, will replace counts as replaced.
    """
    folder = Path(run_dir)
    attempts = sorted(_attempts(folder))
    if not attempts:
        raise ValueError(f"{folder} holds no run-*.jsonl: it is not the folder of a run")
    starts = [(number, lines) for number, path in attempts if (lines := _read_lines(path))]
    # One that was killed before its header was complete is none. One of a training that has
    # computed nothing replaces nothing.
    counted = [
        (number, lines)
        for number, lines in starts
        if len(lines) > 1 or "num_steps" not in lines[0] or number in begun
    ]
    headers = [lines[0] for _, lines in starts]
    rivals = _rivals([*starts, (0, [following])] if following else starts)
    built_on = [lines for number, lines in counted if number not in rivals]
    resumed = [int(lines[0]["resumed_from"]) for lines in built_on]
    at_last = None if following is None else int(following["resumed_from"])
    rows, lost = _still_built_on(built_on, [*resumed[1:], at_last])
    in_vain = [lines for number, lines in counted if number in rivals]
    clocks: list[float | None] = [lines[-1].get("seconds") for _, lines in counted]
    known = [clock for clock in clocks if clock is not None]
    return RunRecord(
        headers,
        _opening(headers, built_on),
        rows,
        steps_lost=_computed_again(built_on, resumed) + sum(map(_computed, in_vain)),
        seconds=sum(known) if len(known) == len(clocks) else None,
        seconds_lost=lost + sum(lines[-1].get("seconds", 0.0) for lines in in_vain),
        newest=starts[-1][1] if starts else [],
        rivals=rivals,
    )


def _opening(headers: list[Row], built_on: list[list[Row]]) -> Row:
    for lines in reversed(built_on):
        if lines[0]["resumed_from"] == 0:
            return lines[0]
    return headers[0] if headers else {}


def _rivals(starts: list[tuple[int, list[Row]]]) -> frozenset[int]:
    """Attempts that trained beside one that came further, on another machine perhaps: a later start
    continues from a checkpoint of an earlier one, which nothing of those between them led to.

    Older records do not say which start they continue: there each continues the one before it.
    """
    rivals: set[int] = set()
    place = {lines[0]["start"]: at for at, (_, lines) in enumerate(starts) if "start" in lines[0]}
    for at, (_, lines) in enumerate(starts):
        writer = place.get(lines[0].get("continues"), at)
        between = starts[writer + 1 : at]
        rivals |= {
            number
            for number, other in between
            if other[0]["resumed_from"] < lines[0]["resumed_from"]
        }
    return frozenset(rivals)


def _still_built_on(
    starts: list[list[Row]], followed_at: Sequence[int | None]
) -> tuple[list[Row], float]:
    """The rows of `starts`, each with its header first, that no later one replaces, and the seconds
    of those that one does. Each is followed by a start from the step given, the last by none or by
    one that is still to write. An end that was gone on from is none any more, and is not lost.

    From the newest to the oldest: a row is good if it is of a step that all later starts were
    resumed from, or after. What is read is looked at once, however many starts there are.
    """
    kept: list[list[Row]] = []
    lost = 0.0
    bound = math.inf
    for place in reversed(range(len(starts))):
        lines, follows = starts[place], followed_at[place]
        bound = min(bound, math.inf if follows is None else follows)
        clock = [row.get("seconds", 0.0) for row in lines]
        good: list[Row] = []
        for row, (before, now) in zip(lines[1:], pairwise(clock), strict=True):
            if row["step"] <= bound:
                if place == len(starts) - 1 or row["kind"] != "end":
                    good.append(row)
            else:
                lost += now - before
        kept.append(good)
    return [row for good in reversed(kept) for row in good], lost


def _computed(lines: list[Row]) -> int:
    """Steps of one start, as far as the rows show."""
    begun = int(lines[0]["resumed_from"])
    return max((row["step"] - begun for row in lines[1:] if row["kind"] in _PROGRESS), default=0)


def _computed_again(starts: list[list[Row]], resumed: Sequence[int]) -> int:
    """Steps that a later start computed once more, as far as the rows show."""
    steps: list[int] = []  # that were computed and are still built on, sorted
    lost = 0
    for lines, begun in zip(starts, resumed, strict=True):
        if steps:
            lost += max(0, steps[-1] - begun)
            del steps[bisect_right(steps, begun) :]
        steps += sorted(row["step"] for row in lines[1:] if row["kind"] in _PROGRESS)
    return lost


_PROGRESS = ("train", "samples")  # rows written for a computed step


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
            if number == len(lines):  # no newline after it: torn
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
