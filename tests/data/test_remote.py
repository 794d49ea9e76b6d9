"""Shards at an address give the bytes of the local ones, whatever the server does on the way."""

import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.config import conf

from nfnets_xla.data.batches import EvalBatches, TrainBatches
from nfnets_xla.data.cache import Cache, Fetch
from nfnets_xla.data.index import build_index
from nfnets_xla.data.lint import lint, stats
from nfnets_xla.data.loader import Batches
from nfnets_xla.data.order import Order
from nfnets_xla.data.remote import Patience, RemoteFolder
from nfnets_xla.data.shards import READS, SIDECAR_SAMPLE, ShardIndex
from nfnets_xla.data.storage import OpenFile
from tests.data.images import packed
from tests.data.object_store import GCS, S3, storing
from tests.data.remote_reader import QUICK, STALLING, digest
from tests.data.server import Fault, Server, every_other, serving
from tests.data.test_loader import assert_same
from tests.data.test_shards import one_line

PER_SHARD, STREAMS, WINDOW = 5, 2, 2
LARGE = 10**9  # bytes; of a cache that holds everything


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """20 shards of five samples."""
    return packed(tmp_path_factory.mktemp("remote") / "shards", 100, PER_SHARD)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    (tmp_path / "cache").mkdir()
    return Cache(tmp_path / "cache", LARGE)


def served(server: Server, cache: Cache | None = None, patience: Patience = QUICK) -> ShardIndex:
    return ShardIndex.load(RemoteFolder(server.url, cache, patience))


def path_of(index: ShardIndex) -> Path:
    return Path(str(index.folder))


def train(index: ShardIndex, epochs: float = 1.5) -> TrainBatches:
    order = Order(index.counts, 0, STREAMS, 2 * STREAMS, window_shards=WINDOW, epochs=epochs)
    return TrainBatches(
        index,
        order,
        num_classes=5,
        seed=0,
        image_size=16,
        repeats=2,
        flip=True,
        min_crop_area=0.2,
        randaugment_ops=2,
        randaugment_magnitude=None,
        mix=False,
        drop_path_rates=(0.5,),
        dropout_features=8,
        dropout_rate=0.25,
    )


def windows(index: ShardIndex) -> int:
    """Bytes of the smallest cache that `train` may have."""
    sizes = index.manifest.bytes_S + SIDECAR_SAMPLE * index.manifest.counts_S.astype(np.int64)
    return int(np.sort(sizes)[-2 * STREAMS * WINDOW :].sum())


@contextmanager
def watched(cache: Cache) -> Iterator[list[int]]:
    """The cache's bytes, again and again until the end."""
    seen, done = [0], threading.Event()

    def used() -> int:
        sizes: dict[int, int] = {}  # by inode: a file may be renamed meanwhile
        for path in cache.folder.iterdir():
            with suppress(FileNotFoundError):
                sizes[path.stat().st_ino] = path.stat().st_size
        return sum(sizes.values())

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(used())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("waited in vain")


# ---- the same batches ---------------------------------------------------------------------------


def test_every_batch_is_right_though_half_of_the_answers_fail(
    local: ShardIndex, cache: Cache
) -> None:
    """In a cache that holds the windows in use and the next ones, and not a byte more."""
    small = Cache(cache.folder, windows(local))
    with serving(path_of(local), every_other) as server, watched(small) as seen:
        index = served(server, small, STALLING)
        assert index.fingerprint == local.fingerprint
        remote, at_home = train(index), train(local)
        for step in range(len(at_home)):
            assert_same(remote[step], at_home[step])
        assert server.failed.keys() == {503, 429, 500, "cut", "short", "stall"}
        assert max(server.shard_requests.values()) > 1  # shards went, and came again
    assert 0 < max(seen) <= small.limit < local.manifest.bytes_S.sum()


@pytest.mark.parametrize("cached", [True, False])
def test_what_comes_short_under_its_own_length_is_asked_for_again(
    local: ShardIndex, cache: Cache, cached: bool
) -> None:
    """The first three answers for each file are whole by HTTP and half of it: only the digests of
    the index tell."""
    came: Counter[str] = Counter()

    def three_short(name: str, number: int) -> Fault:
        came[name] += 1
        return "short" if came[name] <= 3 else None

    with serving(path_of(local), three_short) as server:
        index = served(server, cache if cached else None)
        assert index.read(7, 2) == local.read(7, 2)
        assert all(count > 3 for count in server.asked.values())


def test_what_stays_short_is_named_after_a_few_reads(local: ShardIndex, cache: Cache) -> None:
    broken = f"{local.name(7)}.idx.npz"
    with serving(path_of(local), lambda name, _: "short" if name == broken else None) as server:
        message = one_line(lambda: served(server, cache).read(7, 0))
        assert f"{broken} is damaged" in message
        assert server.asked[broken] == READS


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_workers_share_what_comes(local: ShardIndex, cache: Cache) -> None:
    with serving(path_of(local)) as server:
        remote, at_home = train(served(server, cache)), train(local)
        batches = Batches(remote, start_step=2, stop_step=len(remote), workers=2)
        for step, batch in enumerate(batches, start=2):
            assert_same(batch, at_home[step])
        del batches
        assert len(server.shard_requests) == 20
        assert set(server.asked.values()) == {1}


def test_evaluation_reads_each_shard_once(local: ShardIndex, cache: Cache) -> None:
    small = Cache(cache.folder, int(local.manifest.bytes_S.max() + PER_SHARD * 100) * 8)
    with serving(path_of(local)) as server:
        options: dict[str, Any] = {"num_classes": 5, "batch_size": 8, "image_size": 16, "margin": 2}
        remote = EvalBatches(served(server, small), **options)
        at_home = EvalBatches(local, **options)
        for step in range(len(at_home)):
            assert_same(remote[step], at_home[step])
        assert set(server.asked.values()) == {1}


def test_the_next_window_comes_before_it_is_read(local: ShardIndex, cache: Cache) -> None:
    with serving(path_of(local)) as server:
        index = served(server, cache)
        dataset = train(index)
        dataset[0]
        ahead = dataset.order.shards_ahead(0)
        assert set(dataset.order.step(0).shard) < set(ahead)
        names = {index.name(shard) for shard in ahead}
        wait_for(lambda: names <= {path.name for path in copies(cache, index)})
        assert server.shard_requests == dict.fromkeys(names, 1)
        pickle.loads(pickle.dumps(dataset))  # threads and all


def copies(cache: Cache, index: ShardIndex) -> list[Path]:
    """Names of the shards that are in the cache."""
    keys = {index.manifest.key(shard): index.name(shard) for shard in range(index.num_shards)}
    return [Path(keys[path.stem]) for path in cache.folder.glob("*.tar")]


def test_without_a_cache_samples_come_by_ranges(local: ShardIndex) -> None:
    with serving(path_of(local), every_other) as server:
        index = served(server, patience=STALLING)
        for shard, row in ((0, 0), (3, 2), (3, 3), (19, 4)):
            assert index.read(shard, row) == local.read(shard, row)
            assert index.sample_id(shard, row) == local.sample_id(shard, row)


# ---- caches -------------------------------------------------------------------------------------


def reader(server: Server, cache: Cache, first: int) -> subprocess.Popen:
    arguments = [server.url, str(cache.folder), str(cache.limit), str(first)]
    command = [sys.executable, "-m", "tests.data.remote_reader", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_fetch_each_shard_once(local: ShardIndex, cache: Cache) -> None:
    with serving(path_of(local)) as server:
        processes = [reader(server, cache, first) for first in (0, 3)]
        for process in processes:
            assert process.communicate()[0].strip() == digest(local)
        assert server.asked.pop("index.npz") == 2
        assert set(server.asked.values()) == {1}


@pytest.mark.slow
def test_processes_that_want_more_than_the_cache_holds_wait_and_end(
    local: ShardIndex, cache: Cache
) -> None:
    tight = Cache(cache.folder, int(local.manifest.bytes_S.max() * 1.5))
    with serving(path_of(local)) as server, watched(tight) as seen:
        processes = [reader(server, tight, first) for first in (0, 10)]
        for process in processes:
            assert process.communicate()[0].strip() == digest(local)
    assert 0 < max(seen) <= tight.limit


@pytest.mark.parametrize("damage", ["a flipped bit", "a lost end"])
def test_a_copy_that_rots_is_fetched_again(local: ShardIndex, cache: Cache, damage: str) -> None:
    with serving(path_of(local)) as server:
        index = served(server, cache)
        index.read(0, 0)
        image = local.offset(0, 0)
        for ending in (".tar", ".idx.npz"):
            copy = cache.folder / f"{index.manifest.key(0)}{ending}"
            data = bytearray(copy.read_bytes())
            at = image + 9 if ending == ".tar" else data.index(b"00000" + b"00001")  # the keys
            data[at] ^= 1
            copy.write_bytes(data if damage == "a flipped bit" else data[:at])
        again = pickle.loads(pickle.dumps(index))
        assert again.read(0, 0) == local.read(0, 0)
        assert sorted(server.asked.values()) == [1, 2, 2]


def test_a_shard_that_has_changed_at_its_place_is_refused(
    local: ShardIndex, cache: Cache, tmp_path: Path
) -> None:
    index = packed(tmp_path / "other", 10, 5)
    path = tmp_path / "other" / index.name(0)
    data = bytearray(path.read_bytes())
    data[1600] ^= 1
    path.write_bytes(data)
    with serving(tmp_path / "other") as server:
        message = one_line(lambda: digest(served(server, cache)))
        assert "index no longer matches its shards: shard-000000.tar, key 00000" in message
        assert "wrong checksum" in message
        path.write_bytes(data + bytes(512))
        twice = Patience(total=0.1, first_wait=0.01, timeout=1)
        assert f"more than {len(data)} bytes" in one_line(
            lambda: digest(served(server, cache, twice))
        )


def test_a_download_that_is_killed_leaves_nothing_to_read(local: ShardIndex, cache: Cache) -> None:
    """Nor does what it had reserved stay: the cache has room for one shard."""
    tight = Cache(cache.folder, int(local.manifest.bytes_S.max() * 1.5))
    wanted = local.name(4)

    def stall(name: str, number: int) -> str | None:
        return "stall" if name == wanted and not server.stalled.is_set() else None

    with serving(path_of(local), stall) as server:
        process = reader(server, tight, 4)
        assert server.stalled.wait(60)
        wait_for(lambda: any(tight.folder.glob("*.tar.*.part")))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not list(tight.folder.glob("*.tar"))
        index = served(server, tight)
        assert index.read(0, 0) == local.read(0, 0)  # which needs the room
        assert not list(tight.folder.glob("*.part"))
        assert digest(index) == digest(local)


# ---- what cannot be had -------------------------------------------------------------------------


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


def test_who_waited_while_another_tried_in_vain_does_not_begin_anew(
    local: ShardIndex, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five threads want the shard at once; one after the other has its lock.

    By a clock that stands but for the waits between attempts. The first fails when all have asked.
    """
    looks, waited = count(1), [0.0]
    all_asked = threading.Event()

    def monotonic() -> float:
        if next(looks) == 5:  # each thread's first look
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
        assert first > 3  # as each of the others would, if it began anew
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


def test_a_full_disk_is_not_a_damaged_index(local: ShardIndex) -> None:
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
                "make room, or lower data.cache_bytes"
            )
        name, full = local.name(0), Path("/dev/full")
        without = RemoteFolder(server.url, patience=QUICK)
        message = one_line(lambda: without.download(name, 10240, full))
        assert message.endswith("make room, or set TMPDIR to a folder on another disk")


def test_a_cache_must_hold_two_windows_of_every_stream(local: ShardIndex, cache: Cache) -> None:
    need = windows(local)
    with serving(path_of(local)) as server:
        index = served(server, Cache(cache.folder, need - 1))
        assert one_line(lambda: train(index)) == (
            f"data.cache_bytes is {need - 1}, and windows and the next ones hold up to {need} "
            f"bytes of {server.url}: raise it to that or more"
        )


def test_an_address_that_nothing_installed_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, url in (("gcsfs", "gs://bucket/shards"), ("s3fs", "s3://bucket/shards")):
        monkeypatch.setitem(sys.modules, module, None)
        for where in (url, Path(url)):
            message = one_line(lambda: ShardIndex.load(where))  # noqa: B023
            assert message.startswith(f"{url} cannot be read: ")
            assert message.endswith("pip install 'nfnets-xla[remote]'")
    assert "give a local folder, gs://, s3://" in one_line(lambda: ShardIndex.load("gopher://x/y"))


# ---- places that can be listed and written ------------------------------------------------------


def test_indexing_at_an_address(local: ShardIndex, cache: Cache) -> None:
    files = fsspec.filesystem("memory")
    for path in path_of(local).glob("*.tar"):
        files.pipe_file(f"memory://bucket/shards/{path.name}", path.read_bytes())
    files.pipe_file("memory://bucket/shards/.hidden.tar", b"no tar")
    files.pipe_file("memory://bucket/other.tar", b"no tar")
    assert lint("memory://bucket/shards/") == []
    index = build_index("memory://bucket/shards")
    assert index.fingerprint == local.fingerprint
    assert stats(index) == stats(local)
    again = ShardIndex.load(RemoteFolder("memory://bucket/shards", cache))
    assert digest(index) == digest(again) == digest(local)

    # A second time, only what is newer than its sidecar is read.
    name = local.name(7)
    files.pipe_file(f"memory://bucket/shards/{name}", b"no tar")
    assert f"{name}, offset 0: truncated" in one_line(lambda: build_index(index.folder))
    files.pipe_file(f"memory://bucket/shards/{name}", (path_of(local) / name).read_bytes())
    assert build_index(index.folder).fingerprint == local.fingerprint


@pytest.mark.parametrize("protocol", ["s3", "gs"])
def test_an_object_store_gives_the_local_batches(
    local: ShardIndex, cache: Cache, tmp_path: Path, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through s3fs and gcsfs, whose endpoint and credentials come from fsspec's configuration."""
    # gcsfs asks what kind of bucket it is by gRPC, which knows no endpoint but Google's.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    bucket = tmp_path / "bucket" / "shards"
    bucket.mkdir(parents=True)
    for path in path_of(local).glob("*.tar"):
        (bucket / path.name).write_bytes(path.read_bytes())
    with storing(tmp_path, {"s3": S3, "gs": GCS}[protocol]) as endpoint:
        options = {"s3": {"anon": True}, "gs": {"token": "anon"}}[protocol]
        monkeypatch.setitem(conf, protocol, {"endpoint_url": endpoint, **options})
        index = build_index(RemoteFolder(f"{protocol}://bucket/shards", patience=QUICK))
        assert index.fingerprint == local.fingerprint
        assert {path.name for path in bucket.iterdir()} >= {"index.npz", f"{local.name(0)}.idx.npz"}
        again = ShardIndex.load(RemoteFolder(f"{protocol}://bucket/shards", cache, QUICK))
        assert digest(again) == digest(local)
