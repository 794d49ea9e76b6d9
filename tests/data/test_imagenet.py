"""ImageNet's archives, made small: a tar of tars, a tar, and a development kit."""

import gzip
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from nfnets_xla.data import imagenet
from nfnets_xla.data.imagenet import pack_imagenet
from nfnets_xla.data.index import build_index
from nfnets_xla.data.shards import ShardIndex
from tests.data.images import noise_png
from tests.data.tars import tar_bytes, write_tar

SYNSETS = ["n03", "n01", "n02"]  # in ILSVRC's order, with the numbers 1, 2, 3
TRUTH = [2, 1, 3, 2, 1]  # of the validation images, as such numbers
REAL = [[0], [], [1, 2], [0, 1], [2]]


def devkit(padding: int = 0, meta: bytes | None = None) -> bytes:
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    synsets = np.array([(n, name, 0) for n, name in enumerate(SYNSETS, start=1)], fields)
    matlab: Any = io.BytesIO()  # savemat's stubs lack its type
    savemat(matlab, {"synsets": synsets})
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, data in (
            ("ILSVRC2012_validation_ground_truth.txt", "\n".join(map(str, TRUTH)).encode()),
            ("meta.mat", matlab.getvalue() if meta is None else meta),
            ("unrelated.txt", bytes(padding)),
        ):
            info = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/data/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "archives"
    folder.mkdir()
    classes = []
    for label, synset in enumerate(sorted(SYNSETS)):
        images = [(f"{synset}_{n}.JPEG", noise_png(10 * label + n)) for n in range(4)]
        classes.append((f"{synset}.tar", tar_bytes(images)))
    write_tar(folder / imagenet.TRAIN, classes)
    val = [(f"ILSVRC2012_val_{n:08}.JPEG", noise_png(100 + n)) for n in range(1, 6)]
    write_tar(folder / imagenet.VAL, val[::-1])  # the archive is not in order
    (folder / imagenet.DEVKIT).write_bytes(devkit())
    (folder / imagenet.REAL).write_text(json.dumps(REAL))
    for name, value in (("CLASSES", 3), ("TRAIN_IMAGES", 12), ("VAL_IMAGES", 5)):
        monkeypatch.setattr(imagenet, name, value)
    return folder


def contents(index: ShardIndex) -> dict[str, tuple[bytes, list[int]]]:
    return {
        index.sample_id(shard, row).partition("/")[2]: (
            index.read(shard, row),
            list(index.labels(shard, row)),
        )
        for shard in range(index.num_shards)
        for row in range(index.counts[shard])
    }


def test_labels_are_the_standard_index(source: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    folders = pack_imagenet(
        source, tmp_path / "out", samples_per_shard=5, on_progress=lambda *c: calls.append(c)
    )
    assert [folder.name for folder in folders] == ["train", "val", "val-real"]
    assert calls[11:13] == [("train", 12, 12), ("val", 1, 5)]
    assert calls[-1] == ("val-real", 4, 4)
    train, val, real = (contents(build_index(folder)) for folder in folders)
    assert train == {
        f"{synset}_{n}": (noise_png(10 * label + n), [label])
        for label, synset in enumerate(("n01", "n02", "n03"))
        for n in range(4)
    }
    names = [f"ILSVRC2012_val_{n:08}" for n in range(1, 6)]
    labels = [0, 2, 1, 0, 2]  # of n01, n03, n02, n01, n03
    assert val == {
        name: (noise_png(100 + n), [label])
        for n, (name, label) in enumerate(zip(names, labels, strict=True), start=1)
    }
    assert real == {
        name: (noise_png(100 + n), found)
        for n, (name, found) in enumerate(zip(names, REAL, strict=True), start=1)
        if found
    }
    for folder in folders:
        assert json.loads((folder / "classes.json").read_text()) == ["n01", "n02", "n03"]


def test_training_images_are_shuffled_and_the_same_twice(source: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        pack_imagenet(source, tmp_path / name, samples_per_shard=6)
    one, two = (
        [path.read_bytes() for path in sorted((tmp_path / name).rglob("*.tar"))]
        for name in ("one", "two")
    )
    assert one == two
    first = build_index(tmp_path / "one" / "train")
    assert len({next(iter(first.labels(0, row))) for row in range(6)}) > 1


@pytest.mark.parametrize("split", ["train", "val", "val-real"])
def test_a_split_that_is_there_is_refused_before_anything_is_read(
    source: Path, tmp_path: Path, split: str
) -> None:
    (tmp_path / "out" / split).mkdir(parents=True)
    (tmp_path / "out" / split / "a.tar").touch()
    (source / imagenet.TRAIN).write_bytes(b"rubbish")
    with pytest.raises(
        ValueError, match=f"out/{split} holds a.tar already: choose an empty folder"
    ):
        pack_imagenet(source, tmp_path / "out")
    assert len(list((tmp_path / "out").rglob("*.tar"))) == 1


FAULTS: dict[str, tuple[Callable[[Path, Any], object], str]] = {
    "no archive": (lambda s, m: (s / imagenet.VAL).unlink(), "has no ILSVRC2012_img_val.tar: get"),
    "no folder": (lambda s, m: shutil.rmtree(s), "is not a folder: give the one that holds ILSVRC"),
    "classes": (lambda s, m: m.setattr(imagenet, "CLASSES", 1000), "3 classes in ILSVRC2012_img_t"),
    "train": (lambda s, m: m.setattr(imagenet, "TRAIN_IMAGES", 13), "12 images in .*: .* be 13"),
    "val": (lambda s, m: write_tar(s / imagenet.VAL, []), "0 images in ILSVRC2012_img_val"),
    "truth": (lambda s, m: m.setattr(imagenet, "VAL_IMAGES", 6), "5 labels in ILSVRC2012_devkit"),
    "real": (lambda s, m: (s / "real.json").write_text("[[1]]"), "1 entries in real.json"),
    "bomb": (
        lambda s, m: (s / imagenet.DEVKIT).write_bytes(devkit(2**26 + 1)),  # 65 kB on disk
        "67108865 bytes in one file.*: get it again",
    ),
    "damage": (
        lambda s, m: (s / imagenet.TRAIN).write_bytes((s / imagenet.TRAIN).read_bytes()[:9000]),
        "offset 0: truncated",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_other_archives_are_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    make, message = FAULTS[case]
    make(source, monkeypatch)
    with pytest.raises(ValueError, match=message):
        pack_imagenet(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


DAMAGES: dict[str, tuple[str, bytes]] = {
    "truncated": (imagenet.DEVKIT, devkit()[:-100]),
    "empty": (imagenet.DEVKIT, b""),
    "a page": (imagenet.DEVKIT, b"<html>Log in first</html>"),
    "another archive": (imagenet.DEVKIT, gzip.compress(tar_bytes([("a.txt", b"a")]))),
    "another meta.mat": (imagenet.DEVKIT, devkit(meta=b"<html>")),
    "real truncated": (imagenet.REAL, b"[[1], [2"),
    "real is no list": (imagenet.REAL, b'{"label": 1}'),
    "real of names": (imagenet.REAL, b'[["cat"]]'),
    "real of numbers": (imagenet.REAL, b"[1, 2, 3, 4, 5]"),
    "real of fractions": (imagenet.REAL, b"[[0.5]]"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_small_file_that_is_damaged_is_named_before_the_large_ones_are_read(
    source: Path, tmp_path: Path, case: str
) -> None:
    name, data = DAMAGES[case]
    (source / name).write_bytes(data)
    (source / imagenet.TRAIN).write_bytes(b"rubbish")
    with pytest.raises(ValueError, match=f"^{name} [^\n]*: get it again$"):
        pack_imagenet(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
