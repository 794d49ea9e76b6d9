"""An index gives a tar's bytes, changes with them, and refuses what it does not fit."""

import io
import multiprocessing
import os
import pickle
import re
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from webdataset.writer import TarWriter

from nfnets_xla.data import jobs
from nfnets_xla.data.index import build_index
from nfnets_xla.data.records import Records
from nfnets_xla.data.scan import Scan, scan_shard
from nfnets_xla.data.shards import Line, ShardIndex, make_manifest, manifest_bytes
from nfnets_xla.data.storage import Folder, OpenFile
from tests.data.tars import FORMATS, Member, sample, write_tar

PACKED = 7  # samples of each shard


def scanned(folder: Path, name: str) -> Records:
    records = scan_shard(Folder(folder).open(name)).records
    assert records is not None
    return records


def images_of(path: Path) -> list[bytes]:
    """What tarfile and nothing else says."""
    with tarfile.open(path) as tar:
        files = [(tar.extractfile(member), member) for member in tar if member.isreg()]
        return [f.read() for f, member in files if f and member.name.endswith(("JPEG", "jpg"))]


def make_folder(folder: Path) -> Path:
    """Shards in every tar format and of webdataset's writer, with long names and odd labels."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for number, (name, format) in enumerate(FORMATS.items()):
        members: list[Member] = [("__meta__", b"skipped")]
        for row in range(PACKED):
            key = f"{name}/row{row}"
            if name != "ustar":
                key = f"{'deep/' * 30}{'long' * 40}é{row}"  # no ustar header holds such a name
            image, label = rng.bytes(int(rng.integers(0, 3000))), number * PACKED + row
            text = [
                (".cls", f"{label}\n"),
                (".txt", f" {label}"),
                (".json", f'{{"label":{label}}}'),
            ]
            extension, value = text[row % 3]
            members += [(key + ".JPEG", image), (key + extension, value.encode())]
            members += [(key + ".seg.png", b"another member")]
        write_tar(folder / f"{name}.tar", members, format)
    with TarWriter(str(folder / "wds.tar"), encoder=False, mtime=0.5) as writer:
        for row in range(PACKED):
            writer.write({"__key__": f"w{row}", "jpg": rng.bytes(100), "cls": b"%d" % row})
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "shards")


@pytest.fixture
def index(folder: Path) -> ShardIndex:
    return build_index(folder)


def one_line(action: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (callers compare the message)
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


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
    """As `rsync -a` and `cp -p` do it, which keep the time of the last change."""
    path = tmp_path / "a.tar"
    write_tar(path, sample("x", 1))
    assert build_index(tmp_path).labels(0, 0) == {1: 1.0}
    write_tar(path, sample("x", 2))
    os.utime(path, (0, 0))
    assert build_index(tmp_path).labels(0, 0) == {2: 1.0}


def test_shards_may_lie_in_subfolders_but_not_share_a_file_name(tmp_path: Path) -> None:
    for name in ("one/a.tar", "two/b.tar", ".hidden/c.tar"):
        (tmp_path / name).parent.mkdir()
        write_tar(tmp_path / name, sample("x/1", 1) + sample("y", 2))
    index = build_index(tmp_path)
    assert [index.name(0), index.name(1)] == ["one/a.tar", "two/b.tar"]
    assert index.sample_id(1, 0) == "b/x/1"
    assert index.read(1, 1) == b"picture"
    (tmp_path / "two/b.tar").rename(tmp_path / "two/a.tar")
    message = one_line(lambda: build_index(tmp_path))
    assert "two/a.tar and one/a.tar have one file name: rename one of them" in message


def test_links_to_folders_are_followed_and_none_is_read_twice(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "shards", tmp_path / "elsewhere"
    for path in (folder / "own/a.tar", elsewhere / "deep/b.tar"):
        path.parent.mkdir(parents=True)
        write_tar(path, sample("x"))
    (folder / "disk").symlink_to(elsewhere)
    (folder / "another").symlink_to(folder / "own")  # which has a name already
    (elsewhere / "back").symlink_to(folder)
    (elsewhere / "deep/round").symlink_to(elsewhere)
    index = build_index(folder)
    assert [index.name(0), index.name(1)] == ["disk/deep/b.tar", "own/a.tar"]
    assert ShardIndex.load(folder).read(0, 0) == b"picture"


def test_a_manifest_is_32_bytes_a_shard_and_its_name(tmp_path: Path) -> None:
    """And a million samples are open at once, their sidecars unread."""
    lines = [Line(f"{n:06d}.tar", 1000, 7, b"d" * 16, 9, 1) for n in range(1000)]
    manifest = make_manifest(lines)
    assert sum(part.nbytes for part in manifest) == 1000 * (32 + 10) + 3 * 8
    (tmp_path / "index.npz").write_bytes(manifest_bytes(manifest))
    for line in lines:
        (tmp_path / line.name).write_bytes(b"7 bytes")
        (tmp_path / (line.name + ".idx.npz")).touch()  # empty: who reads it fails
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
    """A resumed run compares fingerprints: they may not change with a release of this library."""
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


# ---- tars that are refused --------------------------------------------------------------------

REFUSED: dict[str, tuple[list[Member], str]] = {
    "empty": ([], "a.tar, offset 0: holds no samples (key.jpg, key.cls): take it out"),
    "unnamed": ([("README", b""), (".png", b"")], "a.tar, offset 0: holds no samples"),
    "unprintable": (sample("x\n"), r"key 'x\\n': pack it with printable names"),
    "no image": ([("x.cls", b"0")], "sample x has no image: pack it with one .png, .jpg"),
    "two images": ([*sample("x"), ("x.jpg", b"")], "sample x has 2 image"),
    "no label": ([("x.png", b"")], "sample x has no label: pack it with a .cls, .json, .txt"),
    "negative": (sample("x", -1), "has label b'-1' in .cls: .* whole number of 0 to 2147483647"),
    "too large": (sample("x", 2**31), "has label b'2147483648' in .cls"),
    "word": (sample("x", "cat"), "has label b'cat' in .cls"),
    "underscore": (sample("x", "1_0"), "has label b'1_0' in .cls"),
    "fraction": ([("x.json", b'{"label": 1.0}'), ("x.png", b"")], "in .json: pack it with"),
    "true": ([("x.json", b'{"label": true}'), ("x.png", b"")], "in .json"),
    "no json": ([("x.json", b"{"), ("x.png", b"")], "has label b'{' in .json"),
    "other json": ([("x.json", b"[1]"), ("x.png", b"")], "in .json"),
    "duplicate": (
        [*sample("x"), *sample("x")],
        "a.tar, offset 2048: duplicate key x (.cls): g",
    ),
    "duplicate later": ([*sample("x"), *sample("y"), *sample("x")], "duplicate key x (.cls)"),
    "apart": (
        [("x.png", b""), ("y.png", b""), ("x.cls", b"0"), ("y.cls", b"0")],
        "a.tar, offset 1024: members of sample x apart: pack it sorted by name",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    members, message = REFUSED[case]
    write_tar(tmp_path / "a.tar", members)
    pattern = message.replace("(", r"\(").replace(")", r"\)").replace("[", r"\[")
    assert re.search(pattern, one_line(lambda: build_index(tmp_path)))
    assert os.listdir(tmp_path) == ["a.tar"]


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "in a header": (lambda tar: tar[:1000], "offset 0: truncated: a member of 1 bytes needs 24 mo"),
    "in the last data": (lambda tar: tar[:1539], "offset 1024: truncated: a member of 7 bytes"),
    "before its end": (lambda tar: tar[:2048], "offset 2048: truncated: it ends at byte 2048 with"),
    "within its end": (lambda tar: tar[:2560], "offset 2048: truncated: it ends at byte 2560 with"),
    "a header": (lambda tar: tar[:1024] + b"?" * 512 + tar[1536:], "offset 1024: damaged header"),
    "the first header": (lambda tar: b"?" * 512 + tar[512:], "offset 0: damaged header"),
    "joined by cat": (lambda tar: tar + tar, "offset 10240: data after the end of the archive"),
    "nothing": (lambda tar: b"", "offset 0: truncated: it ends at byte 0"),
    "not a tar": (lambda tar: b"rubbish" * 1000, "offset 0: damaged header"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_tar_that_is_not_whole_is_refused(tmp_path: Path, case: str) -> None:
    path, (damage, message) = tmp_path / "a.tar", DAMAGES[case]
    write_tar(path, sample("x"))
    path.write_bytes(damage(path.read_bytes()))
    assert f"{path}, {message}" in one_line(lambda: build_index(tmp_path))


def test_a_compressed_tar_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("x.png"))
    assert "offset 0: compressed: a shard must be a plain tar" in one_line(
        lambda: build_index(tmp_path)
    )


def test_the_folder_must_be_local_and_hold_shards(tmp_path: Path) -> None:
    assert "holds no shards" in one_line(lambda: build_index(tmp_path))
    for action in (build_index, ShardIndex.load):
        assert "is not a folder" in one_line(lambda: action(tmp_path / "none"))  # noqa: B023


# ---- indexes that no longer fit ---------------------------------------------------------------


def test_loading_says_what_is_wrong(folder: Path) -> None:
    advice = f"run `nfnets-xla shards index {folder}`"

    def load() -> str:
        message = one_line(lambda: ShardIndex.load(folder))
        assert message.endswith(advice)
        return message.removesuffix("; " + advice)

    assert load() == f"{folder} has no index.npz"
    stale = f"{folder}: index no longer matches its shards: "

    build_index(folder)
    write_tar(folder / "new.tar", sample("x"))
    assert load() == stale + "new.tar is not in it"
    (folder / "new.tar").unlink()
    with (folder / "gnu.tar").open("ab") as file:
        file.write(b"!")
    size = (folder / "gnu.tar").stat().st_size
    assert load() == stale + f"gnu.tar has {size} bytes instead of {size - 1}"
    (folder / "gnu.tar").unlink()
    assert load() == stale + "gnu.tar is missing"
    build_index(folder)
    (folder / "pax.tar.idx.npz").unlink()
    assert load() == stale + "pax.tar.idx.npz is missing"

    build_index(folder)
    good = (folder / "index.npz").read_bytes()
    with np.load(io.BytesIO(good)) as file:
        arrays: dict[str, Any] = dict(file)
    for name, change in (("head", [1, 21, 1]), ("fingerprint", [0] * 32), ("counts_S", [8] * 3)):
        changed: Any = arrays | {name: np.array(change).astype(arrays[name].dtype)}
        np.savez(folder / "index.npz", **changed)
        assert "is not a whole index of format 2 (another format, or altered by hand)" in load()
    pickled: Any = arrays | {"names": np.array([{}], dtype=object)}
    np.savez(folder / "index.npz", **pickled)
    assert "allow_pickle=False" in load()
    for data in (b"", b"{}", good[:-30], good[:200] + b"?" + good[201:]):
        (folder / "index.npz").write_bytes(data)
        assert "index.npz is not a whole index of format 2" in load()


@pytest.mark.parametrize("where", ["data", "header"])
def test_bit_rot_is_found_when_the_sample_is_read(
    folder: Path, index: ShardIndex, where: str
) -> None:
    records = scanned(folder, "gnu.tar")
    offset = int(records.offsets_N[2])
    with (folder / "gnu.tar").open("r+b") as file:
        file.seek(offset + 9 if where == "data" else offset - 500)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    message = one_line(lambda: index.read(0, 2))
    assert message.startswith(f"{folder}: index no longer matches its shards: gnu.tar, key deep/")
    assert f"bytes at offset {offset}: wrong checksum; restore the shard, or to take it" in message
    index.read(0, 1)  # the others are good


def test_a_sidecar_of_another_index_is_refused(folder: Path, index: ShardIndex) -> None:
    (folder / "gnu.tar.idx.npz").write_bytes((folder / "pax.tar.idx.npz").read_bytes())
    (folder / "pax.tar.idx.npz").write_bytes(b"PK rubbish")
    for shard, name in enumerate(("gnu", "pax")):
        message = one_line(lambda: index.read(shard, 0))  # noqa: B023
        assert f"index no longer matches its shards: {name}.tar.idx.npz is damaged" in message


def test_a_sidecar_that_cannot_be_read_is_not_called_damaged(
    folder: Path, index: ShardIndex
) -> None:
    """To index again would help against none of the machine's faults."""
    path = folder / "gnu.tar.idx.npz"
    path.unlink()
    assert "gnu.tar.idx.npz is missing ([Errno 2]" in one_line(lambda: index.read(0, 0))
    path.mkdir()
    with pytest.raises(IsADirectoryError, match=f"Is a directory: '{path}'"):
        index.read(0, 0)


def test_a_sidecar_with_a_pickle_is_not_run(folder: Path, index: ShardIndex) -> None:
    arrays: dict[str, Any] = scanned(folder, "gnu.tar")._asdict()
    arrays["keys"] = np.array([{}], dtype=object)
    with (folder / "gnu.tar.idx.npz").open("wb") as file:
        np.savez(file, **arrays)
    assert "allow_pickle=False" in one_line(lambda: index.read(0, 0))


def test_names_in_an_archive_lead_nowhere(tmp_path: Path) -> None:
    """Upwards, from the root, and through a link: they are keys, and nothing is unpacked."""
    folder = tmp_path / "shards"
    folder.mkdir()
    keys = ["../../escaped", f"{tmp_path}/absolute", "link/through"]
    members = [member for number, key in enumerate(keys) for member in sample(key, number)]
    write_tar(folder / "a.tar", members)
    with tarfile.open(folder / "a.tar", "a") as tar:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        tar.addfile(link)
    index = build_index(folder)
    assert [index.sample_id(0, row) for row in range(3)] == [f"a/{key}" for key in keys]
    assert [index.read(0, row) for row in range(3)] == [b"picture"] * 3
    found = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")}
    assert found == {"shards"}
    assert all(path.name.startswith(("a.tar", "index")) for path in folder.iterdir())


# ---- processes and files ----------------------------------------------------------------------


def test_it_pickles_small_and_reads_in_a_spawned_process(index: ShardIndex) -> None:
    expected = [index.read(shard, 1) for shard in range(4)]  # files are open now
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
