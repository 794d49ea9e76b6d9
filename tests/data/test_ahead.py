"""Reading ahead: fetches what is wanted, whatever fails, and evicts nothing that will be read."""

import gc
import threading
from types import SimpleNamespace

import pytest

from nfnets_xla.data import ahead as reading
from nfnets_xla.data.ahead import PREFETCH, THREADS, ReadAhead


def test_what_is_wanted_is_kept_before_anything_is_fetched() -> None:
    """Otherwise the first fetches evict files that are wanted and not read yet: of four threads,
    one may be late."""
    calls: list[tuple[str, int]] = []
    fetched = threading.Event()

    def bring(shard: int) -> None:
        calls.append(("bring", shard))
        if len(calls) % 6 == 0:
            fetched.set()

    ahead = ReadAhead(bring, lambda shard: calls.append(("keep", shard)))
    for first in (0, 1):
        shards = [first, first + 1, first + 2]
        ahead.want(first, lambda _, shards=shards: shards)
        assert fetched.wait(10)
        fetched.clear()
        now = calls[-6:]
        assert now[:3] == [("keep", shard) for shard in shards]
        assert sorted(now[3:]) == [("bring", shard) for shard in shards]
    ahead.want(2, lambda _: [1, 2, 3])  # the same: nothing to do
    assert len(calls) == 12


def test_what_cannot_be_fetched_ends_no_thread() -> None:
    """More of it than there are threads: an outage of a minute, of which the reader hears."""
    last, brought = 2 * THREADS, threading.Event()

    def bring(shard: int) -> None:
        if shard < last:
            raise OSError("no answer")
        brought.set()

    ahead = ReadAhead(bring, lambda _: None)
    ahead.want(0, lambda _: [*range(last + 1)])
    assert brought.wait(10)


def test_the_threads_end_with_it() -> None:
    before = set(threading.enumerate())
    ahead = ReadAhead(lambda _: None, lambda _: None)
    threads = set(threading.enumerate()) - before
    assert len(threads) == THREADS
    del ahead
    gc.collect()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_what_the_slowest_worker_still_reads_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be behind by all batches that the others prepare, but not before the first step."""
    monkeypatch.setattr(reading, "get_worker_info", lambda: SimpleNamespace(num_workers=2))
    asked: list[int] = []
    ahead = ReadAhead(lambda _: None, lambda _: None)
    for step in (50, 51, 80, 20, 21):  # the last two are of an evaluation that begins anew
        ahead.want(step, lambda slowest: asked.append(slowest) or [])
    behind = 2 * (PREFETCH + 1)
    assert asked == [50, 50, 80 - behind, 20, 20]
