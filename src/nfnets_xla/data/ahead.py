"""Reading ahead: threads that bring the shards of the next window into the cache.

Every loader worker has its own threads and nearly the same wishes; the cache's locks see to it that
each shard is fetched by one of them.
"""

import threading
import weakref
from collections.abc import Callable
from typing import Any

from torch.utils.data import get_worker_info

PREFETCH = 2  # batches that a loader worker is ahead by
THREADS = 4  # of each worker; one connection to an object store gives 0.1 to 0.2 GB/s


class ReadAhead:
    """Fetches what is wanted, in the order of need, until it is garbage."""

    def __init__(self, bring: Callable[[int], None], keep: Callable[[int], None]) -> None:
        """`bring(shard)` has the shard fetched, unless it is there. What it raises is left to the
        reader, who will meet it again. `keep(shard)` has it, if it is there, give way last."""
        self._state = _State(bring, keep)
        self._first: int | None = None
        for _ in range(THREADS):
            threading.Thread(target=self._state.work, daemon=True, name="read-ahead").start()
        weakref.finalize(self, self._state.stop)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled without its threads, for the loader's workers."""
        return ReadAhead, (self._state.bring, self._state.keep)

    def want(self, step: int, shards_ahead: Callable[[int], list[int]]) -> None:
        """Replaces what was wanted before; what is being fetched is finished.

        `shards_ahead` of the step that the slowest worker may be at: its windows are still read
        from, and if more than these and the next ones came in, they might have to go.
        """
        self._first = step if self._first is None else min(step, self._first)
        worker = get_worker_info()
        behind = worker.num_workers * (PREFETCH + 1) if worker else 0
        self._state.want(shards_ahead(max(self._first, step - behind)))


class _State:
    """What the threads share; they do not hold the ReadAhead itself, which may go."""

    def __init__(self, bring: Callable[[int], None], keep: Callable[[int], None]) -> None:
        self.bring, self.keep = bring, keep
        self.changed = threading.Condition()
        self.wanted: list[int] = []
        self.to_do: list[int] = []  # in reverse
        self.stopped = False

    def want(self, shards: list[int]) -> None:
        with self.changed:
            if shards != self.wanted:
                for shard in shards:  # before one is fetched, for which another has to go
                    self.keep(shard)
                self.wanted, self.to_do = shards, shards[::-1]
                self.changed.notify_all()

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify_all()

    def work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.stopped or self.to_do)
                if self.stopped:
                    return
                shard = self.to_do.pop()
            try:
                self.bring(shard)
            except Exception:
                continue
