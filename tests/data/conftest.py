"""Shards of this machine, and a cache, for the tests that read the same from an address."""

from pathlib import Path

import pytest

from nfnets_xla.data.cache import Cache
from nfnets_xla.data.shards import ShardIndex
from tests.data.images import packed
from tests.data.remote_shards import LARGE, PER_SHARD


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """20 shards of five samples."""
    return packed(tmp_path_factory.mktemp("remote") / "shards", 100, PER_SHARD)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    (tmp_path / "cache").mkdir()
    return Cache(tmp_path / "cache", LARGE)
