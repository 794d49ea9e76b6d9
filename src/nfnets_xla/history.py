"""What earlier starts of a run have left behind, up to the step from which this one goes on."""

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
    """Accounts that go on. As it is: of a run that begins."""

    step: int = 0  # updates that are done
    seconds: float = 0.0  # of training, without what was lost
    lost_seconds: float = 0.0  # by interruptions
    missed: int = 0  # samples that could not be decoded
    skipped: int = 0  # updates that were left out; see callbacks/skips.py
    evaluated: dict[int, float] = field(default_factory=dict)  # held-out losses by step
    best: tuple[int, float] | None = None  # step and held-out loss of the best checkpoint


def continuation(start: Checkpoint | None) -> Row:
    """What the header of a start from `start` says of it; see lineage.py."""
    if start is None:
        return {"resumed_from": 0, "continues": None, "since": None}
    state = start.state
    since = state.get("resumed_from")
    return {"resumed_from": start.step, "continues": state.get("start"), "since": since}


def record_before(start: Checkpoint | None, run_dir: Path) -> RunRecord | None:
    """What earlier starts wrote, as far as one from `start` builds on it."""
    folder = run_dir if start is None else history(start, run_dir)
    return read_record(folder, continuation(start)) if has_record(folder) else None


def past_of(start: Checkpoint | None, record: RunRecord | None, saved: Collection[int]) -> Past:
    """`record` is the one before `start`; `saved` are the steps of the checkpoints that the run
    has."""
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
    """A record may lack what came before it; checkpoints of older releases do not say."""
    if "missed" in start.state:
        return int(start.state["missed"])
    return 0 if record is None else missed_before(record)


def best_of(
    start: Checkpoint, evaluated: dict[int, float], saved: Collection[int]
) -> tuple[int, float] | None:
    """Step and held-out loss of the best checkpoint up to `start`, if any has a finite loss. Of
    those that are there: one that is another folder's, or was deleted, has no place to keep.

    A checkpoint says which it was when it was written; if it is itself evaluated, it is so after.
    Of older releases, and without `keep_best`, it says nothing: any that was evaluated, then.
    """
    known = evaluated
    if "best" in start.state:
        best = start.state["best"]
        known = {start.step: evaluated.get(start.step, math.inf)}
        known |= {best["step"]: best["loss"]} if best else {}
    finite = {step: loss for step, loss in known.items() if loss < math.inf and step in saved}
    return min(finite.items(), key=lambda item: item[1], default=None)


def history(start: Checkpoint, run_dir: Path) -> Path:
    """The folder with the records up to `start`: `run_dir`, unless the run began in another."""
    other = start.run_dir
    return run_dir if has_record(run_dir) or not has_record(other) else other


def refuse_half_a_history(run_dir: Path) -> None:
    """Raises ValueError for what is left where copying another run's was interrupted."""
    left = sorted(file.name for pattern in FILES for file in run_dir.glob(pattern))
    if left and not has_record(run_dir):
        raise ValueError(
            f"{run_dir} holds {', '.join(left)} and no run-1.jsonl, half of a run's history: give "
            "the resume=PATH that it was to begin from, or delete them, or choose another run_dir"
        )


def take_history(start: Checkpoint, run_dir: Path) -> None:
    """Copy what the run's other folder says of the steps up to `start`; of later ones a reader
    drops it, as after any restart. Nothing comes from where there are only checkpoints.
    """
    if (source := history(start, run_dir)) == run_dir:
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    for pattern in FILES:
        for file in sorted(source.glob(pattern), reverse=True):  # run-1 last: with it all is here
            part = run_dir / f"{file.name}.part"
            shutil.copyfile(file, part)
            part.replace(run_dir / file.name)


def flush_history(run_dir: Path, attempt: int | None = None) -> None:
    """Bring it to the disk: a machine that stops must not leave a checkpoint of steps that it has
    forgotten. All of it, or what one start writes: earlier ones' files change no more."""
    for pattern in FILES:
        of = pattern if attempt is None else pattern.replace("*", str(attempt))
        for file in run_dir.glob(of):
            flush_to_disk(file)
    flush_to_disk(run_dir)


def evaluations(record: RunRecord, weights: str) -> dict[int, float]:
    """{step: held-out loss} of the "raw" weights or the "ema" that were evaluated.

    Infinite for one that was not finite, which a record has as null.
    """
    rows = [row for row in record.of_kind("eval") if row["weights"] == weights]
    losses = {row["step"]: row["loss"] for row in rows}
    return {step: math.inf if loss is None else loss for step, loss in losses.items()}


def ended(run_dir: Path) -> Row | None:
    """The line with which a finished run closed its record."""
    if not has_record(run_dir):
        return None
    rows = read_record(run_dir).of_kind("end")
    return rows[-1] if rows else None
