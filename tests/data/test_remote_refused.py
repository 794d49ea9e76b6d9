"""If an address does not deliver, one line names it, after a suitable number of attempts."""

import re
import resource
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fsspec.registry import _registry

from nfnets_xla.data.cache import Cache, Fetch
from nfnets_xla.data.index import build_index
from nfnets_xla.data.lint import lint
from nfnets_xla.data.remote import PATIENCE, Patience, RemoteFolder
from nfnets_xla.data.shards import ShardIndex
from nfnets_xla.data.storage import OpenFile
from nfnets_xla.inputs import open_index
from tests.data.remote_reader import QUICK
from tests.data.remote_shards import (
    LARGE,
    path_of,
    served,
    train,
    windows,
)
from tests.data.server import Fault, serving
from tests.data.tars import one_line


def test_a_shard_that_is_gone_is_named_at_once(local: ShardIndex, cache: Cache) -> None:
    gone = local.name(0)
    with serving(path_of(local), lambda name, _: 404 if name == gone else None) as server:
        for index in (served(server, cache), served(server)):
            message = one_line(lambda: index.read(0, 0))  # noqa: B023
            assert f"{server.url}/{gone} is missing: put it back and give the same" in message
        assert server.asked[gone] == 2
    assert not list(cache.folder.glob("*.part"))


def test_a_server_that_does_not_recover_ends_the_run_with_its_last_word(
    local: ShardIndex, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    patience = Patience(total=1, first_wait=0.01, timeout=5)
    broken = [local.name(0), f"{local.name(1)}.idx.npz"]
    with serving(path_of(local), lambda name, _: 503 if name in broken else None) as server:
        for shard, name in enumerate(broken):
            message = one_line(lambda: served(server, cache, patience).read(shard, 0))  # noqa: B023
            attempts = server.asked[name]
            assert attempts > 2
            assert f"{server.url}/{name} could not be had in 1 s (last of {attempts} att" in message
            assert "503" in message
    assert "503, message='Service Unavailable'" in caplog.text
    assert "attempt 4 in" in caplog.text


def test_waits_double_to_a_minute_and_end_with_the_patience(
    local: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that advances only during waits."""
    now, waits = [0.0], []

    def sleep(seconds: float) -> None:
        now[0] += seconds
        waits.append(seconds)

    with serving(path_of(local), lambda name, _: 503) as server:
        folder = RemoteFolder(server.url, patience=PATIENCE)
        clock = SimpleNamespace(monotonic=lambda: now[0], sleep=sleep)
        monkeypatch.setattr("nfnets_xla.data.remote.time", clock)
        assert "could not be had in 300 s" in one_line(lambda: folder.read("index.npz"))
    assert sum(waits) == pytest.approx(300)
    wanted = [min(2.0**n, 60) for n in range(len(waits))]  # minus a random jitter of up to half
    assert all(w / 2 <= wait <= w for wait, w in zip(waits[:-1], wanted, strict=False)), waits
    assert len({wait / w for wait, w in zip(waits, wanted, strict=True)}) > 3
    assert server.asked["index.npz"] == len(waits) + 1


def test_who_waited_while_another_tried_in_vain_does_not_begin_anew(
    local: ShardIndex, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five threads want the shard at once; one after the other gets its lock.

    The clock advances only during the waits between attempts. The first fails when all have asked.
    """
    looks, waited = count(1), [0.0]
    all_asked = threading.Event()

    def monotonic() -> float:
        if next(looks) == 5:  # once each thread has looked for the first time
            all_asked.set()
        return waited[0]

    def sleep(seconds: float) -> None:
        waited[0] += seconds

    def fails(name: str, _: int) -> Fault:
        return 503 if name == local.name(0) and all_asked.wait(30) else None

    patience = Patience(total=2, first_wait=0.1, timeout=60)
    with serving(path_of(local), fails) as server:
        index = served(server, cache, patience)
        index.records(0)
        clock = SimpleNamespace(monotonic=monotonic, sleep=sleep)
        monkeypatch.setattr("nfnets_xla.data.remote.time", clock)
        with ThreadPoolExecutor(5) as pool:
            tried = [pool.submit(index.read, 0, 0) for _ in range(5)]
        counts = [int(re.findall(r"of (\d+) attempts", str(each.exception()))[0]) for each in tried]
        *others, first = sorted(counts)
        assert first > 3  # as each of the others would be, if it started anew
        assert others == [1] * 4


def test_a_refusal_is_not_asked_for_again(local: ShardIndex, cache: Cache) -> None:
    with serving(path_of(local), lambda name, _: 403) as server:
        assert "is refused (ClientResponseError 403" in one_line(lambda: served(server, cache))
        assert server.asked == {"index.npz": 1}


def test_a_folder_without_an_index_says_how_to_make_one(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        assert one_line(lambda: served(server)) == (
            f"{server.url} has no index.npz; run `nfnets-xla shards index` on the shards where "
            "they lie, and publish index.npz and *.idx.npz beside them"
        )
        for action in (build_index, lint):
            message = one_line(lambda: action(server.url))  # noqa: B023
            assert message.startswith(f"{server.url} can be neither listed nor written: run")


def test_a_full_disk_is_not_a_damaged_index(local: ShardIndex, tmp_path: Path) -> None:
    class Full(Cache):
        def open(self, key: str, fetch: Fetch) -> OpenFile:
            fetch(lambda size: Path("/dev/full"))
            raise AssertionError(f"there was room for {key}")

    with serving(path_of(local)) as server:
        folder = RemoteFolder(server.url, Full(Path("unused"), LARGE), QUICK)
        for name, size in ((f"{local.name(0)}.idx.npz", None), (local.name(0), 10240)):
            file = folder.indexed(name, "key", size)
            assert one_line(file.whole) == (
                f"{server.url}/{name} cannot be kept ([Errno 28] No space left on device): "
                "make room, or lower data.cache_bytes, or give a data.cache_dir on another disk"
            )
        name, full = local.name(0), Path("/dev/full")
        without = RemoteFolder(server.url, patience=QUICK)
        message = one_line(lambda: without.download(name, 10240, full))
        assert message.endswith("make room, or set TMPDIR to a folder on another disk")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # as on FAT, or for a user
        try:
            message = one_line(lambda: without.download(name, 10240, tmp_path / "file"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert f"{name} cannot be kept ([Errno 27] File too large): make room" in message


def test_a_cache_must_hold_two_windows_of_every_stream(local: ShardIndex, cache: Cache) -> None:
    need = windows(local)
    with serving(path_of(local)) as server:
        index = served(server, Cache(cache.folder, need - 1))
        assert one_line(lambda: train(index)) == (
            f"data.cache_bytes is {need - 1}, and windows and the next ones hold up to {need} "
            f"bytes of {server.url}: raise it to that or more"
        )


def test_a_cache_that_processes_share_must_hold_the_windows_of_all(
    local: ShardIndex, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun starts one process per GPU; each reads the shards of its own streams."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "9")
    run: Any = SimpleNamespace(data=SimpleNamespace(cache_dir=str(tmp_path), cache_bytes=1e9))
    with serving(path_of(local)) as server:
        opened = open_index(run, server.url).folder.cache
        assert opened is not None
        assert opened.sharers == 9
        need = int(np.sort(served(server, cache).manifest.bytes_S).sum())  # of all shards
        alone = train(served(server, Cache(cache.folder, need - 1)))
        assert len(alone) > 0
        said = one_line(lambda: train(served(server, Cache(cache.folder, need - 1, sharers=9))))
        assert "windows and the next ones of each of 9 processes hold up to" in said


def test_an_address_that_nothing_installed_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, url in (("gcsfs", "gs://bucket/shards"), ("s3fs", "s3://bucket/shards")):
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.delitem(_registry, url.partition(":")[0], raising=False)  # of another test
        for where in (url, Path(url)):
            message = one_line(lambda: ShardIndex.load(where))  # noqa: B023
            assert message.startswith(f"{url} cannot be read: ")
            assert message.endswith("pip install 'nfnets-xla[remote]'")
    assert "give a local folder, gs://, s3://" in one_line(lambda: ShardIndex.load("gopher://x/y"))
