"""Which checkpoints of a run are kept, and which are deleted."""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from nfnets_xla.checkpoint import STATE, complete_steps, folder_name, remove, steps_of
from nfnets_xla.data.remote import AnyFolder, open_folder


def prune(
    root: str | Path,
    *,
    start: int,
    written: Sequence[int],
    keep: int,
    every_hours: float | None = None,
    best: Sequence[int | None] = (),
) -> None:
    """Delete all but the newest `keep` checkpoints, and remains of incomplete ones.

    The run resumed from step `start` and has since saved the steps `written`. Any other checkpoints
    after `start` did not verify, or the run would have resumed from them: they do not count among
    the `keep`. Also kept are the first checkpoint of each further `every_hours` of training time
    (not wall-clock time, which may be set back), and the steps in `best`.
    """
    folder = open_folder(root)
    files = folder.sizes("")
    found = steps_of(files)
    good = [step for step in found if step <= start or step in written]
    whole = complete_steps(files)
    complete = [step for step in good if step in whole]
    kept = {*complete[:keep], *best}
    if every_hours is not None:
        kept |= _hourly(folder, complete, every_hours)
    if len(complete) < keep:
        return
    for step in found:
        if step not in kept and step < written[-1]:
            remove(folder, step)


def _hourly(folder: AnyFolder, complete: list[int], every_hours: float) -> set[int]:
    """The first checkpoint of each further `every_hours`, and all whose time cannot be read now: a
    temporary failure of disk or bucket must not delete what should be kept forever."""
    first: dict[int, int] = {}
    unknown: set[int] = set()
    for step in sorted(complete):
        try:
            data = folder.read(f"{folder_name(step)}/{STATE}")
        except FileNotFoundError:
            continue  # not a checkpoint
        except (OSError, ValueError):  # ValueError: from an address
            unknown.add(step)
            continue
        with suppress(ValueError):  # incomplete: not a checkpoint either
            seconds = json.loads(data).get("seconds", 0.0)
            first.setdefault(int(seconds / 3600 // every_hours), step)
    return unknown | {step for number, step in first.items() if number}
