"""The command line, in a process that announces when it reaches a window of a run and then stays
there for a while: python -m tests.announced WINDOW FILE SECONDS ARGUMENTS...

The code of the window is the real one. Just before it (for the loader's, within it) the process
creates FILE and sleeps, so that a signal arrives exactly there.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    window, file, seconds = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
    sys.argv[1:] = sys.argv[4:]
    if window == "import":
        file.touch()  # what follows imports for seconds

    def announce() -> None:
        if not file.exists():
            file.touch()
            time.sleep(seconds)

    from nfnets_xla.cli import main as command

    if window != "import":
        WINDOWS[window](announce)
    command()


def before(owner: Any, name: str, announce: Callable[[], None], skip: int = 0) -> None:
    """Announce the `skip`-th call of `owner.name` after the first."""
    inner, calls = getattr(owner, name), [0]

    def outer(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] > skip:
            announce()
        return inner(*arguments, **options)

    setattr(owner, name, outer)


def worker_start(announce: Callable[[], None]) -> None:
    import multiprocessing.popen_spawn_posix as popen

    before(popen.Popen, "_launch", announce)


def first_batch(announce: Callable[[], None]) -> None:
    from nfnets_xla.task import Classification

    before(Classification, "training_step", announce)


def compile_(announce: Callable[[], None]) -> None:
    """The step has been traced; unless it sleeps here, the long compilation comes next."""
    from nfnets_xla.task import Classification

    traced = Classification.training_step

    def outer(self: Classification, batch: Any, batch_idx: int) -> None:
        traced(self, batch, batch_idx)
        announce()

    Classification.training_step = outer


def training(announce: Callable[[], None]) -> None:
    from nfnets_xla.task import Classification

    before(Classification, "training_step", announce, skip=2)


def ascent(announce: Callable[[], None]) -> None:
    """Between SAM's two passes, when the weights are perturbed."""
    from nfnets_xla.optim.sgd_agc import SGD_AGC

    before(SGD_AGC, "step", announce, skip=2)


def average(announce: Callable[[], None]) -> None:
    from nfnets_xla.optim.ema import EMA

    before(EMA, "update", announce, skip=2)


def validation(announce: Callable[[], None]) -> None:
    from nfnets_xla.task import Classification

    before(Classification, "validation_step", announce)


def saving(announce: Callable[[], None]) -> None:
    """In the saving thread, while training continues."""
    from nfnets_xla import checkpoint

    before(checkpoint, "save_file", announce)


def teardown(announce: Callable[[], None]) -> None:
    from nfnets_xla.record import RecordWriter

    before(RecordWriter, "__exit__", announce)


WINDOWS = {
    "worker_start": worker_start,
    "first_batch": first_batch,
    "compile": compile_,
    "training": training,
    "ascent": ascent,
    "average": average,
    "validation": validation,
    "saving": saving,
    "teardown": teardown,
}

if __name__ == "__main__":
    main()
