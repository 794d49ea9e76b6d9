"""Which checkpoints of a run stay, and which make room."""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from nfnets_xla.checkpoint import STATE, complete_steps, folder_name, remove, steps
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
    """Delete all but the newest `keep` checkpoints of a run that went on from `start` and has since
    `written` some, and what is left of older ones. Others that are newer than `start` did not
    verify, or it would have gone on from them: they take nobody's place.

    Those also stay that are the first of each further `every_hours` of the run's own time (not of
    the clock, which may be set back), and those of the steps `best`.
    """
    folder = open_folder(root)
    files = folder.sizes("")
    found = steps(root)
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
    """The first of each further `every_hours`, and those of which it cannot be read now when they
    were: a disk or a bucket that fails once must not cost what is kept for good."""
    first: dict[int, int] = {}
    unknown: set[int] = set()
    for step in sorted(complete):
        try:
            data = folder.read(f"{folder_name(step)}/{STATE}")
        except FileNotFoundError:
            continue  # it is no checkpoint
        except (OSError, ValueError):  # the latter of an address
            unknown.add(step)
            continue
        with suppress(ValueError):  # torn: it is none either
            seconds = json.loads(data).get("seconds", 0.0)
            first.setdefault(int(seconds / 3600 // every_hours), step)
    return unknown | {step for number, step in first.items() if number}
