"""Packing twice gives equal bytes, webdataset reads them, and a failure leaves nothing."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet
from sklearn.datasets import load_digits
from webdataset.tariterators import group_by_keys, tar_file_expander

from nfnets_xla.data.decode import decode
from nfnets_xla.data.index import build_index
from nfnets_xla.data.pack import Sample, encode_image, pack_samples
from nfnets_xla.data.shards import ShardIndex
from nfnets_xla.data.sources import dataset_samples, pack_image_folder, pack_table


def digits(count: int) -> list[Sample]:
    """Scikit-learn's handwritten digits, 8 x 8, drawn at 32 x 32."""
    data: Any = load_digits()
    samples: list[Sample] = []
    for number in range(count):
        grey = (data.images[number] * 15.9375).astype(np.uint8).repeat(4, 0).repeat(4, 1)
        image = encode_image(np.repeat(grey[..., None], 3, axis=2))
        samples.append((f"digit{number:04}", image, "png", data.target[number]))
    return samples


def label(index: ShardIndex, shard: int, row: int) -> int:
    (label,) = index.labels(shard, row)
    return label


def contents(index: ShardIndex) -> list[tuple[str, bytes, int]]:
    return [
        (index.sample_id(shard, row), index.read(shard, row), label(index, shard, row))
        for shard, count in enumerate(index.counts)
        for row in range(count)
    ]


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def one_line(action: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (callers compare the message)
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- samples ----------------------------------------------------------------------------------


def test_digits_come_back_by_index_and_by_webdataset(tmp_path: Path) -> None:
    samples = digits(50)
    paths = pack_samples(samples, tmp_path, samples_per_shard=20, prefix="digits")
    assert paths == [tmp_path / f"digits-00000{n}.tar" for n in range(3)]
    assert build_index(tmp_path).num_classes == 10

    index = ShardIndex.load(tmp_path)
    np.testing.assert_array_equal(index.counts, [20, 20, 10])
    assert contents(index) == [
        (f"digits-00000{n // 20}/{key}", image, label)
        for n, (key, image, _, label) in enumerate(samples)
    ]
    read: list[Any] = []
    for path in paths:
        with path.open("rb") as stream:
            read += group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}]))
    assert [(s["__key__"], s["png"], int(s["cls"])) for s in read] == [
        (key, image, label) for key, image, _, label in samples
    ]


def test_packing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "50%d"):  # the folder's name is not a pattern
        pack_samples(digits(9), tmp_path / folder, samples_per_shard=4)
    assert tree(tmp_path / "a") == tree(tmp_path / "50%d")
    assert len(tree(tmp_path / "a")) == 3


def test_long_and_foreign_keys_come_back(tmp_path: Path) -> None:
    keys = ["k" * 300, "été 図"]
    pack_samples([(key, b"x", "webp", 1) for key in keys], tmp_path, samples_per_shard=2)
    index = build_index(tmp_path)
    assert [index.sample_id(0, row) for row in range(2)] == [f"shard-000000/{key}" for key in keys]


def test_progress_counts_samples(tmp_path: Path) -> None:
    calls: list[int] = []
    pack_samples(digits(3), tmp_path, samples_per_shard=2, on_progress=calls.append)
    assert calls == [1, 2, 3]


REFUSED: dict[str, tuple[list[Sample], str]] = {
    "none": ([], "there are no samples"),
    "duplicate": ([("x", b"1", "png", 0), ("x", b"2", "jpg", 0)], "duplicate key x"),
    "dot": ([("x.y", b"1", "png", 0)], "key is 'x.y'; it must be printable and without dots"),
    "slash": ([("x/y", b"1", "png", 0)], "key is 'x/y'"),
    "line": ([("x\n", b"1", "png", 0)], r"key is 'x\n'"),
    "no key": ([("", b"1", "png", 0)], "key is ''"),
    "extension": ([("x", b"1", "gif", 0)], "extension of x is 'gif'; it must be one of png, jpg"),
    "no image": ([("x", b"", "png", 0)], "image of x is empty"),
    "negative": ([("x", b"1", "png", -1)], "label of x is -1 (label -1); it must be"),
    "true": ([("x", b"1", "png", True)], "label of x is True"),
    "word": ([("x", b"1", "png", "cat")], "label of x is cat"),  # pyright: ignore
    "no labels": ([("x", b"1", "png", {})], "label of x is {} (0 labels"),
    "no weight": ([("x", b"1", "png", {3: 0.0})], "(weight 0.0); it must be a whole number"),
}


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("case", REFUSED)
def test_refused_samples_leave_nothing(tmp_path: Path, case: str, exists: bool) -> None:
    samples, message = REFUSED[case]
    folder = tmp_path / "shards"
    if exists:
        folder.mkdir()
    good = [("good", b"1", "png", 0)] if samples else []
    action = lambda: pack_samples([*good, *samples], folder, samples_per_shard=1)  # noqa: E731
    assert message in one_line(action)
    assert list(tmp_path.rglob("*")) == ([folder] if exists else [])


def test_an_iterable_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Iterator[Sample]:
        yield from digits(5)
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        pack_samples(failing(), tmp_path / "new", samples_per_shard=2)
    assert list(tmp_path.rglob("*")) == []


def test_refused_arguments(tmp_path: Path) -> None:
    def pack(samples_per_shard: int = 1, **options: Any) -> Callable[[], object]:
        samples = [("x", b"1", "png", 0)]
        return lambda: pack_samples(
            samples, tmp_path, samples_per_shard=samples_per_shard, **options
        )

    assert "samples_per_shard is 0; it must be at least 1" in one_line(pack(0))
    for prefix in ("", "a/b", ".a", "%d", "a\tb"):
        assert f"prefix is {prefix!r}" in one_line(pack(prefix=prefix))
    assert list(tmp_path.iterdir()) == []
    pack()()
    before = tree(tmp_path)
    assert "holds shard-000000.tar already: choose an empty folder" in one_line(pack())
    assert tree(tmp_path) == before


# ---- folders of images ------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for label, name in enumerate(("ant", "bee", "c.at")):
        (root / name).mkdir(parents=True)
        for number in range(12):
            extension = ("png", "JPG", "jpeg", "webp")[number % 4]
            data = b"%d-%d" % (label, number)  # copied without decoding
            (root / name / f"photo.{number}.{extension}").write_bytes(data)
    (root / "README.txt").write_text("beside the classes")
    (root / "ant" / ".DS_Store").write_text("hidden")
    return root


def test_a_folder_of_images_is_packed_shuffled(images: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    out = tmp_path / "out"
    paths = pack_image_folder(
        images, out, samples_per_shard=9, on_progress=lambda *call: calls.append(call)
    )
    assert calls == [(n, 36) for n in range(1, 37)]
    assert paths == sorted(out.glob("shard-*.tar"))
    assert json.loads((out / "classes.json").read_text()) == ["ant", "bee", "c.at"]
    index = build_index(out)
    for shard in range(4):
        assert len({label(index, shard, row) for row in range(index.counts[shard])}) > 1

    packed = {name.split("/")[1]: (data, label) for name, data, label in contents(index)}
    assert packed == {
        f"{name}-photo_{number}": (b"%d-%d" % (label, number), label)
        for label, name in enumerate(("ant", "bee", "c_at"))
        for number in range(12)
    }
    pack_image_folder(images, tmp_path / "again", samples_per_shard=9)
    pack_image_folder(images, tmp_path / "other", samples_per_shard=9, seed=1)
    (out / "index.npz").unlink()
    for sidecar in out.glob("*.npz"):
        sidecar.unlink()
    first, again, other = (tree(tmp_path / name) for name in ("out", "again", "other"))
    assert first == again
    assert first.keys() == other.keys()
    assert first != other


def test_refused_folders(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def pack() -> str:
        message = one_line(lambda: pack_image_folder(images, out))
        assert not out.exists()
        return message

    (images / "dog").mkdir()
    assert "dog holds no images: remove it or fill it" in pack()
    (images / "dog" / "a.b.png").write_bytes(b"1")
    (images / "dog" / "a_b.jpg").write_bytes(b"2")
    assert "duplicate key dog-a_b, of " in pack()
    (images / "dog" / "a_b.jpg").rename(images / "dog" / "c.gif")
    assert "c.gif is not a png, jpg, jpeg, webp file: convert it or move it away" in pack()
    for empty in (tmp_path / "nothing", images / "ant"):
        message = one_line(lambda: pack_image_folder(empty, out))  # noqa: B023
        assert "class folders" in message or "is not a folder" in message


# ---- tables and data sets ---------------------------------------------------------------------


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_table_is_packed(images: Path, tmp_path: Path, ending: str) -> None:
    rows = [
        {"path": f"images/ant/photo.{n}.{e}", "label": label, "source": "web"}
        for n, e, label in ((0, "png", "3"), (1, "JPG", "3 7"), (3, "webp", "7:0.25 2:0.75"))
    ]
    table = write_table(tmp_path / f"list.{ending}", rows)
    calls: list[tuple[int, int]] = []
    pack_table(table, tmp_path / "out", on_progress=lambda *call: calls.append(call))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    index = build_index(tmp_path / "out")
    found = {
        index.sample_id(0, row): (index.read(0, row), index.labels(0, row)) for row in range(3)
    }
    assert found == {
        "shard-000000/images_ant_photo_0": (b"0-0", {3: 1.0}),
        "shard-000000/images_ant_photo_1": (b"0-1", {3: 1.0, 7: 1.0}),
        "shard-000000/images_ant_photo_3": (b"0-3", {7: 0.25, 2: 0.75}),
    }
    assert index.max_labels == 2
    pack_table(table, tmp_path / "again")
    assert tree(tmp_path / "again").items() <= tree(tmp_path / "out").items()


def test_a_table_that_excel_has_saved(images: Path, tmp_path: Path) -> None:
    table = write_table(tmp_path / "a.csv", [{"path": "images/ant/photo.0.png", "label": 5}])
    table.write_text(table.read_text(), encoding="utf-8-sig")
    pack_table(table, tmp_path / "out")
    assert build_index(tmp_path / "out").labels(0, 0) == {5: 1.0}


def test_a_parquet_list_of_labels_and_keys_of_ones_own(images: Path, tmp_path: Path) -> None:
    row = {"path": "images/ant/photo.0.png", "label": [5, 4], "key": "mine"}
    pack_table(write_table(tmp_path / "a.parquet", [row]), tmp_path / "out")
    index = build_index(tmp_path / "out")
    assert (index.sample_id(0, 0), index.labels(0, 0)) == ("shard-000000/mine", {5: 1.0, 4: 1.0})


def test_refused_tables(images: Path, tmp_path: Path) -> None:
    def refused(*rows: dict[str, Any], name: str = "a.csv") -> str:
        table = write_table(tmp_path / name, list(rows))
        return one_line(lambda: pack_table(table, tmp_path / "out"))

    good = {"path": "images/ant/photo.0.png", "label": "1"}
    assert "a.csv, row 1: it must have a path and a label" in refused({"path": "x"})
    assert "row 2: duplicate key images_ant_photo_0" in refused(good, good)
    assert "images/none.png is not a png, jpg" in refused(good | {"path": "images/none.png"})
    assert "label 'cat' is none of 3, 3 7" in refused(good | {"label": "cat"})
    assert "must be a whole number" in refused(good | {"label": 1.5}, name="a.parquet")
    (tmp_path / "latin.csv").write_bytes("path,label\né.png,1\n".encode("latin-1"))
    said = one_line(lambda: pack_table(tmp_path / "latin.csv", tmp_path / "out"))
    assert "latin.csv is not UTF-8 (" in said
    for name in ("none.csv", "images"):
        message = one_line(lambda: pack_table(tmp_path / name, tmp_path / "out"))  # noqa: B023
        assert "is no table: give a file that ends in .csv or .parquet" in message
    assert not (tmp_path / "out").exists()


def test_rows_like_those_of_datasets(tmp_path: Path) -> None:
    pixels = np.arange(108, dtype=np.uint8).reshape(6, 6, 3)
    png, jpg = encode_image(pixels), encode_image(pixels, "jpg")
    rows = [
        {"img": Image.fromarray(pixels), "fine": 3},
        {"img": {"bytes": jpg, "path": None}, "fine": [1, 2]},
        {"img": png, "fine": {4: 0.5}},
    ]
    samples = list(dataset_samples(rows, image="img", label="fine"))
    assert samples == [
        ("000000000", png, "png", 3),
        ("000000001", jpg, "jpg", {1: 1.0, 2: 1.0}),
        ("000000002", png, "png", {4: 0.5}),
    ]
    pack_samples(samples, tmp_path, samples_per_shard=2)
    assert build_index(tmp_path).labels(0, 1) == {1: 1.0, 2: 1.0}
    assert "row 0: img is str; it must be a Pillow image" in one_line(
        lambda: list(dataset_samples([{"img": "x", "fine": 1}], image="img", label="fine"))
    )


@pytest.mark.parametrize("mode", ["I;16", "RGBA", "LA"])
def test_an_image_of_datasets_has_the_pixels_of_its_file(mode: str) -> None:
    """16 bits become 8, and transparency becomes white, from a file or from datasets."""
    values = np.linspace(0, 65535, 64).reshape(8, 8)
    image = Image.fromarray(values.astype(np.uint16))
    if mode != "I;16":
        image = Image.new(mode, (8, 8))  # transparent
    file = io.BytesIO()
    image.save(file, "png")
    ((_, png, _, _),) = dataset_samples([{"image": image, "label": 0}])
    np.testing.assert_array_equal(decode(png), decode(file.getvalue()))


@pytest.mark.parametrize("label", [[3, 3, 5], [[1], [2]], [], ["a"]])
def test_a_list_that_is_none_of_labels(label: list[Any]) -> None:
    """Votes are given as weights, {3: 2, 5: 1}; a list that repeats a label would lose them."""
    rows = [{"image": b"x", "label": label}]
    assert "row 0: " in one_line(lambda: list(dataset_samples(rows)))
    ((*_, found),) = dataset_samples([{"image": b"x", "label": np.array([4, 2])}])
    assert found == {4: 1.0, 2: 1.0}


def test_a_folder_with_a_colon_is_no_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pack_samples([("a", b"x", "png", 3)], "ds:v2", samples_per_shard=1)
    assert build_index("ds:v2").read(0, 0) == b"x"
    assert [*tmp_path.glob("ds:v2/*.tar")]


def test_a_weight_that_was_read_can_be_packed_again(tmp_path: Path) -> None:
    """Rounded to float32, a weight may fall just below the smallest allowed one."""
    pack_samples([("a", b"x", "png", {1: 1e-9})], tmp_path / "one", samples_per_shard=1)
    weights = build_index(tmp_path / "one").labels(0, 0)
    pack_samples([("a", b"x", "png", weights)], tmp_path / "two", samples_per_shard=1)
    assert build_index(tmp_path / "two").labels(0, 0) == weights


def test_shards_of_a_target_size(tmp_path: Path) -> None:
    samples: list[Sample] = [(f"{n}", b"x" * 99, "png", 1) for n in range(10)]  # 100 with the label
    pack_samples(samples, tmp_path, samples_per_shard=1000, shard_bytes=300)
    assert build_index(tmp_path).counts.tolist() == [3, 3, 3, 1]


# ---- images -----------------------------------------------------------------------------------


def test_encoding() -> None:
    pixels = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encode_image(pixels)))), pixels)
    small, large = (encode_image(pixels, "jpg", quality) for quality in (20, 95))
    assert Image.open(io.BytesIO(small)).format == "JPEG"
    assert len(small) < len(large)
    assert "it must be png or jpg" in one_line(lambda: encode_image(pixels, "bmp"))
    assert "quality is 0" in one_line(lambda: encode_image(pixels, "jpg", 0))
    assert "shape (5, 7)" in one_line(lambda: encode_image(pixels[..., 0]))
    assert "float32" in one_line(lambda: encode_image(pixels.astype(np.float32)))  # pyright: ignore
