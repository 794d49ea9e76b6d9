"""Packing overwrites nothing and adds to nothing, also if files appear while it works."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from nfnets_xla.data.holdout import IDS, hold_out
from nfnets_xla.data.index import build_index
from nfnets_xla.data.pack import Sample, pack_samples
from nfnets_xla.data.shards import ShardIndex
from tests.data.images import packed
from tests.data.tars import one_line, sample, write_tar


def some(prefix: str, count: int = 4) -> list[Sample]:
    return [(f"{prefix}{number}", prefix.encode(), "png", number) for number in range(count)]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_with_shards_below_is_not_empty(tmp_path: Path) -> None:
    """An index would include them with the new ones."""
    index = packed(tmp_path / "shards", 25, 10)
    (tmp_path / "out" / "old").mkdir(parents=True)
    write_tar(tmp_path / "out" / "old" / "a.tar", sample("x"))
    said = f"{tmp_path / 'out'} holds old/a.tar already: choose an empty folder"
    pack = lambda: pack_samples(some("a"), tmp_path / "out", samples_per_shard=1)  # noqa: E731
    assert one_line(pack) == said
    assert one_line(lambda: hold_out(index, tmp_path / "out", samples=6)) == said
    assert len(tree(tmp_path / "out")) == 1


@pytest.mark.parametrize("prefix", ["shard", "another", "zzz"])
def test_shards_that_came_meanwhile_stay_alone(tmp_path: Path, prefix: str) -> None:
    out = tmp_path / "out"
    before: dict[str, bytes] = {}

    def overtaken() -> Iterator[Sample]:
        yield from some("slow")
        pack_samples(some("quick", 3), out, samples_per_shard=1, prefix=prefix)
        before.update(tree(out))
        yield from some("late")

    said = one_line(lambda: pack_samples(overtaken(), out, samples_per_shard=1))
    assert said == f"{out} holds {prefix}-000000.tar already: choose an empty folder"
    after = tree(out)
    assert len(after) == 3
    assert after.items() <= before.items()
    assert build_index(out).num_samples == 3
    assert not list(out.glob(".packing-*"))


@pytest.mark.parametrize("prefixes", [("shard", "shard"), ("one", "two")])
def test_of_two_at_once_one_at_most_is_there(tmp_path: Path, prefixes: tuple[str, str]) -> None:
    """Both have written everything when the first begins to move it into place."""
    for trial in range(20):
        out, both = tmp_path / str(trial), Barrier(2)

        def pack(prefix: str, key: str, out: Path = out, both: Barrier = both) -> str:
            def samples() -> Iterator[Sample]:
                yield from some(key)
                both.wait(60)

            try:
                pack_samples(samples(), out, samples_per_shard=1, prefix=prefix)
            except ValueError as error:
                return str(error)
            return "done"

        with ThreadPoolExecutor(2) as pool:
            ends = list(pool.map(pack, prefixes, ("a", "b")))
        assert all(end == "done" or "already: choose an empty folder" in end for end in ends)
        assert ends.count("done") < 2
        if "done" in ends:
            index = build_index(out)
            keys = [index.sample_id(shard, 0).partition("/")[2] for shard in range(4)]
            assert keys == [name for name, *_ in some("ab"[ends.index("done")])]
        else:
            assert not out.exists() or not list(out.iterdir())


def test_a_list_of_another_split_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor deleted when the second one gives up: its samples would be trained on."""
    index, out = packed(tmp_path / "shards", 25, 10), tmp_path / "out"
    read, ids = ShardIndex.read, list[str]()

    def overtaken(index: ShardIndex, shard: int, row: int) -> bytes:
        monkeypatch.setattr(ShardIndex, "read", read)
        said = one_line(lambda: hold_out(index, out, samples=9))
        assert said == f"{out} holds {IDS} already: choose an empty folder"
        ids.extend((out / IDS).read_text().split())
        return index.read(shard, row)

    monkeypatch.setattr(ShardIndex, "read", overtaken)
    assert hold_out(index, out, samples=6) == ids == (out / IDS).read_text().split()
