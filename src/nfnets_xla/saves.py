"""Checkpoints written in the background: a thread writes host copies while training continues.

Training waits only for the copy, and for an earlier checkpoint that is still being written, so that
there is never more than one copy in memory. A checkpoint that cannot be written does not end the
run: it is reported, and the next one is tried. But if another run, or another start of this one,
saves in the same folder, the run ends: going on would lose or mix the weights of both.
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
TRIAL = "trial"  # name of a test file, which no checkpoint has


def try_to_write(root: str) -> None:
    """Raises ValueError if no checkpoint can be written in `root`, which would otherwise be noticed
    only at the first save, perhaps after all steps."""
    try:
        if not address(root):
            Path(root).mkdir(parents=True, exist_ok=True)
        folder = open_folder(root)
        folder.write(TRIAL, TRIAL.encode())
    except Unreachable:
        raise
    except Exception as error:  # each file system of fsspec has its own errors
        raise ValueError(
            f"no checkpoint can be written in {root} ({' '.join(str(error).split())}): mend that, "
            "or give another trainer.checkpoint_dir"
        ) from error
    with suppress(Exception):  # if deleting fails, the first prune reports it
        folder.remove(TRIAL)


@dataclass(frozen=True)
class Written:
    """The result of writing one checkpoint."""

    step: int
    stall_seconds: float  # how long training waited
    write_seconds: float  # how long the thread wrote
    bytes: int
    fault: str | None  # why it was not written
    unpruned: str | None = None  # why older checkpoints could not be deleted


class Saves:
    """Saves into one folder of checkpoints. Used from one thread; leaving the context waits.

    Every host of a run has one, because all must take part in gathering sharded tensors; only the
    host that `writes` keeps and writes the copy.
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
        """`start` is the step of the checkpoint that the run resumed from. `before` is called
        before each checkpoint is written, and flushes the history to disk."""
        self.root = root
        self.before = before
        self.keep = keep
        self.every_hours = every_hours
        self.start = start
        self._steps: list[int] = []  # of the checkpoints written since `start`
        self.writes = writes
        # Steps of checkpoints that are always kept: `best`, until `better` is written.
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
        """`copy` returns (step, host tensors, state); `save` returns after it, and the thread
        writes."""
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
        """Wait until nothing is being written."""
        if self._thread is not None:
            self._thread.join()

    def written(self) -> list[Written]:
        """Results since the last call, successful or not. Raises OtherRun if the folder is another
        run's, OtherStart if another start of this run has saved a later step there."""
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
        except Exception as error:  # for a full disk safetensors has its own class
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
