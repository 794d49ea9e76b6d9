"""Tars that cannot be indexed, and indexes that no longer fit their shards, are refused by name."""

import io
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nfnets_xla.data.holdout import hold_out
from nfnets_xla.data.index import build_index
from nfnets_xla.data.lint import stats
from nfnets_xla.data.shards import ShardIndex
from tests.data.tars import Member, one_line, sample, scanned, write_tar

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


def test_a_pipe_is_no_shard(tmp_path: Path) -> None:
    """Opening it would wait for ever."""
    os.mkfifo(tmp_path / "a.tar")
    assert one_line(lambda: build_index(tmp_path)) == (
        f"{tmp_path}/a.tar is no regular file: take it out"
    )


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


@pytest.mark.parametrize("as_link", [False, True])
def test_a_shard_that_is_there_twice_is_refused(folder: Path, as_link: bool) -> None:
    """A browser's second download, or a link to the newest: its samples would be shown twice."""
    twin = folder / "gnu (1).tar"
    if as_link:
        twin.symlink_to("gnu.tar")
    else:
        twin.write_bytes((folder / "gnu.tar").read_bytes())
    what = "gnu.tar and gnu (1).tar hold the same samples, as a copy or a link does: take one"
    for force in (False, True):
        message = one_line(lambda: build_index(folder, force=force))  # noqa: B023
        assert message.startswith(f"{folder}: {what}")
    assert not (folder / "index.npz").exists()
    twin.unlink()
    assert build_index(folder).num_shards == 4


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
        assert load() == f"{folder}/index.npz is damaged, or no index of format 2"
    for data in (b"", b"{}", good[:-30], good[:200] + b"?" + good[201:], bytes(len(good))):
        (folder / "index.npz").write_bytes(data)
        assert load() == f"{folder}/index.npz is damaged, or no index of format 2"


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
        how = {"gnu": "of another index", "pax": "damaged"}[name]
        assert f"index no longer matches its shards: {name}.tar.idx.npz is {how};" in message


@pytest.mark.parametrize("damage", ["of another index", "damaged", "missing"])
def test_stats_and_holdout_take_no_number_from_a_wrong_sidecar(
    folder: Path, index: ShardIndex, tmp_path: Path, damage: str
) -> None:
    path = folder / "gnu.tar.idx.npz"
    if damage == "missing":
        path.unlink()
    elif damage == "damaged":
        path.write_bytes(path.read_bytes()[:500])
    else:
        path.write_bytes((folder / "wds.tar.idx.npz").read_bytes())
    for action in (stats, lambda index: hold_out(index, tmp_path / "out", samples=9)):
        message = one_line(lambda: action(index))  # noqa: B023
        said = f"{folder}: index no longer matches its shards: gnu.tar.idx.npz is {damage}"
        assert message.startswith(said)
        assert message.endswith(f"; run `nfnets-xla shards index {folder}`")
    assert not (tmp_path / "out").exists()


def test_a_sidecar_that_cannot_be_read_is_not_called_damaged(
    folder: Path, index: ShardIndex
) -> None:
    """Indexing again would not help against a fault of the machine."""
    path = folder / "gnu.tar.idx.npz"
    path.unlink()
    assert "gnu.tar.idx.npz is missing ([Errno 2]" in one_line(lambda: index.read(0, 0))
    path.mkdir()
    with pytest.raises(IsADirectoryError, match=f"Is a directory: '{path}'"):
        index.read(0, 0)


class Touches:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_in_an_index_is_not_run(folder: Path, index: ShardIndex, tmp_path: Path) -> None:
    path = tmp_path / "touched"
    for name, read in (
        ("gnu.tar.idx.npz", lambda: index.read(0, 0)),
        ("index.npz", lambda: ShardIndex.load(folder)),
    ):
        with np.load(folder / name) as file:
            arrays: dict[str, Any] = dict(file)
        arrays[min(arrays)] = np.array([Touches(path)], dtype=object)
        np.savez(folder / name, **arrays)
        assert f"{name} is damaged" in one_line(read)
        assert not path.exists()
        with np.load(folder / name, allow_pickle=True) as file:
            dict(file)
        path.unlink()


def test_names_in_an_archive_lead_nowhere(tmp_path: Path) -> None:
    """Upwards, from the root, or through a link: names are only keys, and nothing is unpacked."""
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
