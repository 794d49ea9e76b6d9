"""Faults of a table or a data set are reported at once, with the file and the row."""

from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from nfnets_xla.data.decode import decode
from nfnets_xla.data.index import build_index
from nfnets_xla.data.sources import dataset_samples, pack_table


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(b"a")
    return tmp_path


def one_line(action: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (callers compare the message)
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


def refused(table: Path) -> str:
    out = table.parent / "out"
    said = one_line(lambda: pack_table(table, out))
    assert not out.exists()
    return said


def write_parquet(folder: Path, **columns: Any) -> Path:
    parquet.write_table(pyarrow.table(columns), folder / "t.parquet", compression="none")
    return folder / "t.parquet"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('a.png,1\na.png,"3\n', "t.csv, row 2: unexpected end of data: mend its quotes"),
        ('a.png,"3\n' + "b.png,1\n" * 20_000, "t.csv, row 1: field larger than field limit"),
        (".,1\n", "t.csv, row 1: "),
    ],
)
def test_a_damaged_csv_is_refused_with_its_row(folder: Path, text: str, message: str) -> None:
    (folder / "t.csv").write_text(f"path,label\n{text}")
    assert message in refused(folder / "t.csv")


@pytest.mark.parametrize("path", [3, b"a.png"])
def test_a_path_that_is_no_text_is_refused_with_its_row(folder: Path, path: Any) -> None:
    table = write_parquet(folder, path=[path], label=[1])
    assert f"t.parquet, row 1: path is {path!r}; it must be text" in refused(table)


@pytest.mark.parametrize("label", [-1, 2**31, 3.0, float("nan"), True, Decimal(3), b"3"])
def test_a_label_that_is_no_whole_number_is_refused_with_its_row(folder: Path, label: Any) -> None:
    table = write_parquet(folder, path=["a.png"], label=[label])
    said = f"t.parquet, row 1: label is {label!r}; it must be a whole number of 0 to 2147483647"
    assert said in refused(table)


@pytest.mark.parametrize("kept", [slice(0), slice(-9), slice(40, None)])
def test_a_damaged_parquet_is_refused_by_its_name(folder: Path, kept: slice) -> None:
    """An empty file, one without a footer, and pages that are not where the footer says."""
    table = write_parquet(folder, path=["a.png"], label=[1])
    table.write_bytes(table.read_bytes()[kept])
    assert refused(table).startswith(f"{table}, row 1: ")
    assert refused(table).endswith(": write the file again")


def test_other_columns_of_a_parquet_are_not_read(folder: Path) -> None:
    """They may hold the images. Here they are damaged, which has no effect."""
    table = write_parquet(folder, image=[b"pixels" * 1000], path=["a.png"], label=[1])
    data = table.read_bytes()
    table.write_bytes(data[:4] + bytes(40) + data[44:])  # the header of the first page
    with pytest.raises(OSError, match="header"):
        parquet.read_table(table)
    pack_table(table, folder / "out")
    assert build_index(folder / "out").labels(0, 0) == {1: 1.0}


def test_a_label_that_numpy_has_wrapped_is_a_number() -> None:
    ((*_, found),) = dataset_samples([{"image": b"x", "label": np.array(3)}])
    assert found == 3
    assert type(found) is int


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            np.linspace(0, 1, 64, dtype=np.float32),
            "has fractions as pixels, mode F: bring it",
        ),
        (np.arange(64, dtype=np.int32) * 4, "has pixels of 0 to 252, mode I: bring it"),
        (np.arange(64, dtype=np.int32) * 2000, "has pixels of 0 to 126000, mode I"),
        (np.arange(64, dtype=np.int32) * 1000 - 1, "has pixels of -1 to 62999, mode I"),
    ],
)
def test_an_image_whose_white_is_unknown_is_refused(values: Any, message: str) -> None:
    """Images with values from 0 to 255 or from 0 to 1 used to be packed as black."""
    rows = [{"image": Image.fromarray(values.reshape(8, 8)), "label": 0}]
    assert f"row 0: image {message}" in one_line(lambda: list(dataset_samples(rows)))


def test_an_image_of_sixteen_bits_in_32_is_scaled() -> None:
    grey = np.arange(64, dtype=np.int32).reshape(8, 8) * 1000
    ((_, png, _, _),) = dataset_samples([{"image": Image.fromarray(grey), "label": 0}])
    np.testing.assert_array_equal(decode(png)[..., 0], grey >> 8)
