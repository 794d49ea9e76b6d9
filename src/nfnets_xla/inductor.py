"""torch.compile for CPU and GPU, and how much it has compiled so far.

A function becomes one graph per set of shapes; a graph break, which would slow training unnoticed,
is an error. Only tensors change from step to step, so that nothing is recompiled.
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
    """Counts compiled graphs, and the seconds spent on them, from when it is made.

    It uses torch's callbacks, since no single call could be timed: backward passes are compiled on
    first use. torch has no public API for either number.
    """

    def __init__(self) -> None:
        # Imported here because it takes seconds, and only those who compile need it.
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
    """Cache all later compilations in `folder`, for restarts."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder.absolute())
    return True
