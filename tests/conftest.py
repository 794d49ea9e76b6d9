"""Shards that several tests read, and the order of the tests."""

import os
from pathlib import Path

import pytest

from tests.data.images import packed

# Otherwise gcsfs, which reads this on import, asks by gRPC what kind of bucket it has, and only at
# Google's endpoint.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
IMAGES, CLASSES = 100, 5
LONGEST = ("test_xla_runs", "test_xla_stacked", "test_each_recipe", "test_chaos", "test_hosts")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: if they started last, all processes but one would wait for them."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 noise images of 5 classes in 7 shards, and 21 held-out ones."""
    folder = tmp_path_factory.mktemp("shards")
    packed(folder / "train", IMAGES, 15, CLASSES)
    packed(folder / "held-out", 21, 8, CLASSES)
    return folder


@pytest.fixture
def data(shards: Path) -> list[str]:
    return [f"data.shards={shards / 'train'}", f"data.eval_shards={shards / 'held-out'}"]
