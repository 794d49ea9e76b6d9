"""Shards at an address give the bytes of the local ones, whatever the server does."""

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.config import conf

from nfnets_xla.data.batches import EvalBatches
from nfnets_xla.data.cache import Cache
from nfnets_xla.data.index import build_index
from nfnets_xla.data.lint import lint, stats
from nfnets_xla.data.loader import Batches
from nfnets_xla.data.remote import RemoteFolder
from nfnets_xla.data.shards import READS, ShardIndex
from tests.data.loading import assert_same
from tests.data.object_store import GCS, S3, storing
from tests.data.remote_reader import QUICK, STALLING, digest
from tests.data.remote_shards import (
    PER_SHARD,
    path_of,
    served,
    train,
    wait_for,
    watched,
    windows,
)
from tests.data.server import Fault, every_other, serving
from tests.data.tars import one_line

# ---- the same batches ---------------------------------------------------------------------------


def test_every_batch_is_right_though_half_of_the_answers_fail(
    local: ShardIndex, cache: Cache
) -> None:
    """In a cache that has just enough room for the windows in use and the next ones."""
    small = Cache(cache.folder, windows(local))
    with serving(path_of(local), every_other) as server, watched(small) as seen:
        index = served(server, small, STALLING)
        assert index.fingerprint == local.fingerprint
        remote, at_home = train(index), train(local)
        for step in range(len(at_home)):
            assert_same(remote[step], at_home[step])
        assert server.failed.keys() == {503, 429, 500, "cut", "short", "stall"}
        assert max(server.shard_requests.values()) > 1  # shards were evicted and fetched again
    assert 0 < max(seen) <= small.limit < local.manifest.bytes_S.sum()


@pytest.mark.parametrize("cached", [True, False])
def test_what_comes_short_under_its_own_length_is_asked_for_again(
    local: ShardIndex, cache: Cache, cached: bool
) -> None:
    """The first three answers for each file are complete by HTTP, but only half of the file: only
    the index's digests reveal it."""
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
        assert set(server.asked.values()) == {1}, server.asked


def test_evaluation_reads_each_shard_once(local: ShardIndex, cache: Cache) -> None:
    small = Cache(cache.folder, int(local.manifest.bytes_S.max() + PER_SHARD * 100) * 8)
    with serving(path_of(local)) as server:
        options: dict[str, Any] = {"num_classes": 5, "batch_size": 8, "image_size": 16, "margin": 2}
        remote = EvalBatches(served(server, small), **options)
        at_home = EvalBatches(local, **options)
        for step in range(len(at_home)):
            assert_same(remote[step], at_home[step])
        assert set(server.asked.values()) == {1}, server.asked


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
        pickle.loads(pickle.dumps(dataset))  # including its threads


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


def test_a_server_without_ranges_is_named_at_once(local: ShardIndex) -> None:
    """Every answer is a whole shard: repeating the request for five minutes would not help."""
    with serving(path_of(local), lambda name, number: "whole") as server:
        said = one_line(lambda: served(server, patience=STALLING).read(0, 0))
    assert "does not answer requests for a part of a file: read through a cache" in said


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

    # The second time, only shards newer than their sidecars are read.
    name = local.name(7)
    files.pipe_file(f"memory://bucket/shards/{name}", b"no tar")
    assert f"{name}, offset 0: truncated" in one_line(lambda: build_index(index.folder))
    files.pipe_file(f"memory://bucket/shards/{name}", (path_of(local) / name).read_bytes())
    assert build_index(index.folder).fingerprint == local.fingerprint


@pytest.mark.parametrize("protocol", ["s3", "gs"])
def test_an_object_store_gives_the_local_batches(
    local: ShardIndex, cache: Cache, tmp_path: Path, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through s3fs and gcsfs, with endpoint and credentials from fsspec's configuration."""
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
