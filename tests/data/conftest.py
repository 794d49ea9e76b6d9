"""Shards that several of these files use: in every format, of few pictures, behind an address."""

from pathlib import Path

import pytest

from nfnets_xla.data.cache import Cache
from nfnets_xla.data.index import build_index
from nfnets_xla.data.shards import ShardIndex
from tests.data.images import packed
from tests.data.loading import SAMPLES, pack, picture, png
from tests.data.remote_shards import LARGE, PER_SHARD
from tests.data.tars import make_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "shards")


@pytest.fixture
def index(folder: Path) -> ShardIndex:
    return build_index(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    folder = tmp_path_factory.mktemp("shards")
    return pack(folder, [png(picture(n)) for n in range(SAMPLES)])


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """20 shards of five samples."""
    return packed(tmp_path_factory.mktemp("remote") / "shards", 100, PER_SHARD)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    (tmp_path / "cache").mkdir()
    return Cache(tmp_path / "cache", LARGE)
