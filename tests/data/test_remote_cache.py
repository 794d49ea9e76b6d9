"""A cache of remote shards: shared by processes, never over its limit, repaired if damaged."""

import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nfnets_xla.data.cache import Cache
from nfnets_xla.data.shards import ShardIndex
from tests.data.images import packed
from tests.data.remote_reader import digest
from tests.data.remote_shards import (
    path_of,
    served,
    wait_for,
    watched,
)
from tests.data.server import Server, serving
from tests.data.tars import one_line


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
        for now, bytes_ in (
            (data + bytes(512), f"more than {len(data)}"),
            (data[:-512], f"{len(data) - 512}"),
        ):
            path.write_bytes(now)
            server.asked.clear()
            said = one_line(lambda: digest(served(server, cache)))
            assert f"/{path.name} has {bytes_} bytes and had {len(data)}: it has changed at" in said
            assert server.asked[path.name] == 5  # and not retried for as long as an outage may last


def test_a_download_that_is_killed_leaves_nothing_to_read(local: ShardIndex, cache: Cache) -> None:
    """Nor does its reservation stay: the cache has room for one shard."""
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
        assert index.read(0, 0) == local.read(0, 0)  # which needs that room
        assert not list(tight.folder.glob("*.part"))
        assert digest(index) == digest(local)
