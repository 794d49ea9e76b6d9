"""The ledger: the samples of every step, written as they are used; and the audit of a run by it.

    ledger-<attempt>.bin: a line of JSON, then one frame for each step:
        step, bytes, CRC-32    3 little-endian uint32
        zlib of two int64 columns, (epoch, sample), transposed so that bytes of equal significance
        are adjacent

A sample is its number in the index: shards in order of their names, then rows. A sample that could
not be decoded is written as -1 - number. A last frame that is cut short, by a kill, is ignored.
"""

import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray

from nfnets_xla.data.order import Order
from nfnets_xla.display import plural
from nfnets_xla.hosts import ALONE, Hosts
from nfnets_xla.record import RunRecord, has_record, read_record

FRAME = struct.Struct("<III")
NAMED = 10  # samples that a message names

Int64 = NDArray[np.int64]


class Ledger(Callback):
    """Writes one start's file. A step is in it, and on disk, before a checkpoint includes the step:
    see history.flush_history."""

    def __init__(
        self, run_dir: Path, attempt: int, head: dict[str, Any], hosts: Hosts = ALONE
    ) -> None:
        """`head` is that of `head_of`: "resumed_from", "samples" per epoch, "draws", "steps"."""
        self._hosts = hosts
        path = run_dir / f"ledger-{attempt}.bin" if hosts.writes else Path(os.devnull)
        self._file = path.open("xb" if hosts.writes else "wb")
        self._write(json.dumps(head).encode() + b"\n")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        shown = batch["weight_U"] > 0
        missed = [(sample["epoch"], -1 - sample["sample"]) for sample in batch["missed"]]
        rows = np.stack([batch["epoch_U"][shown], batch["sample_U"][shown]], axis=1)
        rows = np.concatenate([rows, np.array(missed, np.int64).reshape(-1, 2)])
        if self._hosts.count > 1:
            parts = self._hosts.gather(rows.tolist())
            rows = np.concatenate([np.array(part, np.int64).reshape(-1, 2) for part in parts])
        data = zlib.compress(rows.astype("<i8").view(np.uint8).reshape(-1, 16).T.tobytes())
        self._write(FRAME.pack(batch["step"] + 1, len(data), zlib.crc32(data)) + data)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def head_of(order: Order, start_step: int) -> dict[str, int]:
    sizes = {"samples": order.num_samples, "draws": order.total_draws, "steps": order.num_steps}
    return {"resumed_from": start_step, **sizes}


def read_ledger(path: Path) -> tuple[dict[str, Any] | None, dict[int, tuple[int, int]]]:
    """The head, and {step: (offset, bytes)} of the frames. The head is None if it was cut short.

    Raises ValueError for damage that is not a cut end: a damaged frame with a frame after it.
    """
    frames: dict[int, tuple[int, int]] = {}
    damage = None
    with path.open("rb") as file:
        line = file.readline()
        if not line.endswith(b"\n"):
            return None, frames
        for step, at, size, whole in _frames(file):
            if not whole:
                damage = damage or f"{path}, offset {at}: the frame of step {step} is damaged"
            elif damage:
                raise ValueError(damage)
            else:
                frames[step] = at, size
    return json.loads(line), frames


def _frames(file: BinaryIO) -> Iterator[tuple[int, int, int, bool]]:
    """Reads frames from the current position: step, offset, bytes, and whether the CRC fits."""
    while len(frame := file.read(FRAME.size)) == FRAME.size:
        (step, size, crc), at = FRAME.unpack(frame), file.tell()
        data = file.read(size)
        if step == 0 or size == 0 or len(data) < size:
            return
        yield step, at, size, zlib.crc32(data) == crc


def _has_frame(path: Path) -> bool:
    with path.open("rb") as file:
        file.readline()
        return any(whole for *_, whole in _frames(file))


def rows_of(path: Path, offset: int, size: int) -> tuple[Int64, Int64]:
    """(epochs, samples) of one frame."""
    with path.open("rb") as file:
        file.seek(offset)
        columns = np.frombuffer(zlib.decompress(file.read(size)), np.uint8).reshape(16, -1)
    rows = np.ascontiguousarray(columns.T).view("<i8")
    return rows[:, 0], rows[:, 1]


# ---- audit ------------------------------------------------------------------------------------


Frames = dict[int, tuple[Path, int, int]]  # {step: ledger, offset and bytes of its frame}


@dataclass
class Audit:
    """What a run's ledgers say of the steps that led to its latest weights."""

    starts: int
    steps: int  # of the run
    samples: int  # per epoch
    draws: int  # of the run
    reached: int = 0  # steps 1 to this one have a frame, each once
    certain: int = 0  # the last step with a checkpoint, or the run's end, in the record
    stopped: int | None = None  # the step at which the guard froze, if it did
    again: int = 0  # steps that were discarded and computed again after a restart
    undecodable: int = 0
    skipped: list[int] = field(default_factory=list)  # steps whose update was skipped
    without_effect: int = 0  # samples in the skipped steps
    shown: dict[int, int] = field(default_factory=dict)  # {epoch: number of distinct samples}
    faults: list[str] = field(default_factory=list)

    def report(self) -> list[str]:
        lines = [
            f"{plural(self.starts, 'start')}; steps 1 to {self.reached} of {self.steps}; "
            f"{plural(self.again, 'step')} computed again after restarts, counted once"
        ]
        for epoch, count in self.shown.items():
            due = min(self.samples, self.draws - epoch * self.samples)
            once = "" if self.faults else ", each once"
            lines.append(f"epoch {epoch}: {count:,} of {due:,} samples{once}")
        if self.undecodable:
            lines.append(f"{self.undecodable} of them could not be decoded, and had no weight")
        if self.skipped:
            lines.append(
                f"steps {_first(self.skipped)} were left out (loss or gradient not finite): "
                f"{self.without_effect} of the samples changed nothing; the record names them"
            )
        if self.stopped:
            lines.append(
                f"step {self.stopped} (loss or gradient not finite) was one too many: what was "
                "shown from there on changed nothing, and does not count"
            )
        verdict = "every sample exactly once" if self.reached == self.steps else "no sample twice"
        if self.certain < self.reached:
            verdict = (
                f"no sample twice; certain up to step {self.certain}, the newest that is known "
                "to be saved: what comes after it may yet be computed again"
            )
        return [*lines, *(self.faults or [verdict])]


def audit(run_dir: Path) -> Audit:
    """Raises ValueError for a folder without ledgers, and for one that is damaged."""
    paths = sorted(run_dir.glob("ledger-*.bin"), key=attempt_of)
    # The record is read first: if the run is still training, it must not be ahead of the ledgers.
    begun = {attempt_of(path) for path in paths if _has_frame(path)}
    record = read_record(run_dir, begun=begun) if has_record(run_dir) else None
    sizes, effective, again = _joined(paths, record)
    if sizes is None:
        raise ValueError(f"{run_dir} holds no ledger-*.bin: train with trainer.ledger=true")
    found = Audit(len(paths), sizes["steps"], sizes["samples"], sizes["draws"], again=again)
    if record is not None:
        _take_verdicts(found, record)
    if found.stopped:
        effective = {step: at for step, at in effective.items() if step < found.stopped}
    found.reached = max(effective, default=0)
    found.without_effect = sum(
        len(rows_of(*effective[step])[0]) for step in found.skipped if step in effective
    )
    absent = sorted(set(range(1, found.reached + 1)) - effective.keys())
    if absent:
        found.faults.append(f"steps without a frame: {_first(absent)}")
    if found.certain > found.reached:
        found.faults.append(
            f"steps {found.reached + 1} to {found.certain} are saved and have no frame"
        )
    for epoch, seen in _epochs(found, effective):
        due = min(found.samples, found.draws - epoch * found.samples)
        found.shown[epoch] = int(np.count_nonzero(seen))
        if repeated := np.flatnonzero(seen > 1).tolist():
            found.faults.append(f"epoch {epoch}: shown more than once: {_first(repeated)}")
        if found.reached == found.steps and found.shown[epoch] != due:
            never = np.flatnonzero(seen == 0).tolist()
            found.faults.append(
                f"epoch {epoch}: {found.shown[epoch]} of {due} samples shown; not: {_first(never)}"
            )
    return found


def attempt_of(path: Path) -> int:
    return int(path.stem.removeprefix("ledger-"))


def _joined(
    paths: Sequence[Path], record: RunRecord | None
) -> tuple[dict[str, Any] | None, Frames, int]:
    """The sizes that a ledger's head states; every step's newest frame, without those that a later
    start has discarded; and the number of the discarded."""
    sizes: dict[str, Any] | None = None
    effective: Frames = {}
    again = 0
    for path in paths:
        head, frames = read_ledger(path)
        sizes = head or sizes
        if record is not None and attempt_of(path) in record.rivals:
            again += len(frames)
            continue
        if head is None or not frames:
            continue
        begun_at: int = head["resumed_from"]
        if record is not None:
            begun_at = record.builds_on.get(attempt_of(path), begun_at)
        replaced = [step for step in effective if step > begun_at]
        again += len(replaced)
        for step in replaced:
            del effective[step]
        effective |= {step: (path, *place) for step, place in frames.items()}
    return sizes, effective, again


def _take_verdicts(found: Audit, record: RunRecord) -> None:
    """Adds what is known only after a step's frame is written: saved, skipped, stopped."""
    saved = [header["resumed_from"] for header in record.line[-1:]]
    saved += [row["step"] for kind in ("checkpoint", "end") for row in record.of_kind(kind)]
    found.certain = max(saved, default=0)
    for row in record.of_kind("nonfinite"):
        if row["stopped"]:
            found.stopped = row["step"]
        else:
            found.skipped.append(row["step"])


def _epochs(found: Audit, effective: Frames) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """For each epoch, how often every sample was shown. One or two epochs are in memory at a time:
    an epoch is over at the first step that shows only later ones."""
    counts: dict[int, NDArray[np.uint8]] = {}
    late: dict[int, list[int]] = {}  # {epoch: steps that show it after it was over}
    first = 0  # the first epoch that is not over
    for step in sorted(effective):
        epochs, samples = rows_of(*effective[step])
        found.undecodable += int((samples < 0).sum())
        samples = np.where(samples < 0, -1 - samples, samples)
        for epoch in sorted(set(epochs.tolist())):
            if epoch < first:
                late.setdefault(epoch, []).append(step)
                continue
            of_epoch = counts.setdefault(epoch, np.zeros(found.samples, np.uint8))
            np.add.at(of_epoch, samples[epochs == epoch], 1)
        if len(epochs):
            first = max(first, int(epochs.min()))
        for epoch in [each for each in sorted(counts) if each < first]:
            yield epoch, counts.pop(epoch)
    yield from sorted(counts.items())
    for epoch, steps in sorted(late.items()):
        found.faults.append(f"epoch {epoch}: over, and shown again in steps {_first(steps)}")


def _first(numbers: list[int]) -> str:
    more = f" and {len(numbers) - NAMED} more" if len(numbers) > NAMED else ""
    return ", ".join(map(str, numbers[:NAMED])) + more
