"""Checkpoints written behind the training's back: a thread takes host copies and writes them.

The step waits for the copy only, and for an earlier checkpoint that is still being written: there
is never more than one copy in memory. A checkpoint that cannot be written is no reason to end a run
that goes well; it is said, and the next one is tried. That another run saves there, or another
start of this one, is a reason: trying again would lose or mix the weights of both.
"""

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nfnets_xla import checkpoint, claims
from nfnets_xla.data.remote import open_folder
from nfnets_xla.data.storage import address
from nfnets_xla.exits import Unreachable
from nfnets_xla.retention import prune

Forms = Mapping[str, Mapping[str, Tensor]]
TRIAL = "trial"  # a file that is no checkpoint's


def try_to_write(root: str) -> None:
    """Raises ValueError for a folder of checkpoints where none could be written, which would else
    be known when all steps are done."""
    try:
        if not address(root):
            Path(root).mkdir(parents=True, exist_ok=True)
        folder = open_folder(root)
        folder.write(TRIAL, TRIAL.encode())
    except Unreachable:
        raise
    except Exception as error:  # each of fsspec's file systems has its own
        raise ValueError(
            f"no checkpoint can be written in {root} ({' '.join(str(error).split())}): mend that, "
            "or give another trainer.checkpoint_dir"
        ) from error
    with suppress(Exception):  # of what cannot be deleted there the first prune tells
        folder.remove(TRIAL)


@dataclass(frozen=True)
class Written:
    """What became of one checkpoint."""

    step: int
    stall_seconds: float  # for which the training waited
    write_seconds: float  # by the thread
    bytes: int
    fault: str | None  # why there is none
    unpruned: str | None = None  # why older ones, which it replaces, are still there


class Saves:
    """Of one folder of checkpoints. Used from one thread; as a context it waits at its end.

    All hosts of a run have one, and the one that `writes` keeps the copy: tensors that are cut over
    devices are brought together by all of them.
    """

    def __init__(
        self,
        root: str,
        *,
        keep: int,
        every_hours: float | None,
        start: int = 0,
        writes: bool = True,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        """`start` is the step of the checkpoint that the run went on from; `before` brings to the
        disk what a checkpoint builds on, before there is one."""
        self.root = root
        self.before = before
        self.keep = keep
        self.every_hours = every_hours
        self.start = start
        self._steps: list[int] = []  # of the checkpoints that have been written since
        self.writes = writes
        # Steps of checkpoints that stay whatever comes; the first once the second is written.
        self.best: int | None = None
        self.better: int | None = None
        self._thread: threading.Thread | None = None
        self._written: list[Written] = []
        self._refused: claims.OtherRun | claims.OtherStart | None = None

    def __enter__(self) -> "Saves":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def save(self, copy: Callable[[], tuple[int, Forms, Mapping[str, Any]]]) -> None:
        """`copy` brings the tensors to the host, and says of which step they are and with what
        state; this returns when it has."""
        began = time.perf_counter()
        self.wait()
        if self.better in self._steps:
            self.best = self.better
        step, forms, state = copy()
        if not self.writes:
            return
        stall = time.perf_counter() - began
        self._thread = threading.Thread(
            target=self._write, args=(step, forms, state, stall), name="save"
        )
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._thread is not None:
            self._thread.join()

    def written(self) -> list[Written]:
        """Those that have ended, well or not, since this was last asked. Raises OtherRun if the
        folder is another run's, OtherStart if another start of this run has come further there."""
        if self._refused is not None:
            raise self._refused
        done = []
        while self._written:
            done.append(self._written.pop(0))
        return done

    def _write(self, step: int, forms: Forms, state: Mapping[str, Any], stall: float) -> None:
        began = time.perf_counter()
        size, fault, unpruned = 0, None, None
        try:
            self.before()
            size = checkpoint.save(self.root, step, forms, state)
            self._steps.append(step)
            if step == self.better:
                self.best = step
            self._prune()
        except (claims.OtherRun, claims.OtherStart) as error:
            self._refused = error
            return
        except Exception as error:  # of a full disk safetensors says in a class of its own
            why = f"{type(error).__name__}: {error}"
            fault, unpruned = (None, why) if size else (why, None)
        took = round(stall, 4), round(time.perf_counter() - began, 4)
        self._written.append(Written(step, *took, size, fault, unpruned))

    def _prune(self) -> None:
        prune(
            self.root,
            start=self.start,
            written=self._steps,
            keep=self.keep,
            every_hours=self.every_hours,
            best=(self.best, self.better),
        )
