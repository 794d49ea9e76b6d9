"""Excluded samples are in no count, order or batch; the fingerprint depends on which they are."""

import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nfnets_xla.cli import main
from nfnets_xla.compose import composed, to_run
from nfnets_xla.data.exclude import resolve, save_exclusions, without
from nfnets_xla.data.holdout import choose, hold_out, key_hash
from nfnets_xla.data.index import build_index
from nfnets_xla.data.order import Order
from nfnets_xla.data.pack import pack_samples
from nfnets_xla.data.shards import ShardIndex
from nfnets_xla.inputs import check_apart, open_shards
from tests.data.images import noise_png, packed, samples
from tests.data.tars import sample, write_tar


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    return packed(tmp_path / "shards", 25, 10)


def everything(index: ShardIndex) -> list[tuple[str, bytes, dict[int, float]]]:
    return [
        (index.sample_id(shard, row), index.read(shard, row), index.labels(shard, row))
        for shard in range(index.num_shards)
        for row in range(index.counts[shard])
    ]


def listed(folder: Path, ids: list[str]) -> Path:
    path = folder / "list.txt"
    path.write_text("\n".join(ids))
    return path


# The whole second shard, and some samples of the others; one is given twice.
EXCLUDED = [0, 3, *range(10, 20), 24, 3]


@pytest.mark.parametrize("resolved", [False, True])
def test_the_rest_is_what_it_was(index: ShardIndex, tmp_path: Path, resolved: bool) -> None:
    before = everything(index)
    path = listed(tmp_path, [before[number][0] for number in EXCLUDED])
    if resolved:
        exclusions = resolve(index, path.read_text().split("\n"))
        path = tmp_path / "list.npz"
        save_exclusions(path, index, exclusions)
    left = without(index, path)
    assert everything(left) == [s for number, s in enumerate(before) if number not in EXCLUDED]
    np.testing.assert_array_equal(left.counts, [8, 0, 4])
    assert left.num_samples == 12
    assert left.fingerprint != index.fingerprint
    assert left.fingerprint == without(index, path).fingerprint
    fewer = without(index, listed(tmp_path, [before[0][0]]))
    assert fewer.fingerprint not in (left.fingerprint, index.fingerprint)


def test_the_order_is_that_of_shards_without_them(index: ShardIndex, tmp_path: Path) -> None:
    """A shard without remaining samples is treated as if it had never existed."""
    before = everything(index)
    left = without(index, listed(tmp_path, [before[number][0] for number in EXCLUDED]))
    rest = (s for number, s in enumerate(samples(25)) if number not in EXCLUDED)
    pack_samples(rest, tmp_path / "rest", samples_per_shard=8)
    names: list[list[str]] = []
    for one in (left, build_index(tmp_path / "rest")):
        order = Order(one.counts, 7, 2, 4, 2, 2.5)
        steps = [order.step(number) for number in range(order.num_steps)]
        names.append(
            [
                one.sample_id(int(shard), int(row)).partition("/")[2]
                for rows in steps
                for shard, row in zip(rows.shard, rows.row, strict=True)
            ]
        )
    assert names[0] == names[1]


def test_lists_that_do_not_fit_are_refused(index: ShardIndex, tmp_path: Path) -> None:
    def refused(path: Any) -> str:
        with pytest.raises(ValueError) as error:  # noqa: PT011 (callers compare the message)
            without(index, path)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "is no file" in refused(tmp_path / "none.txt")
    for bad in ("shard-000000/nobody", "shard-000009/00001", "00001", ""):
        path = listed(tmp_path, ["shard-000000/00001", bad or "x"])
        assert f"{path} names {bad or 'x'!r}, which is not in {index.folder}" in refused(path)
    assert "excludes every sample" in refused(listed(tmp_path, [s[0] for s in everything(index)]))
    assert "list.txt names no samples" in refused(listed(tmp_path, [""]))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    assert "is not a text file of sample ids" in refused(tmp_path / "a.txt")
    for data in (b"rubbish", bytes(999)):
        (tmp_path / "a.npz").write_bytes(data)
        assert refused(tmp_path / "a.npz") == (
            f"{tmp_path}/a.npz is damaged, or no resolved list; "
            f"run `nfnets-xla shards exclude {index.folder} IDS FILE.npz`"
        )
    other = packed(tmp_path / "other", 24, 10)
    save_exclusions(tmp_path / "a.npz", other, resolve(other, ["shard-000000/00001"]))
    assert "was resolved against another index; run `nfnets-xla shards exclude" in refused(
        tmp_path / "a.npz"
    )


def test_a_resolved_list_takes_the_place_of_no_index(
    index: ShardIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is refused before any sidecar is read; here reading one would fail."""
    folder, ids = tmp_path / "shards", listed(tmp_path, ["shard-000000/00001"])
    sidecar = folder / "shard-000000.tar.idx.npz"
    sidecar.write_bytes(b"rubbish")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for out, said in (
        (folder / "index.npz", "has the name of an index's file: give another, FILE.npz"),
        (sidecar, "has the name of an index's file: give another, FILE.npz"),
        (tmp_path / "none" / "a.npz", f"is in no folder that is there: make {tmp_path / 'none'}"),
        (tmp_path / "rows.txt", "must end in .npz: rows are no text"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["shards", "exclude", str(folder), str(ids), str(out)])
        assert stopped.value.code == 2
        assert capsys.readouterr().err == f"nfnets-xla: {out} {said}\n"
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_resolved_list_is_written_whole_or_not_at_all(index: ShardIndex, tmp_path: Path) -> None:
    path = tmp_path / "rows.npz"
    save_exclusions(path, index, resolve(index, ["shard-000000/00001"]))
    before = path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limit[1]))  # as on a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            save_exclusions(path, index, resolve(index, ["shard-000000/00002"]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == before
    assert sorted(found.name for found in tmp_path.iterdir()) == ["rows.npz", "shards"]


# ---- held out ---------------------------------------------------------------------------------


def test_the_split_is_the_smallest_hashes_however_it_is_packed(
    index: ShardIndex, tmp_path: Path
) -> None:
    keys = sorted((f"{number:05d}" for number in range(25)), key=key_hash)[:6]
    backwards = list(samples(25))[::-1]
    pack_samples(backwards, tmp_path / "again", samples_per_shard=4)
    for number, one in enumerate((index, build_index(tmp_path / "again"))):
        out = tmp_path / f"out{number}"
        ids = hold_out(one, out, samples=6)
        assert [sample_id.partition("/")[2] for sample_id in ids] == keys
        assert (out / "held_out.txt").read_text().split() == ids
        held = everything(build_index(out))
        by_id = {sample[0]: sample[1:] for sample in everything(one)}
        assert [sample[1:] for sample in held] == [by_id[sample_id] for sample_id in ids]
        with pytest.raises(ValueError, match=r"out. holds held-out-000000.tar already: choose"):
            hold_out(one, out, samples=6, jobs=-2)  # before any job starts
        left = without(one, out / "held_out.txt")
        assert left.num_samples == 19
        assert not {sample[0] for sample in everything(left)} & set(ids)
        # Holding out again chooses none of the samples that were held out before.
        assert not {left.sample_id(*place) for place in choose(left, 6)} & set(ids)


def test_the_list_is_there_before_the_shards(
    index: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the list, the held-out samples would be trained on."""
    listed, read = [], ShardIndex.read

    def reading(index: ShardIndex, shard: int, row: int) -> bytes:
        listed.append((tmp_path / "out" / "held_out.txt").read_text().split())
        return read(index, shard, row)

    monkeypatch.setattr(ShardIndex, "read", reading)
    assert hold_out(index, tmp_path / "out", samples=6) == listed[0]
    assert len(listed) == len(listed[0]) == 6


def test_an_empty_image_is_held_out_by_the_list_alone(tmp_path: Path) -> None:
    """Training counts it as undecodable; it cannot be packed into a shard."""
    for number in range(8):
        image = noise_png(number) if number % 2 else b""
        write_tar(tmp_path / f"{number}.tar", sample(f"k{number}", number, image))
    index = build_index(tmp_path)
    out = tmp_path.with_name(f"{tmp_path.name}-out")
    ids = hold_out(index, out, samples=7)
    assert len(ids) == len((out / "held_out.txt").read_text().split()) == 7
    labels = {sample_id: int(sample_id.rpartition("k")[2]) for sample_id in ids}
    held = build_index(out)
    shown = {held.sample_id(0, row)[-8:]: held.labels(0, row) for row in range(held.num_samples)}
    assert shown == {
        f"{line:08d}": {labels[one]: 1.0} for line, one in enumerate(ids) if labels[one] % 2
    }


def test_a_failure_leaves_no_list_without_shards(index: ShardIndex, tmp_path: Path) -> None:
    """With such a list, training would leave out samples that are never evaluated. Here no sample
    can be copied."""
    for shard in (tmp_path / "shards").glob("*.tar"):
        shard.write_bytes(bytes(shard.stat().st_size))
    (tmp_path / "own").mkdir()
    for folder in (tmp_path / "own", tmp_path / "new"):
        with pytest.raises(ValueError, match="wrong checksum"):
            hold_out(index, folder, samples=6)
    assert not list((tmp_path / "own").iterdir())
    assert not (tmp_path / "new").exists()


def test_the_copies_are_no_shards_of_the_folder_they_come_from(tmp_path: Path) -> None:
    """An index includes every shard below its folder, so the copies would be trained on."""
    packed(tmp_path / "all" / "part", 25, 10)
    index, link = build_index(tmp_path / "all"), tmp_path / "link"
    link.symlink_to(tmp_path / "all")
    for folder in (tmp_path / "all" / "val", link / "val", tmp_path / "all", tmp_path):
        with pytest.raises(ValueError, match=r"other way round, .* choose a folder beside it"):
            hold_out(index, folder, samples=6)
        assert not (folder / "held_out.txt").exists()
    for one, other in ((tmp_path, link / "val"), ("s3://b/all", "s3://b/all/val")):
        for shards, eval_shards in ((one, other), (other, one)):
            with pytest.raises(ValueError, match=r"data\.eval_shards .* one is inside the other"):
                check_apart(str(shards), str(eval_shards))
    check_apart(str(tmp_path / "all"), str(tmp_path / "all2"))
    check_apart("s3://b/all", "s3://b/all2")
    check_apart("s3://b/all", str(tmp_path / "all"))


@pytest.mark.parametrize("how", ["link", "copy"])
def test_held_out_shards_are_not_trained_on(tmp_path: Path, how: str) -> None:
    """Held-out shards linked or copied below another folder, where paths do not reveal it. They may
    be there if their samples are all excluded."""
    pack_samples(samples(35), tmp_path / "val", samples_per_shard=10, prefix="val")
    packed(tmp_path / "all", 25, 7)
    if how == "link":
        (tmp_path / "all" / "more").symlink_to(tmp_path / "val")
    else:
        shutil.copytree(tmp_path / "val", tmp_path / "all" / "more")
    both = [build_index(tmp_path / name) for name in ("all", "val")]
    given = [f"data.{key}={index.folder}" for key, index in zip(KEYS, both, strict=True)]

    def opened(*words: str) -> int:
        run = to_run(composed("pretrain", [*given, *words, "optim.epochs=1", "run_dir=R"]))
        return open_shards(run)[0].num_samples

    said = r"have 4 shards of the same samples \(.*/all/more/val-000000.tar and .*/val/val-000000"
    with pytest.raises(ValueError, match=said):
        opened()
    ids = [sample_id for sample_id, *_ in everything(both[1])]
    assert opened(f"data.exclude={listed(tmp_path, ids)}") == 25
    with pytest.raises(ValueError, match=r"have 1 shards of .*more/val-000003.tar and"):
        opened(f"data.exclude={listed(tmp_path, ids[:-1])}")


KEYS = ("shards", "eval_shards")


def test_a_split_grows_by_adding_and_is_golden(index: ShardIndex) -> None:
    chosen = [index.sample_id(*place).partition("/")[2] for place in choose(index, 9)]
    fewer = [index.sample_id(*place).partition("/")[2] for place in choose(index, 4)]
    assert chosen[:4] == fewer
    assert key_hash("00001") == 345315685528188438


def test_a_key_that_is_everywhere_is_refused(tmp_path: Path) -> None:
    """Its hash is above all hashes that are considered."""
    key = next(key for key in map(str, range(100)) if key_hash(key) > 0.9 * 2**64)
    image = next(iter(samples(1)))[1]
    for number in range(90):
        sample, out = (key, image, "png", number), tmp_path / "shards" / str(number)
        pack_samples([sample], out, samples_per_shard=1, prefix=f"shard{number}")
    with pytest.raises(ValueError, match="keys repeat, so that 0 samples with 0 keys would"):
        hold_out(build_index(tmp_path / "shards"), tmp_path / "out", samples=10)


def test_keys_that_repeat_over_shards_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    for shard in range(30):
        three = [(*sample[:3], shard) for sample in samples(3)]
        pack_samples(three, folder / str(shard), samples_per_shard=3, prefix=str(shard))
    for wanted in (5, 30):  # each key occurs 30 times
        with pytest.raises(ValueError, match=f"that 30 samples with 1 keys .* of {wanted}: pack"):
            hold_out(build_index(folder), tmp_path / "out", samples=wanted)
    for count in (0, 90):
        with pytest.raises(ValueError, match="hold out at least one, and leave one"):
            hold_out(build_index(folder), tmp_path / "out", samples=count)
    assert not (tmp_path / "out").exists()
