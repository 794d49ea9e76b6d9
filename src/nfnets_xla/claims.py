"""Whose a checkpoint is: which run's, and which start's of that run.

Two runs that share a folder would delete each other's checkpoints, or go on from them. So would two
starts of one run, on two machines: the one that comes to save behind the other ends. A checkpoint's
state, which is written first, is its claim.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from nfnets_xla.config import differences
from nfnets_xla.data.remote import AnyFolder
from nfnets_xla.exits import Interrupted

STATE = "state.json"
ENDS = "this one ends, and the same command goes on from there; if both live, end one of them"


class OtherRun(ValueError):
    """Two runs keep their checkpoints in one folder."""


class OtherStart(Interrupted):
    """A run is trained by two processes, and the other one has come further."""


def refuse_another(where: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """`theirs` is the state of the checkpoint at `where`, `ours` of one to be saved.

    Raises OtherRun if they are of two runs; OtherStart if they are of two starts of one run, and
    theirs was saved after ours began.
    """
    if changed := _differences(theirs, ours):
        raise OtherRun(
            f"{where} is of another run ({'; '.join(changed)}), and two cannot keep their "
            "checkpoints in one folder: choose another trainer.checkpoint_dir"
        )
    starts = theirs.get("start"), ours.get("start")
    if None not in starts and starts[0] != starts[1] and theirs["step"] > ours["resumed_from"]:
        raise OtherStart(
            f"{where} was saved by another start of this run, which trains elsewhere or did until "
            f"now: {ENDS}"
        )


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """In what identifies a run; see resume.py."""
    changed = differences(theirs.get("identity", {}), ours.get("identity", {}))
    before, now = theirs.get("begun_with"), ours.get("begun_with")
    if before and now:
        weights = "initial_weights"
        changed += differences({weights: before["which"]}, {weights: now["which"]})
    return changed


def seems_of_another(folder: AnyFolder, name: str, state: Mapping[str, Any]) -> bool:
    """Whether `name`'s state alone, which is quickly read and may be damaged, says so."""
    try:
        theirs = json.loads(folder.read(f"{name}/{STATE}"))
        refuse_another(name, theirs, state)
    except (OtherRun, OtherStart):
        return True
    except (OSError, ValueError, AttributeError, TypeError, KeyError):  # damaged, or out of reach
        return False
    return False


def check_held(folder: AnyFolder, name: str, state: Mapping[str, Any]) -> None:
    """Raises OtherStart if another start has begun to save `name` since this one did."""
    if state.get("start") is None:
        return
    try:
        data = folder.read(f"{name}/{STATE}")
    except FileNotFoundError:  # this start wrote it, and another has deleted it
        data = b"{}"
    start = None
    with suppress(ValueError, AttributeError):  # torn: another is writing it
        start = json.loads(data).get("start")
    if start != state["start"]:
        raise OtherStart(f"{name} is being saved by another start of this run: {ENDS}")
