"""Reading ahead: threads that bring the shards of the next window into the cache.

Every loader worker has its own threads, and all want nearly the same shards; the cache's locks
ensure that each shard is fetched only once.
"""

import threading
import weakref
from collections.abc import Callable
from typing import Any

from torch.utils.data import get_worker_info

PREFETCH = 2  # batches that each loader worker prepares ahead
THREADS = 4  # per worker; one connection to an object store gives 0.1 to 0.2 GB/s


class ReadAhead:
    """Fetches the wanted shards in order, until it is garbage-collected."""

    def __init__(self, bring: Callable[[int], None], keep: Callable[[int], None]) -> None:
        """`bring(shard)` fetches the shard unless it is cached; its errors are ignored, since the
        reader will meet them again. `keep(shard)` makes a cached shard the last to be evicted."""
        self._state = _State(bring, keep)
        self._first: int | None = None
        for _ in range(THREADS):
            threading.Thread(target=self._state.work, daemon=True, name="read-ahead").start()
        weakref.finalize(self, self._state.stop)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled without its threads, for the loader's workers."""
        return ReadAhead, (self._state.bring, self._state.keep)

    def want(self, step: int, shards_ahead: Callable[[int], list[int]]) -> None:
        """Replaces the list of wanted shards; downloads in progress are finished.

        `shards_ahead` is asked for the step of the slowest possible worker: that one still reads
        its windows, and fetching more than these and the next could evict them.
        """
        self._first = step if self._first is None else min(step, self._first)
        worker = get_worker_info()
        behind = worker.num_workers * (PREFETCH + 1) if worker else 0
        self._state.want(shards_ahead(max(self._first, step - behind)))


class _State:
    """State shared by the threads, which must not keep the ReadAhead itself alive."""

    def __init__(self, bring: Callable[[int], None], keep: Callable[[int], None]) -> None:
        self.bring, self.keep = bring, keep
        self.changed = threading.Condition()
        self.wanted: list[int] = []
        self.to_do: list[int] = []  # in reverse
        self.stopped = False

    def want(self, shards: list[int]) -> None:
        with self.changed:
            if shards != self.wanted:
                for shard in shards:  # before fetching one evicts another
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
