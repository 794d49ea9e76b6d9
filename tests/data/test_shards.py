"""An index gives a tar's bytes, changes with them, and refuses shards it does not fit."""

import errno
import multiprocessing
import os
import pickle
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nfnets_xla.data import index as index_module
from nfnets_xla.data import jobs
from nfnets_xla.data.index import build_index
from nfnets_xla.data.pack import pack_samples
from nfnets_xla.data.scan import Scan, scan_shard
from nfnets_xla.data.shards import Line, ShardIndex, make_manifest, manifest_bytes
from nfnets_xla.data.storage import OpenFile, address
from tests.data.images import noise_png
from tests.data.tars import PACKED, one_line, sample, write_tar


def images_of(path: Path) -> list[bytes]:
    """The images as `tarfile` alone reads them."""
    with tarfile.open(path) as tar:
        files = [(tar.extractfile(member), member) for member in tar if member.isreg()]
        return [f.read() for f, member in files if f and member.name.endswith(("JPEG", "jpg"))]


# ---- what an index gives ----------------------------------------------------------------------


def test_images_are_the_bytes_that_tarfile_gives(folder: Path, index: ShardIndex) -> None:
    names = [index.name(shard) for shard in range(index.num_shards)]
    assert names == ["gnu.tar", "pax.tar", "ustar.tar", "wds.tar"]
    for shard, name in enumerate(names):
        read = [index.read(shard, row) for row in range(PACKED)]
        assert read == images_of(folder / name)
        assert len(set(read)) == PACKED


def test_labels_are_read_from_cls_txt_and_json(index: ShardIndex) -> None:
    for shard, first in enumerate((PACKED, 2 * PACKED, 0, 0)):
        for row in range(PACKED):
            assert index.labels(shard, row) == {first + row: 1.0}
    assert index.num_classes == 3 * PACKED
    assert index.max_labels == 1


def test_counts_and_ids(index: ShardIndex) -> None:
    np.testing.assert_array_equal(index.counts, [PACKED] * 4)
    assert index.counts.dtype == np.int64
    assert index.num_samples == 4 * PACKED
    assert index.sample_id(2, 0) == "ustar/ustar/row0"
    assert index.sample_id(3, 6) == "wds/w6"
    assert index.sample_id(1, 5) == f"pax/{'deep/' * 30}{'long' * 40}é5"


def test_progress_counts_shards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(jobs, "PER_WORKER", 3)
    build_index(folder, on_progress=lambda done, total: calls.append((done, total)))
    assert calls == [(3, 4), (4, 4)]


def test_shards_can_be_scanned_in_parallel(folder: Path, index: ShardIndex) -> None:
    assert build_index(folder, jobs=2, force=True).fingerprint == index.fingerprint
    assert "engine is 'abacus'; it must be one of local, ray, dask" in one_line(
        lambda: build_index(folder, engine="abacus")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "ray.util.joblib", None)
        message = one_line(lambda: build_index(folder, engine="ray"))
    assert "engine is ray, which is not installed" in message


def test_a_rerun_scans_only_what_has_changed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scans: list[int] = []

    def scan(file: OpenFile) -> Scan:
        scans.append(file.size)
        if len(scans) == 3:
            raise KeyboardInterrupt
        return scan_shard(file)

    monkeypatch.setattr("nfnets_xla.data.index.scan_shard", scan)
    with pytest.raises(KeyboardInterrupt):
        build_index(folder)
    assert not (folder / "index.npz").exists()
    stopped = build_index(folder)
    assert len(scans) == 3 + 2  # two of four were done
    build_index(folder)
    assert len(scans) == 5
    os.utime(folder / "wds.tar")
    build_index(folder)
    assert len(scans) == 6
    assert build_index(folder, force=True).fingerprint == stopped.fingerprint
    assert len(scans) == 10


def test_a_shard_that_is_replaced_by_an_older_one_is_scanned_again(tmp_path: Path) -> None:
    """`rsync -a` and `cp -p` do so: they keep the modification time."""
    path = tmp_path / "a.tar"
    write_tar(path, sample("x", 1))
    assert build_index(tmp_path).labels(0, 0) == {1: 1.0}
    write_tar(path, sample("x", 2))
    os.utime(path, (0, 0))
    assert build_index(tmp_path).labels(0, 0) == {2: 1.0}


def test_shards_may_lie_in_subfolders_but_not_share_a_file_name(tmp_path: Path) -> None:
    for label, name in enumerate(("one/a.tar", "two/b.tar", ".hidden/c.tar")):
        (tmp_path / name).parent.mkdir()
        write_tar(tmp_path / name, sample("x/1", label) + sample("y", 2))
    index = build_index(tmp_path)
    assert [index.name(0), index.name(1)] == ["one/a.tar", "two/b.tar"]
    assert index.sample_id(1, 0) == "b/x/1"
    assert index.read(1, 1) == b"picture"
    (tmp_path / "two/b.tar").rename(tmp_path / "two/a.tar")
    message = one_line(lambda: build_index(tmp_path))
    assert "two/a.tar and one/a.tar have one file name: rename one of them" in message


def test_a_folder_that_cannot_be_listed_is_not_taken_for_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Except lost+found, which is root's. Since tests may run as root, the system's answer is
    simulated."""
    scandir = os.scandir

    def listing(path: Any) -> Any:
        if Path(path).name in ("b", "lost+found"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    for name in ("a", "b", "lost+found"):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / f"{name}.tar", sample("x"))
    monkeypatch.setattr(os, "scandir", listing)
    with pytest.raises(PermissionError, match="b'"):
        build_index(tmp_path)
    (tmp_path / "b" / "b.tar").unlink()
    (tmp_path / "b").rmdir()
    assert build_index(tmp_path).num_shards == 1


def test_a_link_that_names_another_shard_is_a_change(tmp_path: Path) -> None:
    """Even though that shard is older than the index, and holds the same images."""
    shards = tmp_path / "shards"
    shards.mkdir()
    for label in (1, 2):
        pack_samples(
            [("k", noise_png(0), "png", label)], tmp_path / str(label), samples_per_shard=1
        )
    (old, new) = ((tmp_path / str(label) / "shard-000000.tar") for label in (1, 2))
    link = shards / "a.tar"
    for target, label in ((old, 1), (new, 2), (old, 1)):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        assert build_index(shards).labels(0, 0) == {label: 1.0}


def test_a_link_on_the_way_that_names_another_folder_is_a_change(tmp_path: Path) -> None:
    for label in (2, 1):  # the newer version's file is the older one
        pack_samples(
            [("k", noise_png(0), "png", label)], tmp_path / f"v{label}", samples_per_shard=1
        )
    shards, current = tmp_path / "shards", tmp_path / "current"
    shards.mkdir()
    (shards / "a.tar").symlink_to("../current/../current/shard-000000.tar")
    for label in (1, 2):
        current.unlink(missing_ok=True)
        current.symlink_to(f"v{label}")
        assert build_index(shards).labels(0, 0) == {label: 1.0}


def test_a_shard_that_is_replaced_while_it_is_read_is_indexed_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise its sidecar would be newer than the new shard, and never be checked again."""
    for label in (1, 2):
        pack_samples(
            [("k", noise_png(0), "png", label)], tmp_path / str(label), samples_per_shard=1
        )
    old, new = ((tmp_path / str(label) / "shard-000000.tar") for label in (1, 2))
    scan = index_module.scan_shard

    def scanning(file: OpenFile) -> Scan:
        found = scan(file)
        new.replace(old)
        return found

    monkeypatch.setattr(index_module, "scan_shard", scanning)
    with pytest.raises(ValueError, match=r"was changed while it was read: when it is whole, give"):
        build_index(tmp_path / "1")
    monkeypatch.undo()
    assert build_index(tmp_path / "1").labels(0, 0) == {2: 1.0}


def test_a_local_folder_is_not_written_as_an_address(tmp_path: Path) -> None:
    """`file://a/b` and `file:///a/b` are different folders to different readers."""
    for where in (f"file://{tmp_path}", "file:/x"):
        assert "give the path alone, /" in one_line(lambda: address(where))  # noqa: B023


def test_links_to_folders_are_followed_and_none_is_read_twice(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "shards", tmp_path / "elsewhere"
    for key, path in (("x", folder / "own/a.tar"), ("y", elsewhere / "deep/b.tar")):
        path.parent.mkdir(parents=True)
        write_tar(path, sample(key))
    (folder / "disk").symlink_to(elsewhere)
    (folder / "another").symlink_to(folder / "own")  # a shard that already has a name
    (elsewhere / "back").symlink_to(folder)
    (elsewhere / "deep/round").symlink_to(elsewhere)
    index = build_index(folder)
    assert [index.name(0), index.name(1)] == ["disk/deep/b.tar", "own/a.tar"]
    assert ShardIndex.load(folder).read(0, 0) == b"picture"


def test_a_manifest_is_32_bytes_a_shard_and_its_name(tmp_path: Path) -> None:
    """A million samples are open at once, without reading their sidecars."""
    lines = [Line(f"{n:06d}.tar", 1000, 7, b"d" * 16, 9, 1) for n in range(1000)]
    manifest = make_manifest(lines)
    assert sum(part.nbytes for part in manifest) == 1000 * (32 + 10) + 3 * 8
    (tmp_path / "index.npz").write_bytes(manifest_bytes(manifest))
    for line in lines:
        (tmp_path / line.name).write_bytes(b"7 bytes")
        (tmp_path / (line.name + ".idx.npz")).touch()  # empty: reading it fails
    index = ShardIndex.load(tmp_path)
    assert index.num_samples == 1_000_000
    assert index.name(999) == "000999.tar"


# ---- the fingerprint --------------------------------------------------------------------------


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".tar"}


def test_an_index_is_a_function_of_the_tars_alone(folder: Path, index: ShardIndex) -> None:
    before = written(folder)
    assert sorted(before) == sorted(
        ["index.npz", *(f"{index.name(shard)}.idx.npz" for shard in range(4))]
    )
    for name in before:
        (folder / name).write_bytes(b"rubbish")
    assert build_index(folder).fingerprint == index.fingerprint
    assert written(folder) == before
    for name in before:
        (folder / name).unlink()
    for path in folder.iterdir():
        os.utime(path, (0, 0))
    moved = folder.rename(folder.with_name("moved"))
    assert build_index(moved).fingerprint == index.fingerprint
    assert written(moved) == before
    assert ShardIndex.load(moved).fingerprint == index.fingerprint


def test_the_fingerprint_is_golden(tmp_path: Path) -> None:
    """A resumed run compares fingerprints, so no release of this library may change them."""
    write_tar(tmp_path / "a.tar", sample("x", 1) + sample("y", 2))
    assert build_index(tmp_path).fingerprint == (
        "53f046a131ca907a942f9886445b916bc731d88b23f8f7c48b2bf9b0ec8ef24b"
    )


@pytest.mark.parametrize("change", ["image", "label", "key", "order", "shard's name"])
def test_the_fingerprint_changes_with(tmp_path: Path, change: str) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, sample("x", 1, b"abc") + sample("y", 2))
    before = build_index(tmp_path).fingerprint
    if change == "shard's name":
        path.rename(tmp_path / "b.tar")
    else:
        members = {
            "image": sample("x", 1, b"abd") + sample("y", 2),
            "label": sample("x", 3, b"abc") + sample("y", 2),
            "key": sample("z", 1, b"abc") + sample("y", 2),
            "order": sample("y", 2) + sample("x", 1, b"abc"),
        }[change]
        write_tar(path, members)
    assert build_index(tmp_path).fingerprint != before


def test_a_failed_rebuild_leaves_the_manifest_that_was_there(folder: Path) -> None:
    build_index(folder)
    before = (folder / "index.npz").read_bytes()
    write_tar(folder / "z.tar", [("a.png", b"no label")])
    one_line(lambda: build_index(folder))
    assert (folder / "index.npz").read_bytes() == before
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


# ---- processes and files ----------------------------------------------------------------------


def test_it_pickles_small_and_reads_in_a_spawned_process(index: ShardIndex) -> None:
    expected = [index.read(shard, 1) for shard in range(4)]  # files are now open
    assert len(pickle.dumps(index)) < 2000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.starmap(index.read, [(shard, 1) for shard in range(4)]) == expected


def test_no_file_stays_open(folder: Path) -> None:
    def open_shards() -> list[str]:
        opened = (os.path.realpath(link) for link in Path("/proc/self/fd").iterdir())
        return sorted(name for name in opened if name.startswith(f"{folder.resolve()}/"))

    index = build_index(folder)
    assert not open_shards()
    for shard in range(4):
        index.read(shard, 0)
    assert len(open_shards()) == 4
    del index
    assert not open_shards()
