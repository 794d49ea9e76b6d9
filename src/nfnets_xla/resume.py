"""The state that a checkpoint holds besides tensors, and when a run may resume from it.

| the checkpoint has | then |
|---|---|
| another recipe, model, seed, shards, classes | refused, naming every difference |
| other initial weights (by their bytes), under another name | refused |
| another order of the same shards (of another release) | refused |
| other streams (`data.num_streams`) | refused: they are part of the order |
| other hosts, devices, mesh, loader workers, stacked or not | accepted |
| other held-out shards | accepted; see prepare.find_past |
| other versions of the libraries | accepted with a warning: the bits may differ |

If the record lists checkpoints but there is none, or only damaged ones, the run does not start
anew but is refused. With `resume=never` a folder that holds a run is refused. With `resume=PATH` a
folder without a run starts from that checkpoint, and copies it and its history; the same command,
given again, resumes from the folder's own checkpoints.
"""

import hashlib
import json
import platform
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nfnets_xla import checkpoint, sources
from nfnets_xla.checkpoint import Checkpoint
from nfnets_xla.config import differences
from nfnets_xla.data.order import Order
from nfnets_xla.data.remote import open_folder
from nfnets_xla.data.storage import address, is_below
from nfnets_xla.record import has_record, read_record

# Packages on which a run's numbers and pixels may depend; their versions are recorded.
VERSIONS = ("nfnets_xla", "torch", "lightning", "numpy", "pillow", "simplejpeg")


@dataclass(frozen=True)
class RunState:
    """Makes the state of each checkpoint of a run. Its times do not use the wall clock."""

    identity: dict[str, Any]
    order: Order
    versions: dict[str, str]
    seconds_before: float  # of earlier starts, up to the checkpoint that this one resumes from
    begun_with: dict[str, Any] | None = None  # Beginning.state(); None: not recorded
    start: str | None = None  # the ID of this start
    resumed_from: int = 0  # step of the checkpoint that it resumes from
    _began: float = field(default_factory=time.monotonic)

    def at(self, step: int) -> dict[str, Any]:
        return {
            "identity": self.identity,
            "recipe": digest(self.identity),
            "begun_with": self.begun_with,
            "start": self.start,
            "resumed_from": self.resumed_from,
            "samples": min(step * self.order.unique_per_step, self.order.total_draws),
            "next": position(self.order, step),
            "seconds": round(self.seconds_before + time.monotonic() - self._began, 3),
            "versions": self.versions,
        }


@dataclass(frozen=True)
class Beginning:
    """The initial weights of a run: the settings that name them, and their hash.

    After the start they may be deleted or trained further, so equal settings are enough to resume.
    Only if the settings differ, perhaps because a folder was moved, the hashes are compared.
    """

    given: dict[str, Any]
    which: Callable[[], str | None]  # their SHA-256, or the tag of public ones; None: random

    def state(self) -> dict[str, Any]:
        return {"given": self.given, "which": self.which()}

    def differs_from(self, begun_with: dict[str, Any] | None) -> list[str]:
        """`begun_with` is the `state` in a checkpoint; None from older releases."""
        if begun_with is None or begun_with["given"] == self.given:
            return []
        return differences(
            {"initial_weights": begun_with["which"]}, {"initial_weights": self.which()}
        )


def installed() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}}


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def position(order: Order, step: int) -> str | None:
    """A hash of the samples of the update after `step`, which differ in another order."""
    if step >= order.num_steps:
        return None
    rows = order.step(step)
    columns = [rows.shard, rows.row, rows.epoch, rows.stream]
    return digest([column.tolist() for column in columns])


def find_resume(
    given: str,
    root: str,
    run_dir: Path,
    identity: dict[str, Any],
    beginning: Beginning,
    order: Order,
    versions: dict[str, str],
    say: Callable[[str], None],
) -> Checkpoint | None:
    """The checkpoint to resume from, or None. Raises ValueError as described above.

    `given` is "auto", "never", or a path that sources.find takes; `root` is the folder of the run's
    checkpoints.
    """
    found, skipped = checkpoint.latest(root)
    for line in skipped:
        say(f"warning: {line}")
    holder, other = run_dir, "another run_dir"
    if found and not is_below(root, run_dir):
        also = " and run_dir" if has_record(run_dir) else ""
        holder, other = root, f"another trainer.checkpoint_dir{also}"
    if given == "never" and (found or has_record(run_dir)):
        raise ValueError(
            f"{holder} holds a run, and resume is never: choose {other}, or resume=auto"
        )
    if given not in ("auto", "never"):
        found = _begun_from(given, found, root, run_dir, say)
    _look_for_newer(found, root, run_dir, say)
    if found is None:
        return None
    changed = differences(found.state["identity"], identity)
    changed += beginning.differs_from(found.state.get("begun_with"))
    if changed:
        holder = holder if given in ("auto", "never") else found
        raise ValueError(
            f"{holder} holds another run ({'; '.join(changed)}): choose {other}, or give the "
            "values it was started with"
        )
    before = found.state.get("versions", {})
    if found.state.get("next") != position(order, found.step):
        raise ValueError(
            f"{found} was written in another order of the same samples: go on with the release of "
            f"nfnets_xla that wrote it ({before.get('nfnets_xla')})"
        )
    _tell(found, differences(before, versions), run_dir, say)
    return found


def _tell(found: Checkpoint, newer: list[str], run_dir: Path, say: Callable[[str], None]) -> None:
    """Print warnings about resuming from `found`; `newer` are the differences of versions."""
    if newer:
        say(f"warning: {found} was written under other versions ({'; '.join(newer)})")
    start = found.state.get("start")
    if has_record(run_dir):
        if start and start not in [each.get("start") for each in read_record(run_dir).headers]:
            say(
                f"warning: {run_dir} will lack the record of steps up to {found.step}: another "
                f"run_dir has that of the start that saved {found}"
            )
    elif found.step and not has_record(found.run_dir):
        say(
            f"warning: {run_dir} will lack the record of the steps up to {found.step}, which is "
            f"not beside {found}: begin with resume=RUN, the folder of its run, to take it along"
        )
    say(f"resuming from {found}")


def _look_for_newer(
    found: Checkpoint | None, root: str, run_dir: Path, say: Callable[[str], None]
) -> None:
    """Refuse, or warn, if the newest recorded checkpoints are gone (a disk not mounted?)."""
    if not has_record(run_dir):
        return
    record = read_record(run_dir)
    saved = [header["resumed_from"] for header in record.line[-1:]]
    saved += [row["step"] for row in record.of_kind("checkpoint")]
    before = sources.checkpoint_dir_of(run_dir)
    # The last start may have ended before it recorded a checkpoint; the folder may be gone.
    if found is None and before not in (None, root):
        with suppress(Exception):
            saved += checkpoint.steps(before)
    last = max(saved, default=0)
    if last <= (0 if found is None else found.step):
        return
    gone = f"{run_dir} holds a run that was saved up to step {last}, and {root} lacks it"
    if found is None:
        raise ValueError(
            f"{gone}: give the trainer.checkpoint_dir that has its checkpoints, or resume=PATH of "
            "a copy; or another run_dir, to begin anew"
        )
    say(f"warning: {gone}: steps after {found.step} are computed again")


def _begun_from(
    given: str, own: Checkpoint | None, root: str, run_dir: Path, say: Callable[[str], None]
) -> Checkpoint:
    """The checkpoint at `given`; or `own`, the newest in `root`, if the run began from it."""
    try:
        start = sources.find(given)
    except ValueError:  # nothing at the address, or damaged
        if own is None:
            raise
        start = None
    if start is None:
        if own is None:
            raise ValueError(
                f"resume is {given!r}, where there is no checkpoint: give one, the folder of a "
                "run, auto or never"
            )
        say(f"warning: resume is {given!r}, where there is no checkpoint any more; using {own}")
        return own
    if own is None:
        if not _tells_of(run_dir, start):
            raise ValueError(
                f"resume is {given!r}, and {run_dir} holds the record of another start, which "
                f"lacks the steps up to {start.step}: choose another run_dir"
            )
        return start
    # The run at `given` may still be training in its own folder, and so be further each time.
    went_on = not checkpoint.is_one(given) and has_record(run_dir) and _tells_of(run_dir, start)
    is_behind = own.step < start.step and not went_on
    if is_behind or (is_in(root, start) and own.step > start.step):
        raise ValueError(
            f"resume is {given!r}, and run_dir already holds {own}: nothing is overwritten; choose "
            "another run_dir, or resume=auto"
        )
    return own


def is_in(root: str, found: Checkpoint) -> bool:
    """Whether `found` is one of the checkpoints in `root`, whatever path names it."""
    if address(found.where) or address(root):
        return found.where.rpartition("/")[0] == address(root)
    return Path(found.where).resolve().parent == Path(root).resolve()


def adopt(root: str, found: Checkpoint) -> None:
    """Copy `found` into `root`; the manifest comes last, and makes it a checkpoint."""
    folder, name = open_folder(root), checkpoint.folder_name(found.step)
    for file in sorted(found.folder.iterdir(), key=lambda file: file.name == checkpoint.MANIFEST):
        with folder.writing(f"{name}/{file.name}") as path:
            shutil.copyfile(file, path)


def _tells_of(run_dir: Path, start: Checkpoint) -> bool:
    """Whether the record in `run_dir`, if there is one, covers the steps up to `start`: it equals
    the record in the folder of `start`, as far as both go; if that has none, it reaches `start`."""
    if not has_record(run_dir):
        return True
    beside = start.run_dir
    if has_record(beside):
        one, other = ((each / "run-1.jsonl").read_bytes() for each in (beside, run_dir))
        return one.startswith(other) or other.startswith(one)
    record = read_record(run_dir)
    reached = [header["resumed_from"] for header in record.headers]
    return max(reached + [row["step"] for row in record.rows], default=0) >= start.step
