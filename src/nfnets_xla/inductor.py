"""torch.compile for devices that run operation after operation, and what it has compiled so far.

A function becomes one graph for each set of shapes, or an error: a graph break would be a stall
that nobody sees. What changes from step to step are tensors, so that nothing is compiled again.
"""

# pyright: reportPrivateImportUsage=false

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=False)


def as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


class Clock:
    """Counts graphs, and the seconds spent on them, from when it is made.

    Backward passes are compiled when they are first needed, so that it is not one call that is
    timed. torch has no public place for either number.
    """

    def __init__(self) -> None:
        # Imported here: seconds, which those who do not compile are spared.
        from torch._dynamo.callback import on_compile_end, on_compile_start
        from torch._dynamo.utils import counters

        self.seconds = 0.0
        self._started = 0.0
        self._stats = counters["stats"]
        self._graphs_before = self._stats["unique_graphs"]
        on_compile_start(self._start)
        on_compile_end(self._end)

    @property
    def graphs(self) -> int:
        return self._stats["unique_graphs"] - self._graphs_before

    def report(self) -> dict[str, Any]:
        """For the record."""
        return {"compilations": self.graphs, "compile_seconds": round(self.seconds, 6)}

    def _start(self, _: Any) -> None:
        self._started = time.perf_counter()

    def _end(self, _: Any) -> None:
        self.seconds += time.perf_counter() - self._started


def keep_in(folder: Path) -> bool:
    """Put what is compiled from now on into `folder`, for restarts."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder.absolute())
    return True
