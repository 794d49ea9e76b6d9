"""Lint reports everything that indexing and decoding would stop at; stats describe the shards."""

import importlib
import io
import os
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from nfnets_xla.cli import main
from nfnets_xla.data.index import build_index
from nfnets_xla.data.lint import lint, stats
from tests.data.images import encoded, noise_png, packed
from tests.data.tars import sample, tar_bytes, write_tar


def picture(width: int, height: int) -> bytes:
    return encoded(Image.new("RGB", (width, height)), "PNG")


def test_every_fault_of_every_shard(tmp_path: Path) -> None:
    good = noise_png(0)
    (tmp_path / "sub").mkdir()
    write_tar(tmp_path / "a.tar", [*sample("x", 1, good), *sample("y", 1, good[:80])])
    write_tar(tmp_path / "sub" / "a.tar", sample("z", 1, picture(9, 400)))
    write_tar(tmp_path / "b.tar", [*sample("u", "cat", good), *sample("v", 1, picture(4, 4))])
    (tmp_path / "c.tar").write_bytes(tar_bytes(sample("w", 1, good))[:2000])
    write_tar(tmp_path / "good.tar", sample("x", 1, good))
    found = [(fault.shard, fault.offset, fault.what) for fault in lint(tmp_path, jobs=2)]
    expected = [
        ("a.tar", 3584, "sample y: 80 bytes do not decode as an image"),
        ("b.tar", 0, "sample u has label b'cat' in .cls"),
        ("b.tar", 3584, "sample v: 4 x 4 pixels: sides must have 8 or more"),
        ("c.tar", 1024, "truncated: a member of"),
        ("c.tar", 1536, "truncated: it ends at byte 2000"),
        ("c.tar", 0, "sample w has no image"),
        ("sub/a.tar", 0, "sub/a.tar and a.tar have one file name"),
        ("sub/a.tar", 1024, "sample z: 9 x 400 pixels"),
    ]
    assert [(shard, offset) for shard, offset, _ in found] == sorted(
        (shard, offset) for shard, offset, _ in expected
    )
    for shard, offset, what in expected:
        assert any(f[:2] == (shard, offset) and f[2].startswith(what) for f in found), found
    assert not list(tmp_path.glob("*.npz"))


def test_a_shard_that_is_there_twice_is_a_fault(tmp_path: Path) -> None:
    """Also if it has faults of its own. Shards that are equal only in part are no duplicates."""
    good = noise_png(0)
    write_tar(tmp_path / "a.tar", [*sample("x", 1, good), *sample("y", 1, good[:80])])
    write_tar(tmp_path / "b.tar", sample("x", 1, good))
    write_tar(tmp_path / "c.tar", sample("x", 2, good))
    write_tar(tmp_path / "d.tar", sample("z", 1, good[:80]))
    assert len(lint(tmp_path)) == 2
    for name, of in (("e.tar", "a.tar"), ("f.tar", "b.tar")):
        (tmp_path / name).symlink_to(of)
    twice = [fault for fault in lint(tmp_path, jobs=2) if "same samples" in fault.what]
    assert [str(fault).partition(" hold")[0] for fault in twice] == [
        "e.tar, offset 0: e.tar and a.tar",
        "f.tar, offset 0: f.tar and b.tar",
    ]


@pytest.mark.parametrize("name", [b"caf\xe9.tar", b"a\tb.tar", b"a\nb.tar", b"sub\xff/a.tar"])
def test_a_name_that_no_list_can_hold_is_refused_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: bytes
) -> None:
    """The index cannot hold a latin-1 name, and no list can hold a tab or newline in a name."""
    path = tmp_path / os.fsdecode(name)
    path.parent.mkdir(exist_ok=True)
    write_tar(path, sample("x", 1, noise_png(0)))
    (tmp_path / "A.tar").write_bytes(b"rubbish, which would be said first if it was read")
    for command in ("index", "lint"):
        with pytest.raises(SystemExit) as stopped:
            main(["shards", command, str(tmp_path), "--jobs", "1"])
        assert stopped.value.code == 2
        said = f"{tmp_path} holds {os.fsdecode(name)!r}, which is not printable in UTF-8: rename it"
        assert capsys.readouterr().err == f"nfnets-xla: {said}\n"
    assert not list(tmp_path.rglob("*.npz"))
    path.rename(tmp_path / "B.tar")
    (tmp_path / "A.tar").unlink()
    assert lint(tmp_path) == []


def test_an_image_too_large_to_decode_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nfnets_xla.data.decode.MAX_PIXELS", 10_000)
    write_tar(tmp_path / "a.tar", sample("x", 1, picture(200, 100)))
    (fault,) = lint(tmp_path)
    assert str(fault).startswith("a.tar, offset 1024: sample x: ")
    assert "200 x 100 pixels are more than 10000" in fault.what


def test_members_that_are_links_are_faults(tmp_path: Path) -> None:
    """GNU tar writes hard-linked files so; otherwise their samples would be missing silently."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in sample("a", 1, noise_png(0)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for kind, key in ((tarfile.LNKTYPE, "b"), (tarfile.SYMTYPE, "c")):
            for ending in ("CLS", "png", "thumbnail"):
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.type, info.linkname = kind, f"a.{ending}"
                tar.addfile(info)
        folder = tarfile.TarInfo("d.png")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    found = [
        fault.what.partition(" is a link, or sparse: pack it with")[0] for fault in lint(tmp_path)
    ]
    assert found == ["b.CLS", "b.png", "c.CLS", "c.png"]


def test_one_label_far_above_the_others_takes_no_memory(tmp_path: Path) -> None:
    for number, label in enumerate((3, 3, 2**31 - 1)):
        write_tar(tmp_path / f"{number}.tar", sample("x", label, noise_png(number)))
    found = stats(build_index(tmp_path))
    assert found["classes"] == (
        "2,147,483,648, each of 0 to 2 (median 0) samples; 2,147,483,646 empty"
    )


def test_work_that_dies_is_no_reader_that_has_seen_enough(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """`lint` before training must end with 0 only if it has read everything."""
    write_tar(tmp_path / "a.tar", sample("x"))
    for die in ("os.kill(os.getpid(), 9)", "raise BrokenPipeError"):
        code = f"import os\ndef die(folder, name):\n    {die}\n"
        (tmp_path / "dying.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        sys.modules.pop("dying", None)
        monkeypatch.setattr(
            "nfnets_xla.data.lint._lint_shard", importlib.import_module("dying").die
        )
        with pytest.raises(SystemExit) as stopped:
            main(["shards", "lint", str(tmp_path), "--jobs", "2"])
        assert stopped.value.code == 1
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("nfnets-xla:")]
        assert "a process that did a part of the work was killed, perhaps for memory" in line


def test_stats(tmp_path: Path) -> None:
    packed(tmp_path, 25, 10)
    (tmp_path / "several.tar").write_bytes(tar_bytes(sample("x", "1 7", noise_png(1))))
    index = build_index(tmp_path)
    found = stats(index)
    assert found["samples"] == "26"
    assert found["shards"] == "4, each of 1 to 10 (median 7) samples"
    assert found["labels per sample"] == "mean 1.04, at most 2"
    assert found["classes"] == "8, each of 0 to 6 (median 5) samples; 2 empty"
    assert found["fingerprint"] == index.fingerprint
