"""A bounded cache: one process fetches, the oldest files go, and only complete files get a name."""

import os
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from nfnets_xla.data.cache import Cache, Fetch, Room, open_cache
from tests.data.tars import one_line


def giving(data: bytes) -> Fetch:
    def fetch(room: Room) -> None:
        room(len(data)).write_bytes(data)

    return fetch


def never(room: Room) -> None:
    raise AssertionError("it is in the cache")


def names(cache: Cache) -> set[str]:
    return set(os.listdir(cache.folder))


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = open_cache(tmp_path / "made" / "for it", 30)
    for name in "abc":
        assert cache.open(name, giving(name.encode() * 10)).whole() == name.encode() * 10
    assert cache.open("a", never).whole() == b"a" * 10
    cache.open("d", giving(b"d" * 10))
    assert names(cache) == {"a", "c", "d"}
    cache.bring("c", never)  # a file that is wanted soon counts as used
    cache.open("e", giving(b"e" * 15))
    assert names(cache) == {"c", "e"}
    cache.open("f", giving(b"f" * 5))
    cache.keep("c")
    cache.keep("nothing of that name")
    cache.open("g", giving(b"g" * 20))
    assert names(cache) == {"c", "g"}
    cache.drop("c")
    cache.drop("c")
    assert cache.open("c", giving(b"another")).whole() == b"another"


def test_what_else_lies_in_the_folder_stays_and_counts_for_nothing(tmp_path: Path) -> None:
    """For example `lost+found`, if the cache is a mount of its own."""
    (tmp_path / "lost+found").mkdir()
    for name in ("results.csv", "x.zip.part", "db.lock"):
        (tmp_path / name).write_bytes(b"mine" * 10)
    before = names(Cache(tmp_path, 0))
    cache = open_cache(tmp_path, 10)
    for name in "ab":
        cache.open(name, giving(name.encode() * 10))
    assert names(cache) == {"b"}
    assert names(Cache(tmp_path, 0)) == before | {cache.folder.name}


def test_another_users_copies_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who may write a file but does not own it may set its time to `now` only."""
    cache, utime = Cache(tmp_path, 10), os.utime
    cache.open("a", giving(b"a" * 10))

    def of_another(path: Path, ns: tuple[int, int] | None = None) -> None:
        if ns is not None:
            raise PermissionError(1, "Operation not permitted")
        utime(path)

    monkeypatch.setattr(os, "utime", of_another)
    assert cache.open("a", never).whole() == b"a" * 10


def test_what_is_read_may_be_evicted_meanwhile(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 10)
    file = cache.open("a", giving(b"a" * 10))
    cache.open("b", giving(b"b" * 10))
    assert names(cache) == {"b"}
    assert file.whole() == b"a" * 10


def test_a_fetch_that_fails_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 10)

    def fails(room: Room) -> None:
        room(10).write_bytes(b"half")
        raise ValueError("gone")

    assert one_line(lambda: cache.open("a", fails)) == "gone"
    assert names(cache) == set()
    assert cache.open("a", giving(b"whole")).whole() == b"whole"
    assert "more than the 10 of the whole cache: raise data.cache_bytes" in one_line(
        lambda: cache.open("b", giving(b"b" * 11))
    )


def test_threads_fetch_once_and_never_too_much(tmp_path: Path) -> None:
    """Ten keys of 10 bytes with room for four, so that they keep evicting each other; then with
    room for all. Threads exclude each other as processes do."""
    fetched: Counter[str] = Counter()

    def fetch(cache: Cache, key: str, room: Room) -> None:
        fetched[key] += 1
        part = room(10)
        held = {name[0] for name in names(cache) if not name.endswith("lock")}
        part.write_bytes(key.encode() * 10)
        assert 10 * len(held) <= cache.limit

    def read(cache: Cache, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(50):
            key = rng.choice("abcdefghij")
            read = cache.bring if rng.random() < 0.2 else cache.open
            file = read(key, lambda room: fetch(cache, key, room))  # noqa: B023
            assert file is None or file.whole() == key.encode() * 10

    for limit, least, most in ((40, 11, 400), (100, 10, 10)):
        cache = open_cache(tmp_path / str(limit), limit)
        fetched.clear()
        with ThreadPoolExecutor(8) as threads:
            for done in [threads.submit(read, cache, seed) for seed in range(8)]:
                done.result()
        assert least <= sum(fetched.values()) <= most
        assert len(names(cache)) == limit // 10  # no lock or partial files


def test_room_that_a_killed_process_reserved_is_taken_back(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 20)
    for left in ("a.tar.15.part", "a.tar.lock"):
        (tmp_path / left).touch()
    cache.open("b", giving(b"b" * 5))
    assert (tmp_path / "a.tar.15.part").exists()
    cache.open("c", giving(b"c" * 5))
    assert names(cache) == {"b", "c"}
    (tmp_path / "d.15.part").touch()
    cache.open("d", giving(b"d" * 10))  # its own
    assert names(cache) == {"b", "c", "d"}


def test_room_that_a_living_one_reserved_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path, 20)
    begun, waits, go_on = threading.Event(), threading.Event(), threading.Event()

    def sleep(seconds: float) -> None:
        waits.set()
        time.sleep(seconds)

    monkeypatch.setattr(
        "nfnets_xla.data.cache.time", SimpleNamespace(sleep=sleep, time_ns=time.time_ns)
    )

    def slow(room: Room) -> None:
        part = room(15)
        begun.set()
        assert go_on.wait(30)
        part.write_bytes(b"a" * 15)

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(cache.open, "a", slow)
        assert begun.wait(30)
        cache.bring("a", never)  # does not wait for the other thread
        second = threads.submit(cache.open, "b", giving(b"b" * 10))
        while not waits.wait(0.01):
            assert not second.done()
        assert "b" not in names(cache)
        go_on.set()
        assert first.result().whole() == b"a" * 15
        assert second.result().whole() == b"b" * 10
    assert names(cache) == {"b"}


@pytest.mark.parametrize("where", ["gs://bucket/x", "/dev/null/x"])
def test_a_folder_that_cannot_serve_is_refused(where: str) -> None:
    message = one_line(lambda: open_cache(where, 1))
    assert where in message
    assert "local folder" in message or "cannot be" in message
