"""What earlier starts of a run have recorded, up to the step from which this one resumes."""

import math
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from nfnets_xla.callbacks.missed import missed_before
from nfnets_xla.checkpoint import Checkpoint
from nfnets_xla.data.storage import flush_to_disk
from nfnets_xla.record import Row, RunRecord, has_record, read_record

FILES = ("missed-*.jsonl", "ledger-*.bin", "run-*.jsonl")  # what each start writes


@dataclass(frozen=True)
class Past:
    """Running totals that a resumed run continues. The defaults are those of a new run."""

    step: int = 0  # updates done
    seconds: float = 0.0  # of training, without time lost to restarts
    lost_seconds: float = 0.0  # by interruptions
    missed: int = 0  # samples that could not be decoded
    skipped: int = 0  # non-finite updates; see callbacks/skips.py
    evaluated: dict[int, float] = field(default_factory=dict)  # held-out losses by step
    best: tuple[int, float] | None = None  # step and held-out loss of the best checkpoint


def continuation(start: Checkpoint | None) -> Row:
    """The entries about `start` in the header of a start that resumes from it; see lineage.py."""
    if start is None:
        return {"resumed_from": 0, "continues": None, "since": None}
    state = start.state
    since = state.get("resumed_from")
    return {"resumed_from": start.step, "continues": state.get("start"), "since": since}


def record_before(start: Checkpoint | None, run_dir: Path) -> RunRecord | None:
    """What earlier starts recorded, up to the checkpoint `start`."""
    folder = run_dir if start is None else history(start, run_dir)
    return read_record(folder, continuation(start)) if has_record(folder) else None


def past_of(start: Checkpoint | None, record: RunRecord | None, saved: Collection[int]) -> Past:
    """`record` is that of the starts before this one, up to `start`; `saved` are the steps of the
    run's checkpoints."""
    lost_seconds = 0.0 if record is None else record.seconds_lost
    if start is None:
        return Past(lost_seconds=lost_seconds)
    evaluated: dict[int, float] = {}
    if record is not None:
        evaluated = evaluations(record, "ema" if "ema" in start.forms else "raw")
    return Past(
        start.step,
        seconds=start.state["seconds"],
        lost_seconds=lost_seconds,
        missed=_missed(start, record),
        skipped=start.state.get("skipped", 0),
        evaluated=evaluated,
        best=best_of(start, evaluated, saved),
    )


def _missed(start: Checkpoint, record: RunRecord | None) -> int:
    """From the checkpoint, since a record may be incomplete; older releases saved no count."""
    if "missed" in start.state:
        return int(start.state["missed"])
    return 0 if record is None else missed_before(record)


def best_of(
    start: Checkpoint, evaluated: dict[int, float], saved: Collection[int]
) -> tuple[int, float] | None:
    """Step and held-out loss of the best checkpoint up to `start`, if any has a finite loss. Only
    checkpoints in `saved` count, not those in another folder or deleted.

    A checkpoint names the best one at the time it was written, before it was itself evaluated. One
    written by an older release or without `keep_best` names none: then all evaluated ones count.
    """
    known = evaluated
    if "best" in start.state:
        best = start.state["best"]
        known = {start.step: evaluated.get(start.step, math.inf)}
        known |= {best["step"]: best["loss"]} if best else {}
    finite = {step: loss for step, loss in known.items() if loss < math.inf and step in saved}
    return min(finite.items(), key=lambda item: item[1], default=None)


def history(start: Checkpoint, run_dir: Path) -> Path:
    """The folder with the records up to `start`: `run_dir`, or the folder where the run began."""
    other = start.run_dir
    return run_dir if has_record(run_dir) or not has_record(other) else other


def refuse_half_a_history(run_dir: Path) -> None:
    """Raises ValueError for an incomplete copy of another folder's history (interrupted)."""
    left = sorted(file.name for pattern in FILES for file in run_dir.glob(pattern))
    if left and not has_record(run_dir):
        raise ValueError(
            f"{run_dir} holds {', '.join(left)} and no run-1.jsonl, half of a run's history: give "
            "the resume=PATH that it was to begin from, or delete them, or choose another run_dir"
        )


def take_history(start: Checkpoint, run_dir: Path) -> None:
    """Copy the history from the folder where the run began. Readers drop its rows after `start`, as
    after any restart. A folder with only checkpoints has none to copy.
    """
    if (source := history(start, run_dir)) == run_dir:
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    for pattern in FILES:
        for file in sorted(source.glob(pattern), reverse=True):  # run-1 last: copy complete
            part = run_dir / f"{file.name}.part"
            shutil.copyfile(file, part)
            part.replace(run_dir / file.name)


def flush_history(run_dir: Path, attempt: int | None = None) -> None:
    """Flush the history to disk, so that after a crash no checkpoint is ahead of the history. With
    `attempt`, only that start's files: earlier ones no longer change."""
    for pattern in FILES:
        of = pattern if attempt is None else pattern.replace("*", str(attempt))
        for file in run_dir.glob(of):
            flush_to_disk(file)
    flush_to_disk(run_dir)


def evaluations(record: RunRecord, weights: str) -> dict[int, float]:
    """{step: held-out loss} of the "raw" or "ema" weights.

    A loss that was not finite, null in the record, is infinite here.
    """
    rows = [row for row in record.of_kind("eval") if row["weights"] == weights]
    losses = {row["step"]: row["loss"] for row in rows}
    return {step: math.inf if loss is None else loss for step, loss in losses.items()}


def ended(run_dir: Path) -> Row | None:
    """The last row of a finished run's record; None if the run is not finished."""
    if not has_record(run_dir):
        return None
    rows = read_record(run_dir).of_kind("end")
    return rows[-1] if rows else None
